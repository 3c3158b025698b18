"""Tests of processors: how many there are, how threads share them, how they wait."""

import ast
import math
import os
import subprocess
import sys
from types import SimpleNamespace

from utils.run.before_torch import CHOICES, SETTINGS

import pytest
import torch

from tests.common import ROOT
from utils.run import console, machine
from utils.run.distributed import ALONE, World, processes_on

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def six_processors(monkeypatch):
    """Six processors and eight threads of PyTorch; returns the list of numbers that are set."""
    chosen = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "n_processors", lambda: 6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: [8, *chosen][-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    return chosen


# ----------------------------------------------------------------------------------- how many


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "max 100000"}, math.inf),
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/job/step\n", {"job/cpu.max": "200000 100000", "job/step/cpu.max": "max 100000"}, 2),
        ("0::/seen/from/outside\n", {"cpu.max": "50000 100000"}, 0.5),
        ("3:cpu,cpuacct:/a\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "-1"}, math.inf),
        (
            "4:cpuset:/\n3:cpu,cpuacct:/a/b\n0::/\n",
            {"cpu/a/cpu.cfs_quota_us": "3000\n", "cpu/a/cpu.cfs_period_us": "1000\n"},
            3,
        ),
        (None, {}, math.inf),
    ],
)
def test_the_quota_of_a_container_is_found(tmp_path, groups, files, quota):
    if groups:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, content in files.items():
        (tmp_path / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / name).write_text(content)
    assert machine._quota(tmp_path) == quota


@pytest.mark.parametrize(("quota", "expected"), [(math.inf, 5), (2.5, 3), (0.1, 1), (9, 5)])
def test_processors_are_those_that_may_be_used(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(5)), raising=False)
    monkeypatch.setattr(machine, "_quota", lambda: quota)
    assert machine.n_processors() == expected


# ------------------------------------------------------------------------------ threads for them


@pytest.mark.parametrize(
    ("device", "n_threads", "n_processes", "expected"),
    [(CPU, 0, 1, 6), (CPU, 0, 4, 1), (CPU, 7, 4, 7), (CUDA, 0, 1, 4), (CUDA, 0, 2, 3)],
)
def test_threads_are_no_more_than_processors(
    six_processors, device, n_threads, n_processes, expected
):
    machine.set_threads(device, n_threads, n_processes)
    assert six_processors == [expected]


@pytest.mark.parametrize(
    ("before", "device", "n_threads", "n_processes", "expected"),
    [
        (5, CPU, 0, 1, [5]),
        (7, CPU, 0, 1, []),  # more than there are
        (4, CPU, 0, 2, []),  # more than one of two processes may use
        (5, CUDA, 0, 1, []),
        (5, CPU, 2, 1, []),  # --threads 2
        (None, CPU, 0, 1, []),
    ],
)
def test_a_resumed_run_keeps_its_threads_where_they_fit(
    six_processors, before, device, n_threads, n_processes, expected
):
    machine.keep_threads(before, device, n_threads, n_processes)
    assert six_processors == expected


def test_tasks_with_processors_of_their_own_share_none():
    world = World(size=4, local_size=3, machine=0)
    world.all_gather = lambda own: [own, (0, [2, 3]), (0, own[1]), (1, own[1])]
    assert processes_on([0, 1], world) == 2


def test_a_resumed_run_mentions_a_larger_number_of_threads(six_processors, capsys):
    machine.keep_threads(2, CPU)
    assert capsys.readouterr().out == "note: 2 CPU threads as before; --threads 6 uses more\n"


def test_the_user_decides_on_openmp(six_processors, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    machine.set_threads(CPU)
    machine.keep_threads(2, CPU)
    assert six_processors == []


def test_seeding_draws_as_torch_does():
    torch.manual_seed(5)
    expected = torch.rand(3)
    machine.seed_generators(5)
    assert torch.equal(torch.rand(3), expected)


# -------------------------------------------------------------------------------- how they wait


def commands():
    """Path of each program here -> its source."""
    sources = {path.relative_to(ROOT): path.read_text() for path in ROOT.glob("[!.]*/**/*.py")}
    sources |= {path.relative_to(ROOT): path.read_text() for path in ROOT.glob("*.py")}
    return {
        str(path): source
        for path, source in sources.items()
        if 'if __name__ == "__main__":' in source and path.parts[0] != "tests"
    }


def foreign_imports(source):
    """Names of what a program imports at its top beyond Python's library, in order."""
    for node in ast.parse(source).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names = [node.module] if isinstance(node, ast.ImportFrom) else names
        yield from (n for n in names if n.partition(".")[0] not in sys.stdlib_module_names)


def test_every_command_chooses_how_threads_wait_before_it_imports_anything_else():
    first = {path: [*foreign_imports(source), None][0] for path, source in commands().items()}
    assert {"train.py", "eval/ABX.py", "benchmarks/contention.py"} <= first.keys()
    none = {"benchmarks/flag_readers.py", "benchmarks/mutants.py"}  # they need no PyTorch
    assert {path for path, name in first.items() if name != "utils.run.before_torch"} == none


def environment_after(code, **variables):
    """OpenMP's variables after Python code, in a process in which only these are set."""
    others = {name: v for name, v in os.environ.items() if name not in CHOICES}
    code += f"; import os; print({{n: v for n, v in os.environ.items() if n in {CHOICES}}})"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(
        command, cwd=ROOT, env=others | variables, capture_output=True, text=True, check=True
    )
    return ast.literal_eval(ended.stdout), ended.stderr


@pytest.mark.parametrize("name", CHOICES)
def test_what_the_user_has_set_stays(name):
    found, _ = environment_after("import utils.run.before_torch", **{name: "7"})
    assert found == {name: "7"}


def test_openmp_reads_what_a_command_sets():
    code = "import sys, utils.run.before_torch; assert 'torch' not in sys.modules; import torch"
    found, shown = environment_after(code, OMP_DISPLAY_ENV="VERBOSE")
    assert found == SETTINGS
    with open("/proc/self/maps", encoding="utf-8") as file:
        if "libgomp" not in file.read():
            pytest.skip("PyTorch has another OpenMP here")
    count = SETTINGS["GOMP_SPINCOUNT"]
    assert f"GOMP_SPINCOUNT = '{count}'" in shown


def test_a_library_leaves_the_environment_as_it_is():
    code = "import feature_loader, hubconf; hubconf.CPC_audio(hiddenEncoder=8, hiddenGar=8)"
    assert environment_after(code)[0] == {}
    assert environment_after("import torch, train")[0] == {}


# -------------------------------------------------------------------------- when they are starved


def steps(monkeypatch, busy, *, n=console.STEPS_WATCHED + 3, **state):
    """Do steps of 2 s in which the thread is busy for that many seconds."""
    now = {"clock": 0.0, "thread": 0.0}
    monkeypatch.setattr(console.time, "perf_counter", lambda: now["clock"])
    monkeypatch.setattr(console.time, "thread_time", lambda: now["thread"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: state.get("threads", 2))

    def step(batch):
        now["clock"] += 2
        now["thread"] += busy[batch % len(busy)]
        return batch

    place = SimpleNamespace(world=state.get("world", ALONE), device=state.get("device", CPU))
    watched = console.note_if_starved(step, place)
    assert [watched(i) for i in range(n)] == list(range(n))


def test_a_note_names_threads_if_steps_are_starved(monkeypatch, capsys):
    steps(monkeypatch, [1.0])
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "50.0 % of the time of their 2 threads" in line
    assert "--threads" in line


@pytest.mark.parametrize(
    ("busy", "state"),
    [
        ([1.3], {}),
        ([1.3, 1.3, 0.1], {}),  # a moment's disturbance
        ([0.1], {"n": console.STEPS_WATCHED - 1}),
        ([0.1], {"threads": 1}),
        ([0.1], {"device": CUDA}),
        ([0.1], {"world": SimpleNamespace(size=2)}),
    ],
)
def test_other_steps_cause_no_such_note(monkeypatch, capsys, busy, state):
    steps(monkeypatch, busy, **state)
    assert capsys.readouterr().out == ""
