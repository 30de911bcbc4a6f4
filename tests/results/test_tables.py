"""Tables: numbers recomputed by hand, both kinds of data apart, and what is missing or wrong said."""

import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from commands import command
from listed import lines, written
from scipy import stats

from results import blocks, store, tables, timing

ROOT = Path(__file__).parents[2]


def found(path, data, key):
    runs = store.Runs(path)
    table = next(table for table in tables.layout(data) if table.key == key)
    return table, tables.cells(table, runs), runs


def cell(cells, run, metric):
    (line,) = cells[(cells["run"] == run) & (cells["metric"] == metric)].to_dict("records")
    return line


def test_beside_the_paper(tmp_path):
    values = [93.8, 94.1, 94.0]
    path = written(tmp_path, lines("cifar10_sgp", values), lines("cifar10_osgp", [90.0, 90.1]), lines("cifar10_ar_sgd", [99.0]))
    table, cells, _ = found(path, "cifar10", "table1")
    sgp = cell(cells, "cifar10_sgp", "accuracy_best")
    assert (sgp["mean"], sgp["n"], sgp["paper"]) == (pytest.approx(93.9667, abs=1e-4), 3, 93.90)
    assert (
        sgp["std"] == pytest.approx(0.152753, abs=1e-6) and sgp["difference"] == pytest.approx(0.0667, abs=1e-4) and sgp["mark"] == "agrees"
    )
    assert cell(cells, "cifar10_osgp", "accuracy_best")["mark"] == "below"
    assert cell(cells, "cifar10_ar_sgd", "accuracy_best")["mark"] == "one seed"
    text = tables.markdown(table, cells)
    assert "| SGP | 93.97 ± 0.15 (3) | 93.90 | agrees |" in text
    assert "–: `python scripts/reproduce.py table1 --data cifar10`." in text  # an empty cell's remedy
    assert max(line.count("|") for line in text.splitlines()) == 7  # six columns


def test_the_prediction_interval_is_for_a_mean_of_the_paper_s_seeds():
    values = pd.Series([1.0, 2.0, 3.0])
    reach = stats.t.ppf(0.975, 2) * 1.0 * math.sqrt(1 / 3 + 1 / 5)
    metric = tables.Metric("x", "x", 9)
    assert (
        tables.agreement(values, 2 + 0.999 * reach, 5, metric) == "agrees"
        and tables.agreement(values, 2 + 1.001 * reach, 5, metric) == "below"
    )


def test_a_stand_in_shows_changes_as_the_protocol_compares_them(tmp_path):
    base = lines("cifar10_small_sgp", [60.0, 50.0, 70.0], "accuracy_last", train_loss_last=[1.0, 2.0, 4.0])
    slow = lines("cifar10_small_slowmo_sgp", [61.0, 51.2, 70.8], "accuracy_last", train_loss_last=[0.5, 1.1, 2.0])
    table, cells, _ = found(written(tmp_path, base, slow), "cifar10_small", "table1")
    line = cell(cells, "cifar10_small_slowmo_sgp", "accuracy_last")  # not paired, the deviation pooled
    pooled = math.sqrt((np.var([60.0, 50.0, 70.0], ddof=1) + np.var([61.0, 51.2, 70.8], ddof=1)) / 2)
    assert line["change"] == pytest.approx(1.0) and line["half"] == pytest.approx(stats.t.ppf(0.975, 4) * pooled * math.sqrt(2 / 3))
    assert pd.isna(line["paper"]) and line["paper_change"] == pytest.approx(94.32 - 93.90)
    loss = cell(cells, "cifar10_small_slowmo_sgp", "train_loss_last")  # paired, as a ratio
    ratios = np.log([0.5, 0.55, 0.5])
    assert loss["change"] == pytest.approx(ratios.mean()) and loss["shown"].startswith(f"× {math.exp(ratios.mean()):.3g} (")
    text = tables.markdown(table, cells)
    assert "| +1 ± " in text and "; paper +0.42 |" in text and "93.90" not in text  # the paper's numbers are of other data
    assert max(line.count("|") for line in text.splitlines()) == 6


def test_cells_without_a_seed_in_common_have_no_change(tmp_path):
    base, slow = (lines(f"cifar10_small_{cell}", [60.0, 50.0], "accuracy_last", train_loss_last=1.0) for cell in ("sgp", "slowmo_sgp"))
    _, cells, _ = found(written(tmp_path, base, slow.assign(seed=[3, 4])), "cifar10_small", "table1")
    assert pd.isna(cell(cells, "cifar10_small_slowmo_sgp", "train_loss_last")["change"])  # paired
    assert cell(cells, "cifar10_small_slowmo_sgp", "accuracy_last")["change"] == 0.0


def test_seeds_for_tuning_count_nowhere(tmp_path):
    path = written(tmp_path, lines("cifar10_small_sgp", [60.0, 61.0], "accuracy_last"),
                   lines("cifar10_small_sgp", [99.0], "accuracy_last").assign(seed=0))  # fmt: skip
    assert cell(found(path, "cifar10_small", "table1")[1], "cifar10_small_sgp", "accuracy_last")["mean"] == 60.5


def test_a_run_with_other_values_has_its_folder_s_name():
    assert tables.run_name("cifar10_small_loss_slowmo_sgp", tau=48, buffers="maintain").endswith(",outer.buffers=maintain,outer.tau=48")
    assert tables.run_name("cifar10_small_loss_slowmo_sgp", tau=12, buffers="reset") == "cifar10_small_loss_slowmo_sgp"


def test_what_has_no_run_is_one_line(tmp_path):
    tables.main(written(tmp_path, lines("cifar10_small_sgp", [60.0], "accuracy_last")))
    text = (tmp_path / "tables/tables.md").read_text()
    assert "`python scripts/reproduce.py table1 nll table2 noaverage tau alpha beta buffers allreduce --data cifar10`" in text
    # SGP stands in many tables for comparison; that alone shows none of them
    assert re.findall(r"^## (.*): photo patches, ResNet-8 \(", text, re.M) == ["Table 1"]


def test_a_diverged_seed_leaves_the_cell_without_a_mean(tmp_path):
    path = written(tmp_path, lines("cifar10_small_sgp", [60.0, 61.0]), lines("cifar10_small_sgp", [1.0], status="diverged").assign(seed=3))
    table, cells, _ = found(path, "cifar10_small", "table1")
    assert "diverged: 1 of 3" in tables.markdown(table, cells) and "60.5" not in tables.markdown(table, cells)


def test_runs_that_are_not_finished_count_nowhere(tmp_path):
    path = written(tmp_path, lines("cifar10_small_sgp", [60.0, 61.0]), lines("cifar10_small_sgp", [99.0], status="stopped").assign(seed=3))
    assert cell(found(path, "cifar10_small", "table1")[1], "cifar10_small_sgp", "accuracy_last")["n"] == 2


def test_two_runs_of_one_seed_count_nowhere_and_are_named(tmp_path):
    path = written(tmp_path, lines("cifar10_small_sgp", [60.0, 61.0]), lines("cifar10_small_sgp", [70.0], commit="fedcba9876543210"))
    _, cells, runs = found(path, "cifar10_small", "table1")
    assert cell(cells, "cifar10_small_sgp", "accuracy_last")["mean"] == 61.0
    assert (
        runs.complaints[0]
        == "cifar10_small_sgp seed 1 stands there 2 times, commits 0123456789, fedcba9876: counted nowhere; delete all but one"
    )


def test_a_line_twice_counts_once(tmp_path):
    path = written(tmp_path, lines("cifar10_small_sgp", [60.0, 61.0]), lines("cifar10_small_sgp", [60.0]))
    _, cells, runs = found(path, "cifar10_small", "table1")
    assert cell(cells, "cifar10_small_sgp", "accuracy_last")["n"] == 2 and "1 lines stand there twice" in runs.complaints[0]


def test_a_missing_metric_is_said(tmp_path):
    _, cells, runs = found(written(tmp_path, lines("cifar10_small_sgp", [0.5], "train_loss_last")), "cifar10_small", "table1")
    assert cell(cells, "cifar10_small_sgp", "train_loss_last")["n"] == 1 and cell(cells, "cifar10_small_sgp", "accuracy_last")["n"] == 0
    assert "cifar10_small_sgp has no accuracy_last: its cell stays empty" in runs.complaints


def test_a_published_cell_without_an_experiment_is_said(monkeypatch):
    assert not tables.missing_experiments()
    numbers, seeds = tables.paper()
    broken = numbers.astype({"experiment": object}).copy()
    broken.loc[0, "experiment"] = None
    broken.loc[1, "experiment"] = "cifar10_none"
    monkeypatch.setattr(tables, "paper", lambda: (broken, seeds))
    said = tables.missing_experiments()
    assert len(said) == 2 and "table 1, Local SGD, CIFAR-10: no experiment None: left out" in said[0] and "cifar10_none" in said[1]


def test_no_list_or_another_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="results collect"):
        store.Runs(store.Store(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns than a list of runs"):
        store.Runs(store.Store(tmp_path))


def test_the_published_numbers_are_whole():
    numbers, _ = tables.paper()
    counts = numbers.groupby("table").size()
    assert (counts["1"], counts["2"], counts["noaverage"], counts["double-averaging"]) == (38, 16, 3, 2)
    assert set(numbers["flag"]) == {"V", "V2"} and not numbers.duplicated(["table", "experiment", "metric"]).any()
    targets = {
        path.stem: yaml.safe_load(path.read_text())["target"].get("paper", "") for path in (ROOT / "configs/experiment").glob("*.yaml")
    }
    for entry in numbers[numbers["table"] == "1"].to_dict("records"):  # what an experiment's file promises is the same number
        said = [float(word) for word in re.findall(r"\d+\.\d+|\d+", targets[entry["experiment"]])]
        assert entry["value"] in said, entry


def test_layouts_name_runs_as_their_folders_are():
    for data in tables.TITLES:
        layout = {table.key: table for table in tables.layout(data)}
        assert {"table1", "nll", "tau", "alpha", "beta", "buffers", "allreduce", "noaverage"} <= layout.keys()
        # seconds of a stand-in in one process would measure this machine's load
        assert ("table2" in layout) == (data not in tables.SMALL)
        every = {run for table in layout.values() for _, run, _ in table.rows if re.search("_ar_(sgd|adam)$", run)}
        assert all(every & {run for _, run, _ in table.rows} for table in layout.values())
        for table in layout.values():
            runs = [run for _, run, _ in table.rows]
            assert len(set(runs)) == len(runs) and all((ROOT / f"configs/experiment/{run.split(',')[0]}.yaml").exists() for run in runs)
    rows = {run: label for label, run, _ in next(t for t in tables.layout("imagenet") if t.key == "tau").rows}
    assert rows["imagenet_slowmo_sgp"] == "SGP + SlowMo, τ = 48" and rows["imagenet_slowmo_sgp,outer.tau=12"] == "SGP + SlowMo, τ = 12"


@pytest.mark.parametrize("data, run", [
    ("cifar10_small", "cifar10_small_slowmo_sgp,outer.buffers=maintain"), ("imagenet", "imagenet_ar_sgd,outer=slowmo,outer.beta=0.4"),
    ("cifar10_small_loss", "cifar10_small_loss_slowmo_sgp,optimizer.lr=0.3,outer.alpha=0.5"),
    ("cifar10_small", "cifar10_small_local_sgd,outer=streaming")])  # fmt: skip
def test_the_commands_lead_to_folders_of_these_names(data, run, tmp_path):
    assert any(run == row[1] for table in tables.layout(data) for row in table.rows)
    words = tables.command(run, [2]).split()[2:]
    done = command(*words, "dry_run=true", cwd=tmp_path)
    assert f"runs/{run}/seed2" in done.out, done.text
    assert all(path.name.startswith("log-") for path in tmp_path.iterdir())  # a plan writes nothing and fetches nothing


def test_yours_stand_beside_ours_and_the_papers(tmp_path):
    ours = store.Runs(written(tmp_path / "ours", lines("cifar10_sgp", [93.0, 94.0]), lines("cifar10_osgp", [92.0])))
    yours = store.Runs(written(tmp_path / "mine", lines("cifar10_sgp", [91.0])))
    table = next(table for table in tables.layout("cifar10") if table.key == "table1")
    text = tables.markdown(table, tables.cells(table, yours, ours))
    head, _, *rows = [[word.strip() for word in line.split("|")[1:-1]] for line in text.split("\n") if line.startswith("|")]
    assert head == ["", "accuracy, best: yours", "ours", "paper", "training loss, best: yours", "ours"]
    cells, rule = {row[0]: row[1:] for row in rows}, text.split("\n")[-2]
    assert cells["SGP"][:3] == ["91.00 (1)", "93.50 ± 0.71 (2)", "93.90"] and cells["OSGP"][:2] == ["–", "92.00 (1)"]
    assert "ours: the runs published" in rule
    assert tables.latex(table, tables.cells(table, yours, ours)).count("yours") == 2  # two metrics


def test_latex_is_escaped_and_whole(tmp_path):
    path = written(tmp_path, lines("cifar10_small_sgp", [60.0, 61.0]), lines("cifar10_small_slowmo_sgp", [59.0, 62.0]))
    table, cells, _ = found(path, "cifar10_small", "table1")
    text = tables.latex(table, cells)
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == 1 + len(table.rows) and len({line.count("&") - 2 * line.count(r"\&") for line in body}) == 1
    assert r"$\pm$" in text and not re.search(r"(?<!\\)_", re.sub(r"%.*", "", text)) and "−" not in text


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX on this machine (Debian: apt install texlive-latex-recommended)")
def test_latex_takes_it(tmp_path):
    body = r"\documentclass[twocolumn]{article}\usepackage{booktabs,graphicx}\begin{document}\input{tables}\end{document}"
    (tmp_path / "page.tex").write_text(body)
    (tmp_path / "tables.tex").write_text((ROOT / "results/tables/tables.tex").read_text())
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "page.tex"], cwd=tmp_path, capture_output=True, text=True, errors="replace"
    )
    assert done.returncode == 0 and "\n!" not in done.stdout, done.stdout[-2000:]
    assert "Overfull" not in done.stdout  # each fits a column


def test_files_are_written_whole(tmp_path, capsys):
    path = written(tmp_path, lines("cifar10_small_sgp", [60.0, 61.0]))
    tables.main(path)
    assert {file.name for file in (tmp_path / "tables").iterdir()} == {"tables.md", "tables.tex", "tables.csv"}
    made = pd.read_csv(tmp_path / "tables/tables.csv")
    assert {"cifar10_small", "cifar10"} <= set(made["data"]) and "cells filled" in capsys.readouterr().out
    assert made["address"].dropna().str.contains("commit 0123456789").all()


def test_what_is_wrong_with_the_runs_is_said_and_the_rest_is_made(tmp_path, capsys):
    path = written(
        tmp_path,
        lines("cifar10_small_sgp", [60.0]),
        lines("cifar10_small_sgp", [70.0], commit="f" * 40),
        lines("cifar10_small_osgp", [50.0]),
    )
    tables.main(path)
    said = capsys.readouterr()
    assert "counted nowhere" in said.err and "50.00 (1)" in (tmp_path / "tables/tables.md").read_text()
    text = (tmp_path / "tables/tables.md").read_text()  # how numbers are made is said once, and the command at every gap
    assert text.count("mean ± standard deviation over seeds") == 1
    assert text.count("–: `python scripts/reproduce.py") == text.count("\n## ")


def test_what_is_committed_is_what_the_runs_give(tmp_path):
    shutil.copytree(ROOT / "results/data", tmp_path / "data")
    tables.main(store.Store(tmp_path))
    timing.main(store.Store(tmp_path))
    for made in sorted((tmp_path / "tables").iterdir()):
        assert made.read_text() == (ROOT / "results/tables" / made.name).read_text(), f"{made.name}: python -m results all --publish"
    assert {page.name for page in blocks.pages()} >= {"README.md", "results.md", "runtime.md", "benchmarks.md"}
    for page in blocks.pages():
        assert blocks.filled(page, store.Runs(store.PUBLISHED)) == page.read_text(), f"{page.name}: python -m results docs --publish"


def test_the_experiments_use_what_was_tuned():
    trials = store.PUBLISHED.find("trials")
    for line in trials[trials["chosen"].astype(bool)].itertuples():
        config = yaml.safe_load((ROOT / f"configs/experiment/{line.experiment}.yaml").read_text())
        assert config["optimizer"]["lr"] == line.lr and line.status == "done", line
        assert pd.isna(line.beta) or tables.default(line.experiment, "beta") == line.beta
