"""Convert forced alignments to the phone labels that this program reads.

    python utils/corpus/convert_alignments.py ALIGNMENTS OUT --strip_stress

ALIGNMENTS is a folder of Praat TextGrids, as the Montreal Forced Aligner writes them (those in its
folders count, too), or a CTM file, `name channel start duration phone` a line. Below OUT it writes

    converted_aligned_phones.txt    `name id id ...` a line, an id for every 10 ms
    phones.txt                      `id symbol` a line, silence first, the others in sorted order

Label i is the phone at sample 160 i + 80 of the audio at 16 kHz. The name of a TextGrid is that of
its file without extension. To label further audio with the ids of an earlier call, or of a trained
model, give its phones.txt with --phones.
"""

import os
import re
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from utils.corpus.alignments import (
    LABELS,
    SILENCE,
    SYMBOLS,
    Interval,
    frame_symbols,
    read_symbols,
    read_text,
    write_labels,
    write_symbols,
)
from utils.listing import find_files
from utils.logs import progress
from utils.misc import CommandLine, UserError, command

OVERLAP = 0.011  # seconds; times in CTM files are often rounded to 10 ms
STRESS = re.compile(r"([A-Z]+)[0-2]")  # AH0, AH1, AH2
POSITION = re.compile(r"(.+)_[BIES]")  # Kaldi's AH0_B: beginning, inside, end of a word, single
FIELD = re.compile(r"\s*(?:xmin|xmax|time|number)\s*=\s*(.*?)\s*")
TEXT = re.compile(r"\s*(?:text|mark|name|class)\s*=\s*(.*?)\s*")


@command
def main(argv=None):
    args = build_parser().parse_args(argv)
    known = read_symbols(args.phones) if args.phones else None
    if known and args.silence_symbol not in known:
        raise UserError(f"{args.phones}: has no {args.silence_symbol}; name its silence by "
                        "--silence_symbol")
    if os.path.isdir(args.alignments):
        utterances = read_textgrids(args)
    else:
        utterances = read_ctm(args.alignments)
    phones = {name: convert(utterance, args) for name, utterance in utterances.items()}
    symbols = known or number_symbols(phones, args.silence_symbol)
    labels = {}
    for name, row in phones.items():
        unknown = set(row) - symbols.keys()
        if unknown:
            raise UserError(f"{name}: its phone {min(unknown)} isn't in {args.phones}")
        labels[name] = [symbols[symbol] for symbol in row]
    try:
        write_labels(os.path.join(args.out, LABELS), labels)
        write_symbols(os.path.join(args.out, SYMBOLS), symbols)
    except OSError as error:
        raise UserError(f"{args.out}: can't be written to ({error.strerror})") from error
    hours = sum(map(len, labels.values())) / 360_000
    print(f"{len(labels)} utterances, {hours:.2f} h, {len(symbols)} phones: {args.out}")
