"""The latest pictures of probes, stats and captures, for embedding in the report."""

import base64
from pathlib import Path
from typing import NamedTuple

from utils.files import remove_leftovers, writing_to
from utils.misc import UserError
from utils.report import plot_capture
from utils.report.elements import soft
from utils.report.markup import tag
from utils.report.values import points, probe_metrics

MAX_WINDOWS = 2  # of a capture that are drawn
LARGEST_PICTURE = 2 * 2**20  # bytes
LARGEST_TOTAL = 8 * 2**20  # bytes of all pictures
PNG = b"\x89PNG"


class Picture(NamedTuple):
    """A PNG file and its place on the page: "probes", "capture" or the name of a stat."""

    group: str
    title: str
    path: Path


def latest_capture(logs, args):
    """The directory of the latest capture, or None; other folders there may be of other runs."""
    if not args.pathCaptureDS or not args.pathCaptureSave:
        return None
    due = (epoch for epoch in reversed(logs["epoch"]) if epoch % args.captureEachEpochs == 0)
    directories = (Path(args.pathCaptureSave, str(epoch)) for epoch in due)
    return next((directory for directory in directories if directory.is_dir()), None)


def draw_capture(directory):
    """Draw the first windows of a capture into its folder `pictures`, if that is possible."""
    folder = directory / "pictures"
    remove_leftovers(folder)
    try:
        reader = plot_capture.open_capture(directory)
        windows = plot_capture.first_windows(reader, MAX_WINDOWS)
        symbols = plot_capture.find_symbols(None, reader.flags)
        with writing_to(folder):
            for _ in plot_capture.draw_windows(reader, windows, symbols, folder):
                pass
    except UserError as error:
        print(f"note: no pictures of the capture in {directory}: {error}")


def find_pictures(logs, args, stats, capture):
    """The latest `Picture`s of probes, stats and captures whose files exist."""
    pictures = []
    for task, _, key in probe_metrics(logs):
        epoch = points(logs, key)[-1][0]
        path = Path(args.linsep_logs_dir or "", str(epoch), task, "confusion.png")
        pictures.append(Picture("probes", f"{task} probe, epoch {epoch}", path))
    for name, directory in stats.items():
        own = [key for key in logs if key.startswith(f"{name}_") and points(logs, key)]
        epoch = max((points(logs, key)[-1][0] for key in own), default=None)
        pictures.append(Picture(name, f"epoch {epoch}", Path(directory, f"{name}_{epoch}.png")))
    if capture:
        paths = sorted(capture.glob("pictures/window_*.png"))[:MAX_WINDOWS]
        pictures += [Picture("capture", f"epoch {capture.name}", path) for path in paths]
    return [picture for picture in pictures if picture.path.is_file()]


def embed(pictures):
    """group -> Markup with its pictures; one that can't be shown is only named."""
    groups, left = {}, LARGEST_TOTAL
    for picture in pictures:
        content, problem = read_picture(picture.path, min(left, LARGEST_PICTURE))
        left -= len(content)
        groups.setdefault(picture.group, []).append(picture_figure(picture, content, problem))
    return {group: tag("div", *figures, class_="pictures") for group, figures in groups.items()}


def read_picture(path, most):
    """(content, None), or (b"", the reason it can't be shown); most: bytes that fit on the page."""
    try:
        if path.stat().st_size > most:
            return b"", "Too large for this page."
        content = path.read_bytes()
    except OSError as error:
        return b"", f"It can't be read: {error.strerror}."
    return (content, None) if content.startswith(PNG) else (b"", "Not a PNG file.")


def picture_figure(picture, content, problem):
    title, path = picture.title, picture.path
    data = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    image = soft(problem) if problem else tag("img", src=data, alt=f"{title}: {path.name}")
    caption = tag("figcaption", f"{title}: ", tag("code", path))
    return tag("figure", caption, image, class_="picture")
