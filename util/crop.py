"""The random resized crop of the linear probe, as TensorFlow's ImageNet recipes draw it."""

import math

import torch
from torchvision import transforms
from torchvision.transforms import functional as F


class RandomResizedCrop(transforms.RandomResizedCrop):
    """torchvision's RandomResizedCrop with one draw and no retries.

    torchvision draws up to ten times until the box fits and else takes the centre; here the sides are clipped to the
    image, so that small crops of narrow images keep their corner uniform. Source: paper, appendix A.1, linear probing.
    """

    @staticmethod
    def get_params(img, scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[int, int, int, int]:
        """Image -> box (top, left, height, width) in pixels. `scale` is a share of the area, `ratio` width / height."""
        _, height, width = F.get_dimensions(img)
        area = height * width * torch.empty(1).uniform_(*scale).item()
        aspect = math.exp(torch.empty(1).uniform_(math.log(ratio[0]), math.log(ratio[1])).item())
        w = min(max(round(math.sqrt(area * aspect)), 1), width)
        h = min(max(round(math.sqrt(area / aspect)), 1), height)
        top = int(torch.randint(0, height - h + 1, (1,)).item())
        left = int(torch.randint(0, width - w + 1, (1,)).item())
        return top, left, h, w
