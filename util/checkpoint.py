"""Loading checkpoints: safely, from a path or a URL; to evaluate, to reconstruct, to start a classifier.

Everything is loaded with weights_only=True: a checkpoint from elsewhere is data, never code. What a file holds, and how
it is written: util/saving.py. Resuming a run: util/resume.py.
"""

import argparse
import pickle
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import nn

from util.errors import UserError
from util.log import log
from util.pos_embed import interpolate_pos_embed

RELEASES = "https://dl.fbaipublicfiles.com/mae/"


def load(path_or_url: str | Path) -> dict:
    """Path or https URL -> the file's dict, on the CPU. URLs are kept in torch.hub's cache folder.

    Raises UserError where the file is missing, is no checkpoint, or holds anything but tensors, plain values and an
    `argparse.Namespace` (as files of the original code do).
    """
    path = _download(str(path_or_url)) if str(path_or_url).startswith("https://") else Path(path_or_url)
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: give a file or an https:// URL")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} was refused, and nothing of it was run: it is not a torch checkpoint, or it holds other objects "
            f"than tensors, plain values and argparse.Namespace ({_first_line(error)})"
        ) from error
    except Exception as error:  # garbage makes the reader raise whatever it likes; nothing of the file is run
        raise UserError(f"{path} cannot be read as a checkpoint; is it complete? ({_first_line(error)})") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path} is no checkpoint of this project: it has no state dict under the key 'model'")
    return state


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _download(url: str) -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / Path(urlparse(url).path).name
    if not path.is_file():
        log.info(f"downloading {url} to {path}")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except OSError as error:
            raise UserError(f"cannot download {url} ({error}): fetch it by hand and give the file's path") from error
    return path


def resume_for_eval(path_or_url: str, model: nn.Module) -> None:
    """Load the model alone, for --eval."""
    if not path_or_url:
        raise UserError("--eval needs the classifier to evaluate: give its checkpoint with --resume")
    load_strictly(model, load(path_or_url)["model"], path_or_url)


def load_full_mae(path_or_url: str, model: nn.Module) -> None:
    """Load an encoder with its decoder, for reconstruction. An encoder-only file is refused (UserError): it would draw
    noise.
    """
    state_dict = load(path_or_url)["model"]
    missing = [name for name in model.state_dict() if name not in state_dict]
    if any(name.startswith("decoder") or name == "mask_token" for name in missing):
        raise UserError(
            f"{path_or_url} holds an encoder alone and cannot reconstruct: {len(missing)} keys are missing, such as "
            f"{', '.join(missing[:3])}. Use a file with a decoder: {RELEASES}pretrain/mae_pretrain_vit_*_full.pth "
            f"(normalised pixels) or {RELEASES}visualize/mae_visualize_vit_*.pth (pixels)"
        )
    load_strictly(model, state_dict, path_or_url)


def load_strictly(model: nn.Module, state_dict: dict[str, torch.Tensor], name: str | Path) -> None:
    """Load a state dict that fits the model exactly. Raises UserError naming what does not."""
    own = model.state_dict()
    missing, foreign = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
    other_shape = [
        f"{key} {tuple(state_dict[key].shape)}, here {tuple(own[key].shape)}"
        for key in own.keys() & state_dict.keys()
        if state_dict[key].shape != own[key].shape
    ]
    if missing or foreign or other_shape:
        raise UserError(
            f"{name} does not fit the model: {len(missing)} keys missing {missing[:5]}, {len(foreign)} unknown "
            f"{foreign[:5]}, {len(other_shape)} of another shape {sorted(other_shape)[:5]}. Check --model, "
            "--input_size, --nb_classes and --global_pool / --cls_token"
        )
    model.load_state_dict(state_dict)


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
    except RuntimeError as error:
        raise UserError(f"the positions of {path_or_url} have another width than --model: {error}") from error
    may_be_missing = {name for name in own if name.startswith(("head.", "fc_norm."))}
    load_strictly(model, {**{name: own[name] for name in may_be_missing}, **state_dict}, path_or_url)
    new = sorted(may_be_missing - state_dict.keys())
    log.info(f"loaded pretrained weights from {path_or_url}" + (f"; new: {', '.join(new)}" if new else ""))


def _trained_grid(state: dict, model: nn.Module) -> tuple[int, int] | None:
    """The grid that the checkpoint's own arguments tell; None where they don't."""
    args = state.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args or {}
    size = args.get("input_size")
    if not size:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    patch = model.patch_embed.patch_size[0]
    return height // patch, width // patch
