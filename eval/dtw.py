"""Distances between stretches of speech: between frames, then by dynamic time warping (DTW).

Everything works on a great many pairs at once, on CPU or GPU. The DTW goes along the
anti-diagonals of all tables together (the cells of one don't depend on each other), so the number
of steps depends on the length of the stretches and not on the number of pairs.
"""

import math

import torch

NULL_FRAME, OTHER_FRAME = -2e12, 1e-12  # the coordinate added to frames of zeros, to all others


def normalize_with_singularity(frames):
    """Frames of length 1 with one more coordinate, which keeps null frames away from all others.

    `frames` is `(..., H)`, the result `(..., H + 1)`. A frame of zeros has no direction: here its
    angle to any other frame is the largest there is, and that to another null frame is zero.
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
    # By differences: through dot products, near frames would be at a distance of rounding errors.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


FRAME_DISTANCES = {"cosine": cosine_distance, "euclidean": euclidean_distance}


def dtw(distances, sizes_x, sizes_y):
    """Cost of the cheapest warping path over the path's length, for each of P pairs.

    `distances` is `(P, N, M)`, between the frames of each pair; `sizes_x` and `sizes_y`, `(P,)`,
    say how many rows and columns count. Returns `(P,)`. A path takes steps down, to the right or
    both at once. Where cells before a cell have equal costs, the path comes from the diagonal one
    first, then from the left: on this depends its length, and nothing else.
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
        # Floats and `lerp` choose exactly between whole numbers, and on a CPU they take a third of
        # the time of booleans and `where`.
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
    """View `(count, P)` of a table `(N, M, P)`: from one cell on down to the left."""
    down, right, one = table.stride()
    first = table.storage_offset() + row * down + column * right
    return table.as_strided((count, table.shape[2]), (down - right, one), first)
