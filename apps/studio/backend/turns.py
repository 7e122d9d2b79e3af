"""Whose turn it is at the device: clients in a circle, so that many calls of one do not keep another waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from gradio.context import LocalContext

from ....toolkit.core.errors import UserError

MAX_OF_PAGE, MAX_OF_ADDRESS, MAX_OF_ALL = 4, 24, 36  # calls that wait or are at work
POLL_SECONDS = 0.2
STALE_SECONDS = 30.0  # without a question after which a call that waits is given up


@dataclass(frozen=True)
class Client:
    """Who asks: an address, and a page or program at it."""

    address: str = ""
    page: str = ""


def calling_client() -> Client:
    """Who has called the handler that is at work."""
    request = LocalContext.request.get(None)
    if request is None:
        return Client()
    return Client(request.client.host if request.client else "", request.session_hash or "")


@dataclass(eq=False)
class Turn:
    """One call's place."""

    client: Client
    asked: float = field(default_factory=time.monotonic)
    """When it last asked whether it is its turn."""


class Turns:
    """The calls that wait for one device."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.waiting: list[Turn] = []
        self.at_work: Turn | None = None
        self.served: list[Client] = []  # who was at work, the latest last

    @contextmanager
    def take(self, client: Client) -> Iterator[Turn]:
        """A place among those who wait; left at the end, whether its turn has come or not.

        Raises:
            UserError: when the client, its address, or all together have too many calls waiting.
        """
        turn = Turn(client)
        with self.lock:
            self.drop_stale()
            known = [one.client for one in (*self.waiting, *([self.at_work] if self.at_work else []))]
            counts = (known.count(client), sum(one.address == client.address for one in known), len(known))
            if any(
                count >= most for count, most in zip(counts, (MAX_OF_PAGE, MAX_OF_ADDRESS, MAX_OF_ALL), strict=True)
            ):
                whose = "You have" if counts[0] >= MAX_OF_PAGE else "There are"
                raise UserError(
                    f"{whose} {counts[0] or counts[2]} requests waiting already: wait until one is done, or stop one."
                )
            self.waiting.append(turn)
        try:
            yield turn
        finally:
            with self.lock:
                if turn in self.waiting:
                    self.waiting.remove(turn)
                if self.at_work is turn:
                    self.at_work = None

    def ahead(self, turn: Turn) -> int:
        """How many come before it; 0 when its turn has come, which it then has until it leaves."""
        with self.lock:
            turn.asked = time.monotonic()
            self.drop_stale()
            if self.at_work is turn:
                return 0
            if turn not in self.waiting:  # it was given up, and its page is back
                self.waiting.append(turn)
            order = self.order()
            if self.at_work is None and order[0] is turn:
                self.waiting.remove(turn)
                self.at_work = turn
                self.served = [*(one for one in self.served if one != turn.client), turn.client][-1000:]
                return 0
            return order.index(turn) + (self.at_work is not None)

    def order(self) -> list[Turn]:
        """Those who wait, in the order of their turns: whoever was served longest ago first, each client's calls a round apart."""
        rounds: dict[Client, int] = {}
        keys = {}
        for number, turn in enumerate(self.waiting):
            before = rounds[turn.client] = rounds.get(turn.client, -1) + 1
            last = self.served.index(turn.client) if turn.client in self.served else -1
            keys[turn] = (before, last, number)
        return sorted(self.waiting, key=keys.__getitem__)

    def drop_stale(self) -> None:
        """Gives up calls whose page is gone. Hold the lock."""
        now = time.monotonic()
        self.waiting = [turn for turn in self.waiting if now - turn.asked < STALE_SECONDS]

    @contextmanager
    def wait(self, client: Client) -> Iterator[None]:
        """Waits for the turn; within, the device is the caller's.

        Raises:
            UserError: see `take`.
        """
        with self.take(client) as turn:
            while self.ahead(turn):
                time.sleep(POLL_SECONDS)
            yield
