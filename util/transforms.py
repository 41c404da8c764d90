"""From decoded pixels to a network's input size, for each recipe, in their type. Sizes: one number or (height, width).

A transform returns the pixels [h, w, C] and whether they are still to be mirrored: mirroring and normalising are the
device's work (util/data/loader.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio
from torchvision import transforms
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from util.crop import RandomResizedCrop
from util.errors import UserError


def _posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    """timm's posterize, for the 0 bits that RandAugment draws now and then: black, which Pillow 13 refuses to give."""
    if bits_to_keep >= 8:
        return image
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def posterize_to_black(policy: transforms.Compose) -> transforms.Compose:
    """timm's policies -> the same objects, of which posterize takes 0 bits; timm itself stays as it is."""
    for augment in policy.transforms:
        ops = getattr(augment, "ops", None) or sum(getattr(augment, "policy", []), [])  # AutoAugment has lists of two
        for op in ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize
    return policy


# shares of RandAugment's operations with `w0`, which timm took when the original was written; the others get none
_W0 = {"Rotate": 0.3, "ShearX": 0.2, "ShearY": 0.2, "TranslateXRel": 0.1, "TranslateYRel": 0.1}
_W0 |= dict.fromkeys(("Color", "Sharpness", "AutoContrast"), 0.025)
_W0 |= dict.fromkeys(("Solarize", "SolarizeAdd", "Contrast", "Brightness", "Equalize"), 0.005)

Size = int | tuple[int, int]
Box = tuple[int, int, int, int]  # top, left, height, width, in pixels
Transformed = tuple[torch.Tensor, bool]
RATIO = (3 / 4, 4 / 3)  # width / height of random crops, in all three recipes


def resize(pixels: torch.Tensor, size: list[int]) -> torch.Tensor:
    """uint8, uint16 or float32 [C, H, W] -> [C, h, w] of the same type, bicubic with antialiasing; one number in `size`
    is the shorter side.

    It differs from Pillow 13's by 0.03 grey levels on average over random crops of photographs, and by up to 0.2 on
    average in a single tall crop; from Pillow 12's by 0.003 and 0.01. Both round between the two directions, and
    Pillow 13 takes tall crops in the other order.
    """
    if pixels.dtype == torch.uint16:  # for which torch has no kernel
        return resize(pixels.float(), size).round_().clamp_(0, 65535).to(torch.uint16)
    # this layout has the fastest kernel
    pixels = pixels[None].contiguous(memory_format=torch.channels_last)
    return F.resize(pixels, size, InterpolationMode.BICUBIC, antialias=True)[0]


def crop_and_resize(pixels: torch.Tensor, box: Box, size: tuple[int, int]) -> torch.Tensor:
    """[C, H, W] -> the pixels inside `box`, as [h, w, C]."""
    top, left, height, width = box
    return resize(pixels[:, top : top + height, left : left + width], list(size)).permute(1, 2, 0).contiguous()


@dataclass(frozen=True)
class RandomCrop:
    """[C, H, W] -> ([h, w, C], to be mirrored): a random resized crop, a coin for the flip, a policy.

    `draw_box` is the library's own get_params(image, scale, ratio), so that draws are the library's. A `policy` (of
    PIL images, such as RandAugment) works on the mirrored image, and needs 3 channels of uint8. Raises UserError for a
    `ratio` from large to small.
    """

    size: tuple[int, int]
    draw_box: Callable[..., Box]
    area: tuple[float, float]  # of the crop, as a share of the image's
    hflip: float
    policy: Callable[[Image.Image], Image.Image] | None = None
    ratio: tuple[float, float] = RATIO  # least and largest width / height of the crop

    def __post_init__(self) -> None:
        if self.ratio[0] > self.ratio[1]:
            raise UserError(f"--crop_ratio {self.ratio[0]} {self.ratio[1]}: give the smaller first")

    def draw(self, height: int, width: int) -> tuple[Box, bool]:
        """The crop and the flip of an image of that size in pixels."""
        shape_only = torch.empty(3, height, width, device="meta")
        box = self.draw_box(shape_only, self.area, tuple(self.ratio))
        return box, torch.rand(1).item() < self.hflip

    def __call__(self, pixels: torch.Tensor) -> Transformed:
        box, mirror = self.draw(*pixels.shape[1:])
        pixels = crop_and_resize(pixels, box, self.size)
        if self.policy is None:
            return pixels, mirror
        if pixels.dtype != torch.uint8 or pixels.shape[2] != 3:
            found = f"{pixels.shape[2]} of {str(pixels.dtype).removeprefix('torch.')}"
            raise UserError(
                f"--aa, --color_jitter and --augment jitter need 3 channels of uint8, but an image has {found}: pass "
                "--aa '' without --color_jitter, or another --augment"
            )
        image = Image.fromarray(pixels.numpy())
        image = self.policy(ImageOps.mirror(image) if mirror else image)
        return torch.from_numpy(np.array(image)), False


def _box(img, scale: tuple[float, float], ratio: tuple[float, float], size: tuple[int, int], at_random: bool) -> Box:
    """Image -> the box of the shape of `size` with sides of 224 / 256 of the largest that fits, in the middle or
    `at_random` (uniform).
    """
    _, height, width = F.get_dimensions(img)
    fit = min(height / size[0], width / size[1]) * 224 / 256
    h, w = (min(max(round(side * fit), 1), most) for side, most in zip(size, (height, width), strict=True))
    if not at_random:
        return (height - h) // 2, (width - w) // 2, h, w
    top, left = (int(torch.randint(free + 1, ()).item()) for free in (height - h, width - w))
    return top, left, h, w


AUGMENTS = ("none", "crop", "rrc", "jitter")


def pretrain_transform(
    size: Size, crop_min: float, hflip: float, augment: str = "rrc", ratio: tuple[float, float] = RATIO
) -> RandomCrop:
    """Random resized crop of `crop_min` to 1 of the area, flip (paper, appendix A.1): `rrc`. The others of table 1e:
    `none`, a centre crop without flip; `crop`, one of fixed size and random place, with flip; `jitter`, `rrc` with
    brightness, contrast and saturation times 0.6 to 1.4. The paper states neither the size nor the strength.
    """
    sides = _sides(size)
    if augment in ("none", "crop"):
        at_random = augment == "crop"
        return RandomCrop(sides, partial(_box, size=sides, at_random=at_random), (1.0, 1.0), hflip * at_random)
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4) if augment == "jitter" else None
    return RandomCrop(sides, transforms.RandomResizedCrop.get_params, (crop_min, 1.0), hflip, jitter, ratio)


def linprobe_transform(size: Size, crop_min: float, hflip: float, ratio: tuple[float, float] = RATIO) -> RandomCrop:
    """TensorFlow's random resized crop, flip; nothing stronger (paper, table 10)."""
    return RandomCrop(_sides(size), RandomResizedCrop.get_params, (crop_min, 1.0), hflip, ratio=ratio)


def _weigh(augment: RandAugment) -> None:
    """Let it draw operations as with `w0`, each at most once."""
    weights = [_W0.get(op.name.removesuffix("Increasing"), 0.0) for op in augment.ops]
    if augment.num_layers > np.count_nonzero(weights):
        raise ValueError("more operations than have a share")
    augment.choice_weights = np.divide(weights, sum(weights))


def finetune_transform(
    size: Size, color_jitter: float | None, aa: str | None, crop_min: float = 0.08, hflip: float = 0.5,
    ratio: tuple[float, float] = RATIO,
) -> RandomCrop:  # fmt: skip
    """timm's crop and flip, RandAugment `aa` (or `color_jitter` without it). Erasing is the device's work."""
    words = (aa or "").split("-")
    w0 = words[0] == "rand" and "w0" in words
    try:
        _, policy, _ = create_transform(
            input_size=size,
            is_training=True,
            color_jitter=color_jitter,
            auto_augment="-".join(word for word in words if word != "w0") if w0 else aa or None,
            interpolation="bicubic",
            mean=IMAGENET_DEFAULT_MEAN,  # fills what rotations uncover
            separate=True,
        )
        if w0:
            _weigh(policy.transforms[0])
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"--aa {aa} is no policy of timm: use one such as rand-m9-mstd0.5-inc1, or ''") from error
    draw_box = RandomResizedCropAndInterpolation.get_params
    policy = posterize_to_black(policy) if policy.transforms else None
    return RandomCrop(_sides(size), draw_box, (crop_min, 1.0), hflip, policy, ratio)


@dataclass(frozen=True)
class CentreCrop:
    """[C, H, W] -> ([h, w, C], False): resize, centre crop; draws nothing."""

    size: tuple[int, int]
    resized: tuple[int, int]

    def __call__(self, pixels: torch.Tensor) -> Transformed:
        if self.resized[0] == self.resized[1]:
            sides = [self.resized[0]]
        else:
            sides = ResizeKeepRatio.get_params(pixels, self.resized, longest=0.0)
        pixels = F.center_crop(resize(pixels, sides), list(self.size))
        return pixels.permute(1, 2, 0).contiguous(), False


def eval_transform(size: Size) -> CentreCrop:
    """Up to 224 pixels the crop takes 224/256 of the resized side, above all.

    A square crop resizes the shorter side; a rectangle resizes until the image covers it.
    """
    (height, width), crop_share = _sides(size), eval_crop_share(size)
    return CentreCrop((height, width), (int(height / crop_share), int(width / crop_share)))


def eval_crop_share(size: Size) -> float:
    """What of the resized side the crop takes in evaluation."""
    return 224 / 256 if max(_sides(size)) <= 224 else 1.0


def preprocessing(size: tuple[int, int], channels: int, args: dict) -> dict[str, object]:
    """How evaluation prepares images of that size, by timm's names; `args` are those of a checkpoint.

    Without mean and std where nobody tells them: the checkpoint has none, and other than 3 channels.
    """
    known = {"input_size": (channels, *size), "interpolation": "bicubic", "crop_mode": "center"}
    known["crop_pct"] = eval_crop_share(size)
    return known | statistics(channels, args)


def statistics(channels: int, args: dict) -> dict[str, tuple[float, ...]]:
    """Channels, and a checkpoint's options -> `mean` and `std`: its own, else ImageNet's for 3 channels, else {}."""
    usual = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD} if channels == 3 else {}
    return told_statistics(channels, args) or usual


def told_statistics(channels: int, args: dict) -> dict[str, tuple[float, ...]]:
    """Channels, and a checkpoint's options -> the `mean` and `std` that it tells; {} where it does not."""
    told = {name: args.get(name) for name in ("mean", "std")}
    fit = all(isinstance(values, list | tuple) and len(values) == channels for values in told.values())
    if fit and all(isinstance(v, int | float) and math.isfinite(v) for v in (*told["mean"], *told["std"])):
        if min(told["std"]) > 0:
            return {name: tuple(map(float, values)) for name, values in told.items()}
    return {}


def check_together(mean: object, std: object) -> None:
    """Raise UserError where one of --mean and --std is given alone."""
    if (mean is None) != (std is None):
        raise UserError("--mean and --std go together: give both, or neither")


def _sides(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
