"""Runs put into the queue by pages."""

from __future__ import annotations

from ....toolkit.data.subjects import find_samples
from ....toolkit.diffusion.load import open_model, resolve_base
from ....training.config.base import LoopConfig
from ....training.config.images import PictureConfig
from ....training.launch.queue import enqueue, start_worker
from .context import Studio


def queued(studio: Studio, config: LoopConfig) -> tuple[str, str]:
    """Puts a run into the queue and says where to watch it; and a free name for the next."""
    if isinstance(config, PictureConfig) and config.images is not None:
        find_samples(config.images, flip=config.flip, skip_bad=config.skip_bad)
        open_model(resolve_base(config.base))
    run = enqueue(config)
    if studio.start_workers:
        start_worker(studio.places.runs, studio.device)
    name = run.folder.name
    link = f'<p>{name} is in the queue. <a href="/watch?run={name}">Watch it</a></p>'
    return link, studio.places.free_name(name)
