"""Compiled or captured replicas: the same gradients, losses, buffers and random numbers as one after another by autograd.

CUDA's capture is replaced here by tests/support/recorded.py, which replays kernels on a CPU as CUDA does. tests/gpu has the real one.
"""

import functools
import types

import pytest
import torch
from helpers import Several, average, build, sgd, two_groups
from normed import Normal
from recorded import Cuda, Recorder
from torch._dynamo.utils import counters
from torch.nn import functional as F

import slowmo
from experiments.tasks.resnet import ResNet
from slowmo import passes
from slowmo.outer import SlowMo
from slowmo.train import TrainingMeter, train

M = 12  # more replicas than torch compiles one function for
REAL = torch.compile


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    """aot_eager: all that inductor's way has but for its kernels, for which a C++ compiler takes long."""
    if request.param != "inductor":
        monkeypatch.setattr(torch, "compile", lambda loss, options: REAL(loss, backend=request.param))
    counters.clear()
    yield request.param
    torch.compiler.reset()


@pytest.fixture(params=[1, 2])
def captured(request, monkeypatch):
    """train() with graphs that need no GPU."""

    def prepared(replicas, loss, losses, batch, compile, graph):
        return passes.Graphs(replicas, loss, losses, batch, graph, recorded)

    monkeypatch.setattr("slowmo.train.prepared", prepared)
    return request.param


def recorded(call, stream):
    return Recorder(call).replay


def trained(base, task=None, overlap=False, accumulate=1, **options):
    """(rows, losses, buckets that advanced before each `step`, addresses before and after)."""
    task = task or Several(M)
    optimizer = two_groups(functools.partial(sgd, momentum=0.9, weight_decay=0.01))
    scale = 64.0 if accumulate > 1 else 1.0
    replicas, algorithm = build(task, M, base, optimizer, lambda b: SlowMo(b, 3), loss_scale=scale, overlap=overlap, accumulate=accumulate)
    early, finish = [], algorithm.base.handover.finish
    algorithm.base.handover.finish = lambda *a: early.append(algorithm.base.handover.first_waiting) or finish(*a)
    meter = TrainingMeter(M, torch.device("cpu"))
    where = [addresses(replicas, meter)]
    for _ in train(task, replicas, algorithm, lambda step: 0.1, 7, task.seed, meter, False, **options):
        average(algorithm)
    return replicas.rows(), meter.losses, early, [*where, addresses(replicas, meter)]


def addresses(replicas, meter):
    owned = [t for segment in replicas.segments for member in segment.members for t in member]
    return [t.data_ptr() for t in (*owned, meter.losses, *(b for own in replicas.buffers() for b in own.values()))]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("base", ["allreduce", "local_sgd", "sgp", "osgp", "dpsgd"])
def test_compiled_once_for_all_and_equal(base, overlap, backend):
    plain, compiled = trained(base, overlap=overlap), trained(base, overlap=overlap, compile=True)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch.testing.assert_close(compiled[:2], plain[:2], rtol=1e-12, atol=1e-12)
    if backend == "aot_eager":  # the same kernels in the same order
        assert torch.equal(compiled[0], plain[0])
    assert compiled[2] == plain[2] and (base != "sgp" or sum(plain[2]) == 7 * overlap)  # hooks fire


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("make", [
    lambda: ResNet([1, 0, 0, 0], 4).to(memory_format=torch.channels_last),
    lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 10)),
], ids=["batchnorm", "dropout"])  # fmt: skip
def test_buffers_and_random_numbers_are_the_same(make, backend):
    batches = [(torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(0, 10, (4,))) for _ in range(3)]
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        replicas, losses = slowmo.Replicas(make().double(), slowmo.Cluster(3)), torch.zeros(3, dtype=torch.float64)
        before, buffers = torch.get_rng_state(), [{k: v.clone() for k, v in own.items()} for own in replicas.buffers()]
        call = passes.prepared(replicas, cross_entropy, losses, batches[0], compile)
        assert torch.equal(torch.get_rng_state(), before) and not replicas.gradients().any() and not losses.any()
        torch.testing.assert_close(replicas.buffers(), buffers, rtol=0, atol=0)  # trying it out left nothing
        for row, batch in enumerate(batches):
            torch.manual_seed(row)
            call(row, batch)
        call.finish()
        found.append((replicas.gradients(), losses, replicas.buffers()))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("base", ["allreduce", "local_sgd", "sgp", "osgp", "dpsgd"])
def test_graphs_are_equal_to_the_last_bit(base, overlap, captured, monkeypatch):
    graphs = trained(base, overlap=overlap, graph=captured)
    assert graphs[3][0] == graphs[3][1]  # a graph knows addresses
    monkeypatch.undo()
    plain = trained(base, overlap=overlap)
    assert torch.equal(graphs[0], plain[0]) and torch.equal(graphs[1], plain[1])
    assert graphs[2] == plain[2]  # buckets have advanced before `step` where they do so without


def test_graphs_with_pieces_of_a_batch_and_buffers(captured, monkeypatch):
    def both(graph):
        task, meter = Normal(0.0), TrainingMeter(3, torch.device("cpu"))
        replicas, algorithm = build(task, 3, "sgp")
        for _ in train(task, replicas, algorithm, lambda step: 0.01, 4, 0, meter, False, graph=graph):
            pass
        return trained("sgp", Pieces(M), accumulate=2, graph=graph)[:2], replicas.rows(), replicas.mean_buffers()

    graphs = both(captured)
    monkeypatch.undo()
    torch.testing.assert_close(graphs, both(False), rtol=0, atol=0)


class Pieces(Several):
    """Every batch in two pieces."""

    def batches(self, step, workers, part):
        for batch in super().batches(step, workers, part):
            yield from (batch, (2 * batch[0], *batch[1:]))


def test_graphs_of_a_layer_in_another_dtype_and_an_unused_one():
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.unused = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16(), torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.second(self.first(x).bfloat16()).float().square().sum()

    found = []
    for graph in (False, True):
        torch.manual_seed(0)
        model = Mixed()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        replicas, losses = slowmo.Replicas(model, slowmo.Cluster(2)), torch.zeros(2, dtype=torch.float64)
        algorithm, loss = slowmo.LocalSGD(replicas, optimizer), lambda model, x: model(x)
        call = passes.Eager(replicas, loss, losses)
        if graph:
            call = passes.Graphs(replicas, loss, losses, torch.zeros(3, 2), 1, recorded)
        for step in range(3):
            algorithm.start()
            for row in range(2):
                call(row, torch.full((3, 2), 1.0 + step + row))
            call.finish()
            algorithm.step()
        found.append((replicas.rows(), losses))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    "batch", [(torch.zeros(2, 2), 1), (torch.zeros(3, 2), 2), (torch.zeros(3, 2, dtype=torch.float64), 1), torch.zeros(3, 2)]
)
def test_a_batch_of_another_kind_is_refused(batch):
    replicas = slowmo.Replicas(torch.nn.Linear(2, 2), slowmo.Cluster(2))
    loss = lambda model, batch: model(batch[0]).sum() * batch[1]
    call = passes.Graphs(replicas, loss, torch.zeros(2), (torch.zeros(3, 2), 1), 1, recorded)
    call(0, (torch.ones(3, 2), 1))
    with pytest.raises(ValueError, match="graph: a batch has other shapes than the one that was captured; choose graph=false"):
        call(1, batch)


def test_streams_wait_for_each_other(monkeypatch):
    """A batch is copied when the graph before it on that stream is through, and nobody goes on before all are."""
    cuda, on_gpu = Cuda(), type("OnGPU", (torch.Tensor,), {"is_cuda": True})
    cuda.install(monkeypatch)
    replicas = slowmo.Replicas(torch.nn.Linear(2, 2), slowmo.Cluster(3))
    call = passes.Graphs(replicas, lambda model, x: model(x).sum(), torch.zeros(3).as_subclass(on_gpu), torch.zeros(4, 2), 2)
    names, pools = [stream.name for stream in call.streams], call.pools
    assert len(set(names)) == len(set(pools)) == 2
    assert cuda.events == [(names[row % 2], f"captures into {pools[row % 2]}, thread_local") for row in range(3)]
    cuda.events.clear()
    for row in range(3):
        call(row, torch.full((4, 2), float(row)))
        assert (call.inputs[row % 2][0] == row).all()
    call.finish()
    turns = [[("main", f"waits for {name}"), (name, "waits for main"), (name, "replays")] for name in (*names, names[0])]
    assert cuda.events == [*(event for turn in turns for event in turn), *(("main", f"waits for {name}") for name in names)]


def test_what_cannot_be_is_refused(monkeypatch):
    replicas = slowmo.Replicas(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)), slowmo.Cluster(2))
    arguments = replicas, lambda model, x: model(x).sum()
    with pytest.raises(ValueError, match="graph captures a GPU's kernels: choose a CUDA device, or graph=false"):
        passes.prepared(*arguments, torch.zeros(2), torch.ones(2, 2), graph=True)
    on_gpu = types.SimpleNamespace(is_cuda=True)
    with pytest.raises(ValueError, match="draws random numbers on the CPU, and a graph would repeat them"):
        passes.prepared(*arguments, on_gpu, torch.ones(2, 2), graph=True)
    monkeypatch.setattr(passes, "_warmed_up", lambda *_: {"cuda"})
    with pytest.raises(ValueError, match="graph=2 cannot be: .* each other's random numbers; choose true"):
        passes.prepared(*arguments, on_gpu, torch.ones(2, 2), graph=2)
    monkeypatch.undo()

    def broken(model, x):
        raise RuntimeError("no compiler\n\nwas found\nand more")

    monkeypatch.setattr(torch, "compile", lambda loss, options: broken)
    with pytest.raises(ValueError, match="^compile cannot be: no compiler was found; choose compile=false$"):
        passes.prepared(*arguments, torch.zeros(2), torch.ones(2, 2), compile=True)
    task = Several(2)
    replicas, algorithm = build(task, 2, "sgp")
    for options in ({"compile": True}, {"graph": True}):
        with pytest.raises(ValueError, match="vectorize=true computes all replicas at once"):
            next(train(task, replicas, algorithm, lambda step: 0.1, 1, 0, None, True, **options))
