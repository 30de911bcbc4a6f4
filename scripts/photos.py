"""Table 1's CIFAR-10 column in small: tune each cell on a stated grid, run the cells with three seeds, write the tables.

    python scripts/photos.py tune     peak learning rates, then beta, at half length and with a seed that the table does not use
    python scripts/photos.py table    the seven cells, seeds 1, 2, 3, then the README's table
    python scripts/photos.py readme   the README's table from results/photos.csv alone

Runs that are done are not run again. Everything goes to results/photos_tuning.csv and results/photos.csv.
"""

import argparse
import csv
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parent.parent
LRS = (0.1, 0.3, 0.9)
BETAS = (0.4, 0.6, 0.8)
BASES = ("local_sgd", "osgp", "sgp", "ar_sgd")
CELLS = ("local_sgd", "slowmo_local_sgd", "osgp", "slowmo_osgp", "sgp", "slowmo_sgp", "ar_sgd")
TUNING = ("seed=0", "steps=600")
START, END = "<!-- photos: made by scripts/photos.py -->", "<!-- end -->"
FIELDS = ("experiment", "overrides", "seed", "status", "step", "accuracy_best", "accuracy_last", "train_loss_best", "train_loss_last",
          "nll_best", "nll_last", "seconds_per_iteration", "commit", "folder")  # fmt: skip


def run(job: tuple[str, ...]) -> dict:
    """One run in a process of its own; its line for the table."""
    command = [sys.executable, "run.py", *job]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    folder = done.stdout.split(":", 1)[0]
    result = json.loads((ROOT / folder / "result.json").read_text())
    own = [part for part in job if not part.startswith(("experiment=", "seed="))]
    line = {"experiment": result["experiment"], "overrides": " ".join(own)}
    line |= {name: result[name] for name in ("seed", "status", "step", "seconds_per_iteration", "commit", "folder")}
    for name in ("accuracy", "train_loss", "nll"):
        line[f"{name}_best"] = result["best"].get(name, {}).get("value")
        line[f"{name}_last"] = (result["last"] or {}).get(name)
    print(f"{folder}: {result['status']}, accuracy {line['accuracy_best']}, training loss {line['train_loss_best']}", flush=True)
    return line


def write(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    aside = path.with_suffix(".partial")
    with open(aside, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(lines)
    aside.replace(path)
    print(f"wrote {path}")


def best(lines: list[dict]) -> dict:
    """The run with the best validation accuracy; one that diverged has none."""
    return max(lines, key=lambda line: line["accuracy_best"] if line["status"] == "done" else -1.0)


def tune_base(base: str) -> list[dict]:
    """The learning rate of a base, then beta of SlowMo over it. The grid of rates grows by 3 while the best lies at its edge."""
    rates = list(LRS)
    lines = [run((f"experiment=photos_{base}", f"optimizer.lr={lr}", *TUNING)) for lr in rates]
    while True:
        lr = rates[lines.index(best(lines))]
        if min(rates) < lr < max(rates):
            break
        rates.append(float(f"{lr * 3 if lr == max(rates) else lr / 3:.1g}"))
        lines.append(run((f"experiment=photos_{base}", f"optimizer.lr={rates[-1]}", *TUNING)))
    if base != "ar_sgd":  # the paper has no cell of SlowMo over AR-SGD
        lines += [run((f"experiment=photos_slowmo_{base}", f"optimizer.lr={lr}", f"outer.beta={beta}", *TUNING)) for beta in BETAS]
    return lines


def tune(pool) -> None:
    lines = [line for part in pool.map(tune_base, BASES) for line in part]
    write(ROOT / "results/photos_tuning.csv", lines)
    for cell in CELLS:
        line = best([line for line in lines if line["experiment"] == f"photos_{cell}"])
        print(f"{cell}: {line['overrides']} accuracy {line['accuracy_best']:.2f}")


def table(pool) -> None:
    jobs = [(f"experiment=photos_{cell}", f"seed={seed}") for seed in (1, 2, 3) for cell in CELLS]
    write(ROOT / "results/photos.csv", list(pool.map(run, jobs)))
    readme(pool)


def readme(pool) -> None:
    """Rewrite the README between its markers."""
    path, aside = ROOT / "README.md", ROOT / "README.partial"
    before, _, rest = path.read_text().partition(START)
    aside.write_text(f"{before}{START}\n{markdown()}{END}{rest.partition(END)[2]}")
    aside.replace(path)
    print(f"wrote {path}")


def markdown() -> str:
    """The README's table: mean ± standard deviation over seeds, and what SlowMo changes, paired by seed."""
    with open(ROOT / "results/photos.csv", newline="") as file:
        lines = list(csv.DictReader(file))

    def values(cell: str, name: str) -> dict[str, float]:
        of_cell = [line for line in lines if line["experiment"] == f"photos_{cell}"]
        # one seed that diverged leaves the cell without a mean
        return {line["seed"]: float(line[name]) for line in of_cell} if all(line["status"] == "done" for line in of_cell) else {}

    def show(numbers, digits: int, sign: str = "") -> str:
        numbers = list(numbers)
        return f"{mean(numbers):{sign}.{digits}f} ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else "diverged"

    titles = ("`python run.py experiment=`", "best accuracy", "last accuracy", "best training loss", "last NLL",
              "SlowMo's change of best accuracy, loss")  # fmt: skip
    text = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for cell in CELLS:
        columns = [("accuracy_best", 2), ("accuracy_last", 2), ("train_loss_best", 3), ("nll_last", 3)]
        row = [f"`photos_{cell}`", *(show(values(cell, name).values(), digits) for name, digits in columns)]
        changes = []
        for name, digits in (("accuracy_best", 2), ("train_loss_best", 3)):
            ours, theirs = values(cell, name), values(cell.removeprefix("slowmo_"), name)
            changes.append(show([ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()], digits, "+"))
        row.append(", ".join(changes) if cell.startswith("slowmo_") else "")
        text.append(f"| {' | '.join(row)} |")
    seeds = sorted({line["seed"] for line in lines})
    commits = sorted({line["commit"][:10] + "+" * line["commit"].endswith("+") for line in lines})
    return "\n".join([*text, "", f"Seeds {', '.join(seeds)}; mean ± standard deviation; commit {', '.join(commits)}.", ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "table", "readme"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        {"tune": tune, "table": table, "readme": readme}[arguments.what](pool)
