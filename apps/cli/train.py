"""`rankfold train subject`, `plan subject`, `search subject`, `resume` and `stop`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ...toolkit.core.errors import UserError
from .options import check_free, is_first, parse, parse_run, positional, take_option

if TYPE_CHECKING:
    from ...training.config.subject import SubjectConfig


def train_subject(words: list[str]) -> None:
    """`--config FILE` gives the defaults; other options change them."""
    config, fit, folds, overwrite = subject_options(words, "train subject")
    if not folds:  # a cross-validation goes on with what is there
        check_free(config, overwrite=overwrite)
    from ...training.launch.cross_validation import cross_validated
    from ...training.launch.start import train

    if fit is not None:
        from ...training.launch.plan import fitted, plan

        flags, estimate = fitted(plan(config), fit)
        config = estimate.config
        print(f"fits in {fit:g} GiB {'with: ' + ' '.join(flags) if flags else 'as it is'}")
    if folds:
        run = cross_validated(config, folds, overwrite=overwrite)
    else:
        run = train(config, overwrite=overwrite)
    report(run.folder)


def subject_options(words: list[str], name: str) -> tuple[SubjectConfig, float | None, int, bool]:
    """The config of a subject's training, how many GiB its peak may take, in how many folds it is cross-validated, and --overwrite."""
    from ...training.config.subject import SubjectConfig
    from ...training.config.yaml_file import from_yaml

    @dataclass(frozen=True, kw_only=True)
    class Options(SubjectConfig):
        fit: float | None = None
        """Choose the fewest savings that bring the peak of memory under so many GiB."""
        folds: int = 0
        """Cross-validation: so many runs, each measured by other photos, say how many steps the last one on all photos takes."""

    config_file, words = take_option(words, "--config")
    default = Options(**asdict(from_yaml(Path(config_file)))) if config_file else Options()
    options, overwrite = parse_run(Options, words, name, default)
    if options.fit is not None and options.fit <= 0:
        raise UserError(f"--fit must be above 0, not {options.fit}.")
    if options.folds < 0 or options.folds == 1:
        raise UserError(f"--folds must be 0, or at least 2, not {options.folds}.")
    values = {field.name: getattr(options, field.name) for field in fields(SubjectConfig)}
    return SubjectConfig(**values), options.fit, options.folds, overwrite


def plan_subject(words: list[str]) -> None:
    """Nothing is loaded, nothing written."""
    config, fit, folds, overwrite = subject_options(words, "plan subject")
    from ...training.launch.plan import advice, disk, fitted, least_seconds, plan

    estimate = plan(config)
    if fit is None:
        lines = advice(estimate)
    else:
        flags, estimate = fitted(estimate, fit)
        lines = [f"fits in {fit:g} GiB with: {' '.join(flags)}" if flags else f"fits in {fit:g} GiB as it is"]
    for part in ("base", "adapter", "working", "peak"):
        print(f"{part:16} {getattr(estimate, part) / 2**30:8.2f} GiB")
    print(f"trained numbers  {estimate.parameters:,}; the adapter's file: {estimate.parameters * 4 / 2**20:.1f} MiB")
    print(f"disk             {disk(estimate) / 2**20:8.1f} MiB in the run folder, beside previews")
    print(
        f"time             {least_seconds(estimate) / 60:8.1f} minutes at least: {config.steps} steps of "
        f"{estimate.flops / 1e9:,.1f} GFLOP at the rate of large matrix products here"
    )
    print(*lines, sep="\n")
    if folds:
        print(f"That is one training; --folds makes {folds} more.")
    if overwrite:
        print("--overwrite is for the training: a plan writes nothing.")


def search_subject(words: list[str]) -> None:
    from ...training.config.search import SearchConfig
    from ...training.config.yaml_file import from_yaml

    config_file, words = take_option(words, "--config")
    default = from_yaml(Path(config_file)) if config_file else SearchConfig()
    config, overwrite = parse_run(SearchConfig, words, "search subject", default)
    check_free(config, overwrite=overwrite)
    from ...training.launch.start import train

    run = train(config, overwrite=overwrite)
    report(run.folder)
    table = run.folder / "structure.txt"
    if run.status()["state"] == "done":
        print(f"The structure: {table}; all that were tried: {run.folder / 'pareto.png'}")
        print(f"Train it from the start: rankfold train subject --config {run.folder / 'best.yaml'}")


def resume(words: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        run: Annotated[Path, positional()]
        """Run folder."""
        accept_changes: bool = False
        """Go on though pictures, captions, rows, adapters or the base are not those that the run was trained on so far."""

    options = parse(Options, words, "resume")
    from ...training.config.instruct import ConversationConfig
    from ...training.config.yaml_file import from_yaml
    from ...training.launch.start import resume as go_on

    run = go_on(options.run, accept_changes=options.accept_changes)
    talks = isinstance(from_yaml(run.config_file), ConversationConfig)
    report(run.folder, f"rankfold chat --run {run.folder} --image PICTURE QUESTION" if talks else "")


def stop(words: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        run: Annotated[Path, positional()]
        """Run folder."""

    from ...toolkit.core.run_folder import Run

    run = Run.open(parse(Options, words, "stop").run)
    run.ask("stop")
    print(f"{run.folder} will write a checkpoint and stop after this step.")


def report(folder: Path, then: str = "") -> None:
    """Says how a run ended and what can be done with it. then: the next command."""
    from ...toolkit.core.run_folder import Run

    if not is_first():
        return
    status = Run(folder).status()
    if status["state"] == "stopped":
        print(f"Stopped at step {status['step']}; a checkpoint is kept. Go on with: rankfold resume {folder}")
    else:
        print(f"Done: {folder / 'adapter'}\nNext: {then or f'rankfold sample --run {folder} --n 4 --grid'}")
