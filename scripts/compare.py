"""Compare runs by their result.json: python scripts/compare.py RUN_FOLDER..."""

import json
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table


def results(folders: list[str]) -> list[dict]:
    """Every result.json under the folders. Exits with a message where there is none."""
    found = [path for folder in folders for path in sorted(Path(folder).glob("**/result.json"))]
    if not found:
        sys.exit(f"no result.json under {', '.join(folders)}: run `python run.py experiment=...` first")
    return [json.loads(path.read_text()) for path in found]


def main() -> None:
    title = "training loss, accuracy, NLL: best over the run, and last"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))  # fits 80 columns
    for name in ("run", "seed", "loss", "accuracy", "NLL", "ms/it"):
        table.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
    lines = results(sys.argv[1:])
    for result in lines:
        pairs = [_pair(result, name, digits) for name, digits in (("train_loss", 3), ("accuracy", 2), ("nll", 3))]
        pace = f"{1000 * result['seconds_per_iteration']:.1f}" if result["status"] == "done" else result["status"]
        table.add_row(_name(result), str(result["seed"]), *pairs, pace)
    Console().print(table)
    by_name = {(_name(result), result["seed"]): result for result in lines if {"accuracy", "train_loss"} <= result["best"].keys()}
    for (name, seed), slow in by_name.items():
        base = by_name.get((name.replace("slowmo_", ""), seed))
        if base and base is not slow:
            gain = slow["best"]["accuracy"]["value"] - base["best"]["accuracy"]["value"]
            less = base["best"]["train_loss"]["value"] - slow["best"]["train_loss"]["value"]
            print(f"seed {seed}: over {_name(base)} SlowMo changes the best accuracy by {gain:+.2f}, the training loss by {-less:+.3f}")
    print("one seed tells little: the README's table has five, and their spread")
    print("written:", *(result["folder"] for result in lines), sep="\n  ")


def _name(result: dict) -> str:
    """The run's folder without its seed: the experiment, and what was changed."""
    return Path(result["folder"]).parent.name


def _pair(result: dict, name: str, digits: int) -> str:
    best, last = result["best"].get(name, {}).get("value"), (result["last"] or {}).get(name)
    return "-" if best is None or last is None else f"{best:.{digits}f} {last:.{digits}f}"


if __name__ == "__main__":
    main()
