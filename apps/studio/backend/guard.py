"""Who may talk to the studio: addresses it answers to, pages that may send to it, and logins.

A page of a stranger that is open in the same browser must neither read nor write here, whatever name it gives this machine.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
import time
from collections.abc import Callable, Collection
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

PATIENCE, PAUSE = 10, 60.0  # wrong passwords of an address before it has to wait, seconds
FILE_ROUTE = "/file="
SERVED_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".safetensors", ".zip")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
ANSWER_HEADERS = {
    "content-security-policy": POLICY,  # nothing comes from other machines, and no page shows this one in a frame
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
}
client_address: ContextVar[str] = ContextVar("client_address", default="")


class Guard:
    """ASGI middleware that answers only to known hosts, refuses what other sites send, and adds headers to each answer."""

    def __init__(self, app: Any, hosts: Collection[str] = (), temporary: Path | None = None) -> None:
        """hosts: names beside localhost and this machine's own that the studio is called by; addresses in numbers always are.

        temporary: the folder of which every file is served; of others only images, adapters and archives are.
        """
        self.temporary = temporary
        self.app, self.hosts = app, {name.lower() for name in (*hosts, "localhost", socket.gethostname())}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if fault := self.fault(scope["method"] if scope["type"] == "http" else "", Headers(scope=scope)):
            await PlainTextResponse(fault, 403)(scope, receive, send)
            return
        if not self.is_served(scope["path"]):
            await PlainTextResponse("The studio does not serve such files.", 403)(scope, receive, send)
            return
        client_address.set((scope.get("client") or ("",))[0])

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": guarded_headers(message.get("headers", ()))}
            await send(message)

        await self.app(scope, receive, send_guarded)

    def fault(self, method: str, headers: Headers) -> str:
        """Why a request is refused, a sentence; '' for nothing."""
        host = headers.get("host", "")
        if not self.is_known(host):
            return (
                f"The studio does not answer to the name {host[:100]!r}: call it by its address, or start it with --allowed-hosts "
                "and this name."
            )
        origin = headers.get("origin")
        if method not in SAFE_METHODS and origin is not None and urlsplit(origin).netloc != host:
            return "Another site has sent this, and may not."
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return "Another site has asked for this, and may not."
        if method not in SAFE_METHODS and headers.get("sec-fetch-site") == "cross-site":
            return "Another site has sent this, and may not."
        return ""

    def is_served(self, path: str) -> bool:
        """Whether a file may be asked for by this path: logs and settings of runs are shown on pages, without secrets."""
        _, mark, file = path.partition(FILE_ROUTE)
        if not mark or Path(file).suffix.lower() in SERVED_SUFFIXES:
            return True
        return self.temporary is not None and Path(file).resolve().is_relative_to(self.temporary.resolve())

    def is_known(self, host: str) -> bool:
        """Whether a Host header names this studio. A number cannot be made to point elsewhere, as a name can (DNS rebinding)."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.hosts or is_number(name)


def is_number(name: str) -> bool:
    """Whether a host is an address in numbers."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def guarded_headers(raw: Any) -> list[tuple[bytes, bytes]]:
    """The headers of an answer with ours; cookies stay on this site."""
    headers = MutableHeaders(raw=[(key, lax(value) if key.lower() == b"set-cookie" else value) for key, value in raw])
    for name, value in ANSWER_HEADERS.items():
        headers[name] = value
    return headers.raw


def lax(cookie: bytes) -> bytes:
    """A cookie that other sites' requests do not carry."""
    kept = [part for part in cookie.split(b";") if not part.strip().lower().startswith(b"samesite")]
    return b";".join([*kept, b" SameSite=Lax"])


def login(user: str, password: str, clock: Callable[[], float] = time.monotonic) -> Callable[[str, str], bool]:
    """Checks a name and a password, in the same time for all. An address with ten wrong ones has to wait a minute, and is told."""
    wrong: dict[str, list[float]] = {}

    def check(name: str, word: str) -> bool:
        address, now = client_address.get(), clock()
        for known, moments in list(wrong.items()):
            wrong[known] = [moment for moment in moments if now - moment < PAUSE]
            if not wrong[known]:
                del wrong[known]
        if len(wrong.get(address, ())) >= PATIENCE:
            left = PAUSE - (now - wrong[address][0])
            raise HTTPException(429, f"Too many wrong passwords from this address: try again in {left:.0f} seconds.")
        good = hmac.compare_digest(name.encode(), user.encode()) & hmac.compare_digest(word.encode(), password.encode())
        if not good:
            wrong.setdefault(address, []).append(now)
        return bool(good)

    return check
