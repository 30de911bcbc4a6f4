"""What benchmarks.gpu measures: networks, their optimizers and random data, as one plain model and as m folded replicas."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import slowmo
from benchmarks.iterates import Loaded, stepper
from slowmo import outer
from slowmo.vectorize import VmapReplicas

MOMENTUM, DECAY, TAU, BETA = 0.9, 1e-4, 12, 0.7  # of cifar10_slowmo_sgp


class Transformer(nn.Module):
    """torch's encoder and decoder with one matrix for all embeddings. (source, target), `[batch, length]` -> `[batch, length, words]`."""

    def __init__(self, words=32_768, dim=1024, heads=16, layers=6, ffn=4096, dropout=0.3, length=64):
        super().__init__()
        self.words, self.places = nn.Embedding(words, dim), nn.Embedding(length, dim)
        self.core = nn.Transformer(dim, heads, layers, layers, ffn, dropout, batch_first=True)
        nn.init.normal_(self.words.weight, std=dim**-0.5)

    def forward(self, source, target):
        embed = lambda tokens: self.words(tokens) + self.places.weight[: tokens.shape[1]]
        later = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        return F.linear(self.core(embed(source), embed(target), tgt_mask=later, tgt_is_causal=True), self.words.weight)


def small_pictures(layers=(2, 2, 2, 2), width=64):
    from experiments.tasks.resnet import ResNet

    return ResNet(list(layers), width)


def large_pictures(layers=(3, 4, 6, 3), width_per_group=64):
    from experiments.tasks.torchvision_cpu import torchvision

    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, list(layers), width_per_group=width_per_group)


@dataclasses.dataclass(frozen=True)
class Case:
    """m workers of `batch` samples of `sample` (pixels of a side, or tokens): random data, the same in each step."""

    what: str
    model: Callable[[], nn.Module]
    m: int
    batch: int
    sample: int
    classes: int
    unit: str = "pictures/s"
    device: str = "cuda"
    tau: int = TAU

    @property
    def items(self) -> int:
        """What all workers see in an iteration, in `unit`."""
        return self.m * self.batch * (self.sample if self.unit == "tokens/s" else 1)

    def pieces(self) -> list[tuple[torch.Tensor, ...]]:
        """Each worker's batch; inputs first, the labels last."""
        count, device = self.m * self.batch, self.device
        if self.unit == "tokens/s":
            parts = [torch.randint(0, self.classes, (count, self.sample), device=device) for _ in range(3)]
        else:
            x = torch.randn(count, 3, self.sample, self.sample, device=device).contiguous(memory_format=torch.channels_last)
            parts = [x, torch.randint(0, self.classes, (count,), device=device)]
        return list(zip(*(part.split(self.batch) for part in parts)))

    def made(self) -> nn.Module:
        return self.model().to(self.device, memory_format=torch.channels_last)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.unit == "tokens/s":
            return torch.optim.Adam(model.parameters(), 1e-4, betas=(0.9, 0.98), fused=True)
        return torch.optim.SGD(model.parameters(), 1e-3, MOMENTUM, nesterov=True, weight_decay=DECAY, fused=True)

    def loss(self, model: nn.Module, batch) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            return F.cross_entropy(model(*batch[:-1]).flatten(0, -2), batch[-1].flatten())

    def plain(self, compile: bool) -> Callable[[], object]:
        """A step of one model with all batches as one."""
        model, batch = self.made(), [torch.cat(parts) for parts in zip(*self.pieces())]
        if self.unit != "tokens/s":
            batch[0] = batch[0].contiguous(memory_format=torch.channels_last)
        optimizer, loss = self.optimizer(model), torch.compile(self.loss) if compile else self.loss

        def step():
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def folded(self, vectorize: bool = False, **way) -> tuple[Callable[[], object], int]:
        """(a step of m replicas with SGP and SlowMo, bytes of their rows). vectorize: whatever bfloat16 rounds differently then."""
        model = self.made()
        optimizer, pieces = self.optimizer(model), self.pieces()
        replicas = slowmo.Replicas(model, slowmo.Cluster(self.m, self.device), optimizer.param_groups)
        algorithm = outer.SlowMo(slowmo.SGP(replicas, optimizer), tau=self.tau, beta=BETA)
        step = stepper(Loaded(pieces, self.loss), replicas, algorithm, lambda step: 1e-3, **way)
        if vectorize:
            at_once = VmapReplicas(replicas)

            def step():
                algorithm.start()
                at_once(self.loss, pieces)
                algorithm.step()

        return step, sum(segment.x.nbytes for segment in replicas.segments)


CASES = {
    "resnet18": Case("ResNet-18, 32x32", small_pictures, m=32, batch=128, sample=32, classes=10),  # cifar10_slowmo_sgp
    "resnet50": Case("ResNet-50, 224x224", large_pictures, m=8, batch=32, sample=224, classes=1000),
    "transformer": Case("torch.nn.Transformer of transformer-big's sizes", Transformer, m=4, batch=128, sample=28, classes=32_768,
                        unit="tokens/s"),
}  # fmt: skip
tiny = functools.partial(dataclasses.replace, what="a tiny network", m=2, batch=2, tau=2)
TINY = {
    "resnet18": tiny(CASES["resnet18"], model=lambda: small_pictures((1, 0, 0, 0), 4), sample=8),
    "resnet50": tiny(CASES["resnet50"], model=lambda: large_pictures((1, 1, 1, 1), 4), sample=32),
    "transformer": tiny(CASES["transformer"], model=lambda: Transformer(50, 8, 2, 1, 16), sample=5, classes=50),
}
