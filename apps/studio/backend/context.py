"""What every page is given: its folders, its device, the loaded model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import gradio as gr

from .paths import Places
from .pipeline_worker import Loaded, Pipes


@dataclass(frozen=True)
class Studio:
    """What every page has."""

    places: Places
    device: str = "0"
    start_workers: bool = True
    """Whether starting a run also starts a worker for it."""
    loaded: Loaded = field(default_factory=Loaded)

    @cached_property
    def pipes(self) -> Pipes:
        """Where pictures are drawn."""
        return Pipes(self.loaded)

    @cached_property
    def theme(self) -> gr.themes.Base:
        """Black on white or white on black, with the system's own fonts, so that nothing is fetched."""
        sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
        return gr.themes.Monochrome(font=sans, font_mono=mono)
