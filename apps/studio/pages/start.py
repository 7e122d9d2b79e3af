"""Start: what one can do here, a demo at one click, and the newest runs."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ....toolkit.core.paths import assets_folder
from ....training.config.subject import SubjectConfig
from ....training.embedded.demo import DEMO_SETTINGS
from ....training.launch.queue import list_runs
from ..backend.context import Studio
from ..backend.submit import enqueue_run
from ..render.messages import message_html, show_errors
from ..render.run_cards import run_cards
from ..widgets.actions import act

RECENT = 8  # runs
DEMO_PREVIEWS = 50  # steps between previews
WAYS = """<div class="cards">
<a class="card" href="/train"><h3>Teach a subject</h3><p>A pet, a thing, a person or a style, from a few images: then ask for it in
any scene.</p></a>
<a class="card" href="/train?tab=task"><h3>Teach a task</h3><p>A vision-language model that answers questions about images your way,
from examples.</p></a>
<a class="card" href="/generate"><h3>Make images</h3><p>With a base model and any adapters, yours or others'.</p></a>
<a class="card" href="/library"><h3>Bring a LoRA file</h3><p>Of any tool: keep it, look inside, use it, export it.</p></a>
</div>"""


def demo_config(studio: Studio) -> SubjectConfig:
    """The demo's run: the embedded model learns a creature from five drawings."""
    return SubjectConfig(
        out=studio.paths.new_run(studio.paths.free_name("demo")),
        images=assets_folder() / "demo" / "creature",
        **DEMO_SETTINGS["tiny"] | {"preview_every": DEMO_PREVIEWS},
    )


def build(studio: Studio) -> None:
    """The page."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2):
            gr.HTML(
                '<h2>New here?</h2><p class="note">The demo teaches a small model that comes with rankfold a creature from five drawings. '
                "It needs no GPU and no network, and shows its first images within two minutes.</p>"
            )
        with gr.Column(scale=1, min_width=220):
            demo = gr.Button("Try the demo", variant="primary", size="lg", elem_id="demo")
    said = gr.HTML(label="Demo", elem_id="demo-said")
    gr.HTML(WAYS)
    gr.Markdown("## Recent runs")
    recent = gr.HTML(label="Recent runs", elem_id="recent")
    target = gr.Textbox(visible="hidden", label="Run to watch")

    def start_demo() -> tuple[str, str]:
        config = demo_config(studio)
        said, _ = enqueue_run(studio, config)
        return said, config.out.name

    @show_errors
    def show_recent() -> str:
        runs = list_runs(studio.paths.runs)
        if not runs:
            return message_html("None yet. What you train stands here, and goes on when this page is closed.")
        more = f'<p class="note"><a href="/watch">All {len(runs)} runs</a></p>' if len(runs) > RECENT else ""
        return run_cards(runs[:RECENT]) + more

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    act(demo, start_demo, None, [said, target], said, api_name="demo").then(
        None, target, None, js="(run) => { if (run) location.href = '/watch?run=' + encodeURIComponent(run); }"
    )
    gr.context.Context.root_block.load(show_recent, None, recent, queue=False, **quiet)
