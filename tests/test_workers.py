"""A loader worker that dies: said where its batch is asked for, and nowhere else."""

import os
import signal
import time

import pytest
import torch

from util.errors import FailedError
from util.workers import batches, open_loader, worker_options

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


def test_other_errors_of_the_disk_stay_as_they_are():
    def broken():
        yield 1
        raise FileNotFoundError(2, "No such file", "a.png")

    with pytest.raises(FileNotFoundError, match="a.png"):
        list(batches(broken()))
