"""Several subjects in one pass: adapters on tokens of their own, in every family."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_families import BUILDERS, SIDE
from torch import nn
from torch.overrides import TorchFunctionMode

from rankfold.apps.cli import main
from rankfold.pipelines import generate as generating
from rankfold.pipelines.apart import Apart, cut, join, part_bounds, roll
from rankfold.pipelines.generate import Recipe, generate, load_pipeline, sampling_pipeline
from rankfold.pipelines.subjects import (
    OwnPrompt,
    columns,
    own_prompts,
    parse_subjects,
    words_of_subjects,
)
from rankfold.pipelines.token_masks import MaskedDenoiser, MaskedLayer, SubjectAttention, Tokens, Words
from rankfold.toolkit.adapters.attach import attach
from rankfold.toolkit.adapters.registry import make_config
from rankfold.toolkit.core.change import Change
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.diffusion.load import open_model, resolve_base
from rankfold.toolkit.formats import native


def make_adapter(base, folder, seed=1, parts=(), targets=(), method="lora"):
    """An adapter drawn at random on the denoiser, and on other parts."""
    model = open_model(resolve_base(str(base)))
    torch.manual_seed(seed)
    for part in (model.denoiser_name, *parts):
        module, own = model.load(part), targets or model.default_targets
        own = own if part == model.denoiser_name else model.text_targets(part)
        attach(module, make_config(method, rank=4, alpha=4.0, dropout=0.0, target_modules=own, options={}))
        for parameter in module.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.4)
        native.save_native(module, folder / part)
    return str(folder)


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory):
    """Name of a family -> its base and two adapters."""
    made = {}

    def of(name):
        if name not in made:
            base, place = folders(name), tmp_path_factory.mktemp("adapters")
            text = [part for part in ("text_encoder",) if name in ("sd", "sdxl")]
            made[name] = base, make_adapter(base, place / "a", 1, text), make_adapter(base, place / "b", 2, text)
        return made[name]

    return of


def recipe_for(base, *sources, **more):
    given = {"prompt": "a sks creature", "steps": 2, "width": SIDE, "guidance_scale": 3.0, "negative_prompt": "blue"}
    return Recipe(base=str(base), adapters=sources, strengths=(1.0,) * len(sources), **(given | more))


def last_latents(recipe, n=1):
    """Latents behind the last step."""
    seen = []
    generate(recipe, n, on_step=lambda pipe, latents: seen.append(latents.clone()))
    return seen[-1]


# ---------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("name", BUILDERS)
def test_one_subject_is_the_ordinary_image(adapters, name, monkeypatch):
    """With a mask of ones it is the adapter's own image to rounding, with masks of zeros the base's."""
    base, adapter, _ = adapters(name)
    ordinary, plain = last_latents(recipe_for(base, adapter)), last_latents(recipe_for(base))
    effect = (ordinary - plain).abs().max()
    subject = recipe_for(base, adapter, subjects=("sks creature",))
    assert effect > 1e-2
    assert (last_latents(subject) - ordinary).abs().max() < 1e-3 * effect
    weights = MaskedDenoiser.weights
    if name not in ("sd", "sdxl"):  # whose adapters change what the words are, too
        monkeypatch.setattr(MaskedDenoiser, "weights", lambda self, *given: 0 * weights(self, *given))
        assert (last_latents(subject) - plain).abs().max() < 1e-3 * effect


class Still(TorchFunctionMode):
    """Attention in which every token keeps to itself."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = (*args, *((kwargs or {})[name] for name in ("query", "key", "value")[len(args) :]))[:3]
        if query.shape[-2] != key.shape[-2]:
            return torch.zeros_like(query)
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1)


def move_image(value, number, grid):
    """What the denoiser is given as an image, with one token of it changed."""
    if isinstance(value, list):
        return [move_image(one[:, 0][None], number, grid)[0][:, None] for one in value]
    moved = value.clone()
    if value.dim() == 3:
        moved[:, number] += 1
    else:
        patch, (row, column) = value.shape[2] // grid[0], divmod(number, grid[1])
        moved[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] += 1
    return moved


def move_word(value, number):
    if isinstance(value, list):
        return [move_word(one[None], number)[0] for one in value]
    moved = value.clone()
    moved[:, number] += 1
    return moved


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in ("sd", "sd-v", "sdxl", "sana")])
def test_each_layer_sees_the_tokens_that_it_is_said_to(adapters, name, monkeypatch):
    """With attention that mixes nothing, a token that is changed changes every layer's input where it is, and nowhere else."""
    base, first, second = adapters(name)
    recipe = recipe_for(base, first, second, subjects=("sks creature", "red dog"), prompt="a {subjects}", steps=1)
    recipe = replace(recipe, width=2 * SIDE, height=SIDE)
    pipe, seen = sampling_pipeline(recipe), []
    pipe.transformer.requires_grad_(False)
    code_weights = MaskedLayer.code_weights

    def spy(self, base, x, y, channels):
        seen.append((self.name, x.clone(), self.masked.tokens))
        return code_weights(self, base, x, y, channels)

    monkeypatch.setattr(MaskedLayer, "code_weights", spy)
    given = {}
    forward = pipe.transformer.forward
    signature = MaskedDenoiser(pipe.transformer, generating.pipeline_family(pipe), torch.ones(1, 1, 1, 1)).signature

    def probe(*args, **kwargs):
        if given:
            return forward(*args, **kwargs)
        bound = signature.bind(None, *args, **kwargs).arguments
        bound.pop("self", None)
        given.update(bound)

        def inputs(**changed):
            seen.clear()
            with Still():
                forward(**(given | changed))
            return list(seen)

        image, words = (
            ("x", "cap_feats") if "x" in given else ("hidden_states", generating.pipeline_family(pipe).words_argument)
        )
        plain = inputs()
        grid = plain[0][2].places_BCHW.shape[2:]
        for changed, number in (
            ({image: move_image(given[image], 5, grid)}, 5),
            ({words: move_word(given[words], 1)}, -3),
        ):
            hit = 0
            for (layer, before, tokens), (_, after, _) in zip(plain, inputs(**changed), strict=True):
                rows, moved = len(tokens.words), (before != after).any(-1)
                if len(before) == rows * tokens.length and rows * tokens.length > moved.shape[1]:
                    moved = moved.any(1).view(rows, -1)
                elif len(before) != rows:
                    moved = moved.T
                expected = tokens.numbers(tokens.kind(layer, moved.shape[1]), moved.shape[1]) == number
                assert torch.equal(moved, expected), layer
                hit += int(expected.sum())
            assert hit
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", probe)
    generate(recipe, 1, pipe=pipe)
    assert given


def last_latents_of_two(adapters, name, monkeypatch, steps):
    """Of two subjects that have the same words."""
    base, first, second = adapters(name)
    monkeypatch.setattr(generating, "own_prompts", lambda prompt, words: ["a sks creature"] * 2)
    subjects = {"subjects": ("sks creature", "red dog"), "prompt": "{subjects}", "steps": steps}
    subjects |= {"width": 2 * SIDE, "height": SIDE}
    return last_latents(recipe_for(base, first, second, **subjects))


WORDS_WITH_POSITIONS = ("qwen-image", "lumina2", "z-image", "krea2", "ernie-image")
"""Where a word is read by where it stands, so that words behind those of another subject are not quite the ordinary ones."""


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in WORDS_WITH_POSITIONS])
def test_first_each_subject_has_the_whole_image(adapters, name, monkeypatch):
    """A part of the first step is that of the ordinary image with its own adapter alone, drawn with the part in the middle."""
    base, *sources = adapters(name)
    both = last_latents_of_two(adapters, name, monkeypatch, 1)
    for source, shift, part in zip(sources, (1, -1), (0, 1), strict=True):
        recipe = recipe_for(base, source, steps=1, width=2 * SIDE, height=SIDE)
        pipe = sampling_pipeline(recipe)
        family = generating.pipeline_family(pipe)
        grid = generating.image_tokens(open_model(pipe.name_or_path), 2 * SIDE, SIDE)
        denoiser, seen = getattr(pipe, family.denoiser_name), []
        forward, image = denoiser.forward, list(inspect.signature(type(denoiser).forward).parameters)[1]

        def moved(*args, forward=forward, image=image, grid=grid, by=shift * grid[1] // 4, **kwargs):
            given = kwargs if image in kwargs else {image: args[0]} | kwargs
            rest = args if image in kwargs else args[1:]
            out = forward(roll(given.pop(image), grid, by), *rest, **given)
            back = roll(out[0], grid, -by)
            return (back,) if isinstance(out, tuple) else type(out)(sample=back)

        denoiser.forward = moved
        generate(recipe, pipe=pipe, on_step=lambda pipe, latents, seen=seen: seen.append(latents.clone()))
        width = both.shape[-1] // 2
        own = slice(part * width, (part + 1) * width)
        assert (both[..., own] - seen[-1][..., own]).abs().max() < 1e-3 * seen[-1].abs().max()


@pytest.mark.parametrize("name", BUILDERS)
def test_then_each_part_is_drawn_out_of_sight_of_the_other(adapters, name, monkeypatch):
    call, compared = Apart.__call__, []

    def probe(self, *args, **kwargs):
        tokens, out = self.masked.tokens, call(self, *args, **kwargs)
        if not self.whole:
            given = dict(self.signature.bind(*args, **kwargs).arguments)
            given |= given.pop("kwargs", {})
            image, grid = next(iter(self.signature.parameters)), tuple(tokens.places_BCHW.shape[2:])
            half = (0, grid[1] // 2), (grid[1] // 2, grid[1])
            left, right = (cut(given[image], grid, part) for part in half)
            right = [one + 1 for one in right] if isinstance(right, list) else right + 1
            again = call(self, **(given | {image: join([left, right], grid[0])}))
            pairs = zip(out[0], again[0], strict=True) if isinstance(out[0], list) else [(out[0], again[0])]
            for one, other in pairs:
                differ = [(cut(one, grid, part) - cut(other, grid, part)).abs().max() for part in half]
                compared.append(differ[0] < 1e-3 * differ[1])
        return out

    monkeypatch.setattr(Apart, "__call__", probe)
    last_latents_of_two(adapters, name, monkeypatch, 2)
    assert compared
    assert all(compared)


def test_parts_of_an_image_three_wide_and_what_a_denoiser_is_given_of_them():
    """Parts are equal to one token; cut and joined they are the image, as maps, as tokens and as a list of maps."""
    bounds = part_bounds(3, 8)
    assert bounds == [(0, 3), (3, 5), (5, 8)]
    maps = torch.randn(2, 3, 4, 16)  # two latent pixels a token
    for value, grid in ((maps, (2, 8)), (torch.randn(2, 16, 5), (2, 8)), ([maps[:, :1], maps[:, 1:2]], (2, 8))):
        again = join([cut(value, grid, part) for part in bounds], grid[0])
        back = roll(roll(value, grid, 3), grid, -3)
        for one, two, three in zip(*(x if isinstance(x, list) else [x] for x in (value, again, back)), strict=True):
            assert torch.equal(one, two)
            assert torch.equal(one, three)
    assert torch.equal(roll(maps, (2, 8), 1), maps.roll(2, -1))


@pytest.mark.parametrize("name", ["sd", "flux-dev"])
def test_three_subjects_in_an_image_that_they_do_not_divide(adapters, name):
    base, first, second = adapters(name)
    subjects = ("sks creature", "red dog", "blue cat")
    recipe = recipe_for(base, first, second, first, subjects=subjects, prompt="a {subjects}", steps=4)
    image = generate(replace(recipe, width=2 * SIDE, height=SIDE))[0][0]
    assert image.size == (2 * SIDE, SIDE)


def some_tokens(words_first=True, owners=(0, 0, 1), places=None):
    """Two subjects, the left and the right half of 2 x 4 image tokens."""
    words = Words(torch.randn(len(owners), 3), torch.tensor(owners), len(owners), True)
    return Tokens(columns(2, 2, 4) if places is None else places, [words], words_first, length=len(owners))


@pytest.mark.parametrize("kind", ["image", "words", "both"])
def test_a_token_gets_the_change_of_its_own_adapter(kind):
    """W x + b + up_i down_i x to rounding, and nothing of the other's; dense changes and biases alike."""
    torch.manual_seed(0)
    base = nn.Linear(6, 5).requires_grad_(False)
    changes = [
        Change(down=torch.randn(2, 6), up=torch.randn(5, 2), bias=torch.randn(5)),
        Change(down=torch.randn(3, 6), up=torch.randn(5, 3), dense=torch.randn(5, 6)),
    ]
    masked = MaskedDenoiser.__new__(MaskedDenoiser)
    masked.tokens = some_tokens()
    layer = MaskedLayer("context" if kind == "words" else "to_q", base, list(enumerate(changes)), ["a", "b"], masked)
    owners = {"image": [0, 0, 1, 1] * 2, "words": [0, 0, 1], "both": [0, 0, 1] + [0, 0, 1, 1] * 2}[kind]
    x = torch.randn(1, len(owners), 6)
    given = layer(base, (x,), base(x))
    for token, owner in enumerate(owners):
        change = changes[owner]
        expected = base(x[0, token]) + change.delta_weight(base.weight) @ x[0, token]
        torch.testing.assert_close(given[0, token], expected + (0 if change.bias is None else change.bias))


def test_a_convolution_is_changed_in_its_own_places():
    base = nn.Conv2d(3, 4, 1).requires_grad_(False)
    changes = [Change(down=torch.randn(2, 3), up=torch.randn(4, 2)) for _ in range(2)]
    masked = MaskedDenoiser.__new__(MaskedDenoiser)
    masked.tokens = some_tokens(words_first=None)
    layer = MaskedLayer("conv", base, list(enumerate(changes)), ["a", "b"], masked)
    x = torch.randn(1, 3, 2, 4)
    given = layer(base, (x,), base(x))
    for column in range(4):
        change = changes[column // 2].delta_weight(base.weight.flatten(1))
        expected = base(x) + torch.einsum("oi,bihw->bohw", change, x)
        torch.testing.assert_close(given[..., column], expected[..., column])


def test_attention_is_held_back_between_subjects():
    """Image tokens of a place attend to its own words, words to their own place; image to image as ever."""
    tokens = some_tokens()
    bias = tokens.bias(("both", 11), ("both", 11), torch.float32)[0, 0].exp()
    free = torch.tensor([0, 0, 1] + [0, 0, 1, 1] * 2)
    expected = (free[:, None] == free).float()
    expected[3:, 3:] = 1
    torch.testing.assert_close(bias, expected, atol=1e-5, rtol=0)
    assert (
        some_tokens(owners=(0, 0, 0), places=torch.ones(1, 1, 2, 4)).bias(("both", 11), ("both", 11), torch.float32)
        is None
    )


# ---------------------------------------------------------------------------------------------- places and words


def test_the_prompt_of_each_subject():
    words = ["sks1 creature", "sks2 creature"]
    assert own_prompts("a {subjects} at night", words) == ["a sks1 creature at night", "a sks2 creature at night"]
    prompts = own_prompts("in the snow a sks2  creature and a SKS1 creature at night", words)
    assert parse_subjects([" sks1  creature", "A"]) == (["sks1 creature"], ["A"])
    assert prompts == ["in the snow a SKS1 creature at night", "in the snow a sks2  creature at night"]
    with pytest.raises(UserError, match="does not hold the words 'sks2 creature'"):
        own_prompts("a sks1 creature and a sks22 creature", words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--subjects", "sks creature"], "'sks creature' stands alone"),
        (["--subjects", " ", "A"], "the words of a subject are empty"),
        (["--subjects", "{subjects}", "A"], "belongs into --prompt"),
        (["--subjects", "sks dog", "A", "Sks  dog", "B"], "cannot be told apart"),
        (["--subjects", "sks dog", "A", "dog", "B"], "cannot be told apart"),
        (["--subjects", "sks dog", "A", "--adapters", "B"], "so --adapters beside it has no part"),
        (["--subjects", "sks dog", "A", "--regions", "left: x"], "so --regions beside it has no part"),
        (["--subjects", "sks dog", "RUN", "--prompt", "a cat"], "does not hold the words 'sks dog'"),
        (["--subjects", "sks dog", "RUN", "--strength", "1", "0.5"], "1 adapters need as many strengths"),
        (["--subjects", "sks dog", "RUN", "--image", "IMAGE"], "--image does not work with --reference or --subjects"),
    ],
)
def test_what_cannot_be_drawn_is_refused_beforehand(adapters, tmp_path, words, sentence, capsys):
    base, adapter, _ = adapters("sd")
    (image := tmp_path / "a.png").write_bytes(b"")
    given = [{"RUN": adapter, "IMAGE": str(image)}.get(word, word) for word in words]
    with pytest.raises(SystemExit, match="2"):
        main(["sample", "--base", str(base), "--out", str(tmp_path / "out"), *given])
    assert sentence in capsys.readouterr().err


def test_more_subjects_than_there_is_room_for(adapters):
    base, adapter, _ = adapters("flux-dev")
    recipe = recipe_for(base, *[adapter] * 3, subjects=("red dog", "blue cat", "big hen"), prompt="{subjects}")
    with pytest.raises(UserError, match="3 subjects cannot be told apart in an image that is 4 tokens wide"):
        load_pipeline(recipe)


def test_an_adapter_that_shows_no_subject_or_cannot_be_kept_to_one(adapters, tmp_path):
    base, adapter, _ = adapters("flux-dev")
    model = open_model(resolve_base(str(base))).load("transformer")
    attach(model, make_config("lora", rank=2, alpha=2.0, dropout=0.0, target_modules=("to_q",), options={}))
    native.save_native(model, tmp_path / "dead" / "transformer")
    both = {"subjects": ("red dog", "blue cat"), "prompt": "{subjects}"}
    with pytest.raises(UserError, match="dead changes no layer of the denoiser"):
        generate(recipe_for(base, adapter, str(tmp_path / "dead"), **both))
    wide = make_adapter(base, tmp_path / "wide", targets=("norm1.linear",))
    with pytest.raises(UserError, match=r"changes transformer_blocks\.0\.norm1\.linear, of which it cannot be told"):
        generate(recipe_for(base, adapter, wide, **both))
    bent = make_adapter(base, tmp_path / "bent", targets=("to_q",), method="fvae")
    with pytest.raises(UserError, match="bent cannot be kept to a subject"):
        generate(recipe_for(base, adapter, bent, **both))


def test_words_are_encoded_with_the_adapter_of_their_own_subject(adapters):
    """Each subject's states are those of its prompt with its adapter alone on the text encoder."""
    base, first, second = adapters("sd")
    pipe = load_pipeline(recipe_for(base, first, second))
    names, prompts, known = ["adapter_0", "adapter_1"], ["a red dog", "a blue cat"], []
    with words_of_subjects(pipe, prompts, names, [1.0, 0.5], known):
        wanted, unwanted = pipe.encode_prompt(OwnPrompt("both"), "cpu", 1, True, negative_prompt="grey")
    length = wanted.shape[1] // 2
    assert torch.equal(known[0].owners, torch.arange(2).repeat_interleave(length))
    assert [words.wanted for words in known] == [True, False]
    for number, (name, strength) in enumerate(zip(names, [1.0, 0.5], strict=True)):
        native.set_strengths(pipe, {name: strength})
        alone = pipe.encode_prompt(prompts[number], "cpu", 1, True, negative_prompt="grey")
        for together, own in zip((wanted, unwanted), alone, strict=True):
            torch.testing.assert_close(together[:, number * length : (number + 1) * length], own)
    assert (wanted[:, :length] - wanted[:, length:]).abs().max() > 0.1


def test_an_attention_that_cannot_be_held_back_is_refused(adapters, monkeypatch):
    base, first, second = adapters("flux-dev")
    monkeypatch.setattr(SubjectAttention, "sides", lambda self, tokens, q, k: (None, None))
    with pytest.raises(UserError, match="attention between subjects cannot be held back"):
        generate(recipe_for(base, first, second, subjects=("red dog", "blue cat"), prompt="{subjects}"))


def test_an_adapter_on_some_layers_of_a_unet(adapters, tmp_path):
    """Convolutions and cross-attention are told apart from what sees the noise level alone."""
    base, adapter, _ = adapters("sd")
    both = {"subjects": ("red dog", "blue cat"), "prompt": "{subjects}"}
    wide = make_adapter(base, tmp_path / "wide", targets=("conv1", "proj_in", "ff.net.2", "attn2.to_k"))
    assert len(generate(recipe_for(base, adapter, wide, **both))) == 1
    time = make_adapter(base, tmp_path / "time", targets=("time_emb_proj",))
    with pytest.raises(UserError, match="time_emb_proj, of which it cannot be told"):
        generate(recipe_for(base, adapter, time, **both))


# ---------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("name", ["sd", "flux-dev"])
def test_subjects_on_the_command_line_repeat(adapters, name, tmp_path, capsys):
    base, first, second = adapters(name)
    words = ["sample", "--base", str(base), "--width", "32", "--steps", "2", "--n", "2", "--out", str(tmp_path)]
    main([*words, "--subjects", "red dog", first, "blue cat", second, "--prompt", "a red dog and a blue cat at night"])
    said = capsys.readouterr().err
    assert "'red dog' is drawn by 'a red dog at night'" in said
    assert "The subjects stand side by side, from the left: red dog, blue cat" in said
    main(["sample", "--from", str(tmp_path / "000001.png"), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / "000001.png").read_bytes() == (tmp_path / "000001.png").read_bytes()


def test_regions_of_other_families_take_one_pass(adapters):
    """A region over everything is the plain image; two are neither adapter's own."""
    base, first, second = adapters("flux-dev")
    whole = replace(recipe_for(base, first, prompt=""), regions=(("a sks creature", 0.0, 0.0, 1.0, 1.0),))
    plain = generate(recipe_for(base, first))[0][0]
    assert np.abs(np.asarray(generate(whole)[0][0], float) - np.asarray(plain, float)).max() <= 1
    halves = (("a sks creature", 0.0, 0.0, 0.5, 1.0), ("a dog", 0.5, 0.0, 1.0, 1.0))
    two = generate(replace(recipe_for(base, first, second, prompt=""), regions=halves))[0][0]
    assert two.tobytes() != plain.tobytes()
