"""`rankfold sample`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from ...toolkit.core.errors import UserError
from .options import BaseFileOptions, parse_options


@dataclass(frozen=True)
class SampleOptions(BaseFileOptions):
    run: Path | None = None
    """Run folder whose adapter is used."""
    adapters: tuple[str, ...] = ()
    """More adapters: folders, runs, LoRA files of any origin, or names in the library."""
    ignore_unused: bool = False
    """Use a LoRA file although it holds tensors that this base has no place for; they are named and left out."""
    strength: tuple[float, ...] = ()
    """One number for all adapters, or one for each; 1 is as trained."""
    regions: tuple[str, ...] = ()
    """One for each adapter, as in 'left: a sks1 creature in the centre' 'right: a sks2 creature in the centre'."""
    subjects: tuple[str, ...] = ()
    """Words and adapter of each, as in 'sks1 creature' A 'sks2 creature' B, from the left. --prompt says {subjects}, or their words."""
    reference: tuple[Path, ...] = ()
    """Images that it is made from, for bases that take them (FLUX.1 Kontext one, FLUX.2 and Qwen-Image-Edit several)."""
    image: Path | None = None
    """An image that it starts from, in whose shape it is unless --height is given, for bases whose stock pipelines do so."""
    image_strength: Annotated[float, Gt(0), Le(1)] | None = None
    """How much noise is put on --image: little keeps it, 1 leaves nothing of it; unset means 0.6. --steps times this are taken."""
    mask: Path | None = None
    """An image as large as --image, white where it is made anew and black where it stays."""
    base: str | None = None
    """Base model; unset means the run's (its --preview-base, if it has one), or 'tiny'."""
    prompt: str | None = None
    """What to show; unset means the run's own prompt."""
    negative_prompt: str = ""
    """What to steer away from."""
    n: Annotated[int, Ge(1)] = 1
    """Number of images, from seeds seed, seed + 1, ..."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the first image."""
    steps: Annotated[int | None, Ge(1)] = None
    """Denoising steps; unset means 25, or as many as the previews of a run on a distilled base (--guidance-scale 1)."""
    guidance_scale: float | None = None
    """Guidance scale; 1 turns it off (Z-Image, Krea 2: 0); unset means the run's, or as the base's stock pipeline has it."""
    scheduler: str = ""
    """A scheduler class of diffusers; unset means the one that suits the base's family."""
    width: Annotated[int, Ge(0), Le(16384)] = 0
    """Width of the images in pixels; 0 means the base model's own."""
    height: Annotated[int, Ge(0), Le(16384)] = 0
    """Their height in pixels; 0 means as high as wide."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """dtype; unset means the one that the adapters were trained in; fp32 where they differ or do not say, and on a CPU."""
    out: Path = Path("samples")
    """Folder for the images."""
    grid: bool = False
    """Also write all images on one sheet."""
    again: Path | None = field(default=None)
    """Repeat the image of this PNG exactly (also spelled --from)."""


def sample(argv: list[str]) -> None:
    argv = ["--again" + word[len("--from") :] if word.split("=")[0] == "--from" else word for word in argv]
    options = parse_options(SampleOptions, argv, "sample")
    from ...pipelines.generate import generate, image_grid, read_recipe, repeat, save_image
    from ...pipelines.unused import unused_in_recipe

    if options.n < 1:
        raise UserError(f"--n must be at least 1, not {options.n}.")
    if options.again:
        check_repetition(argv)
        made = [repeat(read_recipe(options.again))]
    else:
        recipe = sampling_recipe(options)
        for note in unused_in_recipe(recipe):
            print(f"rankfold: {note}", file=sys.stderr)
        made = generate(recipe, options.n)
    options.out.mkdir(parents=True, exist_ok=True)
    for image, own in made:
        path = options.out / f"{own.seed:06d}.png"
        save_image(path, image, own)
        print(path)
    if options.grid:
        sheet = image_grid([image for image, _ in made], columns=min(4, len(made)))
        save_image(options.out / "grid.png", sheet, made[0][1])
        print(options.out / "grid.png")


def check_repetition(argv: list[str]) -> None:
    """Raises UserError for options beside --from, which has them all from the image."""
    given = {word.split("=")[0].replace("_", "-") for word in argv if word.startswith("--")}
    if others := sorted(given - {"--again", "--out", "--grid", "--no-grid"}):
        raise UserError(
            f"--from makes the image of a PNG again, with all of its settings, so {', '.join(others)} would have no effect: leave "
            "it out, or give the settings without --from."
        )


def sampling_recipe(options: SampleOptions) -> Any:
    """The recipe that the options ask for."""
    from ...pipelines.generate import Recipe, adapter_precision
    from ...pipelines.regions import parse_region
    from ...pipelines.subjects import HERE, parse_subjects
    from ...toolkit.core.run_folder import Run
    from ...toolkit.formats.as_folder import check_adapter
    from ...training.config.defaults import drawing_defaults
    from ...training.config.yaml_file import from_yaml
    from ...training.runs.library import resolve

    if options.subjects and (options.adapters or options.run or options.regions):
        other = "--adapters" if options.adapters else "--run" if options.run else "--regions"
        raise UserError(
            f"--subjects says adapters and places by itself, so {other} beside it has no part: leave one of the two out."
        )
    words, sources = parse_subjects(options.subjects)
    adapters, base, prompt = (
        [str(resolve(text)) for text in (*options.adapters, *sources)],
        options.base,
        options.prompt,
    )
    config = None
    if options.run is not None:
        run = Run.open(options.run)
        config = from_yaml(run.config_file)
        adapters.insert(0, str(run.finished_adapter()))
        base, prompt = base or getattr(config, "drawing_base", config.base), prompt or config.prompt
    if options.image_strength and not options.image:
        raise UserError("--image-strength says how far an image is changed: give the image, too, by --image.")
    if options.prompt and options.regions:
        raise UserError("--prompt has no effect with --regions, each of which has a prompt of its own: leave it out.")
    if options.regions:
        prompt = ""
    if words:
        prompt = prompt or HERE
    if options.strength and not adapters:
        raise UserError("--strength says how strong adapters are: give one by --run or --adapters, or leave it out.")
    for path in adapters:
        check_adapter(Path(path))
    if prompt is None:
        raise UserError("--prompt is missing: say what the image should show.")
    steps, guidance_scale = drawing_defaults(base or "tiny", config)
    strengths = options.strength or (1.0,)
    if len(strengths) == 1:
        strengths *= len(adapters)
    return Recipe(
        prompt=prompt,
        base=base or "tiny",
        negative_prompt=options.negative_prompt,
        adapters=tuple(adapters),
        strengths=tuple(strengths),
        ignore_unused=options.ignore_unused,
        references=tuple(str(path.absolute()) for path in options.reference),
        image=str(options.image.absolute()) if options.image else "",
        image_strength=options.image_strength or Recipe.image_strength,
        mask=str(options.mask.absolute()) if options.mask else "",
        regions=tuple(parse_region(text) for text in options.regions),
        subjects=tuple(words),
        steps=options.steps or steps,
        guidance_scale=guidance_scale if options.guidance_scale is None else options.guidance_scale,
        scheduler=options.scheduler,
        width=options.width,
        height=options.height,
        precision=options.precision or adapter_precision(adapters),
        seed=options.seed,
    )
