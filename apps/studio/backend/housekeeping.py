"""Runs and sets of images renamed and deleted, and images removed from a set. Nothing is lost that something else still needs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from ....toolkit.core.errors import UserError, list_names
from ....toolkit.core.files import write_text
from ....toolkit.core.run_folder import LIVE_STATES, Run
from ....toolkit.data.captions import SIDECARS
from ....toolkit.data.image_folder import SUFFIXES
from ....training.config.base import LoopConfig
from ....training.config.yaml_file import from_yaml, to_yaml
from ....training.launch.queue import list_runs
from ....training.runs import library
from .paths import UPLOADS_FOLDER, StudioPaths, check_name

BUSY_STATES = (*LIVE_STATES, "queued")
UNFINISHED = ("stopped", "failed", "lost")


# ---------------------------------------------------------------------------------------------- what names a folder


def replace_in_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A setting with its paths and texts changed."""
    if isinstance(value, tuple):
        return tuple(replace_in_texts(one, change) for one in value)
    if isinstance(value, dict):
        return {key: replace_in_texts(one, change) for key, one in value.items()}
    return type(value)(change(str(value))) if isinstance(value, str | Path) else value


def with_moved_paths(config: LoopConfig, old: Path, new: Path) -> LoopConfig:
    """The config with whatever it names of a folder named in another."""

    def moved(text: str) -> str:
        head, mark, place = text.partition(":") if text.startswith("local-dir:") else ("", "", text)
        rest = place.removeprefix(str(old))
        inside = place.startswith(str(old)) and rest[:1] in ("", "/", "\\", "=")
        return f"{head}{mark}{new}{rest}" if inside else text

    own: Any = config
    return replace(own, **{field.name: replace_in_texts(getattr(own, field.name), moved) for field in fields(own)})


def readers(paths: StudioPaths, folder: Path) -> list[Run]:
    """Runs whose settings name something in a folder, but for the run that it is."""
    found = []
    for run in list_runs(paths.runs):
        if run.folder == folder:
            continue
        try:
            config = from_yaml(run.config_file)
        except UserError:
            continue
        if with_moved_paths(config, folder, folder / "elsewhere") != config:
            found.append(run)
    return found


def check_not_read(paths: StudioPaths, folder: Path, what: str) -> list[Run]:
    """The runs that name a folder, none of them at work or waiting.

    Raises:
        UserError: when one is.
    """
    found = readers(paths, folder)
    busy = [run.folder.name for run in found if run.state() in BUSY_STATES]
    if busy:
        raise UserError(f"{what} is used by {list_names(busy, 5)}, at work or in the queue: stop it first, or wait.")
    return found


def describe_readers(found: list[Run]) -> str:
    """Who will miss a folder."""
    unfinished = [run.folder.name for run in found if run.state() in UNFINISHED]
    others = [run.folder.name for run in found if run.folder.name not in unfinished]
    text = f" {list_names(unfinished, 5)} cannot go on without it." if unfinished else ""
    if others:
        text += f" {list_names(others, 5)} was made with it: its adapter stays, but the run cannot be repeated."
    return text


def move_folder(paths: StudioPaths, old: Path, new: Path, found: list[Run]) -> None:
    """Renames a folder, and what runs say of it."""
    old.rename(new)
    for run in found:
        rewrite_config(run, old, new)


def rewrite_config(run: Run, old: Path, new: Path) -> None:
    """What a run's config names of a folder, in another; the run keeps its age."""
    with suppress(UserError):  # one that cannot be read stays as it is
        text = to_yaml(with_moved_paths(from_yaml(run.config_file), old, new))
        facts = run.config_file.stat()
        write_text(run.config_file, text)
        os.utime(run.config_file, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def delete_folder(folder: Path) -> None:
    """Deletes a folder; it is out of sight at once, whatever happens meanwhile."""
    aside = folder.with_name(f".deleted-{uuid4().hex[:8]}")
    folder.rename(aside)
    shutil.rmtree(aside)


# ---------------------------------------------------------------------------------------------- runs


def check_idle(run: Run) -> None:
    """Raises UserError for a run at work or in the queue."""
    if run.state() in BUSY_STATES:
        raise UserError(f"{run.folder.name} is {run.summary()}: stop it first.")


def deletion_of_run(paths: StudioPaths, name: str) -> str:
    """What deleting a run would lose, in sentences.

    Raises:
        UserError: when it is at work or waiting, or a run that is needs it.
    """
    run = paths.run(name)
    check_idle(run)
    found = check_not_read(paths, run.folder, name)
    text = f"Delete {name} ({run.summary()}) with its adapter, checkpoints and previews? This cannot be undone."
    if foreign := run.foreign_entries():
        text += f" It also holds {list_names(foreign, 3)}, which no run has written."
    return text + describe_readers(found)


def delete_run(paths: StudioPaths, name: str) -> str:
    """Deletes a run; returns a sentence.

    Raises:
        UserError: see `deletion_of_run`.
    """
    deletion_of_run(paths, name)
    delete_folder(paths.run(name).folder)
    return f"{name} has been deleted."


def rename_run(paths: StudioPaths, name: str, wish: str) -> str:
    """Renames a run, also where other runs name it; returns a sentence.

    Raises:
        UserError: when it is at work or waiting, or a run that is needs it; for a name that is none or is taken.
    """
    run, new = paths.run(name), paths.new_run(wish)
    check_idle(run)
    found = check_not_read(paths, run.folder, name)
    move_folder(paths, run.folder, new, [*found, Run(new)])
    return f"{name} is now {wish}."


# ---------------------------------------------------------------------------------------------- sets of images


def image_sets(paths: StudioPaths) -> list[str]:
    """Sets of images that were uploaded."""
    folder = paths.runs / UPLOADS_FOLDER
    return sorted(one.name for one in folder.iterdir() if one.is_dir()) if folder.is_dir() else []


def set_folder(paths: StudioPaths, name: str) -> Path:
    """The folder of a set that is there.

    Raises:
        UserError: when there is none of this name.
    """
    if name not in image_sets(paths):
        raise UserError(f"There is no set of images named {str(name)[:60]}: choose one from the list.")
    return paths.runs / UPLOADS_FOLDER / name


def free_set_name(paths: StudioPaths, wish: str = "images") -> str:
    """A name that no set has."""
    taken, number = set(image_sets(paths)), 1
    while f"{wish}-{number}" in taken:
        number += 1
    return f"{wish}-{number}"


def own_set(paths: StudioPaths, folder: Path) -> str:
    """The set that a folder is; '' for any other folder."""
    return folder.name if folder.resolve().parent == (paths.runs / UPLOADS_FOLDER).resolve() else ""


def deletion_of_set(paths: StudioPaths, name: str) -> str:
    """What deleting a set would lose, in sentences.

    Raises:
        UserError: when there is no such set, or a run at work or waiting needs it.
    """
    folder = set_folder(paths, name)
    found = check_not_read(paths, folder, f"The set {name}")
    count = sum(path.suffix.lower() in SUFFIXES for path in folder.iterdir())
    return f"Delete the set {name} with its {count} images and captions? This cannot be undone." + describe_readers(
        found
    )


def delete_set(paths: StudioPaths, name: str) -> str:
    """Deletes a set; returns a sentence.

    Raises:
        UserError: see `deletion_of_set`.
    """
    deletion_of_set(paths, name)
    delete_folder(set_folder(paths, name))
    return f"The set {name} has been deleted."


def rename_set(paths: StudioPaths, name: str, wish: str) -> Path:
    """Renames a set, also where runs name it; returns its folder.

    Raises:
        UserError: when a run at work or waiting needs it; for a name that is none or is taken.
    """
    folder = set_folder(paths, name)
    if wish in image_sets(paths):
        raise UserError(f"There is a set named {wish} already: choose another name.")
    new = folder.with_name(check_name(wish, "set of images"))
    move_folder(paths, folder, new, check_not_read(paths, folder, f"The set {name}"))
    return new


def remove_image(paths: StudioPaths, folder: Path, name: str) -> str:
    """Takes an image and its captions out of a set; returns a sentence.

    Raises:
        UserError: for a folder that is none of the studio's own, no image of it, or one that a run at work or waiting needs.
    """
    if not own_set(paths, folder):
        raise UserError(
            f"{folder} is a folder of yours: delete {name} there, for the studio deletes only what it was given."
        )
    known = {path.name: path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES}
    if name not in known:
        raise UserError(f"There is no image named {str(name)[:60]!r} in this set.")
    check_not_read(paths, folder, f"The set {folder.name}")
    image = known.pop(name)
    if not any(path.stem == image.stem for path in known.values()):  # a.png and a.jpg share a.txt
        for suffix in SIDECARS:
            image.with_suffix(suffix).unlink(missing_ok=True)
    image.unlink()
    return f"{name} was removed."


# ---------------------------------------------------------------------------------------------- the library


def deletion_of_entry(paths: StudioPaths, name: str) -> str:
    """What deleting an adapter of the library would lose, in sentences.

    Raises:
        UserError: when it is not there, or a run at work or waiting needs it.
    """
    entry = library.get(name)
    found = check_not_read(paths, entry.folder, name)
    return f"Delete {name} from the library? This cannot be undone." + describe_readers(found)


def delete_entry(paths: StudioPaths, name: str) -> str:
    """Deletes an adapter of the library; returns a sentence.

    Raises:
        UserError: see `deletion_of_entry`.
    """
    deletion_of_entry(paths, name)
    library.remove(name)
    return f"{name} has been deleted from the library."


def rename_entry(paths: StudioPaths, name: str, wish: str) -> str:
    """Renames an adapter of the library, also where runs name it; returns a sentence.

    Raises:
        UserError: when it is not there, or a run at work or waiting needs it; for a name that is none or is taken.
    """
    entry = library.get(name)
    found = check_not_read(paths, entry.folder, name)
    new = library.rename(name, wish)
    for run in found:
        rewrite_config(run, entry.folder, new.folder)
    return f"{name} is now {wish} in the library."
