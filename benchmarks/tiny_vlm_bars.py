"""What the embedded vision-language model can do: exact answers on held-out images, by kind of question.

    python benchmarks/tiny_vlm_bars.py [--pictures 600] [--out benchmarks/results/tiny_vlm_bars.json]

Images of things are of the combinations of shape, colour and scene that training never draws; those of groups are new draws.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path

import torch
from PIL import Image
from quiet import silence_libraries

from rankfold.pipelines.chat import answers, open_chat
from rankfold.toolkit.data.conversations import Conversation
from rankfold.toolkit.metrics import statistics
from rankfold.training.embedded.vlm import HELD_OUT, question_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--base", default="tiny-vlm")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(1)
    rows, wanted, kinds = [], [], []
    for number in range(options.images):
        image, asked = question_image(number, seed=1_000, stream=HELD_OUT)
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="png")
        for kind, question, answer in asked:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            rows.append(Conversation(({"role": "user", "content": content},), (buffer.getvalue(),), f"image {number}"))
            wanted.append(answer)
            kinds.append(kind)
    start = time.time()
    said = answers(open_chat(options.base), rows, max_new_tokens=48, batch=64)
    right = [float(a == b) for a, b in zip(said, wanted, strict=True)]
    figures = {
        kind: statistics.mean_with_interval([r for r, k in zip(right, kinds, strict=True) if k == kind],
                            [row.location for row, k in zip(rows, kinds, strict=True) if k == kind])
        for kind in sorted(set(kinds))
    }  # fmt: skip
    for kind, own in figures.items():
        print(f"{kind:14} {own['mean']:.1%}  ({own['low']:.1%} to {own['high']:.1%}, {own['rows']} questions)")
    print(f"{1000 * (time.time() - start) / len(rows):.0f} ms a question on one core")
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
