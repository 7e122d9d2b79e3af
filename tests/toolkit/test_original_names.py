"""kohya's names of FLUX.1 and SD 3: what we stack, diffusers' own converters and our reader take apart into the same changes."""

import diffusers
import pytest
import torch
from family_runs import a_config
from tiny_families import SIDE, build

from rankfold.pipelines.export import export_adapter
from rankfold.pipelines.generate import Recipe, load_pipeline
from rankfold.toolkit.core.change import Change
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.formats.adapter_facts import AdapterFacts
from rankfold.toolkit.formats.report import inspect_lora
from rankfold.toolkit.formats.stack import original_layers, stack_layers
from rankfold.toolkit.formats.write import Part, write_lora
from rankfold.training.launch.start import train

LAYERS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_v_proj",
    "to_add_out",
    "proj_mlp",
    "0.proj_out",
    "net.0.proj",
    "norm1.linear",
)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return build("flux-dev", tmp_path_factory.mktemp("flux") / "base")


@pytest.mark.parametrize(("adapter", "format"), [("moslora", "kohya"), ("lora", "kohya-full"), ("glora", "kohya")])
def test_flux_is_written_and_read_back(flux, photos, tmp_path, adapter, format):
    targets = LAYERS if adapter != "glora" else LAYERS[:4]
    run = train(a_config(flux, photos, tmp_path / "run", adapter=adapter, target_modules=targets, learning_rate=0.02))
    proof = export_adapter(run.adapter, str(flux), format, tmp_path / "export", width=SIDE)
    assert proof.reader == "rankfold"  # diffusers' converter knows the released width only; see below
    assert proof.exact
    assert proof.weight_error < 1e-5
    assert proof.image_difference < 1e-4 < proof.effect
    report = inspect_lora(proof.path, load_pipeline(Recipe(prompt="", base=str(flux))))
    assert report.is_valid, (report.advice, [layer for layer in report.layers if layer.fault])
    assert len(report.layers) >= proof.layers


def test_diffusers_takes_apart_what_we_stack(tmp_path):
    """In the width of the released models, on tensors without a model."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    torch.manual_seed(0)
    known = {name for original in original_layers(model).values() for name in original.layers}
    chosen = {name for name in known if name.endswith(LAYERS)} | {"single_transformer_blocks.0.attn.to_k"}
    folded = {
        name: Change(down=torch.randn(4, layer.in_features), up=torch.randn(layer.out_features, 4))
        for name, layer in ((name, model.get_submodule(name)) for name in sorted(chosen))
    }
    path = write_lora(
        {"transformer": Part(model, folded, "")}, "kohya", tmp_path, AdapterFacts(), {"transformer": "lora_unet"}
    )
    state = diffusers.FluxPipeline.lora_state_dict(str(path))
    for name, change in folded.items():
        down, up = (state.pop(f"transformer.{name}.lora_{letter}.weight") for letter in "AB")
        x = torch.randn(down.shape[1], 2)
        torch.testing.assert_close(up @ (down @ x), change.up @ (change.down @ x), rtol=1e-4, atol=1e-2)
    assert not any(
        value.any() for name, value in state.items() if "lora_B" in name
    )  # stacked with the others, but not changed


@pytest.mark.parametrize(("adapter", "format"), [("moslora", "kohya"), ("lora", "kohya-full")])
def test_sd3_is_written_and_read_back(photos, tmp_path, adapter, format):
    base = build("sd3", tmp_path / "base")
    targets = ("to_q", "to_v", "to_out.0", "add_k_proj", "to_add_out", "net.0.proj", "net.2", "norm1.linear")
    run = train(a_config(base, photos, tmp_path / "run", adapter=adapter, target_modules=targets, learning_rate=0.02))
    proof = export_adapter(run.adapter, str(base), format, tmp_path / "export", width=SIDE)
    assert (proof.reader, proof.exact) == ("rankfold", True)  # diffusers reads no such file
    assert proof.weight_error < 1e-5
    assert proof.image_difference < 1e-4 < proof.effect


def test_original_layers_of_sd3_are_those_that_diffusers_makes_ours_of():
    """An original checkpoint of a model with both kinds of block, taken apart by diffusers' converter of whole checkpoints."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        num_layers=2, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=8,
        pooled_projection_dim=8, pos_embed_max_size=4, dual_attention_layers=(0,),
    )  # fmt: skip
    groups, own = original_layers(model), model.state_dict()
    layers = ("attn.qkv", "attn.proj", "attn2.qkv", "attn2.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    original = {name: torch.zeros(16, 8) for name in OUTSIDE_BLOCKS}
    blocks = [
        f"joint_blocks.{n}.{block}.{layer}"
        for n in range(2)
        for block in ("x_block", "context_block")
        for layer in layers
    ]
    outside = [
        "context_embedder",
        "t_embedder.mlp.0",
        "y_embedder.mlp.2",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ]
    for name in (*blocks, *outside):
        if name in groups:
            for kind in ("weight", "bias"):
                rows = torch.cat([own[f"{layer}.{kind}"] for layer in groups[name].layers])
                original[f"{name}.{kind}"] = torch.cat(rows.chunk(2)[::-1]) if groups[name].swapped else rows
    made = convert_sd3_transformer_checkpoint_to_diffusers(original)
    checked = {layer for name in (*blocks, *outside) if name in groups for layer in groups[name].layers}
    for layer in checked:
        assert torch.equal(made[f"{layer}.weight"], own[f"{layer}.weight"]), layer
        assert torch.equal(made[f"{layer}.bias"], own[f"{layer}.bias"]), layer
    assert {
        "transformer_blocks.0.attn2.to_k", "transformer_blocks.1.attn.add_v_proj", "transformer_blocks.1.norm1_context.linear",
        "transformer_blocks.0.norm1_context.linear", "norm_out.linear",
    } <= checked  # fmt: skip


OUTSIDE_BLOCKS = [
    "pos_embed",
    *(
        f"{name}.{kind}"
        for name in (
            "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "context_embedder", "y_embedder.mlp.0",
            "y_embedder.mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1",
        )
        for kind in ("weight", "bias")
    ),
]  # fmt: skip


def test_layers_without_an_original_name(tmp_path):
    """A layer that is neither in the original nor named by it."""
    base = build("sd3", tmp_path / "base")
    model = diffusers.SD3Transformer2DModel.from_pretrained(base, subfolder="transformer")
    model.strange = torch.nn.Linear(4, 4)
    with pytest.raises(UserError, match="no name for the layer strange"):
        stack_layers(model, {"strange": Change(dense=torch.ones(4, 4))}, keep_own_names=False)
