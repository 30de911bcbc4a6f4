"""ImageNet's task on JPEG files in its layout: order, augmentation, loaders, damaged files, the list of files, the networks."""

import multiprocessing
import os
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from generated import CLASSES, COUNTS, tree
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.tasks import imagenet
from experiments.tasks.imagenet import ImageNet, files
from experiments.tasks.torchvision_cpu import torchvision

WORKERS, BATCH = 3, 12  # five batches of 3 x 4 an epoch, six pictures left out


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tree(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture
def make(root, tmp_path):
    def make(where=root, seed=0, workers=WORKERS, batch_size=BATCH, dtype="float32", unreadable=0, **options):
        data = SimpleNamespace(name="imagenet", root=str(where), cache=str(tmp_path / "cache"), train=COUNTS["train"],
                               validation=COUNTS["val"], classes=CLASSES, unreadable=unreadable)  # fmt: skip
        settings = {"model": "resnet18", "layers": [1, 1, 1, 0], "width": 4, "size": 32, "resize": 36, "scale": 0.3, "flip": True,
                    "num_loader_workers": 0, "autocast": None, "loss_scale": 1024.0} | options  # fmt: skip
        return ImageNet(workers, seed, dtype, "cpu", data, batch_size, **settings)

    return make


@pytest.fixture
def copy(root, tmp_path):
    """A tree to spoil."""
    return shutil.copytree(root, tmp_path / "copy")


def same(left, right):
    return all(torch.equal(a, b) for pair in zip(left, right, strict=True) for a, b in zip(*pair, strict=True))


def seen(task, epoch):
    """(epoch, number) keys that each worker reads, in order."""
    keys = task._keys(epoch * task.steps_per_epoch, range(task.workers), (0, 1))
    read = [[] for _ in range(task.workers)]
    for _ in range(task.steps_per_epoch):
        for worker in read:
            worker += next(keys)
    return read


def test_shards_are_disjoint_and_reshuffled(make):
    task = make()
    assert task.steps_per_epoch == 5
    first, second = seen(task, 0), seen(task, 1)
    assert {epoch for worker in second for epoch, _ in worker} == {1}
    numbers = [[{number for _, number in worker} for worker in read] for read in (first, second)]
    assert [len(worker) for worker in numbers[0]] == [20] * 3 and len(set.union(*numbers[0])) == 60
    assert all(a != b for a, b in zip(*numbers))
    assert seen(make(seed=1), 0) != first == seen(make(), 0)


def test_a_batch_is_torchvision_s_of_the_same_file(make, root):
    """Without random crops: the pictures are those that ImageFolder gives, under the labels that it gives."""
    task = make(scale=1.0, size=36)
    from torchvision.transforms import v2

    task._pictures("train").transform = v2.Compose([v2.Resize((36, 36)), v2.PILToTensor()])
    steps = v2.Compose([v2.Resize((36, 36)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                        v2.Normalize(imagenet.MEAN, imagenet.STD)])  # fmt: skip
    folder = torchvision.datasets.ImageFolder(root / "train", steps)
    for keys, (pictures, labels) in zip(task._keys(7, range(3), (0, 1)), task.batches(7, range(3), (0, 1))):
        for (_, number), picture, label in zip(keys, pictures, labels, strict=True):
            expected, answer = folder[number]
            torch.testing.assert_close(picture, expected, rtol=0, atol=2e-6)
            assert label == answer
        assert pictures.is_contiguous(memory_format=torch.channels_last)


def test_augmentation_depends_on_seed_epoch_and_picture_alone(make):
    task, twin = make(), make(workers=1, batch_size=1)
    for _ in range(2):  # another folding, whatever was drawn in between
        torch.rand(7), random.random(), np.random.rand()
        by_number = {}
        for step in range(5):
            for keys, batch in zip(task._keys(step, range(3), (0, 1)), task.batches(step, range(3), (0, 1))):
                by_number |= {number: picture for (_, number), picture in zip(keys, batch[0])}
        for step in range(66):
            ((_, number),) = next(twin._keys(step, range(1), (0, 1)))
            (((picture,), _),) = twin.batches(step, range(1), (0, 1))
            assert number not in by_number or torch.equal(picture, by_number[number])
    pictures = make()._pictures("train")
    once = [pictures[key][0] for key in ((0, 5), (1, 5), (0, 5))]
    assert torch.equal(once[0], once[2]) and not torch.equal(once[0], once[1])
    assert not torch.equal(make(seed=3)._pictures("train")[0, 5][0], once[0])


def test_drawing_leaves_the_loop_s_random_numbers_alone(make):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(make().batches(0, range(3), (0, 1)))
    assert torch.equal(torch.rand(3), expected)


def test_there_are_no_more_loaders_than_this_process_may_use_cores(make, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})  # a task of a job's
    assert [make(num_loader_workers=count).num_loader_workers for count in (0, 1, 2, 8)] == [0, 1, 2, 2]


def test_a_batch_never_waits_for_its_copy_to_the_device(make):
    """From the second batch on pictures and labels alone are copied, without waiting; loaders give them in pinned memory."""

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].device != kwargs.get("device", args[0].device):
                waited.append(not kwargs.get("non_blocking"))
            return function(*args, **(kwargs or {}))

    task, waited = make(), []
    task.device = torch.device("meta")
    piece = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), []
    task._arrived(piece)
    with Copies():
        task._arrived(piece)
    assert waited == [False, False]
    task.device = torch.device("cuda")
    assert task._loader([[(0, 0)]], "train").pin_memory


@pytest.mark.parametrize("loaders", [1, 2])
def test_loaders_give_the_same_batches(loaders, make):
    """Whatever is asked for in between: the same step twice, another step, an evaluation; and from wherever a run goes on."""
    plain, task = make(), make(num_loader_workers=loaders)
    assert task.num_loader_workers == min(loaders, len(os.sched_getaffinity(0)))
    task.batches(0, range(1), (0, 1))  # a look before the start
    for step in range(3, 14):
        assert same(plain.batches(step, range(3), (0, 1)), task.batches(step, range(3), (0, 1)))
        assert (task._ahead is not None) == (step > 3)
        if step % 4 == 0:
            model = task.model().eval()
            assert same(plain.batches(step, range(2), (0, 1)), task.batches(step, range(2), (0, 1)))
            with torch.no_grad():
                assert plain.evaluate(model, (0, 2)) == task.evaluate(model, (0, 2))
    assert multiprocessing.active_children()
    task.close()
    assert not multiprocessing.active_children()
    assert same(plain.batches(20, range(3), (0, 1)), task.batches(20, range(3), (0, 1)))  # and it may go on


def test_parts_make_the_batch(make):
    task = make()
    whole = list(task.batches(2, range(1, 3), (0, 1)))
    parts = [list(task.batches(2, range(1, 3), (lane, 2))) for lane in range(2)]
    for i in range(2):
        assert same([whole[i]], [[torch.cat(pair) for pair in zip(parts[0][i], parts[1][i])]])
    with pytest.raises(ValueError, match="choose task.batch_size so that it divides"):
        task.batches(0, range(1), (0, 3))


def test_evaluation_is_the_mean_over_the_files(make, root):
    task = make(dtype="float64")
    model = task.model().eval()
    from torchvision.transforms import v2

    steps = v2.Compose([v2.Resize(36), v2.CenterCrop(32), v2.PILToTensor(), v2.ToDtype(torch.float64, scale=True),
                        v2.Normalize(imagenet.MEAN, imagenet.STD)])  # fmt: skip
    pictures, labels = zip(*torchvision.datasets.ImageFolder(root / "val", steps))
    labels = torch.tensor(labels)
    with torch.no_grad():
        output = model(torch.stack(pictures))
        sums = task.evaluate(model, (0, 1))
        assert sums["count"] == COUNTS["val"]
        assert sums["nll"] == pytest.approx(float(F.cross_entropy(output, labels, reduction="sum")), rel=1e-9)
        assert sums["accuracy"] == pytest.approx(100 * float((output.argmax(1) == labels).sum()))
        assert sums["top5"] == 100 * COUNTS["val"]  # of three classes
        parts = [task.evaluate(model, (k, 4)) for k in range(4)]
        assert {name: pytest.approx(sum(part[name] for part in parts)) for name in sums} == sums


def test_top5_of_many_classes(make):
    task = make()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 40))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([5.0, 4, 1, 2, 3] + [0] * 35))  # class 0 first; all three among five
        sums = task.evaluate(model, (0, 1))
        model[1].bias[2] = -1.0
        fewer = task.evaluate(model, (0, 1))
    assert sums["accuracy"] == 100 * 7 and sums["top5"] == 100 * 21 and fewer["top5"] == 100 * 14


# ---- files


def spoil(path):
    """Half a picture: it opens and breaks off."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("loaders", [0, 1])
def test_a_truncated_picture_is_named_and_replaced_by_the_next(loaders, make, copy, capsys):
    numbered = sorted((copy / "train").rglob("*.JPEG"))
    bad = [spoil(numbered[10]), numbered[11]]
    bad[1].write_text("no picture at all")
    task, good = make(copy, unreadable=2, num_loader_workers=loaders), make()
    met = 0
    for step in range(5):
        keys = list(zip(range(3), good._keys(step, range(3), (0, 1))))
        for (_, numbers), (pictures, labels) in zip(keys, task.batches(step, range(3), (0, 1)), strict=True):
            for (_, number), picture, label in zip(numbers, pictures, labels, strict=True):
                stands_in = 12 if number in (10, 11) else number
                met += stands_in != number
                expected, answer, _ = good._pictures("train")[0, stands_in]
                assert torch.equal(picture, good._arrived((expected[None], torch.tensor([answer]), []))[0][0]) and label == answer
    said = capsys.readouterr().err
    assert met and [said.count(f"unreadable: {path}: ") for path in map(str, bad)] == [1, 1]


def test_too_many_unreadable_pictures_end_the_run(make, copy):
    for path in sorted((copy / "train").rglob("*.JPEG"))[:30]:
        spoil(path)
    task = make(copy, unreadable=2)
    with pytest.raises(ValueError, match=r"[3-9] pictures cannot be read.*the last of them.*data.unreadable=2"):
        for step in range(5):
            list(task.batches(step, range(3), (0, 1)))


def test_unreadable_pictures_are_left_out_of_validation(make, copy, capsys):
    paths = sorted((copy / "val").rglob("*.JPEG"))[3:5]
    for path in paths:
        spoil(path)
    model = make().model().eval()
    with torch.no_grad():
        sums = make(copy, unreadable=2).evaluate(model, (0, 1))
        assert sums["count"] == COUNTS["val"] - 2 and all(f"unreadable: {path}" in capsys.readouterr().err for path in paths[:1])
        assert make(copy, unreadable=2).evaluate(model, (3, 21))["count"] == 0  # a part of nothing else
        with pytest.raises(ValueError, match="2 pictures cannot be read"):
            make(copy, unreadable=1).evaluate(model, (0, 1))


def test_the_list_is_walked_once_until_a_folder_changes(copy, tmp_path, monkeypatch):
    walks, walk = [], torchvision.datasets.folder.make_dataset
    monkeypatch.setattr(torchvision.datasets.folder, "make_dataset", lambda *a, **k: walks.append(1) or walk(*a, **k))
    expected = torchvision.datasets.ImageFolder(copy / "train")
    walks.clear()
    for _ in range(2):
        names, labels, classes = files(copy / "train", tmp_path / "cache")
        assert [(str(copy / "train" / os.fsdecode(name)), label) for name, label in zip(names, labels)] == expected.samples
        assert classes == expected.classes and len(walks) == 1
    files(copy / "val", tmp_path / "cache")
    assert len(walks) == 2  # another folder, another list
    shutil.copy(copy / "train" / "n001" / "train_0001.JPEG", copy / "train" / "n002" / "zz.jpg")
    assert len(files(copy / "train", tmp_path / "cache")[0]) == COUNTS["train"] + 1 and len(walks) == 3
    shutil.copytree(copy / "train" / "n001", copy / "train" / "n999")
    assert len(files(copy / "train", tmp_path / "cache")[2]) == CLASSES + 1 and len(walks) == 4
    (saved,) = (path for path in (tmp_path / "cache").glob("*.npz") if b"zz.jpg" in path.read_bytes())
    spoil(saved)
    assert len(files(copy / "train", tmp_path / "cache")[2]) == CLASSES + 1 and len(walks) == 5


@pytest.mark.parametrize("change, words", [
    (lambda root: shutil.rmtree(root / "val"), "no ImageNet under .*train/ and val/.*data.root=FOLDER.*data=glyphs"),
    (lambda root: (root / "train" / "n000" / "train_0000.JPEG").unlink(), "65 pictures in train/, not 66: .*set data.train=65"),
    (lambda root: shutil.rmtree(root / "val" / "n002"), "do not hold the same classes"),
    (lambda root: [shutil.rmtree(root / split / "n002") for split in ("train", "val")], "44 pictures in train/, not 66"),
])  # fmt: skip
def test_missing_data_name_the_remedy(change, words, make, copy):
    change(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        next(iter(make(copy).batches(0, range(1), (0, 1))))


@pytest.mark.parametrize("options, words", [
    ({"batch_size": 10}, "task.batch_size=10 over 3 workers: choose a multiple of 3"),
    ({"batch_size": 90}, "66 training pictures do not fill one batch of 90"),
    ({"autocast": "half"}, "choose bfloat16, float16 or null"),
    ({"size": 64}, "size=64, resize=36, .*: 0 < size <= resize"),
    ({"layers": None, "width": None, "model": "resnet500"}, "torchvision knows no such classifier"),
    ({"layers": None, "width": 16, "model": "resnet50"}, "torchvision's networks take neither"),
    ({"width": None}, "the small ResNet needs both"),
])  # fmt: skip
def test_nonsense_is_refused(options, words, make):
    with pytest.raises(ValueError, match=words):
        make(**options)


# ---- networks


def test_the_paper_s_network(make):
    """torchvision's ResNet-50 as Goyal et al. start it: each block is the identity, the last layer is small."""
    model = make(layers=None, width=None, model="resnet50").model()
    blocks = [m for m in model.modules() if isinstance(m, torchvision.models.resnet.Bottleneck)]
    assert len(blocks) == 16 and all(not block.bn3.weight.any() and block.bn2.weight.all() for block in blocks)
    assert model.fc.weight.shape == (3, 2048) and model.fc.weight.detach().std() == pytest.approx(0.01, rel=0.05)
    model = make().model()
    assert model.layer1[0].bn2.weight.all() and model.conv1.stride == (2, 2) and model.fc.out_features == CLASSES


@pytest.mark.parametrize("autocast, loss_scale", [("bfloat16", 1.0), (None, 1.0), ("float16", 1024.0)])
def test_autocast_keeps_rows_in_their_dtype(autocast, loss_scale, make):
    task = make(autocast=autocast)
    assert task.loss_scale == loss_scale
    if autocast == "float16":
        return  # not every CPU convolves in float16
    model = task.model()
    used = []
    model.layer1[0].conv1.register_forward_hook(lambda module, inputs, output: used.append(output.dtype))
    loss = task.loss(model, next(iter(task.batches(0, range(1), (0, 1)))))
    loss.backward()
    assert used == [torch.bfloat16 if autocast else torch.float32] and loss.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert np.isfinite(task.evaluate(model.eval(), (0, 1))["nll"])
