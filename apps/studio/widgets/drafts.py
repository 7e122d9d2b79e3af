"""What stands in the boxes of a page, kept in the browser, so that it is there again after a reload or a look at another page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}


def keep_draft(page: str, boxes: Sequence[Any], loaded: Any) -> None:
    """Keeps the boxes of a page, and fills them again after the page's own loading. loaded: the event of that."""
    draft = gr.BrowserState(None, storage_key=f"rankfold-{page}", secret="rankfold")

    def restore(kept: Any) -> list[Any]:
        whole = isinstance(kept, list) and len(kept) == len(boxes)
        return list(kept) if whole else [gr.skip() for _ in boxes]

    loaded.then(restore, draft, list(boxes), **QUIET)
    gr.on([box.change for box in boxes], None, list(boxes), draft, js="(...values) => [values]", **QUIET)
