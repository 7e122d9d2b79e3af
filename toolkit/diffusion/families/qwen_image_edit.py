"""Qwen-Image-Edit: makes an image from one to three others, which its text encoder sees, too."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from ..model import PromptEmbeds
from .qwen_image import QwenImage

AREA = 1024 * 1024  # pixels that the stock pipeline scales a reference to


class BlankEncoder:
    """In a text encoder's place: says zeros of its width for every token."""

    dtype = torch.float32

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, input_ids: torch.Tensor, **others: Any) -> Any:
        return SimpleNamespace(hidden_states=[torch.zeros(*input_ids.shape, self.width)])


class QwenImageEdit(QwenImage):
    """The reference stands twice before the denoiser: among the words, and as latents behind those of the image that is made."""

    pipelines = ("QwenImageEditPipeline",)
    title = "Qwen-Image-Edit"
    architecture = "Qwen-Image-Edit"
    min_references = max_references = 1
    prompts_see_references = True
    max_images_at_once = 1
    layer_marks = ()  # its files name the layers that Qwen-Image's do

    @classmethod
    def own_reference_size(cls, size: tuple[int, int]) -> tuple[int, int] | None:
        """About a megapixel, whatever the size of the image that is made."""
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as stock

        width, height, _ = stock.calculate_dimensions(AREA, size[0] / size[1])
        return width, height

    @classmethod
    def seen_references(cls, pipe: Any, references: Sequence[Image.Image]) -> Any:
        """References as the stock pipeline gives them to its encode_prompt."""
        if not references:
            return None
        width, height = cls.own_reference_size(references[0].size) or references[0].size
        return pipe.image_processor.resize(references[0], height, width)

    def prompt_limits(self) -> dict[str, int]:
        return {}  # the stock pipeline cuts nothing

    def encode_prompts(self, prompts: Sequence[str], references: Sequence[Image.Image] = ()) -> PromptEmbeds:
        pipe = self.text_pipeline()
        seen = self.seen_references(pipe, references)
        states, mask = pipe.encode_prompt(list(prompts), image=seen, device=self.device)
        mask = states.new_ones(states.shape[:2], dtype=torch.long) if mask is None else mask
        return {"prompt_embeds": states, "prompt_embeds_mask": mask}

    def blank_embeds(self, prompt: str, references: Sequence[Image.Image]) -> PromptEmbeds:
        pipe, width = self.pipeline(), self.part_config("text_encoder")["text_config"]["hidden_size"]
        object.__setattr__(pipe, "text_encoder", BlankEncoder(width))
        states, _ = pipe.encode_prompt([prompt], image=self.seen_references(pipe, references), device="cpu")
        return {"prompt_embeds": states, "prompt_embeds_mask": states.new_ones(states.shape[:2], dtype=torch.long)}

    @classmethod
    def image_kwargs(cls, references: Sequence[Image.Image], width: int, height: int) -> dict[str, Any]:
        return super().image_kwargs(references, width, height) | {"image": references[0]}


class QwenImageEditPlus(QwenImageEdit):
    """Qwen-Image-Edit 2509 and 2511: several references, smaller among the words than as latents."""

    pipelines = ("QwenImageEditPlusPipeline",)
    title = "Qwen-Image-Edit Plus"
    max_references = 3  # that it was made for, as its card says; the stock pipeline has no limit

    @classmethod
    def own_reference_size(cls, size: tuple[int, int]) -> tuple[int, int] | None:
        """About a megapixel, whatever the size of the image that is made."""
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock

        return stock.calculate_dimensions(stock.VAE_IMAGE_SIZE, size[0] / size[1])

    @classmethod
    def seen_references(cls, pipe: Any, references: Sequence[Image.Image]) -> Any:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock

        sizes = [
            stock.calculate_dimensions(stock.CONDITION_IMAGE_SIZE, image.width / image.height) for image in references
        ]
        seen = [
            pipe.image_processor.resize(image, height, width)
            for image, (width, height) in zip(references, sizes, strict=True)
        ]
        return seen or None

    @classmethod
    def image_kwargs(cls, references: Sequence[Image.Image], width: int, height: int) -> dict[str, Any]:
        return super().image_kwargs(references, width, height) | {"image": list(references)}
