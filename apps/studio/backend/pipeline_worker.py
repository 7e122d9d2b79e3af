"""Work beside the pages: the model that was used last stays loaded, one page uses it at a time, and any of them can be stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ....pipelines.generate import Recipe, drawing_pipeline, generate, repeat, save_image
from ....toolkit.core.devices import release_memory
from ....toolkit.formats.locate import adapter_path, content_hash
from .live_preview import LivePreview
from .turns import Turns, calling_client

POLL_SECONDS = 0.2  # seconds between reports of progress
BATCH = 4  # images drawn together
Made = list[tuple[Image.Image, Recipe]]


class JobStopped(Exception):
    """Somebody has stopped the drawing."""


class Job:
    """One piece of work: how far it is, and whether somebody wants it to end."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.stopped = max(1, total), 0, False
        self.ahead = 0
        """Calls that come before it."""
        self.preview = LivePreview()

    def step(self) -> None:
        """One more denoising step is done.

        Raises:
            Stopped: when somebody wants it to end.
        """
        self.done += 1
        if self.stopped:
            raise JobStopped

    def look(self, pipe: Any, latents: Any) -> None:
        """One more denoising step is done, with these latents.

        Raises:
            Stopped: see `step`.
        """
        self.step()
        self.preview.look(pipe, latents)

    @property
    def progress(self) -> float:
        """How far it is, 0 to 1."""
        return min(1.0, self.done / self.total)


class ModelCache:
    """The one large model that the pages keep in memory: the one that was used last. Its lock is held while it is used."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.key: Any = None
        self.model: Any = None

    def get(self, key: Any, load: Callable[[], Any]) -> Any:
        """The model of this key; the one before it is let go, before another is loaded. Hold the lock."""
        if key != self.key:
            self.key = self.model = None
            release_memory()
            self.model, self.key = load(), key
        return self.model


class PipelineWorker:
    """The one place where images are drawn."""

    def __init__(self, loaded: ModelCache | None = None) -> None:
        self.loaded = loaded or ModelCache()

    def pipeline(self, recipe: Recipe) -> Any:
        """The pipeline of this base with these adapters at these strengths."""
        hashes = tuple(content_hash(adapter_path(Path(path))) for path in recipe.adapters)
        key = (
            recipe.base,
            hashes,
            recipe.strengths,
            recipe.precision,
            recipe.scheduler,
            bool(recipe.regions or recipe.subjects),
        )
        return self.loaded.get(key, lambda: drawing_pipeline(recipe))

    def draw(self, recipe: Recipe, n: int, drawing: Job, keep: Callable[[Made], Any] | None = None) -> Made:
        """`n` images, in small batches so that a stop comes soon. keep: is given each batch when it is done."""
        made: Made = []
        with self.loaded.lock:
            pipe = self.pipeline(recipe)
            for start in range(0, n, BATCH):
                own = replace(recipe, seed=recipe.seed + start)
                batch = generate(own, min(BATCH, n - start), pipe=pipe, batch=BATCH, on_step=drawing.look)
                made += batch
                if keep is not None:
                    keep(batch)
        return made

    def repeat(self, recipe: Recipe) -> tuple[Image.Image, Recipe]:
        """The image that a recipe was written into."""
        with self.loaded.lock:
            return repeat(recipe, pipe=self.pipeline(replace(recipe)))


def run_in_background(work: Callable[[Job], Any], total: int, turns: Turns | None = None) -> Iterator[Job | Any]:
    """Runs work beside the page: yields the drawing while it waits and goes on, and last what came of it.

    turns: the work is begun when it is the caller's turn there. When the page closes, or its event is cancelled, the work is stopped
    after its denoising step.

    Raises:
        UserError: when too many calls wait already.
        JobStopped: when somebody has stopped it, before or after it began.
    """
    drawing = Job(total)
    with turns.take(calling_client()) if turns else nullcontext() as turn:
        while turns and turn and (ahead := turns.ahead(turn)):
            drawing.ahead = ahead
            yield drawing
            if drawing.stopped:
                raise JobStopped
            time.sleep(POLL_SECONDS)
        drawing.ahead, pool = 0, ThreadPoolExecutor(1)
        future = pool.submit(work, drawing)
        try:
            while not future.done():
                yield drawing
                time.sleep(POLL_SECONDS)
            yield future.result()
        finally:
            drawing.stopped = True
            pool.shutdown(wait=False)  # a page that closes does not wait for a model that is being loaded


def save_images(made: Made, folder: Path, name: str) -> list[str]:
    """Writes images with their settings inside; returns their paths."""
    paths = []
    for image, recipe in made:
        path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{recipe.seed:06d}.png"
        number = 2
        while path.exists():
            path = path.with_name(f"{path.stem.split('~')[0]}~{number}.png")
            number += 1
        save_image(path, image, recipe)
        paths.append(str(path))
    return paths
