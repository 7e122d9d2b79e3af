"""Runs put into the queue by pages."""

from __future__ import annotations

from ....toolkit.core.errors import UserError
from ....toolkit.data.subjects import find_samples
from ....toolkit.diffusion.load import open_model, resolve_base
from ....training.config.base import LoopConfig
from ....training.config.images import DiffusionConfig
from ....training.launch.queue import enqueue, queued_runs, start_worker
from .context import Studio

MAX_QUEUED = 200  # runs that wait


def enqueue_run(studio: Studio, config: LoopConfig) -> tuple[str, str]:
    """Puts a run into the queue and says where to watch it; and a free name for the next."""
    if len(queued_runs(studio.paths.runs)) >= MAX_QUEUED:
        raise UserError(f"{MAX_QUEUED} runs are waiting already: stop some of them, or wait.")
    if isinstance(config, DiffusionConfig) and config.images is not None:
        find_samples(config.images, flip=config.flip, skip_bad=config.skip_bad)
        open_model(resolve_base(config.base))
    run = enqueue(config)
    if studio.start_workers:
        start_worker(studio.paths.runs, studio.device)
    name = run.folder.name
    link = f'<p>{name} is in the queue. <a href="/watch?run={name}">Watch it</a></p>'
    return link, studio.paths.free_name(name)
