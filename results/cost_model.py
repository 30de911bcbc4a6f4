"""What an iteration costs, from first principles.

    C          seconds of forward, backward and optimizer on a worker: the one number that is fitted, one a task; backward takes two thirds
    N          bytes of a worker's parameters (float32), in buckets as slowmo/buckets.py cuts them; m: workers, a node of g processes each
    R, λ       a link's rate, of which 1448 of 1514 bytes in a frame are payload; its latency, one way
    message    λ + N/R: a worker's row to one peer; links are full duplex, so all send at once, and one bucket follows the other
    average    2 (m - 1) (λ + N/(m R)): a ring carries m - 1 pieces of N/m around, twice; one ring after the other, in gloo two at once
    allreduce  the same over all m g processes, so a node's link carries 2 (m g - 1)/(m g) N; only hops between nodes have latency
    tree       2 ⌈log2 m⌉ λ and the bytes of the ring: halving and doubling, for clusters larger than the paper's
    inside     (g - 1)/g N/S on top of a message or average: each process carries 1/g and gives it to its node, at S = 1.2 Tbit/s

    Local SGD            C
    SGP                  C + message, which is sent when a bucket has been stepped, and waited for
    OSGP                 max(C, message), which travels while the worker computes
    AllReduce            C + allreduce of each bucket's gradients
    every τ iterations   average in place of the message, with any base; double-averaging then averages its buffers when rows are there,
                         and over SGP it gossips them with every message; noaverage has neither, its message stays
    after backward       all buckets are sent then, and all of it is waited for
    during backward      bucket k leaves when its gradients are there and the link is free; what ends after backward is waited for.
                         OSGP's message leaves before forward either way, and buffers are averaged after

`slowmo/` knows nothing of this; timing.py puts it beside the paper and what was measured, straggling.py lets hosts be unequally fast.
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
FAST = (100, 5e-6)  # Gbit/s from which links pass TCP by, and their latency then: both assumed
BUCKET = 25 * 2**20  # bytes
LAYERS = 32  # of the network that waits instead of computing
CLOSE = 0.15
NODES, RATES = (8, 16, 64, 256, 1024, 4096), (1, 10, 25, 100, 400)
SHOWN = {False: ("slowmo_local_sgd", "slowmo_sgp", "slowmo_osgp"), True: ("slowmo_local_adam", "slowmo_sgp")}
# Nodes of 8 GPUs: how many times as fast as the paper's, and S. A DGX-1 trained ResNet-50 with 2,855 pictures a second and the big
# transformer with 59,316 tokens a second in float32, a DGX A100 with 16,621 and 551,599 in mixed precision (NVIDIA DeepLearningExamples,
# containers 21.03 and 22.06; March 2021, June 2022); an H100 is about twice an A100 (Lambda, October 2022, for vision).
MACHINES = {
    "DGX-1": {"imagenet": 1.0, "wmt16": 1.0, "inside": INSIDE},
    "H100": {"imagenet": 2 * 16621 / 2855, "wmt16": 2 * 551599 / 59316, "inside": 3.6e12},
}
WIDTHS = {"float32": 4, "bfloat16": 2}  # bytes of a number that is sent


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
    """m nodes of g processes. rate in bits per second; latency in seconds, one way. Each cost is [seconds of bytes, of latency].

    at_once: how many averages are under way at a time, 1 in a stream of NCCL's, 2 in gloo's threads. inside: bits per second of S.
    """

    nodes: int
    rate: float = 10e9
    latency: float = LATENCY
    node: int = 8
    at_once: int = 1
    inside: float = INSIDE

    def message(self, size: float) -> np.ndarray:
        return np.array([8 * size / (PAYLOAD * self.rate) + self._inside(size), self.latency])

    def average(self, size: float, tree: bool = False) -> np.ndarray:
        m = self.nodes
        return np.array([2 * (m - 1) / m * 8 * size / (PAYLOAD * self.rate) + self._inside(size), self._rounds(tree) * self.latency])

    def allreduce(self, size: float, tree: bool = False) -> np.ndarray:
        processes = self.nodes * self.node
        return np.array([2 * (processes - 1) / processes * 8 * size / (PAYLOAD * self.rate), self._rounds(tree) * self.latency])

    def _inside(self, size: float) -> float:
        return (self.node - 1) / self.node * 8 * size / self.inside

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


def two_ways(run: str) -> bool:
    """Whether sending during backward differs from sending after it. OSGP's messages leave before forward: only averages can."""
    sent = algorithm(run)
    return sent["base"] in ("sgp", "allreduce") or bool(sent["tau"])


def iteration(run: str, compute: float, size: float, links: Links, overlap: bool = False, tree: bool = False, bucket: float = BUCKET,
              layer: float = 1) -> dict[str, float]:  # fmt: skip
    """Seconds of an iteration by term: compute; what the worker waits for: link bytes, latency; of exact averages the same.

    size: bytes of the parameters. overlap: during backward. tree: averages by halving and doubling. bucket, layer: as `buckets`.
    """
    sent, parts = algorithm(run), buckets(size, bucket, layer)
    ready = np.multiply.outer(shares(parts, overlap), compute)

    def waits(costs, at_once: int) -> np.ndarray:
        total = sum(costs)
        return total * (arrival(ready, costs, at_once) - compute) / total.sum()

    waited = averaged = np.zeros(2)
    if sent["base"] == "sgp":
        waited = waits([message(links, part, sent["gossiped"]) for part in parts], len(parts))
    elif sent["base"] == "osgp":
        waited = message(links, size, sent["gossiped"])
        waited = waited * max(0, 1 - compute / waited.sum())
    elif sent["base"] == "allreduce":
        waited = waits([links.allreduce(part, tree) for part in parts], links.at_once)
    if sent["tau"]:
        averages = [links.average(part, tree) for part in parts]
        averaged = (waits(averages, links.at_once) + (sent["averaged"] - 1) * sum(averages)) / sent["tau"]
        if sent["base"] != "allreduce":  # gossip keeps the mean, so that what the average follows is not sent
            waited = waited * (1 - 1 / sent["tau"])
    return dict(zip(("compute", "bytes", "latency", "bytes of averages", "latency of averages"), map(float, (compute, *waited, *averaged))))


def message(links: Links, size: float, blocks: int) -> np.ndarray:
    """Of a bucket's parameters and buffers, one after the other to the same peer: as `Links`' costs."""
    return links.message(size) * (blocks, 1)


def shares(parts: list[float], overlap: bool) -> np.ndarray:
    """The share of a step's computing after which each bucket's gradients are there; without overlap nobody looks before the end."""
    return 1 / 3 + 2 / 3 * np.cumsum(parts) / sum(parts) if overlap else np.ones(len(parts))


def arrival(ready: np.ndarray, costs: list[np.ndarray], at_once: int) -> np.ndarray:
    """When the last of these messages has come. ready: when each may leave, `[buckets, ...]`; costs: of each, [of bytes, of latency].

    They leave in this order, the link carries the bytes of one at a time, and no more than `at_once` are under way.
    """
    free, there = 0.0, []
    for k, (moment, (sent, latency)) in enumerate(zip(ready, costs)):
        free = np.maximum(free, moment if k < at_once else np.maximum(moment, there[k - at_once])) + sent
        there.append(free + latency)
    return np.max(there, axis=0)


def buckets(size: float, full: float = BUCKET, layer: float = 1) -> list[float]:
    """Bytes of buckets, as slowmo/buckets.py cuts them: a small one, each at most twice the one before, the last ones halve.

    layer: bytes of a layer, with which a bucket ends.
    """
    parts, left, least = [], size, full / 25
    while left >= 1:
        parts.append(min(left, math.ceil(least / layer - 1e-9) * layer))
        left -= parts[-1]
        least = min(2 * parts[-1], full, max(left, full / 4) / 2)
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


def pace(data: str, cell: str, overlap: bool = False) -> float:
    """Modelled seconds of an iteration on the paper's cluster: C, N and m of the column, what is sent of the cell itself."""
    task = TASKS[column(data)]
    return seconds(f"{data}_{cell}", fitted(column(data)), task.size, Links(task.nodes), overlap)


def emulated_bucket(data: str, size: float) -> float:
    """Bytes: as many buckets as at full size, but none that this machine's own delays would outweigh."""
    return max(BUCKET * size / TASKS[data].size, 2**19)


def emulated(line: pd.Series) -> tuple[Links, dict[str, float]]:
    """What a line of links.csv was measured on: the links, and bucket and layer for `iteration`."""
    links = Links(int(line["hosts"]), number(line["rate"]), LATENCY + number(line["delay"]), int(line["node"]), at_once=2)
    if not line["emulated"]:
        return links, {"bucket": BUCKET}
    size = float(line["bytes"])
    return links, {"bucket": emulated_bucket(line["data"], size), "layer": size / LAYERS}


def way(row: str) -> tuple[str, bool]:
    """A measured row's cell, and whether it was sent during backward: `sgp_after,outer.tau=12` is `sgp,outer.tau=12` sent after it."""
    return row.replace("_after", "", 1), "_after" not in row


def model(lines: pd.DataFrame) -> pd.Series:
    """Modelled milliseconds of the rows measured on one network: from their own `compute`, and nothing else that was measured."""
    links, cut = emulated(lines.iloc[0])
    size, compute = float(lines["bytes"].iloc[0]), lines[lines["row"] == "compute"]["milliseconds"].median() / 1000
    found = {"compute": compute}
    for row in lines[lines["row"] != "compute"]["row"].unique():
        if ",outer=" in row:
            continue  # siblings are measured alone
        cell, overlap = way(row)
        found[row] = seconds(f"{lines['data'].iloc[0]}_{cell}", compute, size, links, overlap=overlap, **cut)
    return 1000 * pd.Series(found)


def number(text: str) -> float:
    """`400mbit` in bits per second, `0.1ms` in seconds."""
    units = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "us": 1e-6, "ms": 1e-3}
    digits = text.rstrip("kmgbitus")
    return float(digits) * units[text.removeprefix(digits)]


def elsewhere(data: str, nodes, rates, overlap: bool) -> pd.DataFrame:
    """Modelled iterations on other clusters, a worker's batch as in the paper: a line for each machine, width, rate (Gbit/s), nodes, cell.

    width: of what is sent, messages, averages and AllReduce's gradients alike. Averages go by ring or tree, whatever is faster there.
    `milliseconds`; `over base`, what SlowMo adds to its base; `over AllReduce`, which sends during backward if the others do.
    """
    task, rows = TASKS[data], []
    every = "ar_adam" if data in TEXT else "ar_sgd"
    for machine, speed in MACHINES.items():
        for width, part in WIDTHS.items():
            for rate in rates:
                for m in nodes:

                    @functools.cache
                    def total(cell):
                        links = Links(m, rate * 1e9, FAST[1] if rate >= FAST[0] else LATENCY, inside=speed["inside"])
                        sent = f"{data}_{cell}", fitted(data) / speed[data], part * task.parameters, links
                        return min(seconds(*sent, overlap, tree, bucket=BUCKET * part / 4) for tree in (False, True))

                    rows += [{"machine": machine, "width": width, "rate": rate, "nodes": m, "cell": cell,
                              "milliseconds": 1000 * total(cell), "over base": total(cell) / total(cell.removeprefix("slowmo_")),
                              "over AllReduce": total(cell) / total(every)} for cell in (every, *SHOWN[data in TEXT])]  # fmt: skip
    return pd.DataFrame(rows)
