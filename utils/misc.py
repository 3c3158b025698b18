"""Small things that every floor of the program uses: units, errors, positions, seeds."""

import hashlib
from typing import NamedTuple

import torch

SAMPLE_RATE = 16_000  # Hz; the only rate the encoders are made for
SAMPLES_PER_FRAME = 160  # one frame (encoder output, phone label) is 10 ms
LONGEST_SHOWN = 200  # characters of one name, path or reason in a message


class UserError(Exception):
    """Something that the user can put right: shown as one line, without a traceback, exit status 2.

    The message names the file, line or flag, and the way out.
    """


class ReportedElsewhere(UserError):
    """An error that another process of the run reports to the user."""


class Position(NamedTuple):
    """A place in the data: batch number `batch` of pack `pack`, counted over all ranks."""

    epoch: int
    pack: int
    batch: int


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


def first_few(items, limit=5):
    """The first items of a list as text, for a message; safe to print whatever a file is named."""
    items = list(items)
    cut = (f"{item[:LONGEST_SHOWN]}..." if item[LONGEST_SHOWN:] else item for item in items[:limit])
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return "".join(c if c.isprintable() else "?" for c in ", ".join(cut) + rest)


def counted(n, noun):
    return f"{n:,} {noun}{'s' * (n != 1)}"
