"""From the start page to a file that stock diffusers loads, with real photos, in a real browser, a picture of each station.

    python benchmarks/studio_story.py PHOTOS OUT [--steps 20]

PHOTOS: a folder of photos. The base is an SDXL with random weights (tests/helpers/tiny_families.py), so what is looked at is the studio:
that photos are taken as they are, that settings follow the base, that the run, the images and the file come of it. In OUT: the
pictures and the file. Ends with what was measured: the difference that the file makes to an image of the stock pipeline.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS / "apps"), str(TESTS / "helpers")]

from test_studio import CHROMIUM, SLOW, choose, export, serving, wait_for  # noqa: E402
from tiny_families import build  # noqa: E402

PROMPT = "a sks backpack on a beach"


class Story:
    """A browser's page, and pictures of it."""

    def __init__(self, page: Any, out: Path) -> None:
        self.page, self.out, self.number, self.began = page, out, 0, time.time()

    def show(self, name: str) -> None:
        """Keeps a picture of the page as it is."""
        self.number += 1
        self.page.screenshot(path=str(self.out / f"{self.number:02d}-{name}.png"), full_page=True)
        print(f"{time.time() - self.began:6.1f} s  {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    work = options.out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    base = build("sdxl", work / "random-sdxl")
    from playwright.sync_api import sync_playwright

    with serving(work, "--readable", str(work)) as (address, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(SLOW)
        story = Story(page, options.out)
        train(story, address, base, sorted(options.photos.glob("*.jpg")), options.steps)
        draw(story, address)
        file = export(page, address, options.out)
        story.show("exported")
        browser.close()
    print(f"the file changes an image of the stock pipeline by up to {difference(base, file):.3f} of 1")


def train(story: Story, address: str, base: Path, photos: list[Path], steps: int) -> None:
    """Start page, photos, base, start, watching."""
    page = story.page
    page.goto(address)
    page.get_by_role("link", name="Teach a subject").wait_for()
    story.show("start")
    page.get_by_role("link", name="Teach a subject").click()
    page.get_by_role("heading", name="Train", exact=True).wait_for()
    page.locator("#set-name textarea, #set-name input").first.fill("my photos")
    page.locator("#files input[type=file]").set_input_files([str(photo) for photo in photos])
    page.locator("#add").click()
    page.get_by_text(f"{len(photos)} images.").wait_for()
    story.show("photos with the embedded base")
    box = page.locator("#subject-base input, #subject-base textarea").first
    box.fill(str(base))
    box.press("Enter")
    page.wait_for_function("document.querySelector('#base-warning').innerText.trim() === ''")
    page.locator("#subject-class_noun input, #subject-class_noun textarea").first.fill("backpack")
    page.locator("#subject-steps :is(input, textarea)").first.fill(str(steps))
    page.locator("#subject-texts").get_by_text("Command and YAML").click()
    page.wait_for_function(f"document.querySelector('#subject-command textarea').value.includes('--steps {steps}')")
    story.show("settings for SDXL")
    page.locator("#run-name textarea, #run-name input").first.fill("first")
    page.locator("#start").click()
    page.get_by_role("link", name="Watch it").click()
    wait_for(page, ("done",))
    story.show("watched to the end")


def draw(story: Story, address: str) -> None:
    """Two images with the adapter."""
    page = story.page
    page.goto(f"{address}/generate")
    choose(page, "#adapter-1", "first")
    page.locator("#prompt textarea").fill(PROMPT)
    page.locator("#n input").fill("2")
    page.locator("#steps :is(input, textarea)").fill("4")
    page.locator("#generate button, button#generate").first.click()
    page.locator("#pictures img").first.wait_for()
    story.show("generated")


def difference(base: Path, file: Path) -> float:
    """How far the file moves a pixel, 0 to 1, of an image that stock diffusers draws on the base."""
    import numpy as np
    import torch
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)

    def drawn() -> np.ndarray:
        noise = torch.Generator().manual_seed(0)
        return pipe(PROMPT, num_inference_steps=4, height=64, width=64, generator=noise, output_type="np").images[0]

    plain = drawn()
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    return float(np.abs(drawn() - plain).max())


if __name__ == "__main__":
    main()
