"""Adapters of vision-language models for other tools: plain LoRA for PEFT, or the whole model with the adapter in its weights.

What was written is loaded by the stock classes and compared with the adapter.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from PIL import Image
from transformers import AutoModelForImageTextToText

from ..toolkit.adapters.attach import adapter_layers
from ..toolkit.adapters.fold import fold
from ..toolkit.core.errors import UserError, did_you_mean
from ..toolkit.core.files import write_text
from ..toolkit.core.modules import replace_module
from ..toolkit.core.out_of_memory import oom_context
from ..toolkit.data.conversations import Conversation
from ..toolkit.formats.native import write_state
from ..toolkit.formats.write import Part, check_representable, peft_state
from ..toolkit.vlm.model import VisionLanguageModel
from .chat import open_chat

FORMATS = ("peft", "merged")
ADAPTER = "adapter_0"
PROOF_FAILED = "{} does not reproduce the adapter; do not use it, and please report this."
QUESTION = "What is in the picture?"
NO_BIAS_ADVICE = (
    "It stays what it is: a folder that PEFT reads once rankfold is imported. (GLoRA without such biases: search or train with prompts, "
    "bias scales and bias shifts left out.)"
)


@dataclass(frozen=True)
class ChatProof:
    """What the reloaded model differs in from the adapter it was made of."""

    path: Path
    reader: str
    difference: float
    """Largest difference of a next token's probability on a question about a noise image."""
    effect: float
    """Largest difference that the adapter makes to the base's, for scale."""

    def summary(self) -> list[str]:
        """What was found, for people."""
        return [
            f"Read back by {self.reader}: largest difference of a probability {self.difference:.1e} "
            f"(the adapter itself changes it by {self.effect:.2f})."
        ]

    def check(self) -> None:
        """Raises UserError when what was written does not do what the adapter does."""
        if not self.difference <= 1e-4:  # also when it is no number
            raise UserError(PROOF_FAILED.format(self.path))


@oom_context("exporting the adapter")
def export_chat(folder: Path, base: str, format: str, out: Path) -> ChatProof:
    """Writes the adapter of `folder` and proves what was written.

    Raises:
        UserError: for an unknown format, or an adapter that the format cannot say.
    """
    if format not in FORMATS:
        raise UserError(
            f"--format {format} is not one of a vision-language model: choose {' or '.join(FORMATS)}.{did_you_mean(format, FORMATS)}"
        )
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else None
    plain = next_token_probabilities(open_chat(base, template=text), None)
    vision = open_chat(base, [folder], template=text)
    tuned = next_token_probabilities(vision, None)
    path = out / format
    path.mkdir(parents=True, exist_ok=True)
    if format == "peft":
        write_peft(vision, path)
        model: Any = PeftModel.from_pretrained(
            AutoModelForImageTextToText.from_pretrained(vision.folder, dtype=torch.float32), str(path)
        )
    else:
        write_merged(vision, path)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    for name in ("rankfold.json", "chat_template.jinja"):
        if (folder / name).is_file() and not (path / name).is_file():
            shutil.copyfile(folder / name, path / name)
    again = next_token_probabilities(vision, model.eval())
    proof = ChatProof(
        path,
        "PEFT" if format == "peft" else "transformers",
        float((again - tuned).abs().max()),
        float((tuned - plain).abs().max()),
    )
    facts = {"difference": proof.difference, "effect": proof.effect, "reader": proof.reader}
    write_text(path / "rankfold_proof.json", json.dumps(facts, indent=1))
    return proof


@torch.no_grad()
def next_token_probabilities(vision: VisionLanguageModel, model: Any) -> torch.Tensor:
    """Probabilities of the next token after every token of a question about a noise image, (L, vocabulary).

    model: instead of the vision model's own.
    """
    noise = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray((noise * 255).byte().numpy())
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    row = Conversation(({"role": "user", "content": content},), (b"",), "the question")
    inputs = vision.to_device(vision.chat.collate_questions([row], [[image]]))
    return (model or vision.model)(**inputs, use_cache=False).logits[0].float().softmax(-1).cpu()


def write_peft(vision: VisionLanguageModel, path: Path) -> None:
    """Plain LoRA with alpha = rank, and modules that were trained in full as they are.

    Raises:
        UserError: when the adapter is not a plain LoRA.
    """
    part = Part(vision.model, fold(vision.model, ADAPTER), ADAPTER)
    try:
        check_representable(part, "peft")
    except UserError as error:
        homeless = any(c.bias is not None and part.layer(name).bias is None for name, c in part.folded.items())
        raise UserError(
            f"{str(error).split(': use')[0]}. {NO_BIAS_ADVICE if homeless else 'Use --format merged.'}"
        ) from error
    state, config = peft_state(part)
    for name, module in vision.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            own = module.modules_to_save[ADAPTER].state_dict()
            state |= {f"{name}.{key}": value.detach().float().cpu() for key, value in own.items()}
            config.modules_to_save = [*(config.modules_to_save or []), name]
    write_state(path, state, config)


@torch.no_grad()
def write_merged(vision: VisionLanguageModel, path: Path) -> None:
    """The whole model, its processor and template; `vision` is what was written afterwards.

    Raises:
        UserError: when the adapter is not linear, so that no weight could do what it does.
    """
    model = vision.model
    changes = fold(model, ADAPTER)
    for name, layer in adapter_layers(model).items():
        base: Any = layer.get_base_layer()
        change = changes[name]
        weight = base.weight.float()
        base.weight.copy_(weight + change.delta_weight(weight.flatten(1).cpu()).view_as(weight).to(weight.device))
        if change.bias is not None:
            if base.bias is None:
                raise UserError(
                    f"The adapter gives {name} a bias that the base's layer does not have, so the base's class has no "
                    f"place for it. {NO_BIAS_ADVICE}"
                )
            base.bias.add_(change.bias.to(base.bias))
        replace_module(model, name, base)
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            replace_module(model, name, module.modules_to_save[ADAPTER])
    for key in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(key, None)
    model._hf_peft_config_loaded = False
    model.save_pretrained(path)
    vision.processor.save_pretrained(path)
