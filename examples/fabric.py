"""Lightning Fabric. Its ddp strategy would wrap the model in DistributedDataParallel, which averages every gradient: here it leaves the
model alone, and SlowMo sends."""

import os

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from loop import accuracy, batch
from torch import nn

import slowmo


class Bare(DDPStrategy):
    """One rank per device, no wrapper."""

    def setup_module(self, module):
        return module


def train(steps: int = 300):
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=Bare() if devices > 1 else "auto")
    fabric.launch()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = slowmo.SlowMo(model, torch.optim.AdamW(model.parameters(), lr=1e-2), base="local_sgd", tau=12, beta=0.5)
    wrapped, prepared = fabric.setup(model, optimizer, move_to_device=False)  # move the model before SlowMo sees it

    for step in range(steps):
        x, y = batch(step)
        prepared.zero_grad()
        fabric.backward(nn.functional.cross_entropy(wrapped(x), y))
        fabric.clip_gradients(wrapped, prepared, max_norm=1.0)
        prepared.step()
    return model, optimizer


if __name__ == "__main__":
    print(f"accuracy of the averaged model {accuracy(*train()):.3f}")
