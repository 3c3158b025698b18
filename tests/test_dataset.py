"""Tests of corpora, packs, windows and batches."""

import functools
import gc
import json
import mmap
import os
import re
import shutil
import sys
import threading
import weakref
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch

import dataset
from dataset import SAMPLINGS, AudioDataset, BatchLoader, Position, allowed_bad_files, build_sets
from feature_loader import load_waveform
from tests.helpers import REAL_SPEECH, golden_cases, needs_real_speech
from utils.data import audio, listing, packs, workers
from utils.data.corpus import (
    Corpus,
    Utterance,
    cut_for_debugging,
    keep_percentage,
    keep_total,
    listed_utterances,
    read_utterance_list,
    scan_corpus,
    select_utterances,
    set_aside,
    split_utterances,
    warn_of_single_speaker,
    warn_of_speakers,
    warn_of_subsets,
)
from utils.data.labels import PhoneLabels, read_phone_labels
from utils.data.names import files_by_shortest_key
from utils.data.packs import allocate_audio
from utils.data.windows import (
    Layout,
    count_batches,
    largest_pack,
    plan_pack,
    plan_rows,
    split_into_packs,
)
from utils.data.workers import Workers
from utils.misc import SAMPLE_RATE, UserError, first_few, generator_from
from utils.run.command import DefaultExtension
from utils.run.console import PlainProgress
from utils.run.distributed import World

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
    return AudioDataset(corpus, corpus.utterances, WINDOW, **options)


def concatenated(audio):
    """The audio in a pack of all files, read file by file in float."""
    paths = [os.path.join(audio.root, u.path) for u in audio.utterances]
    return np.concatenate([soundfile.read(path, dtype="float32")[0] for path in paths])


def summary(item):
    """A batch and its position as something to compare."""
    position, batch = item
    return (*position, batch.window.tolist(), batch.continues.tolist(), batch.waveform.sum().item())


# --------------------------------------------------------------- extensions that nobody has given


@pytest.mark.parametrize(
    ("names", "chosen", "said"),
    [
        (["a.wav", "b.wav", "b.txt", "._b.flac"], ".wav", ""),
        (["DR1/F/a.WAV", "DR1/F/a.PHN"], ".WAV", ""),
        (["a.flac", "b.mp3", "c.mp3"], ".flac", "there are 2 .mp3, 1 .flac: those .* .flac are"),
        (["a.ogg", "b.mp3", "c.mp3"], None, "several kinds of files, 2 .mp3, 1 .ogg: choose one"),
        (["a.wav", "b.WAV"], None, "1 .WAV, 1 .wav"),
        (["a.txt", "b"], ".flac", ""),  # find_files names what there is
    ],
    ids="one capital several foreign letters none".split(),
)
def test_the_default_extension_is_that_of_the_only_kind(tmp_path, capsys, names, chosen, said):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    if chosen:
        assert listing.choose_extension(tmp_path, DefaultExtension(".flac")) == chosen
        assert bool(said) == bool(capsys.readouterr().out)
    else:
        with pytest.raises(UserError, match=said):
            listing.choose_extension(tmp_path, DefaultExtension(".flac"))
    assert listing.choose_extension(tmp_path, ".flac") == ".flac"


def test_the_kind_is_looked_for_until_the_default_is_listed(tmp_path, monkeypatch):
    write_audio(tmp_path, {"s/a.wav": noise(800)})
    for ignore_cache in (False, False, True):
        corpus = scan_corpus(tmp_path, DefaultExtension(".flac"), ignore_cache=ignore_cache)
        assert (type(corpus.extension), corpus.extension) == (str, ".wav")
    write_audio(tmp_path, {"s/a.flac": noise(900)})
    assert scan_corpus(tmp_path, DefaultExtension(".flac")).extension == ".flac"
    monkeypatch.setattr(listing, "_walk", None)
    corpus = scan_corpus(tmp_path, DefaultExtension(".flac"))
    assert [(u.path, u.samples) for u in corpus.utterances] == [("s/a.flac", 900)]
    assert (type(corpus.extension), corpus.extension) == (str, ".flac")


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
        found = {u.path: corpus.speakers[u.speaker] for u in corpus.utterances}
        assert found == golden[f"level{level}"]["path_to_speaker"]
        assert len(corpus.speakers) == golden[f"level{level}"]["n_speakers"]
    names = {
        "seq_list.txt": read_utterance_list(REAL_SPEECH / "seven_sequences.txt"),
        "all.txt": [u.name for u in corpus.utterances][::-1],
    }
    for selection in golden["filter"].values():
        chosen = select_utterances(corpus.utterances, names[selection["list"]], selection["list"])
        assert [u.path for u in thinned(chosen, **selection["kwargs"])] == selection["result"]


@pytest.mark.parametrize("case", golden_cases("dataset_scan"))
def test_golden_percentage_and_total(case):
    utterances = [Utterance(0, f"a/{i:03d}.wav", 1) for i in range(37)]
    for name, expected in read_golden(case.path)["filter_synthetic37"].items():
        keyword = {"tot": "totalNum", "pct": "percentage"}[name[:3]]
        assert [u.path for u in thinned(utterances, **{keyword: int(name[3:])})] == expected, name


def thinned(utterances, percentage=None, totalNum=None):  # noqa: N803
    if percentage:
        return keep_percentage(utterances, percentage)
    return keep_total(utterances, totalNum) if totalNum else utterances


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
    assert sum(u.samples for u in corpus.utterances) == golden["tot_size"]
    assert AudioDataset(corpus, corpus.utterances, golden["win"]).n_windows == golden["n_dataset"]
    in_pack = corpus.utterances
    if golden["labels"] == "packs":  # its files are known only by their lengths
        in_pack = [u for u in in_pack if u.samples in np.diff(golden["seqLabel0"])]
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
            assert audio.speakers[pack.layout.file_at(offset)] == batch["speaker"][i]
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


def test_speakers_and_utterances_are_sorted(tmp_path):
    paths = ["b/1/z.wav", "a/2/y.wav", "a/1/x.wav", "a/w.wav", "a/1/y.wav", "v.wav"]
    write_audio(tmp_path, {path: noise(200) for path in paths})
    corpus = scan_corpus(tmp_path, ".wav")
    assert corpus.speakers == ("", "a", "b")
    assert [(u.speaker, u.path) for u in corpus.utterances] == [
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


def test_names_that_begin_with_a_dot_are_left_out(tmp_path, capsys):
    """As a Mac writes `._name` beside each file, and keeps deleted files in `.Trashes`."""
    root = tmp_path / ".hidden" / "audio"  # what is above the root doesn't count
    write_audio(root, {"s/a.wav": noise(200), "s/.wav/b.wav": noise(200), ".t/1/c.wav": noise(200)})
    for path in ("s/._a.wav", "s/.DS_Store", "._s", ".t/._c.wav"):
        (root / path).write_bytes(b"\0\5\26\7")
    assert [u.path for u in scan_corpus(root, ".wav").utterances] == ["s/a.wav"]
    assert f"{root}: left out 4 files, hidden by a dot" in capsys.readouterr().out
    cached = root / listing.LISTING  # as an earlier version wrote it
    cached.write_text(cached.read_text().replace("s/a.wav", "s/._a.wav"))
    assert [u.path for u in scan_corpus(root, ".wav").utterances] == ["s/a.wav"]
    (root / "s" / "a.wav").unlink()
    with pytest.raises(UserError, match="no file ends with"):
        scan_corpus(root, ".wav", ignore_cache=True)
    assert listing.find_files(root / ".t", ".wav") == ["1/c.wav"]
    assert "left out 1 file, " in capsys.readouterr().out


def test_groups_of_speakers_that_count_as_speakers_are_warned_of(tmp_path, capsys):
    timit = [f"TRAIN/{s}/{n}.WAV" for s in ("DR1/FAAA0", "DR1/MBBB0", "DR2/FCCC0") for n in "ab"]
    chapters = [
        f"{speaker}/{chapter}/{speaker}-{chapter}.WAV" for speaker in "xy" for chapter in "12"
    ]
    write_audio(tmp_path, {path: noise(200) for path in timit})
    write_audio(tmp_path / "books", {path: noise(200) for path in chapters})
    for level, root, warned in ((1, "TRAIN", True), (2, "TRAIN", False), (1, "books", False)):
        corpus = scan_corpus(tmp_path / root, ".WAV", speaker_level=level)
        warn_of_speakers(corpus)
        assert ("give --speaker_level 2" in capsys.readouterr().out) == warned
    assert scan_corpus(tmp_path / "TRAIN", ".WAV", speaker_level=2).speakers == (
        "DR1/FAAA0",
        "DR1/MBBB0",
        "DR2/FCCC0",
    )


def test_a_database_given_a_folder_too_high_or_too_low_is_warned_of(tmp_path, capsys):
    libri = {f"train/{speaker}/1/{speaker}-1-0.flac": noise(200) for speaker in (19, 26)}
    write_audio(tmp_path, libri)
    warn_of_single_speaker(scan_corpus(tmp_path))
    said = capsys.readouterr().out
    assert "that is train for every file" in said
    assert f"give --pathDB {tmp_path / 'train'}, or --speaker_level 2\n" in said
    warn_of_single_speaker(scan_corpus(tmp_path / "train"))
    assert capsys.readouterr().out == ""
    warn_of_single_speaker(scan_corpus(tmp_path / "train" / "19"))
    said = capsys.readouterr().out
    assert "that is 1 for every file" in said
    assert "if the folders in" not in said
    warn_of_single_speaker(scan_corpus(tmp_path / "train" / "19" / "1"))
    assert "that is none for every file" in capsys.readouterr().out


LIBRISPEECH = ["clean/19/1/19-1-0.flac", "clean/26/1/26-1-0.flac", "other/30/2/30-2-0.flac"]


def listed(paths):
    """A Corpus of files of these names, of which none is there."""
    speakers = sorted({path.partition("/")[0] for path in paths})
    numbers = (speakers.index(path.partition("/")[0]) for path in paths)
    return Corpus("db", tuple(map(Utterance, numbers, paths, [WINDOW] * len(paths))), speakers)


@pytest.mark.parametrize("sign", ["-", "_"])
@pytest.mark.parametrize("between", ["", "audio/"])
def test_subsets_that_count_as_speakers_are_warned_of(sign, between, capsys):
    subsets = [path.replace("-", sign).replace("/", f"/{between}", 1) for path in LIBRISPEECH]
    warn_of_subsets(listed(subsets))
    said = capsys.readouterr().out
    assert "warning: db: clean, other count as one speaker each" in said
    level = 3 if between else 2
    assert f"3 speakers: give --speaker_level {level}, or --pathDB one of these folders" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "paths",
    [
        [path.partition("/")[2] for path in LIBRISPEECH],  # a subset alone
        LIBRISPEECH[:2],  # a single one has its own warning
        [*LIBRISPEECH, "mine/hello.flac"],
        ["19/1/x/a.flac", "26/1/x/a.flac"],
        ["19/book/1/19-book-1.flac", "26/book/1/26-book-1.flac"],
        ["19/book/book-1.flac", "26/book/book-1.flac"],
        ["19/hello.flac", "26/hello.flac", "27.flac"],
    ],
)
def test_an_ordinary_corpus_is_not_taken_for_subsets(paths, capsys):
    warn_of_subsets(listed(paths))
    assert capsys.readouterr().out == ""


def test_listing_spares_opening_the_files(own_corpus, monkeypatch):
    opened = []
    original = listing.read_header
    monkeypatch.setattr(listing, "read_header", lambda path: opened.append(path) or original(path))
    first = scan_corpus(own_corpus)
    assert len(opened) == len(LENGTHS)
    assert {u.path: u.samples for u in first.utterances} == LENGTHS
    assert scan_corpus(own_corpus) == first
    assert scan_corpus(own_corpus, speaker_level=2).speakers == ("a/x", "a/y", "b/x", "c/x", "c/y")
    assert len(opened) == len(LENGTHS)
    scan_corpus(own_corpus, ignore_cache=True)
    assert len(opened) == 2 * len(LENGTHS)


@pytest.mark.parametrize(
    ("folder", "name"), [("b/x", "b/x"), ("c", "c"), ("", ".")], ids=["audio", "speaker", "root"]
)
def test_folders_changed_after_the_listing_are_mentioned(folder, name, own_corpus, capsys):
    first = scan_corpus(own_corpus)
    assert scan_corpus(own_corpus) == first
    assert capsys.readouterr().out == ""
    later = os.stat(own_corpus / listing.LISTING).st_ctime + 60
    os.utime(own_corpus / folder, (later, later))
    assert scan_corpus(own_corpus) == first
    assert f"1 folder changed since the files were listed: {name} (" in capsys.readouterr().out


def test_listing_keeps_extensions_apart(own_corpus):
    write_audio(own_corpus, {"d/d-1.wav": noise(3200)})
    assert len(scan_corpus(own_corpus, ".flac").utterances) == len(LENGTHS)
    assert [u.path for u in scan_corpus(own_corpus, ".wav").utterances] == ["d/d-1.wav"]
    (own_corpus / "d/d-1.wav").unlink()
    assert len(scan_corpus(own_corpus, ".flac").utterances) == len(LENGTHS)
    assert [u.path for u in scan_corpus(own_corpus, ".wav").utterances] == ["d/d-1.wav"]
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
        lambda content: json.dumps({**content, "extensions": {".flac": {}}}),
        lambda content: json.dumps({**content, "extensions": {".flac": ""}}),
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


@pytest.mark.parametrize("place", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_a_listing_that_never_ends_is_replaced(place, own_corpus):
    place(own_corpus / listing.LISTING)
    assert len(scan_corpus(own_corpus).utterances) == len(LENGTHS)
    assert (own_corpus / listing.LISTING).is_file()


def test_database_that_cannot_be_written_to(own_corpus, capsys):
    (own_corpus / listing.LISTING / "in the way").mkdir(parents=True)
    assert len(scan_corpus(own_corpus).utterances) == len(LENGTHS)
    assert "can't be cached" in capsys.readouterr().out
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
    assert {u.path for u in corpus.utterances} == {*LENGTHS, "d/q/d-1.flac", "b/gone.flac"}
    problems = {u.path: u.problem for u in corpus.utterances if u.problem}
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
    problems = {u.path: u.problem for u in scan_corpus(own_corpus).utterances if u.problem}
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
    listed_names = [name.replace("café", "s/café") for name in names]  # there are two
    text = "\ufeff" + "\r\n".join([*listed_names, "", "t/café", "gone\udce9 "]) + "\r\n"
    (tmp_path / "list.txt").write_text(text, errors="surrogateescape")
    listed = read_utterance_list(tmp_path / "list.txt")
    assert listed == [*listed_names, "t/café", "gone\udce9"]
    chosen = select_utterances(corpus.utterances, listed, "list.txt")
    assert Counter(u.name for u in chosen) == {**dict.fromkeys(names, 1), "café": 2}
    assert "list.txt: 1 of 7 names have no file" in capsys.readouterr().out
    audio = AudioDataset(corpus, chosen, WINDOW)
    assert sum(len(b.window) for _, b in BatchLoader(audio, 4, "uniform", **FIXED).epoch(0)) == 11


# -------------------------------------------------------------------------------- lists and labels


def test_lists_that_name_nothing(small_corpus, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="empty list"):
        read_utterance_list(tmp_path / "empty.txt")
    with pytest.raises(UserError, match="can't be read"):
        read_utterance_list(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="list.txt: 2 of 2 names have no file.*x.flac, y"):
        select_utterances(small_corpus.utterances, ["y", "x.flac"], "list.txt")


@pytest.mark.parametrize("content", [b"fLaC\x00\x00\x22\x10\n", b"a-1 " + b"12 " * 100 + b"\n"])
def test_a_file_that_is_no_list_of_names_is_refused(content, tmp_path):
    (tmp_path / "list.txt").write_bytes(b"a-1\n" + content)
    with pytest.raises(UserError, match="doesn't look like a list of names") as refused:
        read_utterance_list(tmp_path / "list.txt")
    assert len(str(refused.value)) < len(str(tmp_path)) + 160


def test_listed_utterances(small_corpus, tmp_path):
    (tmp_path / "list.txt").write_text("b-2\na-1\n")
    assert listed_utterances(small_corpus) == list(small_corpus.utterances)
    chosen = listed_utterances(small_corpus, tmp_path / "list.txt")
    assert [u.name for u in chosen] == ["a-1", "b-2"]


def test_split_by_two_lists_or_at_random(small_corpus, tmp_path):
    (tmp_path / "train.txt").write_text("b-2\na-1\nc-1\n")
    (tmp_path / "val.txt").write_text("b-1\n")

    def names(*args, **options):
        return [[u.name for u in part] for part in split_utterances(small_corpus, *args, **options)]

    lists = tmp_path / "train.txt", tmp_path / "val.txt"
    assert names(*lists) == [["a-1", "b-2", "c-1"], ["b-1"]]
    assert names(None, lists[1]) == [[u.name for u in small_corpus.utterances], ["b-1"]]
    splits = [names(lists[0], seed=seed) for seed in range(20)]
    assert {len(validation) for _, validation in splits} == {1}
    assert {validation[0] for _, validation in splits} == {"a-1", "b-2", "c-1"}
    assert all(sorted(sum(split, [])) == ["a-1", "b-2", "c-1"] for split in splits)
    assert splits == [names(lists[0], seed=seed) for seed in range(20)]


def test_utterances_set_aside_depend_on_the_seed_alone():
    utterances = [Utterance(0, f"a/{i}.flac", 1) for i in range(250)]
    training, validation = set_aside(utterances, 0.01, seed=7)
    assert [u.name for u in validation] == ["75", "176"]  # resumed runs need the same
    assert training == [u for u in utterances if u not in validation]
    assert [len(part) for part in set_aside(utterances, 0.5, seed=7)] == [125, 125]
    with pytest.raises(UserError, match="--pathVal FILE is needed"):
        set_aside(utterances[:1], 0.01, seed=7)


def corpus_of(n_files, samples, speakers=2):
    """Utterances of speakers with equally many files; the first of each is unusable."""
    utterances = [
        Utterance(s, f"{s}/{s}-{i}.wav", samples if i else 0, problem="" if i else "empty")
        for s in range(speakers)
        for i in range(n_files)
    ]
    return Corpus("", tuple(utterances), tuple(map(str, range(speakers))))


def test_validation_files_are_enough_for_a_batch_of_all_speakers():
    sizes = {"seed": 3, "size_window": 20_480, "batch_size": 4}
    corpus = corpus_of(40, 16_000)
    training, validation = split_utterances(corpus, **sizes)
    assert Counter(u.speaker for u in validation) == {0: 3, 1: 3}  # 81,920 samples
    assert not any(u.problem for u in validation)
    assert sorted([*training, *validation]) == sorted(corpus.utterances)
    assert split_utterances(corpus, **sizes) == (training, validation)
    one_window = sizes | {"batch_size": 1}  # three files would be enough
    _, validation = split_utterances(corpus_of(30, 8_000, speakers=5), **one_window)
    assert sorted(u.speaker for u in validation) == list(range(5))
    _, validation = split_utterances(corpus_of(2, 16_000, speakers=10), **sizes)
    assert len(validation) == 6  # though each speaker has one usable file only
    _, validation = split_utterances(corpus_of(3, 16_000), **sizes)
    assert len(validation) == 3  # half of them


def test_a_validation_set_with_a_window_stays_as_it_was():
    """Runs that resume need the same; also where it has no full batch."""
    corpus = corpus_of(200, 20_480)
    for seed in range(5):
        split = split_utterances(corpus, seed=seed, size_window=20_480, batch_size=64)
        assert split == set_aside(corpus.utterances, 0.01, seed)


@pytest.mark.parametrize("last", [False, True])
def test_debugging_takes_1000_and_100_utterances(last):
    split = list(range(1500)), list(range(300))
    training, validation = cut_for_debugging(split, last=last)
    assert training == (split[0][500:] if last else split[0][:1000])
    assert validation == (split[1][200:] if last else split[1][:100])
    few = [1, 2], [3]
    assert cut_for_debugging(few, last=last) == few


def test_long_names_are_cut_where_they_are_shown():
    assert first_few(["a" * 5000, "b\n"]) == "a" * 200 + "..., b?"


def test_missing_names_are_counted_and_the_first_few_named(small_corpus, capsys):
    names = ["b-2", "a-1", *(f"gone-{i}" for i in range(9))]
    chosen = select_utterances(small_corpus.utterances, names, "list.txt")
    assert [u.name for u in chosen] == ["a-1", "b-2"]
    said = capsys.readouterr().out
    assert "9 of 11 names" in said
    assert "gone-0, gone-1, gone-2, gone-3, gone-4 and 4 more" in said


def test_a_name_of_two_files_needs_its_folders(tmp_path):
    write_audio(tmp_path, {f"{s}/day/{n}.wav": noise(320) for s in ("s1", "s2") for n in "ab"})
    corpus = scan_corpus(tmp_path, ".wav")
    both = corpus.utterances[0], corpus.utterances[2]
    assert select_utterances(corpus.utterances, ["s2/a", "s1/day/a", "s1/a"], "list") == list(both)
    ways = "may be s1/day/a.wav, s2/day/a.wav: write .*, as in s1/day/a, s2/day/a, in lists"
    with pytest.raises(UserError, match=f"list: a {ways}"):
        select_utterances(corpus.utterances, ["a"], "list")
    labels = PhoneLabels({"s1/a": np.array([1, 2]), "s2/a": np.array([3, 4])}, 5, "labels")
    labelled = AudioDataset(corpus, both, 160, phone_labels=labels)
    assert labelled.labels_of([0, 1]).tolist() == [1, 2, 3, 4]
    labels = PhoneLabels({"s1/a": np.array([1, 2]), "a": np.array([3, 4])}, 5, "labels")
    for chosen in (both, both[1:]):  # the other one may be in another set
        with pytest.raises(UserError, match=f"labels: a {ways}"):
            AudioDataset(corpus, chosen, 160, phone_labels=labels)
    assert AudioDataset(corpus, both[:1], 160, phone_labels=labels).labels_of([0]).tolist() == [
        1,
        2,
    ]


def test_names_are_compared_in_composed_form(tmp_path):
    """The names of files decomposed, as a Mac writes them, those in lists and labels not."""
    composed, decomposed = "Zo\u00e9", "Zoe\u0301"
    write_audio(tmp_path / "nfd", {f"s/{decomposed}.wav": noise(3200)})
    write_audio(tmp_path / "nfc", {f"s/{composed}.wav": noise(3200)})
    for place in ("nfd", "nfc"):
        corpus = scan_corpus(tmp_path / place, ".wav")
        for name in (composed, decomposed):
            (tmp_path / "list").write_text(name)
            (tmp_path / "labels").write_text(f"{name} {'1 ' * 20}")
            chosen = listed_utterances(corpus, tmp_path / "list")
            labels = read_phone_labels(tmp_path / "labels")
            labelled = AudioDataset(corpus, chosen, 160, phone_labels=labels)
            assert labelled.samples.tolist() == [3200]
            assert files_by_shortest_key(tmp_path / place, ".wav").keys() == {composed}


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
    return {
        "bad/truncated.flac": "can't be decoded: ",
        "bad/cut.flac": "can't be decoded: ",
        "bad/text.flac": "can't be decoded: ",
        "bad/nothing.flac": "empty)",
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
        assert f"{path} ({reason}" in said


@pytest.mark.parametrize("claim", [0, 2**36 - 1, 2**33])
def test_a_file_from_a_pipe_is_read_to_its_end(own_corpus, claim):
    """0 in its header: the encoder couldn't go back to fill in the length."""
    write_audio(own_corpus, {"z/streamed.flac": noise(50_000)})
    path = own_corpus / "z/streamed.flac"
    expected = soundfile.read(path, dtype="int16")[0]
    content = bytearray(path.read_bytes())
    content[21:26] = ((content[21] >> 4 << 36) | claim).to_bytes(5, "big")
    path.write_bytes(content)
    assert np.array_equal(load_waveform(path)[0].numpy(), expected / np.float32(32768))
    for ignore_cache in (True, False):
        corpus = scan_corpus(own_corpus, ignore_cache=ignore_cache)
        streamed = [u for u in corpus.utterances if u.name == "streamed"]
        pack = AudioDataset(corpus, streamed, 1600, max_bad_files=0).only_pack()
        assert np.array_equal(pack.audio.numpy(), expected)


def test_integers_stored_as_floats_are_named_once(tmp_path, monkeypatch, capsys):
    files = {f"s/{i}.wav": noise(5000, i).astype(np.float32) for i in range(3)}
    for path, waveform in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / path, waveform, SAMPLE_RATE, subtype="FLOAT")
    monkeypatch.setattr(audio, "_first_warning", threading.Lock())
    corpus = scan_corpus(tmp_path, ".wav")
    AudioDataset(corpus, corpus.utterances, 1600).only_pack()
    load_waveform(tmp_path / "s/0.wav")
    said = capsys.readouterr().out
    assert len(re.findall(r"warning: .*/s/\d.wav: many samples lie far beyond", said)) == 1
    monkeypatch.setattr(audio, "_first_warning", threading.Lock())
    load_waveform(tmp_path / "s/0.wav")
    assert "integers stored as floats" in capsys.readouterr().out


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
    assert "s/nan.wav (contains NaN or infinite samples)" in said
    assert "s/infinite.wav (contains NaN or infinite samples)" in said


def test_a_file_that_ends_early(tmp_path, capsys):
    write_audio(tmp_path, {f"s/{i}.mp3": noise(80_000, i) / 60_000 for i in range(3)})
    content = (tmp_path / "s/1.mp3").read_bytes()
    (tmp_path / "s/1.mp3").write_bytes(content[: len(content) // 2])
    audio = small_set(scan_corpus(tmp_path, ".mp3"))
    assert audio.only_pack().layout.files.tolist() == [0, 2]
    said = capsys.readouterr().out
    assert "skipped 1 of 3 files: s/1.mp3 (ends after" in said
    assert "its header says 80000)" in said
    reason = re.search(r"ends after \d+ samples, but its header says 80000", said)[0]
    with pytest.raises(UserError, match=f"s/1.mp3: {reason}"):
        load_waveform(tmp_path / "s/1.mp3")


@pytest.mark.parametrize("name", ["a.wav", "a.au"])
def test_a_header_of_no_samples_is_not_an_empty_file(tmp_path, name):
    """Some programs that write to a pipe leave 0 there; libsndfile then reads nothing."""
    soundfile.write(tmp_path / name, noise(5_000), SAMPLE_RATE)
    content = bytearray((tmp_path / name).read_bytes())
    place = slice(40, 44) if name == "a.wav" else slice(8, 12)
    assert int.from_bytes(content[place], "little" if name == "a.wav" else "big") == 10_000
    content[place] = bytes(4)
    (tmp_path / name).write_bytes(content)
    reason = "its header says 0 samples of 10,0.. bytes: `sox --ignore-length"
    assert re.match(reason, audio.read_header(tmp_path / name).problem)
    with pytest.raises(UserError, match=f"{name}: {reason}"):
        load_waveform(tmp_path / name)


def test_silent_files_are_named_once_and_used(own_corpus, capsys):
    left = noise(8_000)
    quiet = np.zeros(8_000, dtype=np.int16)
    files = {"b/zero.flac": quiet, "b/cancel.flac": np.stack([left, -left], axis=1)}
    files |= {"b/offset.flac": quiet + 7, "b/late.flac": np.append(quiet, noise(8_000))}
    write_audio(own_corpus, files)
    audio = small_set(scan_corpus(own_corpus), max_size_loaded=20_000)
    loader = BatchLoader(audio, 4, "uniform", seed=0, training=False)
    for epoch in range(2):
        assert sum(len(batch.window) for _, batch in loader.epoch(epoch)) > 30
    printed = capsys.readouterr().out
    named = re.findall(r"b/\w+\.flac", printed)
    assert sorted(named) == ["b/cancel.flac", "b/offset.flac", "b/zero.flac"]
    assert "of 11 files are digital silence" in printed
    for path in files:
        load_waveform(own_corpus / path)
    warned = re.findall(r"warning: .*(b/\w+\.flac): digital silence", capsys.readouterr().out)
    assert sorted(warned) == ["b/cancel.flac", "b/offset.flac", "b/zero.flac"]


def test_too_many_bad_files(own_corpus):
    break_files(own_corpus)
    corpus = scan_corpus(own_corpus)
    with pytest.raises(UserError, match=r"3 of 11 audio files.*max_bad_files allows 2.*nothing.fl"):
        small_set(corpus)
    bad = [u for u in corpus.utterances if u.path == "bad/truncated.flac"]
    with pytest.raises(UserError, match="1 of 1 audio files are bad, nothing is left: "):
        BatchLoader(AudioDataset(corpus, bad, WINDOW), 1, "uniform", **FIXED).dataset.only_pack()
    good = [u for u in corpus.utterances if u.path in LENGTHS]
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
    kept = [u for u in corpus.utterances if u.path not in (lost, changed, shorter)]
    expected = AudioDataset(corpus, kept, WINDOW).only_pack()
    (own_corpus / lost).unlink()
    write_audio(own_corpus, {changed: noise(777)})
    content = (own_corpus / shorter).read_bytes()
    (own_corpus / shorter).write_bytes(content[: len(content) // 2])
    audio = small_set(scan_corpus(own_corpus), max_bad_files=0.5)
    pack = audio.only_pack()
    assert torch.equal(pack.audio, expected.audio)
    assert [audio.utterances[i].path for i in pack.layout.files] == [u.path for u in kept]
    said = capsys.readouterr().out
    assert f"{lost} (deleted since the database was listed; --ignore_cache" in said
    assert f"{changed} (changed since the database was listed; --ignore_cache" in said
    assert f"{shorter} (can't be decoded" in said


def test_a_repaired_file_is_used_again(own_corpus):
    (own_corpus / "b/x/b-3.flac").write_text("broken")
    assert [u.path for u in scan_corpus(own_corpus).utterances if u.problem] == ["b/x/b-3.flac"]
    write_audio(own_corpus, {"b/x/b-3.flac": noise(3200)})
    assert {u.path: u.samples for u in scan_corpus(own_corpus).utterances}["b/x/b-3.flac"] == 3200


def test_wrong_sample_rate(own_corpus):
    write_audio(own_corpus, {"b/x/b-4.flac": noise(9), "b/x/b-3.flac": noise(9)}, rate=8000)
    corpus = scan_corpus(own_corpus)
    with pytest.raises(UserError, match=r"2 of 9 files.* b/x/b-3.flac \(8000 Hz\).*adjust_sample"):
        small_set(corpus)
    good = [u for u in corpus.utterances if u.path in LENGTHS]
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
    expected = torch.from_numpy(concatenated(audio))[: audio.n_windows * WINDOW]
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
    assert torch.equal(only_waveform(audio), torch.from_numpy(concatenated(audio)))
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
    audio = AudioDataset(corpus, corpus.utterances, 3200, phone_labels=labels)
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
    assert "2 of 6 files are shorter or longer than their labels, by 10 frames at most" in said
    assert ": b/x/b-2.flac (8000 samples, 60 labels); both are cut to the shorter" in said
    assert "6 of 7 files have phone labels" in audio.describe()
    with pytest.raises(ValueError, match="labelled_only"):
        small_set(small_corpus, phone_labels=labels)
    path.write_text("other 1 2 3\n")
    with pytest.raises(UserError, match=r"labels.txt: has labels for none of the 7 .*a-1"):
        small_set(small_corpus, phone_labels=read_phone_labels(path), labelled_only=True)


def test_labels_that_differ_by_a_frame_or_two_cause_no_warning(small_corpus, tmp_path, capsys):
    for n_labels, warns in ((52, False), (53, True)):  # b-2 has 50 frames
        path = tmp_path / "labels.txt"
        path.write_text(f"b-2 {' '.join(['3'] * n_labels)}\n")
        small_set(small_corpus, phone_labels=read_phone_labels(path), labelled_only=True)
        assert ("than their labels" in capsys.readouterr().out) == warns


def labels_by_factor(tmp_path, factor, names=None):
    path = tmp_path / "labels.txt"
    frames = {path[4:7]: n // 160 for path, n in LENGTHS.items() if not names or path[4:7] in names}
    lines = (f"{name}{' 1' * round(factor * n)}\n" for name, n in frames.items())
    path.write_text("".join(lines))
    return read_phone_labels(path)


@pytest.mark.parametrize(("factor", "duration"), [(0.5, "20"), (0.8, "12.5"), (2, "5")])
def test_labels_at_another_rate_are_refused(small_corpus, tmp_path, factor, duration):
    labels = labels_by_factor(tmp_path, factor)
    with pytest.raises(UserError, match=rf"files of the training .* lasts {duration} ms instead"):
        small_set(small_corpus, phone_labels=labels)


def test_labels_of_other_audio_are_refused(small_corpus, tmp_path):
    labels = labels_by_factor(tmp_path, 1)
    names, rows = list(labels.labels), list(labels.labels.values())
    swapped = labels._replace(labels=dict(zip(names, rows[::-1], strict=True)))
    with pytest.raises(UserError, match="6 of 7 files .* do they belong to other audio"):
        small_set(small_corpus, phone_labels=swapped)


def test_few_files_of_another_length_are_only_a_warning(small_corpus, tmp_path, capsys):
    labels = labels_by_factor(tmp_path, 1)
    labels.labels["a-1"] = labels.labels["a-1"][:50]
    small_set(small_corpus, phone_labels=labels)
    assert "warning: training set: 1 of 7 files are shorter or longer" in capsys.readouterr().out


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
    one = AudioDataset(small_corpus, small_corpus.utterances[:1], WINDOW)
    assert re.search(r": 1 file, 0.0 min, 1 speaker, \d+ windows", one.describe())
    copy = scan_corpus(own_corpus)
    print_of = [
        AudioDataset(copy, utterances, WINDOW).fingerprint()
        for utterances in (
            copy.utterances[::-1],
            copy.utterances[1:],
            [copy.utterances[0]._replace(samples=5), *copy.utterances[1:]],
        )
    ]
    assert audio.fingerprint() == print_of[0] == "38c27628b1100b99"
    assert len(set(print_of)) == 3


def test_training_and_validation_set(small_corpus, tmp_path, capsys):
    split = small_corpus.utterances[:5], small_corpus.utterances[5:]
    sets = build_sets(small_corpus, split, WINDOW, max_sizes=(50_000, 70_000), n_threads=3)
    said = capsys.readouterr().out.splitlines()
    assert [audio.describe() for audio in sets] == said
    assert [line.partition(":")[0] for line in said] == ["training set", "validation set"]
    assert [audio.utterances for audio in sets] == list(split)
    assert [audio.max_size_loaded for audio in sets] == [50_000, 70_000]
    assert [audio.n_threads for audio in sets] == [3, 3]
    assert [audio.phone_labels for audio in sets] == [None, None]

    (tmp_path / "labels.txt").write_text(f"b-1{' 1' * 74}\nc-2{' 2' * 128}\n")
    labels = read_phone_labels(tmp_path / "labels.txt")
    sets = build_sets(small_corpus, split, WINDOW, labels=labels)
    said = capsys.readouterr().out
    assert [audio.title.partition(" ")[2] for audio in sets] == ["set with phone labels"] * 2
    assert [[u.name for u in audio.utterances] for audio in sets] == [["b-1"], ["c-2"]]
    assert all(audio.phone_labels is labels for audio in sets)
    assert "shorter or longer than their labels" in said


def test_an_epoch_with_nothing_left_is_still_decoded(small_corpus):
    """All ranks decode together: one that did so alone, for a probe, would wait for the others."""
    loader = BatchLoader(small_set(small_corpus), 4, "uniform", seed=0, training=True)
    assert list(loader.epoch(0, Position(0, 2**31, 0))) == []
    assert loader.dataset._only_pack is not None


def test_required_windows(small_corpus):
    audio = small_set(small_corpus)
    audio.require_windows()
    audio.require_windows(1)
    with pytest.raises(UserError, match="training set: not a single window of 1600 samples in 7"):
        audio.require_windows(0)
    short = [u for u in small_corpus.utterances if u.samples < WINDOW]
    with pytest.raises(UserError, match="in 1 file; more audio"):
        AudioDataset(small_corpus, short, WINDOW).require_windows()


def test_no_window_at_all(small_corpus):
    short = [u for u in small_corpus.utterances if u.samples < WINDOW]
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
    long_and_short = [corpus.utterances[0], corpus.utterances[2]]
    loader = BatchLoader(AudioDataset(corpus, long_and_short, WINDOW), 2, "uniform", **FIXED)
    (own_corpus / long_and_short[0].path).unlink()
    for first in (None, Position(0, 0, 0)):
        with pytest.raises(UserError, match="not a single window"):
            next(loader.epoch(0, first))


def test_too_many_processes(small_corpus):
    with pytest.raises(UserError, match="training set: 1 batches of 41 windows are too few for 2"):
        BatchLoader(
            small_set(small_corpus), 41, "uniform", seed=0, training=True, world=World(0, 2)
        )
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
    assert count_batches(layout, speakers, sampling, WINDOW, 3) == len(groups)


@pytest.mark.parametrize("sampling", ["samespeaker", "uniform", "samesequence"])
@pytest.mark.parametrize("seed", range(8))
def test_training_plans(sampling, seed):
    layout, speakers = random_layout(seed)
    intervals = expected_intervals(layout, speakers, sampling)
    begins = np.array([begin for begin, _ in intervals])
    plan = plan_pack(layout, speakers, sampling, WINDOW, 4, generator_from(seed))
    batches = [plan.batch(g).tolist() for g in range(plan.n_batches)]
    counted = count_batches(layout, speakers, sampling, WINDOW, 4, generator_from(seed))
    assert counted == len(batches)
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
        packs = split_into_packs(np.diff(layout.boundaries), 40_000, generator)
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
        packs = split_into_packs(lengths, max_size, generator)
        assert max(lengths[pack].sum() for pack in packs) <= largest_pack(lengths, max_size)
        assert sorted(np.concatenate(packs).tolist()) == list(range(len(lengths)))
        assert all((np.diff(pack) > 0).all() for pack in packs)
        assert all(lengths[pack].sum() <= max_size or len(pack) == 1 for pack in packs)
        assert len(packs) >= lengths.sum() / max_size


def test_packs_keep_enough_of_a_speaker_together_for_full_batches():
    """And yet hold many speakers; files as large as a piece are shuffled as they always were."""
    rng = np.random.default_rng(0)
    lengths, speakers = rng.integers(20, 200, 20_000) * 160, np.sort(rng.integers(0, 50, 20_000))
    for max_size, batch_size in ((3_000_000, 4), (8_000_000, 8)):
        size, together = 16 * batch_size * WINDOW, []
        packs = split_into_packs(lengths, max_size, generator_from(1), (speakers, size))
        assert sorted(np.concatenate(packs)) == list(range(20_000))
        for pack in packs:
            assert lengths[pack].sum() <= max_size
            n_pieces = lengths[pack].sum() / size
            assert len(np.unique(speakers[pack])) >= n_pieces / 2
            plan = plan_pack(
                Layout.of(pack, lengths), speakers[pack], "samespeaker", WINDOW, batch_size
            )
            together.extend(np.diff(plan.edges) == batch_size)
        assert np.mean(together) > 0.9
    files = split_into_packs(lengths, max_size, generator_from(1))
    smallest = split_into_packs(lengths, max_size, generator_from(1), (speakers, 1))
    assert all(map(np.array_equal, files, smallest))


def test_packs_are_of_about_the_same_size():
    lengths = np.full(1000, 100)
    sizes = [lengths[pack].sum() for pack in split_into_packs(lengths, 30_000, generator_from(0))]
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
        u.path: (u.speaker, soundfile.read(os.path.join(small_corpus.root, u.path), dtype="int16"))
        for u in small_corpus.utterances
    }
    loader = loader_of(small_corpus, sampling, training=training, packs=packs)
    for epoch in (0, 1):
        n_batches, seen, before = 0, set(), None
        for position, batch in loader.epoch(epoch):
            assert batch.waveform.shape == (len(batch.window), 1, WINDOW)
            places = [loader.locate(window) for window in batch.window]
            for row, (path, offset) in enumerate(places):
                speaker, (samples, _) = files[path]
                inside = samples[offset : offset + WINDOW]  # a window may continue in the next file
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
    expected = torch.from_numpy(concatenated(small_set(small_corpus)) * 32768).short()
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
                world=World(rank, world_size),
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
            loader_of(small_corpus, sampling, world=World(rank, world_size))
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
def test_resuming_from_any_position(small_corpus, sampling, world_size):
    """The rest of an epoch, bit by bit, also where the position is beyond the end of a pack."""
    options = {"world": World(world_size - 1, world_size)}
    loader = loader_of(small_corpus, sampling, **options)
    whole = [summary(item) for item in loader.epoch(3)]
    first = loader_of(small_corpus, sampling, world=World(0, world_size))
    rank0 = [position for position, _ in first.epoch(3)]
    assert len({position.pack for position in rank0}) > 2
    for done, position in enumerate(rank0):
        again = loader_of(small_corpus, sampling, **options)
        assert [summary(item) for item in again.epoch(3, position)] == whole[done:]
        after = position._replace(batch=position.batch + world_size)
        assert [summary(item) for item in again.epoch(3, after)] == whole[done + 1 :]
    assert list(loader.epoch(3, Position(3, 10**6, 0))) == []


def test_resuming_decodes_no_earlier_pack(small_corpus, monkeypatch):
    loader = loader_of(small_corpus, "uniform", training=False)
    decoded = watch_decoding(monkeypatch)
    packs = split_into_packs(loader.dataset.samples, loader.dataset.max_size_loaded)
    list(loader.epoch(0, Position(0, 1, 0)))
    expected = {loader.dataset.utterances[i].path for pack in packs[1:] for i in pack}
    assert Counter(relative(loader, decoded)) == dict.fromkeys(expected, 1)


def watch_decoding(monkeypatch):
    """Paths of files as they are decoded."""
    decoded, original = [], packs.decode_into

    def watched(waveform, path, listed_samples):
        decoded.append(path)
        return original(waveform, path, listed_samples)

    monkeypatch.setattr(packs, "decode_into", watched)
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


def test_packs_are_planned_when_they_are_due(own_corpus, monkeypatch):
    """And then forgotten; windows of earlier packs are still found, bad files or not."""
    corpus, plans = scan_corpus(own_corpus), []
    (own_corpus / "b/x/b-1.flac").write_bytes(b"fLaC")  # found out while it is decoded

    def noted(*args):
        plan = plan_pack(*args)
        plans.append(weakref.ref(plan.starts))
        return plan

    monkeypatch.setattr(dataset, "plan_pack", noted)
    loader = loader_of(corpus, "samespeaker")
    assert len(loader) > 5
    assert not plans
    located, n_alive = {}, []
    for position, batch in loader.epoch(0):
        located |= {int(window): loader.locate(window) for window in batch.window}
        n_alive.append(sum(plan() is not None for plan in plans))
        last = position.pack
    assert last >= 2
    assert max(n_alive) <= 2
    assert {window: loader.locate(window) for window in located} == located
    assert "b/x/b-1.flac" not in dict(located.values())


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

    monkeypatch.setattr(packs.mmap, "mmap", Memory)
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
    monkeypatch.setattr(packs, "decode_into", fail)
    with pytest.raises(RuntimeError, match="disk on fire at"):
        list(loader.epoch(0))


def test_an_exception_in_the_background_comes_at_the_next_batch(small_corpus, monkeypatch):
    original = packs.decode_into

    def fail(waveform, path, listed_samples):
        raise RuntimeError("disk on fire")

    loader = loader_of(small_corpus, "uniform", batch_size=1)
    decode_ahead = loader._decode_ahead

    def fail_ahead(p):
        monkeypatch.setattr(packs, "decode_into", fail)
        decode_ahead(p)
        for decoding in loader._ahead.values():
            assert decoding.workers._shared.finished.wait(30)
        monkeypatch.setattr(packs, "decode_into", original)

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
    many = corpus._replace(utterances=3 * corpus.utterances)
    audio, gate = small_set(many, max_size_loaded=80_000, n_threads=2), Gate()
    loader = BatchLoader(audio, 3, "uniform", seed=0, training=True)
    decode_ahead = loader._decode_ahead

    def decode_ahead_gated(p):
        if is_gated(p):
            monkeypatch.setattr(packs, "decode_into", gate)
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


def test_workers_interrupted_before_they_begin_are_dropped_in_silence(monkeypatch):
    errors = []
    monkeypatch.setattr(sys, "unraisablehook", errors.append)
    team = Workers.__new__(Workers)  # as a stop signal leaves it
    del team
    assert not errors


def test_workers_show_progress_when_it_takes_long(monkeypatch):
    monkeypatch.setattr(workers, "SECONDS_BEFORE_BAR", 0)
    gate, bars = Gate(), []

    class Bar(PlainProgress):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)
            gate.open.set()

    monkeypatch.setattr("utils.run.console.PlainProgress", Bar)
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


def test_batches_made_ready(small_corpus, tmp_path):
    (tmp_path / "labels.txt").write_text("a-1 " + "1 " * 106)
    labels = read_phone_labels(tmp_path / "labels.txt")
    audio = small_set(small_corpus, phone_labels=labels, labelled_only=True)
    _, batch = next(BatchLoader(audio, 4, "uniform", **FIXED).epoch(0))
    moved = batch.to("cpu")
    assert batch.waveform.dtype == torch.int16
    assert moved.waveform.dtype == torch.float32
    assert torch.equal(moved.waveform, batch.waveform.float() / 32768)
    assert (moved.phone == 1).all()
    assert moved.phone.shape == (4, WINDOW // 160)
    assert [moved.speaker.dtype, moved.window.dtype, moved.continues.dtype] == [
        torch.int64,
        torch.int64,
        torch.bool,
    ]


def test_a_large_listing_is_cheap_to_choose_from():
    """No quadratic step: names, order and plan of 20,000 made-up utterances."""
    utterances = [Utterance(i // 100, f"{i // 100}/{i}.flac", 30_000) for i in range(20_000)]
    corpus = Corpus("", tuple(utterances), tuple(str(i) for i in range(200)))
    chosen = select_utterances(utterances, [u.name for u in utterances[::2]], "list")
    audio = AudioDataset(corpus, chosen, 20_480, max_size_loaded=10**8)
    assert len(BatchLoader(audio, 8, "samespeaker", seed=0, training=True)) > 1000
