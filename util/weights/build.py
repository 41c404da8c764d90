"""From a checkpoint to its model: released files by name, and what a file tells about its own architecture."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import models_mae
import models_vit
from util import masks, targets
from util.errors import UserError, shown
from util.log import log
from util.transforms import check_together, statistics, told_statistics
from util.weights import channels, checkpoint, convert, download, untrusted
from util.weights.checkpoint import is_decoder

MAWS = "https://dl.fbaipublicfiles.com/maws/"  # MAE on 3 billion images (Singh et al. 2023, arXiv 2303.13496)


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
    maws = {"b16": "base_patch16", "l16": "large_patch16", "h14": "huge_patch14", "2b14": "2b_patch14"}
    for name, model in {**maws, "6.5b14": "6b_patch14"}.items():
        files[f"vit_{name}.pt"] = Released(f"{MAWS}pretrain/mae/vit_{name}.pt", f"mae_vit_{model}")
    # of ImageNet-1K alone: the folder tells it from the file of the same name
    files["mae_in1k/vit_2b14.pt"] = Released(f"{MAWS}pretrain/mae_in1k/vit_2b14.pt", "mae_vit_2b_patch14")
    return files


RELEASED = _released()
MODELS = models_mae.MODELS | models_vit.MODELS


def find(source: str | Path) -> str:
    """The name of a released file, with or without its ending -> its URL; anything else as it is."""
    for name in (f"{source}{ending}" for ending in ("", ".pth", ".pt")):
        if name in RELEASED and not Path(source).exists():
            return RELEASED[name].url
    return str(source)


def told_by(state: dict, source: str | Path) -> dict[str, object]:
    """A loaded checkpoint and its name -> what is known of `model`, `input_size`, `norm_pix_loss`, `in_chans`,
    `pixel_type`, `mean` and `std`, and of a classifier `nb_classes` and `global_pool`.

    Training checkpoints tell by their arguments, released files by their name, all by their weights' shapes, of which
    `state["model"]` must be under our names. Raises UserError where arguments and weights contradict one another.
    """
    weights, args = state["model"], untrusted.options_of(state)
    told: dict[str, object] = {}
    size, released = checkpoint.size_of(weights), RELEASED.get(Path(source).name)
    short = checkpoint.known_as(*size) if size else ""
    is_classifier = bool(checkpoint.n_classes(weights)) or "fc_norm.weight" in weights
    if str(args.get("model")) in (models_vit.MODELS if is_classifier else MODELS):  # it may be a list
        told["model"] = args["model"]
    elif released:
        told |= {"model": released.model, "norm_pix_loss": released.norm_pix_loss}
    elif short:
        told["model"] = f"vit_{short}" if is_classifier else f"mae_vit_{short}"
    if "model" in told and args.get("model", told["model"]) != told["model"]:
        log.info(f"{source}: its model {shown(args['model'])} is not known here: taken for {told['model']}")
    if isinstance(args.get("norm_pix_loss"), bool):
        told["norm_pix_loss"] = args["norm_pix_loss"]
    if is_classifier:
        told |= {"nb_classes": checkpoint.n_classes(weights), "global_pool": "fc_norm.weight" in weights}
    told |= channels_told_by(weights, args)
    if size and (img_size := _image_size(weights, args, size[2], source)):
        told["input_size"] = img_size
    return told


def channels_told_by(weights: convert.Weights, args: dict) -> dict[str, object]:
    """Weights under our names, and options -> `in_chans`, `pixel_type`, and `mean` and `std` where the options tell
    them; {} where there is no first layer.
    """
    if getattr(first := weights.get(channels.FIRST), "ndim", 0) != 4:
        return {}
    in_chans, kind = first.shape[1], args.get("pixel_type")
    kind = kind if kind in ("stored", "uint8", "uint16", "float32") else "rgb" if in_chans == 3 else "stored"
    return {"in_chans": in_chans, "pixel_type": kind, **told_statistics(in_chans, args)}


def _image_size(
    weights: dict[str, torch.Tensor], args: dict, patch_size: int, source: str | Path
) -> int | tuple[int, int] | None:
    """The image side, or (height, width), in pixels: what the arguments tell, else a square; None where it is none."""
    positions = weights.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return None
    n_patches, size = positions.shape[1] - 1, args.get("input_size")
    if not size:
        side = math.isqrt(max(n_patches, 0))
        return side * patch_size if side * side == n_patches else None
    height, width = (size, size) if isinstance(size, int) else size
    if (height // patch_size) * (width // patch_size) != n_patches:
        raise UserError(
            f"{source} was trained with --input_size {shown(size)}, as its arguments have it, but has positions for "
            f"{n_patches} patches of {patch_size} pixels: one of them is not its own"
        )
    return size if isinstance(size, int) else tuple(size)


def take_options(args: argparse.Namespace, parser: argparse.ArgumentParser, probe: bool) -> convert.Weights:
    """For --eval: load the classifier of --resume, and set model, size, classes and pooling in `args` to the file's.

    Returns its weights, with a probe's head where `probe`, else a plain one. Raises UserError where the file is no
    classifier, or an option that is away from the parser's default contradicts it.
    """
    if not args.resume:
        raise UserError("--eval needs the classifier to evaluate: give its checkpoint with --resume")
    state = checkpoint.load(args.resume)
    weights = convert.to_our_names(state["model"], args.resume)
    holds, told = checkpoint.describe(weights), told_by({**state, "model": weights}, args.resume)
    encoder = {"cls_token", "pos_embed", "patch_embed", "blocks", "norm", "fc_norm"}
    headless = {name.split(".")[0] for name in weights} <= encoder
    if checkpoint.is_masked_autoencoder(weights) or headless:
        raise UserError(f"--eval needs a classifier, and {args.resume} holds {holds}. To start a classifier from it, "
                        "give it as --finetune")  # fmt: skip
    if probe and "head.weight" in weights:
        raise UserError(f"{args.resume} holds {holds} and no linear probe: evaluate it by main_finetune.py --eval")
    taken, right, wrong = [], [], []
    for name in ("model", "input_size", "nb_classes", "global_pool", "in_chans"):
        ours, theirs = getattr(args, name), told.get(name)
        if theirs is None or _sides(ours) == _sides(theirs):
            continue
        if ours == parser.get_default(name):
            taken.append(_as_option(name, theirs))
        else:
            right.append(_as_option(name, theirs))
            wrong.append(_as_option(name, ours))
        setattr(args, name, theirs)
    kind = told.get("pixel_type", args.pixel_type)
    # who gives one says how files are read; `stored` of a file that tells the type is that type
    if args.pixel_type == "auto" or (args.pixel_type == "stored" and kind != "rgb"):
        args.pixel_type = kind
    check_together(args.mean, args.std)
    usual = statistics(args.in_chans, {}) if args.mean is None else {}  # of a file that tells none
    for name in ("mean", "std"):
        ours, theirs = getattr(args, name), told.get(name, usual.get(name))
        if ours is None and theirs is None:
            raise UserError(f"{args.resume} does not tell mean and std of its {args.in_chans} channels: give --mean "
                            "and --std")  # fmt: skip
        if ours is not None and theirs is not None and list(ours) != list(theirs):
            right.append(_as_option(name, theirs))
            wrong.append(_as_option(name, ours))
        setattr(args, name, list(ours or theirs))
    if wrong:
        raise UserError(f"{args.resume} holds {holds}, so it takes {' '.join(right)}: leave out {' '.join(wrong)}")
    if taken:
        log.info(f"{args.resume} holds {holds}: evaluated with {' '.join(taken)}")
    return weights if probe else _with_plain_head(weights)


def _as_option(name: str, value: object) -> str:
    if name == "global_pool":
        return "--global_pool" if value else "--cls_token"
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join([f"--{name}", *(str(value) for value in values)])


def _sides(value: object) -> object:
    """A square's side and (side, side) are one size."""
    return value[0] if isinstance(value, list | tuple) and len(set(value)) == 1 else value


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
    may lack its decoder, which then holds random weights, and a Vision Transformer has no head where the file is of a
    masked autoencoder. Raises UserError where the file does not tell its model, or does not fit it.
    """
    place = find(source)
    state = checkpoint.load(place)
    state = {**state, "model": convert.to_our_names(state["model"], source)}
    known, weights = told_by(state, place), state["model"]
    name = model or known.get("model")
    if not name:
        raise UserError(f"{source} does not tell which model it is of, but holds {checkpoint.describe(weights)}: give "
                        "--model, such as mae_vit_base_patch16")  # fmt: skip
    if name not in MODELS:
        raise UserError(f"--model {shown(name)} is not known: use one of {', '.join(MODELS)}")
    weights, is_mae = _with_plain_head(weights), name in models_mae.MODELS
    options = {"in_chans": known["in_chans"]} if "in_chans" in known else {}
    if size := input_size or known.get("input_size"):
        options["img_size"] = size if isinstance(size, int) else tuple(size)
    if is_mae:
        options["norm_pix_loss"] = known.get("norm_pix_loss", False) if norm_pix_loss is None else norm_pix_loss
        options |= _own_decoder(state, MODELS[name])
    else:
        options |= {"num_classes": checkpoint.n_classes(weights), "global_pool": "fc_norm.weight" in weights}
    try:
        with torch.device("meta"):  # shapes that cost nothing: a small file must not make room for a large model
            skeleton = _as_trained(MODELS[name](**options), state)
    except UserError as error:
        raise UserError(f"{source} does not fit {name}: {error.message}") from error
    others = [key for key in weights if (key.startswith("head.") if is_mae else is_decoder(key))]
    if encoder_only and others:
        what = "head" if is_mae else "decoder"
        log.info(f"{source}: left out {len(others)} weights of a {what}, such as {shown(others[0])}")
        weights = {key: value for key, value in weights.items() if key not in others}
    if is_mae and not encoder_only:
        checkpoint.check_decoder(skeleton, weights, source)
    elif input_size:
        weights = checkpoint.with_positions(skeleton, weights, source, known.get("input_size"))
    decoder = _decoder(skeleton) if encoder_only else {}
    checkpoint.check_fit(skeleton, {**decoder, **weights}, source, whole=weights)
    network = _as_trained(MODELS[name](**options), state)
    decoder = _decoder(network) if encoder_only else {}
    network.load_state_dict({**decoder, **weights})
    network.classes = None if is_mae else state.get("classes")  # names, as the file has them: main_evaluate.py judges
    if "in_chans" in known:
        network.bands = bands_of(known)
    return name, network.eval()


def bands_of(told: dict[str, object]) -> dict[str, object]:
    """What a file tells, `in_chans` at least -> a model's `bands`, what util/data/bands.py makes images with."""
    return {"mean": None, "std": None} | {name: told[name] for name in _BANDS if name in told}


_BANDS = ("in_chans", "pixel_type", "mean", "std")
# what a builder makes that does not say otherwise
_DECODER = {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16, "encoder_mask_tokens": False}


def _own_decoder(state: dict, builder: Callable[..., nn.Module]) -> dict[str, object]:
    """A checkpoint's content and its model's builder -> the builder's options for decoder and mask tokens, where the
    file's are others: sizes by its weights, the rest by its arguments.
    """
    weights, args = state["model"], untrusted.options_of(state)
    embed, heads = weights.get("decoder_embed.weight"), args.get("decoder_heads")
    if embed is None or embed.ndim != 2:
        return {}
    blocks = {name.split(".")[1] for name in weights if name.startswith("decoder_blocks.")}
    told = {"decoder_embed_dim": len(embed), "decoder_depth": len(blocks)}
    told["encoder_mask_tokens"] = args.get("encoder_mask_tokens") is True
    if isinstance(heads, int) and 0 < heads <= len(embed):
        told["decoder_num_heads"] = heads
    usual = _DECODER | getattr(builder, "keywords", {})
    return {name: value for name, value in told.items() if usual[name] != value}


def _as_trained(network: nn.Module, state: dict) -> nn.Module:
    """A model, with the target and the mask strategy of a checkpoint's content; weights are not loaded yet."""
    weights, args = state["model"], untrusted.options_of(state)
    components, last = weights.get("decoder_target.components"), weights.get("decoder_pred.bias")
    if components is not None and components.ndim == 2:
        network.set_target(targets.PCA(components.shape[1], len(components)))
    elif args.get("target") == "tokens" and last is not None and last.ndim == 1:
        network.set_target(targets.Tokens(len(last)))
    if str(args.get("mask")) in masks.MASKS and args["mask"] != "random":
        network.mask_noise = masks.MASKS[args["mask"]]
    return network


def _decoder(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in network.state_dict().items() if is_decoder(key)}


def _with_plain_head(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A linear probe's weights -> those of a classifier that computes the same in evaluation; others as they are."""
    probe = ("head.0.running_mean", "head.0.running_var", "head.1.weight", "head.1.bias")
    if not all(name in weights for name in probe):
        return weights
    mean, var, weight, bias = (weights[name] for name in probe)
    shapes = [tuple(tensor.shape) for tensor in (mean, var, bias)]
    if weight.ndim != 2 or shapes != [weight.shape[1:], weight.shape[1:], weight.shape[:1]] or not (var >= 0).all():
        return weights
    weight = weight / (var + models_vit.PROBE_EPS).sqrt()
    head = {"head.weight": weight, "head.bias": bias - weight @ mean}
    return {name: value for name, value in weights.items() if not name.startswith("head.")} | head
