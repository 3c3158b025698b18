"""Make an item file for eval/ABX.py from phone labels.

    python utils/corpus/make_abx_item.py LABELS.txt phones.txt OUT.item

LABELS.txt has one utterance per line, `name id id ...`, with a label for every 10 ms; phones.txt
has one `id symbol` per line. utils/corpus/convert_alignments.py and make_demo.py write both. An
item is a phone together with the phones before and after it, as in the ZeroSpeech challenges; these
two are its context. Phones next to silence or to an end of the utterance are skipped. The speaker
is the folder before the name if it has one, else its part before the first `-`. Two equal phones in
a row can't be distinguished in labels and count as one.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import utils.run.before_torch  # noqa: F401

from utils.data.corpus import read_utterance_list
from utils.data.labels import FRAMES_PER_SECOND, SILENCE, read_phone_labels, read_symbols, runs
from utils.data.names import speakers_by_name
from utils.files import write_lines, writing_to
from utils.misc import UserError, counted, first_few, nfc
from utils.run.command import CommandLine, command

HEADER = "#file onset offset #phone prev-phone next-phone speaker"


@command
def main(argv=None):
    args = build_parser().parse_args(argv)
    labels = read_phone_labels(args.labels).labels
    if args.seqList:
        labels = listed_labels(labels, args)
    symbol_of = {number: symbol for symbol, number in read_symbols(args.phones).items()}
    silent = set(nfc(args.silence).split(","))
    silence = {number for number, symbol in symbol_of.items() if symbol in silent}
    if absent := sorted(silent - set(symbol_of.values())):
        print(
            f"warning: {args.phones} has no {first_few(absent)}: --silence names the symbols that "
            "aren't speech; other symbols for silence count as phones"
        )
    speaker_of = speakers_by_name(labels, args.separator)
    lines, used = [], set()
    for name, ids in labels.items():
        unknown = set(ids.tolist()) - symbol_of.keys()
        if unknown:
            raise UserError(f"{args.labels}: {name} has label {min(unknown)}, not in {args.phones}")
        used.update(ids.tolist())
        lines += item_lines(name, speaker_of[name], ids.tolist(), symbol_of, silence, args)
    if not lines:
        raise UserError(f"{args.labels}: no phone has a phone other than silence on both sides")
    with writing_to(args.out):
        write_lines(args.out, [HEADER, *lines])
    speakers = {line.rpartition(" ")[2] for line in lines}
    print(
        f"{len(lines)} items of {len(labels)} utterances and {counted(len(speakers), 'speaker')} "
        f"({first_few(sorted(speakers))}, by their names up to {args.separator!r}): {args.out}"
    )
    unused = [symbol for number, symbol in symbol_of.items() if number not in used]
    if unused:
        print(
            f"{len(unused)} of {len(symbol_of)} symbols of {args.phones} aren't in these labels: "
            f"{first_few(unused)}"
        )


# A flag on two lines reads better than on seven, hence:
# fmt: off


def build_parser():
    parser = CommandLine(prog="make_abx_item.py", description=__doc__)
    add = parser.add_argument
    add("labels", help="labels, one utterance per line: `name id id ...`, an id for every 10 ms")
    add("phones", help="symbols of the phones, one `id symbol` per line")
    add("out", help="item file to write")
    add("--seqList", metavar="FILE", help="only items of these utterances, one name per line")
    add("--extent", choices=["triphone", "phone"], default="triphone",
        help="an item spans its phone and the phones beside it, or only its phone (default: "
        "triphone, as in the ZeroSpeech challenge of 2017)")
    add("--silence", default=SILENCE, metavar="SYMBOLS",
        help=f"symbols that aren't speech, separated by commas (default: {SILENCE})")
    add("--separator", default="-", metavar="TEXT",
        help="ends the speaker's id in a name (default: -, as in LibriSpeech)")
    return parser


# fmt: on


def listed_labels(labels, args):
    """The labels of the utterances in --seqList. Raises UserError if there are none."""
    listed = read_utterance_list(args.seqList)
    labels = {name: labels[name] for name in listed if name in labels}
    if not labels:
        raise UserError(f"{args.seqList}: {args.labels} has labels for none of its utterances")
    if missing := [name for name in listed if name not in labels]:
        print(
            f"{args.labels}: no labels for {len(missing)} of {len(listed)} utterances of "
            f"{args.seqList}: {first_few(missing)}"
        )
    return labels


def item_lines(name, speaker, ids, symbol_of, silence, args):
    """The item file's lines for one utterance."""
    phones = list(runs(ids))
    for before, phone, after in zip(phones, phones[1:], phones[2:], strict=False):
        labels = [before[2], phone[2], after[2]]
        if silence.isdisjoint(labels):
            first, end = phone[:2] if args.extent == "phone" else (before[0], after[1])
            previous_phone, symbol, next_phone = (symbol_of[label] for label in labels)
            times = f"{first / FRAMES_PER_SECOND:.2f} {end / FRAMES_PER_SECOND:.2f}"
            yield f"{name} {times} {symbol} {previous_phone} {next_phone} {speaker}"


if __name__ == "__main__":
    main()
