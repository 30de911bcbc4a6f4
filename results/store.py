"""A folder of results: lists in data/*.csv, what is made of them in tables/, figures/, report.html. Lists are read and written here."""

from pathlib import Path
from typing import NamedTuple

import pandas as pd

from experiments import files

METRICS = ("train_loss", "validation_loss", "nll", "nll_base2", "accuracy", "top5")
KEY = ["run", "seed", "commit"]
NETWORK = ["data", "network", "hosts", "node", "rate", "delay", "straggler", "jitter"]  # what one measurement over links is of
COLUMNS = {
    "runs": [  # a line a run
        "run", "seed", "experiment", "status", "step", "data", "workers", "processes", "device", "threads", "seconds_per_iteration",
        "clock", *(f"{name}_{when}" for name in METRICS for when in ("best", "last")),
        "accuracy_error", "bleu_valid", "bleu_test", "bleu_signature", "commit", "torch",
    ],
    "curves": [  # a line an evaluation
        *KEY, "step", "epoch", "seconds", "train_loss", "consensus_distance",
        *(f"{name}{band}" for name in ("nll", "nll_base2", "accuracy") for band in ("", "_worker_min", "_worker_max")),
    ],
    "trials": [  # of tuning
        "experiment", "lr", "beta", "seed", "length", "status", "metric", "value", "train_loss_last", "chosen", "commit",
    ],
    "claims": ["claim", "data", "kind", "verdict", "evidence", "runs"],
    "links": [  # python -m benchmarks.table2
        *NETWORK, "emulated", "bytes", "warmup", "iterations", "row", "round", "milliseconds", "commit", "machine",
    ],
    "benchmarks": ["what", "against", "where", "aim", "ratio", "low", "high", "rounds", "commit", "machine"],  # python -m benchmarks
    "scaling": ["what", "m", "d", "tau", "buckets", "value", "commit", "machine"],  # python -m benchmarks.scaling
    "gpu": [  # python -m benchmarks.gpu, which knows them without pandas
        "part", "what", "m", "batch", "value", "unit", "ratio", "memory", "error", "commit", "machine",
    ],
}  # fmt: skip
MAKES = {
    "runs": "run something, then python -m results collect",
    "curves": "python -m results collect makes it from run folders",
    "links": "python -m benchmarks.table2 makes it",
    "benchmarks": "python -m benchmarks makes it",
    "scaling": "python -m benchmarks.scaling makes it",
    "gpu": "python -m benchmarks.gpu makes it, where there is a GPU",
    "trials": "python scripts/tune.py makes it",
    "claims": "python -m results claims makes it",
}


class RunId(NamedTuple):
    """What a run is of, whatever its seed. As text it is the name of its folder: `experiment[,key=value...]`."""

    experiment: str
    overrides: tuple[str, ...] = ()

    @classmethod
    def parse(cls, run: str) -> "RunId":
        experiment, *overrides = run.split(",")
        return cls(experiment, tuple(overrides))

    def __str__(self) -> str:
        return ",".join((self.experiment, *self.overrides))


class Store:
    """The results below `folder`."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def path(self, name: str) -> Path:
        return self.folder / f"data/{name}.csv"

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def read(self, name: str) -> pd.DataFrame:
        """A list; one that may be missing is asked for with `has` before, or with `find`.

        FileNotFoundError where there is none, ValueError for another kind of file.
        """
        path = self.path(name)
        if not path.exists():
            elsewhere = "; --publish reads what is published" if self.folder != PUBLISHED.folder and PUBLISHED.has(name) else ""
            raise FileNotFoundError(f"no {path}: {MAKES[name]}{elsewhere}")
        return read(path, name)

    def find(self, name: str) -> pd.DataFrame:
        """The list, without lines where there is none."""
        return self.read(name) if self.has(name) else pd.DataFrame(columns=COLUMNS[name])

    def write(self, name: str, lines: pd.DataFrame) -> Path:
        return write(self.path(name), name, lines)


def read(path: Path, name: str) -> pd.DataFrame:
    """A file as the list `name`. ValueError for another kind of file."""
    lines = pd.read_csv(path, dtype={column: str for column in ("commit", "run") if column in COLUMNS[name]})
    if list(lines.columns) != COLUMNS[name]:
        raise ValueError(f"{path} has other columns than a list of {name}: move it away; {MAKES[name]}")
    return lines


def write(path: Path, name: str, lines: pd.DataFrame) -> Path:
    """`lines` as the list `name`, whole or not at all."""
    save(path, lines[COLUMNS[name]].to_csv(index=False, float_format="%.6g" if name == "curves" else None))
    return path


def save(path: Path, text: str | bytes) -> None:
    """A file and the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, text)


PUBLISHED = Store(Path(__file__).parent)  # committed
MINE = Store(PUBLISHED.folder / "mine")  # a user's own; git ignores it


class Runs:
    """What a store's list of runs holds of ended runs, and what is wrong with it (`complaints`). Errors as `Store.read`; required=False:
    without a list there are none."""

    def __init__(self, store: Store, required: bool = True):
        self.store, self.complaints = store, []
        self.lines = store.read("runs") if required else store.find("runs")
        same = self.lines.duplicated()
        if same.any():
            self.complaints.append(f"{store.path('runs')}: {same.sum()} lines stand there twice; each counts once")
        self.lines = self.lines[~same]
        ended = self.lines[self.lines["status"].isin(("done", "diverged")) & (self.lines["seed"] > 0)]  # seeds below 1 are for tuning
        twice = ended.duplicated(["run", "seed"], keep=False)
        for (run, seed), group in ended[twice].groupby(["run", "seed"]):
            commits = ", ".join(str(commit)[:10] for commit in group["commit"])
            self.complaints.append(
                f"{run} seed {seed} stands there {len(group)} times, commits {commits}: counted nowhere; delete all but one"
            )
        self.ended = ended[~twice].assign(milliseconds=lambda lines: 1000 * lines["seconds_per_iteration"])
        self._of = {run: lines.set_index("seed").sort_index() for run, lines in self.ended.groupby("run")}  # claims ask thousands of times
        self._none = self.ended.iloc[:0].set_index("seed")

    def of(self, run: str) -> pd.DataFrame:
        """The run's lines, by seed."""
        return self._of.get(run, self._none)

    def values(self, run: str, metric: str) -> pd.Series:
        """By seed, of the runs that are done."""
        lines = self.of(run)
        return lines.loc[lines["status"] == "done", metric].dropna()

    def address(self, run: str) -> str:
        """Where a run's numbers come from."""
        lines = self.of(run)
        if lines.empty:
            return ""
        commits = sorted({str(commit)[:10] for commit in lines["commit"]})
        seeds = ", ".join(str(seed) for seed in lines.index)
        where = [", ".join(sorted(set(lines[name]))) for name in ("device", "torch")]
        return f"runs/{run}, seed {seeds}; commit {', '.join(commits)}; {where[0]}, torch {where[1]}"


class Curves:
    """A store's curves, of the runs that count. Errors as `Store.read`."""

    def __init__(self, runs: Runs):
        done = runs.ended[runs.ended["status"] == "done"]
        self.lines = runs.store.read("curves").merge(done[["run", "seed", "commit", "processes"]], on=KEY)

    def of(self, run: str) -> pd.DataFrame:
        """Means over seeds at each step, the band's least and largest too, and the number of seeds."""
        lines = self.lines[self.lines["run"] == run]
        by = lines.groupby("step")
        return by.mean(numeric_only=True).drop(columns="seed").assign(seeds=by["seed"].nunique())
