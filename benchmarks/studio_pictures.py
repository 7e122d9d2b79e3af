"""The images of docs/studio.md: every page in both themes and as wide as a phone, on a studio with something in it.

    python benchmarks/studio_pictures.py [--out docs/studio] [--work FOLDER]

Starts the app as a user does, trains a short run through the browser, draws, and takes the images with the system's Chromium.
Prints how long the first paint and the app's start took.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from rankfold.toolkit.embedded import world

PAGES = ("start", "train", "watch", "generate", "compare", "compose", "chat", "library")
QUERIES = {"train": "&clone=my-creature", "watch": "&run=my-creature", "library": "&adapter=my-creature"}
PATIENCE = 180_000  # milliseconds
VIEWS = {"light": (1180, "light"), "dark": (1180, "dark"), "phone": (390, "light")}


def start_app(work: Path) -> tuple[Any, str]:
    """The app, ready, and its address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = [sys.executable, "-m", "rankfold.apps.cli", "app", "--port", str(port), "--runs", "runs"]
    begin = time.perf_counter()
    process = subprocess.Popen(words, cwd=work)
    address = f"http://127.0.0.1:{port}"
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).read()
            break
        except OSError:
            time.sleep(0.1)
    print(f"ready after {time.perf_counter() - begin:.1f} s, imports included")
    return process, address


def story(page: Any, address: str, work: Path) -> None:
    """A short run, so that the pages have something to show."""
    images = work / "photos"
    images.mkdir(exist_ok=True)
    for number, (image, thing) in enumerate(world.subject_images(2_000_010, 5)):
        image.save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"a sks creature {world.SCENES[thing.scene]}", encoding="utf-8")
    page.goto(f"{address}/train")
    page.locator("#folder textarea, #folder input").first.fill(str(images.resolve()))
    page.locator("#use-folder").click()
    page.get_by_text("5 images.").wait_for()
    page.locator("#run-name textarea, #run-name input").first.fill("my-creature")
    page.locator("#start").click()
    page.get_by_role("link", name="Watch it").click()
    page.locator("#state b", has_text="done").wait_for(timeout=10 * PATIENCE)
    page.goto(f"{address}/generate")
    page.locator("#adapter-1 input").click()
    page.get_by_role("option", name="my-creature").first.click()
    page.locator("#generate").click()
    page.locator("#pictures img").first.wait_for()


def take(browser: Any, address: str, out: Path) -> None:
    """One image a page and view."""
    out.mkdir(parents=True, exist_ok=True)
    for view, (width, theme) in VIEWS.items():
        page = browser.new_page(viewport={"width": width, "height": 844 if view == "phone" else 900})
        page.set_default_timeout(PATIENCE)
        for name in PAGES:
            path = "" if name == "start" else name
            page.goto(f"{address}/{path}?__theme={theme}" + QUERIES.get(name, ""))
            page.locator("h1").wait_for()
            page.wait_for_timeout(4000)
            file = out / f"{name}-{view}.png"
            page.screenshot(path=file, full_page=view == "light")
            with Image.open(file) as image:
                small = image.convert("RGB").quantize(128)
            small.save(file, optimize=True)
        paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        print(f"{view}: first paint of {PAGES[-1]} {paint / 1000:.2f} s")
        page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/studio"))
    parser.add_argument("--work", type=Path, default=Path("runs/studio_pictures"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    process, address = start_app(options.work)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1180, "height": 900})
            page.set_default_timeout(PATIENCE)
            if not (options.work / "runs" / "my-creature").is_dir():
                story(page, address, options.work)
            take(browser, address, options.out)
            browser.close()
    finally:
        process.kill()


if __name__ == "__main__":
    main()
