"""Paths as people write them, on any system: with ~, with backslashes, as addresses, and names that a file cannot have."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any
from urllib.parse import unquote, urlsplit

from .errors import UserError
from .systems import WINDOWS

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
VARIABLE = re.compile(r"\$(?:\w+|\{\w+\})(?:[/\\]|$)")  # a variable of the environment, at the start of a path
WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{kind}{n}" for kind in ("COM", "LPT") for n in range(1, 10)
}


def assets_folder() -> Path:
    """The folder of the embedded models, prompts and recipes inside the package."""
    return Path(__file__).resolve().parent.parent.parent / "assets"


def cache_folder() -> Path:
    """Where latents, prompt states and class images are kept: $RANKFOLD_CACHE or ~/.cache/rankfold."""
    return place_from("RANKFOLD_CACHE", "~/.cache/rankfold")


def place_from(variable: str, default: str) -> Path:
    """The folder that a variable of the environment names, or the default below the user's home.

    Raises:
        UserError: when the user has no home.
    """
    text = os.environ.get(variable) or default
    path = expand_user(Path(text))
    if path.parts[:1] == ("~",):
        raise UserError(
            f"You have no home folder for {text}: set the variable {variable} to a folder that can be written."
        )
    return path


def is_hub_id(text: str) -> bool:
    """Whether a text can name a repository of the hub (name/model) rather than a place on this machine."""
    return HUB_ID.fullmatch(text) is not None


def is_path(text: str) -> bool:
    """Whether a text is written as a path, be there anything or not: with / or a backslash, a drive, or ~."""
    return "/" in text or "\\" in text or text.startswith("~") or bool(PureWindowsPath(text).drive)


def expand_paths(value: Any) -> Any:
    """The value with ~ at the start of its paths, and variables of the environment in them, put out; within tuples and dicts too.

    Of texts, only those that begin with ~/ or with a variable that is set ($DATA/photos, ${DATA}/photos) count as paths.
    """
    if isinstance(value, PurePath):
        return expand_user(type(value)(os.path.expandvars(value)))
    if isinstance(value, str) and (value == "~" or value.startswith(("~/", "~\\"))):
        return str(expand_user(Path(value.replace("\\", "/") if not WINDOWS else value)))
    if isinstance(value, str) and VARIABLE.match(value):
        return os.path.expandvars(value)
    if isinstance(value, tuple):
        return tuple(expand_paths(one) for one in value)
    if isinstance(value, dict):
        return {key: expand_paths(one) for key, one in value.items()}
    return value


def expand_user(path: PurePath) -> Path:
    """A path with ~ or ~name put out; as it is where nobody has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def resolve_data_path(text: str, folder: Path | None) -> Path:
    """The path that a data file writes, absolute or from a folder; written with backslashes, it is also looked for with /."""
    path = Path(path_from_uri(text)) if text.startswith("file://") else expand_user(Path(text))
    ways = [path] if "\\" not in text else [path, Path(text.replace("\\", "/"))]
    found = [way if way.is_absolute() or folder is None else folder / way for way in ways]
    return next((way for way in found if is_file(way)), found[0])


def natural_key(path: Path) -> list[tuple[bool, int, str]]:
    """What paths are sorted by so that frame 10 comes after frame 9."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", path.name)]


def is_file(path: Path) -> bool:
    """Whether there is a file; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_there(path: Path) -> bool:
    """Whether there is a file or folder; a name that none can have is not there."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def path_from_uri(address: str, *, windows: bool = WINDOWS) -> str:
    """The path of a file:// address: file:///C:/photos/a%20b.png is C:/photos/a b.png on Windows, //host/share/a.png there too."""
    parts = urlsplit(address)
    path = unquote(parts.path)
    if windows and re.match(r"/[A-Za-z]:", path):
        return path[1:]
    return f"//{parts.netloc}{path}" if windows and parts.netloc not in ("", "localhost") else path


def windows_name_fault(name: str) -> str:
    """Why Windows has no file or folder of this name; '' where it may have one."""
    if found := sorted(set(re.findall(r'[<>:"/\\|?*\x00-\x1f]', name))):
        return f"{' '.join(map(repr, found))} cannot be in a name"
    if name.endswith((".", " ")):
        return "a name cannot end with a dot or a blank"
    if name.split(".")[0].rstrip().upper() in WINDOWS_DEVICES:
        return f"{name.split('.')[0]} is the name of a device"
    return ""
