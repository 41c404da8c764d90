"""Weights under other names and in other files: Hugging Face's ViTMAE, timm's state dicts, safetensors.

timm's Vision Transformers name their weights as ours. Hugging Face's ViTMAE has other names, and query, key and value
as three matrices. Its published files say `vit.encoder.layer.0.attention.attention.query`, as transformers 4 does;
transformers 5 says `vit.layers.0.attention.q_proj` in memory, and writes decoder blocks as `decoder_encoder.layer`.
All are read; the published names are written, which every version reads.
"""

import json
import re
from pathlib import Path

import torch

from util.errors import UserError

# ours -> Hugging Face's published names
_WHOLE = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
_STACKS = {"blocks": "vit.encoder.layer", "decoder_blocks": "decoder.decoder_layers"}
_IN_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = [f"attention.attention.{name}" for name in ("query", "key", "value")]

# transformers 5 -> published names
_NEWER = [
    (r"^(embeddings|encoder|layers|layernorm)\.", r"vit.\1."),  # ViTMAEModel, the encoder alone
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]

Weights = dict[str, torch.Tensor]


def to_hugging_face(weights: Weights) -> Weights:
    """A masked autoencoder's weights, or its encoder's -> the names of ViTMAEForPreTraining; qkv in three."""
    converted = {}
    for name, tensor in weights.items():
        block = re.fullmatch(r"(\w*blocks)\.(\d+)\.(.+?)\.(weight|bias)", name)
        if block is None:
            stem, _, ending = name.rpartition(".") if name not in _WHOLE else (name, "", "")
            converted[_WHOLE[stem] + ("." + ending if ending else "")] = tensor
            continue
        stack, number, inner, ending = block.groups()
        prefix = f"{_STACKS[stack]}.{number}."
        if inner == "attn.qkv":
            parts = zip(_QKV, tensor.chunk(3), strict=True)
            converted |= {f"{prefix}{part}.{ending}": third.contiguous() for part, third in parts}
        else:
            converted[f"{prefix}{_IN_BLOCK[inner]}.{ending}"] = tensor
    return converted


def from_hugging_face(weights: Weights) -> Weights:
    """The weights of a ViTMAE model, of any version of transformers -> our names. Unknown names stay as they are."""
    named = {_published(name): tensor for name, tensor in weights.items()}
    whole = {theirs: ours for ours, theirs in _WHOLE.items()}
    stacks = {theirs: ours for ours, theirs in _STACKS.items()}
    in_block = {theirs: ours for ours, theirs in _IN_BLOCK.items()}
    converted: Weights = {}
    for name, tensor in named.items():
        stem, _, ending = name.rpartition(".")
        block = re.fullmatch(rf"({'|'.join(map(re.escape, stacks))})\.(\d+)\.(.+)", stem)
        if block is None:
            converted[whole[name] if name in whole else f"{whole[stem]}.{ending}" if stem in whole else name] = tensor
        elif block[3] == _QKV[0]:
            parts = [named.get(f"{block[1]}.{block[2]}.{part}.{ending}") for part in _QKV]
            if any(part is None for part in parts):
                raise UserError(f"{name} is there, but its key or value is not: is the file complete?")
            converted[f"{stacks[block[1]]}.{block[2]}.attn.qkv.{ending}"] = torch.cat(parts)
        elif block[3] in in_block:
            converted[f"{stacks[block[1]]}.{block[2]}.{in_block[block[3]]}.{ending}"] = tensor
        elif block[3] not in _QKV:  # key and value went with their query
            converted[name] = tensor
    return converted


def _published(name: str) -> str:
    for pattern, replacement in _NEWER:
        name = re.sub(pattern, replacement, name)
    return name


# ours -> those of mmsegmentation's backbone MAE (its modules' names, and its tools/model_converters/beit2mmseg.py)
_MMSEG = [
    (r"^norm\.", "ln1."),
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^blocks\.(\d+)\.norm", r"layers.\1.ln"),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"layers.\1.ffn.layers.0.0."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"layers.\1.ffn.layers.1."),
    (r"^blocks\.", "layers."),
]


def to_mmseg(weights: Weights) -> Weights:
    """An encoder's weights -> the names of mmsegmentation's backbone MAE."""
    for pattern, replacement in _MMSEG:
        weights = {re.sub(pattern, replacement, name): tensor for name, tensor in weights.items()}
    return weights


def as_checkpoint(state: object) -> object:
    """What a file holds -> {"model": state dict}, where it is a bare state dict of timm or Hugging Face.

    All else is returned as it is.
    """
    if not isinstance(state, dict):
        return state
    if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
        return state
    if "cls_token" in state and "patch_embed.proj.weight" in state:
        return {"model": state}
    if any(_published(name) == _WHOLE["cls_token"] for name in state):
        return {"model": from_hugging_face(state)}
    return state


def read_safetensors(path: Path) -> dict:
    """A .safetensors file -> its tensors; a file that `write_safetensors` wrote -> {"model", "args"}.

    Raises UserError where the file is damaged, or the package safetensors is missing.
    """
    package = _safetensors()
    try:
        with package.safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
            args = json.loads((file.metadata() or {}).get("args", "{}"))
    except (package.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is a safetensors file, but damaged ({error}): download or copy it again") from error
    return {"model": weights, "args": args} if args and isinstance(args, dict) else weights


def write_safetensors(path: Path, weights: Weights, args: dict | None = None) -> None:
    """Weights -> a .safetensors file; `args`, such as the model's name, go into its header as JSON."""
    metadata = {"format": "pt"} | ({"args": json.dumps(args)} if args else {})
    weights = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    path.write_bytes(_safetensors().torch.save(weights, metadata))


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError("files in .safetensors need a package that is missing: pip install safetensors") from error
    return safetensors
