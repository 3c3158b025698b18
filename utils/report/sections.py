"""The sections of the report: functions that yield their content as Markup."""

import re
import shlex

from utils.data.corpus import utterances_by_key
from utils.misc import BOUNDARY_RATE, OF_SEGMENTS, SAMPLE_RATE
from utils.report.elements import (
    chart,
    charts,
    epoch_table,
    percentage,
    shown,
    single,
    soft,
    step_chart,
    table,
    three_decimals,
)
from utils.report.line_chart import Level, Line
from utils.report.markup import tag
from utils.report.pictures import latest_capture
from utils.report.values import (
    before_training,
    best_epoch,
    column,
    nearest_metrics,
    number,
    percent_waited,
    points,
    probe_metrics,
    step_points,
    windows_per_second,
)

NOTHING_YET = "No epoch is finished yet."
METRICS = {"acc": "accuracy", "per": "phone error rate"}
LOSSES = ("locLoss_train", "locAcc_train", "locLoss_val", "locAcc_val")
OF_TRAINING = frozenset(
    (*LOSSES, *(name + OF_SEGMENTS for name in LOSSES), "epoch", "iter", "gradNorm_train",
    "learningRate", "saveStep", "logging_step", "before_training", BOUNDARY_RATE + "_train",
    BOUNDARY_RATE + "_val")
)  # fmt: skip
OF_PROBES = re.compile(
    r".+_(num_epoch_trained|(best|baseline)_(val|train)_(acc|per)(_std)?|knn_\d+_val_acc)"
)
NUMBERED = re.compile(r"(?P<family>.+)_(?P<number>\d+)")


def training_section(logs, step, chance):
    """step, chance: those of `RunReport`."""
    if not logs["epoch"]:
        yield soft(NOTHING_YET)
    yield charts(
        compared(logs, "Loss", "locLoss", chance.loss),
        compared(logs, "Accuracy (%)", "locAcc", chance.accuracy, 100),
        *by_step(logs, step),
        compared(logs, "Loss of segments", "locLoss", None, level=OF_SEGMENTS),
        compared(logs, "Accuracy of segments (%)", "locAcc", None, 100, OF_SEGMENTS),
        *by_step(logs, "step ahead of segments", OF_SEGMENTS),
        compared(logs, "Boundaries per second", BOUNDARY_RATE, None),
        single("Learning rate", points(logs, "learningRate"), from_zero=True),
        single("Norm of the gradient", points(logs, "gradNorm_train"), from_zero=True),
    )
    yield from last_epoch_by_step(logs, step)


def compared(logs, title, key, chance, scale=1.0, level=""):
    """A chart with a training and a validation curve; chance: where to draw it, or None.

    level: the ending of the names of its losses
    """
    lines = [
        Line("training", points(logs, f"{key}_train{level}", scale), "training"),
        Line("validation", points(logs, f"{key}_val{level}", scale), "validation"),
    ]
    before = before_training(logs, f"{key}_val{level}", scale)
    levels = [before] if before else []
    levels += [] if chance is None else [Level("chance", scale * chance, "chance")]
    return chart(title, lines, levels)


def by_step(logs, step, level=""):
    """Validation charts by prediction step or matched frame, if there are several."""
    for title, key, scale in (("Loss", "locLoss_val", 1), ("Accuracy (%)", "locAcc_val", 100)):
        steps = step_points(logs, key + level, scale)
        if len(steps) > 1:
            yield step_chart(f"{title} by {step}, validation", steps, step)


def last_epoch_by_step(logs, step):
    """A table of the latest epoch, by prediction step or matched frame."""
    names = {"train": "training", "val": "validation"}
    kinds = (("loss", "locLoss", 1, three_decimals), ("accuracy", "locAcc", 100, percentage))
    rows = [
        (f"{names[part]} {title}", [show(number(value, scale)) for value in pairs[-1][1]])
        for title, key, scale, show in kinds
        for part in ("train", "val")
        if (pairs := column(logs, f"{key}_{part}")) and isinstance(pairs[-1][1], list)
    ]
    n_steps = max((len(values) for _, values in rows), default=0)
    if n_steps > 1:
        head = [f"by {step}", *range(1, n_steps + 1)]
        caption = f"Epoch {logs['epoch'][-1]}"
        yield table(head, [(name, *values) for name, values in rows], caption=caption)


def probe_section(logs, args, pictures):
    found = probe_metrics(logs)
    if not args.supervised_classif_metric:
        yield soft("This run has no probes (--supervised_classif_metric).")
    elif not found:
        every = args.linsep_classif_each_epochs
        when = f"every {every} epochs" if isinstance(every, int) else f"at epochs {every}"
        yield soft(f"None so far: probes run {when}.")
    yield charts(*(probe_chart(logs, *probe) for probe in found))
    if found:
        yield tag("div", *(probe_table(logs, *probe) for probe in found), class_="tables")
    yield pictures.get("probes")


def probe_chart(logs, task, metric, key):
    lines = [
        Line("training", points(logs, f"{task}_best_train_{metric}", 100), "training"),
        Line("validation", points(logs, key, 100), "validation"),
    ]
    baselines = points(logs, f"{task}_baseline_val_{metric}", 100)
    levels = [Level(f"majority {task}", value) for _, value in baselines[-1:]]
    return chart(f"{task.capitalize()} probe: {METRICS[metric]} (%)", lines, levels)


def probe_table(logs, task, metric, key):
    names = {
        "validation": key,
        "training": f"{task}_best_train_{metric}",
        f"majority {task}": f"{task}_baseline_val_{metric}",
        "standard deviation": f"{key}_std",
    }
    names |= {f"{k} nearest": key for of, k, key in nearest_metrics(logs) if of == task}
    columns = {name: dict(points(logs, other, 100)) for name, other in names.items()}
    validation = columns["validation"]
    best = (min if metric == "per" else max)(validation, key=validation.get)
    columns = {
        name: {epoch: percentage(value) for epoch, value in values.items()}
        for name, values in columns.items()
        if values
    }
    caption = f"{task.capitalize()} probe: {METRICS[metric]}"
    return epoch_table(list(validation), columns, best, caption)


def stats_section(logs, args, stats, pictures):
    keys = keys_of_stats(logs)
    if not keys:
        asked = bool(args.captureSetStats)
        yield soft("None so far." if asked else "This run has no stats (--captureSetStats).")
    for name in [*stats, "units", ""]:  # values of no stat of this call come last
        own = [key for key in keys if key.startswith(f"{name}_") or not name]
        keys = [key for key in keys if key not in own]
        if own or name in pictures:
            yield tag("h3", name or "Other values")
            prefix = f"{name}_" if name else ""
            yield charts(*value_charts(logs, own, prefix))
            yield pictures.get(name) if name else None


def keys_of_stats(logs):
    """The keys of the logs that have values, without those of training and probes."""
    return [
        key
        for key in logs
        if key not in OF_TRAINING and not OF_PROBES.fullmatch(key) and points(logs, key)
    ]


def value_charts(logs, keys, prefix):
    """A chart for each value; values that differ only by a final number share one."""
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
            yield step_chart(title, steps, title, first)


def capture_section(logs, args, pictures):
    capture = latest_capture(logs, args)
    if not args.pathCaptureDS:
        yield soft("This run captures nothing (--pathCaptureDS).")
    elif not args.pathCaptureSave:
        yield soft("Only stats are computed; no capture is kept (--pathCaptureSave).")
    elif capture is None:
        yield soft(f"None so far: there is a capture every {args.captureEachEpochs} epochs.")
    else:
        yield tag("p", "The latest one: ", tag("code", capture))
        draws = tag("code", "utils/report/plot_capture.py")
        yield pictures.get("capture") or soft("It has no pictures; ", draws, " draws them.")


def corpus_row(dataset, labels):
    """An AudioDataset as a row of the table of the corpus."""
    n_files = len(dataset.utterances)
    n_all = n_files + dataset.n_unlabelled
    found = utterances_by_key(dataset.utterances, labels.labels) if labels else {}
    n_labelled = len(set().union(*found.values()))
    covered = f"{n_labelled:,} of {n_all:,} files ({100 * n_labelled / n_all:.1f} %)"
    return [
        dataset.title,
        f"{n_files:,}",
        f"{dataset.hours:,.2f}",
        f"{len(set(dataset.speakers.tolist())):,}",
        f"{dataset.n_windows:,}",
        f"{dataset.size_window / SAMPLE_RATE:.2f} s",
        covered if labels else None,
    ]


def corpus_section(rows):
    head = "set, files, hours, speakers, windows, length of a window, phone labels"
    yield table(head.split(", "), rows)


def speed_section(rows):
    series = {
        "Windows/s in training": windows_per_second,
        "Data wait (% of the training time)": percent_waited,
        "Peak memory of one process (GiB)": lambda row: number(row.get("memory"), 2**-30),
        "Peak GPU memory (GiB)": lambda row: number(row.get("gpu_memory"), 2**-30),
        "Training time of an epoch (s)": lambda row: number(row.get("seconds")),
    }
    if not rows:
        yield soft("Not measured yet.")
    yield charts(
        *(
            single(
                title,
                [(row["epoch"], value(row)) for row in rows if value(row) is not None],
                from_zero=True,
            )
            for title, value in series.items()
        )
    )


def flags_section(calls, args, defaults):
    for call in calls:
        text = "The run was started with:" if not call["epoch"] else f"From epoch {call['epoch']}:"
        yield tag("p", text)
        words = re.split(r"(?<= )(--\S+)", call["command"])
        flags = [tag("span", word) if word.startswith("--") else word for word in words]
        yield tag("pre", tag("code", *flags))
    changed = [
        (name, value, default)
        for name, default in vars(defaults).items()  # in the order of --help
        if (value := getattr(args, name)) != default
    ]
    rows = [
        [tag("code", f"--{name}"), tag("code", flag_value(value)), flag_value(default)]
        for name, value, default in changed
    ]
    yield table(["flag", "value", "default"], rows, "flags", "Flags that differ from their default")


def flag_value(value):
    if isinstance(value, list | tuple):
        return shlex.join(map(str, value))
    if isinstance(value, bool):  # before the lookup below: 1 equals True
        return "yes" if value else "no"
    return {None: "none", "": "empty"}.get(value, value)


def epochs_section(logs, speeds):
    if not logs["epoch"]:
        yield soft(NOTHING_YET)
        return
    columns = {
        "training loss": ("locLoss_train", 1, three_decimals),
        "validation loss": ("locLoss_val", 1, three_decimals),
        "training accuracy": ("locAcc_train", 100, percentage),
        "validation accuracy": ("locAcc_val", 100, percentage),
        "validation loss, segments": ("locLoss_val" + OF_SEGMENTS, 1, three_decimals),
        "validation accuracy, segments": ("locAcc_val" + OF_SEGMENTS, 100, percentage),
        "boundaries per second": (BOUNDARY_RATE + "_val", 1, shown),
        "learning rate": ("learningRate", 1, shown),
        "gradient norm": ("gradNorm_train", 1, shown),
        "batches": ("iter", 1, shown),
    }
    values = {
        name: {epoch: show(value) for epoch, value in points(logs, key, scale)}
        for name, (key, scale, show) in columns.items()
    }
    values["windows/s"] = {row["epoch"]: shown(windows_per_second(row)) for row in speeds}
    values["data wait"] = {row["epoch"]: percentage(percent_waited(row)) for row in speeds}
    values = {name: by_epoch for name, by_epoch in values.items() if by_epoch}
    yield epoch_table(logs["epoch"], values, best_epoch(logs))
    yield soft("The complete logs of every epoch: ", tag("code", "checkpoint_logs.json"), ".")
