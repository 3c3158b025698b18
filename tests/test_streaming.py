"""Tests of features of live audio: streaming.py and eval/stream.py."""

import io
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import streaming
from eval import stream
from feature_loader import StreamingModel
from model import ConcatenatedModel, CPCModelNullspace, build_model
from tests.helpers import ROOT, assert_close
from utils.misc import UserError
from utils.run.checkpoint import save_checkpoint
from utils.run.flags import build_parser


def flags(*words):
    return build_parser().parse_args(["--hiddenEncoder", "8", "--hiddenGar", "6", *words])


def make_model(words=""):
    """A model whose batch norms have seen some data."""
    model = build_model(flags(*words.split()))
    model.reset_hidden()
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm1d):
            torch.nn.init.uniform_(part.running_mean)
            torch.nn.init.uniform_(part.running_var, 0.5, 2)
    return model


def whole(model, audio):
    """Contexts and encoded frames of one pass over all the audio."""
    with torch.no_grad():
        model.eval()
        outputs = model(audio[None, None], torch.tensor([False]))
        model.reset_hidden()
    return [output[0] for output in outputs]


def streamed(model, pieces):
    """The outputs of each push and, last, of close."""
    live = StreamingModel(model)
    return [*map(live.push, pieces), live.close()]


def concatenated(outputs):
    return [torch.cat(parts) for parts in zip(*outputs, strict=True)]


def audio_of(n_samples):
    return torch.rand(n_samples, generator=torch.Generator().manual_seed(1)) - 0.5


MODELS = {
    "LSTM": lambda: make_model("--nLevelsGRU 2"),
    "batch norm, sequential": lambda: make_model(
        "--arMode GRU --normMode batchNorm --samplingType sequential"
    ),
    "no_ar": lambda: make_model("--arMode no_ar --hiddenGar 8 --normMode ID"),
    "concatenated": lambda: ConcatenatedModel([make_model(), make_model("--arMode RNN")]),
    "null space": lambda: CPCModelNullspace(make_model("--hiddenGar 8"), torch.eye(8)[:, :5]),
}


@pytest.mark.parametrize("size", [1, 159, 160, 161, 7919])
@pytest.mark.parametrize("kind", MODELS)
def test_frames_are_those_of_the_whole_and_come_when_complete(kind, size):
    model, audio = MODELS[kind](), audio_of(2 * 7919 + 151 if size > 1 else 1279)
    pieces = audio.split(size)
    outputs = streamed(model, pieces)
    for features, expected in zip(concatenated(outputs), whole(model, audio), strict=True):
        assert features.shape == (len(audio) // 160, expected.size(1))
        assert_close(features, expected)
    n_pushed = torch.tensor([0, *map(len, pieces)]).cumsum(0)
    complete = ((n_pushed - 152) // 160).clamp(min=0).diff().tolist()
    assert [len(contexts) for contexts, _ in outputs[:-1]] == complete


@pytest.mark.parametrize("n_samples", [0, 1, 159, 160, 311, 312, 320, 471, 472, 480])
def test_short_audio_has_the_frames_of_a_file(n_samples):
    model, audio = make_model(), audio_of(n_samples)
    contexts, encoded = concatenated(streamed(model, [audio]))
    assert contexts.shape == (n_samples // 160, 6)
    assert encoded.shape == (n_samples // 160, 8)
    if n_samples >= 160:
        assert_close(contexts, whole(model, audio)[0])


def test_frames_depend_on_the_samples_that_the_docstring_names():
    audio = torch.rand(1600, requires_grad=True)
    _, encoded = make_model("--normMode ID")(audio[None, None])
    encoded[0, 4].sum().backward()
    used = audio.grad.nonzero().flatten()
    assert (used.min(), used.max()) == (160 * 4 - 153, 160 * 4 + 311)


def test_streams_are_independent_and_leave_the_model_as_it_was():
    model, (one, other) = make_model("--samplingType sequential"), audio_of(6400).split(3200)
    model.train()
    model(torch.rand(2, 1, 800))
    kept = [state.clone() for state in model.hidden_state()]
    streams, outputs = [StreamingModel(model), StreamingModel(model)], [[], []]
    for pieces in zip(one.split(500), other.split(500), strict=True):
        for live, results, piece in zip(streams, outputs, pieces, strict=True):
            results.append(live.push(piece.numpy()))
    assert model.training
    assert all(map(torch.equal, model.hidden_state(), kept))
    for live, results, audio in zip(streams, outputs, (one, other), strict=True):
        contexts, _ = concatenated([*results, live.close()])
        assert_close(contexts, whole(model, audio)[0])


def test_memory_does_not_grow_with_the_audio(monkeypatch):
    monkeypatch.setattr(streaming, "FRAMES_PER_PART", 7)
    lengths, model = [], make_model()
    model.gEncoder.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].size(2)))
    live = StreamingModel(model)
    for piece in audio_of(40_000).split(8000):
        live.push(piece)
        assert len(live.parts.audio) < 160 + 160 + 312
    assert max(lengths) == 160 * (1 + 7) + 152


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--normMode instanceNorm", "instance norm normalises over the whole file"),
        ("--encoder_type lfb", "lfb normalises over the whole file"),
        ("--encoder_type mfcc", "mfcc needs the maximum of the whole file"),
        ("--arMode transformer --hiddenGar 8", "transformer"),
        ("--cpc_mode reverse", "run backwards"),
    ],
)
def test_models_that_cannot_be_streamed_are_refused(words, reason):
    with pytest.raises(UserError, match=reason):
        StreamingModel(ConcatenatedModel([make_model(), make_model(words)]))


@pytest.mark.parametrize(
    ("audio", "error", "reason"),
    [
        (torch.tensor([0.0, torch.nan]), UserError, "NaN"),
        (torch.zeros(1, 160), ValueError, r"\(1, 160\), not \(samples,\)"),
        (torch.zeros(160, dtype=torch.int16), ValueError, "int16.*divide"),
    ],
)
def test_bad_audio_ends_a_stream(audio, error, reason):
    live = StreamingModel(make_model())
    with pytest.raises(error, match=reason):
        live.push(audio)
    for call in (lambda: live.push(torch.zeros(160)), live.close):
        with pytest.raises(ValueError, match="has ended"):
            call()


# --------------------------------------------------------------------------------- eval/stream.py


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    args, model = flags(), make_model()
    state = {"gEncoder": model.state_dict(), "cpcCriterion": {}, "optimizer": {}, "best": None}
    state |= {"args": vars(args), "logs": {}, "position": [1, 0, 0]}
    return save_checkpoint(tmp_path_factory.mktemp("run"), state, 0), model


def test_command_writes_frames_before_the_audio_ends_and_outlives_its_reader(checkpoint):
    path, model = checkpoint
    audio = (audio_of(1000) * 2**15).short()
    command = [sys.executable, ROOT / "eval" / "stream.py", path, "--device", "cpu"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as process:
        process.stdin.write(audio[:313].numpy().tobytes()[:-1])  # 312.5 samples
        process.stdin.flush()
        first = process.stdout.read(4 * 6)
        process.stdin.write(audio.numpy().tobytes()[2 * 313 - 1 : 2 * 600])
        process.stdin.flush()
        second = process.stdout.read(4 * 6)
        process.stdout.close()
        process.stdin.write(audio[600:].numpy().tobytes())
        process.stdin.close()
        assert process.stderr.read() == b"6 values per frame of 10 ms\n"
        assert process.wait() == 128 + 13
    features = np.frombuffer(first + second, "<f4").reshape(2, 6)
    assert_close(torch.tensor(features), whole(model, audio.float() / 2**15)[0][:2])


def run_in_process(monkeypatch, content, *argv):
    """The exit status of the command with these bytes on standard input."""
    stdin = types.SimpleNamespace(
        buffer=io.BufferedReader(io.BytesIO(content)), isatty=lambda: False
    )
    monkeypatch.setattr(sys, "stdin", stdin)
    try:
        stream.main([*map(str, argv), "--device", "cpu"])
    except SystemExit as end:
        return end.code
    return 0


def test_command_reads_floats_and_writes_text(checkpoint, monkeypatch, capsysbinary):
    (path, model), audio = checkpoint, audio_of(700)
    argv = (path, "--float32", "--text", "--get_encoded")
    assert run_in_process(monkeypatch, audio.numpy().tobytes() + b"\0", *argv) == 0
    output, messages = capsysbinary.readouterr()
    rows = [list(map(float, line.split())) for line in output.splitlines()]
    assert_close(torch.tensor(rows), whole(model, audio)[1])
    assert b"warning: 1 byte at the end" in messages


@pytest.mark.parametrize(
    ("content", "words", "reason"),
    [
        (np.array([np.nan], "<f4").tobytes(), ["--float32"], b"the audio contains NaN"),
        (b"", ["--seq_norm"], b"--seq_norm: the means"),
    ],
)
def test_command_refuses_in_one_line(checkpoint, monkeypatch, capsysbinary, content, words, reason):
    assert run_in_process(monkeypatch, content, checkpoint[0], *words) == 2
    assert capsysbinary.readouterr().err.splitlines()[-1].startswith(b"error: " + reason)
