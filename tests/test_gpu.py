"""Tests on a GPU, skipped where there is none. test_cuda.py imitates some of it."""

import functools
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import train
import transformers
from benchmarks import criteria, train_step
from benchmarks.data import SECONDS, timed, write_corpus
from criterion import sampling
from criterion.networks import Networks
from criterion.prediction import PredictionNetwork
from criterion.seq_alignment import beam_search_batch
from dataset import Batch
from eval import hooks as epoch_hooks
from tests.helpers import ROOT, assert_close
from tests.test_distributed import (
    asked_to_stop,
    hooks,
    interrupted,
    stopped_by_torchrun,
    tiny_batch,
    tiny_step,
    torchrun,
    words_of,
)
from tests.test_fused_scores import (
    SIZES,
    assert_exact,
    fused_errors,
    needs_triton,
    random_inputs,
    relative_errors,
)
from tests.test_train import (
    EXAMPLE,
    SMALL,
    assert_same,
    capture_flags,
    captured,
    checkpoint,
    on,
    run,
    trained,
)
from utils.data.batches import on_device
from utils.misc import SAMPLE_RATE
from utils.run.cuda_graph import WARM_UP, RecordedPasses
from utils.run.distributed import World
from utils.run.launch import launch
from utils.run.machine import set_precision
from utils.run.stopping import StopSignals

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
GPU = ["--device", "cuda", "--nGPU", "1"]
WIDE = ["--hiddenEncoder", "64", "--hiddenGar", "64"]  # enough for dedicated attention kernels


@pytest.fixture(autouse=True)
def _exact_products():
    """Whatever a run before this test asked for, or PyTorch thinks good enough."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def replays(monkeypatch):
    """The batches of which a recorded graph was replayed."""
    batches, replay = [], RecordedPasses.replay

    def noted(self, batch):
        batches.append(batch)
        return replay(self, batch)

    monkeypatch.setattr(RecordedPasses, "replay", noted)
    return batches


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-3), ("tf32", 5e-3), ("bf16", 0.03)]
)
@pytest.mark.parametrize("words", [[], EXAMPLE, ["--rnnMode", "transformer"]])
def test_a_gpu_computes_what_the_cpu_does(words, precision, tolerance, tiny_corpus, tmp_path):
    """On the weights at the start and the same negatives, those of validation."""
    words = [*words, "--learningRate", "0"]
    on_cpu = trained(tiny_corpus, tmp_path / "cpu", *words, "--device", "cpu", epochs=1)
    words += [*GPU, "--precision", precision]
    on_gpu = trained(tiny_corpus, tmp_path / "gpu", *words, epochs=1)
    for key in ("locLoss_val", "locAcc_val"):
        expected = pytest.approx(sum(on_cpu["logs"][key][0]), rel=tolerance, abs=tolerance)
        assert sum(on_gpu["logs"][key][0]) == expected


@pytest.mark.parametrize(
    "words",
    [
        ["--arMode", "GRU"],
        ["--arMode", "RNN", "--nLevelsGRU", "2"],
        ["--arMode", "no_ar"],
        ["--arMode", "transformer", *WIDE],
        ["--arMode", "transformer", "--abspos", *WIDE],
        ["--rnnMode", "transformer", *WIDE],
        ["--rnnMode", "LSTM"],
        ["--rnnMode", "ffd"],
        ["--rnnMode", "conv4", "--cpc_mode", "reverse"],
        ["--rnnMode", "none", "--nPredicts", "1", "--linearOutput", "--normalizeCPCScore"],
        ["--rnnMode", "transformer", "--multihead_rnn", "--scoreTemperature", "0.5", *WIDE],
        ["--encoder_type", "lfb"],
        ["--encoder_type", "mfcc"],
        ["--normMode", "batchNorm"],
        ["--normMode", "instanceNorm"],
        ["--normMode", "ID", "--speakerEmbedding", "4", "--limitNegsInBatch", "2"],
        ["--cpc_mode", "none"],
        ["--augment_past", "--augment_type", "pitch", "additive", "reverb"],
        [*EXAMPLE, "--CPCCTCLearnBlank", "--CPCCTCNormalizeEncs", "--CPCCTCNormalizePreds"],
        [*EXAMPLE, "--CPCCTCMasq", "0:2:1:2", "--CPCCTCNoNegsMatchWin", "--CPCCTCLossTemp", "2"],
        ["--supervised"],
        ["--supervised", "--path_phone_data", "PHONES"],
        ["--supervised", "--CTC", "--path_phone_data", "PHONES"],
    ],
    ids=" ".join,
)
def test_any_network_on_a_gpu(words, tiny_corpus, tmp_path, monkeypatch, capsys, replays):
    """As on the CPU, in either precision, and recorded. Compiling takes long: not here."""
    words = [tiny_corpus / "phones.txt" if word == "PHONES" else word for word in words]
    words += ["--learningRate", "0"]
    on_cpu = trained(tiny_corpus, tmp_path / "cpu", *words, "--device", "cpu", epochs=1)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)
    for precision, tolerance in (("fp32", 1e-3), ("bf16", 0.05)):
        words_on_gpu = [*words, *GPU, "--precision", precision, "--compile"]
        replays.clear()
        on_gpu = trained(tiny_corpus, tmp_path / precision, *words_on_gpu, epochs=1)
        assert "can't be recorded" not in capsys.readouterr().out
        assert bool(replays) == ("--supervised" not in words)
        expected = pytest.approx(sum(on_cpu["logs"]["locLoss_val"][0]), rel=tolerance)
        assert sum(on_gpu["logs"]["locLoss_val"][0]) == expected, precision


@pytest.mark.parametrize("words", [[], ["--compile"], ["--samplingType", "sequential"]])
def test_a_gpu_resumes_where_it_stopped(words, tiny_corpus, tmp_path):
    whole = trained(tiny_corpus, tmp_path / "whole", *GPU, *words, epochs=2)
    trained(tiny_corpus, tmp_path / "parts", *GPU, *words, epochs=1)
    parts = trained(tiny_corpus, tmp_path / "parts", *GPU, *words, epochs=2)
    for key in ("locLoss_train", "locLoss_val"):
        assert sum(parts["logs"][key][1]) == pytest.approx(sum(whole["logs"][key][1]), rel=1e-3)


@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_resumes_on_another_device(devices, tiny_corpus, tmp_path):
    words = ["--nGPU", "1", "--samplingType", "sequential"]  # which keeps hidden states
    whole = trained(tiny_corpus, tmp_path / "whole", *words, "--device", "cpu")
    for epochs, device in enumerate(devices, start=1):
        words_here = [*words, "--device", device]
        parts = trained(tiny_corpus, tmp_path / "parts", *words_here, epochs=epochs)
    for key in ("locLoss_train", "locLoss_val"):
        assert sum(parts["logs"][key][1]) == pytest.approx(sum(whole["logs"][key][1]), rel=0.01)


@pytest.mark.parametrize("words", [[], ["--compile"]])
def test_a_gpu_stops_at_a_loss_that_is_not_finite(words, tiny_corpus, tmp_path, capsys):
    """And leaves the weights as they were, although it checks the loss steps later."""
    trained(tiny_corpus, tmp_path, *GPU, epochs=1)
    before = checkpoint(tmp_path, 0)
    words = [*GPU, *words, "--pathCheckpoint", tmp_path, "--nEpoch", 2, "--learningRate", "1e30"]
    assert run(*words) == 2
    assert "the loss or its gradient isn't a finite number" in capsys.readouterr().err
    assert_same(before, checkpoint(tmp_path, 0), without=())


def test_a_gpu_out_of_memory_is_reported_in_one_line(tiny_corpus, tmp_path, capsys):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        words = ["--pathCheckpoint", tmp_path, "--hiddenEncoder", 512, "--hiddenGar", 512]
        assert run(*on(tiny_corpus), *SMALL, *GPU, *words) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    error = capsys.readouterr().err
    assert error.startswith("error: CUDA out of memory.")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("n_frames", [116, 128])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.03)])
@pytest.mark.parametrize("training", [True, False])
def test_attention_on_a_gpu(n_frames, precision, tolerance, training, monkeypatch):
    """Values and gradients as on the CPU in double precision, by the kernel that is meant."""
    monkeypatch.setattr(transformers, "DROPOUT", 0.0)
    set_precision(precision)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    shapes = [(6, 8, n_frames, 32)] * 3 + [(32, 128)]
    inputs = [torch.randn(shape).to(kind).double() for shape in shapes]
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", kind)):
        leaves = [x.to(device, dtype).requires_grad_(training) for x in inputs]
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.set_grad_enabled(training), torch.profiler.profile(activities=activities) as log:
            attended = transformers.attend(*leaves, training)
        gradients = torch.autograd.grad(attended.sin().sum(), leaves) if training else ()
        results.append([attended, *gradients])
    for found, expected in zip(*reversed(results), strict=True):
        assert_close(found, expected.detach(), tolerance)
    operations = {event.key for event in log.key_averages()}
    assert "aten::_scaled_dot_product_efficient_attention" in operations


@pytest.mark.parametrize(
    "words",
    [
        ["--nLevelsGRU", "2"],
        ["--arMode", "GRU", "--nLevelsGRU", "2"],
        ["--rnnMode", "transformer", "--dropout"],
        ["--precision", "bf16"],
        ["--samplingType", "samespeaker", *EXAMPLE],  # with smaller batches between
    ],
    ids=" ".join,
)
def test_each_recorded_step_has_the_gradients_of_an_eager_one(
    words, tiny_corpus, tmp_path, monkeypatch, replays
):
    """And leads to the same weights, with a validation between; nothing is compiled here."""
    step = train.train_step

    def noted(state, forward_backward, position, batch):
        def and_kept(batch):
            results = forward_backward(batch)
            found.append(torch.cat([p.grad.flatten() for p in state.networks.parameters()]).cpu())
            return results

        step(state, and_kept, position, batch)

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)
    monkeypatch.setattr(train, "train_step", noted)
    runs, tolerance = [], 0.05 if "bf16" in words else 1e-3
    for can_be_recorded in (train.can_be_recorded, lambda *_: False):
        found = []
        monkeypatch.setattr(train, "can_be_recorded", can_be_recorded)
        end = trained(tiny_corpus, tmp_path / str(len(runs)), *GPU, *words, "--compile", epochs=3)
        runs.append([*found, *end["gEncoder"].values()])
    assert len(found) > 20
    assert len(replays) > 10
    for i, (recorded, eager) in enumerate(zip(*runs, strict=True)):
        if eager.is_floating_point() and eager.isfinite().all():
            assert_close(recorded, eager.cpu(), tolerance, f"step {i}")


def test_an_epoch_after_a_failed_recording_and_a_lack_of_memory(
    tiny_corpus, tmp_path, monkeypatch, capsys, replays
):
    forward = Networks.forward

    def waiting(self, *inputs):
        results = forward(self, *inputs)
        results[0].sum().item()  # waits for the device, which can't be recorded
        return results

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)
    with monkeypatch.context() as patch:
        patch.setattr(Networks, "forward", waiting)
        trained(tiny_corpus, tmp_path, *GPU, "--compile", epochs=1)
    assert "can't be recorded" in capsys.readouterr().out
    assert not replays
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**50, device="cuda")
    torch.cuda.empty_cache()
    trained(tiny_corpus, tmp_path, *GPU, "--compile", epochs=2)
    assert replays


@pytest.mark.parametrize("compiled", [[], ["--compile"]])
def test_the_budget_of_a_step(compiled, tiny_corpus, tmp_path, monkeypatch):
    """Once it is running: no memory from the driver, no waiting, no copy from pageable memory."""
    steps, reserved, step, finish = [], [], train.train_step, train.finish_epoch
    profile = torch.profiler.profile()

    def noted(*item):
        steps.append(item)
        if len(steps) == 40:
            profile.start()
        step(*item)
        if len(steps) == 45:
            profile.stop()

    def finished(*args, **options):
        finish(*args, **options)
        reserved.append(torch.cuda.memory_reserved())

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)
    monkeypatch.setattr(train, "train_step", noted)
    monkeypatch.setattr(train, "finish_epoch", finished)
    words = [*GPU, *compiled, "--samplingType", "uniform", "--logging_step", "10000"]
    trained(tiny_corpus, tmp_path, *words, "--save_step", 100, epochs=41)
    assert reserved[40] == reserved[3]
    counts = {event.key: event.count for event in profile.key_averages()}
    unwanted = ("cudaMalloc", "cudaHostAlloc", "StreamSynchronize", "EventSynchronize", "Pageable")
    assert not [key for key in counts if any(word in key for word in unwanted)]
    launches = sum(count for key, count in counts.items() if "cudaLaunchKernel" in key)
    assert launches < 6 * (100 if compiled else 1000)


@pytest.mark.parametrize("words", [[], EXAMPLE, ["--rnnMode", "transformer", "--dropout"]])
def test_recorded_steps_train_alike(words, tiny_corpus, tmp_path, capsys, monkeypatch, replays):
    """As compiled ones that are launched kernel by kernel, draws and all."""
    words = [*GPU, *words, "--compile"]
    replayed = trained(tiny_corpus, tmp_path / "replayed", *words)
    assert "can't be recorded" not in capsys.readouterr().out
    assert len(replays) > 3
    monkeypatch.setattr(train, "can_be_recorded", lambda *_: False)
    plain = trained(tiny_corpus, tmp_path / "plain", *words)
    for key in ("locLoss_train", "locLoss_val", "gradNorm_train"):
        for expected, found in zip(plain["logs"][key], replayed["logs"][key], strict=True):
            assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("words", [[], EXAMPLE])
def test_compiled_steps_train_alike(words, tiny_corpus, tmp_path):
    """As others where nothing is dropped: compiled code draws other numbers for that."""
    words = [*GPU, *words, "--rnnMode", "linear"]
    plain = trained(tiny_corpus, tmp_path / "plain", *words)
    compiled = trained(tiny_corpus, tmp_path / "compiled", *words, "--compile")
    for key in ("locLoss_train", "locLoss_val", "gradNorm_train"):
        for expected, found in zip(plain["logs"][key], compiled["logs"][key], strict=True):
            assert found == pytest.approx(expected, rel=1e-3)


def test_a_recording_that_fails_leaves_a_usable_device(capsys):
    """Draws and streams are as if it had not been tried."""

    def passes(batch):
        drawn = torch.rand(3, device="cuda")
        drawn.sum().item()  # waits for the device
        return (drawn,)

    recorded = RecordedPasses(passes, [], 1)
    batch = Batch(*[torch.zeros(1, device="cuda")] * 5)
    before = torch.cuda.current_stream()
    found = []
    for _ in range(WARM_UP + 2):
        torch.manual_seed(5)
        found.append(recorded(batch)[0])
    assert "can't be recorded" in capsys.readouterr().out
    assert torch.cuda.current_stream() == before
    assert all(torch.equal(drawn, found[0]) for drawn in found)


@pytest.mark.parametrize(
    "words",
    [
        EXAMPLE,
        ["--rnnMode", "LSTM", "--arMode", "GRU"],
        ["--rnnMode", "transformer", "--hiddenEncoder", "64", "--hiddenGar", "64"],
    ],
)
def test_gradients_of_bf16_point_where_those_of_fp32_do(words, tiny_corpus, tmp_path, monkeypatch):
    """None vanishes, and what a step makes of them is alike: those of the first step."""
    found, step = {}, train.train_step

    def noted(state, forward_backward, position, batch):
        def and_kept(batch):
            results = forward_backward(batch)
            gradients = [p.grad.flatten() for p in state.networks.parameters()]
            found.setdefault(state.args.precision, torch.cat(gradients).clone())
            return results

        step(state, and_kept, position, batch)

    monkeypatch.setattr(train, "train_step", noted)
    monkeypatch.setattr(transformers, "DROPOUT", 0.0)
    for precision in ("fp32", "bf16"):
        directory = tmp_path / precision
        trained(tiny_corpus, directory, *GPU, *words, "--precision", precision, epochs=1)
    assert torch.cosine_similarity(found["fp32"], found["bf16"], dim=0) > 0.98


@pytest.mark.parametrize("rnn_mode", ["transformer", "linear", "ffd", "conv4", "RNN", "LSTM"])
def test_heads_on_a_gpu(rnn_mode, monkeypatch):
    """All in one go, with the values and gradients of one by one on the CPU.

    In training, since cuDNN has no gradients of recurrent networks otherwise.
    """
    monkeypatch.setattr(transformers, "DROPOUT", 0.0)
    network = PredictionNetwork(3, 64, 64, 30, rnn_mode=rnn_mode)
    context = torch.randn(4, 30, 64)
    results = {}
    for device in ("cpu", "cuda"):
        given = context.to(device).requires_grad_()
        leaves = given, *network.to(device).parameters()
        predictions = network(given)
        results[device] = predictions, *torch.autograd.grad(predictions.sin().sum(), leaves)
    for on_gpu, on_cpu in zip(results["cuda"], results["cpu"], strict=True):
        assert_close(on_gpu, on_cpu.detach(), 1e-3, rnn_mode)


def test_batches_are_whole_when_they_are_used():
    """Their memory is used again and again, while the device has much to do."""
    numbers = [torch.full((64,), i) for i in range(50)]
    waves = [torch.full((64, 1, 20480), i, dtype=torch.int16) for i in range(50)]
    batches = [
        (i, Batch(waves[i], numbers[i], None, numbers[i], numbers[i] > 0)) for i in range(50)
    ]
    matrix, found = torch.randn(4096, 4096, device="cuda"), []
    for i, batch in on_device(batches, torch.device("cuda")):
        assert (matrix @ matrix).shape == matrix.shape
        assert i == len(found)
        found.append(torch.stack([f(batch.waveform * 32768) for f in (torch.amin, torch.amax)]))
        del batch
    assert torch.stack(found).tolist() == [[i, i] for i in range(50)]


@pytest.mark.parametrize("words", [[], EXAMPLE])
def test_captures_of_a_gpu(words, tiny_corpus, tmp_path):
    """Of the model of a checkpoint, those of the CPU but for roundings."""
    trained(tiny_corpus, tmp_path / "run", *words, "--device", "cpu", epochs=1)
    found = {}
    for device in ("cpu", "cuda"):
        flags = capture_flags(tiny_corpus, tmp_path / device)
        flags += ["--pathDB", tiny_corpus / "audio", "--device", device, "--nGPU", 1]
        assert run("--onlyCapture", "--pathCheckpoint", tmp_path / "run", *flags) == 0
        found[device] = captured(tmp_path / device)
    assert found["cpu"].keys() == found["cuda"].keys()
    for path, expected in found["cpu"].items():
        if expected.is_floating_point():
            assert_close(found["cuda"][path], expected, 1e-3, str(path))
        else:
            assert (found["cuda"][path] == expected).float().mean() > 0.99, path


def test_captures_stats_and_probes_of_a_run(tiny_corpus, tmp_path):
    words = [*GPU, *EXAMPLE, "--compile", *hooks(tiny_corpus, tmp_path)]
    trained(tiny_corpus, tmp_path / "run", *words)
    logs = json.loads((tmp_path / "run" / "checkpoint_logs.json").read_text())
    for task in ("phone", "speaker"):
        assert 0 <= logs[f"{task}_best_val_acc"][1][0] <= 1


def test_a_beam_search_on_a_gpu():
    probabilities = (3 * torch.randn(4, 12, 6, dtype=torch.float64)).softmax(2)
    expected, symbols = beam_search_batch(probabilities, 2, 7)
    found, symbols_on_gpu = beam_search_batch(probabilities.cuda(), 2, 7)
    assert_close(found, expected, 1e-9)
    assert torch.equal(symbols_on_gpu.cpu(), symbols)


def test_a_process_of_an_nccl_group(monkeypatch):
    """Of a group of one, since no two can share a GPU: its gradients are those without a group."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        world = World(stop=StopSignals(), group=dist.new_group(backend="gloo"))
        step, batch = tiny_step(EXAMPLE).cuda(), tiny_batch(0).to("cuda")
        found = []
        for network in (step, world.wrap(step)):
            torch.manual_seed(0)
            step.zero_grad()
            network(batch)[0].sum().backward()
            found.append([parameter.grad.clone() for parameter in step.parameters()])
        for expected, gradient in zip(*found, strict=True):
            assert_close(gradient, expected.cpu(), 1e-3)
        world.copy_buffers(torch.nn.BatchNorm1d(2).cuda())
        assert world.on_rank_zero(lambda: world.all_gather("here")) == ["here"]
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize("words", [[], ["--compile"]])
def test_two_gpus_train_as_two_processes_on_the_cpu(words, tiny_corpus, tmp_path):
    words = ["--nGPU", "2", *words]
    on_cpu = trained(tiny_corpus, tmp_path / "cpu", "--device", "cpu", "--nGPU", "2")
    on_gpus = trained(tiny_corpus, tmp_path / "gpus", *words, "--device", "cuda")
    for expected, found in zip(*(r["logs"]["locLoss_val"] for r in (on_cpu, on_gpus)), strict=True):
        assert found == pytest.approx(expected, rel=0.01)


def with_equal_weights(words):
    """`train.main`, where all ranks have the same weights after each epoch, bit for bit."""
    finish = train.finish_epoch

    def checked(state, *args, **options):
        weights = [p.detach().cpu().numpy().tobytes() for p in state.networks.parameters()]
        digest = hashlib.blake2b(b"".join(weights)).hexdigest()
        state.world.check_same(digest, "the ranks' weights differ")
        finish(state, *args, **options)

    train.finish_epoch = checked
    return train.main(words)


def usr1(words):
    return interrupted(words, lambda: os.kill(os.getpid(), signal.SIGUSR1))


def without_memory(words):
    """`train.main` of which process 1 has no memory left in its third step."""
    return interrupted(words, lambda: torch.empty(2**50, device="cuda"))


def with_a_long_probe(words):
    """`train.main` with a probe that takes twice as long as NCCL would wait for another process."""
    join, run_probe, limit = dist.init_process_group, epoch_hooks.run_probe, 10

    def run_long(*args, **options):
        end = time.monotonic() + 2 * limit
        while True:
            result = run_probe(*args, **options)
            if time.monotonic() > end:
                return result

    dist.init_process_group = functools.partial(join, timeout=timedelta(seconds=limit))
    epoch_hooks.run_probe = run_long
    return train.main(words)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")


@two_gpus
@pytest.mark.parametrize(("stop", "status"), [(asked_to_stop, 143), (usr1, 138)])
def test_two_gpus_keep_equal_weights_stop_and_resume(stop, status, tiny_corpus, tmp_path):
    words = words_of(tiny_corpus, tmp_path, *EXAMPLE, "--device", "cuda", "--nGPU", "2")
    assert launch(2, stop, words) == status
    assert launch(2, with_equal_weights, words) == 0
    assert len(checkpoint(tmp_path, 1)["logs"]["epoch"]) == 2


def launched(main, words):
    """The command that runs `main(words)` in two processes, by `launch`."""
    program = "import sys; from utils.run.launch import launch; "
    program += f"from {main.__module__} import {main.__name__} as main; "
    program += "sys.exit(launch(2, main, sys.argv[1:]))"
    return [sys.executable, "-c", program, *words]


@two_gpus
@pytest.mark.parametrize(("command", "status"), [(launched, 2), (torchrun, 1)])
def test_a_lack_of_memory_on_one_of_two_gpus_ends_both(command, status, tiny_corpus, tmp_path):
    """Within a minute of the message: the pipe is open until the last process ends."""
    words = command(without_memory, words_of(tiny_corpus, tmp_path, "--device", "cuda"))
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert any("CUDA out of memory" in line for line in process.stderr)
        process.communicate(timeout=60)
        assert process.returncode == status
    finally:
        process.terminate()


@two_gpus
def test_a_probe_may_last_longer_than_nccl_waits(tiny_corpus, tmp_path):
    words = ["--device", "cuda", "--nGPU", 2, "--nEpoch", 4, "--linsep_logs_dir", tmp_path / "logs"]
    words += ["--supervised_classif_metric", "--speaker_sep", "--linsep_classif_each_epochs", 2]
    words = words_of(tiny_corpus, tmp_path, *words, "--linsep_n_epoch", 1)
    assert launch(2, with_a_long_probe, words) == 0
    assert (tmp_path / "logs" / "2" / "speaker" / "logs.json").is_file()
    assert len(checkpoint(tmp_path, 3)["logs"]["epoch"]) == 4


def by_torchrun(main, words):
    """The exit status of `torchrun`."""
    return subprocess.run(torchrun(main, words), cwd=ROOT, timeout=300).returncode


@two_gpus
def test_torchrun_starts_two_gpus(tiny_corpus, tmp_path):
    """As the own launcher does; an error ends them, too."""
    own, words = (words_of(tiny_corpus, tmp_path / p, "--device", "cuda") for p in ("own", "run"))
    assert launch(2, train.main, own) == 0
    assert by_torchrun(train.main, words) == 0
    expected, found = (checkpoint(tmp_path / place, 1)["gEncoder"] for place in ("own", "run"))
    for name, weight in expected.items():
        assert_close(found[name].float(), weight.float().cpu(), 1e-3, name)
    assert by_torchrun(train.main, [*words, "--nEpoch", "3", "--learningRate", "1e30"]) == 1


@two_gpus
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_two_gpus_of_torchrun_stop_and_resume(number, tiny_corpus, tmp_path):
    """And end, with equal weights on both, like a run that never stopped."""
    whole, parts = (
        words_of(tiny_corpus, tmp_path / place, *EXAMPLE, "--device", "cuda")
        for place in ("whole", "parts")
    )
    assert by_torchrun(train.main, whole) == 0
    assert by_torchrun(stopped_by_torchrun, [str(int(number)), *parts]) == 1
    assert (tmp_path / "parts" / "checkpoint_resume.pt").exists()
    assert by_torchrun(with_equal_weights, parts) == 0
    expected, found = (checkpoint(tmp_path / place, 1)["logs"] for place in ("whole", "parts"))
    for key in ("locLoss_train", "locLoss_val"):
        for losses, losses_of_whole in zip(found[key], expected[key], strict=True):
            assert losses == pytest.approx(losses_of_whole, rel=1e-3)


def test_the_loop_with_packs_is_nearly_as_fast_as_its_steps(tmp_path, monkeypatch):
    """An epoch has 90 % of the windows per second of as many steps on its last batch."""
    n_files, ratios, last = 400, [], []
    write_corpus(tmp_path / "audio", n_files)
    train_one_epoch, step = train.train_one_epoch, train.train_step

    def noted(*item):
        last[:] = item
        step(*item)

    def steps_alone(state, n_steps):
        for _ in range(n_steps):
            step(*last)
        state.check_finite()  # waits for the device, as the loop does at its end

    def in_turns(state, *rest):
        values, whole = timed(train_one_epoch, state, *rest)
        _, alone = timed(steps_alone, state, state.epoch_means.batches)
        ratios.append(alone / whole)
        return values

    monkeypatch.setattr(train, "train_step", noted)
    monkeypatch.setattr(train, "train_one_epoch", in_turns)
    size = n_files * SECONDS * SAMPLE_RATE // 5
    words = [*GPU, *EXAMPLE, "--samplingType", "uniform", "--max_size_loaded", size, "--nEpoch", 4]
    assert run("--pathDB", tmp_path / "audio", "--pathCheckpoint", tmp_path / "run", *words) == 0
    position = last[2]
    assert position.pack >= 3
    assert statistics.median(ratios[1:]) >= 0.9, ratios  # the first epoch warms up


@pytest.mark.parametrize("words", [[], ["--compile", "--precision", "bf16"]])
def test_steps_are_measured(words, capsys):
    words = ["--configurations", "demo", "--steps", "1", "--device", "cuda", *words]
    train_step.main(words)
    assert "peak memory" in capsys.readouterr().out


def test_criteria_are_compared_and_measured(capsys):
    criteria.main(["--device", "cuda", "--batch", "2", "--repeat", "1"])
    assert "scores" in capsys.readouterr().out


def test_a_step_waits_for_the_device_only_to_log(tiny_corpus, tmp_path, monkeypatch):
    step = train.train_step

    def without_waiting(*item):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(*item)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(train, "train_step", without_waiting)
    trained(tiny_corpus, tmp_path, *GPU, *EXAMPLE, "--logging_step", "1000")


@needs_triton
@pytest.mark.parametrize("sizes", [*SIZES, (2000, 12, 12, 128, 256)], ids=str)
def test_fused_scores_on_a_gpu(sizes):
    assert_exact(fused_errors("cuda", sizes, n_frames=500))


@needs_triton
def test_fused_scores_of_large_scores():
    """Those of a few hundred are exact to a few 1e-5, so their exponentials are, relatively."""
    errors = fused_errors("cuda", (3, 5, 3, 40, 20), scale=500)
    assert all(error <= 2e-4 for error in errors.values()), errors


@needs_triton
def test_scores_are_fused_on_request(monkeypatch):
    pool, predictions, candidates, _ = random_inputs(3, 2, 2, 5, 16)
    inputs = pool.cuda(), predictions.cuda(), candidates.cuda(), 2
    plain = sampling.score_candidates(*inputs)
    monkeypatch.setattr(sampling, "_ChunkedScores", None)
    fused = sampling.score_candidates(*inputs, fused=True)
    for actual, expected in zip(fused, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(AttributeError):  # the plain twin, which is gone, does float64
        sampling.score_candidates(*(x.double() for x in inputs[:2]), *inputs[2:], fused=True)


@needs_triton
def test_fused_scores_in_a_cuda_graph():
    """Captured with some inputs and replayed with others, it computes what it does outside."""
    from criterion.fused_scores import FusedScores

    pool, predictions, candidates, n_positives = random_inputs(9, 3, 2, 30, 64)
    inputs = [pool.cuda(), predictions.cuda(), candidates.cuda()]

    def step():
        leaves = [leaf.detach().requires_grad_() for leaf in inputs[:2]]
        scores = FusedScores.apply(*leaves, inputs[2], n_positives)
        total = scores[0].sum() + scores[1].sum()
        return *(values.detach() for values in scores), *torch.autograd.grad(total, leaves)

    side = torch.cuda.Stream()  # a graph is captured after a step on another stream
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for values in inputs[:2]:
        values.copy_(torch.randn_like(values))
    inputs[2].copy_(inputs[2].flip(0))
    graph.replay()
    expected = [values.cpu().double() for values in step()]
    assert_exact(relative_errors([values.cpu().double() for values in captured], expected))
