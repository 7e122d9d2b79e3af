"""Compare: one sheet of pictures over one or two things that vary, and what was measured on each picture."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from ....pipelines.compare import FIELDS, NOTHING, Asked, Result, compare, drawing_order
from ....pipelines.generate import Recipe
from ....pipelines.grids import ACROSS
from ....toolkit.core.errors import UserError
from ....toolkit.diffusion.load import EMBEDDED
from ..backend.comparison import BARE, LIMITS, MOST, Boxes, asked, drawer, names_for, photo_runs
from ..backend.context import Studio
from ..backend.paths import Places
from ..backend.pipeline_worker import LOOK, Drawing, Pipes, Stopped, followed
from ..backend.recipes import suited
from ..render.messages import note, plainly, progress, time_left

PROPOSED = {"strength": "0\n0.5\n1", "seed": "0\n1\n2", "guidance": "1\n2\n4", "steps": "10\n25\n50"}
HEADERS = ["X", "Y", "prompt fidelity (CLIP-T)", "likeness to the photos (CLIP-I)", "file"]
PATIENCE = 300  # seconds to wait until a drawing stops behind its step


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
        return (gr.skip(), gr.skip()) if name == BARE else suited(places, name)

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
        for now in followed(
            lambda drawing: compare(plan, drawer(pipes, folder, done, drawing)), sum(recipe.steps for recipe in order)
        ):
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
