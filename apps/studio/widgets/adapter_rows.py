"""Rows of adapters on a page: on or off, which, and how strong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ....toolkit.core.errors import UserError
from ..backend.paths import StudioPaths

ROWS = 24  # all are there from the start, hidden until they are asked for
RANGE = (-2.0, 3.0)  # of the strengths that a slider shows; it grows for others


class AdapterRows:
    """Rows of adapters: on or off, which, and how strong; more are shown as they are asked for."""

    def __init__(self, paths: StudioPaths, label: str = "adapter") -> None:
        self.paths, self.rows = paths, []
        for number in range(ROWS):
            with gr.Group(visible=number == 0) as row:
                with gr.Row():
                    name = gr.Dropdown(
                        [], allow_custom_value=True, label=f"{label} {number + 1}", scale=3, min_width=180,
                        elem_id=f"{label}-{number + 1}",
                    )  # fmt: skip
                    on = gr.Checkbox(label="On", value=True, scale=1, min_width=90)
                strength = gr.Slider(*RANGE, 1, step=0.05, label=f"strength {number + 1}")
            self.rows.append((row, on, name, strength))
        self.more = gr.Button("Add adapter", size="sm")
        self.count = gr.State(1)
        self.length = [self.count, *(row for row, *_ in self.rows)]
        self.more.click(self.grow, self.count, self.length, api_visibility="private", queue=False)

    @property
    def boxes(self) -> list[Any]:
        """On, name and strength, row by row."""
        return [box for _, *own in self.rows for box in own]

    @property
    def names(self) -> list[Any]:
        """The boxes with the names."""
        return [name for _, _, name, _ in self.rows]

    def grow(self, count: int) -> list[Any]:
        """One more row."""
        return row_visibility(min(ROWS, count + 1))

    def choices(self) -> list[Any]:
        """The adapters as they are now, for every row."""
        return [gr.Dropdown(choices=["", *self.paths.adapters()]) for _ in range(ROWS)]

    def filled(self, names: Sequence[str], strengths: Sequence[float], on: Sequence[bool]) -> list[Any]:
        """Every row's boxes with the adapters that are there now, these of them chosen; and how many rows are shown."""
        choices = ["", *self.paths.adapters()]
        rows = row_values(names, strengths)
        rows[: 3 * len(on) : 3] = on
        rows[1::3] = [gr.Dropdown(choices=choices, value=name) for name in rows[1::3]]
        return [*rows, *row_visibility(max(1, len(names)))]


def row_visibility(count: int) -> list[Any]:
    """So many rows and no others: the count, then every row."""
    return [count, *(gr.update(visible=number < count) for number in range(ROWS))]


def row_values(names: Sequence[str], strengths: Sequence[float]) -> list[Any]:
    """What every row's boxes hold for these adapters: on, name and strength, row by row.

    Raises:
        UserError: for more adapters than there are rows.
    """
    if len(names) > ROWS:
        raise UserError(f"There are {len(names)} adapters, and this page shows {ROWS}.")
    rows: list[Any] = []
    for number in range(ROWS):
        there = number < len(names)
        strength = float(strengths[number]) if there else 1.0
        slider = gr.Slider(value=strength, minimum=min(RANGE[0], strength), maximum=max(RANGE[1], strength))
        rows += [True, names[number] if there else None, slider]
    return rows
