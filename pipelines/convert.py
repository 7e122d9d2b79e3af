"""Adapters of any tool in the format of any other, with the proof of an export."""

from __future__ import annotations

from pathlib import Path

from ..toolkit.core.errors import UserError, did_you_mean
from ..toolkit.core.out_of_memory import oom_context
from ..toolkit.formats.locate import adapter_facts, adapter_path
from .export import export_adapter
from .proof import Proof

TARGETS = {
    "diffusers": "diffusers",
    "peft": "peft",
    "comfy": "comfyui",
    "comfyui": "comfyui",
    "kohya": "kohya",
    "kohya-full": "kohya-full",
    "lycoris": "kohya-lycoris",
    "comfy-lycoris": "comfyui-lycoris",
}


@oom_context("converting the adapter")
def convert(
    path: Path,
    to: str,
    out: Path | None = None,
    *,
    base: str = "",
    prompt: str = "",
    max_error: float | None = None,
    width: int = 0,
    ignore_unused: bool = False,
) -> Proof:
    """Writes the adapter at `path`, a run, a folder or a LoRA file of any origin, in the format `to`, and proves the file.

    out: a folder or a .safetensors file; unset means beside the file, NAME_FORMAT.safetensors. base: the model it was made for; '' means
    the one that it names itself. The other arguments are those of `export_adapter`.

    Raises:
        UserError: for an unknown format, no known base, a file that cannot be read, or what the format cannot say.
    """
    if to not in TARGETS:
        raise UserError(f"--to {to} is not a format: choose one of {', '.join(TARGETS)}.{did_you_mean(to, TARGETS)}")
    place = adapter_path(path)
    facts = adapter_facts(place)
    base = base or facts.base
    if not base:
        raise UserError(f"{path} does not say which base model it is for: give it with --base.")
    format, stem = TARGETS[to], path.resolve().stem
    folder = path.resolve().parent
    if out is None:
        out = folder / f"{stem}_{format}.safetensors" if format != "peft" else folder / f"{stem}_peft"
    return export_adapter(
        place,
        base,
        format,
        out,
        prompt=prompt or f"a {facts.trigger_words}".strip(),
        max_error=max_error,
        width=width,
        title=stem,
        ignore_unused=ignore_unused,
    )
