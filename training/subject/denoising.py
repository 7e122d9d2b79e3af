"""The denoising loss of adapted parts, as one module, and compiled blocks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...toolkit.adapters.attach import disable_adapters
from ...toolkit.adapters.auxiliary import auxiliary_losses
from ...toolkit.adapters.base import REGISTRY
from ...toolkit.core.errors import UserError
from ...toolkit.diffusion import losses
from ...toolkit.diffusion.model import DiffusionModel, PromptEmbeds
from ...toolkit.diffusion.noise import Noise
from ..config.images import DiffusionConfig
from ..config.subject import SubjectConfig


@dataclass(frozen=True)
class TargetGuidance:
    """Guidance in the target, for bases into which guidance is distilled: what they predict is not the mean of the images.

    As in classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), with an image in place of the prediction for the prompt: the
    mean of such targets is the guided prediction.
    """

    scale: float
    empty_prompt: int
    """Number of the empty prompt."""


class DenoisingLoss(nn.Module):
    """Adapted denoiser (and text encoders) with the loss as its forward, so that one module is all DDP has to wrap."""

    def __init__(
        self,
        model: DiffusionModel,
        parts: dict[str, nn.Module],
        noise: Noise,
        prompt_embeds_of: Callable[[torch.Tensor], PromptEmbeds],
        snr_weight: Callable[[torch.Tensor], torch.Tensor] | None,
        guidance: TargetGuidance | None = None,
    ) -> None:
        """prompt_embeds_of: the embeds of the prompts of these numbers (B,).

        snr_weight: signal-to-noise ratios (B,) -> what the squared error of the clean latents counts for; None is the plain loss.
        """
        super().__init__()
        self.guidance = guidance
        self.parts = nn.ModuleDict({model.denoiser_name: model.denoiser} | parts)
        self.model, self.noise, self.prompt_embeds_of, self.snr_weight = model, noise, prompt_embeds_of, snr_weight

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Loss of each sample, (B,).

        Batch: mean, std, posterior_noise, noise (B, C, H, W); timesteps, prompt, weight (B,); optionally mask (B, 1, H, W),
        reference_0, reference_1 and so on (B, C, h, w): latents that the model sees beside, and
        preservation, preservation_prompt and preservation_weight (K,): rows that are predicted a second time, with another
        prompt, whose target is the prediction of the model without adapters.
        """
        clean = batch["mean"] + batch["std"] * batch["posterior_noise"]
        noise, timesteps, prompt, count = batch["noise"], batch["timesteps"], batch["prompt"], len(clean)
        noisy, target = self.noise.add_noise(clean, noise, timesteps), self.noise.target(clean, noise, timesteps)
        mask, weight, references = batch.get("mask"), batch["weight"], batch_references(batch)
        if self.guidance is not None:
            target = self.guide(target, noisy, timesteps, prompt, references)
        if (preservation := batch.get("preservation")) is not None:
            own = [latents[preservation] for latents in references]
            frozen = self.predict_frozen(
                noisy[preservation], timesteps[preservation], batch["preservation_prompt"], own
            )
            references = [torch.cat([latents, more]) for latents, more in zip(references, own, strict=True)]
            noisy, timesteps = torch.cat([noisy, noisy[preservation]]), torch.cat([timesteps, timesteps[preservation]])
            target, prompt = torch.cat([target, frozen.to(target)]), torch.cat([prompt, batch["preservation_prompt"]])
            weight = torch.cat([weight, batch["preservation_weight"]])
            mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[preservation])])
        with auxiliary_losses() as auxiliary:
            pred = self.predict(noisy, timesteps, prompt, references)
        loss = losses.per_sample_mse(pred, target, mask) * weight
        if self.snr_weight is not None:
            loss = loss * self.snr_weight(self.noise.snr(timesteps)) * self.noise.clean_error_ratio(timesteps)
        if preservation is not None:
            loss = loss[:count].index_add(0, preservation, loss[count:])
        return loss + auxiliary.total()

    def guide(
        self,
        target: torch.Tensor,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        prompt: torch.Tensor,
        references: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """The target (B, C, H, W) away from what the untrained model predicts without words; as it is where there are none to learn."""
        assert self.guidance is not None
        without = self.predict_frozen(noisy, timesteps, torch.full_like(prompt, self.guidance.empty_prompt), references)
        scale = torch.where(prompt == self.guidance.empty_prompt, 1.0, self.guidance.scale).to(target)
        return torch.lerp(without.to(target), target, scale.view(-1, 1, 1, 1))

    def predict(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        prompt: torch.Tensor,
        references: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """The model's prediction (B, C, H, W) for noisy latents (B, C, H, W) at timesteps (B,), with the prompts of these numbers (B,).

        references: latents (B, C, h, w) that it sees beside.
        """
        dtype = self.model.dtype
        prompt_embeds = {
            k: v.to(dtype) if v.is_floating_point() else v for k, v in self.prompt_embeds_of(prompt).items()
        }
        if not references:
            return self.model.predict(noisy.to(dtype), timesteps, prompt_embeds)
        seen = [latents.to(dtype) for latents in references]
        return self.model.predict(noisy.to(dtype), timesteps, prompt_embeds, seen)  # type: ignore[call-arg]

    @torch.no_grad()
    def predict_frozen(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        prompt: torch.Tensor,
        references: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """The same without any adapter; shapes as of `predict`."""
        with disable_adapters(*self.parts.values()):
            return self.predict(noisy, timesteps, prompt, references)


def batch_references(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The latents (B, C, h, w) of a batch's references, in their order."""
    return [batch[f"reference_{number}"] for number in range(sum(name.startswith("reference_") for name in batch))]


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks of a denoiser that diffusers names, or, where it names none, the members of the denoiser's own lists."""
    named = getattr(denoiser, "_repeated_blocks", None)
    lists = [child for child in denoiser.children() if isinstance(child, nn.ModuleList)]
    return [m for m in denoiser.modules() if type(m).__name__ in named] if named else [m for own in lists for m in own]


def check_compile(config: SubjectConfig) -> None:
    """Raises UserError where a compiled block would not be the same when gradient checkpointing runs it again."""
    variant = REGISTRY.get(config.adapter)
    if config.compile and config.gradient_checkpointing and variant and variant.training_only:
        raise UserError(
            f"--compile with --gradient-checkpointing does not go with --adapter {config.adapter}, whose own loss is taken from a layer "
            "only when it is run first: leave one of the two out."
        )


def check_target_guidance(config: SubjectConfig, model: DiffusionModel) -> None:
    """Raises UserError where guidance in the target would be wrong, or cannot be had."""
    if config.target_guidance == 1:
        return
    if config.training_adapter is not None:
        raise UserError(
            "--target-guidance does not go with --training-adapter, which takes the guidance out of the base: leave one of the two out."
        )
    if model.prompts_see_references:
        raise UserError(
            "--target-guidance does not work with bases whose prompts see the references yet: leave it out."
        )


def compile_blocks(denoiser: nn.Module) -> None:
    """Compiles a denoiser block by block, so that alike blocks are compiled once.

    For each shape by itself: a graph for all shapes may take over between a forward pass and what gradient checkpointing repeats of
    it, and keeps other tensors.
    """
    for block in repeated_blocks(denoiser):
        block.compile(dynamic=False)


def timestep_weighting(config: DiffusionConfig) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """How the config weighs timesteps, see DenoisingLoss."""
    if (gamma := config.min_snr_gamma) is not None:
        return lambda snr: losses.min_snr_weight(snr, gamma)
    return losses.debiased_weight if config.debiased else None
