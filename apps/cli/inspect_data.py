"""`rankfold inspect data.json --base ...`: what a data file would teach, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHARED = ("images", "skip_bad", "max_length", "truncate", "columns", "split", "learn_turns", "max_pixels", "min_pixels",
          "video_frames", "pad_to_square", "chat_template")  # options that are settings of a run  # fmt: skip
LEGEND = {
    True: " (green; yellow where they count less than 1, magenta where more)",
    False: " (between « and », behind a weight other than 1)",
}
SHOWN_IMAGE_TOKENS = 2  # of an image, at its beginning


def is_data(file: Path) -> bool:
    """Whether a path names conversations, and no adapter."""
    from ...toolkit.data.row_files import DATA_SUFFIXES, is_saved_data_set

    if not file.is_dir():
        return file.suffix in DATA_SUFFIXES
    if is_saved_data_set(file):
        return True
    if (file / "config.yaml").is_file() or any(file.glob("*.safetensors")) or any(file.glob("*/*.safetensors")):
        return False
    return any(path.suffix in DATA_SUFFIXES for path in file.rglob("*") if path.name != "adapter_config.json")


def inspect_data(file: Path, options: Any) -> None:
    """Prints counts and lengths, the proof of the labels, and the first rows' tokens with those that are learned in colour."""
    from ...toolkit.vlm.model import VisionLanguageModel, resolve_vision_base
    from ...training.config.instruct import InstructConfig
    from ...training.instruct.conversations import plan_rows, verify_rows
    from ...training.instruct.prepare import processor_options

    settings = {name: getattr(options, name) for name in SHARED}
    config = InstructConfig(data=file, base=options.base or "tiny-vlm", **settings)
    chat = VisionLanguageModel(resolve_vision_base(config.base), **processor_options(config)).chat
    planned = plan_rows(file, config, chat)
    proven = verify_rows(planned, chat)
    print(file, *planned.describe(config.max_length), sep="\n  ")
    if chat.added_end:
        print(f"  the base's template ends no answer, so each one gets {chat.added_end}")
    print(f"  the labels of {proven} rows were found in two ways, which agree")
    for number in range(min(options.rows, len(planned))):
        show_row(chat, planned.rows[number])


def weight_text(weight: float) -> str:
    """What stands before tokens that do not count 1."""
    return "" if weight == 1 else f"{weight:g}: "


def weight_style(weight: float) -> str:
    """The colour of a learned token."""
    return "bold green" if weight == 1 else "bold yellow" if weight < 1 else "bold magenta"


def show_row(chat: Any, row: Any) -> None:
    """One row's tokens."""
    from rich.console import Console
    from rich.text import Text

    from ...toolkit.data.images import image_size
    from ...toolkit.data.videos import Video

    sizes = [medium.size if isinstance(medium, Video) else image_size(medium) for medium in row.images]
    tokens = chat.labels_by_marks(row, sizes)
    colour = Console().is_terminal
    text, learning, images = Text(), 0.0, 0
    for number, weight in zip(tokens.ids, tokens.weights, strict=True):
        images = images + 1 if number in chat.image_token_ids() else 0
        if images > SHOWN_IMAGE_TOKENS:
            continue
        if not colour and weight != learning:
            text.append(("»" if learning else "") + (f"«{weight_text(weight)}" if weight else ""))
            learning = weight
        piece = "…" if images == SHOWN_IMAGE_TOKENS else chat.tokenizer.decode([number])
        text.append(piece, style=weight_style(weight) if weight else "dim" if images else "")
    if not colour and learning:
        text.append("»")
    print(f"\n{row.location}: {len(tokens.ids)} tokens, {tokens.num_learned} learned{LEGEND[colour]}")
    Console(highlight=False, soft_wrap=True).print(text)
