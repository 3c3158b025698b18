"""`report.html`: a run on one page that needs no network, written anew after each epoch.

The page is made of the run's logs, its flags, its corpus, the pictures that probes, stats and
captures have left, and of what utils/report/run_record.py keeps. Nothing in it is a program, and
its own policy forbids the browser to run or fetch any: names and flags in it are foreign text.
"""

import base64
import math
import re
import shlex
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from utils.capture import CaptureReader
from utils.files import atomic_path, remove_leftovers
from utils.misc import UserError
from utils.report import plot_capture
from utils.report.line_chart import Line, draw_lines, legend, readable
from utils.report.markup import Markup, join, tag
from utils.report.run_record import RunRecord

REPORT = "report.html"
STYLE = Path(__file__).with_name("page.css")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

MOST_ROWS = 12  # of a table over epochs, beside the first and the best
MOST_WINDOWS = 2  # of a capture that are drawn
LARGEST_PICTURE = 2 * 2**20  # bytes
LARGEST_TOTAL = 8 * 2**20  # bytes of all pictures

OF_TRAINING = frozenset(
    """epoch iter locLoss_train locAcc_train locLoss_val locAcc_val gradNorm_train learningRate
    saveStep logging_step before_training""".split()
)
PROBE_SCORE = re.compile(r"(?P<task>.+)_best_val_(?P<score>acc|per)")
OF_PROBES = re.compile(r".+_(num_epoch_trained|(best|baseline)_(val|train)_(acc|per))")
NUMBERED = re.compile(r"(?P<family>.+)_(?P<number>\d+)")
SCORES = {"acc": "accuracy", "per": "phone error rate"}


class RunReport:
    """Writes the report of a run.

    args, defaults: the flags of the run and those of an empty command line, as namespaces
    command: list of the words of this call; sets: its AudioDatasets; labels: PhoneLabels or None
    stats: name -> directory of its pictures, of each stat
    """

    def __init__(self, args, defaults, command, sets, labels=None, stats=None):
        self.args, self.defaults, self.stats = args, defaults, dict(stats or {})
        self.command = shlex.join(command)
        self.corpus = [corpus_row(dataset, labels) for dataset in sets]
        self.directory = Path(args.pathCheckpoint)
        self.record = RunRecord(self.directory)

    def write(self, logs, speed):
        """Write `report.html` and `report_data.json` after an epoch.

        logs: content of `checkpoint_logs.json`, that epoch included; speed: its `epoch_speed`, or
        None if it was an earlier process that trained it.
        Raises OSError where they can't be written.
        """
        epoch = logs["epoch"][-1]
        if speed:
            self.record.add(epoch, speed, self.command)
        capture = latest_capture(logs, self.args)
        if capture and capture.name == str(epoch):
            draw_capture(capture)
        pictures = embed(find_pictures(logs, self.args, self.stats, capture))
        with atomic_path(self.directory / REPORT) as temporary:
            Path(temporary).write_text(self.page(logs, pictures), encoding="utf-8")
        if speed:
            self.record.save()  # last: it says that all is written

    def covers(self, epoch):
        """Whether everything was written after this epoch."""
        return any(row["epoch"] == epoch for row in self.record.epochs)

    def page(self, logs, pictures):
        """The whole page; pictures: group -> Markup, as `embed` gives them."""
        args, record = self.args, self.record
        sections = {
            "Training": training_section(logs),
            "Probes": probe_section(logs, args, pictures),
            "Stats": stats_section(logs, args, self.stats, pictures),
            "Capture": capture_section(logs, args, pictures),
            "Corpus": corpus_section(self.corpus),
            "Speed and memory": speed_section(record.epochs),
            "Command and flags": flags_section(record.calls, args, self.defaults),
            "Epochs": epochs_section(logs, record.epochs),
        }
        links = [
            join(tag("a", name, href=f"#{anchor(name)}"), " ")  # a space to break the line at
            for name in sections
        ]
        body = tag(
            "body",
            heading(self.directory, logs, args, record.epochs),
            tag("nav", *links),
            status_tiles(logs, args, record.epochs),
            *(
                tag("section", tag("h2", name), *content, id=anchor(name))
                for name, content in sections.items()
            ),
        )
        title = f"{self.directory.name}: report of a CPC run"
        return join(Markup("<!DOCTYPE html>\n"), tag("html", head(title), body, lang="en"))


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


# ------------------------------------------------------------------------- numbers from the logs


def number(value, scale=1.0):
    """A finite float from a number, or the mean of a list of them; None from anything else."""
    if isinstance(value, list):
        values = [number(item) for item in value]
        return None if None in values or not values else scale * sum(values) / len(values)
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return scale * value if plain and math.isfinite(value) and abs(value) < 1e30 else None


def column(logs, key):
    """[(epoch, value)] of a list in the logs, [] if there is none."""
    values = logs.get(key)
    return list(zip(logs["epoch"], values if isinstance(values, list) else [], strict=False))


def points(logs, key, scale=1.0):
    """[(epoch, number)] of a list in the logs, where it has one."""
    pairs = ((epoch, number(value, scale)) for epoch, value in column(logs, key))
    return [(epoch, value) for epoch, value in pairs if value is not None]


def step_points(logs, key, scale=1.0):
    """`points` of each prediction step."""
    rows = [(epoch, row) for epoch, row in column(logs, key) if isinstance(row, list)]
    n_steps = max((len(row) for _, row in rows), default=0)
    return [
        [
            (epoch, number(row[step], scale))
            for epoch, row in rows
            if step < len(row) and number(row[step]) is not None
        ]
        for step in range(n_steps)
    ]


def before_training(logs, key, scale=1.0):
    """("before training", value) of the validation, or None."""
    values = logs.get("before_training")
    value = number(values.get(key), scale) if isinstance(values, dict) else None
    return None if value is None else ("before training", value)


def probe_scores(logs):
    """(task, score name, its key) of each probe that has found something."""
    matches = [PROBE_SCORE.fullmatch(key) for key in sorted(logs) if points(logs, key)]
    return [(match["task"], match["score"], match[0]) for match in matches if match]


# ---------------------------------------------------------------------------------- page elements


def chart(title, lines, level=None, from_zero=False):
    """A picture of lines over epochs with its heading and legend; None if there are no values."""
    drawing = draw_lines(title, lines, level, from_zero)
    if drawing is None:
        return None
    caption = tag("figcaption", title)
    return tag("figure", caption, legend(lines, level), drawing, class_="chart")


def single(title, pairs, from_zero=False):
    """A chart of one line."""
    return chart(title, [Line("latest", pairs, "other")], from_zero=from_zero)


def step_chart(title, steps, name="step", first=1):
    """A chart of a family of lines, which are paler the later they come."""
    last = max(len(steps) - 1, 1)
    lines = [
        Line(f"{name} {index + first}", pairs, "step", 1 - index / last)
        for index, pairs in enumerate(steps)
    ]
    return chart(title, lines)


def charts(*figures):
    """Charts beside and below each other; None if all of them are."""
    return tag("div", *figures, class_="charts") if any(figures) else None


def table(head, rows, kind="numbers", caption=None):
    """A table that scrolls sideways where there is no room for it. `-` stands for None."""
    lines = [tag("tr", *(tag("td", "-" if cell is None else cell) for cell in row)) for row in rows]
    inner = tag(
        "table",
        caption and tag("caption", caption),
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head))),
        tag("tbody", *lines),
        class_=kind,
    )
    return tag("div", inner, class_="table")


def soft(*content):
    return tag("p", *content, class_="soft")


def few(epochs, always=()):
    """Epochs for a table: the first, the latest ones and those in `always`; `...` where some are
    left out."""
    chosen = {*epochs[:1], *epochs[-MOST_ROWS:], *(set(always) & set(epochs))}
    rows, left_out = [], False
    for epoch in epochs:
        if epoch in chosen:
            rows += ["..."] * left_out + [epoch]
        left_out = epoch not in chosen
    return rows


def shown(value):
    return None if value is None else readable(value)


def percentage(value):
    return None if value is None else f"{value:.1f} %"


def duration(seconds):
    """About how long, as people say it."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def memory(n_bytes):
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


# --------------------------------------------------------------------------------- the top of it


def heading(directory, logs, args, speeds):
    done, wanted = len(logs["epoch"]), args.nEpoch
    text = f"{done} of {wanted} epochs done"
    if speeds and (finished := number(speeds[-1].get("finished"))) is not None:
        text += time.strftime(", the latest on %Y-%m-%d at %H:%M (%Z)", time.localtime(finished))
    if done < wanted and (step := seconds_between_epochs(speeds)):
        text += f"; about {duration(step * (wanted - done))} to go"
    machine = speeds[-1].get("machine") if speeds else None
    return tag(
        "header",
        tag("h1", directory.name),
        tag("p", directory, class_="place"),
        tag("p", text + "."),
        machine and soft(machine),
    )


def seconds_between_epochs(speeds):
    """The usual time from the end of an epoch to that of the next; None if nothing tells."""
    times = [number(row.get("finished")) for row in speeds]
    steps = [
        later - earlier
        for earlier, later in zip(times, times[1:], strict=False)
        if None not in (earlier, later) and later > earlier
    ]
    return statistics.median(steps) if steps else None


def status_tiles(logs, args, speeds):
    """The few figures that one looks for first."""
    losses, accuracies = points(logs, "locLoss_val"), points(logs, "locAcc_val", 100)
    best_loss = min(losses, key=lambda p: p[1], default=None)
    best_accuracy = max(accuracies, key=lambda p: p[1], default=None)
    tiles = [("epochs", len(logs["epoch"]), f"of {args.nEpoch}")]
    if losses:
        best = f"best {readable(best_loss[1])}, epoch {best_loss[0]}"
        tiles.append(("validation loss", readable(losses[-1][1]), best))
    if accuracies:
        best = f"best {percentage(best_accuracy[1])}, epoch {best_accuracy[0]}"
        tiles.append(("validation accuracy", percentage(accuracies[-1][1]), best))
    for task, score, key in probe_scores(logs):
        epoch, value = points(logs, key, 100)[-1]
        tiles.append((f"{task} probe", percentage(value), f"{SCORES[score]}, epoch {epoch}"))
    if speeds:
        tiles += speed_tiles(speeds[-1])
    return tag(
        "div",
        *(
            tag("div", tag("span", name), tag("b", value), tag("span", note), class_="tile")
            for name, value, note in tiles
        ),
        class_="tiles",
    )


def speed_tiles(row):
    seconds = number(row.get("seconds"))
    if seconds:
        waiting = share_waited(row)
        yield (
            "speed",
            f"{readable(windows_per_second(row) or 0)}",
            f"windows/s, data wait {percentage(waiting) or '-'}",
        )
    gpu, host = number(row.get("gpu_memory")), number(row.get("memory"))
    if gpu:
        yield "peak GPU memory", memory(gpu), f"host {memory(host)}" if host else ""
    elif host:
        yield "peak memory", memory(host), "of the process"


def windows_per_second(row):
    windows, seconds = number(row.get("windows")), number(row.get("seconds"))
    return windows / seconds if windows is not None and seconds else None


def share_waited(row):
    """Per cent of the training time."""
    waited, seconds = number(row.get("waited")), number(row.get("seconds"))
    return 100 * waited / seconds if waited is not None and seconds else None


# ------------------------------------------------------------------------------------- sections


def training_section(logs):
    yield charts(
        compared(logs, "Loss", "locLoss"),
        compared(logs, "Accuracy (%)", "locAcc", 100),
        *by_step(logs),
        single("Learning rate", points(logs, "learningRate"), from_zero=True),
        single("Norm of the gradient", points(logs, "gradNorm_train"), from_zero=True),
    )
    yield from last_epoch_by_step(logs)


def compared(logs, title, key, scale=1.0):
    """A chart of training and validation."""
    lines = [
        Line("training", points(logs, f"{key}_train", scale), "training"),
        Line("validation", points(logs, f"{key}_val", scale), "validation"),
    ]
    return chart(title, lines, before_training(logs, f"{key}_val", scale))


def by_step(logs):
    """Charts of the validation by prediction step, where there are several."""
    for title, key, scale in (("Loss", "locLoss_val", 1), ("Accuracy (%)", "locAcc_val", 100)):
        steps = step_points(logs, key, scale)
        if len(steps) > 1:
            yield step_chart(f"{title} by prediction step, validation", steps)


def last_epoch_by_step(logs):
    """A table of the latest epoch's means for each prediction step."""
    names = {"train": "training", "val": "validation"}
    rows = [
        (f"{names[part]} {title}", [shown(number(v, scale)) for v in pairs[-1][1]])
        for title, key, scale in (("loss", "locLoss", 1), ("accuracy (%)", "locAcc", 100))
        for part in ("train", "val")
        if (pairs := column(logs, f"{key}_{part}")) and isinstance(pairs[-1][1], list)
    ]
    n_steps = max((len(values) for _, values in rows), default=0)
    if n_steps > 1:
        head = ["by prediction step", *range(1, n_steps + 1)]
        caption = f"Epoch {logs['epoch'][-1]}"
        yield table(head, [(name, *values) for name, values in rows], caption=caption)


def probe_section(logs, args, pictures):
    found = probe_scores(logs)
    if not args.supervised_classif_metric:
        yield soft("This run has no probes (--supervised_classif_metric).")
    elif not found:
        yield soft(f"None so far: they come every {args.linsep_classif_each_epochs} epochs.")
    yield charts(*(probe_chart(logs, *probe) for probe in found))
    yield from (probe_table(logs, *probe) for probe in found)
    yield pictures.get("probes")


def probe_chart(logs, task, score, key):
    lines = [
        Line("training", points(logs, f"{task}_best_train_{score}", 100), "training"),
        Line("validation", points(logs, key, 100), "validation"),
    ]
    baselines = points(logs, f"{task}_baseline_val_{score}", 100)
    level = (f"always the commonest {task}", baselines[-1][1]) if baselines else None
    return chart(f"{task.capitalize()} probe: {SCORES[score]} (%)", lines, level)


def probe_table(logs, task, score, key):
    names = {
        "validation": key,
        "training": f"{task}_best_train_{score}",
        f"always the commonest {task}": f"{task}_baseline_val_{score}",
    }
    columns = {name: dict(points(logs, other, 100)) for name, other in names.items()}
    columns = {name: values for name, values in columns.items() if values}
    scores = columns["validation"]
    best = (min if score == "per" else max)(scores, key=scores.get)
    rows = [
        [row_name(epoch, best), *(percentage(values.get(epoch)) for values in columns.values())]
        for epoch in few(list(scores), [best])
    ]
    return table(["epoch", *columns], rows, caption=f"{task.capitalize()} probe: {SCORES[score]}")


def row_name(epoch, best):
    return f"{epoch} (best)" if epoch == best else epoch


def stats_section(logs, args, stats, pictures):
    if not args.captureSetStats:
        yield soft("This run has no stats (--captureSetStats).")
    keys = [
        key
        for key in logs
        if key not in OF_TRAINING and not OF_PROBES.fullmatch(key) and points(logs, key)
    ]
    if args.captureSetStats and not keys:
        yield soft("None so far.")
    for name in [*stats, ""]:  # what no stat of this call claims comes last
        own = [key for key in keys if key.startswith(f"{name}_") or not name]
        keys = [key for key in keys if key not in own]
        if own or name in pictures:
            yield tag("h3", name or "Other values")
            prefix = f"{name}_" if name else ""
            yield charts(*value_charts(logs, own, prefix))
            yield pictures.get(name) if name else None


def value_charts(logs, keys, prefix):
    """A chart for each value; those that differ by a number at their end share one."""
    families = {}
    for key in keys:
        match = NUMBERED.fullmatch(key)
        families.setdefault(match["family"] if match else key, []).append(key)
    for family, members in families.items():
        title = family.removeprefix(prefix).replace("_", " ")
        if len(members) == 1:
            title = members[0].removeprefix(prefix).replace("_", " ")
            yield single(title, points(logs, members[0]))
        else:
            members.sort(key=lambda key: int(NUMBERED.fullmatch(key)["number"]))
            first = int(NUMBERED.fullmatch(members[0])["number"])
            steps = [points(logs, key) for key in members]
            yield step_chart(title, steps, "number", first)


def capture_section(logs, args, pictures):
    capture = latest_capture(logs, args)
    if not args.pathCaptureDS:
        yield soft("This run captures nothing (--pathCaptureDS).")
    elif not args.pathCaptureSave:
        yield soft("Only stats are computed; no capture is kept (--pathCaptureSave).")
    elif capture is None:
        yield soft(f"None so far: they come every {args.captureEachEpochs} epochs.")
    else:
        yield tag("p", "The latest is in ", tag("code", capture), ".")
        draws = tag("code", "utils/report/plot_capture.py")
        yield pictures.get("capture") or soft("It has no pictures; ", draws, " draws them.")


def corpus_section(rows):
    head = ["set", "files", "hours", "speakers", "windows", "length of a window", "phone labels"]
    yield table(head, rows)


def corpus_row(dataset, labels):
    """What the report says of an AudioDataset, as cells of a table."""
    n_files = len(dataset.sequences)
    n_all = n_files + dataset.n_unlabelled
    n_labelled = sum(s.name in labels.labels for s in dataset.sequences) if labels else 0
    covered = f"{n_labelled:,} of {n_all:,} files ({100 * n_labelled / n_all:.1f} %)"
    return [
        dataset.title,
        f"{n_files:,}",
        f"{dataset.hours:,.2f}",
        f"{len(set(dataset.speakers.tolist())):,}",
        f"{dataset.n_windows:,}",
        f"{dataset.size_window / plot_capture.SAMPLE_RATE:.2f} s",
        covered if labels else None,
    ]


def speed_section(rows):
    series = {
        "Windows a second, training": windows_per_second,
        "Share of the time spent waiting for data (%)": share_waited,
        "Peak memory of the process (GiB)": lambda row: number(row.get("memory"), 2**-30),
        "Peak GPU memory (GiB)": lambda row: number(row.get("gpu_memory"), 2**-30),
        "Training time of an epoch (s)": lambda row: number(row.get("seconds")),
    }
    if not rows:
        yield soft("Nothing is known.")
    yield charts(
        *(
            single(title, _known((row["epoch"], value(row)) for row in rows), from_zero=True)
            for title, value in series.items()
        )
    )


def _known(pairs):
    return [(epoch, value) for epoch, value in pairs if value is not None]


def flags_section(calls, args, defaults):
    for call in calls:
        text = "The run was started with:" if not call["epoch"] else f"From epoch {call['epoch']}:"
        yield tag("p", text)
        yield tag("pre", tag("code", call["command"]))
    changed = [
        (name, value, vars(defaults).get(name))
        for name, value in sorted(vars(args).items())
        if value != vars(defaults).get(name)
    ]
    rows = [
        [tag("code", f"--{name}"), tag("code", flag_value(value)), flag_value(default)]
        for name, value, default in changed
    ]
    yield table(["flag", "value", "default"], rows, "flags", "Flags that aren't at their default")


def flag_value(value):
    if isinstance(value, list | tuple):
        return shlex.join(map(str, value))
    if isinstance(value, bool):  # first: 1 is equal to True
        return "yes" if value else "no"
    return {None: "none", "": "empty"}.get(value, value)


def epochs_section(logs, speeds):
    columns = {
        "training loss": ("locLoss_train", 1, shown),
        "validation loss": ("locLoss_val", 1, shown),
        "training accuracy": ("locAcc_train", 100, percentage),
        "validation accuracy": ("locAcc_val", 100, percentage),
        "learning rate": ("learningRate", 1, shown),
        "gradient norm": ("gradNorm_train", 1, shown),
        "batches": ("iter", 1, shown),
    }
    values = {
        name: {epoch: show(value) for epoch, value in points(logs, key, scale)}
        for name, (key, scale, show) in columns.items()
    }
    values["windows/s"] = {row["epoch"]: shown(windows_per_second(row)) for row in speeds}
    values["data wait"] = {row["epoch"]: percentage(share_waited(row)) for row in speeds}
    accuracies = dict(points(logs, "locAcc_val"))
    best = max(accuracies, key=accuracies.get, default=None)
    rows = [
        [row_name(epoch, best), *(known.get(epoch) for known in values.values())]
        for epoch in few(logs["epoch"], [best])
    ]
    yield table(["epoch", *values], rows)
    yield soft("Every epoch, with each prediction step: ", tag("code", "checkpoint_logs.json"), ".")


# ------------------------------------------------------------------------------------- pictures


class Picture(NamedTuple):
    """A PNG file, and where on the page it belongs: "probes", "capture" or the name of a stat."""

    group: str
    title: str
    path: Path


def latest_capture(logs, args):
    """The directory of the latest capture; None if there is none."""
    if not args.pathCaptureDS or not args.pathCaptureSave:
        return None
    due = [epoch for epoch in logs["epoch"] if epoch % args.captureEachEpochs == 0]
    directory = Path(args.pathCaptureSave, str(due[-1])) if due else None
    return directory if directory and directory.is_dir() else None


def draw_capture(directory):
    """Draw the first windows of a capture into its folder `pictures`, if they can be drawn."""
    remove_leftovers(directory / "pictures")
    try:
        reader = CaptureReader(directory)
        drawn = [name for name in reader.names if name in plot_capture.DRAWN]
        reader = CaptureReader(directory, drawn or reader.names)
        for index in range(min(MOST_WINDOWS, reader.n_windows)):
            window = reader.window(reader.ranges[0][0] + index)
            waveform = plot_capture.find_waveform(reader, window, None)
            title = plot_capture.title_of(window, *plot_capture.file_border(reader, window))
            figure = plot_capture.draw_window(window, waveform, {}, reader.flags, title)
            path = directory / "pictures" / f"window_{window.window:05d}.png"
            if figure is not None:
                plot_capture.write_picture(figure, path)
    except UserError as error:
        print(f"note: no pictures of the capture in {directory}: {error}")


def find_pictures(logs, args, stats, capture):
    """The latest `Picture`s of probes, stats and captures, as far as they are there."""
    pictures = []
    for task, _, key in probe_scores(logs):
        epoch = points(logs, key)[-1][0]
        path = Path(args.linsep_logs_dir or "", str(epoch), task, "confusion.png")
        pictures.append(Picture("probes", f"{task} probe, epoch {epoch}", path))
    for name, directory in stats.items():
        own = [key for key in logs if key.startswith(f"{name}_") and points(logs, key)]
        epoch = max((points(logs, key)[-1][0] for key in own), default=None)
        pictures.append(Picture(name, f"epoch {epoch}", Path(directory, f"{name}_{epoch}.png")))
    if capture:
        paths = sorted(capture.glob("pictures/window_*.png"))[:MOST_WINDOWS]
        pictures += [Picture("capture", f"epoch {capture.name}", path) for path in paths]
    return [picture for picture in pictures if picture.path.is_file()]


def embed(pictures):
    """group -> Markup with its pictures in it. One that is too large is only named."""
    groups, left = {}, LARGEST_TOTAL
    for group, title, path in pictures:
        try:
            size = path.stat().st_size
            content = path.read_bytes() if size <= min(left, LARGEST_PICTURE) else b""
        except OSError:  # gone since it was found
            continue
        left -= len(content)
        groups.setdefault(group, []).append(picture_figure(title, path, content))
    return {group: tag("div", *figures, class_="pictures") for group, figures in groups.items()}


def picture_figure(title, path, content):
    caption = tag("figcaption", f"{title}: ", tag("code", path))
    if not content.startswith(b"\x89PNG"):
        return tag("figure", caption, soft("Too large for this page."), class_="picture")
    data = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return tag(
        "figure", caption, tag("img", src=data, alt=f"{title}: {path.name}"), class_="picture"
    )
