"""m workers folded into one process, against plain PyTorch and against what they have to keep in memory. Ratios are paired."""

import time

import torch
from torch.nn import functional as F

import slowmo
from benchmarks import step
from experiments.cifar10 import ResNet
from slowmo.together import Together


def folding(rounds, fused=False):
    """8 ResNet-18 workers of 8 pictures as 8 rows with fused SGD, over 8 plain loops, each with its own model and torch's default SGD."""
    torch.set_num_threads(1)
    times = step.Step(["experiment=cifar10_slowmo_sgp", "workers=8", "task.batch_size=64"], random=True, device="cpu").measure(rounds)
    return [a / b for a, b in zip(times["folded"], times["plain fused" if fused else "plain"])]


def slow_step(rounds):
    """What SlowMo adds to the same iterations at τ = 12, the reset of the momentum included, over an iteration: 1 + a share."""
    torch.set_num_threads(1)
    times = step.Step(["experiment=cifar10_slowmo_sgp", "workers=8", "task.batch_size=64"], random=True, device="cpu").measure(rounds)
    share = zip(times["slow step"], times["first step after a reset"], times["folded"])
    return [1 + (slow + max(0, after - plain)) / step.TAU / plain for slow, after, plain in share]


def together(rounds, m=32, batch=8, size=8, width=16):
    """All replicas in one computation over the loop: forward and backward."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    replicas = slowmo.Replicas(ResNet([1, 1, 1, 0], width), slowmo.Cluster(m))
    batches = [(torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))) for _ in range(m)]
    loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
    at_once, ratios = Together(replicas), []

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


def memory(rounds, base="sgp", m=32, d=2_000_000):
    """The process's peak, less what it held before, over rows (1 + gradient + momentum) + x0 and u. One number."""
    return [held(base, m, d) / (4 * d * (3 * m + 2))]


def held(base: str, m: int, d: int) -> int:
    """Bytes at the peak of some steps, less what the process held before."""
    torch.set_num_threads(1)
    _some_steps(base, 2, 16)  # what the first steps load
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak from here
    before = _kilobytes("VmHWM")
    _some_steps(base, m, d)
    return (_kilobytes("VmHWM") - before) * 1024


def _some_steps(base: str, m: int, d: int) -> None:
    model = torch.nn.Module()
    model.x = torch.nn.Parameter(torch.zeros(d))
    replicas = slowmo.Replicas(model, slowmo.Cluster(m))
    kinds = {"local_sgd": slowmo.LocalSGD, "sgp": slowmo.SGP, "osgp": slowmo.OSGP}
    optimizer = torch.optim.SGD([replicas.rows], lr=0.1, momentum=0.9, fused=True)
    algorithm = slowmo.SlowMo(kinds[base](replicas, optimizer), tau=2, beta=0.6)
    for _ in range(4):
        algorithm.start()
        replicas.rows.grad.fill_(1e-3)
        algorithm.step()


def _kilobytes(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))
