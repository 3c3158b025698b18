"""Distinguishes a dead start of a run from a slow one, while its first epoch runs.

Also names a boundary policy that has collapsed.

At a learning rate that is too high, the first steps can make all encoded frames alike. Negatives
then look like positives, gradients vanish, and the loss stays that of guessing.
"""

import torch

from model import preserved_state
from utils.misc import BOUNDARY_RATE, mean, percent
from utils.run.console import Listener

MIN_IMPROVEMENT = 0.02  # of the loss before training: below this a run has not learned yet
FEWEST_STEPS = 100  # before a start is called dead
DEAD_BELOW = 0.1  # varying energy: 0.05 to 0.08 in dead runs, 0.3 and more in those that learn
FEWEST_EPOCHS = 3  # of a run whose last loss is judged
EPOCHS_BETWEEN_NOTES = 10  # on a loss that stays where it was
COLLAPSED = 1, 20  # boundaries per second: hardly any, and nearly as many as may be (25)


def varying_energy(frames):
    """The fraction, 0 to 1, of the energy of `frames` (N, C) that differs from frame to frame."""
    frames = frames.detach().double()
    return float(frames.var(0, correction=0).sum() / frames.square().mean(0).sum().clamp(min=1e-30))


class StartWatch(Listener):
    """Notes a loss that stays where it was before training, and what helps.

    state: the run's RunState; loader: the BatchLoader of the validation set, whose first batch is
    looked at
    """

    def __init__(self, state, loader):
        self.state, self.loader = state, loader
        self.next_look, self.noted, self.batch = FEWEST_STEPS, False, None
        self.collapsed = 0  # 1: no boundaries, -1: all

    def on_step(self, epoch, batch, n_batches, values, clock):
        """In the first epoch, now and then: note, once, that the start is dead."""
        if epoch == 0 and batch >= self.next_look:
            self.next_look = 2 * batch
            self._look(f"in step {batch}", mean(values["locLoss_train"]), only_dead=True)

    def on_epoch(self, epoch, values, clock):
        """After the first epoch the same; after every tenth and the last, note slow starts, too."""
        if "locLoss_val" not in values:  # a hook's own
            return
        self._note_collapse(epoch, values.get(f"{BOUNDARY_RATE}_val"))
        done, last, loss = epoch + 1, self.state.args.nEpoch, mean(values["locLoss_val"])
        if done % EPOCHS_BETWEEN_NOTES == 0 or done == last >= FEWEST_EPOCHS:
            self.noted = False
            self._look(f"in epoch {epoch}", loss)
        elif epoch == 0:
            self._look("after an epoch", loss, only_dead=True)

    def _note_collapse(self, epoch, rate):
        """Note, when it begins, that a policy finds hardly any boundaries or as many as it can."""
        if rate is None:
            return
        fewest, most = COLLAPSED
        before, self.collapsed = self.collapsed, (rate < fewest) - (rate > most)
        if self.collapsed and self.collapsed != before:
            what = "no boundaries" if self.collapsed > 0 else "a boundary wherever one may be"
            print(
                f"note: epoch {epoch}: the boundary policy has collapsed: it finds {what} "
                f"({rate:.1f} per second in validation). Early in training that often passes; "
                "eval/README.md, Learned boundaries, has flags for small corpora",
                flush=True,
            )

    def _look(self, when, loss, only_dead=False):
        args, start = self.state.args, self.state.logs.get("before_training")
        if self.noted or not start or not args.learningRate:
            return
        before = mean(start["locLoss_val"])
        if loss <= before - MIN_IMPROVEMENT * abs(before):
            return
        helps, verdict = "a lower --learningRate, a --schedulerRamp or another --random_seed", "is"
        has_choice = args.encoder_type == "cpc" and not self.state.models
        if args.initialisation == "original" and has_choice:
            helps, verdict = f"a new run with --initialisation lecun, {helps}", "may be"
        varying = self._varying_energy() if args.encoder_type == "cpc" else 1
        if varying < DEAD_BELOW:
            self.noted = True
            print(
                f"note: the loss, {before:.4f} before training, is {loss:.4f} {when}, and encoded "
                f"frames are nearly all alike ({percent(varying)} of their energy varies): this "
                f"start {verdict} dead. What helps: {helps}",
                flush=True,
            )
        elif not only_dead:
            print(
                f"note: the loss, {before:.4f} before training, is still {loss:.4f} {when}. If "
                f"that doesn't change, try {helps}",
                flush=True,
            )

    @torch.no_grad()
    def _varying_energy(self):
        """Of the encoded frames of the first batch of each process, the mean. All must call it."""
        model, device = self.state.networks.model, self.state.device
        if self.batch is None:
            self.batch = next(self.loader.epoch(0), (None, None))[1]
        with preserved_state(model):
            encoded = self.batch and model.eval()(self.batch.to(device).waveform)[1]
        own = None if encoded is None else varying_energy(encoded.flatten(0, 1))
        return mean([v for v in self.state.world.all_gather(own) if v is not None])
