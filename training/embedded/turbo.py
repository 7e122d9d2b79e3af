"""The embedded flow transformer distilled to four steps without guidance, as the turbo models that people own are.

Piecewise rectified flow (Yan et al. 2024, PeRFlow, arXiv 2405.07510): the teacher's guided way from noise to image is cut into four
windows, and in each the student learns the straight line from where the teacher enters to where it leaves. Four of its steps are then
the teacher's twelve, with the guidance inside. Nothing but the teacher and words is needed.
"""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...toolkit.embedded import tiny_dit, world
from ...toolkit.embedded import tiny_sd as tiny
from .dit import Learner
from .loop import BuildTinyConfig, copy_average, fit, shuffled_batches

WINDOWS = 4  # steps of the student
TEACHER_STEPS = 12  # three to a window
GUIDANCE = 3.0  # of the teacher, which the student learns to do without
ROWS = 64  # of a batch


def train_turbo(config: BuildTinyConfig) -> None:
    """Follows the teacher on as many prompts as the config says, trains the student on what it did, and writes the student's average."""
    from diffusers.training_utils import EMAModel

    words = Words(config)
    torch.manual_seed(config.seed)
    teacher = open_learner(config)
    ways, which = follow_teacher(config, torch.compile(teacher), words)
    student = open_learner(config)
    student.second.requires_grad_(False)
    student.train()
    average = EMAModel(student.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    generator, velocity = torch.Generator().manual_seed(config.seed), torch.compile(student)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        """rows: numbers of a window of a way."""
        way, window = rows // WINDOWS, rows % WINDOWS
        enters, leaves = ways[way, window].float(), ways[way, window + 1].float()
        inside = torch.rand(len(rows), generator=generator)
        inside[torch.rand(len(rows), generator=generator) < 0.5] = 0.0  # where sampling asks
        sigmas = 1 - (window + inside) / WINDOWS
        noisy = enters + inside.view(-1, 1, 1, 1) * (leaves - enters)
        pred = velocity(noisy, sigmas, *words.of(which[way]))
        return F.mse_loss(pred.float(), (enters - leaves) * WINDOWS)

    steps = config.turbo_steps
    parameters = list(student.transformer.parameters())
    batches = shuffled_batches(len(ways) * WINDOWS, ROWS, steps, config.seed)
    after = lambda step: average.step(student.parameters())  # noqa: E731
    fit(config, "turbo", parameters, batches, loss_of, steps=steps, lr=5e-4, bf16=True, after=after)
    save_turbo(config, student, average)


class Words:
    """Prompts as both text encoders say them; number 0 is the empty one, for guidance."""

    def __init__(self, config: BuildTinyConfig) -> None:
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        folder = config.out / "dit"
        texts = ["", *world.random_captions(config.turbo_prompts, np.random.default_rng((config.seed, 71)))]
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.ids = torch.tensor(tokenizer(texts, padding="max_length", truncation=True).input_ids)
        encoder = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
        with torch.no_grad():
            said = [encoder(rows, output_hidden_states=True) for rows in self.ids.split(500)]
        self.states = torch.cat([one.hidden_states[-2] for one in said])
        self.pooled = torch.cat([one.text_embeds for one in said])

    def of(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States (B, L, 128), pooled words (B, 128) and tokens (B, L) of these prompts (B,)."""
        return self.states[numbers], self.pooled[numbers], self.ids[numbers]


def open_learner(config: BuildTinyConfig) -> Learner:
    """The finished flow transformer with its second text encoder, in fp32."""
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection

    folder = config.out / "dit"
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=torch.float32)
    return Learner(transformer, second).eval()


@torch.no_grad()
def follow_teacher(config: BuildTinyConfig, velocity: Any, words: Words) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents fp16 (N, WINDOWS + 1, C, H, W) where the teacher's guided way passes from window to window, and the prompt of each (N,)."""
    kept = config.work / "turbo.pt"
    if kept.exists():
        return torch.load(kept, weights_only=True)
    which = torch.arange(1, config.turbo_prompts + 1)
    shape = (tiny.LATENT_CHANNELS, tiny_dit.LATENT_SIDE, tiny_dit.LATENT_SIDE)
    ways = []
    for number, rows in enumerate(which.split(ROWS)):
        random = torch.Generator().manual_seed(config.seed * 100_000 + number)
        latents = torch.randn(len(rows), *shape, generator=random)
        passed = [latents.half()]
        both = words.of(torch.cat((rows, torch.zeros_like(rows))))
        for step in range(TEACHER_STEPS):
            sigmas = torch.full((2 * len(rows),), 1 - step / TEACHER_STEPS)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                wanted, empty = velocity(torch.cat((latents, latents)), sigmas, *both).float().chunk(2)
            latents = latents - (empty + GUIDANCE * (wanted - empty)) / TEACHER_STEPS
            if (step + 1) % (TEACHER_STEPS // WINDOWS) == 0:
                passed.append(latents.half())
        ways.append(torch.stack(passed, 1))
    torch.save((torch.cat(ways), which), kept)
    return torch.cat(ways), which


def save_turbo(config: BuildTinyConfig, student: Learner, average: Any) -> None:
    """Writes the teacher's folder with the student's averaged transformer in it, in fp16."""
    folder = config.out / "turbo"
    shadow = Learner(tiny_dit.make_transformer(), student.second)
    copy_average(average, student, shadow)
    shutil.copytree(config.out / "dit", folder, dirs_exist_ok=True)
    shadow.transformer.half().save_pretrained(folder / "transformer")
