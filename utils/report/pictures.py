"""The latest pictures of probes, stats and captures, as they are embedded in the report."""

import base64
from pathlib import Path
from typing import NamedTuple

from utils.capture import CaptureReader
from utils.files import remove_leftovers
from utils.misc import UserError
from utils.report import plot_capture
from utils.report.elements import soft
from utils.report.markup import tag
from utils.report.values import points, probe_scores

MOST_WINDOWS = 2  # of a capture that are drawn
LARGEST_PICTURE = 2 * 2**20  # bytes
LARGEST_TOTAL = 8 * 2**20  # bytes of all pictures
PNG = b"\x89PNG"


class Picture(NamedTuple):
    """A PNG file, and where on the page it belongs: "probes", "capture" or the name of a stat."""

    group: str
    title: str
    path: Path


def latest_capture(logs, args):
    """The directory of the latest capture; None if there is none."""
    if not args.pathCaptureDS or not args.pathCaptureSave:
        return None
    due = (epoch for epoch in reversed(logs["epoch"]) if epoch % args.captureEachEpochs == 0)
    directories = (Path(args.pathCaptureSave, str(epoch)) for epoch in due)
    return next((directory for directory in directories if directory.is_dir()), None)


def draw_capture(directory):
    """Draw the first windows of a capture into its folder `pictures`, if they can be drawn."""
    remove_leftovers(directory / "pictures")
    try:
        reader = CaptureReader(directory)
        drawn = [name for name in reader.names if name in plot_capture.DRAWN]
        reader = CaptureReader(directory, drawn or reader.names)
        symbols = plot_capture.find_symbols(None, reader.flags)
        for index in range(min(MOST_WINDOWS, reader.n_windows)):
            window = reader.window(reader.ranges[0][0] + index)
            waveform = plot_capture.find_waveform(reader, window, None)
            title = plot_capture.title_of(window, *plot_capture.file_border(reader, window))
            figure = plot_capture.draw_window(window, waveform, symbols, reader.flags, title)
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
    """group -> Markup with its pictures in it; one that can't be shown is only named."""
    groups, left = {}, LARGEST_TOTAL
    for picture in pictures:
        content, problem = read_picture(picture.path, min(left, LARGEST_PICTURE))
        left -= len(content)
        groups.setdefault(picture.group, []).append(picture_figure(picture, content, problem))
    return {group: tag("div", *figures, class_="pictures") for group, figures in groups.items()}


def read_picture(path, most):
    """(its content, None), or (nothing, why it can't be shown); most: bytes there is room for."""
    try:
        if path.stat().st_size > most:
            return b"", "Too large for this page."
        content = path.read_bytes()
    except OSError as error:
        return b"", f"It can't be read: {error.strerror}."
    return (content, None) if content.startswith(PNG) else (b"", "It is no PNG file.")


def picture_figure(picture, content, problem):
    title, path = picture.title, picture.path
    data = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    image = soft(problem) if problem else tag("img", src=data, alt=f"{title}: {path.name}")
    caption = tag("figcaption", f"{title}: ", tag("code", path))
    return tag("figure", caption, image, class_="picture")
