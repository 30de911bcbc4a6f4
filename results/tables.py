"""runs.csv and paper.yaml -> the paper's tables with ours beside them: tables/tables.md, .tex and .csv, and the blocks of README and docs.

A table answers one question in at most six columns; tables.csv has all there is. A layout is data: which runs stand in which rows, which
columns of runs.csv are shown. A run is named as its folder is, so that its name gives the command. Numbers of the paper's data stand beside
the paper's; a stand-in's never do: there SlowMo's change is compared. A user's own runs stand beside the published ones.
"""

import dataclasses
import functools
import math
import sys
import textwrap

import numpy as np
import pandas as pd
import yaml
from scipy import stats

from results import inference
from results.store import PUBLISHED, RunId, Runs, Store, save

PAPER = PUBLISHED.folder / "paper.yaml"
CONFIGS = PUBLISHED.folder.parent / "configs"
# stand-in -> the data it stands for
SMALL = {"cifar10_small": "cifar10", "cifar10_small_loss": "cifar10", "imagenet_small": "imagenet", "wmt16_small": "wmt16"}
TEXT = ("wmt16", "wmt16_small")  # translations; the others are pictures
LOSS_TIERS = ("cifar10_small_loss",)  # data sets that are there for their training losses
TITLES = {
    "cifar10": "CIFAR-10, ResNet-18", "imagenet": "ImageNet, ResNet-50", "wmt16": "WMT16 En-De, transformer (big)",
    "cifar10_small": "photo patches, ResNet-8 (CIFAR-10 in small)",
    "cifar10_small_loss": "photo patches without augmentation, ResNet-8 (CIFAR-10 in small, for its training loss)",
    "imagenet_small": "writing systems, small ResNet (ImageNet in small)",
    "wmt16_small": "LibreOffice's texts, small transformer (WMT16 in small)",
}  # fmt: skip
CLUSTER = ("imagenet", "wmt16")  # a run takes a cluster, so tables have one seed; the others five, as the paper's CIFAR-10
LABELS = {
    "local_sgd": "Local SGD", "slowmo_local_sgd": "Local SGD + SlowMo", "osgp": "OSGP", "slowmo_osgp": "OSGP + SlowMo", "sgp": "SGP",
    "slowmo_sgp": "SGP + SlowMo", "ar_sgd": "AR-SGD", "local_adam": "Local Adam", "slowmo_local_adam": "Local Adam + SlowMo",
    "ar_adam": "AR-Adam", "sgp_noaverage": "SGP + SlowMo, noaverage", "double_averaging_sgp": "double-averaging over SGP",
    "double_averaging_local_sgd": "double-averaging over Local SGD",
}  # fmt: skip
VISION = ("local_sgd", "slowmo_local_sgd", "osgp", "slowmo_osgp", "sgp", "slowmo_sgp", "ar_sgd")
TRANSLATION = ("local_adam", "slowmo_local_adam", "sgp", "slowmo_sgp", "ar_adam")
SWEEPS = {
    "tau": (12, 24, 48, 96),
    "alpha": (0.5, 0.75, 1.0, 1.5),
    "beta": (0.2, 0.4, 0.6, 0.8),
    "buffers": ("reset", "maintain", "average"),
}
SIBLINGS = {"diloco": "DiLoCo", "streaming": "Streaming DiLoCo"}  # with their papers' outer rate and momentum
SIGNS = {"tau": "τ", "alpha": "α", "beta": "β", "buffers": "buffers"}
MEASURED = "mean ± standard deviation over seeds (their number)"
RULES = {  # of the paper's data, of a stand-in
    False: f"{MEASURED}, best over training as the paper reports, BLEU after the last step. *agrees*: the paper's number lies within the "
    "95% prediction interval for a mean of as many seeds as the paper had; else *above* or *below*; one seed allows no interval.",
    True: f"{MEASURED}. change: SlowMo less its base, in a sweep less its reference, ± half the 95% confidence interval; a training loss "
    "over its base's, with the interval. *paper*: its change of best values, on its own data.",
}


WHOLE = ("table1", "best", "nll", "table2")  # tables that are about Table 1's cells; in the others these are there for comparison


@dataclasses.dataclass(frozen=True)
class Metric:
    """A column: its name in runs.csv, its title, digits shown, and whether more is better."""

    name: str
    title: str
    digits: int
    more: bool = True


LOSS, ACCURACY = Metric("train_loss_best", "training loss, best", 3, False), Metric("accuracy_best", "accuracy, best", 2)
LOSS_LAST = Metric("train_loss_last", "training loss, last", 3, False)
LAST = Metric("accuracy_last", "accuracy, last", 2)
BLEU, BLEU_TEST = Metric("bleu_valid", "BLEU, validation", 2), Metric("bleu_test", "BLEU, test", 2)
NLL = {
    False: (Metric("nll_last", "NLL, last", 3, False), Metric("nll_best", "NLL, best", 3, False)),
    True: (Metric("nll_base2_last", "NLL in base 2, last", 3, False), Metric("nll_base2_best", "NLL in base 2, best", 3, False)),
}
TIME = Metric("milliseconds", "ms per iteration", 0, False)


@dataclasses.dataclass(frozen=True)
class Table:
    """rows: (label, run, the run it is compared with or None)."""

    key: str
    data: str
    title: str
    rows: tuple
    metrics: tuple
    seeds: int


@functools.cache
def layout(data: str) -> tuple[Table, ...]:
    """Every table of one data set: its own outcome first, of the last step; of the paper's data what the paper reports."""
    text, small, cells = data in TEXT, data in SMALL, table1(data)
    names = tuple(cell for cell in LABELS if (CONFIGS / f"experiment/{data}_{cell}.yaml").exists())
    reference = {f"slowmo_{cell}": cell for cell in cells} | {"sgp_noaverage": "slowmo_sgp"}
    reference |= {name: name.replace("double_averaging", "slowmo") for name in names if name.startswith("double")}
    every, local = cells[-1], "local_adam" if text else "local_sgd"

    def row(cell):
        against = reference.get(cell)
        return LABELS[cell], f"{data}_{cell}", against and f"{data}_{against}"

    best, last = (BLEU if text else ACCURACY, LOSS), (BLEU_TEST if text else LAST, LOSS_LAST)
    shown = (last if data not in LOSS_TIERS else last[::-1]) if small else best
    seeds = 1 if data in CLUSTER else 5
    one = tuple(row(cell) for cell in cells)
    made = [Table("table1", data, "Table 1", one, shown, seeds)]
    # BLEU is of the last model
    made += [Table("best", data, "Table 1, best over training", one, (NLL[True][1], LOSS) if text else best, seeds)] if small else []
    made += [Table("nll", data, "Validation NLL", one, NLL[text], seeds)]
    made += [Table("table2", data, "Table 2", tuple(row(c) for c in LABELS if c in names), (TIME,), seeds)] if not small else []

    def some(key, title, rows, metrics=shown):
        """With AllReduce for comparison."""
        rows = [*rows, *([row(every)] if all(run != f"{data}_{every}" for _, run, _ in rows) else [])]
        made.append(Table(key, data, title, tuple(rows), metrics, seeds))

    likelihood = (NLL[True][0 if small else 1], shown[-1])  # what the paper has for translation
    some("noaverage", "Without exact averages", [row(c) for c in ("sgp", "slowmo_sgp", "sgp_noaverage") if c in names],
         likelihood if text else shown)  # fmt: skip
    double = [base for base in ("sgp", "local_sgd") if f"double_averaging_{base}" in names]
    if double:
        some("double", "Double-averaging", [row(c) for base in double for c in (base, f"slowmo_{base}", f"double_averaging_{base}")])
    slow, other = f"{data}_slowmo_sgp", f"{data}_slowmo_{local}"
    for key in SWEEPS:
        first = f"{data}_sgp" if key == "tau" else slow
        rows = [(f"SGP + SlowMo, {SIGNS[key]} = {value}", run, first) for value, run in sweep(data, key)]
        rows = [(label, run, None if run == first else against) for label, run, against in rows]
        if key == "tau":
            start, far = default(other, "tau"), 48
            rows = [(LABELS["sgp"], first, None), *rows, (f"{LABELS[f'slowmo_{local}']}, τ = {start}", other, None),
                    (f"{LABELS[f'slowmo_{local}']}, τ = {far}", run_name(other, tau=far), other)]  # fmt: skip
        if key == "buffers" and data in LOSS_TIERS:
            rows = [(f"{LABELS[cell]}, τ = {tau}, {kind}", run_name(f"{data}_{cell}", buffers=kind, tau=tau),
                     None if kind == "reset" else run_name(f"{data}_{cell}", tau=tau))
                    for cell in ("slowmo_sgp", f"slowmo_{local}") for tau in (12, 48) for kind in SWEEPS["buffers"]]  # fmt: skip
        some(key, f"{SIGNS[key]} varied", rows)
    rows = []
    for words, alone in (("", ""), (", m = 1", ",workers=1"))[: 1 + small]:  # later work has gains at m = 1
        plain, slowed = f"{data}_{every}{alone}", over_allreduce(data) + alone
        rows += [(f"{LABELS[every]}{words}", plain, None), (f"{LABELS[every]} + SlowMo, β = 0.4{words}", slowed, plain)]
    some("allreduce", "SlowMo over AllReduce", rows)
    if small and not text:
        plain = f"{data}_local_sgd"
        others = [(f"Local SGD: {title}", f"{plain},outer={name}", plain) for name, title in SIBLINGS.items()]
        some("siblings", "SlowMo's siblings over Local SGD", [row("local_sgd"), row("slowmo_local_sgd"), *others])
    if data in LOSS_TIERS:
        rows = [(label, run, None if run == slow else slow) for label, run in joint(slow)]
        some("joint", "α and β, each with three learning rates", rows)
    return tuple(made)


def table1(data: str) -> tuple[str, ...]:
    """The cells of a data set's column of Table 1."""
    return TRANSLATION if data in TEXT else VISION


def sweep(data: str, key: str) -> list[tuple]:
    """(value, run) of SGP with SlowMo as its `outer.<key>` varies, in order."""
    slow = f"{data}_slowmo_sgp"
    more = (192,) if data in TEXT and key == "tau" else ()  # the paper's longest for translation
    values = sorted({*SWEEPS[key], *more, default(slow, key)}, key=str if key == "buffers" else float)
    return [(value, run_name(slow, **{key: value})) for value in values]


def over_allreduce(data: str) -> str:
    """The run of SlowMo over AllReduce; Adam's buffers stay, as in all its cells."""
    every = table1(data)[-1]
    return f"{data}_{every},outer=slowmo,outer.beta=0.4" + ",outer.buffers=maintain" * (data in TEXT)


def joint(slow: str) -> list[tuple[str, str]]:
    """(label, run) of α, and of β, around their defaults, at the tuned learning rate and a factor of √3 to both sides."""
    tuned, rows = experiment(slow)["optimizer"]["lr"], {}
    for rate in (float(f"{tuned / 3**0.5:.2g}"), tuned, float(f"{tuned * 3**0.5:.2g}")):
        faster = () if rate == tuned else (f"optimizer.lr={rate:g}",)
        for own in ({}, {"alpha": 0.5}, {"alpha": 1.5}, {"beta": 0.4}, {"beta": 0.8}):
            name, words = RunId.parse(run_name(slow, **own))
            alpha, beta = (own.get(key, default(slow, key)) for key in ("alpha", "beta"))
            rows[str(RunId(name, (*faster, *words)))] = f"γ = {rate:g}, α = {alpha:g}, β = {beta:g}"
    return [(label, run) for run, label in rows.items()]


@functools.cache
def experiment(name: str) -> dict:
    """An experiment's file."""
    return yaml.safe_load((CONFIGS / f"experiment/{name}.yaml").read_text())


@functools.cache
def default(name: str, key: str):
    """`outer.<key>` of an experiment's file, or the config group's own."""
    return experiment(name).get("outer", {}).get(key, yaml.safe_load((CONFIGS / "outer/slowmo.yaml").read_text())[key])


def run_name(experiment: str, **outer) -> str:
    """The name of an experiment's run with other values of `outer.<key>`, as its folder has it."""
    words = (f"outer.{key}={value}".removesuffix(".0") for key, value in sorted(outer.items()) if value != default(experiment, key))
    return str(RunId(experiment, tuple(words)))


def command(run: str, seeds) -> str:
    """What fills a cell."""
    experiment, overrides = RunId.parse(run)
    seeds = list(seeds)
    return " ".join(["python run.py", *(["-m"] if len(seeds) > 1 else []), f"experiment={experiment}", *overrides,
                     f"seed={','.join(map(str, seeds))}"])  # fmt: skip


def interval(values: pd.Series, level: float = 0.95) -> float:
    """Half the confidence interval of the mean, by Student's t; NaN for fewer than two."""
    return inference.paired([(1, values)]).half(level) if len(values) > 1 else math.nan


def estimate(terms: list[tuple[int, pd.Series]], metric: str, cells: list[pd.Series]) -> inference.Estimate:
    """A sum of cells with their signs, by seed, as results/protocol.md compares them: training losses paired, by logarithms; accuracies and
    BLEU with the deviation pooled over all `cells`; anything else paired."""
    if metric.startswith("train_loss"):
        return inference.paired([(sign, np.log(cell)) for sign, cell in terms])
    if metric.startswith(("accuracy", "bleu")) and any(len(cell) > 1 for cell in cells):
        return inference.pooled(terms, cells)
    return inference.paired(terms)


def format_estimate(e: inference.Estimate, metric: str, level: float = 0.95) -> str:
    """With its confidence interval; of training losses as a ratio."""
    half = e.half(level)  # NaN where there is no spread to tell
    if metric.startswith("train_loss"):
        ratio, low, high = (math.exp(value) for value in (e.mean, e.mean - half, e.mean + half))
        return f"× {ratio:.3g}" + ("" if math.isnan(half) else f" ({low:.3g} to {high:.3g})")
    return (f"{e.mean:+.3g}" + ("" if math.isnan(half) else f" ± {half:.2g}")).replace("-", "−")


@functools.cache
def paper() -> tuple[pd.DataFrame, dict]:
    """The published numbers, and the seeds behind them."""
    loaded = yaml.safe_load(PAPER.read_text())
    return pd.DataFrame(loaded["numbers"]), loaded["seeds"]


def published(run: str, metric: str) -> float | None:
    numbers = paper()[0]
    found = numbers[(numbers["experiment"] == run) & (numbers["metric"] == metric)]["value"]
    return float(found.iloc[0]) if len(found) else None


def missing_experiments() -> list[str]:
    """Published numbers for which no experiment exists: their cells cannot be filled."""
    said = []
    for entry in paper()[0].to_dict("records"):
        name = entry.get("experiment")
        if not isinstance(name, str) or not (CONFIGS / f"experiment/{name}.yaml").exists():
            said.append(f"paper.yaml: table {entry['table']}, {entry['row']}, {entry['column']}: no experiment {name}: left out")
    return said


def cells(table: Table, runs: Runs, published_runs: Runs | None = None) -> pd.DataFrame:
    """A line for each cell: what it shows, as numbers. published_runs: of this suite, to stand beside a user's own."""
    lines = []
    for metric in table.metrics:
        column = {run: runs.values(run, metric.name) for _, run, _ in table.rows}
        for label, run, against in table.rows:
            status, values = runs.of(run)["status"], column[run]
            if len(status) and (status == "done").any() and runs.values(run, metric.name).empty:
                runs.complaints.append(f"{run} has no {metric.name}: its cell stays empty")
            theirs = published(run, metric.name) if table.data not in SMALL else None
            line = {"table": table.key, "data": table.data, "row": label, "run": run, "metric": metric.name, "mean": values.mean(),
                    "std": values.std(), "n": len(values), "diverged": int((status == "diverged").sum()), "paper": theirs,
                    "best_or_last": metric.name.rpartition("_")[2] if metric.name.endswith(("_best", "_last")) else "", "against": against,
                    "command": command(run, range(1, table.seeds + 1)), "address": runs.address(run)}  # fmt: skip
            if published_runs:
                ours = published_runs.values(run, metric.name)
                line |= {"ours_mean": ours.mean(), "ours_std": ours.std(), "ours_n": len(ours)}
            if theirs is not None and len(values):
                line["difference"] = values.mean() - theirs
                line["mark"] = agreement(values, theirs, paper()[1][table.data], metric)
            base = runs.values(against, metric.name) if against else values[:0]
            done = len(base) and len(values) and not line["diverged"] and (runs.of(against)["status"] == "done").all()
            found = estimate([(1, values), (-1, base)], metric.name, [*column.values()]) if done else None
            if found and not math.isnan(found.mean):  # paired cells may have no seed in common
                line |= {"change": found.mean, "half": found.half(), "shown": format_estimate(found, metric.name)}
            if against and table.data in SMALL:
                line["paper_change"] = papers_change(run, against, table.data, metric)
            lines.append(line)
    columns = ["table", "data", "row", "run", "metric", "best_or_last", "mean", "std", "n", "diverged", "paper", "difference", "mark",
               "against", "change", "half", "shown", "paper_change", "command", "address"]  # fmt: skip
    return pd.DataFrame(lines).reindex(columns=[*columns, *(["ours_mean", "ours_std", "ours_n"] if published_runs else [])])


def agreement(values: pd.Series, theirs: float, seeds: int, metric: Metric) -> str:
    """Whether the paper's mean of `seeds` runs may be a mean of such runs as ours."""
    n = len(values)
    if n < 2:
        return "one seed"
    reach = stats.t.ppf(0.975, n - 1) * values.std() * math.sqrt(1 / n + 1 / seeds) + 0.5 * 10**-metric.digits
    gap = values.mean() - theirs
    return "agrees" if abs(gap) <= reach else "above" if gap > 0 else "below"


def papers_change(run: str, against: str, data: str, metric: Metric) -> float | None:
    """On the data that a stand-in stands for; of best values, the paper has no others."""
    name = metric.name.replace("_last", "_best").replace("bleu_test", "bleu_valid")
    ours, base = (published(f"{SMALL[data]}{name_of.removeprefix(data)}", name) for name_of in (run, against))
    if ours is None or base is None:
        return None
    return math.log(ours / base) if name.startswith("train_loss") else ours - base


def format_cells(table: Table, found: pd.DataFrame) -> pd.DataFrame:
    """The table as text, a line a row, at most six columns. found: of `cells`."""
    out = pd.DataFrame({"": [label for label, *_ in table.rows]})
    yours = "ours_n" in found
    for metric in table.metrics:
        first = metric is table.metrics[0]
        part = found[found["metric"] == metric.name].to_dict("records")
        # three digits would leave one; but the paper has three
        more = table.data in LOSS_TIERS and metric.name.startswith("train_loss") and any(cell["mean"] < 0.01 for cell in part)
        number = lambda value, digits=metric.digits + more: "" if pd.isna(value) else f"{value:.{digits}f}".replace("-", "−")
        measured = lambda mean, std, n: number(mean) + (f" ± {number(std)}" if n > 1 else "") + f" ({n})" if n else "–"
        # a mean over the seeds that survived would flatter
        text = [f"diverged: {cell['diverged']} of {cell['n'] + cell['diverged']}" if cell["diverged"]
                else measured(cell["mean"], cell["std"], cell["n"]) for cell in part]  # fmt: skip
        out[f"{metric.title}: yours" if yours else metric.title] = text
        if yours:
            out[f"ours: {metric.title}"] = [measured(cell["ours_mean"], cell["ours_std"], cell["ours_n"]) for cell in part]
        if any(not pd.isna(cell["paper"]) for cell in part) and (first or not yours):
            out[f"paper: {metric.title}"] = [number(cell["paper"]) for cell in part]
            if first and not yours:
                out[f"mark: {metric.title}"] = [cell["mark"] if isinstance(cell["mark"], str) else "" for cell in part]
        elif any(cell["against"] for cell in part) and not yours:
            changes = []
            for cell in part:
                said = [cell["shown"]] if isinstance(cell["shown"], str) else []
                if not pd.isna(cell["paper_change"]):
                    said.append(f"paper {format_estimate(inference.Estimate(cell['paper_change'], math.nan, 1, 0), metric.name)}")
                changes.append("; ".join(said))
            out[f"change: {metric.title}"] = changes
    return out


def heading(title: str) -> str:
    """A column's title: what belongs to the column before needs no name of its own."""
    for short in ("ours", "paper", "mark", "change"):
        if title.startswith(f"{short}: "):
            return "" if short == "mark" else short
    return title


def markdown(table: Table, found: pd.DataFrame) -> str:
    """Without how its numbers are made, which the page says once."""
    text = format_cells(table, found)
    head = [heading(title) for title in text.columns]
    lines = [f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *map(list, text.itertuples(index=False))]]
    return "\n".join([*lines, "", *([under, ""] if (under := rule(table, found, ruled=False)) else [])])


def rule(table: Table, found: pd.DataFrame, ruled: bool = True) -> str:
    """What stands under a table: how its numbers are made, and what fills its empty cells."""
    yours = "ours_n" in found
    said = [f"{MEASURED}; ours: the runs published with this suite."] if yours else [RULES[table.data in SMALL]] * ruled
    if (found["n"] == 0).any():
        said.append(f"–: `python scripts/reproduce.py {table.key} --data {table.data}`.")
    return " ".join(said)


def answered(table: Table, found: pd.DataFrame) -> bool:
    """Whether a run stands in it that is not only there for comparison."""
    own = found[~found["run"].isin([f"{table.data}_{cell}" for cell in table1(table.data)])] if table.key not in WHOLE else found
    return bool(own["n"].any() or "ours_n" in own and own["ours_n"].any())


def latex(table: Table, found: pd.DataFrame) -> str:
    """booktabs, no wider than a column; every word of it is escaped."""
    text = format_cells(table, found)
    swap = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "±": r"$\pm$", "−": "$-$", "–": "--",
            "τ": r"$\tau$", "α": r"$\alpha$", "β": r"$\beta$", "×": r"$\times$", "`": "", "^": r"\^{}", "~": r"\~{}", "{": r"\{",
            "}": r"\}", "$": r"\$", "’": "'"}  # fmt: skip
    safe = lambda word: "".join(swap.get(letter, letter) for letter in word)
    # a long heading takes two lines
    stacked = lambda title: r"\shortstack[l]{" + r"\\".join(map(safe, textwrap.wrap(title, max(10, len(title) // 2 + 2)))) + "}"
    rows = [[stacked(heading(title)) for title in text.columns], *([safe(word) for word in row] for row in text.itertuples(index=False))]
    rows = [" & ".join(row) + r" \\" for row in rows]
    lines = [
        f"% {table.title}: {TITLES[table.data]}; needs booktabs and graphicx",
        r"{\footnotesize\setlength{\tabcolsep}{3pt}\noindent",
        r"\resizebox{\ifdim\width>\columnwidth\columnwidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{'l' * len(text.columns)}}}",
        r"\toprule",
        rows[0],
        r"\midrule",
        *rows[1:],
        r"\bottomrule",
        r"\end{tabular}}",
        "",
        rf"\noindent {safe(rule(table, found).replace('*', ''))}\par}}",
    ]
    return "\n".join(lines) + "\n"


def status(made: list[tuple[Table, pd.DataFrame]]) -> str:
    """One table of those that have no run at all, with the command that fills each data set's."""
    lines = ["| not run yet | tables | command |", "|---|---|---|"]
    for data in TITLES:
        empty = [table for table, found in made if table.data == data and not answered(table, found)]
        if empty:
            words = f"python scripts/reproduce.py {' '.join(table.key for table in empty)} --data {data}"
            lines.append(f"| {TITLES[data]} | {', '.join(table.title for table in empty)} | `{words}` |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def everything(runs: Runs, published_runs: Runs | None = None) -> list[tuple[Table, pd.DataFrame]]:
    """All tables, the paper's data first, each with its cells."""
    return [(table, cells(table, runs, published_runs)) for data in TITLES for table in layout(data)]


def beside(store: Store) -> Runs | None:
    """The published runs, where `store` is a user's own."""
    return Runs(PUBLISHED) if store.folder.resolve() != PUBLISHED.folder and PUBLISHED.has("runs") else None


def main(store: Store, published_runs: Runs | None = None) -> None:
    """Write tables/tables.md, .tex and .csv; say what is wrong with the runs."""
    runs, out = Runs(store), store.folder / "tables"
    made = everything(runs, published_runs)
    text = ["# Tables", "", "Made by `python -m results tables` from runs.csv and paper.yaml.", ""]
    some = [(table, found) for table, found in made if answered(table, found)]
    for small in (False, True):
        part = [(table, found) for table, found in some if (table.data in SMALL) == small]
        text += [f"{'Stand-ins' if small else 'The paper’s data'}: {RULES[small]}", ""] * bool(part)
        for table, found in part:
            text += [f"## {table.title}: {TITLES[table.data]}", "", markdown(table, found)]
    save(out / "tables.md", "\n".join([*text, status(made)]))
    save(out / "tables.tex", "\n".join(latex(table, found) for table, found in some))
    save(out / "tables.csv", pd.concat([found for _, found in made]).to_csv(index=False, float_format="%.6g"))
    filled = sum(int((found["n"] > 0).sum()) for _, found in made)
    print(f"wrote {out}/tables.md, .tex, .csv: {len(some)} tables, {filled} of {sum(len(found) for _, found in made)} cells filled")
    for text in dict.fromkeys((*runs.complaints, *missing_experiments())):
        print(text, file=sys.stderr)
