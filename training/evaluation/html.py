"""One self-contained HTML page: tables, curves and images inside it, nothing fetched."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
.pictures { display: flex; flex-wrap: wrap; gap: .4rem; }
figure { margin: 0; max-width: 10rem; } figure img { width: 100%; display: block; image-rendering: auto; }
figcaption { font-size: .8rem; opacity: .8; }
svg { max-width: 100%; height: auto; }
"""


def html_page(title: str, parts: Sequence[str]) -> str:
    """The whole page."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>'
        + "\n".join(parts)
        + "</body></html>"
    )


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of texts and numbers."""
    cells = lambda row, tag: "".join(f"<{tag}>{html.escape(format_value(value))}</{tag}>" for value in row)  # noqa: E731
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{cells(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def format_value(value: Any) -> str:
    """A cell's text."""
    if value is None:
        return "-"
    if isinstance(value, dict) and "mean" in value:
        return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def image_figures(images: Sequence[tuple[Image.Image, str]], side: int = 160) -> str:
    """Images with captions, side by side."""
    return '<div class="pictures">' + "".join(image_figure(image, text, side) for image, text in images) + "</div>"


def image_figure(image: Image.Image, text: str, side: int) -> str:
    """One image inside the page; larger ones are reduced."""
    small = image.convert("RGB")
    if max(small.size) > 2 * side:
        small.thumbnail((2 * side, 2 * side))
    buffer = io.BytesIO()
    small.save(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = html.escape(text)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )


def curves_svg(named: dict[str, tuple[Sequence[float], Sequence[float]]], label: str) -> str:
    """Curves (x, y) by name, as an SVG inside the page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(figsize=(7, 3.2))
    for name, (x, y) in named.items():
        axes.plot(x, y, label=name, linewidth=1.4)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.StringIO()
    drawing.tight_layout()
    drawing.savefig(buffer, format="svg")
    pyplot.close(drawing)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
