"""Training on corpora and from checkpoints that are damaged or malicious."""

import shutil
import signal
from pathlib import Path

import torch

from benchmarks.trials.mutations import (
    corrupt_checkpoint,
    corrupt_corpus,
    corrupt_file,
    edit_json,
    replace_file,
)
from benchmarks.trials.runs import OWN_PROCESS, TINY, Run, content, differences, on
from benchmarks.trials.true_labels import check_capture, check_training_sets
from tests.common import write_tiny_corpus
from utils.data.listing import LISTING
from utils.files import save_json

KEYS_OF_THE_ORIGINAL = ("gEncoder", "cpcCriterion", "optimizer", "best")


def run_damaged(part, number, words, case, damage, check):
    """A run on damaged files: how it ends and, where it succeeds, what `check(run)` finds.

    case: the directory of all its files, removed unless there is a finding; damage: what was done.
    """
    own = number % OWN_PROCESS == OWN_PROCESS - 1
    run = Run(words, case / "log", forked=not own).finish()
    finding = run.finding() or (run.status == 0 and check(run))
    part.counts["refused" if run.status == 2 else "ran"] += 1
    if finding:
        part.found(number, f"{finding} ({damage})")
        case.rename(case.with_name(f"found_{number}"))
    else:
        shutil.rmtree(case)


def cases(part, total):
    """Numbers of cases, with progress."""
    for done in range(total):
        yield part.args.first + done
        part.progress(done + 1, total)


# ----------------------------------------------------------------------------------------- corpora


def corpora(part):
    """Train on damaged corpora; where that is possible, with the audio and labels in the files."""
    sound, case = write_tiny_corpus(part.place / "sound", seconds=(0.3, 0.6)), part.place / "case"
    words = [*on(sound), *TINY, "--nEpoch", 1, "--pathCheckpoint", part.place / "first"]
    part.must_succeed(words)  # leaves a listing in the database
    for number in cases(part, part.args.corpora):
        rng = part.random(number)
        corpus = Path(shutil.copytree(sound, case / "corpus"))
        if rng.random() < 0.5:
            (corpus / "audio" / LISTING).unlink()
        damage = corrupt_corpus(rng, corpus)
        words, check = rng.choice([phones_trained, phones_captured])(corpus, case)
        words += ["--max_bad_files", rng.choice([0, 0.01, 0.5])]
        run_damaged(part, number, words, case, damage, check)


def phones_trained(corpus, case):
    """A run that learns phones, and what checks it."""
    words = [*on(corpus), *TINY, "--nEpoch", 1, "--pathCheckpoint", case / "run", "--supervised",
             "--path_phone_data", corpus / "phones.txt"]  # fmt: skip
    return words, in_a_fork(check_training_sets)


def phones_captured(corpus, case):
    """A run that captures phones and speakers, and what checks it."""
    words = [*on(corpus), *TINY, "--nEpoch", 1, "--pathCheckpoint", case / "run",
             "--path_phone_data", corpus / "phones.txt", "--captureEachEpochs", 1,
             "--pathCaptureDS", corpus / "all.txt", "--pathCaptureSave", case / "captures",
             "--captureSpeakerAlign", "--capturePhoneAlign"]  # fmt: skip
    return words, in_a_fork(check_capture)


def in_a_fork(check):
    """Turn a check of a command line into one of a run; its threads begin in another process."""

    def finding(run):
        checked = Run(run.words, run.out.with_name("check"), function=check).finish()
        return checked.finding()

    return finding


# ------------------------------------------------------------------------------------- checkpoints


def checkpoints(part):
    """Resume from, load, capture and probe checkpoints that are damaged or malicious."""
    corpus, case = write_tiny_corpus(part.place / "corpus", seconds=(0.3, 0.6)), part.place / "case"
    commands = uses_of_a_checkpoint(corpus, case)
    make_run(part, commands["resume"], case / "run")
    make_run_of_original(part)
    for use, words in commands.items():
        shutil.copytree(part.place / "ours", case / "run")
        part.must_succeed(words)
        case.rename(part.place / use)
    for number in cases(part, part.args.checkpoints):
        rng, canary = part.random(number), part.place / "canary"
        source, use = rng.choice(["ours", "ours", "original"]), rng.choice(list(commands))
        shutil.copytree(part.place / source, case / "run")
        damage, in_bytes = damage_run(rng, case / "run", canary)
        check = same_as(part.place / use) if in_bytes and source == "ours" else lambda run: ""
        damage = f"{source}, {use}: {damage}"
        run_damaged(part, number, commands[use], case, damage, check)
        if canary.exists():
            part.found(number, f"code was executed ({damage})")
            canary.rmdir()


def uses_of_a_checkpoint(corpus, case):
    """Name -> command line."""
    data, file, out = [*on(corpus), *TINY], case / "run" / "checkpoint_1.pt", case / "out"
    return {
        "resume": [*data, "--resume_every", 2, "--nEpoch", 3, "--pathCheckpoint", case / "run"],
        "load": [*data, "--pathCheckpoint", out, "--nEpoch", 1, "--loadCriterion", "--load", file],
        "capture": [*data, "--onlyCapture", "--pathCheckpoint", file, "--captureEverything",
                    "--pathCaptureDS", corpus / "all.txt", "--pathCaptureSave", out],
        "probe": [*data, "--only_classif_metric", "--pathCheckpoint", file, "--speaker_sep",
                  "--linsep_n_epoch", 1, "--linsep_logs_dir", out],
    }  # fmt: skip


def make_run(part, words, directory):
    """Train until something of the third epoch is saved; the result is in `ours`."""
    directory.parent.mkdir()
    run = Run(words, part.place / "log")
    run.wait(lambda: (directory / "checkpoint_1.pt").exists() and run.phase == "training")
    run.signal(signal.SIGTERM)
    run.finish()
    shutil.copytree(directory, part.place / "ours")
    assert (part.place / "ours" / "checkpoint_resume.pt").exists()
    shutil.rmtree(directory.parent)


def make_run_of_original(part):
    """The same run as the original program would have stored it."""
    state = content(part.place / "ours" / "checkpoint_1.pt")
    directory = part.place / "original"
    directory.mkdir()
    torch.save({key: state[key] for key in KEYS_OF_THE_ORIGINAL}, directory / "checkpoint_1.pt")
    save_json(directory / "checkpoint_args.json", state["args"])
    save_json(directory / "checkpoint_logs.json", state["logs"])


def damage_run(rng, run, canary):
    """Damage one or two files of a run's directory; what was done, and whether only to bytes."""
    archives, others = sorted(run.glob("*.pt")), sorted(run.glob("*.json"))
    done, in_bytes = [], True
    for path in rng.sample(archives, k=min(len(archives), rng.choice([1, 1, 2]))):
        kind = rng.choice(["bytes", "bytes", "content", "content", "replaced", "text"])
        if kind == "bytes":
            done.append(corrupt_file(rng, path))
        elif kind == "replaced":
            done.append(replace_file(rng, path))
        elif kind == "content":
            done.append(corrupt_checkpoint(rng, path, canary))
            in_bytes = False
        else:
            other = rng.choice(others)
            done.append(rng.choice([corrupt_file, replace_file, edit_json])(rng, other))
            others.remove(other)
    return "; ".join(done), in_bytes


def same_as(whole):
    """A check that the results are those of the undamaged run."""

    def finding(run):
        case = run.out.parent
        if (whole / "out").exists():
            different = differences(whole / "out", case / "out")
        else:
            different = differences(whole / "run", case / "run", {"checkpoint_2.pt"})
        return f"another result: {different[0]}" if different else ""

    return finding
