"""A step of visual instruction tuning, ours against TRL's SFTTrainer with PEFT's LoRA: same model, rows, rank, batch and optimizer.

    python benchmarks/instruct_speed.py [--rounds 3] [--steps 10] [--out benchmarks/results/instruct_speed.json]

Each side runs in a process of its own, the two alternating. Two models: the embedded one (64 px, 511 words), and a LLaVA with random
weights, 256 wide, with the image size and the vocabulary of LLaVA-1.5 (336 px, 576 tokens an image, 32,064 words). TRL is given
prompts and completions, so that it masks questions as we do. Both sides read images with two workers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import median_and_range

from rankfold.toolkit.core.systems import peak_rss

BATCH, RANK, WARM = 8, 16, 3
TARGETS = r"model\.language_model\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side = {"ours": run_ours, "trl": run_trl}[options.side]
        print(json.dumps(side(options.base, options.data, options.steps, options.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), options)
    for name, rows in found.items():
        print(f"\n{name}")
        for key, value in rows.items():
            print(f"  {key:44} {value['median']:.3f} ({value['least']:.3f} to {value['most']:.3f})")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compare(folder: Path, options: argparse.Namespace) -> dict:
    """Medians and spread of both sides, and of their ratio round by round."""
    found = {}
    for name, make in (("embedded, 64 px", make_embedded_case), ("LLaVA-1.5's image and vocabulary", make_wide_case)):
        base, data = make(folder)
        rounds: dict[str, list[dict]] = {"ours": [], "trl": []}
        for number in range(options.rounds):
            for side in ("ours", "trl") if number % 2 == 0 else ("trl", "ours"):
                rounds[side].append(run_side(side, base, data, options))
                print(name, number, side, rounds[side][-1], flush=True)
        table = {}
        for side, rows in rounds.items():
            for key in rows[0]:
                table[f"{side}: {key}"] = median_and_range([row[key] for row in rows])
        pairs = list(zip(rounds["ours"], rounds["trl"], strict=True))
        table["tokens a second, ours / trl"] = median_and_range(
            [a["tokens a second"] / b["tokens a second"] for a, b in pairs]
        )
        table["peak memory, ours / trl"] = median_and_range([a["peak GiB"] / b["peak GiB"] for a, b in pairs])
        found[name] = table
    return found


def run_side(side: str, base: str, data: Path, options: argparse.Namespace) -> dict:
    """One side in a process of its own."""
    words = [sys.executable, __file__, "--side", side, "--base", base, "--data", str(data)]
    words += ["--steps", str(options.steps), "--threads", str(options.threads)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---------------------------------------------------------------------------------------------- models and rows


def make_embedded_case(folder: Path) -> tuple[str, Path]:
    """The embedded model, and 160 conversations of one to six exchanges."""
    return "tiny-vlm", conversations(folder / "small", side=64)


def make_wide_case(folder: Path) -> tuple[str, Path]:
    """A LLaVA with random weights, and the same conversations about images of 336 px and more."""
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor
    from transformers import LlavaForConditionalGeneration as Llava

    from rankfold.toolkit.embedded import tiny_vlm

    torch.manual_seed(0)
    tokenizer = tiny_vlm.make_chat_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=32_064, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image, image_seq_length=576)
    place = folder / "wide-base"
    Llava(config).save_pretrained(place)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336), tokenizer=tokenizer, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=tiny_vlm.TEMPLATE,
    ).save_pretrained(place)  # fmt: skip
    return str(place), conversations(folder / "large", side=480)


def conversations(folder: Path, *, side: int) -> Path:
    """160 rows in LLaVA's format, written as a camera would (JPEG)."""
    from PIL import Image

    from rankfold.training.embedded.vlm import question_image

    folder.mkdir(parents=True)
    rows = []
    for number in range(160):
        image, asked = question_image(number, seed=3)
        shape = (side, side * 3 // 4) if side > 64 else (side, side)
        Image.fromarray(image).resize(shape).save(folder / f"{number}.jpg", quality=95)
        turns = []
        for at, (_, question, answer) in enumerate(asked[: 1 + number % 6]):
            turns.append({"from": "human", "value": ("<image>\n" if at == 0 else "") + question})
            turns.append({"from": "gpt", "value": answer})
        rows.append({"image": f"{number}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "data.json"


# ---------------------------------------------------------------------------------------------- the two sides


def figures(ticks: list[float], tokens: float, data: float) -> dict:
    """Of the steps after the warm-up. tokens: of all rows of all steps, padding not counted, over their number."""
    steps = [b - a for a, b in zip(ticks[WARM:], ticks[WARM + 1 :], strict=False)]
    return {
        "median step, s": statistics.median(steps),
        "tokens a second": tokens * len(steps) / sum(steps),
        "peak GiB": peak_rss() / 2**30,
        "waiting for data, share": data,
    }


def run_ours(base: str, data: Path, steps: int, threads: int) -> dict:
    """Our loop."""
    import torch
    from quiet import silence_libraries

    silence_libraries()
    torch.set_num_threads(threads)
    from accelerate import Accelerator

    from rankfold.toolkit.core.run_folder import Run
    from rankfold.training.config.defaults import resolve_defaults
    from rankfold.training.config.instruct import InstructConfig
    from rankfold.training.engine.loop import Loop
    from rankfold.training.instruct.prepare import prepare_instruct
    from rankfold.training.instruct.task import InstructTask

    with tempfile.TemporaryDirectory() as folder:
        config = InstructConfig(
            base=base, data=data, out=Path(folder), steps=steps, batch_size=BATCH, adapter="lora", rank=RANK, alpha=RANK,
            preview_every=0, checkpoint_every=10**6, log_every=10**6,
            weight_decay=0.0, workers=2,
        )  # fmt: skip
        config, inputs = prepare_instruct(resolve_defaults(config))
        task = InstructTask(config, *inputs, Accelerator(cpu=True))
        run = Run(Path(folder))
        run.claim()
        loop = Loop(config, task, run, Accelerator(cpu=True))
        ticks, waits, take = [], [], task.batch

        def timed_forward(*place):
            start = time.perf_counter()
            batch = take(*place)
            waits.append(time.perf_counter() - start)
            return batch

        task.batch = timed_forward
        for _ in range(steps):
            loop.train_step()
            ticks.append(time.perf_counter())
    tokens = sum(task.training.sampler.lengths) / len(task.training.sampler.lengths) * BATCH
    return figures(ticks, tokens, sum(waits[WARM + 1 :]) / (ticks[-1] - ticks[WARM]))


def run_trl(base: str, data: Path, steps: int, threads: int) -> dict:
    """TRL's trainer."""
    import torch
    from quiet import silence_libraries

    silence_libraries()
    torch.set_num_threads(threads)
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from rankfold.toolkit.data.conversations import read_conversations
    from rankfold.toolkit.vlm.model import VisionLanguageModel, resolve_vision_base
    from rankfold.training.config.instruct import InstructConfig
    from rankfold.training.instruct.conversations import plan_rows

    folder = resolve_vision_base(base)
    planned = plan_rows(data, InstructConfig(base=base, data=data), VisionLanguageModel(folder).chat)
    rows = []
    for row in read_conversations(data).rows:
        words = [{"role": m["role"], "content": "".join(p.get("text", "") for p in m["content"])} for m in row.messages]
        rows.append({"images": [str(row.images[0])], "prompt": words[:-1], "completion": words[-1:]})
    table = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    ticks: list[float] = []

    class Tick(TrainerCallback):
        def on_step_end(self, args, state, control, **named):
            ticks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        settings = SFTConfig(
            output_dir=out, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=2e-4, max_length=None,
            report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, logging_steps=10**6,
            gradient_checkpointing=False, optim="adamw_torch_fused", dataloader_num_workers=2, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32),
            args=settings,
            train_dataset=table,
            processing_class=AutoProcessor.from_pretrained(folder),
            peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS),
            callbacks=[Tick()],
        )
        trainer.train()
    return figures(ticks, sum(planned.lengths) / len(planned) * BATCH, 0.0)


if __name__ == "__main__":
    main()
