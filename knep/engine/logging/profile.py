"""`profile=true`: where the time of a training step goes, as a table and as a trace of some steps.

Lightning's profilers time the hooks of Lightning's own loop, which takes the place of the lean one under them; this one
times the loop that runs, by phase.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from knep.tasks.base import Batch
from knep.utils.text import shown_lines

PHASES: tuple[str, ...] = ("data", "forward", "backward", "clip", "optimizer", "logging")
_SKIPPED = 5  # first steps, in which memory is allocated and kernels are chosen
_TRACED = 20  # steps in the trace: enough to see a pattern, small enough to open


class StepProfile(Callback):
    """Sums the seconds between the events of a step, by phase; on a GPU it waits for the device at each event.

    forward includes augmentation, scaling and the loss; logging: schedules, averaging and all callbacks. Nothing is
    drawn or changed, so a profiled run ends with the weights of an ordinary one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "profile"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._steps = -_SKIPPED
        self._last = 0.0
        self._wait: Any = None
        self._tracer: Any = None
        self._traced = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.strategy.root_device.type == "cuda":
            self._wait = torch.cuda.synchronize
        clip = pl_module.configure_gradient_clipping

        def timed(*args: Any, **kwargs: Any) -> None:
            self._mark("optimizer")
            clip(*args, **kwargs)
            self._mark("clip")

        pl_module.configure_gradient_clipping = timed
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self._mark("optimizer"))

    def _mark(self, phase: str) -> None:
        """What has passed since the last event was spent on `phase`."""
        if self._wait is not None:
            self._wait()
        now = time.perf_counter()
        if self._last and self._steps >= 0:
            self._seconds[phase] += now - self._last
        self._last = now

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._mark("data")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self._mark("forward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("backward")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        self._mark("logging")
        self._steps += 1
        if self._steps == 0 and not self._traced and trainer.is_global_zero:
            self._traced = True
            self._tracer = torch.profiler.profile(activities=_activities(self._wait is not None))
            self._tracer.start()
            self._last = 0.0
        elif self._tracer is not None and self._steps == _TRACED:
            self._close_trace()
        if trainer.is_last_batch:
            self._last = 0.0  # validation is no part of a step

    def _close_trace(self) -> None:
        if self._tracer is not None:
            self._tracer.stop()
            self._folder.mkdir(exist_ok=True)
            self._tracer.export_chrome_trace(str(self._folder / "steps.pt.trace.json"))
            self._tracer, self._last = None, 0.0
            # The tracer's own cost weighs on the steps that it saw: the table begins behind them.
            self._seconds = dict.fromkeys(PHASES, 0.0)
            self._steps = 0

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close_trace()
        if trainer.is_global_zero and self._steps > 0:
            text = table(self._seconds, self._steps)
            self._folder.mkdir(exist_ok=True)
            (self._folder / "steps.txt").write_text(text + "\n", encoding="utf-8")
            print(shown_lines(text))


def table(seconds: Mapping[str, float], steps: int) -> str:
    """Milliseconds a step and share of the time, a line per phase and one for the whole."""
    total = sum(seconds.values())
    lines = [f"{'phase':10} {'ms a step':>10} {'share':>7}"]
    lines += [f"{name:10} {1e3 * s / steps:10.3f} {s / total:7.1%}" for name, s in seconds.items()]
    return "\n".join([*lines, f"{'all':10} {1e3 * total / steps:10.3f} {1:7.1%}"])


def _activities(on_gpu: bool) -> list[torch.profiler.ProfilerActivity]:
    kinds = torch.profiler.ProfilerActivity
    return [kinds.CPU, kinds.CUDA] if on_gpu else [kinds.CPU]
