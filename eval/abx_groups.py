"""The ABX task: which items are compared, and how the comparisons are averaged into a score.

An item is a stretch of speech with a phone, a context (the phones around it) and a speaker. Items
that share all three form a group. In a triplet, A and X have the same phone and B another one; A
and B have the same speaker, and all three the same context. A triplet is an error if X is nearer
to B than to A, half an error in a tie. A cell consists of all triplets of three groups.

Schatz et al. 2013, "Evaluating speech features with the minimal-pair ABX task"; Nguyen et al.
2020, "The Zero Resource Speech Benchmark 2021".
"""

import math
from dataclasses import dataclass

import torch

from eval.abx_distances import compare_groups, joint, ranges, rounds
from utils.misc import generator_from

ENTRIES_PER_ROUND = 2**22  # distances in the tables of the cells that are evaluated at once


# ------------------------------------------------------------------------------ groups and cells


@dataclass(frozen=True)
class Groups:
    """Items grouped by context, speaker and phone; group g is `members[starts[g]:][:sizes[g]]`."""

    members: torch.Tensor  # (I,) int64, indices of items
    starts: torch.Tensor  # (G,) int64
    sizes: torch.Tensor
    context: torch.Tensor
    speaker: torch.Tensor
    phone: torch.Tensor

    def to(self, device):
        return Groups(*(tensor.to(device) for tensor in vars(self).values()))


def group_items(items, max_size, seed):
    """The groups, of at most `max_size` items each; larger ones are subsampled."""
    keys, group = torch.unique(
        joint(items.context, items.speaker, items.phone), return_inverse=True
    )
    kept = random_subset(group, max_size, generator_from(seed, "ABX", "items"))
    members = kept[group[kept].argsort(stable=True)]
    sizes = torch.bincount(group[kept], minlength=len(keys))
    starts = sizes.cumsum(0) - sizes
    first = members[starts]
    return Groups(
        members, starts, sizes, items.context[first], items.speaker[first], items.phone[first]
    )


def within_cells(groups):
    """Cells (C, 3): groups of A, B and X, all by one speaker. A and X have the same group."""
    a, b = pairs_of_phones(groups)
    several = groups.sizes[a] > 1  # A and X are two items
    return torch.stack([a, b, a], dim=1)[several]


def across_cells(groups, max_x, seed):
    """Cells (C, 3): groups of A, B and X, where X is by another speaker.

    If more than `max_x` other speakers have A's phone in A's context, `max_x` of them are drawn.
    """
    same = joint(groups.context, groups.phone)
    a, x = matching_pairs(same, same)
    other = groups.speaker[a] != groups.speaker[x]
    a, x = a[other], x[other]
    kept = random_subset(a, max_x, generator_from(seed, "ABX", "speakers"))
    a, x = a[kept], x[kept]
    left, b = pairs_of_phones(groups)
    pair, with_x = matching_pairs(left, a)
    return torch.stack([left[pair], b[pair], x[with_x]], dim=1)


def pairs_of_phones(groups):
    """All pairs of groups (A, B) with the same context and speaker, but two phones: two tensors."""
    same = joint(groups.context, groups.speaker)
    a, b = matching_pairs(same, same)
    return a[a != b], b[a != b]


def matching_pairs(left, right):
    """All (i, j) with `left[i] == right[j]`, as two tensors, i ascending."""
    order = right.argsort(stable=True)
    first = torch.searchsorted(right[order], left)
    after = torch.searchsorted(right[order], left, right=True)
    i, position = ranges(first, after - first)
    return i, order[position]


def random_subset(owner, most, generator):
    """Positions (ascending) of at most `most` elements of each owner, drawn at random."""
    order = torch.randperm(len(owner), generator=generator)
    order = order[owner[order].argsort(stable=True)]
    rank = torch.arange(len(order)) - torch.searchsorted(owner[order], owner[order])
    return order[rank < most].sort().values


# ---------------------------------------------------------------------------- distances and score


def cell_errors(groups, cells, frames, distance):
    """Fraction of errors (C,) float64 among the triplets of each cell.

    `frames`: normalised `Frames` of all items, on the device to compute on; `distance`: a key of
    FRAME_DISTANCES.
    """
    groups, cells = groups.to(frames.starts.device), cells.to(frames.starts.device)
    frames = frames.of(groups.members).packed()
    a, b, x = cells.unbind(1)
    n_groups = len(groups.sizes)
    pairs, block = torch.unique(
        torch.cat([x, x]) * n_groups + torch.cat([a, b]), return_inverse=True
    )
    with_a, with_b = block.chunk(2)
    left, right = pairs.div(n_groups, rounding_mode="floor"), pairs % n_groups
    starts, sizes = groups.starts, groups.sizes
    blocks = compare_groups(
        frames, starts[left], sizes[left], starts[right], sizes[right], distance
    )
    errors = torch.empty(len(cells), dtype=torch.float64, device=cells.device)
    triplets = count_triplets(groups, cells)
    order = joint(sizes[x], sizes[a], sizes[b]).argsort()  # similar sizes: little padding
    for some in rounds((sizes[x] * (sizes[a] + sizes[b]))[order], ENTRIES_PER_ROUND):
        some = order[some]
        to_a, to_b = blocks.padded(with_a[some], math.inf), blocks.padded(with_b[some], -math.inf)
        errors[some] = 1 - count_wins(to_a, to_b) / triplets[some]
    return errors.cpu()


def count_triplets(groups, cells):
    """Triplets (C,) of each cell; A and X are never the same item."""
    a, b, x = cells.unbind(1)
    sizes = groups.sizes
    return sizes[x] * (sizes[a] - (a == x).long()) * sizes[b]


def count_wins(to_a, to_b):
    """The triplets of each cell in which X is nearer to A than to B; ties count half.

    `to_a` (C, X, A) is infinite and `to_b` (C, X, B) minus infinite outside the groups.
    Returns (C,) float64.
    """
    to_a, to_b = to_a.contiguous(), to_b.sort(dim=2).values
    farther = to_b.shape[2] - torch.searchsorted(to_b, to_a, right=True)
    farther_or_equal = to_b.shape[2] - torch.searchsorted(to_b, to_a)
    return (farther + farther_or_equal).sum(dim=(1, 2)).double() / 2


def mean_error(groups, cells, errors):
    """The score: errors averaged over contexts and X's speakers, speakers, then pairs of phones.

    A float, or None without cells.
    """
    if len(cells) == 0:
        return None
    a, b, _ = cells.unbind(1)
    speaker = groups.speaker[a]
    keys, means = mean_by(joint(groups.phone[a], groups.phone[b], speaker), errors)
    keys, means = mean_by(keys.div(speaker.max() + 1, rounding_mode="floor"), means)
    return means.mean().item()


def mean_by(keys, values):
    """Distinct keys, ascending, and the mean value of each."""
    keys, which = torch.unique(keys, return_inverse=True)
    return keys, torch.bincount(which, weights=values) / torch.bincount(which)
