"""Training and validation sets of utterances, and batches of windows from them.

A corpus is listed and its utterances are chosen in utils/data/corpus.py; `AudioDataset` checks them
and holds their decoded audio, `BatchLoader` cuts it into windows. Lengths are in samples at 16 kHz;
B is the number of windows in a batch, L the samples in a window.
"""

import functools
import hashlib
from bisect import bisect_right

import numpy as np
import torch

from utils.data.audio import SILENT
from utils.data.batches import Batch
from utils.data.corpus import labels_by_path, sort_utterances
from utils.data.labels import compare_lengths
from utils.data.packs import PackDecoding, TwoBuffers
from utils.data.windows import Layout, count_batches, cumulative, plan_pack, split_into_packs
from utils.misc import (
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    Position,
    UserError,
    counted,
    first_few,
    generator_from,
)
from utils.run.distributed import ALONE

MAX_SIZE_LOADED = 4_000_000_000  # samples in a pack: 8 GB, 69 hours
FULL_BATCHES = 16  # about as many batches of a speaker stay together when files are shuffled
SAMPLINGS = ("samespeaker", "uniform", "samesequence", "sequential")


# ----------------------------------------------------------------------------------------- dataset


class AudioDataset:
    """Utterances of a corpus with their labels and, once decoded, their audio.

    utterances: the usable ones, sorted by speaker and name
    samples, speakers: (n,) int64 arrays, the usable length and the speaker id of each
    speaker_names: the name of each speaker id
    n_unlabelled: number of utterances left out because they have no phone labels
    """

    def __init__(
        self,
        corpus,
        utterances,
        size_window,
        *,
        phone_labels=None,
        labelled_only=False,
        keep_unlabelled=False,
        whole_frames=False,
        max_size_loaded=MAX_SIZE_LOADED,
        n_threads=8,
        max_bad_files=0.01,
        title="training set",
    ):
        """Prepare `utterances` of `corpus` to be cut into windows of `size_window` samples.

        phone_labels: PhoneLabels; utterances are cut to whole labelled frames. Those without labels
            are left out if `labelled_only`, get the label -1 everywhere if `keep_unlabelled`, and
            raise a ValueError otherwise
        whole_frames: cut utterances to whole frames, also without labels
        max_size_loaded: samples in memory at a time (twice that while the next pack is decoded)
        max_bad_files: fraction of files that may be unusable, see `allowed_bad_files`
        title: the name of this set in messages

        Raises UserError if no utterance is left, too many are bad, or a sample rate is wrong.
        """
        self.root, self.size_window, self.title = corpus.root, size_window, title
        self.max_size_loaded, self.n_threads = max_size_loaded, n_threads
        self.phone_labels, self.speaker_names = phone_labels, corpus.speakers
        self._problems, self._n_files, self._silent = {}, len(utterances), set()
        self._n_allowed = allowed_bad_files(self._n_files, max_bad_files)
        self._only_pack = None
        usable = self._usable(sort_utterances(utterances))
        if phone_labels:
            self._labels = labels_by_path(phone_labels, usable, corpus)
        labelled = self._labelled(usable) if phone_labels else usable
        self.n_unlabelled = len(usable) - len(labelled)
        if self.n_unlabelled and not (labelled_only or keep_unlabelled):
            raise ValueError("some utterances have no labels: labelled_only=True leaves them out")
        self.utterances = tuple(usable if keep_unlabelled else labelled)
        self._n_usable = len(usable)
        self.samples = self._lengths_in_use(whole_frames)
        self.speakers = np.array([u.speaker for u in self.utterances], dtype=np.int64)
        exact = all(u.fits_int16 for u in self.utterances)
        self.dtype = torch.int16 if exact else torch.float32

    def _usable(self, utterances):
        self.skip({u.path: u.problem for u in utterances if u.problem})
        usable = [u for u in utterances if not u.problem]
        wrong = [u for u in usable if u.rate != SAMPLE_RATE]
        if wrong:
            raise UserError(
                f"{self.title}: {len(wrong)} of {len(usable)} files aren't sampled at "
                f"{SAMPLE_RATE} Hz, the first is {first_few([wrong[0].path])} ({wrong[0].rate} "
                "Hz); utils/corpus/adjust_sample_rate.py converts them"
            )
        return usable

    def skip(self, problems):
        """Report bad files (path -> problem). Raises UserError if there are too many."""
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

    def warn_of_silence(self, paths):
        """Warn, once per file, of silent audio."""
        new = sorted(set(paths) - self._silent)
        self._silent.update(new)
        if new:
            print(
                f"warning: {self.title}: {len(new)} of {self._n_files} files are {SILENT}: "
                f"{first_few(new)}"
            )

    def _labelled(self, utterances):
        labelled = [u for u in utterances if u.path in self._labels]
        if not labelled:
            raise UserError(
                f"{self.phone_labels.path}: has labels for none of the {len(utterances)} "
                f"utterances of the {self.title}, such as {first_few([utterances[0].name])}; is it "
                "for another corpus?"
            )
        return labelled

    def _lengths_in_use(self, whole_frames):
        samples = np.array([u.samples for u in self.utterances], dtype=np.int64)
        n_frames = samples // SAMPLES_PER_FRAME
        if not self.phone_labels:
            return n_frames * SAMPLES_PER_FRAME if whole_frames else samples
        labels = self._labels
        n_labels = np.array([len(labels.get(u.path, ())) for u in self.utterances], dtype=np.int64)
        has = n_labels > 0
        paths = [self.utterances[i].path for i in np.flatnonzero(has)]
        compare_lengths(n_labels[has], samples[has], paths, self.phone_labels.path, self.title)
        return np.where(has, np.minimum(n_frames, n_labels), n_frames) * SAMPLES_PER_FRAME

    @property
    def n_windows(self):
        """Windows in the concatenated utterances; an epoch has at most this many."""
        return int(self.samples.sum()) // self.size_window

    @property
    def hours(self):
        return float(self.samples.sum()) / SAMPLE_RATE / 3600

    def describe(self):
        """A one-line summary for the user."""
        n_speakers, n_files = len(np.unique(self.speakers)), len(self.utterances)
        duration = f"{self.hours:.1f} h" if self.hours >= 1 else f"{60 * self.hours:.1f} min"
        text = (
            f"{self.title}: {counted(n_files, 'file')}, {duration}, "
            f"{counted(n_speakers, 'speaker')}, {counted(self.n_windows, 'window')} of "
            f"{self.size_window / SAMPLE_RATE:.2f} s"
        )
        if self.phone_labels:
            n_labelled = self._n_usable - self.n_unlabelled
            text += f", {n_labelled} of {self._n_usable} files have phone labels"
        return text

    def require_windows(self, n_windows=None):
        """Raise UserError if there are no windows; n_windows: how many are usable, if not all."""
        if not (self.n_windows if n_windows is None else n_windows):
            lists = (
                "; --pathVal FILE names its files (utils/corpus/make_split.py writes such lists)"
            )
            raise UserError(
                f"{self.title}: not a single window of {self.size_window} samples in "
                f"{counted(len(self.utterances), 'file')}; more audio or a smaller --sizeWindow is "
                f"needed{lists if self.title.startswith('validation') else ''}"
            )

    def fingerprint(self):
        """A short hash of the paths and lengths of the utterances."""
        digest = hashlib.blake2b(digest_size=8)
        for u in sorted(self.utterances, key=lambda u: u.path):
            digest.update(f"{u.path}\0{u.samples}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def labels_of(self, files):
        """(frames,) int16 labels of the utterances with these indices, -1 in unlabelled ones;
        None if the set has no labels."""
        if not self.phone_labels:
            return None
        labels, n_frames = self._labels, self.samples // SAMPLES_PER_FRAME
        unknown = np.full(max((n_frames[i] for i in files), default=0), -1, dtype=np.int16)
        parts = [labels.get(self.utterances[i].path, unknown)[: n_frames[i]] for i in files]
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int16), *parts]))

    def only_pack(self, world=ALONE):
        """The pack of all files, decoded once by all processes of `world`, then kept."""
        if self._only_pack is None:
            files = np.arange(len(self.utterances))
            self._only_pack = PackDecoding(self, files, world).finish()
        return self._only_pack


def allowed_bad_files(n_files, fraction):
    """How many of `n_files` may be unusable: at most `fraction`; 0 tolerates none.

    Small sets tolerate up to a quarter (1 to 3 files).
    """
    if fraction == 0:
        return 0
    return max(int(fraction * n_files), min(3, max(1, n_files // 4)))


def refuse_too_many(problems, n_files):
    """Raise UserError if more files are unusable (`problems`) than training tolerates."""
    if len(problems) > allowed_bad_files(n_files, 0.01):
        raise UserError(f"too many unusable files: {first_few(problems)}")


def set_options(args):
    """The parameters of AudioDataset that flags of train.py set."""
    return {
        "size_window": args.sizeWindow,
        "n_threads": args.n_process_loader,
        "max_bad_files": args.max_bad_files,
    }


def build_sets(corpus, split, size_window, *, labels=None, max_sizes=None, **options):
    """The AudioDatasets for training and validation; prints a summary of each.

    split: the utterances of each set (`split_corpus` in utils/data/corpus.py)
    labels: PhoneLabels; utterances without labels are left out
    max_sizes: `max_size_loaded` of each set (default: MAX_SIZE_LOADED)
    options: further parameters of AudioDataset
    """
    suffix, sets = " with phone labels" if labels else "", []
    options |= {"phone_labels": labels, "labelled_only": labels is not None}
    titles, max_sizes = ("training set", "validation set"), max_sizes or (MAX_SIZE_LOADED,) * 2
    for utterances, title, max_size in zip(split, titles, max_sizes, strict=True):
        options |= {"title": title + suffix, "max_size_loaded": max_size}
        sets.append(AudioDataset(corpus, utterances, size_window, **options))
        print(sets[-1].describe(), flush=True)
    return tuple(sets)


# ----------------------------------------------------------------------------------------- batches


class BatchLoader:
    """Batches of the windows of a dataset, epoch by epoch; decodes the next pack in the background.

    The order within an epoch depends only on the dataset, `batch_size`, `sampling`, `seed` and the
    epoch. Each process of `world` gets every `world.size`-th batch.

    sampling: the windows of a batch come from one speaker (`samespeaker`), from one file
        (`samesequence`) or from anywhere (`uniform`); or each row continues where the same row of
        the last batch ended (`sequential`; with several processes, rows still run through the files
        in order, but `continues` is always False)
    training: shuffle files and windows, which start at random offsets. Incomplete `uniform` batches
        are dropped, unless a pack has no other, and up to `world.size` - 1 batches per epoch, so
        that all processes get the same number. If False: all windows in order (`sequential` and
        `uniform` are then the same), the last batch possibly incomplete
    augmentation: augments each batch (an augmentation.Augmentation)

    In training, processes wait for each other at each new pack, otherwise only in `prepare`.
    """

    def __init__(
        self, dataset, batch_size, sampling, *, seed, training, world=ALONE, augmentation=None
    ):
        """Raises UserError if the dataset has no window, or too few batches for all processes."""
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling {sampling!r} is none of {SAMPLINGS}")
        self.dataset, self.batch_size, self.sampling = dataset, batch_size, sampling
        self.seed, self.training, self.world = seed, training, world
        self.augmentation = augmentation
        self._ahead = {}  # (epoch, pack) -> PackDecoding, at most one
        self._buffers = TwoBuffers() if training and world.group is not None else None
        self._n_batches = {}  # epoch -> batches in each pack, of the last epoch only
        self._split = {}  # epoch -> files of each pack, of two epochs at most
        self._begin(0)
        self._check_size()

    def _check_size(self):
        n_batches = self.n_batches(0)
        self.dataset.require_windows(n_batches)
        if self.training and n_batches < self.world.size:
            raise UserError(
                f"{self.dataset.title}: {n_batches} batches of {self.batch_size} windows are too "
                f"few for {self.world.size} processes; use fewer (--nGPU) or a smaller "
                "--batchSizeGPU"
            )

    def __len__(self):
        """Batches of this process in the current epoch, if no more files turn out to be bad."""
        n_batches = self.n_batches(self._epoch)
        if self.training:
            return n_batches // self.world.size
        return len(range(self.world.rank, n_batches, self.world.size))

    def n_batches(self, epoch, first=None):
        """Batches of all processes in an epoch, from position `first` on (None: the start).

        The number can drop if more files turn out to be bad.
        """
        if epoch not in self._n_batches:
            layouts = (Layout.of(files, self.dataset.samples) for files in self._packs_of(epoch))
            count = functools.partial(self._planner, count_batches, epoch)
            self._n_batches = {epoch: [count(p)(layout) for p, layout in enumerate(layouts)]}
        n_batches = self._n_batches[epoch]
        return max(0, sum(n_batches[first.pack :]) - first.batch) if first else sum(n_batches)

    def prepare(self):
        """Decode all audio now, with all processes, if it fits in one pack."""
        if len(self._packs) == 1:
            self.dataset.only_pack(self.world)
        if self.augmentation:
            self.augmentation.prepare(self.world)

    def _packs_of(self, epoch):
        if epoch not in self._split:
            generator = generator_from(self.seed, "packs", epoch) if self.training else None
            data, pieces = self.dataset, None
            if self.sampling == "samespeaker":  # a little of every speaker would fill few batches
                size = FULL_BATCHES * self.batch_size * data.size_window
                pieces = data.speakers, max(1, min(size, data.max_size_loaded // 100))
            packs = split_into_packs(data.samples, data.max_size_loaded, generator, pieces)
            self._split = dict([*self._split.items()][-1:]) | {epoch: packs}
        return self._split[epoch]

    def _planner(self, function, epoch, p):
        """`plan_pack` or `count_batches` for a pack, as a function of its Layout.

        It holds no reference to this loader, which a thread would keep alive.
        """
        seed, training, speakers = self.seed, self.training, self.dataset.speakers
        sizes = self.sampling, self.dataset.size_window, self.batch_size

        def plan(layout):
            generator = generator_from(seed, "windows", epoch, p) if training else None
            return function(layout, speakers[layout.files], *sizes, generator)

        return plan

    def epoch(self, epoch, first=None):
        """Yield (Position, Batch) for this process, from position `first` on (None: the start).

        If `first.batch` is past the end of its pack, it counts into the next pack.
        """
        self._begin(epoch)
        self.prepare()  # on all ranks, even if nothing of the epoch is left
        first = first or Position(epoch, 0, 0)
        skip, n_seen, own = first.batch, 0, None
        try:
            for p in range(first.pack, len(self._packs)):
                pack = self._take(p)
                self._decode_ahead(p + 1)
                plan = pack.plan or self._planner(plan_pack, epoch, p)(pack.layout)
                self._planned = p, plan, pack.layout
                if len(pack.layout.files) < len(self._packs[p]):
                    self._layouts[p] = pack.layout
                for g in range(min(skip, plan.n_batches), plan.n_batches):
                    self._check_ahead()
                    if n_seen % self.world.size == self.world.rank:
                        own = Position(epoch, p, g), self._gather(pack, plan, p, g)
                    n_seen += 1
                    if n_seen % self.world.size == 0:  # all processes have a batch
                        yield own
                        own = None
                skip = max(0, skip - plan.n_batches)
                del pack  # free it before the next pack but one is allocated
            if own and not self.training:
                yield own
            if first == (epoch, 0, 0):
                self.dataset.require_windows(n_seen)
        except BaseException:  # including GeneratorExit, if the iteration is abandoned
            self.close()
            raise

    def close(self):
        """Stop decoding in the background; another epoch can be started afterwards."""
        for decoding in self._ahead.values():
            decoding.workers.stop()
        self._ahead = {}
        if self._buffers:
            self._buffers.drop()  # threads may still write to them

    def _begin(self, epoch):
        """Start an epoch: choose its packs, and number their windows by the lengths in headers."""
        self._epoch, self._packs = epoch, self._packs_of(epoch)
        self._planned = None, None, None  # the pack used last, its plan and its layout
        self._layouts = {}  # of packs in which files turned out to be bad
        sizes = np.array([self.dataset.samples[files].sum() for files in self._packs])
        self._first_windows = cumulative(sizes // self.dataset.size_window)

    def _take(self, p):
        if len(self._packs) == 1:
            return self.dataset.only_pack(self.world)
        decoding = self._ahead.pop((self._epoch, p), None)
        if decoding is None:
            self.close()
            decoding = self._decoding(self._epoch, p, self._packs[p])
        return decoding.finish()

    def _decoding(self, epoch, p, files):
        world, plan = self.world if self.training else ALONE, self._planner(plan_pack, epoch, p)
        return PackDecoding(self.dataset, files, world, plan, self._buffers)

    def _decode_ahead(self, p):
        """Start decoding pack `p`; in training, the next epoch's first pack follows the last."""
        if len(self._packs) == 1:
            return
        if p < len(self._packs):
            self._ahead = {(self._epoch, p): self._decoding(self._epoch, p, self._packs[p])}
        elif self.training:
            epoch = self._epoch + 1
            self._ahead = {(epoch, 0): self._decoding(epoch, 0, self._packs_of(epoch)[0])}

    def _check_ahead(self):
        for decoding in self._ahead.values():
            decoding.workers.check()

    def _gather(self, pack, plan, p, g):
        """Batch `g` of pack `p`, gathered in one operation on its audio."""
        layout = pack.layout
        starts = torch.from_numpy(plan.batch(g))
        size_window, phone = self.dataset.size_window, None
        waveform = pack.audio.unfold(0, size_window, 1).index_select(0, starts)
        if pack.labels is not None:
            frames = pack.labels.unfold(0, size_window // SAMPLES_PER_FRAME, 1)
            phone = frames.index_select(0, starts // SAMPLES_PER_FRAME).long()
        files = layout.files[layout.file_at(plan.batch(g))]
        window = torch.arange(plan.edges[g], plan.edges[g + 1]) + int(self._first_windows[p])
        speakers, continues = self.dataset.speakers[files], self._continues(plan, layout, g)
        tensors = torch.from_numpy(speakers), phone, window, torch.from_numpy(continues)
        position = Position(self._epoch, p, g)
        augmented = self.augmentation and self.augmentation.draw(position, speakers, pack)
        return Batch(waveform.unsqueeze(1), *tensors, augmented=augmented)

    def _continues(self, plan, layout, g):
        """Whether each row continues the same row of this process's last batch, (B,) bool."""
        starts = plan.batch(g)
        if self.sampling != "sequential" or g < self.world.size:
            return np.zeros(len(starts), dtype=bool)
        before = plan.batch(g - self.world.size)[: len(starts)]
        same_file = layout.file_at(before) == layout.file_at(starts)
        return same_file & (before + self.dataset.size_window == starts)

    def _plan_at(self, window):
        """The first window, the plan and the layout of the pack that a window belongs to."""
        p = bisect_right(self._first_windows, int(window)) - 1
        if p != self._planned[0]:  # plans aren't kept: those of 60,000 hours take 1.4 GB
            layout = self._layouts.get(p) or Layout.of(self._packs[p], self.dataset.samples)
            self._planned = p, self._planner(plan_pack, self._epoch, p)(layout), layout
        return self._first_windows[p], *self._planned[1:]

    def locate(self, window):
        """The (path, start in that file in samples) of a window of the current epoch."""
        first, plan, layout = self._plan_at(window)
        start = plan.starts[int(window) - first]
        i = layout.file_at(start)
        path = self.dataset.utterances[layout.files[i]].path
        return path, int(start - layout.boundaries[i])

    def utterance_of_frames(self, windows):
        """Indices in `dataset.utterances` for each frame of the windows (B,) of a batch, (B, S)."""
        first, plan, layout = self._plan_at(windows[0])
        frames = np.arange(0, self.dataset.size_window, SAMPLES_PER_FRAME)
        starts = plan.starts[windows.cpu().numpy() - first, None] + frames
        return torch.from_numpy(layout.files[layout.file_at(starts)])


def build_loaders(args, sets, world, augmentation=None):
    """The BatchLoaders of the training set, with an Augmentation, and of the validation set."""
    training, validation = sets
    own = {"sampling": args.samplingType, "training": True, "augmentation": augmentation}
    common = {"batch_size": args.batchSizeGPU, "seed": args.random_seed, "world": world}
    return (
        BatchLoader(training, **own, **common),
        BatchLoader(validation, sampling="sequential", training=False, **common),
    )
