"""tests/pictures.py: strips of the grids that the scripts save."""
import argparse

import pytest
import torch
from PIL import Image

import dmd2
import pictures


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(pictures, "ASSETS", tmp_path)
    return tmp_path


def grid(path, *greys):
    """One of dmd2.py's own: ten columns, a grey level a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.tensor(greys, dtype=torch.uint8).repeat_interleave(10)[:, None, None, None]
    run = argparse.Namespace(write=lambda name, save: save(path),
                             args=argparse.Namespace(resolution=32))
    dmd2.save_grid(run, path.name, pixels.expand(-1, 3, 32, 32))
    return path


def centres(path):
    image = Image.open(path)
    return [image.getpixel((x, i * pictures.CELL + 36))[0] for i in range(image.height // 68)
            for x in (pictures.MARGIN + 36, pictures.MARGIN + 9 * pictures.CELL + 36)]


def test_a_strip_has_the_rows_it_was_asked_for(folders, capsys):
    one = grid(folders / "runs" / "one.png", 10, 20, 30)
    other = grid(folders / "runs" / "other.png", 200)
    pictures.strip("both", [("second", one, 1), ("first of\nthe other", other, 0)])
    assert centres(folders / "both.png") == [20, 20, 200, 200]
    pictures.strip("none", [("gone", folders / "gone.png", 0)])
    assert "gone.png" in capsys.readouterr().out and not (folders / "none.png").exists()


def test_progress_is_a_tenth_three_tenths_and_the_end(folders, capsys):
    for name in "shortcut", "dmd2", "add":
        folder = folders / "runs" / f"{name}-shapes"
        for i in range(1, 11):
            grid(folder / "progress" / f"{100 * i:07d}.png", 20 * i)
        grid(folder / "progress" / "teacher-0000100.png", 255)
        (folder / "log.csv").write_text("step,seconds\n" + "".join(
            f"{100 * i},{60 * i}\n" for i in range(1, 11)))
    pictures.progress()
    assert centres(folders / "progress.png") == 3 * [20, 20, 60, 60, 200, 200]
    for path in folders.glob("runs/add-shapes/progress/*900.png"):
        path.unlink()
    pictures.progress()
    assert "progress: no" in capsys.readouterr().out


def test_a_chart_has_the_distances_of_the_mean_at_the_minutes_of_training(folders, capsys):
    run = folders / "runs" / "some"
    pictures.chart("chart", [("some", (255, 0, 0), 7, run, 1)])
    assert "chart: no" in capsys.readouterr().out and not (folders / "chart.png").exists()
    run.mkdir(parents=True)
    (run / "log.csv").write_text("step,seconds\n50,60\n100,120\n150,240\n")
    (run / "scores.csv").write_text("step,nfe,who,value\n30,1,some ema,1\n150,1,some ema,1\n")
    pictures.chart("chart", [("some", (255, 0, 0), 7, run, 1)])     # at the end alone
    assert "--score-every" in capsys.readouterr().out and not (folders / "chart.png").exists()
    (run / "scores.csv").write_text(
        "step,nfe,who,value\n50,1,some ema,1\n50,4,some ema,7\n150,35,teacher ema,0.1\n"
        "100,1,some ema,0.1\n150,1,some,5\n150,1,some ema,9\n150,1,some ema,0.01\n")
    assert pictures.curve(run, 1) == [(1, 1), (2, 0.1), (4, 0.01)]          # of the last scoring
    pictures.chart("chart", [("some", (255, 0, 0), 7, run, 1)])
    image = Image.open(folders / "chart.png").convert("RGB")
    left, middle, right = (next(y for y in range(image.height) if image.getpixel((x, y))[1] < 50)
                           for x in (55 + 180, 55 + 360, 55 + 720))         # half of the picture's
    assert abs((right - middle) - (middle - left)) <= 2     # a straight line in the logarithm
    assert image.getpixel((55 + 72, left))[1] > 50          # and nothing before the first minute


def test_a_loss_is_the_mean_over_updates_of_the_phase_that_has_it(folders, capsys):
    """Rows of one update and of 49, after a checkpoint that came between, are one of 50."""
    pictures.losses()
    assert "losses: no training to its end in" in capsys.readouterr().out
    for name, first, columns in (("shortcut", 0, "loss_flow,loss_shortcut"),
                                 ("dmd2", 100, "loss_disc,loss_gan,loss_fake"),
                                 ("add", 100, "loss_adv,d_real,d_fake")):
        folder, n = folders / "runs" / f"{name}-shapes", columns.count(",")
        folder.mkdir(parents=True)
        rows = [f"{first + 1},1,{5 * f'{v},'}" for v in [99]] + [
            f"{first + step},1,{5 * f'{step / 100},'}" for step in (50, 100, 200, 400)]
        before = f"{first},1,,,,,\n" * bool(first)
        (folder / "log.csv").write_text(f"step,seconds,{columns}{',x' * (4 - n)}\n" + before
                                        + "\n".join(row.rstrip(",") for row in rows) + "\n")
        points = pictures.column(folder, columns.split(",")[0])
        assert points == [(50, pytest.approx((99 + 49 * 0.5 + 50 * 1) / 100)), (150, 2), (350, 4)]
    pictures.losses()
    assert Image.open(folders / "losses.png").width == 1170
