"""Finding files by name, without folder and extension, as lists, labels and items name them."""

import os
from collections import Counter

from utils.data.listing import find_files
from utils.misc import UserError, first_few, nfc


def name_of(path, extension):
    """The name of a file in NFC, without its folder and `extension`."""
    return nfc(os.path.basename(path)[: -len(extension) or None])


def keys_of(path, name):
    """The names that lists and labels may use for a file: with none, some or all of its folders.

    For s1/day/a.wav they are a, s1/a and s1/day/a.
    """
    folders = nfc(path).split("/")[:-1]
    return [name, *("/".join([*folders[:n], name]) for n in range(1, len(folders) + 1))]


def known_key(path, name, known):
    """The longest of a file's keys that is in `known`; None if none is."""
    return next((key for key in reversed(keys_of(path, name)) if key in known), None)


def refuse_ambiguous(source, key, paths):
    """Raise UserError if `key`, in the file `source`, stands for several of these paths."""
    if len(paths) > 1:
        name = os.path.basename(key)
        shown = first_few(os.path.join(os.path.dirname(path), name) for path in paths)
        raise UserError(
            f"{source}: {first_few([key])} may be {first_few(paths)}: write the folder (the "
            f"speaker) before the name, as in {shown}, in lists and labels"
        )


def files_by_key(root, extension, wanted, source):
    """Key -> path relative to `root`, for the `wanted` keys, which were read from `source`.

    Keys are those of `keys_of`. Raises UserError if one stands for two files, or no file ends with
    `extension`.
    """
    paths = {}
    for path in find_files(root, extension):
        for key in keys_of(path, name_of(path, extension)):
            if key in wanted:
                paths.setdefault(key, []).append(path)
    for key, candidates in paths.items():
        refuse_ambiguous(source, key, candidates)
    return {key: path for key, (path,) in paths.items()}


def files_by_shortest_key(root, extension):
    """Key -> path relative to `root`, for all files below it.

    The key is the file's name if no other file has it, else its path without extension.
    """
    paths = find_files(root, extension)
    counts = Counter(name_of(path, extension) for path in paths)
    keys = (keys_of(path, name_of(path, extension)) for path in paths)
    return {
        key[0] if counts[key[0]] == 1 else key[-1]: path
        for key, path in zip(keys, paths, strict=True)
    }


def speakers_by_name(names, separator):
    """Name -> speaker: its folder, or the part of a name without folder before `separator`.

    Warns if no two of several names have the same.
    """
    speakers = {name: os.path.dirname(name) or name.split(separator)[0] for name in names}
    if len({*speakers.values()}) == len(speakers) > 1:
        print("warning: each utterance has its own speaker: --separator ends speakers' names")
    return speakers
