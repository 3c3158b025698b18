"""The state of a training run: its progress, and everything that its checkpoints hold.

Nothing random has a state: every step is seeded by its position in the data. So a run resumes
exactly where it was saved, even inside an epoch.
"""

import math
from pathlib import Path

import torch

from utils.misc import Position, Progress, UserError, counted, mean
from utils.run import machine
from utils.run.adam import load_optimizer, parameter_groups
from utils.run.checkpoint import (
    copy_to_cpu,
    remove_old_checkpoints,
    save_checkpoint,
    saved_checkpoints,
)
from utils.run.checkpoint_checks import check_resumable
from utils.run.console import Listener
from utils.run.lock import lost_lock
from utils.run.logs import Clock, RunningMeans, append_epoch
from utils.run.pace import Pace

SECONDS_BETWEEN_SAVES = 600.0  # inside an epoch, unless --resume_every says how many steps
END_OF_EPOCH = 2**31  # as the pack of a position: nothing of the epoch is left to train on


def learning_rate(epoch, base, ramp=None, halve_every=-1):
    """Adam's learning rate in `epoch` (counted from 0), whether or not the run was resumed.

    Over the first `ramp` epochs it rises linearly, reaching `base` in the last of them. It is
    halved at every multiple of `halve_every` epochs after the ramp; a multiple inside the ramp
    halves nothing.
    """
    ramp = ramp or 0
    if epoch < ramp:
        return base * (epoch + 1) / ramp
    if halve_every <= 0:
        return base
    return base * 0.5 ** (epoch // halve_every - ramp // halve_every)


class RunState(Listener):
    """The networks in training, their optimiser, and the progress so far.

    args: the flags; networks: a Networks on `device`; the loaders: BatchLoaders of the training and
    the validation set, whose world is that of all ranks, which have the same weights and the same
    position; models: the flags of each part of a model that came from `--load`, or None;
    speakers: their names by id if the criterion has weights for each, or None.
    """

    def __init__(
        self, args, networks, train_loader, val_loader, device, *, models=None, speakers=None
    ):
        self.args, self.networks, self.device = args, networks, device
        self.world, self.locate = train_loader.world, train_loader.locate
        loaders = (train_loader, val_loader)
        used = [loader.dataset for loader in loaders]
        if train_loader.augmentation:
            used += train_loader.augmentation.recordings.values()
        self.fingerprint = "-".join(dataset.fingerprint() for dataset in used)
        self.models, self.speakers = models, speakers
        self.directory = Path(args.pathCheckpoint)
        self.optimizer = torch.optim.Adam(
            parameter_groups(networks, args.codebookLearningRate),
            lr=args.learningRate,
            betas=(args.beta1, args.beta2),
            eps=args.epsilon,
            fused=True,
        )
        self.position = Position(0, 0, 0)  # where training resumes
        networks.progress = self.progress
        self.saved_position = None
        self.steps_since_save = 0
        self.save_pace = Pace(SECONDS_BETWEEN_SAVES)
        self.save_is_agreed = False  # rank 0 found a save due, and all ranks know
        self.epoch_means = RunningMeans(self.world)  # of the epoch in progress
        self.epoch_values = {}  # of the epoch in progress, for the logs
        self.clock = Clock(device=device)  # of the epoch in progress, or the last one
        self.logs = {"epoch": [], "saveStep": args.save_step, "logging_step": args.logging_step}
        self.best = None  # on rank 0: weights of the model after its best epoch
        self.best_metric = 0.0 if networks.has_accuracy else -float("inf")
        self.unchecked_steps = []  # (position, windows, losses, gradient norm)
        self.checkpoints_to_remove = saved_checkpoints(self.directory) if args.restart else []

    def progress(self):
        """The `Progress` of training."""
        done = sum(steps or 0 for steps in self.logs.get("iter", []))
        steps = self.epoch_means.batches
        return Progress(self.position.epoch, steps, done + steps)

    def set_learning_rate(self):
        """Set the learning rates of the epoch; returns the one that isn't of codes for segments."""
        args = self.args
        epoch, schedule = self.position.epoch, (args.schedulerRamp, args.schedulerStep)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(epoch, group.get("base_lr", args.learningRate), *schedule)
        return self.optimizer.param_groups[0]["lr"]

    # ------------------------------------------------------------------------------- one more step

    def count_step(self, position, batch, losses, accuracies, gradient_norm):
        """Record a step that the optimiser has done on the batch at `position`."""
        self.epoch_means.add(losses, accuracies, len(batch.window), gradient_norm)
        # The first batch of the next step: ranks take consecutive batches.
        self.position = position._replace(batch=position.batch + self.world.size - self.world.rank)
        self.unchecked_steps.append((position, batch.window, losses, gradient_norm))
        self.steps_since_save += 1
        if self.device.type == "cpu" or self.epoch_means.batches % self.args.logging_step == 0:
            self.check_finite()

    @property
    def save_is_due(self):
        """Whether --resume_every asks for a save inside the epoch."""
        if self.args.resume_every is None:
            return self.save_is_agreed
        return 0 < self.args.resume_every <= self.steps_since_save

    def check_finite(self):
        """Stop at the first step whose loss or gradient was not finite; it changed no weight.

        The check waits for the device, so it is only done when that costs little.
        """
        steps, self.unchecked_steps = self.unchecked_steps, []
        norms = torch.stack([norm for *_, norm in steps]).tolist() if steps else []
        for (position, windows, losses, _), norm in zip(steps, norms, strict=True):
            if not math.isfinite(norm):
                files = {self.locate(window)[0] for window in windows.tolist()}
                suspects = self.world.all_gather(None if losses.isfinite().all() else files)
                found = [own for own in suspects if own] or self.world.all_gather(files)
                names = ", ".join(sorted(set().union(*found)))
                self.world.raise_everywhere(
                    UserError(
                        f"epoch {position.epoch}, pack {position.pack}, batch {position.batch}: "
                        f"the loss or its gradient isn't a finite number (files: {names}). The "
                        "checkpoints are intact; check these files, or lower --learningRate"
                    )
                )

    # ------------------------------------------------------------------------------ one more epoch

    def on_epoch(self, epoch, values, clock):
        """Collect the values that `end_epoch` will log."""
        self.epoch_values |= values

    def end_epoch(self, epoch):
        """Log the values of the epoch, keep its weights if it is the best, move to the next one."""
        values, self.epoch_values = self.epoch_values, {}
        append_epoch(self.logs, epoch, values)
        metric = self.selection_metric(values["locLoss_val"], values["locAcc_val"])
        if metric > self.best_metric:
            self.best_metric = metric
            if self.world.is_rank_zero:
                self.best = copy_to_cpu(self.networks.model.state_dict())
        self.position, self.epoch_means = Position(epoch + 1, 0, 0), RunningMeans(self.world)

    def selection_metric(self, losses, accuracies):
        """The value that is largest in the best epoch: the accuracy or, if there is none, minus the
        loss."""
        return mean(accuracies) if self.networks.has_accuracy else -mean(losses)

    @property
    def best_row(self):
        """The place of the best epoch in the lists of the logs."""
        rows = zip(self.logs["locLoss_val"], self.logs["locAcc_val"], strict=True)
        metrics = [self.selection_metric(*row) for row in rows]
        return metrics.index(max(metrics))

    # -------------------------------------------------------------------------------------- saving

    def save(self, epoch=None):
        """Write `checkpoint_<epoch>.pt`, or `checkpoint_resume.pt` if no epoch has just ended.

        Returns, on every rank, whether that went well: a full disk is no reason to stop training.
        """
        self.check_finite()
        self.world.raise_everywhere(lost_lock())
        with self.save_pace.timed():
            self.steps_since_save, self.save_is_agreed = 0, False
            is_saved = self.write(self.contents(), epoch)
            # Once one process has ended, torchrun and srun soon end those that are still writing.
            return all(self.world.all_gather(is_saved))

    def write(self, contents, epoch):
        """Write a checkpoint on rank 0; returns whether that went well."""
        if not self.world.is_rank_zero or (epoch is None and self.position == self.saved_position):
            return True
        try:
            path = save_checkpoint(self.directory, contents, epoch)
        except OSError as error:
            print(
                f"warning: {self.directory}: no checkpoint written ({error}). Earlier ones are "
                "intact, and the next save tries again"
            )
            return False
        self.saved_position = self.position
        try:
            self.remove_superseded(path, epoch)
        except OSError as error:
            print(f"warning: {self.directory}: old checkpoints can't be removed ({error})")
        return True

    def remove_superseded(self, newest, epoch):
        """After writing `newest`: remove checkpoints from before a restart or beyond --keep."""
        for path in self.checkpoints_to_remove:
            if path != newest:
                path.unlink(missing_ok=True)
        self.checkpoints_to_remove = []
        if self.args.keep and epoch is not None:
            best = self.logs["epoch"][self.best_row]
            remove_old_checkpoints(self.directory, epoch, self.args.keep, best)

    def contents(self):
        """Everything that a later call needs to resume exactly here (utils/run/checkpoint.py)."""
        contents = {
            "gEncoder": self.networks.model.state_dict(),
            "cpcCriterion": self.networks.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "best_accuracy": self.best_metric,
            "args": vars(self.args),
            "logs": self.logs,
            "position": list(self.position),
            "running": self.epoch_means.state(),
            "hidden": self.networks.model.hidden_state(),
            "fingerprint": self.fingerprint,
            "machine": self.machine(),
        }
        if self.epoch_means.batches:  # between epochs, timings would make two identical runs differ
            contents["clock"] = self.clock.state()
        rest = {"models": self.models, "speakers": self.speakers}
        return contents | {key: value for key, value in rest.items() if value}

    def machine(self):
        """The settings that a run's results depend on, bit for bit, besides its seed and data."""
        return {
            "device": self.device.type,
            "processes": self.world.size,
            "threads": torch.get_num_threads(),
            "processor": torch.backends.cpu.get_cpu_capability(),
        }

    # ------------------------------------------------------------------------------------ resuming

    def restore(self, checkpoint):
        """Continue from a checkpoint, of this program or of the original."""
        check_resumable(checkpoint, self.networks.model.state_dict())
        state = checkpoint.state
        self.position = Position(*state["position"])
        settings = self.logs.keys() - {"epoch"}  # of this call; the logs have nothing else yet
        self.logs |= {key: value for key, value in state["logs"].items() if key not in settings}
        print(f"resuming from {checkpoint.path}, {counted(self.position.epoch, 'epoch')} done")
        load_optimizer(self.optimizer, state["optimizer"], checkpoint.path)
        self.best = state["best"] if self.world.is_rank_zero else None
        if checkpoint.of_original:  # its "best" is its latest epoch
            latest = [row for row in self.logs.get("locAcc_val", []) if row][-1:]
            self.best_metric = mean(latest[0]) if latest and state["best"] else 0.0
            return
        self.best_metric = state["best_accuracy"]
        self.epoch_means.restore(state["running"], self.device)
        clock = state.get("clock", {})  # older checkpoints have none
        self.clock = Clock(**clock, device=self.device)
        try:
            # With several ranks, only rank 0's was saved, and no batch continues it.
            if state["machine"].get("processes", 1) == 1:
                self.networks.model.set_hidden_state(state["hidden"])
        except (ValueError, TypeError) as error:
            raise UserError(f"{checkpoint.path}: training can't resume from it: {error}") from error
        before, now = state["machine"], self.machine()
        if all(before.get(part) == now[part] for part in ("device", "processes")):
            flags = self.args.threads, self.world.n_sharing
            machine.keep_threads(before.get("threads"), self.device, *flags)
        self.note_machine_change(before)
        self.note_data_change(state["fingerprint"])

    def note_machine_change(self, before):
        """Print how this machine differs from the one that the run was on."""
        changes = [
            f"{part} {before.get(part, 'unknown')} -> {now}"
            for part, now in self.machine().items()
            if before.get(part) != now
        ]
        if changes:
            print(
                f"note: machine changed ({', '.join(changes)}); results will not be bit-identical"
            )
        if (processes := before.get("processes", 1)) != self.world.size:
            print(
                f"note: batches per step: {processes} -> {self.world.size}; --nGPU {processes} "
                "continues as before"
            )

    def note_data_change(self, fingerprint):
        """Warn if the training or validation set is no longer that of the checkpoint.

        A position in the old training set means nothing in the new one: the epoch ends there.
        """
        old, new = fingerprint.split("-"), self.fingerprint.split("-")
        parts = ("training", "validation", *["noise or impulse response"] * (len(new) - 2))
        for part, before, now in zip(parts, old, new, strict=False):
            if before != now:
                print(
                    f"warning: the {part} set isn't the one that the run used before: its files or "
                    "its list have changed"
                )
        if old[0] != new[0] and self.epoch_means.batches:
            print(f"note: epoch {self.position.epoch} ends here; the next one uses the new set")
            self.position = self.position._replace(pack=END_OF_EPOCH)
