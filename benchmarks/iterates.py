"""Whether a device computes what it should: iterates in float64, as numbers to compare. benchmarks.gpu writes down how far they are apart.

`loops` is every base and outer once more, by matrices `[m, m]` and Algorithm 1 as it stands, without anything of the library but its
graphs; `ours` is the library's own loop. `network` gives iterates of small ResNets, `collectives` tries a process group of one rank.
"""

import dataclasses
import functools
import types
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import slowmo
from experiments.tasks.quadratic import Quadratic
from slowmo import outer
from slowmo.optimizer import BASES
from slowmo.train import TrainingMeter, train

TAU, BETA, LR, DECAY, MOMENTUM = 3, 0.7, 0.1, 1e-4, 0.9
OUTERS = {
    "none": None,
    **{f"average, {kind}": functools.partial(outer.Average, buffers=kind) for kind in ("reset", "maintain", "average")},
    **{f"slowmo, {kind}": functools.partial(outer.SlowMo, beta=BETA, buffers=kind) for kind in ("reset", "maintain", "average")},
    "slowmo, noaverage": functools.partial(outer.SlowMo, beta=BETA, buffers="maintain", exact=False),
    "diloco, maintain": functools.partial(outer.NesterovOuter, beta=BETA, buffers="maintain"),
    "streaming, maintain": functools.partial(outer.Streaming, beta=BETA, buffers="maintain"),
}
PAIRS = [(base, name) for base in BASES for name in OUTERS if base == "local_sgd" or name != "streaming, maintain"]
STEPS = 2 * TAU + 1


@dataclasses.dataclass
class Loaded:
    """A task whose batches are the same in each step."""

    pieces: list
    loss: Callable[[nn.Module, tuple], torch.Tensor]

    def batches(self, step, workers, part):
        return [self.pieces[i] for i in workers]


def stepper(task, replicas, algorithm, schedule, vectorize=False, **way) -> Callable[[], object]:
    """One call is one iteration of the suite's own loop."""
    meter = TrainingMeter(len(replicas.models), replicas.cluster.device)
    return train(task, replicas, algorithm, schedule, 10**9, 0, meter, vectorize, **way).__next__


def loops(base: str, name: str) -> torch.Tensor:
    """The iterates `[m, d]` after STEPS steps of Nesterov SGD on the quadratic, on the CPU."""
    task, (kind, _, buffers) = quadratic("cpu"), name.partition(", ")
    A, b, (m, d) = task.A, task.b, task.b.shape
    # which unknowns take a slow step after which steps of a round
    due = {1: slice(0, d // 2), TAU: slice(d // 2, d)} if kind == "streaming" else {TAU: slice(0, d)}
    graph = {"sgp": slowmo.Exponential(m), "osgp": slowmo.Exponential(m), "dpsgd": slowmo.Ring(m)}.get(base)
    mean = torch.full((m, m), 1 / m, dtype=torch.float64)
    x = task.x0.repeat(m, 1)
    x0, u, v = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
    for k in range(STEPS):
        P = slowmo.mixing_matrix(graph, k) if graph else torch.eye(m, dtype=torch.float64)
        g = torch.einsum("wij,wj->wi", A, x - b)
        g = (mean @ g if base == "allreduce" else g) + DECAY * x
        v = MOMENTUM * v + g
        step = LR * (g + MOMENTUM * v)
        x = P @ (x - step) if base == "sgp" else P @ x - step
        if kind == "none" or k % TAU + 1 not in due:
            continue
        c = due[k % TAU + 1]
        y = x[:, c] if buffers == "noaverage" else mean @ x[:, c]
        if kind == "slowmo":
            u[:, c] = BETA * u[:, c] + (x0[:, c] - y) / LR
            y = x0[:, c] = x0[:, c] - LR * u[:, c]
        elif kind in ("diloco", "streaming"):
            u[:, c] = BETA * u[:, c] + (x0[:, c] - y)
            y = x0[:, c] = y - BETA * u[:, c]
        x[:, c] = y
        v = 0 * v if buffers == "reset" else mean @ v if buffers == "average" else v
    return x


def ours(base: str, name: str, device: str) -> torch.Tensor:
    """The same from the library, on a device."""
    task = quadratic(device)
    model, m = task.model(), len(task.A)
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, nesterov=True, weight_decay=DECAY, fused=True)
    fragments = 2 if name.startswith("streaming") else 1
    replicas = slowmo.Replicas(model, slowmo.Cluster(m, device), optimizer.param_groups, num_fragments=fragments)
    algorithm = BASES[base](replicas, optimizer)
    step = stepper(task, replicas, OUTERS[name](algorithm, tau=TAU) if OUTERS[name] else algorithm, lambda step: LR)
    for _ in range(STEPS):
        step()
    return replicas.rows().cpu()


def network(device: str, **way) -> torch.Tensor:
    """The iterates of three small ResNets in float64, and their averaged BatchNorm statistics."""
    from experiments.tasks.resnet import ResNet

    torch.manual_seed(1)
    model = ResNet([1, 0, 0, 0], 4).double().to(device, memory_format=torch.channels_last)
    drawn = [(torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(0, 10, (4,))) for _ in range(3)]
    pieces = [(x.to(device, memory_format=torch.channels_last), y.to(device)) for x, y in drawn]
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, nesterov=True, fused=True)
    replicas = slowmo.Replicas(model, slowmo.Cluster(3, device), optimizer.param_groups)
    task = Loaded(pieces, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    step = stepper(task, replicas, outer.SlowMo(slowmo.SGP(replicas, optimizer), tau=TAU, beta=BETA), lambda step: LR, **way)
    for _ in range(STEPS):
        step()
    return torch.cat([replicas.rows().flatten(), *(buffer.flatten() for buffer in replicas.mean_buffers().values())]).cpu()


def collectives(device: str) -> torch.Tensor:
    """Of a process group of one rank: a sum, a broadcast of bytes, on a GPU a message to itself too; iterates within the group."""
    dist.init_process_group("gloo" if device == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sent = torch.arange(64.0, device=device)
        found = [sent.clone() for _ in range(3)]
        dist.all_reduce(found[0], async_op=True).wait()
        dist.broadcast(found[1].view(torch.uint8), 0, async_op=True).wait()
        if device != "cpu":
            found[2].zero_()
            for handle in dist.batch_isend_irecv([dist.P2POp(dist.irecv, found[2], 0), dist.P2POp(dist.isend, sent, 0)]):
                handle.wait()
        if not all(torch.equal(part, sent) for part in found):
            raise RuntimeError("a message of one rank to itself arrived changed")
        return ours("sgp", "slowmo, reset", device)
    finally:
        dist.destroy_process_group()


class Halves(Quadratic):
    """Its unknowns are two parameters, so that there are fragments."""

    def model(self) -> nn.Module:
        model = nn.Module()
        model.first, model.second = (nn.Parameter(part.clone()) for part in self.x0.chunk(2))
        return model

    def loss(self, model: nn.Module, batch) -> torch.Tensor:
        return super().loss(types.SimpleNamespace(x=torch.cat([model.first, model.second])), batch)


def quadratic(device: str) -> Quadratic:
    return Halves(workers=4, seed=1, dtype="float64", device=device, dimension=40)
