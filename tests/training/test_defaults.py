"""Settings that nobody has set are the base's own."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rankfold.apps.cli import main
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.diffusion.model import TrainingDefaults
from rankfold.training.config.compose import ComposeConfig
from rankfold.training.config.defaults import resolve_defaults
from rankfold.training.config.instruct import InstructConfig
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.config.yaml_file import from_yaml
from rankfold.training.launch import queue
from rankfold.training.launch.plan import plan
from rankfold.training.launch.start import preflight


def test_the_embedded_model_keeps_its_own():
    own = resolve_defaults(SubjectConfig())
    assert (own.learning_rate, own.batch_size, own.precision, own.rank, own.alpha) == (1e-3, 4, "fp32", 8, 8.0)
    assert (own.gradient_checkpointing, own.timestep_shift, own.class_noun) == (False, 1.0, "creature")


def test_a_family_has_its_own(folders):
    own = resolve_defaults(SubjectConfig(base=str(folders("sdxl"))))
    assert (own.learning_rate, own.text_learning_rate, own.batch_size, own.rank, own.alpha) == (1e-4, 1e-5, 1, 16, 16.0)
    assert (own.guidance_scale, own.preview_steps, own.class_noun) == (5.0, 25, "")
    assert resolve_defaults(SubjectConfig(base=str(folders("qwen-image")))).guidance_scale == 4.0
    assert resolve_defaults(SubjectConfig(base=str(folders("z-image")))).timestep_shift == 2.0
    assert resolve_defaults(SubjectConfig(base=str(folders("flux-dev")))).timestep_shift == "auto"


def test_what_is_given_stays(folders):
    given = {"learning_rate": 3e-5, "rank": 4, "gradient_checkpointing": True, "guidance_scale": 1.0, "batch_size": 3}
    own = resolve_defaults(SubjectConfig(base=str(folders("sdxl")), class_noun="dog", **given))
    assert {name: getattr(own, name) for name in given} == given
    assert own.alpha == 4.0
    assert own.class_noun == "dog"
    assert resolve_defaults(own) == own


def test_large_bases_recompute(folders, monkeypatch):
    from rankfold.training.config import defaults

    config = SubjectConfig(base=str(folders("sdxl")))
    assert not resolve_defaults(config).gradient_checkpointing
    monkeypatch.setattr(defaults, "LARGE", 1000)
    assert resolve_defaults(config).gradient_checkpointing


def test_rates_follow_the_optimizer(folders):
    base = str(folders("sdxl"))
    assert resolve_defaults(SubjectConfig(base=base, optimizer="Prodigy")).learning_rate == 1.0
    assert resolve_defaults(SubjectConfig(base=base, optimizer="Lion8bit")).learning_rate == pytest.approx(3e-5)
    assert resolve_defaults(SubjectConfig(optimizer="Prodigy")).learning_rate == 1.0
    assert resolve_defaults(SubjectConfig(optimizer="Prodigy", learning_rate=0.5)).learning_rate == 0.5


def test_other_methods():
    assert resolve_defaults(InstructConfig()).learning_rate == 2e-4
    assert resolve_defaults(ComposeConfig()).learning_rate == 1e-3


def test_a_real_base_needs_a_class_noun(folders, photos, tmp_path):
    with pytest.raises(UserError, match="--class-noun is missing"):
        preflight(SubjectConfig(base=str(folders("sd")), images=photos, out=tmp_path / "run", resolution=32))


def test_they_stand_in_the_plan_and_the_config(folders, photos, tmp_path, capsys):
    config = SubjectConfig(
        base=str(folders("sd")), images=photos, out=tmp_path / "run", resolution=32, class_noun="cat"
    )
    assert plan(config).config.learning_rate == TrainingDefaults.learning_rate
    words = ["--base", config.base, "--resolution", "32", "--no-gradient-checkpointing", "--timestep-shift", "auto"]
    main(["plan", "subject", *words])
    assert "settings         learning rate 0.0001, text learning rate 5e-05, batch size 1" in capsys.readouterr().out
    run = queue.enqueue(replace(config, steps=1))
    kept = yaml.safe_load(Path(run.config_file).read_text(encoding="utf-8"))
    assert (kept["learning_rate"], kept["rank"], kept["alpha"], kept["precision"]) == (1e-4, 16, 16.0, "fp32")


def test_auto_is_read_back_and_nothing_else_is(folders, photos, tmp_path):
    config = SubjectConfig(
        base=str(folders("flux-dev")), images=photos, out=tmp_path / "run", resolution=32, class_noun="cat"
    )
    run = queue.enqueue(replace(config, steps=1))
    assert from_yaml(run.config_file).timestep_shift == "auto"
    for value, words in (("0", "greater than 0"), ("often", "'timestep_shift")):
        (tmp_path / "c.yaml").write_text(f"timestep_shift: {value}\n")
        with pytest.raises(UserError, match=words):
            from_yaml(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="--timestep-shift must be above 0"):
        preflight(replace(config, timestep_shift=-1.0))
