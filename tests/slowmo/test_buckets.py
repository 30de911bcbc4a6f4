"""How rows are cut, and in which order buckets go: once a step, the same on every rank, whatever backward does first."""

import itertools
import random

import pytest
import torch
from branches import NAMES, Shuffled, biases_apart
from helpers import build, sgd
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import spawn
from torch.utils.checkpoint import checkpoint

import slowmo
from slowmo.buckets import cut, fragments, is_dense
from slowmo.cluster import Cluster
from slowmo.outer import SlowMo
from slowmo.replicas import Replicas

# --- how rows are cut ---

shapes = st.lists(st.lists(st.integers(1, 40), min_size=0, max_size=3), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(shapes=shapes, seed=st.integers(0, 99), groups=st.integers(1, 3), cap=st.floats(1e-6, 0.2), rows=st.integers(1, 3),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))  # fmt: skip
def test_buckets_tile_the_parameters_from_the_end_of_the_model(shapes, seed, groups, cap, rows, dtype):
    rng = random.Random(seed)
    parameters = [(f"p{k}", torch.nn.Parameter(torch.zeros(shape, dtype=dtype))) for k, shape in enumerate(shapes)]
    kinds = [(rng.randrange(groups), rng.randrange(2)) for _ in parameters]
    buckets = cut(parameters, kinds, rows, dtype, cap)
    assert [bucket.index for bucket in buckets] == list(range(len(buckets)))
    # neighbours, from the end: what comes later in the model comes in an earlier bucket
    pieces = [sorted(place.index for segment in bucket.segments for place in segment.places) for bucket in buckets]
    assert [index for piece in pieces for index in reversed(piece)] == list(reversed(range(len(parameters))))
    for bucket in buckets:
        numbers = [(segment.group, segment.fragment) for segment in bucket.segments]
        assert numbers == sorted(set(numbers))  # one segment for each
        for segment in bucket.segments:
            assert segment.x.shape == segment.grad.shape == (rows, segment.x.shape[1]) and segment.x.is_contiguous()
            assert segment.x.shape[1] * dtype.itemsize % 64 == 0
            indices = [place.index for place in segment.places]
            assert indices == sorted(indices, reverse=True) and {kinds[index] for index in indices} == {(segment.group, segment.fragment)}
            end = 0
            for place in segment.places:
                name, p = parameters[place.index]
                assert (place.name, place.shape) == (name, p.shape)
                assert place.offset * dtype.itemsize % 32 == 0 and end <= place.offset < end + 32 / dtype.itemsize
                end = place.offset + p.numel()
            assert end <= segment.x.shape[1] < end + 64 / dtype.itemsize
    # sizes: the first a 25th, each at most twice the one before, the last ones half of what is left, but for an eighth
    full, sizes = cap * 2**20 / dtype.itemsize, [sum(parameters[index][1].numel() for index in piece) for piece in pieces]
    for k, (size, piece) in enumerate(zip(sizes, pieces)):
        left = sum(sizes[k:])
        limit = full / 25 if k == 0 else min(2 * sizes[k - 1], full, max(left, full / 4) / 2)
        if k < len(sizes) - 1:
            assert size >= limit
        assert size - parameters[piece[0]][1].numel() < limit  # no parameter more than it takes


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), count=st.integers(1, 5))
def test_fragments_are_runs_as_even_as_parameters_allow(sizes, count):
    found = fragments([(str(k), torch.nn.Parameter(torch.zeros(size))) for k, size in enumerate(sizes)], count)
    assert found == sorted(found) and all(0 <= number < count for number in found)
    for number in range(count):  # off by half a parameter at each end at most
        mine = sum(size for size, other in zip(sizes, found) if other == number)
        assert abs(mine - sum(sizes) / count) <= max(sizes)


@pytest.mark.parametrize("cap", [1e-9, 0.0001, 0.01, 25.0])
def test_the_cut_does_not_depend_on_the_number_of_rows(cap):
    model = torch.nn.Sequential(*(torch.nn.Linear(17, 17) for _ in range(6)))
    named = list(model.named_parameters())
    cuts = [cut(named, [(0, 0), (1, 0)] * 6, rows, torch.float32, cap) for rows in (1, 2, 32)]
    layouts = [[(s.group, s.places, s.x.shape[1]) for bucket in buckets for s in bucket.segments] for buckets in cuts]
    assert layouts[0] == layouts[1] == layouts[2]
    assert len(cuts[0]) == {1e-9: 12, 25.0: 1}.get(cap, len(cuts[0]))


def cut_here(m):
    replicas = Replicas(torch.nn.Sequential(*(torch.nn.Linear(17, 17) for _ in range(6))), Cluster(m), bucket_cap_mb=0.002)
    return [[(s.group, s.places, s.x.shape[1]) for s in bucket.segments] for bucket in replicas.buckets]


def test_the_cut_does_not_depend_on_the_layout():
    first, *others = (spawn(cut_here, processes, m)[0] for processes, m in ((2, 2), (2, 4), (4, 2)))
    assert len(first) > 3 and all(other == first for other in others)
    (alone,) = cut_here(4)  # nothing is sent: one bucket for everything
    assert [place.name for bucket in first for _, places, _ in bucket for place in places] == [place.name for place in alone[0][1]]


def test_gradients_and_rows_start_at_lines_of_64_bytes():
    replicas = Replicas(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1)), Cluster(3))
    for segment in replicas.segments:
        for block in (segment.x.detach(), segment.grad):
            assert all(row.data_ptr() % 64 == 0 for row in block)
        assert all(p.data_ptr() % 16 == 0 and p.grad.data_ptr() % 16 == 0 for p, _, _ in segment.members)


def test_is_dense():
    x = torch.zeros(2, 3, 4, 5)
    assert (
        is_dense(x) and is_dense(x.to(memory_format=torch.channels_last)) and is_dense(x.permute(3, 1, 0, 2)) and is_dense(torch.zeros(()))
    )
    assert is_dense(torch.zeros(1, 3).as_strided((1, 3), (7, 1))) and not is_dense(x[:, ::2]) and not is_dense(torch.zeros(3).expand(2, 3))


def test_a_parameter_with_holes_becomes_one_without():
    model = torch.nn.Linear(3, 2)
    model.weight = torch.nn.Parameter(torch.arange(12.0).view(2, 6)[:, ::2])
    replicas = Replicas(model, Cluster(2))
    assert torch.equal(replicas.models[1].weight, torch.tensor([[0.0, 2, 4], [6, 8, 10]])) and replicas.models[1].weight.is_contiguous()


# --- in which order buckets go (I1) ---


def order_of(m, base, shuffled, steps=4):
    """For each step, in which order buckets advanced here, and in which order backward was through with them."""
    task, cluster = Shuffled(), Cluster(m)
    replicas, algorithm = build(
        task, m, base, biases_apart(lambda groups: sgd(groups)), lambda b: SlowMo(b, 2), cluster, 1e-6, overlap=True
    )
    advanced, arrived = [], []
    advance = algorithm.base._advance
    algorithm.base._advance = lambda bucket: advanced.append(bucket.index) or advance(bucket)
    replicas.register_grad_hook(lambda index, during_backward=True: arrived.append(index))
    out = []
    for step in range(steps):
        algorithm.start(0.1)
        for row, (x, y, order) in enumerate(task.batches(step, cluster.local_workers, (cluster.worker_rank, cluster.worker_size))):
            order = order if shuffled else NAMES
            task.loss(replicas.models[row], (x, y, order)).backward()
        early = len(advanced)
        algorithm.step()
        out.append((advanced[:], arrived[:], early))
        advanced.clear(), arrived.clear()
    return out, len(replicas.buckets)


@pytest.mark.parametrize("processes, m", [(2, 2), (2, 4), (4, 2)])
@pytest.mark.parametrize("base", ["sgp", "local_sgd", "allreduce", "osgp"])
def test_a_bucket_advances_once_a_step_in_one_order_on_every_rank(base, processes, m):
    results = spawn(order_of, processes, m, base, True)
    for out, buckets in results:
        assert buckets == 8
        for advanced, _, early in out:
            assert advanced == list(range(buckets))
            assert base not in ("sgp", "local_sgd") or early >= buckets - 1
    # the test shuffles: ranks and steps saw gradients in different orders
    assert len({tuple(arrived) for out, _ in results for _, arrived, _ in out}) > 2


def test_a_bucket_waits_for_those_before_it():
    """Whatever is there first: a later bucket goes when the ones before it have gone."""
    replicas, algorithm = build(Shuffled(), 1, "local_sgd", biases_apart(sgd), overlap=True)
    (bucket,) = replicas.buckets
    pieces = cut(list(Shuffled().model().named_parameters()), [(0, 0)] * 8, 1, torch.float64, 1e-9)
    replicas.buckets[:] = pieces
    for piece in pieces:
        for segment in piece.segments:
            segment.adopt(0, [list(replicas.models[0].parameters())[place.index] for place in segment.places])
    gone = []
    handover = algorithm.handover
    handover.enable(lambda piece: gone.append(piece.index), True)
    for index, expected in ((2, []), (0, [0]), (3, [0]), (1, [0, 1, 2, 3]), (7, [0, 1, 2, 3]), (4, [0, 1, 2, 3, 4])):
        handover._arrived(index)
        assert gone == expected
    handover.finish()
    assert gone == list(range(8))


# --- gradients (I2, I3, I7) ---


def never_there(waited):
    """A cluster of four workers whose means are there when somebody waits for them, and not before."""

    class Waited(Cluster):
        def all_reduce(self, *a, wait=True, **more):
            def finish():
                waited.append(True)

            finish.is_completed = lambda: False
            return finish

    return Waited(4)


def small(base="sgp", m=1, overlap=True, accumulate=1, **more):
    task = Shuffled(accumulate)
    replicas, algorithm = build(task, m, base, biases_apart(sgd), accumulate=accumulate, overlap=overlap, **more)
    return task, replicas, algorithm


def passes(task, replicas, step=0):
    batches = list(task.batches(step, replicas.cluster.local_workers, (replicas.cluster.worker_rank, replicas.cluster.worker_size)))
    for k, batch in enumerate(batches):
        task.loss(replicas.models[k // replicas.accumulate], batch).backward()


def test_gradients_are_none_from_advancing_to_step():
    """Nothing can clip or read what is spent; and the memory is there again after the step."""
    task, replicas, algorithm = small(m=2)
    for step in range(3):
        algorithm.start(0.1)
        assert all(p.grad is not None for model in replicas.models for p in model.parameters())
        passes(task, replicas, step)
        assert all(p.grad is None for model in replicas.models for p in model.parameters())
        assert torch.nn.utils.clip_grad_norm_(replicas.models[0].parameters(), 1.0) == 0
        algorithm.step()
        assert all(p.grad is g and not g.any() for segment in replicas.segments for p, _, g in segment.members)


def test_late_gradients_are_there_until_step_and_may_be_clipped():
    clipped = []
    for clip in (False, True):
        task, replicas, algorithm = small(overlap=False)
        for group in algorithm.optimizer.param_groups:
            group["weight_decay"] = 0.0
        before = replicas.rows()
        algorithm.start(1.0)
        passes(task, replicas)
        norm = replicas.gradients().norm()
        if clip:
            torch.nn.utils.clip_grad_norm_(replicas.models[0].parameters(), float(norm) / 4)
        algorithm.step()
        clipped.append((before - replicas.rows()).norm() / norm)
    torch.testing.assert_close(
        torch.stack(clipped), torch.tensor([1.0, 0.25], dtype=torch.float64), rtol=1e-5, atol=0
    )  # torch divides by the norm + 1e-6


@pytest.mark.parametrize("base", ["local_sgd", "sgp"])
def test_a_second_backward_than_declared_raises(base):
    task, replicas, algorithm = small(base)
    algorithm.start(0.1)
    passes(task, replicas)
    with pytest.raises(RuntimeError, match="a gradient arrived for a bucket that has gone.*accumulate=k.*no_sync"):
        passes(task, replicas)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_as_many_passes_as_declared_are_one_step(accumulate):
    results = []
    for overlap in (False, True):
        task, replicas, algorithm = small(m=2, overlap=overlap, accumulate=accumulate)
        algorithm.start(0.1)
        passes(task, replicas)
        assert algorithm.handover.first_waiting == overlap
        algorithm.step()
        results.append(replicas.rows())
    assert torch.equal(*results)


def test_a_start_after_a_step_was_begun_in_backward_raises():
    task, replicas, algorithm = small()
    algorithm.start(0.1)
    passes(task, replicas)
    for again in (lambda: algorithm.start(0.1), algorithm.base.drop):
        with pytest.raises(RuntimeError, match="a step that was not finished: call step.. after each, or choose overlap=False"):
            again()
    algorithm.step()
    algorithm.start(0.1)


class Shared(torch.nn.Module):
    """A layer used twice under reentrant checkpoints: its gradient comes in two parts, each with its hook."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 3).double()

    def forward(self, x):
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=True)
        return x


@pytest.mark.parametrize("overlap", [True, False])
def test_a_layer_shared_by_reentrant_checkpoints(overlap):
    """Stepped in backward it raises; late it is torch's gradient."""
    model = Shared()
    optimizer = sgd(model.parameters())
    replicas = Replicas(model, Cluster(1), optimizer.param_groups)
    algorithm = slowmo.LocalSGD(replicas, optimizer, overlap=overlap)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    algorithm.start(0.1)
    loss = model(x).square().sum()
    if overlap:
        with pytest.raises(RuntimeError, match="shared by reentrant checkpoints"):
            loss.backward()
        return
    loss.backward()
    plain = Shared()
    plain.layer(plain.layer(x)).square().sum().backward()
    torch.testing.assert_close(model.layer.weight.grad, plain.layer.weight.grad)


def read_after_backward(m):
    """What a stranger reads when backward has returned, late; against the mean by hand."""
    cluster, task = Cluster(m), Shuffled()
    _, replicas, algorithm = small("allreduce", m, overlap=False, cluster=cluster, bucket_cap_mb=1e-6)
    expected = 0
    for i, place in itertools.product(range(m), range(cluster.worker_size)):
        model = task.model()
        (batch,) = task.batches(0, [i], (place, cluster.worker_size))
        task.loss(model, batch).backward()
        expected = expected + torch.cat([p.grad.flatten() for p in model.parameters()]) / m / cluster.worker_size
    algorithm.start(0.1)
    passes(task, replicas)
    return [torch.cat([p.grad.flatten() for p in model.parameters()]) - expected for model in replicas.models], len(replicas.buckets)


@pytest.mark.parametrize("processes, m", [(2, 2), (2, 4), (4, 2)])
def test_gradients_are_final_when_backward_returns_as_with_ddp(processes, m):
    for gaps, buckets in spawn(read_after_backward, processes, m):
        assert buckets == 8 and max(gap.abs().max() for gap in gaps) < 1e-14


def test_nothing_is_armed_between_steps():
    """A backward of somebody else, an evaluation of gradients say, is nobody's step."""
    task, replicas, algorithm = small("allreduce", 2)
    algorithm.start(0.1)
    assert algorithm.started
    passes(task, replicas)
    algorithm.step()
    assert not algorithm.started
    rows = replicas.rows()
    passes(task, replicas)
    passes(task, replicas)
    assert torch.equal(replicas.rows(), rows) and replicas.gradients().any() and algorithm.steps == 1


def test_what_a_skipped_step_left_under_way_is_waited_for():
    """A dropped handle hangs gloo; and gradients are what they will be."""
    waited = []
    task, replicas, algorithm = small("allreduce", 4, overlap=False, cluster=never_there(waited))
    algorithm.start(0.1)
    handover = algorithm.handover
    handover._send()  # as backward does; then the loop skips the step
    assert handover.first_unsent == 1 and not waited
    algorithm.start(0.1)
    assert len(waited) == len(replicas.buckets[0].segments) and not handover.first_unsent and handover.waits == []


def test_backward_does_not_wait_for_means_that_are_under_way():
    waited = []
    task, replicas, algorithm = small("allreduce", 4, cluster=never_there(waited))
    algorithm.start(0.1)
    passes(task, replicas)
    assert algorithm.handover.first_unsent == len(replicas.buckets) and not waited
    algorithm.step()
    assert len(waited) == len(replicas.segments)


def test_a_backward_that_still_needs_a_stepped_weight_raises():
    """As torch does where an optimizer steps between forward and backward: here the input's gradient comes after the step."""
    a, w, x = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    model = torch.nn.ParameterList([a, w])
    algorithm = slowmo.LocalSGD(Replicas(model, Cluster(1)), torch.optim.SGD(model.parameters(), lr=0.1), overlap=True)
    algorithm.start()
    product = x * w.detach()
    loss = (product * a).sum() + w.sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
