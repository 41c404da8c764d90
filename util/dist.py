"""Start and end of the process group. The only reader of launcher variables (torchrun, srun, mpirun)."""

import contextlib
import math
import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn

from util.errors import FailedError, UserError, say

# what a user, a batch system or a launcher sends; SIGUSR2 is submitit's warning
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
LAUNCHERS = {  # number of processes, rank, rank on the node, processes on the node (srun: nodes)
    "torchrun": ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    # a batch script has SLURM_PROCID and SLURM_NTASKS too, but only srun's tasks are in a step with a task count
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES"),
    "mpirun": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")),
}
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of all cores together, in a period of so many


@dataclass(frozen=True)
class Dist:
    """Where this process stands: `rank` among `world_size`, `local_rank` among `local_world_size` of its node."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files."""
        return self.rank == 0


def init_distributed(device: str = "auto", dist_url: str = "env://", timeout_minutes: float = 10) -> Dist:
    """Join the group that the launcher describes, or stand alone where there is none.

    `device`: auto (cuda, then mps, then cpu), cuda, mps or cpu. A process waits for the others for `timeout_minutes` at
    most, then it raises FailedError. Raises UserError where the device is not there, or the launcher's variables make
    no sense; an empty one counts as unset.
    """
    launch, env = _launched(), os.environ
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if dist_url == "env://" and not env.get(name)]
    if launch is None or (launch[2] == 1 and missing):
        return Dist(_pick_device(device, launch[1] if launch else 0))
    rank, local_rank, world_size, local_world_size = launch
    if missing:
        how = f"set {' and '.join(missing)} alike for all (mpirun -x NAME=VALUE), or unset WORLD_SIZE to train in one"
        raise UserError(f"{missing[0]}: not set, so {world_size} processes cannot meet; {how}")
    _number("MASTER_PORT", 0, below=65536)
    if "OMP_NUM_THREADS" not in env:
        # each process would take all cores for its arithmetic, and they would wait for one another (torchrun sets it)
        torch.set_num_threads(max(available_cores() // local_world_size, 1))
    place = _pick_device(device, local_rank)
    if place.type == "mps":
        raise UserError("--device mps trains in a single process: start it without a launcher, or with --device cpu")
    timeout = timedelta(minutes=timeout_minutes)
    restartable = dist_url == "env://" and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    with _meeting(rank, world_size, dist_url, timeout_minutes):
        torch.distributed.init_process_group(
            backend="nccl" if place.type == "cuda" else "gloo",
            **({"store": _fresh_store(rank, world_size, timeout)} if restartable else {"init_method": dist_url}),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=place if place.type == "cuda" else None,
        )
    return Dist(place, rank, local_rank, world_size, local_world_size)


@contextlib.contextmanager
def _meeting(rank: int, world_size: int, dist_url: str, timeout_minutes: float) -> Iterator[None]:
    """Say whom this process waits for, where it is not here at once, and why they could not meet."""
    where = "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ) if dist_url == "env://" else dist_url
    others = _ranks([other for other in range(world_size) if other != rank])
    waits = f"rank {rank} of {world_size} waits at {where} for {others}, at most {timeout_minutes:g} minutes"
    remedy = "if only one was started (srun --pty), use srun or torchrun, or unset WORLD_SIZE, SLURM_STEP_NUM_TASKS"
    late = threading.Timer(10 if rank else 1, say, [f"{waits}; {remedy}"])
    late.start()
    try:
        yield
    except torch.distributed.DistError as error:
        reason = str(error).split("\n")[0]
        if rank == 0 and isinstance(error, torch.distributed.DistNetworkError):
            text = f"rank 0 cannot meet the others at {where} ({reason}): if the port is taken, set another MASTER_PORT"
            raise UserError(text) from error
        raise FailedError(f"{waits}: in vain ({reason}); {remedy}") from error
    finally:
        late.cancel()


def _fresh_store(rank: int, world_size: int, timeout: timedelta) -> torch.distributed.Store:
    """The store of torchrun's agent, below a name that no earlier life of the workers has used.

    The agent keeps one store over all restarts, and in it the addresses of dead workers, which new ones then call in
    vain (pytorch issue 135712); its count of restarts differs between nodes, so it is no such name. Here rank 0 makes
    one up and hands it to those alone who show that they are alive: it repeats to each what that one has just said.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(address, port, is_master=False, timeout=timeout)

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    mine, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    others, name = set(range(1, world_size)) if rank == 0 else {0}, mine
    store.set(f"hello/{rank}", mine)
    while others:
        if time.monotonic() > end:
            raise FailedError(f"rank {rank} waited {timeout} for {_ranks(sorted(others))} to start")
        for other in list(others):
            if rank == 0:
                store.set(f"welcome/{other}", read(f"hello/{other}") + mine)
                others -= {other} if read(f"ready/{other}") == mine else set()
            elif (welcome := read(f"welcome/{rank}")).startswith(mine):
                name = welcome.removeprefix(mine)
                store.set(f"ready/{rank}", name)
                others.clear()
        time.sleep(0.02)
    return torch.distributed.PrefixStore(name, store)


def available_cores() -> int:
    """Cores that this process may use, by its affinity and by its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return max(min(cores, math.ceil(int(quota) / int(period))), 1)
    except (OSError, ValueError):  # no such file, or no quota: "max"
        return cores


def shutdown() -> None:
    """Leave the group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _number(name: str, default: int | None = None, least: int = 0, below: float = math.inf) -> int:
    """A launcher's variable; `default` where it is not set or empty. Raises UserError for what is no such number."""
    text = os.environ.get(name, "").strip()
    if not text and default is not None:
        return default
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not least <= int(text) < below:
        most = f"to {below - 1}" if below < math.inf else "up"
        what = f"{name}={text[:100]!r} is not a whole number from {least} {most}"
        raise UserError(f"{what}: leave it to torchrun, srun or mpirun, or unset it to train in one process")
    return int(text)


def _launched() -> tuple[int, int, int, int] | None:
    """(rank, local rank, processes, processes on this node), from the first launcher that tells."""
    for launcher, (size_name, rank_name, local_name, local_size_name) in LAUNCHERS.items():
        size = _number(size_name, 0, least=1)
        rank = _number(rank_name, -1, below=size or math.inf)
        if rank < 0 or size == 0 or (size == 1 and launcher != "torchrun"):
            continue
        local_size = _number(local_size_name, 1, least=1)
        if launcher == "srun":
            _meet_under_srun(n_nodes := local_size)
            local_size = -(-size // n_nodes)
        return rank, _number(local_name, 0), size, local_size
    return None


def _meet_under_srun(n_nodes: int) -> None:
    env, host = os.environ, "127.0.0.1"
    if n_nodes > 1 and not env.get("MASTER_ADDR"):
        nodes = env.get("SLURM_STEP_NODELIST", "")
        command = ["scontrol", "show", "hostnames", nodes]
        try:
            host = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            raise UserError(f"SLURM_STEP_NODELIST={nodes!r} tells no host ({error}): set MASTER_ADDR") from error
    env["MASTER_ADDR"] = env.get("MASTER_ADDR") or host
    if not env.get("MASTER_PORT"):  # the same on all nodes, another for every job and step
        env["MASTER_PORT"] = str(20000 + (_number("SLURM_JOB_ID") * 16 + _number("SLURM_STEP_ID")) % 20000)


def _pick_device(name: str, local_rank: int) -> torch.device:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not re.fullmatch(r"cuda(:\d{1,4})?|mps|cpu", name):
        raise UserError(f"--device {name} is not known: use auto, cuda, mps or cpu")
    kind = name.split(":")[0]
    if not there[kind]:
        raise UserError(f"--device {name}: this torch sees no such GPU; use --device cpu (or auto), or mend the driver")
    if kind != "cuda":
        return torch.device(name)
    n_gpus = torch.cuda.device_count()
    # a launcher that binds one GPU to each process shows each of them a single one, with index 0
    index = int(name[5:]) if ":" in name else local_rank if n_gpus > 1 else 0
    if index >= n_gpus:
        raise UserError(f"--device {name}: GPU {index} is not there for process {local_rank} ({n_gpus} on this node)")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def wrap(model: nn.Module, env: Dist) -> nn.Module:
    """The model, in DistributedDataParallel where there are several processes."""
    if env.world_size == 1:
        return model
    device_ids = [env.device.index] if env.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """[...] -> [...]: the sum over all processes, in place; the tensor itself where there is one process."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """[...] -> [...]: the mean over all processes, in place."""
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return sum_over_ranks(tensor).div_(world_size)


def on_main(env: Dist, action: Callable[[], Any]) -> Any:
    """What `action` returns on rank 0, on all ranks; a UserError or OSError that it raises there is raised on all."""
    result = error = None
    if env.is_main:
        try:
            result = action()
        except (UserError, OSError) as caught:
            error = caught
    if torch.distributed.is_initialized():
        shared = [result, error]
        torch.distributed.broadcast_object_list(shared, src=0)
        result, error = shared
    if error is not None:
        raise UserError(error.message, told=not env.is_main) if isinstance(error, UserError) else error
    return result


def gather_on_all(value: Any) -> list[Any]:
    """Every rank's `value`, in the order of ranks, on all of them."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def check_ranks_agree(env: Dist, values: dict[str, Any]) -> None:
    """Raise UserError, on all ranks, where the value of a name is not the same on all of them."""
    everyone = gather_on_all({name: repr(value) for name, value in values.items()})
    different = []
    for name in dict.fromkeys(name for theirs in everyone for name in theirs):
        ranks: dict[str, list[int]] = {}
        for rank, theirs in enumerate(everyone):
            ranks.setdefault(theirs.get(name, "not given"), []).append(rank)
        if len(ranks) > 1:
            different.append(f"{name} ({', '.join(f'{v[:200]} on {_ranks(having)}' for v, having in ranks.items())})")
    if different:
        text = f"the processes differ in {'; '.join(different)}: start all with the same options, on the same images"
        raise UserError(text, told=not env.is_main)


def _ranks(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> 'ranks 0-2, 5'."""
    runs: list[list[int]] = []
    for number in numbers:
        runs[-1].append(number) if runs and number == runs[-1][-1] + 1 else runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(texts)}"


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """[n, ...] -> [n * ranks, ...]: those of all processes, one after another. n is the same on all of them."""
    if not torch.distributed.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers of rank 0 (running statistics), so that all evaluate the same model."""
    if torch.distributed.is_initialized():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
