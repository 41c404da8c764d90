"""The rows of the paper's tables and figures, as options of the scripts; beside each what the paper publishes.

He et al. 2021, arXiv 2111.06377: ViT-L, 800 epochs, raw pixels, ImageNet-1K top-1 in % unless said. Its figures 5, 7
and 9 print their values as pictures: here stand those that its text and tables name, None for the others.
"""

from dataclasses import dataclass, field

Options = dict[str, str]  # name without dashes -> values as in a shell, "" for a flag


def options(text: str) -> Options:
    """ "--mask grid --norm_pix_loss" -> {"mask": "grid", "norm_pix_loss": ""}."""
    words = [part.split(maxsplit=1) for part in f" {text}".split(" --")[1:]]
    return {name: "".join(value).strip() for name, *value in words}


@dataclass(frozen=True)
class Scale:
    """What all rows of a scale share, by script. `effective_batch` is no option: stages.py makes --accum_iter of it."""

    pretrain: Options
    finetune: Options
    linprobe: Options


# handwritten digits of scikit-learn, 1,437 to train and 360 to validate, 32 x 32 pixels. Mirroring is off where it can
# be, since it makes other shapes of them
_digits = "--input_size 32 --amp off --device cpu --num_workers 0 --save_every 1000 --log_dir ''"
DIGITS = Scale(
    pretrain=options(
        f"--model mae_vit_tiny_patch4 {_digits} --batch_size 64 --epochs 32 --warmup_epochs 4 --blr 12e-3 "
        "--crop_min 0.5 --hflip 0 --picture_every 0"
    ),
    finetune=options(
        f"--model vit_tiny_patch4 {_digits} --batch_size 32 --epochs 8 --warmup_epochs 1 --blr 32e-3 --nb_classes 10 "
        "--drop_path 0 --reprob 0 --aa ''"
    ),
    linprobe=options(
        f"--model vit_tiny_patch4 {_digits} --batch_size 128 --epochs 10 --warmup_epochs 1 --blr 60 --nb_classes 10 "
        "--global_pool --crop_min 0.7 --hflip 0"
    ),
)
# appendix A.1: tables 8, 9 (with the drop path for raw pixels) and 10
IMAGENET = Scale(
    pretrain=options(
        "--model mae_vit_large_patch16 --effective_batch 4096 --batch_size 64 --epochs 800 --warmup_epochs 40 "
        "--blr 1.5e-4 --weight_decay 0.05"
    ),
    finetune=options(
        "--model vit_large_patch16 --effective_batch 1024 --batch_size 32 --epochs 50 --warmup_epochs 5 --blr 1e-3 "
        "--layer_decay 0.75 --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --dist_eval"
    ),
    linprobe=options(
        "--model vit_large_patch16 --effective_batch 16384 --batch_size 512 --epochs 90 --warmup_epochs 10 --blr 0.1 "
        "--weight_decay 0 --cls_token --dist_eval"
    ),
)
SCALES = {"digits": DIGITS, "imagenet": IMAGENET}
FINE_TUNED, LINEAR = "fine-tuned", "linear probe"


@dataclass(frozen=True)
class Row:
    """A row: its name, options of pretraining at either scale (None: the scale has no such row), published figures.

    `pretrain`: False starts the classifier from nothing. `finetune` and `linprobe`: options of their own by scale, None
    where the row has no such number. `x`: its place on the axis of a figure.
    """

    name: str
    digits: str | None = ""
    imagenet: str | None = ""
    published: dict[str, float | None] = field(default_factory=dict)
    x: float | None = None
    pretrain: bool = True
    finetune: dict[str, str] | None = field(default_factory=dict)
    linprobe: dict[str, str] | None = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A table or figure: what varies, and its rows. `axis`: what `x` counts, where the rows are points of a curve."""

    title: str
    rows: list[Row]
    axis: str = ""


def _row(name: str, fine_tuned: float | None, linear: float | None, digits: str | None, imagenet: str, **more) -> Row:
    return Row(name, digits, imagenet, {FINE_TUNED: fine_tuned, LINEAR: linear}, **more)


def _same(name: str, fine_tuned: float | None, linear: float | None, both: str = "", **more) -> Row:
    return _row(name, fine_tuned, linear, both, both, **more)


_depth, _width = "--decoder_depth", "--decoder_width"
TABLE1 = {
    # the digits' encoder has 4 blocks and is 64 wide; its decoder, by default, 1 and 64: rows by their share of it
    "table1a": Experiment("decoder depth, blocks", [
        _row("1 (digits: 1)", 84.8, 65.5, "", f"{_depth} 1"),
        _row("2 (digits: 2)", 84.9, 70.0, f"{_depth} 2", f"{_depth} 2"),
        _row("4 (digits: 4)", 84.9, 71.9, f"{_depth} 4", f"{_depth} 4"),
        _row("8 (digits: none)", 84.9, 73.5, None, ""),
        _row("12 (digits: none)", 84.4, 73.3, None, f"{_depth} 12"),
    ]),
    "table1b": Experiment("decoder width", [
        _row("128 (digits: 8)", 84.9, 69.1, f"{_width} 8", f"{_width} 128"),
        _row("256 (digits: 16)", 84.8, 71.3, f"{_width} 16", f"{_width} 256"),
        _row("512 (digits: 32)", 84.9, 73.5, f"{_width} 32", ""),
        _row("768 (digits: 48)", 84.4, 73.1, f"{_width} 48", f"{_width} 768"),
        _row("1024 (digits: 64)", 84.3, 73.1, "", f"{_width} 1024"),
    ]),
    "table1c": Experiment("mask tokens in the encoder", [
        _same("with", 84.2, 59.6, "--encoder_mask_tokens"),
        _same("without", 84.9, 73.5),
    ]),
    # on digits 1/8 of a patch's 48 values, as 96 of 768, and the nearest of 64 mean patches for the dVAE's token
    "table1d": Experiment("target", [
        _same("pixel", 84.9, 73.5),
        _same("normalised pixel", 85.4, 73.9, "--target norm"),
        _row("PCA", 84.6, 72.3, "--target pca --pca_components 6", "--target pca"),
        _row("tokens", 85.3, 71.6, "--target tokens --tokenizer {tokenizer}", "--target tokens --tokenizer DVAE.pt"),
    ]),
    "table1e": Experiment("augmentation", [
        _same("none", 84.0, 65.7, "--augment none"),
        _same("crop, fixed size", 84.7, 73.1, "--augment crop"),
        _same("crop, random size", 84.9, 73.5),
        _same("crop and colour jitter", 84.3, 71.9, "--augment jitter"),
    ]),
    "table1f": Experiment("mask", [
        _same("random 75 %", 84.9, 73.5),
        _same("block 50 %", 83.9, 72.3, "--mask block --mask_ratio 0.5"),
        _same("block 75 %", 82.8, 63.9, "--mask block"),
        _same("grid 75 %", 84.0, 66.0, "--mask grid"),
    ]),
}  # fmt: skip
FIGURE5 = Experiment("mask ratio, %", [
    _same(f"{percent}", *published, f"--mask_ratio {percent / 100}" if percent != 75 else "", x=percent)
    for percent, published in {
        10: (None, 54.6), 20: (None, None), 30: (None, None), 40: (None, None), 50: (None, None), 60: (None, None),
        70: (None, None), 75: (84.9, 73.5), 80: (None, None), 90: (None, None),
    }.items()
], axis="mask ratio, %")  # fmt: skip
FIGURE7 = Experiment("epochs of pretraining", [
    _row(f"{epochs} (digits: {epochs // 25})", *published, f"--epochs {epochs // 25} --warmup_epochs {warmup}",
         f"--epochs {epochs}", x=epochs)
    for epochs, warmup, published in (
        (100, 1, (None, None)), (200, 1, (None, None)), (400, 2, (None, None)), (800, 4, (84.9, 73.5)),
        (1600, 8, (None, None)),
    )
], axis="epochs of pretraining (on digits 1/25)")  # fmt: skip


def _tuned(name: str, published: float | None, blocks: str | None) -> Row:
    more = {} if blocks is None else {"digits": f"--tune_blocks {blocks}", "imagenet": f"--tune_blocks {blocks}"}
    return Row(name, published={FINE_TUNED: published}, finetune=more, linprobe=None)


FIGURE9 = Experiment("blocks fine-tuned", [
    _tuned("0", 73.5, "0"), _tuned("MLP half of the last", 79.1, "0.5"), _tuned("1", 81.0, "1"), _tuned("2", None, "2"),
    _tuned("all", 84.9, None),
])  # fmt: skip

# table 11: from scratch; 300 epochs for B, 200 for L and H
_from_scratch = (
    "--opt_betas 0.9 0.95 --blr 1e-4 --weight_decay 0.3 --warmup_epochs 20 --layer_decay 1 --reprob 0 "
    "--model_ema 0.9999 --effective_batch 4096"
)


def _scratch(name: str, published: float, model: str, epochs: int, drop_path: float, digits: str | None) -> Row:
    imagenet = f"--model {model} --epochs {epochs} --drop_path {drop_path} {_from_scratch}"
    own = {"imagenet": imagenet} if digits is None else {"imagenet": imagenet, "digits": digits}
    at_digits = None if digits is None else ""
    return Row(name, at_digits, published={FINE_TUNED: published}, pretrain=False, finetune=own, linprobe=None)


_digits_scratch = "--opt_betas 0.9 0.95 --epochs 32 --warmup_epochs 4 --layer_decay 1 --weight_decay 0.3"
_scratch_b = _scratch("ViT-B", 82.3, "vit_base_patch16", 300, 0.1, None)
_scratch_l = _scratch("ViT-L", 82.6, "vit_large_patch16", 200, 0.2, None)
_scratch_h = _scratch("ViT-H", 83.1, "vit_huge_patch14", 200, 0.2, None)
TABLE11 = Experiment("from scratch", [
    _scratch_b, _scratch_l, _scratch_h,
    Row("ViT-T/4, with weight average (digits)", imagenet=None, pretrain=False, linprobe=None,
        finetune={"digits": f"{_digits_scratch} --model_ema 0.99"}),
    Row("ViT-T/4, without (digits)", imagenet=None, pretrain=False, linprobe=None,
        finetune={"digits": _digits_scratch}),
])  # fmt: skip


def _mae(name: str, published: float, size: str, blr: str, epochs: int, layer_decay: float, drop_path: float) -> Row:
    own = f"--model vit_{size} --blr {blr} --epochs {epochs} --layer_decay {layer_decay} --drop_path {drop_path}"
    pretrain = f"--model mae_vit_{size} --norm_pix_loss --epochs 1600"
    return Row(name, None, pretrain, {FINE_TUNED: published}, finetune={"imagenet": own}, linprobe=None)


TABLE3 = Experiment("supervised from scratch, and masked autoencoders fine-tuned", [
    _scratch_b, _scratch_l, _scratch_h,
    _mae("ViT-B, MAE", 83.6, "base_patch16", "5e-4", 100, 0.65, 0.1),
    _mae("ViT-L, MAE", 85.9, "large_patch16", "1e-3", 50, 0.75, 0.2),
    _mae("ViT-H, MAE", 86.9, "huge_patch14", "1e-3", 50, 0.75, 0.3),
    Row("ViT-T/4, from scratch (digits)", imagenet=None, pretrain=False, linprobe=None,
        finetune={"digits": _digits_scratch}),
    Row("ViT-T/4, MAE (digits)", imagenet=None, linprobe=None),
])  # fmt: skip

EXPERIMENTS = TABLE1 | {
    "figure5": FIGURE5, "figure7": FIGURE7, "figure9": FIGURE9, "table11": TABLE11, "table3": TABLE3,
}  # fmt: skip
