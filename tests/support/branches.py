"""A model whose gradients arrive in another order at every step, worker and rank, in two parameter groups."""

import random

import torch

NAMES = ("a", "b", "c")


class Branches(torch.nn.Module):
    """Three layers beside each other. Autograd goes backward from what was computed last, so `order` decides who is first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.branches = torch.nn.ModuleDict({name: torch.nn.Linear(3, 2 + k) for k, name in enumerate(NAMES)})
        self.last = torch.nn.Linear(9, 2)
        self.double()

    def forward(self, x, order):
        parts = {name: torch.tanh(self.branches[name](x)) for name in order}
        return self.last(torch.cat([parts[name] for name in NAMES], 1))


class Shuffled:
    """Each worker has 12 samples a step, which its `accumulate` passes and its ranks share out evenly."""

    seed = 0

    def __init__(self, accumulate=1):
        self.accumulate = accumulate

    def model(self):
        return Branches()

    def batches(self, step, workers, part):
        for i in workers:
            x = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 * i + step))
            y = torch.sin((i + 1) * x[:, :2]) - i / 2
            for k in range(self.accumulate):
                order = random.Random(f"{i} {step} {k} {part[0]}").sample(NAMES, len(NAMES))
                mine = slice(k * part[1] + part[0], None, self.accumulate * part[1])
                yield x[mine], y[mine], order

    def loss(self, model, batch):
        x, y, order = batch
        return (model(x, order) - y).square().mean() / self.accumulate


def biases_apart(make):
    """parameters -> `make` over two groups, as AdamW is used: weights, and biases without weight decay."""

    def optimizer(parameters):
        parameters = list(parameters)
        weights, biases = [[p for p in parameters if p.ndim == n] for n in (2, 1)]
        return make([{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}])

    return optimizer
