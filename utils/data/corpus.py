"""The audio files of a database, their speakers, and lists of some of them."""

import os
import re
from typing import NamedTuple

from utils.data.listing import list_audio_files
from utils.files import lines_of
from utils.misc import SAMPLE_RATE, UserError, counted, first_few

LIBRISPEECH_FOLDERS = 2  # above a file: the speaker's, the chapter's
LONGEST_NAME = 255  # of a file, on any usual system
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# As files of LibriSpeech are named after their speaker and chapter, with a folder above both.
BELOW_A_SUBSET = re.compile(r".+/([^/]+)/([^/]+)/\1[-_]\2[-_][^/]+")


class Sequence(NamedTuple):
    """One audio file of a corpus, as its header describes it."""

    speaker: int  # index into Corpus.speakers
    path: str  # relative to the root of the database, with "/"
    samples: int
    rate: int = SAMPLE_RATE  # Hz
    fits_int16: bool = True  # mono, and 16 bits hold its samples exactly
    problem: str = ""  # why the file can't be used, if it can't

    @property
    def name(self):
        """What lists and label files call it: the file's name without folder and extension."""
        file = self.path.rpartition("/")[2]
        return file.rpartition(".")[0] or file


class Corpus(NamedTuple):
    """All audio files below `root`: speakers in sorted order, sequences by speaker and name."""

    root: str
    sequences: tuple[Sequence, ...]
    speakers: tuple[str, ...]


def scan_corpus(root, extension=".flac", speaker_level=1, ignore_cache=False, n_threads=8):
    """Find every file below `root` whose name ends with `extension` and read its header.

    The speaker of a file is the first `speaker_level` folders of its path, joined by "/" ("" if
    there are none); speaker ids follow the sorted order of these strings. Files that can't be
    used are kept, with the reason in `problem`, so that ids don't depend on them. The list is kept
    in the database (utils/data/listing.py) and read from there next time, unless `ignore_cache`.

    Returns a `Corpus`. Raises UserError if there is no such directory or no such file in it.
    """
    root = os.fspath(root)
    if not os.path.isdir(root):
        raise UserError(f"no such directory: {root} (--pathDB)")
    columns = list_audio_files(root, extension, ignore_cache, n_threads)
    level = max(0, speaker_level)
    names = ["/".join(path.split("/")[:-1][:level]) for path in columns["path"]]
    speakers = tuple(sorted(set(names)))
    number = {speaker: i for i, speaker in enumerate(speakers)}
    rows = zip((number[name] for name in names), *columns.values(), strict=True)
    return Corpus(root, tuple(in_order(map(Sequence._make, rows))), speakers)


def open_corpus(args):
    """The Corpus of --pathDB, with warnings where that may be a folder too high."""
    corpus = scan_corpus(
        args.pathDB,
        args.file_extension,
        ignore_cache=args.ignore_cache,
        n_threads=args.n_process_loader,
    )
    warn_of_single_speaker(corpus)
    warn_of_subsets(corpus)
    return corpus


def in_order(sequences):
    return sorted(sequences, key=lambda s: (s.speaker, s.name, s.path))


def warn_of_single_speaker(corpus):
    """Say so where all files count as one speaker's: --pathDB may be a folder too high."""
    if len(corpus.speakers) > 1:
        return
    speaker = corpus.speakers[0]
    print(
        f"warning: {corpus.root}: one speaker only: the speaker of a file is the first folder "
        f"below --pathDB, and here that is {speaker or 'none'} for every file"
    )
    if all(sequence.path.count("/") > LIBRISPEECH_FOLDERS for sequence in corpus.sequences):
        inner = os.path.join(corpus.root, speaker)
        print(f"warning: if the folders in {speaker} are the speakers, give --pathDB {inner}")


def warn_of_subsets(corpus):
    """Say so where each of several subsets counts as one speaker: --pathDB is a folder too high.

    Only the names of the files can tell: they begin with the speaker and the chapter.
    """
    matches = [BELOW_A_SUBSET.fullmatch(sequence.path) for sequence in corpus.sequences]
    if len(corpus.speakers) > 1 and all(matches):
        n_speakers = len({match[1] for match in matches})
        print(
            f"warning: {corpus.root}: {first_few(corpus.speakers)} count as one speaker each: the "
            f"speaker of a file is the first folder below --pathDB. By the files' names there are "
            f"{counted(n_speakers, 'speaker')}: give --pathDB one of these folders, or one with "
            "links to the speakers in all of them"
        )


def read_sequence_list(path):
    """The names in a list: one per line, without the blanks that end it; empty lines are ignored.

    Raises UserError if the file can't be read, names nothing, or is no such list.
    """
    names = [name for line in lines_of(path) if (name := line.rstrip())]
    if not names:
        raise UserError(f"{path}: an empty list of sequences")
    if any(len(name) > LONGEST_NAME or CONTROL.search(name) for name in names):
        raise UserError(
            f"{path}: doesn't look like a list of names, one in each line: some are longer than "
            f"{LONGEST_NAME} characters or hold control characters"
        )
    return names


def select_sequences(sequences, names, list_path):
    """The sequences whose name is among `names`, sorted by name; `list_path` is for messages.

    Files of the same name in different folders are all kept. Says how many names have no file.
    Raises UserError if none has one.
    """
    wanted = set(names)
    chosen = sorted((s for s in sequences if s.name in wanted), key=lambda s: s.name)
    missing = sorted(wanted - {s.name for s in chosen})
    if not missing:
        return chosen
    found = (
        f"{list_path}: {len(missing)} of {len(wanted)} names have no file in the database: "
        f"{first_few(missing)} (names go without folder and extension; files that are new in the "
        "database are seen with --ignore_cache)"
    )
    if not chosen:
        raise UserError(found)
    print(found)
    return chosen


def keep_percentage(sequences, percentage):
    """About `percentage` % of the sequences (above 0), spread evenly over their order."""
    kept = []
    for i, sequence in enumerate(sequences):
        if 100 * len(kept) / (i + 1) < percentage:
            kept.append(sequence)
    return kept


def keep_total(sequences, total):
    """`total` of the sequences, or all where there are fewer, spread evenly over their order."""
    step = max(len(sequences) / total, 1.0)
    kept, last = [], -1.0
    for i, sequence in enumerate(sequences):
        if i >= round(last + step):
            kept.append(sequence)
            last += step
    return kept
