"""Verdicts, each by hand on runs that decide it."""

import math

import numpy as np
import pandas as pd
import pytest
from commands import forked
from listed import lines, written

from results import claims, store, tables

DATA = "cifar10_small"
BASES = ("local_sgd", "osgp", "sgp")
NEAR = np.array([0.0, 0.1, -0.1, 0.05, -0.05])


def found(path, words, data=DATA):
    judged = claims.on_runs(store.Runs(path))
    (line,) = judged[(judged["data"] == data) & judged["claim"].str.contains(words, regex=False)].to_dict("records")
    return line


def verdict(path, words):
    return found(path, words)["verdict"]


def near(run, level, metric="accuracy_last", seeds=5, spread=1.0, **more):
    """Seeds close to a level."""
    return lines(run, level + spread * np.resize(NEAR, seeds), metric, **more)


def table1(gains=(3, 2, 1), seeds=5, spread=1.0, level=60.0, reduce=60.0):
    """The three bases at a level, SlowMo over each gaining so much, and AllReduce."""
    cells = [near(f"{DATA}_ar_sgd", reduce, seeds=seeds, spread=spread)]
    for base, gain in zip(BASES, gains):
        cells += [
            near(f"{DATA}_{base}", level, seeds=seeds, spread=spread),
            near(f"{DATA}_slowmo_{base}", level + gain, seeds=seeds, spread=spread),
        ]
    return cells


@pytest.mark.parametrize("gain, expected", [(2, "supported"), (-2, "contradicted"), (0.3, "supported"), (0.04, "equivalent")])
def test_a_gain_in_accuracy(gain, expected, tmp_path):
    line = found(written(tmp_path, *table1((gain, 5, 5))), "raises the accuracy of Local SGD")
    assert line["verdict"] == expected and line["kind"] == "primary" and "5 seeds" in line["evidence"]
    assert line["runs"] == f"{DATA}_slowmo_local_sgd − {DATA}_local_sgd"


def test_an_undecided_gain_says_what_it_would_take(tmp_path):
    """Deviation of a cell 0.79 = 10 x 0.079, of a difference 1.12: (3.87 x 1.12)^2 = 18.8 by the normal distribution, 20 by t with 7(n − 1)
    degrees of freedom, at Holm's level of the first of six."""
    line = found(written(tmp_path, *table1((1, 1, 1), spread=10.0)), "raises the accuracy of SGP")
    assert line["verdict"] == "undecided" and line["evidence"].endswith("(5 seeds; would take about 20 seeds)")


def test_seeds_that_would_refute_one_part_of_two(tmp_path):
    """Local SGD gains 1.5 more than OSGP and 1.6 less than SGP. The second would do, at half of a third of the level: it is one of two, and
    three of six claims are left. (3.87 x 1.12 x sqrt 2 / 1.6)^2 = 14.6 by the normal distribution, 16 by t."""
    line = found(written(tmp_path, *table1((2, 0.5, 3.6), spread=10.0)), "the gain in accuracy is largest for Local SGD")
    assert line["verdict"] == "undecided" and line["evidence"].endswith("(5 seeds; would take about 16 seeds)")


def test_training_losses_are_paired_and_are_ratios(tmp_path):
    """Levels differ from seed to seed by far more than SlowMo changes: by a factor of about 0.5 each."""
    level = np.array([1.0, 0.1, 0.01, 3.0, 0.3])
    path = written(
        tmp_path, lines(f"{DATA}_sgp", level, "train_loss_last"), lines(f"{DATA}_slowmo_sgp", level * (0.5 + NEAR / 10), "train_loss_last")
    )
    line = found(path, "lowers the training loss of SGP")
    assert line["verdict"] == "supported" and "× 0.5 (0.49" in line["evidence"]


@pytest.mark.parametrize("seeds, expected", [(0, "not run"), (1, "not run"), (2, "not run"), (4, "not run"), (5, "supported")])
def test_nothing_is_decided_before_the_first_look(seeds, expected, tmp_path):
    assert verdict(written(tmp_path, *table1(seeds=seeds)), "raises the accuracy of Local SGD") == expected


def test_only_looks_decide(tmp_path):
    """Seeds 6 to 9 would change the verdict of the first five; they are not looked at before the tenth."""
    gains = [0.0, 0.4, -0.4, 0.1, -0.1, 9.0, 9.0, 9.0, 9.0, 9.0]
    for seeds, expected in ((9, "undecided"), (10, "supported")):
        cells = table1((5, 5, 5), seeds=seeds, spread=10)
        cells[-1]["accuracy_last"] = 60 + np.array(gains[:seeds])
        cells[-2]["accuracy_last"] = 60.0
        assert verdict(written(tmp_path, *cells), "raises the accuracy of SGP") == expected


def test_what_a_look_decided_stays(tmp_path):
    """The trial would have ended there."""
    cells = table1((5, 5, 5), seeds=10)
    cells[-1].loc[5:, "accuracy_last"] = [50.0, 70.0, 30.0, 90.0, 60.0]
    assert verdict(written(tmp_path, *cells), "raises the accuracy of SGP") == "supported"


def test_a_seed_that_diverges_later_takes_nothing_back(tmp_path):
    cells = table1(seeds=10)
    cells[-1].loc[6, "status"] = "diverged"
    line = found(written(tmp_path, *cells), "raises the accuracy of SGP")
    assert line["verdict"] == "supported" and line["evidence"].endswith(f"; then {DATA}_slowmo_sgp diverged with seed 7)")


def test_later_seeds_of_other_cells_take_nothing_back(tmp_path):
    """The deviation of a look is pooled over what the others had at it."""
    cells = table1(seeds=5) + [near(f"{DATA}_ar_sgd", 60.0, seeds=10).iloc[5:].assign(accuracy_last=[0.0, 100.0, 0.0, 100.0, 50.0])]
    assert verdict(written(tmp_path, *cells), "raises the accuracy of SGP") == "supported"


def test_the_deviation_of_a_look_is_that_of_all_cells_at_it(tmp_path):
    """results/protocol.md: pooled over the tier's cells, so over ten seeds of the others too."""
    cells = table1((0, 0, 2), seeds=10)
    (judged,) = [found for found in claims.judgements(DATA, store.Runs(written(tmp_path, *cells)))
                 if found.claim.text == "SlowMo raises the accuracy of SGP"]  # fmt: skip
    assert judged.estimates[0].freedom == 7 * 9
    variance = np.mean([cell["accuracy_last"].var() for cell in cells])
    assert judged.estimates[0].error == pytest.approx(np.sqrt(2 * variance / 10))


def test_losses_that_the_paper_changes_by_less_have_a_smaller_margin(tmp_path):
    """Texts: 2% lower is no "no difference to speak of"; letters 3%."""
    for data, most in (("cifar10_small", 0.1), ("imagenet_small", 0.03), ("wmt16", 0.01), ("wmt16_small", 0.01)):
        assert math.expm1(claims.margin(data, "train_loss_last")) == pytest.approx(most)
    noise = np.array([0.0, 0.002, -0.002, 0.001, -0.001])
    for lower, expected in ((0.03, "supported"), (0.0, "equivalent")):
        runs = [lines("wmt16_small_sgp", [2.5] * 5, "train_loss_last"),
                lines("wmt16_small_slowmo_sgp", 2.5 * np.exp(noise - lower), "train_loss_last")]  # fmt: skip
        line = found(written(tmp_path / str(lower), *runs), "lowers the training loss of SGP", "wmt16_small")
        assert line["verdict"] == expected


def test_no_runs_and_no_first_seed_are_different(tmp_path):
    cells = table1()
    cells[-1]["seed"] += 1
    line = found(written(tmp_path, *cells), "raises the accuracy of SGP")
    assert (line["verdict"], line["evidence"]) == ("not run", "seed 1 is missing")


def test_the_first_look_that_decides_is_the_verdict(tmp_path):
    """Equivalent after five seeds, by ten it would be contradicted."""
    cells = table1((5, 5, 0), seeds=10, spread=0.1)
    cells[-1].loc[5:, "accuracy_last"] -= 3
    assert verdict(written(tmp_path, *cells), "raises the accuracy of SGP") == "equivalent"


def test_a_look_is_at_seeds_that_all_cells_have(tmp_path):
    """Seeds 1 to 5 of one and 2 to 6, or 6 to 10, of another are no look."""
    for first, expected in ((1, "supported"), (2, "not run"), (6, "not run")):
        cells = table1()
        cells[-1]["seed"] += first - 1
        assert verdict(written(tmp_path / str(first), *cells), "raises the accuracy of SGP") == expected


def test_holm_counts_the_claims_that_have_no_runs_yet(tmp_path):
    """A gain whose p is between a sixth of the level and the level: whether the others are run or not."""
    alone = [cell for cell in table1((0, 0, 1.6), spread=10) if cell["run"].iloc[0].endswith("_sgp") and "osgp" not in cell["run"].iloc[0]]
    (judged,) = [one for one in claims.judgements(DATA, store.Runs(written(tmp_path, *alone))) if "accuracy of SGP" in one.claim.text]
    assert claims.inference.NOMINAL / 6 < judged.looks[5][0] < claims.inference.NOMINAL and judged.verdict == "undecided"


def test_tuning_seeds_never_count(tmp_path):
    cells = table1(seeds=6)
    for cell in cells:
        cell["seed"] -= 2  # -1 to 4
    line = found(written(tmp_path, *cells), "raises the accuracy of SGP")
    assert line["verdict"] == "not run" and line["evidence"] == "4 seeds"


def test_a_diverged_run_leaves_its_claims_undecided(tmp_path):
    cells = table1()
    cells[-1].loc[3, "status"] = "diverged"
    path = written(tmp_path, *cells)
    line = found(path, "raises the accuracy of SGP")
    assert line["verdict"] == "undecided" and line["evidence"] == f"{DATA}_slowmo_sgp diverged with seed 4"
    assert verdict(path, "raises the accuracy of Local SGD") == "supported"


def test_holm_over_primary_claims(tmp_path):
    """A gain of 1.6 with an error of 0.5 has p = 0.0034: enough as the third of six claims (0.0148 / 4), not as the first (/ 6)."""

    def study(folder, others):
        cells = table1((others, others, 1.6), spread=10)
        return claims.on_runs(store.Runs(written(tmp_path / folder, *cells))).set_index(["data", "claim"]).loc[DATA]

    clear, unclear = study("clear", 8), study("unclear", 0)
    words = "SlowMo raises the accuracy of SGP"
    assert clear.loc[words, "verdict"] == "supported" and unclear.loc[words, "verdict"] == "undecided"


def test_the_largest_gain(tmp_path):
    for gains, expected in (((3, 2, 1), "supported"), ((1, 2, 0), "contradicted"), ((2, 2.01, 2), "equivalent")):
        assert verdict(written(tmp_path, *table1(gains)), "largest for Local SGD") == expected


@pytest.mark.parametrize("reduce, expected", [(59, "supported"), (61, "contradicted"), (60.01, "equivalent")])
def test_ar_sgd_is_behind_sgp(reduce, expected, tmp_path):
    path = written(tmp_path, *table1(reduce=reduce, gains=(0, 0, 0)))
    assert verdict(path, "AR-SGD is behind SGP") == verdict(path, "SGP with SlowMo is ahead of AR-SGD in accuracy") == expected


def test_the_paper_s_orderings_are_asked_where_it_has_them():
    asked = {data: {claim.text for claim in claims.claims(data)} for data in tables.TITLES}
    assert "SGP with SlowMo is ahead of AR-Adam in BLEU" in asked["wmt16"]
    assert not any("ahead of AR" in text or "behind SGP" in text for text in asked["imagenet"])
    assert all("SlowMo is ahead of double-averaging" in asked[data] for data in ("imagenet", DATA))
    assert not any("costs" in text for texts in asked.values() for text in texts)  # seconds are measured on links


def test_double_averaging(tmp_path):
    cells = table1()
    cells += [near(f"{DATA}_double_averaging_{base}", 60.0) for base in ("sgp", "local_sgd")]
    assert verdict(written(tmp_path, *cells), "double-averaging") == "supported"


@pytest.mark.parametrize("gap, expected", [(0.0, "supported"), (-3.0, "contradicted"), (1.0, "undecided")])
def test_noaverage(gap, expected, tmp_path):
    """Within one point of accuracy."""
    path = written(tmp_path, *table1(), near(f"{DATA}_sgp_noaverage", 61 + gap))
    assert verdict(path, "noaverage matches") == expected


def tau(values, spread=1.0):
    """Accuracy at each τ, five seeds."""
    cells = [near(f"{DATA}_slowmo_sgp" + f",outer.tau={t}" * (t != 12), value, spread=spread) for t, value in values.items()]
    return table1(spread=spread)[:-1] + cells


@pytest.mark.parametrize("values, expected", [
    ({12: 60, 24: 61, 48: 62, 96: 59}, "supported"),
    ({12: 60, 24: 61, 48: 62, 96: 63}, "contradicted"),
    ({12: 60, 24: 60, 48: 60, 96: 60}, "undecided"),
    ({12: 60, 24: 60}, "not run"),
])  # fmt: skip
def test_tau(values, expected, tmp_path):
    line = found(written(tmp_path, *tau(values)), "not monotone")
    assert line["verdict"] == expected and ("would take over 1000 seeds" in line["evidence"]) == (expected == "undecided")


@pytest.mark.parametrize("values, seeds", [({12: 60, 24: 61, 48: 61, 96: 60}, 18), ({12: 60, 24: 61, 48: 61.5, 96: 62.5}, 55)])
def test_seeds_that_a_sweep_would_take(values, seeds, tmp_path):
    """By scipy's noncentral t, deviation of a difference 1.12: a change of 1 at a third of the level, where another goes the other way;
    else the least change, of 0.5, at the level itself."""
    line = found(written(tmp_path, *tau(values, spread=10.0)), "not monotone")
    assert line["verdict"] == "undecided" and line["evidence"].endswith(f"would take about {seeds} seeds)")


@pytest.mark.parametrize("half, one, expected", [(58, 60, "supported"), (62, 60, "contradicted"), (60, 60, "equivalent")])
def test_alpha(half, one, expected, tmp_path):
    cells = [*table1()[:-1], near(f"{DATA}_slowmo_sgp", one)]
    path = written(tmp_path, *cells, *(near(f"{DATA}_slowmo_sgp,outer.alpha={alpha}", half) for alpha in (0.5, 0.75, 1.5)))
    assert verdict(path, "α = 1 is best") == expected


def test_what_does_not_rest_on_seeds():
    values = pd.Series([0.9, 1.0, 1.1])  # mean 1, error 0.0577: t = 17.3 with 2 degrees, p = 0.0033
    assert claims.judge([("x", values, 0, math.inf, "a")]) == ("supported", "x +1 ± 0.25", "a")
    assert claims.judge([("x", values, -math.inf, 0, "a")])[0] == "contradicted"
    assert claims.judge([("x", values, 0.9, 1.1, "a")])[0] == "undecided"
    assert claims.judge([("x", values[:1], 0, 2, "a")])[0] == "not run"
    assert tables.interval(pd.Series([1.0, 3.0])) == pytest.approx(12.7062, abs=1e-4)


def test_special_cases_are_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(claims.subprocess, "run", forked(tmp_path))
    judged = claims.computed()
    assert judged["verdict"].tolist() == ["supported"] * 3
    assert all("iterates differ by no more than 1e-12" in text for text in judged["evidence"])


@pytest.mark.slow
def test_a_wrong_recursion_would_be_contradicted(monkeypatch):
    """The comparison can fail: iterates of another problem."""
    real = claims.quadratic
    monkeypatch.setattr(
        claims, "quadratic", lambda problem, runs, workers, steps, lr, *words: real(problem, runs, workers, steps, lr * 1.001, *words)
    )
    assert set(claims.computed()["verdict"]) == {"contradicted"}


@pytest.mark.slow
def test_the_workers_drift_is_what_the_bound_has(monkeypatch):
    """And is not where the slopes are those of other runs: of noise where data should differ, and the other way round."""
    assert claims.drift()["verdict"].tolist() == ["supported"] * 2
    real, noises = claims.quadratic, {"task.noise=1.0": "task.noise=0.0", "task.noise=0.0": "task.noise=1.0"}

    def swapped(problem, *args, **more):
        return real(None, *(noises.get(word, word) if isinstance(word, str) else word for word in args), **more)

    monkeypatch.setattr(claims, "quadratic", swapped)
    assert claims.drift()["verdict"].iloc[0] == "contradicted"


@pytest.mark.slow
def test_the_slow_momentum_grows_as_the_bound_has_it(monkeypatch):
    """And not where u is that of one β."""
    assert claims.momentum()["verdict"].tolist() == ["supported"]
    real = claims.quadratic

    def alike(*args, **more):
        return real(*("outer.beta=0.2" if str(word).startswith("outer.beta=") else word for word in args), **more)

    monkeypatch.setattr(claims, "quadratic", alike)
    assert claims.momentum()["verdict"].tolist() == ["contradicted"]


def test_the_list_is_written_and_read_back(tmp_path, monkeypatch, capsys):
    parts = {"computed", "speedup", "drift", "momentum"}
    for name in parts:
        monkeypatch.setattr(
            claims, name, lambda name=name: pd.DataFrame([(name, "quadratic", "computed", "supported", "said", "")], columns=claims.COLUMNS)
        )
    path = written(tmp_path, *table1())
    claims.main(path)
    back = claims.stored(store.Runs(path))
    assert parts <= set(back["claim"]) and "supported       SlowMo raises" in capsys.readouterr().out
    text = claims.markdown(back)
    assert f"| SlowMo raises the accuracy of SGP | `{DATA}` | primary | supported |" in text and "imagenet" in text.splitlines()[-1]


def test_the_committed_verdicts_are_those_of_the_committed_runs():
    written_down = store.PUBLISHED.read("claims").fillna("").astype(str)
    now = pd.concat([claims.on_runs(store.Runs(store.PUBLISHED)), claims.on_links(store.PUBLISHED.read("links"))], ignore_index=True)
    now = now.fillna("").astype(str)
    assert written_down[written_down["data"] != "quadratic"].reset_index(drop=True).equals(now), "python -m results claims"


def test_cost_is_judged_on_links():
    """Paired by round: a machine that slows down in the second round changes nothing. Rows are compared with those sent the same way."""
    times = {"sgp": (100, 200, 100.1), "slowmo_sgp": (101, 202, 101.2), "osgp": (90, 180, 90), "slowmo_osgp": (91, 182.1, 91),
             "slowmo_osgp_after": (92, 184.1, 92), "slowmo_sgp,outer.tau=1": (900, 900, 900), "ar_sgd": (95, 190, 95),
             "ar_sgd_after": (150, 300, 150)}  # fmt: skip
    facts = {"data": "imagenet", "network": "emulated", "hosts": 8, "node": 1, "rate": "400mbit", "delay": "0ms", "straggler": 1.0,
             "jitter": 0.0}  # fmt: skip
    made = pd.DataFrame([facts | {"row": row, "round": k, "milliseconds": ms} for row, of in times.items() for k, ms in enumerate(of)])
    judged = claims.on_links(pd.concat([made, made.assign(jitter=0.05)])).set_index("claim")
    assert set(judged["data"]) == {"imagenet on links, 8 hosts"} and len(judged) == 3
    same = judged.loc["an iteration with SlowMo costs what its base's does (within 5%)"]
    assert same["verdict"] == "supported" and "slowmo_sgp +1.03" in same["evidence"] and "3 rounds, 8 hosts, 400mbit, 0ms" in same["runs"]
    assert "slowmo_osgp_after +2.2" in same["evidence"]
    after = judged.loc["an iteration with SlowMo costs less than that of AllReduce, both after backward"]
    assert after["verdict"] == "supported" and after["evidence"].startswith("slowmo_osgp_after") and "slowmo_sgp" not in after["evidence"]
    assert judged.loc["an iteration with SlowMo costs less than that of AllReduce, both during backward"]["verdict"] == "contradicted"
    assert set(judged.loc[judged.index.str.contains("less than"), "kind"]) == {"question of ours"} and same["kind"] == "cost"
    alone = [facts | {"row": "slowmo_sgp_after", "round": k, "milliseconds": 140.0 + k} for k in range(3)]  # its base was sent otherwise
    again = claims.on_links(pd.concat([made, pd.DataFrame(alone)]).assign(delay="0.5ms"))
    assert again.iloc[0]["evidence"] == same["evidence"] and set(again["data"]) == {"imagenet on links, 8 hosts, 0.5ms"}
    slow = made.assign(bytes=2e6, emulated=True, warmup=4, iterations=48, milliseconds=made["milliseconds"] * 100)
    slow = claims.on_links(pd.concat([slow, slow[slow["row"] == "osgp"].assign(row="compute")]))
    # AllReduce after backward takes far longer than the model: cores that all hosts share make it slow, and nothing is judged by it
    assert [text.endswith("both during backward") for text in slow["claim"]] == [False, True]
    apart = claims.markdown(judged.reset_index())
    assert apart.count("| claim |") == 2 and apart.rindex("| claim |") < apart.index("less than") and claims.on_links(made[:0]).empty
