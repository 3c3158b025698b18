"""The data of a run's report besides its logs: speed, memory and commands (`report_data.json`).

`checkpoint_logs.json` must be the same for two runs with the same seed, so it can't hold these. The
file is optional: if it is missing or damaged, a new one is started.
"""

import resource
import sys
import time
from pathlib import Path

import torch

from utils.files import load_json, save_json
from utils.misc import Chance, UserError, counted
from utils.report.markup import printable
from utils.report.values import number

RECORD = "report_data.json"


def epoch_speed(clock, device, processes=1):
    """Speed and memory of an epoch, for `RunRecord.add`: a dict of plain values.

    clock: the stopped `Clock` of its training; its windows are those of all processes.
    Memory is the peak of this process so far, in bytes.
    """
    on_cuda = device.type == "cuda"
    kilobyte = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return {
        "seconds": clock.stopped - clock.started,
        "windows": clock.windows,
        "waited": clock.waited,
        "memory": kilobyte * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "gpu_memory": torch.cuda.max_memory_allocated(device) if on_cuda else None,
        "machine": machine_in_words(device, processes),
        "finished": time.time(),
    }


def machine_in_words(device, processes=1):
    """A one-line description of the machine and the processes of a run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    several = f"{processes} processes, each with " if processes > 1 else ""
    threads = counted(torch.get_num_threads(), "CPU thread")
    return f"{several}{name}, {threads}, PyTorch {torch.__version__}"


def is_finished(args, checkpoint):
    """Whether the run has all its epochs, with logs, curves and report: no audio is needed then."""
    if not checkpoint:
        return False
    done = checkpoint.state["position"][0]
    return done >= args.nEpoch and RunRecord(args.pathCheckpoint).covers(done - 1)


class RunRecord:
    """The content of `report_data.json`.

    epochs: dicts of `epoch_speed`, each with its `epoch`; calls: dicts of each `command` that the
    run was started or resumed with and the first `epoch` it finished. Both are in order of epochs.
    chance: the Chance of the criterion.
    reported: the last epoch that `report.html` and the curves show, -1 before the first.
    """

    def __init__(self, directory):
        self.path = Path(directory, RECORD)
        content = self._content()
        self.epochs = _entries(content.get("epochs"), "machine")
        self.calls = _entries(content.get("calls"), "command")
        self.chance = _chance(content.get("chance"))
        latest = self.epochs[-1]["epoch"] if self.epochs else -1
        reported = content.get("reported")  # older records were written with each report
        self.reported = reported if type(reported) is int else latest

    def _content(self):
        try:
            content = load_json(self.path)
        except UserError:
            return {}
        return content if isinstance(content, dict) else {}

    def covers(self, epoch):
        """Whether everything was written after this epoch."""
        return epoch <= self.reported

    def add(self, epoch, speed, command):
        """Record a finished epoch, replacing the records of it and of later ones."""
        self.epochs = [row for row in self.epochs if row["epoch"] < epoch]
        self.epochs.append({"epoch": epoch, **speed})
        self.reported = min(self.reported, epoch - 1)
        self.calls = [call for call in self.calls if call["epoch"] < epoch]
        command = printable(command)
        if not self.calls or self.calls[-1]["command"] != command:
            self.calls.append({"epoch": epoch, "command": command})

    def save(self):
        content = {
            "calls": self.calls,
            "epochs": self.epochs,
            "reported": self.reported,
            "chance": self.chance._asdict(),
        }
        save_json(self.path, content)


def _entries(value, text):
    """The entries of a list that are dicts with an integer `epoch` and a text, sorted by epoch."""
    valid = [
        entry
        for entry in (value if isinstance(value, list) else [])
        if isinstance(entry, dict)
        and type(entry.get("epoch")) is int
        and isinstance(entry.get(text), str)
    ]
    return sorted(valid, key=lambda entry: entry["epoch"])


def _chance(value):
    value = value if isinstance(value, dict) else {}
    return Chance(number(value.get("loss")), number(value.get("accuracy")))
