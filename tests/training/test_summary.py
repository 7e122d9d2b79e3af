"""What a run sees is said before it begins."""

import json
from dataclasses import replace

import pytest
from PIL import Image
from tiny_families import BUILDERS, SIDE

from rankfold.apps.cli import main
from rankfold.toolkit.diffusion.load import open_model
from rankfold.toolkit.diffusion.prompt_length import find_cut_prompts
from rankfold.training.launch.start import train


@pytest.fixture
def messy(tmp_path):
    """Kohya's folders with images of all sorts."""
    root = tmp_path / "messy"
    for name in ("10_sks dog", "2_dog"):
        (root / name).mkdir(parents=True)
    for number, size in enumerate(((64, 64), (32, 32), (200, 50))):
        Image.effect_noise(size, 60).convert("RGB").save(root / "10_sks dog" / f"{number}.png")
    (root / "10_sks dog" / "0.txt").write_text(
        "a sks dog, " + ", ".join(f"detail {n}" for n in range(60)) + ", in the snow"
    )
    Image.effect_noise((64, 64), 60).convert("RGB").save(root / "2_dog" / "a.png")
    (root / "2_dog" / "b.png").write_bytes((root / "2_dog" / "a.png").read_bytes())
    (root / "2_dog" / "b.txt").write_text("")
    (root / "2_dog" / "notes.md").write_text("hi")
    return root


def test_a_messy_folder(messy, capsys):
    main(["inspect", str(messy)])
    said = capsys.readouterr().out
    for part in (
        "images    5: 3 in",
        "each drawn about 353 times or 70.6 times",
        "repeats   10 x 10_sks dog, 2 x 2_dog",
        "captions  1 from .txt, 4 from the folder's name",
        "2 of 5 images are smaller than they are trained at and are enlarged: 1.png (32 x 32), 2.png (200 x 50)",
        "More than a third is cut off 2.png (200 x 50)",
        "a.png, b.png are the same image",
        "The captions of b.png are empty",
        "2 of 5 captions do not say sks: a.png, b.png",
        "neither an image nor a caption of one: notes.md",
        "The caption of 0.png is cut: CLIPTextModel reads 24 tokens and nothing from",
    ):
        assert part in said, part
    main(["inspect", str(messy), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 5
    assert found["repeats"] == {"10_sks dog": 10, "2_dog": 2}


def test_a_run_says_and_keeps_it(config, messy, capsys):
    run = train(replace(config, images=messy, steps=1))
    said = capsys.readouterr().out
    kept = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    assert "settings  learning rate 0.001" in said
    assert all(text in said for text in kept["warnings"])
    assert kept["caption_sources"] == {"the folder's name": 4, ".txt": 1}


def test_repeats_are_draws(config, messy):
    from accelerate import Accelerator

    from rankfold.toolkit.data.subjects import find_samples
    from rankfold.training.subject.task import SubjectTask

    config = replace(config, images=messy, batch_size=1)
    task = SubjectTask(config, find_samples(messy), config.base, Accelerator(cpu=True))
    (rows,) = task.training.data.instance
    drawn = [0] * len(rows)
    for position in range(34):
        batch = task.batch(position, [0])
        (row,) = [n for n in range(len(rows)) if rows.mean[n].equal(batch["mean"][0])][:1]
        drawn[row] += 1
    assert drawn[:3] == [10, 10, 10]
    assert sum(drawn[3:]) == 4


@pytest.mark.parametrize("name", list(BUILDERS))
def test_captions_that_are_cut_are_named(folders, name):
    """By what each family's stock pipeline gives its tokenizers; nothing of the model is loaded."""
    model = open_model(str(folders(name)))
    short, long = "a creature", "a creature " + "in the snow " * 700
    found = find_cut_prompts(model, [short, long])
    assert found
    assert {cut.prompt for cut in found} == {long}
    assert all(0 < len(cut.lost) < len(long) for cut in found)
    assert not {"unet", "transformer", "text_encoder", "vae"} & model.loaded.keys()


def test_photos_on_a_base_that_knows_drawings(config, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.effect_noise((SIDE * 10, SIDE * 10), 60).convert("RGB").save(photos / "0.png")
    main(["inspect", str(photos)])
    assert "THE BASE tiny KNOWS DRAWINGS OF 64 PIXELS ONLY" in capsys.readouterr().out
