"""Settings that somebody has given and that have no effect beside the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .base import LoopConfig
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
    "replay_share": ("--replay", lambda config: config.replay),
}
"""Setting -> what it has no effect without, and whether that is there."""


def unused_settings(config: LoopConfig) -> list[str]:
    """A sentence for each setting that is another than the base's own, and has no effect. config: resolved."""
    plain: Any = resolve_defaults(type(config)(base=config.base, optimizer=config.optimizer))  # type: ignore[call-arg, attr-defined]
    found = []
    for name, (needed, there) in NEEDS.items():
        given = getattr(config, name, None)
        if given is not None and given != getattr(plain, name) and not there(config):
            flag = "--" + name.replace("_", "-")
            found.append(f"{flag} has no effect: it goes with {needed}, which is not given.")
    return found
