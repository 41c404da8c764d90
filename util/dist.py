"""Start and end of the process group. The only reader of launcher variables (torchrun, srun, mpirun)."""

import contextlib
import hashlib
import math
import os
import re
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn

from util.errors import UserError

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
    most, then it fails. Raises UserError where the device is not there.
    """
    launch = _launched_by_torchrun() or _launched_by_srun() or _launched_by_mpirun(dist_url)
    if launch is None:
        return Dist(_pick_device(device, 0))
    rank, local_rank, world_size, local_world_size = launch
    if "OMP_NUM_THREADS" not in os.environ:
        # each process would take all cores for its arithmetic, and they would wait for one another (torchrun sets it)
        torch.set_num_threads(max(available_cores() // local_world_size, 1))
    place = _pick_device(device, local_rank)
    if place.type == "mps":
        raise UserError("--device mps trains in a single process: start it without a launcher, or with --device cpu")
    timeout = timedelta(minutes=timeout_minutes)
    restartable = dist_url == "env://" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    torch.distributed.init_process_group(
        backend="nccl" if place.type == "cuda" else "gloo",
        **({"store": _fresh_store(rank, world_size, timeout)} if restartable else {"init_method": dist_url}),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=place if place.type == "cuda" else None,
    )
    return Dist(place, rank, local_rank, world_size, local_world_size)


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
            raise TimeoutError(f"rank {rank} waited {timeout} for ranks {sorted(others)[:8]} to start")
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


def _launched_by_torchrun() -> tuple[int, int, int, int] | None:
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    env = os.environ
    local_rank = int(env.get("LOCAL_RANK", 0))
    return int(env["RANK"]), local_rank, int(env["WORLD_SIZE"]), int(env.get("LOCAL_WORLD_SIZE", 1))


def _launched_by_srun() -> tuple[int, int, int, int] | None:
    # a batch script has SLURM_PROCID and SLURM_NTASKS too, but only srun's tasks are in a step with a task count
    env = os.environ
    n_tasks = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if "SLURM_PROCID" not in env or n_tasks == 1:
        return None
    n_nodes = int(env.get("SLURM_STEP_NUM_NODES", 1))
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_host(env["SLURM_STEP_NODELIST"]) if n_nodes > 1 else "127.0.0.1"
    # the same port on all nodes, another for every job and step
    env.setdefault("MASTER_PORT", str(20000 + (int(env["SLURM_JOB_ID"]) * 16 + int(env["SLURM_STEP_ID"])) % 20000))
    return int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), n_tasks, -(-n_tasks // n_nodes)


def _first_host(nodelist: str) -> str:
    command = ["scontrol", "show", "hostnames", nodelist]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def _launched_by_mpirun(dist_url: str) -> tuple[int, int, int, int] | None:
    env = os.environ
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) == 1:
        return None
    if dist_url == "env://" and not ("MASTER_ADDR" in env and "MASTER_PORT" in env):
        raise UserError("mpirun's processes don't know where to meet: pass -x MASTER_ADDR=HOST -x MASTER_PORT=PORT")
    return (
        int(env["OMPI_COMM_WORLD_RANK"]),
        int(env["OMPI_COMM_WORLD_LOCAL_RANK"]),
        int(env["OMPI_COMM_WORLD_SIZE"]),
        int(env["OMPI_COMM_WORLD_LOCAL_SIZE"]),
    )


def _pick_device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cuda(:\d+)?|mps|cpu", name):
        raise UserError(f"--device {name} is not known: use auto, cuda, mps or cpu")
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError(
                "--device cuda: this torch sees no CUDA GPU; use --device cpu (or auto), or mend the driver"
            )
        n_gpus = torch.cuda.device_count()
        # a launcher that binds one GPU to each process shows each of them a single one, with index 0
        index = int(name[5:]) if ":" in name else local_rank if n_gpus > 1 else 0
        if index >= n_gpus:
            raise UserError(
                f"--device {name}: GPU {index} is not there for process {local_rank} ({n_gpus} on this node)"
            )
        name = f"cuda:{index}"
        torch.cuda.set_device(name)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this torch sees no Apple GPU; use --device cpu (or auto)")
    return torch.device(name)


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
        if isinstance(error, UserError):
            error.rank_0_tells = not env.is_main
        raise error
    return result


def spare_others(message: str) -> None:
    """On rank 0, which has said `message`: keep the others from saying it too, if they are about to.

    Takes 3 seconds: what keeps the note may go with this process, and launchers end the others once one is gone.
    """
    if torch.distributed.is_initialized():
        with contextlib.suppress(Exception):  # the store is gone, and with it the others
            _default_store().set(_note(message), "")
            time.sleep(3)


def is_spared(message: str) -> bool:
    """On other ranks: whether rank 0 says `message`, within 2 seconds."""
    try:
        _default_store().wait([_note(message)], timedelta(seconds=2))
    except Exception:  # it does not, or the store is gone
        return False
    return True


def _default_store() -> torch.distributed.Store:
    return torch.distributed.distributed_c10d._get_default_store()


def _note(message: str) -> str:
    return f"said/{hashlib.sha256(message.encode()).hexdigest()}"


def gather_on_all(value: Any) -> list[Any]:
    """Every rank's `value`, in the order of ranks, on all of them."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


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
