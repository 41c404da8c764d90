"""The classifier: a plain Vision Transformer for fine-tuning and linear probing (Dosovitskiy et al. 2020).

It is timm's VisionTransformer with the two ways of MAE to feed the head. Letters: N batch, L patches, D width.
"""

from collections.abc import Callable
from functools import partial

import timm.models.vision_transformer
import torch
from torch import nn

from util.errors import UserError

PROBE_EPS = 1e-6  # of the BatchNorm in front of a linear probe's head


def check_divisible(img_size: int | tuple[int, int], patch_size: int) -> None:
    """Raise UserError, naming sizes that work, unless `patch_size` divides each side of `img_size` (both in pixels)."""
    for side in (img_size,) if isinstance(img_size, int) else img_size:
        if side < patch_size or side % patch_size:
            below = max(side // patch_size, 1) * patch_size
            nearest = str(below) if side < patch_size else f"{below} or {below + patch_size}"
            raise UserError(
                f"image side {side} cannot be cut into patches of {patch_size} pixels: use a multiple of {patch_size}, "
                f"such as {nearest}"
            )


_norm_layer = partial(nn.LayerNorm, eps=1e-6)


class VisionTransformer(timm.models.vision_transformer.VisionTransformer):
    """[N, 3, H, W] -> [N, num_classes].

    `global_pool=True` feeds the head the mean of the patch tokens, class token left out, then `fc_norm`;
    False feeds it `norm` of the class token. Extra keywords go to timm's VisionTransformer.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        global_pool: bool = False,
        norm_layer: Callable[..., nn.Module] = _norm_layer,
        **timm_options,
    ) -> None:
        check_divisible(img_size, patch_size)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            global_pool="avg" if global_pool else "token",
            norm_layer=norm_layer,
            **timm_options,
        )

    def forward_features(self, imgs: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, D]: what the head sees. (timm's method of this name returns all tokens.)"""
        tokens = super().forward_features(imgs)
        return self.forward_head(tokens, pre_logits=True)

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, num_classes]: logits."""
        return self.head(self.forward_features(imgs))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are never decayed, besides all one-dimensional ones."""
        return {"pos_embed", "cls_token"}


vit_tiny_patch4 = partial(VisionTransformer, img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4)
vit_tiny_patch16 = partial(VisionTransformer, patch_size=16, embed_dim=192, depth=12, num_heads=3)
vit_small_patch16 = partial(VisionTransformer, patch_size=16, embed_dim=384, depth=12, num_heads=6)
vit_base_patch16 = partial(VisionTransformer, patch_size=16, embed_dim=768, depth=12, num_heads=12)
vit_large_patch16 = partial(VisionTransformer, patch_size=16, embed_dim=1024, depth=24, num_heads=16)
vit_huge_patch14 = partial(VisionTransformer, patch_size=14, embed_dim=1280, depth=32, num_heads=16)

MODELS = {
    "vit_tiny_patch4": vit_tiny_patch4,
    "vit_tiny_patch16": vit_tiny_patch16,
    "vit_small_patch16": vit_small_patch16,
    "vit_base_patch16": vit_base_patch16,
    "vit_large_patch16": vit_large_patch16,
    "vit_huge_patch14": vit_huge_patch14,
}
