"""What the Watch page shows of a run, read from its folder: drawn once for all who look, at most once a second."""

from __future__ import annotations

import html
import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ....toolkit.core.errors import UserError
from ....toolkit.core.records import parse_record
from ....toolkit.core.run_folder import LIVE_STATES, Run
from ....toolkit.diffusion.base_files import short_base
from ....training.config.base import LoopConfig
from ....training.config.compose import ComposeConfig, ComposeInstructConfig
from ....training.config.images import DiffusionConfig
from ....training.config.instruct import ConversationConfig
from ....training.config.subject import SubjectConfig
from ....training.config.yaml_file import from_yaml
from ....training.launch.queue import OUTPUT_FILE, queued_runs
from .curves import Curve, draw_curves, smooth
from .messages import format_duration, message_html, redact_secrets

MAX_AGE_SECONDS = 1.0  # seconds for which a view serves everybody
MAX_VIEWS = 32  # runs whose views are kept
LOG_LINES = 200
PREVIEWS = 60  # the newest


@dataclass(frozen=True)
class View:
    """A run as it is shown."""

    state: str
    status_html: str
    """The state in a line, how far it is, and why it failed, as HTML."""
    curves_html: str
    previews: tuple[tuple[str, str], ...]
    """Files with their captions."""
    log: str
    charts: dict[str, dict[str, Curve]] = field(default_factory=dict)
    """Curves by chart and name, for who looks closer."""

    @property
    def parts(self) -> tuple[str, str, tuple[tuple[str, str], ...], str, str]:
        """What is sent to a page, each only where it has changed."""
        return self.status_html, self.curves_html, self.previews, self.log, self.state


class MetricsFollower:
    """What the page needs of a metrics.jsonl that grows; each line is read once."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.reset(0)

    def reset(self, inode: int) -> None:
        """Nothing is read yet of the file with this number."""
        self.inode, self.read = inode, 0
        self.steps: list[float] = []
        self.losses: list[float] = []
        self.last: dict[str, Any] = {}  # the last row with a loss
        self.measured: list[dict[str, Any]] = []

    def follow(self) -> None:
        """Reads what is new; all of it when another file has taken the place, as when a run is resumed."""
        if not self.file.is_file():
            self.reset(0)
            return
        facts = self.file.stat()
        if facts.st_ino != self.inode or facts.st_size < self.read:
            self.reset(facts.st_ino)
        with self.file.open("rb") as opened:
            opened.seek(self.read)
            block = opened.read()
        whole = block[: block.rfind(b"\n") + 1]  # a line may be half written
        self.read += len(whole)
        for line in whole.splitlines():
            self.parse_line(line)

    def parse_line(self, line: bytes) -> None:
        """One line; what is no row of ours is passed over."""
        row = parse_record(line)
        if row is None or not isinstance(row.get("step"), int | float):
            return
        if isinstance(row.get("loss"), int | float):
            self.steps.append(row["step"])
            self.losses.append(row["loss"])
            self.last = row
        if "likeness" in row and "prompt_fidelity" in row:
            self.measured.append(row)


class Views:
    """Views of runs, shared by all who look."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.followers: dict[Path, MetricsFollower] = {}
        self.views: dict[Path, tuple[float, View]] = {}

    def view(self, run: Run) -> View:
        """The run as it was a second ago at most; a new state is seen at once."""
        with self.lock:
            at, view = self.views.get(run.folder, (-MAX_AGE_SECONDS, None))
            if view is None or time.monotonic() - at >= MAX_AGE_SECONDS or run.state() != view.state:
                rows = self.followers.setdefault(run.folder, MetricsFollower(run.metrics_file))
                rows.follow()
                view = build_view(run, rows)
                self.views[run.folder] = (time.monotonic(), view)
                self.evict()
            return view

    def evict(self) -> None:
        """Lets go of the views that were drawn longest ago."""
        for folder in sorted(self.views, key=lambda folder: self.views[folder][0])[:-MAX_VIEWS]:
            del self.views[folder], self.followers[folder]


def build_view(run: Run, rows: MetricsFollower) -> View:
    """A run, drawn."""
    state = run.state()
    charts = run_charts(rows)
    shown = status_html(run, state, rows), curves_html(charts), newest_previews(run), log_text(run, state)
    return View(state, *shown, charts)


def status_html(run: Run, state: str, rows: MetricsFollower) -> str:
    """The state in a line, how far it is, and why it failed."""
    status = run.status()
    step, total = max(status.get("step", 0), rows.last.get("step", 0)), status.get("total", 0)
    facts = [f"step {step} of {total}"] if total else []
    if rows.last and state in LIVE_STATES:
        facts += speed_facts(run, rows, total - step)
    if state == "queued":
        place = [one.folder.name for one in queued_runs(run.folder.parent)]
        if run.folder.name in place:
            facts.append(f"number {place.index(run.folder.name) + 1} in the queue")
    name = html.escape(run.folder.name)
    text = f"<h2>{name}</h2>" + '<div class="state" role="status"><b>' + html.escape(state or "unknown") + "</b>"
    text += "".join(f"<span>{html.escape(fact)}</span>" for fact in facts)
    text += f'</div><progress max="{total or 1}" value="{step}" aria-label="steps done"></progress>'
    if state == "lost":
        text += message_html(
            "Its process stopped unexpectedly (killed, or out of memory). Resume goes on from its last checkpoint.",
            "fault",
        )
    if state == "failed":
        text += message_html(redact_secrets(str(status.get("error") or "It failed.")), "fault")
    text += exports_html(status)
    config = read_config(run)
    return text + message_html(what_it_is(config)) + links_html(run.folder.name, state, config)


def exports_html(status: dict[str, Any]) -> str:
    """The files for other tools that a run has written when it was done, and those that it could not."""
    made, faults = status.get("exports"), status.get("export_faults")
    text = message_html("Exported: " + ", ".join(map(str, made.values()))) if made and isinstance(made, dict) else ""
    said = faults if isinstance(faults, list) else []
    return text + "".join(message_html(redact_secrets(str(fault)), "fault") for fault in said)


def what_it_is(config: LoopConfig) -> str:
    """What a run learns or is made of, in a line."""
    if isinstance(config, ComposeConfig | ComposeInstructConfig):
        names = [Path(one).name if Path(one).name != "adapter" else Path(one).parent.name for one in config.adapters]
        weights = config.weights or ()
        parts = [f"{name} ({weight:g})" for name, weight in zip(names, weights, strict=True)] if weights else names
        how = (
            "fixed weights"
            if weights
            else "weights learned from images"
            if config.images is not None
            else "equal weights"
        )
        return f"Composed of {', '.join(parts)}, {how}."
    if isinstance(config, SubjectConfig):
        return f'Trained as "a {config.token} {config.class_noun}" on {short_base(config.base)}, {config.adapter} of rank {config.rank}.'
    if isinstance(config, ConversationConfig):
        return f"A task for {short_base(config.base)}, from {config.data.name if config.data else 'no data'}."
    return ""


def links_html(name: str, state: str, config: LoopConfig) -> str:
    """Where one goes from here."""
    target = quote(name)
    links = []
    if state == "done" and isinstance(config, DiffusionConfig):
        links += [f'<a class="go" href="/generate?adapter={target}">Generate with this adapter</a>']
        links += [f'<a href="/library?adapter={target}">Export or keep it</a>']
    if state == "done" and isinstance(config, ConversationConfig):
        links.append(f'<a class="go" href="/chat?adapter={target}">Chat with this adapter</a>')
    if isinstance(config, SubjectConfig):
        links.append(f'<a href="/train?clone={target}">Train again with these settings</a>')
    return f'<p class="links">{"".join(links)}</p>' if links else ""


def speed_facts(run: Run, rows: MetricsFollower, steps_left: int) -> list[str]:
    """How fast a run is, what it holds, and how long it will take."""
    config = read_config(run)
    speed = rows.last.get("samples_per_second", rows.last.get("images_per_second", 0))  # the latter in older runs
    per_step = config.batch_size * config.gradient_accumulation
    facts = [f"{speed:.1f} {config.samples}/s"]
    if "memory_gib" in rows.last:
        facts.append(f"{rows.last['memory_gib']:.2f} GiB")
    if len(rows.losses) > 1 and speed:
        facts.append(f"about {format_duration(steps_left * per_step / speed)} left")
    return facts


def read_config(run: Run) -> LoopConfig:
    """A run's config, or one of batches of one sample where it cannot be read."""
    try:
        return from_yaml(run.config_file)
    except UserError:
        return LoopConfig(batch_size=1)


def run_charts(rows: MetricsFollower) -> dict[str, dict[str, Curve]]:
    """The loss, raw and smoothed, and what was measured: curves by chart and name."""
    x, y = rows.steps, rows.losses
    charts: dict[str, dict[str, Curve]] = {"Loss": {"raw": (x, y), "smoothed": (x, smooth(y))}}
    if not rows.measured:
        return charts
    steps = [row["step"] for row in rows.measured]
    likeness: dict[str, Curve] = {"likeness": (steps, [row["likeness"] for row in rows.measured])}
    real = rows.measured[-1].get("likeness_real")
    if real is not None and len(steps) > 1:
        likeness["real photos"] = (steps, [real] * len(steps))
    charts["Likeness to held-out photos (CLIP-I)"] = likeness
    charts["Prompt fidelity (CLIP-T)"] = {"fidelity": (steps, [row["prompt_fidelity"] for row in rows.measured])}
    names = (("held out", "validation_loss"), ("trained on", "training_loss"), ("class", "class_loss"))
    charts["Loss at fixed noise"] = {
        label: (steps, [row[name] for row in rows.measured])
        for label, name in names
        if all(name in row for row in rows.measured)
    }
    return charts


def curves_html(charts: dict[str, dict[str, Curve]]) -> str:
    """The charts as small images."""
    text = "".join(draw_curves(title, curves, faint=("raw",)) for title, curves in charts.items())
    return f'<div class="curves">{text}</div>' if text else message_html("No step has been logged yet.")


def newest_previews(run: Run) -> tuple[tuple[str, str], ...]:
    """The newest previews, the newest step first."""
    files = run.samples.glob("[0-9]*_*.png") if run.samples.is_dir() else []
    steps = {file: int(file.name.split("_")[0]) for file in files if file.name.split("_")[0].isdecimal()}
    newest = sorted(steps, key=lambda file: (-steps[file], file.name))[:PREVIEWS]
    return tuple((str(file), f"step {steps[file]}") for file in newest)


def log_text(run: Run, state: str) -> str:
    """The log, the newest line first; after a failure also what the process printed, and what a model answered."""
    parts = []
    if state in ("failed", "lost"):
        parts += tail(run.folder / OUTPUT_FILE, 40)
    answers = sorted(run.samples.glob("[0-9]*_*.json"))[-4:] if run.samples.is_dir() else []
    for file in reversed(answers):
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue
        parts.append(f"{file.stem}: {json.dumps(said, ensure_ascii=False)}")
    return redact_secrets("\n".join(parts + tail(run.log_file, LOG_LINES)))


def tail(file: Path, lines: int) -> list[str]:
    """The last lines of a file, the last one first."""
    if not file.is_file():
        return []
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - 64 * 1024))
        return opened.read().decode(errors="replace").splitlines()[-lines:][::-1]
