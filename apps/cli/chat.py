"""`rankfold chat`: questions about images, answered by a tuned model, and by its base beside it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from ...toolkit.core.errors import UserError
from .options import parse_options, positional


@dataclass(frozen=True)
class ChatOptions:
    question: Annotated[tuple[str, ...], positional()] = ()
    """What to ask; without one a conversation begins, one question per line."""
    image: tuple[Path, ...] = ()
    """Images that the first question is about."""
    video: tuple[Path, ...] = ()
    """Videos that it is about: files, or folders of frames."""
    video_frames: Annotated[int, Ge(1)] | None = None
    """Most frames of a video that the base is given; unset means as the adapter was trained."""
    run: Path | None = None
    """Run folder whose adapter answers."""
    adapters: tuple[Path, ...] = ()
    """More adapter folders."""
    strength: tuple[float, ...] = ()
    """One number for all adapters, or one for each; 1 is as trained."""
    base: str | None = None
    """Base model; unset means the run's, or 'tiny-vlm'."""
    compare: bool = False
    """Also show what the base answers."""
    system: str = ""
    """System prompt: what holds for the whole conversation."""
    temperature: Annotated[float, Ge(0)] = 0.0
    """How freely answers are drawn; 0 takes the likeliest token each time."""
    max_new_tokens: Annotated[int, Ge(1)] = 256
    """Maximum tokens of an answer."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """dtype of the model."""
    device: str = ""
    """Where to run: cuda, xpu, mps or cpu; unset means the GPU if there is one."""


def chat(argv: list[str]) -> None:
    options = parse_options(ChatOptions, argv, "chat")
    if options.temperature < 0:
        raise UserError(f"--temperature must be at least 0, not {options.temperature:g}.")
    if options.compare and options.run is None and not options.adapters:
        raise UserError(
            "--compare shows the base beside a tuned model: give one by --run or --adapters, or leave it out."
        )
    if options.video_frames and not options.video:
        raise UserError("--video-frames is of videos: give one by --video, or leave it out.")
    from ...toolkit.data.images import parse_source
    from ...toolkit.data.videos import parse_video
    from .evaluate_instruct import open_tuned

    images = tuple(parse_source(path, None) for path in options.image)
    videos = tuple(parse_video(path, None) for path in options.video)
    vision, _ = open_tuned(options)
    talk = ChatSession(vision, images, videos, options)
    if options.question:
        talk.ask(" ".join(options.question))
        return
    print("Ask; an empty line ends.")
    while question := read_line():
        talk.ask(question)


def read_line() -> str:
    """A line from the user, '' at the end."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


class ChatSession:
    """A conversation so far: the images and videos belong to its first question."""

    def __init__(self, vision: Any, images: tuple[Any, ...], videos: tuple[Any, ...], options: ChatOptions) -> None:
        self.vision, self.options, self.media = vision, options, (*images, *videos)
        self.parts = [*[{"type": "image"}] * len(images), *[{"type": "video"}] * len(videos)]
        self.messages: list[dict[str, Any]] = []
        if options.system:
            self.messages.append({"role": "system", "content": [{"type": "text", "text": options.system}]})

    def ask(self, question: str) -> str:
        """Prints the answer as it is made."""
        from ...pipelines.chat import base_model_only, stream
        from ...toolkit.data.conversations import Conversation

        first = all(message["role"] == "system" for message in self.messages)
        parts = self.parts if first else []
        asked = [*self.messages, {"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        row = Conversation(tuple(asked), self.media, "the question")
        self.vision.chat.check_row(row)
        how = {"max_new_tokens": self.options.max_new_tokens, "temperature": self.options.temperature}
        if self.options.compare:
            with base_model_only(self.vision):
                print_stream("base:  ", stream(self.vision, row, **how))
        answer = print_stream("tuned: " if self.options.compare else "", stream(self.vision, row, **how))
        if not answer:
            raise UserError("The model gave no answer; nothing was added to the conversation.")
        self.messages = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return answer


def print_stream(prefix: str, pieces: Any) -> str:
    """Prints pieces as they come; returns all of them."""
    sys.stdout.write(prefix)
    whole = ""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        whole += piece
    sys.stdout.write("\n")
    return whole.strip()
