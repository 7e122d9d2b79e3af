"""Settings that nobody has set, filled in with the base's own: its family's (toolkit/diffusion/families), or the embedded model's.

What is filled in stands in config.yaml, so that a run that goes on later keeps it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ...toolkit.core.devices import device_type
from ...toolkit.core.errors import UserError
from ...toolkit.diffusion.load import EMBEDDED, open_model, resolve_base
from ...toolkit.diffusion.model import DiffusionModel
from ...toolkit.vlm.model import EMBEDDED as EMBEDDED_VLM
from .base import LoopConfig
from .images import DiffusionConfig
from .instruct import ConversationConfig
from .subject import SubjectConfig

LARGE = 4e9  # bytes of a denoiser's weights above which activations are recomputed: SDXL is, SD 1.5 is not
DEVICES_WITH_BF16 = ("cuda", "xpu")
OPTIMIZER_RATES = {"Prodigy": 1.0}  # which find their own; Mishchenko and Defazio 2023, arXiv 2306.06101
RATE_FACTORS = {
    "Lion": 0.3,
    "Lion8bit": 0.3,
}  # of AdamW's; Chen et al. 2023, arXiv 2302.06675, section 5: 3 to 10 times smaller
EMBEDDED_SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "text_learning_rate": None,  # as the denoiser's
    "batch_size": 4,
    "precision": "fp32",
    "gradient_checkpointing": False,
    "rank": 8,
    "timestep_shift": 1.0,
    "preview_steps": 20,
    "guidance_scale": 4.0,
    "class_noun": "creature",
}
SAMPLING_STEPS, SAMPLING_GUIDANCE = 25, 4.0
DISTILLED_SETTINGS: dict[str, dict[str, Any]] = {"tiny-turbo": {"preview_steps": 4, "guidance_scale": 1.0}}
"""Of embedded models that draw in fewer steps than the others."""
EMBEDDED_VLM_SETTINGS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "batch_size": 4,
    "precision": "fp32",
    "gradient_checkpointing": False,
    "rank": 8,
}

AnyConfig = TypeVar("AnyConfig", bound=LoopConfig)


def resolve_defaults(config: AnyConfig) -> AnyConfig:
    """The config with the base's own settings where none are set.

    Raises:
        UserError: for a base that cannot be found.
    """
    if isinstance(config, SubjectConfig) and config.start_from is not None:
        config = with_start_values(config)
    config = replace(config, **unset_settings(config))
    return replace(config, alpha=float(config.rank)) if getattr(config, "alpha", 0) is None else config  # type: ignore[attr-defined, call-arg]


def with_start_values(config: SubjectConfig) -> SubjectConfig:
    """The config with rank and alpha of the adapter that it goes on from, where they are not set."""
    from .start_from import start_values  # reads adapters, which few trainings need

    assert config.start_from is not None
    _, rank, alpha = start_values(config.start_from)
    own = {"rank": rank, "alpha": float(alpha)} if alpha else {"rank": rank}
    return replace(config, **{name: value for name, value in own.items() if getattr(config, name) is None})


def unset_settings(config: LoopConfig) -> dict[str, Any]:
    """The base's own values of the settings that nobody has set."""
    unset = {field.name for field in fields(config) if getattr(config, field.name) in (None, "")}
    if not unset & EMBEDDED_SETTINGS.keys():
        return {}
    return {name: value for name, value in base_settings(config).items() if name in unset}


def base_settings(config: LoopConfig) -> dict[str, Any]:
    """The settings that a base starts from, with this optimizer, on this device."""
    if isinstance(config, DiffusionConfig):
        settings = image_settings(config.base)
        if config.drawing_base != config.base:
            drawing = image_settings(config.drawing_base, resolve_preview_base)
            settings |= {name: drawing[name] for name in ("preview_steps", "guidance_scale")}
    else:
        assert isinstance(config, ConversationConfig)
        settings = EMBEDDED_VLM_SETTINGS if config.base in EMBEDDED_VLM else vlm_settings()
    rates = {name: settings[name] for name in ("learning_rate", "text_learning_rate") if name in settings}
    factor = RATE_FACTORS.get(config.optimizer, 1.0)
    return settings | {
        name: OPTIMIZER_RATES.get(config.optimizer, rate * factor) for name, rate in rates.items() if rate
    }


def image_settings(base: str, resolve: Callable[[str], str] = resolve_base) -> dict[str, Any]:
    """The settings that a base of images starts from. resolve: finds its folder."""
    if base in EMBEDDED:
        return EMBEDDED_SETTINGS | DISTILLED_SETTINGS.get(base, {})
    return family_settings(open_model(resolve(base)))


def resolve_preview_base(base: str) -> str:
    """The folder of a base that images are drawn with while training.

    Raises:
        UserError: as `resolve_base` does, of --preview-base.
    """
    try:
        return resolve_base(base)
    except UserError as error:
        raise UserError(str(error).replace("--base", "--preview-base")) from error


def drawing_defaults(base: str, config: DiffusionConfig | None = None) -> tuple[int, float]:
    """Steps and guidance that images are drawn with where nobody says others. config: of the run whose adapter they are drawn with.

    A run that is drawn without guidance is on a distilled base, which draws in as many steps as the run's previews.

    Raises:
        UserError: for a base that cannot be found.
    """
    own: dict[str, Any]
    if config is not None and Path(base).absolute() == Path(config.drawing_base).absolute():
        own = vars(config)
    elif base in EMBEDDED:
        own = DISTILLED_SETTINGS.get(base, {})
    else:
        own = {"guidance_scale": open_model(resolve_base(base)).default_guidance()}
    guidance = SAMPLING_GUIDANCE if own.get("guidance_scale") is None else own["guidance_scale"]
    return (own.get("preview_steps") if guidance <= 1 else None) or SAMPLING_STEPS, guidance


def family_settings(model: DiffusionModel) -> dict[str, Any]:
    """What training starts from with a base of this family and size."""
    own = model.training_defaults
    return {
        "learning_rate": own.learning_rate,
        "text_learning_rate": own.text_learning_rate,
        "batch_size": own.batch_size * int(os.environ.get("WORLD_SIZE", "1")),  # it counts the images of all processes
        "precision": native_precision(),
        "gradient_checkpointing": model.denoiser_bytes > LARGE,
        "rank": own.rank,
        "timestep_shift": own.timestep_shift,
        "preview_steps": own.preview_steps,
        "guidance_scale": model.default_guidance(),
        "class_noun": "",
    }


def vlm_settings() -> dict[str, Any]:
    """What training starts from with a vision-language model that is not embedded (rate and rank as TRL's and LLaVA's recipes have)."""
    accelerated = device_type() in DEVICES_WITH_BF16
    return {
        "learning_rate": 1e-4,
        "batch_size": 4,
        "precision": native_precision(),
        "gradient_checkpointing": accelerated,
        "rank": 16,
    }


def native_precision() -> str:
    """bf16 where the device computes in it, fp32 elsewhere."""
    return "bf16" if device_type() in DEVICES_WITH_BF16 else "fp32"


def describe_settings(config: LoopConfig) -> str:
    """The settings that a base may have its own of, as they are in a resolved config."""
    names = [name for name in (*EMBEDDED_SETTINGS, "alpha") if hasattr(config, name) and name != "class_noun"]
    return ", ".join(f"{name.replace('_', ' ')} {format_setting(getattr(config, name))}" for name in names)


def format_setting(value: Any) -> str:
    """A value as the command line has it."""
    if value is None:
        return "the same"
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value).lower()
