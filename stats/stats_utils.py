"""The registry of stats, and building them from `--captureSetStats`."""

import argparse
import os
import re
from collections.abc import Iterable

from stats.alignment_stat import AlignmentOccupancyStat
from stats.boundary_stat import BoundaryStat
from stats.empty_stat import Stat
from stats.phone_similarity_stat import PhoneSimilarityStat
from stats.repr_diff_stat import ReprDiffStat
from stats.stats_collector import StatsCollector
from utils.misc import UserError, counted
from utils.run.captured import capturable_names
from utils.stat_specs import split_specs

# A new stat is a class with the interface of `stats.empty_stat.Stat`, and an entry here.
STATS = {
    "reprDiff": ReprDiffStat,
    "boundaries": BoundaryStat,
    "alignOccupancy": AlignmentOccupancyStat,
    "phoneSim": PhoneSimilarityStat,
}

# Captured tensor that not every run has -> the flag that a run needs to have it.
_FLAG_FOR = {
    "phone_align": "--path_phone_data",
    "cpcctc_align": "--CPCCTC",
    "cpcctc_log_scores": "--CPCCTC",
}


def build_stats(args: argparse.Namespace) -> StatsCollector:
    """The StatsCollector of `--captureSetStats`. Raises UserError for specs that can't work."""
    stats = parse_stats(args.captureSetStats) if args.captureSetStats else []
    check_needs(stats, capturable_names(args))
    return StatsCollector(stats, vars(args))


def parse_stats(specs: str) -> list[Stat]:
    """The list of stats specified by `name:argument,argument_name:argument,...`.

    Raises UserError, listing the choices, for an unknown name, a wrong number of arguments, or an
    argument that the stat refuses.
    """
    return [_parse_one(spec) for spec in split_specs(specs)]


def with_absolute_directories(specs: str) -> str:
    """The specs with absolute directories, so that they don't depend on the working directory.

    Invalid specs are returned as they are, and so are all if the path of the working directory has
    a comma or a colon, which specs can't contain.
    """
    absolute = "_".join(map(_with_absolute_directory, split_specs(specs)))
    return specs if re.search("[,:]", os.getcwd()) else absolute


def _with_absolute_directory(spec):
    name, _, arguments = spec.partition(":")
    values = arguments.split(",")
    names = _names_of(STATS[name], values) if name in STATS else []
    if len(names) != len(values):
        return spec
    pairs = zip(names, values, strict=True)
    values = [os.path.abspath(v) if v and n == "DIRECTORY" else v for n, v in pairs]
    return f"{name}:{','.join(values)}"


def _names_of(stat, values):
    """The names of these arguments of a stat; a name in brackets may be left out."""
    fewer = len(values) < len(stat.arguments)
    return [name for name in stat.arguments if not (fewer and name.startswith("["))]


def _parse_one(spec):
    name, _, arguments = spec.partition(":")
    misplaced = re.search(r"([^_,/]*):", arguments)  # it should begin another spec
    if name not in STATS or misplaced:
        raise UserError(
            f"--captureSetStats: no stat {misplaced[1] if misplaced else name!r} (in {spec!r}); "
            f"there are {usage()}"
        )
    stat, arguments = STATS[name], arguments.split(",")
    if len(arguments) != len(_names_of(stat, arguments)):
        raise UserError(
            f"--captureSetStats: {spec!r} has {counted(len(arguments), 'argument')}, where "
            f"{usage(name)} has {len(_names_of(stat, arguments))}"
        )
    return stat(*arguments)


def usage(*names: str) -> str:
    """The syntax of these stats (of all, without names), for messages and help."""
    return ", ".join(f"{name}:{','.join(STATS[name].arguments)}" for name in names or STATS)


def check_needs(stats: Iterable[Stat], available: Iterable[str]) -> None:
    """Raise UserError if a stat needs a captured tensor that isn't among those `available`."""
    for stat in stats:
        for missing in sorted(stat.needs - set(available)):
            raise UserError(
                f"--captureSetStats: {stat.getStatName()} needs {missing}, which needs "
                f"{_FLAG_FOR.get(missing, 'another model')}"
            )
