"""Weights for other libraries: python -m util.export CHECKPOINT --to timm|hf|safetensors|onnx|detectron2|mmseg

timm          the encoder, or a classifier, as timm's VisionTransformer names its weights (.safetensors)
hf            a folder for Hugging Face's ViTMAEModel (encoder) or ViTMAEForPreTraining (--part full)
safetensors   our own names; reads back as --finetune and in util/weights/build.py
onnx          encoder: images -> class_token, patch_map; --part full: images, noise -> loss, pred, mask;
              a classifier: images -> logits. Any batch size.
detectron2    the encoder for ViTDet (.pth)
mmseg         the encoder for mmsegmentation's backbone MAE (.pth)

At another --input_size than the checkpoint's, positions are resampled as for fine-tuning, those of a decoder too.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from models_mae import MaskedAutoencoderViT
from models_vit import check_divisible
from util import cli, targets
from util.data.bands import TOP
from util.errors import UserError, fail
from util.pos_embed import resample
from util.transforms import preprocessing, statistics, told_statistics
from util.weights import checkpoint, convert, hub, untrusted
from util.weights.build import find, is_decoder, open_named

ENDINGS = {"timm": ".timm.safetensors", "hf": "-hf", "safetensors": ".safetensors", "onnx": ".onnx"}
ENDINGS |= {"detectron2": ".detectron2.pth", "mmseg": ".mmseg.pth"}
_WITH_NAME = ("vit_tiny_patch16", "vit_small_patch16", "vit_base_patch16", "vit_large_patch16", "vit_huge_patch14")
TIMM_NAMES = {name: f"{name}_224" for name in _WITH_NAME}


def _code(path: Path) -> str:
    """A path as a literal of Python."""
    return json.dumps(str(path), ensure_ascii=False)


def to_timm(model: nn.Module, name: str, prepared: dict, kept: dict, path: Path) -> str:
    """Write encoder or classifier, with `kept` in the header; returns the Python line that loads it, with how to
    prepare images (`prepared`).
    """
    weights = {key: value for key, value in model.state_dict().items() if not is_decoder(key)}
    convert.write_safetensors(path, weights, kept)
    short = name.removeprefix("mae_").removesuffix("_dec512d8b")
    options = {"num_classes": 0 if isinstance(model, MaskedAutoencoderViT) else model.num_classes}
    if "fc_norm.weight" in weights:
        options["global_pool"] = "avg"
    if short not in TIMM_NAMES:  # timm has no name for the size, but takes it in numbers
        options |= {"patch_size": model.patch_embed.patch_size[0], "embed_dim": model.pos_embed.shape[-1]}
        options |= {"depth": len(model.blocks), "num_heads": model.blocks[0].attn.num_heads}
    if tuple(model.patch_embed.img_size) != (224, 224):
        options["img_size"] = tuple(model.patch_embed.img_size)
    if prepared["input_size"][0] != 3:
        options["in_chans"] = prepared["input_size"][0]
    # the number of classes again: timm drops the head of a file that it believes to have another
    options["pretrained_cfg_overlay"] = {"file": str(path), "num_classes": options["num_classes"], **prepared}
    keywords = ", ".join(f"{key}={value!r}" for key, value in options.items())
    timm_name = TIMM_NAMES.get(short, "vit_base_patch16_224")
    return f'import timm; model = timm.create_model("{timm_name}", pretrained=True, {keywords})'


def to_hugging_face(
    model: MaskedAutoencoderViT, part: str, mask_ratio: float, prepared: dict, top: int, kept: dict, folder: Path
) -> str:
    """Write config.json, preprocessor_config.json and model.safetensors, with `kept` in its header; returns the Python
    line that loads them.
    """
    height, width = model.patch_embed.img_size
    if height != width:
        raise UserError(f"Hugging Face's ViTMAE knows square images only, not {height} x {width}: use --to safetensors")
    weights = {key: value for key, value in model.state_dict().items() if part == "full" or not is_decoder(key)}
    weights = convert.to_hugging_face(weights)
    if part == "encoder":
        weights = {key.removeprefix("vit."): value for key, value in weights.items()}
    name = "ViTMAEForPreTraining" if part == "full" else "ViTMAEModel"
    folder.mkdir(parents=True)
    convert.write_safetensors(folder / "model.safetensors", weights, kept)
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True, "size": {"height": height, "width": width}, "resample": 3,  # 3: bicubic
        "do_rescale": True, "rescale_factor": 1 / top,
        "do_normalize": True, "image_mean": prepared["mean"], "image_std": prepared["std"],
    }  # fmt: skip
    config = _hugging_face_config(model, name, mask_ratio if part == "full" else 0.0)
    for file, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")
    return f"import transformers; model = transformers.{name}.from_pretrained({_code(folder)})"


def to_detector(model: nn.Module, to: str, prepared: dict, top: int, path: Path) -> str:
    """Write the encoder for detectron2's ViTDet or mmsegmentation; returns the lines of a config that load it."""
    left_out = ("head.", "fc_norm.")
    weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
    weights = {key: value for key, value in weights.items() if not is_decoder(key) and not key.startswith(left_out)}
    (height, width), patch_size = model.patch_embed.img_size, model.patch_embed.patch_size[0]
    told = {name: prepared.get(name) for name in ("mean", "std")}
    # their configs have ImageNet's, of 0 to 255; in units of the files' values
    told = {} if None in told.values() or (top == 255 and told == statistics(3, {})) else told
    told = {name: [float(f"{top * value:.7g}") for value in values] for name, values in told.items()}
    sizes = [model.pos_embed.shape[-1], len(model.blocks), model.blocks[0].attn.num_heads, prepared["input_size"][0]]
    if to == "detectron2":
        if height != width:
            raise UserError(f"ViTDet's pretraining images are square, not {height} x {width}: use --input_size")
        torch.save({"model": weights}, path)
        options = dict(zip(("embed_dim", "depth", "num_heads", "in_chans"), sizes, strict=True))
        options |= {"patch_size": patch_size, "pretrain_img_size": height}
        lines = [f"model.backbone.net.{key} = {value}" for key, value in options.items()]
        lines += [f"model.pixel_{key} = {value}" for key, value in told.items()]
        return "; ".join([f"train.init_checkpoint = {_code(path)}", *lines])
    torch.save(convert.to_mmseg(weights), path)
    options = {"type": "MAE", "img_size": (height, width), "patch_size": patch_size}
    options |= dict(zip(("embed_dims", "num_layers", "num_heads", "in_channels"), sizes, strict=True))
    options |= {"init_values": 1.0, "init_cfg": {"type": "Pretrained", "checkpoint": str(path)}}
    return f"model = dict(backbone={options!r}{f', data_preprocessor={told!r}' if told else ''})"


def _hugging_face_config(model: MaskedAutoencoderViT, architecture: str, mask_ratio: float) -> dict:
    blocks, decoder_blocks = model.blocks, model.decoder_blocks
    return {
        "architectures": [architecture],
        "model_type": "vit_mae",
        "image_size": model.patch_embed.img_size[0],
        "patch_size": model.patch_embed.patch_size[0],
        "num_channels": model.patch_embed.proj.in_channels,
        "hidden_size": model.pos_embed.shape[-1],
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "intermediate_size": blocks[0].mlp.fc1.out_features,
        "decoder_hidden_size": model.decoder_pos_embed.shape[-1],
        "decoder_num_hidden_layers": len(decoder_blocks),
        "decoder_num_attention_heads": decoder_blocks[0].attn.num_heads,
        "decoder_intermediate_size": decoder_blocks[0].mlp.fc1.out_features,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": model.norm.eps,
        "mask_ratio": mask_ratio,
        "norm_pix_loss": model.norm_pix_loss,
    }


def to_safetensors(model: nn.Module, part: str, args: dict, path: Path) -> str:
    """Write weights under our names, with `args` (model, input_size, norm_pix_loss) in the header."""
    keep_all = part == "full" or not isinstance(model, MaskedAutoencoderViT)
    weights = {key: value for key, value in model.state_dict().items() if keep_all or not is_decoder(key)}
    convert.write_safetensors(path, weights, args)
    return f"import safetensors.torch; weights = safetensors.torch.load_file({_code(path)})"


class _Encoder(nn.Module):
    def __init__(self, model: MaskedAutoencoderViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.encode(images)


class _Autoencoder(nn.Module):
    def __init__(self, model: MaskedAutoencoderViT, mask_ratio: float) -> None:
        super().__init__()
        self.model, self.mask_ratio = model, mask_ratio

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.model(images, self.mask_ratio, noise)


def to_onnx(model: nn.Module, part: str, mask_ratio: float, path: Path) -> str:
    """Trace with a free batch size; weights of over 2 GB go into a file beside it. Returns the line that loads it."""
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError as error:
            raise UserError(f"--to onnx needs missing packages: pip install onnx onnxscript ({error})") from error
    inputs = {"images": torch.randn(2, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)}
    if not isinstance(model, MaskedAutoencoderViT):
        outputs = ["logits"]
    elif part == "encoder":
        model, outputs = _Encoder(model), ["class_token", "patch_map"]
    else:
        inputs["noise"] = torch.rand(2, model.patch_embed.num_patches)
        model, outputs = _Autoencoder(model, mask_ratio), ["loss", "pred", "mask"]
    batch = torch.export.Dim("batch", min=1)
    n_bytes = sum(param.numel() * param.element_size() for param in model.parameters())
    torch.onnx.export(
        model.eval(), tuple(inputs.values()), path, input_names=list(inputs), output_names=outputs, dynamo=True,
        dynamic_shapes=[{0: batch} for _ in inputs], external_data=n_bytes > 1.9e9, verbose=False,
    )  # fmt: skip
    return f"import onnxruntime; session = onnxruntime.InferenceSession({_code(path)})"


def export(
    source: str,
    to: str,
    part: str = "encoder",
    output: Path | None = None,
    model_name: str = "",
    input_size: int | tuple[int, int] | None = None,
    mask_ratio: float = 0.75,
    patch_size: int | None = None,
) -> tuple[Path, str]:
    """Write `source` (see util/weights/build.py) in the format `to`; returns the new path and the line of Python that
    loads it.

    The path has the format's ending, whatever `output` has. Raises UserError for bad input, and where the output exists
    already or cannot be written.
    """
    output = output or Path(Path(source).stem + ("-full" if part == "full" else "") + ENDINGS[to])
    suffix = Path("x" + ENDINGS[to]).suffix  # by which libraries tell what a file is
    if to != "hf" and output.suffix != suffix:
        output = output.with_name(output.name + suffix)
    if output.exists():
        raise UserError(f"{output} exists: remove it, or name another with --output")
    if part == "full" and to in ("timm", "detectron2", "mmseg"):
        raise UserError(f"{to} has no masked autoencoder: --to {to} takes --part encoder")
    if patch_size and to not in ("detectron2", "mmseg"):
        raise UserError(f"--patch {patch_size} is for --to detectron2 and --to mmseg: leave it out")
    name, model = open_named(source, model_name, encoder_only=part == "encoder")
    (patch, _), size = model.patch_embed.patch_size, input_size or model.patch_embed.img_size
    check_divisible(size, patch_size or patch)
    resample(model, size, patch_size or patch)
    is_mae = isinstance(model, MaskedAutoencoderViT)
    if to == "hf" and not is_mae:
        raise UserError(f"{source} is a classifier, and --to hf writes masked autoencoders: use --to timm")
    if is_mae and part == "full":
        _check_decoder(model, to, source)
    args = _args_of(source)
    prepared = preprocessing(tuple(model.patch_embed.img_size), model.patch_embed.proj.in_channels, args)
    top = TOP.get(getattr(torch, str(args.get("pixel_type")), None), 255)  # the file's value that is 1 for the model
    if to in ("timm", "hf") and not {"mean", "std"} <= prepared.keys():
        raise UserError(
            f"{source} has {prepared['input_size'][0]} channels and does not tell their mean and std, which {to} takes "
            "with the weights: use --to safetensors"
        )
    kept = _kept(name, model, args)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if to == "timm":
            return output, to_timm(model, name, prepared, kept, output)
        if to == "hf":
            return output, to_hugging_face(model, part, mask_ratio, prepared, top, kept, output)
        if to == "onnx":
            return output, to_onnx(model, part, mask_ratio, output)
        if to in ("detectron2", "mmseg"):
            return output, to_detector(model, to, prepared, top, output)
        return output, to_safetensors(model, part, kept, output)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error}): name another place with --output") from error


def _check_decoder(model: MaskedAutoencoderViT, to: str, source: str) -> None:
    """Raise UserError where a format takes no such decoder as a whole model's."""
    use = "use --part encoder, or --to safetensors"
    if to == "hf" and (model.encoder_mask_tokens or model.decoder_target is not targets.pixel):
        words = "predicts pixels, and has no mask tokens in its encoder"
        raise UserError(f"Hugging Face's ViTMAE {words}, which {source} does otherwise: {use}")
    if to == "onnx" and isinstance(model.decoder_target, targets.Tokens):
        raise UserError(f"the loss of {source} takes its tokenizer, which no checkpoint holds: {use}")


def _kept(name: str, model: nn.Module, args: dict) -> dict[str, object]:
    """What the header of a .safetensors file tells: how the model of a checkpoint with options `args` is built, and how
    its images are made.
    """
    kept = {"model": name, "input_size": list(model.patch_embed.img_size)}
    told = told_statistics(model.patch_embed.proj.in_channels, args)
    kept |= {key: list(values) for key, values in told.items()}
    words = ("pixel_type", "target", "mask", "decoder_heads", "encoder_mask_tokens")
    kept |= {key: args[key] for key in words if isinstance(args.get(key), str | int)}
    return kept | ({"norm_pix_loss": model.norm_pix_loss} if isinstance(model, MaskedAutoencoderViT) else {})


def _args_of(source: str) -> dict:
    """The options that a checkpoint was trained with, {} where it does not tell."""
    return untrusted.options_of(checkpoint.load(find(source)))


def main() -> None:
    """Read the command line, export, say what was written and how to load it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "checkpoint",
        help="a file, an https URL, hf://user/name, timm/name, or a released file's name, as mae_visualize_vit_base",
    )
    add("--to", required=True, choices=list(ENDINGS), help="format, see above")
    add("--part", default="encoder", choices=["encoder", "full"],
        help="full: with the decoder; a classifier is always written whole (default: encoder)")  # fmt: skip
    add("--output", type=Path, metavar="PATH",
        help="file, or folder for hf (default: named after the checkpoint, here)")  # fmt: skip
    add("--model", default="", metavar="NAME", help="architecture (default: what the checkpoint tells)")
    add("--input_size", type=cli.positive, nargs="+", action=cli.SizeAction, metavar="PIXELS",
        help="image side, or height and width (default: the checkpoint's)")  # fmt: skip
    add("--patch", type=cli.positive, metavar="PIXELS",
        help="patch side for detectron2 and mmseg, such as 16 for ViT-H/14 (default: the checkpoint's)")  # fmt: skip
    add("--push", default="", metavar="USER/NAME", help="with --to hf: upload the folder to Hugging Face's Hub")
    add("--license", default="", metavar="NAME", help="with --push: of the weights, such as cc-by-nc-4.0 (required)")
    add("--data", default="", metavar="TEXT", help="with --push: what the weights were trained on (required)")
    add("--mask_ratio", default=0.75, type=cli.mask_ratio,
        help="share of patches removed in hf and onnx with --part full (default: 0.75)")  # fmt: skip
    args = parser.parse_args()
    try:
        if args.push and args.to != "hf":
            raise UserError(f"--push {args.push} is for --to hf: leave it out, or write that format")
        if args.push:
            hub.check_push(args.push, args.license, args.data)
        path, line = export(
            args.checkpoint, args.to, args.part, args.output, args.model, args.input_size, args.mask_ratio, args.patch
        )
        if args.push:
            told = _args_of(args.checkpoint)
            card = hub.model_card(path, args.push, args.checkpoint, told, args.license, args.data)
            print(f"pushed to {hub.push(path, args.push, card)}")
    except UserError as error:
        fail(error)
    print(f"wrote {path}. To load it:\n  {line}")


if __name__ == "__main__":
    main()
