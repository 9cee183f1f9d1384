"""tests/classify.py: it learns the shapes, and counts what is of another class."""
import numpy as np
import pytest
import torch

import classify
import fid


def test_it_tells_the_shapes_and_counts_the_others(tmp_path, monkeypatch, capsys):
    drawn, trained = fid.shapes, classify.classifier
    monkeypatch.setattr(fid, "shapes", lambda n=2000, seed=0: drawn(min(n, 2000), 32, seed))
    monkeypatch.setattr(classify, "classifier", lambda *data: trained(*data, updates=150))
    pixels, labels = drawn(300, 32, seed=2)
    images = pixels.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "right.npz", images=images, labels=labels)
    np.savez(tmp_path / "wrong.npz", images=images, labels=(labels + 1) % 10)
    classify.main([str(tmp_path / "right.npz"), str(tmp_path / "wrong.npz")])
    real, right, other = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert real < 15 and right < 15 and other > 85


def test_the_share_that_is_wrong():
    net = lambda x: torch.eye(10)[:3].repeat(len(x) // 3, 1)        # says 0, 1, 2, 0, 1, 2, ...
    pixels = torch.zeros(6, 3, 32, 32, dtype=torch.uint8)
    assert classify.wrong(net, pixels, torch.tensor([0, 1, 2, 0, 5, 2])) == 1 / 6


def test_what_is_no_sample_of_shapes_is_one_line(tmp_path):
    np.savez(tmp_path / "s.npz", images=np.zeros((2, 16, 16, 3), np.uint8), labels=[0, 1])
    with pytest.raises(fid.UserError, match="s.npz: expected images"):
        classify.main([str(tmp_path / "s.npz")])
