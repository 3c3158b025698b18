"""Corpora in LibriSpeech layout -> batches of windows with their labels.

In the order of the data's way: listing a database (`scan_corpus`), choosing among its sequences
(`select_sequences`, `read_phone_labels`), their audio in memory (`AudioDataset`), and batches of
windows of it (`BatchLoader`). Lengths are in samples at 16 kHz; `B` is the number of windows in a
batch, `L` the samples in a window.
"""

import hashlib
from bisect import bisect_right
from typing import NamedTuple

import numpy as np
import torch

from utils.data.corpus import in_order, read_sequence_list, select_sequences
from utils.data.packs import PackDecoding
from utils.data.windows import Layout, cumulated, plan_pack, split_in_packs
from utils.misc import (
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    UserError,
    counted,
    first_few,
    generator_from,
)
from utils.run.distributed import ALONE

MAX_SIZE_LOADED = 4_000_000_000  # samples in a pack: 8 GB, 69 hours
USUAL_DIFFERENCE = 2  # frames that alignments are often shorter or longer than their audio
SAMPLINGS = ("samespeaker", "uniform", "samesequence", "sequential")


# --------------------------------------------------------------------------- listing and choosing


# ------------------------------------------------------------------------------------------- packs


def allowed_bad_files(n_files, fraction):
    """How many of `n_files` may be bad: this fraction, or a quarter of them up to three files.

    The latter is for small corpora; where one file is bad, one always may be. 0 means none.
    """
    if fraction == 0:
        return 0
    return max(int(fraction * n_files), min(3, max(1, n_files // 4)))


# ----------------------------------------------------------------------------------------- dataset


class AudioDataset:
    """Sequences of a corpus to train or test on, with their labels; their audio once decoded.

    sequences: those that can be used, by speaker and name
    samples, speakers: (n,) int64 arrays, the length in use and the speaker id of each
    n_unlabelled: how many were left out since they have no phone labels
    """

    def __init__(
        self,
        corpus,
        sequences,
        size_window,
        *,
        phone_labels=None,
        labelled_only=False,
        whole_frames=False,
        max_size_loaded=MAX_SIZE_LOADED,
        n_threads=8,
        max_bad_files=0.01,
        title="training set",
    ):
        """`sequences` of `corpus`, to be cut into windows of `size_window` samples.

        With `phone_labels`, sequences without labels are left out if `labelled_only` (and refused
        otherwise), the others cut to whole labelled frames; `whole_frames` cuts to whole frames
        without labels. `max_size_loaded` is the number of samples in memory at a time (twice that
        while the next ones are decoded), `max_bad_files` the fraction of files that may be
        unusable (see `allowed_bad_files`), `title` how messages call this set.

        Raises UserError if no sequence is left, too many are bad or one has another sample rate.
        """
        self.root, self.size_window, self.title = corpus.root, size_window, title
        self.max_size_loaded, self.n_threads = max_size_loaded, n_threads
        self.phone_labels = phone_labels
        self._problems, self._n_files = {}, len(sequences)
        self._n_allowed = allowed_bad_files(self._n_files, max_bad_files)
        self._only_pack = None
        usable = self._usable(in_order(sequences))
        self.sequences = tuple(self._labelled(usable, labelled_only) if phone_labels else usable)
        self.n_unlabelled = len(usable) - len(self.sequences)
        self.samples = self._lengths_in_use(whole_frames)
        self.speakers = np.array([s.speaker for s in self.sequences], dtype=np.int64)
        exact = all(s.fits_int16 for s in self.sequences)
        self.dtype = torch.int16 if exact else torch.float32

    def _usable(self, sequences):
        self.skip({s.path: s.problem for s in sequences if s.problem})
        usable = [s for s in sequences if not s.problem]
        wrong = [s for s in usable if s.rate != SAMPLE_RATE]
        if wrong:
            raise UserError(
                f"{self.title}: {len(wrong)} of {len(usable)} files aren't sampled at "
                f"{SAMPLE_RATE} Hz, the first is {first_few([wrong[0].path])} ({wrong[0].rate} "
                "Hz); utils/corpus/adjust_sample_rate.py converts them"
            )
        return usable

    def skip(self, problems):
        """Note and name bad files (path -> problem); raises UserError when they are too many."""
        new = {path: problem for path, problem in problems.items() if path not in self._problems}
        if not new:
            return
        self._problems.update(new)
        named = [f"{path} ({problem})" for path, problem in new.items()]
        nothing_left = len(self._problems) == self._n_files
        if nothing_left or len(self._problems) > self._n_allowed:
            allows = f"--max_bad_files allows {self._n_allowed}"
            raise UserError(
                f"{self.title}: {len(self._problems)} of {self._n_files} audio files are bad, "
                f"{'nothing is left' if nothing_left else allows}: {first_few(named)}"
            )
        print(f"{self.title}: skipped {len(new)} of {self._n_files} files: {first_few(named, 20)}")

    def _labelled(self, sequences, labelled_only):
        labelled = [s for s in sequences if s.name in self.phone_labels.labels]
        if not labelled:
            raise UserError(
                f"{self.phone_labels.path}: has labels for none of the {len(sequences)} sequences "
                f"of the {self.title}, e.g. {first_few([sequences[0].name])}; is it for another "
                "corpus?"
            )
        if len(labelled) < len(sequences) and not labelled_only:
            raise ValueError("some sequences have no labels: labelled_only=True leaves them out")
        return labelled

    def _lengths_in_use(self, whole_frames):
        samples = np.array([s.samples for s in self.sequences], dtype=np.int64)
        n_frames = samples // SAMPLES_PER_FRAME
        if not self.phone_labels:
            return n_frames * SAMPLES_PER_FRAME if whole_frames else samples
        labels = self.phone_labels.labels
        n_labels = np.array([len(labels[s.name]) for s in self.sequences], dtype=np.int64)
        too_few, too_many = n_frames - n_labels, n_labels - np.ceil(samples / SAMPLES_PER_FRAME)
        difference = np.maximum(too_few, too_many).astype(np.int64)
        if (difference > USUAL_DIFFERENCE).any():
            worst = self.sequences[int(np.argmax(difference))]
            print(
                f"warning: {self.title}: {(difference > 0).sum()} of {len(samples)} files are "
                "shorter or longer than their labels, by "
                f"{counted(int(difference.max()), 'frame')} at most: {first_few([worst.path])} "
                f"({worst.samples} samples, {len(labels[worst.name])} "
                "labels); both are cut to the shorter"
            )
        return np.minimum(n_frames, n_labels) * SAMPLES_PER_FRAME

    @property
    def n_windows(self):
        """Windows in all sequences laid end to end; no epoch of any sampling has more."""
        return int(self.samples.sum()) // self.size_window

    @property
    def hours(self):
        return float(self.samples.sum()) / SAMPLE_RATE / 3600

    def describe(self):
        """One line for people."""
        n_speakers, n_files = len(np.unique(self.speakers)), len(self.sequences)
        duration = f"{self.hours:.1f} h" if self.hours >= 1 else f"{60 * self.hours:.1f} min"
        text = (
            f"{self.title}: {counted(n_files, 'file')}, {duration}, "
            f"{counted(n_speakers, 'speaker')}, {counted(self.n_windows, 'window')} of "
            f"{self.size_window / SAMPLE_RATE:.2f} s"
        )
        if self.phone_labels:
            text += f", {n_files} of {n_files + self.n_unlabelled} files have phone labels"
        return text

    def require_windows(self):
        """Raise UserError if the set gives nothing to work on."""
        if not self.n_windows:
            raise self.no_window()

    def no_window(self):
        """The UserError that the set gives nothing to work on."""
        return UserError(
            f"{self.title}: not a single window of {self.size_window} samples in "
            f"{counted(len(self.sequences), 'file')}; more audio or a smaller --sizeWindow is "
            "needed"
        )

    def fingerprint(self):
        """Short text that depends on the paths and lengths of the sequences and nothing else."""
        digest = hashlib.blake2b(digest_size=8)
        for sequence in sorted(self.sequences, key=lambda s: s.path):
            digest.update(f"{sequence.path}\0{sequence.samples}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def labels_of(self, files):
        """(frames,) int16 labels of these files, by index of sequence; None without labels."""
        if not self.phone_labels:
            return None
        labels, n_frames = self.phone_labels.labels, self.samples // SAMPLES_PER_FRAME
        parts = [labels[self.sequences[i].name][: n_frames[i]] for i in files]
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int16), *parts]))

    def only_pack(self, world=ALONE):
        """The pack of all files: decoded once, by all processes of `world`, then kept."""
        if self._only_pack is None:
            files = np.arange(len(self.sequences))
            self._only_pack = PackDecoding(self, files, world).finish()
        return self._only_pack


# ------------------------------------------------------------------------- the sets of a command


def listed(corpus, path):
    """The utterances of a list; of the whole corpus without one."""
    if path is None:
        return list(corpus.sequences)
    return select_sequences(corpus.sequences, read_sequence_list(path), path)


def split_corpus(args, corpus):
    """The utterances to train and to validate on: those of the lists, or 1 % set aside."""
    training = listed(corpus, args.pathTrain)
    if args.pathVal:
        validation = listed(corpus, args.pathVal)
    else:
        training, validation = set_aside(training, 0.01, args.random_seed)
    if args.debug:
        training, validation = training[-1000:], validation[-100:]
    warn_of_shared_files(training, validation)
    return training, validation


def warn_of_shared_files(training, validation):
    """Warn of utterances that are both trained and tested on."""
    trained_on = {utterance.path for utterance in training}
    shared = [utterance.path for utterance in validation if utterance.path in trained_on]
    if shared:
        print(
            f"warning: {len(shared)} of {counted(len(validation), 'file')} of the validation set "
            f"are in the training set, too: {first_few(shared)}",
            flush=True,
        )


def set_aside(utterances, fraction, seed):
    """Split off a random fraction of the utterances, at least one."""
    if len(utterances) < 2:
        raise UserError("--pathVal FILE is needed: one sequence can't be split into two sets")
    order = torch.randperm(len(utterances), generator=generator_from(seed, "validation set"))
    chosen = set(order[: max(1, round(fraction * len(utterances)))].tolist())
    return (
        [u for index, u in enumerate(utterances) if index not in chosen],
        [u for index, u in enumerate(utterances) if index in chosen],
    )


def build_set(corpus, utterances, args, title, labels=None, **more):
    """The AudioDataset that the flags describe; with labels, of the utterances that have some."""
    dataset = AudioDataset(
        corpus,
        utterances,
        args.sizeWindow,
        phone_labels=labels,
        labelled_only=labels is not None,
        n_threads=args.n_process_loader,
        max_bad_files=args.max_bad_files,
        title=title,
        **more,
    )
    print(dataset.describe(), flush=True)
    return dataset


def build_sets(corpus, split, args, labels=None):
    """Training and validation set of a `split_corpus`; see `build_set`."""
    training, validation = split
    labelled = " with phone labels" if labels else ""
    size = {"max_size_loaded": args.max_size_loaded}
    return (
        build_set(corpus, training, args, f"training set{labelled}", labels, **size),
        build_set(corpus, validation, args, f"validation set{labelled}", labels),
    )


# ----------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """Windows with their labels. A loader gives them on the CPU; `to` makes them ready for use."""

    waveform: torch.Tensor  # (B, 1, L) float32 in [-1, 1] after `to`; before, int16 or float32
    speaker: torch.Tensor  # (B,) int64, of the first sample
    phone: torch.Tensor | None  # (B, L // 160) int64
    window: torch.Tensor  # (B,) int64, index into the epoch's plan (see BatchLoader.locate)
    continues: torch.Tensor  # (B,) bool, whether the row goes on, in one file, where it ended

    def to(self, device):
        """The batch on `device`, the waveform in float32."""
        device = torch.device(device)
        batch = self.each(lambda tensor: _moved(tensor, device))
        if batch.waveform.dtype == torch.int16:
            batch = batch._replace(waveform=batch.waveform.float() / 32768)
        return batch

    def each(self, function):
        """A Batch of what `function` makes of each tensor."""
        return Batch(*(None if tensor is None else function(tensor) for tensor in self))


def _moved(tensor, device):
    if device.type == "cpu":
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def on_device(batches, device):
    """(Position, Batch) pairs with the batches on `device`.

    On CUDA a batch is copied on a stream of its own, while the device works on the batch before.
    """
    if device.type != "cuda":
        for position, batch in batches:
            yield position, batch.to(device)
        return
    copying, ahead = torch.cuda.Stream(device), None
    for position, batch in batches:
        copying.wait_stream(torch.cuda.current_stream())  # what it frees may be used again here
        with torch.cuda.stream(copying):
            copied = position, batch.to(device), copying.record_event()
        if ahead:
            yield _when_copied(*ahead)
        ahead = copied
    if ahead:
        yield _when_copied(*ahead)


def _when_copied(position, batch, copied):
    torch.cuda.current_stream().wait_event(copied)
    return position, batch


class Position(NamedTuple):
    """A batch: number `batch` of pack `pack` of an epoch, whatever the number of processes."""

    epoch: int
    pack: int
    batch: int


class BatchLoader:
    """Batches of the windows of a dataset, epoch by epoch; the next pack is decoded meanwhile.

    The order of an epoch depends on the dataset, `batch_size`, `sampling`, `seed` and the epoch's
    number alone. Of several processes (`world`), each gets every `world.size`-th batch.

    sampling: the windows of a batch come from one speaker (`samespeaker`), from one file
        (`samesequence`), from anywhere (`uniform`), or each row of a batch goes on where that row
        of the batch before ended (`sequential`; with several processes rows still run through the
        files, but nothing `continues`).
    training: files and windows are shuffled and begin at random offsets. A `uniform` batch that
        isn't full is dropped if the pack has a full one; all processes get the same number, so
        that at most `world.size` - 1 batches of an epoch are dropped. Otherwise: every window, in
        order (`sequential` and `uniform` are then the same), the last batch as small as it is.

    In training the processes wait for each other at each new pack; otherwise only in `prepare`.
    """

    def __init__(self, dataset, batch_size, sampling, *, seed, training, world=ALONE):
        """Raises UserError if the dataset has no window, or not a batch for every process."""
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling {sampling!r} is none of {SAMPLINGS}")
        self.dataset, self.batch_size, self.sampling = dataset, batch_size, sampling
        self.seed, self.training, self.world = seed, training, world
        self._ahead = {}  # (epoch, pack) -> PackDecoding, at most one
        self._n_batches = {}  # of the epoch asked for last
        self._begin(0)
        self._check_size()

    def _check_size(self):
        n_batches = self.n_batches(0)
        if n_batches == 0:
            raise self.dataset.no_window()
        if self.training and n_batches < self.world.size:
            raise UserError(
                f"{self.dataset.title}: {n_batches} batches of {self.batch_size} windows are too "
                f"few for {self.world.size} processes; use fewer (--nGPU) or a smaller "
                "--batchSizeGPU"
            )

    def __len__(self):
        """Batches for this process in the current epoch, if no more files turn out to be bad."""
        n_batches = self.n_batches(self._epoch)
        if self.training:
            return n_batches // self.world.size
        return len(range(self.world.rank, n_batches, self.world.size))

    def n_batches(self, epoch, first=None):
        """Batches of all processes in an epoch, if no more files turn out to be bad.

        Those from the position `first` on, if it is given.
        """
        if epoch not in self._n_batches:
            layouts = (Layout.of(files, self.dataset.samples) for files in self._packs_of(epoch))
            plans = (self._plan(epoch, p, layout) for p, layout in enumerate(layouts))
            self._n_batches = {epoch: [plan.n_batches for plan in plans]}
        n_batches = self._n_batches[epoch]
        return max(0, sum(n_batches[first.pack :]) - first.batch) if first else sum(n_batches)

    def prepare(self):
        """Decode, with all processes, what every epoch needs, where it fits in one pack."""
        if len(self._packs) == 1:
            self.dataset.only_pack(self.world)

    def _packs_of(self, epoch):
        generator = generator_from(self.seed, "packs", epoch) if self.training else None
        return split_in_packs(self.dataset.samples, self.dataset.max_size_loaded, generator)

    def _plan(self, epoch, p, layout):
        generator = generator_from(self.seed, "windows", epoch, p) if self.training else None
        dataset = self.dataset
        speakers = dataset.speakers[layout.files]
        return plan_pack(
            layout, speakers, self.sampling, dataset.size_window, self.batch_size, generator
        )

    def epoch(self, epoch, first=None):
        """Yield (Position, Batch) for this process; from position `first` on, if it is given.

        `first.batch` may lie beyond the end of its pack: it then counts on into the next one.
        """
        self._begin(epoch)
        first = first or Position(epoch, 0, 0)
        skip, turn, mine = first.batch, 0, None
        try:
            for p in range(first.pack, len(self._packs)):
                pack = self._take(p)
                self._decode_ahead(p + 1)
                plan = self._plan(epoch, p, pack.layout)
                self._plans[p] = plan, pack.layout
                for g in range(min(skip, plan.n_batches), plan.n_batches):
                    self._check_ahead()
                    if turn % self.world.size == self.world.rank:
                        mine = Position(epoch, p, g), self._gather(pack, p, g)
                    turn += 1
                    if turn % self.world.size == 0:  # every process has its batch
                        yield mine
                        mine = None
                skip = max(0, skip - plan.n_batches)
                del pack  # before the next but one is allocated
            if mine and not self.training:
                yield mine
            if turn == 0 and first == (epoch, 0, 0):
                raise self.dataset.no_window()
        except BaseException:  # also when the iteration is abandoned
            self.close()
            raise

    def close(self):
        """End the decoding in the background; another epoch may begin afterwards."""
        for decoding in self._ahead.values():
            decoding.workers.stop()
        self._ahead = {}

    def _begin(self, epoch):
        """Forget the last epoch's windows; number those of this one by the lengths in headers."""
        self._epoch, self._packs, self._plans = epoch, self._packs_of(epoch), {}
        sizes = np.array([self.dataset.samples[files].sum() for files in self._packs])
        self._first_windows = cumulated(sizes // self.dataset.size_window)

    def _take(self, p):
        if len(self._packs) == 1:
            return self.dataset.only_pack(self.world)
        decoding = self._ahead.pop((self._epoch, p), None)
        return (decoding or self._decoding(self._packs[p])).finish()

    def _decoding(self, files):
        return PackDecoding(self.dataset, files, self.world if self.training else ALONE)

    def _decode_ahead(self, p):
        """Begin with pack `p`; after the last pack, in training, with the next epoch's first."""
        if len(self._packs) == 1:
            return
        if p < len(self._packs):
            self._ahead = {(self._epoch, p): self._decoding(self._packs[p])}
        elif self.training:
            files = self._packs_of(self._epoch + 1)[0]
            self._ahead = {(self._epoch + 1, 0): self._decoding(files)}

    def _check_ahead(self):
        for decoding in self._ahead.values():
            decoding.workers.check()

    def _gather(self, pack, p, g):
        """Batch `g` of a pack, in one operation on its audio."""
        plan, layout = self._plans[p]
        starts = torch.from_numpy(plan.batch(g))
        size_window, phone = self.dataset.size_window, None
        waveform = pack.audio.unfold(0, size_window, 1).index_select(0, starts)
        if pack.labels is not None:
            frames = pack.labels.unfold(0, size_window // SAMPLES_PER_FRAME, 1)
            phone = frames.index_select(0, starts // SAMPLES_PER_FRAME).long()
        files = layout.files[layout.position_of(plan.batch(g))]
        window = torch.arange(plan.edges[g], plan.edges[g + 1]) + int(self._first_windows[p])
        return Batch(
            waveform.unsqueeze(1),
            torch.from_numpy(self.dataset.speakers[files]),
            phone,
            window,
            torch.from_numpy(self._continues(plan, layout, g)),
        )

    def _continues(self, plan, layout, g):
        """Whether each row goes on where it ended in the batch that this process had before."""
        starts = plan.batch(g)
        if self.sampling != "sequential" or g < self.world.size:
            return np.zeros(len(starts), dtype=bool)
        before = plan.batch(g - self.world.size)[: len(starts)]
        same_file = layout.position_of(before) == layout.position_of(starts)
        return same_file & (before + self.dataset.size_window == starts)

    def locate(self, window):
        """(path, sample offset in that file) of a window of the current epoch."""
        p = bisect_right(self._first_windows, int(window)) - 1
        plan, layout = self._plans[p]
        start = plan.starts[int(window) - self._first_windows[p]]
        i = layout.position_of(start)
        path = self.dataset.sequences[layout.files[i]].path
        return path, int(start - layout.boundaries[i])


def build_loaders(args, sets, world):
    """The BatchLoaders of the training and the validation set."""
    training, validation = sets
    common = {"batch_size": args.batchSizeGPU, "seed": args.random_seed, "world": world}
    return (
        BatchLoader(training, sampling=args.samplingType, training=True, **common),
        BatchLoader(validation, sampling="sequential", training=False, **common),
    )
