"""Loading checkpoints: safely, from a path or a URL; to evaluate, to reconstruct, to start a classifier.

Everything is loaded with weights_only=True: a checkpoint from elsewhere is data, never code. What a file holds, and how
it is written: util/run.py. Resuming a run: util/resume.py.
"""

from pathlib import Path

import torch
from torch import nn

from util import contents, convert, download, untrusted
from util.architecture import describe, is_masked_autoencoder
from util.download import RELEASES
from util.errors import UserError
from util.log import log
from util.pos_embed import interpolate_pos_embed


def load(path_or_url: str | Path) -> dict:
    """Path or https URL -> the file's dict, on the CPU. Downloads are kept: see util/download.py. Bare weights, of timm
    or Hugging Face, come as {"model": weights under our names}.

    Raises UserError where the file is missing, damaged, no checkpoint (the message says what it is), or holds anything
    but tensors, plain values and an `argparse.Namespace` (as files of the original code do).
    """
    url = str(path_or_url)
    if "://" in url and not url.startswith("https://"):
        raise UserError(f"no checkpoint {url}: give a file or an https:// URL")
    path = download.fetch(url) if url.startswith("https://") else Path(path_or_url)
    try:
        state = convert.as_checkpoint(untrusted.read(path))
        contents.check_state_dict(state, path)
    except UserError as error:
        if url.startswith("https://"):
            raise UserError(f"{error.message}. It came from {url}: remove it to download it again") from error
        raise
    return state


def resume_for_eval(path_or_url: str, model: nn.Module) -> None:
    """Load the model alone, for --eval."""
    if not path_or_url:
        raise UserError("--eval needs the classifier to evaluate: give its checkpoint with --resume")
    load_strictly(model, load(path_or_url)["model"], path_or_url)


def load_full_mae(path_or_url: str | Path, model: nn.Module, state: dict | None = None) -> None:
    """Load an encoder with its decoder, for reconstruction. An encoder-only file is refused (UserError): it would draw
    noise. `state` is the file's content, where the caller has it.
    """
    state_dict = (state or load(path_or_url))["model"]
    if not any(name.startswith("decoder_") for name in state_dict):
        missing = [name for name in model.state_dict() if name not in state_dict]
        raise UserError(
            f"{path_or_url} holds {describe(state_dict)} and cannot reconstruct: {len(missing)} keys are missing, such "
            f"as {', '.join(missing[:3])}. Use a file with a decoder: {RELEASES}pretrain/mae_pretrain_vit_*_full.pth "
            f"(normalised pixels) or {RELEASES}visualize/mae_visualize_vit_*.pth (pixels)"
        )
    load_strictly(model, state_dict, path_or_url)


def load_strictly(
    model: nn.Module, state_dict: dict[str, torch.Tensor], name: str | Path, whole: dict | None = None
) -> None:
    """Load a state dict that fits the model exactly. Raises UserError naming what does not.

    `whole`: the state dict of the file `name`, where it is another.
    """
    own = model.state_dict()
    missing, foreign = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
    other_shape = [
        f"{key} {_form(state_dict[key])}, here {_form(own[key])}"
        for key in own.keys() & state_dict.keys()
        if _form(state_dict[key]) != _form(own[key])
    ]
    if missing or foreign or other_shape:
        hint = "Check --model, --input_size, --nb_classes and --global_pool / --cls_token"
        if is_masked_autoencoder(state_dict) and not is_masked_autoencoder(own):
            hint = "To start a classifier from a masked autoencoder, give it as --finetune"
        raise UserError(
            f"{name} holds {describe(whole or state_dict)}; it does not fit the model, which is {describe(own)}: "
            f"{len(missing)} keys missing {missing[:5]}, {len(foreign)} unknown {foreign[:5]}, {len(other_shape)} of "
            f"another shape {sorted(other_shape)[:5]}. {hint}"
        )
    model.load_state_dict(state_dict)


def _form(tensor: torch.Tensor) -> str:
    """The shape, and the dtype where it is no floating-point number, which no conversion would save."""
    return f"{tuple(tensor.shape)}" + ("" if tensor.is_floating_point() else f" of {tensor.dtype}")


def load_pretrained(path_or_url: str, model: nn.Module) -> None:
    """Start a classifier from pretrained weights, of MAE or of another classifier.

    Positions are resized to the model's grid; a decoder is left out; a head of another size is dropped, with a line
    saying so. Only the head, and `fc_norm` with global pool, may be missing: any other difference raises UserError
    naming the keys.
    """
    state = load(path_or_url)
    state_dict, own = dict(state["model"]), model.state_dict()
    for name in ("head.weight", "head.bias"):
        if name in state_dict and state_dict[name].shape != own[name].shape:
            theirs, ours = tuple(state_dict[name].shape), tuple(own[name].shape)
            log.info(f"dropped {name} {theirs} of {path_or_url}: here it is {ours}")
            del state_dict[name]
    # what a classifier of the other kind, or a masked autoencoder, has beside the encoder
    for name in list(state_dict):
        unused_norm = name.startswith(("norm.", "fc_norm.")) and name not in own
        if name == "mask_token" or name.startswith("decoder_") or unused_norm:
            del state_dict[name]
    try:
        interpolate_pos_embed(model, state_dict, _trained_grid(state, model))
    except UserError as error:
        raise UserError(f"{path_or_url}: {error.message}") from error
    except RuntimeError as error:
        raise UserError(f"the positions of {path_or_url} have another width than --model: {error}") from error
    may_be_missing = {name for name in own if name.startswith(("head.", "fc_norm."))}
    start = {**{name: own[name] for name in may_be_missing}, **state_dict}
    load_strictly(model, start, path_or_url, whole=state["model"])
    new = sorted(may_be_missing - state_dict.keys())
    log.info(f"loaded pretrained weights from {path_or_url}" + (f"; new: {', '.join(new)}" if new else ""))


def _trained_grid(state: dict, model: nn.Module) -> tuple[int, int] | None:
    """The grid that the checkpoint's own arguments tell; None where they don't."""
    size = contents.options_of(state).get("input_size")
    if not size:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    # by the file's own patches: where they are others than the model's, that is what does not fit
    shape = tuple(getattr(state["model"].get("patch_embed.proj.weight"), "shape", ()))
    patch = shape[3] if len(shape) == 4 and shape[3] else model.patch_embed.patch_size[0]
    return height // patch, width // patch
