"""Arithmetic of the models: multiply-adds of matrix products per image, and the peak rate of known cards.

Letters: D width, L tokens. One multiply-add is 2 operations; backward costs twice the forward pass.
"""

import re
from dataclasses import dataclass

import torch
from torch import nn

from util.dist import Dist

# dense bf16/fp16 matrix rate in TFLOP/s by the vendors' datasheets; the first whose words the device's name contains
PEAK_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "V100": 125,
    "T4": 65,
}


def block_macs(tokens: int, width: int, mlp_ratio: float = 4.0) -> float:
    """Multiply-adds of one transformer block: qkv, output and MLP projections, and the two products of attention."""
    projections = (4 + 2 * mlp_ratio) * width**2 * tokens
    attention = 2 * tokens**2 * width
    return projections + attention


def pretrain_macs(model: nn.Module, n_kept: int) -> tuple[float, float, float]:
    """MaskedAutoencoderViT -> forward multiply-adds per image of (patch embedding, encoder, decoder).

    Counts what the method needs, so that a share of the peak compares implementations: all patches embedded and
    predicted, 1 + K tokens encoded (1 + L where the encoder has mask tokens), 1 + L decoded.
    """
    n_patches, width = model.patch_embed.num_patches, model.pos_embed.shape[-1]
    pixels, outputs = model.patch_embed.proj.weight[0].numel(), model.decoder_pred.out_features
    decoder_width = model.decoder_pos_embed.shape[-1]
    kept = 1 + (n_patches if getattr(model, "encoder_mask_tokens", False) else n_kept)
    encoder = len(model.blocks) * block_macs(kept, width)
    decoder = len(model.decoder_blocks) * block_macs(1 + n_patches, decoder_width)
    ends = kept * width * decoder_width + n_patches * decoder_width * outputs
    return n_patches * pixels * width, encoder, decoder + ends


def classifier_macs(model: nn.Module) -> float:
    """VisionTransformer -> forward multiply-adds per image."""
    n_patches, width = model.patch_embed.num_patches, model.pos_embed.shape[-1]
    pixels = model.patch_embed.proj.weight[0].numel()
    return n_patches * pixels * width + len(model.blocks) * block_macs(1 + n_patches, width)


def frozen_share(model: nn.Module) -> float:
    """VisionTransformer -> share of its blocks that is not trained, and has no backward pass, counted in weights."""
    weights = [param for param in model.blocks.parameters() if param.ndim > 1]
    return 1 - sum(param.numel() for param in weights if param.requires_grad) / sum(map(torch.numel, weights))


@dataclass(frozen=True)
class Throughput:
    """What turns the seconds of a step into rates: images per step and peak over all devices, operations per image."""

    images_per_step: int
    flops_per_image: float
    peak_flops: float | None = None

    def rates(self, step_seconds: float) -> dict[str, float]:
        """`images_per_second` and, where the peak is known, `mfu`: the share of it that the model's arithmetic took."""
        images_per_second = self.images_per_step / step_seconds
        if self.peak_flops is None:
            return {"images_per_second": images_per_second}
        mfu = images_per_second * self.flops_per_image / self.peak_flops
        return {"images_per_second": images_per_second, "mfu": mfu}


def throughput(
    forward_macs: float, images_per_step: int, env: Dist, peak_tflops: float | None, frozen: float = 0
) -> Throughput:
    """What a log needs to show images/s and utilisation. `peak_tflops` is of one device; None looks the card up.

    `frozen`: share of the arithmetic that has no backward pass.
    """
    if peak_tflops is None and env.device.type == "cuda":
        name = torch.cuda.get_device_name(env.device)
        peak_tflops = next((rate for known, rate in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)
    peak_flops = None if peak_tflops is None else peak_tflops * 1e12 * env.world_size
    return Throughput(images_per_step, (6 - 4 * frozen) * forward_macs, peak_flops)
