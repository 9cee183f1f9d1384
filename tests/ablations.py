"""The papers' ablations on `shapes`: rows of one table differ in the options shown and have equal
updates; those of dmd2.py and add.py start from one teacher. By hand:

    python tests/ablations.py                     # every table: three and a half hours on two cores
    python tests/ablations.py add-losses --seeds 0,1
    python tests/ablations.py --list              # the commands, to run some of them by yourself

A row is a run of its own in runs/ablations: what is finished is only read, what was stopped goes
on.
"""
import argparse
import concurrent.futures
import csv
import os
import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent

# What shortcut.py has no option for: the lengths as the official code draws them in small batches.
ALL_ONE = "real = shortcut.draw_t_d\n" \
          "def draw_t_d(*args):\n" \
          "    t, d, n = real(*args)\n" \
          "    d[:n], t[:n] = 1, 0\n" \
          "    return t, d, n\n" \
          "shortcut.draw_t_d = draw_t_d"

DMD2 = "--steps 1 --iters 600 --pairs-iters 0 --ema 0.98"
TWO = "--fake-updates 5"                                    # the paper's two time-scales
ONE = "--fake-updates 1"
FOUR = "--train-steps 4 --steps 1,2,4 --lr 1e-4 --pairs-iters 3000"
ADD = "--steps 1,4 --iters 2000 --simulated 0 --ema 0.997"
SHORTCUT = "--steps 1,4,32 --iters 3000 --samples 1024"

# Table: method, options of all its rows, and of each row: its name, options, published number.
TABLES = {
    "dmd2-losses": ("dmd2", f"{DMD2} --disc-weight 1", [    # Table 3: FID, ImageNet-64
        ("matching, regression", f"{ONE} --gan-weight 0 --regression 0.25", "2.62"),
        ("matching", f"{ONE} --gan-weight 0", "3.48"),
        ("matching, two time-scales", f"{TWO} --gan-weight 0", "2.61"),
        ("matching, two time-scales, GAN", TWO, "1.51"),
        ("GAN", f"{ONE} --dm-weight 0", "2.56"),
        ("GAN, two time-scales", f"{TWO} --dm-weight 0", "2.52"),
    ]),
    "dmd2-equal-rates": ("dmd2", f"{DMD2} --disc-weight 1 --fake-lr 3e-4", [    # appendix C
        ("1 update of the fake score", ONE, ""),
        ("5", TWO, ""),
    ]),
    "dmd2-steps": ("dmd2", f"{FOUR} --iters 2000", [        # Table 4: SDXL, FID
        ("backward simulation", "", "19.32"),
        ("noised real images", "--no-backward-simulation", "20.66"),
    ]),
    "dmd2-departures": ("dmd2", DMD2, [                     # of the preset of shapes from the paper
        ("as it is", "", ""),
        ("first call at sigma 80", "--start-sigma 80", ""),
        ("all noise levels", "--dm-levels 0.02,0.98 --fake-levels 0,1", ""),
        ("no bound of the GAN's gradient", "--gan-cap 0", ""),
        ("a head on the last map alone", "--disc-maps 1", ""),
        ("weight of the discriminator 1", "--disc-weight 1", ""),
        ("first 1500 updates on the pairs", "--pairs-iters 1500", ""),
    ]),
    "add-condition": ("add", ADD, [                         # Table 1b: FID-5k, COCO
        ("nothing", "--condition none", "21.2"),
        ("the label (paper: text)", "--condition label", "21.2"),
        ("the image", "--condition image", "21.1"),
        ("both", "", "20.6"),
    ]),
    "add-init": ("add", ADD, [                              # Table 1c
        ("random", "--student-init random", "293.6"),
        ("pretrained", "", "20.6"),
    ]),
    "add-losses": ("add", ADD, [                            # Table 1d
        ("adversarial", "--distill-weight 0", "20.8"),
        ("distillation", "--adv-weight 0", "315.6"),
        ("both, exponential", "", "20.6"),
        ("both, SDS", "--weighting sds", "22.3"),
        ("both, NFSD", "--weighting nfsd", "21.8"),
    ]),
    "add-target": ("add", ADD, [                            # Table 1f: the teacher's steps
        ("1 step", "", "20.6"),
        ("2 steps", "--teacher-denoise-steps 2", "20.8"),
        ("4 steps", "--teacher-denoise-steps 4", "20.3"),
    ]),
    "add-departures": ("add", "--steps 1,2,4 --iters 1000 --ema 0.997", [
        ("as it is", "", ""),
        ("heads not told the call", "--no-tell-call", ""),
        ("calls at 400, 600, 800, 1000", "--taus 400,600,800,1000", ""),
        ("R1 of 1e-5", "--r1 1e-5", ""),
        ("lambda of 2.5", "--distill-weight 2.5", ""),
    ]),
    "shortcut-k": ("shortcut", SHORTCUT, [
        ("0, flow matching", "--k 0", ""),
        ("1/8, the official code's", "--k 0.125", ""),
        ("1/4", "", ""),
        ("1/2", "--k 0.5", ""),
    ]),
    "shortcut-ema-targets": ("shortcut", f"{SHORTCUT} --ema-targets", [
        ("k = 1/8", "--k 0.125", ""),
        ("1/4", "", ""),
        ("1/2", "--k 0.5", ""),
        ("1/4, every self-consistency row d = 1", ALL_ONE, ""),
        ("1/4, no weight decay", "--weight-decay 0", ""),
    ]),
    "shortcut-choices": ("shortcut", SHORTCUT, [
        ("as it is", "", ""),
        ("every self-consistency row d = 1", ALL_ONE, ""),
        ("targets of the running mean", "--ema-targets", ""),
        ("no weight decay", "--weight-decay 0", ""),
    ]),
}


def row_command(table, options, seed, small=()):
    """-> argv of a row, and its run folder. Rows of the same options are the same run."""
    method, common, _ = TABLES[table]
    patch = options if "\n" in options else ""
    name = "-".join(common.replace("--", "").split() + ["patched"] * bool(patch)
                    + ("" if patch else options).replace("--", "").split() + [f"seed-{seed}"])
    out = pathlib.Path("runs/ablations", method, name.replace(",", "."))
    line = [*shlex.split(common), *shlex.split("" if patch else options), "--seed", str(seed),
            "--out", str(out)]
    if method != "shortcut":
        line += ["--teacher", f"runs/{method}-shapes", "--teacher-steps", "0"]
    start = ["-c", f"import sys; sys.path[0] = {str(ROOT)!r}; import shortcut\n{patch}\n"
             "shortcut.main()"] if patch else [str(ROOT / f"{method}.py")]
    return [sys.executable, *start, *line, *small], out


def scores_of(out):
    """-> the scores of a run's mean weights so far, by number of calls."""
    path = out / "scores.csv"
    rows = csv.DictReader(path.read_text().splitlines() if path.exists() else [])
    return {int(row["nfe"]): float(row["value"]) for row in rows if row["who"].endswith("ema")}


def run_row(command, out, threads):
    """Train and score, unless that is done, and -> the scores; the path of a failed row's log."""
    if all(int(n) in scores_of(out) for n in command[command.index("--steps") + 1].split(",")):
        return scores_of(out)
    env = os.environ | dict(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_name(out.name + ".log")
    with open(log, "a") as file:
        if subprocess.run(command, stdout=file, stderr=file, env=env).returncode:
            return str(log)                                 # where it says what went wrong
    return scores_of(out)


def seeds(text):
    return [int(seed) for seed in text.split(",")]


def main(argv=None, small=()):
    parser = argparse.ArgumentParser(description=__doc__.partition(" By hand:")[0])
    parser.error = lambda what: parser.exit(2, f"ablations.py: {what}\n")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES) + " [all]")
    parser.add_argument("--seeds", type=seeds, default="0", help="a comma list [0]")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, which share the "
                        "cores [2]")
    parser.add_argument("--list", action="store_true", help="print the commands alone")
    args = parser.parse_args(argv)
    unknown = set(args.tables) - set(TABLES)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(TABLES)}")
    tables = args.tables or [*TABLES]
    jobs = {}                                               # by folder: a row of two tables is one
    for table in tables:
        for name, options, _ in TABLES[table][2]:
            for seed in args.seeds:
                command, out = row_command(table, options, seed, small)
                if args.list:
                    print(f"# {table}: {name}" + ", above" * (out in jobs))
                    if out not in jobs:
                        print(shlex.join(command))
                jobs[out] = command
    if args.list:
        return
    allowed = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count() or 1))(0)
    threads = max(1, len(allowed) // max(1, args.jobs))     # two threads on one core: 1/4 the speed
    for method in sorted({TABLES[table][0] for table in tables} - {"shortcut"}):
        if not pathlib.Path(f"runs/{method}-shapes/scores.csv").exists():   # the default run
            print(f"runs/{method}-shapes: trained first, for its teacher", flush=True)
            subprocess.run([sys.executable, ROOT / f"{method}.py", *small], check=True)
    with concurrent.futures.ThreadPoolExecutor(max(1, args.jobs)) as pool:
        futures = {out: pool.submit(run_row, command, out, threads)
                   for out, command in jobs.items()}
        for table in tables:
            method, common, rows = TABLES[table]
            print(f"\n{table}: {method}.py {common}, seed{'s' * (len(args.seeds) > 1)} "
                  f"{','.join(map(str, args.seeds))}; FD-random at each number of calls",
                  flush=True)
            header = False
            for name, options, published in rows:
                try:
                    results = [futures[row_command(table, options, seed)[1]].result()
                               for seed in args.seeds]
                except KeyboardInterrupt:                   # the rows under way stop by themselves
                    pool.shutdown(cancel_futures=True)
                    raise
                wrong = [r for r in results if isinstance(r, str)]
                if wrong:
                    print(f"| {name} | failed: {wrong[0]} |", flush=True)
                    continue
                calls = sorted(results[0])
                if not header:
                    header = True
                    print("| | " + " | ".join(map(str, calls)) + " | paper |")
                    print("|---" * (len(calls) + 2) + "|")
                cells = [" / ".join(f"{r[n]:.3g}" for r in results) for n in calls]
                print(f"| {name} | " + " | ".join(cells) + f" | {published or '–'} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
