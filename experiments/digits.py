"""What the scale `digits` trains on: scikit-learn's handwritten digits, and a tokenizer of their patches."""

import os
import shutil
from pathlib import Path

import torch
from torch import nn

from demo.make_digits import write_digits
from util.data.datasets import Images
from util.data.listing import list_images
from util.data.loader import normalise
from util.transforms import eval_transform

SIDE, PATCH, N_TOKENS = 32, 4, 64


def written(folder: Path) -> Path:
    """The digits below `folder`, written if they are not there yet."""
    if not folder.exists():
        half = folder.with_name(f"{folder.name}.{os.getpid()}")
        write_digits(half)
        try:
            half.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(half)
    return folder


class Nearest(nn.Module):
    """[N, 3, H, W] -> ids [N, L]: of each patch the nearest of some mean patches [M, 3*P*P]."""

    def __init__(self, means: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.vocab_size, self.patch = len(means), PATCH

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        patches = nn.functional.unfold(imgs, self.patch, stride=self.patch).transpose(1, 2)
        distances = (self.means**2).sum(dim=1) - 2 * patches @ self.means.t()  # but for each patch's own square
        return distances.argmin(dim=2)


def write_tokenizer(path: Path, data: Path) -> None:
    """K-means of the training images' patches as a TorchScript program: what a dVAE is for the paper's tokens."""
    from sklearn.cluster import KMeans

    if path.exists():
        return
    images = Images(list_images(data / "train"), eval_transform(SIDE))
    pixels = torch.stack([images[i][0] for i in range(0, len(images), 3)])
    imgs = normalise(pixels, torch.zeros(len(pixels), dtype=torch.bool))
    patches = nn.functional.unfold(imgs, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    means = KMeans(N_TOKENS, n_init=1, random_state=0).fit(patches.numpy()).cluster_centers_
    half = path.with_name(f"{path.name}.{os.getpid()}")
    torch.jit.script(Nearest(torch.from_numpy(means).float())).save(str(half))
    half.rename(path)
