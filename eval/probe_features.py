"""Features of the windows that a probe is trained and tested on: computed on the fly, or stored."""

from typing import NamedTuple

import torch

from dataset import BatchLoader
from utils.misc import generator_from, seed_from
from utils.normalisation import GroupStatistics
from utils.run.console import progress
from utils.run.machine import available_memory

MEMORY_FRACTION = 0.5  # of the free memory may be filled with features


class ProbeBatch(NamedTuple):
    """Features (B, S, D), for speakers (B, 1, D); label (B, S) phones or (B,) speakers; speaker
    (B,), in which each window begins."""

    features: torch.Tensor
    label: torch.Tensor
    speaker: torch.Tensor


class WindowFeatures:
    """The windows of a set as ProbeBatches, recomputed in every pass.

    A speaker probe needs only the last frame of each. In training the order is random, and
    gradients flow into the model if the probe trains it as well.
    """

    def __init__(self, probe, dataset, *, training):
        self.probe, self.n_windows = probe, dataset.n_windows
        self.trains_model = training and probe.options.unfrozen
        sampling = "uniform" if training else "sequential"
        self.loader = BatchLoader(
            dataset,
            probe.options.batch_size,
            sampling,
            seed=seed_from(*probe.seed("windows")),
            training=training,
        )
        is_normalised = probe.options.feature_norm != "none"
        self.statistics = self._collect_statistics() if is_normalised else None

    def batches(self, epoch):
        probe = self.probe
        for batch, features in self._computed(epoch):
            if self.statistics:
                features = self.statistics.normalise(features, self._groups(batch))
            if probe.task == "speaker":
                features = features[:, -1:]
            if probe.transform:
                features = probe.transform(features)
            label = batch.speaker if probe.task == "speaker" else batch.phone
            yield ProbeBatch(features, label, batch.speaker)

    def _computed(self, epoch):
        """Yield batches on the device and all their features, (B, S, D)."""
        probe = self.probe
        probe.model.train(self.trains_model)
        for _, batch in self.loader.epoch(epoch):
            batch = batch.to(probe.device)
            with torch.set_grad_enabled(self.trains_model):
                context, encoded = probe.model(batch.waveform, batch.continues)
            yield batch, encoded if probe.options.get_encoded else context

    def _groups(self, batch):
        """The utterance or speaker of each frame, (B, S), by which features are normalised."""
        utterances = self.loader.utterance_of_frames(batch.window)
        if self.probe.options.feature_norm == "speaker":
            utterances = torch.from_numpy(self.loader.dataset.speakers)[utterances]
        return utterances.to(self.probe.device)

    def _collect_statistics(self):
        """GroupStatistics over all frames of a pass."""
        dataset, probe = self.loader.dataset, self.probe
        n_groups = max(len(dataset.utterances), len(dataset.speaker_names))
        statistics = GroupStatistics(n_groups, probe.n_features, probe.device)
        for batch, features in self._computed(0):
            statistics.add(features, self._groups(batch))
        return statistics


class StoredWindowFeatures:
    """The features of `source`, computed once and kept on the device `storage`.

    In training, `order_seed` (a tuple) and the epoch determine the random order of each epoch.
    """

    def __init__(self, source, storage, batch_size, order_seed=None):
        self.stored = collect(source, storage)
        self.device, self.batch_size, self.order_seed = source.probe.device, batch_size, order_seed

    def batches(self, epoch):
        features = self.stored.features
        order = torch.arange(len(features))
        if self.order_seed:
            generator = generator_from(*self.order_seed, epoch)
            order = torch.randperm(len(order), generator=generator)
        for chosen in order.to(features.device).split(self.batch_size):
            yield ProbeBatch(*(part[chosen].to(self.device) for part in self.stored))


def collect(source, storage):
    """One pass through `source` as a single ProbeBatch on `storage`."""
    stored, filled, n_windows = None, 0, source.n_windows
    with progress(what=f"{source.probe.name}: features", unit=" windows", total=n_windows) as bar:
        for batch in source.batches(0):
            n_rows = len(batch.label)
            if stored is None:  # allocated at once: growing would need twice the memory
                stored = [x.new_empty((n_windows, *x.shape[1:]), device=storage) for x in batch]
            for whole, part in zip(stored, batch, strict=True):
                whole[filled : filled + n_rows] = part
            filled += n_rows
            bar.update(n_rows)
    return ProbeBatch(*(whole[:filled] for whole in stored))


def storage_for(n_bytes, device, limit=None):
    """Where `n_bytes` of features can be kept: the device, the host, or nowhere (None).

    limit: bytes allowed, whatever is free
    """
    if limit is not None:
        return device if n_bytes <= limit else None
    for place in dict.fromkeys([device, torch.device("cpu")]):
        if n_bytes <= MEMORY_FRACTION * available_memory(place):
            return place
    return None
