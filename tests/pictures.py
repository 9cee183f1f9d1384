"""The README's pictures and more, into assets/, from the folders of the default runs of the three
scripts, sampled in all their steps, of the README's further runs, and of tests/ablations.py. By
hand:

    python tests/pictures.py                      # what it can; says which pictures are missing

header.png is of the three default runs and of the README's runs/four, with the teacher of
`dmd2.py --seed 0`; over-time.png of default runs with --score-every 1000 in shortcut.py, 250 in
dmd2.py, 500 in add.py; four-calls-shapes.png of the README's two lines for four calls with the
teacher of `dmd2.py --seed 1` and the folders runs/four-seed1 and runs/four-real-seed1.
"""
import argparse
import csv
import math
import pathlib
import sys
import textwrap

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import ablations  # noqa: E402

ASSETS = pathlib.Path(__file__).parent.parent / "assets"
RUNS, CELL, MARGIN = pathlib.Path("runs"), 68, 150          # a cell: 32 pixels, enlarged, and frame


def strip(name, rows, columns=10):
    """Save assets/NAME.png: of each (label, grid, n) the n-th row of a run's grid, under another,
    all of the same noise. A grid is a file of save_grid's."""
    missing = [str(grid) for _, grid, _ in rows if not grid.exists()]
    if missing:
        print(f"{name}: no {missing[0]}" + f", nor {len(missing) - 1} more" * (len(missing) > 1))
        return
    picture = Image.new("RGB", (MARGIN + columns * CELL + 4, len(rows) * CELL + 4), (40, 40, 40))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for i, (label, grid, n) in enumerate(rows):
        cells = Image.open(grid).convert("RGB").crop((0, n * CELL, columns * CELL + 4,
                                                      (n + 1) * CELL + 4))
        picture.paste(cells, (MARGIN, i * CELL))
        draw.text((MARGIN - 8, i * CELL + CELL / 2 + 2), label, (235, 235, 235), font, "rm",
                  align="right")
    save(picture, name)


def save(picture, name):
    picture.save(ASSETS / f"{name}.png", optimize=True)
    print(f"{name}: {(ASSETS / f'{name}.png').stat().st_size / 1000:.0f} kB")


def minutes_of(folder):
    """-> the minutes of training until each step (a string) that a run's log has."""
    rows = csv.DictReader((folder / "log.csv").read_text().splitlines())
    return {row["step"]: float(row["seconds"]) / 60 for row in rows}


def curve(folder, calls):
    """-> (minutes of training, distance) of a run's running mean, whenever it was scored; empty
    where there is no such run."""
    if not (folder / "scores.csv").exists():
        return []
    scores = csv.DictReader((folder / "scores.csv").read_text().splitlines())
    minutes = minutes_of(folder)
    return sorted({minutes[row["step"]]: float(row["value"]) for row in scores
                   if row["nfe"] == str(calls) and row["who"].endswith("ema")
                   and row["step"] in minutes}.items())


def panel(draw, box, lines, xlabel, title, log=False, dots=False):
    """Draw curves into a box (left, top, width, height), each (label, colour, line width, points),
    over axes from x = 0; the labels go to its right."""
    left, top, width, height = box
    xs, ys = zip(*(point for *_, points in lines for point in points))
    longest, room = max(xs), 0.05 * (max(ys) - min(ys) or 1)
    low, high = (min(ys) / 1.1, max(ys) * 1.1) if log else (min(ys) - room, max(ys) + room)
    scale = math.log if log else float
    x = lambda v: left + width * v / longest
    y = lambda v: top + height * (scale(high) - scale(v)) / (scale(high) - scale(low))
    ticks = [n * 10 ** e for e in range(-3, 3) for n in (1, 2, 5)]
    step = next(t for t in [*ticks, math.inf] if log or (high - low) / t < 7)
    font, grey = ImageFont.load_default(28), (225, 225, 225)
    apart = next(n * 10 ** e for e in range(9) for n in (1, 2, 5)       # of numbers below
                 if longest / n / 10 ** e < width / 110)
    for v in range(0, math.ceil(longest), apart):
        draw.line([(x(v), y(low)), (x(v), y(high))], grey, 2)
        draw.text((x(v), y(low) + 12), str(v), "black", font, "mt")
    for v in ticks if log else (i * step for i in range(math.ceil(low / step), 1000)):
        if low < v < high:
            draw.line([(x(0), y(v)), (x(longest), y(v))], grey, 2)
            draw.text((x(0) - 12, y(v)), f"{v:g}", "black", font, "rm")
    draw.text((x(longest / 2), y(low) + 60), xlabel, "black", font, "mt")
    draw.text((left - 98, top - 50), title, "black", font)
    for label, colour, thick, points in lines:
        places = [(x(v), y(value)) for v, value in points]
        draw.line(places, colour, thick, "curve")
        for place in places if dots else ():
            draw.circle(place, thick + 2, colour)
        draw.text((places[-1][0] + 16, places[-1][1]), label, colour, font, "lm")


def chart(name, curves):
    """Save assets/NAME.png: the distance, on a log scale, against minutes; of each (label, colour,
    line width, run folder, calls)."""
    missing = [folder for *_, folder, calls in curves if len(curve(folder, calls)) < 2]
    if missing:
        print(f"{name}: no scores on the way (--score-every) in {missing[0]}")
        return
    picture = Image.new("RGB", (1850, 890), "white")        # twice its size: halved, it is smooth
    panel(ImageDraw.Draw(picture), (110, 60, 1440, 720),
          [(*how, curve(folder, calls)) for *how, folder, calls in curves],
          "minutes of training", "FD-random", log=True, dots=True)
    save_half(picture, name)


def save_half(picture, name):
    half = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
    save(half.quantize(64), name)


def column(folder, name, every=100):
    """-> (update, value) of a loss in a run's log, means of `every` updates, from the first of the
    phase that has it. (A row may be of a few updates alone, where a checkpoint came between.)"""
    rows = csv.DictReader((folder / "log.csv").read_text().splitlines())
    then, first, sums = 0, None, {}
    for row in rows:
        step = int(row["step"])
        if row.get(name):
            first = then if first is None else first
            part = sums.setdefault((step - first - 1) // every, [0.0, 0])
            part[0], part[1] = part[0] + (step - then) * float(row[name]), part[1] + step - then
        then = step
    return [((i + 0.5) * every, total / n) for i, (total, n) in sums.items()]


def losses():
    """What the log of a healthy run looks like, of each method's default run."""
    blue, orange, green = (60, 110, 220), (215, 110, 20), (40, 150, 70)
    panels = dict(shortcut=[("loss_flow", blue), ("loss_shortcut", orange)],
                  dmd2=[("loss_disc", blue), ("loss_gan", orange), ("loss_fake", green)],
                  add=[("loss_adv", blue), ("d_real", orange), ("d_fake", green)])
    folders = {name: RUNS / f"{name}-shapes" for name in panels}
    missing = [name for name, folder in folders.items() if not (folder / "log.csv").exists()
               or not all(column(folder, loss) for loss, _ in panels[name])]
    if missing:
        print(f"losses: no training to its end in {folders[missing[0]]}")
        return
    picture = Image.new("RGB", (2340, 700), "white")
    for i, (name, lines) in enumerate(panels.items()):
        panel(ImageDraw.Draw(picture), (110 + 780 * i, 60, 450, 530),
              [(loss, colour, 4, column(folders[name], loss)) for loss, colour in lines],
              "updates", f"{name}.py", log=name == "shortcut")
    save_half(picture, "losses")


def few_calls():
    """One noise in one call and in more, and what the teachers make of it."""
    shortcut, dmd2, add = (RUNS / f"{name}-shapes" for name in ("shortcut", "dmd2", "add"))
    strip("header", [
        *((f"shortcut, {n}" if n == 1 else f"{n}", shortcut / f"samples-{n}step.png", 0)
          for n in (1, 2, 4)),
        *((f"DMD2, {n}" if n == 1 else f"{n}", RUNS / f"four/samples-{n}step.png", 0)
          for n in (1, 2, 4)),
        *((f"ADD, {n}" if n == 1 else f"{n}", add / f"samples-{n}step.png", 0)
          for n in (1, 2, 4)),
        ("DMD2's teacher, 35", dmd2 / "teacher-18step.png", 0)])
    strip("shortcut-shapes", [(f"{n}", shortcut / f"samples-{n}step.png", 0)
                              for n in (1, 2, 4, 128)])
    strip("few-calls-shapes", [
        ("DMD2's teacher, 35", dmd2 / "teacher-18step.png", 0),
        ("DMD2, 1", dmd2 / "samples-1step.png", 0),
        ("ADD's teacher, 32", add / "teacher-32step.png", 0),
        ("ADD, 4", add / "samples-4step.png", 0)])
    strip("four-calls-shapes", [
        *(("backward\nsimulation, 1" if n == 1 else f"{n}",
           RUNS / f"four-seed1/samples-{n}step.png", 0) for n in (1, 2, 4)),
        ("noised real\nimages, 4", RUNS / "four-real-seed1/samples-4step.png", 0)])
    cifar = RUNS / "dmd2-cifar10-small"
    strip("dmd2-cifar10", [(f"{who}, {calls}", cifar / grid, row) for row in (0, 1)
                           for who, calls, grid in (("teacher", 35, "teacher-18step.png"),
                                                    ("DMD2", 1, "samples-1step.png"))])


def progress():
    """One call of each method on the way, at a tenth, three tenths and the end of its updates, and
    the minutes of training until then, a teacher's included. (dmd2.py draws its weights as they
    are, without their mean.)"""
    rows = []
    for name in "shortcut", "dmd2", "add":
        folder = RUNS / f"{name}-shapes"
        grids = sorted(grid for grid in folder.glob("progress/*.png") if grid.stem.isdigit())
        if len(grids) < 10:
            rows.append((name, folder / "progress" / "*.png", 0))   # missing: strip() says so
            continue
        for grid in grids[0], grids[2], grids[9]:
            minutes = max(m for step, m in minutes_of(folder).items()
                          if int(step) <= int(grid.stem))
            rows.append((f"{name}.py,\n{minutes:.1f} minutes", grid, 0))
    strip("progress", rows)


def over_time():
    """What each method's distance was when, of default runs that were scored on the way."""
    chart("over-time", [
        (f"{name}, {calls} call" + "s" * (calls > 1), colour, 8 - calls, RUNS / folder, calls)
        for name, colour, folder, counts in (
            ("shortcut", (60, 110, 220), "shortcut-shapes", (1, 4)),
            ("DMD2", (215, 110, 20), "dmd2-shapes", (1,)),
            ("ADD", (40, 150, 70), "add-shapes", (1, 4)))
        for calls in counts])


def tables():
    """The rows of the ablations, in one call (in four, where it is about them); of two noises where
    that is what they differ in."""
    for table, (_, _, rows) in ablations.TABLES.items():
        n = 4 if table == "dmd2-steps" else 1
        noises = 2 if table in ("add-target", "add-departures") else 1
        strip(table, [(textwrap.fill(name, 20) if noise == 0 else "another noise",
                       ablations.row_command(table, options, 0)[1] / f"samples-{n}step.png", noise)
                      for name, options, _ in rows for noise in range(noises)])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition(" By\nhand")[0]).parse_args()
    few_calls()
    progress()
    over_time()
    losses()
    tables()
