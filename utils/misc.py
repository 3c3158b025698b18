"""Small things that every floor of the program uses: units, errors, seeds, the allocator."""

import argparse
import ctypes
import functools
import hashlib
import sys

import torch

SAMPLE_RATE = 16_000  # Hz; the only rate the encoders are made for
SAMPLES_PER_FRAME = 160  # one frame (encoder output, phone label) is 10 ms


class UserError(Exception):
    """Something that the user can put right: shown as one line, without a traceback, exit status 2.

    The message names the file, line or flag, and the way out.
    """


def seed_from(*parts):
    """A seed of 32 bits that depends on all `parts` (numbers and strings) and on nothing else.

    Nearby positions, such as (seed, epoch, 0) and (seed, epoch, 1), give unrelated seeds. The CPU
    generator of PyTorch uses only 32 bits of its seed, hence a hash and not a sum or a shift.
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def generator_from(*parts, device="cpu"):
    """A private `torch.Generator` seeded by `seed_from(*parts)`: draws from it disturb no other."""
    return torch.Generator(device=device).manual_seed(seed_from(*parts))


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


class CommandLine(argparse.ArgumentParser):
    """A parser whose refusals are one line: the usage of dozens of flags would bury it."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def command(main):
    """Make `main(argv)` a program: a UserError becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def program(argv=None):
        try:
            return main(argv)
        except UserError as error:
            sys.stdout.flush()
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return program


def run_command(main, argv=None):
    """Run `main(argv)` as a program and exit with its status."""
    sys.exit(command(main)(argv))
