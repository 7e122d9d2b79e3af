"""`rankfold demo`: five images in, an adapter out, on the embedded models, without a network."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from ...toolkit.core.errors import UserError
from ...toolkit.core.run_folder import Run
from ...training.embedded.demo import DEMO_SETTINGS
from .options import OverwriteOption, parse_options
from .outcome import print_outcome

if TYPE_CHECKING:
    from ...training.config.subject import SubjectConfig

DEMO_CREATURE = 2_000_004  # beyond TRAINING_CREATURES: no embedded model has seen it


@dataclass(frozen=True, kw_only=True)
class DemoConfig(OverwriteOption):
    """Teaches the embedded model a new creature and shows before and after."""

    base: Literal["tiny", "tiny-dit"] = "tiny"
    """Embedded model: the UNet, or the flow transformer."""
    out: Path = Path("runs/demo")
    """Run folder; the images and numbers lie there."""
    steps: Annotated[int, Ge(1)] = 300
    """Training steps."""
    adapter: str = "moslora"
    """Adapter method."""
    threads: Annotated[int, Ge(0)] = 0
    """Torch threads; 0 takes as many as find a free core."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of training and images."""


def demo(argv: list[str]) -> None:
    config = parse_options(DemoConfig, argv, "demo")
    run_demo(config)


def run_demo(config: DemoConfig) -> dict[str, float]:
    """Trains, measures, exports and prints; returns the figures, none when the training was stopped.

    A demo that is in the folder is redone; any other run there is left alone, unless the config says to overwrite it.
    """
    import torch

    if config.threads:
        torch.set_num_threads(config.threads)
    from ...pipelines.export import export_adapter
    from ...pipelines.proof import print_proof
    from ...training.embedded.demo import measure_before_and_after
    from ...training.launch.start import train

    start = time.time()
    settings = demo_config(config)
    overwrite = config.overwrite or is_demo(Run(config.out))
    if overwrite and not config.overwrite:
        print(f"{config.out} holds a demo already, which this one replaces.")
    print(f"Teaching the embedded model the creature in {settings.images} (five images, {config.steps} steps)")
    run = train(settings, overwrite=overwrite)
    if run.status()["state"] != "done":
        print_outcome(run.folder)
        return {}
    trained = time.time()
    figures = measure_before_and_after(run, DEMO_CREATURE, seed=config.seed)
    print(f"\npictures        {run.folder / 'before_after.png'}  (row 1: the five images, 2: before, 3: after)")
    print(
        f"likeness        before {figures['clip_i_before']:.3f}  after {figures['clip_i_after']:.3f}  real {figures['clip_i_real']:.3f}"
    )
    print(
        f"                {figures['closed']:.0%} of the distance to the real images closed (CLIP-I, embedded open_clip)"
    )
    print(f"scene as asked  before {figures['scene_before']:.0%}  after {figures['scene_after']:.0%}")
    print(f"place as asked  before {figures['place_before']:.0%}  after {figures['place_after']:.0%}")
    print("\nexport")
    out = run.folder / "export"
    print_proof(export_adapter(run.adapter, settings.base, "diffusers", out, prompt=settings.prompt, max_error=0.05))
    print(f"\ntrained in {trained - start:.0f} s, everything in {time.time() - start:.0f} s")
    print(f'Next: rankfold sample --run {run.folder} --prompt "a large sks creature in the snow" --n 8 --grid')
    print(
        "      rankfold train subject --images YOUR_FOLDER --base stable-diffusion-v1-5/stable-diffusion-v1-5 --class-noun dog"
    )
    return figures


def demo_config(config: DemoConfig) -> SubjectConfig:
    """The run of a demo, with all its settings."""
    from ...toolkit.core.paths import assets_folder
    from ...training.config.defaults import resolve_defaults
    from ...training.config.subject import SubjectConfig

    own = {name: getattr(config, name) for name in DEMO_FIELDS}
    images = assets_folder() / "demo" / "creature"
    return resolve_defaults(SubjectConfig(images=images, **own, **DEMO_SETTINGS[config.base]))


def is_demo(run: Run) -> bool:
    """Whether a folder holds a run that `rankfold demo` makes, whatever its options were."""
    from ...training.config.yaml_file import from_yaml

    try:
        found = from_yaml(run.config_file)
        own = DemoConfig(**{name: getattr(found, name) for name in DEMO_FIELDS})
        return run.is_run() and found == demo_config(own)
    except (UserError, AttributeError, KeyError):
        return False


DEMO_FIELDS = (
    "base",
    "out",
    "steps",
    "adapter",
    "threads",
    "seed",
)  # of the run's settings, those that are options of the demo
