"""Line charts over epochs as small SVGs, without a library, in the colours of the page."""

import math
from typing import NamedTuple

from utils.report.markup import join, tag

WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 8, 24  # margins around the lines
MAX_MARKED = 40  # points drawn as dots
MAX_BUCKETS = 150  # per line; each keeps its lowest and its highest point
MAX_BANDS = 60  # strips along the epochs that show their values under the pointer


class Line(NamedTuple):
    """A named line: points are (epoch, value) with finite values.

    `kind` is a class of the style sheet; `strength`, from 1 to 0, distinguishes lines of one kind.
    """

    name: str
    points: list
    kind: str
    strength: float = 1.0

    @property
    def opacity(self):
        return round(0.3 + 0.7 * self.strength, 2)


class Level(NamedTuple):
    """A named value to compare lines with; `kind` is a class of the style sheet."""

    name: str
    value: float
    kind: str = "level"


class Axes(NamedTuple):
    """The mapping from epochs and values to the picture."""

    first: float
    last: float
    low: float
    high: float

    def x(self, epoch):
        fraction = (epoch - self.first) / (self.last - self.first)
        return round(LEFT + fraction * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value):
        fraction = (value - self.low) / (self.high - self.low)
        return round(HEIGHT - BOTTOM - fraction * (HEIGHT - TOP - BOTTOM), 1)


def draw_lines(title, lines, levels=(), from_zero=False):
    """An `<svg>` of the lines that have points, as Markup; None if none has.

    levels: `Level`s, drawn as horizontal lines; from_zero: start the value axis at zero. Works for
    one epoch and for thousands: long lines are thinned, keeping all peaks.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    axes = fit_axes(lines, levels, from_zero)
    return tag(
        "svg",
        *draw_grid(axes),
        *(draw_level(axes, level) for level in levels),
        *(mark for line in lines for mark in draw_line(axes, line)),
        *draw_bands(axes, lines),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title} over epochs: "
        + ", ".join(f"{line.name} {readable(line.points[-1][1])}" for line in lines[:4]),
    )


def fit_axes(lines, levels, from_zero):
    """Axes that include every point and all levels, with a margin."""
    epochs = [epoch for line in lines for epoch, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    values += [level.value for level in levels]
    values += [0.0] if from_zero else []
    low, high = min(values), max(values)
    size = max(abs(low), abs(high)) or 1.0
    room = 0.06 * (high - low) if high - low > 1e-5 * size else 0.1 * size
    floor = low - room if low < 0 else max(0.0, low - room)
    first, last = min(epochs), max(epochs)
    margin = 0.5 if first == last else 0
    return Axes(first - margin, last + margin, floor, high + room)


def draw_grid(axes):
    values, step = ticks(axes.low, axes.high, 4)
    digits = max(4, 2 + math.ceil(math.log10(max(map(abs, values), default=1) / step + 1)))
    for value in values:
        y = axes.y(value)
        yield tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid")
        yield tag("text", readable(value, digits), x=LEFT - 6, y=y + 4, class_="tick value")
    for epoch in ticks(axes.first, axes.last, 6, whole=True)[0]:
        yield tag("text", epoch, x=axes.x(epoch), y=HEIGHT - 6, class_="tick")
    yield tag("text", "epoch", x=LEFT - 14, y=HEIGHT - 6, class_="tick value")


def draw_level(axes, level):
    y = axes.y(level.value)
    return tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_=level.kind)


def draw_line(axes, line):
    points = [(axes.x(epoch), axes.y(value)) for epoch, value in thinned(line.points)]
    look = {"class_": line.kind, "opacity": line.opacity}
    path = " ".join(f"{x},{y}" for x, y in points)
    yield tag("polyline", points=path, **look)
    if len(points) == 1 or (len(points) <= MAX_MARKED and line.kind != "step"):
        for x, y in points:
            yield tag("circle", cx=x, cy=y, r=2.5, **look)


def draw_bands(axes, lines):
    """Adjacent invisible bands that show an epoch's values under the pointer."""
    values = [dict(line.points) for line in lines]
    epochs = sorted(set().union(*values))
    epochs = epochs[:: math.ceil(len(epochs) / MAX_BANDS)]
    borders = [(one + other) / 2 for one, other in zip(epochs, epochs[1:], strict=False)]
    borders = [axes.first, *borders, axes.last]
    for epoch, start, end in zip(epochs, borders, borders[1:], strict=False):
        text = [f"epoch {epoch}"]
        text += [
            f"{line.name}: {readable(known[epoch])}"
            for line, known in zip(lines, values, strict=True)
            if epoch in known
        ]
        x, width = axes.x(start), round(axes.x(end) - axes.x(start), 1)
        height = HEIGHT - TOP - BOTTOM
        title = tag("title", "\n".join(text))
        yield tag("rect", title, x=x, y=TOP, width=width, height=height, class_="band")


def thinned(points):
    """At most 2 MAX_BUCKETS of the points, in order: the lowest and highest of each bucket."""
    if len(points) <= 2 * MAX_BUCKETS:
        return points
    size = math.ceil(len(points) / MAX_BUCKETS)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def ticks(low, high, about, whole=False):
    """About `about` round numbers from low to high, and the step between them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(m * power for m in (1, 2, 5, 10) if m * power <= 1.5 * rough)
    step = max(1, round(step)) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)], step


def readable(value, digits=4):
    """A number for people: few digits, thousands separators, short exponents."""
    if 1000 <= abs(value) < 1e6 and digits == 4:
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    if "e" in text:
        digits, exponent = text.split("e")
        return f"{digits}e{int(exponent)}"
    return "0" if float(text) == 0 else text


def legend(lines, levels=()):
    """The names and latest values of the lines, as Markup."""
    lines = [line for line in lines if line.points]
    if any(line.kind == "step" for line in lines) and len(lines) > 2:
        lines = [lines[0], lines[-1]]
    entries = [_entry(line.name, line.points[-1][1], line.kind, line.opacity) for line in lines]
    entries += [_entry(*level) for level in levels]
    return tag("p", *entries, class_="legend")


def _entry(name, value, kind, opacity=None):
    swatch = tag(
        "svg",
        tag("line", x1=0, x2=18, y1=5, y2=5, class_=kind, opacity=opacity),
        viewBox="0 0 18 10",
        aria_hidden="true",
    )
    return tag("span", swatch, join(name, " "), tag("b", readable(value)))
