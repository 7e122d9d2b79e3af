"""The studio in a real browser (the distribution's Chromium): the whole story on the embedded base."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager

import psutil
import pytest
from PIL import Image, PngImagePlugin

from rankfold.pipelines.generate import read_recipe
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.embedded import world
from rankfold.training.config.defaults import drawing_defaults
from rankfold.training.config.yaml_file import from_yaml
from rankfold.training.launch import queue

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.slow
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
        assert process.poll() is None, (folder / "app.log").read_text(encoding="utf-8")
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

    assert CHROMIUM, "these tests drive a real browser: install the distribution's chromium"
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
    # A page that is left breaks off what it still asks: Gradio's client says so in two messages.
    left = any(text.startswith("AbortError: signal is aborted") for text in faults)
    assert not [
        text for text in faults if not (left and text.startswith(("AbortError", "Unexpected error Connection")))
    ]


@pytest.fixture
def images(tmp_path):
    files = []
    for number, (image, _) in enumerate(world.subject_images(2_000_007, 5)):
        files.append(tmp_path / f"creature{number}.png")
        image.save(files[-1])
    return files


def state(page):
    return page.locator("#state b").inner_text()


def wait_for(page, words, patience=240):
    """Until the run's state is one of these; the page may not stand still for so many seconds."""
    shown, end = "", time.time() + patience
    while time.time() < end:
        if page.locator("#state b").count() and state(page) in words:
            return state(page)
        now = page.locator("#state").inner_text()
        if now != shown:
            shown, end = now, time.time() + patience
        page.wait_for_timeout(300)
    raise AssertionError(f"still {state(page)}, not {words}")


def choose(page, place, text):
    """Chooses from a dropdown by typing."""
    box = page.locator(f"{place} input").first
    box.click()
    box.fill(text)
    page.get_by_role("option", name=re.compile(re.escape(text))).first.click()


def type_choice(page, place, text):
    """Types into a dropdown that takes other values than its choices."""
    page.locator(f"{place} input").first.fill(text)
    page.keyboard.press("Enter")


@pytest.mark.timeout(900)
def test_the_whole_story(page, browser, images, tmp_path):
    """Upload, have captions written, train, watch, reload, stop, resume, and images with two adapters."""
    with serving(tmp_path) as (address, _):
        page.goto(address)
        page.get_by_role("link", name="Teach a subject").click()
        page.get_by_role("heading", name="Train", exact=True).wait_for()
        page.locator("#set-name textarea, #set-name input").first.fill("my subject")
        page.locator("#files input[type=file]").set_input_files([str(file) for file in images])
        page.locator("#add").click()
        page.get_by_text("5 images.").wait_for()
        assert page.get_by_text("5 have no caption").is_visible()
        page.locator("#write-captions").click()
        page.get_by_text("5 captions written by tiny-vlm").wait_for()
        page.locator("#save-captions").click()
        page.get_by_text("5 have no caption").wait_for(state="hidden")
        assert "sks creature" in (tmp_path / "runs" / "_pictures" / "my-subject" / "creature0.txt").read_text(
            encoding="utf-8"
        )
        page.locator("#subject-steps :is(input, textarea)").fill("160")
        page.locator("#subject-texts").get_by_text("Command and YAML").click()
        page.wait_for_function("document.querySelector('#subject-command textarea').value.includes('--steps 160')")
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
        assert 0 < step < 160
        page.locator("#resume").click()
        wait_for(page, ("done",))
        assert run.status()["step"] == 160
        steps = [row["step"] for row in run.metrics() if "loss" in row]
        assert steps == sorted(set(steps))
        assert page.locator("#previews img").count() >= 1
        shutil.copytree(run.folder, tmp_path / "runs" / "second")
        draw(page, address, tmp_path / "runs" / "_made")
        compare(page, address)
        load(export(page, address, tmp_path))
        page.close()


def draw(page, address, made):
    """Two images with two adapters, whose settings come back from one of them."""
    page.goto(f"{address}/generate")
    page.locator("#prompt textarea").fill("words of my own")
    choose(page, "#adapter-1", "first")
    page.wait_for_timeout(2000)
    assert page.locator("#prompt textarea").input_value() == "words of my own"
    page.locator("#prompt textarea").fill("")
    choose(page, "#adapter-1", "first")
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a sks creature on the beach'")
    page.get_by_role("button", name="Add adapter").click()
    choose(page, "#adapter-2", "second")
    page.locator("#prompt textarea").fill("a sks creature in the snow")
    page.locator("#n input").fill("2")
    page.locator("#steps :is(input, textarea)").fill("4")
    page.locator("#seed input").fill("7")
    page.locator("#generate button, button#generate").first.click()
    page.locator("#pictures img").first.wait_for()
    files = sorted(made.glob("*.png"))
    assert len(files) == 2
    with Image.open(files[0]) as image:
        assert image.size == (64, 64)
    assert len(read_recipe(files[0]).adapters) == 2  # what is chosen in a row is used
    page.locator("#prompt textarea").fill("something else")
    page.locator("#dropped input[type=file]").set_input_files(str(files[0]))
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a sks creature in the snow'")
    assert page.locator("#seed input").input_value() == "7"


def compare(page, address):
    """Two strengths side by side, with figures under a sheet."""
    page.goto(f"{address}/compare")
    choose(page, "#compare-adapter", "first")
    choose(page, "#compare-x", "strength")
    page.locator("#compare-x-values textarea").fill("0\n1")
    page.locator("#compare-steps :is(input, textarea)").fill("4")
    page.locator("#compare-go").click()
    page.locator("#compare-sheet img").wait_for()
    page.locator("#compare-cells img").nth(1).wait_for()


def export(page, address, folder):
    """The file that the page offers, downloaded."""
    page.goto(f"{address}/library")
    choose(page, "#export-adapter", "first")
    page.locator("#export-go").click()
    page.get_by_text("read back by").wait_for()
    with page.expect_download() as download:
        page.locator("#export-files a").first.click()
    file = folder / "downloaded.safetensors"
    download.value.save_as(file)
    return file


def load(file):
    """Stock diffusers takes it and draws another image with it."""
    import torch
    from diffusers import StableDiffusionPipeline

    from rankfold.toolkit.diffusion.load import resolve_base

    pipe = StableDiffusionPipeline.from_pretrained(resolve_base("tiny"), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)

    def drawn():
        return pipe(
            "a sks creature", num_inference_steps=2, height=64, width=64, generator=torch.Generator().manual_seed(0)
        ).images[0]

    plain = drawn()
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    assert drawn().tobytes() != plain.tobytes()


# ---------------------------------------------------------------------------------------------- one server for the rest


PAGES = ("", "train", "watch", "generate", "compare", "compose", "chat", "library")
NAMED = [
    "/chat", "/compare", "/compose", "/demo", "/export", "/generate", "/inspect", "/library", "/look", "/plan", "/recall", "/resume",
    "/runs", "/sample", "/save", "/start", "/start_task", "/stop", "/upload", "/use_folder",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A studio with a finished run in it, and a file beside its runs."""
    folder = tmp_path_factory.mktemp("studio")
    images = folder / "photos"
    images.mkdir()
    for number, (image, _) in enumerate(world.subject_images(2_000_008, 4)):
        image.save(images / f"{number}.png")
    (folder / "secret.txt").write_text("secret")
    with serving(folder) as (address, process):
        yield folder, address, process


@pytest.fixture
def client(server):
    from gradio_client import Client

    return Client(server[1], verbose=False)


def test_the_names_of_the_endpoints_stay(client):
    assert sorted(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == NAMED


def test_a_program_trains_with_the_same_endpoints(client, server):
    """And a mistake is one sentence; the run goes on when the program is gone, and is there for the next."""
    from gradio_client.exceptions import AppError

    folder = server[0]
    with pytest.raises(AppError, match="outside what the studio may read"):
        client.predict("/etc", api_name="/use_folder")
    with pytest.raises(AppError, match="There are no images yet"):
        client.predict("method: subject", "by-program", api_name="/start")
    client.predict(str(folder / "photos"), api_name="/use_folder")
    with pytest.raises(AppError, match="unknown key 'stps'"):
        client.predict("method: subject\nstps: 3", "by-program", api_name="/start")
    with pytest.raises(AppError, match="is not a valid name of a run"):
        client.predict("method: subject", "../by-program", api_name="/start")
    settings = "method: subject\nsteps: 12\npreview_every: 6\nthreads: 1\nlog_every: 3\npreview_steps: 2"
    client.predict(settings, "by-program", api_name="/start")
    run = queue.Run(folder / "runs" / "by-program")
    end = time.time() + 240
    while run.state() != "done" and time.time() < end:
        time.sleep(0.3)
    assert run.state() == "done", run.status()
    shown = client.predict("by-program", api_name="/look")
    assert "step 12 of 12" in shown[0]
    assert "<svg" in shown[1]
    assert len(shown[2]) == 4


def get(address, path):
    try:
        return urllib.request.urlopen(f"{address}/{path}", timeout=30).status
    except urllib.error.HTTPError as error:
        return error.code


def test_only_runs_and_library_are_served(server):
    folder, address, _ = server
    (folder / "runs" / "x").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "runs" / "x" / "seen.png")
    (folder / "runs" / "x" / "log.txt").write_text("hf_abcdefghijklmnop")
    (folder / "secret.png").write_text("secret")
    (folder / "runs" / "x" / "link.png").symlink_to(folder / "secret.png")
    assert get(address, f"gradio_api/file={folder}/runs/x/seen.png") == 200
    for path in (
        f"{folder}/runs/x/log.txt",
        f"{folder}/secret.png",
        f"{folder}/secret.txt",
        f"{folder}/runs/../secret.txt",
        "/etc/passwd",
        f"{folder}/runs/x/link.png",
        "~/.bashrc",
    ):
        assert get(address, f"gradio_api/file={path}") in (403, 404), path


def faults_of(opened):
    """What axe-core finds that is serious or critical, targets of a finger's size included."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(opened, options={"rules": {"target-size": {"enabled": True}}}).response["violations"]
    return [
        (one["id"], [node["html"][:200] for node in one["nodes"]])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def test_pages_are_sane_for_keyboards_and_readers(server, browser):
    """axe-core finds nothing serious or critical: light, dark, and as wide as a phone; each page has its title."""
    _, address, _ = server
    titles = set()
    for theme, width in (("light", 1280), ("dark", 1280), ("light", 390)):
        opened = browser.new_page(viewport={"width": width, "height": 844})
        for path in PAGES:
            opened.goto(f"{address}/{path}?__theme={theme}", timeout=SLOW)
            opened.locator("h1").wait_for(timeout=SLOW)
            opened.wait_for_timeout(500)
            bad = faults_of(opened)
            assert not bad, (path, theme, width, bad)
            assert opened.evaluate("document.documentElement.scrollWidth") <= width + 1, (path, width)
            assert opened.locator(".top nav").bounding_box()["height"] < 60  # one line
            titles.add(opened.title())
        opened.close()
    assert titles == {f"{(path or 'start').capitalize()} - rankfold" for path in PAGES}


HOSTILE = '<img src="http://elsewhere.invalid/x.png"><form action="http://elsewhere.invalid"><input></form><b id="hostile">x</b>'


def test_nothing_from_a_link_or_an_image_becomes_part_of_a_page(server, page, tmp_path):
    """Errors show what they are about as text; `page` watches that nothing is asked of another machine."""
    address = server[1]
    for path in ("", "train"):
        page.goto(f"{address}/{path}?clone={urllib.parse.quote(HOSTILE)}")
        page.locator("#started .fault").wait_for()
        assert "<img src=" in page.locator("#started").inner_text()
        assert page.url.startswith(f"{address}/train?")
    for path in ("watch?run=", "generate?adapter=", "library?adapter=", "chat?adapter=", "compose?run="):
        page.goto(f"{address}/{path}{urllib.parse.quote(HOSTILE)}")
        page.locator("h1").wait_for()
        page.wait_for_timeout(700)
        assert not page.locator("#hostile").count(), path
    info = PngImagePlugin.PngInfo()
    info.add_text("rankfold", json.dumps({"prompt": "x", "adapters": [HOSTILE], "strengths": [1.0], "hashes": ["y"]}))
    Image.new("RGB", (8, 8)).save(tmp_path / "prepared.png", pnginfo=info)
    page.goto(f"{address}/generate")
    page.locator("#dropped input[type=file]").set_input_files(str(tmp_path / "prepared.png"))
    page.locator("#progress .fault").wait_for()
    assert "<img src=" in page.locator("#progress").inner_text()
    assert not page.locator("#hostile").count()
    page.close()


def test_axe_finds_nothing_while_a_toast_and_errors_are_open(server, browser, tmp_path):
    _, address, _ = server
    (tmp_path / "page.exe").write_text("no image")
    for theme in ("light", "dark"):
        opened = browser.new_page()
        opened.set_default_timeout(SLOW)
        opened.goto(f"{address}/train?__theme={theme}")
        opened.locator("#start").click()
        opened.locator("#started .fault").wait_for()  # beside its button
        assert opened.locator("#run-name textarea, #run-name input").first.input_value()  # and nothing was emptied
        opened.locator("#files input[type=file]").set_input_files(str(tmp_path / "page.exe"))
        opened.locator(".toast-body").first.wait_for()
        opened.wait_for_timeout(700)  # it fades in, and half faded nothing has its contrast
        assert not faults_of(opened), theme
        opened.close()


def started(page, server, name):
    """The config of the run that the page starts under this name."""
    page.locator("#run-name textarea, #run-name input").first.fill(name)
    page.locator("#start").click()
    page.locator(f'#started a[href="/watch?run={name}"]').wait_for()
    run = queue.Run(server[0] / "runs" / name)
    config = from_yaml(run.config_file)
    stop(run)
    return config


def stop(run):
    """Ends a run, whatever it does."""
    end = time.time() + 120
    while run.state() not in ("stopped", "done", "failed") and time.time() < end:
        with contextlib.suppress(UserError):
            queue.withdraw(run)
        time.sleep(0.3)


@pytest.mark.timeout(900)
def test_what_came_into_a_box_by_other_ways_than_keys_is_trained(server, page):
    """Pasted, composed by an input method, filled in by the browser; and the page still holds it after a reload."""
    address = server[1]
    page.goto(f"{address}/train")
    page.locator("#folder textarea, #folder input").first.fill(str(server[0] / "photos"))
    page.locator("#use-folder").click()
    page.get_by_text("4 images.").wait_for()
    page.locator("#subject-steps :is(input, textarea)").fill("30")
    token = page.locator("#subject-token textarea, #subject-token input").first
    token.fill("")
    token.evaluate(
        """box => { const data = new DataTransfer(); data.setData("text/plain", "ohwx");
        box.focus(); box.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}));
        document.execCommand("insertText", false, "ohwx"); }"""
    )
    assert started(page, server, "pasted").token == "ohwx"
    token.fill("")
    token.focus()
    session = page.context.new_cdp_session(page)
    session.send("Input.imeSetComposition", {"text": "zw", "selectionStart": 2, "selectionEnd": 2})
    session.send("Input.insertText", {"text": "zwx"})
    assert started(page, server, "composed").token == "zwx"
    token.evaluate(
        """box => { box.value = "qvx"; box.dispatchEvent(new Event("input", {bubbles: true}));
        box.dispatchEvent(new Event("change", {bubbles: true})); }"""
    )
    assert started(page, server, "filled").token == "qvx"
    page.wait_for_timeout(500)
    page.goto(f"{address}/library")
    page.goto(f"{address}/train")
    page.get_by_text("4 images.").wait_for()
    assert token.input_value() == "qvx"
    page.close()


TYPED = {  # what is filled in by itself when a page has loaded, and what else is there
    "train": ("#run-name", "#set-name", "#subject-token"), "train?tab=task": ("#task-name",), "compose": ("#compose-name",),
    "generate": ("#prompt", "#negative"), "compare": ("#compare-prompt",),
}  # fmt: skip

COMMAND = "text => `${document.querySelector('#subject-command textarea')?.value} `.includes(text)"
SLOW_ANSWERS = """const ask = window.fetch; window.fetch = (...what) => String(what[0].url || what[0]).includes("predict")
  ? new Promise((go) => setTimeout(go, 700)).then(() => ask(...what)) : ask(...what);"""


def test_what_is_typed_while_a_page_loads_stays(server, page):
    """Names and drafts come late; what nobody has touched is filled, and the texts follow."""
    folder, address, _ = server
    page.set_default_timeout(20_000)
    for name in ("run-1", "task-1", "composed-1", "_pictures/images-1"):
        (folder / "runs" / name).mkdir(parents=True, exist_ok=True)

    def box(place):
        return page.locator(f"{place} textarea, {place} input").first

    for path, places in TYPED.items():  # a draft of each
        page.goto(f"{address}/{path}")
        box(places[0]).wait_for()
        page.wait_for_timeout(900)
        for place in (place for place in places if box(place).is_visible()):
            box(place).fill("draft")
        if path == "train":
            page.locator("#subject-texts").get_by_text("Command and YAML").click()
            page.wait_for_function(COMMAND, arg="--token draft")
        page.wait_for_timeout(500)
    page.add_init_script(SLOW_ANSWERS)
    for path, (first, *others) in TYPED.items():
        page.goto(f"{address}/{path}")
        box(first).fill("typed", timeout=SLOW)
        page.wait_for_timeout(1500)
        for place in (place for place in others if box(place).is_visible()):
            wanted = "images-2" if place == "#set-name" else "draft"
            page.wait_for_function("([box, text]) => box.value === text", arg=[box(place).element_handle(), wanted])
        if path == "train":
            page.locator("#subject-texts").get_by_text("Command and YAML").click()
            page.wait_for_function(COMMAND, arg="--token draft")
            page.wait_for_function(COMMAND, arg="/typed ")
        assert box(first).input_value() == "typed", path
    for name in ("run-1", "task-1", "composed-1", "_pictures/images-1"):
        (folder / "runs" / name).rmdir()
    page.close()


def test_a_set_that_is_chosen_while_a_page_loads_stays(server, page):
    """Reading the images of the draft takes longer than choosing others."""
    folder, address, _ = server
    (folder / "large").mkdir()
    for number, (image, _) in enumerate(world.subject_images(2_000_009, 12)):
        image.resize((1500, 1500)).save(folder / "large" / f"{number}.png")

    def use(place, expected):
        page.locator("#folder textarea, #folder input").first.fill(str(place))
        page.locator("#use-folder").click()
        page.locator("#findings").get_by_text(expected).wait_for()

    page.goto(f"{address}/train")
    use(folder / "large", "12 images.")
    page.locator("#subject-texts").get_by_text("Command and YAML").click()
    page.wait_for_function(COMMAND, arg=f"--images {folder / 'large'}")
    page.wait_for_timeout(500)
    page.add_init_script(SLOW_ANSWERS)
    page.goto(f"{address}/train")
    use(folder / "photos", "4 images.")
    page.wait_for_timeout(6000)
    assert page.locator("#findings").get_by_text("4 images.").is_visible()
    assert page.locator("#crops img").count() == 4
    page.locator("#subject-texts").get_by_text("Command and YAML").click()
    page.wait_for_function(COMMAND, arg=f"--images {folder / 'photos'}")
    page.close()


@pytest.mark.timeout(900)
def test_a_walk_by_keyboard_alone_from_the_start_page_to_a_run(server, page):
    """Tab reaches everything and leaves everything, the editor too."""
    address = server[1]

    def tab_to(selector, most=120):
        for _ in range(most):
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab does not reach {selector}")

    page.goto(address)
    page.locator("#recent p, #recent .cards").first.wait_for()
    tab_to('a.card[href="/train"]')
    page.keyboard.press("Enter")
    page.locator("#folder").wait_for()
    page.wait_for_timeout(500)
    tab_to("#folder textarea, #folder input")
    page.keyboard.type(str(server[0] / "photos"))
    tab_to("#use-folder")
    page.keyboard.press("Enter")
    page.get_by_text("4 images.").wait_for()
    tab_to("#subject-texts button")
    page.keyboard.press("Enter")
    page.locator("#subject-yaml .cm-content").wait_for()
    tab_to("#subject-yaml .cm-content")
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.matches('.cm-content')")
    for _ in range(60):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.id") == "start":
            break
    style = page.evaluate(
        "(({outlineStyle, outlineWidth}) => [outlineStyle, outlineWidth])(getComputedStyle(document.activeElement))"
    )
    assert style == ["solid", "3px"]
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Watch it").wait_for()
    stop(queue.Run(max((server[0] / "runs").glob("run-*"), key=lambda path: path.stat().st_mtime)))
    page.close()


@pytest.mark.timeout(900)
def test_stop_keeps_what_is_drawn_and_a_click_brings_its_settings_back(server, page, tmp_path):
    address = server[1]
    page.goto(f"{address}/generate")
    page.locator("#prompt textarea").fill("a red creature in the snow")
    page.locator("#n input").fill("40")
    page.locator("#steps :is(input, textarea)").fill("6")
    page.locator("#seed input").fill("11")
    page.locator("#generate-start button").first.click()
    page.locator("#start-image input[type=file]").set_input_files(str(server[0] / "photos" / "0.png"))
    page.locator("#start-image img").wait_for()
    page.locator("#generate").click()
    page.locator("#live img").wait_for()
    page.locator("#pictures img").first.wait_for()
    page.locator("#generate-stop").click()
    page.get_by_text(re.compile(r"Stopped: \d+ of 40 images are drawn and kept")).wait_for()
    page.locator("#made img").first.wait_for()
    page.locator("#prompt textarea").fill("something else")
    page.locator("#made button").first.click()
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a red creature in the snow'")
    [made, *_] = sorted((server[0] / "runs" / "_made").glob("*.png"))
    assert read_recipe(made).image_strength == 0.6
    page.locator("#steps :is(input, textarea)").fill("0")
    page.locator("#generate").click()
    page.locator("#progress .fault").wait_for()
    assert page.locator("#pictures img").count()  # an error empties nothing
    Image.new("L", Image.open(server[0] / "photos" / "0.png").size, 255).save(tmp_path / "mask.png")
    page.locator("#start-mask input[type=file]").set_input_files(str(tmp_path / "mask.png"))
    page.locator("#start-mask img").wait_for()
    page.locator("#steps :is(input, textarea)").fill("6")
    page.locator("#generate").click()
    page.locator("#progress .fault").get_by_text("takes denoisers of 4 or 9 input channels").wait_for()
    page.close()


@pytest.mark.timeout(600)
def test_a_mask_is_painted_over_the_image(server, page, tmp_path):
    """White where the brush was, as large as the upright photo, each time that Generate is pressed; never two masks at once."""
    noise = Image.effect_noise((400, 300), 60).convert("RGB")
    exif = noise.getexif()
    exif[0x0112] = 6  # stored on its side: 300 x 400 when it is upright
    noise.save(tmp_path / "photo.jpg", exif=exif)
    page.goto(f"{server[1]}/generate")
    page.locator("#generate-start button").first.click()
    assert page.locator("#start-painted").count() == 0
    page.locator("#start-image input[type=file]").set_input_files(str(tmp_path / "photo.jpg"))
    canvas = page.locator("#start-painted canvas").first
    canvas.wait_for()
    page.wait_for_timeout(1500)  # until it has drawn the photo
    canvas.scroll_into_view_if_needed()
    place = canvas.bounding_box()
    page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    page.mouse.down()
    page.mouse.move(place["x"] + place["width"] / 2 + 8, place["y"] + place["height"] / 2, steps=4)
    page.mouse.up()
    folder = server[0] / "runs" / "_made" / "_from"
    before = set(folder.glob("*")) if folder.exists() else set()
    page.locator("#generate").click()
    page.locator("#progress .fault").get_by_text("takes denoisers of 4 or 9 input channels").wait_for()
    [mask] = [path for path in set(folder.glob("*")) - before if path.suffix == ".png"]
    painted = Image.open(mask)
    assert (painted.mode, painted.size) == ("L", (300, 400))
    left, top, right, bottom = painted.getbbox()
    assert left < 150 < right
    assert top < 200 < bottom
    assert 30 <= right - left < 100
    assert 25 <= bottom - top < 100
    Image.new("L", (300, 400), 255).save(tmp_path / "mask.png")
    page.locator("#start-mask input[type=file]").set_input_files(str(tmp_path / "mask.png"))
    page.locator("#start-mask img").wait_for()
    page.locator("#generate").click()
    page.locator("#progress .fault").get_by_text("take one of them away").wait_for()
    page.locator("#start-image button[aria-label='Remove Image']").click()
    canvas.wait_for(state="detached")


@pytest.mark.timeout(600)
def test_settings_that_nobody_has_set_are_empty_boxes(server, page):
    """Not 0, which Gradio makes of an empty box of numbers; neither one of them nor what is typed beside them is refused."""
    page.goto(f"{server[1]}/train")
    page.locator("#subject-all").get_by_text("Advanced").click()
    for name in ("text_learning_rate", "preview_steps"):
        box = page.locator(f"#subject-{name} :is(input, textarea)")
        box.wait_for()
        assert (box.input_value(), box.get_attribute("placeholder")) == ("", "not set"), name
    page.locator("#subject-texts").get_by_text("Command and YAML").click()
    for name, shown in (("checkpoint_every", "10 "), ("min_snr_gamma", "7.0 "), ("text_learning_rate", "0.0001 ")):
        page.locator(f"#subject-{name} :is(input, textarea)").fill(shown.strip())
        page.wait_for_function(
            f"document.querySelector('#subject-command textarea').value.includes('--{name.replace('_', '-')} {shown}')"
        )
    page.locator("#subject-text_learning_rate :is(input, textarea)").fill("fast")
    page.locator("#subject .fault, #subject-said .fault").get_by_text("text learning rate must be a number").wait_for()
    page.goto(f"{server[1]}/generate")
    assert page.locator("#steps :is(input, textarea)").input_value() == ""
    page.locator("#n input").fill("1")
    page.locator("#generate").click()
    page.locator("#pictures img").first.wait_for()
    made = max((server[0] / "runs" / "_made").glob("*.png"), key=lambda path: path.stat().st_mtime)
    assert (read_recipe(made).steps, read_recipe(made).guidance_scale) == drawing_defaults("tiny")
    page.locator("#steps :is(input, textarea)").fill("2")
    page.locator("#generate-more button").first.click()
    page.locator("#guidance :is(input, textarea)").fill("1")
    page.locator("#negative textarea").fill("blue")
    page.locator("#generate").click()
    page.locator("#progress").get_by_text("has no effect: guidance is off").wait_for()  # what is not used is named
    page.close()


@pytest.mark.timeout(900)
def test_references_in_train_generate_and_compare(server, page, tmp_path):
    """Pairs uploaded and trained on; an image from a reference, by hand and by a program, which gives its reference back; a comparison."""
    from gradio_client import Client, handle_file

    folder, address, _ = server
    files = []
    for number, name in enumerate(("red", "blue")):
        for place in ("after", "before"):
            (tmp_path / place).mkdir(exist_ok=True)
            Image.new("RGB", (64, 64), name).save(tmp_path / place / f"{number}.png")
            (tmp_path / place / f"{number}.txt").write_text(f"the same in the snow {name}")
        files.append(str(tmp_path / "before" / f"{number}.png"))
    page.goto(f"{address}/train")
    page.locator("#set-name input, #set-name textarea").first.fill("after")
    page.locator("#files input[type=file]").set_input_files(
        [str(path) for path in sorted((tmp_path / "after").iterdir())]
    )
    page.locator("#add").click()
    page.get_by_text("Kept in the set after.").wait_for()
    page.locator("#train-references button").first.click()
    page.locator("#reference-set-name input, #reference-set-name textarea").first.fill("before")
    page.locator("#reference-files input[type=file]").set_input_files(files)
    page.locator("#add-references").click()
    page.get_by_text("Kept in the set before.").wait_for()
    page.locator('#base-cards input[value="tiny-kontext"]').check()
    page.wait_for_function("document.querySelector('#subject-base input').value === 'tiny-kontext'")
    run = started(page, server, "edit")
    assert run.references == (folder / "runs" / "_pictures" / "before",)
    page.goto(f"{address}/train?clone=edit")
    page.get_by_text("Save the captions").wait_for()  # the images of the run, with all that can be done with them
    page.locator("#train-references button").first.click()
    page.locator("#reference-sets").get_by_text("before", exact=True).first.wait_for()
    page.goto(f"{address}/generate")
    type_choice(page, "#base", "tiny-kontext")
    page.locator("#prompt textarea").fill("the same")
    for box, value in (("n", "1"), ("steps", "2"), ("seed", "3")):
        page.locator(f"#{box} :is(input, textarea)").fill(value)
    page.locator("#generate-references button").first.click()
    page.locator("#generate-reference-images input[type=file]").set_input_files(files[:1])
    page.locator("#generate-reference-images img").first.wait_for()
    page.locator("#generate").click()
    page.locator("#pictures img").first.wait_for()
    made = max((folder / "runs" / "_made").glob("*.png"), key=lambda path: path.stat().st_mtime)
    [kept] = read_recipe(made).references
    program = Client(address, verbose=False)
    call = {"base": "tiny-kontext", "prompt": "the same", "n": 1, "steps": 2, "seed": 3, "api_name": "/generate"}
    [again] = program.predict(references=[handle_file(files[0])], **call)[1]
    with Image.open(made) as own, Image.open(again["image"]) as other:
        assert own.tobytes() == other.tobytes()
    page.goto(f"{address}/generate")
    page.locator("#dropped input[type=file]").set_input_files(str(made))
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'the same'")
    page.locator("#generate-references button").first.click()
    page.locator("#generate-reference-images img").first.wait_for()
    type_choice(page, "#base", "tiny-dit")
    page.locator("#generate").click()
    page.get_by_text("1 reference image is given, and Stable Diffusion 3 takes none").wait_for()
    page.goto(f"{address}/compare")
    type_choice(page, "#compare-base", "tiny-kontext")
    page.locator("#compare-steps :is(input, textarea)").fill("2")
    page.locator("#compare-x-values textarea").fill("3\n4")
    page.locator("#compare-references button").first.click()
    page.locator("#compare-reference-images input[type=file]").set_input_files(files[:1])
    page.locator("#compare-reference-images img").first.wait_for()
    page.locator("#compare-go").click()
    page.locator("#compare-cells img").nth(1).wait_for()
    drawn = sorted((folder / "runs" / "_made").glob("*compare-*.png"))
    assert kept in [path for one in drawn if "sheet" not in one.name for path in read_recipe(one).references]
    page.close()


@pytest.mark.timeout(900)
def test_one_client_cannot_keep_another_from_drawing(server):
    """120 calls of one: most are refused in a sentence, and another is served before those that wait."""
    from gradio_client import Client

    greedy, guest = Client(server[1], verbose=False), Client(server[1], verbose=False)
    rows = [value for _ in range(24) for value in (False, "", 1.0)]
    calls = [
        greedy.submit("tiny", "a creature", "", 1, 4, 40, 2.0, 0, 0, "Model default", *rows, api_name="/generate")
        for _ in range(120)
    ]
    began = time.time()
    made = guest.predict("tiny", "a creature", "", 1, 1, 2, 2.0, 0, 0, "Model default", *rows, api_name="/generate")
    assert made[1]
    assert time.time() - began < 60
    refused = sum("waiting already" in str(call.exception(timeout=120)) for call in calls[10:])
    assert refused >= 100
    for call in calls:
        call.cancel()


@pytest.mark.timeout(900)
def test_the_app_dies_and_nothing_is_lost(tmp_path):
    """kill -9 of the app: the run goes on, and the next app shows it."""
    from gradio_client import Client

    images = tmp_path / "photos"
    images.mkdir()
    for number, (image, _) in enumerate(world.subject_images(2_000_009, 4)):
        image.save(images / f"{number}.png")
    with serving(tmp_path) as (address, process):
        own = Client(address, verbose=False)
        own.predict(str(images), api_name="/use_folder")
        own.predict(
            "method: subject\nsteps: 5000\nthreads: 1\npreview_every: 0\nlog_every: 1", "long", api_name="/start"
        )
        run = queue.Run(tmp_path / "runs" / "long")
        end = time.time() + 240
        while not run.metrics() and time.time() < end:
            time.sleep(0.3)
        process.kill()
        process.wait()
        before = len(run.metrics())
        with serving(tmp_path) as (again, _):
            assert "running" in Client(again, verbose=False).predict("long", api_name="/look")[0]
            assert len(run.metrics()) > before


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 40 MB under the runs' folder."""
    folder = tmp_path / "runs"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk")
    yield folder
    end_all(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Writes until the disk is full; returns the file."""
    ballast = folder / ".ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return ballast


@pytest.mark.timeout(900)
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(page, images, small_disk, tmp_path):
    """Uploads are refused, a run fails or is lost with its last checkpoint whole, and goes on when there is space again."""
    with serving(tmp_path) as (address, _):
        ballast = fill(small_disk)
        page.goto(f"{address}/train")
        page.locator("#files input[type=file]").set_input_files([str(file) for file in images])
        page.locator("#add").click()
        page.get_by_text("No space left on device").first.wait_for()
        ballast.unlink()
        page.reload()
        page.locator("#files input[type=file]").set_input_files([str(file) for file in images])
        page.locator("#add").click()
        page.get_by_text("5 images.").wait_for()
        page.locator("#subject-steps :is(input, textarea)").fill("80")
        page.locator("#subject-all").get_by_text("Advanced").click()
        page.locator("#subject-texts").get_by_text("Command and YAML").click()
        page.locator("#subject-checkpoint_every input").fill("10")
        page.wait_for_function(
            "document.querySelector('#subject-command textarea').value.includes('--checkpoint-every 10 ')"
        )
        page.locator("#run-name textarea, #run-name input").first.fill("squeezed")
        page.locator("#start").click()
        page.get_by_role("link", name="Watch it").click()
        run = queue.Run(small_disk / "squeezed")
        end = time.time() + 240
        while not run.checkpoint_files() and time.time() < end:
            page.wait_for_timeout(100)
        ballast = fill(small_disk)
        wait_for(page, ("failed", "lost"))
        assert run.checkpoint_files()
        ballast.unlink()
        page.locator("#resume").click()
        wait_for(page, ("done",))
        steps = [row["step"] for row in run.metrics() if "loss" in row]
        assert steps == sorted(set(steps))
        assert steps[-1] == 80
        page.close()


def test_strangers_see_nothing(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "seen.png").write_text("seen")
    with serving(tmp_path, "--user", "me", RANKFOLD_PASSWORD="long enough") as (address, _):
        for path in (
            "config",
            "gradio_api/info",
            "gradio_api/queue/data",
            f"gradio_api/file={tmp_path}/runs/seen.png",
        ):
            assert get(address, path) == 401, path

        def log_in(word):
            body = urllib.parse.urlencode({"username": "me", "password": word}).encode()
            try:
                return urllib.request.urlopen(f"{address}/login", data=body, timeout=30).status
            except urllib.error.HTTPError as error:
                return error.code

        assert log_in("long enough") == 200
        assert [log_in(f"wrong {number}") for number in range(12)] == [400] * 10 + [429] * 2
        assert log_in("long enough") == 429
