"""Whether a base noises, predicts and normalises latents in a way that its family's training and stock pipeline both know.

A pipeline's class says only which parts there are. A base of the same class may have been trained with another schedule (EDM, as
Playground 2.5; flow matching on SDXL), another prediction, or latents that are normalised otherwise.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers

from ..core.errors import UserError
from .model import DiffusionModel

PREDICTIONS = ("epsilon", "v_prediction")  # of models with discrete timesteps
LATENT_STATISTICS = ("shift_factor", "latents_mean", "latents_std")
"""Fields of an autoencoder's config that latents are normalised by, beside scaling_factor."""


def check_formulation(family: type[DiffusionModel], folder: Path) -> None:
    """Refuses a base whose scheduler, autoencoder or denoiser is not what its family is trained as.

    Raises:
        UserError: naming the file and field.
    """
    check_scheduler(family, folder)
    check_autoencoder(family, folder)
    check_denoiser(family, folder)


def read_config(folder: Path, part: str, name: str = "config.json") -> dict[str, Any]:
    """A part's config; raises UserError where it is missing or not JSON."""
    file = folder / part / name
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"--base {folder} is incomplete: {part}/{name} is missing.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--base {folder}: {part}/{name} is not JSON.") from error
    if not isinstance(found, dict):
        raise UserError(f"--base {folder}: {part}/{name} is not a config.")
    return found


def check_scheduler(family: type[DiffusionModel], folder: Path) -> None:
    """Raises UserError for a schedule of another kind than the family's, or a prediction that is not known."""
    config = read_config(folder, "scheduler", "scheduler_config.json")
    name, prediction = str(config.get("_class_name")), str(config.get("prediction_type", "epsilon"))
    kind = getattr(diffusers, name, None)
    if not isinstance(kind, type):
        raise UserError(f"--base {folder}: scheduler_config.json names {name}, which the installed diffusers has not.")
    settings = inspect.signature(kind.__init__).parameters
    flow = "FlowMatch" in name or bool(config.get("use_flow_sigmas")) or prediction == "flow_prediction"
    if family.is_flow and not flow:
        raise UserError(
            f"--base {folder} has a {name}, but a {family.pipelines[0]} is trained by flow matching: its scheduler must be a "
            "FlowMatchEulerDiscreteScheduler, or set use_flow_sigmas."
        )
    if family.is_flow:
        return
    if flow or "beta_schedule" not in settings:
        what = "flow matching" if flow else f"the schedule of {name}"
        raise UserError(
            f"--base {folder} was made with {what}, and a {family.pipelines[0]} is trained here with discrete timesteps (as by DDPM) only: "
            "its adapter would learn something else than the base does. Take a base with such a scheduler."
        )
    if prediction not in PREDICTIONS:
        raise UserError(
            f"--base {folder} predicts '{prediction}' (scheduler_config.json); {' and '.join(PREDICTIONS)} can be trained."
        )
    try:
        diffusers.DDPMScheduler.from_config(config)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise UserError(
            f"--base {folder}: scheduler_config.json has a schedule that cannot be trained with ({str(error).strip()[:100]})."
        ) from error


def check_autoencoder(family: type[DiffusionModel], folder: Path) -> None:
    """Raises UserError for an autoencoder of another class, or latents that the stock pipeline would not decode as they are encoded."""
    config = read_config(folder, "vae")
    name = str(config.get("_class_name"))
    if name not in family.autoencoders:
        raise UserError(
            f"--base {folder} has an autoencoder {name}; a {family.pipelines[0]} is trained with {' or '.join(family.autoencoders)}: put "
            "that one into vae/."
        )
    unknown = [field for field in LATENT_STATISTICS if config.get(field) and field not in family.latent_statistics]
    if unknown:
        raise UserError(
            f"--base {folder}: vae/config.json sets {' and '.join(unknown)}, which the stock {family.pipelines[0]} does not decode by: an "
            "adapter would learn shifted latents. Remove it from the config, or take another base."
        )
    if "shift_factor" in family.latent_statistics and config.get("shift_factor") is None:
        raise UserError(
            f"--base {folder}: vae/config.json has no shift_factor, without which a {family.pipelines[0]} decodes nothing: copy "
            "the value from the original base."
        )
    if (config.get("latents_mean") is None) != (config.get("latents_std") is None):
        raise UserError(f"--base {folder}: vae/config.json has only one of latents_mean and latents_std: give both.")


def check_denoiser(family: type[DiffusionModel], folder: Path) -> None:
    """Raises UserError for a UNet that takes more than noisy latents, as those for inpainting and editing do."""
    if family.denoiser_name != "unet":
        return
    takes, has = read_config(folder, "unet").get("in_channels"), read_config(folder, "vae").get("latent_channels")
    if takes is not None and has is not None and takes != has:
        raise UserError(
            f"--base {folder}: its UNet takes {takes} channels and its autoencoder makes {has}, as in models for inpainting or "
            "editing, which cannot be trained. Take the text-to-image base."
        )
