"""The loop. It decides nothing: the caller evaluates, saves, prints and stops between two steps.

A task gives `model()`, `batches(step, workers, part)`, `loss(model, batch)` and `evaluate(model, part, samples)`; experiments/__init__.py
has the contract.
"""

import functools
import math
import time

import torch

from slowmo.replicas import recalibrate
from slowmo.together import where_it_pays

BATCHNORM = ("average", "local", "recalibrate")


class Tally:
    """What the loop counts: seconds of training alone, and each worker's losses since the last metric row.

    losses: `[n]`, float64. Both survive in checkpoints, so clocks and training losses go on where they were.
    """

    def __init__(self, rows: int, device: torch.device):
        self.seconds, self.count, self.device = 0.0, 0, device
        self.losses = torch.zeros(rows, dtype=torch.float64, device=device)
        self.started = None

    def start(self) -> None:
        """Training goes on now."""
        self.started = time.perf_counter()

    def stop(self) -> None:
        """Training pauses."""
        self.seconds += time.perf_counter() - self.started

    def settle(self) -> None:
        """Wait for a GPU's pending work and count it as training; called before anything that is not training."""
        if self.device.type == "cuda":
            self.start()
            torch.cuda.synchronize(self.device)
            self.stop()

    def diverged(self) -> bool:
        """Whether a loss since the last metric row was NaN or infinite, on this process. Waits for a GPU."""
        self.settle()
        return not bool(torch.isfinite(self.losses).all())


def train(task, replicas, algorithm, schedule, steps: int, seed: int, tally: Tally):
    """Yields the number of finished steps after each, from where `algorithm` stands to `steps`.

    schedule: step (from 0) -> γ. A worker's batch may come in pieces that go through its model one after another. The random
    numbers that a model draws (dropout) depend on (seed, step, worker, piece) alone, whichever process of a node has the piece.
    """
    cluster, together = replicas.cluster, None
    for step in range(algorithm.steps, steps):
        draw = functools.partial(task.batches, step, cluster.ranks, (cluster.lane, cluster.node))
        if together is None:  # trying it out is not training
            together = where_it_pays(replicas, task.loss, draw) or False
        tally.start()
        algorithm.start()
        batches = draw()
        if together:
            tally.losses += together(task.loss, list(batches))
            batches = ()
        for i, batch in enumerate(batches):
            row, k = divmod(i, replicas.accumulate)
            piece = cluster.lane + k * cluster.node
            torch.manual_seed((((seed * 1_000_003 + step) * 65_537 + cluster.ranks[row]) * 1_009 + piece) % 2**63)
            loss = task.loss(replicas.models[row], batch)
            (loss if replicas.loss_scale == 1 else loss * replicas.loss_scale).backward()
            tally.losses[row] += loss.detach()
        tally.count += 1
        algorithm.step(schedule(step))
        tally.stop()
        yield step + 1


@torch.no_grad()
def evaluate(task, replicas, algorithm, tally: Tally, batchnorm: str = "average", samples: int | None = None):
    """The averaged model, its BatchNorm statistics by `batchnorm`, and a metric row: for this model, and the band (min, max) over workers.

    batchnorm: `average` of the workers' running statistics, `local` (worker 0's), or `recalibrate` (on one training batch of each of up
    to 16 workers). samples: how many validation samples each worker's own model is judged on (None: all of them); the processes of a
    node share them out. Returns (row, model); the model is overwritten by the next call.
    Changes nothing that training sees. Collective: every process calls it and gets the same row, but for its own clock; the losses are
    counted anew.
    """
    if batchnorm not in BATCHNORM:
        raise ValueError(f"batchnorm={batchnorm!r}: choose one of {', '.join(BATCHNORM)}")
    tally.settle()
    cluster, rows = replicas.cluster, replicas.rows.detach()[:, : replicas.parameters]
    x = algorithm.average()[:, : replicas.parameters]
    u = None if algorithm.u is None else algorithm.u[:, : replicas.parameters]
    buffers = replicas.buffers()
    if batchnorm == "local":
        mean = buffers[:1].clone()
        cluster.broadcast(mean)
    else:
        mean = buffers.sum(0, keepdim=True)
        cluster.reduce(mean)
        mean /= cluster.size * cluster.node
    model = replicas.snapshot(x, mean)
    if batchnorm == "recalibrate":
        workers = range(min(cluster.size, 16))
        recalibrate(model, task.batches(max(algorithm.steps - 1, 0), workers, (0, 1)), task.loss)
    sums = task.evaluate(model, (cluster.process, cluster.processes), None)
    values = torch.tensor([*sums.values()], dtype=torch.float64, device=replicas.rows.device)
    cluster.reduce(values)
    totals = dict(zip(sums, values.tolist()))
    count = totals.pop("count")
    row = {name: total / count for name, total in totals.items()}

    band = []
    for replica in replicas.models:
        modes = [(module, module.training) for module in replica.modules()]
        sums = task.evaluate(replica.eval(), (cluster.lane, cluster.node), samples)
        for module, training in modes:  # one by one: a frozen BatchNorm stays frozen
            module.training = training
        band.append([sums[name] for name in (*totals, "count")])
    band = torch.tensor(band, dtype=torch.float64, device=replicas.rows.device)
    cluster.reduce(band, inside=True)
    band = band[:, :-1] / band[:, -1:]
    low, high = band.amin(0), band.amax(0)
    cluster.reduce(low, "min")
    cluster.reduce(high, "max")
    for k, name in enumerate(totals):
        row |= {f"{name}_min": low[k].item(), f"{name}_max": high[k].item()}

    # row by row: no temporary of the block's size
    apart = torch.stack([(row_ - x[0]).double().square().sum() for row_ in rows]).sum()
    losses = tally.losses.sum() / tally.count if tally.count else torch.tensor(math.nan, dtype=torch.float64)
    u_square = torch.zeros((), dtype=torch.float64) if u is None else u.double().square().sum(1).mean()
    means = torch.stack([t.to(rows.device) for t in (apart / len(rows), losses / len(rows), u_square)])
    cluster.reduce(means)
    apart, losses, u_square = (means / cluster.processes).tolist()
    row |= {
        "train_loss": losses if tally.count else None,
        "spread": math.sqrt(apart),
        "u_norm": None if u is None else math.sqrt(u_square),
        "seconds": tally.seconds,
        "evaluated": f"average of {cluster.size} workers, batchnorm: {batchnorm}",
    }
    tally.losses.zero_()
    tally.count = 0
    return row, model
