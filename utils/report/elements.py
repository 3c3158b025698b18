"""Building blocks of the report's sections: charts, tables and formatted numbers."""

from utils.report.line_chart import Line, draw_lines, legend, readable
from utils.report.markup import tag

MAX_ROWS = 12  # of a table over epochs, besides the first and the best


def chart(title, lines, levels=(), from_zero=False):
    """A line chart over epochs with heading and legend; None if there are no values."""
    drawing = draw_lines(title, lines, levels, from_zero)
    if drawing is None:
        return None
    caption = tag("figcaption", title)
    return tag("figure", caption, legend(lines, levels), drawing, class_="chart")


def single(title, pairs, from_zero=False):
    """A chart with one line."""
    return chart(title, [Line("latest", pairs, "other")], from_zero=from_zero)


def step_chart(title, steps, name, first=1):
    """A chart of a family of lines, `name` 1, 2, ..., the later ones paler."""
    last = max(len(steps) - 1, 1)
    lines = [
        Line(f"{name} {index + first}", pairs, "step", 1 - index / last)
        for index, pairs in enumerate(steps)
    ]
    return chart(title, lines)


def charts(*figures):
    """A grid of charts; None if all of them are None."""
    return tag("div", *figures, class_="charts") if any(figures) else None


def table(head, rows, kind="numbers", caption=None):
    """A table that scrolls sideways if it is too wide.

    A cell that is None becomes `-`; a row that is None becomes dots, for omitted rows.
    """
    left_out = [tag("td", "\N{MIDLINE HORIZONTAL ELLIPSIS}", colspan=len(head))]
    cells = [
        left_out if row is None else [tag("td", "-" if cell is None else cell) for cell in row]
        for row in rows
    ]
    inner = tag(
        "table",
        caption and tag("caption", caption),
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head))),
        tag("tbody", *(tag("tr", *row) for row in cells)),
        class_=kind,
    )
    return tag("div", inner, class_="table")


def epoch_table(epochs, columns, best, caption=None):
    """A table of the first, the best and the latest epochs; columns: name -> {epoch: text}."""
    chosen = {*epochs[:1], best, *epochs[-MAX_ROWS:]}
    rows = []
    for epoch in epochs:
        if epoch in chosen:
            name = f"{epoch} (best)" if epoch == best else epoch
            rows.append([name, *(values.get(epoch) for values in columns.values())])
        elif rows[-1] is not None:
            rows.append(None)
    return table(["epoch", *columns], rows, caption=caption)


def soft(*content):
    return tag("p", *content, class_="soft")


def shown(value):
    return None if value is None else readable(value)


def three_decimals(value):
    return None if value is None else f"{value:.3f}"


def percentage(value):
    return None if value is None else f"{value:.1f} %"


def duration(seconds):
    """An approximate duration for people."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            amount = seconds / size
            return f"{amount:.1f} {unit}" if amount < 10 else f"{amount:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"


def memory(n_bytes):
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"
