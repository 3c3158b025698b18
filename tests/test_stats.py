"""Tests of the stats, each against golden values, a slow reference or a known answer."""

import json
import re
import textwrap

import pytest
import torch
from matplotlib.image import imread

from stats import empty_stat
from stats.alignment_stat import AlignmentOccupancyStat
from stats.boundary_stat import BoundaryStat
from stats.distances import METRICS, frame_distances
from stats.empty_stat import Stat
from stats.phone_similarity_stat import PhoneSimilarityStat, class_similarity
from stats.repr_diff_stat import ReprDiffStat
from stats.stats_collector import StatsCollector
from stats.stats_utils import (
    STATS,
    check_needs,
    parse_stats,
    usage,
    with_absolute_directories,
)
from tests.helpers import assert_close, golden_cases
from utils.data.labels import write_symbols
from utils.misc import UserError
from utils.stat_specs import picture_directories


def speech_like(n_windows=4, n_frames=60, dim=16, n_phones=5, noise=0.0, seed=0):
    """Features that are constant within a phone, plus noise, and the labels: (B, S, D), (B, S).

    Phones last 5 to 9 frames, and none follows itself.
    """
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(n_phones, dim, generator=generator)
    labels = torch.empty(n_windows, n_frames, dtype=torch.int64)
    for row in labels:
        at, phone = 0, 0
        while at < n_frames:
            length = int(torch.randint(5, 10, (), generator=generator))
            phone = (phone + int(torch.randint(1, n_phones, (), generator=generator))) % n_phones
            row[at : at + length] = phone
            at += length
    features = prototypes[labels]
    return features + noise * torch.randn(features.shape, generator=generator), labels


def value_of(stat, batches):
    """The merged value of a stat over batches."""
    value = stat.computeForBatch(batches[0])
    for batch in batches[1:]:
        value = stat.mergeStatResults(value, stat.computeForBatch(batch))
    return value


@pytest.mark.parametrize("build", [PhoneSimilarityStat, BoundaryStat])
def test_frames_without_labels_are_left_out(build, tmp_path):
    """The figures of labelled windows, whatever unlabelled ones, or parts of them, come along."""
    stat = build(*(["cosine"] * (build is BoundaryStat)), "ctx_repr", str(tmp_path))
    features, labels = speech_like(noise=0.3)
    value = stat.computeForBatch({"ctx_repr": features, "phone_align": labels})
    alone = stat.logStat(value, 0)
    others = {"ctx_repr": 9 * torch.randn(3, 60, 16), "phone_align": torch.full((3, 60), -1)}
    both = {name: torch.cat([others[name], tensor]) for name, tensor in
            (("ctx_repr", features), ("phone_align", labels))}  # fmt: skip
    assert stat.logStat(stat.computeForBatch(both), 0) == pytest.approx(alone)
    merged = stat.mergeStatResults(stat.computeForBatch(others), value)
    assert stat.logStat(merged, 0) == pytest.approx(alone)
    partly = labels.clone()
    partly[:, 30:] = -1
    strange = features.clone()
    strange[:, 30:] = 50 * torch.randn(4, 30, 16)
    found = [stat.logStat(stat.computeForBatch({"ctx_repr": f, "phone_align": partly}), 0)
             for f in (features, strange)]  # fmt: skip
    assert found[0] == pytest.approx(found[1])


# ------------------------------------------------------------------------------------ reprDiff


@pytest.mark.parametrize("case", golden_cases("ReprDiffStat"))
def test_golden_repr_diff(case, tmp_path):
    config = case.config
    stat = ReprDiffStat(config["metric"], config["reprType"], config["stepSize"], tmp_path)
    batches = []
    while f"batch{len(batches)}" in case:
        batches.append({config["reprType"]: case[f"batch{len(batches)}"]})
    value = value_of(stat, batches)
    keys = sorted(value["hist"])
    assert keys == pytest.approx(case["hist_keys"].tolist(), rel=1e-12, abs=1e-12)
    assert [value["hist"][key] for key in keys] == case["hist_counts"].tolist()
    assert value["sum"] == case["total"].item()
    assert stat.getStatName() == config["statName"]

    collector = StatsCollector([stat])
    for batch in batches:
        collector.batchUpdate(batch)
    logged = collector.logStats(config["epoch"])
    assert logged == {config["log_key"]: pytest.approx(case["mean"].item(), rel=1e-12)}
    assert sorted(path.name for path in tmp_path.iterdir()) == config["png"]


@pytest.mark.parametrize("metric", METRICS)
def test_distances_follow_their_definition(metric):
    frames = torch.randn(2, 6, 4)
    definition = {
        "cosine": lambda u, v: 1 - u @ v / (u.norm() * v.norm()),
        "coscorr": lambda u, v: (u @ v / (u.norm() * v.norm())).abs(),
        "euclidsq": lambda u, v: (u - v) @ (u - v),
        "euclid": lambda u, v: (u - v).norm(),
    }[metric]
    expected = [[definition(u, v) for v, u in zip(row, row[1:], strict=False)] for row in frames]
    assert_close(frame_distances(frames, metric), torch.tensor(expected), 1e-5)


def test_repr_diff_does_not_count_undefined_distances(tmp_path):
    frames = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    stat = ReprDiffStat("cosine", "ctx_repr", "0.5", tmp_path)
    value = stat.computeForBatch({"ctx_repr": frames})
    assert value == {"hist": {1.0: 1}, "sum": 1}
    nothing = stat.computeForBatch({"ctx_repr": torch.zeros(1, 5, 2)})
    assert nothing == {"hist": {}, "sum": 0}
    assert stat.logStat(nothing, 0) == {}


@pytest.mark.parametrize(
    ("metric", "said"), [("cosine", "cosine distance"), ("coscorr", "coscorr")]
)
def test_the_picture_of_repr_diff_names_what_is_measured(tmp_path, metric, said):
    stat = ReprDiffStat(metric, "ctx_repr", "0.5", tmp_path)
    assert stat._draw({0.5: 2}, 0.5, 0).axes[0].get_xlabel() == f"{said} (bins of 0.5)"


# ---------------------------------------------------------------------------------- boundaries


@pytest.mark.parametrize("metric", ["cosine", "euclid", "euclidsq"])
def test_boundaries_of_piecewise_constant_features_are_all_found(metric, tmp_path):
    features, labels = speech_like(noise=0.01)
    stat = BoundaryStat(metric, "conv_repr", str(tmp_path))
    batches = [
        {"conv_repr": features[:3], "phone_align": labels[:3]},
        {"conv_repr": features[3:], "phone_align": labels[3:]},
    ]
    logged = stat.logStat(value_of(stat, batches), 4)
    assert logged["precision"] == logged["recall"] == logged["r_value"] == 1
    assert imread(tmp_path / f"boundaries_conv_repr_{metric}_4.png").std() > 0.05


def test_boundaries_are_missed_with_uninformative_features(tmp_path):
    _, labels = speech_like(n_windows=20)
    noise = torch.randn(20, 60, 16)
    stat = BoundaryStat("cosine", "ctx_repr", str(tmp_path))
    value = stat.computeForBatch({"ctx_repr": noise, "phone_align": labels})
    assert set(value["counts"][:, 4].tolist()) == {(labels[:, 1:] != labels[:, :-1]).sum().item()}
    assert stat.logStat(value, 0)["r_value"] < 0.7


def test_boundaries_20_ms_off_count_and_30_ms_do_not(tmp_path):
    features, labels = speech_like()
    stat = BoundaryStat("euclid", "ctx_repr", str(tmp_path))
    for frames_late, found in [(2, True), (3, False)]:
        late = torch.cat([features[:, :1].expand(-1, frames_late, -1), features], 1)[:, :60]
        value = stat.computeForBatch({"ctx_repr": late, "phone_align": labels})
        inside = (labels[:, 1:-3] != labels[:, :-4]).sum()  # the last ones move out of the window
        assert (value["counts"][0, 0] >= inside) == found


def test_two_boundaries_and_two_late_peaks_are_two_hits(tmp_path):
    """Each peak one frame after another boundary, so that its nearest is the next one: no miss."""
    labels = torch.tensor([[0] * 6 + [1] * 2 + [2] * 8])  # boundaries at frames 6 and 8
    heard = torch.tensor([[0] * 8 + [1] * 2 + [2] * 6])  # changes at frames 8 and 10
    batch = {"ctx_repr": torch.eye(3)[heard], "phone_align": labels}
    logged = BoundaryStat("euclid", "ctx_repr", str(tmp_path)).computeForBatch(batch)
    assert logged["counts"][0].tolist() == [2, 2, 2, 2, 2]


def test_lenient_matching_is_an_option_of_the_stat(tmp_path):
    """One boundary and two peaks near it: the second is wrong, or right as well."""
    labels = torch.tensor([[0] * 8 + [1] * 8])
    heard = torch.tensor([[0] * 7 + [2] * 2 + [1] * 7])
    batch = {"ctx_repr": torch.eye(3)[heard], "phone_align": labels}
    logged = {}
    for option in ("", "strict,", "lenient,"):
        (stat,) = parse_stats(f"boundaries:euclid,ctx_repr,{option}{tmp_path}")
        logged[option] = stat.logStat(stat.computeForBatch(batch), 0)
    assert logged[""] == logged["strict,"]
    assert logged[""]["precision"] == 0.5
    assert logged["lenient,"]["precision"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "boundaries_ctx_repr_euclid_0.png",
        "boundaries_ctx_repr_euclid_lenient_0.png",
    ]


def test_boundaries_of_one_long_phone_are_no_reason_to_fail(tmp_path):
    stat = BoundaryStat("cosine", "ctx_repr", str(tmp_path))
    silence = {"ctx_repr": torch.zeros(2, 9, 3), "phone_align": torch.zeros(2, 9, dtype=torch.long)}
    value = stat.computeForBatch(silence)
    assert value["counts"].sum() == 0
    assert stat.logStat(value, 0) == {}


# -------------------------------------------------------------------------- alignment occupancy

WITH_EXTRAS = {"nPredicts": 3, "CPCCTCLearnBlank": True, "CPCCTCSelfLoop": True}


def test_occupancy_of_a_known_alignment(tmp_path):
    # Blank, self loop and predictions 1, 2, 3; the last is never used.
    align = torch.tensor([[[1, 1, 2, 2, 2, 3], [0, 2, 2, 2, 3, 3]]])
    collector = StatsCollector([AlignmentOccupancyStat(str(tmp_path))], WITH_EXTRAS)
    collector.batchUpdate({"cpcctc_align": align})
    logged = collector.logStats(7)
    assert logged == {
        "alignOccupancy_self_loop": pytest.approx(2 / 12),
        "alignOccupancy_skipped_frames": pytest.approx(1 / 12),
        "alignOccupancy_skipped_predictions": pytest.approx(1 / 3),
        "alignOccupancy_frames_blank": 0.5,
        "alignOccupancy_frames_self": 1.0,
        "alignOccupancy_frames_1": 3.0,
        "alignOccupancy_frames_2": 1.5,
        "alignOccupancy_frames_3": 0.0,
    }
    assert imread(tmp_path / "alignOccupancy_7.png").std() > 0.05


def test_occupancy_without_flags_counts_the_columns_it_meets(tmp_path):
    stat = AlignmentOccupancyStat(str(tmp_path))
    value = value_of(stat, [{"cpcctc_align": torch.full((1, 2, 3), p)} for p in (0, 2, 1)])
    logged = stat.logStat(value, 0)
    assert [logged[f"frames_#{p}"] for p in range(3)] == [1.0, 1.0, 1.0]
    assert logged["self_loop"] == 0


# --------------------------------------------------------------------------- phone similarity


def test_phone_similarity_matches_all_pairs(tmp_path):
    features, labels = speech_like(n_windows=2, n_frames=20, noise=1.0)
    labels[labels == 3] = 6  # classes 3 and 5 aren't heard
    features[0, 0] = 0  # has no direction
    stat = PhoneSimilarityStat("ctx_repr", str(tmp_path))
    batches = [{"ctx_repr": features[i : i + 1], "phone_align": labels[i : i + 1]} for i in (1, 0)]
    logged = stat.logStat(value_of(stat, batches), 2)

    frames, phones = features.flatten(0, 1)[1:], labels.flatten()[1:]
    similarity = torch.nn.functional.cosine_similarity(frames[:, None], frames[None], dim=-1)
    another = ~torch.eye(len(frames), dtype=torch.bool)
    mean = {
        (a, b): similarity[(phones[:, None] == a) & (phones[None] == b) & another].mean().item()
        for a in phones.unique().tolist()
        for b in phones.unique().tolist()
    }
    within = [value for (a, b), value in mean.items() if a == b]
    between = [value for (a, b), value in mean.items() if a != b]
    assert logged["within"] == pytest.approx(sum(within) / len(within), abs=1e-5)
    assert logged["between"] == pytest.approx(sum(between) / len(between), abs=1e-5)
    assert imread(tmp_path / "phoneSim_ctx_repr_2.png").std() > 0.05


def test_phone_similarity_names_phones_by_the_symbols_beside_their_labels(tmp_path):
    write_symbols(tmp_path / "phones.txt", {"SIL": 0, "AA": 1, "B": 2})
    features, labels = speech_like(n_phones=3)
    stat = PhoneSimilarityStat("ctx_repr", str(tmp_path))
    value = stat.computeForBatch({"ctx_repr": features, "phone_align": labels})
    similarity = class_similarity(value["count"], value["sum"])
    for flags, names in (
        ({}, ["0", "1", "2"]),
        ({"path_phone_data": str(tmp_path / "labels.txt")}, ["SIL", "AA", "B"]),
    ):
        stat.flags = flags
        axes = stat._draw(similarity, {"within": 1.0, "between": 0.0}, 0).axes[0]
        for axis in (axes.xaxis, axes.yaxis):
            assert [tick.get_text() for tick in axis.get_ticklabels()] == names


def test_phone_similarity_of_one_class_has_no_between(tmp_path):
    stat = PhoneSimilarityStat("conv_repr", str(tmp_path))
    batch = {"conv_repr": torch.ones(1, 4, 3), "phone_align": torch.zeros(1, 4, dtype=torch.long)}
    assert stat.logStat(stat.computeForBatch(batch), 0) == {"within": pytest.approx(1.0)}


# ------------------------------------------------------------------------- register and specs


def test_spec_of_the_documentation():
    (stat,) = parse_stats("reprDiff:cosine,ctx_repr,0.05,../reprDiffHistograms")
    assert stat.getStatName() == "reprDiff_ctx_repr_cosine_by0.05"
    assert str(stat.directory) == "../reprDiffHistograms"
    assert stat.needs == {"ctx_repr"}


def test_several_stats_with_underscores_in_their_arguments(tmp_path):
    stats = parse_stats(
        f"reprDiff:euclid,conv_repr,2,{tmp_path}/re_pr_boundaries_boundaries:cosine,ctx_repr,"
        f"{tmp_path}/_x__alignOccupancy:{tmp_path}_phoneSim:conv_repr,{tmp_path}/phoneSim"
    )
    assert [stat.getStatName() for stat in stats] == [
        "reprDiff_conv_repr_euclid_by2.0",
        "boundaries_ctx_repr_cosine",
        "alignOccupancy",
        "phoneSim_conv_repr",
    ]
    assert [stat.directory.name for stat in stats] == [
        "re_pr_boundaries",
        "_x_",
        tmp_path.name,
        "phoneSim",
    ]
    assert not (tmp_path / "phoneSim").exists()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "no stat ''.*reprDiff:METRIC,REPR,STEP,DIRECTORY"),
        ("reprDif:cosine,ctx_repr,0.05,d", "no stat 'reprDif'.*phoneSim:REPR,DIRECTORY"),
        ("alignOccupancy:d_boundary:cosine,ctx_repr,d", "no stat 'boundary'.*boundaries:METRIC"),
        ("reprDiff:cosine,ctx_repr,0.05", "3 arguments.*reprDiff:METRIC,REPR,STEP,DIRECTORY has 4"),
        ("phoneSim:ctx_repr,d,d", "3 arguments"),
        ("reprDiff", "1 argument,"),
        ("reprDiff:cosin,ctx_repr,0.05,d", "no metric 'cosin'; there are cosine, euclid"),
        ("reprDiff:cosine,context,0.05,d", "no representation 'context'; there are conv_repr, ctx"),
        ("reprDiff:cosine,ctx_repr,0,d", "step of reprDiff must be a number above 0, not '0'"),
        ("reprDiff:cosine,ctx_repr,nan,d", "number above 0"),
        ("boundaries:coscorr,ctx_repr,d", "no distance 'coscorr'; there are cosine, euclid"),
        ("boundaries:cosine,pred,d", "no representation 'pred'"),
        ("boundaries:cosine,ctx_repr,kind,d", "no matching 'kind'; there are strict, lenient"),
        ("boundaries:cosine,d", r"2 arguments.*boundaries:METRIC,REPR,\[lenient\],DIRECTORY has 3"),
        ("phoneSim:ctx_repr,", "directory for pictures is empty"),
        ("alignOccupancy:/dev/null/d", "/dev/null/d: pictures can't be written"),
    ],
)
def test_wrong_specs_are_refused_with_what_there_is(spec, said):
    with pytest.raises(UserError, match=said) as refused:
        parse_stats(spec)
    assert "--captureSetStats" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_directories_in_specs_become_absolute_and_nothing_else_changes(tmp_path, monkeypatch):
    (tmp_path / "a,b").mkdir()
    monkeypatch.chdir(tmp_path)
    specs = "reprDiff:cosine,ctx_repr,0.05,../d_1_alignOccupancy:d_phoneSim:ctx_repr,/d"
    there = f"reprDiff:cosine,ctx_repr,0.05,{tmp_path.parent}/d_1_alignOccupancy:{tmp_path}/d"
    assert with_absolute_directories(specs) == f"{there}_phoneSim:ctx_repr,/d"
    for option in ("", "lenient,"):
        spec = f"boundaries:cosine,ctx_repr,{option}"
        assert with_absolute_directories(f"{spec}d") == f"{spec}{tmp_path}/d"
    for wrong in ("", "reprDif:d", "reprDiff:cosine,d", "phoneSim:ctx_repr,"):
        assert with_absolute_directories(wrong) == wrong
    monkeypatch.chdir(tmp_path / "a,b")  # a path that can't be written in a spec
    assert with_absolute_directories(specs) == specs


def test_directories_of_specs():
    specs = "reprDiff:cosine,ctx_repr,0.05,/a_b_alignOccupancy:c_phoneSim:ctx_repr,/a_b_phoneSim"
    assert picture_directories(specs) == ["/a_b", "c", "/a_b_phoneSim"]
    for empty in ("", "phoneSim:ctx_repr,"):
        assert picture_directories(empty) == []


def test_needs_that_the_run_cannot_meet_are_refused(tmp_path):
    stats = parse_stats(f"reprDiff:cosine,ctx_repr,1,{tmp_path}_alignOccupancy:{tmp_path}")
    check_needs(stats, {"ctx_repr", "cpcctc_align"})
    with pytest.raises(UserError, match="alignOccupancy needs cpcctc_align.*--CPCCTC"):
        check_needs(stats, {"ctx_repr", "conv_repr"})
    with pytest.raises(UserError, match="--path_phone_data"):
        check_needs(parse_stats(f"phoneSim:ctx_repr,{tmp_path}"), {"ctx_repr"})


# ---------------------------------------------------------------------------------- collector


def every_stat(directory):
    return parse_stats(
        f"reprDiff:cosine,ctx_repr,0.05,{directory}_boundaries:euclid,conv_repr,{directory}"
        f"_alignOccupancy:{directory}_phoneSim:ctx_repr,{directory}"
    )


def everything(n_windows=6):
    features, labels = speech_like(n_windows, noise=0.3)
    return {
        "ctx_repr": features,
        "conv_repr": features.tanh(),
        "phone_align": labels,
        "cpcctc_align": torch.randint(0, 5, (n_windows, 50, 10)).sort(-1).values,
    }


def rows(batch, windows):
    return {name: tensor[windows] for name, tensor in batch.items()}


def test_collector_is_the_same_over_batches_and_processes(tmp_path):
    batch, run = everything(), []
    for parts in ([slice(0, 6)], [slice(0, 1), slice(1, 4), slice(4, 6)]):
        collector = StatsCollector(every_stat(tmp_path), WITH_EXTRAS)
        assert collector.needs == batch.keys()
        assert len(collector) == len(STATS)
        for part in parts:
            collector.batchUpdate(rows(batch, part))
        run.append(collector)

    one, other, idle = (StatsCollector(every_stat(tmp_path), WITH_EXTRAS) for _ in range(3))
    one.batchUpdate(rows(batch, slice(0, 4)))
    other.batchUpdate(rows(batch, slice(4, 6)))
    idle.merge(one.values)
    idle.merge(other.values)
    idle.merge(StatsCollector(every_stat(tmp_path)).values)
    run.append(idle)

    logged = [collector.logStats(3) for collector in run]
    assert logged[0] == pytest.approx(logged[1])
    assert logged[0] == pytest.approx(logged[2])
    assert "reprDiff_ctx_repr_cosine_by0.05_mean" in logged[0]
    assert json.loads(json.dumps(logged[0])) == logged[0]
    assert len(list(tmp_path.iterdir())) == sum("DIRECTORY" in usage(name) for name in STATS)


def test_values_do_not_grow_with_the_number_of_batches(tmp_path):
    def size(value):
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        return value.numel() if isinstance(value, torch.Tensor) else 1

    collector, sizes = StatsCollector(every_stat(tmp_path), WITH_EXTRAS), []
    batch = everything()
    for _ in range(5):
        collector.batchUpdate(batch)
        sizes.append(size(collector.values))
    assert len(set(sizes)) == 1


def test_a_collector_can_be_reset(tmp_path):
    collector, batch = StatsCollector(every_stat(tmp_path)), everything()
    collector.batchUpdate(batch)
    first = collector.logStats(0)
    collector.zeroStats()
    assert collector.logStats(1) == {}
    collector.batchUpdate(batch)
    assert collector.logStats(2) == first


def test_the_same_stat_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="phoneSim_ctx_repr is listed twice"):
        StatsCollector(
            parse_stats(f"phoneSim:ctx_repr,{tmp_path}_phoneSim:ctx_repr,{tmp_path}/two")
        )


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    stat = PhoneSimilarityStat("ctx_repr", str(tmp_path / "d" / "e"))
    (tmp_path / "d").write_text("a file took its place after the spec was checked")
    value = stat.computeForBatch(everything())
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))}/d/e: can't be written"):
        stat.logStat(value, 0)


def test_stats_leave_no_open_figures(tmp_path):
    from matplotlib import _pylab_helpers

    collector = StatsCollector(every_stat(tmp_path), WITH_EXTRAS)
    collector.batchUpdate(everything())
    collector.logStats(0)
    assert not _pylab_helpers.Gcf.figs


# -------------------------------------------------------------------------------- interface


def test_the_documented_example_is_a_whole_stat():
    documentation = textwrap.dedent(empty_stat.__doc__)
    lines = documentation.split("\n")
    code = "\n".join(line[4:] for line in lines if line.startswith("    ") or not line)
    names = {}
    exec(code, names)
    stat = names["LengthStat"]("ctx_repr")
    collector = StatsCollector([stat])
    collector.batchUpdate({"ctx_repr": torch.full((2, 3, 4), 1.0)})
    collector.batchUpdate({"ctx_repr": torch.full((1, 6, 4), 2.0)})
    assert collector.logStats(0) == {"length_ctx_repr_mean": pytest.approx(3.0)}
    assert len(code.strip().splitlines()) <= 22


def test_an_empty_stat_says_what_is_missing():
    for call in (
        Stat().getStatName,
        lambda: Stat().computeForBatch({}),
        lambda: Stat().mergeStatResults(1, 2),
        lambda: Stat().logStat(1, 0),
    ):
        with pytest.raises(NotImplementedError):
            call()
