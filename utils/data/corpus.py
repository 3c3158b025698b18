"""The utterances (audio files) of a corpus, their speakers, and how subsets are chosen."""

import math
import os
import re
from collections import Counter
from typing import NamedTuple

import torch

from utils.data.listing import list_audio_files
from utils.data.names import files_by_shortest_key, keys_of, known_key, refuse_ambiguous
from utils.files import lines_of
from utils.misc import SAMPLE_RATE, UserError, counted, first_few, generator_from, nfc
from utils.run.distributed import ALONE

LIBRISPEECH_FOLDERS = 2  # folders above a file: speaker and chapter
GROUP = re.compile(r"dr\d|(train|dev|test|val)(id\w*)?", re.IGNORECASE)  # not names of speakers
LONGEST_NAME = 255  # of a file name, on any common system
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# LibriSpeech: SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-...
BELOW_A_SUBSET = re.compile(r".+/([^/]+)/([^/]+)/\1[-_]\2[-_][^/]+")


class Utterance(NamedTuple):
    """An audio file of a corpus, as described by its header."""

    speaker: int  # speaker id, an index into Corpus.speakers
    path: str  # relative to the root of the corpus, with "/"
    samples: int
    rate: int = SAMPLE_RATE  # Hz
    fits_int16: bool = True  # mono, and 16 bits represent its samples exactly
    problem: str = ""  # why the file is unusable, if it is

    @property
    def name(self):
        """The file name in NFC, without folder and extension, as in lists and label files."""
        file = nfc(self.path.rpartition("/")[2])
        return file.rpartition(".")[0] or file


class Corpus(NamedTuple):
    """All audio files below `root`: sorted speakers, utterances sorted by speaker and name."""

    root: str
    utterances: tuple[Utterance, ...]
    speakers: tuple[str, ...]
    extension: str = ".flac"  # of the files' names


def scan_corpus(root, extension=".flac", speaker_level=1, ignore_cache=False, n_threads=8):
    """Find every file below `root` whose name ends with `extension` and read its header.

    A DefaultExtension is replaced by that of the audio there is (`choose_extension`).

    The speaker of a file is the first `speaker_level` folders of its path, joined by "/" ("" if
    there are none); speaker ids number these names in sorted order. Unusable files are included,
    with the reason in `problem`, so that speaker ids don't depend on them. The list is cached in
    the root (utils/data/listing.py) and reused unless `ignore_cache`.

    Returns a `Corpus`. Raises UserError if there is no such directory or it has no such file.
    """
    root = os.fspath(root)
    if not os.path.isdir(root):
        raise UserError(f"no such directory: {root} (--pathDB)")
    extension, columns = list_audio_files(root, extension, ignore_cache, n_threads)
    level = max(0, speaker_level)
    names = ["/".join(path.split("/")[:-1][:level]) for path in columns["path"]]
    speakers = tuple(sorted(set(names)))
    speaker_id = {speaker: i for i, speaker in enumerate(speakers)}
    rows = zip((speaker_id[name] for name in names), *columns.values(), strict=True)
    return Corpus(root, tuple(sort_utterances(map(Utterance._make, rows))), speakers, extension)


def open_corpus(args, speakers_matter=True, world=ALONE):
    """The Corpus of --pathDB; sets `args.file_extension` to that of its files.

    If speakers matter, warns when --pathDB may be one folder too high.
    """
    options = {"ignore_cache": args.ignore_cache, "n_threads": args.n_process_loader}
    place = args.pathDB, args.file_extension, args.speaker_level
    corpus = world.on_rank_zero(lambda: scan_corpus(*place, **options))
    args.file_extension = corpus.extension
    if speakers_matter:
        warn_of_speakers(corpus)
    return corpus


def sort_utterances(utterances):
    return sorted(utterances, key=lambda u: (u.speaker, u.name, u.path))


def warn_of_speakers(corpus):
    """Warn if the folders taken for speakers may not be speakers; --speaker_level chooses them."""
    warn_of_single_speaker(corpus)
    if not any("/" in speaker for speaker in corpus.speakers):
        warn_of_subsets(corpus)
        warn_of_groups(corpus)


def warn_of_groups(corpus):
    """Warn if speakers hold folders that may be the speakers, as TIMIT's dialect regions do.

    They differ from the chapters of a speaker by names: those of regions or subsets, or of files
    found in several of these folders, like the sentences that all speakers of TIMIT read.
    """
    folders = {}  # (speaker, name of a file) -> folders with a file of this name
    for utterance in corpus.utterances:
        parts = utterance.path.split("/")
        if len(parts) <= LIBRISPEECH_FOLDERS:
            return
        folders.setdefault((parts[0], utterance.name), set()).add(parts[1])
    named = all(GROUP.fullmatch(speaker) for speaker in corpus.speakers)
    if named or any(len(holding) > 1 for holding in folders.values()):
        print(
            f"warning: {corpus.root}: {first_few(corpus.speakers)} count as speakers, and each "
            "holds only folders: if these are the speakers, give --speaker_level 2"
        )


def warn_of_single_speaker(corpus):
    """Warn if all files belong to one speaker: --pathDB may be a folder too high."""
    if len(corpus.speakers) > 1:
        return
    speaker = corpus.speakers[0]
    print(
        f"warning: {corpus.root}: one speaker only: the speaker of a file is the first folder "
        f"below --pathDB, and here that is {speaker or 'none'} for every file"
    )
    if all(utterance.path.count("/") > LIBRISPEECH_FOLDERS for utterance in corpus.utterances):
        inner = os.path.join(corpus.root, speaker)
        print(
            f"warning: if the folders in {speaker} are the speakers, give --pathDB {inner}, or "
            "--speaker_level 2"
        )


def warn_of_subsets(corpus):
    """Warn if each of several subsets counts as one speaker: --pathDB is a folder too high.

    Detected by file names, which start with the speaker and the chapter in LibriSpeech.
    """
    matches = [BELOW_A_SUBSET.fullmatch(utterance.path) for utterance in corpus.utterances]
    if len(corpus.speakers) > 1 and all(matches):
        n_speakers = len({match[1] for match in matches})
        level = matches[0].string.count("/", 0, matches[0].end(1)) + 1
        print(
            f"warning: {corpus.root}: {first_few(corpus.speakers)} count as one speaker each: the "
            f"speaker of a file is the first folder below --pathDB. By their file names there are "
            f"{counted(n_speakers, 'speaker')}: give --speaker_level {level}, or --pathDB one of "
            "these folders, or one with links to the speakers in all of them"
        )


def read_utterance_list(path):
    """The names in a list, one per line without trailing blanks; empty lines are ignored.

    Raises UserError if the file can't be read, is empty, or isn't a list of names.
    """
    names = [name for line in lines_of(path) if (name := line.rstrip())]
    if not names:
        raise UserError(f"{path}: an empty list of utterances")
    if any(max(map(len, name.split("/"))) > LONGEST_NAME or CONTROL.search(name) for name in names):
        raise UserError(
            f"{path}: doesn't look like a list of names, one per line: some are longer than "
            f"{LONGEST_NAME} characters or contain control characters"
        )
    return names


def utterances_by_key(utterances, keys):
    """Each of these keys (`keys_of` in utils/data/names.py) -> the utterances it may stand for."""
    found = {}
    for utterance in utterances:
        for key in keys_of(utterance.path, utterance.name):
            if key in keys:
                found.setdefault(key, []).append(utterance)
    return found


def select_utterances(utterances, names, list_path):
    """The utterances that `names` refer to, sorted by name; `list_path` is for messages.

    A name that several files have needs folders before it, as in speaker/name. Reports names
    without a file; raises UserError if no name has one, or if a name stands for several files.
    """
    wanted = set(names)
    found = utterances_by_key(utterances, wanted)
    for name, candidates in found.items():
        refuse_ambiguous(list_path, name, [u.path for u in candidates])
    chosen = sorted({u for (u,) in found.values()}, key=lambda u: (u.name, u.path))
    missing = sorted(wanted - found.keys())
    if not missing:
        return chosen
    message = (
        f"{list_path}: {len(missing)} of {len(wanted)} names have no file in the database: "
        f"{first_few(missing)} (write names without extension, alone or after the first folders "
        "below the root; --ignore_cache finds new files)"
    )
    if not chosen:
        raise UserError(message)
    print(f"warning: {message}")
    return chosen


def labels_by_path(labels, utterances, corpus):
    """Path -> labels, for all `utterances` of `corpus` that `labels` (PhoneLabels) include.

    Raises UserError if a line of labels may belong to several files of the corpus.
    """
    found, chosen = utterances_by_key(corpus.utterances, labels.labels), {}
    for utterance in utterances:
        key = known_key(utterance.path, utterance.name, labels.labels)
        if key is not None:
            refuse_ambiguous(labels.path, key, [u.path for u in found[key]])
            chosen[utterance.path] = labels.labels[key]
    return chosen


def listed_utterances(corpus, path=None):
    """The utterances of `corpus` in the list at `path`, or all without one."""
    if path is None:
        return list(corpus.utterances)
    return select_utterances(corpus.utterances, read_utterance_list(path), path)


def listed_files(root, extension, path=None):
    """Name -> path below `root`, as `files_by_shortest_key`, of the files in the list at `path`."""
    files = files_by_shortest_key(root, extension)
    if path is None:
        return files
    utterances = [Utterance(0, file, samples=0) for file in files.values()]
    listed = {u.path for u in select_utterances(utterances, read_utterance_list(path), path)}
    return {name: file for name, file in files.items() if file in listed}


def split_utterances(
    corpus, train_list=None, validation_list=None, *, seed=0, size_window=0, batch_size=1
):
    """Training and validation utterances, from two lists.

    Without a training list, the whole corpus is used; without a validation list, 1 % of the
    training utterances are set aside at random (`seed`) or, if these don't hold a single window of
    `size_window` samples, as many as `enough_for_a_batch` takes.
    """
    training = listed_utterances(corpus, train_list)
    if not validation_list:
        split = set_aside(training, 0.01, seed)
        if total_samples(split[1]) < size_window:
            split = enough_for_a_batch(training, seed, batch_size * size_window)
        return split
    return training, listed_utterances(corpus, validation_list)


def split_corpus(args, corpus):
    """The utterances that a run trains and validates on, with a warning if some are in both."""
    sizes = {"size_window": args.sizeWindow, "batch_size": args.batchSizeGPU}
    split = split_utterances(corpus, args.pathTrain, args.pathVal, seed=args.random_seed, **sizes)
    training, validation = cut_for_debugging(split, last=True) if args.debug else split
    trained_on = {utterance.path for utterance in training}
    shared = [utterance.path for utterance in validation if utterance.path in trained_on]
    if shared:
        print(
            f"warning: {len(shared)} of {counted(len(validation), 'file')} of the validation set "
            f"are in the training set, too: {first_few(shared)}",
            flush=True,
        )
    return training, validation


def set_aside(utterances, fraction, seed):
    """Split off a random fraction of the utterances, at least one. Returns (the others, these)."""
    if len(utterances) < 2:
        problem = next((f"; {u.path}: {u.problem}" for u in utterances if u.problem), "")
        raise UserError(
            f"--pathVal FILE is needed: one utterance can't be split into two sets{problem}"
        )
    order = _shuffled(utterances, seed)
    return _parted(utterances, set(order[: max(1, round(fraction * len(utterances)))]))


def enough_for_a_batch(utterances, seed, n_samples):
    """Set aside usable utterances of all speakers in turn, `n_samples` and one of each if possible.

    At most half of them are set aside, and the last one of a speaker only if there is no other way.
    Returns (the others, these).
    """
    n_usable = Counter(u.speaker for u in utterances if not u.problem)
    turns, n_of = [], Counter()
    for index in _shuffled(utterances, seed):
        speaker = utterances[index].speaker
        if not utterances[index].problem:
            n_of[speaker] += 1
            is_last = n_of[speaker] == n_usable[speaker]
            turns.append((math.inf if is_last else n_of[speaker], index))
    chosen, total = set(), 0
    for turn, index in sorted(turns, key=lambda pair: pair[0])[: len(utterances) // 2]:
        if turn > 1 and total >= n_samples:
            break
        chosen.add(index)
        total += utterances[index].samples
    return _parted(utterances, chosen)


def total_samples(utterances):
    return sum(u.samples for u in utterances if not u.problem)


def _shuffled(utterances, seed):
    generator = generator_from(seed, "validation set")
    return torch.randperm(len(utterances), generator=generator).tolist()


def _parted(utterances, chosen):
    """The utterances whose indices aren't in the set `chosen`, and those whose indices are."""
    return (
        [u for index, u in enumerate(utterances) if index not in chosen],
        [u for index, u in enumerate(utterances) if index in chosen],
    )


def cut_for_debugging(split, *, last=False):
    """The first (or last) 1000 training and 100 validation utterances of a split."""
    return tuple(
        part[-n:] if last else part[:n] for part, n in zip(split, (1000, 100), strict=True)
    )


def keep_percentage(utterances, percentage):
    """About `percentage` % (above 0) of the utterances, evenly spaced."""
    kept = []
    for i, utterance in enumerate(utterances):
        if 100 * len(kept) / (i + 1) < percentage:
            kept.append(utterance)
    return kept


def keep_total(utterances, total):
    """`total` of the utterances, evenly spaced, or all if there are fewer."""
    step = max(len(utterances) / total, 1.0)
    kept, last = [], -1.0
    for i, utterance in enumerate(utterances):
        if i >= round(last + step):
            kept.append(utterance)
            last += step
    return kept
