"""`rankfold inspect data.json --base ...`: what a data file would teach, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DATA = (".json", ".jsonl", ".parquet")
SHOWN_IMAGE_TOKENS = 2  # of an image, at its beginning


def inspect_data(file: Path, base: str, images: Path | None, *, rows: int, skip_bad: bool, max_length: int) -> None:
    """Prints counts and lengths, the proof of the labels, and the first rows' tokens with those that are learned in colour."""
    from ...toolkit.vlm.model import VisionLanguageModel, resolve_vision_base
    from ...training.config.instruct import InstructConfig
    from ...training.instruct.conversations import plan_rows, verify_rows

    chat = VisionLanguageModel(resolve_vision_base(base)).chat
    config = InstructConfig(data=file, images=images, base=base, skip_bad=skip_bad, max_length=max_length)
    planned = plan_rows(file, config, chat)
    proven = verify_rows(planned, chat)
    lengths = sorted(planned.lengths)
    print(f"{file}\n  rows     {len(planned)}, with {sum(len(row.images) for row in planned.rows)} images")
    print(
        f"  tokens   {lengths[0]} to {lengths[-1]} per row, median {lengths[len(lengths) // 2]}; {sum(lengths):,} in all"
    )
    print(f"  learned  {sum(planned.num_learned):,} of them ({sum(planned.num_learned) / sum(lengths):.1%})")
    if planned.too_long:
        print(f"  left out {len(planned.too_long)} longer than {max_length} tokens, such as {planned.too_long[0]}")
    for fault in planned.faults[:5]:
        print(f"  left out {fault}")
    if len(planned.faults) > 5:
        print(f"  left out {len(planned.faults) - 5} more")
    if chat.added_end:
        print(f"  the base's template ends no answer, so each one gets {chat.added_end}")
    print(f"  the labels of {proven} rows were found in two ways, which agree")
    for number in range(min(rows, len(planned))):
        show_row(chat, planned.rows[number])


def show_row(chat: Any, row: Any) -> None:
    """One row's tokens."""
    from rich.console import Console
    from rich.text import Text

    from ...toolkit.data.images import image_size

    tokens = chat.labels_by_marks(row, [image_size(image) for image in row.images])
    colour = Console().is_terminal
    text, learning, images = Text(), False, 0
    for number, label in zip(tokens.ids, tokens.labels, strict=True):
        images = images + 1 if number in chat.image_token_ids() else 0
        if images > SHOWN_IMAGE_TOKENS:
            continue
        if not colour and (label >= 0) != learning:
            learning = label >= 0
            text.append("«" if learning else "»")
        piece = "…" if images == SHOWN_IMAGE_TOKENS else chat.tokenizer.decode([number])
        text.append(piece, style="bold green" if label >= 0 else "dim" if images else "")
    if not colour and learning:
        text.append("»")
    print(
        f"\n{row.location}: {len(tokens.ids)} tokens, {tokens.num_learned} learned{'' if colour else ' (between « and »)'}"
    )
    Console(highlight=False, soft_wrap=True).print(text)
