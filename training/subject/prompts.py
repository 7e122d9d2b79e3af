"""The prompts of a training: texts by number, and their embeds, encoded once or anew in each pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from ...toolkit.core.cache import cache_key, file_hash, load_or_compute
from ...toolkit.core.paths import cache_folder
from ...toolkit.data.subjects import Sample, whole_references
from ...toolkit.diffusion.model import DiffusionModel, PromptEmbeds, pad_and_stack
from ..config.images import DiffusionConfig
from ..engine.processes import share_work

PromptKey = str | tuple[str, tuple[Path, ...], bool]


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
        self.numbers: dict[PromptKey, int] = {}
        """Text -> number; where the text encoder sees references, too, the text with a sample's."""
        self.embeds: PromptEmbeds | None = None
        """Embeds of all texts (P, ...); None as long as each pass encodes its own."""

    def key(self, text: str, sample: Sample | None) -> PromptKey:
        """What a prompt's states depend on. sample: the one of whose image it is the prompt."""
        seen = sample is not None and self.model.prompts_see_references and sample.references
        return (text, sample.references, sample.flip) if sample is not None and seen else text

    def add(self, texts: Iterable[str], sample: Sample | None = None) -> torch.Tensor:
        """A number for each text (N,), all of them prompts of one sample's image, or of none; new ones are added."""
        keys = [self.key(text, sample) for text in texts]
        return torch.tensor([self.numbers.setdefault(key, len(self.numbers)) for key in keys])

    def numbers_of(self, texts: Sequence[str], samples: Sequence[Sample] = ()) -> torch.Tensor:
        """The numbers (N,) of texts that are there. samples: none, or one for each text."""
        own = samples or [None] * len(texts)
        return torch.tensor([self.numbers[self.key(text, sample)] for text, sample in zip(texts, own, strict=True)])

    @torch.no_grad()
    def encode(self, token_embeddings: Mapping[str, torch.Tensor]) -> None:
        """Encodes all texts, with the cache's help. token_embeddings: tokens that the text encoders have been given."""
        model, config, cache = self.model, self.config, cache_folder() / "prompts"
        tokenizers = [name for name in model.index if name.startswith("tokenizer") and model.has_part(name)]
        encoder = model.fingerprint(*model.text_encoders(), *tokenizers)
        if token_embeddings:
            encoder += cache_key(**{name: vectors.tolist() for name, vectors in token_embeddings.items()})
        makers = []
        for number in self.numbers:
            text, paths, flip = number if isinstance(number, tuple) else (number, (), False)
            seen = {"references": [file_hash(path) for path in paths], "flip": flip} if paths else {}
            key = cache_key(
                kind="words",
                family=type(model).__name__,
                encoder=encoder,
                text=text,
                dtype=config.precision,
                quantize=config.quantize,
                **seen,
            )
            make = lambda own=number: {name: value.cpu() for name, value in self.encode_one(own).items()}  # noqa: E731
            makers.append(lambda key=key, make=make: load_or_compute(cache, key, make))
        rows = share_work(self.accelerator, makers)
        self.embeds = {name: value.to(self.accelerator.device) for name, value in pad_and_stack(rows).items()}

    def encode_one(self, key: PromptKey) -> PromptEmbeds:
        """The embeds (1, ...) of one prompt."""
        if isinstance(key, str):
            return self.model.encode_prompts([key])
        text, paths, flip = key
        seen = whole_references(Sample(paths[0], flip=flip, references=paths))
        return self.model.encode_prompts([text], seen)  # type: ignore[call-arg]

    def embeds_of(self, numbers: torch.Tensor) -> PromptEmbeds:
        """The embeds of the prompts of these numbers (B,)."""
        if self.embeds is not None:
            return {name: value[numbers] for name, value in self.embeds.items()}
        texts = [key for key in self.numbers if isinstance(key, str)]  # with references no text encoder is trained
        return self.model.encode_prompts([texts[number] for number in numbers.tolist()])
