"""Cross-validation: how many steps a subject needs, where photos are too few to leave any out of the last training.

Each fold trains without some of the photos and is measured by these. The step that is best over all folds is how long the last
training, on all photos, goes on.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from ...toolkit.core.errors import UserError
from ...toolkit.core.run_folder import Run
from ...toolkit.data.subjects import find_samples
from ..config.subject import NO_PROMPTS, SubjectConfig
from ..config.yaml_file import from_yaml
from ..engine.loop import comparable_config
from ..engine.processes import distributed_state, is_main_process, num_processes
from ..evaluation import measuring
from ..runs.begin import check_out, clear_folder
from .start import begin, preflight, resume
from .trained_on import data_items, differences, first_changes, load_data


def cross_validate(config: SubjectConfig, folds: int, *, overwrite: bool = False) -> Run:
    """The run on all photos, for as many steps as `folds` other runs (in its folder) say. What is done already is not done again.

    overwrite: deletes the run and the folds that are in the folder.

    Raises:
        UserError: for settings that exclude each other, fewer photos than folds, a folder that holds another run or another
            cross-validation, and as `train` does.
    """
    checks = {"--evaluate-every": not config.evaluate_every, "no --evaluate-images": config.evaluate_images is not None}
    checks["other --evaluate-prompts than none"] = config.evaluate_prompts == NO_PROMPTS
    for wanted, wrong in (checks | {"no --hold-out": config.hold_out}).items():
        if wrong:
            raise UserError(f"--folds holds other photos out in turn: it needs {wanted}.")
    if config.images is None:
        raise UserError("--images is missing: give the folder with the images of the subject.")
    files = sorted({sample.path.name for sample in find_samples(config.images, skip_bad=config.skip_bad)})
    if not 2 <= folds <= len(files):
        raise UserError(f"--folds must be between 2 and the number of photos, {len(files)}, not {folds}.")
    own = [
        replace(
            config,
            hold_out=tuple(files[k::folds]),
            out=config.out / "folds" / str(k),
            keep="last",
            patience=0,
            export=(),
        )
        for k in range(folds)
    ]
    checked = [preflight(fold) for fold in own]
    last = replace(config, evaluate_every=0, keep="last", patience=0)
    with Run(config.out).locked() if is_main_process() else nullcontext():
        return carry_out(own, checked, last, overwrite=overwrite)


def carry_out(own: list[SubjectConfig], checked: list[Any], last: SubjectConfig, *, overwrite: bool) -> Run:
    """The folds and the run on all photos. own: the configs of the folds; checked: what their checks have given."""
    if is_main_process():
        prepare_or_continue(Run(last.out), last, checked, overwrite=overwrite)
    if num_processes() > 1:
        distributed_state().wait_for_everyone()
    choice = measuring.choose_step([measuring.Series.load(finish_fold(fold)) for fold in own])
    if is_main_process():
        print(f"cross-validation of {len(own)} runs: {measuring.describe_choice(choice)}")
    run = resume_or_begin(replace(last, steps=choice.step))
    if is_main_process():
        measuring.write_choice(run, choice)
    return run


def prepare_or_continue(run: Run, last: SubjectConfig, folds: list[Any], *, overwrite: bool) -> None:
    """Clears the folder of a cross-validation, or checks that what is there is the beginning of this one.

    last: the config of the run on all photos, whose steps are not known yet; folds: what the checks of the others have given.
    """
    run.recover()
    if overwrite or not run.folds():
        check_out(last, overwrite=overwrite)
        clear_folder(run)
        run.discard_aside()
        return
    run.check_not_live()
    check_same_run(run, last, None)
    for config, inputs in folds:
        check_same_run(Run(config.out), config, inputs)


def check_same_run(run: Run, config: SubjectConfig, inputs: Any) -> None:
    """Raises UserError when a run that is there, and is worth keeping, has another config or other data.

    inputs: what its checks have found; None for the last run, whose steps and data hang on the others.
    """
    if not run.is_worth_keeping(("folds",)):
        return
    old = from_yaml(run.config_file)
    before, now = comparable_config(old), comparable_config(config)
    if inputs is not None:
        before, now = before | {"steps": str(old.steps)}, now | {"steps": str(config.steps)}
    other = [f"{key} was {before.get(key)}, now it is {now[key]}" for key in now if before.get(key) != now[key]]
    data = load_data(run)
    if data is None:
        print(f"{run.folder} says nothing of its data, so whether they have changed since cannot be told.")
    elif not other:
        other = differences(data.items, data_items(*(config, inputs) if inputs else preflight(config)))
    if other:
        raise UserError(
            f"{run.folder} is of another run or cross-validation: {first_changes(other)}. Put that back, start over with --overwrite, "
            "which deletes it with all its folds, or give another --out."
        )


def finish_fold(config: SubjectConfig) -> Run:
    """The run of a fold: as it is when it is done, gone on with when it was stopped, begun otherwise."""
    run = resume_or_begin(config)
    if run.status()["state"] != "done":
        raise UserError(f"{config.out} was stopped: the same command goes on.")
    return run


def resume_or_begin(config: SubjectConfig) -> Run:
    """A run that may be there already: as it is when it is done, gone on with from its checkpoint, or begun."""
    run = Run(config.out)
    if run.state() == "done":
        if is_main_process():
            print(f"{config.out} is done already.")
        return run
    return resume(config.out) if run.checkpoint_files() else begin(config, keep=("folds",))
