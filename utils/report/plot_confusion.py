"""Picture of a confusion matrix."""

import numpy as np
from matplotlib.figure import Figure

from utils.report.plots import save_figure

MAX_TICKS = 80  # labels that are still readable along an axis


def draw_confusion(counts, path, title, symbols=None):
    """Draw counts (n, n), [true class, predicted class], as fractions of each true class.

    symbols: class -> symbol, where known; other classes are labelled with their ids
    Classes that never occur have no row; the right margin gives the number of frames of each.
    """
    counts = np.asarray(counts, dtype=float)
    occurs = np.flatnonzero(counts.sum(axis=1))
    rows = counts[occurs]
    totals = rows.sum(axis=1)
    n_classes = len(counts)
    size = 3.5 + 0.17 * min(n_classes, MAX_TICKS)
    figure = Figure(
        figsize=(size + 1.5, size * max(0.45, len(occurs) / n_classes)), layout="constrained"
    )
    axes = figure.subplots()
    image = axes.imshow(100 * rows / totals[:, None], cmap="Blues", vmin=0, vmax=100, aspect="auto")
    font = {"fontsize": 7}
    columns = range(0, n_classes, 1 + n_classes // MAX_TICKS)
    lines = range(0, len(occurs), 1 + len(occurs) // MAX_TICKS)
    axes.set_xticks(columns, class_names(columns, symbols), rotation=90, **font)
    axes.set_yticks(lines, class_names(occurs[lines].tolist(), symbols), **font)
    axes.set(xlabel="predicted phone", ylabel="true phone", title=title)
    right = axes.secondary_yaxis("right")
    right.set_yticks(lines, [f"{total:,.0f}" for total in totals[lines]], **font)
    right.tick_params(length=0)
    right.set_ylabel("frames")
    figure.colorbar(image, ax=axes, label="fraction of the true phone's frames (%)", pad=0.02)
    save_figure(figure, path)


def class_names(classes, symbols):
    """The symbols of classes, and the ids of those without one."""
    return [(symbols or {}).get(id_, str(id_)) for id_ in classes]
