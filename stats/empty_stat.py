"""The interface of a stat: a figure, or a picture, of what is captured from a model.

A stat sees the captured tensors batch by batch (`utils.capture` lists their names and shapes),
boils each batch down to a small value, and turns the sum of them into logged numbers. This is a
whole one, which says how long the context vectors are:

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

With a line in the register of `stats.stats_utils`, `--captureSetStats length:ctx_repr` computes it
and `length_ctx_repr_mean` appears in the logs. The methods keep the names that they have in the
original program, so that stats written for it need only a new import.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar


class Stat:
    """What every stat provides; its constructor takes the arguments of its spec, as strings.

    A constructor raises `UserError` for an argument that it can't accept: it runs before any data
    is loaded.
    """

    # Names of the arguments, for the messages about a wrong spec: `name:ARGUMENT,ARGUMENT`.
    arguments: ClassVar[tuple[str, ...]] = ()

    # Names of the captured tensors it reads: the program computes these even if they aren't saved.
    needs: frozenset[str] = frozenset()

    # All flags of the run, once it is known (`StatsCollector` sets them).
    flags: Mapping[str, object] = MappingProxyType({})

    def getStatName(self):
        """A name that no other stat of the run has; it begins the names of the logged values."""
        raise NotImplementedError

    def computeForBatch(self, batch):
        """The value of one batch.

        `batch` maps names to tensors on the model's device, without gradients, with a row for each
        window. The value is made of plain numbers, CPU tensors and dicts, since it also travels
        between processes, and its size must not depend on the number of windows.
        """
        raise NotImplementedError

    def mergeStatResults(self, prev, current):
        """The value of two sets of windows from their values; may change and return `prev`."""
        raise NotImplementedError

    def logStat(self, statValue, epochNr):
        """What is logged of the whole set, as a dict name -> number; also writes any pictures."""
        raise NotImplementedError
