"""The masked autoencoder (He et al. 2021, arXiv 2111.06377): mask patches, encode the rest, decode pixels.

Letters: N batch, C channels, L patches per image, P patch side in pixels, K kept patches, D encoder width. In every
mask 1 means removed and 0 kept. Each method may be overridden by the signature of its required arguments alone, as the
original's: `noise` is handed on only where the caller gave one, and always by position.
"""

from collections.abc import Callable
from functools import partial
from numbers import Real

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, PatchEmbed
from torch import nn
from torch.utils.checkpoint import checkpoint

from models_vit import check_decoder, check_divisible
from util import masks, targets
from util.errors import UserError
from util.masks import check_mask_ratio, kept_patches
from util.pos_embed import get_2d_sincos_pos_embed


def _take(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """([N or 1, L, D], ids [N, M]) -> [N, M, D]: the tokens of these indices."""
    return tokens.expand(ids.shape[0], -1, -1).gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


class MaskedAutoencoderViT(nn.Module):
    """[N, C, H, W] -> (loss, pred [N, L, outputs], mask [N, L]).

    An asymmetric autoencoder: the encoder sees the kept patches alone, a light decoder sees all positions (paper,
    section 3). `img_size` and `patch_size` are in pixels; `img_size` is one number or (height, width). Outputs for a
    patch are its P*P*C pixels, unless `set_target` says otherwise. `mask_noise` (a function of util/masks.py) and
    `norm_pix_loss` (see util/targets.py) may be set at any time.
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
        encoder_mask_tokens: bool = False,
    ) -> None:
        super().__init__()
        check_divisible(img_size, patch_size)
        check_decoder(decoder_embed_dim, decoder_num_heads)
        self.in_chans = in_chans
        self.norm_pix_loss = norm_pix_loss
        self.decoder_target = targets.pixel
        self.encoder_mask_tokens = encoder_mask_tokens
        self.mask_noise = masks.random
        self.grad_checkpointing = False

        # encoder: a plain ViT. The class token is a dummy, for classifiers that want one (paper, appendix A.1)
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        length = 1 + self.patch_embed.num_patches  # the class token comes first
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        # sin-cos positions, fixed (appendix A.1); parameters all the same, since released files hold them
        self.pos_embed = nn.Parameter(torch.zeros(1, length, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth)
        )
        self.norm = norm_layer(embed_dim)

        # decoder: only pretraining needs it, so its design is free. With 8 blocks the encoder's features suit a linear
        # probe best (table 1a); 512 wide it takes less than a tenth of ViT-L's arithmetic a token ("MAE decoder")
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        # one vector for all removed patches: only its position tells the decoder which of them to predict
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim if encoder_mask_tokens else decoder_embed_dim))
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
        # norms start as torch has them, at 1 and 0
        self.apply(self._init_weights)
        # the patch projection is a Linear in disguise: one row per output, one column per pixel of a patch
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)  # as ViT's official code
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def patchify(self, imgs: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, L, P*P*C]; inside a patch: row, column, channel. What the loss compares with."""
        return self._cut(imgs)

    def _cut(self, imgs: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, L, P*P*C]. Raises UserError for images of another size than the model's."""
        # apart from `patchify`, so that who changes the target there does not change what the encoder sees; and no
        # convolution, so that pixels can be left out before they cost anything
        n, c, height, width = imgs.shape
        if (height, width) != (size := tuple(self.patch_embed.img_size)):
            raise UserError(f"images of {(height, width)} pixels, but the model has img_size {size}")
        p = self.patch_embed.patch_size[0]
        patches = imgs.reshape(n, c, height // p, p, width // p, p)
        return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        """[N, L, P*P*C] -> [N, C, H, W]: the inverse of `patchify`."""
        p, (height, width) = self.patch_embed.patch_size[0], self.patch_embed.img_size
        grid = patches.unflatten(2, (p, p, -1)).unflatten(1, (height // p, width // p))
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def random_masking(
        self, x: torch.Tensor, mask_ratio: float, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [N, L, any] -> (x_masked [N, K, any], mask [N, L], ids_restore [N, L]); `ids_restore` puts (kept, removed)
        back into image order. The K patches of least `noise` [N, L] are kept, in its order; None asks `mask_noise`.
        """
        n, length, _ = x.shape
        k = kept_patches(length, mask_ratio)  # before anything is drawn: it refuses ratios that keep nothing
        if noise is None:
            grid = getattr(self.patch_embed, "grid_size", None)
            if grid is None or grid[0] * grid[1] != length:  # tokens that a subclass made in its way: they lie in a row
                grid = (1, length)
            noise = self.mask_noise(n, grid, mask_ratio, x.device)
        # a shuffle, of which the head is kept: the same number for each image, so that a batch stays one dense tensor
        # and needs no sparse operation (section 3, "Simple implementation")
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        return _take(x, ids_shuffle[:, :k]), (ids_restore >= k).float(), ids_restore

    def forward_encoder(
        self, imgs: torch.Tensor, mask_ratio: float, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[N, C, H, W] -> (latent [N, 1 + K, D], mask [N, L], ids_restore [N, L]). mask_ratio 0 keeps all patches.

        With `encoder_mask_tokens` the latent has all 1 + L tokens, in image order.
        """
        given, projection = () if noise is None else (noise,), self.patch_embed.proj
        if imgs.shape[1] != (channels := getattr(projection, "in_channels", imgs.shape[1])):
            raise UserError(f"images of {imgs.shape[1]} channels, but the model has in_chans {channels}")
        kept, mask, ids_restore = self.random_masking(self._cut(imgs), mask_ratio, *given)
        # masked as pixels, so that only kept patches are embedded: the convolution, whose stride is its size, as a
        # matrix product
        tokens = F.linear(kept, projection.weight.permute(0, 2, 3, 1).flatten(1), projection.bias)
        tokens = getattr(self.patch_embed, "norm", nn.Identity())(tokens)  # none, unless a subclass has put one there
        if self.encoder_mask_tokens:  # 3.3 times the arithmetic, and 14 points less in linear probing (table 1c)
            return self._encode_tokens(self._restore(tokens, ids_restore) + self.pos_embed[:, 1:]), mask, ids_restore
        # where they came from is read off `ids_restore`, which every `random_masking` has to return
        ids_kept = ids_restore.argsort(dim=1)[:, : tokens.shape[1]]
        return self._encode_tokens(tokens + _take(self.pos_embed[:, 1:], ids_kept)), mask, ids_restore

    def _encode_tokens(self, patches: torch.Tensor) -> torch.Tensor:
        """[N, K, D] -> [N, 1 + K, D]: prepend the class token, which is never masked, then blocks and norm."""
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(patches.shape[0], -1, -1)
        return self.norm(self._run(self.blocks, torch.cat([cls_token, patches], dim=1)))

    def _run(self, blocks: nn.ModuleList, tokens: torch.Tensor) -> torch.Tensor:
        """[N, T, D] -> [N, T, D] through all blocks; with `grad_checkpointing` backward computes each block again."""
        for block in blocks:  # one by one, since --compile compiles each by itself
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
        # what pretraining is for: images without a mask. The encoder has never seen a mask token, so it does not miss
        # them here (table 1c)
        latent = self._encode_tokens(self.patch_embed(imgs) + self.pos_embed[:, 1:])
        return latent[:, 0], latent[:, 1:].transpose(1, 2).unflatten(2, self.patch_embed.grid_size)

    def forward_decoder(self, latent: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
        """(latent [N, 1 + K, D], ids_restore [N, L]) -> pred [N, L, outputs]."""
        tokens = self.decoder_embed(latent)
        cls_token, patches = tokens[:, :1], tokens[:, 1:]
        if not self.encoder_mask_tokens:
            patches = self._restore(patches, ids_restore)
        tokens = torch.cat([cls_token, patches], dim=1) + self.decoder_pos_embed
        # kept patches are predicted too, though the loss leaves them out: pictures show them, and leaving them out
        # would save 0.2 % of the arithmetic
        return self.decoder_pred(self.decoder_norm(self._run(self.decoder_blocks, tokens)[:, 1:]))

    def _restore(self, kept: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
        """(kept [N, K, any], ids_restore [N, L]) -> [N, L, any]: back in image order, so that each token gets the
        position of its own place, with the mask token where patches were removed.
        """
        n, length = ids_restore.shape
        removed = self.mask_token.to(kept.dtype).expand(n, length - kept.shape[1], -1)
        return _take(torch.cat([kept, removed], dim=1), ids_restore)

    def set_target(self, target: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Let the decoder predict `target` (see util/targets.py), with a new last layer where it has other outputs."""
        self.decoder_target = target
        if hasattr(target, "n_outputs") and target.n_outputs != self.decoder_pred.out_features:
            self.decoder_pred = nn.Linear(self.decoder_pred.in_features, target.n_outputs)
            self._init_weights(self.decoder_pred)

    def target(self, patches: torch.Tensor) -> torch.Tensor:
        """[N, L, P*P*C] -> what is to be predicted: numbers [N, L, outputs], or ids [N, L] of `outputs` kinds."""
        return targets.norm(patches) if self.norm_pix_loss else self.decoder_target(patches)

    def forward_loss(self, imgs: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(imgs [N, C, H, W], pred [N, L, outputs], mask [N, L]) -> scalar, float32: mean squared error per patch, for
        ids cross-entropy, averaged over removed patches (paper, section 3, "Reconstruction target").
        """
        # float32 whatever the rest computes in: bf16 has 8 bits, fp16 overflows at 65504
        target = self.target(self.patchify(imgs).float())
        if target.is_floating_point():
            error_per_patch = (pred.float() - target).square().mean(dim=-1)
        else:
            error_per_patch = F.cross_entropy(pred.float().mT, target.long(), reduction="none")
        # over removed patches alone, because the result is better: by about 0.5 points (section 3, footnote 1)
        return (error_per_patch * mask).sum() / mask.sum()

    def forward(
        self, imgs: torch.Tensor, mask_ratio: float = 0.75, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[N, C, H, W] -> (loss scalar, pred [N, L, outputs], mask [N, L]). `noise` [N, L] in [0, 1) decides the mask.

        Training uses this loss. Raises UserError where the ratio keeps no patch, or removes none.
        """
        # three quarters: fine-tuning and linear probing both do well there (figure 5). Where less is removed, what is
        # missing can be continued from its neighbours (section 3, "Masking"), and the encoder has more to compute
        given = () if noise is None else (noise,)
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, *given)
        pred = self.forward_decoder(latent, ids_restore)
        loss = self.forward_loss(imgs, pred, mask)
        # Nothing removed is a loss of 0/0, unless an override masks or judges by rules of its own: so the outcome is
        # asked, not the ratio. That makes the host wait for the device: only where the ratio gives reason to
        length = self.patch_embed.num_patches
        if isinstance(mask_ratio, Real) and mask_ratio * length < 1 and not mask.any() and loss.isnan():
            check_mask_ratio(length, mask_ratio)
        return loss, pred, mask


# 1e-6 as ViT's official code; torch's own is 1e-5, which released weights would feel
_mae = partial(MaskedAutoencoderViT, norm_layer=partial(nn.LayerNorm, eps=1e-6))
# base to huge are ViT's sizes (Dosovitskiy et al. 2020, table 1), 2b and 6b those of MAWS (Singh et al. 2023), whose
# files are called 2b14 and 6.5b14. The decoder: 512 wide, 8 blocks, or tiny
_tiny_decoder = {"decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 4}
mae_vit_tiny_patch4 = partial(_mae, img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4, **_tiny_decoder)
mae_vit_tiny_patch8 = partial(_mae, img_size=96, patch_size=8, embed_dim=64, depth=4, num_heads=4, **_tiny_decoder)
mae_vit_tiny_patch16 = partial(_mae, patch_size=16, embed_dim=192, depth=12, num_heads=3)
mae_vit_small_patch16 = partial(_mae, patch_size=16, embed_dim=384, depth=12, num_heads=6)
mae_vit_base_patch16 = partial(_mae, patch_size=16, embed_dim=768, depth=12, num_heads=12)
mae_vit_large_patch16 = partial(_mae, patch_size=16, embed_dim=1024, depth=24, num_heads=16)
mae_vit_huge_patch14 = partial(_mae, patch_size=14, embed_dim=1280, depth=32, num_heads=16)
mae_vit_2b_patch14 = partial(_mae, patch_size=14, embed_dim=2560, depth=24, num_heads=32)
mae_vit_6b_patch14 = partial(_mae, patch_size=14, embed_dim=4096, depth=32, num_heads=32)
# the same three under the original's long names
mae_vit_base_patch16_dec512d8b = mae_vit_base_patch16
mae_vit_large_patch16_dec512d8b = mae_vit_large_patch16
mae_vit_huge_patch14_dec512d8b = mae_vit_huge_patch14

# --model NAME -> builder: every one above
MODELS = {name: builder for name, builder in globals().items() if name.startswith("mae_vit_")}
