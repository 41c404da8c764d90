"""A loader worker that dies: said where its batch is asked for, and nowhere else."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.utils.data import IterableDataset

from util.data.workers import batches, open_loader, worker_options
from util.errors import FailedError, UserError

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="no such signals here")


class Kept:
    """A DataLoader of two workers over 0 .. 39, in batches of 2, and the iterator that it hands out."""

    def __iter__(self):
        options = worker_options(2, False, torch.device("cpu"), timeout_seconds=30)
        self.iterator = iter(open_loader(range(40), options, batch_size=2))
        return self.iterator

    def kill_one(self):
        os.kill(self.iterator._workers[0].pid, signal.SIGKILL)


def test_a_death_interrupts_nothing_but_the_wait_for_a_batch():
    """torch's own handler raises at once, whatever the trainer is doing."""
    loader, seen = Kept(), 0
    with pytest.raises(FailedError) as death:
        for _ in batches(loader):
            if not seen:
                loader.kill_one()
                end = time.monotonic() + 0.5
                while time.monotonic() < end:  # a checkpoint is being written
                    time.sleep(0.01)
            seen += 1
    assert seen == 1 and "is killed by signal" in str(death.value)
    assert "a loader worker died" in str(death.value) and "lower --num_workers" in str(death.value)


def test_a_death_in_the_wait_is_told_at_once():
    class Slow(Kept):
        def __iter__(self):
            yield next(super().__iter__())
            self.kill_one()
            time.sleep(20)

    start = time.monotonic()
    with pytest.raises(FailedError, match="is killed by signal"):
        list(batches(Slow()))
    assert time.monotonic() - start < 10


def test_a_connection_that_breaks_before_the_death_is_seen_is_that_death():
    class Broken(Kept):
        def __iter__(self):
            yield next(super().__iter__())
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # the news come late
            self.kill_one()
            raise ConnectionResetError(104, "Connection reset by peer")

    try:
        with pytest.raises(FailedError, match="is killed by signal"):
            list(batches(Broken()))
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


class Lingers:
    """An object whose destructor takes long: what a signal handler raises meanwhile, Python drops."""

    def __del__(self):
        time.sleep(1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("error", [None, EOFError(), OSError(104, "Connection reset by peer"), KeyError("w")])
def test_a_death_while_a_destructor_runs_is_told_all_the_same(error):
    class Unheard(Kept):
        def __iter__(self):
            yield next(super().__iter__())
            self.kill_one()
            Lingers()
            if error is not None:
                raise error
            yield "a batch of the other worker"

    start, seen = time.monotonic(), []
    with pytest.raises(FailedError, match="is killed by signal"):
        seen += list(batches(Unheard()))
    assert not seen and time.monotonic() - start < 60  # of which a machine may stand still for some


def test_other_errors_of_the_disk_stay_as_they_are():
    def broken():
        yield 1
        raise FileNotFoundError(2, "No such file", "a.png")

    with pytest.raises(FileNotFoundError, match="a.png"):
        list(batches(broken()))


class Troubled:
    """Ten samples, at the sixth of which `trouble` is called."""

    def __init__(self, trouble):
        self.trouble = trouble

    def __len__(self):
        return 10

    def __getitem__(self, key):
        return self.trouble() if key == 5 else key


class TroubledStream(IterableDataset):
    """The same in pairs, as a stream of images is read."""

    def __init__(self, trouble):
        self.samples = Troubled(trouble)

    def __iter__(self):
        for first in range(0, 10, 2):
            yield [self.samples[first], self.samples[first + 1]]


def raises(error):
    def trouble():
        raise error

    return trouble


def read_all(trouble, kind=Troubled, num_workers=1, **more):
    options = worker_options(num_workers, False, torch.device("cpu"), timeout_seconds=30)
    loader = open_loader(kind(trouble), options, **({} if kind is TroubledStream else {"batch_size": 2}), **more)
    return list(batches(loader))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", [Troubled, TroubledStream])
@pytest.mark.parametrize("text", ["cannot decode a.png", "a UserError: with its own name", "Caught it\nOriginal"])
def test_an_error_for_users_comes_out_of_a_worker_as_it_was_raised(text, kind, num_workers):
    with pytest.raises(UserError) as error:
        read_all(raises(UserError(text)), kind, num_workers)
    assert error.value.message == str(error.value) == text.replace("\n", "\\n")


def test_samples_are_the_same_in_workers_and_without():
    for num_workers in (0, 2):
        assert torch.equal(torch.stack(read_all(lambda: 5, num_workers=num_workers)), torch.arange(10).view(5, 2))
        assert torch.equal(torch.cat(read_all(lambda: 5, TroubledStream, min(num_workers, 1))), torch.arange(10))


def test_other_errors_of_a_worker_keep_their_kind_and_traceback():
    with pytest.raises(RuntimeError, match="Original Traceback(.|\n)*mat1 and mat2") as error:
        read_all(raises(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    assert not isinstance(error.value, FailedError)


def no_room(samples):
    raise RuntimeError("unable to write to file </torch_12_34_0>: No space left on device (28)")


@pytest.mark.parametrize("how", ["a batch", "a bus error", "a lock"])
def test_shared_memory_that_is_too_small_is_told_with_three_remedies(how, monkeypatch):
    with pytest.raises(FailedError) as error:
        if how == "a batch":
            read_all(lambda: 5, collate=no_room)
        elif how == "a bus error":
            read_all(lambda: os.kill(os.getpid(), signal.SIGBUS))
        else:
            monkeypatch.setattr(multiprocessing.get_context("fork"), "Queue", raises(OSError(28, "No space left")))
            read_all(lambda: 5)
    assert all(remedy in str(error.value) for remedy in ("/dev/shm", "--shm-size", "--ipc=host", "--num_workers 0"))


def test_a_disk_that_stalls_is_told_with_the_option():
    with pytest.raises(FailedError, match="--loader_timeout"):
        options = worker_options(1, False, torch.device("cpu"), timeout_seconds=1)
        list(batches(open_loader(Troubled(lambda: time.sleep(9)), options, batch_size=2)))
