"""The information that discrete units carry about phones and speakers, and their bitrates.

    python eval/unit_quality.py UNITS LABELS --out OUT

UNITS is the folder that `eval/quantize.py` wrote, or its `quantized_outputs.txt`, without --dedup;
LABELS has a phone per frame of 10 ms, one line `name id id ...` per file, and phones.txt beside it
may name the phones. All measures grow or fall with the number of units, so the level of chance is
beside each: that of the same units, shifted in time. `OUT/unit_quality.json` holds all figures
(eval/unit_measures.py explains them) and the most frequent phones of each unit,
`OUT/unit_phones.txt` these as a table, and `OUT/unit_quality.png` a picture of them.
"""

import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import numpy as np

from eval.unit_measures import chance, joint_counts, measure, usage
from eval.units import read_units
from utils.data.labels import (
    SILENCE,
    common_factor,
    differ_widely,
    phone_ids,
    read_phone_labels,
    symbols_beside,
)
from utils.data.names import known_key, speakers_by_name
from utils.files import save_json, write_lines, writing_to
from utils.misc import UserError, counted, first_few
from utils.run.command import CommandLine, at_least, command

TITLES = {
    "pnmi": "PNMI, I / H(phones)", "unit_information": "I / H(units)", "v_measure": "V-measure",
    "phone_purity": "phone purity", "cluster_purity": "cluster purity",
}  # fmt: skip
SHOWN = ("frames", "frames_without_silence", "segments_without_silence")
PHONES_PER_UNIT = 5  # in the table


@command
def main(argv=None):
    args = build_parser().parse_args(argv)
    if os.path.isdir(args.units):
        args.units = os.path.join(args.units, "quantized_outputs.txt")
    names, labels, units, starts = aligned(args)
    by_name = list(speakers_by_name(names, args.separator).values())
    speakers, speaker_ids = np.unique(by_name, return_inverse=True)
    n_phones = int(labels.max()) + 1
    symbols = symbols_beside(args.labels, n_phones)
    default = [SILENCE] if args.silence is None else []
    silence = phone_ids(args.silence or default, symbols, n_phones, args.labels, optional=default)
    if default and not silence:
        print(f"note: no phone of {args.labels} is known as {SILENCE}: silence counts as a phone")
    options = {"silence": silence}
    if len(speakers) > 1:
        options["speakers"] = np.repeat(speaker_ids, np.diff(starts, append=len(labels)))
    joint = joint_counts(labels, units)
    result = {
        "files": len(names),
        "n_speakers": len(speakers),
        "units": usage(units, starts),
        "measures": measure(labels, units, starts, **options),
        "chance": chance(labels, units, starts, **options),
        "phones_of_units": phones_of_units(joint, symbols),
    }
    show(result)
    folder = Path(args.out or os.path.dirname(os.path.abspath(args.units)))
    with writing_to(folder, "--out"):
        save_json(folder / "unit_quality.json", {**result, "flags": vars(args)})
        write_lines(folder / "unit_phones.txt", phone_lines(result["phones_of_units"]))
        draw(joint, symbols, folder / "unit_quality.png")
    print(f"which phones each unit stands for, and a picture: {folder}/unit_phones.txt, .png")


# A flag on two lines reads better than on seven, hence:
# fmt: off


def build_parser():
    parser = CommandLine(prog="unit_quality.py", description=__doc__)
    add = parser.add_argument
    add("units", help="one line per file: `name<TAB>unit,unit,...`, or the folder of "
        "quantized_outputs.txt")
    add("labels", help="phone labels: one line `name id id ...` per file, an id per 10 ms")
    add("--silence", nargs="*", metavar="PHONE",
        help=f"symbols or ids that are no speech (default: {SILENCE})")
    add("--frames_per_unit", type=at_least(1), default=1, metavar="N",
        help="frames of 10 ms that a unit lasts, such as 2 for units at 50 Hz")
    add("--separator", default="-", metavar="TEXT",
        help="ends the speaker's id in a name without folder (default: -, as in LibriSpeech)")
    add("--out", metavar="DIR", help="for the results (default: beside UNITS)")
    return parser


# fmt: on


def aligned(args):
    """The files that have units and labels, both cut to the shorter and joined.

    Returns names, labels (N,), units (N,) and the first frame of each file. Raises UserError if
    they don't belong together.
    """
    labels, units = read_phone_labels(args.labels), read_units(args.units)
    key_of = {name: known_key(name, os.path.basename(name), labels.labels) for name in units}
    names = [name for name in units if key_of[name]]
    if not names:
        raise UserError(
            f"{args.labels}: has labels for none of the {len(units)} files of {args.units}, such "
            f"as {first_few(units)}"
        )
    if len(names) < len(units):
        missing = first_few(name for name in units if not key_of[name])
        print(f"left out {counted(len(units) - len(names), 'file')} without labels: {missing}")
    if not any((np.diff(units[name]) == 0).any() for name in names):
        raise UserError(f"{args.units}: no unit is repeated: units without --dedup are needed")
    units = [units[name].repeat(args.frames_per_unit) for name in names]
    twice = [key for key, n in Counter(key_of[name] for name in names).items() if n > 1]
    if twice:
        raise UserError(f"{args.labels}: {first_few(twice)} may be several files of {args.units}")
    labels = [labels.labels[key_of[name]] for name in names]
    n_labels, n_units = (np.array([len(ids) for ids in part]) for part in (labels, units))
    check_lengths(n_labels, n_units, names, args)
    lengths = np.minimum(n_labels, n_units)
    labels, units = (
        np.concatenate([ids[:n] for ids, n in zip(part, lengths, strict=True)]).astype(np.int64)
        for part in (labels, units)
    )
    return names, labels, units, np.cumsum(lengths) - lengths


def check_lengths(n_labels, n_units, names, args):
    """Raise UserError if most files have far more or fewer units than labels; note the others."""
    difference = np.abs(n_labels - n_units)
    if not difference.any():
        return
    worst = difference.argmax()
    such = f"such as {names[worst]} ({n_units[worst]} frames, {n_labels[worst]} labels)"
    wide = differ_widely(n_units, n_labels).sum()
    if 2 * wide > len(names):
        factor = common_factor(n_units, n_labels)
        lasts = (
            f"by their number, a unit lasts {10 / factor:.3g} ms (--frames_per_unit)"
            if factor
            else ""
        )
        raise UserError(
            f"{args.units}: {wide} of {len(names)} files have far more or fewer units than "
            f"{args.labels} has labels, {such}; {lasts or 'are they of other audio?'}"
        )
    n_cut = counted(int((difference > 0).sum()), "file")
    print(f"cut to the shorter of units and labels: {n_cut}, {such}")


# -------------------------------------------------------------------------------------- results


def show(result):
    """Print the figures for people, the level of chance in brackets."""
    measures, level, usage = result["measures"], result["chance"], result["units"]

    def cell(name, key):
        value, by_chance = measures[name][key], level[name][key]
        return "-" if None in (value, by_chance) else f"{value:.3f} ({by_chance:.3f})"

    print(f"{'(chance)':<21}" + "".join(f"{name.replace('_', ' '):>26}" for name in SHOWN))
    for key, title in TITLES.items():
        print(f"{title:<21}" + "".join(f"{cell(name, key):>26}" for name in SHOWN))
    keys = ("precision", "recall", "f1", "r_value", "over_segmentation")
    print(
        "boundaries: " + ", ".join(f"{k.replace('_', ' ')} {cell('boundaries', k)}" for k in keys)
    )
    if "speakers" in measures:
        print(
            f"speakers (lower is better): I / H(speakers) {cell('speakers', 'pnmi')}, purity "
            f"{cell('speakers', 'phone_purity')}, {result['n_speakers']} speakers"
        )
    print(
        "{units_used} units used, perplexity {perplexity:.1f}, the largest has {largest_share:.1%}"
        "; bit/s: {bitrate_frames:.0f} by frames, {bitrate_runs:.0f} by runs and their lengths, "
        "{bitrate_deduplicated:.0f} deduplicated".format(**usage)
    )


def phones_of_units(joint, symbols):
    """The main phones of each used unit: [{"unit", "frames", "phones": {symbol: share}}]."""
    table = []
    for unit in np.flatnonzero(joint.sum(0)).tolist():
        counts = joint[:, unit]
        frequent = np.argsort(-counts, kind="stable")[:PHONES_PER_UNIT].tolist()
        phones = {symbols.get(p, str(p)): counts[p] / counts.sum() for p in frequent if counts[p]}
        table.append({"unit": unit, "frames": int(counts.sum()), "phones": phones})
    return table


def phone_lines(table):
    """One line per unit: its number, its frames, and its phones with their shares."""
    for row in table:
        shares = "  ".join(f"{phone} {share:.0%}" for phone, share in row["phones"].items())
        yield f"{row['unit']:>5} {row['frames']:>9}  {shares}"


def draw(joint, symbols, path):
    """Draw how the frames of each unit spread over phones; units are in the order of these."""
    from matplotlib.figure import Figure

    from utils.report.plot_confusion import class_names
    from utils.report.plots import save_figure

    phones, units = np.flatnonzero(joint.sum(1)), np.flatnonzero(joint.sum(0))
    shares = joint[np.ix_(phones, units)] / joint[:, units].sum(0)
    order = np.lexsort((-shares.max(0), shares.argmax(0)))
    size = min(30, 3 + 0.16 * len(units)), min(20, 2 + 0.16 * len(phones))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(100 * shares[:, order], cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axes.set_yticks(range(len(phones)), class_names(phones.tolist(), symbols), fontsize=7)
    if len(units) <= 200:
        axes.set_xticks(range(len(units)), units[order].tolist(), fontsize=6, rotation=90)
    axes.set(xlabel="unit, by its majority phone", ylabel="phone")
    figure.colorbar(image, ax=axes, label="share of the unit's frames (%)", pad=0.02)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
