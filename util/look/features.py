"""What an encoder has learned, seen without training: nearest neighbours of its features, and where it looks."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from util.data.bands import collate, of_model
from util.data.datasets import Images
from util.data.loader import DeviceLoader, normalise
from util.transforms import eval_transform


def from_files(files: Sequence[str | Path], model: nn.Module) -> torch.Tensor:
    """Image files, of the kind that a model from a checkpoint was trained on -> normalised [N, C, H, W], as evaluation
    sees them. Raises UserError with the name of one that cannot be read, or has other channels.
    """
    bands = of_model(model)
    images = Images([(str(file), -1) for file in files], eval_transform(model.patch_embed.img_size), bands=bands)
    pixels, mirror, _ = collate([images[i] for i in range(len(images))])
    return normalise(pixels, mirror, bands)


@torch.no_grad()
def mean_features(model: nn.Module, loader: DeviceLoader) -> tuple[torch.Tensor, torch.Tensor]:
    """Images -> (features [n, D], labels [n]): the mean patch token of each whole image. `model` has `encode`."""
    model.eval()
    features, labels = [], []
    for imgs, targets in loader:
        _, patch_map = model.encode(imgs)
        features.append(patch_map.mean(dim=(2, 3)).cpu())
        labels.append(targets.cpu())
    return torch.cat(features), torch.cat(labels)


def knn_accuracy(
    train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor], k: int = 20
) -> float:
    """(features [n, D], labels [n]) twice -> % of test images whose `k` nearest training images (cosine) vote right."""
    bank = F.normalize(train[0], dim=1).T
    n_right = 0
    for features, labels in zip(test[0].split(1000), test[1].split(1000), strict=True):  # bounds the memory
        similarity = F.normalize(features, dim=1) @ bank
        neighbours = train[1][similarity.topk(min(k, len(train[1])), dim=1).indices].sort(dim=1).values
        # among k labels, not all: a column a class would take gigabytes for thousands of them
        votes = (neighbours[:, :, None] == neighbours[:, None]).sum(dim=2)
        winners = neighbours.gather(1, votes.argmax(dim=1, keepdim=True))[:, 0]  # of equal ones the smallest label
        n_right += (winners == labels).sum().item()
    return 100 * n_right / len(test[1])


@torch.no_grad()
def class_attention(model: nn.Module, imgs: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] -> [N, heads, h, w]: the share of the class token's attention that each patch gets, in the last
    block, over the whole image. What is missing to 1 goes to the class token itself.

    `model` is a masked autoencoder or a classifier of this project (it has `encode`).
    """
    attention = model.blocks[-1].attn
    inputs: list[torch.Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        model.encode(imgs)
    finally:
        hook.remove()
    qkv = attention.qkv(inputs[0]).unflatten(2, (3, attention.num_heads, -1))
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)  # each [N, heads, 1 + L, D / heads]
    logits = query[:, :, :1] @ key.transpose(2, 3) * attention.scale
    return logits.softmax(dim=-1)[:, :, 0, 1:].unflatten(2, model.patch_embed.grid_size)
