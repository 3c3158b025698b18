"""Measures of discrete units: what they say of phones and speakers, and what they cost.

Joint information as in Hsu et al., "HuBERT: self-supervised speech representation learning by
masked prediction of hidden units" (2021); bitrates as in Dunbar et al., "The Zero Resource Speech
Challenge 2019: TTS without T" (2019). Frames of all files are joined; `starts` are the first frames
of the files in them.
"""

import numpy as np

from stats.boundaries import count_boundaries, segmentation_metrics
from utils.data.labels import FRAMES_PER_SECOND

SHIFTS = 5  # of the units against the labels, whose mean is the chance level


def measure(labels, units, starts, *, silence=(), speakers=None):
    """All measures that compare units with something else, a dict of dicts of floats.

    labels, units: (N,) ints of each frame; speakers: (N,) ints or None; silence: labels that are no
    phone. A measure without a meaning, as of a single phone, is None.
    """
    segments, their_units = majority_units(labels, units, starts)
    result = {}
    for name, phones, of_units in (
        ("frames", labels, units),
        ("segments", segments, their_units),
    ):
        speech = ~np.isin(phones, silence)
        result[name] = agreement(joint_counts(phones, of_units))
        result[f"{name}_without_silence"] = agreement(
            joint_counts(phones[speech], of_units[speech])
        )
    result["boundaries"] = boundary_measures(labels, units, starts)
    if speakers is not None:
        of_speakers = agreement(joint_counts(speakers, units))
        result["speakers"] = {name: of_speakers[name] for name in ("pnmi", "phone_purity")}
    return result


def chance(labels, units, starts, **options):
    """The same measures for units that have nothing to do with the labels: the means of a few
    rotations of all units, which keep how often and how long each occurs.
    """
    shifts = [len(units) * (i + 1) // (SHIFTS + 1) for i in range(SHIFTS)]
    results = [measure(labels, np.roll(units, shift), starts, **options) for shift in shifts]
    return {
        name: {key: _mean([result[name][key] for result in results]) for key in results[0][name]}
        for name in results[0]
    }


def _mean(values):
    return None if None in values else sum(values) / len(values)


def joint_counts(labels, units):
    """(labels, units) int64: how often each pair occurs; empty without frames."""
    if not len(labels):
        return np.zeros((0, 0), dtype=np.int64)
    shape = int(labels.max()) + 1, int(units.max()) + 1
    pairs = labels.astype(np.int64) * shape[1] + units
    return np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)


def entropy(counts):
    """Of the distribution that counts of any shape give, in nats."""
    fractions = counts[counts > 0] / counts.sum()
    return float((fractions * np.log(1 / fractions)).sum())


def agreement(counts):
    """Information and purities, from joint counts (phones, units).

    pnmi: the share of the phones' information that the units have, I / H(phones);
    unit_information: I / H(units); v_measure: 2 I / (H(phones) + H(units)), the NMI; phone_purity:
    the accuracy if each unit stands for its majority phone; cluster_purity: the reverse
    """
    if not counts.sum():
        return dict.fromkeys(AGREEMENT)
    of_phones, of_units = entropy(counts.sum(1)), entropy(counts.sum(0))
    information = of_phones + of_units - entropy(counts)
    parts = (
        (information, of_phones),
        (information, of_units),
        (2 * information, of_phones + of_units),
    )
    shares = [max(0.0, part / whole) if whole > 1e-12 else None for part, whole in parts]
    purities = [float(counts.max(axis).sum() / counts.sum()) for axis in (0, 1)]
    return dict(zip(AGREEMENT, shares + purities, strict=True))


AGREEMENT = ("pnmi", "unit_information", "v_measure", "phone_purity", "cluster_purity")


def run_starts(values, starts):
    """The first frames of the runs of equal values (N,) within files."""
    changes = np.diff(values, prepend=values[:1] - 1) != 0
    changes[starts] = True
    return np.flatnonzero(changes)


def majority_units(labels, units, starts):
    """The label of each segment (run of equal labels), and the unit of most of its frames."""
    segments = run_starts(labels, starts)
    segment_of = np.repeat(np.arange(len(segments)), np.diff(segments, append=len(labels)))
    pairs, n = np.unique(segment_of * (units.max() + 1) + units, return_counts=True)
    segment, unit = np.divmod(pairs, units.max() + 1)
    order = np.lexsort((unit, -n, segment))
    first = np.unique(segment[order], return_index=True)[1]
    return labels[segments], unit[order][first]


def boundary_measures(labels, units, starts):
    """Changes of unit against changes of phone, 20 ms apart at most, matched one to one."""
    files = zip(np.split(units, starts[1:]), np.split(labels, starts[1:]), strict=True)
    counts = sum(count_boundaries(*(np.flatnonzero(np.diff(v)) for v in file)) for file in files)
    metrics = {name: float(value) for name, value in segmentation_metrics(counts).items()}
    return metrics if counts[-1] else dict.fromkeys(metrics)


def usage(units, starts):
    """The units themselves: how many are used, how evenly, and their bitrates (bit/s).

    bitrate_frames: of one unit per frame; bitrate_deduplicated: of runs, without their lengths (not
    enough to restore the frames); bitrate_runs: of runs with their lengths
    """
    seconds, counts = len(units) / FRAMES_PER_SECOND, np.bincount(units)
    runs = run_starts(units, starts)
    lengths = np.diff(runs, append=len(units))
    with_lengths = np.unique(np.stack([units[runs], lengths]), axis=1, return_counts=True)[1]

    def bitrate(counts):
        return float(counts.sum() / seconds * entropy(counts) / np.log(2))

    return {
        "frames": len(units),
        "units_used": int((counts > 0).sum()),
        "perplexity": float(np.exp(entropy(counts))),
        "largest_share": float(counts.max() / counts.sum()),
        "frames_per_run": float(lengths.mean()),
        "bitrate_frames": bitrate(counts),
        "bitrate_deduplicated": bitrate(np.bincount(units[runs])),
        "bitrate_runs": bitrate(with_lengths),
    }
