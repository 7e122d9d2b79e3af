"""Reference images: what a training image is made from, found and checked before anything is loaded.

They stand in metadata.jsonl (`references`: a name or a list of names, from the table's folder), or in folders of their own, in which each
is called as its image is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..core.errors import UserError, list_names
from ..core.paths import is_file
from .image_folder import SUFFIXES, image_fault, list_files
from .images import image_size
from .subjects import Sample

ALIKE = 0.03  # by which the shapes of an image and its first reference may differ and be called the same


def add_references(samples: Sequence[Sample], folders: Sequence[Path]) -> list[Sample]:
    """The samples with the images of the same name in each folder as their references, in the folders' order.

    Raises:
        UserError: for a folder or an image that is not there, and an image whose references stand in a table already.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--references {folder} is not a folder.")
    known = [{path.stem: path for path in list_files(folder) if path.suffix.lower() in SUFFIXES} for folder in folders]
    found = []
    for sample in samples:
        if folders and sample.references:
            raise UserError(
                f"{sample.path.name} has references in a table, and --references names folders: leave one of the two out."
            )
        for folder, own in zip(folders, known, strict=True):
            if sample.path.stem not in own:
                raise UserError(
                    f"{sample.path.name} has no reference in --references {folder}: put an image of the same name there "
                    f"({sample.path.stem}.png or another format), or write the pairs into metadata.jsonl (file_name, references, text)."
                )
        found.append(replace(sample, references=sample.references or tuple(own[sample.path.stem] for own in known)))
    return found


def check_references(samples: Sequence[Sample], most: int, base: str) -> None:
    """Checks references as far as can be without a model. most: how many the base takes of one image.

    Raises:
        UserError: for one that is missing or no valid image, an image without a caption, and more than the base takes.
    """
    if not any(sample.references for sample in samples):
        return
    for sample in samples:
        if len(sample.references) > most:
            takes = f"takes {most} of an image" if most else "takes no references"
            raise UserError(
                f"{sample.path.name} has {len(sample.references)} references, and --base {base} {takes}: FLUX.1 Kontext takes one, FLUX.2 "
                "and Qwen-Image-Edit 2509 several."
            )
        for path in sample.references:
            if not is_file(path):
                raise UserError(f"{sample.path.name} names the reference {path}, which is not there.")
            if fault := image_fault(path):
                raise UserError(f"{path}, a reference of {sample.path.name}: {fault}")
        if sample.references and not sample.caption:
            raise UserError(
                f"{sample.path.name} has references and no caption that says what becomes of them: write one into "
                f"{sample.path.stem}.txt, or as text into metadata.jsonl."
            )


def reference_notes(samples: Sequence[Sample], folders: Sequence[Path]) -> list[str]:
    """What is probably not meant: pairs whose shapes differ, targets without references, files in the folders that are nobody's."""
    paired = [sample for sample in samples if sample.references]
    notes = []
    if not paired:
        return notes
    turned, others = [], []
    for sample in paired:
        own, first = image_size(sample.path), image_size(sample.references[0])
        shapes = [width / height for width, height in (own, first)]
        if abs(shapes[0] / shapes[1] - 1) <= ALIKE:
            continue
        (turned if abs(shapes[0] * shapes[1] - 1) <= ALIKE else others).append(sample.path.name)
    if turned:
        notes.append(f"Lie where their reference stands, as both are seen (EXIF is followed): {list_names(turned)}.")
    if others:
        notes.append(f"Have another shape than their reference: {list_names(others)}.")
    if bare := [sample.path.name for sample in samples if not sample.references]:
        notes.append(f"Have no reference and are learned without: {list_names(bare)}.")
    same = [sample.path.name for sample in paired if sample.path.read_bytes() == sample.references[0].read_bytes()]
    if same:
        notes.append(f"Are the same file as their reference, so that nothing would change: {list_names(same)}.")
    used = {path.resolve() for sample in paired for path in sample.references}
    for folder in folders:
        if spare := [path.name for path in list_files(folder) if path.resolve() not in used]:
            notes.append(f"Not used of --references {folder}: {list_names(spare)}.")
    return notes
