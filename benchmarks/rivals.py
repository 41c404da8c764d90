"""What the benchmarks compare: this project's training step, and others that compute the same recipe.

Each builder returns a step: images [N, 3, H, W] on the device -> None, one update of the weights.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.layers import Attention
from timm.optim import param_groups_weight_decay
from torch import nn
from torchvision import transforms as T

import models_mae
import models_vit
from util import speed
from util.lr_decay import param_groups_lrd
from util.step import Step, autocast_dtype
from util.transforms import posterize_to_black

TrainStep = Callable[[torch.Tensor], None]


RANDAUGMENT = "rand-m9-mstd0.5-inc1"


def plain_recipe(recipe: str, side: int) -> T.Compose:
    """A library's own pipeline, with Pillow throughout: PIL image -> [3, side, side].

    `recipe`: pretrain (torchvision's transforms) or finetune (timm's, with RandAugment and random erasing).
    """
    if recipe == "finetune":
        options = {"interpolation": "bicubic", "re_prob": 0.25, "re_mode": "pixel"}
        return posterize_to_black(create_transform(side, is_training=True, auto_augment=RANDAUGMENT, **options))
    crop = T.RandomResizedCrop(side, scale=(0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    normalise = T.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), normalise])


def pretraining_step(name: str, device: torch.device, compile_: str = "auto") -> TrainStep:
    """The step of main_pretrain.py for the model `name`. `compile_`: auto, on or off."""
    model = models_mae.MODELS[name](norm_pix_loss=True).to(device)
    speed.prepare(model, compile_, False, device)
    return _pretraining_step(model, device)


def _pretraining_step(model: nn.Module, device: torch.device) -> TrainStep:
    dtype = autocast_dtype("auto", device)
    speed.choose_kernels(model, dtype, device)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=1e-4, betas=(0.9, 0.95), fused=True)
    step = Step(model, optimizer, device, dtype)

    def run(imgs: torch.Tensor) -> None:
        step(lambda: model(imgs, 0.75)[0], update=True)

    return run


def pretraining_step_compiled_whole(name: str, device: torch.device, mode: str | None = None) -> TrainStep:
    """The same, with the model compiled as one instead of block by block: slower to start. `mode`: torch.compile's."""
    model = models_mae.MODELS[name](norm_pix_loss=True).to(device)
    return _pretraining_step(torch.compile(model, mode=mode), device)


def finetuning_step(name: str, device: torch.device, compile_: str = "auto") -> TrainStep:
    """The step of main_finetune.py, with soft targets, for the classifier `name`."""
    model = models_vit.MODELS[name](num_classes=1000, drop_path_rate=0.1, global_pool=True).to(device)
    speed.prepare(model, compile_, False, device)
    dtype = autocast_dtype("auto", device)
    speed.choose_kernels(model, dtype, device)
    groups = param_groups_lrd(model, 0.05, model.no_weight_decay(), 0.75)
    step = Step(model, torch.optim.AdamW(groups, lr=1e-4, fused=True), device, dtype)

    def run(imgs: torch.Tensor) -> None:
        targets = torch.full((len(imgs), 1000), 1e-3, device=device)
        step(lambda: F.cross_entropy(model(imgs).float(), targets), update=True)

    return run


class _EmbedsAll(models_mae.MaskedAutoencoderViT):
    """The same autoencoder, which embeds all patches and then drops the removed ones."""

    def forward_encoder(self, imgs, mask_ratio, noise=None):
        tokens = self.patch_embed(imgs) + self.pos_embed[:, 1:]
        kept, mask, ids_restore = self.random_masking(tokens, mask_ratio, noise)
        return self._encode_tokens(kept), mask, ids_restore


def as_the_original_trains(name: str, device: torch.device) -> TrainStep:
    """The habits of the original training loop, on today's torch, for an autoencoder or a classifier.

    Eager; fp16 with loss scaling (on the CPU, which has no fast fp16: bf16); attention that writes out its matrix; all
    patches embedded; AdamW as torch builds it; the host waits three times a step: for the loss, for the scaler's
    verdict and for the device.
    """
    if name in models_mae.MODELS:
        model = models_mae.MODELS[name](norm_pix_loss=True)
        model.__class__ = _EmbedsAll
        groups = param_groups_weight_decay(model, 0.05)
    else:
        model = models_vit.MODELS[name](num_classes=1000, drop_path_rate=0.1, global_pool=True)
        groups = param_groups_lrd(model, 0.05, model.no_weight_decay(), 0.75)
    model.to(device)
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = False
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def run(imgs: torch.Tensor) -> None:
        with torch.autocast(device.type, dtype=dtype):
            if name in models_mae.MODELS:
                loss, _, _ = model(imgs, mask_ratio=0.75)
            else:
                targets = torch.full((len(imgs), 1000), 1e-3, device=device)
                loss = F.cross_entropy(model(imgs).float(), targets)
        loss.item()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def hugging_face_step(name: str, device: torch.device, compile_: bool) -> TrainStep:
    """transformers' ViTMAEForPreTraining of the same size: sdpa, bf16, fused AdamW, compiled as a whole if asked."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    ours = models_mae.MODELS[name]()
    width, depth = ours.pos_embed.shape[-1], len(ours.blocks)
    decoder_width = ours.decoder_pos_embed.shape[-1]
    config = ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=ours.blocks[0].attn.num_heads,
        intermediate_size=4 * width,
        image_size=ours.patch_embed.img_size[0],
        patch_size=ours.patch_embed.patch_size[0],
        decoder_hidden_size=decoder_width,
        decoder_num_hidden_layers=len(ours.decoder_blocks),
        decoder_num_attention_heads=ours.decoder_blocks[0].attn.num_heads,
        decoder_intermediate_size=4 * decoder_width,
        norm_pix_loss=True,
        attn_implementation="sdpa",
    )
    del ours
    model: nn.Module = ViTMAEForPreTraining(config).to(device)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=1e-4, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if compile_ else model

    def run(imgs: torch.Tensor) -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = forward(imgs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run
