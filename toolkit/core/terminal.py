"""What stands on the terminal: our own words, in whatever letters it has; the libraries' only under --verbose, or before a traceback.

Libraries print, warn and log when they are imported and used, about matters that no user has caused. Their C++ is told to be silent in
the environment, their logs below an error are turned off, and of what is written to stdout and stderr only that goes through which
modules of ours write, or those that write for us.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

from .errors import UserError
from .out_of_memory import general_advice, is_out_of_memory, to_out_of_memory
from .system_faults import to_user_error

VERBOSE, SILENT = "RANKFOLD_VERBOSE", "RANKFOLD_SILENT"  # for the processes that a command starts: which of both it is
QUIET = {
    "PYTHONWARNINGS": "ignore",  # of processes that are started; in this one warnings are held back
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "GLOG_minloglevel": "2",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_SYMLINKS_WARNING": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DIFFUSERS_VERBOSITY": "error",
}
SETTINGS = {
    "PYTORCH_ENABLE_MPS_FALLBACK": "1",  # read when torch is imported
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Ours; what writes for us; faults; what asks the user something.
HEARD_MODULES = (
    *("rankfold", "__main__", "rich", "tyro", "argparse"),
    *("traceback", "threading", "logging", "multiprocessing"),
    *("wandb", "click", "getpass", "pdb", "bdb", "cmd"),
)
MAX_HELD_LINES = 50  # lines that are held back for a traceback


@contextmanager
def report_errors(*, verbose: bool = False) -> Iterator[None]:
    """Within, our own words stand alone, and what a user can cause ends the program in one sentence.

    Exit codes: 2 a mistake, a lack of memory, or what the system refuses; 130 interrupted. verbose: let the libraries speak.

    Output that cannot be written ends nothing. Afterwards it is an error, but for a reader that has gone, as `| head` does.
    """
    open_standard_streams()
    replace_unencodable()
    plain = (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = streams = (LastingStream(plain[0]), LastingStream(plain[1]))  # type: ignore[assignment]
    try:
        with own_output_only(verbose=verbose or VERBOSE in os.environ):
            yield
        streams[0].flush()
        if (fault := streams[0].fault) is not None and fault.errno not in (errno.EPIPE, errno.EIO):
            raise UserError(f"Not all output could be written: {fault.strerror or fault}. All else was done.")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if is_out_of_memory(error):
            error = to_out_of_memory(error, "this was done", general_advice)
        told = to_user_error(error)
        if told is None:
            raise
        print(f"rankfold: {told}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        for stream in streams:
            stream.flush()
        if (sys.stdout, sys.stderr) == streams:
            sys.stdout, sys.stderr = plain


def open_standard_streams() -> None:
    """Opens what was closed (`>&-`) as a hole: else the next file that is opened would get its number, and what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115


class LastingStream:
    """A stream whose writer goes on when nothing can be written any more: the disk is full, the reader or the terminal is gone."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.fault: OSError | None = None
        """Why nothing more is written."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Writes as the stream does, or not at all."""
        self.attempt(lambda: self.stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """The same of several."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Flushes it, if it can be."""
        self.attempt(self.stream.flush)

    def attempt(self, action: Callable[[], Any]) -> None:
        """Does it unless it has failed before."""
        if self.fault is not None:
            return
        try:
            action()
        except OSError as error:
            self.fault = error
            self.let_go()

    def let_go(self) -> None:
        """Sends what still waits in its buffer, and all that comes, nowhere: Python would fail on it when it ends."""
        try:
            hole = os.open(os.devnull, os.O_WRONLY)
            os.dup2(hole, self.stream.fileno())
            os.close(hole)
        except (OSError, ValueError):
            return


def replace_unencodable() -> None:
    """Prints ? for a letter that the console's encoding lacks (cp1252, ASCII), instead of a UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def quiet_libraries(environment: MutableMapping[str, str]) -> None:
    """Asks the libraries for silence, as far as they can be asked; before they are imported."""
    for name, value in (QUIET | SETTINGS).items():
        environment.setdefault(name, value)


@contextmanager
def own_output_only(*, verbose: bool = False) -> Iterator[None]:
    """Within, the libraries are not heard. What they said last is shown when it ends in a fault that nobody foresaw."""
    before = dict(os.environ)
    if verbose:
        os.environ[VERBOSE] = "1"
        os.environ.update({name: value for name, value in SETTINGS.items() if name not in before})
        try:
            yield
        finally:
            restore_environment(before)
        return
    quiet_libraries(os.environ)
    os.environ[SILENT] = "1"
    held: deque[str] = deque(maxlen=MAX_HELD_LINES)
    plain, threshold = (sys.stdout, sys.stderr), logging.root.manager.disable
    sys.stdout, sys.stderr = own = (OwnOutput(plain[0], held), OwnOutput(plain[1], held))  # type: ignore[assignment]
    logging.disable(max(threshold, logging.WARNING))
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error) and to_user_error(error) is None:
            print_held(held, plain[1])
        raise
    finally:
        logging.disable(threshold)
        if (sys.stdout, sys.stderr) == own:
            sys.stdout, sys.stderr = plain
        restore_environment(before)


def restore_environment(environment: dict[str, str]) -> None:
    """Takes back what was added to the environment: whoever called us from a program of his own has not asked for it."""
    for name in (*QUIET, *SETTINGS, VERBOSE, SILENT):
        if name not in environment:
            os.environ.pop(name, None)


class OwnOutput:
    """A stream that lets through what `HEARD_MODULES` modules write, and holds back the rest."""

    def __init__(self, stream: TextIO, held: deque[str]) -> None:
        self.stream, self.held = stream, held

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Writes as the stream does, or not at all."""
        self.forward_or_hold(text, writing_module())
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """The same of several."""
        self.forward_or_hold("".join(lines), writing_module())

    def forward_or_hold(self, text: str, writer: str) -> None:
        """Lets through or holds back what a module writes; a bar of tqdm's is of no use later."""
        if writer.split(".")[0] in HEARD_MODULES:
            self.stream.write(text)
        elif text.strip() and not writer.startswith("tqdm"):
            self.held.append(text.rstrip("\n"))


def writing_module() -> str:
    """The module that calls the caller of this; '__main__' where it is the interpreter itself, as with a traceback.

    While rich draws a bar, what anybody prints goes through a stream of its own: then whose print it was counts.
    """
    try:
        frame = sys._getframe(2)
    except ValueError:
        return "__main__"
    first = module_of(frame)
    while first.startswith("rich") and frame is not None:
        if module_of(frame) == "rich.file_proxy":
            return module_of(frame.f_back)
        frame = frame.f_back
    return first


def module_of(frame: FrameType | None) -> str:
    """The name of a frame's module."""
    return frame.f_globals.get("__name__", "__main__") if frame else "__main__"


def print_held(held: deque[str], stream: TextIO) -> None:
    """What the libraries said, before the traceback of what it may be about."""
    if held:
        print("rankfold: the libraries said last:", *(f"  {line}" for line in held), sep="\n", file=stream)


if (
    "multiprocessing.spawn" in sys.modules and SILENT in os.environ
):  # spawned to read images ahead: for as long as it lives
    silence = own_output_only()
    silence.__enter__()
