"""Tests of the commands on data: the demo corpus, and getting one's own data ready."""

import errno
import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from praatio import textgrid

from tests.helpers import ROOT, assert_close, ends_refused
from utils.corpus import adjust_sample_rate, convert_alignments, make_demo, make_split
from utils.corpus.synthesiser import (
    PHONES,
    VOWELS,
    Speaker,
    Tract,
    draw_speaker,
    frame_labels,
    speak,
)
from utils.data.corpus import read_utterance_list, scan_corpus, select_utterances
from utils.data.labels import (
    SILENCE,
    Interval,
    frame_symbols,
    frames_before,
    read_phone_labels,
    read_symbols,
    runs,
    symbols_beside,
    write_labels,
    write_symbols,
)
from utils.data.names import files_by_key, files_by_shortest_key
from utils.files import load_json, save_json, writing_to
from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME, UserError
from utils.torchaudio_import import torchaudio

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
        assert sum(segment.fraction for segment in phone.segments) == pytest.approx(1)
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


def test_vowels_and_sibilants_begin_and_end_at_the_boundaries():
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
    """The most frequent tenth of the words makes up about a third of what is said."""
    lexicon = [[str(word)] for word in range(300)]
    rng = np.random.default_rng(0)
    said = [
        int(p) for _ in range(400) for p in make_demo.draw_utterance(lexicon, rng) if p != "SIL"
    ]
    fraction = np.mean(np.array(said) < 30)
    expected = np.sum(1 / np.arange(4, 34)) / np.sum(1 / np.arange(4, 304))
    assert fraction == pytest.approx(expected, abs=0.03)


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
    """The fraction of right answers of a linear discriminant (classes of one common covariance)."""
    classes = np.unique(train_classes)
    means = np.stack([train[train_classes == c].mean(0) for c in classes])
    within = train - means[np.searchsorted(classes, train_classes)]
    covariance = within.T @ within / len(within) + 1e-3 * np.eye(train.shape[1])
    directions = np.linalg.solve(covariance, means.T)
    priors = [np.mean(train_classes == c) for c in classes]
    scores = test @ directions - 0.5 * np.sum(means.T * directions, 0) + np.log(priors)
    return np.mean(classes[scores.argmax(1)] == test_classes)


def test_linear_probes_separate_phones_and_speakers(demo, utterances):
    features = {name: log_mel(*utterance) for name, utterance in utterances.items()}
    frames, phones, means, speakers = {}, {}, {}, {}
    for part in ("train", "test"):
        names = read_names(demo / f"{part}_split.txt")
        frames[part] = np.concatenate([features[name] for name in names])
        phones[part] = np.concatenate([utterances[name][1] for name in names])
        means[part] = np.stack([features[name].mean(0) for name in names])
        speakers[part] = np.array([int(name.split("-")[0]) - 201 for name in names])
    heard = phones["test"] != 0
    majority = np.bincount(phones["train"]).max() / len(phones["train"])
    every = accuracy_of_linear_probe(
        frames["train"], phones["train"], frames["test"], phones["test"]
    )
    speech = accuracy_of_linear_probe(
        frames["train"], phones["train"], frames["test"][heard], phones["test"][heard]
    )
    assert majority < 0.2
    assert 0.4 < every < 0.8  # one frame shows much, its neighbours more
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
    with monkeypatch.context() as context, pytest.raises(SystemExit):
        context.setattr(soundfile, "write", write_half)
        make(tmp_path, *sizes)
    assert files_of(tmp_path).keys() == before.keys()
    assert make(tmp_path, *sizes) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "3"], "holds another demo corpus .*--seed 1.*--seed 3"),
        (["--speakers", "0"], "--speakers 0: must be at least 1"),
        (["--utterances", "1"], "--utterances 1: must be at least 2"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--speakers", "many"], "--speakers 'many': must be a whole number"),
        (["--frogs"], "unrecognized flag --frogs"),
    ],
)
def test_refusals(demo, flags, message, capsys):
    before = files_of(demo)
    with ends_refused(capsys, message):
        make_demo.main([str(demo), *flags])
    assert files_of(demo) == before


def test_other_content_is_not_mixed_with(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    with ends_refused(capsys, "is not empty"):
        make_demo.main([str(tmp_path)])
    with ends_refused(capsys, "is no directory"):
        make_demo.main([str(tmp_path / "thesis.tex")])
    with ends_refused(capsys, "can't be written"):
        make_demo.main([str(tmp_path / "thesis.tex" / "corpus"), "--speakers", "1"])
    (tmp_path / "demo_corpus.json").write_text('["something else"]')
    with ends_refused(capsys, "holds another demo corpus"):
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


def refused(main, *arguments):
    """Run a command that must refuse; nothing else may leave it."""
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    assert error.value.code == 2


# ---------------------------------------------------------------------------------- alignments


def test_a_label_is_the_phone_at_the_middle_of_its_frame():
    draw = random.Random(0)
    times = sorted({0.0, *(round(draw.uniform(0, 2), 4) for _ in range(40))})
    intervals = [
        Interval(start, end, f"p{i}") for i, (start, end) in enumerate(itertools.pairwise(times))
    ]
    symbols = frame_symbols(intervals, times[-1], "gap")
    assert len(symbols) == int(times[-1] * SAMPLE_RATE) // SAMPLES_PER_FRAME
    for frame, symbol in enumerate(symbols):
        middle = (SAMPLES_PER_FRAME * frame + SAMPLES_PER_FRAME // 2) / SAMPLE_RATE
        assert [symbol] == [s for start, end, s in intervals if start <= middle < end]


def test_decimal_times_are_exact():
    assert [frames_before(t) for t in (0.0, 0.005, 0.0051, 0.145, 0.15, 2.675)] == [
        0,
        0,
        1,
        14,
        15,
        267,
    ]
    symbols = frame_symbols([Interval(0.0, 0.07, "a"), Interval(0.1, 1.1, "b")], 1.13, "gap")
    assert symbols == ["a"] * 7 + ["gap"] * 3 + ["b"] * 100 + ["gap"] * 3


def random_alignments(seed=0, n_utterances=6):
    """name -> ids; the last id is silence, as is always the beginning and never the end."""
    rng = np.random.default_rng(seed)
    labels = {}
    for i in range(n_utterances):
        phones = rng.integers(0, len(PHONES) - 1, 30)
        row = np.repeat(np.append(len(PHONES) - 1, phones), rng.integers(1, 20, 31))
        labels[f"{i}-utt"] = row.tolist()
    return labels


def symbols_of_demo():
    """symbol -> id, with silence last, so that ids aren't those that a converter would give."""
    others = sorted(set(PHONES) - {SILENCE})
    return {symbol: number for number, symbol in enumerate([*others, SILENCE])}


@pytest.fixture
def alignments(tmp_path):
    """A label file and a symbol file: (labels, symbols, their folder)."""
    labels, symbols = random_alignments(), symbols_of_demo()
    write_labels(tmp_path / "labels.txt", labels)
    write_symbols(tmp_path / "phones.txt", symbols)
    return labels, symbols, tmp_path


def write_textgrids(folder, labels, symbols, format="long_textgrid"):
    """TextGrids like those of the Montreal Forced Aligner: silence is an empty interval."""
    names = {number: symbol for symbol, number in symbols.items()}
    for name, row in labels.items():
        entries = [
            (first / 100, end / 100, "" if names[label] == SILENCE else names[label])
            for first, end, label in runs(row)
        ]
        grid = textgrid.Textgrid()
        grid.addTier(textgrid.IntervalTier("words", [(0, len(row) / 100, "word")]))
        grid.addTier(textgrid.IntervalTier("phones", entries, 0, len(row) / 100))
        path = folder / name.split("-")[0] / f"{name}.TextGrid"
        path.parent.mkdir(parents=True)
        grid.save(str(path), format=format, includeBlankSpaces=True)


def write_ctm(path, labels, symbols):
    """A CTM file like Kaldi's, without lines for silence."""
    names = {number: symbol for symbol, number in symbols.items()}
    with open(path, "w") as file:
        for name, row in labels.items():
            for first, end, label in runs(row):
                if names[label] != SILENCE:
                    duration = (end - first) / 100
                    file.write(f"{name} 1 {first / 100:.2f} {duration:.2f} {names[label]} 1.0\n")


@pytest.mark.parametrize("form", ["long_textgrid", "short_textgrid", "ctm"])
def test_round_trip(alignments, form):
    labels, symbols, folder = alignments
    if form == "ctm":
        write_ctm(folder / "in.ctm", labels, symbols)
        source = folder / "in.ctm"
    else:
        write_textgrids(folder / "in", labels, symbols, form)
        source = folder / "in"
    convert_alignments.main(
        [str(source), str(folder / "out"), "--phones", str(folder / "phones.txt")]
    )
    converted = read_phone_labels(folder / "out" / "converted_aligned_phones.txt").labels
    assert {name: row.tolist() for name, row in converted.items()} == labels
    assert read_symbols(folder / "out" / "phones.txt") == symbols


def test_new_ids_begin_with_silence(tmp_path):
    (tmp_path / "a.ctm").write_text(
        ";; a comment\n"
        "u1 1 0.00 0.02 sil\nu1 1 0.02 0.03 AH0_B\nu1 1 0.05 0.02 B_E\n"
        "u2 A 0.00 0.01 AH1_S 0.9\nu2 A 0.02 0.01 sp\n"
    )
    flags = ["--strip_stress", "--strip_position"]
    convert_alignments.main([str(tmp_path / "a.ctm"), str(tmp_path / "out"), *flags])
    labels = (tmp_path / "out" / "converted_aligned_phones.txt").read_text()
    assert labels == "u1 0 0 1 1 1 2 2\nu2 1 0 0\n"
    assert (tmp_path / "out" / "phones.txt").read_text() == "0 SIL\n1 AH\n2 B\n"
    flags = ["--silence", "sp", "--force"]
    convert_alignments.main([str(tmp_path / "a.ctm"), str(tmp_path / "out"), *flags])
    symbols = read_symbols(tmp_path / "out" / "phones.txt")
    assert list(symbols) == ["SIL", "AH0_B", "AH1_S", "B_E", "sil"]


def test_labels_and_symbols_are_replaced_only_with_force(tmp_path, capsys):
    ctm, out = tmp_path / "a.ctm", tmp_path / "out"
    call = [str(ctm), str(out)]
    ctm.write_text("u1 1 0 0.02 A\n")
    convert_alignments.main(call)
    before = files_of(out)
    convert_alignments.main(call)
    ctm.write_text("u1 1 0 0.02 B\n")  # the same labels of other symbols
    with ends_refused(capsys, r"phones\.txt: already exists, with other symbols.*--force"):
        convert_alignments.main(call)
    ctm.write_text("u1 1 0 0.02 A\nu2 1 0 0.02 A\n")  # other labels of the same symbols
    with ends_refused(capsys, r"phones\.txt: already exists, with other labels.*--force"):
        convert_alignments.main([*call, "--phones", str(out / "phones.txt")])
    assert files_of(out) == before
    convert_alignments.main([*call, "--force"])
    assert (out / "converted_aligned_phones.txt").read_text() == "u1 1 1\nu2 1 1\n"


def test_phones_of_an_earlier_call_are_reused(tmp_path, capsys):
    (tmp_path / "a.ctm").write_text("u1 1 0 0.02 A\n")
    (tmp_path / "phones.txt").write_text("3 SIL\n7 A\n")
    flags = ["--phones", tmp_path / "phones.txt"]
    convert_alignments.main([str(part) for part in (tmp_path / "a.ctm", tmp_path / "out", *flags)])
    assert (tmp_path / "out" / "converted_aligned_phones.txt").read_text() == "u1 7 7\n"
    (tmp_path / "a.ctm").write_text("u1 1 0 0.02 A\nu2 1 0 0.02 Q\n")
    refused(convert_alignments.main, tmp_path / "a.ctm", tmp_path / "out", *flags)
    assert "u2: has phones that aren't in" in capsys.readouterr().err
    (tmp_path / "phones.txt").write_text("7 A\n")
    refused(convert_alignments.main, tmp_path / "a.ctm", tmp_path / "out", *flags)
    assert "has no SIL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("u1 1 0.5 A", "line 2: not `name channel start duration phone`"),
        ("u1 1 0.5 long A", "line 2: not `name"),
        ("u1 1 -0.5 0.1 A", "line 2: not `name"),
        ("u1 1 0.02 0.1 A", "line 2: begins at 0.02 s, but the phone before it"),
        ("u2 0 0 3 3 3 3 3 3", "line 2: not `name"),  # labels of frames
    ],
)
def test_broken_ctm_is_named(tmp_path, capsys, line, message):
    (tmp_path / "a.ctm").write_text(f"u1 1 0 0.1 A\n{line}\n")
    refused(convert_alignments.main, tmp_path / "a.ctm", tmp_path / "out")
    assert f"a.ctm, {message}" in capsys.readouterr().err


def test_two_channels_of_a_ctm_are_not_merged(tmp_path, capsys):
    ctm, out = tmp_path / "a.ctm", tmp_path / "out"
    ctm.write_text("c A 0 0.02 X\nc B 0.05 0.02 Y\nd B 0 0.03 Y\n")
    refused(convert_alignments.main, ctm, out)
    assert "a.ctm, line 2: c has two channels, A and B: " in capsys.readouterr().err
    convert_alignments.main([str(ctm), str(out), "--channel", "B"])
    labels = read_phone_labels(out / "converted_aligned_phones.txt").labels
    assert {name: row.tolist() for name, row in labels.items()} == {
        "c": [0] * 5 + [1] * 2,
        "d": [1] * 3,
    }
    refused(convert_alignments.main, ctm, out, "--channel", "C")
    assert "phone` of channel C" in capsys.readouterr().err
    refused(convert_alignments.main, tmp_path, out, "--channel", "A")
    assert "--channel: for CTM files only" in capsys.readouterr().err


@pytest.mark.parametrize("n_cut", [1, 2])
def test_textgrids_of_another_origin_are_questioned(n_cut, tmp_path, capsys):
    moved = GRID.replace("xmin = 0\n", "xmin = 0.05\n")
    for number in range(3):
        text = moved if number < n_cut else GRID
        (tmp_path / f"{number}.TextGrid").write_text(text)
    call, said = [str(tmp_path), str(tmp_path / "out")], f": {n_cut} of 3 TextGrids don't begin at"
    if n_cut == 1:
        convert_alignments.main(call)
        assert f"warning: {tmp_path}{said}" in capsys.readouterr().out
    else:
        refused(convert_alignments.main, *call)
        assert f"{tmp_path}{said} 0 s, such as 0 (0.05 s)" in capsys.readouterr().err


def test_labels_of_frames_are_no_ctm(tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("u1 0 0 0 0\nu2 0 0 0 1 1\n")
    with ends_refused(
        capsys, r"labels\.txt: no utterance in it has phones.*`name channel start duration"
    ):
        convert_alignments.main([str(tmp_path / "labels.txt"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


GRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 0.4
tiers? <exists>
size = 1
item []:
    item [1]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 0.4
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 0.1
            text = "A"
        intervals [2]:
            xmin = 0.1
            xmax = 0.4
            text = "B C"
"""


def test_textgrid_in_any_encoding(tmp_path):
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "a.TextGrid").write_text(GRID, encoding=encoding)
        convert_alignments.main([str(tmp_path), str(tmp_path / "out")])
        labels = (tmp_path / "out" / "converted_aligned_phones.txt").read_text()
        assert labels == f"a {' '.join('1' * 10 + '2' * 30)}\n"
        assert (tmp_path / "out" / "phones.txt").read_text() == "0 SIL\n1 A\n2 B_C\n"


def test_a_textgrid_whose_name_a_label_file_cannot_hold_is_refused(tmp_path, capsys):
    (tmp_path / "a second take.TextGrid").write_text(GRID)
    refused(convert_alignments.main, tmp_path, tmp_path / "out")
    assert "rename these and their audio: a second take" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("found", "instead", "message"),
    [
        ("xmax = 0.1", "xmax = soon", "a.TextGrid, line 17: not a valid TextGrid"),
        ('text = "A"', "text = A", "a.TextGrid, line 18: not a valid TextGrid"),
        ("xmin = 0.1", "xmin = 0.05", "a.TextGrid, line 20: not a valid TextGrid"),
        (
            '            xmax = 0.4\n            text = "B C"\n',
            "",
            "a.TextGrid, line 20: not a valid",
        ),
        (GRID[GRID.index("        intervals [2]") :], "", "a.TextGrid, line 18: cut off"),
        ('name = "phones"', 'name = "words"', "0 tiers are named phones; there are words"),
        (GRID, "", "a.TextGrid: can't be read (empty)"),
        (GRID, "hello\n", "a.TextGrid: not a valid TextGrid"),
    ],
)
def test_broken_textgrid_is_named(tmp_path, capsys, found, instead, message):
    (tmp_path / "a.TextGrid").write_text(GRID.replace(found, instead))
    refused(convert_alignments.main, tmp_path, tmp_path / "out")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_textgrids_are_read_by_processes_as_without(alignments, monkeypatch):
    labels, symbols, folder = alignments
    write_textgrids(folder / "in", labels, symbols)
    monkeypatch.setattr(convert_alignments, "MIN_FILES_FOR_PROCESSES", 2)
    arguments = [str(folder / "in"), str(folder / "out"), "--phones", str(folder / "phones.txt")]
    convert_alignments.main([*arguments, "--n_process", "2"])
    converted = read_phone_labels(folder / "out" / "converted_aligned_phones.txt").labels
    assert {name: row.tolist() for name, row in converted.items()} == labels


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0 A\nB 1\n", "line 2: not `id symbol`"),
        ("0 A\n1\n", "line 2: not `id symbol`"),
        ("0 A\n0 B\n", "line 2: '0 B' is a duplicate"),
        ("0 A\n1 A\n", "line 2: '1 A' is a duplicate"),
        ("", "no symbols"),
    ],
)
def test_broken_symbol_files_are_named(tmp_path, content, message):
    (tmp_path / "phones.txt").write_text(content)
    with pytest.raises(UserError, match=f"phones.txt.*{message}"):
        read_symbols(tmp_path / "phones.txt")


def test_symbols_beside_labels_only_if_they_are_symbols_of_all(tmp_path):
    labels = tmp_path / "converted_aligned_phones.txt"
    assert symbols_beside(labels, 2) == symbols_beside(None, 2) == {}
    write_symbols(tmp_path / "phones.txt", {"SIL": 0, "a": 1})
    assert symbols_beside(labels, 2) == {0: "SIL", 1: "a"}
    assert symbols_beside(labels, 3) == {}
    write_labels(tmp_path / "phones.txt", {"1-1": [0, 1, 1]})
    assert symbols_beside(labels, 2) == symbols_beside(tmp_path / "phones.txt", 2) == {}


# --------------------------------------------------------------------------------------- splits


def empty_corpus(root, sizes):
    """Empty files: speaker -> how many."""
    for speaker, size in sizes.items():
        for i in range(size):
            path = root / speaker / "chapter" / f"{speaker}-{i}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


def split(root, out, *flags):
    make_split.main([str(root), str(out), *map(str, flags)])
    return [(out / name).read_text().split("\n")[:-1] for name in ("train.txt", "val.txt")]


def speaker_of(name):
    return name.split("-")[0]


def test_split_by_utterance_keeps_all_speakers(tmp_path):
    root = empty_corpus(tmp_path / "audio", {"a": 20, "b": 40, "c": 2, "d": 1})
    train, validation = split(root, tmp_path / "out", "--validation", 0.2)
    assert len(train) + len(validation) == len({*train, *validation}) == 63
    assert [len([n for n in validation if speaker_of(n) == s]) for s in "abcd"] == [4, 8, 1, 0]
    assert split(root, tmp_path / "again", "--validation", 0.2) == [train, validation]
    assert split(root, tmp_path / "other", "--validation", 0.2, "--seed", 1)[1] != validation
    empty_corpus(root, {"aa": 10})
    more = split(root, tmp_path / "more", "--validation", 0.2)[1]
    assert [name for name in more if speaker_of(name) != "aa"] == validation


def test_split_by_speaker_divides_speakers(tmp_path):
    root = empty_corpus(tmp_path / "audio", {f"s{i}": 3 + i % 4 for i in range(20)})
    flags = ["--by", "speaker", "--validation", 0.25]
    train, validation = split(root, tmp_path / "out", *flags)
    assert {*map(speaker_of, train)}.isdisjoint(map(speaker_of, validation))
    assert abs(len(validation) - 0.25 * 90) <= 3
    assert split(root, tmp_path / "again", *flags) == [train, validation]
    assert split(root, tmp_path / "other", *flags, "--seed", 3)[1] != validation
    few = empty_corpus(tmp_path / "few", {"a": 9, "b": 8})
    assert {*map(speaker_of, split(few, tmp_path / "new", "--by", "speaker")[1])} == {"b"}


def test_split_warns_of_folders_that_are_no_speakers(tmp_path, capsys):
    root = empty_corpus(tmp_path / "TRAIN", {"DR1/F": 3, "DR1/G": 3, "DR2/H": 3})
    split(root, tmp_path / "out", "--by", "speaker")
    assert "DR1, DR2 count as speakers, and each holds only folders" in capsys.readouterr().out
    split(root, tmp_path / "other", "--by", "speaker", "--speaker_level", 2)
    assert "warning" not in capsys.readouterr().out


def test_split_replaces_other_lists_only_with_force(tmp_path, capsys):
    root, out = empty_corpus(tmp_path / "audio", {"a": 20, "b": 20}), tmp_path / "out"
    before = split(root, out)
    assert split(root, out) == before
    with ends_refused(capsys, r"train\.txt: already exists, with other names.*--force"):
        split(root, out, "--seed", 1)
    assert split(root, out) == before
    assert split(root, out, "--seed", 1, "--force") != before


def test_names_that_are_no_utf8_are_split_like_others(tmp_path):
    root = empty_corpus(tmp_path / "audio", {"a": 4, os.fsdecode(b"\xff"): 4})
    train, validation = (tmp_path / "out" / name for name in ("train.txt", "val.txt"))
    for _ in range(2):  # the second time, what is there is the same
        make_split.main([str(root), str(tmp_path / "out")])
    names = {*read_utterance_list(train), *read_utterance_list(validation)}
    assert names == {path.stem for path in root.rglob("*.flac")}


def test_split_of_a_list(tmp_path, capsys):
    root = empty_corpus(tmp_path / "audio", {"a": 20, "b": 20})
    (tmp_path / "list.txt").write_text("".join(f"a-{i}\n" for i in range(10)) + "gone\n")
    train, validation = split(root, tmp_path / "out", "--list", tmp_path / "list.txt")
    assert {*train, *validation} == {f"a-{i}" for i in range(10)}
    assert "1 names aren't in" in capsys.readouterr().out


def test_phones_of_timit(tmp_path):
    (tmp_path / "DR1" / "FAAA0").mkdir(parents=True)
    file = tmp_path / "DR1" / "FAAA0" / "SA1.PHN"
    file.write_text("0 320 h#\n320 800 ae\n800 1120 s\n1120 1280 epi\n")
    convert_alignments.main([str(tmp_path), str(tmp_path / "out"), "--file_extension", "PHN"])
    assert (
        tmp_path / "out" / "converted_aligned_phones.txt"
    ).read_text() == "SA1 0 0 1 1 1 2 2 0\n"
    assert (tmp_path / "out" / "phones.txt").read_text() == "0 SIL\n1 ae\n2 s\n"
    file.write_text("0 320 h#\n160 800 ae\n")
    refused(convert_alignments.main, tmp_path, tmp_path / "out", "--file_extension", ".PHN")


def test_files_are_found_by_their_names(tmp_path):
    root = empty_corpus(tmp_path, {"a": 2, "b": 1})
    expected = {name: f"{name[0]}/chapter/{name}.flac" for name in ("a-0", "a-1", "b-0")}
    assert files_by_shortest_key(root, ".flac") == expected
    (root / "b" / "a-1.flac").touch()
    wanted = {"b-0", "none", "a/a-1", "b/a-1"}
    assert files_by_key(root, ".flac", wanted, "list") == {
        "b-0": "b/chapter/b-0.flac",
        "a/a-1": "a/chapter/a-1.flac",
        "b/a-1": "b/a-1.flac",
    }
    with pytest.raises(UserError, match="list: a-1 may be a/chapter/a-1.flac, b/a-1.flac: write"):
        files_by_key(root, ".flac", {"a-1"}, "list")
    shortest = files_by_shortest_key(root, ".flac")
    assert shortest.keys() == {"a-0", "a/chapter/a-1", "b-0", "b/a-1"}
    assert files_by_key(root, ".flac", shortest, "list") == shortest


@pytest.mark.parametrize(("flag", "advice"), [(None, "place"), ("--out", "place with --out")])
def test_an_error_in_writing_names_the_path_and_what_to_do(flag, advice):
    said = "^there: can't be written (No space left on device); free some space, or name another "
    with (
        pytest.raises(UserError, match=f"{re.escape(said)[2:]}{advice}$"),
        writing_to("there", flag),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(ValueError, match="other"), writing_to("there"):
        raise ValueError("other")


def test_impossible_splits_are_refused(tmp_path, capsys):
    root = empty_corpus(tmp_path / "audio", {"a": 3})
    refused(make_split.main, root, tmp_path / "out", "--by", "speaker")
    assert "one list would be empty" in capsys.readouterr().err
    refused(make_split.main, root, tmp_path / "out", "--validation", "1.5")
    assert not (tmp_path / "out").exists()


def test_lists_are_what_training_reads(tiny_corpus, tmp_path):
    corpus = scan_corpus(tiny_corpus / "audio")
    for names in split(tiny_corpus / "audio", tmp_path, "--validation", 0.3):
        assert len(select_utterances(corpus.utterances, names, tmp_path)) == len(names) > 0


# --------------------------------------------------------------------------------- sample rates


def tone(rate, seconds, frequency=440.0):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)


def write_tone(path, rate, seconds=1.3, channels=1, frequency=440.0, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = tone(rate, seconds, frequency)
    soundfile.write(path, np.stack([wave] * channels, axis=1), rate, **how)


def adjust(*arguments):
    adjust_sample_rate.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("extension", "rate", "channels", "tolerance"),
    [(".wav", 48000, 1, 2e-3), (".flac", 44100, 2, 2e-3), (".wav", 8000, 1, 2e-3)]
    + [(".ogg", 22050, 1, 0.05), (".mp3", 44100, 1, 0.05)],
)
def test_any_rate_and_format_becomes_16_khz(tmp_path, extension, rate, channels, tolerance):
    write_tone(tmp_path / "in" / "deep" / f"a{extension}", rate, channels=channels)
    flags = ["--file_extension", extension, "--out_extension", ".wav"]
    adjust(tmp_path / "in", tmp_path / "out", *flags)
    new, new_rate = soundfile.read(tmp_path / "out" / "deep" / "a.wav", always_2d=True)
    assert new_rate == 16000
    assert new.shape[1] == channels
    assert soundfile.info(tmp_path / "out" / "deep" / "a.wav").subtype == "PCM_16"
    assert len(new) == pytest.approx(1.3 * 16000, abs=1 if tolerance < 0.01 else 1200)
    inside = slice(4000, 16000)  # an end of the file rings, and codecs shift the tone
    lags = [0] if tolerance < 0.01 else range(40)
    clean = tone(16000, 3)
    errors = [np.abs(new[inside, 0] - clean[4000 + lag : 16000 + lag]).max() for lag in lags]
    assert min(errors) < tolerance


def test_blocks_are_as_if_resampled_at_once(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", rng.uniform(-0.5, 0.5, 11025 * 7 + 123), 11025)
    whole = converted_with_block(tmp_path, monkeypatch, 60)
    assert len(whole) == -(-(11025 * 7 + 123) * 16000 // 11025)
    for block in (2, 3):
        assert np.abs(converted_with_block(tmp_path, monkeypatch, block) - whole).max() <= 1


def converted_with_block(folder, monkeypatch, seconds):
    monkeypatch.setattr(adjust_sample_rate, "BLOCK", seconds)
    out = Path(f"{folder}-out", str(seconds))
    adjust(folder, out, "--file_extension", ".wav")
    return soundfile.read(out / "a.wav", dtype="int16")[0].astype(int)


@pytest.mark.parametrize("rates", [(44_100, 16_000), (8_000, 16_000), (4_001, 1_600)])
def test_interpolation_is_the_filter_of_torchaudio(rates):
    waveform = torch.from_numpy(np.random.default_rng(0).uniform(-0.5, 0.5, (2, 9_001))).float()
    expected = torchaudio.functional.resample(waveform, *rates)
    found = adjust_sample_rate.interpolate(waveform, *rates)
    assert_close(found, expected, 1e-4)  # torchaudio calculates the filter in float32


@pytest.mark.parametrize(("rate", "channels"), [(44_101, 1), (47_999, 2), (15_991, 20)])
def test_rates_of_any_ratio_take_little_memory(tmp_path, monkeypatch, rate, channels):
    """torchaudio's table would have 700 million numbers."""
    monkeypatch.setattr(torchaudio.functional, "resample", None)
    monkeypatch.setattr(adjust_sample_rate, "BLOCK", 2)
    write_tone(tmp_path / "in" / "a.wav", rate, seconds=6, channels=channels)
    adjust(tmp_path / "in", tmp_path / "out", "--file_extension", ".wav")
    new, _ = soundfile.read(tmp_path / "out" / "a.wav", always_2d=True)
    assert new.shape == (6 * 16_000, channels)
    assert np.abs(new[1000:-1000, -1] - tone(16_000, 6)[1000:-1000]).max() < 2e-3


@pytest.mark.parametrize("rate", [1, 2_000_000_000])
def test_impossible_rates_are_refused(tmp_path, capsys, rate):
    write_tone(tmp_path / "in" / "a.wav", 16_000)
    content = bytearray((tmp_path / "in" / "a.wav").read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    (tmp_path / "in" / "a.wav").write_bytes(content)
    refused(adjust_sample_rate.main, tmp_path / "in", tmp_path / "out", "--file_extension", ".wav")
    assert f"a.wav: its header gives an impossible rate: {rate} Hz" in capsys.readouterr().err


def test_clipped_samples_are_counted_and_what_is_no_audio_refused(tmp_path, capsys):
    quiet, loud = np.full(8_000, 0.5, np.float32), np.full(8_000, 0.5, np.float32)
    loud[4_000:4_010] = -3
    nan = quiet.copy()
    nan[7] = np.nan
    files = {"quiet": quiet, "loud": loud, "numbers": 32768 * quiet, "nan": nan}
    (tmp_path / "in").mkdir()
    for name, wave in files.items():
        soundfile.write(tmp_path / "in" / f"{name}.wav", wave, 16_000, subtype="FLOAT")
    flags = ["--file_extension", ".wav", "--out_extension", ".flac"]
    refused(adjust_sample_rate.main, tmp_path / "in", tmp_path / "out", *flags)
    said = capsys.readouterr()
    assert "2 files converted" in said.out
    assert "beyond [-1, 1] were clipped in 1 file: loud.wav (10 of 8,000)\n" in said.out
    assert "2 of 4 files can't be converted: nan.wav: contains NaN" in said.err
    assert "numbers.wav: many samples lie far beyond [-1, 1] (integers" in said.err
    assert sorted(os.listdir(tmp_path / "out")) == ["loud.flac", "quiet.flac"]


@pytest.mark.parametrize("target", [".mp3", ".flac"])
def test_copied_files_are_checked_like_others(tmp_path, capsys, target):
    """.mp3 is copied, .flac converted: neither silence nor a file cut short goes unnoticed."""
    write_tone(tmp_path / "in" / "a.mp3", 16_000, seconds=5)
    whole = (tmp_path / "in" / "a.mp3").read_bytes()
    (tmp_path / "in" / "cut.mp3").write_bytes(whole[: len(whole) // 2])
    soundfile.write(tmp_path / "in" / "zero.mp3", np.zeros(16_000), 16_000)
    flags = ["--file_extension", ".mp3", "--out_extension", target]
    refused(adjust_sample_rate.main, tmp_path / "in", tmp_path / "out", *flags)
    said = capsys.readouterr()
    assert "2 files converted" in said.out
    assert "warning: 1 file, digital silence" in said.out
    assert said.out.endswith("equal: zero.mp3\n")
    assert re.search(r"cut.mp3: ends after \d+ samples, but its header says 80000", said.err)
    assert sorted(os.listdir(tmp_path / "out")) == [f"a{target}", f"zero{target}"]


def test_a_file_from_a_pipe_gets_a_length(tmp_path):
    write_tone(tmp_path / "in" / "a.flac", 16_000)
    content = bytearray((tmp_path / "in" / "a.flac").read_bytes())
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])
    (tmp_path / "in" / "a.flac").write_bytes(content)
    adjust(tmp_path / "in", tmp_path / "out", "--file_extension", ".flac")
    assert soundfile.info(tmp_path / "out" / "a.flac").frames == int(1.3 * 16_000)


def test_a_second_call_converts_what_is_missing_or_old(tmp_path, capsys):
    for name in "abc":
        write_tone(tmp_path / "in" / f"{name}.wav", 8000)
    adjust(tmp_path / "in", tmp_path / "out", "--file_extension", ".wav")
    assert "3 files converted (3 of 8000 Hz), 0 existed" in capsys.readouterr().out
    (tmp_path / "out" / "a.wav").unlink()
    os.utime(tmp_path / "out" / "b.wav", (0, 0))
    (tmp_path / "out" / ".writing-x.wav").touch()  # what a killed call leaves
    adjust(tmp_path / "in", tmp_path / "out", "--file_extension", ".wav")
    assert "2 files converted (2 of 8000 Hz), 1 existed" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "out")) == ["a.wav", "b.wav", "c.wav"]


def test_files_at_the_rate_are_copied(tmp_path):
    write_tone(tmp_path / "in" / "a.mp3", 16000)
    adjust(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "a.mp3").read_bytes() == (tmp_path / "in" / "a.mp3").read_bytes()


def test_only_files_of_the_label_file(tmp_path, capsys):
    for name in "abc":
        write_tone(tmp_path / "in" / f"{name}.wav", 8000)
    (tmp_path / "labels.txt").write_text("a 1 2\nc 3 4\nz 1 2\n")
    flags = ["--file_extension", ".wav"]
    adjust(tmp_path / "in", tmp_path / "labels.txt", *flags, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["a.wav", "c.wav"]
    assert "1 of 3 names have no file" in capsys.readouterr().out


def test_unreadable_files_are_named_and_the_others_converted(tmp_path, capsys):
    write_tone(tmp_path / "in" / "good.flac", 8000)
    (tmp_path / "in" / "more").mkdir()
    (tmp_path / "in" / "more" / "bad.flac").write_bytes(b"nonsense")
    (tmp_path / "in" / "none.flac").touch()
    refused(adjust_sample_rate.main, tmp_path / "in", tmp_path / "out", "--file_extension", ".flac")
    output = capsys.readouterr()
    assert "1 file converted" in output.out
    assert "2 of 3 files can't be converted: more/bad.flac: can't be decoded" in output.err
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["good.flac"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in", "in/out"], "is inside "),
        (["in", "in"], "is inside "),
        (["gone", "out"], "no such directory"),
        (["in", "out", "--out_extension", ".xyz"], "--out_extension .xyz"),
        (["in", "out", "--file_extension", ".ogg"], "no file ends with"),
        (["in", "labels.txt", "out", "--file_extension", ".wav"], "none of its files is named in"),
    ],
)
def test_wrong_calls_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    write_tone(tmp_path / "in" / "a.wav", 8000)
    (tmp_path / "labels.txt").write_text("z 1\n")
    monkeypatch.chdir(tmp_path)
    refused(adjust_sample_rate.main, *arguments)
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------- as a program


def test_commands_run_from_anywhere(tmp_path):
    write_tone(tmp_path / "in" / "s1" / "s1-1.mp3", 44100)
    write_tone(tmp_path / "in" / "s1" / "s1-2.mp3", 44100)
    (tmp_path / "a.ctm").write_text("s1-1 1 0 0.5 A\ns1-1 1 0.5 0.5 B\n")
    calls = {
        "adjust_sample_rate.py": ["in", "out", "--out_extension", ".flac"],
        "convert_alignments.py": ["a.ctm", "labels"],
        "make_split.py": ["in", "lists", "--file_extension", ".mp3", "--validation", "0.5"],
        "make_abx_item.py": ["--help"],
    }
    runs = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "utils" / "corpus" / name), *arguments],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, arguments in calls.items()
    ]
    outputs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * len(runs), outputs
    assert soundfile.info(tmp_path / "out" / "s1" / "s1-2.flac").samplerate == 16000
    assert (tmp_path / "labels" / "phones.txt").read_text() == "0 SIL\n1 A\n2 B\n"
    assert (tmp_path / "lists" / "val.txt").read_text() in ("s1-1\n", "s1-2\n")
    assert "LABELS" in outputs[3] or "labels" in outputs[3]
