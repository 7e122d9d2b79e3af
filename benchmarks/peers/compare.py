"""A subject learned by rankfold and by its peers: from the command to the file, alternating, on a quiet machine and a busy one.

    python benchmarks/peers/compare.py --script train_dreambooth_lora.py [--rounds 5] [--steps 300] [--out benchmarks/results/peers.json]

Sides: `rankfold train subject --export diffusers`; diffusers' own DreamBooth LoRA script (--script, from diffusers'
examples/dreambooth; without it that side is left out); PEFT's LoRA and LyCORIS's in a plain loop (beside this file). All train rank 8 of
the attention layers of denoiser and text encoder of the embedded Stable Diffusion base, five photos, batch 4, the same rate, prompt and
seed; another creature and another seed in each round. Measured from outside, so that each side is asked the same way:

- seconds to the file (ours proves it), processor seconds (of all threads) and peak memory (resident, of all its processes) of the command,
- images/s: from two runs of different length, so that what comes before and after the steps falls out,
- the distance to ten photos that no side has seen that is closed, and prompt fidelity, by `rankfold evaluate` on the file that came out.

Printed: medians (least to most) of each side, and of each peer against ours round by round: ratios of costs, differences of quality.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from measure import installed_bytes, run_commands  # noqa: E402
from sides import NOUN, RANKFOLD, TOKEN, Job, loop, ours, script  # noqa: E402
from timing import median_and_range  # noqa: E402

from rankfold.toolkit.embedded import world  # noqa: E402

SHORT = 20
"""Steps of the run that start-up is told by."""
QUALITIES = ("closed", "prompt fidelity")
NEEDS = {
    "ours": ("rankfold",),
    "script": ("diffusers", "peft", "accelerate", "transformers", "torch", "torchvision"),
    "peft": ("diffusers", "peft", "transformers", "torch", "torchvision"),
    "lycoris": ("lycoris-lora", "diffusers", "transformers", "torchvision"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(HERE.parents[1] / "assets" / "tiny" / "sd"))
    parser.add_argument("--script", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy-rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    sides = {"ours": ours, "peft": partial(loop, name="peft_loop.py"), "lycoris": partial(loop, name="lycoris_loop.py")}
    if options.script:
        sides["script"] = partial(script, file=options.script.resolve())
    rows: dict[str, list[dict]] = {"quiet": [], "busy": []}
    for load, rounds in (("quiet", options.rounds), ("busy", options.busy_rounds)):
        for number in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                rows[load].append(one_round(Path(folder), number, sides, options, busy=load == "busy"))
            print(load, number, json.dumps(rows[load][-1]), flush=True)
            if options.out:
                write_found(options, rows)
    for load, found in summarize(rows).items():
        for key, value in found.items():
            print(f"{load:6} {key:40} {value['median']:.3f} ({value['least']:.3f} to {value['most']:.3f})")


def write_found(options: argparse.Namespace, rows: dict[str, list[dict]]) -> None:
    """The file so far."""
    settings = {"steps": options.steps, "rate": options.rate, "cores": os.cpu_count()}
    found = settings | {"installed": {name: installed_bytes(*needs) for name, needs in NEEDS.items()}}
    options.out.write_text(
        json.dumps(found | {"summary": summarize(rows), "rounds": rows}, indent=1) + "\n", encoding="utf-8"
    )


def one_round(
    folder: Path, number: int, sides: dict, options: argparse.Namespace, *, busy: bool
) -> dict[str, dict[str, float]]:
    """Figures of each side; the order turns from round to round."""
    photos = [image for image, _ in world.subject_images(6_000_000 + number, 15)]
    for name, images in (("photos", photos[:5]), ("held out", photos[5:])):
        (folder / name).mkdir()
        for at, image in enumerate(images):
            image.save(folder / name / f"{at}.png")
    job = Job(options.base, folder / "photos", options.steps, 4, 8, options.rate, number, photos[0].width)
    names = list(sides)
    turned = names[number % len(names) :] + names[: number % len(names)]
    with spinning(busy):
        long = {name: timed(sides[name], job, folder / name) for name in turned}
        brief = Job(**{**vars(job), "steps": SHORT})
        short = {name: timed(sides[name], brief, folder / f"{name} short") for name in turned[::-1]}
    for name, row in long.items():
        row["images/s"] = (job.steps - SHORT) * job.batch / (row["seconds"] - short[name]["seconds"])
        row |= {} if busy else judge(folder, name)
    return long


def timed(side, job: Job, out: Path) -> dict[str, float]:
    """Carries out a side's commands."""
    out.mkdir()
    return run_commands(side(job, out), out / "log.txt")


@contextmanager
def spinning(busy: bool):
    """Something else that keeps one core at work."""
    load = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if load:
            load.kill()


def judge(folder: Path, name: str) -> dict[str, float]:
    """Likeness and prompt fidelity of the file that a side has made."""
    file = next(path for path in (folder / name).rglob("*.safetensors") if path.name != "adapter_model.safetensors")
    words = [
        *RANKFOLD, "evaluate", str(file), "--base", "tiny", "--images", str(folder / "held out"), "--token", TOKEN,
        "--class-noun", NOUN, "--n", "2", "--out", str(folder / f"{name} judged"),
    ]  # fmt: skip
    run_commands([words], folder / "judging.txt")
    return read_figures(folder / f"{name} judged" / "metrics.json")


def read_figures(file: Path) -> dict[str, float]:
    """The distance to the photos that is closed (0 the base, 1 the photos themselves), and prompt fidelity."""
    found = json.loads(file.read_text(encoding="utf-8"))
    (likeness,) = (value for name, value in found.items() if name.startswith("likeness"))
    return {"closed": likeness["closed"], "prompt fidelity": found["prompt fidelity"]["tuned"]["mean"]}


def summarize(rows: dict[str, list[dict]]) -> dict[str, dict[str, dict[str, float]]]:
    """Medians and ranges of the sides, and of the peers' costs over ours, and qualities less ours, within a round."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for load, rounds in rows.items():
        found[load] = {}
        for name in rounds[0] if rounds else ():
            for key in rounds[0][name]:
                found[load][f"{name}: {key}"] = median_and_range([row[name][key] for row in rounds])
                pairs = [(row[name][key], row["ours"][key]) for row in rounds]
                if name != "ours" and key in QUALITIES:
                    found[load][f"{name} - ours: {key}"] = median_and_range([theirs - mine for theirs, mine in pairs])
                elif name != "ours":
                    found[load][f"{name} / ours: {key}"] = median_and_range([theirs / mine for theirs, mine in pairs])
    return found


if __name__ == "__main__":
    main()
