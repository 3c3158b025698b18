"""Tests of boundaries: peaks (utils/peaks.py), matching, metrics, and eval/segmentation.py."""

import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from eval import segmentation
from model import build_model
from stats.boundaries import (
    MATCHINGS,
    PROMINENCES,
    TOLERANCE,
    count_boundaries,
    counts_by_prominence,
    match_one_to_one,
    prominent_pairs,
    segmentation_metrics,
)
from stats.distances import frame_distances
from tests.helpers import ends_refused, hcpc_cases
from utils.data.corpus import Utterance
from utils.data.labels import read_phone_labels
from utils.files import load_json
from utils.peaks import peak_prominence, scaled_to_one
from utils.run.checkpoint import save_checkpoint
from utils.run.flags import build_parser

# ---------------------------------------------------------------------------- slow references


def naive_prominence(curve):
    """By walking; what `scipy.signal.peak_prominences` gives, with the left end of a plateau."""
    prominences = []
    for at, height in enumerate(curve):
        left = right = at
        while left > 0 and curve[left - 1] < height:
            left -= 1
        while right < len(curve) - 1 and curve[right + 1] <= height:
            right += 1
        prominences.append(height - max(min(curve[left : at + 1]), min(curve[at : right + 1])))
    return prominences


def largest_matching(predicted, true, tolerance):
    """The size of the largest one-to-one matching, by augmenting paths (Kuhn)."""
    partner = {}

    def assign(place, tried):
        for other in true:
            if abs(other - place) <= tolerance and other not in tried:
                tried.add(other)
                if other not in partner or assign(partner[other], tried):
                    partner[other] = place
                    return True
        return False

    return sum(assign(place, set()) for place in predicted)


def naive_counts(predicted, true, tolerance=TOLERANCE):
    near = [
        sum(any(abs(one - other) <= tolerance for other in others) for one in some)
        for some, others in ((predicted, true), (true, predicted))
    ]
    return [largest_matching(predicted, true, tolerance), *near, len(predicted), len(true)]


def naive_metrics(right, predicted, found, true):
    precision, recall = right / predicted, found / true
    over = recall / precision - 1
    to_ideal = math.sqrt((1 - recall) ** 2 + over**2)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 / (1 / precision + 1 / recall),
        "r_value": 1 - (to_ideal + abs(recall - 1 - over) / math.sqrt(2)) / 2,
        "over_segmentation": over,
    }


# ------------------------------------------------------------------------------ peaks, matching


def test_prominence_matches_a_walk_along_the_curve():
    for n in (1, 2, 25, 32):
        curves = torch.randint(0, 6, (40, n)).float()  # few values: plateaus and equal peaks
        expected = torch.tensor([naive_prominence(curve) for curve in curves.tolist()])
        assert torch.equal(peak_prominence(curves), expected)


def test_prominence_of_known_peaks():
    curve = torch.tensor([[0.0, 3.0, 1.0, 2.0, 2.0, 0.0, 5.0]])
    assert peak_prominence(curve).tolist() == [[0.0, 3.0, 0.0, 1.0, 0.0, 0.0, 0.0]]


def test_ten_minutes_have_no_table_of_every_pair_of_frames():
    """Peaks from 0 whose valleys are at 0: as prominent as high. All pairs would take 29 GB."""
    curve = torch.rand(1, 60_000) * (torch.arange(60_000) % 3 == 1)
    assert torch.equal(peak_prominence(curve), curve)


def test_counts_match_loops():
    rng = np.random.default_rng(0)
    for tolerance in (0, 1, 2, 5):
        for density in (0.05, 0.3, 0.8):
            predicted, true = (np.flatnonzero(rng.random(60) < p) for p in (density, 0.3))
            pairs = match_one_to_one(predicted, true, tolerance)
            for column, places in zip(zip(*pairs, strict=True), (predicted, true), strict=False):
                assert len(set(column)) == len(pairs)
                assert max(column) < len(places)
            assert all(abs(predicted[i] - true[j]) <= tolerance for i, j in pairs)
            heights = rng.random(len(predicted))
            tall = prominent_pairs(predicted, true, heights, tolerance)
            assert len({*tall}) == len(pairs)
            assert all(abs(predicted[i] - true[j]) <= tolerance for i, j in tall)
            assert sum(heights[i] for i, _ in tall) >= sum(heights[i] for i, _ in pairs)
            counts = count_boundaries(predicted, true, tolerance)
            assert counts.tolist() == naive_counts(predicted, true, tolerance)
    nothing = np.array([], dtype=int)
    assert count_boundaries(nothing, true).tolist() == [0, 0, 0, 0, len(true)]


def test_the_taller_of_two_peaks_is_right_in_pictures():
    assert match_one_to_one([10, 12], [11], 2) == [(0, 0)]
    predicted, true = np.array([10, 12]), np.array([11])
    assert prominent_pairs(predicted, true, np.array([0.1, 0.9]), 2) == [(1, 0)]


def test_metrics_of_known_segmentations():
    for matching in MATCHINGS:
        perfect = segmentation_metrics([10, 10, 10, 10, 10], matching)
        expected = {"precision": 1, "recall": 1, "f1": 1, "r_value": 1, "over_segmentation": 0}
        assert perfect == pytest.approx(expected)
    counts = [[80, 95, 85, 110, 100], [1, 2, 2, 4, 3]]
    strict, lenient = (segmentation_metrics(counts, matching) for matching in MATCHINGS)
    for row, (matched, right, found, predicted, true) in enumerate(counts):
        for metrics, hits in ((strict, (matched, matched)), (lenient, (right, found))):
            expected = naive_metrics(hits[0], predicted, hits[1], true)
            assert {name: values[row] for name, values in metrics.items()} == pytest.approx(
                expected
            )
    # Boundaries everywhere find all of them: the R-value isn't taken in.
    everywhere = segmentation_metrics([100, 600, 100, 600, 100])
    assert everywhere["recall"] == 1
    assert everywhere["r_value"] < 0
    for n_wrong in (0, 3):
        nothing = segmentation_metrics([0, 0, 0, n_wrong, 7])
        assert (nothing["f1"], nothing["over_segmentation"]) == (0, n_wrong / 7 - 1)


def test_tolerance_is_20_ms():
    assert TOLERANCE * 160 / 16_000 == 0.02


# ------------------------------------------------------------------------------- golden values


@pytest.mark.parametrize(("params", "path"), hcpc_cases("default_prominence"))
def test_golden_hcpc_boundaries(params, path):
    golden = np.load(path)
    change = scaled_to_one(frame_distances(torch.from_numpy(golden["x"]), "cosine"))
    expected = golden["dissimilarity"]  # its first value is a copy of the second
    assert np.abs(change.numpy() - expected[:, 1:]).max() < 1e-6
    alone = peak_prominence(change).numpy() >= params["default_prominence"]
    assert np.array_equal(alone, golden["kreuk_p0.05"][:, 1:])
    end_to_end = peak_prominence(torch.from_numpy(expected).view(1, -1)).view(expected.shape)
    for name in golden.files:
        if name.startswith("boundaries_p"):
            found = end_to_end >= float(name.removeprefix("boundaries_p"))
            assert np.array_equal(found, golden[name]), name


@pytest.mark.parametrize(("params", "path"), hcpc_cases("results"))
def test_golden_hcpc_metrics(params, path):
    golden = np.load(path)
    for case, expected in params["results"].items():
        kind, tolerance = case.rsplit(".tol", 1)
        labels = golden[params["labels_of"].get(kind, params["default"])]
        changes = np.diff(labels, axis=1, prepend=labels[:, :1]) != 0
        added = range(0, labels.size + 1, labels.shape[1])  # every start, and the end
        predicted, true = (
            np.union1d(np.flatnonzero(indicators), added)
            for indicators in (golden[f"pred.{kind}"], changes)
        )
        counts = count_boundaries(predicted, true, int(tolerance))
        names = ("optimal_matches", "n_predicted", "n_true")
        assert counts[[0, 3, 4]].tolist() == [expected[name] for name in names], case
        lenient = segmentation_metrics(counts, "lenient")
        figures = [lenient[name] for name in ("precision", "recall", "f1", "r_value")]
        # The original adds 1e-7 to denominators.
        assert figures == pytest.approx(expected["lenient"], rel=2e-6, abs=1e-6), case


# ---------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small model with random weights."""
    args = build_parser().parse_args(["--hiddenEncoder", "16", "--hiddenGar", "12"])
    torch.manual_seed(3)
    state = {"gEncoder": build_model(args).state_dict(), "args": vars(args)}
    state |= {"cpcCriterion": {}, "optimizer": {}, "best": None, "logs": {}, "position": [1, 0, 0]}
    return save_checkpoint(tmp_path_factory.mktemp("run"), state, 0)


@pytest.fixture
def segment(tiny_corpus, checkpoint, tmp_path):
    """Runs the command on the tiny corpus; returns what is in its JSON."""

    def run(*flags, labels=tiny_corpus / "phones.txt", measured=tiny_corpus / "test.txt"):
        out = tmp_path / "out"
        paths = [tiny_corpus / "audio", measured, checkpoint, "--pathPhone", labels, "--out", out]
        segmentation.main(list(map(str, [*paths, *flags])))
        return load_json(out / "segmentation.json")

    return run


@pytest.fixture
def label_features(tiny_corpus, monkeypatch):
    """Instead of a model's features: one per label, and noise of the strength that a test sets.

    Pictures stay empty, to save time.
    """
    monkeypatch.setattr(segmentation, "draw_utterances", lambda *_: Figure())
    labels, noise = read_phone_labels(tiny_corpus / "phones.txt").labels, [0.0]
    prototypes = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))

    def features(model, path, *, get_encoded):
        ids = torch.from_numpy(labels[Path(path).stem]).long()
        generator = torch.Generator().manual_seed(len(ids))
        return (prototypes[ids] + noise[0] * torch.randn(len(ids), 16, generator=generator))[None]

    monkeypatch.setattr(segmentation, "build_feature", features)
    return noise


def test_figures_of_a_model_match_loops_over_the_boundaries_it_writes(
    segment, tiny_corpus, tmp_path, capsys
):
    result = segment("--get_encoded", "--pathTune", tiny_corpus / "train.txt")
    labels = read_phone_labels(tiny_corpus / "phones.txt").labels
    counts = np.zeros(5, dtype=int)
    for line in (tmp_path / "out" / "phone_boundaries.txt").read_text().splitlines():
        name, *found = line.split()
        ids = labels[name]
        counts += naive_counts(
            [*map(int, found)], (np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist()
        )
    matched, right, found, predicted, true = counts.tolist()
    phone = result["phone"]
    assert (phone["predicted"], phone["true"]) == (predicted, true)
    for matching, hits in (("strict", (matched, matched)), ("lenient", (right, found))):
        figures = naive_metrics(hits[0], predicted, hits[1], true)
        assert {name: phone[matching][name] for name in figures} == pytest.approx(figures)
        for name, value in figures.items():
            lowest, highest = phone[matching]["interval_95"][name]
            assert lowest <= value <= highest
    assert imread(tmp_path / "out" / "segmentation.png").std() > 0.05
    said = capsys.readouterr().out
    assert (
        f"{true} in the labels; prominence {phone['prominence']:.3g}, best strict R-value" in said
    )
    assert said.count("95 % interval") == 2
    assert "measured, too" not in said


def test_words_and_phones_of_features_that_encode_them_are_all_found(
    segment, label_features, tiny_corpus, tmp_path, capsys
):
    """Phones 0 and 1 are one word here, as are 2 and 3: a boundary between them is of no word."""
    words, lines = tmp_path / "words.txt", (tiny_corpus / "phones.txt").read_text().splitlines()
    halved = ([name, *(str(int(i) // 2) for i in ids)] for name, *ids in map(str.split, lines))
    words.write_text("".join(f"{' '.join(line)}\n" for line in halved))
    result = segment("--pathWords", words)
    for figures in (result["phone"]["strict"], result["phone"]["lenient"]):
        assert figures["precision"] == figures["recall"] == figures["r_value"] == 1
        assert figures["interval_95"]["f1"] == [1, 1]
        assert max(chance["r_value"] for chance in figures["chance"].values()) < 0.9
    assert result["word"]["strict"]["recall"] == 1
    assert result["word"]["true"] < result["word"]["predicted"] == result["phone"]["true"]
    assert result["phone"]["prominence"] == 0.05
    assert "prominence 0.05, not tuned" in capsys.readouterr().out


def test_the_tuned_prominence_is_the_best_on_its_own_list(segment, label_features, tiny_corpus):
    label_features[0] = 0.4
    tuned = segment("--pathTune", tiny_corpus / "train.txt", "--tune_for", "lenient")["phone"]
    scores = {
        prominence: segment("--prominence", prominence, measured=tiny_corpus / "train.txt")["phone"]
        for prominence in (0.03, tuned["prominence"], 0.5)
    }
    r_values = {at: result["lenient"]["r_value"] for at, result in scores.items()}
    assert max(r_values, key=r_values.get) == tuned["prominence"]
    assert len(set(r_values.values())) == 3
    assert segment("--prominence", tuned["prominence"])["phone"]["strict"] == tuned["strict"]


def test_counts_by_prominence_are_those_at_each_of_them():
    prominence, true = np.random.default_rng(0).random(50).astype(np.float32), np.arange(3, 50, 8)
    for counts, lowest in zip(counts_by_prominence(prominence, true), PROMINENCES, strict=True):
        assert counts.tolist() == naive_counts(np.flatnonzero(prominence >= lowest), true)


def curve_of(peaks, true, counts):
    """A Curve with these peaks, a dict place -> prominence, and these true boundaries of phones."""
    prominence = np.zeros(len(counts), dtype=np.float32)
    prominence[list(peaks)] = list(peaks.values())
    return segmentation.Curve("x", None, prominence, counts, {"phone": np.array(true)}, None)


def test_tuning_sees_what_counts_and_how():
    """Two peaks at a boundary are right in lenient matching only; more at 30 don't count."""
    counts = np.arange(40) < 25
    curve = curve_of({9: 0.4, 11: 0.2, 30: 0.5, 34: 0.5, 38: 0.5}, [10], counts)
    for matching, best in (("strict", 0.21), ("lenient", 0.01)):
        args = Namespace(tune_for=matching, tolerance=2, pathTune="tune.txt", level="frames")
        chosen, source = segmentation.choose_prominence([curve], "phone", args)
        assert (chosen, source) == (best, f"best {matching} R-value on tune.txt")


def test_intervals_come_from_resampled_utterances():
    """One utterance is all right and one all wrong: a set of two has 0, 50 or 100 %."""
    places, counts = [5, 15, 25], np.ones(40, dtype=bool)
    right = curve_of(dict.fromkeys(places, 0.5), places, counts)
    wrong = curve_of({10: 0.5, 20: 0.5, 30: 0.5}, places, counts)
    for curves, expected in (([right, wrong], [0, 1]), ([right, right], [1, 1])):
        result = segmentation.measure(curves, "phone", 0.1, 2)["strict"]
        assert result["interval_95"]["recall"] == result["interval_95"]["f1"] == expected


def test_evenly_spaced_boundaries():
    counts = np.ones(29, dtype=bool)  # of 30 frames
    curve = curve_of({}, [3, 8], counts)
    assert segmentation.mean_length([curve], "phone") == 10
    assert curve.evenly_spaced(10).tolist() == [9, 19]  # frames 10 and 20 begin segments
    for n in range(30):
        assert len(curve.evenly_spaced(30 / (n + 1))) == n
    counts[:15] = False
    assert curve.evenly_spaced(5).tolist() == [19, 24]
    assert curve._replace(counts=counts & False).evenly_spaced(5).tolist() == []


def test_silence_rules():
    """Silence at both edges (0), a pause of two silences (0 and 4) among phones 1, 2, 3."""
    ids = np.array([0] * 6 + [1] * 8 + [0] * 5 + [4] * 5 + [2] * 6 + [3] * 6 + [0] * 5)
    counts = segmentation.counted_places(np.isin(ids, [0, 4]), tolerance=2)
    begin, pause, resume, end = 5, 13, 23, 35  # the last frame before each change
    expected = np.zeros(len(ids) - 1, dtype=bool)
    expected[begin + 3 : pause + 3] = True  # up to two frames after speech ends
    expected[resume - 2 : end - 2] = True
    assert counts.tolist() == expected.tolist()
    assert not segmentation.counted_places(np.ones(9, dtype=bool), 2).any()


def test_a_boundary_between_two_silences_is_none(monkeypatch):
    ids = np.array([1] * 8 + [0, 4] + [2] * 8)
    monkeypatch.setattr(segmentation, "build_feature", lambda *_, **__: torch.eye(5)[ids][None])
    args = Namespace(pathDB="", get_encoded=False, metric="euclid", tolerance=2, level="frames")
    utterance = Utterance(0, "x.flac", 0)
    labels = {"phone": ids, "word": ids}
    for silence, expected in (([], [7, 8, 9]), ([0, 4], [7, 9])):
        curve = segmentation.find_curve(None, utterance, labels, silence, args)
        assert curve.true["phone"].tolist() == curve.true["word"].tolist() == expected


def test_boundaries_in_silence_do_not_count(segment, label_features, tiny_corpus, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text((tiny_corpus / "phones.txt").read_text())
    (tmp_path / "phones.txt").write_text("0 SIL\n1 a\n2 b\n3 c\n4 SPN\n")
    everything = segment(labels=labels)["phone"]
    result = segment("--silence", "SIL", "4", labels=labels)["phone"]
    assert result["true"] < everything["true"]
    assert result["strict"]["recall"] == 1
    # A change between two silences remains in the features: one is a false alarm near speech only.
    assert result["predicted"] - result["true"] < everything["true"] - result["true"]


def test_a_warning_where_boundaries_are_no_better_than_chance(
    segment, label_features, tiny_corpus, capsys
):
    label_features[0] = 1e3
    segment("--pathTune", tiny_corpus / "all.txt")
    said = capsys.readouterr().out
    assert "warning: tuned on utterances that are measured, too: 10/0/10-0-0002.flac" in said
    assert "warning: the strict R-value is no better than that of evenly spaced phone" in said


def test_what_cannot_be_measured_is_refused_in_one_line(segment, tiny_corpus, tmp_path, capsys):
    lines = (tiny_corpus / "phones.txt").read_text().splitlines()
    files = {
        "other": "other 1 2 3\n",
        "constant": "".join(f"{name} {'1 ' * len(ids)}\n" for name, *ids in map(str.split, lines)),
        "doubled": "".join(f"{line} {' '.join(line.split()[1:])}\n" for line in lines),
        "unknown": "nobody\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for flags, said in (
        ({"labels": tmp_path / "other"}, "not one of its 3 utterances has labels in .*other"),
        ({"labels": tmp_path / "constant"}, "test.txt: no phone boundary in the labels"),
        ({"labels": tmp_path / "doubled"}, "doubled: 3 of 3 files .* a label lasts 5 ms"),
        ({"labels": tmp_path / "gone"}, "gone: can't be read"),
        ({"measured": tmp_path / "unknown"}, "unknown: 1 of 1 names have no file"),
        (["--silence", "SIL"], "--silence SIL: no phone of .*: numbers below 5"),
        (["--prominence", "0.1", "--pathTune", "x"], "leave it out, or --prominence"),
        (["--prominence", "0"], "--prominence 0.0: must be above 0"),
        (["--pathWords", tmp_path / "other"], "has labels in .*phones.txt or .*other"),
    ):  # fmt: skip
        with ends_refused(capsys, said):
            segment(**flags) if isinstance(flags, dict) else segment(*flags)
    assert not (tmp_path / "out").exists()
