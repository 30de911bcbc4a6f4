"""The Hugging Face Trainer. It would wrap the model in DistributedDataParallel, which averages every gradient: `leave_bare` keeps it as it
is, and SlowMo sends. It saves rank 0's model and optimizer: let save_steps be a multiple of tau, so that all workers are the same then."""

import functools
import os
import tempfile

import torch
from loop import accuracy, batch
from torch import nn
from transformers import Trainer, TrainingArguments

import slowmo


class Signs(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, x, labels=None):
        logits = self.model(x)
        return logits if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def samples(steps: int) -> list[dict]:
    parts = [batch(step) for step in range(steps)]
    return [{"x": x, "labels": y} for xs, ys in parts for x, y in zip(xs, ys)]


def leave_bare(trainer: Trainer) -> None:
    trainer.accelerator.prepare_model = functools.partial(trainer.accelerator.prepare_model, evaluation_mode=True)


def train(steps: int = 300):
    torch.manual_seed(0)
    model = Signs()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=64, use_cpu=True, save_strategy="no", report_to=[],
                                      lr_scheduler_type="cosine", disable_tqdm=True, remove_unused_columns=False)  # fmt: skip
        optimizer = slowmo.SlowMo(model, torch.optim.AdamW(model.parameters(), lr=1e-2), base="local_sgd", tau=12, beta=0.5)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        trainer = Trainer(model, arguments, train_dataset=samples(steps), optimizers=(optimizer, schedule))
        leave_bare(trainer)
        trainer.train()
    return model, optimizer


if __name__ == "__main__":
    print(f"rank {os.environ.get('RANK', 0)}: accuracy of the averaged model {accuracy(*train()):.3f}")
