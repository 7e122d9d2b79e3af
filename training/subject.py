"""Subject-driven training (DreamBooth): data, loss and previews for the loop.

photos + captions -> latents and prompt states (cached) -> noise -> predict (adapted layers) -> loss.
"""

from __future__ import annotations

import json
import traceback
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import compute_snr
from peft import PeftConfig
from PIL import Image
from torch import nn

from ..pipelines.generate import denoise
from ..toolkit import losses
from ..toolkit.adapters.attach import attach, calibrate, parameter_groups
from ..toolkit.adapters.auxiliary import auxiliary_losses
from ..toolkit.adapters.fold import is_dead
from ..toolkit.adapters.registry import make_config
from ..toolkit.data.cache import cached, file_hash, key_of
from ..toolkit.data.subjects import Sample, find_samples, load_picture
from ..toolkit.formats import native
from ..toolkit.models.diffusion import DTYPES, DiffusionModel, cache_folder, resolve_base
from ..toolkit.randomness import generator, order
from ..toolkit.runs import Run, write_text
from .config import SubjectConfig, check_numbers, from_yaml, to_yaml
from .loop import Loop
from .optimizer import check_optimizer
from .processes import make_accelerator


def train_subject(config: SubjectConfig) -> Run:
    """Checks everything that can be checked, then trains; the run folder holds all that comes of it.

    Raises:
        UserError: for anything in the config, the pictures or the base that cannot work.
    """
    samples, base = preflight(config)
    run = Run(config.out)
    run.folder.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(config)
    if accelerator.is_main_process:
        run.claim()
        for old in run.checkpoint_files():
            old.unlink()
        run.cut_metrics(-1)
        write_text(run.config_file, to_yaml(config))
    accelerator.wait_for_everyone()
    return carry_out(config, samples, base, run, accelerator)


def resume(folder: Path) -> Run:
    """Goes on with a run from its newest checkpoint, with the config it was started with.

    Raises:
        UserError: when the folder holds no run, or a live one, or its checkpoint is of another config.
    """
    run = Run.open(folder)
    config = replace(from_yaml(run.config_file), out=Path(folder))
    samples, base = preflight(config)
    accelerator = make_accelerator(config)
    if accelerator.is_main_process:
        run.claim()
    accelerator.wait_for_everyone()
    return carry_out(config, samples, base, run, accelerator)


def preflight(config: SubjectConfig) -> tuple[list[Sample], str]:
    """All checks that need no model: numbers, names, pictures, base. Returns the samples and the base's folder."""
    check_numbers(config)
    adapter_config(config, config.target_modules)
    check_optimizer(config)
    assert config.images is not None
    samples = find_samples(config.images, flip=config.flip, skip_bad=config.skip_bad)
    if Run(config.out).is_live():
        Run(config.out).claim()  # says which process has it
    return samples, resolve_base(config.base)


def carry_out(config: SubjectConfig, samples: list[Sample], base: str, run: Run, accelerator: Accelerator) -> Run:
    """Builds the task, runs the loop, and leaves the outcome in status.json."""
    state, error, loop = "failed", "ended by the system", None
    try:
        task = SubjectTask(config, samples, base, accelerator)
        loop = Loop(config, task, run, accelerator)
        loop.resume()
        state, error = loop.train(), None
    except Exception as fault:
        error = str(fault)
        run.append_log(traceback.format_exc())
        raise
    finally:
        if accelerator.is_main_process:
            step = loop.step if loop else 0
            run.set_status(state=state, step=step, total=config.steps, error=error)
    return run


def adapter_config(config: SubjectConfig, targets: tuple[str, ...]) -> PeftConfig:
    """The PEFT config that the run's settings ask for."""
    return make_config(
        config.adapter,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        target_modules=targets,
        options=config.adapter_options,
    )


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


class SubjectTask:
    """The Task of subject-driven training."""

    def __init__(self, config: SubjectConfig, samples: list[Sample], base: str, accelerator: Accelerator) -> None:
        self.config, self.device = config, accelerator.device
        self.model = DiffusionModel(base, DTYPES[config.precision], accelerator.device)
        model = self.model
        self.prompts: dict[str, int] = {}  # text -> number
        self.attach_adapters()
        self.timesteps = len(model.scheduler.alphas_cumprod)
        self.side = config.resolution or model.native_resolution
        self.cache = cache_folder()
        # One process fills the caches, the others then read them.
        with accelerator.main_process_first():
            self.instance = self.rows(samples, config.prompt)
            prior = self.class_samples() if config.prior_weight else []
            self.prior = self.rows(prior, config.class_prompt) if prior else None
            self.preview_texts = [
                text.format(token=config.token, noun=config.class_noun) for text in (*config.preview_prompts, "")
            ]
            self.prompt_numbers(self.preview_texts)
            self.states = None if config.train_text_encoder else self.prompt_states()
        self.ids: Any = model.tokens(list(self.prompts)).to(self.device) if config.train_text_encoder else None
        model.release(text_encoder=not config.train_text_encoder)
        self.module = DenoisingLoss(model, text=config.train_text_encoder, min_snr_gamma=config.min_snr_gamma).train()
        first = self.batch(0, list(range(config.batch_size)))  # the same on every process
        for part in self.parts.values():
            calibrate(part, lambda: self.module.eval()(first))
        self.module.train()

    def attach_adapters(self) -> None:
        """Puts the adapter on the denoiser and, by choice, on the text encoder; the start depends on the seed alone."""
        config, model = self.config, self.model
        torch.manual_seed(config.seed)
        self.parts: dict[str, nn.Module] = {"unet": model.unet}
        attach(model.unet, adapter_config(config, config.target_modules))
        if config.train_text_encoder:
            targets = adapter_config(config, config.text_target_modules)
            attach(model.text_encoder, targets, field="--text-target-modules")
            self.parts["text_encoder"] = model.text_encoder
        if config.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()
            if config.train_text_encoder:
                model.text_encoder.gradient_checkpointing_enable()

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
            model.unet.disable_adapters()
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
            model.unet.enable_adapters()
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
        words = {"states": self.states[number]} if self.states is not None else {"ids": self.ids[number]}
        return words | {
            "mean": rows.mean[where],
            "std": rows.std[where],
            "spread": spread,
            "noise": noise,
            "timesteps": torch.cat(timesteps).to(self.device, non_blocking=True),
            "weight": torch.full((len(slots),), weight, device=self.device),
        }

    # -------------------------------------------------------------------------- what the loop asks for

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The adapter's parameters, one group a part of the pipeline."""
        config = self.config
        rates = {"unet": config.learning_rate, "text_encoder": config.text_learning_rate or config.learning_rate}
        return [group for name, part in self.parts.items() for group in parameter_groups(part, rates[name])]

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

    def is_dead(self) -> bool:
        """True when the adapter changes nothing in any part."""
        return all(is_dead(part) for part in self.parts.values())

    def save_adapter(self, folder: Path) -> None:
        """Writes a PEFT folder for each part, and what the adapter was trained on."""
        for name, part in self.parts.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                native.save_native(part, folder / name)
        facts = {"base": self.config.base, "token": self.config.token, "class_noun": self.config.class_noun}
        write_text(folder / "rankfold.json", json.dumps(facts | {"adapter": self.config.adapter}, indent=1))
