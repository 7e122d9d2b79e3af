"""Commands of rankfold in processes of their own that have everything imported when they begin, which else takes longer than a short run.

They are forked from a server that has imported it and done nothing else, so they can be killed as any process can.
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path

IMPORTED = [
    "rankfold.apps.cli",
    "rankfold.training.subject",
    "rankfold.training.instruct",
    "rankfold.training.search_subject",
]

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(IMPORTED)


def started(action, log, **environment):
    """A process that carries out an action and writes what it says to a file."""
    process = SERVER.Process(target=carry_out, args=(action, log, dict(os.environ) | environment))
    process.start()
    return process


def commands(*lines: list[str]) -> Callable[[], None]:
    """The action that carries out commands, one after another."""
    return partial(in_turn, lines)


def in_turn(lines: Sequence[list[str]]) -> None:
    from rankfold.apps.cli import main

    for words in lines:
        main(words)


def carry_out(action: Callable[[], None], log: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with log.open("w", buffering=1) as said:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(said.fileno(), stream.fileno())
        action()
