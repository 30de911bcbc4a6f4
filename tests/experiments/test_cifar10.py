"""CIFAR-10: who sees which picture and how it is augmented, normalisation, the networks, the published file format."""

import hashlib
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_model
from torch.nn import functional as F

from experiments.tasks import cifar10
from experiments.tasks.cifar10 import Cifar10, ResNet, torchvision

TRAIN, VALIDATION, WORKERS, BATCH = 64, 20, 3, 12  # five batches of 3 x 4 an epoch, four pictures left out


@pytest.fixture
def arrays(monkeypatch):
    """Random pictures; the label of each is its number."""
    rng = np.random.default_rng(0)
    made = {
        "train_images": rng.integers(0, 256, (TRAIN, 32, 32, 3), dtype=np.uint8),
        "train_labels": np.arange(TRAIN),
        "validation_images": rng.integers(0, 200, (VALIDATION, 32, 32, 3), dtype=np.uint8),
        "validation_labels": np.arange(VALIDATION) % 10,
    }
    monkeypatch.setattr(cifar10, "_load", lambda data: made)
    return made


def make(seed=0, workers=WORKERS, batch_size=BATCH, dtype="float32", layers=(1, 1, 1, 0), width=4, **options):
    data = SimpleNamespace(name="photos", root="nowhere", train=TRAIN, validation=VALIDATION, download=False, heldout="validation")
    return Cifar10(workers, seed, dtype, "cpu", data, batch_size, layers, width, **options)


def same(left, right):
    return all(torch.equal(a, b) for pair in zip(left, right, strict=True) for a, b in zip(*pair, strict=True))


def epoch(task, number):
    """Numbers of the pictures that each worker sees, in order: [workers, pictures]."""
    steps = range(number * task.steps_per_epoch, (number + 1) * task.steps_per_epoch)
    batches = [task.batches(step, range(task.workers), (0, 1)) for step in steps]
    return np.array([np.concatenate([batch[i][1] for batch in batches]) for i in range(task.workers)])


def test_shards_are_disjoint_and_reshuffled(arrays):
    task = make()
    assert task.steps_per_epoch == 5
    first, second = epoch(task, 0), epoch(task, 1)
    for seen in (first, second):
        assert seen.shape == (3, 20) and len(set(seen.flatten())) == 60  # nothing twice, four left out
    assert all(set(a) != set(b) and list(a) != list(b) for a, b in zip(first, second))
    assert set(first.flatten()) != set(second.flatten())  # others are left out
    assert (first != epoch(make(seed=1), 0)).any() and (first == epoch(make(), 0)).all()


def test_a_batch_depends_on_seed_epoch_and_worker_alone(arrays):
    task = make()
    expected = {step: task.batches(step, range(WORKERS), (0, 1)) for step in range(11)}
    for step in (10, 3, 7, 3, 0, 5):  # back and forth over three epochs
        assert same(task.batches(step, range(WORKERS), (0, 1)), expected[step])
    fresh = make()
    for workers in ([2], [0, 2], [1], [2, 1]):
        for step in (7, 2):
            assert same(fresh.batches(step, workers, (0, 1)), [expected[step][i] for i in workers])
    assert not same(make(seed=1).batches(0, [0], (0, 1)), expected[0][:1])


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_the_processes_of_a_worker_share_its_batch(arrays, lanes):
    task = make()
    for step in (1, 6):
        whole = task.batches(step, range(WORKERS), (0, 1))
        parts = [make().batches(step, range(WORKERS), (lane, lanes)) for lane in range(lanes)]
        joined = [[torch.cat([part[i][k] for part in parts]) for k in (0, 1)] for i in range(WORKERS)]
        assert same(joined, whole) and len(parts[0][0][1]) == 4 // lanes
    with pytest.raises(ValueError, match="4 pictures per worker over its 3 processes: choose task.batch_size"):
        task.batches(0, [0], (0, 3))


def normal(arrays, pictures):
    """[N, 32, 32, 3] bytes -> float64 [N, 3, 32, 32] with the training set's mean and standard deviation."""
    train = arrays["train_images"].astype(np.float64)
    return torch.from_numpy((pictures - train.mean((0, 1, 2))) / train.std((0, 1, 2))).permute(0, 3, 1, 2)


def test_each_picture_is_a_crop_and_flip_of_its_own(arrays):
    task, found = make(), []
    padded = np.pad(arrays["train_images"], ((0, 0), (4, 4), (4, 4), (0, 0)))  # black before normalisation
    for step in range(4):
        for pictures, labels in task.batches(step, range(WORKERS), (0, 1)):
            for picture, label in zip(pictures, labels):
                crops = normal(arrays, np.stack([padded[label][i : i + 32, j : j + 32] for i in range(9) for j in range(9)]))
                distances = torch.stack([(c - picture).abs().amax((1, 2, 3)) for c in (crops, crops.flip(-1))])
                assert distances.min() < 1e-4
                flip, place = divmod(distances.argmin().item(), 81)
                found.append((flip, *divmod(place, 9)))
    flips, tops, lefts = np.array(found).T
    assert 8 < flips.sum() < 40 and set(tops) == set(lefts) == set(range(9))  # 48 draws of each


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_normalisation_gives_mean_zero_and_deviation_one(arrays, dtype, channels_last):
    task = make(dtype=dtype, channels_last=channels_last)
    train = task._normal(torch.from_numpy(arrays["train_images"]).permute(0, 3, 1, 2))
    assert train.dtype == getattr(torch, dtype)
    accuracy = 1e-5 if dtype == "float32" else 1e-12
    assert train.double().mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=accuracy)
    assert train.double().std((0, 2, 3), correction=0).tolist() == pytest.approx([1] * 3, abs=accuracy)
    ((pictures, _),) = task.batches(0, [1], (0, 1))
    assert pictures.is_contiguous(memory_format=torch.channels_last) == channels_last and pictures.dtype == train.dtype
    assert task.model().conv1.weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_evaluation_in_parts(arrays):
    task = make(dtype="float64")
    model = task.model().eval()
    with torch.no_grad():
        output = model(normal(arrays, arrays["validation_images"]))
        whole = task.evaluate(model, (0, 1))
        labels = torch.from_numpy(arrays["validation_labels"])
        assert whole["count"] == VALIDATION
        nll = F.cross_entropy(output, labels, reduction="none").cumsum(0)
        assert whole["nll"] == whole["validation_loss"] == pytest.approx(nll[-1].item(), rel=1e-9)
        assert whole["accuracy"] == 100 * (output.argmax(1) == labels).sum().item()
        for count in (1, 3):
            parts = [task.evaluate(model, (k, count)) for k in range(count)]
            assert {name: sum(part[name] for part in parts) for name in whole} == pytest.approx(whole, rel=1e-9)


def test_the_model_is_a_function_of_the_seed(arrays):
    flat = lambda model: torch.cat([p.flatten() for p in model.parameters()])
    first, again, other = flat(make().model()), flat(make().model()), flat(make(seed=1).model())
    assert torch.equal(first, again) and not torch.equal(first, other)
    model, (batch,) = make().model(), make().batches(0, [0], (0, 1))
    batch = (batch[0], batch[1] % 10)
    make().loss(model, batch).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    "options, remedy",
    [
        ({"batch_size": 10}, "batch_size=10 over 3 workers: choose a multiple of 3"),
        ({"batch_size": 66}, "64 training pictures do not fill one batch of 66: lower task.batch_size"),
    ],
)
def test_numbers_that_do_not_fit(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        make(**options)


# --- networks ---


def shapes(layers, width):
    """(parameters, shape after each stage, shape of the output) for two pictures, computed without memory."""
    with torch.device("meta"):
        model, seen = ResNet(layers, width), []
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            stage.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:])))
        output = model(torch.empty(2, 3, 32, 32))
    return sum(p.numel() for p in model.parameters()), seen, tuple(output.shape)


def test_resnet_18_in_its_cifar_form():
    count, stages, output = shapes([2, 2, 2, 2], 64)
    assert count == 11_173_962
    assert stages == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)] and output == (2, 10)


def test_resnet_8():
    count, stages, output = shapes([1, 1, 1, 0], 16)
    assert stages == [(16, 32, 32), (32, 16, 16), (64, 8, 8), (64, 8, 8)] and output == (2, 10)
    block = lambda a, b: 9 * a * b + 9 * b * b + 4 * b + (a != b) * (a * b + 2 * b)
    assert count == 27 * 16 + 32 + block(16, 16) + block(16, 32) + block(32, 64) + 650


@pytest.mark.parametrize("layers, width", [([1, 1, 1], 16), ([0, 1, 1, 1], 16), ([1, 1, 1, 0], 0)])
def test_networks_that_are_none(layers, width):
    with pytest.raises(ValueError, match="four stages, the first of at least one block; the others >= 1"):
        ResNet(layers, width)


# --- the published format ---

FILES = {f"data_batch_{k}": 2 for k in range(1, 6)} | {"test_batch": 3}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny cifar-10-batches-py, whose checksums torchvision takes for the published ones. -> (root, rows, labels)."""
    home, rng, rows, labels = tmp_path / "cifar-10-batches-py", np.random.default_rng(0), {}, {}
    home.mkdir()
    for name, count in FILES.items():
        rows[name] = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels[name] = rng.integers(0, 10, count).tolist()
        content = {"batch_label": name, "labels": labels[name], "data": rows[name], "filenames": ["x.png"] * count}
        (home / name).write_bytes(pickle.dumps(content, protocol=2))
    (home / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {k}" for k in range(10)]}, protocol=2))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in home.iterdir()}
    dataset = torchvision.datasets.CIFAR10
    monkeypatch.setattr(dataset, "train_list", [[name, sums[name]] for name in FILES if name != "test_batch"])
    monkeypatch.setattr(dataset, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": sums["batches.meta"]})
    return tmp_path, rows, labels


def options(root):
    """data=cifar10 with data.root=root."""
    data = OmegaConf.load(Path(__file__).parents[2] / "configs" / "data" / "cifar10.yaml")
    return OmegaConf.merge(data, {"root": str(root)})


def test_the_published_files_are_read(folder):
    root, rows, labels = folder
    arrays = cifar10._load(options(root))
    training = [name for name in FILES if name != "test_batch"]
    for split, names in (("train", training), ("validation", ["test_batch"])):
        images = np.concatenate([rows[name] for name in names]).reshape(-1, 3, 32, 32)  # 1024 red bytes, then green, then blue
        assert arrays[f"{split}_images"].dtype == np.uint8 and arrays[f"{split}_labels"].dtype == np.int64
        np.testing.assert_array_equal(arrays[f"{split}_images"].transpose(0, 3, 1, 2), images)
        assert arrays[f"{split}_labels"].tolist() == sum((labels[name] for name in names), [])


def test_the_task_takes_them(folder):
    root, _, labels = folder
    task = Cifar10(4, 0, "float32", "cpu", options(root), 128, [1, 1, 1, 0], 4)
    assert task.steps_per_epoch == 50_000 // 128
    model = task.model().eval()
    with torch.no_grad():
        assert task.evaluate(model, (0, 1))["count"] == len(labels["test_batch"])


def remedied(root):
    with pytest.raises(FileNotFoundError, match=r"data\.root=FOLDER") as caught:
        cifar10._load(options(root))
    assert str(root) in str(caught.value) and "data.download=true" in str(caught.value)


def test_missing_data_name_the_remedy(tmp_path):
    remedied(tmp_path)
    remedied(tmp_path / "not" / "there")
    assert not any(tmp_path.iterdir())  # nothing was made


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_files_are_not_unpickled(folder, name):
    root, *_ = folder
    path = root / "cifar-10-batches-py" / name
    path.write_bytes(path.read_bytes() + b"x")
    remedied(root)


def test_without_augmentation_pictures_are_as_they_are(arrays):
    """And which pictures come is the same, and a negative seed is a seed."""
    plain, task = make(augment=False, seed=-1), make(seed=-1)
    assert (epoch(plain, 0) == epoch(task, 0)).all() and (epoch(plain, 0) != epoch(make(augment=False), 0)).any()
    (pictures, labels), *_ = plain.batches(0, range(3), (0, 1))
    expected = plain._normal(torch.from_numpy(arrays["train_images"][labels]).permute(0, 3, 1, 2))
    assert torch.equal(pictures, expected)
    (cropped, same_labels), *_ = task.batches(0, range(3), (0, 1))
    assert torch.equal(labels, same_labels) and not torch.equal(cropped, expected)


def test_the_error_over_cells():
    """By hand: equal cells give the standard error of the mean of their accuracies; one cell counted thrice is one cell."""
    accuracies = torch.tensor([0.5, 0.7, 0.9, 0.3])
    expected = 100 * accuracies.std().item() / 2
    assert cifar10.error_over_cells(10 * accuracies, torch.full((4,), 10)) == pytest.approx(expected)
    assert cifar10.error_over_cells(30 * accuracies, torch.full((4,), 30)) == pytest.approx(expected)
    # unequal: correct - count * mean = 6 - 8 * 0.75, 3 - 4 * 0.75, 0 for an empty cell
    assert cifar10.error_over_cells(torch.tensor([7.0, 2.0, 0.0]), torch.tensor([8, 4, 0])) == pytest.approx(
        100 * (2 * (1 + 1)) ** 0.5 / 12
    )


def test_a_run_ends_with_its_accuracy_in_each_cell(arrays, tmp_path):
    """All ranks together, of the last averaged model; pictures without cells have no such error."""
    cells = np.arange(VALIDATION) * 3 // VALIDATION
    task = make()
    model = task.model()
    assert task.finish([tmp_path / "model"], None) == {}
    arrays["validation_cells"] = cells
    save_model(model, tmp_path / "model")
    task = make(seed=1)

    class Alone:
        rank, world_size = 0, 1

        def all_reduce(self, values):
            pass

    assert task.finish([], Alone()) == {}
    found = task.finish([tmp_path / "model"], Alone())["cells"]
    assert found["number"] == 3 and found["count"] == np.bincount(cells).tolist()
    accuracy = task.evaluate(model.eval().requires_grad_(False), (0, 1))["accuracy"]
    assert 100 * sum(found["correct"]) == accuracy and 0 < accuracy < 100 * VALIDATION


@pytest.mark.parametrize("autocast", ["bfloat16", None])
def test_autocast_keeps_rows_and_sums_in_their_dtype(autocast, arrays):
    arrays["train_labels"] %= 10
    task = make(autocast=autocast)
    model, (batch, *_) = task.model(), task.batches(0, range(WORKERS), (0, 1))
    used = []
    model.layer1[0].conv1.register_forward_hook(lambda module, inputs, output: used.append(output.dtype))
    loss = task.loss(model, batch)
    loss.backward()
    assert used == [torch.bfloat16 if autocast else torch.float32] and loss.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        found, plain = task.evaluate(model.eval(), (0, 1)), make().evaluate(model, (0, 1))
    assert found["nll"] == pytest.approx(plain["nll"], rel=0.02) and (found["nll"] != plain["nll"]) == bool(autocast)


def test_no_losses_are_scaled_here(arrays):
    with pytest.raises(ValueError, match="task.autocast=float16: choose bfloat16 or null"):
        make(autocast="float16")
