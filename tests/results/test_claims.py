"""Verdicts: supported, contradicted, not enough runs; each by hand on runs that decide it."""

import math

import numpy as np
import pandas as pd
import pytest
from listed import lines, written

from results import claims, store, tables


def verdict(path, words, data="cifar10_small"):
    judged = claims.on_runs(store.Runs(path))
    (line,) = judged[(judged["data"] == data) & judged["claim"].str.contains(words, regex=False)].to_dict("records")
    return line


BASES = ("local_sgd", "osgp", "sgp")
NEAR = np.array([0.0, 0.1, -0.1, 0.05, -0.05])


def cells(changes, metric="accuracy_best", seeds=5):
    """The three bases at 60 with a spread over seeds, and SlowMo over each, changed by about so much."""
    parts = []
    for base, change in zip(BASES, changes):
        level = 60 + np.arange(seeds)
        parts += [
            lines(f"cifar10_small_{base}", level, metric),
            lines(f"cifar10_small_slowmo_{base}", level + change + NEAR[:seeds], metric),
        ]
    return parts


@pytest.mark.parametrize("changes, expected", [((3, 2, 1), "supported"), ((3, 2, -1), "contradicted"), ((3, 2, 0.02), "not enough runs")])
def test_accuracy_of_each_base(changes, expected, tmp_path):
    assert verdict(written(tmp_path, *cells(changes)), "raises the accuracy")["verdict"] == expected
    worse = written(tmp_path / "loss", *cells([-change for change in changes], "train_loss_best"))
    assert verdict(worse, "lowers the training loss")["verdict"] == expected


def test_one_seed_decides_nothing(tmp_path):
    line = verdict(written(tmp_path, *cells((3, 2, 1), seeds=1)), "raises the accuracy")
    assert line["verdict"] == "not enough runs" and "fewer than two pairs" in line["evidence"]


def test_pairs_are_by_seed(tmp_path):
    base, slow = lines("cifar10_small_sgp", [10.0, 50.0, 90.0]), lines("cifar10_small_slowmo_sgp", [90.9, 51.0, 11.1])
    slow["seed"] = [3, 2, 1]
    others = cells((3, 2, 1))[:4]
    assert verdict(written(tmp_path, base, slow, *others), "raises the accuracy")["verdict"] == "supported"


@pytest.mark.parametrize("changes, expected", [((3, 2, 1), "supported"), ((1, 2, 1), "contradicted"), ((2, 2, 1), "not enough runs")])
def test_the_largest_gain(changes, expected, tmp_path):
    path = written(tmp_path, *cells(changes))
    if expected == "not enough runs":  # the same gain, with a spread
        path = written(
            tmp_path,
            *cells((2, 1, 1))[:2],
            lines("cifar10_small_osgp", [60.0, 61.0]),
            lines("cifar10_small_slowmo_osgp", [61.0, 64.0]),
            *cells((2, 1, 1))[4:],
        )
    assert verdict(path, "largest for Local SGD")["verdict"] == expected


@pytest.mark.parametrize("pace, expected", [(1.01, "supported"), (1.2, "contradicted"), (1.05, "not enough runs")])
def test_cost_an_iteration(pace, expected, tmp_path):
    parts = []
    for base in BASES:
        parts += [lines(f"cifar10_small_{base}", [0.05, 0.05, 0.06], "seconds_per_iteration"),
                  lines(f"cifar10_small_slowmo_{base}", [0.05 * pace, 0.0501 * pace, 0.06 * pace], "seconds_per_iteration")]  # fmt: skip
    assert verdict(written(tmp_path, *parts), "costs what its base")["verdict"] == expected


@pytest.mark.parametrize("gap, expected", [(0.0, "supported"), (-1.0, "contradicted"), (0.25, "not enough runs")])
def test_noaverage(gap, expected, tmp_path):
    level = 60 + np.arange(5)
    path = written(tmp_path, lines("cifar10_small_slowmo_sgp", level), lines("cifar10_small_sgp_noaverage", level + gap + NEAR))
    assert verdict(path, "noaverage matches")["verdict"] == expected


def tau(values):
    """Accuracy at each τ, five seeds with little spread."""
    return [
        lines("cifar10_small_slowmo_sgp" if t == 12 else f"cifar10_small_slowmo_sgp,outer.tau={t}", value + NEAR * (1 + t / 100))
        for t, value in values.items()
    ]


@pytest.mark.parametrize("values, expected", [
    ({12: 60, 24: 61, 48: 62, 96: 59}, "supported"),
    ({12: 60, 24: 61, 48: 62, 96: 63}, "contradicted"),
    ({12: 60, 24: 60}, "not enough runs"),
    ({}, "not enough runs"),
])  # fmt: skip
def test_tau(values, expected, tmp_path):
    assert verdict(written(tmp_path, *tau(values)), "not monotone")["verdict"] == expected


@pytest.mark.parametrize("half, one, expected", [(58, 60, "supported"), (62, 60, "contradicted")])
def test_alpha(half, one, expected, tmp_path):
    path = written(tmp_path, lines("cifar10_small_slowmo_sgp", one + NEAR), lines("cifar10_small_slowmo_sgp,outer.alpha=0.5", half - NEAR),
                   lines("cifar10_small_slowmo_sgp,outer.alpha=0.75", half + 2 * NEAR))  # fmt: skip
    assert verdict(path, "α = 1 is best")["verdict"] == expected


def test_the_interval_is_student_s():
    verdicts, evidence, _ = claims.judge([("x", 1.0, 0.9, 0, math.inf, "a")])
    assert verdicts == "supported" and evidence == "x +1 ± 0.9"
    assert claims.judge([("x", 1.0, 1.1, 0, math.inf, "a")])[0] == "not enough runs"
    assert tables.interval(pd.Series([1.0, 3.0])) == pytest.approx(12.7062, abs=1e-4)


def test_diverged_runs_are_no_pairs(tmp_path):
    parts = cells((3, 2, 1))
    parts[5].loc[3:, "status"] = "diverged"
    line = verdict(written(tmp_path, *parts), "raises the accuracy")
    assert line["verdict"] == "supported" and "seeds 1, 2, 3;" not in line["evidence"] and "seeds 1, 2, 3" in line["runs"]


def test_special_cases_are_computed():
    judged = claims.computed()
    assert judged["verdict"].tolist() == ["supported"] * 3
    assert all("iterates differ by at most" in text for text in judged["evidence"])


def test_a_wrong_recursion_would_be_contradicted(monkeypatch):
    """The comparison can fail: iterates of another problem."""
    real = claims.quadratic
    monkeypatch.setattr(
        claims, "quadratic", lambda problem, runs, workers, steps, lr, *words: real(problem, runs, workers, steps, lr * 1.001, *words)
    )
    assert set(claims.computed()["verdict"]) == {"contradicted"}


def test_the_list_is_written_and_read_back(tmp_path, monkeypatch, capsys):
    for name in ("computed", "speedup"):
        monkeypatch.setattr(
            claims, name, lambda name=name: pd.DataFrame([(name, "quadratic", "supported", "said", "")], columns=claims.COLUMNS)
        )
    path = written(tmp_path, *cells((3, 2, 1)))
    claims.main(path)
    back = claims.stored(store.Runs(path))
    assert {"computed", "speedup"} <= set(back["claim"]) and "supported       SlowMo raises" in capsys.readouterr().out
    text = claims.markdown(back)
    assert "| SlowMo raises the accuracy of each base | `cifar10_small` | supported |" in text and "imagenet" in text.splitlines()[-1]


def test_the_committed_verdicts_are_those_of_the_committed_runs():
    written_down = store.PUBLISHED.read("claims").fillna("").astype(str)
    now = pd.concat([claims.on_runs(store.Runs(store.PUBLISHED)), claims.on_links(store.PUBLISHED.read("links"))], ignore_index=True)
    now = now.fillna("").astype(str)
    assert written_down[written_down["data"] != "quadratic"].reset_index(drop=True).equals(now), "python -m results claims"


def test_cost_is_judged_on_links():
    """Paired by round: a machine that slows down in the second round changes nothing."""
    times = {"sgp": (100, 200, 100.1), "slowmo_sgp": (101, 202, 101.2), "osgp": (90, 180, 90), "slowmo_osgp": (91, 182.1, 91),
             "slowmo_sgp,outer.tau=1": (900, 900, 900), "ar_sgd": (95, 190, 95), "ar_sgd_after": (150, 300, 150)}  # fmt: skip
    facts = {"data": "imagenet", "network": "emulated", "hosts": 8, "node": 1, "rate": "400mbit", "delay": "0ms"}
    made = pd.DataFrame([facts | {"row": row, "round": k, "milliseconds": ms} for row, of in times.items() for k, ms in enumerate(of)])
    judged = claims.on_links(made).set_index("claim")
    assert set(judged["data"]) == {"imagenet on links"}
    same = judged.loc["an iteration with SlowMo costs what its base's does (within 5%)"]
    assert same["verdict"] == "supported" and "slowmo_sgp +1.03" in same["evidence"] and "3 rounds, 8 hosts, 400mbit" in same["runs"]
    assert judged.loc["an iteration with SlowMo costs less than that of AllReduce after backward"]["verdict"] == "supported"
    assert judged.loc["an iteration with SlowMo costs less than that of AllReduce during backward"]["verdict"] == "contradicted"
    assert claims.on_links(made[:0]).empty
