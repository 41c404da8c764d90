"""LARS, the optimizer of the linear probe (You et al. 2017, arXiv 1708.03888)."""

from collections.abc import Iterable

import torch


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step on each weight matrix is rescaled to `trust_coefficient` of the matrix's norm.

    One-dimensional parameters (biases, norms) get plain SGD with momentum: no weight decay, no rescaling.

    As torch's fused optimizers, it divides gradients by `grad_scale` where that is set, and leaves everything as it is
    where `found_inf` is 1: loss scaling then needs no word from the host.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients; returns the closure's loss where there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, param: torch.Tensor, group: dict) -> None:
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        update = param.grad if grad_scale is None else param.grad / grad_scale
        if param.ndim > 1:
            update = update.add(param, alpha=group["weight_decay"])
            param_norm, update_norm = param.norm(), update.norm()
            trust = group["trust_coefficient"] * param_norm / update_norm
            # a norm of zero (a fresh or a converged weight) gives no scale: step as SGD; no branch, so no host sync
            update = update * torch.where((param_norm > 0) & (update_norm > 0), trust, 1.0)
        state = self.state[param]
        if "mu" not in state:
            state["mu"] = torch.zeros_like(param)
        if found_inf is None:
            state["mu"].mul_(group["momentum"]).add_(update)
            param.add_(state["mu"], alpha=-group["lr"])
        else:
            mu = state["mu"] * group["momentum"] + update
            state["mu"].copy_(torch.where(found_inf > 0, state["mu"], mu))
            param.copy_(torch.where(found_inf > 0, param, param - group["lr"] * state["mu"]))
