"""Judging no longer than it takes: rows are judged in rounds, and a candidate that is surely behind its rival is given up.

All candidates are judged on the same rows (common random numbers), so what tells them apart is the difference row by row, which
varies far less than the losses do. After Maron and Moore 1993, "Hoeffding Races", with paired differences and their standard error
in place of the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

FIRST_ROWS = 8  # of the first round; each further round doubles what has been judged
SURE = 3.0  # standard errors between a candidate and its rival before it is given up


def raced(
    losses_at: Callable[[slice], torch.Tensor], rows: int, rival: torch.Tensor | None
) -> tuple[float, torch.Tensor | None]:
    """Mean loss of a candidate, and its loss on each row, (rows,); None in their place when it was given up.

    The mean of one that was given up is its rival's mean plus the mean difference on the rows that both were judged on.

    losses_at: the candidate's losses on a slice of the rows, each exactly once, in order.
    rival: losses (rows,) of what is to be beaten; None to judge all rows.
    """
    losses = torch.empty(0, dtype=torch.float64)
    for part in rounds(rows):
        losses = torch.cat([losses, losses_at(part).double().cpu()])
        if rival is None or part.stop == rows:
            continue
        behind = losses - rival[: part.stop]
        if behind.mean() > SURE * behind.std() / len(behind) ** 0.5:
            return float(rival.mean() + behind.mean()), None
    return float(losses.mean()), losses


def rounds(rows: int) -> Iterator[slice]:
    """Slices that together are all rows, each as long as all before it."""
    start, stop = 0, min(FIRST_ROWS, rows)
    while start < rows:
        yield slice(start, stop)
        start, stop = stop, min(2 * stop, rows)
