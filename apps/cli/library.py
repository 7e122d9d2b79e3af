"""`rankfold library add`, `list` and `show`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from .options import BaseFileOptions, parse_options, positional


def add(argv: list[str]) -> None:
    @dataclass(frozen=True)
    class Options(BaseFileOptions):
        path: Annotated[Path, positional()]
        """Run folder, adapter folder or LoRA file."""
        name: str = ""
        """Name in the library; unset means the folder's or file's."""
        base: str = ""
        """Base model; unset means what the adapter says."""
        trigger: str = ""
        """Trigger words; unset means what the adapter says."""
        thumbnail: Path | None = None
        """Image of it; unset means a run's newest preview."""

    options = parse_options(Options, argv, "library add")
    from ...training.runs import library

    entry = library.add(
        options.path, name=options.name, base=options.base, trigger=options.trigger, thumbnail=options.thumbnail
    )
    print_entry(entry)


def list_all(argv: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        pass

    parse_options(Options, argv, "library list")
    from ...training.runs import library

    found = library.entries()
    if not found:
        print("The library is empty. Add an adapter: rankfold library add runs/mine --name mine")
    width = max((len(entry.name) for entry in found), default=0)
    for entry in found:
        print(f"{entry.name:<{width}}  {entry.trigger or '-'}  (base {entry.base}, {entry.adapter or 'lora'})")
    for name in library.damaged_entries():
        print(
            f"{name}: damaged or half written; add the adapter again under this name, or delete {library.library_folder() / name}"
        )


def show(argv: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        name: Annotated[str, positional()]
        """Name in the library."""

    options = parse_options(Options, argv, "library show")
    from ...training.runs import library

    print_entry(library.get(options.name))


def print_entry(entry: Any) -> None:
    """All that the library knows of an adapter."""
    from ...toolkit.formats.locate import adapter_facts

    print(
        f"{entry.name}\n  trigger    {entry.trigger or '-'}\n  base       {entry.base}\n  adapter    {entry.adapter or '-'}"
    )
    print(f"  hash       {entry.hash}\n  files      {entry.path}\n  thumbnail  {entry.thumbnail or '-'}")
    if sources := adapter_facts(entry.path).composed_of:
        print(f"  made of    {', '.join(source.name for source in sources)}")
