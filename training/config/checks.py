"""What can be checked of a config without files or models; the limits of a field stand in its type."""

from __future__ import annotations

import re
from math import isfinite
from pathlib import PurePath

from ...toolkit.core.errors import UserError
from ...toolkit.core.limits import check_limits
from ...toolkit.core.paths import windows_name_fault
from ...toolkit.core.systems import WINDOWS
from .base import LoopConfig
from .images import DiffusionConfig
from .subject import SubjectConfig


def check_ranges(config: LoopConfig) -> None:
    """Checks every field that can be checked without files or models.

    Raises:
        UserError: naming the first field that is out of range.
    """
    check_folder_names(config.out, windows=WINDOWS)
    check_limits(config)
    if isinstance(config, DiffusionConfig):
        check_diffusion_settings(config)


def check_folder_names(out: PurePath, *, windows: bool) -> None:
    """Raises UserError for a run folder that Windows cannot have, some of which it would take for something else."""
    for name in out.relative_to(out.anchor).parts if windows else ():
        if name != ".." and (fault := windows_name_fault(name)):
            raise UserError(f"--out {out}: Windows has no folder '{name}' ({fault}); choose another name.")


def check_diffusion_settings(config: DiffusionConfig) -> None:
    """Raises UserError when settings of training on images contradict each other."""
    if config.crop == "bucket" and config.prior_weight:
        raise UserError(
            "--prior-weight works with square images only: take --preservation-weight, or --crop center or pad."
        )
    if config.extra_resolutions and config.prior_weight:
        raise UserError(
            "--prior-weight works with one --resolution only: take --preservation-weight, or leave out --extra-resolutions."
        )
    if config.prior_folder is not None and not config.prior_weight:
        raise UserError("--prior-folder is for prior preservation, which is off: set --prior-weight, 1 is usual.")
    if config.debiased and config.min_snr_gamma is not None:
        raise UserError("--debiased and --min-snr-gamma both weigh the timesteps: leave one of them out.")
    if isinstance(config, SubjectConfig):
        check_subjects(config)
        check_patterns(config)
        if not config.evaluate_every and (config.patience or config.keep == "best"):
            raise UserError(
                "--keep best and --patience go by measurements, of which there are none: set --evaluate-every."
            )
        if config.hold_out and (config.evaluate_images is not None or not config.evaluate_every):
            raise UserError(
                "--hold-out names photos of --images to measure by: it needs --evaluate-every, and no --evaluate-images."
            )
    if not config.token.strip():
        raise UserError("--token is empty: give a rare word that will stand for the subject, such as sks.")


def check_subjects(config: SubjectConfig) -> None:
    """Raises UserError when subjects beside the first cannot be told apart, or meet a setting that knows only one."""
    if not config.also:
        return
    for name in config.also:
        if len(name.split()) < 2:
            raise UserError(f"--also '{name}' must be a token and a class noun, such as 'sks2 cat', before the folder.")
    if len(config.subjects) <= len(config.also):
        raise UserError("--token and --also name the same token twice: give each subject one of its own.")
    one_only = {
        "--prior-weight": config.prior_weight,
        "--num-vectors": config.num_vectors,
        "--evaluate-every": config.evaluate_every,
    }
    for flag, value in one_only.items():
        if value:
            raise UserError(f"{flag} knows one subject only: leave it or --also out.")


def check_patterns(config: SubjectConfig) -> None:
    """Raises UserError for ranks and rates by layer that are out of range or not regular expressions."""
    for option, patterns in (("--rank-pattern", config.rank_pattern), ("--lr-pattern", config.lr_pattern)):
        for pattern, value in patterns.items():
            if not isfinite(value) or value <= 0:
                raise UserError(f"{option} {pattern} must be above 0, not {value}.")
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{option} {pattern} is not a regular expression: {error}.") from error
