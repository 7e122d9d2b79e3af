"""`rankfold compose`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...toolkit.formats.adapter_facts import AdapterFacts, read_facts
from .options import check_out_free, parse_run
from .outcome import print_outcome


def compose(argv: list[str]) -> None:
    """`rankfold compose A B C --out D ...`: the words before the first option are the adapters."""
    from ...training.config.compose import ComposeConfig

    print_outcome(run_composition(ComposeConfig, argv, "compose"))


def compose_instruct(argv: list[str]) -> None:
    from ...training.config.compose import ComposeInstructConfig

    folder = run_composition(ComposeInstructConfig, argv, "compose instruct")
    print_outcome(folder, f"rankfold chat --run {folder} --image PICTURE QUESTION")


def run_composition(kind: Any, argv: list[str], name: str) -> Path:
    """Composes as the words say, and prints what came of it; returns the run folder."""
    count = next((number for number, word in enumerate(argv) if word.startswith("-")), len(argv))
    named = ["--adapters", *argv[:count]] if count else []
    config, overwrite = parse_run(kind, [*named, *argv[count:]], name)
    check_out_free(config, overwrite=overwrite)
    from ...training.launch.start import compose as run_compose

    run = run_compose(config, overwrite=overwrite)
    print_composition(read_facts(run.adapter))
    return run.folder


def print_composition(facts: AdapterFacts) -> None:
    """What the adapter was made of, and the mean weight of each; nothing for a run that is not done."""
    if not facts.composed_of:
        return
    weights = list(facts.composed_weights.values())
    print(f"{facts.composed_how} of {len(weights[0])} adapters")
    for number, source in enumerate(facts.composed_of):
        own = [row[number] for row in weights]
        spread = f", {min(own):.3f} to {max(own):.3f} over the layers" if len(own) > 1 else ""
        print(f"  {sum(own) / len(own):.3f}  {source.name}{spread}")
    if facts.composed_cut_error:
        print(f"cut: a layer's change is missed by up to {facts.composed_cut_error:.1%}")
