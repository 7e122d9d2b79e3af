"""Training on a folder of pictures: data, loss and previews for the loop, whatever is trained.

photos + captions -> latents and prompt states (cached) -> noise -> predict (adapted layers) -> loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import compute_snr
from peft import PeftConfig
from PIL import Image
from torch import nn

from ..pipelines.generate import denoise
from ..toolkit import losses
from ..toolkit.adapters.attach import attach
from ..toolkit.adapters.auxiliary import auxiliary_losses
from ..toolkit.data.cache import cached, file_hash, key_of
from ..toolkit.data.subjects import Sample, load_picture
from ..toolkit.models.diffusion import DTYPES, DiffusionModel, cache_folder
from ..toolkit.randomness import generator, order
from ..toolkit.runs import Run
from .config import PictureConfig, SearchConfig, SubjectConfig


def attach_to_parts(
    model: DiffusionModel, config: SubjectConfig | SearchConfig, config_of: Callable[[Sequence[str]], PeftConfig]
) -> dict[str, nn.Module]:
    """Puts adapters on the denoiser and, by choice, on the text encoder; their start depends on the seed alone.

    config_of: the PEFT config for these target modules. Returns the parts.
    """
    torch.manual_seed(config.seed)
    parts: dict[str, nn.Module] = {"unet": model.unet}
    attach(model.unet, config_of(config.target_modules))
    if config.train_text_encoder:
        attach(model.text_encoder, config_of(config.text_target_modules), field="--text-target-modules")
        parts["text_encoder"] = model.text_encoder
    return parts


class DenoisingLoss(nn.Module):
    """Adapted denoiser (and text encoder) with the loss as its forward, so that one module is all DDP has to wrap."""

    def __init__(self, model: DiffusionModel, *, text: bool, min_snr_gamma: float | None) -> None:
        super().__init__()
        self.unet = model.unet
        self.text_encoder = model.text_encoder if text else None
        self.scheduler = model.scheduler
        self.gamma = min_snr_gamma

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Loss of each sample, (B,). Batch: mean, std, spread, noise (B, C, H, W); timesteps, weight (B,); states or ids."""
        clean = batch["mean"] + batch["std"] * batch["spread"]
        noise, timesteps = batch["noise"], batch["timesteps"]
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        goal = losses.target(self.scheduler, clean, noise, timesteps)
        dtype = self.unet.dtype
        with auxiliary_losses() as auxiliary:
            states = self.text_encoder(batch["ids"]).last_hidden_state if self.text_encoder else batch["states"]
            guess = self.unet(noisy.to(dtype), timesteps, encoder_hidden_states=states.to(dtype)).sample
        loss = losses.per_sample_mse(guess, goal) * batch["weight"]
        if self.gamma is not None:
            snr = compute_snr(self.scheduler, timesteps)
            loss = loss * losses.min_snr_weight(self.scheduler.config.prediction_type, snr, self.gamma)
        return loss + auxiliary.total()


@dataclass
class Rows:
    """Training rows on the device: latents (N, C, H, W), and a prompt number for each."""

    mean: torch.Tensor
    std: torch.Tensor
    prompt: torch.Tensor

    def __len__(self) -> int:
        return len(self.mean)


class PictureTask:
    """What every Task on pictures shares. A sub-class says what is trained, in `attach`."""

    def __init__(
        self,
        config: PictureConfig,
        samples: list[Sample],
        base: str,
        accelerator: Accelerator,
        held_out: Sequence[Sample] = (),
    ) -> None:
        """held_out: pictures that are not trained on but made ready as well, as `held_out`."""
        self.config, self.device = config, accelerator.device
        self.model = model = DiffusionModel(base, DTYPES[config.precision], accelerator.device)
        self.prompts: dict[str, int] = {}  # text -> number
        self.timesteps = len(model.scheduler.alphas_cumprod)
        self.side = config.resolution or model.native_resolution
        self.cache = cache_folder()
        # One process fills the caches, the others then read them.
        with accelerator.main_process_first():
            prior = self.class_samples() if config.prior_weight else []  # by the base model, still as it is
            self.parts = self.attach()
            text = "text_encoder" in self.parts
            self.instance = self.rows(samples, config.prompt)
            self.prior = self.rows(prior, config.class_prompt) if prior else None
            self.held_out = self.rows(list(held_out), config.prompt) if held_out else None
            self.preview_texts = [
                text.format(token=config.token, noun=config.class_noun) for text in (*config.preview_prompts, "")
            ]
            self.prompt_numbers(self.preview_texts)
            self.states = None if text else self.prompt_states()
        self.ids: Any = model.tokens(list(self.prompts)).to(self.device) if text else None
        model.release(text_encoder=not text)
        if config.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()
            if text:
                model.text_encoder.gradient_checkpointing_enable()
        self.module = DenoisingLoss(model, text=text, min_snr_gamma=config.min_snr_gamma).train()

    def conclude(self, run: Run, accelerator: Accelerator) -> str:
        """What comes behind the last step: nothing. Returns the state of the run, 'done' or 'stopped'."""
        return "done"

    def attach(self) -> dict[str, nn.Module]:
        """Puts what is trained on the model's parts, which come frozen; returns those parts (unet, text_encoder)."""
        raise NotImplementedError

    # -------------------------------------------------------------------------- data

    def rows(self, samples: list[Sample], default_prompt: str) -> Rows:
        """Latents of the samples, from the cache where they are, and their prompts' numbers."""
        model, vae = self.model, self.model.fingerprint("vae")
        latents = []
        for sample in samples:
            key = key_of(
                kind="latents",
                vae=vae,
                file=file_hash(sample.path),
                side=self.side,
                crop=self.config.crop,
                flip=sample.flip,
            )
            make = lambda s=sample: model.encode_picture(load_picture(s, self.side, self.config.crop))  # noqa: E731
            latents.append(cached(self.cache / "latents", key, make))
        return Rows(
            mean=torch.stack([row["mean"] for row in latents]).to(self.device),
            std=torch.stack([row["std"] for row in latents]).to(self.device),
            prompt=self.prompt_numbers([sample.caption or default_prompt for sample in samples]),
        )

    def prompt_numbers(self, texts: list[str]) -> torch.Tensor:
        """A number for each text; new texts are added to `prompts`."""
        return torch.tensor([self.prompts.setdefault(text, len(self.prompts)) for text in texts])

    def prompt_states(self) -> torch.Tensor:
        """States of all prompts (P, L, width), from the cache where they are."""
        model = self.model
        encoder = model.fingerprint("text_encoder") + model.fingerprint("tokenizer")
        states = []
        for text in self.prompts:
            key = key_of(kind="prompt", encoder=encoder, text=text, dtype=self.config.precision)
            made = cached(self.cache / "prompts", key, lambda t=text: {"states": model.encode_prompts([t])[0].cpu()})
            states.append(made["states"])
        return torch.stack(states).to(self.device)

    def class_samples(self) -> list[Sample]:
        """Pictures of the class, made once by the base model without the adapter and kept for later runs."""
        config, model = self.config, self.model
        key = key_of(
            kind="class",
            unet=model.fingerprint("unet"),
            prompt=config.class_prompt,
            side=self.side,
            steps=config.preview_steps,
            guidance=config.guidance_scale,
        )
        folder = self.cache / "class" / key
        paths = [folder / f"{number:05d}.png" for number in range(config.prior_pictures)]
        missing = [number for number, path in enumerate(paths) if not path.is_file()]
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            pipe = model.pipeline()
            for start in range(0, len(missing), 8):
                chunk = missing[start : start + 8]
                pictures = denoise(
                    pipe,
                    [config.class_prompt] * len(chunk),
                    seeds=chunk,
                    steps=config.preview_steps,
                    guidance_scale=config.guidance_scale,
                    side=self.side,
                )
                for number, picture in zip(chunk, pictures, strict=True):
                    picture.save(paths[number])
        return [Sample(path) for path in paths]

    def batch(self, position: int, slots: list[int]) -> dict[str, torch.Tensor]:
        """Rows `slots` of the forward pass that begins at sample `position`; with a prior, as many class rows behind."""
        config = self.config
        parts = [self.part(self.instance, 1, 1.0, position, slots)]
        if self.prior is not None:
            parts.append(self.part(self.prior, 2, config.prior_weight, position, slots))
        batch = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        batch["weight"] *= len(parts)  # the mean over all rows is then instance mean + weight * class mean
        return batch

    def part(self, rows: Rows, stream: int, weight: float, position: int, slots: list[int]) -> dict[str, torch.Tensor]:
        """Rows of one stream (1 instance, 2 class), each with randomness of its own."""
        config, shape = self.config, rows.mean.shape[1:]
        chosen = order(config.seed + stream, len(rows), position, config.batch_size)
        picked = torch.tensor([chosen[slot] for slot in slots])
        drawn, timesteps = [], []
        for slot in slots:
            random = generator(config.seed, stream, position + slot)
            drawn.append(torch.randn((2, *shape), generator=random))
            timesteps.append(torch.randint(self.timesteps, (1,), generator=random))
        spread, noise = torch.stack(drawn, 1).to(self.device, non_blocking=True)
        where = picked.to(self.device, non_blocking=True)
        number = rows.prompt[picked].to(self.device, non_blocking=True)
        return self.words(number) | {
            "mean": rows.mean[where],
            "std": rows.std[where],
            "spread": spread,
            "noise": noise,
            "timesteps": torch.cat(timesteps).to(self.device, non_blocking=True),
            "weight": torch.full((len(slots),), weight, device=self.device),
        }

    def words(self, number: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the batch holds of the prompts of these numbers (B,)."""
        return {"states": self.states[number]} if self.states is not None else {"ids": self.ids[number]}

    # -------------------------------------------------------------------------- judging on held-out pictures

    def held_out_batch(self, draws: int, *, seed: int) -> dict[str, torch.Tensor]:
        """Each held-out picture `draws` times, with noise and timesteps drawn once, the timesteps spread over all there are."""
        rows, noise, timesteps = self.held_out, [], []
        assert rows is not None
        for number in range(len(rows) * draws):
            random = generator(seed, 9, number)
            noise.append(torch.randn(rows.mean.shape[1:], generator=random))
            place = (number % draws + float(torch.rand((), generator=random))) / draws
            timesteps.append(min(int(place * self.timesteps), self.timesteps - 1))
        which = torch.arange(len(rows)).repeat_interleave(draws)
        where = which.to(self.device)
        return self.words(rows.prompt[which].to(self.device)) | {
            "mean": rows.mean[where],
            "std": rows.std[where],
            "spread": torch.zeros_like(rows.mean[where]),
            "noise": torch.stack(noise).to(self.device),
            "timesteps": torch.tensor(timesteps, device=self.device),
            "weight": torch.ones(len(where), device=self.device),
        }

    @torch.no_grad()
    def losses_on(self, batch: dict[str, torch.Tensor], rows: int = 32) -> torch.Tensor:
        """Denoising loss of each row (B,) in eval mode, `rows` at a time."""
        self.module.eval()
        starts = range(0, len(batch["weight"]), rows)
        losses = [self.module({key: value[start : start + rows] for key, value in batch.items()}) for start in starts]
        return torch.cat(losses).double()

    # -------------------------------------------------------------------------- previews

    @torch.no_grad()
    def preview(self) -> list[Image.Image]:
        """One picture a preview prompt, always from the same noise."""
        config, model = self.config, self.model
        self.module.eval()
        texts = self.preview_texts[:-1]
        if self.states is not None:
            numbers = [self.prompts[text] for text in self.preview_texts]
            words, empty = self.states[numbers[:-1]], self.states[numbers[-1:]].expand(len(texts), -1, -1)
        else:
            words, empty = model.encode_prompts(texts), model.encode_prompts([""] * len(texts))
        pictures = denoise(
            model.pipeline(with_text=False),
            words,
            negative=empty,
            seeds=[config.seed + number for number in range(len(texts))],
            steps=config.preview_steps,
            guidance_scale=config.guidance_scale,
            side=self.side,
        )
        model.release(text_encoder=False)
        self.module.train()
        return pictures
