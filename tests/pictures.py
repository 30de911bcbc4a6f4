"""Small data in the real formats: ImageFolder trees of JPEG files."""

from pathlib import Path

import numpy as np
from PIL import Image

COUNTS = {"train": 66, "val": 21}
CLASSES = 3


def tree(root: Path, size: int = 40) -> Path:
    """train/ and val/ with three classes of smooth random pictures of different shapes, their colour telling the class a little."""
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for k in range(count):
            folder = root / split / f"n{k % CLASSES:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 200, (5, 5, 3), dtype=np.uint8)
            coarse[..., k % CLASSES] //= 2
            picture = Image.fromarray(coarse).resize((size + k % 7, size + k % 5))
            picture.convert("L" if k == 4 else "RGB").save(folder / f"{split}_{k:04d}.JPEG", quality=95)
    return root
