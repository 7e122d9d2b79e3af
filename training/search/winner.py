"""The best structure of a search, as an adapter, and as a config that trains again."""

from __future__ import annotations

import json
from pathlib import Path

from ...toolkit.adapters.variants.glora import GloraConfig
from ...toolkit.adapters.variants.glora_supernet import Choices, select_tensors
from ...toolkit.formats import native
from ..config.search import SearchSettings
from .paths import SupernetPaths


def winner_config(config: SearchSettings, path: dict[str, Choices]) -> GloraConfig:
    """The PEFT config of a structure, which names every layer."""
    return GloraConfig(
        r=config.rank,
        target_modules=list(path),
        form=config.form,
        a_rate=config.a_rate,
        structure={name: ",".join(choices) for name, choices in path.items()},
    )


def structure_options(config: SearchSettings, path: dict[str, Choices]) -> dict[str, str]:
    """The adapter options that say a structure."""
    short = {name.split(".", 1)[1]: ",".join(choices) for name, choices in path.items()}
    return {"structure": json.dumps(short), "form": config.form, "a_rate": str(config.a_rate)}


def save_winner(folder: Path, paths: SupernetPaths, path: dict[str, Choices]) -> None:
    """Writes the supernet's tensors on a path as a GLoRA adapter, a folder for each part."""
    for part in dict.fromkeys(name.split(".", 1)[0] for name in paths.layers):
        own = {name.removeprefix(f"{part}."): c for name, c in path.items() if name.startswith(f"{part}.")}
        state = {}
        for name, choices in own.items():
            tensors = select_tensors(paths.layers[f"{part}.{name}"].tensors("default"), choices)
            state |= {f"{name}.glora_{key}": value.detach().cpu().float().clone() for key, value in tensors.items()}
        (folder / part).mkdir(parents=True, exist_ok=True)
        native.write_state(folder / part, state, winner_config(paths.config, own))
