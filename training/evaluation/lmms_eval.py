"""Questions as a task of lmms-eval: a table with the images in base64, the task's YAML, and the functions that it names."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from ...toolkit.core.errors import UserError
from ...toolkit.core.files import write_text
from ...toolkit.data.videos import Video, medium_bytes
from .items import Item

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {table}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {limit}
  temperature: 0
  do_sample: false
process_results: !function utils.process_results
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
"""
FUNCTIONS = '''\
"""Written by rankfold. An answer is right when it is one of the references, or the reference's letter or word comes first in it."""

import base64
import io
import re

from PIL import Image


def doc_to_visual(doc):
    return [Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB") for image in doc["images"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def plain(text):
    return " ".join(text.strip().strip("*`").strip().rstrip(".").lower().split())


def process_results(doc, results):
    said, references = plain(results[0]), [plain(answer) for answer in doc["answers"]]
    if doc["kind"] in ("yesno", "mcq"):
        words = re.findall(r"[a-z]+", said.removeprefix("option ").removeprefix("the answer is "))
        return {"accuracy": float(bool(words) and words[0] == references[0])}
    return {"accuracy": float(said in references)}
'''


def write_lmms_eval(items: Sequence[Item], folder: Path, name: str, max_new_tokens: int = 64) -> Path:
    """Writes the folder to give to lmms-eval with --include_path; returns it.

    Raises:
        UserError: for a box, which needs the base's own numbers, a video, and a question with others before it, which a task does not have.
    """
    rows = []
    for item in items:
        messages = item.conversation.messages
        videos = any(isinstance(medium, Video) for medium in item.conversation.images)
        if item.kind == "box" or videos or sum(message["role"] == "user" for message in messages) > 1:
            raise UserError(
                f"{item.conversation.location}: a task of lmms-eval has questions about images that stand alone, with words for answers: "
                "leave --lmms-eval out, or this row."
            )
        words = "".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")
        system = (
            "".join(part["text"] for part in messages[0]["content"]) + "\n" if messages[0]["role"] == "system" else ""
        )
        images = [base64.b64encode(medium_bytes(image)).decode() for image in item.conversation.images]
        rows.append(
            {
                "question": system + words,
                "images": images,
                "answers": list(item.references),
                "answer": item.references[0],
                "kind": item.kind,
                "category": item.split,
            }
        )
    table = folder / f"{name}.jsonl"
    write_text(table, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_text(folder / f"{name}.yaml", TASK.format(name=name, table=table.resolve(), limit=max_new_tokens))
    write_text(folder / "utils.py", FUNCTIONS)
    return folder
