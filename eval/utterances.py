"""Whole utterances and their phone sequences: what phones are recognised from and compared with.

Nothing is cut into windows here: the utterances of a batch are padded to the longest.
"""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from dataset import AudioDataset
from eval.probe import storage_for
from feature_loader import load_waveform, longest_input
from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME, UserError, first_few
from utils.run.console import progress


class Utterance(NamedTuple):
    """An audio file and the phones that are said in it."""

    path: str  # relative to the root of the database
    samples: int  # as its header says
    phones: torch.Tensor  # (n,) int64


class UtteranceBatch(NamedTuple):
    """Utterances, padded with zeros; `values` are waveforms (B, 1, L) or features (B, S, D)."""

    values: torch.Tensor
    n_frames: torch.Tensor  # (B,) int64
    phones: torch.Tensor  # (B, longest) int64
    n_phones: torch.Tensor  # (B,) int64
    utterances: list

    def to(self, device):
        return UtteranceBatch(*(tensor.to(device) for tensor in self[:4]), self.utterances)


def collate(utterances, values, n_frames):
    """A batch of utterances, of which each has `values` (L,) or (T, D)."""
    return UtteranceBatch(
        pad_sequence(values, batch_first=True),
        torch.tensor(n_frames),
        pad_sequence([u.phones for u in utterances], batch_first=True),
        torch.tensor([len(u.phones) for u in utterances]),
        utterances,
    )


def cut_in_batches(lengths, batch_size, generator=None):
    """Batches, as index tensors, of items that are about equally long: little is padded.

    lengths: (n,). With a generator they are random: every call gives others.
    """
    lengths = lengths.double()
    if generator is None:
        return list(lengths.argsort(descending=True).split(batch_size))
    jitter = 1 + 0.2 * torch.rand(len(lengths), generator=generator, dtype=torch.double)
    batches = (lengths * jitter).argsort().split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


# ----------------------------------------------------------------------------------------- audio


class UtteranceSet:
    """The sequences of a corpus that have phones, can be decoded, and aren't too short.

    labels: `PhoneLabels` that hold the phones of whole utterances; shortest: samples. Files that
    can't be used are named and left out. Raises UserError if they are too many or all.
    """

    def __init__(self, corpus, sequences, labels, shortest, *, n_threads, max_bad_files, title):
        self.root, self.title = corpus.root, title
        self.shortest, self.n_threads = shortest, n_threads
        labelled = [s for s in sequences if s.name in labels.labels]
        if not labelled:
            names = first_few(s.name for s in sequences)
            raise UserError(f"{labels.path}: has phones for none of the {title}, e.g. {names}")
        # What of it is used here: the checks of headers, and the count of bad files.
        self.files = AudioDataset(
            corpus, labelled, SAMPLES_PER_FRAME, max_bad_files=max_bad_files, title=title
        )
        usable = self.files.utterances
        self.utterances = [
            Utterance(s.path, s.samples, torch.from_numpy(labels.labels[s.name]).long())
            for s in usable
            if s.samples >= shortest
        ]
        self.left_out = {
            "have no phones": len(sequences) - len(labelled),
            f"are shorter than {shortest} samples": len(usable) - len(self.utterances),
        }
        if not self.utterances:
            raise UserError(f"{title}: {self.describe()}")

    def __len__(self):
        return len(self.utterances)

    def describe(self):
        """One line for people."""
        hours = sum(u.samples for u in self.utterances) / SAMPLE_RATE / 3600
        left_out = [f"{n} {why}" for why, n in self.left_out.items() if n]
        return "; ".join([f"{self.title}: {len(self)} utterances, {hours:.2f} h", *left_out])

    def n_frames(self):
        """Frames of each utterance, (n,), as far as headers can be trusted."""
        return torch.tensor([u.samples for u in self.utterances]) // SAMPLES_PER_FRAME

    def batches(self, batch_size, generator=None):
        """Batches of waveforms, the longest first, or with a generator in random order."""
        cuts = cut_in_batches(self.n_frames(), batch_size, generator)
        chosen = [[self.utterances[i] for i in cut.tolist()] for cut in cuts]
        for utterances, waveforms in self._decode(chosen):
            problems = {
                u.path: w for u, w in zip(utterances, waveforms, strict=True) if isinstance(w, str)
            }
            if problems:
                self._leave_out(problems)
                utterances = [u for u in utterances if u.path not in problems]
                waveforms = [w for w in waveforms if not isinstance(w, str)]
            if utterances:
                n_frames = [len(w) // SAMPLES_PER_FRAME for w in waveforms]
                batch = collate(utterances, waveforms, n_frames)
                yield batch._replace(values=batch.values[:, None])

    def _leave_out(self, problems):
        self.files.skip(problems)
        self.utterances = [u for u in self.utterances if u.path not in problems]

    def _decode(self, batches):
        """Each batch with its waveforms (L,), of which the next are decoded meanwhile."""
        ahead = deque()
        with ThreadPoolExecutor(self.n_threads) as pool:
            for batch in batches:
                ahead.append((batch, [pool.submit(self._waveform, u) for u in batch]))
                if len(ahead) == 2:
                    utterances, decoding = ahead.popleft()
                    yield utterances, [future.result() for future in decoding]
            for utterances, decoding in ahead:
                yield utterances, [future.result() for future in decoding]

    def _waveform(self, utterance):
        """Its samples (L,), or why it can't be used."""
        path = os.path.join(self.root, utterance.path)
        try:
            waveform = load_waveform(path)[0]
        except UserError as error:
            return str(error).removeprefix(f"{path}: ")
        return waveform if len(waveform) >= self.shortest else f"has only {len(waveform)} samples"


# -------------------------------------------------------------------------------------- features


def encode(model, waveform):
    """Contexts (B, S, D) of waveforms (B, 1, L); every row begins in the zero state.

    What is longer than a transformer can take is cut into stretches of that length.
    """
    n_rows, _, n_samples = waveform.shape
    size = longest_input(model)
    if n_samples > size:
        waveform = F.pad(waveform, (0, -n_samples % size)).view(-1, 1, size)
    fresh = torch.zeros(len(waveform), dtype=torch.bool, device=waveform.device)
    context, _ = model(waveform, fresh)
    return context.reshape(n_rows, -1, context.size(2))[:, : n_samples // SAMPLES_PER_FRAME]


class FreshFeatures:
    """A model's features of a set of utterances, computed anew in every pass."""

    def __init__(self, utterances, model, device):
        self.utterances, self.model, self.device = utterances, model, device

    def batches(self, batch_size, generator=None):
        for batch in self.utterances.batches(batch_size, generator):
            batch = batch.to(self.device)
            yield batch._replace(values=encode(self.model, batch.values))


class StoredFeatures:
    """Those of `source`, computed once and kept on the device `storage`."""

    def __init__(self, source, batch_size, storage):
        self.device, self.features, self.utterances = source.device, [], []
        title, n_utterances = source.utterances.title, len(source.utterances)
        with (
            torch.no_grad(),
            progress(what=f"{title}: features", unit=" utterances", total=n_utterances) as bar,
        ):
            for batch in source.batches(batch_size):
                rows = zip(batch.values, batch.n_frames.tolist(), strict=True)
                self.features += [row[:n].to(storage, copy=True) for row, n in rows]
                self.utterances += batch.utterances
                bar.update(len(batch.utterances))

    def batches(self, batch_size, generator=None):
        lengths = torch.tensor([len(features) for features in self.features])
        for cut in cut_in_batches(lengths, batch_size, generator):
            chosen = cut.tolist()
            batch = collate(
                [self.utterances[i] for i in chosen],
                [self.features[i] for i in chosen],
                lengths[cut].tolist(),
            )
            yield batch.to(self.device)


def features_of(utterances, model, device, batch_size, *, frozen):
    """The features of an `UtteranceSet`: stored where they won't change and memory allows."""
    fresh = FreshFeatures(utterances, model, device)
    n_bytes = 4 * model.dim_context * int(utterances.n_frames().sum())
    storage = storage_for(n_bytes, device) if frozen else None
    return StoredFeatures(fresh, batch_size, storage) if storage else fresh
