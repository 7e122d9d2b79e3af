"""Every pair of options, in every family: a run trains, draws, measures, checkpoints, and its adapter is sampled in its dtype."""

from functools import partial
from itertools import combinations, product

import pytest
import torch
from settings import quick_config
from tiny_families import BUILDERS, SIDE

from rankfold.pipelines.generate import Recipe, generate
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.embedded import world
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.launch.start import train

OPTIONS = {
    "family": tuple(BUILDERS),
    "precision": ("fp32", "bf16"),
    "gradient_checkpointing": (False, True),
    "train_text_encoder": (False, True),
    "preview_every": (0, 1),
    "evaluate_every": (0, 2),
    "prior_weight": (0.0, 1.0),
    "preservation_weight": (0.0, 1.0),
    "ema_decay": (0.0, 0.9),
}
ADAPTERS = ("moslora", "lora", "glora", "fvae", "loratrf")


def all_pairs(options):
    """Rows that hold every pair of values of any two options, found greedily; always the same ones."""
    left = {
        frozenset({(a, x), (b, y)}) for a, b in combinations(options, 2) for x, y in product(options[a], options[b])
    }
    rows = []
    while left:
        row = dict(min(left, key=lambda pair: sorted(map(str, pair))))
        for name in options:
            if name not in row:
                row[name] = max(options[name], key=partial(count_new, left, row, name))
        left -= {frozenset(pair) for pair in combinations(row.items(), 2)}
        rows.append({name: row[name] for name in options})
    return rows


def count_new(left, row, name, value):
    return sum(frozenset({item, (name, value)}) in left for item in row.items())


ROWS = all_pairs(OPTIONS)
# Families whose code is another's, or that learn as another does; and text encoders of thirty layers, which take half a minute a row.
ALIKE = ("sd-v", "sd3-without-t5", "flux-schnell", "flux2-dev", "krea2", "ernie-image")
LONG = [row["family"] in ALIKE or (row["family"].startswith("flux2") and row["train_text_encoder"]) for row in ROWS]
PAIRS = [pytest.param(row, marks=pytest.mark.campaign) if long else row for row, long in zip(ROWS, LONG, strict=True)]
# Compiling takes minutes, so it meets all options at once, and two families in the gate.
COMPILED = [{name: values[-1] for name, values in OPTIONS.items()} | {"family": family} for family in BUILDERS]
MARKS = dict.fromkeys(BUILDERS, pytest.mark.campaign) | dict.fromkeys(("sd", "flux-dev"), pytest.mark.slow)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for number, (image, _) in enumerate(world.subject_images(2_000_700, 4)):
        image.resize((SIDE, SIDE)).save(root / f"{number}.png")
    return root


def name_of(row):
    return "-".join([row["family"], *(name for name, value in row.items() if value in (True, "bf16", 1, 2, 0.9))])


@pytest.mark.parametrize("row", PAIRS, ids=name_of)
def test_every_pair_of_options(row, folders, photos, tmp_path):
    train_row(row, folders, photos, tmp_path)


@pytest.mark.parametrize("row", [pytest.param(row, marks=MARKS[row["family"]]) for row in COMPILED], ids=name_of)
def test_compiled(row, folders, photos, tmp_path):
    torch._dynamo.reset()
    train_row(row | {"compile": True}, folders, photos, tmp_path, adapters=("moslora", "lora", "glora", "loratrf"))


def test_what_cannot_be_compiled_is_refused(photos, tmp_path):
    more = {"compile": True, "gradient_checkpointing": True, "adapter": "fvae"}
    with pytest.raises(UserError, match="--adapter fvae, whose own loss"):
        train(SubjectConfig(images=photos, out=tmp_path / "run", **more))
    assert not (tmp_path / "run").exists()


def train_row(row, folders, photos, tmp_path, adapters=ADAPTERS):
    row, prompts = dict(row), tmp_path / "prompts.txt"
    prompts.write_text("a {token} {noun} on the beach\n")
    family = row.pop("family")
    base = folders(family)
    config = quick_config(
        SubjectConfig,
        base=str(base),
        images=photos,
        out=tmp_path / "run",
        resolution=SIDE,
        steps=2,
        batch_size=2,
        rank=4,
        alpha=4.0,
        learning_rate=0.01,
        threads=1,
        preview_steps=2,
        prior_images=1,
        log_every=1,
        checkpoint_every=1,
        preview_prompts=("a {token} {noun}",),
        adapter=adapters[list(BUILDERS).index(family) % len(adapters)],
        evaluate_clip="embedded",
        evaluate_prompts=str(prompts),
        **row,
    )
    run = train(config)
    assert run.status()["state"] == "done"
    assert len(list(run.samples.iterdir())) == 2 * bool(row["preview_every"])
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in run.metrics() if "loss" in line)
    recipe = Recipe(prompt="a sks creature", base=str(base), steps=2, width=SIDE, precision=row["precision"])
    plain, tuned = (
        generate(Recipe(**(vars(recipe) | {"adapters": own, "strengths": (1.0,) * len(own)})))[0][0]
        for own in ((), (str(run.adapter),))
    )
    assert plain.tobytes() != tuned.tobytes()
