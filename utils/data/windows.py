"""Planning an epoch: which files share a pack, which windows of a pack share a batch.

Pure functions of lengths, speaker ids and a seeded generator; no audio is needed. All lengths and
positions are in samples.
"""

from typing import NamedTuple

import numpy as np
import torch

from utils.misc import SAMPLES_PER_FRAME


class Layout(NamedTuple):
    """The positions of files in a pack."""

    files: np.ndarray  # (n,) index into the dataset's utterances, ascending
    boundaries: np.ndarray  # (n + 1,): file i is at [boundaries[i], boundaries[i + 1])

    @classmethod
    def of(cls, files, lengths):
        """Concatenate files; `lengths` are those of all utterances of the dataset."""
        return cls(files, cumulative(lengths[files]))

    def file_at(self, samples):
        """The index in `files` of the file at each of these samples of the pack."""
        return np.searchsorted(self.boundaries, samples, side="right") - 1


class PackPlan(NamedTuple):
    """The windows of a pack in batches: batch g is `starts[edges[g]:edges[g + 1]]`."""

    starts: np.ndarray  # (windows,) first sample of each window in the pack
    edges: np.ndarray  # (batches + 1,)

    @property
    def n_batches(self):
        return len(self.edges) - 1

    def batch(self, g):
        return self.starts[self.edges[g] : self.edges[g + 1]]


def cumulative(lengths):
    """0 followed by the cumulative sums of `lengths`."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def split_into_packs(lengths, max_size, generator=None, pieces=None):
    """Split files into packs of at most `max_size` samples: a list of ascending index arrays.

    With a generator the files are shuffled first. Packs have about the same size, so that none is
    too small to mix its windows well; a file longer than `max_size` gets a pack to itself.

    pieces: (speaker of each file, samples): keep about that many samples of a speaker together
    """
    total, order = int(lengths.sum()), np.arange(len(lengths))
    if total <= max_size:
        return [order]
    if generator is not None:
        order = torch.randperm(len(lengths), generator=generator).numpy()
        if pieces:
            order = _by_pieces(order, lengths, *pieces, generator)
    limit, ends = _limit(lengths, max_size), cumulative(lengths[order])
    packs, begin = [], 0
    while begin < len(order):
        end = int(np.searchsorted(ends, ends[begin] + limit, side="right")) - 1
        end = max(end, begin + 1)
        packs.append(np.sort(order[begin:end]))
        begin = end
    return packs


def _by_pieces(order, lengths, speakers, size, generator):
    """Shuffle pieces of about `size` samples of a speaker's files; `order`: all files, shuffled."""
    by_speaker = order[np.argsort(speakers[order], kind="stable")]
    begins = cumulative(lengths[by_speaker])[:-1]
    is_first = np.diff(speakers[by_speaker], prepend=-1) != 0
    rank = (begins - np.maximum.accumulate(np.where(is_first, begins, 0))) // size
    piece = np.cumsum(is_first | (np.diff(rank, prepend=0) != 0)) - 1
    n_pieces = int(piece[-1]) + 1
    if n_pieces == len(order):
        return order
    keys = torch.randperm(n_pieces, generator=generator).numpy()
    return by_speaker[np.argsort(keys[piece], kind="stable")]


def largest_pack(lengths, max_size):
    """The most samples that a pack of `split_into_packs` can have, however files are shuffled."""
    return min(int(lengths.sum()), max(_limit(lengths, max_size), int(lengths.max())))


def _limit(lengths, max_size):
    total = int(lengths.sum())
    n_packs = -(-total // max_size)
    return min(max_size, -(-total // n_packs) + int(lengths.max()))


def plan_pack(layout, speakers, sampling, size_window, batch_size, generator=None):
    """Cut a pack into windows, and these into batches.

    speakers: (n,) speaker ids of the layout's files. Without a generator, windows start at the
    beginning of each interval (see `_intervals`), and all are kept in order.
    """
    if sampling == "sequential" and generator is not None:
        size = int(layout.boundaries[-1])
        offset = _random_offsets(np.array([size]), size_window, generator)[0]
        return plan_rows(size, int(offset), size_window, batch_size)
    starts, index = _cut_windows(_intervals(layout, speakers, sampling), size_window, generator)
    edges = np.append(np.flatnonzero(index % batch_size == 0), len(starts))
    if generator is None:
        return PackPlan(starts, edges)
    if sampling == "uniform" and len(edges) > 2 and edges[-1] - edges[-2] < batch_size:
        edges = edges[:-1]  # other samplings keep incomplete batches
    return _shuffle_batches(starts, edges, generator)


def count_batches(layout, speakers, sampling, size_window, batch_size, generator=None):
    """`plan_pack(...).n_batches` without placing windows, for packs that aren't due yet."""
    if sampling == "sequential" and generator is not None:
        plan = plan_pack(layout, speakers, sampling, size_window, batch_size, generator)
        return plan.n_batches
    _, counts = _windows_in(_intervals(layout, speakers, sampling), size_window, generator)
    n_batches = int((-(-counts // batch_size)).sum())
    incomplete = sampling == "uniform" and generator is not None and counts[0] % batch_size
    return n_batches - 1 if incomplete and n_batches > 1 else n_batches


def plan_rows(size, offset, size_window, batch_size):
    """Batches in which each row continues where the same row of the last batch ended.

    The pack, from `offset` on, is cut into `batch_size` parts of whole frames (fewer if there are
    fewer windows); each row runs through one part.
    """
    n_rows = min(batch_size, (size - offset) // size_window)
    if n_rows <= 0:
        return PackPlan(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
    n_batches = (size - offset) // size_window // n_rows
    stride = (size - offset) // n_rows // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME
    starts = offset + np.arange(n_batches)[:, None] * size_window + np.arange(n_rows) * stride
    return PackPlan(starts.ravel(), np.arange(n_batches + 1) * n_rows)


def _intervals(layout, speakers, sampling):
    """Boundaries of the intervals of a pack that no window crosses and no batch mixes."""
    if sampling == "samesequence":
        return layout.boundaries
    if sampling == "samespeaker":
        changes = np.flatnonzero(np.diff(speakers)) + 1
        return layout.boundaries[np.concatenate([[0], changes, [len(speakers)]])]
    return layout.boundaries[[0, -1]]


def _cut_windows(boundaries, size_window, generator):
    """The start of each window, and its index within its interval.

    With a generator, windows start at a random offset and are shuffled within their interval.
    """
    offsets, counts = _windows_in(boundaries, size_window, generator)
    interval = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(interval)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = (boundaries[:-1] + offsets)[interval] + index * size_window
    if generator is not None:
        keys = torch.randperm(len(starts), generator=generator).numpy()
        starts = starts[np.lexsort((keys, interval))]
    return starts, index


def _windows_in(boundaries, size_window, generator):
    """For each interval, the offset of its first window, and its number of windows."""
    sizes = np.diff(boundaries)
    offsets = np.zeros_like(sizes)
    if generator is not None:
        offsets = _random_offsets(sizes, size_window, generator)
    return offsets, (sizes - offsets) // size_window


def _random_offsets(sizes, size_window, generator):
    """For each interval, 0 to half a window in whole frames, leaving at least one window."""
    latest = np.clip(sizes - size_window, 0, size_window // 2) // SAMPLES_PER_FRAME
    drawn = torch.rand(len(sizes), generator=generator, dtype=torch.float64).numpy()
    return (drawn * (latest + 1)).astype(np.int64) * SAMPLES_PER_FRAME


def _shuffle_batches(starts, edges, generator):
    order = torch.randperm(len(edges) - 1, generator=generator).numpy()
    lengths = np.diff(edges)[order]
    shuffled = cumulative(lengths)
    index = np.repeat(edges[:-1][order] - shuffled[:-1], lengths) + np.arange(shuffled[-1])
    return PackPlan(starts[index], shuffled)
