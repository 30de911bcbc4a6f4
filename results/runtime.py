"""What an iteration costs, from first principles, beside Table 2 of the paper and beside what was measured on links.

    C         seconds of forward, backward and optimizer on a worker: the one number that is fitted, one a task
    N         bytes of a worker's parameters (float32); m: workers, a node of g processes each
    R, λ      a link's rate, of which 1448 of 1514 bytes in a frame are payload; its latency, one way
    message   λ + N/R: a worker's row to one peer; links are full duplex, so all send at once
    ring      2 (m - 1) (λ + N/(m R)): the exact average, m - 1 pieces of N/m around the ring, twice
    tree      2 log2(m) λ + 2 (m - 1)/m N/R: the same by halving and doubling, for clusters larger than the paper's
    inside    (g - 1)/g N/S where a node has g processes: each carries 1/g of a message and gives it to the others, at S = 1.2 Tbit/s

    Local SGD            C
    SGP                  C + message, which leaves after the step and is waited for
    OSGP                 max(C, message), which travels while the worker computes
    AllReduce            C + ring after backward; or in buckets during it: bucket k is on its way from max(its gradients are there, bucket
                         k - 1 has come), backward takes two thirds of C, and what is left over is waited for
    every τ iterations   ring for each block that is averaged: 1 for SlowMo and Local SGD, one more a buffer for double-averaging, which
                         also gossips its buffers over SGP; none for noaverage

`slowmo/` knows nothing of this.
"""

import dataclasses
import functools
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import yaml

from results.collect import write
from results.tables import CONFIGS, HERE, LABELS, SMALL, TEXT, TITLES, published

STYLE = HERE / "paper.mplstyle"
PAYLOAD = 1448 / 1514  # TCP over frames of 1500 bytes
INSIDE = 1.2e12  # bits a second between the processes of a node: the NVLinks of a V100
LATENCY = 50e-6  # of 10 Gbit/s Ethernet through a switch, with TCP
BUCKET = 25 * 2**20  # bytes; the first is a 25th of it
CLOSE = 0.15
NETWORK = ["data", "network", "hosts", "node", "rate", "delay"]
MEASURED = [*NETWORK, "emulated", "bytes", "row", "milliseconds", "low", "high", "rounds", "commit", "machine"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A column of Table 2. parameters: of a worker's model. buffers: blocks of the optimizer's state."""

    parameters: int
    nodes: int
    buffers: int


TASKS = {"imagenet": Task(25_557_032, 32, 1), "wmt16": Task(209_911_808, 8, 2)}


@dataclasses.dataclass(frozen=True)
class Links:
    """m nodes of g processes. rate in bits a second; latency in seconds, one way."""

    nodes: int
    rate: float = 10e9
    latency: float = LATENCY
    node: int = 8

    def message(self, size: float) -> np.ndarray:
        """Seconds of a row of `size` bytes to a peer: [of bytes, of latency]."""
        inside = (self.node - 1) / self.node * 8 * size / INSIDE
        return np.array([8 * size / (PAYLOAD * self.rate) + inside, self.latency])

    def average(self, size: float, tree: bool = False) -> np.ndarray:
        """Seconds of an exact average: [of bytes, of latency]."""
        m = self.nodes
        rounds = 2 * math.log2(m) if tree else 2 * (m - 1)
        inside = (self.node - 1) / self.node * 8 * size / INSIDE
        return np.array([2 * (m - 1) / m * 8 * size / (PAYLOAD * self.rate) + inside, rounds * self.latency])


@functools.cache
def algorithm(experiment: str) -> dict:
    """What an experiment sends, from its files: base, tau (None: never), averaged and gossiped blocks."""
    own = yaml.safe_load((CONFIGS / f"experiment/{experiment}.yaml").read_text())
    chosen = {key: value for part in own["defaults"] if isinstance(part, dict) for key, value in part.items()}
    base, outer = chosen["override /base"], chosen.get("override /outer", "none")
    data = experiment.partition("_")[0]
    buffers = TASKS[SMALL.get(data, data)].buffers
    tau = None
    if outer != "none" and own.get("outer", {}).get("exact", True):
        group = yaml.safe_load((CONFIGS / f"outer/{outer}.yaml").read_text())
        tau = own.get("outer", {}).get("tau", group.get("tau"))
    return {
        "base": base,
        "tau": tau,
        "averaged": 1 + buffers * (outer == "double_averaging"),
        "gossiped": 1 + buffers * own.get("base", {}).get("gossip_buffers", False),
    }


def iteration(experiment: str, compute: float, size: float, links: Links, early: bool = False, tree: bool = False,
              bucket: float = BUCKET) -> dict[str, float]:  # fmt: skip
    """Seconds of an iteration by term: compute; what the worker waits for: link bytes, latency; of exact averages the same.

    size: bytes of the parameters. early: AllReduce in buckets of `bucket` bytes during backward. tree: averages by halving and doubling.
    """
    sent = algorithm(experiment)
    waited = averaged = np.zeros(2)
    if sent["base"] in ("sgp", "osgp"):
        waited = sent["gossiped"] * links.message(size)
        if sent["base"] == "osgp":
            waited = waited * max(0, 1 - compute / waited.sum())
    elif sent["base"] == "allreduce":
        parts = [min(size, bucket / 25)]
        while sum(parts) < size:
            parts.append(min(bucket, size - sum(parts)))
        costs = [links.average(part, tree) for part in (parts if early else [size])]
        done = ready = compute / 3
        for part, cost in zip(parts, costs):
            ready += part / size * 2 / 3 * compute
            done = max(ready, done) + cost.sum()
        total = sum(costs)
        waited = total * ((done - compute) / total.sum() if early else 1)
    if sent["tau"]:
        averaged = sent["averaged"] * links.average(size, tree) / sent["tau"]
    return dict(zip(("compute", "bytes", "latency", "average, bytes", "average, latency"), (compute, *waited, *averaged)))


def seconds(*arguments, **options) -> float:
    """Of an iteration, altogether; as `iteration`."""
    return sum(iteration(*arguments, **options).values())


@functools.cache
def fitted(data: str) -> float:
    """C of a task, from its column of Table 2: as few cells as possible off by more than 15%, and the others as little as possible."""
    task, cells = TASKS[data], paper(data)

    def off(compute):
        gaps = [
            abs(math.log(seconds(f"{data}_{cell}", compute, 4 * task.parameters, Links(task.nodes)) / value))
            for cell, value in cells.items()
        ]
        close = [gap for gap in gaps if gap <= math.log(1 + CLOSE)]
        return len(close) - len(gaps), -max(close, default=math.inf)

    return max(np.arange(0.05, 1.0, 0.0005), key=off).item()


def paper(data: str) -> dict[str, float]:
    """Table 2's column: seconds an iteration of each cell."""
    found = {cell: published(f"{data}_{cell}", "milliseconds") for cell in LABELS if (CONFIGS / f"experiment/{data}_{cell}.yaml").exists()}
    return {cell: value / 1000 for cell, value in found.items() if value is not None}


def pace(data: str, cell: str) -> float:
    """Modelled seconds of an iteration of a cell of any data set on the paper's cluster; a stand-in's are those of what it stands for.

    CIFAR-10 has no column in Table 2: ImageNet's takes its place.
    """
    data = "wmt16" if data in TEXT else "imagenet"
    return seconds(f"{data}_{cell}", fitted(data), 4 * TASKS[data].parameters, Links(TASKS[data].nodes))


def first(data: str) -> str:
    """The cell that others are given relative to: the fastest of the paper's column."""
    return "local_adam" if data in TEXT else "osgp"


def label(row: str) -> str:
    name = LABELS[row.removesuffix("_after")]
    if row.startswith("ar_"):
        name += ", averaging after backward" if row.endswith("_after") else ", averaging during backward"
    return name


def model(lines: pd.DataFrame) -> pd.Series:
    """Modelled milliseconds of the rows measured on one network: from their own `compute`, and nothing else that was measured."""
    line = lines.iloc[0]
    units = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "us": 1e-6, "ms": 1e-3}
    rate, delay = (float(text.rstrip("kmgbitus")) * units[text.lstrip("0123456789.")] for text in (line["rate"], line["delay"]))
    links = Links(int(line["hosts"]), rate, LATENCY + delay, int(line["node"]))
    size, compute = float(line["bytes"]), lines.set_index("row")["milliseconds"]["compute"] / 1000
    bucket = BUCKET * size / (4 * TASKS[line["data"]].parameters) if line["emulated"] else BUCKET
    found = {"compute": compute}
    for row in lines["row"].drop(lines.index[lines["row"] == "compute"]):
        name = f"{line['data']}_{row.removesuffix('_after')}"
        found[row] = seconds(name, compute, size, links, early=not row.endswith("_after"), bucket=bucket)
    return 1000 * pd.Series(found)


def beside(lines: pd.DataFrame) -> str:
    """The measured rows of one network beside the model and the paper, in milliseconds and over the first cell's."""
    data = lines["data"].iloc[0]
    measured = lines.set_index("row")["milliseconds"]
    modelled = model(lines)
    # the paper's AllReduce averages after backward, see `against_paper`
    target = "wmt16" if data in TEXT else "imagenet"
    known = {row: value for row, value in paper(target).items() if data in TASKS}
    known = {f"{row}_after" if row.startswith("ar_") else row: value for row, value in known.items()}
    start, out = (
        first(data),
        ["| | measured ms (quartiles) | model ms | measured over model | relative | model's | paper's |", "|---|---|---|---|---|---|---|"],
    )
    for line in lines.itertuples():
        if line.row == "compute":
            out.append(f"| compute alone | {line.milliseconds:.1f} ({line.low:.1f} to {line.high:.1f}) | | | | | |")
            continue
        ratio = [f"{table[line.row] / table[start]:.3f}" if line.row in table else "" for table in (measured, modelled, known)]
        off = measured[line.row] / modelled[line.row]
        out.append(f"| {label(line.row)} | {line.milliseconds:.1f} ({line.low:.1f} to {line.high:.1f}) | {modelled[line.row]:.1f} | "
                   f"{off:.3f}{'' if abs(math.log(off)) <= math.log(1 + CLOSE) else ' (!)'} | {' | '.join(ratio)} |")  # fmt: skip
    return "\n".join(out)
