"""Tests of loading models, of features, and of torch.hub."""

import argparse
import copy
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import soundfile
import torch

import feature_loader
from criterion.classification import CTCPhoneCriterion, PhoneCriterion, SpeakerCriterion
from feature_loader import (
    FeatureModule,
    ModelPhoneCombined,
    build_feature,
    build_feature_batch,
    features_in_parts,
    load_criterion_state,
    load_model,
    load_phone_classifier,
    to_one_hot,
)
from model import ConcatenatedModel, CPCModelNullspace, build_model
from tests.helpers import REAL_SPEECH, ROOT, assert_close, golden_cases, needs_real_speech
from utils.misc import SAMPLES_PER_FRAME, UserError
from utils.normalisation import seq_normalization
from utils.run.checkpoint import open_checkpoint, save_checkpoint, stored_architecture
from utils.run.flags import build_parser

# ------------------------------------------------------------------------------------- loading


def flags(*words):
    return build_parser().parse_args(["--hiddenEncoder", "8", "--hiddenGar", "6", *words])


def state_of(args, model=None):
    model = model or build_model(args)
    return {
        "gEncoder": model.state_dict(),
        "cpcCriterion": {},
        "optimizer": {},
        "best": None,
        "args": vars(args),
        "logs": {},
        "position": [1, 0, 0],
    }


def save_ours(directory, stored, model=None, **more):
    """A checkpoint as training writes it; returns its path."""
    return save_checkpoint(directory, {**state_of(stored, model), **more}, 0)


def save_originals(directory, stored, model, epoch=0, **more):
    """A checkpoint as the original writes it: `stored` are its arguments, a dict."""
    directory.mkdir(exist_ok=True)
    path = directory / f"checkpoint_{epoch}.pt"
    state = {"gEncoder": model.state_dict(), "cpcCriterion": {}, "optimizer": {}, "best": None}
    torch.save({**state, **more}, path)
    (directory / "checkpoint_args.json").write_text(json.dumps(stored))
    return path


def assert_same_model(one, other):
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("case", golden_cases("checkpoint_state"))
def test_weights_of_an_original_checkpoint_golden(case):
    path = case.path.parent / "checkpoint" / "checkpoint_0.pt"
    model, *_ = load_model([path])
    expected = case.state_dict
    loaded = {f"gEncoder/{key}": value for key, value in model.state_dict().items()}
    criterion, stored = load_criterion_state(path)
    loaded |= {f"cpcCriterion/{key}": value for key, value in criterion.items()}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.items())
    assert stored["hiddenGar"] == model.dim_context


def test_load_model_gives_what_was_saved(tmp_path):
    args = flags("--arMode", "GRU", "--nLevelsGRU", "2", "--normMode", "batchNorm")
    saved = build_model(args)
    path = save_ours(tmp_path, args, saved)
    for given in ([path], [str(path)], [tmp_path], path, open_checkpoint(path)):
        model, hidden_gar, hidden_encoder = load_model(given)
        assert (hidden_gar, hidden_encoder) == (6, 8)
        assert_same_model(model, saved)
    assert [(a.arMode, a.nLevelsGRU) for a in model.arguments] == [("GRU", 2)]


def test_load_model_without_weights_has_the_same_architecture(tmp_path):
    args = flags("--arMode", "GRU")
    saved = build_model(args)
    model, *_ = load_model([save_ours(tmp_path, args, saved)], load_weights=False)
    assert model.state_dict().keys() == saved.state_dict().keys()
    assert not torch.equal(model.gEncoder.conv1.weight, saved.gEncoder.conv1.weight)


def test_load_best_takes_the_best_and_reports_if_there_is_none(tmp_path):
    args = flags()
    best = build_model(args)
    path = save_ours(tmp_path / "a", args, best=best.state_dict())
    assert_same_model(load_model([path], load_best=True)[0], best)
    with pytest.raises(UserError, match="no best model"):
        load_model([save_ours(tmp_path / "b", args)], load_best=True)


def test_several_checkpoints_are_concatenated(tmp_path):
    one = save_ours(tmp_path / "a", flags())
    other = save_ours(tmp_path / "b", flags("--hiddenGar", "5", "--arMode", "GRU"))
    model, hidden_gar, hidden_encoder = load_model([one, other])
    assert (hidden_gar, hidden_encoder) == (11, 16)
    waveform = torch.randn(2, 1, 1600)
    contexts = [load_model([path])[0](waveform)[0] for path in (one, other)]
    assert_close(model(waveform)[0], torch.cat(contexts, dim=2))
    assert [a.hiddenGar for a in model.arguments] == [6, 5]


def test_a_concatenated_model_can_be_loaded_again_and_concatenated_further(tmp_path):
    paths = [
        save_ours(tmp_path / name, flags("--hiddenGar", dim))
        for name, dim in zip("abc", "567", strict=True)
    ]
    model, *_ = load_model(paths[:2])
    saved = save_ours(
        tmp_path / "ab", flags(), model, models=[vars(args) for args in model.arguments]
    )
    assert_same_model(load_model([saved])[0], model)
    deeper, hidden_gar, _ = load_model([saved, paths[2]])
    assert hidden_gar == 18
    assert_same_model(deeper, load_model(paths)[0])


def test_more_than_ten_models_keep_their_order(tmp_path):
    args = flags("--arMode", "no_ar", "--hiddenGar", "8", "--normMode", "ID")
    model = ConcatenatedModel([build_model(args) for _ in range(11)])
    saved = save_ours(tmp_path, args, model, models=[vars(args)] * 11)
    assert_same_model(load_model([saved])[0], model)


@pytest.mark.parametrize("nested", [False, True])
def test_originals_concatenated_checkpoint_looks_up_its_parts(tmp_path, nested):
    parts, names = [], []
    for name, dim in zip("abc", (4, 5, 6), strict=True):
        args = flags("--hiddenGar", str(dim))
        parts.append(build_model(args))
        names.append(str(save_originals(tmp_path / name, vars(args), parts[-1])))
    if nested:  # b and c in a run, then a and that run
        inner = save_originals(
            tmp_path / "bc",
            {"load": names[1:], "hiddenGar": 11, "hiddenEncoder": 16},
            ConcatenatedModel(parts[1:]),
        )
        names = [names[0], str(inner)]
        model = ConcatenatedModel([parts[0], ConcatenatedModel(parts[1:])])
    else:
        model = ConcatenatedModel(parts)
    path = save_originals(
        tmp_path / "all", {"load": names, "hiddenGar": 15, "hiddenEncoder": 24}, model
    )
    loaded, hidden_gar, hidden_encoder = load_model([path])
    assert (hidden_gar, hidden_encoder) == (15, 24)
    waveform = torch.randn(1, 1, 1600)
    assert_close(loaded(waveform)[0], model(waveform)[0])

    shutil.rmtree(tmp_path / "b")
    if not nested:
        with pytest.raises(UserError, match="aren't there: .*b/checkpoint_0.pt"):
            load_model([path])


def test_originals_flags_of_a_loaded_model_come_from_its_own_checkpoint(tmp_path):
    args = flags("--arMode", "GRU", "--nLevelsGRU", "2")
    model = build_model(args)
    begun_with = save_originals(tmp_path / "a", vars(args), model)
    stored = {"load": [str(begun_with)], "hiddenGar": 6, "hiddenEncoder": 8}  # the rest: defaults
    path = save_originals(tmp_path / "b", {**stored, "arMode": "LSTM"}, model)
    assert_same_model(load_model([path])[0], model)


def test_originals_resumed_run_is_not_taken_for_one_begun_with_another(tmp_path):
    args = {**vars(flags()), "pathCheckpoint": "/elsewhere/run/checkpoint"}
    for load in (["/elsewhere/run/checkpoint_7.pt"], [str(tmp_path / "run" / "checkpoint_9.pt")]):
        model = build_model(flags())
        path = save_originals(tmp_path / "run", {**args, "load": load}, model)
        assert_same_model(load_model([path])[0], model)


def test_originals_checkpoint_that_names_itself_is_refused(tmp_path):
    model = build_model(flags())
    one = save_originals(tmp_path / "a", {"load": [str(tmp_path / "b" / "checkpoint_0.pt")]}, model)
    save_originals(tmp_path / "b", {"load": [str(one)]}, model)
    with pytest.raises(UserError, match="names itself"):
        load_model([one])


def test_arguments_of_the_parent_program_have_unknown_and_missing_ones(tmp_path):
    model = build_model(flags())
    stored = {"hiddenEncoder": 8, "hiddenGar": 6, "path_cache": "/x", "nMask": 3, "load": None}
    assert_same_model(load_model([save_originals(tmp_path, stored, model)])[0], model)


@pytest.mark.parametrize("mode", ["transformer", "no_ar"])
def test_width_of_a_network_that_keeps_it_is_that_of_the_encoder(tmp_path, mode):
    args = flags("--arMode", mode, "--hiddenGar", "8", "--sizeWindow", "1600")
    stored = {**vars(args), "hiddenGar": 256}  # what the original stores
    assert load_model([save_originals(tmp_path, stored, build_model(args))])[1] == 8


@pytest.mark.parametrize("container", [dict, argparse.Namespace])
def test_published_models_are_single_files(tmp_path, container, capsys):
    args = flags("--nLevelsGRU", "2")
    model = build_model(args)
    config = container(**{**vars(args), "arMode": "LSTM", "someday": 1})
    weights = {**model.state_dict(), "gEncoder.unused.weight": torch.zeros(1)}
    torch.save({"config": config, "weights": weights}, tmp_path / "published.pt")
    assert_same_model(load_model([tmp_path / "published.pt"])[0], model)
    assert "not used: gEncoder.unused.weight" in capsys.readouterr().out


def test_missing_weights_are_refused_by_name(tmp_path):
    state = state_of(flags())
    del state["gEncoder"]["gEncoder.conv2.bias"]
    path = save_checkpoint(tmp_path / "a", state, 0)
    with pytest.raises(UserError, match="a/checkpoint_0.pt.*gEncoder.conv2.bias"):
        load_model([path])
    path = save_ours(tmp_path / "b", flags("--hiddenGar", "7"), build_model(flags()))
    with pytest.raises(UserError, match="b/checkpoint_0.pt.*baseNet.weight_ih_l0"):
        load_model([path])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"config": {"arMode": "MLP"}, "weights": {"gAR": torch.zeros(1)}}, "arMode"),
        ({"config": 3, "weights": {}}, "wrong type"),
        ({"config": {}, "weights": 3}, "isn't a CPC checkpoint"),
        ({"weights": {}}, "neither `gEncoder` nor"),
        ([1, 2], "neither `gEncoder` nor"),
        ({"config": {"a": types.SimpleNamespace()}, "weights": {}}, "could run code"),
    ],
)
def test_files_that_are_no_checkpoints_are_refused(tmp_path, content, reason):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"x.pt: .*{reason}"):
        load_model([tmp_path / "x.pt"])


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such directory or file"):
        load_model([tmp_path / "none.pt"])
    with pytest.raises(UserError, match="no checkpoint there"):
        load_model([tmp_path])


def test_models_without_their_arguments_are_refused(tmp_path):
    model = ConcatenatedModel([build_model(flags()), build_model(flags())])
    path = save_ours(tmp_path, flags(), model, models=[vars(flags())])
    with pytest.raises(UserError, match="2 models, but the arguments of 1"):
        load_model([path])


def test_gru_level_keeps_the_first_layers(tmp_path):
    args = flags("--arMode", "GRU", "--nLevelsGRU", "3")
    saved = build_model(args)
    path = save_ours(tmp_path, args, saved)
    model, *_ = load_model([path], gru_level=2)
    waveform = torch.randn(1, 1, 1600)
    with torch.no_grad():
        context, encoded = model(waveform)
        expected = encoded
        for k in range(2):
            layer = torch.nn.GRU(expected.size(2), 6, batch_first=True)
            for name, _ in layer.named_parameters():
                weight = getattr(saved.gAR.baseNet, name.replace("l0", f"l{k}"))
                setattr(layer, name, weight)
            expected = layer(expected)[0]
    assert_close(context, expected)
    assert model.arguments[0].nLevelsGRU == 2
    assert stored_architecture(open_checkpoint(path))[0].nLevelsGRU == 3
    with pytest.raises(UserError, match="--gru_level 4: .* 3 recurrent layers"):
        load_model([path], gru_level=4)


def test_gru_level_needs_a_recurrent_network(tmp_path):
    path = save_ours(tmp_path, flags("--arMode", "no_ar", "--hiddenGar", "8"))
    with pytest.raises(UserError, match="--gru_level 1: .* 0 recurrent layers"):
        load_model([path], gru_level=1)


@pytest.mark.parametrize("case", golden_cases("CPCModelNullspace"))
@pytest.mark.parametrize("asked_for", [False, True])
def test_null_space_model_golden(case, asked_for, tmp_path):
    config = case.config
    args = flags("--hiddenEncoder", str(config["dim"]), "--hiddenGar", str(config["dim"]),
                 "--arMode", config["ar"], "--normMode", config["normMode"])  # fmt: skip
    path = save_ours(tmp_path, args, gEncoder=case.state_dict)
    model, hidden_gar, hidden_encoder = load_model([path], nullspace=asked_for)
    assert hidden_gar == hidden_encoder == config["dim_null"]
    context, encoded = model(case["x"])
    assert_close(context, case["c"])
    assert_close(encoded, case["z"])


def test_null_space_models_are_recognised_and_others_refused(tmp_path):
    args = flags("--hiddenGar", "8")
    model = CPCModelNullspace(build_model(args), torch.eye(8)[:, :5])
    path = save_ours(tmp_path / "a", args, model)
    assert_same_model(load_model([path])[0], model)
    plain = save_ours(tmp_path / "b", args)
    both, hidden_gar, _ = load_model([path, plain])
    assert hidden_gar == 13
    with pytest.raises(UserError, match="b/checkpoint_0.pt: isn't .* null-space"):
        load_model([path, plain], nullspace=True)


@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("ctc", [False, True])
@pytest.mark.parametrize("flag", [None, "onEncoder", "get_encoded"])
def test_phone_classifiers_are_rebuilt_from_their_state(tmp_path, n_layers, ctc, flag):
    if ctc and flag:
        return
    width = 8 if flag else 6
    kind = CTCPhoneCriterion if ctc else PhoneCriterion
    saved = kind(width, 4, bool(flag), n_layers)
    args = {**vars(flags()), "CTC": ctc, **({flag: True} if flag else {})}
    path = save_ours(tmp_path, flags(), cpcCriterion=saved.state_dict(), args=args)
    loaded = load_phone_classifier(path)
    context, encoded = torch.randn(2, 5, 6), torch.randn(2, 5, 8)
    assert type(loaded) is kind
    assert torch.equal(loaded.logits(context, encoded), saved.logits(context, encoded))


def test_other_criteria_are_no_phone_classifiers(tmp_path):
    with pytest.raises(UserError, match="no criterion"):
        load_phone_classifier(save_ours(tmp_path / "a", flags()))
    speaker = SpeakerCriterion(6, 3).state_dict()
    with pytest.raises(UserError, match="doesn't name phones"):
        load_phone_classifier(save_ours(tmp_path / "b", flags(), cpcCriterion=speaker))


# ------------------------------------------------------------------------------------ features

GOLDEN_FEATURES = {  # array -> function and its arguments, as the manifest describes them
    "feat_ctx": (build_feature, {"max_size": 64000}),
    "feat_enc": (build_feature, {"get_encoded": True, "max_size": 64000}),
    "feat_strict": (build_feature, {"strict": True, "max_size": 64000}),
    "feat_seqnorm_strict": (build_feature, {"strict": True, "seq_norm": True, "max_size": 64000}),
    "feat_max20480": (build_feature, {"max_size": 20480}),
    "feat_batch": (build_feature_batch, {}),
    "feat_batch_strict": (
        build_feature_batch,
        {"strict": True, "max_size": 10240, "batch_size": 5},
    ),
}


MODELS_OF_WHOLE_FILES = {
    "LSTM": "--nLevelsGRU 2",
    "sequential": "--samplingType sequential --arMode GRU --normMode batchNorm",
    "no_ar": "--arMode no_ar --hiddenGar 8",
    "reverse": "--cpc_mode reverse",
    "instanceNorm": "--normMode instanceNorm",
    "lfb": "--encoder_type lfb",
    "mfcc": "--encoder_type mfcc",
}


@pytest.mark.parametrize("n_samples", [400, 480, 8000, 8151, 8152, 8159, 24159])
@pytest.mark.parametrize("kind", MODELS_OF_WHOLE_FILES)
def test_features_are_those_of_one_pass_over_the_file(tmp_path, monkeypatch, kind, n_samples):
    monkeypatch.setattr(feature_loader, "FRAMES_PER_PART", 7)
    model = build_model(flags(*MODELS_OF_WHOLE_FILES[kind].split())).eval()
    waveform = write_noise(tmp_path / "a.wav", n_samples)
    with torch.no_grad():
        expected = model(waveform, torch.tensor([False]))
    model.reset_hidden()
    for features, get_encoded in zip(expected, (False, True), strict=True):
        assert features.size(1) == n_samples // SAMPLES_PER_FRAME
        assert_close(build_feature(model, tmp_path / "a.wav", get_encoded=get_encoded), features)
    normalised = build_feature(model, tmp_path / "a.wav", seq_norm=True)
    assert_close(normalised, seq_normalization(expected[0]), 1e-4)
    assert model.hidden_state() is None
    both = ConcatenatedModel([model, copy.deepcopy(model)])
    parts = list(features_in_parts(both, tmp_path / "a.wav"))
    assert_close(torch.cat(parts)[None], torch.cat([expected[0]] * 2, dim=2))
    in_one = kind in ("reverse", "instanceNorm", "lfb", "mfcc")
    assert all(len(part) <= 7 for part in parts) or in_one


def test_a_long_file_takes_the_memory_of_a_part(tmp_path, model):
    waveform = write_noise(tmp_path / "a.wav", 16000 * 90 + 151)
    with torch.no_grad():
        assert_close(build_feature(model, tmp_path / "a.wav"), model(waveform)[0])
    lengths = []
    model.gEncoder.conv0.register_forward_pre_hook(lambda _, x: lengths.append(x[0].size(1)))
    for part in features_in_parts(model, tmp_path / "a.wav"):
        assert len(part) <= 2000
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()  # the reader's own business
    assert max(lengths) == 2002 * SAMPLES_PER_FRAME
    assert len(lengths) == 5


@needs_real_speech
@pytest.mark.parametrize("array", [*GOLDEN_FEATURES, "feat_keephidden_file1"])
@pytest.mark.parametrize("case", golden_cases("buildFeature"))
def test_features_of_a_file_golden(case, array):
    model, *_ = load_model([case.path.parent / case.config["checkpoint"]])
    model.gAR.keep_hidden = array.startswith("feat_keephidden")
    function, options = GOLDEN_FEATURES.get(array, (build_feature, {"max_size": 64000}))
    features = function(model, REAL_SPEECH / "audio" / case.config["file"], **options)
    assert_close(features, case[array], 1e-4)


def write_noise(path, n_samples, *, rate=16000, channels=1, seed=0):
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, (n_samples, channels))
    soundfile.write(path, noise.astype(np.float32), rate, subtype="FLOAT")
    return torch.from_numpy(noise.astype(np.float32).mean(axis=1))[None, None]


@pytest.fixture
def model():
    return build_model(flags())


@pytest.mark.parametrize("n_samples", [160, 319, 1600, 3199, 3200, 3201, 3359, 3360, 8000, 8159])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("seq_norm", [False, True])
def test_features_are_those_of_the_chunks(tmp_path, model, n_samples, strict, seq_norm):
    waveform = write_noise(tmp_path / "a.wav", n_samples)
    options = {"strict": strict, "seq_norm": seq_norm}

    def features_of(begin, end):
        with torch.no_grad():
            context = model(waveform[:, :, begin:end])[0]
        return seq_normalization(context) if seq_norm else context

    size = 1600
    full = n_samples // size * size
    expected = [features_of(begin, begin + size) for begin in range(0, full, size)]
    remaining = (n_samples - full) // SAMPLES_PER_FRAME
    if remaining:
        begin = max(0, n_samples - size) if strict else full
        expected.append(features_of(begin, n_samples)[:, -remaining:])
    expected = torch.cat(expected, dim=1)

    assert expected.shape == (1, n_samples // SAMPLES_PER_FRAME, 6)
    path = tmp_path / "a.wav"
    assert_close(build_feature(model, path, max_size=size, **options), expected)
    assert_close(build_feature(model, path, max_size=size + 159, **options), expected)
    assert_close(build_feature_batch(model, path, max_size=size, batch_size=3, **options), expected)


def test_hidden_state_is_kept_within_a_file_but_not_between_files(tmp_path, model):
    waveform = write_noise(tmp_path / "a.wav", 8000)
    model.gAR.keep_hidden = True
    with torch.no_grad():
        encoded = torch.cat([model(chunk)[1] for chunk in waveform.split(1600, dim=2)], dim=1)
        whole = model.gAR.baseNet(encoded)[0]
    model(torch.randn(3, 1, 1600))
    kept = [state.clone() for state in model.hidden_state()]
    for _ in range(2):
        assert_close(build_feature(model, tmp_path / "a.wav", max_size=1600), whole)
    assert all(map(torch.equal, model.hidden_state(), kept))
    features = build_feature_batch(model, tmp_path / "a.wav", max_size=1600, batch_size=2)
    model.gAR.keep_hidden = False
    assert_close(features, build_feature(model, tmp_path / "a.wav", max_size=1600))


def test_overlapping_chunk_begins_in_the_zero_state(tmp_path, model):
    waveform = write_noise(tmp_path / "a.wav", 2000)
    model.gAR.keep_hidden = True
    features = build_feature(model, tmp_path / "a.wav", max_size=1600, strict=True)
    model.reset_hidden()
    with torch.no_grad():
        assert_close(features[:, 10:], model(waveform[:, :, 400:])[0][:, -2:])


def test_model_is_left_as_it_was(tmp_path):
    model = build_model(flags("--normMode", "batchNorm"))
    model.train()
    model.gEncoder.conv0.eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    write_noise(tmp_path / "a.wav", 3200)
    module = FeatureModule(model, get_encoded=True)
    features = build_feature(module, tmp_path / "a.wav")
    assert not features.requires_grad
    assert module.training
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(features, build_feature(model.eval(), tmp_path / "a.wav", get_encoded=True))


@pytest.mark.skipif("MP3" not in soundfile.available_formats(), reason="libsndfile without MP3")
def test_compressed_files_are_read(tmp_path, model):
    tone = 0.3 * np.sin(2 * np.pi * 440 / 16000 * np.arange(16000))
    soundfile.write(tmp_path / "a.mp3", tone, 16000, format="MP3")
    soundfile.write(tmp_path / "a.flac", tone, 16000)
    compressed, exact = (build_feature(model, tmp_path / f"a.{kind}") for kind in ("mp3", "flac"))
    assert compressed.size(1) >= exact.size(1)
    assert_close(compressed[:, 20:80].mean(1), exact[:, 20:80].mean(1), 0.1)


def test_channels_are_averaged(tmp_path, model):
    waveform = write_noise(tmp_path / "a.wav", 1600, channels=3)
    with torch.no_grad():
        assert_close(build_feature(model, tmp_path / "a.wav"), model(waveform)[0])


@pytest.mark.parametrize("abspos", [[], ["--abspos"]])
def test_chunks_of_a_transformer_are_no_longer_than_it_can_take(tmp_path, abspos):
    model = build_model(
        flags("--arMode", "transformer", "--hiddenGar", "8", "--sizeWindow", "3200", *abspos)
    ).eval()
    waveform = write_noise(tmp_path / "a.wav", 8000)
    path = tmp_path / "a.wav"
    with torch.no_grad():
        expected = torch.cat([model(chunk)[0] for chunk in waveform.split(3200, dim=2)], dim=1)
        encoded = model.gEncoder(waveform).transpose(1, 2)
        context = torch.cat([model.gAR(frames) for frames in encoded.split(20, dim=1)], dim=1)
    assert_close(build_feature(model, path, max_size=64000), expected)
    assert build_feature(model, path, max_size=64000, strict=True).shape == (1, 50, 8)
    assert_close(build_feature(model, path), context)
    assert_close(build_feature(model, path, get_encoded=True), encoded)


@pytest.mark.parametrize("encoder", ["lfb", "mfcc"])
@pytest.mark.parametrize("n_samples", [3200, 3360, 3400, 3599])
def test_remainder_too_short_for_an_encoder_is_seen_with_what_precedes_it(
    tmp_path, encoder, n_samples
):
    model = build_model(flags("--encoder_type", encoder))
    write_noise(tmp_path / "a.wav", n_samples)
    features = build_feature(model, tmp_path / "a.wav", max_size=1600)
    assert features.shape == (1, n_samples // SAMPLES_PER_FRAME, 6)
    assert torch.isfinite(features).all()


@pytest.mark.parametrize(
    ("n_samples", "options", "reason"),
    [
        (0, {}, "empty|contains no audio"),
        (159, {}, "159 samples are too short"),
        (1600, {"rate": 8000}, "8000 Hz.*adjust_sample_rate"),
    ],
)
def test_unusable_files_are_refused(tmp_path, model, n_samples, options, reason):
    write_noise(tmp_path / "a.wav", n_samples, **options)
    with pytest.raises(UserError, match=f"a.wav.*({reason})"):
        build_feature(model, tmp_path / "a.wav")


def test_broken_files_are_refused(tmp_path, model):
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "nan.wav", np.full(1600, np.nan, np.float32), 16000, subtype="FLOAT")
    for name, reason in (("text.wav", ""), ("nan.wav", "NaN"), ("none.wav", "No such file")):
        with pytest.raises(UserError, match=f"{name}: .*{reason}"):
            build_feature(model, tmp_path / name)


def test_feature_module_collapses_frames(tmp_path, model):
    waveform = write_noise(tmp_path / "a.wav", 1600)
    context, encoded = model(waveform)
    for get_encoded, expected in ((False, context), (True, encoded)):
        module = FeatureModule(model, get_encoded, collapse=True)
        assert torch.equal(module(waveform), expected[0])
        assert module.dim_output == expected.size(2)
    assert build_feature(module, tmp_path / "a.wav").shape == (1, 10, 8)


@pytest.mark.parametrize("on_encoder", [False, True])
def test_phone_probabilities_as_features(tmp_path, model, on_encoder):
    waveform = write_noise(tmp_path / "a.wav", 3200)
    criterion = PhoneCriterion(8 if on_encoder else 6, 5, on_encoder)
    with torch.no_grad():
        logits = criterion.logits(*model(waveform))
    soft = build_feature(ModelPhoneCombined(model, criterion, one_hot=False), tmp_path / "a.wav")
    assert_close(soft, logits.softmax(dim=2))
    hard = build_feature(ModelPhoneCombined(model, criterion, one_hot=True), tmp_path / "a.wav")
    assert hard.dtype == torch.int64
    assert torch.equal(hard.argmax(dim=2), logits.argmax(dim=2))
    assert torch.equal(hard.sum(dim=2), torch.ones(1, 20, dtype=torch.int64))


@pytest.mark.parametrize("case", golden_cases("feature_utils"))
def test_feature_utilities_golden(case):
    assert_close(seq_normalization(case["x"]), case["seqnorm"])
    assert torch.equal(to_one_hot(case["idx"], case.config["nItems"]), case["onehot"])


def test_seq_normalization_of_one_frame_is_finite():
    assert torch.equal(seq_normalization(torch.randn(2, 1, 3)), torch.zeros(2, 1, 3))


# ------------------------------------------------------------------------------------ torch.hub

FOREIGN = """
import sys, types
foreign = {}
for name in ("transformers", "utils", "utils.misc", "model", "dataset", "stats", "eval"):
    foreign[name] = sys.modules[name] = types.ModuleType(name)
"""
LOAD = """
import torch
path = list(sys.path)
def load(**flags):
    return torch.hub.load(ROOT, "CPC_audio", source="local", **flags)
"""
CHECK = """
assert sys.path == path
assert all(sys.modules[name] is module for name, module in foreign.items())
import copy, pickle
for network in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
    context, encoded = network(torch.randn(2, 1, 1600))
    assert context.shape == (2, 10, 6) and encoded.shape == (2, 10, 8)
"""


DOWNLOAD = """
import os
torch.hub.set_dir("cache")
example = torch.load("example.pt")
for _ in range(2):  # the second time from the cache
    model = load(pretrained=True, url="{server}/model-0123.pt", progress=False)
    assert torch.allclose(model(example["in"])[0], example["out"], atol=1e-6)
    if os.path.exists("www/model-0123.pt"):
        os.remove("www/model-0123.pt")
assert os.listdir("cache/checkpoints") == ["model-0123.pt"]
"""
REFUSALS = """
for flags, reason in (
    (dict(hiddenEncodr=3), "hiddenEncodr: not an architecture flag"),
    (dict(arMode="MLP"), "invalid choice: 'MLP'"),
    (dict(pretrained=True, arMode="GRU"), "arMode: not with pretrained=True"),
    (dict(pretrained=True, url="{server}/absent.pt"), "absent.pt: can't be downloaded (HTTP Error"),
):
    try:
        load(**flags)
    except Exception as error:
        assert reason in str(error), error
    else:
        sys.exit(str(flags) + " was accepted")
"""


def run_python(directory, *lines):
    code = "\n".join([f"import sys; ROOT = {str(ROOT)!r}", *lines])
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_hub_leaves_no_module_where_others_look(tmp_path):
    run_python(
        tmp_path,
        LOAD,
        "before = set(sys.modules)",
        "load()",
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}",
        "assert not new & {'model', 'transformers', 'utils', 'feature_loader', 'criterion'}, new",
    )


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """The address at which the files of `tmp_path / "www"` are served on this machine."""
    (tmp_path / "www").mkdir()

    def handler(*args):
        return Quiet(*args, directory=str(tmp_path / "www"))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_hub_among_foreign_modules_of_the_same_names(tmp_path, server):
    args = flags()
    saved = build_model(args)
    published = tmp_path / "www" / "model-0123.pt"
    torch.save({"config": vars(args), "weights": saved.state_dict()}, published)
    waveform = torch.randn(1, 1, 1600)
    torch.save({"in": waveform, "out": saved(waveform)[0]}, tmp_path / "example.pt")
    run_python(
        tmp_path,
        FOREIGN,
        LOAD,
        "model = load(hiddenEncoder=8, hiddenGar=6, arMode='GRU')",
        CHECK,
        # An import within a function of ours, executed after all that:
        "model = load(encoder_type='mfcc', hiddenEncoder=8, hiddenGar=6)",
        "model.gEncoder = type(model.gEncoder)(8)",
        CHECK,
        DOWNLOAD.format(server=server),
        CHECK,
        REFUSALS.format(server=server),
    )
