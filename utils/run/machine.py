"""The machine: its device, its memory and allocator, its processors."""

import contextlib
import ctypes
import math
import os
import sys
from pathlib import Path

import torch

from utils.misc import UserError, counted

MOST_ON_CUDA = 4  # threads for computing: the GPU leaves them little to do


def keep_freed_memory():
    """Make glibc's allocator keep freed memory instead of returning it to the system.

    Large temporaries then land on warm pages: filling freshly mapped memory is about five times
    slower than filling memory used before. Does nothing without glibc.
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


def prepare_device(flag):
    """`device_from`, for a command that computes there: with threads and allocator set for it."""
    keep_freed_memory()
    device = device_from(flag)
    set_threads(device)
    return device


def available_memory(device):
    """Bytes still available on this device: on a CPU, what the system and a container's limit
    leave, or half of the machine's memory if the system doesn't report it."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept  # by PyTorch, for reuse
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


def n_processors():
    """The number of processors that this process may use: affinity mask and containers' quotas."""
    return math.ceil(min(len(affinity()), _quota()))


def affinity():
    """The numbers of the processors that this process may run on, a sorted list."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _quota(root="/"):
    """Processors that the control groups of this process leave it: a fraction, or infinity.

    A group can't use more than the groups it is in, so all are read, in version 1 and 2.
    """
    try:
        lines = Path(root, "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    mounted, quotas = Path(root, "sys/fs/cgroup"), [math.inf]
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        tops = (mounted / "cpu", mounted / controllers) if controllers else (mounted,)
        for top in tops:
            group = top / path.strip("/")
            groups = [place for place in (group, *group.parents) if place.is_relative_to(top)]
            quotas += map(_quota_of, groups)
    return min(quotas)


def _quota_of(group):
    """Processors that one group leaves, infinity without a limit (-1 or "max")."""
    names = ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")  # version 2, version 1
    for files in names:
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = " ".join((group / file).read_text() for file in files).split()
            if int(quota) > 0:
                return int(quota) / int(period)
    return math.inf


def processors_each(n_processes=1, most=math.inf):
    """Processors, of at most `most`, for each of `n_processes` that share them."""
    return max(1, min(most, n_processors()) // n_processes)


def set_threads(device, n_threads=0, n_processes=1):
    """Set the number of CPU threads for computing.

    0: PyTorch's choice, at most one per processor, divided among the `n_processes` that share
    these; on CUDA at most 4.
    """
    if n_threads:
        torch.set_num_threads(n_threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        own = torch.get_num_threads()
        share = _most_threads(device, n_processes, own)
        if share != own:
            torch.set_num_threads(share)


def keep_threads(before, device, n_threads=0, n_processes=1):
    """Keep the number of threads of the resumed run, if no other was asked for and it fits.

    before: the number in its checkpoint. A note is printed if more are possible.
    """
    if n_threads or "OMP_NUM_THREADS" in os.environ or not isinstance(before, int):
        return
    most = _most_threads(device, n_processes)
    if 1 <= before <= most:
        if before < torch.get_num_threads():
            print(f"note: {counted(before, 'CPU thread')} as before; --threads {most} uses more")
        torch.set_num_threads(before)


def _most_threads(device, n_processes, most=math.inf):
    return min(processors_each(n_processes, most), MOST_ON_CUDA if device.type == "cuda" else most)


def seed_generators(seed):
    """Like `torch.manual_seed` for CPU and CUDA, which without CUDA spends 0.5 ms on a trace."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def set_precision(precision):
    """Let CUDA use TensorFloat-32, depending on `--precision`."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"  # bf16: for recurrent networks
    # Without gradients and in bf16 it would be preferred, but the mask of relative positions isn't
    # aligned as it needs (transformers.relative_scores).
    torch.backends.cuda.enable_cudnn_sdp(False)


def compiled(args, batch):
    """A block in which networks run as `--compile` made them if the batch is full.

    For a batch of another size, the compiler would start again, and make code for any size.
    """
    if args.compile and len(batch.window) == args.batchSizeGPU:
        return torch.compiler.set_stance("default")
    return contextlib.nullcontext()


def autocast(args, device):
    """A block that computes in the precision of `--precision`."""
    if args.precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
