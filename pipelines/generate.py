"""From a prompt, seeds and adapters to images that carry their own settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from pydantic import TypeAdapter, ValidationError

from ..toolkit.core.cache import file_hash
from ..toolkit.core.devices import check_precision, device_type
from ..toolkit.core.errors import UserError
from ..toolkit.core.files import write_png
from ..toolkit.core.out_of_memory import oom_context
from ..toolkit.core.paths import is_file
from ..toolkit.core.randomness import generator
from ..toolkit.core.setting_names import current_names
from ..toolkit.core.versions import check_versions
from ..toolkit.data.images import READ_ERRORS, image_size, load_rgb, open_image
from ..toolkit.diffusion.load import find_family, open_model, resolve_base
from ..toolkit.diffusion.model import DTYPES, DiffusionModel, PromptEmbeds
from ..toolkit.formats import native
from ..toolkit.formats.as_folder import adapter_folder, check_adapter
from ..toolkit.formats.locate import adapter_facts, adapter_path, content_hash
from .apart import subjects_apart
from .fuse import fuse_adapters
from .place import place_pipeline
from .regions import Region, denoise_by_region, denoises_by_region, region_masks
from .scheduler import make_scheduler, scheduler_class
from .start_image import (
    StartImage,
    check_start,
    check_start_of_base,
    load_start,
    start_kwargs,
    start_pipeline,
    start_size,
)
from .subjects import OwnPrompt, check_words, columns, draw_subjects, own_prompts
from .token_masks import SubjectAttention

TEXT_CHUNK = "rankfold"
OnStep = Callable[[Any, torch.Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides an image. A recipe read back from a PNG makes the same image again."""

    prompt: str
    base: str = "tiny"
    negative_prompt: str = ""
    adapters: tuple[str, ...] = ()
    """Adapter folders, run folders, or LoRA files of any origin."""
    strengths: tuple[float, ...] = ()
    """One for each adapter; 1 is as trained."""
    regions: tuple[Region, ...] = ()
    """One for each adapter: where it is at work, and with what prompt; then `prompt` is not used."""
    subjects: tuple[str, ...] = ()
    """One for each adapter: its words in `prompt`, where {subjects} stands for all of them; they stand side by side, from the left."""
    steps: int = 25
    guidance_scale: float = 4.0
    scheduler: str = ""
    """A scheduler class of diffusers; unset means the family's own choice."""
    width: int = 0
    """Width in pixels; 0 means the base model's own."""
    height: int = 0
    """Height in pixels; 0 means as high as wide."""
    precision: str = "fp32"
    seed: int = 0
    batch: tuple[int, int] | None = None
    """First seed and number of the images made together with this one: a batch of another size rounds differently."""
    references: tuple[str, ...] = ()
    """Images that it is made from, in the order of the family's stock pipeline."""
    image: str = ""
    """An image that it starts from, instead of noise alone; its shape is the image's where no height is given."""
    image_strength: float = 0.6
    """How much noise is put on that image: 1 leaves nothing of it."""
    mask: str = ""
    """An image, as large, that is white where that one is made anew; without it, it is made anew everywhere."""
    ignore_unused: bool = False
    """Whether a LoRA file may hold tensors that this base has no place for; otherwise it is refused."""
    hashes: tuple[str, ...] = ()
    """Content hash of each adapter, filled in when the image is made."""
    reference_hashes: tuple[str, ...] = ()
    """Content hash of each reference, likewise."""
    start_hashes: tuple[str, ...] = ()
    """Content hashes of image and mask, likewise."""

    @property
    def start_files(self) -> tuple[str, ...]:
        """Image and mask, as far as there are any."""
        return tuple(path for path in (self.image, self.mask) if path)


def denoise(
    pipe: Any,
    prompts: Sequence[str] | PromptEmbeds,
    *,
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    width: int,
    height: int = 0,
    negative: Sequence[str] | PromptEmbeds | None = None,
    output_type: str = "pil",
    on_step: OnStep | None = None,
    references: Sequence[Image.Image] = (),
    start: StartImage | None = None,
) -> Any:
    """Images from a stock pipeline, one per prompt (texts, or embeds (B, ...)), each from the noise of its own seed.

    width: pixels; also the height, where that is 0. on_step: called behind every denoising step with `pipe` and the latents
    (B, C, H, W); what it raises ends the images. references: images that all of them are made from. start: the image that all of them
    start from.
    """
    family = pipeline_family(pipe)
    if start is None:
        drawing, given = pipe, family.image_kwargs(references, width, height or width)
    else:
        drawing = start_pipeline(pipe, masked=start.mask is not None)
        given = start_kwargs(drawing, start, len(seeds))

    def on_step_end(drawing: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if on_step:
            on_step(pipe, family.spatial_latents(pipe, values["latents"], height or width, width))
        steps = getattr(drawing, "num_timesteps", len(drawing.scheduler.timesteps))
        if step == steps - 1:  # the autoencoder may be in another dtype than the denoiser
            values["latents"] = values["latents"].to(pipe.vae.dtype)
        return values

    with oom_context(f"drawing {len(seeds)} image{'s'[: len(seeds) > 1]} of {width} x {height or width} pixels"):
        return drawing(
            **family.call_kwargs(prompts, negative, guidance_scale),
            **family.text_kwargs(drawing),
            generator=[generator(seed, 101) for seed in seeds],
            num_inference_steps=steps,
            **given,
            output_type=output_type,
            callback_on_step_end=on_step_end,
        ).images


def pipeline_family(pipe: Any) -> type[DiffusionModel]:
    """The family of a stock pipeline.

    Raises:
        UserError: for a pipeline of no known family.
    """
    family = find_family(type(pipe).__name__)
    if family is None:
        raise UserError(f"A {type(pipe).__name__} belongs to no supported family.")
    return family


def native_resolution(pipe: Any) -> int:
    """Side of the images that a loaded pipeline's base was made for, pixels."""
    return open_model(pipe.name_or_path).native_resolution


@oom_context("loading the base")
def load_pipeline(recipe: Recipe) -> Any:
    """A stock pipeline with the recipe's adapters on it, at their strengths.

    Raises:
        UserError: for an unknown base, scheduler or adapter, or strengths that do not match the adapters.
    """
    import diffusers

    check_recipe(recipe)
    base = open_model(resolve_base(recipe.base), DTYPES[recipe.precision])
    base.check_side(recipe.width, "--width")
    base.check_side(recipe.height, "--height")
    base.check_steps(recipe.steps, "--steps")
    if recipe.references:
        base.check_references([image_size(Path(path)) for path in recipe.references])
    if recipe.image:
        check_start_of_base(base, masked=bool(recipe.mask))
    check_subjects_of_base(recipe, base)
    scheduler = make_scheduler(base, recipe.scheduler)
    dtypes = {"default": base.dtype, "vae": torch.float32 if recipe.precision == "fp16" else base.dtype}  # it overflows
    kind = getattr(diffusers, base.index["_class_name"])  # only its own class leaves out parts that it can do without
    pipe = kind.from_pretrained(base.path, dtype=dtypes, variant=base.pipeline_variant, **base.excluded_parts())
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    names = [f"adapter_{number}" for number in range(len(recipe.adapters))]
    ignore = recipe.ignore_unused
    folders = [
        adapter_folder(Path(path), pipe, ignore_unused=ignore) for path in recipe.adapters
    ]  # while it carries none
    for name, folder in zip(names, folders, strict=True):
        native.load_into_pipeline(pipe, folder, name)
    native.set_strengths(pipe, dict(zip(names, recipe.strengths, strict=True)))
    return place_pipeline(pipe)


def adapter_precision(adapters: Sequence[str]) -> str:
    """The dtype that the adapters say they were trained in, where all say the same; otherwise, and on a CPU, fp32.

    Less gains a CPU no time, and fp32 is what stock pipelines take by themselves, so that their images are these to the bit.
    """
    if device_type() == "cpu":
        return "fp32"
    said = {adapter_facts(adapter_path(Path(path))).precision or "fp32" for path in adapters}
    return said.pop() if len(said) == 1 and said <= DTYPES.keys() else "fp32"


def sampling_pipeline(recipe: Recipe) -> Any:
    """The same, with the adapters in the weights where that is exact; subjects and regions need them apart."""
    pipe = load_pipeline(recipe)
    return pipe if recipe.regions or recipe.subjects else fuse_adapters(pipe)


def drawing_pipeline(recipe: Recipe) -> Any:
    """The same, for a recipe that is drawn as it stands: with the references that its base needs."""
    check_given_images(recipe)
    open_model(resolve_base(recipe.base)).check_references([image_size(Path(path)) for path in recipe.references])
    return sampling_pipeline(recipe)


def check_recipe(recipe: Recipe) -> None:
    """Raises UserError for what can be seen to be wrong without loading a model."""
    check_versions()
    check_precision(recipe.precision, training=False)
    if recipe.steps < 1:
        raise UserError(f"--steps must be at least 1, not {recipe.steps}.")
    if len(recipe.strengths) != len(recipe.adapters):
        raise UserError(f"{len(recipe.adapters)} adapters need as many strengths, not {len(recipe.strengths)}.")
    if recipe.regions and len(recipe.regions) != len(recipe.adapters):
        raise UserError(f"{len(recipe.adapters)} adapters need as many regions, not {len(recipe.regions)}.")
    if recipe.subjects:
        check_subjects(recipe)
    if recipe.scheduler:
        scheduler_class(recipe.scheduler)
    for path in recipe.adapters:
        check_adapter(Path(path))
    check_given_images(recipe)


def check_subjects(recipe: Recipe) -> None:
    """Raises UserError for subjects that cannot be told apart, or whose words the prompt does not hold."""
    if recipe.regions:
        raise UserError("--subjects stand side by side and --regions says other places: leave one of the two out.")
    if len(recipe.subjects) != len(recipe.adapters):
        raise UserError(f"{len(recipe.adapters)} adapters need as many subjects, not {len(recipe.subjects)}.")
    check_words(recipe.subjects)
    own_prompts(recipe.prompt, recipe.subjects)


def check_subjects_of_base(recipe: Recipe, base: DiffusionModel) -> None:
    """Raises UserError for subjects or regions that this base cannot keep apart, at this size."""
    if not recipe.subjects and not recipe.regions:
        return
    if base.min_references:
        given = "--subjects" if recipe.subjects else "--regions"
        raise UserError(f"{given} does not work with {base.title}, which makes images from others: take another base.")
    width = recipe.width or base.native_resolution
    if recipe.subjects:
        columns(len(recipe.subjects), *image_tokens(base, width, recipe.height or width))


def image_tokens(base: DiffusionModel, width: int, height: int) -> tuple[int, int]:
    """Height and width, in tokens, of an image of so many pixels before the denoiser."""
    unit = base.latent_scale * base.patch_size
    return height // unit, width // unit


def check_given_images(recipe: Recipe) -> None:
    """Raises UserError for references, a start image or a mask that cannot be used, or not together, whatever the base."""
    places = "--regions" if recipe.regions else "--subjects"
    if recipe.references and (recipe.regions or recipe.subjects):
        raise UserError(f"--reference does not work with {places}: leave one of the two out.")
    if recipe.image and (recipe.references or recipe.regions or recipe.subjects):
        raise UserError(f"--image does not work with --reference or {places}: leave one of the two out.")
    for reference in recipe.references:
        if not is_file(Path(reference)):
            raise UserError(f"--reference {reference} does not exist.")
        load_rgb(Path(reference))
    check_start(recipe.image, recipe.mask, recipe.image_strength, recipe.steps)


def generate(
    recipe: Recipe, n: int = 1, *, pipe: Any = None, batch: int = 8, on_step: OnStep | None = None
) -> list[tuple[Image.Image, Recipe]]:
    """`n` images from seeds recipe.seed, recipe.seed + 1, ..., each with the recipe that repeats it. on_step: see `denoise`."""
    with oom_context("", lambda: memory_advice(recipe)):
        pipe = pipe or drawing_pipeline(recipe)
        most = pipeline_family(pipe).max_images_at_once
        made, batch = [], max(1, min(batch, most) // max(1, len(recipe.subjects)))  # each subject is a row of the batch
        for start in range(recipe.seed, recipe.seed + n, batch):
            made += generate_batch(recipe, (start, min(batch, recipe.seed + n - start)), pipe, on_step)
        return made


def memory_advice(recipe: Recipe) -> str:
    """What takes less memory, for who asks for images."""
    number_format = "--precision bf16, " if recipe.precision == "fp32" else ""
    cpu = "" if device_type() == "cpu" else " With ACCELERATE_USE_CPU=true before the command it runs in main memory."
    return f"Take {number_format}fewer images at once (--n), or a smaller --width.{cpu}"


def repeat(recipe: Recipe, *, pipe: Any = None) -> tuple[Image.Image, Recipe]:
    """The image that this recipe was written into, equal to the byte."""
    batch = recipe.batch or (recipe.seed, 1)
    return generate_batch(recipe, batch, pipe or drawing_pipeline(recipe))[recipe.seed - batch[0]]


def generate_batch(
    recipe: Recipe, batch: tuple[int, int], pipe: Any, on_step: OnStep | None = None
) -> list[tuple[Image.Image, Recipe]]:
    """Images of the seeds batch[0], batch[0] + 1, ... (batch[1] of them), made in one go."""
    width = recipe.width or native_resolution(pipe)
    hashes = tuple(content_hash(adapter_path(Path(path))) for path in recipe.adapters)
    seeds = list(range(batch[0], sum(batch)))
    n, negative, guidance = len(seeds), recipe.negative_prompt, recipe.guidance_scale
    height = recipe.height or width
    start = None
    check_given_images(recipe)  # the pipeline may have been loaded for another recipe
    if recipe.image:
        base = open_model(pipe.name_or_path)
        check_start_of_base(base, masked=bool(recipe.mask))
        height = recipe.height or start_size(recipe.image, width, base.latent_scale * base.patch_size)
        start = load_start(recipe.image, recipe.mask, recipe.image_strength, (width, height))
    common: Any = {
        "seeds": seeds, "steps": recipe.steps, "guidance_scale": guidance, "width": width, "height": height,
        "output_type": "np", "on_step": on_step, "references": load_references(recipe, pipe), "start": start,
    }  # fmt: skip
    if recipe.regions and denoises_by_region(type(pipe).__name__):
        active = [{f"adapter_{number}": strength} for number, strength in enumerate(recipe.strengths)]
        size = (height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
        with denoise_by_region(
            pipe, recipe.regions, active, negative=negative, guided=guidance > 1, size=size
        ) as states:
            wanted, unwanted = (value.expand(n, -1, -1) for value in states)
            images = denoise(pipe, {"prompt_embeds": wanted}, negative={"prompt_embeds": unwanted}, **common)
    elif recipe.regions or recipe.subjects:
        images = denoise_subjects(pipe, recipe, n, **common)
    else:
        images = denoise(pipe, [recipe.prompt] * n, negative=[negative] * n, **common)
    check_finite(images)
    images = pipe.image_processor.numpy_to_pil(images)
    whole = replace(
        recipe,
        batch=batch,
        width=width,
        height=height,
        hashes=hashes,
        scheduler=type(pipe.scheduler).__name__,
        reference_hashes=tuple(file_hash(Path(path)) for path in recipe.references),
        start_hashes=tuple(file_hash(Path(path)) for path in recipe.start_files),
    )
    return [(image, replace(whole, seed=seed)) for image, seed in zip(images, seeds, strict=True)]


def denoise_subjects(pipe: Any, recipe: Recipe, n: int, **common: Any) -> Any:
    """`n` images with several subjects, by masks of tokens. common: for `denoise`."""
    family, base = pipeline_family(pipe), open_model(pipe.name_or_path)
    size, count = image_tokens(base, common["width"], common["height"]), len(recipe.adapters)
    if recipe.subjects:
        prompts = own_prompts(recipe.prompt, recipe.subjects)
        places = columns(count, *size).expand(n, -1, -1, -1)
    else:
        prompts = [prompt for prompt, *_ in recipe.regions]
        places = region_masks(recipe.regions, *size).transpose(0, 1).expand(n, -1, -1, -1)
    names = [f"adapter_{number}" for number in range(count)]
    prompt, negative = [OwnPrompt(recipe.prompt)] * n, [recipe.negative_prompt] * n
    with draw_subjects(
        pipe, family, prompts, places, adapters=names, strengths=recipe.strengths, sources=recipe.adapters
    ) as masked:
        if not recipe.subjects or count == 1:
            with SubjectAttention(masked):
                return denoise(pipe, prompt, negative=negative, **common)
        with subjects_apart(getattr(pipe, family.denoiser_name), masked, recipe.steps) as count_step:

            def on_step(pipe: Any, latents: torch.Tensor) -> None:
                count_step()
                if common["on_step"]:
                    common["on_step"](pipe, latents)

            return denoise(pipe, prompt, negative=negative, **(common | {"on_step": on_step}))


def load_references(recipe: Recipe, pipe: Any) -> list[Image.Image]:
    """The recipe's references, turned as their EXIF says, at their own size cut to what makes whole tokens where the pipeline does not."""
    base = open_model(pipe.name_or_path) if recipe.references else None
    found = []
    for path in recipe.references:
        image = load_rgb(Path(path))
        if base.own_reference_size(image.size):  # type: ignore[union-attr]
            found.append(image)
            continue
        unit = base.latent_scale * base.patch_size  # type: ignore[union-attr]
        size = (max(unit, image.width // unit * unit), max(unit, image.height // unit * unit))
        found.append(ImageOps.fit(image, size, Image.Resampling.LANCZOS))
    return found


def max_batch_size(width: int) -> int:
    """How many images of this side are drawn together: as many as take the memory of four of 1024 pixels, eight at most."""
    return max(1, min(8, 4 * 1024**2 // width**2))


def check_finite(images: np.ndarray) -> None:
    """Raises UserError for images (B, H, W, 3) that are not numbers; as files they would be black."""
    if not np.isfinite(images).all():
        raise UserError(
            "The images came out as NaN or infinity: take --precision fp32 (or bf16), or less --strength; an "
            "adapter that does so at strength 1 in fp32 is corrupted, see 'rankfold inspect'."
        )


def save_image(path: Path, image: Image.Image, recipe: Recipe) -> None:
    """Writes a PNG with the recipe in its text chunk."""
    info = PngImagePlugin.PngInfo()
    info.add_text(TEXT_CHUNK, json.dumps(asdict(recipe)))
    write_png(path, image, info)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a PNG.

    Raises:
        UserError: when the file is no PNG of ours, or an adapter it names has changed since.
    """
    recipe = parse_recipe(path)
    known = (*recipe.reference_hashes, *recipe.start_hashes)
    for given, expected in zip((*recipe.references, *recipe.start_files), known, strict=True):
        if not is_file(Path(given)) or file_hash(Path(given)) != expected:
            raise UserError(
                f"The image {given} is gone or has changed since {path} was made from it, so it cannot be repeated."
            )
    for folder, expected in zip(recipe.adapters, recipe.hashes, strict=True):
        check_adapter(Path(folder))
        if content_hash(adapter_path(Path(folder))) != expected:
            raise UserError(f"The adapter {folder} has changed since {path} was made, so the image cannot be repeated.")
    return recipe


def parse_recipe(path: Path) -> Recipe:
    """What a PNG says of itself; nothing that it names is looked at.

    Raises:
        UserError: when the file is no PNG of ours.
    """
    try:
        with open_image(path) as image:
            text = getattr(image, "text", {}).get(TEXT_CHUNK)
    except (*READ_ERRORS, Image.DecompressionBombError) as error:
        raise UserError(f"--from {path} is not an image that can be read.") from error
    if text is None:
        raise UserError(
            f"--from {path} carries no settings: it was not made by rankfold sample, or was re-saved since."
        )
    try:
        values = TypeAdapter(dict[str, Any]).validate_json(text)
        known = [field.name for field in fields(Recipe)]
        values = current_names(values, known, f"--from {path}")
        if unknown := sorted(key for key, value in values.items() if key not in known and value):
            raise UserError(
                f"--from {path} was made with {', '.join(unknown)}, which this version of rankfold does not have, so it cannot be "
                "made again: take the version that made it."
            )
        recipe = TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        raise UserError(
            f"--from {path}: what it says of its settings cannot be read: {error.errors()[0]['msg']}."
        ) from error
    if len(recipe.references) != len(recipe.reference_hashes):
        raise UserError(f"--from {path}: its references and their hashes are not equally many.")
    if len(recipe.start_files) != len(recipe.start_hashes):
        raise UserError(f"--from {path}: the images that it starts from and their hashes are not equally many.")
    if not len(recipe.adapters) == len(recipe.strengths) == len(recipe.hashes):
        raise UserError(f"--from {path}: its adapters, their strengths and their hashes are not equally many.")
    return recipe


def image_grid(images: Sequence[Image.Image], columns: int, *, gap: int = 4) -> Image.Image:
    """Images of one size on a white sheet."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * (width + gap), number // columns * (height + gap)))
    return sheet
