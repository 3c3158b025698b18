"""Curves for TensorBoard, read back from the event files."""

import os
import shutil
import threading

import pytest

import train
from tests.test_train import SMALL, on, run, trained
from utils.files import load_json

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

STEPS = ["--logging_step", "2", "--negativeSamplingExt", "2"]


def curves(directory):
    """Tag -> [(step, value)] of the scalars, as TensorBoard shows them; and the images' tags."""
    everything = {"scalars": 0, "images": 0, "tensors": 0}
    events = event_accumulator.EventAccumulator(str(directory), everything).Reload()
    tags = events.Tags()
    assert [tensor.step for tensor in events.Tensors("flags/text_summary")][:1] == [0]
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    return scalars, tags["images"]


def without_speed(scalars):
    return {tag: points for tag, points in scalars.items() if not tag.startswith("speed")}


def mean(row):
    return sum(row) / len(row)


def test_curves_hold_the_logs_and_pictures_of_a_run(tiny_corpus, tmp_path):
    words = ["--tensorboard", tmp_path / "curves", *STEPS]
    words += ["--supervised_classif_metric", "--path_phone_data", tiny_corpus / "phones.txt",
              "--linsep_n_epoch", "1", "--linsep_classif_each_epochs", "1", "--linsep_logs_dir",
              tmp_path / "probes", "--unit_quality_each_epochs", "1", "--nClusters", "2",
              "--pathCaptureDS", tiny_corpus / "test.txt", "--captureConvRepr",
              "--pathCaptureSave", tmp_path / "captures", "--captureSetStats",
              f"reprDiff:cosine,conv_repr,1,{tmp_path / 'stats'}"]  # fmt: skip
    trained(tiny_corpus, tmp_path / "run", *words)
    logs = load_json(tmp_path / "run" / "checkpoint_logs.json")
    first, second = logs["iter"][0], sum(logs["iter"])
    scalars, images = curves(tmp_path / "curves")
    for tag, key in (("loss/validation", "locLoss_val"), ("accuracy/validation", "locAcc_val")):
        rows = [logs["before_training"][key], *logs[key]]
        means = zip((0, first, second), map(mean, rows), strict=True)
        assert scalars[tag] == [(step, pytest.approx(value)) for step, value in means]
    for tag, value in {
        "optimisation/gradient_norm": logs["gradNorm_train"][1],
        "optimisation/learning_rate": logs["learningRate"][1],
        "loss/training": mean(logs["locLoss_train"][1]),
        "loss_validation_by_prediction_step/02": logs["locLoss_val"][1][1],
        "probes/phone_best_val_acc": logs["phone_best_val_acc"][1][0],
        "units/pnmi": logs["units_pnmi"][1],
        "epoch": 1,
    }.items():
        assert scalars[tag][-1] == (second, pytest.approx(value)), tag
    assert [step for step, _ in scalars["loss/training_running"]][:2] == [1, 3]
    assert any(tag.startswith("stats/reprDiff") for tag in scalars)
    assert {image.partition("/")[0] for image in images} == {"stats", "capture", "probes"}


def test_a_run_killed_inside_an_epoch_continues_its_curves(tiny_corpus, tmp_path, monkeypatch):
    trained(tiny_corpus, tmp_path / "whole", "--tensorboard", *STEPS, epochs=2)
    whole, _ = curves(tmp_path / "whole" / "tensorboard")
    step, calls = train.train_step, []

    def killed(*arguments):
        calls.append(step(*arguments))
        if len(calls) == n_steps:
            raise KeyboardInterrupt  # nothing is saved, as if it were killed

    n_steps = int(whole["loss/validation"][1][0]) + 7
    monkeypatch.setattr(train, "train_step", killed)
    words = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path / "parts"]
    assert run(*words, "--tensorboard", *STEPS, "--nEpoch", 2, "--resume_every", 4) == 130
    shown, _ = curves(tmp_path / "parts" / "tensorboard")
    assert max(step for step, _ in shown["loss/training_running"]) == n_steps - 2
    assert run("--pathCheckpoint", tmp_path / "parts") == 0
    parts, _ = curves(tmp_path / "parts" / "tensorboard")
    assert len(os.listdir(tmp_path / "parts" / "tensorboard")) == 2
    assert without_speed(parts) == without_speed(whole)
    assert run("--pathCheckpoint", tmp_path / "parts", "--no-tensorboard", "--nEpoch", 3) == 0
    assert len(os.listdir(tmp_path / "parts" / "tensorboard")) == 2


def test_a_writer_that_fails_warns_once(tiny_corpus, tmp_path, monkeypatch, capsys):
    validate = train.validate

    def validate_after_a_loss(state, *arguments):
        if state.position.epoch == 0 and state.epoch_means.batches:
            shutil.rmtree(tmp_path / "run" / "tensorboard")
        return validate(state, *arguments)

    monkeypatch.setattr(train, "validate", validate_after_a_loss)
    monkeypatch.setattr(threading, "excepthook", lambda error: pytest.fail(str(error)))
    trained(tiny_corpus, tmp_path / "run", "--tensorboard", *STEPS)
    assert capsys.readouterr().out.count("no more curves for TensorBoard") == 1
