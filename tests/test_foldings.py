"""One process = P processes: the same iterates under every folding, for every base, outer and buffers."""

import itertools
from unittest import mock

import pytest
import torch
from helpers import BASES, build, quadratic, run, sgd
from processes import spawn

import slowmo
from slowmo.cluster import Cluster, fold

TAU, STEPS = 2, 7  # three slow steps and a part of a round


def adam(rows):
    return torch.optim.Adam([rows], lr=0.1)


def nesterov(rows):
    return sgd(rows, momentum=0.9, nesterov=True, weight_decay=0.01)


def outers():
    yield "none", None
    for buffers in slowmo.base.BUFFERS:
        yield f"average-{buffers}", lambda base, b=buffers: slowmo.Average(base, tau=TAU, buffers=b)
        yield f"slowmo-{buffers}", lambda base, b=buffers: slowmo.SlowMo(base, tau=TAU, beta=0.6, buffers=b)
        yield f"noaverage-{buffers}", lambda base, b=buffers: slowmo.SlowMo(base, tau=TAU, beta=0.6, buffers=b, exact=False)
    yield "diloco", lambda base: slowmo.NesterovOuter(base, tau=TAU, alpha=0.7, beta=0.9, buffers="maintain")


def cases():
    for base, (outer, make) in itertools.product(BASES, outers()):
        if "_" not in base.removeprefix("local_") or outer in ("none", "slowmo-reset", "noaverage-maintain"):
            yield f"{base} {outer}", base, make, nesterov
    yield "osgp slowmo adam", "osgp", lambda base: slowmo.SlowMo(base, tau=TAU, beta=0.6, buffers="maintain"), adam
    yield "sgp_double adam", "sgp_double", None, adam


def trajectories(m) -> dict:
    """x of the workers hosted here after STEPS steps, the average, u and w, for every case."""
    results = {}
    for name, base, outer, optimizer in cases():
        replicas, algorithm = build(quadratic(m), m, base, optimizer, outer)
        lr = lambda step: 0.3 / (1 + step // 4)
        x = run(quadratic(m), replicas, algorithm, STEPS, lr)
        inner = getattr(algorithm, "base", algorithm)
        parts = {"x": x, "mean": algorithm.average(), "u": algorithm.u, "w": getattr(inner, "w", None)}
        results[name] = (replicas.cluster.local_workers, {k: v for k, v in parts.items() if v is not None})
    return results


@pytest.fixture(scope="module")
def alone():
    return {m: trajectories(m) for m in (2, 4, 8)}


@pytest.mark.parametrize("processes, m", [(2, 4), (2, 8), (4, 4), (4, 8), (4, 2), (8, 4)])
def test_one_process_is_p_processes(alone, processes, m):
    for results in spawn(trajectories, processes, m):
        for name, (ranks, parts) in results.items():
            whole = alone[m][name][1]
            for key, value in parts.items():
                expected = whole[key] if len(whole[key]) == 1 else whole[key][list(ranks)]
                torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12, msg=lambda text: f"{name} {key}: {text}")


def gossip_alone_bits(m) -> torch.Tensor:
    return trajectories_of("sgp", m), trajectories_of("osgp", m)


def trajectories_of(base, m):
    replicas, algorithm = build(quadratic(m), m, base, nesterov)
    with mock.patch.object(slowmo.train, "where_it_pays", lambda *_: None):  # it needs two rows, and sums in another order
        return replicas.cluster.local_workers, run(quadratic(m), replicas, algorithm, STEPS, 0.1)


@pytest.mark.parametrize("processes", [2, 4])
def test_gossip_is_bitwise_the_same_under_another_folding(processes):
    whole = gossip_alone_bits(4)
    for results in spawn(gossip_alone_bits, processes, 4):
        for (ranks, x), (_, expected) in zip(results, whole):
            assert torch.equal(x, expected[list(ranks)])


def shifted(m, hops):
    cluster = Cluster(m)
    rows = torch.tensor([[float(i), i + 0.5, -i] for i in cluster.local_workers])
    received = {hop: cluster.shift(rows, hop, torch.empty_like(rows))() for hop in hops}
    return cluster.local_workers, received, cluster.mean(rows)


@pytest.mark.parametrize("processes, m", [(1, 5), (2, 6), (3, 3), (3, 6), (6, 3)])
def test_shift_and_mean(processes, m):
    hops = range(-1, m + 2)
    results = [shifted(m, hops)] if processes == 1 else spawn(shifted, processes, m, hops)
    for ranks, received, mean in results:
        for hop, rows in received.items():
            senders = [(i - hop) % m for i in ranks]
            assert rows.tolist() == [[float(j), j + 0.5, -j] for j in senders]
        assert mean.tolist() == [[(m - 1) / 2, (m - 1) / 2 + 0.5, -(m - 1) / 2]]


def test_fold():
    assert [fold(32, p) for p in (1, 8, 32, 64)] == [(32, 1), (4, 1), (1, 1), (1, 2)]
    with pytest.raises(ValueError, match="32 workers do not fold onto 5 processes.*divisor of 32.*multiple"):
        fold(32, 5)
    with pytest.raises(ValueError, match="at least one"):
        fold(0, 1)
