"""Distances between all items of two groups, for many pairs of groups at once.

Distances between frames are computed by group, as one matrix product for many pairs of groups of
similar size; DTW is computed by item, for many pairs of items of similar size.
"""

import math
from dataclasses import dataclass

import torch

from eval.dtw import FRAME_DISTANCES, dtw, normalize_with_singularity
from utils.run.console import progress

# Floats held at once: enough to outweigh the overhead of a step, few enough to stay in caches.
TABLE_FLOATS = {"cpu": 2**24, "cuda": 2**28}  # in tables of distances between frames
STEP_FLOATS = {"cpu": 2**20, "cuda": 2**26}  # in one matrix product or DTW


# ------------------------------------------------------------------------------ dividing the work


def rounds(weights, most, keys=None):
    """Split the positions of `weights` (N,) into runs with a total weight of about `most` each.

    With `keys` (N,), ascending, all positions in a run have the same key.
    """
    which = weights.cumsum(0).div(most, rounding_mode="floor")
    if keys is not None:
        which = joint(keys, which)
    counts = torch.unique_consecutive(which, return_counts=True)[1].tolist()
    return torch.arange(len(weights), device=weights.device).split(counts)


def ranges(starts, sizes):
    """`starts[k], starts[k] + 1, ...`, `sizes[k]` of them, for k = 0, 1, ...: (k, values)."""
    owner = torch.repeat_interleave(sizes)
    values = torch.arange(len(owner), device=owner.device)
    return owner, values + (starts - sizes.cumsum(0) + sizes)[owner]


def joint(*labels):
    """One integer (N,) for each combination of labels (N,), in lexicographic order."""
    key = labels[0]
    for label in labels[1:]:
        key = key * (label.max() + 1) + label
    return key


# ------------------------------------------------------------------------------ frames and tables


@dataclass(frozen=True)
class Frames:
    """The frames of items: item i is `frames[starts[i]:][:sizes[i]]`."""

    frames: torch.Tensor  # (F, H) float32
    starts: torch.Tensor  # (I,) int64
    sizes: torch.Tensor  # (I,) int64

    def to(self, device):
        return Frames(*(tensor.to(device) for tensor in vars(self).values()))

    def normalized(self):
        return Frames(normalize_with_singularity(self.frames), self.starts, self.sizes)

    def of(self, items):
        """The items with indices `items` (K,)."""
        return Frames(self.frames, self.starts[items], self.sizes[items])

    def packed(self):
        """The same items, without gaps between them."""
        frames = self.frames[ranges(self.starts, self.sizes)[1]]
        return Frames(frames, self.sizes.cumsum(0) - self.sizes, self.sizes)

    def merged(self, first, count):
        """Packed items `first[k], first[k] + 1, ...`, `count[k]` of them, as item k."""
        starts, last = self.starts[first], first + count - 1
        return Frames(self.frames, starts, self.starts[last] + self.sizes[last] - starts)

    def padded(self):
        """All items as one tensor `(I, longest, H)`; the padding is arbitrary."""
        within = torch.arange(int(self.sizes.max()), device=self.frames.device)
        index = (self.starts[:, None] + within).clamp_(max=len(self.frames) - 1)
        return self.frames.index_select(0, index.view(-1)).view(*index.shape, -1)


@dataclass(frozen=True)
class Tables:
    """Tables of distances between frames, stored row by row in `flat`.

    Row i, column j of table k is `flat[starts[k] + i * widths[k] + j]`.
    """

    flat: torch.Tensor
    starts: torch.Tensor  # (K,) int64
    widths: torch.Tensor  # (K,) int64

    def cut(self, which, row, column, n, m):
        """The `n` rows and `m` columns of tables `which` (P,) starting at (row, column): (P, n, m).

        Entries outside a table are arbitrary.
        """
        start = self.starts[which] + row * self.widths[which] + column
        start = start[:, None] + torch.arange(n, device=start.device) * self.widths[which, None]
        runs = self.flat.unfold(0, m, 1)  # all runs of m floats, as a view
        start = start.clamp_(max=len(runs) - 1).view(-1)
        return runs.index_select(0, start).view(-1, n, m)


def frame_tables(x, y, distance):
    """Distances between all frames of item k of `x` and item k of `y`, for all k, as `Tables`."""
    # Items of similar size go together: padding costs at most a fifth on either side.
    like = joint(*((sizes.double().log2() * 4).ceil().long() for sizes in (x.sizes, y.sizes)))
    order = like.argsort(stable=True)
    floats = x.sizes * y.sizes + (x.sizes + y.sizes) * x.frames.shape[1]
    starts, widths = torch.empty_like(x.starts), torch.empty_like(x.starts)
    pieces, used = [], 0
    for some in rounds(floats[order], STEP_FLOATS[like.device.type], like[order]):
        some = order[some]
        tables = FRAME_DISTANCES[distance](x.of(some).padded(), y.of(some).padded())
        size = tables[0].numel()
        starts[some] = used + size * torch.arange(len(some), device=some.device)
        widths[some] = tables.shape[2]
        used += tables.numel()
        pieces.append(tables.view(-1))
    pieces.append(tables.new_zeros(int(widths.max())))  # so that a run starting at any float exists
    return Tables(torch.cat(pieces), starts, widths)


# ---------------------------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class Blocks:
    """Distances between all items of two groups, for K pairs of groups.

    Block k is a table of `rows[k]` by `columns[k]` in `distances[starts[k]:]`. If a group is paired
    with itself, the diagonal is infinite: no item is compared with itself.
    """

    distances: torch.Tensor  # (sum of rows * columns,) float32
    starts: torch.Tensor  # (K,) int64
    rows: torch.Tensor  # (K,) int64
    columns: torch.Tensor  # (K,) int64

    def padded(self, which, outside):
        """The blocks `which` (C,) as one tensor (C, rows, columns), padded with `outside`."""
        rows, columns = self.rows[which, None, None], self.columns[which, None, None]
        i = torch.arange(int(rows.max()), device=rows.device)[:, None]
        j = torch.arange(int(columns.max()), device=rows.device)
        inside = (i < rows) & (j < columns)
        entry = (self.starts[which, None, None] + i * columns + j) * inside
        return torch.where(inside, self.distances[entry], outside)


def compare_groups(frames, x, n_x, y, n_y, distance):
    """The `Blocks` of K pairs of groups; all four are (K,).

    The rows of block k are the `n_x[k]` items `x[k], x[k] + 1, ...`, its columns the `n_y[k]` items
    from `y[k]`. `frames`: packed `Frames` of all items; `distance`: a key of FRAME_DISTANCES.
    """
    sizes = n_x * n_y
    distances = frames.frames.new_full((int(sizes.sum()),), math.inf)
    blocks = Blocks(distances, sizes.cumsum(0) - sizes, n_x, n_y)
    floats = frames.merged(x, n_x).sizes * frames.merged(y, n_y).sizes
    with progress(what="comparing", unit=" pairs", total=len(distances), unit_scale=True) as bar:
        for some in rounds(floats, TABLE_FLOATS[sizes.device.type]):
            compare_some(blocks, some, frames, x[some], y[some], distance)
            bar.update(int(sizes[some].sum()))
    return blocks


def compare_some(blocks, some, frames, x, y, distance):
    """Fill blocks `some` (K,); `x` and `y` (K,) are the first items of their rows and columns."""
    n_x, n_y = blocks.rows[some], blocks.columns[some]
    rows, columns = frames.merged(x, n_x), frames.merged(y, n_y)
    tables = frame_tables(rows, columns, distance)
    k, entry = ranges(torch.zeros_like(some), n_x * n_y)
    i, j = entry.div(n_y[k], rounding_mode="floor"), entry % n_y[k]
    itself = (x == y)[k]
    once = (i < j) | ~itself  # within a group each pair is compared once
    k, i, j, itself = k[once], i[once], j[once], itself[once]
    found = warp(
        tables, k, frames.of(x[k] + i), rows.starts[k], frames.of(y[k] + j), columns.starts[k]
    )
    start = blocks.starts[some][k]
    blocks.distances[start + i * n_y[k] + j] = found
    blocks.distances[(start + j * n_y[k] + i)[itself]] = found[itself]


def warp(tables, which, x, x_origin, y, y_origin):
    """DTW distances (P,) between items `x` and `y`, given the distances between their frames.

    Row 0 and column 0 of table `which[p]` are the frames `x_origin[p]` and `y_origin[p]`.
    """
    order = joint(x.sizes, y.sizes).argsort()  # similar sizes: little padding
    result = tables.flat.new_empty(len(which))
    row, column = x.starts - x_origin, y.starts - y_origin
    floats = (x.sizes + 1) * (y.sizes + 1)
    for some in rounds(floats[order], STEP_FLOATS[which.device.type]):
        some = order[some]
        n, m = x.sizes[some], y.sizes[some]
        cut = tables.cut(which[some], row[some], column[some], int(n.max()), int(m.max()))
        result[some] = dtw(cut, n, m)
    return result
