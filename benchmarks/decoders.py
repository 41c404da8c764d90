"""How fast one core decodes photographs as JPEG, by every decoder that is installed: python -m benchmarks.decoders

The photographs are those of benchmarks/dataloader.py, 500 x 375 pixels, decoded from memory to uint8 RGB. *Pillow* is
convert("RGB") as an array; *ours* is util/data/decode.py with its limits. Figures are images per second of CPU time,
medians over rounds that take the rows in turn, since others may use the machine; `x Pillow` is the median of the ratios
within a round, between their quartiles. A row whose pixels are not Pillow's has no figures.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import common
from benchmarks.dataloader import PHOTOS, write_photographs
from util.data.decode import JPEG_DECODER, decode


def main() -> None:
    """Measure all rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_options(parser, rounds=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(write_photographs(Path(folder), len(PHOTOS)).rglob("*.jpg"))
        files = [torch.from_numpy(np.fromfile(path, np.uint8)) for path in paths]
    rivals = {name: lambda build=build: images_per_second(build(), files) for name, build in DECODERS.items()}
    figures = common.measure_in_turn(rivals, args.rounds)
    rows = []
    for name, rates in figures.items():
        ratios = [rate / of_pillow for rate, of_pillow in zip(rates, figures["Pillow"], strict=False)]
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist() if ratios else (None, None, None)
        rows.append({"decoder": name, "images/s": common.median(rates), "x Pillow": middle, "from": low, "to": high})
    common.report(rows, {**common.machine(torch.device("cpu")), "ours": JPEG_DECODER}, args.json)


Decoder = Callable[[torch.Tensor], "np.ndarray | torch.Tensor"]


def by_pillow(data: torch.Tensor) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data.numpy())).convert("RGB"))


def by_simplejpeg() -> Decoder:
    import simplejpeg

    return lambda data: simplejpeg.decode_jpeg(data.numpy(), "RGB")


def by_torchvision() -> Decoder:
    from torchvision.io import ImageReadMode, decode_jpeg

    return lambda data: decode_jpeg(data, mode=ImageReadMode.RGB).permute(1, 2, 0)


def by_torchcodec() -> Decoder:
    from torchcodec.decoders import decode_jpeg

    return lambda data: decode_jpeg(data).permute(1, 2, 0)


DECODERS = {"Pillow": lambda: by_pillow, "simplejpeg": by_simplejpeg, "torchvision": by_torchvision,
            "TorchCodec": by_torchcodec, "ours": lambda: lambda data: decode(data).permute(1, 2, 0)}  # fmt: skip


def images_per_second(decoder: Decoder, files: list[torch.Tensor]) -> float:
    """RuntimeError where its pixels are others than Pillow's."""
    if not all(np.array_equal(np.asarray(decoder(data)), by_pillow(data)) for data in files):
        raise RuntimeError("its pixels are not Pillow's")
    start = time.process_time()
    for data in files:
        decoder(data)
    return len(files) / (time.process_time() - start)


if __name__ == "__main__":
    main()
