"""From a checkpoint to its model: released files by name, and what a file tells about its own architecture."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import models_mae
import models_vit
from util import checkpoint, download
from util.errors import UserError


@dataclass(frozen=True)
class Released:
    """A file of the authors: its URL, for which --model, with which target."""

    url: str
    model: str
    norm_pix_loss: bool = False


def _released() -> dict[str, Released]:
    files = {}

    def add(name: str, folder: str, *rest) -> None:
        files[name] = Released(f"{download.RELEASES}{folder}/{name}", *rest)

    for size, patch in (("base", 16), ("large", 16), ("huge", 14)):
        model = f"vit_{size}_patch{patch}"
        add(f"mae_pretrain_vit_{size}.pth", "pretrain", f"mae_{model}", True)
        add(f"mae_pretrain_vit_{size}_full.pth", "pretrain", f"mae_{model}", True)
        add(f"mae_visualize_vit_{size}.pth", "visualize", f"mae_{model}")
        add(f"mae_finetuned_vit_{size}.pth", "finetune", model)
    add("mae_visualize_vit_large_ganloss.pth", "visualize", "mae_vit_large_patch16")
    return files


RELEASED = _released()


def find(source: str | Path) -> str:
    """The name of a released file, with or without .pth -> its URL; anything else as it is."""
    name = str(source) if str(source).endswith(".pth") else f"{source}.pth"
    return RELEASED[name].url if name in RELEASED and not Path(source).exists() else str(source)


def told_by(state: dict, source: str | Path) -> dict:
    """A loaded checkpoint and its name -> what is known of `model`, `input_size`, `norm_pix_loss`.

    Training checkpoints tell by their arguments, released files by their name; other files know nothing.
    """
    args = state.get("args") or {}
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if isinstance(args.get("model"), str):
        return {name: args[name] for name in ("model", "input_size", "norm_pix_loss") if name in args}
    released = RELEASED.get(Path(source).name)
    return {"model": released.model, "norm_pix_loss": released.norm_pix_loss} if released else {}


def open_model(source: str | Path, model: str = "", **options) -> nn.Module:
    """A checkpoint's path or URL, or the name of a released file -> its model, with its weights, in eval mode.

    Options: see `open_named`.
    """
    return open_named(source, model, **options)[1]


def open_named(
    source: str | Path,
    model: str = "",
    input_size: int | tuple[int, int] | None = None,
    norm_pix_loss: bool | None = None,
    encoder_only: bool = False,
) -> tuple[str, nn.Module]:
    """As `open_model`, but (name of the model, model).

    `model`, `input_size` and `norm_pix_loss` overrule what the file tells. With `encoder_only` a masked autoencoder
    may lack its decoder, which then holds random weights. Raises UserError where the file does not tell its model, or
    does not fit it.
    """
    place = find(source)
    state = checkpoint.load(place)
    known = told_by(state, place)
    weights, name = state["model"], model or known.get("model")
    if not name:
        raise UserError(f"{source} does not tell which model it is of: give --model, such as mae_vit_base_patch16")
    if name not in models_mae.MODELS | models_vit.MODELS:
        raise UserError(f"--model {name} is not known: use one of {', '.join(models_mae.MODELS | models_vit.MODELS)}")
    size = input_size or known.get("input_size")
    options = {"img_size": size if isinstance(size, int) else tuple(size)} if size else {}
    if name in models_mae.MODELS:
        norm_pix = known.get("norm_pix_loss", False) if norm_pix_loss is None else norm_pix_loss
        network = models_mae.MODELS[name](norm_pix_loss=norm_pix, **options)
        if encoder_only:
            decoder = {key: value for key, value in network.state_dict().items() if is_decoder(key)}
            checkpoint.load_strictly(network, {**decoder, **weights}, source)
        else:
            checkpoint.load_full_mae(place, network, state)
        return name, network.eval()
    weights = _with_plain_head(weights)
    head = weights.get("head.weight")
    classes = 0 if head is None else len(head)
    network = models_vit.MODELS[name](num_classes=classes, global_pool="fc_norm.weight" in weights, **options)
    checkpoint.load_strictly(network, weights, source)
    network.classes = state.get("classes")  # their names, where the file has them
    return name, network.eval()


def _with_plain_head(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A linear probe's weights -> those of a classifier that computes the same in evaluation; others as they are."""
    probe = ("head.0.running_mean", "head.0.running_var", "head.1.weight", "head.1.bias")
    if not all(name in weights for name in probe):
        return weights
    mean, var, weight, bias = (weights[name] for name in probe)
    weight = weight / (var + models_vit.PROBE_EPS).sqrt()
    head = {"head.weight": weight, "head.bias": bias - weight @ mean}
    return {name: value for name, value in weights.items() if not name.startswith("head.")} | head


def is_decoder(key: str) -> bool:
    """Whether a weight of this name belongs to the decoder alone."""
    return key == "mask_token" or key.startswith("decoder_")
