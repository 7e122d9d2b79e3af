"""One chart of a run to look at closely: drag over a part to zoom in, double-click to see all of it again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gradio as gr
import pandas as pd

from ..render.curves import Curve, thin_out
from .actions import act

TITLES = ("Loss", "Loss at fixed noise", "Likeness to held-out photos (CLIP-I)", "Prompt fidelity (CLIP-T)")
MAX_POINTS = 2000  # points of a curve, more than the small chart has
COLOURS = {
    "raw": "#93a4c8", "smoothed": "#2563eb", "held out": "#d97706", "trained on": "#2563eb", "class": "#059669",
    "likeness": "#2563eb", "real photos": "#059669", "fidelity": "#2563eb",
}  # fmt: skip


def chart_table(curves: dict[str, Curve]) -> pd.DataFrame:
    """A row for each point that is a number."""
    rows = [
        (float(x), float(y), name)
        for name, curve in curves.items()
        for x, y in zip(*thin_out(curve, MAX_POINTS), strict=True)
        if math.isfinite(y)
    ]
    return pd.DataFrame(rows, columns=["step", "value", "curve"])


class ZoomChart:
    """It is drawn when it is asked for, so that it costs a page that looks on nothing."""

    def __init__(self) -> None:
        with gr.Accordion("Zoom into a chart", open=False, elem_id="zoom"):
            with gr.Row():
                self.title = gr.Dropdown([*TITLES], value=TITLES[0], label="Chart", elem_id="zoom-chart", scale=3)
                self.go = gr.Button("Refresh the chart", elem_id="zoom-go", scale=1, min_width=160)
            self.said = gr.HTML(label="Chart", elem_id="zoom-said")
            self.plot = gr.LinePlot(
                x="step", y="value", color="curve", color_map=COLOURS, label="Drag to zoom in, double-click to zoom out",
                elem_id="zoom-plot", height=340, buttons=["fullscreen"],
            )  # fmt: skip

    def wire(self, name: Any, charts: Callable[[str], dict[str, dict[str, Curve]]]) -> None:
        """name: the box with the run's name; charts: those of a run."""

        def show(run: str, title: str) -> tuple[Any, str]:
            table = chart_table(charts(run).get(title, {})) if run else chart_table({})
            text = "" if len(table) else "Nothing of this was logged yet: what is measured is set by evaluate_every."
            return gr.LinePlot(value=table, x_lim=None, y_title=title), f'<p class="note">{text}</p>' if text else ""

        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
        act(
            [self.go.click, self.title.input, name.change],
            show,
            [name, self.title],
            [self.plot, self.said],
            self.said,
            queue=False,
        )
        self.plot.select(zoom, None, self.plot, **quiet)
        self.plot.double_click(lambda: gr.LinePlot(x_lim=None), None, self.plot, **quiet)


def zoom(event: gr.SelectData) -> Any:
    """The part that was dragged over."""
    left, right = event.index
    return gr.LinePlot(x_lim=[left, right])
