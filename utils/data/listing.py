"""Finding the audio files of a database, and caching their list in its root."""

import json
import os
from collections import Counter

from utils.data.audio import LONGEST_FILE, read_header
from utils.data.workers import Workers
from utils.files import atomic_path, check_regular
from utils.misc import SAMPLE_RATE, UserError, counted, first_few
from utils.run.command import DefaultExtension

LISTING = ".cpc_listing.json"  # in the root of the database
FORMAT = 1
AUDIO = frozenset(  # extensions of the files that libsndfile reads, in lower case
    ".aif .aifc .aiff .au .caf .flac .mp3 .nist .oga .ogg .opus .rf64 .snd .sph .w64 .wav".split()
)
SECONDS_OF_WRITING = 10  # writing the listing changes its own folder
COLUMNS = {"path": str, "samples": int, "rate": int, "fits_int16": bool, "problem": str}


def list_audio_files(root, extension, ignore_cache=False, n_threads=8):
    """All files below `root` whose names end with `extension`, as columns: name -> list.

    extension: a DefaultExtension is replaced by what `choose_extension` finds

    Columns are the path relative to `root` and the fields of `Header`. Unless `ignore_cache`, they
    come from the listing of an earlier call, and only files that were unusable are opened again.
    Returns the extension and the columns. Raises UserError if there is no such file.
    """
    columns, tree = None if ignore_cache else _load(root, extension), None
    if columns is None and isinstance(extension, DefaultExtension):
        tree, default = _walk(root), extension
        extension = choose_extension(root, default, tree=tree)
        if extension != default and not ignore_cache:
            columns = _load(root, extension)
    if columns is None:
        paths = find_files(root, extension, tree)
        headers = _read_headers(root, paths, n_threads)
        columns = dict(zip(COLUMNS, [paths, *map(list, zip(*headers, strict=True))], strict=True))
        _store(root, extension, columns)
        return str(extension), columns
    _report_changes(root, columns["path"], n_threads)
    properties = enumerate(zip(columns["rate"], columns["problem"], strict=True))
    unusable = [i for i, (rate, problem) in properties if problem or rate != SAMPLE_RATE]
    headers = _read_headers(root, [columns["path"][i] for i in unusable], n_threads)
    for i, header in zip(unusable, headers, strict=True):
        for name, value in header._asdict().items():
            columns[name][i] = value
    return str(extension), columns


def _report_changes(root, paths, n_threads):
    """Print a note if files may have been added or removed since the listing was written.

    The listing isn't updated: otherwise a resumed run would silently get another corpus.
    """
    listed = os.stat(os.path.join(root, LISTING)).st_ctime + SECONDS_OF_WRITING
    folders = sorted(_folders_of(paths))
    times = Workers(lambda folder: _changed(os.path.join(root, folder)), folders, n_threads)
    times = times.results("looking for changes", " folders")
    changed = [f or "." for f, time in zip(folders, times, strict=True) if time > listed]
    if changed:
        print(
            f"note: {root}: {counted(len(changed), 'folder')} changed since the files were listed: "
            f"{first_few(changed)} (--ignore_cache lists them again)"
        )


def _folders_of(paths):
    """All folders that contain these paths, directly or not; "" is the root."""
    folders = set()
    for folder in {path.rpartition("/")[0] for path in paths}:
        while folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    return folders


def _changed(folder):
    """The time when a file was last added to or removed from a folder; 0 if the folder is gone."""
    try:
        return os.stat(folder).st_mtime
    except OSError:
        return 0.0


def _read_headers(root, paths, n_threads):
    workers = Workers(lambda path: read_header(os.path.join(root, path)), paths, n_threads)
    return workers.results("reading headers", " files")


# ------------------------------------------------------------------------------- finding the files


def choose_extension(root, extension, kinds=AUDIO, tree=None):
    """`extension` if the user gave it; otherwise that of the only kind of files below `root`.

    kinds: extensions in lower case. If files of several kinds are found, the DefaultExtension is
    used, with a message; if no file has it, a UserError lists the kinds.
    tree: the result of `_walk`, if it is known
    """
    if not isinstance(extension, DefaultExtension):
        return extension
    endings = Counter(os.path.splitext(path)[1] for path in (tree or _walk(root))[0])
    found = Counter({ending: n for ending, n in endings.items() if ending.lower() in kinds})
    if len(found) == 1:
        return next(iter(found))
    if found and extension not in found:
        raise UserError(
            f"{root}: holds several kinds of files, {_counts(found)}: choose one with "
            "--file_extension"
        )
    if found:
        print(
            f"{root}: there are {_counts(found)}: those that end with {extension} are used "
            "(--file_extension)"
        )
    return str(extension)


def find_files(root, extension, tree=None):
    """Sorted paths, relative to `root` and with "/", of all files ending with `extension`.

    Leaves out hidden files, such as the `._name` that macOS writes beside a file, and prints their
    number. Reports unreadable folders. Raises UserError, with the extensions found, if none is
    left. tree: the result of `_walk`, if it is known
    """
    paths, hidden, unreadable = tree or _walk(root)
    if unreadable:
        print(f"{root}: {len(unreadable)} folders can't be read: {first_few(unreadable)}")
    n_hidden = sum(path.endswith(extension) for path in hidden)
    if n_hidden:
        print(f"{root}: left out {counted(n_hidden, 'file')}, hidden by a dot before a name")
    found = sorted(path for path in paths if path.endswith(extension))
    if not found:
        others = _counts(Counter(os.path.splitext(path)[1] for path in paths))
        there = f"there are {others} (--file_extension)" if paths else "there are no files in it"
        raise UserError(f"{root}: no file ends with {extension!r}; {there}")
    return found


def _walk(root):
    """Paths of all files below `root`, of hidden files (by a dot), and unreadable folders.

    Follows links to folders, except to those that contain the link.
    """
    paths, hidden_paths, unreadable = [], [], []
    pending = [("", frozenset())]
    while pending:
        folder, above = pending.pop()
        hidden = _is_hidden(folder)
        try:
            status = os.stat(os.path.join(root, folder))
            entries = list(os.scandir(os.path.join(root, folder)))
        except OSError as error:
            unreadable += [] if hidden else [f"{folder or '.'} ({error.strerror})"]
            continue
        this = (status.st_dev, status.st_ino)
        for entry in entries if this not in above else ():
            path = f"{folder}/{entry.name}" if folder else entry.name
            if _is_folder(entry):
                pending.append((path, above | {this}))
            elif not _is_hidden(path):
                paths.append(path)
            elif entry.name != LISTING:
                hidden_paths.append(path)
    return paths, hidden_paths, unreadable


def _is_hidden(path):
    """Whether a name in the path, relative to the root, begins with a dot."""
    return "/." in f"/{path}"


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a circular link, or no permission
        return False


def _counts(extensions):
    """A Counter of extensions for a message, the most frequent first."""
    return first_few(f"{n} {name or 'without extension'}" for name, n in extensions.most_common())


# -------------------------------------------------------------------------------- cached listing


def _load(root, extension):
    """The columns written by `_store`, or None if there are none or they are invalid."""
    path = os.path.join(root, LISTING)
    try:
        columns = _cached_columns(path).get(extension)
        return None if columns is None else _checked(columns, extension)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        print(f"{path}: can't be used ({error}); the database is listed again")
        return None


def _cached_columns(path):
    """Extension -> columns, unchecked. May raise all sorts of exceptions."""
    check_regular(path)
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']}, not {FORMAT}")
    return dict(content["extensions"])


def _checked(columns, extension):
    """Validate the columns. Raises ValueError, KeyError or TypeError."""
    columns = {name: columns[name] for name in COLUMNS}
    for name, kind in COLUMNS.items():
        if set(map(type, columns[name])) != {kind}:
            raise ValueError(f"column {name} isn't made of {kind.__name__}")
    paths = columns["path"]
    if {len(column) for column in columns.values()} != {len(set(paths))}:
        raise ValueError("its columns don't fit together")
    text = os.fsencode("/" + "/".join(paths))  # raises ValueError for invalid paths
    if b"/." in text:
        raise ValueError("it has names that begin with a dot")
    strange = b"\0" in text or b"//" in text
    if strange or not all(path.endswith(extension) for path in paths):
        raise ValueError("it has paths that can't be those of such files in the database")
    if min(columns["samples"]) < 0 or max(columns["samples"]) > LONGEST_FILE:
        raise ValueError("it has impossible lengths")
    return columns


def _store(root, extension, columns):
    """Cache a listing along with those of other extensions, unless the database is read-only."""
    path = os.path.join(root, LISTING)
    try:
        others = _cached_columns(path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        others = {}
    content = {"format": FORMAT, "extensions": {**others, extension: columns}}
    try:
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, separators=(",", ":"))
    except OSError as error:
        print(f"{root}: the list of its files can't be cached there ({error.strerror or error})")
