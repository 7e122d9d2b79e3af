"""Commands of rankfold in processes of their own that have everything imported when they begin, which else takes longer than a short run.

They are forked from a server that has imported it and done nothing else, so they can be killed as any process can.
"""

import os
import sys
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


def started(commands, log, **environment):
    """A process that carries out commands (lists of words) one after another and writes what it says to a file."""
    process = SERVER.Process(target=carry_out, args=(commands, log, dict(os.environ) | environment))
    process.start()
    return process


def carry_out(commands: list[list[str]], log: Path, environment: dict[str, str]) -> None:
    from rankfold.apps.cli import main

    os.environ.clear()
    os.environ.update(environment)
    with log.open("w", buffering=1) as said:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(said.fileno(), stream.fileno())
        for words in commands:
            main(words)
