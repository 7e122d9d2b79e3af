"""How much a training suffers from another process on one of the cores: images per second, quiet and with a load beside it.

    python benchmarks/busy_machine.py [--rounds 3] [--steps 60] [--spin default 1000 0]

Each run is a process of its own with the embedded model, as `rankfold demo` trains it. Quiet and busy runs alternate. `--spin` compares
how long OpenMP's threads spin at a barrier before they sleep (GOMP_SPINCOUNT); `ours` leaves it as it is, `default` is OpenMP's own. How
many threads there are is rankfold's choice in all of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
TRAIN = "import sys; from rankfold.apps.cli import main; main(sys.argv[1:])"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--spin", nargs="+", default=["ours"])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "busy_machine.json")
    asked = parser.parse_args()
    speeds: dict[str, dict[str, list[float]]] = {spin: {"quiet": [], "busy": []} for spin in asked.spin}
    for _ in range(asked.rounds):
        for spin in asked.spin:
            for load in ("quiet", "busy"):
                speeds[spin][load].append(measure_speed(spin, asked.steps, busy=load == "busy"))
                print(spin, load, f"{speeds[spin][load][-1]:.1f} images/s", flush=True)
    result = {spin: summarize(own) for spin, own in speeds.items()}
    asked.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result, indent=1))


def summarize(speeds: dict[str, list[float]]) -> dict[str, object]:
    """Medians, what they lie between, and how many times slower the busy runs are."""
    medians = {load: median(values) for load, values in speeds.items()}
    between = {f"{load}_between": [min(values), max(values)] for load, values in speeds.items()}
    return {**medians, **between, "quiet_over_busy": medians["quiet"] / medians["busy"]}


def measure_speed(spin: str, steps: int, *, busy: bool) -> float:
    """Median images per second of a training, but for its first steps."""
    environment = dict(os.environ)
    if spin == "default":
        environment |= {"GOMP_SPINCOUNT": "300000"}
    elif spin != "ours":
        environment |= {"GOMP_SPINCOUNT": spin}
    load = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            images = HERE.parent / "assets" / "demo" / "creature"
            words = [
                "train",
                "subject",
                "--images",
                str(images),
                "--base",
                "tiny",
                "--steps",
                str(steps),
                "--log-every",
                "10",
            ]
            words += ["--preview-every", "0", "--out", f"{folder}/run"]
            subprocess.run([sys.executable, "-c", TRAIN, *words], check=True, capture_output=True, env=environment)
            lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return median(json.loads(line)["samples_per_second"] for line in lines[1:])
    finally:
        if load:
            load.kill()


if __name__ == "__main__":
    main()
