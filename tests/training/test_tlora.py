"""T-LoRA: that every denoiser says how noisy its latents are, and that the ranks at work go by it, in training and in any pipeline."""

import pytest
import torch
from adapters import randomize
from peft import LoraConfig
from PIL import Image
from tiny_families import BUILDERS, SIDE
from torch import nn

from rankfold import TLoraConfig
from rankfold.pipelines.generate import denoise
from rankfold.toolkit.adapters.approximate import linearize
from rankfold.toolkit.adapters.attach import adapter_layers, attach
from rankfold.toolkit.adapters.fold import is_dead
from rankfold.toolkit.adapters.noise_level import READERS
from rankfold.toolkit.adapters.variants.tlora import active_ranks, factors, last_singular_values
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.diffusion.families import FAMILIES
from rankfold.toolkit.diffusion.load import open_model, resolve_base
from rankfold.training.config.instruct import InstructConfig
from rankfold.training.instruct.prepare import prepare_instruct

PROMPT = "a sks creature on the beach"
LEVELS = (0.25, 0.9)


def adapted(model, **options):
    """The model's denoiser with a T-LoRA whose tensors are no longer at their start."""
    given = {"r": 4, "target_modules": list(model.default_targets)} | options
    attach(model.denoiser, TLoraConfig(**given))
    return randomize(model.denoiser, std=0.2).eval()


def timesteps_of(model, levels):
    levels = torch.tensor(levels)
    return levels if model.is_flow else (levels * 1000).round().long()


def level_of(denoiser):
    return denoiser.rankfold_noise_level.level_B


def latents(model, rows, seed=0):
    side = SIDE // model.latent_scale
    return torch.randn(rows, model.latent_channels, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tiny():
    return open_model(resolve_base("tiny"))


def test_every_family_is_known():
    assert {kind for family in FAMILIES for kind in family.denoiser_classes} == set(READERS)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_the_level_is_read_off_every_denoiser(folders, name):
    model = open_model(resolve_base(str(folders(name))))
    with torch.no_grad():
        words = model.encode_prompts([PROMPT])
        both = {key: torch.cat((value, value)) for key, value in words.items()}
    denoiser, noisy, times = adapted(model), latents(model, 2), timesteps_of(model, LEVELS)
    more = ([latents(model, 2, 1)],) if model.min_references else ()
    with torch.no_grad():
        together = model.predict(noisy, times, both, *more)
        torch.testing.assert_close(level_of(denoiser), torch.tensor(LEVELS), rtol=1e-3, atol=1e-3)
        for row in range(2):
            own = [[one[row : row + 1] for one in latents] for latents in more]
            alone = model.predict(noisy[row : row + 1], times[row : row + 1], words, *own)
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-4)
    pipe = model.pipeline(model.denoiser_name, "vae", *model.text_encoder_names)
    seen, told, step = [], [], pipe.scheduler.step

    def recording(output, timestep, *more, **named):
        seen.append(float(level_of(denoiser)[0]))
        told.append(float(timestep) / 1000)
        return step(output, timestep, *more, **named)

    pipe.scheduler.step = recording
    grey = [Image.new("RGB", (SIDE, SIDE), "grey")] * model.min_references
    given = {"seeds": [3], "steps": 3, "guidance_scale": model.guidance_off, "width": SIDE, "references": grey}
    denoise(pipe, words, negative=words, **given)
    assert len(seen) == 3
    assert seen == pytest.approx(told, abs=2e-3)


def test_ranks_at_work():
    levels = torch.tensor([0.0, 0.3, 0.5, 0.999, 1.0])
    assert active_ranks(levels, 12, 2).tolist() == [12, 9, 7, 2, 2]  # floor((r - r_min) (T - t) / T) + r_min
    assert active_ranks(levels, 8, 8).tolist() == [8] * 5


def test_what_a_masked_rank_does_is_nothing(tiny):
    """At each level the layer is plain LoRA of the ranks at work, whatever the others hold."""
    layer = next(iter(adapter_layers(adapted(tiny, r=8, min_share=0.25)).values()))
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    down, up = factors({name: value.detach() for name, value in layer.tensors("default").items()})
    for level, ranks in ((0.0, 8), (0.5, 5), (1.0, 2)):
        layer.noise_level.level_B = torch.tensor([level])
        kept = torch.arange(16) % 8 < ranks
        expected = layer.get_base_layer()(x) + x @ (up[:, kept] @ down[kept]).T
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_gradients_under_checkpointing_are_those_of_the_same_level(tiny):
    noisy, times = latents(tiny, 2), timesteps_of(tiny, LEVELS)
    with torch.no_grad():
        words = tiny.encode_prompts([PROMPT, PROMPT])
    denoiser, found = adapted(tiny), []
    for save in (False, True):
        denoiser.train()
        if save:
            denoiser.enable_gradient_checkpointing()
        tiny.predict(noisy, times, words).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in denoiser.named_parameters() if p.grad is not None})
        denoiser.zero_grad()
    assert found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_stock_pipeline_that_peft_gives_the_adapter_follows_the_schedule(tiny):
    pipe = tiny.pipeline(tiny.denoiser_name, "vae", *tiny.text_encoder_names)
    pipe.unet.add_adapter(TLoraConfig(r=4, target_modules=["to_q"], init_weights=False))
    pipe(PROMPT, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0))
    assert 0 < float(level_of(pipe.unet)) < 0.6
    assert not is_dead(pipe.unet)  # asked outside any call, whose level is none of this question


def test_the_mean_stands_for_it_in_exports(tiny):
    """With no schedule the mean is the adapter; with one it misses, and says how much."""
    with torch.no_grad():
        words = tiny.encode_prompts([PROMPT])

    def run():
        for level in (0.05, 0.35, 0.65, 0.95):
            tiny.predict(latents(tiny, 1), timesteps_of(tiny, [level]), words)

    denoiser = adapted(tiny, r=8)
    changes, errors = linearize(denoiser, run, run)
    assert all(len(change.down) == 16 and change.is_low_rank for change in changes.values())
    assert all(0.05 < error < 0.9 for error in errors.values())
    for layer in adapter_layers(denoiser).values():
        layer.settings["default"].min_share = 1.0
    assert max(linearize(denoiser, run, run)[1].values()) < 1e-4


def test_singular_values_are_those_of_random_matrices():
    torch.manual_seed(0)
    for fan_in, fan_out in ((96, 96), (200, 60), (60, 200)):
        known = torch.stack([torch.linalg.svdvals(torch.randn(fan_out, fan_in))[-8:] for _ in range(40)]).mean(0)
        torch.testing.assert_close(last_singular_values(fan_in, fan_out, 8), known, rtol=0.06, atol=0.25)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, timestep):
        return self.layer(x)


def test_a_denoiser_that_nobody_knows_is_refused():
    with pytest.raises(UserError, match="Unknown is told the timestep in a way that is not known"):
        attach(Unknown(), TLoraConfig(r=2, target_modules=["layer"]))
    attach(Unknown(), LoraConfig(r=2, target_modules=["layer"]))


def test_rows_that_are_nobodys_are_refused(tiny):
    layer = next(iter(adapter_layers(adapted(tiny)).values()))
    layer.noise_level.level_B = torch.tensor(LEVELS)
    with pytest.raises(ValueError, match="3 rows at once, and the denoiser 2 timesteps"):
        layer(torch.zeros(3, 5, layer.in_features))


def test_vision_language_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="--adapter tlora goes by how noisy an image is"):
        prepare_instruct(InstructConfig(base="tiny-vlm", data=tmp_path / "none.json", adapter="tlora"))
