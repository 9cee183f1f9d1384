"""The README's pictures, from the runs that its commands leave. By hand:

    python tests/pictures.py                      # what it can; says which runs are missing
"""
import csv
import pathlib
import sys

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
        print(f"{name}: no {', '.join(missing)}")
        return
    picture = Image.new("RGB", (MARGIN + columns * CELL + 4, len(rows) * CELL + 4), (40, 40, 40))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for i, (label, grid, n) in enumerate(rows):
        cells = Image.open(grid).convert("RGB").crop((0, n * CELL, columns * CELL + 4,
                                                      (n + 1) * CELL + 4))
        picture.paste(cells, (MARGIN, i * CELL))
        draw.text((MARGIN - 8, i * CELL + CELL / 2 + 2), label, (235, 235, 235), font, "rm",
                  align="right")
    picture.save(ASSETS / f"{name}.png", optimize=True)
    print(f"{name}: {(ASSETS / f'{name}.png').stat().st_size / 1000:.0f} kB")


def few_calls():
    shortcut, dmd2, add = (RUNS / f"{name}-shapes" for name in ("shortcut", "dmd2", "add"))
    four = ablations.row_command("dmd2-steps", "", 0)[1]
    strip("few-calls", [
        ("DMD2's teacher, 35", dmd2 / "teacher-18step.png", 0),
        ("DMD2, 1", dmd2 / "samples-1step.png", 0),
        ("of four: 2", four / "samples-2step.png", 0),
        ("4", four / "samples-4step.png", 0),
        ("ADD's teacher, 32", add / "teacher-32step.png", 0),
        *((f"ADD, {n}" if n == 1 else f"{n}", add / f"samples-{n}step.png", 0) for n in (1, 2, 4)),
        *((f"Shortcut, {n}" if n == 1 else f"{n}", shortcut / f"samples-{n}step.png", 0)
          for n in (1, 2, 4, 128))])


def progress():
    """One call of each method on the way, at a tenth, three tenths and the end of its updates, and
    the minutes of training until then, a teacher's included."""
    rows = []
    for name in "shortcut", "dmd2", "add":
        folder = RUNS / f"{name}-shapes"
        grids = sorted(grid for grid in folder.glob("progress/*.png") if grid.stem.isdigit())
        if len(grids) < 10:
            rows.append((name, folder / "progress" / "*.png", 0))   # missing: strip() says so
            continue
        with open(folder / "log.csv") as log:
            seconds = {int(row["step"]): float(row["seconds"]) for row in csv.DictReader(log)}
        rows += [(f"{name}.py,\n{seconds[int(grid.stem)] / 60:.1f} minutes", grid, 0)
                 for grid in (grids[0], grids[2], grids[-1])]
    strip("progress", rows)


def tables():
    """The rows of the ablations, in one call."""
    for table, (_, _, rows) in ablations.TABLES.items():
        strip(table, [(name.replace(", ", ",\n"),
                       ablations.row_command(table, options, 0)[1] / "samples-1step.png", 0)
                      for name, options, _ in rows])


if __name__ == "__main__":
    few_calls()
    progress()
    tables()
