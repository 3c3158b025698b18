"""Which of a run's processes this one is, from the environment that torchrun or Slurm sets.

Slurm's variables are translated into those of torchrun, the only ones that the rest reads.
"""

import os
import re
from typing import NamedTuple

from utils.misc import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FIRST_PORT, N_PORTS = 20_000, 10_000  # below the ports that systems assign on their own


class Place(NamedTuple):
    """The number of this process and how many there are, in all and on this machine.

    machine: a number that the processes of a machine share, and those of others don't
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    machine: int = 0


def find_place():
    """The Place of this process."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return Place()
    try:
        values = [os.environ[name] for name in TORCHRUN]
        place = Place(*map(int, values[:4]))
        # Without GROUP_RANK (torchrun's number of a machine) the ranks of each are consecutive.
        machine = os.environ.get("GROUP_RANK", place.rank - place.local_rank)
        return place._replace(machine=int(machine))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"WORLD_SIZE is {size} in the environment, but {error} isn't as torchrun sets it; use "
            "torchrun, or unset WORLD_SIZE"
        ) from error


def is_one_of_several():
    """Whether this process was started as one of a run's: by utils/run/launch.py, torchrun or srun.

    WORLD_SIZE=1, which notebooks and schedulers leave in the environment, counts as unset unless it
    is torchrun's.
    """
    return os.environ.get("WORLD_SIZE", "1") != "1" or "TORCHELASTIC_RUN_ID" in os.environ


def is_task_of_srun():
    """Whether srun started this process as one of several tasks, without torchrun in between.

    The shell of sbatch or salloc has SLURM_NTASKS, too, but is a single process.
    """
    n_tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    return n_tasks != "1" and "TORCHELASTIC_RUN_ID" not in os.environ


def enter_slurm_step():
    """If srun started this process as one of several, set the variables that torchrun sets."""
    if not is_task_of_srun() or is_one_of_several():
        return
    try:
        node = int(os.environ["SLURM_NODEID"])
        tasks = tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
        job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
        os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", str(FIRST_PORT + (10 * job + step) % N_PORTS))
        os.environ |= {
            "RANK": os.environ["SLURM_PROCID"],
            "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": os.environ["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(tasks[node]),
            "GROUP_RANK": str(node),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS is {os.environ['SLURM_STEP_NUM_TASKS']} in the environment, but "
            f"{error} isn't as srun sets it; use srun, or unset SLURM_STEP_NUM_TASKS"
        ) from error


def first_host(hosts):
    """The first host of Slurm's list, as from `scontrol show hostnames`: a01 of `a[01-04,7],b`."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", hosts).partition(",")[0]


def tasks_per_node(text):
    """Slurm's `2(x3),1`, which is 2 tasks on each of three nodes and 1 on a fourth, as a list."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in counts for _ in range(int(times or 1))]


def current_job():
    """The job of Slurm or torchrun, and how often it was restarted; None, 0 without a job.

    torchrun calls jobs without --rdzv-id `none`.
    """
    if "SLURM_JOB_ID" in os.environ:
        name, restarts = f"Slurm job {os.environ['SLURM_JOB_ID']}", "SLURM_RESTART_COUNT"
    elif os.environ.get("TORCHELASTIC_RUN_ID", "none") != "none":
        name = f"torchrun job {os.environ['TORCHELASTIC_RUN_ID']}"
        restarts = "TORCHELASTIC_RESTART_COUNT"
    else:
        return None, 0
    count = os.environ.get(restarts, "")
    return name, int(count) if count.isdigit() else 0
