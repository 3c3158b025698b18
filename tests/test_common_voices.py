"""Tests of common_voices_eval.py."""

import json
import os
import re

import numpy as np
import pytest
import soundfile
import torch

from eval import common_voices_eval
from eval.common_voices_eval import CTCPhoneRecognizer, normalize_over_time
from eval.utterances import StoredUtteranceFeatures, UtteranceFeatures, cut_into_batches, encode
from feature_loader import load_model
from model import build_model
from tests.helpers import assert_close
from tests.test_probes import save_model, status_of
from utils.run.flags import build_parser

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
    """Other seeds end at 0 %, too; at a learning rate of 0.01, rounding makes 3 % or 25 % of it."""
    out = tmp_path / "out"
    words = "--seqNorm --kernelSize 6 --lr 0.005".split()
    assert learn(speech, out, *words, "--pathVal", speech / "test.txt", epochs=30) == 0
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
    assert "once for each time it is spoken, not for each frame" in capsys.readouterr().err


def test_measuring_needs_something_trained(speech, tmp_path, capsys):
    assert recognise("per", tmp_path) == 2
    error = capsys.readouterr().err
    assert "nothing was trained there (no args_training.json); run `train` first" in error
    (tmp_path / "args_training.json").write_text("{}")
    assert recognise("per", tmp_path) == 2
    assert "not written by `train`" in capsys.readouterr().err
    assert recognise() == 2
    assert "COMMAND" in capsys.readouterr().err


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
    batches = cut_into_batches(lengths, 8, generator)
    assert sorted(torch.cat(batches).tolist()) == list(range(103))
    assert [len(batch) for batch in batches].count(8) == 12
    padded = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    assert padded < 1.25 * lengths.sum()
    if generator:
        others = cut_into_batches(lengths, 8, generator)
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


def test_stored_features_are_the_recomputed_ones(speech):
    args = common_voices_eval.parse_arguments(
        ["train", *map(str, (speech / "audio", speech / "phones.txt", speech / "run")), *QUICK]
    )
    corpus, labels = common_voices_eval.list_utterances(args)
    model, *_ = load_model([speech / "run"])
    recogniser = CTCPhoneRecognizer(16, labels.n_phones)
    utterances = common_voices_eval.build_set(
        args, corpus, list(corpus.utterances), labels, recogniser, model.eval(), "training set"
    )
    fresh = UtteranceFeatures(utterances, model, torch.device("cpu"))
    stored = StoredUtteranceFeatures(fresh, 2, torch.device("cpu"))

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
