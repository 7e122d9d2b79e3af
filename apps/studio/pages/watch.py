"""Watch: what a run is doing, its curves, previews and log, and the buttons that stop it or let it go on.

Everything shown comes from the run's folder, so that a reload, another browser or a new start of the app shows the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from ....toolkit.core.run_folder import LIVE_STATES
from ....training.launch.queue import requeue, start_worker, withdraw
from ..backend.context import Studio
from ..render.messages import message_html, show_errors
from ..render.run_view import Views

TICK = 2.0  # seconds
OUTPUTS = 9
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False}


class WatchPage:
    """What the page's events do."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.paths, self.views = studio, studio.paths, Views()

    def choices(self) -> list[tuple[str, str]]:
        """Names of runs with their states."""
        names = self.paths.run_names()
        return [(f"{name} ({self.paths.run(name).state() or 'unknown'})", name) for name in names]

    def list_runs(self) -> Any:
        """The box with the runs that there are now."""
        return gr.Dropdown(choices=self.choices())

    def choose_run(self, request: gr.Request, chosen: str | None) -> tuple[Any, Any]:
        """The run that the page's address names, or that was chosen last, or the newest."""
        choices = self.choices()
        names = [name for _, name in choices]
        wanted = request.query_params.get("run") or chosen
        value = wanted if wanted in names else (names[0] if names else None)
        return gr.Dropdown(choices=choices, value=value), value

    def show_run(self, name: str | None, seen: tuple[int, ...]) -> tuple[Any, ...]:
        """What has changed of a run since this page last saw it; seen: marks of what it saw."""
        if not name:
            return message_html("There is no run yet: start one on the Train page."), "", [], "", (), *button_states("")
        view = self.views.view(self.paths.run(name))
        marks = tuple(map(hash, view.parts))
        new = [not seen or mark != old for mark, old in zip(marks, seen or marks, strict=True)]
        if not any(new):
            return (gr.skip(),) * OUTPUTS
        images = list(map(list, view.previews))
        values = [view.status_html, view.curves_html, images, view.log, *button_states(view.state)]
        changed = [*new[:-1], *new[-1:] * 4]  # the buttons follow the state
        told, curves, gallery, log, *pressable = (
            value if is_new else gr.skip() for value, is_new in zip(values, changed, strict=True)
        )
        return told, curves, gallery, log, marks, *pressable

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
    with gr.Row():
        name = gr.Dropdown(
            label="Run", choices=[], interactive=True, allow_custom_value=True, scale=3, elem_id="run"
        )  # checked by us: Gradio would compare with the list as it was when the app started
        refresh = gr.Button("Refresh", scale=1)
    seen = gr.State(())
    kept = gr.BrowserState(None, storage_key="rankfold-run", secret="rankfold")
    state = gr.HTML(label="State", elem_id="state")
    with gr.Row():
        stop = gr.Button("Stop after this step", variant="stop", elem_id="stop")
        sample = gr.Button("Sample now")
        save = gr.Button("Save now")
        again = gr.Button("Resume", variant="primary", elem_id="resume")
    changed = gr.Checkbox(
        False,
        label="Resume though its images, rows or base have changed (--accept-changes)",
        elem_id="accept-changes",
    )
    said = gr.HTML(label="Answer", elem_id="said")
    curves = gr.HTML(label="Curves", elem_id="curves")
    gallery = gr.Gallery(
        label="Previews, newest first", columns=4, height="max-content", format="png", elem_id="previews"
    )
    log = gr.Textbox(label="Log, newest line first", lines=10, max_lines=20, interactive=False, elem_id="log")
    timer = gr.Timer(TICK)

    shown = [show_errors(watch.show_run), [name, seen], [state, curves, gallery, log, seen, stop, sample, save, again]]
    page = gr.context.Context.root_block
    page.load(show_errors(watch.choose_run), kept, [name, kept], api_visibility="private", **QUIET).then(
        *shown, api_visibility="private", **QUIET
    )
    timer.tick(*shown, api_name="look", concurrency_limit=None, **QUIET)
    name.input(lambda value: (value, ()), name, [kept, seen], api_visibility="private", **QUIET).then(
        *shown, api_visibility="private", **QUIET
    )
    refresh.click(show_errors(watch.list_runs), None, name, api_name="runs", **QUIET)
    for button, request in ((stop, "stop"), (sample, "sample"), (save, "save")):
        button.click(show_errors(watch.request_handler(request)), name, said, api_name=request, show_progress="hidden")
    again.click(show_errors(watch.resume_run), [name, changed], said, api_name="resume", show_progress="hidden")
