import os
import signal
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import fid  # noqa: E402


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """No test reads or writes the user's own ~/.cache/fewstep."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(fid, "CACHE", folder)
    return folder


@pytest.fixture(autouse=True)
def the_old_signals():
    """A run installs signal handlers."""
    old = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
    yield
    for n, handler in old:
        signal.signal(n, handler)
