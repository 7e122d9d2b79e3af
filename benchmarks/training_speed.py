"""Training speed: ours against a plain loop that runs VAE and text encoder in every step, alternating in one process.

    python benchmarks/training_speed.py [--rounds 5] [--steps 200] [--out benchmarks/results/training_speed.json]

Same model, images, batch, adapter, optimizer and steps on both sides. For each round and side the whole run is timed
(set-up, caching and all) and so is the median step. The parts of a step are timed too, and the ratio that the removed work
predicts is computed from them: (encode + denoise + optimizer) / (denoise + optimizer).
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

BATCH = 4


def config_for(folder: Path, images: Path, base: str, steps: int, threads: int):
    from rankfold.training.config.subject import SubjectConfig

    return SubjectConfig(
        base=base,
        images=images,
        out=folder,
        steps=steps,
        batch_size=BATCH,
        preview_every=0,
        checkpoint_every=steps,
        log_every=50,
        threads=threads,
        adapter="lora",
        preservation_weight=0.0,  # the other side does without
    )


class Clock:
    """Adds up the time spent in the calls it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, call):
        def call(*arguments, **named):
            begin = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - begin

        return call


def ours(images: Path, base: str, steps: int, threads: int) -> dict[str, float]:
    """One whole run with an empty cache: seconds, those of a median step, its share outside forward, backward and optimizer."""
    from rankfold.training.engine import loop
    from rankfold.training.engine.progress import peak_memory_gib
    from rankfold.training.launch import start

    clock, marks = Clock(), []
    begin_loop, one_step = loop.Loop.__init__, loop.Loop.train_step

    def begin(self, *arguments):
        begin_loop(self, *arguments)
        self.backward = clock.wrap(self.backward)
        self.optimizer.step = clock.wrap(self.optimizer.step)

    def step(self):
        marks.append((time.perf_counter(), clock.seconds))
        one_step(self)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["RANKFOLD_CACHE"] = f"{folder}/cache"
        config = config_for(Path(folder) / "run", images, base, steps, threads)
        loop.Loop.__init__, loop.Loop.train_step = begin, step
        began = time.perf_counter()
        try:
            start.train(config)
        finally:
            loop.Loop.__init__, loop.Loop.train_step = begin_loop, one_step
        total = time.perf_counter() - began
    pairs = list(itertools.pairwise(marks))
    gaps = [after[0] - before[0] for before, after in pairs]
    outside = [1 - (after[1] - before[1]) / gap for (before, after), gap in zip(pairs, gaps, strict=True)]
    return {
        "run": total,
        "step": statistics.median(gaps),
        "outside": statistics.median(outside),
        "peak": peak_memory_gib(),
    }


def run_example_loop(images: Path, base: str, steps: int, threads: int) -> dict[str, float]:
    """The common example script's loop: images and prompts are encoded in every step."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from peft import LoraConfig
    from PIL import Image
    from torchvision import transforms
    from transformers import CLIPTextModel, CLIPTokenizer

    from rankfold.toolkit.diffusion.model import ATTENTION_TARGETS
    from rankfold.training.engine.progress import peak_memory_gib

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    start = time.perf_counter()
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.float32).requires_grad_(
        False
    )
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae", dtype=torch.float32).requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", dtype=torch.float32).requires_grad_(False)
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=list(ATTENTION_TARGETS)))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    schedule = get_scheduler("constant", optimizer)
    side = unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    prepare = transforms.Compose(
        [
            transforms.Resize(side),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    files = sorted(images.glob("*.png"))
    texts = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 10**6

        def __getitem__(self, number):
            k = number % len(files)
            ids = tokenizer(texts[k], padding="max_length", truncation=True, return_tensors="pt").input_ids[0]
            return prepare(Image.open(files[k]).convert("RGB")), ids

    gaps, encoding = [], []
    before = time.perf_counter()
    for step, (pixels, ids) in enumerate(torch.utils.data.DataLoader(Images(), batch_size=BATCH)):
        if step == steps:
            break
        with torch.no_grad():
            begin = time.perf_counter()
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            states = text_encoder(ids)[0]
            encoding.append(time.perf_counter() - begin)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        velocity = scheduler.config.prediction_type == "v_prediction"
        goal = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        loss = torch.nn.functional.mse_loss(unet(noisy, timesteps, states).sample, goal)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.item()
        gaps.append(time.perf_counter() - before)
        before = time.perf_counter()
    return {
        "run": time.perf_counter() - start,
        "step": statistics.median(gaps),
        "encode": statistics.median(encoding),
        "peak": peak_memory_gib(),
    }


def in_own_process(side, *arguments) -> dict[str, float]:
    """Runs one side in a process of its own, so that peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(side, arguments)


def median_and_range(values: list[float]) -> str:
    return f"{statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).parent.parent
    parser.add_argument("--base", default=str(root / "assets" / "tiny" / "sd"))
    parser.add_argument("--images", type=Path, default=root / "assets" / "demo" / "creature")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
    for number in range(options.rounds):
        sides = [("ours", ours), ("plain", run_example_loop)]
        for name, side in sides if number % 2 == 0 else sides[::-1]:
            rows[name].append(in_own_process(side, options.images, options.base, options.steps, options.threads))
    for figure, unit in (("step", "s"), ("run", "s"), ("peak", "GiB")):
        mine, theirs = ([row[figure] for row in rows[name]] for name in ("ours", "plain"))
        ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
        print(
            f"{figure:>5} [{unit}]  ours {median_and_range(mine)}  plain {median_and_range(theirs)}  plain/ours {median_and_range(ratios)}"
        )
    predicted = [row["step"] / (row["step"] - row["encode"]) for row in rows["plain"]]
    print(f"predicted from the removed work: {median_and_range(predicted)}")
    outside = [row["outside"] for row in rows["ours"]]
    print(f"share of our step outside forward, backward and optimizer: {median_and_range(outside)}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
