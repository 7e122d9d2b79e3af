"""The embedded models' bars, measured.

judge      accuracy on fresh renders (seed never used in training), each question
vae        PSNR on fresh renders, and the judge on its reconstructions
images   fresh prompts from held-out (shape, colour, scene) combinations: does the judge see what was asked?
clip       100 creatures that no model has seen: is the nearest image the same creature?
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from rankfold.pipelines.generate import Recipe, denoise, image_grid, load_pipeline
from rankfold.toolkit.embedded import world
from rankfold.toolkit.embedded.judge import ANSWERS, IGNORE, images_to_pixels, label_indices, load_judge
from rankfold.toolkit.metrics.clip import ClipScorer, psnr
from rankfold.toolkit.metrics.statistics import bootstrap_interval

FRESH = 987_654  # seed of everything drawn here; training uses seed 0
UNSEEN = 3_000_000  # creatures from here on are in no training set


@torch.no_grad()
def judge_accuracy(judge, images, things) -> dict[str, float]:
    """Share of right answers on images whose descriptions are known."""
    goal = torch.tensor([label_indices(thing) for thing in things])
    logits = judge(images_to_pixels(images))
    out = {}
    for number, name in enumerate(ANSWERS):
        known = goal[:, number] != IGNORE
        out[name] = float((logits[name].argmax(-1) == goal[:, number])[known].float().mean())
    return out


@torch.no_grad()
def vae_bars(pipe, judge, images, things) -> dict[str, object]:
    """PSNR of reconstructions and what the judge reads off them."""
    pixels = images_to_pixels(images)
    back = torch.cat([pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample for x in pixels.split(50)]).clamp(
        -1, 1
    )
    decibels = psnr(back / 2 + 0.5, pixels / 2 + 0.5)
    from torchvision.transforms.functional import to_pil_image

    again = [to_pil_image(x / 2 + 0.5) for x in back]
    return {
        "psnr": float(decibels.mean()),
        "psnr_worst": float(decibels.min()),
        "judge": judge_accuracy(judge, again, things),
    }


def image_bars(pipe, judge, prompts: int, steps: int, guidance: float, sheet: Path | None) -> dict[str, object]:
    """Share of generated images that show what a held-out prompt asks for, with intervals."""
    rng = np.random.default_rng(FRESH)
    things = [world.random_thing(rng, held=True) for _ in range(prompts)]
    made = []
    for start in range(0, prompts, 50):
        chunk = [world.caption(thing) for thing in things[start : start + 50]]
        made += denoise(
            pipe, chunk, seeds=range(start, start + len(chunk)), steps=steps, guidance_scale=guidance, width=64
        )
    if sheet:
        image_grid(made[:64], 16).save(sheet)
        print([world.caption(thing) for thing in things[:16]])
    answers = judge.classify(made)
    out: dict[str, object] = {}
    for name in ANSWERS:
        asked = [(a[name], getattr(t, name)) for a, t in zip(answers, things, strict=True)]
        if name in ("place", "size"):
            asked = [pair for pair, thing in zip(asked, things, strict=True) if thing.count == "one"]
        right = torch.tensor([float(a == b) for a, b in asked])
        low, high = bootstrap_interval(right)
        out[name] = {"share": float(right.mean()), "low": low, "high": high, "n": len(right)}
    return out


def clip_bars(scorer: ClipScorer) -> dict[str, float]:
    """Nearest-neighbour identity among 100 unseen creatures, one gallery and one query image each."""
    gallery, query = [], []
    for number in range(100):
        views = world.subject_images(UNSEEN + number, 2, seed=FRESH)
        gallery.append(views[0][0])
        query.append(views[1][0])
    similarity = scorer.embed_images(query) @ scorer.embed_images(gallery).T
    right = (similarity.argmax(1) == torch.arange(100)).float()
    low, high = bootstrap_interval(right)
    same = similarity.diagonal().mean()
    other = (similarity.sum() - similarity.diagonal().sum()) / (100 * 99)
    return {
        "nearest_is_same": float(right.mean()),
        "low": low,
        "high": high,
        "same": float(same),
        "other": float(other),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(__file__).parent.parent / "assets" / "tiny")
    parser.add_argument("--base", default="tiny", help="tiny, tiny-dit, or a pipeline folder, such as one half trained")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--renders", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--sheet", type=Path, default=None, help="write the first 64 images here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    judge = load_judge(options.models / "judge.safetensors")
    pipe = load_pipeline(Recipe(prompt="", base=options.base))
    drawn = [world.draw_sample(FRESH, number) for number in range(options.renders)]
    images, things = [row[0] for row in drawn], [row[2] for row in drawn]
    result = {
        "judge_on_renders": judge_accuracy(judge, images, things),
        "vae": vae_bars(pipe, judge, images, things),
        "clip": clip_bars(ClipScorer(f"local-dir:{options.models / 'clip'}")),
        "pictures": image_bars(pipe, judge, options.prompts, options.steps, options.guidance, options.sheet),
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
