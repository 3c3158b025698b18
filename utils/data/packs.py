"""Packs: the audio of several files, concatenated and decoded in place by threads."""

import functools
import mmap
import os
from typing import NamedTuple

import numpy as np
import torch

from utils.data.audio import decode_into, is_silent
from utils.data.windows import Layout, PackPlan, largest_pack
from utils.data.workers import Workers
from utils.misc import UserError
from utils.run.distributed import ALONE
from utils.run.machine import processors_each


class Pack(NamedTuple):
    """The decoded audio of several files, concatenated, and the labels of its frames."""

    audio: torch.Tensor  # (samples,) int16 or float32
    labels: torch.Tensor | None  # (samples // 160,) int16
    layout: Layout
    plan: PackPlan | None = None  # if one was asked for


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


class TwoBuffers:
    """The memory for all packs of a run that the processes of a machine share, used in turn.

    Filling memory that was used before is several times faster than filling new memory, and all
    processes would have to wait for that.
    """

    def __init__(self):
        self.buffers = []  # the last one is the one handed out most recently

    def allocate(self, dataset, world):
        """The buffer no longer in use, for any pack of `dataset`. All processes must call this."""
        if len(self.buffers) < 2:
            size = largest_pack(dataset.samples, dataset.max_size_loaded)
            self.buffers.append(world.shared_tensor(size, dataset.dtype))
        else:
            self.buffers.reverse()
        return self.buffers[-1]

    def drop(self):
        self.buffers = []


class PackDecoding:
    """A pack being decoded by threads, which start at once; `finish` waits for them.

    The processes of a machine share one pack, and each decodes some of its files. A file that is
    bad on one machine is left out on all.
    """

    def __init__(self, dataset, files, world=ALONE, plan=None, buffers=None):
        """`files`: (n,) ascending indices of the dataset's utterances.

        plan: Layout -> PackPlan, called in a thread; buffers: TwoBuffers of several processes
        """
        self.dataset, self.world, self.plan = dataset, world, plan
        self.layout = Layout.of(files, dataset.samples)
        size = int(self.layout.boundaries[-1])
        if buffers:
            self.audio = buffers.allocate(dataset, world)[:size]
        elif world.group is not None:  # all must call this, even if only another machine shares it
            self.audio = world.shared_tensor(size, dataset.dtype)
        else:
            self.audio = allocate_audio(size, dataset.dtype)
        self.own = range(world.local_rank, len(files), world.local_size)
        decode = functools.partial(_decode, dataset, self.layout, self.audio)
        n_threads = min(dataset.n_threads, processors_each(world.n_sharing))
        self.workers = Workers(decode, self.own, n_threads)
        self.planning = Workers(plan, [self.layout], 1) if plan else None

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
            self.world.raise_everywhere()  # no process reads the audio before this
        layout = Layout.of(files[good], self.dataset.samples)
        audio = self.audio[: int(layout.boundaries[-1])]
        return Pack(audio, self.dataset.labels_of(layout.files), layout, self._plan(layout))

    def _plan(self, layout):
        if not self.planning:
            return None
        (plan,) = self.planning.results("planning", " packs")
        return plan if len(layout.files) == len(self.layout.files) else self.plan(layout)

    def _results(self):
        """Wait for the threads of all processes. Returns a dict: index in the pack -> result of
        `_decode`, for bad and silent files only."""
        own = zip(self.own, self.workers.results("decoding", " files"), strict=True)
        found = self.world.all_gather({i: result for i, result in own if any(result)})
        return {i: result for part in reversed(found) for i, result in part.items()}


def _decode(dataset, layout, audio, i):
    """Decode file `i` of a pack into its place.

    Returns why it is unusable ("" if it is usable), and whether it is digital silence.
    """
    utterance = dataset.utterances[layout.files[i]]
    waveform = audio[layout.boundaries[i] : layout.boundaries[i + 1]].numpy()
    path = os.path.join(dataset.root, utterance.path)
    problem = decode_into(waveform, path, utterance.samples)
    return problem, not problem and is_silent(waveform)


def close_gaps(audio, boundaries, good):
    """Move the good files of a pack together, in place."""
    waveform, end = audio.numpy(), 0
    for i in np.flatnonzero(good):
        begin, length = boundaries[i], boundaries[i + 1] - boundaries[i]
        if end < begin:
            waveform[end : end + length] = waveform[begin : begin + length]
        end += length
