"""On a GPU: the first steps of every base, outer and task are a CPU's up to rounding, in-process and through nccl.

`pytest -m gpu`; skipped where there is none. GPU_TESTS_ON=cpu runs the same code on a CPU, to see that the tests themselves work.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import arrays, free_port
from helpers import BASES, build, run

import slowmo
from benchmarks import iterates
from benchmarks.gpu import WAYS
from experiments.tasks.quadratic import Quadratic
from experiments.tasks.resnet import ResNet
from slowmo import passes
from slowmo.cluster import Cluster

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch sees no GPU")]
ROOT = Path(__file__).parents[2]
slow = functools.partial(slowmo.outer.SlowMo, tau=3, beta=0.6)
OUTERS = {
    "none": None,
    "average": functools.partial(slowmo.Average, tau=3),
    **{f"slowmo {kind}": functools.partial(slow, buffers=kind) for kind in ("reset", "maintain", "average")},
    "noaverage": functools.partial(slow, exact=False),
    "diloco": functools.partial(slowmo.outer.NesterovOuter, tau=3),
}
OPTIMIZERS = {
    "nesterov": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "fused": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "adam": functools.partial(torch.optim.Adam, lr=0.1, eps=1e-3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("base", BASES)
def test_iterates_are_a_cpus(base, outer, optimizer):
    rows = []
    for device in ("cpu", DEVICE):
        task = Quadratic(workers=4, seed=1, dtype="float64", device=device, dimension=40, noise=0.0)
        replicas, algorithm = build(task, 4, base, OPTIMIZERS[optimizer], OUTERS[outer], Cluster(4, device))
        rows.append(run(task, replicas, algorithm, 7, 0.1).cpu())
    torch.testing.assert_close(*rows, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_a_network_is_a_cpus_however_it_is_computed(way):
    if DEVICE == "cpu" and "graph" in WAYS[way]:
        pytest.skip("a graph needs a GPU")
    torch.testing.assert_close(iterates.network(DEVICE, **WAYS[way]), iterates.network("cpu"), rtol=1e-9, atol=1e-9)


def test_a_graph_of_a_network_at_its_own_settings():
    """float32 and cuDNN's search, whose findings hold for weights at the same alignment: the warm-up's must be those of the rows."""
    if DEVICE == "cpu":
        pytest.skip("a graph needs a GPU")
    model = ResNet([1, 1, 1, 0], 16, 10, stride=2).to(DEVICE, memory_format=torch.channels_last)
    replicas = slowmo.Replicas(model, Cluster(2, DEVICE))
    losses, batch = torch.zeros(2, dtype=torch.float64, device=DEVICE), torch.randn(8, 3, 32, 32, device=DEVICE)
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        call = passes.prepared(replicas, lambda model, x: model(x).square().mean(), losses, batch, graph=True)
        for row in range(2):
            call(row, batch)
        call.finish()
    finally:
        torch.backends.cudnn.benchmark = before
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize("way", [{"graph": True}, {"compile": True}, {"compile": True, "graph": True}], ids=str)
def test_dropout_is_the_loop_s(way):
    if DEVICE == "cpu" and "graph" in way:
        pytest.skip("a graph needs a GPU")
    found = []
    for options in ({}, way):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 1)).to(DEVICE, torch.float64)
        replicas = slowmo.Replicas(model, Cluster(3, DEVICE))
        losses, batches = torch.zeros(3, dtype=torch.float64, device=DEVICE), torch.randn(6, 8, 64, dtype=torch.float64).to(DEVICE)
        call = passes.prepared(replicas, lambda model, x: model(x).square().mean(), losses, batches[0], **options)
        for k, batch in enumerate(batches):
            torch.manual_seed(k)
            call(k % 3, batch)
        call.finish()
        found.append((replicas.gradients().cpu(), losses.cpu()))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_a_process_group_of_one_rank():
    torch.testing.assert_close(iterates.collectives(DEVICE).cpu(), iterates.loops("sgp", "slowmo, reset"), rtol=1e-10, atol=1e-12)


def finished(cwd, *words, processes=1) -> Path:
    """A run in processes of their own, not forked from this one, whose CUDA could not be used there; its folder."""
    meeting = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = []
    for rank in range(processes):
        more = meeting | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        environment = os.environ | {name: str(value) for name, value in more.items()}
        started.append(subprocess.Popen([sys.executable, str(ROOT / "run.py"), *words], cwd=cwd, env=environment, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))  # fmt: skip
    said = [process.communicate(timeout=280)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "".join(said)
    (path,) = Path(cwd).glob("runs/*/seed1")
    return path


QUADRATIC = ("task=quadratic", "workers=4", "steps=9", "outer.tau=3", "dtype=float64", "task.dimension=40")


@pytest.mark.parametrize("launch", [("launch=inprocess",), ("launch=local", "launch.processes=1")])
def test_each_launcher(launch, tmp_path):
    x = []
    for device in ("cpu", DEVICE):
        folder = tmp_path / device
        folder.mkdir(exist_ok=True)
        x.append(arrays(finished(folder, *QUADRATIC, *launch, "base=sgp", f"cluster.device={device}"))["x"])
    torch.testing.assert_close(*map(torch.from_numpy, x), rtol=1e-10, atol=1e-12)


def _first_losses(cwd, device, *words) -> torch.Tensor:
    import json

    cwd.mkdir(exist_ok=True)
    path = finished(cwd, *words, "steps=4", "outer.tau=2", "evaluate.every=1", f"cluster.device={device}", "cluster.deterministic=true")
    return torch.tensor([json.loads(line)["train_loss"] for line in (path / "metrics.jsonl").read_text().splitlines()])


def _photos(request, tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    return ["task=cifar10", "data=photos", "task.batch_size=32", "task.layers=[1,1,1,0]", "task.width=8", "data.train=64",
            "data.validation=20", f"data.root={tmp_path}"]  # fmt: skip


def _imagenet(request, tmp_path):
    from test_imagenet import tree

    return ["task=imagenet", "data=imagenet", f"data.root={tree(tmp_path)}", "data.train=66", "data.validation=21", "data.classes=3",
            "task.batch_size=8", "task.layers=[1,1,0,0]", "task.width=4", "task.size=32", "task.resize=36",
            "task.num_loader_workers=0"]  # fmt: skip


def _wmt16(request, tmp_path):
    pytest.importorskip("fairseq")
    from test_wmt16 import databin

    return ["task=wmt16", "data=wmt16", f"data.root={databin(tmp_path)}", "task.layers=1", "task.dim=16", "task.ffn=16", "task.heads=2",
            "task.max_tokens=48", "task.pieces=2", "task.dropout=0.0", "optimizer=adam", "optimizer.lr=0.001"]  # fmt: skip


@pytest.mark.parametrize("data", [_photos, _imagenet, _wmt16], ids=lambda make: make.__name__[1:])
def test_the_first_losses_of_each_task(data, request, tmp_path):
    (tmp_path / "data").mkdir()
    words = (*data(request, tmp_path / "data"), "workers=4", "base=sgp", "cluster.threads=1")
    ours, cpus = (_first_losses(tmp_path / f"on {name}", device, *words) for name, device in (("it", DEVICE), ("a cpu", "cpu")))
    torch.testing.assert_close(ours, cpus, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_nccl(ranks, tmp_path):
    """One rank by torchrun's variables; more where there are more GPUs."""
    if DEVICE == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"{torch.cuda.device_count()} GPU")
    x = []
    for device in ("cpu", DEVICE):
        (tmp_path / device).mkdir(exist_ok=True)
        path = finished(tmp_path / device, *QUADRATIC, "base=osgp", f"cluster.device={device}", processes=ranks)
        x.append(torch.from_numpy(arrays(path)["x"]))
    torch.testing.assert_close(*x, rtol=1e-10, atol=1e-12)
