"""`rankfold evaluate`: what an adapter is worth, against its base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le

from ...toolkit.core.errors import UserError
from ...toolkit.core.setting_names import as_flag
from ...toolkit.formats.adapter_facts import AdapterFacts
from .options import BaseFileOptions, parse_options, positional

if TYPE_CHECKING:
    from ...pipelines.generate import Recipe
    from ...toolkit.data.subjects import Sample
    from ...training.config.images import DiffusionConfig


@dataclass(frozen=True)
class EvaluateOptions(BaseFileOptions):
    run: Annotated[Path, positional()]
    """Run folder, adapter folder, or a LoRA file of any origin."""
    images: Path | None = None
    """Photos of the subject, best those it was not trained on; with references the images that shall be made; unset means the run's own."""
    references: tuple[Path, ...] = ()
    """Folders of reference images, each called as the image that shall be made from it; or metadata.jsonl in --images says them."""
    prompts: str = ""
    """object, live (the protocol's 25 each), world (the embedded models'), or a file with {token} and {noun} in each line;
    unset means world for embedded bases and object for others."""
    n: Annotated[int, Ge(1)] = 4
    """Images per prompt."""
    strength: float = 1.0
    """Of the adapter."""
    ignore_unused: bool = False
    """Use a LoRA file although it holds tensors that the base has no place for; they are named and left out."""
    base: str | None = None
    """Base model; unset means the one that the adapter names."""
    token: str = ""
    """Rare word that stands for the subject; unset means the one that the adapter names."""
    class_noun: str = ""
    """What the subject is; unset means what the adapter says."""
    clip: str = ""
    """An open_clip model for CLIP-I and CLIP-T: MODEL:WEIGHTS, hf-hub:... or local-dir:...; unset means the embedded one for
    embedded bases."""
    dino: tuple[str, ...] = ()
    """Hub ids or folders of DINO models, such as facebook/dino-vits16, for likeness beside CLIP's."""
    steps: Annotated[int | None, Ge(1)] = None
    """Denoising steps; unset means 25, or as many as the previews of a run on a distilled base (--guidance-scale 1)."""
    width: Annotated[int, Ge(0), Le(16384)] = 0
    """Width and height of the images in pixels; 0 means the base model's own."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """dtype; unset means the one that the adapter was trained in; fp32 where it does not say, and on a CPU."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the first image."""
    out: Path | None = None
    """Folder for metrics.json, pictures.png and report.html; unset means the run's, or NAME-evaluation beside a file."""


def evaluate(argv: list[str]) -> None:
    options = parse_options(EvaluateOptions, argv, "evaluate")
    if options.n < 1:
        raise UserError(f"--n must be at least 1, not {options.n}.")
    from ...toolkit.data.subjects import find_samples
    from ...toolkit.diffusion.load import EMBEDDED, resolve_base
    from ...toolkit.metrics.clip import ClipScorer
    from ...toolkit.metrics.dino import DinoScorer
    from ...training.engine.processes import distributed_state
    from ...training.evaluation.subject import SubjectTest, evaluate_subject, read_prompts, unrelated_prompts
    from ...training.evaluation.subject_page import write_evaluation

    recipe, facts, config = evaluation_recipe(options)
    embedded, learned = recipe.base in EMBEDDED, trained_samples(config)
    if not options.clip and not embedded:
        raise UserError(
            "--clip is missing: the embedded model knows only drawn images. Name one of open_clip, such as ViT-B-32-quickgelu:openai."
        )
    shown = find_samples(options.images) if options.images else []
    if options.references or getattr(config, "references", ()) or any(one.references for one in (*learned, *shown)):
        evaluate_pairs(options, recipe, config, learned)
        return
    name = options.prompts or ("world" if embedded else "object")
    test = SubjectTest(read_prompts(name), unrelated_prompts(name), facts.token, facts.class_noun, options.n)
    trained_on = [sample.path for sample in learned]
    folder = options.images or (trained_on[0].parent if trained_on else None)
    if folder is None:
        raise UserError("--images is missing: give photos of the subject, best those it was not trained on.")
    references = [sample.path for sample in find_samples(folder)]
    resolve_base(recipe.base)
    first = distributed_state().is_main_process
    clip, others = ClipScorer(options.clip or None), [DinoScorer(one) for one in options.dino]
    figures, drawn = evaluate_subject(recipe, test, references, trained_on, clip, others)
    if not first:
        return
    out = evaluation_folder(options)
    print(write_evaluation(out, figures, drawn, references))
    print_files(out)


def evaluate_pairs(
    options: EvaluateOptions, recipe: Recipe, config: DiffusionConfig | None, learned: list[Sample]
) -> None:
    """Measures on pairs. config: the run's, where it is one; learned: what it was trained on.

    Raises:
        UserError: for pairs that are not whole, and options that are of subjects.
    """
    from ...toolkit.metrics.clip import ClipScorer
    from ...toolkit.metrics.dino import DinoScorer
    from ...training.engine.processes import distributed_state
    from ...training.evaluation.edits import evaluate_edits, pair_settings
    from ...training.evaluation.subject_page import write_edit_evaluation
    from ...training.subject.pairs import find_pairs

    for name in ("prompts", "token", "class_noun"):
        if value := getattr(options, name):
            flag = as_flag(name)
            raise UserError(f"{flag} {value} is of subjects: images with references are made by their captions.")
    pairs, seen = find_pairs(recipe.base, config, options.images, options.references, learned, side=options.width)
    clip, others = ClipScorer(options.clip or None), [DinoScorer(one) for one in options.dino]
    figures, drawn = evaluate_edits(recipe, pairs, options.n, clip, others)
    figures["settings"] = pair_settings(recipe, pairs, options.n, seen, [clip, *others])
    if not distributed_state().is_main_process:
        return
    out = evaluation_folder(options)
    print(write_edit_evaluation(out, figures, drawn, pairs, options.n))
    print_files(out)


def evaluation_folder(options: EvaluateOptions) -> Path:
    """Where the evaluation goes."""
    beside = options.run if options.run.is_dir() else options.run.with_name(f"{options.run.stem}-evaluation")
    return options.out or beside


def print_files(out: Path) -> None:
    """The files of an evaluation."""
    for name in ("metrics.json", "pictures.png", "report.html"):
        print(out / name)


def trained_samples(config: DiffusionConfig | None) -> list[Sample]:
    """What a run was trained on, with references, as far as it is still there."""
    from ...toolkit.data.references import add_references
    from ...toolkit.data.subjects import find_samples

    if config is None or config.images is None or not Path(config.images).is_dir():
        return []
    folders = getattr(config, "references", ())
    return add_references(find_samples(config.images), folders if all(map(Path.is_dir, folders)) else ())


def evaluation_recipe(options: EvaluateOptions) -> tuple[Recipe, AdapterFacts, DiffusionConfig | None]:
    """How images are made, what the subject is called, and the config of a run."""
    from ...pipelines.generate import Recipe, adapter_precision
    from ...toolkit.formats.as_folder import check_adapter
    from ...toolkit.formats.locate import adapter_facts, adapter_path
    from ...training.config.defaults import drawing_defaults
    from ...training.config.images import DiffusionConfig
    from ...training.config.yaml_file import from_yaml

    run, config = options.run, None
    check_adapter(run)
    facts = adapter_facts(adapter_path(run))
    if (run / "config.yaml").is_file():
        config = from_yaml(run / "config.yaml")
        if not isinstance(config, DiffusionConfig):
            raise UserError(f"{run} is a run on a vision-language model: use `rankfold evaluate instruct --run {run}`.")
        if config.drawing_base != config.base:
            facts = replace(facts, base=config.drawing_base)
    for name in ("base",) if options.references else ("base", "token", "class_noun"):
        facts = replace(facts, **{name: getattr(options, name) or getattr(facts, name)})
        if not getattr(facts, name):
            raise UserError(f"{run} does not say its {name.replace('_', ' ')}: give it with {as_flag(name)}.")
    steps, guidance = drawing_defaults(facts.base, config)
    recipe = Recipe(
        prompt="",
        base=facts.base,
        adapters=(str(run),),
        strengths=(options.strength,),
        ignore_unused=options.ignore_unused,
        steps=options.steps or steps,
        guidance_scale=guidance,
        width=options.width,
        seed=options.seed,
        precision=options.precision or adapter_precision((str(run),)),
    )
    return recipe, facts, config
