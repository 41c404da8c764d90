"""One optimizer step: precision, gradient accumulation, loss scaling, clipping."""

import contextlib
import math
from collections.abc import Callable

import torch
from timm.utils import ModelEmaV3
from torch import nn


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """--amp (auto, bf16, fp16, off) -> the dtype to compute in, None for float32.

    auto: bf16 where the device computes in it; else fp16, with loss scaling, on CUDA; else float32.
    """
    if amp == "auto":
        if device.type == "cuda":
            amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            amp = "bf16" if device.type == "cpu" and _cpu_computes_bf16() else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def _cpu_computes_bf16() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # absent in old releases
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class Step:
    """Forward and backward in the chosen precision; every `accum_iter`-th call updates the weights.

    An update whose gradient is not finite on any rank is left out: by loss scaling with fp16, else here.

    Nothing here waits for the device where the optimizer can leave out an update there, as fused ones and LARS can; for
    others the host reads one value an update. `grad_norm` is the norm of the last update's gradient before clipping to
    `clip_grad`, a maximum norm; it stays on the device, and is NaN before the first update. With fp16 it is not finite
    where loss scaling overflowed, which is no fault.

    `average` follows the weights, a step behind each update, on the device; an update that is left out there adds the
    weights as they are once more.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        dtype: torch.dtype | None = None,
        accum_iter: int = 1,
        clip_grad: float | None = None,
        average: ModelEmaV3 | None = None,
    ) -> None:
        self.model, self.optimizer, self.average = model, optimizer, average
        self.accum_iter, self.clip_grad = accum_iter, clip_grad
        self.device, self.dtype = device, dtype
        # only fp16 has too few exponent bits for small gradients; disabled, the scaler passes everything through
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self.skips = not self.scaler.is_enabled()  # here; a norm that is not finite is a fault then
        self.on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        self.grad_norm = torch.full((), math.nan, device=device)
        self.under_way = self.dropped = False  # passes since the last update; whether the next update is left out

    def __call__(self, forward: Callable[[], torch.Tensor], update: bool) -> torch.Tensor:
        """`forward()` -> scalar loss; add its gradients, and with `update` take the optimizer step. Returns the loss,
        detached, on the device.
        """
        sync = contextlib.nullcontext()
        if not update and isinstance(self.model, nn.parallel.DistributedDataParallel):
            sync = self.model.no_sync()  # gradients travel once per optimizer step, with its last backward
        with sync:
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                loss = forward()
            self.scaler.scale(loss / self.accum_iter).backward()
        self.under_way = not update
        if update:
            self._update()
        return loss.detach()

    def drop(self) -> None:
        """Forget all gradients, and leave out the update that is under way: its weights are others by now."""
        self.optimizer.zero_grad()
        self.grad_norm = torch.zeros_like(self.grad_norm)
        self.dropped = self.under_way

    def _update(self) -> None:
        if self.dropped:
            self.optimizer.zero_grad()
            self.dropped = False
            return
        self.scaler.unscale_(self.optimizer)
        if self.clip_grad is not None:
            self.grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        else:
            grads = [param.grad for param in self.model.parameters() if param.grad is not None]
            self.grad_norm = nn.utils.get_total_norm(grads)
        if self.skips and self.on_device:  # the way of torch's loss scaling
            self.optimizer.grad_scale = None
            self.optimizer.found_inf = (~self.grad_norm.isfinite()).float()
        elif self.skips and not self.grad_norm.isfinite():  # DDP has averaged the gradients, so all ranks agree
            self.optimizer.zero_grad()
            return
        self.scaler.step(self.optimizer)  # skips the step where scaled gradients overflowed
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.model)
