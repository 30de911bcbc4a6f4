"""The averaged model, and how far workers are from it."""

import math
from typing import Any

import torch

from slowmo.outer import Algorithm
from slowmo.replicas import Replicas, recalibrate
from slowmo.train import Task, TrainingMeter

BATCHNORM = ("average", "local", "recalibrate")


@torch.no_grad()
def evaluate(
    task: Task, replicas: Replicas, algorithm: Algorithm, meter: TrainingMeter, batchnorm: str = "average"
) -> tuple[dict[str, Any], torch.nn.Module]:
    """The averaged model, its BatchNorm statistics by `batchnorm`, and a metric row for it.

    batchnorm: `average` of the workers' running statistics, `local` (worker 0's), or `recalibrate` (on one training batch of each of up
    to 16 workers). Returns (row, model); the model is overwritten by the next call.
    Changes nothing that training sees. Collective: every rank calls it and gets the same row, but for its own clock; the losses are
    counted anew.
    """
    if batchnorm not in BATCHNORM:
        raise ValueError(f"batchnorm={batchnorm!r}: choose one of {', '.join(BATCHNORM)}")
    meter.synchronize()
    cluster = replicas.cluster
    if batchnorm == "local":
        buffers = {name: buffer.clone() for name, buffer in (replicas.mean_buffers_in_worker() or replicas.buffers()[0]).items()}
        for buffer in buffers.values():
            cluster.broadcast(buffer)
    else:
        buffers = replicas.mean_buffers()
    model = replicas.materialize(algorithm.base.average(), buffers)
    if batchnorm == "recalibrate":
        workers = range(min(cluster.num_workers, 16))
        recalibrate(model, task.batches(max(algorithm.steps - 1, 0), workers, (0, 1)), task.loss)
    sums = task.evaluate(model, (cluster.rank, cluster.world_size))
    device = replicas.segments[0].x.device
    values = torch.tensor([*sums.values()], dtype=torch.float64, device=device)
    cluster.all_reduce(values)
    totals = dict(zip(sums, values.tolist()))
    count = totals.pop("count")
    row = {name: total / count for name, total in totals.items()}
    losses = meter.losses.sum() / meter.count if meter.count else torch.tensor(math.nan, dtype=torch.float64)
    u_square = torch.zeros((), dtype=torch.float64, device=device)
    if "u" in algorithm.slow_names and algorithm.slow:
        for segment, (_, u) in algorithm.slow.items():
            u_square += sum(part.double().square().sum(1).mean() for part in segment.used(u))
    means = torch.stack([losses.to(device) / len(replicas.models), u_square])
    cluster.all_reduce(means)
    losses, u_square = (means / cluster.world_size).tolist()
    row |= {
        "train_loss": losses if meter.count else None,
        "slow_momentum_norm": math.sqrt(u_square) if "u" in algorithm.slow_names else None,
        "seconds": meter.seconds,
        "evaluated": f"average of {cluster.num_workers} workers, batchnorm: {batchnorm}",
    }
    meter.losses.zero_()
    meter.count = 0
    return row, model


@torch.no_grad()
def evaluate_workers(task: Task, replicas: Replicas, algorithm: Algorithm, band: bool = False) -> dict[str, float]:
    """How far workers are apart: `consensus_distance`, the root of the mean of ‖z_i − z̄‖², and with `band` the least and the largest
    of each metric over the workers' own models, `*_worker_min` and `*_worker_max`, on the samples that the averaged model is judged on.

    A worker of several ranks is judged with the mean of their BatchNorm statistics, and they share out the samples. Just after an exact
    average workers are equal: call it just before. Changes nothing that training sees; a collective.
    """
    cluster = replicas.cluster
    mean = algorithm.base.average()
    apart = torch.zeros((), dtype=torch.float64, device=mean[0].device)
    for segment, x in zip(replicas.segments, mean):
        for workers, center in zip(segment.used(segment.x.detach()), segment.used(x)):
            for worker in workers:  # row by row: no temporary of the rows' size
                apart += (worker - center[0]).double().square().sum()
    apart /= len(replicas.models)
    cluster.all_reduce(apart)
    row = {"consensus_distance": math.sqrt(float(apart) / cluster.world_size)}
    if not band:
        return row
    found: list[list[float]] = []
    names: list[str] = []
    for replica, own in zip(replicas.models, replicas.buffers()):
        shared = replicas.mean_buffers_in_worker() or {}
        before = {name: buffer.clone() for name, buffer in own.items()} if shared else {}
        for name in before:
            own[name].copy_(shared[name])
        modes = [(module, module.training) for module in replica.modules()]
        sums = task.evaluate(replica.eval(), (cluster.worker_rank, cluster.worker_size))
        for module, training in modes:  # one by one: a frozen BatchNorm stays frozen
            module.training = training
        for name, value in before.items():
            own[name].copy_(value)
        names = [name for name in sums if name != "count"]
        found.append([sums[name] for name in (*names, "count")])
    totals = torch.tensor(found, dtype=torch.float64, device=mean[0].device)
    cluster.all_reduce(totals, inside=True)
    means = totals[:, :-1] / totals[:, -1:]
    low, high = means.amin(0), means.amax(0)
    cluster.all_reduce(low, "min")
    cluster.all_reduce(high, "max")
    for k, name in enumerate(names):
        row |= {f"{name}_worker_min": low[k].item(), f"{name}_worker_max": high[k].item()}
    return row
