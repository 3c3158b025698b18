"""Pictures of a capture, one for each window.

    python utils/report/plot_capture.py CAPTURE/10 --windows 0 5

CAPTURE/10 is the directory of one epoch below `--pathCaptureSave`. A picture shows whatever was
captured of: the spectrogram (if the audio is found), boundaries of phones and of the model's
segments, the similarity of every pair of frames in encoding and context, the CPC-CTC prediction
that each matched frame is aligned to, and the log scores that the alignment follows, at some
consecutive anchors, as in J. Chorowski et al., "Aligned contrastive predictive coding", Interspeech
2021.
"""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import utils.run.before_torch  # noqa: F401

import numpy as np
import soundfile
import torch
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

from utils.capture import CaptureReader, prediction_names
from utils.data.audio import open_audio, reason
from utils.data.labels import read_symbols, symbols_beside
from utils.files import writing_to
from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME, UserError
from utils.report.plots import save_figure
from utils.run.command import CommandLine, command

DRAWN = (
    "conv_repr",
    "ctx_repr",
    "speaker_align",
    "phone_align",
    "seg_boundaries",
    "cpcctc_align",
    "cpcctc_log_scores",
)
TITLES = {"conv_repr": "encoder", "ctx_repr": "context"}
SECONDS_PER_FRAME = SAMPLES_PER_FRAME / SAMPLE_RATE
N_ANCHORS = 8  # consecutive anchors whose log scores are drawn
LOG_ZERO = -500  # lower log scores are those of a mask, -1000
WIDTH, LEFT, RIGHT = 15.0, 0.9, 1.2  # inches: of the figure, and its margins


class Segment(NamedTuple):
    """A phone in a window: frames `first` to `end`, exclusive."""

    first: int
    end: int
    symbol: str


@command
def main(argv=None):
    args = parse_arguments(argv)
    reader = open_capture(args.directory)
    windows = args.windows or first_windows(reader, 4)
    symbols = find_symbols(args.phones, reader.flags)
    out = Path(args.out or Path(args.directory, "pictures"))
    with writing_to(out, "--out"):
        for path in draw_windows(reader, windows, symbols, out, args.pathDB, args.position):
            if path is None:
                raise UserError(
                    f"{args.directory}: nothing to draw: no audio was found, and there is no "
                    f"picture of {', '.join(reader.names)} alone"
                )
            print(path)


# A flag on two lines reads better than on seven, hence:
# fmt: off


def parse_arguments(argv):
    parser = CommandLine(prog="plot_capture.py", description=__doc__)
    add = parser.add_argument
    add("directory", metavar="DIR", help="a capture: <pathCaptureSave>/<epoch>")
    add("--windows", type=int, nargs="+", metavar="N", help="which to draw (default: the first 4)")
    add("--out", metavar="DIR", help="where pictures go (default: pictures/ in the capture)")
    add("--phones", metavar="FILE", help="symbols of the phone classes, one `id symbol` per line "
        "(default: phones.txt beside the run's phone labels, if it exists)")
    add("--pathDB", metavar="DIR", help="root of the audio (default: that of the captured run)")
    add("--position", type=int, metavar="FRAME",
        help=f"first of the {N_ANCHORS} anchors whose log scores are drawn "
        "(default: those in the middle of the window)")
    return parser.parse_args(argv)


# fmt: on


def open_capture(directory):
    """A `CaptureReader` of the names that can be drawn, or of all if none can."""
    reader = CaptureReader(directory)
    drawn = [name for name in reader.names if name in DRAWN]
    return CaptureReader(directory, drawn or reader.names)


def first_windows(reader, n_windows):
    """The indices of the first windows of a capture, at most `n_windows`."""
    first = reader.ranges[0][0]
    return range(first, first + min(n_windows, reader.n_windows))


def draw_windows(reader, windows, symbols, out, root=None, position=None):
    """Draw windows into the folder `out`, yielding the path of each picture.

    The path is None if nothing of a window can be drawn. root: of the audio, if not that of the
    run; symbols, position: see `draw_window`
    """
    for index in windows:
        window = reader.window(index)
        waveform = find_waveform(reader, window, root)
        title = title_of(window, *file_border(reader, window))
        figure = draw_window(window, waveform, symbols, reader.flags, title, position)
        path = out / f"window_{index:05d}.png"
        if figure:
            save_figure(figure, path)
        yield path if figure else None


def find_symbols(path, flags):
    """Class -> symbol from a symbol file; without one, from the file beside the run's labels."""
    if path:
        return {number: symbol for symbol, number in read_symbols(path).items()}
    return symbols_beside(flags.get("path_phone_data"))


def find_waveform(reader, window, root):
    """The samples of a window, (n,) float32, or None if they can't be found.

    Raises UserError if they aren't in the database `root` named by the user.
    """
    n_samples = n_samples_of(reader, window)
    database = root or reader.flags.get("pathDB")
    if window.file is None or database is None or not n_samples:
        if root:
            raise UserError(f"{reader.directory}: has no index.json, so the audio can't be found")
        return None
    waveform = np.zeros(n_samples, np.float32)
    border, next_file = file_border(reader, window)
    try:
        _read_into(waveform[:border], Path(database, window.file), window.offset)
        if next_file is not None:
            _read_into(waveform[border:], Path(database, next_file), 0)
    except UserError as error:
        if root:
            raise
        print(f"{error}; drawn without audio (--pathDB names its root)")
        return None
    return waveform


def _read_into(waveform, path, offset):
    """Fill (n,) with samples from `offset`, as far as there are any."""
    try:
        with open_audio(path) as file:
            file.seek(offset)
            samples = file.read(len(waveform), dtype="float32", always_2d=True).mean(axis=1)
    except (OSError, soundfile.SoundFileError) as error:
        raise UserError(f"{path}: {reason(error)}") from error
    waveform[: len(samples)] = samples


def file_border(reader, window):
    """(number of samples before the next file begins, that file), for a window across two files.

    (None, None) if the window ends in the file it began in, or if that is unknown.
    """
    n_samples = n_samples_of(reader, window)
    file, offset = reader.location(window.window + 1)
    if file in (None, window.file) or not 0 < offset < n_samples:
        return None, None
    return n_samples - offset, file


def n_samples_of(reader, window):
    """L, from the flags or the frames; 0 if unknown."""
    return reader.flags.get("sizeWindow") or n_frames(window.tensors) * SAMPLES_PER_FRAME


def n_frames(tensors):
    """S, from any captured tensor; 0 if unknown."""
    for name in ("conv_repr", "ctx_repr", "phone_align"):
        if name in tensors:
            return len(tensors[name])
    for name in ("cpcctc_align", "cpcctc_log_scores"):
        if name in tensors:
            return sum(tensors[name].shape[:2])
    return 0


# -------------------------------------------------------------------------------- the figure


def title_of(window, border=None, next_file=None):
    """The title of a window's picture: its origin, and where in it the next file begins."""
    parts = [f"window {window.window}"]
    if window.file is not None:
        parts.append(f"{window.file} from {window.offset / SAMPLE_RATE:.2f} s")
    if "speaker_align" in window.tensors:
        folder, inside, _ = (window.file or "").partition("/")
        parts.append(f"speaker {folder if inside else window.tensors['speaker_align'].item()}")
    if next_file is not None:
        parts.append(f"after {border / SAMPLE_RATE:.2f} s {next_file}")
    return ", ".join(parts)


def draw_window(window, waveform, symbols, flags, title, position=None):
    """The figure of a `CapturedWindow`, or None if nothing of it can be drawn.

    waveform: (n,) or None; symbols: phone class -> symbol, where known
    flags: those of the captured run; position: the first anchor whose log scores are drawn
    """
    tensors = window.tensors
    phones = phone_segments(tensors["phone_align"], symbols) if "phone_align" in tensors else []
    length = n_frames(tensors) * SECONDS_PER_FRAME
    if waveform is not None:
        length = len(waveform) / SAMPLE_RATE
    panels = []  # (height in inches, drawing function, its arguments)
    if waveform is not None:
        starts = tensors["seg_boundaries"].nonzero() if "seg_boundaries" in tensors else []
        panels.append((2.3, draw_spectrogram, (waveform, phones, starts)))
    elif phones:
        panels.append((1.2, draw_phones, (phones,)))
    features = {name: tensors[name] for name in TITLES if name in tensors}
    if features:
        panels.append((6.8, draw_similarities, (features, phones)))
    names = prediction_names(n_predictions(tensors), flags)
    if "cpcctc_align" in tensors:
        panels.append((2.6, draw_alignment, (tensors["cpcctc_align"], names, phones)))
    if "cpcctc_log_scores" in tensors:
        panels.append((2.9, draw_log_scores, (tensors, names, phones, position)))
    if not panels:
        return None
    return _assemble(panels, title, length)


def _assemble(panels, title, length):
    """The figure with one panel below the other; `length` of the window in seconds."""
    heights = [0.5, *(height for height, *_ in panels)]
    figure = Figure(figsize=(WIDTH, sum(heights)))
    heading, *places = figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0)
    heading.text(LEFT / WIDTH, 0.3, title, fontsize=13)
    for place, (height, draw, arguments) in zip(places, panels, strict=True):
        place.subplots_adjust(
            left=LEFT / WIDTH,
            right=1 - RIGHT / WIDTH,
            top=1 - 0.35 / height,
            bottom=0.5 / height,
            wspace=0.12,
        )
        draw(place, length, *arguments)
    return figure


def phone_segments(labels, symbols):
    """The `Segment`s of labels (S,); a class without a symbol is labelled with its id.

    Frames without a label (-1) belong to none.
    """
    labels = labels.tolist()
    starts = [at for at in range(len(labels)) if at == 0 or labels[at] != labels[at - 1]]
    ends = [*starts[1:], len(labels)]
    return [
        Segment(start, end, symbols.get(labels[start], str(labels[start])))
        for start, end in zip(starts, ends, strict=True)
        if labels[start] >= 0
    ]


def n_predictions(tensors):
    """P; with only an alignment, the number that occur in it."""
    if "cpcctc_log_scores" in tensors:
        return tensors["cpcctc_log_scores"].shape[-1]
    return int(tensors["cpcctc_align"].max()) + 1 if "cpcctc_align" in tensors else 0


# -------------------------------------------------------------------------------- its panels


def draw_phones(place, length, phones):
    """A strip with only the phones."""
    axes = place.subplots()
    axes.set(xlim=(0, length), yticks=[], xlabel="time (s)")
    _mark_phones(axes, phones, "0.3")


def draw_spectrogram(place, length, waveform, phones, segment_starts=()):
    """Power in dB, 25 ms windows, with the phones above it and the model's segments at its foot."""
    size, hop = SAMPLE_RATE // 40, SAMPLES_PER_FRAME // 2
    signal = torch.from_numpy(waveform)
    signal = torch.nn.functional.pad(signal, (0, max(0, size - len(signal))))
    spectrum = torch.stft(signal, 512, hop, size, torch.hann_window(size), return_complex=True)
    decibels = 10 * (spectrum.abs().square() + 1e-10).log10().numpy()
    axes = place.subplots()
    axes.imshow(
        decibels,
        cmap="magma",
        aspect="auto",
        origin="lower",
        extent=(0, len(waveform) / SAMPLE_RATE, 0, SAMPLE_RATE / 2000),
        vmin=decibels.max() - 70,
    )
    axes.set(xlim=(0, length), ylabel="frequency (kHz)", xlabel="time (s)")
    for start in segment_starts:
        axes.axvline(float(start) * SECONDS_PER_FRAME, ymax=0.15, color="cyan", lw=2)
    _mark_phones(axes, phones, "white")


def _mark_phones(axes, phones, color):
    for phone in phones:
        if phone.first:
            axes.axvline(phone.first * SECONDS_PER_FRAME, color=color, lw=0.8)
        _write_above(axes, phone, SECONDS_PER_FRAME, fontsize=9)


def _write_above(axes, phone, unit, fontsize, shift=0.0):
    """Write the symbol of a phone above its middle; `unit` is the width of a frame."""
    middle = (phone.first + phone.end) / 2 * unit + shift
    axes.annotate(
        phone.symbol,
        (middle, 1),
        (0, 2),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        ha="center",
        fontsize=fontsize,
        annotation_clip=False,
    )


def draw_similarities(place, length, features, phones):
    """Cosine similarity of every pair of frames; lines where the phone changes."""
    columns = place.subplots(1, 2)
    place.subplots_adjust(wspace=0.2)  # room for the tick labels of a colour bar
    for axes, (name, frames) in zip(columns, features.items(), strict=False):
        units = torch.nn.functional.normalize(frames.float(), dim=-1)
        similarity = (units @ units.T).numpy()
        lowest = min(0.95, np.quantile(similarity, 0.05))  # early in training all are similar
        image = axes.imshow(similarity, extent=(0, length, length, 0), vmin=lowest, vmax=1)
        for phone in phones:
            boundary = phone.first * SECONDS_PER_FRAME
            axes.axvline(boundary, color="white", lw=0.5, alpha=0.7)
            axes.axhline(boundary, color="white", lw=0.5, alpha=0.7)
            if phone.end - phone.first > 3:  # wide enough for a symbol
                _write_above(axes, phone, SECONDS_PER_FRAME, fontsize=7)
        axes.set(xlabel="time (s)", ylabel="time (s)", xlim=(0, length), ylim=(length, 0))
        axes.set_title(f"cosine similarity, {TITLES[name]}", pad=15)
        place.colorbar(image, ax=axes, fraction=0.045, pad=0.02)
    for axes in columns[len(features) :]:
        axes.remove()


def draw_alignment(place, length, align, names, phones):
    """The prediction that each matched frame is aligned to; slanted lines where phones change."""
    n_anchors, n_matched = align.shape
    axes = place.subplots()
    levels = np.arange(len(names) + 1) - 0.5
    image = axes.imshow(
        align.T.numpy(),
        norm=BoundaryNorm(levels, 256),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(0, n_anchors * SECONDS_PER_FRAME, 0.5, n_matched + 0.5),
    )
    matched = np.array([0.5, n_matched + 0.5])
    for phone in phones[1:]:
        anchors = (phone.first - matched) * SECONDS_PER_FRAME
        axes.plot(anchors, matched, color="white", lw=0.9)
    axes.set(
        xlim=(0, length),
        ylim=(0.5, n_matched + 0.5),
        xlabel="time of the anchor (s)",
        ylabel="matched frame after it",
        title="prediction that each matched frame is aligned to",
    )
    bar = _place_beside(place, axes)
    place.colorbar(image, cax=bar, ticks=range(len(names))).set_ticklabels(names, fontsize=8)


def draw_log_scores(place, length, tensors, names, phones, position=None):
    """Log-scores (M, P) at consecutive anchors, with the alignment if it was captured."""
    scores = tensors["cpcctc_log_scores"].float()
    n_anchors, n_matched, _ = scores.shape
    shown = min(N_ANCHORS, n_anchors)
    first = (n_anchors - shown) // 2 if position is None else position
    if not 0 <= first <= n_anchors - shown:
        raise UserError(f"--position {first}: must be 0 to {n_anchors - shown} in this capture")
    scores = scores[first : first + shown]
    # Log-scores far from the path are so low that they would hide all others.
    possible = scores[scores > LOG_ZERO] if (scores > LOG_ZERO).any() else scores
    limits = {"vmin": possible.quantile(0.1).item(), "vmax": possible.max().item()}
    columns = place.subplots(1, shown, sharey=True, squeeze=False)[0]
    for at, (axes, matrix) in enumerate(zip(columns, scores, strict=True), first):
        image = axes.imshow(
            matrix.T.numpy(), aspect="auto", origin="lower", interpolation="nearest",
            extent=(0.5, n_matched + 0.5, -0.5, len(names) - 0.5), **limits,
        )  # fmt: skip
        if "cpcctc_align" in tensors:
            path = tensors["cpcctc_align"][at].tolist()
            axes.plot(range(1, n_matched + 1), path, "o-", color="red", ms=3, lw=1.2)
        _mark_matched_phones(axes, phones, at, n_matched)
        axes.set_xlabel(f"frames after {at * SECONDS_PER_FRAME:.2f} s", fontsize=8)
        axes.tick_params(labelsize=8)
    columns[0].set_yticks(range(len(names)), names)
    columns[0].set_ylabel("prediction")
    place.colorbar(image, cax=_place_beside(place, columns[-1]), label="log-score")


def _mark_matched_phones(axes, phones, anchor, n_matched):
    """Boundaries and symbols of the phones among the frames matched from an anchor."""
    for phone in phones:
        first = max(phone.first - anchor, 1)
        end = min(phone.end - anchor, n_matched + 1)
        if first >= end:
            continue
        if first > 1:
            axes.axvline(first - 0.5, color="white", lw=1.2)
        _write_above(axes, Segment(first, end, phone.symbol), 1, fontsize=8, shift=-0.5)


def _place_beside(place, axes):
    """Axes for a colour bar to the right of `axes`, which keeps its width."""
    box = axes.get_position()
    return place.add_axes((box.x1 + 0.008, box.y0, 0.009, box.height), label="<colorbar>")


if __name__ == "__main__":
    sys.exit(main())
