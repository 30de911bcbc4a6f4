"""The benchmarks run and write down what they measured; what they measured is nobody's promise here."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from test_links import root

from benchmarks import __main__ as table
from benchmarks import iteration, ranks, scaling, single_process, vs_peers
from results import timing
from results.store import Store

ROOT = Path(__file__).parents[2]


def benchmarks(*words, cwd):
    command = [sys.executable, "-m", "benchmarks", "--out", f"{cwd}/data/benchmarks.csv", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=250, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_every_row_of_the_committed_table_is_one_that_is_measured():
    lines = pd.read_csv(ROOT / "results/data/benchmarks.csv")
    committed = list(lines[table.KEY].itertuples(index=False, name=None))
    assert committed == [key for key in table.keys() if key in committed]
    assert len({row.key(4) for row in table.rows()}) == len(table.rows())
    assert (lines["low"] <= lines["ratio"]).all() and (lines["ratio"] <= lines["high"]).all()


@pytest.mark.slow
def test_rows_measured_again_take_the_place_of_the_old(tmp_path):
    done = benchmarks("--only", "process: memory at its peak, Local SGD", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = pd.read_csv(tmp_path / "data/benchmarks.csv")
    assert len(lines) == 1 and 0.9 < lines["ratio"][0] <= 1.04  # memory is no matter of time: its aim is kept
    pd.concat([lines.assign(ratio=99.0), lines.assign(what="no more")]).to_csv(tmp_path / "data/benchmarks.csv", index=False)
    done = benchmarks("--only", "process: memory at its peak", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = pd.read_csv(tmp_path / "data/benchmarks.csv")
    assert len(lines) == 3 and (lines["ratio"] <= lines["aim"]).all() and done.stdout.count(": ok") == 3
    text = timing.benchmarks(Store(tmp_path))
    assert text.count("| memory at its peak, ") == 3 and not text.count("(!) |")


@root
@pytest.mark.slow
def test_rows_on_links(tmp_path):
    done = benchmarks("--only", "links: gossip", "--rounds", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = pd.read_csv(tmp_path / "data/benchmarks.csv").to_dict("records")
    assert line["where"] == "4 hosts, 400mbit" and line["ratio"] > 0.95 and line["rounds"] == 2  # no faster than the link


@pytest.mark.parametrize(
    "words, remedy", [(("--only", "nothing"), "no row has 'nothing' in it"), (("--rounds", "1"), "--rounds 2 or more")]
)
def test_nonsense_is_refused(words, remedy, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--out", f"{tmp_path}/data/benchmarks.csv", *words])
    with pytest.raises(SystemExit, match=remedy):
        table.main()
    assert not list(tmp_path.iterdir())


CONTESTS = {
    "allreduce": vs_peers.allreduce,
    "local sgd": vs_peers.local_sgd,
    "osgp": vs_peers.overlap,
    "messages": vs_peers.overlap_of_messages,
    "slowmo over sgp": lambda link, rounds: vs_peers.over_base(link, rounds, "sgp"),
    "slowmo over local sgd": lambda link, rounds: vs_peers.over_base(link, rounds, "local_sgd"),
    "fairscale local sgd": vs_peers.fairscale,
    "fairscale sgp": lambda link, rounds: vs_peers.fairscale(link, rounds, "sgp"),
}


@pytest.mark.parametrize("name", CONTESTS)
def test_both_sides_of_a_contest_run(name, monkeypatch):
    if name.startswith("fairscale"):
        pytest.importorskip("fairscale")
    monkeypatch.setattr(vs_peers, "MEGABYTES", 0.02)
    monkeypatch.setattr(vs_peers, "COMPUTE", 0.001)
    ratios = ranks.spawn(lambda: CONTESTS[name](1e9, 2), 2, "loopback")
    assert len(ratios) == 2 and all(ratio > 0 and math.isfinite(ratio) for ratio in ratios)  # how large is the machine's affair


def test_plain_loops_and_rows_compute_the_same_step():
    """The sides of the folding benchmark: the same batches, the same optimizer."""
    it = iteration.Step(["experiment=cifar10_small_sgp", "workers=2", "task.batch_size=8"], random=True, device="cpu")
    start = [p.detach().clone() for p in it.plain[1].parameters()]
    for model in (it.plain[1], it.replicas.models[1]):
        for p, x in zip(model.parameters(), start):
            p.data.copy_(x)
    it.loops(False)
    it.folded()
    for ours, theirs in zip(it.replicas.models[1].parameters(), it.plain[1].parameters()):
        assert ours.sub(theirs).abs().max() < 1e-5
    times = it.measure(2)
    assert set(times) == {"plain", "folded", "plain fused", "one plain model", "slow step", "first step after a reset"}
    assert all(len(values) == 2 and min(values) > 0 for values in times.values())


def test_growth_is_measured():
    small, large = (ranks.spawn(lambda: single_process.held("sgp", m, 2_000_000), 1, "loopback") for m in (2, 8))
    assert (large - small) / (4 * 2_000_000 * 6) == pytest.approx(3, rel=0.15)  # six more rows, gradients, momenta
    assert scaling.step(2, 1000) > 0


@pytest.mark.slow
def test_growth_with_the_number_of_buckets_is_measured():
    (_, whole), (_, cut) = (ranks.spawn(lambda: scaling.in_buckets(cap, 10**5), 2, "loopback") for cap in (100.0, 0.01))
    assert whole == 1 and 10 < cut < scaling.TENSORS
