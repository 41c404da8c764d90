"""k-nearest-neighbour accuracy of frozen features: what an encoder has learned, without training anything."""

import torch
import torch.nn.functional as F
from torch import nn

from util.loader import DeviceLoader


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
        neighbours = train[1][similarity.topk(min(k, len(train[1])), dim=1).indices]
        votes = F.one_hot(neighbours).sum(dim=1)
        n_right += (votes.argmax(dim=1) == labels).sum().item()
    return 100 * n_right / len(test[1])
