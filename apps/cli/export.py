"""`rankfold export`: an adapter as a file, proven by the loader of its readers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from .options import allowed_error, parse_options, positional


def export(argv: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        run: Annotated[Path, positional()]
        """Run folder."""
        format: str = ""
        """diffusers (unset), peft, comfyui (the original code's names), kohya (A1111, ComfyUI, musubi), kohya-full (whole
        weight changes), kohya-lycoris or comfyui-lycoris (the method's own factors) or kohya-glora (GLoRA's);
        of a vision-language model peft (unset), vllm (a LoRA that vLLM and SGLang serve), or merged: the whole tuned model."""
        out: Path | None = None
        """Folder for the file, or the file (.safetensors); unset means export/ in the run, files for A1111 and ComfyUI named after it."""
        approximate: bool = False
        """Export the nearest plain LoRA when there is no exact one; its errors are measured and kept in the file."""
        max_error: Annotated[float, Ge(0)] | None = None
        """With --approximate: relative error of a layer's weight change, where a rank can be chosen for it, 0 to 1; unset means 0.05."""
        drop_bias: bool = False
        """Leave the adapter's changes of biases out."""
        dtype: Literal["fp32", "bf16", "fp16"] | None = None
        """dtype of a merged vision-language model's weights; unset means the base's own."""
        precision: Literal["fp32", "bf16", "fp16"] | None = None
        """dtype of the base in the proof; unset means the run's. The file is always fp32."""

    options = parse_options(Options, argv, "export")
    from ...pipelines.proof import print_proof
    from ...toolkit.core.run_folder import Run
    from ...training.launch.exports import export_run

    proof = export_run(
        Run.open(options.run),
        options.format,
        options.out,
        dtype=options.dtype,
        max_error=allowed_error(options.max_error, approximate=options.approximate),
        drop_bias=options.drop_bias,
        precision=options.precision,
    )
    print_proof(proof)
