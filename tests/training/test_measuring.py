"""Measuring while training: what is held out, which step is kept, when to stop, and that a resume measures the same."""

import json
from dataclasses import replace

import pytest
import torch
from forked import run_in_two_processes
from short_runs import adapter, train_until, write_config

from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.run_folder import Run
from rankfold.toolkit.data.subjects import find_samples
from rankfold.training.config.yaml_file import from_yaml
from rankfold.training.evaluation import measuring
from rankfold.training.evaluation.measuring import (
    Measurement,
    Series,
    choose_step,
    describe_choice,
    has_stopped_improving,
)
from rankfold.training.launch.cross_validation import cross_validate
from rankfold.training.launch.start import preflight, resume, train
from rankfold.training.subject.held_out import split_measured_photos

PROMPTS = tuple(f"prompt {number}" for number in range(8))


def make_measurement(step, likeness, fidelity, spread=0.0):
    random = torch.Generator().manual_seed(step)
    noise = spread * torch.randn(2, len(PROMPTS), generator=random)
    return Measurement(step, tuple((likeness + noise[0]).tolist()), tuple((fidelity + noise[1]).tolist()), PROMPTS)


BASE = make_measurement(0, 0.2, 0.5)


def series(*steps, real=0.8):
    return Series(BASE, steps, real)


@pytest.fixture
def measured(config, tmp_path):
    """Two prompts, two denoising steps."""
    file = tmp_path / "prompts.txt"
    file.write_text("a {token} {noun} on the beach\na {token} {noun} in the snow\n")
    more = {"evaluate_every": 2, "evaluate_prompts": str(file), "evaluate_clip": "embedded", "preview_steps": 2}
    return replace(config, learning_rate=0.02, **more)


def test_scores_by_hand():
    """Half of the way to real photos, a fifth of the prompt fidelity lost."""
    torch.testing.assert_close(
        series(make_measurement(10, 0.5, 0.4)).scores()[10], torch.full((8,), 0.5 - 0.2), rtol=1e-4, atol=1e-5
    )


def test_the_best_is_kept_when_it_is_sure():
    choice = choose_step(
        [series(make_measurement(10, 0.3, 0.5), make_measurement(20, 0.6, 0.49), make_measurement(30, 0.65, 0.2))]
    )
    assert (choice.step, choice.best, choice.alike) == (20, 20, (20,))
    assert choice.front == (10, 20, 30)
    assert "surely" in describe_choice(choice)


def test_of_steps_that_cannot_be_told_apart_the_earliest_is_kept():
    noisy = [make_measurement(step, 0.6 + 0.001 * step / 10, 0.5, spread=0.1) for step in (10, 20, 30)]
    choice = choose_step([series(*noisy)])
    assert choice.step == 10
    assert set(choice.alike) == {10, 20, 30}
    assert "cannot be told apart" in describe_choice(choice)


def test_training_stops_when_nothing_is_gained():
    rising = [make_measurement(step, 0.2 + step / 100, 0.5) for step in (10, 20, 30)]
    flat = [*rising, make_measurement(40, 0.5, 0.5), make_measurement(50, 0.5, 0.5)]
    assert not has_stopped_improving(series(*rising), 2)
    assert has_stopped_improving(series(*flat), 2)
    assert not has_stopped_improving(series(*flat), 0)
    assert not has_stopped_improving(series(*flat[:2]), 2)


def test_what_is_held_out_is_not_trained_on(measured, images):
    samples = find_samples(images)
    kept, out = split_measured_photos(measured, samples)
    assert len(out) == 1
    assert len(kept) == 4
    assert out[0] not in [sample.path for sample in kept]
    assert split_measured_photos(measured, samples)[1] == out
    assert split_measured_photos(replace(measured, evaluate_images=images), samples) == (
        samples,
        sorted(s.path for s in samples),
    )


def test_a_run_keeps_its_best_step(measured, capsys):
    run = train(replace(measured, keep="best"))
    base, *found = measuring.load_measurements(run)
    assert base.step == 0
    assert [one.step for one in found] == [2, 4, 6]
    assert all(len(one.likeness) == 2 for one in found)
    choice = json.loads((run.folder / "choice.json").read_text(encoding="utf-8"))
    assert f"step {choice['step']} is kept" in capsys.readouterr().out
    kept, own = adapter(run.folder), measuring.snapshot_folder(run, choice["step"])
    from safetensors.torch import load_file

    theirs = load_file(own / "unet" / "adapter_model.safetensors")
    assert all(torch.equal(kept[key], theirs[key]) for key in kept)
    assert len([row for row in run.metrics() if "likeness" in row]) == 4


def test_measuring_changes_nothing_that_is_trained(measured, images):
    """The weights are those of a run that measures by other photos than it trains on, and measures nothing."""
    plain = replace(measured, evaluate_every=0, evaluate_images=None, out=measured.out.parent / "plain")
    both = train(replace(measured, evaluate_images=images)), train(plain)
    assert all(torch.equal(a, b) for a, b in zip(*(adapter(run.folder).values() for run in both), strict=True))


def test_a_resumed_run_measures_the_same(measured):
    whole = train(measured)
    part = train_until(replace(measured, out=measured.out.parent / "part"), 3)
    resume(part.folder)
    assert measuring.load_measurements(Run(part.folder)) == measuring.load_measurements(whole)


def test_two_processes_measure_as_one_does(measured, tmp_path):
    """Nine prompts are two batches, one a process; base and step 1 are measured, and previews drawn."""
    prompts = tmp_path / "nine.txt"
    prompts.write_text("".join(f"a {{token}} {{noun}} {number}\n" for number in range(9)))
    more = {"steps": 1, "evaluate_every": 1, "evaluate_prompts": str(prompts), "preview_every": 1, "log_every": 1}
    one = train(replace(measured, **more))
    two = replace(measured, **more, out=tmp_path / "two")
    run_in_two_processes(tmp_path, ["train", "subject", "--config", str(write_config(two, tmp_path / "run.yaml"))])
    both = [measuring.load_measurements(run) for run in (one, Run(two.out))]
    assert [found.step for found in both[1]] == [0, 1]
    for a, b in zip(*both, strict=True):
        assert b.prompts == a.prompts
        assert b.likeness == pytest.approx(a.likeness, abs=2e-3)
        assert b.fidelity == pytest.approx(a.fidelity, abs=2e-3)
    previews = [sorted(run.samples.glob("*.png")) for run in (one, Run(two.out))]
    assert len(previews[1]) == len(previews[0]) > 0


def test_several_runs_are_chosen_by_together():
    """Alone the first run's best is step 20 and the second's step 10; together it is 20."""
    one = series(make_measurement(10, 0.3, 0.5), make_measurement(20, 0.7, 0.5))
    other = series(make_measurement(10, 0.5, 0.5), make_measurement(20, 0.49, 0.5), make_measurement(30, 0.7, 0.5))
    assert choose_step([other]).step == 30
    together = choose_step([one, other])
    assert (together.step, together.best) == (20, 20)
    assert set(together.alike) <= {10, 20}


def test_cross_validation(measured, images, capsys):
    """Every photo is held out once; the last run has all of them and the steps that the folds chose; nothing is done twice."""
    run = cross_validate(measured, 2)
    folds = [Run(run.folder / "folds" / str(k)) for k in range(2)]
    choice = json.loads((run.folder / "choice.json").read_text(encoding="utf-8"))
    assert choice["step"] in (2, 4, 6)
    assert run.status()["step"] == choice["step"]
    held = [from_yaml(fold.config_file).hold_out for fold in folds]
    assert sorted([*held[0], *held[1]]) == sorted(path.name for path in images.glob("*.png"))
    assert "cross-validation of 2 runs" in capsys.readouterr().out
    beats = [fold.status()["beat"] for fold in folds]
    again = cross_validate(replace(measured, out=run.folder), 2)
    assert [fold.status()["beat"] for fold in folds] == beats
    assert all(
        torch.equal(a, b) for a, b in zip(adapter(run.folder).values(), adapter(again.folder).values(), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "folds", "words"),
    [
        ({"evaluate_every": 0}, 2, "needs --evaluate-every"),
        ({"hold_out": ("0.png",)}, 2, "needs no --hold-out"),
        ({}, 9, "between 2 and the number of photos, 5"),
    ],
)
def test_cross_validation_mistakes(measured, change, folds, words):
    with pytest.raises(UserError, match=words):
        cross_validate(replace(measured, **change), folds)


def test_photos_that_are_named_are_held_out(measured, images):
    samples = find_samples(images)
    names = tuple(sorted({sample.path.name for sample in samples})[1:3])
    kept, out = split_measured_photos(replace(measured, hold_out=names), samples)
    assert [path.name for path in out] == list(names)
    assert len(kept) == 3
    with pytest.raises(UserError, match="must name photos"):
        split_measured_photos(replace(measured, hold_out=("nobody.png",)), samples)


def test_patience_ends_a_run(measured):
    """A learning rate of nearly nothing gains nothing."""
    run = train(replace(measured, learning_rate=1e-12, steps=12, patience=2, evaluate_every=2))
    assert run.status()["step"] < 12
    assert run.status()["state"] == "done"
    assert (run.adapter / "unet").is_dir()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"evaluate_every": 0, "keep": "best"}, "set --evaluate-every"),
        ({"evaluate_every": 0, "patience": 2}, "set --evaluate-every"),
        ({"evaluate_clip": ""}, "--evaluate-clip is missing"),
        ({"evaluate_prompts": "nowhere"}, "--prompts nowhere"),
        ({"also": {"sks2 cat": "x"}}, "--evaluate-every"),
    ],
)
def test_mistakes_are_one_sentence(measured, change, words):
    with pytest.raises(UserError, match=words):
        preflight(replace(measured, **change))


def test_too_few_photos_to_hold_one_out(measured, images, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for file in sorted(images.iterdir())[:3]:
        (few / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="too few to hold one out"):
        preflight(replace(measured, images=few))


def test_the_loss_at_fixed_noise(measured):
    """The same noise each time, so that it is a curve: on what is trained on it falls, and without training nothing changes."""
    rows = [row for row in train(measured).metrics() if "validation_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert rows[-1]["training_loss"] < rows[0]["training_loss"]
    for row in rows:
        bands = [row[f"validation_loss_{band}"] for band in ("clean", "middle", "noisy")]
        assert sum(bands) / 3 == pytest.approx(row["validation_loss"])
        assert row["class_loss"] > 0
    still = train(replace(measured, learning_rate=1e-12, out=measured.out.with_name("still"))).metrics()
    still = [row["validation_loss"] for row in still if "validation_loss" in row]
    assert still == pytest.approx([rows[0]["validation_loss"]] * 4)


def test_a_measurement_that_was_lost_is_made_again(measured, monkeypatch):
    """The process ends between a checkpoint and its measurement, also that of the last step, and the kept step is the same."""
    from rankfold.training.subject.image_measuring import SubjectMeasuring

    whole = train(replace(measured, keep="best"))
    for lost in (4, 6):
        original = SubjectMeasuring.measure

        def ending(self, run, step, lost=lost, original=original):
            if step == lost:
                raise KeyboardInterrupt
            original(self, run, step)

        out = measured.out.with_name(f"lost-{lost}")
        with monkeypatch.context() as patch:
            patch.setattr(SubjectMeasuring, "measure", ending)
            with pytest.raises(KeyboardInterrupt):
                train(replace(measured, keep="best", out=out))
        run = resume(out)
        assert measuring.load_measurements(run) == measuring.load_measurements(whole)
        assert (run.folder / "choice.json").read_text() == (whole.folder / "choice.json").read_text()


def test_a_run_that_patience_ended_does_not_go_on(measured):
    run = train(replace(measured, learning_rate=1e-12, steps=12, patience=2, evaluate_every=2))
    ended = run.status()["step"]
    assert ended < 12
    run.set_status(state="failed")  # as after a kill behind the last measurement
    assert resume(run.folder).status()["step"] == ended
