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

import numpy as np
import pandas as pd
import yaml

from results.collect import write
from results.tables import CONFIGS, HERE, LABELS, TEXT, TITLES, published

PAYLOAD = 1448 / 1514  # TCP over frames of 1500 bytes
INSIDE = 1.2e12  # bits a second between the processes of a node: the NVLinks of a V100
LATENCY = 50e-6  # of 10 Gbit/s Ethernet through a switch, with TCP
BUCKET = 25 * 2**20  # bytes; the first is a 25th of it
CLOSE = 0.15
PAYS = 0.95  # of AllReduce's time
NODES, RATES = tuple(2**k for k in range(3, 13)), (10, 25, 100, 400)
NETWORK = ["data", "network", "hosts", "node", "rate", "delay"]
MEASURED = [*NETWORK, "emulated", "bytes", "row", "round", "milliseconds", "commit", "machine"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A column of Table 2. parameters: of a worker's model."""

    parameters: int
    nodes: int


TASKS = {"imagenet": Task(25_557_032, 32), "wmt16": Task(209_911_808, 8)}


RULES = (
    "C is fitted to the paper's column, everything else follows from the formulas; (!): more than 15% apart. On links "
    "(`python -m experiments.runtime`: gloo over TCP between network namespaces, each link shaped) C is the measured "
    "`compute alone`, and nothing is fitted; medians over rounds with quartiles; relative: over the fastest cell of the "
    "paper's column."
)
SCALING = (
    "Modelled. A worker's batch and C stay as in the paper; a processor k times as fast on links k times as fast gives the "
    "same ratios. AllReduce averages during backward, by ring or by halving and doubling, whichever is faster; so do exact "
    "averages. In brackets the largest term beside compute."
)
NOTES = {
    "imagenet": "SGP: the paper's waits for 33 ms of a message of 86, OSGP's 271 taken as compute: some of it travels while the next "
    "batch is read or gradients are still formed. Ours is sent when the step is done and waited for, as its definition "
    "says; the fit spreads the difference over all cells. AllReduce: the paper's 420 is compute and a whole ring one after "
    "the other. Double-averaging over Local SGD: an average of two blocks every 12 iterations cannot cost 111 ms an "
    "iteration over Local SGD; over SGP the paper's costs 98 more, about one message. Both fit buffers that are exchanged "
    "at every iteration, which is not what averaging every τ says.",
    "wmt16": "SGP's 1225 ms, 2.4 times Local Adam's, are no anomaly: a row of 840 MB takes 0.7 s on 10 Gbit/s, and SGP waits for all"
    " of it.",
}


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
    buffers = 2 if experiment.startswith(TEXT) else 1  # Adam's two moments, SGD's momentum
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
        parts += [min(bucket, size - parts[0] - k * bucket) for k in range(math.ceil((size - parts[0]) / bucket))]
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


def label(row: str) -> str:
    name = LABELS[row.removesuffix("_after")]
    if row.startswith("ar_"):
        name += ", averaging after backward" if row.endswith("_after") else ", averaging during backward"
    return name


def emulated_bucket(data: str, size: float) -> float:
    """Bytes: as many buckets as at full size, but none that this machine's own delays would outweigh."""
    return max(BUCKET * size / (4 * TASKS[data].parameters), 2**20)


def model(lines: pd.DataFrame) -> pd.Series:
    """Modelled milliseconds of the rows measured on one network: from their own `compute`, and nothing else that was measured."""
    line = lines.iloc[0]
    units = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "us": 1e-6, "ms": 1e-3}
    rate, delay = (float(text.rstrip("kmgbitus")) * units[text.lstrip("0123456789.")] for text in (line["rate"], line["delay"]))
    links = Links(int(line["hosts"]), rate, LATENCY + delay, int(line["node"]))
    size, compute = float(line["bytes"]), lines[lines["row"] == "compute"]["milliseconds"].median() / 1000
    bucket = emulated_bucket(line["data"], size) if line["emulated"] else BUCKET
    found = {"compute": compute}
    for row in lines[lines["row"] != "compute"]["row"].unique():
        name = f"{line['data']}_{row.removesuffix('_after')}"
        found[row] = seconds(name, compute, size, links, early=not row.endswith("_after"), bucket=bucket)
    return 1000 * pd.Series(found)


def links(path: Path = HERE / "runtime.csv") -> pd.DataFrame:
    """The lines of `python -m experiments.runtime`; none where it has not run. ValueError for a file of another kind."""
    lines = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=MEASURED)
    if missing := [name for name in MEASURED if name not in lines.columns]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: make it anew with python -m experiments.runtime")
    return lines


def beside(lines: pd.DataFrame) -> str:
    """The measured rows of one network beside the model and the paper, in milliseconds and over the first cell's."""
    data = lines["data"].iloc[0]
    by = lines.groupby("row", sort=False)["milliseconds"]
    measured, low, high = by.median(), by.quantile(0.25), by.quantile(0.75)
    modelled = model(lines)
    # the paper's AllReduce averages after backward, see `against_paper`
    target = "wmt16" if data in TEXT else "imagenet"
    known = {row: value for row, value in paper(target).items() if data in TASKS}
    known = {f"{row}_after" if row.startswith("ar_") else row: value for row, value in known.items()}
    fastest = "local_adam" if data in TEXT else "osgp"  # of the paper's column
    start = fastest if fastest in measured else measured.index[1]
    out = [
        "| | measured ms (quartiles) | model ms | measured over model | relative | model's | paper's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, value in measured.items():
        shown = f"{value:.1f} ({low[row]:.1f} to {high[row]:.1f})"
        if row == "compute":
            out.append(f"| compute alone | {shown} | | | | | |")
            continue
        off = value / modelled[row]
        mark = "" if abs(math.log(off)) <= math.log(1 + CLOSE) else " (!)"
        ratios = [f"{table[row] / table[start]:.3f}" if row in table and start in table else "" for table in (measured, modelled, known)]
        out.append(f"| {label(row)} | {shown} | {modelled[row]:.1f} | {off:.3f}{mark} | {' | '.join(ratios)} |")
    return "\n".join(out)


def against_paper(data: str) -> str:
    """Table 2's column beside the model, whose AllReduce averages after backward: during it, 32 nodes would take what is said last."""
    task, compute, cells = TASKS[data], fitted(data), paper(data)
    size, links = 4 * task.parameters, Links(task.nodes)
    message, ring = (1000 * cost(size).sum() for cost in (links.message, links.average))
    lines = [
        f"C = {1000 * compute:.0f} ms, N = {size / 1e6:.1f} MB, m = {task.nodes}, g = {links.node}, R = {links.rate / 1e9:g} Gbit/s, "
        f"λ = {1e6 * links.latency:g} µs: message {message:.0f} ms, ring {ring:.0f} ms.\n",
        "| | paper ms | model ms | model over paper | of these: compute | waiting | exact averages |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell, value in cells.items():
        terms = iteration(f"{data}_{cell}", compute, size, links)
        total = sum(terms.values())
        waited, averaged = terms["bytes"] + terms["latency"], terms["average, bytes"] + terms["average, latency"]
        mark = "" if abs(math.log(total / value)) <= math.log(1 + CLOSE) else " (!)"
        numbers = " | ".join(f"{1000 * part:.0f}" for part in (compute, waited, averaged))
        lines.append(f"| {LABELS[cell]} | {1000 * value:.0f} | {1000 * total:.0f} | {total / value:.2f}{mark} | {numbers} |")
    last = next(cell for cell in cells if cell.startswith("ar_"))
    early = seconds(f"{data}_{last}", compute, size, links, early=True)
    return "\n".join(lines) + f"\n\n{LABELS[last]} in buckets during backward, on the same links: {1000 * early:.0f} ms.\n"


SHOWN = {False: ("slowmo_local_sgd", "slowmo_sgp", "slowmo_osgp"), True: ("slowmo_local_adam", "slowmo_sgp")}


def elsewhere(data: str, nodes, rates) -> pd.DataFrame:
    """Modelled iterations on other clusters, a worker's batch as in the paper: a line for each rate (Gbit/s), number of nodes and cell.

    AllReduce averages during backward, by ring or tree, whichever is faster there. `milliseconds`, `over base` (what SlowMo adds to its
    base), `over AllReduce`, and `largest`: the largest term beside compute.
    """
    task, compute = TASKS[data], fitted(data)
    size, rows = 4 * task.parameters, []
    text = data in TEXT
    for rate in rates:
        for m in nodes:
            links = Links(m, rate * 1e9)

            def terms(cell, **options):
                both = [iteration(f"{data}_{cell}", compute, size, links, tree=tree, **options) for tree in (False, True)]
                return min(both, key=lambda found: sum(found.values()))

            allreduce = sum(terms("ar_adam" if text else "ar_sgd", early=True).values())
            rows.append({"rate": rate, "nodes": m, "cell": "ar_adam" if text else "ar_sgd", "milliseconds": 1000 * allreduce,
                         "largest": _largest(terms("ar_adam" if text else "ar_sgd", early=True))})  # fmt: skip
            for cell in SHOWN[text]:
                found = terms(cell)
                total, base = (sum(terms(name).values()) for name in (cell, cell.removeprefix("slowmo_")))
                rows.append({"rate": rate, "nodes": m, "cell": cell, "milliseconds": 1000 * total, "over base": total / base,
                             "over AllReduce": total / allreduce, "largest": _largest(found)})  # fmt: skip
    return pd.DataFrame(rows)


def _largest(terms: dict) -> str:
    others = {name: value for name, value in terms.items() if name != "compute"}
    return max(others, key=others.get) if any(others.values()) else "none"


def sentences(data: str, found: pd.DataFrame) -> list[str]:
    """At which scale which term is the largest, and where SlowMo pays."""
    task, said = TASKS[data], []
    for rate, part in found.groupby("rate", sort=False):
        cross = 8 * 4 * task.parameters / (PAYLOAD * rate * 1e9 * LATENCY)
        text = f"{rate:g} Gbit/s: a ring's latency outweighs its bytes above m = {cross:,.0f}"
        for cell in SHOWN[data in TEXT]:
            of = part[part["cell"] == cell]
            pays = of[of["over AllReduce"] <= PAYS]["nodes"]
            where = f"at m = {_ranges(pays, of['nodes'])}" if len(pays) else "nowhere here"
            text += f"; {LABELS[cell]} saves 5% or more over AllReduce {where}"
            text += f", and costs at most {100 * (of['over base'].max() - 1):.1f}% over its base"
        said.append(text + ".")
    return said


def _ranges(some, every) -> str:
    """`8 to 64, 1024` of sorted numbers, runs of neighbours in `every` put together."""
    every, groups = list(every), []
    for value in some:
        if groups and every.index(value) == every.index(groups[-1][-1]) + 1:
            groups[-1].append(value)
        else:
            groups.append([value])
    return ", ".join(f"{group[0]}" if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in groups)


def predicted(data: str, found: pd.DataFrame) -> str:
    """`elsewhere` as a table: milliseconds, and what is the largest term beside compute."""
    cells = list(dict.fromkeys(found["cell"]))
    lines = [
        "| Gbit/s | m | " + " | ".join(label(cell).replace(", averaging during backward", "") for cell in cells) + " |",
        "|---" * (len(cells) + 2) + "|",
    ]
    for (rate, m), part in found.groupby(["rate", "nodes"], sort=False):
        part = part.set_index("cell")
        numbers = [f"{part['milliseconds'][cell]:.0f} ({part['largest'][cell]})" for cell in cells]
        lines.append(f"| {rate:g} | {m} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def benchmarks(path: Path) -> str:
    """benchmarks/cpu.csv as a table: the ratios of `python -m benchmarks`."""
    lines = pd.read_csv(path)
    out = ["| ours | over | where | aim | ratio (quartiles) |", "|---|---|---|---|---|"]
    for line in lines.itertuples():
        ratio = f"{line.ratio:.3f}" + f" ({line.low:.3f} to {line.high:.3f})" * (line.rounds > 1) + " (!)" * (line.ratio > line.aim)
        out.append(f"| {line.what} | {line.against} | {line.where} | ≤ {line.aim:.2f} | {ratio} |")
    return "\n".join(out) + f"\n\n(!): aim missed. {_made(lines)}\n"


def exponents(lines: pd.DataFrame) -> str:
    """Of benchmarks/growth.csv: slopes of log cost over log size, where rows of m d numbers exceed every cache."""
    said = []
    for what, along, rest in (("step", "m", lines["d"] == 10**6), ("step", "d", lines["m"] == 2), ("memory", "m", lines["d"] == 10**6)):
        part = lines[(lines["what"] == what) & rest & (lines["m"] * lines["d"] >= 4_000_000)]
        slope = np.polyfit(np.log(part[along].astype(float)), np.log(part["value"]), 1)[0]
        said.append(f"{what} against {along} {slope:.2f}")
    start = lines[lines["what"] == "start"]["value"].iloc[0]
    return f"Exponents: {', '.join(said)}. A run of one step on the quadratic, from the command to its end: {start:.1f} s."


def _made(lines: pd.DataFrame) -> str:
    last = lines.iloc[-1]
    return f"{last['machine']}; commit {str(last['commit'])[:10]}."


def on_links(data: str, path: Path = HERE / "runtime.csv") -> str:
    """What was measured of a column of Table 2, a table for each network."""
    lines, text = links(path), []
    for (_, kind, hosts, node, rate, delay), part in lines[lines["data"] == data].groupby(NETWORK, sort=False):
        where = f"{hosts} hosts" + f" of {node} processes" * (node > 1)
        where += f", links of {rate}, delay {delay}" if kind == "emulated" else ", on loopback"
        text.append(f"Measured on {where}, rows of {part['bytes'].iloc[0] / 1e6:.2f} MB; {_made(part)}\n\n{beside(part)}\n")
    return "\n".join(text or ["Not measured on links yet: `python -m experiments.runtime`.\n"])


def main(out: Path, nodes=NODES, rates=RATES) -> None:
    """Write `out`/runtime.md; print what clusters of these numbers of nodes and rates (Gbit/s) would take."""
    text = ["# Seconds of an iteration", "", "```", __doc__.partition("\n\n")[2].partition("\n`slowmo/`")[0].rstrip(), "```", ""]
    text += ["## Table 2: the paper, the model, and links", "", RULES, ""]
    for data in TASKS:
        text += [f"### {TITLES[data]}", "", against_paper(data), NOTES[data], "", on_links(data, out / "runtime.csv")]
    text += ["## Other clusters", "", SCALING, ""]
    for data in TASKS:
        found = elsewhere(data, nodes, rates)
        table, said = predicted(data, found), [f"- {sentence}" for sentence in sentences(data, found)]
        text += [f"### {TITLES[data]}", "", table, "", *said, ""]
        print("\n".join([TITLES[data], table, *said, ""]))
    grown = out / "benchmarks/growth.csv"
    if grown.exists():
        text += ["## How an algorithm's own cost grows", "", exponents(pd.read_csv(grown)), ""]
    write(out / "runtime.md", "\n".join(text))
    print(f"wrote {out / 'runtime.md'}")
