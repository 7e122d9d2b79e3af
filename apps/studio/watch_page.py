"""Watch: what a run is doing, its curves, previews and log, and the buttons that stop it or let it go on.

Everything shown comes from the run's folder, so that a reload, another browser or a new start of the app shows the same.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from ...toolkit.errors import UserError
from ...toolkit.runs import LIVE, Run
from ...training.queue import OUTPUT, enqueue_again, start_worker, waiting, withdraw
from .curves import drawing, smoothed
from .studio import Studio
from .words import note, plainly, time_left, without_secrets

TICK = 2.0  # seconds
LOG_LINES = 200
PREVIEWS = 60  # the newest


def signature(run: Run) -> tuple[Any, ...]:
    """What changes whenever there is something new to show."""

    def mark(path: Path) -> int:
        return path.stat().st_mtime_ns if path.exists() else 0

    files = (run.status_file, run.metrics_file, run.log_file, run.samples, run.folder / OUTPUT)
    return (str(run.folder), run.state(), *map(mark, files))


@lru_cache(maxsize=64)
def shown(seen: tuple[Any, ...]) -> tuple[str, str, tuple[tuple[str, str], ...], str]:
    """State, curves, previews and log of a run; many viewers of one run share one drawing. seen: its `signature`."""
    run = Run(Path(seen[0]))
    rows = run.metrics()
    return state_of(run, rows), curves_of(rows), previews_of(run), log_of(run)


def state_of(run: Run, rows: Sequence[dict[str, Any]]) -> str:
    """The state in a line, how far it is, and why it failed."""
    status, state = run.status(), run.state() or "unknown"
    losses = [row for row in rows if "loss" in row]
    step, total = max(status.get("step", 0), losses[-1]["step"] if losses else 0), status.get("total", 0)
    facts = [f"step {step} of {total}"] if total else []
    if losses and state in LIVE:
        last = losses[-1]
        speed = last.get("images_per_second", 0)
        facts.append(f"{speed:.1f} images/s")
        if "memory_gib" in last:
            facts.append(f"{last['memory_gib']:.2f} GiB")
        if len(losses) > 1 and speed:
            batch = batch_of(run)
            facts.append(f"about {time_left((total - step) * batch / speed)} left")
    if state == "queued":
        place = [one.folder.name for one in waiting(run.folder.parent)]
        if run.folder.name in place:
            facts.append(f"number {place.index(run.folder.name) + 1} in the queue")
    text = f'<div class="state" role="status"><b>{html.escape(state)}</b>' + "".join(
        f"<span>{html.escape(fact)}</span>" for fact in facts
    )
    text += f'</div><progress max="{total or 1}" value="{step}" aria-label="steps done"></progress>'
    if state == "lost":
        text += note(
            "Its process is gone without a word (killed, or out of memory). Resume goes on from its last checkpoint.",
            "fault",
        )
    if state == "failed":
        text += note(without_secrets(str(status.get("error") or "It failed.")), "fault")
    name = html.escape(run.folder.name)
    return text + f'<p><a href="/?clone={name}">Use the settings of this run for another</a></p>'


def batch_of(run: Run) -> int:
    """Pictures of a step."""
    from ...training.config import from_yaml

    try:
        config = from_yaml(run.config_file)
    except UserError:
        return 1
    return config.batch_size * config.gradient_accumulation


def curves_of(rows: Sequence[dict[str, Any]]) -> str:
    """The loss, raw and smoothed, and what was measured."""
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    x, y = [step for step, _ in losses], [loss for _, loss in losses]
    text = drawing("Loss", {"as it is": (x, y), "smoothed": (x, smoothed(y))} if losses else {}, faint=("as it is",))
    measured = [row for row in rows if "likeness" in row]
    if measured:
        steps = [row["step"] for row in measured]
        real = measured[-1].get("likeness_real")
        likeness = {"likeness": (steps, [row["likeness"] for row in measured])}
        if real is not None and len(steps) > 1:
            likeness["real photos"] = (steps, [real] * len(steps))
        text += drawing("Likeness to held-out photos (CLIP-I)", likeness)
        text += drawing("Prompt fidelity (CLIP-T)", {"fidelity": (steps, [row["prompt_fidelity"] for row in measured])})
    return text or note("No step has been logged yet.")


def previews_of(run: Run) -> tuple[tuple[str, str], ...]:
    """The newest previews, the newest step first."""
    files = sorted(run.samples.glob("[0-9]*_*.png")) if run.samples.is_dir() else []
    newest = sorted(files, key=lambda file: (-int(file.name.split("_")[0]), file.name))[:PREVIEWS]
    return tuple((str(file), f"step {int(file.name.split('_')[0])}") for file in newest)


def log_of(run: Run) -> str:
    """The log, the newest line first; behind a failure also what the process printed, and what a model answered."""
    parts = []
    if run.state() in ("failed", "lost"):
        parts += tail(run.folder / OUTPUT, 40)
    answers = sorted(run.samples.glob("[0-9]*_*.json"))[-4:] if run.samples.is_dir() else []
    for file in reversed(answers):
        try:
            said = json.loads(file.read_text())
        except ValueError:
            continue
        parts.append(f"{file.stem}: {json.dumps(said, ensure_ascii=False)}")
    return without_secrets("\n".join(parts + tail(run.log_file, LOG_LINES)))


def tail(file: Path, lines: int) -> list[str]:
    """The last lines of a file, the last one first."""
    if not file.is_file():
        return []
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - 64 * 1024))
        return opened.read().decode(errors="replace").splitlines()[-lines:][::-1]


def build(studio: Studio) -> None:
    """The page."""
    places = studio.places

    @plainly
    def list_runs() -> Any:
        names = places.run_names()
        return gr.Dropdown(choices=[(f"{name} ({places.run(name).state() or 'unknown'})", name) for name in names])

    @plainly
    def opened(request: gr.Request, chosen: str | None) -> tuple[Any, Any]:
        names = places.run_names()
        wanted = request.query_params.get("run") or chosen
        value = wanted if wanted in names else (names[0] if names else None)
        return gr.Dropdown(
            choices=[(f"{n} ({places.run(n).state() or 'unknown'})", n) for n in names], value=value
        ), value

    @plainly
    def show_run(name: str | None, seen: str) -> tuple[Any, ...]:
        if not name:
            return note("There is no run yet: start one on the Train page."), "", [], "", "", *buttons("")
        run = places.run(name)
        now = signature(run)
        if json.dumps(now) == seen:
            return (gr.skip(),) * 9
        state, curves, previews, log = shown(now)
        return state, curves, [list(one) for one in previews], log, json.dumps(now), *buttons(run.state())

    def buttons(state: str) -> tuple[Any, ...]:
        live = state in LIVE
        resumable = state in ("stopped", "failed", "lost")
        return (
            gr.Button(interactive=live or state == "queued"),
            gr.Button(interactive=live),
            gr.Button(interactive=live),
            gr.Button(interactive=resumable),
        )

    def asked(request: str) -> Any:
        def ask(name: str) -> str:
            run = places.run(name)
            if request == "stop":
                withdraw(run)
                return note("It stops behind this step and keeps a checkpoint.")
            run.ask(request)
            return note("It will, behind this step.")

        ask.__name__ = f"ask_to_{request}"
        return plainly(ask)

    @plainly
    def go_on(name: str) -> str:
        enqueue_again(places.run(name))
        if studio.start_workers:
            start_worker(places.runs, studio.device)
        return note("It is in the queue and goes on from its newest checkpoint.")

    with gr.Row():
        name = gr.Dropdown(
            label="Run", choices=[], interactive=True, allow_custom_value=True, scale=3, elem_id="run"
        )  # checked by us: Gradio would compare with the list as it was when the app started
        refresh = gr.Button("List runs anew", scale=1)
    seen = gr.State("")
    kept = gr.BrowserState(None, storage_key="rankfold-run", secret="rankfold")
    state = gr.HTML(label="State", elem_id="state")
    with gr.Row():
        stop = gr.Button("Stop after this step", variant="stop", elem_id="stop")
        sample = gr.Button("Sample now")
        save = gr.Button("Save now")
        again = gr.Button("Resume", variant="primary", elem_id="resume")
    said = gr.HTML(label="Answer", elem_id="said")
    curves = gr.HTML(label="Curves", elem_id="curves")
    gallery = gr.Gallery(
        label="Previews, newest first", columns=4, height="max-content", format="png", elem_id="previews"
    )
    log = gr.Textbox(label="Log, newest line first", lines=10, max_lines=20, interactive=False, elem_id="log")
    timer = gr.Timer(TICK)

    outputs = [state, curves, gallery, log, seen, stop, sample, save, again]
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False}
    page = gr.context.Context.root_block
    page.load(opened, kept, [name, kept], api_visibility="private", **quiet).then(
        show_run, [name, seen], outputs, api_visibility="private", **quiet
    )
    timer.tick(show_run, [name, seen], outputs, api_name="look", concurrency_limit=None, **quiet)
    name.input(lambda value: (value, ""), name, [kept, seen], api_visibility="private", **quiet).then(
        show_run, [name, seen], outputs, api_visibility="private", **quiet
    )
    refresh.click(list_runs, None, name, api_name="runs", **quiet)
    for button, request in ((stop, "stop"), (sample, "sample"), (save, "save")):
        button.click(asked(request), name, said, api_name=request, show_progress="hidden")
    again.click(go_on, name, said, api_name="resume", show_progress="hidden")
