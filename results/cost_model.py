"""What an iteration costs, from first principles.

    C          seconds of forward, backward and optimizer on a worker: the one number that is fitted, one a task
    N          bytes of a worker's parameters (float32); m: workers, a node of g processes each
    R, λ       a link's rate, of which 1448 of 1514 bytes in a frame are payload; its latency, one way
    message    λ + N/R: a worker's row to one peer; links are full duplex, so all send at once
    average    2 (m - 1) (λ + N/(m R)): a ring carries m - 1 pieces of N/m around, twice
    allreduce  the same over all m g processes, so a node's link carries 2 (m g - 1)/(m g) N; only hops between nodes have latency
    tree       2 ⌈log2 m⌉ λ and the bytes of the ring: halving and doubling, for clusters larger than the paper's
    inside     (g - 1)/g N/S on top of a message or average: each process carries 1/g and gives it to its node, at S = 1.2 Tbit/s

    Local SGD            C
    SGP                  C + message, which leaves after the step and is waited for
    OSGP                 max(C, message), which travels while the worker computes
    AllReduce            C + allreduce after backward
    every τ iterations   average in place of the message, for each block that is averaged: 1 for SlowMo and Local SGD, one more a buffer for
                         double-averaging, which also gossips its buffers over SGP; none for noaverage
    in buckets during backward (AllReduce: early, the others: overlap)   bucket k is on its way from max(its gradients are there,
                         bucket k - 1 has come), backward takes two thirds of C, and what is left over is waited for

`slowmo/` knows nothing of this; timing.py puts it beside the paper and what was measured.
"""

import dataclasses
import functools
import math

import numpy as np
import pandas as pd
import yaml

from results.store import RunId
from results.tables import CONFIGS, LABELS, TEXT, published

PAYLOAD = 1448 / 1514  # TCP over frames of 1500 bytes
INSIDE = 1.2e12  # bits per second between the processes of a node: the NVLinks of a V100
LATENCY = 50e-6  # of 10 Gbit/s Ethernet through a switch, with TCP
BUCKET = 25 * 2**20  # bytes
CLOSE = 0.15
NODES, RATES = tuple(2**k for k in range(3, 13)), (10, 25, 100, 400)
SHOWN = {False: ("slowmo_local_sgd", "slowmo_sgp", "slowmo_osgp"), True: ("slowmo_local_adam", "slowmo_sgp")}


@dataclasses.dataclass(frozen=True)
class Task:
    """A column of Table 2. parameters: of a worker's model."""

    parameters: int
    nodes: int

    @property
    def size(self) -> int:
        """N."""
        return 4 * self.parameters


TASKS = {"imagenet": Task(25_557_032, 32), "wmt16": Task(209_911_808, 8)}


@dataclasses.dataclass(frozen=True)
class Links:
    """m nodes of g processes. rate in bits per second; latency in seconds, one way. Each cost is [seconds of bytes, of latency]."""

    nodes: int
    rate: float = 10e9
    latency: float = LATENCY
    node: int = 8

    def message(self, size: float) -> np.ndarray:
        return np.array([8 * size / (PAYLOAD * self.rate) + self._inside(size), self.latency])

    def average(self, size: float, tree: bool = False) -> np.ndarray:
        m = self.nodes
        return np.array([2 * (m - 1) / m * 8 * size / (PAYLOAD * self.rate) + self._inside(size), self._rounds(tree) * self.latency])

    def allreduce(self, size: float, tree: bool = False) -> np.ndarray:
        processes = self.nodes * self.node
        return np.array([2 * (processes - 1) / processes * 8 * size / (PAYLOAD * self.rate), self._rounds(tree) * self.latency])

    def _inside(self, size: float) -> float:
        return (self.node - 1) / self.node * 8 * size / INSIDE

    def _rounds(self, tree: bool) -> int:
        return 2 * math.ceil(math.log2(self.nodes)) if tree else 2 * (self.nodes - 1)


@functools.cache
def algorithm(run: str) -> dict:
    """What a run `experiment[,outer.tau=T]` sends, from its files: base, tau (None: never), averaged and gossiped blocks."""
    experiment, overrides = RunId.parse(run)
    own = yaml.safe_load((CONFIGS / f"experiment/{experiment}.yaml").read_text())
    chosen = {key: value for part in own["defaults"] if isinstance(part, dict) for key, value in part.items()}
    outer = _group("outer", chosen["override /outer"]) | own.get("outer", {})
    for word in overrides:
        outer |= {"tau": int(word.removeprefix("outer.tau="))}
    buffers = 2 if experiment.startswith(TEXT) else 1  # Adam's two moments, SGD's momentum
    return {
        "base": chosen["override /base"],
        "tau": outer["tau"] if outer.get("_target_") and outer.get("exact", True) else None,
        "averaged": 1 + buffers * (outer.get("buffers") == "average"),
        "gossiped": 1 + buffers * own.get("base", {}).get("gossip_buffers", False),
    }


def _group(group: str, name: str) -> dict:
    """The keys of a config group's option, those of the options it is made from included."""
    own = yaml.safe_load((CONFIGS / f"{group}/{name}.yaml").read_text()) or {}
    for parent in own.pop("defaults", []):
        own = _group(group, parent) | own
    return own


def iteration(run: str, compute: float, size: float, links: Links, early: bool = False, tree: bool = False, bucket: float = BUCKET,
              overlap: bool = False) -> dict[str, float]:  # fmt: skip
    """Seconds of an iteration by term: compute; what the worker waits for: link bytes, latency; of exact averages the same.

    size: bytes of the parameters. early: AllReduce in buckets of `bucket` bytes during backward; overlap: the others' messages and all
    averages. tree: averages by halving and doubling.
    """
    sent = algorithm(run)

    def waits(cost, during: bool) -> np.ndarray:
        """What is waited for after backward of messages that cost `cost(bytes)`: all of it, or what buckets have left over."""
        parts = buckets(size, bucket) if during else [size]
        costs = [cost(part) for part in parts]
        done = ready = compute / 3
        for part, one in zip(parts, costs):
            ready += part / size * 2 / 3 * compute
            done = max(ready, done) + one.sum()
        total = sum(costs)
        return total * ((done - compute) / total.sum() if during else 1)

    waited = averaged = np.zeros(2)
    if sent["base"] == "sgp":
        waited = waits(lambda part: sent["gossiped"] * links.message(part), overlap)
    elif sent["base"] == "osgp":
        waited = sent["gossiped"] * links.message(size)
        waited = waited * max(0, 1 - compute / waited.sum())
    elif sent["base"] == "allreduce":
        waited = waits(lambda part: links.allreduce(part, tree), early)
    if sent["tau"]:
        averaged = waits(lambda part: sent["averaged"] * links.average(part, tree), overlap) / sent["tau"]
        if sent["base"] != "allreduce":  # gossip keeps the mean, so that what the average follows is not sent
            waited = waited * (1 - 1 / sent["tau"])
    return dict(zip(("compute", "bytes", "latency", "bytes of averages", "latency of averages"), map(float, (compute, *waited, *averaged))))


def buckets(size: float, full: float = BUCKET) -> list[float]:
    """Bytes of AllReduce's buckets, as slowmo/buckets.py makes them: a small one, each at most twice the one before, two halves."""
    parts, left, least = [], size, full / 25
    while left >= 1:
        parts.append(min(left, least))
        left -= parts[-1]
        least = min(2 * parts[-1], full, max(left, full) / 2)
    return parts


def seconds(*arguments, **options) -> float:
    """Of an iteration, altogether; as `iteration`."""
    return sum(iteration(*arguments, **options).values())


def paper(data: str) -> dict[str, float]:
    """Table 2's column: seconds per iteration of each cell."""
    found = {cell: published(f"{data}_{cell}", "milliseconds") for cell in LABELS if (CONFIGS / f"experiment/{data}_{cell}.yaml").exists()}
    return {cell: value / 1000 for cell, value in found.items() if value is not None}


@functools.cache
def fitted(data: str) -> float:
    """C of a task, from its column of Table 2: as few cells as possible off by more than 15%, and the others as little as possible."""
    task, cells = TASKS[data], paper(data)

    def off(compute):
        gaps = [abs(math.log(seconds(f"{data}_{cell}", compute, task.size, Links(task.nodes)) / value)) for cell, value in cells.items()]
        close = [gap for gap in gaps if gap <= math.log(1 + CLOSE)]
        return len(close) - len(gaps), -max(close, default=math.inf)

    return max(np.arange(0.05, 1.0, 0.0005), key=off).item()


def column(data: str) -> str:
    """The column of Table 2 for a data set: its own, that of what it stands for, and ImageNet's for CIFAR-10, which has none."""
    return "wmt16" if data in TEXT else "imagenet"


def pace(data: str, cell: str) -> float:
    """Modelled seconds of an iteration on the paper's cluster: C, N and m of the column, what is sent of the cell itself."""
    task = TASKS[column(data)]
    return seconds(f"{data}_{cell}", fitted(column(data)), task.size, Links(task.nodes))


def emulated_bucket(data: str, size: float) -> float:
    """Bytes: as many buckets as at full size, but none that this machine's own delays would outweigh."""
    return max(BUCKET * size / TASKS[data].size, 2**20)


def model(lines: pd.DataFrame) -> pd.Series:
    """Modelled milliseconds of the rows measured on one network: from their own `compute`, and nothing else that was measured."""
    line = lines.iloc[0]
    links = Links(int(line["hosts"]), number(line["rate"]), LATENCY + number(line["delay"]), int(line["node"]))
    size, compute = float(line["bytes"]), lines[lines["row"] == "compute"]["milliseconds"].median() / 1000
    bucket = emulated_bucket(line["data"], size) if line["emulated"] else BUCKET
    found = {"compute": compute}
    for row in lines[lines["row"] != "compute"]["row"].unique():
        run = f"{line['data']}_{row.replace('_after', '')}"
        found[row] = seconds(run, compute, size, links, early="_after" not in row, bucket=bucket)
    return 1000 * pd.Series(found)


def number(text: str) -> float:
    """`400mbit` in bits per second, `0.1ms` in seconds."""
    units = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "us": 1e-6, "ms": 1e-3}
    digits = text.rstrip("kmgbitus")
    return float(digits) * units[text.removeprefix(digits)]


def elsewhere(data: str, nodes, rates) -> pd.DataFrame:
    """Modelled iterations on other clusters, C and a worker's batch as in the paper: a line for each rate (Gbit/s), nodes and cell.

    Averages go by ring or tree, AllReduce's during or after backward: whatever is fastest there. `milliseconds`, `over base` (what SlowMo
    adds to its base), `over AllReduce`, and the terms that make up the iteration.
    """
    task, compute, rows = TASKS[data], fitted(data), []
    every = "ar_adam" if data in TEXT else "ar_sgd"
    for rate in rates:
        for m in nodes:
            ways = [{"tree": tree, "early": early} for tree in (False, True) for early in (False, True)]

            def fastest(cell):
                links = Links(m, rate * 1e9)
                return min(
                    (iteration(f"{data}_{cell}", compute, task.size, links, **way) for way in ways), key=lambda terms: sum(terms.values())
                )

            allreduce = sum(fastest(every).values())
            for cell in (every, *SHOWN[data in TEXT]):
                terms, base = fastest(cell), sum(fastest(cell.removeprefix("slowmo_")).values())
                total = sum(terms.values())
                rows.append({"rate": rate, "nodes": m, "cell": cell, "milliseconds": 1000 * total, "over base": total / base,
                             "over AllReduce": total / allreduce, **terms})  # fmt: skip
    return pd.DataFrame(rows)
