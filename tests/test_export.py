"""Tests of eval/export.py that need no optional library; others are in tests/extras."""

import sys

import pytest
import torch

from eval import export
from eval.export_model.card import write_card
from feature_loader import load_model
from model import ChannelNorm, ConcatenatedModel, build_model
from tests.helpers import assert_close
from utils.misc import UserError
from utils.run.checkpoint import open_checkpoint, save_checkpoint
from utils.run.flags import build_parser

LOGS = {
    "epoch": [0, 1, 2],
    "locLoss_val": [[4.0], [3.0], [3.5]],
    "locAcc_val": [[0.1], [0.4, 0.2], [0.2]],
    "before_training": {"locLoss_val": [4.8], "locAcc_val": [0.01]},
    "phone_best_val_acc": [None, [0.61], [0.63]],
    "phone_baseline_val_acc": [None, [0.11], [0.11]],
}


def save_run(directory, words, **more):
    """A checkpoint of a small model whose norms aren't as they begin; returns its path."""
    sizes = ["--hiddenEncoder", "8", "--hiddenGar", "6"]
    args = build_parser().parse_args([*sizes, *words.split()])
    model = build_model(args)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.1, 0.9) if tensor.ndim < 2 else None
    state = {"gEncoder": model.state_dict(), "cpcCriterion": {}, "optimizer": {}, "best": None}
    state |= {"args": vars(args), "logs": {}, "position": [3, 0, 0], **more}
    return save_checkpoint(directory, state, 2)


@pytest.mark.parametrize("norm", ["layerNorm", "batchNorm", "instanceNorm", "ID"])
@pytest.mark.parametrize(
    "network",
    [
        "--arMode LSTM --nLevelsGRU 2",
        "--arMode GRU --samplingType sequential",
        "--arMode RNN",
        "--arMode no_ar --hiddenGar 8 --linearOutput",
    ],
)
def test_plain_layers_compute_what_the_model_does(tmp_path, norm, network):
    model, *_ = load_model(save_run(tmp_path, f"--normMode {norm} {network}"))
    plain, config = export.plain_network(model.eval(), "x.pt")
    assert config["hidden_size"] == model.dim_context
    waveform = torch.randn(2, 4000)
    model.reset_hidden()
    for output, expected in zip(plain(waveform), model(waveform[:, None]), strict=True):
        assert_close(output, expected)
    assert torch.equal(plain(waveform[0])[0], plain(waveform[:1])[0])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--encoder_type lfb", "--encoder_type lfb"),
        ("--encoder_type mfcc", "--encoder_type mfcc"),
        ("--arMode transformer --hiddenGar 8", "--arMode transformer"),
        ("--cpc_mode reverse", "--cpc_mode reverse"),
    ],
)
def test_models_that_are_not_covered_are_refused_by_name(tmp_path, words, reason):
    path = save_run(tmp_path, words)
    model, *_ = load_model(path)
    with pytest.raises(UserError, match=f"checkpoint_2.pt: can't be exported: {reason}"):
        export.plain_network(model, path)
    with pytest.raises(UserError, match="a ConcatenatedModel"):
        export.plain_network(ConcatenatedModel([model]), path)


def test_layers_that_differ_are_not_exported(tmp_path, monkeypatch):
    model, *_ = load_model(save_run(tmp_path, ""))
    monkeypatch.setattr(ChannelNorm, "EPSILON", 1e-3)
    with pytest.raises(UserError, match="plain layers differ from the model"):
        export.plain_network(model.eval(), "x.pt")


def test_missing_library_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(SystemExit, match="2"):
        export.main([str(save_run(tmp_path / "run", "")), str(tmp_path / "out")])
    assert capsys.readouterr().err == (
        "error: safetensors isn't installed: python -m pip install safetensors\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("best", [False, True])
def test_card_has_the_figures_of_the_exported_weights_and_no_paths(tmp_path, best):
    words = f"--CPCCTC --nPredicts 8 --pathDB {tmp_path}/LibriSpeech/train-clean-100"
    path = save_run(tmp_path, words, logs=LOGS)
    options = export.parse_arguments([str(path), str(tmp_path / "out")] + ["--best"] * best)
    checkpoint = open_checkpoint(path)
    _, config = export.plain_network(load_model(path)[0].eval(), path)
    write_card(tmp_path / "README.md", checkpoint, config, options)
    card = (tmp_path / "README.md").read_text()
    assert "# CPC-CTC model of speech, trained on train-clean-100" in card
    assert f"| epochs of training | {2 if best else 3} |" in card
    assert f"| validation accuracy | 1.0 % | {'30.0' if best else '20.0'} % |" in card
    probe = "61.0" if best else "63.0"
    assert f"| phone accuracy of a linear probe | - | {probe} % |" in card
    assert "--CPCCTC\n" in card
    assert "--nPredicts 8\n" in card
    assert str(tmp_path) not in card
    assert "model.onnx" not in card
    assert "$" not in card
