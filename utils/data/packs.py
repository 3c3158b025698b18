"""Packs: the audio of several files, concatenated and decoded in place by threads."""

import mmap
import os
from typing import NamedTuple

import numpy as np
import torch

from utils.data.audio import decode_into, is_silent
from utils.data.windows import Layout
from utils.data.workers import Workers
from utils.misc import UserError
from utils.run.distributed import ALONE
from utils.run.machine import processors_each


class Pack(NamedTuple):
    """The decoded audio of several files, concatenated, and the labels of its frames."""

    audio: torch.Tensor  # (samples,) int16 or float32
    labels: torch.Tensor | None  # (samples // 160,) int16
    layout: Layout


def allocate_audio(samples, dtype):
    """An uninitialised (samples,) tensor in its own memory mapping.

    Freeing it returns the memory to the system, which the allocator wouldn't do here (see
    `utils.run.machine.keep_freed_memory`). Pages that are never written to take no memory.
    """
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    try:
        memory = mmap.mmap(-1, max(1, samples) * dtype.itemsize, **flags)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"no memory for {samples} samples of audio ({samples * dtype.itemsize / 1e9:.1f} GB); "
            "a smaller --max_size_loaded needs less"
        ) from error
    return torch.frombuffer(memory, dtype=dtype)[:samples]


class PackDecoding:
    """A pack being decoded by threads, which start at once; `finish` waits for them.

    The processes of a machine share one pack, and each decodes some of its files. A file that is
    bad on one machine is left out on all.
    """

    def __init__(self, dataset, files, world=ALONE):
        """`files`: (n,) ascending indices of the dataset's utterances."""
        self.dataset, self.world = dataset, world
        self.layout = Layout.of(files, dataset.samples)
        size = int(self.layout.boundaries[-1])
        # Also on machines with a single process: others may have more, and all must call this.
        allocate = world.shared_tensor if world.group is not None else allocate_audio
        self.audio = allocate(size, dataset.dtype)
        parts = np.split(self.audio.numpy(), self.layout.boundaries[1:-1])
        utterances = [dataset.utterances[i] for i in files]
        items = [
            (part, os.path.join(dataset.root, utterance.path), utterance.samples)
            for part, utterance in zip(parts, utterances, strict=True)
        ]
        self.own = range(world.local_rank, len(items), world.local_size)
        own_items = [items[i] for i in self.own]
        n_threads = min(dataset.n_threads, processors_each(world.local_size))
        self.workers = Workers(_decode, own_items, n_threads)

    def finish(self):
        """The `Pack`, without files that turned out to be bad (see `AudioDataset.skip`)."""
        found, files = self._results(), self.layout.files
        problems = {i: problem for i, (problem, _) in found.items() if problem}
        silent = [self.dataset.utterances[files[i]].path for i in found.keys() - problems.keys()]
        self.dataset.warn_of_silence(silent)
        good = np.ones(len(files), dtype=bool)
        good[list(problems)] = False
        if problems:
            bad = {self.dataset.utterances[files[i]].path: p for i, p in problems.items()}
            with self.world.shared_errors():
                self.dataset.skip(bad)
            if self.world.local_rank == 0:
                close_gaps(self.audio, self.layout.boundaries, good)
            self.world.raise_everywhere()  # nobody reads before that is done
        layout = Layout.of(files[good], self.dataset.samples)
        audio = self.audio[: int(layout.boundaries[-1])]
        return Pack(audio, self.dataset.labels_of(layout.files), layout)

    def _results(self):
        """Wait for the threads of all processes. Returns a dict: index in the pack -> what
        `_decode` found, without files that are as they should be."""
        own = zip(self.own, self.workers.results("decoding", " files"), strict=True)
        found = self.world.all_gather({i: result for i, result in own if any(result)})
        return {i: result for part in reversed(found) for i, result in part.items()}


def _decode(item):
    """Why a file is unusable ("" if it isn't), and whether it is digital silence."""
    problem = decode_into(*item)
    return problem, not problem and is_silent(item[0])


def close_gaps(audio, boundaries, good):
    """Move the good files of a pack together, in place."""
    waveform, end = audio.numpy(), 0
    for i in np.flatnonzero(good):
        begin, length = boundaries[i], boundaries[i + 1] - boundaries[i]
        if end < begin:
            waveform[end : end + length] = waveform[begin : begin + length]
        end += length
