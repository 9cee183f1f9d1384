"""The contract with users: run folder, resume bit for bit, signals, bad input;
at tiny sizes, without a network."""
import csv
import importlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import add
import dmd2
import fid
import shortcut
from conftest import assert_same

ROOT = pathlib.Path(__file__).parent.parent
TINY = "--device cpu --precision fp32 --resolution 16 --channels 16 --mult 1,1 --blocks 1,1 " \
       "--batch 8 --samples 32 --steps 1,2".split()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(fid, "shapes",
                        lambda resolution: SMALL[resolution])           # 200 images, drawn once
    monkeypatch.setattr(shortcut, "draw", lambda run, generate, classes, name, draw=shortcut.draw:
                        draw(run, lambda z, y, n: generate(z, y, min(n, 4)), classes, name))


SMALL = {r: fid.shapes(200, r) for r in (16, 32)}


def weights(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def stop_after(monkeypatch, n, number=signal.SIGTERM):
    """Send the process a signal within its n-th step."""
    real, calls = shortcut.shortcut_loss, []
    def loss(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)
    monkeypatch.setattr(shortcut, "shortcut_loss", loss)


# ---- a run ---------------------------------------------------------------------------------------

def test_without_a_bar_there_is_a_line_a_minute(tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10 ** 6, 25))                     # seconds, at each look
    monkeypatch.setattr(shortcut.time, "monotonic", lambda: next(clock))
    shortcut.main([*TINY, "--out", str(tmp_path / "run"), "--iters", "8", "--samples", "0"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines and all(re.fullmatch(r"step [1-8] of 8: kept", line) for line in lines)

@pytest.mark.parametrize("module", [shortcut, dmd2, add])
def test_one_process_a_folder(module, tmp_path):
    out = tmp_path / "run"
    (out / "progress").mkdir(parents=True)
    other = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time\n"
         "file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
         "print('locked', flush=True); time.sleep(60)", str(out / "progress" / "lock")],
        stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(fid.UserError, match="another process is training there"):
            module.main([*TINY, "--out", str(out)])
        assert not (out / "args.json").exists()
    finally:
        other.kill()                                        # the lock goes with its process
        other.wait()
    args = module.parse_args([*TINY, "--out", str(out)])
    module.Run(args, torch.device("cpu"), fid.Images(*SMALL[16], [], "shapes"), {}).begin("it", 1)


def test_a_run_leaves_what_the_readme_says(tmp_path, capsys):
    out = tmp_path / "run"
    shortcut.main([*TINY, "--out", str(out), "--iters", "10", "--npz"])
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert names >= {"args.json", "log.csv", "checkpoint.pt", "scores.csv", "samples-1step.png",
                     "samples-2step.png", "samples-1step.npz", "samples-2step.npz",
                     "progress/0000010.png"}
    assert not [n for n in names if pathlib.Path(n).name.startswith(".")]  # no temporary file stays
    lines = [l for l in capsys.readouterr().out.splitlines() if l.startswith("FD-random")]
    assert len(lines) == 2
    for n, line in zip((1, 2), lines):
        assert re.fullmatch(rf"FD-random [\d.e+]+ \| random \| 32 samples vs 200 shapes train \| "
                            rf"NFE {n} \| shortcut ema \| \d+ img/s \| "
                            r"fewer than 2048 samples and real images: biased upward", line)
    with np.load(out / "samples-1step.npz") as z:
        assert z["images"].dtype == np.uint8 and z["images"].shape[1:] == (16, 16, 3)
        assert len(z["labels"]) == len(z["images"]) and set(z["labels"]) == set(range(10))
    about = json.loads((out / "args.json").read_text())
    assert (about["args"]["iters"] == 10 and about["args"]["k"] == 0.25
            and about["torch"] == torch.__version__)
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [r["step"] for r in rows] == ["10"] and float(rows[0]["loss_flow"]) > 0
    scores = list(csv.DictReader((out / "scores.csv").open()))
    assert [(r["nfe"], r["metric"]) for r in scores] == [("1", "FD-random"), ("2", "FD-random")]


def test_ten_steps_are_five_and_resume_and_five_bit_for_bit(tmp_path, monkeypatch, capsys):
    line = [*TINY, "--iters", "10", "--samples", "0", "--dropout", "0.2", "--flip",
            "--cfg", "1.5"]
    shortcut.main([*line, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        stop_after(patch, 5)
        shortcut.main([*line, "--out", str(tmp_path / "halves")])
    assert stop.value.code == 143 and weights(tmp_path / "halves")["step"] == 5
    assert "stopped at step 5; the same command goes on" in capsys.readouterr().out
    shortcut.main([*line, "--out", str(tmp_path / "halves")])
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "halves"))
    for name in ("samples-1step.png", "samples-2step.png", "progress/0000010.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()


def test_a_finished_run_only_samples_and_takes_its_options_from_the_folder(tmp_path, capsys):
    line = ["--out", str(tmp_path / "run")]
    shortcut.main([*TINY, *line, "--iters", "3", "--samples", "0"])
    before = weights(tmp_path / "run")
    picture = tmp_path / "run" / "samples-1step.png"
    kept = picture.read_bytes()
    shortcut.main([*line, "--steps", "1,128", "--samples", "0", "--labels", "heart, 3"])
    assert_same(weights(tmp_path / "run"), before)
    chosen = [picture.with_name(f"samples-heart-3-{n}step.png") for n in (1, 128)]
    assert picture.read_bytes() == kept != chosen[0].read_bytes() and chosen[1].exists()
    picture.unlink()
    shortcut.main([*line, "--steps", "1", "--samples", "0"])
    assert picture.read_bytes() == kept
    with pytest.raises(fid.UserError, match="was trained with --iters 3, not 4"):
        shortcut.main([*line, "--iters", "4"])
    with pytest.raises(fid.UserError,
                       match="was trained with --k 0.25, not 0.0; give another --out"):
        shortcut.main([*line, "--k", "0"])


def test_scored_samples_have_the_datas_proportions_and_the_picture_all_classes(tmp_path,
                                                                                 monkeypatch):
    pixels, labels = SMALL[16]
    some = torch.cat([(labels == 3).nonzero()[:15, 0], (labels == 7).nonzero()[:5, 0]])
    monkeypatch.setattr(fid, "shapes", lambda resolution: (pixels[some], labels[some]))
    drawn, scored = [], []
    def sample(s, x, y, *rest, real=shortcut.sample):
        drawn.append(y)
        return real(s, x, y, *rest)
    def score(self, pixels, real=shortcut.Scorer.__call__):
        scored.append(pixels)
        return real(self, pixels)
    monkeypatch.setattr(shortcut, "draw", lambda *args: None)
    monkeypatch.setattr(shortcut, "sample", sample)
    monkeypatch.setattr(shortcut.Scorer, "__call__", score)
    shortcut.main([*TINY, "--steps", "1", "--samples", "40", "--iters", "1", "--npz", "--out",
                   str(tmp_path)])
    y, = drawn
    assert y[:80].tolist() == 8 * [*range(10)]
    assert y[80:].bincount(minlength=10).tolist() == [0, 0, 0, 30, 0, 0, 0, 10, 0, 0]
    assert y[80:].tolist() != sorted(y[80:].tolist())           # two halves are alike
    with np.load(tmp_path / "samples-1step.npz") as z:
        assert z["labels"].tolist() == y[80:].tolist()
        assert (z["images"] == scored[0].permute(0, 2, 3, 1).numpy()).all() and len(scored) == 1
    shortcut.main(["--out", str(tmp_path), "--steps", "1", "--samples", "0", "--npz"])
    with np.load(tmp_path / "samples-1step.npz") as z:                  # the picture's
        assert z["labels"].tolist() == y[:80].tolist() and len(z["images"]) == 80


def test_samples_do_not_depend_on_the_batch_they_were_drawn_in():
    args = shortcut.parse_args([*TINY, "--out", "nowhere"])
    noise = shortcut.noise_of(range(6), args)
    alone = [shortcut.noise_of([i], args) for i in range(6)]
    together, more = noise(), noise()
    assert torch.equal(together, torch.cat([own() for own in alone]))
    assert torch.equal(more, torch.cat([own() for own in alone])) and (together != more).all()
    assert abs(together.std() - 1) < 0.05 and not torch.equal(together[0], together[1])
    torch.manual_seed(0)
    s = shortcut.Shortcut(shortcut.UNet(16, 16, (1, 1), (1, 1),
                                        num_classes=10, conditions=2)).eval()
    torch.nn.init.normal_(s.net.conv_out.weight)
    y = torch.arange(6)
    whole = shortcut.sample(s, together, y, 4)
    parts = [shortcut.sample(s, together[i:i + 2], y[i:i + 2], 4) for i in (0, 2, 4)]
    torch.testing.assert_close(whole, torch.cat(parts), atol=1e-4, rtol=1e-4)


def test_ema_is_the_closed_form():
    net = torch.nn.Linear(1, 1, bias=False)
    ema = shortcut.AveragedModel(net, multi_avg_fn=shortcut.get_ema_multi_avg_fn(0.9))
    values, expected = [3.0, -1.0, 4.0, 1.5], None
    for v in values:
        net.weight.data.fill_(v)
        ema.update_parameters(net)
        expected = v if expected is None else 0.9 * expected + 0.1 * v
    assert ema.module.weight.item() == pytest.approx(expected, rel=1e-6)


def test_shapes_that_were_trained_on_are_what_a_folder_gives(tmp_path):
    """A folder of the same images trains the same weights: the data's source does not matter."""
    pixels, labels = SMALL[16]
    for i, (p, y) in enumerate(zip(pixels, labels)):
        (tmp_path / "set" / f"{y:02d}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(p.permute(1, 2, 0).numpy()).save(
            tmp_path / "set" / f"{y:02d}" / f"{i:04d}.png")
    out = tmp_path / "run"
    shortcut.main([*TINY, "--data", str(tmp_path / "set"), "--out", str(out), "--iters", "2",
                   "--features", "random"])
    assert f"200,{tmp_path / 'set'}" in (out / "scores.csv").read_text()


def test_the_common_blocks_are_the_same_in_all_scripts():
    """So that a diff of two scripts shows nothing but the method."""
    def blocks(name):
        text = (ROOT / name).read_text()
        parts = re.split(r"^# ---- (.*?) -*$", text, flags=re.M)
        found = {t: body for t, body in zip(parts[1::2], parts[2::2]) if t.startswith("common")}
        return found | dict(imports=re.search(r"^import argparse.*?(?=^METHOD)", text,
                                              re.M | re.S).group())
    first, second, third = map(blocks, ("shortcut.py", "dmd2.py", "add.py"))
    assert [*first] == ["common: arguments", "common: the run folder",
                        "common: pictures and scores", "imports"]
    for title, text in first.items():
        assert second[title] == text and third[title] == text
    assert second == third and len(second) == len(first) + 1


# ---- mistakes ------------------------------------------------------------------------------------

MISTAKES = [                                                # of any of the scripts
    ("--steps one", "--steps: 'one': expected whole numbers, as 1,2,4"),
    ("--steps ,", "--steps: ',': expected whole numbers"), ("--steps 0", "--steps 0: a "),
    ("--steps 256", "--steps 256: a "), ("--steps -1", "--steps -1: a "),
    ("--samples 1", "--samples 1: has no covariance"),
    ("--samples -1", "--samples -1: expected 0 or more"),
    ("--samples 1e5", "--samples: invalid int value"),
    ("--data nowhere", "--data nowhere: no such data set or folder"),
    ("--data EMPTY", "no images in it"), ("--data README.md", "is a file"),
    ("--data BROKEN --features random", "BROKEN/1.png: cannot be read (not an image)"),
    ("--data SMALL --features random", "SMALL/1.png: 8x8 is smaller than 32x32"),
    ("--data BATCHES --features random", "train_data_batch_1.npz: cannot be read as .npz"),
    ("--data cifar10 --resolution 64", "cifar10 is 32x32"),
    ("--labels unicorn", "--labels unicorn: shapes train has the classes circle, square"),
    ("--labels heart,unicorn", "--labels unicorn: shapes train has the classes"),
    ("--labels 10", "--labels 10: shapes train has the classes"),
    ("--iters 0", "--iters 0: expected 1 or more"), ("--iters 1.5", "--iters: invalid int value"),
    ("--iters 99999999999", "--iters 99999999999: expected 1 or more"),
    ("--batch -4", "--batch -4: expected 1 or more"),
    ("--accumulate 0", "--accumulate 0: expected 1 or more"),
    ("--batch 16 --accumulate 3", "--batch 16: expected a multiple of 1 processes x --accumulate"),
    ("--seed -1", "--seed -1: expected 0 or more"),
    ("--seed 99999999999", "--seed 99999999999: expected"),
    ("--lr 20", "--lr 20.0: expected a number between 0 and 1"),
    ("--lr nan", "--lr nan: expected a number between 0 and 1"),
    ("--lr 0", "--lr 0.0: expected a number between 0 and 1"),
    ("--ema 1", "--ema 1.0: expected a number from 0 to below 1"),
    ("--dropout -0.1", "--dropout -0.1: expected a number from 0 to below 1"),
    ("--cfg -1", "--cfg"), ("--cfg nan", "--cfg"), ("--label-dropout 2", "--label-dropout"),
    ("--channels 24", "--channels 24: expected a multiple of 16"),
    ("--channels 8", "--channels 8: expected a multiple of 16"),
    ("--mult 1,2", "--mult and --blocks: expected as many numbers"),
    ("--mult none", "--mult and --blocks: expected as many numbers"),
    ("--blocks 0,1,1", "--mult and --blocks: expected as many numbers, each at least 1"),
    ("--attention 7", "--attention 7: no stage has that resolution"),
    ("--resolution 18", "--resolution 18: cannot be halved 2 times"),
    ("--resolution 4", "--resolution 4: expected 8 or more"),
    ("--device tpu", "--device tpu: not available here"),
    ("--device cuda:99", "--device cuda:99: not available here"),
    ("--device hpu", "--device hpu: not available here"),
    (f"--data {300 * 'x'}", f"--data {300 * 'x'}: no such data set or folder"),
    ("--precision fp8", "--precision: invalid choice"),
    ("--features vgg", "--features: invalid choice"),
    ("--inception nowhere.pth --features inception", "--inception nowhere.pth: cannot be read"),
    ("--inception README.md --features inception", "README.md: not the FID weights"),
    ("--inception README.md", "README.md: not the FID weights"),            # not ignored
    ("--inception README.md --features random", "--inception: is of no use with --features random"),
    ("--out README.md/run", "--out README.md/run: cannot be made"),
    ("--out FULL", "--out FULL: is no run folder and not empty"),
    ("--out OTHER", "OTHER: holds a run of other.py"),
    ("--out HALF", "HALF/checkpoint.pt: does not load"),
    ("--out HALF --iters 7", "HALF: was trained with --iters"),
    ("--nonsense 1", "unrecognized arguments: --nonsense 1; --help lists the options"),
    ("--step 1", "unrecognized arguments: --step 1")]
TEACHERS = [                                                # of the scripts that have --teacher
    ("--teacher nowhere", "--teacher nowhere: holds no run of"),
    ("--teacher README.md", "--teacher README.md: holds no run of"),
    ("--teacher EMPTY", "--teacher EMPTY: holds no run of"),
    ("--teacher FULL", "--teacher FULL: --out FULL: is no run folder and not empty"),
    ("--teacher OTHER", "--teacher OTHER: holds a run of other.py"),
    ("--teacher HALF", "--teacher HALF: HALF/checkpoint.pt: does not load"),
    ("--teacher HALF --channels 16", "--teacher HALF: was trained with --channels 32, not 16"),
    ("--teacher-batch 0", "--teacher-batch 0: expected 1"),
    ("--teacher-batch 9 --accumulate 2", "--teacher-batch 9: expected a multiple of 1 processes"),
    ("--teacher HALF --batch 32 --accumulate 32", "--teacher HALF: HALF/checkpoint.pt: does not"),
    ("--teacher-iters -1", "--teacher-iters -1: expected 1"),
    ("--teacher-lr inf", "--teacher-lr inf: expected a number between 0 and 1"),
    ("--teacher-ema 1", "--teacher-ema 1.0: expected a number from 0 to below 1"),
    ("--teacher-steps -1", "--teacher-steps -1: expected 0")]
SHORTCUTS = [
    ("--steps 3", "--steps 3: a shortcut model jumps in 1, 2, 4"),
    ("--weight-decay -1", "--weight-decay -1.0: expected at least 0"),
    ("--k 1", "--k 1.0: expected a number from 0 to below 1"),
    ("--k nan", "--k nan: expected a number from 0 to below 1"),
    ("--cfg 2 --label-dropout 0", "--cfg 2.0: needs the null label to be learned")]
ALL = [(method, *mistake) for method in ("shortcut", "dmd2", "add") for mistake in
       MISTAKES + (SHORTCUTS if method == "shortcut" else TEACHERS)]


@pytest.mark.parametrize("method, line, message", ALL, ids=[" ".join(m[:2]) for m in ALL])
def test_a_mistake_is_one_line_and_touches_nothing(method, line, message, tmp_path, monkeypatch):
    """Those of one method alone are in test_dmd2.py and test_add.py."""
    module = importlib.import_module(method)
    monkeypatch.chdir(tmp_path)
    stored = json.dumps(dict(args=vars(module.parse_args([]))))
    files = {"README.md": "text", "FULL/log.csv": "text", "BROKEN/1.png": "text",
             "OTHER/args.json": '{"args": {"method": "other"}}', "HALF/args.json": stored,
             "HALF/checkpoint.pt": "0123456789", "BATCHES/train_data_batch_1.npz": "text"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for folder in "EMPTY", "SMALL":
        (tmp_path / folder).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "SMALL" / "1.png")
    folders = {p for p in tmp_path.rglob("*") if p.is_dir()}
    for name in "shortcut_loss", "denoising_loss", "teacher_loss":      # nothing may train
        monkeypatch.setattr(module, name, None, raising=False)
    if "BATCHES" in line:
        line += " --resolution 32 --mult 1,1 --blocks 1,1 --attention none --channels 16"
    with pytest.raises(fid.UserError) as error:
        module.main(["--device", "cpu", *line.split()])
    assert message in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "SMALL" / "1.png").unlink()
    left = {p.relative_to(tmp_path).as_posix(): p.read_text()
            for p in tmp_path.rglob("*") if p.is_file()}
    assert left == files and folders == {p for p in tmp_path.rglob("*") if p.is_dir()}


def test_torchruns_processes_need_a_gpu_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(fid.UserError, match="process 2 has no GPU of its own; start 1, or give"):
        fid.pick_device("auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)             # none at all
    with pytest.raises(fid.UserError, match=r"--device cuda: not available here \((?!torchrun)"):
        fid.pick_device("cuda")


def test_a_mistake_exits_with_2_and_no_traceback(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "shortcut.py", "--steps", "3"], cwd=tmp_path,
                          text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("shortcut.py: --steps 3: "
                           "a shortcut model jumps in 1, 2, 4, ... or 128 steps\n")
    assert not list(tmp_path.iterdir())


def test_guidance_needs_classes_and_processes_each_other(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "one.png")
    line = ["--device", "cpu", "--resolution", "16", "--data", str(tmp_path),
            "--out", str(tmp_path / "run")]
    for script in shortcut, dmd2, add:
        with pytest.raises(fid.UserError, match="--cfg 2.0: .* has no classes to guide to"):
            script.main([*line, "--cfg", "2", "--samples", "0"])
    with pytest.raises(fid.UserError, match="--weighting nfsd: .* has no other class"):
        add.main([*line, "--weighting", "nfsd", "--samples", "0"])
    monkeypatch.setenv("WORLD_SIZE", "2")                  # but nothing else of torchrun's
    with pytest.raises(fid.UserError, match="torchrun: processes cannot be joined on cpu .*RANK"):
        shortcut.main(line)


@pytest.mark.parametrize("options", ["--k 0", "--k 0 --cfg 2", "--batch 1", "--batch 2 --k 0.1",
                                     "--cfg 2 --label-dropout 0.5"])
def test_every_kind_of_batch_trains_and_samples(options, tmp_path, capsys):
    shortcut.main([*TINY, *options.split(), "--out", str(tmp_path / "run"), "--iters", "3",
                   "--steps", "1,128"])
    lines = [l for l in capsys.readouterr().out.splitlines() if l.startswith("FD-random")]
    # Guidance asks twice: where the jumps have not learned it, at the finest length.
    calls = {"--cfg": ("NFE 1", "NFE 256"), "--k 0 --cfg 2": ("NFE 2", "NFE 256")}.get(
        options if options.startswith("--k") else options.split()[0], ("NFE 1", "NFE 128"))
    assert tuple(line.split(" | ")[3] for line in lines) == calls
    assert ("flow ema" if options.startswith("--k 0") else "shortcut ema") in lines[0]


def test_flow_matching_is_sampled_at_the_length_it_was_trained_at(tmp_path, monkeypatch):
    """--k 0 trains d = 1/128 alone; at other lengths the network was never asked."""
    seen, real = set(), shortcut.Shortcut.forward
    def forward(self, x, t, d, y):
        seen.update(d.tolist())
        return real(self, x, t, d, y)
    monkeypatch.setattr(shortcut.Shortcut, "forward", forward)
    shortcut.main([*TINY, "--k", "0", "--out", str(tmp_path / "run"), "--iters", "2"])
    assert seen == {1 / 128}


def test_downsampled_imagenet_trains_as_the_same_images_do(tmp_path, monkeypatch):
    """From an array on the disk; no image is hashed again."""
    pixels, labels = SMALL[16]
    (tmp_path / "set").mkdir()
    for n, rows in (1, slice(0, 120)), (2, slice(120, 200)):
        np.savez(tmp_path / "set" / f"train_data_batch_{n}.npz", labels=labels[rows] + 1,
                 data=pixels[rows].flatten(1).numpy())
    line = [*TINY, "--flip", "--attention", "none", "--dropout", "0", "--ema", "0.9", "--lr",
            "1e-3", "--iters", "2", "--features", "random"]
    shortcut.main([*line, "--data", str(tmp_path / "set"), "--out", str(tmp_path / "run")])
    assert f"200,{'set'} train" in (tmp_path / "run" / "scores.csv").read_text()
    seen, other = [], shortcut.shortcut_loss
    def loss(s, s_ema, x_0, x_1, *rest, **kwargs):
        seen.append(x_1)
        return other(s, s_ema, x_0, x_1, *rest, **kwargs)
    monkeypatch.setattr(shortcut, "shortcut_loss", loss)
    for name, data in ("a", str(tmp_path / "set")), ("b", "shapes"):
        shortcut.main([*line, "--data", data, "--out", str(tmp_path / name), "--samples", "0"])
    assert len(seen) == 4 and torch.equal(torch.cat(seen[:2]), torch.cat(seen[2:]))


@pytest.mark.parametrize("script", [shortcut, dmd2, add])
def test_attention_of_a_preset_moves_to_a_stage_that_is_there(script, tmp_path):
    parse = lambda *line: script.parse_args(["--data", str(tmp_path), *line]).attention
    assert parse() == (8,) and parse("--resolution", "64") == (16,)
    assert parse("--mult", "1,2", "--blocks", "1,1") == (16,)
    with pytest.raises(fid.UserError, match="--attention 8: no stage .* expected some of 64,32,16"):
        parse("--resolution", "64", "--attention", "8")


@pytest.mark.parametrize("script", [shortcut, dmd2, add])
def test_a_preset_is_its_column_whatever_the_data(script, tmp_path):
    args = lambda *line: vars(script.parse_args([*line]))
    asked = args("--data", str(tmp_path), "--preset", "shapes", "--lr", "0.25")
    assert asked == args("--lr", "0.25") | {name: asked[name] for name in ("data", "out")}
    assert asked["data"] == str(tmp_path)
    by_data = args("--data", "cifar10")
    assert by_data["preset"] == "cifar10" and by_data == args("--data", "cifar10", "--preset",
                                                              "cifar10")


def test_a_run_keeps_its_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["--preset", "cifar10", "--out", "run"]
    shortcut.main([*TINY, *line, "--attention", "none", "--iters", "1", "--samples", "0"])
    again = shortcut.parse_args(["--out", "run"])
    assert (again.preset, again.ema_targets, again.samples) == ("cifar10", True, 50_000)
    assert shortcut.parse_args(line) == again
    with pytest.raises(fid.UserError, match="was trained with --preset cifar10, not shapes"):
        shortcut.parse_args(["--out", "run", "--preset", "shapes"])
    about = json.loads((tmp_path / "run" / "args.json").read_text())
    del about["args"]["preset"]                             # of before there were presets to choose
    (tmp_path / "run" / "args.json").write_text(json.dumps(about))
    with pytest.raises(fid.UserError, match="was trained with --preset shapes, not cifar10"):
        shortcut.parse_args(["--out", "run", "--preset", "cifar10"])


def test_a_folder_called_shapes_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    with pytest.raises(fid.UserError, match="no images in it"):
        shortcut.main(["--data", "./shapes", "--device", "cpu"])


def test_compile_is_for_both_networks_and_the_training_alone(tmp_path, monkeypatch):
    """What it compiles to is PyTorch's business; a compiler may be missing where the tests run.
    Samples come in batches of other sizes, which would each be compiled anew."""
    asked, calls, real = [], [], torch.compile

    def backend(graph, inputs):
        return lambda *args: calls.append(len(args)) or graph(*args)

    def traced(f, mode):
        asked.append((f.__self__, f.__name__, mode))
        return real(f, backend=backend)
    monkeypatch.setattr(torch, "compile", traced)
    line = [*TINY, "--compile", "--out", str(tmp_path / "run"), "--iters", "2"]
    shortcut.main([*line, "--samples", "0"])
    assert [names for _, *names in asked] == 2 * [["encode", None], ["decode", None]]
    assert asked[0][0] is asked[1][0] is not asked[2][0] is asked[3][0]
    # In each of the two steps, the network's halves, and twice those of what makes the targets.
    assert len(calls) == 2 * (2 + 4)
    shortcut.main([*line, "--steps", "1", "--samples", "8"])
    assert len(calls) == 12


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_own_targets_are_those_of_a_mean_without_memory(precision, tmp_path):
    """Without dropout, and autocast does not hand their weights' casts to the other passes."""
    states = []
    for name, options in ("own", "--no-ema-targets --ema 0.5"), ("mean", "--ema-targets --ema 0"):
        shortcut.main([*TINY, "--precision", precision, "--iters", "4", "--samples", "0",
                       "--dropout", "0.3", "--out", str(tmp_path / name), *options.split()])
        states.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True))
    own, mean = states
    assert_same(own["s"], mean["s"])
    assert not torch.equal(own["s_ema"]["module.net.conv_out.weight"],
                           own["s"]["net.conv_out.weight"])


def test_other_data_of_the_same_name_is_another_run(tmp_path, monkeypatch):
    line = [*TINY, "--out", str(tmp_path / "run"), "--iters", "1", "--samples", "0"]
    shortcut.main(line)
    monkeypatch.setattr(fid, "shapes", lambda resolution: tuple(t[:100] for t in SMALL[resolution]))
    with pytest.raises(fid.UserError, match="is of other data: 200 images, now 100"):
        shortcut.main(line)


def test_a_start_that_got_nowhere_binds_nobody(tmp_path, monkeypatch):
    """args.json without a checkpoint: the options may change."""
    line = [*TINY, "--out", str(tmp_path / "run"), "--iters", "1", "--samples", "0"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(shortcut, "shortcut_loss", lambda *args, **kwargs: 1 / 0)
        shortcut.main(line)
    assert (tmp_path / "run" / "args.json").exists()
    shortcut.main([*line, "--k", "0.5"])


@pytest.mark.parametrize("text", ["[]", "{", '{"args": []}', '{"args": {"method": "dmd2"}}'])
def test_a_broken_args_json_is_one_line(text, tmp_path):
    line = [*TINY, "--out", str(tmp_path / "run"), "--iters", "1", "--samples", "0"]
    shortcut.main(line)
    (tmp_path / "run" / "args.json").write_text(text)
    with pytest.raises(fid.UserError, match="cannot be read|holds a run of dmd2.py") as error:
        shortcut.main(line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["step,loss\nx,1\n", "a,b\n1,2\n", "step,loss\n\n,\n", "\0"])
def test_a_damaged_table_is_one_line(text, tmp_path):
    line = [*TINY, "--out", str(tmp_path / "run"), "--iters", "1"]
    shortcut.main([*line, "--samples", "0"])
    (tmp_path / "run" / "scores.csv").write_text(text + "\n1,2")
    with pytest.raises(fid.UserError, match="scores.csv: cannot be read as a table of steps"):
        shortcut.main([*line, "--samples", "8"])


def test_a_checkpoint_for_which_memory_is_out_is_not_a_bad_one(tmp_path, monkeypatch):
    line = [*TINY, "--out", str(tmp_path / "run"), "--iters", "1", "--samples", "0"]
    shortcut.main(line)
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", no_memory)
    with pytest.raises(torch.OutOfMemoryError):             # which `fid.command` says in a line
        shortcut.main(line)


def test_a_file_system_that_has_become_read_only_is_one_line(tmp_path, monkeypatch):
    line = [*TINY, "--out", str(tmp_path / "run"), "--iters", "1", "--samples", "0"]
    shortcut.main(line)
    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")
    monkeypatch.setattr(os, "replace", read_only)
    monkeypatch.setattr(pathlib.Path, "unlink", read_only)
    with pytest.raises(fid.UserError, match="samples-1step.png: cannot be written .*Read-only"):
        shortcut.main(line)


@pytest.mark.parametrize("module, steps", [(dmd2, 18), (add, 32)])
def test_the_teachers_picture_is_made_once_whatever_comes_between(module, steps, tmp_path,
                                                                 monkeypatch):
    out = tmp_path / "run"
    line = [*TINY[:-4], "--samples", "0", "--steps", "1", "--out", str(out), "--iters", "1",
            "--teacher-iters", "1", "--teacher-batch", "8"]
    line += ["--pairs-iters", "0"] * (module is dmd2)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(module, "evaluate", lambda *args: os.kill(os.getpid(), signal.SIGINT))
        module.main(line)
    picture = out / f"teacher-{steps}step.png"
    assert not picture.exists()
    module.main(line)
    then = picture.stat().st_mtime_ns
    module.main(line)
    assert picture.stat().st_mtime_ns == then
    module.main([*line, "--teacher-steps", "2"])
    assert (out / "teacher-2step.png").exists() and picture.stat().st_mtime_ns == then


def test_ctrl_c_while_sampling_keeps_the_training(tmp_path, monkeypatch, capsys):
    line = [*TINY, "--out", str(tmp_path / "run"), "--iters", "2"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(shortcut, "evaluate",
                      lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGINT))
        shortcut.main(line)
    assert stop.value.code == 130 and "the training is kept" in capsys.readouterr().out
    assert weights(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize("content, message", [
    (b"", "does not load"), (b"0123456789", "does not load"),
    ("dmd2", "is of dmd2.py"), ("width", "does not load")])
def test_a_checkpoint_that_is_wrong(tmp_path, content, message):
    out = tmp_path / "run"
    line = [*TINY, "--out", str(out), "--iters", "2", "--samples", "0"]
    shortcut.main(line)
    path = out / "checkpoint.pt"
    if content == "dmd2":
        torch.save(weights(out) | dict(method="dmd2"), path)
    elif content == "width":
        state = weights(out)
        state["s"]["net.conv_in.weight"] = torch.zeros(32, 3, 3, 3)
        torch.save(state, path)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(fid.UserError, match=message) as error:
        shortcut.main(line)
    assert "\n" not in str(error.value) and path.read_bytes() == before


def test_a_checkpoint_from_a_stranger_runs_no_code(tmp_path):
    class Hostile:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "owned",)
    line = [*TINY, "--out", str(tmp_path / "run"), "--iters", "1", "--samples", "0"]
    shortcut.main(line)
    torch.save(dict(method="shortcut", step=0, s=Hostile()), tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(fid.UserError, match="does not load"):
        shortcut.main(line)
    assert not (tmp_path / "owned").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    line = [*TINY, "--out", str(tmp_path / "run"), "--iters", "10", "--samples", "0"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 4, signal.SIGINT)
        shortcut.main(line)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    real = shortcut.shortcut_loss
    def broken(*args, **kwargs):
        loss, parts = real(*args, **kwargs)
        return loss * float("nan"), parts
    monkeypatch.setattr(shortcut, "shortcut_loss", broken)
    with pytest.raises(fid.UserError,
                       match="loss is not finite at step 10; the last checkpoint is kept"):
        shortcut.main(line)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    line = [*TINY, "--out", str(tmp_path / "run"), "--iters", "10", "--samples", "0"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 4)
        shortcut.main(line)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(shortcut.torch, "save", full)
    with pytest.raises(fid.UserError, match="No space left on device"):
        shortcut.main(line)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*"))


# ---- the README ----------------------------------------------------------------------------------

def test_help_shows_the_presets():
    done = subprocess.run([sys.executable, ROOT / "shortcut.py", "--help"], text=True,
                          capture_output=True)
    text = " ".join(done.stdout.split())
    assert done.returncode == 0
    for name, values in shortcut.PRESETS.items():
        assert re.search(rf"--{name.replace('_', '-')}[ ,]", text)
    iters = shortcut.PRESETS["iters"]
    assert (f"[{iters[0]} (shapes), {iters[1]} (cifar10), "
            f"{iters[2]} (folder), {iters[3]} (imagenet64)]") in text
