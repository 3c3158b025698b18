"""Figures of stats, made without pyplot: it would open windows and keep figures in memory."""

from matplotlib.figure import Figure

from utils.files import remove_leftovers, writing_to
from utils.report.plots import save_figure


def new_figure(title, width=8.0, height=4.5):
    """An empty figure with a heading; width and height in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def save_picture(directory, name, figure):
    """Write `<directory>/<name>.png`, creating the directory if needed.

    A run that was killed here draws the picture again after resuming, and then deletes leftovers.
    """
    remove_leftovers(directory)
    with writing_to(directory, "--captureSetStats"):
        save_figure(figure, directory / f"{name}.png")
