"""The first rows of a task's data, with what is learned in colour."""

from __future__ import annotations

import html
from collections.abc import Sequence

from ....toolkit.data.conversations import Conversation

ROWS, LETTERS = 5, 400


def rows_html(rows: Sequence[Conversation]) -> str:
    """The first rows as a table: what is asked, and what is learned."""
    lines = []
    for row in rows[:ROWS]:
        turns = "".join(turn_html(one, row.weight(number) > 0) for number, one in enumerate(row.messages))
        lines.append(f"<tr><td>{len(row.images)}</td><td>{turns}</td></tr>")
    return (
        f'<p class="note">{len(rows)} rows; the first {len(lines)}, with what is learned in colour:</p>'
        '<div class="scroll"><table class="rows"><thead><tr><th>images</th><th>conversation</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def turn_html(message: dict, learned: bool) -> str:
    """A turn, in colour where it is learned."""
    content = message.get("content", "")
    parts = content if isinstance(content, list) else [{"type": "text", "text": str(content)}]
    text = " ".join(part.get("text", "") if part.get("type") == "text" else f"[{part.get('type')}]" for part in parts)
    shown = html.escape(text[:LETTERS]) + ("..." if len(text) > LETTERS else "")
    return f"<p><mark>{shown}</mark></p>" if learned else f"<p>{shown}</p>"
