"""What the benchmarks of the papers' claims share: adapters on the embedded vision tower under a linear head, and figures of many runs.

Used by spurious.py, fewer_parameters.py and glora_few_shot.py. The tower is the embedded open_clip model's, its MLP layers adapted
(open_clip's attention keeps its q, k and v in one bare parameter, which is no layer); alpha is the rank, so that every way's own factor
is 1. Each way trains a linear head as well, at the rate that is best for the head alone. Of one seed all ways see the same images in
the same batches.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from few_shot_classifier import Images, features
from peft import PeftConfig, inject_adapter_in_model
from torch import nn

from rankfold.toolkit.adapters.attach import adapter_state, calibrate, parameter_groups, trainable_parameters
from rankfold.toolkit.adapters.auxiliary import auxiliary_losses
from rankfold.toolkit.adapters.registry import make_config
from rankfold.toolkit.core.files import write_text
from rankfold.toolkit.metrics.clip import ClipScorer
from rankfold.toolkit.metrics.statistics import bootstrap_interval, mcnemar_p

TARGETS = ("c_fc", "c_proj")
HEAD, WHOLE = "head", "whole"  # nothing of the tower is trained, or all of it
BATCH = 16
STEP_OUT = 10**0.5


@dataclass(frozen=True)
class Method:
    """What is trained beside the head, and the learning rates that are tried for it; with nothing beside it, the head's."""

    adapter: str
    rank: int = 0
    options: dict[str, str] = field(default_factory=dict)
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)


HEAD_ALONE = "head alone"
HEAD_WAY = Method(HEAD, rates=(3e-3, 1e-2, 3e-2))


@dataclass(frozen=True)
class Rates:
    """Learning rates of one training."""

    tower: float
    head: float


class Chosen:
    """Each way's learning rate, by a score of one training; the head's is chosen with the head alone and is then everybody's."""

    def __init__(self, ways: dict[str, Method], score: Callable[[str, Rates], float]) -> None:
        self.ways, self.score = ways, score
        self.tried: dict[str, dict[float, float]] = {}

    def rates_of(self, name: str) -> Rates:
        """The rates of a way."""
        if name == HEAD_ALONE:
            best = self.best(name, lambda rate: Rates(0.0, rate))
            return Rates(0.0, best)
        head = self.rates_of(HEAD_ALONE).head
        return Rates(self.best(name, lambda rate: Rates(rate, head)), head)

    def best(self, name: str, rates: Callable[[float], Rates]) -> float:
        """The rate of a way that was varied."""
        if name not in self.tried:
            self.tried[name] = tried_rates(lambda rate: self.score(name, rates(rate)), self.ways[name].rates)
        return best_rate(self.tried[name])

    def facts(self, name: str) -> dict[str, Any]:
        """The rates of a way, and what was tried."""
        rates = self.rates_of(name)
        varied = rates.head if name == HEAD_ALONE else rates.tower
        return {"learning_rate": varied, "head_rate": rates.head, "tried": self.tried[name]}


class Towers:
    """The embedded tower, a fresh one for each training."""

    def __init__(self) -> None:
        scorer = ClipScorer()
        self.base, self.preprocess = scorer.model.visual.requires_grad_(False).eval(), scorer.preprocess

    def make_tower(self, way: Method, seed: int) -> nn.Module:
        """The tower of a way."""
        if way.adapter in (HEAD, WHOLE):
            return copy.deepcopy(self.base).requires_grad_(way.adapter == WHOLE)
        config = make_config(
            way.adapter, rank=way.rank, alpha=way.rank, dropout=0.0, target_modules=TARGETS, options=way.options
        )
        return self.adapt_tower(config, seed)

    def adapt_tower(self, config: PeftConfig, seed: int) -> nn.Module:
        """The tower with an adapter that starts from a seed."""
        torch.manual_seed(seed)
        return inject_adapter_in_model(config, copy.deepcopy(self.base))

    def sizes(self, way: Method) -> dict[str, int]:
        """How many numbers of the tower a way trains, and how many of them it keeps."""
        tower = self.make_tower(way, 0)
        trained = sum(p.numel() for p in trainable_parameters(tower))
        if way.adapter in (HEAD, WHOLE):
            return {"trained_numbers": trained, "stored_numbers": trained}
        return {
            "trained_numbers": trained,
            "stored_numbers": sum(tensor.numel() for tensor in adapter_state(tower).values()),
        }


def train_head(
    tower: nn.Module,
    rates: Rates,
    data: Images,
    steps: int,
    seed: int,
    before_step: Callable[[int], None] = lambda step: None,
) -> nn.Linear:
    """Trains a head and what is trainable of the tower, losses of adapters included; returns the head, the tower in eval mode."""
    random, groups = torch.Generator().manual_seed(seed), parameter_groups(tower, rates.tower)
    batches = [torch.randperm(len(data.classes), generator=random)[:BATCH] for _ in range(steps)]
    head = nn.Linear(tower(data.images[:1]).shape[1], int(data.classes.max()) + 1)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    own = {"params": list(head.parameters()), "lr": rates.head}
    optimizer = torch.optim.AdamW([own, *groups], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    calibrate(tower, lambda: tower(data.images[batches[0]]))
    frozen = None if groups else features(tower, data.images)
    torch.manual_seed(seed)
    tower.train()  # FVAE draws its codes and has its loss in training only
    for step, rows in enumerate(batches):
        before_step(step)
        with auxiliary_losses() as auxiliary:
            seen = tower(data.images[rows]) if frozen is None else frozen[rows]
            loss = F.cross_entropy(head_logits(head, seen), data.classes[rows])
        (loss + auxiliary.total()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    tower.eval()
    return head


def head_logits(head: nn.Linear, seen: torch.Tensor) -> torch.Tensor:
    """What the head says of the tower's features (N, D), as few_shot_classifier.accuracy has it."""
    return head(F.normalize(seen, dim=-1) * 10)


@torch.no_grad()
def score_predictions(tower: nn.Module, head: nn.Linear, test: Images) -> torch.Tensor:
    """1 where a test image is put in its class, otherwise 0, (N,)."""
    return (head_logits(head, features(tower, test.images)).argmax(1) == test.classes).float()


class AnswerCache:
    """Answers in a folder, so that a benchmark that was stopped goes on where it was, and the processor's time that they took."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seconds = folder, 0.0

    def answer(self, question: str, make: Callable[[], Any]) -> Any:
        """What is known, or what is made and then written down, as JSON has it."""
        file = self.folder / f"{question.replace(', ', '_').replace(' ', '_')}.json"
        if not file.is_file():
            begin, made = time.process_time(), make()
            write_text(file, json.dumps({"answer": made, "seconds": time.process_time() - begin}))
        known = json.loads(file.read_text(encoding="utf-8"))
        self.seconds += known["seconds"]
        return known["answer"]


def rates_slug(rates: Rates) -> str:
    """Rates as a part of a file's name."""
    return f"{rates.tower:g}-{rates.head:g}"


def tried_rates(score: Callable[[float], float], rates: Sequence[float]) -> dict[float, float]:
    """The score of every learning rate that was tried: those given, and on from there while the best is at an edge, twice at most."""
    scores: dict[float, float] = {}
    wanted = set(rates)
    for _ in range(3):
        scores |= {rate: score(rate) for rate in sorted(wanted)}
        best = best_rate(scores)
        wanted = {best / STEP_OUT} if best == min(scores) else {best * STEP_OUT} if best == max(scores) else set()
        wanted = {float(f"{rate:.0e}") for rate in wanted}
    return dict(sorted(scores.items()))


def best_rate(scores: dict[float, float]) -> float:
    """The rate with the highest score, the lowest one of equals."""
    return max(sorted(scores), key=lambda rate: scores[rate])


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean of the runs, its bootstrap interval, and the runs."""
    return {
        "mean": statistics.fmean(values),
        "interval": bootstrap_interval(torch.tensor(values), draws=20_000),
        "by_run": list(values),
    }


def difference(values: Sequence[float], reference: Sequence[float], better: int = 1) -> dict[str, Any]:
    """Paired differences from a reference, run by run, a sign test, and what they come to.

    better: 1 where more is better, -1 where less is. A difference is one when the interval excludes 0 and the sign test agrees.
    """
    found = summary([a - b for a, b in zip(values, reference, strict=True)])
    more, less = (sum(d * way > 0 for d in found["by_run"]) for way in (better, -better))
    p, (low, high) = mcnemar_p(more, less), found["interval"]
    word = "better" if low * better > 0 and high * better > 0 else "worse"
    verdict = "no difference" if low <= 0 <= high else word if p < 0.05 else "undecided"
    return found | {"better": more, "worse": less, "sign_p": p, "verdict": verdict}


def format_interval(value: dict[str, Any]) -> str:
    """A mean with its interval, in points of a hundred."""
    low, high = (100 * edge for edge in value["interval"])
    return f"{100 * value['mean']:.1f} ({low:.1f} to {high:.1f})"


def write(found: dict[str, Any], out: Path | None) -> None:
    """Writes what was found as JSON."""
    if out:
        write_text(out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit("These are parts of spurious.py, fewer_parameters.py and glora_few_shot.py.")
