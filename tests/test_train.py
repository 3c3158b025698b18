"""Tests of the program as a whole: training runs, from the command line to their files."""

import functools
import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import weakref
from argparse import Namespace
from pathlib import Path

import pytest
import soundfile
import torch

import train
from criterion import build_criterion
from criterion.networks import Networks
from dataset import Batch
from eval import linear_separability, starts
from eval.hooks import CaptureHook
from eval.starts import StartWatch
from model import CPCAR, CPCEncoder, CPCModelNullspace, build_model
from stats.stats_utils import STATS, usage
from tests.helpers import (
    GOLDEN,
    REAL_SPEECH,
    ROOT,
    assert_close,
    assert_equal_trees,
    ends_refused,
    needs_real_speech,
    write_tiny_corpus,
)
from utils.report import run_files
from utils.report.plots import draw_curves
from utils.run import state as run_state
from utils.run.checkpoint import save_checkpoint
from utils.run.command import EXIT_BROKEN_PIPE
from utils.run.flags import build_parser
from utils.run.lock import locked
from utils.run.pace import Pace
from utils.run.stopping import Stopped

SMALL = (
    "--hiddenEncoder 8 --hiddenGar 8 --rnnMode linear --negativeSamplingExt 4 --nPredicts 2 "
    "--sizeWindow 3200 --batchSizeGPU 4 --n_process_loader 2 --save_step 1 --random_seed 7"
).split()
EXAMPLE = (
    "--nPredicts 8 --CPCCTC --CPCCTCNumMatched 12 --CPCCTCSelfLoop --CPCCTCSkipBeg 1 "
    "--CPCCTCSkipEnd 2"
).split()


def on(corpus):
    return ["--pathDB", f"{corpus}/audio", "--pathTrain", f"{corpus}/train.txt", "--pathVal",
            f"{corpus}/test.txt"]  # fmt: skip


def run(*words):
    """Run train.py in this process; its exit status."""
    try:
        return train.main([str(word) for word in words]) or 0
    except SystemExit as end:
        return end.code


def trained(corpus, directory, *words, epochs=2):
    assert run(*on(corpus), *SMALL, "--pathCheckpoint", directory, "--nEpoch", epochs, *words) == 0
    return checkpoint(directory, epochs - 1)


def signal_in_step(step, monkeypatch, number=signal.SIGTERM):
    """Send this process a signal when that training step, counted from 1, begins."""
    train_step, steps = train.train_step, []

    def counted_step(*item):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        train_step(*item)

    monkeypatch.setattr(train, "train_step", counted_step)


def checkpoint(directory, epoch):
    return torch.load(Path(directory, f"checkpoint_{epoch}.pt"), weights_only=True)


def assert_same(one, other, without=("args",)):
    """Two checkpoints hold the same, bit for bit."""
    assert one.keys() == other.keys()
    for key in one.keys() - set(without):
        assert_equal_trees(one[key], other[key], key)


@pytest.mark.parametrize(
    ("words", "start", "training", "validation"),
    [
        (
            ["--rnnMode", "transformer", "--samplingType", "uniform"],
            3.2546844,
            [3.1953975, 3.1608311],
            [3.1790835, 3.1505199],
        ),
        (
            [*EXAMPLE, "--schedulerRamp", "2"],
            11.2950938,
            [11.2841392, 11.2659700],
            [11.2822878, 11.2487184],
        ),
    ],
    ids=["cpc", "cpc-ctc"],
)
def test_the_curve_of_a_seed_stays_as_it_is(
    words, start, training, validation, tiny_corpus, tmp_path
):
    """Making training faster must not change it.

    At this learning rate the rounding of one processor or another stays below 1e-7 of the losses
    of two epochs (at 0.01 it grows to 4e-3 in three); other negatives in a single step, or rows in
    another order, change one of them by 2e-5 or more.
    """
    words = [*words, "--learningRate", "0.001", "--initialisation", "original"]
    logs = trained(tiny_corpus, tmp_path, *words)["logs"]
    found = [logs["before_training"]["locLoss_val"], *logs["locLoss_train"], *logs["locLoss_val"]]
    expected = [start, *training, *validation]
    assert [sum(losses) for losses in found] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "words",
    [
        ["--schedulerStep", "1"],
        [*EXAMPLE, "--schedulerRamp", "3"],
        ["--samplingType", "sequential", "--arMode", "GRU", "--max_size_loaded", "60000"],
        ["--samplingType", "uniform", "--encoder_type", "lfb", "--dropout"],
    ],
    ids=["decay", "cpc-ctc", "kept hidden state, packs", "dropout"],
)
def test_a_resumed_run_ends_like_one_that_never_stopped(words, tiny_corpus, tmp_path):
    whole = trained(tiny_corpus, tmp_path / "whole", *words, epochs=4)
    trained(tiny_corpus, tmp_path / "parts", *words, epochs=2)
    assert run("--pathCheckpoint", tmp_path / "parts", "--nEpoch", 4) == 0
    assert_same(whole, checkpoint(tmp_path / "parts", 3))


def test_without_the_flag_a_run_takes_the_kind_of_audio_there_is_and_stays_with_it(
    tiny_corpus, tmp_path, capsys
):
    flacs = sorted(Path(tiny_corpus, "audio").rglob("*.flac"))
    for path in flacs:
        copy = (tmp_path / path.relative_to(tiny_corpus)).with_suffix(".wav")
        copy.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(copy, *soundfile.read(path, dtype="int16"))
    for name in ("train.txt", "test.txt"):
        shutil.copy(Path(tiny_corpus, name), tmp_path)
    expected = trained(tiny_corpus, tmp_path / "flac")["logs"]
    assert trained(tmp_path, tmp_path / "run", epochs=1)["args"]["file_extension"] == ".wav"
    for path in flacs:  # not what the run was trained on
        (tmp_path / path.relative_to(tiny_corpus)).with_suffix(".flac").write_bytes(b"")
    assert run("--pathCheckpoint", tmp_path / "run", "--nEpoch", 2, "--ignore_cache") == 0
    found = checkpoint(tmp_path / "run", 1)
    assert (found["args"]["file_extension"], found["logs"]) == (".wav", expected)
    capsys.readouterr()
    assert run(*on(tmp_path), *SMALL, "--pathCheckpoint", tmp_path / "other", "--ignore_cache") == 2
    said = capsys.readouterr()
    assert f"there are {len(flacs)} .flac, {len(flacs)} .wav: those that end with .flac" in said.out
    assert "are bad, nothing is left" in said.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_run_stopped_inside_an_epoch_resumes_from_that_step(
    number, tiny_corpus, tmp_path, monkeypatch
):
    words = ["--samplingType", "sequential", "--max_size_loaded", "60000", *EXAMPLE]
    whole = trained(tiny_corpus, tmp_path / "whole", *words)
    signal_in_step(5, monkeypatch, number)
    directory = tmp_path / "parts"
    flags = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", directory, "--nEpoch", 2, *words]
    assert run(*flags) == 128 + number
    position = torch.load(directory / "checkpoint_resume.pt", weights_only=True)["position"]
    assert position[0] == 0
    assert position[1] > 0  # in a later pack
    assert run(*flags) == 0
    assert_same(whole, checkpoint(directory, 1))
    assert not (directory / "checkpoint_resume.pt").exists()


def test_a_run_stopped_in_validation_resumes_with_it(tiny_corpus, tmp_path, monkeypatch):
    whole = trained(tiny_corpus, tmp_path / "whole")
    validate = train.validate

    def stop(state, loader, epoch, title):
        if epoch == 1:
            monkeypatch.setattr(train, "validate", validate)
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(state, loader, epoch, title)

    monkeypatch.setattr(train, "validate", stop)
    directory = tmp_path / "parts"
    flags = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", directory, "--nEpoch", 2]
    assert run(*flags) == 143
    assert run("--pathCheckpoint", directory) == 0
    assert_same(whole, checkpoint(directory, 1))


def test_a_stop_right_after_the_last_save_leaves_nothing_to_resume(
    tiny_corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_files, "draw_curves", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    flags = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path, "--nEpoch", 1]
    assert run(*flags) == 143
    assert [path.name for path in tmp_path.glob("*.pt")] == ["checkpoint_0.pt"]


def test_a_stop_that_a_hook_makes_another_error_of_is_a_stop(tiny_corpus, tmp_path, monkeypatch):
    """As C code can, which calls Python and takes any exception for a wrong argument."""

    def take_it_for_a_wrong_argument(*_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Stopped:
            raise ValueError("Invalid bounding box") from None

    flags = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path / "run", "--nEpoch", 1]
    flags += capture_flags(tiny_corpus, tmp_path / "capture")
    with monkeypatch.context() as patch:
        patch.setattr(CaptureHook, "run", take_it_for_a_wrong_argument)
        assert run(*flags) == 143
    assert [path.name for path in (tmp_path / "run").glob("*.pt")] == ["checkpoint_resume.pt"]
    assert run(*flags) == 0


def test_resume_every_keeps_the_last_steps_of_a_killed_run(tiny_corpus, tmp_path, monkeypatch):
    whole = trained(tiny_corpus, tmp_path / "whole")
    train_step, steps = train.train_step, []

    def die_in_step_six(*item):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt  # nothing is saved, as if it were killed
        train_step(*item)

    monkeypatch.setattr(train, "train_step", die_in_step_six)
    flags = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path / "parts", "--nEpoch", 2]
    assert run(*flags, "--resume_every", 2) == 130
    state = torch.load(tmp_path / "parts" / "checkpoint_resume.pt", weights_only=True)
    assert state["running"]["batches"] == 4
    assert run(*flags) == 0
    assert_same(whole, checkpoint(tmp_path / "parts", 1))


@pytest.fixture
def hand(monkeypatch):
    """Sets the clock of all that is done now and then: a list of one number."""
    now = [0.0]
    paced = functools.partial(Pace, now=lambda: now[0])
    for module in (run_files, run_state):
        monkeypatch.setattr(module, "Pace", paced)
    return now


def test_what_takes_long_is_done_less_often():
    now = [0.0]
    pace = Pace(60, share=0.01, now=lambda: now[0])
    for duration, waits in ((0.1, 60), (0.6, 60), (2.0, 200)):
        with pace.timed():
            now[0] += duration
        now[0] += waits - 0.01
        assert not pace.is_due
        now[0] += 0.02
        assert pace.is_due


def saves_of_steps(minutes, hand, monkeypatch):
    """A list of (minute, epoch) of the saves to come, of runs whose steps take that long."""
    saves, train_step, save = [], train.train_step, run_state.save_checkpoint

    def slow(*item):
        train_step(*item)
        hand[0] += 60 * minutes

    def noted(directory, contents, epoch):
        saves.append((round(hand[0] / 60), epoch))
        return save(directory, contents, epoch)

    monkeypatch.setattr(train, "train_step", slow)
    monkeypatch.setattr(run_state, "save_checkpoint", noted)
    return saves


def test_a_run_is_saved_every_ten_minutes(tiny_corpus, tmp_path, monkeypatch, hand):
    """At the step after the one in which all agree on it: here every step, of a minute each."""
    saves = saves_of_steps(1, hand, monkeypatch)
    monkeypatch.setattr(train, "STEPS_BETWEEN_STOP_CHECKS", 1)
    trained(tiny_corpus, tmp_path, "--batchSizeGPU", 1, epochs=3)
    inside, of_epochs = [[at for at, e in saves if (e is None) == yes] for yes in (True, False)]
    assert len(of_epochs) == 3
    assert len(inside) >= 3
    for at in inside:
        assert at - max(before for before, _ in [(0, 0), *saves] if before < at) == 11


def test_epochs_of_few_steps_are_saved_in_time(tiny_corpus, tmp_path, monkeypatch, hand):
    """In the first step after an epoch in which it was due."""
    saves = saves_of_steps(10, hand, monkeypatch)
    trained(tiny_corpus, tmp_path, "--save_step", 100, "--batchSizeGPU", 16, epochs=4)
    assert [epoch for _, epoch in saves] == [0, None, None, 3]


def test_curves_and_report_are_drawn_once_a_minute(tiny_corpus, tmp_path, monkeypatch, hand):
    """And at the end; logs and record are written after each epoch."""
    drawn, train_one_epoch = [], train.train_one_epoch

    def of_25_seconds(*args):
        hand[0] += 25
        if hand[0] > 25:
            assert len(json.loads((tmp_path / "checkpoint_logs.json").read_text())["epoch"]) == len(
                reported(tmp_path)
            )
        return train_one_epoch(*args)

    def noted(logs, *args):
        drawn.append(logs["epoch"][-1])
        draw_curves(logs, *args)

    monkeypatch.setattr(train, "train_one_epoch", of_25_seconds)
    monkeypatch.setattr(run_files, "draw_curves", noted)
    trained(tiny_corpus, tmp_path, epochs=8)
    assert drawn == [2, 5, 7]
    assert [row["epoch"] for row in reported(tmp_path)] == list(range(8))


def test_a_stopped_run_leaves_curves_and_report_as_far_as_it_came(
    tiny_corpus, tmp_path, monkeypatch, hand
):
    def ask_to_stop(current, *_):
        if current.position.epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    drawn, train_step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: [ask_to_stop(*a), train_step(*a)])
    monkeypatch.setattr(run_files, "draw_curves", lambda logs, *_: drawn.append(logs["epoch"]))
    flags = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path, "--nEpoch", 4]
    assert run(*flags) == 143
    assert drawn == [[0, 1]]


def test_the_checkpoint_that_a_run_resumed_from_is_freed(tiny_corpus, tmp_path, monkeypatch):
    trained(tiny_corpus, tmp_path, epochs=1)
    resolve, train_all, found = train.resolve, train.train, []

    def noted(*args):
        args, checkpoint = resolve(*args)
        found.append(weakref.ref(checkpoint))
        return args, checkpoint

    def without(*args):
        gc.collect()
        assert found[0]() is None
        found.append("trained")
        train_all(*args)

    monkeypatch.setattr(train, "resolve", noted)
    monkeypatch.setattr(train, "train", without)
    trained(tiny_corpus, tmp_path, epochs=2)
    assert found[1:] == ["trained"]


def test_a_run_killed_after_its_last_save_has_its_curves_and_report_written(
    tiny_corpus, tmp_path, monkeypatch
):
    def die(*_):
        raise KeyboardInterrupt

    flags = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path, "--nEpoch", 1]
    with monkeypatch.context() as patch:
        patch.setattr(run_files, "save_json", die)
        assert run(*flags) == 130
    (tmp_path / "checkpoint_logs.json").unlink()  # as if killed before that, too
    assert run(*flags) == 0
    logs = json.loads((tmp_path / "checkpoint_logs.json").read_text())
    assert logs == checkpoint(tmp_path, 0)["logs"]
    assert (tmp_path / "checkpoint_curves.png").exists()
    assert (tmp_path / "report.html").exists()


def test_what_was_saved_between_two_epochs_stays(tiny_corpus, tmp_path):
    trained(tiny_corpus, tmp_path, epochs=2)
    (tmp_path / "checkpoint_1.pt").rename(tmp_path / "checkpoint_resume.pt")
    assert run("--pathCheckpoint", tmp_path) == 0
    assert {p.name for p in tmp_path.glob("*.pt")} == {"checkpoint_0.pt", "checkpoint_resume.pt"}


def test_what_a_run_killed_after_its_last_save_left_behind_goes(tiny_corpus, tmp_path):
    trained(tiny_corpus, tmp_path, epochs=2)
    shutil.copy(tmp_path / "checkpoint_0.pt", tmp_path / "checkpoint_resume.pt")
    (tmp_path / ".writing-1.pt").write_text("")
    assert run("--pathCheckpoint", tmp_path) == 0
    assert {p.name for p in tmp_path.glob("*.pt")} == {"checkpoint_0.pt", "checkpoint_1.pt"}


def test_a_restart_keeps_the_old_run_until_the_new_one_is_saved(tiny_corpus, tmp_path):
    trained(tiny_corpus, tmp_path, epochs=3)
    flags = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path, "--restart"]
    assert run(*flags, "--learningRate", "inf") == 2
    assert (tmp_path / "checkpoint_2.pt").exists()
    assert run(*flags, "--nEpoch", 1) == 0
    assert [p.name for p in tmp_path.glob("*.pt")] == ["checkpoint_0.pt"]


@pytest.mark.parametrize("clip", [[], ["--clip_grad_norm", "1"]])
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_weights(
    clip, tiny_corpus, tmp_path, capsys
):
    trained(tiny_corpus, tmp_path, epochs=1)
    before = checkpoint(tmp_path, 0)
    words = ["--pathCheckpoint", tmp_path, "--nEpoch", 2, "--learningRate", "1e30"]
    assert run(*words, *clip) == 2
    error = capsys.readouterr().err
    assert re.search(r"epoch 1, pack 0, batch \d+: .*\d+-\d-000\d.flac", error)
    assert_same(before, checkpoint(tmp_path, 0), without=())
    assert not (tmp_path / "checkpoint_1.pt").exists()


def test_a_disk_that_is_full_for_a_while_costs_no_checkpoint(
    tiny_corpus, tmp_path, monkeypatch, capsys
):
    save = save_checkpoint

    def full_in_epoch_one(directory, state, epoch=None):
        if epoch == 1:
            raise OSError(28, "No space left on device")
        return save(directory, state, epoch)

    monkeypatch.setattr("utils.run.state.save_checkpoint", full_in_epoch_one)
    trained(tiny_corpus, tmp_path, epochs=3)
    assert {p.name for p in tmp_path.glob("*.pt")} == {"checkpoint_0.pt", "checkpoint_2.pt"}
    assert "No space left" in capsys.readouterr().out


@pytest.fixture
def accuracies(monkeypatch):
    """A list of the validation accuracies that the epochs are to have, whatever is trained."""
    by_epoch = []

    def validate(_state, _loader, epoch, _title):
        return {"locLoss_val": [1.0, 1.0], "locAcc_val": [by_epoch[epoch]] * 2}

    monkeypatch.setattr(train, "validate", validate)
    return by_epoch


def numbers(directory):
    """Of which epochs there are checkpoints."""
    return sorted(int(path.stem.split("_")[1]) for path in directory.glob("checkpoint_*.pt"))


def test_keep_leaves_the_last_checkpoints_and_the_best(tiny_corpus, tmp_path, accuracies):
    accuracies += [0.1, 0.5, 0.2, 0.3, 0.4, 0.45, 0.4, 0.9, 0.1]
    trained(tiny_corpus, tmp_path, "--keep", "2", epochs=2)
    assert numbers(tmp_path) == [0, 1]
    for epochs, kept in ((4, [1, 2, 3]), (6, [1, 4, 5]), (9, [7, 8])):
        assert run("--pathCheckpoint", tmp_path, "--nEpoch", epochs) == 0
        assert numbers(tmp_path) == kept
    trained(tiny_corpus, tmp_path, "--keep", "1", "--restart", epochs=1)
    assert numbers(tmp_path) == [0]


def test_keep_counts_saved_epochs_and_has_the_best_weights_anyway(
    tiny_corpus, tmp_path, accuracies
):
    accuracies += [0.1, 0.5, 0.2, 0.3, 0.4, 0.4]
    every = trained(tiny_corpus, tmp_path / "every", epochs=2)
    state = trained(tiny_corpus, tmp_path / "kept", "--keep", 2, "--save_step", 2, epochs=6)
    assert numbers(tmp_path / "kept") == [4, 5]
    assert_equal_trees(state["best"], every["gEncoder"], "best")


def test_the_logs_hold_how_often_this_call_saves_and_logs(tiny_corpus, tmp_path):
    trained(tiny_corpus, tmp_path, epochs=1)
    words = ["--nEpoch", 2, "--save_step", 3, "--logging_step", 4]
    assert run("--pathCheckpoint", tmp_path, *words) == 0
    logs = checkpoint(tmp_path, 1)["logs"]
    assert (logs["saveStep"], logs["logging_step"], logs["epoch"]) == (3, 4, [0, 1])


def test_keep_removes_nothing_before_the_new_checkpoint_is_there(
    tiny_corpus, tmp_path, monkeypatch, accuracies
):
    accuracies += [0.5, 0.1, 0.1, 0.1, 0.1]
    trained(tiny_corpus, tmp_path, "--keep", "1", epochs=3)
    assert numbers(tmp_path) == [0, 2]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.run.state.save_checkpoint", full)
    assert run("--pathCheckpoint", tmp_path, "--nEpoch", 5) == 2
    assert numbers(tmp_path) == [0, 2]


def test_keep_does_not_count_later_checkpoints_that_can_not_be_read(
    tiny_corpus, tmp_path, accuracies
):
    accuracies += [0.5, 0.1, 0.1, 0.1]
    trained(tiny_corpus, tmp_path, "--keep", "2", epochs=2)
    for epoch in (7, 8):
        (tmp_path / f"checkpoint_{epoch}.pt").write_bytes(b"torn")
    assert run("--pathCheckpoint", tmp_path, "--nEpoch", 4) == 0
    assert numbers(tmp_path) == [0, 2, 3, 7, 8]


def gradients_of_steps(monkeypatch):
    """A list that takes in the gradients of each training step, as the optimiser gets them."""
    taken, step = [], torch.optim.Adam.step

    def record(self, *rest):
        taken.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    return taken


def test_clipped_gradients_have_the_norm_asked_for_and_logs_the_one_before(
    tiny_corpus, tmp_path, monkeypatch
):
    taken = gradients_of_steps(monkeypatch)
    same_weights = ["--learningRate", "0"]
    plain = trained(tiny_corpus, tmp_path / "plain", *same_weights, epochs=1)
    norms = [sum(float((g.double() ** 2).sum()) for g in step) ** 0.5 for step in taken]
    limit = sorted(norms)[len(norms) // 2]  # above it the larger half is clipped
    scales = [min(1.0, limit / (norm + 1e-6)) for norm in norms]
    expected = [[g * s for g in step] for step, s in zip(taken, scales, strict=True)]
    taken.clear()
    words = [*same_weights, "--clip_grad_norm", limit]
    clipped = trained(tiny_corpus, tmp_path / "clipped", *words, epochs=1)
    for step, clipped_step in zip(expected, taken, strict=True):
        for gradient, clipped_gradient in zip(step, clipped_step, strict=True):
            assert_close(clipped_gradient, gradient, 1e-5)
    assert clipped["logs"]["gradNorm_train"] == plain["logs"]["gradNorm_train"]
    assert plain["logs"]["gradNorm_train"][0] == pytest.approx(sum(norms) / len(norms), rel=1e-5)


def test_a_limit_that_is_never_reached_changes_no_bit(tiny_corpus, tmp_path):
    plain = trained(tiny_corpus, tmp_path / "plain")
    clipped = trained(tiny_corpus, tmp_path / "clipped", "--clip_grad_norm", "1e6")
    assert_same(plain, clipped)


def test_a_log_file_on_a_full_disk_stops_no_run(tiny_corpus, tmp_path, monkeypatch):
    class OnFullDisk(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", OnFullDisk())
    trained(tiny_corpus, tmp_path, epochs=1)


def test_another_corpus_is_reported_and_the_next_epoch_begins(
    tiny_corpus, tmp_path, monkeypatch, capsys
):
    flags = [*SMALL, "--pathCheckpoint", tmp_path / "run", "--resume_every", 2, "--nEpoch", 1]
    train_step, steps = train.train_step, []

    def die_in_step_three(*item):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        train_step(*item)

    monkeypatch.setattr(train, "train_step", die_in_step_three)
    assert run(*on(tiny_corpus), *flags) == 130
    other = write_tiny_corpus(tmp_path / "other", seed=3)
    assert run("--pathCheckpoint", tmp_path / "run", "--pathDB", other / "audio") == 0
    printed = capsys.readouterr().out
    assert "warning: the training set isn't the one" in printed
    assert "warning: the validation set isn't the one" in printed
    assert "epoch 0 ends here" in printed
    assert checkpoint(tmp_path / "run", 0)["logs"]["iter"] == [2]


def test_a_changed_list_is_named_with_the_files_that_both_sets_have(tiny_corpus, tmp_path, capsys):
    lists = [shutil.copy(tiny_corpus / name, tmp_path) for name in ("train.txt", "test.txt")]
    words = ["--pathTrain", lists[0], "--pathVal", lists[1]]
    trained(tiny_corpus, tmp_path / "run", *words, epochs=1)
    assert "warning" not in capsys.readouterr().out
    with open(lists[1], "a") as file:
        file.write("10-0-0000\n11-1-0001\n")
    assert run("--pathCheckpoint", tmp_path / "run", "--nEpoch", 2) == 0
    printed = capsys.readouterr().out
    assert "warning: the validation set isn't the one" in printed
    assert "the training set isn't" not in printed
    assert re.search("2 of 5 files of the validation set .*: 10/0/10-0-0000.flac, 11/1/", printed)


def test_all_that_is_gone_is_named_at_once(tmp_path, capsys):
    corpus = write_tiny_corpus(tmp_path / "here")
    trained(corpus, tmp_path / "run", epochs=1)
    corpus.rename(tmp_path / "there")
    with ends_refused(capsys, "--pathDB .*here/audio, --pathTrain .*, --pathVal .*; if they were"):
        train.main(["--pathCheckpoint", str(tmp_path / "run"), "--nEpoch", "2"])
    assert run(*on(tmp_path / "there"), "--pathCheckpoint", tmp_path / "run", "--nEpoch", 2) == 0


def test_a_list_that_is_gone_does_not_become_the_whole_corpus(tiny_corpus, tmp_path, capsys):
    flags = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path / "run", "--nEpoch", 1]
    flags[3] = shutil.copy(tiny_corpus / "train.txt", tmp_path / "train.txt")
    assert run(*flags) == 0
    (tmp_path / "train.txt").unlink()
    assert run("--pathCheckpoint", tmp_path / "run", "--nEpoch", 2) == 2
    assert "train.txt: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["optimizer", "running", "machine", "best_accuracy"])
def test_a_checkpoint_without_what_training_needs_is_refused(part, tiny_corpus, tmp_path, capsys):
    state = trained(tiny_corpus, tmp_path, epochs=1)
    del state[part]
    torch.save(state, tmp_path / "checkpoint_0.pt")
    assert run("--pathCheckpoint", tmp_path, "--nEpoch", 2) == 2
    assert "training can't resume from it" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--nEpoch", "2"], ["--restart"]])
def test_a_directory_that_is_trained_into_is_refused_and_left_alone(
    words, tiny_corpus, tmp_path, capsys
):
    trained(tiny_corpus, tmp_path, epochs=1)
    (tmp_path / ".writing-half").write_text("the other program's")
    with locked(tmp_path, "the other program"):
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        assert run(*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path, *words) == 2
        assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
        flags = ["--pathCaptureDS", tiny_corpus / "test.txt", "--captureConvRepr"]
        flags += ["--pathCaptureSave", tmp_path / "capture", "--pathDB", tiny_corpus / "audio"]
        assert run("--onlyCapture", "--pathCheckpoint", tmp_path, *flags) == 0
    assert f"process {os.getpid()} on " in capsys.readouterr().err


def test_training_needs_a_directory_and_keeps_to_its_run(tiny_corpus, tmp_path, capsys):
    trained(tiny_corpus, tmp_path, epochs=1)
    file = tmp_path / "checkpoint_0.pt"
    with ends_refused(capsys, "checkpoint_0.pt: is a file; training needs a directory"):
        train.main(["--pathCheckpoint", str(file)])
    assert run("--pathCheckpoint", tmp_path, "--hiddenGar", 16, "--nEpoch", 2) == 0
    printed = capsys.readouterr().out
    assert "warning: --hiddenGar: using the checkpoint's value, 8" in printed
    assert "a new run needs another directory" in printed


def test_a_refused_command_leaves_no_directory(tiny_corpus, tmp_path):
    flags = [*on(tiny_corpus), "--pathCheckpoint", tmp_path / "a" / "b"]
    assert run(*flags, "--sizeWindow", "161") == 2
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def inside_an_epoch(tiny_corpus, tmp_path_factory):
    """A checkpoint in the second epoch of a run that keeps hidden state: the file's content."""
    directory = tmp_path_factory.mktemp("inside")
    words = ["--samplingType", "sequential", "--resume_every", 1, "--nEpoch", 2]
    flags = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", directory, *words]
    with pytest.MonkeyPatch.context() as patch:
        finish_epoch = train.finish_epoch

        def die_in_the_second(state, epoch, *rest, **more):
            if epoch == 1:
                raise KeyboardInterrupt
            finish_epoch(state, epoch, *rest, **more)

        patch.setattr(train, "finish_epoch", die_in_the_second)
        assert run(*flags) == 130
    return directory / "checkpoint_resume.pt"


def put(*path, value):
    """A function that puts a value somewhere into a checkpoint."""

    def mutate(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return mutate


MUTATIONS = {
    "a start that is a list": put("logs", "before_training", value=[1.0]),
    "sums of other steps": put("running", "sums", value=torch.zeros(2, 3, dtype=torch.float64)),
    "sums of one kind": put("running", "sums", value=torch.zeros(2, dtype=torch.float64)),
    "sums of text": put("running", "sums", value="many"),
    "integer sums": put("running", "sums", value=torch.zeros(2, 2, dtype=torch.int64)),
    "norms of several": put("running", "norms", value=torch.zeros(2)),
    "negative windows": put("running", "windows", value=-4),
    "no batches": put("running", "batches", value=0),
    "no sums at all": put("running", value=None),
    "an epoch not begun": put("position", value=[1, 0, 0]),
    "hidden text": put("hidden", value="state"),
    "one hidden tensor of two": put("hidden", value=torch.zeros(1, 4, 8)),
    "three hidden tensors": put("hidden", value=(torch.zeros(1, 4, 8),) * 3),
    "hidden of other layers": put("hidden", value=(torch.zeros(2, 4, 8),) * 2),
    "hidden of other width": put("hidden", value=(torch.zeros(1, 4, 7),) * 2),
    "hidden of unlike rows": put("hidden", value=(torch.zeros(1, 4, 8), torch.zeros(1, 3, 8))),
    "best without weights": put("best", value={}),
    "best of text": put("best", "gAR.baseNet.bias_hh_l0", value="zero"),
    "best of another shape": put("best", "gAR.baseNet.bias_hh_l0", value=torch.zeros(3)),
    "best accuracy of text": put("best_accuracy", value="high"),
    "best accuracy undefined": put("best_accuracy", value=float("nan")),
    "a loss of text": put("logs", "locLoss_val", 0, 1, value="low"),
    "an epoch without losses": put("logs", "locLoss_val", 0, value=None),
    "an empty row": put("logs", "locAcc_train", 0, value=[]),
    "a row of other steps": put("logs", "locAcc_val", 0, value=[0.5] * 3),
    "no series of rows": put("logs", "locAcc_val", value=0.5),
    "a start of text": put("logs", "before_training", "locAcc_val", value="low"),
    "an empty start": put("logs", "before_training", value={}),
    "half a start": put("logs", "before_training", value={"locAcc_val": [0.1, 0.1]}),
    "an epoch of text": put("logs", "epoch", 0, value="first"),
    "a learning rate of rows": put("logs", "learningRate", 0, value=[0.1, 0.1]),
    "a dict in the logs": put("logs", "iter", 0, value={}),
    "moments of text": put("optimizer", "state", 0, "exp_avg", value="low"),
    "moments of one kind": put("optimizer", "state", 0, value={"step": torch.tensor(1.0)}),
    "a step of text": put("optimizer", "state", 0, "step", value="third"),
    "several steps": put("optimizer", "state", 0, "step", value=torch.zeros(3)),
    "a setting that is no text": put("logs", "saveStep", value=torch.zeros(2)),
    "epochs that are no list": put("logs", "epoch", value=-1),
    "a machine of tensors": put("machine", "threads", value=torch.zeros(2)),
    "a fingerprint of tensors": put("fingerprint", value=torch.zeros(2)),
    "a format that is no number": put("format", value=torch.zeros(2)),
    "a clock of text": put("clock", "seconds", value="long"),
    "a clock that goes back": put("clock", "waited", value=-1.0),
    "a clock without windows": put("clock", value={"seconds": 1.0, "waited": 0.0}),
    "groups of a tensor": put("optimizer", "param_groups", value=torch.zeros(1, 4, 8)),
    "no groups": put("optimizer", "param_groups", value=[]),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_checkpoint_is_refused_in_one_line(name, inside_an_epoch, tmp_path, capsys):
    state = torch.load(inside_an_epoch, weights_only=True)
    MUTATIONS[name](state)
    torch.save(state, tmp_path / "checkpoint_resume.pt")
    with ends_refused(capsys, f"{tmp_path}/checkpoint_resume.pt: "):
        train.main(["--pathCheckpoint", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_resume.pt"]


def test_an_unmutated_checkpoint_resumes(inside_an_epoch, tmp_path):
    shutil.copy(inside_an_epoch, tmp_path)
    assert run("--pathCheckpoint", tmp_path) == 0
    assert len(checkpoint(tmp_path, 1)["logs"]["epoch"]) == 2


@pytest.mark.parametrize(("processors", "threads"), [(2, 2), (1, 1)])
def test_a_run_resumes_with_its_threads_if_they_fit(
    processors, threads, inside_an_epoch, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("utils.run.machine.n_processors", lambda: processors)
    state = torch.load(inside_an_epoch, weights_only=True)
    state["machine"]["threads"] = 2
    torch.save(state, tmp_path / "checkpoint_resume.pt")
    assert run("--pathCheckpoint", tmp_path) == 0
    assert checkpoint(tmp_path, 1)["machine"]["threads"] == threads
    assert ("threads 2 -> 1" in capsys.readouterr().out) == (threads == 1)


def reported(directory):
    """The rows of epochs in the record of a run's report."""
    return json.loads((directory / "report_data.json").read_text())["epochs"]


def test_the_time_of_an_interrupted_epoch_is_that_of_all_its_parts(inside_an_epoch, tmp_path):
    state = torch.load(inside_an_epoch, weights_only=True)
    assert state["clock"]["windows"] == state["running"]["windows"] > 0
    state["clock"] |= {"seconds": 1e6, "waited": 5e5}
    torch.save(state, tmp_path / "checkpoint_resume.pt")
    assert run("--pathCheckpoint", tmp_path, "--nEpoch", 3) == 0
    parts, whole = reported(tmp_path)
    assert parts["windows"] == whole["windows"] == state["running"]["windows"]
    assert parts["seconds"] >= 1e6 > whole["seconds"]
    assert parts["waited"] >= 5e5 > whole["waited"]


def test_a_checkpoint_without_the_time_of_its_epoch_resumes(inside_an_epoch, tmp_path):
    state = torch.load(inside_an_epoch, weights_only=True)
    del state["clock"]
    torch.save(state, tmp_path / "checkpoint_resume.pt")
    assert run("--pathCheckpoint", tmp_path) == 0
    assert "clock" not in checkpoint(tmp_path, 1)


def test_a_place_that_can_not_be_made_is_refused(tiny_corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path / "file" / "run"]
    assert run(*flags) == 2
    assert "--pathCheckpoint" in capsys.readouterr().err


def test_the_criterion_is_loaded_with_the_architecture_it_had(tiny_corpus, tmp_path):
    loaded = trained(tiny_corpus, tmp_path / "a", *EXAMPLE, epochs=1)
    flags = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path / "b", "--nEpoch", 1]
    words = ["--load", tmp_path / "a", "--loadCriterion"]  # the newest in it
    assert run(*flags, *words, "--learningRate", "0") == 0
    state = checkpoint(tmp_path / "b", 0)
    assert state["args"]["CPCCTC"] is True
    assert_equal_trees(state["cpcCriterion"], loaded["cpcCriterion"], "criterion")


def test_damaged_checkpoints_are_never_a_fresh_start(tiny_corpus, tmp_path, capsys):
    trained(tiny_corpus, tmp_path, epochs=2)
    newest = tmp_path / "checkpoint_1.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert run("--pathCheckpoint", tmp_path) == 0  # repeats the epoch after the one before
    assert "checkpoint_1.pt" in capsys.readouterr().out
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    assert run("--pathCheckpoint", tmp_path, "--nEpoch", 3) == 2
    assert "no checkpoint there can be read" in capsys.readouterr().err


def test_without_a_validation_list_some_utterances_are_set_aside(tiny_corpus, tmp_path, capsys):
    words = ["--pathDB", tiny_corpus / "audio", "--pathCheckpoint", tmp_path, "--nEpoch", 1]
    assert run(*words, *SMALL) == 0
    printed = capsys.readouterr().out
    assert "training set: 8 files" in printed
    assert "validation set: 1 file, " in printed


def test_bad_files_among_good_ones_are_skipped_and_named(tmp_path, capsys):
    corpus = write_tiny_corpus(tmp_path)
    (corpus / "audio" / "10" / "0" / "10-0-0000.flac").write_bytes(b"not audio")
    trained(corpus, tmp_path / "run", epochs=1)
    assert "10-0-0000.flac" in capsys.readouterr().out


def test_subsets_below_the_database_are_warned_of_once(tiny_corpus, tmp_path, capsys):
    for speaker, subset in (("10", "clean"), ("11", "clean"), ("12", "other")):
        link = tmp_path / "db" / subset / speaker
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(tiny_corpus / "audio" / speaker)
    words = ["--pathCheckpoint", tmp_path / "run", *SMALL, "--nEpoch", 1]
    assert run(*on(tiny_corpus), "--pathDB", tmp_path / "db", *words) == 0
    assert capsys.readouterr().out.count("clean, other count as one speaker each") == 1
    assert run(*on(tiny_corpus), "--pathDB", tmp_path / "db" / "clean", *words, "--restart") == 0
    assert "as one speaker" not in capsys.readouterr().out


def written(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("words", [["--help"], ["--pathCheckpoint", "RUN"]])
def test_a_closed_pipe_ends_the_program_silently(words, tiny_corpus, tmp_path):
    flags = [*on(tiny_corpus), *SMALL, "--nEpoch", "1", *words]
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, ROOT / "train.py", *flags]
    pipes = {"stdout": writing, "stderr": subprocess.PIPE}
    done = subprocess.run(command, **pipes, cwd=tmp_path, check=False)
    os.close(writing)
    assert done.stderr == b""
    assert done.returncode in ([0, EXIT_BROKEN_PIPE] if "--help" in words else [EXIT_BROKEN_PIPE])


def test_a_finished_run_is_known_without_its_audio(tiny_corpus, tmp_path, capsys, monkeypatch):
    trained(tiny_corpus, tmp_path, epochs=1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(train, "open_corpus", None)
    assert run("--pathCheckpoint", tmp_path, "--nEpoch", 1) == 0
    assert "nothing left to do: 1 epoch done; a larger --nEpoch" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("parser", [build_parser(), linear_separability.build_parser()])
def test_help_names_every_default_once(parser, monkeypatch):
    monkeypatch.setenv("COLUMNS", "5000")
    text = parser.format_help().partition("\noptions:")[2]
    text = re.split("\n(?:commands|examples):", text)[0]
    explained = dict(re.findall(r"^ +--(\w+)([^\n]*(?:\n {10,}.*)?)", text, flags=re.M))
    for name, line in explained.items():
        default = parser.get_default(name)
        assert line.count("(default: ") == 1 or default in (None, "") or default is False, line
        assert not re.search(r"default: (None|False|-1)?\)", line), line
    assert len(explained) > 20
    assert any(line.endswith("(default: 0.0002)") for line in explained.values())


def test_help_lists_the_registered_stats():
    text = "".join(build_parser().format_help().split())
    assert all(usage(name) in text for name in STATS)


def test_as_a_program_it_refuses_with_status_two_and_no_traceback(tmp_path):
    command = [sys.executable, ROOT / "train.py", "--pathDB", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --pathCheckpoint")
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------- starting from other models


def test_weights_are_loaded_with_the_architecture_they_had(tiny_corpus, tmp_path):
    loaded = trained(tiny_corpus, tmp_path / "a", "--arMode", "GRU", "--nLevelsGRU", "2", epochs=1)
    words = ["--load", tmp_path / "a" / "checkpoint_0.pt", "--nEpoch", 1, "--pathCheckpoint"]
    flags = [*on(tiny_corpus), *SMALL, "--learningRate", "0"]
    assert run(*flags, *words, tmp_path / "b", "--loadCriterion") == 0
    state = checkpoint(tmp_path / "b", 0)
    assert_equal_trees(state["gEncoder"], loaded["gEncoder"], "model")
    assert_equal_trees(state["cpcCriterion"], loaded["cpcCriterion"], "criterion")
    assert run("--pathCheckpoint", tmp_path / "b", "--nEpoch", 2) == 0
    assert run(*flags, *words, tmp_path / "c", "--gru_level", "1") == 0
    keys = checkpoint(tmp_path / "c", 0)["gEncoder"].keys()
    assert "gAR.baseNet.weight_ih_l0" in keys
    assert "gAR.baseNet.weight_ih_l1" not in keys


@pytest.mark.parametrize("words", [["--speakerEmbedding", 3], ["--supervised"]])
def test_weights_for_speakers_are_never_given_to_others(words, tmp_path, capsys):
    """With one speaker renamed there are as many as before, but with other numbers."""
    corpus = write_tiny_corpus(tmp_path / "corpus")
    state = trained(corpus, tmp_path / "run", *words, epochs=1)
    names = sorted(path.name for path in (corpus / "audio").iterdir() if path.is_dir())
    assert state["speakers"] == names
    (corpus / "audio" / names[0]).rename(corpus / "audio" / f"{names[-1]}x")
    assert run("--pathCheckpoint", tmp_path / "run", "--nEpoch", 2, "--ignore_cache") == 2
    error = capsys.readouterr().err
    assert f"other speakers: {names[0]}, {names[-1]}x are in only one" in error
    assert "speakers" not in trained(corpus, tmp_path / "plain", epochs=1)


def test_what_is_to_be_loaded_must_be_there(tiny_corpus, tmp_path, capsys):
    flags = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path / "run"]
    assert run(*flags, "--load", tmp_path / "none.pt") == 2
    assert f"--load {tmp_path}/none.pt: no such directory or file" in capsys.readouterr().err


def test_a_run_started_from_a_model_keeps_hidden_states_by_its_own_sampling(tiny_corpus, tmp_path):
    assert trained(tiny_corpus, tmp_path / "a", epochs=1)["hidden"] is None
    flags = [*on(tiny_corpus), *SMALL, "--samplingType", "sequential", "--load", tmp_path / "a"]
    assert run(*flags, "--nEpoch", 1, "--pathCheckpoint", tmp_path / "b") == 0
    assert checkpoint(tmp_path / "b", 0)["hidden"] is not None
    assert run(*flags, "--nEpoch", 2, "--pathCheckpoint", tmp_path / "c") == 0
    assert run("--nEpoch", 2, "--pathCheckpoint", tmp_path / "b") == 0
    assert_same(*(checkpoint(tmp_path / name, 1) for name in "bc"), without=("args", "machine"))
    assert trained(tiny_corpus, tmp_path / "d", "--load", tmp_path / "b")["hidden"] is None


def test_flags_are_judged_by_the_criterion_that_is_loaded(tiny_corpus, tmp_path, capsys):
    trained(tiny_corpus, tmp_path / "plain", epochs=1)
    trained(tiny_corpus, tmp_path / "aligned", *EXAMPLE, epochs=1)
    flags = [*on(tiny_corpus), *SMALL, "--nEpoch", 1, "--pathCheckpoint", tmp_path / "run"]
    flags += ["--pathCaptureDS", f"{tiny_corpus}/test.txt", "--pathCaptureSave", tmp_path / "c"]
    flags += ["--captureCPCCTCalign", "--loadCriterion", "--load"]
    assert run(*flags, tmp_path / "plain", *EXAMPLE) == 2
    assert "--captureCPCCTCalign needs --CPCCTC" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run(*flags, tmp_path / "aligned") == 0
    assert (tmp_path / "c" / "0" / "cpcctc_align").is_dir()


def test_a_run_started_from_a_projected_model_resumes_whatever_its_width(tiny_corpus, tmp_path):
    """Its features have a width that the transformer under the projection couldn't have."""
    trained(tiny_corpus, tmp_path / "a", "--arMode", "transformer", epochs=1)
    state = checkpoint(tmp_path / "a", 0)
    model = CPCModelNullspace(build_model(Namespace(**state["args"])), torch.eye(8)[:, :5])
    torch.save({**state, "gEncoder": model.state_dict()}, tmp_path / "projected.pt")
    words = ["--load", tmp_path / "projected.pt", "--nullspace"]
    assert trained(tiny_corpus, tmp_path / "b", *words, epochs=1)["args"]["hiddenGar"] == 5
    assert run("--pathCheckpoint", tmp_path / "b", "--nEpoch", 2) == 0


def test_several_loaded_models_are_trained_side_by_side(tiny_corpus, tmp_path):
    trained(tiny_corpus, tmp_path / "a", epochs=1)
    trained(tiny_corpus, tmp_path / "b", "--hiddenGar", "5", "--arMode", "RNN", epochs=1)
    paths = [tmp_path / name / "checkpoint_0.pt" for name in "ab"]
    state = trained(tiny_corpus, tmp_path / "c", "--load", *paths, epochs=1)
    assert state["args"]["hiddenGar"] == 13
    assert "models.1.gAR.baseNet.weight_ih_l0" in state["gEncoder"]
    for path in paths:
        path.unlink()
    assert run("--pathCheckpoint", tmp_path / "c", "--nEpoch", 2) == 0


def as_the_original_writes_it(directory):
    """Turn a run's directory into one of the original program, with what its schedule leaves."""
    for path in directory.glob("checkpoint_*.pt"):
        state = torch.load(path, weights_only=True)
        args, epochs = state["args"], state["position"][0]
        for group in state["optimizer"]["param_groups"]:
            del group["fused"]
            group["initial_lr"] = args["learningRate"]
            group["lr"] = args["learningRate"] * 0.5 ** (epochs // args["schedulerStep"])
        parts = ("gEncoder", "cpcCriterion", "optimizer", "best")
        torch.save({part: state[part] for part in parts}, path)
    path = directory / "checkpoint_logs.json"
    logs = json.loads(path.read_text())
    for ours in ("learningRate", "gradNorm_train", "before_training"):
        del logs[ours]
    path.write_text(json.dumps(logs))


def test_a_resumed_run_of_the_original_does_not_halve_its_learning_rate_twice(
    tiny_corpus, tmp_path
):
    words = ["--schedulerStep", "2", "--learningRate", "0.01", "--arMode", "GRU"]
    whole = trained(tiny_corpus, tmp_path / "whole", *words, epochs=4)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "checkpoint_3.pt").unlink()
    as_the_original_writes_it(tmp_path / "parts")
    assert run("--pathCheckpoint", tmp_path / "parts") == 0
    state = checkpoint(tmp_path / "parts", 3)
    assert state["logs"]["learningRate"] == [None, None, None, 0.005]
    assert state["optimizer"]["param_groups"][0]["lr"] == 0.005
    for part in ("gEncoder", "cpcCriterion"):
        assert_equal_trees(whole[part], state[part], part)
    assert_equal_trees(whole["optimizer"]["state"], state["optimizer"]["state"], "moments")


def is_zero(hidden):
    return hidden is None or not hidden.any()


def test_kept_hidden_state_begins_at_zero_in_each_pass_set_and_pack(
    tiny_corpus, tmp_path, monkeypatch
):
    starts, positions = {True: [], False: []}, []  # of training batches, and of others
    start, train_step = CPCAR.start, train.train_step

    def recorded_start(self, *rest):
        starts[self.training].append(start(self, *rest))
        return starts[self.training][-1]

    def recorded_train_step(state, forward_backward, position, batch):
        positions.append(position)
        train_step(state, forward_backward, position, batch)

    monkeypatch.setattr(CPCAR, "start", recorded_start)
    monkeypatch.setattr(train, "train_step", recorded_train_step)
    monkeypatch.setattr(StartWatch, "_look", lambda *_, **__: None)  # nor does anything else look
    words = ["--samplingType", "sequential", "--max_size_loaded", "60000", "--arMode", "GRU"]
    trained(tiny_corpus, tmp_path, *words, epochs=2)
    pairs = list(zip(positions, starts[True], strict=True))
    assert len({position.pack for position in positions}) > 1
    assert all(is_zero(hidden) for position, hidden in pairs if position.batch == 0)
    assert not all(is_zero(hidden) for _, hidden in pairs)
    n_batches, rest = divmod(len(starts[False]), 3)  # before training, and after each epoch
    assert rest == 0
    assert all(hidden is None for hidden in starts[False][::n_batches])


@needs_real_speech
@pytest.mark.skipif(not (GOLDEN / "checkpoint").is_dir(), reason="no checkpoint of the original")
def test_a_golden_run_of_the_original_resumes(tmp_path):
    shutil.copytree(GOLDEN / "checkpoint", tmp_path / "run", copy_function=shutil.copyfile)
    (tmp_path / "run").chmod(0o755)
    epochs = len(json.loads((tmp_path / "run" / "checkpoint_logs.json").read_text())["epoch"])
    lists = ["--pathTrain", REAL_SPEECH / "train_split.txt", "--pathVal",
             REAL_SPEECH / "test_split.txt"]  # fmt: skip
    flags = ["--pathDB", REAL_SPEECH / "audio", *lists, "--pathCheckpoint", tmp_path / "run"]
    assert run(*flags, "--nEpoch", epochs + 1) == 0
    before, after = (checkpoint(tmp_path / "run", epochs - 1 + n) for n in (0, 1))
    assert after["logs"]["epoch"] == list(range(epochs + 1))
    assert {"gEncoder", "cpcCriterion", "optimizer", "best"} <= after.keys()
    for key in ("gEncoder", "cpcCriterion"):
        shapes = [{k: v.shape for k, v in state[key].items()} for state in (before, after)]
        assert shapes[0] == shapes[1]
    steps = [state["optimizer"]["state"][0]["step"] for state in (before, after)]
    assert steps[1] > steps[0]


# ---------------------------------------------------------------------------- hooks in a run

CAPTURE_FLAGS = ["--captureEverything", "--captureEachEpochs", "1"]


def capture_flags(corpus, directory):
    return [*CAPTURE_FLAGS, "--pathCaptureDS", corpus / "test.txt", "--pathCaptureSave", directory,
            "--path_phone_data", corpus / "phones.txt"]  # fmt: skip


def captured(directory):
    return {
        path.relative_to(directory): torch.load(path, weights_only=True)
        for path in Path(directory).rglob("*.pt")
    }


@pytest.mark.parametrize("words", [[], EXAMPLE], ids=["cpc", "cpc-ctc"])
def test_capture_and_probes_leave_training_as_it_was(words, tiny_corpus, tmp_path):
    plain = trained(tiny_corpus, tmp_path / "plain", *words, epochs=3)
    hooks = [
        *capture_flags(tiny_corpus, tmp_path / "capture"), "--captureSetStats",
        f"reprDiff:cosine,ctx_repr,0.05,{tmp_path / 'stats'}", "--supervised_classif_metric",
        "--speaker_sep", "--linsep_logs_dir", tmp_path / "probes", "--linsep_checkpoint_dir",
        tmp_path / "classifiers", "--linsep_n_epoch", "2", "--linsep_classif_each_epochs", "1",
    ]  # fmt: skip
    hooked = trained(tiny_corpus, tmp_path / "hooked", *words, *hooks, epochs=3)
    assert_same(plain, hooked, without=("args", "logs"))
    logs = hooked["logs"]
    assert all(plain["logs"][key] == logs[key] for key in plain["logs"])
    assert logs["phone_best_val_acc"][0] is None
    assert len(logs["speaker_best_val_acc"][2]) == 1
    assert len(logs["reprDiff_ctx_repr_cosine_by0.05_mean"]) == 3
    assert (tmp_path / "probes" / "2" / "phone" / "logs.json").is_file()
    assert list((tmp_path / "classifiers" / "1" / "speaker").glob("speaker_classif_best-*.pt"))
    assert {p.name for p in (tmp_path / "capture").iterdir()} == {"0", "1", "2"}
    assert list((tmp_path / "stats").glob("*.png"))


def test_probes_and_captures_of_a_resumed_run_can_be_turned_off(tiny_corpus, tmp_path, capsys):
    probes = ["--supervised_classif_metric", "--speaker_sep", "--linsep_logs_dir", tmp_path / "l",
              "--linsep_classif_each_epochs", "1", "--linsep_n_epoch", "1"]  # fmt: skip
    trained(tiny_corpus, tmp_path / "run", *capture_flags(tiny_corpus, tmp_path / "c"), *probes)
    resume = ["--pathCheckpoint", tmp_path / "run", "--nEpoch"]
    off = ["--no-supervised_classif_metric", "--no-captureEverything"]
    assert run(*resume, 3, *off, "--captureCtxRepr") == 0
    assert {path.name for path in (tmp_path / "l").iterdir()} == {"1"}
    assert {path.parts[1] for path in captured(tmp_path / "c") if path.parts[0] == "2"} == {
        "ctx_repr"
    }
    assert run(*resume, 4, "--no-captureCtxRepr") == 0
    assert run(*resume, 5) == 0  # it stays as it is
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"0", "1", "2"}
    assert {path.name for path in (tmp_path / "l").iterdir()} == {"1"}
    state = checkpoint(tmp_path / "run", 4)
    assert state["args"]["supervised_classif_metric"] is False
    assert state["logs"]["speaker_best_val_acc"][2:] == [None] * 3
    assert run(*resume, 6, "--no-dropout", "--no-CPCCTC", "--no-debug") == 0
    assert "using the checkpoint's value" not in capsys.readouterr().out


def test_a_capture_reports_that_it_replaces_another(tiny_corpus, tmp_path, capsys):
    flags = capture_flags(tiny_corpus, tmp_path / "captures")
    trained(tiny_corpus, tmp_path / "run", *flags, epochs=1)
    assert "replacing" not in capsys.readouterr().out
    files = len(captured(tmp_path / "captures"))
    again = ["--onlyCapture", "--pathCheckpoint", tmp_path / "run", *on(tiny_corpus)[:2]]
    assert run(*again, *flags) == 0
    assert f"0, replacing {files} files of an earlier capture" in capsys.readouterr().out
    assert run(*again, *flags[3:], "--captureCtxRepr") == 2
    assert "0: holds a capture of conv_repr, " in capsys.readouterr().err
    assert len(captured(tmp_path / "captures")) == files


def test_a_probe_without_a_window_is_noticed_at_the_start(tiny_corpus, tmp_path, capsys):
    lines = (tiny_corpus / "phones.txt").read_text().splitlines()
    names = {(tiny_corpus / f"{name}.txt").read_text().split()[0] for name in ("train", "test")}
    chosen = [line for line in lines if line.split()[0] in names]
    labels = written(tmp_path / "labels", "\n".join(chosen))
    probe = ["--supervised_classif_metric", "--path_phone_data", labels, "--linsep_logs_dir", "L"]
    words = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path / "run", *probe]
    assert run(*words, "--nEpoch", 30, "--sizeWindow", 64000) == 2
    assert "with phone labels: not a single window" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.parametrize(("rate", "is_stuck"), [("1e-9", True), ("1e-2", False), ("0", False)])
def test_a_run_that_learns_nothing_is_reported(rate, is_stuck, tiny_corpus, tmp_path, capsys):
    trained(tiny_corpus, tmp_path, "--learningRate", rate, "--rnnMode", "linear", epochs=3)
    assert ("note: the loss, " in capsys.readouterr().out) == is_stuck


def test_a_dead_start_is_distinguished_from_a_slow_one_in_its_first_epoch(
    tiny_corpus, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(starts, "FEWEST_STEPS", 1)
    words = ["--learningRate", "1e-9", "--rnnMode", "linear", "--logging_step", "1"]
    trained(tiny_corpus, tmp_path / "slow", *words, epochs=1)
    assert "note: the loss" not in capsys.readouterr().out

    def dead(self):
        lecun(self)
        self.batchNorm4.weight.data.fill_(1e-3)
        self.batchNorm4.bias.data.fill_(1)

    lecun = CPCEncoder.lecun_initialisation
    monkeypatch.setattr(CPCEncoder, "lecun_initialisation", dead)
    trained(tiny_corpus, tmp_path / "dead", *words, epochs=1)
    said = capsys.readouterr().out
    assert said.count("this start is dead") == 1
    assert "in step 1, and encoded frames are nearly all alike (0.0 % of their energy" in said


def test_the_first_two_epochs_are_too_few_for_a_note(tiny_corpus, tmp_path, capsys):
    trained(tiny_corpus, tmp_path, "--learningRate", "1e-9", "--rnnMode", "linear", epochs=2)
    assert "note: the loss" not in capsys.readouterr().out


def test_files_without_labels_are_captured_as_with_labels(tiny_corpus, tmp_path):
    trained(tiny_corpus, tmp_path / "run", epochs=1)
    names = (tiny_corpus / "test.txt").read_text().split()
    lines = (tiny_corpus / "phones.txt").read_text().splitlines()
    one = written(
        tmp_path / "one", "\n".join(line for line in lines if line.split()[0] == names[1])
    )
    found = []
    for labels in (tiny_corpus / "phones.txt", one):
        flags = capture_flags(tiny_corpus, tmp_path / f"capture{len(found)}")
        flags[-1] = labels
        again = ["--onlyCapture", "--pathCheckpoint", tmp_path / "run", *on(tiny_corpus)[:2]]
        assert run(*again, *flags) == 0
        found.append(captured(flags[flags.index("--pathCaptureSave") + 1]))
    (every, few), seen = found, set()
    assert every.keys() == few.keys()
    for path, tensor in few.items():
        if "phone_align" not in path.parts:
            assert torch.equal(tensor, every[path])
            continue
        has = tensor >= 0
        seen |= set(has.flatten().tolist())
        assert torch.equal(tensor[has], every[path][has])
    assert seen == {True, False}


def test_a_capture_of_unlabelled_utterances_holds_all_but_their_labels(
    tiny_corpus, tmp_path, capsys
):
    flags = capture_flags(tiny_corpus, tmp_path / "capture")
    flags[-1] = written(tmp_path / "labels", "somebody-else 1 2 3\n")
    trained(tiny_corpus, tmp_path / "run", *flags, epochs=1)
    names = {path.parts[1] for path in captured(tmp_path / "capture")}
    assert names == {"conv_repr", "ctx_repr", "speaker_align", "pred"}
    assert "labels for none" in capsys.readouterr().out
    stats = ["--captureSetStats", f"phoneSim:ctx_repr,{tmp_path}"]
    again = ["--onlyCapture", "--pathCheckpoint", tmp_path / "run", *on(tiny_corpus)[:2]]
    assert run(*again, *flags, *stats) == 2
    said = capsys.readouterr()
    assert "labels for none" in said.err
    assert "warning" not in said.out


def test_a_capture_that_can_not_be_written_costs_no_epoch(tiny_corpus, tmp_path, capsys):
    (tmp_path / "capture").mkdir()
    (tmp_path / "capture" / "0").write_text("where the first capture is to go")
    flags = capture_flags(tiny_corpus, tmp_path / "capture")
    words = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path / "run", *flags]
    assert run(*words, "--nEpoch", 2) == 2
    assert str(tmp_path / "capture") in capsys.readouterr().err
    assert checkpoint(tmp_path / "run", 0)["position"] == [1, 0, 0]


@pytest.mark.parametrize("flag", ["pathCaptureSave", "linsep_logs_dir", "linsep_checkpoint_dir"])
def test_results_that_can_not_be_written_are_noticed_at_the_start(
    flag, tiny_corpus, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    flags = {name: tmp_path / name for name in ("pathCaptureSave", "linsep_logs_dir")}
    flags[flag] = tmp_path / "file" / "deep"
    words = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path / "run", "--speaker_sep",
             "--supervised_classif_metric", "--pathCaptureDS", tiny_corpus / "test.txt",
             "--captureConvRepr"]  # fmt: skip
    words += [word for name, path in flags.items() for word in (f"--{name}", path)]
    with ends_refused(capsys, f"--{flag} .*{tmp_path / 'file'} is no directory"):
        train.main([str(word) for word in words])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_pictures_of_stats_stay_where_they_were_when_a_run_resumes_from_elsewhere(
    tiny_corpus, tmp_path, monkeypatch
):
    for name in ("here", "there"):
        (tmp_path / name / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    specs = "reprDiff:cosine,ctx_repr,0.05,../pictures_reprDiff:euclid,conv_repr,0.5,../pictures"
    flags = ["--captureSetStats", specs, "--pathCaptureDS", tiny_corpus / "test.txt"]
    trained(tiny_corpus, tmp_path / "run", *flags, "--captureEachEpochs", "1", epochs=1)
    monkeypatch.chdir(tmp_path / "there" / "below")
    assert run("--pathCheckpoint", tmp_path / "run", "--nEpoch", 2) == 0
    names = {path.name for path in (tmp_path / "here" / "pictures").iterdir()}
    what = ("ctx_repr_cosine_by0.05", "conv_repr_euclid_by0.5")
    assert names == {f"reprDiff_{name}_{epoch}.png" for name in what for epoch in (0, 1)}
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["below"]


def test_a_picture_that_a_killed_run_left_unfinished_goes(tiny_corpus, tmp_path):
    words = ["--pathCheckpoint", tmp_path / "run", "--nEpoch", 1, *on(tiny_corpus), *SMALL]
    specs = f"reprDiff:cosine,ctx_repr,0.05,{tmp_path / 'pictures'}"
    stats = ["--captureSetStats", specs, "--pathCaptureDS", tiny_corpus / "test.txt"]
    kill = textwrap.dedent("""\
        import os, signal, sys
        import train
        from matplotlib.figure import Figure

        Figure.savefig = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        train.main(sys.argv[1:])
        """)
    command = [sys.executable, "-c", kill, *map(str, [*words, *stats])]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert [path.name[:9] for path in (tmp_path / "pictures").iterdir()] == [".writing-"]
    assert run(*words, *stats) == 0
    names = [path.name for path in (tmp_path / "pictures").iterdir()]
    assert names == ["reprDiff_ctx_repr_cosine_by0.05_0.png"]


@pytest.mark.parametrize("words", [["--CTC"], ["--onEncoder", "--nLevelsPhone", "2"]])
def test_speakers_can_be_probed_in_a_network_trained_on_phones(words, tiny_corpus, tmp_path):
    phones = ["--path_phone_data", tiny_corpus / "phones.txt"]
    trained(tiny_corpus, tmp_path / "run", "--supervised", *phones, *words, epochs=1)
    probe = ["--only_classif_metric", "--speaker_sep", "--linsep_n_epoch", "1"]
    logs = ["--linsep_logs_dir", tmp_path / "l"]
    assert run("--pathCheckpoint", tmp_path / "run", *probe, *logs) == 0
    assert [path.name for path in (tmp_path / "l" / "0").iterdir()] == ["speaker"]


@pytest.mark.parametrize(
    "words", [[], ["PHONES"], ["PHONES", "--CTC"], ["PHONES", "--onEncoder", "--nLevelsPhone", "2"]]
)
def test_supervised_training_learns_the_labels(words, tiny_corpus, tmp_path, capsys):
    phones = ["--path_phone_data", tiny_corpus / "phones.txt"]
    words = [item for word in words for item in (phones if word == "PHONES" else [word])]
    state = trained(tiny_corpus, tmp_path, "--supervised", "--learningRate", "0.01", *words,
                    epochs=4)  # fmt: skip
    losses = [row[0] for row in state["logs"]["locLoss_train"]]
    assert losses[-1] < losses[0]
    assert run("--pathCheckpoint", tmp_path, "--nEpoch", 5) == 0
    printed = capsys.readouterr().out
    assert "validation accuracy by" not in printed
    assert ("acc" in printed) is ("--CTC" not in words)
    assert ("trains on speaker labels" in printed) is (not words)


@pytest.mark.parametrize(
    ("words", "name", "n"),
    [([], "prediction step", 2), (["--CPCCTC", "--CPCCTCNumMatched", 3], "matched frame", 3)],
)
def test_validation_accuracies_are_called_what_they_are(
    words, name, n, tiny_corpus, tmp_path, capsys
):
    trained(tiny_corpus, tmp_path, *words, epochs=1)
    line = re.search(rf"validation accuracy by {name} \(%\): (.*)", capsys.readouterr().out)
    assert len(line[1].split()) == n


@pytest.mark.parametrize("mode", ["reverse", "none"])
def test_the_other_modes_of_cpc_run(mode, tiny_corpus, tmp_path):
    trained(tiny_corpus, tmp_path, "--cpc_mode", mode, epochs=1)


def test_a_hook_that_never_runs_is_reported_at_the_start(tiny_corpus, tmp_path, capsys):
    words = ["--supervised_classif_metric", "--speaker_sep", "--linsep_logs_dir", tmp_path / "l"]
    trained(tiny_corpus, tmp_path / "run", *words)
    assert (
        "--linsep_classif_each_epochs 20: the speaker probe never runs in 2 epochs"
        in capsys.readouterr().out
    )


ENCODERS = [["--encoder_type", "mfcc"], ["--encoder_type", "lfb"]] + [
    ["--normMode", norm] for norm in ("layerNorm", "batchNorm", "instanceNorm", "ID")
]
AR_NETWORKS = ("LSTM", "GRU", "RNN", "transformer", "no_ar")
HEADS = ("transformer", "RNN", "LSTM", "linear", "ffd", "conv4", "conv8", "conv12")


@pytest.mark.parametrize("mode", [None, "reverse"])
@pytest.mark.parametrize("aligned", [False, True], ids=["cpc", "cpc-ctc"])
@pytest.mark.parametrize("ar", AR_NETWORKS)
@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda words: words[-1])
def test_every_combination_trains(encoder, ar, aligned, mode):
    """A step with each head: every parameter that can learn gets a finite gradient."""
    small = "--hiddenEncoder 8 --hiddenGar 8 --negativeSamplingExt 4 --nPredicts 2 --sizeWindow"
    args = build_parser().parse_args([*small.split(), "3200", *encoder, "--arMode", ar])
    args.CPCCTC, args.CPCCTCNumMatched, args.cpc_mode = aligned, 4, mode
    model = build_model(args)
    batch = Batch(torch.randn(2, 1, 3200), torch.zeros(2, dtype=torch.int64), None, None, None)
    for head in HEADS:
        args.rnnMode = head
        step = Networks(build_criterion(args, n_speakers=1), model)
        step.zero_grad()
        losses, _ = step(batch)
        losses.sum().backward()
        for name, parameter in step.named_parameters():
            assert parameter.grad is not None, f"{head}: {name}"
            assert torch.isfinite(parameter.grad).all(), f"{head}: {name}"
