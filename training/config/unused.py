"""Settings that somebody has given and that have no effect beside the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from ...toolkit.core.setting_names import as_flag
from ...toolkit.diffusion.load import open_model, resolve_base
from .base import LoopConfig
from .compose import ComposeInstructConfig, has_fixed_weights
from .defaults import resolve_defaults

MEASURED = ("--evaluate-every", lambda config: config.evaluate_every)
NEEDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "unmasked_weight": ("--masks", lambda config: config.masks),
    "prior_images": ("--prior-weight", lambda config: config.prior_weight and config.prior_folder is None),
    "text_learning_rate": (
        "--train-text-encoder or --num-vectors",
        lambda config: config.train_text_encoder or config.num_vectors,
    ),
    "text_target_modules": ("--train-text-encoder", lambda config: config.train_text_encoder),
    "preview_base": (
        "--preview-every or --evaluate-every",
        lambda config: config.preview_every or config.evaluate_every,
    ),
    "preview_prompts": ("--preview-every", lambda config: config.preview_every),
    "evaluate_images": MEASURED,
    "evaluate_prompts": MEASURED,
    "evaluate_clip": MEASURED,
    "evaluate_data": MEASURED,
    "evaluate_answers": MEASURED,
    "preview_rows": ("--preview-every", lambda config: config.preview_every),
    "preview_tokens": ("--preview-every", lambda config: config.preview_every),
    "column_penalty": ("--tie column", lambda config: config.tie == "column"),
    "density": ("--merge", lambda config: config.merge),
    "replay_share": ("--replay", lambda config: config.replay),
}
"""Setting -> what it has no effect without, and whether that is there."""


USED_UNTRAINED = {
    "adapters", "weights", "max_rank", "ignore_unused", "merge", "density", "seed", "base", "vae", "text_encoder", "layout", "precision",
    "out", "export", "token", "class_noun", "chat_template", "pad_to_square", "max_pixels", "min_pixels", "video_frames",
}  # fmt: skip
"""Settings of a composition that learns nothing."""


def unused_settings(config: LoopConfig) -> list[str]:
    """A sentence for each setting that is another than the base's own, and has no effect. config: resolved."""
    plain: Any = resolve_defaults(type(config)(base=config.base, optimizer=config.optimizer))  # type: ignore[call-arg, attr-defined]
    others = [one.name for one in fields(config) if getattr(config, one.name) not in (None, getattr(plain, one.name))]
    return [f"{as_flag(name)} has no effect: {why}." for name in others if (why := why_unused(config, name))]


def why_unused(config: Any, name: str) -> str:
    """Why a setting has no effect beside the others; '' where it has one."""
    if has_fixed_weights(config):
        source = "--data" if isinstance(config, ComposeInstructConfig) else "--images"
        return "" if name in USED_UNTRAINED else f"without {source} nothing is learned"
    if name in NEEDS:
        needed, there = NEEDS[name]
        return "" if there(config) else f"it goes with {needed}, which is not given"
    if name == "target_parts" and config.target_modules:
        return "--target-modules says all layers"
    if name in ("temperature", "free") and getattr(config, "tie", "") == "column":
        return "the factors of --tie column are no softmax"
    if name in ("timestep_sampling", "timestep_shift"):
        base = open_model(resolve_base(config.base))
        return "" if base.is_flow else f"{base.title} predicts noise, and its timesteps are drawn evenly"
    return ""
