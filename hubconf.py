"""The models for torch.hub: torch.hub.load("folder of this project", "mae_vit_base_patch16", source="local").

Every name of --model is an entry. `pretrained`: False for new weights; True for the authors' file of that model: an
autoencoder of normalised pixels, or a classifier of ImageNet-1K; or what --finetune takes: a path, an https URL, the
name of a released file, hf://user/name or timm/name. Other keywords are the builder's, such as img_size or num_classes.
Channels, classes and pooling are the file's, unless they are given: another num_classes has a new head, and a file
without head gives a model without one. An autoencoder with weights takes img_size and norm_pix_loss alone.
"""

from collections.abc import Callable

from torch import nn

import models_mae
import models_vit
from util.errors import UserError
from util.pos_embed import resample
from util.weights import build, checkpoint, convert, untrusted

dependencies = ["torch", "torchvision", "timm", "numpy", "filelock", "tqdm"]


def _released(name: str) -> str:
    kind = "_full.pth" if name in models_mae.MODELS else "finetuned"
    for file, released in build.RELEASED.items():
        if kind in file and released.model == name.removesuffix("_dec512d8b"):
            return released.url
    raise UserError(f"nobody released weights of {name}: give pretrained=PATH, or leave it out")


def _own_options(weights: convert.Weights, channels: dict[str, object]) -> dict[str, object]:
    """A classifier's or an encoder's weights, and what their file tells of channels -> what the builder of a Vision
    Transformer takes to hold them all.
    """
    told = {key: value for key, value in channels.items() if key == "in_chans"}
    told["num_classes"] = checkpoint.n_classes(weights)
    if told["num_classes"] or "fc_norm.weight" in weights:
        told["global_pool"] = "fc_norm.weight" in weights
    return told


def _entry(name: str, builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def entry(pretrained: bool | str = False, **options) -> nn.Module:
        if not pretrained:
            return builder(**options)
        source = build.find(_released(name) if pretrained is True else pretrained)
        if name in models_vit.MODELS:
            state = checkpoint.load(source)
            weights = convert.to_our_names(state["model"], source)
            channels = build.channels_told_by(weights, untrusted.options_of(state))
            own = _own_options(weights, channels)
            options = {key: value for key, value in options.items() if key not in own or own[key] != value}
            if options.keys() - {"img_size"}:  # a classifier that is still to be trained, with another head or noise
                model = builder(**own | options)
                checkpoint.load_pretrained(source, model)
                if channels and "in_chans" not in options:
                    model.bands = build.bands_of(channels)
                return model.eval()
        size = options.pop("img_size", None)
        if own := options.keys() - {"norm_pix_loss"}:
            raise UserError(f"{', '.join(sorted(own))}: {pretrained} decides that; leave it out, or pretrained")
        model = build.open_model(source, name, encoder_only=name in models_vit.MODELS, **options)
        if size:
            models_vit.check_divisible(size, model.patch_embed.patch_size[0])
            resample(model, size, model.patch_embed.patch_size[0])
        return model

    entry.__name__ = name
    entry.__doc__ = f"{name}(pretrained=False, **options), see above: {__doc__}"
    return entry


for _name, _builder in (models_mae.MODELS | models_vit.MODELS).items():
    globals()[_name] = _entry(_name, _builder)
