"""runs.csv and paper.yaml -> the paper's tables with ours beside them: results/tables/tables.md, .tex and .csv, and the README's blocks.

A layout is data: which runs stand in which rows, which columns of runs.csv are shown. A run is named as its folder is, so that its name
gives the command. Numbers of the paper's data stand beside the paper's; a stand-in's never do: there SlowMo's change is compared.
A user's own runs stand beside the published ones: yours, ours, the paper's.
"""

import dataclasses
import functools
import math
import sys

import pandas as pd
import yaml
from scipy import stats

from results.store import PUBLISHED, Runs, Store, save

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
SEEDS = {"cifar10": 5, "cifar10_small": 5, "wmt16_small": 5}  # of Table 1's cells; else 3, and 1 where a run takes a cluster
LABELS = {
    "local_sgd": "Local SGD", "slowmo_local_sgd": "Local SGD + SlowMo", "osgp": "OSGP", "slowmo_osgp": "OSGP + SlowMo", "sgp": "SGP",
    "slowmo_sgp": "SGP + SlowMo", "ar_sgd": "AR-SGD", "local_adam": "Local Adam", "slowmo_local_adam": "Local Adam + SlowMo",
    "ar_adam": "AR-Adam", "sgp_noaverage": "SGP + SlowMo, noaverage", "double_averaging_sgp": "double-averaging over SGP",
    "double_averaging_local_sgd": "double-averaging over Local SGD",
}  # fmt: skip
VISION = ("local_sgd", "slowmo_local_sgd", "osgp", "slowmo_osgp", "sgp", "slowmo_sgp", "ar_sgd")
TRANSLATION = ("local_adam", "slowmo_local_adam", "sgp", "slowmo_sgp", "ar_adam")
SWEEPS = {"tau": (12, 24, 48, 96), "alpha": (0.5, 0.75, 1.0), "beta": (0.2, 0.4, 0.6, 0.8), "buffers": ("reset", "maintain", "average")}
SIGNS = {"tau": "τ", "alpha": "α", "beta": "β", "buffers": "buffers"}
WHEN = "best is over training, last of the last step."
RULES = {  # of the paper's data, of a stand-in
    False: "ours: mean ± standard deviation over seeds (their number). difference: ours less the paper's. mark: *agrees* where the paper's "
    "number lies within the 95% prediction interval for a mean of as many seeds as the paper had, else *above* or *below*; *one seed* "
    f"allows no interval. {WHEN}",
    True: "ours: mean ± standard deviation over seeds (their number). change: against SlowMo's base, in a sweep against its reference, "
    "paired by seed, ± half its 95% confidence interval. mark: *as the paper* or *against the paper* where that interval excludes zero, "
    f"else *open*. {WHEN}",
}
NOTES: dict[str, dict[str, str]] = {}  # by data and table: what a reader must know to read it


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
    False: (Metric("nll_best", "NLL, best", 3, False), Metric("nll_last", "NLL, last", 3, False)),
    True: (Metric("nll_base2_best", "NLL in base 2, best", 3, False), Metric("nll_base2_last", "NLL in base 2, last", 3, False)),
}
TIME = Metric("milliseconds", "ms an iteration", 0, False)


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
    """Every table of one data set."""
    text, cells = data in TEXT, table1(data)
    names = tuple(cell for cell in LABELS if (CONFIGS / f"experiment/{data}_{cell}.yaml").exists())
    reference = {f"slowmo_{cell}": cell for cell in cells} | {"sgp_noaverage": "slowmo_sgp"}
    reference |= {name: name.replace("double_averaging", "slowmo") for name in names if name.startswith("double")}

    def row(cell):
        against = reference.get(cell)
        return LABELS[cell], f"{data}_{cell}", against and f"{data}_{against}"

    metrics = (LOSS, BLEU, BLEU_TEST) if text else (LOSS, ACCURACY, LAST)
    more = metrics[1:2] + NLL[text][:1] + metrics[:1]
    seeds = SEEDS.get(data, 1)
    few = 1 if data in ("imagenet", "wmt16", "imagenet_small") else 3
    local = "local_adam" if text else "local_sgd"
    made = [
        Table("table1", data, "Table 1", tuple(row(cell) for cell in cells), metrics, seeds),
        Table("nll", data, "Validation NLL", tuple(row(cell) for cell in cells), NLL[text], seeds),
        Table("table2", data, "Table 2" + " (in one process, no network)" * (data in SMALL), tuple(row(c) for c in LABELS if c in names),
              (TIME,), few),
        Table("noaverage", data, "noaverage", tuple(row(c) for c in ("sgp", "slowmo_sgp", "sgp_noaverage") if c in names), more, few),
        Table("double", data, "double-averaging", tuple(row(c) for base in ("sgp", "local_sgd")
              for c in (base, f"slowmo_{base}", f"double_averaging_{base}") if f"double_averaging_{base}" in names), more, few),
    ]  # fmt: skip
    slow = f"{data}_slowmo_sgp"
    for key in SWEEPS:
        first = f"{data}_sgp" if key == "tau" else slow
        rows = [(f"SGP + SlowMo, {SIGNS[key]} = {value}", run, first) for value, run in sweep(data, key)]
        rows = [(label, run, None if run == first else against) for label, run, against in rows]
        if key == "tau":
            other = f"{data}_slowmo_{local}"
            start, far = default(other, "tau"), 48
            rows = [(LABELS["sgp"], first, None), *rows, (f"{LABELS[f'slowmo_{local}']}, τ = {start}", other, None),
                    (f"{LABELS[f'slowmo_{local}']}, τ = {far}", varied(other, "tau", far), other)]  # fmt: skip
        made.append(Table(key, data, f"{SIGNS[key]} varied", tuple(rows), more, few))
    allreduce = f"{data}_{cells[-1]}"
    rows = ((LABELS[cells[-1]], allreduce, None),
            (f"{LABELS[cells[-1]]} + SlowMo, β = 0.4", f"{allreduce},outer=slowmo,outer.beta=0.4", allreduce))  # fmt: skip
    made.append(Table("allreduce", data, "SlowMo over AllReduce", rows, more, few))
    if data == "cifar10_small":
        rows = [(f"{LABELS[cell]}{words}", f"{data}_{cell}{overrides}", f"{data}_{cell}" if overrides else None)
                for cell in ("sgp", "slowmo_sgp", "osgp", "slowmo_osgp")
                for words, overrides in (("", ""), (", messages in bfloat16", ",base.messages=bfloat16"))]  # fmt: skip
        made.append(Table("messages", data, "Messages in bfloat16", tuple(rows), more, few))
        # where AllReduce is best, which in the paper it is not
        settings = (("", ""), (", batch 32 a worker", ",data.train=12288,task.batch_size=1024"), (", 4800 iterations", ",steps=4800"))
        rows = [(f"{LABELS[cell]}{words}", f"{data}_{cell}{overrides}", against and f"{data}_{against}{overrides}")
                for words, overrides in settings for cell, against in (("ar_sgd", None), ("sgp", "ar_sgd"))]  # fmt: skip
        made.append(Table("distance", data, "How far SGP is from AR-SGD", tuple(rows), more, 1))
    return tuple(table for table in made if table.rows)


def table1(data: str) -> tuple[str, ...]:
    """The cells of a data set's column of Table 1."""
    return TRANSLATION if data in TEXT else VISION


def sweep(data: str, key: str) -> list[tuple]:
    """(value, run) of SGP with SlowMo as its `outer.<key>` varies, in order."""
    slow = f"{data}_slowmo_sgp"
    more = (192,) if data in TEXT and key == "tau" else ()  # the paper's longest for translation
    values = sorted({*SWEEPS[key], *more, default(slow, key)}, key=str if key == "buffers" else float)
    return [(value, varied(slow, key, value)) for value in values]


@functools.cache
def default(experiment: str, key: str):
    """`outer.<key>` of an experiment's file, or the config group's own."""
    own = yaml.safe_load((CONFIGS / f"experiment/{experiment}.yaml").read_text()).get("outer", {})
    return own.get(key, yaml.safe_load((CONFIGS / "outer/slowmo.yaml").read_text())[key])


def varied(experiment: str, key: str, value) -> str:
    """The name of an experiment's run with another `outer.<key>`."""
    return experiment if value == default(experiment, key) else f"{experiment},outer.{key}={value}".removesuffix(".0")


def command(run: str, seeds) -> str:
    """What fills a cell."""
    experiment, *overrides = run.split(",")
    seeds = list(seeds)
    return " ".join(["python run.py", *(["-m"] if len(seeds) > 1 else []), f"experiment={experiment}", *overrides,
                     f"seed={','.join(map(str, seeds))}"])  # fmt: skip


def interval(values: pd.Series, level: float = 0.95) -> float:
    """Half the confidence interval of the mean, by Student's t; NaN for fewer than two."""
    n = len(values)
    return float(stats.t.ppf(0.5 + level / 2, n - 1) * values.std() / math.sqrt(n)) if n > 1 else math.nan


def change(runs: Runs, run: str, against: str, metric: str) -> pd.Series:
    """Paired by seed; of milliseconds, in per cent."""
    ours, other = (runs.values(name, metric) for name in (run, against))
    ours, other = ours.align(other, join="inner")
    return 100 * (ours / other - 1) if metric == "milliseconds" else ours - other


@functools.cache
def paper() -> tuple[pd.DataFrame, dict]:
    """The published numbers, and the seeds behind them."""
    loaded = yaml.safe_load(PAPER.read_text())
    return pd.DataFrame(loaded["numbers"]), loaded["seeds"]


def published(run: str, metric: str) -> float | None:
    numbers = paper()[0]
    found = numbers[(numbers["experiment"] == run) & (numbers["metric"] == metric)]["value"]
    return float(found.iloc[0]) if len(found) else None


def unanswered() -> list[str]:
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
    for label, run, against in table.rows:
        status = runs.of(run)["status"]
        for metric in table.metrics:
            values = runs.values(run, metric.name)
            if len(status) and (status == "done").any() and values.empty:
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
            if against:
                changes = change(runs, run, against, metric.name)
                line |= {"change": changes.mean(), "half": interval(changes), "pairs": len(changes)}
                if table.data in SMALL:
                    line |= compared(line, table, metric)
            lines.append(line)
    columns = ["table", "data", "row", "run", "metric", "best_or_last", "mean", "std", "n", "diverged", "paper", "difference", "mark",
               "against", "change", "half", "pairs", "paper_change", "command", "address"]  # fmt: skip
    return pd.DataFrame(lines).reindex(columns=[*columns, *(["ours_mean", "ours_std", "ours_n"] if published_runs else [])])


def agreement(values: pd.Series, theirs: float, seeds: int, metric: Metric) -> str:
    """Whether the paper's mean of `seeds` runs may be a mean of such runs as ours."""
    n = len(values)
    if n < 2:
        return "one seed"
    reach = stats.t.ppf(0.975, n - 1) * values.std() * math.sqrt(1 / n + 1 / seeds) + 0.5 * 10**-metric.digits
    gap = values.mean() - theirs
    return "agrees" if abs(gap) <= reach else "above" if gap > 0 else "below"


def compared(line: dict, table: Table, metric: Metric) -> dict:
    """A stand-in's change beside the paper's on its own data."""
    swap = lambda run: f"{SMALL[table.data]}{run.removeprefix(table.data)}"
    ours, base = (published(swap(run), metric.name) for run in (line["run"], line["against"]))
    if ours is None or base is None:
        return {}
    theirs = 100 * (ours / base - 1) if metric is TIME else ours - base
    if not line["half"] < abs(line["change"]):  # NaN too
        return {"paper_change": theirs, "mark": "open" if line["pairs"] > 1 else "one seed" if line["pairs"] else None}
    return {"paper_change": theirs, "mark": "as the paper" if line["change"] * theirs > 0 else "against the paper"}


def shown(table: Table, found: pd.DataFrame) -> pd.DataFrame:
    """The table as text: a row a run, and for each metric what there is to show of it."""
    out = pd.DataFrame({"": [label for label, *_ in table.rows], "experiment": [run for _, run, _ in table.rows]})
    for metric in table.metrics:
        part = found[found["metric"] == metric.name].to_dict("records")
        unit = "%" if metric is TIME else ""
        number = lambda value, sign="", digits=metric.digits: "" if pd.isna(value) else f"{value:{sign}.{digits}f}".replace("-", "−")
        measured = lambda mean, std, n: number(mean) + (f" ± {number(std)}" if n > 1 else "") + f" ({n})"
        runs = []
        for cell in part:
            if cell["diverged"]:  # a mean over the seeds that survived would flatter
                runs.append(f"diverged: {cell['diverged']} of {cell['n'] + cell['diverged']}")
            elif not cell["n"]:
                runs.append(f"`{cell['command']}`" if metric is table.metrics[0] else "–")
            else:
                runs.append(measured(cell["mean"], cell["std"], cell["n"]))
        if "ours_n" in found:
            out[f"{metric.title}: yours"] = runs
            out[f"ours: {metric.title}"] = [
                measured(cell["ours_mean"], cell["ours_std"], cell["ours_n"]) if cell["ours_n"] else "–" for cell in part
            ]
        else:
            out[metric.title] = runs
        digits = 1 if metric is TIME else metric.digits
        if any(cell["paper"] is not None and not pd.isna(cell["paper"]) for cell in part):
            out[f"paper: {metric.title}"] = [number(cell["paper"]) for cell in part]
            out[f"difference: {metric.title}"] = [number(cell["difference"], "+") for cell in part]
            out[f"mark: {metric.title}"] = [cell["mark"] or "" if isinstance(cell["mark"], str) else "" for cell in part]
        elif any(cell["against"] for cell in part):
            out[f"change: {metric.title}"] = [
                "" if pd.isna(cell["change"]) else number(cell["change"], "+", digits) + unit
                + ("" if pd.isna(cell["half"]) else f" ± {number(cell['half'], '', digits)}") for cell in part
            ]  # fmt: skip
            if any(not pd.isna(cell["paper_change"]) for cell in part):
                out[f"the paper's change: {metric.title}"] = [
                    number(cell["paper_change"], "+", digits) + unit * (not pd.isna(cell["paper_change"])) for cell in part
                ]
                out[f"mark: {metric.title}"] = [cell["mark"] if isinstance(cell["mark"], str) else "" for cell in part]
    return out


def heading(title: str) -> str:
    """A column's title: what belongs to the column before needs no name of its own."""
    for short in ("ours", "paper", "difference", "mark", "change", "the paper's change"):
        if title.startswith(f"{short}: "):
            return short
    return title


def markdown(table: Table, found: pd.DataFrame) -> str:
    text = shown(table, found)
    head = [heading(title) for title in text.columns]
    body = [[row[0], f"`{row[1]}`", *row[2:]] for row in text.itertuples(index=False)]
    lines = [f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body]]
    return "\n".join([*lines, "", rule(table, "ours_n" in found), ""])


def rule(table: Table, yours: bool = False) -> str:
    """What stands under a table: how its marks are made, and what is to be known about the published runs."""
    if yours:
        return f"{RULES[table.data in SMALL].replace('ours', 'yours')} ours: the runs published with this suite, likewise."
    return f"{RULES[table.data in SMALL]} {NOTES.get(table.data, {}).get(table.key, '')}".rstrip()


def latex(table: Table, found: pd.DataFrame) -> str:
    """booktabs; every word of it is escaped."""
    text = shown(table, found).drop(columns="experiment")
    swap = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "±": r"$\pm$", "−": "$-$", "–": "--", "τ": r"$\tau$",
            "α": r"$\alpha$", "β": r"$\beta$", "`": "", "^": r"\^{}", "~": r"\~{}", "{": r"\{", "}": r"\}", "$": r"\$"}  # fmt: skip
    safe = lambda word: "".join(swap.get(letter, letter) for letter in word)
    rows = [[safe(heading(title)) for title in text.columns], *([safe(word) for word in row] for row in text.itertuples(index=False))]
    rows = [" & ".join(row) + r" \\" for row in rows]
    under = safe(rule(table, "ours_n" in found).replace("*", ""))
    lines = [
        f"% {table.title}: {TITLES[table.data]}; needs booktabs",
        rf"\begin{{tabular}}{{{'l' * len(text.columns)}}}",
        r"\toprule",
        rows[0],
        r"\midrule",
        *rows[1:],
        r"\bottomrule",
        r"\end{tabular}",
        "",
        rf"{{\footnotesize {under}}}",
    ]
    return "\n".join(lines) + "\n"


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
    for table, found in made:
        text += [f"## {table.title}: {TITLES[table.data]}", "", markdown(table, found)]
    save(out / "tables.md", "\n".join(text))
    save(out / "tables.tex", "\n".join(latex(table, found) for table, found in made))
    save(out / "tables.csv", pd.concat([found for _, found in made]).to_csv(index=False, float_format="%.6g"))
    filled = sum(int((found["n"] > 0).sum()) for _, found in made)
    print(f"wrote {out}/tables.md, .tex, .csv: {len(made)} tables, {filled} of {sum(len(found) for _, found in made)} cells filled")
    for text in dict.fromkeys((*runs.complaints, *unanswered())):
        print(text, file=sys.stderr)
