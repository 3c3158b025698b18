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
from dataset import Batch
from feature_loader import load_waveform
from utils.files import atomic_path, writing_to
from utils.misc import SAMPLE_RATE, Position
from utils.report.plot_capture import draw_spectrogram
from utils.report.plots import save_figure
from utils.run.command import CommandLine, command
from utils.run.flags import DECLARED, build_parser
from utils.run.rules import check_augmentation, check_recordings, complete

SECONDS = 3


@command
def main(argv=None):
    args = parse_arguments(argv)
    check_recordings(args)
    clean = load_waveform(args.file)
    args.sizeWindow = clean.size(1)
    complete(args, set())
    check_augmentation(args, set())
    chains, copies = (
        [*([kind] for kind in args.augment_type), args.augment_type],
        {"clean": clean[0]},
    )
    for args.augment_type in chains:
        augment = Augmentation(args, np.zeros(1)).draw(Position(0, 0, 0), np.zeros(1), None)
        batch = augment(Batch(clean[None], *[None] * 4), lambda tensor: tensor)
        copies["_".join(args.augment_type)] = batch.past[0, 0]
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


def parse_arguments(argv):
    """The flags, completed by the defaults of train.py."""
    parser = CommandLine(prog="hear_augmentation.py", description=__doc__)
    parser.add_argument("file", help="a recording at 16 kHz")
    parser.add_argument("out", help="directory for sounds and picture")
    parser.add_argument("--random_seed", type=int, default=0, metavar="SEED", help="random seed")
    for name, options in DECLARED["augmentation"]:
        parser.add_argument(f"--{name}", **options)
    parser.set_defaults(augment_past=True, augment_type=["pitch", "additive", "reverb"])
    return Namespace(**vars(build_parser().parse_args([])) | vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
