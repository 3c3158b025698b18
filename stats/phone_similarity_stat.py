"""Are the frames of a phone similar to each other, and different from those of other phones?"""

import math

import torch

from stats.arguments import REPRESENTATIONS, choice, picture_directory
from stats.empty_stat import Stat
from stats.pictures import new_figure, save_picture
from utils.data.labels import symbols_beside


class PhoneSimilarityStat(Stat):
    """Mean cosine similarity of two frames for each pair of phone classes, a matrix.

    All pairs of different frames in the set count, even neighbours within a phone: the mean over
    the pairs of two classes is the product of the classes' mean unit vectors, so one pass suffices
    and pairs aren't enumerated. Frames of zeros have no direction and are left out, as are frames
    without a label (-1).

    Logged: `within`, the mean similarity within a class, and `between`, that of two classes, each
    class or pair of classes counting once. Features that separate phones have a `within` well above
    `between`.

    The value: {"count": (n,), "sum": (n, D) of the unit vectors}, float64, for n classes.
    """

    arguments = ("REPR", "DIRECTORY")

    def __init__(self, representation, directory):
        self.representation = choice(representation, REPRESENTATIONS, "representation")
        self.directory = picture_directory(directory)
        self.needs = frozenset({representation, "phone_align"})

    def getStatName(self):
        return f"phoneSim_{self.representation}"

    def computeForBatch(self, batch):
        phones = batch["phone_align"].flatten()
        labelled = phones >= 0
        phones = phones[labelled]
        frames = batch[self.representation].flatten(0, 1)[labelled].double()
        norms = torch.linalg.vector_norm(frames, dim=-1, keepdim=True)
        usable = (norms > 0) & norms.isfinite()
        units = torch.where(usable, frames / norms, 0.0)
        n_classes = int(phones.max()) + 1 if len(phones) else 0
        total = units.new_zeros(n_classes, units.shape[1]).index_add_(0, phones, units)
        count = units.new_zeros(n_classes).index_add_(0, phones, usable.squeeze(1).double())
        return {"count": count.cpu(), "sum": total.cpu()}

    def mergeStatResults(self, prev, current):
        n_classes = max(len(prev["count"]), len(current["count"]))
        return {
            name: _with_rows(prev[name], n_classes) + _with_rows(current[name], n_classes)
            for name in ("count", "sum")
        }

    def logStat(self, statValue, epochNr):
        similarity = class_similarity(statValue["count"], statValue["sum"])
        off_diagonal = ~torch.eye(len(similarity), dtype=torch.bool)
        logged = {
            "within": similarity.diagonal().nanmean().item(),
            "between": similarity[off_diagonal].nanmean().item(),
        }
        figure = self._draw(similarity, logged, epochNr)
        save_picture(self.directory, f"{self.getStatName()}_{epochNr}", figure)
        return {name: value for name, value in logged.items() if not math.isnan(value)}

    def _draw(self, similarity, logged, epoch):
        figure = new_figure(
            f"Similarity of phones, {self.representation}, epoch {epoch}: "
            f"within {logged['within']:.3f}, between {logged['between']:.3f}",
            width=8,
            height=7,
        )
        axes = figure.subplots()
        axes.set_facecolor("0.85")  # classes that don't occur
        matrix = axes.imshow(similarity.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        classes = range(0, len(similarity), 1 + len(similarity) // 50)
        symbols = symbols_beside(self.flags.get("path_phone_data"), len(similarity))
        names = [symbols.get(id_, str(id_)) for id_ in classes]
        axes.set_xticks(classes, names, rotation=90, fontsize="small")
        axes.set_yticks(classes, names, fontsize="small")
        axes.set(xlabel="phone", ylabel="phone")
        figure.colorbar(matrix, label="mean cosine similarity")
        return figure


def class_similarity(count, total):
    """Mean cosine similarity over all pairs of different frames of two classes: (n, n).

    Computed from the number of frames (n,) and the sum of their unit vectors (n, D) of each class.
    NaN where there is no pair.
    """
    products = total @ total.T
    pairs = torch.outer(count, count)
    products.diagonal().sub_(count)  # a frame with itself: similarity 1, but not a pair
    pairs.diagonal().sub_(count)
    return torch.where(pairs > 0, products / pairs, math.nan)


def _with_rows(tensor, n_rows):
    missing = tensor.new_zeros(n_rows - len(tensor), *tensor.shape[1:])
    return torch.cat([tensor, missing])
