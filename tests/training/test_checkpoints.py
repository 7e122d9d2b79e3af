"""Damaged checkpoints: the newest whole one is taken, and which were damaged is said."""

import shutil
from dataclasses import replace

import pytest
import torch
from short_runs import adapter, equal_states, train_until

from rankfold.toolkit.core.errors import UserError
from rankfold.training.engine.checkpoint import DamagedError, read_checkpoint
from rankfold.training.launch.start import resume, train


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def put_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a folder": put_folder,
    "foreign": lambda path: torch.save({"step": 4}, path),
    "a list": lambda path: torch.save([1], path),
    "text": lambda path: path.write_text("checkpoint"),
}


@pytest.fixture(scope="module")
def stopped(base, images, tmp_path_factory):
    """A run that was stopped after step 5, with two checkpoints, and what it ends as."""
    from settings import quick_config

    from rankfold.training.config.subject import SubjectConfig

    root = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKFOLD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        config = quick_config(
            SubjectConfig, base=str(base), images=images, out=root / "whole", steps=6, batch_size=2, rank=2, preview_every=0,
            checkpoint_every=4, keep_checkpoints=3, threads=1,
        )  # fmt: skip
        whole = train(config)
        part = train_until(replace(config, out=root / "part"), 5)
    return part.folder, adapter(whole.folder)


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_the_one_before_is_taken(stopped, tmp_path, capsys, damage):
    folder, expected = stopped
    shutil.copytree(folder, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "000005.pt"
    DAMAGES[damage](newest)
    run = resume(tmp_path / "run")
    said = capsys.readouterr().out
    assert "000005.pt is" in said
    assert "Going on from 000004.pt." in said
    assert run.status()["state"] == "done"
    assert equal_states(adapter(run.folder), expected)


def test_every_flipped_bit_of_a_tensor_is_seen(stopped, tmp_path):
    """Wherever it lies: the file is refused, or holds what was written."""
    file = tmp_path / "000005.pt"
    shutil.copy(stopped[0] / "checkpoints" / "000005.pt", file)
    expected, size, seen = read_checkpoint(file), file.stat().st_size, 0
    for place in range(40, size, size // 40):
        flip(file, place)
        try:
            state = read_checkpoint(file)
        except DamagedError:
            seen += 1
        else:
            pairs = zip(state["parameters"], expected["parameters"], strict=True)
            assert all(torch.equal(own, other) for own, other in pairs)
        flip(file, place)
    assert seen > 20


def test_none_that_is_whole(stopped, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        cut(path)
    with pytest.raises(UserError, match="No checkpoint is left to go on from: start over with --overwrite"):
        resume(tmp_path / "run")


def test_a_newer_one_is_not_guessed_at(stopped, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "000005.pt"
    torch.save(torch.load(path, weights_only=True) | {"format": 99}, path)
    with pytest.raises(UserError, match="was written by a newer rankfold"):
        resume(tmp_path / "run")
