"""What generated images are measured by: pure functions of embeddings and answers.

CLIP-I: mean cosine between generated and reference images. CLIP-T: mean cosine between images and their prompts.
Both by an open_clip model, named in every result.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from ..core.errors import UserError
from ..core.paths import assets_folder

EMBEDDED_CLIP = "embedded"


class ClipScorer:
    """An open_clip model with its trained weights. Default: the embedded one."""

    def __init__(self, name: str | None = None) -> None:
        """name: hf-hub:ORGANISATION/MODEL, local-dir:FOLDER, or MODEL:WEIGHTS with open_clip's names, as ViT-B-32-quickgelu:openai.

        Raises:
            UserError: for a model that cannot be loaded, or a name without weights, which open_clip would fill with random numbers.
        """
        import open_clip

        self.name = name or EMBEDDED_CLIP
        place = f"local-dir:{assets_folder() / 'tiny' / 'clip'}" if self.name == EMBEDDED_CLIP else self.name
        own = place.startswith(("hf-hub:", "local-dir:"))
        place, weights = (place, None) if own else place.partition(":")[::2]
        if weights == "":
            raise UserError(
                f"--clip {self.name} does not say which weights: write {self.name}:openai or another of open_clip's names for them, "
                "hf-hub:ORGANISATION/MODEL, or local-dir:FOLDER."
            )
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(place, pretrained=weights)
        except Exception as error:
            raise UserError(
                f"--clip {self.name} cannot be loaded ({type(error).__name__}): give hf-hub:ORGANISATION/MODEL, local-dir:FOLDER, or "
                "one of open_clip's names with its weights, such as ViT-B-32-quickgelu:openai."
            ) from error
        self.model, self.preprocess = model.float().eval(), preprocess
        self.tokenizer: Any = open_clip.get_tokenizer(place)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Unit embeddings of images, (N, D)."""
        batch = torch.stack([self.preprocess(image.convert("RGB")) for image in images])
        return F.normalize(self.model.encode_image(batch), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit embeddings of texts, (N, D)."""
        return F.normalize(self.model.encode_text(self.tokenizer(list(texts))), dim=-1)


def clip_i(generated_ND: torch.Tensor, references_MD: torch.Tensor) -> torch.Tensor:
    """Mean cosine of each generated image with all references, (N,)."""
    return (generated_ND @ references_MD.T).mean(1)


def clip_t(generated_ND: torch.Tensor, texts_ND: torch.Tensor) -> torch.Tensor:
    """Cosine of each image with its own prompt, (N,)."""
    return paired_similarity(generated_ND, texts_ND)


def paired_similarity(images_ND: torch.Tensor, others_ND: torch.Tensor) -> torch.Tensor:
    """Cosine of each image with its own counterpart, (N,)."""
    return (images_ND * others_ND).sum(1)


def drift(before_ND: torch.Tensor, after_ND: torch.Tensor) -> torch.Tensor:
    """How far each image of the same seed and prompt has moved: 1 - cosine, (N,); 0 is not at all."""
    return 1 - paired_similarity(before_ND, after_ND)


def diversity(images_ND: torch.Tensor) -> torch.Tensor:
    """1 - mean cosine of each image with the others of its prompt, (N,); near 0 they are all the same image."""
    if len(images_ND) < 2:
        return torch.zeros(len(images_ND))
    alike = images_ND @ images_ND.T
    return 1 - (alike.sum(1) - alike.diagonal()) / (len(alike) - 1)


def nearest_similarity(images_ND: torch.Tensor, others_MD: torch.Tensor) -> torch.Tensor:
    """Cosine of each image with the most like of others, (N,): for the copy check, the photos it was trained on."""
    return (images_ND @ others_MD.T).max(1).values


def leave_one_out_similarity(references_ND: torch.Tensor) -> torch.Tensor:
    """Mean cosine of each reference with the others, (N,): what a real photo of the subject scores."""
    alike = references_ND @ references_ND.T
    return (alike.sum(1) - alike.diagonal()) / (len(alike) - 1)


def psnr(images_NCHW: torch.Tensor, others_NCHW: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each pair, dB, (N,); images in 0..1."""
    error = (images_NCHW - others_NCHW).square().flatten(1).mean(1)
    return -10 * torch.log10(error)


def load_embedded_judge() -> Any:
    """The judge that ships with the embedded models."""
    from ..embedded.judge import load_judge

    return load_judge(Path(assets_folder()) / "tiny" / "judge.safetensors")
