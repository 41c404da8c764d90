"""From an RGB image to a normalised tensor, for each recipe. Sizes are one number or (height, width), in pixels."""

from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from timm.data.transforms import ResizeKeepRatio
from torchvision import transforms

from util.crop import RandomResizedCrop
from util.errors import UserError


def _posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    """timm's posterize, for the 0 bits that RandAugment draws now and then: black, which Pillow 13 refuses to give."""
    if bits_to_keep >= 8:
        return image
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


for _name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
    auto_augment.NAME_TO_OP[_name] = _posterize

BICUBIC = transforms.InterpolationMode.BICUBIC
Size = int | tuple[int, int]


def _tensor() -> list:
    return [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]


def pretrain_transform(size: Size, crop_min: float, hflip: float) -> transforms.Compose:
    """Image -> [3, H, W]: random resized crop of `crop_min` to 1 of the area, flip (paper, appendix A.1)."""
    crop = transforms.RandomResizedCrop(size, scale=(crop_min, 1.0), interpolation=BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(hflip), *_tensor()])


def linprobe_transform(size: Size, crop_min: float, hflip: float) -> transforms.Compose:
    """Image -> [3, H, W]: TensorFlow's random resized crop, flip; nothing stronger (paper, table 10)."""
    crop = RandomResizedCrop(size, scale=(crop_min, 1.0), interpolation=BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(hflip), *_tensor()])


def finetune_transform(
    size: Size,
    color_jitter: float | None,
    aa: str | None,
    reprob: float,
    remode: str,
    recount: int,
) -> transforms.Compose:
    """Image -> [3, H, W]: timm's crop, flip, RandAugment `aa` (or `color_jitter` without it), random erasing."""
    try:
        return create_transform(
            input_size=size,
            is_training=True,
            color_jitter=color_jitter,
            auto_augment=aa or None,
            interpolation="bicubic",
            re_prob=reprob,
            re_mode=remode,
            re_count=recount,
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"--aa {aa} is no policy of timm: use one such as rand-m9-mstd0.5-inc1, or ''") from error


def eval_transform(size: Size) -> transforms.Compose:
    """Image -> [3, H, W]: resize, centre crop. Up to 224 pixels the crop takes 224/256 of the resized side, above all.

    A square crop resizes the shorter side; a rectangle resizes until the image covers it.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    crop_share = 224 / 256 if max(sides) <= 224 else 1.0
    height, width = (int(side / crop_share) for side in sides)
    if height == width:
        resize = transforms.Resize(height, interpolation=BICUBIC)
    else:
        resize = ResizeKeepRatio((height, width), interpolation="bicubic")
    return transforms.Compose([resize, transforms.CenterCrop(sides), *_tensor()])
