"""Distances between frames, and between stretches of speech by dynamic time warping (DTW).

All functions process many pairs at once, on CPU or GPU. DTW sweeps the anti-diagonals of all tables
together (cells on one anti-diagonal are independent), so the number of steps depends on the length
of the stretches and not on the number of pairs.
"""

import math

import torch

NULL_FRAME, OTHER_FRAME = -2e12, 1e-12  # coordinate added to zero frames, to others


def normalize_with_singularity(frames):
    """Scale frames to length 1 and add a coordinate that keeps zero frames apart from all others.

    `frames` is `(..., H)`, the result `(..., H + 1)`. A frame of zeros has no direction: its angle
    to any other frame becomes the largest possible, and to another zero frame 0.
    """
    norm = frames.norm(dim=-1, keepdim=True)
    null = norm == 0
    unit = torch.where(null, 1 / math.sqrt(frames.shape[-1]), frames / norm.masked_fill(null, 1))
    return torch.cat([unit, torch.where(null, NULL_FRAME, OTHER_FRAME).to(unit)], dim=-1)


def cosine_distance(x, y):
    """Angle between frames over pi: `(P, N, H)` and `(P, M, H)` of length 1 give `(P, N, M)`."""
    return (x @ y.transpose(-1, -2)).clamp_(-1, 1).acos_().div_(math.pi)


def euclidean_distance(x, y):
    """Euclidean distance between frames: `(P, N, H)` and `(P, M, H)` give `(P, N, M)`."""
    # Not by dot products: the distance between near frames would be a rounding error.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


FRAME_DISTANCES = {"cosine": cosine_distance, "euclidean": euclidean_distance}


def dtw(distances, sizes_x, sizes_y):
    """Cost of the cheapest warping path divided by its length, for each of P pairs: `(P,)`.

    `distances` `(P, N, M)`: between the frames of each pair; `sizes_x` and `sizes_y` `(P,)`: valid
    rows and columns. A path steps down, right or diagonally. Ties between predecessors go to the
    diagonal one first, then to the left one; this affects only the length of the path.
    """
    n_pairs, n, m = distances.shape
    cost, length = (distances.new_empty(n + 1, m + 1, n_pairs) for _ in range(2))
    for table, border in ((cost, math.inf), (length, 0)):
        table[0], table[:, 0] = border, border
    cost[1:, 1:] = distances.permute(1, 2, 0)
    cost[0, 0] = 0
    for total in range(2, n + m + 1):
        row = max(1, total - m)
        count = min(n, total - 1) - row + 1

        def cells(table, up, left, row=row, column=total - row, count=count):
            return antidiagonal(table, row - up, column - left, count)

        above, beside, corner = cells(cost, 1, 0), cells(cost, 0, 1), cells(cost, 1, 1)
        # `lerp` with a weight of 0.0 or 1.0 selects between integers exactly, and on a CPU takes a
        # third of the time of `where` with booleans.
        from_left = torch.le(beside, above, out=torch.empty_like(above))
        steps = torch.lerp(cells(length, 1, 0), cells(length, 0, 1), from_left)
        cheapest = torch.minimum(above, beside)
        from_corner = torch.le(corner, cheapest, out=from_left)
        steps.lerp_(cells(length, 1, 1), from_corner)
        cells(cost, 0, 0).add_(torch.minimum(cheapest, corner, out=cheapest))
        torch.add(steps, 1, out=cells(length, 0, 0))
    pairs = torch.arange(n_pairs, device=distances.device)
    return cost[sizes_x, sizes_y, pairs] / length[sizes_x, sizes_y, pairs]


def antidiagonal(table, row, column, count):
    """View `(count, P)` of a table `(N, M, P)`: from a cell down to the left."""
    down, right, one = table.stride()
    first = table.storage_offset() + row * down + column * right
    return table.as_strided((count, table.shape[2]), (down - right, one), first)
