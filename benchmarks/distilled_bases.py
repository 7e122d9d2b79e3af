"""What training costs a distilled base of its few steps, and what a training adapter keeps of them.

    python benchmarks/distilled_bases.py [--images creature] [--preservation-weight 1] [--runs 4] [--work FOLDER] [--out FILE.json]

`tiny-turbo` draws in 4 steps without guidance. Adapters for it are trained in these ways (--ways):

plain       on it, by the plain loss
undone      on it with `--training-adapter`, made by `rankfold train dedistill` of images that it draws itself
guided      on it with `--target-guidance 3`, as much as was distilled into it
teacher     on `tiny-dit`, which it was distilled from, as one does who previews with `--preview-base tiny-turbo`

The images (--images) are one of

creature    five captioned images of one creature, as a user has them; each creature with a seed of its own
ordinary    120 captioned images of what it knows already, so that there is nothing to learn but how the plain loss denoises

All images are drawn as the base draws: 4 steps, guidance 1.

details     images of things (held-out combinations) with the adapter on: share of shapes, patterns and faces that are as asked (the judge)
certainty   mean log-probability that the judge gives to these
likeness    share of the base's distance to drawn images of the creature that is closed (CLIP-I, embedded open_clip), with the token
place       share of these images whose place is as asked
sharpness   edge energy of the images of things, as a share of the base's own (1: as sharp as the base draws)
Intervals: bootstrap, 95 %, over prompts, each by its mean over the runs; differences from the plain way are paired by image.

Trainings compute one of the 256 alike tokens that stand where T5 would speak, as the embedded models' own training does: the same numbers
at a quarter of the price.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_settings import write_captioned_folder
from PIL import Image

from rankfold import SubjectConfig, train
from rankfold.pipelines.generate import Recipe, denoise, sampling_pipeline
from rankfold.toolkit.diffusion.families.stable_diffusion_3 import StableDiffusion3
from rankfold.toolkit.embedded import world
from rankfold.toolkit.embedded.judge import ANSWERS, images_to_pixels, label_indices
from rankfold.toolkit.metrics.clip import ClipScorer, clip_i, leave_one_out_similarity, load_embedded_judge
from rankfold.toolkit.metrics.statistics import bootstrap_interval
from rankfold.training.embedded.demo import DEMO_SETTINGS, prompt_for, scenes_and_places
from rankfold.training.embedded.dit import T5_TOKENS, RepeatedTokenAttention
from rankfold.training.launch.dedistill import dedistill

BASE = "tiny-turbo"
FIRST = 2_000_900  # creatures that no other benchmark uses
TRAINING = DEMO_SETTINGS["tiny-dit"] | {
    "adapter": "lora",
    "train_text_encoder": False,
    "guidance_scale": None,
    "preview_every": 0,
}
DETAILS = ("shape", "pattern", "face")  # what few steps make worse; colours and scenes are right in any number of them
WAYS = ("plain", "undone", "guided", "teacher")
DRAWN = {"steps": 4, "guidance_scale": 1.0, "width": 64}


def compute_one_padding_token() -> None:
    """Lets trainings of Stable Diffusion 3 do as `RepeatedTokenAttention` says."""
    predict = StableDiffusion3.predict

    def shorter(self: Any, noisy: torch.Tensor, sigmas: torch.Tensor, embeds: dict[str, torch.Tensor]) -> torch.Tensor:
        self.transformer.set_attn_processor(RepeatedTokenAttention())
        states = embeds["prompt_embeds"]
        return predict(self, noisy, sigmas, embeds | {"prompt_embeds": states[:, : states.shape[1] - T5_TOKENS + 1]})

    StableDiffusion3.predict = shorter


def edge_energy(images: list[Image.Image]) -> torch.Tensor:
    """Mean squared difference between neighbouring pixels of each image, (N,)."""
    pixels = images_to_pixels(images)
    across, down = pixels[..., 1:] - pixels[..., :-1], pixels[..., 1:, :] - pixels[..., :-1, :]
    return across.square().flatten(1).mean(1) + down.square().flatten(1).mean(1)


def write_ordinary_folder(number: int, folder: Path) -> Path:
    """Folder with images of things, drawn as those that the teacher has learned from, and their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for at in range(120):
        image, text, _ = world.draw_sample(5000 + number - FIRST, at, creatures=0.0)
        image.save(folder / f"{at:03d}.png")
        (folder / f"{at:03d}.txt").write_text(text, encoding="utf-8")
    return folder


class Measuring:
    """Prompts, and what the base's own images score."""

    def __init__(self, things: int) -> None:
        rng = np.random.default_rng(4_321)
        self.things = [world.random_thing(rng, held=True) for _ in range(things)]
        self.judge, self.scorer = load_embedded_judge(), ClipScorer()
        self.base = self.draw(())

    def draw(self, adapters: tuple[str, ...]) -> tuple[list[Image.Image], list[Image.Image]]:
        """Images of the things, and of the creature in all scenes and places."""
        pipe = sampling_pipeline(Recipe(prompt="", base=BASE, adapters=adapters, strengths=(1.0,) * len(adapters)))
        prompts = [world.caption(thing) for thing in self.things]
        subject = [prompt_for("sks creature", scene, place) for scene, place in scenes_and_places()]
        draw = lambda texts, first: denoise(  # noqa: E731
            pipe, texts, seeds=list(range(first, first + len(texts))), **DRAWN
        )
        return draw(prompts, 700), draw(subject, 900)

    def figures(self, adapters: tuple[str, ...], creature: int) -> dict[str, list[float]]:
        """A value for each image."""
        references = self.scorer.embed_images([p for p, _ in world.subject_images(creature, 24, seed=2)])
        real = float(leave_one_out_similarity(references).mean())
        before = float(clip_i(self.scorer.embed_images(self.base[1]), references).mean())
        things, subject = self.draw(adapters)
        likeness = (clip_i(self.scorer.embed_images(subject), references) - before) / (real - before)
        right, certainty = self.read(things)
        asked = zip(self.judge.classify(subject), scenes_and_places(), strict=True)
        return {
            "details": right.mean(1).tolist(),
            "certainty": certainty.mean(1).tolist(),
            "likeness": likeness.tolist(),
            "place": [float(answer["place"] == place) for answer, (_, place) in asked],
            "sharpness": (edge_energy(things) / edge_energy(self.base[0]).mean()).tolist(),
        }

    @torch.no_grad()
    def read(self, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each detail is as asked, and its log-probability, both (N, details)."""
        logits, goal = (
            self.judge(images_to_pixels(images)),
            torch.tensor([label_indices(thing) for thing in self.things]),
        )
        goals = {name: goal[:, number] for number, name in enumerate(ANSWERS) if name in DETAILS}
        right = [(logits[name].argmax(-1) == own).float() for name, own in goals.items()]
        chances = [logits[name].log_softmax(-1).gather(1, own[:, None])[:, 0] for name, own in goals.items()]
        return torch.stack(right, 1), torch.stack(chances, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--images", choices=("creature", "ordinary"), default="creature")
    parser.add_argument("--preservation-weight", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=4, help="of each way, each with a seed of its own")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--own-steps", type=int, default=600, help="of the training adapter")
    parser.add_argument("--own-images", type=int, default=400)
    parser.add_argument("--things", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/distilled-bases"))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    compute_one_padding_token()
    started = time.perf_counter()
    undo = options.work / "undo"
    if "undone" in options.ways and not (undo / "adapter").is_dir():
        quiet = {
            "threads": options.threads,
            "steps": options.own_steps,
            "preservation_weight": 0.0,
            "class_noun": "image",
        }
        dedistill(SubjectConfig(base=BASE, out=undo, **(TRAINING | quiet)), None, options.own_images, overwrite=True)
    measuring = Measuring(options.things)
    settings_of: dict[str, dict[str, Any]] = {
        "plain": {},
        "undone": {"training_adapter": undo},
        "guided": {"target_guidance": 3.0},
        "teacher": {"base": "tiny-dit"},
    }
    found: dict[str, dict[str, list[list[float]]]] = {}
    add(found, "base", {k: v for k, v in measuring.figures((), FIRST).items() if k != "likeness"})
    for number in range(options.runs):
        creature = FIRST + number
        folder = options.work / f"{options.images}-{number}"
        images = (write_captioned_folder if options.images == "creature" else write_ordinary_folder)(creature, folder)
        for name in options.ways:
            shutil.rmtree(out := options.work / "run", ignore_errors=True)
            quiet = {"steps": options.steps, "threads": options.threads, "seed": number}
            quiet |= {"preservation_weight": options.preservation_weight}
            own_settings = {"base": BASE} | TRAINING | quiet | settings_of[name]
            run = train(SubjectConfig(images=images, out=out, **own_settings))
            own = measuring.figures((str(run.adapter),), creature)
            if options.images == "ordinary":  # which show no creature
                own = {key: values for key, values in own.items() if key not in ("likeness", "place")}
            add(found, name, own)
            print(creature, name, {k: round(sum(v) / len(v), 3) for k, v in own.items()}, flush=True)
        report(found, options, time.perf_counter() - started)


def add(found: dict[str, dict[str, list[list[float]]]], name: str, values: dict[str, list[float]]) -> None:
    """Puts the values of one run beside those of others."""
    for key, own in values.items():
        found.setdefault(name, {}).setdefault(key, []).append(own)


def report(found: dict[str, dict[str, list[list[float]]]], options: argparse.Namespace, seconds: float) -> None:
    """Prints the table and writes it: means with intervals, and the paired differences from the plain way."""
    rows: dict[str, Any] = {name: {key: interval(own) for key, own in values.items()} for name, values in found.items()}
    for name in options.ways if "plain" in found else ():
        if name != "plain":
            rows[f"{name} less plain"] = {
                key: interval((torch.tensor(own) - torch.tensor(found["plain"][key])).tolist())
                for key, own in found[name].items()
            }
    for name, row in rows.items():
        print(
            f"{name:18}", *(f"{key} {m:.3f} ({low:.3f} to {high:.3f})" for key, (m, low, high) in row.items()), sep="  "
        )
    if options.out:
        settings = {k: v for k, v in vars(options).items() if k not in ("out", "work")}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps({"settings": settings, "seconds": round(seconds), "rows": rows}, indent=1), encoding="utf-8"
        )


def interval(values: list[list[float]]) -> tuple[float, float, float]:
    """Mean and bootstrap interval over prompts, each by its mean over the runs; values: of each run, by prompt."""
    by_prompt = torch.tensor(values).mean(0)
    return (float(by_prompt.mean()), *bootstrap_interval(by_prompt))


if __name__ == "__main__":
    main()
