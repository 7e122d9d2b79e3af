"""What the cache holds is taken only as it was written, and for what it was written; else it is made again."""

import json
from dataclasses import replace

import pytest
import torch
from commands import expect_error
from PIL import Image
from safetensors.torch import save_file
from short_runs import adapter, equal_states

from rankfold.toolkit.core.cache import load_or_compute
from rankfold.toolkit.core.limits import check_limits
from rankfold.toolkit.data.image_checks import PlanMemory, check_images
from rankfold.toolkit.data.images import MANY_PIXELS, load_rgb, open_image
from rankfold.training.launch.start import train


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own."""
    monkeypatch.setenv("RANKFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_an_entry_of_another_key(tmp_path):
    """Of the same names and shapes, whole, and under the wrong name."""
    load_or_compute(tmp_path, "aaaa", lambda: {"x": torch.zeros(4)})
    load_or_compute(tmp_path, "aabb", lambda: {"x": torch.ones(4)})
    one, other = (next(tmp_path.rglob(f"{key}.safetensors")) for key in ("aaaa", "aabb"))
    one.write_bytes(other.read_bytes())
    assert torch.equal(
        load_or_compute(tmp_path, "aaaa", lambda: {"x": torch.full((4,), 2.0)})["x"], torch.full((4,), 2.0)
    )
    assert torch.equal(load_or_compute(tmp_path, "aaaa", lambda: {})["x"], torch.full((4,), 2.0))


def test_a_spoilt_cache_changes_no_training(config, cache):
    """Latents and prompts flipped, class images cut, flipped, empty, of another size, or no images."""
    config = replace(config, prior_weight=1.0, prior_images=5, preview_steps=2, preservation_weight=0.0, steps=2)
    first = train(config)
    for path in cache.rglob("*.safetensors"):
        flip(path)
    images = sorted((cache / "class").rglob("*.png"))
    assert len(images) == 5
    before = [path.read_bytes() for path in images]
    images[0].write_bytes(before[0][:-40])
    flip(images[1], len(before[1]) // 2)
    images[2].write_bytes(b"")
    Image.new("RGB", (32, 32)).save(images[3])
    images[4].write_text("no image", encoding="utf-8")
    second = train(replace(config, out=config.out.parent / "again"))
    assert equal_states(adapter(first.folder), adapter(second.folder))
    assert [path.read_bytes() for path in images] == before


def test_a_spoilt_adapter_folder_is_made_again(base, cache, tmp_path):
    from rankfold.pipelines.generate import Recipe, generate

    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, 64), (64, 2)))
    file = tmp_path / "a.safetensors"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, file)
    recipe = Recipe(prompt="a", base=str(base), adapters=(str(file),), strengths=(1.0,), steps=1)
    whole = generate(recipe)[0][0]
    weights = next((cache / "adapters").rglob("adapter_model.safetensors"))
    before = weights.read_bytes()
    flip(weights, len(before) - 2)
    assert generate(recipe)[0][0].tobytes() == whole.tobytes()
    assert weights.read_bytes() == before
    notes = next((cache / "adapters").rglob("notes.json"))
    notes.write_text("[", encoding="utf-8")
    assert generate(recipe)[0][0].tobytes() == whole.tobytes()
    assert json.loads(notes.read_text(encoding="utf-8"))["notes"] == []


@pytest.mark.parametrize("text", ["[", "[]", '{"version": 1, "known": []}', '{"version": 1, "known": {"KEY": [1]}}'])
def test_a_spoilt_memory_of_images(images, cache, tmp_path, text):
    from rankfold.toolkit.data.image_checks import image_key

    memory, source = PlanMemory(tmp_path / "data.json"), images / "0.png"
    memory.path.parent.mkdir(parents=True)
    memory.path.write_text(text.replace("KEY", image_key(source)), encoding="utf-8")
    assert check_images([source], PlanMemory(tmp_path / "data.json"))[source].size == (64, 64)


@pytest.mark.parametrize("format", ["gif", "png"])
def test_a_small_file_with_a_large_image_is_refused(tmp_path, format):
    """A GIF of 674 bytes took 1 GB."""
    from rankfold.toolkit.core.errors import UserError

    side = int(MANY_PIXELS**0.5) + 8
    Image.new("1" if format == "png" else "L", (side, side)).save(tmp_path / f"0.{format}")
    with pytest.raises(Image.DecompressionBombError, match="pixels in"):
        open_image(tmp_path / f"0.{format}")
    with pytest.raises(UserError, match="unpacks to far more pixels than its size suggests"):
        load_rgb(tmp_path / f"0.{format}")


def test_limits_name_the_option(config):
    from rankfold.toolkit.core.errors import UserError

    for change, sentence in (
        ({"seed": 2**70}, "--seed must be at most 9223372036854775807"),
        ({"lr_pattern": {"x": float("nan")}}, "--lr-pattern must be a finite number"),
        ({"token": "\udcff"}, r"--token '\\udcff' holds bytes that are no text"),
    ):
        with pytest.raises(UserError, match=sentence):
            check_limits(replace(config, **change))


def test_a_finished_run_is_no_config_for_another_method(capsys, config):
    run = train(replace(config, steps=1))
    before = run.config_file.read_bytes(), run.status_file.read_bytes()
    capsys.readouterr()
    for words in (["search", "subject"], ["train", "instruct"]):
        assert "is of another method" in expect_error(capsys, *words, "--config", run.config_file)
    assert (run.config_file.read_bytes(), run.status_file.read_bytes()) == before
