"""What a structure search found, to be read: a table of the winner's layers, and a plot of all structures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from ...toolkit.adapters.variants.glora import CHOICES
from ...toolkit.adapters.variants.glora_supernet import Choices
from ...toolkit.core.files import write_atomic, write_text

Point = tuple[int, float]  # parameters, measure (lower is better)


def write_report(
    folder: Path,
    path: dict[str, Choices],
    sizes: dict[str, int],
    points: Sequence[Point],
    front: Sequence[Point],
    what: str,
) -> None:
    """Writes structure.txt and pareto.png. ahead: the structures that no smaller one is as good as; what: the points' measure."""
    width = max(len(name) for name in path)
    head = f"{'layer':<{width}}  " + "  ".join(f"{part.upper():<8}" for part in CHOICES) + "  parameters"
    lines = [
        f"{name:<{width}}  " + "  ".join(f"{choice:<8}" for choice in choices) + f"  {sizes[name]:>10}"
        for name, choices in path.items()
    ]
    total = f"{sum(sizes.values())} parameters in {len(path)} layers"
    write_text(folder / "structure.txt", "\n".join([head, *lines, total]) + "\n")
    write_atomic(folder / "pareto.png", plot(points, front, what))


def plot(points: Sequence[Point], front: Sequence[Point], what: str) -> bytes:
    """All structures by size and measure, and the best for each size, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.scatter(*zip(*points, strict=True), s=8, color="0.6", label="structures")
    axes.step(
        *zip(*front, strict=True), where="post", color="tab:blue", marker="o", markersize=4, label="best of each size"
    )
    axes.set(xlabel="parameters", ylabel=what)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
