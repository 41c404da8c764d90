"""From a row to commands, and from commands to numbers. A stage is one run of a script; rows share those they can."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import main_finetune
import main_linprobe
import main_pretrain
from experiments.tables import FINE_TUNED, LINEAR, SCALES, Options, Row, options

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"pretrain": main_pretrain, "finetune": main_finetune, "linprobe": main_linprobe}
NODES = {"pretrain": 8, "finetune": 4, "linprobe": 4}  # of 8 GPUs, for submitit; torchrun gets one node


@dataclass(frozen=True)
class Stage:
    """A run of main_`script`.py with these options, on from the weights of the stage `after`."""

    script: str
    chosen: tuple[tuple[str, str], ...]
    after: "Stage | None" = None

    @property
    def name(self) -> str:
        """Its folder: the same options give the same name, others another."""
        said = json.dumps([self.script, sorted(self.chosen), self.after and self.after.name])
        return f"{self.script}-{hashlib.sha256(said.encode()).hexdigest()[:10]}"

    @property
    def epochs(self) -> int:
        """How many it trains."""
        return int(dict(self.chosen)["epochs"])

    def checkpoint(self, root: Path | str) -> str:
        """What it leaves for the stages after it."""
        return os.path.join(root, self.name, f"checkpoint-{self.epochs - 1}.pth")

    def unknown(self) -> list[str]:
        """Its options that this version's script lacks."""
        known = {word for action in SCRIPTS[self.script].get_args_parser()._actions for word in action.option_strings}
        return [f"--{name}" for name, _ in self.chosen if f"--{name}" not in known and name != "effective_batch"]

    def words(self, root: Path | str, processes: int = 1, folder_option: str = "--output_dir") -> list[str]:
        """Its options as words, for `processes` of them; its folder lies below `root`."""
        chosen = dict(self.chosen)
        if batch := int(chosen.pop("effective_batch", 0)):
            chosen["accum_iter"] = str(batch // (int(chosen["batch_size"]) * processes))
        words = [word for name, value in chosen.items() for word in (f"--{name}", *shlex.split(value))]
        if self.after:
            words += ["--finetune", self.after.checkpoint(root)]
        return [*words, folder_option, os.path.join(root, self.name)]


def stages_of(row: Row, scale: str, seed: int, times: float = 1.0) -> dict[str, Stage]:
    """Which number comes from which stage; {} where the scale has no such row. `times`: factor of all epochs."""
    own, base = getattr(row, scale), SCALES[scale]
    if own is None:
        return {}

    def merged(*parts: Options) -> tuple[tuple[str, str], ...]:
        chosen: Options = {}
        for part in parts:
            chosen |= part
        if times != 1:
            chosen["epochs"] = str(max(round(int(chosen["epochs"]) * times), 1))
            chosen["warmup_epochs"] = str(float(chosen["warmup_epochs"]) * times)
        return tuple((chosen | {"seed": str(seed)}).items())

    pretrain = Stage("pretrain", merged(base.pretrain, options(own))) if row.pretrain else None
    found = {}
    for metric, script, of_row in ((FINE_TUNED, "finetune", row.finetune), (LINEAR, "linprobe", row.linprobe)):
        if of_row is not None:
            chosen = merged(getattr(base, script), options(of_row.get(scale, "")))
            found[metric] = Stage(script, chosen, pretrain)
    return found


def commands(stage: Stage, launcher: str, root: str) -> list[str]:
    """A stage on ImageNet, after those it needs, as shell commands: `launcher` torchrun (one node) or submitit."""
    before = commands(stage.after, launcher, root) if stage.after else []
    data = ["--data_path", "/path/to/imagenet"]
    if launcher == "submitit":
        nodes = NODES[stage.script]
        start = ["python", f"submitit_{stage.script}.py", "--nodes", str(nodes), "--ngpus", "8"]
        words = stage.words(root, 8 * nodes, "--job_dir")  # which is the folder of checkpoints and logs as well
    else:
        start = ["torchrun", "--nproc_per_node=8", f"main_{stage.script}.py"]
        words = stage.words(root, 8) + ["--log_dir", os.path.join(root, stage.name), "--resume", "auto"]
    return [*before, shlex.join([*start, *data, *words])]


class FailedStage(RuntimeError):
    """A script left with an error; the message ends with its last lines."""


class Runner:
    """Runs stages on digits, each once, in subprocesses that a signal stops and that go on where they stopped."""

    def __init__(self, root: Path, data: Path, tokenizer: Path, threads: int) -> None:
        self.root, self.data, self.tokenizer = root, data, tokenizer
        # waiting threads sleep: spinning, they would keep the others from running
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        self.locks: dict[str, threading.Lock] = {}
        self.guard, self.children, self.stopped = threading.Lock(), set(), False

    def accuracy(self, stage: Stage) -> float:
        """Of its last epoch, in %, with the averaged weights where there are some; runs what it needs first."""
        last = self._done(stage) or self._run(stage)
        averaged = [name for name in last if "ema" in name and "acc1" in name]
        return last[averaged[0] if averaged else "test_acc1"]

    def stop(self) -> None:
        """Tell the scripts that run to save and leave; no other starts."""
        with self.guard:
            self.stopped = True
            for child in self.children:
                child.terminate()

    def _done(self, stage: Stage) -> dict | None:
        """The last epoch's line of log.txt, if there is one."""
        log = self.root / stage.name / "log.txt"
        lines = log.read_text().splitlines() if log.exists() else []
        last = json.loads(lines[-1]) if lines else {}
        whole = last.get("epoch") == stage.epochs - 1
        return last if whole and (stage.after or Path(stage.checkpoint(self.root)).exists()) else None

    def _run(self, stage: Stage) -> dict:
        with self.guard:
            lock = self.locks.setdefault(stage.name, threading.Lock())
        with lock:  # another row may have run it meanwhile
            if (last := self._done(stage)) is not None:
                return last
            if stage.after and self._done(stage.after) is None:
                self._run(stage.after)
            folder = self.root / stage.name
            folder.mkdir(parents=True, exist_ok=True)
            words = [word.replace("{tokenizer}", str(self.tokenizer)) for word in stage.words(self.root)]
            command = [sys.executable, str(ROOT / f"main_{stage.script}.py"), "--data_path", str(self.data), *words]
            with open(folder / "output.txt", "a") as output:
                with self.guard:
                    if self.stopped:
                        raise FailedStage("stopped")
                    child = subprocess.Popen(
                        [*command, "--resume", "auto"], stdout=output, stderr=output, env=self.environment, cwd=ROOT
                    )
                    self.children.add(child)
                code = child.wait()
                self.children.discard(child)
            if (last := self._done(stage)) is None:
                tail = "\n".join((folder / "output.txt").read_text().splitlines()[-5:])
                raise FailedStage(f"{shlex.join(command)} left with exit code {code}; {folder}/output.txt ends\n{tail}")
            return last
