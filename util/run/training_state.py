"""The training state of a checkpoint, checked before it is used: anything may stand under any key."""

import copy
from collections import Counter

import torch

from util import errors
from util.weights.untrusted import is_count as _is_count
from util.weights.untrusted import options_of


def check_training_state(
    state: dict, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
) -> dict:
    """Raise ValueError, saying what is wrong, unless a run with `optimizer` and `scaler` can go on from `state`.

    Returns what `optimizer.load_state_dict` is to take. Moments lie in memory of their own, laid out as the optimizer
    lays them out. The options are those of the run, which were asked for on resuming (files of the original code know
    no fused kernels, without which updates that are not finite could not be left out): of a group only the rate, and
    what a step changes, such as a counter, are the file's.
    """
    if not _is_count(state["epoch"]):
        raise ValueError(f"its epoch is {shown(state['epoch'])}")
    saved = state.get("scaler")
    if saved is not None and not isinstance(saved, dict):
        raise ValueError(f"the state of its loss scaler is a {type(saved).__name__}")
    for name, ours in (scaler.state_dict() if scaler is not None and saved else {}).items():
        value, least = saved.get(name), 0 if name == "_growth_tracker" else torch.finfo(torch.float32).tiny
        kind, largest = (int, 2**31 - 1) if isinstance(ours, int) else (int | float, torch.finfo(torch.float32).max)
        if not isinstance(value, kind) or not least <= value <= largest:
            raise ValueError(f"{name} of its loss scaler is {shown(value)}")
    _check_position(state)
    built = _options(optimizer.state_dict())
    return _fit(state["optimizer"], _after_a_step(optimizer), "its optimizer", built)


def _check_position(state: dict) -> None:
    """What tells where within an epoch the run was, of how many images, and what it had reached."""
    options, iteration, n_images = options_of(state), state.get("iteration", 0), state.get("n_images")
    for name, value in (("iteration", iteration), ("n_images", 0 if n_images is None else n_images)):
        if not _is_count(value):
            raise ValueError(f"its {name} is {shown(value)}")
    if "world_size" in state or iteration:
        for name, value in (
            ("batch_size", options.get("batch_size")), ("accum_iter", options.get("accum_iter")),
            ("world_size", state.get("world_size")),
        ):  # fmt: skip
            if not _is_count(value) or value == 0:
                raise ValueError(f"its {name} is {shown(value)}")
    progress = state.get("progress")
    sums, counts = (progress.get(name) for name in ("sums", "counts")) if isinstance(progress, dict) else (None, None)
    known = _are_numbers(sums) and _are_numbers(counts) and {"loss", "lr"} <= sums.keys() == counts.keys()
    if iteration and not known:
        raise ValueError(
            "its progress is no dict of sums and counts: finite numbers for loss and lr, under the same names"
        )
    best = state.get("best")
    if best is not None and not (
        isinstance(best, list | tuple) and len(best) == 2 and _number(best[0]) is not None and _is_count(best[1])
    ):
        raise ValueError(f"its best is {shown(best)}, not an accuracy and an epoch")
    if _number(state.get("max_accuracy", 0.0)) is None:
        raise ValueError(f"its max_accuracy is {shown(state['max_accuracy'])}")


def _are_numbers(values: object) -> bool:
    return isinstance(values, dict) and all(
        isinstance(name, str) and len(name) <= 80 and _number(value) is not None for name, value in values.items()
    )


def _number(value: object) -> int | float | None:
    """A finite number, as it is; None for all else."""
    return value if isinstance(value, int | float) and abs(value) <= torch.finfo(torch.float64).max else None


def shown(value: object) -> str:
    """A value of a file, for a message: a tensor's form, else as `util.errors.shown`."""
    if not isinstance(value, torch.Tensor):
        return errors.shown(value)
    if not _is_ordinary(value):
        return f"another kind of tensor ({value.layout}, {value.dtype}, {value.device})"
    return f"of shape {tuple(value.shape)} and {value.dtype}"[:200]


# the optimizer: its state, compared with that of the running one


@torch.no_grad()
def _after_a_step(optimizer: torch.optim.Optimizer) -> dict:
    """The optimizer's state_dict after a first step; weights and gradients stay as they are, what it kept is lost.

    Nothing else tells what an optimizer of any kind keeps for a parameter, and how it lies in memory; and a fused
    kernel reads and writes as many numbers as the parameter has, however few it was given.
    """
    before = [(param, param.clone(), param.grad) for group in optimizer.param_groups for param in group["params"]]
    for param, _, _ in before:
        param.grad = torch.ones_like(param)
    optimizer.state.clear()
    optimizer.step()
    for param, value, grad in before:
        param.copy_(value)
        param.grad = grad
    return optimizer.state_dict()


def _options(tree: object) -> object:
    """A state_dict -> a copy without what is kept for each parameter."""
    if isinstance(tree, dict):
        return {name: _options(value) for name, value in tree.items() if name != "state"}
    return [_options(value) for value in tree] if isinstance(tree, list) else copy.deepcopy(tree)


def _fit(saved: object, like: object, name: str, built: object = None) -> object:
    """What a file holds as `name`, in the form of `like`; ValueError where it has another. `built`: before the step.

    Only what `like` contains is looked into, so neither the depth nor the size is the file's choice.
    """
    if isinstance(like, dict) and {"state", "param_groups"} <= like.keys():
        return _fit_optimizer(saved, like, built)
    if isinstance(like, dict):
        lacking = like.keys() - saved.keys() if isinstance(saved, dict) else like.keys()
        if lacking:
            raise ValueError(f"{name} lacks {sorted(map(str, lacking))}")
        built = built or {}
        return {key: _fit(saved[key], value, f"{key} of {name}", built.get(key)) for key, value in like.items()}
    if isinstance(like, list | tuple):
        if type(saved) is not type(like) or len(saved) != len(like):
            raise ValueError(f"{name} is {shown(saved)}, not a {type(like).__name__} of {len(like)}")
        built = built or [None] * len(like)
        return type(like)(_fit(one, two, name, three) for one, two, three in zip(saved, like, built, strict=True))
    if isinstance(like, int | float) or (isinstance(like, torch.Tensor) and like.ndim == 0):
        return _fit_number(saved, like, name)
    if isinstance(like, torch.Tensor):
        if not _is_ordinary(saved) or _form(saved) != _form(like):
            raise ValueError(f"{name} is {shown(saved)}; here it is {shown(like)}")
        return _finite(torch.empty_like(like).copy_(saved), name)
    if saved is not None and not isinstance(saved, str | int | float):
        raise ValueError(f"{name} is {shown(saved)}")
    return saved


def _fit_number(saved: object, like: object, name: str) -> object:
    """Files of other versions of torch have a number where there is a tensor without dimensions now, or had it."""
    number = saved.item() if _is_ordinary(saved) and saved.ndim == 0 else saved
    if _number(number) is None or (name.startswith("step of") and not 0 <= number < 2**63):
        raise ValueError(f"{name} is {shown(number)}")
    return _finite(torch.full_like(like, number), name) if isinstance(like, torch.Tensor) else number


def _fit_optimizer(saved: object, like: dict, built: dict) -> dict:
    """The state of an optimizer as `_fit` gives it; its parameters get the numbers that they have here."""
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        raise ValueError("its optimizer has no state")
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError("its optimizer has no param_groups")
    sizes = _sizes(like["param_groups"])
    groups = groups if _sizes(groups) == sizes else _in_the_originals_order(groups, sizes)
    if _sizes(groups) != sizes:
        raise ValueError(
            f"it has other parameter groups: {sum(_sizes(groups))} parameters, {str(_sizes(groups))[:80]} a group; "
            f"here {sum(sizes)}, {str(sizes)[:80]} a group"
        )
    ours, theirs = ([number for group in of for number in group["params"]] for of in (like["param_groups"], groups))
    odd = [number for number in theirs if not isinstance(number, int)]
    if odd or len(set(theirs)) < len(theirs):
        raise ValueError(f"it numbers a parameter {shown(odd[0])}" if odd else "it gives two parameters one number")
    of_all = like["state"].keys() - set(ours)  # what some optimizers keep beside
    if unknown := saved["state"].keys() - set(theirs) - of_all:
        raise ValueError(f"it has the state of parameters that are in no group, such as {shown(unknown.pop())}")
    state = {key: _fit(saved["state"].get(key), like["state"][key], f"{key} of its optimizer") for key in of_all}
    used: Counter[int] = Counter()
    for number, index in zip(ours, theirs, strict=True):
        values = saved["state"].get(index, {})
        if values != {}:  # else no step had a gradient of it
            state[number] = _fit(values, like["state"].get(number, {}), f"parameter {number}")
            for name in values.keys() - state[number].keys():
                state[number][name] = _own(values[name], f"{shown(name)} of parameter {number}", used)
    fitted = zip(groups, like["param_groups"], built["param_groups"], strict=True)
    more = {
        key: _fit(saved.get(key), like[key], f"{key} of its optimizer")
        for key in like.keys() - {"state", "param_groups"}
    }
    return {"state": state, "param_groups": [_fit_group(*three) for three in fitted], **more}


def _sizes(groups: list[dict]) -> list[int]:
    return [len(group["params"]) if isinstance(group.get("params"), list) else 0 for group in groups]


def _in_the_originals_order(groups: list[dict], sizes: list[int]) -> list[dict]:
    """Groups of a classifier with global pool, as this project first wrote them, with `fc_norm` before the head -> in
    the original's order, which is ours by now and has `sizes`. The sizes tell which one a file has.
    """
    if sizes[-2:] != [1, 3] or _sizes(groups) != [*sizes[:-2], 3, 1]:
        return groups
    *layers, undecayed, decayed = groups
    norm_weight, norm_bias, head_bias = undecayed["params"]
    return [*layers, decayed, {**undecayed, "params": [head_bias, norm_weight, norm_bias]}]


def _fit_group(saved: dict, like: dict, built: dict) -> dict:
    """A group as the run has built it, with the file's rate and what a step has changed."""
    changed = {name for name in like if name == "lr" or str(like[name]) != str(built.get(name))} - {"params"}
    return {**built, **{name: _fit(saved[name], like[name], f"{name} of a group") for name in changed & saved.keys()}}


def _own(saved: object, name: str, used: Counter[int]) -> object:
    """What an optimizer keeps only after many steps: plain, or a tensor of as many numbers as are stored of it.

    `used`: bytes that were copied of each storage.
    """
    if not isinstance(saved, torch.Tensor):
        return _fit(saved, None, name)
    if not _is_ordinary(saved):
        raise ValueError(f"{name} is {shown(saved)}")
    storage = saved.untyped_storage()
    used[storage.data_ptr()] += saved.nbytes
    if used[storage.data_ptr()] > storage.nbytes():
        raise ValueError(f"{name} is {shown(saved)}, but fewer numbers are stored")
    return _finite(saved.clone(memory_format=torch.contiguous_format), name)


def _is_ordinary(value: object) -> bool:
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided and not value.is_nested
        and not value.is_quantized and value.device.type == "cpu" and not value.is_complex()
    )  # fmt: skip


def _form(tensor: torch.Tensor) -> tuple[torch.Size, bool]:
    return tensor.shape, tensor.is_floating_point()


def _finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ValueError(f"{name} holds numbers that are not finite")
    return tensor
