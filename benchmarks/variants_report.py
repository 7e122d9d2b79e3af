"""What benchmarks/variants.py found, with intervals: JSON, a table, a plot.

A run is one subject with one seed. Differences from plain LoRA are taken run by run, and their bootstrap intervals are widened for the
number of methods (Bonferroni), so that all of them together hold with 95 %. Runs of one subject are not independent of one another, so
a second test must agree: the subjects' mean differences must all have the same sign.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rankfold.toolkit.metrics.statistics import bootstrap_interval

KEYS = ("identity", "fidelity", "drift", "score")
REFERENCE = "lora"


def rows_of(results: Sequence[dict[str, Any]], steps: int, cost: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each method and budget."""
    names = list(dict.fromkeys(one["cell"]["method"]["method"] for one in results))
    rows = []
    for name in names:
        own = [one for one in results if one["cell"]["method"]["method"] == name]
        marks = own[0]["cell"]["marks"]
        for budget, mark in (("steps", steps), ("time", min(marks, key=lambda m: abs(m - steps / cost[name]["time"])))):
            sized = own[0]["cell"]["method"]
            row = {"method": name, "budget": budget, "steps": mark, "rank": sized["rank"], "options": sized["options"]}
            row |= {"learning_rate": own[0]["cell"]["rate"], "parameters": own[0]["parameters"]}
            row |= {"bytes": own[0]["bytes"], **cost[name]}
            for key in KEYS:
                values = torch.tensor([one["figures"][str(mark)][key] for one in own])
                row[key] = {
                    "mean": float(values.mean()),
                    "interval": bootstrap_interval(values),
                    "by_run": values.tolist(),
                }
            row["runs"] = [(one["cell"]["subject"]["name"], one["cell"]["seed"]) for one in own]
            rows.append(row)
    for row in rows:
        reference = next(r for r in rows if r["method"] == REFERENCE and r["budget"] == row["budget"])
        row["against_lora"] = {key: against(row, reference, key, len(names) - 1) for key in KEYS}
    return rows


def against(row: dict[str, Any], reference: dict[str, Any], key: str, comparisons: int) -> dict[str, Any]:
    """Paired difference from plain LoRA, and whether it is more than chance."""
    gained = torch.tensor(row[key]["by_run"]) - torch.tensor(reference[key]["by_run"])
    low, high = bootstrap_interval(gained, level=1 - 0.05 / max(1, comparisons), draws=20_000)
    subjects = [subject for subject, _ in row["runs"]]
    means = [float(gained[torch.tensor([own == name for own in subjects])].mean()) for name in dict.fromkeys(subjects)]
    agree = all(mean > 0 for mean in means) or all(mean < 0 for mean in means)
    return {"mean": float(gained.mean()), "interval": (low, high), "real": agree and (low > 0 or high < 0)}


def report(
    results: Sequence[dict[str, Any]],
    rates: dict[str, dict[float, float]],
    cost: dict[str, Any],
    steps: int,
    out: Path | None,
    plot: Path | None,
) -> None:
    """Prints the table and writes everything."""
    rows = rows_of(results, steps, cost)
    print(markdown(rows))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"rows": rows, "rates": rates}, indent=1), encoding="utf-8")
    if plot:
        draw(rows, plot)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Both budgets as tables; a star marks what differs from plain LoRA by more than chance."""
    lines = []
    for budget in ("steps", "time"):
        lines += ["", f"equal {budget}", "", "| method | steps | parameters | identity | fidelity | drift | score |"]
        lines += ["|---|---:|---:|---|---|---|---|"]
        for row in (row for row in rows if row["budget"] == budget):
            cells = [f"{row['method']} (rank {row['rank']})", str(row["steps"]), f"{row['parameters']:,}"]
            lines.append("| " + " | ".join(cells + [format_figure(row, key) for key in KEYS]) + " |")
    lines += [
        "",
        "| method | learning rate | time of a step | memory of a step | file, kB |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in (row for row in rows if row["budget"] == "steps"):
        low, high = row["time_quartiles"]
        lines.append(
            f"| {row['method']} | {row['learning_rate']:.0e} | {row['time']:.2f} ({low:.2f} to {high:.2f}) | "
            f"{row['memory']:.2f} | {row['bytes'] / 1e3:.0f} |"
        )
    return "\n".join(lines)


def format_figure(row: dict[str, Any], key: str) -> str:
    """A figure with its interval, and a star when it differs from plain LoRA's."""
    low, high = row[key]["interval"]
    star = " *" if row["against_lora"][key]["real"] else ""
    return f"{row[key]['mean']:.3f} ({low:.3f} to {high:.3f}){star}"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Differences from plain LoRA with their widened intervals, for both budgets."""
    from matplotlib.figure import Figure

    names = [row["method"] for row in rows if row["budget"] == "steps" and row["method"] != REFERENCE]
    figure = Figure(figsize=(11, 4.6), dpi=100, layout="constrained")
    for axes, key in zip(figure.subplots(1, len(KEYS), sharey=True), KEYS, strict=True):
        for shift, budget, colour in ((-0.13, "steps", "#3366aa"), (0.13, "time", "#cc7722")):
            for place, name in enumerate(names):
                row = next(r for r in rows if r["method"] == name and r["budget"] == budget)
                own = row["against_lora"][key]
                style = {"marker": "o", "markerfacecolor": colour if own["real"] else "white"}
                axes.plot(own["interval"], [place + shift] * 2, color=colour, linewidth=1.2)
                label = f"equal {budget}" if place == 0 else None
                axes.plot(own["mean"], place + shift, color=colour, linestyle="none", label=label, **style)
        axes.axvline(0, color="#888888", linewidth=0.8)
        axes.set(yticks=range(len(names)), yticklabels=names, title=f"{key}, less plain LoRA's")
    figure.axes[0].invert_yaxis()  # they share it
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    raise SystemExit("This is the report of benchmarks/variants.py.")
