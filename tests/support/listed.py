"""A list of runs that never ran: what tables, claims, figures and pages are tested on."""

import numpy as np
import pandas as pd

from results.store import COLUMNS, Store

LINE = {"status": "done", "step": 1200, "data": "x", "workers": 32, "processes": 1, "device": "cpu", "threads": 1,
        "seconds_per_iteration": 0.05, "clock": "measured", "commit": "0123456789abcdef", "torch": "2.13.0"}  # fmt: skip


def lines(run, values, metric=("accuracy_last", "accuracy_best"), **more):
    """A line a seed, from 1, with these values of one metric or several; more: the same for all lines, or a list."""
    made = pd.DataFrame({"run": run, "experiment": run.split(",")[0], "seed": range(1, len(values) + 1), **LINE})
    return made.assign(**dict.fromkeys([metric] if isinstance(metric, str) else metric, values), **more).reindex(columns=COLUMNS["runs"])


def written(folder, *parts, curves=()):
    """A store in `folder` with these runs and curves."""
    store = Store(folder)
    parts = [part.dropna(axis=1, how="all") for part in parts]
    store.write("runs", (pd.concat(parts) if parts else pd.DataFrame()).reindex(columns=COLUMNS["runs"]))
    store.write("curves", (pd.concat(curves) if curves else pd.DataFrame()).reindex(columns=COLUMNS["curves"]))
    return store


def curve(run, seed, level=60.0):
    """Ten evaluations that rise to `level`."""
    step = np.arange(120, 1201, 120)
    accuracy = level - 3000 / (step + 60)
    return pd.DataFrame({"run": run, "seed": seed, "commit": LINE["commit"], "step": step, "epoch": step / 12, "seconds": step * 0.05,
                         "train_loss": 300 / step, "accuracy": accuracy,
                         "accuracy_worker_min": accuracy - 2, "accuracy_worker_max": accuracy + 3,
                         "nll": 200 / step, "nll_worker_min": 190 / step, "nll_worker_max": 210 / step})  # fmt: skip
