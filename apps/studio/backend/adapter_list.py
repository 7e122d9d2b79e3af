"""All adapters at a glance: of runs, and of the library."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ....toolkit.core.errors import UserError
from ....toolkit.formats.adapter_facts import AdapterFacts
from ....toolkit.formats.locate import adapter_facts
from ....training.runs import library
from .paths import StudioPaths, check_name


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter, and where it comes from."""

    name: str
    """What pages call it."""
    path: Path
    run: str | None
    """The run that made it; None for one of the library."""
    is_chat: bool
    """Whether it is one of a vision-language model."""
    facts: AdapterFacts
    """What it says of itself; of one of the library, with what was said when it was added."""
    trigger: str
    """Trigger words of the subject."""


def list_adapters(paths: StudioPaths) -> dict[str, AdapterEntry]:
    """All adapters by what pages call them, the runs' first."""
    found = {}
    for is_chat in (False, True):
        for name, path in paths.adapters(chat=is_chat).items():
            kept = path.is_relative_to(library.library_folder())
            run = None if kept else path.relative_to(paths.runs).parts[0]
            facts = read_own_facts(path)
            entry = library.read_entry(path.parent) if kept else None
            if entry is not None:
                facts = replace(facts, base=entry.base, adapter=entry.adapter or facts.adapter)
            words = (entry.trigger if entry is not None else "") or facts.trigger_words
            found[name] = AdapterEntry(name, path, run, is_chat, facts, words)
    return found


def read_own_facts(path: Path) -> AdapterFacts:
    """What an adapter says of itself; nothing while it is being written, or when it is corrupted."""
    try:
        return adapter_facts(path)
    except UserError:
        return AdapterFacts()


def find_adapter(paths: StudioPaths, name: str | None) -> AdapterEntry:
    """The adapter that pages call so.

    Raises:
        UserError: when none was chosen, or there is no such one.
    """
    if not name:
        raise UserError("No adapter has been chosen: choose one from the list.")
    found = list_adapters(paths)
    if name not in found:
        raise UserError(f"There is no adapter named {name}: choose one from the list.")
    return found[name]


def add_to_library(paths: StudioPaths, adapter: str | None, name: str, trigger: str) -> str:
    """Copies a run's adapter into the library; returns a sentence.

    Raises:
        UserError: for an adapter that is not a run's, or a name that is none or is taken.
    """
    one = find_adapter(paths, adapter)
    if one.run is None or one.is_chat:
        raise UserError(f"{one.name} is not a run's adapter of a diffusion model: choose one from the list.")
    check_name(name, "library's adapter")
    if any(entry.name == name for entry in library.entries()):
        raise UserError(f"The library has an adapter named {name} already: choose another name.")
    run = paths.run(one.run)
    made = one.path == run.adapter
    image = library.newest_preview(run.folder)
    entry = library.add(run.folder if made else one.path, name=name, trigger=trigger.strip(), thumbnail=image)
    return f"{entry.name} is in the library (base {entry.base}, trigger {entry.trigger or '-'})."


def import_file(file: str, name: str, base: str, trigger: str) -> str:
    """Takes a LoRA file of any tool into the library; returns a sentence.

    Raises:
        UserError: for a file that is no adapter, a name that is none or is taken, or when nobody says what the base is.
    """
    path = Path(file)
    check_name(name, "library's adapter")
    if any(entry.name == name for entry in library.entries()):
        raise UserError(f"The library has an adapter named {name} already: choose another name.")
    try:
        entry = library.add(path, name=name, base=base, trigger=trigger)
    except UserError as error:  # where it was uploaded to helps nobody
        raise UserError(str(error).replace(file, path.name)) from error
    return f"{entry.name} is in the library (base {entry.base}, trigger {entry.trigger or '-'})."
