"""Models on rows: strides, ties, dtypes, gradients and buffers survive."""

import copy

import pytest
import torch
from helpers import BASES, quadratic, sgd
from normed import Normal
from processes import spawn

import slowmo
from slowmo.cluster import Cluster
from slowmo.replicas import Replicas
from slowmo.train import TrainingMeter, evaluate, train


def local(replicas, lr=0.1, base="local_sgd", **options):
    return BASES[base](replicas, sgd(replicas.rows, lr=lr, **options))


def backward(replicas, inputs):
    for model, x in zip(replicas.models, inputs):
        model(x).square().sum().backward()


def convolutions():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1), torch.nn.Flatten())
    return model.double()


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_strides_survive_and_training_is_torch_s(memory_format):
    model = convolutions().to(memory_format=memory_format)
    plain, strides = [copy.deepcopy(model) for _ in range(2)], [p.stride() for p in model.parameters()]
    values = [p.detach().clone() for p in model.parameters()]
    replicas = Replicas(model, Cluster(2))
    assert replicas.models[0] is model
    algorithm = local(replicas, momentum=0.9)
    optimizers = [torch.optim.SGD(p.parameters(), lr=0.1, momentum=0.9) for p in plain]
    x = torch.randn(2, 2, 3, 5, 5, dtype=torch.float64)
    for replica in replicas.models:
        assert [p.stride() for p in replica.parameters()] == [p.grad.stride() for p in replica.parameters()] == strides
        assert all(torch.equal(p, value) for p, value in zip(replica.parameters(), values))
    for _ in range(3):
        backward(replicas, x)
        algorithm.step()
        for p, optimizer, batch in zip(plain, optimizers, x):
            optimizer.zero_grad()
            p(batch).square().sum().backward()
            optimizer.step()
    for replica, p in zip(replicas.models, plain):
        assert [q.stride() for q in replica.parameters()] == strides
        torch.testing.assert_close(list(replica.parameters()), list(p.parameters()), rtol=1e-11, atol=1e-11)
    copied = replicas.snapshot(replicas.rows.detach()[1:], replicas.buffers()[1:])
    assert all(torch.equal(p, q) for p, q in zip(copied.parameters(), replicas.models[1].parameters()))
    assert [p.stride() for p in copied.parameters()] == strides


def test_parameters_and_gradients_are_slices_of_a_row():
    replicas = Replicas(convolutions(), Cluster(3))
    rows, size = replicas.rows, replicas.rows.element_size()
    assert rows.shape[1] * size % 64 == 0 and rows.shape[1] - replicas.parameters < 64 // size
    algorithm = local(replicas)
    for _ in range(2):
        for row, model in enumerate(replicas.models):
            assert replicas.slices() == [(offset, numel) for offset, numel in zip((0, 108, 112, 120), (108, 4, 8, 2))]
            for p, (offset, numel) in zip(model.parameters(), replicas.slices()):
                place = (row * rows.shape[1] + offset) * size
                assert p.data_ptr() == rows.data_ptr() + place and p.grad.data_ptr() == rows.grad.data_ptr() + place
        backward(replicas, torch.randn(3, 1, 3, 4, 4, dtype=torch.float64))
        assert all(torch.equal(rows.grad[1, o : o + n], p.grad.flatten())
                   for p, (o, n) in zip(replicas.models[1].parameters(), replicas.slices()))  # fmt: skip
        assert rows.grad.any(1).all()
        algorithm.step()
    assert not rows.detach()[:, replicas.parameters :].any()  # what fills up a line stays zero


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
    plain, replicas, x = Tied(), Replicas(Tied(), Cluster(2)), torch.randn(2, 4, 3, dtype=torch.float64)
    assert replicas.parameters == 12 and len(replicas.slices()) == 2
    algorithm = local(replicas)
    before = plain.embed.weight.detach().clone()
    backward(replicas, x)
    algorithm.step()
    plain(x[0]).square().sum().backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    for model in [*replicas.models, replicas.snapshot(algorithm.average(), replicas.buffers()[:1])]:
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


def test_a_bfloat16_layer_has_master_weights():
    replicas = Replicas(Mixed(), Cluster(2))
    assert replicas.rows.dtype == torch.float32
    algorithm = local(replicas, lr=1e-4)  # an ulp of bfloat16 below 1 is 2 ** -8
    for step in range(1, 101):
        for worker, model in enumerate(replicas.models):
            model(torch.tensor(worker + 1.0)).backward()  # each gradient is worker + 1
        algorithm.step()
        master = replicas.rows.detach()[:, 3:8]
        expected = 1 - 1e-4 * step * torch.tensor([[1.0], [2.0]])
        torch.testing.assert_close(master, expected.expand(2, 5), rtol=0, atol=1e-5)
        for model, row in zip(replicas.models, master):
            assert model.b.dtype == torch.bfloat16 and model.a.dtype == torch.float32
            assert torch.equal(model.b, row.bfloat16())
        if step == 1:
            assert (replicas.models[0].b == 1).all() and (master != 1).all()  # too little for bfloat16, kept all the same
    assert (replicas.models[0].b < 1).all()
    copied = replicas.snapshot(replicas.rows.detach()[:1], replicas.buffers()[:1])
    assert copied.b.dtype == torch.bfloat16 and torch.equal(copied.b, replicas.models[0].b)


def test_rows_may_be_wider_than_the_model():
    replicas = Replicas(torch.nn.Linear(2, 1).bfloat16(), Cluster(1), dtype=torch.float32)
    algorithm = local(replicas, lr=0.5)
    w = replicas.rows.detach()[0, :3].clone()
    replicas.models[0](torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)).sum().backward()
    algorithm.step()
    assert torch.equal(replicas.rows.detach()[0, :3], w - 0.5 * torch.tensor([1.0, 2.0, 1.0]))
    assert torch.equal(replicas.models[0].weight[0], replicas.rows.detach()[0, :2].bfloat16())


def test_frozen_parameters_stay_as_they_are():
    model = convolutions()
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    replicas = Replicas(model, Cluster(2))
    assert replicas.parameters == 4 + 8 + 2
    algorithm = local(replicas, weight_decay=0.1)
    backward(replicas, torch.randn(2, 1, 3, 4, 4, dtype=torch.float64))
    algorithm.step()
    for copied in [*replicas.models, replicas.snapshot(algorithm.average(), replicas.buffers()[:1])]:
        assert torch.equal(copied[0].weight, frozen) and copied[0].weight.grad is None and not copied[0].weight.requires_grad
    assert not torch.equal(replicas.models[0][0].bias, replicas.models[1][0].bias)


# --- a stranger's loop ---


def strange(clear, base="allreduce", m=2, discard=False, skip=False, model=convolutions):
    """Three steps with `clear(replicas, algorithm)` before each backward; discard: also after a backward that must not count.

    skip: that backward had its `start`, and its step is skipped, as loops do when a loss is not finite.
    """
    torch.manual_seed(5)
    replicas = Replicas(model(), Cluster(m))
    algorithm = local(replicas, base=base, momentum=0.9)
    for step in range(3):
        x = torch.randn(2, 2, 3, 5, 5, dtype=torch.float64)
        if skip:
            algorithm.start()
        if discard or skip:
            backward(replicas, x[replicas.cluster.local_workers.start :].flip(0) + 1)
            for handle in algorithm.buckets.handles if algorithm.buckets else []:
                handle.wait() if handle else None  # a fast network: what was sent has arrived
            clear(replicas, algorithm)
        algorithm.start()
        clear(replicas, algorithm)
        backward(replicas, x[replicas.cluster.local_workers.start :])
        algorithm.step()
    return replicas.rows.detach().clone(), replicas


def nothing(replicas, algorithm):
    pass


def forget(replicas, algorithm):
    for model in replicas.models:
        model.zero_grad(set_to_none=True)


def zero(replicas, algorithm):
    for model in replicas.models:
        model.zero_grad(set_to_none=False)


def zero_rows(replicas, algorithm):
    algorithm.optimizer.zero_grad(set_to_none=False)


def forget_rows(replicas, algorithm):
    algorithm.optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("clear", [forget, zero, zero_rows])
def test_zero_grad_of_a_stranger_changes_nothing(clear, base):
    expected, _ = strange(nothing, base)
    for discard, skip in ((False, False), (True, False), (False, True)):
        rows, replicas = strange(clear, base, discard=discard, skip=skip)
        assert torch.equal(rows, expected), (discard, skip)
        assert replicas.models[1][0].weight.grad.data_ptr() == replicas.rows.grad[1].data_ptr()  # back in its place


def test_a_layer_whose_gradient_was_forgotten_and_never_comes_has_gradient_zero():
    replicas = Replicas(convolutions(), Cluster(1))
    algorithm = local(replicas)
    backward(replicas, torch.randn(1, 1, 3, 4, 4, dtype=torch.float64))
    forget(replicas, algorithm)
    before = replicas.rows.detach().clone()
    algorithm.step()
    assert torch.equal(replicas.rows, before)


@pytest.mark.parametrize("base", BASES)
def test_an_optimizer_that_threw_away_the_rows_gradient_is_an_error(base):
    with pytest.raises(RuntimeError, match=r"do not call optimizer\.zero_grad\(\)"):
        strange(forget_rows, base)


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
    results = {clear.__name__: torch.equal(strange(clear)[0], expected) for clear in (forget, zero, zero_rows)}
    results["discarded"] = torch.equal(strange(forget, discard=True)[0], expected)
    results["skipped"] = torch.equal(strange(forget, skip=True)[0], expected)
    expected, _ = strange(nothing, model=Bfloat)
    results["bfloat16"] = torch.equal(strange(forget, model=Bfloat)[0], expected)
    results["bfloat16 discarded"] = torch.equal(strange(forget, model=Bfloat, discard=True)[0], expected)
    try:
        strange(forget_rows)
        results["error"] = None
    except Exception as error:
        results["error"] = f"{type(error).__name__}: {error}"
    return results


@pytest.fixture(scope="module")
def processes():
    return spawn(strange_on_processes, 2)


@pytest.mark.parametrize("case", ["forget", "zero", "zero_rows", "discarded", "bfloat16", "bfloat16 discarded", "skipped"])
def test_zero_grad_of_a_stranger_changes_nothing_on_processes(processes, case):
    assert all(result[case] for result in processes)


def test_an_optimizer_that_threw_away_the_rows_gradient_is_an_error_on_processes(processes):
    assert all("do not call optimizer.zero_grad()" in result["error"] for result in processes)


# --- buffers and copies ---


def trained(m=3, steps=3, dropout=0.5):
    task = Normal(dropout)
    replicas = Replicas(task.model(), Cluster(m))
    algorithm = local(replicas, base="sgp" if m > 1 else "local_sgd")
    tally = TrainingMeter(len(replicas.models), torch.device("cpu"))
    for _ in train(task, replicas, algorithm, lambda step: 0.1, steps, 0, tally):
        pass
    return task, replicas, algorithm, tally


def test_buffers_make_the_round_trip_exactly():
    _, replicas, *_ = trained()
    counter = 2**40 + 3  # beyond float32
    replicas.models[1].norm.num_batches_tracked.fill_(counter)
    saved = replicas.buffers()
    assert saved.shape == (3, 9) and saved.dtype == torch.float64 and not torch.equal(saved[0], saved[2])
    _, others, *_ = trained(steps=1)
    others.load_buffers(saved)
    for model, other in zip(replicas.models, others.models):
        for (name, a), (_, b) in zip(model.named_buffers(), other.named_buffers()):
            assert torch.equal(a, b) and a.dtype == b.dtype, name
    assert others.models[1].norm.num_batches_tracked.item() == counter
    assert others.models[1].norm.num_batches_tracked.dtype == torch.int64
    single = Replicas(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)), Cluster(1))
    single.models[0][1].running_mean.fill_(0.1)  # a float32 survives float64
    values = single.buffers()
    single.models[0][1].running_mean.zero_()
    single.load_buffers(values)
    assert (single.models[0][1].running_mean == torch.tensor(0.1)).all()


def test_a_model_without_buffers_has_none():
    replicas = Replicas(torch.nn.Linear(2, 1), Cluster(3))
    assert replicas.buffers().shape == (3, 0)
    replicas.load_buffers(replicas.buffers())


def test_a_snapshot_is_a_copy():
    _, replicas, algorithm, _ = trained()
    rows, buffers = replicas.rows.detach().clone(), replicas.buffers()
    x = algorithm.average()
    copied = replicas.snapshot(x, buffers[2:])
    assert not copied.training and all(model.training for model in replicas.models)
    assert torch.equal(copied.norm.running_mean, replicas.models[2].norm.running_mean)
    ours = {replicas.rows.untyped_storage().data_ptr(), x.untyped_storage().data_ptr()}
    ours |= {b.untyped_storage().data_ptr() for model in replicas.models for b in model.buffers()}
    assert not ours & {t.untyped_storage().data_ptr() for t in [*copied.parameters(), *copied.buffers()]}
    for tensor in [*copied.parameters(), *copied.buffers()]:
        tensor.detach().fill_(7)
    assert torch.equal(replicas.rows, rows) and torch.equal(replicas.buffers(), buffers)
    again = replicas.snapshot(x, buffers[:1])  # one copy, filled anew
    assert again is copied and torch.equal(torch.cat([p.flatten() for p in again.parameters()]), x[0, : replicas.parameters])


def test_norms_average_local_and_recalibrate():
    task, replicas, algorithm, tally = trained(m=3)
    norms = [model.norm for model in replicas.models]
    stack = lambda name: torch.stack([getattr(norm, name) for norm in norms]).double()
    assert not torch.equal(norms[0].running_mean, norms[1].running_mean)

    def judged(policy):
        task.seen.clear()
        evaluate(task, replicas, algorithm, tally, batchnorm=policy)
        return task.seen[0]

    seen = judged("average")
    torch.testing.assert_close(seen["norm.running_mean"], stack("running_mean").mean(0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(seen["norm.running_var"], stack("running_var").mean(0), rtol=1e-13, atol=1e-13)
    assert seen["norm.num_batches_tracked"] == 3
    seen = judged("local")
    assert torch.equal(seen["norm.running_mean"], norms[0].running_mean)
    assert torch.equal(seen["norm.running_var"], norms[0].running_var)
    seen = judged("recalibrate")  # the averaged weights meet one batch of each worker, of the last step
    x = algorithm.average()[0]
    weight, bias = x[:12].view(4, 3), x[12:16]
    hidden = [task.draw(2, worker) @ weight.T + bias for worker in range(3)]
    means, variances = (torch.stack([statistic(h, 0) for h in hidden]).mean(0) for statistic in (torch.mean, torch.var))
    torch.testing.assert_close(seen["norm.running_mean"], means, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen["norm.running_var"], variances, rtol=1e-12, atol=1e-12)
    assert torch.equal(seen["first.weight"], weight)
    copied = replicas.snapshot(x[None], replicas.buffers()[:1])
    assert copied.norm.momentum == norms[0].momentum == 0.1 and not copied.norm.training
    with pytest.raises(ValueError, match="batchnorm='mean': choose one of average, local, recalibrate"):
        judged("mean")


# --- beginnings ---


def begun(m):
    torch.manual_seed(slowmo.Cluster(m).process)  # each process draws another model
    return Replicas(torch.nn.Linear(2, 3), Cluster(m)).rows.detach()


def test_everybody_starts_from_process_zero():
    first, second = spawn(begun, 2, 4)
    assert first.any() and torch.equal(first, second) and torch.equal(first[0], first[1])


@pytest.mark.parametrize("model, remedy", [
    (torch.nn.ReLU(), "nothing to train"),
    (torch.nn.Linear(2, 2).requires_grad_(False), "no parameter that requires a gradient"),
    (torch.nn.Linear(2, 2, dtype=torch.complex64), "must be real"),
    (torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta")), r"one device.*model\.to\(device\)"),
])  # fmt: skip
def test_refusals(model, remedy):
    with pytest.raises(ValueError, match=remedy):
        Replicas(model, Cluster(1))


def test_restart_and_load_reach_parameters_of_another_dtype():
    model = torch.nn.Module()
    model.wide, model.narrow = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    replicas = slowmo.Replicas(model, slowmo.Cluster(2))
    base = slowmo.LocalSGD(replicas, torch.optim.SGD([replicas.rows], lr=0.1))
    state = {name: value.clone() for name, value in base.state()[0].items()}, dict(base.state()[1])
    base.restart(torch.full_like(replicas.rows[:1], 1.5))
    assert all((one.narrow == 1.5).all() and one.narrow.dtype == torch.bfloat16 for one in replicas.models)
    base.load(*state)
    assert all((one.narrow == 0).all() for one in replicas.models)


@pytest.mark.parametrize("base", BASES)
def test_a_loss_scale_changes_nothing_else(base):
    """A power of two: bitwise, and the losses that are counted are unscaled."""
    results = []
    for scale in (1.0, 1024.0):
        task = quadratic(2)
        replicas = Replicas(task.model(), Cluster(2), loss_scale=scale)
        algorithm, tally = BASES[base](replicas, sgd(replicas.rows, momentum=0.9)), TrainingMeter(2, torch.device("cpu"))
        for _ in train(task, replicas, algorithm, lambda step: 0.1, 4, 1, tally):
            pass
        results.append((replicas.rows.detach().clone(), tally.losses))
    assert all(torch.equal(plain, scaled) for plain, scaled in zip(*results))


def test_a_table_is_no_state():
    """Buffers that are not persistent are neither saved nor averaged."""
    model = torch.nn.BatchNorm1d(2)
    model.register_buffer("table", torch.arange(5.0), persistent=False)
    replicas = Replicas(model, Cluster(2))
    buffers = replicas.buffers()
    assert buffers.shape == (2, 5)  # mean, variance, counter
    replicas.models[1].table += 1
    replicas.load_buffers(buffers + 3)
    assert replicas.models[0].running_mean.tolist() == [3, 3] and replicas.models[1].table[0] == 1
    assert replicas.snapshot(replicas.rows.detach()[:1], buffers[1:]).running_var.tolist() == [1, 1]
