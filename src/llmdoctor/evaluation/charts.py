"""Small charts as inline SVG, styled by the page's own CSS classes; every text that goes in is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from llmdoctor.evaluation.formatting import percent, plain, signed
from llmdoctor.evaluation.metrics import Interval
from llmdoctor.evaluation.plot import BOTTOM, TOP, Plot


def kept_curve(thetas: Sequence[float], curves: Mapping[str, Sequence[float]], theta: float | None) -> Markup:
    """Share of kept tokens against θ; the keys of `curves` are its lines' CSS classes."""
    plot = Plot(240, (0, 1), (0, 1), "Share of tokens kept against the threshold θ")
    plot.y_axis([(share, percent(share)) for share in (0, 0.25, 0.5, 0.75, 1)])
    plot.x_axis([(value, plain(value, 1)) for value in (0, 0.2, 0.4, 0.6, 0.8, 1)], "threshold θ")
    for css, shares in curves.items():
        plot.curve(f"curve {css}", thetas, shares)
    if theta is not None:
        _mark_theta(plot, theta)
    return plot.svg()


def _mark_theta(plot: Plot, theta: float) -> None:
    plot.line("mark", theta, plot.y_range[0], theta, plot.y_range[1])
    anchor, shift = ("start", 5) if theta < 0.75 else ("end", -5)
    plot.text(plot.x(theta) + shift, TOP + 11, f"θ = {theta:g}", anchor, "axis")


def importance_histogram(counts: Sequence[int], theta: float | None) -> Markup:
    """Shares of tokens by importance, in equal bins of 0…1; bins wholly below θ are faint."""
    total = max(1, sum(counts))
    shares = [number / total for number in counts]
    top = max(*shares, 0.01) * 1.08
    plot = Plot(240, (0, 1), (0, top), "Histogram of token importance")
    steps = [step for step in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if top / step <= 6] or [0.5]
    plot.y_axis(
        [(n * steps[0], percent(n * steps[0], 1 if steps[0] < 0.01 else 0)) for n in range(int(top / steps[0]) + 1)]
    )
    plot.x_axis([(value, plain(value, 1)) for value in (0, 0.2, 0.4, 0.6, 0.8, 1)], "importance S")
    for index, share in enumerate(shares):
        low, high = index / len(shares), (index + 1) / len(shares)
        css = "bar faint" if theta is not None and high <= theta else "bar"
        plot.bar(css, low, high, share, f"{low:.2f} to {high:.2f}: {percent(share, 1)} of tokens")
    if theta is not None:
        _mark_theta(plot, theta)
    return plot.svg()


def before_after(patient: Sequence[float], guided: Sequence[float], low: float = -1.0, high: float = 1.0) -> Markup:
    """One dot a prompt: the patient's score across, the guided score up; dots above the diagonal got better."""
    low, high = min(low, *patient, *guided), max(high, *patient, *guided)
    plot = Plot(360, (low, high), (low, high), "Score of each prompt, patient against guided")
    ticks = [(low + (high - low) * part / 4, signed(low + (high - low) * part / 4, 1)) for part in range(5)]
    plot.y_axis(ticks)
    plot.x_axis(ticks, "score of the patient alone")
    plot.line("mark", low, low, high, high)
    for before, after in zip(patient, guided, strict=True):
        css = "dot better" if after > before else "dot worse" if after < before else "dot same"
        plot.dot(css, before, after, 4, f"{signed(before)} → {signed(after)}")
    return plot.svg()


def interval_rows(rows: Sequence[tuple[str, str, Interval]], low: float = -1.0, high: float = 1.0) -> Markup:
    """Means with their intervals on one axis; a row is (label, CSS class, interval)."""
    low, high = min(low, *(row[2].low for row in rows)), max(high, *(row[2].high for row in rows))
    height = TOP + BOTTOM + 40 * len(rows)
    plot = Plot(height, (low, high), (0, len(rows)), "Mean scores with 95 % intervals")
    for part in range(5):
        value = low + (high - low) * part / 4
        plot.line("grid", value, 0, value, len(rows))
    plot.x_axis([(low + (high - low) * p / 4, signed(low + (high - low) * p / 4, 1)) for p in range(5)], "mean score")
    for index, (label, css, interval) in enumerate(rows):
        y = len(rows) - index - 0.62
        plot.line(f"whisker {css}", interval.low, y, interval.high, y)
        for end in (interval.low, interval.high):
            plot.line(f"whisker {css}", end, y - 0.1, end, y + 0.1)
        plot.dot(f"dot {css}", interval.mean, y, 4, f"{label}: {signed(interval.mean)}")
        place = (interval.mean - low) / (high - low)
        # A label in the middle of a dot near an end would run off the picture.
        anchor = "start" if place < 0.2 else "end" if place > 0.8 else "middle"
        plot.text(plot.x(interval.mean), plot.y(y) - 10, f"{label} {signed(interval.mean)}", anchor, css="value")
    return plot.svg()
