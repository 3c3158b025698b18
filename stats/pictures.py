"""Figures of stats, drawn with matplotlib's objects alone: no window, nothing kept by pyplot."""

from matplotlib.figure import Figure

from utils.files import save_figure
from utils.misc import UserError


def new_figure(title, width=8.0, height=4.5):
    """An empty figure of that size in inches, with a heading."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    figure.suptitle(title)
    return figure


def save_picture(directory, name, figure):
    """Write `<directory>/<name>.png`; the directory is made if it isn't there."""
    try:
        save_figure(directory / f"{name}.png", figure)
    except OSError as error:
        raise UserError(
            f"{directory}: the picture of a stat can't be written there "
            f"({error.strerror or error}); name another directory in --captureSetStats"
        ) from error
