"""The recipes in small: every step of each, on synthetic speech in the layout of its corpus."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.common import ROOT
from utils.run.flags import build_parser

RECIPES = {
    "librispeech": "phone speaker abx clusters_16 units_16",
    "timit": "phone segmentation-contexts segmentation-encoded",
    "unwritten": "phone speaker abx clusters_16 units_16 segmentation-contexts",
}


def start(recipe, out, *parts, **variables):
    """Start a recipe in the folder of `out`, as somebody who has the project elsewhere."""
    kept = {"PATH", "HOME", "CUDA_VISIBLE_DEVICES", "TMPDIR"}
    environment = {name: value for name, value in os.environ.items() if name in kept}
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "OUT": out.name, **variables}
    return subprocess.Popen(
        ["bash", str(ROOT / "recipes" / f"{recipe}.sh"), *parts],
        cwd=out.parent,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run(*args, status=0, **variables):
    process = start(*args, **variables)
    output, _ = process.communicate()
    assert process.returncode == status, output[-3000:]
    return output


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Recipe -> its folder, after all steps; they run at the same time."""
    place = tmp_path_factory.mktemp("with a blank")
    running = {name: start(name, place / f"of {name}", SMALL="1") for name in RECIPES}
    outputs = {name: process.communicate()[0] for name, process in running.items()}
    failed = {name: outputs[name][-3000:] for name in RECIPES if running[name].returncode}
    assert not failed
    return {name: place / f"of {name}" for name in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_measures_what_it_promises_and_repeats_nothing(recipe, results):
    folder = results[recipe] / "acpc" / "results_1"
    assert {path.name for path in folder.iterdir()} == set(RECIPES[recipe].split())
    logs = json.loads((folder / "phone" / "checkpoint_logs.json").read_text())
    assert max(logs["locAcc_val"])[0] > 0.1
    if (folder / "abx").exists():
        scores = json.loads((folder / "abx" / "ABX_scores.json").read_text())
        assert 0 < scores["within"] < 1
    for found in folder.glob("segmentation-*/segmentation.json"):
        phone = json.loads(found.read_text())["phone"]
        assert phone["strict"]["r_value"] > phone["strict"]["chance"]["as_many"]["r_value"]
    again = run(recipe, results[recipe], SMALL="1").splitlines()
    n_steps = len(list((results[recipe] / "steps").iterdir()))
    assert all(line.endswith(": done before") for line in again[:n_steps])
    phone_probe = f"{100 * logs['best_val_acc']:.1f} ({100 * logs['baseline_val_acc']:.1f})"
    assert again[n_steps].strip() == "acpc"
    assert again[n_steps + 1].split(maxsplit=2) == ["phone", "probe", phone_probe]


def test_every_system_trains(results):
    out, systems = results["librispeech"], ["cpc", "acpc-paper", "augmented"]
    if hasattr(build_parser().parse_args([]), "multiLevel"):
        systems.append("macpc")
    running = [start("librispeech", out, "train", SMALL="1", SYSTEM=name) for name in systems]
    for system, process in zip(systems, running, strict=True):
        output, _ = process.communicate()
        assert process.returncode == 0, output[-3000:]
        assert (out / system / "checkpoint_0.pt").exists()
        assert not (out / system / "results_1").exists()


def test_subsets_are_joined_and_a_step_that_failed_is_repeated(results, tmp_path):
    corpus = results["librispeech"] / "corpus"
    variables = {
        "LIBRISPEECH": str(corpus / "LibriSpeech"),
        "SUBSETS": "train-clean-100 dev-clean",
        "ALIGNMENTS": str(tmp_path / "absent"),
        "ITEMS": "published.item",
    }
    failed = run("librispeech", tmp_path / "out", "prepare", status=2, **variables)
    assert "absent" in failed
    variables["ALIGNMENTS"] = str(corpus / "alignments")
    done = run("librispeech", tmp_path / "out", "prepare", **variables)
    assert done.startswith("lists: done before\nprobe-lists: done before\n\nlabels: python")
    lists = [(tmp_path / "out" / folder / "train.txt").read_text() for folder in LISTS]
    speakers = [{line.partition("-")[0] for line in text.splitlines()} for text in lists]
    assert [len(names) for names in speakers] == [7, 4]


LISTS = ("lists", "probe-lists")  # of both subsets, of train-clean-100


def test_the_core_test_set_of_timit_is_without_sa(results, tmp_path):
    corpus = tmp_path / "TIMIT"
    shutil.copytree(results["timit"] / "corpus", corpus)
    (corpus / "TEST" / "DR1" / "FAA40").rename(corpus / "TEST" / "DR1" / "FELC0")
    variables = {"TIMIT": str(corpus), "TEST_SPEAKERS": "core"}
    run("timit", tmp_path / "out", "prepare", **variables)
    names = (tmp_path / "out" / "lists" / "test-core.txt").read_text().split()
    assert [name.rpartition("/")[0] for name in names] == ["TEST/DR1/FELC0"] * 3
    assert not any(name.rpartition("/")[2].startswith("SA") for name in names)


def test_what_a_recipe_does_not_know_is_refused(tmp_path):
    assert "SYSTEM=hcpc: cpc, acpc" in run("timit", tmp_path / "out", status=2, SYSTEM="hcpc")
    assert "tarin: prepare, train" in run("timit", tmp_path / "out", "tarin", status=2)
    assert not (tmp_path / "out").exists()
    (tmp_path / "TRAIN").mkdir()
    variables = {"TIMIT": str(tmp_path), "TEST_SPEAKERS": "Core"}
    refused = run("timit", tmp_path / "out", "prepare", status=2, **variables)
    assert "TEST_SPEAKERS=Core: all or core" in refused
