"""The commands: what each does, in one line, and where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """A function of the words behind the command's name, found only when it is called: help must answer at once."""

    help: str
    target: str

    def __call__(self, argv: list[str]) -> None:
        module, function = self.target.split(":")
        run: Callable[[list[str]], None] = getattr(import_module(f"{__package__}.{module}"), function)
        run(argv)


COMMANDS = {
    "demo": Command(
        "Teach the embedded model a new creature, offline, in minutes, and show before and after.", "demo:demo"
    ),
    "demo instruct": Command(
        "Teach the embedded vision-language model a task, and show what it saw, learned and forgot.",
        "demo_instruct:demo_instruct",
    ),
    "demo edit": Command(
        "Teach the embedded model to follow a reference image, and show before, after and with another's reference.",
        "demo_edit:demo_edit",
    ),
    "train subject": Command(
        "Teach a diffusion model your subject from a folder of images.", "train_subject:train_subject"
    ),
    "train edit": Command(
        "Teach a diffusion model to make images from reference images, from pairs.", "train_edit:train_edit"
    ),
    "train dedistill": Command(
        "Make a training adapter for a distilled base, of the base's own images.", "train_dedistill:train_dedistill"
    ),
    "train instruct": Command(
        "Teach a vision-language model your task from images with questions and answers.",
        "train_instruct:train_instruct",
    ),
    "plan subject": Command(
        "Say what memory a training run will take, before anything is loaded.", "plan_subject:plan_subject"
    ),
    "plan instruct": Command(
        "Say what a training on conversations will take and learn from, before anything is loaded.",
        "plan_instruct:plan_instruct",
    ),
    "search subject": Command(
        "Search each layer's own GLoRA structure for your subject.", "search_subject:search_subject"
    ),
    "search instruct": Command(
        "Search each layer's own GLoRA structure for your task.", "search_instruct:search_instruct"
    ),
    "evaluate": Command("Measure what a subject's adapter is worth, against its base.", "evaluate:evaluate"),
    "report": Command("Put runs side by side on one page.", "report:report"),
    "evaluate instruct": Command(
        "Set a tuned vision-language model against its base, with controls and what it forgot.",
        "evaluate_instruct:evaluate_instruct",
    ),
    "caption": Command("Write captions beside a subject's photos, by a vision-language model.", "caption:caption"),
    "chat": Command("Ask a tuned vision-language model about images.", "chat:chat"),
    "resume": Command("Go on with a stopped or killed run, exactly where it was.", "resume:resume"),
    "stop": Command("Ask a run to write a checkpoint and stop.", "stop:stop"),
    "queue": Command("Put a run into the queue.", "queue:queue"),
    "work": Command("Carry out queued runs, one after another for each device.", "work:work"),
    "app": Command("Train, watch, sample and compare in the browser.", "app:app"),
    "sample": Command("Make images with a trained adapter.", "sample:sample"),
    "compose": Command(
        "Make one adapter of several, with weights given, alike, or learned on a few images.", "compose:compose"
    ),
    "compose instruct": Command(
        "The same for adapters of a vision-language model, learned on a few conversations.", "compose:compose_instruct"
    ),
    "library add": Command("Put a trained adapter into the library.", "library:add"),
    "library list": Command("List the adapters in the library.", "library:list_all"),
    "library show": Command("Say what one of them is.", "library:show"),
    "export": Command(
        "Write an adapter as plain LoRA for diffusers, kohya tools or PEFT, and prove the file.", "export:export"
    ),
    "convert": Command(
        "Write an adapter file of any tool in the format of another, and prove the file.", "convert:convert"
    ),
    "inspect": Command(
        "Say what a LoRA file is and who can load it, or show what a data file teaches.", "inspect:inspect"
    ),
    "convert-config": Command(
        "Turn a configuration of another trainer into one of ours.", "convert_config:convert_config"
    ),
    "convert-base": Command(
        "Turn a base model in one file, or in several, into a pipeline folder.", "convert_base:convert_base"
    ),
    "adapters": Command("List the adapter variants and their options.", "adapters:adapters"),
    "doctor": Command("Show versions, devices, memory and caches, and what is missing.", "doctor:doctor"),
    "build-tiny": Command("Build the embedded models from scratch.", "build_tiny:build_tiny"),
}
