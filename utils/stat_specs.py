"""The syntax of `--captureSetStats`: `name:argument,argument_name:argument,...`.

Names have no underscore; arguments (`ctx_repr`, a directory) may. The last argument of a stat that
draws pictures is their directory.
"""

import re


def split_specs(specs):
    """The `name:argument,...` of each stat, in a list."""
    return re.split(r"_(?=[^_,:/]+:)", specs)


def picture_directories(specs):
    """The last argument of each spec, without repetitions: the directories of pictures."""
    arguments = [spec.partition(":")[2].split(",") for spec in split_specs(specs)]
    return list(dict.fromkeys(last for *_, last in arguments if last))
