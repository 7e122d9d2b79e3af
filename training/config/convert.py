"""Configurations of other trainers as ours: kohya's sd-scripts (toml), ai-toolkit (yaml), OneTrainer and SimpleTuner (json).

A table for each tool says which setting is which of ours, and how its value is written. Every setting that is not carried over is named.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from ...toolkit.core.errors import UserError
from ...toolkit.core.texts import read_text
from ...toolkit.core.yaml_text import parse_yaml
from .yaml_file import from_yaml_text

Setting = tuple[str, Callable[[Any], Any]]  # our field, and its value from theirs

OPTIMIZERS = {
    "adamw": "AdamW", "adamw8bit": "AdamW8bit", "lion8bit": "Lion8bit", "prodigy": "Prodigy", "adafactor": "Adafactor",
    "adamwschedulefree": "AdamWScheduleFree", "adam": "Adam", "sgd": "SGD", "adamw_bf16": "AdamW", "automagic": "",
}  # fmt: skip
PRECISIONS = {
    "no": "fp32", "fp32": "fp32", "float32": "fp32", "float_32": "fp32", "bf16": "bf16", "bfloat16": "bf16", "bfloat_16": "bf16",
    "fp16": "fp16", "float16": "fp16", "float_16": "fp16",
}  # fmt: skip


class NotCarriedOver(ValueError):
    """A value that has no counterpart here; the text says why."""


def same(value: Any) -> Any:
    """The value as it is."""
    return value


def number(value: Any) -> float:
    """A finite number, also where it is a text."""
    if not isfinite(found := float(value)):
        raise ValueError(f"{value} is not finite")
    return found


def whole(value: Any) -> int:
    """A whole number, also where it is a text."""
    return int(number(value))


def optimizer(value: Any) -> str:
    """An optimizer by the name that we have for it."""
    name = OPTIMIZERS.get(str(value).lower().removeprefix("optimizer."), "")
    if not name:
        raise NotCarriedOver("no such optimizer here")
    return name


def precision(value: Any) -> str:
    """A dtype by our name."""
    if str(value).lower() not in PRECISIONS:
        raise NotCarriedOver("no such dtype here")
    return PRECISIONS[str(value).lower()]


def side(value: Any) -> int:
    """One side in pixels from 1024 or "1024,1024"; of a width and a height, which mean an area, the nearest square's."""
    sides = [whole(one) for one in (value if isinstance(value, list) else str(value).replace("x", ",").split(","))]
    return sides[0] if len(set(sides)) == 1 else round(math.sqrt(math.prod(sides)) / 64) * 64


def sides(value: Any) -> tuple[int, ...]:
    """The sides in pixels at which each image is trained, the largest first, from 1024, [512, 1024] or "512, 1024"."""
    found = value if isinstance(value, list) else str(value).split(",")
    return tuple(sorted({whole(one) for one in found}, reverse=True))


def scheduler(value: Any) -> str:
    """A learning rate schedule by diffusers' name."""
    name = str(value).lower()
    return "constant" if name == "adafactor" else name


def quantization(value: Any) -> str:
    """Whether the base is quantised."""
    return "fp8" if value in (True, "true", "True") else "none"


def one_file(value: Any) -> tuple[str, ...]:
    """A file among several."""
    return (str(value),)


def texts(value: Any) -> tuple[str, ...]:
    """One prompt or several; their mark of the trigger word becomes ours."""
    prompts = value if isinstance(value, list) else [value]
    found = [one.get("prompt", "") if isinstance(one, dict) else str(one) for one in prompts]
    return tuple(text.replace("[trigger]", "{token}") for text in found if text)


KOHYA: dict[str, Setting] = {
    **{name: ("text_encoder", one_file) for name in ("clip_l", "clip_g", "t5xxl", "qwen3", "gemma2", "text_encoder")},
    "dit": ("base", str), "vae": ("vae", str), "ae": ("vae", str), "pretrained_model_name_or_path": ("base", str), 
    "train_data_dir": ("images", str), "output_dir": ("out", str),
    "max_train_steps": ("steps", whole), "train_batch_size": ("batch_size", whole),
    "gradient_accumulation_steps": ("gradient_accumulation", whole), "learning_rate": ("learning_rate", number),
    "unet_lr": ("learning_rate", number), "text_encoder_lr": ("text_learning_rate", number), "network_dim": ("rank", whole),
    "network_alpha": ("alpha", number), "network_dropout": ("dropout", number), "resolution": ("resolution", side),
    "lr_scheduler": ("lr_scheduler", scheduler), "lr_warmup_steps": ("lr_warmup_steps", whole),
    "optimizer_type": ("optimizer", optimizer), "mixed_precision": ("precision", precision),
    "gradient_checkpointing": ("gradient_checkpointing", bool), "seed": ("seed", whole),
    "min_snr_gamma": ("min_snr_gamma", number), "noise_offset": ("noise_offset", number),
    "prior_loss_weight": ("prior_weight", number), "reg_data_dir": ("prior_folder", str),
    "caption_dropout_rate": ("caption_dropout", number), "flip_aug": ("flip", bool), "max_grad_norm": ("max_grad_norm", number),
    "save_every_n_steps": ("checkpoint_every", whole), "sample_every_n_steps": ("preview_every", whole),
    "discrete_flow_shift": ("timestep_shift", number), "log_with": ("tracker", same),
    "enable_bucket": ("crop", lambda on: "bucket" if on else "center"),
    "network_train_unet_only": ("train_text_encoder", lambda only: not only),
    "shuffle_caption": ("caption_orders", lambda on: 4 if on else 0), "debiased_estimation_loss": ("debiased", bool),
    "blocks_to_swap": ("blocks_to_swap", whole),
}  # fmt: skip
AI_TOOLKIT: dict[str, Setting] = {
    "model.name_or_path": ("base", str), "model.quantize": ("quantize", quantization), "datasets.folder_path": ("images", str),
    "model.assistant_lora_path": ("training_adapter", str),
    "datasets.resolution": ("resolution", sides), "datasets.caption_dropout_rate": ("caption_dropout", number),
    "datasets.mask_path": ("masks", str), "datasets.flip_x": ("flip", bool), "trigger_word": ("token", str),
    "network.linear": ("rank", whole), "network.linear_alpha": ("alpha", number), "network.type": ("adapter", same),
    "save.save_every": ("checkpoint_every", whole), "train.batch_size": ("batch_size", whole), "train.steps": ("steps", whole),
    "train.gradient_accumulation_steps": ("gradient_accumulation", whole), "train.lr": ("learning_rate", number),
    "train.gradient_accumulation": ("gradient_accumulation", whole), "train.optimizer": ("optimizer", optimizer),
    "train.train_text_encoder": ("train_text_encoder", bool), "train.gradient_checkpointing": ("gradient_checkpointing", bool),
    "train.dtype": ("precision", precision), "train.lr_scheduler": ("lr_scheduler", scheduler),
    "train.optimizer_params.weight_decay": ("weight_decay", number), "train.min_snr_gamma": ("min_snr_gamma", number),
    "train.ema_config.ema_decay": ("ema_decay", number), "train.max_grad_norm": ("max_grad_norm", number),
    "sample.sample_every": ("preview_every", whole), "sample.prompts": ("preview_prompts", texts),
    "sample.samples": ("preview_prompts", texts), "sample.guidance_scale": ("guidance_scale", number),
    "sample.sample_steps": ("preview_steps", whole), "sample.seed": ("seed", whole), "training_folder": ("out", str),
}  # fmt: skip
ONETRAINER: dict[str, Setting] = {
    "base_model_name": ("base", str), "concepts.path": ("images", str),
    "output_model_destination": ("out", lambda v: str(Path(v).with_suffix(""))),
    "learning_rate": ("learning_rate", number), "lora_rank": ("rank", whole), "lora_alpha": ("alpha", number),
    "batch_size": ("batch_size", whole), "gradient_accumulation_steps": ("gradient_accumulation", whole),
    "optimizer.optimizer": ("optimizer", optimizer), "optimizer.weight_decay": ("weight_decay", number),
    "learning_rate_scheduler": ("lr_scheduler", scheduler), "learning_rate_warmup_steps": ("lr_warmup_steps", whole),
    "resolution": ("resolution", sides), "train_dtype": ("precision", precision), "text_encoder.train": ("train_text_encoder", bool),
    "gradient_checkpointing": ("gradient_checkpointing", lambda v: str(v).lower() not in ("off", "false")),
    "text_encoder.learning_rate": ("text_learning_rate", number), "seed": ("seed", whole), "clip_grad_norm": ("max_grad_norm", number),
    "aspect_ratio_bucketing": ("crop", lambda on: "bucket" if on else "center"), "dropout_probability": ("dropout", number),
    "timestep_shift": ("timestep_shift", number), "offset_noise_weight": ("noise_offset", number),
}  # fmt: skip
SIMPLETUNER: dict[str, Setting] = {
    "pretrained_model_name_or_path": ("base", str), "instance_data_dir": ("images", str), "output_dir": ("out", str),
    "max_train_steps": ("steps", whole), "train_batch_size": ("batch_size", whole),
    "gradient_accumulation_steps": ("gradient_accumulation", whole), "learning_rate": ("learning_rate", number),
    "lora_rank": ("rank", whole), "lora_alpha": ("alpha", number), "optimizer": ("optimizer", optimizer),
    "lr_scheduler": ("lr_scheduler", scheduler), "lr_warmup_steps": ("lr_warmup_steps", whole),
    "mixed_precision": ("precision", precision), "gradient_checkpointing": ("gradient_checkpointing", bool), "seed": ("seed", whole),
    "resolution": ("resolution", side), "validation_prompt": ("preview_prompts", texts), "validation_steps": ("preview_every", whole),
    "validation_step_interval": ("preview_every", whole), "validation_guidance": ("guidance_scale", number),
    "validation_num_inference_steps": ("preview_steps", whole), "checkpointing_steps": ("checkpoint_every", whole),
    "checkpoint_step_interval": ("checkpoint_every", whole), "flow_schedule_shift": ("timestep_shift", number),
    "caption_dropout_probability": ("caption_dropout", number), "max_grad_norm": ("max_grad_norm", number),
    "snr_gamma": ("min_snr_gamma", number), "noise_offset": ("noise_offset", number), "report_to": ("tracker", same),
}  # fmt: skip
TOOLS = {"kohya": KOHYA, "ai-toolkit": AI_TOOLKIT, "OneTrainer": ONETRAINER, "SimpleTuner": SIMPLETUNER}


@dataclass
class Converted:
    """A configuration of another trainer as ours."""

    tool: str
    values: dict[str, Any] = field(default_factory=dict)
    """Our settings."""
    left_out: list[str] = field(default_factory=list)
    """Their settings that were not carried over, with the reason."""

    def yaml(self) -> str:
        """The YAML that `--config` takes."""
        import yaml

        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in self.values.items()}
        return yaml.safe_dump({"method": "subject"} | plain, sort_keys=False, allow_unicode=True)


def convert_config(file: Path) -> Converted:
    """Reads a configuration of another trainer.

    Raises:
        UserError: for a file that cannot be read, or is of no trainer that is known.
    """
    found = read_settings(file)
    tool, flat = recognise(found, file)
    converted = Converted(tool)
    for key, value in flat:
        carry_over(converted, key, value)
    if (
        converted.values.get("prior_folder") is None and tool == "kohya"
    ):  # kohya writes the weight even where there are no class images
        converted.values.pop("prior_weight", None)
    from_yaml_text(converted.yaml(), str(file))  # what came of it is one of ours
    return converted


def carry_over(converted: Converted, key: str, value: Any) -> None:
    """Adds one setting, or names it."""
    if value is None or value == "" or value == {} or value == []:
        return
    setting = TOOLS[converted.tool].get(key)
    if setting is None:
        converted.left_out.append(f"{key}: {short(value)}")
        return
    name, convert = setting
    try:
        own = convert(value)
    except (NotCarriedOver, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        reason = str(error) if isinstance(error, NotCarriedOver) else "not a value that is understood"
        converted.left_out.append(f"{key}: {short(value)} ({reason})")
        return
    if name == "resolution" and isinstance(own, tuple):
        own, *more = own
        if more:
            converted.values["extra_resolutions"] = tuple(more)
    if name == "text_encoder":
        own = (*converted.values.pop(name, ()), *own)
    if converted.values.setdefault(name, own) != own:
        converted.left_out.append(f"{key}: {short(value)} ({name} is {short(converted.values[name])} already)")


def short(value: Any) -> str:
    """A value in a few words."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) < 60 else f"{text[:57]}..."


def read_settings(file: Path) -> dict[str, Any]:
    """The file as nested settings."""
    try:
        text = read_text(file)
        if file.suffix == ".toml":
            found: Any = tomllib.loads(text)
        else:
            found = json.loads(text) if file.suffix == ".json" else parse_yaml(text)
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror}.") from error
    except UserError as error:
        raise UserError(f"{file} {error}.") from error
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is not valid {file.suffix[1:] or 'YAML'}: {' '.join(str(error).split())[:120]}."
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no settings.")
    return found


def recognise(found: dict[str, Any], file: Path) -> tuple[str, list[tuple[str, Any]]]:
    """Which tool wrote the settings, and the settings by their names, those of sections as section.name.

    Raises:
        UserError: when it is none that is known.
    """
    process = (found.get("config") or {}).get("process") if isinstance(found.get("config"), dict) else None
    if isinstance(process, list) and process and isinstance(process[0], dict):
        return "ai-toolkit", [*flatten(process[0]), *((f"process {n}", more) for n, more in enumerate(process[1:], 2))]
    bare = {key.removeprefix("--"): value for key, value in found.items()}
    if "base_model_name" in bare or "training_method" in bare:
        return "OneTrainer", list(flatten(bare))
    if "model_family" in bare or "data_backend_config" in bare or any(key.startswith("--") for key in found):
        return "SimpleTuner", list(flatten(bare))
    flat = [(key.rpartition(".")[2], value) for key, value in flatten(bare)]
    if any(key in ("network_module", "network_dim", "train_data_dir") for key, _ in flat):
        return "kohya", flat
    raise UserError(
        f"{file} is no configuration that is known: of kohya's sd-scripts (toml), ai-toolkit (yaml), OneTrainer or SimpleTuner (json)."
    )


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings of all sections, as section.name; of lists of sections the first, the others as they are."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flatten(value, f"{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict) and key in ("datasets", "concepts"):
            yield from flatten(value[0], f"{name}.")
            yield from ((f"{name} {number}", more) for number, more in enumerate(value[1:], 2))
        else:
            yield name, value
