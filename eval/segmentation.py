"""Boundaries of phones and words where a model's features change, against those of the labels.

    python eval/segmentation.py AUDIO LIST CHECKPOINT.pt --pathPhone LABELS --out OUT \\
        --pathTune TUNING_LIST --get_encoded
    python eval/segmentation.py AUDIO LIST CHECKPOINT.pt --pathPhone LABELS --out OUT \\
        --pathWords WORD_LABELS --silence SIL --prominence 0.12

The change from frame to frame of a whole utterance is scaled to 0..1. Its peaks are boundaries if
they are prominent enough: the prominence with the best R-value on the utterances of --pathTune is
used on those of LIST. Precision, recall, F1, R-value and over-segmentation are counted over all
utterances, in two ways (stats/boundaries.py): strict, each boundary matched at most once, and
lenient, as in most papers. Beside them are 95 % intervals, by resampling utterances, and what
evenly spaced boundaries reach. No boundary is added at the beginning or the end of an utterance.

With --silence, what happens in silence doesn't count: boundaries farther than the tolerance from
speech or between two silences, and those within the tolerance of the first and the last speech.

Word labels look like phone labels: a number for each frame, another one for the next word.

OUT gets `segmentation.json`, the boundaries found (`phone_boundaries.txt`: on each line a name and
the first frame of each new segment), and a picture of some utterances.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import numpy as np
from matplotlib.figure import Figure

from dataset import refuse_too_many
from feature_loader import build_feature, load_model
from segments import choose_level
from stats.boundaries import (
    MATCHINGS,
    PROMINENCES,
    TOLERANCE,
    count_boundaries,
    counts_by_prominence,
    prominent_pairs,
    segmentation_metrics,
)
from stats.distances import METRICS, frame_distances
from utils.data.corpus import labels_by_path, listed_utterances, scan_corpus
from utils.data.labels import (
    FRAMES_PER_SECOND,
    compare_lengths,
    phone_ids,
    read_phone_labels,
    runs,
    symbols_beside,
)
from utils.files import check_writable, save_json, write_lines, writing_to
from utils.misc import SAMPLE_RATE, UserError, counted, first_few
from utils.peaks import peak_prominence, scaled_to_one
from utils.report.plots import save_figure
from utils.run.checkpoint import open_checkpoint
from utils.run.command import CommandLine, above, at_least, command, refuse_any
from utils.run.console import progress
from utils.run.machine import prepare_device
from utils.run.shared_flags import LEVEL, add_device, add_extension

UNTUNED = 0.05  # the prominence in hCPC
OWN = "the model's own segments"
N_RESAMPLED = 1000  # sets of utterances, for the intervals
DRAWN = 4, 3 * FRAMES_PER_SECOND  # utterances, and frames of each
HEADINGS = {
    "precision": "precision", "recall": "recall", "f1": "F1", "r_value": "R-value",
    "over_segmentation": "over-segm.",
}  # fmt: skip


@command
def main(argv=None):
    args = parse_arguments(argv)
    device = prepare_device(args.device)
    files = {"phone": args.pathPhone, "word": args.pathWords}
    labels = {unit: read_phone_labels(path) for unit, path in files.items() if path}
    n_phones = labels["phone"].n_phones
    symbols = symbols_beside(args.pathPhone, n_phones)
    silence = phone_ids(args.silence, symbols, n_phones, args.pathPhone)
    corpus = scan_corpus(args.pathDB, args.file_extension)
    args.file_extension = corpus.extension
    paths = [path for path in (args.pathList, args.pathTune) if path]
    sets = [labelled_utterances(corpus, path, labels) for path in paths]
    shared = sorted(set.intersection(*({u.path for u, _ in chosen} for chosen in sets)))
    if args.pathTune and shared:
        print(f"warning: tuned on utterances that are measured, too: {first_few(shared)}")
    model, *_ = load_model([args.pathCheckpoint], level=args.level)
    choose_level(model, "frames")  # in which segments are found
    model.to(device)
    curves, *tuning = [find_curves(model, chosen, silence, args) for chosen in sets]
    results = {}
    for unit in labels:
        require_boundaries(curves, unit, args.pathList)
        prominence, chosen = choose_prominence(*tuning or [None], unit, args)
        result = measure(curves, unit, prominence, args.tolerance)
        results[unit] = {"prominence": prominence, "prominence_chosen": chosen, **result}
    write_results(args, curves, results, symbols)
    for unit, result in results.items():
        show(unit, result, args.tolerance)
    print(f"results: {args.out}")


# ---------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    """The arguments, checked and completed. Raises UserError for those that can't work."""
    args = build_parser().parse_args(argv)
    if args.prominence is not None and args.pathTune:
        raise UserError("--pathTune chooses the prominence: leave it out, or --prominence")
    if args.level == "segments":
        own = ("get_encoded", "pathTune", "prominence")
        reason = "has no effect with --level segments: the model finds its own boundaries"
        refuse_any({name for name in own if getattr(args, name)}, reason)
    check_writable(args.out, f"--out {args.out}: results")
    args.pathCheckpoint = os.path.abspath(open_checkpoint(args.pathCheckpoint).path)
    return args


# A flag on two lines reads better than on seven, hence:
# fmt: off


def build_parser():
    parser = CommandLine(prog="segmentation.py", description=__doc__)
    add = parser.add_argument
    add("pathDB", help="root of the audio")
    add("pathList", help="list of the utterances that are measured")
    add("pathCheckpoint", help="checkpoint, or a run's directory for the newest in it")
    add("--pathPhone", required=True, metavar="FILE", help="phone labels")
    add("--out", required=True, metavar="DIR", help="directory for the results")
    add_extension(add)
    add = parser.add_argument_group("boundaries").add_argument
    add("--get_encoded", action="store_true", help="changes of encoded frames instead of contexts")
    add("--level", choices=LEVEL["choices"], default="frames",
        help="segments: the boundaries of the model's own segments (of --multiLevel) instead")
    add("--metric", default="cosine", choices=[name for name, grows in METRICS.items() if grows],
        help="distance between consecutive frames")
    add("--pathTune", metavar="LIST",
        help="list of utterances to choose the prominence on, others than those measured")
    add("--prominence", type=above(0), metavar="P",
        help=f"of a peak that is a boundary, from 0 to 1 (default: {UNTUNED}, or see --pathTune)")
    add = parser.add_argument_group("what counts").add_argument
    add("--tolerance", type=at_least(0), default=TOLERANCE, metavar="FRAMES",
        help="distance to a boundary of the labels, in frames of 10 ms")
    add("--tune_for", choices=MATCHINGS, default="strict",
        help="matching whose R-value --pathTune makes best")
    add("--silence", nargs="+", default=[], metavar="PHONE",
        help="symbols or numbers of phones that are silence, where no boundary counts "
        "(default: none)")
    add("--pathWords", metavar="FILE", help="word labels, to measure words as well")
    add_device(add)
    return parser


# fmt: on


def labelled_utterances(corpus, path, labels):
    """The utterances in the list at `path` that have all labels: [(Utterance, unit -> labels)].

    labels: dict unit -> PhoneLabels. Raises UserError if there are none, or if the lengths of most
    don't fit the audio.
    """
    listed = listed_utterances(corpus, path)
    by_path = {unit: labels_by_path(of_unit, listed, corpus) for unit, of_unit in labels.items()}
    chosen = [u for u in listed if all(u.path in ids for ids in by_path.values())]
    files = " or ".join(of_unit.path for of_unit in labels.values())
    if not chosen:
        raise UserError(f"{path}: not one of its {len(listed)} utterances has labels in {files}")
    if len(chosen) < len(listed):
        n_missing = counted(len(listed) - len(chosen), "utterance")
        print(f"{path}: left out {n_missing} without labels in {files}")
    usable = [u for u in chosen if not u.problem and u.rate == SAMPLE_RATE]
    samples, names = np.array([u.samples for u in usable], dtype=np.int64), [u.path for u in usable]
    for unit, ids in by_path.items():
        lengths = np.array([len(ids[name]) for name in names], dtype=np.int64)
        compare_lengths(lengths, samples, names, labels[unit].path, path)
    return [(u, {unit: ids[u.path] for unit, ids in by_path.items()}) for u in chosen]


# ------------------------------------------------------------------------------------- curves


class Curve(NamedTuple):
    """The change from each frame of an utterance to the next, and the boundaries of its labels."""

    name: str
    change: np.ndarray  # (N - 1,) from 0 to 1, for N frames
    prominence: np.ndarray  # (N - 1,), 0 where there is no peak
    counts: np.ndarray  # (N - 1,) bool: whether a boundary here counts
    true: dict  # unit -> sorted indices of the boundaries that count
    phones: np.ndarray  # (N,)

    def boundaries(self, prominence):
        """The boundaries that are found and count."""
        return np.flatnonzero((self.prominence >= prominence) & self.counts)

    def evenly_spaced(self, spacing):
        """Boundaries every `spacing` frames (any number), where they count."""
        places = np.flatnonzero(self.counts)
        steps = np.arange(1, np.ceil((len(places) + 1) / spacing - 1e-9))
        return places[np.rint(steps * spacing).astype(int).clip(1, len(places)) - 1]


def find_curves(model, utterances, silence, args):
    """The Curve of each of [(Utterance, unit -> labels)]; names files that can't be used.

    Raises UserError if they are more than training tolerates.
    """
    curves, problems = [], []
    for utterance, labels in progress(utterances, what="boundaries", unit=" utterances"):
        try:
            curves.append(find_curve(model, utterance, labels, silence, args))
        except UserError as error:
            problems.append(str(error))
            refuse_too_many(problems, len(utterances))
            print(f"{error}; left out")
    return curves


def find_curve(model, utterance, labels, silence, args):
    path = os.path.join(args.pathDB, utterance.path)
    on_segments = args.level == "segments"
    encoded = not model.on_context if on_segments else args.get_encoded
    features = build_feature(model, path, get_encoded=encoded)
    n_frames = min(features.size(1), *map(len, labels.values()))
    if n_frames < 2:
        raise UserError(f"{path}: too short for a boundary")
    change = scaled_to_one(frame_distances(features[:, :n_frames], args.metric))
    labels = {unit: ids[:n_frames] for unit, ids in labels.items()}
    silent = np.isin(labels["phone"], silence)
    counts = counted_places(silent, args.tolerance) if silence else np.ones(n_frames - 1, bool)
    inside = counts & ~(silent[1:] & silent[:-1])
    true = {unit: np.flatnonzero((ids[1:] != ids[:-1]) & inside) for unit, ids in labels.items()}
    if on_segments:  # their boundaries are as prominent as can be
        prominence = model.segmenter(features)[0, 1:n_frames].float().numpy()
    else:
        prominence = peak_prominence(change)[0].numpy()
    return Curve(utterance.name, change[0].numpy(), prominence, counts, true, labels["phone"])


def counted_places(silent, tolerance):
    """Where boundaries count in an utterance with `silent` frames (N,): (N - 1,) bool.

    Place i is between frames i and i + 1. It counts if there is speech within the tolerance, and if
    the first and the last boundary of speech are farther away than that.
    """
    speech, place = np.flatnonzero(~silent), np.arange(len(silent) - 1)
    if not len(speech):
        return np.zeros(len(place), bool)
    first = np.searchsorted(speech, place - tolerance)
    near = first < np.searchsorted(speech, place + 1 + tolerance, side="right")
    return near & (place >= speech[0] + tolerance) & (place < speech[-1] - tolerance)


# ------------------------------------------------------------------------------------ measures


def choose_prominence(tuning, unit, args):
    """The smallest prominence of a boundary, and where it comes from.

    tuning: the curves to choose it on, None without --pathTune
    """
    if args.level == "segments":
        return UNTUNED, OWN  # below that of `find_curve`
    if tuning is None:
        given = args.prominence is not None
        return args.prominence or UNTUNED, "as given" if given else "not tuned (--pathTune LIST)"
    require_boundaries(tuning, unit, args.pathTune)
    totals = sum(
        counts_by_prominence(curve.prominence * curve.counts, curve.true[unit], args.tolerance)
        for curve in tuning
    )
    best = segmentation_metrics(totals, args.tune_for)["r_value"].argmax()
    return float(PROMINENCES[best]), f"best {args.tune_for} R-value on {args.pathTune}"


def require_boundaries(curves, unit, path):
    if not any(len(curve.true[unit]) for curve in curves):
        raise UserError(f"{path}: no {unit} boundary in the labels of these utterances")


def measure(curves, unit, prominence, tolerance):
    """The figures of both matchings with intervals and chance levels, and the counts: a dict."""

    def count(predict):
        return np.stack([count_boundaries(predict(c), c.true[unit], tolerance) for c in curves])

    counts = count(lambda curve: curve.boundaries(prominence))
    spacing = mean_length(curves, unit)
    chance = {
        "as_many": count(lambda curve: curve.evenly_spaced(mean_length([curve], unit))),
        "mean_length": count(lambda curve: curve.evenly_spaced(spacing)),
    }
    *_, n_predicted, n_true = counts.sum(0).tolist()
    result = {"predicted": n_predicted, "true": n_true, "mean_length": spacing}
    for matching in MATCHINGS:
        result[matching] = {
            **figures(counts, matching),
            "interval_95": intervals(counts, matching),
            "chance": {name: figures(of_chance, matching) for name, of_chance in chance.items()},
        }
    return result


def mean_length(curves, unit):
    """Frames between boundaries of the labels, on average, where boundaries count."""
    n_frames = sum(int(curve.counts.sum()) + 1 for curve in curves)
    return n_frames / sum(len(curve.true[unit]) + 1 for curve in curves)


def figures(counts, matching):
    """The metrics of all utterances together, a dict of floats. counts: (n, 5)."""
    metrics = segmentation_metrics(counts.sum(0), matching)
    return {name: float(value) for name, value in metrics.items()}


def intervals(counts, matching):
    """Percentile bootstrap: the central 95 % of each metric over sets of resampled utterances."""
    generator, n = np.random.default_rng(0), len(counts)
    times = (np.bincount(generator.integers(n, size=n), minlength=n) for _ in range(N_RESAMPLED))
    metrics = segmentation_metrics(np.stack([t @ counts for t in times]), matching)
    return {name: np.quantile(values, [0.025, 0.975]).tolist() for name, values in metrics.items()}


# -------------------------------------------------------------------------------------- output


def write_results(args, curves, results, symbols):
    measured_on = {**vars(args), "utterances": len(curves)}
    prominence = results["phone"]["prominence"]
    found = (
        "segments" if args.level == "segments" else f"peaks of prominence {prominence:.3g} or more"
    )
    title = f"Change between frames, and its {found}"
    figure = draw_utterances(curves, prominence, symbols, args.tolerance, title)
    with writing_to(args.out, "--out"):
        save_json(Path(args.out, "segmentation.json"), {**results, "measured_on": measured_on})
        for unit, result in results.items():
            lines = [boundary_line(curve, result["prominence"]) for curve in curves]
            write_lines(Path(args.out, f"{unit}_boundaries.txt"), lines)
        save_figure(figure, Path(args.out, "segmentation.png"))


def boundary_line(curve, prominence):
    """Name and first frames of all segments found, whether they count or not."""
    frames = np.flatnonzero(curve.prominence >= prominence) + 1
    return " ".join(map(str, [curve.name, *frames]))


def show(unit, result, tolerance):
    found = f"prominence {result['prominence']:.3g}, {result['prominence_chosen']}"
    is_own = result["prominence_chosen"] == OWN
    print(
        f"{unit} boundaries: {result['predicted']:,} found, {result['true']:,} in the labels; "
        f"{OWN if is_own else found}"
    )
    show_row(f"%, within {10 * tolerance} ms", HEADINGS.values())
    titles = {
        "as_many": "  evenly spaced, as many",
        "mean_length": f"  every {result['mean_length']:.1f} frames",
    }
    for matching in MATCHINGS:
        scores = result[matching]
        show_row(f"{matching} matching", (f"{100 * scores[name]:.1f}" for name in HEADINGS))
        ranges = (scores["interval_95"][name] for name in HEADINGS)
        show_row("  95 % interval", (f"{100 * a:.1f}..{100 * b:.1f}" for a, b in ranges))
        for kind, chance in scores["chance"].items():
            show_row(titles[kind], (f"{100 * chance[name]:.1f}" for name in HEADINGS))
    best = max(chance["r_value"] for chance in result["strict"]["chance"].values())
    if result["strict"]["r_value"] <= best:
        print(
            f"warning: the strict R-value is no better than that of evenly spaced {unit} "
            "boundaries: do the labels belong to this audio, and is the model trained?"
            + " --pathTune LIST or --get_encoded may help"
            * (not is_own)
        )


def show_row(title, cells):
    print(f"{title:26}", *(f"{cell:>12}" for cell in cells))


def draw_utterances(curves, prominence, symbols, tolerance, title):
    """A figure of some utterances: the change, the phones, and which boundaries are found."""
    n_drawn, n_frames = DRAWN
    chosen = [curves[i * len(curves) // n_drawn] for i in range(min(n_drawn, len(curves)))]
    figure = Figure(figsize=(13, 2.4 * len(chosen) + 0.6), layout="constrained")
    figure.suptitle(title)
    for axes, curve in zip(figure.subplots(len(chosen), squeeze=False)[:, 0], chosen, strict=True):
        draw_curve(axes, curve, prominence, symbols, tolerance)
        axes.set(xlim=(0, min(len(curve.phones), n_frames) / FRAMES_PER_SECOND), ylim=(0, 1.3))
        axes.set_ylabel(curve.name, fontsize="small")
    axes.set_xlabel("time (s)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def draw_curve(axes, curve, prominence, symbols, tolerance):
    time = np.arange(1, len(curve.phones)) / FRAMES_PER_SECOND
    predicted, true = curve.boundaries(prominence), curve.true["phone"]
    predicted, true = (places[places < DRAWN[1] + tolerance] for places in (predicted, true))
    pairs = prominent_pairs(predicted, true, curve.prominence[predicted], tolerance)
    right, found = np.array(pairs, dtype=int).reshape(-1, 2).T
    axes.plot(time, curve.change, color="tab:blue", label="change")
    if not curve.counts.all():
        options = {"color": "0.92", "zorder": -1, "label": "not counted: silence"}
        axes.fill_between(time, 0, 1.12, where=~curve.counts, **options)
    missed, wrong = np.delete(true, found), np.delete(predicted, right)
    axes.vlines(time[true[found]], 0, 1.12, "0.6", label="boundary of the labels", zorder=0)
    axes.vlines(time[missed], 0, 1.12, "tab:orange", "--", label="missed", zorder=0)
    for places, style, label in ((predicted[right], "gv", "right"), (wrong, "rx", "wrong")):
        axes.plot(time[places], curve.change[places] + 0.04, style, label=label)
    for start, end, phone in runs(curve.phones[: DRAWN[1]].tolist()):
        at = (start + end) / 2 / FRAMES_PER_SECOND, 1.15
        axes.text(*at, symbols.get(phone, phone), ha="center", fontsize="x-small", clip_on=True)


if __name__ == "__main__":
    main()
