"""Tests of runs in several processes: two of them, on the CPU."""

import errno
import json
import multiprocessing
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import train
from criterion import build_criterion, join_networks
from dataset import AudioDataset, Batch, BatchLoader
from model import build_model
from tests.helpers import ROOT, assert_close, ends_refused, write_tiny_corpus
from tests.test_train import (
    EXAMPLE,
    SMALL,
    assert_equal_trees,
    assert_same,
    capture_flags,
    captured,
    checkpoint,
    on,
    run,
)
from utils.capture import CaptureWriter
from utils.data.corpus import scan_corpus
from utils.misc import UserError
from utils.run import distributed
from utils.run import launch as launching
from utils.run.command import command
from utils.run.distributed import World, joined_world
from utils.run.flags import build_parser
from utils.run.launch import launch, processes_to_start
from utils.run.place import Place, enter_slurm_step, find_place, first_host, tasks_per_node
from utils.run.stopping import StopSignals

CRITERIA = {
    "CPC": [],
    "CPC-CTC": EXAMPLE[2:],
    "heads": ["--rnnMode", "transformer"],
    "two levels": ["--multiLevel", "--rnnModeSegment", "linear", "--nPredictsSegment", "2"],
}
PACKS = ["--max_size_loaded", "100000"]  # several packs an epoch


# ----------------------------------------------------------------------- what processes do together


def tiny_step(flags):
    """The networks that every process begins with."""
    words = [*SMALL, "--hiddenEncoder", "16", "--hiddenGar", "16", "--nPredicts", "4", *flags]
    args = build_parser().parse_args(words)
    torch.manual_seed(0)
    return join_networks(build_criterion(args, 2), build_model(args), args)


def tiny_batch(number):
    generator = torch.Generator().manual_seed(number)
    waveform = torch.randn(3, 1, 3200, generator=generator)
    zeros = torch.zeros(3, dtype=torch.int64)
    return Batch(waveform, zeros, None, zeros, zeros.bool())


def gradients(network, step, number):
    torch.manual_seed(number)  # negatives
    network(tiny_batch(number))[0].sum().backward()
    return {name: p.grad for name, p in step.named_parameters()}


@command
def meet(words):
    """Use every way of communication; each process saves its results."""
    directory, corpus = words
    torch.set_num_threads(1)
    with StopSignals() as stop, joined_world(stop, torch.device("cpu")) as world:
        found = {"gathered": world.all_gather(world.rank), "first": world.on_rank_zero(os.getpid)}
        found["total"] = world.all_reduce(torch.tensor(2.0) if world.rank else None)
        for name, flags in CRITERIA.items():
            step = tiny_step(flags)
            found[name] = gradients(world.wrap(step), step, world.rank)
        buffers = torch.nn.BatchNorm1d(2)
        buffers.running_mean.fill_(world.rank)
        world.copy_buffers(buffers)
        found["buffers"] = buffers.state_dict()
        audio = AudioDataset(scan_corpus(corpus), scan_corpus(corpus).utterances, 1600)
        pack = audio.only_pack(world)
        found["pack"], found["files"] = pack.audio.clone(), pack.layout.files.tolist()
        found["same memory"] = writes_are_seen(world, pack.audio)
        loader, found["allocated"] = in_packs(corpus, world), []
        allocate = world.shared_tensor
        world.shared_tensor = lambda *size: found["allocated"].append(size) or allocate(*size)
        found["batches"] = batches_of(loader)
        torch.save(found, Path(directory, f"{world.rank}.pt"))


def in_packs(corpus, world):
    audio = AudioDataset(scan_corpus(corpus), scan_corpus(corpus).utterances, 1600, n_threads=1)
    audio.max_size_loaded = int(audio.samples.sum() // 3)
    return BatchLoader(audio, 4, "samespeaker", seed=3, training=True, world=world)


def batches_of(loader):
    """Position -> waveform, speaker and place of all batches of three epochs."""
    return {
        tuple(position): [*batch[:2], batch.window]
        for epoch in range(3)
        for position, batch in loader.epoch(epoch)
    }


def writes_are_seen(world, audio):
    world.all_gather(None)  # all have their copies
    if world.rank == 1:
        audio[7] = 77
    world.all_gather(None)
    return int(audio[7])


@pytest.fixture(scope="module")
def met(tmp_path_factory):
    """The results that two processes saved, and the corpus that they read, with a bad file."""
    root = write_tiny_corpus(tmp_path_factory.mktemp("met"))
    bad = sorted(root.glob("audio/*/*/*.flac"))[4]
    bad.write_bytes(bad.read_bytes()[:-2000])
    assert launch(2, meet, [str(root), str(root / "audio")]) == 0
    return [torch.load(root / f"{rank}.pt", weights_only=True) for rank in range(2)], root


def test_processes_exchange_values(met):
    (first, second), _ = met
    for found in (first, second):
        assert found["gathered"] == [0, 1]
        assert found["first"] == first["first"]
        assert found["total"] == 2
        assert found["buffers"]["running_mean"].tolist() == [0, 0]


@pytest.mark.parametrize("name", CRITERIA)
def test_gradients_are_the_mean_of_those_of_each_batch(name, met):
    expected = {}
    for number in range(2):
        step = tiny_step(CRITERIA[name])
        for key, gradient in gradients(step, step, number).items():
            expected[key] = expected.get(key, 0) + gradient / 2
    for found in met[0]:
        assert found[name].keys() == expected.keys()
        for key, gradient in expected.items():
            assert_close(found[name][key], gradient, 1e-6, what=key)


def test_processes_decode_one_pack_together(met):
    found, root = met
    corpus = scan_corpus(root / "audio")
    alone = AudioDataset(corpus, corpus.utterances, 1600).only_pack()
    assert len(alone.layout.files) == 8
    for seen in found:
        assert seen["files"] == alone.layout.files.tolist()
        assert torch.equal(seen["pack"], alone.audio)
        assert seen["same memory"] == 77


def slurm_step(rank, node, local_rank, tasks, nodes="node[1-2]", restarts=0):
    """The variables that srun sets in a task of a step; `tasks` as in SLURM_STEP_TASKS_PER_NODE."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(sum(tasks_per_node(tasks))),
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local_rank),
    }


def test_processes_share_two_buffers_for_all_packs(met):
    """And get what one alone would; in every epoch a file turns out to be bad, and is left out."""
    (first, second), root = met
    alone = batches_of(in_packs(root / "audio", World()))
    together = first["batches"] | second["batches"]
    assert first["batches"].keys().isdisjoint(second["batches"])
    assert 0 <= len(alone) - len(together) <= 3, "at most the last batch of an epoch is dropped"
    for position, values in together.items():
        for found, expected in zip(values, alone[position], strict=True):
            assert torch.equal(found, expected), position
    assert len({pack for _, pack, _ in together}) >= 3
    assert len(first["allocated"]) == len(second["allocated"]) == 2


@command
def meet_on_two_machines(words):
    """By srun, whose --distribution=cyclic puts ranks 0 and 2 on the first, 1 on the second.

    Each saves the pack that it sees.
    """
    directory, corpus = words
    rank = int(os.environ["RANK"])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    os.environ |= slurm_step(rank, node=rank % 2, local_rank=rank // 2, tasks="2,1")
    enter_slurm_step()
    with StopSignals() as stop, joined_world(stop, torch.device("cpu")) as world:
        audio = AudioDataset(scan_corpus(corpus), scan_corpus(corpus).utterances, 1600)
        torch.save(audio.only_pack(world).audio, Path(directory, f"{rank}.pt"))


def test_machines_may_have_different_numbers_of_processes(tiny_corpus, tmp_path):
    assert launch(3, meet_on_two_machines, [str(tmp_path), str(tiny_corpus / "audio")]) == 0
    corpus = scan_corpus(tiny_corpus / "audio")
    alone = AudioDataset(corpus, corpus.utterances, 1600).only_pack()
    for rank in range(3):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), alone.audio)


class Deserted(World):
    """A World whose other process is gone after this many messages."""

    def __init__(self, messages):
        super().__init__(size=2, local_size=2)
        self.messages = messages

    def all_gather(self, value):
        self.messages -= 1
        if self.messages < 0:
            raise RuntimeError("Connection closed by peer")
        return [value, value]


@pytest.mark.parametrize("messages", range(4))
def test_shared_memory_is_free_when_a_process_is_gone(messages, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "SHARED_MEMORY", str(tmp_path))
    with pytest.raises(RuntimeError, match="closed by peer"):
        Deserted(messages).shared_tensor(1000, torch.int16)
    assert not list(tmp_path.iterdir())


def test_shared_memory_without_room_is_replaced_by_a_file(tmp_path, monkeypatch, capsys):
    """With a note, since it may be slow."""

    def full(handle, offset, size):
        if os.readlink(f"/proc/self/fd/{handle}").startswith(str(tmp_path / "shm")):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(distributed, "SHARED_MEMORY", str(tmp_path / "shm"))
    monkeypatch.setattr(distributed.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    for name in ("shm", "tmp"):
        (tmp_path / name).mkdir()
    assert Path(distributed._reserve(10**9)).parent == tmp_path / "tmp"
    assert not list((tmp_path / "shm").iterdir())
    said = capsys.readouterr().err
    assert said.startswith(f"note: {tmp_path}/shm: No space left on device: the 1.0 GB of audio")


@pytest.mark.parametrize(
    ("ends", "status"),
    [(lambda _: None, 0), (lambda _: 143, 143), (lambda _: sys.exit(2), 2), (lambda _: 1 / 0, 1)],
)
def test_one_of_several_leaves_without_freeing_anything(ends, status, monkeypatch):
    """Under torchrun as under this program's own launcher."""

    class Left(BaseException):
        pass

    def leave(found):
        raise Left(found)

    monkeypatch.setattr(launching, "is_one_of_several", lambda: True)
    monkeypatch.setattr(launching, "DELAY", 0)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left) as left:
        launching.run_program(ends)
    assert left.value.args == (status,)


def test_a_process_that_waits_for_others_holds_no_shared_memory(monkeypatch):
    monkeypatch.setattr(distributed, "_reserve", None)
    with pytest.raises(RuntimeError, match="closed by peer"):
        Deserted(0).shared_tensor(1000, torch.int16)


def test_a_single_process_waits_for_no_one():
    world = World()
    assert world.all_gather(3) == [3]
    assert world.on_rank_zero(lambda: 4) == 4
    world.raise_everywhere()
    with pytest.raises(UserError, match="a reason"):
        world.raise_everywhere(UserError("a reason"))


# --------------------------------------------------------------------------------------- whole runs


def words_of(corpus, directory, *more):
    words = [*on(corpus), *SMALL, "--pathCheckpoint", directory, "--nEpoch", 2, *PACKS]
    words += ["--threads", 1]  # bits depend on them, and by default they on what shares a machine
    return [str(word) for word in [*words, *more]]


def hooks(corpus, directory):
    stats = f"reprDiff:cosine,ctx_repr,0.05,{directory / 'stats'}"
    captures = ["--captureEverything", "--captureSetStats", stats]
    probes = "--supervised_classif_metric --speaker_sep --linsep_classif_each_epochs 1".split()
    where = ["--linsep_logs_dir", directory / "probes", "--linsep_n_epoch", 1]
    return [*capture_flags(corpus, directory / "captures"), *captures, *probes, *where]


@pytest.fixture(scope="module")
def undisturbed(tiny_corpus, tmp_path_factory):
    """A run of two processes with captures, stats and probes."""
    directory = tmp_path_factory.mktemp("undisturbed")
    words = words_of(tiny_corpus, directory, *EXAMPLE, *hooks(tiny_corpus, directory))
    assert launch(2, train.main, words) == 0
    return directory


def interrupted(words, action):
    """`train.main` in which process 1 does something before its third step."""
    train_step, begun = train.train_step, []

    def step(state, forward_backward, position, batch):
        begun.append(position)
        if state.world.rank == 1 and len(begun) == 3:
            action()
        train_step(state, forward_backward, position, batch)

    train.train_step = step
    train.STEPS_BETWEEN_STOP_CHECKS = 2
    return train.main(words)


def asked_to_stop(words):
    """Process 1 notes whether the run was saved when it ends."""
    status = interrupted(words, lambda: os.kill(os.getpid(), signal.SIGTERM))
    directory = Path(words[words.index("--pathCheckpoint") + 1])
    if os.environ["RANK"] == "1" and (directory / "checkpoint_resume.pt").exists():
        (directory / "saved before").touch()
    return status


def killed(words):
    return interrupted(words, lambda: os.kill(os.getpid(), signal.SIGKILL))


def stopped_by_torchrun(words):
    """`train.main` of which process 1 signals torchrun, and waits until that passes it on."""
    number, *words = words

    def signal_torchrun():
        arrived, arrival = os.pipe()
        os.set_blocking(arrival, False)
        signal.set_wakeup_fd(arrival)  # gets a byte when a signal comes, in whichever thread
        os.kill(os.getppid(), int(number))
        select.select([arrived], [], [], 60)

    return interrupted(words, signal_torchrun)


def torchrun(main, words):
    """The command by which torchrun, as in README.md, runs `main(words)` in two processes."""
    logs = Path(words[words.index("--pathCheckpoint") + 1], "torchrun")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--log-dir", logs]
    command += ["--nproc-per-node", "2", "--max-restarts", "0"]
    command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
    if main is train.main:
        return [*command, "train.py", *words]
    program = "from utils.run.launch import run_program; "
    program += f"from {main.__module__} import {main.__name__} as main; run_program(main)"
    return [*command, "--no-python", sys.executable, "-c", program, *words]


def assert_ended_like(undisturbed, directory):
    """The run, without captures and probes, ended bit for bit as with them."""
    end, expected = checkpoint(directory, 1), checkpoint(undisturbed, 1)
    assert_same(end, expected, without=["args", "logs"])
    for key, series in end["logs"].items():
        assert_equal_trees(series, expected["logs"][key], key)


def test_two_processes_stop_together_and_resume_exactly(tiny_corpus, tmp_path, undisturbed, capfd):
    words = words_of(tiny_corpus, tmp_path, *EXAMPLE)
    assert launch(2, asked_to_stop, words) == 143
    resume = checkpoint_resume(tmp_path)
    assert resume["running"]["windows"] > 0
    assert (tmp_path / "saved before").exists()
    assert launch(2, train.main, words) == 0
    printed = capfd.readouterr()
    assert printed.out.count("stopped by SIGTERM") == 1
    assert printed.err == ""
    assert_ended_like(undisturbed, tmp_path)


def test_a_run_of_torchrun_stops_and_resumes_exactly(tiny_corpus, tmp_path, undisturbed, capfd):
    words = words_of(tiny_corpus, tmp_path, *EXAMPLE)
    stopping = torchrun(stopped_by_torchrun, [str(int(signal.SIGUSR1)), *words])
    assert subprocess.run(stopping, cwd=ROOT).returncode == 1
    assert checkpoint_resume(tmp_path)["running"]["windows"] > 0
    assert subprocess.run(torchrun(train.main, words), cwd=ROOT).returncode == 0
    assert capfd.readouterr().out.count("stopped by SIGUSR1") == 1
    assert_ended_like(undisturbed, tmp_path)


def asked_to_stop_at_the_start(words):
    """`train.main` where the signal comes before process 0 has looked at the command line."""
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)
        signal.sigwait([signal.SIGTERM])  # the launching process passes it on
        os.kill(os.getpid(), signal.SIGTERM)
    return train.main(words)


def test_processes_that_have_not_met_stop_together(tiny_corpus, tmp_path, capfd):
    words = words_of(tiny_corpus, tmp_path)
    assert launch(2, asked_to_stop_at_the_start, words) == 143
    printed = capfd.readouterr()
    assert printed.out.count("stopped by SIGTERM") == 1
    assert printed.err == ""


def orphaned(words):
    """Process 0 kills the launching process before it meets the other one."""
    os.open(words[0], os.O_WRONLY)  # until this process ends
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGKILL)
    with StopSignals() as stop, joined_world(stop, torch.device("cpu")):
        pass


def test_processes_end_with_the_one_that_launched_them(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    context = multiprocessing.get_context("spawn")
    launching = context.Process(target=launch, args=(2, orphaned, [str(pipe)]))
    launching.start()
    reading = os.open(pipe, os.O_RDONLY)
    assert select.select([reading], [], [], 60)[0]
    assert os.read(reading, 1) == b""  # no process has it open any more
    os.close(reading)
    launching.join()


def checkpoint_resume(directory):
    return torch.load(directory / "checkpoint_resume.pt", weights_only=True)


def test_one_process_resumes_the_run_of_two(tiny_corpus, tmp_path, capsys, monkeypatch):
    """And sees each batch that is left of the epoch once."""
    one_epoch = ["--nEpoch", 1]
    train_step, seen = train.train_step, []

    def step(state, forward_backward, position, batch):
        seen.append((position, batch.window.tolist()))
        train_step(state, forward_backward, position, batch)

    monkeypatch.setattr(train, "train_step", step)
    assert run(*words_of(tiny_corpus, tmp_path / "whole", *one_epoch)) == 0
    whole, seen = seen, []
    words = words_of(tiny_corpus, tmp_path / "two")
    assert launch(2, asked_to_stop, words) == 143
    windows = checkpoint_resume(tmp_path / "two")["running"]["windows"]
    assert run(*words, *one_epoch) == 0
    assert seen == whole[-len(seen) :]
    assert windows + sum(len(w) for _, w in seen) == sum(len(w) for _, w in whole)
    printed = capsys.readouterr().out
    assert "processes 2 -> 1" in printed
    assert "results will not be bit-identical" in printed
    assert "batches per step: 2 -> 1; --nGPU 2 continues as before" in printed


def test_one_process_forgets_the_hidden_state_of_two(tiny_corpus, tmp_path, monkeypatch):
    """Rank 0's isn't where the rows of the last batch ended, since another rank had that batch."""
    words = words_of(tiny_corpus, tmp_path, "--samplingType", "sequential")
    assert launch(2, asked_to_stop, words) == 143
    train_step, seen = train.train_step, []

    def step(state, forward_backward, position, batch):
        seen.append((batch.continues.any(), state.networks.model.hidden_state()))
        train_step(state, forward_backward, position, batch)

    monkeypatch.setattr(train, "train_step", step)
    assert run(*words) == 0
    assert seen[0] == (True, None)
    assert seen[1][1] is not None


def test_two_processes_capture_what_one_does(tiny_corpus, undisturbed, tmp_path):
    words = ["--onlyCapture", "--pathCheckpoint", undisturbed, "--pathDB", tiny_corpus / "audio"]
    words += ["--batchSizeGPU", 4, "--captureEverything", *capture_flags(tiny_corpus, tmp_path)]
    assert run(*words, "--nGPU", 1) == 0
    one, two = captured(tmp_path), captured(undisturbed / "captures")
    one_epoch = {path: tensor for path, tensor in two.items() if path.parts[0] == "1"}
    assert one.keys() == one_epoch.keys()
    assert len(one) > 7
    for path, tensor in one.items():
        assert torch.equal(tensor, one_epoch[path]), path
    index, expected = (
        json.loads((directory / "1" / "index.json").read_text())["windows"]
        for directory in (undisturbed / "captures", tmp_path)
    )
    assert index == expected


def test_probes_and_stats_of_two_processes_are_logged(undisturbed):
    logs = checkpoint(undisturbed, 1)["logs"]
    assert logs["reprDiff_ctx_repr_cosine_by0.05_mean"][1] > 0
    assert (undisturbed / "probes" / "1" / "speaker" / "logs.json").is_file()
    assert (undisturbed / "probes" / "1" / "phone" / "logs.json").is_file()


def ended_by_an_error(words):
    """Process 1 ends with an error; the other one still has something to clean up."""
    pipe, tidy = words
    if os.environ["RANK"] == "1":
        os.open(pipe, os.O_WRONLY)
    else:
        Path(pipe).read_bytes()  # ends with the process that has it open
        Path(tidy).touch()
    return 2


def test_a_process_that_ends_with_an_error_lets_the_other_tidy_up(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert launch(2, ended_by_an_error, [str(tmp_path / name) for name in ("pipe", "tidy")]) == 2
    assert (tmp_path / "tidy").exists()


def failing_capture(words):
    """`train.main` in which process 1 can't write; at its end, each records what was saved."""
    rank = os.environ["RANK"]
    if rank == "1":
        CaptureWriter.write = refuse
    status = run(*words)
    Path(words[-1], rank).write_text(str(Path(words[-1], "checkpoint_0.pt").exists()))
    return status


def refuse(*_):
    raise UserError("a full disk")


def test_a_failed_capture_of_one_process_ends_all_after_the_save(tiny_corpus, tmp_path, capfd):
    capture = capture_flags(tiny_corpus, tmp_path / "captures")
    words = words_of(tiny_corpus, tmp_path, "--captureConvRepr", *capture)
    assert launch(2, failing_capture, [*words, "--pathCheckpoint", str(tmp_path)]) == 2
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["True", "True"]
    assert capfd.readouterr().err == "error: a full disk\n"


def test_a_process_that_dies_ends_the_run(tiny_corpus, tmp_path):
    with pytest.raises(UserError, match="process 1 of 2 was ended by SIGKILL"):
        launch(2, killed, words_of(tiny_corpus, tmp_path))
    assert multiprocessing.active_children() == []


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # fmt: skip


@pytest.mark.parametrize("name", TORCHRUN)
def test_half_an_environment_of_torchrun_is_refused(name, monkeypatch):
    """Without one of its variables, or with a size that is no number."""
    rest = {other: value for other, value in TORCHRUN.items() if other != name}
    monkeypatch.setattr(os, "environ", {"WORLD_SIZE": "two"} | rest)
    with pytest.raises(UserError, match="isn't as torchrun sets it"):
        meet_on("cpu")


@pytest.mark.parametrize(
    ("environment", "started", "note"),
    [
        ({}, 2, ""),
        ({"WORLD_SIZE": "1", "RANK": "0"}, 2, ""),  # not by torchrun
        ({"WORLD_SIZE": "1", "RANK": "0", "TORCHELASTIC_RUN_ID": "none"}, 0, "to 1\n"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2"}, 0, ""),
        ({"WORLD_SIZE": "6", "RANK": "0", "LOCAL_WORLD_SIZE": "3"}, 0, "to 3\n"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, 0, ""),  # another rank says it
    ],
)
def test_the_environment_of_torchrun_wins_over_a_flag_with_a_note(
    monkeypatch, capsys, environment, started, note
):
    monkeypatch.setattr(os, "environ", environment)
    args = build_parser().parse_args(["--nGPU", "2", "--device", "cpu"])
    assert processes_to_start(args) == started
    out = capsys.readouterr().out
    assert len(out.splitlines()) == bool(note)
    assert note in out


def test_a_process_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(os, "environ", TORCHRUN)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="process 1 of this machine has no GPU, it sees 1"):
        meet_on("cuda")


def meet_on(device):
    with StopSignals() as stop, joined_world(stop, torch.device(device)):
        raise AssertionError("has met")


def test_what_the_machine_lacks_is_reported_once(tiny_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(train, "launch", None)  # refused before
    words = words_of(tiny_corpus, tmp_path / "run", "--nGPU", 2, "--device", "cuda")
    with ends_refused(capsys, "PyTorch sees 1 GPU here"):
        train.main(words)


def with_its_own_flags(words):
    """`train.main` of which process 1 has another directory or list."""
    *words, flag, value = words
    return train.main([*words, flag, value] if os.environ["RANK"] == "1" else words)


def test_machines_without_a_shared_directory_are_refused(tiny_corpus, tmp_path, capfd):
    words = words_of(tiny_corpus, tmp_path / "run")
    assert run(*words, "--nEpoch", 1) == 0
    elsewhere = ["--pathCheckpoint", str(tmp_path / "elsewhere")]
    assert launch(2, with_its_own_flags, words + elsewhere) == 2
    assert "not all processes find the same checkpoint" in capfd.readouterr().err


def test_machines_with_different_lists_are_refused(tiny_corpus, tmp_path, capfd):
    words = words_of(tiny_corpus, tmp_path, "--pathVal", tiny_corpus / "train.txt")
    assert launch(2, with_its_own_flags, words) == 2
    assert "not all processes have the same training and validation" in capfd.readouterr().err


def test_an_error_of_all_is_reported_once(tiny_corpus, tmp_path, capfd):
    (tmp_path / "list.txt").write_text("nothing-like-it\n")
    words = words_of(tiny_corpus, tmp_path / "run", "--pathVal", tmp_path / "list.txt")
    assert run(*words, "--nGPU", 2, "--device", "cpu") == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("nothing-like-it") == 1
    assert len(error.splitlines()) == 1


# ---------------------------------------------------------------------------------------- clusters


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node7", "node7"),
        ("node[01-04,7]", "node01"),
        ("gpu-a[3,5-9],gpu-b1", "gpu-a3"),
        ("x1,x[2-3]", "x1"),
        ("rack[2-3]n[008-010].site", "rack2n008.site"),
    ],
)
def test_the_first_host_is_that_of_scontrol(hosts, first):
    assert first_host(hosts) == first


def test_the_tasks_of_each_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("16") == [16]


CYCLIC = slurm_step(4, node=1, local_rank=1, tasks="3,2")
BY_TORCHRUN = TORCHRUN | {"TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "3"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, Place()),
        (CYCLIC, Place(4, 5, 1, 2, 1)),
        (CYCLIC | {"WORLD_SIZE": "1", "RANK": "0"}, Place(4, 5, 1, 2, 1)),  # not by torchrun
        (
            {"SLURM_NTASKS": "5", "SLURM_PROCID": "0", "SLURM_NODEID": "0"},
            Place(),
        ),  # sbatch, salloc
        (slurm_step(0, node=0, local_rank=0, tasks="1"), Place()),
        (CYCLIC | BY_TORCHRUN, Place(1, 2, 1, 2, 3)),
        (CYCLIC | BY_TORCHRUN | {"WORLD_SIZE": "1"}, Place()),
        (TORCHRUN, Place(1, 2, 1, 2, 0)),
    ],
)
def test_the_place_of_a_process(environment, found, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(environment))
    enter_slurm_step()
    assert find_place() == found


def test_a_step_meets_on_its_first_host_by_default(monkeypatch):
    for given in ({}, {"MASTER_ADDR": "other", "MASTER_PORT": "77"}):
        monkeypatch.setattr(os, "environ", CYCLIC | given)
        enter_slurm_step()
        found = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
        assert found == (given or {"MASTER_ADDR": "node1", "MASTER_PORT": "27110"})


@pytest.mark.parametrize("name", set(CYCLIC) - {"SLURM_STEP_NUM_TASKS", "SLURM_RESTART_COUNT"})
def test_half_an_environment_of_srun_is_refused(name, monkeypatch):
    monkeypatch.setattr(os, "environ", {k: v for k, v in CYCLIC.items() if k != name})
    with pytest.raises(UserError, match=f"{name}.* isn't as srun sets it"):
        enter_slurm_step()


@pytest.mark.parametrize(("n_gpus", "taken"), [(1, 0), (2, 1)])
def test_the_only_gpu_that_srun_shows_a_task_is_its_own(n_gpus, taken, monkeypatch):
    monkeypatch.setattr(os, "environ", CYCLIC)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: numbers.append(number))
    numbers = []
    distributed._take_gpu(1)
    assert numbers == [taken]


def test_processes_that_do_not_meet_name_the_variable_of_the_interface(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ | TORCHRUN)  # nobody is at this port
    monkeypatch.setattr(distributed, "FIRST_MEETING", timedelta(seconds=0.1))
    with pytest.raises(
        UserError, match="process 1 of 2 .* at 127.0.0.1:1 .*set GLOO_SOCKET_IFNAME"
    ):
        meet_on("cpu")


@pytest.mark.parametrize("address", ["127.0.1.1", "::1", None])
def test_a_host_name_that_others_can_not_use_is_refused(address, monkeypatch):
    def look_up(name, port):
        if address is None:
            raise socket.gaierror("Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(os, "environ", TORCHRUN | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    with pytest.raises(UserError, match=f"{socket.gethostname()}, stands for .*GLOO_SOCKET_IFNAME"):
        meet_on("cpu")
    os.environ["GLOO_SOCKET_IFNAME"] = "eth7"
    distributed._check_host_name()


def hung(words):
    """`train.main` on another host, as the same job of Slurm, that hangs in its third step."""
    socket.gethostname = lambda: "node1"
    os.environ |= {"SLURM_JOB_ID": "4711", "RANK": "1"}
    train_step, begun = train.train_step, []

    def step(*arguments):
        begun.append(arguments)
        if len(begun) == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        train_step(*arguments)

    train.train_step = step
    train.main(words)


def files_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("at", ["save", "hooks"])
def test_a_hung_process_whose_run_was_taken_over_writes_nothing_more(
    tiny_corpus, tmp_path, monkeypatch, capfd, at
):
    more = ["--resume_every", 1] if at == "save" else hooks(tiny_corpus, tmp_path)
    words = words_of(tiny_corpus, tmp_path, *more)
    first = multiprocessing.get_context("spawn").Process(target=hung, args=(words,))
    first.start()
    _, status = os.waitpid(first.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    try:
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
        assert run(*words) == 2  # another task of the same start
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert run(*words) == 0
        printed = capfd.readouterr()
        assert f"process {first.pid} on node1" in printed.err
        assert f"taken over from process {first.pid} on node1" in printed.out
        before = files_below(tmp_path)
    finally:
        os.kill(first.pid, signal.SIGCONT)
        first.join()
    assert first.exitcode == 2
    assert "checkpoint.lock is gone" in capfd.readouterr().err
    assert before == files_below(tmp_path)


NETWORK = "10.231.77"  # of the two hosts


@pytest.fixture
def two_hosts():
    """Names of two network namespaces, joined by the interface cpc0 of each."""
    if not shutil.which("ip") or os.geteuid():
        pytest.skip("needs root and iproute2")
    hosts = [f"cpc-{os.getpid()}-{number}" for number in (1, 2)]
    try:
        for host in hosts:
            subprocess.run(["ip", "netns", "add", host], check=True, capture_output=True)
        first, second = hosts
        link = ["link", "add", "cpc0", "netns", first, "type", "veth", "peer", "cpc0", "netns"]
        subprocess.run(["ip", *link, second], check=True, capture_output=True)
        for number, host in enumerate(hosts, start=1):
            for words in (
                ["link", "set", "lo", "up"],
                ["link", "set", "cpc0", "up"],
                ["address", "add", f"{NETWORK}.{number}/24", "dev", "cpc0"],
            ):
                subprocess.run(["ip", "-n", host, *words], check=True, capture_output=True)
        yield hosts
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True)


def srun(hosts, names, words, directory, restarts=0):
    """One task of train.py on each host, as srun would start them; their processes.

    The host at each address has one of these names and knows itself, as on Debian, as 127.0.1.1.
    """
    tasks = []
    for rank, (host, name) in enumerate(zip(hosts, names, strict=True)):
        number = int(host[-1])
        file = directory / f"hosts of {name}"
        other = f"{NETWORK}.{3 - number} {names[1 - rank]}"
        file.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{other}\n")
        script = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
        command = ["ip", "netns", "exec", host, "unshare", "--uts", "--mount", "sh", "-c", script]
        command += ["sh", name, file, sys.executable, ROOT / "train.py", *words]
        variables = slurm_step(rank, rank, 0, "1(x2)", ",".join(names), restarts)
        environment = os.environ | variables | {"GLOO_SOCKET_IFNAME": "cpc0"}
        output = subprocess.PIPE if rank == 0 else None
        tasks.append(subprocess.Popen(command, env=environment, stdout=output, text=True))
    return tasks


def test_a_run_resumes_without_the_host_that_died(two_hosts, tiny_corpus, tmp_path, undisturbed):
    """Two hosts on one machine; the run resumes with rank 0 on the host that had rank 1."""
    run_directory = tmp_path / "run"
    words = words_of(tiny_corpus, run_directory, *EXAMPLE, "--resume_every", 1, "--logging_step", 1)
    first, second = srun(two_hosts, ["node1", "node2"], words, tmp_path)
    assert any(line.startswith("epoch 0  batch 3 of") for line in first.stdout)
    subprocess.run(["ip", "-n", two_hosts[0], "link", "set", "cpc0", "down"], check=True)
    for task in (first, second):  # Slurm ends what is left of the job
        task.kill()
        task.wait()
    first.stdout.close()
    assert "node1" in (run_directory / "checkpoint.lock").read_text()
    subprocess.run(["ip", "-n", two_hosts[0], "link", "set", "cpc0", "up"], check=True)
    tasks = srun(two_hosts[::-1], ["node2", "node3"], words, tmp_path, restarts=1)
    printed, _ = tasks[0].communicate()
    assert [task.wait() for task in tasks] == [0, 0]
    assert "taken over from process" in printed
    assert "checkpoint_resume.pt, 0 epochs done" in printed
    assert_same(checkpoint(run_directory, 1), checkpoint(undisturbed, 1), without=["args", "logs"])
