"""`rankfold app`: the studio in the browser."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from ...toolkit.core.errors import UserError
from .options import parse_options

MAX_UPLOAD = "512mb"


@dataclass(frozen=True)
class AppOptions:
    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own asks for --user and a password."""
    port: Annotated[int, Ge(1), Le(65535)] = 7860
    """Port."""
    runs: Path = Path("runs")
    """Folder with the runs."""
    user: str = ""
    """Name to log in with; the password is read from $RANKFOLD_PASSWORD."""
    readable: tuple[Path, ...] = ()
    """Folders that images and models may be taken from by typing their path; unset means the current one, on this machine only."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that the studio may be called by in the browser, as behind a proxy; localhost, this machine's name and numbers always are."""
    device: str = "0"
    """Number of the GPU for runs that are started here."""
    worker: bool = True
    """Start a worker when a run is started; --no-worker leaves them to `rankfold work`."""


def app(argv: list[str]) -> None:
    options = parse_options(AppOptions, argv, "app")
    password = os.environ.get("RANKFOLD_PASSWORD", "")
    check_access(options, password)
    from ...training.launch.queue import check_runs_folder

    check_runs_folder(options.runs)
    check_port(options.host, options.port)
    demo, settings = prepare_launch(options, password)
    address = f"http://{options.host}:{options.port}"
    print(f"The studio is at {address}  (runs in {options.runs}; Ctrl-C ends it, not the runs)")
    demo.launch(**settings)


def check_access(options: AppOptions, password: str) -> None:
    """Raises UserError when others could reach the studio without a password."""
    if options.user and not password:
        raise UserError("--user needs a password: put it into the environment variable RANKFOLD_PASSWORD.")
    if not is_this_machine(options.host) and not options.user:
        raise UserError(
            f"--host {options.host} can be reached from other machines, so it asks for a login: give --user NAME and put the "
            "password into the environment variable RANKFOLD_PASSWORD."
        )
    if options.user and len(password) < 8:
        raise UserError("The password in RANKFOLD_PASSWORD is shorter than 8 characters: take a longer one.")


def check_port(host: str, port: int) -> None:
    """Raises UserError when nothing can listen there, before anything heavy is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as wanted:
        wanted.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            wanted.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"Nothing can listen on {host}, port {port} ({error}): choose another --port, or another --host."
            ) from error


def is_this_machine(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def prepare_launch(options: AppOptions, password: str) -> tuple[Any, dict[str, Any]]:
    """The app and how it is launched."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from starlette.middleware import Middleware

    from ...training.runs.library import library_folder
    from ..studio.backend.context import Studio
    from ..studio.backend.guard import Guard, login
    from ..studio.backend.paths import StudioPaths
    from ..studio.backend.temporary import make_temporary_folder
    from ..studio.build import build
    from ..studio.render.style import CSS, HEAD, theme

    temporary = make_temporary_folder()
    here = (Path.cwd(),) if is_this_machine(options.host) else ()
    places = StudioPaths(options.runs.resolve(), options.readable or here)
    studio = Studio(places, options.device, options.worker)
    settings: dict[str, Any] = {
        "server_name": options.host,
        "server_port": options.port,
        "app_kwargs": {"middleware": [Middleware(Guard, hosts=options.allowed_hosts, temporary=temporary)]},
        "auth": login(options.user, password) if options.user else None,
        "auth_message": "rankfold",
        "allowed_paths": [str(places.runs), str(library_folder().resolve())],
        "max_file_size": MAX_UPLOAD,
        "theme": theme(),
        "css": CSS,
        "head": HEAD,
        "share": False,
        "ssr_mode": False,
        "quiet": True,
        "show_error": True,
        "run_history": False,
        "footer_links": ["api", "settings"],
        "max_threads": 40,
    }
    return build(studio).queue(default_concurrency_limit=8), settings
