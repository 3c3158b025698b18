"""What happens between epochs: hooks, and the promise that they leave training as it was.

A hook has `due(epoch) -> bool` and `run(epoch, model, criterion) -> dict` of values to log. What a
hook works with is handed to it, so that it needs to know neither stats nor probes.
"""

from pathlib import Path

import torch

from utils.capture import CaptureWriter
from utils.misc import counted, generator_from
from utils.run.console import progress

PREDICTED = frozenset(("pred", "cpcctc_align", "cpcctc_log_scores"))  # captured in the criterion


class CaptureHook:
    """Computes what is to be captured, batch by batch: files and statistics of it.

    loader: BatchLoader of the capture set; what: names to write (utils/capture.py lists them);
    collector: StatsCollector; directory: captures go to `<directory>/<epoch>/`; every: epochs
    between captures; flags: a dict of the run's flags, and checkpoint: the file that the model
    comes from if it comes from one, both for the index. Of several processes each captures the
    batches that its loader gives it.
    """

    def __init__(
        self, loader, what, collector, directory, *, every, seed, flags, device, checkpoint=None
    ):
        self.loader, self.what, self.collector = loader, tuple(what), collector
        self.directory, self.every = directory, every
        self.seed, self.flags, self.device = seed, flags, device
        self.checkpoint, self.world = checkpoint, loader.world

    name = "the capture"

    def due(self, epoch):
        return epoch % self.every == 0

    def run(self, epoch, model, criterion):
        """Capture once; returns the values of the stats."""
        model.eval()
        criterion.eval()
        self.collector.zeroStats()
        self.world.copy_buffers(torch.nn.ModuleList([model, criterion]))
        self.loader.prepare()
        writer = self.world.from_first(lambda: self.writer(epoch))
        self.world.together(lambda: self.capture(epoch, model, criterion, writer))
        if writer:
            parts = self.world.gather(writer.windows)
            writer.windows = [window for part in parts for window in part]
        for values in self.world.gather(self.collector.values)[1:]:
            self.collector.merge(values)
        return self.world.from_first(lambda: self.finish(epoch, writer))

    def writer(self, epoch):
        """Ready to write this epoch's files; None where only stats are computed."""
        if not self.what:
            return None
        directory = Path(self.directory, str(epoch))
        return CaptureWriter(
            directory, self.what, epoch=epoch, checkpoint=self.checkpoint, flags=self.flags
        )

    def capture(self, epoch, model, criterion, writer):
        """Write this process's batches, and feed them to the stats."""
        batches, total = self.loader.epoch(epoch), len(self.loader)
        what = f"epoch {epoch}: capture"
        for position, batch in progress(batches, what=what, unit=" batches", total=total):
            generator = generator_from(self.seed, epoch, "capture", *position[1:])
            tensors = self.compute(batch.to(self.device), model, criterion, generator)
            windows = batch.window.tolist()
            if writer:
                locations = [self.loader.locate(window) for window in windows]
                writer.write(windows[0], tensors, locations)
            self.collector.batchUpdate(tensors)

    def finish(self, epoch, writer):
        """Write the index, draw the stats; returns their values."""
        if writer:
            writer.close()
            removed = counted(writer.removed, "file")
            replaced = f", in place of {removed} of an earlier capture" * bool(writer.removed)
            print(f"epoch {epoch}: captured {', '.join(self.what)} in {writer.directory}{replaced}")
        values = self.collector.logStats(epoch)
        for name, value in values.items():
            print(f"    {name}: {value:.4g}")
        drawn = {str(s.directory) for s in self.collector.stats.values() if hasattr(s, "directory")}
        if drawn:
            print(f"    pictures of the statistics: {', '.join(sorted(drawn))}")
        return values

    @torch.no_grad()
    def compute(self, batch, model, criterion, generator):
        """Everything asked for, name -> tensor with a row for each window."""
        names = frozenset(self.what) | self.collector.needs
        # Every window starts from an empty state: what is captured of it can't depend on how the
        # list of windows was cut into batches.
        context, encoded = model(batch.waveform, torch.zeros_like(batch.continues))
        tensors = {
            "conv_repr": encoded,
            "ctx_repr": context,
            "speaker_align": batch.speaker,
            "phone_align": batch.phone,
        }
        if names & PREDICTED:
            output = criterion(
                context, encoded, batch.speaker, capture=names & PREDICTED, generator=generator
            )
            tensors |= output.captured
        return {name: tensors[name] for name in names}


class ProbeHook:
    """Trains a probe on the model as it is: `probe(epoch, model)` does, and returns the values.

    Of several processes (`world`), one does it for all.
    """

    def __init__(self, name, probe, *, every, world):
        self.name, self.probe, self.every, self.world = name, probe, every, world

    def due(self, epoch):
        return epoch > 0 and epoch % self.every == 0

    def run(self, epoch, model, criterion):
        return self.world.from_first(lambda: self.probe(epoch, model))
