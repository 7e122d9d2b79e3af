"""Buttons and what they do: an error stands beside its button and leaves everything else on the page as it is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from ..render.messages import describe_error, message_html, show_errors


def act(
    triggers: Any,
    function: Callable[..., Any],
    inputs: Any,
    outputs: Sequence[Any],
    said: Any,
    *,
    api_name: str | None = None,
    **settings: Any,
) -> Any:
    """What happens on a click: the function's values go to the outputs; a mistake is said in `said`, which is one of them.

    api_name: programs may call the same by this name, to whom a mistake is an error.
    """
    outputs = list(outputs)
    place = next(number for number, one in enumerate(outputs) if one is said)
    settings = {"show_progress": "hidden"} | settings
    triggers = [getattr(one, "click", one) for one in (triggers if isinstance(triggers, list) else [triggers])]
    event = gr.on(
        triggers, beside(function, place, len(outputs)), inputs, outputs, api_name=f"page-{function.__name__}",
        api_visibility="private", **settings,
    )  # fmt: skip
    if api_name:
        settings.pop("js", None)
        gr.on([], show_errors(function), inputs, outputs, api_name=api_name, **settings)
    return event


def named(function: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """The handler with names for its inputs, by which programs give those that they need: all others are as the page begins."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    own: Any = function
    own.__signature__ = inspect.Signature([inspect.Parameter(name, kind, default=None) for name in names])
    return own


def beside(function: Callable[..., Any], place: int, count: int) -> Callable[..., Any]:
    """The handler with an error as a sentence among its outputs, at `place`, and all others left as they are."""

    def shown(error: Exception) -> Any:
        values = [gr.skip()] * count
        values[place] = message_html(describe_error(error, function.__name__), "fault")
        return tuple(values) if count > 1 else values[0]

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def stream(*args: Any) -> Iterator[Any]:
            try:
                yield from function(*args)
            except Exception as error:
                yield shown(error)

        return stream

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            return shown(error)

    return call
