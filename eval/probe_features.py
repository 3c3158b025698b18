"""Features of the windows that a probe is trained and tested on: computed on the fly, or stored."""

import torch

from dataset import BatchLoader
from utils.misc import generator_from, seed_from
from utils.run.console import progress
from utils.run.machine import available_memory

MEMORY_FRACTION = 0.5  # of the free memory may be filled with features


class WindowFeatures:
    """The windows of a set as batches (features, label), recomputed in every pass.

    Features are (B, S, D); for speakers (B, 1, D), since only the last frame is needed. Labels are
    (B, S) phones or (B,) speakers. In training the order is random, and gradients flow into the
    model if the probe trains it as well.
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

    def batches(self, epoch):
        self.probe.model.train(self.trains_model)
        for _, batch in self.loader.epoch(epoch):
            with torch.set_grad_enabled(self.trains_model):
                features, label = self._features(batch.to(self.probe.device))
            yield features, label

    def _features(self, batch):
        probe = self.probe
        context, encoded = probe.model(batch.waveform, batch.continues)
        features = encoded if probe.options.get_encoded else context
        if probe.task == "speaker":
            features = features[:, -1:]
        if probe.transform:
            features = probe.transform(features)
        return features, batch.speaker if probe.task == "speaker" else batch.phone


class StoredWindowFeatures:
    """The features of `source`, computed once and kept on the device `storage`.

    In training, `order_seed` (a tuple) and the epoch determine the random order of each epoch.
    """

    def __init__(self, source, storage, batch_size, order_seed=None):
        self.features, self.labels = collect(source, storage)
        self.device, self.batch_size, self.order_seed = source.probe.device, batch_size, order_seed

    def batches(self, epoch):
        order = torch.arange(len(self.features))
        if self.order_seed:
            generator = generator_from(*self.order_seed, epoch)
            order = torch.randperm(len(order), generator=generator)
        for chosen in order.to(self.features.device).split(self.batch_size):
            yield self.features[chosen].to(self.device), self.labels[chosen].to(self.device)


def collect(source, storage):
    """The features and labels of one pass through `source`: two tensors on `storage`."""
    stored, filled, n_windows = None, 0, source.n_windows
    with progress(what=f"{source.probe.name}: features", unit=" windows", total=n_windows) as bar:
        for batch in source.batches(0):
            n_rows = len(batch[0])
            if stored is None:  # allocated at once: growing would need twice the memory
                stored = [x.new_empty((n_windows, *x.shape[1:]), device=storage) for x in batch]
            for whole, part in zip(stored, batch, strict=True):
                whole[filled : filled + n_rows] = part
            filled += n_rows
            bar.update(n_rows)
    return [whole[:filled] for whole in stored]


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
