"""`callbacks=doctor`: the doctor beside one of knep's own runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from html import escape
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer

from knep.doctor.findings import Finding, diseases, line, ranked
from knep.doctor.live.fixes import again, mend
from knep.doctor.live.history import middle
from knep.doctor.live.watch import Watch
from knep.engine.module import Classifier
from knep.errors import InputError, RunFailed
from knep.io.schema import Check, either, flag, listed, nothing, number, one_of, record, table, text, whole
from knep.observe.step_observer import compiled, fused
from knep.tasks.base import Batch

ACTIONS = ("warn", "stop", "cure")
_TURNS = 3  # of a cure
_REST = 5  # looks between two turns


class Doctor(Callback):
    """Looks at some of a run's steps and says what is wrong, with the step at which it began; once for each disease.

    on_finding: warn says it; stop ends the run, as early stopping does; cure changes what can be changed while the run
    goes on, and says what. Suspicions are only said. every: optimizer steps between looks; the first looks are closer.
    Raises InputError for another action or an `every` below 1.
    """

    def __init__(self, *, on_finding: str = "warn", every: int = 200) -> None:
        if on_finding not in ACTIONS:
            raise InputError(f"doctor.on_finding={on_finding} is unknown: write one of {', '.join(ACTIONS)}")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise InputError(f"doctor.every={every} must be a whole number of optimizer steps, at least 1")
        self.on_finding, self.every = on_finding, every
        self.stopped_by: str | None = None
        self._watch: Watch | None = None
        self._earlier: list[Finding] = []  # of the run that this one goes on from
        self._start = self._step = self._looks = 0
        self.window, self.together = 1, False
        self._orders: list[tuple[str, Finding]] = []  # what all processes are to do
        self._turns: Counter[str] = Counter()
        self._rests: dict[str, int] = {}
        self._cures: dict[str, str] = {}

    @property
    def findings(self) -> list[dict[str, Any]]:
        """Plain data, for the summary: the gravest first."""
        rows = []
        for finding in ranked([*self._earlier, *self._found()]):
            row = finding.as_dict()
            rows.append(row | ({"cure": self._cures[finding.disease]} if finding.disease in self._cures else {}))
        return rows

    def _found(self) -> list[Finding]:
        known = {f.disease for f in self._earlier}
        found = self._watch.findings.values() if self._watch else ()
        return [self._placed(f) for f in found if f.disease not in known]

    def _placed(self, finding: Finding) -> Finding:
        """With the optimizer step of the whole run, of which this fit may be a later part."""
        return replace(finding, began=(finding.began or 0) + self._start)

    def state_dict(self) -> dict[str, Any]:
        return {
            "findings": [asdict(finding) for finding in [*self._earlier, *self._found()]],
            "turns": dict(self._turns),
            "cures": dict(self._cures),
        }

    @staticmethod
    def state_schema() -> Check:
        """What `state_dict` may hold, for a checkpoint to be checked by before it is loaded."""
        finding = {"disease": one_of(*diseases()), "evidence": text(), "gravity": number(0, 1)}
        more = {"certain": flag, "layers": listed(text()), "overrides": listed(listed(text())), "mend": text()}
        more |= {"began": either(nothing, whole()), "gain": either(nothing, number())}
        return record({"findings": listed(record(finding, more)), "turns": table(whole()), "cures": table(text())})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier = [recalled(row) for row in state_dict["findings"]]
        self._turns, self._cures = Counter(state_dict["turns"]), dict(state_dict["cures"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = self._step = trainer.global_step
        self.window, self.together = trainer.accumulate_grad_batches, trainer.world_size > 1
        again(pl_module, trainer, self._cures)
        if trainer.is_global_zero:
            self.begin(trainer, pl_module)

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the watch on the model of a run."""
        module = cast("Classifier", pl_module)
        model = module.model
        # The module around a compiled model is not compiled: hooks on it see the batch and the scores.
        door = module if compiled(model) else model
        plain = getattr(module.task, "function", None) is None
        how: dict[str, Any] = {"every": self.every, "on_finding": "none", "cross_entropy": plain, "told": True}
        self._watch = Watch(model, trainer.optimizers[0], door=door, **how).__enter__()
        if fused(model):
            self.say(trainer, "doctor: the model is compiled to one graph: what goes on in its layers is not seen")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if self._watch is not None:
            self._watch.given(batch[0])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._watch is not None:
            self._watch.arrived()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        self.window = window = trainer.accumulate_grad_batches  # other ones in later epochs, where batches grow
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if window > 1 and not stepped:
            return
        if self._watch is not None:
            loss = cast("Mapping[str, Tensor]", outputs)["loss"]
            self._watch.step(loss * window if window > 1 else loss, y=batch[1])
            if self._watch.looks != self._looks:
                self._looks = self._watch.looks
                self.answer(trainer, pl_module)
        if self.together and (trainer.global_step - self._start) % self.every == 0:
            self.agree(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            if self._watch is not None:
                self._watch.validate(**self._validation(trainer))
                self.answer(trainer, pl_module)
            if self.together:
                self.agree(trainer, pl_module)

    def _validation(self, trainer: Trainer) -> dict[str, float]:
        """The loss and the accuracy of a validation, as far as they are known."""
        return {k[4:]: float(v) for k, v in trainer.callback_metrics.items() if k in ("val/loss", "val/acc")}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watch is not None:
            measured = self._watch.report().measured
            self._watch.__exit__()
            self.answer(trainer, pl_module, ended=True)
            self.advise(trainer)
            from knep.doctor.report.figures import figures

            for board in _boards(trainer):
                for name, figure in figures(measured).items():
                    board.add_figure(f"doctor/{name}", figure, trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._watch is None:
            return
        if isinstance(exception, RunFailed):
            self._watch.failed()
            self.answer(trainer, pl_module, ended=True)
            self.advise(trainer)
            exception.findings = self.findings
        self._watch.__exit__()

    def answer(self, trainer: Trainer, module: LightningModule, ended: bool = False) -> None:
        """Says what is new, and does about it what was asked for."""
        assert self._watch is not None
        for finding in self._watch.news():
            if all(finding.disease != f.disease for f in self._earlier):
                self.say(trainer, line(self._placed(finding)))
        for finding in ranked(self._watch.now)[:1]:
            if finding.certain and not ended:
                self._order(finding)
        if not ended:
            if not self.together:
                self._carry_out(trainer, module)
            self._log(trainer)

    def advise(self, trainer: Trainer) -> None:
        """At the end: what would mend the gravest finding in a run from the start."""
        for finding in ranked([*self._earlier, *self._found()])[:1]:
            ways = [" ".join(way) for way in finding.overrides[:2]]
            if advice := " or ".join(ways) or finding.mend:
                self.say(trainer, f"doctor: against: {finding.about.title}: in a new run, {advice}")

    def _order(self, finding: Finding) -> None:
        """What was asked for is to be done about a finding, if it is not done already."""
        name = finding.disease
        if self.on_finding == "stop" and self.stopped_by is None:
            self._orders.append(("stop", finding))
        rested = self._looks >= self._rests.get(name, 0)
        if self.on_finding == "cure" and rested and self._turns[name] < _TURNS:
            self._rests[name] = self._looks + _REST
            self._orders.append(("cure", finding))

    def agree(self, trainer: Trainer, module: LightningModule) -> None:
        """All processes do what the first one, which alone looks, has found to do."""
        self._orders = trainer.strategy.broadcast(self._orders)
        self._carry_out(trainer, module)

    def _carry_out(self, trainer: Trainer, module: LightningModule) -> None:
        orders, self._orders = self._orders, []
        for what, finding in orders:
            if what == "stop" and self.stopped_by is None:
                self.stopped_by, trainer.should_stop = finding.disease, True
                self.say(trainer, f"doctor: the run stops after step {trainer.global_step}: {finding.about.title}")
            elif what == "cure":
                self._cure(trainer, module, finding)

    def _cure(self, trainer: Trainer, module: LightningModule, finding: Finding) -> None:
        name, done = finding.disease, mend(module, trainer, finding)
        if done is None and not self._turns[name]:
            self.say(trainer, f"doctor: {finding.about.title}: this cannot be mended while the run goes on")
        self._turns[name] += 1 if done else _TURNS
        if done:
            self._cures[name] = f"{self._cures[name]}, {done}" if name in self._cures else done
            self.say(trainer, f"doctor: from step {trainer.global_step}: {done}, against: {finding.about.title}")
        if done and self._watch is not None:
            self._watch.changed()

    def say(self, trainer: Trainer, text: str) -> None:
        if not trainer.is_global_zero:
            return
        bar = trainer.progress_bar_callback
        getattr(bar, "line", print)(text)
        for board in _boards(trainer):
            board.add_text("doctor/findings", escape(text, quote=False), trainer.global_step)

    def _log(self, trainer: Trainer) -> None:
        assert self._watch is not None
        stream, step = self._watch.stream, trainer.global_step
        if not stream.looks:
            return
        look = stream.looks[-1]
        values = {"update_ratio": look.update, "grad_norm": look.grad_norm}
        for name in ("dead", "saturated"):
            shares = [s for s in (getattr(layer, name) for layer in look.layers) if s is not None]
            values |= {f"{name}_share": middle(shares)} if shares else {}
        for board in _boards(trainer):
            for name, value in values.items():
                board.add_scalar(f"doctor/{name}", value, step)


def recalled(row: dict[str, Any]) -> Finding:
    """A finding from the plain data of a checkpoint, whose lists were tuples."""
    ways = tuple(tuple(way) for way in row.get("overrides", ()))
    return Finding(**row | {"layers": tuple(row.get("layers", ())), "overrides": ways})


def _boards(trainer: Trainer) -> list[Any]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
