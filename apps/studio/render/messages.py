"""What every page shares: errors in one sentence, small pieces of HTML."""

from __future__ import annotations

import functools
import html
import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from ....toolkit.core.errors import UserError
from ....toolkit.core.out_of_memory import general_advice, is_out_of_memory, to_out_of_memory
from ....toolkit.core.system_faults import to_user_error

log = logging.getLogger(__name__)
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*[a-z0-9])")
SECRETS = (  # what shows itself to be one: tokens of hubs and clouds, keys in headers, addresses and settings
    (re.compile(r"\b(hf_|ghp_|gho_|ghs_|github_pat_|glpat-|xox[abp]-)[A-Za-z0-9_-]{8,}"), r"\1..."),
    (re.compile(r"\b(sk-|AKIA)[A-Za-z0-9_-]{16,}"), r"\1..."),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"), r"\1 ..."),
    (re.compile(r"(://[^/\s:@]+:)[^/\s@]+@"), r"\1...@"),
    (
        re.compile(
            r"(?i)\b(\w*(?:password|passwd|secret|api_?key|access_?key|auth_?token|hf_token|hub_token))(\s*[=:]\s*)(?!hf_\.)\S+"
        ),
        r"\1\2...",
    ),
)  # fmt: skip
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL")


def describe_error(error: Exception, where: str) -> str:
    """An error as one sentence, plain text; what nobody foresaw goes to the log with its traceback. where: name of what failed."""
    if is_out_of_memory(error):
        log.error("%s lacked memory", where, exc_info=error)
        error = to_out_of_memory(error, "this was done", general_advice)
    elif (told := to_user_error(error)) is not None:
        error = told
    if not isinstance(error, UserError):
        log.error("%s failed", where, exc_info=error)
    text = str(error) if isinstance(error, UserError) else f"That did not work: {type(error).__name__}: {error}"
    return name_settings(redact_secrets(text))


def show_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """The handler with its errors as one sentence for programs that call it, and as a toast where a page does."""

    def said(error: Exception) -> gr.Error:
        # a toast shows HTML, and what is in it may come from a file or an address
        shown = html.escape(describe_error(error, function.__name__), quote=False)
        return gr.Error(shown, duration=None, print_exception=False, title="Not done")

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def stream(*args: Any) -> Iterator[Any]:
            try:
                yield from function(*args)
            except gr.Error:
                raise
            except Exception as error:
                raise said(error) from None

        return stream

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except gr.Error:
            raise
        except Exception as error:
            raise said(error) from None

    return call


def redact_secrets(text: str) -> str:
    """The text with what looks like a secret blotted out, and with the secrets in this process's environment."""
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name.upper()) and len(value) >= 8:
            text = text.replace(value, "...")
    for pattern, rest in SECRETS:
        text = pattern.sub(rest, text)
    return text


def name_settings(text: str) -> str:
    """A sentence with settings by the words of the forms instead of by their flags; commands, which stand in backticks, as they are."""
    parts = text.split("`")
    parts[::2] = [FLAG.sub(lambda match: f"“{match[1].replace('-', ' ')}”", part) for part in parts[::2]]
    return "`".join(parts)


def message_html(text: str, kind: str = "note") -> str:
    """A line of plain text as HTML; of a fault, settings by the words of the forms."""
    role = ' role="alert"' if kind == "fault" else ""
    shown = html.escape(name_settings(text) if kind == "fault" else text)
    return f'<p class="{kind}"{role}>{shown}</p>' if text else ""


def progress_bar(share: float, ahead: int = 0) -> str:
    """A bar; ahead: how many others come first."""
    bar = f'<progress max="1" value="{share:.3f}" aria-label="drawn so far"></progress>'
    return bar + (message_html(f"Waiting for its turn: {ahead} before this one.") if ahead else "")


def format_duration(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
