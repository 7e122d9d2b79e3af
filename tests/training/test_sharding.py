"""A base that is sharded over two processes trains as a whole one does, and each holds half of its blocks."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from family_runs import a_config
from forked import in_two_processes, run_in_two_processes
from shares import write_share
from short_runs import adapter, write_config

from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.run_folder import Run
from rankfold.training.engine.loop import comparable_config
from rankfold.training.engine.sharding import check_sharding
from rankfold.training.evaluation.measuring import load_measurements
from rankfold.training.launch.start import train

BASES = {  # family -> adapter, and settings of its own
    "sd": (
        "glora",
        {"adapter_options": {"form": "elementwise"}, "preservation_weight": 1.0, "train_text_encoder": True},
    ),
    "sd3": ("lora", {"gradient_checkpointing": True}),
    "flux-dev": ("loratrf", {"preview_every": 2, "preview_steps": 2, "evaluate_every": 3}),
    "z-image": ("moslora", {}),
}


def test_a_shared_base_gives_the_same_curve(folders, photos, tmp_path):
    ones, files = {}, []
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {token} {noun} on the beach\n")
    measured = {"evaluate_images": photos, "evaluate_prompts": str(prompts), "evaluate_clip": "embedded"}
    for name, (kind, own) in BASES.items():
        base = folders(name)
        config = replace(
            a_config(base, photos, tmp_path / name, adapter=kind, **own, **measured), steps=3, batch_size=4, log_every=1
        )
        ones[name] = train(config)
        config = replace(config, out=tmp_path / f"{name}-two", shard_base=True)
        files.append(write_config(config, tmp_path / f"{name}.yaml"))
    run_in_two_processes(tmp_path, *(["train", "subject", "--config", str(file)] for file in files))
    for name, one in ones.items():
        two = Run(tmp_path / f"{name}-two")
        assert two.status()["processes"] == 2
        curves = [[row["loss"] for row in run.metrics() if "loss" in row] for run in (one, two)]
        assert len(curves[0]) == 3
        assert curves[1] == pytest.approx(curves[0], rel=1e-3), name
        part = "unet" if name == "sd" else "transformer"
        own, other = adapter(one.folder, part), adapter(two.folder, part)
        assert own.keys() == other.keys()
        first, second = (torch.cat([kept[key].flatten() for key in own]) for kept in (own, other))
        assert (first - second).norm() < 1e-3 * first.norm(), name
        assert len(load_measurements(one)) == (2 if name == "flux-dev" else 0)
        for a, b in zip(load_measurements(one), load_measurements(two), strict=True):
            assert b.likeness == pytest.approx(a.likeness, abs=2e-3)
        assert [p.name for p in one.samples.glob("*.png")] == [p.name for p in two.samples.glob("*.png")]


@pytest.mark.campaign  # minutes of compiling
def test_a_shared_base_compiles(folders, photos, tmp_path):
    for name in ("sd", "sd3"):
        base = folders(name)
        config = replace(a_config(base, photos, tmp_path / name), steps=3, batch_size=4, log_every=1)
        one, shared = train(config), replace(config, out=tmp_path / f"{name}-two", shard_base=True, compile=True)
        run_in_two_processes(
            tmp_path, ["train", "subject", "--config", str(write_config(shared, tmp_path / "run.yaml"))]
        )
        losses = [[row["loss"] for row in run.metrics()] for run in (one, Run(shared.out))]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_each_process_holds_its_share(folders, photos, tmp_path):
    base = folders("flux-dev")
    config = replace(a_config(base, photos, tmp_path / "run"), batch_size=2, shard_base=True)
    in_two_processes(partial(write_share, config, tmp_path / "share"), tmp_path)
    shares = [json.loads((tmp_path / f"share{rank}").read_text(encoding="utf-8")) for rank in range(2)]
    whole = shares[0]["all"]
    assert sum(own["begin"] for own in shares) == whole > 10_000
    for own in shares:
        assert own["begin"] < 0.55 * whole
        assert own["forward"] == own["backward"] == own["begin"]
        assert own["begin"] < own["at_work"] <= own["begin"] + own["largest"]


def test_one_process_has_nobody_to_share_with(config):
    with pytest.raises(UserError, match="this is one process"):
        train(replace(config, shard_base=True))


@pytest.mark.parametrize("settings", [{"quantize": "nf4"}, {"prior_weight": 1.0}])
def test_what_a_shared_base_does_not_go_with(config, settings):
    flag = f"--{next(iter(settings)).replace('_', '-')}"
    with pytest.raises(UserError, match=f"does not go with {flag} yet"):
        check_sharding(replace(config, shard_base=True, **settings), 2)


def test_a_run_may_go_on_where_the_base_is_whole(config):
    """How it is held is no part of what a checkpoint hangs on."""
    assert comparable_config(config) == comparable_config(replace(config, shard_base=True))
