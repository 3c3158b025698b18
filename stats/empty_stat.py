"""The interface of a stat: numbers and pictures computed from what is captured of a model.

A stat sees the captured tensors batch by batch (`utils.capture` lists their names and shapes),
reduces each batch to a small value, and turns the sum of these into logged numbers. A complete
example, the mean length of the context vectors:

    from stats.empty_stat import Stat

    class LengthStat(Stat):
        arguments = ("REPR",)

        def __init__(self, representation):
            self.representation = representation
            self.needs = frozenset({representation})

        def getStatName(self):
            return f"length_{self.representation}"

        def computeForBatch(self, batch):
            lengths = batch[self.representation].norm(dim=-1)
            return {"sum": lengths.double().sum().item(), "frames": lengths.numel()}

        def mergeStatResults(self, prev, current):
            return {key: prev[key] + current[key] for key in prev}

        def logStat(self, statValue, epochNr):
            return {"mean": statValue["sum"] / statValue["frames"]}

With an entry in the registry of `stats.stats_utils`, `--captureSetStats length:ctx_repr` runs it
and `length_ctx_repr_mean` appears in the logs. The methods keep their names from the original
program, so that stats written for it need only a new import.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch


class Stat:
    """Base class of stats; the constructor takes the arguments of a stat's spec, as strings.

    It runs before any data is loaded and raises `UserError` for an argument that it can't accept.
    """

    # Names of the arguments, for messages: `name:ARGUMENT,[OPTION],ARGUMENT`, where an [OPTION] may
    # be left out. A DIRECTORY comes last.
    arguments: ClassVar[tuple[str, ...]] = ()

    # Names of the captured tensors it reads; they are computed even if they aren't saved.
    needs: frozenset[str] = frozenset()

    # All flags of the run (`StatsCollector` sets them).
    flags: Mapping[str, object] = MappingProxyType({})

    def getStatName(self) -> str:
        """The name of the stat, unique in the run; a prefix of the names of its logged values."""
        raise NotImplementedError

    def computeForBatch(self, batch: Mapping[str, torch.Tensor]) -> Any:
        """The value of one batch.

        `batch` maps names to tensors on the model's device, without gradients, with a row for each
        window. The value consists of plain numbers, CPU tensors and dicts, since it is also sent
        between processes; its size must not depend on the number of windows.
        """
        raise NotImplementedError

    def mergeStatResults(self, prev: Any, current: Any) -> Any:
        """The value of two sets of windows combined, from their values; may modify `prev`."""
        raise NotImplementedError

    def logStat(self, statValue: Any, epochNr: int) -> dict[str, float]:
        """The numbers to log for the whole set, a dict name -> number; also writes any pictures."""
        raise NotImplementedError
