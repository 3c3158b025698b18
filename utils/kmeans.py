"""k-means: greedy k-means++, then Lloyd's algorithm on all points until it converges.

Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding" (2007), with several
candidates for each center; Lloyd, "Least squares quantization in PCM" (1982).
"""

import itertools
import math
from operator import attrgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F

from utils.misc import UserError

BLOCK = 8192  # points whose distances to all centers are in memory at once
SEEDED_ON = 20_000, 20  # points that a start uses: at least, and per center
FINALISTS = 3  # best starts, continued on all points: a part of the points ranks them only roughly
STARTS = 500  # divided by the number of centers: with many, a single lucky one matters less


class Clustering(NamedTuple):
    """The result of k-means, largest cluster first."""

    centers: torch.Tensor  # (k, D)
    counts: torch.Tensor  # (k,) int64, points of each cluster
    inertia: float  # mean squared distance of points to their centers
    n_iterations: int


def squared_distances(points, centers, normalize=False):
    """points (..., D), centers (k, D) -> (..., k); `normalize` scales both to unit length first."""
    if normalize:
        points, centers = F.normalize(points, dim=-1), F.normalize(centers, dim=-1)
    products = points @ centers.T
    norms = points.square().sum(dim=-1, keepdim=True) + centers.square().sum(dim=-1)
    return norms - 2 * products


def assign(points, centers):
    """The nearest of `centers` (k, D) to each point of (N, D): ids (N,), squared distances (N,)."""
    origin = centers.mean(0)  # differences of large squares would lose precision
    centers = centers - origin
    nearest = [squared_distances(b - origin, centers).min(dim=1) for b in points.split(BLOCK)]
    ids = torch.cat([block.indices for block in nearest])
    return ids, torch.cat([block.values for block in nearest]).clamp_min(0)


def kmeans(
    points,
    n_clusters,
    generator,
    *,
    max_iterations=300,
    tolerance=1e-6,
    spherical=False,
    n_starts=None,
):
    """Cluster points (N, D) on any device; returns a `Clustering`.

    tolerance: stop when an iteration lowers the inertia by less than this fraction
    spherical: scale centers to unit length, for points of unit length (Dhillon and Modha, 2001)
    n_starts: starts on random parts of the points, the best of which continue on all points
        (default: more for fewer clusters)

    A cluster without points moves to the point that is farthest from its center. The result depends
    on `generator` only (on a GPU up to rounding). Raises UserError if there are fewer different
    points than clusters.
    """
    if len(points) < n_clusters:
        raise UserError(f"{n_clusters} clusters of {len(points)} frames: use fewer, or more audio")
    options = {"tolerance": tolerance, "spherical": spherical, "max_iterations": max_iterations}
    starts, inertia = [], attrgetter("inertia")
    for _ in range(n_starts or max(1, STARTS // n_clusters)):
        n_drawn = max(SEEDED_ON[0], SEEDED_ON[1] * n_clusters)
        drawn = torch.randperm(len(points), generator=generator)[:n_drawn]
        some = points[drawn.to(points.device)]
        starts.append(lloyd(some, first_centers(some, n_clusters, generator), **options))
    finalists = sorted(starts, key=inertia)[:FINALISTS]
    return min((lloyd(points, start.centers, **options) for start in finalists), key=inertia)


def lloyd(points, centers, *, max_iterations, tolerance, spherical):
    """Improve `centers` (k, D) until they converge; see `kmeans`."""
    before = math.inf
    for iteration in itertools.count():
        centers = F.normalize(centers, dim=1) if spherical else centers
        ids, distances = assign(points, centers)
        counts = ids.bincount(minlength=len(centers))
        inertia = distances.sum(dtype=torch.float64).item() / len(points)
        empty = counts == 0
        converged = inertia >= (1 - tolerance) * before and not empty.any()
        if converged or iteration == max_iterations:
            break
        centers, before = torch.where(empty[:, None], centers, _means(points, ids, counts)), inertia
        if empty.any():  # one at a time: the farthest points may be neighbours
            centers[empty.nonzero()[0]] = points[distances.argmax()]
    order = counts.argsort(descending=True, stable=True)
    return Clustering(centers[order], counts[order], inertia, iteration)


def first_centers(points, n_clusters, generator):
    """Greedy k-means++: each center is the best of some points drawn by squared distance.

    points: in random order, since the first of them is the first center
    """
    centred = points - points.mean(0)
    equal = 1e-6 * centred.square().sum(1).max()  # rounding: a point must not be chosen twice

    def distances_to(chosen):
        distances = squared_distances(centred, centred[chosen])
        return torch.where(distances > equal, distances, 0)

    chosen, nearest = [0], distances_to([0]).squeeze(1)
    while len(chosen) < n_clusters:
        if not nearest.any():
            raise UserError(
                f"{n_clusters} clusters, but only {len(chosen)} different frames among "
                f"{len(points)}: fewer clusters are needed, or another layer of the model"
            )
        n_candidates = 2 + int(math.log(n_clusters))
        candidates = nearest.cpu().multinomial(n_candidates, True, generator=generator)
        distances = torch.minimum(nearest[:, None], distances_to(candidates.to(points.device)))
        best = distances.sum(0, dtype=torch.float64).argmin()
        chosen.append(int(candidates[best]))
        nearest = distances[:, best]
    return points[chosen]


def _means(points, ids, counts):
    """The mean of each cluster's points, (k, D), summed in float64."""
    sums = torch.zeros(len(counts), points.size(1), dtype=torch.float64, device=points.device)
    for block, its_ids in zip(points.split(BLOCK), ids.split(BLOCK), strict=True):
        sums.index_add_(0, its_ids, block.double())
    return (sums / counts.clamp_min(1)[:, None]).to(points.dtype)
