"""Bases of a known pipeline that were made otherwise: refused in a sentence, or trained as they are."""

import json
import shutil

import pytest
import torch

from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.diffusion.load import open_model, resolve_base
from rankfold.toolkit.diffusion.model import has_weights, weights_variant


def changed(folder, tmp_path, part, file="config.json", **values):
    """A copy of a base with other values in a part's config."""
    copy = tmp_path / "base"
    shutil.copytree(folder, copy)
    path = copy / part / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return str(copy)


@pytest.mark.parametrize(
    ("family", "scheduler", "sentence"),
    [
        ("sdxl", {"_class_name": "EDMDPMSolverMultistepScheduler"}, "made with the schedule of EDM"),
        ("sdxl", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "made with flow matching"),
        ("sd", {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "made with flow matching"),
        ("sd", {"prediction_type": "sample"}, "predicts 'sample'"),
        ("sd", {"beta_schedule": "cubic"}, "a schedule that cannot be trained with"),
        ("sd", {"_class_name": "SchedulerOfTomorrow"}, "which the installed diffusers has not"),
        ("sd3", {"_class_name": "DDIMScheduler"}, "is trained by flow matching"),
    ],
)
def test_other_schedules(folders, tmp_path, family, scheduler, sentence):
    base = changed(folders(family), tmp_path, "scheduler", "scheduler_config.json", **scheduler)
    with pytest.raises(UserError, match=sentence):
        resolve_base(base)


@pytest.mark.parametrize(
    ("family", "part", "values", "sentence"),
    [
        (
            "sd",
            "vae",
            {"shift_factor": 0.1},
            "sets shift_factor, which the stock StableDiffusionPipeline does not decode by",
        ),
        ("sd", "vae", {"latents_mean": [1.0] * 4, "latents_std": [2.0] * 4}, "sets latents_mean and latents_std"),
        ("sdxl", "vae", {"latents_mean": [1.0] * 4}, "only one of latents_mean and latents_std"),
        ("flux-dev", "vae", {"shift_factor": None}, "has no shift_factor"),
        ("sd", "vae", {"_class_name": "AutoencoderTiny"}, "has an autoencoder AutoencoderTiny"),
        ("sd", "unet", {"in_channels": 9}, "takes 9 channels and its autoencoder makes 4"),
    ],
)
def test_other_autoencoders_and_denoisers(folders, tmp_path, family, part, values, sentence):
    with pytest.raises(UserError, match=sentence):
        resolve_base(changed(folders(family), tmp_path, part, **values))


def test_latents_are_normalised_as_the_autoencoder_says(folders, tmp_path):
    mean, std = [1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 0.5, 4.0]
    model = open_model(resolve_base(changed(folders("sdxl"), tmp_path, "vae", latents_mean=mean, latents_std=std)))
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        raw = model.vae.encode(pixels).latent_dist
        own, spread = model.encode_pixels(pixels)
    shift, scale = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    torch.testing.assert_close(own, (raw.mean - shift) / scale * model.vae.config.scaling_factor)
    torch.testing.assert_close(spread, raw.std / scale * model.vae.config.scaling_factor)


def test_a_variant_is_loaded_where_there_is_nothing_else(folders, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folders("sd"), base)
    for part in ("unet", "vae", "text_encoder"):
        for file in (base / part).glob("*.safetensors"):
            file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
        assert weights_variant(base / part) == "fp16"
        assert has_weights(base / part)
    model, plain = open_model(resolve_base(str(base))), open_model(str(folders("sd")))
    assert model.pipeline_variant == "fp16"
    for own, other in zip(model.unet.parameters(), plain.unet.parameters(), strict=True):
        assert torch.equal(own, other)
    for file in (base / "unet").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="unet/ holds no weights"):
        resolve_base(str(base))
