"""Does MoSLoRA's mixer pay? Learned mixers against LoRA, one rank more of LoRA, and a mixer that stays as it starts.

    python benchmarks/mixer.py [--seeds 10] [--threads 1] [--work FOLDER] [--out benchmarks/results/mixer.json]

The embedded vision-language model learns the task of `rankfold demo instruct` (which of two boxes a thing goes into, a rule that it never
saw), with the demo's settings but for rank, learning rate and number of steps. 60 steps, where the demo takes 150: there all ways would
be right about everything. What is learned comes all at once, after a stretch of guessing (0.69 nats, half of the answers right), so what
differs between ways, and between seeds of one way, is mostly when that is. A third of the way all still guess: the first measurement is
therefore taken at two thirds.

    LoRA                     PEFT's
    LoRA, one rank more      has more numbers than any MoSLoRA here
    MoSLoRA, orthogonal      a learned mixer that starts orthogonal
    MoSLoRA, kaiming         a learned mixer that starts at U(+-1/sqrt(r))
    MoSLoRA, frozen          an orthogonal mixer that is not trained

alpha is the rank, so that every way's own factor is 1. Each way's learning rate is chosen for each rank by the loss on three data seeds
that are not tested on, from three values, and on from there while the best is at an edge. A seed is new images to learn from and to be
asked about, another start and another order; all ways take the same rows in the same order, and the frozen mixer starts as the learned
orthogonal one does. Seeds of one way differ so much that three of them choose a rate badly. Where two ways were given different rates,
the second is therefore also tested at the rate of the first: what does not hold at both is the rates' doing.

loss        cross-entropy of an answer to 200 held-out images, in nats, its end token counted
accuracy    share of them that is answered exactly, greedily
time        of a step over LoRA's, the ways taking turns: median and quartiles of the rounds, in seconds of the processor, so that
            waiting for other work of the machine does not count; LoRA is PEFT's code and MoSLoRA ours, so it is not the mixer's alone

Differences are taken seed by seed. Intervals: bootstrap over seeds. A way is called better or worse where the interval excludes zero and
the signs agree with it (sign test, p < 0.05); undecided where only the interval does. Nothing is widened for the number of comparisons.

Resumable: every training leaves one file in the work folder, and what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from quiet import silence_libraries
from timing import load_or_make

from rankfold import InstructConfig
from rankfold.toolkit.core.files import write_text
from rankfold.toolkit.core.run_folder import Run
from rankfold.toolkit.metrics.statistics import bootstrap_interval, mcnemar_p
from rankfold.training.config.defaults import resolve_defaults
from rankfold.training.embedded.demo_instruct import SETTINGS, write_demo_data
from rankfold.training.engine.loop import Loop
from rankfold.training.engine.processes import make_accelerator
from rankfold.training.evaluation.instruct import ask_items
from rankfold.training.evaluation.items import read_items
from rankfold.training.instruct.conversations import PlannedRows, load_images, plan_rows
from rankfold.training.instruct.prepare import prepare_instruct
from rankfold.training.instruct.task import InstructTask

LORA, MORE = "LoRA", "LoRA, one rank more"
LEARNED, KAIMING, FROZEN = "MoSLoRA, orthogonal", "MoSLoRA, kaiming", "MoSLoRA, frozen"
WAYS: dict[str, tuple[str, dict[str, str]]] = {
    LORA: ("lora", {}),
    MORE: ("lora", {}),
    LEARNED: ("moslora", {"mixer_init": "orthogonal"}),
    KAIMING: ("moslora", {"mixer_init": "kaiming"}),
    FROZEN: ("moslora", {"mixer_init": "orthogonal", "mixer": "frozen"}),
}
PAIRS = (*((way, LORA) for way in WAYS if way != LORA), (LEARNED, FROZEN))
RANKS = (2, 8)
STEPS, MARKS = 60, (40, 60)
RATES, STEP_OUT = (1e-2, 2e-2, 4e-2), 2
TUNED_ON = (100, 101, 102)
FIGURES = {"loss": -1, "accuracy": 1}  # and the sign of what is better
TOGETHER = 50  # held-out rows in one forward pass
QUIET = {"log_every": 10**6, "checkpoint_every": 10**6}


@dataclass(frozen=True)
class Cell:
    """One training."""

    way: str
    rank: int
    rate: float
    seed: int

    @property
    def is_tested(self) -> bool:
        """Whether it is measured in full: what rates are chosen by is only the loss at the end."""
        return self.seed not in TUNED_ON

    def file(self, work: Path) -> Path:
        name = f"{self.way}-{self.rank}-{self.rate:g}-{STEPS}-{self.seed}".replace(", ", "_").replace(" ", "_")
        return work / "cells" / f"{name}.json"

    def config(self, work: Path) -> InstructConfig:
        """The demo's training, with this way."""
        adapter, options = WAYS[self.way]
        rank = self.rank + (self.way == MORE)
        own = {"adapter": adapter, "adapter_options": options, "rank": rank, "alpha": float(rank), "seed": self.seed}
        own |= {"learning_rate": self.rate, "steps": STEPS, "data": data_of(self.seed, work) / "train.json"}
        return InstructConfig(out=work / "running" / self.file(work).stem, **(SETTINGS | QUIET | own))


# ---------------------------------------------------------------------------------------------- one training


def data_of(seed: int, work: Path) -> Path:
    """Folder of a seed's images and questions."""
    folder = work / f"data{seed}"
    if not (folder / "test.json").is_file():
        write_demo_data(folder, seed=seed, old=0)
    return folder


def prepare_loop(config: InstructConfig) -> tuple[InstructTask, Loop]:
    """Task and loop, ready for the first step."""
    shutil.rmtree(config.out, ignore_errors=True)
    config, inputs = prepare_instruct(resolve_defaults(config))
    accelerator = make_accelerator(config)
    task = InstructTask(config, *inputs, accelerator)
    run = Run(config.out)
    run.folder.mkdir(parents=True)
    run.claim()
    return task, Loop(config, task, run, accelerator)


@torch.no_grad()
def held_out_loss(task: InstructTask, held_out: PlannedRows) -> float:
    """Cross-entropy of an answer, its tokens summed."""
    total, weight = 0.0, torch.ones(())
    for start in range(0, len(held_out), TOGETHER):
        rows = held_out.rows[start : start + TOGETHER]
        batch = task.training.vision.to_device(
            task.training.vision.chat.collate(rows, [load_images(row) for row in rows])
        )
        total += float(task.module(batch | {"weight": weight}).double().sum())
    return total / len(held_out)


def run_cell(cell: Cell, work: Path) -> dict[str, Any]:
    """Trains, measures and writes the figures down; only reads them where that has been done."""
    file = cell.file(work)
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    begin, test = time.process_time(), data_of(cell.seed, work) / "test.json"
    task, loop = prepare_loop(cell.config(work))
    held_out, items = plan_rows(test, task.config, task.training.vision.chat), read_items(test, None)
    found: dict[str, dict[str, float]] = {}

    def measure(step: int) -> None:
        if step not in (MARKS if cell.is_tested else MARKS[-1:]):
            return
        task.module.eval()
        found[str(step)] = {"loss": held_out_loss(task, held_out)}
        if cell.is_tested:
            said = ask_items(task.training.vision, items, max_new_tokens=4, likelihood=False)
            found[str(step)]["accuracy"] = statistics.fmean(said.scores)
        task.module.train()

    loop.train(measure)
    facts = asdict(cell) | {"parameters": sum(p.numel() for p in loop.parameters), "figures": found}
    facts["seconds"] = time.process_time() - begin
    write_text(file, json.dumps(facts, indent=1))
    shutil.rmtree(task.config.out)
    print(file.stem, {step: {k: round(v, 3) for k, v in own.items()} for step, own in found.items()}, flush=True)
    return facts


# ---------------------------------------------------------------------------------------------- rates and cost


def tried_rates(way: str, rank: int, work: Path) -> dict[float, list[float]]:
    """Learning rate -> loss at the end on every data seed that rates are chosen on; the best rate is inside."""
    tried: dict[float, list[float]] = {}
    wanted = set(RATES)
    while wanted:
        for rate in sorted(wanted):
            cells = [run_cell(Cell(way, rank, rate, seed), work) for seed in TUNED_ON]
            tried[rate] = [cell["figures"][str(STEPS)]["loss"] for cell in cells]
        best = best_rate(tried)
        wanted = {best / STEP_OUT} if best == min(tried) else {best * STEP_OUT} if best == max(tried) else set()
    return dict(sorted(tried.items()))


def best_rate(tried: dict[float, list[float]]) -> float:
    """The rate with the least mean loss."""
    return min(tried, key=lambda rate: statistics.fmean(tried[rate]))


def step_times(rank: int, rounds: int, work: Path) -> dict[str, dict[str, Any]]:
    """Time of a step of each way over LoRA's, in alternation."""
    loops = {way: prepare_loop(Cell(way, rank, RATES[0], TUNED_ON[0]).config(work))[1] for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 3):
        for way in list(WAYS)[:: 1 if number % 2 else -1]:
            start = time.process_time()
            loops[way].train_step()
            if number >= 3:  # the first steps allocate
                times[way].append(time.process_time() - start)
    found = {}
    for way, own in times.items():
        ratios = [a / b for a, b in zip(own, times[LORA], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        found[way] = {"time": statistics.median(ratios), "time_quartiles": (low, high)}
    return found


# ---------------------------------------------------------------------------------------------- what was found


def test_rows(chosen: dict[tuple[str, int], float], seeds: int, work: Path) -> tuple[list[dict], list[dict]]:
    """A row for each way at each rank and rate, and the differences of the pairs."""
    rows: dict[tuple[str, int, float], dict[str, Any]] = {}

    def row(way: str, rank: int, rate: float) -> dict[str, Any]:
        if (way, rank, rate) not in rows:
            cells = [run_cell(Cell(way, rank, rate, seed), work) for seed in range(seeds)]
            rows[way, rank, rate] = result_row(way, rank, cells) | {"chosen_rate": rate == chosen[way, rank]}
        return rows[way, rank, rate]

    for (way, rank), rate in chosen.items():
        row(way, rank, rate)
    differences = []
    for rank in RANKS:
        for way, reference in PAIRS:
            own = chosen[way, rank]
            for rate in dict.fromkeys((chosen[reference, rank], own)):
                differences.append(paired_differences(row(way, rank, own), row(reference, rank, rate)))
    return list(rows.values()), differences


def result_row(way: str, rank: int, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One way at one rank: its figures over the seeds, after each mark."""
    row = {"way": way, "rank": rank, "learning_rate": cells[0]["rate"], "parameters": cells[0]["parameters"]}
    for mark in MARKS:
        for figure in FIGURES:
            values = [cell["figures"][str(mark)][figure] for cell in cells]
            own = {"mean": statistics.fmean(values), "interval": bootstrap_interval(torch.tensor(values), draws=20_000)}
            row[f"{figure}_{mark}"] = own | {"by_seed": values}
    return row


def paired_differences(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Paired differences of one way from another at the same rank."""
    found = {"way": row["way"], "reference": reference["way"], "rank": row["rank"]}
    found |= {"learning_rate": row["learning_rate"], "reference_learning_rate": reference["learning_rate"]}
    for mark in MARKS:
        for figure, sign in FIGURES.items():
            pairs = zip(row[f"{figure}_{mark}"]["by_seed"], reference[f"{figure}_{mark}"]["by_seed"], strict=True)
            found[f"{figure}_{mark}"] = compare([a - b for a, b in pairs], sign)
    return found


def compare(differences: Sequence[float], sign: int) -> dict[str, Any]:
    """Mean, interval, sign test and what they come to. sign: 1 where more is better, -1 where less is."""
    low, high = bootstrap_interval(torch.tensor(differences), draws=20_000)
    better, worse = (sum(d * way > 0 for d in differences) for way in (sign, -sign))
    p, apart = mcnemar_p(better, worse), low > 0 or high < 0
    word = "better" if low * sign > 0 and high * sign > 0 else "worse"
    return {
        "mean": statistics.fmean(differences),
        "interval": (low, high),
        "better": better,
        "worse": worse,
        "sign_p": p,
        "verdict": "no difference" if not apart else word if p < 0.05 else "undecided",
    }


def format_interval(value: dict[str, Any], places: int = 3) -> str:
    """A mean with its interval."""
    low, high = value["interval"]
    return f"{value['mean']:.{places}f} ({low:.{places}f} to {high:.{places}f})"


def report(rows: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]]) -> None:
    """Prints what each way came to, and the differences."""
    columns = [f"{figure}_{mark}" for mark in MARKS for figure in FIGURES]
    for row in rows:
        low, high = row["time_quartiles"]
        print(
            f"\n{row['way']}, rank {row['rank']}: {row['parameters']:,} numbers, rate {row['learning_rate']:g}, ",
            end="",
        )
        print(f"time {row['time']:.2f} ({low:.2f} to {high:.2f})")
        print("   " + "   ".join(f"{column} {format_interval(row[column])}" for column in columns))
    for one in differences:
        rate, other = one["learning_rate"], one["reference_learning_rate"]
        print(f"\n{one['way']} (rate {rate:g}) less {one['reference']} (rate {other:g}), rank {one['rank']}")
        for column in columns:
            own = one[column]
            count = f"better on {own['better']}, worse on {own['worse']}, p {own['sign_p']:.3f}"
            print(f"   {column:12} {format_interval(own):28} {count}: {own['verdict']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--work", type=Path, default=Path("runs/mixer"))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(options.threads)
    rates, chosen, times = [], {}, {}
    for rank in RANKS:
        file = options.work / f"times{rank}.json"
        times[rank] = load_or_make(file, lambda r=rank: step_times(r, options.rounds, options.work))
        for way in WAYS:
            tried = tried_rates(way, rank, options.work)
            rates += [{"way": way, "rank": rank, "learning_rate": r, "loss_by_seed": own} for r, own in tried.items()]
            chosen[way, rank] = best_rate(tried)
    rows, differences = test_rows(chosen, options.seeds, options.work)
    for row in rows:
        row |= times[row["rank"]][row["way"]]
    report(rows, differences)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {"steps": STEPS, "seeds": options.seeds, "tuned_on": TUNED_ON}
        found = {"settings": settings, "rows": rows, "differences": differences, "rates": rates}
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
