"""Runs at a glance: a card for each, and a line for each in a list."""

from __future__ import annotations

import html
from collections.abc import Sequence
from urllib.parse import quote

from ....toolkit.core.run_folder import Run
from ....training.launch.queue import queued_runs
from ....training.runs.library import newest_preview

STATE_WORDS = {
    "queued": "waiting", "starting": "starting", "running": "running", "done": "done", "stopped": "stopped", "failed": "failed",
    "lost": "stopped unexpectedly", "": "unknown",
}  # fmt: skip


def state_badge(state: str) -> str:
    """A state, in its colour."""
    return f'<span class="badge {html.escape(state or "unknown")}">{html.escape(STATE_WORDS.get(state, state))}</span>'


def progress_words(run: Run, state: str, waiting: Sequence[str] = ()) -> str:
    """How far a run is."""
    status = run.status()
    step, total = (status.get(key) if isinstance(status.get(key), int) else 0 for key in ("step", "total"))
    if state == "queued" and run.folder.name in waiting:
        return f"number {waiting.index(run.folder.name) + 1} in the queue"
    return f"step {step} of {total}" if total else ""


def file_address(path: object) -> str:
    """Where a file of a run is served."""
    return f"/gradio_api/file={quote(str(path))}"


def run_cards(runs: Sequence[Run]) -> str:
    """Cards that lead to the Watch page, as HTML."""
    cards = []
    for run in runs:
        name, state, image = run.folder.name, run.state(), newest_preview(run.folder)
        shown = f'<img src="{file_address(image)}" alt="" loading="lazy">' if image else ""
        cards.append(
            f'<a class="card" href="/watch?run={quote(name)}">{shown}<h3>{html.escape(name)}</h3>'
            f"<p>{state_badge(state)} {html.escape(progress_words(run, state))}</p></a>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def run_choices(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """A label and a name for each run of a list."""
    waiting = [run.folder.name for run in queued_runs(runs[0].folder.parent)] if runs else []
    found = []
    for run in runs:
        state = run.state()
        words = ", ".join(word for word in (STATE_WORDS.get(state, state), progress_words(run, state, waiting)) if word)
        found.append((f"{run.folder.name}\n{words}", run.folder.name))
    return found
