"""The paper's figures from runs.csv and curves.csv: results/figures/NAME_DATA.pdf and .png.

A base and SlowMo over it share a colour; SlowMo's line is full and has markers, the base's is dashed, so that grey is enough. Seconds are
those that the runs took where they ran on a cluster; of runs in one process they are modelled (cost_model.py), and say so.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb

from results import cost_model, timing
from results.store import Curves, Runs, Store
from results.tables import (
    ACCURACY,
    BLEU_TEST,
    LABELS,
    LAST,
    LOSS_LAST,
    LOSS_TIERS,
    NLL,
    SMALL,
    TEXT,
    TITLES,
    cells,
    interval,
    layout,
    sweep,
    table1,
)

STYLE = Path(__file__).parent / "report/paper.mplstyle"
ALGORITHMS, MARKERS = ("local", "osgp", "sgp", "ar"), "osD^"
MEASURED = "measured"
# cells in a grid
SHORT = {"ar_sgd": "AR", "ar_adam": "AR", "slowmo_local_sgd": "L", "slowmo_local_adam": "L", "slowmo_sgp": "S", "slowmo_osgp": "O"}


def main(store: Store) -> None:
    """Draw what there are runs for, into figures/."""
    runs, out = Runs(store), store.folder / "figures"
    curves, made = Curves(runs), []
    with plt.style.context(STYLE):
        for data in TITLES:
            for name, draw in KINDS.items():
                figure = draw(data, runs, curves)
                if figure is None:
                    continue
                save(figure, out, f"{name}_{data}")
                made.append(f"{name}_{data}")
        for name, figure in (("teaser", teaser(runs, curves)), ("forest", forest(runs))):
            if figure is not None:
                save(figure, out, name)
                made.append(name)
    for name in ({f"{name}_{data}" for data in TITLES for name in KINDS} | {"teaser", "forest"}) - {*made}:
        for kind in ("pdf", "png"):  # of runs that are gone
            (out / f"{name}.{kind}").unlink(missing_ok=True)
    print(f"wrote {out}: {', '.join(made) or 'nothing, no runs'}")


def save(figure, out: Path, name: str) -> None:
    """As .pdf and .png into the folder `out`."""
    for kind, facts in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        target = out / f"{name}.{kind}"
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_suffix(".partial")
        figure.savefig(aside, format=kind, metadata=facts)
        aside.replace(target)
    plt.close(figure)


def measure(data: str):
    """What the vertical axis shows."""
    return NLL[True][1] if data in TEXT else ACCURACY


def styled(cell: str, n=None) -> dict:
    """One colour and marker for an algorithm, in every figure; its name with `n`, how many seeds."""
    k = ALGORITHMS.index(cell.removeprefix("slowmo_").partition("_")[0])
    slow = cell.startswith("slowmo_")
    return {"color": f"C{k}", "linestyle": "-" if slow else "--", "marker": MARKERS[k] if slow else "",
            "label": LABELS[cell] + (f" (n = {n})" if n else "")}  # fmt: skip


def worded(metric) -> str:
    """A vertical axis: its unit belongs to it."""
    return f"validation {metric.title.rpartition(', ')[0]}" + " (%)" * metric.name.startswith("accuracy")


def fig2(data: str, runs: Runs, curves: Curves):
    """Validation against epochs."""
    metric = measure(data)
    return paired(data, curves, metric.name.removesuffix("_best"), worded(metric), "lower right" if metric.more else "upper right")


def loss(data: str, runs: Runs, curves: Curves):
    """Training loss against epochs, the other half of the paper's Table 1."""
    log = data in LOSS_TIERS  # it falls by orders of magnitude
    return paired(data, curves, "train_loss", "training loss", "lower left" if log else "upper right", log)


def paired(data: str, curves: Curves, name: str, words: str, corner: str, log: bool = False):
    """A column of curves.csv against epochs, each base with and without SlowMo, AllReduce beside it.

    The band is over the workers' own models, of runs with evaluate.band=true where there are some. These may have fewer seeds than the
    line: the band keeps its distance to their own line.
    """
    every = table1(data)[-1]
    pairs = [(base, f"slowmo_{base}") for base in table1(data) if f"slowmo_{base}" in table1(data)]
    pairs = [pair for pair in pairs if any(len(curves.of(f"{data}_{cell}")) for cell in pair)]
    if not pairs:
        return None
    figure, axes = plt.subplots(1, len(pairs), sharey=True, figsize=(2.6 * len(pairs) + 0.8, 3.2), squeeze=False)
    banded = set()  # numbers of seeds
    for axis, pair in zip(axes[0], pairs):
        for cell in (*pair, every):
            found = curves.of(f"{data}_{cell}")
            if found.empty:
                continue
            style = styled(cell, found["seeds"].max())
            axis.plot(found["epoch"], found[name], **style)
            if cell == every:
                continue
            judged = curves.of(f"{data}_{cell},evaluate.band=true")
            judged = judged if len(judged) else found
            if f"{name}_worker_min" not in judged or judged[f"{name}_worker_min"].isna().all():
                continue
            banded.add(int(judged["seeds"].max()))
            low, high = (judged[f"{name}_worker_{end}"] - judged[name] + found[name] for end in ("min", "max"))
            band = {"alpha": 0.25} if style["marker"] else {"alpha": 0.1, "hatch": "///"}
            axis.fill_between(found["epoch"], low, high, color=style["color"], linewidth=0, **band)
        axis.set(xlabel="epochs", title=LABELS[pair[0]])
        axis.legend(loc=corner)
    if log:
        axes[0][0].set_yscale("log")
    axes[0][0].set_ylabel(words)
    many = " or ".join(map(str, sorted(banded)))
    many += " seed" if many == "1" else " seeds"
    what = f"band: least and largest of the workers' own models just before the average, about the line, in {many}"
    return titled(figure, data, what if banded else "")


def forest(runs: Runs):
    """What SlowMo changes on each stand-in, with its interval, and hollow the paper's change on the data that it stands for."""
    asked = ([LOSS_LAST.name], "training loss with SlowMo over without", np.exp), ([LAST.name, BLEU_TEST.name], None, lambda value: value)
    made = [cells(table, runs) for data in SMALL for table in layout(data) if table.key == "table1"]
    made = [found[found["against"].astype(bool) & found["half"].notna()] for found in made]
    made = [found for found in made if len(found)]
    if not made:
        return None
    heights = [found["run"].nunique() for found in made]
    figure, axes = plt.subplots(len(made), 2, figsize=(7.2, 0.32 * sum(heights) + 0.9 * len(made) + 0.4), sharey="row", squeeze=False,
                                gridspec_kw={"height_ratios": heights})  # fmt: skip
    for found, line in zip(made, axes):
        data, rows = found["data"].iloc[0], list(dict.fromkeys(found["run"]))
        for axis, (metrics, words, shown) in zip(line, asked):
            for cell in found[found["metric"].isin(metrics)].itertuples():
                y, style = rows.index(cell.run), styled(cell.run.removeprefix(f"{data}_"))
                axis.plot(shown(np.array([cell.change - cell.half, cell.change + cell.half])), [y, y], color=style["color"])
                axis.plot(shown(cell.change), y, style["marker"], color=style["color"])
                axis.plot(shown(cell.paper_change), y, style["marker"], color=style["color"], markerfacecolor="white")
            axis.axvline(shown(0.0), color="black", linewidth=0.8)
            axis.set_xlabel(words or ("BLEU" if data in TEXT else "points of accuracy") + " gained")
        counts = [found[found["run"] == run]["n"].max() for run in rows]
        line[0].set_yticks(range(len(rows)), [styled(run.removeprefix(f"{data}_"), n)["label"] for run, n in zip(rows, counts)])
        line[0].set_ylim(len(rows) - 0.5, -0.5)
        line[0].set_title(TITLES[data], loc="left", fontsize=8)
    figure.suptitle("what SlowMo changes: full, here, with the 95% interval; hollow, in the paper, on its own data", fontsize=8)
    return figure


def teaser(runs: Runs, curves: Curves):
    """The README's: Local SGD (Local Adam) with and without SlowMo on the first stand-in that has several seeds of both."""
    for data, base in (("cifar10_small", "local_sgd"), ("wmt16_small", "local_adam")):
        metric = measure(data)
        name = metric.name.removesuffix("_best")
        lines = {cell: curves.lines[curves.lines["run"] == f"{data}_{cell}"] for cell in (f"slowmo_{base}", base)}
        counts = {cell: found["seed"].nunique() for cell, found in lines.items()}
        if min(counts.values()) > 1:  # else there is no interval
            break
    else:
        return None
    figure, axis = plt.subplots(figsize=(5.2, 2.9))
    for cell, found in lines.items():
        by, style = found.groupby("epoch")[name], styled(cell, counts[cell])
        mean, half = by.mean(), by.apply(interval)
        axis.plot(mean.index, mean, **style)
        axis.fill_between(mean.index, mean - half, mean + half, color=style["color"], alpha=0.25 if style["marker"] else 0.12, linewidth=0)
    axis.set(xlabel="epochs", ylabel=worded(metric))
    axis.legend(loc="lower right" if metric.more else "upper right")
    return titled(figure, data, "mean over n seeds; band: 95% interval of the mean")


def wallclock(data: str, runs: Runs, curves: Curves):
    """Validation against seconds, all cells."""
    metric, drawn = measure(data), set()
    figure, axis = plt.subplots()
    for cell in table1(data):
        found = curves.of(f"{data}_{cell}")
        if found.empty:
            continue
        seconds, how = clock(data, cell, found)
        drawn.add(how)
        style = styled(cell, found["seeds"].max())
        axis.plot(seconds, found[metric.name.removesuffix("_best")], **style)
        if cell.startswith("ar_") and how != MEASURED:  # what a user would have instead
            seconds = found.index.to_numpy() * cost_model.pace(data, cell, overlap=True)
            style |= {"linestyle": ":", "label": f"{LABELS[cell]}, sent during backward"}
            axis.plot(seconds, found[metric.name.removesuffix("_best")], **style)
    if not drawn:
        plt.close(figure)
        return None
    axis.set(xlabel=f"seconds, {' or '.join(sorted(drawn))}", ylabel=worded(metric))
    axis.set_xlim(left=0)
    axis.legend()
    model = f"modelled: {TITLES[cost_model.column(data)]}, on the paper's cluster, sent after backward (during it, all cost less)"
    return titled(figure, data, model if drawn != {MEASURED} else "")


def clock(data: str, cell: str, found: pd.DataFrame):
    """(seconds at each row, how they are known). A run in one process says nothing about a cluster: its seconds are modelled."""
    if data not in SMALL and (found["processes"] > 1).all():
        return found["seconds"], MEASURED
    return found.index.to_numpy() * cost_model.pace(data, cell), "modelled"


def swept(data: str, runs: Runs, key: str, sign: str, log: bool = False):
    """A sweep's last metric against its value; SGP alone and AllReduce as levels."""
    metric = NLL[True][0] if data in TEXT else LAST
    points = []
    for value, run in sweep(data, key):
        values = runs.values(run, metric.name)
        if len(values):
            points.append((value, values.mean(), interval(values), len(values)))
    if len(points) < 2:
        return None
    figure, axis = plt.subplots()
    x, y, half, n = zip(*points)
    several = f"{min(n)}" + f" to {max(n)}" * (max(n) > min(n))
    axis.errorbar(x, y, yerr=half, capsize=3, **styled("slowmo_sgp", several))
    for cell in ("sgp", table1(data)[-1]):
        level = runs.values(f"{data}_{cell}", metric.name)
        if len(level):
            style = styled(cell, len(level))
            axis.axhline(level.mean(), color=style["color"], linestyle="--", label=style["label"])
    if log:
        axis.set_xscale("log", base=2)
    axis.set_xticks(x, [f"{value:g}" for value in x])
    axis.minorticks_off()
    axis.set(xlabel=sign, ylabel=worded(metric))
    axis.legend()
    return titled(figure, data, "bars: 95% interval of the mean over seeds")


def tau(data, runs, curves):
    return swept(data, runs, "tau", "τ", log=True)


def alpha(data, runs, curves):
    return swept(data, runs, "alpha", "α")


def beta(data, runs, curves):
    return swept(data, runs, "beta", "β")


def clusters(out: Path, nodes=cost_model.NODES, rates=cost_model.RATES) -> None:
    """Which method costs least on other clusters, and by how many per cent of AllReduce's time, as modelled: `out`/runtime_<data>.

    A panel for each machine and width; above what is sent during backward, below after it, AllReduce's gradients too.
    """
    with plt.style.context(STYLE):
        for data in cost_model.TASKS:
            kinds = [(machine, width) for machine in cost_model.MACHINES for width in cost_model.WIDTHS]
            figure, axes = plt.subplots(2, len(kinds), sharex=True, sharey=True, figsize=(2.4 * len(kinds) + 0.4, 4.6), squeeze=False)
            for line, overlap in zip(axes, (True, False)):
                found = cost_model.elsewhere(data, nodes, rates, overlap)
                order = list(dict.fromkeys(found["cell"]))
                for axis, (machine, width) in zip(line, kinds):
                    own = found[(found["machine"] == machine) & (found["width"] == width)]
                    best = [[timing.least(own[(own["rate"] == rate) & (own["nodes"] == m)]) for m in nodes] for rate in rates]
                    colours = np.array([[to_rgb(f"C{order.index(cell)}") for cell, _ in row] for row in best])
                    axis.imshow(0.45 + 0.55 * colours, origin="lower", aspect="auto")  # light, so that numbers can be read
                    for y, row in enumerate(best):
                        for x, (cell, ratio) in enumerate(row):
                            axis.text(x, y, f"{SHORT[cell]}\n−{100 * (1 - ratio):.0f}%" if ratio < 1 else SHORT[cell], ha="center",
                                      va="center", fontsize=5)  # fmt: skip
                    axis.set_xticks(range(len(nodes)), nodes, fontsize=6)
                    axis.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
                    axis.set_title(f"{machine}, {width}, {'during' if overlap else 'after'} backward", fontsize=7)
                    axis.grid(False)
                line[0].set_ylabel("Gbit/s")
            for axis in axes[-1]:
                axis.set_xlabel("nodes")
            note = (
                "the method that costs least, and how much less than AllReduce; AR: none costs 1% less; "
                "L, S, O: SlowMo over Local SGD (Local Adam), SGP, OSGP"
            )
            save(titled(figure, data, note), out, f"runtime_{data}")


def scaling(lines: pd.DataFrame, out: Path) -> None:
    """Of `python -m benchmarks.scaling`: `out`/scaling."""
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(8, 2.8))
        lines = lines[lines["tau"].fillna(12) == 12]
        million, two = lines["d"] == 10**6, lines["m"] == 2
        panels = (("step", "m", million, "seconds of a step, d = 10⁶"), ("step", "d", two, "seconds of a step, m = 2"),
                  ("memory", "m", million, "bytes at the peak, d = 10⁶"))  # fmt: skip
        for axis, (what, along, rest, words) in zip(axes, panels):
            part = lines[(lines["what"] == what) & rest].sort_values(along)
            axis.loglog(part[along], part["value"], marker="o")
            last = part.iloc[-1]
            axis.loglog(part[along], last["value"] * part[along] / last[along], linestyle=":", color="black", label="proportional")
            axis.set(xlabel=along, ylabel=words)
            axis.legend()
        save(figure, out, "scaling")


def titled(figure, data: str, note: str):
    figure.suptitle(TITLES[data] + (f"\n{note}" if note else ""), fontsize=8)
    return figure


KINDS = {"fig2": fig2, "loss": loss, "wallclock": wallclock, "fig3": tau, "alpha": alpha, "beta": beta}
