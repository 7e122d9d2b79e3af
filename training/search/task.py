"""Structure search: a supernet is trained with another path in every step, then structures are bred and judged.

Every answer is written down before the next is asked for; a stopped search runs again from the start with those answers, and so goes
on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from ...toolkit.adapters.attach import parameter_groups
from ...toolkit.adapters.fold import is_dead
from ...toolkit.adapters.variants.glora import CHOICES, GloraConfig
from ...toolkit.adapters.variants.glora_supernet import (
    LARGEST,
    Choices,
    GloraSupernetConfig,
    GloraSupernetLayer,
    cache_pieces,
    select_tensors,
    single_choice,
    supernet_layers,
)
from ...toolkit.core.errors import UserError
from ...toolkit.core.files import append_line, write_text
from ...toolkit.core.run_folder import Run
from ...toolkit.formats import native
from ..config.base import LoopConfig
from ..config.search import SearchSettings
from ..config.yaml_file import to_yaml
from .evolution import SearchSpace, Structure, check_evolution, evolve, pareto_front, rank_structures
from .report import write_report


def check_search(config: SearchSettings) -> None:
    """Checks the settings of the search that need neither images nor a model.

    Raises:
        UserError: for a choice that does not exist, or settings that cannot work.
    """
    for part, known in CHOICES.items():
        own = choices_of(config, part)
        wrong = [choice for choice in own if choice not in known]
        if wrong or not own or len(set(own)) < len(own):
            raise UserError(f"--choices-{part} must name some of {', '.join(known)}, each once, not '{' '.join(own)}'.")
    check_evolution(config, SearchSpace(costs=((0,),), limit=0))
    supernet_config(config, ["any"])


def choices_of(config: SearchSettings, part: str) -> tuple[str, ...]:
    """The choices that the search may take for A, B, C, D or E."""
    return getattr(config, f"choices_{part}")


def supernet_config(config: SearchSettings, targets: Sequence[str]) -> GloraSupernetConfig:
    """The PEFT config of the supernet."""
    try:
        return GloraSupernetConfig(r=config.rank, target_modules=list(targets), form=config.form, a_rate=config.a_rate)
    except ValueError as error:
        raise UserError(str(error)) from error


class StructureSearch:
    """What every search's Task has: the supernet's space, its training by random paths, and the evolution after the last step.

    A sub-class also is a Task on data, and says what its held-out loss is, what the winner's folder tells and how it is retrained.
    """

    config: Any
    parts: dict[str, nn.Module]
    module: nn.Module

    def open_space(self, judge: Callable[[Any], float] | None) -> None:
        """Finds the genes of the supernet that `attach` has put on the model.

        judge: fitness of the task's model as it stands, higher is better; None is by the held-out loss.
        """
        config = self.config
        self.judge, self.measure = judge, "minus the judge's fitness" if judge else "held-out loss"
        self.layers: dict[str, GloraSupernetLayer] = {
            f"{part}.{name}": layer
            for part, model in self.parts.items()
            for name, layer in supernet_layers(model).items()
        }
        self.genes = [(name, part) for name in self.layers for part in CHOICES]
        self.options = [self.options_at(name, part) for name, part in self.genes]
        costs = tuple(
            tuple(self.cost(*gene, c) for c in own) for gene, own in zip(self.genes, self.options, strict=True)
        )
        self.space = SearchSpace(costs, config.limit or self.plain_lora_size())
        check_evolution(config, self.space)

    def held_out_loss(self) -> float:
        """Loss on what was held out, in eval mode."""
        raise NotImplementedError

    def save_facts(self, folder: Path) -> None:
        """Writes what the winner's folder tells of itself."""
        raise NotImplementedError

    def retraining(self, run: Run, options: dict[str, str]) -> LoopConfig:
        """A config that trains the winner from the start, on the same data; options: of the adapter."""
        raise NotImplementedError

    # -------------------------------------------------------------------------- the space

    def options_at(self, layer: str, part: str) -> tuple[str, ...]:
        """Choices of a gene; without a bias there is nothing for D to scale."""
        own = choices_of(self.config, part)
        return ("none",) if part == "d" and self.layers[layer].base_bias() is None else own

    def cost(self, layer: str, part: str, choice: str) -> int:
        """Parameters of one choice."""
        return sum(
            tensor.numel()
            for tensor in select_tensors(self.layers[layer].tensors("default"), single_choice(part, choice)).values()
        )

    def plain_lora_size(self) -> int:
        """Parameters of plain LoRA of this rank on the same layers."""
        return sum(self.config.rank * (layer.fan_in + layer.fan_out) for layer in self.layers.values())

    def path_of(self, structure: Structure) -> dict[str, Choices]:
        """The choices of each layer."""
        picked = [options[number] for options, number in zip(self.options, structure, strict=True)]
        width = len(CHOICES)
        return {name: tuple(picked[i * width : (i + 1) * width]) for i, name in enumerate(self.layers)}

    def set_path(self, path: dict[str, Choices]) -> None:
        """Puts a path to work."""
        for name, choices in path.items():
            self.layers[name].path["default"] = choices

    # -------------------------------------------------------------------------- training the supernet

    def batch(self, position: int, slots: list[int]) -> dict[str, torch.Tensor]:
        """The rows of a forward pass; the path of its optimizer step is put to work."""
        config = self.config
        step = position // (config.batch_size * config.gradient_accumulation)
        self.set_path(self.path_at(step))
        return super().batch(position, slots)  # type: ignore[misc]

    def path_at(self, step: int) -> dict[str, Choices]:
        """The path of a step: all choices alike, independently; now and then the largest."""
        config = self.config
        if config.largest_every and step % config.largest_every == 0:
            return dict.fromkeys(self.layers, LARGEST)
        random = Random(f"{config.seed}/path/{step}")
        return self.path_of(tuple(random.randrange(len(options)) for options in self.options))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The supernet's tensors."""
        return [group for part in self.parts.values() for group in parameter_groups(part, self.config.learning_rate)]

    def is_dead(self) -> bool:
        """True when the largest path changes nothing."""
        self.set_path(dict.fromkeys(self.layers, LARGEST))
        return all(is_dead(part) for part in self.parts.values())

    def save_adapter(self, folder: Path) -> None:
        """Nothing: the checkpoint holds the supernet, and the adapter is the winner's."""

    # -------------------------------------------------------------------------- judging structures

    def fitness(self, structure: Structure) -> float:
        """What the judge says, or minus the loss on what was held out."""
        self.set_path(self.path_of(structure))
        return self.judge(self) if self.judge else -self.held_out_loss()

    def conclude(self, run: Run, accelerator: Accelerator) -> str:
        """The search. Writes candidates.jsonl as it goes, then the winner as adapter, config, table and plot."""
        self.module.eval()
        known = read_answers(run)

        def evaluate(structures: list[Structure]) -> list[float]:
            share, answers = accelerator.num_processes, []
            for start in range(0, len(structures), share):
                chunk = structures[start : start + share]
                own = chunk[accelerator.process_index : accelerator.process_index + 1]
                found = [known[s] if s in known else self.fitness(s) for s in own]
                gathered = gather_object(found) if share > 1 else found
                for structure, fitness in zip(chunk, gathered, strict=True):
                    if structure not in known and accelerator.is_main_process:
                        append_answer(run, structure, self.space.cost(structure), fitness)
                    known[structure] = fitness
                answers += gathered
                wanted = run.take_requests() if accelerator.is_main_process else set()
                if any(gather_object(["stop" in wanted]) if share > 1 else ["stop" in wanted]):
                    raise SearchStopped
            return answers

        def report_generation(number: int, scores: dict[Structure, float]) -> None:
            best = rank_structures(scores)[0]
            text = (
                f"generation {number}/{self.config.generations}  {len(scores)} structures  {self.measure} {-scores[best]:.5f}  "
                f"{self.space.cost(best)} parameters"
            )
            if accelerator.is_main_process:
                print(text, flush=True)
                run.append_log(text)

        try:
            with ExitStack() as frozen:
                for part in self.parts.values():
                    frozen.enter_context(cache_pieces(part))
                scores = evolve(self.space, self.config, evaluate, report_generation)
        except SearchStopped:
            return "stopped"
        if accelerator.is_main_process:
            self.write_winner(run, scores)
        return "done"

    # -------------------------------------------------------------------------- the winner

    def write_winner(self, run: Run, scores: dict[Structure, float]) -> None:
        """The best structure as an adapter and as a config that trains again; the table and the plot of all."""
        best = rank_structures(scores)[0]
        path = self.path_of(best)
        for part in self.parts:
            own = {name.removeprefix(f"{part}."): c for name, c in path.items() if name.startswith(f"{part}.")}
            state = {}
            for name, choices in own.items():
                tensors = select_tensors(self.layers[f"{part}.{name}"].tensors("default"), choices)
                state |= {f"{name}.glora_{key}": value.detach().cpu().float().clone() for key, value in tensors.items()}
            (run.adapter / part).mkdir(parents=True, exist_ok=True)
            native.write_state(run.adapter / part, state, self.winner_config(own))
        self.save_facts(run.adapter)
        write_text(run.folder / "best.yaml", to_yaml(self.retraining(run, self.structure_options(path))))
        points = [(self.space.cost(s), -scores[s]) for s in scores]
        front = [(self.space.cost(s), -scores[s]) for s in pareto_front(scores, self.space)]
        sizes = {name: sum(self.cost(name, p, c) for p, c in zip(CHOICES, path[name], strict=True)) for name in path}
        write_report(run.folder, path, sizes, points, front, self.measure)

    def winner_config(self, path: dict[str, Choices]) -> GloraConfig:
        """The PEFT config of a structure, which names every layer."""
        config = self.config
        return GloraConfig(
            r=config.rank,
            target_modules=list(path),
            form=config.form,
            a_rate=config.a_rate,
            structure={name: ",".join(choices) for name, choices in path.items()},
        )

    def structure_options(self, path: dict[str, Choices]) -> dict[str, str]:
        """The adapter options that say a structure."""
        short = {name.split(".", 1)[1]: ",".join(choices) for name, choices in path.items()}
        return {"structure": json.dumps(short), "form": self.config.form, "a_rate": str(self.config.a_rate)}


class SearchStopped(Exception):
    """The search was asked to stop."""


def read_answers(run: Run) -> dict[Structure, float]:
    """The fitness of every structure that was judged before."""
    known: dict[Structure, float] = {}
    for line in run.candidates.read_text(encoding="utf-8").splitlines() if run.candidates.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that a killed process left half written
        known[tuple(row["structure"])] = row["fitness"]
    return known


def append_answer(run: Run, structure: Structure, parameters: int, fitness: float) -> None:
    """Writes one answer down."""
    row = {"structure": structure, "parameters": parameters, "fitness": fitness}
    append_line(run.candidates, json.dumps(row))
