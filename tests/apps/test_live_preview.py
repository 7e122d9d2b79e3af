"""What is shown while an image is drawn."""

import io

import pytest
from PIL import Image
from tiny_families import SIDE

from rankfold.apps.studio.backend.live_preview import LivePreview
from rankfold.pipelines.generate import denoise
from rankfold.pipelines.start_image import StartImage
from rankfold.toolkit.diffusion.load import open_model


@pytest.mark.parametrize(
    ("name", "started"),
    [("sd", False), ("sd", True), ("flux-dev", False), ("flux2-klein", False), ("qwen-image", False)],
)
def test_images_are_shown_while_they_are_drawn(folders, monkeypatch, name, started):
    """Whatever the stock pipeline works on: a grid, packed squares, or tokens."""
    monkeypatch.setattr("rankfold.apps.studio.backend.live_preview.EVERY_SECONDS", 0)
    monkeypatch.setattr("rankfold.apps.studio.backend.live_preview.SHARE", float("inf"))
    model = open_model(str(folders(name)))
    pipe = model.pipeline(model.denoiser_name, "vae", *model.text_encoder_names)
    preview, seen = LivePreview(), []

    def look(pipe, latents):
        preview.look(pipe, latents)
        seen.append(preview.webp)

    start = StartImage(Image.new("RGB", (2 * SIDE, SIDE), "red"), 1.0) if started else None
    embeds = model.encode_prompts(["a creature"])
    embeds = {key: value.detach() for key, value in embeds.items()}
    denoise(
        pipe,
        embeds,
        seeds=[3],
        steps=2,
        guidance_scale=1.0,
        negative=embeds,
        width=2 * SIDE,
        height=SIDE,
        on_step=look,
        start=start,
    )
    assert not preview.off
    assert len({*seen}) == 2
    image = Image.open(io.BytesIO(preview.webp))
    assert image.width == 2 * image.height
