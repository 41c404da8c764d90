"""Options that several scripts share, each declared once, and the checks that need no data."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields

from util import masks, targets
from util.log import log
from util.option_types import (
    ChannelsAction,
    SizeAction,
    above_zero,
    channels,
    count,
    not_negative,
    number,
    path,
    positive,
    positive_share,
    report_to,
    share,
    side,
)
from util.option_types import mask_ratio as mask_ratio  # this one and the next two for the scripts alone
from util.option_types import share_below_1 as share_below_1
from util.option_types import tuned_blocks as tuned_blocks
from util.options import parse as parse  # how the scripts know it
from util.transforms import AUGMENTS

PIXEL_TYPES = ("auto", "rgb", "stored", "uint8", "uint16", "float32")
# options that may differ between the processes of one run: each has its own disk, cores and device, or none heeds them
OF_ONE_RANK = set(
    "data_path val_path log_dir num_workers pin_mem loader_timeout device local_rank world_size dist_url "
    "dist_on_itp dist_timeout peak_tflops imagenet imagenet_real imagenet_v2 imagenet_a imagenet_r imagenet_sketch "
    "imagenet_c set classes".split()
)


def shared(args: argparse.Namespace) -> dict[str, object]:
    """The options that must be the same in all processes of one run."""
    shown = {f"--{name}": value for name, value in vars(args).items() if name not in OF_ONE_RANK}
    return shown | {"--output_dir": "a folder" if args.output_dir else ""}  # which one, rank 0 alone heeds


def warn_ineffective(args: argparse.Namespace) -> None:
    """Name the options that are accepted for old command lines and do nothing."""
    ineffective = {"local_rank": -1, "resplit": False, "dist_on_itp": False, "world_size": 1}
    given = [f"--{name}" for name, default in ineffective.items() if getattr(args, name, default) != default]
    if given:
        log.warning(
            f"no effect here: {', '.join(given)} (the launcher's environment decides; --resplit was never used)"
        )


def add_training_options(
    parser: argparse.ArgumentParser, *, batch_size: int, epochs: int, blr: float, min_lr: float, warmup_epochs: int,
    weight_decay: float,
) -> None:  # fmt: skip
    """Batch, length, learning rate and precision. The defaults are each recipe's."""
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--batch_size", default=batch_size, type=positive, metavar="N", help="images per process and forward pass")
    add("--epochs", default=epochs, type=positive, metavar="N", help="passes over the training images")
    add("--accum_iter", default=1, type=positive, metavar="N", help="forward passes per optimizer step")
    add("--lr", default=None, type=not_negative, help="absolute learning rate; overrides --blr")
    add("--blr", default=blr, type=not_negative,
        help="base learning rate: lr = blr x effective batch / 256; effective batch = batch_size x accum_iter x "
        "processes")  # fmt: skip
    add("--min_lr", default=min_lr, type=not_negative, help="learning rate at the end of the cosine, absolute")
    add("--warmup_epochs", default=warmup_epochs, type=not_negative, metavar="N", help="epochs of linear warm-up")
    add("--weight_decay", default=weight_decay, type=not_negative, help="weight decay, as a share per unit of lr")
    _add_speed_options(group)
    add("--grad_checkpointing", action="store_true",
        help="compute each block again in backward: less memory, about a third more arithmetic")  # fmt: skip
    add("--peak_tflops", default=None, type=above_zero,
        help="peak of one device in TFLOP/s, for mfu (utilisation) in the log; none looks it up")  # fmt: skip
    add("--seed", default=0, type=count, help="decides weights, order, augmentation and masks")


def _add_speed_options(group) -> None:
    add = group.add_argument
    add("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"],
        help="precision of matrix products; auto: bf16 where the device computes in it, else fp16 on CUDA (with loss "
        "scaling where it trains), else off (float32)")  # fmt: skip
    add("--compile", default="auto", choices=["auto", "on", "off"],
        help="compile the transformer blocks, in a first step that takes longer; auto: on CUDA")  # fmt: skip


def add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    """Batch, precision, loader, device and launcher of a script that does not train."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--batch_size", default=64, type=positive, metavar="N", help="images per process and forward pass"
    )
    _add_speed_options(group)
    _add_loader_options(group)
    _add_launch_options(group)


def add_model_options(parser: argparse.ArgumentParser, models: dict[str, Callable], default: str) -> None:
    """--model, one of `models`, and its --input_size."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default=default, choices=list(models), metavar="NAME", help=f"one of: {', '.join(models)}"
    )
    group.add_argument(
        "--input_size", default=224, type=side, nargs="+", action=SizeAction, metavar="PIXELS",
        help="image side in pixels, or height and width; a multiple of the patch size",
    )  # fmt: skip


def add_channel_options(parser: argparse.ArgumentParser) -> None:
    """What images are beside their size: see util/data/bands.py."""
    add = parser.add_argument_group("channels").add_argument
    add("--in_chans", default=3, type=channels, action=ChannelsAction, metavar="C", help="channels of an image")
    add("--pixel_type", default="auto", choices=PIXEL_TYPES,
        help="rgb: all images become RGB of 8 bits; stored, or a type's name: uint8, uint16 or float32 as the files "
        "have it, also .npy and TIFF of many bands; auto: stored where --in_chans is given, even as 3, else the "
        "starting checkpoint's, else rgb")  # fmt: skip
    add_statistics_options(add, "the starting checkpoint's; for 3 of uint8 ImageNet's; else of 1,000 training images")


def add_statistics_options(add: Callable, default: str) -> None:
    """What normalises images; `default` in words."""
    add("--mean", default=None, type=number, nargs="+", metavar="M",
        help="of each channel, of values in units of 0..1: uint8 by 255, uint16 by 65535, float32 as it is (default: "
        f"{default})")  # fmt: skip
    add("--std", default=None, type=above_zero, nargs="+", metavar="S",
        help="standard deviation of each channel, in the same units (default: as --mean)")  # fmt: skip


def add_data_options(parser: argparse.ArgumentParser, data_path_help: str, labelled: bool = True) -> None:
    """Where images come from and who loads them."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data_path", default=None, type=path, metavar="PATH",
        help=f"{data_path_help}; or a list of files, .txt or .csv, a path a line"
        + (" and its label after a comma" if labelled else ""))  # fmt: skip
    if labelled:
        add("--val_path", default=None, type=path, metavar="FILE",
            help="the list to validate on, where --data_path is a list (of folders, val/ is)")  # fmt: skip
    add("--dataset", default="", metavar="KIND/NAME",
        help="a published set as its archives unpack: inat2017, inat2018, inat2019, places205, places365; or tar, or a "
        "reader of timm: wds/NAME (WebDataset), hfds/NAME or hfids/NAME (Hugging Face), tfds/NAME; --data_path is then "
        "its root. none: folders, lists")  # fmt: skip
    add("--train_split", default="train", metavar="SPLIT", help="what of --dataset to train on")
    if labelled:
        add("--val_split", default="val", metavar="SPLIT", help="what of --dataset to validate on")
    add("--skip_bad_images", action="store_true",
        help="replace files that cannot be decoded by the next good one and list them each epoch")  # fmt: skip
    add("--decode", default="cpu", choices=["cpu", "cuda"],
        help="who decodes, crops and resizes JPEGs to train on; cuda: the GPU, where cores are few or slow"
        + (" (no --aa or --color_jitter; validation images always take the CPU)" if labelled else ""))  # fmt: skip
    _add_loader_options(group)


def _add_loader_options(group) -> None:
    add = group.add_argument
    add("--num_workers", default=10, type=count, metavar="N",
        help="loader workers per process; capped at the process's share of the cores")  # fmt: skip
    add("--loader_timeout", default=600.0, type=not_negative, metavar="SECONDS",
        help="seconds a batch may take to load before the disk counts as stalled; 0 waits for ever")  # fmt: skip
    add("--pin_mem", action="store_true", default=True, help="page-locked memory for faster copies to a GPU")
    add("--no_pin_mem", action="store_false", dest="pin_mem", help="ordinary memory instead (default: page-locked)")


@dataclass(frozen=True)
class DataOptions:
    """The values of `add_data_options` and `add_channel_options`, for those who open the data; see the help texts."""

    data_path: str | None
    val_path: str | None
    dataset: str
    train_split: str
    val_split: str
    skip_bad_images: bool
    decode: str
    num_workers: int
    loader_timeout: float
    pin_mem: bool
    in_chans: int
    pixel_type: str
    mean: list[float] | None
    std: list[float] | None


def data_options(args: argparse.Namespace) -> DataOptions:
    """Those of `args` that say where images come from and who loads them."""
    return DataOptions(**{field.name: getattr(args, field.name) for field in fields(DataOptions)})


def add_crop_options(parser: argparse.ArgumentParser, *, crop_min: float) -> Callable:
    """Crop and flip, for images of which a corner, or the mirror image, is something else. Returns what adds more."""
    add = parser.add_argument_group("augmentation").add_argument
    add("--crop_min", default=crop_min, type=positive_share, metavar="SHARE",
        help="least share of the image's area that the random crop takes; the most is 1")  # fmt: skip
    add(
        "--crop_ratio",
        default=[3 / 4, 4 / 3],
        type=above_zero,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="width / height of the random crop in pixels; for long images about --input_size's (default: 3/4 to 4/3)",
    )
    add("--hflip", default=0.5, type=share, metavar="SHARE",
        help="share of images that are mirrored; 0 for text, digits")  # fmt: skip
    return add


def add_variant_options(parser: argparse.ArgumentParser) -> None:
    """What the paper's table 1 varies; PRETRAIN.md tells the rows."""
    add = parser.add_argument_group("the paper's variants").add_argument
    add("--mask", default="random", choices=list(masks.MASKS),
        help="removes any patches, rectangles, or all but one of every 2 x 2 (--mask_ratio 0.75)")  # fmt: skip
    add("--target", default=None, choices=list(targets.TARGETS),
        help="what is predicted: pixels, pixels normalised per patch, coefficients of the patches' principal "
        "components, ids of --tokenizer (default: pixel; norm with --norm_pix_loss)")  # fmt: skip
    add("--pca_components", default=None, type=positive, metavar="M",
        help=f"coefficients of --target pca (default: {targets.N_COMPONENTS}, or all of a smaller patch)")  # fmt: skip
    add("--tokenizer", default="", type=path, metavar="FILE",
        help="TorchScript or torch.export program, images [N, 3, H, W] as the loader normalises them -> ids [N, L]. "
        "It is code and runs here: give no file that you don't trust")  # fmt: skip
    add("--vocab_size", default=None, type=positive, metavar="N",
        help="number of the tokenizer's ids (default: what the file tells as vocab_size)")  # fmt: skip
    add("--encoder_mask_tokens", action="store_true", help="the encoder sees a mask token for each removed patch")
    add("--decoder_depth", default=None, type=positive, metavar="BLOCKS",
        help="decoder blocks (default: the model's; 8 in the paper's)")  # fmt: skip
    add("--decoder_width", default=None, type=positive, metavar="CHANNELS",
        help="a multiple of --decoder_heads and of 4 (default: the model's; 512 in the paper's)")  # fmt: skip
    add("--decoder_heads", default=None, type=positive, metavar="N",
        help="attention heads of the decoder (default: the model's; 16 in the paper's)")  # fmt: skip
    add("--augment", default="rrc", choices=AUGMENTS,
        help="centre crop; crop of fixed size and random place; random resized crop; the same with colour jitter 0.4. "
        "All but none flip (--hflip); --crop_min and --crop_ratio are of the last two")  # fmt: skip
    add("--init", default="", type=path, metavar="FILE",
        help="weights to start from: path, https URL or a released file's name; of an encoder alone, the decoder is "
        "new. A resumed run does not read it")  # fmt: skip


def add_watch_options(parser: argparse.ArgumentParser) -> None:
    """What pretraining shows beside its loss."""
    add = parser.add_argument_group("watching").add_argument
    add(
        "--picture_every", default=20, type=count, metavar="EPOCHS",
        help="epochs between reconstructions of 8 fixed images in TensorBoard, from val/ or else train/; 0: none",
    )  # fmt: skip
    add("--knn_every", default=0, type=count, metavar="EPOCHS",
        help="epochs between k-NN accuracies; needs train/<class>/ and val/<class>/, lists with labels, or one of the "
        "published sets; 0: none")  # fmt: skip
    add("--val_path", default=None, type=path, metavar="FILE",
        help="a list of files to look at for the two above, in the place of val/; with labels for --knn_every, where "
        "--data_path is a .csv list with labels")  # fmt: skip


def add_classifier_options(parser: argparse.ArgumentParser, *, global_pool: bool) -> None:
    """What fine-tuning and the linear probe share."""
    add = parser.add_argument_group("classifier").add_argument
    add("--finetune", default="", type=path, metavar="FILE",
        help="pretrained checkpoint to start from: a path, an https URL, a released file's name, hf://user/name or "
        "timm/name")  # fmt: skip
    add("--global_pool", action="store_true", default=global_pool, help="classify the mean of the patch tokens")
    add("--cls_token", action="store_false", dest="global_pool",
        help=f"classify the class token (default: {'off' if global_pool else 'on'})")  # fmt: skip
    add("--nb_classes", default=1000, type=positive, metavar="N", help="number of classes")
    add("--eval", action="store_true", help="evaluate --resume on val/ and leave")
    add("--dist_eval", action="store_true", help="share the evaluation among the processes")


def add_run_options(parser: argparse.ArgumentParser, *, save_every: int) -> None:
    """Files, device and launcher."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--output_dir", default="./output_dir", type=path, metavar="FOLDER",
        help="for checkpoints, logs and config.yaml; '' saves nothing")  # fmt: skip
    add("--log_dir", default="./output_dir", type=path, metavar="FOLDER",
        help="for TensorBoard; does not follow --output_dir; '' writes none")  # fmt: skip
    add("--report_to", default="tensorboard", type=report_to, metavar="NAMES",
        help="who shows the curves, with commas between: tensorboard, wandb, mlflow; or none")  # fmt: skip
    add("--save_every", default=save_every, type=positive, metavar="EPOCHS",
        help="epochs between checkpoints; the last is always saved")  # fmt: skip
    add("--save_minutes", default=30.0, type=above_zero, metavar="MINUTES",
        help="minutes after which a state within an epoch is saved too, in files that newer ones replace")  # fmt: skip
    add("--keep_last", default=None, type=positive, metavar="K",
        help="checkpoints to keep, but two at least, beside the best and in pretraining every 20th epoch; none keeps "
        "all")  # fmt: skip
    add("--async_save", default="auto", choices=["auto", "on", "off"],
        help="write checkpoints beside training, from a copy in main memory; auto: with CUDA")  # fmt: skip
    add("--on_nan", default="stop", choices=["stop", "skip", "rollback"],
        help="a step whose loss or gradient is not finite is left out; at the second within 1000 optimizer steps: "
        "stop, skip it too, or go back to the last checkpoint and on with other images")  # fmt: skip
    add("--resume", default="", type=path, metavar="FILE",
        help="checkpoint to continue: path, https URL, a released file's name, hf://user/name, or auto: the newest in "
        "output_dir")  # fmt: skip
    add("--start_epoch", default=0, type=count, metavar="N", help="first epoch, where --resume does not tell it")
    _add_launch_options(group)
    add("--world_size", default=1, type=int, help="accepted for old command lines; the launcher decides")
    add("--local_rank", default=-1, type=int, help="accepted for old command lines; the launcher decides")
    add("--dist_on_itp", action="store_true", help="accepted for old command lines; mpirun is recognised anyway")


def _add_launch_options(group) -> None:
    add = group.add_argument
    add("--device", default="auto", help="auto (the best of cuda, mps, cpu), cuda, mps or cpu")
    add("--dist_timeout", default=10.0, type=above_zero, metavar="MINUTES",
        help="minutes that a process waits for the others before it takes them for dead")  # fmt: skip
    add("--dist_url", default="env://", help="where processes meet; env:// takes the launcher's environment")
