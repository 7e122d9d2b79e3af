"""A run of any method, from its checks to its last status: started, and resumed."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ...toolkit.core.errors import UserError
from ...toolkit.core.quantize import check_quantize
from ...toolkit.core.run_folder import Run
from ...toolkit.core.versions import check_versions
from ...toolkit.data.references import add_references, check_references
from ...toolkit.data.subjects import Sample, check_masks, find_samples
from ...toolkit.diffusion.load import EMBEDDED, open_model, resolve_base
from ...toolkit.diffusion.model import ATTENTION_TARGETS, DTYPES
from ...toolkit.diffusion.textual_inversion import check_token
from ...toolkit.formats.adapter_facts import read_facts
from ..compose.checks import check_compose
from ..compose.fixed import check_fixed, compose_fixed
from ..compose.instruct import (
    ComposeInstructTask,
    check_instruct_fixed,
    compose_instruct_fixed,
    prepare_compose_instruct,
)
from ..compose.task import ComposeTask
from ..config.base import LoopConfig
from ..config.checks import check_ranges
from ..config.compose import ComposeConfig, ComposeInstructConfig, has_fixed_weights
from ..config.defaults import resolve_defaults
from ..config.images import DiffusionConfig
from ..config.instruct import InstructConfig
from ..config.peft_config import peft_config
from ..config.search import InstructSearchConfig, SearchConfig
from ..config.start_from import check_start
from ..config.subject import NO_PROMPTS, SubjectConfig
from ..config.unused import unused_settings
from ..config.yaml_file import from_yaml
from ..engine.block_swap import check_block_swap, check_count
from ..engine.loop import Loop
from ..engine.optimizer import check_optimizer
from ..engine.processes import check_devices, check_tracker, is_main_process, make_accelerator, num_processes
from ..engine.sharding import check_sharding
from ..evaluation.subject import read_prompts
from ..instruct.prepare import prepare_instruct
from ..instruct.task import InstructTask
from ..runs.begin import check_out, prepare_folder, restore_previous, with_absolute_paths
from ..search.instruct import InstructSearchTask, prepare_instruct_search
from ..search.subject import SearchTask
from ..search.supernet import check_search
from ..subject.adapter import SubjectAdapter
from ..subject.denoising import check_compile, check_target_guidance, repeated_blocks
from ..subject.held_out import held_out_samples, measured_pairs, split_measured_photos
from ..subject.preview_base import check_preview_base
from ..subject.sizes import reference_size, trained_sizes
from ..subject.task import SubjectTask
from ..subject.training_adapter import read_changes
from .exports import check_exports, export_when_done
from .notices import announce
from .out_of_memory import run_out_of_memory
from .trained_on import TrainingData, check_data, collect_training_data, load_data, save_data, with_held_out

Inputs = tuple[Any, ...]  # what a method's checks found, which its Task is built of
SAME_RUN = (
    "config.yaml",
    "status.json",
    "log.txt",
    "output.txt",
)  # what stays where a run itself is done again


def prepare_images(config: DiffusionConfig, check: Callable[[Any], Any]) -> tuple[DiffusionConfig, Inputs]:
    """Samples and the base's folder."""
    check(config)
    if config.images is None:
        raise UserError("--images is missing: give the folder with the images of the subject.")
    samples = find_samples(config.images, flip=config.flip, skip_bad=config.skip_bad)
    for name, folder in config.also.items() if isinstance(config, SubjectConfig) else ():
        more = find_samples(Path(folder), flip=config.flip, skip_bad=config.skip_bad, option="--also")
        samples += [replace(sample, caption=sample.caption or f"a {name.strip()}") for sample in more]
    if config.masks:
        check_masks(samples, config.masks)
    samples = pair_references(config, samples)
    if config.prior_folder is not None:
        find_samples(config.prior_folder, skip_bad=config.skip_bad, option="--prior-folder")
    base = check_base(config)
    if not config.class_noun.strip():
        raise UserError("--class-noun is missing: say what the subject is, such as dog, mug or person.")
    if isinstance(config, SubjectConfig):
        check_measuring(config, samples)
        if config.start_from is not None:
            check_start(config)
            SubjectAdapter(config).attach(open_model(base, DTYPES[config.precision], "meta"))  # shapes alone
    return config, (samples, base)


def pair_references(config: DiffusionConfig, samples: list[Sample]) -> list[Sample]:
    """The samples with their references.

    Raises:
        UserError: for pairs that are not whole, a base that takes none, and settings that know of none.
    """
    if isinstance(config, SubjectConfig):
        samples = add_references(samples, config.references)
    model = open_model(resolve_base(config.base))
    if model.min_references and not (
        isinstance(config, SubjectConfig) and all(sample.references for sample in samples)
    ):
        raise UserError(
            f"{model.title} makes images from others, so each image that it learns needs {model.min_references} to "
            f"{model.max_references} references: see `rankfold train edit`, or take another base."
        )
    if not any(sample.references for sample in samples):
        if isinstance(config, SubjectConfig) and config.reference_dropout:
            raise UserError(
                "--reference-dropout is of references, and no image has any: give --references, or leave it out."
            )
        return samples
    if not isinstance(config, SubjectConfig):
        raise UserError(
            "References are learned by `rankfold train edit` and `train subject` only: take them out of metadata.jsonl."
        )
    check_references(samples, model.max_references, config.base)
    for sample in samples:
        for size in trained_sizes(config, sample, model):
            model.check_references([reference_size(config, path, size, model) for path in sample.references])
    for flag, given in (
        ("--prior-weight", config.prior_weight),
        ("--train-text-encoder", config.train_text_encoder),
        ("--preview-base", config.preview_base),
        *([("--reference-dropout", config.reference_dropout)] if model.min_references else []),
    ):
        if given:
            raise UserError(
                f"{flag} does not work with references{' of this base' if 'drop' in flag else ' yet'}: leave it out."
            )
    return samples


def check_base(config: DiffusionConfig) -> str:
    """The base's folder, checked against the settings that it must suit."""
    base = resolve_base(config.base)
    model = open_model(base)
    model.check_side(config.resolution, "--resolution")
    for side in config.extra_resolutions:
        model.check_side(side, "--extra-resolutions")
    if config.drawing_base == config.base:
        model.check_steps(config.preview_steps, "--preview-steps")
    if isinstance(config, SubjectConfig):
        if config.preview_base:
            check_preview_base(config, base)
        check_sharding(config, num_processes())
        if config.blocks_to_swap:
            check_block_swap(config)
            check_count(config.blocks_to_swap, len(repeated_blocks(open_model(base, torch.float32, "meta").denoiser)))
        check_compile(config)
        check_target_guidance(config, model)
        if config.num_vectors:
            check_token(model, config.token)
        if config.training_adapter is not None:  # by shapes alone
            read_changes(
                config.training_adapter, open_model(base, DTYPES[config.precision], "meta"), model.denoiser_name
            )
    return base


def check_subject(config: SubjectConfig) -> None:
    """All checks of `preflight` for a subject, but for those of the images where none are given: a plan can do without.

    Raises:
        UserError: as `preflight` does.
    """
    check_settings(config)
    if config.images is not None:
        prepare, _ = METHODS[SubjectConfig]
        prepare(config)
        return
    peft_config(config, config.target_modules or ATTENTION_TARGETS)
    check_base(config)


def check_measuring(config: SubjectConfig, samples: list[Sample]) -> None:
    """Raises UserError when measuring during training lacks photos, prompts or a backbone."""
    if not config.evaluate_every:
        return
    split_measured_photos(config, samples)
    held_out = held_out_samples(config, samples)
    check_references(held_out, open_model(resolve_base(config.base)).max_references, config.base)
    measured_pairs(config, held_out)
    if any(s.references for s in samples) and not any(s.references for s in held_out):
        raise UserError(
            "None of the images to measure by has a reference: write metadata.jsonl (file_name, references, text) into --evaluate-images, "
            "or name images that have some with --hold-out."
        )
    if config.evaluate_prompts == NO_PROMPTS:
        if config.evaluate_clip:
            raise UserError(
                "--evaluate-clip judges images, and --evaluate-prompts none draws none: leave one of the two out."
            )
        return
    if config.evaluate_prompts:
        read_prompts(config.evaluate_prompts)
    if not config.evaluate_clip and config.base not in EMBEDDED:
        raise UserError(
            "--evaluate-clip is missing: the embedded model knows only drawn images. Name one of open_clip, such as "
            "ViT-B-32-quickgelu:openai, or measure the validation loss alone with --evaluate-prompts none."
        )


# What each method checks and finds without loading a model, and its Task.
METHODS: dict[type[LoopConfig], tuple[Callable[[Any], tuple[Any, Inputs]], Callable[..., Any]]] = {
    SubjectConfig: (
        partial(prepare_images, check=lambda c: peft_config(c, c.target_modules or ATTENTION_TARGETS)),
        SubjectTask,
    ),
    ComposeConfig: (partial(prepare_images, check=check_compose), ComposeTask),
    SearchConfig: (partial(prepare_images, check=check_search), SearchTask),
    InstructConfig: (prepare_instruct, InstructTask),
    ComposeInstructConfig: (prepare_compose_instruct, ComposeInstructTask),
    InstructSearchConfig: (prepare_instruct_search, InstructSearchTask),
}


def train(config: LoopConfig, make_task: Callable[..., Any] | None = None, *, overwrite: bool = False) -> Run:
    """Checks everything that can be checked, then trains; the run folder holds all that comes of it.

    make_task: builds the Task instead of the method's own, as functools.partial(SearchTask, judge=...) does.
    overwrite: deletes the run that is in the folder, once the new one is under way.

    Raises:
        UserError: for anything in the config, the images or the base that cannot work, and for a folder that holds a run.
    """
    check = partial(check_out, config, overwrite=overwrite)
    if is_main_process():
        check()
    return begin(config, make_task, still_free=check)


def begin(
    config: LoopConfig,
    make_task: Callable[..., Any] | None = None,
    keep: Collection[str] = (),
    still_free: Callable[[], None] = lambda: None,
) -> Run:
    """The same in a folder that `check_out` has let pass. keep: entries that stay there; still_free: see `prepare_folder`."""
    config, inputs = preflight(config)
    config = with_absolute_paths(config)
    accelerator, run = make_accelerator(config), Run(config.out)
    if accelerator.is_main_process:
        data = collect_training_data(config, inputs)
        prepare_folder(run, config, keep, still_free)
        announce(config, inputs, run)
        run.set_status(
            threads=torch.get_num_threads()
        )  # another number would add up in another order when the run goes on
        save_data(run, data)
    accelerator.wait_for_everyone()
    outcome = run_task(config, inputs, run, accelerator, make_task, keep)
    return finish(config, run, accelerator, outcome)


def compose(config: ComposeConfig | ComposeInstructConfig, *, overwrite: bool = False) -> Run:
    """One adapter of several: by weights learned on the config's images or conversations, or fixed when there are none.

    overwrite: as in `train`.

    Raises:
        UserError: for adapters that are missing, do not fit the base or each other, and as `train` does.
    """
    if not has_fixed_weights(config):
        return train(config, overwrite=overwrite)
    config = resolve_defaults(config)
    check = partial(check_out, config, overwrite=overwrite)
    check()
    return run_fixed_composition(config, still_free=check)


def run_fixed_composition(
    config: Any, keep: Collection[str] = (), still_free: Callable[[], None] = lambda: None
) -> Run:
    """A composition by fixed weights, in a folder that `check_out` has let pass. keep, still_free: see `prepare_folder`."""
    make = compose_instruct_fixed if isinstance(config, ComposeInstructConfig) else compose_fixed
    check_exports(config)
    run = make(config, keep, still_free)
    for text in unused_settings(config):
        print(text, flush=True)
        run.append_log(text)
    if config.export:
        export_when_done(run, config.export)
    return run


def resume(folder: Path, make_task: Callable[..., Any] | None = None, *, accept_changes: bool = False) -> Run:
    """Goes on with a run from its newest checkpoint, with the config (and make_task) it was started with.

    accept_changes: also where the data are others than the checkpoint was trained on.

    Raises:
        UserError: when the folder holds no run, or a live one, or its checkpoint is of another config, or of other data.
    """
    config, inputs = check_resume(folder, accept_changes=accept_changes)
    run = Run(folder)
    if has_fixed_weights(config):
        run.claim()
        return run_fixed_composition(config, SAME_RUN)
    known = run.status().get("threads")
    accelerator = make_accelerator(config, known if isinstance(known, int) and run.checkpoint_files() else 0)
    if accelerator.is_main_process:
        begun = bool(run.checkpoint_files())
        if begun:
            run.discard_aside()
        run.claim()
        if not begun:  # a queued run, or one that was killed before its first checkpoint
            announce(config, inputs, run)
    accelerator.wait_for_everyone()
    outcome = run_task(config, inputs, run, accelerator, make_task)
    return finish(config, run, accelerator, outcome)


def check_resume(folder: Path, *, accept_changes: bool = False) -> tuple[Any, Inputs]:
    """Everything that can be checked before a run goes on; what `preflight` returns.

    Raises:
        UserError: see `resume`.
    """
    Run(folder).recover()
    run = Run.open(folder)
    config = replace(from_yaml(run.config_file), out=Path(folder))
    if has_fixed_weights(config):
        run.check_not_live()
        if run.state() == "done":
            raise UserError(f"{folder} is done: a composition by fixed weights has nothing to go on with.")
        config = resolve_defaults(config)
        check_config(config)
        return config, ()
    done = run.newest_step()
    if done > config.steps:
        raise UserError(
            f"{folder} has done {done} steps, and its config.yaml asks for {config.steps}: put {done} or more there, or start over "
            "with --overwrite."
        )
    checked, inputs = preflight(restore_held_out(config, run))
    if isinstance(config, SubjectConfig):
        checked = replace(checked, hold_out=config.hold_out)
    if is_main_process():
        check_data(run, checked, inputs, accept=accept_changes)
    return checked, inputs


def restore_held_out(config: Any, run: Run) -> Any:
    """The config with the photos that were held out when the run began, as long as they are there."""
    known = with_held_out(config, load_data(run))
    there = isinstance(known, SubjectConfig) and all(
        (Path(known.images or "") / name).is_file() for name in known.hold_out
    )
    return known if there else config


def check_config(config: Any) -> None:
    """All checks that need no model, of anything that `train` or `compose` takes; raises UserError as they do."""
    if not has_fixed_weights(config):
        preflight(config)
    else:
        config = resolve_defaults(config)
        (check_instruct_fixed if isinstance(config, ComposeInstructConfig) else check_fixed)(config)
        check_exports(config)


def preflight(config: Any) -> tuple[Any, Inputs]:
    """All checks that need no model. Returns the config, with what the data settle in it, and what the Task is built of."""
    check_ranges(config)
    config = resolve_defaults(config)
    check_settings(config)
    if is_main_process():
        Run(config.out).check_not_live()
    prepare, _ = METHODS[type(config)]
    config, inputs = prepare(config)
    check_exports(config, inputs)
    return config, inputs


def check_settings(config: LoopConfig) -> None:
    """Raises UserError for settings that are out of range, or that this machine cannot carry out."""
    check_versions()
    check_ranges(config)
    check_optimizer(config)
    check_quantize(config.quantize)
    check_devices(config)
    check_tracker(config.tracker)


def run_task(
    config: LoopConfig,
    inputs: Inputs,
    run: Run,
    accelerator: Accelerator,
    make_task: Callable[..., Any] | None,
    keep: Collection[str] = (),
) -> str:
    """Builds the task, runs the loop, and leaves the outcome, 'done' or 'stopped', in status.json; one with exports to write still runs.

    keep: entries that `begin` has left where they were.
    """
    state, error, loop, is_main = "failed", "ended by the system", None, accelerator.is_main_process
    try:
        _, method_task = METHODS[type(config)]
        data = load_data(run)
        task = (make_task or method_task)(with_held_out(config, data), *inputs, accelerator)
        loop = Loop(config, task, run, accelerator, data.digest if data else "")
        loop.resume()
        if is_main:
            run.discard_aside()
        outcome = loop.train()
        if outcome == "done":
            outcome = task.conclude(run, accelerator)
        if outcome == "done" and is_main and data:
            record_data_changes(run, data)
        state, error = "running" if outcome == "done" and config.export else outcome, None
    except Exception as fault:
        lacking = run_out_of_memory(fault, config, run, building=loop is None)
        error = str(lacking or fault)
        run.append_log(traceback.format_exc())
        if lacking and lacking is not fault:
            raise lacking from fault
        raise
    finally:
        if is_main and not (state == "failed" and restore_previous(run, keep)):
            step = loop.step if loop else run.newest_step()
            run.set_status(state=state, step=step, total=config.steps, error=error, processes=accelerator.num_processes)
    return outcome


def finish(config: LoopConfig, run: Run, accelerator: Accelerator, outcome: str) -> Run:
    """What is left to do when the task, and the memory it took, are gone."""
    accelerator.free_memory()
    if accelerator.is_main_process and outcome == "done" and config.export:
        export_when_done(run, config.export)
    accelerator.wait_for_everyone()  # whoever reads the run folder next finds it as the first process has left it
    return run


def record_data_changes(run: Run, data: TrainingData) -> None:
    """Adds to what a run's adapter says of itself that it was trained on other data before."""
    if data.earlier and run.adapter.is_dir():
        replace(read_facts(run.adapter), data_changed=data.describe_changes()).save(run.adapter)
