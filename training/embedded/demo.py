"""Before and after: likeness to held-out images of the subject, and whether scene and place still follow the prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...pipelines.generate import Recipe, generate, image_grid, sampling_pipeline
from ...toolkit.core.files import write_png, write_text
from ...toolkit.core.run_folder import Run
from ...toolkit.embedded import world
from ...toolkit.metrics.clip import ClipScorer, clip_i, leave_one_out_similarity, load_embedded_judge
from ...toolkit.metrics.statistics import bootstrap_interval
from ..config.yaml_file import from_yaml

REFERENCES = 24  # held-out renders of the subject
HELD_OUT_SEED = 1  # the training images are drawn with seed 0


def scenes_and_places() -> list[tuple[str, str]]:
    """(scene, place) of the test prompts: every scene twice, the places in turn."""
    places = list(world.PLACES)
    return [(scene, places[(2 * number + turn) % 5]) for turn in range(2) for number, scene in enumerate(world.SCENES)]


def prompt_for(subject: str, scene: str, place: str) -> str:
    """A test prompt."""
    where = "in the centre" if place == "centre" else f"at the {place}"
    return f"a large {subject} {world.SCENES[scene]} {where}"


def measure_before_and_after(run: Run, creature: int, *, seed: int = 0, each: int = 4) -> dict[str, float]:
    """Measures base and adapter on the same prompts and seeds; writes figures.json and before_after.png into the run.

    `closed` is the share of the base model's distance to the real images (mean cosine among references) that the
    adapter has closed. Intervals are bootstrap, over images.
    """
    config = from_yaml(run.config_file)
    judge, scorer = load_embedded_judge(), ClipScorer()
    references = scorer.embed_images([p for p, _ in world.subject_images(creature, REFERENCES, seed=HELD_OUT_SEED)])
    real = leave_one_out_similarity(references)
    subject = f"{config.token} {config.class_noun}"
    base = Recipe(prompt="", base=config.base, seed=seed + 1000, guidance_scale=config.guidance_scale)
    tuned = replace(base, adapters=(str(run.adapter),), strengths=(1.0,))
    figures: dict[str, float] = {"clip_i_real": float(real.mean())}
    rows = []
    for name, recipe in (("before", base), ("after", tuned)):
        pipe = sampling_pipeline(recipe)
        scenes, places, images, shown = [], [], [], []
        for scene, place in scenes_and_places():
            made = [p for p, _ in generate(replace(recipe, prompt=prompt_for(subject, scene, place)), each, pipe=pipe)]
            answers = judge.classify(made)
            scenes += [answer["scene"] == scene for answer in answers]
            places += [answer["place"] == place for answer in answers]
            images += made
            shown.append(made[0])
        likeness = clip_i(scorer.embed_images(images), references)
        low, high = bootstrap_interval(likeness)
        figures |= {f"clip_i_{name}": float(likeness.mean()), f"clip_i_{name}_low": low, f"clip_i_{name}_high": high}
        figures |= {f"scene_{name}": sum(scenes) / len(scenes), f"place_{name}": sum(places) / len(places)}
        rows.append(shown[:8])
    distance = figures["clip_i_real"] - figures["clip_i_before"]
    figures["closed"] = (figures["clip_i_after"] - figures["clip_i_before"]) / distance
    write_text(run.folder / "figures.json", json.dumps(figures, indent=1))
    write_sheet(run.folder / "before_after.png", Path(config.images or ""), rows)
    return figures


def write_sheet(path: Path, images: Path, rows: list[list]) -> None:
    """The training images above the generated ones, at twice their size."""
    from PIL import Image

    real = [Image.open(file).convert("RGB").resize((64, 64)) for file in sorted(images.glob("*.png"))[:8]]
    blank = Image.new("RGB", (64, 64), "white")
    cells = real + [blank] * (8 - len(real))
    for row in rows:
        cells += row
    sheet = image_grid(cells, columns=8)
    sheet = sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST)
    write_png(path, sheet)


# The adapter may reach every linear layer of the transformer blocks and the text encoder's attention, and easy timesteps
# count less. Guidance above 2 burns the colours of this small model. Steps and learning rate: benchmarks/demo_settings.py.
DEMO_TRAINING: dict[str, Any] = {
    "batch_size": 4,
    "rank": 8,
    "alpha": 8.0,
    "learning_rate": 1e-3,
    "min_snr_gamma": 5.0,
    "train_text_encoder": True,
    "target_modules": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    "preview_every": 100,
    "guidance_scale": 2.0,
}

DEMO_SETTINGS: dict[str, dict[str, Any]] = {
    "tiny": DEMO_TRAINING,
    "tiny-dit": DEMO_TRAINING
    | {
        "min_snr_gamma": None,
        "target_modules": (
            *DEMO_TRAINING["target_modules"],
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "to_add_out",
        ),
    },
}
