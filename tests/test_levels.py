"""Two levels, of frames and of segments: golden values of hCPC, slow references, whole runs."""

import json
import shutil
import signal
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

import feature_loader
from criterion import CPCCriterion, CPCCTCCriterion, build_criterion, join_networks, sampling
from dataset import Batch
from eval import segmentation
from feature_loader import load_model
from model import build_model
from segments import ThresholdSegmenter, means_of_segments, repeat_last
from tests.helpers import (
    GOLDEN_HCPC,
    REAL_SPEECH,
    assert_close,
    assert_gradients_close,
    ends_refused,
    hcpc_cases,
    needs_real_speech,
)
from tests.test_hcpc import load_golden_state
from tests.test_train import (
    SMALL,
    assert_same,
    capture_flags,
    checkpoint,
    on,
    run,
    signal_in_step,
    trained,
)
from train import main
from utils.capture import CaptureReader
from utils.files import load_json
from utils.misc import generator_from
from utils.run.checkpoint import open_checkpoint, read_checkpoint
from utils.run.flags import build_parser

# ------------------------------------------------------------------------------ golden values


def segment_criterion(params, n_frames, dim):
    """Our criterion for the parameters of a level of segments."""
    common = {
        "dim_context": dim,
        "dim_encoded": dim,
        "n_frames": n_frames,
        "n_negatives": params["N"],
        "rnn_mode": params["rnnMode"],
        "cosine_scores": params["norm"],
    }
    if params.get("adjacent"):
        return CPCCriterion(params["K"], adjacent_negatives=True, **common)
    return CPCCTCCriterion(params["K"], params["M"], **common)


def segment_step(params, golden, lengths, dtype, monkeypatch, capture=frozenset()):
    """The criterion of segments, its leaves, and its output with the golden negatives."""
    level = params["segment"]
    leaves = [torch.from_numpy(golden[n]).to(dtype).requires_grad_() for n in ("cs", "zs")]
    criterion = segment_criterion(level, *leaves[0].shape[1:]).eval()
    load_golden_state(criterion, golden, "sd.segmentLevelCriterion.")
    n = int(lengths.max())
    if level.get("adjacent"):
        ahead = torch.arange(golden["neg_segment_s"].shape[1]).view(-1, 1) + 1
        sides = torch.from_numpy(golden["neg_segment_s"]) - ahead - torch.arange(level["K"])
        kept = sampling.complete_anchors(lengths, sides.size(1), criterion.n_future)
        monkeypatch.setattr(sampling, "draw_sides", lambda *_: sides.flatten(0, 1)[kept])
    else:
        negatives = torch.from_numpy(golden["neg_segment_b"] * n + golden["neg_segment_s"])
        monkeypatch.setattr(sampling, "draw_negatives_within", lambda *_, **__: negatives)
    speaker, vectors = torch.zeros(len(lengths), dtype=torch.long), [leaf[:, :n] for leaf in leaves]
    options = {"lengths": lengths, "capture": capture}
    return criterion, leaves, criterion.to(dtype)(*vectors, speaker, **options)


@pytest.mark.parametrize("suffix", ["", "64"])
@pytest.mark.parametrize(("params", "path"), hcpc_cases("segment"))
def test_golden_hcpc_segment_level(params, path, suffix, monkeypatch):
    """Sequences too short for an anchor are lengthened as the original lengthens them, by zeros."""
    if params["quantizer_codes"]:
        pytest.skip("its targets are quantised")
    golden, level = np.load(path), params["segment"]
    margin = level["K"] + 1 if level.get("adjacent") else level["M"]
    lengths = torch.from_numpy(golden["lens"]).clamp(min=margin + 1)
    dtype = torch.float64 if suffix else torch.float32
    criterion, leaves, output = segment_step(params, golden, lengths, dtype, monkeypatch)
    tolerance = 1e-6 if suffix else 1e-5
    assert_close(output.losses, golden["losses_segment" + suffix], tolerance, "losses")
    assert_close(output.losses.sum(), golden["costs_segment" + suffix].mean(), 1e-6, "cost")
    assert_close(output.accuracies, golden["acc_segment_right"], 1e-6, "accuracies")
    (output.losses.mean() / 2).backward()  # its share of the two levels' loss
    for leaf, name in zip(leaves, ("grad_cs", "grad_zs"), strict=True):
        assert_close(leaf.grad, golden[name + suffix], 1e-6 if suffix else 1e-4, name)
    prefix = "gp.segmentLevelCriterion."
    names = [n for n in golden.files if n.startswith(prefix) and not n.endswith(".call2")]
    gradients = {name.removeprefix(prefix): torch.from_numpy(golden[name]) for name in names}
    assert_gradients_close(criterion, gradients, 1e-4)


@pytest.mark.parametrize(("params", "path"), hcpc_cases("segment"))
def test_golden_hcpc_segments_too_short_for_an_anchor_have_none(params, path, monkeypatch):
    """The original lets them predict padding: its costs of the others are ours."""
    golden, level = np.load(path), params["segment"]
    lengths = torch.from_numpy(golden["lens"])
    if level.get("adjacent") or (lengths > level["M"]).all():
        pytest.skip("all are long enough")
    windows = torch.from_numpy(golden["windows_segment"])
    enough = (lengths > level["M"]).repeat_interleave(windows)
    capture = frozenset(("cpcctc_log_scores", "cpcctc_align"))
    *_, output = segment_step(params, golden, lengths, torch.float32, monkeypatch, capture)
    assert_close(output.losses.sum(), golden["costs_segment"][enough].mean(), 1e-5, "cost")
    for name, other in (("log_scores", "cpcctc_log_scores"), ("aligns", "cpcctc_align")):
        assert_close(output.captured[other], golden[f"{name}_segment"][enough], 1e-5, name)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("params", "path"), hcpc_cases("min_segments_train"))
def test_golden_hcpc_means_of_segments(params, path, mode):
    golden = np.load(path)
    frames, lengths = torch.from_numpy(golden["x"]), torch.from_numpy(golden["eval.lens"])
    first = torch.from_numpy(golden["eval.matrix"]).argmax(2)
    boundaries = torch.zeros(frames.shape[:2], dtype=torch.long).scatter_(1, first, 1)
    vectors = means_of_segments(frames, boundaries)
    if mode == "train":
        vectors, lengths = repeat_last(vectors, lengths, params["min_segments_train"])
    assert torch.equal(lengths, torch.from_numpy(golden[f"{mode}.lens"]))
    for row, expected in zip(
        vectors.split(lengths.tolist()), golden[f"{mode}.segments"], strict=True
    ):
        assert_close(row, expected[: len(row)], 1e-5, "segments")


@pytest.mark.parametrize(("params", "path"), hcpc_cases("threshold"))
def test_golden_hcpc_detector(params, path):
    golden = np.load(path)
    frames = torch.from_numpy(golden["x"]).requires_grad_()
    boundaries = ThresholdSegmenter(params["threshold"])(frames)
    vectors, lengths = means_of_segments(frames, boundaries), boundaries.sum(1)
    # Peaks of less than 3e-4 leave the original's last segments empty: not with a real threshold.
    assert torch.equal(lengths, torch.from_numpy(golden["lens"]).long())
    rows = vectors.split(lengths.tolist())
    sum(
        (row * torch.from_numpy(weights)[: len(row)]).sum()
        for row, weights in zip(rows, golden["R"], strict=True)
    ).backward()
    for row, expected in zip(rows, golden["segments"], strict=True):
        assert_close(row, expected[: len(row)], 1e-5, "segments")
    assert_close(frames.grad, golden["grad_x"], 1e-4, "gradient")


@pytest.mark.parametrize(("params", "path"), hcpc_cases("segment_width"))
def test_golden_hcpc_two_levels(params, path):
    golden = np.load(path)
    widths = ("hiddenEncoder", "hiddenGar"), ("hiddenEncoderSegment", "hiddenGarSegment")
    values = params["hiddenEncoder"], params["segment_width"]
    words = [word for names, n in zip(widths, values, strict=True) for name in names
             for word in (f"--{name}", str(n))]  # fmt: skip
    model = build_model(build_parser().parse_args(["--multiLevel", *words]))
    load_golden_state(model, golden, "sd.")
    model.train()
    frames, segments = model.both_levels(torch.from_numpy(golden["x"]))
    assert torch.equal(segments.lengths, torch.from_numpy(golden["lens"]))
    n = int(segments.lengths.max())
    for tensor, name in zip((*frames, *segments[:2]), ("c", "z", "cs", "zs"), strict=True):
        assert_close(tensor, golden[name][:, : tensor.size(1)], 1e-5, name)
    assert not golden["cs"][:, n:].any()
    model.eval().level = "segments"
    with torch.no_grad():
        context, encoded = model(torch.from_numpy(golden["x"]))
    assert_close(context, golden["eval.cs_upsampled"], 1e-5)
    assert_close(encoded, golden["eval.zs_upsampled"], 1e-5)


def two_level_checkpoints():
    """Directories of checkpoints of hCPC with two levels."""
    directories = sorted(GOLDEN_HCPC.glob("checkpoint_*/"))
    flags = [json.loads((path / "checkpoint_args.json").read_text()) for path in directories]
    return [
        pytest.param(path, id=path.name)
        for path, its_own in zip(directories, flags, strict=True)
        if its_own["multiLevel"] and its_own["segmentationMode"] == "cosineDissimilarity"
    ]


def assert_close_or_nan(actual, expected, what):
    """A checkpoint here is from a run that had died: its features are NaN, and stay NaN."""
    assert np.array_equal(actual.isnan(), np.isnan(expected)), what
    assert_close(actual.nan_to_num(), np.nan_to_num(expected), 1e-5, what)


@pytest.mark.parametrize("directory", two_level_checkpoints())
def test_golden_hcpc_checkpoint_of_two_levels_gives_the_recorded_features(directory):
    golden = np.load(f"{directory}_features.npz")
    model = load_model([directory])[0].eval()
    waveform = torch.from_numpy(golden["x"])
    with torch.no_grad():
        frames, segments = model.both_levels(waveform)
    assert torch.equal(segments.lengths, torch.from_numpy(golden["lens"]))
    assert np.array_equal(segments.boundaries, golden["boundaries"])
    model, *widths = load_model([directory], level="segments")
    with torch.no_grad():
        features = model.eval()(waveform)
    names = ("c", "z", "cs_upsampled", "zs_upsampled")
    for tensor, name in zip((*frames, *features), names, strict=True):
        assert_close_or_nan(tensor, golden[name], name)
    assert widths == [x.size(2) for x in features]


@needs_real_speech
@pytest.mark.parametrize("directory", two_level_checkpoints())
def test_golden_hcpc_checkpoint_of_two_levels_resumes(directory, tmp_path):
    """With new weights instead of NaN, from which training can't resume."""
    run = shutil.copytree(directory, tmp_path / "run", copy_function=shutil.copyfile)
    run.chmod(0o755)
    file = next(run.glob("*.pt"))
    stored = torch.load(file, weights_only=True)
    model = load_model([directory], load_weights=False)[0]
    stored["gEncoder"] = model.state_dict()
    for value in stored["cpcCriterion"].values():
        value.copy_(0.1 * torch.randn(value.shape))
    for moments in stored["optimizer"]["state"].values():
        moments |= {key: moments[key].nan_to_num() for key in ("exp_avg", "exp_avg_sq")}
    torch.save(stored, file)
    before = open_checkpoint(run).state
    lists = {"Train": "train_split.txt", "Val": "test_split.txt"}
    paths = [word for name in lists for word in (f"--path{name}", str(REAL_SPEECH / lists[name]))]
    done = before["position"][0]
    words = ["--pathDB", str(REAL_SPEECH / "audio"), *paths, "--nEpoch", str(done + 1)]
    main(["--pathCheckpoint", str(run), *words, "--device", "cpu", "--threads", "1"])
    after = read_checkpoint(run / f"checkpoint_{done}.pt").state
    for part in ("gEncoder", "cpcCriterion"):
        assert after[part].keys() == before[part].keys()
        changed = [
            key for key in after[part] if not torch.equal(after[part][key], before[part][key])
        ]
        assert len(changed) == len(after[part])
    assert after["optimizer"]["state"].keys() == before["optimizer"]["state"].keys()
    assert len(after["logs"]["locLoss_val_segments"]) == done + 1
    assert np.isfinite(after["logs"]["locLoss_val_segments"][-1]).all()


# --------------------------------------------------------------- sequences of their own lengths

LENGTHS = torch.tensor([7, 3, 11, 1, 4])
SIZES = {"dim_context": 8, "dim_encoded": 8, "n_frames": 12}
LEVEL_OF_SEGMENTS = [
    partial(CPCCriterion, 2, n_negatives=3),
    partial(CPCCriterion, 2, adjacent_negatives=True),
    partial(CPCCTCCriterion, 2, 3, n_negatives=3),
]


def vectors(*sizes):
    return torch.randn(*sizes, generator=generator_from("vectors", *sizes), dtype=torch.float64)


def losses_of(criterion, context, encoded, lengths=LENGTHS):
    generator, speaker = generator_from(1), torch.zeros(len(context), dtype=torch.long)
    return criterion(context, encoded, speaker, generator=generator, lengths=lengths).losses


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("rnn_mode", ["linear", "ffd", "LSTM", "transformer"])
@pytest.mark.parametrize("build", LEVEL_OF_SEGMENTS)
def test_padding_never_matters(build, rnn_mode, cosine):
    criterion = build(rnn_mode=rnn_mode, cosine_scores=cosine, **SIZES).double().eval()
    context, encoded = vectors(5, 11, 8), vectors(5, 11, 8) + 1
    padding = (torch.arange(11) >= LENGTHS.unsqueeze(1)).unsqueeze(2)
    zeros = [x.masked_fill(padding, 0).requires_grad_() for x in (context, encoded)]
    losses = losses_of(criterion, *zeros)
    assert torch.equal(losses, losses_of(criterion, context, encoded))
    losses.sum().backward()
    for gradient in (*(x.grad for x in zeros), *(p.grad for p in criterion.parameters())):
        assert gradient.isfinite().all()
    assert not any(x.grad[padding.expand_as(x)].any() for x in zeros)


@pytest.mark.parametrize("build", LEVEL_OF_SEGMENTS)
def test_without_any_anchor_there_is_no_loss_and_no_nan(build):
    criterion = build(rnn_mode="LSTM", **SIZES).double()
    context = vectors(2, 2, 8).requires_grad_()
    losses = losses_of(criterion, context, context, lengths=torch.tensor([2, 1]))
    losses.sum().backward()
    assert not losses.any()
    assert not context.grad.any()
    assert not any(parameter.grad.any() for parameter in criterion.parameters())


def test_negatives_are_real_segments_other_than_the_anchor():
    n_anchors = 9
    drawn = sampling.draw_negatives_within(
        LENGTHS, 11, n_anchors, 2000, device="cpu", generator=generator_from(0)
    )
    row, segment = drawn // 11, drawn % 11
    assert (segment < LENGTHS[row]).all()
    for own in range(len(LENGTHS)):
        for anchor in range(min(LENGTHS[own] - 2, n_anchors)):
            of_own = segment[own, anchor][row[own, anchor] == own]
            others = sorted({*range(LENGTHS[own])} - {anchor})
            assert sorted(set(of_own.tolist())) == others
            assert of_own.bincount(minlength=11)[others].min() > 0.6 * len(of_own) / len(others)
    assert row.flatten().bincount().min() > 0.95 * row.numel() / len(LENGTHS)


# --------------------------------------------------------------------------------------- model

FLAGS = (
    "--hiddenEncoder 8 --hiddenGar 6 --hiddenEncoderSegment 5 --hiddenGarSegment 7 --multiLevel "
    "--rnnMode linear --rnnModeSegment linear"
).split()


def two_levels(*words):
    return build_model(build_parser().parse_args([*FLAGS, *words])).eval()


def rows():
    """Noise, and silence: many segments and one."""
    waveform = torch.randn(4, 1, 8000, generator=generator_from("waveform"))
    waveform[2] = 0
    waveform[3, :, 2000:] = 0
    return waveform


@pytest.mark.parametrize("words", [[], ["--segmentOnContext"], ["--segmentationMode", "scpc"]])
@torch.no_grad()
def test_each_row_has_its_own_segments(words):
    model, waveform = two_levels(*words), rows()
    _, together = model.both_levels(waveform)
    assert together.lengths[2] == 1
    assert len(set(together.lengths.tolist())) > 2
    order = torch.tensor([3, 0, 2, 1])
    _, permuted = model.both_levels(waveform[order])
    for one, other in zip(permuted[:4], together[:4], strict=True):
        assert_close(one, other[order], 1e-6)
    for row, n in enumerate(together.lengths.tolist()):
        _, alone = model.both_levels(waveform[row : row + 1])
        assert_close(alone.context[0], together.context[row, :n], 1e-5)
        assert torch.equal(alone.boundaries[0], together.boundaries[row])


@torch.no_grad()
def test_segments_are_means_of_frames_between_boundaries():
    """By loops, and with them repeated over their frames."""
    model = two_levels()
    (_, encoded), segments = model.both_levels(rows(), least=6)
    for row in range(4):
        starts = segments.boundaries[row].nonzero().flatten().tolist()
        means = [encoded[row, a:b].mean(0) for a, b in pairwise([*starts, encoded.size(1)])]
        means += [means[-1]] * (6 - len(means))
        assert segments.lengths[row] == len(means)
        expected = model.sEncoder(torch.stack(means))
        assert_close(segments.encoded[row, : len(means)], expected, 1e-5)
        context = nn.LSTM.forward(model.sAR, expected[None])[0][0]
        assert_close(segments.context[row, : len(means)], context, 1e-5)
        of_frame = [next(i for i, a in reversed([*enumerate(starts)]) if a <= t) for t in range(50)]
        assert torch.equal(segments.upsampled()[0][row], segments.context[row, of_frame])


@torch.no_grad()
def test_kept_hidden_states_of_segments_continue_where_rows_do():
    model = two_levels("--samplingType", "sequential")
    waveform = rows()[:2]
    first, second = ([*model.both_levels(waveform)[1]] for _ in range(2))
    state = model.hidden_state()
    sequence = torch.cat([x[1][0, : x[2][0]] for x in (first, second)])
    expected = nn.LSTM.forward(model.sAR, sequence[None])[0][0]
    assert_close(second[0][0, : second[2][0]], expected[first[2][0] :], 1e-5)
    third = model.both_levels(waveform, torch.tensor([True, False]))[1]
    assert torch.equal(third.context[1], first[0][1])
    model.set_hidden_state(state)
    again = model.both_levels(waveform, torch.tensor([True, False]))[1]
    assert torch.equal(again.context, third.context)
    model.reset_hidden()
    assert torch.equal(model.both_levels(waveform)[1].context, first[0])


def test_segments_of_a_long_file_are_those_of_one_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_loader, "FRAMES_PER_PART", 40)
    waveform = 0.1 * torch.randn(30_000, generator=generator_from("file"))
    soundfile.write(tmp_path / "a.wav", waveform.numpy(), 16_000, subtype="FLOAT")
    model = two_levels()
    model.level = "segments"
    with torch.no_grad():
        expected = model(waveform[None, None])
    for encoded in (False, True):
        features = feature_loader.build_feature(model, tmp_path / "a.wav", get_encoded=encoded)
        assert_close(features, expected[encoded], 1e-5)


# ------------------------------------------------------------------------------------ training


def networks_of(*words):
    args = build_parser().parse_args(["--sizeWindow", "8000", *FLAGS, *words])
    return join_networks(build_criterion(args, 1), build_model(args), args)


def batch_of(waveform):
    zeros = torch.zeros(len(waveform), dtype=torch.long)
    return Batch(waveform, zeros, None, zeros, zeros.bool())


def test_the_total_is_the_mean_over_levels_of_weighted_means():
    networks = networks_of("--headWeights", "3", "0.5", "--nPredicts", "4")
    losses = torch.rand(1, 5)
    expected = (3 * losses[0, :4].mean() + 0.5 * losses[0, 4:].mean()) / 2
    assert_close(networks.total(losses), expected, 1e-6)
    alone = networks_of("--headWeights", "3", "0.5", "--segmentLevel", "--nPredictsSegment", "2")
    assert_close(alone.total(losses[:, :2]), 0.5 * losses[0, :2].mean(), 1e-6)
    assert networks.named("val", [1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == {
        "locLoss_val": [1, 2, 3, 4], "locLoss_val_segments": [5],
        "locAcc_val": [6, 7, 8, 9], "locAcc_val_segments": [10],
    }  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["--normalizeCPCScore", "--rnnModeSegment", "ffd"],
        ["--CPCCTC", "--CPCCTCNumMatchedSegment", "4", "--nPredictsSegment", "2"],
        ["--adjacentNegatives", "--nPredictsSegment", "3"],
    ],
)
def test_rows_of_very_different_numbers_of_segments_train(words):
    networks = networks_of(*words)
    optimizer = torch.optim.Adam(networks.parameters(), lr=0.01)
    for step in range(15):
        torch.manual_seed(step)
        losses, accuracies = networks(batch_of(rows()))
        networks.total(losses).backward()
        assert all(p.grad.isfinite().all() for p in networks.parameters())
        assert ((accuracies >= 0) & (accuracies <= 1)).all()
        optimizer.step()
        optimizer.zero_grad()


def test_what_is_frozen_or_reached_by_no_loss_stays():
    frozen = networks_of("--freezeFrameModel").train()
    assert not any(p.requires_grad for p in frozen.model.frameLevelModel.parameters())
    assert not frozen.model.frameLevelModel.training
    assert frozen.model.sAR.training
    alone = networks_of("--segmentLevel").train()
    alone.total(alone(batch_of(rows()))[0]).backward()
    untrained = {name for name, p in alone.named_parameters() if p.grad is None}
    assert untrained == {name for name, _ in alone.named_parameters() if ".gAR." in name}


SMALL_LEVELS = [
    *"--multiLevel --hiddenEncoderSegment 8 --hiddenGarSegment 6 --rnnModeSegment linear".split(),
    *"--nPredictsSegment 2 --CPCCTC --CPCCTCNumMatched 3 --CPCCTCNumMatchedSegment 3".split(),
    *"--samplingType sequential --max_size_loaded 60000".split(),
]


def test_a_run_of_two_levels_resumes_exactly_inside_an_epoch(tiny_corpus, tmp_path, monkeypatch):
    hooks = [
        *capture_flags(tiny_corpus, tmp_path / "capture"), "--supervised_classif_metric",
        "--linsep_logs_dir", tmp_path / "probes", "--linsep_n_epoch", 1,
        "--linsep_classif_each_epochs", 1, "--level", "segments",
        "--captureSetStats", f"reprDiff:cosine,seg_ctx,0.05,{tmp_path / 'stats'}",
    ]  # fmt: skip
    whole = trained(tiny_corpus, tmp_path / "whole", *SMALL_LEVELS, *hooks)
    signal_in_step(3, monkeypatch)
    words = [*on(tiny_corpus), *SMALL, *SMALL_LEVELS, "--pathCheckpoint", tmp_path / "parts"]
    assert run(*words, "--nEpoch", 2) == 128 + signal.SIGTERM
    state = torch.load(tmp_path / "parts" / "checkpoint_resume.pt", weights_only=True)
    assert state["hidden"][1] is not None
    assert run("--pathCheckpoint", tmp_path / "parts") == 0
    parts = checkpoint(tmp_path / "parts", 1)
    assert_same(whole, parts, without=("args", "logs"))
    assert all(whole["logs"][key] == values for key, values in parts["logs"].items())
    # and what the hooks left
    assert whole["logs"]["phone_best_val_acc"][1][0] > 0
    logs = load_json(tmp_path / "probes" / "1" / "phone" / "logs.json")
    assert logs["measured_on"]["layer"] == "context (segments)"
    assert logs["measured_on"]["dimensions"] == 6
    batch = next(iter(CaptureReader(tmp_path / "capture" / "1")))
    assert batch["seg_boundaries"][:, 0].all()
    assert (batch["seg_ctx"].shape[2], batch["seg_conv"].shape[2]) == (6, 8)
    inside = batch["seg_boundaries"][:, 1:] == 0
    for name in ("seg_ctx", "seg_conv"):
        moves = (batch[name][:, 1:] != batch[name][:, :-1]).any(2)
        assert not (moves & inside).any()


def test_a_level_of_segments_goes_on_top_of_a_loaded_frame_level(tiny_corpus, tmp_path, capsys):
    one = trained(tiny_corpus, tmp_path / "one", epochs=1)["gEncoder"]
    load = ["--load", tmp_path / "one", "--multiLevel", *SMALL_LEVELS[1:7], "--nPredictsSegment", 1]
    with ends_refused(capsys, "--loadOnlyFrameModel puts a new one on top"):
        main([str(w) for w in [*on(tiny_corpus), "--pathCheckpoint", tmp_path / "no", *load]])
    load += ["--loadOnlyFrameModel", "--freezeFrameModel"]
    two = trained(tiny_corpus, tmp_path / "two", *load, epochs=1)
    for name, value in one.items():
        assert torch.equal(two["gEncoder"][f"frameLevelModel.{name}"], value)
    assert run("--pathCheckpoint", tmp_path / "two", "--nEpoch", 2) == 0
    resumed = checkpoint(tmp_path / "two", 1)
    assert len(resumed["logs"]["locLoss_val"]) == 2
    before, after = (state["gEncoder"]["sAR.weight_hh_l0"] for state in (two, resumed))
    assert not torch.equal(before, after)
    back = ["--load", tmp_path / "two", "--loadOnlyFrameModel", "--learningRate", 0]
    frames = trained(tiny_corpus, tmp_path / "back", *back, epochs=1)["gEncoder"]
    assert frames.keys() == one.keys()
    assert all(torch.equal(frames[name], one[name]) for name in one)


def test_boundaries_of_segments_are_measured(tiny_corpus, tmp_path):
    """Those of the model itself, over whole utterances."""
    trained(tiny_corpus, tmp_path / "run", *SMALL_LEVELS, epochs=1)
    words = [
        tiny_corpus / "audio", tiny_corpus / "test.txt", tmp_path / "run", "--level", "segments",
        "--pathPhone", tiny_corpus / "phones.txt", "--out", tmp_path / "out",
    ]  # fmt: skip
    segmentation.main([str(word) for word in words])
    model = load_model([tmp_path / "run"])[0].eval()
    written = (tmp_path / "out" / "phone_boundaries.txt").read_text().splitlines()
    lines = dict(line.split(" ", 1) for line in written)
    for path in sorted(tiny_corpus.glob("audio/*/*/*.flac")):
        if path.stem in lines:
            frames = feature_loader.build_feature(model, path, get_encoded=True)
            starts = model.segmenter(frames)[0].nonzero().flatten().tolist()
            assert lines[path.stem].split() == [str(start) for start in starts[1:]]
    assert len(lines) == 3
