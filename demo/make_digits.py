"""Write scikit-learn's 1,797 handwritten digits as an ImageNet-style folder: train/<digit>/, val/<digit>/."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from sklearn.datasets import load_digits


def write_digits(root: Path, side: int = 32, margin: int = 4, val_share: int = 5) -> None:
    """Each 8 x 8 scan becomes a PNG of `side` pixels and a black margin; every `val_share`-th image goes to val/."""
    digits = load_digits()
    for i, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = root / ("val" if i % val_share == 0 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((scan * (255 / 16)).astype(np.uint8))
        digit = grey.resize((side, side), Image.Resampling.BICUBIC)
        ImageOps.expand(digit, margin).save(folder / f"{i:04d}.png")


if __name__ == "__main__":
    write_digits(Path(sys.argv[1]))
