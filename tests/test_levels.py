"""Two levels, of frames and of segments: golden values of hCPC, slow references, whole runs."""

import json
import shutil

import numpy as np
import pytest
import torch

from criterion import CPCCriterion, CPCCTCCriterion, sampling
from feature_loader import load_model
from model import build_model
from segments import ThresholdSegmenter, means_of_segments, repeat_last
from tests.helpers import (
    GOLDEN_HCPC,
    REAL_SPEECH,
    assert_close,
    assert_gradients_close,
    hcpc_cases,
    needs_real_speech,
)
from tests.test_hcpc import load_golden_state
from train import main
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
    """With new weights instead of NaN, with which no training can go on."""
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
