"""What viewers cost: 20 clients that watch a run as the page does, and how fast it trains with and without them.

    python benchmarks/studio_load.py [--viewers 20] [--seconds 40] [--rounds 3] [--work FOLDER] [--out FILE.json]

Each viewer is a client of its own that asks the app's `look` every two seconds, as the Watch page's timer does. tick: time of an
answer. slower: how many images a second the run makes with viewers over without, in alternation while it goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path

import psutil
from gradio_client import Client
from studio_pictures import started

from rankfold.toolkit.data import world
from rankfold.toolkit.runs import Run

TICK = 2.0
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
    process, address = started(options.work)
    try:
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
