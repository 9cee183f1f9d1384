import os
import signal
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import fid  # noqa: E402

torch.set_num_threads(1)        # tiny networks: no slower, and much faster on a busy machine


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """No test reads or writes the user's own ~/.cache/fewstep, or what stands in runs/."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(fid, "CACHE", folder)
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    return folder


@pytest.fixture(autouse=True)
def the_old_signals():
    """A run installs signal handlers."""
    old = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
    yield
    for n, handler in old:
        signal.signal(n, handler)


def assert_same(a, b):
    """Equal bit for bit, through nested dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        [assert_same(a[k], b[k]) for k in a]
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        [assert_same(x, y) for x, y in zip(a, b)]
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b
