"""Curves as small SVG images that follow the page's colours, light or dark, and say in words what they show."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 220, 62, 26, 16
MAX_POINTS = 500  # points of a curve
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777")
Curve = tuple[Sequence[float], Sequence[float]]


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """The running mean in which each step back counts `weight` times less, without the pull of its start."""
    found, mean, total = [], 0.0, 0.0
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        found.append(mean / total)
    return found


def thin_out(curve: Curve, most: int = MAX_POINTS) -> Curve:
    """No more points than can be seen, the last one always among them."""
    x, y = curve
    stride = max(1, math.ceil(len(x) / most))
    return (list(x[:-1][::stride]) + list(x[-1:]), list(y[:-1][::stride]) + list(y[-1:]))


def draw_curves(title: str, curves: dict[str, Curve], *, faint: Sequence[str] = ()) -> str:
    """One image with a legend; faint: curves that are drawn thin, behind the others. '' without a point."""
    curves = {name: thin_out(curve) for name, curve in curves.items() if len(curve[0])}
    if not curves:
        return ""
    xs = [x for curve in curves.values() for x in curve[0]]
    ys = [y for curve in curves.values() for y in curve[1] if math.isfinite(y)]
    if not ys:
        return ""
    (left, right), (low, high) = value_range(xs), value_range(ys)

    def place(x: float, y: float) -> str:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - 8)
        down = TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = [axis(low, high, left, right)]
    for number, (name, (x, y)) in enumerate(curves.items()):
        points = " ".join(place(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b))
        style = 'stroke-width="1" opacity=".55"' if name in faint else 'stroke-width="2"'
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" {style}/>')
        if len(x) == 1:
            across, down = place(x[0], y[0]).split(",")
            parts.append(f'<circle cx="{across}" cy="{down}" r="3" fill="{colour}"/>')
        parts.append(
            f'<text x="{LEFT + 8 + 150 * number}" y="{TOP - 2}" font-size="12" fill="{colour}" stroke="none">{html.escape(name)}</text>'
        )
    said = "; ".join(f"{name}: {curve[1][-1]:.4g} at step {curve[0][-1]:g}" for name, curve in curves.items())
    return (
        f'<figure class="curve"><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(f"{title}. {said}")}">{"".join(parts)}</svg></figure>'
    )


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """Least and greatest, apart even where all are alike."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05)


def axis(low: float, high: float, left: float, right: float) -> str:
    """Frame, and the least and greatest of both axes."""
    bottom = HEIGHT - BOTTOM
    style = 'font-size="11" fill="currentColor" stroke="none" opacity=".75"'
    lines = f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - 8}" fill="none" stroke="currentColor" opacity=".4"/>'
    marks = [(LEFT - 6, TOP + 10, "end", f"{high:.3g}"), (LEFT - 6, bottom, "end", f"{low:.3g}")]
    marks += [(LEFT, HEIGHT - 8, "start", f"{left:g}"), (WIDTH - 8, HEIGHT - 8, "end", f"step {right:g}")]
    return lines + "".join(f'<text x="{x}" y="{y}" text-anchor="{a}" {style}>{t}</text>' for x, y, a, t in marks)
