"""ResNets for small pictures."""

import torch

from experiments.tasks.torchvision_cpu import torchvision


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet of basic blocks in its CIFAR form: a 3x3 stem without pooling, `width` channels in the first stage."""

    def __init__(self, layers: list[int], width: int, classes: int = 10, stride: int = 1):
        if len(layers) != 4 or layers[0] < 1 or min(layers) < 0 or width < 1 or stride < 1:
            given = f"layers={layers}, width={width}, stride={stride}"
            raise ValueError(f"{given}: four stages, the first of at least one block; the others >= 1")
        self.first = width
        super().__init__(torchvision.models.resnet.BasicBlock, layers, num_classes=classes)
        self.conv1 = torch.nn.Conv2d(3, width, 3, stride=stride, padding=1, bias=False)
        torch.nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = torch.nn.BatchNorm2d(width)
        self.maxpool = torch.nn.Identity()
        self.fc = torch.nn.Linear(self.inplanes, classes)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        if planes == 64:
            self.inplanes = self.first
        if not blocks:
            return torch.nn.Sequential()
        return super()._make_layer(block, planes * self.first // 64, blocks, stride, dilate)
