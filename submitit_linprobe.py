"""Submit main_linprobe.py to SLURM, with its options and those of the submission: see --help."""

import main_linprobe
from util.run.slurm import submit

if __name__ == "__main__":
    submit(main_linprobe)
