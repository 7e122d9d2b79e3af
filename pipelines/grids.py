"""Sheets: images in a grid with labels above and at the left, and a text over all of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

MAX_COLUMNS = 8  # cells in a line, where only X varies
SMALLEST, LARGEST = 192, 8192  # pixels: smaller cells are shown larger; no side of a sheet is longer
GAP, LINES = 6, 8  # pixels between cells; lines of a label at most


def draw_grid(images: Sequence[Image.Image], columns: Sequence[str], rows: Sequence[str]) -> Image.Image:
    """Images of one size, row by row, with the labels above and at the left; a single long row goes on below itself."""
    if list(rows) == [""] and len(columns) > MAX_COLUMNS:
        parts = [slice(start, start + MAX_COLUMNS) for start in range(0, len(columns), MAX_COLUMNS)]
        return stack_vertically([draw_grid(images[part], columns[part], rows) for part in parts])
    cell = cell_size(images[0].size, len(columns), len(rows))
    font = label_font(max(14, cell[0] // 24))
    height = round(font.size * 1.3)
    heads = [wrap_text(text, font, cell[0], LINES) for text in columns]
    sides = [wrap_text(text, font, 12 * round(font.size), max(1, min(LINES, cell[1] // height))) for text in rows]
    top = max(len(lines) for lines in heads) * height + GAP
    left = max((round(font.getlength(line)) + 2 * GAP for lines in sides for line in lines), default=0)
    across, down = len(columns) * (cell[0] + GAP) - GAP, len(rows) * (cell[1] + GAP) - GAP
    page = Image.new("RGB", (left + across, top + down), "white")
    draw = ImageDraw.Draw(page)
    for number, lines in enumerate(heads):
        draw_lines(draw, lines, (left + number * (cell[0] + GAP) + cell[0] // 2, (top - GAP) // 2), font, height, "mm")
    for number, lines in enumerate(sides):
        draw_lines(draw, lines, (left - GAP, top + number * (cell[1] + GAP) + cell[1] // 2), font, height, "rm")
    for number, image in enumerate(images):
        row, column = divmod(number, len(columns))
        page.paste(resize_to_cell(image, cell), (left + column * (cell[0] + GAP), top + row * (cell[1] + GAP)))
    return page


def cell_size(size: tuple[int, int], columns: int, rows: int) -> tuple[int, int]:
    """Width and height of a cell on the sheet: small images larger by a whole number, large ones so that the sheet has an end."""
    larger = -(-SMALLEST // min(size)) if min(size) < SMALLEST else 1
    width, height = size[0] * larger, size[1] * larger
    less = min(1.0, LARGEST / (width * columns), LARGEST / (height * rows))
    return max(1, int(width * less)), max(1, int(height * less))


def resize_to_cell(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at its size on the sheet; a whole number larger, its pixels stay squares."""
    whole = size[0] % image.width == 0 and size[1] % image.height == 0
    return image.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def stack_vertically(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets below each other."""
    page = Image.new("RGB", (max(one.width for one in sheets), sum(one.height + GAP for one in sheets) - GAP), "white")
    top = 0
    for one in sheets:
        page.paste(one, (0, top))
        top += one.height + GAP
    return page


def add_heading(page: Image.Image, text: str) -> Image.Image:
    """The sheet with a text above it; its right end is left free, where the browser puts buttons."""
    font = label_font(max(14, page.width // 96))
    height, lines = round(font.size * 1.3), wrap_text(text, font, page.width * 9 // 10 - GAP, LINES)
    whole = Image.new("RGB", (page.width, page.height + (len(lines) + 1) * height), "white")
    whole.paste(page, (0, (len(lines) + 1) * height))
    middle = (len(lines) + 1) * height // 2
    draw_lines(ImageDraw.Draw(whole), lines, (GAP, middle), font, height, "lm")
    return whole


def label_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has more alphabets than Pillow's own font."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def wrap_text(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """The text in lines of at most `width` pixels; words that are too long are cut, and so is what is behind `most` lines."""
    lines, line = [], ""
    for word in text.split():
        if line and font.getlength(f"{line} {word}") > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
        while len(line) > 1 and font.getlength(line) > width:
            fits = max((n for n in range(1, len(line)) if font.getlength(line[:n]) <= width), default=1)
            lines.append(line[:fits])
            line = line[fits:]
    lines += [line] if line else []
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][:-1] + "…"]
    return lines


def draw_lines(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], at: tuple[int, int], font: Any, height: int, anchor: str
) -> None:
    """Lines of text around a height on the page."""
    first = at[1] - (len(lines) - 1) * height / 2
    for number, line in enumerate(lines):
        draw.text((at[0], first + number * height), line, "black", font, anchor=anchor)
