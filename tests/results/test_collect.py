"""Collecting runs: what a folder says, what is left out and why, what stays of earlier collections."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hydra
import pandas as pd
import pytest
from commands import command, finished
from omegaconf import OmegaConf

from experiments.runner.config import compose
from results import __main__ as main_module
from results import collect, store, tables
from results.__main__ import main

ROOT = Path(__file__).parents[2]
QUADRATIC = ("task=quadratic", "workers=2", "steps=12", "evaluate.every=5", "checkpoint_every=4", "base=sgp", "outer.tau=4")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that is done, one that diverged, one that was stopped."""
    folder = tmp_path_factory.mktemp("made")
    finished(*QUADRATIC, cwd=folder)
    assert command(*QUADRATIC, "optimizer.lr=1e30", cwd=folder).code == 3
    finished(*QUADRATIC, "seed=2", cwd=folder)
    (stopped,) = folder.glob("runs/*/seed2")
    (stopped / "result.json").unlink()
    return folder / "runs"


@pytest.fixture
def runs(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "runs"))


def table(runs, capsys=None):
    collect.main(runs, store.Store(runs.parent))
    return pd.read_csv(runs.parent / "data/runs.csv")


def test_a_line_a_run(runs, capsys):
    lines = table(runs)
    assert list(lines.columns) == store.COLUMNS["runs"]
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


def edited(change):
    def damage(path):
        text = path.read_text()
        changed = change(text)
        assert changed != text
        path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())

    return damage


def replaced(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


@pytest.mark.parametrize("name, damage, words", [
    ("result.json", edited(lambda text: text[: len(text) // 2]), "result.json|Expecting|Unterminated|delimiter"),
    ("result.json", edited(lambda text: text.replace('"seconds": ', '"seconds": NaN, "x": ')), "NaN is no number"),
    ("result.json", edited(lambda text: text.replace('"status": "done"', '"status": "perfect"')), "has the status perfect"),
    ("result.json", edited(lambda text: text.replace('"step": 12,\n "last"', '"step": 13,\n "last"')), "not of one run"),
    ("metrics.jsonl", edited(lambda text: text[:-30]), "Expecting|Unterminated|delimiter"),
    ("config.yaml", edited(lambda text: text.replace("seed: 1\n", "seed: 3\n")), "not of one run"),
    ("result.json", edited(lambda text: text.replace('"processes"', '"procs"')), "its files know no 'processes': another version"),
    ("result.json", edited(lambda text: ""), "result.json: Expecting value"),
    ("result.json", edited(lambda text: "[1]"), "result.json holds list where names and values"),
    ("result.json", edited(lambda text: "[" * 100_000), "recursion"),
    ("result.json", edited(lambda text: text.replace('"best"', '"worst"')), "its files know no 'best'"),
    ("metrics.jsonl", edited(lambda text: ""), "metrics.jsonl is empty"),
    ("metrics.jsonl", edited(lambda text: "7\n" + text), "metrics.jsonl holds int where"),
    ("metrics.jsonl", edited(lambda text: text.replace("validation_loss", "validation", 99)), "lacks the best validation_loss"),
    ("metrics.jsonl", edited(lambda text: text.replace('"train_loss": ', '"train_loss": 1')), "rows were lost or changed"),
    ("metrics.jsonl", edited(lambda text: b"\xff\xfe\x00"), "codec can't decode"),
    ("metrics.jsonl", Path.unlink, "metrics.jsonl is missing"),
    ("metrics.jsonl", replaced(Path.mkdir), "metrics.jsonl is no file"),
    ("metrics.jsonl", replaced(os.mkfifo), "metrics.jsonl is no file"),
    ("config.yaml", edited(lambda text: ""), "config.yaml holds nothing"),
    ("config.yaml", edited(lambda text: "a: ["), "config.yaml is no YAML: "),
    ("config.yaml", edited(lambda text: "- a\n- b\n"), "config.yaml holds list where"),
    ("config.yaml", edited(lambda text: "nonsense"), "its files know no 'seed'"),
    ("config.yaml", edited(lambda text: "seed: ${nowhere}\n"), "nowhere"),
    ("config.yaml", Path.unlink, "config.yaml is missing"),
    ("config.yaml", replaced(lambda path: path.symlink_to(path)), "config.yaml is no file"),
])  # fmt: skip
def test_a_damaged_folder_is_named_and_left_out(name, damage, words, runs, capsys):
    (folder,) = (path for path in runs.glob("*/seed1") if "lr=" not in path.parent.name)
    damage(folder / name)
    lines = table(runs)
    said = capsys.readouterr().err
    assert sorted(lines["status"]) == ["diverged", "stopped"] and f"left out: {folder}: " in said
    assert re.search(words, said)


def test_what_reads_well_and_has_another_checksum_is_left_out(runs, capsys):
    """A changed row that is no best one, a config of other words, iterates that are gone: nothing but the checksums can tell."""
    damages = {
        "metrics.jsonl": edited(lambda text: text.replace('"epoch": ', '"epoch": 1')),
        "config.yaml": edited(lambda text: text.replace("steps: 12", "steps: 13")),
        "final.npz": Path.unlink,
        "result.json": edited(lambda text: text.replace('"commit": "', '"commit": "f')),
    }
    (whole,) = (path for path in runs.glob("*/seed1") if "lr=" not in path.parent.name)
    for k, (name, damage) in enumerate(damages.items()):
        folder = shutil.copytree(whole, runs / f"damaged{k}" / "seed1")
        damage(folder / name)
        table(runs)
        said = [line for line in capsys.readouterr().err.splitlines() if f"left out: {folder}: {name} is " in line]
        assert len(said) == 1 and ("is gone: " in said[0]) == (name == "final.npz") and said[0].endswith("the same command makes it anew")
    lines = table(runs)
    assert len(lines) == 3 and whole.parent.name in set(lines["run"])


def test_two_folders_that_claim_one_seed_are_both_left_out(runs, capsys):
    (folder,) = (path for path in runs.glob("*/seed1") if "lr=" not in path.parent.name)
    copy = runs / "copies" / folder.parent.name / "seed1"
    shutil.copytree(folder, copy)
    lines = table(runs)
    assert sorted(lines["status"]) == ["diverged", "stopped"]
    assert f"left out: {folder.parent.name} seed 1: in {copy} and in {folder}: keep one of them" in capsys.readouterr().err


def test_curves_lie_beside(runs):
    table(runs)
    curves = pd.read_csv(runs.parent / "data/curves.csv")
    assert list(curves.columns) == store.COLUMNS["curves"]
    (folder,) = (path for path in runs.glob("*/seed1") if "lr=" not in path.parent.name)
    rows = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    mine = curves[(curves["run"] == folder.parent.name) & (curves["seed"] == 1)]
    assert mine["step"].tolist() == [row["step"] for row in rows] == [5, 10, 12]
    assert mine["train_loss"].tolist() == pytest.approx([row["train_loss"] for row in rows], rel=1e-5)
    assert 2 not in set(curves["seed"])  # stopped: its curve is not whole
    elsewhere = [pd.read_csv(runs.parent / name).assign(run="elsewhere") for name in ("data/runs.csv", "data/curves.csv")]
    for name, more in zip(("data/runs.csv", "data/curves.csv"), elsewhere):
        pd.concat([pd.read_csv(runs.parent / name), more]).to_csv(runs.parent / name, index=False)
    table(runs)
    again = pd.read_csv(runs.parent / "data/curves.csv")
    assert len(again) == 2 * len(curves) and len(again[again["run"] == "elsewhere"]) == len(curves)


def test_lines_of_other_machines_stay(runs):
    table(runs)
    path = runs.parent / "data/runs.csv"
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


def test_what_is_wrong_is_said(runs, tmp_path, monkeypatch):
    def say(*words):
        monkeypatch.setattr(sys, "argv", ["results", "collect", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return str(ended.value)

    assert "no folder" in say("--runs", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no run below" in say("--runs", tmp_path / "empty", "--out", tmp_path / "to") and not (tmp_path / "to").exists()
    (tmp_path / "to/data").mkdir(parents=True)
    (tmp_path / "to/data/runs.csv").write_text("a,b\n1,2\n")
    assert "other columns" in say("--runs", runs, "--out", tmp_path / "to") and (tmp_path / "to/data/runs.csv").read_text() == "a,b\n1,2\n"


def test_what_is_published_is_untouched_unless_asked(runs, tmp_path, monkeypatch, capsys):
    """As a user calls it, in a copy of the checkout's results."""
    published, mine = store.Store(tmp_path / "results"), store.Store(tmp_path / "results/mine")
    for name in ("runs", "curves"):
        published.write(name, store.PUBLISHED.read(name))
    for module in (store, main_module, tables):
        monkeypatch.setattr(module, "PUBLISHED", published)
    monkeypatch.setattr(main_module, "MINE", mine)

    def say(*words):
        monkeypatch.setattr(sys, "argv", ["results", *words])
        main()
        return capsys.readouterr().out

    before = published.path("runs").read_bytes()
    with pytest.raises(SystemExit, match=r"run something, then python -m results collect; --publish"):
        say("tables")
    assert "mine/data/runs.csv: 3 runs" in say("collect", "--runs", str(runs))
    say("tables")
    assert published.path("runs").read_bytes() == before and len(mine.read("runs")) == 3
    text = (mine.folder / "tables/tables.md").read_text()
    assert "| accuracy, last: yours | ours |" in text and re.search(r"\| – \| 6\d\.\d\d ± \d\.\d\d \(\d+\) \|", text)
    assert not (published.folder / "tables").exists()
    with pytest.raises(SystemExit):
        say("docs")
    assert "add --publish" in capsys.readouterr().err
    say("collect", "--runs", str(runs), "--publish")
    assert len(published.read("runs")) == len(store.read(ROOT / "results/data/runs.csv", "runs")) + 3
    ignored = subprocess.run(["git", "check-ignore", "results/mine/data/runs.csv"], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout.strip() == "results/mine/data/runs.csv"


def test_no_torch_is_imported():
    code = "import sys, results.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_run_of_other_settings_is_not_another_seed(tmp_path):
    """The experiment's file, or what it is made of, was edited since; what the run's name says is its own, and what follows from that."""

    def run(name, *words, **then):
        with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            cfg = compose(["experiment=cifar10_small_slowmo_sgp", *words]).cfg
        for key, value in then.items():
            OmegaConf.update(cfg, key.replace("__", "."), value)
        folder = tmp_path / f"cifar10_small_slowmo_sgp{name}/seed1"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
        collect.check_settings(folder)

    run("")
    run("", data__root="elsewhere", seed=3)
    run(",optimizer.lr=0.1", "optimizer.lr=0.1")
    run(",workers=8", "workers=8")
    run(",outer=lookahead", "outer=lookahead")
    run(f",optimizer.lr=0.1,{'0' * 12}", "optimizer.lr=0.1", "workers=8")  # a long name, cut off
    for name, words, then, remedy in (
        ("", (), {"optimizer__lr": 0.1}, "optimizer.lr is 0.1 in it and"),
        ("", (), {"task__width": 8}, "task.width is 8 in it and 16 in cifar10_small_slowmo_sgp now"),  # of the shape
        (",optimizer.lr=0.1", ("optimizer.lr=0.1",), {"outer__beta": 0.9}, "outer.beta is 0.9 in it and"),
    ):
        with pytest.raises(ValueError, match=remedy):
            run(name, *words, **then)


def test_a_run_whose_experiment_changed_leaves_the_list(runs, monkeypatch, capsys):
    """With the line that it had; one of another commit, from another machine, stays."""
    listed = store.Store(runs.parent / "list")
    collect.main(runs, listed)
    before = listed.read("runs")
    gone = before[before["status"] == "done"].iloc[0]
    other = before[before["run"] == gone["run"]].head(1).assign(seed=gone["seed"], commit="another")
    listed.write("runs", pd.concat([before, other]))

    def check(path, but=()):
        if (path.parent.name, path.name) == (gone["run"], f"seed{gone['seed']}"):
            raise ValueError("task.width is 8 in it and 16 in the experiment now")

    monkeypatch.setattr(collect, "check_settings", check)
    collect.main(runs, listed)
    left = listed.read("runs")
    assert "task.width is 8 in it" in capsys.readouterr().err and len(left) == len(before)
    assert left[(left["run"] == gone["run"]) & (left["seed"] == gone["seed"])]["commit"].tolist() == ["another"]
