"""Configurations of other trainers, in the forms that their guides show."""

import json

import pytest

from rankfold.apps.cli import main
from rankfold.training.config.yaml_file import from_yaml

KOHYA = """
pretrained_model_name_or_path = "/models/sdxl.safetensors"
train_data_dir = "/photos"
resolution = "1024,1024"
network_module = "networks.lora"
network_dim = 32
network_alpha = 16
unet_lr = 1e-4
text_encoder_lr = 5e-6
learning_rate = 1e-4
max_train_steps = 1600
optimizer_type = "AdamW8bit"
mixed_precision = "bf16"
enable_bucket = true
prior_loss_weight = 1.0
blocks_to_swap = 20
cache_latents = true
"""
AI_TOOLKIT = """
job: extension
config:
  name: my_first_lora
  process:
    - type: sd_trainer
      training_folder: output
      trigger_word: p3r5on
      network: {type: lora, linear: 16, linear_alpha: 16}
      save: {dtype: float16, save_every: 250}
      datasets:
        - folder_path: /photos
          caption_ext: txt
          caption_dropout_rate: 0.05
          resolution: [512, 768, 1024]
      train:
        batch_size: 1
        steps: 2000
        gradient_checkpointing: true
        optimizer: adamw8bit
        lr: 1e-4
        dtype: bf16
        ema_config: {use_ema: true, ema_decay: 0.99}
      model: {name_or_path: black-forest-labs/FLUX.1-dev, is_flux: true, quantize: true, assistant_lora_path: undo.safetensors}
      sample:
        sample_every: 250
        guidance_scale: 4
        sample_steps: 20
        prompts: ["[trigger] in a city", "a man with a sign"]
"""
ONETRAINER = {
    "training_method": "LORA", "base_model_name": "stabilityai/stable-diffusion-xl-base-1.0", "learning_rate": 3e-4,
    "lora_rank": 16, "lora_alpha": 1.0, "batch_size": 2, "resolution": "1024", "train_dtype": "BFLOAT_16",
    "optimizer": {"optimizer": "ADAFACTOR"}, "gradient_checkpointing": "ON", "epochs": 100,
    "concepts": [{"path": "/photos", "name": "me"}, {"path": "/more"}], "output_model_destination": "models/lora.safetensors",
}  # fmt: skip
SIMPLETUNER = {
    "--model_family": "flux", "--pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev", "--lora_rank": "16",
    "--learning_rate": "8e-5", "--max_train_steps": "3000", "--optimizer": "adamw_bf16", "--mixed_precision": "bf16",
    "--validation_prompt": "a photo of sks dog", "--data_backend_config": "config/multidatabackend.json",
}  # fmt: skip


def convert(tmp_path, capsys, name, text):
    file, out = tmp_path / name, tmp_path / "ours.yaml"
    file.write_text(text)
    main(["convert-config", str(file), "--out", str(out)])
    return from_yaml(out), capsys.readouterr().out


def test_files_of_a_base_come_along(tmp_path):
    """As kohya's scripts name them for FLUX and SD 3, and musubi for its families."""
    (tmp_path / "flux.toml").write_text(
        'pretrained_model_name_or_path = "/m/flux1-dev.safetensors"\nclip_l = "/m/clip_l.safetensors"\n'
        't5xxl = "/m/t5xxl.safetensors"\nae = "/m/ae.safetensors"\nnetwork_dim = 16\n'
    )
    main(["convert-config", str(tmp_path / "flux.toml"), "--out", str(tmp_path / "ours.yaml")])
    words = "/m/flux1-dev.safetensors --vae /m/ae.safetensors --text-encoder /m/clip_l.safetensors /m/t5xxl.safetensors"
    assert from_yaml(tmp_path / "ours.yaml").base == words


def test_kohya(tmp_path, capsys):
    config, said = convert(tmp_path, capsys, "kohya.toml", KOHYA)
    assert (config.base, str(config.images), config.resolution) == ("/models/sdxl.safetensors", "/photos", 1024)
    assert (config.rank, config.alpha, config.learning_rate, config.text_learning_rate) == (32, 16.0, 1e-4, 5e-6)
    assert (config.steps, config.optimizer, config.precision, config.crop) == (1600, "AdamW8bit", "bf16", "bucket")
    assert (config.prior_weight, config.blocks_to_swap) == (0.0, 20)
    assert "not carried over: cache_latents: true" in said
    assert 'not carried over: network_module: "networks.lora"' in said


def test_ai_toolkit(tmp_path, capsys):
    config, said = convert(tmp_path, capsys, "flux.yaml", AI_TOOLKIT)
    assert (config.base, config.token, config.quantize) == ("black-forest-labs/FLUX.1-dev", "p3r5on", "fp8")
    assert (config.rank, config.alpha, config.adapter, config.steps) == (16, 16.0, "lora", 2000)
    assert (config.caption_dropout, config.resolution, config.ema_decay) == (0.05, 1024, 0.99)
    assert config.extra_resolutions == (768, 512)
    assert str(config.training_adapter) == "undo.safetensors"
    assert config.preview_prompts == ("{token} in a city", "a man with a sign")
    for part in ("datasets.caption_ext", "save.dtype", "model.is_flux", "train.ema_config.use_ema"):
        assert f"not carried over: {part}" in said


def test_onetrainer(tmp_path, capsys):
    config, said = convert(tmp_path, capsys, "one.json", json.dumps(ONETRAINER))
    assert (config.learning_rate, config.rank, config.alpha, config.batch_size) == (3e-4, 16, 1.0, 2)
    assert (config.optimizer, config.precision, config.gradient_checkpointing) == ("Adafactor", "bf16", True)
    assert (str(config.images), str(config.out)) == ("/photos", "models/lora")
    assert "not carried over: epochs: 100" in said
    assert "not carried over: concepts 2" in said


def test_simpletuner(tmp_path, capsys):
    config, said = convert(tmp_path, capsys, "simple.json", json.dumps(SIMPLETUNER))
    assert (config.rank, config.learning_rate, config.steps, config.optimizer) == (16, 8e-5, 3000, "AdamW")
    assert config.preview_prompts == ("a photo of sks dog",)
    assert "not carried over: data_backend_config" in said


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "a = ", "is not valid toml"),
        ("a.json", "[1]", "holds no settings"),
        ("a.yaml", "steps: 3", "is no configuration that is known"),
        ("nowhere.toml", None, "Cannot read"),
        ("b.toml", 'network_dim = 4\ntrain_data_dir = "x"\nmax_train_steps = "many"', None),
    ],
)
def test_what_cannot_be_read(tmp_path, capsys, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    if words is None:
        main(["convert-config", str(tmp_path / name)])
        assert 'not carried over: max_train_steps: "many" (not a value that is understood)' in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as end:
        main(["convert-config", str(tmp_path / name)])
    assert end.value.code == 2
    assert words in capsys.readouterr().err
