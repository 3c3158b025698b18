"""Whole utterances with their phone sequences, for phone recognition.

Utterances aren't cut into windows: those of a batch are padded to the longest.
"""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from dataset import AudioDataset
from eval.probe_features import storage_for
from feature_loader import load_waveform, longest_input
from utils.data.corpus import labels_by_path
from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME, UserError, first_few
from utils.run.console import progress
from utils.run.machine import processors_each


class LabelledUtterance(NamedTuple):
    """An audio file and the phones spoken in it."""

    path: str  # relative to the root of the database
    samples: int  # according to its header
    phones: torch.Tensor  # (n,) int64


class UtteranceBatch(NamedTuple):
    """Utterances padded with zeros; `values` are waveforms (B, 1, L) or features (B, S, D)."""

    values: torch.Tensor
    n_frames: torch.Tensor  # (B,) int64
    phones: torch.Tensor  # (B, longest) int64
    n_phones: torch.Tensor  # (B,) int64
    utterances: list

    def to(self, device):
        return UtteranceBatch(*(tensor.to(device) for tensor in self[:4]), self.utterances)


def collate(utterances, values, n_frames):
    """A batch of utterances; `values` has a tensor (L,) or (T, D) for each."""
    return UtteranceBatch(
        pad_sequence(values, batch_first=True),
        torch.tensor(n_frames),
        pad_sequence([u.phones for u in utterances], batch_first=True),
        torch.tensor([len(u.phones) for u in utterances]),
        utterances,
    )


def cut_into_batches(lengths, batch_size, generator=None):
    """Batches, as index tensors, of items of similar length, so that there is little padding.

    lengths: (n,). With a generator the batches are random and differ from call to call.
    """
    lengths = lengths.double()
    if generator is None:
        return list(lengths.argsort(descending=True).split(batch_size))
    jitter = 1 + 0.2 * torch.rand(len(lengths), generator=generator, dtype=torch.double)
    batches = (lengths * jitter).argsort().split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


# ----------------------------------------------------------------------------------------- audio


class UtteranceSet:
    """The utterances of a corpus that have phones, can be decoded, and aren't too short.

    labels: `PhoneLabels` with the phone sequence of each utterance; shortest: in samples. Unusable
    files are listed and left out. Raises UserError if they are too many, or all.
    """

    def __init__(self, corpus, candidates, labels, shortest, *, n_threads, max_bad_files, title):
        self.root, self.title = corpus.root, title
        self.shortest, self.n_threads = shortest, n_threads
        phones = labels_by_path(labels, candidates, corpus)
        labelled = [c for c in candidates if c.path in phones]
        if not labelled:
            names = first_few(c.name for c in candidates)
            raise UserError(f"{labels.path}: has phones for none of the {title}, e.g. {names}")
        # Used only to check headers and to count bad files.
        self.files = AudioDataset(
            corpus, labelled, SAMPLES_PER_FRAME, max_bad_files=max_bad_files, title=title
        )
        usable = self.files.utterances
        self.utterances = [
            LabelledUtterance(u.path, u.samples, torch.from_numpy(phones[u.path]).long())
            for u in usable
            if u.samples >= shortest
        ]
        self.left_out = {
            "have no phones": len(candidates) - len(labelled),
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
        """Frames of each utterance, (n,), according to the headers."""
        return torch.tensor([u.samples for u in self.utterances]) // SAMPLES_PER_FRAME

    def batches(self, batch_size, generator=None):
        """Batches of waveforms, longest first, or with a generator in random order."""
        cuts = cut_into_batches(self.n_frames(), batch_size, generator)
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
        """Yield each batch with its waveforms (L,), while those of the next one are decoded."""
        ahead = deque()
        with ThreadPoolExecutor(min(self.n_threads, processors_each())) as pool:
            for batch in batches:
                ahead.append((batch, [pool.submit(self._waveform, u) for u in batch]))
                if len(ahead) == 2:
                    utterances, decoding = ahead.popleft()
                    yield utterances, [future.result() for future in decoding]
            for utterances, decoding in ahead:
                yield utterances, [future.result() for future in decoding]

    def _waveform(self, utterance):
        """Its samples (L,), or a text: the reason that it can't be used."""
        path = os.path.join(self.root, utterance.path)
        try:
            waveform = load_waveform(path)[0]
        except UserError as error:
            return str(error).removeprefix(f"{path}: ")
        return waveform if len(waveform) >= self.shortest else f"has only {len(waveform)} samples"


# -------------------------------------------------------------------------------------- features


def encode(model, waveform):
    """Contexts (B, S, D) of waveforms (B, 1, L); every row begins in the zero state.

    Waveforms too long for a transformer are cut into pieces of its maximum length.
    """
    n_rows, _, n_samples = waveform.shape
    size = longest_input(model)
    if n_samples > size:
        waveform = F.pad(waveform, (0, -n_samples % size)).view(-1, 1, size)
    fresh = torch.zeros(len(waveform), dtype=torch.bool, device=waveform.device)
    context, _ = model(waveform, fresh)
    return context.reshape(n_rows, -1, context.size(2))[:, : n_samples // SAMPLES_PER_FRAME]


class UtteranceFeatures:
    """A model's features of a set of utterances, recomputed in every pass."""

    def __init__(self, utterances, model, device):
        self.utterances, self.model, self.device = utterances, model, device

    def batches(self, batch_size, generator=None):
        for batch in self.utterances.batches(batch_size, generator):
            batch = batch.to(self.device)
            yield batch._replace(values=encode(self.model, batch.values))


class StoredUtteranceFeatures:
    """The features of `source`, computed once and kept on the device `storage`."""

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
        for cut in cut_into_batches(lengths, batch_size, generator):
            chosen = cut.tolist()
            batch = collate(
                [self.utterances[i] for i in chosen],
                [self.features[i] for i in chosen],
                lengths[cut].tolist(),
            )
            yield batch.to(self.device)


def features_of(utterances, model, device, batch_size, *, frozen):
    """The features of an `UtteranceSet`: stored if the model is frozen and they fit in memory."""
    computed = UtteranceFeatures(utterances, model, device)
    n_bytes = 4 * model.dim_context * int(utterances.n_frames().sum())
    storage = storage_for(n_bytes, device) if frozen else None
    return StoredUtteranceFeatures(computed, batch_size, storage) if storage else computed
