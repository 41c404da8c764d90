"""Signals that ask a run to leave: noted when they come, obeyed by all ranks together after an optimizer step."""

import multiprocessing
import os
import signal
import threading
import time

import torch

from util.dist import Dist, sum_over_ranks

# what a user, a batch system or a launcher sends; SIGUSR2 is submitit's warning
CAUGHT = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
ASK_SECONDS = 2.0  # how long a signal may wait until the ranks ask one another, where steps are that fast
ASK_STEPS = 20  # and the most steps between two questions
EXIT_SAVED = 75  # EX_TEMPFAIL of sysexits.h: all is saved, start again with --resume auto


class Stopped(Exception):
    """A signal ended the run, on all ranks together. `exit_code` is 75 where its state is saved, else 1."""

    def __init__(self, signals: set[int], saved: bool) -> None:
        names = " and ".join(sorted(signal.Signals(number).name for number in signals))
        what = "all is saved; --resume auto continues" if saved else "its last steps are NOT saved"
        super().__init__(f"stopped by {names}: {what}")
        self.signals, self.exit_code = signals, EXIT_SAVED if saved else 1


class Signals:
    """Notes the signals that come inside its `with`, and tells all ranks of them.

    A second Ctrl-C, 3 seconds or more after the first, ends the process at once.
    """

    # whether the process ends after the `with`, as a script does: then signals change its exit code no more. As it
    # ends, Python puts default handlers back, but what is ignored stays ignored
    process_ends_too = False

    def __init__(self, env: Dist) -> None:
        self.env = env
        self.seen: dict[int, float] = {}  # signal -> when it came first
        self.steps, self.interval, self.asked = 0, 1, time.monotonic()

    def __enter__(self) -> "Signals":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # the only one that Python lets handle signals
            # a signal that is ignored, as nohup and a shell's background do, stays so
            wanted = [number for number in CAUGHT if signal.getsignal(number) is not signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            if not self.process_ends_too:
                signal.signal(number, handler)
            elif number != signal.SIGINT:  # which must still end a process that hangs
                signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, _frame) -> None:
        if number == signal.SIGINT and time.monotonic() - self.seen.get(number, time.monotonic()) > 3:
            raise KeyboardInterrupt
        self.seen.setdefault(number, time.monotonic())

    def ask(self, save: bool, now: bool = False) -> tuple[set[int], bool]:
        """What any rank was told to do, after a step: (signals, whether rank 0 wants to save).

        All ranks call it after each step and get the same answer. Several processes ask one another every 20 steps, or
        about every 2 seconds where steps are slower, and with `now` at once: only then does the device wait for the
        host.
        """
        if self.env.world_size == 1:
            return set(self.seen), save
        self.steps += 1
        if self.steps < self.interval and not now:
            return set(), False
        now = time.monotonic()
        step_seconds = (now - self.asked) / self.steps
        votes = [number in self.seen for number in CAUGHT]
        votes += [save, step_seconds] if self.env.is_main else [0, 0]  # rank 0's clock counts
        votes = torch.tensor(votes, dtype=torch.float32, device=self.env.device)
        *votes, save, step_seconds = sum_over_ranks(votes).tolist()
        self.interval = max(1, min(ASK_STEPS, int(ASK_SECONDS / max(step_seconds, 1e-6))))
        self.steps, self.asked = 0, now
        return {number for number, vote in zip(CAUGHT, votes, strict=True) if vote}, bool(save)


def leave_signals_to_the_trainer(_worker: int) -> None:
    """For a loader's worker: only the trainer obeys signals, which a batch system sends to all processes of a job.

    Else a worker would be gone before the step that needs its images. SIGTERM from the trainer itself still ends it.
    """
    for number in CAUGHT:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    trainer = multiprocessing.parent_process().pid  # not os.getppid(): that may be a fork server

    def obey_trainer() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
            pass
        os._exit(0)

    threading.Thread(target=obey_trainer, daemon=True).start()
