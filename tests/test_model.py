"""Tests of encoders, context networks, models and transformers."""

import argparse
import io
import math
import re
import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eval.starts import varying_energy
from model import (
    CPCAR,
    NORMS,
    ConcatenatedModel,
    CPCEncoder,
    CPCModel,
    CPCModelNullspace,
    LFBEncoder,
    MFCCEncoder,
    NoAR,
    TransformerAR,
    build_ar,
    build_encoder,
    build_model,
)
from tests.helpers import ROOT, assert_close, assert_gradients_close, golden_cases
from transformers import DROPOUT, CausalAttention, build_transformer
from utils.fast_dropout import dropout, relu_with_dropout_
from utils.misc import SAMPLES_PER_FRAME, UserError, generator_from

# -------------------------------------------------------------------------------- golden values


def assert_golden(module, case, training=False, without_effect=()):
    """Names, output, gradients and float64 output of a module that maps x to y.

    The gradients of parameters `without_effect` are rounding errors, here and in the golden set.
    """
    assert list(module.state_dict()) == list(case.state_dict)
    module.load_state_dict(case.state_dict)
    module.train(training)
    x = case["x"].clone().requires_grad_()
    y = module(x)
    assert_close(y, case["y"])
    (y * case["r"]).sum().backward()
    assert_close(x.grad, case["grad_x"], 1e-4)
    gradients = case.parameter_gradients()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name in without_effect:
        del gradients[name]
        assert module.get_parameter(name).grad.abs().max() < 1e-5 * largest
    assert_gradients_close(module, gradients)
    for name, array in case.arrays.items():
        if name.startswith("after."):
            assert_close(module.state_dict()[name.removeprefix("after.")], array, what=name)
    module.load_state_dict(case.state_dict)
    assert_close(module.double()(case["x"].double()), case["y64"], 1e-6)


@pytest.mark.parametrize("case", golden_cases("CPCEncoder"))
def test_golden_cpc_encoder(case):
    norm, training = case.config["normMode"], case.config["training"]
    encoder = CPCEncoder(case.config["sizeHidden"], norm)
    over_time = norm == "instanceNorm" or (norm == "batchNorm" and training)
    biases = [f"conv{i}.bias" for i in range(5)] if over_time else []
    assert_golden(encoder, case, training, without_effect=biases)


@pytest.mark.parametrize("case", golden_cases("LFBEnconder"))
def test_golden_lfb_encoder(case):
    encoder = LFBEncoder(case.config["dimEncoded"], case.config["normalize"])
    assert_golden(encoder, case, case.config["training"])


@pytest.mark.parametrize("case", golden_cases("MFCCEncoder"))
def test_golden_mfcc_encoder(case):
    encoder = MFCCEncoder(case.config["dimEncoded"])
    assert list(encoder.state_dict()) == list(case.state_dict)
    for name, value in encoder.state_dict().items():
        # A band's edge, thousands of Hz in float32 (steps of up to 5e-4 Hz), is divided by its
        # width, about 100 Hz: processors differ by 1e-5.
        tolerance = 1e-4 if name.endswith("mel_scale.fb") else 1e-5
        assert_close(value, case.state_dict[name], tolerance, what=name)
    encoder.load_state_dict(case.state_dict)
    assert_close(encoder(case["x"]).transpose(1, 2), case["y"])


@pytest.mark.parametrize("case", golden_cases("buildTransformerAR"))
def test_golden_transformer(case):
    config = case.config
    transformer = build_transformer(
        config["dimEncoded"], config["nLayers"], config["sizeSeq"], config["abspos"]
    )
    fresh = transformer.state_dict()
    for name in fresh:
        if name.split(".")[-1] in ("pe", "mask", "z"):
            torch.testing.assert_close(fresh[name], case.state_dict[name])
    assert_golden(transformer, case, config["training"])


def recurrent_network(config):
    return CPCAR(
        config["dimEncoded"],
        config["dimOutput"],
        config["keepHidden"],
        config["nLevelsGRU"],
        config["mode"],
        config.get("reverse", False),
    )


@pytest.mark.parametrize("case", golden_cases("CPCAR"))
def test_golden_recurrent_network(case):
    ar = recurrent_network(case.config)
    assert list(ar.state_dict()) == list(case.state_dict)
    ar.load_state_dict(case.state_dict)
    x1 = case["x1"].clone().requires_grad_()
    y1 = ar(x1)
    assert_close(y1, case["y1"])
    (y1 * case["r"]).sum().backward()
    assert_close(x1.grad, case["grad_x1"], 1e-4)
    assert_gradients_close(ar, case.parameter_gradients())
    assert_close(ar(case["x2"]), case["y2"])
    if case.config["keepHidden"]:
        hidden = ar.hidden if isinstance(ar.hidden, tuple) else (ar.hidden,)
        for state, name in zip(hidden, ("hidden_h", "hidden_c"), strict=False):
            assert_close(state, case[name], what=name)
    else:
        assert ar.hidden is None
    ar.hidden = None
    ar.double()
    assert_close(ar(case["x1"].double()), case["y1_64"], 1e-6)
    assert_close(ar(case["x2"].double()), case["y2_64"], 1e-6)


@pytest.mark.parametrize("case", golden_cases("CPCModelNullspace"))
def test_golden_nullspace_model(case):
    config = case.config
    cpc = CPCModel(
        CPCEncoder(config["sizeHidden"], config["normMode"]),
        CPCAR(config["sizeHidden"], config["dim"], False, 1, config["ar"]),
    )
    model = CPCModelNullspace(cpc, case["nullspace"])
    assert list(model.state_dict()) == list(case.state_dict)
    assert_close(model.nullspace.weight, case.state_dict["nullspace.weight"])
    model.load_state_dict(case.state_dict)
    context, encoded = model.eval()(case["x"])
    assert_close(context, case["c"])
    assert_close(encoded, case["z"])
    assert (model.dim_context, model.dim_encoded) == (context.size(2), encoded.size(2))


# ------------------------------------------------------------------------------------- encoders


def plain_encoder(encoder, norm, x):
    """CPCEncoder's function as its definition says it, from the encoder's own parameters."""
    for i, (kernel, stride, padding) in enumerate(
        ((10, 5, 3), (8, 4, 2), (4, 2, 1), (4, 2, 1), (4, 2, 1))
    ):
        convolution = getattr(encoder, f"conv{i}")
        assert convolution.weight.size(2) == kernel
        x = F.conv1d(x, convolution.weight, convolution.bias, stride, padding)
        affine = getattr(encoder, f"batchNorm{i}")
        if norm != "ID":
            dims = {"layerNorm": (1,), "batchNorm": (0, 2), "instanceNorm": (2,)}[norm]
            mean = x.mean(dims, keepdim=True)
            variance = x.var(dims, keepdim=True, unbiased=norm == "layerNorm")
            x = (x - mean) / (variance + 1e-5).sqrt()
            x = x * affine.weight.view(1, -1, 1) + affine.bias.view(1, -1, 1)
        x = x.clamp(min=0)
    return x


@pytest.mark.parametrize("norm", NORMS)
def test_encoder_equals_plain_convolutions_at_any_length(norm):
    encoder = CPCEncoder(6, norm).double()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    for length in (320, 321, 333, 479, 480, 481, 1599, 1601, 1923):
        waveform = torch.randn(3, 1, length, dtype=torch.float64)
        expected = plain_encoder(encoder, norm, waveform)
        cotangent = torch.randn_like(expected)
        expected_gradients = torch.autograd.grad(
            (expected * cotangent).sum(), list(encoder.parameters()), materialize_grads=True
        )
        output = encoder(waveform)
        assert output.size(2) == (length + 1) // SAMPLES_PER_FRAME
        assert_close(output, expected, 1e-9)
        gradients = torch.autograd.grad((output * cotangent).sum(), list(encoder.parameters()))
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            # A bias before a norm over time has no effect: rounding errors only.
            assert (gradient - expected_gradient).abs().max() < 1e-9 * (1 + gradient.abs().max())


def test_encoder_in_half_precision():
    """Near the values and gradients in float32, with nothing large kept in float32."""
    torch.manual_seed(0)
    encoder, waveform = CPCEncoder(32), torch.randn(2, 1, 20480)
    norms = [getattr(encoder, f"batchNorm{i}") for i in range(5)]
    for norm in norms:
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias, 0, 0.3)
    results, kept = [], []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    for half in (False, True):
        kept.clear()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=half),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            encoded = encoder(waveform)
        weight = torch.randn(encoded.shape, generator=generator_from(5))
        gradients = torch.autograd.grad((encoded.float() * weight).sum(), encoder.parameters())
        results.append((encoded.float(), *gradients))
    largest_parameter = max(parameter.numel() for parameter in encoder.parameters())
    assert {t.dtype for t in kept if t.numel() > largest_parameter} == {torch.bfloat16}
    for in_float, in_half in zip(*results, strict=True):
        assert torch.norm(in_half - in_float) < 0.25 * torch.norm(in_float)  # ReLUs that flip
    assert torch.norm(results[1][0] - results[0][0]) < 0.01 * torch.norm(results[0][0])


def test_encoder_starts_as_convolutions_do():
    encoder = CPCEncoder(512)
    bound = 1 / math.sqrt(512 * 8)
    weight = encoder.conv1.weight
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert (encoder.batchNorm1.weight == 1).all()
    assert (encoder.batchNorm1.bias == 0).all()


def test_lfb_equals_its_definition():
    encoder = LFBEncoder(3, normalize=False).double()
    waveform = torch.randn(2, 1, 1000, dtype=torch.float64)
    windows = waveform[:, 0].unfold(1, 400, 1)  # (B, T, 400)
    filtered = windows @ encoder.conv.weight[:, 0].T + encoder.conv.bias  # (B, T, 6)
    energy = F.pad(filtered[..., 0::2] ** 2 + filtered[..., 1::2] ** 2, (0, 0, 350, 350))
    hann = torch.hann_window(400).double()
    n_frames = (1000 + 61) // 160
    smoothed = torch.stack(
        [(energy[:, 160 * s : 160 * s + 400] * hann[:, None]).sum(1) for s in range(n_frames)], 2
    )
    assert_close(encoder(waveform), (1 + smoothed).log(), 1e-9)


ENCODERS = {
    "cpc": lambda dim: CPCEncoder(dim),
    "cpc-instanceNorm": lambda dim: CPCEncoder(dim, "instanceNorm"),
    "lfb": LFBEncoder,
    "mfcc": MFCCEncoder,
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_model_gives_a_frame_for_each_160_samples(kind):
    encoder = ENCODERS[kind](8)
    model = CPCModel(encoder, NoAR(8))
    for n_samples in (encoder.shortest, 479, 480, 481, 1599, 1600, 1601, 20480):
        context, encoded = model(torch.randn(2, 1, n_samples))
        assert encoded.shape == context.shape == (2, n_samples // 160, 8)
        assert encoded.is_contiguous()
    with pytest.raises(UserError, match="too short"):
        model(torch.randn(2, 1, encoder.shortest - 1))


def test_encoder_looks_no_further_than_its_windows():
    encoder = CPCEncoder(8).eval()
    waveform = torch.randn(1, 1, 1600)
    changed = waveform.clone()
    changed[..., 1000:] += 1
    difference = (encoder(waveform) - encoder(changed)).abs().amax((0, 1))
    last_same = (1000 - 313) // 160  # windows of 465 samples begin 153 before their frame
    assert (difference[: last_same + 1] == 0).all()
    assert (difference[last_same + 1 :] > 0).all()


# ----------------------------------------------------------------------------- context networks


def architecture(**changes):
    """A namespace of the architecture flags, small."""
    flags = {
        "hiddenEncoder": 16,
        "hiddenGar": 16,
        "encoder_type": "cpc",
        "normMode": "layerNorm",
        "initialisation": "lecun",
        "linearOutput": False,
        "multiLevel": False,
        "arMode": "LSTM",
        "nLevelsGRU": 1,
        "samplingType": "samespeaker",
        "cpc_mode": None,
        "abspos": False,
        "sizeWindow": 1600,
    }
    return argparse.Namespace(**{**flags, **changes})


def test_initialisations_differ_in_the_convolutions_alone():
    states = {}
    for name in ("original", "lecun"):
        torch.manual_seed(1)
        states[name] = build_model(architecture(initialisation=name)).state_dict()
    for key, value in states["original"].items():
        if re.fullmatch(r"gEncoder.conv\d.weight", key):
            value = value * 3**0.5
        elif re.fullmatch(r"gEncoder.conv\d.bias", key):
            value = torch.zeros_like(value)
        assert torch.equal(states["lecun"][key], value), key


def test_only_with_lecun_weights_frames_of_quiet_speech_differ_at_the_start():
    torch.manual_seed(0)
    time = torch.arange(16000) / 16000
    pulses = (torch.sin(2 * torch.pi * 5 * time) > 0) * torch.sin(2 * torch.pi * 300 * time)
    waveform = 0.03 * (pulses + 0.1 * torch.randn(16000))[None, None]
    varying = {}
    for name in ("original", "lecun"):
        torch.manual_seed(1)
        encoded = build_model(architecture(initialisation=name, hiddenEncoder=64))(waveform)[1]
        varying[name] = varying_energy(encoded[0])
    assert varying["original"] < 0.02 < 0.1 < varying["lecun"]


ALL_ENCODERS = [("cpc", norm) for norm in NORMS] + [("lfb", "layerNorm"), ("mfcc", "layerNorm")]
ALL_ARS = ["LSTM", "GRU", "RNN", "no_ar", "transformer"]


@pytest.mark.parametrize(("encoder_type", "norm"), ALL_ENCODERS)
def test_every_combination_takes_a_step(encoder_type, norm):
    for ar, cpc_mode, sampling, abspos in product(
        ALL_ARS, (None, "reverse"), ("samespeaker", "sequential"), (False, True)
    ):
        args = architecture(
            encoder_type=encoder_type,
            normMode=norm,
            arMode=ar,
            cpc_mode=cpc_mode,
            samplingType=sampling,
            abspos=abspos,
        )
        model = build_model(args)
        assert (model.dim_context, model.dim_encoded) == (16, 16)
        context, encoded = model(torch.randn(2, 1, 1600), torch.tensor([True, False]))
        assert context.shape == encoded.shape == (2, 10, 16)
        if parameters := list(model.parameters()):  # MFCC alone learns nothing
            optimizer = torch.optim.Adam(parameters)
            before = [parameter.clone() for parameter in parameters]
            (context * torch.randn_like(context)).sum().backward()
            optimizer.step()
            assert all(p.grad is not None and p.isfinite().all() for p in parameters)
            assert any((p != q).any() for p, q in zip(parameters, before, strict=True))
        assert (model.hidden_state() is not None) == (
            sampling == "sequential" and ar in ALL_ARS[:3]
        )


@pytest.mark.parametrize(
    ("build", "changes", "reason"),
    [
        (build_ar, {"arMode": "no_ar", "hiddenGar": 8}, "--hiddenGar 8"),
        (build_ar, {"arMode": "transformer", "hiddenGar": 8}, "--hiddenGar 8"),
        (build_ar, {"arMode": "transformer", "hiddenEncoder": 12, "hiddenGar": 12}, "8 heads"),
        (build_ar, {"arMode": "GRUU"}, "--arMode GRUU"),
        (build_encoder, {"encoder_type": "wav2vec"}, "--encoder_type wav2vec"),
        (build_encoder, {"normMode": "none"}, "--normMode none"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_reason(build, changes, reason):
    with pytest.raises(UserError, match=reason):
        build(architecture(**changes))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("abspos", [False, True])
@pytest.mark.parametrize("mode", ALL_ARS)
def test_context_depends_on_one_side_only(mode, abspos, reverse):
    cpc_mode = "reverse" if reverse else None
    ar = build_ar(architecture(arMode=mode, abspos=abspos, cpc_mode=cpc_mode)).eval()
    encoded = torch.randn(2, 10, 16)
    changed = encoded.clone()
    changed[:, 6] += 1
    difference = (ar(encoded) - ar(changed)).abs().amax((0, 2))
    before, after = difference[:6], difference[7:]
    unaffected, affected = (after, before) if reverse else (before, after)
    assert (unaffected < 1e-6).all()
    assert difference[6] > 1e-3
    if mode != "no_ar":
        assert (affected > 1e-6).all()


# --------------------------------------------------------------------------- kept hidden states

RECURRENT = [("LSTM", 1), ("LSTM", 2), ("GRU", 1), ("RNN", 2)]


def kept(mode, n_layers):
    return CPCAR(6, 5, keep_hidden=True, n_layers=n_layers, mode=mode)


@pytest.mark.parametrize(("mode", "n_layers"), RECURRENT)
def test_rows_that_do_not_continue_begin_from_zero(mode, n_layers):
    ar = kept(mode, n_layers)
    first, second = torch.randn(4, 3, 6), torch.randn(4, 3, 6)
    first[2] = math.nan  # nor does a broken row live on
    fresh = ar(second)
    ar.hidden = None
    ar(first)
    going_on = torch.tensor([True, False, False, True])
    mixed = ar(second, going_on)
    assert_close(mixed[~going_on], fresh[~going_on])
    assert ((mixed - fresh)[going_on].abs().amax((1, 2)) > 1e-3).all()


@pytest.mark.parametrize(("mode", "n_layers"), RECURRENT)
def test_batches_that_shrink_and_grow(mode, n_layers):
    ar = kept(mode, n_layers)
    x = torch.randn(3, 12, 6)
    expected = ar(x)
    ar.hidden = None
    ar(x[:, :4])
    assert_close(ar(x[:2, 4:8]), expected[:2, 4:8])  # the first rows continue
    grown = ar(x[:, 8:])
    assert_close(grown[:2], expected[:2, 8:])
    ar.hidden = None
    assert_close(grown[2:], ar(x[2:, 8:]))  # and a new row begins from zero


def test_no_gradient_into_the_last_batch():
    ar = kept("LSTM", 1)
    first = torch.randn(2, 3, 6, requires_grad=True)
    ar(first)
    ar(torch.randn(2, 3, 6)).sum().backward()
    assert first.grad is None


@pytest.mark.parametrize("mode", ALL_ARS)
def test_hidden_state_survives_a_detour_and_a_file(mode):
    model = build_model(architecture(arMode=mode, samplingType="sequential")).eval()
    waveforms = torch.randn(3, 2, 1, 1600)
    model(waveforms[0])
    file = io.BytesIO()
    torch.save(model.hidden_state(), file)
    expected = model(waveforms[1])[0]
    model.reset_hidden()
    assert model.hidden_state() is None
    model(waveforms[2])
    file.seek(0)
    model.set_hidden_state(torch.load(file, weights_only=True))
    assert_close(model(waveforms[1])[0], expected)


@pytest.mark.parametrize("mode", CPCAR.NETWORKS)
def test_recurrent_networks_work_in_float32_under_autocast(mode):
    """And keep hidden states in float32, so that a run in another precision can resume."""
    ar = CPCAR(6, 5, True, 1, mode)
    frames = torch.randn(2, 3, 6).bfloat16()
    expected = ar(frames.float())
    ar.hidden = None
    with torch.autocast("cpu", torch.bfloat16):
        context = ar(frames)
    assert torch.equal(context, expected)
    assert {state.dtype for state in _tensors(ar.hidden)} == {torch.float32}


def test_cepstra_are_computed_in_float32_under_autocast():
    encoder, waveform = MFCCEncoder(13), torch.randn(2, 1, 3200)
    expected = encoder(waveform)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(waveform), expected)


def _tensors(state):
    return state if isinstance(state, tuple) else (state,)


# --------------------------------------------------------------------------------- transformers


def naive_attention(query, key, value, krelpos):
    """Causal attention frame by frame; krelpos None: positions play no part."""
    output = torch.zeros_like(query)
    n_frames, dim_head = query.shape[2:]
    for batch, head, i in product(*map(range, query.shape[:3])):
        scores = []
        for j in range(i + 1):
            score = query[batch, head, i] @ key[batch, head, j]
            if krelpos is not None:
                score = score + query[batch, head, i] @ krelpos[:, krelpos.size(1) - 1 - (i - j)]
            scores.append(score / math.sqrt(dim_head))
        weights = torch.stack(scores).softmax(0)
        for j in range(i + 1):
            output[batch, head, i] += weights[j] * value[batch, head, j]
    return output


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("n_frames", [1, 2, 6, 7])
def test_attention_equals_a_loop(relative, n_frames):
    attention = CausalAttention(4, 7, relative).double().eval()
    query, key, value = torch.randn(3, 2, 3, n_frames, 4, dtype=torch.float64)
    expected = naive_attention(query, key, value, attention.Krelpos)
    assert_close(attention(query, key, value), expected, 1e-12)
    with torch.no_grad():  # another kernel
        assert_close(attention(query, key, value), expected, 1e-12)


@pytest.mark.parametrize("relative", [False, True])
def test_attention_gradients(relative):
    attention = CausalAttention(3, 5, relative).double().eval()
    inputs = tuple(torch.randn(3, 1, 2, 4, 3, dtype=torch.float64).requires_grad_().unbind())
    parameters = tuple(attention.parameters())

    def loss(*_):
        return attention(*inputs)

    assert torch.autograd.gradcheck(loss, inputs + parameters)


@pytest.mark.parametrize("abspos", [False, True])
def test_layer_equals_its_definition(abspos):
    stack = build_transformer(16, 1, 6, abspos).double().eval()
    layer = stack[-1]
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    y = x.clone()
    if abspos:
        for position, feature in product(range(5), range(16)):
            angle = position * 10_000 ** (-(feature // 2 * 2) / 16)
            y[:, position, feature] += math.cos(angle) if feature % 2 else math.sin(angle)

    def heads(linear):
        return (y @ linear.weight.T).view(2, 5, 8, 2).transpose(1, 2)

    multihead = layer.multihead
    mixed = naive_attention(
        heads(multihead.Wq), heads(multihead.Wk), heads(multihead.Wv), multihead.Att.Krelpos
    )
    y = layer.ln_multihead(y + multihead.Wo(mixed.transpose(1, 2).reshape(2, 5, 16)))
    hidden = layer.ffnetwork.lin1(y).clamp(min=0)
    expected = layer.ln_ffnetwork(y + layer.ffnetwork.lin2(hidden))
    assert_close(stack(x), expected, 1e-6)  # the table of positions was made in float32


def test_short_sequences_are_prefixes_and_long_ones_are_refused():
    for abspos in (False, True):
        ar = TransformerAR(16, 2, 12, abspos).eval()
        x = torch.randn(2, 12, 16)
        whole = ar(x)
        for n_frames in (1, 5, 11):
            assert_close(ar(x[:, :n_frames]), whole[:, :n_frames])
        with pytest.raises(UserError, match="at most 12 frames"):
            ar(torch.randn(2, 13, 16))


def test_dropout():
    x = torch.full((100, 1001), 2.0)
    dropped = dropout(x, DROPOUT)
    fraction = (dropped == 0).float().mean().item()
    assert fraction == pytest.approx(0.1, abs=0.005)
    assert dropped.mean().item() == pytest.approx(2, rel=0.01)
    kept_values = dropped[dropped != 0]
    assert_close(kept_values, torch.full_like(kept_values, 2 / 0.9), 1e-4)
    torch.manual_seed(5)
    again = dropout(x, DROPOUT)
    torch.manual_seed(5)
    assert torch.equal(again, dropout(x, DROPOUT))
    assert not torch.equal(again, dropped)


def test_relu_with_dropout_drops_what_dropout_drops_in_value_and_gradient():
    x, upstream = torch.randn(2, 50, 101, dtype=torch.float64)
    results = []
    for function in (
        lambda x: F.relu(dropout(x, DROPOUT)),
        lambda x: relu_with_dropout_(x.clone(), DROPOUT, True),
    ):
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        output = function(leaf)
        output.backward(upstream)
        results.append((output.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    kept = results[0][0] > 0
    assert_close(results[0][1][kept], upstream[kept] / 0.9, 1e-4)
    assert torch.equal(results[0][1] != 0, kept)
    assert torch.equal(relu_with_dropout_(x.clone(), DROPOUT, False), F.relu(x))


def test_dropout_acts_on_attention_and_feed_forward_in_training_only():
    layer = build_transformer(16, 1, 6, abspos=False)[0]
    x = torch.randn(2, 6, 16)
    for part in (layer.multihead, layer.ffnetwork):
        part.train()
        assert not torch.equal(part(x), part(x))
        part.eval()
        assert torch.equal(part(x), part(x))
    query = torch.zeros(40, 8, 6, 2)
    weights = layer.multihead.Att.train()(query, query, torch.ones_like(query))[:, :, 5, 0]
    assert weights.mean().item() == pytest.approx(1, abs=0.03)
    assert (weights > 1.1).float().mean().item() == pytest.approx(0.9**6, abs=0.1)  # none dropped


# ------------------------------------------------------------------------- names in state dicts


def layer_names(prefix, relative):
    names = [f"multihead.W{x}.weight" for x in "okqv"]
    names += ["multihead.Att.Krelpos", "multihead.Att.z"] if relative else []
    names += ["multihead.Att.mask", "ln_multihead.weight", "ln_multihead.bias"]
    names += [f"ffnetwork.lin{i}.{x}" for i in (1, 2) for x in ("weight", "bias")]
    return [prefix + name for name in [*names, "ln_ffnetwork.weight", "ln_ffnetwork.bias"]]


def recurrent_names(n_layers):
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [f"gAR.baseNet.{kind}_l{i}" for i in range(n_layers) for kind in kinds]


NORM_NAMES = {
    "layerNorm": ["weight", "bias"],
    "batchNorm": ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"],
    "instanceNorm": ["weight", "bias"],
    "ID": [],
}


def encoder_names(norm):
    return [
        f"gEncoder.{layer}{i}.{name}"
        for i in range(5)
        for layer, names in (("conv", ["weight", "bias"]), ("batchNorm", NORM_NAMES[norm]))
        for name in names
    ]


@pytest.mark.parametrize("norm", NORMS)
def test_names_and_shapes_of_the_encoder(norm):
    state = build_model(architecture(normMode=norm, nLevelsGRU=2)).state_dict()
    assert list(state) == encoder_names(norm) + recurrent_names(2)
    kernels = [state[f"gEncoder.conv{i}.weight"].shape for i in range(5)]
    assert kernels == [(16, 1, 10), (16, 16, 8), *[(16, 16, 4)] * 3]
    if norm == "layerNorm":
        assert state["gEncoder.batchNorm0.weight"].shape == (1, 16, 1)


def test_names_of_other_parts():
    def names(**changes):
        return list(build_model(architecture(**changes)).state_dict())

    cpc = encoder_names("layerNorm")
    assert names(arMode="no_ar") == cpc
    assert names(arMode="transformer") == cpc + layer_names("gAR.0.", relative=True)
    assert names(arMode="transformer", abspos=True) == [
        *cpc,
        "gAR.0.pe",
        *layer_names("gAR.1.", relative=False),
    ]
    lfb = [f"gEncoder.{name}" for name in ("han", "conv.weight", "conv.bias")]
    assert names(encoder_type="lfb", arMode="no_ar") == lfb
    mfcc = ["dct_mat", "MelSpectrogram.spectrogram.window", "MelSpectrogram.mel_scale.fb"]
    assert names(encoder_type="mfcc", arMode="no_ar") == [f"gEncoder.MFCC.{n}" for n in mfcc]


# --------------------------------------------------------------------------------- other models


def test_concatenated_model():
    parts = [build_model(architecture(hiddenGar=dim, samplingType="sequential")) for dim in (4, 6)]
    model = ConcatenatedModel(parts)
    assert list(model.state_dict()) == [
        f"models.{i}.{n}" for i in (0, 1) for n in parts[i].state_dict()
    ]
    waveform = torch.randn(2, 1, 1600)
    context, encoded = model(waveform)
    assert (model.dim_context, model.dim_encoded) == (10, 32) == (context.size(2), encoded.size(2))
    hidden = model.hidden_state()
    second = model(waveform)[0]
    model.reset_hidden()
    assert_close(model(waveform)[0], context)
    model.set_hidden_state(hidden)
    assert_close(model(waveform)[0], second)
    model.reset_hidden()
    assert_close(torch.cat([part(waveform)[0] for part in parts[:1]], 2), context[..., :4])


def test_nullspace_of_another_width_is_refused():
    model = build_model(architecture(hiddenGar=8))
    with pytest.raises(UserError, match="--hiddenGar 8 and --hiddenEncoder 16"):
        CPCModelNullspace(model, torch.randn(8, 3))


def test_nullspace_model_keeps_hidden_state():
    model = CPCModelNullspace(
        build_model(architecture(samplingType="sequential")), torch.randn(16, 3)
    )
    waveform = torch.randn(2, 1, 1600)
    first = model(waveform)[0]
    assert model.hidden_state() is not None
    model.set_hidden_state(None)
    assert_close(model(waveform)[0], first)
    model.reset_hidden()
    assert model.hidden_state() is None


# ----------------------------------------------------------- contexts of another version of audio


def small_models():
    """Models of every kind; the same weights in every call."""
    torch.manual_seed(4)

    def build(**changes):
        return build_model(architecture(samplingType="sequential", **changes))

    return [
        build(),
        build(arMode="transformer", cpc_mode="reverse").eval(),
        build(arMode="no_ar", normMode="instanceNorm"),
        CPCModelNullspace(build(), torch.randn(16, 3)),
        ConcatenatedModel([build(hiddenGar=4), build(arMode="GRU", hiddenGar=6)]),
        CPCModelNullspace(ConcatenatedModel([build(), build()]), torch.randn(32, 3)),
    ]


@pytest.mark.parametrize("kind", range(6))
def test_contexts_come_from_the_past_and_encoded_frames_from_the_waveform(kind):
    past, waveform, after = torch.randn(3, 2, 1, 1600)
    model, on_past, on_waveform = (small_models()[kind] for _ in range(3))
    context, encoded = model(waveform, None, past)
    assert_close(context, on_past(past)[0].detach())
    assert_close(encoded, on_waveform(waveform)[1].detach())
    assert encoded.is_contiguous()
    assert not torch.allclose(context, on_waveform(waveform)[0], atol=1e-3)
    assert_close(model(after)[0], on_past(after)[0].detach())  # as is the kept hidden state


def test_the_same_past_changes_nothing():
    waveform = torch.randn(2, 1, 1600)
    for first, second in zip(small_models(), small_models(), strict=True):
        for plain, same in zip(first(waveform), second(waveform, past=waveform), strict=True):
            assert_close(same, plain.detach())


def test_past_and_waveform_share_a_pass_of_the_encoder():
    """Both have gradients, and a norm over the batch normalises both by the same statistics."""
    model = build_model(architecture(normMode="batchNorm")).train()
    past, waveform = torch.randn(2, 3, 1, 1600)
    expected = model.gEncoder(torch.cat([past, waveform])).transpose(1, 2)
    past.requires_grad_()
    waveform.requires_grad_()
    context, encoded = model(waveform, past=past)
    assert_close(encoded, expected[3:].detach())
    assert_close(context, model.gAR(expected[:3]).detach())
    (context.sum() + encoded.square().sum()).backward()
    assert (past.grad != 0).any()
    assert (waveform.grad != 0).any()


def test_past_of_another_shape_is_refused():
    model, waveform = build_model(architecture()), torch.randn(2, 1, 1600)
    for past in (torch.randn(3, 1, 1600), torch.randn(2, 1, 1760)):
        with pytest.raises(ValueError, match="past is"):
            model(waveform, past=past)


# ----------------------------------------------------------------------------------- torchaudio

WITHOUT_EXTENSION = """
import sys

import model
import torch

assert not any(name.startswith("torchaudio") for name in sys.modules)


class NoCuda:
    def find_spec(name, path, target=None):
        if name == "torchaudio._extension":
            raise OSError("libc10_cuda.so: cannot open shared object file")


sys.meta_path.insert(0, NoCuda)
encoder = model.MFCCEncoder(13)
assert encoder(torch.randn(2, 1, 1600)).shape == (2, 13, 10)
from utils.torchaudio_import import torchaudio
assert torchaudio.functional.edit_distance([1, 2, 3], [1, 3]) == 1
assert torchaudio.functional.resample(torch.randn(800), 8000, 16000).shape == (1600,)
try:
    torchaudio.functional.forced_align(torch.randn(1, 2, 3), torch.ones(1, 1))
except RuntimeError as error:
    assert "compiled extension" in str(error)
else:
    raise AssertionError("forced_align has no extension here")
"""


def test_torchaudio_works_without_its_extension_and_is_imported_only_at_need():
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_EXTENSION],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
