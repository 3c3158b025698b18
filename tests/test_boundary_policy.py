"""Learned boundaries: golden values of hCPC, slow references, whole runs."""

import numpy as np
import pytest
import torch

from boundary_policy import LearnedSegmenter
from criterion import reinforce
from criterion.quantised_targets import RobustKmeans
from tests.helpers import assert_close, assert_gradients_close, hcpc_cases
from tests.test_levels import segment_step
from utils.run.flags import build_parser

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
    choice = segmenter(torch.from_numpy(golden["x"]))
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
    """The golden values of a call: what has none of its own is that of the first."""

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
