"""Live audio: the real-time factor of a model that gets it in pieces, compared with one pass.

    python benchmarks/streaming.py [--pieces 10 20 100] [--json FILE]

The real-time factor on one core is the processor time of a model, in one thread, divided by the
duration of the audio; live audio needs less than 1. The model has the default architecture (256
channels, one LSTM layer); the audio is noise. Each way processes all of it several times, in turn;
figures are medians.
"""

import argparse
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import torch

from feature_loader import StreamingModel
from model import build_model
from utils.files import save_json
from utils.misc import SAMPLE_RATE
from utils.run.flags import build_parser


def main(argv=None):
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    model = build_model(build_parser().parse_args([])).eval()
    audio = 0.1 * torch.randn(args.seconds * SAMPLE_RATE)
    sizes = {"whole": len(audio)} | {f"{ms} ms": ms * SAMPLE_RATE // 1000 for ms in args.pieces}
    times = {name: [] for name in sizes}
    for _ in range(args.repeat):
        for name, size in sizes.items():
            start = time.process_time()
            stream(model, audio.split(size))
            times[name].append((time.process_time() - start) / args.seconds)
    factors = {name: statistics.median(values) for name, values in times.items()}
    print(f"torch {torch.__version__}")
    print(f"{'pieces':>10}{'real-time factor':>20}{'/ whole':>10}")
    for name, factor in factors.items():
        print(f"{name:>10}{factor:20.4f}{factor / factors['whole']:10.1f}")
    if args.json:
        save_json(args.json, {"torch": torch.__version__, **vars(args), "factors": factors})


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--pieces", type=int, nargs="+", default=[10, 20, 100], metavar="MS", help="their lengths")
    add("--seconds", type=int, default=10, help="length of the audio")
    add("--repeat", type=int, default=5, help="times that each way takes all of it")
    add("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(argv)


def stream(model, pieces):
    live = StreamingModel(model)
    for piece in pieces:
        live.push(piece)
    live.close()


if __name__ == "__main__":
    main()
