"""A LightningModule. The ddp strategy would wrap it in DistributedDataParallel, which averages every gradient: here it leaves the module
alone, and SlowMo sends."""

import os

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from loop import accuracy, batch
from torch import nn

import slowmo


class Bare(DDPStrategy):
    """One rank per device, no wrapper."""

    def configure_ddp(self):
        pass


class Signs(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 2))

    def training_step(self, step, _):
        x, y = batch(int(step))
        return nn.functional.cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        inner = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        # over self.model, which training_step calls; Lightning never calls the LightningModule itself
        self.optimizer = slowmo.SlowMo(self.model, inner, base="local_sgd", tau=12, beta=0.5)
        return self.optimizer


def train(steps: int = 300):
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun
    module = Signs()
    trainer = lightning.Trainer(accelerator="cpu", devices=devices, strategy=Bare() if devices > 1 else "auto", max_epochs=1, logger=False,
                                gradient_clip_val=1.0, use_distributed_sampler=False, enable_checkpointing=False,
                                enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(range(steps), batch_size=None))
    return module.model, module.optimizer


if __name__ == "__main__":
    print(f"accuracy of the averaged model {accuracy(*train()):.3f}")
