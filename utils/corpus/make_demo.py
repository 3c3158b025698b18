"""Synthesise a speech corpus with exact phone labels, for trying out the program.

    python utils/corpus/make_demo.py OUT --speakers 20 --utterances 40

Writes below OUT:

    audio/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac    16 kHz, 16 bit; `audio` is for --pathDB
    train_split.txt, test_split.txt    names of utterances; every fifth of each speaker is for tests
    converted_aligned_phones.txt       one utterance per line: name, a phone id for every 10 ms
    phones.txt                         one phone per line: id, symbol
    demo_corpus.json                   the settings and versions of the corpus

Label i is the phone at sample 160 i + 80. The speakers use the made-up words of one language, some
far more frequent than others, with occasional pauses.

The same version, seed and sizes give the same bytes on any number of processors, and a smaller
corpus is a part of a larger one with the same seed. NumPy guarantees its random streams only within
a version, and FLAC files differ between versions of libsndfile; requirements.txt pins both.
"""

import contextlib
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import utils.run.before_torch  # noqa: F401

import numpy as np
import soundfile

from utils.corpus.synthesiser import (
    AFFRICATES,
    DIPHTHONGS,
    FRICATIVES,
    PHONE_IDS,
    SILENCE,
    STOPS,
    VOWELS,
    draw_speaker,
    frame_labels,
    speak,
)
from utils.data.labels import LABELS, SYMBOLS, write_labels, write_symbols
from utils.files import (
    TEMPORARY_PREFIX,
    load_json,
    remove_leftovers,
    save_json,
    write_lines,
    writing_to,
)
from utils.misc import SAMPLE_RATE, UserError
from utils.run.command import CommandLine, at_least, between, command
from utils.run.console import progress
from utils.run.machine import n_processors

VERSION = 1  # of the corpus: increase it when the same seed gives other bytes
MANIFEST = "demo_corpus.json"
TRAIN_LIST, TEST_LIST = "train_split.txt", "test_split.txt"
N_THREADS = 2  # NumPy and the encoder release Python's lock; more threads gain little

FIRST_SPEAKER = 201
UTTERANCES_PER_CHAPTER = 20
TEST_EVERY = 5  # utterances

N_WORDS = 300
N_SYLLABLES = (0.45, 0.4, 0.15)  # probabilities of words of one, two and three syllables
WORDS_PER_UTTERANCE = (6, 16)
PAUSE = 0.15  # probability of a silence after a word
# Louder than LibriSpeech (about -26 dB). With `--initialisation original`, short runs learn nothing
# from anything quieter.
LEVEL = -13.0  # dB RMS of full scale, before the limiter, which reduces it by 1 dB
LEVEL_SCATTER = 1.0  # dB

NUCLEI = (*VOWELS, *DIPHTHONGS)
OBSTRUENTS = (*STOPS, *FRICATIVES, *AFFRICATES)
CODAS = (*OBSTRUENTS, "M", "N", "NG", "L", "R")
ONSETS = (*OBSTRUENTS, "M", "N", "L", "R", "W", "Y", "HH")
LIQUIDS = ("L", "R", "W")  # may follow an obstruent at the start of a syllable


class Settings(NamedTuple):
    """Everything that the bytes of a corpus depend on."""

    speakers: int
    utterances: int  # per speaker
    seed: int
    version: int = VERSION
    level: float = LEVEL

    def __str__(self):
        return (
            f"--speakers {self.speakers} --utterances {self.utterances} --seed {self.seed} "
            f"--level {self.level:g}, version {self.version}"
        )

    def positions(self):
        """(speaker, utterance) of every utterance, counted from 0, in the order of the files."""
        return list(itertools.product(range(self.speakers), range(self.utterances)))


# The language.


def draw_lexicon(rng):
    """Words of one to three syllables, as lists of phones."""
    return [_draw_word(rng) for _ in range(N_WORDS)]


def _draw_word(rng):
    """Syllables of at most two consonants and a vowel; the last may end in a consonant."""
    word = []
    for _ in range(1 + rng.choice(len(N_SYLLABLES), p=N_SYLLABLES)):
        if rng.random() < 0.9:
            word.append(_pick(ONSETS, rng))
            if word[-1] in OBSTRUENTS and rng.random() < 0.2:
                word.append(_pick(LIQUIDS, rng))
        word.append(_pick(NUCLEI, rng))
    if rng.random() < 0.6:
        word.append(_pick(CODAS, rng))
    return word


def _pick(choices, rng):
    return choices[rng.integers(len(choices))]


def draw_utterance(lexicon, rng):
    """Phones of some words, between silences. Word frequencies follow Zipf and Mandelbrot."""
    frequency = 1 / (np.arange(len(lexicon)) + 4)
    n_words = rng.integers(*WORDS_PER_UTTERANCE)
    phones = [SILENCE]
    for word in rng.choice(len(lexicon), n_words, p=frequency / frequency.sum()):
        phones += lexicon[word]
        if rng.random() < PAUSE:
            phones.append(SILENCE)
    return phones if phones[-1] == SILENCE else [*phones, SILENCE]


# Utterances and files.


def record(waveform, speaker, level, rng):
    """`waveform` (L,) as 16-bit samples at about `level` dB, with the noise of the speaker's room.

    Speech this loud has peaks above full scale: a soft limiter rounds them off.
    """
    waveform = waveform / np.sqrt(np.mean(waveform**2))
    waveform = waveform + 10 ** (speaker.noise_floor / 20) * rng.standard_normal(len(waveform))
    gain = 10 ** ((level + LEVEL_SCATTER * rng.uniform(-1, 1)) / 20)
    return np.round(32767 * np.tanh(gain * waveform)).astype(np.int16)


def make_utterance(settings, lexicon, speaker, utterance):
    """The samples (L,) int16 and labels (L // 160,) of an utterance; both indices start at 0."""
    voice = draw_speaker(np.random.default_rng([settings.seed, 1, speaker]), female=speaker % 2)
    rng = np.random.default_rng([settings.seed, 2, speaker, utterance])
    phones = draw_utterance(lexicon, rng)
    waveform, boundaries = speak(phones, voice, rng)
    return record(waveform, voice, settings.level, rng), frame_labels(phones, boundaries)


def utterance_name(speaker, utterance):
    chapter, number = divmod(utterance, UTTERANCES_PER_CHAPTER)
    return f"{FIRST_SPEAKER + speaker}-{chapter + 1}-{number:04d}"


def is_for_tests(utterance, settings):
    """Every fifth utterance of each speaker; the last one if there are fewer."""
    return utterance % TEST_EVERY == min(TEST_EVERY, settings.utterances) - 1


def audio_path(out, name):
    speaker, chapter, _ = name.split("-")
    return out / "audio" / speaker / chapter / f"{name}.flac"


def write_corpus(out, settings):
    """Write audio, lists and labels below the Path `out`; returns the number of samples."""
    lexicon = draw_lexicon(np.random.default_rng([settings.seed, 0]))

    def write_utterance(position):
        samples, labels = make_utterance(settings, lexicon, *position)
        path = audio_path(out, utterance_name(*position))
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
        return len(samples), labels

    positions = settings.positions()
    threads = ThreadPoolExecutor(min(N_THREADS, n_processors()))
    try:
        written = threads.map(write_utterance, positions)
        bar = progress(written, what="synthesising", unit=" utterances", total=len(positions))
        lengths, labels = zip(*bar, strict=True)
    finally:
        threads.shutdown(cancel_futures=True)
    write_lists(out, settings, positions, labels)
    return sum(lengths)


def write_lists(out, settings, positions, labels):
    """Write the training and test lists, the labels, and the symbols of the phones."""
    names = [utterance_name(*position) for position in positions]
    tests = [is_for_tests(utterance, settings) for _, utterance in positions]
    write_lines(out / TRAIN_LIST, [n for n, test in zip(names, tests, strict=True) if not test])
    write_lines(out / TEST_LIST, [n for n, test in zip(names, tests, strict=True) if test])
    write_labels(out / LABELS, dict(zip(names, labels, strict=True)))
    write_symbols(out / SYMBOLS, PHONE_IDS)


# The command.


def is_complete(out, settings):
    """Whether the Path `out` holds this corpus, with all its files.

    Raises UserError if it holds anything else: two corpora in one directory would be read as one.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is no directory; give the name of a new one")
    manifest = out / MANIFEST
    if not manifest.exists():
        if out.exists() and any(not f.name.startswith(TEMPORARY_PREFIX) for f in out.iterdir()):
            raise UserError(f"{out}: is not empty, and no demo corpus; give the name of a new one")
        return False
    found, made_with = load_json(manifest), None
    with contextlib.suppress(LookupError, TypeError):
        made_with = Settings(**found["settings"])
    if made_with != settings:
        raise UserError(
            f"{out}: holds another demo corpus ({made_with}, not {settings}); "
            "delete it or give the name of a new directory"
        )
    audio = (audio_path(out, utterance_name(*position)) for position in settings.positions())
    texts = (out / name for name in (TRAIN_LIST, TEST_LIST, LABELS, SYMBOLS))
    return bool(found.get("samples")) and all(file.is_file() for file in (*texts, *audio))


def make_corpus(out, settings):
    """Write the corpus below the Path `out` unless it exists; True if it was written.

    The manifest has the number of samples only when the corpus is complete, so that an interrupted
    one is written again.
    """
    if is_complete(out, settings):
        return False
    manifest = {
        "settings": settings._asdict(),
        "numpy": np.__version__,
        "libsndfile": soundfile.__libsndfile_version__,
    }
    with writing_to(out, errors=(OSError, soundfile.SoundFileError)):
        save_json(out / MANIFEST, manifest)
        remove_leftovers(out)
        samples = write_corpus(out, settings)
        save_json(out / MANIFEST, {**manifest, "samples": samples})
    return True


# A flag on two lines reads better than on seven, hence:
# fmt: off


def parse_arguments(argv):
    parser = CommandLine(prog="make_demo.py", description=__doc__)
    add = parser.add_argument
    add("out", metavar="OUT", type=Path, help="a new directory for the corpus")
    add("--speakers", type=at_least(1), default=20, help="number of speakers, half of them women")
    add("--utterances", type=at_least(2), default=40,
        help="utterances per speaker, about 4 s long, every fifth for tests")
    add("--seed", type=at_least(0), default=1,
        help="another seed gives another language and other speakers")
    add("--level", type=between(-60, 0, float), default=LEVEL, metavar="DB",
        help="loudness, in dB RMS of full scale; LibriSpeech has about -26")
    return parser.parse_args(argv)


# fmt: on


@command
def main(argv=None):
    args = parse_arguments(argv)
    settings = Settings(args.speakers, args.utterances, args.seed, level=args.level)
    new = make_corpus(args.out, settings)
    hours = load_json(args.out / MANIFEST)["samples"] / SAMPLE_RATE / 3600
    print(
        f"{args.out}: {settings.speakers} speakers, {settings.speakers * settings.utterances} "
        f"utterances, {hours:.2f} h of speech{'' if new else ', already there'}"
    )


if __name__ == "__main__":
    sys.exit(main())
