"""`rankfold export` and `inspect`: adapters as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..toolkit.errors import UserError
from .options import parse, positional, quiet_libraries


def export(words: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        run: Annotated[Path, positional()]
        """Run folder."""
        format: str = ""
        """diffusers (unset), peft, kohya (A1111, ComfyUI), kohya-full (whole weight changes) or kohya-glora (GLoRA's own factors);
        of a vision-language model peft (unset), or merged: the whole tuned model."""
        out: Path | None = None
        """Folder for the file; unset means export/ in the run."""
        approximate: bool = False
        """Export the nearest plain LoRA when there is no exact one; its errors are measured and kept in the file."""
        max_error: float = 0.05
        """With --approximate: relative error of a layer's weight change, where a rank can be chosen for it, 0 to 1."""
        drop_bias: bool = False
        """Leave the adapter's changes of biases out."""

    options = parse(Options, words, "export")
    quiet_libraries()
    from ..pipelines.export import export_adapter
    from ..toolkit.runs import Run
    from ..training.config import ConversationConfig, from_yaml

    run = Run.open(options.run)
    config = from_yaml(run.config_file)
    if isinstance(config, ConversationConfig):
        from ..pipelines.export_chat import export_chat

        out = options.out or run.folder / "export"
        print_chat_proof(export_chat(run.adapter, config.base, options.format or "peft", out))
        return
    proof = export_adapter(
        run.adapter,
        config.base,
        options.format or "diffusers",
        options.out or run.folder / "export",
        prompt=config.prompt,
        max_error=options.max_error if options.approximate else None,
        drop_bias=options.drop_bias,
        side=config.resolution,
    )
    print_proof(proof)


def print_proof(proof: Any) -> None:
    """The outcome of an export."""
    print(proof.path, *proof.words, sep="\n")
    ranks = (
        ""
        if proof.ranks is None
        else f", rank {proof.ranks[0]}" + (f" to {proof.ranks[1]}" if proof.ranks[1] != proof.ranks[0] else "")
    )
    print(
        f"read back by {proof.reader}: {proof.layers} layers{ranks}, largest weight error {proof.weight_error:.1e}, "
        f"largest picture difference {proof.picture_difference:.1e} (the adapter itself changes it by {proof.effect:.2f})"
    )
    if not proof.exact:
        print(
            f"an approximation: a layer's change is missed by up to {proof.approximation:.0%}, "
            f"and {proof.picture_error:.0%} of what the adapter does to a picture"
        )
    if proof.weight_error > 1e-5 or (proof.exact and proof.picture_difference > 1e-5):
        raise UserError(f"{proof.path} does not reproduce the adapter; do not use it, and please report this.")


def print_chat_proof(proof: Any) -> None:
    """The outcome of an export of a vision-language model's adapter."""
    print(proof.path)
    print(
        f"read back by {proof.reader}: largest difference of a probability {proof.difference:.1e} "
        f"(the adapter itself changes it by {proof.effect:.2f})"
    )
    if proof.difference > 1e-4:
        raise UserError(f"{proof.path} does not reproduce the adapter; do not use it, and please report this.")


def inspect(words: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        file: Annotated[Path, positional()]
        """A LoRA file, or the folder it lies in; or conversations about pictures (.json, .jsonl, .parquet)."""
        base: str | None = None
        """Base model: each layer's change is set against its weight, conversations are written in its tokens."""
        images: Path | None = None
        """Folder that the pictures' paths of conversations start from; unset means the data file's own."""
        rows: int = 1
        """Conversations that are shown in full."""
        skip_bad: bool = False
        """List conversations that cannot be used instead of stopping at the first."""
        max_length: int = 2048
        """Most tokens of a conversation."""
        layers: bool = False
        """List every layer."""
        json: bool = False
        """Print all of it as JSON."""

    options = parse(Options, words, "inspect")
    quiet_libraries()
    from .inspect_data import DATA, inspect_data

    if options.file.suffix in DATA:
        inspect_data(
            options.file,
            options.base or "tiny-vlm",
            options.images,
            rows=options.rows,
            skip_bad=options.skip_bad,
            max_length=options.max_length,
        )
        return
    from ..pipelines.generate import Recipe, load_pipeline
    from ..toolkit.formats.report import as_json, inspect_lora

    pipe = load_pipeline(Recipe(prompt="", base=options.base)) if options.base else None
    found = inspect_lora(options.file, pipe)
    if options.json:
        print(as_json(found))
    else:
        print_report(found, every_layer=options.layers)


def print_report(found: Any, *, every_layer: bool) -> None:
    """What `inspect` found, for people."""
    from collections import Counter

    count = lambda values: ", ".join(f"{v} ({n})" for v, n in Counter(values).most_common())  # noqa: E731
    print(f"{found.path}\n  format   {found.format}\n  base     {found.base}\n  alpha    {found.alpha}")
    print(f"  methods  {count(layer.method for layer in found.layers)}")
    print(f"  ranks    {count(layer.rank for layer in found.layers if layer.rank) or 'none'}")
    norms = sorted((layer.relative, layer.name) for layer in found.layers if layer.relative is not None)
    if norms:
        middle, strongest = norms[len(norms) // 2], norms[-1]
        print(f"  change   over the weight: median {middle[0]:.1%}, largest {strongest[0]:.1%} ({strongest[1]})")
    for key, value in found.facts.items():
        print(f"  {key}: {value if len(value) < 100 else value[:100] + ' ...'}")
    for loader, answer in found.loaders.items():
        print(f"  loads in {loader}: {answer}")
    if every_layer:
        for layer in found.layers:
            norm = "-" if layer.norm is None else f"{layer.norm:.4g}"
            relative = "" if layer.relative is None else f"{layer.relative:.2%} of the weight"
            print(
                f"    {layer.name}  {layer.method} r={layer.rank} scale={layer.scale:g} |change|={norm} {relative} {layer.fault}"
            )
    for line in found.advice:
        print(f"  ! {line}")
    if found.is_sound and not found.advice:
        print("  sound: no layer is zero or not finite")
