"""A base's chat template: conversations as its text, and from where to where in it answers go.

An answer is found by two private characters that are put around it before the template is rendered. A template that rewrites answers
(one that thinks strips the thoughts from all but the last) loses them or the words between; there the last answer is what the text
has behind the words that ask for it, and the others are learned as conversations of their own, each as it will be asked.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import UserError
from ..data.conversations import Message
from ..data.objects import plain_parts

ANSWER_START, ANSWER_END = "\ue000", "\ue001"  # private characters that no text has
OPEN_THOUGHT = re.compile(
    r"<(think|thinking|thought|reasoning)>\s*$"
)  # what a prompt ends with that has the model think first


@dataclass(frozen=True)
class Span:
    """Where an answer with its end token is in a text."""

    number: int
    """Of its message."""
    start: int
    stop: int


class ChatTemplate:
    """A processor's chat template, with the texts of the tokens that end an answer."""

    def __init__(self, processor: Any, end_texts: Sequence[str], suffix: str) -> None:
        """suffix: what the processor puts after every text.

        Raises:
            UserError: when the template leaves answers out, or asks for them in words that it does not write before them.
        """
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.end_texts, self.suffix = list(end_texts), suffix
        self.added_end, self.written_prompt, self.generation_prompt, self.lead_length = "", "", "", 0
        self.takes_text = False
        """Whether messages without images are given as text."""
        self.find_content_kind()
        self.by_prompt = False
        """Whether answers are only found as what follows the words that ask for them."""
        self.probe()

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The template's text of messages; ask: with the words behind which an answer begins."""
        plain = [message | {"content": plain_parts(message["content"])} for message in messages]
        if self.takes_text:
            plain = [message | {"content": as_text(message["content"])} for message in plain]
        try:
            return self.processor.apply_chat_template(copy.deepcopy(plain), tokenize=False, add_generation_prompt=ask)
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"the base's chat template refuses the conversation ({said}): change the rows, or give another template with "
                "--chat-template FILE."
            ) from error

    def find_content_kind(self) -> None:
        """Finds out whether the template takes a message's text as text, and not as a list of blocks."""
        question = [{"role": "user", "content": [{"type": "text", "text": "Q"}]}]
        try:
            written = self.render(question)
        except UserError:
            written = ""
        if "Q" not in written or "'type'" in written or '"type"' in written:
            self.takes_text = True
            try:
                written = self.render(question)
            except UserError:
                written = ""
            self.takes_text = "Q" in written

    def probe(self) -> None:
        """Finds out what the template does around an answer.

        `added_end`: the end token that answers get because the template gives none, without which a model never learns to stop;
        `generation_prompt`: the words that ask for an answer, and `written_prompt`, what stands in their place before a finished one,
        which is put right when only blanks differ (LLaVA-OneVision's), so that what is trained is what generation needs;
        `lead_length`: characters between the words that ask and the answer, which the model has to say itself.
        """
        question = {"role": "user", "content": [{"type": "text", "text": "Q"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "A"}]}
        plain, asked = self.render([question]), self.render([question], ask=True)
        whole = self.render([question, self.mark_answer(answer)])
        if ANSWER_START not in whole or ANSWER_END not in whole:
            raise UserError("The base's chat template leaves answers out, so they cannot be learned.")
        tail = whole.split(ANSWER_END)[1].lstrip()
        if not any(tail.startswith(end) for end in self.end_texts):
            self.added_end = self.end_texts[0]
        self.generation_prompt, self.written_prompt = asked[len(plain) :], whole[len(plain) : whole.index(ANSWER_START)]
        begins = asked.startswith(plain) and whole.startswith(plain)
        if begins and self.written_prompt.startswith(self.generation_prompt + self.suffix):
            self.lead_length = len(self.written_prompt) - len(self.generation_prompt + self.suffix)
            self.by_prompt = OPEN_THOUGHT.search(self.generation_prompt) is not None
        elif begins and OPEN_THOUGHT.search(self.generation_prompt):
            self.by_prompt = True
        elif not begins or self.written_prompt.split() != self.generation_prompt.split():
            raise UserError(
                f"The base's chat template asks for an answer with {self.generation_prompt!r} and writes {self.written_prompt!r} before a "
                "finished one, so training would not teach what generation needs: give a corrected template with --chat-template FILE."
            )

    def mark_answer(self, message: Message) -> Message:
        """An answer between marks, with the end token that the template lacks; other messages as they are."""
        if message["role"] != "assistant":
            return message
        texts = [part["text"] for part in plain_parts(message["content"])]
        texts[0], texts[-1] = ANSWER_START + texts[0], f"{texts[-1]}{ANSWER_END}{self.added_end}"
        if len(texts) == 1:
            texts = [f"{ANSWER_START}{texts[0].removeprefix(ANSWER_START)}"]
        return {"role": "assistant", "content": [{"type": "text", "text": text} for text in texts]}

    # ------------------------------------------------------------------------------------ answers

    def spans(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text of messages, and where the answers are that can be learned from it: all, or the last one alone.

        Raises:
            UserError: when the template changes or leaves out what somebody said.
        """
        found = None if self.by_prompt else self.spans_by_marks(messages)
        found = found or self.span_by_prompt(messages)
        self.check_nothing_left_out(messages, found[0])
        return found

    def learns_each(self, messages: Sequence[Message]) -> bool:
        """Whether all answers can be learned from one text."""
        answers = sum(message["role"] == "assistant" for message in messages)
        return answers < 2 or (not self.by_prompt and self.spans_by_marks(messages) is not None)

    def spans_by_marks(self, messages: Sequence[Message]) -> tuple[str, list[Span]] | None:
        """The same by marks; None when the template rewrites answers or what stands before them."""
        plain = self.render(messages)
        for tried in (messages, [strip_answer(message) for message in messages]):
            marked = self.render([self.mark_answer(message) for message in tried])
            bare = marked.replace(f"{ANSWER_END}{self.added_end}", "").replace(ANSWER_START, "").replace(ANSWER_END, "")
            if bare == plain:
                return self.split_marked(marked, tried)
        return None

    def split_marked(self, marked: str, messages: Sequence[Message]) -> tuple[str, list[Span]] | None:
        """The text without marks, and what was between them."""
        text, spans, rest = "", [], marked
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if rest.count(ANSWER_START) != len(numbers) or rest.count(ANSWER_END) != len(numbers):
            return None
        for number in numbers:
            before, rest = rest.split(ANSWER_START, 1)
            answer, rest = rest.split(ANSWER_END, 1)
            if not before.endswith(self.written_prompt):
                return None
            if not self.written_prompt.startswith(self.generation_prompt + self.suffix):
                before = before.removesuffix(self.written_prompt) + self.generation_prompt
            text += before
            spans.append(Span(number, len(text) - self.lead_length, len(text) + len(answer) + self.end_length(rest)))
            text += answer
        return text + rest, spans

    def span_by_prompt(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text of messages with the last answer as it will be asked for, and where that is.

        Raises:
            UserError: when the words that ask for the answer are not what it follows.
        """
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not numbers:
            return self.render(messages), []
        last = numbers[-1]
        history, answer = messages[:last], messages[last]
        asked, whole = self.render(history, ask=True), self.render(messages[: last + 1])
        opened = OPEN_THOUGHT.search(asked)
        if whole.startswith(asked):
            said = whole[len(asked) :]
        elif opened and whole.startswith(asked[: opened.start()]):
            said = close_thought(opened[1], answer) + whole[opened.start() :].lstrip("\n")
        else:
            raise UserError(
                f"the chat template asks for this row's answer in other words ({asked[-60:]!r}) than it writes before it: give a corrected "
                "template with --chat-template FILE."
            )
        if asked[-1:].isspace() and said[:1].isspace() and not self.begins_alike(asked, asked + said):
            said = said.lstrip()  # the blanks of both are one token, and the model is given those that ask
        stops = [at + len(end) for end in self.end_texts if (at := said.find(end)) >= 0]
        if not stops:
            said = f"{said.rstrip()}{self.end_texts[0]}"
            stops = [len(said)]
        return asked + said, [Span(last, len(asked), len(asked) + min(stops))]

    def begins_alike(self, start: str, whole: str) -> bool:
        """Whether the tokens of a text begin with those of its start."""
        ids, more = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (start, whole))
        return more[: len(ids)] == ids

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text of messages with the words that ask for the next answer."""
        if self.by_prompt or (found := self.spans_by_marks(messages)) is None:
            return self.render(messages, ask=True)
        self.check_nothing_left_out(messages, found[0])
        return found[0] + self.generation_prompt

    def end_length(self, rest: str) -> int:
        """How many characters of what follows an answer belong to its end token."""
        blanks = len(rest) - len(rest.lstrip())
        lengths = [blanks + len(end) for end in self.end_texts if rest.startswith(end, blanks)]
        return min(lengths, default=0)

    def check_nothing_left_out(self, messages: Sequence[Message], text: str) -> None:
        """Raises UserError when words of a question or of the system prompt are not in the text."""
        for message in messages:
            for part in message["content"] if message["role"] != "assistant" else ():
                words = part.get("text", "").strip()
                if words and words not in text:
                    who = "the system prompt" if message["role"] == "system" else "a question"
                    raise UserError(
                        f"the chat template leaves out or changes words of {who} ({words[:60]!r}): give another with --chat-template FILE"
                        + (", or put the prompt into the question." if message["role"] == "system" else ".")
                    )


def as_text(parts: list[dict[str, Any]]) -> Any:
    """The text of a message without images; one with images as it is."""
    return "".join(part["text"] for part in parts) if all(part["type"] == "text" for part in parts) else parts


def strip_answer(message: Message) -> Message:
    """An answer without blanks around it, as some templates write it; other messages as they are."""
    if message["role"] != "assistant":
        return message
    parts = list(plain_parts(message["content"]))
    parts[0] = parts[0] | {"text": parts[0]["text"].lstrip()}
    parts[-1] = parts[-1] | {"text": parts[-1]["text"].rstrip()}
    return message | {"content": parts}


def close_thought(tag: str, answer: Message) -> str:
    """The thought of an answer up to its closing tag, which stands behind a prompt that opened it."""
    text = "".join(part["text"] for part in answer["content"])
    thought = text.split(f"</{tag}>")[0].split(f"<{tag}>")[-1].strip() if f"</{tag}>" in text else ""
    return f"{thought}\n</{tag}>\n\n" if thought else f"</{tag}>\n\n"
