"""Hugging Face Accelerate. `accelerator.prepare(model)` would wrap the model in DistributedDataParallel, which averages every gradient:
with `prepare_model(model, evaluation_mode=True)` it is placed and cast, and SlowMo alone sends. The optimizer is prepared as always."""

import torch
from accelerate import Accelerator
from loop import accuracy, batch
from torch import nn

import slowmo


def train(steps: int = 300, accumulate: int = 2):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 2))
    model = accelerator.prepare_model(model, evaluation_mode=True)
    optimizer = slowmo.SlowMo(model, torch.optim.AdamW(model.parameters(), lr=1e-2), base="local_sgd", tau=12, beta=0.5)
    model.no_sync = optimizer.no_sync  # where gradients are averaged (allreduce), accumulate() then averages once per step
    prepared = accelerator.prepare_optimizer(optimizer)

    for step in range(steps * accumulate):
        with accelerator.accumulate(model):
            x, y = batch(step)
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            prepared.step()
            prepared.zero_grad()
    return model, optimizer


if __name__ == "__main__":
    print(f"accuracy of the averaged model {accuracy(*train()):.3f}")
