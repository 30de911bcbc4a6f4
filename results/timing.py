"""Seconds as tables: Table 2 beside the model and what was measured on links, other clusters, benchmarks: results/tables/runtime.md."""

import math

import numpy as np
import pandas as pd

from results import cost_model
from results.cost_model import CLOSE, LATENCY, NODES, PAYLOAD, RATES, SHOWN, TASKS, Links
from results.store import NETWORK, Store, save
from results.tables import LABELS, TEXT, TITLES

PAYS = 0.95  # of AllReduce's time
RULES = (
    "C is fitted to the paper's column, everything else follows from the formulas; (!): more than 15% apart. On links"
    " (`python -m benchmarks.table2`: gloo over TCP between network namespaces, each link shaped) C is the measured"
    " `compute alone`, and nothing is fitted; medians over rounds with quartiles; relative: over the fastest cell of "
    "the paper's column."
)
SCALING = (
    "Modelled. C and a worker's batch stay as in the paper; a processor k times as fast on links k times as fast and a "
    "latency k times as short gives the same ratios. Averages go by ring or by halving and doubling, AllReduce's during or "
    "after backward, whatever is fastest. In brackets the largest term beside compute. SlowMo pays where an iteration takes"
    " 5% less than AllReduce's."
)
MISSED = (
    "Rows on loopback have nothing to hide a message behind: it takes the cores that compute. SGP with a long message leaves the link "
    "idle until the first bucket has its gradients. OSGP's message is under way while gradients are formed, so it takes memory of its "
    "own; SGP's comes into the gradients' memory when the optimizer has used it."
)
NOTES = {
    "imagenet": "SGP: the paper's waits for 33 ms of a message of 86 if OSGP's 271 are taken as compute: some of it travels while"
    " the next batch is read or gradients are still formed. Ours is sent when the step is done and waited for, as its"
    " definition says; the fit spreads the difference over all cells. AllReduce: the paper's 420 is compute and a "
    "whole ring one after the other. Double-averaging over Local SGD: an average of two blocks every 12 iterations "
    "cannot cost 111 ms per iteration more than Local SGD; over SGP the paper's costs 98 more, about one message. Both"
    " fit buffers that are exchanged at every iteration, which is not what averaging every τ says.",
    "wmt16": "SGP's 1225 ms, 2.4 times Local Adam's, are no anomaly: a row of 840 MB takes 0.7 s on 10 Gbit/s, and SGP waits "
    "for all of it.",
}


def main(store: Store) -> None:
    """Write tables/runtime.md."""
    formulas = cost_model.__doc__.partition("\n\n")[2].partition("\n`slowmo/`")[0].rstrip()
    text = ["# Seconds of an iteration", "", "```", formulas, "```", "", "## Table 2: the paper, the model, and links", "", RULES, ""]
    measured = store.find("links")
    for data in dict.fromkeys((*TASKS, *measured["data"])):
        text += [f"### {TITLES[data]}", ""]
        text += [against_paper(data), NOTES[data], ""] if data in TASKS else []
        text += [on_links(data, measured)]
    text += ["## Other clusters", "", SCALING, ""]
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
    """A row's words: `ar_sgd_after` averages after backward, `sgp,outer.tau=12` has another τ."""
    cell, _, tau = row.partition(",outer.tau=")
    name = LABELS[cell.replace("_after", "")] + f", τ = {tau}" * bool(tau)
    return name + f", averaging {'after' if cell.endswith('_after') else 'during'} backward" * cell.startswith("ar_")


def beside(lines: pd.DataFrame) -> str:
    """The measured rows of one network beside the model and the paper, in milliseconds and over the first cell's."""
    data, network = lines["data"].iloc[0], lines["network"].iloc[0]
    by = lines.groupby("row", sort=False)["milliseconds"]
    measured, low, high = by.median(), by.quantile(0.25), by.quantile(0.75)
    modelled = cost_model.model(lines) if network == "emulated" else {}  # loopback has no rate
    # the paper's AllReduce averages after backward, see NOTES
    known = {f"{row}_after" if row.startswith("ar_") else row: value for row, value in cost_model.paper(cost_model.column(data)).items()}
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
        ratios = [f"{table[row] / table[start]:.3f}" if row in table and start in table else "" for table in (measured, modelled, known)]
        there, off = "", ""
        if row in modelled:
            there, off = f"{modelled[row]:.1f}", f"{value / modelled[row]:.3f}{mark(value / modelled[row])}"
        out.append(f"| {label(row)} | {shown} | {there} | {off} | {' | '.join(ratios)} |")
    return "\n".join(out)


def mark(ratio: float) -> str:
    return "" if abs(math.log(ratio)) <= math.log(1 + CLOSE) else " (!)"


def on_links(data: str, lines: pd.DataFrame) -> str:
    """What was measured of a column of Table 2, a table for each network."""
    text = []
    for (_, kind, hosts, node, rate, delay), part in lines[lines["data"] == data].groupby(NETWORK, sort=False):
        where = f"{hosts} hosts" + f" of {node} processes" * (node > 1)
        where += f", links of {rate}, delay {delay}" if kind == "emulated" else ", on loopback"
        model = "" if part["emulated"].iloc[0] else " A real model computes."
        text.append(f"Measured on {where}, rows of {part['bytes'].iloc[0] / 1e6:.2f} MB.{model} {made(part)}\n\n{beside(part)}\n")
    return "\n".join(text or ["Not measured on links yet: `python -m benchmarks.table2`.\n"])


def made(lines: pd.DataFrame) -> str:
    """Where numbers come from."""
    places = {machine: sorted({str(commit)[:10] for commit in part["commit"]}) for machine, part in lines.groupby("machine")}
    return "; ".join(f"{machine}; commit {', '.join(commits)}" for machine, commits in places.items()) + "."


def against_paper(data: str) -> str:
    """Table 2's column beside the model, whose AllReduce averages after backward; what it takes during it is said last."""
    task, compute, cells = TASKS[data], cost_model.fitted(data), cost_model.paper(data)
    there = Links(task.nodes)
    costs = {name: 1000 * getattr(there, name)(task.size).sum() for name in ("message", "average", "allreduce")}
    lines = [
        f"C = {1000 * compute:.0f} ms, N = {task.size / 1e6:.1f} MB, m = {task.nodes}, g = {there.node}, R = {there.rate / 1e9:g} Gbit/s, "
        f"λ = {1e6 * there.latency:g} µs: {', '.join(f'{name} {cost:.0f} ms' for name, cost in costs.items())}.\n",
        "| | paper ms | model ms | model over paper | of these: compute | waiting | exact averages |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell, value in cells.items():
        terms = cost_model.iteration(f"{data}_{cell}", compute, task.size, there)
        total = sum(terms.values())
        waited, averaged = terms["bytes"] + terms["latency"], terms["bytes of averages"] + terms["latency of averages"]
        numbers = " | ".join(f"{1000 * part:.0f}" for part in (compute, waited, averaged))
        lines.append(f"| {LABELS[cell]} | {1000 * value:.0f} | {1000 * total:.0f} | {total / value:.2f}{mark(total / value)} | {numbers} |")
    last = next(cell for cell in cells if cell.startswith("ar_"))
    early = cost_model.seconds(f"{data}_{last}", compute, task.size, there, early=True)
    return "\n".join(lines) + f"\n\n{LABELS[last]} in buckets during backward, on the same links: {1000 * early:.0f} ms.\n"


def clusters(data: str, nodes=NODES, rates=RATES) -> str:
    """Modelled iterations on other clusters: a table, where SlowMo pays, and which term is the largest from where on."""
    found = cost_model.elsewhere(data, nodes, rates)
    cells = list(dict.fromkeys(found["cell"]))
    lines = ["| Gbit/s | m | " + " | ".join(LABELS[cell] for cell in cells) + " |", "|---" * (len(cells) + 2) + "|"]
    for (rate, m), part in found.groupby(["rate", "nodes"], sort=False):
        part = part.set_index("cell")
        numbers = [f"{part['milliseconds'][cell]:.0f} ({_largest(part.loc[cell])})" for cell in cells]
        lines.append(f"| {rate:g} | {m} | {' | '.join(numbers)} |")
    return "\n".join([f"### {TITLES[data]}", "", *lines, "", *(f"- {sentence}" for sentence in sentences(data, found))])


TERMS = ["bytes", "latency", "bytes of averages", "latency of averages"]


def _largest(line) -> str:
    return max(TERMS, key=lambda term: line[term]) if any(line[term] for term in TERMS) else "none"


def sentences(data: str, found: pd.DataFrame) -> list[str]:
    """By rate: where SlowMo pays against AllReduce and what it adds to its base; where compute is not the largest term."""
    said, task = [], TASKS[data]
    for rate, part in found.groupby("rate", sort=False):
        words = []
        for cell in SHOWN[data in TEXT]:
            of = part[part["cell"] == cell]
            pays = of[of["over AllReduce"] <= PAYS]["nodes"]
            where = f"pays at m = {_ranges(pays, of['nodes'])}" if len(pays) else "pays nowhere here"
            words.append(f"{LABELS[cell]} {where} and adds at most {100 * (of['over base'].max() - 1):.1f}% to its base")
        said.append(f"{rate:g} Gbit/s: {'; '.join(words)}.")
        words = []
        for cell in dict.fromkeys(part["cell"]):
            of = part[part["cell"] == cell]
            above = of[of[TERMS].max(axis=1) > of["compute"]]["nodes"]
            if len(above):
                words.append(f"of {LABELS[cell]} at m = {_ranges(above, of['nodes'])}")
        cross = 8 * task.size / (PAYLOAD * rate * 1e9 * LATENCY)
        text = f"{rate:g} Gbit/s: compute is the largest term everywhere" + f" but {', '.join(words)}, where link bytes are" * bool(words)
        said.append(f"{text}. The latency of a ring for the whole row outweighs its bytes above m = {cross:,.0f}.")
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
        out.append(f"| {line.what} | {line.against} | {line.where} | ≤ {line.aim:.2f} | {ratio} |")
    return "\n".join(out) + f"\n\n(!): aim missed. {MISSED} {made(lines)}\n"


def exponents(lines: pd.DataFrame) -> str:
    """Of `python -m benchmarks.scaling`: slopes of log cost over log size, where rows of m d numbers exceed every cache."""
    said = []
    for what, along, rest in (("step", "m", lines["d"] == 10**6), ("step", "d", lines["m"] == 2), ("memory", "m", lines["d"] == 10**6)):
        part = lines[(lines["what"] == what) & rest & (lines["m"] * lines["d"] >= 4_000_000)]
        slope = np.polyfit(np.log(part[along].astype(float)), np.log(part["value"]), 1)[0]
        said.append(f"{what} against {along} {slope:.2f}")
    start = lines[lines["what"] == "start"]["value"].iloc[0]
    return f"Exponents: {', '.join(said)}. From the command to the end of a run of one step on the quadratic: {start:.1f} s. {made(lines)}"
