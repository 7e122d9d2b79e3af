"""Silent faults that other trainers have shipped, each as a test that would have caught it (docs/correctness.md)."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from short_runs import adapter
from tiny_families import BUILDERS, SIDE

from rankfold.pipelines.generate import denoise
from rankfold.toolkit.adapters.attach import trainable_parameters
from rankfold.toolkit.data.subjects import find_samples
from rankfold.toolkit.diffusion.families.flux_2 import Flux2
from rankfold.toolkit.diffusion.load import open_model
from rankfold.training.engine.loop import Loop
from rankfold.training.launch.start import train
from rankfold.training.subject.denoising import compile_blocks, repeated_blocks
from rankfold.training.subject.task import SubjectTask


def task_of(config):
    return SubjectTask(config, find_samples(config.images), config.base, Accelerator(cpu=True))


def test_the_average_is_one(config, monkeypatch):
    """What is saved is the moving average of the steps' weights: a <- d a + (1 - d) w, d = min((1 + n) / (10 + n), decay)."""
    seen = []
    original = Loop.train_step

    def recording_step(self):
        seen.append(flatten(self.parameters)) if not seen else None
        original(self)
        seen.append(flatten(self.parameters))

    monkeypatch.setattr(Loop, "train_step", recording_step)
    run = train(replace(config, ema_decay=0.3, learning_rate=0.02, adapter="lora"))
    average, *steps = seen
    for number, weights in enumerate(steps):
        decay = min((1 + number) / (10 + number), 0.3) if number else 0.0  # the first is taken as it is
        average = decay * average + (1 - decay) * weights
    saved = flatten(adapter(run.folder).values())
    torch.testing.assert_close(saved.sort().values, average.sort().values, rtol=1e-4, atol=1e-6)
    assert (saved.sort().values - steps[-1].sort().values).abs().max() > 1e-3


def flatten(tensors):
    return torch.cat([tensor.detach().flatten().clone() for tensor in tensors])


def test_accumulated_gradients_are_normalised(config):
    """A batch in two halves takes the step that the whole batch takes."""
    whole = adapter(train(replace(config, batch_size=4, steps=3, threads=1)).folder)
    halves = replace(config, batch_size=2, gradient_accumulation=2, steps=3, out=config.out.parent / "halves")
    other = adapter(train(halves).folder)
    for key, value in whole.items():
        torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_width_and_height_are_not_swapped(folders, name):
    """Of an image twice as wide as high, the prediction is the stock pipeline's own; so is the image of its latents."""
    model = open_model(str(folders(name)))
    pipe = model.pipeline(model.denoiser_name, "vae", *model.text_encoder_names)
    with torch.no_grad():
        prompt_embeds = model.encode_prompts(["a creature"])
    recorded = []
    step = pipe.scheduler.step

    def recording_step(output, timestep, sample, *more, **named):
        recorded.append((output.detach().clone(), torch.as_tensor(timestep).reshape(1), sample.detach().clone()))
        return step(output, timestep, sample, *more, **named)

    pipe.scheduler.step = recording_step
    size = {"width": 2 * SIDE, "height": SIDE}
    seen = []
    (image,) = denoise(
        pipe, prompt_embeds, seeds=[3], steps=2, guidance_scale=model.guidance_off, negative=prompt_embeds, output_type="np",
        on_step=lambda _, latents: seen.append(latents), **size,
    )  # fmt: skip
    with torch.no_grad():
        pixels = model.decode_latents(pipe.vae, seen[-1])[0].permute(1, 2, 0) / 2 + 0.5
    torch.testing.assert_close(pixels.clamp(0, 1), torch.from_numpy(image), rtol=1e-4, atol=1e-4)
    output, timestep, sample = recorded[0]
    height, width = SIDE // model.latent_scale, 2 * SIDE // model.latent_scale
    noisy = as_grid(sample, model, height, width)
    level = timestep.float() / 1000 if model.is_flow else timestep.long()
    with torch.no_grad():
        own = model.predict(noisy, level, prompt_embeds)
    torch.testing.assert_close(own, as_grid(output, model, height, width), rtol=1e-4, atol=1e-5)


def as_grid(latents, model, height, width):
    """Latents as the pipeline has them, tokens or one frame of a video, as (1, C, H, W)."""
    from rankfold.toolkit.diffusion.model import unpack_latents

    if latents.dim() == 5:
        return latents[:, :, 0] if latents.shape[2] == 1 else latents[0].transpose(0, 1)
    if latents.dim() == 3 and isinstance(model, Flux2):
        return latents.transpose(1, 2).reshape(1, -1, height, width)
    return unpack_latents(latents, height, width) if latents.dim() == 3 else latents


def test_class_rows_have_class_prompts_and_class_images(config, images, tmp_path):
    """Behind the subject's rows stand as many of the class, each with its own latents, prompt and weight."""
    import shutil

    own = tmp_path / "class"
    own.mkdir()
    for number, file in enumerate(sorted(images.iterdir())[:3]):
        shutil.copy(file, own / f"{number}.png")
        (own / f"{number}.txt").write_text(f"a creature {number}")
    task = task_of(replace(config, prior_weight=0.5, prior_folder=own, batch_size=2))
    texts = {number: text for text, number in task.training.prompts.numbers.items()}
    (rows,) = task.training.data.prior
    for position in (0, 2, 4):
        batch = task.batch(position, [0, 1])
        assert [texts[number] for number in batch["prompt"][:2].tolist()] == ["a sks creature"] * 2
        for row in (2, 3):
            image = int(texts[int(batch["prompt"][row])].split()[-1])
            assert torch.equal(batch["mean"][row], rows.mean[image])
        assert batch["weight"].tolist() == [2.0, 2.0, 1.0, 1.0]


def test_changed_captions_stay_with_their_images(config, images, tmp_path):
    """After captions were edited and an image came in before the others, each image has its own caption and latents."""
    import shutil

    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"a sks creature {number}")
    config = replace(config, images=folder)
    before = task_of(config).training.data.instance[0].mean
    shutil.copy(folder / "4.png", folder / "00.png")
    (folder / "00.txt").write_text("a sks creature first")
    (folder / "3.txt").write_text("a sks creature in the snow")
    task = task_of(config)
    texts = {number: text for text, number in task.training.prompts.numbers.items()}
    (rows,) = task.training.data.instance
    found = {texts[int(number)]: mean for number, mean in zip(rows.prompts[:, 0], rows.mean, strict=True)}
    expected = {"first": 4, "0": 0, "1": 1, "2": 2, "in the snow": 3, "4": 4}
    assert found.keys() == {f"a sks creature {end}" for end in expected}
    for end, image in expected.items():
        assert torch.equal(found[f"a sks creature {end}"], before[image])


def test_compiled_means_every_block(folders):
    model = open_model(str(folders("sd3")))
    compile_blocks(model.denoiser)
    blocks = repeated_blocks(model.denoiser)
    assert blocks
    assert all(block._compiled_call_impl is not None for block in blocks)


def test_the_adapter_alone_is_trained(config):
    """Every trainable number belongs to the adapter, and each of them has a gradient after two steps."""
    task = task_of(config)
    own = {id(p) for part in task.training.parts.values() for p in trainable_parameters(part)}
    free = {id(p) for p in task.module.parameters() if p.requires_grad}
    assert own == free
    before = {id(p): p.detach().clone() for p in task.module.parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in task.module.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        task.module(task.batch(2 * step, [0, 1])).mean().backward()
        optimizer.step()
    assert all(torch.equal(p, before[id(p)]) for p in task.module.parameters() if id(p) in before)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in task.module.parameters() if p.requires_grad)
