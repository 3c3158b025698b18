"""Tests of the commands on corpora: the synthesiser and make_demo."""

import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from utils.corpus import make_demo
from utils.corpus.synthesiser import (
    PHONES,
    VOWELS,
    Speaker,
    Tract,
    draw_speaker,
    frame_labels,
    speak,
)
from utils.files import load_json, save_json
from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME, UserError
from utils.testing import ROOT

SPEAKERS, UTTERANCES = 4, 10
SYMBOLS = list(PHONES)
A_MAN = Speaker(
    formant_scale=1.0,
    pitch=100.0,
    pitch_range=0.0,
    slowness=1.0,
    damping=1.0,
    tilt=2.0,
    breath=-40.0,
    noise_floor=-40.0,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A small demo corpus; not to be changed by a test."""
    out = tmp_path_factory.mktemp("demo") / "corpus"
    make_demo.main([str(out), "--speakers", str(SPEAKERS), "--utterances", str(UTTERANCES)])
    return out


@pytest.fixture(scope="module")
def utterances(demo):
    """name -> (samples int16, labels), of the whole corpus."""
    return {
        name: (soundfile.read(make_demo.audio_path(demo, name), dtype="int16")[0], labels)
        for name, labels in read_labels(demo).items()
    }


def read_names(path):
    return path.read_text().split("\n")[:-1]


def read_labels(out):
    lines = read_names(out / "converted_aligned_phones.txt")
    return {name: np.array(ids, int) for name, *ids in map(str.split, lines)}


def files_of(out):
    return {f.relative_to(out): f.read_bytes() for f in out.rglob("*") if f.is_file()}


# The synthesiser.


def test_every_phone_can_be_said_and_lasts_as_its_segments():
    for phone in PHONES.values():
        assert sum(segment.share for segment in phone.segments) == pytest.approx(1)
    symbols = ["SIL", *SYMBOLS, "SIL"]
    waveform, boundaries = speak(symbols, A_MAN, np.random.default_rng(0))
    assert len(waveform) == boundaries[-1]
    for symbol, start, end in zip(symbols, boundaries, boundaries[1:], strict=False):
        level = np.sqrt(np.mean(waveform[start:end] ** 2))
        assert level < 0.02 if symbol == "SIL" else 0.03 < level < 2, symbol


def test_the_neutral_vowel_has_an_rms_of_about_1():
    for seed in range(4):
        speaker = draw_speaker(np.random.default_rng(seed), female=seed % 2)
        symbols = ["SIL", *["AX"] * 20, "SIL"]
        waveform, boundaries = speak(symbols, speaker, np.random.default_rng(seed))
        vowel = waveform[boundaries[1] : boundaries[-2]]
        assert np.sqrt(np.mean(vowel**2)) == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("vowel", ["IY", "AE", "AA", "UW"])
@pytest.mark.parametrize("scale", [1.0, 1.2])
def test_formants_are_peaks_of_the_tract_and_follow_its_length(vowel, scale):
    formants = scale * np.array(VOWELS[vowel][:3])
    response = np.abs(Tract(A_MAN._replace(formant_scale=scale)).response(formants[:, None]))[0]
    peaks = np.flatnonzero((response[1:-1] > response[:-2]) & (response[1:-1] > response[2:])) + 1
    resolution = SAMPLE_RATE / 512
    for formant in formants:
        assert np.abs(peaks * resolution - formant).min() < 1.5 * resolution


@pytest.mark.parametrize("pitch", [100.0, 200.0])
def test_voice_has_the_pitch_of_the_speaker(pitch):
    speaker = A_MAN._replace(pitch=pitch)
    waveform, boundaries = speak(["SIL", "AX", "AA", "SIL"], speaker, np.random.default_rng(0))
    vowel = waveform[boundaries[2] :][:1600]
    correlation = np.correlate(vowel, vowel, "full")[len(vowel) - 1 :]
    period = 40 + np.argmax(correlation[40:250])  # periods of 64 to 400 Hz
    assert SAMPLE_RATE / period == pytest.approx(pitch, rel=0.15)  # it falls within an utterance


def test_vowels_and_sibilants_begin_and_end_where_the_boundaries_say():
    """Energy starts and stops within 8 ms of the boundary, noise and voice alike."""
    for symbol in ("AA", "S", "SH", "IY"):
        waveform, boundaries = speak(["SIL", symbol, "SIL"], A_MAN, np.random.default_rng(1))
        loud = np.flatnonzero(np.abs(waveform) > 0.05 * np.abs(waveform).max())
        assert abs(loud[0] - boundaries[1]) < 0.010 * SAMPLE_RATE + 1, symbol
        assert abs(loud[-1] - boundaries[2]) < 0.015 * SAMPLE_RATE + 1, symbol


def test_a_frame_is_labelled_with_the_phone_in_its_middle():
    symbols = ["SIL", "T", "AY", "M", "SIL"]
    boundaries = np.array([0, 1000, 1001, 2480, 4079, 5279])
    expected = []
    for frame in range(5279 // SAMPLES_PER_FRAME):
        middle = 160 * frame + 80
        spans = zip(symbols, boundaries, boundaries[1:], strict=False)
        expected += [SYMBOLS.index(symbol) for symbol, a, b in spans if a <= middle < b]
    assert frame_labels(symbols, boundaries).tolist() == expected


def test_speakers_differ_and_women_have_higher_voices():
    speakers = [draw_speaker(np.random.default_rng(i), female=i % 2) for i in range(40)]
    assert len(set(speakers)) == len(speakers)
    assert max(man.pitch for man in speakers[::2]) < min(woman.pitch for woman in speakers[1::2])


# The corpus.


def test_layout_is_that_of_librispeech(demo, utterances):
    audio = sorted((demo / "audio").rglob("*.*"))
    assert len(audio) == SPEAKERS * UTTERANCES
    for path in audio:
        assert re.fullmatch(r"(\d+)/(\d+)/\1-\2-\d{4}\.flac", str(path.relative_to(demo / "audio")))
        header = soundfile.info(path)
        assert (header.samplerate, header.channels, header.subtype) == (16000, 1, "PCM_16")
    assert sorted(utterances) == [path.stem for path in audio]
    for samples, labels in utterances.values():
        assert len(labels) == len(samples) // SAMPLES_PER_FRAME
        assert labels[0] == labels[-1] == 0  # silence


def test_lists_part_the_utterances_and_every_speaker_is_in_both(demo, utterances):
    train, test = read_names(demo / "train_split.txt"), read_names(demo / "test_split.txt")
    assert sorted(train + test) == sorted(utterances)
    assert len(test) == len(train) / 4
    for names in (train, test):
        assert len({name.split("-")[0] for name in names}) == SPEAKERS


@pytest.mark.parametrize(("utterances", "expected"), [(2, [1]), (4, [3]), (5, [4]), (12, [4, 9])])
def test_there_is_always_something_to_test_on(utterances, expected):
    settings = make_demo.Settings(1, utterances, 1)
    assert [u for u in range(utterances) if make_demo.is_for_tests(u, settings)] == expected


def test_phone_symbols_are_listed_and_the_language_uses_them_all(demo):
    rows = [line.split() for line in read_names(demo / "phones.txt")]
    assert rows == [[str(i), symbol] for i, symbol in enumerate(PHONES)]
    lexicon = make_demo.draw_lexicon(np.random.default_rng([1, 0]))
    assert {phone for word in lexicon for phone in word} == set(PHONES) - {"SIL"}


def test_words_follow_zipf():
    """The commonest tenth of the words make up about a third of what is said."""
    lexicon = [[str(word)] for word in range(300)]
    rng = np.random.default_rng(0)
    said = [
        int(p) for _ in range(400) for p in make_demo.draw_utterance(lexicon, rng) if p != "SIL"
    ]
    share = np.mean(np.array(said) < 30)
    expected = np.sum(1 / np.arange(4, 34)) / np.sum(1 / np.arange(4, 304))
    assert share == pytest.approx(expected, abs=0.03)


def test_audio_is_loud_and_never_clips(utterances):
    for name, (samples, _) in utterances.items():
        level = 20 * np.log10(np.sqrt(np.mean((samples / 32768) ** 2)))
        assert -16 < level < -12, name
        assert np.abs(samples.astype(int)).max() < 32767, name


def test_labels_agree_with_what_is_heard(utterances):
    """Frames of silence are quiet, of sibilants high, of vowels loud and low."""
    level, brightness = [], []
    for samples, labels in utterances.values():
        power = np.abs(np.fft.rfft(cut(samples, labels)[:, 80:240] / 32768)) ** 2
        level.append(10 * np.log10(power.sum(1) + 1e-9))
        brightness.append((power * np.arange(81) * 100).sum(1) / power.sum(1))
    level, brightness = np.concatenate(level), np.concatenate(brightness)
    labels = np.concatenate([labels for _, labels in utterances.values()])

    def median(values, *symbols):
        return np.median(values[np.isin(labels, [SYMBOLS.index(s) for s in symbols])])

    assert median(level, "SIL") < median(level, *VOWELS) - 20
    assert median(level, "M", "N", "NG") < median(level, *VOWELS) - 6
    assert median(brightness, *VOWELS) < 1500
    assert median(brightness, "S", "Z") > 3000 > median(brightness, "M", "N", "NG")
    assert median(brightness, "S") > median(brightness, "SH")


# What there is to learn.


def cut(samples, labels):
    """Stretches (frames, 320) of the samples around each labelled frame."""
    padded = np.pad(samples.astype(float), (80, 240))
    return np.lib.stride_tricks.sliding_window_view(padded, 320)[::160][: len(labels)]


def log_mel(samples, labels):
    """Log energies (frames, 40) in bands of equal width in mel."""
    power = np.abs(np.fft.rfft(cut(samples, labels) * np.hanning(320) / 32768, 512)) ** 2
    mel = 2595 * np.log10(1 + np.fft.rfftfreq(512, 1 / SAMPLE_RATE) / 700)
    edges = np.linspace(0, mel[-1], 42)
    distance = np.abs(mel[:, None] - edges[1:-1])
    return np.log(power @ np.clip(1 - distance / edges[1], 0, None) + 1e-5)


def accuracy_of_linear_probe(train, train_classes, test, test_classes):
    """The share of right answers of a linear discriminant (classes of one common covariance)."""
    classes = np.unique(train_classes)
    means = np.stack([train[train_classes == c].mean(0) for c in classes])
    within = train - means[np.searchsorted(classes, train_classes)]
    covariance = within.T @ within / len(within) + 1e-3 * np.eye(train.shape[1])
    directions = np.linalg.solve(covariance, means.T)
    priors = [np.mean(train_classes == c) for c in classes]
    scores = test @ directions - 0.5 * np.sum(means.T * directions, 0) + np.log(priors)
    return np.mean(classes[scores.argmax(1)] == test_classes)


def test_phones_and_speakers_can_be_told_apart_by_linear_probes(demo, utterances):
    features = {name: log_mel(*utterance) for name, utterance in utterances.items()}
    frames, phones, means, speakers = {}, {}, {}, {}
    for part in ("train", "test"):
        names = read_names(demo / f"{part}_split.txt")
        frames[part] = np.concatenate([features[name] for name in names])
        phones[part] = np.concatenate([utterances[name][1] for name in names])
        means[part] = np.stack([features[name].mean(0) for name in names])
        speakers[part] = np.array([int(name.split("-")[0]) - 201 for name in names])
    heard = phones["test"] != 0
    commonest = np.bincount(phones["train"]).max() / len(phones["train"])
    every = accuracy_of_linear_probe(
        frames["train"], phones["train"], frames["test"], phones["test"]
    )
    speech = accuracy_of_linear_probe(
        frames["train"], phones["train"], frames["test"][heard], phones["test"][heard]
    )
    assert commonest < 0.2
    assert 0.4 < every < 0.8  # one frame tells much, and leaves much to the context
    assert 0.33 < speech < 0.8
    speaker = accuracy_of_linear_probe(
        means["train"], speakers["train"], means["test"], speakers["test"]
    )
    assert speaker > 0.8


# Determinism.


def test_version_1_is_still_what_it_was(utterances):
    """Whoever changes what a seed gives raises VERSION, and writes the new figures here."""
    assert make_demo.VERSION == 1
    found = [utterances[name] for name in ("201-1-0000", "204-1-0009")]
    assert [len(samples) for samples, _ in found] == [74366, 69844]
    assert [int(labels.sum()) for _, labels in found] == [8387, 7633]
    loudness = [np.abs(samples.astype(int)).mean() for samples, _ in found]
    assert loudness == pytest.approx([4177.6, 4350.7], rel=1e-3)


def make(out, *flags):
    make_demo.main([str(out), *map(str, flags)])
    return files_of(out)


def test_same_seed_same_bytes_with_any_number_of_threads(tmp_path, monkeypatch):
    sizes = ("--speakers", 2, "--utterances", 2)
    one = make(tmp_path / "one", *sizes, "--seed", 7)
    monkeypatch.setattr(make_demo, "N_THREADS", 1)
    assert make(tmp_path / "two", *sizes, "--seed", 7) == one
    other = make(tmp_path / "three", *sizes, "--seed", 8)
    assert other.keys() == one.keys()
    assert all(other[path] != one[path] for path in one if path.suffix == ".flac")


def test_a_smaller_corpus_is_a_part_of_a_larger(demo, tmp_path):
    small, large = make(tmp_path / "small", "--speakers", 2, "--utterances", 3), files_of(demo)
    audio = [path for path in small if path.suffix == ".flac"]
    assert len(audio) == 6
    assert all(small[path] == large[path] for path in audio)
    labels = read_labels(demo)
    for name, ids in read_labels(tmp_path / "small").items():
        assert np.array_equal(ids, labels[name])


# The command.


def test_a_corpus_that_is_there_stays_as_it_is(tmp_path, monkeypatch, capsys):
    sizes = ("--speakers", 1, "--utterances", 2)
    before = make(tmp_path, *sizes)
    monkeypatch.setattr(make_demo, "write_corpus", None)
    assert make(tmp_path, *sizes) == before
    assert "already there" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["audio/201/1/201-1-0001.flac", "phones.txt", "manifest's end"])
def test_an_interrupted_corpus_is_completed(tmp_path, lost):
    sizes = ("--speakers", 1, "--utterances", 2)
    before = make(tmp_path, *sizes)
    if lost == "manifest's end":
        manifest = load_json(tmp_path / "demo_corpus.json")
        save_json(tmp_path / "demo_corpus.json", {"settings": manifest["settings"]})
        (tmp_path / "train_split.txt").unlink()
    else:
        (tmp_path / lost).unlink()
    assert make(tmp_path, *sizes) == before


def test_a_file_cut_short_by_an_interruption_is_not_taken_for_complete(tmp_path, monkeypatch):
    """The lists are all there, and so is every name of an audio file."""

    def write_half(path, samples, *args, **kwargs):
        soundfile_write(path, samples[: len(samples) // 2], *args, **kwargs)
        raise KeyboardInterrupt

    soundfile_write = soundfile.write
    sizes = ("--speakers", 1, "--utterances", 2)
    before = make(tmp_path, *sizes)
    (tmp_path / "audio/201/1/201-1-0000.flac").unlink()
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(soundfile, "write", write_half)
        make(tmp_path, *sizes)
    assert files_of(tmp_path).keys() == before.keys()
    assert make(tmp_path, *sizes) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "3"], "holds another demo corpus .*--seed 1.*--seed 3"),
        (["--speakers", "0"], "--speakers 0: .*at least 1"),
        (["--utterances", "1"], "--utterances 1: .*at least 2"),
        (["--seed", "-1"], "--seed -1: .*at least 0"),
        (["--speakers", "many"], "--speakers: invalid int value"),
        (["--frogs"], "unrecognized arguments: --frogs"),
    ],
)
def test_refusals(demo, flags, message):
    before = files_of(demo)
    with pytest.raises(UserError, match=message):
        make_demo.main([str(demo), *flags])
    assert files_of(demo) == before


def test_other_content_is_not_mixed_with(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        make_demo.main([str(tmp_path)])
    with pytest.raises(UserError, match="is no directory"):
        make_demo.main([str(tmp_path / "thesis.tex")])
    with pytest.raises(UserError, match="can't be written"):
        make_demo.main([str(tmp_path / "thesis.tex" / "corpus"), "--speakers", "1"])
    (tmp_path / "demo_corpus.json").write_text('["something else"]')
    with pytest.raises(UserError, match="holds another demo corpus"):
        make_demo.main([str(tmp_path)])
    assert files_of(tmp_path).keys() == {path.relative_to(tmp_path) for path in tmp_path.iterdir()}


def run(*command, cwd):
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_it_runs_as_a_script_from_anywhere_and_as_a_module(tmp_path):
    script = ROOT / "utils" / "corpus" / "make_demo.py"
    done = run(script, "out", "--speakers", 1, "--utterances", 2, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("out: 1 speakers, 2 utterances")
    refused = run("-m", "utils.corpus.make_demo", tmp_path / "out", "--seed", 2, cwd=ROOT)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        make_demo.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("OUT", "--speakers", "--utterances", "--seed"))
