"""The commands in the READMEs, run in their order, in small; see test_recipes.py for recipes."""

import importlib
import re
import shlex
import subprocess
from itertools import groupby

import pytest

from tests.common import ROOT, write_tiny_corpus

BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SET_UP = ("python3 -m venv", "pip install", "make ")  # what has happened before this test
SMALL = {
    "train.py": "--device cpu --nGPU 1 --hiddenEncoder 16 --hiddenGar 16 --sizeWindow 5120 "
    "--batchSizeGPU 2 --negativeSamplingExt 8",
    "eval/linear_separability.py": "--n_epoch 1 --device cpu",
    "eval/cluster.py": "-k 5",
    "eval/common_voices_eval.py": "--device cpu",
}
REPLACED = {  # in any command
    r"--nEpoch 300": "--nEpoch 3",
    r"(--linsep_n_epoch|--linsep_classif_each_epochs) \d+": r"\1 1",
    r"-k 50": "-k 5",
}
SYMBOLS = ["SIL", "AA", "B", "K", "S"]
VARIABLES = {
    "DB": "train-clean-100",
    "TRAIN": "lists/train.txt",
    "VAL": "lists/val.txt",
    "LIST": "lists/val.txt",
    "PHONES": "labels/converted_aligned_phones.txt",
    "L": "original/probes",
    "C": "original/classifiers",
    "CAP": "original/captures",
    "RUN": "original/run",
    "CHECKPOINT": "original/run",
    "OUT": "original/out",
    "ITEM": "dev.item",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all that the READMEs take for granted, by the names they use."""
    place = tmp_path_factory.mktemp("readme")
    corpus = write_tiny_corpus(place / "tiny", speakers=3, utterances=6)
    for name in ("train-clean-100", "dev-clean", "AUDIO"):
        (place / name).symlink_to(corpus / "audio")
    phones = [line.split() for line in (corpus / "phones.txt").read_text().splitlines()]
    (place / "PHONES").write_text(
        "".join(f"{name} {' '.join(p for p, _ in groupby(labels))}\n" for name, *labels in phones)
    )
    (place / "utterance.flac").symlink_to(next(corpus.rglob("*.flac")))
    (place / "alignments").mkdir()
    for name, *labels in phones:
        (place / "alignments" / f"{name}.TextGrid").write_text(text_grid(labels))
    (place / "dev-alignments").symlink_to(place / "alignments")
    write_demo(place, corpus)
    return place


def write_demo(place, corpus):
    """What `make demo` leaves behind, by its names; its run is that of the README."""
    demo = place / "demo" / "corpus"
    demo.mkdir(parents=True)
    (demo / "audio").symlink_to(corpus / "audio")
    (demo / "test_split.txt").symlink_to(corpus / "test.txt")
    (demo / "converted_aligned_phones.txt").symlink_to(corpus / "phones.txt")
    (demo / "phones.txt").write_text("".join(f"{i} {p}\n" for i, p in enumerate(SYMBOLS)))
    (place / "demo" / "run").symlink_to(place / "runs" / "acpc")


def intervals(labels):
    """(first frame, frame after the last, phone) of each phone."""
    end = 0
    for label, run in groupby(labels):
        begin, end = end, end + len(list(run))
        yield begin, end, SYMBOLS[int(label)]


def text_grid(labels):
    phones = list(intervals(labels))
    seconds = f"{phones[-1][1] / 100}"
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "0", seconds, "<exists>"]
    lines += ["1", '"IntervalTier"', '"phones"', "0", seconds, f"{len(phones)}"]
    for begin, end, phone in phones:
        lines += [f"{begin / 100}", f"{end / 100}", f'"{phone}"']
    return "\n".join(lines) + "\n"


def test_commands_of_the_readmes_run(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for document in ("README.md", "eval/README.md"):  # whose commands use what those before wrote
        for language, block in BLOCK.findall((ROOT / document).read_text()):
            if language == "python":
                run_python(block)
            else:
                run_shell(block, dict(VARIABLES))
    assert "Traceback" not in capsys.readouterr().err


def run_shell(block, variables):
    """Run each command; those of the program, in this process."""
    for line in re.sub(r"\\\n", " ", block).splitlines():
        line = line.partition("  #")[0].strip()
        if not line or line.startswith(("#", *SET_UP)):
            continue
        for name in sorted(variables, key=len, reverse=True):
            line = re.sub(rf"\${name}\b", variables[name], line)
        for pattern, small in REPLACED.items():
            line = re.sub(pattern, small, line)
        words = shlex.split(line)
        if re.fullmatch(r"[A-Z]+=.*", line):
            name, _, variables[name] = words[0].partition("=")
        elif words[0] == "python":
            run_command(words[1], words[2:])
        else:
            subprocess.run(line, shell=True, check=True, executable="/bin/bash")


def run_command(script, words):
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    if script == "train.py" and "--nEpoch" not in words:
        words = [*words, "--nEpoch", "2"]
    status = main([*words, *shlex.split(SMALL.get(script, ""))])
    assert not status, f"{script} {shlex.join(words)}: status {status}"


def run_python(block):
    """With this copy of the project, and without a download."""
    block = block.replace("path/to/this/project", str(ROOT)).replace("pretrained=True", "")
    names = {}
    exec(compile(block, "README", "exec"), names)
    return names
