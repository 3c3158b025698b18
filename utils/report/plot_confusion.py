"""Picture of which classes a classifier takes for which others."""

import numpy as np
from matplotlib.figure import Figure

from utils.report.plots import save_figure

MOST_TICKS = 80  # numbers that can still be read along an axis


def draw_confusion(counts, path, title, symbols=None):
    """Draw counts (n, n), [true class, named class], as shares of each true class.

    `symbols` (class -> symbol) stand for the classes' numbers where they are known.
    Classes that never occur are left out as rows; the right margin says how often each does.
    """
    counts = np.asarray(counts, dtype=float)
    occurs = np.flatnonzero(counts.sum(axis=1))
    rows = counts[occurs]
    totals = rows.sum(axis=1)
    n_classes = len(counts)
    size = 3.5 + 0.17 * min(n_classes, MOST_TICKS)
    figure = Figure(
        figsize=(size + 1.5, size * max(0.45, len(occurs) / n_classes)), layout="constrained"
    )
    axes = figure.subplots()
    image = axes.imshow(100 * rows / totals[:, None], cmap="Blues", vmin=0, vmax=100, aspect="auto")
    font = {"fontsize": 7}
    columns = range(0, n_classes, 1 + n_classes // MOST_TICKS)
    lines = range(0, len(occurs), 1 + len(occurs) // MOST_TICKS)
    axes.set_xticks(columns, named(columns, symbols), rotation=90, **font)
    axes.set_yticks(lines, named(occurs[lines].tolist(), symbols), **font)
    axes.set(xlabel="named phone", ylabel="true phone", title=title)
    right = axes.secondary_yaxis("right")
    right.set_yticks(lines, [f"{total:,.0f}" for total in totals[lines]], **font)
    right.tick_params(length=0)
    right.set_ylabel("frames")
    figure.colorbar(image, ax=axes, label="share of the true phone's frames (%)", pad=0.02)
    save_figure(figure, path)


def named(classes, symbols):
    """The symbols of classes, and the numbers of those that have none."""
    return [(symbols or {}).get(number, str(number)) for number in classes]
