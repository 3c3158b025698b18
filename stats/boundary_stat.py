"""Do the representations change where the phones change?"""

import math

import numpy as np
import torch

from stats.arguments import REPRESENTATIONS, choice, picture_directory
from stats.distances import METRICS, frame_distances
from stats.empty_stat import Stat
from stats.pictures import new_figure, save_picture
from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME

TOLERANCE = 2  # frames, so 20 ms
THRESHOLDS = torch.linspace(0.01, 0.6, 60)  # prominences at which a peak counts as a boundary


class BoundaryStat(Stat):
    """Peaks of the change from frame to frame, compared with the boundaries between phones.

    The distance between neighbouring frames is scaled to 0..1 in each window; its peaks count as
    boundaries if they are prominent enough, as in Kreuk, Keshet and Adi, "Self-supervised
    contrastive learning for unsupervised phoneme segmentation", Interspeech 2020. A phone boundary
    is found if a peak is at most 20 ms from it and nearer to it than to any other; further peaks
    there are false ones.

    Logged, for the prominence with the best R-value: `precision`, `recall`, `f1`, `r_value`, and
    that `prominence`. As it is chosen on the set that it is measured on, the figures serve to
    compare models. The picture shows the measures at every prominence, and one window.

    The value: {"found": (60,), "peaks": (60,), "boundaries": (), "example": tensors of a window}.
    """

    arguments = ("METRIC", "REPR", "DIRECTORY")

    def __init__(self, metric, reprType, directory):
        self.metric = choice(metric, [name for name, grows in METRICS.items() if grows], "distance")
        self.reprType = choice(reprType, REPRESENTATIONS, "representation")
        self.directory = picture_directory(directory)
        self.needs = frozenset({reprType, "phone_align"})

    def getStatName(self):
        return f"boundaries_{self.reprType}_{self.metric}"

    def computeForBatch(self, batch):
        phones = batch["phone_align"]
        boundaries = phones[:, 1:] != phones[:, :-1]
        change = scaled_to_one(frame_distances(batch[self.reprType], self.metric))
        prominence = peak_prominence(change)
        peaks = prominence >= THRESHOLDS.to(prominence).view(-1, 1, 1)
        example = {"change": change, "prominence": prominence, "boundaries": boundaries}
        return {
            "found": count_found(peaks, boundaries).cpu(),
            "peaks": peaks.sum((1, 2)).cpu(),
            "boundaries": boundaries.sum().cpu(),
            "example": {name: of_batch[0].cpu() for name, of_batch in example.items()},
        }

    def mergeStatResults(self, prev, current):
        sums = {name: prev[name] + current[name] for name in ("found", "peaks", "boundaries")}
        return {**sums, "example": prev["example"]}

    def logStat(self, statValue, epochNr):
        if statValue["boundaries"] == 0:
            return {}
        scores = segmentation_scores(
            statValue["found"], statValue["peaks"], statValue["boundaries"]
        )
        best = scores["r_value"].argmax()
        logged = {name: score[best].item() for name, score in scores.items()}
        logged["prominence"] = THRESHOLDS[best].item()
        figure = new_figure(
            f"Phone boundaries from {self.reprType}, epoch {epochNr}: "
            f"R-value {logged['r_value']:.3f}, F1 {logged['f1']:.3f}",
            width=10,
            height=7,
        )
        above, below = figure.subplots(2)
        _draw_example(above, statValue["example"], THRESHOLDS[best])
        _draw_scores(below, scores, best)
        save_picture(self.directory, f"{self.getStatName()}_{epochNr}", figure)
        return logged


def scaled_to_one(curves):
    """Each row of `curves` (B, N) moved and stretched to span 0..1; undefined values become 0."""
    curves = curves.nan_to_num(nan=0.0)
    lowest, highest = curves.aminmax(dim=-1, keepdim=True)
    return (curves - lowest) / (highest - lowest).clamp_min(torch.finfo(curves.dtype).tiny)


def peak_prominence(curves):
    """How far each point of `curves` (B, N) stands out: (B, N), 0 where there is no peak.

    From a peak go left to the next point that is as high, and right to the next higher one (or to
    the ends); the prominence is its height above the higher one of the two lowest points passed.
    Memory: B * N * N.
    """
    right = _lowest_before_higher(curves, torch.le)
    left = _lowest_before_higher(curves.flip(-1), torch.lt).flip(-1)
    return curves - torch.maximum(left, right)


def _lowest_before_higher(curves, passes):
    """The lowest value on the way right from each point, as long as points `passes` its height."""
    n = curves.shape[-1]
    height = curves.unsqueeze(-1)
    onwards = curves.unsqueeze(-2).expand(-1, n, n)  # [b, p, q] is the value at q
    behind = torch.ones(n, n, dtype=torch.bool, device=curves.device).tril()  # q <= p
    highest = onwards.masked_fill(behind, -math.inf).cummax(-1).values
    reached = passes(highest, height) & ~behind
    return torch.minimum(onwards.where(reached, math.inf).amin(-1), curves)


def count_found(peaks, boundaries):
    """How many of the `boundaries` (B, N) have a peak: `peaks` (T, B, N) -> (T,).

    Each peak belongs to the nearest boundary, the earlier one if there are two: between boundaries
    closer than twice the tolerance the regions are cut in the middle (Räsänen et al. 2009).
    """
    place = torch.arange(boundaries.shape[-1], device=boundaries.device).expand(boundaries.shape)
    far = 2 * boundaries.shape[-1] + TOLERANCE
    before = torch.where(boundaries, place, -far).cummax(-1).values
    after = torch.where(boundaries, place, far).flip(-1).cummin(-1).values.flip(-1)
    nearest = torch.where(place - before <= after - place, before, after)
    hits = peaks & ((place - nearest).abs() <= TOLERANCE)
    nearest = nearest.clamp(0, boundaries.shape[-1] - 1).expand_as(peaks)
    hits_of_boundary = torch.zeros_like(peaks, dtype=torch.int64)
    hits_of_boundary.scatter_add_(-1, nearest, hits.long())
    return (hits_of_boundary > 0).sum((1, 2))


def segmentation_scores(found, peaks, boundaries):
    """precision, recall, f1 and r_value from counts (tensors of one shape, or numbers).

    The R-value punishes finding more boundaries by putting them everywhere: O. Räsänen, U. Laine
    and T. Altosaar, "An improved speech segmentation quality measure: the R-value",
    Interspeech 2009.
    """
    found, peaks, boundaries = (
        torch.as_tensor(count).double() for count in (found, peaks, boundaries)
    )
    precision = found / peaks.clamp_min(1)
    recall = found / boundaries
    over_segmentation = peaks / boundaries - 1
    to_ideal = torch.hypot(1 - recall, over_segmentation)
    to_no_insertions = (recall - 1 - over_segmentation).abs() / math.sqrt(2)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall).clamp_min(1e-12),
        "r_value": 1 - (to_ideal + to_no_insertions) / 2,
    }


def _draw_example(axes, example, threshold):
    change = example["change"].numpy()
    boundaries = example["boundaries"].numpy()
    peaks = (example["prominence"] >= threshold).numpy()
    time = np.arange(1, len(change) + 1) * SAMPLES_PER_FRAME / SAMPLE_RATE
    axes.vlines(time[boundaries], 0, 1.1, color="0.7", label="phone boundary")
    axes.plot(time, change, color="tab:blue", label="change from frame to frame")
    axes.plot(time[peaks], change[peaks], "v", color="tab:red", label="taken as a boundary")
    axes.set(xlabel="time in the first window (s)", ylabel="change (scaled)", ylim=(0, 1.35))
    axes.margins(x=0.01)
    axes.legend(loc="upper center", ncols=3)


def _draw_scores(axes, scores, best):
    for name, label in [
        ("precision", "precision"),
        ("recall", "recall"),
        ("f1", "F1"),
        ("r_value", "R-value"),
    ]:
        width = 2.5 if name == "r_value" else 1.2
        axes.plot(THRESHOLDS.numpy(), scores[name].numpy(), label=label, lw=width)
    axes.axvline(THRESHOLDS[best].item(), color="0.4", ls=":", label="best R-value")
    axes.set(xlabel="smallest prominence of a peak", ylabel="score (20 ms tolerance)")
    axes.set_ylim(min(0.0, max(-0.5, scores["r_value"].min().item())), 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
