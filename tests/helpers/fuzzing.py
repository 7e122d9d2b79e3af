"""Spoilt inputs by the thousand: valid examples of everything that is read, changed by chance, each used as a user would.

`python tests/helpers/fuzzing.py COUNT [SEED]` tries so many and says what was found; a file of it goes to tests/corpus under
the name of its entry.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, PngImagePlugin
from safetensors.torch import save

from rankfold.pipelines.generate import Recipe, read_recipe
from rankfold.toolkit.adapters.variants.glora import GloraConfig
from rankfold.toolkit.core.cache import load_or_compute
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.run_folder import Run
from rankfold.toolkit.data.conversations import read_conversations
from rankfold.toolkit.data.images import image_size, load_rgb
from rankfold.toolkit.data.subjects import Sample, check_masks, find_samples, load_mask
from rankfold.toolkit.diffusion.load import resolve_base
from rankfold.toolkit.formats.folder_report import inspect_adapter
from rankfold.training.config.convert import convert_config
from rankfold.training.config.peft_config import peft_config
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.config.yaml_file import from_yaml, to_yaml
from rankfold.training.engine.checkpoint import read_checkpoint, write_checkpoint
from rankfold.training.evaluation.items import read_items
from rankfold.training.evaluation.measuring import load_measurements, truncate_measurements
from rankfold.training.evaluation.report import runs_page
from rankfold.training.evaluation.subject import read_prompts
from rankfold.training.launch import queue
from rankfold.training.launch.start import check_settings
from rankfold.training.launch.trained_on import load_data
from rankfold.training.runs import library
from rankfold.training.search.answers import read_answers

MOST_SECONDS, MOST_BYTES = 5.0, 500 * 2**20
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
ODD: list[Any] = [
    None, True, "", "x", "nan", -1, 0, 1, 2**31, 2**63, 10**40, 1e308, float("nan"), float("inf"), [], {}, [[]], {"": ""}, [None],
    "../../x", "/etc/passwd", "\ud800", "a" * 3000, "(a+)+$", "{0.__class__}", "\x00", [0] * 500, {"a": {"b": {"c": 1}}},
]  # fmt: skip


# ---------------------------------------------------------------------------------------------- changing


def spoil(data: bytes, random: Random) -> bytes:
    """Bytes with one to three changes."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 3)):
        place = random.randrange(len(changed) + 1)
        kind = random.randrange(7)
        if kind == 0 and changed:
            changed[place % len(changed)] ^= 1 << random.randrange(8)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            changed[place:place] = random.randbytes(random.choice((1, 4, 64)))
        elif kind == 3:
            del changed[place : place + random.choice((1, 4, 64))]
        elif kind == 4:
            changed[place : place + 4] = random.choice(
                (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\x80")
            )
        elif kind == 5:
            piece = changed[place : place + random.choice((1, 16, 256))]
            changed[place:place] = piece * random.choice((1, 2, 50))
        else:
            changed[place:place] = random.choice(
                (b"nan", b"1e999", b"-1", b"[" * 200, b"\xef\xbb\xbf", b"\r\n", b"\0", b"{}", b"../")
            )
    return bytes(changed)


def spoil_value(value: Any, random: Random) -> Any:
    """A value of JSON with a part replaced, taken out, doubled or put deeper."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(list(value))
        kind = random.randrange(6)
        if kind == 0:
            return {name: one for name, one in value.items() if name != key}
        if kind == 1:
            return value | {random.choice(("", "x", key + "_", "a" * 300)): random.choice(ODD)}
        return value | {key: spoil_value(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.85:
        place = random.randrange(len(value))
        if random.random() < 0.2:
            return value[:place] + value[place + 1 :]
        return value[:place] + [spoil_value(value[place], random)] + value[place + 1 :]
    return random.choice(ODD)


def as_json(value: Any, random: Random) -> bytes:
    """A value, spoilt as a value or as text."""
    if random.random() < 0.7:
        return json.dumps(spoil_value(value, random)).encode()
    return spoil(json.dumps(value).encode(), random)


def as_lines(rows: list[Any], random: Random) -> bytes:
    """Rows of JSON, one of them spoilt."""
    place = random.randrange(len(rows))
    return b"\n".join(
        as_json(row, random) if number == place else json.dumps(row).encode() for number, row in enumerate(rows)
    )


def as_yaml(value: dict[str, Any], random: Random) -> bytes:
    """Settings, spoilt as values or as text."""
    if random.random() < 0.7:
        return yaml.safe_dump(spoil_value(value, random)).encode("utf-8", "replace")
    return spoil(yaml.safe_dump(value).encode(), random)


def as_safetensors(tensors: dict[str, torch.Tensor], header: dict[str, str], random: Random) -> bytes:
    """A file of tensors, spoilt in its header, its shapes, or anywhere."""
    kind = random.randrange(4)
    if kind == 0:
        return spoil(save(tensors, header), random)
    if kind == 1:
        name = random.choice(list(tensors))
        odd = random.choice(
            (
                torch.zeros(0),
                torch.ones(()),
                torch.full((2, 2), float("nan")),
                torch.ones(3, 1, 2),
                torch.ones(4, 4, dtype=torch.int8),
            )
        )
        return save(tensors | {name: odd}, header)
    if kind == 2:
        key = random.choice(list(header))
        return save(tensors, header | {key: json.dumps(random.choice(ODD))})
    data = save(tensors, header)
    size = struct.unpack("<Q", data[:8])[0]
    head = as_json(json.loads(data[8 : 8 + size]), random)
    return struct.pack("<Q", len(head)) + head + data[8 + size :]


def an_image(random: Random, format: str) -> bytes:
    """A small image in a format."""
    mode = random.choice({"JPEG": ("RGB", "L")}.get(format, ("RGB", "RGBA", "L", "P")))
    pixels = Image.fromarray(np.frombuffer(random.randbytes(64 * 64 * 3), np.uint8).reshape(64, 64, 3)).convert(mode)
    buffer = io.BytesIO()
    pixels.save(buffer, format=format)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------- entries


FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "gif": "GIF"}
CAPTION = {"file_name": "0.png", "text": "a sks creature", "caption": "x", "tags": ["a", "b"]}
CONVERSATION = {
    "id": "1",
    "image": "0.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A creature.", "weight": 1},
    ],
}
MESSAGES = {
    "images": ["0.png"],
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A box.", "train": True},
    ],
    "objects": {"bbox": [[1, 2, 3, 4]], "ref": ["box"]},
}
ITEM = {"image": "0.png", "question": "Which?", "answer": "B", "choices": ["red", "blue"]}
STATUS = {
    "state": "running",
    "step": 3,
    "total": 6,
    "pid": 1,
    "born": 1.0,
    "host": "x",
    "beat": 1.0,
    "error": None,
    "device": "0",
}
MEASURED = {"step": 2, "likeness": [0.5, 0.6], "fidelity": [0.2], "drift": 0.1, "seconds": 1.0}
METRICS = {"step": 2, "loss": 0.5, "learning_rate": 1e-3, "samples_per_second": 2.0, "memory_gib": 1.0}
DATA = {"items": {"photo 0.png": "abc"}, "held_out": ["0.png"], "earlier": [{"step": 2, "changes": ["x"]}]}
ENTRY = {"name": "mine", "base": "tiny", "trigger": "sks", "hash": "abc", "adapter": "lora", "composed_of": ""}
RECIPE = {
    "prompt": "a",
    "base": "tiny",
    "adapters": [],
    "strengths": [],
    "hashes": [],
    "steps": 3,
    "seed": 1,
    "regions": [],
    "subjects": [],
    "batch": [1, 1],
}
PEFT = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"], "rank_pattern": {"to_q": 2}, "alpha_pattern": {},
    "bias": "none", "use_rslora": False, "use_dora": False, "modules_to_save": None, "task_type": None,
}  # fmt: skip
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
KOHYA = 'pretrained_model_name_or_path = "a"\nnetwork_dim = 8\nlearning_rate = 1e-4\nmax_train_steps = 100\noutput_dir = "out"\n'
STRUCTURE = {"to_q": "lora,none,vector,none,none", "to_k": "vector,constant,none,vector,none"}


def lora_tensors() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A LoRA file's tensors and header, as kohya's tools write them."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, 8),
        f"{name}.lora_up.weight": torch.ones(8, 2),
        f"{name}.alpha": torch.tensor(2.0),
    }
    return tensors, {
        "ss_network_dim": "2",
        "ss_network_args": "{}",
        "ss_base_model_version": "sd_v1",
        "modelspec.title": "x",
    }


def peft_folder(folder: Path, config: bytes, weights: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def with_image(folder: Path, name: str, data: bytes) -> Path:
    """A folder with an image and a file."""
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "0.png")
    (folder / name).write_bytes(data)
    return folder


def run_with(folder: Path, name: str, data: bytes) -> Run:
    """A run folder with a file."""
    folder.mkdir()
    (folder / "config.yaml").write_text("steps: 3\n")
    (folder / "status.json").write_text('{"state": "done", "step": 3}')
    (folder / name).write_bytes(data)
    return Run(folder)


def use_status(random: Random, work: Path) -> None:
    run = run_with(work / "run", "status.json", as_json(STATUS, random))
    run.state(), run.summary(), run.is_live(), run.is_worth_keeping()
    queue.queued_runs(work)
    queue.claim_run(run)
    run.claim()
    run.set_status(state="stopped")


def use_records(random: Random, work: Path) -> None:
    name, value = random.choice(
        (("measured.jsonl", MEASURED), ("metrics.jsonl", METRICS), ("candidates.jsonl", METRICS))
    )
    run = run_with(work / "run", name, as_lines([value, value | {"step": 3}], random))
    load_measurements(run), truncate_measurements(run, 1)
    read_answers(run)
    if random.random() < 0.2:  # curves take long to draw
        runs_page([run.folder])
    run.truncate_metrics(1)


def use_files(random: Random, work: Path) -> None:
    name = random.choice(("metrics.json", "evaluation.json", "choice.json", "summary.json"))
    figures = {"figures": {"clip_i": 0.5, "n": 3}, "clip_i": [0.5, 0.4], "images": ["0.png"]}
    runs_page([run_with(work / "run", name, as_json(figures, random)).folder])


def use_config(random: Random, work: Path) -> None:
    values = yaml.safe_load(to_yaml(SubjectConfig(images=Path("images"), out=Path("run"))))
    (work / "config.yaml").write_bytes(as_yaml(values, random))
    config = replace(from_yaml(work / "config.yaml"), out=work / "run", threads=1)
    from rankfold.training.config.checks import check_ranges
    from rankfold.training.config.defaults import resolve_defaults

    check_ranges(config)
    if isinstance(config, SubjectConfig):
        resolved = resolve_defaults(replace(config, base="tiny"))
        check_settings(resolved)
        peft_config(resolved, resolved.target_modules or ("to_q",))


def use_adapter_folder(random: Random, work: Path) -> None:
    tensors = {
        f"base_model.model.{LAYER}.lora_A.weight": torch.ones(2, 8),
        f"base_model.model.{LAYER}.lora_B.weight": torch.ones(8, 2),
    }
    config, weights = json.dumps(PEFT).encode(), save(tensors)
    if random.random() < 0.6:
        config = as_json(PEFT, random)
    else:
        weights = as_safetensors(tensors, {"format": "pt"}, random)
    inspect_adapter(peft_folder(work / "adapter", config, weights))


def use_native_folder(random: Random, work: Path) -> None:
    facts = {"base": "tiny", "adapter": "lora", "token": "sks", "class_noun": "creature"}
    tensors = {
        f"base_model.model.{LAYER}.lora_A.weight": torch.ones(2, 8),
        f"base_model.model.{LAYER}.lora_B.weight": torch.ones(8, 2),
    }
    peft_folder(work / "adapter" / "unet", as_json(PEFT, random), save(tensors))
    (work / "adapter" / "rankfold.json").write_bytes(
        as_json(facts, random) if random.random() < 0.5 else json.dumps(facts).encode()
    )
    inspect_adapter(work / "adapter")


def use_library(random: Random, work: Path) -> None:
    folder = work / "library" / "mine"
    (folder / "adapter").mkdir(parents=True)
    (folder / "entry.json").write_bytes(as_json(ENTRY, random))
    library.entries(), library.damaged_entries()
    library.get("mine")


def use_recipe(random: Random, work: Path) -> None:
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("rankfold", as_json(RECIPE, random).decode("latin-1"))
    Image.new("RGB", (8, 8)).save(buffer, format="png", pnginfo=info)
    (work / "0.png").write_bytes(buffer.getvalue() if random.random() < 0.8 else spoil(buffer.getvalue(), random))
    assert isinstance(read_recipe(work / "0.png"), Recipe)


def use_image(random: Random, work: Path) -> None:
    suffix = random.choice(list(FORMATS))
    data = spoil(an_image(random, FORMATS[suffix]), random)
    (work / "images").mkdir()
    (work / "images" / f"0.{suffix}").write_bytes(data)
    for use in (load_rgb, image_size):
        try:
            use(work / "images" / f"0.{suffix}")
        except UserError:
            continue
    find_samples(work / "images")


def use_mask(random: Random, work: Path) -> None:
    suffix = random.choice(list(FORMATS))
    data = spoil(an_image(random, FORMATS[suffix]), random)
    folder = with_image(work / "images", f"1.{suffix}", data)
    (work / "masks").mkdir()
    (work / "masks" / "0.png").write_bytes(data)
    masks, path = random.choice(((str(work / "masks"), folder / "0.png"), ("alpha", folder / f"1.{suffix}")))
    check_masks([Sample(path)], masks)
    load_mask(Sample(path), masks, (64, 64), "center")


def use_captions(random: Random, work: Path) -> None:
    kind = random.randrange(5)
    if kind == 0:
        data, name = as_lines([CAPTION, CAPTION | {"file_name": "1.png"}], random), "metadata.jsonl"
    elif kind == 1:
        data, name = spoil(b"file_name,text\n0.png,a sks creature\n", random), "metadata.csv"
    elif kind == 2:
        data, name = as_json(CAPTION, random), "0.json"
    else:
        data, name = (
            spoil("a sks cr\u00e9ature, on the beach\nand more".encode(), random),
            random.choice(("0.txt", "0.caption")),
        )
    find_samples(with_image(work / "images", name, data))


def use_conversations(random: Random, work: Path) -> None:
    row = random.choice((CONVERSATION, MESSAGES))
    lines = random.random() < 0.5
    data = as_lines([row, row], random) if lines else as_json([row, row], random)
    name = "data.jsonl" if lines else "data.json"
    with_image(work / "data", name, data)
    read_conversations(work / "data" / name, skip_bad=random.random() < 0.3)


def use_items(random: Random, work: Path) -> None:
    with_image(work / "data", "items.json", as_json([ITEM, ITEM | {"answers": ["red"]}], random))
    read_items(work / "data" / "items.json", None)


def use_table(random: Random, work: Path) -> None:
    with_image(
        work / "data", "data.csv", spoil(b"image,question,answer\n0.png,What?,A box\n0.png,Where?,Here\n", random)
    )
    read_conversations(work / "data" / "data.csv")


def use_lora(random: Random, work: Path) -> None:
    (work / "a.safetensors").write_bytes(as_safetensors(*lora_tensors(), random))
    inspect_adapter(work / "a.safetensors")


def use_structure(random: Random, work: Path) -> None:
    structure = spoil_value(STRUCTURE, random)
    text = (
        json.dumps(structure)
        if random.random() < 0.7
        else spoil(json.dumps(STRUCTURE).encode(), random).decode("latin-1")
    )
    config = SubjectConfig(adapter="glora", adapter_options={"structure": text}, rank=4, alpha=4.0)
    assert isinstance(peft_config(config, ("to_q", "to_k")), GloraConfig)


def use_checkpoint(random: Random, work: Path) -> None:
    state = dict.fromkeys(("schedule", "scaler", "average", "window", "window_steps"))
    write_checkpoint(work / "a.pt", {"config": {}, "step": 1, "parameters": [torch.ones(3)], "optimizer": {}} | state)
    (work / "a.pt").write_bytes(spoil((work / "a.pt").read_bytes(), random))
    read_checkpoint(work / "a.pt")


def use_cache(random: Random, work: Path) -> None:
    whole = {"x": torch.arange(8.0)}
    load_or_compute(work, "abcdef", lambda: whole)
    for file in (path for path in work.rglob("*") if path.is_file()):
        file.write_bytes(spoil(file.read_bytes(), random))
    assert torch.equal(load_or_compute(work, "abcdef", lambda: whole)["x"], whole["x"])


def use_index(random: Random, work: Path) -> None:
    (work / "base").mkdir()
    (work / "base" / "model_index.json").write_bytes(as_json(INDEX, random))
    resolve_base(str(work / "base"))


def use_foreign_config(random: Random, work: Path) -> None:
    name, data = random.choice(
        (("a.toml", KOHYA.encode()), ("a.yaml", b"job: extension\nconfig:\n  process:\n  - type: sd_trainer\n"))
    )
    (work / name).write_bytes(spoil(data, random))
    convert_config(work / name).yaml()


def use_data_record(random: Random, work: Path) -> None:
    load_data(run_with(work / "run", "data.json", as_json(DATA, random)))


def use_prompts(random: Random, work: Path) -> None:
    (work / "prompts.txt").write_bytes(spoil(b"a {token} {noun} in the snow\na {token} {noun}\n", random))
    read_prompts(str(work / "prompts.txt"))


ENTRIES: dict[str, Callable[[Random, Path], None]] = {
    "adapter_file": use_lora, "adapter_folder": use_adapter_folder, "adapter_native": use_native_folder, "cache": use_cache,
    "captions": use_captions, "checkpoint": use_checkpoint, "config": use_config, "conversations": use_conversations,
    "foreign_config": use_foreign_config, "image": use_image, "items": use_items, "library": use_library, "mask": use_mask,
    "model_index": use_index, "prompts": use_prompts, "recipe": use_recipe, "run_data": use_data_record, "run_files": use_files,
    "run_records": use_records, "run_status": use_status, "structure": use_structure, "table": use_table,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- trying


@dataclass
class Outcome:
    """What came of the inputs."""

    tried: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)
    """Where and what -> how it came about."""
    slowest: float = 0.0
    largest: int = 0
    """Bytes by which an input has raised this process's memory at most."""


def try_inputs(count: int, seed: int = 0, names: list[str] | None = None, keep: Path | None = None) -> Outcome:
    """So many inputs, in turn for each entry. keep: folder for those that went wrong."""
    outcome, names = Outcome(), names or sorted(ENTRIES)
    outside = Path(tempfile.mkdtemp(prefix="fuzz-"))
    before = os.environ.get("RANKFOLD_LIBRARY"), os.environ.get("RANKFOLD_CACHE")
    os.environ["RANKFOLD_LIBRARY"], os.environ["RANKFOLD_CACHE"] = (
        str(outside / "given/work/library"),
        str(outside / "cache"),
    )
    warnings.simplefilter("ignore")
    try:
        for total, (name, number) in enumerate(inputs(names, count), 1):
            try_one(name, number, seed, outside, outcome, keep)
            if total % 2500 == 0:
                print(f"{total} inputs, {len(outcome.faults)} kinds of faults", flush=True)
    finally:
        shutil.rmtree(outside, ignore_errors=True)
        for variable, value in zip(("RANKFOLD_LIBRARY", "RANKFOLD_CACHE"), before, strict=True):
            os.environ.pop(variable, None) if value is None else os.environ.update({variable: value})
    return outcome


def inputs(names: list[str], count: int) -> Iterator[tuple[str, int]]:
    """Which input is next: an entry, and its number there."""
    for number in range(count):
        yield names[number % len(names)], number // len(names)


def try_one(name: str, number: int, seed: int, outside: Path, outcome: Outcome, keep: Path | None) -> None:
    """One input, in a folder of its own."""
    work = outside / "given" / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (outside / "here").mkdir(exist_ok=True)
    outcome.tried[name] += 1
    fault, memory, began = "", reset_peak(), time.process_time()  # whatever else this machine does
    try:
        with chdir(outside / "here"):
            ENTRIES[name](Random(f"{name} {number} {seed}"), work)
    except UserError:
        outcome.refused[name] += 1
    except Exception as error:
        place = [line for line in traceback.extract_tb(error.__traceback__) if "/tests/" not in line.filename][-1:]
        at = f"{Path(place[0].filename).name}:{place[0].lineno}" if place else "?"
        fault = f"{name}: {type(error).__name__} at {at}"
        outcome.faults.setdefault(fault, f"{number} of seed {seed}\n{''.join(traceback.format_exception(error)[-6:])}")
    seconds, memory = time.process_time() - began, peak() - memory
    outcome.slowest, outcome.largest = max(outcome.slowest, seconds), max(outcome.largest, memory)
    if seconds > MOST_SECONDS or memory > MOST_BYTES:
        fault = f"{name}: {seconds:.1f} s, {memory >> 20} MiB"
        outcome.faults[fault] = f"{number} of seed {seed}"
    allowed = {"given", "here", "cache", "given/work"}
    folders = (outside, outside / "given", outside / "here")
    written = {str(path.relative_to(outside)) for folder in folders for path in folder.iterdir()} - allowed
    if written:
        fault = f"{name}: wrote {sorted(written)}"
        outcome.faults[fault] = f"{number} of seed {seed}"
    for path in written:
        shutil.rmtree(outside / path) if (outside / path).is_dir() else (outside / path).unlink()
    if fault and keep is not None:
        digest = hashlib.sha256(fault.encode()).hexdigest()[:6]
        shutil.rmtree(keep / f"{name}-{digest}", ignore_errors=True)
        shutil.copytree(work, keep / f"{name}-{digest}")


def reset_peak() -> int:
    """Starts counting the most memory anew, where the system can; bytes that the process has now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak()


def peak() -> int:
    """The most memory that this process has had since, bytes; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def main(words: list[str]) -> None:
    count, seed = int(words[0]), int(words[1]) if len(words) > 1 else 0
    keep = Path(words[2]) if len(words) > 2 else None
    began = time.time()
    found = try_inputs(count, seed, words[3:] or None, keep)
    for fault, how in found.faults.items():
        print(f"--- {fault}\n{how}")
    print(
        f"{sum(found.tried.values())} inputs, {sum(found.refused.values())} refused, {len(found.faults)} kinds of faults,",
        end=" ",
    )
    print(f"slowest {found.slowest:.2f} s, most memory {found.largest >> 20} MiB, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
