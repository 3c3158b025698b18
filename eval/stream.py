"""Features of live audio: raw samples on standard input, frames on standard output as they come.

    arecord -q -t raw -f S16_LE -r 16000 -c 1 | python eval/stream.py CHECKPOINT | CONSUMER
    ffmpeg -v error -i TALK.mp3 -f s16le -ar 16000 -ac 1 - | python eval/stream.py CHECKPOINT > FILE

Samples are mono at 16 kHz, 16-bit little-endian integers or, with --float32, little-endian floats
in [-1, 1]. Each frame of 10 ms is written as soon as it is complete, 9.5 ms after its end, as D
float32 values without any header. In Python, `np.fromfile(FILE, "<f4").reshape(-1, D)` reads them.
--text writes one line per frame instead. The width D and all messages go to standard error.
"""

import contextlib
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import numpy as np

from feature_loader import StreamingModel, load_model
from utils.misc import SAMPLE_RATE, UserError, counted
from utils.run.command import CommandLine, command
from utils.run.machine import device_from, set_threads
from utils.run.shared_flags import add_device

BYTES_AT_ONCE = 4 * SAMPLE_RATE  # read at most; live audio comes in far smaller pieces


@command
def main(argv=None):
    args = parse_arguments(argv)
    audio, frames = sys.stdin.buffer, sys.stdout.buffer
    with contextlib.redirect_stdout(sys.stderr):
        set_threads(device_from(args.device))
        model, dim_context, dim_encoded = load_model([args.checkpoint])
        stream = StreamingModel(model.to(device_from(args.device)))
        width = dim_encoded if args.get_encoded else dim_context
        print(f"{width} values per frame of 10 ms", flush=True)
        for piece in read_pieces(audio, args.float32):
            write_frames(frames, stream.push(piece), args)
        write_frames(frames, stream.close(), args)


def parse_arguments(argv):
    """The arguments, checked and completed. Raises UserError for those that can't work."""
    parser = CommandLine(prog="stream.py", description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="checkpoint, or a run's directory for the newest in it")
    add("--float32", action="store_true", help="samples are floats in [-1, 1], not 16-bit integers")
    add("--get_encoded", action="store_true", help="encoded frames instead of contexts")
    add("--text", action="store_true", help="one line per frame, its values separated by spaces")
    add("--seq_norm", action="store_true", help="refused: it needs the end of the audio first")
    add_device(add)
    args = parser.parse_args(argv)
    if args.seq_norm:
        raise UserError("--seq_norm: the means over live audio are known only at its end")
    if sys.stdin.isatty():
        raise UserError("standard input is a terminal: pipe raw audio into it (--help shows how)")
    if sys.stdout.isatty() and not args.text:
        raise UserError("standard output is a terminal: redirect it, or read frames with --text")
    return args


def read_pieces(stream, as_floats):
    """Yield the samples of a binary stream as they come, (n,) float32."""
    kind, scale = ("<f4", 1) if as_floats else ("<i2", 2**15)
    size, rest = np.dtype(kind).itemsize, b""
    is_first = True
    while content := stream.read1(BYTES_AT_ONCE):
        if is_first and content.startswith((b"RIFF", b"fLaC", b"OggS")):
            raise UserError("standard input is an audio file: only its raw samples can be read")
        is_first = False
        content = rest + content
        end = len(content) // size * size
        rest = content[end:]
        yield np.frombuffer(content[:end], kind).astype(np.float32) / scale
    if rest:
        print(f"warning: {counted(len(rest), 'byte')} at the end are no whole sample")


def write_frames(stream, outputs, args):
    """Write the contexts or the encoded frames of `outputs`, and flush."""
    frames = outputs[args.get_encoded].numpy()
    if args.text:
        np.savetxt(stream, frames, fmt="%.9g")
    else:
        stream.write(frames.astype("<f4").tobytes())
    stream.flush()


if __name__ == "__main__":
    main()
