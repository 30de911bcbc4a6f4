"""Filling tables: what is missing is planned and run, failures are survived, the end is collected. Tuning: what it chooses and keeps."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import reproduce
import rerun
import tune
import yaml
from commands import command
from listed import lines, written

from results import collect
from results.store import Store

ROOT = Path(__file__).parents[2]
TINY = ("workers=2", "steps=2", "task.batch_size=8", "task.width=2", "data.train=64", "data.validation=20", "evaluate.every=2")


def ended(folder, experiment, value, seed=1, status="done", metric="accuracy", **config):
    """A run's folder as a run leaves it, as far as collecting reads it."""
    own = {key: value for key, value in collect.settings(experiment).items() if key in ("workers", "steps", "epochs")}
    config = {"workers": 32, "steps": 600, "epochs": None} | own | {"seed": seed, "task": {}, "optimizer": {}, "outer": {}} | config
    row = {"step": 600, "epoch": 1.0, "seconds": 60.0, metric: value, "train_loss": 1.0}
    result = {"status": status, "seed": seed, "step": 600, "experiment": experiment, "processes": 1, "commit": "c",
              "seconds_per_iteration": 0.1, "hardware": {"device": "cpu", "threads": 1}, "versions": {"torch": "2"},
              "best": {name: {"value": row[name], "step": 600} for name in (metric, "train_loss")},
              "last": None if status == "diverged" else row}  # fmt: skip
    folder.mkdir(parents=True)
    for name, text in (("config.yaml", config), ("result.json", result), ("metrics.jsonl", row)):
        (folder / name).write_text(json.dumps(text) + "\n")


@pytest.fixture
def checkout(tmp_path):
    """The code alone, with a short list of published runs, and of published trials those of other data than are tuned here."""
    for name in ("run.py", "configs", "slowmo", "experiments", "results", "scripts", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    shutil.rmtree(tmp_path / "results/mine", ignore_errors=True)
    trials = Store(tmp_path / "results").read("trials")
    Store(tmp_path / "results").write("trials", trials[~trials["experiment"].str.match("cifar10_small_(?!loss)")])
    written(tmp_path / "results", lines("cifar10_small_sgp", [60.0], step=1200, seconds_per_iteration=0.1))
    return tmp_path


@pytest.fixture
def script(checkout, monkeypatch, capfd):
    """script(module, *words) in the checkout: its exit code, what it said, what it complained of."""

    def say(module, *words):
        monkeypatch.setattr(module, "ROOT", checkout)
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *words])
        monkeypatch.setattr(os, "nice", lambda more: None)  # it would stay with this process, for all tests to come
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
    code, out, err = script(reproduce, "table1", "--data", "cifar10_small", "--seeds", "1,2", "--dry-run")
    assert code == 0, err
    plan = {line.split()[0]: line for line in out.splitlines()}
    # what is published says what it takes, not that it is done
    assert "missing: seed 1, 2; 2.0 minutes each" in plan["cifar10_small_sgp"] and "missing: seed 1, 2" in plan["cifar10_small_osgp"]
    assert "0 of 14 runs done" in out and not (checkout / "runs").exists()


@pytest.mark.slow
def test_it_runs_what_is_missing_and_goes_on_after_a_failure(checkout, script):
    mine = checkout / "results/mine"
    (mine / "data").mkdir(parents=True)
    shutil.copy(checkout / "results/data/claims.csv", mine / "data")  # what needs no runs is not computed anew, which takes a minute
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
    code, out, err = script(reproduce, "table1", "--data", "cifar10_small", "--seeds", "1", "--dry-run")
    assert "5 of 7 runs done" in out and "cifar10_small_sgp/seed1 counts as missing: metrics.jsonl is empty" in err
    # where one of them will write stands another config's run
    refused = checkout / command("experiment=cifar10_small_osgp", "seed=1", *TINY, "dry_run=true", cwd=checkout).fact("folder")
    refused.mkdir(parents=True)
    (refused / "config.yaml").write_text("workers: 3\n")
    code, out, err = script(reproduce, "table1", "--data", "cifar10_small", "--seeds", "1", "--jobs", "2", "--", *TINY)
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
    code, out, err = script(reproduce, "table1", "--seeds", "1", "--", *TINY, "optimizer.lr=1e30")
    assert code == 0, out + err
    line = r"^1 runs: 1 diverged\n  diverged +cifar10_small_sgp seed 1 +[\d.]+ min  diverged at step \d: .*; lower optimizer.lr"
    assert re.search(line, out, re.M), out
    store = Store(checkout / "collected")
    collect.main(checkout / "runs", store)
    lines = store.read("runs")
    assert lines["status"].tolist().count("diverged") == 1 and len(lines) == 7


def test_wanted_runs_come_seed_after_seed_and_once():
    jobs = reproduce.wanted(["table1", "ablations"], ("cifar10_small",), None)
    assert len(set(jobs)) == len(jobs) and [seed for _, seed in jobs] == sorted(seed for _, seed in jobs)
    assert len(reproduce.wanted(["table1"], ("wmt16_small",), None)) == 25 and len(reproduce.wanted(["table1"], ("wmt16_small",), [7])) == 5
    assert ("cifar10_small_slowmo_sgp,outer.tau=96", 5) in jobs and ("cifar10_small_slowmo_sgp,outer.tau=96", 6) not in jobs


def test_nonsense_is_refused(script):
    assert "whole numbers with commas" in script(reproduce, "table1", "--seeds", "a")[2]
    assert "invalid choice" in script(reproduce, "table7")[2]
    for word in ("steps=24", "optimizer.momentum=0.8"):
        assert f"own settings and length: leave {word} out" in script(tune, "cifar10_small", "--", word)[2]


def trial(folder, experiment, value, seed, status="done", **config):
    name = f"{experiment},data.heldout=tuning,optimizer.lr={config['optimizer']['lr']}"
    name += f",outer.beta={config['outer']['beta']}" if config.get("outer") else ""
    ended(folder / f"trials/{name}/seed{seed}", experiment, value, seed, status, **config)


def tuned(checkout, best, diverged=()):
    """Trials of both seeds on the first grids and, where the best lies at an edge, beyond: accuracy falls with the distance to the best."""
    rates = [0.033, 0.058, 0.1, 0.17, 0.3, 0.52]
    for base, (lr, beta) in best.items():
        for rate in rates:
            for seed, luck in ((0, 0.4), (-1, -0.4)):  # the seeds agree in the mean
                status = "diverged" if (base, rate) in diverged and seed else "done"
                value = 60 - abs(rates.index(rate) - rates.index(lr)) + luck
                trial(checkout, f"cifar10_small_{base}", 99.0 if (base, rate) in diverged else value, seed, status, optimizer={"lr": rate})
        for other in (0.2, 0.4, 0.6, 0.8, 0.9, 0.95) if beta else ():
            for seed in (0, -1):
                trial(checkout, f"cifar10_small_slowmo_{base}", 61 - abs(other - beta), seed, optimizer={"lr": lr}, outer={"beta": other})


BEST = {"local_sgd": (0.1, 0.9), "osgp": (0.17, 0.6), "sgp": (0.3, 0.4), "ar_sgd": (0.3, None)}


@pytest.mark.slow
def test_tuning_keeps_all_trials_and_marks_the_best(checkout, script, monkeypatch):
    """From trials that ran before: only a damaged one is run again, grids grow at their edges, a rate that diverged is never chosen."""
    before = {path: path.read_bytes() for path in (checkout / "configs").rglob("*.yaml")}
    published = (checkout / "results/data/trials.csv").read_bytes()
    shutil.rmtree(checkout / "trials", ignore_errors=True)
    tuned(checkout, BEST, diverged=[("ar_sgd", 0.52)])
    code, out, err = script(tune, "cifar10_small")
    assert not code, err
    assert "local_sgd: lr 0.1, β of SlowMo 0.9" in out and "osgp: lr 0.17, β of SlowMo 0.6" in out and "ar_sgd: lr 0.3\n" in out
    path = checkout / "results/mine/data/trials.csv"
    listed, text = pd.read_csv(path), path.read_text()
    assert len(listed) == len(list(checkout.glob("trials/*/*/result.json")))
    assert listed[listed["chosen"]].groupby("experiment").size().tolist() == [2] * 7 and set(listed["metric"]) == {"accuracy_last"}
    assert not script(tune, "cifar10_small")[0] and path.read_text() == text
    path.unlink()
    damaged = next(checkout.glob("trials/cifar10_small_osgp,*lr=0.17/seed0/result.json"))
    whole, asked = damaged.read_text(), []
    damaged.write_text("{")

    def anew(words, **_):
        asked.append(words)
        damaged.write_text(whole)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", anew)
    code, out, err = script(tune, "cifar10_small")
    assert not code and path.read_text() == text and len(asked) == 1 and {"experiment=cifar10_small_osgp", "seed=0"} <= set(asked[0]), err
    assert "counts as missing: result.json: " in err
    assert {path: path.read_bytes() for path in before} == before and (checkout / "results/data/trials.csv").read_bytes() == published


def test_what_was_chosen_is_written_where_it_is_used(checkout, script):
    tuned(checkout, BEST)
    ended(checkout / "trials/cifar10_small_sgp,data.heldout=tuning,optimizer.lr=0.1,steps=24/seed0", "cifar10_small_sgp", 99.0, 0)
    assert not script(tune, "cifar10_small", "--publish")[0]

    def config(cell):
        return yaml.safe_load((checkout / f"configs/experiment/cifar10_small_{cell}.yaml").read_text())

    for cell in ("sgp", "slowmo_sgp", "sgp_noaverage", "double_averaging_sgp"):
        assert config(cell)["optimizer"] == {"lr": 0.3}, cell
    assert config("slowmo_sgp")["outer"] == {"beta": 0.4} and config("sgp_noaverage")["outer"] == {"beta": 0.4, "exact": False}
    assert config("slowmo_local_sgd")["outer"] == {"beta": 0.9} and config("double_averaging_local_sgd")["optimizer"] == {"lr": 0.1}
    listed = pd.read_csv(checkout / "results/data/trials.csv")
    mine = listed[listed["commit"] == "c"]  # beside the published ones; one of another length is none of this experiment's
    assert len(mine) == len(list(checkout.glob("trials/*/*/result.json"))) - 1 and mine["value"].max() < 99


def test_trials_of_another_length_count_no_more(checkout, script, monkeypatch):
    """The experiment has become longer since it was tuned: nothing is chosen from what was tried before."""
    tuned(checkout, BEST)
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: asked.append(words) or subprocess.CompletedProcess(words, 1, "", "stopped"))
    assert not script(tune, "cifar10_small")[0] and not asked
    path = checkout / "results/mine/data/trials.csv"
    shutil.rmtree(checkout / "trials")
    old = path.read_text().replace("steps=2400", "steps=1200").splitlines(keepends=True)
    path.write_text("".join(line for line in old if line.startswith(("experiment,", "cifar10_small_ar_sgd,"))))  # of one, and no others
    assert script(tune, "cifar10_small")[0] == 1 and len(asked) == 4
    assert all({"seed=0,-1", "optimizer.lr=0.1,0.17,0.3"} <= set(words) for words in asked)


TUNED = """
import subprocess, sys, time
sys.path[:0] = sys.argv[1:3]
import tune
from pathlib import Path
from results.store import Store

def run(words, **_):
    print("asked", flush=True)
    time.sleep(2)
    return subprocess.CompletedProcess(words, 130, "", "SIGINT: saved")

subprocess.run, tune.ROOT, tune.MINE = run, Path.cwd(), Store(Path.cwd() / "results/mine")
sys.argv = ["tune.py", "cifar10_small", "--jobs", "1"]
sys.exit(tune.main())
"""


def test_ctrl_c_ends_tuning(checkout):
    """Trials get it too and stop; no other base begins."""
    child = subprocess.Popen([sys.executable, "-c", TUNED, ROOT / "scripts", ROOT], cwd=checkout, stdout=subprocess.PIPE, text=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    assert child.stdout.readline() == "asked\n"
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 130 and "asked" not in out and "the same command goes on from there" in out


def test_a_base_that_is_half_tuned_is_not_chosen(checkout, script, monkeypatch):
    """Whenever tuning stops, what is marked as chosen stands in the configs."""
    tuned(checkout, BEST | {"osgp": (0.17, None)})  # SlowMo over it has not been tried
    monkeypatch.setattr(subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 1, "", "stopped"))
    path = checkout / "configs/experiment/cifar10_small_osgp.yaml"
    before = path.read_text()
    assert script(tune, "cifar10_small", "--publish")[0] == 1 and path.read_text() == before
    listed = pd.read_csv(checkout / "results/data/trials.csv")
    chosen = set(listed[listed["chosen"] & (listed["commit"] == "c")]["experiment"])
    assert chosen == {f"cifar10_small_{cell}" for cell in ("local_sgd", "slowmo_local_sgd", "sgp", "slowmo_sgp", "ar_sgd")}
    assert "lr: 0.3" in (checkout / "configs/experiment/cifar10_small_sgp.yaml").read_text()


def test_a_rate_is_put_into_any_experiment_s_file():
    assert tune.written("optimizer: {lr: 0.3} # a\n", "optimizer", "lr", 0.17) == "optimizer: {lr: 0.17} # a\n"
    assert tune.written("outer: {tau: 12, beta: 0.6}\n", "outer", "beta", 0.8) == "outer: {tau: 12, beta: 0.8}\n"
    assert tune.written("outer: {tau: 48}\n", "outer", "beta", 0.8) == "outer: {beta: 0.8, tau: 48}\n"
    assert tune.written("x: 1\ntarget: {}\n", "optimizer", "lr", 0.001) == "x: 1\noptimizer: {lr: 0.001}\ntarget: {}\n"
    assert [tune.grid(0.1)[n] for n in (-2, -1, 0, 1, 2)] == [0.033, 0.058, 0.1, 0.17, 0.3]


def test_trials_are_run_on_pictures_of_their_own_and_one_that_fails_stops_its_base_alone(checkout, script, monkeypatch):
    """What is asked of run.py; Local SGD's trials fail, the others leave what they should."""
    asked = []

    def run(words, **_):
        asked.append(words)
        facts = dict(word.split("=", 1) for word in words if "=" in word)
        experiment, rates, betas = facts["experiment"], facts["optimizer.lr"].split(","), facts.get("outer.beta", "").split(",")
        if experiment.endswith("local_sgd"):
            return subprocess.CompletedProcess(words, 2, "", "error: no disk")
        for rate, beta, seed in itertools.product(rates, betas, facts["seed"].split(",")):
            value = 60 - abs(float(rate) - 0.17) - abs(float(beta or 0.6) - 0.6)
            trial(checkout, experiment, value, int(seed), optimizer={"lr": float(rate)}, outer={"beta": float(beta)} if beta else {})
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    code, out, err = script(tune, "cifar10_small", "--", "data.root=there")
    assert code == 1 and "local_sgd: run.py -m" in err and "no disk" in err
    assert "sgp: lr 0.17, β of SlowMo 0.6" in out and "ar_sgd: lr 0.17\n" in out
    assert all({"data.heldout=tuning", "data.root=there", "seed=0,-1", "runs=trials"} <= set(words) for words in asked)
    assert not any(word.startswith(("steps=", "epochs=")) for words in asked for word in words)  # full length


def test_trials_of_texts_translate_nothing(checkout, script, monkeypatch):
    """They are judged by their NLL."""
    asked = []

    def run(words, **_):
        asked.append(words)
        facts = dict(word.split("=", 1) for word in words if "=" in word)
        for rate, beta, seed in itertools.product(facts["optimizer.lr"].split(","), facts.get("outer.beta", "").split(","), (0, -1)):
            config = {"optimizer": {"lr": float(rate)}, "outer": {"beta": float(beta)} if beta else {}}
            name = f"{facts['experiment']},optimizer.lr={rate}" + (f",outer.beta={beta}" if beta else "") + ",task.bleu.subsets=__"
            nll = 3 + abs(float(rate) - 0.009) + abs(float(beta or 0.4) - 0.4)
            ended(checkout / f"trials/{name}/seed{seed}", facts["experiment"], nll, seed, metric="nll_base2", **config)
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    code, out, err = script(tune, "wmt16_small")
    assert not code and all("task.bleu.subsets=[]" in words for words in asked), err
    assert "sgp: lr 0.009, β of SlowMo 0.4" in out and "ar_adam: lr 0.009\n" in out


@pytest.mark.slow
def test_looks_go_on_where_a_claim_is_undecided(checkout):
    """To the first look everywhere; then Local SGD's clear gain needs no more seeds, SGP's does."""
    cells = ("local_sgd", "osgp", "sgp")

    def look(seeds, most=40, status="done"):
        noise = 3 * np.resize([0.0, 1.0, -1.0, 0.5, -0.5], seeds)
        runs = [lines(f"cifar10_small_loss_{cell}", np.exp(noise), "train_loss_last") for cell in cells]
        gains = (-5.0, -5.0, np.resize([1.0, -1.0, 0.3, -0.2, 0.1], seeds))
        runs += [lines(f"cifar10_small_loss_slowmo_{cell}", np.exp(noise + gain), "train_loss_last") for cell, gain in zip(cells, gains)]
        if seeds:
            runs[-1].loc[0, "status"] = status
        return reproduce.next_look(("cifar10_small_loss",), written(checkout / f"looks{seeds}{most}{status}", *runs), most)

    assert reproduce.next_look(("cifar10_small_loss",), Store(checkout / "nothing"), 40) == look(0)
    first = look(3)
    assert (
        len(first) == 6 * 5
        and {seed for _, seed in first} == {1, 2, 3, 4, 5}
        and [seed for _, seed in first] == sorted(s for _, s in first)
    )
    assert sorted(look(5)) == [(f"cifar10_small_loss_{cell}", seed) for cell in ("sgp", "slowmo_sgp") for seed in range(1, 11)]
    assert max(seed for _, seed in look(5, most=7)) == 7
    assert look(5, status="diverged") == []


@pytest.mark.parametrize(
    "accuracy, code, said", [(60.5, 0, "equal"), (61.0, 0, "accuracy_last of runs: 61.0, published 60.5"), (0, 2, "run.py ended with 2")]
)
def test_published_runs_are_run_again_and_compared(accuracy, code, said, checkout, monkeypatch, capsys):
    published, asked = Store(checkout / "results"), []
    monkeypatch.setattr(rerun, "ROOT", checkout)
    ended(checkout / "runs/cifar10_small_sgp/seed2", "cifar10_small_sgp", 60.5, seed=2)
    published.path("runs").unlink()
    collect.main(checkout / "runs", published)
    monkeypatch.setattr(rerun, "PUBLISHED", published)

    def run(command, cwd):
        asked.append(command[2:])
        if not code:
            ended(checkout / "trials/again/cifar10_small_sgp/seed2", "cifar10_small_sgp", accuracy, seed=2)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(rerun.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["rerun.py", "cifar10_small", "--seed", "1"])
    failed = rerun.main()
    out = capsys.readouterr().out
    assert asked == [["experiment=cifar10_small_sgp", "seed=2", "runs=trials/again"]]
    assert said in out and failed == (said != "equal") and f"{int(said == 'equal')} of 1 equal" in out


def test_what_was_not_published_cannot_be_run_again(checkout, monkeypatch, capsys):
    monkeypatch.setattr(rerun, "PUBLISHED", Store(checkout / "results"))
    for words, remedy in (
        (["wmt16_small"], "nothing of wmt16_small is published"),
        (["cifar10_small", "--share", "2"], "above 0, at most 1"),
    ):
        monkeypatch.setattr(sys, "argv", ["rerun.py", *words])
        with pytest.raises(SystemExit):
            rerun.main()
        assert remedy in capsys.readouterr().err


@pytest.mark.parametrize("module, words, remedy", [
    (reproduce, ["table1", "--seeds=0,-1"], "others are for tuning"), (reproduce, ["table1", "--seeds="], "whole numbers with commas"),
    (reproduce, ["table1", "--jobs", "0"], "--jobs 0: at least 1"), (reproduce, ["table1", "--launcher", "foo"], "choose from"),
    (reproduce, ["looks", "--most", "3"], "choose from"), (reproduce, ["table1", "--", "dry_run=true"], "a cell's own run is asked for"),
    (reproduce, ["table1", "--", "seed=3"], "say that before --"), (tune, ["cifar10_small", "--seeds", "1,2"], "tune on others"),
    (tune, ["cifar10_small", "--jobs", "0"], "--jobs 0: at least 1")])  # fmt: skip
def test_what_is_asked_for_wrongly_is_refused(module, words, remedy, script):
    code, _, said = script(module, *words)
    assert code == 2 and remedy in said


def test_words_that_give_runs_other_names_are_named(script):
    code, _, said = script(reproduce, "table1", "--seeds", "1", "--dry-run", "--", "steps=12", "data.root=elsewhere")
    assert code == 0 and "-- steps=12 gives runs other names" in said and "data.root" not in said
