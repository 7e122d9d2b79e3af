"""`rankfold adapters`."""

from __future__ import annotations

from dataclasses import dataclass

from .options import parse_options


def adapters(argv: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        markdown: bool = False
        """Print docs/adapters.md."""

    options = parse_options(Options, argv, "adapters")
    if options.markdown:
        from ...toolkit.adapters.describe import adapters_markdown

        print(adapters_markdown(), end="")
        return
    from ...toolkit.adapters.registry import adapter_names, option_help

    for name in adapter_names():
        print(name)
        for option, text in option_help(name).items():
            print(f"    {option}: {text}")
