"""Interrupting runs at random moments, by signals and by full disks, and checking their results."""

import contextlib
import resource
import shutil
import signal
import subprocess
from collections import Counter

from benchmarks.trials.runs import OWN_PROCESS, PHASES, TINY, Run, content, differences, on
from tests.common import write_tiny_corpus
from utils.files import TEMPORARY_PREFIX

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
DISK_SIZE = 4 * 2**20
CHECKPOINTS_ARE_LONGER = 40_000  # bytes


# ------------------------------------------------------------------------------- kills and signals


def everything(corpus, run):
    """A run with everything that a run can do, below one directory."""
    return [
        *on(corpus), *TINY, "--pathCheckpoint", run, "--nEpoch", 4, "--resume_every", 2,
        "--max_size_loaded", 25_000, "--CPCCTC", "--CPCCTCNumMatched", 4,
        "--pathCaptureDS", corpus / "all.txt", "--captureEverything", "--captureEachEpochs", 2,
        "--pathCaptureSave", run / "captures", "--path_phone_data", corpus / "phones.txt",
        "--supervised_classif_metric", "--speaker_sep", "--linsep_n_epoch", 2,
        "--linsep_classif_each_epochs", 2, "--linsep_logs_dir", run / "probes",
        "--linsep_checkpoint_dir", run / "classifiers",
    ]  # fmt: skip


def kill(part):
    interrupt(part, part.args.kills, (signal.SIGKILL,))


def stop(part):
    interrupt(part, part.args.stops, STOPS)


def interrupt(part, total, signals):
    """Interrupt runs at random moments, `total` times in all, and compare their results."""
    corpus, run = write_tiny_corpus(part.place / "corpus", seconds=(0.5, 0.9)), part.place / "run"
    words = everything(corpus, run)
    part.must_succeed(words)
    run.rename(part.place / "whole")
    done, phases = 0, Counter()
    while done < total or run.exists():
        rng, number = part.random(done), None
        trial = Run(words, part.place / "log", forked=done % OWN_PROCESS != OWN_PROCESS - 1)
        if done < total and not wait_for_a_moment(rng, trial):
            number = rng.choice(signals)
            phases[trial.phase] += 1
            trial.signal(number)
            done += 1
            part.progress(done, total)
        trial.finish()
        check_interrupted(part, done, trial, number)
        if trial.status == 0:
            compare(part, done, run)
        elif number is None:
            run.rename(part.place / f"failed_{done}")
    part.counts.update(interruptions=done)
    part.values["moments"] = {name: phases[name] for name in [*PHASES, "own process"]}


def wait_for_a_moment(rng, trial):
    """Wait for any moment of a run, or one in a certain phase; whether it has ended before that."""
    if not trial.forked:
        return trial.wait(lambda: trial.printed()) or trial.wait(patience=rng.uniform(0, 2))
    if rng.random() < 0.4:
        return trial.wait(patience=rng.uniform(0, 2.5))
    phase = rng.choice(list(PHASES))
    ended = trial.wait(lambda: trial.phase == phase)
    return ended or trial.wait(patience=rng.choice([0, rng.uniform(0, 0.05)]))


def check_interrupted(part, done, trial, number):
    """The run ended by the signal, or normally before it; the files that it left can be read."""
    allowed = {0} if number is None else {0, -number, 128 + number}
    if trial.status not in allowed or trial.complaint() not in ("", "stopped\n"):
        part.found(done, f"after {number}: {trial.finding()}; {trial.complaint()}")
    part.counts["ended before" if trial.status == 0 else "interrupted"] += 1
    for path in (part.place / "run").rglob("*.pt"):
        if not path.name.startswith(TEMPORARY_PREFIX):
            try:
                content(path)
            except Exception as error:
                part.found(done, f"{path}: {error}")


def compare(part, done, run):
    """A run that has ended must have written what the undisturbed one wrote; then it is removed."""
    different = differences(part.place / "whole", run)
    for name in different:
        part.found(done, f"another result: {name}")
    part.counts["runs compared"] += 1
    if different:
        run.rename(part.place / f"different_{done}")
    else:
        shutil.rmtree(run)


# --------------------------------------------------------------------------------------- full disk


def disk(part):
    """Fill the disk at random moments, for a while."""
    corpus, place = write_tiny_corpus(part.place / "corpus", seconds=(0.5, 0.9)), part.place / "d"
    run = place / "run"
    words = [*on(corpus), *TINY, "--pathCheckpoint", run, "--nEpoch", 8, "--resume_every", 2]
    done, total = 0, part.args.fills
    with small_disk(part, place) as fill:
        part.must_succeed(words)
        shutil.move(run, part.place / "whole")
        while done < total or run.exists():
            log = place / "log" if done % 2 else None  # where the disk is full, too
            trial, rng = Run(words, part.place / "log", out=log), part.random(done)
            while done < total and not trial.wait(patience=rng.uniform(0, 1.2)):
                before = set(run.glob("checkpoint_[0-9]*.pt"))
                with fill(trial):
                    trial.wait(patience=rng.uniform(0, 1.2))
                done += 1
                part.progress(done, total)
                check_kept(part, done, before)
            trial.finish()
            end_of_filled(part, done, trial, run)
    part.counts.update(fills=done)


@contextlib.contextmanager
def small_disk(part, place):
    """A small file system, and how to fill it; without the right to mount, a limit on the
    length of files instead."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE}", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    part.values["disk"] = "a tmpfs"
    if mounted.returncode:
        part.values["disk"] = f"a limit on file lengths ({mounted.stderr.strip().splitlines()[0]})"
        yield limited_files
        return
    try:
        yield lambda trial: filled_disk(place)
    finally:
        subprocess.run(["umount", str(place)], check=True)


@contextlib.contextmanager
def filled_disk(place):
    with open(place / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    (place / "filler").unlink()


@contextlib.contextmanager
def limited_files(trial):
    """No file that a run writes may be as long as its checkpoints are."""
    with contextlib.suppress(ProcessLookupError):
        unlimited = resource.prlimit(trial.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(trial.pid, resource.RLIMIT_FSIZE, (CHECKPOINTS_ARE_LONGER, unlimited[1]))
    yield
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(trial.pid, resource.RLIMIT_FSIZE, unlimited)


def check_kept(part, done, paths):
    for path in paths:
        try:
            content(path)
        except Exception as error:
            part.found(done, f"{path.name} is lost: {error}")


def end_of_filled(part, done, trial, run):
    """The run resumed with the same result, or refused in one line to resume without space."""
    warned = trial.printed().count("no checkpoint written")
    part.counts.update({"saves put off": warned, "runs": 1})
    finding = trial.finding()
    if finding or (trial.status and str(run) not in trial.complaint()):
        part.found(done, finding or trial.complaint())
    if trial.status:
        part.counts["refused"] += 1
        return
    for name in differences(part.place / "whole", run, {"checkpoint_7.pt", "checkpoint_logs.json"}):
        part.found(done, f"another result: {name}")
    shutil.rmtree(run)
