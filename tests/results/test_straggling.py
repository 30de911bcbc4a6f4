"""Hosts that are not equally fast: the simulation against closed forms, by hand, and beside a measurement."""

import numpy as np
import pandas as pd
import pytest
from test_cost_model import MB, SLOW, lines

from results import straggling
from results import timing as report
from results.cost_model import Links, seconds
from results.straggling import CELLS, LONGER, simulate, slowness
from slowmo.topology import Exponential

CUT = {"bucket": 0.5 * MB}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("cell", [*CELLS, "sgp_noaverage", "double_averaging_sgp", "double_averaging_local_sgd"])
def test_equal_hosts_take_what_the_model_says(cell, overlap):
    for compute in (3.0, 0.5):
        ends = simulate(f"imagenet_{cell}", compute, MB, SLOW, slowness(4, 48), overlap, **CUT)
        assert ends[-1] / 48 == pytest.approx(np.full(4, seconds(f"imagenet_{cell}", compute, MB, SLOW, overlap, **CUT)))


def test_one_slow_host_is_everybodys_pace_in_allreduce():
    slow = slowness(4, 12, straggler=1.5)
    assert (slow[:, 0] == 1.5).all() and (slow[:, 1:] == 1).all()
    ends = simulate("imagenet_ar_sgd", 2.0, MB, SLOW, slow, **CUT)
    assert ends[-1] / 12 == pytest.approx(np.full(4, seconds("imagenet_ar_sgd", 3.0, MB, SLOW, True, **CUT)))


def test_local_sgd_waits_at_averages_alone():
    slow = slowness(4, 24, jitter=0.2)
    ends = simulate("imagenet_local_sgd", 1.0, MB, SLOW, slow, False, **CUT)
    average = 12 * (seconds("imagenet_local_sgd", 1.0, MB, SLOW, **CUT) - 1)
    assert ends[11] == pytest.approx(slow[:11].sum(axis=0))
    rounds = slow.reshape(2, 12, 4).sum(axis=1).max(axis=1)  # each as long as its slowest host
    assert ends[24] == pytest.approx(np.full(4, rounds.sum() + 2 * average))


def test_gossip_waits_for_its_neighbours_of_the_step():
    """Host 2 takes long once, then all are equal; hosts gossip over offsets 1, 2, 1, ..."""
    slow = np.ones((3, 4))
    slow[0, 2] = 10
    one = 1.1  # seconds of a message: bytes and latency
    ends = simulate("imagenet_sgp", 1.0, MB, SLOW, slow, False, bucket=25 * MB)
    # step 0: 2 sends to 3 and takes from 1; step 1: the late ones meet the others
    assert ends[1] == pytest.approx([1 + one, 10 + one, 10 + one, 10 + one])
    assert ends[2] == pytest.approx(np.full(4, 11 + 2 * one))
    ends = simulate("imagenet_osgp", 1.0, MB, SLOW, slow, bucket=25 * MB)
    assert ends[1] == pytest.approx([one, one, 10, one])  # messages left before
    assert ends[2] == pytest.approx([10 + one, 2 * one, 10 + one, 2 * one])  # 2 meets 0, 1 meets 3
    graph = Exponential(4)
    assert [2 ** (step % 2) for step in range(4)] == [next(offset for offset in graph(step) if offset) for step in range(4)]


def test_a_host_draws_its_own_and_the_same_each_time():
    slow = slowness(8, 4000, jitter=0.05)
    assert set(np.unique(slow)) == {1.0, LONGER} and (slow == slowness(8, 4000, jitter=0.05)).all()
    assert (slow == LONGER).mean() == pytest.approx(0.05, abs=0.01)
    assert (slow[:, 0] != slow[:, 1]).any() and (slow != slowness(8, 4000, jitter=0.05, round_=1)).any()
    assert (slow[:, :4] == slowness(4, 4000, jitter=0.05)).all()


def test_jitter_costs_allreduce_its_largest_step():
    """Nothing is sent that takes time: an iteration is the mean of the slowest, or of each host's own."""
    free, slow = Links(8, 1e15, 0.0, 1), slowness(8, 480, jitter=0.05)
    mean = lambda cell: simulate(f"imagenet_{cell}", 1.0, MB, free, slow)[-1].mean() / 480
    assert mean("ar_sgd") == pytest.approx(slow.max(axis=1).mean()) and mean("ar_sgd") > mean("sgp") > mean("local_sgd") > slow.mean()


def test_a_measurement_of_unequal_hosts_is_modelled_with_what_was_drawn():
    measured = lines(jitter=0.05, hosts=4)
    found = straggling.model(measured)
    drawn = [slowness(4, 52, jitter=0.05, round_=k) for k in range(3)]
    compute = 0.5 / np.mean([slow[4:].mean() for slow in drawn])
    links = Links(4, 8e6, 1e-4 + 50e-6, 1, at_once=2)
    ends = [simulate("imagenet_ar_sgd", compute, MB, links, slow, False, 2**19, MB / 32) for slow in drawn]
    assert found["ar_sgd_after"] == pytest.approx(1000 * np.mean([(end[-1] - end[4]).mean() / 48 for end in ends]))
    assert found["compute"] == 500 and found["osgp"] < found["sgp"] < found["sgp_after"]
    both = pd.concat([measured, lines(straggler=1.5), lines()])
    text = report.straggling_hosts(both)
    header = "| | one host 1.5 times slower: ms | model ms | 5% of steps 10 times longer: ms | model ms |"
    assert header in text and text.count("| compute alone | 500.0 | 500.0 | 500.0 | 500.0 |") == 1
    assert "Not measured" in report.straggling_hosts(lines())
