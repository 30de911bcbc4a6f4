"""What an iteration costs where hosts are not equally fast: a simulation, step by step and bucket by bucket, on cost_model.py's links.

A host's step takes its computing (slowness times C) and then what it waits for: in AllReduce for every host's gradients, at an exact
average for every host's rows, in SGP for the two hosts that it exchanges a message with, in OSGP for the same, while it computes. A
message moves when both its ends have come to it, as gloo's and NCCL's do: the sender waits for the receiver, too.
"""

import numpy as np
import pandas as pd

from results import cost_model
from results.cost_model import BUCKET, LATENCY, TASKS, Links, algorithm, arrival, buckets, message, shares

LONGER = 10.0  # times as long, a step that jitter hits
KINDS = {"one host 1.5 times slower": (1.5, 0.0), "5% of steps 10 times longer": (1.0, 0.05)}  # (straggler, jitter)
CELLS = ("ar_sgd", "local_sgd", "slowmo_local_sgd", "sgp", "slowmo_sgp", "osgp", "slowmo_osgp")
STEPS = 960  # of a simulation: a multiple of every tau


def slowness(hosts: int, steps: int, straggler: float = 1.0, jitter: float = 0.0, round_: int = 0) -> np.ndarray:
    """How many times as long each step's computing takes, `[steps, hosts]`.

    straggler: the first host's factor. jitter: the share of a host's steps that take LONGER; each host draws its own, by round and host.
    """
    found = np.ones((steps, hosts))
    found[:, 0] = straggler
    for host in range(hosts):
        found[np.random.default_rng([round_, host]).random(steps) < jitter, host] *= LONGER
    return found


def simulate(run: str, compute: float, size: float, links: Links, slow: np.ndarray, overlap: bool = True, bucket: float = BUCKET,
             layer: float = 1, first: int = 0) -> np.ndarray:  # fmt: skip
    """When each host ends each step, `[steps + 1, m]` seconds from a common start. slow: `[steps, m]`; first: steps taken before."""
    sent, m, parts = algorithm(run), slow.shape[1], buckets(size, bucket, layer)
    share, cycle = shares(parts, overlap), max(1, (m - 1).bit_length())
    averages, gradients = ([cost(part) for part in parts] for cost in (links.average, links.allreduce))
    messages = [message(links, part, sent["gossiped"]) for part in parts]
    ends = [np.zeros(m)]
    for step, factor in enumerate(slow, first):
        begun = ends[-1]
        end = begun + compute * factor
        ready = begun + np.multiply.outer(share, compute * factor)
        if sent["base"] == "allreduce":
            end = np.maximum(end, arrival(ready.max(axis=1), gradients, links.at_once))
        elif sent["tau"] and (step + 1) % sent["tau"] == 0:
            end = np.maximum(end, arrival(ready.max(axis=1), averages, links.at_once))
            end = end + (sent["averaged"] - 1) * sum(averages).sum()
        elif sent["base"] in ("sgp", "osgp"):
            leaves = np.broadcast_to(begun, ready.shape) if sent["base"] == "osgp" else ready
            offset = 2 ** (step % cycle)  # of the one-peer exponential graph
            came = arrival(np.maximum(leaves, np.roll(leaves, offset, axis=1)), messages, len(parts))  # from the host `offset` before
            end = np.maximum(end, np.maximum(came, np.roll(came, -offset)))
        ends.append(end)
    return np.array(ends)


def model(lines: pd.DataFrame) -> pd.Series:
    """Modelled milliseconds of the rows measured on one network of unequal hosts, means over rounds, with the slowness that was drawn."""
    line = lines.iloc[0]
    links, cut = cost_model.emulated(line)
    hosts, warmup, steps = (int(line[name]) for name in ("hosts", "warmup", "iterations"))
    rounds = sorted(lines["round"].unique())
    drawn = [slowness(hosts, warmup + steps, line["straggler"], line["jitter"], round_) for round_ in rounds]
    by = lines.groupby("row", sort=False)["milliseconds"].mean()
    compute = by["compute"] / 1000 / np.mean([slow[warmup:].mean() for slow in drawn])
    found = {"compute": by["compute"]}
    for row in by.index.drop("compute"):
        cell, overlap = cost_model.way(row)
        times = []
        for round_, slow in zip(rounds, drawn):
            first = round_ * len(slow)
            ends = simulate(f"{line['data']}_{cell}", compute, float(line["bytes"]), links, slow, first=first, overlap=overlap, **cut)
            times.append((ends[-1] - ends[warmup]).mean() / steps)
        found[row] = 1000 * np.mean(times)
    return pd.Series(found)


def on_the_papers_cluster(data: str = "imagenet") -> pd.DataFrame:
    """Simulated milliseconds, during backward: a line a cell, a column for equal hosts and for each of KINDS."""
    task, compute = TASKS[data], cost_model.fitted(data)
    found = {}
    for kind, (straggler, jitter) in {"equal hosts": (1.0, 0.0), **KINDS}.items():
        slow = slowness(task.nodes, STEPS, straggler, jitter)
        sent = compute, task.size, Links(task.nodes, latency=LATENCY), slow
        found[kind] = {cell: 1000 * simulate(f"{data}_{cell}", *sent)[-1].mean() / STEPS for cell in CELLS}
    return pd.DataFrame(found)
