"""Compare: one sheet of images over up to three things that vary, and what was measured on each image."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import gradio as gr

from ....pipelines.compare import CellScores, Comparison, ComparisonResult, compare, drawing_order
from ....pipelines.generate import Recipe
from ....pipelines.grids import MAX_COLUMNS
from ....toolkit.diffusion.load import EMBEDDED
from ..backend.comparison import (
    FIELDS,
    MAX_CELLS,
    NO_ADAPTER,
    NOTHING,
    ComparisonInputs,
    drawer,
    names_for,
    parse_comparison,
    runs_with_photos,
)
from ..backend.context import Studio
from ..backend.generated import find_generated_image
from ..backend.numbers import LIMITS
from ..backend.pipeline_worker import POLL_SECONDS, Job, JobStopped, PipelineWorker, run_in_background
from ..backend.recipes import SAMPLERS, base_numbers, suggested_base_and_prompt
from ..backend.turns import Turns
from ..render.messages import format_duration, message_html, progress_bar, show_errors
from ..widgets.actions import act, named
from ..widgets.drawing_boxes import guidance_box, steps_box
from ..widgets.filling import keep_draft, suggest_text
from ..widgets.reference_slot import ReferenceSlot

PROPOSED_VALUES = {
    "strength": "0\n0.5\n1", "seed": "0\n1\n2", "guidance": "1\n2\n4", "steps": "10\n25\n50", "sampler": "Model default\nDDIM\nEuler a",
}  # fmt: skip
HEADERS = ["X", "Y", "prompt fidelity (CLIP-T)", "likeness to the photos (CLIP-I)", "file"]
STOP_TIMEOUT = 300  # seconds to wait until a drawing stops after its step


def propose_axis_values(what: str, prompt: str, adapter: str, known: Mapping[str, Path]) -> tuple[str, str]:
    """Values to begin with for what varies, a line each; and a hint."""
    if what == "prompt":
        return prompt, "One prompt per line."
    if what == "sampler":
        return PROPOSED_VALUES[what], f"Samplers, one per line. Known: {', '.join(SAMPLERS)}."
    if what in PROPOSED_VALUES:
        least, most, whole = LIMITS[what]
        return PROPOSED_VALUES[what], f"{'Whole numbers' if whole else 'Numbers'} from {least} to {most}, one per line."
    if what not in FIELDS:
        return "", "One per line."
    names = names_for(what, known)
    if what == "adapter":
        return "\n".join(
            [NO_ADAPTER, *names[: MAX_COLUMNS - 1]]
        ), f"Names, one per line. Known: {', '.join([NO_ADAPTER, *names])}."
    run = adapter.split(" at step ")[0] if adapter else ""
    steps = [name for name in names if name.split(" at step ")[0] == run] or names
    hint = (
        f"Names, one per line. Known: {', '.join(names)}." if names else "No run has measured steps (evaluate_every)."
    )
    return "\n".join(steps[:MAX_CELLS]), hint


def score_table(plan: Comparison, result: ComparisonResult) -> dict[str, list[Any]]:
    """A row of the table for every cell, and what its columns are called: X, and Y with Z, by what they vary."""
    rows = []
    for number, (names, file) in enumerate(zip(plan.names, result.files, strict=True)):
        own = result.scores[number] if result.scores else None
        values = [own and own.fidelity, own and own.likeness]
        rows.append([*names, *("" if value is None else f"{value:.3f}" for value in values), Path(file).name])
    sides = zip(HEADERS, (plan.columns.what, plan.rows.what), strict=False)
    return {"headers": [*(f"{side}: {what}" for side, what in sides), *HEADERS[2:]], "data": rows}


def score_words(scores: CellScores) -> str:
    """A cell's scores, as they stand below its image."""
    likeness = "" if scores.likeness is None else f", likeness {scores.likeness:.3f}"
    return f"prompt {scores.fidelity:.3f}{likeness}"


def describe_result(plan: Comparison, result: ComparisonResult, seconds: float) -> str:
    """What was done, in a line or two."""
    lines = [f"{len(plan.recipes)} cells in {format_duration(seconds)}; the sheet is {Path(result.grid).name}."]
    if plan.clip:
        bare = f" Prompts are measured without {', '.join(dict.fromkeys(plan.tokens))}." if plan.tokens else ""
        lines.append(f"Measured with the open_clip model {plan.clip}.{bare}")
    else:
        lines.append("Nothing was measured: this base needs the name of an open_clip model.")
    if result.real is not None:
        lines.append(f"A photo's likeness to the others is {result.real:.3f}.")
    return "".join(message_html(line) for line in lines)


class ComparePage:
    """What the page's events do."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.paths = studio, studio.paths
        self.running: dict[str | None, Job] = {}  # by session

    def draw_cells(self, request: gr.Request, *boxes: Any) -> Any:
        """Draws; yields what the page shows. boxes: in the order of `ComparisonInputs`."""
        plan = parse_comparison(self.paths, ComparisonInputs(*boxes))
        session = request.session_hash
        try:
            for now, shown in stream_comparison(
                plan, self.studio.worker, self.paths.generated_folder(), self.studio.turns
            ):
                self.running[session] = now
                yield shown
        finally:
            self.running.pop(session, None)

    def stop_drawing(self, request: gr.Request, times: float) -> float:
        """Stops what this page draws, or waits for."""
        end = time.monotonic() + STOP_TIMEOUT
        while (now := self.running.get(request.session_hash)) and time.monotonic() < end:
            now.stopped = True  # whether it is at work or waits
            time.sleep(POLL_SECONDS)
        return times + 1

    def propose_values(self, what: str, prompt: str, adapter: str) -> Any:
        """Values to begin with for an axis."""
        text, hint = propose_axis_values(what, prompt, adapter, self.paths.adapters())
        return gr.Textbox(value=text, info=hint)

    def suit_adapter(self, name: str) -> tuple[Any, list[str]]:
        """The base that an adapter was made for, and a prompt, see `suggested_base_and_prompt`."""
        return (gr.skip(), []) if name == NO_ADAPTER else suggested_base_and_prompt(self.paths, name)

    def show_pair(self, left: str | None, right: str | None) -> Any:
        """Two cells under the slider."""
        if not left or not right:
            return gr.skip()
        return find_generated_image(self.paths, left), find_generated_image(self.paths, right)

    def list_choices(self) -> tuple[Any, Any]:
        """The adapters, and the runs with photos, that there are now."""
        adapters, runs = self.paths.adapters(), runs_with_photos(self.paths)
        return gr.Dropdown(choices=[NO_ADAPTER, *adapters]), gr.Dropdown(choices=["", *runs])


def build(studio: Studio) -> None:
    """The page."""
    page = ComparePage(studio)
    settings, references = setting_inputs(), ReferenceSlot("compare")
    axes = [axis_inputs("X", "seed"), axis_inputs("Y", NOTHING), axis_inputs("Z", NOTHING)]
    measures = measure_inputs()
    with gr.Row():
        go = gr.Button("Compare", variant="primary", elem_id="compare-go")
        stop = gr.Button("Stop", variant="stop", elem_id="compare-stop")
    wire(page, settings, references, axes, measures, go, stop)


def wire(
    page: ComparePage,
    settings: list[Any],
    references: ReferenceSlot,
    axes: list[list[Any]],
    measures: list[Any],
    go: Any,
    stop: Any,
) -> None:
    """What happens."""
    results = result_outputs()
    left, right, slider = results[4:]
    stops = gr.Number(0, label="Stops", visible="hidden")  # a State's change would cancel nothing
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    boxes = [*settings, *axes[0], *axes[1], *measures, *axes[2]]  # Z last, for programs that know of no such
    act(go, page.draw_cells, [*boxes, references.gallery], results, results[0], concurrency_limit=None)
    names = [field.name for field in fields(ComparisonInputs)]
    called = named(show_errors(page.draw_cells), ["request", *names])
    gr.on([], called, [*boxes, references.files], results, api_name="compare", concurrency_limit=None)
    stop.click(show_errors(page.stop_drawing), stops, stops, **quiet)
    base, adapter, prompt = settings[0], settings[1], settings[3]
    base.change(lambda base: base_numbers(page.paths, base), base, [settings[6], settings[7]], **quiet)
    offered = gr.JSON(visible=False, label="A prompt for the adapter")
    suggest_text(adapter.input(show_errors(page.suit_adapter), adapter, [base, offered], **quiet), offered, prompt)
    for what, values in axes:
        what.input(show_errors(page.propose_values), [what, prompt, adapter], values, **quiet)
    for chosen in (left, right):
        chosen.input(show_errors(page.show_pair), [left, right], slider, **quiet)
    keep_draft("compare", boxes)
    gr.context.Context.root_block.load(show_errors(page.list_choices), None, [adapter, measures[0]], **quiet)


def stream_comparison(
    plan: Comparison, pipes: PipelineWorker, folder: Path, turns: Turns | None = None
) -> Iterator[tuple[Job, tuple[Any, ...]]]:
    """The drawing and what the page shows, while cells are drawn, and at last."""
    done: dict[Recipe, str] = {}
    began, seen, order = time.monotonic(), -1, drawing_order(plan.recipes)
    emptied = (None, [], [], *[gr.Dropdown(choices=[], value=None)] * 2, None)
    drawing = Job(0)
    try:
        for now in run_in_background(
            lambda drawing: compare(plan, drawer(pipes, folder, done, drawing)),
            sum(recipe.steps for recipe in order),
            turns,
        ):
            if isinstance(now, ComparisonResult):
                yield drawing, (describe_result(plan, now, time.monotonic() - began), *result_values(plan, now))
                return
            shown = emptied if seen < 0 else (gr.skip(),) * len(emptied)
            drawing, before, seen = now, seen, len(done)
            if seen > before >= 0:
                named = zip(plan.recipes, plan.captions, strict=True)
                shown = (gr.skip(), [(done[one], name) for one, name in named if one in done], *shown[2:])
            yield (
                drawing,
                (progress_bar(now.progress, now.ahead) + message_html(f"{seen} of {len(order)} images."), *shown),
            )
    except JobStopped:
        said = f"Stopped; {len(done)} of {len(order)} images are drawn and kept."
        yield drawing, (message_html(said), *(gr.skip(),) * len(emptied))


def result_values(plan: Comparison, result: ComparisonResult) -> list[Any]:
    """Sheet, gallery, table, the two choices and the slider of what has been drawn."""
    cells = list(zip(result.files, plan.captions, strict=True))
    scored = (
        [(file, f"{name} · {score_words(one)}") for (file, name), one in zip(cells, result.scores, strict=True)]
        if result.scores
        else cells
    )
    choices = [(f"{number}: {name}", Path(file).name) for number, (file, name) in enumerate(cells, 1)]
    first, last = result.files[0], result.files[-1]
    alike = [file for file, one in zip(result.files, plan.recipes, strict=True) if one.seed == plan.recipes[0].seed]
    last = alike[-1] if len(alike) > 1 else last  # of the same seed, where there is one
    chosen = [gr.Dropdown(choices=choices, value=Path(file).name) for file in (first, last)]
    return [result.grid, scored, score_table(plan, result), *chosen, (first, last)]


def setting_inputs() -> list[Any]:
    """Boxes for what all cells have, in the order of `ComparisonInputs`."""
    with gr.Row():
        base = gr.Dropdown(
            [*EMBEDDED], value="tiny", allow_custom_value=True, label="Base model", elem_id="compare-base"
        )
        adapter = gr.Dropdown(
            [NO_ADAPTER], value=NO_ADAPTER, allow_custom_value=True, label="Adapter", elem_id="compare-adapter", scale=2
        )
        strength = gr.Number(label="Strength", value=1, step=0.05, min_width=120, elem_id="compare-strength")
    with gr.Row():
        prompt = gr.Textbox(
            label="Prompt", value="a sks creature on the beach", lines=2, scale=2, elem_id="compare-prompt"
        )
        negative = gr.Textbox(label="Negative prompt", lines=2, scale=1)
    with gr.Row():
        seed = gr.Number(label="Seed (-1 = random)", value=0, min_width=120, elem_id="compare-seed")
        steps, guidance = steps_box("compare-steps"), guidance_box("compare-guidance")
        width = gr.Number(label="Width (0 = model default)", value=0, min_width=120)
        height = gr.Number(label="Height (0 = same as width)", value=0, min_width=120)
    return [base, adapter, strength, prompt, negative, seed, steps, guidance, width, height]


def axis_inputs(side: str, what: str) -> list[Any]:
    """What varies along X, Y or Z, and with which values; Z makes a block of rows for each."""
    place = f"compare-{side.lower()}"
    choices = [*FIELDS] if side == "X" else [NOTHING, *FIELDS]
    with gr.Row():
        chosen = gr.Dropdown(choices, value=what, label=f"{side} axis", elem_id=place)
        values = gr.Textbox(
            label=f"Values of {side}", value=PROPOSED_VALUES.get(what, ""), info="One per line.", lines=3, max_lines=12, scale=2,
            elem_id=f"{place}-values",
        )  # fmt: skip
    return [chosen, values]


def measure_inputs() -> list[Any]:
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


def result_outputs() -> list[Any]:
    """Progress, sheet, gallery, table, the two choices and the slider."""
    said = gr.HTML(label="Progress", elem_id="compare-said")
    sheet = gr.Image(
        label="Grid", format="png", type="filepath", interactive=False, buttons=["download", "fullscreen"],
        show_label=False, elem_id="compare-sheet",
    )  # fmt: skip
    table = gr.Dataframe(
        headers=HEADERS,
        label="Scores",
        interactive=False,
        wrap=True,
        render=False,
        elem_id="compare-table",
    )
    gallery = gr.Gallery(
        label="Images", columns=4, fit_columns=False, format="png", elem_id="compare-cells",
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
