"""A comparison: what varies along its two sides, the recipe of every cell, the drawing, and what is measured on each picture."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ....pipelines.compare import FIELDS, NOTHING, Asked, Axis, change, tokens_of
from ....pipelines.generate import Recipe
from ....toolkit.core.errors import UserError, nearest
from ....toolkit.data.subjects import find_samples
from ....toolkit.diffusion.load import EMBEDDED
from ....toolkit.formats.source import adapter_path, facts_of
from ....toolkit.metrics.clip import EMBEDDED_CLIP
from ....training.config.images import PictureConfig
from .paths import Places
from .pipeline_worker import Drawing, Pipes, Stopped, kept
from .recipes import recipe_from

MOST = 64  # cells
BARE = "none"  # in the place of an adapter's name
LIMITS = {  # least, most, whether whole
    "strength": (-10, 10, False), "seed": (0, 2**32 - 1, True), "guidance": (0, 100, False), "steps": (1, 1000, True),
    "width": (0, 8192, True), "height": (0, 8192, True),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- what varies


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


# ---------------------------------------------------------------------------------------------- drawing


def drawer(pipes: Pipes, folder: Path, done: dict[Recipe, str], drawing: Drawing) -> Callable[[Recipe], Path]:
    """What draws a cell beside the page. done: recipe -> file, filled as it goes on.

    Raises:
        Stopped: when somebody wants it to end; what was drawn until then is kept.
    """

    def draw(recipe: Recipe) -> Path:
        if drawing.stopped:
            raise Stopped
        [done[recipe]] = kept(pipes.draw(recipe, 1, drawing), folder, "compare")
        return Path(done[recipe])

    return draw
