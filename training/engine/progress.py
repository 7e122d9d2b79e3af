"""The live line of a training run: step, loss, samples per second, time left, memory."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ...toolkit.core.devices import peak_memory
from ..config.base import LoopConfig


def peak_memory_gib() -> float:
    """Peak memory of this process so far, GiB: the device's when there is one, else resident memory."""
    return peak_memory() / 2**30


class Progress:
    """A bar on a terminal, a line per log step elsewhere."""

    def __init__(self, config: LoopConfig, *, enabled: bool) -> None:
        self.console = Console(stderr=True, quiet=not enabled)
        self.live = self.console.is_terminal and enabled
        self.total = config.steps
        self.samples = config.samples
        columns = (
            "training",
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        self.bar = RichProgress(*columns, console=self.console, disable=not self.live)
        self.task = self.bar.add_task("", total=self.total, text="")

    def begin(self, step: int) -> None:
        """Counts from a step on, whose time is now."""
        self.bar.reset(self.task, completed=step, text="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """Shows a sentence above the bar."""
        self.console.print(text, highlight=False, markup=False)

    def update(self, step: int, loss: float, speed: float) -> str:
        """Shows a log line and returns it; `speed` in samples per second."""
        text = f"loss {loss:.4f}  {speed:.1f} {self.samples}/s  {peak_memory_gib():.2f} GiB"
        self.bar.update(self.task, completed=step, text=text)
        if not self.live:
            self.console.print(f"step {step}/{self.total}  {text}", highlight=False)
        return f"step {step}/{self.total}  {text}"
