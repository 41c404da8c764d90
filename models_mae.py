"""The masked autoencoder (He et al. 2021, arXiv 2111.06377): mask patches, encode the rest, decode pixels.

Letters: N batch, L patches per image, P patch side in pixels, K kept patches, D encoder width, D' decoder width.
In every mask 1 means removed and 0 kept.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, PatchEmbed
from torch import nn
from torch.utils.checkpoint import checkpoint

from models_vit import check_divisible
from util.errors import UserError
from util.pos_embed import get_2d_sincos_pos_embed


def kept_patches(num_patches: int, mask_ratio: float) -> int:
    """(L, ratio) -> K = floor(L * (1 - ratio)), with a slack of 1e-6 patches for rounding: 100 at ratio 0.9 keep 10,
    although 100 * (1 - 0.9) < 10 in floating point.

    Raises UserError where no patch would be kept, or the ratio is not in [0, 1).
    """
    if not 0 <= mask_ratio < 1:
        raise UserError(f"mask_ratio {mask_ratio} is not a share of patches to remove: choose 0 < mask_ratio < 1")
    kept = math.floor(num_patches * (1 - mask_ratio) + 1e-6)
    if kept == 0:
        raise UserError(
            f"mask_ratio {mask_ratio} keeps none of {num_patches} patches, so the encoder would see nothing: "
            f"choose at most {math.floor(10**4 * (1 - 1 / num_patches)) / 10**4}"
        )
    return kept


def check_mask_ratio(num_patches: int, mask_ratio: float) -> None:
    """Raise UserError where the ratio keeps none of the patches, or removes none: the loss would be 0/0."""
    if kept_patches(num_patches, mask_ratio) == num_patches:
        raise UserError(
            f"mask_ratio {mask_ratio} removes none of {num_patches} patches, so there is nothing to predict: "
            f"choose at least {math.ceil(10**4 / num_patches) / 10**4}"
        )


def _take(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """([N or 1, L, D], ids [N, M]) -> [N, M, D]: the tokens of these indices."""
    return tokens.expand(ids.shape[0], -1, -1).gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


class MaskedAutoencoderViT(nn.Module):
    """[N, in_chans, H, W] -> (loss, pred [N, L, P*P*in_chans], mask [N, L]).

    An asymmetric autoencoder: the encoder sees the kept patches alone, a light decoder sees all positions (paper,
    section 3). `img_size` and `patch_size` are in pixels; `img_size` is one number or (height, width).
    `norm_pix_loss` takes each patch, normalised by its own mean and deviation, as the target.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        norm_pix_loss: bool = False,
    ) -> None:
        super().__init__()
        check_divisible(img_size, patch_size)
        self.in_chans = in_chans
        self.norm_pix_loss = norm_pix_loss
        self.grad_checkpointing = False

        # encoder
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        length = 1 + self.patch_embed.num_patches  # the class token comes first
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, length, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth)
        )
        self.norm = norm_layer(embed_dim)

        # decoder
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, length, decoder_embed_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)

        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Positions: fixed sin-cos. Tokens: normal, std 0.02. Projections: Xavier uniform (paper, appendix A.1)."""
        for pos_embed in (self.pos_embed, self.decoder_pos_embed):
            table = get_2d_sincos_pos_embed(pos_embed.shape[-1], self.patch_embed.grid_size, cls_token=True)
            pos_embed.data.copy_(torch.from_numpy(table).unsqueeze(0))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # the patch projection is a Linear in disguise: one row per output, one column per pixel of a patch
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))

    def patchify(self, imgs: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, L, P*P*C]; inside a patch: row, column, channel."""
        if tuple(imgs.shape[2:]) != tuple(self.patch_embed.img_size):
            raise UserError(
                f"images of {tuple(imgs.shape[2:])} pixels, but the model has img_size {self.patch_embed.img_size}"
            )
        (p, _), (h, w) = self.patch_embed.patch_size, self.patch_embed.grid_size
        patches = imgs.reshape(imgs.shape[0], self.in_chans, h, p, w, p)
        return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        """[N, L, P*P*C] -> [N, C, H, W]: the inverse of `patchify`."""
        (p, _), (h, w) = self.patch_embed.patch_size, self.patch_embed.grid_size
        grid = patches.reshape(patches.shape[0], h, w, p, p, self.in_chans)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], self.in_chans, h * p, w * p)

    def random_masking(
        self, n: int, mask_ratio: float, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """N -> (indices of kept patches [N, K], of removed patches [N, L - K]), both in order of noise.

        The K patches of least `noise` [N, L] are kept; None draws it uniformly in [0, 1) (paper, section 3, "Masking").
        """
        length = self.patch_embed.num_patches
        k = kept_patches(length, mask_ratio)
        if noise is None:
            noise = torch.rand(n, length, device=self.pos_embed.device)
        ids_shuffle = noise.argsort(dim=1)
        return ids_shuffle[:, :k], ids_shuffle[:, k:]

    def forward_encoder(
        self, imgs: torch.Tensor, mask_ratio: float, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[N, C, H, W] -> (latent [N, 1 + K, D], mask [N, L], ids_restore [N, L]). mask_ratio 0 keeps all patches.

        `ids_restore` puts (kept, removed) back into image order.
        """
        ids_kept, ids_removed = self.random_masking(imgs.shape[0], mask_ratio, noise)
        ids_restore = torch.cat([ids_kept, ids_removed], dim=1).argsort(dim=1)
        mask = (ids_restore >= ids_kept.shape[1]).float()
        # only kept patches are embedded: the convolution as a matrix product, over pixels in the order of `patchify`
        kept = _take(self.patchify(imgs), ids_kept)
        projection = self.patch_embed.proj
        tokens = F.linear(kept, projection.weight.permute(0, 2, 3, 1).flatten(1), projection.bias)
        return self._encode_tokens(tokens + _take(self.pos_embed[:, 1:], ids_kept)), mask, ids_restore

    def _encode_tokens(self, patches: torch.Tensor) -> torch.Tensor:
        """[N, K, D] -> [N, 1 + K, D]: prepend the class token, then blocks and norm."""
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(patches.shape[0], -1, -1)
        tokens = torch.cat([cls_token, patches], dim=1)
        return self.norm(self._run(self.blocks, tokens))

    def _run(self, blocks: nn.ModuleList, tokens: torch.Tensor) -> torch.Tensor:
        """[N, T, D] -> [N, T, D] through all blocks; with `grad_checkpointing` backward computes each block again."""
        for block in blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return tokens

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for backward: less memory for about a third more arithmetic. As in timm."""
        self.grad_checkpointing = enable

    def encode(self, imgs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, C, H, W] -> (class token [N, D], patch map [N, D, H/P, W/P]): features of whole images, no mask."""
        latent = self._encode_tokens(self.patch_embed(imgs) + self.pos_embed[:, 1:])
        return latent[:, 0], latent[:, 1:].transpose(1, 2).unflatten(2, self.patch_embed.grid_size)

    def forward_decoder(
        self, latent: torch.Tensor, ids_restore: torch.Tensor, only: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(latent [N, 1 + K, D], ids_restore [N, L]) -> pred [N, L, P*P*C], or of patches `only` [N, M]."""
        tokens = self.decoder_embed(latent)
        n, length = ids_restore.shape
        cls_token, kept = tokens[:, :1], tokens[:, 1:]
        removed = self.mask_token.to(kept.dtype).expand(n, length - kept.shape[1], -1)
        patches = _take(torch.cat([kept, removed], dim=1), ids_restore)
        tokens = torch.cat([cls_token, patches], dim=1) + self.decoder_pos_embed
        patches = self._run(self.decoder_blocks, tokens)[:, 1:]
        if only is not None:
            patches = _take(patches, only)
        return self.decoder_pred(self.decoder_norm(patches))

    def target(self, patches: torch.Tensor) -> torch.Tensor:
        """[..., P*P*C] -> [..., P*P*C]: what is to be predicted, with `norm_pix_loss` normalised per patch."""
        if not self.norm_pix_loss:
            return patches
        mean, var = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
        return (patches - mean) / (var + 1e-6).sqrt()

    def forward_loss(
        self, imgs: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor, only: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(imgs [N, C, H, W], pred [N, L, P*P*C], mask [N, L]) -> scalar, float32: mean squared error per patch,
        averaged over removed patches only (paper, section 3, "Reconstruction target").

        With `only` [N, M], indices of patches, `pred` [N, M, P*P*C] and the mask are of these.
        """
        target = self.patchify(imgs)
        if only is not None:
            target, mask = _take(target, only), mask.gather(1, only)
        error_per_patch = (pred.float() - self.target(target.float())).square().mean(dim=-1)
        return (error_per_patch * mask).sum() / mask.sum()

    def forward(
        self,
        imgs: torch.Tensor,
        mask_ratio: float = 0.75,
        noise: torch.Tensor | None = None,
        loss_only: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | torch.Tensor:
        """[N, C, H, W] -> (loss scalar, pred [N, L, P*P*C], mask [N, L]). `noise` [N, L] in [0, 1) decides the mask.

        With `loss_only` just the loss, computed for removed patches alone (for all of them in a subclass that overrides
        forward_decoder or forward_loss). Raises UserError where the ratio removes no patch
        (the loss would be 0/0) or keeps none.
        """
        check_mask_ratio(self.patch_embed.num_patches, mask_ratio)
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise)
        own = type(self).forward_decoder, type(self).forward_loss
        if loss_only and own == (MaskedAutoencoderViT.forward_decoder, MaskedAutoencoderViT.forward_loss):
            removed = ids_restore.argsort(dim=1)[:, latent.shape[1] - 1 :]
            pred = self.forward_decoder(latent, ids_restore, removed)
            return self.forward_loss(imgs, pred, mask, removed)
        pred = self.forward_decoder(latent, ids_restore)
        loss = self.forward_loss(imgs, pred, mask)
        return loss if loss_only else (loss, pred, mask)


_mae = partial(MaskedAutoencoderViT, norm_layer=partial(nn.LayerNorm, eps=1e-6))
# the decoder of the patch-4 model is as small as its encoder; all others have the paper's: 512 wide, 8 blocks
_tiny_decoder = {"decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 4}
mae_vit_tiny_patch4 = partial(_mae, img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4, **_tiny_decoder)
mae_vit_tiny_patch16 = partial(_mae, patch_size=16, embed_dim=192, depth=12, num_heads=3)
mae_vit_small_patch16 = partial(_mae, patch_size=16, embed_dim=384, depth=12, num_heads=6)
mae_vit_base_patch16 = mae_vit_base_patch16_dec512d8b = partial(
    _mae, patch_size=16, embed_dim=768, depth=12, num_heads=12
)
mae_vit_large_patch16 = mae_vit_large_patch16_dec512d8b = partial(
    _mae, patch_size=16, embed_dim=1024, depth=24, num_heads=16
)
mae_vit_huge_patch14 = mae_vit_huge_patch14_dec512d8b = partial(
    _mae, patch_size=14, embed_dim=1280, depth=32, num_heads=16
)

MODELS = {
    "mae_vit_tiny_patch4": mae_vit_tiny_patch4,
    "mae_vit_tiny_patch16": mae_vit_tiny_patch16,
    "mae_vit_small_patch16": mae_vit_small_patch16,
    "mae_vit_base_patch16": mae_vit_base_patch16,
    "mae_vit_large_patch16": mae_vit_large_patch16,
    "mae_vit_huge_patch14": mae_vit_huge_patch14,
    "mae_vit_base_patch16_dec512d8b": mae_vit_base_patch16_dec512d8b,
    "mae_vit_large_patch16_dec512d8b": mae_vit_large_patch16_dec512d8b,
    "mae_vit_huge_patch14_dec512d8b": mae_vit_huge_patch14_dec512d8b,
}
