"""Files by their names without folder and extension, as lists, labels and items refer to them."""

import os

from utils.data.listing import find_files
from utils.misc import UserError, nfc


def name_of(path, extension):
    """The name of a file in NFC, without its folder and `extension`."""
    return nfc(os.path.basename(path)[: -len(extension) or None])


def files_by_name(root, extension, wanted=None):
    """Name -> path relative to `root` of all files below it, or of those with `wanted` names.

    Raises UserError if two files have the same name, or none ends with `extension`.
    """
    paths = {}
    for path in find_files(root, extension):
        name = name_of(path, extension)
        if wanted is not None and name not in wanted:
            continue
        if name in paths:
            raise UserError(
                f"{root}: {paths[name]} and {path} have the same name without folder and "
                "extension: rename one, or process their folders separately"
            )
        paths[name] = path
    return paths
