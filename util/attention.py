"""Where an encoder looks: attention of its last block."""

import torch
from torch import nn


@torch.no_grad()
def class_attention(model: nn.Module, imgs: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] -> [N, heads, h, w]: the share of the class token's attention that each patch gets, in the last
    block, over the whole image. What is missing to 1 goes to the class token itself.

    `model` is a masked autoencoder or a classifier of this project (it has `encode`).
    """
    attention = model.blocks[-1].attn
    inputs: list[torch.Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        model.encode(imgs)
    finally:
        hook.remove()
    qkv = attention.qkv(inputs[0]).unflatten(2, (3, attention.num_heads, -1))
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)  # each [N, heads, 1 + L, D / heads]
    logits = query[:, :, :1] @ key.transpose(2, 3) * attention.scale
    return logits.softmax(dim=-1)[:, :, 0, 1:].unflatten(2, model.patch_embed.grid_size)
