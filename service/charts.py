"""The page's pictures: lines and bars, as SVG and HTML that needs no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

MARGIN = 2.0  # pixels above and below a line


def lines(
    series: Mapping[str, Sequence[float | None]], label: str, *, width: int, height: int, low: float
) -> str:
    """Return lines over the same range, each of the CSS class of its name.

    Parameters
    ----------
    series
        Of each line its values from left to right; where one is None the line is interrupted.
    label
        What is read to who cannot see it.
    width, height
        Of the drawing, in pixels; the page may stretch it.
    low
        What the drawing's lower edge stands for, unless a value is less.
    """
    values = [value for own in series.values() for value in own if value is not None]
    low, high = min([low, *values]), max([low, *values])
    span = max(high - low, 1e-12)

    def place(number: int, value: float, count: int) -> str:
        x = width * number / max(1, count - 1)
        y = height - MARGIN - (height - 2 * MARGIN) * (value - low) / span
        return f"{x:.1f},{y:.1f}"

    drawn = []
    for name, own in series.items():
        for part in _whole_parts(own):
            corners = " ".join(place(number, value, len(own)) for number, value in part)
            drawn.append(f'<polyline class="{escape(name)}" points="{corners}"/>')
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{"".join(drawn)}</svg>'
    )


def _whole_parts(values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """Return the runs of values without a gap, each value with its place."""
    parts: list[list[tuple[int, float]]] = [[]]
    for place, value in enumerate(values):
        if value is not None:
            parts[-1].append((place, value))
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def bar(share: float, text: str) -> str:
    """Return a bar that is filled to a share, at most 1, with a text beside it."""
    percent = 100.0 * min(1.0, max(0.0, share))
    return (
        f'<span class="bar"><i style="width:{percent:.1f}%"></i></span> '
        f"<small>{escape(text)}</small>"
    )
