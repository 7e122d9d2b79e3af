"""The training loop: one for every method.

A method is a Task (task.py): it supplies data, a module whose forward is the loss, and previews. The loop does the rest: steps,
accumulation, clipping, averaging, logging, previews, checkpoints, exact resume, stopping.

All randomness is a function of (seed, step, sample), so a checkpoint holds no random state and a run that was killed and
resumed ends equal to the bit to one that never stopped.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from ...toolkit.core import devices
from ...toolkit.core.errors import UserError, one_line_message
from ...toolkit.core.files import write_png, write_text
from ...toolkit.core.out_of_memory import oom_context
from ...toolkit.core.randomness import mix_seed
from ...toolkit.core.run_folder import Run
from ...toolkit.core.setting_names import current_names
from ..config.base import LoopConfig
from .block_swap import find_block_swap
from .checkpoint import newest_checkpoint, write_checkpoint
from .cpu_threads import ThreadController
from .optimizer import make_optimizer
from .processes import StopSignal
from .progress import Progress, peak_memory_gib
from .task import Task

HEARTBEAT_SECONDS = 5.0  # seconds between signs of life in status.json
REQUEST_SECONDS = 0.2  # seconds between looks for requests
NOT_IN_STATE = (
    "out",
    "steps",
    "keep_checkpoints",
    "checkpoint_every",
    "preview_every",
    "log_every",
    "export",
    "tracker",
    "threads",
    "workers",
    "shard_base",
    "blocks_to_swap",
)


class Loop:
    """One run of one task."""

    def __init__(self, config: LoopConfig, task: Task, run: Run, accelerator: Accelerator, data: str = "") -> None:
        """data: a hash of what is trained on, for the checkpoints to say."""
        self.config, self.task, self.run, self.accelerator, self.data = config, task, run, accelerator, data
        optimizer = make_optimizer(config, task.parameter_groups())
        if hasattr(optimizer, "train"):
            optimizer.train()  # schedule-free ones ask for it
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.schedule = make_schedule(config, optimizer)
        placed = find_block_swap(task.module) is not None  # and what waits in main memory has to stay there
        self.module, self.optimizer = accelerator.prepare(
            task.module, optimizer, device_placement=[not placed and accelerator.device_placement, True]
        )
        self.average = EMAModel(self.parameters, decay=config.ema_decay) if config.ema_decay else None
        self.step = 0
        self.window = torch.zeros((), device=accelerator.device)  # losses since the last log line, summed on the device
        self.window_steps = 0
        self.progress = Progress(config, enabled=accelerator.is_main_process)
        self.last_heartbeat = self.last_poll = self.logged_at = 0.0  # moments, of time.time or time.perf_counter
        self.logged_step = 0
        self.stop_wanted = self.preview_wanted = False
        """Asked for, and not agreed on by all processes yet."""
        self.finished_early = False
        """Whether the method wants no more steps."""

    # -------------------------------------------------------------------------- training

    def train(self, after_step: Callable[[int], None] | None = None) -> str:
        """Runs to the end or until asked to stop; returns 'done' or 'stopped'.

        Raises:
            UserError: when the loss is not finite, the adapter stays dead, or a checkpoint cannot be written.
        """
        if self.config.tracker != "none":
            self.accelerator.init_trackers("rankfold", config={k: str(v) for k, v in asdict(self.config).items()})
        self.progress.begin(self.step)
        self.logged_step, self.logged_at = self.step, time.perf_counter()
        pace = ThreadController()
        with StopSignal() as stop, self.progress:
            # what was due after the checkpoint's step may have been lost with the process
            finished = self.step > 0 and self.check_finished()
            while not finished and self.step < self.config.steps:
                began = time.perf_counter()
                with oom_context(f"training step {self.step + 1}"):
                    self.train_step()
                self.reduce_threads(pace.update(time.perf_counter() - began))
                wanted = self.poll_requests()
                self.stop_wanted = self.stop_wanted or stop.requested or "stop" in wanted
                stopping = self.agree(self.stop_wanted)
                self.run_housekeeping(wanted, stopping)
                if after_step:
                    after_step(self.step)
                if stopping and self.step < self.config.steps:
                    return "stopped"
                if self.check_finished():
                    break
        self.finish()
        return "done"

    def train_step(self) -> None:
        """One optimizer step over the global batch, this process doing its share of the rows."""
        config, accelerator = self.config, self.accelerator
        self.seed_dropout()
        share = config.batch_size // accelerator.num_processes
        slots = list(range(accelerator.process_index * share, (accelerator.process_index + 1) * share))
        for part in range(config.gradient_accumulation):
            last = part == config.gradient_accumulation - 1
            position = (self.step * config.gradient_accumulation + part) * config.batch_size
            batch = self.task.batch(position, slots)
            with nullcontext() if last else accelerator.no_sync(self.module):
                self.window += self.backward(batch)
        if config.max_grad_norm:
            self.clip_gradients()
        self.optimizer.step()
        self.schedule.step()
        for parameter in self.parameters:
            parameter.grad = None
        if self.average:
            self.average.step(self.parameters)
        self.step += 1
        self.window_steps += 1

    def backward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Adds the gradients of one forward pass to the parameters' own; returns its loss, a scalar."""
        with self.accelerator.autocast():
            loss = self.module(batch).mean() / self.config.gradient_accumulation
        self.accelerator.backward(loss)
        return loss.detach()

    def reduce_threads(self, threads: int) -> None:
        """Goes on with fewer threads, 0 for as many as now, unless the config says how many."""
        alone = self.accelerator.device.type == "cpu" and self.accelerator.num_processes == 1
        if not threads or self.config.threads or not alone:
            return
        torch.set_num_threads(threads)
        self.run.set_status(threads=threads)
        text = f"Another program keeps a core busy: training goes on with {threads} of {devices.THREADS} threads"
        self.run.append_log(text)
        self.progress.say(f"{text}, whose sums differ in the last bit; --threads {devices.THREADS} holds it to all.")

    def seed_dropout(self) -> None:
        """Makes what the forward pass draws a function of (seed, step, process)."""
        seed = mix_seed(self.config.seed, 5, self.step, self.accelerator.process_index)
        devices.seed_generators(self.accelerator.device, seed)

    def clip_gradients(self) -> None:
        """Scales the gradients down to max_grad_norm. One norm over all of them: adapters are many small tensors."""
        if self.accelerator.scaler:
            self.accelerator.unscale_gradients(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        torch._foreach_mul_(gradients, (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))

    def poll_requests(self) -> set[str]:
        """What has been asked of the run since the last look."""
        if not self.accelerator.is_main_process or time.perf_counter() - self.last_poll < REQUEST_SECONDS:
            return set()
        self.last_poll = time.perf_counter()
        return self.run.take_requests()

    def check_finished(self) -> bool:
        """Whether the method wants no more steps. A failure there loses no step: they are all in a checkpoint first."""
        try:
            with oom_context(f"measuring after step {self.step}"):
                self.finished_early |= self.task.after_step(self.run, self.step, self.with_average)
        except Exception:
            self.save_checkpoint()
            raise
        return self.agree(self.finished_early)

    def agree(self, wish: bool) -> bool:
        """True when any process wishes it; all processes get the same answer.

        Several processes ask each other only when they log, since the answer makes the host wait for the device.
        """
        if self.accelerator.num_processes == 1:
            return wish
        if self.step % self.config.log_every:
            return False
        flag = torch.tensor(float(wish), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item() > 0)

    def run_housekeeping(self, wanted: set[str], stopping: bool) -> None:
        """What is due after a step: log line, dead check, checkpoint, preview, sign of life."""
        config, ends = self.config, self.step == self.config.steps
        if self.step % config.log_every == 0 or ends or stopping:
            self.log()
        if self.step == config.lr_warmup_steps + 20 and self.task.is_dead():
            raise UserError(
                f"After {self.step} steps the adapter still has no effect (its up matrices are zero)."
                " Raise --learning-rate, or check --precision and --target-modules."
            )
        if self.step % config.checkpoint_every == 0 or stopping or ends or "save" in wanted:
            self.save_checkpoint()  # before anything that can be done without
        due = config.preview_every and (self.step % config.preview_every == 0 or ends)
        self.preview_wanted |= "sample" in wanted
        if due or self.agree(self.preview_wanted):
            self.preview_wanted = False
            self.try_preview()
        if self.accelerator.is_main_process and time.time() - self.last_heartbeat > HEARTBEAT_SECONDS:
            self.last_heartbeat = time.time()
            self.run.set_status(state="running", step=self.step, total=config.steps)

    def log(self) -> None:
        """Reads the summed loss off the device: the only moment the device is waited for.

        Raises:
            UserError: when the loss is not finite.
        """
        if not self.window_steps:
            return
        loss = self.accelerator.reduce(self.window, "mean").item() / self.window_steps
        if not math.isfinite(loss):
            raise UserError(
                f"The loss is not finite ({loss}) around step {self.step}. Start over with a lower --learning-rate or with "
                f"--precision fp32, and with --overwrite; the last checkpoint is whole: {self.latest_name()}."
            )
        self.window.zero_()
        self.window_steps = 0
        now = time.perf_counter()
        samples = (self.step - self.logged_step) * self.config.batch_size * self.config.gradient_accumulation
        speed = samples / max(now - self.logged_at, 1e-9)
        self.logged_at, self.logged_step = now, self.step
        if self.accelerator.is_main_process:
            rate = self.schedule.get_last_lr()[0]
            memory = round(peak_memory_gib(), 3)
            self.run.append_metrics(
                step=self.step, loss=loss, learning_rate=rate, samples_per_second=round(speed, 3), memory_gib=memory
            )
            self.run.append_log(self.progress.update(self.step, loss, speed))
        if self.config.tracker != "none":
            self.accelerator.log({"loss": loss, "samples_per_second": speed}, step=self.step)

    def try_preview(self) -> None:
        """Writes the previews of this step; where that fails, it is said and the run goes on."""
        try:
            with oom_context("previewing"):
                self.preview()
        except Exception as error:
            self.run.append_log(traceback.format_exc())
            self.progress.say(f"The preview of step {self.step} failed, training goes on: {one_line_message(error)}")

    def preview(self) -> None:
        """Writes the previews of this step; randomness and averaged weights are put back afterwards."""
        made = self.with_average(self.task.preview)
        for number, shown in enumerate(made if self.accelerator.is_main_process else ()):
            name = f"{self.step:06d}_{number:02d}"
            if isinstance(shown, str):
                write_text(self.run.samples / f"{name}.json", shown)
            else:
                write_png(self.run.samples / f"{name}.png", shown)

    def with_average(self, action: Callable[[], Any]) -> Any:
        """Runs the action with the averaged weights in place, when there are any: ours, or those of a schedule-free optimizer."""
        if self.average is None:
            return self.with_optimizer_average(action)
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            return action()
        finally:
            self.average.restore(self.parameters)

    def with_optimizer_average(self, action: Callable[[], Any]) -> Any:
        """Runs the action with the weights that a schedule-free optimizer means, which are not those it takes gradients at."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if not hasattr(optimizer, "eval"):
            return action()
        optimizer.eval()
        try:
            return action()
        finally:
            optimizer.train()

    def finish(self) -> None:
        """Writes the adapter."""
        if self.accelerator.is_main_process:
            self.with_average(lambda: self.task.save_adapter(self.run.adapter))
        if self.config.tracker != "none":
            self.accelerator.end_training()

    # -------------------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """Everything that a run needs to resume bit-exactly."""
        return {
            "config": comparable_config(self.config),
            "data": self.data,
            "step": self.step,
            "parameters": [p.detach().cpu() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "average": self.average.state_dict() if self.average else None,
            "window": self.window.cpu(),
            "window_steps": self.window_steps,
        }

    def save_checkpoint(self) -> None:
        """Writes a checkpoint whole or not at all, then drops the oldest."""
        if self.window_steps and not math.isfinite(self.window.item()):
            self.log()
        if self.accelerator.is_main_process:
            path = self.run.checkpoints / f"{self.step:06d}.pt"
            with oom_context(f"writing the checkpoint of step {self.step}"):
                write_checkpoint(path, self.state())
            self.run.prune_checkpoints(self.config.keep_checkpoints)

    def latest_name(self) -> str:
        """Name of the newest checkpoint."""
        files = self.run.checkpoint_files()
        return files[-1].name if files else "none yet"

    def resume(self) -> None:
        """Goes back to the newest checkpoint, or to step 0 when there is none.

        Raises:
            UserError: when the checkpoint is of another config.
        """
        if (found := newest_checkpoint(self.run.checkpoint_files())) is not None:
            path, state, damaged = found
            check_same_config(state["config"], comparable_config(self.config), path)
            self.step = state["step"]
            for text in damaged if self.accelerator.is_main_process else ():
                self.run.append_log(text)
                print(f"{text} Going on from {path.name}.")
            with torch.no_grad():
                for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                    parameter.copy_(saved)
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            if self.accelerator.scaler and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            if self.average and state["average"]:
                self.average.load_state_dict(state["average"])
                self.average.to(self.accelerator.device)
            self.window.copy_(state["window"])
            self.window_steps = state["window_steps"]
        if self.accelerator.is_main_process:
            self.run.truncate_metrics(self.step)


def make_schedule(config: LoopConfig, optimizer: torch.optim.Optimizer) -> Any:
    """The learning rate's schedule. diffusers' constant one would pass over the warm-up."""
    name = (
        "constant_with_warmup" if config.lr_scheduler == "constant" and config.lr_warmup_steps else config.lr_scheduler
    )
    return get_scheduler(name, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.steps)


def comparable_config(config: LoopConfig) -> dict[str, str]:
    """The fields that a checkpoint's weights depend on, as text."""
    return {key: str(value) for key, value in asdict(config).items() if key not in NOT_IN_STATE}


def check_same_config(saved: dict[str, str], wanted: dict[str, str], path: Path) -> None:
    """Raises UserError naming the fields that differ; those that are younger than the checkpoint are passed over."""
    saved = current_names(saved, wanted, str(path))
    other = [f"{key} was {saved[key]}, now it is {new}" for key, new in wanted.items() if saved.get(key, new) != new]
    if other:
        raise UserError(
            f"{path} was made with another config: {'; '.join(other)}. "
            "Put back in config.yaml what it was, or start a new run with another --out."
        )
