"""The criteria and classifiers, against values of the original program and slow references."""

import itertools
from collections import Counter
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import transformers
from criterion import (
    CPCCriterion,
    CPCCTCCriterion,
    CriterionOutput,
    NoneCriterion,
    build_criterion,
    sampling,
)
from criterion.classification import (
    CTCPhoneCriterion,
    PhoneCriterion,
    SpeakerCriterion,
    SpeakerDoubleCriterion,
)
from criterion.custom_layers import EqualizedConv1d, EqualizedLinear
from criterion.networks import Networks
from criterion.prediction import PredictionNetwork
from criterion.seq_alignment import (
    beam_search,
    beam_search_batch,
    best_label_sequences,
    collapse_label_chain,
    phone_error_rate,
)
from criterion.soft_align import (
    FORBIDDEN,
    FORBIDDEN_BLANK,
    LEARNED_BLANK,
    NO_BLANK,
    parse_mask_rules,
    soft_align,
)
from dataset import Batch
from tests.helpers import assert_close, assert_gradients_close, golden_cases
from utils.misc import UserError, generator_from

RNN_MODES = ("transformer", "RNN", "LSTM", "linear", "ffd", "conv4", "conv8", "conv12", "none")


# Slow references, as the definitions read


def alignments(n_frames, symbols, blank):
    """Every string of n_frames labels that CTC collapses to `symbols`; blank None: without one."""

    def collapsed(string):
        return [label for label, _ in groupby(string) if label != blank]

    labels = symbols if blank is None else [blank, *symbols]
    strings = [()]
    for _ in range(n_frames):
        longer = [(*string, label) for string in strings for label in labels]
        strings = [s for s in longer if collapsed(s) == symbols[: len(collapsed(s))]]
    return [s for s in strings if collapsed(s) == symbols]


def reference_soft_align(log_probs, skips_beg=0, skips_end=0, blank=NO_BLANK):
    """Sums over all alignments one by one; autograd gives the posterior."""
    emissions = F.pad(log_probs, (0, 0, skips_beg, skips_end))
    if blank == FORBIDDEN_BLANK:
        emissions = F.pad(emissions, (1, 0), value=FORBIDDEN)
    n_frames, n_columns = emissions.shape[1:]
    symbols = list(range(n_columns))
    strings = (
        alignments(n_frames, symbols, None)
        if blank == NO_BLANK
        else alignments(n_frames, symbols[1:], 0)
    )
    strings = torch.tensor(strings)
    cost = -emissions[:, torch.arange(n_frames), strings].sum(dim=2).logsumexp(dim=1)
    (gradient,) = torch.autograd.grad(cost.sum(), log_probs, retain_graph=True)
    return cost, (-gradient).argmax(dim=2)


def reference_scores(predictions, encoded, negatives, n_following):
    """Scores (B, W, n_following, P) and (B, W, N, P): vectors copied, multiplied, averaged."""
    n_anchors = predictions.size(1)
    ahead = torch.stack([encoded[:, w + 1 : w + 1 + n_following] for w in range(n_anchors)], 1)
    drawn = encoded.flatten(0, 1)[negatives]
    return tuple(
        (predictions.unsqueeze(2) * vectors.unsqueeze(3)).mean(dim=4) for vectors in (ahead, drawn)
    )


def reference_predictions(criterion, context, speaker, recur_over_batch=False):
    context = context[:, : context.size(1) - criterion.n_future]
    if criterion.speakerEmb is not None:
        voice = criterion.speakerEmb.weight[speaker]
        context = torch.cat([context, voice[:, None].expand(-1, context.size(1), -1)], dim=2)
    heads = criterion.wPrediction.predictors
    if recur_over_batch:
        context = context.transpose(0, 1)
    predictions = torch.stack([head(context) for head in heads], dim=2)
    return predictions.transpose(0, 1) if recur_over_batch else predictions


def reference_cpc(criterion, config, context, encoded, speaker, negatives, original):
    """Losses and accuracies of plain CPC by cross-entropy; `original`: with its defects."""
    if config["mode"] == "reverse":
        context, encoded = context.flip(1), encoded.flip(1)
    over_batch = original and config["rnnMode"] == "RNN"
    predictions = reference_predictions(criterion, context, speaker, over_batch)
    ahead, drawn = reference_scores(predictions, encoded, negatives, config["nPredicts"])
    losses, accuracies = [], []
    for k in range(config["nPredicts"]):
        logits = torch.cat([ahead[:, :, k, k].unsqueeze(2), drawn[..., k]], dim=2).flatten(0, 1)
        target = torch.zeros(len(logits), dtype=torch.long)
        losses.append(F.cross_entropy(logits, target))
        accuracies.append((logits.argmax(dim=1) == target).float().mean())
    return torch.stack(losses)[None], torch.stack(accuracies)[None]


def reference_cpcctc(criterion, config, context, encoded, speaker, negatives, original):
    """Losses (1, M) of CPC-CTC by definition; `original`: with its defects."""
    if config["mode"] == "reverse":
        context, encoded = context.flip(1), encoded.flip(1)
    if config["normalize_enc"]:
        encoded = F.layer_norm(encoded, encoded.shape[-1:])
    over_batch = original and config["rnnMode"] == "RNN"
    predictions = reference_predictions(criterion, context, speaker, over_batch)
    n_anchors, n_matched = predictions.size(1), config["nMatched"]
    if config["predict_self_loop"]:
        predictions = torch.cat([encoded[:, :n_anchors, None], predictions], dim=2)
    if config["learn_blank"]:
        blank = criterion.blank_proto.view(1, 1, 1, -1).expand_as(predictions[:, :, :1])
        predictions = torch.cat([blank, predictions], dim=2)
    if config["normalize_preds"]:
        axis = 2 if original else 3
        centred = predictions - predictions.mean(axis, keepdim=True)
        predictions = centred / (centred.square().mean(axis, keepdim=True) + 1e-5).sqrt()
    ahead, drawn = reference_scores(predictions, encoded, negatives, n_matched)
    log_scores = (ahead - torch.logaddexp(ahead, drawn.logsumexp(2, keepdim=True))).flatten(0, 1)
    blank = LEARNED_BLANK if config["learn_blank"] else NO_BLANK
    if config["masq_rules"]:
        for frame, column in masked_entries(config, predictions.size(2)):
            log_scores[:, frame, column] = FORBIDDEN
        blank = LEARNED_BLANK if config["learn_blank"] else FORBIDDEN_BLANK
    temperature = config["loss_temp"]
    skips = config["allowed_skips_beg"], config["allowed_skips_end"]
    cost, alignment = reference_soft_align(log_scores / temperature, *skips, blank=blank)
    costs = -log_scores.gather(2, alignment[..., None]).mean(0).T.detach()
    return cost.mean() * temperature * costs / costs.sum(), alignment


def masked_entries(config, n_columns):
    """(frame, column) of each entry of (M, P) that the rules mask, as the original reads them."""
    n_extra = n_columns - config["nPredicts"]
    for rule in config["masq_rules"].split(","):
        bounds = [None if b.lower() == "none" else int(b) for b in rule.split(":")]
        for frame in range(config["nMatched"])[slice(*bounds[:2])]:
            for prediction in range(config["nPredicts"])[slice(*bounds[2:])]:
                yield frame, n_extra + prediction
                if prediction == 0:  # what is added in front is masked with the first prediction
                    yield from ((frame, extra) for extra in range(n_extra))


# Golden values


def criterion_from(config):
    """Our criterion for the configuration of a golden case."""
    common = {
        "dim_context": config["dimOutputAR"],
        "dim_encoded": config["dimOutputEncoder"],
        "n_frames": config["sizeInputSeq"],
        "n_negatives": config["negativeSamplingExt"],
        "reverse": config["mode"] == "reverse",
        "rnn_mode": config["rnnMode"],
        "dropout": config["dropout"],
        "speaker_embedding": config["speakerEmbedding"],
        "n_speakers": config["nSpeakers"],
        "limit_negatives": config.get("limit_negs_in_batch") or 0,
    }
    if "nMatched" not in config:
        return CPCCriterion(config["nPredicts"], **common).eval()
    return CPCCTCCriterion(
        config["nPredicts"],
        config["nMatched"],
        skips_beg=config["allowed_skips_beg"],
        skips_end=config["allowed_skips_end"],
        self_loop=config["predict_self_loop"],
        learn_blank=config["learn_blank"],
        no_negatives_in_match_window=config["no_negs_in_match_window"],
        mask_rules=parse_mask_rules(config["masq_rules"]),
        loss_temperature=config["loss_temp"],
        normalize_encodings=config["normalize_enc"],
        normalize_predictions=config["normalize_preds"],
        **common,
    ).eval()


def deliberately_different(config, batch_size):
    """Why the original's values don't hold for a configuration, or None."""
    if config["rnnMode"] == "RNN" and batch_size > 1:
        return "RNN heads recur over time, not over the batch"
    if config.get("normalize_preds"):
        return "predictions are normalised over features, not over predictions"
    return None


def golden_inputs(case, dtype):
    leaves = [case[name].to(dtype, copy=True).requires_grad_() for name in ("c", "z")]
    return (*leaves, case["label"])


def golden_negatives(case):
    """(B, W, N) indices into the frames of the batch."""
    batch_size, n_frames = case["z"].shape[:2]
    config = case.config
    n_anchors = n_frames - config.get("nMatched", config["nPredicts"])
    return case["extIdx"].view(batch_size, -1, n_anchors).transpose(1, 2)


def loaded_criterion(case, dtype):
    criterion = criterion_from(case.config)
    assert list(criterion.state_dict()) == list(case.state_dict)
    criterion.load_state_dict(case.state_dict)
    return criterion.to(dtype)


def gradients_of(losses, criterion, *leaves):
    losses.sum().backward()
    named = {name: p.grad for name, p in criterion.named_parameters() if p.grad is not None}
    gradients = [leaf.grad for leaf in leaves], named
    criterion.zero_grad()
    return gradients


CRITERIA = golden_cases("CPCUnsupersivedCriterion", "CPCCTC")


@pytest.mark.parametrize("case", CRITERIA)
def test_draws_golden(case, monkeypatch):
    """The same random numbers, asked for in the same order, give the same negatives."""
    recorded = [case["batchIdx_raw"].flatten(), case["seqIdx_raw"].flatten()]
    bounds = []

    def replay(low, high, size, **_):
        bounds.append((low, high))
        numbers = recorded.pop(0)
        assert tuple(size) == numbers.shape
        return numbers

    monkeypatch.setattr(torch, "randint", replay)
    config, (batch_size, n_frames) = case.config, case["z"].shape[:2]
    expected = golden_negatives(case)
    first_offset = config["nMatched"] if config.get("no_negs_in_match_window") else 1
    negatives = sampling.draw_negatives(
        batch_size,
        n_frames,
        expected.size(1),
        config["negativeSamplingExt"],
        first_offset=first_offset,
        group=config.get("limit_negs_in_batch") or 0,
        device="cpu",
        generator=None,
    )
    assert torch.equal(negatives, expected)
    assert bounds == [(0, batch_size), (first_offset, n_frames)]


@pytest.mark.parametrize("suffix", ["", "64"])
@pytest.mark.parametrize("case", CRITERIA)
def test_criterion_golden(case, suffix, monkeypatch):
    dtype, tolerance = (torch.float64, 1e-6) if suffix else (torch.float32, 1e-5)
    context, encoded, speaker = golden_inputs(case, dtype)
    reason = deliberately_different(case.config, len(context))
    if reason:
        pytest.skip(f"{reason}: test_references_golden has the intended values")
    monkeypatch.setattr(sampling, "draw_negatives", lambda *_, **__: golden_negatives(case))
    criterion = loaded_criterion(case, dtype)
    output = criterion(context, encoded, speaker)
    (context_gradient, encoded_gradient), parameters = gradients_of(
        output.losses, criterion, context, encoded
    )
    gradient_tolerance = 1e-6 if suffix else 1e-4
    assert_close(output.losses, case["losses" + suffix], tolerance, "losses")
    assert_close(context_gradient, case["grad_c" + suffix], gradient_tolerance, "context")
    assert_close(encoded_gradient, case["grad_z" + suffix], gradient_tolerance, "encoded")
    if not suffix:
        for name, gradient in case.parameter_gradients().items():
            assert_close(parameters[name], gradient, gradient_tolerance, name)
    if "acc_lo" in case:
        assert (case["acc_lo"] <= output.accuracies + 1e-6).all()
        assert (output.accuracies <= case["acc_hi"] + 1e-6).all()
    else:
        assert_close(output.accuracies, case["acc" + suffix], 1e-5, "accuracies")


@pytest.mark.parametrize("case", golden_cases("CPCCTC"))
def test_captures_golden(case, monkeypatch):
    context, encoded, speaker = golden_inputs(case, torch.float32)
    if deliberately_different(case.config, len(context)):
        pytest.skip("deliberately different")
    monkeypatch.setattr(sampling, "draw_negatives", lambda *_, **__: golden_negatives(case))
    names = frozenset({"pred", "cpcctc_align", "cpcctc_log_scores"})
    with torch.no_grad():
        criterion = loaded_criterion(case, torch.float32)
        captured = criterion(context, encoded, speaker, capture=names).captured
    assert captured.keys() == names
    assert_close(captured["pred"], case["pred"], 1e-5, "pred")
    assert_close(captured["cpcctc_log_scores"], case["log_scores"], 1e-5, "log scores")
    assert captured["cpcctc_align"].dtype == torch.int64
    certain = case["align_margin"].view_as(case["aligns"]) >= 1e-4
    assert torch.equal(captured["cpcctc_align"][certain], case["aligns"][certain])


@pytest.mark.parametrize("case", CRITERIA)
def test_references_golden(case, monkeypatch):
    """The reference with the original's defects gives its values; without them it gives ours."""
    reference = reference_cpcctc if "nMatched" in case.config else reference_cpc
    monkeypatch.setattr(sampling, "draw_negatives", lambda *_, **__: golden_negatives(case))
    criterion = loaded_criterion(case, torch.float64)
    negatives = golden_negatives(case)
    results = []
    for original in (True, False):
        inputs = golden_inputs(case, torch.float64)
        losses, _ = reference(criterion, case.config, *inputs, negatives, original)
        results.append((losses, *gradients_of(losses, criterion, *inputs[:2])))
    inputs = golden_inputs(case, torch.float64)
    losses = criterion(*inputs).losses
    ours = (losses, *gradients_of(losses, criterion, *inputs[:2]))

    (as_original, leaves, _), intended = results
    assert_close(as_original, case["losses64"], 1e-6, "losses of the original")
    assert_close(leaves[0], case["grad_c64"], 1e-6, "gradient of the original")
    assert_close(leaves[1], case["grad_z64"], 1e-6, "gradient of the original")
    assert_close(ours[0], intended[0].detach(), 1e-9, "losses")
    for our_leaf, leaf in zip(ours[1], intended[1], strict=True):
        assert_close(our_leaf, leaf, 1e-9, "gradient")
    assert ours[2].keys() == intended[2].keys()
    for name, gradient in intended[2].items():
        assert_close(ours[2][name], gradient, 1e-9, name)


@pytest.fixture(params=["one by one", "together"])
def ways_of_heads(request, monkeypatch):
    """Heads work as on a CPU, one after the other, and as on a GPU, in products of all."""
    if request.param == "together":
        monkeypatch.setattr("criterion.prediction.LOOP_OVER_HEADS_ON", ())


@pytest.mark.parametrize("case", golden_cases("PredictionNetwork"))
def test_heads_golden(case, ways_of_heads):
    config, context = case.config, case["c"].clone().requires_grad_()
    network = PredictionNetwork(
        config["nPredicts"],
        config["dimOutputAR"],
        config["dimOutputEncoder"],
        config["sizeInputSeq"],
        rnn_mode=config["rnnMode"],
    ).eval()
    assert list(network.state_dict()) == list(case.state_dict)
    network.load_state_dict(case.state_dict)
    # RNN heads recur over time, those of the original over the batch: show them the batch as time.
    swapped = config["rnnMode"] == "RNN"
    predictions = network(context.transpose(0, 1) if swapped else context)
    predictions = predictions.transpose(0, 1) if swapped else predictions
    raw = predictions.permute(2, 0, 1, 3)
    assert_close(raw, case["raw"], 1e-5, "predictions")
    scores = (raw.unsqueeze(2) * case["candidates"]).mean(dim=4)
    assert_close(scores, case["scores"], 1e-5, "scores")
    scores.backward(case["r"])
    assert_close(context.grad, case["grad_c"], 1e-4, "gradient of the context")
    assert_gradients_close(network, case.parameter_gradients())


# Heads


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rnn_mode", RNN_MODES)
def test_batched_heads_equal_single_heads(rnn_mode, training, monkeypatch):
    """In predictions and every gradient, if no draws of dropout differ."""
    monkeypatch.setattr(transformers, "DROPOUT", 0.0)
    network = PredictionNetwork(3, 16, 16, 9, rnn_mode=rnn_mode).double().train(training)
    for parameter in network.parameters():  # biases start at zero, and should matter
        nn.init.normal_(parameter)
    results = []
    for on in (("cpu",), ()):
        monkeypatch.setattr("criterion.prediction.LOOP_OVER_HEADS_ON", on)
        context = torch.randn(4, 9, 16, dtype=torch.float64, generator=generator_from(3))
        predictions = network(context.requires_grad_())
        leaves = (context, *network.parameters())
        gradients = torch.autograd.grad(predictions.sin().sum(), leaves)
        results.append((predictions, *gradients))
    for one_by_one, together in zip(*results, strict=True):
        assert_close(together, one_by_one, 1e-10, rnn_mode)


@pytest.mark.parametrize("training", [False, True])
def test_batched_transformer_layers_drop_out(training):
    layers = nn.Sequential(*transformers.build_transformer(16, 3, 9, abspos=False)).train(training)
    context = torch.randn(4, 9, 16)
    first, second = (transformers.batched_forward(layers, context) for _ in range(2))
    assert torch.equal(first, second) != training


@pytest.mark.parametrize("rnn_mode", ["RNN", "LSTM"])
def test_recurrent_heads_work_in_float32_under_autocast(rnn_mode):
    network = PredictionNetwork(2, 6, 6, 4, rnn_mode=rnn_mode)
    context = torch.randn(2, 4, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        predictions = network(context)
    assert torch.equal(predictions, network(context.float()))


@pytest.mark.parametrize("rnn_mode", ["transformer", "linear", "ffd", "conv4"])
def test_batching_more_heads_takes_no_more_operations(rnn_mode):
    """Operations of the device, backward included, counted on one that computes nothing."""
    counts = []
    for n_predictions in (2, 8):
        network = PredictionNetwork(n_predictions, 16, 16, 9, rnn_mode=rnn_mode).to("meta")
        with Watch() as watch:
            network(torch.empty(4, 9, 16, device="meta")).sum().backward()
        views = {"slice.Tensor", "detach.default"}  # the parts of a gradient
        counts.append({name: watch.operations[name] for name in watch.operations.keys() - views})
    assert counts[0] == counts[1]


@pytest.mark.parametrize("rnn_mode", [*RNN_MODES, None])
def test_heads_see_the_past_only(rnn_mode):
    network = PredictionNetwork(2, 16, 16, 20, rnn_mode=rnn_mode).eval()
    context = torch.randn(3, 20, 16)
    changed = torch.cat([context[:, :12], torch.randn(3, 8, 16)], dim=1)
    before, after = network(context), network(changed)
    assert before.shape == (3, 20, 2, 16)
    assert_close(after[:, :12], before[:, :12])
    assert not torch.allclose(after[:, 12:], before[:, 12:])


@pytest.mark.parametrize("rnn_mode", RNN_MODES)
def test_heads_treat_sequences_alone(rnn_mode):
    """An RNN head, too; the original's recurred over the batch."""
    network = PredictionNetwork(2, 16, 16, 9, rnn_mode=rnn_mode).eval()
    context = torch.randn(4, 9, 16)
    assert_close(network(context)[2:3], network(context[2:3]))


@pytest.mark.parametrize("rnn_mode", ["RNN", "LSTM", "conv4"])
def test_heads_remember(rnn_mode):
    network = PredictionNetwork(1, 16, 16, 9, rnn_mode=rnn_mode)
    context = torch.randn(1, 9, 16, requires_grad=True)
    network(context)[:, 5].sum().backward()
    assert (context.grad[:, 3] != 0).any()


def test_widening_linear_head_starts_large_then_small():
    (head,) = PredictionNetwork(1, 100, 400, 9, rnn_mode="linear").predictors
    assert head.weight[:100].std().item() == pytest.approx(1, rel=0.1)
    assert head.weight[100:].std().item() == pytest.approx(0.01, rel=0.1)
    (head,) = PredictionNetwork(1, 100, 100, 9, rnn_mode="linear").predictors
    assert head.weight.abs().max() <= 0.1


def test_dropout_of_predictions():
    network = PredictionNetwork(3, 16, 16, 50, rnn_mode="linear", dropout=True)
    context = torch.randn(4, 50, 16)
    dropped = network(context)
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert_close(dropped[kept], 2 * network.eval()(context)[kept])
    network = PredictionNetwork(3, 16, 16, 50, rnn_mode="linear")
    assert torch.equal(network(context), network(context))


@pytest.mark.parametrize("layer", [EqualizedLinear(50, 60), EqualizedConv1d(25, 60, 2)])
def test_equalized_layers_keep_the_scale(layer):
    """A fan-in of 50 either way: output variance is the input's times 2."""
    assert layer.module.weight.std().item() == pytest.approx(1, rel=0.1)
    assert (layer.module.bias == 0).all()
    shape = (4000, 50) if isinstance(layer, EqualizedLinear) else (10, 25, 401)
    assert layer(torch.randn(shape)).var().item() == pytest.approx(2, rel=0.2)
    assert layer.gain == pytest.approx(0.2)
    with torch.no_grad():
        layer.module.bias.fill_(5)
        assert layer(torch.zeros(shape)).flatten()[0].item() == pytest.approx(1)  # scaled as well


# Negatives


def drawn_negatives(batch_size, n_frames, n_anchors, n_negatives, **options):
    """Sequence (B, W, N) and frame (B, W, N) of each negative."""
    negatives = sampling.draw_negatives(
        batch_size, n_frames, n_anchors, n_negatives, device="cpu", generator=None, **options
    )
    assert negatives.shape == (batch_size, n_anchors, n_negatives)
    return negatives // n_frames, negatives % n_frames


@pytest.mark.parametrize("first_offset", [1, 4])
def test_negatives_keep_their_distance(first_offset):
    sequence, frame = drawn_negatives(3, 12, 8, 500, first_offset=first_offset)
    offset = (frame - torch.arange(8).view(1, -1, 1)) % 12
    for anchor in range(8):  # all allowed offsets are drawn, about equally often
        counts = torch.bincount(offset[:, anchor].flatten(), minlength=12)
        assert (counts[:first_offset] == 0).all()
        assert counts[first_offset:].min() > 0.6 * counts[first_offset:].float().mean()
    assert torch.bincount(sequence.flatten()).min() > 0.9 * sequence.numel() / 3


def test_negatives_of_a_group():
    sequence, _ = drawn_negatives(8, 12, 8, 100, group=4)
    own = torch.arange(8).view(-1, 1, 1)
    assert torch.equal(sequence // 4, (own // 4).expand_as(sequence))
    assert all(len(sequence[row].unique()) == 4 for row in range(8))
    incomplete, _ = drawn_negatives(3, 12, 8, 100, group=2)  # rows 2 and 3, of which 3 is row 0
    assert [incomplete[row].unique().tolist() for row in range(3)] == [[0, 1], [0, 1], [0, 2]]


def test_negatives_come_from_the_generator():
    def draw(generator):
        return sampling.draw_negatives(4, 12, 8, 5, device="cpu", generator=generator)

    state = torch.get_rng_state()
    first, again = draw(generator_from(1, "validation")), draw(generator_from(1, "validation"))
    assert torch.equal(first, again)
    assert not torch.equal(first, draw(generator_from(2, "validation")))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    from_global = draw(None)
    assert not torch.equal(torch.get_rng_state(), state)
    assert torch.equal(from_global, draw(torch.Generator().manual_seed(3)))


def test_following_frames():
    following = sampling.following_frames(2, 10, 7, 3, "cpu")
    assert following.shape == (2, 7, 3)
    assert following[0, 0].tolist() == [1, 2, 3]
    assert following[1, 6].tolist() == [17, 18, 19]


def score_inputs(n_anchors=75, n_predictions=4, dim=24, n_negatives=37, dtype=torch.float64):
    """More anchors than fit in one chunk, the last one incomplete; repeated indices."""
    pool = torch.randn(60, dim, dtype=dtype, requires_grad=True)
    predictions = torch.randn(n_anchors, n_predictions, dim, dtype=dtype, requires_grad=True)
    candidates = torch.randint(0, 60, (n_anchors, 5 + n_negatives))
    return pool, predictions, candidates


def test_scores_against_reference():
    pool, predictions, candidates = score_inputs()
    scores = sampling.score_candidates(pool, predictions, candidates, 5)
    vectors = pool[candidates]
    products = (predictions[:, :, None] * vectors[:, None]).mean(dim=3)
    best, place = products[..., 5:].max(2)
    frame = candidates[:, 5:].gather(1, place)
    own = frame[..., None] == candidates[:, None, :5]
    expected = products[..., :5], products[..., 5:].logsumexp(2), best, own
    assert own.any()
    assert torch.equal(scores.hits, (products[..., :5] > best[..., None] + 1e-9) | own)
    for actual, reference in zip(scores, expected, strict=True):
        assert_close(actual.double(), reference.detach().double(), 1e-12)
    weights = torch.randn_like(scores.positives), torch.randn_like(scores.negatives)
    torch.autograd.backward(scores[:2], weights)
    gradients = torch.autograd.grad(expected[:2], (pool, predictions), weights)
    assert_close(pool.grad, gradients[0], 1e-12)
    assert_close(predictions.grad, gradients[1], 1e-12)
    assert not scores.best_negative.requires_grad


def test_scores_differentiate():
    pool, predictions, candidates = score_inputs(n_anchors=34, n_predictions=2, dim=3)
    assert torch.autograd.gradcheck(
        lambda *leaves: sampling.score_candidates(*leaves, candidates, 5)[:2], (pool, predictions)
    )


def test_scores_under_autocast_are_exact():
    pool, predictions, candidates = score_inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        scores = sampling.score_candidates(pool, predictions, candidates, 5)
        half = sampling.score_candidates(pool.bfloat16(), predictions.bfloat16(), candidates, 5)
    expected = sampling.score_candidates(pool, predictions, candidates, 5)
    for values, rounded, exact in zip(scores, half, expected, strict=True):
        assert torch.equal(values, exact)
        if exact.is_floating_point():
            assert rounded.dtype == torch.float32
            assert_close(rounded, exact.detach(), 0.01)


# Alignment


@pytest.mark.parametrize("blank", [NO_BLANK, LEARNED_BLANK, FORBIDDEN_BLANK])
@pytest.mark.parametrize("skips", [(0, 0), (1, 0), (0, 2), (2, 1)])
@pytest.mark.parametrize(("n_frames", "n_symbols"), [(5, 3), (4, 4), (3, 2)])
def test_soft_align_sums_over_all_alignments(n_frames, n_symbols, skips, blank):
    log_probs = F.logsigmoid(3 * torch.randn(7, n_frames, n_symbols, dtype=torch.float64))
    log_probs[:, :2, -1] = FORBIDDEN
    log_probs[3] = FORBIDDEN  # nothing else is left
    log_probs[4, 0] = 5 * FORBIDDEN  # costly, but unavoidable
    log_probs.requires_grad_()
    weights = torch.rand(7, dtype=torch.float64)
    expected, alignment = reference_soft_align(log_probs, *skips, blank=blank)
    (gradient,) = torch.autograd.grad(expected, log_probs, weights)
    cost, ours = soft_align(log_probs, *skips, blank=blank)
    cost.backward(weights)
    assert_close(cost, expected.detach(), 1e-12)
    assert_close(log_probs.grad, gradient, 1e-9)
    posterior = (-gradient / weights[:, None, None]).sort(dim=2).values
    certain = posterior[..., -1] - posterior[..., -2] > 1e-6
    assert certain.float().mean() > 0.6
    assert torch.equal(ours[certain], alignment[certain])


@pytest.mark.parametrize("blank", [NO_BLANK, LEARNED_BLANK, FORBIDDEN_BLANK])
def test_soft_align_is_ctc(blank):
    """Where `F.ctc_loss` applies: each frame's probabilities sum to 1 over symbols."""
    log_probs = torch.randn(6, 9, 4, dtype=torch.float64).log_softmax(dim=2)
    cost, _ = soft_align(log_probs, blank=blank)
    first = FORBIDDEN if blank == FORBIDDEN_BLANK else -1e5  # no blank: one that never pays
    padded = log_probs if blank == LEARNED_BLANK else F.pad(log_probs, (1, 0), value=first)
    n_symbols = padded.size(2) - 1
    targets = torch.arange(1, n_symbols + 1).expand(6, -1)
    lengths = torch.full((6,), 9), torch.full((6,), n_symbols)
    expected = F.ctc_loss(padded.transpose(0, 1), targets, *lengths, reduction="none")
    assert_close(cost, expected, 1e-9)


def test_soft_align_finds_the_alignment():
    """Each prediction as long as it fits, with the last one left out if that is allowed."""
    intended = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 2], [0, 1, 2, 2, 2, 2]])
    log_probs = torch.where(F.one_hot(intended, 3) == 1, -0.1, -20.0)
    assert torch.equal(soft_align(log_probs, skips_end=1)[1], intended)
    assert soft_align(log_probs)[1][0].tolist() == [0, 0, 1, 1, 1, 2]


def test_soft_align_ties_go_to_the_first():
    assert (soft_align(torch.zeros(2, 2, 2))[1] == torch.tensor([0, 1])).all()
    assert (soft_align(torch.zeros(2, 3, 2))[1] == torch.tensor([0, 0, 1])).all()


def test_soft_align_needs_a_frame_for_each_symbol():
    with pytest.raises(ValueError, match="4 symbols .* 3 frames"):
        soft_align(torch.zeros(2, 3, 4))


@pytest.mark.parametrize("blank", [NO_BLANK, LEARNED_BLANK, FORBIDDEN_BLANK])
@pytest.mark.parametrize("scale", [0, 1, 1e3, 1e6, 1e20])
def test_soft_align_stays_finite(scale, blank):
    log_probs = -scale * torch.rand(50, 12, 9)
    log_probs[:10] = FORBIDDEN
    log_probs[10:20, 3:5] = FORBIDDEN
    log_probs[20:30, :, 4] = -scale - 1e6
    log_probs.requires_grad_()
    cost, _ = soft_align(log_probs, 1, 2, blank=blank)
    cost.sum().backward()
    assert torch.isfinite(cost).all()
    rows = log_probs.grad.sum(dim=2)
    assert (rows <= 1e-5).all()
    assert (rows >= -1 - 1e-5).all()
    if blank != FORBIDDEN_BLANK:  # each frame has a symbol
        assert_close(rows, -torch.ones_like(rows))


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("", []),
        (" ", []),
        ("0:2:1:none", [(slice(0, 2), slice(1, None))]),
        (
            "None:-1: 2 :3, 4:NONE:0:1",
            [(slice(None, -1), slice(2, 3)), (slice(4, None), slice(0, 1))],
        ),
    ],
)
def test_mask_rules(text, rules):
    assert parse_mask_rules(text) == rules


@pytest.mark.parametrize(
    "text", ["1", "1:2:3", "1:2:3:4:5", "a:2:3:4", "1:2:3:4,", "1.5:2:3:4", ","]
)
def test_malformed_mask_rules(text):
    with pytest.raises(ValueError, match="is no mask rule"):
        parse_mask_rules(text)


# Criteria


def small_criterion(aligned, **options):
    options = {"dim_context": 16, "dim_encoded": 16, "n_frames": 20, "n_negatives": 8} | options
    options = {"rnn_mode": "linear"} | options
    return CPCCTCCriterion(3, 6, **options) if aligned else CPCCriterion(3, **options)


def small_inputs(batch_size=4, n_frames=20, dim_context=16, dim_encoded=16):
    context = torch.randn(batch_size, n_frames, dim_context, requires_grad=True)
    encoded = torch.randn(batch_size, n_frames, dim_encoded, requires_grad=True)
    return context, encoded, torch.arange(batch_size) % 2


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("rnn_mode", RNN_MODES)
def test_every_head_in_both_criteria(rnn_mode, aligned):
    widths = {} if rnn_mode == "transformer" else {"dim_context": 12}
    speaker = {} if rnn_mode == "transformer" else {"speaker_embedding": 4, "n_speakers": 2}
    criterion = small_criterion(aligned, rnn_mode=rnn_mode, dropout=True, **widths, **speaker)
    inputs = small_inputs(**widths)
    output = criterion(*inputs)
    n = 6 if aligned else 3
    assert output.losses.shape == output.accuracies.shape == (1, n)
    assert output.accuracies.dtype == torch.float32
    assert not output.accuracies.requires_grad
    assert output.captured == {}
    output.losses.sum().backward()
    gradients = [p.grad for p in criterion.parameters()] + [leaf.grad for leaf in inputs[:2]]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert all((gradient != 0).any() for gradient in gradients)


PLAIN = {
    "nPredicts": 3,
    "dimOutputAR": 16,
    "dimOutputEncoder": 16,
    "negativeSamplingExt": 8,
    "mode": None,
    "rnnMode": "linear",
    "dropout": False,
    "speakerEmbedding": 0,
    "nSpeakers": 0,
    "sizeInputSeq": 14,
    "limit_negs_in_batch": 0,
}
ALIGNED = PLAIN | {
    "nMatched": 6,
    "allowed_skips_beg": 0,
    "allowed_skips_end": 0,
    "predict_self_loop": False,
    "no_negs_in_match_window": False,
    "learn_blank": False,
    "normalize_enc": False,
    "normalize_preds": False,
    "masq_rules": "",
    "loss_temp": 1.0,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mode": "reverse"},
        {"rnnMode": "RNN"},
        {"speakerEmbedding": 5, "nSpeakers": 2},
        {"limit_negs_in_batch": 2},
        {"limit_negs_in_batch": 3, "mode": "reverse", "rnnMode": "LSTM"},
        {"nMatched": 6},
        {"nMatched": 6, "normalize_preds": True},
        {"nMatched": 6, "learn_blank": True},
        {"nMatched": 6, "learn_blank": True, "predict_self_loop": True, "normalize_preds": True},
        {"nMatched": 6, "masq_rules": "0:2:1:none,none:1:none:1", "predict_self_loop": True},
        {"nMatched": 6, "masq_rules": "none:none:none:none", "allowed_skips_end": 1},
        {"nMatched": 6, "masq_rules": "2:none:0:1", "learn_blank": True, "loss_temp": 0.3},
        {"nMatched": 6, "limit_negs_in_batch": 2, "no_negs_in_match_window": True},
        {"nMatched": 6, "allowed_skips_beg": 1, "normalize_enc": True, "predict_self_loop": True},
        {"nMatched": 6, "allowed_skips_end": 2, "loss_temp": 2.0, "mode": "reverse"},
    ],
)
def test_criteria_against_references(changes):
    """Each as a whole, with the negatives that it draws, and its gradients."""
    aligned = "nMatched" in changes
    config = (ALIGNED if aligned else PLAIN) | changes
    criterion = criterion_from(config).double()
    if aligned and config["learn_blank"]:
        torch.nn.init.normal_(criterion.blank_proto)
    inputs = [leaf.detach().double() for leaf in small_inputs(n_frames=14)[:2]]
    inputs = [leaf.requires_grad_() for leaf in inputs] + [torch.tensor([0, 1, 0, 1])]
    negatives = sampling.draw_negatives(
        4,
        14,
        14 - criterion.n_future,
        8,
        first_offset=6 if config.get("no_negs_in_match_window") else 1,
        group=config["limit_negs_in_batch"],
        device="cpu",
        generator=generator_from(5),
    )
    reference = reference_cpcctc if aligned else reference_cpc
    expected, extra = reference(criterion, config, *inputs, negatives, original=False)
    leaves = (*inputs[:2], *criterion.parameters())
    gradients = torch.autograd.grad(expected.sum(), leaves)
    names = {"pred", "cpcctc_align"} if aligned else {"pred"}
    output = criterion(*inputs, capture=frozenset(names), generator=generator_from(5))
    assert_close(output.losses, expected.detach(), 1e-9, "losses")
    ours = torch.autograd.grad(output.losses.sum(), leaves)
    for actual, gradient in zip(ours, gradients, strict=True):
        assert_close(actual, gradient, 1e-8, "gradient")
    if aligned:
        assert (output.captured["cpcctc_align"].flatten(0, 1) == extra).float().mean() > 0.98
    else:
        assert_close(output.accuracies, extra)


@pytest.mark.parametrize("aligned", [False, True])
def test_the_right_frame_as_its_own_negative(aligned, monkeypatch):
    """Perfect predictions, and half of the negatives the very frames to be predicted."""
    criterion = small_criterion(aligned).eval()
    context, encoded, speaker = small_inputs()
    n_anchors = 20 - criterion.n_future
    ahead = [encoded[:, k : k + n_anchors] for k in range(1, 4)]
    monkeypatch.setattr(criterion, "predict", lambda *_: 100 * torch.stack(ahead, dim=2))
    own = sampling.following_frames(4, 20, n_anchors, criterion.n_future, "cpu")
    monkeypatch.setattr(sampling, "draw_negatives", lambda *_, **__: own)
    accuracies = criterion(context, encoded, speaker).accuracies
    # Plain CPC counts it as right, CPC-CTC as wrong, as the original does.
    assert torch.equal(accuracies, torch.full_like(accuracies, 0 if aligned else 1))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_network_with_constant_output_is_never_right(aligned, value):
    """All frames equal, so every comparison is a tie, up to rounding."""
    criterion = small_criterion(aligned, n_negatives=40).eval()
    with torch.no_grad():
        context, encoded = torch.full((2, 8, 20, 16), value)
        output = criterion(context, encoded, torch.arange(8) % 2, generator=generator_from(1))
    assert output.accuracies.max() <= 0.05  # where the best of all negatives happens to be the own


def test_another_frame_that_equals_the_true_one_is_a_miss():
    """A copy of the true frame elsewhere in the pool: the same score under another index."""
    pool = torch.randn(6, 16)
    pool[5] = pool[0]
    scores = sampling.score_candidates(
        pool, 100 * pool[:1].expand(2, 1, 16), torch.tensor([[0, 1, 5], [0, 1, 0]]), 1
    )
    assert scores.hits.flatten().tolist() == [False, True]


@pytest.mark.parametrize("aligned", [False, True])
def test_gradients_repeat_bit_for_bit(aligned):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        criterion = small_criterion(aligned, n_frames=64, n_negatives=64)
        context, encoded, speaker = small_inputs(8, 64)
        runs = []
        for _ in range(4):
            losses = criterion(context, encoded, speaker, generator=generator_from(1)).losses
            leaves = (context, encoded, *criterion.parameters())
            runs.append([losses, *torch.autograd.grad(losses.sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


class Watch(TorchDispatchMode):
    """Records the largest tensor and counts operations by name, backward ones included."""

    def __init__(self):
        super().__init__()
        self.largest, self.operations = 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations[str(function).removeprefix("aten.")] += 1
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("aligned", [False, True])
def test_no_large_tensors_no_ctc_no_synchronisation(aligned):
    criterion = small_criterion(aligned, n_frames=128, n_negatives=64)
    context, encoded, speaker = small_inputs(8, 128)
    with Watch() as watch:
        criterion(context, encoded, speaker).losses.sum().backward()
    gathered = 8 * 122 * 64 * 16  # the vectors of all negatives at once
    assert watch.largest < gathered / 2
    assert not any("ctc" in name for name in watch.operations)
    waits = {"_local_scalar_dense.default", "nonzero.default", "item.default"}
    assert not waits & watch.operations.keys()


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1e3, 1e9, 1e15])
def test_extreme_scores_stay_finite(scale, aligned):
    rules = {"mask_rules": parse_mask_rules("none:none:0:1,0:2:none:none")} if aligned else {}
    criterion = small_criterion(aligned, **rules)
    context, encoded, speaker = small_inputs()
    with torch.no_grad():
        context *= scale
        encoded *= min(scale, 1e10)
    output = criterion(context, encoded, speaker)
    output.losses.sum().backward()
    assert torch.isfinite(output.losses).all()
    assert torch.isfinite(context.grad).all()
    assert torch.isfinite(encoded.grad).all()


def test_perfect_alignment_costs_nothing():
    """A cost of zero is distributed equally over the frames, without dividing by zero."""
    log_scores, alignment = torch.zeros(5, 6, 3), torch.zeros(5, 6, dtype=torch.long)
    fractions = CPCCTCCriterion.loss_fractions(log_scores, alignment)
    assert_close(fractions, torch.full((1, 6), 1 / 6))


def test_losses_add_up_to_the_cost():
    criterion = small_criterion(True, loss_temperature=0.5, skips_end=1)
    inputs = small_inputs()
    names = frozenset({"cpcctc_log_scores", "cpcctc_align"})
    output = criterion(*inputs, capture=names)
    scores = output.captured["cpcctc_log_scores"].flatten(0, 1)
    cost, alignment = soft_align(scores / 0.5, skips_end=1)
    assert_close(output.losses.sum(), cost.mean() * 0.5)
    assert torch.equal(output.captured["cpcctc_align"].flatten(0, 1), alignment)


def test_shapes_of_captures():
    inputs = small_inputs()
    names = frozenset({"pred", "cpcctc_align", "cpcctc_log_scores"})
    criterion = small_criterion(True, self_loop=True, learn_blank=True).double()
    doubles = [leaf.double() for leaf in inputs[:2]]
    captured = criterion(*doubles, inputs[2], capture=names).captured
    assert captured.keys() == names
    assert captured["pred"].shape == (4, 14, 16, 5)
    assert captured["pred"].dtype == torch.float32
    assert captured["cpcctc_align"].shape == (4, 14, 6)
    assert captured["cpcctc_log_scores"].shape == (4, 14, 6, 5)
    assert not any(tensor.requires_grad for tensor in captured.values())
    # In front: the blank, initially zero, then the anchor frame itself.
    assert (captured["pred"][..., 0] == 0).all()
    assert_close(captured["pred"][..., 1], inputs[1][:, :14].detach())
    plain = small_criterion(False)
    captured = plain(*inputs, capture=frozenset({"pred"})).captured
    assert captured["pred"].shape == (4, 17, 16, 3)
    assert_close(captured["pred"], plain.predict(inputs[0], None).transpose(2, 3).detach())
    with pytest.raises(ValueError, match="cpcctc_align"):
        plain(*inputs, capture=frozenset({"cpcctc_align"}))


def test_masked_matches_are_never_chosen():
    """Columns in front share the mask of the first prediction, not of their own place."""
    rules = parse_mask_rules("0:3:0:1")
    criterion = small_criterion(True, self_loop=True, mask_rules=rules)
    output = criterion(*small_inputs(), capture=frozenset({"cpcctc_log_scores"}))
    masked = output.captured["cpcctc_log_scores"] == FORBIDDEN
    assert masked[..., :3, :2].all()
    assert not masked[..., 3:, :].any()
    assert not masked[..., 2:].any()
    criterion = small_criterion(True, mask_rules=parse_mask_rules("0:2:1:none"))
    alignment = criterion(*small_inputs(), capture=frozenset({"cpcctc_align"})).captured
    assert (alignment["cpcctc_align"][..., :2] == 0).all()


def test_negatives_outside_the_match_window(monkeypatch):
    """The last matched frame stays allowed, as in the original."""
    offsets = []
    draw = sampling.draw_negatives

    def remember(batch_size, n_frames, n_anchors, *rest, **options):
        negatives = draw(batch_size, n_frames, n_anchors, *rest, **options)
        offsets.append((negatives - torch.arange(n_anchors).view(-1, 1)) % n_frames)
        return negatives

    monkeypatch.setattr(sampling, "draw_negatives", remember)
    for no_negatives in (False, True):
        criterion = small_criterion(
            True, no_negatives_in_match_window=no_negatives, n_negatives=300
        )
        criterion(*small_inputs())
    assert [offset.min().item() for offset in offsets] == [1, 6]


@pytest.mark.parametrize("aligned", [False, True])
def test_generator_leaves_the_global_one_alone(aligned):
    criterion = small_criterion(aligned, dropout=True).eval()
    inputs = small_inputs()
    state = torch.get_rng_state()
    first = criterion(*inputs, generator=generator_from(1)).losses
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(criterion(*inputs, generator=generator_from(1)).losses, first)
    assert not torch.equal(criterion(*inputs, generator=generator_from(2)).losses, first)


@pytest.mark.parametrize("aligned", [False, True])
def test_autocast_accumulates_in_float32(aligned):
    criterion = small_criterion(aligned)
    inputs = small_inputs()
    exact = criterion(*inputs, generator=generator_from(1)).losses
    with torch.autocast("cpu", torch.bfloat16):
        output = criterion(*inputs, capture=frozenset({"pred"}), generator=generator_from(1))
        output.losses.sum().backward()
    assert output.losses.dtype == output.captured["pred"].dtype == torch.float32
    assert_close(output.losses, exact.detach(), 0.02)


@pytest.mark.parametrize("aligned", [False, True])
def test_compiled_criterion_is_the_same(aligned):
    """Draws included. Without a back end: what is traced is what may break."""
    criterion = small_criterion(aligned)
    inputs = small_inputs()
    torch.manual_seed(1)
    expected = criterion(*inputs).losses
    torch.manual_seed(1)
    losses = torch.compile(criterion, backend="eager")(*inputs).losses
    assert_close(losses, expected.detach())
    losses.sum().backward()
    assert inputs[0].grad is not None


@pytest.mark.parametrize("aligned", [False, True])
def test_criteria_learn(aligned):
    """A few steps on frames that their context gives away."""
    criterion = small_criterion(aligned, n_negatives=16)
    encoded = torch.randn(8, 20, 16)
    context = encoded.roll(-1, 1) + 0.1 * torch.randn(8, 20, 16)
    optimiser = torch.optim.Adam(criterion.parameters(), lr=0.1)
    outputs = []
    for _ in range(60):
        outputs.append(criterion(context, 3 * encoded, None))
        optimiser.zero_grad()
        outputs[-1].losses.sum().backward()
        optimiser.step()
    assert outputs[-1].losses[0, 0] < 0.5 * outputs[0].losses[0, 0]
    assert outputs[-1].accuracies[0, 0] > outputs[0].accuracies[0, 0] + 0.3


def test_no_criterion_can_be_trained():
    network = torch.nn.GRU(16, 16, batch_first=True)
    before = [parameter.clone() for parameter in network.parameters()]
    optimiser = torch.optim.Adam(network.parameters(), lr=0.1)
    criterion, encoded = NoneCriterion(), torch.randn(4, 20, 16)
    for _ in range(2):
        output = criterion(network(encoded)[0], encoded, torch.zeros(4, dtype=torch.long))
        output.losses.sum().backward()
        optimiser.step()
    assert output.losses.tolist() == output.accuracies.tolist() == [[0]]
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


# From flags to criteria


def flags(**changes):
    """The architecture flags at their defaults, with small widths and linear heads."""
    defaults = {
        "supervised": False,
        "cpc_mode": None,
        "hiddenEncoder": 16,
        "hiddenGar": 16,
        "nPredicts": 3,
        "sizeWindow": 3200,
        "negativeSamplingExt": 8,
        "limitNegsInBatch": 0,
        "speakerEmbedding": 0,
        "rnnMode": "linear",
        "multihead_rnn": False,
        "multiLevel": False,
        "normalizeCPCScore": False,
        "scoreTemperature": 1.0,
        "dropout": False,
        "CPCCTC": False,
        "CPCCTCNumMatched": 6,
        "CPCCTCSkipBeg": 0,
        "CPCCTCSkipEnd": 0,
        "CPCCTCSelfLoop": False,
        "CPCCTCLearnBlank": False,
        "CPCCTCNoNegsMatchWin": False,
        "CPCCTCMasq": "",
        "CPCCTCLossTemp": 1.0,
        "CPCCTCNormalizeEncs": False,
        "CPCCTCNormalizePreds": False,
    }
    return SimpleNamespace(**defaults | changes)


FLAGS = [
    ({}, {}),
    ({"cpc_mode": "reverse"}, {"reverse": True}),
    ({"limitNegsInBatch": 2}, {"limit_negatives": 2}),
    ({"negativeSamplingExt": 5}, {"n_negatives": 5}),
    ({"speakerEmbedding": 4}, {"speaker_embedding": 4, "n_speakers": 2}),
    ({"rnnMode": "transformer"}, {"rnn_mode": "transformer"}),
    ({"dropout": True}, {"dropout": True}),
    ({"normalizeCPCScore": True}, {"cosine_scores": True}),
    ({"scoreTemperature": 0.5}, {"temperature": 0.5}),
    ({"rnnMode": "transformer", "multihead_rnn": True}, {"shared_head": True}),
]
ALIGNED_FLAGS = [
    *FLAGS,
    ({"CPCCTCSkipBeg": 1}, {"skips_beg": 1}),
    ({"CPCCTCSkipEnd": 2}, {"skips_end": 2}),
    ({"CPCCTCSelfLoop": True}, {"self_loop": True}),
    ({"CPCCTCLearnBlank": True}, {"learn_blank": True}),
    ({"CPCCTCNoNegsMatchWin": True}, {"no_negatives_in_match_window": True}),
    ({"CPCCTCMasq": "0:2:1:none"}, {"mask_rules": [(slice(0, 2), slice(1, None))]}),
    ({"CPCCTCLossTemp": 0.5}, {"loss_temperature": 0.5}),
    ({"CPCCTCNormalizeEncs": True}, {"normalize_encodings": True}),
    ({"CPCCTCNormalizePreds": True}, {"normalize_predictions": True}),
]


@pytest.mark.parametrize(
    ("aligned", "given", "options"),
    [(False, *pair) for pair in FLAGS] + [(True, *pair) for pair in ALIGNED_FLAGS],
)
def test_flags_reach_the_criterion(aligned, given, options):
    built = build_criterion(flags(CPCCTC=aligned, **given), n_speakers=2)
    expected = small_criterion(aligned, **options)
    expected.load_state_dict(built.state_dict())
    inputs, losses = small_inputs(), []
    for criterion in (built, expected):
        torch.manual_seed(1)
        losses.append(criterion(*inputs).losses)
    assert torch.equal(*losses)


def test_no_criterion_by_flag():
    assert isinstance(build_criterion(flags(cpc_mode="none", CPCCTC=True), 2), NoneCriterion)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"rnnMode": "transformer", "hiddenGar": 24}, "--hiddenGar.*--hiddenEncoder"),
        ({"rnnMode": "transformer", "speakerEmbedding": 4}, "--speakerEmbedding"),
        ({"rnnMode": "conv5"}, "--rnnMode conv5.*conv4"),
        ({"nPredicts": 20}, "--sizeWindow has 20 frames"),
        ({"CPCCTC": True, "CPCCTCNumMatched": 20}, "--sizeWindow.*--CPCCTCNumMatched"),
        ({"CPCCTC": True, "nPredicts": 7}, "--CPCCTCNumMatched"),
        ({"CPCCTC": True, "nPredicts": 6, "CPCCTCSelfLoop": True}, "plus 1 for --CPCCTCSelfLoop"),
        ({"CPCCTC": True, "nPredicts": 6, "CPCCTCLearnBlank": True}, "--CPCCTCLearnBlank"),
        ({"CPCCTC": True, "CPCCTCMasq": "0:2:1"}, "--CPCCTCMasq: '0:2:1' is no mask rule"),
    ],
)
def test_flags_that_cannot_work(given, named):
    with pytest.raises(UserError, match=named):
        build_criterion(flags(**given), n_speakers=2)


@pytest.mark.parametrize(
    ("given", "n_phones", "step_name", "has_accuracy"),
    [
        ({}, 0, "prediction step", True),
        ({"cpc_mode": "reverse"}, 0, "prediction step", True),
        ({"CPCCTC": True}, 0, "matched frame", True),
        ({"CPCCTC": True, "cpc_mode": "none"}, 0, None, True),
        ({"supervised": True, "CPCCTC": True}, 0, None, True),
        ({"supervised": True}, 5, None, True),
        ({"supervised": True, "CTC": True}, 5, None, False),
    ],
)
def test_networks_know_what_their_losses_are(given, n_phones, step_name, has_accuracy):
    options = {"onEncoder": False, "nLevelsPhone": 1, "CTC": False} | given
    networks = Networks(build_criterion(flags(**options), 2, n_phones), nn.Identity())
    assert (networks.step_name, networks.has_accuracy) == (step_name, has_accuracy)


class DoublingModel(nn.Module):
    """Records its arguments; context and encoded are the waveform, times a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 2.0))
        self.calls = []

    def forward(self, waveform, continues=None, past=None):
        self.calls.append((waveform, continues, past))
        return self.weight * waveform, waveform


@pytest.mark.parametrize("target", ["speaker", "phone"])
def test_networks_apply_the_criterion_to_the_model(target):
    criterion = small_criterion(False)
    if target == "phone":
        criterion = PhoneCriterion(16, 3)
    networks = Networks(criterion, DoublingModel())
    names = [name for name, _ in networks.named_parameters()]
    assert names[-1] == "model.weight"  # the optimiser states of checkpoints have this order
    assert all(name.startswith("criterion.") for name in names[:-1])
    batch = Batch(
        torch.randn(4, 20, 16),
        torch.arange(4) % 2,
        torch.randint(3, (4, 20)),
        torch.arange(4),
        torch.tensor([True, False, True, False]),
    )
    losses, accuracies = networks(batch, generator_from(1))
    label = getattr(batch, target)
    expected = criterion(2 * batch.waveform, batch.waveform, label, generator=generator_from(1))
    assert torch.equal(losses, expected.losses)
    assert torch.equal(accuracies, expected.accuracies)
    ((waveform, continues, past),) = networks.model.calls
    assert waveform is batch.waveform
    assert continues is batch.continues
    assert past is None


def test_extra_values_are_never_shared_between_outputs():
    output = CriterionOutput(torch.zeros(1, 1), torch.zeros(1, 1), {})
    assert dict(output.extra) == {}
    with pytest.raises(TypeError):
        output.extra["perplexity"] = 1.0


# ------------------------------------------------------------------------------- classifiers


def classifier_of(case):
    config = case.config
    if case.kind == "SpeakerCriterion":
        return SpeakerCriterion(config["dimEncoder"], config["nSpeakers"], config["nLayers"])
    if case.kind == "SpeakerDoubleCriterion":
        return SpeakerDoubleCriterion(config["dimEncoder"], config["dimInter"], config["nSpeakers"])
    kinds = {"PhoneCriterion": PhoneCriterion, "CTCPhoneCriterion": CTCPhoneCriterion}
    return kinds[case.kind](
        config["dimEncoder"], config["nPhones"], config["onEncoder"], config["nLayers"]
    )


@pytest.mark.parametrize(
    "case",
    golden_cases(
        "SpeakerCriterion", "SpeakerDoubleCriterion", "PhoneCriterion", "CTCPhoneCriterion"
    ),
)
def test_classifier_golden(case):
    criterion = classifier_of(case)
    criterion.load_state_dict(case.state_dict)
    context = case["c"].clone().requires_grad_()
    encoded = case["z"].clone().requires_grad_()
    out = criterion(context, encoded, case["label"])
    out.losses.sum().backward()

    assert_close(out.losses, case["loss"], what="loss")
    assert_close(out.accuracies, case["acc"], what="accuracy")
    assert out.losses.shape == out.accuracies.shape == (1, 1)
    if "logits" in case:
        assert_close(criterion.logits(context, encoded), case["logits"], what="logits")
    for name, leaf in (("grad_c", context), ("grad_z", encoded)):
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert_close(gradient, case[name], 1e-4, what=name)
    assert_gradients_close(criterion, case.parameter_gradients())


def linear_shapes(module):
    return [tuple(m.weight.shape) for m in module.modules() if isinstance(m, nn.Linear)]


def test_every_layer_has_as_many_neurons_as_classes():
    assert linear_shapes(SpeakerCriterion(6, 4, 3)) == [(4, 6), (4, 4), (4, 4)]
    assert linear_shapes(PhoneCriterion(6, 5, n_layers=2)) == [(5, 6), (5, 5)]
    assert linear_shapes(CTCPhoneCriterion(6, 5, n_layers=3)) == [(5, 6), (5, 5), (6, 5)]
    assert linear_shapes(CTCPhoneCriterion(6, 5)) == [(6, 6)]


def test_layers_alternate_with_relu():
    criterion = PhoneCriterion(6, 5, n_layers=2)
    context = torch.randn(2, 3, 6)
    first, _, last = criterion.PhoneCriterionClassifier
    assert_close(criterion.logits(context), last(first(context).relu()))


def test_a_loaded_ctc_classifier_keeps_its_widths_and_its_optimiser():
    stored = CTCPhoneCriterion(6, 5, n_layers=2)
    stored.PhoneCriterionClassifier[0] = nn.Linear(6, 9)
    stored.PhoneCriterionClassifier[2] = nn.Linear(9, 6)
    loaded = CTCPhoneCriterion(6, 5, n_layers=2)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=1.0)

    loaded.load_state_dict(stored.state_dict())

    assert linear_shapes(loaded) == [(9, 6), (6, 9)]
    context, label = torch.randn(2, 8, 6), torch.randint(5, (2, 8))
    assert_close(loaded.logits(context), stored.logits(context))
    loaded(context, None, label).losses.sum().backward()
    optimizer.step()
    assert not torch.equal(loaded.logits(context), stored.logits(context))


@pytest.mark.parametrize("other", [CTCPhoneCriterion(7, 5, n_layers=2), CTCPhoneCriterion(6, 4)])
def test_a_ctc_classifier_of_other_features_or_phones_is_not_adapted(other):
    n_layers = len(linear_shapes(other))
    with pytest.raises(RuntimeError, match="size mismatch"):
        CTCPhoneCriterion(6, 5, n_layers=n_layers).load_state_dict(other.state_dict())


def test_ctc_on_encoded_frames_is_refused():
    with pytest.raises(ValueError, match="contexts"):
        CTCPhoneCriterion(6, 5, on_encoder=True)


def test_accuracy_is_the_fraction_of_correct_frames():
    criterion = PhoneCriterion(3, 3)
    with torch.no_grad():
        criterion.PhoneCriterionClassifier.weight.copy_(torch.eye(3))
        criterion.PhoneCriterionClassifier.bias.zero_()
    phones = torch.tensor([[0, 1, 2, 2], [1, 1, 0, 0]])
    wrong_twice = torch.tensor([[0, 1, 2, 1], [1, 1, 0, 2]])
    out = criterion(nn.functional.one_hot(wrong_twice, 3).float(), None, phones)
    assert out.accuracies.item() == 6 / 8


def test_classifiers_name_the_label_they_need():
    assert SpeakerCriterion(3, 2).target == SpeakerDoubleCriterion(3, 2, 2).target == "speaker"
    assert PhoneCriterion(3, 2).target == CTCPhoneCriterion(3, 2).target == "phone"


# --------------------------------------------------------------------------- label sequences


@pytest.mark.parametrize("case", golden_cases("seq_alignment"))
def test_collapse_golden(case):
    collapsed, lengths = collapse_label_chain(case["labels"])
    assert torch.equal(collapsed, case["collapsed"])
    assert torch.equal(lengths, case["sizes"])


def test_collapse_keeps_the_first_of_each_run():
    labels = torch.randint(3, (6, 20), dtype=torch.int16)
    collapsed, lengths = collapse_label_chain(labels)
    for row, sequence, length in zip(labels, collapsed, lengths, strict=True):
        expected = [label for label, _ in itertools.groupby(row.tolist())]
        assert sequence[:length].tolist() == expected
        assert not sequence[length:].any()
    assert collapsed.dtype == torch.int64


@pytest.mark.parametrize("case", golden_cases("seq_alignment"))
def test_phone_error_rate_golden(case):
    rate = phone_error_rate([case["per_hyp"].tolist()], [case["per_ref"].tolist()])
    assert rate == pytest.approx(case["per"].item(), rel=1e-6)


def test_phone_error_rate_counts_each_kind_of_error():
    reference = [1, 2, 3, 4]
    hypotheses = [[1, 2, 3, 4], [1, 3, 4], [1, 2, 5, 4], [1, 2, 3, 3, 4, 4], []]
    rates = [phone_error_rate([h], [reference]) for h in hypotheses]
    assert rates == [0, 1 / 4, 1 / 4, 2 / 4, 1]
    assert phone_error_rate(hypotheses, [reference] * 5) == pytest.approx(sum(rates) / 5)


# ------------------------------------------------------------------------------- beam search


@pytest.mark.parametrize("case", golden_cases("seq_alignment"))
def test_beam_search_golden(case):
    found = beam_search(case["beam_probs"], case.config["beam_nKeep"], case.config["blank"])
    assert_close([score for score, _ in found], case["beam_scores"], what="scores")
    for (_, labels), expected, length in zip(
        found, case["beam_seqs"].tolist(), case["beam_len"].tolist(), strict=True
    ):
        assert labels == expected[:length]


def collapse_path(path, blank):
    return tuple(label for label, _ in itertools.groupby(path) if label != blank)


@pytest.mark.parametrize("blank", [0, 1, 2])
def test_a_wide_beam_sums_over_all_paths(blank):
    probabilities = torch.rand(5, 3, dtype=torch.float64)
    expected = {}
    for path in itertools.product(range(3), repeat=5):
        labels = collapse_path(path, blank)
        probability = probabilities[range(5), path].prod().item()
        expected[labels] = expected.get(labels, 0) + probability
    found = {tuple(labels): score for score, labels in beam_search(probabilities, 100, blank)}
    assert found == pytest.approx(expected)


def simple_beam_search(probabilities, n_keep, blank):
    """Prefix beam search with a dictionary: prefix -> (ends in blank, ends in label)."""
    beams = {(): (1.0, 0.0)}
    for frame in probabilities.tolist():
        following = {}

        def add(prefix, in_blank, in_label, following=following):
            old = following.get(prefix, (0.0, 0.0))
            following[prefix] = (old[0] + in_blank, old[1] + in_label)

        for prefix, (in_blank, in_label) in beams.items():
            add(prefix, (in_blank + in_label) * frame[blank], 0.0)
            if prefix:
                add(prefix, 0.0, in_label * frame[prefix[-1]])
            for label, probability in enumerate(frame):
                if label != blank:
                    repeats = prefix and prefix[-1] == label
                    add((*prefix, label), 0.0, (in_blank + in_label * (not repeats)) * probability)
        beams = dict(sorted(following.items(), key=lambda item: -sum(item[1]))[:n_keep])
    return [(sum(value), list(prefix)) for prefix, value in beams.items()]


@pytest.mark.parametrize("n_keep", [1, 2, 7])
def test_a_narrow_beam_keeps_what_a_simple_search_keeps(n_keep):
    probabilities = (3 * torch.randn(4, 12, 6, dtype=torch.float64)).softmax(2)
    log_scores, symbols = beam_search_batch(probabilities, 2, n_keep)
    for utterance in range(4):
        expected = simple_beam_search(probabilities[utterance], n_keep, 2)
        assert_close(log_scores[utterance].exp(), [score for score, _ in expected])
        found = [[s for s in row if s >= 0] for row in symbols[utterance].tolist()]
        assert found == [labels for _, labels in expected]


def test_frames_past_the_end_change_nothing():
    probabilities = torch.rand(3, 9, 4).softmax(2)
    lengths = torch.tensor([9, 5, 1])
    log_scores, symbols = beam_search_batch(probabilities, 3, 4, lengths)
    for row, length in enumerate(lengths):
        alone, its_symbols = beam_search_batch(probabilities[row : row + 1, :length], 3, 4)
        assert_close(log_scores[row].exp(), alone[0].exp())
        assert torch.equal(symbols[row, 0, :length], its_symbols[0, 0])
        assert (symbols[row, 0, length:] == -1).all()


def test_long_utterances_do_not_underflow():
    n_frames = 3000  # 0.2 ** 3000 is far below the smallest float
    log_scores, _ = beam_search_batch(torch.full((1, n_frames, 5), 0.2), 4, 3)
    assert torch.isfinite(log_scores).all()
    assert (log_scores < -1000).all()


def test_certain_frames_give_their_labels():
    labels = torch.tensor([[1, 1, 4, 1, 4, 4, 2], [0, 0, 0, 0, 4, 0, 0]])
    certain = nn.functional.one_hot(labels, 5)
    assert best_label_sequences(certain, blank=4, n_keep=5) == [[1, 1, 2], [0, 0]]


# ------------------------------------------------------------------------------------- chance level


@pytest.mark.parametrize(
    "options",
    [
        None,
        {"n_matched": 7},
        {"n_matched": 5, "loss_temperature": 2.0, "skips_beg": 1, "skips_end": 2},
        {"n_matched": 6, "self_loop": True, "learn_blank": True},
        {"n_matched": 6, "mask_rules": parse_mask_rules("0:1:1:none,-1:none:0:2")},
    ],
    ids=["cpc", "cpc-ctc", "skips, temperature", "loop, blank", "mask"],
)
def test_chance_is_what_frames_give_that_are_all_the_same(options):
    common = {"dim_context": 6, "dim_encoded": 4, "n_frames": 12, "n_negatives": 9}
    common["rnn_mode"] = "linear"
    criterion = CPCCTCCriterion(4, **options, **common) if options else CPCCriterion(4, **common)
    same = torch.ones(2, 12, 1)
    inputs = same * torch.randn(6), same * torch.randn(4), torch.zeros(2, dtype=torch.long)
    for head in criterion.wPrediction.predictors[1:]:
        head.weight.data = criterion.wPrediction.predictors[0].weight.data
    losses = criterion(*inputs).losses
    if options and criterion.n_extra:  # these columns aren't from heads: all zeros
        losses = criterion(inputs[0], 0 * inputs[1], inputs[2]).losses
    chance = criterion.chance()
    assert losses.mean().item() == pytest.approx(chance.loss, rel=1e-5)
    assert chance.accuracy == (None if options else 0.1)


def test_the_chance_of_classifiers_is_one_class_of_all():
    for criterion in (PhoneCriterion(6, 5, n_layers=2), SpeakerCriterion(6, 5)):
        label = torch.zeros((3, 4) if criterion.target == "phone" else 3, dtype=torch.long)
        for parameter in criterion.parameters():
            parameter.data.zero_()
        loss = criterion(torch.randn(3, 4, 6), None, label).losses.item()
        assert (loss, 0.2) == pytest.approx(criterion.chance())
    assert CTCPhoneCriterion(6, 5).chance() == NoneCriterion().chance() == (None, None)
