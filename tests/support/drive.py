"""Runs an example (argv: its name, the steps) on this rank and prints, as JSON on rank 0, what the test wants to know of all ranks."""

import importlib
import json
import os
import sys

import torch
import torch.distributed as dist

import experiments.tasks.torchvision_cpu  # noqa: F401  Lightning and transformers import torchvision, which must not fail beside a CPU's torch

try:
    import torchaudio  # noqa: F401  transformers does, and where it is a CUDA build it fails, too
except ImportError:
    pass
except OSError:
    sys.modules["torchaudio"] = None  # not installed, as far as anybody can see

name, steps = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
example = importlib.import_module(name)
model, optimizer = example.train(steps)


def everywhere(value):
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def row(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


rows = torch.stack(everywhere(row(model)))
x0 = torch.stack(everywhere(torch.cat([s["slowmo_x0"].flatten() for s in optimizer.state_dict()["state"].values()])))
with optimizer.averaged():
    average = row(model)
found = {
    "ranks": len(rows),
    "steps": everywhere(optimizer.steps),
    "distance": (rows - rows[0]).abs().max().item(),
    "distance of x0": (x0 - x0[0]).abs().max().item(),
    "distance of the average": (torch.stack(everywhere(average)) - rows.mean(0)).abs().max().item(),
    "accuracy": everywhere(example.accuracy(model, optimizer)),
}
if int(os.environ.get("RANK", 0)) == 0:
    print("found", json.dumps(found), flush=True)
if dist.is_initialized():
    dist.barrier()
sys.stdout.flush()
os._exit(0)  # gloo's threads now and then abort a regular exit
