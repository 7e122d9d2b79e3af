"""A comparison: what varies along its two sides, the recipe of every cell, the drawing, and what is measured on each image."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ....pipelines.compare import Axis, Comparison
from ....pipelines.generate import Recipe, check_given_images
from ....toolkit.core.errors import UserError, did_you_mean
from ....toolkit.data.subjects import find_samples
from ....toolkit.diffusion.base_files import base_paths, short_base
from ....toolkit.diffusion.load import EMBEDDED
from ....toolkit.formats.locate import adapter_facts, adapter_path
from ....toolkit.metrics.clip import EMBEDDED_CLIP
from ....training.config.images import DiffusionConfig
from .numbers import LIMITS, parse_number, parse_seed
from .paths import StudioPaths
from .pipeline_worker import Job, JobStopped, PipelineWorker, save_images
from .recipes import build_recipe, drawing_numbers, parse_sampler
from .start_images import keep_references

NOTHING = "nothing"  # along an axis that does not vary
FIELDS = {
    "adapter": "adapter", "checkpoint": "adapter", "strength": "strength", "seed": "seed", "prompt": "prompt",
    "guidance": "guidance_scale", "steps": "steps", "sampler": "scheduler",
}  # fmt: skip
MAX_CELLS = 64  # cells
NO_ADAPTER = "none"  # instead of an adapter's name


# ---------------------------------------------------------------------------------------------- what varies


def check_known_name(what: str, name: str, known: Mapping[str, Path]) -> str:
    """The name of an adapter, or of a measured step.

    Raises:
        UserError: when there is none of that name.
    """
    names = names_for(what, known)
    if not names:
        raise UserError(f"There is no {what} to compare yet: train one, with evaluate_every for its checkpoints.")
    if name not in names:
        raise UserError(f"{str(name)[:80]!r} is not a known {what}.{did_you_mean(str(name), names)}")
    return name


def names_for(what: str, known: Mapping[str, Path]) -> list[str]:
    """The adapters, or only those that are a run's measured steps."""
    return [name for name in known if what != "checkpoint" or re.search(r" at step \d+$", name)]


def parse_value(what: str, text: str, known: Mapping[str, Path]) -> Any:
    """What a line of an axis means.

    Raises:
        UserError: naming the line that does not fit.
    """
    if what in LIMITS:
        return parse_number(what, text)
    if what == "prompt":
        return text
    if what == "sampler":
        return parse_sampler(text)
    return "" if what == "adapter" and text == NO_ADAPTER else check_known_name(what, text, known)


def parse_axis(side: str, what: str, text: str, known: Mapping[str, Path]) -> Axis:
    """The axis that two boxes mean. side: X or Y.

    Raises:
        UserError: for no value, one that does not fit, or one that stands twice.
    """
    if what == NOTHING:
        return Axis(NOTHING, ("",), (None,))
    if what not in FIELDS:
        raise UserError(f"{side} cannot vary {str(what)[:60]!r}.{did_you_mean(str(what), FIELDS)}")
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{side} has no values: write down what the {what} should be, a line each.")
    values: list[Any] = []
    for line in lines:
        value = parse_value(what, line, known)
        if value in values:
            raise UserError(f"{line[:60]!r} stands twice among the values of {side}: remove one of them.")
        values.append(value)
    return Axis(what, tuple(value_label(what, line) for line in lines), tuple(values))


def value_label(what: str, text: str) -> str:
    """What the sheet calls a value."""
    if what == "adapter" and text == NO_ADAPTER:
        return "no adapter"
    return f"{what} {text}" if what in LIMITS else text


def axis_setting(axis: Axis, value: Any) -> dict[str, Any]:
    """What a value of an axis sets."""
    return {} if axis.what == NOTHING else {FIELDS[axis.what]: value}


def check_axes(columns: Axis, *others: Axis) -> None:
    """Raises UserError for axes that make no grid. others: Y, and Z."""
    if columns.what == NOTHING:
        raise UserError("Nothing varies along X: choose what should.")
    sides = list(zip("XYZ", (columns, *others), strict=False))
    for place, (side, axis) in enumerate(sides):
        for earlier, known in sides[:place]:
            if NOTHING not in (axis.what, known.what) and FIELDS[known.what] == FIELDS[axis.what]:
                raise UserError(
                    f"{earlier} varies the {known.what} and {side} the {axis.what}, which is the same setting: choose another for {side}."
                )
    counts = [len(axis.values) for _, axis in sides]
    if math.prod(counts) > MAX_CELLS:
        counted = " x ".join(str(count) for count in counts if count > 1)
        raise UserError(f"{counted} are {math.prod(counts)} cells, more than {MAX_CELLS}: take fewer.")


def stack_rows(rows: Axis, blocks: Axis) -> Axis:
    """Y and Z as the rows of one sheet: a block of Y's rows for each value of Z."""
    if NOTHING in (rows.what, blocks.what):
        return blocks if rows.what == NOTHING else rows
    labels = tuple(f"{block}; {row}" for block in blocks.labels for row in rows.labels)
    values = tuple((block, row) for block in blocks.values for row in rows.values)
    return Axis(f"{blocks.what}, {rows.what}", labels, values)


# ---------------------------------------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class ComparisonInputs:
    """What the page's boxes hold, as it comes."""

    base: str = "tiny"
    adapter: str = ""
    strength: float = 1.0
    prompt: str = ""
    negative: str = ""
    seed: float = 0
    steps: float | None = None
    guidance: float | None = None
    width: float = 0
    height: float = 0
    x: str = NOTHING
    x_values: str = ""
    y: str = NOTHING
    y_values: str = ""
    photos: str = ""
    clip: str = ""
    z: str = NOTHING
    z_values: str = ""
    references: Sequence[Any] | None = None
    """Files, or what a gallery holds."""


def parse_comparison(paths: StudioPaths, boxes: ComparisonInputs) -> Comparison:
    """The comparison that the boxes mean.

    Raises:
        UserError: for the first box that does not fit.
    """
    known = paths.adapters()
    columns = parse_axis("X", boxes.x, boxes.x_values, known)
    rows = parse_axis("Y", boxes.y, boxes.y_values, known)
    blocks = parse_axis("Z", boxes.z, boxes.z_values, known)
    axes = (columns, rows, blocks)
    check_axes(*axes)
    recipes = cell_recipes(paths, boxes, axes, known)
    photos = run_photos(paths, boxes.photos) if boxes.photos else ()
    clip = parse_clip_model(paths, recipes[0].base, boxes.clip or "")
    if photos and not clip:
        raise UserError(
            "Likeness to photos needs an open_clip model: give its name, such as hf-hub:ORGANISATION/MODEL; the embedded one knows "
            "only drawn images."
        )
    used = dict.fromkeys(path for recipe in recipes for path in recipe.adapters)
    tokens = tuple(token for path in used for token in adapter_facts(adapter_path(Path(path))).tokens)
    heading = describe_settings(boxes, axes, recipes[0])
    return Comparison(columns, stack_rows(rows, blocks), recipes, heading, tokens, clip, photos)


def cell_recipes(
    paths: StudioPaths, boxes: ComparisonInputs, axes: tuple[Axis, Axis, Axis], known: Mapping[str, Path]
) -> tuple[Recipe, ...]:
    """The recipe of every cell, row by row. axes: X, Y and Z.

    Raises:
        UserError: for a setting that does not fit, or a strength that varies where there is no adapter.
    """
    own: dict[str, Any] = {
        "adapter": check_known_name("adapter", boxes.adapter, known)
        if boxes.adapter not in (None, "", NO_ADAPTER)
        else "",
        "strength": parse_number("strength", boxes.strength),
    }
    numbers: dict[str, Any] = {what: parse_number(what, getattr(boxes, what)) for what in ("width", "height")}
    adapters = [str(known[own["adapter"]])] if own["adapter"] else []
    drawn = drawing_numbers(paths.base(boxes.base), adapters, boxes.steps, boxes.guidance)
    numbers |= dict(zip(("steps", "guidance_scale"), drawn, strict=True))
    numbers["seed"] = parse_seed(boxes.seed)
    numbers["references"] = keep_references(paths, boxes.references)
    prompts = [axis.values[0] for axis in axes if axis.what == "prompt"] or [boxes.prompt or ""]
    base = build_recipe(paths, boxes.base, prompts[0], boxes.negative or "", numbers, ())
    check_given_images(base)
    columns, rows, blocks = axes
    cells = [
        own | axis_setting(blocks, block) | axis_setting(rows, row) | axis_setting(columns, column)
        for block in blocks.values
        for row in rows.values
        for column in columns.values
    ]
    if "strength" in [axis.what for axis in axes] and not any(cell["adapter"] for cell in cells):
        raise UserError("The strength varies, and there is no adapter: choose one.")
    return tuple(cell_recipe(base, cell, known) for cell in cells)


def cell_recipe(base: Recipe, cell: Mapping[str, Any], known: Mapping[str, Path]) -> Recipe:
    """The base's recipe with a cell's adapter, strength and whatever else it sets."""
    others = {key: value for key, value in cell.items() if key not in ("adapter", "strength")}
    if not cell["adapter"]:
        return replace(base, **others)
    return replace(base, adapters=(str(known[cell["adapter"]]),), strengths=(cell["strength"],), **others)


def describe_settings(boxes: ComparisonInputs, axes: tuple[Axis, Axis, Axis], recipe: Recipe) -> str:
    """What all cells have, in a line. recipe: of one of them."""
    varied = {FIELDS[axis.what] for axis in axes if axis.what != NOTHING}
    bare = boxes.adapter in (None, "", NO_ADAPTER)
    said = {
        "base": short_base(recipe.base) if Path(base_paths(recipe.base)[0]).is_absolute() else recipe.base,
        "adapter": "no adapter" if bare else boxes.adapter,
        "strength": "" if bare and "adapter" not in varied else f"strength {boxes.strength:g}",
        "prompt": recipe.prompt,
        "negative": f"without {recipe.negative_prompt}" if recipe.negative_prompt else "",
        "seed": f"seed {recipe.seed}",
        "steps": f"{recipe.steps} steps",
        "guidance_scale": f"guidance {recipe.guidance_scale:g}",
        "references": f"{count} reference image{'s'[: count > 1]}" if (count := len(recipe.references)) else "",
    }
    return "; ".join(text for key, text in said.items() if text and key not in varied)


def run_photos(paths: StudioPaths, run: str) -> tuple[Path, ...]:
    """The photos that a run learns from.

    Raises:
        UserError: when it has none, or they are gone.
    """
    config = paths.config(run)
    if not isinstance(config, DiffusionConfig) or config.images is None:
        raise UserError(f"The run {run} has no photos: choose one on a subject.")
    if not config.images.is_dir():
        raise UserError(f"The photos of {run} are no longer there: choose another run.")
    return tuple(sample.path for sample in find_samples(config.images, skip_bad=True))


def runs_with_photos(paths: StudioPaths) -> list[str]:
    """Runs that learn from photos, the newest first."""
    found = []
    for name in paths.run_names():
        try:
            config = paths.config(name)
        except UserError:
            continue
        if isinstance(config, DiffusionConfig) and config.images is not None:
            found.append(name)
    return found


def parse_clip_model(paths: StudioPaths, base: str, text: str) -> str:
    """The open_clip model that measures images of a base; '' for none: the embedded one knows only drawn images.

    Raises:
        UserError: for a name of another kind, or a folder that may not be read.
    """
    text = text.strip()
    if not text:
        return EMBEDDED_CLIP if base in EMBEDDED else ""
    kind, _, place = text.partition(":")
    if kind == "local-dir":
        return f"local-dir:{paths.readable_folder(place, 'The folder of the open_clip model')}"
    if not re.fullmatch(r"hf-hub:[\w-][\w.-]*/[\w-][\w.-]*", text):
        raise UserError(  # open_clip itself takes a bare name such as ViT-B-32 with random weights
            f"{text[:80]!r} does not say where the open_clip model's weights are: give hf-hub:ORGANISATION/MODEL or local-dir:FOLDER."
        )
    return text


# ---------------------------------------------------------------------------------------------- drawing


def drawer(pipes: PipelineWorker, folder: Path, done: dict[Recipe, str], drawing: Job) -> Callable[[Recipe], Path]:
    """What draws a cell beside the page. done: recipe -> file, filled as it goes on.

    Raises:
        Stopped: when somebody wants it to end; what was drawn until then is kept.
    """

    def draw(recipe: Recipe) -> Path:
        if drawing.stopped:
            raise JobStopped
        [done[recipe]] = save_images(pipes.draw(recipe, 1, drawing), folder, "compare")
        return Path(done[recipe])

    return draw
