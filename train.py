"""Train CPC or CPC-CTC on speech, and look at what it learns.

    python train.py --pathDB AUDIO --pathTrain LIST --pathVal LIST --pathCheckpoint RUN --CPCCTC
    python train.py --pathCheckpoint RUN                       # go on with a run that was stopped
    python train.py --pathCheckpoint RUN --nEpoch 300                            # ... for longer
    python train.py --pathDB AUDIO --pathCheckpoint RUN --device cpu               # without a GPU
    python train.py ... --pathCaptureDS LIST --pathCaptureSave DIR --captureEverything
    python train.py ... --supervised_classif_metric --speaker_sep --path_phone_data LABELS \
        --linsep_logs_dir DIR
    python train.py --pathDB AUDIO --onlyCapture --pathCheckpoint RUN \
        --pathCaptureDS LIST --pathCaptureSave DIR --captureEverything
    python train.py --pathDB AUDIO --only_classif_metric --pathCheckpoint RUN --speaker_sep \
        --linsep_logs_dir DIR

`python train.py --help` explains every flag, README.md every task.
"""

import argparse
import contextlib
import functools
import os
import random
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from criterion import NoneCriterion, build_criterion, mask_rules
from dataset import AudioDataset, BatchLoader, warn_of_shared_files
from eval.hooks import PREDICTED, CaptureHook, ProbeHook
from eval.probe import ProbeOptions, run_probe
from feature_loader import load_model
from model import CPCModel, build_model
from stats.stats_collector import StatsCollector
from stats.stats_utils import check_needs, parse_stats, with_absolute_directories
from trainer import Trainer, TrainStep, say_finished
from utils.capture import refuse_to_lose
from utils.data.corpus import (
    keep_percentage,
    keep_total,
    read_sequence_list,
    scan_corpus,
    select_sequences,
    warn_of_single_speaker,
    warn_of_subsets,
)
from utils.data.labels import read_phone_labels
from utils.misc import UserError, generator_from, seed_from
from utils.report.page import RunReport
from utils.report.run_record import RunRecord, machine_in_words
from utils.run.checkpoint import (
    Checkpoint,
    check_speakers,
    follow_speaker_order,
    load_weights,
    newest_checkpoint,
    open_checkpoint,
    remove_stale,
)
from utils.run.command import command
from utils.run.console import DroppedWhenFull
from utils.run.distributed import World, joined_world
from utils.run.flags import (
    ARCHITECTURE,
    MODEL,
    ORDER,
    build_parser,
    capturable_names,
    captured_names,
    check_arguments,
    follow_checkpoint,
    parse_arguments,
    stored_arguments,
)
from utils.run.launch import launch, processes_to_start
from utils.run.lock import locked
from utils.run.logs import has_accuracy, step_name
from utils.run.machine import device_from, keep_freed_memory
from utils.run.stopping import Stopped, StopSignals


@command
def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    args, given = parse_arguments(words)
    n_processes = processes_to_start(args)
    if n_processes:
        return launch(n_processes, main, words)
    log = contextlib.redirect_stdout(DroppedWhenFull(sys.stdout))
    with StopSignals() as stop, log:
        try:
            device = device_from(args.device)
            with joined_world(stop, device) as world, own_directory(args, world):
                run(args, given, words, world)
        except Stopped as stopped:
            print(f"stopped by {stopped}")
            return stopped.status


class Job(NamedTuple):
    """What is to be done, and with what."""

    args: argparse.Namespace
    checkpoint: Checkpoint | None  # that this call of the program goes on from, or works on
    loaded: "Loaded | None"  # what a new run begins with
    stats: StatsCollector
    data: "Data"
    device: torch.device
    world: World


class Loaded(NamedTuple):
    """What a run begins with (`--load`)."""

    model: torch.nn.Module  # with the flags of each of its parts (feature_loader.load_model)
    source: Checkpoint | None  # of the criterion's weights (`--loadCriterion`)


def run(args, given, words, world):
    """What the command line asks for, as one of the processes of `world`.

    args, given: what it says, and the names of the flags on it; words: itself.
    """
    args, checkpoint, loaded, stats = world.together(lambda: settle_arguments(args, given))
    world.agree_on(
        checkpoint and checkpoint.state["position"],
        f"--pathCheckpoint {args.pathCheckpoint}: not all processes find the same checkpoint; "
        "several machines must share this directory",
    )
    once = args.onlyCapture or args.only_classif_metric
    if not once:
        world.from_first(lambda: remove_stale(args.pathCheckpoint, checkpoint))
        if world.from_first(lambda: is_finished(args, checkpoint)):
            say_finished(checkpoint.state["position"][0])
            return
    args.random_seed = world.from_first(lambda: args.random_seed)  # where none was given
    device = prepare_machine(args, world)
    corpus = world.from_first(lambda: find_audio(args))
    data = world.together(lambda: Data(args, corpus))
    job = Job(args, checkpoint, loaded, stats, data, device, world)
    if once:
        model, criterion, hooks = world.together(lambda: prepare_hooks(job))
        for hook in hooks:
            hook.run(checkpoint.epoch, model, criterion)
    else:
        world.together(lambda: prepare_training(job, words)).run()


def is_finished(args, checkpoint):
    """Whether the run has all its epochs, with logs, curves and report: no audio is needed then."""
    if not checkpoint:
        return False
    done = checkpoint.state["position"][0]
    written = any(row["epoch"] == done - 1 for row in RunRecord(args.pathCheckpoint).epochs)
    return done >= args.nEpoch and written


def prepare_training(job, words):
    """A Trainer, at the beginning of a run or where its checkpoint was saved.

    `words` of the command line are shown in the run's report.
    """
    args, data, stats = job.args, job.data, job.stats
    if args.supervised and not args.path_phone_data:
        print("note: --supervised without --path_phone_data trains the network to name speakers")
    step, models = build_step(args, data, job.checkpoint, job.loaded)
    report = RunReport(
        args,
        build_parser().parse_args([]),
        ["python", "train.py", *words],
        data.training_sets,
        data.labels,
        {name: stat.directory for name, stat in stats.stats.items() if hasattr(stat, "directory")},
        machine_in_words(job.device, job.world.size),
        step_name=step_name(args),
        has_accuracy=has_accuracy(args),
    )
    trainer = Trainer(
        args,
        step.to(job.device),
        *data.training_sets,
        hooks=build_hooks(job),
        device=job.device,
        world=job.world,
        report=report,
        models=models,
        speakers=list(data.corpus.speakers) if tells_speakers_apart(args) else None,
    )
    if job.checkpoint:
        trainer.restore(job.checkpoint)
    return trainer


def prepare_hooks(job):
    """Model, criterion and hooks, to capture or probe the model of a checkpoint."""
    args, data = job.args, job.data
    model, criterion = load_model(job.checkpoint)[0], NoneCriterion()
    if args.onlyCapture and PREDICTED & {*captured_names(args), *job.stats.needs}:
        criterion = build_criterion(args, len(data.corpus.speakers))
        take_weights(criterion, job.checkpoint, args, data)
    return model.to(job.device), criterion.to(job.device), build_hooks(job)


# -------------------------------------------------------------------------- arguments and machine


@contextlib.contextmanager
def own_directory(args, world):
    """Training has the directory of its checkpoints for itself; other calls write nothing there."""
    with contextlib.ExitStack() as held:
        if not args.onlyCapture and not args.only_classif_metric:
            world.from_first(lambda: held.enter_context(lock_directory(args.pathCheckpoint)))
        yield


def lock_directory(path):
    if os.path.isfile(path):
        raise UserError(
            f"--pathCheckpoint {path}: is a file; training needs a directory (to start from this "
            "checkpoint's weights, use --load)"
        )
    return locked(path, "--pathCheckpoint")


def settle_arguments(args, given):
    """The arguments, completed by those of the checkpoint that is gone on from or worked on.

    Returns them, the Checkpoint (None at the beginning of a run), what the run begins with (a
    Loaded, or None), and the StatsCollector.
    """
    if args.captureSetStats:
        args.captureSetStats = with_absolute_directories(args.captureSetStats)
    checkpoint, loaded = find_checkpoint(args), None
    if checkpoint:
        kept = stored_arguments(checkpoint.state["args"], checkpoint.path)
        unused = follow_checkpoint(args, given, kept)
        for line in unused:
            print(f"warning: {line}")
        if unused and not args.onlyCapture and not args.only_classif_metric:
            print(f"the run in {args.pathCheckpoint} goes on; a new one needs another directory")
        given = given - ARCHITECTURE - ORDER  # the checkpoint's values count: no contradictions
    elif args.load:
        loaded = load_start(args)
        given = given - follow_loaded(args, loaded)
    began_with_load = loaded is not None or (checkpoint and "models" in checkpoint.state)
    check_arguments(args, given, resumed=checkpoint is not None, began_with_load=began_with_load)
    if args.random_seed is None:
        args.random_seed = random.SystemRandom().randrange(2**31)
    return args, checkpoint, loaded, parse_specs(args)


def parse_specs(args):
    """Look into the flags that are small languages, before audio is looked for.

    Returns a StatsCollector of `--captureSetStats`.
    """
    mask_rules(args.CPCCTCMasq)
    stats = parse_stats(args.captureSetStats) if args.captureSetStats else []
    check_needs(stats, capturable_names(args))
    return StatsCollector(stats, vars(args))


def find_checkpoint(args):
    if args.onlyCapture or args.only_classif_metric:
        return open_checkpoint(args.pathCheckpoint)
    return None if args.restart else newest_checkpoint(args.pathCheckpoint)


def load_start(args):
    """What `--load` and the flags about it name."""
    for path in args.load:
        if not os.path.exists(path):
            raise UserError(f"--load {path}: no such directory or file")
    options = {"gru_level": args.gru_level, "nullspace": args.nullspace}
    model = load_model(args.load, sampling=args.samplingType, **options)[0]
    return Loaded(model, open_checkpoint(args.load[0]) if args.loadCriterion else None)


def follow_loaded(args, loaded):
    """Change the flags that describe what is loaded to what it is; returns the names of these."""
    followed = {}
    if loaded.source:
        kept = stored_arguments(loaded.source.state["args"], loaded.source.path)
        followed = {name: getattr(kept, name) for name in ARCHITECTURE - MODEL}
    parts = loaded.model.arguments
    for name in MODEL:
        values = [getattr(flags, name) for flags in parts]
        if all(value == values[0] for value in values):
            followed[name] = values[0]
    widths = {"hiddenEncoder": loaded.model.dim_encoded, "hiddenGar": loaded.model.dim_context}
    for name, value in sorted((followed | widths).items()):
        if getattr(args, name) != value:
            print(f"--{name}: {value}, as in what is loaded (instead of {getattr(args, name)})")
            setattr(args, name, value)
    return followed.keys() | MODEL


def prepare_machine(args, world):
    """Set threads, memory and arithmetic; returns the device."""
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    elif world.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // world.local_size))
    torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"  # bf16: of recurrent networks
    return device_from(args.device)


# ------------------------------------------------------------------------------------------- data


def find_audio(args):
    corpus = scan_corpus(
        args.pathDB,
        args.file_extension,
        ignore_cache=args.ignore_cache,
        n_threads=args.n_process_loader,
    )
    warn_of_single_speaker(corpus)
    warn_of_subsets(corpus)
    return corpus


class Data:
    """The corpus, and the sets that this call of the program makes of it."""

    def __init__(self, args, corpus):
        self.args, self.corpus = args, corpus
        self.labels = read_phone_labels(args.path_phone_data) if args.path_phone_data else None

    def listed(self, path):
        """The sequences of a list; of the whole corpus without one."""
        if path is None:
            return list(self.corpus.sequences)
        return select_sequences(self.corpus.sequences, read_sequence_list(path), path)

    @functools.cached_property
    def split(self):
        """Training and validation sequences."""
        args = self.args
        training = self.listed(args.pathTrain)
        if args.pathVal:
            validation = self.listed(args.pathVal)
        else:
            training, validation = set_aside(training, 0.01, args.random_seed)
        return (training[-1000:], validation[-100:]) if args.debug else (training, validation)

    def dataset(self, sequences, title, *, with_phones, **more):
        audio = AudioDataset(
            self.corpus,
            sequences,
            self.args.sizeWindow,
            phone_labels=self.labels if with_phones else None,
            labelled_only=with_phones,
            n_threads=self.args.n_process_loader,
            max_bad_files=self.args.max_bad_files,
            title=title,
            **more,
        )
        print(audio.describe(), flush=True)
        return audio

    def split_sets(self, suffix="", *, with_phones):
        """Training and validation set."""
        training, validation = self.split
        size = {"max_size_loaded": self.args.max_size_loaded}
        return (
            self.dataset(training, f"training set{suffix}", with_phones=with_phones, **size),
            self.dataset(validation, f"validation set{suffix}", with_phones=with_phones),
        )

    @functools.cached_property
    def training_sets(self):
        """What the networks are trained and validated on."""
        sets = self.split_sets(with_phones=trains_on_phones(self.args))
        warn_of_shared_files(*sets)
        return sets

    def capture_sequences(self):
        args = self.args
        sequences = self.listed(args.pathCaptureDS)
        if args.captureDSfreq is not None:
            return keep_percentage(sequences, args.captureDSfreq)
        if args.captureDStotNr is not None:
            return keep_total(sequences, args.captureDStotNr)
        return sequences


def set_aside(sequences, share, seed):
    """Split off a random share of the sequences, at least one."""
    if len(sequences) < 2:
        raise UserError("--pathVal FILE is needed: one sequence can't be split into two sets")
    order = torch.randperm(len(sequences), generator=generator_from(seed, "validation set"))
    chosen = set(order[: max(1, round(share * len(sequences)))].tolist())
    return (
        [s for index, s in enumerate(sequences) if index not in chosen],
        [s for index, s in enumerate(sequences) if index in chosen],
    )


def trains_on_phones(args):
    return args.supervised and args.path_phone_data is not None


def tells_speakers_apart(args):
    """Whether the criterion has weights for each speaker."""
    return args.speakerEmbedding > 0 or (args.supervised and not trains_on_phones(args))


# ------------------------------------------------------------------------------------------ hooks


def build_hooks(job):
    """What is done between epochs, or once on a checkpoint."""
    args, hooks = job.args, []
    if args.pathCaptureDS and not args.only_classif_metric:
        hooks.append(capture_hook(job))
    if args.supervised_classif_metric and not args.onlyCapture:
        hooks += probe_hooks(job)
    once = args.onlyCapture or args.only_classif_metric
    for hook in hooks:
        if not once and not any(map(hook.due, range(args.nEpoch))):
            print(
                f"warning: {hook.name} comes every {hook.every} epochs from epoch {hook.every} "
                f"on, so never in a run of {args.nEpoch}"
            )
    return hooks


def capture_hook(job):
    args, data, stats = job.args, job.data, job.stats
    names, sequences = captured_names(args), data.capture_sequences()
    if names and args.onlyCapture:
        refuse_to_lose(Path(args.pathCaptureSave, str(job.checkpoint.epoch)), names)
    optional = "phone_align" in names and "phone_align" not in stats.needs
    if optional and not any(s.name in data.labels.labels for s in sequences):
        print(
            f"warning: {args.path_phone_data} has labels for none of the {len(sequences)} "
            "sequences to capture: everything but phone_align is captured"
        )
        names.remove("phone_align")
    with_phones = "phone_align" in {*names, *stats.needs}
    capture_set = data.dataset(sequences, "capture set", with_phones=with_phones, whole_frames=True)
    loader = BatchLoader(
        capture_set,
        args.batchSizeGPU,
        "sequential",
        seed=args.random_seed,
        training=False,
        world=job.world,
    )
    return CaptureHook(
        loader,
        names,
        stats,
        args.pathCaptureSave,
        every=args.captureEachEpochs,
        seed=args.random_seed,
        flags=vars(args),
        device=job.device,
        checkpoint=job.checkpoint.path if args.onlyCapture else None,
    )


def probe_hooks(job):
    args, data, hooks = job.args, job.data, []
    if args.path_phone_data:
        sets = data.split_sets(" of the phone probe", with_phones=True)
        hooks.append(probe_hook(job, "phone", sets, data.labels.n_phones))
    if args.speaker_sep:
        sets = data.training_sets
        if trains_on_phones(args):  # these leave out what has no phone labels
            sets = data.split_sets(" of the speaker probe", with_phones=False)
        hooks.append(probe_hook(job, "speaker", sets, len(data.corpus.speakers)))
    return hooks


def probe_hook(job, task, sets, n_classes):
    args = job.args
    for audio in sets:
        if not audio.n_windows:
            raise audio.no_window()

    def probe(epoch, model):
        result = run_probe(
            task,
            model,
            *sets,
            n_classes,
            ProbeOptions.of_training_run(args, task, epoch),
            logs_dir=args.linsep_logs_dir,
            checkpoint_dir=args.linsep_checkpoint_dir,
            device=job.device,
        )
        return result.logged()

    every = args.linsep_classif_each_epochs
    return ProbeHook(f"the {task} probe", probe, every=every, world=job.world)


# --------------------------------------------------------------------------------------- networks


def build_step(args, data, checkpoint=None, loaded=None):
    """The networks: new, loaded (`--load`), or those of the checkpoint.

    Returns a TrainStep and, where the model began with `--load`, the flags of each of its parts.
    """
    torch.manual_seed(seed_from(args.random_seed, "initial weights"))
    source, models = checkpoint, None
    if checkpoint:
        model = load_model(checkpoint)[0]
        models = checkpoint.state.get("models")
    elif loaded:
        model, source = loaded
        models = [vars(flags) for flags in model.arguments]
    else:
        model = build_model(args)
    n_phones = data.labels.n_phones if trains_on_phones(args) else 0
    criterion = build_criterion(args, len(data.corpus.speakers), n_phones)
    if source:
        take_weights(criterion, source, args, data)
    if args.compile:
        print("the first steps wait for the compiler, up to some minutes", flush=True)
        for part in model.modules():
            if isinstance(part, CPCModel):
                part.gEncoder.compile()
        criterion.fused_scores = True
        criterion.compile()
    return TrainStep(criterion, model), models


def take_weights(criterion, source, args, data):
    """Load the criterion's weights from a checkpoint."""
    listing = Path(args.pathDB, "_seqs_cache.txt")
    follow_speaker_order(source, criterion, data.corpus.speakers, listing)
    check_speakers(source, data.corpus.speakers)
    load_weights(criterion, source.state["cpcCriterion"], source.path)


if __name__ == "__main__":
    sys.exit(main())
