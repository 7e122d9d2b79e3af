"""The evaluation of a subject's adapter as metrics.json, a sheet of images, one HTML page, and a few lines of text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...pipelines.generate import image_grid
from ...toolkit.core.files import write_png, write_text
from ...toolkit.data.images import load_rgb
from .edits import EditPair
from .html import format_value, heading, html_page, image_figures, paragraph, table
from .subject import DrawnImages

MEANINGS = {
    "likeness": "cosine with photos of the subject (real: what its photos score among each other)",
    "likeness to the target": "cosine with the image that should be made; the reference itself: as if nothing were done",
    "faithfulness to the reference": "cosine with the image that it is made from; the target itself: what the edit leaves",
    "closed": "share of the way from the base's images to real photos; of pairs, from the reference to the target",
    "leak": "the same for prompts without the token: 0 is what the base draws",
    "prompt fidelity": "cosine with the prompt, the rare token left out",
    "diversity": "1 - cosine among images of one prompt",
    "drift on unrelated prompts": "1 - cosine with the base's image of the same seed",
    "copies": "cosine with the nearest training photo; share that is nearer to one than any two photos are to each other",
}


def write_evaluation(
    out: Path, figures: dict[str, Any], drawn: dict[str, DrawnImages], references: Sequence[Path]
) -> str:
    """Writes all three; returns the text."""
    write_text(out / "metrics.json", json.dumps(figures, indent=1))
    side = drawn["tuned"].images[0].size
    photos = [load_rgb(path).resize(side) for path in references[:8]]
    first = first_images(drawn["base"])[:8], first_images(drawn["tuned"])[:8]
    cells = [*pad_row(photos, side), *pad_row([p for p, _ in first[0]], side), *pad_row([p for p, _ in first[1]], side)]
    write_png(out / "pictures.png", image_grid(cells, columns=8))
    parts = [paragraph("Figures with 95 % intervals: bootstraps in which whole prompts are drawn.")]
    parts.append(table(["", "value", "meaning"], metric_rows(figures)))
    parts += [
        heading("Photos"),
        image_figures([(photo, path.name) for photo, path in zip(photos, references, strict=False)]),
    ]
    for name in ("tuned", "base", "class, tuned", "class, base", "unrelated, tuned", "unrelated, base"):
        parts += [heading(name), image_figures(list(zip(drawn[name].images, drawn[name].prompts, strict=True)))]
    return write_page(out, figures, parts)


def write_edit_evaluation(
    out: Path, figures: dict[str, Any], drawn: dict[str, DrawnImages], pairs: Sequence[EditPair], n: int
) -> str:
    """The same of an evaluation on pairs, `n` images each: references, targets, and what was made, one above the other."""
    write_text(out / "metrics.json", json.dumps(figures, indent=1))
    side, shown = pairs[0].target.size, pairs[:8]
    rows = [[pair.references[0] for pair in shown], [pair.target for pair in shown]]
    rows += [own.images[: 8 * n : n] for own in drawn.values()]
    cells = [image.resize(side) for row in rows for image in row]
    write_png(out / "pictures.png", image_grid(cells, columns=len(shown)))
    parts = [paragraph("Figures with 95 % intervals: bootstraps in which whole pairs are drawn.")]
    parts.append(table(["", "value", "meaning"], metric_rows(figures)))
    named = [f"{pair.name}: {pair.caption}" for pair in pairs]
    for name, images in (("references", [p.references[0] for p in pairs]), ("targets", [p.target for p in pairs])):
        parts += [heading(name), image_figures(list(zip(images, named, strict=True)))]
    for name, own in drawn.items():
        parts += [heading(name), image_figures(list(zip(own.images, own.prompts, strict=True)))]
    return write_page(out, figures, parts)


def write_page(out: Path, figures: dict[str, Any], parts: list[str]) -> str:
    """Writes report.html, the settings below; returns the figures as text."""
    parts += [heading("Settings"), table(["", ""], [[k, v] for k, v in figures["settings"].items()])]
    write_text(out / "report.html", html_page("What the adapter is worth", parts))
    return "\n".join(f"{name:44} {value}" for name, value, _ in metric_rows(figures))


def first_images(drawn: DrawnImages) -> list[tuple[Image.Image, str]]:
    """The first image of each prompt."""
    found: dict[str, Image.Image] = {}
    for image, prompt in zip(drawn.images, drawn.prompts, strict=True):
        found.setdefault(prompt, image)
    return [(image, prompt) for prompt, image in found.items()]


def pad_row(cells: list[Image.Image], size: tuple[int, int]) -> list[Image.Image]:
    """Eight cells."""
    return (cells + [Image.new("RGB", size, "white")] * 8)[:8]


def metric_rows(figures: dict[str, Any]) -> list[list[str]]:
    """Name, value and meaning of every figure."""
    found = []
    for name, own in figures.items():
        if name == "settings":
            continue
        for key, value in own.items():
            meaning = MEANINGS.get(key) or MEANINGS.get(name) or MEANINGS.get(name.split(",")[0], "")
            found.append([f"{name}: {key}", format_value(value), meaning])
    return found
