"""PEFT's LoRA in the plain loop, saved as a diffusers LoRA file."""

from __future__ import annotations

from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from plain_loop import TEXT_TARGETS, UNET_TARGETS, Parts, read_options, train
from torch import nn


def adapt(parts: Parts, rank: int) -> list[nn.Parameter]:
    for model, targets in ((parts.unet, UNET_TARGETS), (parts.text_encoder, TEXT_TARGETS)):
        model.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))
        )
    return [p for model in (parts.unet, parts.text_encoder) for p in model.parameters() if p.requires_grad]


if __name__ == "__main__":
    options = read_options()
    parts = train(options, adapt)
    StableDiffusionPipeline.save_lora_weights(
        options.out, get_peft_model_state_dict(parts.unet), get_peft_model_state_dict(parts.text_encoder)
    )
