"""Checks of the arguments of stats; they run before anything is loaded."""

import math
from pathlib import Path

from utils.files import check_writable
from utils.misc import UserError

REPRESENTATIONS = ("conv_repr", "ctx_repr", "seg_conv", "seg_ctx")


def choice(value, choices, what):
    """`value` if it is one of `choices`."""
    if value not in choices:
        raise UserError(f"--captureSetStats: no {what} {value!r}; there are {', '.join(choices)}")
    return value


def positive_number(value, what):
    """The text `value` as a number, which must be above 0."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"--captureSetStats: {what} must be a number above 0, not {value!r}")
    return number


def picture_directory(value):
    """The directory named by `value`; raises UserError if it can't be written."""
    if not value:
        raise UserError("--captureSetStats: the directory for pictures is empty")
    check_writable(value, f"--captureSetStats: {value}: pictures")
    return Path(value)
