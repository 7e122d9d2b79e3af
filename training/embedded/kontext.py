"""The training of the embedded model with references: images from words, and three edits of a reference."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ...toolkit.diffusion.model import pack_latents
from ...toolkit.diffusion.noise import FlowNoise
from ...toolkit.embedded import edits, tiny_kontext, world
from ...toolkit.embedded import tiny_sd as tiny
from .loop import BuildTinyConfig, copy_average, fit, load_as_fp32, shuffled_batches, to_pixels

WORDS = 13  # tokens of words that training looks at; then one that stands for all padding
SIDE = 4  # tokens on a side of an image
LONGEST = 512  # tokens that the stock pipeline fills a prompt up to
ROWS = 32  # of a batch
FROM_WORDS = 1 / 3  # of the rows, the share that has no reference


def draw_row(job: tuple[int, int]) -> tuple[np.ndarray, list[tuple[int, int, str]]]:
    """Images (3, 64, 64, 3): a thing or creature, the same in another colour, the scene alone; and (reference or -1, image, words)."""
    seed, number = job
    rng = np.random.default_rng((seed, 41, number))
    creature = int(rng.integers(world.TRAINING_CREATURES)) if number % 2 else None
    thing = edits.random_figure(rng, creature)
    seeds = [int(part) for part in rng.integers(2**31, size=2)]
    changed = edits.recoloured(thing, rng) if creature is None else thing
    images = [edits.draw_apart(one, *seeds) for one in (thing, changed)]
    images.append(edits.draw_apart(thing, *seeds, empty=True))
    ways = [(-1, 0, world.caption(thing)), (-1, 2, world.SCENES[thing.scene]), (0, 0, edits.SAME), (0, 2, edits.EMPTY)]
    if creature is None:
        ways += [(-1, 1, world.caption(changed)), (0, 1, edits.recolour_words(str(changed.colour)))]
    return np.stack([np.asarray(image) for image in images]), ways


@torch.no_grad()
def draw_edits(config: BuildTinyConfig) -> None:
    """Draws all rows and writes their tokens (N, 3, 16, 96), fp16, and what each is an edit of."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(config.out / "sd" / "vae", dtype=torch.float32)
    with multiprocessing.get_context("spawn").Pool(config.threads) as pool:
        rows = pool.map(draw_row, [(config.seed, number) for number in range(config.edit_rows)], chunksize=200)
    tokens = []
    for start in range(0, len(rows), 64):
        images = torch.from_numpy(np.concatenate([images for images, _ in rows[start : start + 64]])).permute(
            0, 3, 1, 2
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = vae.encode(to_pixels(images)).latent_dist.mean.float() * vae.config.scaling_factor
        tokens.append(pack_latents(latents).unflatten(0, (-1, 3)).half())
    torch.save(torch.cat(tokens), config.work / "edits.pt")
    (config.work / "edits.json").write_text(json.dumps([ways for _, ways in rows]), encoding="utf-8")


class Learner(nn.Module):
    """What is trained: the transformer, and the words' vectors."""

    def __init__(self, transformer: nn.Module, words: nn.Module) -> None:
        super().__init__()
        self.transformer, self.words = transformer, words

    def forward(
        self,
        noisy: torch.Tensor,
        references: torch.Tensor,
        sigmas_B: torch.Tensor,
        ids: torch.Tensor,
        pooled: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        """Velocity (B, 16, 96) of noisy tokens, from a reference's (B, 16, 96), words (B, WORDS + 1) and pooled words (B, 128).

        bias (B, WORDS + 33): what is added to the attention of each token: -inf for none, log(n) for one that stands for n.
        """
        seen = self.words(ids).last_hidden_state
        return self.transformer(
            hidden_states=torch.cat((noisy, references), 1),
            timestep=sigmas_B,
            encoder_hidden_states=seen,
            pooled_projections=pooled,
            txt_ids=noisy.new_zeros(ids.shape[1], 3),
            img_ids=tiny_kontext.token_places(SIDE, 2),
            joint_attention_kwargs={"attention_mask": bias[:, None, None]},
            return_dict=False,
        )[0][:, : SIDE * SIDE]


def train_kontext(config: BuildTinyConfig) -> None:
    """Trains transformer and words from scratch on the flow's velocity; writes their moving average."""
    from diffusers.training_utils import EMAModel

    tokens = torch.load(config.work / "edits.pt", weights_only=True)
    rows = json.loads((config.work / "edits.json").read_text(encoding="utf-8"))
    tokenizer = tiny_kontext.make_word_tokenizer()
    texts = Texts(config, tokenizer, sorted({words for ways in rows for *_, words in ways}))
    torch.manual_seed(config.seed)  # after the encoders, whose loading draws numbers
    learner = Learner(tiny_kontext.make_transformer(), tiny_kontext.make_word_encoder(tokenizer)).train()
    average = EMAModel(learner.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
    noise, generator = FlowNoise("logit_normal"), torch.Generator().manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    from_words = round(ROWS * FROM_WORDS)

    def loss_of(numbers: torch.Tensor) -> torch.Tensor:
        chosen = []
        for place, number in enumerate(numbers.tolist()):
            ways = [way for way in rows[number] if (way[0] < 0) == (place < from_words)]
            chosen.append(ways[rng.integers(len(ways))])
        clean = tokens[numbers, torch.tensor([image for _, image, _ in chosen])].float()
        references = tokens[numbers, torch.tensor([max(0, seen) for seen, *_ in chosen])].float()
        ids, pooled, bias = texts.batch([way[2] for way in chosen], rng)
        bias = F.pad(bias, (0, 2 * SIDE * SIDE))
        bias[:from_words, -SIDE * SIDE :] = -torch.inf
        drawn = torch.randn(clean.shape, generator=generator)
        sigmas = torch.cat([noise.sample_timestep(generator, 2 * SIDE, 2 * SIDE) for _ in chosen])
        noisy = noise.add_noise(clean, drawn, sigmas)
        pred = learner(noisy, references, sigmas, ids, pooled, bias)
        return F.mse_loss(pred, noise.target(clean, drawn, sigmas))

    def after(step: int) -> None:
        average.step(learner.parameters())
        if step % 400 == 0 and step < steps:
            save_pipeline(config, learner, average, tokenizer, config.work / f"kontext-{step:05d}")

    steps = config.kontext_steps
    batches = shuffled_batches(len(tokens), ROWS, steps, config.seed)
    fit(config, "kontext", list(learner.parameters()), batches, loss_of, steps=steps, lr=2e-3, bf16=False, after=after)
    save_pipeline(config, learner, average, tokenizer, config.out / "kontext")


class Texts:
    """All words that training says, as tokens, and as the first encoder pools them."""

    @torch.no_grad()
    def __init__(self, config: BuildTinyConfig, tokenizer: Any, texts: list[str]) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer

        self.ids = {text: tokenizer(text).input_ids[:WORDS] for text in texts}
        first = CLIPTokenizer.from_pretrained(config.out / "sd" / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(config.out / "sd" / "text_encoder", dtype=torch.float32)
        self.pooled = {}
        for start in range(0, len(texts), 500):
            some = texts[start : start + 500]
            said = encoder(torch.tensor(first(some, padding="max_length", truncation=True).input_ids)).pooler_output
            self.pooled |= dict(zip(some, said, strict=True))

    def batch(self, texts: list[str], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids (B, WORDS + 1), pooled words (B, 128), and the attention's bias (B, WORDS + 1), for as much padding as the dice say."""
        ids, bias = (
            torch.zeros(len(texts), WORDS + 1, dtype=torch.long),
            torch.full((len(texts), WORDS + 1), -torch.inf),
        )
        for row, text in enumerate(texts):
            own = self.ids[text]
            ids[row, : len(own)], bias[row, : len(own)] = torch.tensor(own), 0.0
            bias[row, -1] = rng.uniform(np.log(tiny.CONTEXT - len(own)), np.log(LONGEST - len(own)))
        return ids, torch.stack([self.pooled[text] for text in texts]), bias


def save_pipeline(config: BuildTinyConfig, learner: Learner, average: Any, tokenizer: Any, folder: Path) -> None:
    """Writes the whole FluxKontextPipeline with the averaged weights, in fp16."""
    from diffusers import AutoencoderKL, FluxKontextPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    shadow = Learner(tiny_kontext.make_transformer(), tiny_kontext.make_word_encoder(tokenizer))
    copy_average(average, learner, shadow)
    vae = AutoencoderKL.from_pretrained(config.out / "sd" / "vae", dtype=torch.float16)
    vae.register_to_config(shift_factor=0.0)  # the pipeline adds it to every latent
    pipeline = FluxKontextPipeline(
        transformer=shadow.transformer.half(),
        scheduler=tiny_kontext.make_scheduler(),
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(config.out / "sd" / "text_encoder", dtype=torch.float16),
        tokenizer=CLIPTokenizer.from_pretrained(config.out / "sd" / "tokenizer"),
        text_encoder_2=shadow.words.half(),
        tokenizer_2=tokenizer,
    )
    pipeline.save_pretrained(folder)
    load_as_fp32(folder / "text_encoder")
    load_as_fp32(folder / "text_encoder_2")
