"""Small things that every floor of the program uses: units, errors, positions, seeds."""

import hashlib
import unicodedata
from typing import NamedTuple

import torch

# `torch.compiler.disable`, but without importing the compiler: that takes as long as PyTorch.
from torch._compile import _disable_dynamo as not_compiled  # noqa: F401

SAMPLE_RATE = 16_000  # Hz; the only sample rate that encoders accept
SAMPLES_PER_FRAME = 160  # one frame (encoder output or phone label) is 10 ms
BOUNDARY_RATE = "boundariesPerSecond"  # begins the names, in the logs, of that of a policy
OF_SEGMENTS = "_segments"  # ends the names, in the logs, of the losses of the upper of two levels
LONGEST_SHOWN = 200  # characters of one name, path or reason in a message


class UserError(Exception):
    """An error that the user can fix: shown in one line without a traceback, exit status 2.

    The message names the file, line or flag, and what to do.
    """


class ReportedElsewhere(UserError):
    """An error that another process of the run reports to the user."""


class Chance(NamedTuple):
    """The mean loss and accuracy of a criterion at chance level; None if unknown."""

    loss: float | None = None
    accuracy: float | None = None


NO_CHANCE = Chance()


class Position(NamedTuple):
    """A place in the data: batch number `batch` of pack `pack`, counted over all ranks."""

    epoch: int
    pack: int
    batch: int


class Progress(NamedTuple):
    """How far training has come: its epoch, and the optimiser's steps in that and in all epochs."""

    epoch: int = 0
    steps_in_epoch: int = 0
    steps: int = 0


def seed_from(*parts):
    """A 32-bit seed that depends only on `parts` (numbers and strings).

    Nearby parts, such as (seed, epoch, 0) and (seed, epoch, 1), give unrelated seeds. PyTorch's CPU
    generator uses only 32 bits of its seed, hence a hash instead of a sum or a shift.
    """
    text = "\x1f".join(str(part) for part in parts)
    content = text.encode(errors="surrogateescape")  # a part may be any file name
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "little")


def generator_from(*parts, device="cpu"):
    """A new `torch.Generator`, seeded by `seed_from(*parts)`."""
    return torch.Generator(device=device).manual_seed(seed_from(*parts))


def in_turns(groups):
    """The order (N,) in which groups take turns: first the first of each group in `groups` (N,)."""
    by_group, sizes = groups.argsort(stable=True), groups.unique(return_counts=True)[1]
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    turn = torch.empty_like(by_group).scatter_(0, by_group, torch.arange(len(groups)) - starts)
    return turn.argsort(stable=True)


def recurrent(network, frames, *state):
    """Call a recurrent network in float32, also under autocast.

    Under autocast, cuDNN would compute in float16 even if bfloat16 is asked for: small gradients
    would vanish, and a run with another precision couldn't resume from its hidden states.
    """
    kind = frames.device.type
    if not torch.is_autocast_enabled(kind):
        return network(frames, *state)
    with torch.autocast(kind, enabled=False):
        return network(frames.float(), *state)


def first_few(items, limit=5):
    """The first items of a list, for a message: printable whatever the names contain."""
    items = list(items)
    cut = (f"{item[:LONGEST_SHOWN]}..." if item[LONGEST_SHOWN:] else item for item in items[:limit])
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return "".join(c if c.isprintable() else "?" for c in ", ".join(cut) + rest)


def nfc(text):
    """The text in Unicode's composed form: a Mac writes é in file names as e and an accent.

    Names are compared in this form only, else two that look the same could differ.
    """
    return unicodedata.normalize("NFC", text)


def counted(n, noun):
    """A number with its noun: "1 file", "2,000 files"."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def mean(numbers):
    return sum(numbers) / len(numbers)


def percent(fraction):
    return f"{100 * fraction:.1f} %"
