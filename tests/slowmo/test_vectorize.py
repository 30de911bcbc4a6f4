"""All replicas in one computation: the same losses, gradients and buffers as one after another, or not at all."""

import copy
import platform
import subprocess
import sys

import pytest
import torch
from helpers import Several, average, build, quadratic, run, sgd, two_groups
from normed import Normal
from torch.nn import functional as F

import slowmo
from experiments.tasks.resnet import ResNet
from slowmo.outer import SlowMo
from slowmo.vectorize import vectorized

N = 3


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def replicas(model, spread=0.01, **options):
    """Rows that differ, each with its own buffers."""
    torch.manual_seed(1)
    made = slowmo.Replicas(model, slowmo.Cluster(N), **options)
    for segment in made.segments:
        segment.x.detach().add_(spread * torch.randn_like(segment.x))
    made.load_buffers([{name: value + k for name, value in buffers(made)[0].items()} for k in range(N)])
    return made


def buffers(replicas):
    return [{name: value.clone() for name, value in own.items()} for own in replicas.buffers()]


def batches(dtype, size=8):
    torch.manual_seed(2)
    return [(torch.randn(4, 3, size, size, dtype=dtype), torch.randint(0, 10, (4,)), None) for _ in range(N)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_the_same_as_one_after_another(dtype, tolerance, layout):
    torch.manual_seed(0)
    model = ResNet([1, 1, 0, 0], 4).to(dtype, memory_format=layout)
    one, all_ = replicas(copy.deepcopy(model)), replicas(model)
    found = vectorized(all_, loss, batches(dtype)[0])
    torch.testing.assert_close(buffers(all_), buffers(one), rtol=0, atol=0)  # trying it out left nothing
    assert not all_.gradients().any()
    for _ in range(2):  # gradients add up, buffers go on
        losses = found(loss, batches(dtype))
        expected = [loss(model, batch) for model, batch in zip(one.models, batches(dtype))]
        for value in expected:
            value.backward()
        torch.testing.assert_close(losses, torch.stack(expected).detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(all_.gradients(), one.gradients(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(buffers(all_), buffers(one), rtol=tolerance, atol=tolerance)
    assert (all_.gradients()[0] - all_.gradients()[1]).abs().max() > 1e-3  # each its own


def test_tied_and_unused_parameters():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.unused = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), torch.nn.Linear(2, 2)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).tanh())

    torch.manual_seed(0)
    model = Tied().double()
    one, all_ = replicas(copy.deepcopy(model)), replicas(model)
    square = lambda model, x: model(x).square().mean()
    inputs = [torch.randn(5, 6, dtype=torch.float64) for _ in range(N)]
    vectorized(all_, square, inputs[0])(square, inputs)
    for replica, x in zip(one.models, inputs):
        square(replica, x).backward()
    torch.testing.assert_close(all_.gradients(), one.gradients(), rtol=1e-13, atol=1e-13)


class Replaces(torch.nn.Module):
    """Its buffer is replaced, not written: no stack sees that."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3 * 64, 10)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("model", [
    torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(3 * 64, 10)),  # every worker draws its own numbers
    Replaces(),
    ResNet([2, 2, 2, 2], 64),  # the loop is faster
], ids=["dropout", "replaced buffer", "large"])  # fmt: skip
def test_one_after_another_where_it_must_be(model):
    made = replicas(model, 0.0)
    before, batch = buffers(made), batches(torch.float32, 32 if isinstance(model, ResNet) else 8)[0]
    assert vectorized(made, loss, batch) is None
    if not isinstance(model, ResNet):
        with pytest.raises(ValueError, match="vectorize=true cannot be: .*; choose auto or false"):
            vectorized(made, loss, batch, True)
    assert not made.gradients().any()
    torch.testing.assert_close(buffers(made), before, rtol=0, atol=0)


def test_batches_that_do_not_stack_are_refused():
    made = replicas(ResNet([1, 0, 0, 0], 4))
    found = vectorized(made, loss, batches(torch.float32)[0], True)
    short = batches(torch.float32)
    short[1] = tuple(part if part is None else part[:2] for part in short[1])
    with pytest.raises(RuntimeError):
        found(loss, short)
    with pytest.raises(ValueError, match="do not stack"):
        found(loss, [(x, y, k) for k, (x, y, _) in enumerate(batches(torch.float32))])


def test_one_replica_or_several_pieces_go_one_by_one():
    batch = batches(torch.float32)[0]
    for mode in ("auto", True):  # one replica is no reason to complain
        assert vectorized(slowmo.Replicas(ResNet([1, 0, 0, 0], 4)), loss, batch, mode) is None
    several = replicas(ResNet([1, 0, 0, 0], 4), accumulate=2)
    assert vectorized(several, loss, batch) is None
    with pytest.raises(ValueError, match="cannot be: a worker's batch comes in several pieces; choose auto or false"):
        vectorized(several, loss, batch, True)


def test_parameters_of_several_dtypes_go_one_by_one():
    mixed = replicas(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16()))
    square = lambda model, x: model[1](model[0](x).bfloat16()).float().square().sum()
    assert vectorized(mixed, square, torch.ones(2, 2)) is None
    with pytest.raises(ValueError, match="cannot be: parameters have several dtypes"):
        vectorized(mixed, square, torch.ones(2, 2), True)


def test_the_mode_is_the_caller_s():
    small, large = ResNet([1, 0, 0, 0], 4), ResNet([1, 1, 1, 1], 32)
    batch = batches(torch.float32, 32)[0]
    assert vectorized(replicas(copy.deepcopy(small)), loss, batch, False) is None
    assert vectorized(replicas(copy.deepcopy(small)), loss, batch, "auto") is not None
    made = replicas(large)
    assert vectorized(made, loss, batch, "auto") is None  # the loop is faster
    assert vectorized(made, loss, batch, True) is not None
    for mode in ("yes", None, 2):
        with pytest.raises(ValueError, match=f"vectorize={mode}: choose auto, true or false"):
            vectorized(made, loss, batch, mode)


def test_trying_it_out_draws_no_random_number():
    made = replicas(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(3 * 64, 10)))
    batch, state = batches(torch.float32)[0], torch.get_rng_state()
    assert vectorized(made, loss, batch) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("base", ["allreduce", "local_sgd", "sgp", "osgp"])
def test_whole_runs_are_equal_up_to_rounding(base, overlap):
    """With several segments, a loss scale and slow momentum, stepped late and by the hooks."""
    results = []
    for mode in (False, True):
        task = Several(4)
        optimizer = two_groups(lambda groups: sgd(groups, momentum=0.9, weight_decay=0.01))
        replicas, algorithm = build(task, 4, base, optimizer, lambda b: SlowMo(b, 3), loss_scale=64.0, overlap=overlap)
        results.append(run(task, replicas, algorithm, 7, 0.1, mode))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_buffers_go_on_in_the_models_themselves():
    """Averages, evaluation and checkpoints read the models' own."""
    rows = []
    for mode in (False, True):
        task = Normal(0.0)
        replicas, algorithm = build(task, 3, "sgp")
        run(task, replicas, algorithm, 4, 0.01, mode)
        rows.append((buffers(replicas), replicas.mean_buffers(), average(algorithm)))
        assert all(own["norm.num_batches_tracked"] == 4 for own in buffers(replicas))
    torch.testing.assert_close(*rows, rtol=1e-10, atol=1e-10)


def test_a_run_takes_the_same_way_wherever_it_goes_on():
    """auto judges a worker's batch, not how many workers are here, and no clock."""
    for workers in (2, 4):
        replicas, _ = build(quadratic(4), workers, "local_sgd")
        assert vectorized(replicas, quadratic(4).loss, next(quadratic(4).batches(0, [0], (0, 1)))) is not None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.slow
def test_the_memory_of_an_iteration_is_there_for_the_next():
    """In a process of its own: what others have freed before decides what the allocator keeps."""
    script = """
import resource, torch, slowmo
from torch.nn import functional as F
from experiments.tasks.resnet import ResNet
from slowmo.vectorize import VmapReplicas
torch.set_num_threads(1)
at_once = VmapReplicas(slowmo.Replicas(ResNet([1, 1, 1, 0], 16), slowmo.Cluster(32)))
batches = [(torch.randn(8, 3, 8, 8), torch.randint(0, 10, (8,)))] * 32
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    at_once(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batches)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[4:]))
"""
    pages = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    # 800 and more, each time, where they are given back; a busy machine may take pages away at one time
    assert pages < 200
