"""An SVG picture with axes, markers and labels that keep off each other; every text that goes in is escaped."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from markupsafe import Markup

from llmdoctor.evaluation.formatting import plain

WIDTH = 420
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 40
"""Margins."""

LETTER = 7.8
"""Pixels that a letter of a name may need, whatever the font."""

MARKERS = {
    "circle": "M-1,0A1,1 0 1 1 1,0A1,1 0 1 1 -1,0Z",
    "square": "M-.88,-.88H.88V.88H-.88Z",
    "up": "M0,-1.15L1.1,.8H-1.1Z",
    "down": "M0,1.15L1.1,-.8H-1.1Z",
    "diamond": "M0,-1.25L1.1,0L0,1.25L-1.1,0Z",
    "hexagon": "M-.55,-1H.55L1.1,0L.55,1H-.55L-1.1,0Z",
    "cross": "M-.9,-.9L.9,.9M-.9,.9L.9,-.9",
    "plus": "M0,-1.1V1.1M-1.1,0H1.1",
    "star": "M0,-1.1V1.1M-1,-.55L1,.55M-1,.55L1,-.55",
}
"""Shapes of points as SVG paths of radius about 1."""


def marker(css: str, shape: str, x: float, y: float, radius: float, title: str) -> Markup:
    """A shape of `MARKERS` at pixel coordinates."""
    template = '<path class="{}" d="{}" vector-effect="non-scaling-stroke" transform="translate({} {}) scale({})">'
    return (Markup(template) + Markup("<title>{}</title></path>")).format(css, MARKERS[shape], x, y, radius, title)


def ticks(low: float, high: float, most: int = 8) -> list[tuple[float, str]]:
    """Round values in `low`…`high`, at most `most` of them, each with its text."""
    span = high - low
    exponent = math.floor(math.log10(span / most))
    step = next(
        step
        for power in (exponent, exponent + 1)
        for factor in (1, 2, 5)
        if span / (step := factor * 10.0**power) <= most - 1
    )
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(n * step, plain(n * step, digits).replace(",", "")) for n in range(first, last + 1)]


class Plot:
    """An SVG with two axes; data coordinates in, Markup out.

    Args:
        height: of the picture.
        x_range, y_range: data at the ends of the axes.
        label: for those who cannot see it.
        width: of the picture.
        left, right: margins.
        root: the x axis is spaced by the square root of its values.
    """

    def __init__(
        self,
        height: int,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        label: str,
        *,
        width: int = WIDTH,
        left: int = LEFT,
        right: int = RIGHT,
        root: bool = False,
    ) -> None:
        self.height, self.x_range, self.y_range, self.label = height, x_range, y_range, label
        self.width, self.left, self.right, self.root = width, left, right, root
        self.parts: list[Markup] = []
        self._taken: list[tuple[float, float, float, float]] = []

    def x(self, value: float) -> float:
        """Pixels from the left."""
        low, high = self.x_range
        share = _root_share(value, low, high) if self.root else (value - low) / (high - low)
        return round(self.left + share * (self.width - self.left - self.right), 1)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        low, high = self.y_range
        return round(self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM), 1)

    def line(self, css: str, x1: float, y1: float, x2: float, y2: float) -> None:
        """A straight line."""
        self.parts.append(
            Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
                css, self.x(x1), self.y(y1), self.x(x2), self.y(y2)
            )
        )

    def bar(self, css: str, x1: float, x2: float, y: float, title: str) -> None:
        """A bar from the foot of the picture up to `y`."""
        self.parts.append(
            Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
                css,
                self.x(x1) + 0.5,
                self.y(y),
                round(self.x(x2) - self.x(x1) - 1, 1),
                round(self.y(self.y_range[0]) - self.y(y), 1),
                title,
            )
        )

    def dot(self, css: str, x: float, y: float, radius: float, title: str) -> None:
        """A disc; hovering shows `title`."""
        self.parts.append(
            Markup('<circle class="{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
                css, self.x(x), self.y(y), radius, title
            )
        )

    def marker(self, css: str, shape: str, x: float, y: float, radius: float, title: str) -> None:
        """A point that labels keep off."""
        across, up = self.x(x), self.y(y)
        self._taken.append((across - radius, up - radius, across + radius, up + radius))
        self.parts.append(marker(css, shape, across, up, radius, title))

    def band(self, css: str, xs: Sequence[float], low: Sequence[float], high: Sequence[float]) -> None:
        """The area between two curves."""
        there = [f"{self.x(x)},{self.y(y)}" for x, y in zip(xs, low, strict=True)]
        back = [f"{self.x(x)},{self.y(y)}" for x, y in zip(xs, high, strict=True)]
        self.parts.append(Markup('<polygon class="{}" points="{}"/>').format(css, " ".join(there + back[::-1])))

    def keep_off(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        """Keep labels off the line through these points."""
        pixels = [(self.x(x), self.y(y)) for x, y in zip(xs, ys, strict=True)]
        for (x1, y1), (x2, y2) in itertools.pairwise(pixels):
            steps = max(1, round(math.hypot(x2 - x1, y2 - y1) / 6))
            for step in range(steps + 1):
                x, y = x1 + (x2 - x1) * step / steps, y1 + (y2 - y1) * step / steps
                self._taken.append((x - 1, y - 1, x + 1, y + 1))

    def label_point(self, css: str, x: float, y: float, text: str) -> bool:
        """Write `text` beside a point where it covers nothing; False, and nothing written, where there is no room."""
        across, up, long = self.x(x), self.y(y), LETTER * len(text)
        for anchor, dx, dy in (("start", 10, 4), ("middle", 0, -10), ("middle", 0, 20), ("end", -10, 4),
                               ("start", 8, -8), ("start", 8, 16), ("end", -8, -8), ("end", -8, 16)):  # fmt: skip
            left = across + dx - {"start": 0.0, "middle": long / 2, "end": long}[anchor]
            box = (left, up + dy - 12, left + long, up + dy + 3)
            inside = self.left < box[0] and box[2] < self.width and box[1] >= TOP and box[3] < self.height - BOTTOM
            if inside and not any(_overlap(box, other) for other in self._taken):
                self._taken.append(box)
                self.text(across + dx, up + dy, text, anchor, css)
                return True
        return False

    def curve(self, css: str, xs: Sequence[float], ys: Sequence[float]) -> None:
        """A line through points."""
        points = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in zip(xs, ys, strict=True))
        self.parts.append(Markup('<polyline class="{}" points="{}"/>').format(css, points))

    def text(self, x: float, y: float, text: str, anchor: str = "middle", css: str = "tick") -> None:
        """Text at pixel coordinates."""
        self.parts.append(
            Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(css, x, y, anchor, text)
        )

    def x_axis(self, ticks: Sequence[tuple[float, str]], title: str) -> None:
        """Values with their texts below the picture, and what they are."""
        for value, text in ticks:
            self.text(self.x(value), self.height - BOTTOM + 16, text)
        self.text((self.left + self.width - self.right) / 2, self.height - 5, title, css="axis")

    def y_axis(self, ticks: Sequence[tuple[float, str]]) -> None:
        """Values with their texts to the left, each with a line across."""
        for value, text in ticks:
            self.line("grid", self.x_range[0], value, self.x_range[1], value)
            self.text(self.left - 7, self.y(value) + 4, text, "end")

    def svg(self) -> Markup:
        """The picture."""
        return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            self.width, self.height, self.label, Markup("").join(self.parts)
        )


def _root_share(value: float, low: float, high: float) -> float:
    ends = [math.copysign(math.sqrt(abs(number)), number) for number in (low, value, high)]
    return (ends[1] - ends[0]) / (ends[2] - ends[0])


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
