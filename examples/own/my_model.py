"""A model of one's own for a task that exists: CIFAR-10's pictures, or photo patches, through a network without convolutions."""

import torch
from torch import nn

from experiments.tasks.cifar10 import Cifar10


class Perceptron(Cifar10):
    """width: units of the one layer between pixels and classes."""

    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)  # every run of a seed starts from the same weights
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, self.width), nn.ReLU(), nn.Linear(self.width, 10))
        return model.to(self.device, self.dtype)
