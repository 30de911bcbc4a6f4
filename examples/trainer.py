"""The Hugging Face Trainer. It would wrap the model in DistributedDataParallel, which averages every gradient: here it leaves the model
alone, and SlowMo sends. It saves rank 0's model and optimizer: let save_steps be a multiple of tau, when all workers are the same."""

import tempfile

import torch
from loop import accuracy, batch
from torch import nn
from transformers import Trainer, TrainingArguments

import slowmo


class SlowMoTrainer(Trainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model
        self.accelerator.prepare_model = lambda model, **_: prepare(model, device_placement=False, evaluation_mode=True)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            super().create_optimizer(model)  # the Trainer's own AdamW, with its groups
            self.optimizer = slowmo.SlowMo(self.model, self.optimizer, base="local_sgd", tau=12, beta=0.5)
        return self.optimizer


class Signs(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, x, labels=None):
        logits = self.model(x)
        return logits if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def train(steps: int = 300):
    torch.manual_seed(0)
    samples = [{"x": x, "labels": y} for xs, ys in map(batch, range(steps)) for x, y in zip(xs, ys)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=64, learning_rate=1e-2, weight_decay=0.01,
                                      use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True)  # fmt: skip
        trainer = SlowMoTrainer(Signs(), arguments, train_dataset=samples)
        trainer.train()
    return trainer.model, trainer.optimizer.optimizer  # Accelerate's wrapper around ours


if __name__ == "__main__":
    print(f"accuracy of the averaged model {accuracy(*train()):.3f}")
