"""Convert forced alignments to the phone labels of this program.

    python utils/corpus/convert_alignments.py ALIGNMENTS OUT --strip_stress

ALIGNMENTS is a folder of Praat TextGrids, as the Montreal Forced Aligner writes them (subfolders
are included) or, with --file_extension .PHN, of TIMIT's files with one `begin end phone` per line,
in samples at 16 kHz; or it is a CTM file with one `name channel start duration phone` per line.
Written to OUT:

    converted_aligned_phones.txt    one utterance per line, `name id id ...`, an id for every 10 ms
    phones.txt                      one `id symbol` per line, silence first, the others sorted

Label i is the phone at sample 160 i + 80 of the audio at 16 kHz. The name of an utterance is that
of its TextGrid without extension, after its folders if several have the same name. To label more
audio with the ids of an earlier call or of a trained model, give its phones.txt with --phones.
Existing files that differ are replaced only with --force, since a model may have been trained with
their ids.
"""

import math
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import utils.run.before_torch  # noqa: F401

from praatio import textgrid
from praatio.utilities.errors import PraatioException

from utils.data.labels import (
    FRAMES_PER_SECOND,
    LABELS,
    SILENCE,
    SYMBOLS,
    Interval,
    frame_symbols,
    label_lines,
    read_symbols,
    read_text,
    symbol_lines,
    write_labels,
    write_symbols,
)
from utils.data.listing import choose_extension
from utils.data.names import files_by_shortest_key
from utils.files import check_content, refuse_to_replace, writing_to
from utils.misc import SAMPLE_RATE, UserError, first_few, nfc
from utils.run.command import CommandLine, DefaultExtension, command
from utils.run.console import progress
from utils.run.machine import n_processors
from utils.run.shared_flags import add_extension

STRESS = re.compile(r"([A-Z]+)[0-2]")  # AH0, AH1, AH2
POSITION = re.compile(r"(.+)_[BIES]")  # Kaldi's AH0_B: beginning, inside, end, single
NOT_SPEECH = ("sil", "sp", "SIL", "<sil>", "<eps>")
KINDS = (".textgrid", ".phn")
PHN, TIMIT_SILENCE = ".phn", ("h#", "pau", "epi")
ROUNDING = 0.011  # seconds that intervals may overlap: CTM files are often rounded to 10 ms
MIN_FILES_FOR_PROCESSES = 200
MAX_CTM_FIELDS = 8  # confidence, type and speaker may follow the phone
# Lines of a TextGrid in the long format.
NUMBER = re.compile(r"\s*(?:xmin|xmax|time|number)\s*=(.*)")
TEXT = re.compile(r"\s*(?:class|name|text|mark)\s*=.*")
QUOTED = re.compile(r'[^"]*".*"\s*')
SECTION = re.compile(r"\s*(?:class\s*=.*|(?:intervals|points):\s*size\s*=.*|item\s*\[\]:)\s*")


class Utterance(NamedTuple):
    """The phones of an utterance, and its duration in seconds."""

    name: str
    intervals: list[Interval]
    duration: float
    begin: float = 0.0  # start time in seconds


@command
def main(argv=None):
    args = build_parser().parse_args(argv)
    in_folder = os.path.isdir(args.alignments)
    if in_folder:
        args.file_extension = choose_extension(args.alignments, args.file_extension, KINDS)
    is_phn = args.file_extension.lower() == PHN
    if args.silence is None:
        args.silence = TIMIT_SILENCE if is_phn else NOT_SPEECH
    args.silence = [nfc(symbol) for symbol in args.silence]
    args.silence_symbol = nfc(args.silence_symbol)
    symbols = given_symbols(args)
    if in_folder and args.channel is not None:
        raise UserError("--channel: for CTM files only, TextGrids have tiers (--tier)")
    utterances = read_textgrids(args) if in_folder else read_ctm(args.alignments, args.channel)
    check_origins(args, utterances)
    if spaced := [utterance.name for utterance in utterances if len(utterance.name.split()) > 1]:
        raise UserError(
            f"{args.alignments}: names with blanks can't be used in label files, rename these "
            f"and their audio: {first_few(spaced)}"
        )
    phones = {utterance.name: phones_of(utterance, args) for utterance in utterances}
    too_short = [name for name in phones if not phones[name]]
    phones = {name: row for name, row in phones.items() if row}
    if not phones:
        raise UserError(
            f"{args.alignments}: no utterance in it has phones; give a folder of TextGrids, or a "
            "CTM file of lines `name channel start duration phone`, with times in seconds"
        )
    if too_short:
        print(f"left out {len(too_short)}, shorter than a frame: {first_few(too_short)}")
    symbols = symbols or number_symbols(phones, args.silence_symbol)
    labels = {name: ids_of(name, row, symbols, args) for name, row in phones.items()}
    write_files(args, labels, symbols)
    hours = sum(map(len, labels.values())) / FRAMES_PER_SECOND / 3600
    print(f"{len(labels)} utterances, {hours:.2f} h, {len(symbols)} phones: {args.out}")


# A flag on two lines reads better than on seven, hence:
# fmt: off


def build_parser():
    parser = CommandLine(prog="convert_alignments.py", description=__doc__)
    add = parser.add_argument
    add("alignments", help="folder of TextGrids, or a CTM file")
    add("out", help=f"folder to write {LABELS} and {SYMBOLS} to")
    add("--strip_stress", action="store_true", help="AH0, AH1, AH2 become AH")
    add("--strip_position", action="store_true", help="AH_B, AH_I, AH_E, AH_S (Kaldi) become AH")
    add("--silence", nargs="*", metavar="SYMBOL",
        help="symbols that aren't speech, besides gaps and empty intervals; one symbol replaces "
        f"them (default: {' '.join(NOT_SPEECH)}; for {PHN} files {' '.join(TIMIT_SILENCE)})")
    add("--silence_symbol", default=SILENCE, metavar="SYMBOL",
        help=f"the symbol that replaces them (default: {SILENCE})")
    add("--phones", metavar="FILE", help="phones.txt with the ids to use (default: new ids)")
    add("--tier", default="phones", help='tier of the TextGrids; "SPEAKER - TIER" is accepted if '
        "there is only one speaker")
    add_extension(add, default=DefaultExtension(".TextGrid"), files="TextGrids")
    add("--channel", metavar="NAME", help="channel of a CTM file to convert; needed if an "
        "utterance has several (default: its only one)")
    add("--n_process", type=int, default=n_processors(), metavar="N",
        help="processes that read TextGrids (default: one per processor that may be used)")
    add("--force", action="store_true", help="replace existing files")
    return parser


# fmt: on


def write_files(args, labels, symbols):
    """Write both files, or neither if one would be replaced without --force."""
    label_file, symbol_file = (os.path.join(args.out, name) for name in (LABELS, SYMBOLS))
    if not args.force:
        refuse_to_replace(label_file, label_lines(labels), "labels")
        refuse_to_replace(symbol_file, symbol_lines(symbols), "symbols")
    with writing_to(args.out):
        write_labels(label_file, labels)
        write_symbols(symbol_file, symbols)


# ------------------------------------------------------------------------------------- labels


def given_symbols(args):
    """The symbols of `--phones`, symbol -> id, or None."""
    if args.phones is None:
        return None
    symbols = read_symbols(args.phones)
    if args.silence_symbol not in symbols:
        raise UserError(
            f"{args.phones}: has no {args.silence_symbol}; --silence_symbol names its silence"
        )
    return symbols


def number_symbols(phones, silence):
    """New ids, symbol -> id: silence is 0, the others follow in sorted order."""
    found = set().union(*phones.values()) - {silence}
    return {symbol: number for number, symbol in enumerate([silence, *sorted(found)])}


def phones_of(utterance, args):
    """The symbol of each frame of an utterance."""
    intervals = [
        Interval(start, end, simplify(symbol, args)) for start, end, symbol in utterance.intervals
    ]
    return frame_symbols(intervals, utterance.duration, args.silence_symbol)


def simplify(symbol, args):
    """The symbol with the chosen marks stripped; the silence symbol if it isn't speech."""
    for strip, mark in ((args.strip_position, POSITION), (args.strip_stress, STRESS)):
        if strip and (match := mark.fullmatch(symbol)):
            symbol = match[1]
    return args.silence_symbol if not symbol or symbol in args.silence else symbol


def ids_of(name, phones, symbols, args):
    unknown = sorted(set(phones) - symbols.keys())
    if unknown:
        raise UserError(
            f"{name}: has phones that aren't in {args.phones}: {first_few(unknown)} "
            "(--strip_stress and --strip_position remove marks)"
        )
    return [symbols[symbol] for symbol in phones]


# ------------------------------------------------------------------------------------ TextGrids


def read_textgrids(args):
    """The `Utterance`s of all TextGrids below a folder, by path."""
    found = files_by_shortest_key(args.alignments, args.file_extension)
    names, paths = list(found), [os.path.join(args.alignments, path) for path in found.values()]
    read = partial(read_textgrid, tier_name=args.tier)
    if args.file_extension.lower() == PHN:
        read = read_phn
    if len(paths) < MIN_FILES_FOR_PROCESSES or args.n_process < 2:
        return [read(*file) for file in zip(names, paths, strict=True)]
    with ProcessPoolExecutor(args.n_process) as pool:
        results = pool.map(read, names, paths, chunksize=16)
        return list(progress(results, what="reading", unit=" files", total=len(paths)))


def read_textgrid(name, path, tier_name):
    """The `Utterance` of a TextGrid. Raises UserError, with the line, if it is malformed."""
    try:
        check_content(path)
        grid = textgrid.openTextgrid(path, includeEmptyIntervals=True, reportingMode="silence")
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error})") from error
    except (PraatioException, ValueError, LookupError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{faulty_line(path)}: not a valid TextGrid ({problem})") from error
    tiers = [n for n in grid.tierNames if n == tier_name or n.endswith(f" - {tier_name}")]
    if len(tiers) != 1:
        raise UserError(
            f"{path}: {len(tiers)} tiers are named {tier_name}; there are "
            f"{first_few(grid.tierNames)} (--tier)"
        )
    tier = grid.getTier(tiers[0])
    if not isinstance(tier, textgrid.IntervalTier):
        raise UserError(f"{path}: the tier {tiers[0]} has points, not intervals (--tier)")
    entries = ((start, end, nfc(text)) for start, end, text in tier.entries)
    intervals = [Interval(start, end, "_".join(text.split())) for start, end, text in entries]
    if not intervals or intervals[-1].end < tier.maxTimestamp - ROUNDING:
        raise UserError(
            f"{faulty_line(path)}: cut off, the intervals of {tiers[0]} end before "
            f"{tier.maxTimestamp} s"
        )
    return Utterance(name, intervals, grid.maxTimestamp, grid.minTimestamp)


def check_origins(args, utterances):
    """Refuse TextGrids if most don't begin at 0 s, as the audio does; warn if some don't."""
    late = [u for u in utterances if abs(u.begin) > ROUNDING]
    if not late:
        return
    said = (
        f"{args.alignments}: {len(late)} of {len(utterances)} TextGrids don't begin at 0 s, such "
        f"as {first_few([late[0].name])} ({late[0].begin:g} s)"
    )
    if 2 * len(late) > len(utterances):
        raise UserError(
            f"{said}: were they cut out of longer ones? Labels begin with the audio: shift the "
            "times, in Praat with Modify, Shift times to"
        )
    print(f"warning: {said}; labels begin at 0 s nevertheless")


def faulty_line(path):
    """`path, line number` of the first error in a TextGrid, or of its last line if none is found.

    Only the path for the short format, whose lines have no names.
    """
    with open(path, "rb") as file:
        content = file.read()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    lines = content.decode(encoding, errors="replace").splitlines()
    latest, long_format = -math.inf, False
    for number, line in enumerate(lines, 1):
        if SECTION.fullmatch(line):
            latest, long_format = -math.inf, True
        elif match := NUMBER.fullmatch(line):
            try:
                latest, before = float(match[1]), latest
            except ValueError:
                return f"{path}, line {number}"
            if latest < before:  # times ascend within a tier
                return f"{path}, line {number}"
        elif TEXT.fullmatch(line) and not QUOTED.fullmatch(line):
            return f"{path}, line {number}"
    return f"{path}, line {len(lines)}" if long_format else path


# ------------------------------------------------------------------------------------ TIMIT, CTM


def read_phn(name, path):
    """The `Utterance` of a .PHN file of TIMIT. Raises UserError, with the line, if malformed."""
    intervals, before = [], 0
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            begin, end, symbol = line.split()
            begin, end = int(begin), int(end)
            if not before <= begin <= end:
                raise ValueError
        except ValueError:
            raise UserError(
                f"{path}, line {number}: not `begin end phone`, in samples, after the line before "
                f"it: {line[:80]!r}"
            ) from None
        intervals.append(Interval(begin / SAMPLE_RATE, end / SAMPLE_RATE, symbol))
        before = end
    return Utterance(name, intervals, before / SAMPLE_RATE)


def read_ctm(path, channel=None):
    """The `Utterance`s of a CTM file, or of one of its channels, in its order.

    Raises UserError with the line.
    """
    intervals, channel_of = {}, {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip() and not line.startswith(";;"):
            name, its_channel, interval = ctm_row(f"{path}, line {number}", line)
            if channel not in (None, its_channel):
                continue
            if channel_of.setdefault(name, its_channel) != its_channel:
                raise UserError(
                    f"{path}, line {number}: {name} has two channels, {channel_of[name]} and "
                    f"{its_channel}: convert one at a time, with --channel {its_channel}, and "
                    "train on audio of that channel alone"
                )
            intervals.setdefault(name, []).append((*interval, number))
    if not intervals:
        of_channel = f" of channel {channel}" if channel else ""
        raise UserError(f"{path}: no line `name channel start duration phone`{of_channel}")
    utterances = []
    for name, rows in intervals.items():
        rows.sort()
        for (_, end, *_), (start, *_, number) in zip(rows, rows[1:], strict=False):
            if start < end - ROUNDING:
                raise UserError(
                    f"{path}, line {number}: begins at {start} s, but the phone before it in "
                    f"{name} ends at {end} s"
                )
        rows = [Interval(*row[:3]) for row in rows]
        utterances.append(Utterance(name, rows, rows[-1].end))
    return utterances


def ctm_row(where, line):
    """Name, channel and `Interval` of one line."""
    try:
        name, channel, start, duration, symbol, *more = line.split()
        start, duration = float(start), float(duration)
        within = 0 <= start < math.inf and 0 <= duration < math.inf
        if not within or 5 + len(more) > MAX_CTM_FIELDS:
            raise ValueError
    except ValueError:
        raise UserError(
            f"{where}: not `name channel start duration phone`: {line[:80]!r}"
        ) from None
    return name, channel, Interval(start, start + duration, symbol)


if __name__ == "__main__":
    main()
