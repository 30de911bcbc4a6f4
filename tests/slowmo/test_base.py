"""The base algorithms: what gossip conserves, what the verbs promise, what is refused, gradients that never come."""

import copy

import pytest
import torch
from helpers import (
    BASES,
    Several,
    assert_same_state,
    average,
    buffers,
    build,
    copied,
    irregular,
    quadratic,
    restart,
    run,
    sgd,
    two_groups,
    write,
    write_gradients,
    write_rows,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import spawn
from torch.utils.checkpoint import checkpoint

import slowmo
import slowmo.base
from slowmo.cluster import Cluster
from slowmo.outer import Average, SlowMo
from slowmo.state import load_state_dict, state_dict


def push(replicas, algorithm, steps, lr, seed=0):
    """Steps with random gradients; yields after each."""
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(steps):
        algorithm.start(lr)
        write_gradients(replicas, torch.randn(len(replicas.models), replicas.numel, dtype=torch.float64, generator=generator))
        algorithm.step()
        yield


def scattered(m, base, optimizer=sgd, seed=0, d=6, **more):
    """A base whose workers stand at random points; two segments."""
    replicas, algorithm = build(Several(m, d), m, base, two_groups(optimizer), **more)
    assert len(replicas.segments) == 2
    write_rows(replicas, torch.randn(m, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return replicas, algorithm


def nesterov(parameters):
    return sgd(parameters, momentum=0.9, nesterov=True, weight_decay=0.01)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.1)


def weights(algorithm):
    return getattr(algorithm.base, "w", torch.ones(len(algorithm.replicas.models), 1, dtype=torch.float64))


def numerators(algorithm):
    return (algorithm.replicas.rows() * weights(algorithm)).sum(0)


# --- conservation ---


def conserves(m, base, steps, seed):
    replicas, algorithm = scattered(m, base, nesterov, seed)
    before, mean = numerators(algorithm), replicas.rows().mean(0, keepdim=True)
    for _ in push(replicas, algorithm, steps, lr=0.0, seed=seed):
        torch.testing.assert_close(numerators(algorithm), before, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(algorithm.w.sum(), torch.tensor(float(m), dtype=torch.float64), rtol=1e-12, atol=0)
        torch.testing.assert_close(average(algorithm), mean, rtol=1e-12, atol=1e-12)
    return algorithm


regular = st.sampled_from([slowmo.Exponential, lambda m: slowmo.Exponential(m, peers=2), slowmo.Ring, slowmo.Complete])
kinds = st.sampled_from([slowmo.SGP, slowmo.OSGP])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(m=st.integers(1, 9), steps=st.integers(1, 6), graph=regular, kind=kinds, seed=st.integers(0, 99))
def test_a_regular_graph_conserves_the_sum_and_all_weights(m, steps, graph, kind, seed):
    algorithm = conserves(m, lambda replicas, optimizer: kind(replicas, optimizer, graph(m)), steps, seed)
    assert (algorithm.w == 1).all() and algorithm.regular


def random_mixing(m, count, seed):
    matrices = torch.rand(count, m, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.01
    return slowmo.Mixing(m, matrices / matrices.sum(1, keepdim=True))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(m=st.integers(1, 6), steps=st.integers(1, 8), count=st.integers(1, 3), kind=kinds, seed=st.integers(0, 9999))
def test_any_mixing_conserves_the_sums(m, steps, count, kind, seed):
    """mean(Px) = mean(x), and the sum of the weights, under random column-stochastic matrices."""
    graph = random_mixing(m, count, seed)
    conserves(m, lambda replicas, optimizer: kind(replicas, optimizer, graph), steps, seed)


@pytest.mark.parametrize("kind", [slowmo.SGP, slowmo.OSGP])
def test_a_round_without_messages_conserves_the_sums(kind):
    matrices = torch.stack([torch.tensor([[0.5, 0.25], [0.5, 0.75]]), torch.eye(2)])
    conserves(2, lambda replicas, optimizer: kind(replicas, optimizer, slowmo.Mixing(2, matrices)), 4, 0)


@pytest.mark.parametrize("kind", [slowmo.SGP, slowmo.OSGP])
def test_irregular_mixing_reaches_the_average_through_weights(kind):
    replicas, algorithm = scattered(5, lambda replicas, optimizer: kind(replicas, optimizer, irregular(5)))
    mean, apart = replicas.rows().mean(0), 0
    for _ in push(replicas, algorithm, 150, lr=0.0):
        apart = max(apart, (algorithm.w - 1).abs().max().item())
    assert apart > 0.1
    torch.testing.assert_close(replicas.rows(), mean.expand(5, -1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("base", ["sgp", "osgp", "sgp_irregular", "osgp_irregular", "dpsgd"])
@pytest.mark.parametrize("m", [1, 3, 4])
@pytest.mark.parametrize("averages", [False, True])
def test_iterates_are_the_matrix_recursion(base, m, averages):
    """x <- P(x - γd) of SGP, x <- Px - γd of the others, w <- Pw, z = x / w, with plain matrices.

    averages: every third step ends with the exact average, gossip before it or not: the recursion here keeps it, the library drops it.
    """
    replicas, algorithm = scattered(m, base, outer=(lambda base: Average(base, 3)) if averages else None)
    x, w, generator = replicas.rows(), torch.ones(m, 1, dtype=torch.float64), torch.Generator().manual_seed(1)
    for step, _ in enumerate(push(replicas, algorithm, 8, lr=0.2)):
        P = slowmo.mixing_matrix(algorithm.base.graph, step)  # the graph's phase counts dropped rounds too
        d = torch.randn(m, 6, dtype=torch.float64, generator=generator)
        x, w = P @ (x - 0.2 * d) if base.startswith("sgp") else P @ x - 0.2 * d, P @ w
        if averages and step % 3 == 2:
            x, w = (x.sum(0) / w.sum()).expand_as(x), torch.ones_like(w)
        torch.testing.assert_close(algorithm.base.w, w, rtol=1e-13, atol=0)
        torch.testing.assert_close(replicas.rows(), x / w, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(m=st.integers(1, 6), tau=st.integers(1, 4), count=st.integers(1, 3), seed=st.integers(0, 9999), kind=kinds, exact=st.booleans())
def test_gossip_that_is_dropped_would_have_changed_nothing(m, tau, count, seed, kind, exact):
    """Against a base that gossips at every step and averages after it, over any graph; noaverage keeps its gossip."""
    graph = random_mixing(m, count, seed)
    base = lambda replicas, optimizer: kind(replicas, optimizer, graph)
    replicas, algorithm = scattered(m, base, nesterov, seed, outer=lambda b: SlowMo(b, tau, alpha=0.9, beta=0.6, exact=exact))
    others, twin = scattered(m, base, nesterov, seed)
    x0 = average(twin) if exact else others.rows()
    u = torch.zeros_like(x0)
    for step, (_, _) in enumerate(zip(push(replicas, algorithm, 9, 0.1, seed), push(others, twin, 9, 0.1, seed), strict=True), 1):
        if step % tau == 0:
            x = average(twin) if exact else others.rows()
            u = 0.6 * u + (x0 - x) / 0.1
            x0 = x0 - 0.9 * 0.1 * u
            blocks = [torch.zeros(len(x0), segment.x.shape[1], dtype=torch.float64) for segment in others.segments]
            write(others, blocks, x0)
            restart(twin, blocks, "reset", exact)
        torch.testing.assert_close(replicas.rows(), others.rows(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(algorithm.base.w, twin.w, rtol=1e-12, atol=0)


def test_gossip_of_buffers_averages_them_too():
    replicas, algorithm = scattered(4, "sgp_double", lambda parameters: sgd(parameters, momentum=0.9))
    list(push(replicas, algorithm, 3, lr=0.1))
    before = buffers(algorithm)["momentum_buffer"].mean(0)
    for _ in range(2):  # two rounds of four workers: the exact average; gradients are zero, so buffers only shrink
        algorithm.start(0.0)
        algorithm.step()
    torch.testing.assert_close(buffers(algorithm)["momentum_buffer"], (before * 0.81).expand(4, -1))


@pytest.mark.parametrize("kind, gossiped", [("maintain", True), ("reset", False), ("average", False)])
def test_buffers_gossip_at_a_slow_step_only_where_they_go_on_from_there(kind, gossiped):
    make = lambda outer: scattered(4, "sgp_double", lambda parameters: sgd(parameters, momentum=0.9), outer=outer)
    replicas, algorithm = make(lambda base: Average(base, 3, kind))
    others, twin = make(None)
    list(push(replicas, algorithm, 2, lr=0.1)), list(push(others, twin, 2, lr=0.1))
    sent, shift = [], replicas.cluster.shift
    replicas.cluster.shift = lambda *a: sent.append(1) or shift(*a)
    list(push(replicas, algorithm, 1, lr=0.1, seed=3)), list(push(others, twin, 1, lr=0.1, seed=3))
    assert len(sent) == (2 if gossiped else 0)  # of two segments
    mine, theirs = buffers(algorithm)["momentum_buffer"], buffers(twin)["momentum_buffer"]
    if kind == "maintain":
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)
    elif kind == "average":  # mixing keeps the mean of buffers too
        torch.testing.assert_close(mine, theirs.mean(0, keepdim=True).expand(4, -1), rtol=1e-13, atol=1e-13)
    else:
        assert not mine.any()


# --- verbs ---


@pytest.mark.parametrize("base", BASES)
def test_average_changes_nothing_and_is_exact(base):
    replicas, algorithm = scattered(5, base, nesterov)
    for _ in push(replicas, algorithm, 3, lr=0.1):
        before = copied(state_dict(algorithm))
        w, z = weights(algorithm), replicas.rows()
        mean = algorithm.average()
        torch.testing.assert_close(replicas.flat(mean), (z * w).sum(0, keepdim=True) / w.sum(), rtol=1e-13, atol=1e-13)
        assert_same_state(state_dict(algorithm), before)
        mine = {segment.x.untyped_storage().data_ptr() for segment in replicas.segments}
        assert not mine & {block.untyped_storage().data_ptr() for block in mean}


@pytest.mark.parametrize("kind", slowmo.engine.BUFFERS)
@pytest.mark.parametrize("base", ["sgp_irregular", "osgp_irregular"])
def test_restart_settles_the_weights(base, kind):
    replicas, algorithm = scattered(4, base, adam)
    list(push(replicas, algorithm, 3, lr=0.1))
    assert (algorithm.w != 1).any()
    w = algorithm.w.clone()
    restart(algorithm, [segment.x.detach().clone() for segment in replicas.segments], kind, exact=False)
    assert torch.equal(algorithm.w, w)  # own iterates: debts stay
    x = algorithm.average()
    flat = replicas.flat(x)
    restart(algorithm, x, kind)
    assert (algorithm.w == 1).all() and torch.equal(replicas.rows(), flat.expand(4, -1))
    assert torch.equal(torch.cat([p.detach() for p in replicas.models[2].parameters()]), flat[0])  # models see it


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("overlap", [False, True])
def test_start_may_be_forgotten_or_called_twice(base, overlap):
    results = []
    for starts in (1, 0, 2):
        replicas, algorithm = scattered(4, base, nesterov, overlap=overlap)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            for _ in range(starts):
                algorithm.start(0.5)  # the optimizer's rate too
            write_gradients(replicas, torch.randn(4, 6, dtype=torch.float64, generator=generator))
            algorithm.step()
        results.append(replicas.rows())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("base", BASES)
def test_step_zeroes_gradients_and_counts(base):
    replicas, algorithm = scattered(2, base)
    for step, _ in enumerate(push(replicas, algorithm, 2, lr=None), 1):
        assert algorithm.steps == step and not replicas.gradients().any()
        assert all(p.grad is g for segment in replicas.segments for p, _, g in segment.members)


def test_restart_refuses_a_word_it_does_not_know():
    replicas, algorithm = build(quadratic(2), 2, "local_sgd")
    before = replicas.rows()
    with pytest.raises(ValueError, match="choose one of reset, maintain, average"):
        restart(algorithm, [block + 1 for block in algorithm.average()], "forget")
    assert torch.equal(replicas.rows(), before)
    for outer in (Average, SlowMo):
        with pytest.raises(ValueError, match="choose one of reset, maintain, average"):
            build(quadratic(2), 2, "local_sgd", outer=lambda base: outer(base, 3, buffers="forget"))


# --- refusals ---


@pytest.mark.parametrize("m", [3, 4, 8])
def test_dpsgd_refuses_a_directed_graph(m):
    for graph in (slowmo.Exponential(m), irregular(m)):
        with pytest.raises(ValueError, match="symmetric.*choose base/graph=ring or complete"):
            build(quadratic(m), m, lambda replicas, optimizer: slowmo.DPSGD(replicas, optimizer, graph))
    for graph in (slowmo.Ring(m), slowmo.Complete(m)):
        build(quadratic(m), m, lambda replicas, optimizer: slowmo.DPSGD(replicas, optimizer, graph))


def test_a_graph_of_another_size_is_refused():
    with pytest.raises(ValueError, match="5 workers for a cluster of 4"):
        build(quadratic(4), 4, lambda replicas, optimizer: slowmo.SGP(replicas, optimizer, slowmo.Exponential(5)))


# --- gradients that never come ---


class Forks(torch.nn.Module):
    """Layers registered in another order than they are used, and one that only some workers use."""

    def __init__(self, wide=8):
        super().__init__()
        torch.manual_seed(3)
        self.last = torch.nn.Linear(wide, 2)
        self.sometimes = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])
        self.first = torch.nn.Linear(3, 4)
        self.wide = torch.nn.Linear(4, wide)
        self.double()

    def forward(self, x, use):
        x = torch.tanh(self.first(x))
        for k in use:
            x = torch.tanh(self.sometimes[k](x))
        return self.last(torch.tanh(self.wide(x))).square().sum()


def uses(worker, everything):
    return [1, 0] if everything else [worker % 2]


def inputs(worker, step=0, place=0):
    return torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * worker + 10 * step + place))


def gradient(model, worker, everything, place=0):
    """What autograd alone gives, as a flat row; zeros where nothing comes."""
    model = copy.deepcopy(model)
    model.zero_grad()
    model(inputs(worker, place=place), uses(worker, everything)).backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_a_layer_without_gradient_is_averaged_all_the_same(base, overlap):
    model, m = Forks(), 2
    start, gradients = flat(model), torch.stack([gradient(model, i, everything=False) for i in range(m)])
    assert ((gradients == 0) != (gradients.flip(0) == 0)).any()  # somebody has what the other lacks
    replicas, algorithm = build(Model(model), m, base, overlap=overlap)
    algorithm.start(0.5)
    for i, replica in enumerate(replicas.models):
        replica(inputs(i), uses(i, False)).backward()
    algorithm.step()
    expected = start - 0.5 * gradients
    if base == "allreduce":
        expected = expected.mean(0, keepdim=True).expand(m, -1)
        torch.testing.assert_close(replicas.rows(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(average(algorithm)[0], expected.mean(0), rtol=1e-12, atol=1e-12)
    restart(algorithm, algorithm.average())
    assert all(torch.equal(p, q) for p, q in zip(replicas.models[0].parameters(), replicas.models[1].parameters()))


class Model:
    """The least a task is to `build`."""

    def __init__(self, model):
        self._model = model

    def model(self):
        return self._model


def reduced(m, everything, passes, base="allreduce", told=True, overlap=False):
    """One step on real processes: (error against autograd alone, of what is seen between backward and step, too; buckets; how many of
    them have left when the last backward returns).

    told: the replicas know how many backward passes there are, and `start` comes before the first; else before the last.
    """
    model, cluster = Forks(wide=256), Cluster(m)
    meet = range(m) if base == "allreduce" else cluster.local_workers  # Local SGD: only the ranks of one worker
    workers = [(i, place) for i in meet for place in range(cluster.worker_size)]
    start = flat(model)
    mean = torch.stack([gradient(model, i, everything, place) for i, place in workers]).mean(0)
    replicas, algorithm = build(
        Model(model), m, base, cluster=cluster, bucket_cap_mb=1e-4, accumulate=passes if told else 1, overlap=overlap
    )
    for k in range(passes):
        if k == (0 if told else passes - 1):
            algorithm.start(0.5)
        assert not algorithm.handover.first_unsent  # nothing leaves too early
        for i, replica in zip(cluster.local_workers, replicas.models):
            replica(inputs(i, place=cluster.worker_rank), uses(i, everything)).backward()
    early = algorithm.handover.first_unsent
    seen = 0.0 if overlap else (replicas.gradients() - passes * mean).abs().max().item()
    algorithm.step()
    expected = start - 0.5 * passes * mean
    return max(seen, (replicas.rows() - expected).abs().max().item()), len(replicas.buckets), early


def reduced_everywhere(two):
    """two: on two processes; else two workers of two processes each."""
    if two:
        cases = [(m, everything, 1, "allreduce") for m in (1, 2, 4) for everything in (True, False)]
        cases += [(2, everything, passes, "allreduce", told) for everything in (True, False) for passes, told in ((2, False), (3, True))]
        cases += [(2, everything, 1, "allreduce", True, True) for everything in (True, False)]
    else:
        cases = [(2, everything, 1, base, True, overlap) for everything in (True, False) for base in ("allreduce", "local_sgd")
                 for overlap in (False, True)]  # fmt: skip
    return {case: reduced(*case) for case in cases}


@pytest.mark.parametrize("processes", [2, 4])
def test_gradients_are_averaged_in_buckets_whatever_is_missing(processes):
    """Over all workers, or inside a worker of several ranks."""
    for results in spawn(reduced_everywhere, processes, processes == 2):
        for (m, everything, passes, base, *more), (error, buckets, early) in results.items():
            assert error < 1e-12, (m, everything, more)
            assert buckets >= 3
            # gradients are final when backward returns; where buckets are stepped early, a missing one holds back what comes after it
            held = not everything and more[1:] == [True]
            assert 0 < early < buckets if held else early == buckets, (m, everything, more, early)


def clipped(checkpointed):
    """A user's loop that clips, with layers that got no gradient on one rank: this rank's weights, and DDP's."""
    model, cluster = Forks(wide=256), Cluster()
    if checkpointed:  # the first layers' backward is one of its own within the other, and ends before it
        first = model.first.forward
        model.first.forward = lambda x: checkpoint(first, x.requires_grad_(), use_reentrant=True)
    theirs = torch.nn.parallel.DistributedDataParallel(Forks(wide=256), find_unused_parameters=True)
    ours = slowmo.SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.5), "allreduce", cluster=cluster, bucket_cap_mb=1e-4)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.5)
    for step in range(3):
        for net, optimizer in ((model, ours), (theirs, plain)):
            net(inputs(cluster.rank, step), uses(cluster.rank, False)).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
    return flat(model), flat(theirs)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_clipping_sees_the_mean_of_gradients_that_are_missing_on_a_rank(checkpointed):
    (ours, theirs), (other, _) = spawn(clipped, 2, checkpointed)
    assert torch.equal(ours, other)  # a norm that differs between ranks lets them drift apart
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# --- messages ---


def begun_twice():
    results = []
    for base in ("osgp", "dpsgd", "osgp_irregular"):
        for starts in (1, 0, 2):
            task = quadratic(4)
            replicas, algorithm = build(task, 4, base)
            for step in range(3):
                for _ in range(starts):
                    algorithm.start(0.5)
                for model, batch in zip(replicas.models, task.batches(step, replicas.cluster.local_workers, (0, 1))):
                    task.loss(model, batch).backward()
                algorithm.step()
            results.append((replicas.rows(), replicas.cluster.local_workers))
    return results


def test_messages_before_the_gradients_survive_a_forgotten_and_a_second_start():
    whole = begun_twice()
    for results in spawn(begun_twice, 2):
        for k in range(0, 9, 3):
            assert torch.equal(results[k][0], results[k + 1][0]) and torch.equal(results[k][0], results[k + 2][0])
        for (rows, workers), (expected, _) in zip(results, whole):
            torch.testing.assert_close(rows, expected[list(workers)], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name, dtype", [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_messages_are_rounded_wherever_the_receiver_lives(name, dtype):
    """One round by hand, x <- (x + rounded x of the neighbour) / 2, and the same bits on processes."""
    kinds = [lambda replicas, optimizer, kind=kind: kind(replicas, optimizer, comm_dtype=name) for kind in (slowmo.SGP, slowmo.OSGP)]
    start = torch.arange(12.0, dtype=torch.float64).reshape(4, 3) / 7

    def rounds(steps, base):
        replicas, algorithm = build(quadratic(4, d=3), 4, base)
        write_rows(replicas, start[list(replicas.cluster.local_workers)])
        for _ in range(steps):
            algorithm.start(0.0)
            algorithm.step()
        assert (algorithm.w == 1).all()
        return replicas.rows()

    expected = (start + start.roll(1, 0).to(dtype).double()) / 2
    assert not torch.equal(expected, (start + start.roll(1, 0)) / 2)
    torch.testing.assert_close(rounds(1, kinds[0]), expected, rtol=0, atol=0)
    wholes = [rounds(5, kind) for kind in kinds]
    for processes in (2, 4, 8):  # of 8 two share a worker, each carries half of its message
        for results in spawn(lambda: [rounds(5, kind) for kind in kinds], processes):
            for part, whole in zip(results, wholes):
                assert (part[:, None] == whole).all(2).any(1).all() and len(part) == max(1, 4 // processes)


def test_exact_averages_are_never_rounded():
    base = lambda replicas, optimizer: slowmo.SGP(replicas, optimizer, comm_dtype="bfloat16")
    replicas, algorithm = scattered(3, base, outer=lambda base: Average(base, 1))
    mean = replicas.rows().mean(0, keepdim=True)
    algorithm.start(0.0)
    algorithm.step()
    torch.testing.assert_close(replicas.rows(), mean.expand(3, -1), rtol=1e-15, atol=1e-15)


def test_unequal_weights_are_never_rounded():
    graph = slowmo.Mixing(3, [[0.5, 0.1, 0.3], [0.2, 0.7, 0.3], [0.3, 0.2, 0.4]])
    weights = []
    for dtype in (None, "bfloat16"):
        _, algorithm = build(quadratic(3), 3, lambda replicas, optimizer: slowmo.SGP(replicas, optimizer, graph, comm_dtype=dtype))
        for _ in range(3):
            algorithm.start(0.0)
            algorithm.step()
        weights.append(algorithm.w)
    assert torch.equal(*weights) and (weights[0] != 1).all()


def test_another_message_dtype_is_refused():
    with pytest.raises(ValueError, match="choose bfloat16, float16, or null"):
        build(quadratic(2), 2, lambda replicas, optimizer: slowmo.SGP(replicas, optimizer, comm_dtype="int8"))


def test_recv_buffers_are_what_arrivals_take():
    """SGP's first message comes into the spent gradients."""
    for base, m, expected in (("sgp", 1, 0), ("sgp", 4, 0), ("osgp", 1, 0), ("osgp", 4, 1), ("dpsgd", 4, 2), ("local_sgd", 4, 0),
                              ("sgp_irregular", 4, 2)):  # fmt: skip
        replicas, algorithm = build(Several(m), m, base, two_groups(sgd))
        list(push(replicas, algorithm, 3, 0.1))
        inboxes = algorithm.gossip._inboxes if isinstance(algorithm, slowmo.SGP) else ()
        assert algorithm.recv_buffers() == expected == len(inboxes) / len(replicas.segments), base
    _, algorithm = build(quadratic(4), 4, lambda replicas, optimizer: slowmo.OSGP(replicas, optimizer, comm_dtype="bfloat16"))
    assert algorithm.recv_buffers() == 1 + 2 / 4  # two messages of 2 bytes a number beside rows of 8


def test_comm_volume_by_hand():
    rounded = build(quadratic(4), 4, lambda replicas, optimizer: slowmo.OSGP(replicas, optimizer, comm_dtype="bfloat16"))[1]
    assert rounded.comm_volume() == (1, 2 / 8)
    for m in (1, 2, 3, 8):
        made = lambda base: build(quadratic(m), m, base)[1]
        assert made("local_sgd").comm_volume() == (0, 0)
        assert made("sgp").comm_volume() == made("osgp").comm_volume() == ((1, 1) if m > 1 else (0, 0))
        assert made("sgp").comm_volume("reset") == made("osgp").comm_volume("maintain") == (0, 0)  # dropped
        assert made("dpsgd").comm_volume() == (min(m - 1, 2),) * 2
        assert made("allreduce").comm_volume() == ((2 * (m - 1), 2 * (m - 1) / m) if m > 1 else (0, 0))


class Counting(Cluster):
    """Counts what one of its workers sends, in numbers and in bytes, and what is under way; all workers are here."""

    def __init__(self, m):
        super().__init__(m)
        self.numbers = self.bytes = self.messages = 0
        self.under_way = []

    def _count(self, elements, itemsize, messages, finish):
        self.numbers += elements
        self.bytes += elements * itemsize
        self.messages += messages
        self.under_way.append(finish)

        def wait(*a):
            if finish in self.under_way:
                self.under_way.remove(finish)
            return finish(*a)

        return wait

    def shift(self, rows, offset, out, dtype=None):
        finish = super().shift(rows, offset, out)  # rounding would shift once more
        return self._count(rows.shape[1], (dtype or rows.dtype).itemsize, 1, lambda: out.copy_(finish().to(dtype or out.dtype)))

    def mean(self, rows, wait=True):
        m, finish = self.num_workers, super().mean(rows, wait=False)
        counted = self._count(2 * (m - 1) / m * rows.shape[1], rows.dtype.itemsize, 2 * (m - 1), finish)
        return counted() if wait else counted


@pytest.mark.parametrize("outer", [
    None, lambda base: Average(base, 3, "average"), lambda base: Average(base, 2), lambda base: SlowMo(base, 4),
    lambda base: SlowMo(base, 3, buffers="maintain"), lambda base: SlowMo(base, 3, exact=False),
], ids=["none", "average average", "average", "slowmo", "slowmo maintain", "noaverage"])  # fmt: skip
@pytest.mark.parametrize("base", ["sgp", "osgp", "dpsgd", "sgp_double", "local_sgd", "rounded"])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_comm_volume_is_what_is_sent(base, outer, m):
    """Counted where it leaves, over whole rounds and whole cycles of the graph; and nothing is under way between steps."""
    made = (lambda replicas, optimizer: slowmo.SGP(replicas, optimizer, comm_dtype="bfloat16")) if base == "rounded" else base
    cluster = Counting(m)
    replicas, algorithm = build(Several(m), m, made, two_groups(nesterov), outer, cluster)
    d = sum(segment.x.shape[1] for segment in replicas.segments)
    list(push(replicas, algorithm, 12, 0.1))  # buffers are there after the first step; 12 is a multiple of every τ and cycle
    cluster.numbers = cluster.bytes = cluster.messages = 0
    for _ in push(replicas, algorithm, 12, 0.1):
        assert not cluster.under_way
    messages, numbers = algorithm.comm_volume()
    assert cluster.messages == pytest.approx(12 * messages * len(replicas.segments))
    assert cluster.bytes == pytest.approx(12 * numbers * d * 8)
    assert (cluster.bytes < 8 * cluster.numbers) == (base == "rounded" and m > 1)


def between_steps(m):
    """What is under way after each step, of every base, stepped in backward; on real processes."""
    counted, waiting = [], []

    class Watched(Cluster):
        def shift(self, *a):
            return self.watch(super().shift(*a))

        def mean(self, rows, wait=True):
            return super().mean(rows) if wait else self.watch(super().mean(rows, wait=False))

        def all_reduce(self, values, op="sum", inside=False, wait=True):
            return super().all_reduce(values, op, inside) if wait else self.watch(super().all_reduce(values, op, inside, False))

        def watch(self, finish):
            waiting.append(finish)
            counted.append(finish)

            def wait():
                if finish in waiting:
                    waiting.remove(finish)
                return finish()

            wait.is_completed = getattr(finish, "is_completed", None)
            return wait

    cluster, results = Watched(m), {}
    for base in BASES:
        for overlap in (False, True):
            counted.clear()
            replicas, algorithm = build(Several(m), m, base, nesterov, lambda b: SlowMo(b, 3), cluster, 1e-5, overlap=overlap)
            left = []
            for step in range(7):
                algorithm.start(0.1)
                for model, batch in zip(replicas.models, Several(m).batches(step, cluster.local_workers, (0, 1))):
                    Several(m).loss(model, batch).backward()
                algorithm.step()
                left.append(len(waiting))
            results[base, overlap] = left, len(counted)
    return results


@pytest.mark.parametrize("processes, m", [(2, 4), (4, 2)])
def test_nothing_is_in_flight_between_steps(processes, m):
    for results in spawn(between_steps, processes, m):
        for case, (left, counted) in results.items():
            assert left == [0] * 7 and counted > 0, case


def test_training_converges_to_the_minimum_of_the_sum():
    task = quadratic(4, d=3, noise=0.0)
    best = torch.linalg.solve(task.A.sum(0), torch.einsum("wij,wj->i", task.A, task.b))
    for base in BASES:
        replicas, algorithm = build(task, 4, base, outer=lambda base: Average(base, tau=1))
        rows = run(task, replicas, algorithm, 30, lr=0.8)
        torch.testing.assert_close(rows, best.expand_as(rows), rtol=1e-6, atol=1e-6)


def test_osgp_sends_before_the_gradients_and_not_where_an_average_follows():
    replicas, algorithm = build(quadratic(4), 4, "osgp", outer=lambda base: Average(base, 2))
    calls, shift, mean = [], replicas.cluster.shift, replicas.cluster.mean
    replicas.cluster.shift = lambda *a: calls.append("shift") or shift(*a)
    replicas.cluster.mean = lambda *a, **k: calls.append("mean") or mean(*a, **k)
    seen = []
    for _ in range(4):
        for part in (lambda: algorithm.start(0.1), algorithm.step):
            part()
            seen.append(calls[:])
            calls.clear()
    assert seen == [["shift"], [], [], ["mean"]] * 2


def test_osgp_load_drops_the_message_of_the_run_that_is_left_behind():
    """A load between start and step: the message is waited for (a dropped handle hangs gloo), and not used."""
    replicas, algorithm = scattered(4, "osgp")
    saved = copied(state_dict(algorithm))
    others, twin = scattered(4, "osgp")
    waited, shift = [], replicas.cluster.shift

    def spy(*a):
        receive = shift(*a)
        return lambda: waited.append(True) or receive()

    replicas.cluster.shift = spy
    for _ in push(replicas, algorithm, 3, 0.1):  # now it stands elsewhere
        pass
    algorithm.start(0.1)
    before = len(waited)
    load_state_dict(algorithm, saved)
    assert len(waited) == before + len(replicas.segments) and not algorithm.started
    for each in (algorithm, twin):
        each.start(0.1)
        each.step()
    assert torch.equal(replicas.rows(), others.rows()) and algorithm.steps == 1


def test_the_default_graphs():
    for kind, graph in ((slowmo.SGP, slowmo.Exponential), (slowmo.OSGP, slowmo.Exponential), (slowmo.DPSGD, slowmo.Ring)):
        _, algorithm = build(quadratic(4), 4, lambda replicas, optimizer: kind(replicas, optimizer))
        assert type(algorithm.graph) is graph and algorithm.graph.size == 4


def test_a_group_that_takes_no_part_in_a_slow_step_keeps_its_average():
    """Learning rate 0 in one group: its rows still belong to the push-sum weights of before."""
    replicas, algorithm = build(Several(3), 3, "sgp_irregular", two_groups(sgd), lambda base: SlowMo(base, 3, beta=0.5))
    write_rows(replicas, torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    replicas.forget()
    for step in range(5):
        algorithm.start()
        write_gradients(replicas, torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step)))
        algorithm.base.optimizer.param_groups[1]["lr"] = 0.0
        still = next(k for k, segment in enumerate(replicas.segments) if segment.group == 1)
        before = algorithm.base.average()[still].clone()
        assert step == 0 or (algorithm.base.w != 1).any()
        algorithm.step()  # SGP at rate 0 only mixes, and a slow step changes nothing
        torch.testing.assert_close(algorithm.base.average()[still], before, rtol=1e-12, atol=1e-12)
