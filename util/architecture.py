"""What a state dict is the state of: told to users whose file does not fit their model."""

import re
from collections.abc import Mapping

import torch


def describe(state_dict: Mapping[str, torch.Tensor]) -> str:
    """State dict -> "a classifier of 10 classes, large_patch16 (width 1024, 24 blocks, patches of 16)" or the like."""
    names = [str(name) for name in state_dict]
    if not names:
        return "no weights at all"
    if all(name.startswith("module.") for name in names):
        return "weights whose names begin with 'module.', as a wrapper left them: save the inner model's state_dict()"
    patch_embed, cls_token = _shape(state_dict, "patch_embed.proj.weight"), _shape(state_dict, "cls_token")
    if len(patch_embed) != 4 or not cls_token:
        return f"no Vision Transformer with the names used here (it has {', '.join(names[:3])})"
    width, patch_size = cls_token[-1], patch_embed[-1]
    depth = len({match[1] for name in names if (match := re.match(r"blocks\.(\d+)\.", name))})
    size = f"width {width}, {depth} blocks, patches of {patch_size}"
    known = _known_as(width, depth, patch_size)
    return f"{_kind(state_dict)}, {known} ({size})" if known else f"{_kind(state_dict)} ({size})"


def is_masked_autoencoder(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether there is a decoder."""
    return "mask_token" in state_dict or "decoder_pred.weight" in state_dict


def _kind(state_dict: Mapping[str, torch.Tensor]) -> str:
    if is_masked_autoencoder(state_dict):
        return "a masked autoencoder"
    for name, kind in (("head.weight", "classifier"), ("head.1.weight", "linear probe")):
        if shape := _shape(state_dict, name):
            return f"a {kind} of {shape[0]} classes"
    return "an encoder alone"


def _shape(state_dict: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...]:
    return tuple(state_dict[name].shape) if name in state_dict else ()


def _known_as(width: int, depth: int, patch_size: int) -> str:
    """The part that a --model's names share, such as large_patch16; '' for a size of nobody's."""
    from models_vit import MODELS  # late: the models' file uses util as well

    for name, builder in MODELS.items():
        options = getattr(builder, "keywords", {})
        if [options.get(key) for key in ("embed_dim", "depth", "patch_size")] == [width, depth, patch_size]:
            return name.removeprefix("vit_")
    return ""
