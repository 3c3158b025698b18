"""Scores and heads of hCPC and CPC2 against golden values and slow references, and checkpoints."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from criterion import CPCCriterion, CPCCTCCriterion, sampling
from criterion.prediction import PredictionNetwork, SharedPredictionNetwork
from feature_loader import load_model
from model import CPCEncoder
from tests.helpers import (
    GOLDEN_HCPC,
    REAL_SPEECH,
    assert_close,
    assert_gradients_close,
    ends_refused,
    hcpc_cases,
    needs_real_speech,
)
from train import main
from transformers import TransformerLayer
from utils.misc import UserError, generator_from
from utils.run.adam import load_optimizer
from utils.run.checkpoint import open_checkpoint, read_checkpoint
from utils.run.hcpc import NEUTRAL, in_one_group, refuse_unsupported

needs_checkpoints = pytest.mark.skipif(
    not (GOLDEN_HCPC / "checkpoint_acpc").is_dir(), reason="no checkpoints of hCPC here"
)

# -------------------------------------------------------------------- golden values: criteria


def criterion_of(params, n_frames, dim):
    """Our criterion for the parameters of a level, or of a case of plain CPC."""
    common = {
        "dim_context": dim,
        "dim_encoded": dim,
        "n_frames": n_frames,
        "n_negatives": params["N"],
        "limit_negatives": params.get("limit", 0),
        "rnn_mode": params["rnnMode"],
        "cosine_scores": params["normalizeScore" if "normalizeScore" in params else "norm"],
    }
    if "M" not in params:
        return CPCCriterion(params["K"], **common)
    return CPCCTCCriterion(
        params["K"],
        params["M"],
        self_loop=params.get("self_loop", False),
        skips_beg=params.get("beg", 0),
        skips_end=params.get("end", 0),
        **common,
    )


def load_golden_state(criterion, golden, prefix):
    names = [n for n in golden.files if n.startswith(prefix) and not n.endswith("baseline")]
    state = {name.removeprefix(prefix): torch.from_numpy(golden[name]) for name in names}
    missing, unexpected = criterion.load_state_dict(state, strict=False)
    assert unexpected == []
    assert {name.split(".")[-1] for name in missing} <= {"z", "mask"}  # left out of the golden set


def golden_step(params, golden, prefix, negatives, dtype, monkeypatch):
    """The criterion and the leaves of the case, and what it makes of them."""
    leaves = [torch.from_numpy(golden[n]).to(dtype, copy=True).requires_grad_() for n in "cz"]
    monkeypatch.setattr(sampling, "draw_negatives", lambda *_, **__: negatives)
    criterion = criterion_of(params, *leaves[0].shape[1:]).eval()
    load_golden_state(criterion, golden, prefix)
    capture = {"cpcctc_align", "cpcctc_log_scores"} if "M" in params else set()
    speaker = torch.zeros(len(leaves[0]), dtype=torch.long)
    output = criterion.to(dtype)(*leaves, speaker, capture=frozenset(capture))
    return criterion, leaves, output


def assert_golden_gradients(criterion, leaves, golden, prefix, suffix):
    tolerance = 1e-6 if suffix else 1e-4
    for leaf, name in zip(leaves, ("grad_c", "grad_z"), strict=True):
        assert_close(leaf.grad, golden[name + suffix], tolerance, name)
    names = [n for n in golden.files if n.startswith(prefix) and not n.endswith(".call2")]
    expected = {name.removeprefix(prefix): torch.from_numpy(golden[name]) for name in names}
    assert_gradients_close(criterion, expected, 1e-4)


@pytest.mark.parametrize("suffix", ["", "64"])
@pytest.mark.parametrize(("params", "path"), hcpc_cases("normalizeScore"))
def test_golden_hcpc_plain_cpc(params, path, suffix, monkeypatch):
    golden = np.load(path)
    negatives = golden["neg_b"] * params["S"] + golden["neg_s"]
    negatives = torch.from_numpy(negatives).transpose(1, 2)
    dtype = torch.float64 if suffix else torch.float32
    criterion, leaves, output = golden_step(params, golden, "sd.", negatives, dtype, monkeypatch)
    output.losses.sum().backward()
    assert_close(output.losses, golden["losses" + suffix], 1e-6 if suffix else 1e-5, "losses")
    assert_close(output.accuracies, golden["acc"], 1e-6, "accuracies")
    assert_golden_gradients(criterion, leaves, golden, "gp.", suffix)


@pytest.mark.parametrize("suffix", ["", "64"])
@pytest.mark.parametrize(("params", "path"), hcpc_cases("frame"))
def test_golden_hcpc_frame_level(params, path, suffix, monkeypatch):
    golden, level = np.load(path), params["frame"]
    negatives = torch.from_numpy(golden["neg_frame_b"] * params["S"] + golden["neg_frame_s"])
    dtype = torch.float64 if suffix else torch.float32
    prefix = "sd.frameLevelCriterion."
    criterion, leaves, output = golden_step(level, golden, prefix, negatives, dtype, monkeypatch)
    (output.losses.mean() / 2).backward()  # its share of the two levels' loss
    assert_close(output.losses, golden["losses_frame" + suffix], 1e-6 if suffix else 1e-5, "losses")
    assert_close(output.losses.sum(), golden["costs_frame" + suffix].mean(), 1e-6, "cost")
    # The frame itself among its negatives is a miss here; there, rounding decided.
    sizes = (*leaves[1].shape[:2], negatives.size(1))
    ahead = sampling.following_frames(*sizes, level["M"], "cpu")
    ties = (negatives.unsqueeze(2) == ahead.unsqueeze(3)).any(dim=3).flatten(0, 1).float().mean(0)
    above = torch.from_numpy(golden["acc_frame_right"]) - output.accuracies
    assert ((above > -1e-6) & (above < ties + 1e-6)).all()
    captured = {name: tensor.flatten(0, 1) for name, tensor in output.captured.items()}
    assert_close(captured["cpcctc_log_scores"], golden["log_scores_frame"], 1e-5, "log scores")
    assert np.array_equal(captured["cpcctc_align"].numpy(), golden["aligns_frame"])
    assert_golden_gradients(criterion, leaves, golden, "gp.frameLevelCriterion.", suffix)


# --------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize("cosine", [False, True])
def test_scores_are_cosines_or_dot_products_over_the_temperature(cosine, temperature):
    generator = generator_from(1)
    pool, predictions = (
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((9, 6), (5, 3, 6))
    )
    candidates = torch.randint(9, (5, 7), generator=generator)
    scores = sampling.score_candidates(
        pool, predictions, candidates, 2, cosine=cosine, temperature=temperature
    )
    pairs = (predictions.unsqueeze(2), pool[candidates].unsqueeze(1))
    expected = F.cosine_similarity(*pairs, dim=3) if cosine else (pairs[0] * pairs[1]).mean(3)
    expected = expected / temperature
    assert_close(scores.positives, expected[..., :2], 1e-12)
    assert_close(scores.negatives, expected[..., 2:].logsumexp(2), 1e-12)
    assert_close(scores.best_negative, expected[..., 2:].amax(2), 1e-12)


def test_zero_vectors_score_zero_and_have_no_gradient():
    vectors = torch.randn(4, 6)
    vectors[1], vectors[2] = 0, 1e-30
    vectors.requires_grad_()
    unit = sampling.unit_length(vectors)
    assert_close(unit.norm(dim=1), torch.tensor([1.0, 0.0, 0.0, 1.0]), 1e-6)
    unit.sin().sum().backward()
    assert vectors.grad.isfinite().all()
    assert torch.equal(vectors.grad[1:3], torch.zeros(2, 6))
    assert vectors.grad[0].any()


CRITERIA = [partial(CPCCriterion, 2), partial(CPCCTCCriterion, 2, 3, self_loop=True)]


@pytest.mark.parametrize("build", CRITERIA)
@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("rnn_mode", ["linear", "none"])
def test_chance_is_the_loss_of_equal_scores(build, temperature, rnn_mode):
    """As all cosines are where all frames, all contexts and all predictions are the same."""
    sizes = {"dim_context": 8, "dim_encoded": 8, "n_frames": 9, "n_negatives": 5}
    options = {"cosine_scores": True, "temperature": temperature, "rnn_mode": rnn_mode}
    criterion = build(**sizes, **options).eval()
    for parameter in criterion.parameters():
        nn.init.ones_(parameter)
    losses = criterion(torch.ones(2, 9, 8), torch.ones(2, 9, 8), torch.zeros(2).long()).losses
    assert losses.mean().item() == pytest.approx(criterion.chance().loss, rel=1e-5)


def test_a_learned_blank_learns_with_cosine_scores():
    """Zero, where it starts with dot products, has no direction, so it would stay there."""
    sizes = {"dim_context": 8, "dim_encoded": 8, "n_frames": 9, "n_negatives": 5}
    criterion = CPCCTCCriterion(
        2, 4, learn_blank=True, rnn_mode="linear", cosine_scores=True, **sizes
    )
    criterion(
        torch.randn(2, 9, 8), torch.randn(2, 9, 8), torch.zeros(2).long()
    ).losses.sum().backward()
    assert criterion.blank_proto.grad.any()


# ---------------------------------------------------------------------------------------- heads


def test_the_identity_predicts_the_context():
    context = torch.randn(2, 5, 8)
    network = PredictionNetwork(1, 8, 8, 5, rnn_mode="none")
    assert torch.equal(network(context), context.unsqueeze(2))
    assert not network.state_dict()
    with pytest.raises(UserError, match="--rnnMode none can't turn 8 features .* into 6 "):
        PredictionNetwork(1, 8, 6, 5, rnn_mode="none")


def test_a_shared_head_is_layers_that_share_all_but_the_last_weights():
    shared = SharedPredictionNetwork(3, 16, 16, 7).double().eval()
    for parameter in shared.parameters():
        nn.init.normal_(parameter, std=0.3)
    context = torch.randn(2, 7, 16, dtype=torch.float64)
    predictions = shared(context)
    state = shared.predictor[0].state_dict()
    for k in range(3):
        own = {n: v.chunk(3)[k] if "lin2" in n else v for n, v in state.items()}
        layer = TransformerLayer(16, 7, relative=True).double().eval()
        layer.load_state_dict(own)
        assert_close(predictions[:, :, k], layer(context), 1e-12)


def test_a_shared_head_has_the_keys_of_cpc2():
    criterion = CPCCriterion(
        12, dim_context=16, dim_encoded=16, n_frames=20, shared_head=True, dropout=True
    )
    shapes = {name: tuple(value.shape) for name, value in criterion.state_dict().items()}
    layer = "wPrediction.predictor.0"
    norms = (f"{layer}.{norm}.{part}" for norm in ("ln_multihead", "ln_ffnetwork")
             for part in ("weight", "bias"))  # fmt: skip
    assert shapes == {
        **{f"{layer}.multihead.{name}.weight": (16, 16) for name in ("Wo", "Wk", "Wq", "Wv")},
        f"{layer}.multihead.Att.Krelpos": (2, 8),
        f"{layer}.multihead.Att.z": (1, 8, 1),
        f"{layer}.multihead.Att.mask": (1, 8, 8),
        f"{layer}.ffnetwork.lin1.weight": (2048, 16),
        f"{layer}.ffnetwork.lin1.bias": (2048,),
        f"{layer}.ffnetwork.lin2.weight": (192, 16 * 128),
        f"{layer}.ffnetwork.lin2.bias": (192,),
        **dict.fromkeys(norms, (16,)),
    }


def test_a_linear_output_is_the_encoder_before_its_last_relu():
    linear, rectified = CPCEncoder(8, linear_output=True), CPCEncoder(8)
    rectified.load_state_dict(linear.state_dict())
    waveform = torch.randn(2, 1, 1600)
    frames = linear(waveform)
    assert frames.min() < 0
    assert torch.equal(frames.relu(), rectified(waveform))


# ---------------------------------------------------------------------------------- checkpoints


def stored(**flags):
    return {"rnnMode": "linear", "nPredictsSegment": 1, "headWeights": [1.0, 1.0], **flags}


def test_flags_of_hcpc_that_change_a_model_are_refused_by_name():
    refuse_unsupported(stored(), "x.pt")
    for name, neutral in NEUTRAL.items():
        other = [0.5, 1.0] if isinstance(neutral, list) else f"not {neutral}"
        with pytest.raises(UserError, match=f"^x.pt: was trained with --{name} "):
            refuse_unsupported(stored(**{name: other}), "x.pt")


def test_an_optimiser_with_four_groups_is_put_in_the_order_of_ours():
    """Moments follow their weights: the same next step as of the optimiser with four groups."""
    criterion, model = nn.Linear(3, 2), nn.Linear(2, 2)
    groups = [
        {"params": list(part)} for part in ([], model.parameters(), [], criterion.parameters())
    ]
    theirs = torch.optim.Adam(groups, lr=0.1)
    weights = [*criterion.parameters(), *model.parameters()]
    for parameter in weights:
        parameter.grad = torch.randn_like(parameter)
    theirs.step()
    ours = torch.optim.Adam(weights, lr=0.1)
    load_optimizer(ours, in_one_group(theirs.state_dict()), "x.pt")
    for parameter in weights:
        assert torch.equal(ours.state[parameter]["exp_avg"], theirs.state[parameter]["exp_avg"])
    assert in_one_group(ours.state_dict())["state"].keys() == ours.state_dict()["state"].keys()
    assert in_one_group({"param_groups": [1, 2, 3, 4]}) == {"param_groups": [1, 2, 3, 4]}


def one_level_checkpoints():
    """Directories of checkpoints of hCPC with one level."""
    directories = sorted(GOLDEN_HCPC.glob("checkpoint_*/"))
    flags = [json.loads((path / "checkpoint_args.json").read_text()) for path in directories]
    return [
        pytest.param(path, its_own, id=path.name)
        for path, its_own in zip(directories, flags, strict=True)
        if not its_own["multiLevel"]
    ]


@pytest.mark.parametrize(("directory", "flags"), one_level_checkpoints())
def test_golden_hcpc_checkpoint_gives_the_recorded_features(directory, flags):
    golden = np.load(f"{directory}_features.npz")
    model, *_ = load_model([directory])
    with torch.no_grad():
        context, encoded = model.eval()(torch.from_numpy(golden["x"]))
    assert_close(context, golden["c"], 1e-5, "contexts")
    assert_close(encoded, golden["z"], 1e-5, "encoded frames")


@needs_real_speech
@pytest.mark.parametrize(("directory", "flags"), one_level_checkpoints())
def test_golden_hcpc_checkpoint_resumes(directory, flags, tmp_path):
    """Its losses continue, its scores stay cosines, and the moments of its Adam are kept."""
    run = shutil.copytree(directory, tmp_path / "run", copy_function=shutil.copyfile)
    run.chmod(0o755)
    before = open_checkpoint(run)
    lists = {"Train": "train_split.txt", "Val": "test_split.txt"}
    paths = [word for name in lists for word in (f"--path{name}", str(REAL_SPEECH / lists[name]))]
    done = before.state["position"][0]
    words = ["--pathDB", str(REAL_SPEECH / "audio"), *paths, "--nEpoch", str(done + 1)]
    main(["--pathCheckpoint", str(run), *words, "--device", "cpu", "--threads", "1"])
    after = read_checkpoint(run / f"checkpoint_{done}.pt").state
    for name in ("normalizeCPCScore", "linearOutput", "rnnMode", "limitNegsInBatch"):
        assert after["args"][name] == flags[name]
    losses = after["logs"]["locLoss_val"]
    assert len(losses) == done + 1
    assert np.mean(losses[-1]) == pytest.approx(np.mean(losses[-2]), rel=0.01)
    old, new = before.state["optimizer"]["state"], after["optimizer"]["state"]
    assert old.keys() == new.keys()
    assert float(new[0]["step"]) > float(old[0]["step"]) > 0


@pytest.mark.parametrize("several", [["a.txt", "b.txt"], ["a.txt"]])
@needs_checkpoints
def test_golden_hcpc_checkpoint_of_several_corpora(several, tmp_path, capsys):
    """Lists of one are one; of several, the flag must be given again."""
    (directory, flags), *_ = (param.values for param in one_level_checkpoints())
    run = shutil.copytree(directory, tmp_path / "run", copy_function=shutil.copyfile)
    run.chmod(0o755)
    (run / "checkpoint_args.json").write_text(json.dumps(flags | {"pathTrain": several}))
    said = "--pathTrain has several values, a.txt, b.txt" if several[1:] else "--pathTrain a.txt"
    with ends_refused(capsys, said):
        main(["--pathCheckpoint", str(run), "--pathDB", str(tmp_path), "--device", "cpu"])
