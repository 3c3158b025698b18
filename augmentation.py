"""Augmented copies of training windows, for contexts, targets or both.

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

from dataset import AudioDataset, Batch
from utils.data import effects
from utils.data.corpus import listed_utterances, scan_corpus
from utils.data.windows import split_into_packs
from utils.misc import SAMPLE_RATE, generator_from
from utils.run.command import DefaultExtension
from utils.run.distributed import ALONE
from utils.run.flags import AUGMENT_TYPES

VOICES = 4  # windows that make babble
STEEPEST = 2  # slope of the power spectrum of coloured noise: from white (0) to brown
MELS = 2840  # the mel scale at half the sample rate
WIDEST_BAND = MELS * 27 / 256


def augmented(batch, move, n_rows, past, future):
    """The Batch with its first `n_rows` rows augmented: contexts in `past`, targets in `waveform`.

    move: puts a tensor on the batch's device
    past, future: the effects on each copy, which stays clean without any: pairs of an effect and a
        list of tensors, the indices of rows followed by the effect's parameters. If `past` is
        None, contexts and targets come from one copy
    """

    def copy(steps):
        waveform = batch.waveform[:n_rows, 0]
        for effect, tensors in steps:
            rows, *parameters = map(move, tensors)
            waveform = waveform.index_copy(0, rows, effect(waveform[rows], *parameters))
        return waveform.unsqueeze(1)

    waveform = torch.cat([copy(future), batch.waveform[n_rows:]])
    return batch._replace(waveform=waveform, past=None if past is None else copy(past))


class Augmentation:
    """Draws the augmentation of each training batch, as the augmentation flags say.

    speakers: (files,) speaker ids of the training set, ascending; recordings: title -> AudioDataset
    of noise or impulse responses. Raises UserError if a directory has none.
    """

    def __init__(self, args, speakers, world=ALONE):
        self.args, self.speakers = args, speakers
        places = {"noise": args.pathDBNoise, "impulse responses": args.pathImpulseResponses}
        self.recordings = {
            title: open_recordings(args, root, title, world)
            for title, root in places.items()
            if root
        }
        self.effects = {  # name -> the function that draws its parameters, and the effect
            "pitch": (self.cents, partial(effects.shift_pitch, max_cents=args.shift_max)),
            "additive": (self.noise, effects.add_noise),
            "reverb": (self.room, effects.reverberate),
            "natural_reverb": (self.response, effects.reverberate),
            "bandreject": (self.band, effects.reject_band),
            "time_dropout": (self.gap, effects.drop_out),
        }
        if any("additive" in AUGMENT_TYPES[kind] for kind in args.augment_type):
            own = "babble of other speakers" if len({*speakers}) > 1 else "coloured"
            print(f"augmentation noise: {args.pathDBNoise or own}")

    def prepare(self, world=ALONE):
        """Decode all recordings, with all processes, unless that is done."""
        for recordings in self.recordings.values():
            recordings.only_pack(world)

    def draw(self, position, speakers, pack):
        """A function that augments the batch at `position`, from `pack`, once it is on its device.

        speakers: (B,) ids of its rows. Returns `augmented` with all but `batch` and `move` set.
        """
        args = self.args
        n_rows = max(1, round(args.augment_prob * len(speakers)))  # rows are in random order

        def steps(side):
            if not getattr(args, f"augment_{side}"):
                return []
            generator = generator_from(args.random_seed, "augmentation", side, *position)
            return self._steps(Draws(speakers[:n_rows], pack, generator))

        if args.past_equal_future or args.supervised:  # a classifier has no targets to keep clean
            past, future = None, steps("past")
        else:
            past, future = steps("past"), steps("future")
        return partial(augmented, n_rows=n_rows, past=past, future=future)

    def copy(self, waveform, types, *position):
        """A copy of a waveform (1, L), augmented by these types as for the batch at `position`."""
        self.args.augment_type, self.args.sizeWindow = types, waveform.size(1)
        augment = self.draw(position, np.zeros(1), None)
        batch = augment(Batch(waveform[None], *[None] * 4), lambda tensor: tensor)
        return (batch.waveform if batch.past is None else batch.past)[0]

    def _steps(self, draws):
        types, steps = self.args.augment_type, []
        chosen, rows = draws.integers(0, len(types) - 1), np.arange(len(draws.speakers))
        for number, kind in enumerate(types):
            own = rows[chosen.numpy() == number] if self.args.augment_combine == "choice" else rows
            for name in AUGMENT_TYPES[kind] if len(own) else ():
                draw, effect = self.effects[name]
                parameters = draw(draws._replace(speakers=draws.speakers[own]))
                steps.append((effect, [torch.from_numpy(own), *parameters]))
        return steps

    # -------------------------------------------------------------------- parameters of the effects

    def cents(self, draws):
        return [draws.integers(-self.args.shift_max, self.args.shift_max)]

    def room(self, draws):
        rooms, length = draws.integers(0, self.args.room_scale_max), self.args.sizeWindow
        return [torch.stack([effects.room_response(room, length) for room in rooms.tolist()])]

    def response(self, draws):
        pack, length = self.recordings["impulse responses"].only_pack(), self.args.sizeWindow
        ends, responses = pack.layout.boundaries, []
        for number in draws.integers(0, len(ends) - 2).tolist():
            recorded = pack.audio[ends[number] : ends[number + 1]].float()
            response = effects.from_direct_path(recorded)[:length]
            responses.append(F.pad(response, (0, length - len(response))))
        return [torch.stack(responses)]

    def band(self, draws):
        width = draws.uniform(0, min(WIDEST_BAND * self.args.bandreject_scaler, MELS))
        low = draws.uniform(0, MELS - width)
        return [700 * (10 ** (mel / 2595) - 1) for mel in (low, low + width)]

    def gap(self, draws):
        length = draws.integers(0, SAMPLE_RATE * self.args.t_ms // 1000)
        return [draws.uniform(0, self.args.sizeWindow - length + 1).long(), length]

    def noise(self, draws):
        """The noise, its signal-to-noise ratio and, with --noise_band, the edges of the band."""
        args, length, noise = self.args, self.args.sizeWindow, None
        ratio = draws.uniform(args.min_snr_in_db, args.max_snr_in_db)
        edges = args.noise_band.split("-") if args.noise_band else ()
        if args.pathDBNoise:
            noise = draws.recorded(self.recordings["noise"].only_pack().audio, length)
        elif draws.pack:
            noise = draws.babble(self.speakers, length)
        if noise is None:
            white = torch.randn(len(ratio), length, generator=draws.generator)
            noise = effects.coloured(white, draws.uniform(0, STEEPEST))
        return [noise, ratio, *(torch.full_like(ratio, float(edge)) for edge in edges)]


class Draws(NamedTuple):
    """Random numbers and windows for n rows of a batch."""

    speakers: np.ndarray  # (n,)
    pack: object  # the Pack that the batch is from
    generator: torch.Generator

    def integers(self, lowest, highest):
        """(n,) int64, `highest` included."""
        n = len(self.speakers)
        return torch.randint(lowest, highest + 1, (n,), generator=self.generator)

    def uniform(self, lowest, highest):
        """(n,) float32."""
        drawn = torch.rand(len(self.speakers), generator=self.generator)
        return lowest + (highest - lowest) * drawn

    def recorded(self, audio, length):
        """(n, length), random excerpts of `audio`, which is repeated if it is too short."""
        if len(audio) < length:
            audio = audio.repeat(-(-length // len(audio)))
        return _windows(audio, self.integers(0, len(audio) - length), length)

    def babble(self, speakers, length):
        """(n, length), sums of windows of speakers other than the row's; None if a row has none.

        speakers: of all files; packs are sorted by them, so others come before and after.
        """
        ends, speakers = self.pack.layout.boundaries, speakers[self.pack.layout.files]
        begin, end = (ends[np.searchsorted(speakers, self.speakers, s)] for s in ("left", "right"))
        before = np.maximum(0, begin - length + 1)  # the number of windows that fit there
        after = np.maximum(0, ends[-1] - length - end + 1)
        if not (before + after).all():
            return None
        shape, kind = (VOICES, len(before)), {"dtype": torch.float64, "generator": self.generator}
        starts = (torch.rand(shape, **kind).numpy() * (before + after)).astype(np.int64)
        starts = torch.from_numpy(np.where(starts < before, starts, starts - before + end))
        return _windows(self.pack.audio, starts.flatten(), length).view(*shape, length).sum(0)


def _windows(audio, starts, length):
    windows = audio.unfold(0, length, 1).index_select(0, starts)
    return windows.float() / (32768 if windows.dtype == torch.int16 else 1)


def open_recordings(args, root, title, world):
    """The AudioDataset of a directory, or of a random part if it exceeds --max_size_loaded."""
    extension, refresh = args.noise_extension or DefaultExtension(".wav"), args.ignore_cache
    corpus = world.on_rank_zero(lambda: scan_corpus(root, extension, 0, refresh))
    files = listed_utterances(corpus, args.pathSeqNoise if title == "noise" else None)
    lengths = np.array([file.samples for file in files])
    generator = generator_from(args.random_seed, title)
    kept = split_into_packs(lengths, args.max_size_loaded, generator)[0]
    options = {"n_threads": args.n_process_loader, "max_bad_files": args.max_bad_files}
    files = [files[i] for i in kept]
    return AudioDataset(corpus, files, args.sizeWindow, title=title, **options)
