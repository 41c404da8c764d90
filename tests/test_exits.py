"""How scripts end: exit codes, and last words that are in train.log too and are said once."""

import argparse
import io
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ON_CPU, ROOT, _environment, torchrun, write_image, write_image_folder
from torch.utils.data import DataLoader

import main_pretrain
from util.data.datasets import Images, report_bad
from util.data.listing import list_images
from util.data.workers import batches, open_loader, worker_options
from util.dist import Dist, init_distributed, on_main
from util.errors import FailedError, NonFiniteLossError, NotSavedError, UserError
from util.log import log, setup_logging
from util.run import exits, slurm
from util.run.exits import Signals, Stopped

ENV = Dist(torch.device("cpu"))


def ending(error: Exception) -> int:
    """The exit code of a script whose main() raises `error`."""

    def main(args):
        with Signals(ENV):
            raise error

    with pytest.raises(SystemExit) as left:
        exits.run(main, argparse.Namespace())
    return left.value.code


@pytest.fixture
def train_log(tmp_path):
    """What train.log holds of a run into a new folder."""
    setup_logging(ENV, str(tmp_path))
    yield lambda: (tmp_path / "train.log").read_text()
    logging.getLogger("mae").handlers.clear()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("lower --batch_size"), 2, "lower --batch_size"),
        (NonFiniteLossError("loss nan"), 3, "loss nan"),
        (NotSavedError("the end could not be saved"), 1, "the end could not be saved"),
        (FailedError("a loader worker died"), 1, "a loader worker died"),
    ],
)
def test_last_words_are_on_the_terminal_and_in_train_log(error, code, words, train_log, capsys):
    assert ending(error) == code
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {words}") and said.out == "" and said.err.count("\n") == 1
    assert train_log().endswith(f" {said.err}")


# what a file may be called, and what of it may not reach a terminal
NAMES = {
    "latin-1": ("bad\udce9.png", "bad\\xe9.png"),
    "escape sequence": ("\x1b[2J\x07.png", "\\x1b[2J\\x07.png"),
    "C1 controls": ("\x9b31m.png", "\\x9b31m.png"),
    "right to left": ("\u202egnp.exe", "\\u202egnp.exe"),
    "two lines": ("a\nerror: b\r.png", "a\\nerror: b\\r.png"),
}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
@pytest.mark.parametrize("name", NAMES)
def test_names_are_escaped_and_never_lost_whatever_the_terminal_takes(name, encoding, tmp_path, monkeypatch):
    terminal = {stream: io.TextIOWrapper(io.BytesIO(), encoding) for stream in ("stdout", "stderr")}
    monkeypatch.setattr(sys, "stdout", terminal["stdout"])
    monkeypatch.setattr(sys, "stderr", terminal["stderr"])
    terminal["stderr"].reconfigure(errors="backslashreplace")  # as Python opens it everywhere
    given, shown = NAMES[name]
    images = Images([(given, 0), ("\u96e8.png", 0)], None)
    images.bad[:] = 1

    def main(args):
        setup_logging(ENV, str(tmp_path))
        report_bad(images)
        log.info(f"on {given}".replace("\n", " "))  # not through a list that knows names
        raise UserError(f"cannot decode {given}")

    try:
        with pytest.raises(SystemExit):
            exits.run(main, argparse.Namespace())
    finally:
        log.handlers.clear()
    out, err = (terminal[stream].buffer.getvalue().decode(encoding) for stream in ("stdout", "stderr"))
    file = (tmp_path / "train.log").read_text(encoding="utf-8")
    assert f"  {shown}\n" in out and f"  {shown}\n" in file and "\u96e8" in file
    assert f"error: cannot decode {shown}\n" in file and err == f"error: cannot decode {shown}\n"
    assert all(c == "\n" or c.isprintable() for c in out + err + file) and "Logging error" not in err


STREAMS = """
import argparse, os, signal, subprocess, sys
from pathlib import Path
from util.run import exits
from util.dist import Dist
from util.errors import UserError
from util.log import log, setup_logging
import torch

def main(args):
    setup_logging(Dist(torch.device("cpu")), args.output_dir)
    for i in range(300):
        log.info(f"line {i} " + "." * 100)
        print("a library's line")
    if args.end == "user":
        raise UserError("lower --batch_size")
    if args.end == "crash":
        raise ZeroDivisionError("a bug")

def close(number):
    os.close(number)
    setattr(sys, ("", "stdout", "stderr")[number], None)  # as Python starts then

def broken(number):
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, number)

TROUBLE = {"closed": close, "broken": broken, "full": lambda number: os.dup2(os.open("/dev/full", os.O_WRONLY), number)}
runs = {}
for name in sys.argv[2:]:
    number, kind, end = name.split("-")
    folder = Path(sys.argv[1], name)
    folder.mkdir()
    if child := os.fork():
        runs[child] = folder
        continue
    os.dup2(os.open(folder / "other", os.O_WRONLY | os.O_CREAT), 3 - int(number))
    TROUBLE[kind](int(number))
    for i, stream in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, stream) is not None:
            setattr(sys, stream, open(i, "w"))  # of the new kind, as at a start
    exits.run(main, argparse.Namespace(output_dir=str(folder), end=end))
    sys.exit()
for child, folder in runs.items():
    (folder / "code").write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""
TROUBLES = [f"{number}-{trouble}-user" for number in (1, 2) for trouble in ("closed", "broken", "full")]
TROUBLES += [f"{number}-full-{end}" for number in (1, 2) for end in ("well", "crash")]


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """The folder of runs whose stdout (1) or stderr (2) takes nothing: exit code, train.log and the other stream."""
    folder = tmp_path_factory.mktemp("streams")
    subprocess.run(
        [sys.executable, "-c", STREAMS, folder, *TROUBLES], cwd=ROOT, env=_environment(), check=True, timeout=120
    )
    return folder


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
@pytest.mark.parametrize("name", TROUBLES)
def test_a_stream_that_takes_nothing_spoils_neither_the_run_nor_its_exit_code(name, streams):
    folder, (number, _, end) = streams / name, name.split("-")
    assert (folder / "code").read_text() == {"well": "0", "user": "2", "crash": "1"}[end]
    file = (folder / "train.log").read_text()
    assert all(f" line {i} " in file for i in range(300)) and file.count("takes no more lines") <= 1
    other = (folder / "other").read_text()
    if number == "1":
        last = {"well": "", "user": "error: lower --batch_size\n", "crash": "ZeroDivisionError: a bug\n"}[end]
        assert other.endswith(last) and ("Traceback" in other) == (end == "crash") and "Exception ignored" not in other
    else:
        assert other.count("line") >= 600 and "error" not in other


def test_error_that_nobody_expected_leaves_its_traceback_in_train_log(train_log):
    with pytest.raises(ZeroDivisionError):
        exits.run(lambda args: 1 / 0, argparse.Namespace())
    assert "Traceback" in train_log() and "ZeroDivisionError: division by zero" in train_log()


def test_error_of_an_augmentation_keeps_its_traceback(train_log, tmp_path):
    """What a loader worker raises is no worker that died."""

    def broken(_):
        raise IndexError("no such crop")

    write_image(tmp_path / "0.png", 0)
    loader = DataLoader(Images(list_images(tmp_path), broken), num_workers=1)
    with pytest.raises(IndexError, match="no such crop"):
        exits.run(lambda args: next(iter(loader)), argparse.Namespace())
    assert "in broken" in train_log() and "memory" not in train_log()


def test_signal_that_comes_on_the_way_out_changes_no_exit_code():
    """srun sends SIGTERM to all tasks once one of them has left."""
    for error, code in ((Stopped({10}, saved=True), 75), (NonFiniteLossError("loss nan"), 3)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert ending(error) == code
        os.kill(os.getpid(), signal.SIGTERM)


def test_signal_after_the_last_step_changes_no_exit_code():
    def main(args):
        with Signals(ENV):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    exits.run(main, argparse.Namespace())
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("leave", "code", "number"),
    [
        pytest.param("pass", 0, "SIGTERM", id="the end"),
        pytest.param("raise Stopped({10}, saved=True)", 75, "SIGTERM", id="a stop"),
        pytest.param("raise Stopped({10}, saved=True)", 75, "SIGUSR1", id="a stop, and another signal"),
        pytest.param("sys.exit(75)", 75, "SIGTERM", id="a stop under submitit"),
        pytest.param("1 / 0", 1, "SIGTERM", id="a crash"),
    ],
)
def test_signal_while_the_interpreter_ends_changes_no_exit_code(leave, code, number):
    """By then Python has put the default handlers back: only what is ignored stays so."""
    script = f"""
import argparse, os, signal, sys, torch
from util.run import exits
from util.dist import Dist
from util.run.exits import Signals, Stopped

class Last:
    def __del__(self, kill=os.kill, own=os.getpid(), number=signal.{number}, write=os.write):
        write(1, b"sent")
        kill(own, number)

last = Last()  # a module's contents go after the handlers

def main(args):
    with Signals(Dist(torch.device("cpu"))):
        {leave}

exits.run(main, argparse.Namespace())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout.endswith("sent")) == (code, True), done.stderr


def test_signal_ends_with_its_own_code(train_log):
    assert ending(Stopped({15}, saved=True)) == 75 and "SIGTERM" in train_log()
    assert ending(Stopped({15}, saved=False)) == 1


def as_rank(monkeypatch, rank: int) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)


def test_error_that_all_ranks_raise_is_told_by_rank_0_alone(monkeypatch, capsys):
    def bad_folder():
        raise UserError("name another folder")

    def broadcast(shared, src):
        shared[:] = [None, UserError("name another folder")]

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    for rank, words in ((0, "error: name another folder\n"), (1, "")):
        as_rank(monkeypatch, rank)
        with pytest.raises(UserError) as caught:
            on_main(Dist(torch.device("cpu"), rank=rank, world_size=2), bad_folder)
        assert ending(caught.value) == 2
        assert capsys.readouterr().err == words
    assert ending(NonFiniteLossError("loss nan")) == 3 and capsys.readouterr().err == ""


def test_error_of_one_rank_is_told_with_its_rank(monkeypatch, capsys):
    as_rank(monkeypatch, 3)
    assert ending(UserError("cannot decode 3.png")) == 2
    assert capsys.readouterr().err == "[rank 3] error: cannot decode 3.png\n"


def meet_bad_input(how: str) -> None:
    """In two processes, the same or each its own."""
    env = init_distributed("cpu")

    def main(args):
        raise UserError("both meet this" if how == "same" else f"rank {env.rank} meets this")

    exits.run(main, argparse.Namespace())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "expected"),
    [("same", ["error: both meet this"]), ("own", ["[rank 1] error: rank 1 meets this", "error: rank 0 meets this"])],
)
@pytest.mark.parametrize("store", ["of the launcher", "of rank 0"])
def test_what_all_ranks_meet_by_themselves_is_told_once(how, expected, store):
    command, env = [sys.executable, __file__, how], _environment(OMP_NUM_THREADS="1")
    if store == "of the launcher":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        said = subprocess.run([command[0], *launcher, *command[1:]], env=env, capture_output=True, text=True).stderr
    else:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
        ranks = [subprocess.Popen(command, env={**env, "RANK": str(i), "LOCAL_RANK": str(i)}, stderr=subprocess.PIPE,
                                  text=True) for i in range(2)]  # fmt: skip
        said = "".join(rank.communicate()[1] for rank in ranks)
        assert [rank.returncode for rank in ranks] == [2, 2]
    assert sorted(line for line in said.splitlines() if "meet" in line and "error:" in line) == expected


def train_and_list_threads(folder: str) -> None:
    """Train, end as a script does, and write the names of this process's threads."""
    options = ("--data_path", folder, "--model", "mae_vit_tiny_patch4", "--input_size", 32, "--batch_size", 1,
               "--epochs", 1, "--num_workers", 0, "--output_dir", "", "--log_dir", "", *ON_CPU)  # fmt: skip
    exits.run(main_pretrain.main, main_pretrain.get_args_parser().parse_args([str(option) for option in options]))
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    (Path(folder) / f"threads-{os.environ['RANK']}").write_text("\n".join(names))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_a_process_group_s_threads_are_gone_before_the_interpreter_ends(tmp_path):
    """Else they may abort a run that has ended well: now and then, so that their names are looked at instead."""
    write_image_folder(tmp_path, n_train=2, n_val=0)
    torchrun(__file__, "threads", tmp_path)
    threads = [(tmp_path / f"threads-{rank}").read_text() for rank in (0, 1)]
    assert all(threads) and "gloo" not in "".join(threads)


class Slow:
    """Samples of which a batch takes a minute."""

    def __len__(self):
        return 64

    def __getitem__(self, key):
        time.sleep(1 if key else 0)
        return key


@pytest.mark.parametrize("end", ["a stop", "the end", "a crash"])
def test_loader_workers_do_not_hold_up_the_end(end):
    """In a circle, as a run's objects are, torch would wait 5 seconds for each of two workers."""
    options = worker_options(2, False, ENV.device, timeout_seconds=60)

    def main(args):
        loader = open_loader(Slow(), options, batch_sampler=[[0], *[range(64)] * 4], persistent_workers=True)
        circle = [batches(loader), loader]
        circle.append(circle)
        next(circle[0])
        if end != "the end":
            raise Stopped({15}, saved=True) if end == "a stop" else ZeroDivisionError("a bug")

    start = time.monotonic()
    with pytest.raises(ZeroDivisionError if end == "a crash" else SystemExit):
        exits.run(main, argparse.Namespace())
        sys.exit()
    assert time.monotonic() - start < 9 and not multiprocessing.active_children()  # the machine may be busy


def test_submitted_job_ends_as_the_script_does(monkeypatch, tmp_path, capsys):
    import submitit

    def main(args):
        assert args.output_dir == str(tmp_path / "4711")
        raise UserError("lower --batch_size")

    monkeypatch.setattr(submitit.helpers, "TorchDistributedEnvironment", lambda: SimpleNamespace(export=lambda **_: 0))
    monkeypatch.setattr(submitit, "JobEnvironment", lambda: SimpleNamespace(job_id="4711"))
    job = slurm.Job(SimpleNamespace(main=main), argparse.Namespace(job_dir=tmp_path / "%j", resume=""))
    with pytest.raises(SystemExit) as left:
        job()
    assert left.value.code == 2 and capsys.readouterr().err == "error: lower --batch_size\n"


if __name__ == "__main__":
    train_and_list_threads(sys.argv[2]) if sys.argv[1] == "threads" else meet_bad_input(sys.argv[1])
