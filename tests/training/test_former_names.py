"""Names of settings that have changed: files and commands with the former ones are read as before."""

import json
from dataclasses import fields, replace

import pytest
import torch
from PIL import Image, PngImagePlugin
from short_runs import adapter, equal_states, train_until

from rankfold.apps.cli import main
from rankfold.apps.cli.evaluate import EvaluateOptions
from rankfold.apps.cli.options import parse_options
from rankfold.apps.cli.sample import SampleOptions
from rankfold.pipelines.generate import TEXT_CHUNK, Recipe, generate, read_recipe, repeat, save_image
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.setting_names import RENAMED
from rankfold.training.config.instruct import InstructConfig
from rankfold.training.config.search import InstructSearchConfig
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.config.yaml_file import METHODS, from_yaml, from_yaml_text
from rankfold.training.launch.start import resume, train


def test_no_setting_has_a_former_name():
    kinds = (*METHODS.values(), SampleOptions, EvaluateOptions, Recipe)
    names = {field.name for kind in kinds for field in fields(kind)}
    assert names.isdisjoint(RENAMED)
    assert names >= set(RENAMED.values())


def test_an_old_config_is_read(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("method: subject\ntoken_vectors: 3\nprior_pictures: 7\nrank: 2\n")
    assert from_yaml(file) == SubjectConfig(num_vectors=3, prior_images=7, rank=2)
    file.write_text("method: instruct\nadapt: [vision-mlp]\nshorten: true\n")
    assert from_yaml(file) == InstructConfig(target_parts=("vision-mlp",), truncate=True)
    file.write_text("method: search-instruct\nadapt: [projector]\n")
    assert from_yaml(file) == InstructSearchConfig(target_parts=("projector",))


def test_a_former_name_beside_the_one_of_now_is_refused():
    with pytest.raises(UserError, match="'token_vectors' is the former name of 'num_vectors', and both are given"):
        from_yaml_text("token_vectors: 3\nnum_vectors: 3\n", "run.yaml")


def test_a_former_name_is_one_of_its_own_method_only():
    with pytest.raises(UserError, match="unknown key 'side'"):
        from_yaml_text("side: 64\n", "run.yaml")
    with pytest.raises(UserError, match="unknown key 'adapt'"):
        from_yaml_text("adapt: [projector]\n", "run.yaml")


@pytest.mark.parametrize(
    ("kind", "name", "words", "expected"),
    [
        (SubjectConfig, "train subject", ["--token-vectors", "3"], {"num_vectors": 3}),
        (SubjectConfig, "train subject", ["--token_vectors=3"], {"num_vectors": 3}),
        (SubjectConfig, "train subject", ["--prior-pictures=7", "--rank", "2"], {"prior_images": 7, "rank": 2}),
        (InstructConfig, "train instruct", ["--shorten"], {"truncate": True}),
        (InstructConfig, "train instruct", ["--no-shorten"], {"truncate": False}),
        (InstructConfig, "train instruct", ["--no_shorten"], {"truncate": False}),
        (InstructConfig, "train instruct", ["--adapt", "projector", "vision-mlp"], {"target_parts": ("projector", "vision-mlp")}),
        (InstructConfig, "train instruct", ["--adapter-options", "mixer", "frozen"], {"adapter_options": {"mixer": "frozen"}}),
        (SampleOptions, "sample", ["--side", "96", "--prompt", "side"], {"width": 96, "prompt": "side"}),
        (EvaluateOptions, "evaluate", ["runs/a", "--side=96"], {"width": 96}),
    ],
)  # fmt: skip
def test_old_flags_work_and_say_nothing(capsys, kind, name, words, expected):
    options = parse_options(kind, words, name)
    assert {key: getattr(options, key) for key in expected} == expected
    assert capsys.readouterr() == ("", "")


def test_an_old_flag_beside_the_one_of_now_is_refused():
    with pytest.raises(UserError, match="--token-vectors and --num-vectors are one setting"):
        parse_options(SubjectConfig, ["--token_vectors", "1", "--num-vectors=2"], "train subject")


def as_before(path, recipe):
    """Gives a PNG the text chunk that it had when a recipe's width was its side."""
    values = json.loads(recipe)
    values["side"] = values.pop("width")
    info = PngImagePlugin.PngInfo()
    info.add_text(TEXT_CHUNK, json.dumps(values))
    with Image.open(path) as image:
        image.load()
        image.save(path, pnginfo=info)


def test_an_image_of_another_version_is_not_taken_for_less(tmp_path):
    """A setting that is not known is named, unless it was not set."""
    for values, words in (
        ({"prompt": "x", "places": []}, ""),
        ({"prompt": "x", "places": ["columns"]}, "made with places, which"),
    ):
        info = PngImagePlugin.PngInfo()
        info.add_text(TEXT_CHUNK, json.dumps(values))
        Image.new("RGB", (8, 8)).save(tmp_path / "made.png", pnginfo=info)
        if words:
            with pytest.raises(UserError, match=words):
                read_recipe(tmp_path / "made.png")
        else:
            assert read_recipe(tmp_path / "made.png").prompt == "x"


def test_an_old_image_is_repeated(base, tmp_path):
    (made,) = generate(Recipe(prompt="a creature", base=str(base), steps=2, width=40, height=32))
    save_image(tmp_path / "old.png", *made)
    with Image.open(tmp_path / "old.png") as image:
        text = image.text[TEXT_CHUNK]
    as_before(tmp_path / "old.png", text)
    recipe = read_recipe(tmp_path / "old.png")
    assert recipe == made[1]
    assert repeat(recipe)[0].tobytes() == made[0].tobytes()
    main(["sample", "--from", str(tmp_path / "old.png"), "--out", str(tmp_path / "again")])
    (again,) = (tmp_path / "again").glob("*.png")
    with Image.open(again) as image:
        assert image.tobytes() == made[0].tobytes()


def test_an_old_run_goes_on_and_still_knows_its_config(config, tmp_path):
    """Stopped between two checkpoints, with config.yaml and checkpoint as they were written under the former names."""
    config = replace(config, prior_weight=1.0, prior_images=3, preview_steps=2)
    whole = train(replace(config, out=tmp_path / "whole"))
    part = train_until(replace(config, out=tmp_path / "part"), 3)
    text = part.config_file.read_text(encoding="utf-8")
    old = text.replace("prior_images: 3", "prior_pictures: 3")
    assert old != text
    for path in part.checkpoint_files():
        state = torch.load(path, weights_only=True)
        state["config"]["prior_pictures"] = state["config"].pop("prior_images")
        torch.save(state, path)
    part.config_file.write_text(old.replace("prior_pictures: 3", "prior_pictures: 4"))
    with pytest.raises(UserError, match="prior_images was 3, now it is 4"):
        resume(part.folder)
    part.config_file.write_text(old)
    assert resume(part.folder).status()["state"] == "done"
    assert equal_states(adapter(whole.folder), adapter(part.folder))
