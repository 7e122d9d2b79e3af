"""Two subjects in one image: what becomes of each, by every way of putting two adapters together.

    python benchmarks/two_subjects.py [--pairs 3] [--work FOLDER] [--out FILE.json] [--picture FILE.png]

For each pair of creatures that no embedded model has seen, an adapter each is trained on five images of it alone. Then the same
prompts and seeds for each way. Learned ways see eight images of both (also the LoRA from scratch, for as many steps).

identity: cosine (CLIP-I, embedded open_clip) of the left or right part of an image with such parts of drawn images of the
subject, the two parts given to the two subjects in the better way; "closed" puts the base model at 0 and drawn images at 1.
both: the lesser identity of an image's two. Intervals: bootstrap over all images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rankfold import ComposeConfig, SubjectConfig, compose, train
from rankfold.pipelines.generate import Recipe, generate, image_grid, load_pipeline
from rankfold.pipelines.regions import parse_region
from rankfold.toolkit.embedded import world
from rankfold.toolkit.metrics.clip import ClipScorer
from rankfold.toolkit.metrics.statistics import bootstrap_interval
from rankfold.training.embedded.demo import DEMO_TRAINING

FIRST = 2_000_101  # creatures of pair p: FIRST + 10 p and the next
FEW = 8  # images of both that the learned ways see
STEPS = 200  # of the learned ways
PROMPT = "a sks1 creature and a sks2 creature {where}"
MERGES = ("linear", "svd", "ties", "dare_ties", "magnitude_prune")
PARTS = ((0, 14, 36, 50), (28, 14, 64, 50))  # left and right, pixels
QUIET = {"preview_every": 0, "checkpoint_every": 1000, "preservation_weight": 0.0}


def single_adapters(pair: int, work: Path, threads: int) -> list[str]:
    """Adapter folders of the pair's two creatures, trained once."""
    folders = []
    for side in (1, 2):
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


def make_recipes(pair: int, work: Path, threads: int) -> dict[str, Callable[[str], Recipe]]:
    """Name -> the recipe for a place such as 'on the beach'."""
    singles, few = single_adapters(pair, work, threads), few_images(pair, work)
    here = work / f"pair{pair}"
    general = Recipe(prompt="", guidance_scale=2.0)
    learning = {"images": few, "steps": STEPS, "learning_rate": 0.05, "min_snr_gamma": 5.0, "threads": threads} | QUIET

    def with_adapter(folder: Path) -> Callable[[str], Recipe]:
        return lambda where: replace(
            general, prompt=PROMPT.format(where=where), adapters=(str(folder),), strengths=(1.0,)
        )

    def compose_pair(name: str, **settings) -> Callable[[str], Recipe]:
        config = ComposeConfig(adapters=tuple(singles), out=here / name, **settings)
        return with_adapter(compose(config, overwrite=config.out.is_dir()).adapter)

    def train_together(where: str) -> Recipe:
        return replace(general, prompt=PROMPT.format(where=where), adapters=tuple(singles), strengths=(1.0, 1.0))

    def by_regions(where: str) -> Recipe:
        texts = [f"{side}: a sks{n} creature {where} in the centre" for n, side in ((1, "left"), (2, "right"))]
        return replace(train_together(where), regions=tuple(parse_region(text) for text in texts))

    scratch = SubjectConfig(out=here / "scratch", **(DEMO_TRAINING | learning | {"learning_rate": 1e-3}))
    return {
        "base model": lambda where: replace(general, prompt=f"two creatures {where}"),
        "both switched on": train_together,
        "uniform": compose_pair("uniform"),
        "learned": compose_pair("learned", **learning),
        "learned, free": compose_pair("free", free=True, **learning),
        "learned by columns": compose_pair("columns", tie="column", **learning),
        "learned by columns, no penalty": compose_pair("columns-free", tie="column", column_penalty=0.0, **learning),
        **{
            f"PEFT {merge}, {weight:g} each": compose_pair(f"{merge}{weight:g}", merge=merge, weights=(weight, weight))
            for merge in MERGES
            for weight in (0.5, 1.0)
        },
        "LoRA from scratch": with_adapter(train(scratch, overwrite=scratch.out.is_dir()).adapter),
        "regions": by_regions,
    }


def embeddings(scorer: ClipScorer, images: list[Image.Image]) -> torch.Tensor:
    """Of the left and the right part of each image, (N, 2, D)."""
    parts = [image.crop(box).resize((64, 64), Image.Resampling.BICUBIC) for image in images for box in PARTS]
    return scorer.embed_images(parts).view(len(images), 2, -1)


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
    """Cosines (N, 2) of the subjects (2, D) with the parts (N, 2, D), parts and subjects paired in the better way."""
    cosines = found @ subjects.T  # (N, part, subject)
    straight = torch.stack((cosines[:, 0, 0], cosines[:, 1, 1]), 1)
    crossed = torch.stack((cosines[:, 1, 0], cosines[:, 0, 1]), 1)
    return torch.where((straight.sum(1) >= crossed.sum(1))[:, None], straight, crossed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/two_subjects"))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--image", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    scorer, scores, sheet = ClipScorer(), {}, []
    for pair in range(options.pairs):
        creatures = (FIRST + 10 * pair, FIRST + 10 * pair + 1)
        subjects = torch.stack([references(scorer, creature) for creature in creatures])
        scenes = list(world.SCENES.items())
        drawn = [
            world.draw_pair(*creatures, s, np.random.default_rng((pair, i, 7))) for i, (s, _) in enumerate(scenes * 2)
        ]
        scores.setdefault("drawn images", []).append(identities(embeddings(scorer, drawn), subjects))
        rows = [("drawn images", drawn[:8])]
        for name, recipe in make_recipes(pair, options.work, options.threads).items():
            pipe, images = load_pipeline(recipe(scenes[0][1])), []
            for _, where in scenes:
                images += [p for p, _ in generate(replace(recipe(where), seed=1000), options.seeds, pipe=pipe)]
            scores.setdefault(name, []).append(identities(embeddings(scorer, images), subjects))
            rows.append((name, images[:: options.seeds]))
        if pair == 0:
            sheet = rows
    report(scores, options.out)
    if options.image:
        images = image_grid([image for _, row in sheet for image in row], columns=8, gap=2)
        images.resize((images.width * 2, images.height * 2), Image.Resampling.NEAREST).save(options.image)
        print("rows:", ", ".join(name for name, _ in sheet))


def report(scores: dict[str, list[torch.Tensor]], out: Path | None) -> None:
    """Prints the table and writes it."""
    table, all_of = [], {name: torch.cat(found) for name, found in scores.items()}
    floor, ceiling = all_of["base model"].mean(), all_of["drawn images"].mean()
    for name, found in all_of.items():
        closed = (found - floor) / (ceiling - floor)
        both = closed.min(1).values
        low, high = bootstrap_interval(closed.mean(1))
        both_low, both_high = bootstrap_interval(both)
        row = {"way": name, "first": float(closed[:, 0].mean()), "second": float(closed[:, 1].mean())}
        row |= {"identity": float(closed.mean()), "identity_interval": (low, high)}
        row |= {"both": float(both.mean()), "both_interval": (both_low, both_high), "cosine": float(found.mean())}
        row |= {"pictures": len(found)}
        table.append(row)
        print(
            f"{name:30} identity {row['identity']:.2f} ({low:.2f} to {high:.2f})  both {row['both']:.2f} ({both_low:.2f} to "
            f"{both_high:.2f})  first {row['first']:.2f}  second {row['second']:.2f}  cosine {row['cosine']:.3f}"
        )
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
