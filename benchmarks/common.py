"""What both benchmarks share: rivals measured in turn, medians, one aligned table and a JSON file."""

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torchvision


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """--rounds and --json."""
    parser.add_argument("--rounds", type=int, default=rounds, help=f"measurements of each row (default: {rounds})")
    parser.add_argument("--json", type=Path, default=None, help="also write the results to this file (default: none)")


def measure_in_turn(rivals: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Name -> its figures, one a round. Each round calls all rivals, so that a drift of the machine meets them all.

    A first round warms up and does not count. A rival that raises RuntimeError (out of memory) or ImportError (its
    library is not here) has no figures.
    """
    figures: dict[str, list[float]] = {name: [] for name in rivals}
    failed: set[str] = set()
    for i in range(rounds + 1):
        for name, run in rivals.items():
            if name in failed:
                continue
            try:
                figure = run()
            except (RuntimeError, ImportError) as error:
                print(f"{name}: left out ({str(error).splitlines()[0]})", file=sys.stderr)
                failed.add(name)
                figures[name].clear()
            if name in failed:  # and not where the error still holds what it had
                getattr(run, "leave", lambda: None)()
                continue
            if i > 0:
                figures[name].append(figure)
            print(f"\rround {i} of {rounds}: {name:<60}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return figures


def median(figures: list[float]) -> float | None:
    """The median; None where there are no figures."""
    return statistics.median(figures) if figures else None


def machine(device: torch.device) -> dict[str, str]:
    """What a figure depends on beside the code: device, versions, command, date."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{torch.get_num_threads()} threads of {_cpu_name()}"
    words = sys.argv[1:]
    if "--json" in words:  # where the figures go says nothing of them
        del words[words.index("--json") : words.index("--json") + 2]
    return {
        "device": name,
        "versions": f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}, "
        f"Python {platform.python_version()}",
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *words]),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def report(rows: list[dict], where: dict[str, str], path: Path | None) -> None:
    """Print an aligned table of `rows` (equal keys; numbers and words) and write all to `path`, if given."""
    for name, value in where.items():
        print(f"{name}: {value}")
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_text = [isinstance(value, str) for value in rows[0].values()]
    print()
    for line in cells:
        columns = zip(line, widths, is_text, strict=True)
        print("  ".join(cell.ljust(width) if text else cell.rjust(width) for cell, width, text in columns))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")
        print(f"\nwritten to {path}")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
