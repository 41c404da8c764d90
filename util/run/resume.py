"""Where a run goes on: its checkpoints in a folder, the newest valid one, and what of it fits the run that goes on."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn

from util.dist import Dist, on_main
from util.errors import UserError
from util.log import log
from util.run.files import checkpoints
from util.run.progress import Part
from util.run.training_state import check_training_state, shown
from util.weights import build, channels, checkpoint, convert
from util.weights.untrusted import options_of

SUBMISSION = set("job_dir ngpus nodes timeout partition use_volta32 comment cluster".split())  # of submitit_*.py
# options that may differ between a checkpoint and the run that continues it without a warning: they change no weight,
# or (the first three) only as a product, which is compared
MAY_DIFFER = SUBMISSION | set(
    "batch_size accum_iter world_size output_dir log_dir resume start_epoch data_path val_path num_workers pin_mem "
    "finetune init save_every save_minutes keep_last async_save on_nan loader_timeout dist_timeout dist_url "
    "dist_on_itp local_rank device compile grad_checkpointing peak_tflops eval dist_eval picture_every knn_every "
    "val_split report_to".split()
)


@dataclass
class Start:
    """Where training starts: at `part` of `epoch`; and what a classifier has reached."""

    epoch: int = 0
    part: Part = field(default_factory=Part)
    max_accuracy: float = 0.0
    best: tuple[float, int] | None = None  # accuracy and epoch of the best checkpoint

    def part_of(self, epoch: int) -> Part:
        """What of `epoch` is done already: nothing, but of the one that was interrupted."""
        return self.part if epoch == self.epoch else Part()


def newest(output_dir: str | Path) -> Path | None:
    """Folder -> its newest valid checkpoint, passing over damaged ones with a warning; None where it has none at all.

    Raises UserError where a file cannot be read, or all are damaged: a fresh start would then be a loss.
    """
    paths = list(checkpoints(output_dir).values())
    for path in reversed(paths):
        if (damage := _damage(path)) is None:
            return path
        log.warning(f"DAMAGED: {path} ({damage}); going back to the checkpoint before it")
    if paths:
        raise UserError(f"--resume auto: all {len(paths)} checkpoints in {output_dir} are damaged; move them away")
    return None


def _damage(path: Path) -> str | None:
    try:
        path.open("rb").close()
        checkpoint.load(path)
    except UserError as error:
        return error.message
    except OSError as error:
        raise UserError(f"--resume auto: {path} cannot be read ({error}); mend the disk or move the file") from error
    return None


def check_new(output_dir: str | Path) -> None:
    """Raise UserError where `output_dir` holds a run."""
    names = ["log.txt"] if (Path(output_dir) / "log.txt").exists() else []
    names += [path.name for path in checkpoints(output_dir).values()]
    if names:
        raise UserError(
            f"--output_dir {output_dir} holds a run already ({names[-1]}): pass --resume auto to continue it, or "
            "name another folder"
        )


def refuse_second_run(env: Dist, output_dir: str, resume: str) -> None:
    """Raise UserError, on all ranks, where `output_dir` holds a run and `resume` is not given."""
    if output_dir and not resume:
        on_main(env, lambda: check_new(output_dir))


def resume(
    env: Dist, args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler, n_images: int | None = None, average: ModelEmaV3 | None = None,
    images: str | None = None,
) -> Start:  # fmt: skip
    """Load what --resume says into model, its average, optimizer and scaler; return where to start.

    A file without optimizer (released weights) gives the model alone, and a start at --start_epoch. `n_images` and
    `images`, their digest: of the training set, compared with the file's. Raises UserError naming what does not fit the
    model.
    """
    path = args.resume
    if path == "auto":
        path = on_main(env, lambda: args.output_dir and newest(args.output_dir))
        if not path:
            log.info(f"--resume auto: no checkpoint in {args.output_dir!r} yet, a fresh start")
    if not path:
        return Start(args.start_epoch)
    state = checkpoint.load(path)
    saved_args = options_of(state)
    _check_size(path, saved_args, args)
    checkpoint.load_strictly(model, state["model"], path)
    load_average(path, state, average)
    if not has_training_state(state):
        log.info(f"resumed {path}")
        return Start(args.start_epoch)
    _check_trained(path, state.get("trained"), trained(model, optimizer))
    load_training_state(path, state, optimizer, scaler)
    start = _start(path, state, saved_args, args, env)
    log.info(f"resumed {path}: goes on at epoch {start.epoch}, batch {start.part.iteration}")
    if saved_args:
        _name_differences(path, state, saved_args, args, env, n_images, images)
    _warn_of_newer(path, args.output_dir)
    return start


def will_resume(env: Dist, args: argparse.Namespace) -> bool:
    """Whether `resume` is to load all weights, so that those to start from need not be there any more."""
    if args.resume != "auto":
        return bool(args.resume)
    return on_main(env, lambda: bool(args.output_dir and checkpoints(args.output_dir)))


def take_channels(env: Dist, args: argparse.Namespace) -> None:
    """Channels, their type, mean and deviation that are not given: those of the file that the run starts from.

    Raises UserError where the file's channels are others than those given.
    """
    if not hasattr(args, "in_chans"):  # main_evaluate.py
        return
    going_on = will_resume(env, args)
    source = args.resume if going_on else getattr(args, "finetune", "") or getattr(args, "init", "")
    told = on_main(env, lambda: source and _channels_of(source, args.output_dir))
    if not told:
        return
    there, name = told["in_chans"], "the run's own checkpoint" if source == "auto" else source
    if args.pixel_type == "auto" and args.in_chans == 3:  # neither is given
        args.in_chans, args.pixel_type = there, told["pixel_type"]
    if there != args.in_chans:
        if going_on or there != 3:  # three are adapted
            channels.refuse(name, there, args.in_chans)
    elif (told["pixel_type"] == "rgb") == (args.pixel_type == "rgb"):
        args.pixel_type = told["pixel_type"] if args.pixel_type in ("auto", "stored") else args.pixel_type
        if args.mean is args.std is None and "mean" in told:
            args.mean, args.std = list(told["mean"]), list(told["std"])
        if args.pixel_type != "rgb":
            statistics = ", mean and std" * ("mean" in told)
            log.info(f"taken from {name}, unless given: in_chans {there}, type {args.pixel_type}{statistics}")


def _channels_of(source: str, output_dir: str) -> dict[str, object]:
    """What a file tells of its channels; of a folder for `auto` the newest that can be read."""
    for path in reversed(checkpoints(output_dir).values()) if source == "auto" else [source]:
        try:
            state = checkpoint.load(path, whole=False)
            return build.channels_told_by(convert.to_our_names(state["model"], path), options_of(state))
        except UserError:
            if source != "auto":
                raise
    return {}


def _check_size(path: str | Path, saved: dict, args: argparse.Namespace) -> None:
    """Two sizes may have as many patches, and the file's positions would fit without a word."""
    here, there = args.input_size, saved.get("input_size", args.input_size)
    square = [list(size) if isinstance(size, list | tuple) else [size] * 2 for size in (here, there)]
    if square[0] != square[1]:
        raise UserError(f"{path} was trained with --input_size {there}, not {here}: resume with the same")


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the parameters that the optimizer updates, in its order: a checkpoint knows them by number alone."""
    names = {param: name for name, param in model.named_parameters()}
    return [names.get(param, "of no model") for group in optimizer.param_groups for param in group["params"]]


def _check_trained(path: str | Path, there: object, here: list[str]) -> None:
    """Frozen parameters have no moments. Groups of equal sizes and shapes may still be those of other layers."""
    if there is None or there == here:
        return
    if not isinstance(there, list) or not all(isinstance(name, str) for name in there):
        raise UserError(f"{path}: its list of trained parameters is {shown(there)}, with others than names")
    what = []
    for one, other, where in ((there, here, "only there"), (here, there, "only here")):
        known = set(other)
        if names := [name for name in one if name not in known]:
            what.append(f"{len(names)} {where}, such as {shown(names[0])}")
    raise UserError(
        f"{path} is of a run that trained {len(there)} parameters, here {len(here)}: "
        f"{', '.join(what) or 'the same ones in another order'}. Freeze the same ones as there"
    )


def has_training_state(state: dict) -> bool:
    """Whether a checkpoint's content is more than weights: the files of released models are not."""
    return "optimizer" in state and "epoch" in state


def load_training_state(
    path: str | Path, state: dict, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Load the moments and, where `state` has one, the loss scale, of the checkpoint at `path`; UserError if unfit.

    Of the optimizer's options only the rate is the file's: see `check_training_state`.
    """
    try:
        optimizer.load_state_dict(check_training_state(state, optimizer, scaler))
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:  # of the check, or the optimizer's reader
        raise UserError(
            f"the training state of {path} does not fit: {str(error)[:1000]}. Resume with the options it was trained "
            "with, such as --layer_decay, and with the same parameters frozen"
        ) from error
    if state.get("scaler"):
        scaler.load_state_dict(state["scaler"])


def load_average(path: str | Path, state: dict, average: ModelEmaV3 | None) -> None:
    """Load the average of the weights from the checkpoint at `path`; one without is a start from its weights."""
    if average is None:
        return
    weights = state.get("model_ema")
    if not isinstance(weights, dict):
        log.warning(f"{path} has no average of the weights: that of --model_ema starts from its weights")
        weights = state["model"]
    checkpoint.load_strictly(average.module, weights, path)


def _start(path: str | Path, state: dict, saved: dict, args: argparse.Namespace, env: Dist) -> Start:
    reached = {name: state[name] for name in ("max_accuracy", "best") if name in state}
    if not args.output_dir or Path(path).resolve().parent != Path(args.output_dir).resolve():
        reached.pop("best", None)  # that file lies elsewhere
    if not state.get("iteration"):
        return Start(state["epoch"] + 1, **reached)
    # whole optimizer steps are done; here they may be cut into batches differently
    theirs = saved["batch_size"] * saved["accum_iter"] * state["world_size"]
    ours = args.batch_size * args.accum_iter * env.world_size
    iteration = state["iteration"] // saved["accum_iter"] * theirs // ours * args.accum_iter
    scale = args.accum_iter / saved["accum_iter"]  # a mean is over batches: as many for each step as ours
    sums = {name: value * scale for name, value in state["progress"]["sums"].items()}
    counts = {name: value * scale for name, value in state["progress"]["counts"].items()}
    return Start(state["epoch"], Part(iteration, sums, counts), **reached)


def _name_differences(
    path: str | Path, state: dict, saved: dict, args: argparse.Namespace, env: Dist,
    n_images: int | None, images: str | None,
) -> None:  # fmt: skip
    """Warn of what changes the mathematics and differs from the file's: options, effective batch, training images."""
    ours = vars(args)
    differing = [
        f"--{name} {ours[name]} (was {_brief(saved[name])})"
        for name in sorted(ours.keys() & saved.keys() - MAY_DIFFER)
        if ours[name] != saved[name]
    ]
    if "world_size" in state:
        theirs = saved["batch_size"] * saved["accum_iter"] * state["world_size"]
        effective_batch = args.batch_size * args.accum_iter * env.world_size
        if effective_batch != theirs:
            differing.append(f"effective batch {effective_batch} (was {theirs})")
    if n_images != state.get("n_images", n_images):
        differing.append(f"{n_images} training images, so another order (was {state['n_images']})")
    elif images and isinstance(state.get("images"), str) and images != state["images"]:
        differing.append(f"other training images, or in another order, than those {n_images}")
    if differing:
        log.warning(f"this run differs from the one that wrote {path}: {', '.join(differing)}")


def _brief(value: object) -> str:
    """An option's value from a file, a few dozen characters of it."""
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_brief, value[:4]))}{', ...' * (len(value) > 4)})"
    return shown(value).strip("'\"")


def _warn_of_newer(path: str | Path, output_dir: str) -> None:
    """After a step back by hand, --resume auto would jump forward again."""
    paths = list(checkpoints(output_dir).values()) if output_dir else []
    here = [other.resolve() for other in paths]
    if Path(path).resolve() in here[:-1]:
        newer = paths[here.index(Path(path).resolve()) + 1 :]
        log.warning(
            f"{output_dir} has {len(newer)} newer checkpoints, up to {newer[-1].name}, which --resume auto prefers: "
            "move them away unless they are damaged"
        )
