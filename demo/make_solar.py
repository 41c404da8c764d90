"""Write photographs of solar cells as an ImageNet-style folder: python -m demo.make_solar FOLDER

The package `elpv-dataset` (CC BY-NC-SA 4.0) ships 2,624 electroluminescence images of cells of 44 solar modules, 300 x
300 pixels, grey, each with the probability (0, 1/3, 2/3, 1) that the cell is defective, and its kind (mono, poly).
Classes: `defective` above 1/2, else `functional`. It has no official split, and does not tell the modules.
"""

import csv
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from util.errors import UserError, fail


def elpv() -> Path:
    """The package's folder with `labels.csv`; the package is not imported, its pictures are enough."""
    spec = find_spec("elpv_dataset")
    if spec is None:
        raise UserError("the solar cells are not installed: pip install elpv-dataset")
    return Path(spec.submodule_search_locations[0]) / "data"


def cells(folder: Path, val_share: int = 4) -> Iterator[tuple[Path, str]]:
    """(file, "val/defective/cell0001.png" or the like): of each kind and probability every `val_share`-th, from the
    first, goes to val/.
    """
    seen = Counter()
    with (folder / "labels.csv").open() as table:
        for name, probability, kind in csv.reader(table, delimiter=" ", skipinitialspace=True):
            alike = (probability, kind)
            split = "train" if seen[alike] % val_share else "val"
            seen[alike] += 1
            label = "defective" if float(probability) > 0.5 else "functional"
            yield folder / name, f"{split}/{label}/{Path(name).name}"


def write_cells(root: Path, side: int = 110) -> None:
    """All of them as grey PNG files of `side` pixels below `root`: 110, as evaluation at 96 crops 96 of 109."""
    for file, place in cells(elpv()):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as cell:
            cell.convert("L").resize((side, side), Image.Resampling.BICUBIC).save(root / place)


if __name__ == "__main__":
    try:
        write_cells(Path(sys.argv[1]))
    except UserError as error:
        fail(error)
