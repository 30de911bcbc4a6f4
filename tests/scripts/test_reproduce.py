"""Filling tables: what is missing is planned and run, failures are survived, the end is collected. Tuning: what it chooses and keeps."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from commands import command
from listed import lines, written

from results import collect
from results.store import Store

ROOT = Path(__file__).parents[2]
TINY = ("workers=2", "steps=2", "task.batch_size=8", "task.width=2", "data.train=64", "data.validation=20", "evaluate.every=2")


def ended(folder, experiment, accuracy, seed=1, status="done", **config):
    """A run's folder as a run leaves it, as far as collecting reads it."""
    config = {"seed": seed, "workers": 32, "steps": 600, "epochs": None, "task": {}, "optimizer": {"lr": 0.1}, "outer": {}} | config
    row = {"step": 600, "epoch": 1.0, "seconds": 60.0, "accuracy": accuracy, "train_loss": 1.0}
    result = {"status": status, "seed": seed, "step": 600, "experiment": experiment, "processes": 1, "commit": "c",
              "seconds_per_iteration": 0.1, "hardware": {"device": "cpu", "threads": 1}, "versions": {"torch": "2"},
              "best": {name: {"value": row[name], "step": 600} for name in ("accuracy", "train_loss")},
              "last": None if status == "diverged" else row}  # fmt: skip
    folder.mkdir(parents=True)
    for name, text in (("config.yaml", config), ("result.json", result), ("metrics.jsonl", row)):
        (folder / name).write_text(json.dumps(text) + "\n")


@pytest.fixture
def checkout(tmp_path):
    """The code alone, with a short list of published runs."""
    for name in ("run.py", "configs", "slowmo", "experiments", "results", "scripts", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    shutil.rmtree(tmp_path / "results/mine", ignore_errors=True)
    written(tmp_path / "results", lines("cifar10_small_sgp", [60.0], step=1200, seconds_per_iteration=0.1))
    return tmp_path


def loaded(name, root):
    """A script as a module, at work in `root`."""
    specification = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.ROOT = root
    return module


@pytest.fixture
def script(checkout, monkeypatch, capfd):
    """script(name, *words): its exit code, what it said, what it complained of."""

    def say(name, *words):
        module = loaded(name, checkout)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        for name, path in (("PUBLISHED", checkout / "results"), ("MINE", checkout / "results/mine")):
            monkeypatch.setattr(module, name, Store(path), raising=False)
        capfd.readouterr()
        try:
            code = module.main()
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    return say


def test_a_fresh_clone_has_everything_to_do(checkout, script):
    code, out, err = script("reproduce", "table1", "--data", "cifar10_small", "--seeds", "1,2", "--dry-run")
    assert code == 0, err
    plan = {line.split()[0]: line for line in out.splitlines()}
    # what is published says what it takes, not that it is done
    assert "missing: seed 1, 2; 2.0 minutes each" in plan["cifar10_small_sgp"] and "missing: seed 1, 2" in plan["cifar10_small_osgp"]
    assert "0 of 14 runs done" in out and not (checkout / "runs").exists()


def test_it_runs_what_is_missing_and_goes_on_after_a_failure(checkout, script):
    mine = checkout / "results/mine"
    mine.mkdir()
    shutil.copy(checkout / "results/data/claims.csv", mine)  # what needs no runs is not computed anew, which takes a minute
    published = {path: path.read_bytes() for path in (checkout / "results").rglob("*") if path.is_file() and mine not in path.parents}
    readme = (checkout / "README.md").read_bytes()
    cells = [
        "cifar10_small_ar_sgd",
        "cifar10_small_local_sgd",
        "cifar10_small_slowmo_local_sgd",
        "cifar10_small_slowmo_osgp",
        "cifar10_small_slowmo_sgp",
        "cifar10_small_sgp",
    ]
    for name in cells:
        ended(checkout / "runs" / name / "seed1", name, 60.0)
    (checkout / "runs/cifar10_small_sgp/seed1/metrics.jsonl").write_text("")  # damaged: not done
    code, out, err = script("reproduce", "table1", "--data", "cifar10_small", "--seeds", "1", "--dry-run")
    assert "5 of 7 runs done" in out and "cifar10_small_sgp/seed1 counts as missing: metrics.jsonl is empty" in err
    # where one of them will write stands another config's run
    refused = checkout / command("experiment=cifar10_small_osgp", "seed=1", *TINY, "dry_run=true", cwd=checkout).fact("folder")
    refused.mkdir(parents=True)
    (refused / "config.yaml").write_text("workers: 3\n")
    code, out, err = script("reproduce", "table1", "--data", "cifar10_small", "--seeds", "1", "--jobs", "2", "--", *TINY)
    assert code == 1 and re.search(r"^2 runs: 1 refused, 1 done$|^2 runs: 1 done, 1 refused$", out, re.M), out + err
    assert re.search(r"^  refused +cifar10_small_osgp seed 1 +[\d.]+ min  error: .* holds a run whose ", out, re.M), out
    assert re.search(r"^  done +cifar10_small_sgp seed 1 +[\d.]+ min$", out, re.M), out
    assert len(list(checkout.glob("runs/*/seed1/result.json"))) == len(cells) + 1 and out.count(": done, ") == 1
    assert (
        len(pd.read_csv(mine / "data/runs.csv")) == len(cells) and (mine / "tables/tables.md").exists() and (mine / "report.html").exists()
    )
    assert f"left out: runs/{refused.parent.name}/seed1: its files know no 'seed'" in err
    assert {path: path.read_bytes() for path in published} == published and (checkout / "README.md").read_bytes() == readme


def test_a_run_that_diverged_is_an_outcome(checkout, script, monkeypatch):
    """Collecting and all that is made from it, a minute, is the test's above."""
    monkeypatch.setattr(subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 0))
    for name in ("ar_sgd", "local_sgd", "slowmo_local_sgd", "osgp", "slowmo_osgp", "slowmo_sgp"):
        ended(checkout / f"runs/cifar10_small_{name}/seed1", f"cifar10_small_{name}", 60.0)
    code, out, err = script("reproduce", "table1", "--seeds", "1", "--", *TINY, "optimizer.lr=1e30")
    assert code == 0, out + err
    line = r"^1 runs: 1 diverged\n  diverged +cifar10_small_sgp seed 1 +[\d.]+ min  diverged at step \d: .*; lower optimizer.lr"
    assert re.search(line, out, re.M), out
    store = Store(checkout / "collected")
    collect.main(checkout / "runs", store)
    lines = store.read("runs")
    assert lines["status"].tolist().count("diverged") == 1 and len(lines) == 7


def test_wanted_runs_come_seed_after_seed_and_once():
    reproduce = loaded("reproduce", ROOT)
    jobs = reproduce.wanted(["table1", "ablations"], ("cifar10_small",), None)
    assert len(set(jobs)) == len(jobs) == 96 and [seed for _, seed in jobs] == sorted(seed for _, seed in jobs)
    assert len(reproduce.wanted(["table1"], ("wmt16_small",), None)) == 15 and len(reproduce.wanted(["table1"], ("wmt16_small",), [7])) == 5
    assert ("cifar10_small_slowmo_sgp,outer.tau=96", 3) in jobs and ("cifar10_small_slowmo_sgp,outer.tau=96", 4) not in jobs


def test_nonsense_is_refused(script):
    assert "whole numbers with commas" in script("reproduce", "table1", "--seeds", "a")[2]
    assert "invalid choice" in script("reproduce", "table7")[2]


def test_tuning_keeps_all_trials_and_marks_the_best(checkout, script, monkeypatch):
    """From trials that ran before: nothing is run again but a damaged one, and a run that diverged is never chosen."""
    before = (checkout / "results/data/trials.csv").read_bytes()
    shutil.rmtree(checkout / "trials", ignore_errors=True)
    accuracy = {("local_sgd", lr): value for lr, value in ((0.03, 50.0), (0.1, 55.0), (0.3, 52.0), (0.9, 99.0))}
    accuracy |= {(base, lr): 60 - abs(lr - 0.3) for base in ("osgp", "sgp", "ar_sgd") for lr in (0.1, 0.3, 0.9)}
    trials = [(f"cifar10_small_{base}", lr, None, value) for (base, lr), value in accuracy.items()]
    for base, lr in (("local_sgd", 0.1), ("osgp", 0.3), ("sgp", 0.3)):
        trials += [(f"cifar10_small_slowmo_{base}", lr, beta, 61.0 + beta) for beta in (0.4, 0.6, 0.8)]
    for k, (experiment, lr, beta, value) in enumerate(trials):
        ended(checkout / f"trials/{experiment},{k}/seed0", experiment, value, 0, "diverged" if value == 99.0 else "done",
              optimizer={"lr": lr}, outer={} if beta is None else {"beta": beta})  # fmt: skip
    code, out, err = script("tune", "cifar10_small")
    assert not code, err
    assert "local_sgd: lr 0.1, β of SlowMo 0.8" in out and "ar_sgd: lr 0.3\n" in out
    path = checkout / "results/mine/data/trials.csv"
    listed, text = pd.read_csv(path), path.read_text()
    assert len(listed) == len(trials) and listed[listed["chosen"]].groupby("experiment").size().tolist() == [1] * 7
    assert not script("tune", "cifar10_small")[0] and path.read_text() == text
    path.unlink()
    damaged = checkout / "trials/cifar10_small_osgp,5/seed0/result.json"
    whole, asked = damaged.read_text(), []
    damaged.write_text("{")

    def anew(words, **_):
        asked.append(words)
        damaged.write_text(whole)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", anew)
    code, out, err = script("tune", "cifar10_small")
    assert not code and path.read_text() == text and len(asked) == 1 and "experiment=cifar10_small_osgp" in asked[0], err
    assert "cifar10_small_osgp,5/seed0 counts as missing: result.json: " in err
    assert (checkout / "results/data/trials.csv").read_bytes() == before
