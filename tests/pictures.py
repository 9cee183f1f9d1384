"""The README's pictures and more, into assets/, from the folders of the default runs of the three
scripts, sampled in all their steps, of the README's further runs, and of tests/ablations.py. By
hand:

    python tests/pictures.py                      # what it can; says which pictures are missing
"""
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


def chart(name, curves):
    """Save assets/NAME.png: the distance, on a log scale, against minutes; of each (label, colour,
    line width, run folder, calls)."""
    missing = [folder for *_, folder, calls in curves if len(curve(folder, calls)) < 2]
    if missing:
        print(f"{name}: no scores on the way (--score-every) in {missing[0]}")
        return
    lines = [(*how, curve(folder, calls)) for *how, folder, calls in curves]
    minutes, distances = zip(*(point for *_, line in lines for point in line))
    low, high, longest = min(distances) / 1.1, max(distances) * 1.1, max(minutes)
    left, top, width, height = 110, 60, 1440, 720           # twice its size: halved, it is smooth
    x = lambda v: left + width * v / longest
    y = lambda v: top + height * math.log(high / v) / math.log(high / low)
    picture = Image.new("RGB", (left + width + 300, top + height + 110), "white")
    draw, font, grey = ImageDraw.Draw(picture), ImageFont.load_default(28), (225, 225, 225)
    for v in range(0, math.ceil(longest), 5):
        draw.line([(x(v), y(low)), (x(v), y(high))], grey, 2)
        draw.text((x(v), y(low) + 12), str(v), "black", font, "mt")
    for v in (n * 10 ** e for e in range(-3, 3) for n in (1, 2, 5)):
        if low < v < high:
            draw.line([(x(0), y(v)), (x(longest), y(v))], grey, 2)
            draw.text((x(0) - 12, y(v)), f"{v:g}", "black", font, "rm")
    draw.text((x(longest / 2), y(low) + 60), "minutes of training", "black", font, "mt")
    draw.text((12, 10), "FD-random", "black", font)
    for label, colour, thick, line in lines:
        places = [(x(v), y(distance)) for v, distance in line]
        draw.line(places, colour, thick, "curve")
        for place in places:
            draw.circle(place, thick + 2, colour)
        draw.text((places[-1][0] + 16, places[-1][1]), label, colour, font, "lm")
    half = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
    save(half.quantize(64), name)


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
        *((f"ADD, {n}" if n == 1 else f"{n}", add / f"samples-{n}step.png", 0)
          for n in (1, 2, 4))])
    strip("four-calls-shapes", [
        *(("backward\nsimulation, 1" if n == 1 else f"{n}", RUNS / f"four/samples-{n}step.png", 0)
          for n in (1, 2, 4)),
        ("noised real\nimages, 4", RUNS / "four-real/samples-4step.png", 0)])
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
        n, noises = 4 if table == "dmd2-steps" else 1, 2 if table == "add-target" else 1
        strip(table, [(textwrap.fill(name, 20) if noise == 0 else "another noise",
                       ablations.row_command(table, options, 0)[1] / f"samples-{n}step.png", noise)
                      for name, options, _ in rows for noise in range(noises)])


if __name__ == "__main__":
    few_calls()
    progress()
    over_time()
    tables()
