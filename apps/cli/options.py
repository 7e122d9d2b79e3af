"""How commands read their options."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from ...toolkit.core.errors import UserError
from ...toolkit.core.limits import check_limits
from ...toolkit.core.paths import expand_paths
from ...toolkit.core.setting_names import as_flag, current_name
from ...toolkit.diffusion.base_files import join_base
from .commands import COMMANDS

DEFAULT_ERROR = 0.05  # of a layer's change, relative, where an export is approximated


@dataclass(frozen=True, kw_only=True)
class OverwriteOption:
    """What every command that begins a run takes beside the run's config."""

    overwrite: bool = False
    """Delete the run that --out holds, with all that belongs to it, once the new one is under way."""


@dataclass(frozen=True, kw_only=True)
class BaseFileOptions:
    """What commands take beside --base, where that is a file: the other files of the base, which become a part of its name."""

    vae: Path | None = None
    """Where --base is a file: the file with its autoencoder."""
    text_encoder: tuple[Path, ...] = ()
    """Where --base is a file: the files with its text encoders."""
    layout: str = ""
    """Where --base is a file: pipeline folder or hub id with configs, tokenizers and missing parts; unset: the one usual for it."""


def parse_options(kind: Any, argv: list[str], name: str, default: Any = None) -> Any:
    """Reads the options of a dataclass from the command line; ~ in a path is put out, as a shell does where it sees it.

    Raises:
        UserError: for a number beyond the limits in its type.
    """
    import tyro

    extra = {} if default is None else {"default": default}
    argv = spell_out_switches(kind, current_flags(argv, [field.name for field in fields(kind)]))
    argv = split_pairs(kind, argv)
    read = tyro.cli(kind, args=argv, prog=f"rankfold {name}", description=COMMANDS[name].help, **extra)
    check_limits(read)
    read = replace(read, **{field.name: expand_paths(getattr(read, field.name)) for field in fields(read)})
    return with_whole_base(read) if isinstance(read, BaseFileOptions) else read


def with_whole_base(options: Any) -> Any:
    """The options with the base's other files as a part of its name.

    Raises:
        UserError: for other files without --base.
    """
    given = {"--vae": options.vae, "--text-encoder": options.text_encoder, "--layout": options.layout}
    if not any(given.values()):
        return options
    if not options.base:
        flag = next(flag for flag, value in given.items() if value)
        raise UserError(f"{flag} belongs to --base FILE: give the file with the denoiser by --base, too.")
    base = join_base(options.base, options.vae, options.text_encoder, options.layout)
    return replace(options, base=base, vae=None, text_encoder=(), layout="")


def current_flags(argv: list[str], known: list[str]) -> list[str]:
    """The words of a command with the flags that settings have now, for those that once had another: --old, --old=value, --no-old.

    Raises:
        UserError: where a setting is given by both.
    """
    given, words = {}, []
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            no, old = ("no-", flag[5:]) if flag[2:5] in ("no-", "no_") else ("", flag[2:])
            old = old.replace("-", "_")
            name = current_name(old, known)
            if given.setdefault(name, old) != old:
                raise UserError(
                    f"{as_flag(given[name])} and {as_flag(old)} are one setting, now {as_flag(name)}: give it once."
                )
            if name != old:
                flag = as_flag(no + name)
        words.append(flag + equals + value)
    return words


def spell_out_switches(kind: Any, argv: list[str]) -> list[str]:
    """The words of a command with --switch and --no-switch as --switch True and --switch False, where a switch may also be unset."""
    hints = get_type_hints(kind)
    switches = {as_flag(field.name) for field in fields(kind) if set(get_args(hints[field.name])) == {bool, NoneType}}
    words: list[str] = []
    for number, word in enumerate(argv):
        flag, value = word.replace("_", "-"), True
        if flag.startswith("--no-") and f"--{flag[5:]}" in switches:
            flag, value = f"--{flag[5:]}", False
        alone = [*argv, ""][number + 1] not in ("True", "False", "None")
        words += [flag, str(value)] if flag in switches and alone else [word]
    return words


def split_pairs(kind: Any, argv: list[str]) -> list[str]:
    """The words of a command with --options key=value as --options key value, for options that are mappings of texts."""
    hints = get_type_hints(kind)
    mappings = {as_flag(field.name) for field in fields(kind) if hints[field.name] == dict[str, str]}
    words: list[str] = []
    inside, value_follows = False, False
    for word in argv:
        if word.startswith("--"):
            flag, equals, rest = word.partition("=")
            inside, value_follows = flag.replace("_", "-") in mappings, False
            words.append(flag if inside else word)
            if not (inside and equals):
                continue
            word = rest
        if inside and not value_follows and "=" in word:
            words += word.split("=", 1)
        else:
            words.append(word)
            value_follows = inside and not value_follows
    return words


def check_used(options: Any, unused: Collection[str], what: str) -> None:
    """Raises UserError for options that are given and say nothing of what the command was given. unused: fields; what: that."""
    given = [
        as_flag(one.name) for one in fields(options) if one.name in unused and getattr(options, one.name) != one.default
    ]
    if given:
        raise UserError(f"{', '.join(given)} would have no effect on {what}: leave it out.")


def parse_run(kind: Any, argv: list[str], name: str, default: Any = None) -> tuple[Any, bool]:
    """Reads the config of a run that is to begin, and whether it may take the place of another.

    kind: the config's class, with further options or without.
    """
    both = dataclass(frozen=True, kw_only=True)(type(kind.__name__, (kind, OverwriteOption), {"__doc__": kind.__doc__}))
    given = None if default is None else both(**{f.name: getattr(default, f.name) for f in fields(default)})
    options = parse_options(both, argv, name, given)
    return kind(**{field.name: getattr(options, field.name) for field in fields(kind)}), options.overwrite


def allowed_error(given: float | None, *, approximate: bool) -> float | None:
    """The relative error of a layer that an export may have; None where it must be exact.

    Raises:
        UserError: for one that is given where nothing is approximated.
    """
    if given is not None and not approximate:
        raise UserError("--max-error is of --approximate: give both, or leave it out.")
    return (DEFAULT_ERROR if given is None else given) if approximate else None


def check_out_free(config: Any, *, overwrite: bool) -> None:
    """Raises UserError when a run cannot begin in its --out: at once, before anything heavy is imported."""
    from ...training.runs.begin import check_out

    if is_main_process():
        check_out(config, overwrite=overwrite)


def is_main_process() -> bool:
    """Whether this is the process that speaks and has the run folder, by what launchers say; without importing what they start."""
    return os.environ.get("RANK", "0") == "0"


def take_option(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of an option and the words without it."""
    for number, word in enumerate(argv):
        if word == name and number + 1 < len(argv):
            return argv[number + 1], argv[:number] + argv[number + 2 :]
        if word.startswith(f"{name}="):
            return word.split("=", 1)[1], argv[:number] + argv[number + 1 :]
    return None, argv


def positional() -> Any:
    """tyro's mark for an argument without a flag."""
    import tyro

    return tyro.conf.Positional
