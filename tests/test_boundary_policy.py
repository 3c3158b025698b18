"""Learned boundaries: golden values of hCPC, slow references, whole runs."""

import json

import numpy as np
import pytest
import torch

import boundary_policy
import train
from boundary_policy import POSITIONS, LearnedSegmenter, keep_apart
from criterion import build_criterion, join_networks, quantised_targets, reinforce
from criterion.quantised_targets import Reservoir, RobustKmeans
from eval.starts import StartWatch
from model import build_model
from tests.helpers import (
    GOLDEN_HCPC,
    assert_close,
    assert_gradients_close,
    ends_refused,
    hcpc_cases,
)
from tests.test_levels import segment_step
from tests.test_train import SMALL, assert_same, checkpoint, on, run
from transformers import two_sided_scores
from utils.capture import CaptureReader
from utils.kmeans import assign
from utils.misc import UserError, generator_from
from utils.run.adam import load_optimizer, parameter_groups
from utils.run.checkpoint_checks import _are_epoch_means
from utils.run.flags import build_parser, stored_arguments
from utils.run.hcpc import take_over
from utils.run.level_flags import OF_POLICY

# ------------------------------------------------------------------------------ golden values


def load_golden(module, golden, prefix):
    names = [name for name in golden.files if name.startswith(prefix)]
    state = {name.removeprefix(prefix): torch.from_numpy(golden[name]) for name in names}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert unexpected == []
    assert {name.split(".")[-1] for name in missing} <= {"z", "mask", "buffer", "i"}


def golden_gradients(golden, prefix):
    names = [name for name in golden.files if name.startswith(prefix) and ".call2" not in name]
    return {name.removeprefix(prefix): torch.from_numpy(golden[name]) for name in names}


def golden_segmenter(params, golden, mode):
    """The policy of the case, its choices and its log-probabilities; dropout is off."""
    segmenter = LearnedSegmenter(golden["x"].shape[2], params["layers"]).eval()
    load_golden(segmenter.boundaryPredictor, golden, "sd.")
    segmenter.boundaryPredictor.anneal(params["numUpdates"])
    choice = segmenter.choose(torch.from_numpy(golden["x"]))
    if mode == "train":
        choice = choice._replace(actions=torch.from_numpy(golden["train.boundaries"]).long())
    return segmenter, choice


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("params", "path"), hcpc_cases("numUpdates"))
def test_golden_hcpc_policy(params, path, mode):
    """The original lays windows end to end for its prior: one window here."""
    golden = np.load(path)
    segmenter, choice = golden_segmenter(params, golden, mode)
    assert np.array_equal(choice.actions, golden[f"{mode}.boundaries"])
    assert_close(choice.log_probs, golden[f"{mode}.log_probs"], 1e-5)
    chosen = choice.log_probs.gather(2, choice.actions.unsqueeze(2))
    assert_close(chosen, golden[f"{mode}.chosen_log_probs"], 1e-5)
    weight = reinforce.entropy_weight(params["epoch"], mode == "train")
    entropy = reinforce.entropy_loss(choice.log_probs, weight)
    name = f"train.entropy_loss_epoch{params['epoch']}" if mode == "train" else "eval.entropy_loss"
    assert_close(entropy, golden[name], 1e-5)
    first = torch.from_numpy(golden[f"{mode}.length_draw"])
    windows = torch.zeros_like(first), first.unsqueeze(1) + torch.arange(reinforce.PRIOR_FRAMES)
    probs = choice.log_probs[..., 1].exp().view(1, -1)
    density = reinforce.density_loss(probs, windows, build_parser().get_default("meanSegment"))
    assert_close(density, golden[f"{mode}.length_loss"], 1e-5)
    if mode == "train":
        (entropy + density).backward()
        found = {n: p.grad for n, p in segmenter.boundaryPredictor.named_parameters()}
        for name, gradient in golden_gradients(golden, "gp.").items():
            assert_close(found[name], gradient, 1e-4, name)


class Call(dict):
    """The golden values of a call; those it lacks are the first call's."""

    def __init__(self, golden, suffix):
        self.files = [name for name in golden.files if not name.endswith(".call2")]
        super().__init__((n, golden[n + suffix * (n + suffix in golden)]) for n in self.files)


@pytest.mark.parametrize(
    ("params", "path"), [case for case in hcpc_cases("calls") if "rl" in case.values[0]["segment"]]
)
def test_golden_hcpc_policy_gradient(params, path, monkeypatch):
    """Over two steps. The original divides the sum of a window's costs by the number of anchors of
    the window that has most: its windows of few segments seem easy."""
    golden, setup = np.load(path), params["segment"]["rl"]
    lengths, baseline = torch.from_numpy(golden["lens"]), torch.zeros(1)
    for suffix in ("", ".call2")[: params["calls"]]:
        call = Call(golden, suffix)
        criterion, _, output = segment_step(
            params, call, lengths, torch.float32, monkeypatch, {"anchor_costs"}
        )
        costs, n_anchors = output.captured["anchor_costs"], lengths - criterion.n_future
        reinforce.update_baseline(baseline, costs)
        assert_close(baseline, call["baseline_after"], 1e-6)
        log_probs = torch.from_numpy(call["boundary_log_probs"]).squeeze(2).requires_grad_()
        if setup != "reinforceWAdvantage":
            costs = costs * (n_anchors / n_anchors.max()).repeat_interleave(n_anchors)
        args = (log_probs, costs, n_anchors, baseline)
        loss = reinforce.policy_gradient_loss(setup, *args)
        loss.backward()
        assert_close(loss.view(1, 1), call["extra.piGradLoss"], 1e-5)
        assert_close(log_probs.grad.unsqueeze(2), call["grad_boundary_log_probs"], 1e-5)


@pytest.mark.parametrize(
    ("params", "path"),
    [case for case in hcpc_cases("quantizer_codes") if case.values[0]["quantizer_codes"]],
)
def test_golden_hcpc_quantised_targets(params, path, monkeypatch):
    """The original's batch norm sees padding, up to the last segment that a window can have."""
    golden, prefix = np.load(path), "segmentLevelCriterion.targetQuantizer."
    quantiser = RobustKmeans(golden["zs"].shape[2], params["quantizer_codes"])
    load_golden(quantiser, golden, f"sd.{prefix}")
    lengths = torch.from_numpy(golden["lens"])
    encoded = torch.from_numpy(golden["zs"])[:, : lengths.max()].requires_grad_()
    normalised = quantiser.batchNorm(encoded.flatten(0, 1)).view_as(encoded)
    assert_close(quantiser.batchNorm.running_mean, golden["bn_mean_after"], 1e-5)
    assert_close(quantiser.batchNorm.running_var, golden["bn_var_after"], 1e-5)
    is_segment = torch.arange(encoded.size(1)) < lengths.unsqueeze(1)
    codes, loss = quantiser.nearest(normalised[is_segment])
    targets = torch.zeros_like(encoded).masked_scatter(is_segment.unsqueeze(2), codes)

    call = Call(golden, "")
    call |= {"zs": targets.detach().numpy()}
    call.files = [name for name in call.files if "targetQuantizer" not in name]
    _, (_, leaf), output = segment_step(params, call, lengths, torch.float32, monkeypatch)
    assert_close(output.losses, golden["losses_segment"], 1e-5)
    (output.losses.mean() / 2).backward()
    torch.autograd.backward([targets, loss], [leaf.grad, None])
    assert_close(encoded.grad, golden["grad_zs"][:, : encoded.size(1)], 1e-4, "encoded")
    assert_gradients_close(quantiser, golden_gradients(golden, f"gp.{prefix}"), 1e-4)


# --------------------------------------------------------------------------------------- policy


@pytest.mark.parametrize("n_frames", [1, 4, 5, 37, 128])
def test_boundaries_are_kept_apart_as_by_a_walk(n_frames):
    generator = generator_from(n_frames)
    likely = torch.rand(30, n_frames, generator=generator) < torch.linspace(0, 1, 30)[:, None]
    for row, kept in zip(likely.tolist(), keep_apart(likely).tolist(), strict=True):
        blocked = 0
        for wanted, found in zip(row, kept, strict=True):
            assert found == (wanted and not blocked)
            blocked = 3 if found else max(blocked - 1, 0)


@pytest.mark.parametrize("n_frames", [2, 60, POSITIONS, 200])
def test_relative_positions_mean_the_same_in_windows_of_any_length(n_frames):
    query, table = torch.randn(1, 2, n_frames, 3), torch.randn(3, POSITIONS)
    scores = two_sided_scores(query, table)[0, 1]
    query = query[0, 1] / 3**0.5
    for i in range(0, n_frames, 7):
        for j in range(0, n_frames, 5):
            if abs(i - j) >= POSITIONS:
                expected = -torch.inf
            elif j <= i:
                expected = query[i] @ table[:, POSITIONS - 1 - (i - j)]
            else:
                expected = query[i + 1] @ table[:, j - i - 2] if j > i + 1 else 0.0
            assert float(scores[i, j]) == pytest.approx(float(expected), abs=1e-5)


@torch.no_grad()
def test_a_long_file_in_blocks_has_the_log_probabilities_of_one_pass(monkeypatch):
    policy = LearnedSegmenter(8, 2).eval().boundaryPredictor
    frames = torch.randn(1, 700, 8)
    whole = policy(frames)
    monkeypatch.setattr(boundary_policy, "BLOCK", 90)
    assert_close(policy(frames), whole, 1e-5)


def test_log_probabilities_of_segments_are_sums_over_their_frames():
    segmenter = LearnedSegmenter(8, 1).train()
    choice = segmenter.choose(torch.randn(3, 40, 8))
    assert choice.actions.sum() > choice.boundaries.size(0)
    found = reinforce.log_probs_of_segments(choice)
    chosen = choice.log_probs.gather(2, choice.actions.unsqueeze(2)).squeeze(2)
    for row in range(3):
        lengths = torch.diff(choice.boundaries[row].nonzero().flatten(), append=torch.tensor([40]))
        sums = [part.sum() for part in chosen[row].split(lengths.tolist())]
        assert_close(found[row, : len(sums)], torch.stack(sums), 1e-5)
        assert not found[row, len(sums) :].any()


# ---------------------------------------------------------------------------------------- codes


def test_a_reservoir_holds_a_random_part_of_all_vectors():
    torch.manual_seed(1)
    kept = torch.zeros(1000)
    for _ in range(60):
        reservoir = Reservoir(20, 1)
        for part in torch.arange(1000.0).unsqueeze(1).split(30):
            reservoir.add(part)
        values = reservoir.vectors.flatten().long()
        assert len(set(values.tolist())) == 20
        kept[values] += 1
    assert kept.view(4, -1).sum(1).min() > 0.8 * kept.sum() / 4


def test_codes_are_found_in_the_real_segments_of_the_last_epoch():
    torch.manual_seed(1)
    quantiser, lengths = RobustKmeans(2, 8), torch.tensor([40, 25])
    centres = torch.randn(8, 2) * 10
    encoded = centres[torch.randint(8, (2, 40))] + 0.01 * torch.randn(2, 40, 2)
    encoded[1, 25:] = 99.0
    quantiser.begin_epoch(2, generator_from(2))
    targets, loss = quantiser(encoded, lengths, 2)
    assert loss == 0
    assert not targets[1, 25:].any()
    assert targets.sum((0, 1)).abs().max() < 1e-3
    assert torch.equal(quantiser.reestimationReservoir.vectors[:40], targets[0])
    before = quantiser.embedding.weight.clone()
    quantiser.begin_epoch(3, generator_from(3))
    assert not torch.equal(quantiser.embedding.weight, before)
    again, loss = quantiser(encoded, lengths, 3)
    assert loss < 1e-3
    assert_close(again, targets, 0.05)
    _, distances = assign(again[0].detach(), quantiser.embedding.weight.detach())
    assert distances.max() < 1e-10
    quantiser.reestimationReservoir.i.zero_()
    quantiser.begin_epoch(4, generator_from(4))  # nothing to find them in


# ---------------------------------------------------------------------------------------- losses


def learned_networks(*words):
    sizes = "--hiddenEncoder 8 --hiddenGar 8 --hiddenEncoderSegment 8 --hiddenGarSegment 8".split()
    heads = "--rnnMode linear --rnnModeSegment linear".split()
    args = build_parser().parse_args([*FLAGS, *sizes, *heads, *words])
    return join_networks(build_criterion(args, 1), build_model(args), args)


def test_the_losses_of_a_policy_have_their_weights():
    networks = learned_networks("--policyWeights", "0.1", "0.2", "0.3")
    assert_close(networks.loss_weights[0, -6:], [0.1, 0.2, 0.3, 0, 0, 1], 1e-6)


def test_means_of_segments_are_over_the_batches_that_had_some_to_predict():
    networks = learned_networks("--nPredicts", "1", "--CPCCTCNumMatched", "1")
    policy, codes = [0.1, 0.2, 0.3, 7.0], [0.4]
    values = networks.named("val", [3.0, 0.2, 0.1, *policy, 0.25, *codes], [0.5] * 9)
    assert values["locLoss_val"] == [3.0]
    assert values["locLoss_val_segments"] == [0.8, 0.4]
    assert values["boundariesPerSecond_val"] == 7.0
    values = networks.named("val", [3.0, 0.0, 0.0, *policy, 0.0, *codes], [0.5] * 9)
    assert values["locAcc_val"] == [0.5]
    assert values["locLoss_val_segments"] is values["locAcc_val_segments"] is None
    assert set(values) & {"predicted", "predicted_val"} == set()


def test_means_of_the_first_epoch_are_sound_where_validation_had_no_segments_before():
    """How many losses segments have isn't known then."""
    before = {"locLoss_val": [4.0], "locAcc_val": [0.1]}
    for row, n_columns, sound in (
        (None, 6, True),
        (None, 4, False),
        ([1.0], 5, True),
        ([1.0], 6, False),
    ):
        of_segments = {"locLoss_val_segments": row, "locAcc_val_segments": row}
        logs = {"before_training": before | of_segments}
        sums, norms = torch.zeros(2, n_columns), torch.zeros(())
        running = {"sums": sums, "norms": norms, "windows": 8, "batches": 1}
        assert _are_epoch_means(running, [0, 0, 8], logs, 3) is sound


# --------------------------------------------------------------------- checkpoints, whole runs

FLAGS = (
    "--multiLevel --segmentationMode boundaryPredictor --targetQuantizerSegment robustKmeans "
    "--adjacentNegatives --nPredictsSegment 2 --CPCCTC"
).split()


def test_keys_and_shapes_of_hcpc():
    """All that the original's checkpoint holds, but for the baseline of a level without policy."""
    theirs = json.loads((GOLDEN_HCPC / "manifest.json").read_text()).get("state_dicts")
    if theirs is None:
        pytest.skip("no list of hCPC's keys here")
    theirs = theirs["hcpc"]
    words = "--nPredicts 6 --CPCCTCNumMatched 12 --nLevelsGRU 2 --dropout".split()
    args = build_parser().parse_args([*FLAGS, *words])
    networks = join_networks(build_criterion(args, 1), build_model(args), args)
    for key, module in (("gEncoder", networks.model), ("cpcCriterion", networks.criterion)):
        ours = {
            name: [list(value.shape), str(value.dtype).removeprefix("torch.")]
            for name, value in module.state_dict().items()
        }
        theirs[key].pop("frameLevelCriterion.baseline", None)
        assert ours == theirs[key]
    groups = parameter_groups(networks, 0.5)
    assert [len(group["params"]) for group in groups] == [157, 1]
    assert groups[1]["base_lr"] == 0.5


def test_an_hcpc_checkpoint_keeps_its_baseline_and_the_moments_of_its_codes():
    parts = [torch.nn.Parameter(torch.randn(n)) for n in (2, 3, 4)]
    groups = [{"params": group, "lr": 0.1} for group in ([], parts[:1], parts[1:2], parts[2:])]
    theirs = torch.optim.Adam(groups)
    for parameter in parts:
        parameter.grad = torch.randn_like(parameter)
    theirs.step()
    state = {
        "args": {"multiLevel": True, "segmentationMode": "boundaryPredictor"},
        "cpcCriterion": {
            f"{level}LevelCriterion.baseline": torch.ones(1) for level in ("frame", "segment")
        },
        "optimizer": theirs.state_dict(),
    }
    take_over(state)
    assert state["cpcCriterion"].keys() == {"segmentLevelCriterion.baseline"}
    ours = torch.optim.Adam([{"params": [parts[2], parts[0]]}, {"params": [parts[1]]}])
    load_optimizer(ours, state["optimizer"], "x.pt")
    for parameter in parts:
        assert torch.equal(ours.state[parameter]["exp_avg"], theirs.state[parameter]["exp_avg"])


def trained(corpus, directory, *words, epochs):
    segments = ["--hiddenEncoderSegment", 8, "--hiddenGarSegment", 8, "--rnnModeSegment", "linear"]
    words = [*FLAGS, *SMALL, *segments, "--CPCCTCNumMatched", 3, "--numCodesCodebook", 4, *words]
    assert run(*on(corpus), *words, "--pathCheckpoint", directory, "--nEpoch", epochs) == 0


def test_a_run_with_learned_boundaries_resumes_exactly(tiny_corpus, tmp_path, monkeypatch):
    """Codes, found in epochs 3 and 4, baseline, reservoir and schedules: all as if never stopped;
    stopped between epochs, and inside one, as the disk was full at its end."""
    monkeypatch.setattr(quantised_targets, "RESERVOIR", 64)
    trained(tiny_corpus, tmp_path / "whole", epochs=5)
    whole = checkpoint(tmp_path / "whole", 4)
    trained(tiny_corpus, tmp_path / "parts", epochs=3)
    inside = ["--pathCheckpoint", tmp_path / "parts", "--nEpoch", 5, "--resume_every", 2]

    def disk_full(*_, **__):
        raise UserError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(train, "validate", disk_full)
        assert run(*inside) == 2
    assert torch.load(tmp_path / "parts" / "checkpoint_resume.pt")["position"][0] == 3
    assert run(*inside) == 0
    assert_same(whole, checkpoint(tmp_path / "parts", 4))
    logs = whole["logs"]
    assert {f"{name}_{part}" for name in OF_POLICY for part in ("train", "val")} <= logs.keys()
    assert logs["targetQuantizerLoss_train"][2] == 0 < logs["targetQuantizerLoss_train"][3]
    codes, weights = whole["optimizer"]["param_groups"][::-1]
    assert (codes["lr"], weights["lr"]) == (2e-3, 2e-4)
    criterion = whole["cpcCriterion"]
    assert criterion["segmentLevelCriterion.baseline"] > 0


def as_hcpc_writes(directory):
    """The checkpoint of epoch 0 as a file of hCPC: its groups of parameters, a baseline a level."""
    path = directory / "checkpoint_0.pt"
    state = torch.load(path, weights_only=True)
    group, codes = state["optimizer"]["param_groups"]
    args = stored_arguments(state["args"], path)
    n_of_criterion = len([*build_criterion(args, 1).parameters()]) - 1
    numbers = (
        [],
        group["params"][n_of_criterion:],
        codes["params"],
        group["params"][:n_of_criterion],
    )
    groups = [group | {"params": part} for part in numbers]
    baselines = {f"{n}LevelCriterion.baseline": torch.tensor([5.0]) for n in ("frame", "segment")}
    theirs = {
        "gEncoder": state["gEncoder"],
        "best": state["best"],
        "cpcCriterion": state["cpcCriterion"] | baselines,
        "optimizer": {"state": state["optimizer"]["state"], "param_groups": groups},
    }
    torch.save(theirs, path)
    return state


def test_a_checkpoint_of_hcpc_with_learned_boundaries_resumes(tiny_corpus, tmp_path):
    run_path, captures = tmp_path / "run", tmp_path / "captures"
    trained(tiny_corpus, run_path, epochs=1)
    before = as_hcpc_writes(run_path)
    words = ["--pathDB", tiny_corpus / "audio", "--nEpoch", 2, "--captureSegBoundaries"]
    words += [
        "--pathCaptureDS",
        tiny_corpus / "test.txt",
        "--pathCaptureSave",
        captures,
        "--captureEachEpochs",
        1,
    ]
    assert run("--pathCheckpoint", run_path, *words) == 0
    after = checkpoint(run_path, 1)
    n_steps = after["logs"]["iter"][-1]
    baseline = float(after["cpcCriterion"]["segmentLevelCriterion.baseline"])
    assert 5 * 0.99**n_steps < baseline < 5 * 0.99**n_steps + n_steps * 0.01 * 2
    moments = before["optimizer"]["state"], after["optimizer"]["state"]
    assert moments[0].keys() == moments[1].keys()
    assert float(moments[1][0]["step"]) == float(moments[0][0]["step"]) + n_steps
    (batch, *_) = CaptureReader(captures / "1")
    assert batch["seg_boundaries"][:, 0].all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rlSetup", "vanillaReinforce"], "--rlSetup needs --segmentationMode boundaryPredictor"),
        (
            ["--segmentationMode", "boundaryPredictor", "--policyWeights", "1"],
            "--policyWeights needs three values",
        ),
        (["--targetQuantizerSegment", "gumbel"], "--targetQuantizerSegment: gumbel: isn't support"),
        (["--numCodesCodebook", "9"], "--numCodesCodebook needs --targetQuantizerSegment robust"),
        (
            ["--segmentationMode", "boundaryPredictor", "--segmentProminence", "0.1"],
            "--segmentProminence has no effect with --segmentationMode boundaryPredictor",
        ),
        (
            ["--segmentationMode", "boundaryPredictor", "--hiddenEncoder", "12"],
            "--hiddenEncoder 12: --segmentationMode boundaryPredictor has 8 attention heads",
        ),
    ],
)
def test_flags_that_cannot_work_are_refused(words, said, tiny_corpus, tmp_path, capsys):
    with ends_refused(capsys, said):
        train.main([*on(tiny_corpus), "--pathCheckpoint", str(tmp_path), "--multiLevel",
                    "--rnnMode", "linear", *words])  # fmt: skip


def test_a_policy_that_collapses_is_named_when_it_does(capsys):
    watch = StartWatch(None, None)
    for epoch, rate in enumerate([12.0, 0.2, 0.1, 9.0, 24.8]):
        watch._note_collapse(epoch, rate)
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) == 2
    assert notes[0].startswith("note: epoch 1: the boundary policy has collapsed: it finds no bou")
    assert "epoch 4" in notes[1]
    assert "a boundary wherever one may be (24.8 per second" in notes[1]
