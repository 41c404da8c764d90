"""The channels that a file's first layer takes, against those of the model."""

from collections.abc import Mapping
from typing import NoReturn

import torch
from timm.models import adapt_input_conv

from util.errors import UserError
from util.log import log

FIRST = "patch_embed.proj.weight"
Weights = Mapping[str, torch.Tensor]


def _differing(own: Weights, weights: Weights) -> tuple[int, int] | None:
    """(Channels of the file, of the model), where they alone keep the first layer from fitting."""
    here, there = (tuple(state[FIRST].shape) if FIRST in state else () for state in (own, weights))
    if len(here) != 4 or len(there) != 4 or there[1] == here[1] or there[0] != here[0] or there[2:] != here[2:]:
        return None
    return there[1], here[1]


def check(own: Weights, weights: Weights, name: object) -> None:
    """Raise UserError where a state dict takes images of other channels than the model's, `own`."""
    if found := _differing(own, weights):
        refuse(name, *found)


def refuse(name: object, there: int, here: int) -> NoReturn:
    """Raise UserError for a file and a model of other channels."""
    raise UserError(f"{name} takes images of {there} channels, the model here of {here}: pass --in_chans {there}")


def adapted(own: Weights, weights: Weights, name: object) -> Weights:
    """A state dict of 3 channels -> the same for those of the model, `own`, by timm's rule: summed for one, else
    repeated in turn and scaled by 3 / C. Others as they are. Raises UserError for other channels than 3.
    """
    if not (found := _differing(own, weights)) or not weights[FIRST].is_floating_point():
        return weights
    if found[0] != 3:
        check(own, weights, name)
    log.info(f"{name} takes 3 channels: its first layer is adapted to {found[1]}, as timm does (adapt_input_conv)")
    return {**weights, FIRST: adapt_input_conv(found[1], weights[FIRST])}
