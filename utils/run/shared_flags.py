"""Flags, and a check of them, that several of the smaller commands share."""

from utils.misc import UserError
from utils.run.command import AUDIO_EXTENSION, above, at_least, decay_rate, extension

# A flag on two lines reads better than on seven, hence:
# fmt: off


LEVEL = {"choices": ("frames", "segments"), "default": "frames",
    "help": "level of a model trained with --multiLevel whose features are used; those of segments "
    "are repeated over their frames"}


def add_level(add, **changes):
    add("--level", **LEVEL | changes)


def add_device(add):
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: CUDA if available")


def add_extension(add, *names, default=AUDIO_EXTENSION, files="audio files"):
    add(*names, "--file_extension", type=extension, default=default, metavar="EXT",
        help=f"ending of the names of the {files} (default: that of the kind that the folder "
        f"holds; of several kinds, {default})")


def add_reading(add):
    """Flags of reading a corpus."""
    add("--ignore_cache", action="store_true",
        help="scan the audio files again; needed when files were added or removed")
    add("--n_process_loader", type=at_least(1), default=8, metavar="N",
        help="threads that decode audio, at most one per processor")
    add("--debug", action="store_true",
        help="use only the first 1000 utterances for training and 100 for validation")


def add_adam(add, epsilon):
    add("--lr", type=above(0), default=2e-4, help="learning rate")
    add("--beta1", type=decay_rate, default=0.9, help="Adam's beta 1")
    add("--beta2", type=decay_rate, default=0.999, help="Adam's beta 2")
    add("--epsilon", type=above(0), default=epsilon, help=f"Adam's epsilon (default: {epsilon})")
    add("--random_seed", type=int, default=0, metavar="SEED", help="random seed")


# fmt: on


def check_same_flags(place, stored, args, names, what):
    """Raise UserError if the results in `place` were made with other values of the flags `names`.

    stored: their flags, a dict; what: names the results in the message
    """
    stored = {"level": "frames"} | stored  # of versions without it
    for name in names:
        if stored.get(name) != getattr(args, name):
            raise UserError(
                f"{place}: holds {what} made with another {name} ({stored.get(name)}): name "
                "another directory, or remove this one"
            )
