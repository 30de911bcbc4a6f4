"""An ordinary training loop with one line more: `python examples/loop.py`, on two ranks `torchrun --nproc-per-node 2 examples/loop.py`."""

import os

import torch
from torch import nn

import slowmo


def batch(step: int, size: int = 64):
    """A task that needs no download: whether two of eight numbers have the same sign. Every rank draws its own samples."""
    generator = torch.Generator().manual_seed(1000 * step + int(os.environ.get("RANK", 0)))
    x = torch.randn(size, 8, generator=generator)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def train(steps: int = 300):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = slowmo.SlowMo(model, optimizer, base="local_sgd", tau=12, beta=0.5)  # the only new line
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps + 1)  # one more than there are

    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model, optimizer


def accuracy(model, optimizer) -> float:
    """Of the average of all workers, on samples that nobody has trained on. Every rank calls it."""
    x, y = batch(10**6, 2000)
    with optimizer.averaged(), torch.no_grad():
        model.eval()
        right = (model(x).argmax(1) == y).float().mean().item()
        model.train()
    return right


if __name__ == "__main__":
    model, optimizer = train()
    print(f"rank {os.environ.get('RANK', 0)}: accuracy of the averaged model {accuracy(model, optimizer):.3f}")
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(model.state_dict(), os.devnull)  # a path of yours; after whole rounds all workers hold the same
