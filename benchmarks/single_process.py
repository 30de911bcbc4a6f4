"""m workers folded into one process, against plain PyTorch and against what they have to keep in memory. Ratios are paired."""

import time

import torch
from torch.nn import functional as F

import slowmo
from benchmarks import iteration
from benchmarks.vs_peers import KINDS
from experiments.tasks.resnet import ResNet
from slowmo import outer
from slowmo.vectorize import VmapReplicas


def _eight_workers(rounds) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    return iteration.Step(["experiment=cifar10_slowmo_sgp", "workers=8", "task.batch_size=64"], random=True, device="cpu").measure(rounds)


def folding(rounds, fused=False):
    """8 ResNet-18 workers of 8 pictures as 8 rows with fused SGD, over 8 plain loops, each with its own model and torch's default SGD."""
    times = _eight_workers(rounds)
    return [a / b for a, b in zip(times["folded"], times["plain fused" if fused else "plain"])]


def slow_step(rounds):
    """What SlowMo adds to the same iterations at τ = 12, the reset of the momentum included, over an iteration: 1 + a share."""
    times = _eight_workers(rounds)
    share = zip(times["slow step"], times["first step after a reset"], times["folded"])
    return [1 + (slow + max(0, after - plain)) / iteration.TAU / plain for slow, after, plain in share]


def together(rounds, m=32, batch=8, size=8, width=16):
    """All replicas in one computation over the loop: forward and backward."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    replicas = slowmo.Replicas(ResNet([1, 1, 1, 0], width), slowmo.Cluster(m))
    batches = [(torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))) for _ in range(m)]
    loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
    at_once, ratios = VmapReplicas(replicas), []

    def loop():
        for model, own in zip(replicas.models, batches):
            loss(model, own).backward()

    def seconds(call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    for k in range(rounds + 1):
        order = (loop, lambda: at_once(loss, batches))
        found = [seconds(call) for call in order[:: 1 if k % 2 else -1]][:: 1 if k % 2 else -1]
        ratios.append(found[1] / found[0])
    return ratios[1:]


def one_worker(rounds, tau=12, batch=32):
    """One worker and no process group: a loop with SlowMo around its optimizer, over the same loop without."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    options = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "fused": True}

    def loop(wrapped: bool):
        model = ResNet([2, 2, 2, 2], 64)
        optimizer = torch.optim.SGD(model.parameters(), **options)
        optimizer = slowmo.SlowMo(model, optimizer, tau=tau, beta=0.6) if wrapped else optimizer

        def iterations() -> float:
            start = time.perf_counter()
            for _ in range(tau):
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            return time.perf_counter() - start

        return iterations

    sides, ratios = (loop(True), loop(False)), []
    for k in range(rounds + 1):
        order = sides[:: 1 if k % 2 else -1]
        ours, plain = [side() for side in order][:: 1 if k % 2 else -1]
        ratios.append(ours / plain)
    return ratios[1:]


def memory(rounds, base="sgp", m=32, d=2_000_000):
    """The process's peak, less what it held before, over rows (1 + gradient + momentum [+ inbox]) + x0 and u. One number."""
    return [held(base, m, d) / (4 * d * ((3 + (base == "osgp")) * m + 2))]


def held(base: str, m: int, d: int) -> int:
    """Bytes at the peak of some steps, less what the process held before."""
    torch.set_num_threads(1)
    _some_steps(base, 2, 16)  # what the first steps load
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak from here
    before = _kilobytes("VmHWM")
    _some_steps(base, m, d)
    return (_kilobytes("VmHWM") - before) * 1024


def built(base: str, m: int, d: int, tau: int, nesterov: bool = False, buffers: str = "reset") -> outer.SlowMo:
    """SlowMo over a base, on m rows of d numbers and no model to speak of."""
    model = torch.nn.Module()
    model.x = torch.nn.Parameter(torch.zeros(d))
    replicas = slowmo.Replicas(model, slowmo.Cluster(m))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov, fused=True)
    return outer.SlowMo(KINDS[base](replicas, optimizer), tau=tau, beta=0.6, buffers=buffers)


def _some_steps(base: str, m: int, d: int) -> None:
    algorithm = built(base, m, d, tau=2)
    for _ in range(4):
        algorithm.start()
        for segment in algorithm.replicas.segments:
            segment.grad.fill_(1e-3)
        algorithm.step()


def _kilobytes(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))
