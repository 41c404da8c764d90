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


def check_decoder(width: int, num_heads: int) -> None:
    """Raise UserError unless a decoder may be so wide, with so many heads."""
    if width % num_heads or width % 4:
        raise UserError(
            f"a decoder {width} wide cannot have {num_heads} heads: choose --decoder_width, a multiple of 4 (of sine "
            "and cosine in two directions), and --decoder_heads, which divide it"
        )


_norm_layer = partial(nn.LayerNorm, eps=1e-6)
_TIMM_S_WORD = {True: "avg", False: "token"}


class VisionTransformer(timm.models.vision_transformer.VisionTransformer):
    """[N, C, H, W] -> [N, num_classes].

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
        if global_pool not in (True, False):
            raise UserError(f"global_pool {global_pool!r} is not known: use True (patch tokens) or False (class token)")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            global_pool=_TIMM_S_WORD[global_pool],
            norm_layer=norm_layer,
            **timm_options,
        )
        # timm keeps its text here; the original a bool, which subclasses ask for in their own `forward_features`
        self.global_pool = bool(global_pool)

    def init_weights(self, *mode, **timm_options) -> None:
        """timm's, but for a class token of std 0.02, as the positions have and as the original's had (timm's today:
        1e-6). It matters where nothing pretrained is loaded.
        """
        super().init_weights(*mode, **timm_options)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward_features(self, imgs: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, D]: what the head sees. (timm's method of this name returns all tokens.)"""
        tokens = super().forward_features(imgs)  # timm's: embedding, blocks, `norm`
        # in pretraining the class token is a dummy; fine-tuned, it and the mean do equally well (paper, appendix A.1).
        # The class token is normalised before and the mean afterwards: the other norm is an identity
        pooled = self.pool(tokens, "avg" if self.global_pool else "token")
        return self.head_drop(self.fc_norm(pooled))

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, num_classes]: logits."""
        return self.head(self.forward_features(imgs))

    def encode(self, imgs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, C, H, W] -> (class token [N, D], patch map [N, D, H/P, W/P]): as the autoencoder's.

        Each token has passed the one final norm that the model has: `norm`, or with global pool `fc_norm`, which was
        trained on the mean of the patch tokens (that mean itself, normalised, is what `forward_features` returns).
        """
        tokens = self.fc_norm(super().forward_features(imgs))
        patches = tokens[:, self.num_prefix_tokens :]
        return tokens[:, 0], patches.transpose(1, 2).unflatten(2, self.patch_embed.grid_size)

    def pool(self, tokens: torch.Tensor, pool_type: str | None = None) -> torch.Tensor:
        """[N, T, D] -> [N, D]: timm's, which without `pool_type` would look for its own word in `global_pool`."""
        return super().pool(tokens, _TIMM_S_WORD[self.global_pool] if pool_type is None else pool_type)

    def reset_classifier(self, num_classes: int, global_pool: str | bool | None = None) -> None:
        """Another head, of `num_classes`; 0 takes it away. Pooling stays as the model was built: it decides which norm
        has weights. Raises UserError where `global_pool` asks for another ('' asks for none).
        """
        if global_pool not in (None, "", self.global_pool, _TIMM_S_WORD[self.global_pool]):
            raise UserError(
                f"global_pool {global_pool!r} is not how this model was built: build VisionTransformer(global_pool=…) "
                "anew, and load the weights that fit"
            )
        super().reset_classifier(num_classes)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are never decayed, besides all one-dimensional ones."""
        return {"pos_embed", "cls_token"}


def freeze_all_but_last(model: VisionTransformer, n_blocks: float) -> None:
    """Partial fine-tuning (paper, section 4.3): train the last `n_blocks` blocks, the norm behind them and the head.

    0.5: instead of blocks the MLP half of the last one; 0: the head alone. All else gets no gradient, and no stochastic
    depth: noise is for what learns. In front of the first trained part autograd keeps nothing. Raises UserError where
    the model has fewer blocks.
    """
    depth = len(model.blocks)
    if n_blocks > depth:
        raise UserError(f"--tune_blocks {n_blocks}: the model has {depth} blocks. Choose 0 to {depth}, 0.5 or all")
    model.requires_grad_(False)
    last = model.blocks[-1]
    half = [last.norm2, last.mlp, last.ls2] if n_blocks == 0.5 else []
    behind = [model.norm, model.fc_norm] if n_blocks else []
    for part in (*model.blocks[depth - int(n_blocks) :], *half, *behind, model.head):
        part.requires_grad_(True)
    for block in model.blocks[: depth - int(n_blocks)]:
        block.drop_path1 = nn.Identity()
        if block is not last or not half:
            block.drop_path2 = nn.Identity()


vit_tiny_patch4 = partial(VisionTransformer, img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4)
vit_tiny_patch8 = partial(VisionTransformer, img_size=96, patch_size=8, embed_dim=64, depth=4, num_heads=4)
vit_tiny_patch16 = partial(VisionTransformer, patch_size=16, embed_dim=192, depth=12, num_heads=3)
vit_small_patch16 = partial(VisionTransformer, patch_size=16, embed_dim=384, depth=12, num_heads=6)
vit_base_patch16 = partial(VisionTransformer, patch_size=16, embed_dim=768, depth=12, num_heads=12)
vit_large_patch16 = partial(VisionTransformer, patch_size=16, embed_dim=1024, depth=24, num_heads=16)
vit_huge_patch14 = partial(VisionTransformer, patch_size=14, embed_dim=1280, depth=32, num_heads=16)
vit_2b_patch14 = partial(VisionTransformer, patch_size=14, embed_dim=2560, depth=24, num_heads=32)
vit_6b_patch14 = partial(VisionTransformer, patch_size=14, embed_dim=4096, depth=32, num_heads=32)

# --model NAME -> builder: every one above
MODELS = {name: builder for name, builder in globals().items() if name.startswith("vit_")}
