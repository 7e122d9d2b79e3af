"""The figures of an evaluation for people, and as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...toolkit.core.files import write_text


def format_report(figures: dict[str, Any]) -> str:
    """The figures for people."""
    tuned, base, both = figures["tuned"], figures["base"], figures["compared"]
    lines = [
        f"{'':28} accuracy  95 % interval     rows  unparsed",
        format_line("base", base["accuracy"], base["unparsed"]),
        format_line("tuned", tuned["accuracy"], tuned["unparsed"]),
    ]
    limit = figures.get("settings", {}).get("max_new_tokens")
    for name in ("base", "tuned"):
        if figures[name].get("cut"):
            lines.append(
                f"{name}: {figures[name]['cut']} of {figures[name]['accuracy']['rows']} answers were cut at --max-new-tokens {limit}, "
                "so they may be right and count as wrong"
            )
    for name in ("base", "tuned"):
        if "by_likelihood" in figures[name]:
            lines.append(format_line(f"{name}, likeliest option", figures[name]["by_likelihood"]))
    for name in ("base", "tuned"):
        if "iou" in figures[name]:
            lines.append(format_line(f"{name}, mean IoU of boxes", figures[name]["iou"]))
    for split, own in tuned.get("splits", {}).items():
        lines.append(format_line(f"tuned, {split or 'no split'}", own))
    if "mean_of_splits" in tuned:
        lines.append(f"{'tuned, mean of the splits':28} {tuned['mean_of_splits']:8.3f}")
    if "yes_no" in tuned:
        own = tuned["yes_no"]
        lines.append(
            f"yes or no: F1 {own['f1']:.3f}, precision {own['precision']:.3f}, recall {own['recall']:.3f}; "
            f"says yes to {own['yes_rate']:.0%}, right would be {own['yes_rate_of_the_truth']:.0%}"
        )
    lines.append(
        f"tuned against base, same rows: {both['verdict']} ({both['difference']:+.3f}, {both['low']:+.3f} to {both['high']:+.3f}; "
        f"{both['gained']} rows gained, {both['lost']} lost, McNemar p {both['mcnemar_p']:.2g})"
    )
    for name, own in figures["controls"].items():
        if name == "commonest answer":
            lines.append(f"always '{own['answer']}' would score {own['mean']:.3f}")
            continue
        lines.append(format_line(f"tuned, {name}", own))
        seen = own["seen"]
        word = "it looks" if seen["it_looks"] else "no sign that it looks"
        if seen.get("cut") and not seen["it_looks"]:
            word = f"it cannot be told whether it looks, since {seen['cut']} answers were cut"
        lines.append(
            f"{'':28} with the right image {seen['mean']:+.3f} ({seen['low']:+.3f} to {seen['high']:+.3f}): {word}"
        )
    if "retention" in figures:
        kept = figures["retention"]
        lines += [format_line("old tasks, base", kept["base"]), format_line("old tasks, tuned", kept["tuned"])]
        lines.append(f"old tasks: {kept['compared']['verdict']} ({kept['compared']['difference']:+.3f})")
        if kept.get("cut"):
            lines.append(f"old tasks: {kept['cut']} answers were cut at --max-new-tokens {limit}")
        for split, own in kept["splits"].items():
            lines.append(f"  {split:26} {own['base']:.3f} -> {own['tuned']:.3f}")
    if "leaked" in figures:
        lines.append(f"{figures['leaked']} rows show an image that was trained on")
    return "\n".join(lines)


def format_line(name: str, own: dict[str, Any], unparsed: int | None = None) -> str:
    """One share."""
    more = "" if unparsed is None else f"  {unparsed:8}"
    return f"{name:28} {own['mean']:8.3f}  {own['low']:.3f} to {own['high']:.3f}  {own['rows']:7}{more}"


def write_figures(out: Path, figures: dict[str, Any]) -> Path:
    """evaluation.json, and answers.jsonl with every answer."""
    rows = figures.pop("rows")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_text(out / "evaluation.json", json.dumps(figures, indent=1, ensure_ascii=False))
    return out / "evaluation.json"
