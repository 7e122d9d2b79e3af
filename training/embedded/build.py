"""Builds the embedded models from scratch: `rankfold build-tiny`.

Stages: images -> judge -> vae -> clip -> draft -> unet, dit beside the last two, edits -> kontext, which need vae and clip, and
vlm-draft -> vlm, which need none of them. A finished stage leaves its file, so a stopped build goes on where it was. Every stage appends
its curve to curves.jsonl. Nothing is downloaded; the images are drawn by toolkit/embedded/world.py.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ...toolkit.embedded import judge as judging
from ...toolkit.embedded import tiny_sd as tiny
from ...toolkit.embedded import world
from .dit import train_dit
from .kontext import draw_edits, train_kontext
from .loop import BuildTinyConfig, fit, load_as_fp32, load_images, log_values, shuffled_batches, to_pixels
from .turbo import train_turbo
from .unet import train_draft, train_unet
from .vlm import train_vlm, train_vlm_draft


def build_tiny(config: BuildTinyConfig) -> None:
    """Runs the stages that have not left their file yet."""
    torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    config.work.mkdir(parents=True, exist_ok=True)
    stages = {
        "pictures": (config.work / "pairs.npy", draw_images),
        "judge": (config.out / "judge.safetensors", train_judge),
        "vae": (config.out / "sd" / "vae" / "config.json", train_vae),
        "clip": (config.out / "clip" / "open_clip_config.json", train_clip),
        "draft": (config.work / "sd-draft" / "model_index.json", train_draft),
        "unet": (config.out / "sd" / "model_index.json", train_unet),
        "dit": (config.out / "dit" / "model_index.json", train_dit),
        "turbo": (config.out / "turbo" / "model_index.json", train_turbo),
        "edits": (config.work / "edits.json", draw_edits),
        "kontext": (config.out / "kontext" / "model_index.json", train_kontext),
        "vlm-draft": (config.work / "vlm-draft" / "processor_config.json", train_vlm_draft),
        "vlm": (config.out / "vlm" / "processor_config.json", train_vlm),
    }
    for name in config.stages:
        done, stage = stages[name]
        if done.exists():
            print(f"{name}: there already ({done})")
            continue
        start = time.time()
        torch.manual_seed(config.seed)
        stage(config)
        log_values(config, stage=name, seconds=round(time.time() - start, 1))


# ---------------------------------------------------------------------------------------------- images


def _draw(job: tuple[int, int]) -> tuple[np.ndarray, str, list[int]]:
    seed, index = job
    image, text, thing = world.draw_sample(seed, index)
    return np.asarray(image), text, judging.label_indices(thing)


def _draw_pair(job: tuple[int, int]) -> np.ndarray:
    seed, creature = job
    rng = np.random.default_rng((seed, 3, creature))
    views = [world.draw(world.random_creature_thing(rng, creature), rng) for _ in range(2)]
    return np.stack([np.asarray(view) for view in views])


def draw_images(config: BuildTinyConfig) -> None:
    """Draws the training set once: images (N, 64, 64, 3), captions, labels, and pairs of views of one creature."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        jobs = [(config.seed, i) for i in range(config.images)]
        rows = pool.map(_draw, jobs, chunksize=500)
        pairs = pool.map(_draw_pair, [(config.seed, i) for i in range(config.creature_pairs)], chunksize=500)
    np.save(config.work / "pictures.npy", np.stack([row[0] for row in rows]))
    np.save(config.work / "labels.npy", np.array([row[2] for row in rows]))
    (config.work / "captions.json").write_text(json.dumps([row[1] for row in rows]), encoding="utf-8")
    np.save(config.work / "pairs.npy", np.stack(pairs))


# ---------------------------------------------------------------------------------------------- judge


def train_judge(config: BuildTinyConfig) -> None:
    """Trains the judge on the drawn images."""
    images = load_images(config)
    labels = torch.from_numpy(np.load(config.work / "labels.npy"))
    model = judging.Judge()

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        logits = model(to_pixels(images[rows]))
        losses = [
            F.cross_entropy(logits[name].float(), labels[rows, i], ignore_index=judging.IGNORE, label_smoothing=0.02)
            for i, name in enumerate(judging.ANSWERS)
        ]
        return torch.stack(losses).sum()

    steps = 3_000
    batches = shuffled_batches(len(images), 64, steps, config.seed)
    fit(config, "judge", list(model.parameters()), batches, loss_of, steps=steps, lr=3e-3, bf16=False)
    judging.save_judge(model, config.out / "judge.safetensors")


# ---------------------------------------------------------------------------------------------- vae


def pixel_gradients(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences between neighbouring pixels (B, C, H, W), across and down."""
    return pixels[..., 1:] - pixels[..., :-1], pixels[..., 1:, :] - pixels[..., :-1, :]


def train_vae(config: BuildTinyConfig) -> None:
    """Trains the autoencoder: L1 + squared error + edges + a little KL; then measures the latents' scale."""
    images = load_images(config)
    pairs = torch.from_numpy(np.load(config.work / "pairs.npy")[:10_000, 0]).permute(0, 3, 1, 2)
    images = torch.cat((images, pairs))
    vae = tiny.make_vae()

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        pixels = to_pixels(images[rows])
        posterior = vae.encode(pixels).latent_dist
        back = vae.decode(posterior.sample()).sample.float()
        sharp = sum((a - b).abs().mean() for a, b in zip(pixel_gradients(back), pixel_gradients(pixels), strict=True))
        return F.l1_loss(back, pixels) + 2 * F.mse_loss(back, pixels) + 0.5 * sharp + 1e-6 * posterior.kl().mean()

    # Small batches: edges are learned by many steps rather than by many images.
    batches = shuffled_batches(len(images), 12, config.vae_steps, config.seed)
    fit(config, "vae", list(vae.parameters()), batches, loss_of, steps=config.vae_steps, lr=2e-3, bf16=True, every=250)
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(to_pixels(images[:2000])).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    tiny.collapse_posterior(vae).half().save_pretrained(config.out / "sd" / "vae")


# ---------------------------------------------------------------------------------------------- clip


def train_clip(config: BuildTinyConfig) -> None:
    """Trains the open_clip model on captions and on pairs of views of creatures; copies its text tower out."""
    import open_clip

    images = load_images(config)
    captions = json.loads((config.work / "captions.json").read_text(encoding="utf-8"))
    pairs = torch.from_numpy(np.load(config.work / "pairs.npy")).permute(0, 1, 4, 2, 3)
    tokenizer = tiny.make_tokenizer()
    ids = torch.tensor(tokenizer(captions, padding="max_length", truncation=True).input_ids)
    settings = tiny.open_clip_config(tokenizer)
    model = open_clip.model.CLIP(**settings["model_cfg"])
    twins = shuffled_batches(len(pairs), 64, config.clip_steps, config.seed + 1)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        pair = to_pixels(pairs[next(twins)])
        pixels = torch.cat((to_pixels(images[rows]), pair[:, 0], pair[:, 1]))
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

    batches = shuffled_batches(len(images), 96, config.clip_steps, config.seed)
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
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
