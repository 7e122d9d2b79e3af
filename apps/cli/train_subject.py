"""`rankfold train subject`, and how its options are read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from ...toolkit.core.errors import UserError
from .options import check_out_free, parse_run, take_option
from .outcome import print_outcome

if TYPE_CHECKING:
    from ...training.config.subject import SubjectConfig


def train_subject(argv: list[str]) -> None:
    """`--config FILE` gives the defaults; other options change them."""
    start_training(*subject_options(argv, "train subject"))


def start_training(config: SubjectConfig, fit: float | None, folds: int, overwrite: bool) -> None:
    """Carries out what `subject_options` has read."""
    if not folds:  # a cross-validation goes on with what is there
        check_out_free(config, overwrite=overwrite)
    from ...training.launch.cross_validation import cross_validate
    from ...training.launch.start import train

    if fit is not None:
        from ...training.launch.plan import fit_to_memory, plan

        flags, estimate = fit_to_memory(plan(config), fit)
        config = estimate.config
        print(f"fits in {fit:g} GiB {'with: ' + ' '.join(flags) if flags else 'as it is'}")
    if folds:
        run = cross_validate(config, folds, overwrite=overwrite)
    else:
        run = train(config, overwrite=overwrite)
    print_outcome(run.folder)


def subject_options(
    argv: list[str], name: str, default: SubjectConfig | None = None
) -> tuple[SubjectConfig, float | None, int, bool]:
    """The config of a subject's training, how many GiB its peak may take, in how many folds it is cross-validated, and --overwrite.

    default: what is not given, where no --config says it.
    """
    from ...training.config.subject import SubjectConfig
    from ...training.config.yaml_file import from_yaml, method_name

    @dataclass(frozen=True, kw_only=True)
    class Options(SubjectConfig):
        fit: float | None = None
        """Choose the fewest savings that bring peak memory under this many GiB."""
        folds: int = 0
        """Cross-validation: number of folds; they decide how many steps the final run on all photos takes."""

    config_file, argv = take_option(argv, "--config")
    given = from_yaml(Path(config_file)) if config_file else default or SubjectConfig()
    if not isinstance(given, SubjectConfig):
        raise UserError(
            f"--config {config_file} is of another method ({method_name(given)}): use the command it was made for."
        )
    options, overwrite = parse_run(Options, argv, name, Options(**asdict(given)))
    if options.fit is not None and options.fit <= 0:
        raise UserError(f"--fit must be above 0, not {options.fit}.")
    if options.folds < 0 or options.folds == 1:
        raise UserError(f"--folds must be 0, or at least 2, not {options.folds}.")
    values = {field.name: getattr(options, field.name) for field in fields(SubjectConfig)}
    return SubjectConfig(**values), options.fit, options.folds, overwrite
