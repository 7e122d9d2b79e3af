"""The search behind a supernet's training: structures are bred and judged, and the best is written.

Every answer is written down before the next is asked for; a stopped search runs again from the start with those answers, and so goes
on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from ...toolkit.adapters.variants.glora import CHOICES
from ...toolkit.adapters.variants.glora_supernet import cache_pieces
from ...toolkit.core.files import write_text
from ...toolkit.core.run_folder import Run
from ..config.base import LoopConfig
from ..config.yaml_file import to_yaml
from ..engine.loop import HEARTBEAT_SECONDS
from .answers import append_answer, read_answers
from .evolution import Structure, evolve, pareto_front, rank_structures
from .paths import SupernetPaths
from .report import write_report
from .winner import save_winner, structure_options


class SearchStopped(Exception):
    """The search was asked to stop."""


class StructureSearch:
    """One search over the paths of a trained supernet."""

    def __init__(
        self,
        paths: SupernetPaths,
        parts: Mapping[str, nn.Module],
        fitness: Callable[[Structure], float],
        measure: str,
        run: Run,
        accelerator: Accelerator,
    ) -> None:
        """parts: those of the model that the supernet is on, in eval mode.

        fitness: of a structure, higher is better; measure: what minus the fitness is called.
        """
        self.paths, self.parts, self.fitness, self.measure = paths, parts, fitness, measure
        self.run, self.accelerator = run, accelerator
        self.known = read_answers(run)
        self.last_heartbeat = 0.0  # a moment, of time.monotonic

    def conclude(
        self, save_facts: Callable[[Path], None], retraining: Callable[[Run, dict[str, str]], LoopConfig]
    ) -> str:
        """Searches, and writes the winner, unless stopped; returns 'done' or 'stopped'. Arguments as in `write_winner`."""
        try:
            with ExitStack() as frozen:
                for part in self.parts.values():
                    frozen.enter_context(cache_pieces(part))
                scores = evolve(self.paths.space, self.paths.config, self.evaluate, self.report_generation)
        except SearchStopped:
            return "stopped"
        if self.accelerator.is_main_process:
            self.write_winner(scores, save_facts, retraining)
        return "done"

    def evaluate(self, structures: list[Structure]) -> list[float]:
        """The fitness of each, judged by all processes; what was judged before is not judged again."""
        accelerator, known, answers = self.accelerator, self.known, []
        share = accelerator.num_processes
        for start in range(0, len(structures), share):
            chunk = structures[start : start + share]
            own = chunk[accelerator.process_index : accelerator.process_index + 1]
            found = [known[s] if s in known else self.fitness(s) for s in own]
            gathered = gather_object(found) if share > 1 else found
            for structure, fitness in zip(chunk, gathered, strict=True):
                if structure not in known and accelerator.is_main_process:
                    append_answer(self.run, structure, self.paths.space.cost(structure), fitness)
                known[structure] = fitness
            self.give_sign_of_life()
            answers += gathered
            wanted = self.run.take_requests() if accelerator.is_main_process else set()
            if any(gather_object(["stop" in wanted]) if share > 1 else ["stop" in wanted]):
                raise SearchStopped
        return answers

    def give_sign_of_life(self) -> None:
        """Tells who looks from another machine that this goes on."""
        if self.accelerator.is_main_process and time.monotonic() - self.last_heartbeat > HEARTBEAT_SECONDS:
            self.last_heartbeat = time.monotonic()
            self.run.set_status(state="running", judged=len(self.known))

    def report_generation(self, number: int, scores: dict[Structure, float]) -> None:
        """Says how far a generation has come."""
        best = rank_structures(scores)[0]
        text = (
            f"generation {number}/{self.paths.config.generations}  {len(scores)} structures  {self.measure} {-scores[best]:.5f}  "
            f"{self.paths.space.cost(best)} parameters"
        )
        if self.accelerator.is_main_process:
            print(text, flush=True)
            self.run.append_log(text)

    def write_winner(
        self,
        scores: dict[Structure, float],
        save_facts: Callable[[Path], None],
        retraining: Callable[[Run, dict[str, str]], LoopConfig],
    ) -> None:
        """The best structure as an adapter and as a config that trains again; the table and the plot of all.

        save_facts: writes what the winner's folder tells of itself; retraining: the config, given the adapter's options.
        """
        paths, run = self.paths, self.run
        path = paths.path_of(rank_structures(scores)[0])
        save_winner(run.adapter, paths, path)
        save_facts(run.adapter)
        write_text(run.folder / "best.yaml", to_yaml(retraining(run, structure_options(paths.config, path))))
        points = [(paths.space.cost(s), -scores[s]) for s in scores]
        front = [(paths.space.cost(s), -scores[s]) for s in pareto_front(scores, paths.space)]
        sizes = {name: sum(paths.cost(name, p, c) for p, c in zip(CHOICES, path[name], strict=True)) for name in path}
        write_report(run.folder, path, sizes, points, front, self.measure)
