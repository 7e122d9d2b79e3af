"""Damaged and hostile inputs that once ended in a traceback: each is used, passed over, or refused in one sentence.

A file of tests/corpus is called after its entry point here, and the exception that it raised.
"""

import json
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from rankfold.pipelines.generate import read_recipe
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.run_folder import CLAIM_FILE, Run
from rankfold.toolkit.data.images import image_size, load_rgb
from rankfold.toolkit.data.subjects import Sample, check_masks, find_samples, load_mask
from rankfold.toolkit.diffusion.load import resolve_base
from rankfold.toolkit.formats.folder_report import inspect_adapter
from rankfold.training.config.convert import convert_config
from rankfold.training.config.yaml_file import from_yaml
from rankfold.training.evaluation.measuring import load_measurements, truncate_measurements
from rankfold.training.evaluation.report import runs_page
from rankfold.training.launch import queue
from rankfold.training.launch.start import check_config
from rankfold.training.runs import library
from rankfold.training.search.answers import read_answers

CORPUS = Path(__file__).resolve().parents[1] / "corpus"


def put(file, folder, name, *, image=True):
    """A copy of the file in a folder, beside an image."""
    folder.mkdir()
    if image:
        Image.new("RGB", (64, 64)).save(folder / "0.png")
    shutil.copy(file, folder / name)
    return folder


def run_with(file, folder, name):
    """A run that is done, with the file in place of one of its own."""
    folder.mkdir()
    (folder / "config.yaml").write_text("steps: 3\n")
    (folder / "status.json").write_text('{"state": "done", "step": 3}')
    shutil.copy(file, folder / name)
    return Run(folder)


def use_masks(sample, masks):
    check_masks([sample], masks)
    load_mask(sample, masks, (64, 64), "center")


def use_mask_folder(file, work):
    Image.new("RGB", (64, 64)).save(work / "0.png")
    use_masks(Sample(work / "0.png"), str(put(file, work / "masks", "0.png", image=False)))


def use_config(file, work):
    check_config(replace(from_yaml(file), out=work / "run"))


def use_status(file, work):
    run = run_with(file, work / "run", "status.json")
    run.state(), run.summary(), run.is_live(), run.is_worth_keeping()
    queue.queued_runs(work)
    run.claim()


def use_claim(file, work):
    run = run_with(file, work / "run", CLAIM_FILE)
    run.set_status(state="queued")
    assert queue.claim_run(run)


def use_worker(file, work):
    shutil.copy(file, work / f"{queue.WORKER}0.lock")
    assert queue.live_workers(work) == []
    assert queue.run_worker(work, until_empty=True) == 0


def use_measured(file, work):
    run = run_with(file, work / "run", "measured.jsonl")
    load_measurements(run)
    truncate_measurements(run, 1)


def use_metrics(file, work):
    run = run_with(file, work / "run", "metrics.jsonl")
    run.truncate_metrics(1)
    runs_page([run.folder])


def use_library(file, work):
    put(file, work / "library" / "mine", "entry.json", image=False)
    (work / "library" / "mine" / "adapter").mkdir()
    library.entries()
    library.get("mine")


ENTRIES = {
    "foreign_config": lambda file, work: convert_config(file).yaml(),
    "captions_txt": lambda file, work: find_samples(put(file, work / "x", "0.txt")),
    "captions_metadata": lambda file, work: find_samples(put(file, work / "x", "metadata.jsonl")),
    "config_yaml": use_config,
    "model_index": lambda file, work: resolve_base(str(put(file, work / "x", "model_index.json", image=False))),
    "picture_find_samples": lambda file, work: find_samples(put(file, work / "x", file.name, image=False)),
    "picture_load_rgb": lambda file, work: load_rgb(file),
    "picture_size_of": lambda file, work: image_size(file),
    "picture_mask_folder": use_mask_folder,
    "picture_mask_alpha": lambda file, work: use_masks(Sample(file), "alpha"),
    "recall_other": lambda file, work: read_recipe(file),
    "status.json": use_status,
    "status.json_claim": use_status,
    "claim.json": use_claim,
    "worker.json": use_worker,
    "measured.jsonl": use_measured,
    "metrics.jsonl": use_metrics,
    "report_metrics": use_metrics,
    "report_figures": lambda file, work: runs_page([run_with(file, work / "run", "metrics.json").folder]),
    "candidates.jsonl": lambda file, work: read_answers(run_with(file, work / "run", "candidates.jsonl")),
    "library_entry": use_library,
    "lora_inspect": lambda file, work: inspect_adapter(file, None),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", sorted(file.name for file in CORPUS.iterdir()))
def test_it_is_a_sentence_at_most(name, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKFOLD_LIBRARY", str(tmp_path / "library"))
    (tmp_path / "library").mkdir()
    entry = name.split("-")[0]
    began = time.perf_counter()
    with suppress(UserError):
        ENTRIES[entry](CORPUS / name, tmp_path)
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize("depth", [100_000])
def test_nesting_without_end(tmp_path, depth):
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    for name in ("metadata.jsonl", "0.json"):
        (tmp_path / name).write_text("[" * depth)
        with pytest.raises(UserError):
            find_samples(tmp_path)
        (tmp_path / name).unlink()


def test_an_image_is_what_it_holds(tmp_path):
    """PostScript is not handed to another program because it is called .png."""
    (tmp_path / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match="not a valid image"):
        find_samples(tmp_path)


def test_a_damaged_entry_of_the_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKFOLD_LIBRARY", str(tmp_path))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "entry.json").write_text(json.dumps({"name": "half"})[:-3])
    assert library.entries() == []
    assert library.damaged_entries() == ["half"]
    with pytest.raises(UserError, match="is damaged or half written"):
        library.get("half")


def test_an_addition_that_fails_takes_no_name(tmp_path, monkeypatch):
    from safetensors.torch import save_file
    from torch import ones

    monkeypatch.setenv("RANKFOLD_LIBRARY", str(tmp_path / "library"))
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{name}.lora_A.weight": ones(2, 8), f"{name}.lora_B.weight": ones(8, 2)}, tmp_path / "a.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(library, "write_text", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            library.add(tmp_path / "a.safetensors", base="tiny")
    assert [path.name for path in (tmp_path / "library").iterdir()] == [library.LOCK_FILE]
    assert library.add(tmp_path / "a.safetensors", base="tiny").name == "a"
    (tmp_path / "library" / "a" / "entry.json").write_text("{")
    assert library.add(tmp_path / "a.safetensors", base="tiny").name == "a"
    assert [entry.name for entry in library.entries()] == ["a"]


def test_a_word_never_leads_out_of_the_folder(tmp_path):
    from safetensors.torch import save_file
    from torch import ones

    from rankfold.toolkit.diffusion.textual_inversion import FILE, export_token_embeddings

    (tmp_path / "adapter").mkdir()
    words = {f"text_encoder.{word}": ones(1, 4) for word in ("<../../x>", "<.._.._x>", "/etc/x", "<sks>", "..")}
    save_file(words, tmp_path / "adapter" / FILE)
    paths = export_token_embeddings(tmp_path / "adapter", tmp_path / "deep" / "out")
    assert len({path.resolve() for path in paths}) == 5
    assert {path.resolve().parent for path in paths} == {(tmp_path / "deep" / "out").resolve()}
    assert (tmp_path / "deep" / "out" / "sks.safetensors").is_file()


@pytest.mark.parametrize("expression", ["(a+)+$", "(.*)*x", ".*.*.*.*x", "(a|aa)+$", "(x{1,9}){1,9}"])
def test_expressions_that_never_end_are_refused(expression):
    from rankfold.toolkit.formats.scales import pattern

    with pytest.raises(UserError, match="may take hours to match"):
        pattern({expression: 4}, "alpha_pattern")
    assert pattern({r"^unet\.down.*attn1\.to_q": 4, "to_k": 2}, "x") == {r"^unet\.down.*attn1\.to_q": 4.0, "to_k": 2.0}
