"""What structures were found to be worth, written down one by one, so that a stopped search asks none twice."""

from __future__ import annotations

import json

from ...toolkit.core.files import append_line
from ...toolkit.core.run_folder import Run
from .evolution import Structure


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
