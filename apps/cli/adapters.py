"""`rankfold adapters`."""

from __future__ import annotations

from dataclasses import dataclass

from .options import parse


def adapters(words: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        markdown: bool = False
        """Print docs/adapters.md."""

    options = parse(Options, words, "adapters")
    if options.markdown:
        from ...toolkit.adapters.describe import markdown

        print(markdown(), end="")
        return
    from ...toolkit.adapters.registry import adapter_names, options_of

    for name in adapter_names():
        print(name)
        for option, text in options_of(name).items():
            print(f"    {option}: {text}")
