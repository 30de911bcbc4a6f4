"""CIFAR-10, or real pictures in its shape: ResNets on 32x32 images, ten classes."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from experiments import files
from experiments.runner.run_dir import load_model
from experiments.tasks.amp import HalfPrecision
from experiments.tasks.resnet import ResNet
from experiments.tasks.torchvision_cpu import torchvision


class Cifar10(HalfPrecision):
    """data: `name` photos or cifar10, `root`, and for cifar10 `download`, for photos the numbers of `train` and `validation` pictures.

    batch_size: total over the workers, who must divide it. layers, width: blocks of each of the four stages and channels of the first
    ([2, 2, 2, 2] and 64: ResNet-18; [1, 1, 1, 0] and 16: ResNet-8). stride: the stem's. augment: crop (4 pixels of padding) and flip
    training pictures. Pictures live on the device as bytes; augmentation and normalisation are batched there. Which pictures a worker
    sees and how they are augmented depend on (seed, epoch, worker) alone; shards are disjoint, reshuffled each epoch; what does not fill
    a batch is left out of that epoch. autocast: bfloat16 or null; rows keep their dtype.
    Raises ValueError for numbers that do not fit, FileNotFoundError for missing data.
    """

    def __init__(self, workers: int, seed: int, dtype: str, device: str, data, batch_size: int, layers: list[int],
                 width: int, stride: int = 1, augment: bool = True, channels_last: bool = True,
                 autocast: str | None = None):  # fmt: skip
        if data.name not in ("photos", "cifar10"):
            raise ValueError(f"task=cifar10 does not read data={data.name}: choose data=photos or data=cifar10")
        if autocast not in (None, "bfloat16"):
            raise ValueError(f"task.autocast={autocast}: choose bfloat16 or null")
        self.compute_in(autocast, 1.0)
        if batch_size < 1 or batch_size % workers:
            raise ValueError(f"task.batch_size={batch_size} over {workers} workers: choose a multiple of {workers}")
        self.workers, self.seed, self.batch = workers, seed % 2**63, batch_size // workers
        self.dtype, self.device = getattr(torch, dtype), torch.device(device)
        self.layers, self.width, self.stride, self.augment = list(layers), width, stride, augment
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.data, self._loaded, self._drawn = data, None, {}
        self.steps_per_epoch = _length(data) // batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"{_length(data)} training pictures do not fill one batch of {batch_size}: lower task.batch_size")

    def model(self) -> torch.nn.Module:
        torch.manual_seed(self.seed)
        model = ResNet(self.layers, self.width, stride=self.stride)
        return model.to(self.device, self.dtype, memory_format=self.memory_format)

    def batches(self, step: int, workers, part: tuple[int, int]):
        epoch, position = divmod(step, self.steps_per_epoch)
        if self.batch % part[1]:
            raise ValueError(f"{self.batch} pictures per worker over its {part[1]} processes: choose task.batch_size so that it divides")
        size = self.batch // part[1]
        start = position * self.batch + part[0] * size
        drawn = torch.cat([self._draw(epoch, i)[:, start : start + size] for i in workers], dim=1)
        if self.device.type == "cuda":
            drawn = drawn.pin_memory()  # the copy does not wait for what the GPU has still to do
        index, top, left, flip = drawn.to(self.device, non_blocking=True)
        train = self._pictures()["train"]
        pictures = train["windows"][index, :, top, left]
        pictures = torch.where(flip.bool()[:, None, None, None], pictures.flip(-1), pictures)
        return list(zip(self._normal(pictures).split(size), train["labels"][index].split(size)))

    def loss(self, model: torch.nn.Module, batch) -> torch.Tensor:
        pictures, labels = batch
        with self.precision():
            return F.cross_entropy(model(pictures), labels)

    def evaluate(self, model: torch.nn.Module, part: tuple[int, int]) -> dict:
        """Sums of the negative log likelihood (nats) and of correct answers in per cent, over every part[1]-th validation picture."""
        nll, correct, count = 0.0, 0.0, 0
        for output, labels in self._outputs(model, part):
            nll += float(F.cross_entropy(output, labels, reduction="sum"))
            correct += float((output.argmax(1) == labels).sum())
            count += len(labels)
        return {"count": count, "validation_loss": nll, "nll": nll, "accuracy": 100 * correct}

    @torch.no_grad()
    def finish(self, models: list[Path], cluster) -> dict:
        """Of the last averaged model, where patches come from cells: its accuracy in each, and the standard error over them."""
        cells = self._pictures()["validation"].get("cells")
        if cells is None or not models:
            return {}
        model, part = self.model().eval(), (cluster.rank, cluster.world_size)
        load_model(models[-1], model)
        right = torch.cat([output.argmax(1) == labels for output, labels in self._outputs(model, part)]).double()
        correct = torch.zeros(int(cells.max()) + 1, dtype=torch.float64, device=self.device)
        correct.index_add_(0, cells[part[0] :: part[1]], right)
        cluster.all_reduce(correct)
        count = torch.bincount(cells)
        return {"cells": {"number": int((count > 0).sum()), "accuracy_error": error_over_cells(correct, count),
                          "correct": correct.int().tolist(), "count": count.tolist()}}  # fmt: skip

    def _outputs(self, model: torch.nn.Module, part: tuple[int, int]):
        """(outputs, labels) of every part[1]-th validation picture, piece by piece."""
        validation, mine = self._pictures()["validation"], slice(part[0], None, part[1])
        size = 50 if self.device.type == "cpu" else 500  # small nets: 50 stay in a core's cache, which is 1.7 times as fast
        for pictures, labels in zip(validation["pictures"][mine].split(size), validation["labels"][mine].split(size)):
            with self.precision():
                output = model(self._normal(pictures))
            yield output.to(self.dtype), labels

    def found(self) -> str:
        if self.data.name == "photos":
            missing = [package for package in ("skimage", "sklearn") if importlib.util.find_spec(package) is None]
            where = f"the photographs inside the package{'s' * (len(missing) > 1)} {' and '.join(missing)}"
            return f"not there: {where}" if missing else "photographs inside scikit-image and scikit-learn"
        folder = Path(self.data.root) / "cifar-10-batches-py"
        return str(folder) if folder.is_dir() else f"not there: {folder}" + ", it will be downloaded" * self.data.download

    def _draw(self, epoch: int, worker: int) -> torch.Tensor:
        """A worker's epoch: [4, pictures] of index, top, left, flip."""
        if self._drawn.get("epoch") != epoch:
            count = _length(self.data)
            self._drawn = {"epoch": epoch, "order": np.random.default_rng([self.seed, 2, epoch]).permutation(count)}
        if worker not in self._drawn:
            share = self.steps_per_epoch * self.batch
            rng = np.random.default_rng([self.seed, 3, epoch, worker])
            order = self._drawn["order"][worker * share : (worker + 1) * share]
            crop, flip = (9, 2) if self.augment else (1, 1)
            drawn = np.stack([order, rng.integers(0, crop, share), rng.integers(0, crop, share), rng.integers(0, flip, share)])
            drawn[1:3] += 0 if self.augment else 4
            self._drawn[worker] = torch.from_numpy(drawn)
        return self._drawn[worker]

    def _normal(self, pictures: torch.Tensor) -> torch.Tensor:
        normal = self._pictures()["normal"]
        return torch.addcmul(normal[1], pictures.to(self.dtype), normal[0]).contiguous(memory_format=self.memory_format)

    def _pictures(self) -> dict:
        """The data, loaded when first asked for: a plan does not need it."""
        if self._loaded is None:
            arrays = _load(self.data)
            images, labels = (torch.from_numpy(arrays[f"train_{name}"]).to(self.device) for name in ("images", "labels"))
            images = images.permute(0, 3, 1, 2)
            # one channel after another: a training set in float64 would take eight times its bytes
            channels = [images[:, c].float() for c in range(3)]
            mean = torch.stack([c.mean(dtype=torch.float64) for c in channels])
            std = torch.stack([c.double().square().mean() for c in channels]).sub(mean.square()).sqrt()
            padded = F.pad(images, (4, 4, 4, 4))
            held = {name: torch.from_numpy(arrays[f"validation_{name}"]).to(self.device)
                    for name in ("images", "labels", "cells") if f"validation_{name}" in arrays}  # fmt: skip
            self._loaded = {
                # every 32x32 window of each padded picture, as a view: [N, 3, 9, 9, 32, 32]
                "train": {"windows": padded.unfold(2, 32, 1).unfold(3, 32, 1), "labels": labels},
                "validation": held | {"pictures": held.pop("images").permute(0, 3, 1, 2)},
                "normal": [t.to(self.dtype).view(3, 1, 1) for t in (1 / std, -mean / std)],
            }
        return self._loaded


def error_over_cells(correct: torch.Tensor, count: torch.Tensor) -> float:
    """The standard error of the accuracy (per cent) over cells drawn anew: cluster-robust, of a ratio of sums."""
    correct, count = correct[count > 0].double(), count[count > 0].double()
    apart = correct - count * correct.sum() / count.sum()
    return float(100 * (apart.square().sum() * len(count) / (len(count) - 1)).sqrt() / count.sum())


def _length(data) -> int:
    return 50_000 if data.name == "cifar10" else data.train


def _load(data) -> dict[str, np.ndarray]:
    if data.name == "photos":
        from experiments.data import photos

        return photos.load(data.root, data.train, data.validation, heldout=data.heldout)
    if data.download:  # by one process of this machine; the others find it there
        Path(data.root).mkdir(parents=True, exist_ok=True)
        with files.lock(Path(data.root) / ".download.lock"):
            try:
                torchvision.datasets.CIFAR10(data.root, download=True)
            except (RuntimeError, OSError) as error:
                raise OSError(f"CIFAR-10 could not be downloaded to {data.root}: {error}") from error
    try:
        # torchvision unpickles these files only after their checksums matched the published ones
        sets = [torchvision.datasets.CIFAR10(data.root, train=train) for train in (True, False)]
    except RuntimeError as error:
        what = "CIFAR-10 is damaged or not whole" if (Path(data.root) / "cifar-10-batches-py").is_dir() else "no CIFAR-10"
        raise FileNotFoundError(
            f"{what} under {data.root}: give the folder that holds cifar-10-batches-py with data.root=FOLDER, "
            "or download it with data.download=true (170 MB); data=photos needs neither"
        ) from error
    names = ("train", "validation")
    return {f"{name}_images": s.data for name, s in zip(names, sets)} | {
        f"{name}_labels": np.asarray(s.targets, dtype=np.int64) for name, s in zip(names, sets)
    }
