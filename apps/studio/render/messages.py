"""What every page shares: errors in one sentence, small pieces of HTML."""

from __future__ import annotations

import functools
import html
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from ....toolkit.core.errors import UserError
from ....toolkit.core.out_of_memory import general_advice, is_out_of_memory, to_out_of_memory
from ....toolkit.core.system_faults import to_user_error

log = logging.getLogger(__name__)
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*[a-z0-9])")
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{8,}\b")


def show_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """The handler with its errors as one sentence on the page; what nobody foresaw goes to the log with its traceback."""

    def said(error: Exception) -> gr.Error:
        if is_out_of_memory(error):
            log.error("%s lacked memory", function.__name__, exc_info=error)
            error = to_out_of_memory(error, "this was done", general_advice)
        elif (told := to_user_error(error)) is not None:
            error = told
        if not isinstance(error, UserError):
            log.error("%s failed", function.__name__, exc_info=error)
        text = str(error) if isinstance(error, UserError) else f"That did not work: {type(error).__name__}: {error}"
        # a toast shows HTML, and what is in it may come from a file or an address
        shown = html.escape(name_settings(redact_secrets(text)), quote=False)
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
    """The text with tokens of the hub blotted out."""
    return SECRET.sub("hf_...", text)


def name_settings(text: str) -> str:
    """A sentence with settings by the words of the forms instead of by their flags; commands, which stand in backticks, as they are."""
    parts = text.split("`")
    parts[::2] = [FLAG.sub(lambda match: f"“{match[1].replace('-', ' ')}”", part) for part in parts[::2]]
    return "`".join(parts)


def message_html(text: str, kind: str = "note") -> str:
    """A line of plain text as HTML; of a fault, settings by the words of the forms."""
    return f'<p class="{kind}">{html.escape(name_settings(text) if kind == "fault" else text)}</p>' if text else ""


def progress_bar(share: float) -> str:
    """A bar."""
    return f'<progress max="1" value="{share:.3f}" aria-label="drawn so far"></progress>'


def format_duration(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
