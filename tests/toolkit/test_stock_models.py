"""Every variant on real architectures through the stock roads: diffusers UNet and transformer, CLIP text encoder, causal LM."""

import copy
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from adapters import NOT_LINEAR, config, noise, randomize
from peft import PeftModel, get_peft_model
from torch import nn

from rankfold.toolkit.adapters.attach import adapter_layers, adapter_state, load_adapter_state
from rankfold.toolkit.adapters.auxiliary import auxiliary_losses
from rankfold.toolkit.adapters.base import REGISTRY
from rankfold.toolkit.adapters.quantized import unpack_cpu_weight
from rankfold.toolkit.core.quantize import quantize_model

VARIANTS = [*REGISTRY, "glora-elementwise", "fvae-identity"]


@dataclass
class Case:
    """A model, the layers to adapt, and one forward pass to a tensor."""

    model: nn.Module
    targets: tuple[str, ...]
    run: object


def unet():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    inputs = noise(2, 4, 4, 4), torch.tensor([3, 500]), noise(2, 5, 16)
    return Case(model, ("to_q", "to_k", "to_v", "to_out.0"), lambda net: net(*inputs).sample)


def transformer():
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=8,
    )
    inputs = {
        "hidden_states": noise(2, 4, 8, 8),
        "encoder_hidden_states": noise(2, 5, 16),
        "pooled_projections": noise(2, 12),
        "timestep": torch.tensor([3, 500]),
    }
    return Case(model, ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj"), lambda net: net(**inputs).sample)


def text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPTextModel(CLIPTextConfig(vocab_size=50, max_position_embeddings=8, **size))
    ids = torch.arange(12).view(2, 6)
    return Case(model, ("q_proj", "k_proj", "v_proj", "out_proj"), lambda net: net(ids).last_hidden_state)


def language_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, max_position_embeddings=16, **size))
    ids = torch.arange(12).view(2, 6)
    return Case(model, ("q_proj", "v_proj", "down_proj"), lambda net: net(input_ids=ids, labels=ids))


MODELS = {make.__name__: make for make in (unet, transformer, text_encoder, language_model)}
DIFFUSERS = ("unet", "transformer")


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    made = MODELS[request.param]()
    made.model.eval()
    return made


def out(case, model=None):
    result = case.run(model if model is not None else case.model)
    return result if isinstance(result, torch.Tensor) else result.logits


@pytest.mark.parametrize("label", VARIANTS)
class TestStock:
    def test_add_train_save_load(self, case, label, tmp_path):
        expected = out(case)
        base = copy.deepcopy(case.model)
        case.model.add_adapter(config(label, target_modules=case.targets), "mine")
        assert torch.equal(out(case), expected)
        case.model.train()
        with auxiliary_losses() as auxiliary:
            loss = out(case).square().mean()
        (loss + auxiliary.total()).backward()
        assert any(p.grad is not None and p.grad.any() for p in case.model.parameters())
        randomize(case.model.eval(), std=0.05)
        changed = out(case)
        assert not torch.allclose(changed, expected)
        base.add_adapter(config(label, target_modules=case.targets), "other")
        load_adapter_state(base, adapter_state(case.model, "mine"), "other")
        torch.testing.assert_close(out(case, base), changed)

    def test_switch_off_and_on(self, case, label):
        expected = out(case)
        case.model.add_adapter(config(label, target_modules=case.targets), "mine")
        randomize(case.model, std=0.05)
        changed = out(case)
        case.model.disable_adapters()
        assert torch.equal(out(case), expected)
        case.model.enable_adapters()
        assert torch.equal(out(case), changed)

    def test_get_peft_model(self, case, label, tmp_path):
        base = copy.deepcopy(case.model)
        model = randomize(get_peft_model(case.model, config(label, target_modules=case.targets)), std=0.05).eval()
        expected = out(case, model)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(out(case, PeftModel.from_pretrained(base, tmp_path).eval()), expected)
        if label in NOT_LINEAR:
            with pytest.raises(ValueError, match="cannot be merged"):
                model.merge_and_unload()
        else:
            plain = model.merge_and_unload()
            assert not adapter_layers(plain)
            torch.testing.assert_close(out(case, plain), expected, rtol=1e-4, atol=1e-4)

    def test_gradient_checkpointing(self, case, label):
        case.model.add_adapter(config(label, target_modules=case.targets), "mine")
        randomize(case.model, std=0.05).train()
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                enable = getattr(case.model, "enable_gradient_checkpointing", None)
                (enable or case.model.gradient_checkpointing_enable)()
            torch.manual_seed(1)
            with auxiliary_losses() as auxiliary:
                loss = out(case).square().mean()
            (loss + auxiliary.total()).backward()
            gradients.append({name: p.grad for name, p in case.model.named_parameters() if p.grad is not None})
            case.model.zero_grad()
        assert set(gradients[0]) == set(gradients[1])
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", DIFFUSERS)
@pytest.mark.parametrize("label", VARIANTS)
def test_diffusers_weights_fuse_and_unload(kind, label):
    torch.manual_seed(0)
    case = MODELS[kind]()
    case.model.eval()
    expected = out(case)
    for number, name in enumerate(("one", "two")):
        case.model.add_adapter(config(label, target_modules=case.targets), name)
        randomize(case.model, number, std=0.05)
    case.model.set_adapters(["one", "two"], [0.0, 0.0])
    torch.testing.assert_close(out(case), expected)
    case.model.set_adapters(["one", "two"], [0.7, 0.2])
    both = out(case)
    assert not torch.allclose(both, expected)
    if label in NOT_LINEAR:
        with pytest.raises(ValueError, match="cannot be merged"):
            case.model.fuse_lora()
    else:
        case.model.fuse_lora()
        torch.testing.assert_close(out(case), both, rtol=1e-4, atol=1e-4)
        case.model.unfuse_lora()
        assert torch.equal(out(case), both)
    case.model.delete_adapters("two")
    case.model.set_adapters(["one"], [1.0])
    assert not torch.allclose(out(case), both)
    case.model.unload_lora()
    assert not adapter_layers(case.model)
    assert torch.equal(out(case), expected)


def test_a_stock_trainer_gets_the_auxiliary_loss():
    """The output's loss of a PeftModel holds it, as PEFT does with AdaLoRA's; in eval, and when collected, it does not."""
    torch.manual_seed(0)
    case = language_model()
    model = get_peft_model(case.model, config("fvae", target_modules=case.targets, options={"loss_weight": "1.0"}))
    model.eval()
    plain = case.run(model).loss
    model.train()
    with auxiliary_losses() as auxiliary:
        bare = case.run(model).loss
    assert auxiliary.total() > 1
    assert case.run(model).loss > bare + 1
    assert abs(float(plain) - float(bare)) < 1


def test_padding_does_not_count():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5))
    model = get_peft_model(
        net, config("fvae", target_modules=("0",), options={"encoder_dropout": "0", "decoder_dropout": "0"})
    )
    x = noise(2, 4, 6)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    spoilt = torch.where(mask[..., None] == 1, x, torch.full_like(x, 100.0))
    totals = []
    for inputs in (x, spoilt):
        torch.manual_seed(2)
        with auxiliary_losses(mask) as auxiliary:
            model(inputs)
        totals.append(auxiliary.total())
    torch.testing.assert_close(totals[0], totals[1])


def test_a_fresh_process_reads_the_files(tmp_path):
    """One process that has trained nothing loads every variant's file, and gets the same logits."""
    for label in VARIANTS:
        torch.manual_seed(0)
        case = language_model()
        case.model.eval().save_pretrained(tmp_path / "base")
        model = randomize(get_peft_model(case.model, config(label, target_modules=case.targets)), std=0.05).eval()
        model.save_pretrained(tmp_path / label)
        torch.save(out(case, model), tmp_path / f"{label}.pt")
    code = f"""
import rankfold, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
for label in {VARIANTS!r}:
    base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
    model = PeftModel.from_pretrained(base, f"{tmp_path}/{{label}}").eval()
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(model(input_ids=ids).logits, torch.load(f"{tmp_path}/{{label}}.pt"))
print("all", len({VARIANTS!r}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith(f"all {len(VARIANTS)}")


@pytest.mark.parametrize("label", VARIANTS)
def test_ddp_and_fsdp(label, tmp_path):
    """One process, but the real wrappers: gradients must be those of the bare model."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        gradients = []
        for wrap in (lambda m: m, DistributedDataParallel, fully_shard):
            torch.manual_seed(0)
            case = language_model()
            model = randomize(get_peft_model(case.model, config(label, target_modules=case.targets)), std=0.05)
            wrapped = wrap(model)
            torch.manual_seed(1)
            case.run(wrapped).loss.backward()
            found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            gradients.append({n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()})
        for other in gradients[1:]:
            for name, gradient in gradients[0].items():
                torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("label", VARIANTS)
def test_quantised_base(label, kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False))
    net = quantize_model(net, kind, torch.float32).to("cpu").eval()
    x = noise(
        3, 64
    ).requires_grad_()  # where no gradient is asked for, bitsandbytes takes another road with its own rounding
    expected = net(x)
    model = get_peft_model(net, config(label)).eval()
    torch.testing.assert_close(model(x), expected)
    randomize(model, std=0.05)
    changed = model(x)
    assert not torch.allclose(changed, expected, atol=1e-3)
    changed.square().mean().backward()
    in_training = ("fvae_", "auxiliary_")  # some of their parts have work in training only
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for n, p in trained.items() if not any(part in n for part in in_training))
    if label not in NOT_LINEAR:
        model.merge_adapter()
        # The merged weight is quantised again, so it is near, not equal.
        assert (model(x) - changed).abs().mean() < 0.2 * (changed - expected).abs().mean() + 0.2 * changed.abs().mean()
        once = weights(model)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), changed)
        # A second adapter that is merged later changes the weight from what it was before the first.
        model.add_adapter("nothing", config(label))
        model.merge_adapter(adapter_names=["default"])
        model.merge_adapter(adapter_names=["nothing"])
        for a, b in zip(weights(model), once, strict=True):
            torch.testing.assert_close(a, b, rtol=0.01, atol=1e-3)  # bitsandbytes rounds scales when it reorders
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), changed)


def test_a_model_that_torchao_quantised(base):
    """Loaded by its own library a merged weight is quantised again; quantised behind its back a merge is refused."""
    from diffusers import TorchAoConfig, UNet2DConditionModel
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    own = config("glora", target_modules=["to_q"])
    options = {
        "subfolder": "unet",
        "dtype": torch.float32,
        "quantization_config": TorchAoConfig(Int8WeightOnlyConfig()),
    }
    model = randomize(get_peft_model(UNet2DConditionModel.from_pretrained(base, **options), own), std=0.05).eval()
    inputs = (
        noise(1, model.config.in_channels, 16, 16),
        torch.tensor([5]),
        noise(1, 7, model.config.cross_attention_dim),
    )
    changed = model(*inputs).sample
    model.merge_adapter()
    torch.testing.assert_close(model(*inputs).sample, changed, rtol=0.05, atol=0.05)
    model.unmerge_adapter()
    torch.testing.assert_close(model(*inputs).sample, changed)
    net = nn.Sequential(nn.Linear(64, 64))
    quantize_(net, Int8WeightOnlyConfig())
    model = randomize(get_peft_model(net, config("moslora", target_modules=["0"])))
    model(noise(3, 64)).sum().backward()
    with pytest.raises(ValueError, match="quantised with torchao behind its loader's back"):
        model.merge_adapter()


def weights(model):
    """The weights that the quantised layers now have, dequantised."""
    found = []
    for layer in adapter_layers(model).values():
        unpack_cpu_weight(layer.get_base_layer())
        found.append(layer.get_base_weight())
    return found


@pytest.mark.parametrize("label", VARIANTS)
def test_trl_trains_and_saves(label, tmp_path):
    """TRL's SFTTrainer takes our configs as they are: the loss falls, and the saved adapter is the trained one."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = [
        "<pad>",
        "</s>",
        "<unk>",
        *["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "dog", "run"],
    ]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )
    case = language_model()
    rows = datasets.Dataset.from_dict({"text": ["the cat sat on a mat", "one red dog run and saw a cat"] * 8})
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        logging_steps=4,
        max_length=16,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=label == "fvae",
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    trainer = trl.SFTTrainer(
        model=case.model,
        args=settings,
        train_dataset=rows,
        processing_class=fast,
        peft_config=config(label, target_modules=case.targets),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "adapter"))
    model = trainer.model.eval()
    expected = out(case, model)
    fresh = PeftModel.from_pretrained(language_model_like(case.model), tmp_path / "adapter").eval()
    torch.testing.assert_close(out(case, fresh), expected)


def language_model_like(adapted):
    """The same base weights without an adapter."""
    base = language_model().model.eval()
    plain = {name.replace(".base_layer", ""): value for name, value in adapted.state_dict().items()}
    base.load_state_dict({name: plain[name] for name in base.state_dict()})
    return base
