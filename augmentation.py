"""Augmented copies of training windows, of which contexts, targets or both are computed.

Kharitonov et al., "Data augmenting contrastive learning of speech representations in the time
domain" (SLT 2021): contexts of an augmented copy predict frames of the clean one. Parameters are
drawn on the CPU, by generators that depend on the position in the data alone; the effects
(utils/data/effects.py) then run on the device. Only runs with --augment_type import this.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dataset import AudioDataset
from utils.data import effects
from utils.data.corpus import listed_utterances, scan_corpus
from utils.data.windows import split_into_packs
from utils.misc import SAMPLE_RATE, generator_from
from utils.run.distributed import ALONE
from utils.run.flags import AUGMENT_TYPES

VOICES = 4  # windows that make babble
STEEPEST = 2.0  # slope of the power spectrum of coloured noise: from white (0) to brown
MELS = 2840.0  # the mel scale at half the sample rate
WIDEST_BAND = MELS * 27 / 256  # mel


class Recipe(NamedTuple):
    """How to augment the first `n_rows` rows of a batch.

    Steps are pairs of an effect and its tensors: numbers of rows, then a parameter for each of
    these. A copy without steps stays clean.
    """

    n_rows: int
    past: list | None  # steps to the copy of which contexts are computed; None: the other one
    future: list  # steps to the copy that targets and negatives come from

    def each(self, function):
        """A Recipe with `function` applied to each tensor."""

        def applied(steps):
            return steps and [(effect, [*map(function, tensors)]) for effect, tensors in steps]

        return Recipe(self.n_rows, applied(self.past), applied(self.future))

    def augmented(self, batch):
        """The Batch with a `past`, if it is another copy, and its `waveform` augmented."""
        clean, rest = batch.waveform[: self.n_rows], batch.waveform[self.n_rows :]
        past = None if self.past is None else _copy(clean, self.past)
        return batch._replace(waveform=torch.cat([_copy(clean, self.future), rest]), past=past)


def _copy(clean, steps):
    waveform = clean.squeeze(1)
    for effect, (rows, *parameters) in steps:
        waveform = waveform.index_copy(0, rows, effect(waveform[rows], *parameters))
    return waveform.unsqueeze(1)


class Augmentation:
    """Draws a Recipe for each batch of a training set, as the augmentation flags in `args` say.

    speakers: (files,) speaker ids of the training set, in ascending order. Raises UserError if
    there are no recordings where there should be.
    """

    def __init__(self, args, speakers, world=ALONE):
        self.args, self.speakers = args, speakers
        self.noise = open_recordings(args, args.pathDBNoise, "noise", world, args.pathSeqNoise)
        directory = args.pathImpulseResponses
        self.responses = open_recordings(args, directory, "impulse responses", world)
        self.recordings = [used for used in (self.noise, self.responses) if used]
        self.effects = {  # name -> what draws its parameters, and the effect
            "pitch": (self.cents, partial(effects.shift_pitch, max_cents=args.shift_max)),
            "additive": (self.noise_and_ratio, effects.add_noise),
            "reverb": (self.room, effects.reverberate),
            "natural_reverb": (self.response, effects.reverberate),
            "bandreject": (self.band, effects.reject_band),
            "time_dropout": (self.gap, effects.drop_out),
        }
        if any("additive" in AUGMENT_TYPES[kind] for kind in args.augment_type) and not self.noise:
            several = len(np.unique(speakers)) > 1
            print(f"noise: {'babble of other speakers' if several else 'coloured'}")

    def prepare(self, world=ALONE):
        """Decode all recordings, with all processes, if that isn't done."""
        for recordings in self.recordings:
            recordings.only_pack(world)

    def draw(self, position, speakers, pack):
        """The Recipe of the batch at `position`, from `pack`; speakers: (B,) ids of its rows."""
        args, n_rows = self.args, max(1, round(self.args.augment_prob * len(speakers)))

        def steps(side):
            generator = generator_from(args.random_seed, "augmentation", side, *position)
            is_augmented = getattr(args, f"augment_{side}")
            return self._steps(speakers[:n_rows], pack, generator) if is_augmented else []

        if args.past_equal_future or args.supervised:  # a classifier has no targets to keep clean
            return Recipe(n_rows, None, steps("past"))
        return Recipe(n_rows, steps("past"), steps("future"))

    def _steps(self, speakers, pack, generator):
        types, steps = self.args.augment_type, []
        chosen = torch.randint(len(types), (len(speakers),), generator=generator)
        for number, kind in enumerate(types):
            rows = torch.arange(len(speakers))
            if self.args.augment_combine == "choice":
                rows = rows[chosen == number]
            for name in AUGMENT_TYPES[kind] if len(rows) else ():
                draw, effect = self.effects[name]
                steps.append(
                    (effect, [rows, *draw(Draws(speakers[rows.numpy()], pack, generator))])
                )
        return steps

    # ------------------------------------------------- parameters of n rows, from these `Draws`

    def cents(self, draws):
        return [draws.whole(-self.args.shift_max, self.args.shift_max)]

    def room(self, draws):
        rooms = draws.whole(0, self.args.room_scale_max).tolist()
        return [torch.stack([effects.room_response(room, self.args.sizeWindow) for room in rooms])]

    def response(self, draws):
        pack, length = self.responses.only_pack(), self.args.sizeWindow
        ends, responses = pack.layout.boundaries, []
        for number in draws.whole(0, len(ends) - 2).tolist():
            response = pack.audio[ends[number] : ends[number + 1]].float()
            response = effects.from_direct_path(response)[:length]
            responses.append(F.pad(response, (0, length - len(response))))
        return [torch.stack(responses)]

    def band(self, draws):
        width = draws.between(0, min(WIDEST_BAND * self.args.bandreject_scaler, MELS))
        low = draws.between(0, MELS - width)
        return [700 * (10 ** (mel / 2595) - 1) for mel in (low, low + width)]

    def gap(self, draws):
        length = draws.whole(0, SAMPLE_RATE * self.args.t_ms // 1000)
        return [draws.between(0, self.args.sizeWindow - length + 1).long(), length]

    def noise_and_ratio(self, draws):
        args, length = self.args, self.args.sizeWindow
        ratio = draws.between(args.min_snr_in_db, args.max_snr_in_db)
        edges = map(float, args.noise_band.split("-")) if args.noise_band else ()
        if self.noise:
            noise = draws.windows_of(self.noise.only_pack().audio, length)
        else:
            noise = draws.babble(self.speakers, length)
        if noise is None:
            white = torch.randn(len(ratio), length, generator=draws.generator)
            noise = effects.coloured(white, draws.between(0, STEEPEST))
        return [noise, ratio, *(torch.full_like(ratio, edge) for edge in edges)]


class Draws(NamedTuple):
    """Random numbers and windows for some rows of a batch."""

    speakers: np.ndarray  # (n,)
    pack: object  # the Pack that the batch is from
    generator: torch.Generator

    def whole(self, lowest, highest):
        """(n,) whole numbers, `highest` included."""
        n = len(self.speakers)
        return torch.randint(lowest, highest + 1, (n,), generator=self.generator)

    def between(self, lowest, highest):
        """(n,) numbers."""
        drawn = torch.rand(len(self.speakers), generator=self.generator)
        return lowest + (highest - lowest) * drawn

    def windows_of(self, audio, length):
        """(n, length) from anywhere in `audio`, which is repeated if it is too short."""
        if len(audio) < length:
            audio = audio.repeat(-(-length // len(audio)))
        return _windows(audio, self.whole(0, len(audio) - length), length)

    def babble(self, speakers, length):
        """(n, length), sums of windows of other speakers than each row's; None if one has none.

        speakers: those of all files; a pack is sorted by speaker, so others are before and after.
        """
        ends, speakers = self.pack.layout.boundaries, speakers[self.pack.layout.files]
        begin, end = (ends[np.searchsorted(speakers, self.speakers, s)] for s in ("left", "right"))
        before = np.maximum(0, begin - length + 1)  # how many windows begin and end there
        after = np.maximum(0, ends[-1] - length - end + 1)
        if not (before + after).all():
            return None
        shape = VOICES, len(before)
        drawn = torch.rand(shape, generator=self.generator, dtype=torch.float64).numpy()
        starts = (drawn * (before + after)).astype(np.int64)
        starts = torch.from_numpy(np.where(starts < before, starts, starts - before + end))
        return _windows(self.pack.audio, starts.flatten(), length).view(*shape, length).sum(0)


def _windows(audio, starts, length):
    windows = audio.unfold(0, length, 1).index_select(0, starts)
    return windows.float() / (32768 if windows.dtype == torch.int16 else 1)


def open_recordings(args, root, title, world, names=None):
    """The AudioDataset of a directory, or of a random part if --max_size_loaded is less."""
    if not root:
        return None
    options = {"ignore_cache": args.ignore_cache, "n_threads": args.n_process_loader}
    corpus = world.on_rank_zero(lambda: scan_corpus(root, args.noise_extension, 0, **options))
    utterances = listed_utterances(corpus, names)
    lengths = np.array([utterance.samples for utterance in utterances])
    generator = generator_from(args.random_seed, title)
    kept = split_into_packs(lengths, args.max_size_loaded, generator)[0]
    options = {"n_threads": args.n_process_loader, "max_bad_files": args.max_bad_files}
    utterances = [utterances[i] for i in kept]
    return AudioDataset(corpus, utterances, args.sizeWindow, title=title, **options)
