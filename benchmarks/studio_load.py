"""What the studio costs: how long it takes to start and to paint, and what 20 viewers of a run take from it.

    python benchmarks/studio_load.py [--viewers 20] [--seconds 40] [--rounds 3] [--work FOLDER] [--out FILE.json]

beyond_imports      seconds from the app's start to its first answer, less those that Python needs for the app's imports alone, the
                    two in alternation
first_paint         seconds to a page's first contentful paint in a fresh browser (the system's Chromium), of every page
tick_median         seconds of an answer of `look`, which each viewer, a client of its own, asks for every two seconds, as the
                    Watch page's timer does
speed_with_viewers  steps a second of the run with viewers over without, in alternation while it goes on
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
from gradio_client import Client
from playwright.sync_api import sync_playwright
from studio_pictures import PAGES, PATIENCE, started
from timing import spread

from rankfold.toolkit.data import world
from rankfold.toolkit.runs import Run

TICK = 2.0
MODULES = (
    "studio", "train_page", "watch_page", "generate_page", "compare_page", "compose_page", "chat_page", "library_page",
)  # fmt: skip
SETTINGS = "method: subject\nsteps: 1000000\nlog_every: 5\npreview_every: 0\ncheckpoint_every: 100000\nthreads: 1"


def watch(address: str, until: threading.Event, ticks: list[float]) -> None:
    """One viewer."""
    client = Client(address, verbose=False)
    while not until.is_set():
        begin = time.perf_counter()
        client.predict("load", api_name="/look")
        ticks.append(time.perf_counter() - begin)
        until.wait(max(0.0, TICK - (time.perf_counter() - begin)))


def speed(run: Run, seconds: float) -> float:
    """Steps a second over a while."""
    first = run.metrics()[-1]["step"]
    begin = time.perf_counter()
    time.sleep(seconds)
    return (run.metrics()[-1]["step"] - first) / (time.perf_counter() - begin)


def start_times(work: Path, rounds: int) -> list[float]:
    """Seconds until the app answers, less those of its imports."""
    code = f"import {', '.join(f'rankfold.apps.studio.{name}' for name in MODULES)}, rankfold.apps.app"
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        imports = time.perf_counter() - begin
        begin = time.perf_counter()
        process, _ = started(work)
        found.append(time.perf_counter() - begin - imports)
        process.kill()
        process.wait()
    return found


def first_paints(address: str) -> dict[str, float]:
    """Seconds to the first contentful paint of every page."""
    found = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name in PAGES:
            page = browser.new_context().new_page()
            page.goto(f"{address}/{name if name != 'train' else ''}", timeout=PATIENCE)
            page.locator("h1").wait_for(timeout=PATIENCE)
            found[name] = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000
            page.context.close()
        browser.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--viewers", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/studio_load"))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    images = options.work / "photos"
    images.mkdir(parents=True, exist_ok=True)
    for number, (picture, _) in enumerate(world.subject_pictures(2_000_011, 5)):
        picture.save(images / f"{number}.png")
    beyond = start_times(options.work, options.rounds)
    process, address = started(options.work)
    try:
        paints = first_paints(address)
        starter = Client(address, verbose=False)
        starter.predict(str(images.resolve()), api_name="/use_folder")
        starter.predict(SETTINGS, "load", api_name="/start")
        run = Run(options.work / "runs" / "load")
        while len(run.metrics()) < 3:
            time.sleep(0.5)
        ratios, ticks = [], []
        for _ in range(options.rounds):
            alone = speed(run, options.seconds)
            until, own = threading.Event(), []
            viewers = [threading.Thread(target=watch, args=(address, until, own)) for _ in range(options.viewers)]
            for viewer in viewers:
                viewer.start()
            time.sleep(10)
            own.clear()
            ratios.append(speed(run, options.seconds) / alone)
            until.set()
            for viewer in viewers:
                viewer.join()
            ticks += own
        found = {
            "beyond_imports": spread(beyond),
            "first_paint": paints,
            "viewers": options.viewers,
            "ticks": len(ticks),
            "tick_median": statistics.median(ticks),
            "tick_95": statistics.quantiles(ticks, n=20)[-1],
            "speed_with_viewers": ratios,
            "speed_median": statistics.median(ratios),
        }
        print(json.dumps(found, indent=1))
        if options.out:
            options.out.write_text(json.dumps(found, indent=1))
    finally:
        process.kill()
        for other in psutil.process_iter(["cmdline"]):
            if str(options.work / "runs") in " ".join(other.info["cmdline"] or []) or "runs/load" in " ".join(
                other.info["cmdline"] or []
            ):
                other.kill()


if __name__ == "__main__":
    main()
