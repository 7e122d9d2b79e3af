"""Command lines by the hundred: every option of every command with values that people, scripts and accidents give.

A command goes as far as the first model that it would load, and no further: what is wrong must be found before.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from rankfold.apps.cli import main
from rankfold.apps.cli.commands import COMMANDS

LONG = "x" * 5000
FLOATS = ("nan", "inf", "-inf", "-1", "0", "1e308", "abc", "")
INTEGERS = ("-1", "0", "1.5", "nan", str(2**63), "1" + "0" * 30, "abc", "")
TEXTS = ("", "{", "{0} {x} {}", "%s %", "../../x", "\u00e9\u4e2d", LONG, "-", "(", "\udcff")
PATHS = (
    "",
    "nowhere",
    "nowhere/at/all",
    "FILE",
    "FILE/below",
    "FOLDER",
    LONG,
    "..",
    "\udcff",
    "~no-such-user/x",
)
WORDS = ("", "abc", LONG)

GIVEN = {
    "demo": "--out OUT",
    "demo instruct": "--out OUT",
    "demo edit": "--out OUT",
    "train subject": "--images IMAGES --out OUT --threads 1",
    "train edit": "--images IMAGES --references IMAGES --out OUT --threads 1",
    "train dedistill": "--base tiny-dit --images EMPTY/images --number 2 --out OUT --threads 1",
    "train instruct": "--base tiny-vlm --data DATA --images IMAGES --out OUT --threads 1",
    "plan subject": "--images IMAGES --out OUT",
    "plan instruct": "--base tiny-vlm --data DATA --images IMAGES --out OUT",
    "search subject": "--images IMAGES --out OUT --threads 1",
    "search instruct": "--base tiny-vlm --data DATA --images IMAGES --out OUT --threads 1",
    "evaluate": "RUN --images IMAGES --clip embedded --out OUT",
    "report": "RUN --out OUT/report.html",
    "evaluate instruct": "--run TASK --data DATA --images IMAGES --out OUT",
    "caption": "IMAGES --overwrite",
    "chat": "What? --run TASK --image IMAGE",
    "resume": "RUN",
    "stop": "RUN",
    "queue": "RUN/config.yaml --out OUT",
    "work": "--runs EMPTY --until-empty",
    "app": "--runs EMPTY",
    "sample": "--run RUN --out OUT",
    "compose": "RUN RUN --out OUT",
    "compose instruct": "TASK TASK --base tiny-vlm --out OUT",
    "library add": "RUN --name fuzzed",
    "library list": "",
    "library show": "NAME",
    "export": "RUN --format kohya --out OUT/a.safetensors",
    "convert": "LORA --to kohya --base tiny --out OUT/a.safetensors",
    "inspect": "LORA",
    "convert-config": "FILE --out OUT/mine.yaml",
    "convert-base": "FILE --out OUT",
    "adapters": "",
    "doctor": "",
    "build-tiny": "--out OUT --work OUT/work",
}
"""A command line of each command that works."""


class ModelNeeded(BaseException):
    """A command has come to its first model: it found nothing wrong."""


class OptionsOf(BaseException):
    """What a command's options are: their class."""


def stop(*_: Any, **__: Any) -> Any:
    raise ModelNeeded


def before_any_model(patch: pytest.MonkeyPatch) -> None:
    """Every command ends where it would load a model, listen on a port, or build one."""
    import diffusers
    import open_clip
    from torch import nn

    from rankfold.apps.cli import app
    from rankfold.toolkit.diffusion.model import DiffusionModel
    from rankfold.toolkit.vlm.model import VisionLanguageModel
    from rankfold.training.embedded import build, demo_edit, demo_instruct
    from rankfold.training.launch import plan, plan_instruct

    load = DiffusionModel.load

    def load_part(self: Any, name: str) -> Any:
        import importlib

        library, kind = self.index[name]
        weights = issubclass(getattr(importlib.import_module(library), kind), nn.Module)
        return stop() if weights and self.device.type != "meta" else load(self, name)

    patch.setattr(DiffusionModel, "load", load_part)
    patch.setattr(VisionLanguageModel, "load", stop)
    patch.setattr(diffusers.DiffusionPipeline, "from_pretrained", stop)
    patch.setattr(open_clip, "create_model_and_transforms", stop)
    patch.setattr(app, "prepare_launch", stop)
    patch.setattr(build, "build_tiny", stop)
    patch.setattr(plan, "open_model", stop)
    patch.setattr(plan_instruct, "open_without_weights", stop)
    patch.setattr(demo_instruct, "write_demo_data", stop)
    patch.setattr(demo_edit, "write_edit_data", stop)


def options_of(name: str) -> Any:
    """The class of a command's options; None where it has none."""
    import tyro

    def tell(kind: Any, **_: Any) -> Any:
        raise OptionsOf(kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tyro, "cli", tell)
        try:
            main(name.split())
        except OptionsOf as found:
            return found.args[0]
        except SystemExit:
            return None
    return None


def bad_values(hint: Any) -> list[Sequence[str]]:
    """Words to give for an option of a type."""
    if get_origin(hint) is Annotated:
        return bad_values(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        found = [words for part in get_args(hint) if part is not NoneType for words in bad_values(part)]
        return [*found, ("None",)]
    if get_origin(hint) is Literal:
        return [(word,) for word in WORDS]
    if get_origin(hint) is tuple:
        one = bad_values(get_args(hint)[0])
        return [(), *one, *((*words, *words) for words in one)]
    if get_origin(hint) is dict:
        return [(), ("a",), ("a b", "c"), ("a b", "IMAGES"), ("(", "1"), (".*", "nan"), ("(a+)+$", "2"), ("x", "-1")]
    if hint is bool:
        return [(), ("maybe",)]
    values = {int: INTEGERS, float: FLOATS, str: TEXTS}.get(hint, PATHS)
    return [(value,) for value in values]


def command_lines(name: str) -> Iterator[list[str]]:
    """Lines of a command with one option given wrongly, or at least unusually."""
    given, kind = GIVEN[name].split(), options_of(name)
    start = name.split()
    yield [*start, *given]
    yield [*start, *given, "--no-such-option", "1"]
    yield [*start, *given, "one", "too", "many"]
    if name != "work":  # which would wait for runs for ever
        yield start
    if kind is None:
        return
    for field in fields(kind):
        hint = get_type_hints(kind, include_extras=True)[field.name]
        flag = f"--{field.name.replace('_', '-')}"
        is_positional = get_origin(hint) is Annotated and "Positional" in repr(get_args(hint)[1:])
        for words in bad_values(hint):
            if is_positional:
                line = [*words, *given[next((at for at, word in enumerate(given) if word[:2] == "--"), len(given)) :]]
            else:
                line = [*given, flag, *words]
            yield [*start, *line]


def make_workspace(folder: Path, run: Path, task: Path, lora: Path, images: Path) -> dict[str, str]:
    """What the words of GIVEN stand for. run, task: runs that are done; lora: a file."""
    (folder / "empty").mkdir(parents=True)
    (folder / "file").write_text("text: [")
    shutil.copytree(images, folder / "images")
    names = sorted(path.name for path in images.glob("*.png"))
    rows = [
        {
            "image": name,
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}],
        }
        for name in names
    ]
    (folder / "data.json").write_text(json.dumps(rows))
    return {
        "IMAGES": str(folder / "images"), "IMAGE": str(folder / "images" / names[0]), "OUT": str(folder / "out"),
        "RUN": str(run), "TASK": str(task), "LORA": str(lora), "DATA": str(folder / "data.json"), "NAME": "nobody",
        "EMPTY": str(folder / "empty"), "FILE": str(folder / "file"), "FOLDER": str(folder / "empty"),
    }  # fmt: skip


def fill_in(words: Sequence[str], places: dict[str, str]) -> list[str]:
    """Words with the places that they stand for."""
    filled = []
    for word in words:
        head, slash, rest = word.partition("/")
        filled.append(places[head] + slash + rest if head in places else word)
    return filled


def carry_out(words: Sequence[str]) -> tuple[int | str, str]:
    """Exit code of a command line and what went wrong: 0 or 'model' for fine, the kind of an exception for what nobody foresaw."""
    try:
        main(list(words))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0, ""
    except ModelNeeded:
        return "model", ""
    except Exception as error:
        import traceback

        return type(error).__name__, traceback.format_exc()
    return 0, ""


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """Within, it is the working directory."""
    with contextlib.chdir(folder):
        yield


def all_commands() -> list[str]:
    """Every command that GIVEN knows how to call."""
    assert set(GIVEN) == set(COMMANDS)
    return list(COMMANDS)
