"""Flags, bounds and checks that several of the smaller commands share.

Bounds are types for argparse: each turns the text of a flag into its value, or refuses it.
"""

from argparse import ArgumentTypeError

from utils.misc import UserError


def at_least(least, kind=int):
    """A type: numbers of this kind from `least` up."""
    return _bounded(kind, lambda value: value >= least, f"at least {least}")


def below_one(text):
    """A type: a float in [0, 1)."""
    return _bounded(float, lambda value: 0 <= value < 1, "in [0, 1)")(text)


def above_zero(text):
    """A type: a finite float above 0."""
    return _bounded(float, lambda value: 0 < value < float("inf"), "above 0")(text)


def _bounded(kind, is_allowed, bound):
    def parse(text):
        value = kind(text)
        if not is_allowed(value):
            raise ArgumentTypeError(f"must be {bound}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse's "invalid int value: 'x'"
    return parse


# A flag on two lines reads better than on seven, hence:
# fmt: off


def add_device(add):
    add("--device", default="auto", choices=["auto", "cpu", "cuda"],
        help="auto: CUDA if available (default: auto)")


def add_extension(add, default, files="audio files"):
    add("--file_extension", default=default, metavar="EXT",
        help=f"ending of the names of the {files} (default: {default})")


def add_reading(add):
    """How the audio is read."""
    add("--n_process_loader", type=at_least(1), default=8, metavar="N",
        help="threads that decode audio (default: 8)")
    add("--debug", action="store_true",
        help="use only the first 1000 utterances for training and 100 for validation")


def add_adam(add, epsilon):
    add("--lr", type=above_zero, default=2e-4, help="learning rate (default: 2e-4)")
    add("--beta1", type=below_one, default=0.9, help="Adam's beta 1 (default: 0.9)")
    add("--beta2", type=below_one, default=0.999, help="Adam's beta 2 (default: 0.999)")
    add("--epsilon", type=above_zero, default=epsilon, help=f"Adam's epsilon (default: {epsilon})")
    add("--random_seed", type=int, default=0, metavar="SEED", help="random seed (default: 0)")


# fmt: on


def check_same_flags(place, stored, args, names, what):
    """Raise UserError if the results in `place` were made with other values of the flags `names`.

    stored: their flags, a dict; what: names the results in the message
    """
    for name in names:
        if stored.get(name) != getattr(args, name):
            raise UserError(
                f"{place}: holds {what} made with another {name} ({stored.get(name)}): name "
                "another directory, or remove this one"
            )
