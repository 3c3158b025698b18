"""Flags, and a check of them, that several of the smaller commands share."""

from utils.misc import UserError
from utils.normalisation import FEATURE_NORMS
from utils.run.command import AUDIO_EXTENSION, above, at_least, decay_rate, each_at_least, extension

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
        help=f"file name extension of the {files} (default: the one found in the folder; "
        f"{default} if there are several)")


def add_reading(add):
    """Flags for reading a corpus."""
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


def add_feature_norm(add, over):
    add("--feature_norm", choices=FEATURE_NORMS, default="none",
        help=f"scale features to zero mean and unit variance over each speaker or utterance{over}")


def add_probe_flags(add):
    """Flags of probes, in training and of a finished model."""
    add("--linsep_hidden", type=at_least(0), default=0, metavar="D",
        help="a hidden layer of D units with ReLU in each probe (0: none)")
    add("--linsep_times", type=at_least(1), default=1, metavar="N",
        help="train N classifiers, with different initial weights and data orders, and report mean "
        "and standard deviation")
    add("--knn", type=each_at_least(1), metavar="K", help="also classify by the K nearest of at "
        "most 200,000 training frames (by cosine); 1,10 for several K")
    add_feature_norm(add, " of the set")


# fmt: on


def check_probe_flags(args, ctc):
    """Refuse what can't be combined; ctc: the flag that asks for CTC, if it is given."""
    if args.linsep_hidden and args.linsep_net_layers > 1:
        raise UserError("--linsep_hidden and --linsep_net_layers: choose one of them")
    if args.knn and ctc:
        raise UserError(f"--knn can't be used with {ctc}: neighbours are of single frames")


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
