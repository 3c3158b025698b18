"""The machine: its device, its memory and its allocator."""

import contextlib
import ctypes
import os
import sys

import torch

from utils.misc import UserError


def keep_freed_memory():
    """Tell glibc's allocator to keep freed memory instead of returning it to the system.

    Large temporaries then land on warm pages: filling freshly mapped memory is about five times
    slower than filling memory used before. Does nothing where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 * 2**20)


def device_from(flag):
    """The device that `--device auto`, `cpu` or `cuda` means here. Raises UserError if none."""
    available = torch.cuda.is_available()
    if flag == "cuda" and not available:
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    return torch.device("cuda" if available and flag != "cpu" else "cpu")


def available_memory(device):
    """Bytes that may still be taken on this device: on a CPU what the system and, in a container,
    its limit leave; half of the machine's memory where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kilobytes = dict(line.split()[:2] for line in file)
        free = 1024 * int(kilobytes["MemAvailable:"])
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min(free, _left_in_container())


def _left_in_container():
    """Bytes until the memory limit of the control group (version 2), infinite without one."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = int(file.read())
        with open("/sys/fs/cgroup/memory.stat", encoding="ascii") as file:
            taken = int(dict(line.split() for line in file)["anon"])
    except (OSError, KeyError, ValueError):  # no such file, or the limit is the word "max"
        return float("inf")
    return limit - taken


def set_threads(n_threads, n_processes):
    """Compute with so many CPU threads; 0: PyTorch's choice, shared by the machine's processes."""
    if n_threads:
        torch.set_num_threads(n_threads)
    elif n_processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // n_processes))


def set_precision(precision):
    """Let CUDA use TensorFloat-32 as `--precision` says."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"  # bf16: of recurrent networks


def autocast(args, device):
    """A block that computes in the precision of `--precision`."""
    if args.precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
