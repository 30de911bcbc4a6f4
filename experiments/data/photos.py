"""Photo patches: a ten-class set in CIFAR-10's shape, made without any download of data.

The pictures are ten photographs inside the wheels of scikit-image (astronaut, brick, camera,
chelsea, coffee, grass, gravel, ihc) and scikit-learn (china, flower). A class is a photograph, an
example a 32x32 colour patch of it. The patches are only made on the user's machine and nothing is
handed on, so each picture stays under the terms it is shipped with: scikit-image lists its own as
CC0, public domain or free of known restrictions; china and flower are CC BY 2.0, credited in the
README.txt beside them (Flickr users danielbuechele and vultilion).

Training, validation and tuning share no source pixel. A picture is scaled to a short side of 420 and
cut into 42-pixel cells; on a slanted lattice every fifth cell is validation, every fifth tuning (for the
choice of learning rates), the rest training, and patches stay 3 pixels inside a cell's edge, so the
resampling filter joins no two cells' patches. The lattice is the same for every seed, so no seed trains
on another's validation cells. Patches of a cell resemble each other: an accuracy's error over cells is
larger than the number of patches suggests, so a patch's cell is handed out with it.

Colour, brightness and contrast are made random patch by patch, so a classifier must read texture
and shape: nearest class mean on a patch's mean colour scores 0.10. Making 23,000 patches takes 3 s
and a cached copy 71 MB.
"""

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np

from experiments import files

CLASSES = ("china", "flower", "chelsea", "coffee", "astronaut", "ihc", "grass", "gravel", "camera",
           "brick")
RECIPE = 2  # raise it with any change below that changes a byte of the result
SHORT_SIDE, CELL, SIZE = 420, 42, 32  # pixels
# Bicubic reaches 2 source pixels, or 2.8 here for the smallest picture (300 -> 420): two pixels that
# are 2 * GUTTER + 1 = 7 > 5.6 apart have no source pixel in common.
GUTTER = 3
NOISE = 10.0  # standard deviation, in grey levels of 255
REMEDY = 'install the packages the pictures come from: pip install -e ".[photos]"'
LATTICE = {"validation": 2, "tuning": 4}  # residues that are held out; the other three of five are training
_ARRAYS = ("train_images", "train_labels", "validation_images", "validation_labels", "validation_cells")


def load(root, train=20_000, validation=3_000, seed=0, heldout="validation"):
    """Return the photo patches, made on the first call and then read from a file under `root`.

    Returns a dict of numpy arrays: "train_images" uint8 [train, 32, 32, 3] (RGB, 0 to 255),
    "train_labels" int64 [train] (indices into CLASSES), "validation_images" and "validation_labels"
    likewise, and "validation_cells" int64 [validation], which cell each was cut from. With
    heldout="tuning" these are from the tuning cells, the training arrays stay. Classes are balanced to within one example and the order is
    random, so a prefix is a fair draw. The same arguments give the same bytes as long as the
    versions of numpy and Pillow and the pictures stay the same; the validation arrays do not depend
    on `train`. Several processes may call this at once.

    Raises FileNotFoundError where a package or a picture is missing (the message names the remedy),
    ValueError for a count below one or an unknown `heldout`, OSError where `root` cannot be written.
    """
    if train < 1 or validation < 1:
        raise ValueError(f"train and validation must be at least 1, not {train} and {validation}")
    if heldout not in LATTICE:
        raise ValueError(f"heldout={heldout}: choose {' or '.join(LATTICE)}")
    sources = _sources()
    import PIL

    key = [RECIPE, CLASSES, SHORT_SIDE, CELL, SIZE, GUTTER, NOISE, train, validation, seed, heldout,
           np.__version__, PIL.__version__,
           [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    path = Path(root) / f"photos-{digest}.npz"
    if path.exists():
        try:
            return _read(path, train, validation)
        except Exception as error:  # a damaged zip can raise almost anything; all mean: make anew
            print(f"photos: {path} is damaged ({error!r}); making it anew", flush=True)
    pictures, shapes = _pictures(sources)
    data = {}
    for stream, (name, split, count) in enumerate((("train", "train", train), ("validation", heldout, validation))):
        generator = np.random.default_rng([seed, stream + (split == "tuning")])
        labels, cell, tops, lefts = draw(generator, count, split, shapes)
        data[f"{name}_images"] = _patches(generator, pictures, labels, tops, lefts)
        data[f"{name}_labels"] = labels
    data["validation_cells"] = cell
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.aside(path) as aside, open(aside, "xb") as file:
        np.savez(file, **data)
    return data


def cells(height, width, split):
    """Return int64 [n, 2], the top and left pixel of every cell of `split`: train, validation or tuning."""
    rows, columns = np.mgrid[: height // CELL, : width // CELL]
    # A knight's-move lattice: each split has its share of every row and column, so no part is left out.
    place = (columns + 2 * rows) % 5
    return np.argwhere(place == LATTICE[split] if split in LATTICE else ~np.isin(place, [*LATTICE.values()])) * CELL


def draw(generator, count, split, shapes):
    """Return labels, cells, tops and lefts (int64 [count] each) of random patches inside `split`'s cells.

    `shapes` holds each class's (height, width).
    """
    labels = generator.permutation(np.arange(count, dtype=np.int64) % len(CLASSES))
    corners = [cells(height, width, split) for height, width in shapes]
    first = np.cumsum([0] + [len(c) for c in corners])
    cell = generator.integers(first[labels], first[labels + 1])
    within = generator.integers(GUTTER, CELL - SIZE - GUTTER, size=(count, 2), endpoint=True)
    tops, lefts = (np.concatenate(corners)[cell] + within).T
    return labels, cell, tops, lefts


def _patches(generator, pictures, labels, tops, lefts):
    windows = np.lib.stride_tricks.sliding_window_view(pictures, (SIZE, SIZE), axis=(1, 2))
    out = np.empty((len(labels), SIZE, SIZE, 3), np.uint8)
    for start in range(0, len(labels), 500):  # by the piece: bounds memory and stays in cache
        part = slice(start, start + 500)
        raw = windows[labels[part], tops[part], lefts[part]]  # [n, 3, SIZE, SIZE]
        n, pixels = len(raw), SIZE * SIZE
        # Sums of integers are exact, so no machine's order of summation can change a byte.
        mean = raw.sum((2, 3), dtype=np.int64) / pixels
        square = np.square(raw, dtype=np.int32).sum((2, 3), dtype=np.int64) / pixels
        spread = np.sqrt((square - mean**2).mean(1) + 4.0**2)  # the 4: empty sky stays faint
        # Every output channel is a random blend of the three, with a random gain and offset.
        blend = generator.dirichlet((0.7, 0.7, 0.7), size=(n, 3))
        gain = generator.uniform(18, 50, (n, 1)) * generator.uniform(0.6, 1.4, (n, 3))
        matrix = (blend * (gain / spread[:, None])[:, :, None]).astype(np.float32)
        centred = raw - mean.astype(np.float32)[:, :, None, None]
        image = generator.standard_normal(raw.shape, np.float32)
        image *= np.float32(NOISE)
        image += generator.uniform(78, 178, (n, 3, 1, 1)).astype(np.float32)
        for source in range(3):  # written out, not a matrix product: BLAS may sum in any order
            for target in range(3):
                image[:, target] += centred[:, source] * matrix[:, target, source, None, None]
        out[part] = np.rint(image.clip(0, 255)).transpose(0, 2, 3, 1)
    return out


def _sources():
    paths = []
    for name in CLASSES:
        package, folder, ending = (("sklearn", "datasets/images", "jpg")
                                   if name in ("china", "flower") else ("skimage", "data", "png"))
        # The files are opened by path: skimage.data would want pooch, and might go to the network.
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"the photo patches need the package {package}; {REMEDY}")
        path = Path(spec.submodule_search_locations[0], folder, f"{name}.{ending}")
        if not path.is_file():
            raise FileNotFoundError(f"the photo patches need {path}, which is missing; {REMEDY}")
        paths.append(path)
    if importlib.util.find_spec("PIL") is None:
        raise FileNotFoundError(f"the photo patches need the package pillow; {REMEDY}")
    return paths


def _pictures(sources):
    from PIL import Image

    scaled = []
    for path in sources:
        with Image.open(path) as image:
            scale = SHORT_SIDE / min(image.size)
            size = [round(side * scale) for side in image.size]
            scaled.append(np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)))
    shapes = [image.shape[:2] for image in scaled]
    # One array, filled up with zeros that no cell reaches, so that one indexing cuts all classes.
    stack = np.zeros((len(scaled), 3, *np.max(shapes, axis=0)), np.uint8)
    for target, image, (height, width) in zip(stack, scaled, shapes, strict=True):
        target[:, :height, :width] = image.transpose(2, 0, 1)
    return stack.transpose(0, 2, 3, 1), shapes


def _read(path, train, validation):
    with np.load(path, allow_pickle=False) as file:
        data = {name: file[name] for name in _ARRAYS}
    for split, count in (("train", train), ("validation", validation)):
        images, labels = data[f"{split}_images"], data[f"{split}_labels"]
        if split == "validation" and data["validation_cells"].shape != (count,):
            raise ValueError(f"validation_cells of shape {data['validation_cells'].shape}")
        if (images.shape, labels.shape) != ((count, SIZE, SIZE, 3), (count,)):
            raise ValueError(f"{split} arrays of shapes {images.shape} and {labels.shape}")
        if (images.dtype, labels.dtype) != (np.uint8, np.int64):
            raise ValueError(f"{split} arrays of types {images.dtype} and {labels.dtype}")
    return data
