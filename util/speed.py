"""What makes a step fast without changing its mathematics: matmul settings, compilation, gradient checkpointing."""

import torch
from timm.layers import Attention, DropPath, use_fused_attn
from timm.models.vision_transformer import Block
from torch import nn

from util.log import log


def choose_kernels(model: nn.Module, dtype: torch.dtype | None, device: torch.device) -> None:
    """Fast kernels for computing in `dtype` (None: float32) on `device`.

    Where a lower precision was chosen, the float32 products that autocast leaves may use TF32. Attention is fused, but
    in bf16 on a CPU: there torch's fused kernel takes 1.2 to 10 times as long as two products and a softmax, in float32
    0.6 to 0.9 times (BENCHMARKS.md). cuDNN's timing of algorithms stays off: it would choose differently from run to
    run, and resuming be inexact.
    """
    torch.set_float32_matmul_precision("highest" if dtype is None else "high")
    torch.backends.cudnn.allow_tf32 = dtype is not None  # of convolutions: a classifier's patch projection
    fused = not (device.type == "cpu" and dtype is torch.bfloat16)
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = fused and use_fused_attn()


def prepare(model: nn.Module, compile_: str, grad_checkpointing: bool, device: torch.device) -> None:
    """Apply --compile (auto, on, off) and --grad_checkpointing to `model`, in place; names of parameters stay.

    Each transformer block is compiled by itself: all blocks of one width share their code, so the first step costs one
    compilation, not one a block. auto compiles on CUDA, and falls back to eager code where the compiler fails.
    """
    if grad_checkpointing:
        model.set_grad_checkpointing(True)
    if compile_ == "off" or (compile_ == "auto" and device.type != "cuda"):
        return
    torch._dynamo.config.suppress_errors = compile_ == "auto"
    # made for models compiled whole, it would cut each block that is larger than a bucket of DDP (ViT-B's and above)
    torch._dynamo.config.optimize_ddp = False
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        for name in ("drop_path1", "drop_path2"):
            if isinstance(module := getattr(block, name), DropPath):
                setattr(block, name, SharedDropPath(module.drop_prob, device))
        # encoder and decoder have lengths of their own, each worth code of its own: dynamic code would be slower
        block.compile(dynamic=False)
    log.info(f"{len(blocks)} blocks will be compiled in the first step, whose time in the log says what that costs")


class SharedDropPath(nn.Module):
    """[N, L, D] -> [N, L, D]: stochastic depth, as timm's DropPath, with the probability in a tensor.

    timm's is a Python number, another in each block, and the compiler makes new code for each: at the eighth it gives
    up, and the rest of the blocks run uncompiled.
    """

    def __init__(self, drop_prob: float, device: torch.device) -> None:
        super().__init__()
        self.keep = torch.tensor(1 - drop_prob, device=device)  # no buffer: DDP would send it in every step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Leave out samples at random, and scale the others so that the mean stays; in training alone."""
        if not self.training:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) < self.keep
        return x * (kept / self.keep).to(x.dtype)
