"""Small data in the real formats: ImageFolder trees of JPEG files, data-bin folders of fairseq."""

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


PAIRS = {"train": 240, "valid": 14, "test": 9}


def databin(root: Path) -> Path:
    """A data-bin as fairseq-preprocess --joined-dictionary writes it, and references: each German word is its English one in capitals."""
    import torch
    from fairseq.data import Dictionary
    from fairseq.data.indexed_dataset import make_builder

    from experiments.tasks import wmt16  # noqa: F401  imports fairseq without its marks on Hydra

    rng = np.random.default_rng(0)
    english = ["".join(rng.choice(list("abcdefgh"), rng.integers(2, 6))) for _ in range(30)]
    words = Dictionary()
    for word in english:
        words.add_symbol(word, 10)
        words.add_symbol(word.upper(), 10)
    words.finalize(padding_factor=8)
    folder = root / "data-bin"
    folder.mkdir(parents=True)
    for split, count in PAIRS.items():
        lines = [" ".join(rng.choice(english, rng.integers(2, 13))) for _ in range(count)]
        for language, side in (("en", lines), ("de", [line.upper() for line in lines])):
            words.save(str(folder / f"dict.{language}.txt"))
            prefix = folder / f"{split}.en-de.{language}"
            builder = make_builder(f"{prefix}.bin", "mmap", len(words))
            for line in side:
                builder.add_item(words.encode_line(line, add_if_not_exist=False).to(torch.int64))
            builder.finalize(f"{prefix}.idx")
            if split != "train":
                (root / f"{split}.raw.{language}").write_text("\n".join(side) + "\n")
    return folder
