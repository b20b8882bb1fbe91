"""`averaging`: which weights are validated, saved as best and tested. A callback `f(**hp)`; acts after each step.

Every callback here has `members`: how many independent models one run trains (1 for all but `Ensemble`).
"""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer, WeightAveraging
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from knep.errors import InputError
from knep.io.checkpoint import read, write
from knep.optim.own_loop import WARMUPS, ema_decay
from knep.optim.soup import greedy, mean_of
from knep.optim.statistics import through_own_steps
from knep.surgery.edit import cut
from knep.tasks.base import Batch
from knep.utils.batch_plan import length_of
from knep.utils.hardware import at_precision
from knep.utils.monitors import logged

__all__ = ["Ema", "Ensemble", "GreedySoup", "Soup", "Swa", "none"]


class _Single(Callback):
    members = 1


def average_in(callback: Callback) -> nn.Module | None:
    """The average that a callback keeps, of knep's or of another project's kind; None where it keeps none."""
    return callback._average_model if isinstance(callback, WeightAveraging) else None


def tell(trainer: Trainer, line: str) -> None:
    """One line to the user, above the progress bar where there is one."""
    if trainer.is_global_zero:
        getattr(trainer.progress_bar_callback, "line", print)(line)


def none() -> Callback:
    """The weights of the last step are used as they are."""
    return _Single()


def reestimate(trainer: Trainer, module: LightningModule, batches: int) -> None:
    """Batch-norm statistics from `batches` batches of training data (all for 0), as the mean over batches.

    Averaged weights never saw the activations that the running statistics describe (Izmailov et al. 2018, sec. 3.2).
    A module with `estimate_statistics(trainer, batches)` is asked for them; another one's own training step is taken.
    """
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        return
    own = getattr(module, "estimate_statistics", None)
    if own is not None:
        own(trainer, batches)
    else:
        through_own_steps(trainer, module, batches)


class WeightAverage(WeightAveraging):
    """Validates, saves and ends with the average once there is one; until then with the current weights.

    count: weights in the average that the module ends with, an early stop's return to its best epoch included.
    """

    members = 1
    count = 0
    deferred = False  # whether the copy is made by `begin`, after `setup`: of a module whose network is edited later
    _unit = ("step", "steps")
    _begins = "at its first step"

    def __init__(self, bn_batches: int, **kwargs: Any) -> None:
        if bn_batches < 0:
            raise ValueError(f"bn_batches must be 0 (all) or positive, got {bn_batches}")
        super().__init__(use_buffers=False, **kwargs)
        self._bn_batches = bn_batches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.deferred:
            self.begin(trainer, pl_module, stage)

    def begin(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copies the module, whose average this becomes."""
        if stage == "fit":  # of a callback that was in a fit before
            self._latest_update_step, self._latest_update_epoch, self.count = 0, -1, 0
        at_precision(trainer, pl_module)
        computed = cut(pl_module) if stage == "fit" else {}
        super().setup(trainer, copy.deepcopy(pl_module, computed) if computed else pl_module, stage)

    @property
    def started(self) -> bool:
        return self._latest_update_step > 0

    @property
    def said(self) -> str:
        """What was averaged, in words."""
        if not self.count:
            return f"nothing: the tested weights are older than the average, which begins {self._begins}"
        return f"{self.count} {self._unit[self.count > 1]}" + ("" if self.count > 1 else ", so nothing")

    def _swaps(self, trainer: Trainer) -> bool:
        """Within a fit; after it the module holds the weights that were chosen, which `validate` must not exchange."""
        return trainer.state.fn == "fit" and self._average_model is not None and self.started

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._swaps(trainer):
            self._swap_models(pl_module)
            reestimate(trainer, pl_module, self._bn_batches)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._swaps(trainer):
            self._swap_models(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.started:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if "averaging_state" in checkpoint and trainer.state.fn == "fit":  # else the average is what was loaded
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.started and self._average_model is not None:
            super().on_train_end(trainer, pl_module)
            reestimate(trainer, pl_module, self._bn_batches)
            self.count = int(self._average_model.n_averaged)

    def went_back(self, checkpoint: Mapping[str, Any]) -> None:
        """The module has got the weights of this checkpoint instead of the last ones."""
        self.count = int(checkpoint.get("averaging_state", {}).get("n_averaged", 0))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.count < 2:
            tell(trainer, f"averaging: {self.said}")


class Ema(WeightAverage):
    """Exponential moving average: a <- d a + (1 - d) w after each step (Polyak and Juditsky 1992).

    It starts as the weights after the first step; the decay of the n-th update after that is
    d = min(decay, (1 + n) / (10 + n)), so that a short run is not held by its start, or as `warmup` says.
    Of several decays each has an average; at each validation the one of the least loss on the validation split is
    taken, which is validated, saved and left at the end.

    decay: in [0, 1), unitless, or several; warmup: ratio, power or none (`knep.optim.own_loop.ema_decay`);
    bn_batches: training batches for the batch-norm statistics at each validation, 0 = all.
    Raises ValueError for a decay outside [0, 1), several that are alike, or an unknown warmup.
    """

    def __init__(self, *, decay: float | Sequence[float] = 0.999, bn_batches: int = 20, warmup: str = "ratio") -> None:
        decays = list(decay) if isinstance(decay, Sequence) else [decay]
        if not decays or not all(0 <= d < 1 for d in decays) or len(set(decays)) < len(decays):
            raise ValueError(f"decay must be in [0, 1), or several such that differ, got {decay}")
        if warmup not in WARMUPS:
            raise ValueError(f"warmup must be one of {', '.join(WARMUPS)}, got {warmup}")
        super().__init__(bn_batches)
        self.decays, self.warmup, self.chosen = decays, warmup, 0
        self._all: list[list[Tensor]] = []  # the averages, where there are several: the module's copy is the chosen one

    @property
    def several(self) -> bool:
        return len(self.decays) > 1

    @property
    def said(self) -> str:
        chosen = f", of decay {self.decays[self.chosen]}, chosen by validation" if self.several and self.count else ""
        return super().said + chosen

    def begin(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.several:
            validated(pl_module, f"averaging.decay={self.decays}", "averaging.decay=0.999")
        super().begin(trainer, pl_module, stage)
        self._updates, self.chosen, self._all = 0, 0, []
        if self._average_model is not None:
            self._average_model.update_parameters = self._update  # type: ignore[method-assign]

    @torch.no_grad()
    def _update(self, model: nn.Module) -> None:
        """One step of the average. PyTorch's own asks the device how many there were, and waits for the answer."""
        average: Any = self._average_model
        averages: list[Tensor] = list(average.module.parameters())
        current: list[Tensor] = list(model.parameters())
        if self.started:
            self._updates += 1
            if self.several:
                self._step_each(current)
                torch._foreach_copy_(averages, self._all[self.chosen])
            else:
                torch._foreach_lerp_(averages, current, self._weight(self.decays[0]))
        else:
            torch._foreach_copy_(averages, current)
            self._all = [[p.detach().clone() for p in current] for _ in self.decays] if self.several else []
        for mine, its in zip(average.module.buffers(), model.buffers(), strict=True):
            mine.copy_(its)
        average.n_averaged += 1

    def _weight(self, decay: float) -> float:
        return 1 - ema_decay(decay, self._updates, self.warmup)

    def _step_each(self, current: list[Tensor]) -> None:
        if self._all[0][0].device != current[0].device:  # from a checkpoint
            self._all = [[a.to(p.device) for a, p in zip(one, current, strict=True)] for one in self._all]
        for decay, one in zip(self.decays, self._all, strict=True):
            torch._foreach_lerp_(one, current, self._weight(decay))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.several and self._swaps(trainer) and not trainer.sanity_checking:
            losses = [self._loss_of(i, trainer, pl_module) for i in range(len(self.decays))]
            self.chosen = min(range(len(losses)), key=lambda i: (math.isnan(losses[i]), losses[i]))
            self._show(self.chosen)
        super().on_validation_epoch_start(trainer, pl_module)

    @torch.no_grad()
    def _show(self, number: int) -> None:
        average: Any = self._average_model
        for mine, its in zip(average.module.parameters(), self._all[number], strict=True):
            mine.copy_(its)

    def _loss_of(self, number: int, trainer: Trainer, module: LightningModule) -> float:
        """The loss of one of the averages on the validation split."""
        self._show(number)
        self._swap_models(module)
        reestimate(trainer, module, self._bn_batches)
        found = validated(module, "averaging.decay", "averaging.decay=0.999")(trainer)
        self._swap_models(module)
        return found

    _updates = 0

    def state_dict(self) -> dict[str, Any]:
        several = {"chosen": self.chosen, "all": self._all} if self.several else {}
        return super().state_dict() | {"updates": self._updates} | several

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._updates = state_dict["updates"]
        if self.several:
            self.chosen = state_dict["chosen"]
            self._all = [[t.clone() for t in one] for one in state_dict["all"]]

    def went_back(self, checkpoint: Mapping[str, Any]) -> None:
        super().went_back(checkpoint)
        self.chosen = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("chosen", 0)


def validated(module: LightningModule, what: str, remedy: str) -> Callable[[Trainer], float]:
    """The module's loss on the validation split, by which averages are chosen. Raises InputError without."""
    loss = getattr(module, "validation_loss", None)
    if loss is None:
        raise InputError(
            f"{what} chooses weights by validation, and {type(module).__name__} has no validation_loss(trainer), as "
            f"knep.LitModule has: write {remedy}"
        )
    return loss


class Swa(WeightAverage):
    """Stochastic weight averaging: the plain mean of the weights at the ends of the last epochs (Izmailov et al. 2018).

    Of the run as max_epochs and max_steps end it; under max_time of the steps of its last part. Where fewer than two
    epochs end in the last part, the steps of it are averaged instead.

    start: share of the run after which averaging begins, in [0, 1); bn_batches: as for `Ema`.
    Raises ValueError for a start outside [0, 1), InputError for a run of which nobody knows the end.
    """

    def __init__(self, *, start: float = 0.75, bn_batches: int = 0) -> None:
        if not 0 <= start < 1:
            raise ValueError(f"start must be in [0, 1), got {start}")
        super().__init__(bn_batches)
        self.start = start
        self._first_epoch = self._first_step = math.inf
        self._timer: Timer | None = None
        self._in_time = False  # whether max_time is running out

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plans the average, also where a run that had come to its end trains no more."""
        steps, epochs = length_of(trainer)
        self._first_epoch = self._first_step = math.inf
        self._unit, self._begins = WeightAverage._unit, f"after {self.start:.0%} of max_time"
        first = int(self.start * epochs) if epochs < math.inf else math.inf
        if epochs < math.inf and (int(epochs) - first >= 2 or steps == math.inf):
            self._first_epoch, self._begins = first, f"in epoch {first + 1}"
            self._unit = ("end of an epoch", "ends of epochs")
        elif steps < math.inf:
            self._first_step = int(self.start * steps)
            self._begins = f"at step {self._first_step + 1}"
        self._timer = next((c for c in trainer.callbacks if isinstance(c, Timer) and c._duration), None)  # type: ignore
        if self._timer is None and math.inf == self._first_epoch == self._first_step:
            raise InputError("averaging=swa averages the end of a run, and this one has none: give max_epochs")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._timer is not None and self.started:
            self._in_time = self._late(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        # Validation runs before Lightning's own epoch-end hook: the epoch's weights are added after its last batch.
        if self._timer is not None and not self._in_time and not self.started and self._late(trainer):
            self._in_time, self._unit = True, WeightAverage._unit
        ends = trainer.is_last_batch and trainer.current_epoch >= self._first_epoch
        if ends or self._in_time or trainer.global_step > self._first_step:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _late(self, trainer: Trainer) -> bool:
        """Whether `start` of the time is over; all processes decide alike."""
        timer: Any = self._timer
        return trainer.strategy.broadcast(timer.time_elapsed() >= self.start * timer._duration)


class Soup(Callback):
    """Model soup: the mean of the weights of the k best epochs of a run (Wortsman et al. 2022, uniform soup).

    k: checkpoints; monitor: a validation metric; mode: "min" or "max"; bn_batches: as for `Ema`.
    Raises ValueError for k < 2 or an unknown mode.
    """

    members = 1
    count = 0  # checkpoints in the mean that the module ends with

    def __init__(self, *, k: int = 3, monitor: str = "val/loss", mode: str = "min", bn_batches: int = 0) -> None:
        if k < 2:
            raise ValueError(f"k must be at least 2 checkpoints, got {k}")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be min or max, got {mode}")
        self.k, self.monitor, self.mode, self._bn_batches = k, monitor, mode, bn_batches
        self._kept: list[tuple[float, str]] = []  # (score, name of a file in the run's checkpoints), the best first
        self._written: set[str] = set()
        self.folder: Path | None = None  # beside files of others, of which none is removed; None for a run's own

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        folder = self._place(trainer)
        score = self.sign * float(logged(trainer, self.monitor))
        if len(self._kept) == self.k and score >= self._kept[-1][0]:
            return
        name = f"soup_{trainer.global_step}.pt"
        self._written.add(name)
        write(pl_module.state_dict(), folder / name)
        self._kept = sorted([*self._kept, (score, name)])[: self.k]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that goes on from its best checkpoint, say, may have dropped files of that time since."""
        folder = self._place(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        if trainer.is_global_zero and trainer.ckpt_path is not None:
            self._bring(Path(trainer.ckpt_path).parent, folder)
        trainer.strategy.barrier()
        missing = [name for _, name in self._kept if not (folder / name).is_file()]
        if missing and trainer.is_global_zero:
            print(
                f"knep: averaging=soup goes on without {', '.join(missing)}, missing in {folder}: copy them there from "
                "the checkpoints of the earlier run, or give the logger its version",
                file=sys.stderr,
            )
        self._kept = [(score, name) for score, name in self._kept if name not in missing]

    def _bring(self, earlier: Path, folder: Path) -> None:
        """Copies what the checkpoint's own run kept beside it, where a logger gives this run a folder of its own."""
        for _, name in self._kept:
            here = [place / name for place in (earlier, earlier / "checkpoints", earlier.parent / "checkpoints")]
            found = next((path for path in here if path.is_file()), None)
            if found is not None and not (folder / name).is_file():
                write(read(found), folder / name)
                self._written.add(name)

    def after_save(self, trainer: Trainer) -> None:
        """Removes the files of worse epochs: not before the checkpoint that goes on without them is on disk."""
        if trainer.is_global_zero:
            kept = {name for _, name in self._kept}
            for path in self._place(trainer).glob("soup_*.pt"):
                if path.name not in kept and (self.folder is None or path.name in self._written):
                    path.unlink(missing_ok=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after_save(trainer)
        states = [read(self._place(trainer) / name) for _, name in self._kept]
        self.count = self._blend(trainer, pl_module, states) if states else 0
        if self.count < 2:
            tell(trainer, f"averaging: {self.said}")

    def _blend(self, trainer: Trainer, module: LightningModule, states: list[dict[str, Tensor]]) -> int:
        """Leaves the module with the mean of the states, the best first; how many are in it."""
        self._pour(trainer, module, states)
        return len(states)

    def _pour(self, trainer: Trainer, module: LightningModule, states: Sequence[Mapping[str, Tensor]]) -> None:
        module.load_state_dict(mean_of(states))
        reestimate(trainer, module, self._bn_batches)

    @property
    def sign(self) -> int:
        """Of a score in the order of `_kept`, where less is better."""
        return 1 if self.mode == "min" else -1

    def _place(self, trainer: Trainer) -> Path:
        return self.folder or Path(trainer.default_root_dir) / "checkpoints"

    @property
    def said(self) -> str:
        """What was averaged, in words."""
        if not self.count:
            return "nothing: training ended before its first validation"
        return f"{self.count} checkpoints" if self.count > 1 else "1 checkpoint, so nothing"

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [[score, name] for score, name in self._kept]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the names of files alone, which lie in this run's checkpoints wherever the run was before."""
        self._kept = [(score, Path(path).name) for score, path in state_dict["kept"]]

    def files(self, state_dict: Mapping[str, Any]) -> list[str]:
        """The names of the files that a state, one that was looked at, needs beside its checkpoint."""
        return [Path(path).name for _, path in state_dict["kept"]]


class GreedySoup(Soup):
    """Greedy model soup: of the k best epochs each stays in the mean where it is no worse on the validation split.

    Wortsman et al. 2022, recipe 1, over the epochs of a run, by the loss; the best epoch is always in it.

    k, monitor, mode, bn_batches: as for `Soup`; monitor tells which epochs are the best, and their order.
    """

    def __init__(self, *, k: int = 8, monitor: str = "val/loss", mode: str = "min", bn_batches: int = 0) -> None:
        super().__init__(k=k, monitor=monitor, mode=mode, bn_batches=bn_batches)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        validated(pl_module, "averaging=greedy_soup", "averaging=soup")
        super().on_fit_start(trainer, pl_module)

    def _blend(self, trainer: Trainer, module: LightningModule, states: list[dict[str, Tensor]]) -> int:
        loss = validated(module, "averaging=greedy_soup", "averaging=soup")

        def of(mean: Mapping[str, Tensor]) -> float:
            self._pour(trainer, module, [mean])
            return loss(trainer)

        kept, _ = greedy(states, of)
        self._pour(trainer, module, [states[i] for i in kept])
        return len(kept)

    @property
    def said(self) -> str:
        tried = f" of {len(self._kept)} tried" if self.count > 1 else ""
        return super().said + tried


def soup_step(name: str) -> str | None:
    """The step, in digits, of a file of `Soup`; None for any other name. Older runs name theirs by its whole path."""
    found = re.fullmatch(r"(/(?:[^/\0\n]+/)*checkpoints/)?soup_(\d{1,15})\.pt", name)
    return found[2] if found and ".." not in name.split("/") else None


class Ensemble(Callback):
    """Deep ensemble: `members` models from different seeds, whose class probabilities are averaged.

    Lakshminarayanan et al. 2017, sec. 2.4. Each member is trained by a fit of its own with seeds seed, seed + 1, ...

    members: models, at least 2. Raises ValueError for fewer.
    """

    def __init__(self, *, members: int = 3) -> None:
        if members < 2:
            raise ValueError(f"members must be at least 2 models, got {members}")
        self.members = members
