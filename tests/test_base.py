"""The base algorithms: what gossip conserves, what the verbs promise, gradients that never come, buckets."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers import BASES, build, irregular, quadratic, run, sgd
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import spawn

import slowmo
from slowmo.base import Buckets
from slowmo.cluster import Cluster
from slowmo.replicas import Replicas

OPTIMIZERS = {
    "sgd": lambda rows: torch.optim.SGD([rows], lr=0.1),
    "nesterov": lambda rows: sgd(rows, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda rows: torch.optim.Adam([rows], lr=0.1),
    "adam-fused": lambda rows: torch.optim.Adam([rows], lr=0.1, fused=True, amsgrad=True),
    "adamw": lambda rows: torch.optim.AdamW([rows], lr=0.1),
    "rmsprop": lambda rows: torch.optim.RMSprop([rows], lr=0.1, momentum=0.5, centered=True),
    "adagrad": lambda rows: torch.optim.Adagrad([rows], lr=0.1),
    "radam": lambda rows: torch.optim.RAdam([rows], lr=0.1),
    "nadam": lambda rows: torch.optim.NAdam([rows], lr=0.1),
    "adadelta": lambda rows: torch.optim.Adadelta([rows], lr=0.1),
    "adamax": lambda rows: torch.optim.Adamax([rows], lr=0.1),
}
names = pytest.mark.parametrize("name", OPTIMIZERS)


def scattered(m, base, optimizer=sgd, seed=0, d=3):
    """A base whose workers stand at random points, with random gradients in place."""
    generator = torch.Generator().manual_seed(seed)
    replicas, algorithm = build(quadratic(m, d), m, base, optimizer)
    replicas.rows.detach()[:, :d] = torch.randn(m, d, dtype=torch.float64, generator=generator)
    return replicas, algorithm


def push(replicas, algorithm, steps, lr, seed=0):
    """Steps with random gradients; yields after each."""
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(steps):
        algorithm.start()
        d = replicas.parameters
        replicas.rows.grad[:, :d] = torch.randn(len(replicas.rows), d, dtype=torch.float64, generator=generator)
        algorithm.step(lr)
        yield


def numerators(algorithm):
    return (algorithm.rows.detach() * algorithm.w).sum(0)


# --- conservation ---


def conserves(m, base, steps, seed):
    replicas, algorithm = scattered(m, base, lambda rows: sgd(rows, momentum=0.9, nesterov=True), seed)
    before, mean = numerators(algorithm), algorithm.rows.detach().mean(0, keepdim=True)
    for _ in push(replicas, algorithm, steps, lr=0.0, seed=seed):
        torch.testing.assert_close(numerators(algorithm), before, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(algorithm.w.sum(), torch.tensor(float(m), dtype=torch.float64), rtol=1e-12, atol=0)
        torch.testing.assert_close(algorithm.average(), mean, rtol=1e-12, atol=1e-12)
    return algorithm


regular = st.sampled_from([slowmo.Exponential, lambda m: slowmo.Exponential(m, peers=2), slowmo.Ring, slowmo.Complete])
kinds = st.sampled_from([slowmo.SGP, slowmo.OSGP])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(m=st.integers(1, 9), steps=st.integers(1, 6), graph=regular, kind=kinds, seed=st.integers(0, 99))
def test_a_regular_graph_conserves_the_sum_and_all_weights(m, steps, graph, kind, seed):
    algorithm = conserves(m, lambda replicas, optimizer: kind(replicas, optimizer, graph(m)), steps, seed)
    assert (algorithm.w == 1).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(m=st.integers(1, 6), steps=st.integers(1, 8), count=st.integers(1, 3), kind=kinds, seed=st.integers(0, 9999))
def test_any_mixing_conserves_the_sums(m, steps, count, kind, seed):
    matrices = torch.rand(count, m, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.01
    graph = slowmo.Mixing(m, matrices / matrices.sum(1, keepdim=True))
    conserves(m, lambda replicas, optimizer: kind(replicas, optimizer, graph), steps, seed)


@pytest.mark.parametrize("kind", [slowmo.SGP, slowmo.OSGP])
def test_a_round_without_messages_conserves_the_sums(kind):
    matrices = torch.stack([torch.tensor([[0.5, 0.25], [0.5, 0.75]]), torch.eye(2)])
    conserves(2, lambda replicas, optimizer: kind(replicas, optimizer, slowmo.Mixing(2, matrices)), 4, 0)


@pytest.mark.parametrize("kind", [slowmo.SGP, slowmo.OSGP])
def test_irregular_mixing_reaches_the_average_through_weights(kind):
    replicas, algorithm = scattered(5, lambda replicas, optimizer: kind(replicas, optimizer, irregular(5)))
    mean, apart = algorithm.rows.detach().mean(0), 0
    for _ in push(replicas, algorithm, 150, lr=0.0):
        apart = max(apart, (algorithm.w - 1).abs().max().item())
    assert apart > 0.1
    torch.testing.assert_close(algorithm.rows.detach(), mean.expand_as(algorithm.rows), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("base", ["sgp", "osgp", "sgp_irregular", "osgp_irregular", "dpsgd"])
@pytest.mark.parametrize("m", [1, 3, 4])
def test_iterates_are_the_matrix_recursion(base, m):
    """x <- P(x - γd) of SGP, x <- Px - γd of the others, w <- Pw, z = x / w, with plain matrices."""
    replicas, algorithm = scattered(m, base)
    x, w, generator = algorithm.rows.detach().clone(), torch.ones(m, 1, dtype=torch.float64), torch.Generator().manual_seed(1)
    for step, _ in enumerate(push(replicas, algorithm, 5, lr=0.2)):
        P = slowmo.mixing_matrix(algorithm.graph, step)
        d = torch.zeros_like(x)
        d[:, :3] = torch.randn(m, 3, dtype=torch.float64, generator=generator)
        x, w = P @ (x - 0.2 * d) if base.startswith("sgp") else P @ x - 0.2 * d, P @ w
        torch.testing.assert_close(algorithm.w, w, rtol=1e-13, atol=0)
        torch.testing.assert_close(algorithm.rows.detach(), x / w, rtol=1e-12, atol=1e-12)


def test_gossip_of_buffers_averages_them_too():
    replicas, algorithm = scattered(4, "sgp_double", lambda rows: sgd(rows, momentum=0.9))
    list(push(replicas, algorithm, 3, lr=0.1))
    before = algorithm.optimizer_rows()["momentum_buffer"].mean(0)
    for _ in range(2):  # two rounds of four workers: the exact average; gradients are zero, so buffers only shrink
        algorithm.step(0.0)
    torch.testing.assert_close(algorithm.optimizer_rows()["momentum_buffer"], (before * 0.81).expand(4, -1))


# --- verbs ---


@pytest.mark.parametrize("base", BASES)
def test_average_changes_nothing_and_is_exact(base):
    replicas, algorithm = scattered(5, base, OPTIMIZERS["nesterov"])
    for _ in push(replicas, algorithm, 3, lr=0.1):
        w = getattr(algorithm, "w", torch.ones(5, 1, dtype=torch.float64)).clone()
        z, buffers = algorithm.rows.detach().clone(), {k: v.clone() for k, v in algorithm.optimizer_rows().items()}
        mean = algorithm.average()
        torch.testing.assert_close(mean, (z * w).sum(0, keepdim=True) / w.sum(), rtol=1e-13, atol=1e-13)
        assert torch.equal(algorithm.rows, z) and torch.equal(getattr(algorithm, "w", w), w)
        assert all(torch.equal(v, buffers[k]) for k, v in algorithm.optimizer_rows().items())
        assert mean.untyped_storage().data_ptr() != algorithm.rows.untyped_storage().data_ptr()


@pytest.mark.parametrize("buffers", slowmo.base.BUFFERS)
@pytest.mark.parametrize("base", ["sgp_irregular", "osgp_irregular"])
def test_restart_settles_the_weights(base, buffers):
    replicas, algorithm = scattered(4, base, OPTIMIZERS["adam"])
    list(push(replicas, algorithm, 3, lr=0.1))
    assert (algorithm.w != 1).any()
    w = algorithm.w.clone()
    algorithm.restart(algorithm.rows.detach().clone(), buffers, exact=False)
    assert torch.equal(algorithm.w, w)  # own iterates: debts stay
    x = algorithm.average()
    algorithm.restart(x, buffers)
    assert (algorithm.w == 1).all() and torch.equal(algorithm.rows, x.expand(4, -1))
    assert torch.equal(replicas.models[2].x, x[0, :3])  # models see it


@names
def test_reset_is_a_fresh_optimizer(name):
    replicas, algorithm = scattered(3, "local_sgd", OPTIMIZERS[name])
    list(push(replicas, algorithm, 3, lr=0.1))
    x = algorithm.average()
    algorithm.restart(x, "reset")
    fresh, other = scattered(3, "local_sgd", OPTIMIZERS[name])
    other.restart(x, "maintain")
    for _ in zip(push(replicas, algorithm, 3, 0.1, seed=7), push(fresh, other, 3, 0.1, seed=7), strict=True):
        assert torch.equal(algorithm.rows, other.rows)
    assert algorithm.steps == 6  # the global step never restarts


def everything(optimizer):
    (state,) = optimizer.state.values() or [{}]
    return {name: torch.as_tensor(value).clone() for name, value in state.items()}


@names
def test_maintain_touches_nothing_and_average_averages_every_buffer(name):
    replicas, algorithm = scattered(3, "local_sgd", OPTIMIZERS[name])
    list(push(replicas, algorithm, 3, lr=0.1))
    before = everything(algorithm.optimizer)
    assert name == "sgd" or algorithm.optimizer_rows()
    algorithm.restart(algorithm.average(), "maintain")
    after = everything(algorithm.optimizer)
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    algorithm.restart(algorithm.average(), "average")
    after = everything(algorithm.optimizer)
    for key, value in before.items():
        if key in algorithm.optimizer_rows():
            assert value.shape == algorithm.rows.shape and not torch.equal(value[0], value[1])
            torch.testing.assert_close(after[key], value.mean(0, keepdim=True).expand(3, -1), rtol=1e-14, atol=0)
        else:
            assert torch.equal(after[key], value), key  # counters


@pytest.mark.parametrize("base", BASES)
def test_start_may_be_forgotten_or_called_twice(base):
    results = []
    for starts in (1, 0, 2):
        replicas, algorithm = scattered(4, base, OPTIMIZERS["nesterov"])
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            for _ in range(starts):
                algorithm.start()
            replicas.rows.grad[:, :3] = torch.randn(4, 3, dtype=torch.float64, generator=generator)
            algorithm.step(0.1)
        results.append(algorithm.rows.detach().clone())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_step_zeroes_gradients_and_counts():
    for base in BASES:
        replicas, algorithm = scattered(2, base)
        for step, _ in enumerate(push(replicas, algorithm, 2, lr=None), 1):
            assert algorithm.steps == step and not replicas.rows.grad.any()


# --- refusals ---


@names
@pytest.mark.parametrize("m", [1, 3])
def test_elementwise_optimizers_train_rows_as_if_alone(name, m):
    """m rows in one block step as m optimizers of their own."""
    replicas, algorithm = scattered(m, "local_sgd", OPTIMIZERS[name])
    alone = [torch.nn.Parameter(row.clone()) for row in algorithm.rows.detach()]
    optimizers = [OPTIMIZERS[name](p) for p in alone]
    generator = torch.Generator().manual_seed(1)
    for _ in push(replicas, algorithm, 4, lr=0.1):
        grads = torch.zeros_like(algorithm.rows)
        grads[:, :3] = torch.randn(m, 3, dtype=torch.float64, generator=generator)
        for p, g, optimizer in zip(alone, grads, optimizers):
            p.grad = g
            optimizer.param_groups[0]["lr"] = 0.1
            optimizer.step()
    torch.testing.assert_close(algorithm.rows.detach(), torch.stack(alone).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["Adafactor", "LBFGS", "Muon"])
@pytest.mark.parametrize("m", [1, 2])
def test_an_optimizer_that_mixes_rows_is_refused(name, m):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    with pytest.raises(ValueError, match=f"{name} is not elementwise.*choose one that is"):
        build(quadratic(m), m, "local_sgd", lambda rows: getattr(torch.optim, name)([rows]))


def test_an_optimizer_over_something_else_is_refused():
    replicas = Replicas(quadratic(1).model(), Cluster(1))
    for parameters in (list(replicas.models[0].parameters()), [replicas.rows, torch.nn.Parameter(torch.zeros(1))]):
        with pytest.raises(ValueError, match=r"torch\.optim\.SGD\(\[replicas\.rows\]"):
            slowmo.LocalSGD(replicas, torch.optim.SGD(parameters, lr=0.1))
    with pytest.raises(ValueError, match=r"torch\.optim optimizer over \[replicas\.rows\]"):
        slowmo.LocalSGD(replicas, "sgd")


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


# --- gradients that never come, and buckets ---


class Forks(torch.nn.Module):
    """Layers registered in another order than they are used, and one that only some workers use. Above 1 MiB: several buckets."""

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


def inputs(worker, step=0, lane=0):
    return torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * worker + 10 * step + lane))


def gradient(model, worker, everything, lane=0):
    """What autograd alone gives, as a flat row; zeros where nothing comes."""
    model = copy.deepcopy(model)
    model.zero_grad()
    model(inputs(worker, lane=lane), uses(worker, everything)).backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("base", BASES)
def test_a_layer_without_gradient_is_averaged_all_the_same(base):
    model, m = Forks(), 2
    start, gradients = flat(model), torch.stack([gradient(model, i, everything=False) for i in range(m)])
    assert ((gradients == 0) != (gradients.flip(0) == 0)).any()  # somebody has what the other lacks
    replicas = Replicas(model, Cluster(m))
    algorithm = BASES[base](replicas, sgd(replicas.rows))
    algorithm.start()
    for i, replica in enumerate(replicas.models):
        replica(inputs(i), uses(i, False)).backward()
    algorithm.step(0.5)
    expected = start - 0.5 * gradients
    if base == "allreduce":
        expected = expected.mean(0, keepdim=True).expand(m, -1)
        torch.testing.assert_close(algorithm.rows.detach()[:, : len(start)], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(algorithm.average()[0, : len(start)], expected.mean(0), rtol=1e-12, atol=1e-12)
    algorithm.restart(algorithm.average())
    assert all(torch.equal(p, q) for p, q in zip(replicas.models[0].parameters(), replicas.models[1].parameters()))


def bucketed(m, everything, accumulate, base=slowmo.AllReduce, told=False):
    """One step on real processes: (error against autograd alone, buckets, how many of them left during the last backward).

    told: the replicas know how many backward passes there are, and `start` comes before the first; else before the last.
    """
    Buckets.megabytes = 0.01  # this process ends with the test
    model = Forks(wide=2**15)
    cluster = Cluster(m)
    meet = range(m) if base is slowmo.AllReduce else cluster.local_workers  # Local SGD: only the processes of one worker
    workers = [(i, lane) for i in meet for lane in range(cluster.worker_size)]
    start = flat(model)
    mean = torch.stack([gradient(model, i, everything, lane) for i, lane in workers]).mean(0)
    replicas = Replicas(model, cluster, accumulate=1 + accumulate if told else 1)
    algorithm = base(replicas, sgd(replicas.rows))
    for backward in range(1 + accumulate):
        if backward == (0 if told else accumulate):
            algorithm.start()
        if backward == accumulate:
            assert not algorithm.buckets.means  # nothing left too early
        for i, replica in zip(cluster.local_workers, replicas.models):
            replica(inputs(i, lane=cluster.worker_rank), uses(i, everything)).backward()
    early = len(algorithm.buckets.means)
    algorithm.step(0.5)
    expected = start - 0.5 * (1 + accumulate) * mean
    return (algorithm.rows.detach()[:, : len(start)] - expected).abs().max().item(), len(algorithm.buckets.slices), early


def buckets_everywhere():
    cases = [(m, everything, accumulate) for m in (1, 2, 4) for everything in (True, False) for accumulate in (0, 1)]
    told = [(2, everything, 2, slowmo.AllReduce, True) for everything in (True, False)]
    return {case: bucketed(*case) for case in cases + told}


def test_buckets_give_the_mean_gradient_whatever_is_missing():
    for results in spawn(buckets_everywhere, 2):
        for (m, everything, accumulate, *_), (error, buckets, early) in results.items():
            assert error < 1e-12, (m, everything, accumulate)
            assert buckets >= 3
            # with all gradients there every bucket leaves during backward; a missing one holds back what comes after it
            assert early == buckets if everything else 0 < early < buckets, (m, everything, accumulate, early)


def buckets_inside():
    """Two workers of two processes each."""
    return [bucketed(2, everything, 0, base) for everything in (True, False) for base in (slowmo.AllReduce, slowmo.LocalSGD)]


def test_buckets_average_inside_a_worker_of_several_processes():
    for results in spawn(buckets_inside, 4):
        assert all(error < 1e-12 and buckets >= 3 for error, buckets, _ in results)


def slices_of():
    replicas = Replicas(Forks(wide=2**15), Cluster(2))
    return Buckets(replicas, inside=False).slices, replicas.slices(), replicas.parameters


@pytest.mark.parametrize("megabytes", [1e-9, 0.0001, 0.01, 25.0])
def test_buckets_tile_the_row_from_its_end(megabytes, monkeypatch):
    monkeypatch.setattr(Buckets, "megabytes", megabytes)
    slices, parameters, total = slices_of()
    assert slices[0][1] == total and slices[-1][0] == 0
    assert all(later[1] == earlier[0] for earlier, later in itertools.pairwise(slices))
    assert {start for start, _ in slices} <= {offset for offset, _ in parameters}
    small = megabytes * 2**20 / 25 / 8  # numbers
    assert slices[0][1] - slices[0][0] >= min(small, total)  # the first
    for start, stop in slices[1:-1]:  # whole buckets, and halves of what is left at the end
        assert stop - start >= min(25 * small, max(stop, 25 * small) / 2)
    widest = max(later - offset for (offset, _), later in zip(parameters, [offset for offset, _ in parameters[1:]] + [total]))
    assert len(slices) < 3 or slices[-1][1] <= max(12.5 * small, slices[-2][1] / 2 + 1, widest)


def overlapping():
    results = []
    for base in ("osgp", "dpsgd", "osgp_irregular"):
        for starts in (1, 0, 2):
            replicas, algorithm = build(quadratic(4), 4, base)
            for step in range(3):
                for _ in range(starts):
                    algorithm.start()
                for model, batch in zip(replicas.models, quadratic(4).batches(step, replicas.cluster.local_workers, (0, 1))):
                    quadratic(4).loss(model, batch).backward()
                algorithm.step(0.1)
            results.append((algorithm.rows.detach().clone(), replicas.cluster.local_workers))
    return results


def test_overlap_on_processes_survives_a_forgotten_and_a_second_start():
    whole = overlapping()
    for results in spawn(overlapping, 2):
        for k in range(0, 9, 3):
            assert torch.equal(results[k][0], results[k + 1][0]) and torch.equal(results[k][0], results[k + 2][0])
        for (rows, ranks), (expected, _) in zip(results, whole):
            torch.testing.assert_close(rows, expected[list(ranks)], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name, dtype", [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_messages_are_rounded_wherever_the_receiver_lives(name, dtype):
    """One round by hand, x <- (x + rounded x of the neighbour) / 2, and the same bits on processes."""
    base = lambda replicas, optimizer: slowmo.SGP(replicas, optimizer, messages=name)
    start = torch.arange(12.0).reshape(4, 3) / 7

    def rounds(steps, base=base):
        replicas, algorithm = build(quadratic(4), 4, base)
        rows = replicas.rows.detach()
        rows[:, :3] = start[list(replicas.cluster.local_workers)]
        for _ in range(steps):
            algorithm.start()
            algorithm.step(0.0)
        return rows[:, :3].clone(), algorithm.w.clone()

    x = start.double()
    expected = (x + x.roll(1, 0).to(dtype).double()) / 2
    assert not torch.equal(expected, (x + x.roll(1, 0)) / 2)
    torch.testing.assert_close(rounds(1)[0], expected, rtol=0, atol=0)
    for make in (base, lambda replicas, optimizer: slowmo.OSGP(replicas, optimizer, messages=name)):
        whole = rounds(5, make)[0]
        for processes in (2, 4, 8):  # of 8 two share a worker, each carries half of its message
            assert torch.equal(spawn(rounds, processes, 5, make)[0][0], whole[: max(1, 4 // processes)])


def test_unequal_weights_are_never_rounded():
    graph = slowmo.Mixing(3, [[0.5, 0.1, 0.3], [0.2, 0.7, 0.3], [0.3, 0.2, 0.4]])
    weights = []
    for messages in (None, "bfloat16"):
        _, algorithm = build(quadratic(3), 3, lambda replicas, optimizer: slowmo.SGP(replicas, optimizer, graph, messages=messages))
        for _ in range(3):
            algorithm.step(0.0)
        weights.append(algorithm.w)
    assert torch.equal(*weights) and (weights[0] != 1).all()


def test_another_message_dtype_is_refused():
    with pytest.raises(ValueError, match="choose bfloat16, float16, or null"):
        build(quadratic(2), 2, lambda replicas, optimizer: slowmo.SGP(replicas, optimizer, messages="int8"))


def test_inboxes_are_what_arrivals_take():
    """SGP's first message comes into the spent gradients."""
    for base, m, expected in (("sgp", 1, 0), ("sgp", 4, 0), ("osgp", 1, 0), ("osgp", 4, 1), ("dpsgd", 4, 2), ("local_sgd", 4, 0)):
        _, algorithm = build(quadratic(m), m, base)
        for _ in range(3):
            algorithm.start()
            algorithm.step(0.1)
        assert algorithm.inboxes() == expected == len(getattr(algorithm, "_inboxes", ())), base
    _, algorithm = build(quadratic(4), 4, lambda replicas, optimizer: slowmo.OSGP(replicas, optimizer, messages="bfloat16"))
    assert algorithm.inboxes() == 1 + 2 / 4  # two messages of 2 bytes a number beside rows of 8


def test_sends_counts_messages():
    rounded = build(quadratic(4), 4, lambda replicas, optimizer: slowmo.OSGP(replicas, optimizer, messages="bfloat16"))[1]
    assert rounded.sends() == (1, 2 / rounded.rows.element_size())
    for m in (1, 2, 3, 8):
        build_ = lambda base: build(quadratic(m), m, base)[1]
        assert build_("local_sgd").sends() == (0, 0)
        assert build_("sgp").sends() == build_("osgp").sends() == ((1, 1) if m > 1 else (0, 0))
        assert build_("dpsgd").sends() == (min(m - 1, 2),) * 2
        assert build_("allreduce").sends() == ((2 * (m - 1), 2 * (m - 1) / m) if m > 1 else (0, 0))


def test_training_converges_to_the_minimum_of_the_sum():
    task = quadratic(4, d=3, noise=0.0)
    best = torch.linalg.solve(task.A.sum(0), torch.einsum("wij,wj->i", task.A, task.b))
    for base in BASES:
        replicas, algorithm = build(task, 4, base, outer=lambda base: slowmo.Average(base, tau=1))
        rows = run(task, replicas, algorithm, 30, lr=0.8)
        torch.testing.assert_close(rows, best.expand_as(rows), rtol=1e-6, atol=1e-6)


def test_reset_gives_back_what_an_optimizer_starts_with():
    """Adagrad fills its state when it is built; not every version of torch would build it again."""
    task = quadratic(2)
    replicas, algorithm = build(task, 2, "local_sgd", lambda rows: torch.optim.Adagrad([rows], lr=0.1, initial_accumulator_value=2.0))
    for _ in range(2):  # the second reset must not find what the first one's steps left
        run(task, replicas, algorithm, algorithm.steps + 2, 0.1)
        algorithm.restart(algorithm.average(), "reset")
        assert (algorithm.optimizer_rows()["sum"] == 2).all()


@pytest.mark.parametrize(
    "make, zeros",
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), True),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1), True),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5), False),  # its first step takes the whole gradient
        (lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True), True),
        (lambda p: torch.optim.AdamW(p, lr=0.1), True),
        (lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=2.0), False),
        (lambda p: torch.optim.Rprop(p, lr=0.1), False),  # its step sizes start from lr
    ],
)
def test_a_reset_keeps_the_memory_where_zeros_are_a_fresh_state(make, zeros):
    """And either way the steps after it are those of a new optimizer, bit by bit."""
    replicas, algorithm = build(quadratic(2), 2, "local_sgd", lambda rows: make([rows]))

    def steps():
        for k in range(2):
            replicas.rows.grad.copy_(replicas.rows.detach().cos() * (k - 0.3))
            algorithm.step(0.1)
        return replicas.rows.detach().clone()

    steps()
    before = {name: block.data_ptr() for name, block in algorithm.optimizer_rows().items()}
    x = replicas.rows.detach()[:1].clone()
    algorithm.restart(x, "reset")
    after = steps()
    same = {name: block.data_ptr() == before[name] for name, block in algorithm.optimizer_rows().items()}
    assert all(same.values()) if zeros else algorithm._zeros is False
    replicas.rows.detach().copy_(x)
    algorithm.optimizer = make([replicas.rows])
    assert torch.equal(steps(), after)


def test_osgp_sends_and_arms_before_the_gradients():
    replicas, algorithm = build(quadratic(4), 4, "osgp")
    calls, shift = [], replicas.cluster.shift
    replicas.cluster.shift = lambda *arguments: calls.append("send") or shift(*arguments)
    algorithm.buckets = SimpleNamespace(arm=lambda: calls.append("arm"), finish=lambda: calls.append("finish"))
    algorithm.start()
    assert sorted(calls) == ["arm", "send"]
    algorithm.step(0.1)
    assert calls[2:] == ["finish"]


def test_osgp_load_drops_the_message_of_the_run_that_is_left_behind():
    """A load between start and step: the message is waited for (a dropped handle hangs gloo), and not used."""
    replicas, algorithm = scattered(4, "osgp")
    saved = [{name: value.clone() for name, value in part.items()} for part in algorithm.state()]
    _, twin = scattered(4, "osgp")
    waited, shift = [], replicas.cluster.shift

    def spy(*arguments):
        receive = shift(*arguments)
        return lambda: waited.append(True) or receive()

    replicas.cluster.shift = spy
    for _ in push(replicas, algorithm, 3, 0.1):  # now it stands elsewhere
        pass
    algorithm.start()
    before = len(waited)
    algorithm.load(*saved)
    assert len(waited) == before + 1
    algorithm.step(0.1)
    twin.start()
    twin.step(0.1)
    assert torch.equal(algorithm.rows, twin.rows) and algorithm.steps == 1


def test_the_default_graphs():
    for kind, graph in ((slowmo.SGP, slowmo.Exponential), (slowmo.OSGP, slowmo.Exponential), (slowmo.DPSGD, slowmo.Ring)):
        _, algorithm = build(quadratic(4), 4, lambda replicas, optimizer: kind(replicas, optimizer))
        assert type(algorithm.graph) is graph and algorithm.graph.size == 4


def test_buckets_are_armed_for_one_step():
    _, algorithm = build(quadratic(4), 4, "allreduce")
    algorithm.start()
    assert algorithm.buckets.armed
    algorithm.step(0.1)
    assert not algorithm.buckets.armed  # the next backward may be one of several


def test_what_a_skipped_step_left_under_way_is_waited_for_and_dropped():
    replicas, algorithm = build(quadratic(4), 4, "allreduce")
    buckets, waited = algorithm.buckets, []
    replicas.cluster.reduce = lambda *arguments, **options: SimpleNamespace(wait=lambda: waited.append(True))
    algorithm.start()
    replicas.rows.grad.fill_(1.0)
    buckets._send()  # as backward does; then the loop skips the step
    algorithm.start()
    assert waited and not buckets.means and not replicas.rows.grad.any()


def test_an_optimizer_is_judged_with_its_own_options():
    class Normed(torch.optim.SGD):
        """Elementwise unless told to divide by the norm of the whole gradient."""

        def step(self):
            for p in self.param_groups[0]["params"] if self.param_groups[0].get("normed") else ():
                p.grad = p.grad / p.grad.norm()
            super().step()

    replicas = Replicas(quadratic(2).model(), Cluster(2))
    optimizer = Normed([replicas.rows], lr=0.1)
    slowmo.LocalSGD(replicas, optimizer)
    optimizer.param_groups[0]["normed"] = True
    with pytest.raises(ValueError, match="not elementwise"):
        slowmo.LocalSGD(replicas, optimizer)


def test_restart_refuses_a_word_it_does_not_know():
    _, algorithm = build(quadratic(2), 2, "local_sgd")
    with pytest.raises(ValueError, match="choose one of reset, maintain, average"):
        algorithm.restart(algorithm.average(), "forget")
