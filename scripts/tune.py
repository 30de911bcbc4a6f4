"""Tuning by results/protocol.md: for each base the peak learning rate, then β of SlowMo over it at that rate.

    python scripts/tune.py cifar10_small_loss --publish          every base; trials that are listed already are not run again
    python scripts/tune.py cifar10 --seeds 0 --launcher slurm_dgx1 -- data.root=FOLDER

Rates go by factors of √3. A grid grows while its best lies at its edge. A trial has its experiment's own length, a seed that no table uses
and, where there are such, pictures that are for tuning alone. The best has the best mean over seeds of the last value: of the training
loss on a tier that is there for it, of the NLL for translation, else of the accuracy. A rate at which a seed diverged is never the best.
Stopped, the same command goes on. What follows `--` goes to every trial.

Trials, the chosen ones marked, go to results/mine/data/trials.csv; with --publish to results/data/, and what was chosen into
configs/experiment: commit both before anything counts.
"""

import argparse
import os
import re
import subprocess
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import reproduce  # beside this script

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from experiments.runner.run_dir import IGNORED_KEYS  # noqa: E402
from results import collect  # noqa: E402
from results.store import COLUMNS as LISTS  # noqa: E402
from results.store import MINE, PUBLISHED, RunId, save  # noqa: E402
from results.tables import LOSS_TIERS, SMALL, TEXT, table1  # noqa: E402

FIRST_RATE = {"wmt16_small": 0.003, "wmt16": 0.003}  # elsewhere 0.1
BETAS = dict(enumerate([0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95]))
START = {"lr": (0, 2), "beta": (2, 5)}  # the first grid, by number
WITH_TUNING_PICTURES = ("cifar10_small", "cifar10_small_loss", "imagenet_small")
VARIED = ("optimizer.lr", "outer.beta", "data.heldout", "task.bleu.subsets")  # what the name of a trial's folder may have
COLUMNS = LISTS["trials"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=(*SMALL, *dict.fromkeys(SMALL.values())))
    parser.add_argument("--seeds", default="0,-1")
    parser.add_argument("--launcher", default="inprocess", help="launch=... of each grid; a cluster runs a grid as one job array")
    parser.add_argument("--jobs", type=int, default=2, help="bases at once, a process each")
    parser.add_argument("--publish", action="store_true", help="take up and write what is committed: trials.csv and configs/experiment")
    options, extra = reproduce.parsed(parser)
    if not options.seeds or max(options.seeds) > 0:
        parser.error("--seeds: those of tables are 1 and more, tune on others, as 0,-1")
    if other := [word for word in extra if not word.startswith(IGNORED_KEYS)]:
        parser.error(f"a trial has its experiment's own settings and length: leave {' '.join(other)} out, or write your own experiment")
    if not options.launcher.startswith("slurm"):
        os.nice(10)  # hours in the background of other work
    tuner = Tuner(options, extra)
    bases = [cell for cell in table1(options.data) if not cell.startswith("slowmo_")]
    code = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for base, future in [(base, pool.submit(tuner.base, base)) for base in bases]:
            try:
                lr, beta = future.result()
                print(f"{base}: lr {lr:g}" + (f", β of SlowMo {beta:g}" if beta is not None else ""), flush=True)
            except RuntimeError as error:  # the other bases go on
                print(f"{base}: {error}", file=sys.stderr, flush=True)
                code = 1
            except KeyboardInterrupt:  # it came to the trials too
                pool.shutdown(wait=False, cancel_futures=True)
                print("stopping: what trains saves first; the same command goes on from there", flush=True)
                return 130
    return code


class Tuner:
    def __init__(self, options, extra: list[str]):
        self.options, self.seeds, self.extra = options, options.seeds, extra
        self.metric = "nll_base2_last" if options.data in TEXT else "train_loss_last" if options.data in LOSS_TIERS else "accuracy_last"
        self.store, self.lock = PUBLISHED if options.publish else MINE, threading.RLock()
        self.trials = self.store.find("trials")

    def base(self, base: str) -> tuple[float, float | None]:
        """Tune a base, then SlowMo over it: (rate, β). RuntimeError where trials fail."""
        experiment, rates = f"{self.options.data}_{base}", grid(FIRST_RATE.get(self.options.data, 0.1))
        lr = rates[self.climb(START["lr"], rates, lambda numbers: self.scores(experiment, [(rates[n], None) for n in numbers]))]
        slow, beta = f"{self.options.data}_slowmo_{base}", None
        if not base.startswith("ar_"):  # the paper has no cell of SlowMo over AllReduce
            beta = BETAS[self.climb(START["beta"], BETAS, lambda numbers: self.scores(slow, [(lr, BETAS[n]) for n in numbers]))]
            self.choose(slow, lr, beta)
        self.choose(experiment, lr, None)
        if self.options.publish:  # at once, so that the list and the configs agree whenever this is stopped
            settle(self.options.data, base, lr, beta)
        return lr, beta

    def climb(self, start: tuple[int, int], values: dict, scores) -> int:
        """The number of the best value, from a grid that grows until it lies inside, or the values end. scores: more is better."""
        low, high = start
        while True:
            numbers = range(low, high + 1)
            found = dict(zip(numbers, scores(numbers)))
            best = max(found, key=found.get)
            if found[best] == -float("inf"):  # a seed of each diverged: smaller ones
                best = low
            if best == low and low - 1 in values:
                low -= 1
            elif best == high and high + 1 in values:
                high += 1
            elif found[best] == -float("inf"):
                raise RuntimeError(f"every trial diverged, down to {values[low]:g}")
            else:
                return best

    def scores(self, experiment: str, points: list) -> list[float]:
        """Of each point (rate, β), after its trials; those not yet known are run, in a sweep for each set of seeds that lack."""
        self.gather(experiment)
        missing = defaultdict(list)  # {seeds: the points that lack them}
        for point in points:
            missing[tuple(seed for seed in self.seeds if seed not in set(self.find(experiment, *point)["seed"]))].append(point)
        missing.pop((), None)
        for seeds, lacking in missing.items():
            rates, betas = (sorted({point[k] for point in lacking if point[k] is not None}) for k in (0, 1))
            words = [f"experiment={experiment}", f"optimizer.lr={','.join(map(str, rates))}", f"seed={','.join(map(str, seeds))}",
                     "runs=trials", f"launch={self.options.launcher}"]  # fmt: skip
            words += [f"outer.beta={','.join(map(str, betas))}"] if betas else []
            words += ["data.heldout=tuning"] if self.options.data in WITH_TUNING_PICTURES else []
            words += ["task.bleu.subsets=[]"] if self.options.data in TEXT else []  # beam search costs, and decides nothing here
            words += ["launch.wait=true"] if self.options.launcher.startswith("slurm") else []
            done = subprocess.run([sys.executable, "run.py", "-m", *words, *self.extra], cwd=ROOT, capture_output=True, text=True)
            if done.returncode not in (0, 3):  # 3: a trial diverged, which is an answer
                raise RuntimeError(f"run.py -m {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
            self.gather(experiment)
        return [self.score(self.find(experiment, *point), point) for point in points]

    def score(self, found: pd.DataFrame, point) -> float:
        if len(found) < len(self.seeds):
            raise RuntimeError(f"{len(self.seeds) - len(found)} trials at {point} ended without a result, see trials/: run this again")
        if (found["status"] != "done").any():
            return -float("inf")
        return float(found["value"].mean()) * (1 if self.metric == "accuracy_last" else -1)

    def gather(self, experiment: str) -> None:
        """Put this experiment's finished trials into the list; those of the length or outcome that it had before leave it."""
        now, lines = length(collect.settings(experiment)), []
        for path in sorted((ROOT / "trials").glob(f"{experiment}*/seed*/result.json")):
            run = RunId.parse(path.parts[-3])
            others = any(word.partition("=")[0] not in VARIED for word in run.overrides)
            tuning = self.options.data not in WITH_TUNING_PICTURES or "data.heldout=tuning" in run.overrides
            if run.experiment != experiment or not tuning or others:  # another trial's
                continue
            try:
                line, _ = collect.read(path.parent)
                collect.check_settings(path.parent, VARIED)  # lr and β of the file are what tuning changes
            except Exception as error:  # damaged in whatever way: asked for again, it is made anew, or named
                print(f"{path.parent} counts as missing: {error}", file=sys.stderr)
                continue
            config = collect.config(path.parent)
            lines.append((experiment, config["optimizer"]["lr"], config["outer"].get("beta"), line["seed"], length(config), line["status"],
                          self.metric, line[self.metric], line["train_loss_last"], False, line["commit"]))  # fmt: skip
        lines = pd.DataFrame(lines, columns=COLUMNS)
        with self.lock:
            t = self.trials
            known = t[(t["experiment"] != experiment) | (t["length"] == now) & (t["metric"] == self.metric)]
            if len(t) or len(lines):
                parts = [part for part in (known, lines) if len(part)] or [lines]
                self.trials = pd.concat(parts).drop_duplicates(COLUMNS[:4], keep="first").reset_index(drop=True)
                self.save()

    def find(self, experiment: str, lr: float, beta: float | None) -> pd.DataFrame:
        t = self.trials
        same = (t["experiment"] == experiment) & (t["lr"] == lr) & t["seed"].isin(self.seeds)
        return t[same & (t["beta"].isna() if beta is None else t["beta"] == beta)]

    def choose(self, experiment: str, lr: float, beta: float | None) -> None:
        with self.lock:
            self.trials.loc[self.trials["experiment"] == experiment, "chosen"] = False
            self.trials.loc[self.find(experiment, lr, beta).index, "chosen"] = True
            self.save()

    def save(self) -> None:
        self.store.write("trials", self.trials.sort_values(COLUMNS[:4], kind="stable"))


def length(config: dict) -> str:
    return f"epochs={config['epochs']:g}" if config["epochs"] else f"steps={config['steps']}"


def grid(first: float) -> dict[int, float]:
    """Rates by number, as in 0: 0.1, 1: 0.17, 2: 0.3."""
    return {number: float(f"{first * 3 ** (number / 2):.2g}") for number in range(-8, 9)}


def settle(data: str, base: str, lr: float, beta: float | None) -> None:
    """Write what was chosen into the experiments of this base: it, SlowMo over it, noaverage, double-averaging."""
    slow = [f"slowmo_{base}", *(["sgp_noaverage"] if base == "sgp" else [])]
    for cell in (base, *slow, f"double_averaging_{base}"):
        path = ROOT / f"configs/experiment/{data}_{cell}.yaml"
        if path.exists():
            text = written(path.read_text(), "optimizer", "lr", lr)
            save(path, written(text, "outer", "beta", beta) if cell in slow and beta is not None else text)


def written(text: str, node: str, key: str, value: float) -> str:
    """An experiment's file with `node: {key: value}`, whatever stood there."""
    text, changed = re.subn(rf"^({node}: {{(?:[^}}]*, )?{key}: )[^,}}]+", rf"\g<1>{value:g}", text, flags=re.MULTILINE)
    if not changed:
        text, changed = re.subn(rf"^{node}: {{", f"{node}: {{{key}: {value:g}, ", text, flags=re.MULTILINE)
    return text if changed else re.sub(r"^target:", f"{node}: {{{key}: {value:g}}}\ntarget:", text, flags=re.MULTILINE)


if __name__ == "__main__":
    sys.exit(main())
