"""What an option's text may be: numbers within bounds, paths, sizes. Each error names the text and what would do."""

import argparse
import math
import os
from collections.abc import Callable


def _option_type(kind: type, least: float = -math.inf, most: float = math.inf, ends: str = "[]") -> Callable:
    """A finite number from `least` to `most`; `ends`: a round bracket leaves that end out, as in mathematics."""

    def read(text: str):
        value = _number(kind, text)
        if value < least or (value == least and ends[0] == "("):
            raise argparse.ArgumentTypeError(f"{text} is {'not above' if ends[0] == '(' else 'below'} {least}")
        if value > most or (value == most and ends[1] == ")"):
            raise argparse.ArgumentTypeError(f"{text} is {'not below' if ends[1] == ')' else 'above'} {most}")
        return value

    return read


positive = _option_type(int, 1)
count = _option_type(int, 0)
not_negative = _option_type(float, 0)
above_zero = _option_type(float, 0, ends="(]")
share = _option_type(float, 0, 1)
positive_share = _option_type(float, 0, 1, "(]")
share_below_1 = _option_type(float, 0, 1, "[)")
number = _option_type(float)
channels = _option_type(int, 1, 10_000)
side = _option_type(int, 1, 16384)  # pixels; no machine holds the attention of larger images


def mask_ratio(text: str) -> float:
    """Option type: a number above 0 (else nothing is left to predict) and below 1 (else nothing to encode)."""
    if not 0 < (value := _number(float, text)) < 1:
        reason = "removes nothing, so there is nothing to predict" if value <= 0 else "keeps nothing to encode"
        raise argparse.ArgumentTypeError(f"{text} {reason}: choose above 0 and below 1, such as 0.75")
    return value


def path(text: str) -> str:
    """Option type: a file, folder or URL; ~ is the home folder, also in --name=~/x, which shells leave alone."""
    if "\0" in text:  # of a file of options; no operating system takes it
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no path")
    if (expanded := os.path.expanduser(text)).startswith("~"):
        raise argparse.ArgumentTypeError(f"{text}: no such user; a folder of that name is ./{text}")
    return expanded


def tuned_blocks(text: str) -> float | None:
    """Option type: a number of blocks, 0.5 for the MLP half of one, None for all of the model."""
    if text == "all":
        return None
    return 0.5 if text in ("0.5", ".5") else count(text)


def report_to(text: str) -> str:
    """Option type: names of those who show a run's curves, with commas between; none for nobody."""
    names = [name.strip() for name in text.split(",")]
    known = ("tensorboard", "wandb", "mlflow")
    if names != ["none"] and (set(names) - set(known) or len(set(names)) < len(names)):
        raise argparse.ArgumentTypeError(f"{text!r} is not none, nor of {', '.join(known)}, with commas between")
    return ",".join(names)


def _number(kind: type, text: str):
    try:
        value = kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not {what}") from None
    if isinstance(value, int) and abs(value) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text[:80]} is too large")
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return value


class ChannelsAction(argparse.Action):
    """--in_chans: who gives it, even as 3, wants files as they are stored (see util/data/bands.py)."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        if namespace.pixel_type == "auto":
            namespace.pixel_type = "stored"


class SizeAction(argparse.Action):
    """One number is a square's side; two are (height, width)."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            parser.error(f"argument --input_size: expected a side, or height and width, got {len(values)} numbers")
        setattr(namespace, self.dest, values[0] if len(values) == 1 else tuple(values))
