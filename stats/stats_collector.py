"""Feeds batches to the stats of a run and collects their values."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from stats.empty_stat import Stat
from utils.misc import UserError


class StatsCollector:
    """All stats of a run: `zeroStats`, then `batchUpdate` for each batch, then `logStats`.

    `flags` (a dict) are those of the run, for the stats. `needs` is the set of captured tensors
    that a batch must have. With several processes, each feeds its own batches; one of them then
    merges the `values` of the others into its own, and logs.
    """

    def __init__(self, stats: Iterable[Stat] = (), flags: Mapping[str, object] | None = None):
        self.flags = dict(flags or {})
        self.stats, self.values, self.needs = {}, {}, frozenset()
        for stat in stats:
            self.registerStat(stat)

    def __len__(self) -> int:
        return len(self.stats)

    def registerStat(self, stat: Stat) -> None:
        """Add a stat. Raises UserError if its name is taken."""
        name = stat.getStatName()
        if name in self.stats:
            raise UserError(f"--captureSetStats: {name} is listed twice")
        stat.flags = self.flags
        self.stats[name] = stat
        self.needs |= stat.needs

    @property
    def directories(self) -> dict[str, Path]:
        """Name of each stat that draws pictures -> their directory."""
        return {n: stat.directory for n, stat in self.stats.items() if hasattr(stat, "directory")}

    def zeroStats(self) -> None:
        """Forget all batches."""
        self.values = {}

    @torch.no_grad()
    def batchUpdate(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Add a batch: a dict name -> tensor, with a row for each window."""
        self.merge({name: stat.computeForBatch(batch) for name, stat in self.stats.items()})

    def merge(self, values: Mapping[str, Any]) -> None:
        """Add the `values` of another collector."""
        for name, value in values.items():
            if name in self.values:
                value = self.stats[name].mergeStatResults(self.values[name], value)
            self.values[name] = value

    def logStats(self, epoch: int) -> dict[str, float]:
        """Draw the pictures; returns the values of all stats, a dict `<stat>_<name>` -> number.

        Stats without a batch or without values are left out.
        """
        return {
            f"{name}_{key}": logged
            for name, value in self.values.items()
            for key, logged in self.stats[name].logStat(value, epoch).items()
        }
