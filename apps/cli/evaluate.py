"""`rankfold evaluate`: what an adapter is worth, against its base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from ...toolkit.core.errors import UserError
from ...toolkit.formats.adapter_facts import AdapterFacts
from .options import parse_options, positional


@dataclass(frozen=True)
class EvaluateOptions:
    run: Annotated[Path, positional()]
    """Run folder, adapter folder, or a LoRA file of any origin."""
    images: Path | None = None
    """Photos of the subject, best those it was not trained on; unset means the run's own."""
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
    steps: Annotated[int, Ge(1)] = 25
    """Denoising steps."""
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

    recipe, facts, trained_on = evaluation_recipe(options)
    embedded = recipe.base in EMBEDDED
    name = options.prompts or ("world" if embedded else "object")
    test = SubjectTest(read_prompts(name), unrelated_prompts(name), facts.token, facts.class_noun, options.n)
    if not options.clip and not embedded:
        raise UserError(
            "--clip is missing: the embedded model knows only drawn images. Name one of open_clip, such as ViT-B-32-quickgelu:openai."
        )
    folder = options.images or (trained_on[0].parent if trained_on else None)
    if folder is None:
        raise UserError("--images is missing: give photos of the subject, best those it was not trained on.")
    references = [sample.path for sample in find_samples(folder)]
    resolve_base(recipe.base)
    first = distributed_state().is_main_process
    clip, others = ClipScorer(options.clip or None), [DinoScorer(one) for one in options.dino]
    figures, drawn = evaluate_subject(recipe, test, references, trained_on, clip, others)
    out = options.out or (
        options.run if options.run.is_dir() else options.run.with_name(f"{options.run.stem}-evaluation")
    )
    if not first:
        return
    print(write_evaluation(out, figures, drawn, references))
    for key in (out / "metrics.json", out / "pictures.png", out / "report.html"):
        print(key)


def evaluation_recipe(options: EvaluateOptions) -> tuple[Any, AdapterFacts, list[Path]]:
    """How images are made, what the subject is called, and what was trained on where that is known."""
    from ...pipelines.generate import Recipe, adapter_precision
    from ...toolkit.data.subjects import find_samples
    from ...toolkit.formats.as_folder import check_adapter
    from ...toolkit.formats.locate import adapter_facts, adapter_path
    from ...training.config.images import DiffusionConfig
    from ...training.config.yaml_file import from_yaml

    run, guidance, trained_on = options.run, 4.0, []
    check_adapter(run)
    facts = adapter_facts(adapter_path(run))
    if (run / "config.yaml").is_file():
        config = from_yaml(run / "config.yaml")
        if not isinstance(config, DiffusionConfig):
            raise UserError(f"{run} is a run on a vision-language model: use `rankfold evaluate instruct --run {run}`.")
        guidance = config.guidance_scale
        if config.images is not None and Path(config.images).is_dir():
            trained_on = [sample.path for sample in find_samples(config.images)]
    for name in ("base", "token", "class_noun"):
        facts = replace(facts, **{name: getattr(options, name) or getattr(facts, name)})
        if not getattr(facts, name):
            raise UserError(
                f"{run} does not say its {name.replace('_', ' ')}: give it with --{name.replace('_', '-')}."
            )
    recipe = Recipe(
        prompt="",
        base=facts.base,
        adapters=(str(run),),
        strengths=(options.strength,),
        ignore_unused=options.ignore_unused,
        steps=options.steps,
        guidance_scale=guidance,
        width=options.width,
        seed=options.seed,
        precision=options.precision or adapter_precision((str(run),)),
    )
    return recipe, facts, trained_on
