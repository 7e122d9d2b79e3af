"""The prompts of a training: texts by number, and their embeds, encoded once or anew in each pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from accelerate import Accelerator

from ...toolkit.core.cache import cache_key, load_or_compute
from ...toolkit.core.paths import cache_folder
from ...toolkit.diffusion.model import DiffusionModel, PromptEmbeds, pad_and_stack
from ..config.images import DiffusionConfig
from ..engine.processes import share_work


def without_token(caption: str, config: DiffusionConfig) -> str:
    """The caption of the same image for any instance of the class."""
    bare = " ".join(word for word in caption.split() if word.strip(",.") not in config.subjects)
    return bare if bare != caption else config.class_prompt


def preview_texts(config: DiffusionConfig) -> list[str]:
    """The prompts of the previews, for every subject."""
    return [fill_in(text, token, noun) for token, noun in config.subjects.items() for text in config.preview_prompts]


def fill_in(text: str, token: str, noun: str) -> str:
    """A prompt with {token} and {noun} filled in; any other brace is a brace."""
    return text.replace("{token}", token).replace("{noun}", noun)


class Prompts:
    """Texts by number, and what the text encoders make of them."""

    def __init__(self, model: DiffusionModel, config: DiffusionConfig, accelerator: Accelerator) -> None:
        self.model, self.config, self.accelerator = model, config, accelerator
        self.numbers: dict[str, int] = {}
        """Text -> number."""
        self.embeds: PromptEmbeds | None = None
        """Embeds of all texts (P, ...); None as long as each pass encodes its own."""

    def add(self, texts: Iterable[str]) -> torch.Tensor:
        """A number for each text (N,); new texts are added."""
        return torch.tensor([self.numbers.setdefault(text, len(self.numbers)) for text in texts])

    @torch.no_grad()
    def encode(self, token_embeddings: Mapping[str, torch.Tensor]) -> None:
        """Encodes all texts, with the cache's help. token_embeddings: tokens that the text encoders have been given."""
        model, config, cache = self.model, self.config, cache_folder() / "prompts"
        tokenizers = [name for name in model.index if name.startswith("tokenizer") and model.has_part(name)]
        encoder = model.fingerprint(*model.text_encoders(), *tokenizers)
        if token_embeddings:
            encoder += cache_key(**{name: vectors.tolist() for name, vectors in token_embeddings.items()})
        makers = []
        for text in self.numbers:
            key = cache_key(
                kind="words",
                family=type(model).__name__,
                encoder=encoder,
                text=text,
                dtype=config.precision,
                quantize=config.quantize,
            )
            make = lambda t=text: {name: value.cpu() for name, value in model.encode_prompts([t]).items()}  # noqa: E731
            makers.append(lambda key=key, make=make: load_or_compute(cache, key, make))
        rows = share_work(self.accelerator, makers)
        self.embeds = {name: value.to(self.accelerator.device) for name, value in pad_and_stack(rows).items()}

    def embeds_of(self, numbers: torch.Tensor) -> PromptEmbeds:
        """The embeds of the prompts of these numbers (B,)."""
        if self.embeds is not None:
            return {name: value[numbers] for name, value in self.embeds.items()}
        texts = list(self.numbers)
        return self.model.encode_prompts([texts[number] for number in numbers.tolist()])
