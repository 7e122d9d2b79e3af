"""What every page is given: its folders, its device, the loaded model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from .paths import StudioPaths
from .pipeline_worker import Job, ModelCache, PipelineWorker
from .turns import Turns


@dataclass(frozen=True)
class Studio:
    """What every page has."""

    paths: StudioPaths
    device: str = "0"
    start_workers: bool = True
    """Whether starting a run also starts a worker for it."""
    model_cache: ModelCache = field(default_factory=ModelCache)
    turns: Turns = field(default_factory=Turns)
    """Whose turn it is to use the device."""
    planning: Turns = field(default_factory=Turns)
    """Whose turn it is to have a run estimated."""
    jobs: dict[str, Job] = field(default_factory=dict)
    """What is being drawn or waits, by page, for its Stop button."""

    @cached_property
    def worker(self) -> PipelineWorker:
        """Where images are drawn."""
        return PipelineWorker(self.model_cache)
