"""Exported folders, opened with Hugging Face's library, ONNX Runtime and safetensors alone."""

import json

import numpy as np
import pytest
import torch

from feature_loader import load_model
from tests.helpers import assert_close
from tests.test_export import LOGS, save_run

pytest.importorskip("safetensors")
pytest.importorskip("onnxruntime")

MODELS = {
    "LSTM": "--nLevelsGRU 2",
    "GRU": "--arMode GRU --normMode batchNorm",
    "RNN": "--arMode RNN --normMode instanceNorm",
    "no_ar": "--arMode no_ar --hiddenGar 8 --normMode ID --linearOutput",
}
LENGTHS = 320, 4321, 16_159  # none is that of the example that ONNX was traced with
OPEN = """
import sys
sys.modules["torchaudio"] = None  # its CUDA build can't be imported where PyTorch has none
import numpy as np, onnxruntime, torch
from transformers import AutoFeatureExtractor, AutoModel
for folder in sys.argv[1:]:
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
    for path in (f"{folder}-{i}.npy" for i in range(3)):
        rows = np.load(path)
        inputs = extractor(list(rows), sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        contexts, encoded = session.run(None, {"waveform": rows})
        assert np.array_equal(inputs.input_values, rows)
        np.savez(
            path + ".npz", contexts=outputs.last_hidden_state, encoded=outputs.extract_features,
            onnx_contexts=contexts, onnx_encoded=encoded,
        )
"""


@pytest.fixture
def exported(tmp_path, run_outside):
    """Name -> (folder, checkpoint) of models that the command exported."""
    from eval import export

    places = {}
    for name, words in MODELS.items():
        checkpoint, out = save_run(tmp_path / name, words, logs=LOGS), tmp_path / f"{name}-exported"
        export.main([str(checkpoint), str(out), "--onnx"])
        places[name] = out, checkpoint
    return places


def test_exported_folders_give_the_features_of_the_model(exported, run_outside):
    pytest.importorskip("tokenizers", reason="Hugging Face's transformers isn't installed")
    waveforms = [0.1 * torch.randn(2, length) for length in LENGTHS]
    for folder, _ in exported.values():
        for i, waveform in enumerate(waveforms):
            np.save(f"{folder}-{i}.npy", waveform.numpy())
    run_outside("-c", OPEN, *(folder for folder, _ in exported.values()))
    for folder, checkpoint in exported.values():
        model = load_model(checkpoint)[0].eval()
        for i, waveform in enumerate(waveforms):
            with torch.no_grad():
                expected = dict(zip(("contexts", "encoded"), model(waveform[:, None]), strict=True))
            for key, values in np.load(f"{folder}-{i}.npy.npz").items():
                assert_close(values, expected[key.removeprefix("onnx_")], what=f"{folder}: {key}")


def test_folder_holds_what_the_hub_expects(exported):
    folder, _ = exported["LSTM"]
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md", "config.json", "cpc_layers.py", "model.onnx", "model.safetensors",
        "modeling_cpc.py", "preprocessor_config.json",
    }  # fmt: skip
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    assert preprocessor["sampling_rate"] == 16000
    assert preprocessor["do_normalize"] is False
    assert "onnxruntime.InferenceSession" in (folder / "README.md").read_text()
