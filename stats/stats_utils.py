"""The register of stats, and how `--captureSetStats` asks for them."""

import os
import re

from stats.alignment_stat import AlignmentOccupancyStat
from stats.boundary_stat import BoundaryStat
from stats.phone_similarity_stat import PhoneSimilarityStat
from stats.repr_diff_stat import ReprDiffStat
from stats.stats_collector import StatsCollector
from utils.misc import UserError
from utils.run.flags import capturable_names

# A new stat is a class with the interface of `stats.empty_stat.Stat`, and a line here.
STATS = {
    "reprDiff": ReprDiffStat,
    "boundaries": BoundaryStat,
    "alignOccupancy": AlignmentOccupancyStat,
    "phoneSim": PhoneSimilarityStat,
}

# What a run must have for a captured tensor to exist, where not every run has it.
_FLAG_FOR = {
    "phone_align": "--path_phone_data",
    "cpcctc_align": "--CPCCTC",
    "cpcctc_log_scores": "--CPCCTC",
}


def build_stats(args):
    """The StatsCollector of `--captureSetStats`. Raises UserError for specs that can't work."""
    stats = parse_stats(args.captureSetStats) if args.captureSetStats else []
    check_needs(stats, capturable_names(args))
    return StatsCollector(stats, vars(args))


def parse_stats(specs):
    """The stats asked for by `name:argument,argument_name:argument,...`, in a list.

    Stats are split only at an underscore that a registered name and a colon follow, since
    arguments (`ctx_repr`, a directory) may have underscores as well. Raises UserError, saying what
    there is, for an unknown name, a wrong number of arguments, or one that the stat refuses.
    """
    return [_parse_one(spec) for spec in _split(specs)]


def _split(specs):
    names = "|".join(map(re.escape, STATS))
    return re.split(rf"_(?=(?:{names}):)", specs)


def with_absolute_directories(specs):
    """The same specs, so that they mean the same directories from every working directory.

    Where the path of the working directory has a sign of this little language in it, or a spec is
    wrong, it stays as it is.
    """
    absolute = "_".join(map(_with_absolute_directory, _split(specs)))
    return specs if re.search("[,:]", os.getcwd()) else absolute


def _with_absolute_directory(spec):
    name, _, arguments = spec.partition(":")
    names, values = STATS[name].arguments if name in STATS else (), arguments.split(",")
    if len(names) != len(values):
        return spec
    pairs = zip(names, values, strict=True)
    values = [os.path.abspath(v) if v and n == "DIRECTORY" else v for n, v in pairs]
    return f"{name}:{','.join(values)}"


def picture_directories(specs):
    """The directories in the specs, each once; none of a spec that is wrong."""
    directories = []
    for spec in _split(specs):
        name, _, arguments = spec.partition(":")
        names = STATS[name].arguments if name in STATS else ()
        pairs = zip(names, arguments.split(","), strict=False)
        directories += [value for key, value in pairs if key == "DIRECTORY" and value]
    return list(dict.fromkeys(directories))


def _parse_one(spec):
    name, _, arguments = spec.partition(":")
    misplaced = re.search(r"([^_,/]*):", arguments)  # the name of a stat that isn't registered
    if name not in STATS or misplaced:
        raise UserError(
            f"--captureSetStats: no stat {misplaced[1] if misplaced else name!r} (in {spec!r}); "
            f"there are {usage()}"
        )
    stat, arguments = STATS[name], arguments.split(",")
    if len(arguments) != len(stat.arguments):
        raise UserError(
            f"--captureSetStats: {spec!r} has {len(arguments)} arguments, where "
            f"{usage(name)} has {len(stat.arguments)}"
        )
    return stat(*arguments)


def usage(*names):
    """How these stats are written (all of them, if none is named), for messages and help."""
    return ", ".join(f"{name}:{','.join(STATS[name].arguments)}" for name in names or STATS)


def check_needs(stats, available):
    """Raise UserError if a stat needs a captured tensor that the run can't compute.

    `available`: names of those that it can.
    """
    for stat in stats:
        for missing in sorted(stat.needs - set(available)):
            raise UserError(
                f"--captureSetStats: {stat.getStatName()} needs {missing}, which needs "
                f"{_FLAG_FOR.get(missing, 'another model')}"
            )
