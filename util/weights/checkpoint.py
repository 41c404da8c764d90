"""Loading checkpoints: safely, from a path or a URL; to evaluate, to reconstruct, to start a classifier.

Everything is loaded with weights_only=True: a checkpoint from elsewhere is data, never code. What a file holds, and how
it is written: util/run/run.py. Resuming a run: util/run/resume.py.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

import models_vit
from util.errors import UserError, shown
from util.log import log
from util.pos_embed import interpolate_pos_embed
from util.weights import channels, convert, download, hub, untrusted
from util.weights.download import RELEASES

AVERAGE = "#model_ema"  # behind a path or URL: the average of the weights (--model_ema) in the place of the weights

# parts of other Vision Transformers, by their names
_OTHER_PARTS = {
    r"(^|\.)(dist_token|head_dist|distillation_token)": "a distillation token (DeiT)",
    r"(^|\.)(reg_token|register_tokens)": "register tokens (DINOv2, DINOv3)",
    r"\.(gamma_?[12]|ls[12]|layer_scale[12])(\.|$)": "LayerScale (BEiT, DeiT III, DINOv2)",
    r"rel_pos|relative_position": "relative positions (BEiT, SAM)",
    r"(^|\.)norm_pre\.": "a norm in front of its blocks (CLIP)",
}


def load(path_or_url: str | Path, whole: bool = True) -> dict:
    """Path, https URL or address on a hub -> the file's dict, on the CPU, with finite weights under `model`. Downloads
    are kept: see util/weights/download.py and hub.py. Of the files of other projects the dict has `model`, under our
    names, and `args` alone. `FILE#model_ema`: the average of the weights is the `model`, without training state.
    Without `whole`, no weight is looked at: quick, for who asks for the options alone.

    Raises UserError where the file is missing, damaged, no checkpoint (the message says what it is), or holds anything
    but tensors, plain values and an `argparse.Namespace` (as files of the original code do).
    """
    url = str(hub.local(str(path_or_url).removesuffix(AVERAGE)))
    if "://" in url and not url.startswith("https://"):
        raise UserError(f"no checkpoint {url}: give a file or an https:// URL")
    path = download.fetch(url) if url.startswith("https://") else Path(url)
    try:
        state = untrusted.read(path, whole)
        if str(path_or_url).endswith(AVERAGE):
            state = _average_of(state, path)
        weights = convert.find_weights(state, path)
        if whole:
            untrusted.check_weights(weights, path, path.stat().st_size)
        if weights is state.get("model"):
            if whole and isinstance(state.get("model_ema"), dict):
                untrusted.check_weights(state["model_ema"], path, path.stat().st_size)
            return state
        args = {"args": state["args"]} if "args" in state else {}
        return {"model": convert.to_our_names(weights, path), **args}
    except UserError as error:
        if url.startswith("https://"):
            raise UserError(f"{error.message}. It came from {url}: remove it to download it again") from error
        raise


def _average_of(state: object, path: Path) -> dict:
    if not isinstance(state, dict) or not isinstance(state.get("model_ema"), dict):
        raise UserError(f"{path} has no average of the weights, which --model_ema saves: leave out {AVERAGE}")
    return {"model": state["model_ema"], **{name: state[name] for name in ("args", "classes") if name in state}}


def load_full_mae(path_or_url: str | Path, model: nn.Module, state: dict | None = None) -> None:
    """Load an encoder with its decoder, for reconstruction. An encoder-only file is refused (UserError): it would draw
    noise. `state` is the file's content, where the caller has it.
    """
    state_dict = _named_as(model, (state or load(path_or_url))["model"], path_or_url)
    check_decoder(model, state_dict, path_or_url)
    load_strictly(model, state_dict, path_or_url)


def check_decoder(model: nn.Module, state_dict: convert.Weights, name: str | Path) -> None:
    """Raise UserError, naming files to use instead, where a state dict has no decoder."""
    if not any(key.startswith("decoder_") for key in state_dict):
        missing = [key for key in model.state_dict() if key not in state_dict]
        raise UserError(
            f"{name} holds {describe(state_dict)} and cannot reconstruct: {len(missing)} keys are missing, such as "
            f"{', '.join(missing[:3])}. Use a file with a decoder: {RELEASES}pretrain/mae_pretrain_vit_*_full.pth "
            f"(normalised pixels) or {RELEASES}visualize/mae_visualize_vit_*.pth (pixels)"
        )


def load_strictly(
    model: nn.Module, state_dict: convert.Weights, name: str | Path, whole: convert.Weights | None = None
) -> None:
    """Load a state dict that fits the model exactly. Raises UserError naming what does not.

    `whole`: the state dict of the file `name`, where it is another.
    """
    model.load_state_dict(check_fit(model, state_dict, name, whole))


def check_fit(
    model: nn.Module, state_dict: convert.Weights, name: str | Path, whole: convert.Weights | None = None
) -> convert.Weights:
    """A state dict as the model names it; UserError unless it fits. See `load_strictly`."""
    state_dict, own = _named_as(model, state_dict, name), model.state_dict()
    missing, foreign = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
    other_shape = sorted(
        f"{key} {_form(state_dict[key])}, here {_form(own[key])}"
        for key in own.keys() & state_dict.keys()
        if _form(state_dict[key]) != _form(own[key])
    )
    if not missing and not foreign and not other_shape:
        return state_dict
    channels.check(own, state_dict, name)
    holds = state_dict if whole is None else whole
    _refuse_other_parts(foreign, name)
    hint = "Check --model, --input_size, --nb_classes and --global_pool / --cls_token"
    if size_of(holds) is None and size_of(own) is not None:
        hint = "Save it under the names used here, such as cls_token and blocks.0.attn.qkv.weight"
    if is_masked_autoencoder(state_dict) and not is_masked_autoencoder(own):
        hint = "To start a classifier from a masked autoencoder, give it as --finetune"
    differences = ((missing, "keys missing"), (foreign, "unknown"), (other_shape, "of another shape"))
    raise UserError(
        f"{name} holds {describe(holds)}; it does not fit the model, which is {describe(own)}: "
        + ", ".join(f"{len(keys)} {what} [{_some(keys)}]" for keys, what in differences if keys)
        + f". {hint}"
    )


def _named_as(model: nn.Module, weights: convert.Weights, name: str | Path) -> convert.Weights:
    """Weights as the model names them; a model that has all of their names knows better than any rule."""
    return weights if model.state_dict().keys() <= weights.keys() else convert.to_our_names(weights, name)


def _refuse_other_parts(foreign: list[str], name: str | Path) -> None:
    for pattern, what in _OTHER_PARTS.items():
        if key := next((key for key in foreign if re.search(pattern, key)), ""):
            raise UserError(f"{name} has {what}, {_key(key)}, which the models here do not have: take a file without")


def _some(keys: list[str], most: int = 5) -> str:
    return ", ".join(map(_key, keys[:most])) + (", …" if len(keys) > most else "")


def _key(name: str) -> str:
    return shown(name, 120)[1:-1]


def _form(tensor: torch.Tensor) -> str:
    """The shape, and the dtype where it is no floating-point number, which no conversion would save."""
    shape = str(tuple(tensor.shape)) if tensor.ndim <= 8 else f"of {tensor.ndim} dimensions"
    return shape + ("" if tensor.is_floating_point() else f" of {tensor.dtype}")


def load_pretrained(path_or_url: str | Path, model: nn.Module) -> None:
    """Start a classifier from pretrained weights, of MAE or of another classifier.

    Positions are resized to the model's grid; a decoder is left out; another head is dropped, with a line saying so.
    Only the head, and `fc_norm` with global pool, may be missing: any other difference raises UserError naming the
    keys.
    """
    state = load(path_or_url)
    weights, own = _named_as(model, state["model"], path_or_url), model.state_dict()
    state_dict = dict(weights)
    heads = [name for name in state_dict if name.startswith("head.")]
    if other := [name for name in heads if name not in own or _form(state_dict[name]) != _form(own[name])]:
        for name in other:
            here = f"here it is {_form(own[name])}" if name in own else "here it is not"
            log.info(f"dropped {_key(name)} {_form(state_dict[name])} of {path_or_url}: {here}")
        state_dict = {name: value for name, value in state_dict.items() if name not in heads}
    # what a classifier of the other kind, or a masked autoencoder, has beside the encoder
    for name in list(state_dict):
        unused_norm = name.startswith(("norm.", "fc_norm.")) and name not in own
        if is_decoder(name) or unused_norm:
            del state_dict[name]
    _refuse_other_parts(sorted(state_dict.keys() - own.keys()), path_or_url)
    state_dict = channels.adapted(own, state_dict, path_or_url)
    placed = with_positions(model, state_dict, path_or_url, untrusted.options_of(state).get("input_size"))
    if placed.get("pos_embed") is not state_dict.get("pos_embed"):
        here = int(model.patch_embed.num_patches)
        there = state_dict["pos_embed"].shape[1] - (model.pos_embed.shape[1] - here)
        log.info(f"positions of {path_or_url} resized, from {there} patches an image to {here} at this --input_size")
    state_dict = placed
    may_be_missing = {name for name in own if name.startswith(("head.", "fc_norm."))}
    start = {**{name: own[name] for name in may_be_missing}, **state_dict}
    load_strictly(model, start, path_or_url, whole=weights)
    new = sorted(may_be_missing - state_dict.keys())
    log.info(f"loaded pretrained weights from {path_or_url}" + (f"; new: {', '.join(new)}" if new else ""))


def load_init(path_or_url: str | Path, model: nn.Module) -> None:
    """Start a masked autoencoder from the weights of one, or of an encoder alone: its decoder is then new.

    Positions of another grid stay the model's, since all are of one fixed table. Raises UserError naming the keys where
    anything else does not fit.
    """
    weights, own = _named_as(model, load(path_or_url)["model"], path_or_url), model.state_dict()
    encoder = channels.adapted(own, weights, path_or_url)
    if encoder is not weights:  # a decoder of other pixels
        weights = {name: tensor for name, tensor in encoder.items() if not is_decoder(name)}
    full = is_masked_autoencoder(weights)
    # components of the target are fitted to the new images, where the file has none
    new = {key: own[key] for key in own if (key.startswith("decoder_target.") if full else is_decoder(key))}
    for key in ("pos_embed", "decoder_pos_embed"):
        theirs, ours = _shape(weights, key), tuple(own[key].shape)
        if theirs[-1:] == ours[-1:] and theirs != ours:
            weights = {**weights, key: own[key]}
    load_strictly(model, {**new, **weights}, path_or_url, whole=weights)
    log.info(f"starts from {path_or_url}, {describe(weights)}" + ("" if full else ": the decoder is new"))


def with_positions(
    model: nn.Module, weights: convert.Weights, name: str | Path, trained: int | Sequence[int] | None
) -> convert.Weights:
    """Weights -> a dict whose positions are resized to the model's grid. Raises UserError where theirs is unknown.

    `trained`: image side, or (height, width), in pixels, where the file tells it. What has another width or shape stays
    as it is: whoever loads it names it.
    """
    weights, width = dict(weights), model.pos_embed.shape[-1:]
    positions, projection = weights.get("pos_embed"), _shape(weights, "patch_embed.proj.weight")
    if positions is None or not positions.is_floating_point() or positions.shape[-1:] != width:
        return weights
    # by the file's own patches: where they are others than the model's, that is what does not fit
    patch = projection[3] if len(projection) == 4 and projection[3] else model.patch_embed.patch_size[0]
    height, width = (trained, trained) if isinstance(trained, int | None) else trained
    try:
        interpolate_pos_embed(model, weights, (height // patch, width // patch) if trained else None)
    except UserError as error:
        raise UserError(f"{name}: {error.message}") from error
    return weights


# what a state dict is the state of


def describe(state_dict: Mapping[str, torch.Tensor]) -> str:
    """State dict -> "a classifier of 10 classes, large_patch16 (width 1024, 24 blocks, patches of 16)" or the like."""
    if not state_dict:
        return "no weights at all"
    if (size := size_of(state_dict)) is None:
        return f"no Vision Transformer with the names used here (it has {_some(list(state_dict), 3)})"
    width, depth, patch_size = size
    numbers = f"width {width}, {depth} blocks, patches of {patch_size}"
    known = known_as(*size)
    return f"{kind_of(state_dict)}, {known} ({numbers})" if known else f"{kind_of(state_dict)} ({numbers})"


def size_of(state_dict: Mapping[str, torch.Tensor]) -> tuple[int, int, int] | None:
    """State dict -> (width, number of blocks, patch side in pixels); None where it is no Vision Transformer's."""
    patch_embed, cls_token = _shape(state_dict, "patch_embed.proj.weight"), _shape(state_dict, "cls_token")
    if len(patch_embed) != 4 or len(cls_token) != 3 or not patch_embed[-1]:
        return None
    blocks = {name.split(".")[1] for name in state_dict if name.startswith("blocks.")}
    return cls_token[-1], len(blocks), patch_embed[-1]


def kind_of(state_dict: Mapping[str, torch.Tensor]) -> str:
    """State dict -> "a masked autoencoder", "a classifier of 10 classes", a linear probe, "an encoder alone"."""
    if is_masked_autoencoder(state_dict):
        return "a masked autoencoder"
    classes = n_classes(state_dict)
    kind = "classifier" if "head.weight" in state_dict else "linear probe"
    return f"a {kind} of {classes} classes" if classes else "an encoder alone"


def n_classes(state_dict: Mapping[str, torch.Tensor]) -> int:
    """State dict -> the classes of a classifier or a linear probe; 0 without a head."""
    return next((shape[0] for head in ("head.weight", "head.1.weight") if (shape := _shape(state_dict, head))), 0)


def warn_of_other_classes(name: str, classes: list[str] | None) -> None:
    """Warn where the images' class names are not those of the file `name`, as far as both are known."""
    told = load(name, whole=False).get("classes")
    if not (classes and isinstance(told, list) and len(told) == len(classes)):
        return
    if other := [i for i, pair in enumerate(zip(told, classes, strict=True)) if pair[0] != pair[1]]:
        ours, theirs = shown(classes[other[0]]), shown(told[other[0]])
        log.warning(
            f"{len(other)} of {len(told)} classes have other names than in {name}, as class {other[0]}: {ours} here, "
            f"{theirs} there. Labels go by place, so the accuracy is right if the places mean the same"
        )


def is_decoder(key: str) -> bool:
    """Whether a weight of this name belongs to the decoder alone."""
    return key == "mask_token" or key.startswith("decoder_")


def is_masked_autoencoder(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether there is a decoder."""
    return "mask_token" in state_dict or "decoder_pred.weight" in state_dict


def _shape(state_dict: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...]:
    return tuple(state_dict[name].shape) if name in state_dict else ()


def known_as(width: int, depth: int, patch_size: int) -> str:
    """The part that a --model's names share, such as large_patch16; '' for a size of nobody's."""
    for name, builder in models_vit.MODELS.items():
        options = getattr(builder, "keywords", {})
        if [options.get(key) for key in ("embed_dim", "depth", "patch_size")] == [width, depth, patch_size]:
            return name.removeprefix("vit_")
    return ""
