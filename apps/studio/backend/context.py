"""What every page is given: its folders, its device, the loaded model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import gradio as gr

from .paths import StudioPaths
from .pipeline_worker import ModelCache, PipelineWorker


@dataclass(frozen=True)
class Studio:
    """What every page has."""

    paths: StudioPaths
    device: str = "0"
    start_workers: bool = True
    """Whether starting a run also starts a worker for it."""
    model_cache: ModelCache = field(default_factory=ModelCache)

    @cached_property
    def worker(self) -> PipelineWorker:
        """Where images are drawn."""
        return PipelineWorker(self.model_cache)

    @cached_property
    def theme(self) -> gr.themes.Base:
        """Black on white or white on black, with the system's own fonts, so that nothing is fetched."""
        sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
        return gr.themes.Monochrome(font=sans, font_mono=mono)
