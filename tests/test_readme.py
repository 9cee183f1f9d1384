"""The README: its commands run (on small data, without a network), its tables are not stale."""
import pathlib
import re
import shlex

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import add
import dmd2
import fid
import shortcut

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    ")]
SCRIPTS = [c for c in COMMANDS if "--help" not in c
           and any(f"python {name}.py" in c for name in ("shortcut", "dmd2", "add"))]
TINY = "--device cpu --iters 2 --batch 4 --channels 16 --mult 1,1 --blocks 1,1 --samples 0 " \
       "--attention none".split()
TEACHER = "--teacher-iters 1 --teacher-batch 4 --teacher-steps 2".split()
MORE = dict(shortcut=[], add=TEACHER, dmd2=[*TEACHER, "--pairs", "4", "--pairs-iters", "1"])


def test_the_two_commands_are_there():
    assert "@@" not in README                               # a blank that was to be filled in
    assert COMMANDS[:2] == ["pip install -r requirements.txt && python shortcut.py --steps 1",
                            "pip install -r requirements.txt && pytest"]
    names = [line.split(">=")[0] for line in (ROOT / "requirements.txt").read_text().split()]
    assert names == "torch torchvision numpy tqdm pillow scipy pytest".split()


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_command_runs(command, tmp_path, monkeypatch):
    """As printed, and cut short by further options, of which the last counts."""
    monkeypatch.chdir(tmp_path)
    small = fid.shapes(40, 32)
    monkeypatch.setattr(fid, "shapes", lambda resolution: small)
    for script in shortcut, add, dmd2:
        monkeypatch.setattr(script, "draw", lambda *args: None)
    for folder in ("path/to/images", "data/train"):
        (tmp_path / folder / "one").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / folder / "one" / "1.png")

    class CIFAR10:
        def __init__(self, root, train, download):
            self.data, self.targets = np.zeros((20, 32, 32, 3), np.uint8), [0] * 20
            self.classes = [f"class {i}" for i in range(10)]
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    name, argv = re.search(r"python (shortcut|dmd2|add)\.py(.*)", command).groups()
    script, argv = dict(shortcut=shortcut, dmd2=dmd2, add=add)[name], shlex.split(argv)
    if "--teacher" in argv:                                 # the run that an earlier command left
        at = argv.index("--teacher")
        script.main(["--out", argv[at + 1], "--steps", "1"] + TINY + MORE[name])
    args = script.parse_args(argv)
    script.main(argv + TINY + MORE[name])
    stem = "-".join(["samples", *(args.labels or "").split(",")]).strip("-")
    assert all((pathlib.Path(args.out) / f"{stem}-{n}step.png").exists() for n in args.steps)


@pytest.mark.parametrize("command", [c for c in SCRIPTS if "cifar10" in c and "--preset" in c])
def test_a_cifar10_line_is_the_run_of_the_folder_that_was_measured(command, tmp_path):
    """Its numbers are those of a folder of JPEG files."""
    name, argv = re.search(r"python (shortcut|dmd2|add)\.py(.*)", command).groups()
    script, argv = dict(shortcut=shortcut, dmd2=dmd2, add=add)[name], shlex.split(argv)
    printed = script.parse_args(argv)
    measured = script.parse_args([str(tmp_path) if v == "cifar10" else v for v in argv])
    differ = {key for key, value in vars(printed).items() if vars(measured)[key] != value}
    assert differ == {"data"}


def test_the_commands_of_fid_run(tmp_path, monkeypatch, capsys):
    """As printed and in that order, with random features: Inception's are a download."""
    monkeypatch.chdir(tmp_path)
    pixels = fid.shapes(40, 32)[0].permute(0, 2, 3, 1).numpy()
    for name in "samples.npz", "runs/shortcut-shapes/samples-1step.npz":
        pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)
        np.savez(name, images=pixels[:20])
    monkeypatch.setattr(fid, "shapes", lambda resolution, draw=fid.shapes: draw(40, resolution))

    class CIFAR10:
        def __init__(self, root, train, download):
            self.data, self.targets, self.classes = pixels[20:], [0] * 20, list("abcdefghij")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    commands = [c for c in COMMANDS if c.startswith("python fid.py")]
    assert len(commands) == 4
    for command in commands:
        fid.main(shlex.split(command)[2:] + ["--features", "random", "--device", "cpu"])
    labels = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    four = ["FD-random", "KD-random", "precision-random", "recall-random"]
    assert labels == [*four, *four, "statistics:", "FD-random"]         # by mu and sigma, FID alone


def test_the_lines_of_python_sample_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = fid.shapes(40, 32)
    monkeypatch.setattr(fid, "shapes", lambda resolution: small)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    reads = blocks[0][:blocks[0].index("\ns = ")]
    for script, block, whose in zip((shortcut, dmd2, add), blocks, ("s", "generator", "student"),
                                    strict=True):
        monkeypatch.setattr(script, "draw", lambda *args: None)
        script.main("--device cpu --iters 2 --batch 4 --samples 0 --steps 1".split()
                    + MORE[script.METHOD])
        names = {}
        exec(reads.replace("/shortcut-", f"/{script.METHOD}-"), names)
        exec(block, names)
        images, state, last = names["images"], names["state"], "net.conv_out.weight"
        assert images.shape == (10, 3, 32, 32) and images.isfinite().all() and images.std() > 0.1
        net = names["s" if script is shortcut else "G"].state_dict()[last]
        assert torch.equal(net, state[f"{whose}_ema"][f"module.{last}"])
        assert not torch.equal(net, state[whose][last])


def test_the_equations_are_on_the_lines_that_the_table_says():
    rows = re.findall(r"`([^`]+)` \| \[(\w+\.py):(\d+)\]\((\w+\.py)#L(\d+)\) \|", README)
    assert len(rows) >= 10
    for code, name, line, target, anchor in rows:
        assert (name, line) == (target, anchor)
        assert code in (ROOT / name).read_text().splitlines()[int(line) - 1], (code, name, line)


def test_links_to_files_are_alive():
    for target in re.findall(r"\]\(((?!http|#)[^)]+)\)", README):
        assert (ROOT / target.split("#")[0]).exists(), target


def test_links_to_sections_are_alive():
    """GitHub's names of them: lower case, no punctuation, a hyphen for each space."""
    titles = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    names = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    assert len(set(names)) == len(names) >= 10
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= set(names)


def test_the_tests_that_it_names_are_there():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", README)
    assert names and all(f"def {name}(" in tests for name in names)
