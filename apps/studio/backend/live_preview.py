"""A small image of what is being drawn, every now and then while it is."""

from __future__ import annotations

import base64
import io
import logging
import time
from typing import Any

import torch
from torch.nn import functional

from ....pipelines.generate import pipeline_family

log = logging.getLogger(__name__)
LATENT_SIDE = 32  # of the latents that are decoded: larger ones are averaged
EVERY_SECONDS = 1.0  # at least between two
SHARE = 0.1  # of the time that may be spent on them


class LivePreview:
    """What is shown while an image is drawn; decoding it takes a tenth of the time at most."""

    def __init__(self) -> None:
        self.webp = b""
        """The newest."""
        self.last, self.cost, self.off = time.monotonic(), 0.0, False

    def look(self, pipe: Any, latents: torch.Tensor) -> None:
        """Decodes the first of the latents (B, C, H, W), where it is time to."""
        now = time.monotonic()
        wait = max(EVERY_SECONDS, self.cost / SHARE)
        moved = getattr(pipe, "_all_hooks", None)  # parts that come to the device one by one stay where they are
        if self.off or moved or now - self.last < wait:
            return
        try:
            self.webp = decode_small(pipe, latents[:1])
        except Exception:  # an image goes on without it
            log.info("no preview while drawing", exc_info=True)
            self.off = True
        self.last = time.monotonic()
        self.cost = self.last - now

    @property
    def html(self) -> str:
        """It as part of a page."""
        if not self.webp:
            return ""
        data = base64.b64encode(self.webp).decode()
        return f'<img class="live" alt="The first of the images, half drawn" src="data:image/webp;base64,{data}">'


@torch.no_grad()
def decode_small(pipe: Any, latents_BCHW: torch.Tensor) -> bytes:
    """Latents as a small image, WebP."""
    from diffusers.image_processor import VaeImageProcessor

    factor = max(1, min(latents_BCHW.shape[-2:]) // LATENT_SIDE)
    pixels = pipeline_family(pipe).decode_latents(pipe.vae, functional.avg_pool2d(latents_BCHW.float(), factor))
    image: Any = VaeImageProcessor().postprocess(pixels.float(), output_type="pil")
    file = io.BytesIO()
    image[0].save(file, "WEBP", quality=70)
    return file.getvalue()
