"""Tables, curves and verdicts for readers, in one page without any network: results/report.html.

Every number's title says which runs it is of.
"""

import html
import json
import re
from pathlib import Path

from results import claims, cost_model, figures, tables, timing
from results.store import Curves, Runs, Store, save
from results.tables import LABELS, SMALL, TITLES, format_cells, heading, missing_experiments, rule

HERE = Path(__file__).parent
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
MEASURES = {"accuracy": "accuracy (%)", "nll": "NLL (nats)", "nll_base2": "NLL (base 2)", "train_loss": "training loss"}


def main(store: Store, published_runs: Runs | None = None) -> None:
    """Write report.html: what was asked and found first, then curves, tables and seconds. published_runs: to stand beside a user's own."""
    runs, out = Runs(store), store.folder / "report.html"
    made, judged = tables.everything(runs, published_runs), claims.stored(runs)
    shown = [(table, found) for table, found in made if tables.answered(table, found)]
    parts = {"What was found": summary(runs, judged) + verdicts(judged), "Curves": plots(runs, Curves(runs))}
    for data in (*SMALL, *(data for data in TITLES if data not in SMALL)):
        if text := "".join(section(table, found) for table, found in shown if table.data == data):
            parts[TITLES[data]] = text
    parts["Not run yet"] = marked(tables.status(made))
    measured = store.find("links")
    parts["Seconds of an iteration"] = "".join(
        f"<h3>{html.escape(TITLES[data])}</h3>{marked(timing.against_paper(data))}{marked(timing.on_links(data, measured))}"
        for data in cost_model.TASKS
    )
    if complaints := dict.fromkeys((*runs.complaints, *missing_experiments())):
        parts["Left out"] = f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in complaints)}</ul>"
    contents = "".join(f'<li><a href="#part{k}">{html.escape(title)}</a></li>' for k, title in enumerate(parts))
    body = [f"<nav><ol>{contents}</ol></nav>"]
    body += [f'<h2 id="part{k}">{html.escape(title)}</h2>\n{text}' for k, (title, text) in enumerate(parts.items())]
    page = (HERE / "template.html").read_text()
    save(out, page.replace("<!-- BODY -->", "\n".join(body)))
    print(f"wrote {out}: {out.stat().st_size / 1000:.0f} kB")


def summary(runs: Runs, judged) -> str:
    """What was asked, what of, and how many claims found which verdict."""
    counts = ", ".join(
        f"{count} {verdict}" for verdict, count in judged[judged["verdict"] != claims.NOT_RUN]["verdict"].value_counts().items()
    )
    ended = runs.ended[runs.ended["seed"] > 0]
    data = ", ".join(f"{TITLES[name]} ({count} runs)" for name in TITLES
                     if (count := int(ended["run"].str.fullmatch(rf"{name}_(?!small|loss).*").sum())))  # fmt: skip
    commits = ", ".join(sorted({str(commit)[:10] for commit in ended["commit"]}))
    return (
        "<p>Asked: which of the claims of <i>SlowMo: Improving Communication-Efficient Distributed SGD with Slow Momentum</i> hold. "
        f"Of: {html.escape(data or 'nothing yet')}. Found: {html.escape(counts or 'nothing yet')}; every claim with its evidence is below. "
        f"Commits of these runs: {html.escape(commits or 'none')}.</p>"
    )


def section(table, found) -> str:
    """A table; the numbers of a cell carry their runs as a title, and all stand below for fingers and paper."""
    text = format_cells(table, found)
    head = "".join(f"<th>{html.escape(heading(title))}</th>" for title in text.columns)
    body, addresses = [], {}
    for row, (_, run, _) in zip(text.itertuples(index=False), table.rows):
        of_row = found[found["run"] == run].iloc[0]
        if of_row["address"]:
            addresses[of_row["row"]] = of_row["address"]
        title = html.escape(of_row["address"] or f"no run yet: {of_row['command']}", quote=True)
        numbers = "".join(f'<td title="{title}">{_text(value)}</td>' for value in row[1:])
        body.append(f"<tr><th>{html.escape(row[0])}</th>{numbers}</tr>")
    where = "".join(f"<li>{html.escape(name)}: {html.escape(address)}</li>" for name, address in addresses.items())
    where = f"<details><summary>where these numbers come from</summary><ul>{where}</ul></details>" if where else ""
    title, under = (
        f"<h3>{html.escape(table.title)}</h3>",
        f"<p class=rule>{html.escape(rule(table, found).replace('*', ''))}</p>",
    )
    return f"{title}<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{under}{where}"


def marked(text: str) -> str:
    """Tables and paragraphs of Markdown."""
    out = []
    for block in text.strip().split("\n\n"):
        lines = [line.split("|")[1:-1] for line in block.splitlines()] if block.startswith("|") else []
        rows = ["".join(f"<{tag}>{_text(word.strip())}</{tag}>" for word in line)
                for line, tag in zip(lines[:1] + lines[2:], ["th", *["td"] * len(lines)])]  # fmt: skip
        out.append(
            f"<div class=wide><table><tr>{'</tr><tr>'.join(rows)}</tr></table></div>" if rows else f"<p class=rule>{_text(block)}</p>"
        )
    return "".join(out)


def _text(text: str) -> str:
    """Markdown's words, of which `these` are code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def verdicts(judged) -> str:
    judged, undecided = claims.decided(judged)
    rows = "".join(
        f'<tr class="{line.verdict.split()[0]}"><td>{html.escape(line.claim)}</td><td><code>{line.data}</code></td><td>{line.verdict}</td>'
        f'<td title="{html.escape(str(line.runs), quote=True)}">{html.escape(str(line.evidence))}</td></tr>' for line in judged.itertuples()
    )  # fmt: skip
    rest = f"<p>{html.escape(undecided)}</p>" if undecided else ""
    return (
        f"<div class=wide><table><thead><tr><th>claim<th>data<th>verdict<th>evidence</tr></thead><tbody>{rows}</tbody></table></div>{rest}"
    )


def plots(runs: Runs, curves) -> str:
    """The curves as data; the page's own script draws them."""
    out = []
    for data in TITLES:
        lines = []
        for cell in tables.table1(data):
            found = curves.of(f"{data}_{cell}")
            if found.empty:
                continue
            style = figures.styled(cell)
            times, how = figures.clock(data, cell, found)
            series = {"epochs": found["epoch"].round(4).tolist(), how: [round(float(s), 2) for s in times]}
            for name in MEASURES:
                if name in found and found[name].notna().all():
                    series[name] = found[name].round(5).tolist()
                    if f"{name}_worker_min" in found and found[f"{name}_worker_min"].notna().all():
                        series[f"{name} band"] = found[[f"{name}_worker_min", f"{name}_worker_max"]].round(5).to_numpy().tolist()
            lines.append({"label": LABELS[cell], "color": COLORS[int(style["color"][1:])], "dash": style["linestyle"] == "--",
                          "from": runs.address(f"{data}_{cell}"), "series": series})  # fmt: skip
        if lines:
            out.append({"title": TITLES[data], "lines": lines})
    text = json.dumps({"plots": out, "measures": MEASURES}, allow_nan=False).replace("</", "<\\/")
    return f'<div id="plots"></div><script type="application/json" id="curves">{text}</script>'
