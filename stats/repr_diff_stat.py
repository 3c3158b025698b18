"""Histogram of the change of a representation between consecutive frames."""

import math
from collections import Counter

import torch

from stats.arguments import REPRESENTATIONS, choice, picture_directory, positive_number
from stats.distances import METRICS, frame_distances
from stats.empty_stat import Stat
from stats.pictures import new_figure, save_picture


class ReprDiffStat(Stat):
    """Histogram of the distances between consecutive frames, in bins of width `step`.

    Its value is {"hist": {left edge of a bin: count}, "sum": number of distances}. Undefined
    distances (see `frame_distances`) aren't counted. Logged: the mean of the left edges, as in the
    original program, so about half a step below the mean distance.
    """

    arguments = ("METRIC", "REPR", "STEP", "DIRECTORY")

    def __init__(self, metric, representation, step, directory):
        self.metric = choice(metric, METRICS, "metric")
        self.representation = choice(representation, REPRESENTATIONS, "representation")
        self.step = positive_number(step, "the step of reprDiff")
        self.directory = picture_directory(directory)
        self.needs = frozenset({representation})

    def getStatName(self):
        return f"reprDiff_{self.representation}_{self.metric}_by{self.step}"

    def computeForBatch(self, batch):
        bins = (frame_distances(batch[self.representation], self.metric) / self.step).floor()
        bins, counts = (part.tolist() for part in torch.unique(bins, return_counts=True))
        pairs = zip(bins, counts, strict=True)
        hist = {int(bin_) * self.step: count for bin_, count in pairs if math.isfinite(bin_)}
        return {"hist": hist, "sum": sum(hist.values())}

    def mergeStatResults(self, prev, current):
        hist = Counter(prev["hist"])
        hist.update(current["hist"])
        return {"hist": dict(hist), "sum": prev["sum"] + current["sum"]}

    def logStat(self, statValue, epochNr):
        hist, total = statValue["hist"], statValue["sum"]
        if total == 0:
            return {}
        mean = sum(edge * count for edge, count in hist.items()) / total
        save_picture(
            self.directory, f"{self.getStatName()}_{epochNr}", self._draw(hist, mean, epochNr)
        )
        return {"mean": mean}

    def _draw(self, hist, mean, epoch):
        figure = new_figure(f"Change between frames, {self.representation}, epoch {epoch}")
        axes = figure.subplots()
        axes.bar(list(hist), list(hist.values()), width=self.step, align="edge", color="tab:blue")
        axes.axvline(mean, color="tab:red", label=f"mean {mean:.3g}")
        metric = "cosine distance" if self.metric == "cosine" else self.metric
        axes.set(xlabel=f"{metric} (bins of {self.step:g})", ylabel="frames")
        axes.legend()
        return figure
