"""A run of any method, from its checks to its last status: started, and resumed."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..toolkit.data.subjects import Sample, check_masks, find_samples
from ..toolkit.devices import check_precision
from ..toolkit.errors import UserError
from ..toolkit.models.base import ATTENTION
from ..toolkit.models.diffusion import EMBEDDED, open_model, resolve_base
from ..toolkit.models.new_words import check_new_word
from ..toolkit.models.quantise import check_quantize
from ..toolkit.runs import Run, write_text
from .adapter_config import adapter_config
from .compose import ComposeTask, check_compose, compose_fixed
from .compose_instruct import ComposeInstructTask, compose_instruct_fixed, prepare_compose_instruct
from .config import (
    ComposeConfig,
    ComposeInstructConfig,
    InstructConfig,
    InstructSearchConfig,
    LoopConfig,
    PictureConfig,
    SearchConfig,
    SubjectConfig,
    check_numbers,
    from_yaml,
    to_yaml,
)
from .evaluate_subject import read_prompts
from .instruct import InstructTask, prepare_instruct
from .loop import Loop
from .optimizer import check_optimizer
from .processes import is_first, launched, make_accelerator
from .search import check_search
from .search_instruct import InstructSearchTask, prepare_instruct_search
from .search_subject import SearchTask
from .sharding import check_sharding
from .shortage import of_run
from .subject import SubjectTask, measured_by

Inputs = tuple[Any, ...]  # what a method's checks found, which its Task is built of


def prepare_pictures(config: PictureConfig, check: Callable[[Any], Any]) -> tuple[PictureConfig, Inputs]:
    """Samples and the base's folder."""
    check(config)
    if config.images is None:
        raise UserError("--images is missing: give the folder with the pictures of the subject.")
    samples = find_samples(config.images, flip=config.flip, skip_bad=config.skip_bad)
    for name, folder in config.also.items() if isinstance(config, SubjectConfig) else ():
        more = find_samples(Path(folder), flip=config.flip, skip_bad=config.skip_bad, option="--also")
        samples += [replace(sample, caption=sample.caption or f"a {name.strip()}") for sample in more]
    if config.masks:
        check_masks(samples, config.masks)
    base = resolve_base(config.base)
    model = open_model(base)
    model.check_side(config.resolution, "--resolution")
    if isinstance(config, SubjectConfig):
        check_sharding(config, launched())
        check_measuring(config, samples)
        if config.token_vectors:
            check_new_word(model, config.token)
    return config, (samples, base)


def check_measuring(config: SubjectConfig, samples: list[Sample]) -> None:
    """Raises UserError when measuring during training lacks photos, prompts or a backbone."""
    if not config.evaluate_every:
        return
    measured_by(config, samples)
    if config.evaluate_prompts:
        read_prompts(config.evaluate_prompts)
    if not config.evaluate_clip and config.base not in EMBEDDED:
        raise UserError(
            "--evaluate-clip is missing: the embedded model knows only drawn pictures. Name one of open_clip, such as "
            "ViT-B-32-quickgelu:openai."
        )


# What each method checks and finds without loading a model, and its Task.
METHODS: dict[type[LoopConfig], tuple[Callable[[Any], tuple[Any, Inputs]], Callable[..., Any]]] = {
    SubjectConfig: (
        partial(prepare_pictures, check=lambda c: adapter_config(c, c.target_modules or ATTENTION)),
        SubjectTask,
    ),
    ComposeConfig: (partial(prepare_pictures, check=check_compose), ComposeTask),
    SearchConfig: (partial(prepare_pictures, check=check_search), SearchTask),
    InstructConfig: (prepare_instruct, InstructTask),
    ComposeInstructConfig: (prepare_compose_instruct, ComposeInstructTask),
    InstructSearchConfig: (prepare_instruct_search, InstructSearchTask),
}


def train(config: LoopConfig, make_task: Callable[..., Any] | None = None) -> Run:
    """Checks everything that can be checked, then trains; the run folder holds all that comes of it.

    make_task: builds the Task in the place of the method's own, as functools.partial(SearchTask, judge=...) does.

    Raises:
        UserError: for anything in the config, the pictures or the base that cannot work.
    """
    config, inputs = preflight(config)
    run = Run(config.out)
    run.folder.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(config)
    if accelerator.is_main_process:
        run.claim()
        for old in run.checkpoint_files():
            old.unlink()
        run.candidates.unlink(missing_ok=True)
        run.cut_metrics(-1)
        write_text(run.config_file, to_yaml(config))
    accelerator.wait_for_everyone()
    return carry_out(config, inputs, run, accelerator, make_task)


def compose(config: ComposeConfig | ComposeInstructConfig) -> Run:
    """One adapter of several: by weights learned on the config's pictures or conversations, or fixed when there are none.

    Raises:
        UserError: for adapters that are missing, do not fit the base or each other, and as `train` does.
    """
    if isinstance(config, ComposeInstructConfig):
        return compose_instruct_fixed(config) if config.data is None else train(config)
    return compose_fixed(config) if config.images is None else train(config)


def resume(folder: Path, make_task: Callable[..., Any] | None = None) -> Run:
    """Goes on with a run from its newest checkpoint, with the config (and make_task) it was started with.

    Raises:
        UserError: when the folder holds no run, or a live one, or its checkpoint is of another config.
    """
    run = Run.open(folder)
    config = replace(from_yaml(run.config_file), out=Path(folder))
    config, inputs = preflight(config)
    accelerator = make_accelerator(config)
    if accelerator.is_main_process:
        run.claim()
    accelerator.wait_for_everyone()
    return carry_out(config, inputs, run, accelerator, make_task)


def preflight(config: Any) -> tuple[Any, Inputs]:
    """All checks that need no model. Returns the config, with what the data settle in it, and what the Task is built of."""
    check_numbers(config)
    check_optimizer(config)
    check_quantize(config.quantize)
    check_precision(config.precision)
    if is_first() and Run(config.out).is_live():
        Run(config.out).claim()  # says which process has it
    prepare, _ = METHODS[type(config)]
    return prepare(config)


def carry_out(
    config: LoopConfig,
    inputs: Inputs,
    run: Run,
    accelerator: Accelerator,
    make_task: Callable[..., Any] | None,
) -> Run:
    """Builds the task, runs the loop, and leaves the outcome in status.json."""
    state, error, loop = "failed", "ended by the system", None
    try:
        _, method_task = METHODS[type(config)]
        task = (make_task or method_task)(config, *inputs, accelerator)
        loop = Loop(config, task, run, accelerator)
        loop.resume()
        outcome = loop.train()
        if outcome == "done":
            outcome = task.conclude(run, accelerator)
        state, error = outcome, None
    except Exception as fault:
        lacking = of_run(fault, config, run, building=loop is None)
        error = str(lacking or fault)
        run.append_log(traceback.format_exc())
        if lacking and lacking is not fault:
            raise lacking from fault
        raise
    finally:
        if accelerator.is_main_process:
            step = loop.step if loop else 0
            run.set_status(state=state, step=step, total=config.steps, error=error, processes=accelerator.num_processes)
    accelerator.wait_for_everyone()  # whoever reads the run folder next finds it as the first process has left it
    return run
