"""Tuning as the paper did: for each base the peak learning rate, then β of SlowMo over it, each the best of a stated grid.

    python scripts/tune.py cifar10_small               every base; trials that results/mine/data/trials.csv already holds are not run again
    python scripts/tune.py cifar10 --epochs 200 --seed 0 --launcher slurm

A grid is run by Hydra's own sweeper (`run.py -m optimizer.lr=0.1,0.3,0.9`). The grid of rates grows by 3 while the best lies at its edge.
The best has the highest validation accuracy (for translation the lowest NLL) on a seed that no table uses; a run that diverged is never
the best. All trials, the chosen ones marked, go to results/mine/data/trials.csv, with --publish to results/data/; the experiments' files
are changed by hand, and a test compares them with what is published.
"""

import argparse
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from results import collect  # noqa: E402
from results.store import COLUMNS as LISTS  # noqa: E402
from results.store import MINE, PUBLISHED  # noqa: E402
from results.tables import TEXT, table1  # noqa: E402

RATES = {True: [0.001, 0.002, 0.004], False: [0.1, 0.3, 0.9]}
BETAS = [0.4, 0.6, 0.8]
COLUMNS = LISTS["trials"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("cifar10_small", "imagenet_small", "wmt16_small", "cifar10", "imagenet", "wmt16"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600, help="inner steps of a trial")
    parser.add_argument("--epochs", type=float, help="instead of --steps")
    parser.add_argument("--launcher", default="inprocess", help="launch=... of each grid; a cluster runs a grid as one job array")
    parser.add_argument("--jobs", type=int, default=2, help="grids at once")
    parser.add_argument("--publish", action="store_true", help="take up and write results/data/trials.csv, which is committed")
    options = parser.parse_args()
    text = options.data in TEXT
    tuner = Tuner(options, text)
    bases = [cell for cell in table1(options.data) if not cell.startswith("slowmo_")]
    with ThreadPoolExecutor(options.jobs) as pool:
        for base, told in zip(bases, pool.map(tuner.base, bases)):
            print(f"{base}: {told}", flush=True)


class Tuner:
    def __init__(self, options, text: bool):
        self.options, self.text = options, text
        self.length = f"epochs={options.epochs:g}" if options.epochs else f"steps={options.steps}"
        self.store, self.lock = PUBLISHED if options.publish else MINE, threading.RLock()
        self.trials = self.store.find("trials")

    def base(self, base: str) -> str:
        """Tune a base, then SlowMo over it; what was chosen, in words."""
        experiment, rates = f"{self.options.data}_{base}", list(RATES[self.text])
        while True:
            found = self.grid(experiment, [(rate, None) for rate in rates])
            lr = self.best(found)["lr"]
            if min(rates) < lr < max(rates):
                break
            rates.append(float(f"{lr * 3 if lr == max(rates) else lr / 3:.1g}"))
        said = f"lr {lr:g}"
        self.choose(experiment, lr, None)
        if not base.startswith("ar_"):  # the paper has no cell of SlowMo over AllReduce
            slow = f"{self.options.data}_slowmo_{base}"
            beta = self.best(self.grid(slow, [(lr, beta) for beta in BETAS]))["beta"]
            self.choose(slow, lr, beta)
            said += f", β of SlowMo {beta:g}"
        return said

    def grid(self, experiment: str, points: list) -> pd.DataFrame:
        """The trials of these points; those not yet known are run, in one sweep."""
        self.gather(experiment)
        missing = [point for point in points if not len(self.find(experiment, *point))]
        if missing:
            rates, betas = (sorted({point[k] for point in missing if point[k] is not None}) for k in (0, 1))
            words = [f"experiment={experiment}", f"optimizer.lr={','.join(map(str, rates))}", self.length, f"seed={self.options.seed}",
                     "runs=trials", f"launch={self.options.launcher}"]  # fmt: skip
            words += [f"outer.beta={','.join(map(str, betas))}"] if betas else []
            words += ["launch.wait=true"] if self.options.launcher.startswith("slurm") else []
            done = subprocess.run([sys.executable, "run.py", "-m", *words], cwd=ROOT, capture_output=True, text=True)
            if done.returncode not in (0, 3):  # 3: a trial diverged, which is an answer
                sys.exit(f"run.py -m {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
            self.gather(experiment)
        found = pd.concat([self.find(experiment, *point) for point in points])
        if len(found) < len(points):
            sys.exit(
                f"{experiment}: {len(points) - len(found)} of {len(points)} trials ended without a result, see trials/: run this again"
            )
        return found

    def gather(self, experiment: str) -> None:
        """Put this experiment's finished trials into trials.csv."""
        metric = "nll_base2_best" if self.text else "accuracy_best"
        lines = []
        for path in sorted((ROOT / "trials").glob(f"{experiment}[,]*/seed{self.options.seed}/result.json")):
            try:
                line, _ = collect.read(path.parent)
            except Exception as error:  # damaged in whatever way: asked for again, it is made anew, or named
                print(f"{path.parent} counts as missing: {error}", file=sys.stderr)
                continue
            config = collect.config(path.parent)
            length = f"epochs={config['epochs']:g}" if config["epochs"] else f"steps={config['steps']}"
            beta = config["outer"].get("beta")
            lines.append((experiment, config["optimizer"]["lr"], beta, length, line["seed"], line["status"],
                          line[metric] if line["status"] == "done" else None, line["train_loss_best"], False, line["commit"]))  # fmt: skip
        lines = pd.DataFrame(lines, columns=COLUMNS)
        with self.lock:
            parts = [part for part in (self.trials, lines) if len(part)]
            if parts:
                self.trials = pd.concat(parts).drop_duplicates(COLUMNS[:5], keep="first").reset_index(drop=True)
                self.save()

    def find(self, experiment: str, lr: float, beta: float | None) -> pd.DataFrame:
        t = self.trials
        same = (t["experiment"] == experiment) & (t["lr"] == lr) & (t["length"] == self.length) & (t["seed"] == self.options.seed)
        return t[same & (t["beta"].isna() if beta is None else t["beta"] == beta)]

    def best(self, found: pd.DataFrame) -> pd.Series:
        done = found[found["status"] == "done"]
        if done.empty:
            sys.exit(f"{found['experiment'].iloc[0]}: every trial diverged: give smaller rates in scripts/tune.py's RATES")
        return done.loc[done["best_metric"].idxmin() if self.text else done["best_metric"].idxmax()]

    def choose(self, experiment: str, lr: float, beta: float | None) -> None:
        with self.lock:
            t = self.trials
            t.loc[(t["experiment"] == experiment) & (t["length"] == self.length) & (t["seed"] == self.options.seed), "chosen"] = False
            t.loc[self.find(experiment, lr, beta).index, "chosen"] = True
            self.save()

    def save(self) -> None:
        self.store.write("trials", self.trials.sort_values(COLUMNS[:3], kind="stable"))


if __name__ == "__main__":
    main()
