"""Tests of build_zeroSpeech_features.py and zerospeech2021.py."""

import os
import re

import numpy as np
import pytest
import soundfile
import torch

from criterion.classification import PhoneCriterion
from eval import build_zeroSpeech_features, cluster, quantize, zerospeech2021
from feature_loader import ModelPhoneCombined, build_feature, load_model
from tests.helpers import assert_close
from tests.test_probes import save_model, status_of
from utils.files import load_json


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
    (tmp_path / "list").write_text("b\n")
    words = ["--format", "pt", "--seqList", tmp_path / "list", *words]
    assert build(audio, tmp_path / "out", model_file, *words) == 0
    assert os.listdir(tmp_path / "out") == ["b.pt"]
    features = torch.load(tmp_path / "out" / "b.pt", weights_only=True)
    model, *_ = load_model([model_file])
    assert_close(features, build_feature(model, audio / "b.wav", **options)[0])


def test_features_normalised_by_speaker(tmp_path, audio, model_file, capsys):
    words = "--format", "pt", "--feature_norm", "speaker"
    assert build(audio, tmp_path / "out", model_file, *words) == 2
    assert "--feature_norm speaker: a.wav isn't in a speaker's folder" in capsys.readouterr().err
    (audio / "s").mkdir()
    for name in ("a.wav", "b.wav"):
        (audio / name).rename(audio / "s" / name)
    out = tmp_path / "normal"
    assert build(audio, out, model_file, *words) == 0
    (out / "b.pt").unlink()  # as if the call had been stopped
    assert build(audio, out, model_file, *words) == 0
    model, *_ = load_model([model_file])
    a, b = (build_feature(model, audio / "s" / f"{name}.wav")[0].double() for name in "ab")
    frames = torch.cat([a, b])
    expected = (b - frames.mean(0)) / (frames.var(0) + 1e-8).sqrt()
    assert_close(torch.load(out / "b.pt", weights_only=True), expected.float(), 1e-4)


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


def test_units_and_distances_are_of_the_features_that_were_clustered(tmp_path, audio, model_file):
    """Of frames of unit length, or of all frames standardised, as stored with the centers."""
    for flag in ("--norm_vec_len", "--standardise"):
        words = [model_file, tmp_path / f"{flag}.pt", audio, "-k", 20, "--encoder_layer", flag]
        cluster.main(list(map(str, [*words, "--speaker_level", 0])))
        quantize.main([str(words[1]), str(audio), str(tmp_path / flag), "--format", "onehot-npy"])
        for kind in ([], ["--oneHot"]):
            out = tmp_path / f"{flag}{kind}"
            assert (
                build(audio, out, model_file, "--format", "npy", "--clusters", words[1], *kind) == 0
            )
            for name in "abc":
                rows = np.load(out / f"{name}.npy")
                expected = np.load(tmp_path / flag / "onehot" / f"{name}.npy")
                found = rows.argmax(1) if kind else rows.argmin(1)
                assert found.tolist() == expected.argmax(1).tolist()
                assert not kind or (rows == expected).all()


def test_files_with_the_same_name_keep_their_folders(tmp_path, audio, model_file):
    soundfile.write(audio / "more" / "a.wav", np.full(3200, 0.1), 16000)
    assert build(audio, tmp_path / "out", model_file, "--format", "npy") == 0
    names = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.npy")}
    assert {str(name) for name in names} == {"a.npy", "b.npy", "c.npy", "more/a.npy"}
    assert len(np.load(tmp_path / "out/more/a.npy")) == 20


def test_a_stopped_call_resumes(tmp_path, audio, model_file, capsys):
    words = (audio, tmp_path / "out", model_file, "--format", "npy")
    assert build(*words) == 0
    before = (tmp_path / "out" / "b.npy").read_bytes()
    (tmp_path / "out" / "b.npy").unlink()
    (tmp_path / "out" / "a.npy").write_bytes(b"kept as it is")
    (tmp_path / "out" / ".writing-123.npy").write_bytes(b"left by a killed run")
    assert build(*words) == 0
    assert "2 of 3 files already have their features" in capsys.readouterr().out
    assert (tmp_path / "out" / "b.npy").read_bytes() == before
    assert (tmp_path / "out" / "a.npy").read_bytes() == b"kept as it is"
    assert not (tmp_path / "out" / ".writing-123.npy").exists()


def test_features_of_other_flags_are_not_mixed(tmp_path, audio, model_file, capsys):
    assert build(audio, tmp_path / "out", model_file) == 0
    assert build(audio, tmp_path / "out", model_file, "--getEncoded") == 2
    assert "made with another getEncoded" in capsys.readouterr().err


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
        (["--train_mode"], "features would be random"),
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
    for words, reason in (
        ((tmp_path / "none", tmp_path / "out", model_file), "none: no such directory"),
        ((audio / "more", tmp_path / "out", tmp_path / "none.pt"), "none.pt: no such"),
        ((audio / "more", tmp_path / "file", model_file), "file: can't be written"),
        (
            (audio / "more", tmp_path / "out", model_file, "--clusters", tmp_path / "wide.npy"),
            "9 dimensions for features of 8",
        ),
    ):
        assert build(*words) == 2
        assert reason in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ 2021


@pytest.fixture
def challenge(tmp_path):
    """The folders of the challenge's audio: two files in each set, one name twice, one strange."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(zerospeech2021.SETS):
        for file in (f"{number}-a", "same"):
            path = tmp_path / "data" / "phonetic" / name / f"{file}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, rng.uniform(-0.5, 0.5, 2000 + 500 * number), 16000)
    (tmp_path / "data" / "lexical").mkdir()
    soundfile.write(tmp_path / "data" / "lexical" / "word.wav", np.zeros(1600), 16000)
    return tmp_path / "data"


def check_submission(submission, dataset):
    """The challenge's rules: every file of the four sets, 2-D float64, one width, two rows."""
    expected = {path.relative_to(dataset) for path in dataset.glob("phonetic/*/*.wav")}
    found = {path.relative_to(submission) for path in submission.glob("phonetic/*/*")}
    assert found == {path.with_suffix(".npy") for path in expected}
    arrays = [np.load(submission / path) for path in found]
    assert {array.ndim for array in arrays} == {2}
    assert {array.dtype for array in arrays} == {np.dtype("float64")}
    assert len({array.shape[1] for array in arrays}) == 1
    assert min(len(array) for array in arrays) >= 2
    lines = (submission / "params.yaml").read_text().splitlines()
    assert dict(line.split(": ") for line in lines) == {"feature_size": "0.01", "metric": "cosine"}
    meta = {line.split(":")[0] for line in (submission / "meta.yaml").read_text().splitlines()}
    fields = {"author", "affiliation", "description", "open_source", "train_set", "gpu_budget"}
    assert fields <= meta
    assert {path.name for path in submission.iterdir()} == {
        "phonetic", "code", "params.yaml", "meta.yaml"
    }  # fmt: skip


def test_submission_of_features_and_of_units(tmp_path, challenge, model_file, capsys):
    words = [challenge, tmp_path / "features", model_file, "--getEncoded"]
    assert status_of(zerospeech2021.main, *words) == 0
    check_submission(tmp_path / "features", challenge)
    expected = build_feature(
        load_model([model_file])[0], challenge / "phonetic/test-other/same.wav", get_encoded=True
    )
    features = np.load(tmp_path / "features/phonetic/test-other/same.npy")
    assert_close(torch.from_numpy(features), expected[0].double())
    (tmp_path / "features/meta.yaml").write_text("mine")
    assert status_of(zerospeech2021.main, *words) == 0
    assert (tmp_path / "features/meta.yaml").read_text() == "mine"

    np.save(tmp_path / "c.npy", torch.randn(5, 8).numpy())
    quantize.main([str(tmp_path / "c.npy"), str(challenge / "phonetic"), str(tmp_path / "units"),
                   "--pathCheckpoint", str(model_file)])  # fmt: skip
    units = tmp_path / "units/quantized_outputs.txt"
    assert status_of(zerospeech2021.main, challenge, tmp_path / "onehot", units) == 0
    check_submission(tmp_path / "onehot", challenge)
    words = [challenge, tmp_path / "direct", model_file, "--oneHot", "--clusters"]
    assert status_of(zerospeech2021.main, *words, tmp_path / "c.npy") == 0
    for path in (tmp_path / "onehot").glob("phonetic/*/*.npy"):
        direct = np.load(tmp_path / "direct" / path.relative_to(tmp_path / "onehot"))
        assert np.array_equal(np.load(path).argmax(1), direct.argmax(1))


def test_what_no_submission_can_be_made_of_is_refused(tmp_path, challenge, model_file, capsys):
    units, lines = tmp_path / "units.txt", []
    for path in sorted(challenge.glob("phonetic/*/*.wav")):
        n_frames = soundfile.info(path).frames // 160
        lines.append(f"{path.parent.name}/{path.stem}\t{','.join(['1', '0'] * n_frames)}")
    units.write_text("\n".join(lines[1:]))
    for reason, words in {
        "--strict is for features": (challenge, units, "--strict"),
        "has no folder phonetic": (tmp_path, model_file),
        "none.txt: can't be read": (challenge, tmp_path / "none.txt"),
        "has no units in": (challenge, units),
    }.items():
        source, *flags = words[1:]
        assert status_of(zerospeech2021.main, words[0], tmp_path / "out", source, *flags) == 2
        assert reason in capsys.readouterr().err
    (challenge / "phonetic/dev-clean").rename(challenge / "phonetic/train")
    soundfile.write(challenge / "phonetic/dev-other/short.wav", np.ones(313), 16000)
    assert status_of(zerospeech2021.main, challenge, tmp_path / "short", model_file) == 2
    captured = capsys.readouterr()
    assert "has no dev-clean: the challenge wants all four sets" in captured.out
    assert "short.wav: has only 1 frame, the challenge wants two" in captured.err
