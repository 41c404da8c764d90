"""Checkpoints: write, find the newest, resume a run, start from pretrained weights.

A file is a dict: `model` (state dict), and in training checkpoints `optimizer`, `epoch`, `scaler`, `args` (a plain
dict). Everything is loaded with weights_only=True: a checkpoint from elsewhere is data, never code.
"""

import argparse
import os
import pickle
import re
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import nn

from util.dist import Dist, sum_over_ranks
from util.errors import UserError
from util.log import NonFiniteLossError, log
from util.pos_embed import interpolate_pos_embed

RELEASES = "https://dl.fbaipublicfiles.com/mae/"


class Writer:
    """Writes `output_dir`/checkpoint-{epoch}.pth on rank 0, every `every` epochs and at the last one.

    Writes nothing where `output_dir` is empty. `args` goes into each file, as a plain dict.
    """

    def __init__(self, env: Dist, output_dir: str, every: int, args: argparse.Namespace) -> None:
        self.folder = Path(output_dir) if env.is_main and output_dir else None
        self.every, self.last_epoch = every, args.epochs - 1
        self.args = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}

    def after_epoch(
        self, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        """Save, if it is time. Raises NonFiniteLossError on all ranks together where a weight is NaN or infinite."""
        if epoch % self.every and epoch != self.last_epoch:
            return
        check_finite(model, epoch)
        if self.folder is None:
            return
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": epoch,
            "scaler": scaler.state_dict(),
            "args": self.args,
        }
        save(self.folder / f"checkpoint-{epoch}.pth", state)


def check_finite(model: nn.Module, epoch: int) -> None:
    """Raise NonFiniteLossError unless all weights are finite: the last update may have broken what no loss has seen."""
    finite = torch.stack([param.detach().isfinite().all() for param in model.parameters()]).all()
    if sum_over_ranks((~finite).float()).item() > 0:
        raise NonFiniteLossError(
            f"weights became non-finite in the last steps of epoch {epoch}, which is not saved. Resume from the last "
            "checkpoint with a lower --blr, a longer --warmup_epochs or --amp off"
        )


def save(path: Path, state: dict) -> None:
    """Write a file whole or not at all: to a temporary file beside it, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def newest(output_dir: str | Path) -> Path | None:
    """Folder -> its checkpoint-{epoch}.pth of the highest epoch; None where there is none."""
    found = {
        int(match[1]): path
        for path in Path(output_dir).glob("checkpoint-*.pth")
        if (match := re.fullmatch(r"checkpoint-(\d+)\.pth", path.name))
    }
    return found[max(found)] if found else None


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


def resume(
    path_or_url: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> int:
    """Load a training checkpoint into model, optimizer and scaler; return the epoch to continue with.

    A file without optimizer (released weights), or a call without one (evaluation), loads the model and returns 0.
    Raises UserError naming the keys that don't fit the model.
    """
    state = load(path_or_url)
    _load_strictly(model, state["model"], path_or_url)
    log.info(f"resumed {path_or_url}" + (f" (epoch {state['epoch']})" if "epoch" in state else ""))
    if optimizer is None or "optimizer" not in state or "epoch" not in state:
        return 0
    try:
        _load_optimizer_state(optimizer, state["optimizer"])
    except (ValueError, KeyError) as error:
        raise UserError(
            f"the optimizer state of {path_or_url} fits other parameter groups ({error}): resume with the options it "
            "was trained with, such as --layer_decay"
        ) from error
    if scaler is not None and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    return state["epoch"] + 1


def _load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Take the moments from `saved`, and all else (weight decay, rates, kernel) from the optimizer as the run built it.

    Files of the original code know nothing of fused kernels, and an option given on resuming must have its effect.
    """
    built = optimizer.state_dict()["param_groups"]
    if len(built) != len(saved["param_groups"]):
        raise ValueError(f"{len(saved['param_groups'])} groups in the file, {len(built)} here")
    groups = [{**ours, "params": theirs["params"]} for ours, theirs in zip(built, saved["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def resume_for_eval(path_or_url: str, model: nn.Module) -> None:
    """Load the model alone, for --eval."""
    if not path_or_url:
        raise UserError("--eval needs the classifier to evaluate: give its checkpoint with --resume")
    resume(path_or_url, model)


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
    _load_strictly(model, state_dict, path_or_url)


def _load_strictly(model: nn.Module, state_dict: dict[str, torch.Tensor], name: str | Path) -> None:
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
    _load_strictly(model, {**{name: own[name] for name in may_be_missing}, **state_dict}, path_or_url)
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
