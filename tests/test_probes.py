"""Tests of the probes, in training and as linear_separability.py."""

import random
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import nn

import eval.knn
import eval.probe
import eval.probe_features
from dataset import AudioDataset
from eval.center_push import push_to_nearest, read_centers
from eval.hooks import ProbeHook
from eval.knn import choose_bank, nearest_classes
from eval.linear_separability import main, null_space, parse_arguments
from eval.probe import Probe, run_probe
from eval.probe_features import storage_for
from eval.probe_options import ProbeOptions
from eval.probe_summary import accuracies
from feature_loader import load_model, load_phone_classifier
from model import build_model
from tests.helpers import assert_close, ends_refused, golden_cases
from utils.data.corpus import scan_corpus
from utils.data.labels import read_phone_labels
from utils.files import TEMPORARY_PREFIX, load_json, load_tensors, save_tensors
from utils.kmeans import squared_distances
from utils.misc import UserError
from utils.report import plot_confusion
from utils.report.plot_confusion import draw_confusion
from utils.run.checkpoint import save_checkpoint
from utils.run.flags import build_parser

WINDOW = 3200  # samples, 20 frames
FAST = ProbeOptions(n_epochs=6, batch_size=8, learning_rate=0.05, cpc_epoch=4)


class SpectralModel(nn.Module):
    """Stands in for a CPC model: its frames are spectra, which separate phones easily."""

    dim_context, dim_encoded = 81, 40

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.n_calls = 0

    def forward(self, waveform, continues):
        assert continues.shape == (len(waveform),)
        self.n_calls += 1
        frames = self.gain * waveform.view(len(waveform), -1, 160)
        spectrum = torch.fft.rfft(frames).abs().log1p()
        return spectrum, spectrum[..., : self.dim_encoded]


@pytest.fixture(scope="module")
def corpus(tiny_corpus):
    return scan_corpus(tiny_corpus / "audio")


@pytest.fixture(scope="module")
def labels(tiny_corpus):
    return read_phone_labels(tiny_corpus / "phones.txt")


def last_of_speaker(sequence):
    return sequence.name.endswith("0002")


def make_sets(corpus, labels=None, held_out=last_of_speaker):
    """Training and validation set; the latter holds the sequences that `held_out` chooses."""
    parts = {"training set": [], "validation set": []}
    for sequence in corpus.utterances:
        parts["validation set" if held_out(sequence) else "training set"].append(sequence)
    return [
        AudioDataset(
            corpus,
            part,
            WINDOW,
            phone_labels=labels,
            labelled_only=labels is not None,
            title=title,
        )
        for title, part in parts.items()
    ]


def options(**changes):
    return ProbeOptions(**{**vars(FAST), **changes})


@pytest.fixture
def phone_probe(corpus, labels):
    def build(model=None, **changes):
        sets = make_sets(corpus, labels)
        return Probe("phone", model or SpectralModel(), *sets, labels.n_phones, options(**changes))

    return build


# ------------------------------------------------------------------------------ what a probe finds


def test_different_phones_are_separated(phone_probe):
    result = phone_probe().run()
    assert result.metric > 0.9
    assert result.baseline < 0.4
    assert result.metric_name == "acc"


def test_different_speakers_are_separated(corpus):
    result = Probe("speaker", SpectralModel(), *make_sets(corpus), 3, options(n_epochs=30)).run()
    assert result.metric > result.baseline + 0.1
    assert result.measured_on["training"]["frames"] == result.measured_on["training"]["windows"]


def test_ctc_reports_the_phone_error_rate_and_goes_by_it(phone_probe):
    probe = phone_probe(ctc=True, n_epochs=12)
    result = probe.run()
    rates = [rate for (rate,) in probe.logs["PER_val"]]
    assert result.metric == min(rates) == rates[result.best_epoch]
    assert result.metric < 0.5 < result.baseline
    assert result.logged() == {
        "phone_num_epoch_trained": 12,
        "phone_best_val_per": [result.metric],
        "phone_baseline_val_per": [result.baseline],
    }


NO_BETTER = "hardly better than always saying the majority phone"


def test_a_probe_of_labels_at_another_time_is_noticed(corpus, labels, phone_probe, capsys):
    phone_probe().run()
    assert NO_BETTER not in capsys.readouterr().out
    shuffle = np.random.default_rng(0).permutation
    moved = labels._replace(labels={name: shuffle(row) for name, row in labels.labels.items()})
    Probe("phone", SpectralModel(), *make_sets(corpus, moved), labels.n_phones, options()).run()
    assert NO_BETTER in capsys.readouterr().out


@pytest.mark.parametrize(("rate", "n_epochs"), [(0.01, 12), (1e-9, 1)])
def test_a_ctc_probe_that_learned_nothing_is_reported(rate, n_epochs, phone_probe, capsys):
    phone_probe(ctc=True, learning_rate=rate, n_epochs=n_epochs).run()
    assert (NO_BETTER in capsys.readouterr().out) == (n_epochs == 1)


def test_the_best_epoch_has_the_highest_accuracy(phone_probe):
    probe = phone_probe(learning_rate=3.0)  # so large that accuracy goes up and down
    result = probe.run()
    accuracies = [accuracy for (accuracy,) in probe.logs["locAcc_val"]]
    assert result.metric == max(accuracies) == accuracies[result.best_epoch]
    assert result.train_accuracy == probe.logs["locAcc_train"][result.best_epoch][0]
    assert accuracies != sorted(accuracies)


def windows_and_labels(probe, dataset):
    source = eval.probe_features.WindowFeatures(probe, dataset, training=False)
    features, label, _ = zip(*source.batches(0), strict=True)
    return torch.cat(features), torch.cat(label)


@pytest.mark.parametrize("batch_size", [1000, 7, 1])
@pytest.mark.parametrize("max_stored_bytes", [None, 0])
def test_accuracies_are_means_over_all_frames(phone_probe, batch_size, max_stored_bytes):
    probe = phone_probe(batch_size=batch_size, max_stored_bytes=max_stored_bytes, n_epochs=2)
    result = probe.run()
    features, label = windows_and_labels(probe, probe.validation_set)
    assert len(label) % 7  # so that the last batch is smaller
    probe.criterion.load_state_dict(probe.best.classifier)
    right = probe.criterion.logits(features).argmax(2) == label
    assert result.metric == pytest.approx(right.double().mean().item())
    assert all(0 <= a <= 1 for key in ("locAcc_train", "locAcc_val") for (a,) in probe.logs[key])


def test_the_baseline_is_the_majority_phone_of_training(phone_probe):
    probe = phone_probe(n_epochs=1)
    result = probe.run()
    _, train_label = windows_and_labels(probe, probe.train_set)
    _, label = windows_and_labels(probe, probe.validation_set)
    majority = train_label.flatten().mode().values
    assert result.baseline == pytest.approx((label == majority).double().mean().item())


def test_accuracies_of_single_phones(phone_probe):
    probe = phone_probe()
    probe.run()
    by_class = probe.logs["class_accuracy"]
    frames = sum(part["frames"] for part in by_class.values())
    right = sum(part["accuracy"] * part["frames"] for part in by_class.values())
    assert frames == probe.measured_on["validation"]["frames"]
    assert right / frames == pytest.approx(probe.best.metric)
    assert accuracies(torch.tensor([3, 0, 2]), torch.tensor([4, 0, 4]), "012") == {
        "0": {"accuracy": 0.75, "frames": 4},
        "2": {"accuracy": 0.5, "frames": 4},
    }


def test_the_summary_names_what_was_measured(phone_probe, capsys):
    probe = phone_probe(n_epochs=1, get_encoded=True)
    result = probe.run()
    assert result.measured_on["layer"] == "encoded"
    assert result.measured_on["dimensions"] == 40
    for dataset, name in ((probe.train_set, "training"), (probe.validation_set, "validation")):
        _, label = windows_and_labels(probe, dataset)
        assert result.measured_on[name] == {
            "windows": len(label),
            "frames": label.numel(),
            "speakers": 3,
            "classes": len(label.unique()),
        }
    output = capsys.readouterr().out
    assert "encoded features, 40 dimensions" in output
    settings = "classifier: 1 layer, trained for \\d+ epochs? on batches of \\d+ windows, "
    assert re.search(rf"{settings}learning rate 0\.\d+\n", output)
    assert "majority phone of the training set" in output


def test_classes_only_in_validation_are_counted(corpus, capsys):
    sets = make_sets(corpus, held_out=lambda sequence: sequence.speaker == 2)
    result = Probe("speaker", SpectralModel(), *sets, 3, FAST).run()
    assert result.measured_on["classes_only_in_validation"] == 1
    assert result.measured_on["share_only_in_validation"] == 1
    assert result.metric == result.baseline == 0
    assert "never recognised: 1 speaker, 100.0 %" in capsys.readouterr().out


def test_files_without_labels_are_left_out_and_counted(corpus, labels, capsys):
    kept = {name: label for name, label in labels.labels.items() if not name.endswith("0001")}
    sets = make_sets(corpus, labels._replace(labels=kept))
    result = Probe("phone", SpectralModel(), *sets, labels.n_phones, FAST).run()
    assert result.measured_on["files_without_labels"] == 3
    assert "left out, without phone labels: 3 files" in capsys.readouterr().out


# ---------------------------------------------------------------------------- features, randomness


def test_features_are_computed_once_if_they_fit(phone_probe):
    calls = {}
    for limit in (None, 0):
        model = SpectralModel()
        phone_probe(model, n_epochs=4, max_stored_bytes=limit).run()
        calls[limit] = model.n_calls
    assert calls[0] == pytest.approx(4 * calls[None], abs=4)  # training drops incomplete batches


@pytest.mark.parametrize("task", ["phone", "speaker"])
def test_stored_features_are_the_fresh_ones(corpus, labels, task):
    sets = make_sets(corpus, labels)
    probe = Probe(task, SpectralModel(), *sets, labels.n_phones, FAST)
    for dataset, training in zip(sets, (True, False), strict=True):
        fresh, fresh_label = windows_and_labels(probe, dataset)
        stored = probe._feature_source(dataset, training=training)
        assert isinstance(stored, eval.probe_features.StoredWindowFeatures)
        features, label, _ = map(torch.cat, zip(*stored.batches(3), strict=True))
        if training:
            assert not torch.equal(features, fresh)
            order = torch.tensor(
                [(fresh == row).flatten(1).all(1).nonzero()[0] for row in features]
            )
            assert order.sort().values.tolist() == list(range(len(fresh)))
            fresh, fresh_label = fresh[order], fresh_label[order]
        assert torch.equal(features, fresh)
        assert torch.equal(label, fresh_label)


def test_only_the_last_frame_is_kept_for_speakers(corpus):
    probe = Probe("speaker", SpectralModel(), *make_sets(corpus), 3, FAST)
    assert probe._feature_source(probe.train_set, training=True).stored.features.shape[1:] == (
        1,
        81,
    )


def test_features_go_where_there_is_room(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    free = {cpu: 1000, cuda: 100}
    monkeypatch.setattr(eval.probe_features, "available_memory", free.get)
    assert storage_for(50, cuda) == cuda
    assert storage_for(51, cuda) == cpu
    assert storage_for(501, cuda) is None
    assert storage_for(501, cpu) is None
    assert storage_for(501, cpu, limit=501) == cpu
    assert storage_for(50, cpu, limit=49) is None


@pytest.mark.parametrize("task", ["phone", "speaker"])
def test_the_training_run_is_left_untouched(corpus, labels, task, tmp_path):
    model = tiny_cpc_model(samplingType="sequential").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    sets = make_sets(corpus, labels)
    run_probe(task, model, *sets, labels.n_phones, FAST, logs_dir=tmp_path, checkpoint_dir=tmp_path)

    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_probe_depends_on_seed_and_cpc_epoch_alone(phone_probe):
    def logs(**changes):
        torch.rand(torch.randint(100, ()))  # whatever was drawn before
        probe = phone_probe(n_epochs=2, **changes)
        probe.run()
        return probe.logs

    assert logs() == logs()
    assert logs()["locLoss_train"] != logs(seed=1)["locLoss_train"]
    assert logs()["locLoss_train"] != logs(cpc_epoch=5)["locLoss_train"]


# ----------------------------------------------------- several classifiers, neighbours, normalising


def test_several_classifiers_give_a_mean_and_its_spread(phone_probe):
    slow = {"learning_rate": 0.002, "n_epochs": 2}
    single, probe = phone_probe(**slow), phone_probe(n_times=3, **slow)
    single.run()
    result = probe.run()
    each = probe.logs["best_val_acc_each"]
    assert each[0] == single.logs["best_val_acc"]
    assert probe.logs["locLoss_train"] == single.logs["locLoss_train"]  # the first one's
    assert len(set(each)) == 3
    assert result.metric == probe.logs["best_val_acc"] == pytest.approx(np.mean(each))
    assert result.spread == probe.logs["best_val_acc_std"] == pytest.approx(np.std(each, ddof=1))
    assert result.logged()["phone_best_val_acc_std"] == [result.spread]


def test_accuracies_of_single_speakers(phone_probe):
    probe = phone_probe()
    result = probe.run()
    by_speaker = probe.logs["speaker_accuracy"]
    assert set(by_speaker) == {"10", "11", "12"}
    n_frames = sum(part["frames"] for part in by_speaker.values())
    for key, value in (("accuracy", result.metric), ("majority_class", result.baseline)):
        total = sum(part[key] * part["frames"] for part in by_speaker.values())
        assert total / n_frames == pytest.approx(value)


def test_nearest_classes_are_those_of_a_naive_search(monkeypatch):
    monkeypatch.setitem(eval.knn.TABLE_FLOATS, "cpu", 300)  # several parts
    queries, bank = torch.randn(40, 5), torch.randn(70, 5)
    classes = torch.randint(0, 4, (70,))
    found = nearest_classes(queries, bank, classes, (1, 4, 10))
    for i, query in enumerate(queries):
        order = torch.cosine_similarity(query[None], bank).argsort(descending=True)
        for k, guesses in found.items():
            near = classes[order[:k]].tolist()
            most = max(map(near.count, near))
            assert guesses[i] == next(label for label in near if near.count(label) == most)


def test_a_bank_is_even_over_classes_and_speakers():
    classes = torch.tensor([0] * 900 + [1] * 60 + [2] * 5)
    speakers = torch.arange(len(classes)) % 2
    speakers[:800] = 0
    mask = choose_bank(classes, speakers, 105, torch.Generator().manual_seed(0))
    assert classes[mask].bincount().tolist() == [50, 50, 5]
    assert choose_bank(classes, speakers, 2000, torch.Generator()).all()
    assert speakers[mask & (classes == 0)].bincount().tolist() == [25, 25]
    assert speakers[mask & (classes == 1)].bincount().tolist() == [25, 25]


def test_neighbours_separate_phones(phone_probe):
    probe = phone_probe(knn=(1, 5), n_epochs=1)
    result = probe.run()
    assert result.knn == probe.logs["knn"]["val_acc"]
    assert min(result.knn.values()) > 0.9 > result.baseline
    assert result.logged()["phone_knn_5_val_acc"] == [result.knn["5"]]
    bank = probe.logs["knn"]["bank"]
    assert sum(bank["classes"].values()) == sum(bank["speakers"].values()) == bank["frames"]
    assert bank["frames"] == bank["of"] == probe.measured_on["training"]["frames"]
    with pytest.raises(UserError, match="--knn 10000: there are"):
        phone_probe(knn=(10_000,), n_epochs=1).run()


@pytest.mark.parametrize("kind", ["utterance", "speaker"])
@pytest.mark.parametrize("max_stored_bytes", [None, 0])
def test_features_are_normalised_over_each_utterance_or_speaker(
    phone_probe, kind, max_stored_bytes
):
    changes = {"max_stored_bytes": max_stored_bytes}
    frames, normalised = (
        torch.cat([batch.features.flatten(0, 1) for batch in source.batches(0)])
        for probe in (phone_probe(**changes), phone_probe(feature_norm=kind, **changes))
        for source in [probe._feature_source(probe.validation_set, training=False)]
    )
    dataset = phone_probe().validation_set
    group = torch.arange(len(dataset.utterances)) if kind == "utterance" else dataset.speakers
    lengths = torch.from_numpy(dataset.samples // 160)
    group = torch.as_tensor(group).repeat_interleave(lengths)[: len(frames)]
    for which in group.unique():
        own = frames[group == which].double()
        expected = (own - own.mean(0)) / (own.var(0) + 1e-8).sqrt()
        assert_close(normalised[group == which], expected.float(), 1e-4)


def test_probes_are_due_at_the_epochs_of_a_list():
    for every, epochs in ((3, [3, 6]), ("1,3", [1, 3])):
        hook = ProbeHook("probe", None, every=every, world=None)
        assert [epoch for epoch in range(8) if hook.due(epoch)] == epochs


def test_command_with_all_of_them(probe_command, phones):
    flags = "--linsep_hidden 7 --linsep_times 2 --knn 3 --feature_norm speaker".split()
    out, logs = probe_command(*phones, *flags)
    assert logs["measured_on"]["feature_norm"] == "speaker"
    assert set(logs["knn"]["val_acc"]) == {"3"}
    assert len(logs["best_val_acc_each"]) == 2
    layers = load_phone_classifier(out / "checkpoint_1.pt").PhoneCriterionClassifier
    assert [tuple(layers[i].weight.shape) for i in (0, 2)] == [(7, 16), (5, 7)]


# ---------------------------------------------------------------------------------- what it writes


def test_files_of_a_probe_in_training(corpus, labels, tmp_path):
    model = SpectralModel()
    sets = make_sets(corpus, labels)
    stale = tmp_path / "best/4/phone/phone_classif_best-epoch77-cpc_epoch4.pt"
    other = tmp_path / "best/4/phone/phone_classif_best-epoch77-cpc_epoch3.pt"
    stale.parent.mkdir(parents=True)
    stale.touch(), other.touch()

    result = run_probe(
        "phone",
        model,
        *sets,
        labels.n_phones,
        options(learning_rate=3.0),
        logs_dir=tmp_path / "logs",
        checkpoint_dir=tmp_path / "best",
    )

    logs = load_json(tmp_path / "logs/4/phone/logs.json")
    assert logs["epoch"] == list(range(6))
    for key in ("locLoss_train", "locAcc_train", "locLoss_val", "locAcc_val"):
        assert [len(values) for values in logs[key]] == [1] * 6
    assert logs["best_val_acc"] == result.metric
    assert logs["measured_on"] == result.measured_on
    assert (tmp_path / "logs/4/phone/confusion.png").stat().st_size > 1000

    best = stale.with_name(f"phone_classif_best-epoch{result.best_epoch}-cpc_epoch4.pt")
    assert sorted(stale.parent.iterdir()) == sorted([best, other])
    state = load_tensors(best)
    assert set(state) == {"CPCmodel", "classifNetCriterionCombined", "optimizer"}
    assert state["CPCmodel"].keys() == model.state_dict().keys()
    steps = (result.best_epoch + 1) * logs["iter"][0]
    assert all(s["step"] == steps for s in state["optimizer"]["state"].values())
    assert result.best_epoch < 5  # else the test would show nothing


def test_directories_only_for_what_ran(corpus, tmp_path):
    leftover = tmp_path / "logs" / "4" / "speaker" / f"{TEMPORARY_PREFIX}1.json"  # of a killed run
    leftover.parent.mkdir(parents=True)
    leftover.write_text("")
    run_probe("speaker", SpectralModel(), *make_sets(corpus), 3, FAST, logs_dir=tmp_path / "logs")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()] == [
        "logs/4/speaker/logs.json"
    ]


def test_logs_are_written_at_logging_steps(corpus, tmp_path, monkeypatch):
    lengths = []
    monkeypatch.setattr(eval.probe, "save_json", lambda _, logs: lengths.append(len(logs["epoch"])))
    sets = make_sets(corpus)
    run_probe("speaker", SpectralModel(), *sets, 3, options(logging_step=2), logs_dir=tmp_path)
    assert lengths == [3, 5, 6]


def test_options_of_a_training_run():
    args = build_parser().parse_args(
        "--linsep_n_epoch 3 --linsepBatchSizeGPU 5 --linsep_lr 0.1 --linsep_beta1 0.2 "
        "--linsep_beta2 0.3 --linsep_epsilon 0.4 --linsep_net_layers 6 --linsep_task_logging_step 7"
        " --CTCphones --random_seed 8".split()
    )
    expected = ProbeOptions(3, 5, 0.1, 0.2, 0.3, 0.4, 6, True, False, logging_step=7, seed=8)
    phone = ProbeOptions.of_training_run(args, "phone", 9)
    assert phone == ProbeOptions(**{**vars(expected), "cpc_epoch": 9})
    assert not ProbeOptions.of_training_run(args, "speaker", 9).ctc
    args.phone_get_encoded = True
    assert ProbeOptions.of_training_run(args, "phone", 9).get_encoded
    assert not ProbeOptions.of_training_run(args, "speaker", 9).get_encoded


@pytest.mark.parametrize("n_classes", [1, 5, 42, 300])
def test_confusion_picture(tmp_path, n_classes):
    counts = torch.randint(1, 9, (n_classes, n_classes))
    counts[n_classes // 2 :: 7] = 0
    counts[0] = 1
    draw_confusion(counts, tmp_path / "confusion.png", "phones")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_confusions_are_named_by_the_symbols_beside_the_labels(
    probe_command, tiny_corpus, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(plot_confusion, "save_figure", lambda figure, path: drawn.append(figure))
    labels = tmp_path / "converted_aligned_phones.txt"
    labels.write_text((tiny_corpus / "phones.txt").read_text())
    names = ["SIL", "AA", "B", "CH", "D"]
    (tmp_path / "phones.txt").write_text("".join(f"{i} {n}\n" for i, n in enumerate(names)))
    probe_command("--pathPhone", labels)
    axes = drawn[0].axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        assert [tick.get_text() for tick in axis.get_ticklabels()] == names


# ------------------------------------------------------------------------------------- center push


@pytest.mark.parametrize("case", golden_cases("centerpush"))
def test_center_push_golden(case):
    points, centers, degree = case["points"], case["centers"], case.config["deg"]
    assert_close(squared_distances(points, centers), case["dist"])
    assert_close(squared_distances(points, centers, normalize=True), case["dist_norm"])
    assert_close(push_to_nearest(points, centers, degree), case["pushed"])
    assert_close(push_to_nearest(points, centers, degree, True), case["pushed_norm"])
    assert_close(push_to_nearest(points, centers, degree, True, True), case["pushed_normpush"])


def test_centers_are_read_from_each_kind_of_file(tmp_path):
    centers = torch.randn(3, 4)
    np.save(tmp_path / "c.npy", centers.numpy())
    np.savetxt(tmp_path / "c.txt", centers.numpy())
    torch.save({"state_dict": {"Ck": centers[None]}}, tmp_path / "c.pt")
    for name in ("c.npy", "c.txt", "c.pt"):
        assert_close(read_centers(str(tmp_path / name)), centers)
    (tmp_path / "words.txt").write_text("no centers here\n")
    torch.save({"weights": centers}, tmp_path / "other.pt")
    for name in ("words.txt", "other.pt", "missing.npy", "missing.pt"):
        with pytest.raises(UserError, match=name):
            read_centers(str(tmp_path / name))


def test_null_space():
    matrix = torch.randn(3, 8)
    matrix[2] = matrix[0] + matrix[1]  # of rank 2
    basis = null_space(matrix)
    assert basis.shape == (8, 6)
    assert_close(basis.T @ basis, torch.eye(6))
    assert (matrix @ basis).abs().max() < 1e-5
    assert null_space(torch.randn(8, 8)).shape == (8, 0)


# ------------------------------------------------------------------------------------- the command


def tiny_cpc_model(**changes):
    torch.manual_seed(1)
    return build_model(tiny_arguments(**changes))


def tiny_arguments(**changes):
    args = build_parser().parse_args(
        f"--hiddenEncoder 16 --hiddenGar 16 --sizeWindow {WINDOW} --nLevelsGRU 2".split()
    )
    return Namespace(**{**vars(args), **changes})


def write_checkpoint(directory, **changes):
    args = tiny_arguments(**changes)
    state = {
        "gEncoder": tiny_cpc_model(**changes).state_dict(),
        "cpcCriterion": {},
        "optimizer": {},
        "best": None,
        "args": vars(args),
        "logs": {},
        "position": [1, 0, 0],
    }
    return str(save_checkpoint(directory, state, 0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture
def probe_command(tiny_corpus, checkpoint, tmp_path):
    """Runs the command, on the tiny corpus by default; returns (directory, logs)."""

    def run(*flags, load=(checkpoint,), out=tmp_path / "out"):
        data = (tiny_corpus / "audio", tiny_corpus / "train.txt", tiny_corpus / "test.txt")
        usual = "--n_epoch", "2", "--size_window", WINDOW, "--pathCheckpoint", out, "--lr", 0.01
        main([str(part) for part in (*data, *load, *usual, *flags)])
        return out, load_json(out / "checkpoint_logs.json")

    return run


@pytest.fixture
def phones(tiny_corpus):
    return "--pathPhone", tiny_corpus / "phones.txt"


def test_command_writes_what_the_original_does(probe_command):
    out, logs = probe_command()
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint_1.pt",
        "checkpoint_args.json",
        "checkpoint_logs.json",
    ]
    state = load_tensors(out / "checkpoint_1.pt")
    assert set(state) >= {"gEncoder", "cpcCriterion", "optimizer", "best"}
    assert set(state["cpcCriterion"]) == {
        "linearSpeakerClassifier.weight",
        "linearSpeakerClassifier.bias",
    }
    assert logs["epoch"] == [0, 1]
    assert load_json(out / "checkpoint_args.json")["dim_inter"] == 128


def test_checkpoints_of_the_command_can_be_loaded(probe_command, checkpoint, tmp_path):
    probe_command("--unfrozen", "--gru_level", "1", out=tmp_path / "one")
    probe_command(out=tmp_path / "two", load=(checkpoint, checkpoint))
    _, logs = probe_command(load=(tmp_path / "one" / "checkpoint_1.pt", tmp_path / "two"))
    assert logs["measured_on"]["dimensions"] == 3 * 16
    model = load_model(tmp_path / "one")[0]
    weights = load_tensors(tmp_path / "one" / "checkpoint_1.pt")["gEncoder"]
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_command_on_phones(probe_command, phones):
    out, logs = probe_command(*phones, "--save_step", "1", "--n_epoch", "3")
    assert {"confusion.png", "checkpoint_1.pt", "checkpoint_2.pt"} <= {
        p.name for p in out.iterdir()
    }
    assert not (out / "checkpoint_0.pt").exists()
    assert logs["measured_on"]["layer"] == "context"
    assert set(logs["class_accuracy"]) == set("01234")


def test_command_with_ctc(probe_command, phones):
    _, logs = probe_command(*phones, "--CTC", "--linsep_net_layers", "2")
    assert logs["best_val_per"] == min(logs["PER_val"])[0]


def test_command_concatenates_features(probe_command, checkpoint, tmp_path):
    other = write_checkpoint(tmp_path / "other", hiddenGar=24)
    _, logs = probe_command(load=(checkpoint, other))
    assert logs["measured_on"]["dimensions"] == 16 + 24
    _, logs = probe_command("--get_encoded", load=(checkpoint, other), out=tmp_path / "encoded")
    assert logs["measured_on"]["dimensions"] == 16 + 16


def test_command_trains_the_model_only_on_request(probe_command, checkpoint, tmp_path):
    before = load_tensors(checkpoint)["gEncoder"]
    for flags, same in (((), True), (("--unfrozen",), False), (("--no_pretraining",), False)):
        out, _ = probe_command(*flags, out=tmp_path / str(flags))
        after = load_tensors(out / "checkpoint_1.pt")["gEncoder"]
        assert torch.equal(before["gEncoder.conv0.weight"], after["gEncoder.conv0.weight"]) == same


def test_command_with_fewer_layers(probe_command):
    out, _ = probe_command("--gru_level", "1")
    state = load_tensors(out / "checkpoint_1.pt")["gEncoder"]
    assert "gAR.baseNet.weight_ih_l0" in state
    assert "gAR.baseNet.weight_ih_l1" not in state


def test_null_space_modes(probe_command, phones, tmp_path):
    factorized = "--mode", "speakers_factorized", "--dim_inter", "5"
    out, _ = probe_command(*factorized, out=tmp_path / "factorized")
    path = out / "checkpoint_1.pt"
    weight = load_tensors(path)["cpcCriterion"]["linearSpeakerClassifier.0.weight"]
    assert weight.shape == (5, 16)
    for flags in (("--mode", "speakers_nullspace"), ("--mode", "phonemes_nullspace", *phones)):
        where = {"out": tmp_path / flags[1]}
        out, logs = probe_command(*flags, "--path_speakers_factorized", path, **where)
        assert logs["measured_on"]["dimensions"] == 11
        model, *dims = load_model(out, nullspace=True)
        assert dims == [11, 11]
        assert (weight @ model.nullspace.weight.T).abs().max() < 1e-5


def test_a_null_space_of_concatenated_models_is_loaded_again(
    probe_command, phones, checkpoint, tmp_path
):
    other = write_checkpoint(tmp_path / "other", arMode="GRU", nLevelsGRU=1)
    load = {"load": (checkpoint, other)}
    flags = "--mode", "speakers_factorized", "--dim_inter", "5"
    path = probe_command(*flags, **load, out=tmp_path / "factorized")[0] / "checkpoint_1.pt"
    flags = "--mode", "phonemes_nullspace", *phones, "--path_speakers_factorized", path
    out, logs = probe_command(*flags, **load)
    assert logs["measured_on"]["dimensions"] == 27
    model, *dims = load_model(out, nullspace=True)
    assert dims == [27, 27]
    assert [args.arMode for args in model.arguments] == ["LSTM", "GRU"]
    pair, waveform = load_model([checkpoint, other])[0], torch.randn(2, 1, WINDOW)
    basis = load_tensors(out / "checkpoint_1.pt")["gEncoder"]["nullspace.weight"]
    for features, projected in zip(pair(waveform), model(waveform), strict=True):
        assert_close(projected, features @ basis.T)
    beside, *dims = load_model([out, checkpoint], gru_level=1)
    assert dims == [43, 43]
    assert [args.nLevelsGRU for args in beside.arguments] == [1, 1, 1]
    probe_command(load=(out,), out=tmp_path / "probe of it")
    assert load_model(tmp_path / "probe of it")[1] == 27


def test_results_that_can_not_be_written_are_noticed_before_the_work(
    probe_command, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    with ends_refused(capsys, f"--pathCheckpoint .*{tmp_path / 'file'} is no directory"):
        probe_command(load=("no such checkpoint",), out=tmp_path / "file" / "out")


def test_command_pushes_to_centers(probe_command, tmp_path):
    np.save(tmp_path / "one.npy", np.ones((1, 16), dtype=np.float32))
    push = "--centerpushFile", tmp_path / "one.npy", "--centerpushDeg"
    _, logs = probe_command(*push, 1.0)
    assert logs["best_val_acc"] == pytest.approx(logs["baseline_val_acc"])  # all frames are alike
    np.save(tmp_path / "one.npy", np.ones((1, 15), dtype=np.float32))
    with pytest.raises(SystemExit):
        probe_command(*push, 1.0)


def test_command_probes_units(probe_command, phones, tmp_path, capsys):
    """As accurate as the majority class of each of two units, at best."""
    np.save(tmp_path / "two.npy", np.random.default_rng(0).normal(size=(2, 16)))
    out, logs = probe_command(*phones, "--clusters", tmp_path / "two.npy")
    weight = load_tensors(out / "checkpoint_1.pt")["cpcCriterion"][
        "PhoneCriterionClassifier.weight"
    ]
    assert weight.shape[1] == 2
    assert logs["measured_on"]["layer"] == "units of context"
    assert logs["best_val_acc"] >= logs["baseline_val_acc"]
    np.save(tmp_path / "narrow.npy", np.zeros((2, 15)))
    for said, words in {
        "15 dimensions for features of 16": ("--clusters", tmp_path / "narrow.npy"),
        "leave out .*--unfrozen": ("--clusters", tmp_path / "two.npy", "--unfrozen"),
        "holds no centers": ("--clusters", tmp_path / "none.npy"),
    }.items():
        with ends_refused(capsys, said):
            probe_command(*words, out=tmp_path / "refused")


@pytest.mark.parametrize(
    ("load", "n_samples"),
    [
        (["first", "other/checkpoint_0.pt"], 2 * WINDOW),
        (["other", "first", "--size_window", str(WINDOW)], WINDOW),
        (["published"], 20480),
    ],
)
def test_windows_are_those_of_the_run_by_default(
    tiny_corpus, tmp_path, monkeypatch, capsys, load, n_samples
):
    monkeypatch.chdir(tmp_path)
    for name, size in (("first", 2 * WINDOW), ("other", 3 * WINDOW), ("published", 160)):
        path = write_checkpoint(name, sizeWindow=size)
    state = load_tensors(path)
    del state["args"]["sizeWindow"]
    save_tensors(path, state)
    data = (tiny_corpus / "audio", tiny_corpus / "train.txt", tiny_corpus / "test.txt")
    main([*map(str, data), *load, "--n_epoch", "1", "--pathCheckpoint", "out"])
    probing, *_, last = capsys.readouterr().out.splitlines()
    assert probing.startswith(f"probing {tmp_path / load[0] / 'checkpoint_0.pt'}")
    assert probing.endswith(f", in windows of {n_samples} samples")
    assert last == "results: out"
    assert load_json("out/checkpoint_args.json")["size_window"] == n_samples


def test_command_never_overwrites_a_training_run(probe_command, tmp_path, capsys):
    run = tmp_path / "run"
    write_checkpoint(run)
    files = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(SystemExit) as exit_:
        probe_command(out=run)
    assert exit_.value.code == 2
    assert "training run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.iterdir()} == files


def test_command_replaces_an_earlier_probe(probe_command):
    probe_command("--n_epoch", "3")
    out, _ = probe_command("--n_epoch", "2")
    assert [path.name for path in out.glob("*.pt")] == ["checkpoint_1.pt"]


def test_command_never_overwrites_another_probe(probe_command, phones, tmp_path, capsys):
    out, _ = probe_command(*phones)
    files = {path: path.read_bytes() for path in out.iterdir()}
    other = write_checkpoint(tmp_path / "other")
    for words, load, said in (
        ((), {}, r"another pathPhone \(.*phones\.txt\): name another directory"),
        (phones, {"load": (other,)}, r"another load \("),
        ((*phones, "--no_pretraining"), {}, r"another no_pretraining \(False\)"),
    ):
        with ends_refused(capsys, said):
            probe_command(*words, **load)
    assert {path: path.read_bytes() for path in out.iterdir()} == files


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model wav2vec", "fairseq"),
        ("--path_fairseq X", "fairseq"),
        ("--CTC", "--CTC needs --pathPhone"),
        ("--CTC --pathPhone X --get_encoded", "--get_encoded"),
        ("--mode speakers --pathPhone X", "leave one out"),
        ("--mode phonemes_nullspace --path_speakers_factorized X", "needs --pathPhone"),
        ("--mode speakers_nullspace", "needs --path_speakers_factorized"),
        ("--path_speakers_factorized X", "_nullspace"),
        ("--mode speakers_factorized --linsep_net_layers 2", "two layers"),
        ("--linsep_hidden 5 --linsep_net_layers 2", "choose one"),
        ("--linsep_hidden 5 --mode speakers_factorized", "leave out --linsep_hidden"),
        ("--knn 1 --CTC --pathPhone X", "--knn can't be used with --CTC"),
        ("--knn 1,0", "--knn 0: must be at least 1"),
        ("--unfrozen --linsep_times 2", "--unfrozen: leave out"),
        ("--feature_norm speaker --centerpushFile X", "--centerpushFile: its centers"),
        ("--centerpushFile X", "--centerpushDeg"),
        ("--centerpushDeg 0.5", "--centerpushFile"),
        ("--size_window 100", "multiple of 160"),
        ("--n_epoch 0", "--n_epoch"),
        ("--batchSizeGPU 0", "--batchSizeGPU"),
        ("--beta1 1", "--beta1"),
        ("--lr 0", "--lr"),
        ("--nGPU 0", "--nGPU"),
        ("--nGPU 1000", "--nGPU"),
    ],
)
def test_command_refuses_what_cannot_work(flags, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(["audio", "train.txt", "test.txt", "run.pt", *flags.split()])


@pytest.mark.parametrize("missing", ["empty list", "no such names", "labels of other files"])
def test_command_without_data(checkpoint, tiny_corpus, tmp_path, capsys, missing):
    names = {"empty list": "", "no such names": "a\nb\n", "labels of other files": None}[missing]
    (tmp_path / "list.txt").write_text(names or "")
    (tmp_path / "phones.txt").write_text("somebody 1 2 3\n")
    flags = ["--pathPhone", tmp_path / "phones.txt"] if names is None else []
    data = tiny_corpus / "audio", tiny_corpus / "train.txt"
    validation = tiny_corpus / "test.txt" if names is None else tmp_path / "list.txt"
    with pytest.raises(SystemExit) as exit_:
        main([str(part) for part in (*data, validation, checkpoint, *flags)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ("phones.txt" if names is None else "list.txt") in error


def save_model(directory, *words, model=None, criterion=None, **flags):
    """A checkpoint of a small model; returns its path."""
    args = build_parser().parse_args(["--hiddenEncoder", "8", "--hiddenGar", "8", *words])
    state = {
        "gEncoder": (model or build_model(args)).state_dict(),
        "cpcCriterion": criterion.state_dict() if criterion else {},
        "optimizer": {},
        "best": None,
        "args": {**vars(args), **flags},
        "logs": {},
        "position": [1, 0, 0],
    }
    return save_checkpoint(directory, state, 0)


def status_of(main, *words):
    """Run a command in this process; its exit status."""
    try:
        return main([str(word) for word in words]) or 0
    except SystemExit as end:
        return end.code
