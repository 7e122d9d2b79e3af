"""`rankfold build-tiny`."""

from __future__ import annotations

from .options import parse


def build_tiny(words: list[str]) -> None:
    from ...training.embedded.build import BuildTinyConfig
    from ...training.embedded.build import build_tiny as build

    build(parse(BuildTinyConfig, words, "build-tiny", BuildTinyConfig()))
