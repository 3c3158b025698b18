"""Train CPC or CPC-CTC on speech, and inspect what it learns.

    python train.py --pathDB AUDIO --pathTrain LIST --pathVal LIST --pathCheckpoint RUN --CPCCTC
    python train.py --pathCheckpoint RUN                             # resume a run that was stopped
    python train.py --pathCheckpoint RUN --nEpoch 300                               # ... for longer
    python train.py --pathDB AUDIO --pathCheckpoint RUN --device cpu               # without a GPU
    python train.py ... --pathCaptureDS LIST --pathCaptureSave DIR --captureEverything
    python train.py ... --supervised_classif_metric --speaker_sep --path_phone_data LABELS \
        --linsep_logs_dir DIR
    python train.py --pathDB AUDIO --onlyCapture --pathCheckpoint RUN \
        --pathCaptureDS LIST --pathCaptureSave DIR --captureEverything
    python train.py --pathDB AUDIO --only_classif_metric --pathCheckpoint RUN --speaker_sep \
        --linsep_logs_dir DIR

`python train.py --help` explains every flag, README.md every task. A run goes through main, run,
train, train_one_epoch, train_step, validate, run_hooks and finish_epoch; its set-up comes last.
"""

import functools
import math
import random
import sys

import utils.run.before_torch  # noqa: F401

import torch

from criterion import (
    NoneCriterion,
    build_criterion,
    has_speaker_weights,
    join_networks,
    mask_rules,
    trains_on_phones,
)
from criterion.networks import Networks
from dataset import MAX_SIZE_LOADED, build_loaders, build_sets, set_options
from eval.hooks import PREDICTED, build_hooks
from eval.starts import StartWatch
from feature_loader import load_model
from model import CPCModel, build_model, preserved_state
from stats.stats_utils import build_stats, with_absolute_directories
from utils.data.batches import on_device
from utils.data.corpus import open_corpus, split_corpus
from utils.data.labels import read_phone_labels
from utils.misc import UserError, generator_from, seed_from
from utils.report.event_files import event_writers
from utils.report.run_files import RunFiles
from utils.report.run_record import epoch_speed, is_finished
from utils.run import console, machine
from utils.run.captured import captured_names
from utils.run.checkpoint import load_criterion, open_checkpoint, remove_stale
from utils.run.command import command
from utils.run.cuda_graph import RecordedPasses, can_be_recorded
from utils.run.distributed import joined_world
from utils.run.flags import flags_of_levels, parse_arguments
from utils.run.launch import launch, processes_to_start, run_program
from utils.run.lock import lost_lock, training_lock
from utils.run.logs import Clock, RunningMeans
from utils.run.place import enter_slurm_step
from utils.run.resolve import resolve, works_on_checkpoint
from utils.run.rules import check_call
from utils.run.state import RunState
from utils.run.stopping import Stopped, StopSignals

STEPS_BETWEEN_STOP_CHECKS = 8  # with several ranks, which stop together


@command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args, explicit = parse_arguments(argv)
    check_call(args, explicit)
    enter_slurm_step()
    n_processes = processes_to_start(args)
    if n_processes:
        return launch(n_processes, main, argv)
    with StopSignals() as stop, console.survives_full_disk():
        try:
            device = machine.device_from(args.device)
            with joined_world(stop, device) as world, training_lock(args, world):
                run(args, explicit, argv, world, device)
        except Stopped as stopped:
            print(f"stopped by {stopped}")
            return stopped.status


def run(args, explicit, argv, world, device):
    """Do what the command line asks for, as one rank of `world`.

    args, explicit: the flags, and the names of those given in `argv`, the command line.
    """
    with world.shared_errors():
        if args.captureSetStats:
            args.captureSetStats = with_absolute_directories(args.captureSetStats)
        args, checkpoint = resolve(args, explicit)
        mask_rules(args.CPCCTCMasq)  # only to refuse bad rules before anything slow
        stats = build_stats(args)
    world.check_same(
        checkpoint and checkpoint.state["position"],
        f"--pathCheckpoint {args.pathCheckpoint}: not all processes find the same checkpoint; "
        "several machines must share this directory",
    )
    training = not works_on_checkpoint(args)  # else: capture or probe a finished model once
    if training:
        world.on_rank_zero(lambda: remove_stale(args.pathCheckpoint, checkpoint))
        if world.on_rank_zero(lambda: is_finished(args, checkpoint)):
            console.print_finished(checkpoint.state["position"][0])
            return
    prepare_machine(args, world, device)

    # ---- data
    corpus = open_corpus(args, world=world)
    with world.shared_errors():
        labels = read_phone_labels(args.path_phone_data) if args.path_phone_data else None
        split = None if args.onlyCapture else split_corpus(args, corpus)

        @functools.cache  # training and probes share them
        def sets(*, labelled):
            options = set_options(args) | {"labels": labels if labelled else None}
            sizes = (args.max_size_loaded, MAX_SIZE_LOADED)
            return build_sets(corpus, split, max_sizes=sizes, **options)

        # ---- networks
        if training and args.supervised and not args.path_phone_data:
            print("note: --supervised without --path_phone_data trains on speaker labels")
        networks, models = build_networks(args, corpus, labels, checkpoint, stats)
        networks.to(device)

        # ---- state
        if training:
            trained_on = sets(labelled=trains_on_phones(args))
            loaders = prepare_loaders(args, trained_on, world)
            speakers = list(corpus.speakers) if has_speaker_weights(args) else None
            state = RunState(args, networks, *loaders, device, models=models, speakers=speakers)
            if checkpoint:
                state.restore(checkpoint)
            files = RunFiles(state, argv, trained_on, labels, stats)

        # ---- hooks
        hooks = build_hooks(args, corpus, labels, sets, stats, checkpoint, device, world)
    if training:
        del checkpoint  # its weights would stay in memory for the whole run
        train(state, *loaders, hooks, files)
    else:
        for hook in hooks:
            hook.run(checkpoint.epoch, networks.model, networks.criterion)


# ---------------------------------------------------------------------------------------- training


def train(state, train_loader, val_loader, hooks, files):
    """Train to the last epoch. When asked to stop, save what can be saved and raise Stopped."""
    args, world, screen = state.args, state.world, console.Console(state.networks)
    world.check_same(
        state.fingerprint,
        "not all processes have the same training and validation set: are the lists the same on "
        "all machines?",
    )
    world.on_rank_zero(lambda: files.complete(state.logs, world.stop))
    if state.position.epoch >= args.nEpoch:
        console.print_finished(state.position.epoch)
        return
    listeners = [screen, state, StartWatch(state, val_loader), *event_writers(state, files)]
    forward_backward = console.note_if_starved(build_forward_backward(state), state)
    val_loader.prepare()
    try:
        if state.position == (0, 0, 0):
            start = validate(state, val_loader, 0, "before training")
            state.logs["before_training"] = start
            screen.before_training(start)
            world.raise_everywhere(lost_lock())
            # After --restart, the old run's report stays as long as its checkpoints.
            if world.is_rank_zero and not state.checkpoints_to_remove:
                files.write(state.logs)
        while state.position.epoch < args.nEpoch:
            epoch = state.position.epoch
            values = train_one_epoch(state, train_loader, forward_backward, listeners)
            values |= validate(state, val_loader, epoch, f"epoch {epoch}")
            publish(listeners, epoch, values, state.clock)
            failure = run_hooks(hooks, state, epoch, listeners)
            with world.stop.deferred():
                finish_epoch(state, epoch, files, save_now=failure is not None)
            if failure:
                raise failure
    except Stopped:
        if state.position != (0, 0, 0) and state.save():
            print(f"saved in epoch {state.position.epoch}; the same command resumes there")
        if world.is_rank_zero:
            files.complete(state.logs, world.stop)
        raise
    screen.summary(state.logs, state.best_row, state.clock, files.places())


def train_one_epoch(state, loader, forward_backward, listeners):
    """Train on the rest of the epoch; returns its training values for the logs."""
    args, world, means = state.args, state.world, state.epoch_means
    epoch = state.position.epoch
    rate = state.set_learning_rate()
    state.networks.train()
    if state.position == (epoch, 0, 0):
        state.networks.model.reset_hidden()
        state.clock = Clock(device=state.device)
    clock = state.clock
    clock.start()
    batches = on_device(loader.epoch(epoch, state.position), state.device)
    n_batches = means.batches + loader.n_batches(epoch, state.position) // world.size
    with console.progress(what=f"epoch {epoch}", unit=" batches", total=n_batches) as bar:
        bar.update(means.batches)
        while (item := clock.wait_for(next, batches, None)) is not None:
            with world.stop.deferred():
                clock.windows += world.size * len(item[1].window)
                train_step(state, forward_backward, *item)
                if state.save_is_due:
                    state.save()
            bar.update()
            if means.batches % args.logging_step == 0:
                values = state.networks.named("train", *means.means_since_mark())
                for listener in listeners:
                    listener.on_step(epoch, means.batches, n_batches, values, clock)
            if means.batches % STEPS_BETWEEN_STOP_CHECKS == 0 or means.batches == n_batches:
                state.save_is_agreed = world.stop_if_asked(state.save_pace.is_due)
    state.check_finite()
    clock.stop()
    return {
        "iter": means.batches,
        **state.networks.named("train", *means.means()),
        "gradNorm_train": means.mean_gradient_norm(),
        "learningRate": rate,
    }


def train_step(state, forward_backward, position, batch):
    """One step of the optimiser, on a batch that is on the device."""
    args, networks, optimizer = state.args, state.networks, state.optimizer
    # Everything random is seeded by the position in the data, so a resumed run draws the same.
    machine.seed_generators(seed_from(args.random_seed, *position))

    # forward and backward
    losses, accuracies = forward_backward(batch)

    # clip
    gradients = [p.grad for p in networks.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if args.clip_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(networks.parameters(), args.clip_grad_norm, norm)

    # step
    skip_if_not_finite(optimizer, norm)
    optimizer.step()
    optimizer.zero_grad()
    state.count_step(position, batch, losses, accuracies, norm)


def skip_if_not_finite(optimizer, norm):
    """Make the next step of the fused Adam change no weights if the gradient isn't finite.

    Adam reads `found_inf` on the device, as with torch.amp.GradScaler.
    """
    optimizer.found_inf = (~torch.isfinite(norm)).float()


def build_forward_backward(state):
    """A function that computes gradients of a Batch; returns losses and accuracies, (1, n).

    It runs the plain passes, averages gradients over ranks, or replays a CUDA graph.
    """
    args, device, world = state.args, state.device, state.world
    networks = world.wrap(state.networks)

    def forward_backward(batch):
        with machine.autocast(args, device), machine.compiled(args, batch):
            losses, accuracies = networks(batch)
        loss = state.networks.total(losses)
        # A non-finite loss makes NaN gradients, so the all-reduce shows it to every rank.
        loss.backward(torch.where(torch.isfinite(loss.detach()), 1.0, math.nan))
        return losses.detach(), accuracies.detach()

    if can_be_recorded(args, device, world):
        return RecordedPasses(forward_backward, networks.parameters(), args.batchSizeGPU)
    return forward_backward


# ------------------------------------------------------------- validation, hooks, end of an epoch


@torch.no_grad()
def validate(state, loader, epoch, title):
    """Mean losses and accuracies on the validation set, for the logs; preserves hidden states."""
    args, networks, world = state.args, state.networks, state.world
    networks.eval()
    world.copy_buffers(networks)
    means = RunningMeans(world)
    with preserved_state(networks.model), world.shared_errors():
        batches, total = on_device(loader.epoch(epoch), state.device), len(loader)
        title = f"{title}: validation"
        for position, batch in console.progress(batches, what=title, unit=" batches", total=total):
            negatives = generator_from(args.random_seed, epoch, "validation", *position[1:])
            with machine.autocast(args, state.device), machine.compiled(args, batch):
                losses, accuracies = networks(batch, negatives)
            means.add(losses, accuracies, len(batch.window))
    losses, accuracies = means.means()
    if not math.isfinite(sum(losses)):
        world.raise_everywhere(
            UserError(
                f"{title}: the loss isn't a finite number. The checkpoints are intact; check the "
                "validation files, or lower --learningRate"
            )
        )
    return networks.named("val", losses, accuracies)


def run_hooks(hooks, state, epoch, listeners):
    """Run the hooks that are due; returns the error of one that failed, or None.

    A result that can't be written must not cost the run the epoch it has just trained.
    """
    networks = state.networks
    for hook in hooks:
        if hook.due(epoch):
            state.world.raise_everywhere(lost_lock())
            try:
                with preserved_state(networks.model, networks.criterion):
                    values = hook.run(epoch, networks.model, networks.criterion)
            except UserError as error:
                return error
            except Exception:  # C code, such as a plotting library's, may turn Stopped into this
                state.world.stop.check()
                raise
            publish(listeners, epoch, values, state.clock)
    return None


def publish(listeners, epoch, values, clock):
    """Pass an epoch's values to every listener."""
    for listener in listeners:
        listener.on_epoch(epoch, values, clock)


def finish_epoch(state, epoch, files, save_now):
    """Log the epoch, save if that is due, and write logs, curves and report."""
    args, world = state.args, state.world
    state.end_epoch(epoch)
    is_last, is_saved = epoch + 1 == args.nEpoch, True
    if save_now or is_last or epoch % args.save_step == 0:
        is_saved = state.save(epoch)
    world.raise_everywhere(lost_lock())
    if world.is_rank_zero:
        speed = epoch_speed(state.clock, state.device, world.size)
        files.write(state.logs, speed, if_due=not (is_last or save_now))
    # All ranks wait for rank 0 here: one that exits early, after an error, would end it as well.
    lost = f"{state.directory}: the last epoch's checkpoint couldn't be written"
    world.raise_everywhere(UserError(lost) if is_last and not is_saved else None)


# ---------------------------------------------------------------------------- machine and networks


def prepare_machine(args, world, device):
    """Set the seed, memory allocation, threads and precision."""
    if args.random_seed is None:
        args.random_seed = world.on_rank_zero(lambda: random.SystemRandom().randrange(2**31))
    machine.keep_freed_memory()
    machine.set_threads(device, args.threads, world.n_sharing)
    machine.set_precision(args.precision)


def prepare_loaders(args, sets, world):
    """The BatchLoaders of the training set, augmented if asked for, and the validation set."""
    if not args.augment_type:
        return build_loaders(args, sets, world)
    from augmentation import Augmentation  # other runs needn't import it

    return build_loaders(args, sets, world, Augmentation(args, sets[0].speakers, world))


def build_networks(args, corpus, labels, checkpoint, stats):
    """New networks, those of `--load`, or those of the checkpoint.

    Returns Networks and, if the model came from `--load`, the flags of each of its parts.
    """
    weights, model, models = checkpoint, None, None
    if checkpoint:
        model, *_ = load_model(checkpoint)
        models = checkpoint.state.get("models")
    elif args.load:
        choice = {"gru_level": args.gru_level, "nullspace": args.nullspace}
        choice |= {"sampling": args.samplingType, "only_frames": args.loadOnlyFrameModel}
        model, *_ = load_model(args.load, **choice)
        models = [vars(flags) | flags_of_levels(args) for flags in model.arguments]
        weights = open_checkpoint(args.load[0]) if args.loadCriterion else None
    torch.manual_seed(seed_from(args.random_seed, "initial weights"))
    if not checkpoint and (not args.load or args.loadOnlyFrameModel):
        model = build_model(args, frame_model=model)

    if works_on_checkpoint(args) and not PREDICTED & {*captured_names(args), *stats.needs}:
        return Networks(NoneCriterion(), model), models
    n_phones = labels.n_phones if trains_on_phones(args) else 0
    criterion = build_criterion(args, len(corpus.speakers), n_phones)
    if weights:
        load_criterion(criterion, weights, corpus)
    if args.compile and not works_on_checkpoint(args):
        compile_networks(criterion, model)
    return join_networks(criterion, model, args), models


def compile_networks(criterion, model):
    """Compile the encoder and the criterion, for use inside `machine.compiled` only.

    Recurrent networks use library kernels instead.
    """
    torch.compiler.set_stance("force_eager")
    print("compiling: the first steps may take a few minutes", flush=True)
    for part in model.modules():
        if isinstance(part, CPCModel):
            part.gEncoder.compile(dynamic=False)
    criterion.fused_scores = True
    criterion.compile(dynamic=False)


if __name__ == "__main__":
    run_program(main)
