"""Few-shot transfer for a classifier: a new question about images from 1 to 16 of each class, with adapters of other questions.

    python benchmarks/few_shot_classifier.py [--seeds 3] [--shots 1 2 4 8 16] [--out FILE.json] [--plot FILE.png]

The tower is the embedded open_clip model's, its MLP layers adapted at rank 4 (open_clip's attention keeps its q, k and v in one bare
parameter, which is no layer). Six questions about images of the tiny world: colour, scene, pattern, size, place and count, an adapter
for each, trained on 1,500 images. The new question is one of them, and the library the adapters of the five others. Every way trains a
linear head as well:

    head alone          on the base's features
    uniform             on the features of the library's uniform mean
    learned             and the weights, a softmax in each layer
    LoRA from scratch   and a new adapter
    whole tower         and every weight of the tower

Accuracy on 500 other images. Size and place are not among the tests: in a first run every way was near chance there with up to
four images of a class. Learning rates are chosen for each way on one question (colour) that is not among the tests. Intervals:
bootstrap over runs (question and seed).
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from rankfold.toolkit.adapters import composition
from rankfold.toolkit.adapters.attach import trainable_parameters
from rankfold.toolkit.adapters.composition import MixingCoefficients
from rankfold.toolkit.adapters.fold import Folded, fold
from rankfold.toolkit.embedded import world
from rankfold.toolkit.metrics.clip import ClipScorer
from rankfold.toolkit.metrics.statistics import bootstrap_interval

QUESTIONS = {
    "colour": tuple(world.COLOURS),
    "scene": tuple(world.SCENES),
    "pattern": world.PATTERNS,
    "size": world.SIZES,
    "place": tuple(world.PLACES),
    "count": world.COUNTS,
}
CHOSEN_ON, TESTED_ON = "colour", ("scene", "pattern", "count")
UPSTREAM_STEPS, STEPS, BATCH = 400, 100, 16
HEAD_RATE = 1e-2
RATES = {
    "head alone": (0.0,),
    "uniform": (0.0,),
    "learned": (0.02, 0.1, 0.5),
    "LoRA from scratch": (3e-4, 1e-3, 3e-3),
    "whole tower": (3e-5, 1e-4, 3e-4),
}


@dataclass(frozen=True)
class Images:
    """images (N, 3, 64, 64) and their classes (N,)."""

    images: torch.Tensor
    classes: torch.Tensor

    def first_of_each(self, shots: int) -> Images:
        """The first so many images of each class."""
        rows = torch.cat([(self.classes == k).nonzero()[:shots, 0] for k in self.classes.unique()])
        return Images(self.images[rows], self.classes[rows])


def draw_images(task: str, count: int, seed: int, preprocess: Callable) -> Images:
    """Fresh images and the answers to a question."""
    rng, images, classes = np.random.default_rng((seed, 77)), [], []
    for _ in range(count):
        thing = world.random_thing(rng)
        images.append(preprocess(world.draw(thing, rng)))
        classes.append(QUESTIONS[task].index(getattr(thing, task)))
    return Images(torch.stack(images), torch.tensor(classes))


class Bench:
    """The tower, the upstream adapters, and the ways."""

    def __init__(self) -> None:
        scorer = ClipScorer()
        self.base = scorer.model.visual.requires_grad_(False).eval()
        self.drawn = cache(partial(draw_images, preprocess=scorer.preprocess))
        self.adapters = {task: self.upstream(task) for task in QUESTIONS}

    def with_lora(self) -> nn.Module:
        """The tower with a fresh adapter."""
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["c_fc", "c_proj"])
        return inject_adapter_in_model(config, copy.deepcopy(self.base))

    def upstream(self, task: str) -> Folded:
        """An adapter trained on a task, as changes of the tower's layers."""
        tower = self.with_lora()
        head = fit_head(tower, trainable_parameters(tower), 1e-3, self.drawn(task, 1500, 1), UPSTREAM_STEPS, 32, 0)
        print(f"upstream {task:9} accuracy {accuracy(tower, head, self.drawn(task, 300, 2)):.2f}", flush=True)
        return fold(tower, "default")

    def make_tower(self, name: str, task: str) -> tuple[nn.Module, list[nn.Parameter]]:
        """The tower of a way, and what of it is trained."""
        if name == "LoRA from scratch":
            tower = self.with_lora()
            return tower, trainable_parameters(tower)
        tower = copy.deepcopy(self.base)
        if name == "whole tower":
            return tower, list(tower.requires_grad_(True).parameters())
        if name == "head alone":
            return tower, []
        library = [adapter for other, adapter in self.adapters.items() if other != task]
        weights_of = composition.coefficient_factory("layer", lambda: MixingCoefficients(len(library)))
        mixtures = composition.attach_sources(tower, library, weights_of)
        return tower, [m.coefficients.logits for m in mixtures.values()] if name == "learned" else []

    def run(self, name: str, rate: float, task: str, shots: int, seed: int, test: Images) -> float:
        """Test accuracy of one way on one draw of the shots."""
        tower, parameters = self.make_tower(name, task)
        few = self.drawn(task, 400, 100 + seed).first_of_each(shots)
        head = fit_head(tower, parameters, rate, few, STEPS, BATCH, seed)
        return accuracy(tower, head, test)

    def chosen_rates(self) -> dict[str, float]:
        """The best rate of each way on the task that is not tested on, at 4 images a class, two draws."""
        test, found = self.drawn(CHOSEN_ON, 300, 3), {}
        for name, rates in RATES.items():
            scores = {r: sum(self.run(name, r, CHOSEN_ON, 4, 50 + s, test) for s in range(2)) / 2 for r in rates}
            found[name] = max(scores, key=lambda rate: scores[rate])
            print(f"rates {name:18} { ({r: round(s, 3) for r, s in scores.items()}) }", flush=True)
        return found


def fit_head(
    tower: nn.Module, parameters: list, rate: float, data: Images, steps: int, batch: int, seed: int
) -> nn.Linear:
    """Trains a head and the given parameters of the tower; returns the head."""
    random = torch.Generator().manual_seed(seed)
    head = nn.Linear(tower(data.images[:1]).shape[1], int(data.classes.max()) + 1)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    groups = [{"params": list(head.parameters()), "lr": HEAD_RATE}]
    groups += [{"params": parameters, "lr": rate}] if parameters else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    frozen = None if parameters else features(tower, data.images)
    for _ in range(steps):
        rows = torch.randperm(len(data.classes), generator=random)[:batch]
        seen = tower(data.images[rows]) if frozen is None else frozen[rows]
        F.cross_entropy(head(F.normalize(seen, dim=-1) * 10), data.classes[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return head


@torch.no_grad()
def features(tower: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the tower says of images, (N, D)."""
    return torch.cat([tower(rows) for rows in images.split(64)])


def accuracy(tower: nn.Module, head: nn.Linear, test: Images) -> float:
    """Share of the test images that are put in their class."""
    guess = head(F.normalize(features(tower, test.images), dim=-1) * 10).argmax(1)
    return float((guess == test.classes).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench()
    rates = bench.chosen_rates()
    found: dict[tuple[str, int], list[float]] = {}
    for task in TESTED_ON:
        test = bench.drawn(task, 500, 4)
        for seed in range(options.seeds):
            for shots in options.shots:
                for name, rate in rates.items():
                    found.setdefault((name, shots), []).append(bench.run(name, rate, task, shots, seed, test))
            print(f"{task} seed {seed}", {key: round(own[-1], 2) for key, own in found.items()}, flush=True)
    rows = []
    for (name, shots), own in found.items():
        low, high = bootstrap_interval(torch.tensor(own))
        rows.append({"way": name, "shots": shots, "accuracy": sum(own) / len(own), "accuracy_interval": (low, high)})
        by_question = {q: sum(part) / len(part) for q, part in zip(TESTED_ON, of_each_question(own), strict=True)}
        rows[-1] |= {"by_run": own, "by_question": by_question, "learning_rate": rates[name]}
        print(f"{name:18} shots {shots:2}  accuracy {rows[-1]['accuracy']:.3f} ({low:.3f} to {high:.3f})")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if options.plot:
        draw(rows, options.plot)


def of_each_question(runs: list[float]) -> list[list[float]]:
    """The runs of each question."""
    each = len(runs) // len(TESTED_ON)
    return [runs[n * each : (n + 1) * each] for n in range(len(TESTED_ON))]


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy against the number of images a class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == name]
        shots = [row["shots"] for row in own]
        axes.plot(shots, [row["accuracy"] for row in own], marker="o", label=name)
        axes.fill_between(shots, *zip(*(row["accuracy_interval"] for row in own), strict=True), alpha=0.15)
    axes.set(xscale="log", xlabel="images a class", ylabel="accuracy", xticks=shots, xticklabels=shots)
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
