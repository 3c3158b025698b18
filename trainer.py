"""The loop over epochs: train, validate, run the hooks that are due, log, save.

It can be stopped at any step and goes on exactly there: nothing random has a state that would have
to be kept, since everything is seeded anew from the position in the data.
"""

import contextlib
import math
from pathlib import Path

import torch

from dataset import BatchLoader, Position, on_device
from model import preserved_state
from utils.files import save_json
from utils.misc import UserError, counted, generator_from, seed_from
from utils.report.page import REPORT
from utils.report.plots import draw_curves
from utils.report.run_record import epoch_speed
from utils.run.checkpoint import (
    check_resumable,
    copy_to_cpu,
    load_optimizer,
    remove_old_checkpoints,
    save_checkpoint,
    saved_checkpoints,
)
from utils.run.console import progress
from utils.run.cuda_graph import RecordedPasses
from utils.run.logs import (
    Clock,
    RunningMeans,
    append_epoch,
    has_accuracy,
    mean,
    percent,
    step_name,
)
from utils.run.stopping import Stopped
from utils.schedule import learning_rate

CURVES = "checkpoint_curves.png"
LEARNED = 0.02  # of the validation loss at the start: what less than that is worth a word
EPOCHS_BETWEEN_WORDS = 10  # about a loss that stays where it was
NO_MORE = 2**31  # as the pack of a position: nothing of the epoch is left to train on
STEPS_BETWEEN_AGREEMENTS = 8  # about stopping, among several processes


class TrainStep(torch.nn.Module):
    """Everything that is trained: the criterion, then the model (the original's order).

    One forward pass is what an optimiser, a compiler and data parallelism see.
    """

    def __init__(self, criterion, model):
        super().__init__()
        self.criterion = criterion
        self.model = model

    def forward(self, batch, generator=None):
        """A `Batch` -> losses and accuracies, (1, n) each, one for each prediction step."""
        context, encoded = self.model(batch.waveform, batch.continues)
        label = getattr(batch, self.criterion.target)
        output = self.criterion(context, encoded, label, generator=generator)
        return output.losses, output.accuracies


class Trainer:
    """A run: networks, data, optimiser, and how far it has come.

    args: the flags; step: a TrainStep on `device`; train_set, val_set: AudioDatasets;
    hooks: see eval/hooks.py; report: a RunReport (utils/report/page.py), or None; models: flags of
    each part of a model that began with `--load`, or None; speakers: the names of all, by number,
    if the criterion has weights for each; world: the processes that train together, all with the
    same weights and the same position, each on batches of its own. The first one prints and writes.
    """

    def __init__(
        self,
        args,
        step,
        train_set,
        val_set,
        *,
        hooks,
        device,
        report=None,
        models=None,
        speakers=None,
        world,
    ):
        self.args, self.step, self.hooks, self.device = args, step, hooks, device
        self.report, self.world, self.stop = report, world, world.stop
        self.directory = Path(args.pathCheckpoint)
        self.models, self.speakers = models, speakers
        self.fingerprint = f"{train_set.fingerprint()}-{val_set.fingerprint()}"
        loader = {"batch_size": args.batchSizeGPU, "seed": args.random_seed, "world": world}
        self.train_loader = BatchLoader(
            train_set, sampling=args.samplingType, training=True, **loader
        )
        self.val_loader = BatchLoader(val_set, sampling="sequential", training=False, **loader)
        self.optimizer = torch.optim.Adam(
            step.parameters(),
            lr=args.learningRate,
            betas=(args.beta1, args.beta2),
            eps=args.epsilon,
            fused=True,
        )
        self.network = step  # or what averages its gradients over the processes
        self.passes = self.forward_and_backward  # or what replays its kernels
        if self.can_be_recorded():
            self.passes = RecordedPasses(self.passes, step.parameters(), args.batchSizeGPU)
        self.position = Position(0, 0, 0)  # where training goes on
        self.saved = None  # the position that was saved last
        self.running = RunningMeans(world)  # of the epoch in progress
        self.logs = {"epoch": [], "saveStep": args.save_step, "logging_step": args.logging_step}
        self.best = None
        self.best_accuracy = 0.0 if has_accuracy(args) else -float("inf")
        self.unchecked = []  # steps whose finiteness wasn't looked at yet
        self.steps_since_save = 0
        self.superseded = saved_checkpoints(self.directory) if args.restart else []
        self.clock = Clock()  # of the epoch in progress, or the last one

    # -------------------------------------------------------------------------------- the epochs

    def run(self):
        """Train to the last epoch. Raises Stopped, with everything saved, when asked to stop."""
        done = self.position.epoch
        self.world.agree_on(
            self.fingerprint,
            "not all processes have the same training and validation set: are the lists the same "
            "on all machines?",
        )
        self.world.from_first(self.complete_record)
        if done >= self.args.nEpoch:
            say_finished(done)
            return
        self.network = self.world.wrap(self.step)
        self.val_loader.prepare()
        try:
            if self.position == (0, 0, 0):
                self.log_start()
            while self.position.epoch < self.args.nEpoch:
                self.run_epoch()
        except Stopped:
            if self.position != (0, 0, 0) and self.save():
                print(f"saved in epoch {self.position.epoch}; the same command goes on from there")
            raise
        self.print_summary()

    def complete_record(self):
        """Write what a run that was killed right after a save hadn't written yet."""
        epochs = self.logs["epoch"]
        if epochs and not (self.report and self.report.covers(epochs[-1])):
            with self.stop.deferred():
                self.write_record()

    def run_epoch(self):
        epoch = self.position.epoch
        self.train_epoch(epoch)
        losses, accuracies = self.running.means()
        values = {
            "iter": self.running.batches,
            "locLoss_train": losses,
            "locAcc_train": accuracies,
            "gradNorm_train": self.running.mean_gradient_norm(),
            "learningRate": self.learning_rate(epoch),
            **self.validate(epoch, f"epoch {epoch}: validation"),
        }
        self.print_epoch(epoch, values)
        if (epoch + 1) % EPOCHS_BETWEEN_WORDS == 0 or epoch + 1 == self.args.nEpoch:
            self.tell_if_stuck(values["locLoss_val"])
        failure = self.run_hooks(epoch, values)
        with self.stop.deferred():
            self.end_epoch(epoch, values, save_now=failure is not None)
        if failure:
            raise failure

    def run_hooks(self, epoch, values):
        """Add to `values` what the hooks find; returns the error of one that failed, or None.

        What a hook can't write must not cost the run the epoch that it has just trained.
        """
        for hook in self.hooks:
            if hook.due(epoch):
                try:
                    with preserved_state(self.step.model, self.step.criterion):
                        values.update(hook.run(epoch, self.step.model, self.step.criterion))
                except UserError as error:
                    return error
                except Exception:  # C code, such as that of a picture, may make this of a Stopped
                    self.stop.check()
                    raise
        return None

    def learning_rate(self, epoch):
        args = self.args
        return learning_rate(epoch, args.learningRate, args.schedulerRamp, args.schedulerStep)

    def end_epoch(self, epoch, values, save_now=False):
        append_epoch(self.logs, epoch, values)
        score = self.score(values["locLoss_val"], values["locAcc_val"])
        if score > self.best_accuracy:
            self.best_accuracy, self.best = score, copy_to_cpu(self.step.model.state_dict())
        self.position, self.running = Position(epoch + 1, 0, 0), RunningMeans(self.world)
        last = epoch + 1 == self.args.nEpoch
        saved = True
        if save_now or last or epoch % self.args.save_step == 0:
            saved = self.save(epoch)
        if self.world.is_first:
            self.write_record(epoch_speed(self.clock, self.device, self.world.size))
        lost = f"{self.directory}: the last epoch's checkpoint couldn't be written"
        # Here all wait for the first: one that ended now, after an error, would end it as well.
        self.world.agree(UserError(lost) if last and not saved else None)

    def write_record(self, speed=None):
        """Logs, curves and report of the epochs so far; speed: the `epoch_speed` of the last."""
        try:
            if self.logs["epoch"]:
                save_json(self.directory / "checkpoint_logs.json", self.logs)
                curves = self.directory / CURVES
                draw_curves(self.logs, curves, step_name(self.args), has_accuracy(self.args))
            if self.report:
                self.report.write(self.logs, speed)
        except OSError as error:
            print(f"warning: {self.directory}: logs and pictures not written ({error})")

    def score(self, losses, accuracies):
        """What makes an epoch the best: its accuracy; by CTC, which has none, minus its loss."""
        return mean(accuracies) if has_accuracy(self.args) else -mean(losses)

    # --------------------------------------------------------------------------------- one epoch

    def train_epoch(self, epoch):
        """Train on what is left of the epoch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(epoch)
        self.step.train()
        if self.position == (epoch, 0, 0):
            self.step.model.reset_hidden()
            self.clock = Clock()
        clock = self.clock
        clock.start()
        batches = on_device(self.train_loader.epoch(epoch, self.position), self.device)
        left = self.train_loader.n_batches(epoch, self.position) // self.world.size
        total = self.running.batches + left
        with progress(what=f"epoch {epoch}", unit=" batches", total=total) as bar:
            bar.update(self.running.batches)
            while (item := clock.wait_for(next, batches, None)) is not None:
                with self.stop.deferred():
                    clock.windows += self.world.size * len(item[1].window)
                    self.train_on(*item)
                bar.update()
                if self.running.batches % self.args.logging_step == 0:
                    bar.write(self.progress_line(epoch, total))
                if self.running.batches % STEPS_BETWEEN_AGREEMENTS == 0:
                    self.world.stop_if_asked()
        self.check_finite()
        clock.stop()

    def train_on(self, position, batch):
        """One step of the optimiser on a batch that is on the device.

        `self.position` then says where training goes on.
        """
        torch.manual_seed(seed_from(self.args.random_seed, *position))
        losses, accuracies = self.passes(batch)
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.step.parameters() if p.grad is not None]
        )
        # Where this is 1, the fused optimiser leaves every weight as it is.
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()
        if self.args.clip_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(
                self.step.parameters(), self.args.clip_grad_norm, norm
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.running.add(losses, accuracies, len(batch.window), norm)
        # Past the batches that the processes of higher rank have in this step.
        done = position.batch + self.world.size - self.world.rank
        self.position = position._replace(batch=done)
        self.unchecked.append((position, batch.window, self.optimizer.found_inf, losses))
        self.steps_since_save += 1
        if self.device.type == "cpu" or self.running.batches % self.args.logging_step == 0:
            self.check_finite()
        if self.args.resume_every and self.steps_since_save >= self.args.resume_every:
            self.save()

    def forward_and_backward(self, batch):
        """Losses and accuracies, (1, n) each; leaves the gradients of the losses' sum."""
        with self.autocast():
            losses, accuracies = self.network(batch)
        loss = losses.sum()
        # The gradients of a loss that isn't finite are nan: so all processes see it.
        loss.backward(torch.where(torch.isfinite(loss.detach()), 1.0, math.nan))
        return losses.detach(), accuracies.detach()

    def can_be_recorded(self):
        """Whether --compile may record the passes: alone on a GPU, each step like the others.

        Not so where hidden state is kept, or where a loss (CTC) waits for the device.
        """
        args = self.args
        alike = args.samplingType != "sequential" and not args.supervised
        return args.compile and self.device.type == "cuda" and self.world.size == 1 and alike

    def check_finite(self):
        """Stop at the first step whose loss or gradient wasn't finite; it changed no weight.

        Looking waits for the device, so it is done where that costs little.
        """
        steps, self.unchecked = self.unchecked, []
        bad = torch.stack([found for *_, found, _ in steps]).tolist() if steps else []
        for (position, windows, _, losses), is_bad in zip(steps, bad, strict=True):
            if is_bad:
                files = {self.train_loader.locate(w)[0] for w in windows.tolist()}
                culprits = self.world.gather(None if losses.isfinite().all() else files)
                found = [own for own in culprits if own] or self.world.gather(files)
                self.world.agree(self.not_finite(position, sorted(set().union(*found))))

    def not_finite(self, position, files):
        return UserError(
            f"epoch {position.epoch}, pack {position.pack}, batch {position.batch}: the loss or "
            f"its gradient isn't a finite number (files: {', '.join(files)}). The checkpoints are "
            "sound; look at these files, or lower --learningRate"
        )

    def autocast(self):
        if self.args.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def validate(self, epoch, what):
        """Means over the validation set, for the logs. Leaves kept hidden state as it was."""
        self.step.eval()
        self.world.copy_buffers(self.step)
        with preserved_state(self.step.model):
            running = self.world.together(lambda: self.validation_means(epoch, what))
        losses, accuracies = running.means()
        if not math.isfinite(sum(losses)):
            reason = UserError(
                f"{what}: the loss isn't a finite number. The checkpoints are sound; look at the "
                "validation files, or lower --learningRate"
            )
            self.world.agree(reason)
        return {"locLoss_val": losses, "locAcc_val": accuracies}

    @torch.no_grad()
    def validation_means(self, epoch, what):
        """RunningMeans of this process's share of the validation set."""
        running = RunningMeans(self.world)
        batches = on_device(self.val_loader.epoch(epoch), self.device)
        total = len(self.val_loader)
        for position, batch in progress(batches, what=what, unit=" batches", total=total):
            seed = (self.args.random_seed, epoch, "validation", *position[1:])
            with self.autocast():
                losses, accuracies = self.step(batch, generator_from(*seed))
            running.add(losses, accuracies, len(batch.window))
        return running

    def log_start(self):
        """Validate the networks as they start: what the epochs are to be compared with."""
        values = self.validate(0, "before training: validation")
        self.logs["before_training"] = values
        print(f"before training  validation {self.in_words(*values.values())}")
        if self.world.is_first and not self.superseded:  # the report of an old run stays till then
            self.write_record()

    # ------------------------------------------------------------------------ saving and resuming

    def save(self, epoch=None):
        """Write `checkpoint_<epoch>.pt`, or `checkpoint_resume.pt` where no epoch just ended.

        Returns whether that went well: a full disk is no reason to stop training.
        """
        self.check_finite()
        state, self.steps_since_save = self.state(), 0
        if not self.world.is_first or (epoch is None and self.position == self.saved):
            return True
        try:
            path = save_checkpoint(self.directory, state, epoch)
        except OSError as error:
            print(
                f"warning: {self.directory}: no checkpoint written ({error}). Earlier ones are as "
                "they were, and it is tried again at the next save"
            )
            return False
        self.saved = self.position
        try:
            self.remove_superseded(path, epoch)
        except OSError as error:
            print(f"warning: {self.directory}: old checkpoints can't be removed ({error})")
        return True

    def remove_superseded(self, newest, epoch):
        """Now that `newest` is written: remove those of before a restart, and what --keep says."""
        for old in self.superseded:
            if old != newest:
                old.unlink(missing_ok=True)
        self.superseded = []
        if self.args.keep and epoch is not None:
            best = self.logs["epoch"][self.best_row()]
            remove_old_checkpoints(self.directory, epoch, self.args.keep, best)

    def best_row(self):
        """The place of the best epoch in the lists of the logs."""
        rows = zip(self.logs["locLoss_val"], self.logs["locAcc_val"], strict=True)
        scores = [self.score(*row) for row in rows]
        return scores.index(max(scores))

    def state(self):
        """Everything that a later call needs to resume from here (utils/run/checkpoint.py)."""
        state = {
            "gEncoder": self.step.model.state_dict(),
            "cpcCriterion": self.step.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "best_accuracy": self.best_accuracy,
            "args": vars(self.args),
            "logs": self.logs,
            "position": list(self.position),
            "running": self.running.state(),
            "hidden": self.step.model.hidden_state(),
            "fingerprint": self.fingerprint,
            "machine": self.describe_machine(),
        }
        if self.running.batches:  # between epochs a checkpoint holds nothing but what was computed
            state["clock"] = self.clock.state()
        rest = {"models": self.models, "speakers": self.speakers}
        return state | {key: value for key, value in rest.items() if value}

    def restore(self, checkpoint):
        """Go on from a checkpoint, of this program or of the original."""
        check_resumable(checkpoint, self.step.model.state_dict())
        state = checkpoint.state
        self.position = Position(*state["position"])
        own = self.logs.keys() - {"epoch"}  # the settings of this call
        self.logs |= {key: value for key, value in state["logs"].items() if key not in own}
        print(f"going on from {checkpoint.path}, {counted(self.position.epoch, 'epoch')} done")
        load_optimizer(self.optimizer, state["optimizer"], checkpoint.path)
        self.best = state["best"]
        if checkpoint.of_original:  # its "best" is its latest epoch
            latest = [row for row in self.logs.get("locAcc_val", []) if row][-1:]
            self.best_accuracy = mean(latest[0]) if latest and self.best else 0.0
            return
        self.best_accuracy = state["best_accuracy"]
        self.running.restore(state["running"], self.device)
        self.clock = Clock(**state.get("clock", {}))  # older checkpoints have none
        try:
            # Of several processes each kept that of its own batches, and nothing goes on in it.
            if state["machine"].get("processes", 1) == 1:
                self.step.model.set_hidden_state(state["hidden"])
        except (ValueError, TypeError) as error:
            raise UserError(f"{checkpoint.path}: training can't go on from it: {error}") from error
        self.follow_machine(state["machine"])
        self.follow_sets(state["fingerprint"])

    def follow_machine(self, before):
        """Say what is different from the machine that the run was on."""
        changes = [
            f"{what} {before.get(what, 'unknown')} -> {now}"
            for what, now in self.describe_machine().items()
            if before.get(what) != now
        ]
        if changes:
            print(
                f"note: not as it was: {', '.join(changes)}; the results won't be the same to the "
                "last bit"
            )
        if (processes := before.get("processes", 1)) != self.world.size:
            print(
                f"note: batches in a step: {processes} -> {self.world.size}; --nGPU {processes} "
                "goes on as it was"
            )

    def follow_sets(self, fingerprint):
        """Say which sets aren't those of the checkpoint any more, by its fingerprint of both.

        A place in the old training set means nothing in the new one: the epoch ends there.
        """
        old, new = fingerprint.split("-"), self.fingerprint.split("-")
        for part, before, now in zip(("training", "validation"), old, new, strict=False):
            if before != now:
                print(
                    f"warning: the {part} set isn't the one that the run was on: its files or its "
                    "list were changed"
                )
        if old[0] != new[0] and self.running.batches:
            print(f"note: epoch {self.position.epoch} ends here; the next one uses the new set")
            self.position = self.position._replace(pack=NO_MORE)

    def describe_machine(self):
        """What a run's results depend on to the last bit, beside seed and data."""
        return {
            "device": self.device.type,
            "processes": self.world.size,
            "threads": torch.get_num_threads(),
            "processor": torch.backends.cpu.get_cpu_capability(),
        }

    # ----------------------------------------------------------------------------- what is printed

    def in_words(self, losses, accuracies):
        """The means of a row of losses and one of accuracies."""
        accuracy = f" acc {percent(mean(accuracies))}" if has_accuracy(self.args) else ""
        return f"loss {mean(losses):.4f}{accuracy}"

    def progress_line(self, epoch, total):
        means = self.in_words(*self.running.means_since_mark())
        return f"epoch {epoch}  batch {self.running.batches} of {total}  {means}  {self.clock}"

    def print_epoch(self, epoch, values):
        """An epoch: its means and, where there are several, each validation accuracy."""
        training = self.in_words(values["locLoss_train"], values["locAcc_train"])
        validation = self.in_words(values["locLoss_val"], values["locAcc_val"])
        print(
            f"epoch {epoch}  training {training}  validation {validation}  "
            f"learning rate {values['learningRate']:.3g}  {self.clock}",
            flush=True,
        )
        if name := step_name(self.args):
            accuracies = " ".join(f"{100 * accuracy:.0f}" for accuracy in values["locAcc_val"])
            print(f"    validation accuracy by {name} (%): {accuracies}", flush=True)

    def tell_if_stuck(self, losses):
        """Say so where the validation losses are hardly below those before training."""
        if "before_training" not in self.logs or not self.args.learningRate:
            return
        before, now = mean(self.logs["before_training"]["locLoss_val"]), mean(losses)
        if now > before - LEARNED * abs(before):
            print(
                f"note: the validation loss, {before:.4f} before training, is still {now:.4f}. If "
                "that doesn't change, try another --random_seed, a --schedulerRamp, or another "
                "--learningRate",
                flush=True,
            )

    def print_summary(self):
        """What the run came to, and where to look."""
        epochs, losses, accuracies = (
            self.logs[key] for key in ("epoch", "locLoss_val", "locAcc_val")
        )
        chosen = [
            ("first epoch", 0),
            ("best epoch", self.best_row()),
            ("last epoch", len(epochs) - 1),
        ]
        rows = [
            (f"{name} ({epochs[i]})", mean(losses[i]), mean(accuracies[i])) for name, i in chosen
        ]
        if "before_training" in self.logs:
            values = self.logs["before_training"].values()
            rows.insert(0, ("before training", *map(mean, values)))
        with_accuracy = has_accuracy(self.args)
        print(f"\n{'validation':<20}{'loss':>10}" + f"{'accuracy':>12}" * with_accuracy)
        for name, loss, accuracy in rows:
            print(f"{name:<20}{loss:>10.4f}" + f"{percent(accuracy):>12}" * with_accuracy)
        print(f"{'speed, last epoch':<20}{self.clock}")
        print(f"{'checkpoints, logs':<20}{self.directory}")
        print(f"{'curves':<20}{self.directory / CURVES}")
        if self.report:
            print(f"{'report':<20}{self.directory / REPORT}")


def say_finished(epochs):
    print(f"nothing left to do: {counted(epochs, 'epoch')} done; a larger --nEpoch goes on")
