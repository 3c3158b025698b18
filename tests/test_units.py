"""Tests of k-means, of the units that its centers give, and of their measures."""

import itertools
import json
import math
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

import train
from eval import cluster, quantize, unit_quality, unit_robustness
from eval.hear_augmentation import open_augmentation
from eval.unit_measures import chance, measure, usage
from eval.unit_watch import measure_units, most_clusters
from eval.units import read_clusters, read_units
from feature_loader import build_feature, load_model, load_waveform
from tests.helpers import assert_close, assert_equal_trees, ends_refused
from tests.test_probes import save_model
from tests.test_train import on, trained
from utils.data.corpus import Utterance
from utils.data.labels import runs, write_labels
from utils.files import load_json
from utils.kmeans import assign, first_centers, kmeans, lloyd
from utils.misc import UserError, generator_from
from utils.normalisation import seq_normalization


def blobs(n, k, offset=0.0, seed=0):
    """n points around k far centers, all shifted by `offset`."""
    generator = generator_from(seed, "blobs")
    centers = 10 * torch.randn(k, 5, generator=generator)
    ids = torch.arange(n) % k
    return centers[ids] + torch.randn(n, 5, generator=generator) + offset, ids


# -------------------------------------------------------------------------------------- k-means


@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_is_lloyds_algorithm(spherical):
    points, _ = blobs(600, 9)
    points = F.normalize(points, dim=1) if spherical else points
    start = points[:7]
    options = {"max_iterations": 5, "tolerance": 1e-9, "spherical": spherical}
    result = lloyd(points, start, **options)
    centers = start.double().numpy()
    for step in range(6):
        ids = ((points.double().numpy()[:, None] - centers) ** 2).sum(2).argmin(1)
        if step < result.n_iterations:
            centers = np.stack([points.numpy()[ids == i].mean(0) for i in range(7)])
            centers /= np.linalg.norm(centers, axis=1)[:, None] if spherical else 1
    order = np.argsort(-np.bincount(ids, minlength=7), kind="stable")
    assert_close(result.centers, centers[order])
    assert result.counts.tolist() == np.bincount(ids, minlength=7)[order].tolist()
    assert result.inertia == pytest.approx(((points.numpy() - centers[ids]) ** 2).sum(1).mean())


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_kmeans_finds_clusters_far_from_the_origin(offset):
    points, ids = blobs(3000, 20, offset)
    result = kmeans(points, 20, generator_from(1))
    found, distances = assign(points, result.centers)
    assert len({*zip(found.tolist(), ids.tolist(), strict=True)}) == 20  # one to one
    assert_close(distances, (points - result.centers[found]).square().sum(1), 1e-3)
    again = kmeans(points, 20, generator_from(1))
    assert torch.equal(result.centers, again.centers)


def test_an_empty_cluster_moves():
    points, ids = blobs(400, 4)
    result = lloyd(
        points, points[:1].repeat(4, 1), max_iterations=50, tolerance=1e-6, spherical=False
    )
    assert result.counts.tolist() == [100] * 4


def test_kmeans_refuses_too_few_different_points():
    points = torch.randn(3, 5).repeat(10, 1) + 7
    with pytest.raises(UserError, match="only 3 different frames"):
        kmeans(points, 4, generator_from(0))
    with pytest.raises(UserError, match="31 clusters of 30 frames"):
        kmeans(points, 31, generator_from(0))
    assert len(first_centers(points, 3, generator_from(0)).unique(dim=0)) == 3


# ------------------------------------------------------------------------- clusters and units


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "run")


@pytest.fixture(scope="module")
def clusters(tmp_path_factory, tiny_corpus, model_file):
    out = tmp_path_factory.mktemp("clusters") / "new"
    cluster.main([str(model_file), str(out), str(tiny_corpus / "audio"), "-k", "6"])
    return out


def quantized(*words):
    quantize.main([str(word) for word in words])


def test_units_are_the_nearest_centers(tmp_path, tiny_corpus, model_file, clusters, capsys):
    centers = torch.load(clusters / "checkpoint_last.pt", weights_only=True)["state_dict"]["Ck"]
    assert centers.shape == (1, 6, 8)
    assert load_json(clusters / "args.json")["nClusters"] == 6
    quantized(clusters, tiny_corpus / "audio", tmp_path / "q", "--format", "km", "onehot-npy")
    assert "9 files, 6 of 6 different ones" in capsys.readouterr().out
    units = read_units(tmp_path / "q/quantized_outputs.txt")
    model, *_ = load_model([model_file])
    for path in (tiny_corpus / "audio").rglob("*.flac"):
        features = build_feature(model, path)[0]
        expected = torch.cdist(features.double(), centers[0].double()).argmin(1)
        assert units[path.stem].tolist() == expected.tolist()
        one_hot = np.load(tmp_path / "q/onehot" / f"{path.stem}.npy")
        assert one_hot.dtype == np.float64
        assert one_hot.argmax(1).tolist() == expected.tolist()
    root, *paths = (tmp_path / "q/quantized_outputs.tsv").read_text().splitlines()
    lines = (tmp_path / "q/quantized_outputs.km").read_text().splitlines()
    assert root == str(tiny_corpus / "audio")
    assert [line.split() for line in lines] == [list(map(str, u)) for u in units.values()]
    assert [path.split("\t")[0].rpartition("/")[2] for path in paths] == [
        f"{n}.flac" for n in units
    ]


def test_a_killed_call_and_parts_give_the_same_units(tmp_path, tiny_corpus, clusters):
    audio, q = tiny_corpus / "audio", tmp_path / "q"
    quantized(clusters, audio, q)
    whole = (q / "quantized_outputs.txt").read_bytes()
    lines = whole.splitlines(keepends=True)
    (q / "quantized_outputs.txt").unlink()
    (q / "quantized_outputs.txt.part").write_bytes(b"".join(lines[:4]) + lines[4][:20])
    quantized(clusters, audio, q)
    quantized(clusters, audio, q)
    assert [path.name for path in sorted(q.iterdir())] == ["args.json", "quantized_outputs.txt"]
    assert (q / "quantized_outputs.txt").read_bytes() == whole
    for part in ("1-2", "2-2"):
        quantized(clusters, audio, tmp_path / "parts", "--split", part)
    parts = sorted((tmp_path / "parts").glob("quantized_outputs_split_*-2.txt"))
    assert b"".join(path.read_bytes() for path in parts) == whole
    name, units = lines[4].decode().split("\t")
    (tmp_path / "list").write_text(name)
    quantized(clusters, audio, tmp_path / "alone", "--pathSeq", tmp_path / "list", "--dedup")
    alone = read_units(tmp_path / "alone/quantized_outputs.txt")[name].tolist()
    units = list(map(int, units.split(",")))
    assert alone == [u for i, u in enumerate(units) if i == 0 or u != units[i - 1]]


def test_flags_are_stored_with_the_centers(tmp_path, tiny_corpus, model_file):
    """In a .npy with flags beside it, too; frames are normalised as for clustering."""
    audio, out = tiny_corpus / "audio", tmp_path / "c.npy"
    flags = ["--encoder_layer", "--norm_vec_len", "--seq_norm", "-k", "5", "--max_frames", "300"]
    cluster.main([str(model_file), str(out), str(audio), *flags])
    centers = torch.from_numpy(np.load(out))
    assert_close(centers.norm(dim=1), torch.ones(5))
    quantized(out, audio, tmp_path / "q")
    (name, units), *_ = read_units(tmp_path / "q/quantized_outputs.txt").items()
    model, *_ = load_model([model_file])
    features = build_feature(model, next(audio.rglob(f"{name}.flac")), get_encoded=True)
    features = F.normalize(seq_normalization(features)[0], dim=1)
    assert units.tolist() == (features @ centers.T).argmax(1).tolist()


def test_files_of_the_original_program(tmp_path, model_file):
    """X.pt with X_args.json beside it, the checkpoint relative to them, and other keys in both."""
    shutil.copytree(model_file.parent, tmp_path / "run")
    state = {"state_dict": {"Ck": torch.randn(1, 4, 8)}, "n_clusters": 4, "encoder_layer": True}
    torch.save(state, tmp_path / "X.pt")
    flags = {"pathCheckpoint": f"run/{model_file.name}", "level_gru": None, "nGroups": 1}
    (tmp_path / "X_args.json").write_text(json.dumps({**flags, "train_mode": False}))
    none = dict.fromkeys(("pathCheckpoint", "level_gru", "encoder_layer"))
    read = read_clusters(str(tmp_path / "X.pt"), none)
    assert torch.equal(read.centers, state["state_dict"]["Ck"][0])
    assert read.features["encoder_layer"]
    assert not read.features["norm_vec_len"]
    assert read.features["pathCheckpoint"] == str(tmp_path / "run" / model_file.name)
    with pytest.raises(UserError, match="--encoder_layer.*made with True"):
        read_clusters(str(tmp_path / "X.pt"), none | {"encoder_layer": False})
    (tmp_path / "X_args.json").write_text(json.dumps({**flags, "nGroups": 2}))
    with pytest.raises(UserError, match="X_args.json: nGroups 2 isn't supported"):
        read_clusters(str(tmp_path / "X.pt"), none)


def test_bad_input_is_refused(tmp_path, tiny_corpus, model_file, clusters, capsys):
    audio, q = tiny_corpus / "audio", tmp_path / "q"
    np.save(tmp_path / "c.npy", np.zeros((3, 5)))
    (tmp_path / "km.bin").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.wav").touch()
    for said, words in {
        "km.bin: not one of .* joblib.load": (tmp_path / "km.bin", audio, q),
        "doesn't say which model": (tmp_path / "c.npy", audio, q),
        "5 dimensions for features of 8": (
            tmp_path / "c.npy", audio, q, "--pathCheckpoint", model_file,
        ),
        "no such directory": (clusters, tmp_path / "none", q),
        "must be i-n": (clusters, audio, q, "--split", "3-2"),
        "no file ends with": (clusters, audio, q, "--file_extension", ".mp3"),
        "--dedup with": (clusters, audio, q, "--dedup", "--format", "onehot-npy"),
        "none: holds no centers: no such file": (tmp_path / "none", audio, q),
        "no file can be used": (clusters, tmp_path / "empty", tmp_path / "none of it"),
    }.items():  # fmt: skip
        with ends_refused(capsys, said):
            quantized(*words)
    quantized(clusters, audio, q)
    with ends_refused(capsys, "made with another dedup"):
        quantized(clusters, audio, q, "--dedup")
    for said, words in {
        "exists already": (clusters,),
        "-k 9000: .* has only": (tmp_path / "new", "-k", "9000"),
    }.items():
        with ends_refused(capsys, said):
            cluster.main([str(word) for word in (model_file, words[0], audio, *words[1:])])


# ------------------------------------------------------------------------------------- measures


def sequences(seed=0, n_files=6):
    """Labels, units and speakers of frames, and the first frames of files, with runs in all."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 60, n_files)
    labels = np.repeat(rng.integers(0, 5, lengths.sum()), 4)[: lengths.sum()]
    units = np.where(rng.random(len(labels)) < 0.7, 2 * labels, rng.integers(0, 11, len(labels)))
    speakers = np.repeat(np.arange(n_files) % 3, lengths)
    return labels, units, speakers, np.cumsum(lengths) - lengths


def naive_agreement(labels, units):
    pairs, n = Counter(zip(labels.tolist(), units.tolist(), strict=True)), len(labels)
    of_phones, of_units = Counter(labels.tolist()), Counter(units.tolist())
    information = sum(
        c / n * math.log(c * n / (of_phones[p] * of_units[u])) for (p, u), c in pairs.items()
    )
    entropies = [-sum(c / n * math.log(c / n) for c in x.values()) for x in (of_phones, of_units)]
    return {
        "pnmi": information / entropies[0],
        "unit_information": information / entropies[1],
        "v_measure": 2 * information / sum(entropies),
        "phone_purity": sum(max(pairs[p, u] for p in of_phones) for u in of_units) / n,
        "cluster_purity": sum(max(pairs[p, u] for u in of_units) for p in of_phones) / n,
    }


def test_measures_of_units_are_those_of_naive_loops():
    labels, units, speakers, starts = sequences()
    result = measure(labels, units, starts, silence=[0], speakers=speakers)
    assert result["frames"] == pytest.approx(naive_agreement(labels, units))
    speech = labels != 0
    expected = naive_agreement(labels[speech], units[speech])
    assert result["frames_without_silence"] == pytest.approx(expected)
    segments, majority, files = [], [], np.append(starts, len(labels)).tolist()
    for begin, end in itertools.pairwise(files):
        for first, after, label in runs(labels[begin:end].tolist()):
            counts = Counter(units[begin + first : begin + after].tolist())
            segments.append(label)
            majority.append(min(counts, key=lambda unit: (-counts[unit], unit)))  # noqa: B023
    expected = naive_agreement(np.array(segments), np.array(majority))
    assert result["segments"] == pytest.approx(expected)
    expected = naive_agreement(speakers, units)
    assert result["speakers"] == pytest.approx({k: expected[k] for k in result["speakers"]})
    level = chance(labels, units, starts, silence=[0], speakers=speakers)
    assert level["frames"]["pnmi"] < 0.4 * result["frames"]["pnmi"]
    assert level["frames"]["phone_purity"] >= np.bincount(labels).max() / len(labels)


def test_units_equal_to_the_phones_are_perfect_and_constant_ones_know_nothing():
    labels, _, _, starts = sequences()
    perfect = measure(labels, 3 + labels, starts)
    assert perfect["frames"] == pytest.approx(dict.fromkeys(perfect["frames"], 1.0))
    scores = {"precision": 1, "recall": 1, "f1": 1, "r_value": 1, "over_segmentation": 0}
    assert perfect["boundaries"] == pytest.approx(scores)
    constant = measure(labels, np.zeros_like(labels), starts)
    assert constant["frames"]["pnmi"] == 0
    assert constant["frames"]["unit_information"] is None
    assert constant["boundaries"]["recall"] == 0


def test_bitrates():
    """4 s of 4 equally frequent units in runs of 4, 2 bits each; files end runs, too."""
    units = np.tile(np.repeat([0, 1, 2, 3], 4), 25)
    figures = usage(units, np.array([0, 202]))
    assert figures["bitrate_frames"] == pytest.approx(200)
    assert figures["bitrate_deduplicated"] == pytest.approx(50, rel=1e-2)
    assert (figures["units_used"], figures["frames_per_run"]) == (4, 400 / 101)
    assert figures["perplexity"] == pytest.approx(4)
    assert figures["bitrate_runs"] >= figures["bitrate_deduplicated"]


def test_quality_of_the_units_of_a_corpus(tmp_path, tiny_corpus, clusters, capsys):
    quantized(clusters, tiny_corpus / "audio", tmp_path / "q")
    units, labels = tmp_path / "q/quantized_outputs.txt", tiny_corpus / "phones.txt"
    capsys.readouterr()
    unit_quality.main([str(units.parent), str(labels)])
    said = capsys.readouterr().out
    result = load_json(tmp_path / "q/unit_quality.json")
    assert result["n_speakers"] == 3
    assert result["units"]["units_used"] == 6
    assert result["measures"]["frames"]["pnmi"] > 2 * result["chance"]["frames"]["pnmi"]
    assert f"{result['measures']['frames']['pnmi']:.3f} (" in said
    assert sum(row["frames"] for row in result["phones_of_units"]) == result["units"]["frames"]
    assert len((tmp_path / "q/unit_phones.txt").read_text().splitlines()) == 6
    assert (tmp_path / "q/unit_quality.png").read_bytes().startswith(b"\x89PNG")


def test_units_that_dont_fit_their_labels_are_refused(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = {name: np.repeat(rng.integers(0, 4, 30), 3) for name in ("a-1", "a-2", "b-1")}
    write_labels(tmp_path / "labels", labels)
    at_50_hz = {name: ids[::2] for name, ids in labels.items()}
    for said, units, flags in (
        ("a-1 .45 frames, 90 labels.; by their number, a unit lasts 20 ms", at_50_hz, ()),
        ("labels for none of the 1 files", {"c-1": labels["a-1"]}, ()),
        ("no unit is repeated", {n: np.arange(90) for n in labels}, ()),
        ("--silence SPN: no phone", labels, ("--silence", "SPN")),
    ):
        write_labels(tmp_path / "units", units)
        with ends_refused(capsys, said):
            unit_quality.main([str(tmp_path / "units"), str(tmp_path / "labels"), *flags])
    for said, line in {"whole numbers": "a-1\t3-4,5", "line 2: a has units": "a 1 1\na 1"}.items():
        (tmp_path / "units").write_text(line)
        with ends_refused(capsys, said):
            unit_quality.main([str(tmp_path / "units"), str(tmp_path / "labels")])
    write_labels(tmp_path / "units", {"s/a-1": labels["a-1"], "t/a-1": labels["a-1"]})
    with ends_refused(capsys, "a-1 may be several files"):
        unit_quality.main([str(tmp_path / "units"), str(tmp_path / "labels")])
    write_labels(tmp_path / "units", at_50_hz)
    words = ["--frames_per_unit", "2", "--out", tmp_path, "--silence", "0"]
    unit_quality.main(list(map(str, [tmp_path / "units", tmp_path / "labels", *words])))
    assert load_json(tmp_path / "unit_quality.json")["measures"]["frames"]["pnmi"] > 0.5


def naive_edit_distance(some, others):
    row = list(range(len(others) + 1))
    for i, a in enumerate(some, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(others, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def test_units_of_augmented_speech(tmp_path, tiny_corpus, model_file, clusters, capsys):
    audio, chosen = tiny_corpus / "audio", tmp_path / "list"
    paths = sorted(audio.rglob("*.flac"))[:2]
    chosen.write_text("\n".join(path.stem for path in paths))

    def distances(*words):
        words = [clusters, audio, tmp_path, "--pathSeq", chosen, "--augment_type", *words]
        words = list(map(str, words))
        unit_robustness.main(words)
        return words, load_json(tmp_path / "unit_robustness.json")["ued"]

    same = ("pitch", "time_dropout", "--shift_max", "0", "--t_ms", "0", "--max_files", "1")
    assert distances(*same)[1] == dict.fromkeys(("pitch", "time_dropout", "pitch_time_dropout"), 0)
    words, found = distances("pitch")
    assert found == distances("pitch")[1]
    centers = read_clusters(str(clusters), {}).centers
    augmentation = open_augmentation(unit_robustness.parse_arguments(words), 16000)
    model, rates = load_model([model_file])[0], []
    for path in paths:
        copy = augmentation.copy(load_waveform(path), ["pitch"], path.stem)
        soundfile.write(tmp_path / "copy.wav", copy[0].numpy(), 16000, "FLOAT")
        features = (build_feature(model, p)[0].double() for p in (path, tmp_path / "copy.wav"))
        units = (torch.cdist(f, centers.double()).argmin(1).tolist() for f in features)
        clean, other = ([unit for unit, _ in itertools.groupby(u)] for u in units)
        rates.append(naive_edit_distance(clean, other) / len(clean))
    assert found == {"pitch": pytest.approx(sum(rates) / len(rates))}
    assert found["pitch"] > 0
    with ends_refused(capsys, "natural_reverb needs --pathImpulseResponses"):
        distances("natural_reverb")


# ------------------------------------------------------------------------------------ in training


def test_a_file_without_a_frame_is_left_out(tmp_path, tiny_corpus, model_file):
    path = next((tiny_corpus / "audio").rglob("*.flac"))
    shutil.copy(path, tmp_path / "long.flac")
    soundfile.write(tmp_path / "short.flac", np.zeros(100), 16000)
    n_samples = soundfile.info(path).frames
    utterances = [Utterance(0, "short.flac", 100), Utterance(0, "long.flac", n_samples)]
    dataset = SimpleNamespace(utterances=utterances, root=tmp_path)
    assert most_clusters(dataset, {}) == n_samples // 160
    model = load_model([model_file])[0]
    assert "units_perplexity" in measure_units(model, dataset, {}, 4, generator_from(0))


def test_units_in_training_are_logged_and_change_nothing_else(tiny_corpus, tmp_path, capsys):
    words = ["--unit_quality_each_epochs", "1", "--nClusters"]
    with ends_refused(capsys, "--nClusters 5000: units in training are clusters of"):
        train.main([*map(str, [*on(tiny_corpus), "--pathCheckpoint", tmp_path, *words]), "5000"])
    plain = trained(tiny_corpus, tmp_path / "none")
    labels = ["--path_phone_data", tiny_corpus / "phones.txt"]
    found = trained(tiny_corpus, tmp_path / "units", *words, "4", *labels)
    new = {key for key in found["logs"] if key.startswith("units_")}
    assert {"units_perplexity", "units_pnmi", "units_pnmi_by_chance", "units_boundary_f1"} <= new
    first, second = found["logs"]["units_perplexity"]
    assert first is None  # as for probes, never at epoch 0
    assert 1 < second <= 4
    assert_equal_trees(plain["gEncoder"], found["gEncoder"], "gEncoder")
    assert plain["logs"]["locLoss_val"] == found["logs"]["locLoss_val"]
    assert "units</h3>" in (tmp_path / "units/report.html").read_text()
