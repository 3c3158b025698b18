"""Grids of runs (benchmarks/learning.py), their results, and the tables made from them."""

import itertools

from benchmarks import learning
from tests.common import ROOT
from utils.files import load_json, save_json

GRID = {
    "what": "a test",
    "prepare": ["utils/corpus/make_demo.py {work}/demo --speakers 2 --utterances 5"],
    "run": "train.py --pathDB {work}/demo/audio --device cpu --logging_step 1 --learningRate 1e-2 "
    "--hiddenEncoder 8 --hiddenGar 8 --rnnMode linear --sizeWindow 5120 --nPredicts 2 --nEpoch 1",
    "axes": {"size": {"tiny, linear": ""}, "AR": {"LSTM": "", "GRU": "--arMode GRU"}},
    "parts": [{"seeds": 1, "AR": ["GRU"]}],
    "measures": {
        "steps": {"steps_below": 1.5},
        "loss": {"file": "{run}/checkpoint_logs.json", "key": "locLoss_val.-1.mean"},
    },
    "tables": [{"title": "Losses", "rows": ["size"], "columns": "AR", "measures": ["loss"]}],
}


def test_a_grid_runs_once_and_keeps_its_values(tmp_path, capsys):
    grid = tmp_path / "few.json"
    save_json(grid, GRID)
    words = [grid, "--work", tmp_path / "work", "--results", tmp_path / "results"]
    learning.main([str(word) for word in words])
    assert "| size | LSTM | GRU |\n|---|---|---|\n| tiny, linear |  | 4." in capsys.readouterr().out
    results = load_json(tmp_path / "results" / "few.json")
    ((name, run),) = results["runs"].items()
    assert name == "tiny, linear/GRU/1"
    assert run["settings"] == {"size": "tiny, linear", "AR": "GRU", "seed": 1}
    assert run["values"]["steps"] == 1
    assert str(tmp_path) not in run["command"]
    assert not (tmp_path / "work" / "tiny, linear" / "GRU" / "1").exists()

    run["values"]["loss"] = 3.25  # a second call trains nothing and overwrites nothing
    save_json(tmp_path / "results" / "few.json", results)
    learning.main([str(word) for word in words])
    assert "| tiny, linear |  | 3.25 |" in capsys.readouterr().out


def test_tables_in_the_readme_are_those_of_the_results():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    results = [load_json(path) for path in learning.RESULTS.glob("*.json")]
    assert results
    for table in itertools.chain.from_iterable(map(learning.tables, results)):
        assert table in text
