"""Seconds as tables: Table 2 beside the model and what was measured on links, other clusters, benchmarks: results/tables/runtime.md."""

import math

import numpy as np
import pandas as pd

from results import cost_model, straggling
from results.cost_model import CLOSE, MACHINES, NODES, RATES, SHOWN, TASKS, WIDTHS, Links
from results.store import NETWORK, Store, save
from results.tables import LABELS, TEXT, TITLES

SIBLINGS = {"diloco": "DiLoCo", "streaming": "Streaming DiLoCo"}  # other outers that are measured
PAYS, CLEAR = 0.95, 0.99  # of AllReduce's time: SlowMo pays; a method costs less
AIM = 0.05  # measured over model
RULES = (
    "C is fitted to the paper's column, with everything sent after backward; all else follows from the formulas; (!): more than 15% apart. "
    "On links (`python -m benchmarks.table2`: gloo over TCP between network namespaces, each link shaped) C is the measured `compute "
    "alone`, and nothing is fitted. There numbers are medians over rounds, (!) marks those more than 5% from the model; in brackets: over "
    "the fastest cell of the paper's column, sent the same way."
)
SCALING = (
    "Modelled. A worker's batch stays as in the paper; an H100 node computes {imagenet:.1f} times as fast as a DGX-1 on ImageNet and "
    "{wmt16:.1f} times on WMT16 (results/cost_model.py has the sources). *bfloat16*: whatever is sent, messages, averages and "
    "AllReduce's gradients; this library rounds messages alone. Averages go by ring or by halving and doubling, whatever is faster; links "
    "of 100 Gbit/s and more have a latency of 5 µs. Everything is sent during backward, AllReduce's gradients too. A cell is the method "
    "that costs least and how much less than AllReduce; a method within 1% of AllReduce does not count. SlowMo pays where an iteration "
    "takes 5% less; in brackets the most that it saves."
)
STRAGGLING = (
    "Hosts are seldom equally fast. One is 1.5 times slower all the time; or each host computes 10 times as long in 5% of its steps, by "
    "draws of its own. Means in milliseconds, in brackets over equal hosts. A host that is always slow sets everybody's pace, whatever "
    "is sent: gossip hands its lateness on within a few steps. Jitter tells them apart: in every step AllReduce waits for the slowest of "
    "all hosts, SGP for the two that it exchanges a message with, OSGP for the same two but a step later; Local SGD evens τ steps out "
    "before it waits for all."
)
MISSED = (
    "Rows on loopback have nothing to hide a message behind: it takes the cores that compute. A slow step sends 2 (m - 1)/m times the "
    "bytes of gossip's, in a ring of 2 (m - 1) hops, which is most of what SlowMo adds to SGP. OSGP's message is under way while gradients "
    "are formed, so it takes memory of its own; SGP's comes into the gradients' memory when the optimizer has used it."
)
NOTES = {  # of each cell that is more than 15% off, and of what the column says
    "imagenet": "AR-SGD: the paper's 420 is compute and a whole ring one after the other. Double-averaging over Local SGD: an average of"
    " two blocks every 12 iterations cannot cost 111 ms per iteration more than Local SGD; over SGP the paper's costs 98 more, about one "
    "message. Both times fit buffers that are exchanged in every iteration; the paper's text says every τ.",
    "wmt16": "Its 1225 ms are no anomaly: a row of 840 MB takes 0.7 s on 10 Gbit/s.",
}


def main(store: Store) -> None:
    """Write tables/runtime.md."""
    formulas = cost_model.__doc__.partition("\n\n")[2].partition("\n`slowmo/`")[0].rstrip()
    text = ["# Seconds of an iteration", "", "```", formulas, "```", "", "## Table 2: the paper, the model, and links", "", RULES, ""]
    measured = store.find("links")
    for data in dict.fromkeys((*TASKS, *measured["data"])):
        text += [f"### {TITLES[data]}", "", *([against_paper(data)] if data in TASKS else []), on_links(data, measured)]
    text += ["## Hosts that are not equally fast", "", straggling_hosts(measured), ""]
    text += ["## Other clusters", "", SCALING.format(**MACHINES["H100"]), ""]
    for data in TASKS:
        text += [clusters(data), ""]
    if store.has("benchmarks"):
        text += ["## Against peers and limits", "", benchmarks(store), ""]
    if store.has("scaling"):
        text += ["## How an algorithm's own cost grows", "", exponents(store.read("scaling")), ""]
    out = store.folder / "tables/runtime.md"
    save(out, "\n".join(text))
    print(f"wrote {out}")


def label(row: str) -> str:
    """A row's words: `sgp_after` is sent after backward, which a column says; `sgp,outer.tau=12` has another τ."""
    cell, *words = cost_model.way(row)[0].split(",")
    said = {"outer.tau": ", τ = {}", "outer": ": {}"}
    return LABELS[cell] + "".join(said[key].format(SIBLINGS.get(value, value)) for key, _, value in (word.partition("=") for word in words))


def beside(lines: pd.DataFrame) -> str:
    """The measured rows of one network beside the paper and the model, in milliseconds: sent during backward and after it."""
    data, network = lines["data"].iloc[0], lines["network"].iloc[0]
    measured = lines.groupby("row", sort=False)["milliseconds"].median()
    model = cost_model.model if equal(lines).all() else straggling.model
    modelled = model(lines) if network == "emulated" else {}  # loopback has no rate
    known = cost_model.paper(data) if data in TASKS else {}
    fastest = "local_adam" if data in TEXT else "osgp"  # of the paper's column

    def over(table, row: str, number: float, digits: int) -> str:
        start = f"{fastest}_after" if not cost_model.way(row)[1] and f"{fastest}_after" in table else fastest
        return f"{number:.{digits}f}" + (f" ({table[row] / table[start]:.2f})" if start in table and row != start else "")

    def pair(row: str) -> str:
        if row not in measured:
            return " | "
        value, there = measured[row], modelled.get(row)
        wrong = mark(value / there, AIM) if there else ""
        return f"{over(measured, row, value, 1)}{wrong} | " + (f"{there:.1f}" if there else "")

    out = [
        "| | paper ms | during backward: ms | model ms | after: ms | model ms |",
        "|---|---|---|---|---|---|",
        f"| compute alone | | {measured['compute']:.1f} | | | |",
    ]
    for row in dict.fromkeys(cost_model.way(row)[0] for row in measured.index.drop("compute")):
        cell, comma, tau = row.partition(",")
        paper = over(known, row, 1000 * known[row], 0) if row in known else ""
        out.append(f"| {label(row)} | {paper} | {pair(row)} | {pair(f'{cell}_after{comma}{tau}')} |")
    return "\n".join(out)


def mark(ratio: float, close: float = CLOSE) -> str:
    return "" if abs(math.log(ratio)) <= math.log(1 + close) else " (!)"


def spread(lines: pd.DataFrame) -> float:
    """The largest distance of a row's quartiles from its median, over the median."""
    by = lines.groupby("row")["milliseconds"]
    return max((by.quantile(q) / by.median() - 1).abs().max() for q in (0.25, 0.75))


def equal(lines: pd.DataFrame) -> pd.Series:
    """Which lines were measured on hosts that are equally fast."""
    return (lines["straggler"] == 1) & (lines["jitter"] == 0)


def where(line) -> str:
    """The network of a line."""
    words = f"{line.hosts} hosts" + f" of {line.node} processes" * (line.node > 1)
    return words + (f", links of {line.rate}, delay {line.delay}" if line.network == "emulated" else ", on loopback")


def on_links(data: str, lines: pd.DataFrame) -> str:
    """What was measured of a column of Table 2 on equal hosts, a table for each network."""
    text = []
    for _, part in lines[(lines["data"] == data) & equal(lines)].groupby(NETWORK, sort=False):
        line = next(part.itertuples())
        rounds = f"{part['round'].nunique()} rounds, quartiles within {100 * spread(part):.1f}% of the median."
        text.append(f"Measured on {where(line)}. {computing(line)} {rounds} {made(part)}\n\n{beside(part)}\n")
    return "\n".join(text or ["Not measured on links yet: `python -m benchmarks.table2`.\n"])


def computing(line) -> str:
    """What computes, and how large the rows of a line are."""
    size = f"{line.bytes / 1e6:.2f} MB"
    if not line.emulated:
        return f"A real network computes, with rows of {size}."
    times = TASKS[line.data].size / line.bytes
    return f"Computing is a wait in proportion to the paper's own time, and rows of {size} are {times:.0f} times smaller than the paper's."


def straggling_hosts(lines: pd.DataFrame) -> str:
    """Unequal hosts: simulated on the paper's cluster, and what was measured on links beside the same simulation."""
    found = straggling.on_the_papers_cluster()
    kinds = list(straggling.KINDS)
    text = [STRAGGLING, "", f"Simulated: ImageNet, {TASKS['imagenet'].nodes} nodes on 10 Gbit/s, sent during backward.", ""]
    text += [f"| | equal hosts | {' | '.join(kinds)} |", "|---|---|---|---|"]
    for cell, line in found.iterrows():
        words = [f"{line[kind]:.0f} ({line[kind] / line['equal hosts']:.2f})" for kind in kinds]
        text.append(f"| {LABELS[cell]} | {line['equal hosts']:.0f} | {' | '.join(words)} |")
    lines = lines[~equal(lines)]
    if lines.empty:
        return "\n".join([*text, "", "Not measured on links yet: `python -m benchmarks.table2 benchmark=jitter`.\n"])
    for _, part in lines.groupby(["data", "hosts", "rate", "delay"], sort=False):
        sides = {}
        for kind, (straggler, jitter) in straggling.KINDS.items():
            own = part[(part["straggler"] == straggler) & (part["jitter"] == jitter)]
            if len(own):
                sides[kind] = own.groupby("row", sort=False)["milliseconds"].mean(), straggling.model(own)
        if not sides:
            continue
        first, rounds = next(part.itertuples()), f"{part['round'].nunique()} rounds."
        text += ["", f"Measured: {TITLES[first.data]}, {where(first)}. {computing(first)} {rounds} {made(part)}", ""]
        text += [f"| | {' | '.join(f'{kind}: ms | model ms' for kind in sides)} |", "|---" * (1 + 2 * len(sides)) + "|"]
        for row in dict.fromkeys(part["row"]):
            words = []
            for measured, modelled in sides.values():
                there = row in measured
                off = mark(measured[row] / modelled[row], AIM) if there else ""
                words.append(f"{measured[row]:.1f}{off} | {modelled[row]:.1f}" if there else " | ")
            text.append(f"| {'compute alone' if row == 'compute' else label(row)} | {' | '.join(words)} |")
    return "\n".join([*text, ""])


def made(lines: pd.DataFrame) -> str:
    """Where numbers come from."""
    places = {
        machine: sorted({str(commit)[:10] + "+" * str(commit).endswith("+") for commit in part["commit"]})
        for machine, part in lines.groupby("machine")
    }
    return "; ".join(f"{machine}; commit {', '.join(commits)}" for machine, commits in places.items()) + "."


def against_paper(data: str) -> str:
    """Table 2's column beside the model, sent after backward, as C is fitted, and during it; then what that says."""
    task, compute, cells = TASKS[data], cost_model.fitted(data), cost_model.paper(data)
    there = Links(task.nodes)
    costs = {name: 1000 * getattr(there, name)(task.size).sum() for name in ("message", "average", "allreduce")}
    lines = [
        f"C = {1000 * compute:.0f} ms, N = {task.size / 1e6:.1f} MB, m = {task.nodes}, g = {there.node}, R = {there.rate / 1e9:g} Gbit/s, "
        f"λ = {1e6 * there.latency:g} µs: {', '.join(f'{name} {cost:.0f} ms' for name, cost in costs.items())}.\n",
        "| | paper ms | after backward: model ms | over paper | during: model ms | over paper |",
        "|---|---|---|---|---|---|",
    ]
    ways = {}
    for cell, value in cells.items():
        words, ways[cell] = [], [cost_model.seconds(f"{data}_{cell}", compute, task.size, there, overlap) for overlap in (False, True)]
        for total, note in zip(ways[cell], (mark(ways[cell][0] / value), "")):
            words.append(f"{1000 * total:.0f} | {total / value:.2f}{note}")
        lines.append(f"| {LABELS[cell]} | {1000 * value:.0f} | {' | '.join(words)} |")
    fastest = "local_adam" if data in TEXT else "osgp"  # of the paper's column
    after, during = (own / start for own, start in zip(ways["sgp"], ways[fastest]))
    said = hidden(LABELS[fastest], cells["sgp"] / cells[fastest], during, after)
    return "\n".join([*lines, "", f"{said} {NOTES[data]}", ""])


def hidden(start: str, paper: float, during: float, after: float) -> str:
    """What the paper's SGP says of its implementation, beside ours; all over the iteration of `start`."""
    words = f"The paper's SGP takes {paper:.2f} times as long as its {start}, ours {during:.2f} times during backward, {after:.2f} after it"
    if paper >= after:
        return f"{words}: the paper's waits for the whole message."
    if paper <= during:
        return f"{words}: the paper's hides all that buckets can."
    return (
        f"{words}: the paper's hides {100 * (after - paper) / (after - 1):.0f}% of its message and waits for the rest. Buckets sent during "
        "backward would hide more; waiting at once would hide nothing. What fits is one whole message that leaves when the step is done, "
        "while the next batch is read, and is waited for before the next forward pass."
    )


def clusters(data: str, nodes=NODES, rates=RATES) -> str:
    """Modelled iterations on other clusters, sent during backward: what costs least, and a sentence for each rate."""
    found = cost_model.elsewhere(data, nodes, rates, overlap=True)
    kinds = [(machine, width) for machine in MACHINES for width in WIDTHS]
    lines = ["| Gbit/s | m | " + " | ".join(f"{machine}, {width}" for machine, width in kinds) + " |", "|---" * (len(kinds) + 2) + "|"]
    for (rate, m), part in found.groupby(["rate", "nodes"], sort=False):
        words = []
        for kind in kinds:
            cell, ratio = least(part[(part["machine"] == kind[0]) & (part["width"] == kind[1])])
            words.append(LABELS[cell] + f", −{100 * (1 - ratio):.0f}%" * bool(ratio < 1))
        lines.append(f"| {rate:g} | {m} | {' | '.join(words)} |")
    return "\n".join([f"### {TITLES[data]}", "", *lines, "", *(f"- {sentence}" for sentence in sentences(data, found))])


def least(lines: pd.DataFrame) -> tuple[str, float]:
    """(the cell that costs least, its time over AllReduce's) of one cluster; AllReduce where no other costs clearly less."""
    best = lines.loc[lines["over AllReduce"].idxmin()]
    if best["over AllReduce"] < CLEAR:
        return best["cell"], best["over AllReduce"]
    return next(cell for cell in lines["cell"] if cell.startswith("ar_")), 1.0


def sentences(data: str, found: pd.DataFrame) -> list[str]:
    """By rate: over which bases SlowMo pays against AllReduce, and what it adds to its base."""
    said = []
    for rate, part in found.groupby("rate", sort=False):
        words = []
        for (machine, width), own in part.groupby(["machine", "width"], sort=False):
            pays = []
            for cell in SHOWN[data in TEXT]:
                of = own[own["cell"] == cell]
                some = of[of["over AllReduce"] <= PAYS]
                if len(some):
                    few = f"m = {_ranges(some['nodes'], of['nodes'])}, " * (len(some) < len(of))
                    pays.append(f"{LABELS[cell.removeprefix('slowmo_')]} ({few}−{100 * (1 - some['over AllReduce'].min()):.0f}%)")
            words.append(f"on {machine} nodes in {width} " + (f"over {', '.join(pays)}" if pays else "nowhere"))
        added = 100 * (part[part["cell"].str.startswith("slowmo_")]["over base"].max() - 1)
        said.append(f"{rate:g} Gbit/s: SlowMo pays {'; '.join(words)}. It adds at most {added:.1f}% to its base.")
    return said


def _ranges(some, every) -> str:
    """`8 to 64, 1024` of sorted numbers, neighbours in `every` put together."""
    every, groups = list(every), []
    for value in some:
        if groups and every.index(value) == every.index(groups[-1][-1]) + 1:
            groups[-1].append(value)
        else:
            groups.append([value])
    return ", ".join(f"{group[0]}" if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in groups)


def benchmarks(store: Store) -> str:
    """The ratios of `python -m benchmarks` as a table."""
    if not store.has("benchmarks"):
        return "Not measured yet: `python -m benchmarks`.\n"
    lines = store.read("benchmarks")
    out = ["| ours | over | where | aim | ratio (quartiles) |", "|---|---|---|---|---|"]
    for line in lines.itertuples():
        ratio = f"{line.ratio:.3f}" + f" ({line.low:.3f} to {line.high:.3f})" * (line.rounds > 1) + " (!)" * (line.ratio > line.aim)
        out.append(f"| {line.what} | {line.against} | {line.where} | ≤ {line.aim:g} | {ratio} |")
    return "\n".join(out) + f"\n\n(!): aim missed. {MISSED} {made(lines)}\n"


def gpu(store: Store) -> str:
    """What `python -m benchmarks.gpu` found, as a table; in bold that there is none."""
    if not store.has("gpu"):
        return "**Never run on a GPU**, nor were the options that it measures: `python -m benchmarks.gpu --out results/data/gpu.csv`.\n"
    out = ["| part | what | found | over the plain model | memory over the rows |", "|---|---|---|---|---|"]
    lines = store.read("gpu")
    for line in lines.itertuples():
        found = line.error if isinstance(line.error, str) else f"{line.value:,.6g} {line.unit}"
        ratio, memory = ("" if math.isnan(value) else f"{value:.3f}" for value in (line.ratio, line.memory))
        out.append(f"| {line.part} | {line.what} | {found} | {ratio} | {memory} |")
    return "\n".join(out) + f"\n\n{made(lines)}\n"


def exponents(lines: pd.DataFrame) -> str:
    """Of `python -m benchmarks.scaling`: slopes of log cost over log size, where rows of m d numbers exceed every cache; then the cost of
    a step by τ, and of an iteration by its number of buckets, over the least frequent and the fewest."""
    said, usual = [], lines["tau"].fillna(12) == 12
    for what, along, rest in (("step", "m", lines["d"] == 10**6), ("step", "d", lines["m"] == 2), ("memory", "m", lines["d"] == 10**6)):
        part = lines[(lines["what"] == what) & usual & rest & (lines["m"] * lines["d"] >= 4_000_000)]
        slope = np.polyfit(np.log(part[along].astype(float)), np.log(part["value"]), 1)[0]
        said.append(f"{what} against {along} {slope:.2f}")

    def over(part, along: str) -> str:
        return ", ".join(f"{one / part['value'].iloc[0]:.2f} ({at:.0f})" for at, one in zip(part[along], part["value"]))

    steps = lines[(lines["what"] == "step") & (lines["m"] == 8) & (lines["d"] == 10**6)].sort_values("tau", ascending=False)
    buckets = lines[lines["what"] == "buckets"].sort_values("buckets")
    start, imported = (lines[lines["what"] == what]["value"].iloc[0] for what in ("start", "import"))
    return (
        f"Exponents: {', '.join(said)}. A step by τ: {over(steps, 'tau')}. An iteration of two processes on loopback by its number of "
        f"buckets: {over(buckets, 'buckets')}. From the command to the end of a run of one step on the quadratic: {start:.1f} s; "
        f"`import slowmo`, torch included: {imported:.1f} s. {made(lines)}"
    )
