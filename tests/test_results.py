"""Collecting runs: what a folder says, what is left out and why, what stays of earlier collections."""

import fcntl
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from commands import command, finished

from results import collect

ROOT = Path(__file__).parent.parent
QUADRATIC = ("task=quadratic", "workers=2", "steps=12", "evaluate.every=5", "checkpoint_every=4", "base=sgp", "outer.tau=4")


@pytest.fixture
def runs(tmp_path):
    """A run that is done, one that diverged, one that was stopped."""
    finished(*QUADRATIC, cwd=tmp_path)
    assert command(*QUADRATIC, "optimizer.lr=1e30", cwd=tmp_path).code == 3
    finished(*QUADRATIC, "seed=2", cwd=tmp_path)
    (stopped,) = tmp_path.glob("runs/*/seed2")
    (stopped / "result.json").unlink()
    return tmp_path / "runs"


def table(runs, capsys=None):
    collect.main(runs, runs.parent / "runs.csv")
    return pd.read_csv(runs.parent / "runs.csv")


def test_a_line_a_run(runs, capsys):
    lines = table(runs)
    assert list(lines.columns) == collect.COLUMNS
    assert "3 runs (1 diverged, 1 done, 1 stopped)" in capsys.readouterr().out
    done, diverged, stopped = (lines[lines["status"] == status].iloc[0] for status in ("done", "diverged", "stopped"))
    result = json.loads(next(runs.glob(f"{done['run']}/seed1/result.json")).read_text())
    assert done["validation_loss_best"] == result["best"]["validation_loss"]["value"]
    assert done["validation_loss_last"] == result["last"]["validation_loss"] and done["commit"] == result["commit"]
    assert (done["workers"], done["processes"], done["step"], done["clock"]) == (2, 1, 12, "measured")
    assert done["seconds_per_iteration"] == result["seconds_per_iteration"] and pd.isna(done["accuracy_best"])
    assert "optimizer.lr=" in diverged["run"] and pd.isna(diverged["validation_loss_last"])  # never a 0
    assert stopped["seed"] == 2 and pd.isna(stopped["seconds_per_iteration"])  # not another seed's
    assert pd.isna(stopped["validation_loss_best"]) and stopped["validation_loss_last"] > 0


def test_a_run_at_work_is_running(runs):
    (folder,) = runs.glob("*/seed2")
    code = f"import fcntl; f = open({str(folder / '.lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    lines = table(runs)
    assert lines[lines["seed"] == 2]["status"].tolist() == ["running"]
    holder.communicate("\n")
    lines = table(runs)  # the same line, brought up to date
    assert lines[lines["seed"] == 2]["status"].tolist() == ["stopped"] and len(lines) == 3
    with open(folder / ".lock", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # asking took nothing


@pytest.mark.parametrize("name, change, words", [
    ("result.json", lambda text: text[: len(text) // 2], "result.json|Expecting|Unterminated|delimiter"),
    ("result.json", lambda text: text.replace('"seconds": ', '"seconds": NaN, "x": '), "NaN is no number"),
    ("result.json", lambda text: text.replace('"status": "done"', '"status": "perfect"'), "has the status perfect"),
    ("result.json", lambda text: text.replace('"step": 12,\n "last"', '"step": 13,\n "last"'), "not of one run"),
    ("metrics.jsonl", lambda text: text[:-30], "Expecting|Unterminated|delimiter"),
    ("config.yaml", lambda text: text.replace("seed: 1\n", "seed: 3\n"), "not of one run"),
    ("result.json", lambda text: text.replace('"processes"', '"procs"'), "its files know no 'processes': another version wrote them"),
])  # fmt: skip
def test_a_damaged_folder_is_named_and_left_out(name, change, words, runs, capsys):
    (folder,) = (path for path in runs.glob("*/seed1") if "lr=" not in path.parent.name)
    text = (folder / name).read_text()
    assert change(text) != text
    (folder / name).write_text(change(text))
    lines = table(runs)
    said = capsys.readouterr().err
    assert sorted(lines["status"]) == ["diverged", "stopped"] and f"left out: {folder}: " in said
    assert re.search(words, said)


def test_two_folders_that_claim_one_seed_are_both_left_out(runs, capsys):
    (folder,) = (path for path in runs.glob("*/seed1") if "lr=" not in path.parent.name)
    copy = runs / "copies" / folder.parent.name / "seed1"
    shutil.copytree(folder, copy)
    lines = table(runs)
    assert sorted(lines["status"]) == ["diverged", "stopped"]
    assert f"left out: {folder.parent.name} seed 1: in {copy} and in {folder}: keep one of them" in capsys.readouterr().err


def test_curves_lie_beside(runs):
    table(runs)
    curves = pd.read_csv(runs.parent / "curves.csv")
    assert list(curves.columns) == collect.CURVES
    (folder,) = (path for path in runs.glob("*/seed1") if "lr=" not in path.parent.name)
    rows = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    mine = curves[(curves["run"] == folder.parent.name) & (curves["seed"] == 1)]
    assert mine["step"].tolist() == [row["step"] for row in rows] == [5, 10, 12]
    assert mine["train_loss"].tolist() == pytest.approx([row["train_loss"] for row in rows], rel=1e-5)
    assert 2 not in set(curves["seed"])  # stopped: its curve is not whole
    elsewhere = [pd.read_csv(runs.parent / name).assign(run="elsewhere") for name in ("runs.csv", "curves.csv")]
    for name, more in zip(("runs.csv", "curves.csv"), elsewhere):
        pd.concat([pd.read_csv(runs.parent / name), more]).to_csv(runs.parent / name, index=False)
    table(runs)
    again = pd.read_csv(runs.parent / "curves.csv")
    assert len(again) == 2 * len(curves) and len(again[again["run"] == "elsewhere"]) == len(curves)


def test_lines_of_other_machines_stay(runs):
    table(runs)
    path = runs.parent / "runs.csv"
    before = path.read_text()
    elsewhere = pd.read_csv(path).assign(run="elsewhere")
    pd.concat([pd.read_csv(path), elsewhere]).to_csv(path, index=False)
    lines = table(runs)
    assert sorted(lines["run"] == "elsewhere") == [False] * 3 + [True] * 3
    path.write_text(before)
    assert table(runs).equals(pd.read_csv(path)) and len(pd.read_csv(path)) == 3  # twice is once


def test_a_run_that_went_on_replaces_its_line(runs):
    table(runs)
    done = command(*QUADRATIC, "seed=2", cwd=runs.parent)
    assert done.code == 0
    lines = table(runs)
    assert lines["status"].tolist().count("done") == 2 and len(lines) == 3


def test_what_is_wrong_is_said(tmp_path):
    def say(*words):
        return subprocess.run([sys.executable, "-m", "results", "collect", *words], capture_output=True, text=True, cwd=ROOT)

    assert "no folder" in say("--runs", str(tmp_path / "none")).stderr
    (tmp_path / "runs").mkdir()
    done = say("--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "runs.csv"))
    assert done.returncode == 1 and "no run below" in done.stderr and not (tmp_path / "runs.csv").exists()
    finished(*QUADRATIC, cwd=tmp_path)
    (tmp_path / "some.csv").write_text("a,b\n1,2\n")
    done = say("--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "some.csv"))
    assert done.returncode == 1 and "other columns" in done.stderr and (tmp_path / "some.csv").read_text() == "a,b\n1,2\n"


def test_no_torch_is_imported():
    code = "import sys, results.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
