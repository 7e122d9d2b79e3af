"""The studio in a real browser (the distribution's Chromium): the whole story on the embedded base."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import psutil
import pytest
from PIL import Image

from rankfold.toolkit.data import world
from rankfold.training import queue

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SLOW = 180_000  # milliseconds; the machines that run this are shared


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def serving(folder, *options, **environment):
    """The app as a user starts it; yields its address."""
    port = free_port()
    words = [
        sys.executable,
        "-m",
        "rankfold.apps.cli",
        "app",
        "--port",
        str(port),
        "--runs",
        str(folder / "runs"),
        *options,
    ]
    log = (folder / "app.log").open("ab")
    process = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log, env=os.environ | environment)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.time() + 180
        while process.poll() is None and time.time() < end:
            try:
                urllib.request.urlopen(address, timeout=10).read()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                time.sleep(0.3)
        assert process.poll() is None, (folder / "app.log").read_text()
        yield address, process
    finally:
        process.kill()
        process.wait()
        end_all(folder / "runs")


def end_all(root):
    """Ends the worker and whatever it has at work."""
    for process in psutil.process_iter(["cmdline"]):
        if str(root) in " ".join(process.info["cmdline"] or []):
            process.kill()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser):
    """A page that must make no error and ask no other machine."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(SLOW)
    faults, foreign = [], []
    opened.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda request: foreign.append(request.url) if "127.0.0.1" not in request.url else None)
    yield opened
    opened.close()
    assert not [url for url in foreign if not url.startswith(("data:", "blob:"))]
    assert not faults


@pytest.fixture
def pictures(tmp_path):
    files = []
    for number, (picture, _) in enumerate(world.subject_pictures(2_000_007, 5)):
        files.append(tmp_path / f"creature{number}.png")
        picture.save(files[-1])
    return files


def state(page):
    return page.locator("#state b").inner_text()


def wait_for(page, words, seconds=240):
    """Until the run's state is one of these."""
    end = time.time() + seconds
    while time.time() < end:
        if page.locator("#state b").count() and state(page) in words:
            return state(page)
        page.wait_for_timeout(300)
    raise AssertionError(f"still {state(page)}, not {words}")


def choose(page, place, text):
    """Chooses from a dropdown by typing."""
    box = page.locator(f"{place} input").first
    box.click()
    box.fill(text)
    page.get_by_role("option", name=re.compile(re.escape(text))).first.click()


@pytest.mark.timeout(900)
def test_the_whole_story(page, browser, pictures, tmp_path):
    """Upload, train, watch, reload, stop, resume, and pictures with two adapters."""
    with serving(tmp_path) as (address, _):
        page.goto(address)
        page.get_by_role("heading", name="Train", exact=True).wait_for()
        page.locator("#files input[type=file]").set_input_files([str(file) for file in pictures])
        page.locator("#add").click()
        page.get_by_text("5 pictures.").wait_for()
        assert page.get_by_text("5 have no caption").is_visible()
        page.locator("#subject-steps input").fill("400")
        page.wait_for_function("document.querySelector('#subject-command textarea').value.includes('--steps 400')")
        page.locator("#run-name textarea, #run-name input").first.fill("first")
        page.locator("#start").click()
        page.get_by_role("link", name="Watch it").click()
        wait_for(page, ("running",))
        page.locator("#curves svg").first.wait_for()
        page.reload()
        wait_for(page, ("running",))
        other = browser.new_page()
        other.set_default_timeout(SLOW)
        other.goto(f"{address}/watch?run=first")
        wait_for(other, ("running",))
        other.close()
        page.locator("#stop").click()
        wait_for(page, ("stopped",))
        run = queue.Run(tmp_path / "runs" / "first")
        step = run.status()["step"]
        assert 0 < step < 400
        page.locator("#resume").click()
        wait_for(page, ("done",))
        assert run.status()["step"] == 400
        steps = [row["step"] for row in run.metrics() if "loss" in row]
        assert steps == sorted(set(steps))
        assert page.locator("#previews img").count() >= 1
        shutil.copytree(run.folder, tmp_path / "runs" / "second")
        draw(page, address, tmp_path / "runs" / "_made")
        page.goto("about:blank")


def draw(page, address, made):
    """Two pictures with two adapters, whose settings come back from one of them."""
    page.goto(f"{address}/generate")
    choose(page, "#adapter-1", "first")
    page.get_by_role("button", name="One more adapter").click()
    choose(page, "#adapter-2", "second")
    page.locator("#prompt textarea").fill("a sks creature in the snow")
    page.locator("#n input").fill("2")
    page.locator("#steps input").fill("4")
    page.locator("#seed input").fill("7")
    page.locator("#generate button, button#generate").first.click()
    page.locator("#pictures img").first.wait_for()
    files = sorted(made.glob("*.png"))
    assert len(files) == 2
    with Image.open(files[0]) as picture:
        assert picture.size == (64, 64)
    page.locator("#prompt textarea").fill("something else")
    page.locator("#dropped input[type=file]").set_input_files(str(files[0]))
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a sks creature in the snow'")
    assert page.locator("#seed input").input_value() == "7"
