"""Submission to SLURM through submitit, and requeue: what the three submitit_*.py scripts share."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

from util import cli
from util.errors import UserError, fail
from util.log import log
from util.run import exits
from util.run.exits import Stopped
from util.run.files import checkpoints

MEM_GB_PER_GPU = 40
CPUS_PER_TASK = 10
SIGNAL_SECONDS = 120  # between the warning of preemption or time limit, and the kill
REQUEUE_SECONDS = 30  # for SLURM to requeue the job, which ends all of its tasks


class Job:
    """What each task runs: the script's `main`, on from the newest checkpoint of the job's folder if it has one."""

    def __init__(self, script: ModuleType, args: argparse.Namespace) -> None:
        self.script, self.args = script, args

    def __call__(self) -> None:
        exits.run(self._main, self.args)  # else submitit would show a traceback for every bad option

    def _main(self, args: argparse.Namespace) -> None:
        import submitit

        # several processes may share a node's GPUs, so each keeps seeing all of them and takes its own by local rank
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        folder = Path(str(args.job_dir).replace("%j", submitit.JobEnvironment().job_id))
        args = argparse.Namespace(**vars(args))
        args.output_dir = args.log_dir = str(folder)
        # a job that SLURM requeued, after preemption, time limit or a node's failure, finds what it has saved
        if not getattr(args, "eval", False) and (checkpoints(folder) or not args.resume):
            args.resume = "auto"
        warnings = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}  # submitit's
        try:
            self.script.main(args)
        except Stopped as stopped:
            log.info(str(stopped))
            for number in stopped.signals & warnings.keys():
                if callable(warnings[number]):
                    warnings[number](number, None)  # on rank 0 it asks for a requeue and leaves
                    time.sleep(REQUEUE_SECONDS)  # the end of another task could kill rank 0 before it has asked
            sys.exit(stopped.exit_code)

    def checkpoint(self):
        """Called by submitit at SLURM's warning signal: asks for a requeue of the same job."""
        import submitit

        return submitit.helpers.DelayedSubmission(Job(self.script, self.args))


def get_args_parser(script: ModuleType) -> argparse.ArgumentParser:
    """The options of `script`, and those of the submission."""
    parser = argparse.ArgumentParser(add_help=False, parents=[script.get_args_parser()])
    add = parser.add_argument_group("submission").add_argument
    add("--ngpus", default=8, type=cli.positive, metavar="N",
        help="GPUs, and processes, per node; with --device cpu processes alone")  # fmt: skip
    add("--nodes", default=2, type=cli.positive, metavar="N", help="nodes")
    add("--timeout", default=4320, type=cli.positive, metavar="MINUTES", help="time limit of the job in minutes")
    add("--job_dir", default="", type=cli.path, metavar="FOLDER",
        help="folder that all nodes see, for logs and checkpoints; %%j becomes the job id; required")  # fmt: skip
    add("--partition", default="", metavar="NAME", help="SLURM partition; none takes the cluster's default")
    add("--use_volta32", action="store_true", help="ask for V100s of 32 GB (constraint volta32gb)")
    add("--comment", default="", metavar="TEXT", help="SLURM comment, such as a reason that the site asks for")
    add("--cluster", default="slurm", choices=["slurm", "local"],
        help="local starts the processes on this machine, to try a job without SLURM")  # fmt: skip
    return parser


def submit(script: ModuleType) -> None:
    """Read the command line, submit `script`, print the job id alone on the last line."""
    args = cli.parse(get_args_parser(script), f"Submit to SLURM: {script.__doc__}")
    try:
        print(_submit(script, args))
    except UserError as error:
        fail(error)


def _submit(script: ModuleType, args: argparse.Namespace) -> str:
    if args.cluster == "local" and args.nodes > 1:
        raise UserError(f"--nodes {args.nodes}: --cluster local has this machine alone; pass --nodes 1")
    if not args.job_dir:
        raise UserError("--job_dir is not given: name a folder that all nodes see, such as /shared/me/mae/%j")
    try:
        import submitit
    except ImportError as error:
        raise UserError("submission needs submitit: pip install submitit") from error
    try:
        submitit.core.utils.JobPaths.get_first_id_independent_folder(args.job_dir).mkdir(parents=True, exist_ok=True)
        executor = submitit.AutoExecutor(folder=args.job_dir, cluster=args.cluster, slurm_max_num_timeout=30)
    except OSError as error:
        raise UserError(
            f"--job_dir {args.job_dir} cannot be made ({error}): name a shared folder you may write"
        ) from error
    except RuntimeError as error:
        raise UserError(f"no SLURM here ({error}): submit from a login node, or try with --cluster local") from error
    slurm = {"slurm_signal_delay_s": SIGNAL_SECONDS}
    if args.device != "cpu":
        slurm |= {"gpus_per_node": args.ngpus, "mem_gb": MEM_GB_PER_GPU * args.ngpus}
    if args.partition:
        slurm["slurm_partition"] = args.partition
    if args.use_volta32:
        slurm["slurm_constraint"] = "volta32gb"
    if args.comment:
        slurm["slurm_comment"] = args.comment
    executor.update_parameters(
        name="mae",
        nodes=args.nodes,
        tasks_per_node=args.ngpus,
        cpus_per_task=CPUS_PER_TASK,
        timeout_min=args.timeout,
        **slurm,
    )
    # the job unpickles this project's modules, wherever it was submitted from
    root = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        return executor.submit(Job(script, args)).job_id
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"SLURM refused the job: {error}") from error
