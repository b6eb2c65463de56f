"""The arena's charts: frontiers, intervals by method, signal along a response, and sheets to save them as."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmdoctor.bench.report.looks import SERIES_CSS, Look, colours_css
from llmdoctor.evaluation.formatting import percent
from llmdoctor.evaluation.metrics import Interval
from llmdoctor.evaluation.plot import LETTER, Plot, ticks

WIDTH = 520
_SHEET_CSS = """
svg text { font: 12px Inter, "Segoe UI", "Helvetica Neue", Arial, sans-serif; fill: #5f6770; }
svg .axis { font-size: 12.5px; }
svg .grid { stroke: #e4e1db; } svg .mark { stroke: #5f6770; stroke-dasharray: 3 4; }
svg .sheet { fill: #22262b; font-size: 15px; font-weight: 600; }
"""


@dataclass(frozen=True, slots=True)
class Spot:
    """A method at one setting: where it is, what hovering tells, and bounds where they are known."""

    x: float
    y: float
    title: str
    x_bounds: tuple[float, float] | None = None
    y_bounds: tuple[float, float] | None = None
    faint: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """One method's spots, in the order of its knob; a line joins those that are not faint."""

    look: Look
    spots: Sequence[Spot]


@dataclass(frozen=True, slots=True)
class Bar:
    """An interval with its look and its figures in words; faint beside another that matters more."""

    look: Look
    interval: Interval
    text: str
    faint: bool = False


@dataclass(frozen=True, slots=True)
class Band:
    """A curve with bounds, point by point."""

    look: Look
    xs: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def frontier(
    series: Sequence[Series],
    x_title: str,
    label: str,
    *,
    root: bool = False,
    marked: tuple[float, float, str] | None = None,
    y_title: str = "",
    height: int = 400,
) -> Markup:
    """Spots joined by method, LLMdoctor on top; names stand beside spots where there is room.

    Args:
        series: what is drawn; all numbers finite.
        x_title: of the x axis.
        label: for those who cannot see it.
        root: space the x axis by square roots.
        marked: x, y and name of a point that two dotted lines cross.
        y_title: above the y axis.
        height: of the picture.
    """
    spots = [spot for entry in series for spot in entry.spots]
    xs = [x for spot in spots for x in (spot.x, *(spot.x_bounds or ()))] + ([marked[0]] if marked else [])
    ys = [y for spot in spots for y in (spot.y, *(spot.y_bounds or ()))] + ([marked[1]] if marked else [])
    # An axis of roots begins or ends at 0, or holds it: estimates of a KL may all be negative.
    x_range = (min(0.0, *xs), max(0.0, *xs) * 1.06 + 1e-6) if root else _padded(xs)
    plot = Plot(height, x_range, _padded(ys), label, width=WIDTH, root=root)
    plot.y_axis(ticks(*plot.y_range))
    plot.x_axis(_root_ticks(*x_range) if root else ticks(*x_range), x_title)
    if y_title:
        plot.text(plot.left, 9, y_title, "start", "axis")
    if marked:
        plot.line("mark", x_range[0], marked[1], x_range[1], marked[1])
        plot.line("mark", marked[0], plot.y_range[0], marked[0], plot.y_range[1])
        plot.keep_off(x_range, (marked[1], marked[1]))
        plot.keep_off((marked[0], marked[0]), plot.y_range)
    ordered = sorted(series, key=lambda entry: entry.look.strong)
    for entry in ordered:
        _draw(plot, entry)
    for entry in sorted(series, key=lambda entry: (not entry.look.strong, -len(entry.spots))):
        # The name stands at the far end of a curve if there is room, else at another of its spots.
        for spot in reversed(entry.spots):
            if not spot.faint and plot.label_point(f"name {entry.look.css}", spot.x, spot.y, entry.look.name):
                break
    if marked:
        plot.label_point("axis", marked[0], marked[1], marked[2])
    return plot.svg()


def _draw(plot: Plot, entry: Series) -> None:
    look = entry.look
    for spot in entry.spots:
        if spot.x_bounds:
            plot.line(look.classes("range"), spot.x_bounds[0], spot.y, spot.x_bounds[1], spot.y)
            plot.keep_off(spot.x_bounds, (spot.y, spot.y))
        if spot.y_bounds:
            plot.line(look.classes("range"), spot.x, spot.y_bounds[0], spot.x, spot.y_bounds[1])
            plot.keep_off((spot.x, spot.x), spot.y_bounds)
    joined = [spot for spot in entry.spots if not spot.faint]
    if len(joined) > 1:
        xs, ys = [spot.x for spot in joined], [spot.y for spot in joined]
        plot.curve(look.classes("line"), xs, ys)
        plot.keep_off(xs, ys)
    for spot in entry.spots:
        css = look.classes("point") + (" faint" if spot.faint else "")
        plot.marker(css, look.marker, spot.x, spot.y, 5.4 if look.strong else 4.2, spot.title)


def intervals(
    rows: Sequence[tuple[str, Sequence[Bar]]], x_title: str, label: str, *, centre: float | None = None
) -> Markup:
    """Means with intervals, one below the other; a row may hold two, the first of which has its figures written.

    Args:
        rows: name and intervals of each.
        x_title: of the axis.
        label: for those who cannot see it.
        centre: value that a line marks, kept in the picture.
    """
    bars = [bar for _, row in rows for bar in row]
    values = [value for bar in bars for value in bar.interval] + ([] if centre is None else [centre])
    step = 34 if any(len(row) > 1 for _, row in rows) else 26
    left = 24 + round(LETTER * max(len(name) for name, _ in rows))
    right = 20 + round(LETTER * max(len(row[0].text) for _, row in rows))
    plot = Plot(52 + step * len(rows), _padded(values), (0, len(rows)), label, width=WIDTH, left=left, right=right)
    for value, _ in (marks := _marks_apart(plot)):
        plot.line("grid", value, 0, value, len(rows))
    plot.x_axis(marks, x_title)
    if centre is not None:
        plot.line("centre", centre, 0, centre, len(rows))
    for index, (name, row) in enumerate(rows):
        middle = len(rows) - index - 0.5
        css = "row strong" if row[0].look.strong else "row"
        plot.text(plot.left - 12, plot.y(middle) + 4, name, "end", css)
        plot.text(plot.width - plot.right + 12, plot.y(middle) + 4, row[0].text, "start", css)
        for place, bar in enumerate(row):
            y = middle + (0 if len(row) == 1 else 0.17 - 0.34 * place)
            faint = " faint" if bar.faint else ""
            plot.line(f"range {bar.look.css} strong{faint}", bar.interval.low, y, bar.interval.high, y)
            css = f"point {bar.look.css}{faint}" + (" hollow" if bar.faint or bar.look.hollow else "")
            plot.marker(css, bar.look.marker, bar.interval.mean, y, 4.6, f"{name}: {bar.text}")
    return plot.svg()


def _marks_apart(plot: Plot) -> list[tuple[float, str]]:
    """Marks of the x axis, as many of six as have room for their texts side by side; long names leave it little."""
    room = plot.width - plot.left - plot.right
    found = [ticks(*plot.x_range, most) for most in range(6, 1, -1)]
    return next((marks for marks in found if room > sum(LETTER * (len(text) + 1) for _, text in marks)), found[-1])


def dynamics(bands: Sequence[Band], label: str) -> Markup:
    """Normalised gap along the response, with bounds; the straight line is a signal spread evenly."""
    values = [value for band in bands for value in (*band.low, *band.high)]
    # The names stand to the right of their curves, in bold.
    right = round(20 + 1.1 * LETTER * max(len(band.look.name) for band in bands))
    plot = Plot(330, (0, 1), _padded([0.0, 1.0, *values]), label, width=WIDTH, right=right)
    plot.y_axis(ticks(*plot.y_range))
    plot.x_axis([(share, percent(share)) for share in (0, 0.25, 0.5, 0.75, 1)], "part of the response read")
    plot.line("mark", 0, 0, 1, 1)
    for band in bands:
        plot.band(band.look.classes("area"), band.xs, band.low, band.high)
    for band in sorted(bands, key=lambda band: band.look.strong):
        plot.curve(band.look.classes("line"), band.xs, band.mean)
    for y, band in zip(_apart([plot.y(band.mean[-1]) for band in bands], 15), bands, strict=True):
        plot.text(plot.width - plot.right + 8, y + 4, band.look.name, "start", f"name {band.look.css}")
    return plot.svg()


def sheet(title: str, note: str, chart: Markup, looks: Iterable[Look] = ()) -> str:
    """A chart as a file of its own, on white, with its title and note above and a key below."""
    lines = textwrap.wrap(note, 80)
    top = 36 + 17 * len(lines)
    height = int(str(chart).split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split()[1])
    key, x, y = [], 14.0, top + height + 8.0
    for look in looks:
        wide = 48 + LETTER * len(look.name)
        if x + wide > WIDTH and x > 14:
            x, y = 14.0, y + 20
        key += [look.swatch(x, y), Markup('<text x="{}" y="{}">{}</text>').format(x + 36, y + 11, look.name)]
        x += wide
    total = round(y + 26) if key else top + height + 8
    inner = str(chart).replace("<svg ", f'<svg y="{top}" width="{WIDTH}" height="{height}" ', 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" width="{WIDTH}" height="{total}">',
        f"<style>{_SHEET_CSS} {SERIES_CSS} {colours_css(dark=False)}</style>",
        f'<rect width="{WIDTH}" height="{total}" fill="#fff"/>',
        Markup('<text class="sheet" x="14" y="22">{}</text>').format(title),
        *(Markup('<text x="14" y="{}">{}</text>').format(42 + 17 * place, line) for place, line in enumerate(lines)),
        inner,
        *key,
        "</svg>\n",
    ]
    return "".join(map(str, parts))


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or max(0.05 * abs(high), 0.01)
    return low - pad, high + pad


def _root_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """0 and 1, 2, 3, 5, 10 … as far apart as square roots leave room for."""
    shown: list[tuple[float, str]] = [(0.0, "0")]
    for power in range(-3, 7):
        for factor in (1, 2, 3, 5):
            value = factor * 10.0**power
            gap = (math.sqrt(value) - math.sqrt(shown[-1][0])) / (math.sqrt(high) + math.sqrt(max(0.0, -low)))
            if value <= high and gap > 0.11:
                shown.append((value, f"{value:g}"))
    return shown


def _apart(places: Sequence[float], least: float) -> list[float]:
    """Moved down as little as needed to stand at least so far apart."""
    moved = list(places)
    last = -math.inf
    for index in sorted(range(len(places)), key=lambda index: places[index]):
        last = moved[index] = max(places[index], last + least)
    return moved
