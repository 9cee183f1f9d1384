"""Runs that cannot be lost: checkpoints in pairs, kills, a full disk, several processes,
micro-batches; real processes, at tiny sizes."""
import argparse
import csv
import importlib
import io
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import shortcut
from conftest import assert_same

ROOT = pathlib.Path(__file__).parent.parent
TINY = "--device cpu --precision fp32 --resolution 16 --channels 16 --mult 1,2 --blocks 1,1 " \
       "--batch 8 --features random --flip --samples 0".split()
TEACHER = "--teacher-batch 8 --teacher-iters 10 --teacher-steps 2".split()
# At each method's own losses, all of them; gan_cap: see the test of micro-batches.
LINES = dict(shortcut=[*TINY, "--steps", "1,2", "--cfg", "1.5"],
             dmd2=[*TINY, *TEACHER, "--train-steps", "2", "--regression", "0.2", "--pairs", "10",
                   "--pairs-iters", "5", "--fake-updates", "2", "--gan-cap", "0"],
             add=[*TINY, *TEACHER, "--steps", "1,2"])

# What the processes run: argv is a list of [method, argv, options]. As a script where `main`, so
# that its last lines count too, else imported.
DRIVER = f"""
import importlib, itertools, json, os, pathlib, resource, runpy, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
torch.set_num_threads(1)
import fid
drawn = fid.shapes(60, 16)
fid.shapes = lambda resolution: drawn
fid.INCEPTION_URL = "file:///nowhere"
port = int(os.environ.get("MASTER_PORT", 0))
for i, (method, argv, options) in enumerate(json.loads(sys.argv[1])):
    os.environ["MASTER_PORT"] = str(port + i)
    if "often" in options:                                  # a checkpoint every other step
        time.monotonic = itertools.count(0, 40).__next__
    if "limit" in options:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options["limit"], options["limit"]))
    if "main" in options:
        sys.argv = [method + ".py", *argv]
        runpy.run_path({str(ROOT)!r} + f"/{{method}}.py", run_name="__main__")
        continue
    module = importlib.import_module(method)
    module.draw = lambda *args: None
    class Run(module.Run):
        def add(self, *args, **scalars):
            super().add(*args, **scalars)
            if [fid.processes()[0], self.step] == options.get("stop"):
                self.signal = signal.SIGTERM                # in one of them
    module.Run = Run
    out = pathlib.Path(argv[argv.index("--out") + 1])
    os.environ["TORCH_HOME"] = str(out.parent / "hub")      # where no weights are
    path, half = out / "checkpoint.pt", out / ".checkpoint.pt"
    def newest():
        try:
            return path.stat().st_mtime_ns
        except FileNotFoundError:                           # between two renamings
            return 0
    for saves, midway, delay in options.get("kills", []):   # after so many checkpoints, and then
        last, child = newest(), os.fork()
        if not child:
            time.monotonic = itertools.count(0, 40).__next__
            module.main(argv)
            os._exit(0)
        while saves:
            now = newest() or last
            saves, last = saves - (now != last), now
        while midway and not half.exists():                 # as soon as the next is being written
            pass
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL    # nor had it come to its end
        steps = [torch.load(p, weights_only=True)["step"] for p in out.glob("checkpoint*.pt")]
        print("killed at step", max(steps, default=0), "in a write" * (out / ".checkpoint.pt")
              .exists(), flush=True)
    try:
        module.main(argv)
    except SystemExit as stopped:
        assert stopped.code == 143 and "stop" in options, stopped.code
    if fid.processes()[1] > 1:
        torch.distributed.destroy_process_group()
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(jobs, rank=0, world=1, port=0):
    env = os.environ | dict(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    return subprocess.Popen([sys.executable, "-c", DRIVER, json.dumps(jobs)], text=True, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def together(jobs, world=2):
    """Run the jobs, one after the other, in `world` processes; -> what each printed."""
    port = free_port()
    all_ = [start(jobs, rank, world, port) for rank in range(world)]
    said = [p.communicate(timeout=900) for p in all_]
    assert [p.returncode for p in all_] == world * [0], said
    return said


@pytest.fixture(autouse=True)
def small(monkeypatch):
    drawn = fid.shapes(60, 16)
    monkeypatch.setattr(fid, "shapes", lambda resolution: drawn)
    for method in LINES:
        monkeypatch.setattr(importlib.import_module(method), "draw", lambda *args: None)
    threads = torch.get_num_threads()                       # the processes have one each
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(method, out, *more):
    importlib.import_module(method).main([*LINES[method], "--out", str(out), *map(str, more)])


def stop_at(monkeypatch, method, step, *args):
    """A run that a signal ends after that step."""
    module = importlib.import_module(method)
    real = module.Run.add
    def add(run, *rows, **scalars):
        real(run, *rows, **scalars)
        if run.step == step - 1:
            run.signal = signal.SIGTERM
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(module.Run, "add", add)
        run(method, *args)


def state(out, name="checkpoint.pt"):
    return torch.load(out / name, weights_only=True)


def assert_near(a, b, begin, tolerance=1e-5):
    """All networks' weights of two runs: equal to 1e-5 of their norm; and, much stricter, to 1e-3
    of the way that they have come since `begin` (Adam makes steps of rounding errors too)."""
    flat = lambda net: torch.cat([w.double().flatten() for w in net.values()])
    nets = [name for name in a if isinstance(a[name], dict) and not name.startswith(("opt", "sch"))]
    assert len(nets) >= 2
    for name in nets:
        x, y, z = (flat(s[name]) for s in (a, b, begin))
        assert (x - y).norm() <= tolerance * x.norm(), name
        assert (x - y).norm() <= 1e-3 * (x - z).norm(), name


def assert_same_log(a, b, but=()):
    rows = [list(csv.DictReader((out / "log.csv").open())) for out in (a, b)]
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]]
    for x, y in zip(*rows):
        assert x.keys() == y.keys()
        for name in x.keys() - {"img_per_s", "seconds", *but}:
            assert bool(x[name]) == bool(y[name])
            if x[name]:
                assert float(x[name]) == pytest.approx(float(y[name]), rel=2e-5, abs=1e-6), name


# ---- checkpoints ---------------------------------------------------------------------------------

def test_wherever_a_kill_comes_a_whole_checkpoint_is_there(tmp_path, monkeypatch):
    """The last call made is, in turn, each of those by which `write` makes a checkpoint."""
    import shortcut
    out = tmp_path / "run"
    class Killed(BaseException):
        pass
    for step in 1, 2:
        stop_at(monkeypatch, "shortcut", step, out, "--iters", 8)
    for last in 1, 2, 3, 4:                                 # save, fsync, and two renamings
        made = []
        def mortal(name, real):
            def call(*args):
                if name == "save" or made:                  # the log's file comes before
                    made.append(name)
                if len(made) == last:
                    if name == "save":
                        args[1].write_bytes(b"half")
                    raise Killed
                return real(*args)
            return call
        with monkeypatch.context() as patch, pytest.raises(Killed):
            for module, name in (torch, "save"), (os, "fsync"), (os, "replace"):
                patch.setattr(module, name, mortal(name, getattr(module, name)))
            stop_at(monkeypatch, "shortcut", 3, out, "--iters", 8)
        assert made == ["save", "fsync", "replace", "replace"][:last]
        kept, path, wrong = shortcut.read_checkpoint(out)
        assert kept["step"] == 2 and wrong is None
        assert path.name == ("checkpoint-previous.pt" if last == 4 else "checkpoint.pt")
    run("shortcut", out, "--iters", 8)
    run("shortcut", tmp_path / "whole", "--iters", 8)
    assert_same(state(out), state(tmp_path / "whole"))


@pytest.mark.parametrize("content", ["truncated", b"", b"0123456789", "hostile", "no run"])
def test_of_two_checkpoints_the_whole_one_is_used(content, tmp_path, monkeypatch, capsys):
    import shortcut
    out = tmp_path / "run"
    for step in 2, 4:
        stop_at(monkeypatch, "shortcut", step, out, "--iters", 6)
    assert (state(out)["step"], state(out, "checkpoint-previous.pt")["step"]) == (4, 2)
    path = out / "checkpoint.pt"

    class Hostile:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "owned",)
    if content == "hostile":
        torch.save(state(out) | dict(s=Hostile()), path)
    elif content == "no run":
        torch.save([1, 2], path)
    else:
        path.write_bytes(path.read_bytes()[:-1000] if content == "truncated" else content)
    bad = path.read_bytes()
    run("shortcut", out, "--iters", 6)
    said = [line for line in capsys.readouterr().out.splitlines() if "checkpoint-broken.pt" in line]
    assert len(said) == 1 and "does not load" in said[0] and "of step 2, is used" in said[0]
    assert (out / "checkpoint-broken.pt").read_bytes() == bad
    assert not (tmp_path / "owned").exists()
    run("shortcut", tmp_path / "whole", "--iters", 6)
    assert_same(state(out), state(tmp_path / "whole"))


@pytest.mark.parametrize("change, message", [
    ("method", "checkpoint.pt: is of add.py"), ("data", "checkpoint.pt: is of other data"),
    ("width", "checkpoint.pt: does not load"), ("both", "checkpoint.pt: does not load")])
def test_a_checkpoint_of_another_run_is_an_error_and_is_not_set_aside(change, message, tmp_path,
                                                                      monkeypatch):
    out = tmp_path / "run"
    for step in 1, 2:
        stop_at(monkeypatch, "shortcut", step, out, "--iters", 3)
    other = state(out)
    if change == "both":
        for name in "checkpoint.pt", "checkpoint-previous.pt":
            (out / name).write_bytes(b"0123456789")
    elif change == "width":
        other["s"]["net.conv_in.weight"] = torch.zeros(32, 3, 3, 3)
    else:
        other |= {change: dict(method="add", data=[7])[change]}
    if change != "both":
        torch.save(other, out / "checkpoint.pt")
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    with pytest.raises(fid.UserError, match=message) as error:
        run("shortcut", out, "--iters", 3)
    assert "\n" not in str(error.value)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def no_memory(*args, **kwargs):
    return torch.empty(10 ** 15)                            # a plain RuntimeError


def forbidden(*args, **kwargs):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("load, message", [(forbidden, "Permission denied"),
                                           (no_memory, "can't allocate memory")])
def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_a_broken_one(load, message, tmp_path,
                                                                            monkeypatch):
    out = tmp_path / "run"
    for step in 1, 2:
        stop_at(monkeypatch, "shortcut", step, out, "--iters", 3)
    with monkeypatch.context() as patch, pytest.raises(fid.UserError, match=message):
        patch.setattr(torch, "load", load)
        run("shortcut", out, "--iters", 3)
    assert state(out)["step"] == 2 and not (out / "checkpoint-broken.pt").exists()


def torture(method, folder, kills, iters):
    """Kill a training at random moments: it must end as one that was never killed.
    -> a line of each kill, with the step of the best checkpoint that was then there."""
    line, rng = [*LINES[method], "--iters", str(iters), "--no-flip"], random.Random(0)
    if method != "shortcut":
        line += ["--teacher-iters", str(iters)]
    # Every other one in a write, if it can be hit.
    moments = [(rng.randint(1, 2), i % 2, rng.uniform(0, 0.002 if i % 2 else 0.03))
               for i in range(kills)]
    p = start([[method, [*line, "--out", str(folder / "killed")], dict(kills=moments)]])
    said = p.communicate(timeout=3000)
    assert p.returncode == 0, said
    lines = [l for l in said[0].splitlines() if l.startswith("killed at step")]
    steps = [int(l.split()[3]) for l in lines]
    assert len(steps) == kills and steps == sorted(steps)   # what was kept is not lost
    importlib.import_module(method).main([*line, "--out", str(folder / "whole")])
    assert_same(state(folder / "killed"), state(folder / "whole"))
    return lines


def test_three_kills_lose_nothing(tmp_path):
    torture("shortcut", tmp_path, 3, iters=60)


@pytest.mark.skipif("FEWSTEP_SLOW" not in os.environ, reason="20 kills: some minutes, FEWSTEP_SLOW")
@pytest.mark.parametrize("method", LINES)
def test_twenty_kills_lose_nothing(method, tmp_path):
    lines = torture(method, tmp_path, 20, iters=200)
    print(method, *lines, sep="\n")
    assert any("in a write" in line for line in lines)


def test_a_full_disk_for_real(tmp_path, monkeypatch):
    """A limit on the size of files, half a checkpoint: in the middle of the write."""
    out = tmp_path / "run"
    stop_at(monkeypatch, "shortcut", 3, out, "--iters", 6)
    before = (out / "checkpoint.pt").read_bytes()
    line = [*LINES["shortcut"], "--iters", "6", "--out", str(out)]
    p = start([["shortcut", line, dict(main=1, limit=len(before) // 2)]])
    _, error = p.communicate(timeout=120)
    assert p.returncode == 2 and error.count("\n") == 1, error
    assert error.startswith("shortcut.py: ") and "checkpoint.pt: cannot be written" in error
    assert (out / "checkpoint.pt").read_bytes() == before and not list(out.glob(".*"))
    run("shortcut", out, "--iters", 6)
    run("shortcut", tmp_path / "whole", "--iters", 6)
    assert_same(state(out), state(tmp_path / "whole"))


# ---- several processes, micro-batches ------------------------------------------------------------

def test_two_processes_are_one(tmp_path, monkeypatch):
    """With the same batch: losses, weights and samples, of each method in each phase; stopped by a
    signal to one of two, gone on with as one; a finished run's samples drawn by two."""
    ends = dict(shortcut=10, dmd2=25, add=20)
    jobs = []
    # At the preset's rate a rounding error grows by ten every three updates, by luck of the seed to
    # 2e-4; at a tenth of it, it stays below 5e-7, and the bound is a tenth as well.
    monkeypatch.setitem(LINES, "dmd2", [*LINES["dmd2"], "--gan-cap", "0.5", "--gan-weight", "1",
                                        "--fake-lr", "2e-4"])
    for method, line in LINES.items():
        out = lambda name: ["--iters", "10", "--out", str(tmp_path / f"{method}-{name}")]
        run(method, tmp_path / f"{method}-one", "--iters", 10)
        stop_at(monkeypatch, method, 1, tmp_path / f"{method}-begin", "--iters", 10)
        jobs += [[method, [*line, *out("two")], {}],
                 [method, [*line, *out("half")], dict(stop=[1, ends[method] - 3])],
                 [method, [*line, *out("one"), "--npz"], {}]]
        # A batch for each, the second short. Inception's weights cannot be had, in any of them.
        jobs[-1][1][line.index("--samples") + 1] = "300"
        jobs[-1][1][line.index("--features") + 1] = "auto"
    said = together(jobs)
    assert said[1][0] == "" and said[0][0].count("2 x ") == 12      # process 0 speaks
    for method in LINES:
        one, two, half, begin = (tmp_path / f"{method}-{name}" for name in ("one", "two", "half",
                                                                            "begin"))
        assert state(two)["step"] == ends[method] and state(half)["step"] == ends[method] - 2
        tolerance = 1e-6 if method == "dmd2" else 1e-5
        assert_near(state(one), state(two), state(begin), tolerance)
        assert_same_log(one, two)
        run(method, half, "--iters", 10)
        assert_near(state(one), state(half), state(begin), tolerance)
        drawn = {p.name: np.load(p)["images"] for p in one.glob("samples-*.npz")}
        score = list(csv.DictReader((one / "scores.csv").open()))[-1]
        run(method, one, "--iters", 10, "--samples", 300, "--npz")
        assert len(drawn) >= 1
        for name, images in drawn.items():
            assert len(images) == 300 and (images == np.load(one / name)["images"]).all(), name
        again = list(csv.DictReader((one / "scores.csv").open()))[-1]
        assert float(score["value"]) == pytest.approx(float(again["value"]), rel=1e-5)
        assert score["samples"] == again["samples"] == "300"


@pytest.mark.parametrize("method", LINES)
def test_two_micro_batches_are_one(method, tmp_path, monkeypatch):
    """And the number of them may change within a run. Not the same, so not here: dmd2's --gan-cap,
    whose norms are of a micro-batch; the log's norms at the images, and deviations of them."""
    one, two, begin = (tmp_path / name for name in ("one", "two", "begin"))
    stop_at(monkeypatch, method, 1, begin, "--iters", 10)
    run(method, one, "--iters", 10)
    stop_at(monkeypatch, method, 4, two, "--iters", 10)
    run(method, two, "--iters", 10, "--accumulate", 2)
    assert_near(state(one), state(two), state(begin))
    if method == "shortcut":
        return
    three = tmp_path / "three"                              # of the second phase alone
    run(method, three, "--iters", 10, "--accumulate", 2)
    assert_near(state(one), state(three), state(begin))
    assert_same_log(one, three, ("grad_dm", "grad_gan", "grad_adv", "grad_distill", "std"))


def test_dropout_differs_from_slice_to_slice_and_draws_do_not(monkeypatch):
    import shortcut
    args = shortcut.parse_args(["--accumulate", "2", "--batch", "8"])
    seen = {}
    for rank in 0, 1:
        monkeypatch.setattr(fid, "processes", lambda: (rank, 2))
        torch.manual_seed(5)
        for rows in shortcut.slices(args):
            seen[str(torch.arange(8)[rows].tolist())] = torch.rand(1).item()
        for rows in shortcut.slices(args, step=3):
            seen[rank, rows.start] = torch.rand(1).item()
    assert {*seen} == {"[0, 4]", "[1, 5]", "[2, 6]", "[3, 7]", (0, 0), (0, 2), (1, 1), (1, 3)}
    assert seen["[0, 4]"] == seen["[1, 5]"] and seen["[2, 6]"] == seen["[3, 7]"]
    assert len({seen[key] for key in seen if isinstance(key, tuple)}) == 4


@pytest.mark.parametrize("line, world, message", [
    ("--batch 9", 2, "--batch 9: expected a multiple of 2 processes x --accumulate 1"),
    ("--batch 8 --accumulate 3", 1, "--batch 8: expected a multiple of 1 processes x --accumulate"),
    ("--batch 8 --accumulate 4", 3, "--batch 8: expected a multiple of 3 processes x --accumulate"),
    ("--accumulate 0", 1, "--accumulate 0: expected 1 or more")])
@pytest.mark.parametrize("method", LINES)
def test_batches_that_cannot_be_shared_out(method, line, world, message, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(fid.UserError, match=message):
        run(method, tmp_path / "run", *line.split())
    assert not list(tmp_path.iterdir())


def test_a_killed_process_ends_the_others_with_a_line(tmp_path):
    """Under torchrun itself, process 0, which writes and speaks; what is kept is good."""
    (tmp_path / "driver.py").write_text(
        f"import os; open('{tmp_path}/pid' + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        + DRIVER)
    out = tmp_path / "run"
    line = [*LINES["shortcut"], "--iters", "100000", "--out", str(out)]
    p = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
         str(free_port()), tmp_path / "driver.py",
         json.dumps([["shortcut", line, dict(main=1, often=1)]])],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert p.stdout.readline().startswith("training: begins at step 0")
    while not (out / "checkpoint-previous.pt").exists():
        assert p.poll() is None, p.communicate()
        time.sleep(0.05)
    os.kill(int((tmp_path / f"pid0").read_text()), signal.SIGKILL)
    _, error = p.communicate(timeout=60)
    assert p.returncode != 0
    lines = [l for l in error.splitlines() if "another process has ended" in l]
    assert len(lines) == 1 and lines[0].startswith("shortcut.py: "), error
    assert "goes on from it" in lines[0]
    import shortcut
    assert shortcut.read_checkpoint(out)[0]["step"] > 0


@pytest.mark.parametrize("method", LINES)
def test_activations_computed_twice_change_nothing(method, tmp_path, monkeypatch):
    import nets
    calls, real = [], nets.Block.forward
    monkeypatch.setattr(nets.Block, "forward", lambda *args: calls.append(1) or real(*args))
    counts = []
    for name, more in ("plain", []), ("twice", ["--checkpoint-activations"]):
        run(method, tmp_path / name, "--iters", 3, "--dropout", 0.2, "--attention", 8, *more)
        counts.append(len(calls))
        calls.clear()
    assert counts[1] > counts[0]
    assert_same(state(tmp_path / "plain"), state(tmp_path / "twice"))


@pytest.mark.parametrize("method", LINES)
def test_scores_on_the_way_change_nothing(method, tmp_path, capsys):
    for name, more in ("plain", []), ("scored", ["--score-every", 2]):
        run(method, tmp_path / name, "--iters", 5, "--samples", 40, "--steps", 1, "--dropout", 0.2,
            *more)
    assert_same(state(tmp_path / "plain"), state(tmp_path / "scored"))
    rows = list(csv.DictReader((tmp_path / "scored" / "scores.csv").open()))
    begin = dict(shortcut=0, dmd2=15, add=10)[method]
    own = [r for r in rows if r["who"].endswith(("generator ema", "student ema", "shortcut ema"))]
    assert [int(r["step"]) for r in own] == [begin + 2, begin + 4, begin + 5]
    last = list(csv.DictReader((tmp_path / "plain" / "scores.csv").open()))[-1]
    assert own[-1]["value"] == last["value"] and own[0]["value"] != own[1]["value"]
    for step in begin + 2, begin + 4:
        assert (tmp_path / "scored" / "progress" / f"{step:07d}-1step.png").exists()
    assert "pictures: " in capsys.readouterr().out


def test_the_time_of_scores_is_not_that_of_training(tmp_path, monkeypatch):
    scores, clock = [], time.monotonic
    monkeypatch.setattr(fid, "distance", lambda *args, real=fid.distance: scores.append(1) or
                        real(*args))
    monkeypatch.setattr(shortcut.time, "monotonic", lambda: clock() + 1000 * len(scores))
    run("shortcut", tmp_path, "--iters", 5, "--samples", 40, "--steps", 1, "--score-every", 2)
    seconds = [float(row["seconds"]) for row in csv.DictReader((tmp_path / "log.csv").open())]
    assert len(scores) == 3 and 0 < seconds[-1] < 1000      # two came within the training


def test_a_training_begun_anew_leaves_no_old_scores(tmp_path):
    for _ in range(2):
        run("shortcut", tmp_path, "--iters", 5, "--samples", 40, "--steps", 1, "--score-every", 2)
        steps = [int(r["step"]) for r in csv.DictReader((tmp_path / "scores.csv").open())]
        assert steps == [2, 4, 5]
        for path in tmp_path.glob("checkpoint*.pt"):
            path.unlink()


@pytest.mark.parametrize("name", ["b\u00fccher", "undecodable \udcff", "lines \u2028 and \x85"])
def test_scores_of_data_of_any_name(name, tmp_path):
    """Whatever the machine's encoding is, and without a traceback after the training."""
    run("shortcut", tmp_path / "run", "--iters", 1)
    holder = argparse.Namespace(folder=tmp_path / "run")
    holder.write = lambda *args: shortcut.Run.write(holder, *args)
    shortcut.Run.write_csv(holder, "scores.csv", [dict(step="1", data=name)])
    assert b"\xc3\xbc" in (tmp_path / "run" / "scores.csv").read_bytes() or "\u00fc" not in name
    rows = shortcut.Run.read_csv(holder, "scores.csv")
    assert rows == [dict(step="1", data=name.replace("\udcff", "?"))]


def test_names_that_are_no_unicode_to_their_end(tmp_path, monkeypatch):
    """Where standard output takes no such name."""
    data = tmp_path / "d\udce9"
    for name in "c\udce9", "other":
        (data / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), (0, 60 * i, 200)).save(data / name / f"{i}.png")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict"))
    line = "--preset", "shapes", "--data", data, "--iters", 1, "--samples", 4
    fid.command("shortcut.py", lambda: run("shortcut", tmp_path / "run", *line), "")
    fid.command("shortcut.py", lambda: run("shortcut", tmp_path / "run", "--labels", "c\udce9",
                                           "--samples", 4), "")
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue().count(b"d? (c?) | NFE") == 2    # of one and of two steps
    assert (tmp_path / "run" / "samples-c-1step.png").exists()


def test_processes_that_do_not_share_a_folder(tmp_path, monkeypatch):
    """As on two machines, of which one has the checkpoint."""
    run("shortcut", tmp_path / "run", "--iters", 1)
    monkeypatch.setattr(fid, "gather", lambda t: torch.stack([t, torch.zeros_like(t)]))
    with pytest.raises(fid.UserError, match="run: is not one folder for all processes"):
        run("shortcut", tmp_path / "run", "--iters", 1)


@pytest.mark.parametrize("script", ["shortcut", "fid"])     # the others have shortcut.py's text
def test_too_little_memory_on_a_cpu_is_one_line(script, tmp_path):
    code = ("import runpy, sys, torch\n"
            "torch.linspace = torch.randint = lambda *args, **kwargs: torch.empty(10 ** 15)\n"
            "sys.argv = sys.argv[1:]\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    line = ["--save-stats", "stats.npz"] if script == "fid" else ["--out", "run"]
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / f"{script}.py"), "--data",
                           "shapes", "--device", "cpu", *line], capture_output=True, text=True,
                          cwd=tmp_path, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"{script}.py: out of memory; give --" in done.stderr


@pytest.mark.parametrize("side, most", [(32, 80), (64, 80), (128, 64), (512, 4)])
def test_large_images_are_sampled_fewer_at_once(side, most, tmp_path):
    args = argparse.Namespace(labels=None, samples=0, resolution=side, seed=0, npz=False)
    run = argparse.Namespace(args=args, device=torch.device("cpu"), folder=tmp_path, step=1,
                             training=False, signal=None, write=lambda name, write: None)
    scorer = argparse.Namespace(labels=torch.zeros(4).long(), columns=torch.zeros(10).long())
    asked = []

    def generate(noise, y, steps):
        asked.append(len(y))
        return torch.zeros(len(y), 3, side, side)
    shortcut.evaluate(run, scorer, generate, [1], "s")
    assert max(asked) == most and sum(asked) == 80


def test_a_collective_that_is_out_of_memory_says_so():
    def collective():
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="out of memory"):
        fid._together(collective)
