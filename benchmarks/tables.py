"""The tables of BENCHMARKS.md, from measurement to Markdown: python -m benchmarks.tables

Measures the runs that this machine is for (those of a GPU where there is one, else those of a CPU), writes each one's
figures to benchmarks/results/RUN.json, and fills the tables of BENCHMARKS.md from all such files; what was not measured
stays empty. `python -m benchmarks.tables RUN ...` measures these runs alone, --fill none. With --results FOLDER the
files go there, and the tables stay as they are.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.attention import SHAPES
from benchmarks.throughput import FINETUNING, PRETRAINING

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Run:
    """One command, `VARIABLE=VALUE python -m benchmarks.MODULE OPTIONS`, and what is shown of it.

    `label` stands in the first cell of its rows, which are those of the command's own rows that `rows` names.
    """

    label: str
    rows: tuple[str, ...]
    module: str
    options: str
    variables: str = ""

    @property
    def command(self) -> str:
        """As typed in a shell."""
        return f"{self.variables} python -m benchmarks.{self.module} {self.options}".strip()

    def measure(self, path: Path, on_cpu: bool) -> None:
        """Run the command, which writes its figures to `path`. Raises CalledProcessError where it fails."""
        variables = dict(pair.split("=") for pair in self.variables.split())
        if on_cpu:
            variables["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", f"benchmarks.{self.module}", *shlex.split(self.options), "--json", str(path)]
        subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=True)


@dataclass(frozen=True)
class Table:
    """Runs, one below the other, and the columns: title -> (key in the JSON file's rows, how a figure is written)."""

    runs: dict[str, Run]
    key: str  # of a row's name
    columns: dict[str, tuple[str, Callable[[float], str]]]


def _step(model: str, batch_size: int, options: str = "", leave_out: tuple[str, ...] = ()) -> Run:
    kind, builders = ("", PRETRAINING) if model.startswith("mae") else ("fine-tuning ", FINETUNING)
    rows = tuple(row for row in builders if row not in leave_out)
    return Run(f"{kind}`{model}`, {batch_size}", rows, "throughput",
               f"--models {model} --batch_size {batch_size} {options}".strip())  # fmt: skip


# CUDA graphs save the host's time, of which large models need little; ViT-H as a whole takes minutes to compile
_GRAPHS, _WHOLE = "ours, CUDA graphs", "ours, compiled whole"
_GPU_STEPS = {
    "gpu_base": _step("mae_vit_base_patch16", 256),
    "gpu_large": _step("mae_vit_large_patch16", 256, f"--one_by_one --skip '{_GRAPHS}'", (_GRAPHS,)),
    "gpu_huge": _step("mae_vit_huge_patch14", 128, f"--one_by_one --skip '{_WHOLE}' '{_GRAPHS}'", (_WHOLE, _GRAPHS)),
    "gpu_finetune_base": _step("vit_base_patch16", 128, "--one_by_one"),
    "gpu_finetune_large": _step("vit_large_patch16", 128, "--one_by_one"),
    "gpu_finetune_huge": _step("vit_huge_patch14", 64, "--one_by_one"),
}
_CPU_STEPS = {
    "cpu_tiny": _step("mae_vit_tiny_patch16", 8, "--steps 2", (_GRAPHS,)),
    "cpu_base": _step("mae_vit_base_patch16", 8, "--steps 1", (_GRAPHS,)),
    "cpu_finetune_base": _step("vit_base_patch16", 4, "--steps 1"),
}
_CPU_ATTENTION = {
    "cpu_attention": Run(
        "forward and backward",
        tuple(f"{name}, {dtype}" for name in SHAPES for dtype in ("float32", "bfloat16")),
        "attention",
        "",
    )
}
_LOADERS = ("plain", "timm", "ours, uint8", "ours", "decode alone")
_STEPS = ("ours + step", "synthetic + step")
_ON_GPU = "--images 20480 --batch_size 128 --num_workers 16 --rounds 3"
_GPU_LOADERS = {
    "gpu_loader": Run("pretraining", (*_LOADERS[:4], "ours, GPU", _LOADERS[4], *_STEPS), "dataloader",
                      f"{_ON_GPU} --model mae_vit_large_patch16"),
    "gpu_loader_finetune": Run("fine-tuning", _LOADERS, "dataloader", f"{_ON_GPU} --recipe finetune"),
}  # fmt: skip
_ON_ONE_CORE = "--images 256 --num_workers 0 --rounds 5"
_CPU_LOADERS = {
    "cpu_loader": Run("pretraining", _LOADERS, "dataloader", _ON_ONE_CORE, "OMP_NUM_THREADS=1"),
    "cpu_loader_finetune": Run(
        "fine-tuning", _LOADERS, "dataloader", f"{_ON_ONE_CORE} --recipe finetune", "OMP_NUM_THREADS=1"
    ),
}
_CPU_DECODERS = {
    "cpu_decoders": Run("JPEG", ("Pillow", "simplejpeg", "torchvision", "TorchCodec", "ours"), "decoders", "",
                        "OMP_NUM_THREADS=1")
}  # fmt: skip

_rate, _ratio, _share = "{:,.0f}".format, "{:.2f}".format, "{:.0%}".format
_STEP_COLUMNS = {
    "images/s": ("images/s", lambda rate: f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"),
    "x original": ("x original", _ratio),
    "TFLOP/s": ("TFLOP/s", lambda rate: f"{rate:.0f}" if rate >= 10 else f"{rate:.2f}"),
    "of matmul": ("of matmul", _share),
    "first step, s": ("first step s", "{:.1f}".format),
}
_ATTENTION_COLUMNS = {
    "fused, ms": ("fused ms", "{:.1f}".format),
    "plain, ms": ("plain ms", "{:.1f}".format),
    "fused / plain": ("fused / plain", _ratio),
}
_LOADER_COLUMNS = {"images/s": ("images/s", _rate), "x plain": ("x plain", _ratio),
                   "of the limit": ("share of the limit", _share)}  # fmt: skip
_DECODER_COLUMNS = {"images/s": ("images/s", _rate), "x Pillow": ("x Pillow", _ratio), "from": ("from", _ratio),
                    "to": ("to", _ratio)}  # fmt: skip
TABLES = {
    "gpu-step": Table(_GPU_STEPS, "step", _STEP_COLUMNS | {"peak GB": ("peak GB", "{:.1f}".format)}),
    "gpu-loader": Table(_GPU_LOADERS, "loader", _LOADER_COLUMNS),
    "cpu-step": Table(_CPU_STEPS, "step", _STEP_COLUMNS),
    "cpu-attention": Table(_CPU_ATTENTION, "attention", _ATTENTION_COLUMNS),
    "cpu-loader": Table(_CPU_LOADERS, "loader", _LOADER_COLUMNS),
    "cpu-decoders": Table(_CPU_DECODERS, "decoder", _DECODER_COLUMNS),
}
RUNS = {name: run for table in TABLES.values() for name, run in table.runs.items()}


def main(argv: list[str] | None = None) -> None:
    """Measure what is asked for, then fill the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help=f"any of {', '.join(RUNS)} (default: those of this machine's kind)")
    add("--fill", action="store_true", help="measure nothing, fill the tables from the files (default: off)")
    add(
        "--results",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        help="folder of the files; with another one, --fill alone changes BENCHMARKS.md (default: benchmarks/results)",
    )
    args = parser.parse_args(argv)
    if unknown := set(args.runs) - RUNS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: no such run; see --help")
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    runs = args.runs or [name for name in RUNS if name.startswith(kind)]
    if kind == "cpu" and any(name.startswith("gpu") for name in runs):
        parser.error("there is no CUDA GPU for the runs that begin with gpu_")
    failed = []
    for name in [] if args.fill else runs:
        print(f"\n{name}: {RUNS[name].command}", flush=True)
        try:
            RUNS[name].measure(args.results / f"{name}.json", on_cpu=name.startswith("cpu"))
        except subprocess.CalledProcessError:
            failed.append(name)
    # another folder need not have all figures that are shown
    if args.fill or args.results.resolve() == parser.get_default("results").resolve():
        document = ROOT / "BENCHMARKS.md"
        document.write_text(fill(document.read_text(), args.results))
    if failed:
        sys.exit(f"these failed, and their cells are as before: {', '.join(failed)}")


def fill(text: str, results: Path) -> str:
    """A document -> the same, with each table between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        inside = begin + markdown(table, results) + end
        text, n = re.subn(re.escape(begin) + ".*?" + re.escape(end), lambda _: inside, text, flags=re.DOTALL)  # noqa: B023
        assert n == 1, f"BENCHMARKS.md needs the marks {begin.strip()} and {end}, once"
    return text


def markdown(table: Table, results: Path) -> str:
    """The table, with one line for each run below it: its command, where and when it ran."""
    lines = [["what", table.key, *table.columns], ["---"] * (2 + len(table.columns))]
    notes = []
    for name, run in table.runs.items():
        path = results / f"{name}.json"
        measured = json.loads(path.read_text()) if path.exists() else {"rows": []}
        if shlex.split(measured.get("command", "")) != shlex.split(run.command.removeprefix(run.variables)):
            measured = {"rows": []}  # figures of another command
        rows = {row[table.key]: row for row in measured["rows"]}
        for i, row in enumerate(run.rows):
            figures = [(rows.get(row, {}).get(key), write) for key, write in table.columns.values()]
            cells = ["" if figure is None else write(figure) for figure, write in figures]
            lines.append(["" if i else run.label, row, *cells])
        where = "not measured"
        if rows:
            where = f"{measured['date']}, {measured['device']}, {measured['versions']}"
            if "bf16 matrix product" in measured:
                where += f"; a bf16 matrix product {measured['bf16 matrix product']}"
        notes.append(f"* `{run.command}`: {where}")
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", *notes]) + "\n"


if __name__ == "__main__":
    main()
