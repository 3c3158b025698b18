"""The demo corpus in the layout of another corpus, on which a recipe can be tried in minutes.

    python recipes/small_corpus.py timit OUT

Writes below OUT, with synthetic speech and exact alignments (utils/corpus/make_demo.py):

    librispeech    LibriSpeech/{train-clean-100,dev-clean}/SPEAKER/CHAPTER/*.flac, and a TextGrid of
                   each below alignments/
    timit          {TRAIN,TEST}/DR1/SPEAKER/*.WAV (NIST Sphere) and *.PHN, SA1 and SA2 among them
    unwritten      wav/SPEAKER_NUMBER.wav of three speakers, and TextGrids in alignments/
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils.run.before_torch  # noqa: F401

import numpy as np
import soundfile
from praatio import textgrid

from utils.corpus.make_demo import Settings, draw_lexicon, make_utterance, utterance_name
from utils.corpus.synthesiser import PHONE_IDS
from utils.data.labels import SILENCE, runs
from utils.files import writing_to
from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME
from utils.run.command import CommandLine, command

SYMBOLS = {number: symbol for symbol, number in PHONE_IDS.items()}
TRAIN_SPEAKERS, TEST_SPEAKERS = range(4), range(4, 7)
N_UTTERANCES = 5  # of each speaker


def utterances(speakers):
    """(speaker, number, samples, phones) of some speakers' utterances.

    phones: [(first sample, end, symbol)], without gaps, to the end of the utterance
    """
    settings = Settings(len(speakers), N_UTTERANCES, seed=1)
    lexicon = draw_lexicon(np.random.default_rng([settings.seed, 0]))
    for speaker in speakers:
        for number in range(N_UTTERANCES):
            samples, labels = make_utterance(settings, lexicon, speaker, number)
            phones = [
                (SAMPLES_PER_FRAME * start, SAMPLES_PER_FRAME * end, SYMBOLS[phone])
                for start, end, phone in runs(labels.tolist())
            ]
            phones[-1] = (phones[-1][0], len(samples), phones[-1][2])
            yield speaker, number, samples, phones


def write_librispeech(out):
    for subset, speakers in (("train-clean-100", TRAIN_SPEAKERS), ("dev-clean", TEST_SPEAKERS)):
        for speaker, number, samples, phones in utterances(speakers):
            name = utterance_name(speaker, number)
            path = Path(subset, *name.split("-")[:2], name)
            write_audio(out / "LibriSpeech" / f"{path}.flac", samples)
            write_textgrid(out / "alignments" / f"{path}.TextGrid", phones)


def write_timit(out):
    for part, speakers in (("TRAIN", TRAIN_SPEAKERS), ("TEST", TEST_SPEAKERS)):
        for speaker, number, samples, phones in utterances(speakers):
            sentence = f"SA{number + 1}" if number < 2 else f"SI{1000 + 10 * speaker + number}"
            path = out / part / "DR1" / f"FAA{speaker}0" / sentence
            write_audio(path.with_suffix(".WAV"), samples, format="NIST")
            lines = (f"{a} {b} {'h#' if p == SILENCE else p.lower()}\n" for a, b, p in phones)
            path.with_suffix(".PHN").write_text("".join(lines))


def write_unwritten(out):
    for speaker, number, samples, phones in utterances(range(3)):
        name = f"speaker{speaker}_{number:03d}"
        write_audio(out / "wav" / f"{name}.wav", samples)
        write_textgrid(out / "alignments" / f"{name}.TextGrid", phones)


def write_audio(path, samples, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16", **options)


def write_textgrid(path, phones):
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [(a / SAMPLE_RATE, b / SAMPLE_RATE, p) for a, b, p in phones if p != SILENCE]
    grid = textgrid.Textgrid()
    grid.addTier(textgrid.IntervalTier("phones", entries, 0, phones[-1][1] / SAMPLE_RATE))
    grid.save(str(path), "long_textgrid", includeBlankSpaces=True)


LAYOUTS = {"librispeech": write_librispeech, "timit": write_timit, "unwritten": write_unwritten}


@command
def main(argv=None):
    parser = CommandLine(prog="small_corpus.py", description=__doc__)
    parser.add_argument("layout", choices=LAYOUTS, help="whose layout")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    args = parser.parse_args(argv)
    with writing_to(args.out, errors=(OSError, soundfile.SoundFileError)):
        LAYOUTS[args.layout](args.out)
    print(f"{args.out}: synthetic speech in the layout of {args.layout}")


if __name__ == "__main__":
    sys.exit(main())
