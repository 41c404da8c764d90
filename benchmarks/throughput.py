"""How fast a training step is: python -m benchmarks.throughput --models mae_vit_large_patch16

Synthetic images stay on the device, so nothing but the step is measured. Rivals of a pretraining model:
  ours, compiled          the step of main_pretrain.py with compiled blocks, the default on CUDA
  ours, eager             the same with --compile off, the default elsewhere
  ours, compiled whole    the same, compiled as one model instead of block by block
  as the original trains  its habits on today's torch: see benchmarks/rivals.py
  Hugging Face            ViTMAEForPreTraining: sdpa, bf16, fused AdamW
  Hugging Face, compiled  the same under torch.compile
and of a classifier (fine-tuning) `ours, compiled`, `ours, eager` and `as the original trains`. Figures are medians over
rounds that take the rivals in turn. TFLOP/s counts what the method needs (util/flops.py), equal for all rivals; `of
matmul` is its share of the rate that one large bf16 matrix product reaches on the same device.
"""

import argparse
import functools
import gc
import time
from collections.abc import Callable

import torch

import models_mae
import models_vit
from benchmarks import common, rivals
from util import flops

PRETRAINING = {
    "ours, compiled": functools.partial(rivals.pretraining_step, compile_="on"),
    "ours, eager": functools.partial(rivals.pretraining_step, compile_="off"),
    "ours, compiled whole": rivals.pretraining_step_compiled_whole,
    "as the original trains": rivals.as_the_original_trains,
    "Hugging Face": functools.partial(rivals.hugging_face_step, compile_=False),
    "Hugging Face, compiled": functools.partial(rivals.hugging_face_step, compile_=True),
}
FINETUNING = {
    "ours, compiled": functools.partial(rivals.finetuning_step, compile_="on"),
    "ours, eager": functools.partial(rivals.finetuning_step, compile_="off"),
    "as the original trains": rivals.as_the_original_trains,
}


def main() -> None:
    """Measure all rivals of all models, print one table."""
    args = get_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matmul_tflops = matmul_rate(args.matmul or (8192 if device.type == "cuda" else 2048), device)
    rows = []
    for name in args.models:
        rows += measure(name, args, device, matmul_tflops)
    where = {**common.machine(device), "bf16 matrix product": f"{matmul_tflops:.4g} TFLOP/s"}
    common.report(rows, where, args.json)


def get_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = [*models_mae.MODELS, *models_vit.MODELS]
    add("--models", nargs="+", default=["mae_vit_tiny_patch16"], choices=names, metavar="NAME",
        help=f"any of {', '.join(names)} (default: mae_vit_tiny_patch16)")  # fmt: skip
    add("--batch_size", type=int, default=64, help="images a step (default: 64)")
    add("--steps", type=int, default=10, help="steps a measurement (default: 10)")
    add("--only", nargs="+", default=None, choices=list(PRETRAINING), metavar="RIVAL",
        help="measure these alone (default: all)")  # fmt: skip
    add("--matmul", type=int, default=0, metavar="SIDE",
        help="side of the matrix product that is the limit (default: 8192 on CUDA, else 2048)")  # fmt: skip
    common.add_options(parser, rounds=7)
    return parser.parse_args()


def measure(name: str, args: argparse.Namespace, device: torch.device, matmul_tflops: float) -> list[dict]:
    """One row for each rival of one model."""
    is_mae = name in models_mae.MODELS
    builders = {key: build for key, build in (PRETRAINING if is_mae else FINETUNING).items()
                if args.only is None or key in args.only}  # fmt: skip
    contenders = {
        key: Contender(functools.partial(build, name, device), args, device) for key, build in builders.items()
    }
    figures = common.measure_in_turn(contenders, args.rounds)
    flops_per_image = 6 * forward_macs(name)
    rows = []
    for key, rates in figures.items():
        rate = common.median(rates)
        tflops = rate and rate * flops_per_image / 1e12
        base = common.median(figures.get("as the original trains", []))
        row = {"model": name, "step": key, "images/s": rate, "x original": rate and base and rate / base}
        row |= {"TFLOP/s": tflops, "of matmul": tflops and tflops / matmul_tflops}
        row |= {"peak GB": contenders[key].peak_gb, "first step s": contenders[key].first_step_seconds}
        rows.append(row)
    del contenders
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


class Contender:
    """A rival's step, built at its first call; each call returns images/s of `args.steps` steps.

    `first_step_seconds` includes compilation. `peak_gb` is the device memory of this rival alone, of 10^9 bytes.
    """

    def __init__(self, build: Callable[[], rivals.TrainStep], args: argparse.Namespace, device: torch.device) -> None:
        self.build, self.n_steps, self.batch_size, self.device = build, args.steps, args.batch_size, device
        self.step: rivals.TrainStep | None = None
        self.state_bytes = 0
        self.peak_gb = self.first_step_seconds = None

    def __call__(self) -> float:
        cuda = self.device.type == "cuda"
        before = torch.cuda.memory_allocated() if cuda else 0
        first = self.step is None
        if first:
            self.step = self.build()
            self.imgs = torch.randn(self.batch_size, 3, 224, 224, device=self.device)
            self.first_step_seconds = self._time(1)
            self.state_bytes = torch.cuda.memory_allocated() - before if cuda else 0
            before += self.state_bytes
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = self._time(self.n_steps)
        if cuda:
            # what others keep allocated is not this rival's
            self.peak_gb = (torch.cuda.max_memory_allocated() - before + self.state_bytes) / 1e9
        return self.n_steps * self.batch_size / seconds

    def _time(self, n_steps: int) -> float:
        start = time.perf_counter()
        for _ in range(n_steps):
            self.step(self.imgs)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def forward_macs(name: str) -> float:
    """Multiply-adds of a forward pass, per image, at mask ratio 0.75."""
    if name in models_vit.MODELS:
        return flops.classifier_macs(models_vit.MODELS[name]())
    mae = models_mae.MODELS[name]()
    return sum(flops.pretrain_macs(mae, models_mae.kept_patches(mae.patch_embed.num_patches, 0.75)))


def matmul_rate(side: int, device: torch.device) -> float:
    """TFLOP/s of a bf16 product of two square matrices: the median of ten."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(13):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / common.median(seconds[3:]) / 1e12


if __name__ == "__main__":
    main()
