"""A run folder is one run: what is there is refused or goes whole, and a run goes on with the data that it knows."""

import hashlib
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import forked
import pytest
import torch
from commands import expect_error
from PIL import Image
from safetensors.torch import load_file, save_file
from settings import quick_config
from short_runs import adapter, compose_config, equal_states, train_until, write_config

from rankfold.apps.cli import main
from rankfold.toolkit.core import run_folder as runs
from rankfold.toolkit.core.cache import FULL_HASH_LIMIT, sampled_hash
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.files import write_text
from rankfold.toolkit.core.run_folder import Run, process_start_time
from rankfold.toolkit.data.subjects import find_samples
from rankfold.training.config.compose import ComposeConfig
from rankfold.training.config.instruct import InstructConfig
from rankfold.training.config.search import SearchConfig
from rankfold.training.config.yaml_file import from_yaml, to_yaml
from rankfold.training.launch import queue
from rankfold.training.launch.cross_validation import cross_validate
from rankfold.training.launch.start import check_resume, compose, resume, train
from rankfold.training.launch.trained_on import load_data, with_held_out
from rankfold.training.runs import library
from rankfold.training.runs.begin import check_out, prepare_folder
from rankfold.training.subject.held_out import split_measured_photos


def expect_refusal(capsys, *words):
    """Runs a command that must fail, whatever others have said before; returns its one sentence."""
    capsys.readouterr()
    return expect_error(capsys, *words)


def tree(folder):
    """Every file below a folder with a hash of its content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != runs.LOCK_FILE)


def reconfigure(run, **changes):
    """Changes a run's config.yaml as its user would."""
    write_text(run.config_file, to_yaml(replace(from_yaml(run.config_file), **changes)))


def as_killed(run):
    """The status that a process leaves which stopped unexpectedly."""
    write_text(run.status_file, json.dumps(run.status() | {"state": "running", "pid": 2**22 + 1, "born": 1.0}))
    run.unlock()


@pytest.fixture
def photos(images, tmp_path):
    """The images, in a folder that may be changed."""
    return Path(shutil.copytree(images, tmp_path / "photos"))


@pytest.fixture
def config(config, photos):
    return replace(config, images=photos)


@pytest.fixture(scope="module")
def done(base, images, tmp_path_factory):
    """A run that is done; not to be changed."""
    from rankfold.training.config.subject import SubjectConfig

    out = tmp_path_factory.mktemp("done") / "run"
    return train(
        quick_config(
            SubjectConfig,
            base=str(base),
            images=images,
            out=out,
            steps=4,
            batch_size=2,
            rank=4,
            preview_every=2,
            preview_steps=2,
            train_text_encoder=True,
            threads=1,
        )
    )


@pytest.fixture
def old(done, tmp_path):
    """A copy of it."""
    return Run(Path(shutil.copytree(done.folder, tmp_path / "run")))


def command(config, tmp_path):
    """The words that train with a config."""
    return ["train", "subject", "--config", str(write_config(config, tmp_path / "run.yaml"))]


# ---------------------------------------------------------------------------------------------- refused


def test_a_run_that_is_done_is_refused_with_the_ways_on(capsys, old, config, tmp_path):
    before = tree(old.folder)
    said = expect_refusal(capsys, *command(replace(config, out=old.folder), tmp_path))
    assert f"{old.folder} holds a run already, done at step 4 of 4" in said
    assert f"`rankfold resume {old.folder}`" in said
    assert "--overwrite" in said
    assert "another --out" in said
    assert tree(old.folder) == before


def test_a_stopped_run_is_refused_and_its_checkpoint_stays(capsys, config, tmp_path):
    run = train_until(config, 3)
    before = tree(run.folder)
    said = expect_refusal(capsys, *command(replace(config, rank=2), tmp_path))
    assert f"stopped at step 3 of 6: go on with it by `rankfold resume {run.folder}`" in said
    assert tree(run.folder) == before
    as_killed(run)
    assert "killed at step 3 of 6" in expect_refusal(capsys, *command(config, tmp_path))
    run.status_file.unlink()
    assert "only a config.yaml is known" in expect_refusal(capsys, *command(config, tmp_path))
    assert [path.name for path in run.checkpoint_files()] == ["000002.pt", "000003.pt"]


@pytest.mark.parametrize(
    "words",
    [
        "train subject --images IMAGES --base BASE --out RUN",
        "train subject --images IMAGES --base BASE --evaluate-every 2 --evaluate-clip embedded --folds 2 --class-noun cat --out RUN",
        "train instruct --data nowhere.json --out RUN",
        "search subject --images IMAGES --base BASE --out RUN",
        "search instruct --data nowhere.json --out RUN",
        "compose OTHER --base BASE --out RUN",
        "compose OTHER --base BASE --images IMAGES --out RUN",
        "compose instruct OTHER --out RUN",
        "compose instruct OTHER --data nowhere.json --out RUN",
        "queue RUN/config.yaml --out RUN",
        "demo --out RUN",
        "demo instruct --out HOME",
        "demo edit --out HOME",
    ],
)
def test_every_command_that_begins_a_run_refuses(capsys, words, old, done, base, images, tmp_path):
    places = {"RUN": old.folder, "OTHER": done.folder, "BASE": base, "IMAGES": images, "HOME": tmp_path}
    os.rename(old.folder, tmp_path / "alone")  # where the instruct demo has a run; the edit demo has one in "run"
    os.symlink(tmp_path / "alone", old.folder)
    before = tree(old.folder)
    for name, place in places.items():
        words = words.replace(name, str(place))
    said = expect_refusal(capsys, *words.split())
    assert "holds a run already, done at step 4 of 4" in said
    assert "--overwrite" in said
    assert tree(old.folder) == before
    assert not (tmp_path / "data").exists()


def test_a_live_run_is_never_overwritten(config, old):
    parent = os.getppid()
    write_text(
        old.status_file,
        json.dumps(old.status() | {"state": "running", "pid": parent, "born": process_start_time(parent)}),
    )
    old.lock_file.unlink()  # as where there are no locks
    before = tree(old.folder)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"in use by a live run .process {parent}."):
            train(replace(config, out=old.folder), overwrite=overwrite)
    assert tree(old.folder) == before


def test_folders_of_somebody_else_are_left_alone(config, tmp_path):
    out = tmp_path / "mine"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "notes.txt").write_text("mine")
    with pytest.raises(
        UserError, match="holds deep, which no run has left there; --overwrite clears folders of runs only"
    ):
        train(replace(config, out=out), overwrite=True)
    (out / "config.yaml").write_text("model: resnet\nmethod: sgd\n")
    with pytest.raises(UserError, match=r"holds config.yaml, which no run has left there, and a run would write there"):
        train(replace(config, out=out))
    assert tree(out).keys() == {"deep/notes.txt", "config.yaml"}
    with pytest.raises(UserError, match="is a file: give a folder"):
        train(replace(config, out=out / "config.yaml"))
    (out / "config.yaml").unlink()
    assert train(replace(config, out=out, steps=1)).status()["state"] == "done"
    train(replace(config, out=out, steps=1), overwrite=True)
    assert (out / "deep" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("words", ["--images RUN/samples", "--masks RUN/adapter", "--base RUN/export"])
def test_what_the_new_run_reads_is_not_deleted_for_it(capsys, words, old, images, base):
    shutil.copytree(base, old.folder / "export")
    before = tree(old.folder)
    given = {"--images": images, "--base": base} | dict([words.replace("RUN", str(old.folder)).split()])
    options = [word for pair in given.items() for word in pair]
    said = expect_refusal(capsys, "train", "subject", *options, "--out", old.folder, "--overwrite")
    assert "lies in the run" in said
    assert tree(old.folder) == before


def test_a_composition_does_not_take_the_place_of_its_source(capsys, old, base):
    said = expect_refusal(capsys, "compose", old.folder, "--base", base, "--out", old.folder, "--overwrite")
    assert "a source" in said
    assert "would be deleted" in said


# ---------------------------------------------------------------------------------------------- overwritten


def test_overwrite_leaves_nothing_of_the_old_run(old, config, capsys, tmp_path):
    clean = train(replace(config, out=tmp_path / "clean"))
    for entry in runs.RUN_ENTRIES:
        if not (old.folder / entry).exists():
            (old.folder / entry).mkdir()
            (old.folder / entry / "old").write_text("old")
    (old.folder / "notes.txt").write_text("mine")
    main([*command(replace(config, out=old.folder), tmp_path), "--overwrite"])
    said = capsys.readouterr().out
    assert "the run that was there (done at step 4 of 4) is overwritten; notes.txt stays" in said
    assert names(old.folder) == sorted([*names(clean.folder), "notes.txt"])
    assert equal_states(adapter(old.folder), adapter(clean.folder))
    assert [row["step"] for row in old.metrics()] == [2, 4, 6]
    assert "overwrite:" not in old.config_file.read_text()


def test_a_fixed_composition_overwrites_too(old, done, base, tmp_path):
    both = quick_config(ComposeConfig, base=str(base), adapters=(str(done.folder),), out=old.folder)
    with pytest.raises(UserError, match="holds a run already"):
        compose(both)
    run = compose(both, overwrite=True)
    assert not any(run.checkpoints.iterdir())
    assert not any(run.samples.iterdir())
    assert json.loads((run.adapter / "rankfold.json").read_text())["composed_how"] == "weighted sum"
    with pytest.raises(
        UserError, match=f"done: `rankfold resume {run.folder}` has nothing to add; start over with --ov"
    ):
        compose(both)
    with pytest.raises(UserError, match="has nothing to go on with"):
        resume(run.folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--rank", "0"], "--rank"), (["--images", "nowhere"], "nowhere"), (["--target-modules", "to_x"], "to_x")],
)
def test_a_command_that_cannot_work_costs_no_run(capsys, old, config, tmp_path, options, words):
    """The last is found only when the model is there."""
    before = tree(old.folder)
    said = expect_refusal(capsys, *command(replace(config, out=old.folder), tmp_path), "--overwrite", *options)
    assert words in said
    assert tree(old.folder) == before
    assert old.state() == "done"


def test_a_run_that_overwrote_another_and_failed_wears_nothing_of_it(capsys, old, config, tmp_path):
    """It fails after its beginning, so that there is no way back: neither adapter nor previews of the old one are there."""
    words = ["--overwrite", "--learning-rate", "1e9", "--log-every", "1", "--checkpoint-every", "1"]
    with pytest.raises(SystemExit):
        main([*command(replace(config, out=old.folder), tmp_path), *words])
    assert "not finite" in capsys.readouterr().err
    said = expect_refusal(capsys, "sample", "--run", old.folder)
    assert "has no finished adapter, as its run is not done (failed at step" in said
    assert not any(old.samples.iterdir())
    assert not any(old.adapter.iterdir())


@pytest.mark.parametrize("moves", range(8))
def test_killed_while_the_old_run_is_put_aside(old, config, monkeypatch, moves):
    """Behind any of the moves: the next command finds the old run whole."""
    before, replaced = tree(old.folder), os.replace
    left = iter([True] * moves)

    def replace_some(*paths):
        if not next(left, False):
            raise KeyboardInterrupt
        replaced(*paths)

    with monkeypatch.context() as patched:
        patched.setattr(runs.os, "replace", replace_some)
        with pytest.raises(KeyboardInterrupt):
            prepare_folder(old, replace(config, out=old.folder))
    assert moves == 0 or not old.config_file.exists()
    with pytest.raises(UserError, match="holds a run already, done at step 4 of 4"):
        check_out(replace(config, out=old.folder))
    assert not old.restore_aside() or moves
    assert tree(old.folder) == before


def test_killed_before_the_new_config_is_written(old, config, monkeypatch):
    before = tree(old.folder)

    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("rankfold.training.runs.begin.write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_folder(old, replace(config, out=old.folder))
    assert old.status()["state"] == "starting"
    as_killed(old)
    with pytest.raises(UserError, match="holds a run already, done at step 4 of 4"):
        check_out(replace(config, out=old.folder))
    assert tree(old.folder) == before


def test_killed_before_the_first_step_of_the_new_run(old, config, capsys, tmp_path):
    """Then it is the new run that is there, and nothing of the old one to be sampled; either command goes on."""
    clean = train(replace(config, out=tmp_path / "clean"))
    prepare_folder(old, replace(config, out=old.folder))
    as_killed(old)
    assert "has no finished adapter, as its run is not done (killed at step 0 of 6)" in expect_refusal(
        capsys, "sample", "--run", old.folder
    )
    resumed = resume(old.folder)
    assert equal_states(adapter(resumed.folder), adapter(clean.folder))
    assert names(resumed.folder) == names(clean.folder)


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_kills_while_another_run_is_overwritten(config, tmp_path):
    """kill -9 about the moment that the folder changes hands: what is there is the old run or the new one, whole, and goes on."""
    rng, run = Random(0), train(replace(config, rank=2))
    for rank in range(3, 23):
        words = [*command(replace(config, rank=rank), tmp_path), "--overwrite"]
        before = run.config_file.stat().st_mtime_ns
        process = forked.start_process(forked.commands(words), tmp_path / "said.txt")
        while process.is_alive() and not run.aside.exists() and run.config_file.stat().st_mtime_ns == before:
            pass
        time.sleep(rng.random() * rng.choice((0, 0.001, 0.01, 0.1, 1)))
        process.kill()
        process.join()
        run.recover()
        own = from_yaml(run.config_file).rank
        assert own == rank or run.state() == "done"
        for path in run.checkpoint_files():
            assert torch.load(path, weights_only=True)["config"]["rank"] == str(own)
        if run.state() != "done":
            resume(run.folder)
        assert json.loads((run.adapter / "unet" / "adapter_config.json").read_text())["r"] == own


def test_a_run_that_failed_before_its_first_checkpoint_begins_again_unasked(capsys, config, tmp_path):
    """A mistake that is found with the model, mended and given again; then one that a kill ended."""
    wrong = replace(config, target_modules=("to_x",), out=tmp_path / "run")
    assert "to_x" in expect_refusal(capsys, *command(wrong, tmp_path))
    run = Run(wrong.out)
    assert run.status()["state"] == "failed"
    (run.samples / "000000_00.png").write_text("old")
    (run.folder / "candidates.jsonl").write_text("old")
    main(command(config, tmp_path))
    assert "had no checkpoint yet, and another begins" in capsys.readouterr().out
    assert run.status()["state"] == "done"
    assert not any(run.samples.iterdir())
    assert not run.candidates.exists()
    assert not run.log_file.read_text().count("Traceback")
    for path in run.checkpoint_files():
        path.unlink()
    shutil.rmtree(run.adapter / "unet")
    as_killed(run)
    assert train(config).status()["state"] == "done"


def test_a_config_that_lies_there_begins_or_is_refused(capsys, config, tmp_path):
    run = Run(config.out)
    run.folder.mkdir()
    write_config(replace(config, steps=1), run.config_file)
    assert "only a config.yaml is known" in expect_refusal(capsys, *command(config, tmp_path))
    main(["train", "subject", "--config", str(run.config_file)])
    assert run.status()["state"] == "done"


def test_the_queue_overwrites_and_carries_on(capsys, config, old):
    again = queue.enqueue(replace(config, out=old.folder, steps=1), overwrite=True)
    assert names(again.folder) == ["config.yaml", "status.json"]
    assert "--overwrite" in expect_refusal(capsys, "queue", again.config_file)
    main(["queue", str(again.config_file), "--overwrite"])
    queue.run_queued(again.folder)
    assert again.state() == "done"
    both = quick_config(ComposeConfig, base=config.base, adapters=(str(again.folder),), out=old.folder.parent / "both")
    waiting = queue.enqueue(both)
    queue.run_queued(waiting.folder)
    assert waiting.state() == "done"
    assert waiting.finished_adapter().is_dir()


# ---------------------------------------------------------------------------------------------- no adapter before the end


def test_a_run_that_is_not_done_says_what_there_is(capsys, config, base, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKFOLD_LIBRARY", str(tmp_path / "library"))
    run = train_until(config, 3)
    for words in (
        ["sample", "--run", run.folder],
        ["sample", "--adapters", run.folder, "--base", base, "--prompt", "x"],
        ["export", run.folder],
        ["evaluate", run.folder, "--clip", "embedded"],
        ["inspect", run.folder],
        ["library", "add", run.folder],
        ["compose", run.folder, "--base", base, "--out", tmp_path / "both"],
    ):
        said = expect_refusal(capsys, *words)
        assert "has no finished adapter, as its run is not done (stopped at step 3 of 6)" in said, words
        assert f"rankfold resume {run.folder}" in said
    assert not library.entries()
    resume(run.folder)
    assert run.finished_adapter() == run.adapter


def test_more_steps_for_a_run_that_was_done(capsys, config, tmp_path):
    """While they are trained the adapter of before is named, and not taken for the run's."""
    run = train(replace(config, steps=2))
    reconfigure(run, steps=6)
    as_killed(run)
    said = expect_refusal(capsys, "export", run.folder)
    assert f"(What it had learned before is in {run.adapter}.)" in said
    whole = train(replace(config, out=tmp_path / "whole"))
    assert equal_states(adapter(resume(run.folder).folder), adapter(whole.folder))


# ---------------------------------------------------------------------------------------------- a run knows its data


def change_data(photos, how):
    """Changes the data of a run; returns the words that name the change."""
    if how == "added":
        Image.effect_noise((64, 64), 60).convert("RGB").save(photos / "00.png")
        return "photo 00.png was added"
    if how == "removed":
        (photos / "2.png").unlink()
        return "photo 2.png was removed"
    if how == "replaced":
        shutil.copyfile(photos / "3.png", photos / "2.png")
        return "photo 2.png has changed"
    if how == "captioned":
        (photos / "1.txt").write_text("a sks creature on grass")
        return "the caption of 1.png was added"
    (photos / "metadata.jsonl").write_text('{"file_name": "4.png", "text": "a sks creature"}\n')
    return "the caption of 4.png was added"


@pytest.mark.parametrize("how", ["added", "removed", "replaced", "captioned", "metadata"])
def test_changed_photos_are_refused_or_accepted(capsys, config, photos, how):
    run = train_until(config, 3)
    words, before = change_data(photos, how), tree(run.folder)
    said = expect_refusal(capsys, "resume", run.folder)
    assert f"have changed since its step 3: {words}." in said
    assert f"rankfold resume {run.folder} --accept-changes" in said
    assert tree(run.folder) == before
    main(["resume", str(run.folder), "--accept-changes"])
    assert f"{words}. It goes on with them as they are now." in capsys.readouterr().out
    assert run.status()["state"] == "done"
    facts = json.loads((run.adapter / "rankfold.json").read_text())
    assert facts["data_changed"] == f"until step 3 other data: {words}"
    reconfigure(run, steps=8)
    main(["resume", str(run.folder)])  # what was accepted is the run's
    assert run.status()["step"] == 8


def test_data_that_only_moved_in_time_are_the_same(capsys, config, photos):
    run = train_until(config, 3)
    for path in photos.iterdir():
        path.write_bytes(path.read_bytes())
        os.utime(path, (1, 1))
    assert resume(run.folder, accept_changes=True).status()["state"] == "done"
    assert "there is nothing to accept" in capsys.readouterr().out
    assert "data_changed" not in (run.adapter / "rankfold.json").read_text()


def test_masks_other_subjects_and_photos_to_measure_by_are_data(config, images, photos, tmp_path):
    masks, cat, measure = tmp_path / "masks", tmp_path / "cat", tmp_path / "measure"
    masks.mkdir()
    for path in photos.glob("*.png"):
        Image.new("L", Image.open(path).size, 255).save(masks / path.name)
    for folder in (cat, measure):
        shutil.copytree(images, folder)
    shutil.copytree(masks, tmp_path / "cat-masks")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {token} {noun}\n")
    measured = {
        "evaluate_every": 50,
        "evaluate_images": measure,
        "evaluate_prompts": str(prompts),
        "evaluate_clip": "embedded",
    }
    run = train_until(replace(config, masks=str(masks), **measured), 3)
    found = load_data(run).items
    Image.new("L", Image.open(photos / "0.png").size, 7).save(masks / "0.png")
    with pytest.raises(UserError, match=r"the mask of 0.png has changed"):
        resume(run.folder)
    (measure / "1.png").unlink()
    prompts.write_text("another {token} {noun}\n")
    with pytest.raises(UserError, match=r"--evaluate-images 1.png was removed, the prompts prompts.txt has changed"):
        resume(run.folder)
    assert len(found) > 15
    two = train_until(replace(config, also={"sks2 cat": str(cat)}, out=tmp_path / "two"), 3)
    (cat / "4.png").unlink()
    with pytest.raises(UserError, match=f"photo {cat / '4.png'} was removed"):
        resume(two.folder)


def test_another_base_is_other_data(config, base, tmp_path):
    own = Path(shutil.copytree(base, tmp_path / "base"))
    run = train_until(replace(config, base=str(own)), 3)
    file = own / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_in.bias"] += 1e-3
    save_file(state, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"the base's unet/diffusion_pytorch_model.safetensors has changed"):
        resume(run.folder)


def test_large_files_are_hashed_by_samples(tmp_path):
    file = tmp_path / "large"
    numbers = torch.arange(FULL_HASH_LIMIT // 4 + 1000, dtype=torch.int32).numpy()
    file.write_bytes(numbers.tobytes())
    first = sampled_hash(file)
    assert sampled_hash(file) == first
    (numbers * 2).tofile(file)
    second = sampled_hash(file)
    numbers[:-1].tofile(file)
    assert len({first, second, sampled_hash(file)}) == 3


def test_a_change_of_config_is_named_before_one_of_data(config, photos):
    run = train_until(config, 3)
    change_data(photos, "added")
    reconfigure(run, rank=2, seed=4)
    with pytest.raises(UserError, match="rank was 4, now it is 2; seed was 0, now it is 4"):
        resume(run.folder, accept_changes=True)
    assert run.status()["state"] == "stopped"


@pytest.mark.parametrize("whole", [False, True])
def test_a_checkpoint_without_hashes_goes_on_with_a_word(capsys, config, photos, whole):
    """As they were before there were any; whole: with a record of the data beside it none the less."""
    run = train_until(config, 3)
    for path in run.checkpoint_files():
        state = torch.load(path, weights_only=True)
        del state["data"]
        torch.save(state, path)
    if not whole:
        run.data_file.unlink()
    change_data(photos, "added")
    resume(run.folder)
    assert "says nothing of its data" in capsys.readouterr().out
    change_data(photos, "removed")
    with pytest.raises(UserError, match="was removed"):
        resume(run.folder)


def test_the_checkpoint_itself_knows_its_data(config, photos):
    run = train_until(config, 3)
    run.data_file.unlink()
    check_resume(run.folder)
    change_data(photos, "added")
    run.data_file.write_text("{")
    with pytest.raises(UserError, match="they differ, and how is not known any more"):
        resume(run.folder)


def test_before_the_first_checkpoint_nothing_was_trained(capsys, config, photos, tmp_path):
    run = Run(config.out)
    prepare_folder(run, config)
    as_killed(run)
    change_data(photos, "added")
    whole = train(replace(config, out=tmp_path / "whole"))
    assert equal_states(adapter(resume(run.folder).folder), adapter(whole.folder))


# ---------------------------------------------------------------------------------------------- what is held out stays so


@pytest.fixture
def measured(config, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a {token} {noun} on the beach\n")
    more = {"evaluate_every": 2, "evaluate_prompts": str(file), "evaluate_clip": "embedded", "preview_steps": 2}
    return replace(config, **more)


def test_held_out_photos_stay_held_out(measured, photos):
    """With other photos in the folder the draw would be another one."""
    run = train_until(measured, 3)
    (held,) = load_data(run).held_out
    for number in range(7):
        Image.effect_noise((64, 64), 60).convert("RGB").save(photos / f"0{number}.png")
    drawn = [path.name for path in split_measured_photos(measured, find_samples(photos))[1]]
    assert drawn != [held]
    resume(run.folder, accept_changes=True)
    found = load_data(run)
    assert found.held_out == (held,)
    kept, out = split_measured_photos(with_held_out(measured, found), find_samples(photos))
    assert [path.name for path in out] == [held]
    assert len(kept) == 11
    real = [row["likeness_real"] for row in run.metrics() if "likeness_real" in row]
    assert len(real) == 4


def test_a_held_out_photo_is_known_by_its_content(measured, photos):
    run = train_until(measured, 3)
    (held,) = load_data(run).held_out
    other = next(path.name for path in sorted(photos.iterdir()) if path.name != held)
    content = (photos / held).read_bytes(), (photos / other).read_bytes()
    (photos / held).write_bytes(content[1])  # names are exchanged
    (photos / other).write_bytes(content[0])
    check_resume(run.folder, accept_changes=True)
    assert load_data(run).held_out == (other,)
    (photos / other).rename(photos / "renamed.png")
    check_resume(run.folder, accept_changes=True)
    assert load_data(run).held_out == ("renamed.png",)
    (photos / "renamed.png").unlink()
    with pytest.raises(UserError, match=r"\(renamed.png\) none is left"):
        check_resume(run.folder, accept_changes=True)


def test_removed_photos_are_named_though_too_few_are_left_to_draw_one(measured, photos):
    run = train_until(measured, 3)
    gone = [path for path in sorted(photos.iterdir()) if path.name not in load_data(run).held_out][:2]
    for path in gone:
        path.unlink()
    with pytest.raises(UserError, match=f"photo {gone[0].name} was removed, photo {gone[1].name} was removed"):
        resume(run.folder)
    assert resume(run.folder, accept_changes=True).status()["state"] == "done"


# ---------------------------------------------------------------------------------------------- other methods, other commands


@pytest.fixture
def talk(tmp_path):
    """Four rows in two forms, a run on them stopped at step 2, and what a change is called."""
    for number in range(3):
        Image.new("RGB", (32, 32), ("red", "green", "blue")[number]).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{number}.png", "question": "What colour?", "answer": "red"} for number in range(3)]
    rows.append({"question": "Hello?", "answer": "Hello."})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "old.json").write_text(json.dumps(rows[:2]))
    return quick_config(InstructConfig, 
        base="tiny-vlm", data=tmp_path / "data.json", replay=tmp_path / "old.json", out=tmp_path / "run", steps=4,
        batch_size=2, rank=2, checkpoint_every=2, preview_every=0, workers=0, threads=1,
    )  # fmt: skip


def test_changed_rows_and_their_images_are_named(talk, tmp_path, capsys):
    run = train_until(talk, 2)
    rows = json.loads(talk.data.read_text())
    Image.new("RGB", (32, 32), "white").save(tmp_path / "1.png")
    assert "image 1.png has changed" in expect_refusal(capsys, "resume", run.folder)
    Image.new("RGB", (32, 32), "green").save(tmp_path / "1.png")
    talk.data.write_text(json.dumps(rows, indent=3))  # the same rows, written in another way
    check_resume(run.folder)
    rows[1]["answer"] = "green"
    talk.data.write_text(json.dumps(rows))
    assert "data.json, row 2 has changed" in expect_refusal(capsys, "resume", run.folder)
    talk.data.write_text(json.dumps(rows[:3]))
    assert "data.json, row 2 has changed, data.json, row 4 was removed" in expect_refusal(capsys, "resume", run.folder)
    talk.replay.write_text(json.dumps(rows[:1]))
    said = expect_refusal(capsys, "resume", run.folder)
    assert "replay: old.json, row 2 was removed" in said
    assert run.state() == "stopped"
    main(["resume", str(run.folder), "--accept-changes"])
    facts = json.loads((run.adapter / "rankfold.json").read_text())
    assert [own["rows"] for own in facts["data"]] == [3, 1]
    assert "until step 2 other data" in facts["data_changed"]


def test_a_search_goes_on_with_the_same_data_only(config, photos):
    search = quick_config(
        SearchConfig,
        base=config.base,
        images=photos,
        out=config.out,
        steps=4,
        batch_size=2,
        rank=2,
        checkpoint_every=2,
        preview_every=0,
        threads=1,
        population=4,
        generations=1,
        parents=2,
        mutations=1,
        crossovers=1,
        held_out_draws=1,
    )
    run = train_until(search, 2)
    change_data(photos, "added")
    with pytest.raises(UserError, match=r"photo 00.png was added. A search compares what was judged on the same data"):
        resume(run.folder, accept_changes=True)


def test_a_source_that_was_trained_anew_is_other_data(base, photos, old, done, tmp_path):
    config = compose_config(base, [old, done], tmp_path / "both", images=photos)
    run = train_until(config, 3)
    file = old.adapter / "unet" / "adapter_model.safetensors"
    save_file({name: value * 2 for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"adapter {old.folder} has changed"):
        resume(run.folder)
    assert resume(run.folder, accept_changes=True).status()["state"] == "done"


def test_the_queue_and_the_studio_ask_too(config, photos):
    """A run that is put into the queue again, and one whose data change while it waits."""
    from rankfold.apps.studio.backend.context import Studio
    from rankfold.apps.studio.backend.paths import StudioPaths
    from rankfold.apps.studio.pages.watch import WatchPage

    run = train_until(config, 3)
    watch = WatchPage(Studio(StudioPaths(run.folder.parent), start_workers=False))
    change_data(photos, "added")
    for again in (queue.requeue, lambda own: watch.resume_run(own.folder.name)):
        with pytest.raises(UserError, match="--accept-changes"):
            again(run)
        assert run.state() == "stopped"
    assert "in the queue" in watch.resume_run(run.folder.name, True)
    assert run.state() == "queued"
    assert not watch.paths.adapters()
    change_data(photos, "replaced")
    with pytest.raises(UserError, match=r"photo 2.png has changed"):
        queue.run_queued(run.folder)
    assert run.status()["state"] == "failed"
    assert "--accept-changes" in run.status()["error"]
    queue.requeue(run, accept_changes=True)
    queue.run_queued(run.folder)
    assert run.state() == "done"


# ---------------------------------------------------------------------------------------------- cross-validation


def test_a_cross_validation_goes_on_with_its_own_folds_only(capsys, measured, photos, tmp_path):
    measured = replace(measured, steps=2)
    run = cross_validate(measured, 2)
    with pytest.raises(UserError, match=r"folds/0 is of another run or cross-validation: steps was 2, now it is 4"):
        cross_validate(replace(measured, steps=4), 2)
    with pytest.raises(UserError, match=r"is of another run or cross-validation: rank was 4, now it is 2"):
        cross_validate(replace(measured, rank=2), 2)
    with pytest.raises(UserError, match="hold_out was"):
        cross_validate(measured, 3)
    with pytest.raises(UserError, match="holds a run already"):
        train(measured)
    beat, before = run.status()["beat"], tree(run.folder)
    assert cross_validate(measured, 2).status()["beat"] == beat
    assert tree(run.folder) == before
    shutil.copyfile(photos / "3.png", photos / "2.png")
    with pytest.raises(UserError, match=r"photo 2.png has changed"):
        cross_validate(measured, 2)
    again = cross_validate(measured, 2, overwrite=True)
    assert again.status()["beat"] > beat
    assert len(again.folds()) == 2


def test_a_cross_validation_that_was_killed_goes_on_by_the_same_command(capsys, measured, tmp_path):
    measured = replace(measured, steps=2)
    whole = cross_validate(replace(measured, out=tmp_path / "whole"), 2)
    part = Run(Path(shutil.copytree(whole.folder, measured.out)))
    for own in (part, *part.folds()):
        reconfigure(own, out=own.folder)
    for entry in part.run_entries(("folds",)):
        runs.delete_tree(entry)
    assert "the folds of a cross-validation" in expect_refusal(capsys, *command(measured, tmp_path))
    assert "the command with --folds that began it goes on" in expect_refusal(capsys, "resume", part.folder)
    as_killed(part.folds()[1])
    first = part.folds()[0].status()["beat"]
    run = cross_validate(measured, 2)
    assert part.folds()[0].status()["beat"] == first
    assert equal_states(adapter(run.folder), adapter(whole.folder))
    as_killed(run)  # in its last training, behind a checkpoint
    assert cross_validate(measured, 2).status()["state"] == "done"


# ---------------------------------------------------------------------------------------------- demos


def test_a_demo_takes_the_place_of_a_demo_and_of_nothing_else(old):
    from rankfold.apps.cli.demo import DemoConfig, demo_config, is_demo

    assert not is_demo(old)
    assert not is_demo(Run(old.folder / "nowhere"))
    for changes in ({}, {"base": "tiny-dit", "steps": 7, "adapter": "lora", "seed": 3}):
        write_text(old.config_file, to_yaml(demo_config(DemoConfig(out=old.folder, **changes))))
        assert is_demo(old)
    reconfigure(old, rank=3)
    assert not is_demo(old)


@pytest.mark.parametrize("task", ["sort", "where", "moves"])
def test_the_instruct_demo_knows_its_own_data(capsys, tmp_path, task):
    from rankfold.training.embedded.demo_instruct import is_demo_data, write_demo_data

    few = {"task": task, "rows": 2, "test": 2, "old": 2}
    write_demo_data(tmp_path / "data", **few)
    assert is_demo_data(tmp_path / "data")
    (tmp_path / "data" / "train.json").unlink()
    assert not is_demo_data(tmp_path / "data")
    for file in (tmp_path / "data").glob("*.json"):
        file.unlink()
    assert is_demo_data(tmp_path / "data")  # killed while the images were drawn
    (tmp_path / "data" / "train.json").write_text('[{"image": "1.png", "question": "mine?", "answer": "yes"}]')
    before = tree(tmp_path)
    assert "holds files that no demo has written" in expect_refusal(
        capsys, "demo", "instruct", "--out", tmp_path, "--overwrite"
    )
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_the_demo_twice(capsys, tmp_path):
    from rankfold.apps.cli.demo import DemoConfig, demo_config

    run = train(demo_config(DemoConfig(steps=1, threads=1, out=tmp_path / "demo")))
    (run.folder / "export").mkdir()
    (run.folder / "export" / "old.safetensors").write_text("old")
    main(["demo", "--steps", "2", "--threads", "1", "--out", str(run.folder)])
    said = capsys.readouterr().out
    assert f"{run.folder} holds a demo already, which this one replaces." in said
    assert "likeness" in said
    assert run.status()["step"] == 2
    assert not (run.folder / "export" / "old.safetensors").exists()


@pytest.mark.slow
def test_the_instruct_demo_on_boxes(capsys, tmp_path):
    """One step: the figures of boxes stand beside one box for all, and the demo is replaced by the next."""
    for _ in range(2):
        main(["demo", "instruct", "--task", "where", "--steps", "1", "--out", str(tmp_path / "demo")])
    said = capsys.readouterr().out
    assert f"{tmp_path / 'demo'} holds a demo already" in said
    assert "mean IoU of boxes, after" in said
    assert "one box for all" in said
