"""`rankfold inspect`: what a LoRA file, an adapter folder, a folder of images or a data file is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from .inspect_data import SHARED
from .options import BaseFileOptions, check_used, parse_options, positional

OF_CONVERSATIONS = {"rows", *SHARED} - {"skip_bad"}


def inspect(argv: list[str]) -> None:
    @dataclass(frozen=True)
    class Options(BaseFileOptions):
        file: Annotated[Path, positional()]
        """A LoRA file, the folder it lies in, a run or its adapter; a folder of images; or conversations (a file, a folder, a pattern)."""
        base: str | None = None
        """Base model: each layer's change is set against its weight, captions and conversations are counted in its tokens."""
        images: Path | None = None
        """Folder that the images' paths of conversations start from; unset means the data file's own."""
        rows: Annotated[int, Ge(0)] = 1
        """Conversations that are shown in full."""
        skip_bad: bool = False
        """List conversations or images that cannot be used instead of stopping at the first."""
        token: str | None = None
        """Of a folder of images: the word that stands for the subject in captions."""
        max_length: Annotated[int, Ge(1)] = 2048
        """Maximum tokens per conversation."""
        truncate: bool = False
        """Truncate longer conversations to the exchanges that fit."""
        columns: tuple[str, ...] = ()
        """Columns of the data under other names, each as OURS=THEIRS: question=Frage, or ignore=THEIRS."""
        split: str = ""
        """Which split of a folder that holds several."""
        learn_turns: Literal["all", "last", "marked"] = "all"
        """Answers that are learned: all, the last, or those whose turns are marked."""
        max_pixels: Annotated[int, Ge(1)] | None = None
        """Most pixels that an image is given to the base with."""
        min_pixels: Annotated[int, Ge(1)] | None = None
        """Fewest pixels that an image is given to the base with."""
        video_frames: int | None = None
        """Most frames of a video that the base is given."""
        pad_to_square: bool = False
        """Give images borders, so that a processor that crops cuts nothing off."""
        chat_template: Path | None = None
        """File with a chat template instead of the base's own."""
        layers: bool = False
        """List every layer."""
        json: bool = False
        """Print all of it as JSON."""

    options = parse_options(Options, argv, "inspect")
    from .inspect_images import inspect_images, is_image_folder

    if is_image_folder(options.file):
        check_used(options, {*OF_CONVERSATIONS, "layers"}, "a folder of images")
        inspect_images(
            options.file, options.base or "tiny", token=options.token, skip_bad=options.skip_bad, as_json=options.json
        )
        return
    from .inspect_data import inspect_data, is_data

    if is_data(options.file):
        check_used(options, {"token", "layers", "json"}, "conversations")
        inspect_data(options.file, options)
        return
    from ...toolkit.formats.folder_report import inspect_adapter
    from ...toolkit.formats.report import to_json

    check_used(options, {*OF_CONVERSATIONS, "token", "skip_bad"}, "an adapter")
    found = inspect_adapter(options.file, load_base(options.file, options.base) if options.base else None)
    if options.json:
        print(to_json(found))
    else:
        print_report(found, every_layer=options.layers)


def load_base(adapter: Path, base: str) -> Any:
    """The base of an adapter, of either kind."""
    from ...pipelines.chat import open_chat
    from ...pipelines.generate import Recipe, load_pipeline
    from ...toolkit.formats.folder_report import is_chat_adapter
    from ...toolkit.formats.locate import adapter_path

    is_chat = (Path(base) / "config.json").is_file() and not (Path(base) / "model_index.json").is_file()
    return (
        open_chat(base)
        if is_chat or is_chat_adapter(adapter_path(adapter))
        else load_pipeline(Recipe(prompt="", base=base))
    )


def print_report(found: Any, *, every_layer: bool) -> None:
    """What `inspect` found, for people."""
    print(found.path)
    for key, text in found.table():
        print(f"  {f'{key:8}' if len(key) < 8 else f'{key}:'} {text}")
    if every_layer:
        for layer in found.layers:
            norm = "-" if layer.norm is None else f"{layer.norm:.4g}"
            relative = "" if layer.relative is None else f"{layer.relative:.2%} of the weight"
            print(
                f"    {layer.name}  {layer.method} r={layer.rank} scale={layer.scale:g} |change|={norm} {relative} {layer.fault}"
            )
    for line in found.summary():
        print(f"  {'' if found.is_valid else '! '}{line}")
