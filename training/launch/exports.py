"""A run's adapter as files for other tools: when `rankfold export` is asked, and when a run that is done was asked beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ...pipelines import export_chat as chat
from ...pipelines.export import check_parts, export_adapter
from ...pipelines.proof import print_proof
from ...toolkit.adapters.attach import adapter_layers
from ...toolkit.adapters.fold import fold
from ...toolkit.core.errors import UserError
from ...toolkit.core.run_folder import Run
from ...toolkit.core.setting_names import as_flag
from ...toolkit.diffusion.load import open_model, resolve_base
from ...toolkit.diffusion.model import DTYPES
from ...toolkit.formats.factors import FACTOR_FORMATS, check_factors
from ...toolkit.formats.write import Part, check_format, check_glora, check_representable
from ..config.base import LoopConfig
from ..config.instruct import ConversationConfig, InstructConfig
from ..config.subject import SubjectConfig
from ..config.yaml_file import from_yaml
from ..instruct.adapter import InstructAdapter
from ..instruct.prepare import open_without_weights
from ..runs.library import newest_preview
from ..subject.adapter import SubjectAdapter

Proven = Any  # a Proof, or a ChatProof


def export_run(
    run: Run, format: str = "", out: Path | None = None, *, dtype: str | None = None, **options: Any
) -> Proven:
    """Writes the adapter of a run that is done in a format, and proves what was written.

    format: '' for diffusers, or peft of a vision-language model; out: a folder, or the file, None for export/ in the run. dtype: see
    `export_chat`. options: of `export_adapter`, None for the run's own.

    Raises:
        UserError: as those do, and for a run that has no adapter yet.
    """
    run.finished_adapter()
    return write_export(run, format, out, dtype=dtype, **options)


def write_export(run: Run, format: str, out: Path | None = None, *, dtype: str | None = None, **options: Any) -> Proven:
    """The same, whatever state the run is in."""
    config = from_yaml(run.config_file)
    check_export_options(config, dtype, options)
    if isinstance(config, ConversationConfig):
        return chat.export_chat(run.adapter, config.base, format or "peft", out or run.folder / "export", dtype=dtype)
    format = format or "diffusers"
    about = {
        "prompt": config.prompt,
        "width": config.resolution,
        "precision": config.precision,
        "title": run.folder.resolve().name,
        "thumbnail": newest_preview(run.folder),
    } | {name: value for name, value in options.items() if value is not None}
    return export_adapter(run.adapter, config.base, format, out or default_file(run.folder, format), **about)


def check_export_options(config: LoopConfig, dtype: str | None, options: dict[str, Any]) -> None:
    """Raises UserError for options that are of the other kind of run."""
    if isinstance(config, ConversationConfig):
        given, what = [name for name, value in options.items() if value not in (None, False)], "diffusion models"
    else:
        given, what = ["dtype"] if dtype else [], "vision-language models"
    if given:
        flags = ", ".join(as_flag(name) for name in given)
        raise UserError(f"{flags} would have no effect: it is for runs on {what}; leave it out.")


def default_file(run: Path, format: str) -> Path:
    """Where an export goes that nobody says a place for; programs that show files in one list get the run's name."""
    if not format.startswith(("kohya", "comfyui")):
        return run / "export"
    ending = format.removeprefix("kohya").removeprefix("-").replace("comfyui", "comfy")
    return run / "export" / f"{run.resolve().name}{'_' if ending else ''}{ending}.safetensors"


def export_when_done(run: Run, formats: tuple[str, ...]) -> None:
    """Writes the adapter of a run that has nothing else left to do in these formats; then the run is done, and its status has the files.

    Raises:
        UserError: when one of them could not be written; the others are, and the run is done.
    """
    made: dict[str, str] = {}
    faults: list[str] = []
    try:
        for format in formats:
            try:
                proof = write_export(run, format)
                print_proof(proof)
                made[format] = str(proof.path.relative_to(run.folder))
            except UserError as error:
                faults.append(f"--export {format}: {in_words_of_training(str(error))}")
                run.append_log(faults[-1])
    except Exception as error:
        faults.append(str(error))
        raise
    finally:
        run.set_status(state="done", exports=made, export_faults=faults)
    if faults:
        raise UserError(f"{run.adapter} is done, but not all of its exports. {' '.join(faults)}")


# ---------------------------------------------------------------------------------------------- checked beforehand


def check_exports(config: LoopConfig, inputs: tuple[Any, ...] = ()) -> None:
    """Checks that the adapter can be written in the formats of --export, on the real architecture without numbers.

    inputs: what the method's own checks have found. What an adapter's numbers decide, and what a composition or a search will come
    to, is seen when it is written.

    Raises:
        UserError: naming the format, and what would do.
    """
    try:
        for format in config.export:
            (chat.check_format if isinstance(config, ConversationConfig) else check_format)(format)
        if config.export and isinstance(config, SubjectConfig):
            check_subject_exports(config)
        elif config.export and isinstance(config, InstructConfig):
            _, folder = inputs
            check_instruct_exports(config, folder)
    except UserError as error:
        raise UserError(in_words_of_training(str(error))) from error


def check_subject_exports(config: SubjectConfig) -> None:
    """The same for a subject's adapter."""
    model = open_model(resolve_base(config.base), DTYPES[config.precision], "meta")
    parts = SubjectAdapter(config).attach(model)
    for format in config.export:
        check_parts(model, format, list(parts))
        for part in parts.values():
            check_method(part, format)


def check_method(model: nn.Module, format: str) -> None:
    """Raises UserError when a format cannot represent what the adapter on a part of a pipeline is."""
    for name, layer in adapter_layers(model).items():
        if format in FACTOR_FORMATS:
            check_factors(layer, format)
        elif format == "kohya-glora":
            check_glora(layer, "default", name)
    if format not in FACTOR_FORMATS:
        check_representable(Part(model, fold(model), "default"), format)


def check_instruct_exports(config: InstructConfig, folder: str) -> None:
    """The same for an adapter of a vision-language model."""
    vision = open_without_weights(config, folder)
    InstructAdapter(config).attach(vision)
    for format in config.export:
        chat.check_exportable(vision, format, "default")


def in_words_of_training(sentence: str) -> str:
    """What `rankfold export` says, with the flags that a training has."""
    said = sentence.replace("--format ", "--export ")
    for flag in ("--approximate", "--drop-bias"):
        said = said.replace(flag, f"`rankfold export {flag}` afterwards")
    return said
