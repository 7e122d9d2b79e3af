"""The scheduler that images are made with: the base's own, or another of diffusers' that works by the same formulation."""

from __future__ import annotations

import inspect
from typing import Any

from ..toolkit.core.errors import UserError
from ..toolkit.diffusion.model import DiffusionModel

LEVELS_BY_SCHEDULER = ("StableDiffusion3Pipeline", "SanaPipeline")
"""Stock pipelines of flow models that leave the noise levels to the scheduler; the others give it their own."""


def scheduler_class(name: str) -> Any:
    """A scheduler class of diffusers.

    Raises:
        UserError: for any other name.
    """
    import diffusers

    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise UserError(f"--scheduler {name} is not a scheduler of diffusers, such as DDIMScheduler.")
    return found


def make_scheduler(base: DiffusionModel, name: str) -> Any:
    """The scheduler of this class with the settings of the base's own; name '' for the base's own.

    Raises:
        UserError: for a class that is for models of another formulation, whose images would be noise.
    """
    own = base.sampling_scheduler()
    if not name or type(own).__name__ == name:
        return own
    kind = scheduler_class(name)
    taken = inspect.signature(kind.__init__).parameters
    if base.is_flow:
        gives_levels = base.index["_class_name"] not in LEVELS_BY_SCHEDULER
        takes_levels = "sigmas" in inspect.signature(kind.set_timesteps).parameters
        fits = name.startswith("FlowMatch") and (takes_levels or not gives_levels)
        what, cure = "learned by flow matching", "FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler"
    else:
        fits = {"beta_schedule", "prediction_type"} <= taken.keys()
        what, cure = "predicts noise", "DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler"
    if not fits:
        raise UserError(
            f"--scheduler {name} does not work with {base.title}, which {what}: take {cure}, or leave it out for the base's own."
        )
    shift = own.config.get("flow_shift")
    return kind.from_config(own.config, **({"shift": shift} if shift is not None and "shift" in taken else {}))
