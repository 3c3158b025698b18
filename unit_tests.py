"""How the program is used and what it promises, in reading order: `pytest unit_tests.py`.

1. Its values are those of the original program: networks, criteria, alignment, training steps.
2. It trains: from audio and labels to checkpoints, logs and pictures, with a loss that falls.
3. It repeats: a seed gives the same bits, and a killed run resumes where it stopped.
4. It shows what was learned: features, captures, probes, stats.
5. What can't work is refused in one line.

Every command here is one that a user types, on a corpus of nine short utterances in which each
phone is a tone. `tests/` holds the rest: each option, each file, each error.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch

import train
from criterion import build_criterion
from criterion.networks import Networks
from criterion.soft_align import FORBIDDEN_BLANK, LEARNED_BLANK, NO_BLANK, soft_align
from dataset import Batch
from feature_loader import build_feature, load_model
from model import build_model
from stats.empty_stat import Stat
from stats.stats_utils import STATS
from tests.helpers import ROOT, assert_close, assert_equal_trees, ends_refused, golden_cases
from utils.misc import Position
from utils.run.distributed import World
from utils.run.flags import build_parser
from utils.run.logs import RunningMeans

SMALL = (
    "--hiddenEncoder 8 --hiddenGar 8 --rnnMode linear --negativeSamplingExt 4 --nPredicts 2 "
    "--sizeWindow 3200 --batchSizeGPU 4 --n_process_loader 2 --threads 1 --random_seed 7"
).split()
ALIGNED = (
    "--CPCCTC --nPredicts 8 --CPCCTCNumMatched 12 --CPCCTCSelfLoop --CPCCTCSkipBeg 1 "
    "--CPCCTCSkipEnd 2"
).split()


def run(*argv):
    """`python train.py ...` in this process; its exit status."""
    return train.main([str(word) for word in argv]) or 0


def training(corpus, directory, *flags, epochs=2):
    """The command line of a small training run."""
    return [
        *("--pathDB", corpus / "audio", "--pathTrain", corpus / "train.txt"),
        *("--pathVal", corpus / "test.txt", "--pathCheckpoint", directory),
        *("--nEpoch", epochs, "--save_step", 1, *SMALL, *flags),
    ]


def checkpoint(directory, epoch):
    return torch.load(Path(directory, f"checkpoint_{epoch}.pt"), weights_only=True)


def trained(corpus, directory, *flags, epochs=2):
    """The last checkpoint of a training run."""
    assert run(*training(corpus, directory, *flags, epochs=epochs)) == 0
    return checkpoint(directory, epochs - 1)


def assert_same_bits(one, other):
    """Two checkpoints are equal bit for bit, but for their flags, which name directories."""
    assert one.keys() == other.keys()
    for key in one.keys() - {"args"}:
        assert_equal_trees(one[key], other[key], key)


# ------------------------------------------------------ 1. the values of the original program


def parsed(*flags):
    """The arguments that a command line with these flags stands for."""
    return build_parser().parse_args([str(flag) for flag in flags])


def golden_flags(config):
    """The flags of a golden case that fit both criteria."""
    flags = ["--nPredicts", config["nPredicts"], "--rnnMode", config["rnnMode"]]
    flags += ["--negativeSamplingExt", config["negativeSamplingExt"]]
    if "nMatched" in config:
        flags += ["--CPCCTCNumMatched", config["nMatched"]]
        flags += ["--CPCCTCSkipBeg", config.get("allowed_skips_beg", 0)]
        flags += ["--CPCCTCSkipEnd", config.get("allowed_skips_end", 0)]
        flags += ["--CPCCTCSelfLoop"] * config.get("predict_self_loop", False)
    return flags


def replay_draws(monkeypatch, *drawn):
    """Let PyTorch draw these random numbers, the indices that the original took negatives from."""
    numbers = iter(drawn)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: next(numbers).flatten())


@pytest.mark.parametrize("case", golden_cases("CPCModel"))
def test_encoder_and_context_network_golden(case):
    """waveform (B, 1, L) -> context (B, S, C) and encoded (B, S, E), a frame per 160 samples."""
    encoder, ar = case.config["encoder"], case.config["ar"]
    flags = ["--hiddenEncoder", encoder["sizeHidden"], "--normMode", encoder["normMode"]]
    flags += ["--hiddenGar", ar["dimOutput"], "--arMode", ar["mode"]]
    model = build_model(parsed(*flags, "--nLevelsGRU", ar["nLevelsGRU"]))
    assert list(model.state_dict()) == list(case.state_dict)
    model.load_state_dict(case.state_dict)
    context, encoded = model.eval()(case["x"])
    assert_close(context, case["c"])
    assert_close(encoded, case["z"])


@pytest.mark.parametrize("name", ["cpc_linear", "cpcctc_garne", "cpcctc_readme"])
def test_criteria_golden(name, monkeypatch):
    """Losses and gradients of CPC, and of CPC-CTC as in the paper."""
    cases = golden_cases("CPCUnsupersivedCriterion", "CPCCTC")
    case = {parameters.id: parameters.values[0] for parameters in cases}.get(name)
    if case is None:
        pytest.skip("not among the golden values of a bare clone")
    config = case.config
    flags = ["--hiddenEncoder", config["dimOutputEncoder"], "--hiddenGar", config["dimOutputAR"]]
    flags += ["--sizeWindow", 160 * config["sizeInputSeq"], *golden_flags(config)]
    flags += ["--CPCCTC"] * ("nMatched" in config)
    criterion = build_criterion(parsed(*flags), n_speakers=1)
    criterion.load_state_dict(case.state_dict)
    replay_draws(monkeypatch, case["batchIdx_raw"], case["seqIdx_raw"])
    context, encoded = (case[leaf].clone().requires_grad_() for leaf in ("c", "z"))
    output = criterion(context, encoded, case["label"])
    assert_close(output.losses, case["losses"])
    output.losses.sum().backward()
    assert_close(context.grad, case["grad_c"], 1e-4)
    assert_close(encoded.grad, case["grad_z"], 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", golden_cases("soft_align"))
def test_soft_align_golden(case, dtype):
    """Log-scores (N, M, P) of M frames under P predictions -> cost (N,) and alignment (N, M)."""
    config, suffix = case.config, "64" if dtype == torch.float64 else ""
    masked = config["variant"] == "masked"
    blank = FORBIDDEN_BLANK if masked else NO_BLANK
    log_scores = case["log_probs"].to(dtype, copy=True).requires_grad_()
    cost, alignment = soft_align(
        log_scores,
        config["allowed_skips_beg"],
        config["allowed_skips_end"],
        blank=blank if config["force_forbid_blank"] else LEARNED_BLANK,
    )
    cost.backward(case["grad_out"].to(dtype))
    assert_close(cost, case["cost" + suffix], 1e-9 if suffix else 1e-5)
    tolerance = 1e-9 if suffix else 2e-3 if masked else 1e-4
    assert_close(log_scores.grad, case["grad" + suffix], tolerance)
    certain = case["margin"] >= 1e-4
    assert torch.equal(alignment[certain], case["align64"][certain])


@pytest.mark.parametrize("case", golden_cases("trainStep"))
def test_training_steps_golden(case, monkeypatch):
    """Steps of Adam, then validation, from recorded weights, batches and negatives."""
    config = case.config
    flags = ["--hiddenEncoder", config["E"], "--hiddenGar", config["A"], "--sizeWindow", 3200]
    flags += ["--arMode", config["arMode"], "--normMode", config["normMode"]]
    args = parsed(*flags, *golden_flags(config), *["--CPCCTC"] * config["CPCCTC"])
    networks = Networks(build_criterion(args, n_speakers=1), build_model(args))
    networks.load_state_dict(case.state_dict)
    adam = {"lr": config["lr"], "betas": config["betas"], "eps": config["eps"]}
    means = {"train": RunningMeans(), "val": RunningMeans()}
    state = SimpleNamespace(  # as much of a RunState as a step needs
        args=args,
        networks=networks,
        optimizer=torch.optim.Adam(networks.parameters(), **adam, fused=True),
        device=torch.device("cpu"),
        world=World(),
        count_step=lambda _, batch, losses, accuracies, __: means["train"].add(
            losses, accuracies, len(batch.window)
        ),
    )
    forward_backward = train.build_forward_backward(state)
    for part, n_drawn in (("train", 0), ("val", config["n_train_batches"])):
        networks.train(part == "train")
        for i in range(config[f"n_{part}_batches"]):
            draw, zeros = n_drawn + i, torch.zeros(3, dtype=torch.int64)
            replay_draws(monkeypatch, case[f"batchIdx_raw{draw}"], case[f"seqIdx_raw{draw}"])
            batch = Batch(case[f"batch{i}"], zeros, None, zeros, None)
            if part == "train":
                train.train_step(state, forward_backward, Position(0, 0, i), batch)
            else:
                means["val"].add(*networks(batch), len(zeros))
        losses, accuracies = map(torch.tensor, means[part].means())
        assert_close(losses, case[f"locLoss_{part}"].flatten().float())
        assert_close(accuracies, case[f"locAcc_{part}"].flatten().float())
    for key, value in networks.state_dict().items():
        assert_close(value, case[f"after.{key}"], 1e-4, what=key)


# -------------------------------------------------------------------------------- 2. training


def test_a_run_leaves_checkpoints_arguments_logs_and_curves(tiny_corpus, tmp_path, capsys):
    state = trained(tiny_corpus, tmp_path, "--learningRate", "0.01", "--schedulerRamp", "2")
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint_0.pt", "checkpoint_1.pt", "checkpoint_args.json", "checkpoint_logs.json",
        "checkpoint_curves.png", "report.html", "report_data.json",
    }  # fmt: skip
    logs = json.loads((tmp_path / "checkpoint_logs.json").read_text())
    assert logs == state["logs"]
    assert logs["epoch"] == [0, 1]
    assert logs["learningRate"] == [0.005, 0.01]
    for key in ("locLoss_train", "locAcc_train", "locLoss_val", "locAcc_val"):
        assert [len(row) for row in logs[key]] == [2, 2]
    args = json.loads((tmp_path / "checkpoint_args.json").read_text())
    assert args["nPredicts"] == 2
    assert args["pathDB"] == f"{tiny_corpus}/audio"
    printed = capsys.readouterr().out
    assert "training set: 6 files" in printed
    assert "windows/s" in printed
    assert str(tmp_path / "checkpoint_curves.png") in printed


def test_a_run_learns(tiny_corpus, tmp_path):
    """The validation loss falls, and the weights of the most accurate epoch are kept."""
    flags = (
        "--hiddenEncoder 32 --hiddenGar 32 --negativeSamplingExt 16 --sizeWindow 6400 "
        "--samplingType uniform --learningRate 0.005"
    ).split()
    state = trained(tiny_corpus, tmp_path, *flags, epochs=8)
    start = sum(state["logs"]["before_training"]["locLoss_val"])
    assert sum(state["logs"]["locLoss_val"][-1]) < 0.9 * start
    accuracies = [sum(row) / 2 for row in state["logs"]["locAcc_val"]]
    best = accuracies.index(max(accuracies))
    assert state["best_accuracy"] == accuracies[best]
    assert_equal_trees(state["best"], checkpoint(tmp_path, best)["gEncoder"], "best")


# ------------------------------------------------------------------------------- 3. repeating


def test_the_same_seed_gives_the_same_checkpoint(tiny_corpus, tmp_path):
    one, other = (trained(tiny_corpus, tmp_path / name) for name in "ab")
    assert_same_bits(one, other)
    different = trained(tiny_corpus, tmp_path / "c", "--random_seed", "8")
    assert not torch.equal(
        one["gEncoder"]["gEncoder.conv0.weight"], different["gEncoder"]["gEncoder.conv0.weight"]
    )


KILLED_IN_STEP_TWENTY = """
import itertools, os, signal, sys, torch, train

numbers, step = itertools.count(1), torch.optim.Adam.step

def step_or_die(*args):
    return step(*args) if next(numbers) < 20 else os.kill(os.getpid(), signal.SIGKILL)

torch.optim.Adam.step = step_or_die
train.main(sys.argv[1:])
"""


def test_a_killed_run_resumes_bit_identically(tiny_corpus, tmp_path):
    """`--pathCheckpoint` alone resumes: the other flags are in the checkpoint."""
    flags = [*ALIGNED, "--samplingType", "sequential", "--schedulerRamp", "3"]
    whole = trained(tiny_corpus, tmp_path / "whole", *flags)
    killed = training(tiny_corpus, tmp_path / "killed", *flags, "--resume_every", 2)
    command = [sys.executable, "-c", KILLED_IN_STEP_TWENTY, *map(str, killed)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    saved = torch.load(tmp_path / "killed" / "checkpoint_resume.pt", weights_only=True)
    epoch, *within = saved["position"]
    assert epoch == 1
    assert any(within)  # of the second epoch some steps are done
    assert run("--pathCheckpoint", tmp_path / "killed", "--threads", 1) == 0
    assert_same_bits(whole, checkpoint(tmp_path / "killed", 1))
    assert not (tmp_path / "killed" / "checkpoint_resume.pt").exists()


# ------------------------------------------------------------------- 4. what has been learned


def test_a_model_makes_features_of_a_file(tiny_corpus, tmp_path):
    """A frame per 10 ms, as wide as the context network, or the encoder."""
    state = trained(tiny_corpus, tmp_path, "--hiddenGar", 12, epochs=1)
    model, hidden_gar, hidden_encoder = load_model([tmp_path / "checkpoint_0.pt"])
    assert (hidden_gar, hidden_encoder) == (12, 8)
    assert_equal_trees(state["gEncoder"], dict(model.state_dict()), "weights")
    path = tiny_corpus / "audio" / "10" / "0" / "10-0-0000.flac"
    n_frames = soundfile.info(path).frames // 160
    assert build_feature(model, path).shape == (1, n_frames, 12)
    assert build_feature(model, path, get_encoded=True).shape == (1, n_frames, 8)


def capture_flags(corpus, directory):
    return [
        *("--captureEverything", "--captureEachEpochs", 1, "--pathCaptureSave", directory),
        *("--pathCaptureDS", corpus / "test.txt", "--path_phone_data", corpus / "phones.txt"),
    ]


def captured(directory):
    return {
        path.relative_to(directory): torch.load(path, weights_only=True)
        for path in Path(directory).rglob("*.pt")
    }


@pytest.mark.parametrize("flags", [[], ALIGNED], ids=["cpc", "cpc-ctc"])
def test_capture_on_a_checkpoint_equals_the_one_during_training(flags, tiny_corpus, tmp_path):
    trained(tiny_corpus, tmp_path / "run", *flags, *capture_flags(tiny_corpus, tmp_path / "during"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    again = ["--onlyCapture", "--pathDB", tiny_corpus / "audio", "--pathCheckpoint"]
    flags_of_capture = capture_flags(tiny_corpus, tmp_path / "after")
    assert run(*again, tmp_path / "run", *flags_of_capture) == 0
    assert run(*again, tmp_path / "run" / "checkpoint_0.pt", *flags_of_capture) == 0
    during, after = captured(tmp_path / "during"), captured(tmp_path / "after")
    assert_equal_trees(during, after, "capture")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    # A file per batch of windows; 4 windows of S = 20 frames, each a row.
    shapes = {path.parts[1]: tuple(t.shape) for path, t in after.items() if "0-3" in path.name}
    expected = {
        "conv_repr": (4, 20, 8),  # (B, S, E)
        "ctx_repr": (4, 20, 8),  # (B, S, C)
        "speaker_align": (4,),
        "phone_align": (4, 20),
        "pred": (4, 18, 8, 2),  # (B, W, E, K): 18 anchors have 2 frames after them
    }
    if flags:  # 8 anchors have 12 frames after them; 9 predictions: the anchor's frame and 8
        expected |= {
            "pred": (4, 8, 8, 9),
            "cpcctc_align": (4, 8, 12),  # (B, W, M): the prediction that each frame matches
            "cpcctc_log_scores": (4, 8, 12, 9),  # (B, W, M, K)
        }
    assert shapes == expected
    index = json.loads((tmp_path / "after" / "1" / "index.json").read_text())
    assert index["windows"][0]["file"].endswith(".flac")


def test_a_phone_probe_on_a_checkpoint_beats_the_majority_class(tiny_corpus, tmp_path):
    trained(tiny_corpus, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    probe = ["--only_classif_metric", "--pathCheckpoint", tmp_path / "run", "--linsep_n_epoch", 20]
    probe += ["--linsep_lr", 0.05, "--linsep_logs_dir", tmp_path / "probes"]
    assert run(*probe, "--path_phone_data", tiny_corpus / "phones.txt") == 0
    logs = json.loads((tmp_path / "probes" / "1" / "phone" / "logs.json").read_text())
    assert logs["best_val_acc"] > logs["baseline_val_acc"] + 0.1
    assert logs["best_val_acc"] == max(accuracy for (accuracy,) in logs["locAcc_val"])
    assert run(*probe, "--path_phone_data", tiny_corpus / "phones.txt", "--CTCphones") == 0
    assert not (tmp_path / "probes" / "1" / "speaker").exists()
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


class Length(Stat):
    """A stat of one's own: the mean Euclidean length of encoded frames or context vectors."""

    arguments = ("REPR",)

    def __init__(self, representation):
        self.representation = representation
        self.needs = frozenset({representation})

    def getStatName(self):
        return f"length_{self.representation}"

    def computeForBatch(self, batch):
        lengths = batch[self.representation].double().norm(dim=-1)
        return {"sum": lengths.sum().item(), "frames": lengths.numel()}

    def mergeStatResults(self, prev, current):
        return {key: prev[key] + current[key] for key in prev}

    def logStat(self, statValue, epochNr):
        return {"mean": statValue["sum"] / statValue["frames"]}


def test_stats_are_registered_collected_logged_and_drawn(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(STATS, "length", Length)
    pictures = tmp_path / "pictures"
    flags = capture_flags(tiny_corpus, tmp_path / "captures")
    flags += ["--captureSetStats", f"reprDiff:cosine,ctx_repr,0.05,{pictures}"
              f"_alignOccupancy:{pictures}_length:ctx_repr"]  # fmt: skip
    logs = trained(tiny_corpus, tmp_path / "run", *ALIGNED, *flags)["logs"]
    for epoch in (0, 1):
        files = (tmp_path / "captures" / str(epoch) / "ctx_repr").iterdir()
        contexts = torch.cat([torch.load(path, weights_only=True).flatten(0, 1) for path in files])
        mean = contexts.double().norm(dim=1).mean().item()
        assert logs["length_ctx_repr_mean"][epoch] == pytest.approx(mean)
    assert {path.name for path in pictures.iterdir()} == {
        f"{name}_{epoch}.png"
        for name in ("reprDiff_ctx_repr_cosine_by0.05", "alignOccupancy")
        for epoch in (0, 1)
    }


# -------------------------------------------------------------------------------- 5. refusals


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--pathDB", "TMP/none"], "none"),
        (["--file_extension", ".wav"], ".flac"),
        (["--pathTrain", "TMP/foreign"], "foreign"),
        (["--supervised", "--path_phone_data", "TMP/labels"], "line 2"),
        (["--CPCCTC", "--CPCCTCMasq", "1:2:3"], "--CPCCTCMasq"),
        (["--pathCaptureDS", "TMP/foreign", "--captureSetStats", "x:y"], "reprDiff"),
        (["--CPCCTC", "--nPredicts", "9", "--CPCCTCNumMatched", "8"], "--nPredicts 9"),
        (["--sizeWindow", "1600000", "--nPredicts", "2"], "--sizeWindow"),
    ],
    ids="database extension list labels mask stat K_over_M window".split(),
)
def test_bad_input_is_one_clear_line(flags, said, tiny_corpus, tmp_path, capsys):
    (tmp_path / "foreign").write_text("nobody-0-0000\n")
    (tmp_path / "labels").write_text("a 1 2 3\nb 1 two\n")
    flags = [flag.replace("TMP", str(tmp_path)) for flag in flags]
    with ends_refused(capsys, said):
        run(*training(tiny_corpus, tmp_path / "run", *flags))
