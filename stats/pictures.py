"""Figures of stats, drawn with matplotlib's objects alone: no window, nothing kept by pyplot."""

from matplotlib.figure import Figure

from utils.files import remove_leftovers
from utils.misc import UserError
from utils.report.plots import save_figure


def new_figure(title, width=8.0, height=4.5):
    """An empty figure of that size in inches, with a heading."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def save_picture(directory, name, figure):
    """Write `<directory>/<name>.png`; the directory is made if it isn't there.

    A run that was killed while it drew draws again when it goes on: its leftovers go then.
    """
    remove_leftovers(directory)
    try:
        save_figure(figure, directory / f"{name}.png")
    except OSError as error:
        raise UserError(
            f"{directory}: the picture of a stat can't be written there "
            f"({error.strerror or error}); name another directory in --captureSetStats"
        ) from error
