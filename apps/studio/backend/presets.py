"""Settings that suit a base, at three lengths."""

from __future__ import annotations

from typing import Any

from ....training.config.defaults import EMBEDDED_SETTINGS
from ....training.config.subject import SubjectConfig
from ....training.embedded.demo import DEMO_SETTINGS

PREVIEWS = 3  # of a run
QUICK, STANDARD, THOROUGH = "Quick look", "Standard", "Thorough"
STEPS = {QUICK: 0.3, STANDARD: 1.0, THOROUGH: 2.5}


def preset(name: str, base: str) -> dict[str, Any]:
    """Settings that suit a base: those of the demo for embedded ones, the base's own for others."""
    if base in DEMO_SETTINGS:
        settings = {key: to_list(value) for key, value in DEMO_SETTINGS[base].items()}
        return settings | run_length(round(300 * STEPS[name]))
    own = dict.fromkeys((*EMBEDDED_SETTINGS, "alpha"), None) | {"class_noun": ""}  # unset: the base's own
    return own | run_length(round(800 * STEPS[name]))


def to_list(value: Any) -> Any:
    """A setting as YAML has it."""
    return list(value) if isinstance(value, tuple) else value


def run_length(steps: int) -> dict[str, int]:
    """So many steps, with previews on the way."""
    return {"steps": steps, "preview_every": steps // PREVIEWS}


def with_base_preset(values: dict[str, Any], applied: tuple[str, str], base: str) -> dict[str, Any]:
    """The values with the preset of another base, but for those that somebody has set. applied: the preset's name and former base.

    What only the former base's preset sets goes back to what it is without a preset.
    """
    name, former = applied
    before = preset(name, former)
    blank = SubjectConfig()
    after = {key: to_list(getattr(blank, key)) for key in before} | preset(name, base)
    return values | {key: value for key, value in after.items() if values.get(key) == before.get(key)}
