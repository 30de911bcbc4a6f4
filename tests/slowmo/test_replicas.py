"""Models on rows: strides, ties, dtypes, gradients and buffers survive; what would silently train nothing raises."""

import copy
import warnings

import pytest
import torch
from helpers import BASES, average, build, quadratic, restart, sgd
from normed import Normal
from processes import spawn

from slowmo.cluster import Cluster
from slowmo.evaluate import evaluate
from slowmo.replicas import Replicas
from slowmo.state import load_state_dict, state_dict
from slowmo.train import TrainingMeter, train


def made(model, m, lr=0.1, base="local_sgd", **options):
    """(replicas, base algorithm) over `model`; options: for SGD, and bucket_cap_mb, accumulate, overlap."""
    own = {key: options.pop(key) for key in ("bucket_cap_mb", "accumulate", "dtype") if key in options}
    overlap = options.pop("overlap", False)
    optimizer = sgd(model.parameters(), lr=lr, **options)
    replicas = Replicas(model, Cluster(m), optimizer.param_groups, **own)
    return replicas, BASES[base](replicas, optimizer, overlap=overlap)


def backward(replicas, inputs):
    for model, x in zip(replicas.models, inputs):
        model(x).square().sum().backward()


def convolutions():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1), torch.nn.Flatten())
    return model.double()


def strides(tensors) -> list:
    """Those that mean something: of a dimension of one element torch writes what it likes."""
    return [[stride for stride, size in zip(t.stride(), t.shape) if size > 1] for t in tensors]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_strides_survive_and_training_is_torch_s(memory_format):
    model = convolutions().to(memory_format=memory_format)
    plain, expected = [copy.deepcopy(model) for _ in range(2)], strides(model.parameters())
    values = [p.detach().clone() for p in model.parameters()]
    replicas, algorithm = made(model, 2, momentum=0.9)
    assert replicas.models[0] is model
    optimizers = [torch.optim.SGD(p.parameters(), lr=0.1, momentum=0.9) for p in plain]
    x = torch.randn(2, 2, 3, 5, 5, dtype=torch.float64)
    for replica in replicas.models:
        assert strides(replica.parameters()) == strides(p.grad for p in replica.parameters()) == expected
        assert all(torch.equal(p, value) for p, value in zip(replica.parameters(), values))
    for _ in range(3):
        algorithm.start()
        backward(replicas, x)
        algorithm.step()
        for p, optimizer, batch in zip(plain, optimizers, x):
            optimizer.zero_grad()
            p(batch).square().sum().backward()
            optimizer.step()
    for replica, p in zip(replicas.models, plain):
        assert strides(replica.parameters()) == expected
        torch.testing.assert_close(list(replica.parameters()), list(p.parameters()), rtol=1e-11, atol=1e-11)
    copied = replicas.materialize([segment.x[1:] for segment in replicas.segments], replicas.buffers()[1])
    assert all(torch.equal(p, q) for p, q in zip(copied.parameters(), replicas.models[1].parameters()))
    assert strides(copied.parameters()) == expected


def test_parameters_and_gradients_are_views_of_rows():
    """From the model's end, each at a multiple of 32 bytes; rows end at multiples of 64, and what fills them up stays zero."""
    replicas, algorithm = made(convolutions(), 3)
    (segment,) = replicas.segments
    assert [(place.name, place.offset) for place in segment.places] == [("2.bias", 0), ("2.weight", 4), ("0.bias", 12), ("0.weight", 16)]
    assert segment.x.shape == (3, 128) and replicas.numel == 122  # 14 + 108 numbers, and six that fill up
    for _ in range(2):
        for row, model in enumerate(replicas.models):
            parameters = dict(model.named_parameters())
            for place in segment.places:
                at = (row * 128 + place.offset) * 8
                p = parameters[place.name]
                assert p.data_ptr() == segment.x.data_ptr() + at and p.grad.data_ptr() == segment.grad.data_ptr() + at
        backward(replicas, torch.randn(3, 1, 3, 4, 4, dtype=torch.float64))
        assert torch.equal(replicas.gradients()[1], torch.cat([p.grad.flatten() for p in replicas.models[1].parameters()]))
        assert segment.grad.any(1).all()
        algorithm.step()
    used = torch.zeros(128, dtype=torch.bool)
    for place in segment.places:
        used[place.offset : place.offset + place.shape.numel()] = True
    assert used.sum() == 122 and not segment.x.detach()[:, ~used].any()
    assert torch.equal(replicas.rows()[2], torch.cat([p.detach().flatten() for p in replicas.models[2].parameters()]))


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3)
        self.out.weight = self.embed.weight
        self.double()

    def forward(self, x):
        return self.out(torch.tanh(self.embed(x)))


def test_tied_weights_are_one_slice_that_both_uses_see():
    plain, (replicas, algorithm), x = Tied(), made(Tied(), 2), torch.randn(2, 4, 3, dtype=torch.float64)
    assert replicas.numel == 12 and [len(segment.places) for segment in replicas.segments] == [2]
    before = plain.embed.weight.detach().clone()
    backward(replicas, x)
    algorithm.step()
    plain(x[0]).square().sum().backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    for model in [*replicas.models, replicas.materialize(algorithm.average(), replicas.buffers()[0])]:
        assert model.embed.weight is model.out.weight
        assert not torch.equal(model.out.weight, before)
    torch.testing.assert_close(replicas.models[0].out.weight, plain.out.weight, rtol=1e-13, atol=1e-13)
    assert replicas.models[0].out.weight.data_ptr() != replicas.models[1].out.weight.data_ptr()


class Mixed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.ones(3))
        self.b = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))

    def forward(self, x):
        return x * (self.a.sum() + self.b.sum().float())


@pytest.mark.parametrize("overlap", [False, True])
def test_a_bfloat16_layer_has_master_weights(overlap):
    replicas, algorithm = made(Mixed(), 2, lr=1e-4, overlap=overlap)  # an ulp of bfloat16 below 1 is 2 ** -8
    assert replicas.dtype == torch.float32
    for step in range(1, 101):
        algorithm.start()
        for worker, model in enumerate(replicas.models):
            model(torch.tensor(worker + 1.0)).backward()  # each gradient is worker + 1
        algorithm.step()
        master = replicas.rows()[:, 3:8]
        expected = 1 - 1e-4 * step * torch.tensor([[1.0], [2.0]])
        torch.testing.assert_close(master, expected.expand(2, 5), rtol=0, atol=1e-5)
        for model, row in zip(replicas.models, master):
            assert model.b.dtype == torch.bfloat16 and model.a.dtype == torch.float32
            assert torch.equal(model.b, row.bfloat16())
        if step == 1:
            assert (replicas.models[0].b == 1).all() and (master != 1).all()  # too little for bfloat16, kept all the same
    assert (replicas.models[0].b < 1).all()
    copied = replicas.materialize([segment.x[:1] for segment in replicas.segments], replicas.buffers()[0])
    assert copied.b.dtype == torch.bfloat16 and torch.equal(copied.b, replicas.models[0].b)


def test_weights_written_after_a_start_are_followed_before_the_first_step():
    replicas, algorithm = made(Mixed(), 1)
    algorithm.start()
    with torch.no_grad():
        replicas.models[0].b.add_(1)
    algorithm.start()
    assert (replicas.rows()[0, 3:8] == 2).all()


def test_a_rate_set_between_start_and_a_late_step_is_the_one_taken():
    replicas, algorithm = made(torch.nn.Linear(2, 1), 1, lr=0.5)
    before = replicas.rows()
    algorithm.start()
    algorithm.optimizer.param_groups[0]["lr"] = 0.0
    backward(replicas, [torch.ones(1, 2)])
    algorithm.step()
    assert torch.equal(replicas.rows(), before)


def test_what_a_message_left_in_spent_gradients_is_zeroed():
    """Whoever receives into memory does not tell torch."""
    replicas, _ = made(torch.nn.Linear(2, 1), 1)
    (segment,) = replicas.segments
    segment.spent().data.fill_(3)
    segment.zero_grads()
    assert not segment.grad.any()


def test_gradients_by_hand_follow_some_by_backward():
    """Of a layer in bfloat16, where the mean of one step was shown to the loop and the next one never sees a backward."""
    replicas, algorithm = made(Mixed(), 2, lr=0.5, base="allreduce")
    algorithm.start()
    for replica in replicas.models:
        replica(torch.tensor(1.0)).backward()
    algorithm.step()
    before = replicas.rows()
    algorithm.start()
    for replica in replicas.models:
        replica.b.grad = torch.ones_like(replica.b)
    algorithm.step()
    expected = torch.tensor([0.0] * 3 + [0.5] * 5)
    torch.testing.assert_close(before - replicas.rows(), expected.expand(2, -1))


def test_rows_may_be_wider_than_the_model():
    replicas, algorithm = made(torch.nn.Linear(2, 1).bfloat16(), 1, lr=0.5, dtype=torch.float32)
    w = replicas.rows()[0]
    replicas.models[0](torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)).sum().backward()
    algorithm.step()
    assert torch.equal(replicas.rows()[0], w - 0.5 * torch.tensor([1.0, 2.0, 1.0]))
    assert torch.equal(replicas.models[0].weight[0], replicas.rows()[0, :2].bfloat16())


def test_frozen_parameters_stay_as_they_are():
    model = convolutions()
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    replicas, algorithm = made(model, 2, weight_decay=0.1)
    assert replicas.numel == 4 + 8 + 2
    backward(replicas, torch.randn(2, 1, 3, 4, 4, dtype=torch.float64))
    algorithm.step()
    for copied in [*replicas.models, replicas.materialize(algorithm.average(), replicas.buffers()[0])]:
        assert torch.equal(copied[0].weight, frozen) and copied[0].weight.grad is None and not copied[0].weight.requires_grad
    assert not torch.equal(replicas.models[0][0].bias, replicas.models[1][0].bias)


# --- a stranger's loop ---


def strange(clear, base="allreduce", m=2, discard=False, skip=False, model=convolutions, overlap=False):
    """Three steps with `clear(replicas)` before each backward; discard: also after a backward that must not count.

    skip: that backward had its `start`, and its step is skipped, as loops do when a loss is not finite.
    """
    torch.manual_seed(5)
    replicas, algorithm = made(model(), m, base=base, momentum=0.9, overlap=overlap, bucket_cap_mb=1e-4)
    for step in range(3):
        x = torch.randn(2, 2, 3, 5, 5, dtype=torch.float64)
        mine = slice(replicas.cluster.local_workers.start, replicas.cluster.local_workers.stop)
        if skip:
            algorithm.start()
        if discard or skip:
            backward(replicas, x[mine].flip(0) + 1)
            algorithm.handover.settle()  # a fast network: what was sent has arrived
            clear(replicas)
        algorithm.start()
        clear(replicas)
        backward(replicas, x[mine])
        algorithm.step()
    return replicas.rows(), replicas


def nothing(replicas):
    pass


def forget(replicas):
    for model in replicas.models:
        model.zero_grad(set_to_none=True)


def zero(replicas):
    for model in replicas.models:
        model.zero_grad(set_to_none=False)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("clear", [forget, zero])
def test_zero_grad_of_a_stranger_changes_nothing(clear, base):
    expected, _ = strange(nothing, base)
    for discard, skip, overlap in ((False, False, False), (False, False, True), (True, False, False), (False, True, False)):
        rows, replicas = strange(clear, base, discard=discard, skip=skip, overlap=overlap)
        assert torch.equal(rows, expected), (discard, skip, overlap)
        for segment in replicas.segments:  # back in their places
            assert all(p.grad is g for p, _, g in segment.members)


def test_a_layer_whose_gradient_was_forgotten_and_never_comes_has_gradient_zero():
    replicas, algorithm = made(convolutions(), 1)
    backward(replicas, torch.randn(1, 1, 3, 4, 4, dtype=torch.float64))
    forget(replicas)
    before = replicas.rows()
    algorithm.step()
    assert torch.equal(replicas.rows(), before)


def test_a_gradient_that_a_stranger_put_there_is_the_gradient():
    replicas, algorithm = made(convolutions(), 1)
    before = replicas.rows()
    algorithm.start(0.5)
    for p in replicas.models[0].parameters():
        p.grad = torch.ones_like(p)
    algorithm.step()
    assert torch.equal(replicas.rows(), before - 0.5)


def test_a_sparse_gradient_is_refused():
    replicas, algorithm = made(torch.nn.Embedding(5, 2, sparse=True), 1)
    replicas.models[0].zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        replicas.models[0](torch.tensor([1, 2])).sum().backward()
    if replicas.models[0].weight.grad.layout == torch.strided:
        pytest.skip("this torch adds a sparse gradient to the dense one that is there")
    with pytest.raises(ValueError, match="sparse=False"):
        algorithm.step()


def skipped(m, base="allreduce"):
    """A backward whose step is never taken, and without a new `start` another: what the next step gets."""
    replicas, algorithm = made(convolutions(), m, base=base)
    x = torch.randn(2, 2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mine = slice(replicas.cluster.local_workers.start, replicas.cluster.local_workers.stop)
    for k in range(2):
        algorithm.start(0.1)
        backward(replicas, x[mine] + k)
    algorithm.step()
    return replicas.rows()


@pytest.mark.parametrize("base", ["allreduce", "local_sgd", "sgp"])
def test_a_skipped_step_accumulates_whatever_the_number_of_ranks(base):
    whole = skipped(2, base)
    expected = {}
    for k in (0, 1):  # not the last backward alone
        torch.manual_seed(0)
        replicas, algorithm = made(convolutions(), 2, base=base, accumulate=2 - k)
        x = torch.randn(2, 2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        algorithm.start(0.1)
        for j in range(k, 2):
            backward(replicas, x + j)
        algorithm.step()
        expected[k] = replicas.rows()
    torch.testing.assert_close(whole, expected[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(whole, expected[1])
    for ranks in (2, 4):
        parts = spawn(skipped, ranks, 2, base)
        torch.testing.assert_close(torch.cat(parts[:: ranks // 2]), whole, rtol=1e-12, atol=1e-12)


class Bfloat(torch.nn.Module):
    """A bfloat16 layer beside a float32 one, used after it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(75, 2), torch.nn.Linear(2, 2).bfloat16()

    def forward(self, x):
        return self.b(self.a(x.flatten(1).float()).bfloat16()).float()


def strange_on_processes():
    expected, _ = strange(nothing)
    results = {clear.__name__: torch.equal(strange(clear)[0], expected) for clear in (forget, zero)}
    results["discarded"] = torch.equal(strange(forget, discard=True)[0], expected)
    results["skipped"] = torch.equal(strange(forget, skip=True)[0], expected)
    for name in ("sgp", "local_sgd"):
        plain = strange(nothing, name)[0]
        results[f"overlap {name}"] = all(torch.equal(strange(clear, name, overlap=True)[0], plain) for clear in (nothing, forget, zero))
    expected, _ = strange(nothing, model=Bfloat)
    results["bfloat16"] = torch.equal(strange(forget, model=Bfloat)[0], expected)
    results["bfloat16 discarded"] = torch.equal(strange(forget, model=Bfloat, discard=True)[0], expected)
    return results


CASES = ["forget", "zero", "discarded", "bfloat16", "bfloat16 discarded", "skipped", "overlap sgp", "overlap local_sgd"]


@pytest.fixture(scope="module")
def processes():
    return spawn(strange_on_processes, 2)


@pytest.mark.parametrize("case", CASES)
def test_zero_grad_of_a_stranger_changes_nothing_on_processes(processes, case):
    assert all(result[case] for result in processes) and set(CASES) == processes[0].keys()


# --- what would silently train nothing, or another thing ---


def moved(model):
    model.double()
    model.float()


def assigned(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def replaced(model):
    model[0].weight = torch.nn.Parameter(model[0].weight.detach().clone())


def swapped(model):
    model[0].weight.data = model[0].weight.data.clone()


def grown(model):
    model.append(torch.nn.Linear(2, 2))


def shrunk(model):
    model[2].bias = None


HARM = {
    "double and float": (moved, "moved, cast.*before wrapping"),
    "bfloat16": (lambda model: model.bfloat16(), "moved, cast.*before wrapping"),
    "assign": (assigned, "load_state_dict.assign=True"),
    "replaced": (replaced, "replaced after it was wrapped"),
    "another memory": (swapped, "moved, cast"),
    "a new layer": (grown, "wrap"),
    "a layer less": (shrunk, "wrap"),
    "frozen": (lambda model: model[0].weight.requires_grad_(False), "frozen.*after it was wrapped"),
    "freed": (lambda model: model[2].weight.requires_grad_(True), "freed after it was wrapped"),
    "written": (lambda model: model[0].bias.add_(1), r"written from outside.*rebase\(\)"),
    "loaded": (lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())), r"written from outside.*rebase\(\)"),
}


def partly():
    model = convolutions().float()
    model[2].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("case", HARM)
def test_what_is_done_to_a_wrapped_model_is_seen_at_the_next_start(case, overlap, steps):
    harm, remedy = HARM[case]
    replicas, algorithm = made(partly(), 2, overlap=overlap)

    def step():
        algorithm.start()
        backward(replicas, torch.randn(2, 1, 3, 4, 4))
        algorithm.step()

    for _ in range(steps):
        step()
    with torch.no_grad():
        harm(replicas.models[0])
    if case in ("written", "loaded") and not steps:
        return step()  # a checkpoint that is loaded before the first step is what training starts from
    before = replicas.rows()
    with pytest.raises(RuntimeError, match=remedy):
        algorithm.start()
    assert torch.equal(replicas.rows(), before)
    if case in ("written", "loaded"):
        algorithm.rebase()
        step()


@pytest.mark.parametrize("case", ["bfloat16 layer"])
def test_what_is_written_before_the_first_step_reaches_master_weights(case):
    replicas, algorithm = made(Mixed(), 1, lr=0.5)
    with torch.no_grad():
        replicas.models[0].b.fill_(3.0)
        replicas.models[0].a.fill_(2.0)
    algorithm.start()
    replicas.models[0](torch.tensor(1.0)).backward()
    algorithm.step()
    assert torch.equal(replicas.rows()[0], torch.tensor([1.5] * 3 + [2.5] * 5))


@pytest.mark.parametrize("verb", ["step", "restart", "load"])
@pytest.mark.parametrize("overlap", [False, True])
def test_every_update_bumps_versions_so_that_a_stale_graph_raises(verb, overlap):
    """As in torch: a loss from before an update has saved what is no longer there."""
    replicas, algorithm = made(convolutions(), 2, overlap=overlap, bucket_cap_mb=1e-5)
    saved = state_dict(algorithm)
    x = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    algorithm.start()
    stale = replicas.models[1](x[1].requires_grad_()).square().sum()
    before = [p._version for p in replicas.models[1].parameters()]
    if verb == "step":
        backward(replicas, x)
        algorithm.step()
    elif verb == "restart":
        restart(algorithm, algorithm.average())
    else:
        load_state_dict(algorithm, saved)
    assert all(p._version > version for p, version in zip(replicas.models[1].parameters(), before))
    algorithm.handover.paused = True
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_a_model_has_one_owner():
    model = convolutions()
    replicas = Replicas(model, Cluster(1))
    with pytest.raises(ValueError, match="already in the hands of another.*wrap it once, or a copy of it"):
        Replicas(model, Cluster(1))
    Replicas(copy.deepcopy(model), Cluster(1))
    assert replicas.models[0] is model


def differing(what):
    cluster = Cluster(2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2 if what != "shape" or cluster.is_main else 3))
    if what == "dtype" and not cluster.is_main:
        model.double()
    if what == "name" and not cluster.is_main:
        model = torch.nn.Sequential(torch.nn.Identity(), *model)
    groups = [{"params": list(model.parameters())}]
    if what == "groups" and not cluster.is_main:
        groups = [{"params": [p]} for p in model.parameters()]
    try:
        Replicas(model, cluster, groups)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("what", ["shape", "dtype", "name", "groups"])
def test_ranks_with_other_models_are_refused_on_all_of_them(what):
    for rank, message in enumerate(spawn(differing, 2, what)):
        assert f"the model of rank {rank} is not that of rank {1 - rank}" in message and "same configuration" in message


# --- buffers and copies ---


def trained(m=3, steps=3, dropout=0.5):
    task = Normal(dropout)
    replicas, algorithm = build(task, m, "sgp" if m > 1 else "local_sgd")
    meter = TrainingMeter(len(replicas.models), torch.device("cpu"))
    for _ in train(task, replicas, algorithm, lambda step: 0.1, steps, 0, meter):
        pass
    return task, replicas, algorithm, meter


def clones(replicas):
    return [{name: value.clone() for name, value in own.items()} for own in replicas.buffers()]


class Buffered(torch.nn.Module):
    """One of each kind."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.register_buffer("single", torch.tensor([0.1, 0.2]))
        self.register_buffer("narrow", torch.tensor([1.5], dtype=torch.float16))
        self.register_buffer("wide", torch.tensor(1 / 3, dtype=torch.float64))
        self.register_buffer("turn", torch.tensor([1 + 2j], dtype=torch.complex64))
        self.register_buffer("count", torch.tensor(2**53 + 1))
        self.register_buffer("seen", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("table", torch.arange(5.0), persistent=False)


def averaged(m):
    replicas = Replicas(Buffered(), Cluster(m))
    for worker, model in zip(replicas.cluster.local_workers, replicas.models):
        for name in ("single", "narrow", "wide", "turn"):
            getattr(model, name).mul_(worker + 1)
        model.count += worker
        model.seen.fill_(worker == 0)
        model.table += worker
    own = clones(replicas)
    return own, replicas.mean_buffers(), replicas.mean_buffers_in_worker(), clones(replicas)


@pytest.mark.parametrize("processes, m", [(1, 4), (2, 4), (4, 4)])
def test_buffers_keep_their_dtype(processes, m):
    """Counters above 2**53 and complex numbers pass through; what has no average is the first worker's."""
    plain = Buffered()
    for own, mean, inside, after in [averaged(m)] if processes == 1 else spawn(averaged, processes, m):
        assert inside is None and list(mean) == ["single", "narrow", "wide", "turn", "count", "seen", "nothing"]  # a table is no state
        assert all(torch.equal(value, before[name]) for before, now in zip(own, after) for name, value in now.items())
        assert {name: value.dtype for name, value in mean.items()} == {name: getattr(plain, name).dtype for name in mean}
        for name in ("single", "wide", "turn", "narrow"):
            torch.testing.assert_close(mean[name], getattr(plain, name) * 2.5)
        assert mean["count"] == 2**53 + 1 and mean["seen"].all()


def averaged_inside(m):
    replicas = Replicas(torch.nn.BatchNorm1d(2), Cluster(m))
    replicas.models[0].running_mean.fill_(replicas.cluster.rank)
    return replicas.mean_buffers_in_worker()["running_mean"], replicas.mean_buffers()["running_mean"]


def test_a_worker_of_several_ranks_has_the_mean_of_their_statistics():
    for rank, (inside, mean) in enumerate(spawn(averaged_inside, 4, 2)):
        assert (inside == (0.5 if rank < 2 else 2.5)).all() and (mean == 1.5).all()


def test_buffers_make_the_round_trip_exactly():
    _, replicas, *_ = trained()
    counter = 2**60 + 3  # beyond float64
    replicas.models[1].norm.num_batches_tracked.fill_(counter)
    saved = clones(replicas)
    _, others, *_ = trained(steps=1)
    others.load_buffers(saved)
    for model, other in zip(replicas.models, others.models):
        for (name, a), (_, b) in zip(model.named_buffers(), other.named_buffers()):
            assert torch.equal(a, b) and a.dtype == b.dtype, name
    assert others.models[1].norm.num_batches_tracked.item() == counter


def test_a_model_without_buffers_has_none():
    replicas = Replicas(torch.nn.Linear(2, 1), Cluster(3))
    assert replicas.buffers() == [{}] * 3 and replicas.mean_buffers() == {}
    replicas.load_buffers(replicas.buffers())


def test_materialize_is_a_copy():
    _, replicas, algorithm, _ = trained()
    rows, buffers = replicas.rows(), clones(replicas)
    x = algorithm.average()
    copied = replicas.materialize(x, replicas.buffers()[2])
    assert not copied.training and all(model.training for model in replicas.models)
    assert torch.equal(copied.norm.running_mean, replicas.models[2].norm.running_mean)
    ours = {tensor.untyped_storage().data_ptr() for segment, block in zip(replicas.segments, x) for tensor in (segment.x, block)}
    ours |= {b.untyped_storage().data_ptr() for model in replicas.models for b in model.buffers()}
    assert not ours & {t.untyped_storage().data_ptr() for t in [*copied.parameters(), *copied.buffers()]}
    for tensor in [*copied.parameters(), *copied.buffers()]:
        tensor.detach().fill_(7)
    assert torch.equal(replicas.rows(), rows)
    assert all(torch.equal(value, buffers[i][name]) for i, own in enumerate(replicas.buffers()) for name, value in own.items())
    again = replicas.materialize(x, replicas.buffers()[0])  # one copy, filled anew
    assert again is copied and torch.equal(torch.cat([p.flatten() for p in again.parameters()]), replicas.flat(x)[0])


def test_norms_average_local_and_recalibrate():
    task, replicas, algorithm, meter = trained(m=3)
    norms = [model.norm for model in replicas.models]
    stack = lambda name: torch.stack([getattr(norm, name) for norm in norms]).double()
    assert not torch.equal(norms[0].running_mean, norms[1].running_mean)

    def judged(policy):
        task.seen.clear()
        evaluate(task, replicas, algorithm, meter, batchnorm=policy)
        return task.seen[0]

    seen = judged("average")
    torch.testing.assert_close(seen["norm.running_mean"], stack("running_mean").mean(0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(seen["norm.running_var"], stack("running_var").mean(0), rtol=1e-13, atol=1e-13)
    assert seen["norm.num_batches_tracked"] == 3
    seen = judged("local")
    assert torch.equal(seen["norm.running_mean"], norms[0].running_mean)
    assert torch.equal(seen["norm.running_var"], norms[0].running_var)
    seen = judged("recalibrate")  # the averaged weights meet one batch of each worker, of the last step
    x = average(algorithm)[0]
    weight, bias = x[:12].view(4, 3), x[12:16]
    hidden = [task.draw(2, worker) @ weight.T + bias for worker in range(3)]
    means, variances = (torch.stack([statistic(h, 0) for h in hidden]).mean(0) for statistic in (torch.mean, torch.var))
    torch.testing.assert_close(seen["norm.running_mean"], means, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen["norm.running_var"], variances, rtol=1e-12, atol=1e-12)
    assert torch.equal(seen["first.weight"], weight)
    copied = replicas.materialize(algorithm.average(), replicas.buffers()[0])
    assert copied.norm.momentum == norms[0].momentum == 0.1 and not copied.norm.training
    with pytest.raises(ValueError, match="batchnorm='mean': choose one of average, local, recalibrate"):
        judged("mean")


# --- beginnings ---


def begun(m):
    torch.manual_seed(Cluster(m).rank)  # each rank draws another model
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    model[1].running_mean.normal_()
    model[2].weight.requires_grad_(False)
    replicas = Replicas(model, Cluster(m))
    return replicas.rows(), [[model[1].running_mean, model[2].weight] for model in replicas.models]


def test_everybody_starts_from_rank_zero():
    """Buffers and frozen parameters too."""
    (first, own), (second, others) = spawn(begun, 2, 4)
    assert first.any() and torch.equal(first, second) and torch.equal(first[0], first[1])
    for parts in (*own, *others):
        assert all(part.any() and torch.equal(part, mine) for part, mine in zip(parts, own[0]))


@pytest.mark.parametrize("model, remedy", [
    (torch.nn.ReLU(), "nothing to train"),
    (torch.nn.Linear(2, 2).requires_grad_(False), "no parameter that requires a gradient"),
    (torch.nn.Linear(2, 2, dtype=torch.complex64), "must be real"),
    (torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta")), r"one device.*model\.to\(device\)"),
    (torch.nn.Linear(2, 2, device="meta"), r"meta device: give its parameters memory first, model\.to_empty"),
])  # fmt: skip
def test_refusals(model, remedy):
    with pytest.raises(ValueError, match=remedy):
        Replicas(model, Cluster(1))


@pytest.mark.parametrize("options", [{"bucket_cap_mb": 0}, {"bucket_cap_mb": float("nan")}, {"accumulate": 0}])
def test_sizes_that_are_none(options):
    with pytest.raises(ValueError, match="a positive size, and at least one backward pass"):
        Replicas(torch.nn.Linear(2, 2), Cluster(1), **options)


def test_restart_and_load_reach_parameters_of_another_dtype():
    model = torch.nn.Module()
    model.wide, model.narrow = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    replicas, base = made(model, 2)
    state = state_dict(base)
    state = state | {"workers": [{name: value.clone() for name, value in worker.items()} for worker in state["workers"]]}
    restart(base, [torch.full_like(segment.x[:1], 1.5) for segment in replicas.segments])
    assert all((one.narrow == 1.5).all() and one.narrow.dtype == torch.bfloat16 for one in replicas.models)
    load_state_dict(base, state)
    assert all((one.narrow == 0).all() for one in replicas.models)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_a_loss_scale_changes_nothing_else(base, overlap):
    """A power of two: bitwise, and the losses that are counted are unscaled."""
    results = []
    for scale in (1.0, 1024.0):
        task = quadratic(2)
        replicas, algorithm = build(task, 2, base, lambda p: sgd(p, momentum=0.9), loss_scale=scale, overlap=overlap)
        meter = TrainingMeter(2, torch.device("cpu"))
        for _ in train(task, replicas, algorithm, lambda step: 0.1, 4, 1, meter, False):
            pass
        results.append((replicas.rows(), meter.losses))
    assert all(torch.equal(plain, scaled) for plain, scaled in zip(*results))
