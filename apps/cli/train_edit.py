"""`rankfold train edit`: a diffusion model learns to make images from reference images, from pairs"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...toolkit.core.errors import UserError, list_names
from .train_subject import start_training, subject_options

if TYPE_CHECKING:
    from ...training.config.subject import SubjectConfig


def train_edit(argv: list[str]) -> None:
    """As `train subject`, for pairs: every image has references and a caption; no subject is taught, and none of its class kept."""
    from ...training.config.subject import SubjectConfig

    pairs = SubjectConfig(class_noun="image", preservation_weight=0.0)
    config, fit, folds, overwrite = subject_options(argv, "train edit", pairs)
    check_pairs(config)
    start_training(config, fit, folds, overwrite)


def check_pairs(config: SubjectConfig) -> None:
    """Raises UserError when no image has a reference."""
    from ...toolkit.data.references import add_references
    from ...toolkit.data.subjects import find_samples

    if config.images is None:
        raise UserError("--images is missing: give the folder with the images that are to be made.")
    samples = add_references(find_samples(config.images, skip_bad=config.skip_bad), config.references)
    if bare := [sample.path.name for sample in samples if not sample.references]:
        raise UserError(
            f"{list_names(bare)} of --images {config.images} {'has' if len(bare) == 1 else 'have'} no reference: give --references FOLDER, "
            "in which each is called as its image, or write metadata.jsonl (file_name, references, text)."
        )
