"""What structures were found to be worth, written down one by one, so that a stopped search asks none twice."""

from __future__ import annotations

import json

from ...toolkit.core.files import append_line
from ...toolkit.core.records import is_number, read_rows
from ...toolkit.core.run_folder import Run
from .evolution import Structure


def read_answers(run: Run) -> dict[Structure, float]:
    """The fitness of every structure that was judged before."""
    known: dict[Structure, float] = {}
    for row in read_rows(run.candidates):
        structure, fitness = row.get("structure"), row.get("fitness")
        if isinstance(structure, list) and all(isinstance(gene, int) for gene in structure) and is_number(fitness):
            known[tuple(structure)] = float(fitness)  # type: ignore[arg-type]
    return known


def append_answer(run: Run, structure: Structure, parameters: int, fitness: float) -> None:
    """Writes one answer down."""
    row = {"structure": structure, "parameters": parameters, "fitness": fitness}
    append_line(run.candidates, json.dumps(row))
