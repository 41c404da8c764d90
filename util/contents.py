"""What a checkpoint holds, checked before it is used: a file from elsewhere may have anything under any key."""

import argparse
from pathlib import Path

import torch

from util.errors import UserError


def check_state_dict(state: object, name: str | Path) -> None:
    """Raise UserError unless `state` is a dict whose `model` maps names to tensors of ordinary kind."""
    weights = state.get("model") if isinstance(state, dict) else None
    if not isinstance(weights, dict):
        what = f"a dict of {', '.join(map(repr, list(state)[:5])) or 'nothing'}" if isinstance(state, dict) else ""
        raise UserError(
            f"{name} is no checkpoint of this project: it has no state dict under the key 'model', but is "
            f"{what[:200] or 'a ' + type(state).__name__}"
        )
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(
                f"{name} is no checkpoint of this project: {str(key)[:80]!r} under 'model' is a {type(value).__name__} "
                "and no tensor"
            )
        ordinary = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
        if not ordinary or value.is_quantized or value.device.type != "cpu":
            raise UserError(
                f"{name}: {key!r} is another kind of tensor ({value.layout}, {value.dtype}, {value.device}): save it "
                "as an ordinary one"
            )


def options_of(state: dict) -> dict[str, object]:
    """Checkpoint -> the options that it was trained with, plain values alone; {} where it tells none."""
    args = state.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, dict):
        return {}
    plain = {name: value for name, value in args.items() if isinstance(name, str) and _is_plain(value)}
    size = plain.get("input_size")
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(_is_count(side) and side > 0 for side in sides):
        plain.pop("input_size", None)
    return plain


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _are_numbers(values: object) -> bool:
    return isinstance(values, dict) and all(isinstance(value, int | float) for value in values.values())


def check_training_state(
    state: dict, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
) -> None:
    """Raise ValueError, saying what is wrong, unless a run with `optimizer` and `scaler` can go on from `state`."""
    if not _is_count(state["epoch"]):
        raise ValueError(f"its epoch is {str(state['epoch'])[:80]!r}")
    saved = state.get("scaler")
    if saved is not None and not isinstance(saved, dict):
        raise ValueError(f"the state of its loss scaler is a {type(saved).__name__}")
    for name, ours in (scaler.state_dict() if scaler is not None and saved else {}).items():
        value = saved.get(name)
        kind, largest = (int, 2**31 - 1) if isinstance(ours, int) else (int | float, torch.finfo(torch.float32).max)
        if not isinstance(value, kind) or not abs(value) <= largest:
            raise ValueError(f"{name} of its loss scaler is {str(value)[:80]!r}")
    _check_position(state)
    _check_optimizer(state["optimizer"], optimizer)


def _check_position(state: dict) -> None:
    """What tells where within an epoch the run was, and what it had reached."""
    options, iteration = options_of(state), state.get("iteration", 0)
    if not _is_count(iteration):
        raise ValueError(f"its iteration is {str(iteration)[:80]!r}")
    if "world_size" in state or iteration:
        for name, value in (
            ("batch_size", options.get("batch_size")), ("accum_iter", options.get("accum_iter")),
            ("world_size", state.get("world_size")),
        ):  # fmt: skip
            if not _is_count(value) or value == 0:
                raise ValueError(f"its {name} is {str(value)[:80]!r}")
    progress = state.get("progress")
    sums_and_counts = [progress.get(name) for name in ("sums", "counts")] if isinstance(progress, dict) else [None]
    if iteration and not all(map(_are_numbers, sums_and_counts)):
        raise ValueError("its progress is no dict of sums and counts")
    best = state.get("best")
    if best is not None and not (
        isinstance(best, list | tuple) and len(best) == 2 and isinstance(best[0], int | float) and _is_count(best[1])
    ):
        raise ValueError(f"its best is {str(best)[:80]!r}, not an accuracy and an epoch")
    if not isinstance(state.get("max_accuracy", 0.0), int | float):
        raise ValueError(f"its max_accuracy is {str(state['max_accuracy'])[:80]!r}")


def _check_optimizer(saved: object, optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        raise ValueError("its optimizer has no state")
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError("its optimizer has no param_groups")
    if not all(isinstance(group.get("lr", 0.0), int | float) for group in groups):
        raise ValueError("the learning rates of its param_groups are no numbers")
    ours = [group["params"] for group in optimizer.param_groups]
    theirs = [group.get("params") for group in groups]
    theirs = [indices if isinstance(indices, list) else [] for indices in theirs]
    if list(map(len, ours)) != list(map(len, theirs)):
        raise ValueError(
            f"it has other parameter groups ({list(map(len, theirs))} parameters each, here {list(map(len, ours))})"
        )
    expected = _state_names(optimizer)
    for params, indices in zip(ours, theirs, strict=True):
        for param, index in zip(params, indices, strict=True):
            if not isinstance(index, int):
                raise ValueError(f"it numbers a parameter {str(index)[:80]!r}")
            if index in saved["state"]:
                _check_moments(saved["state"][index], param, index, expected)
    if unknown := saved["state"].keys() - {index for indices in theirs for index in indices}:
        raise ValueError(f"it has the state of parameters that are in no group, such as {str(unknown.pop())[:80]!r}")


def _state_names(optimizer: torch.optim.Optimizer) -> set[str]:
    """What an optimizer of this kind keeps for each parameter, found by a step of one on a single number."""
    param = torch.nn.Parameter(torch.zeros(1))
    param.grad = torch.zeros(1)
    trial = type(optimizer)([param], lr=0.0)
    trial.step()
    return set(trial.state[param])


def _check_moments(values: object, param: torch.Tensor, index: int, expected: set[str]) -> None:
    if not isinstance(values, dict) or not expected <= values.keys():
        raise ValueError(f"the state of parameter {index} lacks {sorted(expected)}")
    for name in sorted(expected):
        value = values[name]
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) and value.is_floating_point() else None
        if name == "step" and (shape == () or isinstance(value, int | float)):
            if not 0 <= float(value) < 2**63:
                raise ValueError(f"step of parameter {index} is {float(value)}")
        elif shape != tuple(param.shape):
            what = type(value).__name__ if shape is None else f"of shape {shape}"
            raise ValueError(f"{name} of parameter {index} is {what}; the parameter has shape {tuple(param.shape)}")
