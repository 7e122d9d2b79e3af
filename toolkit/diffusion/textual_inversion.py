"""Textual inversion for CLIP text encoders: learned token vectors for a subject, trained with an adapter.

Textual inversion (Gal et al. 2022, arXiv 2208.01618) together with an adapter, also called pivotal tuning. A word of several vectors
is named as diffusers names it: <sks>, <sks>_1, ...; prompts say <sks>, and stock pipelines put in the rest.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from ..core.errors import UserError
from ..core.files import write_atomic
from .model import DiffusionModel

FILE = "new_words.safetensors"  # in an adapter's folder: text_encoder.<sks> -> (N, D)
EXPORT_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}  # how files for other tools call the encoders


class TextualInversionEmbedding(nn.Module):
    """A text encoder's word vectors, frozen, of which the last are learned."""

    def __init__(self, embedding: nn.Embedding, count: int) -> None:
        super().__init__()
        self.embedding, self.num_known = embedding, embedding.num_embeddings - count
        self.vectors = nn.Parameter(embedding.weight.detach()[self.num_known :].float().clone())  # (count, D)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token numbers (B, L) -> vectors (B, L, D)."""
        known = self.embedding(ids)
        new = self.vectors[(ids - self.num_known).clamp(min=0)].to(known.dtype)
        return torch.where((ids < self.num_known)[..., None], known, new)


def tokenizer_of(model: DiffusionModel, encoder: str) -> Any:
    """The tokenizer of a text encoder: tokenizer_2 of text_encoder_2."""
    return getattr(model, encoder.replace("text_encoder", "tokenizer"))


def check_token(model: DiffusionModel, token: str) -> None:
    """Raises UserError when the base's text encoders cannot learn this word."""
    kind = model.index["_class_name"]
    if not model.inversion_text_encoders:
        raise UserError(f"A {kind} cannot learn new tokens: leave --num-vectors out.")
    if len(token.split()) != 1:
        raise UserError(f"--token '{token}' is not a single word, which --num-vectors needs: take one such as <sks>.")
    for name in model.inversion_text_encoders:
        if token in tokenizer_of(model, name).get_vocab():
            raise UserError(
                f"--token {token} is a word that the base's {name} knows already, so --num-vectors would relearn it: take one "
                f"that it does not know, such as <{token.strip('<>')}>."
            )


def add_learned_token(
    model: DiffusionModel, token: str, count: int, start: str
) -> dict[str, TextualInversionEmbedding]:
    """Gives the text encoders a word of so many vectors, which begin as the mean of the vectors of the text `start`."""
    learned = {}
    for name in model.inversion_text_encoders:
        encoder, tokenizer = getattr(model, name), tokenizer_of(model, name)
        ids = tokenizer(start, add_special_tokens=False).input_ids
        mean = encoder.get_input_embeddings().weight[ids].mean(0)
        add_token(model.text_pipeline(), name, token, mean.expand(count, -1).clone())
        learned[name] = TextualInversionEmbedding(encoder.get_input_embeddings(), count)
        encoder.set_input_embeddings(learned[name])
    return learned


def add_token(pipe: Any, encoder: str, token: str, vectors: torch.Tensor) -> None:
    """Puts a word of vectors (N, D) into a stock pipeline, by its own loader.

    Raises:
        UserError: when the pipeline takes no words, or has this one already.
    """
    if not hasattr(pipe, "load_textual_inversion"):
        raise UserError(f"A {type(pipe).__name__} takes no new tokens, and the adapter brings {token}.")
    tokenizer = getattr(pipe, encoder.replace("text_encoder", "tokenizer"))
    if token in tokenizer.get_vocab():
        raise UserError(f"Two adapters bring the word {token}: train one of them with another --token.")
    text_encoder = getattr(pipe, encoder)
    # Made room for here: the loader would draw the new rows from a fit to all others first, only to put the vectors there.
    text_encoder.resize_token_embeddings(len(tokenizer) + len(vectors), mean_resizing=False)
    pipe.load_textual_inversion(
        vectors.to(text_encoder.dtype), token=token, tokenizer=tokenizer, text_encoder=text_encoder
    )


# ---------------------------------------------------------------------------------------------- files


def save_token_embeddings(folder: Path, token_embeddings: dict[str, torch.Tensor]) -> None:
    """Writes the words of an adapter, from 'text_encoder.<sks>' to vectors (N, D)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(
        folder / FILE,
        save({name: value.detach().float().cpu().contiguous() for name, value in token_embeddings.items()}),
    )


def load_token_embeddings(folder: Path) -> dict[str, torch.Tensor]:
    """What `save_token_embeddings` wrote; empty for an adapter without words."""
    return load_file(folder / FILE) if (folder / FILE).is_file() else {}


def add_tokens_to_pipeline(pipe: Any, token_embeddings: dict[str, torch.Tensor]) -> None:
    """Puts words, named as `save_token_embeddings` has them, into a stock pipeline."""
    for name, vectors in token_embeddings.items():
        encoder, _, token = name.partition(".")
        add_token(pipe, encoder, token, vectors)


def merge_token_embeddings(named: list[tuple[str, dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """The words of several adapters, each with its name.

    Raises:
        UserError: when two of them bring the same word with other vectors.
    """
    words: dict[str, torch.Tensor] = {}
    for adapter, own in named:
        for name, vectors in own.items():
            if name in words and not torch.equal(words[name], vectors):
                raise UserError(f"{adapter} brings another {name.partition('.')[2]}: train it with another --token.")
            words[name] = vectors
    return words


def export_token_embeddings(folder: Path, out: Path) -> list[Path]:
    """Writes an adapter's words as files of their own, one per token, for diffusers, A1111 and ComfyUI.

    With one text encoder a file holds the word's vectors under its name; with two, under clip_l and clip_g.
    """
    out.mkdir(parents=True, exist_ok=True)
    words, paths = load_token_embeddings(folder), []
    for token in dict.fromkeys(name.partition(".")[2] for name in words):
        own = {name.partition(".")[0]: value for name, value in words.items() if name.partition(".")[2] == token}
        state = (
            {token: own["text_encoder"]} if len(own) == 1 else {EXPORT_KEYS[name]: value for name, value in own.items()}
        )
        name = file_name(token)
        taken = sum(path.stem.rpartition("-")[0] == name or path.stem == name for path in paths)
        paths.append(out / f"{name}{f'-{taken + 1}' if taken else ''}.safetensors")
        write_atomic(paths[-1], save(state, metadata={"format": "pt", "token": token}))
    return paths


def import_token_embeddings(pipe: Any, path: Path) -> None:
    """Reads a file of `export_token_embeddings` into a stock pipeline."""
    with safe_open(path, "pt") as file:
        token = file.metadata()["token"]
    for key, vectors in load_file(path).items():
        encoder = next((name for name, own in EXPORT_KEYS.items() if own == key), "text_encoder")
        add_token(pipe, encoder, token, vectors)


def file_name(token: str) -> str:
    """A token as the name of a file in whatever folder: letters, digits, dashes and dots that do not lead out of it."""
    return re.sub(r"[^\w.-]+", "_", token.strip("<>")).lstrip(".") or "word"
