"""Turns a function into a program: its command line, one line for an error, the exit status."""

import argparse
import contextlib
import difflib
import functools
import math
import re
import signal
import sys

import torch

from utils.misc import ReportedElsewhere, UserError, first_few
from utils.run.console import discard_output

EXIT_USER_ERROR = 2  # exit status after a UserError
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE  # exit status when the reader of the output has gone

# The originals' commands spell some flags differently: each command takes all its spellings.
SPELLINGS = (
    {"--get_encoded", "--getEncoded", "--encoder_layer"},
    {"--max_size_seq", "--maxSizeSeq"},
    {"--seq_norm", "--seqNorm"},
    {"--seqList", "--pathSeq"},
)


class HelpWithDefaults(argparse.HelpFormatter):
    """Help with the default of each flag whose text doesn't name it; keeps an epilog's lines."""

    def _get_help_string(self, action):
        default = action.default
        says_nothing = default is False or default in (None, "", [], argparse.SUPPRESS)
        if says_nothing or "(default: " in action.help or not action.option_strings:
            return action.help
        return f"{action.help} (default: %(default)s)"

    def _fill_text(self, text, width, indent):
        return text if "\n" in text else super()._fill_text(text, width, indent)


class CommandLine(argparse.ArgumentParser):
    """A parser whose usage and errors are one line each, since dozens of flags would bury them.

    description: a sentence, or a docstring whose second paragraph, indented, are examples: these
    come last in its help.
    """

    def __init__(self, *, formatter_class=HelpWithDefaults, description="", **options):
        title, *rest = (description or "").split("\n\n")
        if rest and rest[0].startswith("    "):
            description = "\n\n".join([title, *rest[1:]])
            options.setdefault("epilog", f"examples:\n\n{rest[0]}")
        super().__init__(formatter_class=formatter_class, description=description, **options)

    def format_usage(self):
        return f"usage: {self.usage or ' '.join(self._usage())}\n"

    def format_help(self):
        self.usage = self.format_usage().removeprefix("usage: ")
        return super().format_help()

    def _usage(self):
        """Yield the words of the usage: what every call needs."""
        forms = {"?": "[{}]", "+": "{} ...", argparse.PARSER: "{} ..."}
        yield self.prog
        for action in self._actions:
            name = action.metavar or action.dest
            if action.required and action.option_strings:
                yield f"{action.option_strings[0]} {name}"
            elif not action.option_strings:
                yield forms.get(action.nargs, "{}").format(name)
        yield "[flags]"

    def error(self, message):
        value = re.fullmatch(r"argument (\S+): (.+: must be .+)", message)  # of a type below
        if value:
            raise UserError(f"{value[1]} {value[2]}")
        raise UserError(f"{message.removeprefix('argument ')} (--help lists the flags)")

    def parse_known_args(self, args=None, namespace=None):
        """Like argparse's, but refuses an unknown flag here, where subcommands see it, too."""
        for spellings in SPELLINGS:
            for flag in spellings & self._option_string_actions.keys():
                self._option_string_actions |= dict.fromkeys(
                    spellings, self._option_string_actions[flag]
                )
        namespace, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            if word.startswith("-"):
                self._refuse_flag(first_few([word.partition("=")[0]]))
        return namespace, unknown

    def _refuse_flag(self, name):
        known = {flag.lower(): flag for flag in self._option_string_actions}
        nearest = difflib.get_close_matches(name.lower(), known, n=1)
        if not nearest:
            self.error(f"unrecognized flag {name}")
        raise UserError(f"unrecognized flag {name}: did you mean {known[nearest[0]]}?")

    def _get_option_tuples(self, option_string):
        """Flags that `option_string` abbreviates, without what would make it ambiguous: hidden
        ones, and a second spelling of one."""
        found = super()._get_option_tuples(option_string)
        found = {id(match[0]): match for match in found if match[0].help != argparse.SUPPRESS}
        return list(found.values())


def refuse_any(flags, reason):
    """Raise UserError, naming the first, if there are flags in this set."""
    for name in sorted(flags):
        raise UserError(f"--{name} {reason}")


# Types of flags: finite numbers within bounds.


def at_least(lowest, kind=int):
    return _number(kind, lambda n: n >= lowest, f"at least {lowest}")


def above(lowest, kind=float):
    return _number(kind, lambda n: n > lowest, f"above {lowest}")


def between(lowest, highest, kind=int):
    """From `lowest` to `highest`, both included."""
    return _number(kind, lambda n: lowest <= n <= highest, f"from {lowest} to {highest}")


def _number(kind, is_allowed, bound):
    expected = "a whole number" if kind is int else "a finite number"

    def convert(text):
        try:
            number = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: must be {expected}") from None
        if isinstance(number, float) and not math.isfinite(number):
            raise argparse.ArgumentTypeError(f"{number}: must be {expected}")
        if not is_allowed(number):
            raise argparse.ArgumentTypeError(f"{number}: must be {bound}")
        return number

    return convert


def each_at_least(lowest):
    """A whole number, or several, such as 10,50,199, which stay text, as in checkpoints."""

    def convert(text):
        numbers = [at_least(lowest)(part) for part in text.split(",")]
        return numbers[0] if len(numbers) == 1 else text

    return convert


def numbers_in(value):
    """The numbers in a value of `each_at_least`, a list; [] for None."""
    return [] if value is None else [int(part) for part in str(value).split(",")]


decay_rate = _number(float, lambda n: 0 <= n < 1, "in [0, 1)")  # Adam's betas


class DefaultExtension(str):
    """The file name extension to use if the user gives none and there are several kinds of files
    (`choose_extension` in utils/data/listing.py)."""


AUDIO_EXTENSION = DefaultExtension(".flac")


def band(text):
    """LOW-HIGH in Hz; stays text, as in checkpoints."""
    low, _, high = text.partition("-")
    if not (low.isdecimal() and high.isdecimal() and int(low) < int(high) <= 8000):
        raise argparse.ArgumentTypeError(f"{text!r}: must be LOW-HIGH in Hz, up to 8000")
    return text


def extension(text):
    """A file name extension: `flac` means .flac; one with a dot, such as _a.flac, stays."""
    return f".{text}" if text and "." not in text else text


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


def _in_one_line(error):
    """A UserError, or an error of missing memory (PyTorch's is a page long), as one line of text.

    None for any other error.
    """
    if isinstance(error, UserError):
        return str(error)
    text = str(error).partition("\n")[0].partition(" Including non-PyTorch memory")[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"{text} Smaller batches need less; other programs on that GPU may be in the way"
    _, on_cpu, text = text.partition("DefaultCPUAllocator: ")
    return f"{text}. Smaller batches and networks need less" if on_cpu else None


def command(main):
    """Make `main(argv)` a program: a UserError becomes one line on stderr and exit status 2.

    So does running out of memory. A program whose output nobody reads any more ends silently, as if
    by SIGPIPE.
    """

    @functools.wraps(main)
    def program(argv=None):
        try:
            with flushed_output():
                return main(argv)
        except ReportedElsewhere:
            sys.exit(EXIT_USER_ERROR)
        except BrokenPipeError:  # the reader has gone, as in `| head`
            discard_output()
            sys.exit(EXIT_BROKEN_PIPE)
        except (UserError, RuntimeError) as error:
            line = _in_one_line(error)
            if line is None:
                raise
            with contextlib.suppress(OSError):  # stderr must get its line whatever happens here
                sys.stdout.flush()
            print(f"error: {line}", file=sys.stderr)
            sys.exit(EXIT_USER_ERROR)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(130)

    return program
