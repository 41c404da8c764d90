"""How fast a training step is: python -m benchmarks.throughput --models mae_vit_large_patch16

Synthetic images stay on the device, so nothing but the step is measured. Rivals of a pretraining model:
  ours, compiled          the step of main_pretrain.py with compiled blocks, the default on CUDA
  ours, eager             the same with --compile off, the default elsewhere
  ours, compiled whole    the same, compiled as one model instead of block by block
  ours, CUDA graphs       the same, replayed from CUDA graphs, which costs the host next to nothing (on CUDA alone)
  as the original trains  its habits on today's torch: see benchmarks/rivals.py
  Hugging Face            ViTMAEForPreTraining: sdpa, bf16, fused AdamW
  Hugging Face, compiled  the same under torch.compile
and of a classifier (fine-tuning) `ours, compiled`, `ours, eager` and `as the original trains`. Figures are medians over
rounds that take the rivals in turn; with --one_by_one a rival has all its rounds in a row and leaves the device before
the next, for models whose rivals do not fit in its memory together. TFLOP/s counts what the method needs
(util/flops.py), equal for all rivals; `of matmul` is its share of the rate that one large bf16 matrix product reaches
on the same device.
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
    "ours, CUDA graphs": functools.partial(rivals.pretraining_step_compiled_whole, mode="reduce-overhead"),
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


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, or the words of another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = [*models_mae.MODELS, *models_vit.MODELS]
    add("--models", nargs="+", default=["mae_vit_tiny_patch16"], choices=names, metavar="NAME",
        help=f"any of {', '.join(names)} (default: mae_vit_tiny_patch16)")  # fmt: skip
    add("--batch_size", type=int, default=64, help="images a step (default: 64)")
    add("--steps", type=int, default=10, help="steps a measurement (default: 10)")
    add("--skip", nargs="+", default=[], choices=list(PRETRAINING), metavar="RIVAL",
        help="leave these out (default: none)")  # fmt: skip
    add("--one_by_one", action="store_true", help="free the memory of a rival before the next (default: off)")
    add("--matmul", type=int, default=0, metavar="SIDE",
        help="side of the matrix product that is the limit (default: 8192 on CUDA, else 2048)")  # fmt: skip
    common.add_options(parser, rounds=7)
    return parser.parse_args(argv)


def measure(name: str, args: argparse.Namespace, device: torch.device, matmul_tflops: float) -> list[dict]:
    """One row for each rival of one model."""
    builders = PRETRAINING if name in models_mae.MODELS else FINETUNING
    macs, size = forward_macs(name)
    imgs = torch.randn(args.batch_size, 3, *size, device=device)
    contenders = {
        key: Contender(functools.partial(build, name, device), imgs, args.steps)
        for key, build in builders.items()
        if key not in args.skip and (device.type == "cuda" or key != "ours, CUDA graphs")
    }
    groups = [{key: contender} for key, contender in contenders.items()] if args.one_by_one else [contenders]
    figures: dict[str, list[float]] = {}
    for group in groups:
        figures |= common.measure_in_turn(group, args.rounds)
        for contender in group.values():
            contender.leave()
        torch._dynamo.reset()  # compiled code of the group
    flops_per_image = 6 * macs
    rows = []
    for key, rates in figures.items():
        rate = common.median(rates)
        tflops = rate and rate * flops_per_image / 1e12
        base = common.median(figures.get("as the original trains", []))
        row = {"model": name, "step": key, "images/s": rate, "x original": rate and base and rate / base}
        row |= {"TFLOP/s": tflops, "of matmul": tflops and tflops / matmul_tflops}
        row |= {"peak GB": contenders[key].peak_gb, "first step s": contenders[key].first_step_seconds}
        rows.append(row)
    return rows


class Contender:
    """A rival's step, built at its first call; each call returns images/s of `n_steps` steps.

    `first_step_seconds` includes compilation. `peak_gb` is the device memory of this rival alone, of 10^9 bytes.
    """

    def __init__(self, build: Callable[[], rivals.TrainStep], imgs: torch.Tensor, n_steps: int) -> None:
        self.build, self.imgs, self.n_steps = build, imgs, n_steps
        self.cuda = imgs.device.type == "cuda"
        self.step: rivals.TrainStep | None = None
        self.peak_gb = self.first_step_seconds = None

    def __call__(self) -> float:
        first = self.step is None
        others = torch.cuda.memory_allocated() if self.cuda else 0
        if first:
            self.step = self.build()
            self.first_step_seconds = self._time(1)
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()  # compiling tries kernels, which takes memory of its own
        seconds = self._time(self.n_steps)
        if first and self.cuda:
            self.peak_gb = (torch.cuda.max_memory_allocated() - others) / 1e9
        return self.n_steps * len(self.imgs) / seconds

    def leave(self) -> None:
        """Free what the step holds."""
        self.step = None
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def _time(self, n_steps: int) -> float:
        start = time.perf_counter()
        for _ in range(n_steps):
            self.step(self.imgs)
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def forward_macs(name: str) -> tuple[float, tuple[int, int]]:
    """(Multiply-adds of a forward pass, per image, at mask ratio 0.75; the model's image size in pixels)."""
    if name in models_vit.MODELS:
        model = models_vit.MODELS[name]()
        return flops.classifier_macs(model), model.patch_embed.img_size
    mae = models_mae.MODELS[name]()
    n_kept = models_mae.kept_patches(mae.patch_embed.num_patches, 0.75)
    return sum(flops.pretrain_macs(mae, n_kept)), mae.patch_embed.img_size


def matmul_rate(side: int, device: torch.device) -> float:
    """TFLOP/s of a bf16 product of two square matrices: the median over the second half of two seconds or more."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    products = 20 if device.type == "cuda" else 1  # so that waiting for the device costs nothing
    seconds, begin = [], time.perf_counter()
    while len(seconds) < 20 or time.perf_counter() - begin < 2:  # a device that was idle is at other clocks
        start = time.perf_counter()
        for _ in range(products):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 * products / common.median(seconds[len(seconds) // 2 :]) / 1e12


if __name__ == "__main__":
    main()
