"""Chat: questions about a picture, answered by a vision-language model as the words come, and by its base beside it."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ....pipelines.chat import base_only, open_chat, stream
from ....toolkit.core.devices import device
from ....toolkit.core.errors import UserError
from ....toolkit.data.conversations import Conversation
from ....toolkit.data.images import load_rgb
from ....toolkit.diffusion.model import DTYPES
from ....toolkit.formats.source import content_hash, facts_of
from ....toolkit.vlm.model import EMBEDDED
from ..backend.context import Studio
from ..backend.paths import Places
from ..backend.pipeline_worker import Drawing, Loaded, Stopped, followed
from ..render.messages import note, plainly

MOST_TOKENS = 4096  # of an answer
SIDE = 320  # pixels of the picture on the page
WAITING = "Loading the model, or waiting for its turn."


# ---------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Answerer:
    """Who answers."""

    base: str
    adapter: Path | None = None
    precision: str = "fp32"


def answerer(places: Places, tuned: str | None, base: str | None, precision: str) -> Answerer:
    """Who the boxes mean. tuned: what a page calls an adapter; empty is the base alone. base: empty is the adapter's own.

    Raises:
        UserError: for an adapter that is not there, a base that may not be read, or an unknown precision.
    """
    if precision not in DTYPES:
        raise UserError(f"{precision!r} is no number format: choose one of {', '.join(DTYPES)}.")
    adapter = places.adapter(tuned, chat=True) if tuned else None
    own = facts_of(adapter).get("base") if adapter else None
    return Answerer(places.base(base or own or next(iter(EMBEDDED)), tuple(EMBEDDED)), adapter, precision)


@dataclass
class Said:
    """Answers so far; they grow while they are made."""

    tuned: str = ""
    base: str = ""


class Models:
    """Models that answer, one question at a time."""

    def __init__(self, loaded: Loaded | None = None) -> None:
        self.loaded = loaded or Loaded()

    def opened(self, who: Answerer) -> Any:
        """The model. Hold the lock."""
        key = (who.base, content_hash(who.adapter) if who.adapter else "", who.precision)
        return self.loaded.get(key, lambda: opened(who))

    def answer(
        self, who: Answerer, row: Conversation, said: Said, drawing: Drawing, *, compare: bool, most: int
    ) -> None:
        """Writes the answer into `said` word by word, the base's first when both are wanted.

        Raises:
            Stopped: when somebody wants it to end; no token is begun then.
            UserError: for a model that cannot be loaded, or a row that it cannot take.
        """
        with self.loaded.lock:
            if drawing.stopped:
                raise Stopped
            vision = self.opened(who)
            vision.chat.check_row(row)
            # Generation runs in a thread of its own and asks nobody: so each token asks, before it is made.
            hook = vision.model.register_forward_pre_hook(lambda *_: drawing.step())
            try:
                if compare:
                    with base_only(vision):
                        for piece in stream(vision, row, max_new_tokens=most):
                            said.base += piece
                for piece in stream(vision, row, max_new_tokens=most):
                    said.tuned += piece
            finally:
                hook.remove()


def opened(who: Answerer) -> Any:
    """The model with its adapter, and the chat template that it was trained with."""
    file = who.adapter / "chat_template.jinja" if who.adapter else None
    template = file.read_text(encoding="utf-8") if file is not None and file.is_file() else None
    adapters = [who.adapter] if who.adapter else []
    return open_chat(who.base, adapters, precision=who.precision, device=device(), template=template)


# ---------------------------------------------------------------------------------------------- the conversation


@dataclass(frozen=True)
class Talk:
    """A conversation so far: the picture belongs to its first question."""

    who: Answerer | None = None
    picture: str | None = None
    messages: tuple[dict[str, Any], ...] = field(default_factory=tuple)
    base_answers: tuple[str, ...] = ()
    """The base's answers to the same conversation, '' where it was not asked."""


def checked_question(question: str | None) -> str:
    """The question.

    Raises:
        UserError: when it is empty.
    """
    if not (question or "").strip():
        raise UserError("The question is empty: ask something, such as: What is in the picture?")
    return str(question).strip()


def checked_picture(picture: str | None) -> Image.Image | None:
    """The uploaded picture as the model sees it; None when there is none.

    Raises:
        UserError: when the file is no whole picture.
    """
    if not picture:
        return None
    path = Path(picture)
    try:
        return load_rgb(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from error  # where it was uploaded to helps nobody


def asked(talk: Talk, question: str) -> Conversation:
    """The conversation with one more question."""
    parts = [{"type": "image"}] if talk.picture and not talk.messages else []
    message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    pictures = (Path(talk.picture),) if talk.picture else ()
    return Conversation((*talk.messages, message), pictures, "the question")


def answered(talk: Talk, row: Conversation, said: Said) -> Talk:
    """The conversation with the question and its answer.

    Raises:
        UserError: when there is no answer.
    """
    if not said.tuned.strip():
        raise UserError("The model said nothing; nothing was added to the conversation. Ask in other words.")
    answer = {"role": "assistant", "content": [{"type": "text", "text": said.tuned.strip()}]}
    return replace(talk, messages=(*row.messages, answer), base_answers=(*talk.base_answers, said.base.strip()))


def ask(models: Models, talk: Talk, question: str, *, compare: bool, most: int) -> Iterator[Said | Talk]:
    """Yields the answers so far while they are made, and last the conversation with them."""
    row, said = asked(talk, question), Said()
    who: Any = talk.who
    both = compare and who.adapter is not None
    work = lambda drawing: models.answer(who, row, said, drawing, compare=both, most=most)  # noqa: E731
    for now in followed(work, most * (1 + both)):
        if isinstance(now, Drawing):
            yield replace(said)
    yield answered(talk, row, said)


def bubbles(talk: Talk, question: str = "", said: Said | None = None) -> tuple[list[Any], list[Any]]:
    """What the two columns show: the conversation, and the base's answers in it; last a question that is being answered."""
    texts = [part["text"] for message in talk.messages for part in message["content"] if part["type"] == "text"]
    own = [bubble("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]
    base = []
    for before, answer in zip(texts[::2], talk.base_answers, strict=True):
        base += [bubble("user", before), bubble("assistant", answer)] if answer else []
    for column, text in ((own, said.tuned if said else ""), (base, said.base if said else "")):
        column += [bubble("user", question)] if question else []
        column += [bubble("assistant", text)] if text else []
    return own, base


def bubble(role: str, text: str) -> dict[str, str]:
    """A message as Gradio has it, which takes text for HTML even where it is no Markdown."""
    return {"role": role, "content": html.escape(text, quote=False)}


# ---------------------------------------------------------------------------------------------- the page


def build(studio: Studio) -> None:
    """The page."""
    with gr.Row():
        with gr.Column(scale=1):
            tuned = gr.Dropdown(
                [], allow_custom_value=True, label="Tuned model", elem_id="chat-tuned", info="Empty: the base alone."
            )
            base = gr.Dropdown(
                ["", *EMBEDDED], value="", allow_custom_value=True, label="Base model", elem_id="chat-base",
                info=f"Empty: the tuned model's own, or {next(iter(EMBEDDED))}.",
            )  # fmt: skip
            picture = gr.File(label="Picture that the first question is about", elem_id="chat-picture", height=150)
            seen = gr.Image(
                label="As the model sees it", interactive=False, format="png", visible=False, height=220, buttons=["fullscreen"],
                elem_id="chat-seen",
            )  # fmt: skip
            compare = gr.Checkbox(label="also the base's answer", elem_id="chat-compare")
            with gr.Accordion("More", open=False):
                most = gr.Number(256, label="Most tokens of an answer", precision=0, minimum=1, elem_id="chat-most")
                precision = gr.Dropdown([*DTYPES], value="fp32", label="Number format", elem_id="chat-precision")
        with gr.Column(scale=3):
            with gr.Row():
                # Words of a model are no page: as Markdown they could ask other machines for pictures.
                looks: dict[str, Any] = {"render_markdown": False, "height": 420, "buttons": ["copy_all"]}
                own = gr.Chatbot(label="Answers", elem_id="chat-answers", **looks)
                other = gr.Chatbot(
                    label="The base's answers to the same", visible=False, elem_id="chat-base-answers", **looks
                )
            said = gr.HTML(label="Progress", elem_id="chat-said")
            question = gr.Textbox(label="Question", placeholder="What is in the picture?", elem_id="chat-question")
            with gr.Row():
                go = gr.Button("Ask", variant="primary", elem_id="chat-ask")
                stop = gr.Button("Stop", variant="stop", elem_id="chat-stop")
                new = gr.Button("New conversation", elem_id="chat-new")
    talk = gr.State(Talk())
    columns = [talk, own, other, said]
    wire_asking(studio, [tuned, base, picture, question, compare, most, precision], columns, (go, stop, new))
    wire_boxes(studio, tuned, base, precision, picture, seen, compare, columns)


def wire_asking(studio: Studio, boxes: list[Any], columns: list[Any], buttons: tuple[Any, Any, Any]) -> None:
    """Ask, stop, begin anew. boxes: in the order that `chat` takes them; columns: conversation, both answers, progress."""
    places, models = studio.places, Models(studio.loaded)
    go, stop, new = buttons
    talk, question = columns[0], boxes[3]

    @plainly
    def chat(before: Talk, tuned: str | None, base: str | None, picture: str | None, text: str, compare: bool,
             most: float, precision: str) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        text = checked_question(text)
        if not 1 <= (most or 0) <= MOST_TOKENS:
            raise UserError(f"The most tokens of an answer must lie between 1 and {MOST_TOKENS}, not {most}.")
        checked_picture(picture)
        who = answerer(places, tuned, base, precision)
        if (before.who, before.picture) != (who, picture or None):
            before = Talk(who, picture or None)  # another model or picture, another conversation
        yield before, *bubbles(before, text), note(WAITING), ""
        try:
            for now in ask(models, before, text, compare=compare, most=int(most)):
                if isinstance(now, Talk):
                    yield now, *bubbles(now), "", gr.skip()
                elif now.tuned or now.base:
                    yield gr.skip(), *bubbles(before, text, now), "", gr.skip()
                else:
                    yield (gr.skip(),) * 5
        except Exception:
            yield before, *bubbles(before), "", text  # the page shows what the conversation holds
            raise

    @plainly
    def so_far(before: Talk) -> tuple[Any, ...]:
        return before, *bubbles(before), note("Stopped; an answer that was not whole is not kept.")

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    event = gr.on(
        [go.click, question.submit], chat, [talk, *boxes], [*columns, question], api_name="chat",
        concurrency_id="device", show_progress="minimal", show_progress_on=columns[3],
    )  # fmt: skip
    stop.click(so_far, talk, columns, cancels=[event], **quiet)
    ends = [new.click, columns[1].clear, columns[2].clear]
    gr.on(ends, lambda: (Talk(), [], [], ""), None, columns, cancels=[event], **quiet)


def wire_boxes(studio: Studio, tuned: Any, base: Any, precision: Any, picture: Any, seen: Any, compare: Any,
               columns: list[Any]) -> None:  # fmt: skip
    """What the boxes beside the conversation do."""
    places = studio.places

    @plainly
    def choices() -> Any:
        return gr.Dropdown(choices=[("none: the base alone", ""), *places.adapters(chat=True)], value="")

    @plainly
    def look_at(file: str | None) -> tuple[Any, ...]:
        found, fault = None, ""
        try:
            found = checked_picture(file)
        except UserError as error:  # said on the page, where it stays as long as the file does
            fault = note(str(error), "fault")
        if found is not None:
            found.thumbnail((SIDE, SIDE))
        return gr.Image(value=found, visible=found is not None), Talk(), [], [], fault

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    picture.change(look_at, picture, [seen, *columns], **quiet)
    for box in (tuned, base, precision):
        box.input(lambda: (Talk(), [], [], note("Another model: a new conversation.")), None, columns, **quiet)
    compare.input(lambda on: gr.update(visible=on), compare, columns[2], **quiet)
    page = gr.context.Context.root_block
    page.load(choices, None, tuned, api_visibility="private", show_progress="hidden", concurrency_limit=None)
