"""Agreement of boundaries, placed at peaks of the change between frames, with the labels.

A boundary is the index of the last frame before it. The method is that of Kreuk, Keshet and Adi,
"Self-supervised contrastive learning for unsupervised phoneme segmentation", Interspeech 2020:
the change is scaled to 0..1, and its peaks are boundaries where they are prominent enough
(utils/peaks.py).
"""

import math

import numpy as np

TOLERANCE = 2  # frames, so 20 ms
PROMINENCES = np.arange(1, 61) / 100  # from which the best one is chosen
MATCHINGS = ("strict", "lenient")
COUNTS = ("matched", "predicted near a true one", "true near a predicted one", "predicted", "true")


def match_one_to_one(predicted, true, tolerance=TOLERANCE):
    """The largest number of pairs of a predicted and a true boundary within `tolerance` frames.

    predicted, true: sorted frames. Returns their indices, [(i, j), ...]; none is in two pairs.
    """
    pairs, i, j = [], 0, 0
    predicted, true = list(predicted), list(true)
    while i < len(predicted) and j < len(true):
        gap = predicted[i] - true[j]
        if abs(gap) <= tolerance:  # pairing the first two is never worse: all others come later
            pairs.append((i, j))
        i, j = i + (gap <= tolerance), j + (gap >= -tolerance)
    return pairs


def prominent_pairs(predicted, true, prominence, tolerance=TOLERANCE):
    """As many pairs as `match_one_to_one` finds, with the most prominent peaks possible.

    prominence: (n,) of each predicted boundary. Only for pictures: it takes n matchings.
    """
    chosen = []
    for i in np.argsort(-prominence, kind="stable").tolist():
        more = sorted([*chosen, i])
        if len(match_one_to_one(predicted[more], true, tolerance)) == len(more):
            chosen = more
    return [(chosen[i], j) for i, j in match_one_to_one(predicted[chosen], true, tolerance)]


def count_boundaries(predicted, true, tolerance=TOLERANCE):
    """The COUNTS of a segmentation, (5,) int64; those of several utterances add up.

    predicted, true: sorted arrays of frames
    """

    def n_near(some, others):
        first = np.searchsorted(others, some - tolerance)
        return int((first < np.searchsorted(others, some + tolerance, side="right")).sum())

    matched = len(match_one_to_one(predicted.tolist(), true.tolist(), tolerance))
    near = n_near(predicted, true), n_near(true, predicted)
    return np.array([matched, *near, len(predicted), len(true)])


def counts_by_prominence(prominence, true, tolerance=TOLERANCE):
    """The counts of peaks at least as prominent as each of PROMINENCES, (60, 5).

    prominence: (N,) of each frame; true: sorted array of frames
    """
    peaks = np.flatnonzero(prominence >= PROMINENCES[0])
    kept = (peaks[prominence[peaks] >= lowest] for lowest in PROMINENCES)
    return np.stack([count_boundaries(some, true, tolerance) for some in kept])


def segmentation_metrics(counts, matching="strict"):
    """precision, recall, f1, r_value and over_segmentation, a dict, from `counts` (..., 5).

    strict: each boundary counts once, in the best one-to-one matching
    lenient: a boundary counts if one of the other kind is near, as in Kreuk et al. and most papers
        since; two predictions near one boundary are both right (Strgar and Harwath, "Phoneme
        segmentation using self-supervised speech models", SLT 2022)

    Over-segmentation is recall / precision - 1, with strict matching predicted / true - 1.
    The R-value penalises over-segmentation: O. Räsänen, U. Laine and T. Altosaar, "An improved
    speech segmentation quality measure: the R-value", Interspeech 2009.
    """
    matched, right, found, predicted, true = np.moveaxis(np.asarray(counts, float), -1, 0)
    if matching == "strict":
        right = found = matched
    true = np.maximum(true, 1)
    precision, recall = right / np.maximum(predicted, 1), found / true
    ratio = np.where(right > 0, recall / np.maximum(precision, 1e-12), predicted / true)
    to_ideal = np.hypot(1 - recall, ratio - 1)
    to_no_insertions = np.abs(recall - ratio) / math.sqrt(2)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / np.maximum(precision + recall, 1e-12),
        "r_value": 1 - (to_ideal + to_no_insertions) / 2,
        "over_segmentation": ratio - 1,
    }
