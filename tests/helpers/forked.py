"""Commands of rankfold in processes of their own that have everything imported when they begin, which else takes longer than a short run.

They are forked from a server that has imported it and done nothing else, so they can be killed as any process can.
"""

import os
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path

IMPORTED = [
    "rankfold.apps.cli",
    "rankfold.training.subject.task",
    "rankfold.training.instruct.task",
    "rankfold.training.search.subject",
]

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(IMPORTED)


def start_process(action, log, **environment):
    """A process that carries out an action and writes what it says to a file."""
    process = SERVER.Process(target=carry_out, args=(action, log, dict(os.environ) | environment))
    process.start()
    return process


def commands(*lines: list[str]) -> Callable[[], None]:
    """The action that carries out commands, one after another."""
    return partial(run_in_turn, lines)


def run_in_turn(lines: Sequence[list[str]]) -> None:
    from rankfold.apps.cli import main

    for words in lines:
        main(words)


def carry_out(action: Callable[[], None], log: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with log.open("w", encoding="utf-8", buffering=1) as said:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(said.fileno(), stream.fileno())
        action()


def free_port():
    with socket.socket() as free:  # tests run beside each other
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_in_two_processes(folder, *lines):
    """Commands in two processes, one after another."""
    in_two_processes(commands(*lines), folder)


def in_two_processes(action, folder):
    """An action in two processes, in an environment as a launcher gives it; logs are written to the folder."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    common |= {"ACCELERATE_USE_CPU": "true"}
    both = [
        start_process(action, folder / f"said{rank}.txt", RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(2)
    ]
    for process in both:
        process.join()
    said = "".join((folder / f"said{rank}.txt").read_text(encoding="utf-8")[-6000:] for rank in range(2))
    assert [process.exitcode for process in both] == [0, 0], said
