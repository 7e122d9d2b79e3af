"""Two subjects in one image: what becomes of each, by every way of putting two adapters together.

    python benchmarks/two_subjects.py [--pairs 3] [--ways NAME ...] [--work FOLDER] [--out FILE.json] [--image FILE.png]

For each pair of creatures that no embedded model has seen, an adapter each is trained on five images of it alone. Then the same
prompts and seeds for each way. Learned ways see eight images of both (also the LoRA from scratch, for as many steps).

identity: cosine (CLIP-I, embedded open_clip) of the left or right part of an image with such parts of drawn images of the
subject, the two parts given to the two subjects in the better way; "closed" puts the base model at 0 and drawn images at 1.
both: the lesser identity of an image's two. apart: share of images in which every subject's own part, from the left, is nearer to its
own drawn images than to those of the others. seam: mean difference of neighbouring pixels across the border of parts over that
elsewhere. scene: share of images whose scene, by the same open_clip, is the one asked for. time: CPU seconds of one image on one
thread over those of one with a single adapter in the weights, alternating, median of TIMES.
Ways of three: 96 pixels wide, a third creature to the right; identity on the same scale as pairs'.
Intervals: bootstrap over pairs, and over the images within them. What is drawn is kept in --work by pair and way, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rankfold import ComposeConfig, SubjectConfig, compose, train
from rankfold.pipelines.generate import Recipe, generate, image_grid, sampling_pipeline
from rankfold.pipelines.regions import parse_region
from rankfold.toolkit.embedded import world
from rankfold.toolkit.metrics.clip import ClipScorer
from rankfold.training.embedded.demo import DEMO_TRAINING

FIRST = 2_000_101  # creatures of pair p: FIRST + 10 p and the next
FEW = 8  # images of both that the learned ways see
STEPS = 200  # of the learned ways
PROMPT = "a sks1 creature and a sks2 creature {where}"
MERGES = ("linear", "svd", "ties", "dare_ties", "magnitude_prune")
PARTS = ((0, 14, 36, 50), (28, 14, 64, 50))  # left and right, pixels
PARTS_OF_THREE = ((0, 14, 36, 50), (30, 14, 66, 50), (60, 14, 96, 50))
QUIET = {"preview_every": 0, "checkpoint_every": 1000, "preservation_weight": 0.0}


def single_adapters(pair: int, work: Path, threads: int, subjects: int = 2) -> list[str]:
    """Adapter folders of the pair's two creatures (three of a triple), trained once."""
    folders = []
    for side in range(1, subjects + 1):
        run, images = work / f"pair{pair}" / f"adapter{side}", work / f"pair{pair}" / f"images{side}"
        if not (run / "adapter" / "rankfold.json").is_file():
            images.mkdir(parents=True, exist_ok=True)
            for number, (image, _) in enumerate(world.subject_images(FIRST + 10 * pair + side - 1, 5)):
                image.save(images / f"{number}.png")
            settings = DEMO_TRAINING | QUIET
            train(
                SubjectConfig(
                    images=images, out=run, token=f"sks{side}", steps=800, threads=threads, seed=pair, **settings
                ),
                overwrite=run.is_dir(),
            )
        folders.append(str(run / "adapter"))
    return folders


def few_images(pair: int, work: Path) -> Path:
    """Folder with FEW drawn images of both creatures, captioned."""
    folder = work / f"pair{pair}" / "both"
    folder.mkdir(parents=True, exist_ok=True)
    for number, (scene, where) in enumerate(list(world.SCENES.items())[:FEW]):
        creature = FIRST + 10 * pair
        world.draw_pair(creature, creature + 1, scene, np.random.default_rng((pair, number))).save(
            folder / f"{number}.png"
        )
        (folder / f"{number}.txt").write_text(PROMPT.format(where=where), encoding="utf-8")
    return folder


Recipes = Callable[[str], Recipe]  # of a place such as 'on the beach'
GENERAL = Recipe(prompt="", guidance_scale=2.0)
CENTRE = "{where} in the centre"


def learning(pair: int, work: Path, threads: int) -> dict:
    """Settings of the learned ways."""
    few = few_images(pair, work)
    return {"images": few, "steps": STEPS, "learning_rate": 0.05, "min_snr_gamma": 5.0, "threads": threads} | QUIET


def with_adapter(folder: Path) -> Recipes:
    """Both subjects by one adapter."""
    return lambda where: replace(GENERAL, prompt=PROMPT.format(where=where), adapters=(str(folder),), strengths=(1.0,))


def together(pair: int, work: Path, threads: int) -> Recipes:
    """Both adapters switched on."""
    singles = tuple(single_adapters(pair, work, threads))
    return lambda where: replace(GENERAL, prompt=PROMPT.format(where=where), adapters=singles, strengths=(1.0, 1.0))


def composed(pair: int, work: Path, threads: int, *, name: str, learned: bool = False, **settings) -> Recipes:
    """Both adapters composed into one."""
    more = learning(pair, work, threads) if learned else {}
    adapters, out = tuple(single_adapters(pair, work, threads)), work / f"pair{pair}" / name
    return with_adapter(
        compose(ComposeConfig(adapters=adapters, out=out, **settings, **more), overwrite=out.is_dir()).adapter
    )


def from_scratch(pair: int, work: Path, threads: int) -> Recipes:
    """A LoRA trained on images of both."""
    settings = DEMO_TRAINING | learning(pair, work, threads) | {"learning_rate": 1e-3}
    out = work / f"pair{pair}" / "scratch"
    return with_adapter(train(SubjectConfig(out=out, **settings), overwrite=out.is_dir()).adapter)


def by_regions(pair: int, work: Path, threads: int) -> Recipes:
    """A region, and a pass of the denoiser, for each."""
    both = together(pair, work, threads)

    def recipe(where: str) -> Recipe:
        texts = [f"{side}: a sks{n} creature {CENTRE.format(where=where)}" for n, side in ((1, "left"), (2, "right"))]
        return replace(both(where), regions=tuple(parse_region(text) for text in texts))

    return recipe


def by_subjects(pair: int, work: Path, threads: int, subjects: int = 2) -> Recipes:
    """Each with its adapter, words and part of the image, the parts in one pass."""
    words = tuple(f"sks{number + 1} creature" for number in range(subjects))
    prompt, singles = f"a {{subjects}} {CENTRE}", tuple(single_adapters(pair, work, threads, subjects))
    general = replace(GENERAL, adapters=singles, strengths=(1.0,) * subjects, subjects=words)
    general = replace(general, width=32 * subjects, height=64)
    return lambda where: replace(general, prompt=prompt.replace("{where}", where))


def three_by_regions(pair: int, work: Path, threads: int) -> Recipes:
    """The same with three thirds."""
    singles, edges = tuple(single_adapters(pair, work, threads, 3)), (0, 1 / 3, 2 / 3, 1)

    def recipe(where: str) -> Recipe:
        texts = [f"{edges[n]},0,{edges[n + 1]},1: a sks{n + 1} creature {CENTRE.format(where=where)}" for n in range(3)]
        regions = tuple(parse_region(text) for text in texts)
        return replace(GENERAL, adapters=singles, strengths=(1.0,) * 3, regions=regions, width=96, height=64)

    return recipe


WAYS: dict[str, Callable[[int, Path, int], Recipes]] = {
    "base model": lambda *_: lambda where: replace(GENERAL, prompt=f"two creatures {where}"),
    "both switched on": together,
    "uniform": partial(composed, name="uniform"),
    "learned": partial(composed, name="learned", learned=True),
    "learned, free": partial(composed, name="free", learned=True, free=True),
    "learned by columns": partial(composed, name="columns", learned=True, tie="column"),
    "learned by columns, no penalty": partial(
        composed, name="columns-free", learned=True, tie="column", column_penalty=0.0
    ),
    **{
        f"PEFT {merge}, {weight:g} each": partial(
            composed, name=f"{merge}{weight:g}", merge=merge, weights=(weight, weight)
        )
        for merge in MERGES
        for weight in (0.5, 1.0)
    },
    "LoRA from scratch": from_scratch,
    "regions": by_regions,
    "subjects": by_subjects,
    "three by regions": three_by_regions,
    "three by subjects": partial(by_subjects, subjects=3),
}
OF_THREE = ("three by regions", "three by subjects")
TIMES = 9  # images of each way that are timed


def embeddings(scorer: ClipScorer, images: list[Image.Image]) -> torch.Tensor:
    """Of the parts of each image, from the left, (N, parts, D)."""
    boxes = PARTS if images[0].width == 64 else PARTS_OF_THREE
    parts = [image.crop(box).resize((64, 64), Image.Resampling.BICUBIC) for image in images for box in boxes]
    return scorer.embed_images(parts).view(len(images), len(boxes), -1)


def references(scorer: ClipScorer, creature: int, n: int = 24) -> torch.Tensor:
    """Mean embedding (D,) of a subject's parts of drawn images, left and right, beside others."""
    scenes, found = list(world.SCENES), []
    for number in range(n):
        random, other = np.random.default_rng((creature, number, 1)), 2_500_000 + number
        left = number % 2 == 0
        image = world.draw_pair(*((creature, other) if left else (other, creature)), scenes[number % 8], random)
        found.append(embeddings(scorer, [image])[0, 0 if left else 1])
    return torch.stack(found).mean(0)


def identities(found: torch.Tensor, subjects: torch.Tensor) -> torch.Tensor:
    """Cosines (N, C) of the subjects (C, D) with the parts (N, C, D), parts and subjects paired in the best way."""
    cosines, number = found @ subjects.T, torch.arange(len(subjects))  # (N, part, subject)
    orders = torch.stack([cosines[:, list(order), number] for order in permutations(range(len(subjects)))])
    return orders.gather(0, orders.sum(2).argmax(0)[None, :, None].expand(1, -1, len(subjects)))[0]


def told_apart(found: torch.Tensor, subjects: torch.Tensor) -> list[float]:
    """For each image, whether every part, from the left, is nearest to its own subject."""
    return ((found @ subjects.T).argmax(2) == torch.arange(len(subjects))).all(1).float().tolist()


def seams(images: list[Image.Image]) -> list[float]:
    """Of each image, the mean difference of neighbouring pixels across the borders of parts over that elsewhere."""
    found = []
    for image in images:
        steps = np.abs(np.diff(np.asarray(image, float), axis=1)).mean((0, 2))
        borders = [edge - 1 for edge in range(32, image.width, 32)]
        found.append(float(steps[borders].mean() / np.delete(steps, borders).mean()))
    return found


def scene_shares(scorer: ClipScorer, images: list[Image.Image], seeds: int) -> list[float]:
    """For each image, `seeds` of each scene in turn, whether its scene is the one that was asked for."""
    texts = scorer.embed_texts([f"two creatures {where}" for where in world.SCENES.values()])
    nearest = (scorer.embed_images(images) @ texts.T).argmax(1)
    return (nearest == torch.arange(len(texts)).repeat_interleave(seeds)).float().tolist()


def measure(way: str, pair: int, scorer: ClipScorer, subjects: torch.Tensor, options: argparse.Namespace) -> dict:
    """Identities (N, C), and scenes, apart and seams (N); kept in the pair's folder with the images."""
    folder = options.work / f"pair{pair}" / "drawn" / f"{way.replace(' ', '_')}-{options.seeds}"
    if (folder / "scores.json").is_file():
        return json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    scenes, images = list(world.SCENES.items()), []
    if way == "drawn images":
        creatures = (FIRST + 10 * pair, FIRST + 10 * pair + 1)
        for number in range(options.seeds * len(scenes)):
            random = np.random.default_rng((pair, number, 7))
            images.append(world.draw_pair(*creatures, scenes[number // options.seeds][0], random))
    else:
        recipes = WAYS[way](pair, options.work, options.threads)
        pipe = sampling_pipeline(recipes(scenes[0][1]))
        for _, where in scenes:
            made = generate(replace(recipes(where), seed=1000), options.seeds, pipe=pipe)
            images += [image for image, _ in made]
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        image.save(folder / f"{number:02d}.png")
    subjects, parts = subjects[: 3 if way in OF_THREE else 2], embeddings(scorer, images)
    found = {
        "identities": identities(parts, subjects).tolist(),
        "apart": told_apart(parts, subjects),
        "seams": seams(images),
    }
    found["scenes"] = scene_shares(scorer, images, options.seeds)
    (folder / "scores.json").write_text(json.dumps(found), encoding="utf-8")
    return found


def times(work: Path, threads: int, ways: list[str]) -> dict[str, float]:
    """CPU seconds of an image over those of one with a single adapter, by way: medians of TIMES ratios, alternating; the first pair."""
    single = with_adapter(Path(single_adapters(0, work, threads)[0]))
    recipes = {"one adapter": single("on the beach")} | {
        way: WAYS[way](0, work, threads)("on the beach") for way in ways
    }
    pipes, taken = {name: sampling_pipeline(recipe) for name, recipe in recipes.items()}, {name: [] for name in recipes}
    for _ in range(TIMES + 1):
        for name, recipe in recipes.items():
            start = time.process_time()
            generate(recipe, 1, pipe=pipes[name])
            taken[name].append(time.process_time() - start)
    alone = taken.pop("one adapter")[1:]
    return {
        name: statistics.median(a / b for a, b in zip(found[1:], alone, strict=True)) for name, found in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/two_subjects"))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--image", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    scorer, scores = ClipScorer(), {}
    ways = ["drawn images", *dict.fromkeys(["base model", *options.ways])]
    for pair in range(options.pairs):
        subjects = torch.stack([references(scorer, FIRST + 10 * pair + side) for side in (0, 1, 2)])
        for way in ways:
            scores.setdefault(way, []).append(measure(way, pair, scorer, subjects, options))
            print(f"pair {pair}: {way}", flush=True)
    torch.set_num_threads(1)
    timed = [way for way in ("both switched on", "regions", "subjects", *OF_THREE) if way in ways]
    report(scores, times(options.work, options.threads, timed), options.out)
    if options.image:
        rows = [
            sorted((options.work / "pair0" / "drawn" / f"{way.replace(' ', '_')}-{options.seeds}").glob("*.png"))
            for way in ways
            if way not in OF_THREE
        ]
        images = image_grid([Image.open(path) for row in rows for path in row[:: options.seeds]], columns=8, gap=2)
        images.resize((images.width * 2, images.height * 2), Image.Resampling.NEAREST).save(options.image)
        print("rows:", ", ".join(way for way in ways if way not in OF_THREE))


def interval(values_PN: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of values (P, N), over pairs and over the images within them."""
    random, means = np.random.default_rng(0), []
    for _ in range(2000):
        chosen = values_PN[random.integers(len(values_PN), size=len(values_PN))]
        within = random.integers(chosen.shape[1], size=chosen.shape)
        means.append(np.take_along_axis(chosen, within, 1).mean())
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def report(scores: dict[str, list[dict]], ratios: dict[str, float], out: Path | None) -> None:
    """Prints the table and writes it."""
    table, all_of = [], {way: np.array([one["identities"] for one in found]) for way, found in scores.items()}
    floor, ceiling = all_of["base model"].mean(), all_of["drawn images"].mean()
    for way, found in all_of.items():
        closed = (found - floor) / (ceiling - floor)
        scenes, both = np.array([one["scenes"] for one in scores[way]]), closed.min(2)
        row = {"way": way, "pairs": len(found), "pictures": both.size, "cosine": float(found.mean())}
        row |= {"first": float(closed[..., 0].mean()), "second": float(closed[..., 1].mean())}
        values_of = {"identity": closed.mean(2), "both": both, "scene": scenes}
        values_of |= {name: np.array([one[name] for one in scores[way]]) for name in ("apart", "seams")}
        for name, values in values_of.items():
            row |= {name: float(values.mean()), f"{name}_interval": interval(values)}
        row |= {"time": ratios.get(way)}
        table.append(row)
        said = "  ".join(
            f"{name} {row[name]:.2f} ({row[f'{name}_interval'][0]:.2f} to {row[f'{name}_interval'][1]:.2f})"
            for name in ("identity", "both", "apart", "scene", "seams")
        )
        print(f"{way:30} {said}  time {row['time'] or float('nan'):.2f}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
