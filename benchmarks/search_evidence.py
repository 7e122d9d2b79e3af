"""Does the structure search pay? The structure found, and others of its size, each trained from the start.

    python benchmarks/search_evidence.py [--seeds 3] [--work FOLDER] [--out FILE.json]

For each seed a creature that nobody has seen: five images to train on, of which the search holds one out; 16 others, never seen by
the search, are the test. The search runs with the paper's defaults on GLoRA in matmul form of rank 4; its limit is plain LoRA's size at
that rank. Then, all trained from the start with the same images, steps and seed:

    found       the best structure
    random      structures drawn at random below the same limit (three)
    all-LoRA    GLoRA with every choice the largest (more parameters than the limit)
    lora        plain LoRA with as many parameters as the found one has

Figure: denoising loss on the test images over the base model's. Intervals: bootstrap over test rows of all seeds.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from few_shot import QUIET, draw_folder

from rankfold import SubjectConfig, train
from rankfold.toolkit.core.run_folder import Run
from rankfold.toolkit.data.subjects import find_samples
from rankfold.toolkit.diffusion.load import resolve_base
from rankfold.toolkit.metrics.statistics import bootstrap_interval
from rankfold.training.config.defaults import resolve_defaults
from rankfold.training.config.search import SearchConfig
from rankfold.training.config.yaml_file import from_yaml
from rankfold.training.embedded.demo import DEMO_TRAINING
from rankfold.training.engine.loop import Loop
from rankfold.training.engine.processes import make_accelerator
from rankfold.training.search.evolution import draw_structure
from rankfold.training.search.subject import SearchTask
from rankfold.training.subject.task import SubjectTask

NEW = 2_000_500
RANK = 4


def search_config(images: Path, out: Path, seed: int, options: argparse.Namespace) -> SearchConfig:
    """The search of one subject."""
    settings = (
        {k: v for k, v in DEMO_TRAINING.items() if k in SearchConfig.__dataclass_fields__} | QUIET | {"rank": RANK}
    )
    return SearchConfig(
        images=images,
        out=out,
        steps=options.supernet_steps,
        seed=seed,
        search_seed=seed,
        threads=options.threads,
        **settings,
    )


def trained_loss(config: SubjectConfig, held_out: list, out: Path) -> tuple[torch.Tensor, int]:
    """Test loss of each row after training, and the number of trained parameters."""
    config = resolve_defaults(config)
    samples, accelerator = find_samples(config.images, flip=False, skip_bad=False), make_accelerator(config)
    task = SubjectTask(config, samples, resolve_base(config.base), accelerator, held_out)
    run = Run(out)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.claim()
    loop = Loop(config, task, run, accelerator)
    size = sum(parameter.numel() for parameter in loop.parameters)
    loop.train()
    return task.training.losses_on(task.training.held_out_batch(4, seed=0)), size


def structures(task: SearchTask, best: SubjectConfig, seed: int) -> dict[str, SubjectConfig]:
    """The configs that are compared."""

    def with_path(path: dict) -> SubjectConfig:
        short = {name.split(".", 1)[1]: ",".join(choices) for name, choices in path.items()}
        return replace(best, adapter_options=best.adapter_options | {"structure": json.dumps(short)})

    configs, random, found = {"found": best}, Random(f"random {seed}"), 0
    while found < 3:
        structure = draw_structure(task.paths.space, random)
        if task.paths.space.cost(structure) <= task.paths.space.limit:
            found += 1
            configs[f"random {found}"] = with_path(task.paths.path_of(structure))
    configs["all-LoRA"] = replace(best, adapter_options={"c": "lora", "form": best.adapter_options["form"]})
    return configs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--supernet-steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/search_evidence"))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    losses: dict[str, list[torch.Tensor]] = {}
    sizes: dict[str, list[int]] = {}
    for seed in range(options.seeds):
        images = draw_folder(NEW + seed, 5, options.work / f"images{seed}", seed=0)
        held_out = find_samples(
            draw_folder(NEW + seed, 16, options.work / f"test{seed}", seed=1), flip=False, skip_bad=False
        )
        config = resolve_defaults(search_config(images, options.work / f"search{seed}", seed, options))
        if not (config.out / "best.yaml").is_file():
            train(config, overwrite=config.out.is_dir())
        task = SearchTask(
            config,
            find_samples(images, flip=False, skip_bad=False),
            resolve_base(config.base),
            make_accelerator(config),
        )
        best = replace(from_yaml(config.out / "best.yaml"), steps=options.steps, out=options.work / f"trained{seed}")
        configs = structures(task, best, seed)
        base, _ = trained_loss(replace(best, steps=1, learning_rate=1e-12), held_out, best.out)
        for name, own in configs.items():
            loss, size = trained_loss(own, held_out, best.out)
            losses.setdefault(name.split()[0], []).append(loss / base.mean())
            sizes.setdefault(name.split()[0], []).append(size)
        per_rank = task.paths.plain_lora_size() // RANK
        rank = max(1, round(sizes["found"][-1] / per_rank))
        loss, size = trained_loss(
            replace(best, adapter="lora", rank=rank, alpha=float(rank), adapter_options={}), held_out, best.out
        )
        losses.setdefault("lora", []).append(loss / base.mean())
        sizes.setdefault("lora", []).append(size)
        print(
            {name: round(float(own[-1].mean()), 4) for name, own in losses.items()},
            {n: s[-1] for n, s in sizes.items()},
            flush=True,
        )
    report(losses, sizes, options.out)


def report(losses: dict[str, list[torch.Tensor]], sizes: dict[str, list[int]], out: Path | None) -> None:
    """Prints the table and writes it."""
    rows = []
    for name, own in losses.items():
        values = torch.cat(own)
        low, high = bootstrap_interval(values)
        rows.append(
            {
                "way": name,
                "loss": float(values.mean()),
                "interval": (low, high),
                "by_run": [float(v.mean()) for v in own],
            }
        )
        rows[-1]["parameters"] = sizes[name]
        print(
            f"{name:10} loss {values.mean():.3f} ({low:.3f} to {high:.3f})  parameters {min(sizes[name])} to {max(sizes[name])}"
        )
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
