"""A few cases of benchmarks/torture.py: damaged corpora and checkpoints, kills and stop signals."""

import random
import shutil
import signal

import pytest

from benchmarks.trials.damaged_files import damage_run, uses_of_a_checkpoint
from benchmarks.trials.mutations import corrupt_corpus
from benchmarks.trials.runs import TINY, Run, content, on
from benchmarks.trials.true_labels import check_training_sets
from tests.helpers import assert_equal_trees, write_tiny_corpus
from train import main as train
from utils.files import TEMPORARY_PREFIX


def run(words):
    """Run train.py in this process; its exit status."""
    try:
        return train([str(word) for word in words]) or 0
    except SystemExit as end:
        return end.code


def ends_well(words, capsys):
    """Run train.py; whether it succeeded. Everything else must be a refusal in one line."""
    capsys.readouterr()
    status, error = run(words), capsys.readouterr().err
    if status != 0:
        assert status == 2, error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    return status == 0


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_tiny_corpus(tmp_path_factory.mktemp("sound"), seconds=(0.3, 0.6))


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_corpus_is_refused_or_gives_the_right_labels(seed, sound, tmp_path, capsys):
    corpus = shutil.copytree(sound, tmp_path / "corpus")
    corrupt_corpus(random.Random(seed), corpus)
    words = [
        *on(corpus), *TINY, "--nEpoch", 1, "--pathCheckpoint", tmp_path / "run",
        "--path_phone_data", corpus / "phones.txt", "--supervised",
    ]  # fmt: skip
    if ends_well(words, capsys):
        check_training_sets([str(word) for word in words])


@pytest.fixture(scope="module")
def run_directory(sound, tmp_path_factory):
    """Of two epochs."""
    directory = tmp_path_factory.mktemp("sound_run") / "run"
    words = [*on(sound), *TINY, "--nEpoch", 2, "--pathCheckpoint", directory]
    train([str(word) for word in words])
    return directory


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_run_is_refused_or_resumes(seed, run_directory, sound, tmp_path, capsys):
    rng = random.Random(seed)
    shutil.copytree(run_directory, tmp_path / "run")
    damage_run(rng, tmp_path / "run", tmp_path / "canary")
    use = rng.choice(list(uses_of_a_checkpoint(sound, tmp_path).values()))
    ends_well(use, capsys)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("phase", ["training", "saving", "report"])
def test_a_killed_run_ends_like_one_that_was_not(phase, run_directory, sound, tmp_path):
    words = [*on(sound), *TINY, "--nEpoch", 2, "--pathCheckpoint", tmp_path / "run"]
    words += ["--resume_every", 2]
    killed = Run(words, tmp_path / "log")
    killed.wait(lambda: killed.phase == phase)
    killed.signal(signal.SIGKILL)
    assert killed.finish().status == -signal.SIGKILL
    assert run(words) == 0
    for name in ("checkpoint_0.pt", "checkpoint_1.pt", "checkpoint_logs.json"):
        whole, other = (content(place / name) for place in (run_directory, tmp_path / "run"))
        for kept in (whole, other):
            kept.pop("args", None)  # they say where the run is
        assert_equal_trees(whole, other, name)
    assert not list((tmp_path / "run").glob(TEMPORARY_PREFIX + "*"))
