"""Tests of the probes, of ABX and of the commands that use a trained model."""

import importlib.util
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

import eval.probe
from criterion.classification import PhoneCriterion
from dataset import AudioDataset, read_phone_labels, scan_corpus
from eval import ABX, abx_distances, abx_groups, build_zeroSpeech_features, common_voices_eval
from eval.abx_distances import Frames, compare_groups
from eval.abx_groups import (
    across_cells,
    cell_errors,
    count_triplets,
    group_items,
    mean_error,
    within_cells,
)
from eval.abx_items import Items, cut_items, frame_span, read_items
from eval.center_push import push_to_nearest, read_centers, squared_distances
from eval.common_voices_eval import CTCPhoneRecognizer, normalize_over_time
from eval.dtw import cosine_distance, dtw, euclidean_distance, normalize_with_singularity
from eval.linear_separability import main, null_space, parse_arguments
from eval.probe import Probe, ProbeOptions, accuracy_by_class, run_probe, storage_for
from eval.utterances import FreshFeatures, StoredFeatures, cut_in_batches, encode
from feature_loader import ModelPhoneCombined, build_feature, load_model
from model import build_model
from utils.arguments import build_parser
from utils.checkpoint import save_checkpoint
from utils.corpus import make_abx_item
from utils.files import TEMPORARY_PREFIX, load_json, load_tensors, save_tensors
from utils.misc import UserError
from utils.report import plot_confusion
from utils.report.plot_confusion import draw_confusion
from utils.testing import ROOT, assert_close, ends_refused, golden_cases

WINDOW = 3200  # samples, 20 frames
FAST = ProbeOptions(n_epochs=6, batch_size=8, learning_rate=0.05, cpc_epoch=4)


class SpectralModel(nn.Module):
    """Stands in for a CPC model: its frames are spectra, of which phones are easily told."""

    dim_context, dim_encoded = 81, 40

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.n_calls = 0

    def forward(self, waveform, continues):
        assert continues.shape == (len(waveform),)
        self.n_calls += 1
        frames = self.gain * waveform.view(len(waveform), -1, 160)
        spectrum = torch.fft.rfft(frames).abs().log1p()
        return spectrum, spectrum[..., : self.dim_encoded]


@pytest.fixture(scope="module")
def corpus(tiny_corpus):
    return scan_corpus(tiny_corpus / "audio")


@pytest.fixture(scope="module")
def labels(tiny_corpus):
    return read_phone_labels(tiny_corpus / "phones.txt")


def last_of_speaker(sequence):
    return sequence.name.endswith("0002")


def make_sets(corpus, labels=None, held_out=last_of_speaker):
    """Training and validation set; the latter holds the sequences that `held_out` chooses."""
    parts = {"training set": [], "validation set": []}
    for sequence in corpus.sequences:
        parts["validation set" if held_out(sequence) else "training set"].append(sequence)
    return [
        AudioDataset(
            corpus,
            part,
            WINDOW,
            phone_labels=labels,
            labelled_only=labels is not None,
            title=title,
        )
        for title, part in parts.items()
    ]


def options(**changes):
    return ProbeOptions(**{**vars(FAST), **changes})


@pytest.fixture
def phone_probe(corpus, labels):
    def build(model=None, **changes):
        sets = make_sets(corpus, labels)
        return Probe("phone", model or SpectralModel(), *sets, labels.n_phones, options(**changes))

    return build


# ------------------------------------------------------------------------------ what a probe finds


def test_phones_that_differ_are_told_apart(phone_probe):
    result = phone_probe().run()
    assert result.score > 0.9
    assert result.baseline < 0.4
    assert result.score_name == "acc"


def test_speakers_that_differ_are_told_apart(corpus):
    result = Probe("speaker", SpectralModel(), *make_sets(corpus), 3, options(n_epochs=30)).run()
    assert result.score > result.baseline + 0.1
    assert result.measured_on["training"]["frames"] == result.measured_on["training"]["windows"]


def test_ctc_reports_the_phone_error_rate_and_goes_by_it(phone_probe):
    probe = phone_probe(ctc=True, n_epochs=12)
    result = probe.run()
    rates = [rate for (rate,) in probe.logs["PER_val"]]
    assert result.score == min(rates) == rates[result.best_epoch]
    assert result.score < 0.5 < result.baseline
    assert result.logged() == {
        "phone_num_epoch_trained": 12,
        "phone_best_val_per": [result.score],
        "phone_baseline_val_per": [result.baseline],
    }


def test_the_best_epoch_has_the_highest_accuracy(phone_probe):
    probe = phone_probe(learning_rate=3.0)  # so large that accuracy goes up and down
    result = probe.run()
    accuracies = [accuracy for (accuracy,) in probe.logs["locAcc_val"]]
    assert result.score == max(accuracies) == accuracies[result.best_epoch]
    assert result.train_accuracy == probe.logs["locAcc_train"][result.best_epoch][0]
    assert accuracies != sorted(accuracies)


def windows_and_labels(probe, dataset):
    source = eval.probe.FreshFeatures(probe, dataset, training=False)
    features, label = zip(*source.batches(0), strict=True)
    return torch.cat(features), torch.cat(label)


@pytest.mark.parametrize("batch_size", [1000, 7, 1])
@pytest.mark.parametrize("max_stored_bytes", [None, 0])
def test_accuracies_are_means_over_all_frames(phone_probe, batch_size, max_stored_bytes):
    probe = phone_probe(batch_size=batch_size, max_stored_bytes=max_stored_bytes, n_epochs=2)
    result = probe.run()
    features, label = windows_and_labels(probe, probe.validation_set)
    assert len(label) % 7  # so that the last batch is smaller
    probe.criterion.load_state_dict(probe.best.classifier)
    right = probe.criterion.logits(features).argmax(2) == label
    assert result.score == pytest.approx(right.double().mean().item())
    assert all(0 <= a <= 1 for key in ("locAcc_train", "locAcc_val") for (a,) in probe.logs[key])


def test_the_baseline_always_names_the_commonest_phone_of_training(phone_probe):
    probe = phone_probe(n_epochs=1)
    result = probe.run()
    _, train_label = windows_and_labels(probe, probe.train_set)
    _, label = windows_and_labels(probe, probe.validation_set)
    commonest = train_label.flatten().mode().values
    assert result.baseline == pytest.approx((label == commonest).double().mean().item())


def test_accuracies_of_single_phones(phone_probe):
    probe = phone_probe()
    probe.run()
    by_class = probe.logs["class_accuracy"]
    frames = sum(part["frames"] for part in by_class.values())
    right = sum(part["accuracy"] * part["frames"] for part in by_class.values())
    assert frames == probe.measured_on["validation"]["frames"]
    assert right / frames == pytest.approx(probe.best.score)
    confusion = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 2]])
    assert accuracy_by_class(confusion) == {
        "0": {"accuracy": 0.75, "frames": 4},
        "2": {"accuracy": 0.5, "frames": 4},
    }


def test_says_what_it_measured(phone_probe, capsys):
    probe = phone_probe(n_epochs=1, get_encoded=True)
    result = probe.run()
    assert result.measured_on["layer"] == "encoded"
    assert result.measured_on["dimensions"] == 40
    for dataset, name in ((probe.train_set, "training"), (probe.validation_set, "validation")):
        _, label = windows_and_labels(probe, dataset)
        assert result.measured_on[name] == {
            "windows": len(label),
            "frames": label.numel(),
            "speakers": 3,
            "classes": len(label.unique()),
        }
    output = capsys.readouterr().out
    assert "encoded features, 40 dimensions" in output
    settings = "classifier: 1 layer, trained for \\d+ epochs? on batches of \\d+ windows, "
    assert re.search(rf"{settings}learning rate 0\.\d+\n", output)
    assert "always the commonest phone" in output


def test_classes_only_in_validation_are_counted(corpus, capsys):
    sets = make_sets(corpus, held_out=lambda sequence: sequence.speaker == 2)
    result = Probe("speaker", SpectralModel(), *sets, 3, FAST).run()
    assert result.measured_on["classes_only_in_validation"] == 1
    assert result.measured_on["share_only_in_validation"] == 1
    assert result.score == result.baseline == 0
    assert "never recognised: 1 speaker, 100.0 %" in capsys.readouterr().out


def test_files_without_labels_are_left_out_and_counted(corpus, labels, capsys):
    kept = {name: label for name, label in labels.labels.items() if not name.endswith("0001")}
    sets = make_sets(corpus, labels._replace(labels=kept))
    result = Probe("phone", SpectralModel(), *sets, labels.n_phones, FAST).run()
    assert result.measured_on["files_without_labels"] == 3
    assert "left out for lack of phone labels: 3 files" in capsys.readouterr().out


# ---------------------------------------------------------------------------- features, randomness


def test_features_are_computed_once_if_they_fit(phone_probe):
    calls = {}
    for limit in (None, 0):
        model = SpectralModel()
        phone_probe(model, n_epochs=4, max_stored_bytes=limit).run()
        calls[limit] = model.n_calls
    assert calls[0] == pytest.approx(4 * calls[None], abs=4)  # training drops incomplete batches


@pytest.mark.parametrize("task", ["phone", "speaker"])
def test_stored_features_are_the_fresh_ones(corpus, labels, task):
    sets = make_sets(corpus, labels)
    probe = Probe(task, SpectralModel(), *sets, labels.n_phones, FAST)
    for dataset, training in zip(sets, (True, False), strict=True):
        fresh, fresh_label = windows_and_labels(probe, dataset)
        stored = probe._feature_source(dataset, training=training)
        assert isinstance(stored, eval.probe.StoredFeatures)
        features, label = map(torch.cat, zip(*stored.batches(3), strict=True))
        if training:
            assert not torch.equal(features, fresh)
            order = torch.tensor(
                [(fresh == row).flatten(1).all(1).nonzero()[0] for row in features]
            )
            assert order.sort().values.tolist() == list(range(len(fresh)))
            fresh, fresh_label = fresh[order], fresh_label[order]
        assert torch.equal(features, fresh)
        assert torch.equal(label, fresh_label)


def test_only_the_last_frame_is_kept_for_speakers(corpus):
    probe = Probe("speaker", SpectralModel(), *make_sets(corpus), 3, FAST)
    assert probe._feature_source(probe.train_set, training=True).features.shape[1:] == (1, 81)


def test_features_go_where_there_is_room(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    free = {cpu: 1000, cuda: 100}
    monkeypatch.setattr(eval.probe, "available_memory", free.get)
    assert storage_for(50, cuda) == cuda
    assert storage_for(51, cuda) == cpu
    assert storage_for(501, cuda) is None
    assert storage_for(501, cpu) is None
    assert storage_for(501, cpu, limit=501) == cpu
    assert storage_for(50, cpu, limit=49) is None


@pytest.mark.parametrize("task", ["phone", "speaker"])
def test_the_training_run_is_left_untouched(corpus, labels, task, tmp_path):
    model = tiny_cpc_model(samplingType="sequential").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    sets = make_sets(corpus, labels)
    run_probe(task, model, *sets, labels.n_phones, FAST, logs_dir=tmp_path, checkpoint_dir=tmp_path)

    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_probe_depends_on_seed_and_cpc_epoch_alone(phone_probe):
    def logs(**changes):
        torch.rand(torch.randint(100, ()))  # whatever was drawn before
        probe = phone_probe(n_epochs=2, **changes)
        probe.run()
        return probe.logs

    assert logs() == logs()
    assert logs()["locLoss_train"] != logs(seed=1)["locLoss_train"]
    assert logs()["locLoss_train"] != logs(cpc_epoch=5)["locLoss_train"]


# ---------------------------------------------------------------------------------- what it writes


def test_files_of_a_probe_in_training(corpus, labels, tmp_path):
    model = SpectralModel()
    sets = make_sets(corpus, labels)
    stale = tmp_path / "best/4/phone/phone_classif_best-epoch77-cpc_epoch4.pt"
    other = tmp_path / "best/4/phone/phone_classif_best-epoch77-cpc_epoch3.pt"
    stale.parent.mkdir(parents=True)
    stale.touch(), other.touch()

    result = run_probe(
        "phone",
        model,
        *sets,
        labels.n_phones,
        options(learning_rate=3.0),
        logs_dir=tmp_path / "logs",
        checkpoint_dir=tmp_path / "best",
    )

    logs = load_json(tmp_path / "logs/4/phone/logs.json")
    assert logs["epoch"] == list(range(6))
    for key in ("locLoss_train", "locAcc_train", "locLoss_val", "locAcc_val"):
        assert [len(values) for values in logs[key]] == [1] * 6
    assert logs["best_val_acc"] == result.score
    assert logs["measured_on"] == result.measured_on
    assert (tmp_path / "logs/4/phone/confusion.png").stat().st_size > 1000

    best = stale.with_name(f"phone_classif_best-epoch{result.best_epoch}-cpc_epoch4.pt")
    assert sorted(stale.parent.iterdir()) == sorted([best, other])
    state = load_tensors(best)
    assert set(state) == {"CPCmodel", "classifNetCriterionCombined", "optimizer"}
    assert state["CPCmodel"].keys() == model.state_dict().keys()
    steps = (result.best_epoch + 1) * logs["iter"][0]
    assert all(s["step"] == steps for s in state["optimizer"]["state"].values())
    assert result.best_epoch < 5  # else the test would show nothing


def test_directories_only_for_what_ran(corpus, tmp_path):
    leftover = tmp_path / "logs" / "4" / "speaker" / f"{TEMPORARY_PREFIX}1.json"  # of a killed run
    leftover.parent.mkdir(parents=True)
    leftover.write_text("")
    run_probe("speaker", SpectralModel(), *make_sets(corpus), 3, FAST, logs_dir=tmp_path / "logs")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()] == [
        "logs/4/speaker/logs.json"
    ]


def test_logs_are_written_at_logging_steps(corpus, tmp_path, monkeypatch):
    lengths = []
    monkeypatch.setattr(eval.probe, "save_json", lambda _, logs: lengths.append(len(logs["epoch"])))
    sets = make_sets(corpus)
    run_probe("speaker", SpectralModel(), *sets, 3, options(logging_step=2), logs_dir=tmp_path)
    assert lengths == [3, 5, 6]


def test_options_of_a_training_run():
    args = build_parser().parse_args(
        "--linsep_n_epoch 3 --linsepBatchSizeGPU 5 --linsep_lr 0.1 --linsep_beta1 0.2 "
        "--linsep_beta2 0.3 --linsep_epsilon 0.4 --linsep_net_layers 6 --linsep_task_logging_step 7"
        " --CTCphones --random_seed 8".split()
    )
    expected = ProbeOptions(3, 5, 0.1, 0.2, 0.3, 0.4, 6, True, False, logging_step=7, seed=8)
    phone = ProbeOptions.of_training_run(args, "phone", 9)
    assert phone == ProbeOptions(**{**vars(expected), "cpc_epoch": 9})
    assert not ProbeOptions.of_training_run(args, "speaker", 9).ctc
    args.phone_get_encoded = True
    assert ProbeOptions.of_training_run(args, "phone", 9).get_encoded
    assert not ProbeOptions.of_training_run(args, "speaker", 9).get_encoded


@pytest.mark.parametrize("n_classes", [1, 5, 42, 300])
def test_confusion_picture(tmp_path, n_classes):
    counts = torch.randint(1, 9, (n_classes, n_classes))
    counts[n_classes // 2 :: 7] = 0
    counts[0] = 1
    draw_confusion(counts, tmp_path / "confusion.png", "phones")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_confusions_are_named_by_the_symbols_beside_the_labels(
    probe_command, tiny_corpus, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(plot_confusion, "save_figure", lambda figure, path: drawn.append(figure))
    labels = tmp_path / "converted_aligned_phones.txt"
    labels.write_text((tiny_corpus / "phones.txt").read_text())
    names = ["SIL", "AA", "B", "CH", "D"]
    (tmp_path / "phones.txt").write_text("".join(f"{i} {n}\n" for i, n in enumerate(names)))
    probe_command("--pathPhone", labels)
    axes = drawn[0].axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        assert [tick.get_text() for tick in axis.get_ticklabels()] == names


# ------------------------------------------------------------------------------------- center push


@pytest.mark.parametrize("case", golden_cases("centerpush"))
def test_center_push_golden(case):
    points, centers, degree = case["points"], case["centers"], case.config["deg"]
    assert_close(squared_distances(points, centers), case["dist"])
    assert_close(squared_distances(points, centers, normalize=True), case["dist_norm"])
    assert_close(push_to_nearest(points, centers, degree), case["pushed"])
    assert_close(push_to_nearest(points, centers, degree, True), case["pushed_norm"])
    assert_close(push_to_nearest(points, centers, degree, True, True), case["pushed_normpush"])


def test_centers_are_read_from_each_kind_of_file(tmp_path):
    centers = torch.randn(3, 4)
    np.save(tmp_path / "c.npy", centers.numpy())
    np.savetxt(tmp_path / "c.txt", centers.numpy())
    torch.save({"state_dict": {"Ck": centers[None]}}, tmp_path / "c.pt")
    for name in ("c.npy", "c.txt", "c.pt"):
        assert_close(read_centers(str(tmp_path / name)), centers)
    (tmp_path / "words.txt").write_text("no centers here\n")
    torch.save({"weights": centers}, tmp_path / "other.pt")
    for name in ("words.txt", "other.pt", "missing.npy", "missing.pt"):
        with pytest.raises(UserError, match=name):
            read_centers(str(tmp_path / name))


def test_null_space():
    matrix = torch.randn(3, 8)
    matrix[2] = matrix[0] + matrix[1]  # of rank 2
    basis = null_space(matrix)
    assert basis.shape == (8, 6)
    assert_close(basis.T @ basis, torch.eye(6))
    assert (matrix @ basis).abs().max() < 1e-5
    assert null_space(torch.randn(8, 8)).shape == (8, 0)


# ------------------------------------------------------------------------------------- the command


def tiny_cpc_model(**changes):
    torch.manual_seed(1)
    return build_model(tiny_arguments(**changes))


def tiny_arguments(**changes):
    args = build_parser().parse_args(
        f"--hiddenEncoder 16 --hiddenGar 16 --sizeWindow {WINDOW} --nLevelsGRU 2".split()
    )
    return Namespace(**{**vars(args), **changes})


def write_checkpoint(directory, **changes):
    args = tiny_arguments(**changes)
    state = {
        "gEncoder": tiny_cpc_model(**changes).state_dict(),
        "cpcCriterion": {},
        "optimizer": {},
        "best": None,
        "args": vars(args),
        "logs": {},
        "position": [1, 0, 0],
    }
    return str(save_checkpoint(directory, state, 0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture
def probe_command(tiny_corpus, checkpoint, tmp_path):
    """Runs the command, on the tiny corpus by default; returns (directory, logs)."""

    def run(*flags, load=(checkpoint,), out=tmp_path / "out"):
        data = (tiny_corpus / "audio", tiny_corpus / "train.txt", tiny_corpus / "test.txt")
        usual = "--n_epoch", "2", "--size_window", WINDOW, "--pathCheckpoint", out, "--lr", 0.01
        main([str(part) for part in (*data, *load, *usual, *flags)])
        return out, load_json(out / "checkpoint_logs.json")

    return run


@pytest.fixture
def phones(tiny_corpus):
    return "--pathPhone", tiny_corpus / "phones.txt"


def test_command_writes_what_the_original_does(probe_command):
    out, logs = probe_command()
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint_1.pt",
        "checkpoint_args.json",
        "checkpoint_logs.json",
    ]
    state = load_tensors(out / "checkpoint_1.pt")
    assert set(state) >= {"gEncoder", "cpcCriterion", "optimizer", "best"}
    assert set(state["cpcCriterion"]) == {
        "linearSpeakerClassifier.weight",
        "linearSpeakerClassifier.bias",
    }
    assert logs["epoch"] == [0, 1]
    assert load_json(out / "checkpoint_args.json")["dim_inter"] == 128


def test_checkpoints_of_the_command_can_be_loaded(probe_command, checkpoint, tmp_path):
    probe_command("--unfrozen", "--gru_level", "1", out=tmp_path / "one")
    probe_command(out=tmp_path / "two", load=(checkpoint, checkpoint))
    _, logs = probe_command(load=(tmp_path / "one" / "checkpoint_1.pt", tmp_path / "two"))
    assert logs["measured_on"]["dimensions"] == 3 * 16
    model = load_model(tmp_path / "one")[0]
    weights = load_tensors(tmp_path / "one" / "checkpoint_1.pt")["gEncoder"]
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_command_on_phones(probe_command, phones):
    out, logs = probe_command(*phones, "--save_step", "1", "--n_epoch", "3")
    assert {"confusion.png", "checkpoint_1.pt", "checkpoint_2.pt"} <= {
        p.name for p in out.iterdir()
    }
    assert not (out / "checkpoint_0.pt").exists()
    assert logs["measured_on"]["layer"] == "context"
    assert set(logs["class_accuracy"]) == set("01234")


def test_command_with_ctc(probe_command, phones):
    _, logs = probe_command(*phones, "--CTC", "--linsep_net_layers", "2")
    assert logs["best_val_per"] == min(logs["PER_val"])[0]


def test_command_concatenates_features(probe_command, checkpoint, tmp_path):
    other = write_checkpoint(tmp_path / "other", hiddenGar=24)
    _, logs = probe_command(load=(checkpoint, other))
    assert logs["measured_on"]["dimensions"] == 16 + 24
    _, logs = probe_command("--get_encoded", load=(checkpoint, other), out=tmp_path / "encoded")
    assert logs["measured_on"]["dimensions"] == 16 + 16


def test_command_trains_the_model_only_if_told(probe_command, checkpoint, tmp_path):
    before = load_tensors(checkpoint)["gEncoder"]
    for flags, same in (((), True), (("--unfrozen",), False), (("--no_pretraining",), False)):
        out, _ = probe_command(*flags, out=tmp_path / str(flags))
        after = load_tensors(out / "checkpoint_1.pt")["gEncoder"]
        assert torch.equal(before["gEncoder.conv0.weight"], after["gEncoder.conv0.weight"]) == same


def test_command_with_fewer_layers(probe_command):
    out, _ = probe_command("--gru_level", "1")
    state = load_tensors(out / "checkpoint_1.pt")["gEncoder"]
    assert "gAR.baseNet.weight_ih_l0" in state
    assert "gAR.baseNet.weight_ih_l1" not in state


def test_null_space_modes(probe_command, phones, tmp_path):
    factorized = "--mode", "speakers_factorized", "--dim_inter", "5"
    out, _ = probe_command(*factorized, out=tmp_path / "factorized")
    path = out / "checkpoint_1.pt"
    weight = load_tensors(path)["cpcCriterion"]["linearSpeakerClassifier.0.weight"]
    assert weight.shape == (5, 16)
    for flags in (("--mode", "speakers_nullspace"), ("--mode", "phonemes_nullspace", *phones)):
        where = {"out": tmp_path / flags[1]}
        out, logs = probe_command(*flags, "--path_speakers_factorized", path, **where)
        assert logs["measured_on"]["dimensions"] == 11
        model, *dims = load_model(out, nullspace=True)
        assert dims == [11, 11]
        assert (weight @ model.nullspace.weight.T).abs().max() < 1e-5


def test_a_null_space_of_several_models_side_by_side_is_loaded_again(
    probe_command, phones, checkpoint, tmp_path
):
    other = write_checkpoint(tmp_path / "other", arMode="GRU", nLevelsGRU=1)
    load = {"load": (checkpoint, other)}
    flags = "--mode", "speakers_factorized", "--dim_inter", "5"
    path = probe_command(*flags, **load, out=tmp_path / "factorized")[0] / "checkpoint_1.pt"
    flags = "--mode", "phonemes_nullspace", *phones, "--path_speakers_factorized", path
    out, logs = probe_command(*flags, **load)
    assert logs["measured_on"]["dimensions"] == 27
    model, *dims = load_model(out, nullspace=True)
    assert dims == [27, 27]
    assert [args.arMode for args in model.arguments] == ["LSTM", "GRU"]
    pair, waveform = load_model([checkpoint, other])[0], torch.randn(2, 1, WINDOW)
    basis = load_tensors(out / "checkpoint_1.pt")["gEncoder"]["nullspace.weight"]
    for features, projected in zip(pair(waveform), model(waveform), strict=True):
        assert_close(projected, features @ basis.T)
    beside, *dims = load_model([out, checkpoint], gru_level=1)
    assert dims == [43, 43]
    assert [args.nLevelsGRU for args in beside.arguments] == [1, 1, 1]
    probe_command(load=(out,), out=tmp_path / "probe of it")
    assert load_model(tmp_path / "probe of it")[1] == 27


def test_results_that_can_not_be_written_are_noticed_before_the_work(
    probe_command, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    with ends_refused(capsys, f"--pathCheckpoint .*{tmp_path / 'file'} is no directory"):
        probe_command(load=("no such checkpoint",), out=tmp_path / "file" / "out")


def test_command_pushes_to_centers(probe_command, tmp_path):
    np.save(tmp_path / "one.npy", np.ones((1, 16), dtype=np.float32))
    push = "--centerpushFile", tmp_path / "one.npy", "--centerpushDeg"
    _, logs = probe_command(*push, 1.0)
    assert logs["best_val_acc"] == pytest.approx(logs["baseline_val_acc"])  # all frames are alike
    np.save(tmp_path / "one.npy", np.ones((1, 15), dtype=np.float32))
    with pytest.raises(SystemExit):
        probe_command(*push, 1.0)


@pytest.mark.parametrize(
    ("load", "n_samples"),
    [
        (["first", "other/checkpoint_0.pt"], 2 * WINDOW),
        (["other", "first", "--size_window", str(WINDOW)], WINDOW),
        (["published"], 20480),
    ],
)
def test_windows_are_those_of_the_run_unless_told(
    tiny_corpus, tmp_path, monkeypatch, capsys, load, n_samples
):
    monkeypatch.chdir(tmp_path)
    for name, size in (("first", 2 * WINDOW), ("other", 3 * WINDOW), ("published", 160)):
        path = write_checkpoint(name, sizeWindow=size)
    state = load_tensors(path)
    del state["args"]["sizeWindow"]
    save_tensors(path, state)
    data = (tiny_corpus / "audio", tiny_corpus / "train.txt", tiny_corpus / "test.txt")
    main([*map(str, data), *load, "--n_epoch", "1", "--pathCheckpoint", "out"])
    probing, *_, last = capsys.readouterr().out.splitlines()
    assert probing.startswith(f"probing {tmp_path / load[0] / 'checkpoint_0.pt'}")
    assert probing.endswith(f", in windows of {n_samples} samples")
    assert last == "results: out"
    assert load_json("out/checkpoint_args.json")["size_window"] == n_samples


def test_command_never_overwrites_a_training_run(probe_command, tmp_path, capsys):
    run = tmp_path / "run"
    write_checkpoint(run)
    files = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(SystemExit) as exit_:
        probe_command(out=run)
    assert exit_.value.code == 2
    assert "training run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.iterdir()} == files


def test_command_replaces_an_earlier_probe(probe_command):
    probe_command("--n_epoch", "3")
    out, _ = probe_command("--n_epoch", "2")
    assert [path.name for path in out.glob("*.pt")] == ["checkpoint_1.pt"]


def test_command_never_overwrites_another_probe(probe_command, phones, tmp_path, capsys):
    out, _ = probe_command(*phones)
    files = {path: path.read_bytes() for path in out.iterdir()}
    other = write_checkpoint(tmp_path / "other")
    for words, load, said in (
        ((), {}, r"another pathPhone \(.*phones\.txt\): name another directory"),
        (phones, {"load": (other,)}, r"another load \("),
        ((*phones, "--no_pretraining"), {}, r"another no_pretraining \(False\)"),
    ):
        with ends_refused(capsys, said):
            probe_command(*words, **load)
    assert {path: path.read_bytes() for path in out.iterdir()} == files


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model wav2vec", "fairseq"),
        ("--path_fairseq X", "fairseq"),
        ("--CTC", "--CTC needs --pathPhone"),
        ("--CTC --pathPhone X --get_encoded", "--get_encoded"),
        ("--mode speakers --pathPhone X", "leave one out"),
        ("--mode phonemes_nullspace --path_speakers_factorized X", "needs --pathPhone"),
        ("--mode speakers_nullspace", "needs --path_speakers_factorized"),
        ("--path_speakers_factorized X", "_nullspace"),
        ("--mode speakers_factorized --linsep_net_layers 2", "two layers"),
        ("--centerpushFile X", "--centerpushDeg"),
        ("--centerpushDeg 0.5", "--centerpushFile"),
        ("--size_window 100", "multiple of 160"),
        ("--n_epoch 0", "--n_epoch"),
        ("--batchSizeGPU 0", "--batchSizeGPU"),
        ("--beta1 1", "--beta1"),
        ("--lr 0", "--lr"),
        ("--nGPU 0", "--nGPU"),
        ("--nGPU 1000", "--nGPU"),
    ],
)
def test_command_refuses_what_cannot_work(flags, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(["audio", "train.txt", "test.txt", "run.pt", *flags.split()])


@pytest.mark.parametrize("missing", ["empty list", "no such names", "labels of other files"])
def test_command_without_data(checkpoint, tiny_corpus, tmp_path, capsys, missing):
    names = {"empty list": "", "no such names": "a\nb\n", "labels of other files": None}[missing]
    (tmp_path / "list.txt").write_text(names or "")
    (tmp_path / "phones.txt").write_text("somebody 1 2 3\n")
    flags = ["--pathPhone", tmp_path / "phones.txt"] if names is None else []
    data = tiny_corpus / "audio", tiny_corpus / "train.txt"
    validation = tiny_corpus / "test.txt" if names is None else tmp_path / "list.txt"
    with pytest.raises(SystemExit) as exit_:
        main([str(part) for part in (*data, validation, checkpoint, *flags)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ("phones.txt" if names is None else "list.txt") in error


def test_command_runs_from_anywhere(tmp_path):
    script = ROOT / "eval" / "linear_separability.py"
    done = subprocess.run(
        [sys.executable, script, "audio", "a", "b", "c", "--CTC"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --CTC needs --pathPhone")
    assert done.stderr.count("\n") == 1


def save_model(directory, *words, model=None, criterion=None, **flags):
    """A checkpoint of a small model; returns its path."""
    args = build_parser().parse_args(["--hiddenEncoder", "8", "--hiddenGar", "8", *words])
    state = {
        "gEncoder": (model or build_model(args)).state_dict(),
        "cpcCriterion": criterion.state_dict() if criterion else {},
        "optimizer": {},
        "best": None,
        "args": {**vars(args), **flags},
        "logs": {},
        "position": [1, 0, 0],
    }
    return save_checkpoint(directory, state, 0)


def status_of(main, *words):
    """Run a command in this process; its exit status."""
    try:
        return main([str(word) for word in words]) or 0
    except SystemExit as end:
        return end.code


# -------------------------------------------------------------------- build_zeroSpeech_features


@pytest.fixture
def audio(tmp_path):
    """Three files of noise, one of them in a folder."""
    rng = np.random.default_rng(0)
    for name, n_samples in (("a", 1600), ("b", 5000), ("more/c", 3300)):
        path = tmp_path / "audio" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.uniform(-0.5, 0.5, n_samples), 16000)
    return tmp_path / "audio"


@pytest.fixture
def model_file(tmp_path):
    return save_model(tmp_path / "run")


def build(*words):
    return status_of(build_zeroSpeech_features.main, *words)


def read_features(path):
    """(T, D), times (T,) or None: what a file of features holds."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            assert sorted(file.files) == ["features", "time", "totTime"]
            assert file["features"].dtype == file["totTime"].dtype == np.float32
            assert file["totTime"] == pytest.approx([0.01 * len(file["features"])])
            return torch.from_numpy(file["features"]), file["time"]
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path)), None
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True), None
    rows = torch.tensor([[float(word) for word in line.split(" ")] for line in path.open()])
    return rows[:, 1:], rows[:, 0]


@pytest.mark.parametrize("kind", ["npz", "npy", "fea", "pt"])
def test_features_of_a_folder_in_each_format(tmp_path, audio, model_file, capsys, kind):
    assert build(audio, tmp_path / "out", model_file, "--format", kind) == 0
    said = capsys.readouterr().out
    assert f"features of 3 files: {tmp_path}/out; their flags: {tmp_path}/out.json\n" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{n}.{kind}" for n in "abc"}
    model, *_ = load_model([model_file])
    for name in ("a", "b", "more/c"):
        features, times = read_features(tmp_path / "out" / f"{name[-1]}.{kind}")
        expected = build_feature(model, audio / f"{name}.wav")[0]
        assert_close(features, expected)
        if times is not None:
            assert_close(times, 0.005 + 0.01 * torch.arange(len(expected)))
    assert load_json(tmp_path / "out.json")["format"] == kind


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--getEncoded"], {"get_encoded": True}),
        (["--strict", "--maxSizeSeq", "1600"], {"strict": True, "max_size": 1600}),
        (["--seqNorm", "--maxSizeSeq", 1600], {"strict": True, "seq_norm": True, "max_size": 1600}),
    ],
)
def test_flags_of_the_features(tmp_path, audio, model_file, words, options):
    assert build(audio, tmp_path / "out", model_file, "--format", "pt", *words) == 0
    features = torch.load(tmp_path / "out" / "b.pt", weights_only=True)
    model, *_ = load_model([model_file])
    assert_close(features, build_feature(model, audio / "b.wav", **options)[0])


@pytest.mark.parametrize("one_hot", [False, True])
def test_phones_as_features(tmp_path, audio, one_hot):
    criterion = PhoneCriterion(8, 5)
    path = save_model(tmp_path / "run", criterion=criterion)
    words = ["--addCriterion"] + ["--oneHot"] * one_hot
    assert build(audio, tmp_path / "out", path, "--format", "pt", *words) == 0
    module = ModelPhoneCombined(load_model([path])[0], criterion, one_hot)
    features = torch.load(tmp_path / "out" / "b.pt", weights_only=True)
    assert torch.equal(features, build_feature(module, audio / "b.wav")[0])


def test_distances_to_clusters_as_features(tmp_path, audio, model_file):
    centers = torch.randn(3, 8)
    np.save(tmp_path / "centers.npy", centers.numpy())
    words = ["--format", "pt", "--clusters", tmp_path / "centers.npy"]
    assert build(audio, tmp_path / "out", model_file, *words) == 0
    context = build_feature(load_model([model_file])[0], audio / "b.wav")[0]
    expected = (context[:, None] - centers).square().sum(2)
    assert_close(torch.load(tmp_path / "out" / "b.pt", weights_only=True), expected)


def test_a_stopped_call_goes_on(tmp_path, audio, model_file, capsys):
    words = (audio, tmp_path / "out", model_file, "--format", "npy")
    assert build(*words) == 0
    before = (tmp_path / "out" / "b.npy").read_bytes()
    (tmp_path / "out" / "b.npy").unlink()
    (tmp_path / "out" / "a.npy").write_bytes(b"kept as it is")
    (tmp_path / "out" / ".writing-123.npy").write_bytes(b"left by a killed run")
    assert build(*words) == 0
    assert "2 of 3 files have their features already" in capsys.readouterr().out
    assert (tmp_path / "out" / "b.npy").read_bytes() == before
    assert (tmp_path / "out" / "a.npy").read_bytes() == b"kept as it is"
    assert not (tmp_path / "out" / ".writing-123.npy").exists()


def test_features_of_other_flags_are_not_mixed(tmp_path, audio, model_file, capsys):
    assert build(audio, tmp_path / "out", model_file) == 0
    assert build(audio, tmp_path / "out", model_file, "--getEncoded") == 2
    assert "made with another --getEncoded" in capsys.readouterr().err


def test_bad_files_are_named_and_the_others_done(tmp_path, audio, model_file, capsys):
    (audio / "b.wav").write_text("no audio")
    soundfile.write(audio / "d.wav", np.zeros(100), 16000)
    assert build(audio, tmp_path / "out", model_file) == 2
    message = capsys.readouterr().err
    assert "2 of 4 files have no features" in message
    assert "b.wav" in message
    assert "d.wav: 100 samples are too short" in message
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.fea", "c.fea"}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--format", "af"], "ArrayFire"),
        (["--dimReduction", "x"], "never published"),
        (["--centroidLimits", "0", "1"], "never published"),
        (["--train_mode"], "depend on chance"),
        (["--oneHot"], "--oneHot needs --addCriterion"),
        (["--addCriterion"], "holds no criterion"),
        (["--addCriterion", "--getEncoded"], "leave out --getEncoded"),
        (["--clusters", "none.npy"], "--clusters .*none.npy"),
        (["--maxSizeSeq", "159"], "--maxSizeSeq 159"),
        (["--extension", ".mp3"], "no file ends with '.mp3'"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, audio, model_file, capsys, words, reason):
    assert build(audio, tmp_path / "out", model_file, *words) == 2
    assert re.search(reason, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_wrong_places_are_refused(tmp_path, audio, model_file, capsys):
    np.save(tmp_path / "wide.npy", np.zeros((2, 9)))
    (tmp_path / "file").write_text("")
    soundfile.write(audio / "more" / "a.wav", np.zeros(1600), 16000)
    for words, reason in (
        ((tmp_path / "none", tmp_path / "out", model_file), "none: no such directory"),
        ((audio / "more", tmp_path / "out", tmp_path / "none.pt"), "none.pt: no such"),
        ((audio / "more", tmp_path / "file", model_file), "file: can't be written to"),
        ((audio, tmp_path / "out", model_file), "would both become a.fea"),
        (
            (audio / "more", tmp_path / "out", model_file, "--clusters", tmp_path / "wide.npy"),
            "9 dimensions for features of 8",
        ),
    ):
        assert build(*words) == 2
        assert reason in capsys.readouterr().err


# -------------------------------------------------------------------------- common_voices_eval

QUICK = "--file_extension .flac --batchSize 4 --n_process_loader 2 --device cpu".split()


@pytest.fixture(scope="module")
def speech(tiny_corpus, tmp_path_factory):
    """The tiny corpus with the phones of each utterance in `phones.txt`, a list, a model."""
    root = tmp_path_factory.mktemp("speech")
    (root / "audio").symlink_to(tiny_corpus / "audio")
    lines = []
    for line in (tiny_corpus / "phones.txt").open():
        name, *labels = line.split()
        runs = [label for i, label in enumerate(labels) if i == 0 or label != labels[i - 1]]
        lines.append(f"{name} {' '.join(runs)}\n")
    (root / "phones.txt").write_text("".join(lines))
    (root / "frames.txt").write_text((tiny_corpus / "phones.txt").read_text())
    (root / "test.txt").write_text((tiny_corpus / "test.txt").read_text())
    torch.manual_seed(5)
    words = ("--hiddenEncoder", "16", "--hiddenGar", "16", "--arMode", "no_ar")
    save_model(root / "run", *words)
    return root


def recognise(*words):
    return status_of(common_voices_eval.main, *words)


def learn(speech, out, *words, epochs=2):
    arguments = (speech / "audio", speech / "phones.txt", speech / "run")
    return recognise("train", *arguments, *QUICK, "--nEpochs", epochs, "-o", out, *words)


def losses(out):
    """Training and validation losses of each epoch."""
    text = (out / "logs_train.txt").read_text()
    pairs = re.findall(r"training loss (\S+)  validation loss (\S+)", text)
    return np.array(pairs, dtype=float).T


def test_frozen_model_stays_as_it_was_while_the_loss_falls(speech, tmp_path):
    out = tmp_path / "out"
    words = "--freeze --seqNorm --kernelSize 6 --lr 0.01".split()
    assert learn(speech, out, *words, epochs=15) == 0
    training, _ = losses(out)
    assert training[-1] < 0.6 * training[0]
    state = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    for key, value in load_model([speech / "run"])[0].state_dict().items():
        assert torch.equal(state["module." + key], value)


def test_phones_are_learned_and_measured(speech, tmp_path, capsys):
    out = tmp_path / "out"
    words = "--seqNorm --kernelSize 6 --lr 0.01".split()
    assert learn(speech, out, *words, "--pathVal", speech / "test.txt", epochs=25) == 0
    training, validation = losses(out)
    assert training[-1] < 0.2 * training[0]
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["bestLoss"] == pytest.approx(validation.min(), abs=1e-4)

    capsys.readouterr()
    assert recognise("per", out, "--batchSize", 2, "--name", "test") == 0
    printed = capsys.readouterr().out
    rate, deviation, number = re.search(
        r"phone error rate (\S+) %, standard deviation (\S+) % over (\d+) utt", printed
    ).groups()
    assert int(number) == 3
    assert float(rate) < 20
    assert json.loads((out / "args_validation_test.json").read_text())["pathVal"].endswith(
        "test.txt"
    )
    summary, *rows = (out / "logs_per_test.txt").read_text().splitlines()
    assert f"{rate} %" in summary
    rates = [float(re.search(r"  (\S+) %", row)[1]) for row in rows]
    assert np.mean(rates) == pytest.approx(float(rate), abs=0.1)
    assert np.std(rates, ddof=1) == pytest.approx(float(deviation), abs=0.1)


@pytest.mark.parametrize("words", [["--LSTM", "--dropout"], ["--loss_reduction", "sum"]])
def test_model_is_fine_tuned(speech, tmp_path, words):
    out = tmp_path / "out"
    assert learn(speech, out, "--lr", "0.005", *words, epochs=3) == 0
    training, _ = losses(out)
    assert training[-1] < training[0]
    before = load_model([speech / "run"])[0].state_dict()
    after = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    assert not torch.equal(after["module.gEncoder.conv0.weight"], before["gEncoder.conv0.weight"])
    assert recognise("per", out, "--pathVal", speech / "test.txt") == 0


def test_training_is_repeatable_and_random_weights_are_others(speech, tmp_path):
    runs = {"a": (), "b": (), "c": ("--no_pretraining",), "d": ("--random_seed", "1")}
    found = {}
    for name, words in runs.items():
        assert learn(speech, tmp_path / name, "--freeze", *words, epochs=1) == 0
        found[name] = tuple(losses(tmp_path / name).ravel())
    assert found["a"] == found["b"]
    assert len(set(found.values())) == 3


def test_checkpoints_without_a_prefix_can_be_measured(speech, tmp_path, capsys):
    out = tmp_path / "out"
    assert learn(speech, out, epochs=1) == 0
    assert recognise("per", out) == 0
    expected = capsys.readouterr().out.splitlines()[-1]
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    for part in ("model", "classifier"):
        state[part] = {key.removeprefix("module."): value for key, value in state[part].items()}
    torch.save(state, out / "checkpoint.pt")
    assert recognise("per", out) == 0
    assert capsys.readouterr().out.splitlines()[-1] == expected


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--kernelSize", "0"], "--kernelSize 0: must be at least 1"),
        (["--lr", "nan"], "--lr nan"),
        (["--beta1", "1"], "--beta1 1.0"),
        (["--in_dim", "40"], "--in_dim 40"),
        (["--pathVal", "none.txt"], "none.txt"),
        (["--kernelSize", "100"], "has more phones than the classifier has outputs"),
        (["--kernelSize", "1000"], "9 are shorter than 160000 samples|shorter than 160000"),
        (["--file_extension", ".mp3"], "no file ends with '.mp3'"),
        (["--lr", "1e30"], "isn't a finite number; lower --lr"),
    ],
)
def test_training_that_cannot_work_is_refused(speech, tmp_path, capsys, words, reason):
    assert learn(speech, tmp_path / "out", *words) == 2
    assert re.search(reason, capsys.readouterr().err)


def test_labels_of_frames_are_not_taken_for_phones(speech, tmp_path, capsys):
    arguments = ("train", speech / "audio", speech / "frames.txt", speech / "run")
    assert recognise(*arguments, *QUICK, "-o", tmp_path) == 2
    assert "once for each time it is said, not for each frame" in capsys.readouterr().err


def test_measuring_needs_something_trained(speech, tmp_path, capsys):
    assert recognise("per", tmp_path) == 2
    error = capsys.readouterr().err
    assert "nothing was trained there (no args_training.json); `train` comes first" in error
    (tmp_path / "args_training.json").write_text("{}")
    assert recognise("per", tmp_path) == 2
    assert "isn't what `train` wrote" in capsys.readouterr().err
    assert recognise() == 2
    assert "command" in capsys.readouterr().err


def test_utterances_without_phones_or_too_short_are_left_out(speech, tmp_path, capsys):
    (tmp_path / "audio").mkdir()
    for file in (speech / "audio").rglob("*.flac"):
        os.symlink(file, tmp_path / "audio" / file.name)
    soundfile.write(tmp_path / "audio" / "short.flac", np.zeros(1000), 16000)
    soundfile.write(tmp_path / "audio" / "unlabelled.flac", np.zeros(20000), 16000)
    phones = (speech / "phones.txt").read_text() + "short 1 2\n"
    (tmp_path / "phones.txt").write_text(phones)
    arguments = (tmp_path / "audio", tmp_path / "phones.txt", speech / "run")
    words = ("--pathVal", speech / "test.txt", "-o", tmp_path / "out", "--nEpochs", 1)
    assert recognise("train", *arguments, *words, *QUICK) == 0
    printed = capsys.readouterr().out
    assert "training set: 6 utterances" in printed
    assert "1 have no phones" in printed
    assert "1 are shorter than 1280 samples" in printed


def test_files_that_turn_out_to_be_broken_are_named_and_left_out(speech, tmp_path, capsys):
    (tmp_path / "audio").mkdir()
    for file in (speech / "audio").rglob("*.flac"):
        os.symlink(file, tmp_path / "audio" / file.name)
    broken = sorted((tmp_path / "audio").iterdir())[0]
    content = broken.read_bytes()
    broken.unlink()
    broken.write_bytes(content[: len(content) // 2])  # its header still says how long it was
    arguments = (tmp_path / "audio", speech / "phones.txt", speech / "run")
    words = ("--pathVal", speech / "test.txt", "-o", tmp_path / "out", "--nEpochs", 2)
    assert recognise("train", *arguments, *words, *QUICK) == 0
    printed = capsys.readouterr().out
    assert printed.count(broken.name) == 1
    assert "training set: skipped 1" in printed
    assert recognise("train", *arguments, *words, *QUICK, "--max_bad_files", 0) == 2
    assert broken.name in capsys.readouterr().err


# --------------------------------------------------------------------------- its building blocks


def test_recogniser_sees_nothing_of_the_padding():
    recogniser = CTCPhoneRecognizer(6, 4, 5, lstm=True, seq_norm=True).eval()
    features, n_frames = torch.randn(3, 40, 6), torch.tensor([40, 23, 5])
    logits = recogniser(features, n_frames)
    assert logits.shape == (3, recogniser.n_outputs(torch.tensor(40)), 5)
    for row, n in enumerate(n_frames.tolist()):
        alone = recogniser(features[row : row + 1, :n], torch.tensor([n]))
        assert_close(logits[row, : alone.size(1)], alone[0])
        assert alone.size(1) == recogniser.n_outputs(torch.tensor(n))


def test_recogniser_has_the_originals_parameters():
    names = set(CTCPhoneRecognizer(6, 4).state_dict())
    assert names == {
        *(f"conv1.{kind}_{where}_l0" for kind in ("weight", "bias") for where in ("ih", "hh")),
        "PhoneCriterionClassifier.weight",
        "PhoneCriterionClassifier.bias",
    }
    assert CTCPhoneRecognizer(6, 4).PhoneCriterionClassifier.weight.shape == (5, 6, 8)
    assert CTCPhoneRecognizer(6, 4).PhoneCriterionClassifier.stride == (4,)


def test_dropout_acts_in_training_alone():
    recogniser = CTCPhoneRecognizer(6, 4, dropout=True)
    features, n_frames = torch.randn(1, 16, 6), torch.tensor([16])
    one, other = (recogniser(features, n_frames) for _ in range(2))
    assert not torch.equal(one, other)
    recogniser.eval()
    one, other = (recogniser(features, n_frames) for _ in range(2))
    assert torch.equal(one, other)


def test_normalisation_over_the_frames_that_count():
    features, n_frames = torch.randn(2, 9, 3), [9, 4]
    normalised = normalize_over_time(features, torch.tensor(n_frames))
    for row, n in enumerate(n_frames):
        valid = features[row, :n]
        expected = (valid - valid.mean(0)) / (valid.var(0) + 1e-8).sqrt()
        assert_close(normalised[row, :n], expected)
        assert not normalised[row, n:].any()


@pytest.mark.parametrize("seed", [None, 1])
def test_batches_hold_every_item_once_and_little_padding(seed):
    lengths = torch.randint(10, 1000, (103,))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batches = cut_in_batches(lengths, 8, generator)
    assert sorted(torch.cat(batches).tolist()) == list(range(103))
    assert [len(batch) for batch in batches].count(8) == 12
    padded = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    assert padded < 1.25 * lengths.sum()
    if generator:
        others = cut_in_batches(lengths, 8, generator)
        assert not all(map(torch.equal, batches, others))


@pytest.mark.parametrize("n_samples", [800, 1600, 1601, 4100])
def test_encoding_cuts_what_is_too_long_for_a_transformer(n_samples):
    words = "--hiddenEncoder 8 --hiddenGar 8 --arMode transformer --sizeWindow 1600".split()
    model = build_model(build_parser().parse_args(words)).eval()
    waveform = torch.randn(2, 1, n_samples)
    context = encode(model, waveform)
    assert context.shape == (2, n_samples // 160, 8)
    for begin in range(0, n_samples, 1600):
        stretch = waveform[:, :, begin : begin + 1600]
        if stretch.size(2) == 1600:
            frames = slice(begin // 160, begin // 160 + 10)
            assert_close(context[:, frames], model(stretch)[0])


def test_encoding_begins_every_utterance_in_the_zero_state():
    words = "--hiddenEncoder 8 --hiddenGar 8 --samplingType sequential".split()
    model = build_model(build_parser().parse_args(words))
    waveform = torch.randn(2, 1, 1600)
    assert torch.equal(encode(model, waveform), encode(model, waveform))


def test_stored_features_are_those_computed_anew(speech):
    args = common_voices_eval.parse_arguments(
        ["train", *map(str, (speech / "audio", speech / "phones.txt", speech / "run")), *QUICK]
    )
    corpus, labels = common_voices_eval.list_sequences(args)
    model, *_ = load_model([speech / "run"])
    recogniser = CTCPhoneRecognizer(16, labels.n_phones)
    utterances = common_voices_eval.build_set(
        args, corpus, list(corpus.sequences), labels, recogniser, model.eval(), "training set"
    )
    fresh = FreshFeatures(utterances, model, torch.device("cpu"))
    stored = StoredFeatures(fresh, 2, torch.device("cpu"))

    def by_path(source, batch_size):
        return {
            utterance.path: (
                batch.values[row, : batch.n_frames[row]],
                batch.phones[row, :n].tolist(),
            )
            for batch in source.batches(batch_size, torch.Generator().manual_seed(3))
            for row, (utterance, n) in enumerate(
                zip(batch.utterances, batch.n_phones.tolist(), strict=True)
            )
        }

    one, other = by_path(fresh, 4), by_path(stored, 3)
    assert one.keys() == other.keys()
    assert len(one) == 9
    for path, (features, phones) in one.items():
        assert phones == other[path][1]
        assert_close(other[path][0][:-4], features[:-4], 1e-4)  # the last frames see the padding


@pytest.mark.parametrize("script", ["build_zeroSpeech_features", "common_voices_eval"])
def test_commands_run_from_anywhere(tmp_path, script):
    command = [sys.executable, str(ROOT / "eval" / f"{script}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: {script}.py" in done.stdout


METRICS = {"cosine": "cosine", "euclidian": "euclidean"}  # the original's names -> ours


# ---------------------------------------------------------------------------- slow references


def slow_dtw(table):
    """DTW of one table, cell by cell, with the path traced back."""
    n, m = table.shape
    cost = np.zeros((n, m), dtype=np.float32)  # as precise as theirs, so that ties are the same
    for i, j in itertools.product(range(n), range(m)):
        steps = [(i - 1, j - 1), (i, j - 1), (i - 1, j)]
        before = [cost[step] for step in steps if min(step) >= 0]
        cost[i, j] = table[i, j] + min(before, default=0.0)
    i, j, length = n - 1, m - 1, 1
    while i or j:
        steps = [(i - 1, j - 1), (i, j - 1), (i - 1, j)]  # min takes the first of equal ones
        i, j = min((s for s in steps if min(s) >= 0), key=lambda step: cost[step])
        length += 1
    return cost[-1, -1] / np.float32(length)


def slow_errors(items, frames, cells_of, distance):
    """(phone of A, phone of B, speaker of A) -> errors of its cells, triplet by triplet."""
    pieces = [frames.frames[s : s + n] for s, n in zip(frames.starts, frames.sizes, strict=True)]
    memory = {}

    def between(x, y):
        if (x, y) not in memory:
            memory[x, y] = slow_dtw(distance(pieces[x], pieces[y]).numpy())
        return memory[x, y]

    errors = {}
    for (phone_a, phone_b, speaker), a, b, x in cells_of(items):
        wins = [
            (between(k, i) < between(k, j)) + 0.5 * (between(k, i) == between(k, j))
            for k, i, j in itertools.product(x, a, b)
            if k != i
        ]
        errors.setdefault((phone_a, phone_b, speaker), []).append(1 - np.mean(wins))
    return errors


def slow_score(errors):
    by_pair = {}
    for (phone_a, phone_b, _), values in errors.items():
        by_pair.setdefault((phone_a, phone_b), []).append(np.mean(values))
    return np.mean([np.mean(values) for values in by_pair.values()])


def slow_groups(items):
    groups = {}
    for i in range(len(items)):
        key = items.context[i].item(), items.speaker[i].item(), items.phone[i].item()
        groups.setdefault(key, []).append(i)
    return groups


def slow_within(items):
    groups = slow_groups(items)
    for (c, s, p), a in groups.items():
        for (c2, s2, q), b in groups.items():
            if (c, s) == (c2, s2) and p != q and len(a) > 1:
                yield (p, q, s), a, b, a


def slow_across(items):
    groups = slow_groups(items)
    for (c, s, p), a in groups.items():
        for (c2, s2, q), b in groups.items():
            for (c3, s3, r), x in groups.items():
                if c == c2 == c3 and s == s2 != s3 and p == r != q:
                    yield (p, q, s), a, b, x


# ----------------------------------------------------------------------------------- material


def random_task(n_items=60, phones=3, contexts=2, speakers=3, seed=0, dim=5, levels=None):
    """Items and their frames, which with `levels` are among so many: then there are ties."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(0, n, (n_items,), generator=generator)

    zeros = torch.zeros(n_items, dtype=torch.float64)
    items = Items(("f",) * n_items, zeros, zeros, draw(phones), draw(contexts), draw(speakers))
    sizes = draw(9) + 1
    frames = torch.randn(int(sizes.sum()), dim, generator=generator)
    if levels:
        frames = torch.eye(dim)[torch.randint(0, levels, (len(frames),), generator=generator)]
    return items, Frames(normalize_with_singularity(frames), sizes.cumsum(0) - sizes, sizes)


def frames_of(*batches):
    """`Frames` of padded batches `(values (N, T, D), sizes (N,))`."""
    pieces = [v[:n] for values, sizes in batches for v, n in zip(values, sizes, strict=True)]
    sizes = torch.tensor([len(piece) for piece in pieces])
    return Frames(torch.cat(pieces), sizes.cumsum(0) - sizes, sizes)


def groups_of(*sizes):
    """Groups of that many items each, in order; labels don't matter."""
    sizes = torch.tensor(sizes)
    none = torch.zeros_like(sizes)
    starts = sizes.cumsum(0) - sizes
    return abx_groups.Groups(torch.arange(int(sizes.sum())), starts, sizes, none, none, none)


# -------------------------------------------------------------------------------- golden values


@pytest.mark.parametrize("case", golden_cases("ABX"))
def test_golden_distances(case):
    a, b = (normalize_with_singularity(case[name]) for name in "ab")
    assert_close(a, case["a_norm"], 1e-6)
    null = case["zero_in"].norm(dim=2) == 0
    zero = normalize_with_singularity(case["zero_in"])
    assert_close(zero[null], case["zero_norm"][null], 1e-6)
    assert_close(zero[~null], case["zero_norm"][~null], 1e-6)
    for distance, x, y, name in (
        (cosine_distance, a, b, "cosdist"),
        (euclidean_distance, case["a"], case["b"], "eucdist"),
    ):
        found = distance(x[:, None].expand(-1, len(y), -1, -1), y.expand(len(x), -1, -1, -1))
        assert_close(found, case[name], 1e-6, name)


@pytest.mark.parametrize("case", golden_cases("ABX"))
def test_golden_groups(case):
    n_a, n_b = len(case["a"]), len(case["b"])
    frames = frames_of((case["a"], case["size_a"]), (case["b"], case["size_b"])).normalized()
    first, sizes = torch.tensor([0, 0]), torch.tensor([n_a, n_a])
    second, columns = torch.tensor([n_a, 0]), torch.tensor([n_b, n_a])
    blocks = compare_groups(frames, first, sizes, second, columns, "cosine")
    a_b, a_a = blocks.distances.split([n_a * n_b, n_a * n_a])
    assert_close(a_b.view(n_a, n_b), case["dtw"], 1e-6)
    a_a = a_a.view(n_a, n_a)
    assert torch.isinf(a_a.diagonal()).all()
    assert_close(a_a.fill_diagonal_(0), case["dtw_sym"], 1e-6)
    theta = 1 - cell_errors(groups_of(n_a, n_b), torch.tensor([[0, 1, 0]]), frames, "cosine")
    assert abs(theta.item() - case["theta"]) < 1e-6


@pytest.mark.parametrize("case", golden_cases("ABX"))
def test_golden_theta_of_another_group(case):
    x = (case["a"][:2], case["size_a"][:2])
    frames = frames_of((case["a"], case["size_a"]), (case["b"], case["size_b"]), x).normalized()
    groups = groups_of(len(case["a"]), len(case["b"]), 2)
    theta = 1 - cell_errors(groups, torch.tensor([[0, 1, 2]]), frames, "cosine")
    # X holds two of the items of A here, at a distance of rounding errors from themselves.
    assert abs(theta.item() - case["theta_asym"]) < 1e-6


@pytest.mark.parametrize("case", golden_cases("ABX"))
def test_golden_scores(case, tmp_path):
    config, features = case.config, tmp_path / "features"
    for name in case.arrays:
        if name.startswith("feat_"):
            save_tensors(features / f"{name[5:]}.pt", case[name])
    flags = {
        "--feature_size": 1 / config["step_feature"],
        "--distance_mode": config["distance"],
        "--max_x_across": config["max_x_across"],
        "--max_size_group": config["max_size_group"],
        "--out": tmp_path / "out",
    }
    item_file = case.path.parent / config["item_file"]
    flags = [str(part) for pair in flags.items() for part in pair]
    ABX.main(["from_pre_computed", str(features), str(item_file), *flags])
    scores = load_json(tmp_path / "out" / "ABX_scores.json")
    for mode in ("within", "across"):
        assert abs(scores[mode] - case[mode].item()) < 1e-6
    assert scores["measured_on"]["metric"] == METRICS[config["distance"]]


# ------------------------------------------------------------------------------------ distances


@pytest.mark.parametrize("ties", [False, True])
def test_dtw_is_that_of_a_loop_over_cells(ties):
    draw = random.Random(0)
    sizes = [(draw.randint(1, 7), draw.randint(1, 9)) for _ in range(200)] + [(1, 1), (7, 1)]
    tables = torch.rand(len(sizes), 7, 9)
    if ties:
        tables = (4 * tables).floor()  # whole numbers: many paths cost the same
    n, m = torch.tensor(sizes).unbind(1)
    expected = [slow_dtw(t[:i, :j].numpy()) for t, (i, j) in zip(tables, sizes, strict=True)]
    assert_close(dtw(tables, n, m), torch.tensor(np.array(expected)), 1e-6)


def test_null_frames_are_far_from_all_but_each_other():
    frames = normalize_with_singularity(
        torch.tensor([[0.0, 0, 0], [0, 0, 0], [1, 2, 3], [1, 1, 1]])
    )
    distance = cosine_distance(frames, frames)
    assert distance[0, 1] == 0
    assert distance[0, 2] == distance[0, 3] == 1
    assert 0 < distance[2, 3] < 0.2


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("mode", ["within", "across"])
@pytest.mark.parametrize("levels", [None, 3])
def test_score_is_that_of_a_loop_over_triplets(mode, distance, levels):
    items, frames = random_task(levels=levels)
    groups = group_items(items, 1000, seed=0)
    cells = within_cells(groups) if mode == "within" else across_cells(groups, 1000, seed=0)
    score = mean_error(groups, cells, cell_errors(groups, cells, frames, distance))
    measure = {"cosine": cosine_distance, "euclidean": euclidean_distance}[distance]
    slow_cells = {"within": slow_within, "across": slow_across}[mode]
    slow = slow_errors(items, frames, slow_cells, measure)
    triplets = [sum(k != i for k in x for i in a) * len(b) for _, a, b, x in slow_cells(items)]
    assert sorted(count_triplets(groups, cells).tolist()) == sorted(triplets)
    assert len(cells) == sum(map(len, slow.values())) > 20
    assert score == pytest.approx(slow_score(slow), abs=1e-9)


def test_score_is_the_same_in_small_rounds(monkeypatch):
    items, frames = random_task()
    groups = group_items(items, 1000, seed=0)
    cells = across_cells(groups, 1000, seed=0)
    expected = cell_errors(groups, cells, frames, "cosine")
    monkeypatch.setattr(abx_distances, "TABLE_FLOATS", {"cpu": 1000})
    monkeypatch.setattr(abx_distances, "STEP_FLOATS", {"cpu": 100})
    monkeypatch.setattr(abx_groups, "ENTRIES_PER_ROUND", 10)
    assert torch.equal(cell_errors(groups, cells, frames, "cosine"), expected)


def test_features_that_tell_phones_apart_have_no_errors():
    items, frames = random_task(n_items=80)
    one_hot = torch.eye(3)[items.phone.repeat_interleave(frames.sizes)]
    perfect = Frames(normalize_with_singularity(one_hot), frames.starts, frames.sizes)
    groups = group_items(items, 1000, seed=0)
    for cells in (within_cells(groups), across_cells(groups, 5, seed=0)):
        assert mean_error(groups, cells, cell_errors(groups, cells, perfect, "cosine")) == 0
        chance = mean_error(groups, cells, cell_errors(groups, cells, frames, "cosine"))
        assert 0.35 < chance < 0.65


# ------------------------------------------------------------------------------ items and groups


def test_large_groups_are_sampled_by_the_seed():
    items, _ = random_task(n_items=400, phones=2, contexts=1, speakers=4)
    groups = group_items(items, 7, seed=1)
    assert groups.sizes.tolist() == [7] * 8
    for start, context, speaker, phone in zip(
        groups.starts, groups.context, groups.speaker, groups.phone, strict=True
    ):
        members = groups.members[start : start + 7]
        assert len(set(members.tolist())) == 7
        assert (items.context[members] == context).all()
        assert (items.speaker[members] == speaker).all()
        assert (items.phone[members] == phone).all()
    assert torch.equal(group_items(items, 7, seed=1).members, groups.members)
    assert not torch.equal(group_items(items, 7, seed=2).members, groups.members)


def test_speakers_of_x_are_sampled_by_the_seed():
    items, _ = random_task(n_items=400, phones=2, contexts=1, speakers=6)
    groups = group_items(items, 1000, seed=0)
    cells = across_cells(groups, 3, seed=0)
    pairs, counts = torch.unique(cells[:, :2], dim=0, return_counts=True)
    assert counts.tolist() == [3] * 12
    assert torch.equal(across_cells(groups, 3, seed=0), cells)
    drawn = {tuple(across_cells(groups, 3, seed)[:, 2].tolist()) for seed in range(20)}
    assert len(drawn) == 20


def test_frame_spans():
    onset, offset = torch.tensor([[0.0, 0.1], [0.104, 0.2], [0.106, 0.2], [0.5, 9.9]]).double().T
    first, end = frame_span(onset, offset, 60, 100.0)
    assert first.tolist() == [0, 10, 11, 50]  # frame 10 is at 0.105 s
    assert end.tolist() == [9, 19, 19, 60]
    assert frame_span(onset, offset, 60, 100.0, "centres")[1].tolist() == [10, 20, 20, 60]


def test_items_without_frames_are_left_out():
    time = torch.tensor([0.0, 0.2, 0.0, 5.0], dtype=torch.float64)
    ids = torch.arange(4)
    items = Items(("b", "a", "gone", "a"), time, time + 0.1, ids, ids, ids)
    features = {"a": torch.arange(60.0).view(30, 2), "b": torch.zeros(30, 2), "gone": None}
    kept, frames = cut_items(items, features.get, 100.0)
    assert kept.files == ("b", "a")
    assert kept.phone.tolist() == [0, 1]
    start, size = frames.starts[1], frames.sizes[1]
    assert torch.equal(frames.frames[start : start + size], features["a"][20:29])
    with pytest.raises(UserError, match="hold NaN"):
        cut_items(items, lambda name: torch.full((30, 2), math.nan), 100.0)
    with pytest.raises(UserError, match="of a have 2 dimensions, .* 3"):
        cut_items(items, {"b": torch.zeros(30, 3), "a": features["a"]}.get, 100.0)
    with pytest.raises(UserError, match="no item has a frame"):
        cut_items(items, lambda name: None, 100.0)


HEADER = "#file onset offset #phone prev-phone next-phone speaker\n"


def test_item_file(tmp_path):
    path = tmp_path / "a.item"
    path.write_text(HEADER + "f 0.1 0.2 b x y s\n\nf 0.3 0.4 a x z s\ng 0 1 b x y t\n")
    items = read_items(path)
    assert items.files == ("f", "f", "g")
    assert items.phone.tolist() == [0, 1, 0]
    assert items.context.tolist() == [0, 1, 0]
    assert items.speaker.tolist() == [0, 0, 1]
    assert items.onset.tolist() == [0.1, 0.3, 0]
    assert read_items(path, any_context=True).context.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("f 0.1 0.2 b x y", "line 3: not the seven columns"),
        ("f 0.1 later b x y s", "line 3: not the seven columns"),
        ("f 0.2 0.1 b x y s", "line 3: the item can't last from 0.2 to 0.1"),
        ("f 0.2 nan b x y s", "line 3: the item can't last"),
    ],
)
def test_broken_item_files_are_named(tmp_path, line, message):
    path = tmp_path / "a.item"
    path.write_text(f"{HEADER}f 0.1 0.2 b x y s\n{line}\n")
    with pytest.raises(UserError, match=f"a.item, {message}"):
        read_items(path)


# ---------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def corpus_items(tiny_corpus, tmp_path_factory):
    """An item file of the tiny corpus, whose phones are numbers; none of them is silence."""
    folder = tmp_path_factory.mktemp("items")
    (folder / "symbols.txt").write_text("".join(f"{i} p{i}\n" for i in range(5)))
    out = folder / "tiny.item"
    make_abx_item.main([str(tiny_corpus / "phones.txt"), str(folder / "symbols.txt"), str(out)])
    return out


@pytest.fixture(scope="module")
def abx_model(tmp_path_factory):
    """A small model with random weights, in its run's directory."""
    directory = tmp_path_factory.mktemp("run")
    args = build_parser().parse_args(["--hiddenEncoder", "16", "--hiddenGar", "12"])
    torch.manual_seed(3)
    model = build_model(args)
    state = {
        "gEncoder": model.state_dict(),
        "cpcCriterion": {},
        "optimizer": {},
        "best": None,
        "args": vars(args),
        "logs": {},
        "position": [1, 0, 0],
    }
    return save_checkpoint(directory, state, 0)


def test_item_file_from_labels(tmp_path, capsys):
    (tmp_path / "symbols.txt").write_text("0 SIL\n1 a\n2 b\n3 c\n")
    (tmp_path / "labels.txt").write_text("s7-1 0 0 1 1 1 2 2 3 1 0\nt8-1 2 1 1 3\n")
    arguments = [str(tmp_path / name) for name in ("labels.txt", "symbols.txt", "out.item")]
    make_abx_item.main(arguments)
    assert "symbols" not in capsys.readouterr().out
    assert (tmp_path / "out.item").read_text() == (
        HEADER + "s7-1 0.02 0.08 b a c s7\ns7-1 0.05 0.09 c b a s7\nt8-1 0.00 0.04 a b c t8\n"
    )
    make_abx_item.main([*arguments, "--extent", "phone"])
    assert "s7-1 0.05 0.07 b a c s7\n" in (tmp_path / "out.item").read_text()
    (tmp_path / "symbols.txt").write_text("0 SIL\n1 a\n2 b\n3 c\n7 d\n8 e\n")
    make_abx_item.main(arguments)
    assert "2 of 6 symbols of" in (said := capsys.readouterr().out)
    assert said.endswith("d, e\n")
    (tmp_path / "labels.txt").write_text("s7-1 0 9\n")
    with pytest.raises(SystemExit):
        make_abx_item.main(arguments)


def test_score_of_a_checkpoint(tiny_corpus, corpus_items, abx_model, tmp_path, capsys):
    audio = str(tiny_corpus / "audio")
    flags = ["--file_extension", ".flac", "--mode", "within", "--context", "any"]
    ABX.main(
        ["from_checkpoint", str(abx_model.parent), str(corpus_items), audio, *flags]
        + ["--get_encoded", "--seq_norm", "--strict"]
    )
    assert "ABX error within speakers: " in capsys.readouterr().out
    result = load_json(abx_model.parent / "ABX_scores.json")
    assert 0 <= result["within"] < 0.3  # the phones are tones: even a random encoder hears them
    assert "across" not in result
    measured_on = result["measured_on"]
    assert measured_on["features"] == str(abx_model)
    assert measured_on["item_file"] == str(corpus_items)
    assert measured_on["layer"] == "encoded"
    assert measured_on["chunks"] == {"max_size_seq": 64000, "strict": True, "seq_norm": True}
    assert measured_on["metric"] == "cosine"
    assert measured_on["slicing"].startswith("librilight: ")
    assert measured_on["context"] == "any: A, B and X may have different phones around them"
    assert load_json(abx_model.parent / "ABX_args.json")["get_encoded"] is True


def test_hidden_state_is_kept_within_a_file_only(tiny_corpus, corpus_items, abx_model):
    audio, flags = str(tiny_corpus / "audio"), ["--file_extension", ".flac"]
    paths = sorted((tiny_corpus / "audio").rglob("*.flac"))[:2]
    paths = {path.stem: str(path) for path in paths}
    first, second = paths

    def features(*flags):
        arguments = ["from_checkpoint", str(abx_model), str(corpus_items), audio, *flags]
        return ABX.features_of_checkpoint(ABX.parse_arguments(arguments), paths)

    in_chunks = features(*flags, "--max_size_seq", "8000")
    alone = in_chunks(second)
    in_chunks(first)
    assert torch.equal(in_chunks(second), alone)
    assert in_chunks("elsewhere") is None
    model, *_ = load_model(abx_model)
    with torch.no_grad():
        encoded = build_feature(model, paths[second], get_encoded=True, max_size=8000)
        expected, _ = model.gAR.baseNet(encoded)  # all frames in one go
    assert encoded.shape[1] > 100  # more than two chunks
    assert_close(alone, expected[0], 1e-5)


def write_pt(path, features):
    save_tensors(path, features[None])


def write_fea(path, features):
    np.savetxt(path, np.column_stack([np.arange(len(features)), features]))


WRITERS = {
    ".pt": write_pt,
    ".npy": np.save,
    ".npz": lambda path, features: np.savez(path, features=features),
    ".txt": np.savetxt,
    ".fea": write_fea,
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder with features in every format, and an item file: (folder, item file)."""
    folder = tmp_path_factory.mktemp("stored")
    generator = torch.Generator().manual_seed(0)
    draw, lines = random.Random(0), [HEADER]
    for file in range(4):
        features = torch.randn(100, 6, generator=generator)
        for extension, write in WRITERS.items():
            (folder / extension[1:]).mkdir(exist_ok=True)
            write(folder / extension[1:] / f"f{file}{extension}", features)
        for i in range(15):
            phone, context, speaker = draw.choice("ab"), draw.choice("xy"), f"s{file % 2}"
            lines.append(
                f"f{file} {i * 0.06:.2f} {i * 0.06 + 0.08:.2f} {phone} {context} z {speaker}\n"
            )
    (folder / "a.item").write_text("".join(lines))
    return folder, folder / "a.item"


def score(stored, extension, out, *flags):
    folder, item_file = stored
    ABX.main(
        ["from_pre_computed", str(folder / extension[1:]), str(item_file), "--out", str(out)]
        + ["--file_extension", extension, *flags]
    )
    return load_json(out / "ABX_scores.json")


def test_all_formats_of_features_have_the_same_score(stored, tmp_path):
    results = [score(stored, extension, tmp_path) for extension in WRITERS]
    assert {result["within"] for result in results} == {results[0]["within"]}
    assert 0.3 < results[0]["within"] < 0.7
    assert 0.3 < results[0]["across"] < 0.7


def test_flags_change_what_is_measured(stored, tmp_path):
    default = score(stored, ".pt", tmp_path)
    for flags in (
        ["--slicing", "centres"],
        ["--distance_mode", "euclidean"],
        ["--context", "any"],
        ["--feature_size", "0.02"],
        ["--max_size_group", "3"],
    ):
        result = score(stored, ".pt", tmp_path, *flags)
        assert result["within"] != default["within"], flags
        assert result["measured_on"] != default["measured_on"], flags
    sampled = [score(stored, ".pt", tmp_path, *flags, "--seed", s)["within"] for s in "112"]
    assert sampled[0] == sampled[1] != sampled[2]


def test_missing_files_are_counted(stored, tmp_path, capsys):
    folder, item_file = stored
    item_file = tmp_path / "more.item"
    item_file.write_text(stored[1].read_text() + "gone 0 1 a x z s0\n")
    result = score((folder, item_file), ".pt", tmp_path)
    assert f"{item_file}: 1 of 5 files aren't in" in capsys.readouterr().out
    assert result["measured_on"]["items"] == 61
    assert result["measured_on"]["items_with_frames"] == 60


def test_no_triplet_is_no_score(stored, tmp_path, capsys):
    item_file = tmp_path / "one.item"
    rows = "f0 0 1 a x z s0\nf1 0 1 a x z s0\nf0 0 1 b x z s0\n"
    item_file.write_text(HEADER + rows)
    result = score((stored[0], item_file), ".pt", tmp_path)
    assert result["within"] is not None
    assert result["across"] is None
    assert result["triplets"] == {"within": 2, "across": 0}
    said = capsys.readouterr().out
    assert "(2 triplets)" in said
    assert "ABX across speakers: no triplet" in said
    assert "3 of 3 items have features" in said


def test_items_without_any_triplet_are_refused(stored, tmp_path, capsys):
    item_file = tmp_path / "one.item"
    item_file.write_text(HEADER + "f0 0 1 a x z s0\nf0 0 1 b y z s0\n")
    for flags, said in (
        ([], "one.item: no triplet among its 2 items.*by two speakers.*--context any"),
        (["--mode", "within", "--context", "any"], "within speakers, it takes two examples"),
    ):
        with ends_refused(capsys, said):
            score((stored[0], item_file), ".pt", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--feature_size", "0"], "--feature_size"),
        (["--max_size_group", "1"], "--max_size_group"),
        (["--max_x_across", "0"], "--max_x_across"),
        (["--file_extension", ".wav"], "no file ends with '.wav'"),
        (["--distance_mode", "manhattan"], "--distance_mode"),
    ],
)
def test_wrong_flags_are_refused(stored, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        score(stored, ".pt", tmp_path, *flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_broken_features_are_named(tmp_path, capsys):
    (tmp_path / "a.item").write_text(HEADER + "f 0 1 a x z s0\n")
    for content, message in ((b"nonsense", "f.npy: can't be read"), (None, "of shape (3,)")):
        if content:
            (tmp_path / "f.npy").write_bytes(content)
        else:
            np.save(tmp_path / "f.npy", np.zeros(3))
        with pytest.raises(SystemExit):
            ABX.main(
                ["from_pre_computed", str(tmp_path), str(tmp_path / "a.item")]
                + ["--file_extension", ".npy"]
            )
        assert message in capsys.readouterr().err


def test_fastabx_agrees_or_is_said_to_be_missing(stored, tmp_path, capsys):
    flags = ["--max_size_group", "4"]
    if importlib.util.find_spec("fastabx") is None:
        with pytest.raises(SystemExit):
            score(stored, ".pt", tmp_path, "--fastabx", *flags)
        assert "the library isn't installed" in capsys.readouterr().err
        return
    for metric in ("cosine", "euclidean"):
        ours = score(stored, ".pt", tmp_path, "--distance_mode", metric, *flags)
        theirs = score(stored, ".pt", tmp_path, "--distance_mode", metric, "--fastabx", *flags)
        assert theirs["measured_on"]["library"].startswith("fastabx ")
        for mode in ("within", "across"):
            assert theirs[mode] == pytest.approx(ours[mode], abs=1e-6)


def test_command_runs_from_anywhere_and_as_a_module(stored, tmp_path):
    folder, item_file = stored
    arguments = ["from_pre_computed", str(folder / "pt"), str(item_file), "--out"]
    runs = [
        subprocess.Popen([sys.executable, *how, *arguments, str(tmp_path / out)], cwd=cwd)
        for how, cwd, out in (
            ([str(ROOT / "eval" / "ABX.py")], tmp_path, "a"),
            (["-m", "eval.ABX"], ROOT, "b"),
        )
    ]
    assert [run.wait() for run in runs] == [0, 0]
    results = [json.loads((tmp_path / out / "ABX_scores.json").read_text()) for out in "ab"]
    assert results[0] == results[1]
