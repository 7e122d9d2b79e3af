"""Builds the embedded models from scratch: `rankfold build-tiny`.

Stages: pictures -> judge -> vae -> clip -> draft -> unet. A finished stage leaves its file, so a stopped build goes on where it was.
Every stage appends its curve to curves.jsonl. Nothing is downloaded; the pictures are drawn by toolkit/data/world.py.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..toolkit.data import world
from ..toolkit.models import judge as judging
from ..toolkit.models import tiny


@dataclass(frozen=True, kw_only=True)
class BuildTinyConfig:
    """Builds the embedded models from drawn pictures (about two and a half hours on two cores)."""

    out: Path = Path("assets/tiny")
    """Folder of the finished models."""
    work: Path = Path("runs/build-tiny")
    """Folder of pictures, latents and curves; may be deleted afterwards."""
    pictures: int = 60_000
    """Number of drawn training pictures."""
    creature_pairs: int = 20_000
    """Number of creatures drawn twice, for the CLIP model's sense of identity."""
    vae_steps: int = 10_000
    clip_steps: int = 1_200
    unet_steps: int = 9_000
    """Steps of each of the denoiser's two rounds."""
    seed: int = 0
    stages: tuple[str, ...] = ("pictures", "judge", "vae", "clip", "draft", "unet")
    """Stages to run; each needs the ones before it (clip needs only the pictures)."""
    threads: int = 2
    """Torch threads."""


def build_tiny(config: BuildTinyConfig) -> None:
    """Runs the stages that have not left their file yet."""
    torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    config.work.mkdir(parents=True, exist_ok=True)
    stages = {
        "pictures": (config.work / "pairs.npy", draw_pictures),
        "judge": (config.out / "judge.safetensors", train_judge),
        "vae": (config.out / "sd" / "vae" / "config.json", train_vae),
        "clip": (config.out / "clip" / "open_clip_config.json", train_clip),
        "draft": (config.work / "sd-draft" / "model_index.json", train_draft),
        "unet": (config.out / "sd" / "model_index.json", train_unet),
    }
    for name in config.stages:
        done, stage = stages[name]
        if done.exists():
            print(f"{name}: there already ({done})")
            continue
        start = time.time()
        torch.manual_seed(config.seed)
        stage(config)
        note(config, stage=name, seconds=round(time.time() - start, 1))


def note(config: BuildTinyConfig, **values: object) -> None:
    """Prints a line and appends it to the curves."""
    print(json.dumps(values), flush=True)
    with (config.work / "curves.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


# ---------------------------------------------------------------------------------------------- pictures


def _draw(job: tuple[int, int]) -> tuple[np.ndarray, str, list[int]]:
    seed, index = job
    picture, text, thing = world.sample(seed, index)
    return np.asarray(picture), text, judging.labels(thing)


def _draw_pair(job: tuple[int, int]) -> np.ndarray:
    seed, creature = job
    rng = np.random.default_rng((seed, 3, creature))
    views = [world.draw(world.random_creature_thing(rng, creature), rng) for _ in range(2)]
    return np.stack([np.asarray(view) for view in views])


def draw_pictures(config: BuildTinyConfig) -> None:
    """Draws the training set once: pictures (N, 64, 64, 3), captions, labels, and pairs of views of one creature."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        jobs = [(config.seed, i) for i in range(config.pictures)]
        rows = pool.map(_draw, jobs, chunksize=500)
        pairs = pool.map(_draw_pair, [(config.seed, i) for i in range(config.creature_pairs)], chunksize=500)
    np.save(config.work / "pictures.npy", np.stack([row[0] for row in rows]))
    np.save(config.work / "labels.npy", np.array([row[2] for row in rows]))
    (config.work / "captions.json").write_text(json.dumps([row[1] for row in rows]))
    np.save(config.work / "pairs.npy", np.stack(pairs))


def load_pictures(config: BuildTinyConfig) -> torch.Tensor:
    """The drawn pictures, uint8 (N, 3, 64, 64)."""
    return torch.from_numpy(np.load(config.work / "pictures.npy")).permute(0, 3, 1, 2).contiguous()


def to_pixels(bytes_BCHW: torch.Tensor) -> torch.Tensor:
    """uint8 -> float in [-1, 1]."""
    return bytes_BCHW.float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------- a small loop


def shuffled(n: int, batch: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Index batches over shuffled passes of n rows."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    at = 0
    for _ in range(steps):
        if at + batch > n:
            order, at = torch.randperm(n, generator=generator), 0
        yield order[at : at + batch]
        at += batch


def fit(
    config: BuildTinyConfig,
    name: str,
    parameters: list[nn.Parameter],
    batches: Iterator[torch.Tensor],
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    *,
    steps: int,
    lr: float,
    bf16: bool,
    after: Callable[[int], None] = lambda step: None,
    every: int = 100,
) -> None:
    """AdamW with warm-up and cosine decay; `after(step)` runs behind every step."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.99))
    warm = max(1, min(200, steps // 20))
    total, start = 0.0, time.time()
    for step, rows in enumerate(batches, 1):
        rate = lr * min(step / warm, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext():
            loss = loss_of(rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        total += loss.item()
        after(step)
        if step % every == 0:
            note(config, stage=name, step=step, loss=round(total / every, 5), seconds=round(time.time() - start, 1))
            total = 0.0


# ---------------------------------------------------------------------------------------------- judge


def train_judge(config: BuildTinyConfig) -> None:
    """Trains the judge on the drawn pictures."""
    pictures = load_pictures(config)
    labels = torch.from_numpy(np.load(config.work / "labels.npy"))
    model = judging.Judge()

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        logits = model(to_pixels(pictures[rows]))
        losses = [
            F.cross_entropy(logits[name].float(), labels[rows, i], ignore_index=judging.IGNORE, label_smoothing=0.02)
            for i, name in enumerate(judging.ANSWERS)
        ]
        return torch.stack(losses).sum()

    steps = 3_000
    batches = shuffled(len(pictures), 64, steps, config.seed)
    fit(config, "judge", list(model.parameters()), batches, loss_of, steps=steps, lr=3e-3, bf16=False)
    judging.save_judge(model, config.out / "judge.safetensors")


# ---------------------------------------------------------------------------------------------- vae


def edges(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences between neighbouring pixels, across and down."""
    return pixels[..., 1:] - pixels[..., :-1], pixels[..., 1:, :] - pixels[..., :-1, :]


def train_vae(config: BuildTinyConfig) -> None:
    """Trains the autoencoder: L1 + squared error + edges + a little KL; then measures the latents' scale."""
    pictures = load_pictures(config)
    pairs = torch.from_numpy(np.load(config.work / "pairs.npy")[:10_000, 0]).permute(0, 3, 1, 2)
    pictures = torch.cat((pictures, pairs))
    vae = tiny.make_vae()

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        pixels = to_pixels(pictures[rows])
        posterior = vae.encode(pixels).latent_dist
        back = vae.decode(posterior.sample()).sample.float()
        sharp = sum((a - b).abs().mean() for a, b in zip(edges(back), edges(pixels), strict=True))
        return F.l1_loss(back, pixels) + 2 * F.mse_loss(back, pixels) + 0.5 * sharp + 1e-6 * posterior.kl().mean()

    # Small batches: edges are learned by many steps rather than by many pictures.
    batches = shuffled(len(pictures), 12, config.vae_steps, config.seed)
    fit(config, "vae", list(vae.parameters()), batches, loss_of, steps=config.vae_steps, lr=2e-3, bf16=True, every=250)
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(to_pixels(pictures[:2000])).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    tiny.without_spread(vae).half().save_pretrained(config.out / "sd" / "vae")


# ---------------------------------------------------------------------------------------------- clip


def train_clip(config: BuildTinyConfig) -> None:
    """Trains the open_clip model on captions and on pairs of views of creatures; copies its text tower out."""
    import open_clip

    pictures = load_pictures(config)
    captions = json.loads((config.work / "captions.json").read_text())
    pairs = torch.from_numpy(np.load(config.work / "pairs.npy")).permute(0, 1, 4, 2, 3)
    tokenizer = tiny.make_tokenizer()
    ids = torch.tensor(tokenizer(captions, padding="max_length", truncation=True).input_ids)
    settings = tiny.open_clip_config(tokenizer)
    model = open_clip.model.CLIP(**settings["model_cfg"])
    twins = shuffled(len(pairs), 64, config.clip_steps, config.seed + 1)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        pair = to_pixels(pairs[next(twins)])
        pixels = torch.cat((to_pixels(pictures[rows]), pair[:, 0], pair[:, 1]))
        image = F.normalize(model.encode_image(pixels).float(), dim=-1)
        text = F.normalize(model.encode_text(ids[rows]).float(), dim=-1)
        seen, first, second = image.split((len(rows), len(pair), len(pair)))
        scale = model.logit_scale.exp().clamp(max=100).float()
        # Rows with the same words are all right answers to one another.
        same = (ids[rows][:, None] == ids[rows][None]).all(-1).float()
        same = same / same.sum(1, keepdim=True)
        logits = scale * seen @ text.T
        words = F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)
        views = 15 * torch.cat((first, second)) @ torch.cat((first, second)).T
        views = views - 1e4 * torch.eye(len(views))
        twin = torch.arange(len(views)).roll(len(pair))
        return words + 2 * F.cross_entropy(views, twin)

    batches = shuffled(len(pictures), 96, config.clip_steps, config.seed)
    fit(config, "clip", list(model.parameters()), batches, loss_of, steps=config.clip_steps, lr=1e-3, bf16=True)
    save_clip(model.eval(), settings, tokenizer, config.out)


def save_clip(model: nn.Module, settings: dict, tokenizer, out: Path) -> None:
    """Writes the open_clip folder and the pipeline's tokenizer and text encoder, all in fp16."""
    from safetensors.torch import save_file

    folder = out / "clip"
    tokenizer.save_pretrained(folder)
    tokenizer.save_pretrained(out / "sd" / "tokenizer")
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    encoder = tiny.make_text_encoder(tokenizer)
    tiny.copy_text_tower(model, encoder)
    encoder.half().save_pretrained(out / "sd" / "text_encoder")
    load_as_fp32(out / "sd" / "text_encoder")
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=2))


# ---------------------------------------------------------------------------------------------- unet


@torch.no_grad()
def encode_all(config: BuildTinyConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents fp16 (N, 16, 8, 8), prompt states fp16 (words, 24, 128) of the distinct captions, and each row's caption."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    kept = config.work / "latents.pt"
    if kept.exists():
        return torch.load(kept, weights_only=True)
    vae = AutoencoderKL.from_pretrained(config.out / "sd" / "vae", dtype=torch.float32)
    encoder = CLIPTextModel.from_pretrained(config.out / "sd" / "text_encoder", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(config.out / "sd" / "tokenizer")
    pictures = load_pictures(config)
    latents = [vae.encode(to_pixels(rows)).latent_dist.mean.half() for rows in pictures.split(250)]
    captions = json.loads((config.work / "captions.json").read_text())
    distinct = ["", *sorted(set(captions))]
    number = {text: i for i, text in enumerate(distinct)}
    ids = torch.tensor(tokenizer(distinct, padding="max_length", truncation=True).input_ids)
    states = [encoder(rows).last_hidden_state.half() for rows in ids.split(500)]
    made = (
        torch.cat(latents) * vae.config.scaling_factor,
        torch.cat(states),
        torch.tensor([number[t] for t in captions]),
    )
    torch.save(made, kept)
    return made


def train_draft(config: BuildTinyConfig) -> None:
    """The denoiser's first round, from scratch, all timesteps alike."""
    train_round("draft", config, tiny.make_unet(), config.work / "sd-draft", seed=config.seed, lr=1.2e-3, middle=0.0)


def train_unet(config: BuildTinyConfig) -> None:
    """The second round goes on from the first, half of it on the middle timesteps, where shapes are decided."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(config.work / "sd-draft" / "unet", dtype=torch.float32)
    train_round("unet", config, unet, config.out / "sd", seed=config.seed + 1, lr=8e-4, middle=0.5)


def draw_timesteps(n: int, middle: float, generator: torch.Generator) -> torch.Tensor:
    """Timesteps (n,) in 0..999: uniform, but for the share `middle`, which is logit-normal (0, 0.7)."""
    uniform = torch.rand(n, generator=generator)
    centred = (0.7 * torch.randn(n, generator=generator)).sigmoid()
    chosen = torch.where(torch.rand(n, generator=generator) < middle, centred, uniform)
    return (chosen * 1000).long().clamp(max=999)


def train_round(
    stage: str, config: BuildTinyConfig, unet: nn.Module, out: Path, *, seed: int, lr: float, middle: float
) -> None:
    """Trains the denoiser on cached latents with the text encoder frozen; writes its exponential average as a pipeline."""
    from diffusers.training_utils import EMAModel

    latents, states, which = encode_all(config)
    unet.train()
    scheduler = tiny.make_scheduler()
    average = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    generator = torch.Generator().manual_seed(seed)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        clean = latents[rows].float()
        words = which[rows].clone()
        words[torch.rand(len(rows), generator=generator) < 0.1] = 0  # the empty prompt, for guidance
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = draw_timesteps(len(rows), middle, generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = scheduler.get_velocity(clean, noise, timesteps)
        guess = unet(noisy, timesteps, encoder_hidden_states=states[words].float()).sample
        return F.mse_loss(guess, target)

    def after(step: int) -> None:
        average.step(unet.parameters())
        if step % 1500 == 0 and step < steps:
            save_pipeline(config, unet, average, config.work / f"{stage}-{step:05d}")

    steps = config.unet_steps
    batches = shuffled(len(latents), 64, steps, seed)
    fit(config, stage, list(unet.parameters()), batches, loss_of, steps=steps, lr=lr, bf16=False, after=after)
    save_pipeline(config, unet, average, out)


def save_pipeline(config: BuildTinyConfig, unet: nn.Module, average, folder: Path) -> None:
    """Writes the whole StableDiffusionPipeline with the averaged denoiser, in fp16."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    average.store(unet.parameters())
    average.copy_to(unet.parameters())
    shadow = tiny.make_unet()
    shadow.load_state_dict(unet.state_dict())
    average.restore(unet.parameters())
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(config.out / "sd" / "vae", dtype=torch.float16),
        text_encoder=CLIPTextModel.from_pretrained(config.out / "sd" / "text_encoder", dtype=torch.float16),
        tokenizer=CLIPTokenizer.from_pretrained(config.out / "sd" / "tokenizer"),
        unet=shadow.half(),
        scheduler=tiny.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    load_as_fp32(folder / "text_encoder")


def load_as_fp32(folder: Path) -> None:
    """Notes fp32 in the config beside fp16 weights: transformers loads what the config says, diffusers always fp32, and the
    two halves of a pipeline must agree when nobody names a dtype.
    """
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2))
