"""Which adapter? All of them on the same subjects, at equal trained parameters, after equal steps and after equal time.

    python benchmarks/variants.py [--jobs 2] [--work FOLDER] [--out FILE.json] [--plot FILE.png]
    python benchmarks/variants.py --base MODEL --photos cat/ dog/ mug/ hat/ --tune-photos car/ --class-noun thing --clip NAME

Resumable: every training leaves one file in the work folder, and what is there is not done again.

1. The size of every method is chosen so that it trains as many numbers as plain LoRA of --rank; alpha is the rank.
2. What a step of each takes, in time and memory, is measured in alternation, nothing else running.
3. Each method's learning rate is chosen on --tune-photos: from three, and on from there while the best is at an edge.
4. GLoRA's structure is searched on the first of --tune-photos, below plain LoRA's size, and then taken as it is.
5. Every method trains on every subject of --photos with every seed, and is measured after --steps (equal steps) and after as many steps
   as it makes in the time that plain LoRA needs for these (equal time).

Without --photos the subjects are creatures of the tiny world that no embedded model has seen: five captioned images (--images)
to train on and 16 others to compare with. Of a folder of photos every third is held out to compare with.

identity    share of the way from the base's images to real ones that is closed (CLIP-I)
fidelity    cosine of image and prompt without the token (CLIP-T), less the base's
drift       1 - cosine with the base's image of the same seed, for prompts that have nothing to do with the subject
score       identity less the share of the base's prompt fidelity that is lost, as `--keep best` has it; learning rates go by it
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from demo_settings import write_captioned_folder
from PIL import Image
from timing import load_or_make, peak_bytes, seconds
from variant_methods import METHODS, SEARCHED, Sized, count, match_size
from variants_report import report

from rankfold import SubjectConfig, train
from rankfold.pipelines.generate import Recipe, sampling_pipeline
from rankfold.toolkit.core.files import write_text
from rankfold.toolkit.core.run_folder import Run
from rankfold.toolkit.data.images import load_rgb
from rankfold.toolkit.data.subjects import find_samples
from rankfold.toolkit.diffusion.load import EMBEDDED, open_model, resolve_base
from rankfold.toolkit.embedded import world
from rankfold.toolkit.metrics import clip as metrics
from rankfold.toolkit.metrics.clip import ClipScorer
from rankfold.training.config.defaults import resolve_defaults
from rankfold.training.config.search import SearchConfig
from rankfold.training.config.yaml_file import from_yaml
from rankfold.training.embedded.demo import DEMO_TRAINING
from rankfold.training.engine.loop import Loop
from rankfold.training.engine.processes import make_accelerator
from rankfold.training.evaluation.measuring import Measurement, Series
from rankfold.training.evaluation.subject import SubjectTest, draw, read_prompts, unrelated_prompts
from rankfold.training.subject.task import SubjectTask

TUNED_ON, TESTED_ON = (2_001_100, 2_001_101), (2_001_000, 2_001_001, 2_001_002, 2_001_003)
RATES = (3e-4, 1e-3, 3e-3)
STEP_OUT = 10**0.5
REFERENCES, EACH = 16, 2
QUIET = {"preview_every": 0, "checkpoint_every": 10**9, "log_every": 50}


@dataclass(frozen=True)
class Subject:
    """Images to learn from, and others to compare with."""

    name: str
    images: str
    references: str


@dataclass(frozen=True)
class Settings:
    """What all trainings share."""

    base: str
    noun: str
    prompts: str
    clip: str
    rank: int
    steps: int
    threads: int
    work: str

    def config(self, images: str, out: Path, seed: int) -> SubjectConfig:
        """A training with plain LoRA."""
        own = DEMO_TRAINING if self.base in EMBEDDED else {"batch_size": 1, "learning_rate": 1e-4}
        own = own | QUIET | {"rank": self.rank, "alpha": float(self.rank), "steps": self.steps, "seed": seed}
        config = SubjectConfig(
            base=self.base, images=Path(images), out=out, class_noun=self.noun, threads=self.threads, **own
        )
        return resolve_defaults(config)


@dataclass(frozen=True)
class Cell:
    """One training: a method on a subject."""

    method: Sized
    rate: float
    subject: Subject
    seed: int
    marks: tuple[int, ...]
    """Steps behind which it is measured."""

    def file(self, work: Path) -> Path:
        name = f"{self.method.method}-{self.rate:.0e}-{self.subject.name}-{self.seed}".replace(", ", "_")
        return work / "cells" / f"{name}.json"


# ---------------------------------------------------------------------------------------------- subjects


def drawn_subject(creature: int, work: Path, count: int) -> Subject:
    """A creature of the tiny world."""
    images, references = work / "subjects" / f"{creature}", work / "subjects" / f"{creature}-references"
    if not references.is_dir():
        write_captioned_folder(creature, images, count)
        references.mkdir(parents=True)
        for number, (image, _) in enumerate(world.subject_images(creature, REFERENCES, seed=1)):
            image.save(references / f"{number:02d}.png")
    return Subject(str(creature), str(images), str(references))


def photographed_subject(folder: Path, work: Path) -> Subject:
    """A folder of photos, every third of them held out."""
    files = sorted({sample.path for sample in find_samples(folder, flip=False, skip_bad=False)})
    images, references = work / "subjects" / folder.name, work / "subjects" / f"{folder.name}-references"
    for number, file in enumerate(files):
        own = references if number % 3 == 2 else images
        own.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, own)
        if number % 3 != 2 and file.with_suffix(".txt").is_file():
            shutil.copy(file.with_suffix(".txt"), own)
    return Subject(folder.name, str(images), str(references))


# ---------------------------------------------------------------------------------------------- one training


@cache
def scorer(name: str) -> ClipScorer:
    return ClipScorer(name or None)


@cache
def test_of(settings: Settings) -> SubjectTest:
    """What is asked of every adapter."""
    return SubjectTest(
        read_prompts(settings.prompts), unrelated_prompts(settings.prompts), "sks", settings.noun, n=EACH
    )


def draw_embeddings(settings: Settings, adapter: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the images of all prompts, and of the unrelated ones, with an adapter or without."""
    test, clip = test_of(settings), scorer(settings.clip)
    guidance = DEMO_TRAINING["guidance_scale"] if settings.base in EMBEDDED else Recipe("").guidance_scale
    recipe = Recipe(prompt="", base=settings.base, seed=7000, guidance_scale=guidance)
    if adapter:
        recipe = replace(recipe, adapters=(adapter,), strengths=(1.0,))
    pipe = sampling_pipeline(recipe)
    own = draw(recipe, test.texts(token=True), EACH, pipe).images
    unrelated = draw(recipe, test.unrelated, 1, pipe).images
    return clip.embed_images(own), clip.embed_images(unrelated)


@cache
def base_drawn(settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    return draw_embeddings(settings, None)


def photos(folder: str) -> list[Image.Image]:
    return [load_rgb(path) for path in sorted(Path(folder).iterdir()) if path.suffix != ".txt"]


def figures(settings: Settings, subject: Subject, adapter: str) -> dict[str, float]:
    """All figures of one adapter."""
    clip, test = scorer(settings.clip), test_of(settings)
    real = clip.embed_images(photos(subject.references))
    aim = float(
        metrics.leave_one_out_similarity(real).mean()
        if len(real) > 2
        else metrics.clip_i(clip.embed_images(photos(subject.images)), real).mean()
    )
    texts = [text for text in test.texts(token=False) for _ in range(EACH)]
    wanted = clip.embed_texts(texts)

    def measure(shown: torch.Tensor) -> Measurement:
        likeness, fidelity = metrics.clip_i(shown, real), metrics.clip_t(shown, wanted)
        return Measurement(0, tuple(likeness.tolist()), tuple(fidelity.tolist()), tuple(texts))

    (before, before_unrelated), (after, after_unrelated) = base_drawn(settings), draw_embeddings(settings, adapter)
    base, tuned = measure(before), measure(after)
    start, end = statistics.fmean(base.likeness), statistics.fmean(tuned.likeness)
    return {
        "identity": (end - start) / (aim - start),
        "fidelity": statistics.fmean(tuned.fidelity) - statistics.fmean(base.fidelity),
        "drift": float(metrics.drift(before_unrelated, after_unrelated).mean()),
        "score": float(Series(base, (tuned,), aim).scores()[tuned.step].mean()),
    }


def prepare_loop(config: SubjectConfig) -> tuple[SubjectTask, Loop]:
    """Task and loop, ready for the first step."""
    accelerator = make_accelerator(config)
    samples = find_samples(config.images, flip=False, skip_bad=False)
    task = SubjectTask(config, samples, resolve_base(config.base), accelerator)
    run = Run(config.out)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.claim()
    return task, Loop(config, task, run, accelerator)


def run_cell(cell: Cell, settings: Settings) -> None:
    """Trains, measures, and writes the result down."""
    file = cell.file(Path(settings.work))
    if file.is_file():
        return
    torch.set_num_threads(settings.threads)
    out = Path(settings.work) / "running" / file.stem
    shutil.rmtree(out, ignore_errors=True)
    config = replace(
        settings.config(cell.subject.images, out, cell.seed),
        learning_rate=cell.rate,
        steps=max(cell.marks),
        **cell.method.settings(),
    )
    task, loop = prepare_loop(config)
    loop.train(lambda step: task.save_adapter(out / f"at{step}") if step in cell.marks else None)
    facts: dict[str, Any] = {"cell": asdict(cell), "parameters": sum(p.numel() for p in loop.parameters)}
    facts["bytes"] = sum(f.stat().st_size for f in (out / f"at{config.steps}").rglob("*.safetensors"))
    facts["figures"] = {str(mark): figures(settings, cell.subject, str(out / f"at{mark}")) for mark in cell.marks}
    write_text(file, json.dumps(facts, indent=1))
    shutil.rmtree(out)
    print(file.stem, {mark: round(own["score"], 3) for mark, own in facts["figures"].items()}, flush=True)


def run_all(cells: Sequence[Cell], settings: Settings, jobs: int) -> None:
    """Every cell that is not there yet, several at a time."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(run_cell, cell, settings) for cell in cells]:
            future.result()


def result(cell: Cell, settings: Settings) -> dict[str, Any]:
    return json.loads(cell.file(Path(settings.work)).read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- sizes, cost, rates


def sizes_of(settings: Settings, subject: Subject, names: Sequence[str]) -> list[Sized]:
    """Every method at the reference's size, and the searched structure."""
    work = Path(settings.work)
    config = settings.config(subject.images, work / "none", 0)
    model = open_model(resolve_base(settings.base))
    goal = count(model, replace(config, adapter="lora"))
    found = [match_size(name, model, config, goal) for name in names if name in METHODS]
    if SEARCHED in names:
        found.append(search_structure(settings, subject))
    return found


def search_structure(settings: Settings, subject: Subject) -> Sized:
    """GLoRA with a structure that was searched on this subject, below plain LoRA's size."""
    out = Path(settings.work) / "search"
    if not (out / "best.yaml").is_file():
        config = asdict(settings.config(subject.images, out, 0))
        own = {k: v for k, v in config.items() if k in SearchConfig.__dataclass_fields__} | {"steps": 600}
        train(SearchConfig(**own), overwrite=out.is_dir())
    best = from_yaml(out / "best.yaml")
    size = count(open_model(resolve_base(settings.base)), replace(best, out=Path("none")))
    return Sized(SEARCHED, "glora", best.rank, best.adapter_options, size)


def costs(settings: Settings, subject: Subject, methods: Sequence[Sized], rounds: int) -> dict[str, dict[str, Any]]:
    """Time and memory of a step of each method over plain LoRA's, the methods taking turns."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loops = {}
    for one in methods:
        config = settings.config(subject.images, Path(settings.work) / "running" / f"cost {one.method}", 0)
        loops[one.method] = prepare_loop(replace(config, **one.settings()))[1]
    memory = {}
    for name, loop in loops.items():
        for _ in range(2):
            loop.train_step()
        memory[name] = peak_bytes(loop.train_step, device)
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            times[name].append(seconds(loop.train_step))
    found = {}
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times["lora"], strict=True)]
        low, *_, high = statistics.quantiles(ratios, n=4)
        found[name] = {"time": statistics.median(ratios), "time_quartiles": (low, high)}
        found[name]["memory"] = memory[name] / memory["lora"]
    return found


def chosen_rates(
    methods: Sequence[Sized], subjects: Sequence[Subject], settings: Settings, jobs: int
) -> dict[str, dict[float, float]]:
    """Each method's mean score at every learning rate that was tried, the best inside."""
    wanted = {one.method: set(RATES) for one in methods}
    scored: dict[str, dict[float, float]] = {}
    for _ in range(3):  # two steps beyond an edge at most
        cells = {
            (one.method, rate): [Cell(one, rate, subject, 100, (settings.steps,)) for subject in subjects]
            for one in methods
            for rate in sorted(wanted[one.method])
        }
        run_all([cell for own in cells.values() for cell in own], settings, jobs)
        for (name, rate), own in cells.items():
            values = [result(cell, settings)["figures"][str(settings.steps)]["score"] for cell in own]
            scored.setdefault(name, {})[rate] = statistics.fmean(values)
        for name, own in scored.items():
            best = max(own, key=lambda rate: own[rate])
            if best == min(own):
                wanted[name].add(float(f"{best / STEP_OUT:.0e}"))
            if best == max(own):
                wanted[name].add(float(f"{best * STEP_OUT:.0e}"))
    return scored


# ---------------------------------------------------------------------------------------------- all of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--photos", type=Path, nargs="+", default=[])
    parser.add_argument("--images", type=int, default=5, help="of each drawn creature, to train on")
    parser.add_argument("--subjects", type=int, default=len(TESTED_ON), help="drawn creatures at most")
    parser.add_argument("--tune-photos", type=Path, nargs="+", default=[])
    parser.add_argument("--class-noun", default="creature")
    parser.add_argument("--prompts", default="")
    parser.add_argument("--clip", default="")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=[*METHODS, SEARCHED])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/variants"))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    options = parser.parse_args()
    if bool(options.photos) != bool(options.tune_photos):
        parser.error("--photos and --tune-photos go together.")
    torch.set_num_threads(options.threads)
    settings = Settings(
        base=options.base,
        noun=options.class_noun,
        prompts=options.prompts or ("world" if options.base in EMBEDDED else "object"),
        clip=options.clip,
        rank=options.rank,
        steps=options.steps,
        threads=options.threads,
        work=str(options.work),
    )
    tests = [photographed_subject(folder, options.work) for folder in options.photos]
    tunes = [photographed_subject(folder, options.work) for folder in options.tune_photos]
    tests = tests or [
        drawn_subject(creature, options.work, options.images) for creature in TESTED_ON[: options.subjects]
    ]
    tunes = tunes or [
        drawn_subject(creature, options.work, options.images) for creature in TUNED_ON[: options.subjects]
    ]
    methods = load_or_make(
        options.work / "sizes.json",
        lambda: [asdict(one) for one in sizes_of(settings, tunes[0], options.methods)],
    )
    methods = [Sized(**one) for one in methods]
    cost = load_or_make(options.work / "costs.json", lambda: costs(settings, tunes[0], methods, options.rounds))
    rates = chosen_rates(methods, tunes, settings, options.jobs)
    cells = []
    for one in methods:
        best = max(rates[one.method], key=lambda rate: rates[one.method][rate])
        in_time = max(1, round(settings.steps / cost[one.method]["time"]))
        marks = tuple(sorted({settings.steps, in_time}))
        cells += [Cell(one, best, subject, seed, marks) for seed in range(options.seeds) for subject in tests]
    run_all(cells, settings, options.jobs)
    report([result(cell, settings) for cell in cells], rates, cost, settings.steps, options.out, options.plot)


if __name__ == "__main__":
    main()
