"""The curves of a training run."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils.files import atomic_path
from utils.misc import BOUNDARY_RATE, NO_CHANCE, OF_SEGMENTS
from utils.report.values import points, probe_metrics

MAX_MARKERS = 40  # with more epochs, markers would merge and hide dashes


def save_figure(figure, path, dpi=110):
    """Write a figure as PNG, atomically. Figures made with `Figure()` need no closing."""
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


def draw_curves(logs, path, step="prediction step", with_accuracy=True, chance=NO_CHANCE):
    """Draw `checkpoint_logs.json` (a dict): losses, accuracies, probes and the learning rate.

    Thin lines are single steps, from the nearest (dark) to the farthest (light), these two labelled
    with their numbers; thick lines are means, solid for validation and dashed for training.
    step: the unit of the values in a row of the logs, None if a row has only one
    with_accuracy: whether the logged accuracies are meaningful
    chance: the Chance of the criterion, a dotted line
    """
    figure = Figure(figsize=(11, 7.5))
    two_levels = bool(logs.get(f"locLoss_val{OF_SEGMENTS}"))  # with another scale at the right
    margins = {"left": 0.07, "right": 0.93 if two_levels else 0.98, "bottom": 0.07, "top": 0.95}
    (losses, accuracies), (probe, rate) = figure.subplots(
        2, 2, gridspec_kw={**margins, "wspace": 0.35 if two_levels else 0.2, "hspace": 0.3}
    )
    epochs = logs["epoch"]
    each = f": mean, and each {step} in validation" if step else ""
    _draw_steps(losses, epochs, logs, "locLoss", chance.loss)
    losses.set(title=f"loss{each}", ylabel="loss")
    if with_accuracy:
        _draw_steps(accuracies, epochs, logs, "locAcc", chance.accuracy, scale=100)
        accuracies.set(title=f"accuracy{each}", ylabel="accuracy (%)")
    else:
        _write_inside(accuracies, "CTC has no accuracy")
    _draw_probes(probe, epochs, logs)
    _draw_series(rate, epochs, logs.get("learningRate", []), color="C3")
    rate.set_title("learning rate")
    rate.set_ylim(bottom=0)
    if boundaries := logs.get(f"{BOUNDARY_RATE}_val"):
        rate.set_title("learning rate, boundaries per second in validation (right)")
        beside = rate.twinx()
        _draw_series(beside, epochs, boundaries, color="C2")
        beside.tick_params(labelcolor="C2")
        beside.set_ylim(0, 26)  # 25 is the most
    for axes in (losses, accuracies, probe, rate):
        axes.set_xlabel("epoch")
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def _draw_series(axes, epochs, values, **style):
    pairs = zip(epochs, values, strict=False)
    _draw_points(axes, [(epoch, value) for epoch, value in pairs if value is not None], **style)


def _draw_points(axes, pairs, **style):
    if pairs:
        marker = "o" if len(pairs) <= MAX_MARKERS else None
        axes.plot(*zip(*pairs, strict=True), marker=marker, markersize=3, **style)


def _write_beside(axes, point, text):
    axes.annotate(text, point, (4, 0), textcoords="offset points", va="center", fontsize="small")


def _write_inside(axes, text):
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)


def _draw_steps(axes, epochs, logs, key, chance, scale=1):
    for part, dashes, color in (("train", "--", "C0"), ("val", "-", "C1")):
        rows = logs.get(f"{key}_{part}", [])
        steps = max((len(row) for row in rows if row), default=0)
        for step in range(steps if part == "val" else 0):
            shade = str(0.25 + 0.55 * step / max(steps - 1, 1))
            values = [row and row[step] * scale for row in rows]
            axes.plot(epochs[: len(values)], values, color=shade, linewidth=0.8)
            if step in (0, steps - 1) and steps > 1 and values[-1] is not None:
                _write_beside(axes, (epochs[len(values) - 1], values[-1]), step + 1)
        means = [row and scale * sum(row) / len(row) for row in rows]
        name = {"train": "training", "val": "validation"}[part]
        _draw_series(axes, epochs, means, color=color, linestyle=dashes, linewidth=2, label=name)
    if segments := logs.get(f"{key}_val{OF_SEGMENTS}"):
        means = [row and scale * sum(row) / len(row) for row in segments]
        right = axes.twinx()  # their losses are much smaller
        _draw_series(right, epochs, means, color="C2", linewidth=2)
        right.set_ylabel("segments, validation", color="C2")
    if axes.lines and chance is not None:
        axes.axhline(scale * chance, color="0.4", linestyle=":", label="chance")
    if axes.lines:
        axes.legend()


def _draw_probes(axes, epochs, logs):
    """Accuracies of the probes, or the phone error rates of CTC probes."""
    names = {"acc": "accuracy", "per": "phone error rate"}
    for number, (task, metric, key) in enumerate(probe_metrics(logs)):
        label, majority = f"{task}: {names[metric]}", f"{task}_baseline_val_{metric}"
        _draw_points(axes, points(logs, key, 100), color=f"C{number}", label=label)
        style = {"color": f"C{number}", "linestyle": ":", "label": f"{task}: majority class"}
        _draw_points(axes, points(logs, majority, 100), **style)
    axes.set_title("probes: linear separability in validation")
    axes.set_ylabel("%")
    if axes.lines:
        axes.legend()
    else:
        _write_inside(axes, "no probe so far")
