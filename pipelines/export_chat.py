"""Adapters of vision-language models for other tools: plain LoRA for PEFT or vLLM, or the whole model with the adapter in its weights.

What was written is loaded by the stock classes, model and processor, and compared with the adapter on images of several shapes. It
takes its place only once it has been proven.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..toolkit.adapters.attach import adapter_layers
from ..toolkit.adapters.fold import fold
from ..toolkit.core.errors import UserError, did_you_mean
from ..toolkit.core.files import write_text
from ..toolkit.core.modules import replace_module
from ..toolkit.core.out_of_memory import oom_context
from ..toolkit.data.conversations import Conversation
from ..toolkit.data.videos import Clip, VideoFacts
from ..toolkit.formats.adapter_facts import FILE
from ..toolkit.formats.native import write_state
from ..toolkit.formats.vllm import max_lora_rank, vllm_state
from ..toolkit.formats.write import Part, check_representable, peft_state
from ..toolkit.vlm.export_processor import padding_processor
from ..toolkit.vlm.model import VisionLanguageModel, base_name, stored_dtype
from .chat import open_chat

FORMATS = ("peft", "merged", "vllm")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAPTER = "adapter_0"
PROOF_FAILED = "{} does not reproduce the adapter; do not use it, and please report this."
QUESTION = "What is in the picture?"
SHAPES = ((64, 64), (96, 40), (40, 96))  # of the images that are asked about: square, wide and tall
VIDEO_SHAPE, VIDEO_FRAMES = (64, 64), 4  # of the video
TOLERANCE = 1e-4  # of a probability
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
    """Largest difference of a next token's probability on questions about noise images, to what was to be written."""
    effect: float
    """Largest difference that the adapter makes to the base's, for scale."""
    rounding: float = 0.0
    """Largest difference that writing the weights in their dtype makes to the adapter."""
    notes: list[str] = field(default_factory=list)
    """What whoever uses it must know."""

    def summary(self) -> list[str]:
        """What was found, for people."""
        lines = [
            f"Read back by {self.reader}: largest difference of a probability {self.difference:.1e} (the adapter itself changes it by "
            f"{self.effect:.2f}), through its own files, on square, wide and tall images."
        ]
        if self.rounding > TOLERANCE:
            lines.append(
                f"Rounding to the dtype of the weights changes a probability by up to {self.rounding:.1e}; --dtype fp32 keeps it."
            )
        return lines + self.notes

    def check(self) -> None:
        """Raises UserError when what was written does not do what the adapter does."""
        if not self.difference <= TOLERANCE:  # also when it is no number
            raise UserError(PROOF_FAILED.format(self.path))


def check_format(format: str) -> None:
    """Raises UserError for a format that vision-language models are not exported in."""
    if format not in FORMATS:
        raise UserError(
            f"--format {format} is not one of a vision-language model: choose {', '.join(FORMATS)}.{did_you_mean(format, FORMATS)}"
        )


@oom_context("exporting the adapter")
def export_chat(folder: Path, base: str, format: str, out: Path, *, dtype: str | None = None) -> ChatProof:
    """Writes the adapter of `folder`, proves what was written, and puts it into its place.

    dtype: of a merged model's weights; None is the base's own.

    Raises:
        UserError: for an unknown format, an adapter that the format cannot say, and when the proof fails; nothing is left then.
    """
    check_format(format)
    if dtype is not None and format != "merged":
        raise UserError(
            f"--dtype is of the weights of a merged model; a folder of format {format} is always fp32: leave it out."
        )
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else None
    plain = next_token_probabilities(open_chat(base, template=text))
    vision = open_chat(base, [folder], template=text)
    tuned = next_token_probabilities(vision)
    path, partial = out / format, out / f"{format}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        processor, notes = exported_processor(vision)
        load = WRITERS[format](vision, partial, base, dtype)
        wanted = next_token_probabilities(vision) if format == "merged" else tuned
        processor.save_pretrained(partial)
        for name in (FILE, "chat_template.jinja"):
            if (folder / name).is_file() and not (partial / name).is_file():
                shutil.copyfile(folder / name, partial / name)
        again = stock_probabilities(vision, load(), partial, padded=any("square" in note for note in notes))
        if vision.chat.videos.limit:
            notes.append(f"Trained on at most {vision.chat.videos.limit} frames of a video, evenly: give it as many.")
        notes += serving_notes(vision, path, base, format, partial)
        proof = ChatProof(
            path,
            "transformers" if format == "merged" else "PEFT",
            largest_difference(again, wanted),
            largest_difference(tuned, plain),
            largest_difference(wanted, tuned),
            notes,
        )
        proof.check()
        facts = {
            "difference": proof.difference,
            "effect": proof.effect,
            "rounding": proof.rounding,
            "reader": proof.reader,
        }
        write_text(partial / "rankfold_proof.json", json.dumps(facts, indent=1))
        write_text(partial / "README.md", model_card(vision, base, format, notes))
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return proof


# ---------------------------------------------------------------------------------------------- the proof


def noise_media(vision: VisionLanguageModel) -> list[Image.Image | Clip]:
    """Noise: images of several shapes, and a video where the base takes one."""
    generator = torch.Generator().manual_seed(0)
    sizes = [*SHAPES, *[VIDEO_SHAPE] * VIDEO_FRAMES]
    noise = [torch.rand(height, width, 3, generator=generator) for width, height in sizes]
    images = [Image.fromarray((pixels * 255).byte().numpy()) for pixels in noise]
    found: list[Image.Image | Clip] = [*images[: len(SHAPES)]]
    try:
        assert vision.chat.video_mark
        size = vision.chat.videos.choose(VideoFacts(*VIDEO_SHAPE, VIDEO_FRAMES, None), whole=True)
        frames = images[len(SHAPES) :]
        found.append(Clip(tuple(frames[number] for number in size.chosen), size))
    except UserError:
        pass  # the base takes no video
    return found


def question(medium: Image.Image | Clip) -> Conversation:
    """A question about an image or a video."""
    content = [{"type": "video" if isinstance(medium, Clip) else "image"}, {"type": "text", "text": QUESTION}]
    return Conversation(({"role": "user", "content": content},), (b"",), "the question")


@torch.no_grad()
def next_token_probabilities(vision: VisionLanguageModel) -> list[torch.Tensor]:
    """Probabilities of the next token after every token of a question about each noise image and video, (L, vocabulary)."""
    found = []
    for medium in noise_media(vision):
        inputs = vision.to_device(vision.chat.collate_questions([question(medium)], [[medium]]))
        found.append(vision.model(**inputs, use_cache=False).logits[0].float().softmax(-1).cpu())
    return found


@torch.no_grad()
def stock_probabilities(vision: VisionLanguageModel, model: Any, path: Path, *, padded: bool) -> list[torch.Tensor]:
    """The same by a model and the processor that lies beside it, as anybody would call them. padded: the images are padded before."""
    processor, found = AutoProcessor.from_pretrained(path), []
    for medium in noise_media(vision):
        text = processor.apply_chat_template(
            list(question(medium).messages), add_generation_prompt=True, tokenize=False
        )
        if isinstance(medium, Clip):
            shown = vision.chat.videos.clip_arguments([medium])
        else:
            shown = {"images": [[vision.chat.pad_image(medium) if padded else medium]]}
        inputs = processor(
            text=[text],
            **shown,
            return_tensors="pt",
            add_special_tokens=vision.chat.adds_special_tokens(text),
        )
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
        found.append(model.eval()(**inputs, use_cache=False).logits[0].float().softmax(-1).cpu())
    return found


def largest_difference(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """Largest difference of a probability; 1 where texts differ in length, so that nothing can be compared."""
    pairs = zip(some, others, strict=True)
    return max(float((a - b).abs().max()) if a.shape == b.shape else 1.0 for a, b in pairs)


# ---------------------------------------------------------------------------------------------- what is written


def exported_processor(vision: VisionLanguageModel) -> tuple[Any, list[str]]:
    """The processor to write, and what it cannot do."""
    if not vision.chat.pad_to_square:
        return vision.processor, []
    padding = padding_processor(vision.processor, vision.chat.images)
    if padding is not None:
        return padding, []
    return vision.processor, [
        "The adapter was trained with images padded to squares, which this base's processor cannot do: pad them before, in the "
        "processor's mean colour."
    ]


def write_peft(vision: VisionLanguageModel, path: Path, base: str, dtype: str | None) -> Callable[[], Any]:
    """Plain LoRA with alpha = rank, and modules that were trained in full as they are; returns what loads it.

    Raises:
        UserError: when the adapter is not a plain LoRA.
    """
    state, config = peft_state(plain_lora(vision, ADAPTER))
    for name, module in full_modules(vision.model).items():
        own = module.modules_to_save[ADAPTER].state_dict()
        state |= {f"{name}.{key}": value.detach().float().cpu() for key, value in own.items()}
        config.modules_to_save = [*(config.modules_to_save or []), name]
    config.base_model_name_or_path = base_name(base)
    write_state(path, state, config)
    return lambda: load_peft(vision, path)


def plain_lora(vision: VisionLanguageModel, adapter: str) -> Part:
    """The adapter's changes.

    Raises:
        UserError: when they are not a plain LoRA.
    """
    part = Part(vision.model, fold(vision.model, adapter), adapter)
    try:
        check_representable(part, "peft")
    except UserError as error:
        homeless = any(c.bias is not None and part.layer(name).bias is None for name, c in part.folded.items())
        raise UserError(
            f"{str(error).split(': use')[0]}. {NO_BIAS_ADVICE if homeless else 'Use --format merged.'}"
        ) from error
    return part


def check_exportable(vision: VisionLanguageModel, format: str, adapter: str) -> None:
    """Checks that an adapter on a model, which may be without numbers, can be written in a format.

    Raises:
        UserError: as the format's writer does, but for what numbers decide.
    """
    if format == "peft":
        plain_lora(vision, adapter)
    elif format == "vllm":
        served_lora(vision, adapter)
    else:
        fold(vision.model, adapter)


def write_vllm(vision: VisionLanguageModel, path: Path, base: str, dtype: str | None) -> Callable[[], Any]:
    """A LoRA folder that vLLM serves; returns what loads it.

    Raises:
        UserError: as `served_lora` does.
    """
    state, config = served_lora(vision, ADAPTER)
    config.base_model_name_or_path = base_name(base)
    write_state(path, state, config)
    return lambda: load_peft(vision, path)


def served_lora(vision: VisionLanguageModel, adapter: str) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Tensors and config of the LoRA that vLLM serves.

    Raises:
        UserError: when vLLM would not serve all of the adapter, or with other images than it was trained on.
    """
    if full := list(full_modules(vision.model)):
        raise UserError(
            f"vLLM serves no module that was trained in full, and the adapter brings {full[0]}: use --format merged."
        )
    if vision.chat.pad_to_square:
        raise UserError(
            "vLLM gives images to the base's own processor, without the padding to squares that the adapter was trained with: use "
            "--format merged."
        )
    return vllm_state(Part(vision.model, fold(vision.model, adapter), adapter), vision.family.language)


def load_peft(vision: VisionLanguageModel, path: Path) -> Any:
    """The base with a PEFT folder, by the stock classes."""
    base = AutoModelForImageTextToText.from_pretrained(vision.folder, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(path))


def full_modules(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """Modules that the adapter brings in full, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}


@torch.no_grad()
def write_merged(vision: VisionLanguageModel, path: Path, base: str, dtype: str | None) -> Callable[[], Any]:
    """The whole model in a dtype; `vision` is what was written afterwards, in fp32. Returns what loads it.

    Raises:
        UserError: when the adapter is not linear, so that no weight could do what it does.
    """
    model = vision.model
    changes = fold(model, ADAPTER)
    for name, layer in adapter_layers(model).items():
        own: Any = layer.get_base_layer()
        change = changes[name]
        untie(model, own)
        weight = own.weight.float()
        own.weight.copy_(weight + change.delta_weight(weight.flatten(1).cpu()).view_as(weight).to(weight.device))
        if change.bias is not None:
            if own.bias is None:
                raise UserError(
                    f"The adapter gives {name} a bias that the base's layer does not have, so the base's class has no "
                    f"place for it. {NO_BIAS_ADVICE}"
                )
            own.bias.add_(change.bias.to(own.bias))
        replace_module(model, name, own)
    for name, module in full_modules(model).items():
        replace_module(model, name, module.modules_to_save[ADAPTER])
    for key in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(key, None)
    model._hf_peft_config_loaded = False
    model.to(DTYPES[dtype] if dtype else stored_dtype(vision.folder))
    model.save_pretrained(path)
    model.float()
    return lambda: AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)


def untie(model: Any, layer: Any) -> None:
    """Gives a layer a weight of its own where it is another module's too (a head that is the table of embeddings), for good."""
    sharing = [module for module in model.modules() if module._parameters.get("weight") is layer.weight]
    if len(sharing) < 2:
        return
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    for config in (model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)):
        if hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = False


WRITERS = {"peft": write_peft, "merged": write_merged, "vllm": write_vllm}


# ---------------------------------------------------------------------------------------------- how it is used


def serving_notes(vision: VisionLanguageModel, path: Path, base: str, format: str, written: Path) -> list[str]:
    """How what was written is served, or why not."""
    limits = {key: value for key in ("max_pixels", "min_pixels") if (value := getattr(vision, key)) is not None}
    images = f" --mm-processor-kwargs '{json.dumps(limits)}'" if limits else ""
    if format == "merged":
        return [f"Serve it: vllm serve {path}, or python -m sglang.launch_server --model-path {path}"]
    config = json.loads((written / "adapter_config.json").read_text(encoding="utf-8"))
    if format == "peft":
        try:
            fit = not config["modules_to_save"] and vllm_state(
                Part(vision.model, fold(vision.model, ADAPTER), ADAPTER), vision.family.language
            )
        except UserError:
            fit = False
        advice = "--format vllm" if fit and not vision.chat.pad_to_square else "--format merged"
        return [f"For vLLM and SGLang use {advice}."]
    rank, name = config["r"], base_name(base)
    return [
        f"Serve it: vllm serve {name} --enable-lora --max-lora-rank {max_lora_rank(rank)} --lora-modules tuned={path} "
        f"--chat-template {path / 'chat_template.jinja'}{images}",
        f"or: python -m sglang.launch_server --model-path {name} --enable-lora --lora-paths tuned={path}",
    ]


def model_card(vision: VisionLanguageModel, base: str, format: str, notes: list[str]) -> str:
    """README.md, with the base by name."""
    library = "transformers" if format == "merged" else "peft"
    head = [
        "---",
        f"base_model: {base_name(base)}",
        f"library_name: {library}",
        "pipeline_tag: image-text-to-text",
        "---",
    ]
    what = "with an adapter in its weights" if format == "merged" else "with a LoRA adapter"
    return "\n".join(
        [*head, "", f"{base_name(base)} ({vision.config['model_type']}) {what}, written by rankfold.", "", *notes, ""]
    )
