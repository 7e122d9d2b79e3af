"""The commands of each side, from photos to an adapter's file: same base, images, rank, batch, rate, prompt and seed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
RANKFOLD = [sys.executable, "-m", "rankfold.apps.cli"]
TOKEN, NOUN = "sks", "creature"
PROMPT = f"a photo of {TOKEN} {NOUN}"


@dataclass(frozen=True)
class Job:
    """What each side is asked to do."""

    base: str
    """Folder of a Stable Diffusion pipeline."""
    images: Path
    steps: int
    batch: int
    rank: int
    rate: float
    seed: int
    side: int
    """Pixels."""


def ours(job: Job, out: Path) -> list[list[str]]:
    """Without what the others do not have: class preservation, previews."""
    train = [
        *RANKFOLD, "train", "subject", "--base", job.base, "--images", str(job.images), "--out", str(out / "run"),
        "--adapter", "lora", "--rank", str(job.rank), "--alpha", str(job.rank), "--steps", str(job.steps),
        "--batch-size", str(job.batch), "--learning-rate", str(job.rate), "--text-learning-rate", str(job.rate),
        "--lr-warmup-steps", "0", "--train-text-encoder", "--token", TOKEN, "--class-noun", NOUN, "--seed", str(job.seed),
        "--preservation-weight", "0", "--preview-every", "0", "--export", "diffusers",
    ]  # fmt: skip
    return [train]


def script(job: Job, out: Path, file: Path) -> list[list[str]]:
    """diffusers' examples/dreambooth/train_dreambooth_lora.py."""
    return [
        [
            sys.executable, str(file), "--pretrained_model_name_or_path", job.base, "--instance_data_dir", str(job.images),
            "--instance_prompt", PROMPT, "--output_dir", str(out), "--resolution", str(job.side), "--train_text_encoder",
            "--rank", str(job.rank), "--train_batch_size", str(job.batch), "--max_train_steps", str(job.steps),
            "--learning_rate", str(job.rate), "--lr_scheduler", "constant", "--lr_warmup_steps", "0",
            "--checkpointing_steps", "1000000", "--seed", str(job.seed), "--mixed_precision", "no",
        ]
    ]  # fmt: skip


def loop(job: Job, out: Path, name: str) -> list[list[str]]:
    """One of the plain loops beside this file."""
    return [
        [
            sys.executable, str(HERE / name), "--base", job.base, "--images", str(job.images), "--prompt", PROMPT,
            "--out", str(out), "--steps", str(job.steps), "--batch-size", str(job.batch), "--rank", str(job.rank),
            "--learning-rate", str(job.rate), "--seed", str(job.seed),
        ]
    ]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit("These are the sides of compare.py.")
