"""Weights under other names, at other places and in other files: whose encoder is where, and how it is called here.

timm's Vision Transformers name their weights as ours. Hugging Face's ViTMAE has other names, and query, key and value
as three matrices. Its published files say `vit.encoder.layer.0.attention.attention.query`, as transformers 4 does;
transformers 5 says `vit.layers.0.attention.q_proj` in memory, and writes decoder blocks as `decoder_encoder.layer`.
All are read; the published names are written, which every version reads. mmpretrain's names are read too.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from util.errors import UserError, shown
from util.log import log

# ours -> Hugging Face's published names
_WHOLE = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "head": "classifier",
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
    (r"^(embeddings|encoder|layers|layernorm|pooler)\.", r"vit.\1."),  # ViTMAEModel, the encoder alone
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]

# ours -> those of mmsegmentation's backbone MAE (its modules' names, and its tools/model_converters/beit2mmseg.py),
# which mmpretrain's are too, behind `backbone.`: at the beginning, and within
_MM_FIRST = {"norm.": "ln1.", "fc_norm.": "ln2.", "patch_embed.proj.": "patch_embed.projection.", "blocks.": "layers."}
_MM_INNER = {".norm": ".ln", ".mlp.fc1.": ".ffn.layers.0.0.", ".mlp.fc2.": ".ffn.layers.1."}

# the largest model here with its optimizer's state has about 2,000
MOST_TENSORS = 20_000
TOO_MANY = f"a checkpoint has at most {MOST_TENSORS:,}: save the state_dict() of the model alone"

# what wrappers (DistributedDataParallel, torch.compile, FSDP) put into names, once or many times, anywhere
_WRAPPER = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# of several encoders in a file, the one that its authors evaluate (DINO, timm's trainer, MoCo v3): by these words, in
# this order, as its key, then in its prefix
_PREFERRED = "teacher state_dict_ema model_ema state_dict base_encoder student".split()

_CLASS_TOKEN = r"(?:(?:vit\.)?embeddings\.)?cls_token"  # the second: Hugging Face's, whose decoder and head lie beside

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
    if pooler := [name for name in named if name.startswith("vit.pooler.")]:
        log.info(f"left out {', '.join(pooler)}: a layer behind the class token, which MAE does not have")
        named = {name: tensor for name, tensor in named.items() if name not in pooler}
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
                raise UserError(f"{shown(name)[1:-1]} is there, but its key or value is not: is the file complete?")
            if len({part.shape for part in parts}) > 1 or tensor.ndim == 0:
                raise UserError(f"{shown(name)}, its key and its value are not of one shape: the file is made by hand")
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


def to_mmseg(weights: Weights) -> Weights:
    """An encoder's weights -> the names of mmsegmentation's backbone MAE."""
    return {_replaced(name, _MM_FIRST, _MM_INNER): tensor for name, tensor in weights.items()}


def _replaced(name: str, first: dict[str, str], inner: dict[str, str]) -> str:
    for old, new in inner.items():
        name = name.replace(old, new)
    begin = next((begin for begin in first if name.startswith(begin)), "")
    return first.get(begin, "") + name.removeprefix(begin)


def find_weights(state: object, name: str | Path) -> Weights:
    """What the file `name` holds -> its weights, under their names there.

    They are under the key `model`, or else are those of a Vision Transformer, from wherever it is: under another key
    (DINO's `teacher`, Lightning's `state_dict`), or bare, and behind a prefix (`backbone.`, MoCo v3's
    `module.base_encoder.`), which is cut off; the log says which. Of several, see `_PREFERRED`. Raises UserError where
    there is none, or no telling which.
    """
    if isinstance(state, dict):
        if isinstance(state.get("model"), dict):
            return state["model"]
        dicts = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, dict)}
        places = [place for key, weights in ({"": state} | dicts).items() for place in _places(key, weights)]
        if places:
            return _take(places, name)
    keys = f" of {', '.join(map(shown, list(state)[:5])) or 'nothing'}" if isinstance(state, dict) else ""
    raise UserError(
        f"{name} is no checkpoint of this project: it has no state dict under the key 'model', but is {shown(state)}"
        f"{keys}, and no Vision Transformer is in it under names that are known here: save it as "
        '{"model": its state_dict()}, with names such as cls_token and blocks.0.attn.qkv.weight'
    )


def to_our_names(weights: Weights, name: str | Path) -> Weights:
    """Weights of a Vision Transformer behind prefixes, or as Hugging Face or mmpretrain name them -> our names.

    Others come back as they are.
    """
    places = _places("", weights)
    weights = _take(places, name) if places else weights
    if "patch_embed.projection.weight" in weights:
        first, inner = ({there: here for here, there in names.items()} for names in (_MM_FIRST, _MM_INNER))
        return {_replaced(old, first, inner): tensor for old, tensor in weights.items()}
    if any(_published(old) == _WHOLE["cls_token"] for old in weights):
        try:
            return from_hugging_face(weights)
        except UserError as error:
            raise UserError(f"{name}: {error.message}") from error
    return weights


@dataclass(frozen=True)
class _Place:
    """Where a Vision Transformer is: the `prefix` of its names, without wrappers', in the state dict under `key`."""

    key: str
    prefix: str
    weights: dict
    names: dict[str, str]  # without wrappers' parts -> as in the file

    def rank(self) -> tuple[int, int]:
        words = [_PREFERRED.index(word) for word in self.prefix.split(".") if word in _PREFERRED]
        by_key = _PREFERRED.index(self.key) if self.key in _PREFERRED else len(_PREFERRED)
        return by_key if self.key else -1, min(words, default=len(_PREFERRED)) if self.prefix else -1

    def __str__(self) -> str:
        token = re.compile(re.escape(self.prefix) + _CLASS_TOKEN)
        new, old = next(pair for pair in self.names.items() if token.fullmatch(pair[0]))
        begin = old.removesuffix(new[len(self.prefix) :])
        names = f"names that begin with {shown(begin)}" if begin else "names without a prefix"
        return f"{names} under {shown(self.key)}" if self.key else names


def _places(key: str, weights: dict) -> list[_Place]:
    names = {_WRAPPER.sub("", old): old for old in weights if isinstance(old, str)}
    return [_Place(key, prefix, weights, names) for prefix in _encoders(names)]


def _take(places: list[_Place], file: str | Path) -> Weights:
    """The weights of the preferred place, with a line in the log unless they are the whole, as they stand there."""
    best, *others = sorted(places, key=_Place.rank)
    if others and others[0].rank() == best.rank():
        raise UserError(
            f"{file} holds several encoders ({best}; {others[0]}), and nothing tells which is meant: save the one to "
            'use alone, by torch.save({"model": its weights}, …) with names that begin with cls_token, blocks, …'
        )
    taken = {new[len(best.prefix) :]: old for new, old in best.names.items() if new.startswith(best.prefix)}
    if best.key or others or any(new != old for new, old in taken.items()):
        used = set(taken.values())
        left = [old for old in best.weights if old not in used]
        log.info(
            f"{file}: took the weights of {best}"
            + (f"; left out {len(left)} more, such as {shown(left[0])}" if left else "")
            + (f"; there are also {', and '.join(map(str, others[:3]))}" if others else "")
        )
    return {new: best.weights[old] for new, old in taken.items()}


def _encoders(names: dict[str, str]) -> list[str]:
    """Names of weights -> the prefixes behind which there is a Vision Transformer."""
    found = []
    for name in names:
        if name.endswith("cls_token") and (match := re.fullmatch(rf"((?:.*?\.)??){_CLASS_TOKEN}", name, re.DOTALL)):
            inner = name.removesuffix("cls_token")
            beside = "patch_embeddings.projection", "patch_embed.proj", "patch_embed.projection"
            if any(f"{inner}{layer}.weight" in names for layer in beside):
                found.append(match[1])
    return found


def read_safetensors(path: Path) -> dict:
    """A .safetensors file -> its tensors; a file that `write_safetensors` wrote -> {"model", "args"}.

    Raises UserError where the file is damaged, or the package safetensors is missing.
    """
    package = _safetensors()
    try:
        with package.safe_open(path, framework="pt") as file:
            names = file.keys()
            if len(names) > MOST_TENSORS:
                raise UserError(f"{path} holds {len(names):,} tensors: {TOO_MANY}")
            weights = {name: file.get_tensor(name) for name in names}
            told = (file.metadata() or {}).get("args", "{}")
    except UserError:
        raise
    except (package.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is a safetensors file, but damaged ({error}): download or copy it again") from error
    try:
        args = json.loads(told)
    except (ValueError, RecursionError):
        log.warning(f"{path}: the args in its header are no JSON that can be read, and tell nothing")
        args = {}
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
