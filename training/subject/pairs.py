"""Pairs to measure by: images as training would see them, each with its references and its caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...toolkit.core.cache import file_hash
from ...toolkit.core.errors import UserError
from ...toolkit.data.references import add_references, check_references
from ...toolkit.data.subjects import Sample, find_samples, load_image
from ...toolkit.diffusion.load import open_model, resolve_base
from ..config.images import DiffusionConfig
from ..config.subject import SubjectConfig
from ..evaluation.edits import EditPair
from .previews import load_references
from .sizes import trained_sizes


def find_pairs(
    base: str,
    config: DiffusionConfig | None,
    images: Path | None,
    folders: Sequence[Path],
    learned: Sequence[Sample],
    *,
    side: int = 0,
) -> tuple[list[EditPair], int | None]:
    """The pairs of a folder, or those that a run has learned from, and how many of them it has, where that is known.

    images: of the targets; unset means `learned`. folders: of references, see `add_references`. config: of the run, whose crop and
    resolution are taken. side: another resolution, pixels.

    Raises:
        UserError: for pairs that are not whole, images none of which has a reference, and references that the base does not take.
    """
    if images is None and not learned:
        raise UserError(
            "--images is missing: give the images that shall be made, best pairs that it was not trained on."
        )
    found = add_references(find_samples(images), folders) if images is not None else list(learned)
    own = replace(config or SubjectConfig(), base=base)
    own = replace(own, resolution=side) if side else own
    model = open_model(resolve_base(base))
    model.check_side(side, "--width")
    check_references(found, model.max_references, base)
    pairs = [sample for sample in found if sample.references]
    if not pairs:
        raise UserError(
            f"--images {images}: no image has a reference: give --references FOLDER, in which each is called as its image, or write "
            "metadata.jsonl (file_name, references, text)."
        )
    known = {file_hash(sample.path) for sample in learned}
    made = []
    for sample in pairs:
        size = trained_sizes(own, sample, model)[0]
        references = load_references(own, sample, size, model)
        model.check_references([reference.size for reference in references])
        made.append(
            EditPair(sample.path.name, str(sample.caption), load_image(sample, size, own.crop), tuple(references))
        )
    return made, sum(file_hash(sample.path) in known for sample in pairs) if learned else None
