"""The paper's tables and figures, each from one command: python -m experiments NAME.

At the scale `digits` they run here: a tiny model on scikit-learn's handwritten digits, several seeds. Killed and
started again, an experiment goes on where it was. It ends with a table and a plot. At the scale `imagenet`, --print
gives the commands.
"""

import argparse
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from experiments import digits, report
from experiments.stages import FailedStage, Runner, Stage, commands, stages_of
from experiments.tables import EXPERIMENTS, SCALES, Row
from util import cli
from util.dist import available_cores
from util.errors import UserError, shown


def get_args_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser("python -m experiments", add_help=False)
    add = parser.add_argument
    names = [*EXPERIMENTS, "all"]
    add("name", nargs="?", metavar="NAME", choices=names, help=f"one of {', '.join(names)}")
    add("--scale", default="digits", choices=list(SCALES), help="what is trained")
    add("--rows", default=None, nargs="+", metavar="ROW", help="of an experiment's rows these alone (default: all)")
    add("--seeds", default=None, type=cli.positive, metavar="N", help="seeds a row (default: 3; to print 1)")
    add("--list", action="store_true", help="list the experiments and their rows, and leave")
    add("--print", nargs="?", const="torchrun", choices=["torchrun", "submitit"], dest="launcher",
        help="print the commands for ImageNet, for torchrun on one node of 8 GPUs or for SLURM, and leave")  # fmt: skip
    add("--output", default="output_dir/experiments", metavar="DIR", help="for runs, results, tables and plots")
    add("--jobs", default=None, type=cli.positive, metavar="N", help="scripts at once (default: one a core)")
    add("--epochs_scale", default=1.0, type=cli.above_zero, metavar="X",
        help="times the epochs of each script, at least 1: to try it out")  # fmt: skip
    return parser


def main(args: argparse.Namespace) -> None:
    """Run, print or list experiments. Raises UserError for bad input."""
    if args.list:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:<9} {experiment.title}: {'; '.join(row.name for row in experiment.rows)}")
        return
    if not args.name:
        raise UserError(f"no experiment is named: give one of {', '.join(EXPERIMENTS)}, or all")
    names = list(EXPERIMENTS) if args.name == "all" else [args.name]
    if args.launcher:
        print_commands(names, args.launcher, args.seeds or 1, args.rows)
    elif args.scale == "imagenet":
        raise UserError("--scale imagenet needs a cluster: pass --print torchrun or --print submitit, and run that")
    else:
        run_on_digits(names, args)


Rows = list[tuple[Row, dict[int, dict[str, Stage]]]]  # with the stages by seed and metric


def _rows(name: str, scale: str, seeds: int, chosen: list[str] | None, times: float = 1.0) -> Rows:
    """Rows of the scale, or the chosen ones of them; those that this version cannot run are left out with a word."""
    found, lacking, rows = [], {}, EXPERIMENTS[name].rows
    if wrong := set(chosen or []) - {row.name for row in rows}:
        raise UserError(f"{name} has no row {shown(min(wrong))}: use {', '.join(row.name for row in rows)}")
    for row in rows:
        if chosen and row.name not in chosen:
            continue
        stages = {seed: stages_of(row, scale, seed, times) for seed in range(seeds)}
        unknown = [option for stage in stages[0].values() for option in stage.unknown()]
        if unknown:
            lacking[row.name] = unknown
        elif stages[0]:
            found.append((row, stages))
    if lacking:
        options = sorted({option for some in lacking.values() for option in some})
        print(f"# {name}: left out {', '.join(lacking)}, since the script has no {', '.join(options)}", flush=True)
    return found


def print_commands(names: list[str], launcher: str, seeds: int, chosen: list[str] | None = None) -> None:
    """Each row's commands for ImageNet, in an order in which each finds what it starts from; shared ones once."""
    said = set()
    for name in names:
        for row, by_seed in _rows(name, "imagenet", seeds, chosen):
            published = ", ".join(f"{metric} {value}" for metric, value in row.published.items() if value)
            print(f"\n# {name}, {row.name}" + (f" (published: {published})" if published else ""))
            for stages in by_seed.values():
                for stage in stages.values():
                    for command in commands(stage, launcher, "output_dir/experiments"):
                        print(command if command not in said else f"# shared: {command.split(' --data_path')[0]} …")
                        said.add(command)


class Results:
    """results.json of one experiment: rows -> metrics -> seeds -> the stage and its accuracy. Written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = json.loads(path.read_text())["rows"] if path.exists() else {}

    def get(self, row: str, metric: str, seed: int, stage: Stage) -> float | None:
        """None where it is not measured yet, or was with other options."""
        entry = self.rows.get(row, {}).get(metric, {}).get(str(seed))
        return entry["acc1"] if entry and entry["stage"] == stage.name else None

    def put(self, row: str, metric: str, seed: int, stage: Stage, acc1: float) -> None:
        """Note a number, and write the file."""
        self.rows.setdefault(row, {}).setdefault(metric, {})[str(seed)] = {"acc1": acc1, "stage": stage.name}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        half = self.path.with_suffix(".half")
        half.write_text(json.dumps({"rows": self.rows}, indent=1) + "\n")
        os.replace(half, self.path)


def run_on_digits(names: list[str], args: argparse.Namespace) -> None:
    """Run what is not measured yet, a progress line a row; then a table and a plot for each experiment."""
    seeds, output = args.seeds or 3, Path(args.output).resolve()
    jobs = args.jobs or available_cores()
    output.mkdir(parents=True, exist_ok=True)
    data = digits.written(output / "digits")
    tokenizer = output / "tokenizer.pt"
    digits.write_tokenizer(tokenizer, data)
    runner = Runner(output / "runs", data, tokenizer, max(available_cores() // jobs, 1))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for name in names:
                rows = _rows(name, "digits", seeds, args.rows, args.epochs_scale)
                _run_one(name, rows, seeds, output / name, runner, pool)
            tables = [output / name / "table.md" for name in EXPERIMENTS]
            shown = [f"{table.read_text()}\n![]({table.parent.name}/plot.png)\n" for table in tables if table.exists()]
            (output / "tables.md").write_text("\n".join(shown))
        except BaseException:  # also a signal: what runs saves and leaves, and goes on next time
            runner.stop()
            pool.shutdown(cancel_futures=True)
            raise


def _run_one(name: str, rows: Rows, seeds: int, folder: Path, runner: Runner, pool: ThreadPoolExecutor) -> None:
    experiment, results, start = EXPERIMENTS[name], Results(folder / "results.json"), time.monotonic()

    def measure(row: Row, seed: int, stages: dict[str, Stage]) -> list[tuple[str, Stage, float]]:
        known = {metric: results.get(row.name, metric, seed, stage) for metric, stage in stages.items()}
        return [
            (metric, stage, runner.accuracy(stage) if known[metric] is None else known[metric])
            for metric, stage in stages.items()
        ]

    tasks = {
        pool.submit(measure, row, seed, stages): (row, seed)
        for row, by_seed in rows
        for seed, stages in by_seed.items()
    }
    measured: report.Measured = {}
    done = 0
    for task in as_completed(tasks):
        row, seed = tasks[task]
        for metric, stage, acc1 in task.result():
            results.put(row.name, metric, seed, stage, acc1)
            measured.setdefault(row.name, {}).setdefault(metric, []).append(acc1)
        if all(len(values) == seeds for values in measured[row.name].values()):
            done += 1
            numbers = ", ".join(f"{metric} {report.spread(values)}" for metric, values in measured[row.name].items())
            minutes = (time.monotonic() - start) / 60
            print(f"{name}  {done}/{len(rows)}  {row.name}: {numbers}  ({minutes:.1f} min)", flush=True)
    if rows:
        shown = [row for row, _ in rows]
        command = f"python -m experiments {name} --seeds {seeds}"
        text = report.table(name, experiment, shown, measured, seeds, command)
        (folder / "table.md").write_text(text)
        report.plot(experiment, shown, measured).save(folder / "plot.png")
        print(f"\n{text}\n{folder / 'plot.png'}\n", flush=True)


if __name__ == "__main__":
    try:
        main(cli.parse(get_args_parser(), __doc__))
    except (UserError, FailedStage) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
