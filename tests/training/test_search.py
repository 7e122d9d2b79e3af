"""Structure search: the evolution, the supernet, the run that stops anywhere and goes on, the winner that is what it says."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from forked import run_in_two_processes
from peft import get_peft_model
from settings import quick_config
from short_runs import train_until, write_config
from torch import nn

from rankfold.apps.cli import main
from rankfold.pipelines.export import export_adapter
from rankfold.pipelines.generate import Recipe, generate
from rankfold.toolkit.adapters.attach import adapter_layers
from rankfold.toolkit.adapters.variants.glora import CHOICES, GloraConfig
from rankfold.toolkit.adapters.variants.glora_supernet import LARGEST, GloraSupernetConfig, select_tensors, set_path
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.files import append_line
from rankfold.toolkit.core.run_folder import Run
from rankfold.toolkit.data.subjects import find_samples
from rankfold.toolkit.formats import native
from rankfold.toolkit.formats.adapter_folder import WEIGHTS, check_adapter_folder
from rankfold.training.config.search import EvolutionConfig, SearchConfig
from rankfold.training.config.yaml_file import from_yaml
from rankfold.training.launch.start import resume, train
from rankfold.training.search.evolution import SearchSpace, evolve, pareto_front, rank_structures
from rankfold.training.search.search import SearchStopped
from rankfold.training.search.subject import SearchTask

# ---------------------------------------------------------------------------------------------- evolution

SMALL = EvolutionConfig(population=12, generations=6, parents=4, mutations=6, crossovers=6)


def a_space(genes=12, limit=40):
    return SearchSpace(costs=tuple((0, 1, 3, 10) for _ in range(genes)), limit=limit)


def goodness(structure):
    """Best where each gene is its number modulo 3, by a margin of its own for each gene."""
    return -sum((gene - number % 3) ** 2 * (1 + 0.01 * number) for number, gene in enumerate(structure))


def test_evolution_keeps_its_promises():
    asked, told = [], []

    def evaluate(structures):
        asked.extend(structures)
        return [goodness(s) for s in structures]

    space = a_space()
    scores = evolve(space, SMALL, evaluate, lambda number, seen: told.append((number, len(seen))))
    assert len(asked) == len(set(asked)) == len(scores)
    assert all(space.cost(structure) <= space.limit for structure in asked)
    assert told == [(number, 12 * (number + 1)) for number in range(7)]
    assert evolve(space, SMALL, lambda s: [goodness(x) for x in s]) == scores
    assert evolve(space, replace(SMALL, search_seed=1), lambda s: [goodness(x) for x in s]) != scores
    best = rank_structures(scores)
    assert best[0] == max(scores, key=lambda s: scores[s])
    assert set(asked[-12:]) <= set(best)


def test_evolution_is_better_than_chance():
    """At an equal number of evaluations, over ten seeds, the best bred structure beats the best random one."""
    wins = 0
    for seed in range(10):
        config = replace(SMALL, search_seed=seed)
        bred = max(evolve(a_space(), config, lambda s: [goodness(x) for x in s]).values())
        random = replace(config, population=84, generations=0)
        wins += bred > max(evolve(a_space(), random, lambda s: [goodness(x) for x in s]).values())
    assert wins >= 9


def test_a_limit_that_hardly_any_draw_meets():
    space = a_space(genes=30, limit=3)  # a random structure costs about a hundred
    scores = evolve(space, SMALL, lambda s: [goodness(x) for x in s])
    assert len(scores) > 12
    assert all(space.cost(structure) <= 3 for structure in scores)


def test_a_small_space_is_searched_whole_and_no_more():
    space = SearchSpace(costs=((0, 1), (0, 1), (0, 5)), limit=2)
    assert sorted(evolve(space, SMALL, lambda s: [goodness(x) for x in s])) == [
        (0, 0, 0),
        (0, 1, 0),
        (1, 0, 0),
        (1, 1, 0),
    ]


def test_impossible_limit_and_fitness():
    with pytest.raises(UserError, match="below the smallest structure"):
        evolve(SearchSpace(costs=((2, 3), (2, 5)), limit=3), SMALL, lambda s: [0.0] * len(s))
    with pytest.raises(UserError, match="finite fitness"):
        evolve(a_space(), SMALL, lambda s: [math.nan] * len(s))
    scores = evolve(a_space(), SMALL, lambda s: [math.nan if x[0] == 1 else goodness(x) for x in s])
    assert rank_structures(scores)[0][0] != 1
    with pytest.raises(UserError, match="--mutation-rate"):
        evolve(a_space(), replace(SMALL, mutation_rate=0), lambda s: [0.0] * len(s))


def test_front():
    space = SearchSpace(costs=((0, 1, 2, 3),), limit=3)
    assert pareto_front({(0,): -1.0, (1,): -2.0, (2,): -0.5, (3,): -0.5}, space) == [(0,), (2,)]


# ---------------------------------------------------------------------------------------------- supernet


@pytest.mark.parametrize("form", ["matmul", "elementwise"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("part", list(CHOICES))
def test_every_path_is_the_adapter_of_its_structure(form, bias, part):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5, bias=bias))
    weight, own_bias = net[0].weight.detach().clone(), net[0].bias.detach().clone() if bias else None
    supernet = get_peft_model(net, GloraSupernetConfig(r=3, target_modules=["0"], form=form))
    layer = next(iter(adapter_layers(supernet).values()))
    x = torch.randn(4, 6)
    start = nn.functional.linear(x, weight, own_bias)
    tensors = layer.tensors("default")
    for choice in CHOICES[part]:
        choices = tuple(choice if name == part else "lora" if name in "abc" else "vector" for name in CHOICES)
        set_path(supernet, {"base_model.model.0": choices})
        for tensor in tensors.values():
            tensor.data.zero_()
        torch.testing.assert_close(supernet(x), start)
        for tensor in tensors.values():
            torch.nn.init.normal_(tensor, std=0.3)
        plain = nn.Sequential(nn.Linear(6, 5, bias=bias))
        plain[0].weight.data.copy_(weight)
        if bias:
            plain[0].bias.data.copy_(own_bias)
        alone = get_peft_model(
            plain, GloraConfig(r=3, target_modules=["0"], form=form, structure={"0": ",".join(choices)})
        )
        own = next(iter(adapter_layers(alone).values())).tensors("default")
        picked = select_tensors(tensors, choices)
        assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in picked.items()}
        for name, tensor in own.items():
            tensor.data.copy_(picked[name])
        torch.testing.assert_close(supernet(x), alone(x))


# ---------------------------------------------------------------------------------------------- runs


@pytest.fixture
def search(base, images, tmp_path):
    return quick_config(
        SearchConfig,
        base=str(base),
        images=images,
        out=tmp_path / "search",
        steps=6,
        batch_size=2,
        rank=2,
        learning_rate=0.05,
        log_every=2,
        checkpoint_every=2,
        preview_every=0,
        threads=1,
        population=6,
        generations=2,
        parents=3,
        mutations=3,
        crossovers=3,
        held_out_draws=2,
        train_text_encoder=True,
    )


def task_of(config):
    return SearchTask(config, find_samples(config.images), config.base, Accelerator(cpu=True))


def adapter_bytes(run):
    return [(run.adapter / part / WEIGHTS).read_bytes() for part in check_adapter_folder(run.adapter)]


@pytest.fixture
def searched(search):
    return train(search)


def test_search(search, searched, base, capsys, tmp_path):
    run = searched
    rows = [json.loads(line) for line in run.candidates.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 18
    assert len({tuple(row["structure"]) for row in rows}) == 18
    task = task_of(search)
    assert all(row["parameters"] <= task.paths.space.limit for row in rows)
    assert task.paths.space.limit == sum(2 * (layer.fan_in + layer.fan_out) for layer in task.paths.layers.values())
    assert (run.folder / "pareto.png").stat().st_size > 1000
    assert "to_q" in (run.folder / "structure.txt").read_text(encoding="utf-8")
    best = max(rows, key=lambda row: row["fitness"])
    count = sum(t.numel() for part in check_adapter_folder(run.adapter) for t in load(run.adapter / part).values())
    assert count == best["parameters"]
    recipe = Recipe(prompt="a sks creature", base=str(base), adapters=(str(run.adapter),), strengths=(1.0,), steps=2)
    assert len(generate(recipe)) == 1
    proof = export_adapter(run.adapter, str(base), "kohya-full", tmp_path / "export", drop_bias=True)
    assert proof.weight_error < 1e-6


def load(folder):
    from safetensors.torch import load_file

    return load_file(folder / WEIGHTS)


def test_the_winner_is_as_good_as_it_was_judged(search, searched):
    """Its adapter, on a fresh model, has the loss that the supernet had on its path."""
    fitness = max(json.loads(line)["fitness"] for line in searched.candidates.read_text(encoding="utf-8").splitlines())
    task = task_of(search)
    for part in task.training.parts:
        from rankfold.toolkit.adapters.attach import remove_adapters

        remove_adapters(task.training.parts[part])
    native.load_into_pipeline(task.training.model, searched.adapter, "winner")
    task.module.eval()
    with torch.no_grad():
        loss = float(task.module(task.judge_batches).double().mean())
    assert loss == pytest.approx(-fitness, rel=1e-5)


def test_the_winner_trains_again(searched):
    config = from_yaml(searched.folder / "best.yaml")
    again = train(replace(config, steps=1))
    for part in check_adapter_folder(again.adapter):
        first, second = load(searched.adapter / part), load(again.adapter / part)
        assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in second.items()}


def test_any_function_may_judge(search):
    """Here the share of layers that have no A; the winner then has none in most."""

    def without_a(task):
        return sum(layer.path["default"][0] == "none" for layer in task.paths.layers.values()) / len(task.paths.layers)

    config = replace(search, steps=1, population=20, generations=12, parents=4, mutations=10, crossovers=10)
    run = train(config, partial(SearchTask, judge=without_a))
    fitness = [json.loads(line)["fitness"] for line in run.candidates.read_text(encoding="utf-8").splitlines()]
    assert max(fitness) > max(fitness[:20]) + 0.1


def test_resume_in_training_is_exact(search, searched, tmp_path):
    part = train_until(replace(search, out=tmp_path / "part"), 3)
    resume(part.folder)
    assert part.candidates.read_bytes() == searched.candidates.read_bytes()
    assert adapter_bytes(part) == adapter_bytes(searched)


@pytest.mark.parametrize("half_a_line", [False, True])
def test_resume_in_search_is_exact(search, searched, tmp_path, monkeypatch, half_a_line):
    """Stopped after the seventh judgement, and by a kill in the middle of writing one."""
    original, judged = SearchTask.fitness, []

    def fitness(self, structure):
        judged.append(structure)
        if len(judged) == 8:
            if half_a_line:
                raise KeyboardInterrupt
            raise SearchStopped
        return original(self, structure)

    monkeypatch.setattr(SearchTask, "fitness", fitness)
    config = replace(search, out=tmp_path / "part")
    if half_a_line:
        with pytest.raises(KeyboardInterrupt):
            train(config)
        with (config.out / "candidates.jsonl").open("a") as file:
            file.write('{"structure": [0, 1')
    else:
        assert train(config).status()["state"] == "stopped"
    before = len(judged)
    run = resume(config.out)
    assert len(judged) - before == 18 - 7
    whole = [json.loads(line) for line in searched.candidates.read_text(encoding="utf-8").splitlines()]
    lines = run.candidates.read_text(encoding="utf-8").splitlines()
    if half_a_line:
        lines.remove('{"structure": [0, 1')
    assert [json.loads(line) for line in lines] == whole
    assert adapter_bytes(run) == adapter_bytes(searched)


def test_a_stop_request_stops_the_search(search, monkeypatch):
    original = SearchTask.fitness

    def fitness(self, structure):
        (search.out / "requests" / "stop").touch()
        return original(self, structure)

    monkeypatch.setattr(SearchTask, "fitness", fitness)
    run = train(search)
    assert run.status()["state"] == "stopped"
    assert len(run.candidates.read_text(encoding="utf-8").splitlines()) == 1


def test_append_line_mends_half_a_line(tmp_path):
    file = tmp_path / "lines"
    append_line(file, "one")
    with file.open("a") as opened:
        opened.write("tw")
    append_line(file, "three")
    assert file.read_text(encoding="utf-8") == "one\ntw\nthree\n"


def test_paths_are_drawn_by_the_step(search):
    task = task_of(replace(search, largest_every=3))
    torch.manual_seed(1)
    first = [task.paths.path_at(step) for step in range(6)]
    torch.manual_seed(2)
    assert [task.paths.path_at(step) for step in range(6)] == first
    assert set(first[0].values()) == set(first[3].values()) == {LARGEST}
    assert first[1] != first[2]
    task.batch(2 * search.batch_size, [0, 1])
    assert {name: layer.path["default"] for name, layer in task.paths.layers.items()} == first[2]


def test_held_out_images_are_not_trained_on(search, images, tmp_path):
    task = task_of(replace(search, held_out_share=0.4))
    (own,), (out,) = task.training.data.instance, task.training.data.held_out
    assert (len(own), len(out)) == (3, 2)
    mine = {tuple(row.flatten()[:4].tolist()) for row in own.mean}
    assert not mine & {tuple(row.flatten()[:4].tolist()) for row in out.mean}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--choices-a", "lora", "lore"], "--choices-a must name some of lora, vector, constant, none"),
        (["--limit", "3", "--choices-b", "lora"], "below the smallest structure"),
        (["--images", "ONE"], "none can be held out"),
        (["--population", "0"], "--population must be at least 1"),
        (["--held-out", "nowhere"], "nowhere"),
        (["--a-rate", "0"], "--a-rate must be above 0"),
    ],
)
def test_mistakes(words, sentence, base, images, tmp_path, capsys):
    one = tmp_path / "one"
    one.mkdir()
    (one / "0.png").write_bytes((images / "0.png").read_bytes())
    words = [str(one) if word == "ONE" else word for word in words]
    words += [] if "--images" in words else ["--images", str(images)]
    with pytest.raises(SystemExit) as end:
        main(
            [
                "search",
                "subject",
                "--base",
                str(base),
                "--class-noun",
                "creature",
                *words,
                "--steps",
                "1",
                "--out",
                str(tmp_path / "out"),
            ]
        )
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said


def test_two_processes_judge_the_same_structures(search, tmp_path):
    """The candidates are divided among processes, and the same are drawn; the supernet is that of one process but for rounding."""
    config = replace(search, batch_size=4, learning_rate=1e-3, out=tmp_path / "one")
    one = train(config)
    file = write_config(replace(config, out=tmp_path / "two"), tmp_path / "two.yaml")
    run_in_two_processes(tmp_path, ["search", "subject", "--config", str(file)])
    two = Run(tmp_path / "two")
    assert two.status()["processes"] == 2
    rows = [
        [json.loads(line) for line in run.candidates.read_text(encoding="utf-8").splitlines()] for run in (one, two)
    ]
    assert len(rows[1]) == len({tuple(row["structure"]) for row in rows[1]}) == 18
    first = [row["structure"] for row in rows[0][:6]]
    assert [row["structure"] for row in rows[1][:6]] == first
    for a, b in zip(*(own[:6] for own in rows), strict=True):
        assert b["fitness"] == pytest.approx(a["fitness"], rel=1e-3)
    assert check_adapter_folder(two.adapter) == check_adapter_folder(one.adapter)
