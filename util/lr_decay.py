"""Layer-wise learning-rate decay for fine-tuning (Clark et al. 2020, ELECTRA; BEiT, Bao et al. 2021)."""

from collections.abc import Collection

from torch import nn


def param_groups_lrd(
    model: nn.Module,
    weight_decay: float = 0.05,
    no_weight_decay_list: Collection[str] = (),
    layer_decay: float = 0.75,
) -> list[dict]:
    """Model -> optimizer groups, each with `lr_scale` = layer_decay^(depth + 1 - layer) and its `weight_decay`.

    Layer 0: patch embedding, class token, positions; layer i + 1: block i; layer depth + 1 (scale 1): the rest.
    One-dimensional parameters and those of `no_weight_decay_list` are not decayed; frozen ones are left out. Order is
    that of the original's checkpoints, which know parameters by number: there `fc_norm` came after the head.
    """
    depth = len(model.blocks)
    groups: dict[tuple[int, bool], dict] = {}
    for name, param in sorted(model.named_parameters(), key=lambda named: named[0].startswith("fc_norm.")):
        if not param.requires_grad:
            continue
        layer = get_layer_id_for_vit(name, depth + 1)
        decayed = param.ndim > 1 and name not in no_weight_decay_list
        group = groups.setdefault(
            (layer, decayed),
            {
                "params": [],
                "lr_scale": layer_decay ** (depth + 1 - layer),
                "weight_decay": weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(param)
    return list(groups.values())


def get_layer_id_for_vit(name: str, num_layers: int) -> int:
    """Parameter name -> its layer: 0 patch embedding, class token, positions; i + 1 block i; `num_layers` the rest."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return num_layers
