"""Few-shot transfer: a new subject from 1 to 16 images, with a library of adapters trained on other subjects.

    python benchmarks/few_shot.py [--seeds 3] [--shots 1 2 4 8 16] [--work FOLDER] [--out FILE.json] [--plot FILE.png]

Eight adapters are trained on eight creatures. Then a creature that nobody has seen, another one for each seed, is to be learned:
by the uniform mean of the eight (no training), by learned weights (a softmax in each layer), by LoRA from scratch, and by training
the whole denoiser and text encoder. All trained ways take as many steps of as many images.

loss: denoising loss on 16 held-out images at noise and timesteps drawn once, as a share of the base model's own.
closed: share of the distance to drawn images closed (CLIP-I, embedded open_clip), 16 generated images.
Intervals: bootstrap over the images of all seeds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from rankfold import ComposeConfig, SubjectConfig, train
from rankfold.pipelines.generate import denoise
from rankfold.toolkit.core.run_folder import Run
from rankfold.toolkit.data.subjects import Sample, find_samples
from rankfold.toolkit.diffusion.load import resolve_base
from rankfold.toolkit.diffusion.model import DiffusionModel
from rankfold.toolkit.embedded import world
from rankfold.toolkit.metrics.clip import ClipScorer, clip_i
from rankfold.toolkit.metrics.statistics import bootstrap_interval
from rankfold.training.compose.task import ComposeTask
from rankfold.training.config.defaults import resolve_defaults
from rankfold.training.embedded.demo import DEMO_TRAINING
from rankfold.training.engine.loop import Loop
from rankfold.training.engine.processes import make_accelerator
from rankfold.training.engine.task import TrainingTask
from rankfold.training.subject.task import SubjectTask
from rankfold.training.subject.training import ImageTraining, prepare_image_training

LIBRARY = 8
FIRST, NEW = 2_000_300, 2_000_400  # creatures of the library, and those to be learned
STEPS, LIBRARY_STEPS = 200, 400
# Every way learns from the images alone: nothing of the class is held.
QUIET = {"preview_every": 0, "checkpoint_every": 10_000, "log_every": 50, "preservation_weight": 0.0}


class WholeModel:
    """The trainable that is every weight of the denoiser and the text encoder."""

    may_change_text = True

    def __init__(self, config: SubjectConfig) -> None:
        self.config = config
        self.token_embeddings: dict[str, torch.Tensor] = {}
        self.parts: dict[str, nn.Module] = {}

    def attach(self, model: DiffusionModel) -> dict[str, nn.Module]:
        self.parts = {"unet": model.unet, "text_encoder": model.text_encoder}
        for part in self.parts.values():
            part.requires_grad_(True)
        return self.parts

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(p.parameters()), "lr": self.config.learning_rate} for p in self.parts.values()]

    def is_dead(self) -> bool:
        return False

    def save(self, folder: Path) -> None:
        """Nothing: it is measured in memory."""


class WholeModelTask(TrainingTask[ImageTraining, WholeModel]):
    """Trains the whole model."""

    def __init__(
        self,
        config: SubjectConfig,
        samples: list[Sample],
        base: str,
        accelerator: Accelerator,
        held_out: Sequence[Sample] = (),
    ) -> None:
        whole = WholeModel(config)
        super().__init__(prepare_image_training(config, samples, base, accelerator, whole, held_out=held_out), whole)


def library(work: Path, threads: int) -> tuple[str, ...]:
    """The eight adapters, trained once."""
    folders = []
    for number in range(LIBRARY):
        run = work / f"library{number}"
        if not (run / "adapter" / "rankfold.json").is_file():
            images = draw_folder(FIRST + number, 5, work / f"images{number}", seed=0)
            settings = DEMO_TRAINING | QUIET
            config = SubjectConfig(
                images=images, out=run, steps=LIBRARY_STEPS, threads=threads, seed=number, **settings
            )
            train(config, overwrite=run.is_dir())
        folders.append(str(run / "adapter"))
    return tuple(folders)


def draw_folder(creature: int, n: int, folder: Path, *, seed: int) -> Path:
    """Folder with n drawn images of a creature."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, _) in enumerate(world.subject_images(creature, n, seed=seed)):
        image.save(folder / f"{number:02d}.png")
    return folder


def make_methods(adapters: tuple[str, ...]) -> dict[str, tuple[type, type, dict]]:
    """Name -> Task, config class and settings."""
    shared = {k: v for k, v in DEMO_TRAINING.items() if k in ("batch_size", "min_snr_gamma", "guidance_scale")} | QUIET
    return {
        "uniform": (ComposeTask, ComposeConfig, shared | {"adapters": adapters, "steps": 1, "learning_rate": 1e-12}),
        "learned": (ComposeTask, ComposeConfig, shared | {"adapters": adapters, "steps": STEPS, "learning_rate": 0.05}),
        "LoRA from scratch": (SubjectTask, SubjectConfig, DEMO_TRAINING | QUIET | {"adapter": "lora", "steps": STEPS}),
        "whole model": (WholeModelTask, SubjectConfig, DEMO_TRAINING | QUIET | {"learning_rate": 1e-4, "steps": STEPS}),
    }


class Measure:
    """What is asked of every way, for one new subject."""

    def __init__(self, creature: int, work: Path, scorer: ClipScorer) -> None:
        self.scorer = scorer
        self.held_out = find_samples(
            draw_folder(creature, 16, work / f"held{creature}", seed=1), flip=False, skip_bad=False
        )
        drawn = [image for image, _ in world.subject_images(creature, 24, seed=2)]
        self.references = scorer.embed_images(drawn)
        among = self.references @ self.references.T
        self.real = float(((among.sum(1) - 1) / (len(drawn) - 1)).mean())

    def __call__(self, training: ImageTraining) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of each held-out row, and likeness (CLIP-I) of each of 16 images."""
        losses = training.losses_on(training.held_out_batch(4, seed=0))
        training.module.eval()
        prompts = [f"a sks creature {where}" for where in world.SCENES.values()] * 2
        images = denoise(
            training.model.pipeline(),
            prompts,
            negative=[""] * 16,
            seeds=list(range(500, 516)),
            steps=25,
            guidance_scale=2.0,
            width=64,
        )
        return losses, clip_i(self.scorer.embed_images(images), self.references)


def run_way(kind: type, config: object, measure: Measure) -> tuple[torch.Tensor, torch.Tensor]:
    """Trains in a folder that is thrown away, and measures."""
    config = resolve_defaults(config)
    accelerator = make_accelerator(config)
    samples = find_samples(config.images, flip=False, skip_bad=False)
    task = kind(config, samples, resolve_base(config.base), accelerator, measure.held_out)
    run = Run(config.out)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.claim()
    Loop(config, task, run, accelerator).train()
    return measure(task.training)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/few_shot"))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    adapters, scorer = library(options.work, options.threads), ClipScorer()
    found: dict[tuple[str, int], list[dict[str, torch.Tensor]]] = {}
    for seed in range(options.seeds):
        creature = NEW + seed
        measure = Measure(creature, options.work, scorer)
        base = None
        for shots in options.shots:
            images = draw_folder(creature, shots, options.work / f"shots{seed}_{shots}", seed=0)
            for name, (kind, config_class, settings) in make_methods(adapters).items():
                if name == "uniform" and shots != options.shots[0]:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    common = {"images": images, "out": Path(folder) / "run", "threads": options.threads, "seed": seed}
                    if base is None:
                        untrained = DEMO_TRAINING | QUIET | common | {"steps": 1, "learning_rate": 1e-12}
                        base = run_way(SubjectTask, SubjectConfig(**untrained), measure)
                    losses, likeness = run_way(kind, config_class(**(settings | common)), measure)
                share = losses / base[0].mean()
                closed = (likeness - base[1].mean()) / (measure.real - base[1].mean())
                found.setdefault((name, shots), []).append({"loss": share, "closed": closed})
                print(
                    f"seed {seed}  shots {shots:2}  {name:18} loss {share.mean():.3f}  closed {closed.mean():.2f}",
                    flush=True,
                )
    report(found, options.out, options.plot)


def report(found: dict[tuple[str, int], list[dict[str, torch.Tensor]]], out: Path | None, plot: Path | None) -> None:
    """Prints the table, and writes it and the plot."""
    rows = []
    for (name, shots), seeds in found.items():
        row = {"way": name, "shots": shots, "seeds": len(seeds)}
        for key in ("loss", "closed"):
            values = torch.cat([own[key] for own in seeds])
            row |= {key: float(values.mean()), f"{key}_interval": bootstrap_interval(values)}
            row[f"{key}_by_seed"] = [float(own[key].mean()) for own in seeds]
        rows.append(row)
        print(
            f"{name:18} shots {shots:2}  loss {row['loss']:.3f} ({row['loss_interval'][0]:.3f} to {row['loss_interval'][1]:.3f})  "
            f"closed {row['closed']:.2f} ({row['closed_interval'][0]:.2f} to {row['closed_interval'][1]:.2f})"
        )
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if plot:
        draw(rows, plot)


def draw(rows: list[dict], path: Path) -> None:
    """Both figures against the number of images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    names = list(dict.fromkeys(row["way"] for row in rows))
    for axes, key, label in zip(
        figure.subplots(1, 2), ("closed", "loss"), ("distance closed", "loss over the base model's"), strict=True
    ):
        for name in names:
            own = [row for row in rows if row["way"] == name]
            shots = (
                [row["shots"] for row in own]
                if len(own) > 1
                else [min(r["shots"] for r in rows), max(r["shots"] for r in rows)]
            )
            own = own if len(own) > 1 else own * 2
            axes.plot(shots, [row[key] for row in own], marker="o", label=name)
            axes.fill_between(shots, *zip(*(row[f"{key}_interval"] for row in own), strict=True), alpha=0.15)
        axes.set(xscale="log", xlabel="pictures", ylabel=label, xticks=shots, xticklabels=shots)
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
