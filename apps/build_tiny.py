"""`rankfold build-tiny`."""

from __future__ import annotations

from .options import parse


def build_tiny(words: list[str]) -> None:
    from ..training.tiny import BuildTinyConfig
    from ..training.tiny import build_tiny as build

    build(parse(BuildTinyConfig, words, "build-tiny", BuildTinyConfig()))
