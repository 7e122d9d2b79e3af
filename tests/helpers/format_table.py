"""docs/formats.md: which file says which method of which family, and who read it back: `python tests/helpers/format_table.py` writes it."""

import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

TITLES = {
    "sd": "Stable Diffusion 1.x, 2.x", "sdxl": "Stable Diffusion XL", "sd3": "Stable Diffusion 3", "flux-dev": "FLUX.1, FLUX.1 Kontext",
    "flux2-klein": "FLUX.2", "sana": "Sana", "qwen-image": "Qwen-Image", "lumina2": "Lumina Image 2", "z-image": "Z-Image",
    "chroma": "Chroma", "krea2": "Krea 2", "ernie-image": "ERNIE-Image",
}  # fmt: skip
METHODS = {"lora": {}, "dora": {}, "loha": {}, "lokr": {}, "glora": {"c": "none", "d": "none", "e": "none"}}
COLUMNS = ("diffusers", "peft", "comfyui", "kohya", "kohya-full", "kohya-lycoris", "comfyui-lycoris")
ROOT = Path(__file__).parents[2]
INTRO = """# Files: what is written, who reads it, and what is read

Written by tests/helpers/format_table.py from what happened: random adapters of each method on a small model of each family (true
architecture, attention layers) are written in each format and read back. A cell names who read the same change back:
diffusers and PEFT by their own loaders; *rankfold* where the programs that read the format cannot be run here (ComfyUI, kohya's and
musubi's tools), so that the names are theirs by their public tables and the numbers are proven by our reader alone. `no`: the format
cannot say it exactly (`--approximate` writes the nearest LoRA) or has no names for it. diffusers' own converters of kohya's names of FLUX.1
know the released width only, and are tested in it (tests/toolkit/test_original_names.py).

"""


def answer(name, method):
    """Format -> who read the same changes back, or 'no'."""
    from tiny_families import BUILDERS

    from rankfold.pipelines.export import check_parts, reload_export
    from rankfold.pipelines.proof import compare_weights
    from rankfold.toolkit.adapters.attach import attach, remove_adapters
    from rankfold.toolkit.adapters.fold import fold
    from rankfold.toolkit.adapters.registry import make_config
    from rankfold.toolkit.core.errors import UserError
    from rankfold.toolkit.diffusion.load import find_family
    from rankfold.toolkit.formats.adapter_facts import AdapterFacts
    from rankfold.toolkit.formats.factors import FACTOR_FORMATS, adapter_files, factors_state, write_factors
    from rankfold.toolkit.formats.native import save_native
    from rankfold.toolkit.formats.write import Part, write_lora

    torch.manual_seed(0)
    pipe = BUILDERS[name]()
    kind = type(pipe).__name__
    family = find_family(kind)
    part = family.denoiser_name
    model = getattr(pipe, part).requires_grad_(False)
    config = make_config(
        method, rank=2, alpha=3.0, dropout=0.0, target_modules=family.attention_targets, options=METHODS[method]
    )
    attach(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    folded, found = fold(model), {}
    weights = {part: {n: model.get_submodule(n).get_base_layer().weight.detach().flatten(1) for n in folded}}
    with tempfile.TemporaryDirectory() as folder:
        save_native(model, Path(folder) / "adapter" / part)
        remove_adapters(model)
        parts, about = (
            {part: Part(model, folded, "default")},
            SimpleNamespace(**vars_of(family), index={"_class_name": kind}),
        )
        for format in COLUMNS:
            out = Path(folder) / format
            try:
                check_parts(about, format, [part])
                if format in FACTOR_FORMATS:
                    files = adapter_files(Path(folder) / "adapter", format)
                    state = factors_state(files, pipe, format, family.kohya_prefixes)
                    path = write_factors(state, parts, format, out, AdapterFacts(), title="", thumbnail=None)
                else:
                    path = write_lora(parts, format, out, AdapterFacts(), family.kohya_prefixes)
            except UserError:
                found[format] = "no"
                continue
            before = {key: value.clone() for key, value in model.state_dict().items()}
            reader, loaded = reload_export(pipe, path, format)
            setattr(pipe, part, model)
            remove_adapters(model)
            model.load_state_dict(before)
            error = compare_weights({part: folded}, loaded, weights, torch.float32)
            assert error.relative < 1e-4, (name, method, format, error)
            found[format] = reader
    return found


def vars_of(family):
    """What `check_parts` asks of a family."""
    names = ("kohya_prefixes", "denoiser_name", "lora_text_encoders")
    return {key: getattr(family, key) for key in names}


def table():
    """The page."""
    lines = ["| family | method | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, title in TITLES.items():
            for method in METHODS:
                found = answer(name, method)
                lines.append(f"| {title} | {method} | " + " | ".join(found[format] for format in COLUMNS) + " |")
    return INTRO + "\n".join(lines) + "\n\n" + READING


READING = """`comfyui` names layers as the original code does, behind `diffusion_model.`; `kohya` as kohya's and musubi's scripts do;
`kohya-full` holds whole weight changes; `kohya-lycoris` and `comfyui-lycoris` LoRA's,
DoRA's, LoHa's and LoKr's own factors (`kohya-glora`: GLoRA's); where a file keeps q, k and v as one layer these are stacked exactly,
but for LoKr, whose product has no rows of its own.
ComfyUI has no Sana.

`rankfold convert FILE --to comfy|kohya|diffusers|peft|lycoris|comfy-lycoris --base BASE` takes any file to any of these, with the
same proof: what the new file does is compared with what the old one does, in weights and in an image, before it gets its name.

## What is read

Files of diffusers, PEFT, kohya's scripts, musubi, ComfyUI, ai-toolkit, OneTrainer, SimpleTuner, DiffSynth and LyCORIS, by all names
that toolkit/formats/spellings.py lists, for every family: `lora_unet_`, `lora_transformer_`, `lora_te1_` to `lora_te3_`, `lycoris_`,
`diffusion_model.`, `transformer.`, `unet.`, no prefix, with `_orig_mod.`, `module.` or an adapter's name inside; layers as diffusers
or as the original code calls them (Stability's for Stable Diffusion XL). Methods: LoRA (CP too), LoHa and LoKr (Tucker too), GLoRA,
whole changes (`diff`, `diff_b`, `w_norm`, `b_norm`), each with or without a magnitude (DoRA, of inputs or outputs), words
(`bundle_emb`); in a PEFT folder whatever PEFT itself can put on the model and merge. OFT, BOFT, (IA)3 and other kinds in files of
other tools are refused by their names.

Every tensor is used, or named as left out, or the file is refused: what has a place in no layer of the base refuses the file unless
`--ignore-unused` is given. The scale is alpha / rank from the first of: an alpha beside the layer's tensors, the config in the header
or in adapter_config.json (patterns and use_rslora by PEFT's own rules), an alpha anywhere in the header (said, since most readers
overlook it).
"""


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    (ROOT / "docs" / "formats.md").write_text(table(), encoding="utf-8")
