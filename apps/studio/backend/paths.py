"""What the studio may touch, and by which names: runs, the library, images. No path from a box is used unchecked."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from ....toolkit.core.errors import UserError
from ....toolkit.core.paths import is_hub_id, windows_name_fault
from ....toolkit.core.run_folder import Run
from ....toolkit.core.systems import WINDOWS
from ....toolkit.diffusion.base_files import base_paths, parse_base
from ....toolkit.diffusion.load import EMBEDDED
from ....toolkit.formats.adapter_facts import FILE
from ....toolkit.formats.locate import adapter_path, content_hash
from ....training.config.base import LoopConfig
from ....training.config.instruct import ConversationConfig
from ....training.config.yaml_file import from_yaml
from ....training.launch.queue import list_runs
from ....training.runs import library

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
UPLOADS_FOLDER = "_pictures"  # in the runs' folder: what was uploaded
GENERATED_FOLDER = "_made"  # what was generated


@dataclass(frozen=True)
class StudioPaths:
    """The folders of one studio."""

    runs: Path
    readable: tuple[Path, ...] = ()
    """Folders that boxes for paths may point into, beside the runs and the library."""

    # ------------------------------------------------------------------ runs

    def run_names(self) -> list[str]:
        """All runs, the newest first."""
        return [run.folder.name for run in list_runs(self.runs)]

    def run(self, name: str) -> Run:
        """The run of this name.

        Raises:
            UserError: when there is none, or the name is not a plain name.
        """
        folder = self.runs / check_name(name, "run")
        if not folder.exists():
            raise UserError(f"There is no run named {name}: it was deleted or renamed.")
        return Run.open(folder)

    def new_run(self, name: str) -> Path:
        """The folder of a run to be made.

        Raises:
            UserError: for a name that is not a plain name or is taken.
        """
        folder = self.runs / check_name(name, "run")
        if folder.exists():
            raise UserError(f"There is a run named {name} already: choose another name.")
        return folder

    def free_name(self, wish: str) -> str:
        """The wish, with a number behind it where it is taken."""
        taken, number = set(self.run_names()), 2
        name = wish
        while name in taken or (self.runs / name).exists():
            name, number = f"{wish}-{number}", number + 1
        return name

    def config(self, name: str) -> LoopConfig:
        """A run's config."""
        return from_yaml(self.run(name).config_file)

    # ------------------------------------------------------------------ adapters

    def adapters(self, *, chat: bool = False) -> dict[str, Path]:
        """Adapters by what a page calls them: of runs, of steps that were measured, of the library.

        chat: those of vision-language models instead of the others.
        """
        found: dict[str, Path] = {}
        for run in list_runs(self.runs):
            try:
                fits = isinstance(from_yaml(run.config_file), ConversationConfig) == chat
            except UserError:
                continue
            if not fits:
                continue
            if run.state() in ("done", "") and (run.adapter / FILE).is_file():
                found[run.folder.name] = run.adapter
            for step in sorted((run.folder / "measured").glob("[0-9]*")):
                found[f"{run.folder.name} at step {int(step.name)}"] = step
        if not chat:
            found |= {f"library: {entry.name}": entry.path for entry in library.entries()}
        return found

    def adapter(self, name: str, *, chat: bool = False) -> Path:
        """The adapter that a page calls so.

        Raises:
            UserError: when there is none.
        """
        known = self.adapters(chat=chat)
        if name not in known:
            raise UserError(f"There is no adapter named {name}: choose one from the list.")
        return known[name]

    def adapter_name(self, path: str, content: str = "") -> str:
        """What a page calls the adapter at a path, or one with this content hash, wherever it lies by now.

        Raises:
            UserError: when it is none of the runs' and the library's.
        """
        wanted, known = Path(path).resolve(), self.adapters()
        for name, own in known.items():
            if own.resolve() == wanted or own.parent.resolve() == wanted:
                return name
        for name, own in known.items():
            if content and content_hash(adapter_path(own)) == content:
                return name
        raise UserError(f"The adapter {path} is neither in {self.runs} nor in the library.")

    # ------------------------------------------------------------------ paths from boxes

    def readable_folder(self, text: str, what: str) -> Path:
        """A folder that somebody typed.

        Raises:
            UserError: when it is none, or lies outside what the studio may read.
        """
        path = self.readable_path(text, what)
        if not path.is_dir():
            raise UserError(f"{what} {text} is not a folder.")
        return path

    def readable_path(self, text: str, what: str) -> Path:
        """A file or folder that somebody typed, links followed.

        Raises:
            UserError: when it is not there, or lies outside what the studio may read.
        """
        try:
            path = Path(text.strip()).expanduser().resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{what} {text[:200]!r} is not a path that can be read.") from error
        allowed = [self.runs, library.library_folder(), *self.readable]
        if not any(path.is_relative_to(folder.resolve()) for folder in allowed):
            raise UserError(
                f"{what} {text} lies outside what the studio may read: start it with --readable {path.parent} to allow it."
            )  # of these, nobody learns here what exists
        if not path.exists():
            raise UserError(f"{what} {text} does not exist.")
        return path

    def base(self, text: str, embedded: tuple[str, ...] = tuple(EMBEDDED)) -> str:
        """A base model that somebody chose: embedded, a hub id, or a readable folder or file, or several files.

        Raises:
            UserError: for a path that is not readable.
        """
        text = text.strip()
        if text in embedded or (is_hub_id(text) and not Path(text).exists()):
            return text
        if (files := parse_base(text)) is not None:
            for path in base_paths(text):
                self.base(path, ())
            return str(files.with_paths(lambda path: str(self.readable_path(path, "The base"))))
        return str(self.readable_path(text, "The base"))

    def upload_folder(self, name: str) -> Path:
        """The folder for uploaded images of this name, made if need be."""
        folder = self.runs / UPLOADS_FOLDER / check_name(name, "set of images")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def generated_folder(self) -> Path:
        """Where generated images lie."""
        folder = self.runs / GENERATED_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def to_slug(wish: str | None) -> str:
    """A name as people write it, as a name of a file: without spaces and accents. What leads elsewhere stays, and is refused."""
    plain = unicodedata.normalize("NFKD", wish or "").encode("ascii", "ignore").decode()
    return re.sub(r"\s+", "-", plain.strip())


def check_name(name: str, what: str) -> str:
    """The name, if it is one.

    Raises:
        UserError: for anything that could lead out of its folder.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(
            f"{str(name)[:40]!r} is not a valid name of a {what}: use letters, digits, dots, - and _ only, at most 80."
        )
    if WINDOWS and (fault := windows_name_fault(name)):
        raise UserError(f"{name} is not a valid name of a {what}: {fault}. Choose another.")
    return name
