"""Evolutionary search over structures (the procedure and defaults of GLoRA, Chavan et al. 2023, arXiv 2306.07967).

A structure is one choice for each gene. The search is a function of its settings and of what `evaluate` answers: it draws from
generators keyed by (seed, generation, child), so running it again with the answers of a stopped run goes on where that one
was. No structure is evaluated twice, none above the limit, and every generation is ranked, the last one too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from ...toolkit.core.errors import UserError
from ..config.search import EvolutionConfig

Structure = tuple[int, ...]  # number of the choice at each gene
Evaluate = Callable[[list[Structure]], list[float]]  # fitness of each, higher is better


@dataclass(frozen=True)
class SearchSpace:
    """The structures there are."""

    costs: tuple[tuple[int, ...], ...]
    """For each gene, what each of its choices costs: parameters."""
    limit: int
    """Greatest cost of a structure."""

    def cost(self, structure: Structure) -> int:
        """Cost of a structure."""
        return sum(costs[choice] for costs, choice in zip(self.costs, structure, strict=True))

    @property
    def min_cost(self) -> int:
        """Cost of the cheapest structure."""
        return sum(min(costs) for costs in self.costs)

    @property
    def size(self) -> int:
        """Number of structures, over the limit or not."""
        return math.prod(len(costs) for costs in self.costs)


def check_evolution(config: EvolutionConfig, space: SearchSpace) -> None:
    """Raises UserError for settings that cannot work."""
    for name in ("population", "parents", "tries"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(config, name)}.")
    for name in ("generations", "mutations", "crossovers"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name} must be at least 0, not {getattr(config, name)}.")
    if not 0 < config.mutation_rate <= 1:
        raise UserError(f"--mutation-rate must be in (0, 1], not {config.mutation_rate}.")
    if space.limit < space.min_cost:
        raise UserError(
            f"--limit {space.limit} is below the smallest structure, which has {space.min_cost} parameters: raise it, or allow "
            "'none' where it is not among the choices."
        )


def evolve(
    space: SearchSpace,
    config: EvolutionConfig,
    evaluate: Evaluate,
    on_generation: Callable[[int, dict[Structure, float]], None] = lambda number, scores: None,
) -> dict[Structure, float]:
    """Every structure that was evaluated, and its fitness; not a number counts as the worst.

    on_generation is called with the number of a generation and all scores so far when it has been evaluated.

    Raises:
        UserError: for settings that cannot work, or when no structure of a generation has a fitness that is a number.
    """
    check_evolution(config, space)
    scores: dict[Structure, float] = {}
    for number in range(config.generations + 1):
        children = (
            first_generation(space, config)
            if number == 0
            else next_generation(space, config, number, rank_structures(scores), scores)
        )
        if not children:
            break  # all structures below the limit have been seen
        answers = evaluate(children)
        if not any(math.isfinite(answer) for answer in answers):
            raise UserError(
                f"No structure of generation {number} has a finite fitness. Lower the learning rate of the training before, or "
                "check the held-out data."
            )
        scores |= {c: a if math.isfinite(a) else -math.inf for c, a in zip(children, answers, strict=True)}
        on_generation(number, scores)
    return scores


def rank_structures(scores: dict[Structure, float]) -> list[Structure]:
    """Structures from the best on; equals in a fixed order."""
    return sorted(scores, key=lambda structure: (-scores[structure], structure))


def pareto_front(scores: dict[Structure, float], space: SearchSpace) -> list[Structure]:
    """The structures that no cheaper one is as good as, from the cheapest on."""
    best, found = -math.inf, []
    for structure in sorted(scores, key=lambda s: (space.cost(s), -scores[s], s)):
        if scores[structure] > best:
            best = scores[structure]
            found.append(structure)
    return found


def first_generation(space: SearchSpace, config: EvolutionConfig) -> list[Structure]:
    """The random first generation."""
    return fill_generation([], space, config, 0, set())


def next_generation(
    space: SearchSpace, config: EvolutionConfig, number: int, best: Sequence[Structure], seen: dict[Structure, float]
) -> list[Structure]:
    """The children of a generation: mutations, crossovers, and random ones where those do not fill it."""
    parents, children = best[: config.parents], []
    taken = set(seen)
    for child in range(config.mutations + config.crossovers):
        make = mutate if child < config.mutations else crossover
        random = Random(f"{config.search_seed}/{number}/{child}")
        made = draw_unseen(
            lambda make=make, random=random: make(parents, space, config, random), space, config, random, taken
        )
        if made is not None and len(children) < config.population:
            children.append(made)
            taken.add(made)
    return fill_generation(children, space, config, number, taken)


def fill_generation(
    children: list[Structure], space: SearchSpace, config: EvolutionConfig, number: int, taken: set[Structure]
) -> list[Structure]:
    """The children, and random structures until the population is full or nothing new is found."""
    missing = config.population - len(children)
    for child in range(missing):
        random = Random(f"{config.search_seed}/{number}/fill {child}")
        made = draw_unseen(lambda random=random: draw_structure(space, random), space, config, random, taken)
        if made is not None:
            children.append(made)
            taken.add(made)
    return children


def draw_unseen(
    make: Callable[[], Structure],
    space: SearchSpace,
    config: EvolutionConfig,
    random: Random,
    taken: set[Structure],
) -> Structure | None:
    """A structure from `make` that is below the limit and new; None when a fixed number of draws finds none.

    In the second half of the draws those over the limit are made cheaper, gene by gene, so that a limit that hardly any draw
    meets costs no endless loop.
    """
    for number in range(2 * config.tries):
        structure = make()
        if space.cost(structure) > space.limit and number >= config.tries:
            structure = reduce_cost(structure, space, random)
        if space.cost(structure) <= space.limit and structure not in taken:
            return structure
    return None


def draw_structure(space: SearchSpace, random: Random) -> Structure:
    """Any structure, all alike."""
    return tuple(random.randrange(len(costs)) for costs in space.costs)


def mutate(parents: Sequence[Structure], space: SearchSpace, config: EvolutionConfig, random: Random) -> Structure:
    """A parent with each gene redrawn at the mutation rate."""
    parent, fresh = random.choice(parents), draw_structure(space, random)
    return tuple(f if random.random() < config.mutation_rate else p for p, f in zip(parent, fresh, strict=True))


def crossover(parents: Sequence[Structure], space: SearchSpace, config: EvolutionConfig, random: Random) -> Structure:
    """Each gene from either of two parents."""
    one, other = random.choices(parents, k=2)
    return tuple(a if random.random() < 0.5 else b for a, b in zip(one, other, strict=True))


def reduce_cost(structure: Structure, space: SearchSpace, random: Random) -> Structure:
    """The structure with genes, in random order, set to a cheaper choice until it is below the limit."""
    genes, cost = list(structure), space.cost(structure)
    for gene in random.sample(range(len(genes)), len(genes)):
        if cost <= space.limit:
            break
        costs = space.costs[gene]
        cheaper = [choice for choice in range(len(costs)) if costs[choice] < costs[genes[gene]]]
        if cheaper:
            picked = random.choice(cheaper)
            cost += costs[picked] - costs[genes[gene]]
            genes[gene] = picked
    for gene, costs in enumerate(space.costs):  # still too dear: the cheapest of all, from the front
        if cost > space.limit:
            least = costs.index(min(costs))
            cost += costs[least] - costs[genes[gene]]
            genes[gene] = least
    return tuple(genes)
