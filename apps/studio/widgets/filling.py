"""Boxes that a page fills by itself: never one that somebody has begun to fill meanwhile.

What is put into a box is decided in the browser, where it is known what stands in it at that moment.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
from pydantic import BaseModel

from ..render.messages import show_errors
from .actions import beside

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
# kept: a list for each box, empty or with its value. A box is somebody's own when it holds another value than it was built with, or is
# a list that is being typed into, whose value follows when it is left.
FILL = """(kept, ...now) => {
  const built = %s, ids = %s, leave = {__type__: "update"};
  const plain = (value) => value === null || value === undefined ? "" : typeof value === "string" ? value.trim()
    : JSON.stringify(value.data || value);
  const typing = (id) => {
    const at = document.activeElement;
    return id && at && at.matches("input[role=listbox]") && at.value && at.closest("#" + CSS.escape(id));
  };
  const fits = Array.isArray(kept) && kept.length === now.length;
  return now.map((value, n) => !fits || !kept[n].length || plain(value) !== plain(built[n]) || typing(ids[n]) ? leave : kept[n][0]);
}"""
SUGGEST = """(names, now) => Array.isArray(names) && now === names[0] ? names[1] : {__type__: "update"}"""

# given: a list, empty or with a text; last: what the page itself put there.
SUGGEST_TEXT = """(given, now, last) => Array.isArray(given) && given.length && [last, ""].includes(now.trim())
  ? [given[0], given[0]] : [{__type__: "update"}, last]"""


def to_browser(box: Any, value: Any) -> Any:
    """A box's value as the browser has it."""
    found = box.postprocess(value)
    return found.model_dump() if isinstance(found, BaseModel) else found


def fill_script(boxes: Sequence[Any]) -> str:
    """What fills the boxes in the browser."""
    built = [to_browser(box, None if callable(box.value) else box.value) for box in boxes]
    return FILL % (json.dumps(built), json.dumps([box.elem_id for box in boxes]))


def split_value(box: Any, given: Any) -> tuple[list[Any], Any]:
    """The value that an update has for a box, in a list, empty where it has none; and the update without it."""
    if isinstance(given, gr.blocks.Block):
        given = gr.update(**given.constructor_args)
    if not isinstance(given, dict) or given.get("__type__") != "update":
        return [to_browser(box, given)], gr.skip()
    rest = {key: value for key, value in given.items() if key != "value"}
    return [to_browser(box, given["value"])] if "value" in given else [], rest


def fill_on_load(
    function: Callable[..., Any], inputs: Any, boxes: Sequence[Any], others: Sequence[Any], said: Any = None
) -> Any:
    """Fills a page's boxes when it has loaded, but for those that somebody has begun to fill. Returns the event.

    function: gives a value, or an update, for each of the boxes, then for each of the others. said: the one of the others in which a
    mistake is said; without it, it is a toast.
    """
    boxes, others = list(boxes), list(others)
    carried = gr.JSON(visible=False, label="Values that a page fills in")

    @functools.wraps(function)
    def split(*given: Any) -> tuple[Any, ...]:
        found = function(*given)
        found = found if len(boxes) + len(others) > 1 else (found,)
        parts = [split_value(box, one) for box, one in zip(boxes, found[: len(boxes)], strict=True)]
        return [value for value, _ in parts], *(rest for _, rest in parts), *found[len(boxes) :]

    outputs = [carried, *boxes, *others]
    place = next((number for number, one in enumerate(outputs) if one is said), 0)
    handler = beside(split, place, len(outputs)) if said is not None else show_errors(split)
    event = gr.context.Context.root_block.load(handler, inputs, outputs, **QUIET)
    return event.then(None, [carried, *boxes], boxes, js=fill_script(boxes), **QUIET)


def suggest_next(event: Any, names: Any, box: Any) -> None:
    """After an event: the name that is free next, where the box still holds the one that was taken. names: JSON with both."""
    event.then(None, [names, box], box, js=SUGGEST, **QUIET)


def suggest_text(event: Any, given: Any, box: Any) -> Any:
    """After an event: the text that is given, where the box is empty or holds what the page put there.

    given: JSON, a list of one text or none.
    """
    last = gr.Textbox(box.value, visible=False, label="What the page put there")
    return event.then(None, [given, box, last], [box, last], js=SUGGEST_TEXT, **QUIET)


def keep_draft(page: str, boxes: Sequence[Any]) -> None:
    """Keeps the boxes of a page in the browser, and fills them again when it loads."""
    boxes = list(boxes)
    draft = gr.BrowserState(None, storage_key=f"rankfold-{page}", secret="rankfold")
    fill = f"(kept, ...now) => ({fill_script(boxes)})(Array.isArray(kept) ? kept.map((one) => [one]) : kept, ...now)"
    gr.context.Context.root_block.load(None, [draft, *boxes], boxes, js=fill, **QUIET)
    gr.on([box.change for box in boxes], None, boxes, draft, js="(...values) => [values]", **QUIET)
