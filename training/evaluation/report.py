"""Runs side by side on one page: settings that differ, curves, what was measured, images of the same step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from ...toolkit.core.errors import UserError
from ...toolkit.core.records import is_number, read_record
from ...toolkit.core.run_folder import Run
from ..config.yaml_file import from_yaml
from .html import curves_svg, heading, html_page, image_figures, table

MEASURED = ("metrics.json", "evaluation/evaluation.json", "evaluation.json", "figures.json")


def runs_page(folders: Sequence[Path]) -> str:
    """The page of these runs.

    Raises:
        UserError: for a folder that is not a run, or the same one twice.
    """
    runs = {short_names(folders)[number]: Run.open(folder) for number, folder in enumerate(folders)}
    if len(runs) < len(folders):
        raise UserError("The same run is named twice: name each once.")
    configs = {name: {k: str(v) for k, v in asdict(from_yaml(run.config_file)).items()} for name, run in runs.items()}
    parts = [heading("State"), states_table(runs), heading("Settings that differ"), differing_settings(configs)]
    losses = {name: loss_curve(run) for name, run in runs.items()}
    if any(x for x, _ in losses.values()):
        parts += [heading("Loss"), curves_svg(losses, "loss")]
    figures = {name: collect_metrics(run) for name, run in runs.items()}
    keys = sorted({key for own in figures.values() for key in own})
    if keys:
        parts += [
            heading("Measured"),
            table(["", *runs], [[key, *(own.get(key) for own in figures.values())] for key in keys]),
        ]
    for name, run in runs.items():
        if shown := last_previews(run):
            parts += [heading(f"Previews of {name}"), image_figures(shown)]
    return html_page(" and ".join(runs), parts)


def short_names(folders: Sequence[Path]) -> list[str]:
    """Short names, with more of the path where the last part is not enough."""
    last = [folder.resolve().name for folder in folders]
    return last if len(set(last)) == len(last) else [str(folder) for folder in folders]


def states_table(runs: dict[str, Run]) -> str:
    """How far each run is."""
    rows = []
    for name, run in runs.items():
        status = run.status()
        rows.append(
            [name, status.get("state"), f"{status.get('step', 0)} of {status.get('total', '?')}", status.get("error")]
        )
    return table(["run", "state", "step", "error"], rows)


def differing_settings(configs: dict[str, dict[str, str]]) -> str:
    """The settings in which the runs differ."""
    keys = list(dict.fromkeys(key for own in configs.values() for key in own))
    rows = [[key, *(own.get(key) for own in configs.values())] for key in keys]
    return table(["", *configs], [row for row in rows if len(set(row[1:])) > 1])


def loss_curve(run: Run) -> tuple[list[float], list[float]]:
    """Steps and losses."""
    rows = [row for row in run.metrics() if is_number(row.get("loss")) and "step" in row]
    return [row["step"] for row in rows], [row["loss"] for row in rows]


def collect_metrics(run: Run) -> dict[str, Any]:
    """Everything that was measured, by name."""
    found: dict[str, Any] = {}
    for name in MEASURED:
        found |= flatten_metrics(read_record(run.folder / name) or {})
    return found


def flatten_metrics(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Numbers, and means with their intervals, by the names on the way to them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        if isinstance(value, dict) and all(is_number(value.get(end)) for end in ("mean", "low", "high")):
            found[name] = value
        elif isinstance(value, dict) and key != "settings":
            found |= flatten_metrics(value, f"{name}: ")
        elif is_number(value):
            found[name] = value
    return found


def last_previews(run: Run) -> list[tuple[Image.Image, str]]:
    """The images of the last step that has any."""
    files = sorted(run.samples.glob("*.png"))
    if not files:
        return []
    step = files[-1].name.split("_")[0]
    shown = []
    for file in files:
        if file.name.startswith(f"{step}_"):
            with Image.open(file) as image:
                shown.append((image.convert("RGB"), f"step {int(step)}"))
    return shown
