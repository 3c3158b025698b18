"""Small things that every floor of the program uses: units, errors, seeds, the allocator."""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import io
import os
import signal
import sys

import torch

SAMPLE_RATE = 16_000  # Hz; the only rate the encoders are made for
SAMPLES_PER_FRAME = 160  # one frame (encoder output, phone label) is 10 ms
LONGEST_SHOWN = 200  # characters of one name, path or reason in a message
REFUSED = 2  # exit status after a UserError
UNREAD = 128 + signal.SIGPIPE  # exit status where whoever read the output has gone


class UserError(Exception):
    """Something that the user can put right: shown as one line, without a traceback, exit status 2.

    The message names the file, line or flag, and the way out.
    """


class ToldElsewhere(UserError):
    """An error that another process of the run has told the user of already."""


class Muted(io.TextIOBase):
    """What a process prints on that isn't the first of its run: nobody reads it."""

    def write(self, text):
        return len(text)


def seed_from(*parts):
    """A seed of 32 bits that depends on all `parts` (numbers and strings) and on nothing else.

    Nearby positions, such as (seed, epoch, 0) and (seed, epoch, 1), give unrelated seeds. The CPU
    generator of PyTorch uses only 32 bits of its seed, hence a hash and not a sum or a shift.
    """
    text = "\x1f".join(str(part) for part in parts)
    content = text.encode(errors="surrogateescape")  # a part may be any name of a file
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "little")


def generator_from(*parts, device="cpu"):
    """A private `torch.Generator` seeded by `seed_from(*parts)`: draws from it disturb no other."""
    return torch.Generator(device=device).manual_seed(seed_from(*parts))


def recurrent(network, frames, *state):
    """`network(frames, *state)` of a recurrent network, in float32 under autocast.

    There, cuDNN's networks would compute in float16 whatever the type asked for, in which the small
    gradients of this program vanish, and leave hidden states that only such a run can go on from.
    """
    kind = frames.device.type
    if not torch.is_autocast_enabled(kind):
        return network(frames, *state)
    with torch.autocast(kind, enabled=False):
        return network(frames.float(), *state)


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


def first_few(items, limit=5):
    """The first items of a list as text, for a message; safe to print whatever a file is named."""
    items = list(items)
    cut = (f"{item[:LONGEST_SHOWN]}..." if item[LONGEST_SHOWN:] else item for item in items[:limit])
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return "".join(c if c.isprintable() else "?" for c in ", ".join(cut) + rest)


def counted(n, noun):
    return f"{n:,} {noun}{'s' * (n != 1)}"


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


class HelpWithDefaults(argparse.HelpFormatter):
    """Help that ends with a flag's default, where it has one that its text doesn't name."""

    def _get_help_string(self, action):
        says_nothing = repr(action.default) in ("None", "False", "''", repr(argparse.SUPPRESS))
        if says_nothing or "(default: " in action.help or not action.option_strings:
            return action.help
        return f"{action.help} (default: %(default)s)"


class CommandLine(argparse.ArgumentParser):
    """A parser whose refusals are one line: the usage of dozens of flags would bury it."""

    def __init__(self, *, formatter_class=HelpWithDefaults, **options):
        super().__init__(formatter_class=formatter_class, **options)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


@contextlib.contextmanager
def flushed_output():
    """A block whose output is written at its end, where a closed pipe can still be handled."""
    try:
        yield
    except SystemExit:  # as after --help
        _flush_output()
        raise
    _flush_output()


def _flush_output():
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:  # a full disk spoils nothing but the log
        pass


def discard_output():
    """Let the interpreter's own flush, at its end, find no closed pipe."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _in_one_line(error):
    """What to tell of a UserError, or of a lack of memory, of which PyTorch tells much more.

    None where it is another error.
    """
    if isinstance(error, UserError):
        return str(error)
    told = str(error).partition("\n")[0].partition(" Including non-PyTorch memory")[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"{told} Smaller batches need less; other programs on that GPU may be in the way"
    _, of_cpu, told = told.partition("DefaultCPUAllocator: ")
    return f"{told}. Smaller batches and networks need less" if of_cpu else None


def command(main):
    """Make `main(argv)` a program: a UserError becomes one line on stderr and exit status 2.

    So does memory where it doesn't suffice. A program whose output nobody reads any more ends as
    if by SIGPIPE, without a word.
    """

    @functools.wraps(main)
    def program(argv=None):
        try:
            with flushed_output():
                return main(argv)
        except ToldElsewhere:
            sys.exit(REFUSED)
        except BrokenPipeError:  # whoever read what is printed has gone, as in `| head`
            discard_output()
            sys.exit(UNREAD)
        except (UserError, RuntimeError) as error:
            told = _in_one_line(error)
            if told is None:
                raise
            with contextlib.suppress(OSError):  # what it says on stderr must be said
                sys.stdout.flush()
            print(f"error: {told}", file=sys.stderr)
            sys.exit(REFUSED)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(130)

    return program
