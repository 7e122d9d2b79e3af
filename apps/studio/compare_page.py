"""Compare: one sheet of pictures over one or two things that vary, and what was measured on each picture."""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image, ImageDraw, ImageFont

from ...pipelines.generate import Recipe
from ...toolkit.data.pictures import load_rgb
from ...toolkit.data.subjects import find_samples
from ...toolkit.errors import UserError, nearest
from ...toolkit.formats.source import adapter_path, facts_of
from ...toolkit.metrics import EMBEDDED_CLIP, ClipScorer, clip_i, clip_t, leave_one_out
from ...toolkit.models.diffusion import EMBEDDED
from ...toolkit.runs import write_png
from ...training.config import PictureConfig
from .generate_page import progress, recipe_from
from .pipes import LOOK, Drawing, Pipes, Stopped, followed, kept
from .places import Places
from .studio import Studio
from .words import note, plainly, time_left

MOST = 64  # cells
NOTHING = "nothing"  # along an axis that does not vary
BARE = "none"  # in the place of an adapter's name
FIELDS = {
    "adapter": "adapter", "checkpoint": "adapter", "strength": "strength", "seed": "seed", "prompt": "prompt",
    "guidance": "guidance_scale", "steps": "steps",
}  # fmt: skip
LIMITS = {  # least, most, whether whole
    "strength": (-10, 10, False), "seed": (0, 2**32 - 1, True), "guidance": (0, 100, False), "steps": (1, 1000, True),
    "width": (0, 8192, True), "height": (0, 8192, True),
}  # fmt: skip
PROPOSED = {"strength": "0\n0.5\n1", "seed": "0\n1\n2", "guidance": "1\n2\n4", "steps": "10\n25\n50"}
HEADERS = ["X", "Y", "prompt fidelity (CLIP-T)", "likeness to the photos (CLIP-I)", "file"]
ACROSS = 8  # cells in a line, where only X varies
SMALLEST, LARGEST = 192, 8192  # pixels: smaller cells are shown larger; no side of a sheet is longer
PATIENCE = 300  # seconds to wait until a drawing stops behind its step
GAP, LINES = 6, 8  # pixels between cells; lines of a label at most


# ---------------------------------------------------------------------------------------------- what varies


@dataclass(frozen=True)
class Axis:
    """What varies along one side of the sheet, from cell to cell."""

    what: str
    labels: tuple[str, ...]
    values: tuple[Any, ...]


def number_of(what: str, value: Any) -> Any:
    """A number of a box or of an axis.

    Raises:
        UserError: naming what is no such number.
    """
    least, most, whole = LIMITS[what]
    try:
        found = float(str(value).replace("_", "?"))  # Python alone reads 1_000 as a number
    except ValueError:
        found = math.nan
    if not least <= found <= most or (whole and found != int(found)):
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{str(value)[:60]!r} does not fit as {what}: give {kind} from {least} to {most}.")
    return int(found) if whole else found


def known_name(what: str, name: str, known: Mapping[str, Path]) -> str:
    """The name of an adapter, or of a measured step.

    Raises:
        UserError: when there is none of that name.
    """
    names = names_for(what, known)
    if not names:
        raise UserError(f"There is no {what} to compare yet: train one, with evaluate_every for its checkpoints.")
    if name not in names:
        raise UserError(f"{str(name)[:80]!r} is no {what} here.{nearest(str(name), names)}")
    return name


def names_for(what: str, known: Mapping[str, Path]) -> list[str]:
    """The adapters, or only those that are a run's measured steps."""
    return [name for name in known if what != "checkpoint" or re.search(r" at step \d+$", name)]


def value_of(what: str, text: str, known: Mapping[str, Path]) -> Any:
    """What a line of an axis means.

    Raises:
        UserError: naming the line that does not fit.
    """
    if what in LIMITS:
        return number_of(what, text)
    if what == "prompt":
        return text
    return "" if what == "adapter" and text == BARE else known_name(what, text, known)


def axis_of(side: str, what: str, text: str, known: Mapping[str, Path]) -> Axis:
    """The axis that two boxes mean. side: X or Y.

    Raises:
        UserError: for no value, one that does not fit, or one that stands twice.
    """
    if what == NOTHING:
        return Axis(NOTHING, ("",), (None,))
    if what not in FIELDS:
        raise UserError(f"{side} cannot vary {str(what)[:60]!r}.{nearest(str(what), FIELDS)}")
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{side} has no values: write down what the {what} should be, a line each.")
    values: list[Any] = []
    for line in lines:
        value = value_of(what, line, known)
        if value in values:
            raise UserError(f"{line[:60]!r} stands twice among the values of {side}: remove one of them.")
        values.append(value)
    return Axis(what, tuple(label_of(what, line) for line in lines), tuple(values))


def label_of(what: str, text: str) -> str:
    """What the sheet calls a value."""
    if what == "adapter" and text == BARE:
        return "no adapter"
    return f"{what} {text}" if what in LIMITS else text


def check_axes(columns: Axis, rows: Axis) -> None:
    """Raises UserError for axes that make no grid."""
    if columns.what == NOTHING:
        raise UserError("Nothing varies along X: choose what should.")
    if rows.what != NOTHING and FIELDS[columns.what] == FIELDS[rows.what]:
        raise UserError(
            f"X varies the {columns.what} and Y the {rows.what}, which is the same setting: choose another for Y."
        )
    cells = len(columns.values) * len(rows.values)
    if cells > MOST:
        raise UserError(f"{len(columns.values)} x {len(rows.values)} are {cells} cells, more than {MOST}: take fewer.")


# ---------------------------------------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Boxes:
    """What the page's boxes hold, as it comes."""

    base: str = "tiny"
    adapter: str = ""
    strength: float = 1.0
    prompt: str = ""
    negative: str = ""
    seed: float = 0
    steps: float = 25
    guidance: float = 2.0
    width: float = 0
    height: float = 0
    x: str = NOTHING
    x_values: str = ""
    y: str = NOTHING
    y_values: str = ""
    photos: str = ""
    clip: str = ""


@dataclass(frozen=True)
class Asked:
    """A comparison that has been read and checked."""

    columns: Axis
    rows: Axis
    recipes: tuple[Recipe, ...]
    """Of every cell, row by row."""
    heading: str = ""
    """What all cells have."""
    tokens: tuple[str, ...] = ()
    """Rare words of the adapters: no model of texts knows them."""
    clip: str = ""
    """Name of the open_clip model; '' measures nothing."""
    photos: tuple[Path, ...] = ()

    @property
    def names(self) -> list[tuple[str, str]]:
        """Labels of column and row of every cell, row by row."""
        return [(column, row) for row in self.rows.labels for column in self.columns.labels]

    @property
    def captions(self) -> list[str]:
        """What every cell is called."""
        return [f"{column}, {row}" if row else column for column, row in self.names]


def asked(places: Places, boxes: Boxes) -> Asked:
    """The comparison that the boxes mean.

    Raises:
        UserError: for the first box that does not fit.
    """
    known = places.adapters()
    columns = axis_of("X", boxes.x, boxes.x_values, known)
    rows = axis_of("Y", boxes.y, boxes.y_values, known)
    check_axes(columns, rows)
    recipes = recipes_of(places, boxes, columns, rows, known)
    photos = photos_of(places, boxes.photos) if boxes.photos else ()
    clip = clip_of(places, recipes[0].base, boxes.clip or "")
    if photos and not clip:
        raise UserError(
            "Likeness to photos needs an open_clip model: give its name, such as hf-hub:ORGANISATION/MODEL; the embedded one knows "
            "only drawn pictures."
        )
    used = dict.fromkeys(path for recipe in recipes for path in recipe.adapters)
    tokens = tuple(token for path in used for token in tokens_of(facts_of(adapter_path(Path(path)))))
    return Asked(columns, rows, recipes, heading_of(boxes, columns, rows, recipes[0]), tokens, clip, photos)


def recipes_of(
    places: Places, boxes: Boxes, columns: Axis, rows: Axis, known: Mapping[str, Path]
) -> tuple[Recipe, ...]:
    """The recipe of every cell, row by row.

    Raises:
        UserError: for a setting that does not fit, or a strength that varies where there is no adapter.
    """
    own: dict[str, Any] = {
        "adapter": known_name("adapter", boxes.adapter, known) if boxes.adapter not in (None, "", BARE) else "",
        "strength": number_of("strength", boxes.strength),
    }
    numbers: dict[str, Any] = {what: number_of(what, getattr(boxes, what)) for what in ("steps", "width", "height")}
    numbers["guidance_scale"] = number_of("guidance", boxes.guidance)
    numbers["seed"] = random.randrange(2**31) if boxes.seed == -1 else number_of("seed", boxes.seed)
    prompts = [axis.values[0] for axis in (columns, rows) if axis.what == "prompt"] or [boxes.prompt or ""]
    base = recipe_from(places, boxes.base, prompts[0], boxes.negative or "", numbers, ())
    cells = [own | change(columns, column) | change(rows, row) for row in rows.values for column in columns.values]
    if "strength" in (columns.what, rows.what) and not any(cell["adapter"] for cell in cells):
        raise UserError("The strength varies, and there is no adapter: choose one.")
    return tuple(recipe_of(base, cell, known) for cell in cells)


def change(axis: Axis, value: Any) -> dict[str, Any]:
    """What a value of an axis sets."""
    return {} if axis.what == NOTHING else {FIELDS[axis.what]: value}


def recipe_of(base: Recipe, cell: Mapping[str, Any], known: Mapping[str, Path]) -> Recipe:
    """The base's recipe with a cell's adapter, strength and whatever else it sets."""
    others = {key: value for key, value in cell.items() if key not in ("adapter", "strength")}
    if not cell["adapter"]:
        return replace(base, **others)
    return replace(base, adapters=(str(known[cell["adapter"]]),), strengths=(cell["strength"],), **others)


def heading_of(boxes: Boxes, columns: Axis, rows: Axis, recipe: Recipe) -> str:
    """What all cells have, in a line. recipe: of one of them."""
    varied = {FIELDS[axis.what] for axis in (columns, rows) if axis.what != NOTHING}
    bare = boxes.adapter in (None, "", BARE)
    said = {
        "base": Path(recipe.base).name if Path(recipe.base).is_absolute() else recipe.base,
        "adapter": "no adapter" if bare else boxes.adapter,
        "strength": "" if bare and "adapter" not in varied else f"strength {boxes.strength:g}",
        "prompt": recipe.prompt,
        "negative": f"without {recipe.negative_prompt}" if recipe.negative_prompt else "",
        "seed": f"seed {recipe.seed}",
        "steps": f"{recipe.steps} steps",
        "guidance_scale": f"guidance {recipe.guidance_scale:g}",
    }
    return "; ".join(text for key, text in said.items() if text and key not in varied)


def photos_of(places: Places, run: str) -> tuple[Path, ...]:
    """The photos that a run learns from.

    Raises:
        UserError: when it has none, or they are gone.
    """
    config = places.config(run)
    if not isinstance(config, PictureConfig) or config.images is None:
        raise UserError(f"The run {run} has no photos: choose one on a subject.")
    if not config.images.is_dir():
        raise UserError(f"The photos of {run} are no longer there: choose another run.")
    return tuple(sample.path for sample in find_samples(config.images, skip_bad=True))


def photo_runs(places: Places) -> list[str]:
    """Runs that learn from photos, the newest first."""
    found = []
    for name in places.run_names():
        try:
            config = places.config(name)
        except UserError:
            continue
        if isinstance(config, PictureConfig) and config.images is not None:
            found.append(name)
    return found


def clip_of(places: Places, base: str, text: str) -> str:
    """The open_clip model that measures pictures of a base; '' for none: the embedded one knows only drawn pictures.

    Raises:
        UserError: for a name of another kind, or a folder that may not be read.
    """
    text = text.strip()
    if not text:
        return EMBEDDED_CLIP if base in EMBEDDED else ""
    kind, _, place = text.partition(":")
    if kind == "local-dir":
        return f"local-dir:{places.readable_folder(place, 'The folder of the open_clip model')}"
    if not re.fullmatch(r"hf-hub:[\w-][\w.-]*/[\w-][\w.-]*", text):
        raise UserError(  # open_clip itself takes a bare name such as ViT-B-32 with random weights
            f"{text[:80]!r} does not say where the open_clip model's weights are: give hf-hub:ORGANISATION/MODEL or local-dir:FOLDER."
        )
    return text


# ---------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Figures:
    """What was measured on a cell."""

    fidelity: float
    likeness: float | None = None


@dataclass(frozen=True)
class Result:
    """A comparison that has been drawn."""

    sheet: str
    files: list[str]
    """Of every cell, row by row."""
    figures: list[Figures]
    """Of every cell, [] where nothing was measured."""
    real: float | None = None
    """Likeness of a photo to the others."""


def drawing_order(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Each recipe once, those of one pipeline one after another: each pipeline is loaded once."""
    groups: dict[Any, dict[Recipe, None]] = {}
    for recipe in recipes:
        groups.setdefault((recipe.base, recipe.adapters, recipe.strengths), {})[recipe] = None
    return [recipe for group in groups.values() for recipe in group]


def compare(plan: Asked, pipes: Pipes, folder: Path, done: dict[Recipe, str], drawing: Drawing) -> Result:
    """Draws and measures all cells and puts the sheet together. done: recipe -> file, filled as it goes on.

    Raises:
        Stopped: when somebody wants it to end; what was drawn until then is kept.
    """
    scorer = ClipScorer(plan.clip) if plan.clip else None  # ahead of the pictures: a wrong name should not cost them
    for recipe in drawing_order(plan.recipes):
        if drawing.stopped:
            raise Stopped
        [done[recipe]] = kept(pipes.draw(recipe, 1, drawing), folder, "compare")
    files = [done[recipe] for recipe in plan.recipes]
    pictures = [load_rgb(Path(file)) for file in files]
    path = Path(files[0]).with_name(f"{Path(files[0]).stem}-sheet.png")
    write_png(path, headed(sheet(pictures, plan.columns.labels, plan.rows.labels), plan.heading))
    if scorer is None:
        return Result(str(path), files, [])
    figures, real = measured(scorer, plan, pictures)
    return Result(str(path), files, figures, real)


def measured(scorer: ClipScorer, plan: Asked, pictures: Sequence[Image.Image]) -> tuple[list[Figures], float | None]:
    """The figures of every cell, and how like a photo is to the other photos."""
    texts = scorer.texts([without(recipe.prompt, plan.tokens) for recipe in plan.recipes])
    photos = scorer.pictures([load_rgb(path) for path in plan.photos]) if plan.photos else None
    real = float(leave_one_out(photos).mean()) if photos is not None and len(photos) > 1 else None
    return figures_of(scorer.pictures(pictures), texts, photos), real


def figures_of(
    pictures_ND: torch.Tensor, texts_ND: torch.Tensor, photos_MD: torch.Tensor | None = None
) -> list[Figures]:
    """Figures of pictures, their prompts and the photos, all as unit embeddings."""
    fidelity = clip_t(pictures_ND, texts_ND).tolist()
    if photos_MD is None:
        return [Figures(one) for one in fidelity]
    likeness = clip_i(pictures_ND, photos_MD).tolist()
    return [Figures(*both) for both in zip(fidelity, likeness, strict=True)]


def tokens_of(facts: Mapping[str, str]) -> list[str]:
    """The rare words of an adapter that says these facts of itself."""
    more = [name.split() for name in facts.get("also", "").split(", ")]
    return [token for token in (facts.get("token", ""), *(words[0] for words in more if words)) if token]


def without(prompt: str, tokens: Sequence[str]) -> str:
    """The prompt without rare words; as it is when nothing would be left."""
    if not tokens:
        return prompt
    left = re.sub(rf"(?<!\w)(?:{'|'.join(map(re.escape, tokens))})(?!\w)", " ", prompt)
    return " ".join(left.split()) or prompt


# ---------------------------------------------------------------------------------------------- the sheet


def sheet(pictures: Sequence[Image.Image], columns: Sequence[str], rows: Sequence[str]) -> Image.Image:
    """Pictures of one size, row by row, with the labels above and at the left; a single long row goes on below itself."""
    if list(rows) == [""] and len(columns) > ACROSS:
        parts = [slice(start, start + ACROSS) for start in range(0, len(columns), ACROSS)]
        return stacked([sheet(pictures[part], columns[part], rows) for part in parts])
    cell = cell_size(pictures[0].size, len(columns), len(rows))
    font = label_font(max(14, cell[0] // 24))
    height = round(font.size * 1.3)
    heads = [wrapped(text, font, cell[0], LINES) for text in columns]
    sides = [wrapped(text, font, 12 * round(font.size), max(1, min(LINES, cell[1] // height))) for text in rows]
    top = max(len(lines) for lines in heads) * height + GAP
    left = max((round(font.getlength(line)) + 2 * GAP for lines in sides for line in lines), default=0)
    across, down = len(columns) * (cell[0] + GAP) - GAP, len(rows) * (cell[1] + GAP) - GAP
    page = Image.new("RGB", (left + across, top + down), "white")
    draw = ImageDraw.Draw(page)
    for number, lines in enumerate(heads):
        write(draw, lines, (left + number * (cell[0] + GAP) + cell[0] // 2, (top - GAP) // 2), font, height, "mm")
    for number, lines in enumerate(sides):
        write(draw, lines, (left - GAP, top + number * (cell[1] + GAP) + cell[1] // 2), font, height, "rm")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, len(columns))
        page.paste(shown(picture, cell), (left + column * (cell[0] + GAP), top + row * (cell[1] + GAP)))
    return page


def cell_size(size: tuple[int, int], columns: int, rows: int) -> tuple[int, int]:
    """Width and height of a cell on the sheet: small pictures larger by a whole number, large ones so that the sheet has an end."""
    larger = -(-SMALLEST // min(size)) if min(size) < SMALLEST else 1
    width, height = size[0] * larger, size[1] * larger
    less = min(1.0, LARGEST / (width * columns), LARGEST / (height * rows))
    return max(1, int(width * less)), max(1, int(height * less))


def shown(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at its size on the sheet; a whole number larger, its pixels stay squares."""
    whole = size[0] % picture.width == 0 and size[1] % picture.height == 0
    return picture.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets below each other."""
    page = Image.new("RGB", (max(one.width for one in sheets), sum(one.height + GAP for one in sheets) - GAP), "white")
    top = 0
    for one in sheets:
        page.paste(one, (0, top))
        top += one.height + GAP
    return page


def headed(page: Image.Image, text: str) -> Image.Image:
    """The sheet with a text above it; its right end is left free, where the browser puts buttons."""
    font = label_font(max(14, page.width // 96))
    height, lines = round(font.size * 1.3), wrapped(text, font, page.width * 9 // 10 - GAP, LINES)
    whole = Image.new("RGB", (page.width, page.height + (len(lines) + 1) * height), "white")
    whole.paste(page, (0, (len(lines) + 1) * height))
    middle = (len(lines) + 1) * height // 2
    write(ImageDraw.Draw(whole), lines, (GAP, middle), font, height, "lm")
    return whole


def label_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has more alphabets than Pillow's own font."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
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


def write(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], at: tuple[int, int], font: Any, height: int, anchor: str
) -> None:
    """Lines of text around a height on the page."""
    first = at[1] - (len(lines) - 1) * height / 2
    for number, line in enumerate(lines):
        draw.text((at[0], first + number * height), line, "black", font, anchor=anchor)


# ---------------------------------------------------------------------------------------------- the page


def proposal(what: str, prompt: str, adapter: str, known: Mapping[str, Path]) -> tuple[str, str]:
    """Values to begin with for what varies, a line each; and a hint."""
    if what == "prompt":
        return prompt, "A prompt a line."
    if what in PROPOSED:
        least, most, whole = LIMITS[what]
        return PROPOSED[what], f"{'Whole numbers' if whole else 'Numbers'} from {least} to {most}, one a line."
    if what not in FIELDS:
        return "", "One a line."
    names = names_for(what, known)
    if what == "adapter":
        return "\n".join([BARE, *names[: ACROSS - 1]]), f"Names, one a line. Known: {', '.join([BARE, *names])}."
    run = adapter.split(" at step ")[0] if adapter else ""
    steps = [name for name in names if name.split(" at step ")[0] == run] or names
    hint = f"Names, one a line. Known: {', '.join(names)}." if names else "No run has measured steps (evaluate_every)."
    return "\n".join(steps[:MOST]), hint


def suited(places: Places, name: str) -> tuple[Any, Any]:
    """Base and prompt that an adapter was made for."""
    if not name or name == BARE:
        return gr.skip(), gr.skip()
    facts = facts_of(adapter_path(places.adapter(name)))
    words = f"{facts.get('token', '')} {facts.get('class_noun', '')}".strip()
    return facts.get("base") or gr.skip(), f"a {words} on the beach" if words else gr.skip()


def table_of(plan: Asked, result: Result) -> list[list[Any]]:
    """A row of the table for every cell."""
    rows = []
    for number, (names, file) in enumerate(zip(plan.names, result.files, strict=True)):
        own = result.figures[number] if result.figures else None
        values = [own and own.fidelity, own and own.likeness]
        rows.append([*names, *("" if value is None else f"{value:.3f}" for value in values), Path(file).name])
    return rows


def told(plan: Asked, result: Result, seconds: float) -> str:
    """What was done, in a line or two."""
    lines = [f"{len(plan.recipes)} cells in {time_left(seconds)}; the sheet is {Path(result.sheet).name}."]
    if plan.clip:
        bare = f" Prompts are measured without {', '.join(dict.fromkeys(plan.tokens))}." if plan.tokens else ""
        lines.append(f"Measured with the open_clip model {plan.clip}.{bare}")
    else:
        lines.append("Nothing was measured: this base needs the name of an open_clip model.")
    if result.real is not None:
        lines.append(f"A photo's likeness to the others is {result.real:.3f}.")
    return "".join(note(line) for line in lines)


def made_picture(places: Places, name: str) -> str:
    """The path of a picture that was made here.

    Raises:
        UserError: when there is none of that name.
    """
    known = {file.name: str(file) for file in places.made().glob("*.png")}
    if name not in known:
        raise UserError(f"There is no picture named {str(name)[:80]!r}: choose a cell from the list.")
    return known[name]


def build(studio: Studio) -> None:
    """The page."""
    places, pipes = studio.places, studio.pipes
    running: dict[str | None, Drawing] = {}  # by session

    @plainly
    def draw_cells(request: gr.Request, base: str, adapter: str, strength: float, prompt: str, negative: str, seed: float, steps: float,
             guidance: float, width: float, height: float, x: str, x_values: str, y: str, y_values: str,
             photos: str, clip: str) -> Any:  # fmt: skip
        plan = asked(places, Boxes(base, adapter, strength, prompt, negative, seed, steps, guidance, width, height,
                                   x, x_values, y, y_values, photos, clip))  # fmt: skip
        session = request.session_hash
        try:
            for now, shown in streamed(plan, pipes, places.made()):
                running[session] = now
                yield shown
        finally:
            running.pop(session, None)

    @plainly
    def propose_values(what: str, prompt: str, adapter: str) -> Any:
        text, hint = proposal(what, prompt, adapter, places.adapters())
        return gr.Textbox(value=text, info=hint, interactive=what != NOTHING)

    @plainly
    def suit_adapter(name: str) -> tuple[Any, Any]:
        return suited(places, name)

    @plainly
    def stop_drawing(request: gr.Request, times: float) -> float:
        end = time.monotonic() + PATIENCE
        while (now := running.get(request.session_hash)) and time.monotonic() < end:
            now.stopped = True
            time.sleep(LOOK)
        return times + 1

    @plainly
    def show_pair(left: str | None, right: str | None) -> Any:
        return (made_picture(places, left), made_picture(places, right)) if left and right else gr.skip()

    @plainly
    def list_choices() -> tuple[Any, Any]:
        return gr.Dropdown(choices=[BARE, *places.adapters()]), gr.Dropdown(choices=["", *photo_runs(places)])

    settings = setting_boxes()
    axes = [*axis_boxes("X", "seed"), *axis_boxes("Y", NOTHING)]
    measures = measure_boxes()
    with gr.Row():
        go = gr.Button("Compare", variant="primary", elem_id="compare-go")
        stop = gr.Button("Stop", variant="stop", elem_id="compare-stop")
    results = result_boxes()
    left, right, slider = results[4:]
    stops = gr.Number(0, label="Stops", visible="hidden")  # a State's change would cancel nothing

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    event = go.click(draw_cells, [*settings, *axes, *measures], results, api_name="compare", concurrency_id="device")
    # What is at work ends by itself; only what still waits is cancelled, as Gradio at times says Error in every box otherwise.
    stop.click(stop_drawing, stops, stops, **quiet)
    stops.change(None, cancels=[event])
    base, adapter, prompt = settings[0], settings[1], settings[3]
    adapter.input(suit_adapter, adapter, [base, prompt], **quiet)
    for what, values in (axes[:2], axes[2:]):
        what.input(propose_values, [what, prompt, adapter], values, **quiet)
    for chosen in (left, right):
        chosen.input(show_pair, [left, right], slider, **quiet)
    gr.context.Context.root_block.load(list_choices, None, [adapter, measures[0]], **quiet)


def streamed(plan: Asked, pipes: Pipes, folder: Path) -> Iterator[tuple[Drawing, tuple[Any, ...]]]:
    """The drawing and what the page shows, while cells are drawn, and at last."""
    done: dict[Recipe, str] = {}
    began, seen, order = time.monotonic(), -1, drawing_order(plan.recipes)
    emptied = (None, [], [], *[gr.Dropdown(choices=[], value=None)] * 2, None)
    drawing = Drawing(0)
    try:
        for now in followed(partial(compare, plan, pipes, folder, done), sum(recipe.steps for recipe in order)):
            if isinstance(now, Result):
                yield drawing, (told(plan, now, time.monotonic() - began), *filled(plan, now))
                return
            shown = emptied if seen < 0 else (gr.skip(),) * len(emptied)
            drawing, before, seen = now, seen, len(done)
            if seen > before >= 0:
                named = zip(plan.recipes, plan.captions, strict=True)
                shown = (gr.skip(), [(done[one], name) for one, name in named if one in done], *shown[2:])
            yield drawing, (progress(now.share) + note(f"{seen} of {len(order)} pictures."), *shown)
    except Stopped:
        said = f"Stopped; {len(done)} of {len(order)} pictures are drawn and kept."
        yield drawing, (note(said), *(gr.skip(),) * len(emptied))


def filled(plan: Asked, result: Result) -> list[Any]:
    """Sheet, gallery, table, the two choices and the slider of what has been drawn."""
    cells = list(zip(result.files, plan.captions, strict=True))
    choices = [(f"{number}: {name}", Path(file).name) for number, (file, name) in enumerate(cells, 1)]
    first, last = result.files[0], result.files[-1]
    chosen = [gr.Dropdown(choices=choices, value=Path(file).name) for file in (first, last)]
    return [result.sheet, cells, table_of(plan, result), *chosen, (first, last)]


def setting_boxes() -> list[Any]:
    """Boxes for what all cells have, in the order of `Boxes`."""
    with gr.Row():
        base = gr.Dropdown(
            [*EMBEDDED], value="tiny", allow_custom_value=True, label="Base model", elem_id="compare-base"
        )
        adapter = gr.Dropdown(
            [BARE], value=BARE, allow_custom_value=True, label="Adapter", elem_id="compare-adapter", scale=2
        )
        strength = gr.Number(label="Strength", value=1, step=0.05, min_width=120, elem_id="compare-strength")
    with gr.Row():
        prompt = gr.Textbox(
            label="Prompt", value="a sks creature on the beach", lines=2, scale=2, elem_id="compare-prompt"
        )
        negative = gr.Textbox(label="Not in the picture (negative prompt)", lines=2, scale=1)
    with gr.Row():
        seed = gr.Number(label="Seed (-1: by chance)", value=0, precision=0, min_width=120, elem_id="compare-seed")
        steps = gr.Number(label="Steps", value=25, precision=0, min_width=120, elem_id="compare-steps")
        guidance = gr.Number(label="Guidance", value=2.0, min_width=120, elem_id="compare-guidance")
        width = gr.Number(label="Width (0: the base's own)", value=0, precision=0, min_width=120)
        height = gr.Number(label="Height (0: as wide)", value=0, precision=0, min_width=120)
    return [base, adapter, strength, prompt, negative, seed, steps, guidance, width, height]


def axis_boxes(side: str, what: str) -> list[Any]:
    """What varies along X or Y, and with which values."""
    place = f"compare-{side.lower()}"
    choices = [*FIELDS] if side == "X" else [NOTHING, *FIELDS]
    with gr.Row():
        chosen = gr.Dropdown(choices, value=what, label=f"What varies along {side}", elem_id=place)
        values = gr.Textbox(
            label=f"Values of {side}", value=PROPOSED.get(what, ""), info="One a line.", lines=3, max_lines=12, scale=2,
            interactive=what != NOTHING, elem_id=f"{place}-values",
        )  # fmt: skip
    return [chosen, values]


def measure_boxes() -> list[Any]:
    """What the cells are measured by."""
    with gr.Row():
        photos = gr.Dropdown(
            [""], value="", allow_custom_value=True, label="Likeness to the photos of run (optional)",
            elem_id="compare-photos",
        )  # fmt: skip
        clip = gr.Textbox(
            label="open_clip model (empty: the embedded one, for embedded bases only)",
            placeholder="hf-hub:ORGANISATION/MODEL or local-dir:FOLDER", elem_id="compare-clip",
        )  # fmt: skip
    return [photos, clip]


def result_boxes() -> list[Any]:
    """Progress, sheet, gallery, table, the two choices and the slider."""
    said = gr.HTML(label="Progress", elem_id="compare-said")
    sheet = gr.Image(
        label="Sheet", format="png", type="filepath", interactive=False, buttons=["download", "fullscreen"],
        show_label=False, elem_id="compare-sheet",
    )  # fmt: skip
    table = gr.Dataframe(
        headers=HEADERS,
        label="Figures of the cells",
        interactive=False,
        wrap=True,
        render=False,
        elem_id="compare-table",
    )
    gallery = gr.Gallery(
        label="Cells (their settings are inside)", columns=4, fit_columns=False, format="png", elem_id="compare-cells",
        height="max-content",  # "auto" would stop behind half of the second row
    )  # fmt: skip
    table.render()
    with gr.Row():
        left = gr.Dropdown([], label="Left cell", elem_id="compare-left")
        right = gr.Dropdown([], label="Right cell", elem_id="compare-right")
    slider = gr.ImageSlider(
        label="Two cells", format="png", type="filepath", interactive=False, elem_id="compare-slider"
    )
    return [said, sheet, gallery, table, left, right, slider]
