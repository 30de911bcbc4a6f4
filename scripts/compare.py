"""Compare runs: a table, the course of each run in blocks, and with --picture as a PNG.

python scripts/compare.py runs/cifar10_small_sgp runs/cifar10_small_slowmo_sgp [--picture sgp.png]
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments import files  # noqa: E402

METRICS = {"train_loss": ("training loss", 3), "accuracy": ("accuracy", 2), "nll": ("NLL", 3)}
BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", "_.:-=+*#"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a run, or of several")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw training loss and accuracy against steps (wants matplotlib)")
    options = parser.parse_args()
    if gone := [str(folder) for folder in options.folders if not folder.is_dir()]:
        parser.error(f"no folder {', '.join(gone)}")
    if options.picture and options.picture.is_dir():
        parser.error(f"--picture {options.picture} is a folder: name a file")
    lines = results(options.folders)
    Console().print(table(lines))
    print(course(lines))
    by_name = {(_name(result), result["seed"]): result for result in lines if {"accuracy", "train_loss"} <= result["best"].keys()}
    for (name, seed), slow in by_name.items():
        base = by_name.get((name.replace("slowmo_", ""), seed))
        if base and base is not slow:
            gain = slow["best"]["accuracy"]["value"] - base["best"]["accuracy"]["value"]
            less = slow["best"]["train_loss"]["value"] - base["best"]["train_loss"]["value"]
            print(f"seed {seed}, SlowMo over {_name(base)}: best accuracy {gain:+.2f}, training loss {less:+.3f}")
    if options.picture:
        draw(lines, options.picture)
    print("read from:", *dict.fromkeys(str(path.parent.parent) for path in (result["path"] for result in lines)), sep="\n  ")


def results(folders: list[Path]) -> list[dict]:
    """Every result.json under the folders, with its metric rows. Exits with a message where there is none; names what is damaged."""
    found = []
    for path in dict.fromkeys(path for folder in folders for path in sorted(folder.glob("**/result.json"))
                              if not any(part.startswith(".old-") for part in path.parts)):  # fmt: skip
        try:
            rows = [json.loads(line) for line in path.with_name("metrics.jsonl").read_text().splitlines()]
            result = json.loads(path.read_text())
            found.append(result | {"path": path, "rows": [row for row in rows if not row.get("diverged")]})
            _name(result), result["seed"], result["best"].keys(), result["last"], result["seconds_per_iteration"], result["status"]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            sys.exit(f"error: {path.parent} is damaged ({type(error).__name__}: {error}): delete it and run it again")
    if not found:
        sys.exit(f"no result.json under {', '.join(map(str, folders))}: run `python run.py experiment=...` first")
    return found


def table(lines: list[dict]) -> Table:
    """A line a run, in 80 columns: a longer name goes on in the next line."""
    made = Table(title="training loss, accuracy, NLL: best over the run, and last", box=None, padding=(0, 1, 0, 0))
    for name in ("run", "seed", "loss", "accuracy", "NLL", "ms/it"):
        made.add_column(name, justify="left" if name == "run" else "right", no_wrap=name != "run", overflow="fold")
    for result in lines:
        pairs = [_pair(result, name, digits) for name, (_, digits) in METRICS.items()]
        pace = f"{1000 * result['seconds_per_iteration']:.1f}" if result["status"] == "done" else result["status"]
        made.add_row(_name(result), str(result["seed"]), *pairs, pace)
    return made


def course(lines: list[dict]) -> str:
    """Each run from evaluation to evaluation, a block each; all runs of a metric on one scale."""
    try:
        BLOCKS.encode(sys.stdout.encoding or "ascii")
        blocks = BLOCKS
    except UnicodeEncodeError:
        blocks = PLAIN
    out = []
    for metric, (title, digits) in METRICS.items():
        if metric == "nll":
            continue
        runs = {f"{_name(result)} seed {result['seed']}": _points(result, metric) for result in lines}
        values = [value for points in runs.values() for _, value in points]
        if not values:
            continue
        low, high = min(values), max(values)
        out.append(f"{title}, {low:.{digits}f} to {high:.{digits}f}")
        for name, points in runs.items():
            heights = [blocks[round((len(blocks) - 1) * (value - low) / (high - low or 1))] for _, value in points]
            wide = heights if len(heights) > 19 else [block * 2 for block in heights]
            name = name if len(name) <= 36 else f"{name[:17]}..{name[-17:]}"
            out.append(f"  {name:36} {''.join(wide[-40:])}")
    return "\n".join([*out, ""])


def draw(lines: list[dict], path: Path) -> None:
    """The same as a picture, written aside and renamed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print('no picture: it wants matplotlib, pip install -e ".[results]"', file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = [name for name in ("train_loss", "accuracy") if any(_points(result, name) for result in lines)]
    figure, axes = pyplot.subplots(1, max(1, len(metrics)), figsize=(4.5 * max(1, len(metrics)), 3.4), squeeze=False, layout="constrained")
    for axis, metric in zip(axes[0], metrics):
        for result in lines:
            if points := _points(result, metric):
                axis.plot(*zip(*points), label=f"{_name(result)}, seed {result['seed']}", marker=".")
        axis.set(xlabel="steps", ylabel=METRICS[metric][0])
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.aside(path) as name:
            figure.savefig(name, format="png", dpi=150)
    except OSError as error:
        sys.exit(f"error: no picture at {path}: {error.strerror}")
    pyplot.close(figure)
    print(f"picture: {path}")


def _points(result: dict, metric: str) -> list[tuple]:
    return [(row["step"], row[metric]) for row in result["rows"] if row.get(metric) is not None]


def _name(result: dict) -> str:
    """The run's folder without its seed: the experiment, and what was changed."""
    return Path(result["folder"]).parent.name


def _pair(result: dict, name: str, digits: int) -> str:
    best, last = result["best"].get(name, {}).get("value"), (result["last"] or {}).get(name)
    return "-" if best is None or last is None else f"{best:.{digits}f} {last:.{digits}f}"


if __name__ == "__main__":
    main()
