"""A task of one's own: which of two spirals a point lies on. What a task has to give stands in experiments/tasks/__init__.py."""

import torch
from torch import nn
from torch.nn import functional as F

from experiments.tasks import Task


class Spirals(Task):
    """batch_size: points per worker and step."""

    steps_per_epoch = 50

    def __init__(self, workers: int, seed: int, dtype: str, device: str, batch_size: int = 32, width: int = 32):
        self.seed, self.batch_size, self.width = seed, batch_size, width
        self.dtype, self.device = getattr(torch, dtype), torch.device(device)

    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        model = nn.Sequential(nn.Linear(2, self.width), nn.Tanh(), nn.Linear(self.width, self.width), nn.Tanh(), nn.Linear(self.width, 2))
        return model.to(self.device, self.dtype)

    def batches(self, step: int, workers, part: tuple[int, int]):
        for worker in workers:  # the same points in every layout: they depend on (seed, step, worker) alone
            x, y = self.points(self.batch_size, 1 + step * 10_000 + worker)
            yield x[part[0] :: part[1]], y[part[0] :: part[1]]

    def loss(self, model: nn.Module, batch) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y)

    def evaluate(self, model: nn.Module, part: tuple[int, int]) -> dict:
        x, y = (values[part[0] :: part[1]] for values in self.points(2000, 0))
        output = model(x)
        nll, right = float(F.cross_entropy(output, y, reduction="sum")), float((output.argmax(1) == y).sum())
        return {"count": len(y), "validation_loss": nll, "nll": nll, "accuracy": 100 * right}  # sums: the runner divides by the count

    def points(self, count: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        y = torch.randint(2, (count,), generator=generator)
        radius = torch.rand(count, generator=generator, dtype=torch.float64)
        angle = 6 * radius + torch.pi * y
        x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
        return x.to(self.device, self.dtype), y.to(self.device)
