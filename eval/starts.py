"""Tells a run that starts dead from one that starts slowly, while its first epoch runs.

At a learning rate that is too high, the first steps can make all encoded frames alike. Negatives
then look like positives, gradients vanish, and the loss stays that of guessing.
"""

import os

import torch

from feature_loader import build_feature
from model import preserved_state
from utils.misc import mean, percent
from utils.run.console import Listener

MIN_IMPROVEMENT = 0.02  # of the loss before training: below this a run has not learned yet
FEWEST_STEPS = 100  # before a start is called dead
DEAD_BELOW = 0.1  # varying energy: 0.05 to 0.08 in dead runs, 0.3 and more in those that learn
FEWEST_EPOCHS = 3  # of a run whose last loss says something
EPOCHS_BETWEEN_NOTES = 10  # on a loss that stays where it was
FILES_LOOKED_AT = 8


def varying_energy(frames):
    """The share of the energy of `frames` (N, C) that differs from frame to frame, from 0 to 1."""
    frames = frames.detach().double()
    return float(frames.var(0, correction=0).sum() / frames.square().mean(0).sum().clamp(min=1e-30))


class StartWatch(Listener):
    """Notes a loss that stays where it was before training, and what helps.

    state: the run's RunState; dataset: an AudioDataset, to look at some of its files
    """

    def __init__(self, state, dataset):
        self.state, self.dataset = state, dataset
        self.noted = False

    def on_step(self, epoch, batch, n_batches, values, clock):
        """In the first epoch: note, once, that the start is dead."""
        if epoch == 0 and batch >= FEWEST_STEPS and not self.noted:
            self._look(f"in step {batch}", mean(values["locLoss_train"]), only_dead=True)

    def on_epoch(self, epoch, values, clock):
        """Every tenth epoch, and after the last: note that nothing was learned yet."""
        if "locLoss_val" not in values:  # a hook's own
            return
        done, last = epoch + 1, self.state.args.nEpoch
        if done % EPOCHS_BETWEEN_NOTES == 0 or done == last >= FEWEST_EPOCHS:
            self._look(f"in epoch {epoch}", mean(values["locLoss_val"]))

    def _look(self, when, loss, only_dead=False):
        args, start = self.state.args, self.state.logs.get("before_training")
        if not start or not args.learningRate:
            return
        before = mean(start["locLoss_val"])
        if loss <= before - MIN_IMPROVEMENT * abs(before):
            return
        helps = "a lower --learningRate, a --schedulerRamp or another --random_seed"
        if args.initialisation == "original":
            helps = f"a new run with --initialisation lecun, {helps}"
        varying = self._varying_energy() if args.encoder_type == "cpc" else 1
        if varying < DEAD_BELOW:
            self.noted = True
            print(
                f"note: the loss, {before:.4f} before training, is {loss:.4f} {when}, and encoded "
                f"frames are nearly all alike ({percent(varying)} of their energy varies): this "
                f"start is dead. What helps: {helps}",
                flush=True,
            )
        elif not only_dead:
            print(
                f"note: the loss, {before:.4f} before training, is still {loss:.4f} {when}. If "
                f"that doesn't change, try {helps}",
                flush=True,
            )

    def _varying_energy(self):
        """Of the encoded frames of some files, one after the other."""
        model, files = self.state.networks.model, self.dataset.utterances
        some = [files[i * len(files) // FILES_LOOKED_AT] for i in range(FILES_LOOKED_AT)]
        with preserved_state(model):
            model.eval()
            encoded = [
                build_feature(model, os.path.join(self.dataset.root, file.path), get_encoded=True)
                for file in some
            ]
        return varying_energy(torch.cat(encoded, dim=1).flatten(0, 1))
