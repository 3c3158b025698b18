"""Tests of data, models, features and the whole program, from the command line to its files."""

import argparse
import functools
import gc
import http.server
import io
import json
import math
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
import weakref
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch import nn

import dataset
import train
import trainer
from criterion.classification import CTCPhoneCriterion, PhoneCriterion, SpeakerCriterion
from dataset import (
    SAMPLINGS,
    AudioDataset,
    BatchLoader,
    Corpus,
    Position,
    Sequence,
    allocate_audio,
    allowed_bad_files,
    keep_percentage,
    keep_total,
    read_phone_labels,
    read_sequence_list,
    scan_corpus,
    select_sequences,
)
from feature_loader import (
    FeatureModule,
    ModelPhoneCombined,
    build_feature,
    build_feature_batch,
    load_criterion_state,
    load_model,
    load_phone_classifier,
    seq_normalization,
    stored_architecture,
    to_one_hot,
)
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
from transformers import CausalAttention, build_transformer, dropout_
from utils import listing, workers
from utils.arguments import build_parser
from utils.checkpoint import open_checkpoint, save_checkpoint
from utils.logs import PlainProgress
from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME, UserError, generator_from
from utils.testing import (
    GOLDEN,
    REAL_SPEECH,
    ROOT,
    assert_close,
    assert_gradients_close,
    golden_cases,
    needs_real_speech,
    write_tiny_corpus,
)
from utils.windows import Layout, plan_pack, plan_rows, split_in_packs
from utils.workers import Workers

WINDOW = 1600  # samples: ten frames
LENGTHS = {  # of the files of `small_corpus`: more and less than a window, odd, whole frames
    "a/x/a-1.flac": 17_001,
    "a/x/a-2.flac": 1_600,
    "a/y/a-3.flac": 900,
    "b/x/b-1.flac": 12_345,
    "b/x/b-2.flac": 8_000,
    "c/x/c-1.flac": 4_799,
    "c/y/c-2.flac": 21_120,
}


def noise(samples, seed=0):
    return np.random.default_rng(seed).integers(-20_000, 20_000, samples).astype(np.int16)


def write_audio(root, files, **options):
    """Write path -> samples below `root`."""
    for path, waveform in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(
            root / path, waveform, options.get("rate", SAMPLE_RATE), options.get("kind")
        )


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory):
    """Seven short files of three speakers; not to be changed by a test."""
    root = tmp_path_factory.mktemp("small_corpus")
    write_audio(root, {path: noise(n, seed) for seed, (path, n) in enumerate(LENGTHS.items())})
    return scan_corpus(root)


@pytest.fixture
def own_corpus(small_corpus, tmp_path):
    """A copy of `small_corpus`, without its listing, that a test may change; its root."""
    root = tmp_path / "corpus"
    shutil.copytree(small_corpus.root, root, ignore=shutil.ignore_patterns(listing.LISTING))
    return root


def small_set(corpus, **options):
    return AudioDataset(corpus, corpus.sequences, WINDOW, **options)


def end_to_end(audio):
    """What a pack of all files holds, read file by file in float."""
    paths = [os.path.join(audio.root, s.path) for s in audio.sequences]
    return np.concatenate([soundfile.read(path, dtype="float32")[0] for path in paths])


def summary(item):
    """A batch and its position as something to compare."""
    position, batch = item
    return (*position, batch.window.tolist(), batch.continues.tolist(), batch.waveform.sum().item())


# ---------------------------------------------------------------------- listing: golden and formats


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A copy of the real utterances, which scans may write their listing into."""
    root = tmp_path_factory.mktemp("speech") / "audio"
    shutil.copytree(REAL_SPEECH / "audio", root, copy_function=shutil.copyfile)
    return root


@needs_real_speech
@pytest.mark.parametrize("case", golden_cases("dataset_scan"))
def test_golden_speakers_and_selection(case, speech):
    golden = read_golden(case.path)
    for level in (0, 1, 2):
        corpus = scan_corpus(speech, speaker_level=level)
        found = {s.path: corpus.speakers[s.speaker] for s in corpus.sequences}
        assert found == golden[f"level{level}"]["path_to_speaker"]
        assert len(corpus.speakers) == golden[f"level{level}"]["n_speakers"]
    names = {
        "seq_list.txt": read_sequence_list(REAL_SPEECH / "seven_sequences.txt"),
        "all.txt": [s.name for s in corpus.sequences][::-1],
    }
    for selection in golden["filter"].values():
        chosen = select_sequences(corpus.sequences, names[selection["list"]], selection["list"])
        assert [s.path for s in thinned(chosen, **selection["kwargs"])] == selection["result"]


@pytest.mark.parametrize("case", golden_cases("dataset_scan"))
def test_golden_percentage_and_total(case):
    sequences = [Sequence(0, f"a/{i:03d}.wav", 1) for i in range(37)]
    for name, expected in read_golden(case.path)["filter_synthetic37"].items():
        keyword = {"tot": "totalNum", "pct": "percentage"}[name[:3]]
        assert [s.path for s in thinned(sequences, **{keyword: int(name[3:])})] == expected, name


def thinned(sequences, percentage=None, totalNum=None):  # noqa: N803
    if percentage:
        return keep_percentage(sequences, percentage)
    return keep_total(sequences, totalNum) if totalNum else sequences


@needs_real_speech
@pytest.mark.parametrize("case", golden_cases("dataset_scan"))
def test_golden_phone_labels(case):
    golden = read_golden(case.path)["phone_labels"]
    labels = read_phone_labels(REAL_SPEECH / "converted_aligned_phones.txt")
    assert labels.n_phones == golden["nPhones"]
    assert {name: len(row) for name, row in labels.labels.items()} == golden["lengths"]
    assert labels.labels["4051-11218-0044"][:60].tolist() == golden["first60_4051"]
    assert all(row.dtype == np.int16 for row in labels.labels.values())


def golden_window_cases():
    return [
        pytest.param(case.values[0], i, id=f"{case.id}-{i}")
        for case in golden_cases("dataset_windows")
        for i in range(len(read_golden(case.values[0].path)["cases"]))
    ]


@functools.cache
def read_golden(path):
    return json.loads(path.read_text())


@needs_real_speech
@pytest.mark.parametrize(("case", "index"), golden_window_cases())
def test_golden_windows(case, index, speech):
    """Boundaries, totals, windows, speakers, samples and labels of the original's first pack."""
    golden = read_golden(case.path)["cases"][index]
    corpus = scan_corpus(speech)
    assert sum(s.samples for s in corpus.sequences) == golden["tot_size"]
    assert AudioDataset(corpus, corpus.sequences, golden["win"]).n_windows == golden["n_dataset"]
    in_pack = corpus.sequences
    if golden["labels"] == "packs":  # which files it holds is told by their lengths alone
        in_pack = [s for s in in_pack if s.samples in np.diff(golden["seqLabel0"])]
    audio = AudioDataset(
        corpus,
        in_pack,
        golden["win"],
        phone_labels=golden_labels(case, golden["labels"]),
        labelled_only=True,
    )
    pack = audio.only_pack()
    assert pack.layout.boundaries.tolist() == golden["seqLabel0"]
    assert len(pack.audio) == golden["passes"][0][0]["data_len"]
    speaker_changes = np.flatnonzero(np.diff(audio.speakers)) + 1
    inner = pack.layout.boundaries[speaker_changes].tolist()
    assert [0, *inner, len(pack.audio)] == sorted(set(golden["speakerLabel0"]))
    compare_windows(audio, pack, golden)


def golden_labels(case, kind):
    files = {
        "fake": case.path.parent / "fake_phones.txt",
        "labels2": REAL_SPEECH / "converted_aligned_phones.txt",
    }
    return read_phone_labels(files[kind]) if kind in files else None


def compare_windows(audio, pack, golden):
    batches = first_pack_batches(golden)
    size, kind, batch_size = golden["win"], golden["type"], golden["batchSize"]
    offsets = [offset for batch in batches for offset in batch["offsets"]]
    if kind == "sequential":
        plan = plan_rows(len(pack.audio), 0, size, batch_size)
    else:
        plan = plan_pack(pack.layout, audio.speakers, kind, size, batch_size)
    relative_to = {"samespeaker": golden["speakerLabel0"], "samesequence": golden["seqLabel0"]}
    starts = np.array(relative_to.get(kind, [0]))
    relative = [offset - starts[starts <= offset].max() for offset in offsets]
    if golden["randomOffset"] or any(offset % 160 for offset in relative):
        return  # the original's random offsets and row strides are no whole frames
    assert len(set(offsets)) == len(offsets)
    if kind == "uniform":  # which of the windows are in the dropped batch is random
        assert set(offsets) <= set(plan.starts.tolist())
        assert len(offsets) == len(plan.starts) // batch_size * batch_size
    else:
        assert set(offsets) == set(plan.starts.tolist())
        assert len(batches) == plan.n_batches
    for batch in batches:
        for i, offset in enumerate(batch["offsets"]):
            window = pack.audio[offset : offset + size].double() / 32768
            assert abs(window.sum().item() - batch["sums"][i]) < 2e-5
            assert audio.speakers[pack.layout.position_of(offset)] == batch["speaker"][i]
            if pack.labels is not None:
                labels = pack.labels[offset // 160 : (offset + size) // 160].long()
                assert labels.sum() == batch["phone_sum"][i]
                assert labels[:3].tolist() == batch["phone_head"][i][:3]


def first_pack_batches(golden):
    """The batches of a pass until the next pack is loaded."""
    batches = golden["passes"][0]
    length = batches[0]["data_len"]
    others = [i for i, batch in enumerate(batches) if batch["data_len"] != length]
    return batches[: others[0]] if others else batches


def test_speakers_and_sequences_are_sorted(tmp_path):
    paths = ["b/1/z.wav", "a/2/y.wav", "a/1/x.wav", "a/w.wav", "a/1/y.wav", "v.wav"]
    write_audio(tmp_path, {path: noise(200) for path in paths})
    corpus = scan_corpus(tmp_path, ".wav")
    assert corpus.speakers == ("", "a", "b")
    assert [(s.speaker, s.path) for s in corpus.sequences] == [
        (0, "v.wav"),
        (1, "a/w.wav"),
        (1, "a/1/x.wav"),
        (1, "a/1/y.wav"),
        (1, "a/2/y.wav"),
        (2, "b/1/z.wav"),
    ]
    assert listing.find_files(tmp_path, ".wav") == sorted(paths)
    assert scan_corpus(tmp_path, ".wav", speaker_level=0).speakers == ("",)
    assert scan_corpus(tmp_path, ".wav", speaker_level=2).speakers == ("", "a", "a/1", "a/2", "b/1")


def test_listing_spares_opening_the_files(own_corpus, monkeypatch):
    opened = []
    original = listing.read_header
    monkeypatch.setattr(listing, "read_header", lambda path: opened.append(path) or original(path))
    first = scan_corpus(own_corpus)
    assert len(opened) == len(LENGTHS)
    assert {s.path: s.samples for s in first.sequences} == LENGTHS
    assert scan_corpus(own_corpus) == first
    assert scan_corpus(own_corpus, speaker_level=2).speakers == ("a/x", "a/y", "b/x", "c/x", "c/y")
    assert len(opened) == len(LENGTHS)
    scan_corpus(own_corpus, ignore_cache=True)
    assert len(opened) == 2 * len(LENGTHS)


def test_listing_keeps_extensions_apart(own_corpus):
    write_audio(own_corpus, {"d/d-1.wav": noise(3200)})
    assert len(scan_corpus(own_corpus, ".flac").sequences) == len(LENGTHS)
    assert [s.path for s in scan_corpus(own_corpus, ".wav").sequences] == ["d/d-1.wav"]
    (own_corpus / "d/d-1.wav").unlink()
    assert len(scan_corpus(own_corpus, ".flac").sequences) == len(LENGTHS)
    assert [s.path for s in scan_corpus(own_corpus, ".wav").sequences] == ["d/d-1.wav"]
    with pytest.raises(UserError, match="no file ends with '.wav'"):
        scan_corpus(own_corpus, ".wav", ignore_cache=True)


def change(**columns):
    """A change of the listing's content: these columns get these values in the first row."""

    def changed(content):
        for name, value in columns.items():
            content["extensions"][".flac"][name][0] = value
        return json.dumps(content)

    return changed


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "",
        lambda content: "{",
        lambda content: "[]",
        lambda content: "[" * 100_000,
        lambda content: b"\x80\x04\x95\xff",
        lambda content: json.dumps({**content, "format": 99}),
        lambda content: json.dumps({**content, "extensions": [1]}),
        lambda content: json.dumps({**content, "extensions": {".flac": {"path": ["a.flac"]}}}),
        change(path="/etc/passwd.flac"),
        change(path="../a.flac"),
        change(path="a/../../a.flac"),
        change(path="b/x/b-1.flac"),
        change(path="a\0.flac"),
        change(path="\ud800.flac"),
        change(path="a.txt"),
        change(path=3),
        change(samples=-1),
        change(samples=2**62),
        change(samples=1e5),
        change(samples="1"),
        change(samples=None),
        change(problem=None),
    ],
)
def test_damaged_listing_is_replaced(own_corpus, capsys, damage):
    expected = scan_corpus(own_corpus)
    path = own_corpus / listing.LISTING
    intact = path.read_text()
    damaged = damage(json.loads(intact))
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    capsys.readouterr()
    assert scan_corpus(own_corpus) == expected
    assert f"{path}: can't be used" in capsys.readouterr().out
    assert path.read_text() == intact


def test_database_that_cannot_be_written_to(own_corpus, capsys):
    (own_corpus / listing.LISTING / "in the way").mkdir(parents=True)
    assert len(scan_corpus(own_corpus).sequences) == len(LENGTHS)
    assert "can't be kept" in capsys.readouterr().out
    assert not list(own_corpus.glob(".writing-*"))


def test_cache_of_the_original_is_left_alone(own_corpus):
    (own_corpus / "_seqs_cache.txt").write_bytes(b"not ours")
    scan_corpus(own_corpus)
    assert (own_corpus / "_seqs_cache.txt").read_bytes() == b"not ours"


def test_links_are_followed_and_circles_cut(own_corpus, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write_audio(elsewhere, {"q/d-1.flac": noise(3200)})
    (own_corpus / "d").symlink_to(elsewhere)
    (own_corpus / "a/x/up").symlink_to(own_corpus)
    (elsewhere / "q/round").symlink_to(own_corpus / "d")
    (own_corpus / "itself").symlink_to(own_corpus / "itself")
    (own_corpus / "b/gone.flac").symlink_to(own_corpus / "nowhere.flac")
    corpus = scan_corpus(own_corpus)
    assert {s.path for s in corpus.sequences} == {*LENGTHS, "d/q/d-1.flac", "b/gone.flac"}
    problems = {s.path: s.problem for s in corpus.sequences if s.problem}
    assert problems == {"b/gone.flac": "No such file or directory"}


def test_unreadable_folders_are_named(own_corpus, monkeypatch, capsys):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b/x"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    corpus = scan_corpus(own_corpus)
    assert corpus.speakers == ("a", "c")
    assert "b/x (Permission denied)" in capsys.readouterr().out


def test_a_pipe_is_not_waited_for(own_corpus):
    os.mkfifo(own_corpus / "b/pipe.flac")
    problems = {s.path: s.problem for s in scan_corpus(own_corpus).sequences if s.problem}
    assert problems == {"b/pipe.flac": "not a regular file"}


def test_nothing_to_list(own_corpus, tmp_path):
    with pytest.raises(UserError, match=r"no such directory: .*nowhere \(--pathDB\)"):
        scan_corpus(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no file ends with '.ogg'; there are 7 .flac"):
        scan_corpus(own_corpus, ".ogg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there are no files in it"):
        scan_corpus(tmp_path / "empty")


def test_strange_file_names(tmp_path, capsys):
    names = [
        "two words",
        "dot.in.it",
        "café",
        "日本",
        b"latin\xe9".decode(errors="surrogateescape"),
    ]
    write_audio(tmp_path, {f"s/{name}.wav": noise(3200) for name in names[:-1]})
    shutil.copy(tmp_path / "s/café.wav", os.fsencode(tmp_path / "s") + b"/latin\xe9.wav")
    write_audio(tmp_path, {"t/café.wav": noise(1600)})
    corpus = scan_corpus(tmp_path, ".wav")
    assert scan_corpus(tmp_path, ".wav") == corpus
    text = "\ufeff" + "\r\n".join([*names, "", "café", "gone\udce9 "]) + "\r\n"
    (tmp_path / "list.txt").write_text(text, errors="surrogateescape")
    listed = read_sequence_list(tmp_path / "list.txt")
    assert listed == [*names, "café", "gone\udce9"]
    chosen = select_sequences(corpus.sequences, listed, "list.txt")
    assert Counter(s.name for s in chosen) == {**dict.fromkeys(names, 1), "café": 2}
    assert "list.txt: 1 of 6 names have no file" in capsys.readouterr().out
    audio = AudioDataset(corpus, chosen, WINDOW)
    assert sum(len(b.window) for _, b in BatchLoader(audio, 4, "uniform", **FIXED).epoch(0)) == 11


# -------------------------------------------------------------------------------- lists and labels


def test_lists_that_name_nothing(small_corpus, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="empty list"):
        read_sequence_list(tmp_path / "empty.txt")
    with pytest.raises(UserError, match="can't be read"):
        read_sequence_list(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="list.txt: 2 of 2 names have no file.*x.flac, y"):
        select_sequences(small_corpus.sequences, ["y", "x.flac"], "list.txt")


def test_missing_names_are_counted_and_the_first_few_named(small_corpus, capsys):
    names = ["b-2", "a-1", *(f"gone-{i}" for i in range(9))]
    chosen = select_sequences(small_corpus.sequences, names, "list.txt")
    assert [s.name for s in chosen] == ["a-1", "b-2"]
    said = capsys.readouterr().out
    assert "9 of 11 names" in said
    assert "gone-0, gone-1, gone-2, gone-3, gone-4 and 4 more" in said


def test_phone_labels_in_any_layout(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_bytes("\ufeffone 1 2 3\r\n\r\ntwo\t0\t32766 \r\nthrée  7\n  \n".encode())
    labels = read_phone_labels(path)
    assert {name: row.tolist() for name, row in labels.labels.items()} == {
        "one": [1, 2, 3],
        "two": [0, 32766],
        "thrée": [7],
    }
    assert labels.n_phones == 32767


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("b 1 x", "whole numbers"),
        ("b 1 2.5", "whole numbers"),
        ("b 1,2", "whole numbers"),
        ("b 1 -2", "from 0 to 32766"),
        ("b 1 32767", "from 0 to 32766"),
        ("b 99999999999999999999", "from 0 to 32766"),
        ("b", "no labels after the name"),
        ("a 1", "a has labels already"),
    ],
)
def test_malformed_labels_are_refused_with_their_line(tmp_path, line, complaint):
    path = tmp_path / "labels.txt"
    path.write_text(f"a 1 2\n\n{line}\nc 1\n")
    with pytest.raises(UserError, match=rf"labels.txt, line 3: .*{complaint}"):
        read_phone_labels(path)


def test_label_files_without_labels(tmp_path):
    (tmp_path / "labels.txt").write_text("\n")
    with pytest.raises(UserError, match="no labels in this file"):
        read_phone_labels(tmp_path / "labels.txt")
    with pytest.raises(UserError, match="can't be read"):
        read_phone_labels(tmp_path)


# --------------------------------------------------------------------------------- files that fail


def break_files(root):
    """Add files that fail, each in its own way; returns path -> what is said of it."""
    write_audio(root, {"bad/truncated.flac": noise(50_000), "bad/cut.flac": noise(50_000)})
    whole = (root / "bad/cut.flac").read_bytes()
    (root / "bad/cut.flac").write_bytes(whole[:50])
    (root / "bad/truncated.flac").write_bytes(whole[: len(whole) // 2])
    (root / "bad/text.flac").write_text("hello")
    (root / "bad/nothing.flac").write_bytes(b"")
    header = bytearray(whole)
    header[21:26] = b"\0\0\0\0\0"  # the low bits of the number of samples: not given
    header[21] = whole[21] & 0xF0
    (root / "bad/streamed.flac").write_bytes(header)
    header[21:26] = b"\xff" * 5  # 2 ** 36 - 1 samples
    header[21] = whole[21] | 0x0F
    (root / "bad/boast.flac").write_bytes(header)
    return {
        "bad/truncated.flac": "can't be decoded: ",
        "bad/cut.flac": "can't be decoded: ",
        "bad/text.flac": "can't be decoded: ",
        "bad/nothing.flac": "can't be decoded: ",
        "bad/streamed.flac": "impossible length",
        "bad/boast.flac": "impossible length",
    }


def test_bad_files_are_skipped_and_named(own_corpus, capsys):
    good = small_set(scan_corpus(own_corpus)).only_pack()
    broken = break_files(own_corpus)
    corpus = scan_corpus(own_corpus, ignore_cache=True)
    assert corpus.speakers == ("a", "b", "bad", "c")
    audio = small_set(corpus, max_bad_files=0.5)
    pack = audio.only_pack()
    assert torch.equal(pack.audio, good.audio)
    assert np.array_equal(pack.layout.boundaries, good.layout.boundaries)
    said = capsys.readouterr().out
    for path, reason in broken.items():
        assert f"{path} ({reason}" in said or f"{path} (its header gives an {reason}" in said


def test_empty_and_not_finite_files(tmp_path, capsys):
    nan, infinite = np.zeros(5000), np.zeros(5000)
    nan[4321], infinite[1] = np.nan, np.inf
    files = {f"s/good{i}.wav": noise(5000, i) / 32768 for i in range(9)}
    bad = {"s/nan.wav": nan, "s/infinite.wav": infinite, "s/empty.wav": np.zeros(0)}
    write_audio(tmp_path, {**files, **bad}, kind="FLOAT")
    audio = small_set(scan_corpus(tmp_path, ".wav"))
    loader = BatchLoader(audio, 2, "samesequence", seed=0, training=True)
    located = {loader.locate(w)[0] for _, batch in loader.epoch(0) for w in batch.window}
    assert located == set(files)
    said = capsys.readouterr().out
    assert "s/empty.wav (empty)" in said
    assert "s/nan.wav (holds NaN or infinite samples)" in said
    assert "s/infinite.wav (holds NaN or infinite samples)" in said


def test_a_file_that_ends_early(tmp_path, capsys):
    write_audio(tmp_path, {f"s/{i}.mp3": noise(80_000, i) / 60_000 for i in range(3)})
    content = (tmp_path / "s/1.mp3").read_bytes()
    (tmp_path / "s/1.mp3").write_bytes(content[: len(content) // 2])
    audio = small_set(scan_corpus(tmp_path, ".mp3"))
    assert audio.only_pack().layout.files.tolist() == [0, 2]
    said = capsys.readouterr().out
    assert "skipped 1 of 3 files: s/1.mp3 (ends after" in said
    assert "its header says 80000)" in said


def test_too_many_bad_files(own_corpus):
    break_files(own_corpus)
    corpus = scan_corpus(own_corpus)
    with pytest.raises(UserError, match=r"5 of 13 audio files.*max_bad_files allows 3.*nothing.fl"):
        small_set(corpus)
    bad = [s for s in corpus.sequences if s.path == "bad/truncated.flac"]
    with pytest.raises(UserError, match="1 of 1 audio files are bad"):
        BatchLoader(AudioDataset(corpus, bad, WINDOW), 1, "uniform", **FIXED).dataset.only_pack()
    good = [s for s in corpus.sequences if s.path in LENGTHS]
    audio = AudioDataset(corpus, [*good, *bad], WINDOW, max_bad_files=0)
    with pytest.raises(UserError, match="allows 0"):
        audio.only_pack()


def test_number_of_bad_files_allowed():
    assert [allowed_bad_files(n, 0.01) for n in (1, 2, 9, 12, 100, 1000)] == [1, 1, 2, 3, 3, 10]
    assert allowed_bad_files(10, 0.5) == 5
    assert allowed_bad_files(1000, 0) == 0


def test_files_lost_or_changed_since_they_were_listed(own_corpus, capsys):
    lost, changed, shorter = "a/x/a-1.flac", "b/x/b-1.flac", "c/y/c-2.flac"
    corpus = scan_corpus(own_corpus)
    kept = [s for s in corpus.sequences if s.path not in (lost, changed, shorter)]
    expected = AudioDataset(corpus, kept, WINDOW).only_pack()
    (own_corpus / lost).unlink()
    write_audio(own_corpus, {changed: noise(777)})
    content = (own_corpus / shorter).read_bytes()
    (own_corpus / shorter).write_bytes(content[: len(content) // 2])
    audio = small_set(scan_corpus(own_corpus), max_bad_files=0.5)
    pack = audio.only_pack()
    assert torch.equal(pack.audio, expected.audio)
    assert [audio.sequences[i].path for i in pack.layout.files] == [s.path for s in kept]
    said = capsys.readouterr().out
    assert f"{lost} (gone since the database was listed; --ignore_cache" in said
    assert f"{changed} (changed since the database was listed; --ignore_cache" in said
    assert f"{shorter} (can't be decoded" in said


def test_a_repaired_file_is_used_again(own_corpus):
    (own_corpus / "b/x/b-3.flac").write_text("broken")
    assert [s.path for s in scan_corpus(own_corpus).sequences if s.problem] == ["b/x/b-3.flac"]
    write_audio(own_corpus, {"b/x/b-3.flac": noise(3200)})
    assert {s.path: s.samples for s in scan_corpus(own_corpus).sequences}["b/x/b-3.flac"] == 3200


def test_wrong_sample_rate(own_corpus):
    write_audio(own_corpus, {"b/x/b-4.flac": noise(9), "b/x/b-3.flac": noise(9)}, rate=8000)
    corpus = scan_corpus(own_corpus)
    with pytest.raises(UserError, match=r"2 of 9 files.* b/x/b-3.flac \(8000 Hz\).*adjust_sample"):
        small_set(corpus)
    good = [s for s in corpus.sequences if s.path in LENGTHS]
    assert AudioDataset(corpus, good, WINDOW).n_windows == sum(LENGTHS.values()) // WINDOW


# -------------------------------------------------------------------------------- kinds of audio


FIXED = {"seed": 0, "training": False}


def only_waveform(audio):
    """The audio of a set's windows, end to end, as the model gets it."""
    batches = BatchLoader(audio, 3, "sequential", **FIXED).epoch(0)
    return torch.cat([batch.to("cpu").waveform.flatten() for _, batch in batches])


def test_waveforms_are_exact(small_corpus):
    audio = small_set(small_corpus)
    assert audio.dtype == torch.int16
    expected = torch.from_numpy(end_to_end(audio))[: audio.n_windows * WINDOW]
    assert torch.equal(only_waveform(audio), expected)


@pytest.mark.parametrize(
    ("extension", "kind"),
    [(".flac", "PCM_24"), (".wav", "FLOAT"), (".wav", "PCM_16"), (".wav", "ULAW"), (".ogg", None)],
)
def test_kinds_of_files(tmp_path, extension, kind):
    wave = 0.8 * np.sin(np.arange(16_000) / 20 + np.arange(16_000) ** 2 / 1e6)
    write_audio(tmp_path, {f"s/one{extension}": wave, f"s/two{extension}": wave[::-1]}, kind=kind)
    audio = small_set(scan_corpus(tmp_path, extension))
    assert (audio.dtype == torch.int16) == (kind in ("PCM_16", "ULAW"))
    assert torch.equal(only_waveform(audio), torch.from_numpy(end_to_end(audio)))
    assert abs(only_waveform(audio)[:16_000].numpy() - wave).max() < 0.05


def test_mp3(tmp_path):
    write_audio(tmp_path, {"s/one.mp3": np.sin(np.arange(32_000) / 20) / 2})
    assert only_waveform(small_set(scan_corpus(tmp_path, ".mp3"))).std() > 0.3


def test_stereo_is_averaged(tmp_path):
    left, right = noise(8000, 1), noise(8000, 2)
    write_audio(tmp_path, {"s/one.flac": np.stack([left, right], 1), "s/two.flac": left})
    heard = only_waveform(small_set(scan_corpus(tmp_path)))
    average = (left.astype(np.float32) + right) / 2 / 32768
    assert torch.equal(heard[:8000], torch.from_numpy(average))
    assert torch.equal(heard[8000:], torch.from_numpy(left.astype(np.float32) / 32768))


# -------------------------------------------------------------------------------- sets and labels


def test_labels_are_exact(tiny_corpus):
    """In the tiny corpus every class is heard as a tone: each frame's tone must be its label's."""
    corpus = scan_corpus(tiny_corpus / "audio")
    labels = read_phone_labels(tiny_corpus / "phones.txt")
    audio = AudioDataset(corpus, corpus.sequences, 3200, phone_labels=labels)
    time = torch.arange(160) / SAMPLE_RATE
    for training in (True, False):
        loader = BatchLoader(audio, 4, "uniform", seed=1, training=training)
        for _, batch in loader.epoch(0):
            tones = 200 + 300 * torch.arange(5) + 20 * batch.speaker[:, None]  # (B, 5) Hz
            waves = torch.exp(2j * torch.pi * tones[:, :, None] * time)
            frames = batch.to("cpu").waveform.view(-1, 20, 160).to(waves.dtype)
            heard = torch.einsum("bft,bpt->bfp", frames, waves).abs().argmax(-1)
            assert (heard == batch.phone).float().mean() > 0.99
            assert batch.phone.dtype == torch.int64


def test_audio_and_labels_are_cut_to_the_shorter(small_corpus, tmp_path, capsys):
    frames = {"a-1": 106, "a-2": 10, "b-1": 70, "b-2": 60, "c-1": 30, "c-2": 132}  # a-3 has none
    path = tmp_path / "labels.txt"
    path.write_text("".join(f"{n} {' '.join(['3'] * k)}\n" for n, k in frames.items()))
    labels = read_phone_labels(path)
    audio = small_set(small_corpus, phone_labels=labels, labelled_only=True)
    assert audio.samples.tolist() == [160 * n for n in (106, 10, 70, 50, 29, 132)]
    assert audio.n_unlabelled == 1
    said = capsys.readouterr().out
    assert "2 of 6 files are shorter or longer than their labels, first b/x/b-1.flac" in said
    assert "6 of 7 files have phone labels" in audio.describe()
    with pytest.raises(ValueError, match="labelled_only"):
        small_set(small_corpus, phone_labels=labels)
    path.write_text("other 1 2 3\n")
    with pytest.raises(UserError, match=r"labels.txt: has labels for none of the 7 sequences.*a-1"):
        small_set(small_corpus, phone_labels=read_phone_labels(path), labelled_only=True)


def test_whole_frames(small_corpus):
    audio = small_set(small_corpus, whole_frames=True)
    assert audio.samples.tolist() == [n // 160 * 160 for n in LENGTHS.values()]
    assert len(audio.only_pack().audio) == audio.samples.sum()


def test_description_and_fingerprint(small_corpus, own_corpus):
    audio = small_set(small_corpus, title="validation set")
    assert audio.describe() == (
        "validation set: 7 files, 0.1 min, 3 speakers, 41 windows of 0.10 s"
    )
    assert audio.hours == sum(LENGTHS.values()) / SAMPLE_RATE / 3600
    copy = scan_corpus(own_corpus)
    print_of = [
        AudioDataset(copy, sequences, WINDOW).fingerprint()
        for sequences in (
            copy.sequences[::-1],
            copy.sequences[1:],
            [copy.sequences[0]._replace(samples=5), *copy.sequences[1:]],
        )
    ]
    assert audio.fingerprint() == print_of[0] == "38c27628b1100b99"
    assert len(set(print_of)) == 3


def test_no_window_at_all(small_corpus):
    short = [s for s in small_corpus.sequences if s.samples < WINDOW]
    for sampling in SAMPLINGS:
        for training in (True, False):
            with pytest.raises(UserError, match="training set: not a single window of 1600"):
                BatchLoader(
                    AudioDataset(small_corpus, short, WINDOW),
                    2,
                    sampling,
                    seed=0,
                    training=training,
                )


def test_no_window_left_after_decoding(own_corpus):
    corpus = scan_corpus(own_corpus)
    long_and_short = [corpus.sequences[0], corpus.sequences[2]]
    loader = BatchLoader(AudioDataset(corpus, long_and_short, WINDOW), 2, "uniform", **FIXED)
    (own_corpus / long_and_short[0].path).unlink()
    for first in (None, Position(0, 0, 0)):
        with pytest.raises(UserError, match="not a single window"):
            next(loader.epoch(0, first))


def test_too_many_processes(small_corpus):
    with pytest.raises(UserError, match="training set: 1 batches of 41 windows are too few for 2"):
        BatchLoader(small_set(small_corpus), 41, "uniform", seed=0, training=True, world_size=2)
    with pytest.raises(ValueError, match="sampling 'speaker' is none of"):
        BatchLoader(small_set(small_corpus), 41, "speaker", seed=0, training=True)


def test_a_pack_that_cannot_be_held():
    with pytest.raises(UserError, match="--max_size_loaded"):
        allocate_audio(2**60, torch.int16)


# ------------------------------------------------------------------------- plans, by random layouts


def random_layout(seed):
    """A layout of made-up files with their speakers, some shorter than a window."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12 * WINDOW, rng.integers(1, 30))
    lengths[rng.random(len(lengths)) < 0.2] //= 20
    speakers = np.sort(rng.integers(0, 6, len(lengths)))
    return Layout.of(np.arange(len(lengths)), lengths), speakers


def expected_intervals(layout, speakers, sampling):
    """(begin, end) of the stretches that windows may not leave, found one file at a time."""
    intervals = []
    for i, speaker in enumerate(speakers):
        begin, end = layout.boundaries[i], layout.boundaries[i + 1]
        joins = i > 0 and (
            sampling in ("uniform", "sequential")
            or (sampling == "samespeaker" and speaker == speakers[i - 1])
        )
        intervals.append([intervals.pop()[0], end] if joins else [begin, end])
    return intervals


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("seed", range(8))
def test_fixed_plans_hold_every_window(sampling, seed):
    layout, speakers = random_layout(seed)
    expected = [
        list(range(begin, end - WINDOW + 1, WINDOW))
        for begin, end in expected_intervals(layout, speakers, sampling)
    ]
    plan = plan_pack(layout, speakers, sampling, WINDOW, 3)
    groups = [starts[i : i + 3] for starts in expected for i in range(0, len(starts), 3)]
    assert [plan.batch(g).tolist() for g in range(plan.n_batches)] == groups


@pytest.mark.parametrize("sampling", ["samespeaker", "uniform", "samesequence"])
@pytest.mark.parametrize("seed", range(8))
def test_training_plans(sampling, seed):
    layout, speakers = random_layout(seed)
    intervals = expected_intervals(layout, speakers, sampling)
    begins = np.array([begin for begin, _ in intervals])
    plan = plan_pack(layout, speakers, sampling, WINDOW, 4, generator_from(seed))
    batches = [plan.batch(g).tolist() for g in range(plan.n_batches)]
    first, seen, order = {}, Counter(), []
    for batch in batches:
        owners = {int(np.searchsorted(begins, start, side="right")) - 1 for start in batch}
        assert len(owners) == 1, "a batch mixes intervals"
        assert 0 < len(batch) <= 4
        owner = owners.pop()
        order.append(owner)
        begin, end = intervals[owner]
        seen[owner] += len(batch)
        for start in batch:
            assert begin <= start <= end - WINDOW
            assert (start - begin) % 160 == 0
            assert (start - begin) % WINDOW == first.setdefault(owner, (start - begin) % WINDOW)
            assert first[owner] <= WINDOW // 2
    starts = [start for batch in batches for start in batch]
    assert len(set(starts)) == len(starts)
    assert len(starts) < 20 or any(batch != sorted(batch) for batch in batches)
    assert len(set(order)) < 4 or order != sorted(order), "batches aren't shuffled"
    for owner, (begin, end) in enumerate(intervals):
        cut = (end - begin - first.get(owner, 0)) // WINDOW
        assert seen[owner] == (cut // 4 * 4 or cut if sampling == "uniform" else cut)


@pytest.mark.parametrize("seed", range(8))
def test_rows_of_sequential_training(seed):
    layout, speakers = random_layout(seed)
    size = int(layout.boundaries[-1])
    plan = plan_pack(layout, speakers, "sequential", WINDOW, 4, generator_from(seed))
    batches = [plan.batch(g) for g in range(plan.n_batches)]
    rows = min(4, (size - batches[0][0]) // WINDOW)
    assert all(len(batch) == rows for batch in batches)
    assert all((batch - batches[0] == g * WINDOW).all() for g, batch in enumerate(batches))
    assert (batches[0] % 160 == 0).all()
    assert batches[-1][-1] + WINDOW <= size
    assert len(batches) * rows > size // WINDOW - 1 - rows - 1


def test_ten_epochs_sample_every_interval():
    layout, speakers = random_layout(3)
    for sampling in ("samespeaker", "samesequence"):
        intervals = expected_intervals(layout, speakers, sampling)
        starts = [
            start
            for epoch in range(10)
            for start in plan_pack(
                layout, speakers, sampling, WINDOW, 4, generator_from(epoch)
            ).starts
        ]
        for begin, end in intervals:
            offsets = {int(s - begin) for s in starts if begin <= s < end}
            assert bool(offsets) == (end - begin >= WINDOW)
            if end - begin >= 2 * WINDOW:
                assert len({offset % WINDOW for offset in offsets}) > 2, "always the same offset"


def test_plans_are_pure_and_leave_the_global_generators_alone():
    layout, speakers = random_layout(1)

    def plan(*seed):
        generator = generator_from(*seed)
        packs = split_in_packs(np.diff(layout.boundaries), 40_000, generator)
        pack_plan = plan_pack(layout, speakers, "samespeaker", WINDOW, 4, generator)
        return [p.tolist() for p in packs], pack_plan.starts.tolist(), pack_plan.edges.tolist()

    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = plan(1, 2)
    torch.manual_seed(99)
    assert plan(1, 2) == first
    assert plan(1, 3) != first
    torch.set_rng_state(before[0])
    plan(1, 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("seed", range(10))
def test_packs_hold_each_file_once(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 1000, rng.integers(1, 60))
    max_size = int(rng.integers(500, 8000))
    for generator in (None, generator_from(seed)):
        packs = split_in_packs(lengths, max_size, generator)
        assert sorted(np.concatenate(packs).tolist()) == list(range(len(lengths)))
        assert all((np.diff(pack) > 0).all() for pack in packs)
        assert all(lengths[pack].sum() <= max_size or len(pack) == 1 for pack in packs)
        assert len(packs) >= lengths.sum() / max_size


def test_packs_are_of_about_the_same_size():
    lengths = np.full(1000, 100)
    sizes = [lengths[pack].sum() for pack in split_in_packs(lengths, 30_000, generator_from(0))]
    assert len(sizes) == 4
    assert min(sizes) > 24_000


# ------------------------------------------------------------------------------- loaders and packs


def loader_of(corpus, sampling, *, training=True, packs=True, batch_size=3, **options):
    max_size = 26_000 if packs else 10**9
    audio = small_set(corpus, max_size_loaded=max_size, n_threads=2)
    return BatchLoader(audio, batch_size, sampling, seed=5, training=training, **options)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_batches_hold_what_they_say(small_corpus, sampling, training, packs):
    """Samples, speaker, place, `continues` and number of windows against the files themselves."""
    files = {
        s.path: (s.speaker, soundfile.read(os.path.join(small_corpus.root, s.path), dtype="int16"))
        for s in small_corpus.sequences
    }
    loader = loader_of(small_corpus, sampling, training=training, packs=packs)
    for epoch in (0, 1):
        n_batches, seen, before = 0, set(), None
        for position, batch in loader.epoch(epoch):
            assert batch.waveform.shape == (len(batch.window), 1, WINDOW)
            places = [loader.locate(window) for window in batch.window]
            for row, (path, offset) in enumerate(places):
                speaker, (samples, _) = files[path]
                inside = samples[offset : offset + WINDOW]  # a window may go on in the next file
                assert batch.waveform[row, 0, : len(inside)].tolist() == inside.tolist()
                assert batch.speaker[row] == speaker
                goes_on = before is not None and row < len(before) and sampling == "sequential"
                goes_on = goes_on and before[row] == (position.pack, path, offset - WINDOW)
                assert batch.continues[row] == goes_on
            before = [(position.pack, *place) for place in places]
            seen.update(before)
            n_batches += 1
            assert position.epoch == epoch
        assert n_batches == len(loader) == loader.n_batches(epoch)
        assert len(seen) > 20
    if training and sampling == "sequential":
        assert any(batch.continues.any() for _, batch in loader.epoch(0))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_capture_windows_are_one_list_that_batches_cut(small_corpus, world_size):
    """Consecutive windows over the sorted files, whatever the batch size and the processes."""
    expected = torch.from_numpy(end_to_end(small_set(small_corpus)) * 32768).short()
    n_windows = sum(LENGTHS.values()) // WINDOW
    for batch_size in (1, 4, 100):
        found = {}
        for rank in range(world_size):
            loader = loader_of(
                small_corpus,
                "sequential",
                training=False,
                packs=False,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
            )
            batches = [batch for _, batch in loader.epoch(0)]
            assert len(batches) == len(loader)
            for batch in batches:
                window = batch.window.tolist()
                assert window == list(range(window[0], window[0] + len(window)))
                found.update(zip(window, batch.waveform[:, 0], strict=True))
        assert sorted(found) == list(range(n_windows))
        heard = torch.cat([found[i] for i in range(n_windows)])
        assert torch.equal(heard, expected[: n_windows * WINDOW])


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_processes_share_an_epoch(small_corpus, sampling, world_size):
    alone = [summary(item) for item in loader_of(small_corpus, sampling).epoch(2)]
    shares = [
        [summary(item) for item in loader.epoch(2)]
        for loader in (
            loader_of(small_corpus, sampling, rank=rank, world_size=world_size)
            for rank in range(world_size)
        )
    ]
    rounds = len(alone) // world_size
    assert [len(share) for share in shares] == [rounds] * world_size
    together = [item for turn in zip(*shares, strict=True) for item in turn]
    for found, expected in zip(together, alone, strict=False):  # but for `continues`
        assert found[:4] + found[5:] == expected[:4] + expected[5:]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_going_on_from_any_position(small_corpus, sampling, world_size):
    """The rest of an epoch, bit by bit, also where the position is beyond the end of a pack."""
    options = {"world_size": world_size, "rank": world_size - 1}
    loader = loader_of(small_corpus, sampling, **options)
    whole = [summary(item) for item in loader.epoch(3)]
    rank0 = [p for p, _ in loader_of(small_corpus, sampling, world_size=world_size).epoch(3)]
    assert len({position.pack for position in rank0}) > 2
    for done, position in enumerate(rank0):
        again = loader_of(small_corpus, sampling, **options)
        assert [summary(item) for item in again.epoch(3, position)] == whole[done:]
        after = position._replace(batch=position.batch + world_size)
        assert [summary(item) for item in again.epoch(3, after)] == whole[done + 1 :]
    assert list(loader.epoch(3, Position(3, 10**6, 0))) == []


def test_going_on_decodes_no_earlier_pack(small_corpus, monkeypatch):
    loader = loader_of(small_corpus, "uniform", training=False)
    decoded = watch_decoding(monkeypatch)
    packs = split_in_packs(loader.dataset.samples, loader.dataset.max_size_loaded)
    list(loader.epoch(0, Position(0, 1, 0)))
    expected = {loader.dataset.sequences[i].path for pack in packs[1:] for i in pack}
    assert Counter(relative(loader, decoded)) == dict.fromkeys(expected, 1)


def watch_decoding(monkeypatch):
    """Paths of files as they are decoded."""
    decoded, original = [], dataset.decode_into

    def watched(waveform, path, listed_samples):
        decoded.append(path)
        return original(waveform, path, listed_samples)

    monkeypatch.setattr(dataset, "decode_into", watched)
    return decoded


def relative(loader, paths):
    return [os.path.relpath(path, loader.dataset.root) for path in paths]


def test_each_epoch_decodes_each_file_once_in_another_order(small_corpus, monkeypatch):
    loader = loader_of(small_corpus, "uniform")
    packs_of_files = []
    for epoch in range(3):
        where = {}
        for position, batch in loader.epoch(epoch):
            for window in batch.window:
                where.setdefault(loader.locate(window)[0], set()).add(position.pack)
        packs_of_files.append(where)
        assert all(len(packs) == 1 for packs in where.values())
    assert packs_of_files[0] != packs_of_files[1]
    decoded = watch_decoding(monkeypatch)
    fixed = loader_of(small_corpus, "uniform", training=False)
    for _ in range(2):
        decoded.clear()
        list(fixed.epoch(0))
        assert sorted(relative(fixed, decoded)) == sorted(LENGTHS)


def test_one_pack_is_decoded_once_and_kept(small_corpus, monkeypatch):
    decoded = watch_decoding(monkeypatch)
    loader = loader_of(small_corpus, "samespeaker", packs=False)
    for epoch in range(3):
        list(loader.epoch(epoch))
    list(BatchLoader(loader.dataset, 2, "sequential", **FIXED).epoch(0))
    assert sorted(relative(loader, decoded)) == sorted(LENGTHS)


def test_no_more_than_two_packs_are_held(small_corpus, monkeypatch):
    alive, counts = weakref.WeakSet(), []

    class Memory(mmap.mmap):
        def __init__(self, *args, **kwargs):
            alive.add(self)
            counts.append(len(alive))

    monkeypatch.setattr(dataset.mmap, "mmap", Memory)
    loader = loader_of(small_corpus, "samesequence")
    for epoch in range(3):
        for _ in loader.epoch(epoch):
            pass
    assert len(counts) >= 9
    assert max(counts) == 2
    loader.close()
    join_workers()
    gc.collect()
    assert len(alive) == 0


def join_workers():
    for thread in threading.enumerate():
        if thread.name == "worker":
            thread.join(30)


def test_an_exception_while_decoding_ends_the_epoch(small_corpus, monkeypatch):
    def fail(waveform, path, listed_samples):
        raise RuntimeError(f"disk on fire at {os.path.basename(path)}")

    loader = loader_of(small_corpus, "uniform")
    monkeypatch.setattr(dataset, "decode_into", fail)
    with pytest.raises(RuntimeError, match="disk on fire at"):
        list(loader.epoch(0))


def test_an_exception_in_the_background_comes_at_the_next_batch(small_corpus, monkeypatch):
    original = dataset.decode_into

    def fail(waveform, path, listed_samples):
        raise RuntimeError("disk on fire")

    loader = loader_of(small_corpus, "uniform", batch_size=1)
    decode_ahead = loader._decode_ahead

    def fail_ahead(p):
        monkeypatch.setattr(dataset, "decode_into", fail)
        decode_ahead(p)
        for decoding in loader._ahead.values():
            assert decoding.workers._shared.finished.wait(30)
        monkeypatch.setattr(dataset, "decode_into", original)

    monkeypatch.setattr(loader, "_decode_ahead", fail_ahead)
    with pytest.raises(RuntimeError, match="disk on fire"):
        next(loader.epoch(0))


class Gate:
    """Work that waits until it is let through, and is counted."""

    def __init__(self):
        self.begun, self.open = threading.Semaphore(0), threading.Event()
        self.done = []

    def __call__(self, *item):
        self.begun.release()
        self.open.wait(30)
        self.done.append(item)
        return ""


def gated_loader(corpus, monkeypatch, is_gated):
    """A loader of packs of many files, whose decoding ahead of pack p waits if is_gated(p)."""
    many = corpus._replace(sequences=3 * corpus.sequences)
    audio, gate = small_set(many, max_size_loaded=80_000, n_threads=2), Gate()
    loader = BatchLoader(audio, 3, "uniform", seed=0, training=True)
    decode_ahead = loader._decode_ahead

    def decode_ahead_gated(p):
        if is_gated(p):
            monkeypatch.setattr(dataset, "decode_into", gate)
        decode_ahead(p)

    loader._decode_ahead = decode_ahead_gated
    return loader, gate


def assert_threads_end(gate):
    gate.open.set()
    join_workers()
    assert len(gate.done) == 2, "each thread ends after the file it has in hand"


@pytest.mark.parametrize("end", ["close the iteration", "drop the loader", "close the loader"])
def test_threads_end_when_the_iteration_is_abandoned(small_corpus, monkeypatch, end):
    loader, gate = gated_loader(small_corpus, monkeypatch, lambda p: True)
    batches = loader.epoch(0)
    next(batches)
    assert all(gate.begun.acquire(timeout=30) for _ in range(2))
    if end == "close the iteration":
        batches.close()
    elif end == "close the loader":
        loader.close()
    if end == "drop the loader":
        del loader, batches
        gc.collect()
    assert_threads_end(gate)


def test_threads_end_when_the_loader_is_dropped_between_epochs(small_corpus, monkeypatch):
    """In training, the first pack of the next epoch is being decoded then."""
    loader, gate = gated_loader(small_corpus, monkeypatch, lambda p: p == 3)
    assert {position.pack for position, _ in loader.epoch(0)} == {0, 1, 2}
    assert all(gate.begun.acquire(timeout=30) for _ in range(2))
    del loader
    gc.collect()
    assert_threads_end(gate)


def test_workers_keep_order_and_stop_at_the_first_exception():
    assert Workers(lambda x: x * x, range(100), 4).results("squaring", " numbers") == [
        x * x for x in range(100)
    ]
    assert Workers(str, [], 4).results("nothing", " numbers") == []
    begun = []

    def fail(x):
        begun.append(x)
        raise ValueError(f"no {x}")

    with pytest.raises(ValueError, match="no 0"):
        Workers(fail, range(100), 1).results("failing", " numbers")
    assert begun == [0]
    stopped = threading.Event()

    def fail_beside_others(x):
        begun.append(x)
        if x == 0:
            raise ValueError("no 0")
        stopped.wait(30)

    begun.clear()
    team = Workers(fail_beside_others, range(100), 4)
    with pytest.raises(ValueError, match="no 0"):
        team.results("failing", " numbers")
    stopped.set()
    join_workers()
    assert len(begun) <= 4


def test_workers_show_progress_when_it_takes_long(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 0)
    gate, bars = Gate(), []

    class Bar(PlainProgress):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)
            gate.open.set()

    monkeypatch.setattr("utils.logs.PlainProgress", Bar)
    assert Workers(gate, range(3), 1).results("waiting", " files") == [""] * 3
    assert [(bar.desc, bar.total) for bar in bars] == [("waiting", 3)]


def test_packs_of_an_epoch_are_shuffled_in_different_ways(tmp_path):
    write_audio(tmp_path, {f"s/{i}.flac": noise(9 * WINDOW, i) for i in range(4)})
    audio = small_set(scan_corpus(tmp_path), max_size_loaded=9 * WINDOW)
    loader = BatchLoader(audio, 2, "uniform", seed=0, training=True)
    order = {}
    for position, batch in loader.epoch(0):
        order.setdefault(position.pack, []).extend(loader.locate(w)[1] for w in batch.window)
    assert len(order) == 4
    assert len({tuple(offsets) for offsets in order.values()}) == 4


def test_bad_files_are_named_once(own_corpus, capsys):
    loader = loader_of(scan_corpus(own_corpus), "uniform")
    (own_corpus / "b/x/b-2.flac").unlink()
    capsys.readouterr()
    for epoch in range(3):
        list(loader.epoch(epoch))
    assert capsys.readouterr().out.count("b-2.flac") == 1


def test_epochs_depend_on_seed_and_number_alone(small_corpus):
    def run(seed, epoch, draw=0):
        torch.rand(draw)
        audio = small_set(small_corpus, max_size_loaded=26_000, n_threads=1 + draw)
        loader = BatchLoader(audio, 3, "samespeaker", seed=seed, training=True)
        return [summary(item) for item in loader.epoch(epoch)]

    assert run(1, 1) == run(1, 1, draw=3)
    assert run(1, 1) != run(1, 2)
    assert run(1, 1) != run(2, 1)
    state = torch.get_rng_state()
    run(1, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_on_a_device(small_corpus, tmp_path):
    (tmp_path / "labels.txt").write_text("a-1 " + "1 " * 106)
    labels = read_phone_labels(tmp_path / "labels.txt")
    audio = small_set(small_corpus, phone_labels=labels, labelled_only=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, batch = next(BatchLoader(audio, 4, "uniform", **FIXED).epoch(0))
    moved = batch.to(device)
    assert batch.waveform.dtype == torch.int16
    assert moved.waveform.dtype == torch.float32
    assert all(tensor.device.type == device for tensor in moved)
    assert torch.equal(moved.waveform.cpu(), batch.waveform.float() / 32768)
    assert (moved.phone == 1).all()
    assert moved.phone.shape == (4, WINDOW // 160)
    assert [moved.speaker.dtype, moved.window.dtype, moved.continues.dtype] == [
        torch.int64,
        torch.int64,
        torch.bool,
    ]


def test_a_large_listing_is_cheap_to_choose_from():
    """No quadratic step: names, order and plan of 20,000 made-up sequences."""
    sequences = [Sequence(i // 100, f"{i // 100}/{i}.flac", 30_000) for i in range(20_000)]
    corpus = Corpus("", tuple(sequences), tuple(str(i) for i in range(200)))
    chosen = select_sequences(sequences, [s.name for s in sequences[::2]], "list")
    audio = AudioDataset(corpus, chosen, 20_480, max_size_loaded=10**8)
    assert len(BatchLoader(audio, 8, "samespeaker", seed=0, training=True)) > 1000


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
        assert_close(value, case.state_dict[name], what=name)
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


@pytest.mark.parametrize("case", golden_cases("CPCModel"))
def test_golden_model(case):
    encoder = case.config["encoder"]
    model = CPCModel(
        CPCEncoder(encoder["sizeHidden"], encoder["normMode"]), recurrent_network(case.config["ar"])
    )
    assert list(model.state_dict()) == list(case.state_dict)
    model.load_state_dict(case.state_dict)
    context, encoded = model.eval()(case["x"])
    assert_close(context, case["c"])
    assert_close(encoded, case["z"])


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
        "arMode": "LSTM",
        "nLevelsGRU": 1,
        "samplingType": "samespeaker",
        "cpc_mode": None,
        "abspos": False,
        "sizeWindow": 1600,
    }
    return argparse.Namespace(**{**flags, **changes})


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
def test_two_halves_are_one_whole(mode, n_layers):
    ar = kept(mode, n_layers)
    whole = torch.randn(3, 14, 6)
    expected = ar(whole)
    ar.hidden = None
    assert_close(torch.cat([ar(whole[:, :8]), ar(whole[:, 8:])], 1), expected)
    ar.keep_hidden = False
    assert_close(ar(whole), expected)


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
    assert_close(ar(x[:2, 4:8]), expected[:2, 4:8])  # the first rows go on
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
    dropped = dropout_(x.clone(), 0.1, training=True)
    fraction = (dropped == 0).float().mean().item()
    assert fraction == pytest.approx(0.1, abs=0.005)
    assert dropped.mean().item() == pytest.approx(2, rel=0.01)
    kept_values = dropped[dropped != 0]
    assert_close(kept_values, torch.full_like(kept_values, 2 / 0.9), 1e-4)
    torch.manual_seed(5)
    again = dropout_(x.clone(), 0.1, training=True)
    torch.manual_seed(5)
    assert torch.equal(again, dropout_(x.clone(), 0.1, training=True))
    assert not torch.equal(again, dropped)
    assert torch.equal(dropout_(x.clone(), 0.1, training=False), x)


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


def test_load_best_takes_the_best_and_says_if_there_is_none(tmp_path):
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
    "feat_ctx": (build_feature, {}),
    "feat_enc": (build_feature, {"get_encoded": True}),
    "feat_strict": (build_feature, {"strict": True}),
    "feat_seqnorm_strict": (build_feature, {"strict": True, "seq_norm": True}),
    "feat_max20480": (build_feature, {"max_size": 20480}),
    "feat_batch": (build_feature_batch, {}),
    "feat_batch_strict": (
        build_feature_batch,
        {"strict": True, "max_size": 10240, "batch_size": 5},
    ),
}


@needs_real_speech
@pytest.mark.parametrize("array", [*GOLDEN_FEATURES, "feat_keephidden_file1"])
@pytest.mark.parametrize("case", golden_cases("buildFeature"))
def test_features_of_a_file_golden(case, array):
    model, *_ = load_model([case.path.parent / case.config["checkpoint"]])
    model.gAR.keep_hidden = array.startswith("feat_keephidden")
    function, options = GOLDEN_FEATURES.get(array, (build_feature, {}))
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


def test_hidden_state_goes_on_within_a_file_and_not_from_file_to_file(tmp_path, model):
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
    with torch.no_grad():
        expected = torch.cat([model(chunk)[0] for chunk in waveform.split(3200, dim=2)], dim=1)
    assert_close(build_feature(model, tmp_path / "a.wav"), expected)
    assert build_feature(model, tmp_path / "a.wav", strict=True).shape == (1, 50, 8)


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
        (0, {}, "empty|holds no audio"),
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
    (dict(hiddenEncodr=3), "hiddenEncodr: not a flag"),
    (dict(arMode="MLP"), "invalid choice: 'MLP'"),
    (dict(pretrained=True, arMode="GRU"), "arMode: the pretrained model has flags of its own"),
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


# ------------------------------------------------------------------------- train.py, end to end

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


def checkpoint(directory, epoch):
    return torch.load(Path(directory, f"checkpoint_{epoch}.pt"), weights_only=True)


def assert_same(one, other, without=("args",)):
    """Two checkpoints hold the same, bit for bit."""
    assert one.keys() == other.keys()
    for key in one.keys() - set(without):
        assert_equal_trees(one[key], other[key], key)


def assert_equal_trees(one, other, where):
    if torch.is_tensor(one):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal_trees(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal_trees(a, b, f"{where}[{index}]")
    else:
        assert one == other, where


def test_a_run_leaves_checkpoints_arguments_logs_and_curves(tiny_corpus, tmp_path, capsys):
    state = trained(tiny_corpus, tmp_path, "--learningRate", "0.01", "--schedulerRamp", "2")
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoint_0.pt", "checkpoint_1.pt", "checkpoint_args.json", "checkpoint_logs.json",
        "checkpoint_curves.png",
    }  # fmt: skip
    logs = json.loads((tmp_path / "checkpoint_logs.json").read_text())
    assert logs == state["logs"]
    assert logs["epoch"] == [0, 1]
    assert logs["learningRate"] == [0.005, 0.01]
    for key in ("locLoss_train", "locAcc_train", "locLoss_val", "locAcc_val"):
        assert [len(row) for row in logs[key]] == [2, 2]
    args = json.loads((tmp_path / "checkpoint_args.json").read_text())
    assert args["nPredicts"] == 2
    assert args["pathDB"] == f"{tiny_corpus}/audio"
    printed = capsys.readouterr().out
    assert "training set: 6 files" in printed
    assert "windows/s" in printed
    assert str(tmp_path / "checkpoint_curves.png") in printed


def test_a_run_learns(tiny_corpus, tmp_path):
    words = (
        "--hiddenEncoder 32 --hiddenGar 32 --negativeSamplingExt 16 --sizeWindow 6400 "
        "--samplingType uniform --learningRate 0.005"
    ).split()
    state = trained(tiny_corpus, tmp_path, *words, epochs=8)
    start = sum(state["logs"]["before_training"]["locLoss_val"])
    assert sum(state["logs"]["locLoss_val"][-1]) < 0.9 * start
    best = max(sum(row) / 2 for row in state["logs"]["locAcc_val"])
    assert state["best_accuracy"] == best


def test_the_same_seed_gives_the_same_checkpoint(tiny_corpus, tmp_path):
    one, other = (trained(tiny_corpus, tmp_path / name) for name in "ab")
    assert_same(one, other)
    different = trained(tiny_corpus, tmp_path / "c", "--random_seed", "8")
    assert not torch.equal(
        one["gEncoder"]["gEncoder.conv0.weight"], different["gEncoder"]["gEncoder.conv0.weight"]
    )


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
def test_a_run_that_goes_on_ends_like_one_that_never_stopped(words, tiny_corpus, tmp_path):
    whole = trained(tiny_corpus, tmp_path / "whole", *words, epochs=4)
    trained(tiny_corpus, tmp_path / "parts", *words, epochs=2)
    assert run("--pathCheckpoint", tmp_path / "parts", "--nEpoch", 4) == 0
    assert_same(whole, checkpoint(tmp_path / "parts", 3))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_run_stopped_inside_an_epoch_goes_on_from_that_step(
    number, tiny_corpus, tmp_path, monkeypatch
):
    words = ["--samplingType", "sequential", "--max_size_loaded", "60000", *EXAMPLE]
    whole = trained(tiny_corpus, tmp_path / "whole", *words)
    train_on, steps = trainer.Trainer.train_on, []

    def stop_in_step_five(self, *item):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), number)
        train_on(self, *item)

    monkeypatch.setattr(trainer.Trainer, "train_on", stop_in_step_five)
    directory = tmp_path / "parts"
    flags = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", directory, "--nEpoch", 2, *words]
    assert run(*flags) == 128 + number
    position = torch.load(directory / "checkpoint_resume.pt", weights_only=True)["position"]
    assert position[0] == 0
    assert position[1] > 0  # in a later pack
    assert run(*flags) == 0
    assert_same(whole, checkpoint(directory, 1))
    assert not (directory / "checkpoint_resume.pt").exists()


def test_a_run_stopped_in_validation_goes_on_with_it(tiny_corpus, tmp_path, monkeypatch):
    whole = trained(tiny_corpus, tmp_path / "whole")
    validate = trainer.Trainer.validate

    def stop(self, epoch, what):
        if epoch == 1:
            monkeypatch.setattr(trainer.Trainer, "validate", validate)
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(self, epoch, what)

    monkeypatch.setattr(trainer.Trainer, "validate", stop)
    directory = tmp_path / "parts"
    flags = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", directory, "--nEpoch", 2]
    assert run(*flags) == 143
    assert run("--pathCheckpoint", directory) == 0
    assert_same(whole, checkpoint(directory, 1))


def test_resume_every_keeps_the_last_steps_of_a_killed_run(tiny_corpus, tmp_path, monkeypatch):
    whole = trained(tiny_corpus, tmp_path / "whole")
    train_on, steps = trainer.Trainer.train_on, []

    def die_in_step_six(self, *item):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt  # nothing is saved, as if it were killed
        train_on(self, *item)

    monkeypatch.setattr(trainer.Trainer, "train_on", die_in_step_six)
    flags = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path / "parts", "--nEpoch", 2]
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--resume_every", 2)
    state = torch.load(tmp_path / "parts" / "checkpoint_resume.pt", weights_only=True)
    assert state["running"]["batches"] == 4
    assert run(*flags) == 0
    assert_same(whole, checkpoint(tmp_path / "parts", 1))


def test_a_restart_keeps_the_old_run_until_the_new_one_is_saved(tiny_corpus, tmp_path):
    trained(tiny_corpus, tmp_path, epochs=3)
    flags = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path, "--restart"]
    assert run(*flags, "--learningRate", "inf") == 2
    assert (tmp_path / "checkpoint_2.pt").exists()
    assert run(*flags, "--nEpoch", 1) == 0
    assert [p.name for p in tmp_path.glob("*.pt")] == ["checkpoint_0.pt"]


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_weights(
    tiny_corpus, tmp_path, capsys
):
    trained(tiny_corpus, tmp_path, epochs=1)
    before = checkpoint(tmp_path, 0)
    words = ["--pathCheckpoint", tmp_path, "--nEpoch", 2, "--learningRate", "1e30"]
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert re.search(r"epoch 1, pack 0, batch \d+: .*\d+-\d-000\d.flac", error)
    assert_same(before, checkpoint(tmp_path, 0), without=())
    assert not (tmp_path / "checkpoint_1.pt").exists()


def test_a_disk_that_is_full_for_a_while_costs_no_checkpoint(
    tiny_corpus, tmp_path, monkeypatch, capsys
):
    save = trainer.save_checkpoint

    def full_in_epoch_one(directory, state, epoch=None):
        if epoch == 1:
            raise OSError(28, "No space left on device")
        return save(directory, state, epoch)

    monkeypatch.setattr(trainer, "save_checkpoint", full_in_epoch_one)
    trained(tiny_corpus, tmp_path, epochs=3)
    assert {p.name for p in tmp_path.glob("*.pt")} == {"checkpoint_0.pt", "checkpoint_2.pt"}
    assert "No space left" in capsys.readouterr().out


def test_another_corpus_is_said_and_the_next_epoch_begins(
    tiny_corpus, tmp_path, monkeypatch, capsys
):
    flags = [*SMALL, "--pathCheckpoint", tmp_path / "run", "--resume_every", 2, "--nEpoch", 1]
    train_on, steps = trainer.Trainer.train_on, []

    def die_in_step_three(self, *item):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        train_on(self, *item)

    monkeypatch.setattr(trainer.Trainer, "train_on", die_in_step_three)
    with pytest.raises(KeyboardInterrupt):
        run(*on(tiny_corpus), *flags)
    other = write_tiny_corpus(tmp_path / "other", seed=3)
    assert run("--pathCheckpoint", tmp_path / "run", "--pathDB", other / "audio") == 0
    assert "epoch 0 ends here" in capsys.readouterr().out
    assert checkpoint(tmp_path / "run", 0)["logs"]["iter"] == [2]


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


def test_without_a_validation_list_some_sequences_are_set_aside(tiny_corpus, tmp_path, capsys):
    words = ["--pathDB", tiny_corpus / "audio", "--pathCheckpoint", tmp_path, "--nEpoch", 1]
    assert run(*words, *SMALL) == 0
    printed = capsys.readouterr().out
    assert "training set: 8 files" in printed
    assert "validation set: 1 files" in printed


def test_bad_files_among_good_ones_are_skipped_and_named(tmp_path, capsys):
    corpus = write_tiny_corpus(tmp_path)
    (corpus / "audio" / "10" / "0" / "10-0-0000.flac").write_bytes(b"not audio")
    trained(corpus, tmp_path / "run", epochs=1)
    assert "10-0-0000.flac" in capsys.readouterr().out


def written(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("no database", ["--pathDB", "TMP/none"], "none"),
        ("no such files", ["--file_extension", ".wav"], ".flac"),
        ("foreign list", ["--pathTrain", "TMP/foreign"], "foreign"),
        ("labels", ["--supervised", "--path_phone_data", "TMP/labels"], "line 2"),
        ("mask", ["--CPCCTC", "--CPCCTCMasq", "1:2:3"], "--CPCCTCMasq"),
        ("stat", ["--pathCaptureDS", "TMP/foreign", "--captureSetStats", "x:y"], "reprDiff"),
        ("K over M", ["--CPCCTC", "--nPredicts", "9", "--CPCCTCNumMatched", "8"], "--nPredicts 9"),
        ("short windows", ["--sizeWindow", "1600000", "--nPredicts", "2"], "--sizeWindow"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_bad_input_is_one_clear_line(name, words, said, tiny_corpus, tmp_path, capsys):
    written(tmp_path / "foreign", "nobody-0-0000\n")
    written(tmp_path / "labels", "a 1 2 3\nb 1 two\n")
    words = [word.replace("TMP", str(tmp_path)) for word in words]
    flags = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path / "run", *words]
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


def test_a_wrong_sample_rate_names_the_cure(tmp_path, capsys):
    corpus = write_tiny_corpus(tmp_path)
    path = corpus / "audio" / "10" / "0" / "10-0-0001.flac"
    waveform, _ = soundfile.read(path)
    soundfile.write(path, waveform, 8000)
    assert run(*on(corpus), *SMALL, "--pathCheckpoint", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "10-0-0001.flac" in error
    assert "adjust_sample_rate.py" in error


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


@needs_real_speech
@pytest.mark.skipif(not (GOLDEN / "checkpoint").is_dir(), reason="no checkpoint of the original")
def test_a_golden_run_of_the_original_goes_on(tmp_path):
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


@pytest.mark.parametrize("words", [[], EXAMPLE], ids=["cpc", "cpc-ctc"])
def test_capture_on_a_checkpoint_equals_the_one_during_training(words, tiny_corpus, tmp_path):
    flags = capture_flags(tiny_corpus, tmp_path / "during")
    trained(tiny_corpus, tmp_path / "run", *words, *flags)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    again = ["--onlyCapture", "--pathDB", tiny_corpus / "audio", "--pathCheckpoint"]
    flags = capture_flags(tiny_corpus, tmp_path / "after")
    assert run(*again, tmp_path / "run", *flags) == 0
    assert run(*again, tmp_path / "run" / "checkpoint_0.pt", *flags) == 0
    during, after = captured(tmp_path / "during"), captured(tmp_path / "after")
    names = {path.parts[1] for path in during}
    assert names >= {"conv_repr", "ctx_repr", "speaker_align", "phone_align", "pred"}
    assert ("cpcctc_align" in names) == bool(words)
    assert_equal_trees(during, after, "capture")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    index = json.loads((tmp_path / "after" / "1" / "index.json").read_text())
    assert index["windows"][0]["file"].endswith(".flac")


def test_a_capture_that_can_not_be_written_costs_no_epoch(tiny_corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = capture_flags(tiny_corpus, tmp_path / "file")
    words = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path / "run", *flags]
    assert run(*words, "--nEpoch", 2) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert checkpoint(tmp_path / "run", 0)["position"] == [1, 0, 0]


def test_probes_on_a_checkpoint_write_nothing_into_its_directory(tiny_corpus, tmp_path, capsys):
    trained(tiny_corpus, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    words = ["--only_classif_metric", "--pathCheckpoint", tmp_path / "run", "--linsep_n_epoch", "2"]
    words += ["--path_phone_data", tiny_corpus / "phones.txt", "--linsep_logs_dir", tmp_path / "l"]
    assert run(*words) == 0
    assert run(*words, "--CTCphones") == 0
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert (tmp_path / "l" / "1" / "phone" / "logs.json").is_file()
    assert not (tmp_path / "l" / "1" / "speaker").exists()


@pytest.mark.parametrize(
    "words", [[], ["PHONES"], ["PHONES", "--CTC"], ["PHONES", "--onEncoder", "--nLevelsPhone", "2"]]
)
def test_supervised_training_learns_the_labels(words, tiny_corpus, tmp_path):
    phones = ["--path_phone_data", tiny_corpus / "phones.txt"]
    words = [item for word in words for item in (phones if word == "PHONES" else [word])]
    state = trained(tiny_corpus, tmp_path, "--supervised", "--learningRate", "0.01", *words,
                    epochs=4)  # fmt: skip
    losses = [row[0] for row in state["logs"]["locLoss_train"]]
    assert losses[-1] < losses[0]
    assert run("--pathCheckpoint", tmp_path, "--nEpoch", 5) == 0


@pytest.mark.parametrize("mode", ["reverse", "none"])
def test_the_other_modes_of_cpc_run(mode, tiny_corpus, tmp_path):
    trained(tiny_corpus, tmp_path, "--cpc_mode", mode, epochs=1)


def test_a_hook_that_never_comes_is_said_at_the_start(tiny_corpus, tmp_path, capsys):
    words = ["--supervised_classif_metric", "--speaker_sep", "--linsep_logs_dir", tmp_path / "l"]
    trained(tiny_corpus, tmp_path / "run", *words)
    assert "never in a run of 2" in capsys.readouterr().out
