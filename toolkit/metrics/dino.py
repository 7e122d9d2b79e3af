"""Models that turn images into unit embeddings, to measure likeness by: DINO beside CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image

from ..core.errors import UserError

BATCH = 32


class ImageScorer(Protocol):
    """What likeness is measured by."""

    name: str

    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Unit embeddings, (N, D)."""
        ...


class DinoScorer:
    """DINO or DINOv2 by hub id or folder: the class token of the last layer, as in DreamBooth's protocol (arXiv 2208.12242)."""

    def __init__(self, name: str) -> None:
        """name: such as facebook/dino-vits16 (the protocol's) or facebook/dinov2-small.

        Raises:
            UserError: when it cannot be loaded.
        """
        from transformers import AutoImageProcessor, AutoModel

        self.name = name
        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(name)
            self.model: Any = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
        except Exception as error:
            raise UserError(
                f"--dino {name} cannot be loaded ({type(error).__name__}): give a hub id such as facebook/dino-vits16 or a folder with it."
            ) from error

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        found = []
        for start in range(0, len(images), BATCH):
            chunk = [image.convert("RGB") for image in images[start : start + BATCH]]
            inputs = self.processor(images=chunk, return_tensors="pt")
            found.append(F.normalize(self.model(**inputs).last_hidden_state[:, 0], dim=-1))
        return torch.cat(found)
