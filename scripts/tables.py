"""Table 1's columns in small: run the cells of a suite and write its table into the README.

    python scripts/tables.py photos tune      peak learning rates, then beta, at half length and with a seed that the table does not use
    python scripts/tables.py photos table     the suite's cells with its seeds, then the README's table; also: scripts, ende
    python scripts/tables.py photos readme    the README's table from results/photos.csv alone

Runs that are done are not run again. Everything goes to results/SUITE_tuning.csv and results/SUITE.csv.
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
VISION = ("local_sgd", "slowmo_local_sgd", "osgp", "slowmo_osgp", "sgp", "slowmo_sgp", "ar_sgd")
TRANSLATION = ("local_adam", "slowmo_local_adam", "sgp", "slowmo_sgp", "ar_adam")
PICTURES = (("best accuracy", "accuracy_best", 2), ("last accuracy", "accuracy_last", 2), ("best training loss", "train_loss_best", 3),
            ("last NLL", "nll_last", 3))  # fmt: skip
# cells, seeds, columns (title, field, digits), and the two of them that SlowMo's change is told of
SUITES = {
    "photos": (VISION, (1, 2, 3), PICTURES, ("accuracy_best", "train_loss_best")),
    "scripts": (VISION, (1,), PICTURES, ("accuracy_best", "train_loss_best")),
    "ende": (TRANSLATION, (1,), (("best training loss, base 2", "train_loss_best", 3), ("best validation NLL, base 2", "nll_base2_best", 3),
                                 ("last", "nll_base2_last", 3), ("BLEU, validation", "bleu_valid", 2), ("BLEU, test", "bleu_test", 2)),
             ("nll_base2_best", "bleu_valid")),
}  # fmt: skip
TUNING = ("seed=0", "steps=600")
END = "<!-- end -->"
FIELDS = ("experiment", "overrides", "seed", "status", "step", "accuracy_best", "accuracy_last", "train_loss_best", "train_loss_last",
          "nll_best", "nll_last", "seconds_per_iteration", "commit", "folder")  # fmt: skip
MORE = {"photos": (), "scripts": ("top5_best", "top5_last"), "ende": ("nll_base2_best", "nll_base2_last", "bleu_valid", "bleu_test")}


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
    for name in ("accuracy", "train_loss", "nll", "top5", "nll_base2"):
        line[f"{name}_best"] = result["best"].get(name, {}).get("value")
        line[f"{name}_last"] = (result["last"] or {}).get(name)
    line |= {f"bleu_{subset}": facts["bleu"] for subset, facts in result.get("bleu", {}).items()}
    print(f"{folder}: {result['status']}, NLL {line['nll_best']}, training loss {line['train_loss_best']}", flush=True)
    return line


def write(path: Path, lines: list[dict], more: tuple[str, ...] = ()) -> None:
    path.parent.mkdir(exist_ok=True)
    aside = path.with_suffix(".partial")
    with open(aside, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS + more, extrasaction="ignore")
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


def tune(suite: str, pool) -> None:
    if suite != "photos":
        sys.exit(f"{suite} is not tuned: photos alone is")
    lines = [line for part in pool.map(tune_base, BASES) for line in part]
    write(ROOT / "results/photos_tuning.csv", lines)
    for cell in VISION:
        line = best([line for line in lines if line["experiment"] == f"photos_{cell}"])
        print(f"{cell}: {line['overrides']} accuracy {line['accuracy_best']:.2f}")


def table(suite: str, pool) -> None:
    cells, seeds, *_ = SUITES[suite]
    jobs = [(f"experiment={suite}_{cell}", f"seed={seed}") for seed in seeds for cell in cells]
    write(ROOT / f"results/{suite}.csv", list(pool.map(run, jobs)), MORE[suite])
    readme(suite, pool)


def start(suite: str) -> str:
    return f"<!-- {suite}: made by scripts/tables.py -->"


def readme(suite: str, pool) -> None:
    """Rewrite the README between the suite's markers."""
    path, aside = ROOT / "README.md", ROOT / "README.partial"
    before, _, rest = path.read_text().partition(start(suite))
    aside.write_text(f"{before}{start(suite)}\n{markdown(suite)}{END}{rest.partition(END)[2]}")
    aside.replace(path)
    print(f"wrote {path}")


def markdown(suite: str) -> str:
    """The README's table: mean ± standard deviation over seeds, and what SlowMo changes, paired by seed."""
    cells, _, columns, changed = SUITES[suite]
    with open(ROOT / f"results/{suite}.csv", newline="") as file:
        lines = list(csv.DictReader(file))

    def values(cell: str, name: str) -> dict[str, float]:
        of_cell = [line for line in lines if line["experiment"] == f"{suite}_{cell}"]
        # one seed that diverged leaves the cell without a mean
        return {line["seed"]: float(line[name]) for line in of_cell} if all(line["status"] == "done" for line in of_cell) else {}

    def show(numbers, digits: int, sign: str = "") -> str:
        numbers = list(numbers)
        spread = f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
        return f"{mean(numbers):{sign}.{digits}f}{spread}" if numbers else "diverged"

    names = {field: (title, digits) for title, field, digits in columns}
    change = f"SlowMo's change: {', '.join(names[field][0] for field in changed)}"
    titles = ("`python run.py experiment=`", *(title for title, *_ in columns), change)
    text = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for cell in cells:
        if not any(line["experiment"] == f"{suite}_{cell}" for line in lines):
            text.append(f"| `{suite}_{cell}` |{' not run |' * len(columns)}  |")
            continue
        row = [f"`{suite}_{cell}`", *(show(values(cell, name).values(), digits) for _, name, digits in columns)]
        changes = []
        for name, digits in ((name, names[name][1]) for name in changed):
            ours, theirs = values(cell, name), values(cell.removeprefix("slowmo_"), name)
            changes.append(show([ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()], digits, "+"))
        row.append(", ".join(changes) if cell.startswith("slowmo_") else "")
        text.append(f"| {' | '.join(row)} |")
    seeds = sorted({line["seed"] for line in lines})
    said = f"Seeds {', '.join(seeds)}; mean ± standard deviation" if len(seeds) > 1 else f"Seed {seeds[0]} alone"
    commits = sorted({line["commit"][:10] + "+" * line["commit"].endswith("+") for line in lines})
    return "\n".join([*text, "", f"{said}; commit {', '.join(commits)}.", ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("what", choices=("tune", "table", "readme"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        {"tune": tune, "table": table, "readme": readme}[arguments.what](arguments.suite, pool)
