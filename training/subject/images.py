"""Training on a folder of images: data, loss and previews for the loop, whatever is trained.

photos + captions -> latents and prompt states (cached) -> noise -> predict (adapted layers) -> loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from ...pipelines.generate import denoise, max_batch_size
from ...toolkit.core.cache import cache_key, file_hash, load_or_compute
from ...toolkit.core.devices import to_float64
from ...toolkit.core.files import write_png
from ...toolkit.core.paths import cache_folder
from ...toolkit.core.randomness import generator
from ...toolkit.core.run_folder import Run
from ...toolkit.data.subjects import Sample, load_image, load_mask, sample_size
from ...toolkit.diffusion.load import open_model
from ...toolkit.diffusion.model import DTYPES, PromptEmbeds, pad_and_stack
from ..config.images import DiffusionConfig
from ..engine.processes import map_distributed, share_work
from ..engine.sharding import ignore_shards_in_ddp, shard
from .batches import ImageBatches
from .denoising import DenoisingLoss, compile_blocks, repeated_blocks, timestep_weighting
from .rows import Rows, bucket_size, shuffle_tags


def without_token(caption: str, config: DiffusionConfig) -> str:
    """The caption of the same image for any instance of the class."""
    bare = " ".join(word for word in caption.split() if word.strip(",.") not in config.subjects)
    return bare if bare != caption else config.class_prompt


class DiffusionTask:
    """What every Task on images shares. A sub-class says what is trained, in `attach`."""

    shards_base = False
    """Whether the frozen denoiser is sharded over the processes."""

    def __init__(
        self,
        config: DiffusionConfig,
        samples: list[Sample],
        base: str,
        accelerator: Accelerator,
        held_out: Sequence[Sample] = (),
    ) -> None:
        """held_out: images that are not trained on but made ready as well, as `held_out`."""
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        self.model = model = open_model(base, DTYPES[config.precision], accelerator.device, config.quantize)
        self.noise = model.noise(config.timestep_sampling, config.timestep_shift)
        self.prompts: dict[str, int] = {}  # text -> number
        self.token_embeddings: dict[str, torch.Tensor] = {}  # that the text encoders have been given
        self.resolution = config.resolution or model.native_resolution
        self.cache = cache_folder()
        # Each process makes its share of what is cached and reads the rest. Encoders have done their work before the denoiser is
        # loaded, so that the largest parts are never in memory together.
        prior = self.class_samples() if config.prior_weight else []  # by the base model, still as it is
        self.instance = self.build_rows(samples, config.prompt, subject=True)
        self.prior = self.build_rows(prior, config.class_prompt) if prior else None
        self.held_out = self.build_rows(list(held_out), config.prompt) if held_out else None
        self.preview_texts = [
            text.format(token=token, noun=noun)
            for token, noun in config.subjects.items()
            for text in config.preview_prompts
        ]
        self.preview_texts.append("")
        # The empty one is among them, which dropped captions are.
        self.prompt_numbers([*self.preview_texts, *self.measured_texts()])
        self.prompt_embeds = None if self.may_train_text() else self.encode_all_prompts()
        model.release(text=self.prompt_embeds is not None)
        if self.shards_base:
            model.device = torch.device("cpu")  # no device need hold it whole
        self.parts = self.attach()
        if self.shards_base:
            shard(model.denoiser, repeated_blocks(model.denoiser), self.device)
            model.device = self.device
            for part in self.parts.values():
                part.to(self.device)
        text = [name for name in self.parts if name != model.denoiser_name]
        if self.prompt_embeds is None and not text:
            self.prompt_embeds = self.encode_all_prompts()
        model.release(text=not text)
        if config.compile:
            compile_blocks(model.denoiser)
        if config.gradient_checkpointing:
            model.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
            for name in text:
                self.parts[name].gradient_checkpointing_enable()  # type: ignore[operator]
        self.batches = ImageBatches(
            config,
            self.noise,
            self.device,
            self.instance,
            self.prior,
            self.prompts[""],
            host_prompts=self.prompt_embeds is None,
            shards_base=self.shards_base,
        )
        self.module = DenoisingLoss(
            model, self.parts, self.noise, self.prompt_embeds_of, timestep_weighting(config)
        ).train()
        if self.shards_base:
            ignore_shards_in_ddp(self.module)

    def measured_texts(self) -> list[str]:
        """Prompts of the images that are measured while training."""
        return []

    def after_step(self, run: Run, step: int, with_average: Callable[[Callable[[], None]], None]) -> bool:
        """What the method does after a step; averaged: runs an action with the averaged weights. True ends the training."""
        return False

    def conclude(self, run: Run, accelerator: Accelerator) -> str:
        """What comes after the last step: nothing. Returns the state of the run, 'done' or 'stopped'."""
        return "done"

    def may_train_text(self) -> bool:
        """Whether `attach` may choose text encoders; if not, they need not stay."""
        return True

    def attach(self) -> dict[str, nn.Module]:
        """Puts what is trained on the model's parts, which come frozen; returns those parts by name."""
        raise NotImplementedError

    # -------------------------------------------------------------------------- data

    def build_rows(self, samples: list[Sample], default_prompt: str, *, subject: bool = False) -> list[Rows]:
        """The samples by the size they are brought to. subject: these are what is trained on, with masks and shapes of their own."""
        unit = self.model.latent_scale * self.model.patch_size
        sizes: dict[tuple[int, int], list[Sample]] = {}
        for sample in samples:
            square = self.config.crop != "bucket" or not subject
            size = (
                (self.resolution, self.resolution)
                if square
                else bucket_size(*sample_size(sample), self.resolution, unit)
            )
            sizes.setdefault(size, []).append(sample)
        return [self.build_bucket(own, size, default_prompt, subject) for size, own in sizes.items()]

    def build_bucket(self, samples: list[Sample], size: tuple[int, int], default_prompt: str, subject: bool) -> Rows:
        """Samples of one size: latents, from the cache where they are, masks, and their prompts' numbers."""
        model, vae, config = self.model, self.model.fingerprint("vae"), self.config
        makers = []
        for sample in samples:
            key = cache_key(
                kind="latents",
                vae=vae,
                file=file_hash(sample.path),
                size=size,
                crop=config.crop,
                flip=sample.flip,
            )
            make = lambda s=sample: model.encode_image(load_image(s, size, config.crop))  # noqa: E731
            makers.append(lambda key=key, make=make: load_or_compute(self.cache / "latents", key, make))
        latents = share_work(self.accelerator, makers)
        captions = [sample.caption or default_prompt for sample in samples]
        ways = [shuffle_tags(caption, config.caption_orders, config.seed) for caption in captions]
        most = max(len(own) for own in ways)
        ways = [(own * most)[:most] for own in ways]
        bare = [without_token(caption, config) for caption in captions]
        mean = torch.stack([row["mean"] for row in latents])
        return Rows(
            mean=mean.to(self.device),
            std=torch.stack([row["std"] for row in latents]).to(self.device),
            prompts=torch.stack([self.prompt_numbers(own) for own in ways]),
            without_token=self.prompt_numbers(bare) if subject and config.preservation_weight else None,
            mask=self.latent_mask_weights(samples, size, mean.shape[2:]) if subject and config.masks else None,
        )

    def latent_mask_weights(self, samples: list[Sample], size: tuple[int, int], latent: Sequence[int]) -> torch.Tensor:
        """What each latent pixel counts for, (N, 1, H, W), 1 on average over each image."""
        config, least = self.config, self.config.unmasked_weight
        masks = [load_mask(sample, config.masks, size, config.crop) for sample in samples]
        shares = torch.stack([pil_to_tensor(mask).float() / 255 for mask in masks])
        weights = least + (1 - least) * F.interpolate(shares, size=tuple(latent), mode="area")
        return (weights / weights.mean((2, 3), keepdim=True).clamp(min=1e-6)).to(self.device)

    def prompt_numbers(self, texts: list[str]) -> torch.Tensor:
        """A number for each text; new texts are added to `prompts`."""
        return torch.tensor([self.prompts.setdefault(text, len(self.prompts)) for text in texts])

    @torch.no_grad()
    def encode_all_prompts(self) -> PromptEmbeds:
        """Embeds of all prompts (P, ...), from the cache where they are."""
        model = self.model
        tokenizers = [name for name in model.index if name.startswith("tokenizer") and model.has_part(name)]
        encoder = model.fingerprint(*model.text_encoders(), *tokenizers)
        if self.token_embeddings:
            encoder += cache_key(**{name: vectors.tolist() for name, vectors in self.token_embeddings.items()})
        makers = []
        for text in self.prompts:
            key = cache_key(
                kind="words", encoder=encoder, text=text, dtype=self.config.precision, quantize=self.config.quantize
            )
            make = lambda t=text: {name: value.cpu() for name, value in model.encode_prompts([t]).items()}  # noqa: E731
            makers.append(lambda key=key, make=make: load_or_compute(self.cache / "prompts", key, make))
        rows = share_work(self.accelerator, makers)
        return {name: value.to(self.device) for name, value in pad_and_stack(rows).items()}

    def prompt_embeds_of(self, numbers: torch.Tensor) -> PromptEmbeds:
        """The embeds of the prompts of these numbers (B,)."""
        if self.prompt_embeds is not None:
            return {name: value[numbers] for name, value in self.prompt_embeds.items()}
        texts = list(self.prompts)
        return self.model.encode_prompts([texts[number] for number in numbers.tolist()])

    def class_samples(self) -> list[Sample]:
        """Images of the class, made once by the base model without the adapter and kept for later runs."""
        config, model = self.config, self.model
        key = cache_key(
            kind="class",
            denoiser=model.fingerprint(model.denoiser_name),
            prompt=config.class_prompt,
            side=self.resolution,
            steps=config.preview_steps,
            guidance=config.guidance_scale,
        )
        folder = self.cache / "class" / key
        paths = [folder / f"{number:05d}.png" for number in range(config.prior_pictures)]
        own = range(self.accelerator.process_index, len(paths), self.accelerator.num_processes)
        missing = [number for number in own if not paths[number].is_file()]
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            pipe = model.pipeline(model.denoiser_name, "vae", *model.text_encoder_names)
            for start in range(0, len(missing), max_batch_size(self.resolution)):
                chunk = missing[start : start + max_batch_size(self.resolution)]
                images = denoise(
                    pipe,
                    [config.class_prompt] * len(chunk),
                    seeds=chunk,
                    steps=config.preview_steps,
                    guidance_scale=config.guidance_scale,
                    width=self.resolution,
                )
                for number, image in zip(chunk, images, strict=True):
                    write_png(paths[number], image)
        self.accelerator.wait_for_everyone()
        return [Sample(path) for path in paths]

    def batch(self, position: int, slots: list[int]) -> dict[str, torch.Tensor]:
        """Rows `slots` of the forward pass that begins at sample `position`; with a prior, as many class rows after them."""
        return self.batches.batch_at(position, slots)

    # -------------------------------------------------------------------------- judging on held-out images

    def held_out_batch(self, draws: int, *, seed: int) -> dict[str, torch.Tensor]:
        """Each held-out image `draws` times, with noise and timesteps drawn once, the timesteps stratified over their range."""
        assert self.held_out is not None
        (rows,), noise, timesteps = self.held_out, [], []
        for number in range(len(rows) * draws):
            random = generator(seed, 9, number)
            noise.append(torch.randn(rows.mean.shape[1:], generator=random))
            timesteps.append(self.noise.timestep_at((number % draws + float(torch.rand((), generator=random))) / draws))
        which = torch.arange(len(rows)).repeat_interleave(draws)
        where = which.to(self.device)
        return {
            "mean": rows.mean[where],
            "std": rows.std[where],
            "posterior_noise": torch.zeros_like(rows.mean[where]),
            "noise": torch.stack(noise).to(self.device),
            "timesteps": torch.cat(timesteps).to(self.device),
            "prompt": self.batches.to_lookup_device(rows.prompts[which, 0]),
            "weight": torch.ones(len(where), device=self.device),
        }

    @torch.no_grad()
    def losses_on(self, batch: dict[str, torch.Tensor], rows: int = 32) -> torch.Tensor:
        """Denoising loss of each row (B,) in eval mode, `rows` at a time."""
        self.module.eval()
        starts = range(0, len(batch["weight"]), rows)
        losses = [self.module({key: value[start : start + rows] for key, value in batch.items()}) for start in starts]
        return to_float64(torch.cat(losses))

    # -------------------------------------------------------------------------- previews

    def preview(self) -> list[Image.Image]:
        """One image per preview prompt, always from the same noise."""
        texts = self.preview_texts[:-1]  # the last is the empty one
        return self.draw(texts, [self.config.seed + number for number in range(len(texts))])

    @torch.no_grad()
    def draw(self, texts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One image per text, by the model as it is, in shares of whole batches; the texts are among `prompts`."""
        self.module.eval()
        try:
            return self.draw_batches(texts, seeds)
        finally:
            self.model.release(text=False)
            self.module.train()

    def draw_batches(self, texts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """The images of `draw`."""
        config, model = self.config, self.model
        prompt_embeds = self.prompt_embeds_of(torch.tensor([self.prompts[text] for text in [*texts, ""]]))
        pipe, count = model.pipeline(model.denoiser_name, "vae"), max_batch_size(self.resolution)

        def batch(start: int) -> list[Image.Image]:
            some = slice(start, min(start + count, len(texts)))
            return denoise(
                pipe,
                {name: value[some] for name, value in prompt_embeds.items()},
                negative={
                    name: value[-1:].expand(len(seeds[some]), *value.shape[1:]) for name, value in prompt_embeds.items()
                },
                seeds=seeds[some],
                steps=config.preview_steps,
                guidance_scale=config.guidance_scale,
                width=self.resolution,
            )

        return [image for images in map_distributed(range(0, len(texts), count), batch) for image in images]
