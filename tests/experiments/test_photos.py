"""The photo patches: shapes, the split, the cache and what the mean colour gives away."""

import importlib.util

import numpy as np
import pytest

for package in ("skimage", "sklearn", "PIL"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the photos extra is not installed ({package})", allow_module_level=True)

from experiments.data import photos

COUNTS = {"train": 1_500, "validation": 500}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("photos")


@pytest.fixture(scope="module")
def data(cache):
    return photos.load(cache, **COUNTS)


@pytest.fixture(scope="module")
def shapes():
    return photos._pictures(photos._sources())[1]


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype
        np.testing.assert_array_equal(array, right[name])


def test_shapes_types_and_balance(data):
    assert len(photos.CLASSES) == 10
    for split, count in COUNTS.items():
        images, labels = data[f"{split}_images"], data[f"{split}_labels"]
        assert images.shape == (count, 32, 32, 3) and images.dtype == np.uint8
        assert labels.shape == (count,) and labels.dtype == np.int64
        assert np.bincount(labels).tolist() == [count // 10] * 10
        assert len(data["validation_cells"]) == COUNTS["validation"]
        prefix = np.bincount(labels[:200], minlength=10)
        assert prefix.min() > 5 and prefix.max() < 40  # 20 expected: shuffled, not sorted


def test_same_bytes_twice(data, cache, tmp_path):
    assert_same(data, photos.load(tmp_path / "not" / "there", **COUNTS))  # made a second time
    (first,) = cache.iterdir()
    (second,) = (tmp_path / "not" / "there").iterdir()
    assert first.name == second.name and first.read_bytes() == second.read_bytes()


def test_cache_is_read_and_keyed(data, cache, tmp_path, monkeypatch):
    other = photos.load(tmp_path, **COUNTS, seed=1)
    assert (other["train_images"] != data["train_images"]).any()
    shorter = photos.load(tmp_path, train=10, validation=COUNTS["validation"])
    np.testing.assert_array_equal(shorter["validation_images"], data["validation_images"])
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(photos, "_pictures", lambda sources: pytest.fail("made anew"))
    assert_same(data, photos.load(cache, **COUNTS))


def truncated(raw):
    return raw[: len(raw) // 2]


def flipped(raw):
    return raw[:50_000] + bytes([raw[50_000] ^ 1]) + raw[50_001:]


@pytest.mark.parametrize("damage", [truncated, flipped, lambda raw: b""])
def test_damaged_cache_is_remade(damage, tmp_path, capsys):
    made = photos.load(tmp_path, train=40, validation=20)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    assert "damaged" not in capsys.readouterr().out
    path.write_bytes(damage(whole))
    assert_same(made, photos.load(tmp_path, train=40, validation=20))
    assert "damaged" in capsys.readouterr().out
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


SPLITS = ("train", "validation", "tuning")


def test_cells_share_no_pixel(shapes):
    for height, width in shapes:
        assert min(height, width) == 420
        used = np.zeros((height, width), int)
        for split in SPLITS:
            for top, left in photos.cells(height, width, split):
                assert top + photos.CELL <= height and left + photos.CELL <= width
                used[top : top + photos.CELL, left : left + photos.CELL] += 1
        assert used.max() == 1
        train, validation, tuning = (len(photos.cells(height, width, s)) for s in SPLITS)
        for held_out in (validation, tuning):
            assert 0.15 <= held_out / (train + validation + tuning) <= 0.25
        rows, columns = photos.cells(height, width, "validation").T // photos.CELL
        assert set(rows) == set(range(height // photos.CELL))  # none of the picture is left out
        assert len(set(columns)) >= 9
    assert sum(len(photos.cells(height, width, "validation")) for height, width in shapes) >= 200


def test_patches_stay_inside_their_cells(shapes):
    covered = {}
    for split in SPLITS:
        generator = np.random.default_rng(0)
        labels, cells, tops, lefts = photos.draw(generator, 2_000, split, shapes)
        covered[split] = np.zeros((10, *np.max(shapes, axis=0)), bool)
        known = {}
        for label, cell, top, left in zip(labels, cells, tops, lefts, strict=True):
            corner = [top // photos.CELL * photos.CELL, left // photos.CELL * photos.CELL]
            assert corner in photos.cells(*shapes[label], split).tolist()
            assert known.setdefault(cell, (label, *corner)) == (label, *corner)  # a cell is one place of one picture
            offset = np.array([top, left]) - corner
            assert offset.min() >= photos.GUTTER
            assert offset.max() + photos.SIZE + photos.GUTTER <= photos.CELL
            covered[split][label, top : top + photos.SIZE, left : left + photos.SIZE] = True
        assert len(set(known.values())) == len(known)
    assert all(covered[split].any() for split in SPLITS) and sum(covered[split].astype(int) for split in SPLITS).max() == 1


def test_tuning_is_a_split_of_its_own(data, tmp_path):
    tuning = photos.load(tmp_path, **COUNTS, heldout="tuning")
    np.testing.assert_array_equal(tuning["train_images"], data["train_images"])
    assert not {patch.tobytes() for patch in tuning["validation_images"]} & {patch.tobytes() for patch in data["validation_images"]}
    with pytest.raises(ValueError, match="choose validation or tuning"):
        photos.load(tmp_path, **COUNTS, heldout="test")


def test_no_patch_in_both_splits(data):
    train, validation = ({patch.tobytes() for patch in data[f"{split}_images"]} for split in COUNTS)
    assert len(train) == COUNTS["train"] and not train & validation


def test_mean_colour_tells_nothing(data):
    train, validation = (data[f"{split}_images"].mean((1, 2)) for split in COUNTS)
    labels = data["train_labels"]
    centres = np.stack([train[labels == k].mean(0) for k in range(10)])
    nearest = ((validation[:, None] - centres) ** 2).sum(2).argmin(1)
    # Chance is 0.1 with a standard deviation of 0.013 for 500 patches: four of them above.
    assert (nearest == data["validation_labels"]).mean() < 0.155


@pytest.mark.parametrize("counts", [{"train": 0}, {"validation": 0}])
def test_counts_below_one(counts, tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        photos.load(tmp_path, **counts)


@pytest.mark.parametrize("package", ["skimage", "sklearn", "PIL"])
def test_missing_package_names_the_remedy(package, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(FileNotFoundError, match=r'pip install -e "\.\[photos\]"'):
        photos.load(tmp_path)


def test_missing_picture_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "CLASSES", (*photos.CLASSES[:-1], "marble"))
    with pytest.raises(FileNotFoundError, match=r'marble\.png.*pip install -e "\.\[photos\]"'):
        photos.load(tmp_path)
