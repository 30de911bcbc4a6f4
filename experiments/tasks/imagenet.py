"""ImageNet, or any pictures in its layout: torchvision's networks on ImageFolder trees of JPEG files."""

import atexit
import contextlib
import hashlib
import json
import os
import signal
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from experiments.files import aside
from experiments.files import lock as file_lock
from experiments.tasks.amp import HalfPrecision
from experiments.tasks.resnet import ResNet
from experiments.tasks.torchvision_cpu import torchvision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training pictures, of 1, as in torchvision's references


class ImageNet(HalfPrecision):
    """data: `name` imagenet or glyphs, `root` (for imagenet the folder of train/ and val/), the numbers of `train` and `validation`
    pictures and of `classes` that there must be, `unreadable` (how many may be damaged), `cache` (where lists of files are kept).

    batch_size: total over the workers. model: a name that torchvision knows; with `layers`, a ResNet of basic blocks of this `width`
    instead, its 3x3 stem of stride 2. size: pixels of a training crop (scale: the least share of the picture that it covers; flip:
    half of them are mirrored); resize: the short side before validation's central crop. num_loader_workers: processes that read ahead, per
    process. autocast: bfloat16, float16 (losses times `loss_scale`) or null; rows keep their dtype.

    The order depends on (seed, epoch), a picture's augmentation on (seed, epoch, picture) alone; shards are disjoint, reshuffled each
    epoch; what does not fill a batch is left out of that epoch. A picture that cannot be read is named and counted; in training the
    next one of the list takes its place, in validation it is left out. In torchvision's ResNets the last BatchNorm of each block starts
    at 0 and the last layer from N(0, 0.01) (Goyal et al. 2017); a small ResNet (`layers`) would hardly learn from there.
    Raises ValueError for numbers that do not fit and for too many unreadable pictures, FileNotFoundError for missing data.
    """

    def __init__(self, workers: int, seed: int, dtype: str, device: str, data, batch_size: int, model: str, layers: list[int] | None,
                 width: int | None, size: int, resize: int, scale: float, flip: bool, num_loader_workers: int,
                 autocast: str | None, loss_scale: float,
                 channels_last: bool = True):  # fmt: skip
        if data.name not in ("imagenet", "glyphs"):
            raise ValueError(f"task=imagenet does not read data={data.name}: choose data=imagenet or data=glyphs")
        if batch_size < 1 or batch_size % workers:
            raise ValueError(f"task.batch_size={batch_size} over {workers} workers: choose a multiple of {workers}")
        self.compute_in(autocast, loss_scale)
        if not 0 < size <= resize or not 0 < scale <= 1 or num_loader_workers < 0:
            given = f"size={size}, resize={resize}, scale={scale}, num_loader_workers={num_loader_workers}"
            raise ValueError(f"task: {given}: 0 < size <= resize, 0 < scale <= 1 and num_loader_workers >= 0 are needed")
        if (layers is None) != (width is None):
            given = f"task.layers={layers} with task.width={width}"
            raise ValueError(f"{given}: the small ResNet needs both, torchvision's networks take neither")
        if layers is None and model not in torchvision.models.list_models(torchvision.models):
            raise ValueError(f"task.model={model}: torchvision knows no such classifier; resnet50 is the paper's")
        self.workers, self.seed, self.batch, self.data = workers, seed % 2**63, batch_size // workers, data
        self.dtype, self.device = getattr(torch, dtype), torch.device(device)
        self.name, self.layers, self.width = model, layers and list(layers), width
        self.size, self.resize, self.scale, self.flip = size, resize, scale, flip
        self.num_loader_workers = min(num_loader_workers, len(os.sched_getaffinity(0)))
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.steps_per_epoch = data.train // batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"{data.train} training pictures do not fill one batch of {batch_size}: lower task.batch_size")
        self._sets, self._order, self._unreadable = None, (None, None), {}
        self._next = self._ahead = self._normal = None

    def model(self) -> torch.nn.Module:
        torch.manual_seed(self.seed)
        if self.layers is None:
            model = torchvision.models.get_model(self.name, num_classes=self.data.classes)
            for block in model.modules():
                if isinstance(block, (torchvision.models.resnet.Bottleneck, torchvision.models.resnet.BasicBlock)):
                    torch.nn.init.zeros_((block.bn3 if hasattr(block, "bn3") else block.bn2).weight)
            if isinstance(model, torchvision.models.ResNet):
                torch.nn.init.normal_(model.fc.weight, 0, 0.01)
        else:
            model = ResNet(self.layers, self.width, self.data.classes, stride=2)
        return model.to(self.device, self.dtype, memory_format=self.memory_format)

    def batches(self, step: int, workers, part: tuple[int, int]):
        if self.batch % part[1]:
            raise ValueError(f"{self.batch} pictures per worker over its {part[1]} processes: choose task.batch_size so that it divides")
        asked = (step, workers, part)
        if self.num_loader_workers and asked == self._next:  # the second step in a row: from now on the loaders work ahead
            if self._ahead is None:
                self._ahead = iter(self._loader(self._keys(*asked), "train"))
                atexit.register(self.close)  # later, and so run before, what multiprocessing has registered: that would wait
            pieces = self._ahead
        else:  # a step of its own: another's prefetched batches stay
            keys = self._keys(*asked)
            pieces = (self._read("train", next(keys)) for _ in workers)
        if asked == self._next or self._ahead is None:
            self._next = (step + 1, workers, part)
        return (self._arrived(next(pieces)) for _ in workers)

    def loss(self, model: torch.nn.Module, batch) -> torch.Tensor:
        pictures, labels = batch
        with self.precision():
            return F.cross_entropy(model(pictures), labels)

    def evaluate(self, model: torch.nn.Module, part: tuple[int, int]) -> dict:
        """Sums over every part[1]-th picture: negative log likelihood (nats); correct answers, first or among five, in per cent."""
        mine = range(self.data.validation)[part[0] :: part[1]]
        keys = [[(0, i) for i in mine[k : k + 250]] for k in range(0, len(mine), 250)]
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        count = 0
        for piece in self._loader(keys, "val") if self.num_loader_workers and len(keys) > 1 else (self._read("val", key) for key in keys):
            pictures, labels = self._arrived(piece)
            if len(labels):
                with self.precision():
                    output = model(pictures)
                best = output.topk(min(5, output.shape[1]), 1).indices == labels[:, None]
                nll = F.cross_entropy(output.float() if self.autocast else output, labels, reduction="sum")
                sums += torch.stack([nll.double(), best[:, 0].sum().double(), best.sum().double()])
                count += len(labels)
        nll, first, among = sums.tolist()
        return {"count": count, "validation_loss": nll, "nll": nll, "accuracy": 100 * first, "top5": 100 * among}

    def found(self) -> str:
        root = Path(self.data.root)
        if self.data.name == "glyphs":
            for about in sorted(root.glob("glyphs-*/about.json")):
                with contextlib.suppress(OSError, ValueError, KeyError):
                    made = json.loads(about.read_text())
                    pictures = {"train": self.data.train, "val": self.data.validation}
                    if (made["pictures"], made.get("heldout", "validation")) == (pictures, self.data.heldout):
                        return str(about.parent)
            return f"not there: drawn under {root} from Debian's fonts when the run begins"
        return str(root) if all((root / part).is_dir() for part in ("train", "val")) else f"not there: {root}/train and {root}/val"

    def close(self) -> None:
        """End the loaders."""
        self._next = self._ahead = None
        atexit.unregister(self.close)

    def _keys(self, step: int, workers, part: tuple[int, int]):
        """Without end, from `step` on: for each worker the (epoch, picture) of its batch's part."""
        size = self.batch // part[1]
        while True:
            epoch, position = divmod(step, self.steps_per_epoch)
            if self._order[0] != epoch:
                self._order = epoch, np.random.default_rng([self.seed, 2, epoch]).permutation(self.data.train)
            order = self._order[1]  # its own: between two yields another step may be asked for
            for i in workers:
                start = (i * self.steps_per_epoch + position) * self.batch + part[0] * size
                yield [(epoch, int(k)) for k in order[start : start + size]]
            step += 1

    def _loader(self, keys, split: str):
        return DataLoader(self._pictures(split), batch_sampler=keys, num_workers=self.num_loader_workers, collate_fn=_collate,
                          worker_init_fn=_deaf, pin_memory=self.device.type == "cuda")  # fmt: skip

    def _read(self, split: str, keys: list):
        return _collate([self._pictures(split)[key] for key in keys])

    def _arrived(self, piece):
        """(pictures [n, 3, size, size] normalised on the device, labels [n]); those that could not be read are counted here."""
        pictures, labels, unreadable = piece
        for path, error in unreadable:
            if path not in self._unreadable:
                print(f"unreadable: {path}: {error}", file=sys.stderr, flush=True)
            self._unreadable[path] = error
        if len(self._unreadable) > self.data.unreadable:
            raise ValueError(
                f"{len(self._unreadable)} pictures cannot be read, {next(reversed(self._unreadable))} the last of them: "
                f"put whole files there, or allow for more than data.unreadable={self.data.unreadable}"
            )
        pictures = pictures.to(self.device, non_blocking=True).to(self.dtype)
        if self._normal is None:  # once: each copy from the host makes it wait for the GPU
            both = [[-mean / std, 1 / (255 * std)] for mean, std in zip(MEAN, STD)]
            self._normal = torch.tensor(both, dtype=torch.float64).to(self.device, self.dtype).T.reshape(2, 3, 1, 1)
        shift, scale = self._normal
        normal = torch.addcmul(shift, pictures, scale).contiguous(memory_format=self.memory_format)
        return normal, labels.to(self.device, non_blocking=True)

    def _pictures(self, split: str):
        """The data, found when first asked for: a plan does not need them."""
        if self._sets is None:
            root = Path(self.data.root)
            if self.data.name == "glyphs":
                from experiments.data import glyphs

                root = glyphs.make(root, self.data.train, self.data.validation, self.data.fonts, heldout=self.data.heldout)
            elif not all((root / part).is_dir() for part in ("train", "val")):
                raise FileNotFoundError(
                    f"no ImageNet under {root}: give the folder that holds train/ and val/, a folder a class in each, with "
                    "data.root=FOLDER (image-net.org has the files); data=glyphs needs none"
                )
            lists = {part: files(root / part, Path(self.data.cache)) for part in ("train", "val")}
            if lists["train"][2] != lists["val"][2]:
                raise ValueError(f"{root}: train/ and val/ do not hold the same classes")
            for part, key in (("train", "train"), ("val", "validation")):
                names, _, classes = lists[part]
                for what, found, name in ((f"pictures in {part}/", len(names), key), ("classes", len(classes), "classes")):
                    if found != getattr(self.data, name):
                        due = getattr(self.data, name)
                        raise ValueError(f"{root}: {found} {what}, not {due}: complete them, or set data.{name}={found}")
            from torchvision.transforms import v2
            crop = v2.RandomResizedCrop(self.size, scale=(self.scale, 1.0), antialias=True)
            train = v2.Compose([crop, v2.RandomHorizontalFlip(0.5 if self.flip else 0.0), v2.PILToTensor()])
            centre = v2.Compose([v2.Resize(self.resize, antialias=True), v2.CenterCrop(self.size), v2.PILToTensor()])
            self._sets = {
                "train": Pictures(root / "train", *lists["train"][:2], train, self.seed),
                "val": Pictures(root / "val", *lists["val"][:2], centre, None),
            }
        return self._sets[split]


class Pictures(Dataset):
    """(epoch, number) -> (picture uint8 [3, size, size], label, unreadable files met on the way: [(path, error)]).

    names [N] bytes, relative to root. seed: augmentation draws from (seed, epoch, number) alone; None: no augmentation, and a picture
    that cannot be read is None.
    """

    def __init__(self, root: Path, names: np.ndarray, labels: np.ndarray, transform, seed: int | None):
        self.root, self.names, self.labels, self.transform, self.seed = root, names, labels, transform, seed

    def __getitem__(self, key):
        epoch, number = key
        unreadable = []
        for _ in range(len(self.names)):
            path = self.root / os.fsdecode(self.names[number])
            try:
                with Image.open(path) as image:
                    picture = image.convert("RGB")
            # whatever a damaged file makes Pillow raise
            except (OSError, SyntaxError, ValueError, TypeError, IndexError, Image.DecompressionBombError) as error:
                unreadable.append((str(path), str(error)))
                if self.seed is None:
                    return None, 0, unreadable
                number = (number + 1) % len(self.names)
                continue
            if self.seed is None:
                return self.transform(picture), int(self.labels[number]), unreadable
            before = torch.get_rng_state()  # the loop's, where no loader works ahead
            draws = np.random.SeedSequence([self.seed, 3, epoch, number]).generate_state(1, np.uint64)
            torch.default_generator.manual_seed(int(draws[0] >> 1))
            try:
                return self.transform(picture), int(self.labels[number]), unreadable
            finally:
                torch.set_rng_state(before)
        raise ValueError(f"{self.root}: not one picture can be read")


def files(root: Path, cache: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(names [N] bytes below root, labels [N], classes), in ImageFolder's order; kept in `cache` until a folder changes.

    FileNotFoundError for a class without a picture. ImageNet's 1.28 million names take 40 MB; a start then asks 1,001 folders for their
    time of change instead of listing them.
    """
    root = root.resolve()
    path = cache / f"files-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}.npz"
    cache.mkdir(parents=True, exist_ok=True)
    with file_lock(path.with_suffix(".lock")):  # the processes of a machine take turns: one walks, the others read
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            with np.load(path, allow_pickle=False) as saved:
                found = {name: saved[name] for name in ("names", "labels", "classes", "folders", "changed")}
            if found["changed"].tolist() == _changed(root, found["folders"]):
                return found["names"], found["labels"], [os.fsdecode(name) for name in found["classes"]]
        before = root.stat().st_mtime_ns
        classes, numbers = torchvision.datasets.folder.find_classes(root)
        samples = torchvision.datasets.folder.make_dataset(root, numbers, extensions=torchvision.datasets.folder.IMG_EXTENSIONS)
        names = np.array([os.fsencode(os.path.relpath(name, root)) for name, _ in samples])
        labels = np.array([label for _, label in samples])
        folders = np.array([b".", *sorted({os.path.dirname(name) for name in names.tolist()} | {os.fsencode(name) for name in classes})])
        changed = _changed(root, folders)
        if changed[0] == before:  # nobody was at it meanwhile
            with aside(path) as name, open(name, "xb") as file:
                np.savez(file, names=names, labels=labels, classes=np.array([os.fsencode(name) for name in classes]), folders=folders,
                         changed=np.array(changed))  # fmt: skip
        return names, labels, classes


def _changed(root: Path, folders) -> list[int]:
    return [os.stat(root / os.fsdecode(folder)).st_mtime_ns for folder in folders]


def _collate(samples):
    kept = [(picture, label) for picture, label, _ in samples if picture is not None]
    pictures = torch.stack([picture for picture, _ in kept]) if kept else torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    return pictures, torch.tensor([label for _, label in kept], dtype=torch.int64), [bad for *_, some in samples for bad in some]


def _deaf(_) -> None:
    """A loader leaves signals to its run, which finishes its step and saves; a second SIGTERM ends it, the first may be everybody's."""
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
