"""Where a run may begin: an --out that is free, or whose run may go.

Nothing heavy is imported here, so that a command is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...toolkit.core.errors import UserError, list_names
from ...toolkit.core.files import write_text
from ...toolkit.core.paths import is_there
from ...toolkit.core.run_folder import Run
from ...toolkit.core.setting_names import as_flag
from ...toolkit.diffusion.base_files import base_paths, parse_base
from ..config.base import LoopConfig
from ..config.compose import has_fixed_weights
from ..config.shares import split_share
from ..config.yaml_file import from_yaml, to_yaml

SOURCES = (
    "images",
    "masks",
    "references",
    "evaluate_images",
    "prior_folder",
    "evaluate_prompts",
    "held_out",
    "data",
    "replay",
    "chat_template",
    "start_from",
    "training_adapter",
    "preview_base",
    "evaluate_data",
    "base",
    "vae",
    "text_encoder",
)
"""Fields of configs that may name a file or folder to read; more_data, evaluate_clip and base may do so within a text."""
LOCAL_CLIP = "local-dir:"  # how open_clip names a model in a folder


def with_absolute_paths(config: Any) -> Any:
    """The config with the files and folders that it reads, and its --out, by their whole paths, as far as they are there.

    So a worker, or who goes on with the run from another folder, finds what was meant when it began.
    """

    def absolute(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(absolute, value))
        if isinstance(value, dict):
            return {key: absolute(one) for key, one in value.items()}
        if isinstance(value, str) and (files := parse_base(value)) is not None:
            return str(files.with_paths(absolute))
        if not isinstance(value, (str, Path)) or not str(value) or not is_there(Path(value)):
            return value
        return type(value)(Path(value).absolute()) if isinstance(value, str) else value.absolute()

    names = [name for name in (*SOURCES, "also", "adapters") if hasattr(config, name)]
    values = {name: absolute(getattr(config, name)) for name in names}
    if hasattr(config, "more_data"):
        values["more_data"] = tuple(absolute(name) + share for name, share in map(split_share, config.more_data))
    if getattr(config, "evaluate_clip", "").startswith(LOCAL_CLIP):
        values["evaluate_clip"] = LOCAL_CLIP + absolute(config.evaluate_clip.removeprefix(LOCAL_CLIP))
    return replace(config, out=config.out.absolute(), **values)


def check_out(config: LoopConfig, *, overwrite: bool = False) -> None:
    """Checks that a run may begin in its --out.

    overwrite: a run that is there may go.

    Raises:
        UserError: when a run is there, with the ways on; when a live one is; when files of somebody else would be overwritten, or such
            that the new run reads.
    """
    run = Run(config.out)
    run.check_not_live()
    run.recover()
    if run.folder.exists() and not run.folder.is_dir():
        raise UserError(f"--out {run.folder} is a file: give a folder, or a name that is not there yet.")
    if run.is_run():
        check_sources_outside(config, run)
        if not overwrite and (run.is_worth_keeping() or is_another_config(run, config)):
            raise UserError(refusal_message(run))
        return
    taken = [path.name for path in run.run_entries()] or (run.foreign_entries() if overwrite else [])
    if taken:
        raise UserError(
            f"--out {run.folder} holds {list_names(taken, 3)}, which no run has left there"
            + ("; --overwrite clears folders of runs only" if overwrite else ", and a run would write there")
            + ": give another --out."
        )


def refusal_message(run: Run) -> str:
    """Why no run can begin where one is, and the ways on."""
    ways = "start over with --overwrite, which deletes it, or give another --out."
    if not run.config_file.is_file() and run.folds():
        return f"{run.folder} holds the folds of a cross-validation already: go on with them by the command with --folds, {ways}"
    go_on = f"go on with it by `rankfold resume {run.folder}`"
    state = run.state()
    if state == "done":
        go_on = f"`rankfold resume {run.folder}` goes on when its config.yaml asks for more steps"
        if is_complete(run):
            go_on = f"`rankfold resume {run.folder}` has nothing to add"
    if state == "queued":
        go_on = f"carry it out with `rankfold work --runs {run.folder.parent}` or `rankfold resume {run.folder}`"
    told = run.summary() if state else "of which only a config.yaml is known"
    return f"{run.folder} holds a run already, {told}: {go_on}; {ways}"


def is_complete(run: Run) -> bool:
    """Whether more steps would add nothing to a run that is done: a composition by fixed weights, or a search."""
    try:
        config = from_yaml(run.config_file)
    except UserError:
        return False
    return has_fixed_weights(config) or run.candidates.is_file()


def is_another_config(run: Run, config: LoopConfig) -> bool:
    """Whether nothing but a config.yaml is there, with which no run has begun yet, and it says something else."""
    if run.state() or not run.config_file.is_file():
        return False
    try:
        return replace(from_yaml(run.config_file), out=config.out) != config
    except UserError:
        return True


def check_sources_outside(config: Any, run: Run) -> None:
    """Raises UserError when the new run reads what it would replace."""
    own = [path.resolve() for path in run.run_entries()]
    given = [(name, getattr(config, name, None) or "") for name in SOURCES]
    read = [(name, str(one)) for name, value in given for one in (value if isinstance(value, tuple) else [value])]
    read += [("base", path) for path in base_paths(getattr(config, "base", ""))]
    read += [("also", folder) for folder in getattr(config, "also", {}).values()]
    for name, text in [*read, *(("adapters", text) for text in getattr(config, "adapters", ()))]:
        place = Path(text).resolve()
        whole = name == "adapters" and place == run.folder.resolve()
        if text and Path(text).exists() and (whole or any(place.is_relative_to(entry) for entry in own)):
            option = "a source" if name == "adapters" else as_flag(name)
            raise UserError(
                f"{option} {text} lies in the run {run.folder}, which would be deleted: copy it elsewhere, or give another --out."
            )


def prepare_folder(
    run: Run, config: LoopConfig, keep: Collection[str] = (), still_free: Callable[[], None] = lambda: None
) -> None:
    """Makes a folder that `check_out` has let pass this process's own, with the config in it and nothing of an earlier run.

    A run that was worth keeping is put aside till the new one is under way, see `Run.set_aside`.

    keep: entries that stay. still_free: the check once more, now that nobody else can begin here: another run may have come and gone.

    Raises:
        UserError: for a folder that cannot be made or cleared, or that another process has taken meanwhile.
    """
    run.lock()
    try:
        still_free()
    except UserError:
        run.unlock()
        raise
    clear_folder(run, keep)
    run.claim(step=0, total=0 if has_fixed_weights(config) else config.steps)
    write_text(run.config_file, to_yaml(with_absolute_paths(config)))


def clear_folder(run: Run, keep: Collection[str] = ()) -> None:
    """Clears a folder that `check_out` has let pass, and says so. A run that was worth keeping is put aside as yet."""
    if not run.is_run():
        return
    told, others, same = run.summary() if run.state() else "", run.foreign_entries(), run.config_file.name in keep
    overwritten = run.set_aside(keep)
    if told and not same:
        what = "is overwritten" if overwritten else "had no checkpoint yet, and another begins"
        print(f"{run.folder}: the run that was there ({told}) {what}{remaining_files(others)}")


def restore_previous(run: Run, keep: Collection[str] = ()) -> bool:
    """After a run that could not begin: brings back the one that it should have taken the place of; False when there was none."""
    if not run.restore_aside(keep):
        return False
    print(f"{run.folder}: the run that was there is as it was, since the new one could not begin.")
    return True


def remaining_files(names: list[str]) -> str:
    """The end of a sentence: what stays in the folder beside the run."""
    return (
        f"; {list_names(names, 3)} {'stays' if len(names) == 1 else 'stay'}, which no run has left there."
        if names
        else "."
    )
