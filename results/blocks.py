"""What results give README.md and docs/: blocks from `<!-- KEY DATA: python -m results docs -->` to `<!-- end -->`, made anew."""

import os
from pathlib import Path

import pandas as pd

from results import claims, cost_model, tables, timing
from results.store import PUBLISHED, Runs
from results.tables import CONFIGS, LOSS_TIERS, SMALL, TITLES, cells, layout

ROOT = PUBLISHED.folder.parent
WORDS = {
    "fig2": "{title}: validation against epochs, each base with and without SlowMo",
    "loss": "{title}: training loss against epochs, each base with and without SlowMo",
    "forest": "What SlowMo changes on each stand-in, with its interval, beside the paper's change",
}
MARK = ": python -m results docs -->"


def pages() -> list[Path]:
    """The files that have blocks."""
    return [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if MARK in page.read_text()]


def filled(page: Path, runs: Runs) -> str:
    """The text of `page`, its blocks made of `runs`. ValueError for a block that there is not, or that has no end."""
    parts = page.read_text().split("<!-- ")
    out = parts[:1]
    for k, part in enumerate(parts[1:], 1):
        name, mark, _ = part.partition(MARK)
        if mark:
            if not parts[k + 1 : k + 2] or not parts[k + 1].startswith("end -->"):
                raise ValueError(f"{page}: the block {name} has no <!-- end -->")
            part = f"{name}{MARK}\n{_made(page, name, runs)}"
        out.append(part)
    return "<!-- ".join(out)


def _made(page: Path, name: str, runs: Runs) -> str:
    key, _, data = name.partition(" ")
    if name == "claims":
        return claims.markdown(claims.stored(runs))
    if name == "matrix":
        return claims.matrix(claims.stored(runs))
    if name == "benchmarks":
        return timing.benchmarks(PUBLISHED)
    if name == "scaling":
        return timing.exponents(PUBLISHED.read("scaling")) + "\n"
    if name == "gpu":
        return timing.gpu(PUBLISHED)
    if name == "status":
        return status(runs)
    if name == "forest" or key in ("fig2", "loss") and data in TITLES:
        picture = PUBLISHED.folder / f"figures/{'_'.join(name.split())}.png"
        words = WORDS[key].format(title=TITLES.get(data))
        return f"![{words}]({os.path.relpath(picture, page.parent)})\n" if picture.exists() else "No figure yet: it is drawn from runs.\n"
    if name == "runtime straggling":
        return timing.straggling_hosts(PUBLISHED.find("links"))
    if key == "pairs" and data in SMALL:
        return pairs(data, runs)
    if key == "trials" and data in SMALL:
        return trials(data, PUBLISHED.find("trials"))
    if key == "runtime" and data in TITLES:
        modelled = [timing.against_paper(data)] if data in cost_model.TASKS else []
        return "\n".join((*modelled, timing.on_links(data, PUBLISHED.find("links")), ""))
    chosen = [table for table in layout(data) if table.key == key] if data in TITLES else []
    if not chosen:
        raise ValueError(f"{page} asks for a table {name} that there is not")
    found = cells(chosen[0], runs)
    if not found["n"].any() and not found["diverged"].any():  # a table of dashes says less
        return f"Not run yet: `python scripts/reproduce.py {key} --data {data}`.\n"
    return tables.markdown(chosen[0], found)


def pairs(data: str, runs: Runs) -> str:
    """Table 1 in the paper's form, a line for each base: the change of the data's own outcome, the verdicts of all primary ones."""
    table = next(table for table in layout(data) if table.key == "table1")
    found, judged, own = cells(table, runs), claims.stored(runs), table.metrics[0]
    if not found["n"].any():
        return f"Not run yet: `python scripts/reproduce.py looks --data {data}`.\n"
    text = tables.format_cells(table, found).set_index("")
    titles = [metric.title for metric in sorted(table.metrics, key=lambda metric: metric.more)]  # the loss first
    head = ["", titles[0], "+ SlowMo", titles[1], "+ SlowMo", f"change of {own.title.partition(',')[0]}", "paper", "verdict"]
    rows = [head, ["---"] * len(head)]
    for base in (cell for cell in tables.table1(data) if not cell.startswith("slowmo_")):
        label, slow = tables.LABELS[base], tables.LABELS.get(f"slowmo_{base}")
        row = [label, *(text.loc[name, title] if name in text.index else "" for title in titles for name in (label, slow))]
        change, _, paper = text.loc[slow, f"change: {own.title}"].rpartition("paper ") if slow in text.index else ("", "", "")
        of = judged[(judged["data"] == data) & judged["claim"].str.startswith("SlowMo") & judged["claim"].str.endswith(f" of {label}")]
        kind = claims.PRIMARY if (of["kind"] == claims.PRIMARY).any() else claims.SECONDARY
        of = of[of["kind"] == kind]
        each = of["claim"].str.extract(r"the (.+) of", expand=False) + " " + of["verdict"]
        rows.append([*row, change.removesuffix("; "), paper, ", ".join(each if of["verdict"].nunique() > 1 else of["verdict"].unique())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def trials(data: str, lines: pd.DataFrame) -> str:
    """Tuning: for each base at its chosen rate what SlowMo's β gave, means over seeds; the chosen β in bold.

    An entry is the outcome that tuning goes by and, where that is not the training loss, the training loss over the base's.
    """
    done = lines.assign(value=lines["value"].where(lines["status"] == "done"))  # a mean with a diverged one is none
    means = done.groupby(["experiment", "lr", "beta"], dropna=False)[["value", "train_loss_last", "chosen"]].agg(
        lambda each: each.mean(skipna=False)
    )
    means = means.reset_index().set_index("experiment")
    at = {cell: means.loc[[name]] for cell in tables.table1(data) if (name := f"{data}_{cell}") in means.index}
    betas = sorted(set(pd.concat(at.values())["beta"].dropna())) if at else []
    if not betas:
        return f"Not run yet: `python scripts/tune.py {data}`.\n"
    rows = [["", "rate", "without", *(f"β = {beta:g}" for beta in betas)]]
    rows.append(["---"] * len(rows[0]))
    for base in (cell for cell in at if not cell.startswith("slowmo_") and at[cell]["chosen"].any()):
        own = at[base][at[base]["chosen"] > 0].iloc[0]
        slow = at.get(f"slowmo_{base}", means.iloc[:0])
        slow = slow[slow["lr"] == own["lr"]].set_index("beta")
        entries = [_trial(data, slow.loc[beta], own) if beta in slow.index else "" for beta in betas]
        rows.append([tables.LABELS[base], f"{own['lr']:g}", _trial(data, own), *entries])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _trial(data: str, found: pd.Series, base: pd.Series | None = None) -> str:
    if pd.isna(found["value"]):
        return "diverged"
    text = f"{found['value']:.{4 if data in LOSS_TIERS else 2}f}"
    if base is None:
        return text
    text = f"**{text}**" if found["chosen"] else text
    return text if data in LOSS_TIERS else f"{text}, × {found['train_loss_last'] / base['train_loss_last']:.2f}"


def status(runs: Runs) -> str:
    """A line for each of the paper's columns: what there is of it, and what was run."""
    judged = claims.stored(runs)
    judged = judged[judged["verdict"] != claims.NOT_RUN]
    experiments = [path.stem for path in (CONFIGS / "experiment").glob("*.yaml")]
    out = ["| the paper's column | configs | tested | run on its data | claims on the stand-in |", "| --- | --- | --- | --- | --- |"]
    for data in dict.fromkeys(SMALL.values()):
        stand_ins = [small for small, of in SMALL.items() if of == data]
        names = [name for name in experiments if name.startswith(f"{data}_") and not name.startswith(tuple(stand_ins))]
        ended = sum(len(runs.of(name)) for name in names)
        said = []
        for small in stand_ins:
            some = []
            for kind in (claims.PRIMARY, claims.SECONDARY):
                counts = judged[(judged["data"] == small) & (judged["kind"] == kind)]["verdict"].value_counts()
                if len(counts):
                    some.append(f"{kind} {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}")
            ran = any(len(runs.of(f"{small}_{cell}")) for cell in tables.table1(small))
            said.append(f"`{small}_*`: {'; '.join(some) or ('too few seeds' if ran else claims.NOT_RUN)}")
        line = (TITLES[data], f"{len(names)} `{data}_*`", "each, on small data", f"{ended} runs" if ended else "no", "; ".join(said))
        out.append(f"| {' | '.join(line)} |")
    return "\n".join(out) + "\n"
