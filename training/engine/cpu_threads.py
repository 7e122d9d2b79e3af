"""Notices when steps on a CPU take many times what they took, since another program has taken a core of ours."""

from __future__ import annotations

import torch

from ...toolkit.core import devices

SLOW_FACTOR = (
    6  # times the quickest step: small models with a core taken become twenty times slower, no step does so by itself
)
SLOW_STEPS = 3  # so many in a row


class ThreadController:
    """How long steps take, and with how many threads they go on."""

    def __init__(self) -> None:
        self.quickest, self.num_slow, self.limit = float("inf"), 0, SLOW_FACTOR

    def update(self, seconds: float) -> int:
        """To be told of each step; how many threads the next ones shall have, 0 for as many as now."""
        self.quickest = min(self.quickest, seconds)
        self.num_slow = self.num_slow + 1 if seconds > self.limit * self.quickest else 0
        if self.num_slow < SLOW_STEPS or torch.get_num_threads() == 1:
            return 0
        self.num_slow = 0
        free = devices.num_free_threads(devices.num_busy_cores())
        if free < torch.get_num_threads():
            return free
        self.limit *= 2  # steps of this run differ as much by themselves; a look takes time
        return 0
