"""--export: what a run writes for other tools when it is done, and what is refused before it begins."""

from dataclasses import replace

import pytest
from safetensors.torch import load_file
from short_runs import adapter, equal_states

from rankfold.apps.cli import main
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.diffusion.model import DiffusionModel
from rankfold.training.config.compose import ComposeConfig
from rankfold.training.config.instruct import InstructConfig
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.launch.exports import check_export_options
from rankfold.training.launch.start import compose, preflight, resume, train


@pytest.fixture
def exporting(config):
    return replace(config, steps=1, export=("diffusers", "kohya"))


def test_the_files_are_those_of_the_command(exporting, tmp_path, capsys):
    run = train(exporting)
    assert capsys.readouterr().out.count("It is exact.") == 2
    made = run.status()["exports"]
    assert made == {"diffusers": "export/pytorch_lora_weights.safetensors", "kohya": "export/run.safetensors"}
    file = tmp_path / "again.safetensors"
    main(["export", str(run.folder), "--format", "kohya", "--out", str(file)])
    assert equal_states(load_file(file), load_file(run.folder / made["kohya"]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"export": ("diffuser",)}, "--export diffuser is unknown.*Did you mean 'diffusers'"),
        (
            {"adapter": "dora", "export": ("kohya",)},
            "full rank.*--export kohya-lycoris.*`rankfold export --approximate`",
        ),
        ({"adapter": "glora", "export": ("kohya",)}, "a bias that the base model's layer does not have"),
        ({"adapter": "moslora", "export": ("diffusers", "kohya-lycoris")}, "of another method"),
        ({"adapter": "lora", "export": ("kohya-glora",)}, "--export kohya-glora holds GLoRA"),
        ({"adapter": "loratrf", "export": ("peft",)}, "cannot be merged or folded exactly"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_loaded(config, monkeypatch, changes, said):
    load = DiffusionModel.load

    def without_weights(self, name):
        assert self.device.type == "meta" or not name.startswith(("unet", "text_encoder", "vae")), "weights were loaded"
        return load(self, name)

    monkeypatch.setattr(DiffusionModel, "load", without_weights)
    with pytest.raises(UserError, match=said):
        train(replace(config, **changes))
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("method", "format"),
    [
        ("lora", "comfyui"), ("moslora", "peft"), ("glora", "diffusers"), ("dora", "kohya-lycoris"), ("loha", "comfyui-lycoris"),
        ("lokr", "kohya-full"), ("oft", "kohya-full"),
    ],
)  # fmt: skip
def test_what_can_be_written_passes(config, method, format):
    preflight(replace(config, adapter=method, train_text_encoder=True, export=(format,)))


def test_an_export_that_fails_leaves_the_run_done(exporting):
    run = train(replace(exporting, export=()))
    before = adapter(run.folder)
    (run.folder / "export").write_text("a file where the folder would be")
    text = run.config_file.read_text(encoding="utf-8")
    run.config_file.write_text(text.replace("export: []", "export: [diffusers]"), encoding="utf-8")
    with pytest.raises(UserError, match=r"is done, but not all of its exports\. --export diffusers: .*export"):
        resume(run.folder)
    assert run.status()["state"] == "done"
    assert run.status()["export_faults"]
    assert equal_states(before, adapter(run.folder))
    (run.folder / "export").unlink()
    resume(run.folder)  # what is done is done, and the export is caught up on
    assert (run.folder / run.status()["exports"]["diffusers"]).is_file()
    assert not run.status()["export_faults"]


def test_compositions_export_too(exporting, tmp_path):
    run = train(replace(exporting, export=()))
    both = compose(
        ComposeConfig(base=exporting.base, adapters=(str(run.adapter),) * 2, out=tmp_path / "both", export=("kohya",))
    )
    assert (both.folder / both.status()["exports"]["kohya"]).is_file()


@pytest.mark.parametrize(
    ("config", "dtype", "options", "words"),
    [
        (SubjectConfig(), "bf16", {}, "--dtype would have no effect: it is for runs on vision-language models"),
        (
            InstructConfig(),
            None,
            {"drop_bias": True, "max_error": None},
            "--drop-bias would have no effect: it is for runs on diffusion",
        ),
    ],
)
def test_options_of_the_other_kind_of_run_are_refused(config, dtype, options, words):
    with pytest.raises(UserError, match=words):
        check_export_options(config, dtype, options)
    check_export_options(config, None, {"drop_bias": False, "precision": None})
