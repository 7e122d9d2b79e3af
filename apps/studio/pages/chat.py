"""Chat: questions about an image, answered by a vision-language model as the words come, and by its base beside it."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ....pipelines.chat import base_model_only, open_chat, stream
from ....toolkit.core.devices import device
from ....toolkit.core.errors import UserError
from ....toolkit.data.conversations import Conversation
from ....toolkit.data.images import load_rgb
from ....toolkit.diffusion.model import DTYPES
from ....toolkit.formats.locate import adapter_facts, content_hash
from ....toolkit.vlm.model import EMBEDDED
from ..backend.context import Studio
from ..backend.numbers import whole
from ..backend.paths import StudioPaths
from ..backend.pipeline_worker import Job, JobStopped, ModelCache, run_in_background
from ..backend.turns import Turns
from ..render.messages import message_html, show_errors
from ..widgets.actions import act
from ..widgets.filling import fill_on_load

MAX_TOKENS = 4096  # of an answer
SIDE = 320  # pixels of the image on the page
WAITING = "Loading the model, or waiting for its turn."


# ---------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class ChatModelSpec:
    """Who answers."""

    base: str
    adapter: Path | None = None
    precision: str = "fp32"


def parse_model_spec(paths: StudioPaths, tuned: str | None, base: str | None, precision: str) -> ChatModelSpec:
    """Who the boxes mean. tuned: what a page calls an adapter; empty is the base alone. base: empty is the adapter's own.

    Raises:
        UserError: for an adapter that is not there, a base that may not be read, or an unknown precision.
    """
    if precision not in DTYPES:
        raise UserError(f"{precision!r} is not a dtype: choose one of {', '.join(DTYPES)}.")
    adapter = paths.adapter(tuned, chat=True) if tuned else None
    own = adapter_facts(adapter).base if adapter else ""
    return ChatModelSpec(paths.base(base or own or next(iter(EMBEDDED)), tuple(EMBEDDED)), adapter, precision)


@dataclass
class PartialAnswers:
    """Answers so far; they grow while they are made."""

    tuned: str = ""
    base: str = ""


class ChatModels:
    """Models that answer, one question at a time."""

    def __init__(self, loaded: ModelCache | None = None) -> None:
        self.loaded = loaded or ModelCache()

    def open_model(self, who: ChatModelSpec) -> Any:
        """The model. Hold the lock."""
        key = (who.base, content_hash(who.adapter) if who.adapter else "", who.precision)
        return self.loaded.get(key, lambda: load_chat_model(who))

    def answer(
        self, who: ChatModelSpec, row: Conversation, said: PartialAnswers, drawing: Job, *, compare: bool, most: int
    ) -> None:
        """Writes the answer into `said` word by word, the base's first when both are wanted.

        Raises:
            Stopped: when somebody wants it to end; no token is begun then.
            UserError: for a model that cannot be loaded, or a row that it cannot take.
        """
        with self.loaded.lock:
            if drawing.stopped:
                raise JobStopped
            vision = self.open_model(who)
            vision.chat.check_row(row)
            # Generation runs in a thread of its own and asks nobody: so each token asks, before it is made.
            hook = vision.model.register_forward_pre_hook(lambda *_: drawing.step())
            try:
                if compare:
                    with base_model_only(vision):
                        for piece in stream(vision, row, max_new_tokens=most):
                            said.base += piece
                for piece in stream(vision, row, max_new_tokens=most):
                    said.tuned += piece
            finally:
                hook.remove()


def load_chat_model(who: ChatModelSpec) -> Any:
    """The model with its adapter, and the chat template that it was trained with."""
    file = who.adapter / "chat_template.jinja" if who.adapter else None
    template = file.read_text(encoding="utf-8") if file is not None and file.is_file() else None
    adapters = [who.adapter] if who.adapter else []
    return open_chat(who.base, adapters, precision=who.precision, device=device(), template=template)


# ---------------------------------------------------------------------------------------------- the conversation


@dataclass(frozen=True)
class ChatState:
    """A conversation so far: the image belongs to its first question."""

    who: ChatModelSpec | None = None
    image: str | None = None
    messages: tuple[dict[str, Any], ...] = field(default_factory=tuple)
    base_answers: tuple[str, ...] = ()
    """The base's answers to the same conversation, '' where it was not asked."""


def check_question(question: str | None) -> str:
    """The question.

    Raises:
        UserError: when it is empty.
    """
    if not (question or "").strip():
        raise UserError("The question is empty: ask something, such as: What is in the picture?")
    return str(question).strip()


def check_image(image: str | None) -> Image.Image | None:
    """The uploaded image as the model sees it; None when there is none.

    Raises:
        UserError: when the file is not a valid image.
    """
    if not image:
        return None
    path = Path(image)
    try:
        return load_rgb(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from error  # where it was uploaded to helps nobody


def add_question(talk: ChatState, question: str) -> Conversation:
    """The conversation with one more question."""
    parts = [{"type": "image"}] if talk.image and not talk.messages else []
    message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    images = (Path(talk.image),) if talk.image else ()
    return Conversation((*talk.messages, message), images, "the question")


def add_answer(talk: ChatState, row: Conversation, said: PartialAnswers) -> ChatState:
    """The conversation with the question and its answer.

    Raises:
        UserError: when there is no answer.
    """
    if not said.tuned.strip():
        raise UserError("The model gave no answer; nothing was added to the conversation. Ask in other words.")
    answer = {"role": "assistant", "content": [{"type": "text", "text": said.tuned.strip()}]}
    return replace(talk, messages=(*row.messages, answer), base_answers=(*talk.base_answers, said.base.strip()))


def ask(
    models: ChatModels, talk: ChatState, question: str, *, compare: bool, most: int, turns: Turns | None = None
) -> Iterator[PartialAnswers | ChatState]:
    """Yields the answers so far while they are made, and last the conversation with them."""
    row, said = add_question(talk, question), PartialAnswers()
    who: Any = talk.who
    both = compare and who.adapter is not None
    work = lambda drawing: models.answer(who, row, said, drawing, compare=both, most=most)  # noqa: E731
    for now in run_in_background(work, most * (1 + both), turns):
        if isinstance(now, Job):
            yield replace(said)
    yield add_answer(talk, row, said)


def bubbles(talk: ChatState, question: str = "", said: PartialAnswers | None = None) -> tuple[list[Any], list[Any]]:
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
                info=f"Empty: the tuned model's own, or {next(iter(EMBEDDED))}, which knows small drawings only, not photos.",
            )  # fmt: skip
            image = gr.File(label="Image that the first question is about", elem_id="chat-picture", height=150)
            seen = gr.Image(
                label="As the model sees it", interactive=False, format="png", visible=False, height=220, buttons=["fullscreen"],
                elem_id="chat-seen",
            )  # fmt: skip
            compare = gr.Checkbox(label="Compare with base model", elem_id="chat-compare")
            with gr.Accordion("More", open=False):
                most = gr.Number(256, label="Max tokens", elem_id="chat-most")
                precision = gr.Dropdown([*DTYPES], value="fp32", label="dtype", elem_id="chat-precision")
        with gr.Column(scale=3):
            with gr.Row():
                # Words of a model are no page: as Markdown they could ask other machines for images.
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
    talk = gr.State(ChatState())
    columns = [talk, own, other, said]
    wire_asking(studio, [tuned, base, image, question, compare, most, precision], columns, (go, stop, new))
    wire_boxes(studio, tuned, base, precision, image, seen, compare, columns)


def wire_asking(studio: Studio, boxes: list[Any], columns: list[Any], buttons: tuple[Any, Any, Any]) -> None:
    """Ask, stop, start over. boxes: in the order that `chat` takes them; columns: conversation, both answers, progress."""
    places, models = studio.paths, ChatModels(studio.model_cache)
    go, stop, new = buttons
    talk, question = columns[0], boxes[3]

    def chat(before: ChatState, tuned: str | None, base: str | None, image: str | None, text: str, compare: bool,
             most: float, precision: str) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        text = check_question(text)
        if not 1 <= whole("Max tokens", most) <= MAX_TOKENS:
            raise UserError(f"Max tokens must be between 1 and {MAX_TOKENS}, not {most}.")
        check_image(image)
        who = parse_model_spec(places, tuned, base, precision)
        if (before.who, before.image) != (who, image or None):
            before = ChatState(who, image or None)  # another model or image, another conversation
        yield before, *bubbles(before, text), message_html(WAITING), ""
        try:
            for now in ask(models, before, text, compare=compare, most=int(most), turns=studio.turns):
                if isinstance(now, ChatState):
                    yield now, *bubbles(now), "", gr.skip()
                elif now.tuned or now.base:
                    yield gr.skip(), *bubbles(before, text, now), "", gr.skip()
                else:
                    yield (gr.skip(),) * 5
        except Exception:
            yield before, *bubbles(before), "", text  # the page shows what the conversation holds
            raise

    @show_errors
    def so_far(before: ChatState) -> tuple[Any, ...]:
        return before, *bubbles(before), message_html("Stopped; an answer that was not whole is not kept.")

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    event = act(
        [go.click, question.submit], chat, [talk, *boxes], [*columns, question], columns[3], api_name="chat", concurrency_limit=None
    )  # fmt: skip
    stop.click(so_far, talk, columns, cancels=[event], **quiet)
    ends = [new.click, columns[1].clear, columns[2].clear]
    gr.on(ends, lambda: (ChatState(), [], [], ""), None, columns, cancels=[event], **quiet)


def wire_boxes(studio: Studio, tuned: Any, base: Any, precision: Any, image: Any, seen: Any, compare: Any,
               columns: list[Any]) -> None:  # fmt: skip
    """What the boxes beside the conversation do."""
    places = studio.paths

    def choices(request: gr.Request) -> Any:
        known, wanted = places.adapters(chat=True), request.query_params.get("adapter")

        chosen = {"value": wanted} if wanted in known else {}
        return gr.update(choices=[("none: the base alone", ""), *known], **chosen)

    @show_errors
    def look_at(file: str | None) -> tuple[Any, ...]:
        found, fault = None, ""
        try:
            found = check_image(file)
        except UserError as error:  # said on the page, where it stays as long as the file does
            fault = message_html(str(error), "fault")
        if found is not None:
            found.thumbnail((SIDE, SIDE))
        return gr.Image(value=found, visible=found is not None), ChatState(), [], [], fault

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    image.change(look_at, image, [seen, *columns], **quiet)
    for box in (tuned, base, precision):
        box.input(
            lambda: (ChatState(), [], [], message_html("Another model: a new conversation.")), None, columns, **quiet
        )
    compare.input(lambda on: gr.update(visible=on), compare, columns[2], **quiet)
    fill_on_load(choices, None, [tuned], [])
