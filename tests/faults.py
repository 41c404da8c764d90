"""Kill a run at random moments until it has ended, and compare its end with that of an undisturbed run, bit for bit.

    python tests/faults.py --kills 100 --processes 1

One process imports the scripts and forks a child for every life of the run, which costs milliseconds where a fresh
interpreter costs seconds. Half of the kills wait for a file that is being written. After every kill all checkpoints
must be readable; after the last life, all weights, moments and lines of log.txt must be those of the undisturbed run.
"""

import argparse
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent))

import torch
from helpers import ON_CPU, assert_same, load, write_image_folder

import main_pretrain
from util.run import exits
from util.run.files import checkpoints

OPTIONS = (
    "--model", "mae_vit_tiny_patch4", "--input_size", 16, "--batch_size", 1, "--accum_iter", 2, "--epochs", 2,
    "--warmup_epochs", 1, "--num_workers", 0, "--save_every", 1, "--save_minutes", 0.05 / 60, "--keep_last", 2,
    "--log_dir", "", "--resume", "auto", *ON_CPU,
)  # fmt: skip


def start(images: Path, output_dir: Path, processes: int, *more: object) -> list[int]:
    """Fork the processes of one life; their ids. They write what they say to `output_dir`.out."""
    args = (*OPTIONS, "--data_path", images, "--output_dir", output_dir, *more)
    args = main_pretrain.get_args_parser().parse_args([str(arg) for arg in args])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(processes):
        if child := os.fork():
            children.append(child)
            continue
        os.dup2(os.open(f"{output_dir}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        if processes > 1:
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {name: str(value) for name, value in variables.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        code = 1
        try:
            exits.run(main_pretrain.main, args)
            code = 0
        except SystemExit as leave:
            code = leave.code
        finally:
            sys.stdout.flush()
            os._exit(code)
    return children


def wait(children: list[int]) -> list[int]:
    """Exit codes of all of them; negative: the signal that ended it."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def live_and_kill(images: Path, output_dir: Path, processes: int, seconds: float, in_a_save: bool) -> bool:
    """One life, killed after `seconds`, or later while a file is being written; True if it ended before."""
    children = start(images, output_dir, processes)
    moment = time.monotonic() + seconds
    while time.monotonic() < moment or (in_a_save and not any(output_dir.glob("*.tmp"))):
        if ended(children, output_dir):
            return True
        time.sleep(0.0005)
    for child in children:
        os.kill(child, signal.SIGKILL)
    wait(children)
    return False


def live_and_ask(images: Path, output_dir: Path, processes: int, seconds: float, number: int, rank: int) -> bool:
    """One life, asked to leave by a signal to one of its processes, `seconds` after the first step; True if it ended
    before. All its processes must save and leave with exit code 75, within 20 seconds.
    """
    out = Path(f"{output_dir}.out")
    said_before = len(out.read_text()) if out.exists() else 0
    children = start(images, output_dir, processes)
    while not out.exists() or "Epoch: [" not in out.read_text()[said_before:]:
        if ended(children, output_dir):
            return True
        time.sleep(0.01)
    moment = time.monotonic() + seconds
    while time.monotonic() < moment:
        if ended(children, output_dir):
            return True
        time.sleep(0.001)
    os.kill(children[rank], number)
    codes = wait(children)
    assert time.monotonic() < moment + 20, "took too long to leave"
    assert set(codes) in ({0}, {75}), f"left with {codes}, see {output_dir}.out"  # 0: it came after the last step
    return set(codes) == {0}


def ended(children: list[int], output_dir: Path) -> bool:
    """True if the run has ended, as it should."""
    if not os.waitpid(children[0], os.WNOHANG)[0]:
        return False
    codes = [0, *wait(children[1:])]
    assert set(codes) == {0}, f"left by itself with {codes}, see {output_dir}.out"
    return True


def check_files(output_dir: Path) -> None:
    """Every checkpoint must be whole; half-written ones have another name."""
    for path in checkpoints(output_dir).values():
        load(path)


def assert_same_end(whole: Path, other: Path) -> None:
    """The last two checkpoints and log.txt are the same, but for the options that name folders."""
    for epoch in (0, 1):
        a, b = (load(folder / f"checkpoint-{epoch}.pth") for folder in (whole, other))
        for key in a.keys() - {"args"}:
            assert_same(a[key], b[key], key)
    assert (whole / "log.txt").read_text() == (other / "log.txt").read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how many lives to cut short (default: 100)")
    parser.add_argument("--processes", type=int, default=1, help="processes of the run (default: 1)")
    parser.add_argument("--by", default="KILL", help="the signal: KILL to all processes; or others, such as "
                        "TERM,USR1, to one of them, and all must save and leave together (default: KILL)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="decides the moments (default: 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        print(cut_short(Path(folder), args.kills, args.processes, args.by, random.Random(args.seed)))


def cut_short(folder: Path, kills: int, processes: int, by: str, draw: random.Random) -> str:
    """Runs until `kills` lives were cut short, each run to its end; what was done, in words."""
    images = write_image_folder(folder / "images", n_train=40, n_val=1)
    whole = folder / "whole"
    began = time.monotonic()
    assert set(wait(start(images, whole, processes))) == {0}, Path(f"{whole}.out").read_text()
    length = time.monotonic() - began
    print(f"undisturbed: {length:.1f} s", flush=True)
    done = runs = in_saves = 0
    while done < kills:
        runs += 1
        other = folder / f"run-{runs}"
        while True:
            seconds = draw.uniform(0, length / 3) if done < kills else 600
            if by == "KILL":
                at_end = live_and_kill(images, other, processes, seconds, done < kills and draw.random() < 0.5)
            else:
                number, rank = signal.Signals[f"SIG{draw.choice(by.split(','))}"], draw.randrange(processes)
                at_end = live_and_ask(images, other, processes, seconds, number, rank)
            if at_end:
                break
            done += 1
            in_saves += any(other.glob("*.tmp"))
            check_files(other)
        assert_same_end(whole, other)
    where = f"{in_saves} in a save, " if by == "KILL" else ""
    return f"{done} lives ended by {by}, {where}in {runs} runs of {processes} processes: all ended alike"


if __name__ == "__main__":
    main()
