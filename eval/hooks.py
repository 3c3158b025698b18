"""Hooks run between epochs of training, or once on a checkpoint: captures, probes, units."""

from pathlib import Path

import torch

from dataset import AudioDataset, BatchLoader, set_options
from eval.probe import run_probe
from eval.probe_options import ProbeOptions
from segments import at_level
from utils.capture import CaptureWriter, refuse_to_lose
from utils.data.corpus import keep_percentage, keep_total, labels_by_path, listed_utterances
from utils.misc import UserError, counted, generator_from
from utils.run.captured import captured_names
from utils.run.command import numbers_in
from utils.run.console import progress
from utils.run.resolve import works_on_checkpoint

OF_SEGMENTS = frozenset(("seg_boundaries", "seg_conv", "seg_ctx"))  # captured from the upper level
PREDICTED = frozenset(("pred", "cpcctc_align", "cpcctc_log_scores"))  # captured in the criterion


class Hook:
    """Work done between epochs, at every multiple of `every`; `name` is for messages."""

    first = 0  # the first epoch in which it may be due
    flag = ""  # the flag that sets `every`

    def __init__(self, name, every):
        self.name, self.every = name, every

    def due(self, epoch):
        """Whether it runs after this epoch (counted from 0)."""
        return epoch >= self.first and epoch % self.every == 0

    def run(self, epoch, model, criterion):
        """Do the work, on all ranks; returns a dict of values to log.

        It may change modes, hidden states and `requires_grad` of the networks: if training
        continues afterwards, `preserved_state` restores them. Raises UserError.
        """
        raise NotImplementedError


class CaptureHook(Hook):
    """Computes the tensors to capture, batch by batch; writes them and collects statistics.

    loader: BatchLoader of the capture set; what: names to write (utils/capture.py lists them);
    collector: StatsCollector; directory: captures go to `<directory>/<epoch>/`; every: epochs
    between captures, the first at epoch 0; flags: a dict of the run's flags, and checkpoint: the
    file that the model comes from if it comes from one, both for the index. Each rank captures the
    batches that its loader gives it.
    """

    flag = "captureEachEpochs"

    def __init__(
        self, loader, what, collector, directory, *, every, seed, flags, device, checkpoint=None
    ):
        self.loader, self.what, self.collector = loader, tuple(what), collector
        super().__init__("the capture", every)
        self.directory = directory
        self.seed, self.flags, self.device = seed, flags, device
        self.checkpoint, self.world = checkpoint, loader.world

    def run(self, epoch, model, criterion):
        """Capture once; returns the values of the stats."""
        model.eval()
        criterion.eval()
        self.collector.zeroStats()
        self.world.copy_buffers(torch.nn.ModuleList([model, criterion]))
        self.loader.prepare()
        writer = self.world.on_rank_zero(lambda: self.open_writer(epoch))
        with self.world.shared_errors():
            self.capture(epoch, model, criterion, writer)
        if writer:
            parts = self.world.all_gather(writer.windows)
            writer.windows = [window for part in parts for window in part]
        for values in self.world.all_gather(self.collector.values)[1:]:
            self.collector.merge(values)
        return self.world.on_rank_zero(lambda: self.finish(epoch, writer))

    def open_writer(self, epoch):
        """A CaptureWriter for this epoch, or None if only stats are computed."""
        if not self.what:
            return None
        directory = Path(self.directory, str(epoch))
        return CaptureWriter(
            directory, self.what, epoch=epoch, checkpoint=self.checkpoint, flags=self.flags
        )

    def capture(self, epoch, model, criterion, writer):
        """Write the batches of this rank, and feed them to the stats."""
        batches, total = self.loader.epoch(epoch), len(self.loader)
        title = f"epoch {epoch}: capture"
        for position, batch in progress(batches, what=title, unit=" batches", total=total):
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
            line = f"epoch {epoch}: captured {', '.join(self.what)} in {writer.directory}"
            if writer.removed:
                line += f", replacing {counted(writer.removed, 'file')} of an earlier capture"
            print(line)
        values = self.collector.logStats(epoch)
        for name, value in values.items():
            print(f"    {name}: {value:.4g}")
        if drawn := sorted(map(str, set(self.collector.directories.values()))):
            print(f"    pictures of the statistics: {', '.join(drawn)}")
        return values

    @torch.no_grad()
    def compute(self, batch, model, criterion, generator):
        """Everything asked for, name -> tensor with a row for each window."""
        names = frozenset(self.what) | self.collector.needs
        # Every window starts from the zero state, so that its capture can't depend on how the list
        # of windows was cut into batches.
        inputs = batch.waveform, torch.zeros_like(batch.continues)
        if names & OF_SEGMENTS:
            (context, encoded), segments = model.both_levels(*inputs)
            vectors = zip(("seg_ctx", "seg_conv"), segments.upsampled(), strict=True)
            tensors = {"seg_boundaries": segments.boundaries, **dict(vectors)}
        else:
            (context, encoded), tensors = model(*inputs), {}
        tensors |= {
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


class ModelHook(Hook):
    """Evaluates the model on rank 0: `measure(epoch, model)` returns the values to log."""

    first = 1

    def __init__(self, name, measure, *, every, world):
        super().__init__(name, every)
        self.measure, self.world = measure, world

    def run(self, epoch, model, criterion):
        return self.world.on_rank_zero(lambda: self.measure(epoch, model))


class ProbeHook(ModelHook):
    """Trains a probe; `every` may also be a list of epochs, as text."""

    flag = "linsep_classif_each_epochs"

    def due(self, epoch):
        return (
            super().due(epoch) if isinstance(self.every, int) else epoch in numbers_in(self.every)
        )


class UnitHook(ModelHook):
    """Measures the units that k-means makes of the model's contexts."""

    flag = "unit_quality_each_epochs"


# ----------------------------------------------------------------------------- as the flags ask for


def build_hooks(args, corpus, labels, sets, stats, checkpoint, device, world):
    """Captures and probes, between epochs or once on a checkpoint, as the flags ask for.

    sets: `sets(labelled=...)` gives training and validation set, with phone labels or without.
    """
    once, hooks = works_on_checkpoint(args), []
    place = {"device": device, "world": world}
    if args.pathCaptureDS and not args.only_classif_metric:
        source = checkpoint if once else None
        hooks.append(capture_hook(args, corpus, labels, stats, checkpoint=source, **place))
    if args.supervised_classif_metric and not args.onlyCapture:
        if args.path_phone_data:
            hooks.append(probe_hook(args, "phone", sets(labelled=True), labels.n_phones, **place))
        if args.speaker_sep:
            n_speakers = len(corpus.speakers)
            hooks.append(probe_hook(args, "speaker", sets(labelled=False), n_speakers, **place))
    if args.unit_quality_each_epochs and not once:
        hooks.append(unit_hook(args, corpus, labels, sets(labelled=False)[1], world=world))
    for hook in hooks:
        if not once and not any(map(hook.due, range(args.nEpoch))):
            print(
                f"warning: --{hook.flag} {hook.every}: {hook.name} never runs in "
                f"{counted(args.nEpoch, 'epoch')}"
            )
    return hooks


def capture_hook(args, corpus, labels, stats, *, device, world, checkpoint=None):
    """The CaptureHook of the --capture... flags; checkpoint: the model's, with --onlyCapture.

    labels: PhoneLabels or None; stats: the StatsCollector of --captureSetStats.
    """
    names, utterances = captured_names(args), capture_list(args, corpus)
    if names and checkpoint:
        refuse_to_lose(Path(args.pathCaptureSave, str(checkpoint.epoch)), names)
    is_optional = "phone_align" in names and "phone_align" not in stats.needs
    if is_optional and not labels_by_path(labels, utterances, corpus):
        print(
            f"warning: {args.path_phone_data} has labels for none of the {len(utterances)} "
            "utterances to capture: everything but phone_align is captured"
        )
        names.remove("phone_align")
    with_phones = "phone_align" in {*names, *stats.needs}
    capture_set = AudioDataset(
        corpus,
        utterances,
        phone_labels=labels if with_phones else None,
        keep_unlabelled=with_phones,
        whole_frames=True,
        title="capture set",
        **set_options(args),
    )
    print(capture_set.describe(), flush=True)
    loader = BatchLoader(
        capture_set,
        args.batchSizeGPU,
        "sequential",
        seed=args.random_seed,
        training=False,
        world=world,
    )
    return CaptureHook(
        loader,
        names,
        stats,
        args.pathCaptureSave,
        every=args.captureEachEpochs,
        seed=args.random_seed,
        flags=vars(args),
        device=device,
        checkpoint=checkpoint and checkpoint.path,
    )


def capture_list(args, corpus):
    """The utterances of --pathCaptureDS, subsampled by --captureDSfreq or --captureDStotNr."""
    utterances = listed_utterances(corpus, args.pathCaptureDS)
    if args.captureDSfreq is not None:
        return keep_percentage(utterances, args.captureDSfreq)
    if args.captureDStotNr is not None:
        return keep_total(utterances, args.captureDStotNr)
    return utterances


def probe_hook(args, task, sets, n_classes, *, device, world):
    """The ProbeHook of the --linsep_... flags; task: "phone" or "speaker"; sets: training and
    validation AudioDataset with the labels for it. Raises UserError if one has no window."""
    for dataset in sets:
        dataset.require_windows()

    def probe(epoch, model):
        with at_level(model, args.level):
            result = run_probe(
                task,
                model,
                *sets,
                n_classes,
                ProbeOptions.of_training_run(args, task, epoch),
                logs_dir=args.linsep_logs_dir,
                checkpoint_dir=args.linsep_checkpoint_dir,
                device=device,
            )
        return result.logged()

    return ProbeHook(f"the {task} probe", probe, every=args.linsep_classif_each_epochs, world=world)


def unit_hook(args, corpus, labels, validation_set, *, world):
    """The UnitHook of --unit_quality_each_epochs; labels: PhoneLabels or None."""
    from eval.unit_watch import measure_units, most_clusters

    phones = labels_by_path(labels, validation_set.utterances, corpus) if labels else {}
    if args.nClusters > (most := most_clusters(validation_set, phones)):
        raise UserError(
            f"--nClusters {args.nClusters}: units in training are clusters of "
            f"{counted(most, 'frame')} of the validation set: choose fewer"
        )

    def measure(epoch, model):
        generator = generator_from(args.random_seed, epoch, "units")
        with at_level(model, args.level):
            return measure_units(model, validation_set, phones, args.nClusters, generator)

    every = args.unit_quality_each_epochs
    return UnitHook("the unit quality", measure, every=every, world=world)
