"""Tests of ABX: dynamic time warping, items and groups, scores, the command."""

import importlib.util
import itertools
import json
import math
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from eval import ABX, abx_distances, abx_groups
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
from eval.dtw import cosine_distance, dtw, euclidean_distance, normalize_with_singularity
from feature_loader import build_feature, load_model
from model import build_model
from tests.helpers import ROOT, assert_close, ends_refused, golden_cases
from utils.corpus import make_abx_item
from utils.files import load_json, save_tensors
from utils.misc import UserError
from utils.run.checkpoint import save_checkpoint
from utils.run.flags import build_parser

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
    """Items and their frames; with `levels`, frames take this many values, so there are ties."""
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


def test_features_that_separate_phones_have_no_errors():
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


@pytest.mark.parametrize(("size", "said"), [(100, ""), (98, ""), (50, "lasts 0.02 s")])
def test_features_at_another_rate_than_the_items_are_refused(size, said):
    """Files of 1, 2 and 3 s, each with an item at its end, at this number of frames per second."""
    onset = torch.tensor([0.5, 1.5, 2.5, 0.0], dtype=torch.float64)
    ids = torch.zeros(4, dtype=torch.long)
    items = Items(("a", "b", "c", "a"), onset, onset + 0.5, ids, ids, ids)
    features = {name: torch.zeros(size * n, 2) for n, name in enumerate("abc", 1)}
    if not said:
        assert len(cut_items(items, features.get, 100.0)[0]) == 4
        return
    with pytest.raises(UserError, match=f"in 3 of 3 files .* end after the features.* {said}"):
        cut_items(items, features.get, 100.0)


def test_features_much_longer_than_the_items_are_questioned(capsys):
    onset = torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64)
    ids = torch.zeros(3, dtype=torch.long)
    items = Items(("a", "b", "c"), onset, onset + 0.5, ids, ids, ids)
    cut_items(items, {name: torch.zeros(200 * n, 2) for n, name in enumerate("abc", 1)}.get, 100.0)
    said = capsys.readouterr().out
    assert "the items end at 50.0 % of the features: is --feature_size 0.01 right?" in said


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
    (tmp_path / "list").write_text("t8-1\n")
    make_abx_item.main([*arguments, "--seqList", str(tmp_path / "list")])
    assert (tmp_path / "out.item").read_text() == HEADER + "t8-1 0.00 0.04 a b c t8\n"
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
    assert measured_on["chunks"] == {"max_size_seq": None, "strict": True, "seq_norm": True}
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
    whole = features(*flags)(second)
    assert_close(whole, build_feature(model, paths[second])[0])
    assert (whole - alone).abs().max() > 1e-3 * whole.abs().max()  # of frames at the cuts


def test_an_unusable_file_is_named_and_left_out(
    tiny_corpus, tmp_path, corpus_items, abx_model, capsys
):
    shutil.copytree(tiny_corpus / "audio", tmp_path / "audio")
    first, second, *others = sorted((tmp_path / "audio").rglob("*.flac"))
    flags = [tmp_path / "audio", "--file_extension", ".flac", "--out", tmp_path / "out"]
    call = ["from_checkpoint", *map(str, [abx_model, corpus_items, *flags])]
    first.write_bytes(b"")
    ABX.main(call)
    assert f"{first}: empty; its items are left out\n" in capsys.readouterr().out
    for other in (second, *others):
        other.write_bytes(b"")
    with ends_refused(capsys, "too many unusable files: "):
        ABX.main(call)


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


def test_fastabx_agrees_or_is_reported_missing(stored, tmp_path, capsys):
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


@pytest.mark.parametrize("kind", ["speaker", "utterance"])
def test_features_are_normalised_by_speaker_or_file(
    kind, tiny_corpus, corpus_items, abx_model, tmp_path
):
    model, *_ = load_model(abx_model)
    files, parts = {}, {}
    for path in sorted((tiny_corpus / "audio").rglob("*.flac")):
        speaker = path.stem.partition("-")[0]
        features = build_feature(model, path, get_encoded=True)[0]
        files[path.stem] = features * (int(speaker) - 9) + int(speaker)
        parts.setdefault(speaker if kind == "speaker" else path.stem, []).append(path.stem)
    for names in parts.values():
        frames = torch.cat([files[name] for name in names]).double()
        for name in names:
            normal = (files[name].double() - frames.mean(0)) / (frames.var(0) + 1e-8).sqrt()
            for folder, content in (("plain", files[name]), ("normal", normal.float())):
                (tmp_path / folder).mkdir(exist_ok=True)
                torch.save(content, tmp_path / folder / f"{name}.pt")

    def scores(folder, *flags):
        words = ["from_pre_computed", tmp_path / folder, corpus_items, "--context", "any", *flags]
        ABX.main([str(word) for word in words])
        return load_json(tmp_path / folder / "ABX_scores.json")

    expected, found = scores("normal"), scores("plain", "--feature_norm", kind)
    assert found["measured_on"]["feature_norm"] == kind
    for mode in ("within", "across"):
        assert found[mode] == pytest.approx(expected[mode], abs=1e-3)
    assert scores("plain")["across"] != pytest.approx(expected["across"], abs=1e-2)


def test_a_file_with_several_speakers_has_no_statistics_of_one(tmp_path, capsys):
    torch.save(torch.ones(50, 3), tmp_path / "a.pt")
    (tmp_path / "two.item").write_text(HEADER + "a 0.1 0.2 x y z s\na 0.3 0.4 x y z t\n")
    with ends_refused(capsys, "--feature_norm speaker: a has items of several speakers"):
        ABX.main(["from_pre_computed", str(tmp_path), str(tmp_path / "two.item"),
                  "--feature_norm", "speaker"])  # fmt: skip
