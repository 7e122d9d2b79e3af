"""kill -9 of every kind of job at moments by chance, of what goes on with it too, and what is left held against a job that nobody killed.

`python tests/helpers/kills.py TRIALS [SEED] [JOB...]` prints a line for each trial and the counts at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import forked

from rankfold.toolkit.core.run_folder import Run

STEPS = ["--steps", "8", "--checkpoint-every", "2", "--keep-checkpoints", "2", "--log-every", "1", "--threads", "1"]
IMAGES = ["--images", "IMAGES", "--batch-size", "2", "--preview-steps", "2"]
PLAIN = ["--preview-every", "0", "--preservation-weight", "0"]
MEASURED = ["--evaluate-every", "2", "--evaluate-prompts", "PROMPTS", "--evaluate-clip", "embedded", "--keep", "best"]
TALK = ["--base", "tiny-vlm", "--data", "DATA", "--images", "IMAGES", "--batch-size", "2"]
SMALL_SEARCH = ["--population", "3", "--generations", "2", "--parents", "2", "--mutations", "2", "--crossovers", "1"]

TRAINED: dict[str, list[str]] = {
    "average": ["train", "subject", *IMAGES, *STEPS, *PLAIN, "--ema-decay", "0.9"],
    "measured": ["train", "subject", *IMAGES, *STEPS, *MEASURED, "--patience", "2"],
    "previews": ["train", "subject", *IMAGES, *STEPS, "--preview-every", "3", "--gradient-accumulation", "2"],
    "prior": ["train", "subject", *IMAGES, *STEPS, *PLAIN, "--prior-weight", "1", "--prior-images", "3"],
    "text encoder and words": [
        "train", "subject", *IMAGES, *STEPS, *PLAIN, "--train-text-encoder", "--token", "<sks>", "--num-vectors", "2",
    ],
    "fvae": ["train", "subject", *IMAGES, *STEPS, *PLAIN, "--adapter", "fvae"],
    "loratrf": ["train", "subject", *IMAGES, *STEPS, *PLAIN, "--adapter", "loratrf"],
    "glora": ["train", "subject", *IMAGES, *STEPS, *PLAIN, "--adapter", "glora", "--optimizer", "Prodigy"],
    "exported": ["train", "subject", *IMAGES, *STEPS, *PLAIN, "--export", "diffusers"],
    "instruct": ["train", "instruct", *TALK, *STEPS, "--preview-every", "0"],
    "search": ["search", "subject", *IMAGES, *STEPS, *SMALL_SEARCH, "--preview-every", "0"],
    "weights learned": ["compose", "ONE", "OTHER", *IMAGES, *STEPS, "--preview-every", "0"],
    "weights given": ["compose", "ONE", "OTHER", "--weights", "0.7", "0.3"],
}  # fmt: skip
"""Jobs that `rankfold resume` goes on with; without --out."""

WRITING: dict[str, list[str]] = {
    "export": ["export", "ONE", "--format", "kohya", "--out", "OUT/a.safetensors"],
    "sampling": ["sample", "--run", "ONE", "--n", "6", "--steps", "2", "--out", "OUT"],
}
"""Jobs that are asked for again; what is there by its final name is whole."""


class Kills:
    """The campaign's folder, its references, and its counts."""

    def __init__(self, root: Path, images: Path) -> None:
        self.root, self.counts, self.faults = root, Counter[str](), list[str]()
        self.log = root / "said.txt"
        os.environ["RANKFOLD_CACHE"] = str(root / "cache")
        photos = root / "photos"
        photos.mkdir()
        for path in images.glob("*.png"):
            shutil.copy(path, photos)  # without captions
        self.places = {"IMAGES": str(photos), "PROMPTS": str(root / "prompts.txt"), "DATA": str(root / "data.json")}
        (root / "prompts.txt").write_text("a {token} {noun} in the snow\n", encoding="utf-8")
        names = sorted(path.name for path in images.glob("*.png"))
        rows = [
            {"image": names[number % len(names)], "question": "What?", "answer": f"red {number}"}
            for number in range(12)
        ]
        (root / "data.json").write_text(json.dumps(rows), encoding="utf-8")
        self.references: dict[str, tuple[dict[str, str], float]] = {}
        for name in ("ONE", "OTHER"):
            self.places[name] = str(root / name)
            words = ["train", "subject", *IMAGES, *PLAIN, "--steps", "2", "--threads", "1", "--seed", str(len(name))]
            assert self.end(words_for(self, words, root / name)) == 0, self.log.read_text(encoding="utf-8")

    def fill_in(self, words: list[str], out: Path) -> list[str]:
        """Words with the places that they stand for."""
        places = self.places | {"OUT": str(out)}
        return [places.get(word, word.replace("OUT/", f"{out}/")) for word in words]

    def start(self, words: list[str]) -> Any:
        return forked.start_process(forked.commands(words), self.log)

    def end(self, words: list[str]) -> int:
        process = self.start(words)
        process.join()
        return process.exitcode

    def reference(self, name: str, words: list[str]) -> tuple[dict[str, str], float]:
        """The files of a job that nobody kills, and how many seconds it takes."""
        if name not in self.references:
            out, began = self.root / f"{name} whole", time.time()
            assert self.end(words_for(self, words, out)) == 0, self.log.read_text(encoding="utf-8")
            self.references[name] = files_of(out), time.time() - began
        return self.references[name]

    def try_one(self, name: str, random: Random) -> None:
        """Kills a job, and what goes on with it once or twice more; then lets it end."""
        words = TRAINED.get(name) or WRITING[name]
        expected, seconds = self.reference(name, words)
        out = self.root / "killed"
        shutil.rmtree(out, ignore_errors=True)
        first, again = words_for(self, words, out), ["resume", str(out)]
        kills, command = 0, first
        for _ in range(random.choice((1, 2, 2, 3))):
            process = self.start(command)
            wait_for_moment(process, Run(out), random, seconds)
            if not process.is_alive():
                process.join()
                if process.exitcode != 0:
                    self.fault(name, f"ended with {process.exitcode}: {self.log.read_text(encoding='utf-8')[-600:]}")
                    return
                break
            process.kill()
            process.join()
            kills += 1
            for half in half_files(out):
                self.fault(name, f"half a file: {half}")
            command = again if name in TRAINED and (out / "config.yaml").is_file() else first
        self.counts["kills"] += kills
        self.counts["trials"] += 1
        done = name in TRAINED and Run(out).state() == "done"
        if not done and (code := self.end(command)) != 0:
            self.fault(name, f"could not go on ({code}): {self.log.read_text(encoding='utf-8')[-600:]}")
        elif different := [file for file, value in files_of(out).items() if expected.get(file) != value]:
            self.counts["unequal"] += 1
            self.fault(name, f"unequal after {kills} kills: {different}")
        elif missing := expected.keys() - files_of(out).keys():
            self.fault(name, f"missing: {missing}")
        steps = [row["step"] for row in Run(out).metrics() if "loss" in row]
        if steps != sorted(set(steps)):
            self.fault(name, f"steps stand twice: {steps}")

    def fault(self, name: str, text: str) -> None:
        self.faults.append(f"{name}: {text}")


def words_for(kills: Kills, words: list[str], out: Path) -> list[str]:
    """A job's words with its places and its folder."""
    return kills.fill_in([*words, *([] if "OUT" in " ".join(words) else ["--out", str(out)])], out)


def wait_for_moment(process: Any, run: Run, random: Random, seconds: float) -> None:
    """Until a moment by chance: anywhere, or just behind a checkpoint, before what is measured then."""
    if random.random() < 0.5:
        process.join(random.random() * seconds)
        return
    before, end = run.newest_step(), time.time() + seconds
    while process.is_alive() and run.newest_step() == before and time.time() < end:
        time.sleep(0.002)
    process.join(random.choice((0.0, 0.01, 0.1, 0.5)))


def files_of(out: Path) -> dict[str, str]:
    """Hashes of the adapters, measured values and images that a job has left."""
    kinds = ("adapter/**/*.safetensors", "export/*.safetensors", "*.safetensors", "*.png", "structure.txt")
    found = [path for kind in kinds for path in out.glob(kind) if path.name != "pareto.png"]
    hashes = {str(path.relative_to(out)): hashlib.sha256(content(path, out)).hexdigest() for path in found}
    file = out / "measured.jsonl"
    if file.is_file():
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        kept = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
        hashes["measured.jsonl"] = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    return hashes


def content(path: Path, out: Path) -> bytes:
    """A file's bytes; of one for other tools those of its tensors, since its header has the date."""
    data = path.read_bytes()
    exported = path.suffix == ".safetensors" and path.parent in (out, out / "export")
    return data[8 + int.from_bytes(data[:8], "little") :] if exported else data


def half_files(out: Path) -> list[str]:
    """Files by a final name that do not read as what they are."""
    from PIL import Image
    from safetensors import SafetensorError, safe_open

    from rankfold.toolkit.core.errors import UserError
    from rankfold.training.engine.checkpoint import read_checkpoint

    def image(path: Path) -> None:
        with Image.open(path) as opened:
            opened.load()

    def tensors(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                file.get_tensor(key)

    readers: dict[str, Callable[[Path], Any]] = {
        ".pt": read_checkpoint, ".safetensors": tensors, ".png": image, ".json": lambda path: json.loads(path.read_bytes()),
    }  # fmt: skip
    half = []
    for path in out.rglob("*"):
        if (
            path.suffix not in readers
            or not path.is_file()
            or any(part.startswith(".") for part in path.relative_to(out).parts)
        ):
            continue
        try:
            readers[path.suffix](path)
        except (UserError, OSError, ValueError, SafetensorError) as error:
            half.append(f"{path.relative_to(out)} ({error})")
    return half


def campaign(trials: int, seed: int, images: Path, names: list[str] | None = None) -> Kills:
    """So many trials, in turn for each job."""
    names = names or [*TRAINED, *WRITING]
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        kills, random = Kills(root, images), Random(seed)
        for number in range(trials):
            name = names[number % len(names)]
            kills.try_one(name, random)
            told = kills.faults[-1] if kills.faults else "all equal"
            print(
                f"{number + 1} of {trials}, {name}: {dict(kills.counts)}, {len(kills.faults)} faults ({told})",
                flush=True,
            )
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return kills


if __name__ == "__main__":
    from rankfold.toolkit.core.paths import assets_folder

    numbers = [int(word) for word in sys.argv[1:] if word.isdecimal()]
    which = [word for word in sys.argv[1:] if not word.isdecimal()]
    outcome = campaign(numbers[0], [*numbers, 0][1], assets_folder() / "demo" / "creature", which)
    print(*outcome.faults, sep="\n")
    print(
        f"{outcome.counts['trials']} trials, {outcome.counts['kills']} kills, {outcome.counts['unequal']} unequal,",
        end=" ",
    )
    print(f"{len(outcome.faults)} faults")
