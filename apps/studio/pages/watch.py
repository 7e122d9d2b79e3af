"""Watch: all runs, what the chosen one is doing, its curves, previews and log, and the buttons that stop it or let it go on.

Everything shown comes from the run's folder, so that a reload, another browser or a new start of the app shows the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gradio as gr

from ....toolkit.core.errors import UserError
from ....toolkit.core.run_folder import LIVE_STATES
from ....training.launch.queue import list_runs, requeue, run_next, start_worker, withdraw
from ..backend.context import Studio
from ..backend.housekeeping import delete_run, deletion_of_run, rename_run
from ..backend.paths import to_slug
from ..backend.references import reference_photos
from ..render.messages import message_html, show_errors
from ..render.previews import at_step, step_slider
from ..render.run_cards import run_choices
from ..render.run_view import MAX_AGE_SECONDS, Views
from ..widgets.actions import act, beside
from ..widgets.deletion import Deletion
from ..widgets.zoom_chart import ZoomChart

TICK = 2.0  # seconds
OUTPUTS = 13
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False}
NO_RUN = "There is no run yet: start one on the Train page, or try the demo on the first page."


class WatchPage:
    """What the page's events do."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.paths, self.views = studio, studio.paths, Views()
        self.listed: tuple[float, list[tuple[str, str]]] = (0.0, [])

    def choices(self) -> list[tuple[str, str]]:
        """All runs with their states, as they were a second ago at most."""
        at, found = self.listed
        if time.monotonic() - at >= MAX_AGE_SECONDS:
            found = run_choices(list_runs(self.paths.runs))
            self.listed = (time.monotonic(), found)
        return found

    def list_runs(self) -> Any:
        """The list with the runs that there are now."""
        self.listed = (0.0, [])
        return gr.Radio(choices=self.choices())

    def choose_run(self, request: gr.Request, chosen: str | None) -> tuple[Any, Any, Any]:
        """The run that the page's address names, or that was chosen last, or the newest."""
        self.listed = (0.0, [])
        choices = self.choices()
        names = [name for _, name in choices]
        wanted = request.query_params.get("run")
        value = wanted or (chosen if chosen in names else (names[0] if names else ""))
        return gr.Radio(choices=choices, value=value if value in names else None), value, value

    def show_run(self, name: str | None, seen: tuple[int, ...], step: float = 0) -> tuple[Any, ...]:
        """What has changed of a run since this page last saw it; seen: marks of what it saw; step: of the previews that are shown."""
        choices = self.choices()
        if not name:
            return (
                message_html(NO_RUN),
                "",
                [],
                "",
                (),
                *button_states(""),
                *step_slider((), 0),
                [],
                gr.Radio(choices=choices),
            )
        try:
            view = self.views.view(self.paths.run(name))
        except UserError as error:
            fault = message_html(str(error), "fault")
            return fault, "", [], "", (), *button_states(""), *step_slider((), 0), [], gr.Radio(choices=choices)
        marks = (*map(hash, view.parts), hash(tuple(choices)))
        new = [not seen or mark != old for mark, old in zip(marks, seen or marks, strict=True)]
        if not any(new):
            return (gr.skip(),) * OUTPUTS
        images = list(map(list, view.previews))
        slider = step_slider(view.previews, int(step or 0) if seen else 0)
        photos = [] if seen else reference_photos(self.paths, name)
        values = [view.status_html, view.curves_html, images, view.log, *button_states(view.state), *slider, photos,
                  gr.Radio(choices=choices)]  # fmt: skip
        changed = [*new[:4], *new[4:5] * 4, *new[2:3] * 2, not seen, new[5]]  # the buttons follow the state
        told, curves, gallery, log, *rest = (
            value if is_new else gr.skip() for value, is_new in zip(values, changed, strict=True)
        )
        return told, curves, gallery, log, marks, *rest

    def show_step(self, name: str | None, step: float) -> Any:
        """The previews of a step."""
        return at_step(self.views.view(self.paths.run(name)).previews, int(step)) if name else []

    def request_handler(self, request: str) -> Callable[[str], str]:
        """What a button leaves for a run at work."""

        def ask(name: str) -> str:
            run = self.paths.run(name)
            if request == "stop":
                withdraw(run)
                return message_html("Stopping after the current step; a checkpoint is kept.")
            run.request(request)
            return message_html(f"{'Sampling' if request == 'sample' else 'Saving'} after this step.")

        ask.__name__ = f"ask_to_{request}"
        return ask

    def resume_run(self, name: str, accept_changes: bool = False) -> str:
        """Queues a run that ended before its end. accept_changes: also where its data have changed."""
        requeue(self.paths.run(name), accept_changes=accept_changes)
        if self.studio.start_workers:
            start_worker(self.paths.runs, self.studio.device)
        return message_html("It is in the queue and goes on from its newest checkpoint.")

    def move_up(self, name: str) -> str:
        """A waiting run to the head of the queue."""
        run_next(self.paths.run(name))
        return message_html(f"{name} is next in the queue.")

    def rename(self, name: str, wish: str) -> tuple[Any, ...]:
        """Another name for the run."""
        new = to_slug(wish)
        text = rename_run(self.paths, name, new)
        self.listed = (0.0, [])
        return message_html(text), new, (), gr.Radio(choices=self.choices(), value=new), ""

    def after_deletion(self) -> tuple[Any, ...]:
        """The newest run instead of one that is gone."""
        self.listed = (0.0, [])
        choices = self.choices()
        newest = choices[0][1] if choices else ""
        return newest, (), gr.Radio(choices=choices, value=newest or None)


def button_states(state: str) -> tuple[Any, ...]:
    """Which of stop, sample, save and resume may be pressed."""
    live = state in LIVE_STATES
    return (
        gr.Button(interactive=live or state == "queued"),
        gr.Button(interactive=live),
        gr.Button(interactive=live),
        gr.Button(interactive=state in ("stopped", "failed", "lost")),
    )


def build(studio: Studio) -> None:
    """The page."""
    watch = WatchPage(studio)
    name, seen = gr.Textbox("", label="Run", visible="hidden"), gr.State(())
    kept = gr.BrowserState(None, storage_key="rankfold-run", secret="rankfold")
    with gr.Row():
        with gr.Column(scale=1, min_width=240):
            runs = gr.Radio([], label="Runs, newest first", elem_id="run", elem_classes=["choices", "runs"])
            refresh = gr.Button("Refresh", size="sm")
        with gr.Column(scale=3, min_width=300):
            state = gr.HTML(label="State", elem_id="state")
            with gr.Row():
                stop = gr.Button("Stop after this step", variant="stop", size="sm", min_width=120, elem_id="stop")
                sample = gr.Button("Sample now", size="sm", min_width=100)
                save = gr.Button("Save now", size="sm", min_width=100)
                again = gr.Button("Resume", variant="primary", size="sm", min_width=100, elem_id="resume")
            said = gr.HTML(label="Answer", elem_id="said")
            with gr.Row():
                reference = gr.Gallery(
                    label="What it learns from", columns=3, height="max-content", elem_id="reference", buttons=[],
                    object_fit="contain", allow_preview=False, min_width=160, fit_columns=False,
                )  # fmt: skip
                with gr.Column(min_width=200):
                    shown = gr.Gallery(
                        label="Previews", columns=2, height="max-content", format="png", elem_id="previews",
                        object_fit="contain", buttons=["download", "fullscreen"],
                    )  # fmt: skip
                    step = gr.Slider(0, 1, 0, step=1, label="Previews at step", elem_id="step", visible=False)
            curves = gr.HTML(label="Curves", elem_id="curves")
            zoomed = ZoomChart()
            with gr.Accordion("All previews, newest first", open=False):
                gallery = gr.Gallery(
                    label="All previews", columns=4, height="max-content", format="png", elem_id="all-previews"
                )
            log = gr.Textbox(label="Log, newest line first", lines=6, max_lines=20, interactive=False, elem_id="log")
            manage = manage_section()
    timer = gr.Timer(TICK)

    buttons = [stop, sample, save, again]
    look = [[name, seen, step], [state, curves, gallery, log, seen, *buttons, step, shown, reference, runs]]
    handler = beside(watch.show_run, 0, OUTPUTS)
    page = gr.context.Context.root_block
    page.load(show_errors(watch.choose_run), kept, [runs, name, kept], api_visibility="private", **QUIET).then(
        handler, *look, api_visibility="private", **QUIET
    )
    timer.tick(handler, *look, api_name="look", concurrency_limit=None, **QUIET)
    runs.input(
        lambda value: (value, value, (), ""), runs, [name, kept, seen, said], api_visibility="private", **QUIET
    ).then(handler, *look, api_visibility="private", **QUIET)
    step.input(show_errors(watch.show_step), [name, step], shown, api_visibility="private", **QUIET)
    refresh.click(show_errors(watch.list_runs), None, runs, api_name="runs", **QUIET)
    for button, request in ((stop, "stop"), (sample, "sample"), (save, "save")):
        act(button, watch.request_handler(request), name, [said], said, api_name=request)
    zoomed.wire(name, lambda run: watch.views.view(watch.paths.run(run)).charts)
    wire_manage(watch, manage, again, [name, seen, runs, said])


def manage_section() -> tuple[Any, ...]:
    """What one does with a run as a whole."""
    with gr.Accordion("Rename, delete, order", open=False, elem_id="run-actions"), gr.Row():
        with gr.Column(min_width=200):
            first = gr.Button("Run this one next", size="sm", elem_id="run-next")
            changed = gr.Checkbox(
                False, label="Resume though its images, rows or base have changed (--accept-changes)", elem_id="accept-changes"
            )  # fmt: skip
        with gr.Column(min_width=200):
            wish = gr.Textbox(label="New name of this run", elem_id="run-new-name")
            rename = gr.Button("Rename", size="sm", elem_id="run-rename")
        with gr.Column(min_width=200):
            deletion = Deletion("Delete this run", "run")
    return first, changed, wish, rename, deletion


def wire_manage(watch: WatchPage, manage: tuple[Any, ...], again: Any, boxes: list[Any]) -> None:
    """What these buttons do. boxes: the run's name, what was seen of it, the list, and what is said."""
    first, changed, wish, rename, deletion = manage
    name, seen, runs, said = boxes
    act(again, watch.resume_run, [name, changed], [said], said, api_name="resume")
    act(first, watch.move_up, name, [said], said)
    act(rename, watch.rename, [name, wish], [said, name, seen, runs, wish], said)
    deletion.wire(
        lambda chosen: deletion_of_run(watch.paths, chosen), lambda chosen: delete_run(watch.paths, chosen), name, said,
        watch.after_deletion, [name, seen, runs],
    )  # fmt: skip
