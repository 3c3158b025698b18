"""Tests, without a GPU, of what only a GPU does: stand-ins take the place of CUDA.

test_gpu.py tests the same things on a GPU.
"""

import contextlib
import importlib.util
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from dataset import Batch
from tests.helpers import ends_refused
from tests.test_distributed import hooks
from tests.test_train import EXAMPLE, SMALL, assert_same, on, run, trained
from utils.data.batches import _copying_stream, on_device
from utils.misc import UserError
from utils.run.command import command
from utils.run.cuda_graph import RecordedPasses, can_be_recorded
from utils.run.flags import build_parser
from utils.run.logs import Clock
from utils.run.machine import available_memory, set_precision
from utils.run.rules import check_compilers


class Recording(TorchDispatchMode):
    """A CUDA graph for the CPU: records operations, and replays them on the same memory.

    It has to execute them while it records them, and undoes their effects afterwards.
    """

    def __enter__(self):
        self.operations, self.replays, self.changed = [], 0, []
        self.random_state = torch.get_rng_state()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for place, argument in enumerate(function._schema.arguments):
            tensor = args[place] if place < len(args) else kwargs.get(argument.name)
            written = argument.alias_info and argument.alias_info.is_write
            if torch.is_tensor(tensor) and (written or argument.name.startswith("running_")):
                self.changed.append((tensor, tensor.clone()))
        result = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, result))
        return result

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for tensor, before in reversed(self.changed):
            tensor.detach().copy_(before)
        torch.set_rng_state(self.random_state)

    def replay(self):
        self.replays += 1
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, result in self.operations:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if torch.is_tensor(old):
                        old.copy_(new)


class Stream:
    """Records who waits for whom."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self):
        return f"the work of {self.name}"


@pytest.fixture
def streams(monkeypatch):
    """The actions of stand-ins for CUDA's streams."""
    log = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: Stream(log, "other"))
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(log, "own"))
    _copying_stream.cache_clear()
    yield log
    _copying_stream.cache_clear()


@pytest.fixture
def graphs(monkeypatch, streams):
    """The graphs that a run makes with stand-ins for CUDA's."""
    made = []

    def graph():
        made.append(Recording())
        return made[-1]

    monkeypatch.setattr(train, "can_be_recorded", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    return made


@pytest.mark.parametrize(
    "words",
    [
        ["--dropout", "--rnnMode", "transformer"],
        EXAMPLE,
        ["--samplingType", "samespeaker"],
        ["--normMode", "batchNorm", "--clip_grad_norm", "0.1"],
    ],
)
def test_replayed_steps_are_the_steps(words, tiny_corpus, tmp_path, request):
    """Bit for bit in weights, moments and logs; also if some batches are smaller."""
    plain = trained(tiny_corpus, tmp_path / "plain", *words, epochs=3)
    graphs = request.getfixturevalue("graphs")
    replayed = trained(tiny_corpus, tmp_path / "replayed", *words, epochs=3)
    assert [graph.replays > 3 for graph in graphs] == [True]
    assert_same(plain, replayed)


def test_a_device_that_refuses_to_record(tiny_corpus, tmp_path, graphs, monkeypatch, capsys):
    """The run continues as without recording, and reports it once."""

    def refuse(graph):
        raise RuntimeError("capture failed\nand more")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    renewed = renewed_generator(monkeypatch)
    refused = trained(tiny_corpus, tmp_path / "refused")
    assert capsys.readouterr().out.count("can't be recorded (capture failed)") == 1
    monkeypatch.setattr(train, "can_be_recorded", lambda *_: False)
    assert_same(trained(tiny_corpus, tmp_path / "plain"), refused)
    assert renewed == ["a copy"]


def renewed_generator(monkeypatch):
    """The states that the stand-in for the device's generator is given from now on."""
    given = []
    generator = SimpleNamespace(clone_state=lambda: "a copy", graphsafe_set_state=given.append)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return given


def test_a_recording_that_cannot_be_ended(streams, monkeypatch, capsys):
    """The note gives the reason, and the previous stream is restored."""

    @contextlib.contextmanager
    def noted(stream):
        try:
            yield
        finally:
            streams.append(f"back from {stream.name}")

    @contextlib.contextmanager
    def endless(graph):
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to an error before")

    def passes(batch):
        raise RuntimeError("operation not permitted\nand more")

    renewed = renewed_generator(monkeypatch)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", endless)
    parameter = torch.zeros(1, requires_grad=True)
    recorded = RecordedPasses(passes, [parameter], 1)
    monkeypatch.setattr(torch.cuda, "stream", noted)
    assert not recorded.record(Batch(*[torch.zeros(1)] * 5))
    assert "can't be recorded (operation not permitted)" in capsys.readouterr().out
    assert streams == ["back from own"]
    assert renewed == ["a copy"]


def test_a_recorded_run_that_was_stopped_resumes(tiny_corpus, tmp_path, graphs):
    whole = trained(tiny_corpus, tmp_path / "whole", epochs=3)
    trained(tiny_corpus, tmp_path / "parts", epochs=1)
    assert_same(whole, trained(tiny_corpus, tmp_path / "parts", epochs=3))


def test_all_epochs_copy_on_one_stream(streams, monkeypatch):
    """PyTorch keeps freed memory separately for each stream."""
    made, device = [], torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(Stream([], "")) or made[0])
    monkeypatch.setattr(Batch, "to", lambda self, device: self)
    for _ in range(3):
        assert len(list(on_device([(0, Batch(*[torch.zeros(1)] * 5))], device))) == 1
    assert len(made) == 1


def test_only_what_the_device_waits_for_is_waiting(monkeypatch):
    """For three batches, fetched in 0.25, 0.75 and 1 s while it has 0.5 s of work each."""
    now, busy_until = [0.0], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = max(now[0], busy_until[0])

        def query(self):
            return self.at <= now[0]

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    def fetch(seconds):
        now[0] += seconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock(waited=7.0, device=torch.device("cuda"))
    for seconds in (0.25, 0.75, 1.0):
        clock.wait_for(fetch, seconds)
        busy_until[0] = max(now[0], busy_until[0]) + 0.5
    assert clock.waited == 7.0 + 0.25 + 0.25 + 0.5
    clock.wait_for(fetch, 0.1)  # of which the device knows nothing yet
    assert len(clock._pending) == 1
    assert clock.waited == 8.0


def test_the_next_batch_is_copied_before_this_one_is_given_out(streams, monkeypatch):
    """And each is waited for separately, not with the next one."""
    monkeypatch.setattr(Batch, "to", lambda self, device: streams.append("copy") or self)
    batches = [(i, Batch(*[torch.zeros(1)] * 5)) for i in range(3)]
    handed_out = on_device(batches, torch.device("cuda"))
    for i in range(3):
        position, batch = next(handed_out)
        assert (position, batch) == batches[i]
        streams.append(f"use {i}")
    assert list(handed_out) == []
    copy, wait = ["other waits for own", "copy"], ["own waits for the work of other"]
    assert streams == [
        *copy, *copy, *wait, "use 0", *copy, *wait, "use 1", *wait, "use 2"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], True),
        (["--samplingType", "sequential"], False),
        (["--supervised", "--path_phone_data", "x", "--CTC"], False),
    ],
)
def test_what_can_be_recorded(words, expected):
    args = build_parser().parse_args(["--compile", *words])
    gpu, alone = torch.device("cuda"), SimpleNamespace(size=1)
    assert can_be_recorded(args, gpu, alone) is expected
    assert can_be_recorded(args, torch.device("cpu"), alone) is False
    assert can_be_recorded(args, gpu, SimpleNamespace(size=2)) is False
    args.compile = False
    assert can_be_recorded(args, gpu, alone) is False


def test_a_compiler_without_triton_is_refused(tiny_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = [*on(tiny_corpus), *SMALL, "--pathCheckpoint", tmp_path / "run", "--compile"]
    assert run(*words) == 2
    assert "--compile on a GPU needs Triton" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("cuda", "variable", "message"),
    [
        (False, "CXX", "a C++ compiler, and there is no g++ here"),
        (True, "CC", "no gcc or clang here"),
    ],
)
def test_a_machine_without_a_compiler_is_refused(monkeypatch, cuda, variable, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setenv(variable, sys.executable)
    check_compilers(cuda)
    monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(UserError, match=re.escape(message)):
        check_compilers(cuda)


def test_memory_that_pytorch_keeps_is_available(monkeypatch):
    for name, found in (("mem_get_info", (50, 1000)), ("memory_reserved", 400),
                        ("memory_allocated", 300)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert available_memory(torch.device("cuda")) == 150


def test_attention_leaves_cudnn_out():
    torch.backends.cuda.enable_cudnn_sdp(True)
    set_precision("fp32")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_only_full_batches_are_compiled(tiny_corpus, tmp_path, monkeypatch):
    """For fixed sizes; batches of other sizes and those of hooks cause no compilation."""
    sizes, compiled = [], torch.nn.Module.compile

    def eager(graph, inputs):
        assert all(torch.is_tensor(x) for x in inputs), "a size that may change"
        sizes.extend(len(x) for x in inputs if x.shape[1:] in ((1, 3200), (20, 8)))
        return graph

    def as_it_is(module, **options):
        compiled(module, backend=eager, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", as_it_is)
    words = [*hooks(tiny_corpus, tmp_path), "--samplingType", "samespeaker"]
    plain = trained(tiny_corpus, tmp_path / "plain", *words)
    assert not sizes
    compiled_run = trained(tiny_corpus, tmp_path / "compiled", *words, "--compile")
    assert sizes == [4] * 4, "encoder and criterion, to train and to validate"
    for key in ("locLoss_train", "locLoss_val"):
        for found, expected in zip(compiled_run["logs"][key], plain["logs"][key], strict=True):
            assert found == pytest.approx(expected, rel=1e-4)


def test_a_gpu_out_of_memory_is_reported_in_one_line(capsys):
    message = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB "
        "of which 1.05 GiB is free. Including non-PyTorch memory, this process has 78.05 GiB "
        "memory in use. Of the allocated memory 77.00 GiB is allocated by PyTorch.\nMore lines"
    )

    @command
    def program(argv):
        raise torch.OutOfMemoryError(message)

    with ends_refused(capsys, r"Tried to allocate 2.00 GiB. .* 1.05 GiB is free. Smaller batches"):
        program()
