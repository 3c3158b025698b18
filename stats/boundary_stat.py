"""Do the representations change where the phones change?"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from stats.arguments import REPRESENTATIONS, choice, picture_directory
from stats.boundaries import (
    MATCHINGS,
    PROMINENCES,
    TOLERANCE,
    counts_by_prominence,
    segmentation_metrics,
)
from stats.distances import METRICS, frame_distances
from stats.empty_stat import Stat
from stats.pictures import new_figure, save_picture
from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME
from utils.peaks import peak_prominence, scaled_to_one

N_EDGE = 3  # changes at the beginning of a window, of frames that see the padding before it


class BoundaryStat(Stat):
    """Compares peaks of the change between consecutive frames with the boundaries of phones.

    The distance between consecutive frames is scaled to 0..1 in each window; its peaks count as
    boundaries if they are prominent enough (stats/boundaries.py). A boundary is detected if a peak
    is within 20 ms, where each peak detects one boundary at most (strict, the default), or any
    number of them (lenient); `segmentation_metrics` defines both.

    Logged: `precision`, `recall`, `f1`, `r_value` and `over_segmentation` at the prominence with
    the best R-value, and this `prominence`. Since it is chosen on the set that is measured, the
    figures only serve to compare models; eval/segmentation.py computes figures for publication.
    The picture shows the metrics at every prominence, and one window.

    Frames without a label (-1) are left out.

    The value: {"counts": (60, 5), "example": tensors of a window}.
    """

    arguments = ("METRIC", "REPR", "[lenient]", "DIRECTORY")

    def __init__(self, metric, representation, *rest):
        *matching, directory = rest
        self.metric = choice(metric, [name for name, grows in METRICS.items() if grows], "distance")
        self.representation = choice(representation, REPRESENTATIONS, "representation")
        self.matching = choice(*(matching or ["strict"]), MATCHINGS, "matching")
        self.directory = picture_directory(directory)
        self.needs = frozenset({representation, "phone_align"})

    def getStatName(self):
        lenient = "_lenient" * (self.matching == "lenient")
        return f"boundaries_{self.representation}_{self.metric}{lenient}"

    def computeForBatch(self, batch):
        phones = batch["phone_align"]
        labelled = (phones[:, 1:] >= 0) & (phones[:, :-1] >= 0)
        boundaries = (phones[:, 1:] != phones[:, :-1]) & labelled
        change = frame_distances(batch[self.representation], self.metric)
        change = scaled_to_one(lowest_where(~labelled, change))
        prominence = peak_prominence(change)
        peaks = prominence.where(labelled, 0)
        counts = counts_by_prominence(concatenated(peaks), np.flatnonzero(concatenated(boundaries)))
        shown = int(labelled.sum(1).argmax())
        example = {"change": change, "prominence": prominence, "boundaries": boundaries}
        return {
            "counts": torch.from_numpy(counts),
            "example": {name: of_batch[shown].cpu() for name, of_batch in example.items()},
        }

    def mergeStatResults(self, prev, current):
        with_example = prev if has_boundaries(prev) else current
        counts = prev["counts"] + current["counts"]
        return {"counts": counts, "example": with_example["example"]}

    def logStat(self, statValue, epochNr):
        if not has_boundaries(statValue):
            return {}
        metrics = segmentation_metrics(statValue["counts"], self.matching)
        best = metrics["r_value"].argmax()
        logged = {name: values[best].item() for name, values in metrics.items()}
        logged["prominence"] = PROMINENCES[best].item()
        figure = new_figure(
            f"Phone boundaries from {self.representation}, epoch {epochNr}: "
            f"R-value {logged['r_value']:.3f}, F1 {logged['f1']:.3f} ({self.matching} matching)",
            width=10,
            height=7,
        )
        above, below = figure.subplots(2)
        _draw_example(above, statValue["example"], PROMINENCES[best])
        _draw_metrics(below, metrics, best)
        save_picture(self.directory, f"{self.getStatName()}_{epochNr}", figure)
        return logged


def has_boundaries(value):
    return bool(value["counts"][0, -1] > 0)


def concatenated(windows):
    """All windows (B, N) in one array, with gaps across which no boundaries are matched."""
    return F.pad(windows, (0, TOLERANCE)).flatten().cpu().numpy()


def lowest_where(unknown, curves):
    """`curves` (B, N) with the lowest value of their row where `unknown`: no peak there."""
    lowest = curves.masked_fill(unknown | curves.isnan(), math.inf).amin(dim=1, keepdim=True)
    return torch.where(unknown, lowest.nan_to_num(posinf=0.0), curves)


def _draw_example(axes, example, threshold):
    change = example["change"].numpy()
    boundaries = example["boundaries"].numpy()
    peaks = (example["prominence"] >= threshold).numpy()
    time = np.arange(1, len(change) + 1) * SAMPLES_PER_FRAME / SAMPLE_RATE
    highest = change[N_EDGE:].max(initial=0) or 1.0
    axes.vlines(time[boundaries], 0, 1.1 * highest, color="0.7", label="phone boundary")
    axes.plot(time, change, color="tab:blue", label="change between frames")
    axes.plot(time[peaks], change[peaks], "v", color="tab:red", label="taken as a boundary")
    axes.set(
        xlabel="time in the first window (s)", ylabel="change (scaled)", ylim=(0, 1.35 * highest)
    )
    axes.margins(x=0.01)
    axes.legend(loc="upper center", ncols=3)


def _draw_metrics(axes, metrics, best):
    for name, label in [
        ("precision", "precision"),
        ("recall", "recall"),
        ("f1", "F1"),
        ("r_value", "R-value"),
    ]:
        width = 2.5 if name == "r_value" else 1.2
        axes.plot(PROMINENCES, metrics[name], label=label, lw=width)
    axes.axvline(PROMINENCES[best], color="0.4", ls=":", label="best R-value")
    axes.set(xlabel="smallest prominence of a peak", ylabel="metric (20 ms tolerance)")
    axes.set_ylim(min(0.0, max(-0.5, metrics["r_value"].min())), 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
