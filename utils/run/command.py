"""What makes a function a program: its command line, one line for an error, the exit status."""

import argparse
import contextlib
import functools
import os
import signal
import sys

import torch

from utils.misc import ReportedElsewhere, UserError

REFUSED = 2  # exit status after a UserError
UNREAD = 128 + signal.SIGPIPE  # exit status where whoever read the output has gone


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
        except ReportedElsewhere:
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
