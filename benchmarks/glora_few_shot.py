"""Few-shot classification with GLoRA and a searched structure against LoRA: 1 to 16 images of each class.

    python benchmarks/glora_few_shot.py [--seeds 3] [--shots 1 2 4 8 16] [--threads 1] [--work FOLDER]
        [--out benchmarks/results/glora_few_shot.json]

The claim (Chavan et al. 2023, arXiv 2306.07967): with a structure of its own for each layer, found by an evolutionary search in a supernet,
GLoRA beats LoRA where images are few. Here on the embedded vision tower, with three questions about images of the tiny world: scene
(8 classes), pattern and count (3 each). Tested on as many images of each class, 480 and 180.

    head alone        a linear head on the base's features
    LoRA              rank 4: the reference, and the limit of every structure (20,480 numbers)
    LoRA, own size    of the rank at which it has about as many numbers as the structure found
    GLoRA, default    rank 4 and all choices at their defaults: 2.4 times the limit
    found             the structure found by the search, trained from the start
    random            structures drawn at random below the same limit, trained from the start; the mean of two
    found, inherited  the structure found with the supernet's weights, not trained again, as the paper has it

The search is the project's own: a supernet of rank 4 learns with another path in every step, as many steps as the others, then 150
structures (the first generation of 30 and four more) are judged by the loss on images that were held out of the few, a fifth of each
class and at least one; the test is never asked. The paper judges 1,050 structures, by accuracy. At one image of each class nothing can
be held out: there structures are judged on the images that the supernet learns from.

All train a head as well, at the rate that is best for the head alone, with the same images, batches, 60 steps of 16 or fewer, one
schedule. Each way's learning rate is chosen on the same questions at 4 images of each class, by other draws and other test images,
two a question: from three, and on from there while the best is at an edge (of the questions that are not tested on, colour is answered
rightly in 98 % by all ways at all rates, size and place by chance alone); what is chosen for random structures is taken for found ones
and the supernet, too. A run is a question with a seed: other images, batches, starts, another search. Differences are taken run by run;
intervals: bootstrap over runs.
Resumable: every run leaves one file in the work folder.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from classifier import (
    HEAD_ALONE,
    HEAD_WAY,
    TARGETS,
    AnswerCache,
    Chosen,
    Method,
    Rates,
    Towers,
    difference,
    format_interval,
    head_logits,
    rates_slug,
    score_predictions,
    summary,
    train_head,
    write,
)
from few_shot_classifier import Images, features
from few_shot_classifier import draw_images as drawn_images
from quiet import silence_libraries
from torch import nn

from rankfold.toolkit.adapters.variants.glora_supernet import cache_pieces
from rankfold.training.config.search import SearchConfig
from rankfold.training.search.evolution import Structure, draw_structure, evolve, rank_structures
from rankfold.training.search.paths import SupernetPaths
from rankfold.training.search.supernet import supernet_config
from rankfold.training.search.winner import winner_config

CHOSEN_SHOTS, CHOSEN_SEEDS = 4, (50, 51)
TESTED_ON = ("scene", "pattern", "count")
RANK, STEPS, RANDOM = 4, 60, 2
EVOLUTION = {"population": 30, "generations": 4, "parents": 6, "mutations": 15, "crossovers": 15}
DRAWN, TEST, TEST_EACH = 400, 1600, 60
TEST_STREAM, CHOICE_STREAM = 4, 5
REFERENCE, SIZED, DEFAULT = "LoRA", "LoRA, own size", "GLoRA, default"
FOUND, BLIND, INHERITED = "found", "random", "found, inherited"
WAYS = {
    HEAD_ALONE: HEAD_WAY,
    REFERENCE: Method("lora", RANK),
    DEFAULT: Method("glora", RANK),
}
STRUCTURES = {BLIND: Method("glora", RANK, rates=(1e-3, 3e-3, 1e-2))}
RATES_OF = {FOUND: BLIND, INHERITED: BLIND, SIZED: REFERENCE}  # whose rates are taken
PAIRS = (
    *((way, REFERENCE) for way in (HEAD_ALONE, SIZED, DEFAULT, FOUND, BLIND, INHERITED)),
    (FOUND, BLIND),
    (FOUND, SIZED),
)


class TowerSearch:
    """The project's search on a tower with a head, judged by the loss on held-out images."""

    def __init__(self, config: SearchConfig, towers: Towers) -> None:
        self.config, self.tower = config, towers.adapt_tower(supernet_config(config, TARGETS), config.seed)
        self.paths = SupernetPaths(config, {"tower": self.tower})
        self.head: Any = None
        self.held_out: Images | None = None

    def train(self, few: Images, held_out: Images, rates: Rates) -> None:
        """Trains the supernet, another path in every step."""
        self.held_out = held_out
        config = self.config
        self.head = train_head(
            self.tower,
            rates,
            few,
            config.steps,
            config.seed,
            lambda step: self.paths.set_path(self.paths.path_at(step)),
        )

    @torch.no_grad()
    def held_out_loss(self) -> float:
        assert self.held_out is not None
        said = head_logits(self.head, features(self.tower, self.held_out.images))
        return float(F.cross_entropy(said, self.held_out.classes))

    def fitness(self, structure: Structure) -> float:
        """Minus the loss on what was held out."""
        self.paths.set_path(self.paths.path_of(structure))
        return -self.held_out_loss()

    def best(self) -> Structure:
        """The best structure; its path is at work behind it."""
        with cache_pieces(self.tower):
            scores = evolve(self.paths.space, self.config, lambda structures: [self.fitness(one) for one in structures])
        best = rank_structures(scores)[0]
        self.paths.set_path(self.paths.path_of(best))
        return best

    def random_structure(self, number: int) -> Structure:
        """A structure at random below the limit."""
        random = Random(f"random {self.config.seed}/{number}")
        space = self.paths.space
        while space.cost(structure := draw_structure(space, random)) > space.limit:
            pass
        return structure

    def retrain(self, structure: Structure, towers: Towers) -> nn.Module:
        """A fresh tower with a structure."""
        path = {name.removeprefix("tower."): choices for name, choices in self.paths.path_of(structure).items()}
        return towers.adapt_tower(winner_config(self.config, path), self.config.seed)


def split_images(few: Images, shots: int) -> tuple[Images, Images]:
    """Images to train the supernet on, and images to judge structures on: the last fifth of each class, at least one."""
    if shots == 1:
        return few, few
    out = max(1, round(shots / 5))
    rows = [(few.classes == k).nonzero()[:, 0] for k in few.classes.unique()]
    train, judged = torch.cat([own[:-out] for own in rows]), torch.cat([own[-out:] for own in rows])
    return Images(few.images[train], few.classes[train]), Images(few.images[judged], few.classes[judged])


class Bench:
    """The towers, the images of each question, and the rates."""

    def __init__(self, work: Path) -> None:
        self.towers, self.kept = Towers(), AnswerCache(work)
        self.drawn = lru_cache(9)(partial(drawn_images, preprocess=self.towers.preprocess))
        self.chosen = Chosen(WAYS | STRUCTURES, self.score)

    def draw_few(self, question: str, shots: int, seed: int) -> Images:
        """So many images of each class."""
        return self.drawn(question, DRAWN, 100 + seed).first_of_each(shots)

    def test(self, question: str, stream: int = TEST_STREAM) -> Images:
        """As many test images of each class."""
        return self.drawn(question, TEST, stream).first_of_each(TEST_EACH)

    def accuracy(self, tower: nn.Module, name: str, few: Images, seed: int, test: Images) -> float:
        """Test accuracy of a tower after training as a way is trained."""
        return accuracy(tower, self.rates(name), few, seed, test)

    def rates(self, name: str) -> Rates:
        """Learning rates of a way."""
        return self.chosen.rates_of(RATES_OF.get(name, name))

    def search(self, seed: int) -> TowerSearch:
        """A search before its supernet is trained."""
        own = {"rank": RANK, "steps": STEPS, "seed": seed, "search_seed": seed}
        return TowerSearch(SearchConfig(**own, **EVOLUTION), self.towers)

    def score(self, name: str, rates: Rates) -> float:
        """Accuracy by other draws of the few images and other test images."""

        def measure(question: str, seed: int) -> float:
            search = self.search(seed) if name == BLIND else None
            tower = (
                search.retrain(search.random_structure(0), self.towers)
                if search
                else self.towers.make_tower(WAYS[name], seed)
            )
            few = self.draw_few(question, CHOSEN_SHOTS, seed)
            return accuracy(tower, rates, few, seed, self.test(question, CHOICE_STREAM))

        return statistics.fmean(
            self.kept.answer(
                f"rate-{name}-{rates_slug(rates)}-{STEPS}-{question}-{seed}", partial(measure, question, seed)
            )
            for question in TESTED_ON
            for seed in CHOSEN_SEEDS
        )

    def run(self, question: str, shots: int, seed: int) -> tuple[dict[str, float], dict[str, Any]]:
        """Accuracy of every way on one draw of the few images; and what was found."""
        own = f"{question}-{shots}-{seed}-{STEPS}"
        return self.kept.answer(own, partial(self.figures, question, shots, seed))

    def figures(self, question: str, shots: int, seed: int) -> tuple[dict[str, float], dict[str, Any]]:
        """The same, by training."""
        few, test = self.draw_few(question, shots, seed), self.test(question)
        own = {
            name: self.accuracy(self.towers.make_tower(way, seed), name, few, seed, test) for name, way in WAYS.items()
        }
        search = self.search(seed)
        search.train(*split_images(few, shots), self.rates(FOUND))
        best = search.best()
        own[INHERITED] = float(score_predictions(search.tower, search.head, test).mean())
        own[FOUND] = self.accuracy(search.retrain(best, self.towers), FOUND, few, seed, test)
        blind = [search.random_structure(number) for number in range(RANDOM)]
        own[BLIND] = statistics.fmean(
            self.accuracy(search.retrain(one, self.towers), BLIND, few, seed, test) for one in blind
        )
        size = search.paths.space.cost(best)
        rank = max(1, round(size / (search.paths.plain_lora_size() / RANK)))
        own[SIZED] = own[REFERENCE]
        if rank != RANK:
            tower = self.towers.make_tower(Method("lora", rank), seed)
            own[SIZED] = self.accuracy(tower, SIZED, few, seed, test)
        facts = {"numbers": size, "lora_rank": rank, "random_numbers": [search.paths.space.cost(one) for one in blind]}
        return own, facts | {"choices": chosen_parts(search, best)}


def accuracy(tower: nn.Module, rates: Rates, few: Images, seed: int, test: Images) -> float:
    """Test accuracy of a tower after training."""
    head = train_head(tower, rates, few, STEPS, seed)
    return float(score_predictions(tower, head, test).mean())


def chosen_parts(search: TowerSearch, structure: Structure) -> dict[str, dict[str, int]]:
    """How often each choice of A, B, C, D and E was taken over the layers."""
    paths = search.paths.path_of(structure).values()
    return {part: dict(Counter(choices)) for part, choices in zip("ABCDE", zip(*paths, strict=True), strict=True)}


Found = dict[tuple[str, int], list[float]]  # way, shots -> accuracy of each run


def of_each_question(values: list[float]) -> dict[str, float]:
    """Mean of the runs of each question."""
    each = len(values) // len(TESTED_ON)
    return {name: statistics.fmean(values[n * each : (n + 1) * each]) for n, name in enumerate(TESTED_ON)}


def differences_of(found: Found, shots: list[int]) -> list[dict[str, Any]]:
    """Each pair of ways at each number of shots, and at the mean over them, since the few images of a run lie in one another."""
    rows = []
    for way, reference in PAIRS:
        for among in [*([n] for n in shots), *([shots] if len(shots) > 1 else [])]:
            own, base = (
                [statistics.fmean(values) for values in zip(*(found[name, n] for n in among), strict=True)]
                for name in (way, reference)
            )
            rows.append({"way": way, "reference": reference, "shots": among, "accuracy": difference(own, base)})
            rows[-1]["by_question"] = of_each_question(rows[-1]["accuracy"]["by_run"])
    return rows


def report(rows: list[dict[str, Any]], differences: list[dict[str, Any]]) -> None:
    """Prints both tables, in points of a hundred."""
    for row in rows:
        questions = {name: round(value, 3) for name, value in row["by_question"].items()}
        print(f"shots {row['shots']:2}  {row['way']:17} {format_interval(row['accuracy'])}  {questions}")
    for one in differences:
        own, pair = one["accuracy"], f"{one['way']} less {one['reference']}"
        word = f"better {own['better']}, worse {own['worse']}: {own['verdict']}"
        print(f"{pair:34} shots {one['shots']!s:17} {format_interval(own):22} {word}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/glora_few_shot"))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(options.threads)
    bench, found, searches = Bench(options.work), {}, []
    for name in (*WAYS, *STRUCTURES):
        print(name, bench.chosen.facts(name), flush=True)
    for question in TESTED_ON:
        for seed in range(options.seeds):
            for shots in options.shots:
                own, facts = bench.run(question, shots, seed)
                for name, value in own.items():
                    found.setdefault((name, shots), []).append(value)
                searches.append({"question": question, "seed": seed, "shots": shots} | facts)
                shown = {name: round(value, 3) for name, value in own.items()}
                print(
                    f"{question} seed {seed} shots {shots} {shown} {facts['numbers']}",
                    flush=True,
                )
    rows = [
        {"way": name, "shots": shots, "accuracy": summary(values)} | {"by_question": of_each_question(values)}
        for (name, shots), values in found.items()
    ]
    differences = differences_of(found, options.shots)
    report(rows, differences)
    settings = {
        "steps": STEPS,
        "evolution": EVOLUTION,
        "rates": {name: bench.chosen.facts(name) for name in (*WAYS, *STRUCTURES)},
        "seconds": round(bench.kept.seconds),
    }
    write({"settings": settings, "rows": rows, "differences": differences, "searches": searches}, options.out)


if __name__ == "__main__":
    main()
