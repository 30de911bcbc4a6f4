"""Ordinary training loops, written as for plain torch: the tests run them with and without SlowMo and compare."""

import torch
import torch.distributed as dist
from torch import nn

import slowmo

# over one process these change nothing: what is left is the user's own optimizer
IDLE = {"base": "local_sgd", "tau": 10**6}
TORCH = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.05, initial_accumulator_value=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "radam": lambda groups: torch.optim.RAdam(groups, lr=0.01),
    "adamax": lambda groups: torch.optim.Adamax(groups, lr=0.01),
    "adadelta": lambda groups: torch.optim.Adadelta(groups, lr=0.5),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=0.01),
    "asgd": lambda groups: torch.optim.ASGD(groups, lr=0.01),
}


def net(dtype=torch.float64, norm=True, seed=0) -> nn.Module:
    """Odd sizes on purpose: nothing fills a vector register."""
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(13)] if norm else []
    return nn.Sequential(nn.Linear(7, 13), *middle, nn.Tanh(), nn.Linear(13, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def batch(step: int, rank: int | None = None, dtype=torch.float64, size: int = 9):
    """(inputs, targets) of a step, of each rank its own."""
    rank = rank if rank is not None else dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(size, 7, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.stack([x.sum(1), x[:, 0] * x[:, 1], x.square().mean(1)], 1).to(dtype)


def loss_of(model, step, rank=None, dtype=torch.float64):
    x, y = batch(step, rank, dtype)
    return (model(x) - y).square().mean()


def decay_groups(model) -> list[dict]:
    """Weights with decay, biases and norms without, the head with another learning rate."""
    head = set(list(model.children())[-1].parameters())
    rest = [p for p in model.parameters() if p not in head]
    return [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        {"params": list(head), "lr": 0.02},
    ]


def train(model, optimizer, steps, clip=None, scheduler=None, dtype=torch.float64):
    """The loop that everybody writes."""
    for step in steps if not isinstance(steps, int) else range(steps):
        optimizer.zero_grad()
        loss_of(model, step, dtype=dtype).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return weights(model)


def wrapped(optimizer="nesterov", seed=0, dtype=torch.float64, norm=True, groups=None, **options):
    """(model, SlowMo over it)."""
    model = net(dtype, norm, seed)
    make = TORCH[optimizer] if isinstance(optimizer, str) else optimizer
    return model, slowmo.SlowMo(model, make(groups(model) if groups else model.parameters()), **options)


def plain(optimizer="nesterov", seed=0, dtype=torch.float64, norm=True, groups=None):
    """The same with torch alone."""
    model = net(dtype, norm, seed)
    make = TORCH[optimizer] if isinstance(optimizer, str) else optimizer
    return model, make(groups(model) if groups else model.parameters())


def ddp(optimizer="nesterov", seed=0, dtype=torch.float64, norm=True, groups=None):
    """The same with DistributedDataParallel: (model inside, wrapper to call, optimizer)."""
    model, made = plain(optimizer, seed, dtype, norm, groups)
    return model, nn.parallel.DistributedDataParallel(model, broadcast_buffers=False), made


def weights(model) -> torch.Tensor:
    """All parameters in one new row."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.detach().flatten() for p in model.parameters()])


def everywhere(row: torch.Tensor) -> torch.Tensor:
    """Every rank's row, `[ranks, d]`."""
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row.contiguous())
    return torch.stack(rows)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to rounding in float64."""
    return torch.allclose(a, b, rtol=1e-10, atol=1e-12)
