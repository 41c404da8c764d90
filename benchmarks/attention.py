"""Which attention is faster: python -m benchmarks.attention

Forward and backward of the models' attention, [N, heads, tokens, width of a head], in float32 and bf16, by
  fused  torch's scaled_dot_product_attention
  plain  two products and a softmax, which write out the matrix of attention
Figures are milliseconds, medians over rounds that take both in turn. util/speed.py chooses by them.
"""

import argparse
import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import common

SHAPES = {
    "ViT-B's encoder": (8, 12, 50, 64),
    "decoder": (8, 16, 197, 32),
    "ViT-B, whole image": (8, 12, 197, 64),
    "ViT-B, 448 pixels": (2, 12, 785, 64),
    "ViT-H, whole image": (4, 16, 257, 80),
    "tiny_patch4's decoder": (64, 4, 65, 16),
}


def main() -> None:
    """Measure both ways for all shapes, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_options(parser, rounds=9)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            ways = {"fused": F.scaled_dot_product_attention, "plain": plain}
            inputs = [torch.randn(*shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
            timed = {way: functools.partial(milliseconds, attend, inputs) for way, attend in ways.items()}
            figures = {way: common.median(values) for way, values in common.measure_in_turn(timed, args.rounds).items()}
            rows.append({"attention": f"{name}, {str(dtype).removeprefix('torch.')}", "shape": str(shape)}
                        | {f"{way} ms": figure for way, figure in figures.items()}
                        | {"fused / plain": figures["fused"] / figures["plain"]})  # fmt: skip
    common.report(rows, common.machine(device), args.json)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[N, heads, tokens, width] three times -> [N, heads, tokens, width]."""
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return weights.softmax(dim=-1) @ v


def milliseconds(attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> float:
    """Of ten times forward and backward."""
    device = inputs[0].device
    start = time.perf_counter()
    for _ in range(10):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=inputs[0].dtype is torch.bfloat16):
            out = attend(*inputs)
        torch.autograd.grad(out.sum(), inputs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 100 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
