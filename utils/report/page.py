"""`report.html`: a run on one page that needs no network, rewritten after each epoch.

The page shows the run's logs, flags and corpus, the pictures of probes, stats and captures, and the
record of utils/report/run_record.py. It contains no script, and its policy forbids the browser to
run or fetch any, since file names and flags are untrusted text.
"""

import shlex
import time
from pathlib import Path

from utils.files import atomic_path
from utils.misc import NO_CHANCE
from utils.report.elements import duration, memory, percentage, shown, soft
from utils.report.markup import Markup, join, tag
from utils.report.pictures import draw_capture, embed, find_pictures, latest_capture
from utils.report.run_record import RunRecord
from utils.report.sections import (
    METRICS,
    capture_section,
    corpus_row,
    corpus_section,
    epochs_section,
    flags_section,
    probe_section,
    speed_section,
    stats_section,
    training_section,
)
from utils.report.values import (
    before_training,
    number,
    percent_waited,
    points,
    probe_metrics,
    seconds_between_epochs,
    windows_per_second,
    without_accuracies,
)

REPORT = "report.html"
STYLE = Path(__file__).with_name("page.css")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class RunReport:
    """Writes the report of a run.

    args, defaults: the flags of the run and those of an empty command line, as namespaces
    command: list of the words of this call; sets: its AudioDatasets; labels: PhoneLabels or None
    stats: name -> directory of its pictures, for each stat
    machine: a description of the machine of this call
    step_name: what the values in a row of the logs belong to, None if a row has only one
    has_accuracy: whether the logged accuracies mean anything
    chance: the Chance of the criterion
    """

    def __init__(
        self,
        args,
        defaults,
        command,
        sets,
        labels=None,
        stats=None,
        machine="",
        *,
        step_name="prediction step",
        has_accuracy=True,
        chance=NO_CHANCE,
    ):
        self.args, self.defaults, self.stats = args, defaults, dict(stats or {})
        self.command, self.machine = shlex.join(command), machine
        self.step_name, self.has_accuracy, self.chance = step_name, has_accuracy, chance
        self.corpus = [corpus_row(dataset, labels) for dataset in sets]
        self.directory = Path(args.pathCheckpoint)
        self.record = RunRecord(self.directory)
        self.record.chance = chance

    def write(self, logs, speed=None):
        """Write `report.html` and `report_data.json` after an epoch, or before the first.

        logs: content of `checkpoint_logs.json`; speed: the `epoch_speed` of its latest epoch, or
        None if another process trained that.
        Raises OSError if they can't be written.
        """
        self.add(logs, speed)
        capture = latest_capture(logs, self.args)
        if capture and int(capture.name) > self.record.reported:
            draw_capture(capture)
        pictures = embed(find_pictures(logs, self.args, self.stats, capture))
        with atomic_path(self.directory / REPORT) as temporary:
            Path(temporary).write_text(self.page(logs, pictures), encoding="utf-8")
        self.record.reported = logs["epoch"][-1] if logs["epoch"] else -1
        self.record.save()  # last: it marks the report as complete

    def put_off(self, logs, speed):
        """Write only `report_data.json` after an epoch."""
        self.add(logs, speed)
        self.record.save()

    def add(self, logs, speed):
        if speed:
            self.record.add(logs["epoch"][-1], speed, self.command)

    def covers(self, epoch):
        """Whether the report was written after this epoch."""
        return self.record.covers(epoch)

    def page(self, logs, pictures):
        """The whole page; pictures: group -> Markup, as `embed` returns them."""
        args, speeds = self.args, of_epochs(self.record.epochs, logs)
        this_call = {"epoch": len(logs["epoch"]), "command": self.command}
        calls = of_epochs(self.record.calls, logs) or [this_call]
        if not self.has_accuracy:
            logs = without_accuracies(logs)  # they are zeros
        sections = {
            "Training": training_section(logs, self.step_name, self.chance),
            "Probes": probe_section(logs, args, pictures),
            "Stats": stats_section(logs, args, self.stats, pictures),
            "Capture": capture_section(logs, args, pictures),
            "Corpus": corpus_section(self.corpus),
            "Speed and memory": speed_section(speeds),
            "Command and flags": flags_section(calls, args, self.defaults),
            "Epochs": epochs_section(logs, speeds),
        }
        top = heading(self.directory, logs, args, speeds, self.machine)
        title = f"{self.directory.name}: report of a CPC run"
        return whole_page(title, top, sections, tiles(status(logs, speeds)))


def whole_page(title, heading, sections, before_sections=None):
    """A page with links to its sections; sections: name -> its content, some Markup."""
    links = [
        join(tag("a", name, href=f"#{anchor(name)}"), " ")  # a space to break the line at
        for name in sections
    ]
    body = tag(
        "body",
        heading,
        tag("nav", *links),
        before_sections,
        *(
            tag("section", tag("h2", name), *content, id=anchor(name))
            for name, content in sections.items()
        ),
    )
    return join(Markup("<!DOCTYPE html>\n"), tag("html", head(title), body, lang="en"))


def of_epochs(rows, logs):
    """The rows of a record whose epoch is in the logs: a run may resume from an earlier one."""
    epochs = set(logs["epoch"])
    return [row for row in rows if row["epoch"] in epochs]


def head(title):
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        tag("style", Markup(STYLE.read_text(encoding="utf-8"))),
    )


def anchor(name):
    return name.lower().replace(" ", "-")


# ------------------------------------------------------------------------------ top of the page


def heading(directory, logs, args, speeds, machine):
    """machine: of this call; shown unless the latest epoch has a record of its machine."""
    done, wanted = len(logs["epoch"]), args.nEpoch
    text = f"{done} of {wanted} epochs done"
    if speeds and (finished := number(speeds[-1].get("finished"))) is not None:
        text += time.strftime(", the latest on %Y-%m-%d at %H:%M (%Z)", time.localtime(finished))
    if done < wanted and (step := seconds_between_epochs(speeds)):
        text += f"; about {duration(step * (wanted - done))} to go"
    if speeds:
        machine = speeds[-1].get("machine")
    return tag(
        "header",
        tag("h1", directory.name),
        tag("p", directory, class_="place"),
        tag("p", text + "."),
        machine and soft(machine),
    )


def tiles(figures):
    """The most important figures; each is a name, a value and a note."""
    return tag(
        "div",
        *(
            tag("div", tag("span", name), tag("b", value), tag("span", note), class_="tile")
            for name, value, note in figures
        ),
        class_="tiles",
    )


def status(logs, speeds):
    """The figures for `tiles`: how good the run is, and how fast."""
    yield from validation_status(logs, "loss", "locLoss_val", 1, shown, min)
    yield from validation_status(logs, "accuracy", "locAcc_val", 100, percentage, max)
    for task, metric, key in probe_metrics(logs):
        epoch, value = points(logs, key, 100)[-1]
        yield f"{task} probe", percentage(value), f"{METRICS[metric]}, epoch {epoch}"
    if speeds:
        yield from speed_status(speeds[-1])


def validation_status(logs, what, key, scale, show, best_of):
    values, before = points(logs, key, scale), before_training(logs, key, scale)
    if values:
        epoch, best = best_of(values, key=lambda pair: pair[1])
        yield f"validation {what}", show(values[-1][1]), f"best {show(best)}, epoch {epoch}"
    elif before:
        yield f"validation {what}", show(before.value), before.name


def speed_status(row):
    if speed := windows_per_second(row):
        yield "windows/s", shown(speed), f"data wait {percentage(percent_waited(row)) or '-'}"
    gpu, host = number(row.get("gpu_memory")), number(row.get("memory"))
    if gpu:
        yield "peak GPU memory", memory(gpu), f"host {memory(host)}" if host else ""
    elif host:
        yield "peak memory", memory(host), "of one process"
