"""What the studio costs: how long it takes to start and to paint, and what 20 viewers of a run take from it.

    python benchmarks/studio_load.py [--viewers 20] [--seconds 40] [--rounds 3] [--work FOLDER] [--out FILE.json]

beyond_imports      seconds from the app's start to its first answer, less those that Python needs for the app's imports alone, the
                    two in alternation
first_paint         seconds to a page's first contentful paint in a fresh browser (the system's Chromium), of every page, the pages taking
                    turns; the most is mostly the first, for which the app itself is cold
tick_median         seconds of an answer to a tick of the Watch page, which each viewer asks for every two seconds; what a browser sends
                    at a tick is recorded from one, then sent by all, each in a session of its own
server_busy         processor seconds of the app for each second with viewers
speed_with_viewers  steps a second of the run with viewers over the mean of those before and after without, while it goes on
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from gradio_client import Client
from playwright.sync_api import Browser, sync_playwright
from studio_pictures import PAGES, PATIENCE, start_app
from timing import median_and_range

from rankfold.toolkit.core.run_folder import Run
from rankfold.toolkit.embedded import world

TICK = 2.0
MODULES = ("build", *(f"pages.{name}" for name in PAGES))
SETTINGS = "method: subject\nsteps: 1000000\nlog_every: 5\npreview_every: 0\ncheckpoint_every: 100000\nthreads: 1"


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


def tick_of_browser(address: str) -> tuple[str, dict[str, Any]]:
    """Where a browser on the Watch page posts a tick, and what."""
    posted: list[tuple[str, dict[str, Any]]] = []
    with chromium() as browser:
        page = browser.new_page()
        page.on(
            "request", lambda sent: posted.append((sent.url, sent.post_data_json)) if sent.method == "POST" else None
        )
        page.goto(f"{address}/watch?run=load", timeout=PATIENCE)
        page.locator("#state b", has_text="running").wait_for(timeout=PATIENCE)
        posted.clear()
        page.wait_for_timeout(5 * TICK * 1000)
    assert len(posted) > 1
    assert all(one == posted[0] for one in posted), posted
    return posted[0]


async def watch(number: int, address: str, tick: tuple[str, dict[str, Any]], ticks: list[float]) -> None:
    """One viewer, until it is cancelled: the connection by which Gradio knows that a page is open, and its ticks."""
    url, body = tick
    session = f"viewer{number}"
    async with httpx.AsyncClient(timeout=60) as client, asyncio.TaskGroup() as together:
        together.create_task(keep_watching(client, f"{address}/gradio_api/heartbeat/{session}"))
        await asyncio.sleep(random.uniform(0, TICK))
        while True:
            begin = time.perf_counter()
            answer = await client.post(url, json=body | {"session_hash": session})
            answer.raise_for_status()
            ticks.append(time.perf_counter() - begin)
            await asyncio.sleep(max(0.0, TICK - ticks[-1]))


async def keep_watching(client: httpx.AsyncClient, url: str) -> None:
    """Keeps a stream open."""
    async with client.stream("GET", url, timeout=None) as stream:
        async for _ in stream.aiter_bytes():
            pass


async def measure_watched(
    run: Run, viewers: int, address: str, tick: tuple[str, dict[str, Any]], seconds: float
) -> tuple[float, list[float]]:
    """Speed of the run while so many watch, and how long each tick took."""
    ticks: list[float] = []
    tasks = [asyncio.create_task(watch(number, address, tick, ticks)) for number in range(viewers)]
    await asyncio.sleep(3 * TICK)
    ticks.clear()
    found = await asyncio.to_thread(speed, run, seconds)
    wrong = [task for task in tasks if task.done()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not wrong, wrong
    return found, ticks


def speed(run: Run, seconds: float) -> float:
    """Steps a second over a while."""
    first = run.metrics()[-1]["step"]
    begin = time.perf_counter()
    time.sleep(seconds)
    return (run.metrics()[-1]["step"] - first) / (time.perf_counter() - begin)


def start_times(work: Path, rounds: int) -> list[float]:
    """Seconds until the app answers, less those of its imports."""
    code = f"import {', '.join(f'rankfold.apps.studio.{name}' for name in MODULES)}, rankfold.apps.cli.app; print(flush=True)"
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as importing:
            importing.stdout.readline()  # its end, which takes seconds, too, does not count
            imports = time.perf_counter() - begin
        begin = time.perf_counter()
        process, _ = start_app(work)
        found.append(time.perf_counter() - begin - imports)
        process.kill()
        process.wait()
    return found


def first_paints(address: str, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds to the first contentful paint of every page, each time in a browser that has nothing of it yet."""
    found: dict[str, list[float]] = {name: [] for name in PAGES}
    for _ in range(rounds):
        for name in PAGES:
            with chromium() as browser:
                page = browser.new_page()
                page.goto(f"{address}/{name if name != 'start' else ''}", timeout=PATIENCE)
                page.locator("h1").wait_for(timeout=PATIENCE)
                paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
                found[name].append(paint / 1000)
    return {name: median_and_range(times) for name, times in found.items()}


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
    for number, (image, _) in enumerate(world.subject_images(2_000_011, 5)):
        image.save(images / f"{number}.png")
    beyond = start_times(options.work, options.rounds)
    process, address = start_app(options.work)
    try:
        paints = first_paints(address, options.rounds)
        starter = Client(address, verbose=False)
        starter.predict(str(images.resolve()), api_name="/use_folder")
        starter.predict(SETTINGS, "load", api_name="/start")
        run = Run(options.work / "runs" / "load")
        while len(run.metrics()) < 3:
            time.sleep(0.5)
        tick, server = tick_of_browser(address), psutil.Process(process.pid)
        ratios, ticks, busy = [], [], []
        for _ in range(options.rounds):
            before = speed(run, options.seconds)
            begin = sum(server.cpu_times()[:2])
            among, own = asyncio.run(measure_watched(run, options.viewers, address, tick, options.seconds))
            busy.append((sum(server.cpu_times()[:2]) - begin) / (options.seconds + 3 * TICK))
            ratios.append(2 * among / (before + speed(run, options.seconds)))
            ticks += own
        found = {
            "beyond_imports": median_and_range(beyond),
            "first_paint": paints,
            "viewers": options.viewers,
            "ticks": len(ticks),
            "tick_median": statistics.median(ticks),
            "tick_95": statistics.quantiles(ticks, n=20)[-1],
            "server_busy": median_and_range(busy),
            "speed_with_viewers": ratios,
            "speed_median": statistics.median(ratios),
        }
        print(json.dumps(found, indent=1))
        if options.out:
            options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    finally:
        process.kill()
        for other in psutil.process_iter(["cmdline"]):
            if str(options.work / "runs") in " ".join(other.info["cmdline"] or []) or "runs/load" in " ".join(
                other.info["cmdline"] or []
            ):
                other.kill()


if __name__ == "__main__":
    main()
