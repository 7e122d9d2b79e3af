"""Generate: images with any base and any number of adapters, all that was made here, and the settings of each back by a click."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ....pipelines.generate import Recipe, check_given_images, parse_recipe
from ....pipelines.unused import unused_in_recipe
from ....toolkit.core.errors import UserError
from ....toolkit.diffusion.load import EMBEDDED
from ..backend.adapter_cards import adapter_cards
from ..backend.adapter_list import AdapterEntry, list_adapters
from ..backend.context import Studio
from ..backend.generated import find_generated_image, generated_thumbnails
from ..backend.pipeline_worker import BATCH, Job, JobStopped, run_in_background, save_images
from ..backend.recipes import (
    SAMPLERS,
    base_numbers,
    build_recipe,
    recalled_adapters,
    sampler_name,
    suggested_base_and_prompt,
)
from ..backend.several_subjects import SIDE_BY_SIDE, TOGETHER, arrange, trigger_words
from ..backend.start_images import keep_references, keep_start, kept_start
from ..backend.temporary import temporary_subfolder
from ..backend.turns import calling_client
from ..render.messages import message_html, name_settings, progress_bar, show_errors
from ..widgets.actions import act, named
from ..widgets.adapter_rows import ROWS, AdapterRows, row_values, row_visibility
from ..widgets.drawing_boxes import guidance_box, steps_box
from ..widgets.filling import fill_on_load, suggest_text
from ..widgets.mask_painter import MaskPainter, save_painted_mask
from ..widgets.reference_slot import ReferenceSlot
from ..widgets.subject_places import SubjectPlaces

MAX_IMAGES = 64  # images at once
SETTINGS = 10  # boxes before the adapters'
PARAMETERS = (  # what programs call the inputs of /generate
    "base", "prompt", "negative_prompt", "seed", "n", "steps", "guidance_scale", "width", "height", "sampler",
    *(name for row in range(1, ROWS + 1) for name in (f"adapter_{row}_on", f"adapter_{row}", f"adapter_{row}_strength")),
    "image", "mask", "image_strength", "references",
)  # fmt: skip


class GeneratePage:
    """What the page's events do."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.paths, self.worker = studio, studio.paths, studio.worker

    def make_images(self, base: str, prompt: str, negative: str, seed: float, n: float, steps: float | None, guidance: float | None,
                      width: float, height: float, sampler: str, *more: Any) -> Iterator[Any]:  # fmt: skip
        """Draws; yields progress, the images as they come and a preview, then all of them and their seed. For programs."""
        yield from self.draw(
            *self.recipe_of(base, prompt, negative, seed, n, steps, guidance, width, height, sampler, *more)
        )

    def recipe_of(self, base: str, prompt: str, negative: str, seed: float, n: float, steps: float | None, guidance: float | None,
                    width: float, height: float, sampler: str, *more: Any) -> tuple[Recipe, int]:  # fmt: skip
        """The recipe that the boxes mean, and how many images.

        more: the rows of adapters; then the image that it starts from, the mask, how far it is changed, and the references.
        """
        *rows, image, mask, far, references = more
        if not 1 <= (n or 0) <= MAX_IMAGES or n != int(n):
            raise UserError(f"The number of images must be a whole number from 1 to {MAX_IMAGES}, not {n}.")
        values = {
            "steps": steps, "guidance_scale": guidance, "width": width, "height": height, "seed": seed, "scheduler": sampler,
            "image": keep_start(self.paths, image, "The image"), "mask": keep_start(self.paths, mask, "The mask"), "image_strength": far,
            "references": keep_references(self.paths, references),
        }  # fmt: skip
        recipe = build_recipe(self.paths, base, prompt or "", negative or "", values, tuple(rows))
        check_given_images(recipe)
        return recipe, int(n)

    def draw(self, recipe: Recipe, count: int) -> Iterator[Any]:
        """See `make_images`."""
        kept: list[str] = []
        folder, key, shown = self.paths.generated_folder(), calling_client().page, 0
        steps, seen = max(1, int(recipe.steps * (recipe.image_strength if recipe.image else 1))), ""
        together = max(1, BATCH // max(1, len(recipe.subjects)))

        def work(drawing: Job) -> Any:
            return self.worker.draw(
                recipe, count, drawing, lambda made: kept.extend(save_images(made, folder, "picture"))
            )

        try:
            for now in run_in_background(work, -(-count // together) * steps, self.studio.turns):
                if isinstance(now, Job):
                    self.studio.jobs[key] = now
                    images, shown = list(kept) if len(kept) > shown else gr.skip(), len(kept)
                    before, seen = seen, now.preview.html
                    yield (
                        progress_bar(now.progress, now.ahead),
                        images,
                        gr.skip(),
                        seen if seen != before else gr.skip(),
                    )
                else:
                    again = shlex.join(["rankfold", "sample", "--from", kept[0]])
                    text = f"{count} images, seed {recipe.seed}. The first again in a terminal, to the byte: {again}"
                    notes = "".join(message_html(name_settings(note)) for note in unused_in_recipe(recipe))
                    yield message_html(text) + notes, list(kept), recipe.seed, ""
        except JobStopped:
            text = f"Stopped: {len(kept)} of {count} images are drawn and kept."
            yield message_html(text), list(kept) if kept else gr.skip(), recipe.seed, ""
        finally:
            self.studio.jobs.pop(key, None)

    def make_painted_images(
        self, painting: dict[str, Any] | None, arrangement: str, places: dict[str, Any] | None, *values: Any
    ) -> Iterator[Any]:
        """Draws as `make_images` does, with the mask and the places that are painted on the page, if any are."""
        *others, image, mask, far, references = values
        with temporary_subfolder("mask") as folder:
            file = folder / "mask.png"
            if save_painted_mask(painting, image, file):
                if mask:
                    raise UserError("A mask is painted, and another one is uploaded: take one of them away.")
                mask = str(file)
            recipe, count = self.recipe_of(*others, image, mask, far, references)
            yield from self.draw(arrange(recipe, arrangement, places), count)

    def stop(self) -> Any:
        """Stops what this page draws, or waits for."""
        job = self.studio.jobs.get(calling_client().page)
        if job is None:
            return message_html("Nothing is being drawn.")
        job.stopped = True
        return message_html("Stopping after this denoising step; what is drawn is kept.")

    def recall_settings(self, file: str | None) -> tuple[Any, ...]:
        """The settings of an image, for every box, and for how many rows are shown."""
        if not file:
            raise UserError("Drop a PNG that was made here, or by rankfold sample.")
        try:
            recipe = parse_recipe(Path(file))
        except UserError as error:  # where it was uploaded to helps nobody
            raise UserError(str(error).replace(f"--from {file}", Path(file).name)) from error
        names = recalled_adapters(self.paths, recipe)
        self.paths.base(recipe.base)
        values = (
            recipe.base, recipe.prompt, recipe.negative_prompt, recipe.seed, 1, recipe.steps, recipe.guidance_scale,
            recipe.width, recipe.height, sampler_name(recipe.scheduler),
        )  # fmt: skip
        rows = row_values(names, recipe.strengths)
        start = (
            kept_start(self.paths, recipe.image), kept_start(self.paths, recipe.mask), recipe.image_strength,
            [kept_start(self.paths, path) for path in recipe.references],
        )  # fmt: skip
        shown = row_visibility(max(1, len(names)))
        side_by_side = bool(recipe.subjects) and [*recipe.subjects] == [
            trigger_words(self.paths.adapter(name)) for name in names
        ]
        said = f"The settings of {Path(file).name}."
        if recipe.regions or (recipe.subjects and not side_by_side):
            said += (
                f" Its subjects have words or places of their own that this page does not show: rankfold sample --from "
                f"{Path(file).name} makes it again."
            )
        return message_html(said), *values, *rows, *start, *shown, SIDE_BY_SIDE if side_by_side else TOGETHER

    def recall_made(self, event: gr.SelectData) -> tuple[Any, ...]:
        """The settings of an image that was clicked."""
        caption = event.value.get("caption") if isinstance(event.value, dict) else ""
        return self.recall_settings(find_generated_image(self.paths, str(caption)))

    def add_card(self, event: gr.SelectData, count: int, *rows: Any) -> tuple[Any, ...]:
        """The adapter of a card, in the first row that is free; and the button that puts its trigger words into the prompt."""
        cards = self.cards()
        if not isinstance(event.index, int) or event.index >= len(cards):
            raise UserError("The cards have changed: reload the page.")
        one = cards[event.index]
        names = [name or "" for name in rows[1::3]]
        if one.name in names[:count]:
            raise UserError(f"{one.name} is among the adapters already.")
        place = next((number for number, name in enumerate(names) if not name), None)
        if place is None:
            raise UserError(f"There are {ROWS} adapters already, as many as this page shows.")
        changes = [gr.skip()] * len(rows)
        changes[3 * place : 3 * place + 3] = [True, one.name, 1.0]
        offer = gr.Button(f"Put “{one.trigger}” into the prompt", visible=bool(one.trigger))
        said = message_html(f"{one.name} is added, for the base {one.facts.base or 'that it was made for'}.")
        return said, offer, one.trigger, *changes, *row_visibility(max(count, place + 1))

    def cards(self) -> list[AdapterEntry]:
        """The adapters that have a card."""
        return [one for one in list_adapters(self.paths).values() if not one.is_chat]

    def suggest_base_and_prompt(self, name: str) -> tuple[Any, ...]:
        """The base that an adapter was made for, a prompt (see `suggested_base_and_prompt`), and nothing to complain of."""
        return *suggested_base_and_prompt(self.paths, name), ""


class GenerateBoxes:
    """The page's boxes."""

    def __init__(self, studio: Studio) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                self.build_settings(studio)
            with gr.Column(scale=6, min_width=300):
                self.said = gr.HTML(label="Progress", elem_id="progress")
                self.live = gr.HTML(label="While it is drawn", elem_id="live")
                self.gallery = gr.Gallery(
                    label="Results",
                    columns=2,
                    height="max-content",
                    format="png",
                    elem_id="pictures",
                    object_fit="contain",
                )
                self.dropped = gr.File(
                    label="Drop an image to reuse its settings", file_types=[".png"], elem_id="dropped", height=150
                )
        self.made = gr.Gallery(
            label="Everything made here: click an image to reuse its settings", columns=8, height="max-content", elem_id="made",
            object_fit="cover", allow_preview=False, buttons=[], fit_columns=False,
        )  # fmt: skip
        self.last = gr.Number(visible=False)

    def build_settings(self, studio: Studio) -> None:
        """What decides an image."""
        self.prompt = gr.Textbox(label="Prompt", value="a sks creature on the beach", lines=3, elem_id="prompt")
        self.base = gr.Dropdown(
            [*EMBEDDED], value="tiny", allow_custom_value=True, label="Base model", elem_id="base",
            info="Embedded, a hub id, or a folder.",
        )  # fmt: skip
        self.adapters = AdapterRows(studio.paths)
        with gr.Accordion("All adapters: click a card to add one", open=False, elem_id="lora-cards"):
            self.cards = gr.Gallery(
                label="Adapters", columns=3, height="max-content", object_fit="cover", allow_preview=False, buttons=[],
                fit_columns=False, elem_id="cards",
            )  # fmt: skip
        self.subjects = SubjectPlaces()
        self.trigger = gr.State("")
        self.offer = gr.Button("Put the trigger words into the prompt", size="sm", visible=False, elem_id="offer")
        with gr.Row():
            self.n = gr.Number(label="Images", value=4, min_width=90, elem_id="n")
            self.steps = steps_box("steps")
            self.seed = gr.Number(label="Seed (-1 = random)", value=-1, min_width=120, elem_id="seed")
        with gr.Row():
            self.go = gr.Button("Generate", variant="primary", elem_id="generate")
            self.stop = gr.Button("Stop", variant="stop", elem_id="generate-stop")
        with gr.Accordion("Start from an image", open=False, elem_id="generate-start"):
            with gr.Row():
                looks: dict[str, Any] = {"type": "filepath", "sources": ["upload"], "height": 180, "min_width": 140}
                self.image = gr.Image(label="Image", elem_id="start-image", **looks)
                self.mask = gr.Image(label="Mask: white is new", elem_id="start-mask", **looks)
            self.painter = MaskPainter(self.image)
            self.far = gr.Slider(
                0.05, 1, 0.6, step=0.05, label="Image strength: how far it is changed", elem_id="start-strength"
            )
        self.references = ReferenceSlot("generate")
        with gr.Accordion("More settings", open=False, elem_id="generate-more"):
            self.negative = gr.Textbox(label="Negative prompt", lines=2, elem_id="negative")
            with gr.Row():
                self.guidance = guidance_box("guidance")
                self.sampler = gr.Dropdown(
                    [*SAMPLERS], value=next(iter(SAMPLERS)), label="Sampler", allow_custom_value=True, min_width=150,
                    elem_id="sampler",
                )  # fmt: skip
            with gr.Row():
                self.width = gr.Number(label="Width (0 = model default)", value=0, min_width=130, elem_id="width")
                self.height = gr.Number(label="Height (0 = same as width)", value=0, min_width=130, elem_id="height")

    @property
    def boxes(self) -> list[Any]:
        """In the order in which `make_images` takes them."""
        return [
            self.base, self.prompt, self.negative, self.seed, self.n, self.steps, self.guidance, self.width, self.height,
            self.sampler, *self.adapters.boxes,
        ]  # fmt: skip

    @property
    def start(self) -> list[Any]:
        """What it starts from, and the references: behind the boxes, and not among what the browser keeps."""
        return [self.image, self.mask, self.far, self.references.gallery]


def build(studio: Studio) -> None:
    """The page."""
    generate, page = GeneratePage(studio), GenerateBoxes(studio)
    said, boxes, adapters = page.said, page.boxes, page.adapters
    draft = gr.BrowserState(None, storage_key="rankfold-generate", secret="rankfold")
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

    def restore(kept: Any, request: gr.Request) -> tuple[Any, ...]:
        return restored_boxes(generate, adapters, kept, request.query_params.get("adapter"))

    @show_errors
    def list_made() -> Any:
        return generated_thumbnails(studio.paths)

    shown, painted = [said, page.gallery, page.last, page.live], [page.painter.editor, *page.subjects.boxes]
    pressed = [*painted, *boxes, *page.start]
    event = act(page.go, generate.make_painted_images, pressed, shown, said, concurrency_limit=None)
    called = [*boxes, page.image, page.mask, page.far, page.references.files]
    gr.on(
        [],
        named(show_errors(generate.make_images), PARAMETERS),
        called,
        shown,
        api_name="generate",
        concurrency_limit=None,
    )
    event.then(list_made, None, page.made, **quiet)
    act(page.stop, generate.stop, None, [said], said, queue=False)
    recalled = [said, *boxes, *page.start, *adapters.length, page.subjects.arrangement]
    act(page.dropped.upload, generate.recall_settings, page.dropped, recalled, said, api_name="recall")
    act(page.made.select, generate.recall_made, None, recalled, said)
    page.base.change(
        lambda base: base_numbers(studio.paths, base), page.base, [page.steps, page.guidance], queue=False, **quiet
    )
    offered, name = gr.JSON(visible=False, label="A prompt for the adapter"), adapters.names[0]
    chosen = act(name.input, generate.suggest_base_and_prompt, name, [page.base, offered, said], said)
    suggest_text(chosen, offered, page.prompt)
    added = [said, page.offer, page.trigger, *adapters.boxes, *adapters.length]
    act(page.cards.select, generate.add_card, [adapters.count, *adapters.boxes], added, said)
    page.offer.click(
        lambda prompt, words: (f"{prompt}, {words}" if prompt.strip() else f"a {words}", gr.Button(visible=False)),
        [page.prompt, page.trigger], [page.prompt, page.offer], queue=False, **quiet,
    )  # fmt: skip
    gr.on([box.change for box in boxes], None, boxes, draft, js="(...values) => [values]", **quiet)
    fill_on_load(restore, draft, boxes, [*adapters.length, said], said)
    root = gr.context.Context.root_block
    root.load(list_made, None, page.made, **quiet)
    root.load(show_errors(lambda: adapter_cards(generate.cards(), studio.paths)), None, page.cards, **quiet)


def restored_boxes(generate: GeneratePage, adapters: AdapterRows, kept: Any, wanted: str | None) -> tuple[Any, ...]:
    """What every box held when this browser last saw the page, and the adapter that its address names."""
    known, values, rows = generate.paths.adapters(), [gr.skip()] * SETTINGS, []
    if isinstance(kept, list) and len(kept) == SETTINGS + 3 * ROWS:
        values = kept[:SETTINGS]
        rows = [row for row in zip(*[iter(kept[SETTINGS:])] * 3, strict=True) if row[1] in known]
    if wanted:
        generate.paths.adapter(wanted)
        base, prompt = suggested_base_and_prompt(generate.paths, wanted)
        values, rows = [base, prompt[0] if prompt else gr.skip(), *values[2:]], [(True, wanted, 1.0)]
    strengths = [strength if isinstance(strength, int | float) else 1.0 for *_, strength in rows]
    filled = adapters.filled([name for _, name, _ in rows], strengths, [bool(on) for on, *_ in rows])
    return *values, *filled, ""
