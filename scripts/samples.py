"""Samples of the stand-in pictures, for docs/experiments.md: a column per class.

    python scripts/samples.py [--root data] [--out docs/images]

Writes cifar10_small.png and imagenet_small.png. The pictures are made below ROOT where they are not there yet; the letters' fonts are
fetched from Debian (12 MB).
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.data import glyphs, photos  # noqa: E402

ROWS, COLUMNS, PIXELS = 2, 10, 64
CLASSES = glyphs.CLASSES[:: len(glyphs.CLASSES) // COLUMNS][:COLUMNS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sheet(of_photos(options.root)).save(options.out / "cifar10_small.png", optimize=True)
    sheet(of_glyphs(options.root)).save(options.out / "imagenet_small.png", optimize=True)


def of_photos(root: Path) -> list[list[Image.Image]]:
    """Of each photograph the first patches for training."""
    found = photos.load(root, train=ROWS * COLUMNS * 4, validation=COLUMNS)
    images, labels = found["train_images"], found["train_labels"]
    return [[Image.fromarray(image) for image in images[labels == k][:ROWS]] for k in range(COLUMNS)]


def of_glyphs(root: Path) -> list[list[Image.Image]]:
    """Of some writing systems the first pictures for training."""
    folder = glyphs.make(root, train=ROWS * len(glyphs.CLASSES), validation=len(glyphs.CLASSES))
    return [[Image.open(path).convert("RGB") for path in sorted((folder / "train" / name).iterdir())[:ROWS]] for name in CLASSES]


def sheet(columns: list[list[Image.Image]]) -> Image.Image:
    """Pictures side by side, a list per column."""
    out = Image.new("RGB", (PIXELS * len(columns), PIXELS * ROWS), "white")
    for x, column in enumerate(columns):
        for y, picture in enumerate(column):
            out.paste(picture.resize((PIXELS, PIXELS), Image.Resampling.NEAREST), (x * PIXELS, y * PIXELS))
    return out.quantize(128)  # a small file


if __name__ == "__main__":
    main()
