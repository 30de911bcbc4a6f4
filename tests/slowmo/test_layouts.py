"""One rank = P ranks: the same iterates under every layout, for every base, outer and buffers."""

import functools
import itertools
import time

import pytest
import torch
import torch.distributed as dist
from helpers import BASES, Several, average, build, run, sgd, slow, two_groups
from processes import spawn

from slowmo.cluster import Cluster, layout
from slowmo.engine import BUFFERS
from slowmo.outer import Average, NesterovOuter, SlowMo

TAU, STEPS = 2, 7  # three slow steps and a part of a round


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.1)


def nesterov(parameters):
    return sgd(parameters, momentum=0.9, nesterov=True, weight_decay=0.01)


def outers():
    yield "none", None
    for buffers in BUFFERS:
        yield f"average-{buffers}", lambda base, b=buffers: Average(base, tau=TAU, buffers=b)
        yield f"slowmo-{buffers}", lambda base, b=buffers: SlowMo(base, tau=TAU, beta=0.6, buffers=b)
        yield f"noaverage-{buffers}", lambda base, b=buffers: SlowMo(base, tau=TAU, beta=0.6, buffers=b, exact=False)
    yield "diloco", lambda base: NesterovOuter(base, tau=TAU, alpha=0.7, beta=0.9, buffers="maintain")


def cases():
    for base, (outer, make) in itertools.product(BASES, outers()):
        if "_" not in base.removeprefix("local_") or outer in ("none", "slowmo-reset", "noaverage-maintain"):
            yield f"{base} {outer}", base, make, nesterov
    yield "osgp slowmo adam", "osgp", lambda base: SlowMo(base, tau=TAU, beta=0.6, buffers="maintain"), adam
    yield "sgp_double adam", "sgp_double", None, adam


def trajectories(m) -> dict:
    """x of the workers hosted here after STEPS steps, the average, u and w, for every case; every parameter is a bucket."""
    results, cluster = {}, Cluster(m)
    for name, base, outer, optimizer in cases():
        replicas, algorithm = build(Several(m), m, base, two_groups(optimizer), outer, cluster, 1e-6)
        lr = lambda step: 0.3 / (1 + step // 4)
        parts = {"x": run(Several(m), replicas, algorithm, STEPS, lr), "mean": average(algorithm)}
        if algorithm.slow:
            parts["u"] = slow(algorithm, "u")
        if hasattr(algorithm.base, "w"):
            parts["w"] = algorithm.base.w
        assert cluster.world_size == 1 or len(replicas.buckets) == 3
        results[name] = parts
    return cluster.local_workers, results


@functools.cache
def alone(m):
    return trajectories(m)[1]


@pytest.mark.parametrize(
    "processes, m", [(2, 4), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((4, 2), (2, 8), (4, 4), (4, 8), (8, 4)))]
)
def test_one_rank_is_p_ranks(processes, m):
    for workers, results in spawn(trajectories, processes, m):
        for name, parts in results.items():
            for key, value in parts.items():
                expected = alone(m)[name][key]
                expected = expected if len(expected) == 1 else expected[list(workers)]
                torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12, msg=lambda text: f"{name} {key}: {text}")


def gossip_alone(m, cap) -> tuple:
    return trajectories_of("sgp", m, cap), trajectories_of("osgp", m, cap)


def trajectories_of(base, m, cap):
    replicas, algorithm = build(Several(m), m, base, two_groups(nesterov), bucket_cap_mb=cap, overlap=cap < 1)
    return replicas.cluster.local_workers, run(Several(m), replicas, algorithm, STEPS, 0.1)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("cap", [1e-6, 25.0])
def test_gossip_is_bitwise_the_same_under_another_layout(processes, cap):
    whole = gossip_alone(4, 25.0)
    for results in spawn(gossip_alone, processes, 4, cap):
        for (workers, x), (_, expected) in zip(results, whole):
            assert torch.equal(x, expected[list(workers)])


def shifted(m, hops):
    cluster = Cluster(m)
    rows = torch.tensor([[float(i), i + 0.5, -i] for i in cluster.local_workers])
    received = {hop: cluster.shift(rows, hop, torch.empty_like(rows))() for hop in hops}
    return cluster.local_workers, received, cluster.mean(rows)


@pytest.mark.parametrize("processes, m", [(1, 5), (2, 6), (3, 3), (3, 6), (6, 3)])
def test_shift_and_mean(processes, m):
    hops = range(-1, m + 2)
    results = [shifted(m, hops)] if processes == 1 else spawn(shifted, processes, m, hops)
    for workers, received, mean in results:
        for hop, rows in received.items():
            senders = [(i - hop) % m for i in workers]
            assert rows.tolist() == [[float(j), j + 0.5, -j] for j in senders]
        assert mean.tolist() == [[(m - 1) / 2, (m - 1) / 2 + 0.5, -(m - 1) / 2]]


def test_layout():
    assert [layout(32, p) for p in (1, 8, 32, 64)] == [(32, 1), (4, 1), (1, 1), (1, 2)]
    with pytest.raises(ValueError, match="32 workers do not fit on 5 ranks.*divisor of 32.*multiple"):
        layout(32, 5)
    with pytest.raises(ValueError, match="at least one"):
        layout(0, 1)


def places(m):
    cluster = Cluster(m)
    shared = torch.tensor([float(cluster.rank)])
    cluster.all_reduce(shared, inside=True)
    own = cluster.all_gather_in_worker(torch.tensor([float(cluster.rank)])).flatten().tolist()
    everybody = cluster.all_gather_object(cluster.rank)
    return (cluster.num_workers, list(cluster.local_workers), cluster.worker_size, cluster.worker_rank, cluster.rank, cluster.world_size,
            cluster.is_main, float(shared), own, everybody, cluster.all_reduce_max(cluster.rank),
            cluster.broadcast_object(cluster.rank))  # fmt: skip


def test_where_everybody_is():
    for rank, found in enumerate(spawn(places, 4, 2)):
        first = rank // 2 * 2  # of this worker's two ranks
        assert found == (2, [rank // 2], 2, rank % 2, rank, 4, rank == 0, 2.0 * first + 1, [first, first + 1], [0, 1, 2, 3], 3, 0)
    for rank, found in enumerate(spawn(places, 2, 4)):
        assert found == (4, [2 * rank, 2 * rank + 1], 1, 0, rank, 2, rank == 0, float(rank), [rank], [0, 1], 1, 0)


def waits_for_nobody(what):
    """Rank 1 is silent; how long rank 0 waits for it, and what it is told. The process group that exists waits for 60 s."""
    cluster = Cluster(2, timeout=2.0)
    if cluster.rank == 1:
        # gone only after the other has given up: a peer that has died is seen at once
        dist.distributed_c10d._get_default_store().wait(["given up"])
        return None
    x = torch.ones(1, 4)
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        if what == "mean":
            cluster.mean(x)
        elif what == "shift":
            cluster.shift(x, 1, torch.empty_like(x))()
        elif what == "all_reduce":
            cluster.all_reduce(x)
        elif what == "broadcast_object":
            cluster.all_gather_object(1)
    seconds = time.monotonic() - begin
    dist.distributed_c10d._get_default_store().set("given up", "yes")
    return seconds, str(caught.value)


@pytest.mark.parametrize("what", ["mean", "shift", "all_reduce", "broadcast_object"])
def test_the_timeout_holds_where_the_process_group_was_there_before(what):
    (seconds, message), _ = spawn(waits_for_nobody, 2, what)
    assert 1.0 < seconds < 20.0
    if what != "broadcast_object":
        assert "rank 0 lost a peer or waited 2 s for one: see the other ranks' messages first" in message


def two_clusters():
    """Two clusters of one process do not take each other's messages, and the caller's group is left as it was."""
    first, second = Cluster(2), Cluster(1)
    x = torch.tensor([[float(first.rank)]])
    wait = first.mean(x, wait=False)
    other = torch.tensor([10.0 * first.rank])
    second.all_reduce(other)
    mine = torch.tensor([1.0])
    dist.all_reduce(mine)
    first.close()
    return float(wait()), float(other), float(mine), dist.is_initialized()


def test_messages_go_through_a_group_of_our_own():
    assert spawn(two_clusters, 2) == [(0.5, 10.0, 2.0, True)] * 2
