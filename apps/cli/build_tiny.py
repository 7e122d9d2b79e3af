"""`rankfold build-tiny`."""

from __future__ import annotations

from .options import parse_options


def build_tiny(argv: list[str]) -> None:
    from ...training.embedded.build import BuildTinyConfig
    from ...training.embedded.build import build_tiny as build

    build(parse_options(BuildTinyConfig, argv, "build-tiny", BuildTinyConfig()))
