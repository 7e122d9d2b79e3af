"""How much of a prompt each text encoder of a base reads: what is longer is cut by the stock pipelines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .model import DiffusionModel


@dataclass(frozen=True)
class CutPrompt:
    """A prompt of which a text encoder does not read the end."""

    prompt: str
    encoder: str
    """The text encoder's class, such as CLIPTextModel."""
    limit: int
    """Tokens that it reads."""
    lost: str
    """What it does not read."""
    read_by_others: bool
    """Whether another text encoder of the base reads all of it."""

    def describe(self) -> str:
        """Where it is cut, in words."""
        rest = ", which another encoder reads" if self.read_by_others else ""
        return f"{self.encoder} reads {self.limit} tokens and nothing from '{self.lost.strip()[:40]}' on{rest}"


def find_cut_prompts(model: DiffusionModel, prompts: Iterable[str]) -> list[CutPrompt]:
    """The prompts that are longer than a text encoder reads, for each such encoder. Only tokenizers are loaded."""
    found: list[CutPrompt] = []
    limits = model.prompt_limits()
    for prompt in dict.fromkeys(prompts):
        lost = {
            name: lost_text(text_tokenizer(getattr(model, name)), model.fill_template(name, prompt), limits[name])
            for name in limits
        }
        whole = any(not text for text in lost.values())
        for name, text in lost.items():
            if text:
                kind = model.index[name.replace("tokenizer", "text_encoder")][1]
                found.append(CutPrompt(prompt, kind, limits[name], text, whole))
    return found


def text_tokenizer(part: Any) -> Any:
    """The tokenizer of a part that is one, or a processor around one."""
    return getattr(part, "tokenizer", part)


def lost_text(tokenizer: Any, text: str, limit: int) -> str:
    """What of a text lies beyond a limit of tokens; '' where all of it is read. Its last token within the limit is the end mark."""
    ids = tokenizer(text, truncation=False, verbose=False).input_ids
    return tokenizer.decode(ids[limit - 1 :], skip_special_tokens=True) if len(ids) > limit else ""
