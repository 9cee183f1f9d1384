"""ablations.py is run by hand; here, that its rows are what the scripts take, and its table."""
import importlib
import pathlib
import subprocess
import sys

import pytest
import torch

import ablations
import benchmark
import shortcut


def test_every_row_is_a_command_that_its_script_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {}
    for table, (method, _, rows) in ablations.TABLES.items():
        for name, options, _ in rows:
            command, out = ablations.row_command(table, options, 3)
            assert command[0] == sys.executable
            args = importlib.import_module(method).parse_args(
                command[3 if command[1] == "-c" else 2:])
            assert args.out == str(out) and args.seed == 3
            if method != "shortcut":
                assert args.teacher == f"runs/{method}-shapes" and args.teacher_steps == 0
            # Two tables share a run where, and only where, all its options agree.
            values = {k: v for k, v in vars(args).items() if k != "out"} | dict(code=command[1])
            assert folders.setdefault(out, values) == values
    assert len({tuple(sorted(map(str, v.items()))) for v in folders.values()}) == len(folders)


@pytest.mark.parametrize("script, options, expected", [
    (ablations, "nope", "nope: expected some of dmd2-losses, "),
    (ablations, "--seeds 0,a", "argument --seeds: invalid seeds value: '0,a'"),
    (ablations, "add-init --jobs", "argument --jobs: expected one argument"),
    (benchmark, "nope", "nope: expected some of shortcut, "),
    (benchmark, "--rounds x", "argument --rounds: invalid int value: 'x'"),
])
def test_a_mistake_is_one_line(script, options, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(options.split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err.startswith(f"{script.__name__}.py: {expected}") and err.count("\n") == 1


def test_the_patched_row(monkeypatch):
    monkeypatch.setattr(shortcut, "draw_t_d", shortcut.draw_t_d)        # to be put back
    exec(ablations.ALL_ONE, dict(shortcut=shortcut))
    torch.manual_seed(0)
    t, d, n = shortcut.draw_t_d(16, 0.25)
    assert n == 4 and (d[:n] == 1).all() and (t[:n] == 0).all()
    assert (d[n:] == 1 / shortcut.M).all() and t[n:].unique().numel() == 12


def test_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran = []

    def run(command, stdout=None, stderr=None, env=None, check=False):
        ran.append(command)
        failed = "4" in command[command.index("--teacher-denoise-steps"):][1:2] \
            if "--teacher-denoise-steps" in command else False
        if "--out" in command and not failed:
            out = pathlib.Path(command[command.index("--out") + 1])
            seed, two = (command[command.index(o) + 1] if o in command else 0
                         for o in ("--seed", "--teacher-denoise-steps"))
            out.mkdir()
            (out / "scores.csv").write_text(
                "nfe,who,value\n1,student,9\n"
                f"1,student ema,0.{1 + int(two)}{seed}\n4,student ema,0.05\n")
        return subprocess.CompletedProcess(command, int(failed))
    monkeypatch.setattr(subprocess, "run", run)
    ablations.main(["add-target", "--seeds", "1,2"])
    assert len(ran) == 7 and ran[0][1].name == "add.py"      # the teacher's run, three rows, twice
    lines = capsys.readouterr().out.splitlines()
    assert lines[-5:-1] == ["| | 1 | 4 | paper |", "|---|---|---|---|",
                            "| 1 step | 0.11 / 0.12 | 0.05 / 0.05 | 20.6 |",
                            "| 2 steps | 0.31 / 0.32 | 0.05 / 0.05 | 20.8 |"]
    assert lines[-1].startswith("| 4 steps | failed: runs/ablations/add/") and ".log" in lines[-1]
    ablations.main(["add-target", "--seeds", "1,2"])
    assert len(ran) == 7 + 1 + 2                            # again: the teacher's and what failed
    assert capsys.readouterr().out.splitlines()[-6:] == lines[-6:]
