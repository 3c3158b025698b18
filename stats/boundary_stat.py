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
N_EDGE = 3  # changes at the beginning of a window, of frames that see the padding before it
THRESHOLDS = torch.linspace(0.01, 0.6, 60)  # prominences at which a peak counts as a boundary


class BoundaryStat(Stat):
    """Compares peaks of the change between consecutive frames with the boundaries of phones.

    The distance between consecutive frames is scaled to 0..1 in each window; its peaks count as
    boundaries if they are prominent enough, as in Kreuk, Keshet and Adi, "Self-supervised
    contrastive learning for unsupervised phoneme segmentation", Interspeech 2020. A phone boundary
    is detected if a peak is within 20 ms and nearer to it than to any other boundary; additional
    peaks there are false ones.

    Logged: `precision`, `recall`, `f1` and `r_value` at the prominence with the best R-value, and
    this `prominence`. Since it is chosen on the set that is measured, the figures only serve to
    compare models. The picture shows the metrics at every prominence, and one window.

    Frames without a label (-1) are left out.

    The value: {"found": (60,), "peaks": (60,), "boundaries": (), "example": tensors of a window}.
    """

    arguments = ("METRIC", "REPR", "DIRECTORY")

    def __init__(self, metric, representation, directory):
        self.metric = choice(metric, [name for name, grows in METRICS.items() if grows], "distance")
        self.representation = choice(representation, REPRESENTATIONS, "representation")
        self.directory = picture_directory(directory)
        self.needs = frozenset({representation, "phone_align"})

    def getStatName(self):
        return f"boundaries_{self.representation}_{self.metric}"

    def computeForBatch(self, batch):
        phones = batch["phone_align"]
        labelled = (phones[:, 1:] >= 0) & (phones[:, :-1] >= 0)
        boundaries = (phones[:, 1:] != phones[:, :-1]) & labelled
        change = frame_distances(batch[self.representation], self.metric)
        change = scaled_to_one(lowest_where(~labelled, change))
        prominence = peak_prominence(change)
        peaks = (prominence >= THRESHOLDS.to(prominence).view(-1, 1, 1)) & labelled
        shown = int(labelled.sum(1).argmax())
        example = {"change": change, "prominence": prominence, "boundaries": boundaries}
        return {
            "found": count_found(peaks, boundaries).cpu(),
            "peaks": peaks.sum((1, 2)).cpu(),
            "boundaries": boundaries.sum().cpu(),
            "example": {name: of_batch[shown].cpu() for name, of_batch in example.items()},
        }

    def mergeStatResults(self, prev, current):
        sums = {name: prev[name] + current[name] for name in ("found", "peaks", "boundaries")}
        return {**sums, "example": (prev if prev["boundaries"] else current)["example"]}

    def logStat(self, statValue, epochNr):
        if statValue["boundaries"] == 0:
            return {}
        metrics = segmentation_metrics(
            statValue["found"], statValue["peaks"], statValue["boundaries"]
        )
        best = metrics["r_value"].argmax()
        logged = {name: values[best].item() for name, values in metrics.items()}
        logged["prominence"] = THRESHOLDS[best].item()
        figure = new_figure(
            f"Phone boundaries from {self.representation}, epoch {epochNr}: "
            f"R-value {logged['r_value']:.3f}, F1 {logged['f1']:.3f}",
            width=10,
            height=7,
        )
        above, below = figure.subplots(2)
        _draw_example(above, statValue["example"], THRESHOLDS[best])
        _draw_metrics(below, metrics, best)
        save_picture(self.directory, f"{self.getStatName()}_{epochNr}", figure)
        return logged


def lowest_where(unknown, curves):
    """`curves` (B, N) with the lowest value of their row where `unknown`: no peak there."""
    lowest = curves.masked_fill(unknown | curves.isnan(), math.inf).amin(dim=1, keepdim=True)
    return torch.where(unknown, lowest.nan_to_num(posinf=0.0), curves)


def scaled_to_one(curves):
    """Each row of `curves` (B, N) shifted and scaled to span 0..1; NaN becomes 0."""
    curves = curves.nan_to_num(nan=0.0)
    lowest, highest = curves.aminmax(dim=-1, keepdim=True)
    return (curves - lowest) / (highest - lowest).clamp_min(torch.finfo(curves.dtype).tiny)


def peak_prominence(curves):
    """The prominence of each point of `curves` (B, N): (B, N), 0 if it isn't a peak.

    Go left from a peak to the next point that is as high, and right to the next higher one (or to
    the ends); the prominence is its height above the higher of the lowest points on either side.
    Memory: B * N * N.
    """
    right = _lowest_before_higher(curves, torch.le)
    left = _lowest_before_higher(curves.flip(-1), torch.lt).flip(-1)
    return curves - torch.maximum(left, right)


def _lowest_before_higher(curves, passes):
    """The lowest value to the right of each point, up to the first that fails `passes`."""
    n = curves.shape[-1]
    height = curves.unsqueeze(-1)
    onwards = curves.unsqueeze(-2).expand(-1, n, n)  # [b, p, q] is the value at q
    behind = torch.ones(n, n, dtype=torch.bool, device=curves.device).tril()  # q <= p
    highest = onwards.masked_fill(behind, -math.inf).cummax(-1).values
    reached = passes(highest, height) & ~behind
    return torch.minimum(onwards.where(reached, math.inf).amin(-1), curves)


def count_found(peaks, boundaries):
    """The number of `boundaries` (B, N) that have a peak: `peaks` (T, B, N) -> (T,).

    Each peak belongs to the nearest boundary, the earlier one in a tie: between boundaries closer
    than twice the tolerance, the regions are divided in the middle (Räsänen et al. 2009).
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


def segmentation_metrics(found, peaks, boundaries):
    """precision, recall, f1 and r_value from counts (tensors of one shape, or numbers).

    The R-value penalises over-segmentation: O. Räsänen, U. Laine and T. Altosaar, "An improved
    speech segmentation quality measure: the R-value", Interspeech 2009.
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
        axes.plot(THRESHOLDS.numpy(), metrics[name].numpy(), label=label, lw=width)
    axes.axvline(THRESHOLDS[best].item(), color="0.4", ls=":", label="best R-value")
    axes.set(xlabel="smallest prominence of a peak", ylabel="metric (20 ms tolerance)")
    axes.set_ylim(min(0.0, max(-0.5, metrics["r_value"].min().item())), 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
