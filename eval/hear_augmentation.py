"""Hear and see what augmentation makes of a recording.

    python eval/hear_augmentation.py FILE.flac OUT --augment_type pitch additive reverb

Writes OUT/<type>.wav for each type and for their chain, and OUT/spectrograms.png of the first three
seconds. Flags are those of train.py; another --random_seed draws other parameters.
"""

import os
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import numpy as np
import soundfile
from matplotlib.figure import Figure

from augmentation import Augmentation
from feature_loader import load_waveform
from utils.files import atomic_path, writing_to
from utils.misc import SAMPLE_RATE, UserError
from utils.report.plot_capture import draw_spectrogram
from utils.report.plots import save_figure
from utils.run.command import CommandLine, command
from utils.run.flags import DECLARED, build_parser
from utils.run.rules import check_augmentation, check_recordings, complete

SECONDS = 3


@command
def main(argv=None):
    args = parse_arguments(argv)
    clean = load_waveform(args.file)
    augmentation, copies = open_augmentation(args, clean.size(1)), {"clean": clean[0]}
    for name, types in each_and_all(args.augment_type).items():
        copies[name] = augmentation.copy(clean, types, 0, 0, 0)[0]
    figure = Figure(figsize=(8, 2.5 * len(copies)), layout="constrained")
    with writing_to(args.out):
        for place, name in zip(figure.subfigures(len(copies)), copies, strict=True):
            waveform = copies[name].numpy()
            draw_spectrogram(place, SECONDS, waveform[: SECONDS * SAMPLE_RATE], ())
            place.suptitle(name)
            with atomic_path(Path(args.out, f"{name}.wav")) as temporary:
                soundfile.write(temporary, waveform, SAMPLE_RATE, "FLOAT")
        save_figure(figure, Path(args.out, "spectrograms.png"))
    print(f"{', '.join(copies)}: {args.out}")


def open_augmentation(args, n_samples):
    """The Augmentation that the flags ask for, of waveforms of `n_samples` or more."""
    check_recordings(args)
    args.sizeWindow = n_samples
    complete(args, set())
    if not args.augment_type:
        raise UserError("--augment_type: name the effects, such as pitch additive reverb")
    check_augmentation(args, set())
    return Augmentation(args, np.zeros(1))


def each_and_all(types):
    """Name -> types of augmentation: each by itself, and the chain of all."""
    return {"_".join(chain): chain for chain in (*([kind] for kind in types), types)}


def parse_arguments(argv):
    """The flags, completed by the defaults of train.py."""
    parser = CommandLine(prog="hear_augmentation.py", description=__doc__)
    parser.add_argument("file", help="a recording at 16 kHz")
    parser.add_argument("out", help="directory for sounds and picture")
    return parse_with_augmentation(parser, argv)


def parse_with_augmentation(parser, argv):
    """The flags of `parser`, those of augmentation, and the defaults of train.py."""
    parser.add_argument("--random_seed", type=int, default=0, metavar="SEED", help="random seed")
    for name, options in DECLARED["augmentation"]:
        parser.add_argument(f"--{name}", **options)
    parser.set_defaults(augment_past=True, augment_type=["pitch", "additive", "reverb"])
    return Namespace(**vars(build_parser().parse_args([])) | vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
