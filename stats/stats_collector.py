"""Feeds batches to the stats of a run and collects what they say."""

import torch

from utils.misc import UserError


class StatsCollector:
    """All stats of a run: `zeroStats`, then `batchUpdate` for each batch, then `logStats`.

    `flags` (a dict) are those of the run, passed on to the stats. `needs` holds the names of the
    captured tensors that a batch must have. In several processes each feeds its own batches; one
    of them then takes in the `values` of the others by `merge`, and logs.
    """

    def __init__(self, stats=(), flags=None):
        self.flags = dict(flags or {})
        self.stats, self.values, self.needs = {}, {}, frozenset()
        for stat in stats:
            self.registerStat(stat)

    def __len__(self):
        return len(self.stats)

    def registerStat(self, stat):
        """Add a stat. Raises UserError if there is one of that name."""
        name = stat.getStatName()
        if name in self.stats:
            raise UserError(f"--captureSetStats: {name} is asked for twice")
        stat.flags = self.flags
        self.stats[name] = stat
        self.needs |= stat.needs

    @property
    def directories(self):
        """Name -> directory of its pictures, of each stat that draws some."""
        return {n: stat.directory for n, stat in self.stats.items() if hasattr(stat, "directory")}

    def zeroStats(self):
        """Forget all batches."""
        self.values = {}

    @torch.no_grad()
    def batchUpdate(self, batch):
        """Take in a batch: a dict name -> tensor, with a row for each window."""
        self.merge({name: stat.computeForBatch(batch) for name, stat in self.stats.items()})

    def merge(self, values):
        """Take in the `values` of another collector."""
        for name, value in values.items():
            if name in self.values:
                value = self.stats[name].mergeStatResults(self.values[name], value)
            self.values[name] = value

    def logStats(self, epoch):
        """Draw the pictures; the logged values of all stats, as a dict `<stat>_<name>` -> number.

        A stat that has seen no batch, or has nothing to say, is left out.
        """
        return {
            f"{name}_{key}": logged
            for name, value in self.values.items()
            for key, logged in self.stats[name].logStat(value, epoch).items()
        }
