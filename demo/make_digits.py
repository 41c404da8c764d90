"""Write scikit-learn's 1,797 handwritten digits as an ImageNet-style folder: train/<digit>/, val/<digit>/."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from sklearn.datasets import load_digits


def pictures(side: int = 32, margin: int = 4, val_share: int = 5) -> Iterator[tuple[Image.Image, str]]:
    """(picture, "train/7/0001.png" or the like) of all digits: each 8 x 8 scan enlarged to `side` pixels, and a black
    margin. Every `val_share`-th goes to val/.
    """
    digits = load_digits()
    for i, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        grey = Image.fromarray((scan * (255 / 16)).astype(np.uint8))
        digit = grey.resize((side, side), Image.Resampling.BICUBIC)
        yield ImageOps.expand(digit, margin), f"{'train' if i % val_share else 'val'}/{label}/{i:04d}.png"


def write_digits(root: Path) -> None:
    """All of them as PNG files below `root`."""
    for picture, place in pictures():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / place)


def some_digits() -> list[Image.Image]:
    """One of each label, of those of val/."""
    held_out = {
        place.split("/")[1]: picture.convert("RGB") for picture, place in pictures() if place.startswith("val/")
    }
    return [held_out[label].convert("RGB") for label in sorted(held_out)]


if __name__ == "__main__":
    write_digits(Path(sys.argv[1]))
