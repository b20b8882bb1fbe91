"""`callbacks=doctor`: the doctor beside one of knep's own runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from html import escape
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from knep.doctor.findings import Finding
from knep.doctor.live import Watch, line, ranked
from knep.doctor.mend import mend
from knep.doctor.stream import middle
from knep.errors import InputError, RunFailed

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
        self._window, self._together = 1, False
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
        rows = [
            {"disease": f.disease, "evidence": f.evidence, "gravity": f.gravity, "certain": f.certain, "began": f.began}
            for f in [*self._earlier, *self._found()]
        ]
        return {"findings": rows, "turns": dict(self._turns), "cures": dict(self._cures)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier = [Finding(**row) for row in state_dict["findings"]]
        self._turns, self._cures = Counter(state_dict["turns"]), dict(state_dict["cures"])

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._start = self._step = trainer.global_step
        self._window, self._together = trainer.accumulate_grad_batches, trainer.world_size > 1
        if trainer.is_global_zero:
            watch = Watch(
                pl_module.model, trainer.optimizers[0], every=self.every, on_finding="none", cross_entropy=True
            )
            self._watch = watch.__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        window = self._window
        if window > 1:
            if trainer.global_step == self._step:
                return
            self._step = trainer.global_step
        if self._watch is not None:
            self._watch.step(outputs["loss"] * window if window > 1 else outputs["loss"], y=batch[1])
            if self._watch.looks != self._looks:
                self._looks = self._watch.looks
                self._answer(trainer, pl_module)
        if self._together and (trainer.global_step - self._start) % self.every == 0:
            trainer.should_stop = trainer.strategy.reduce_boolean_decision(trainer.should_stop, all=False)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self._watch is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            metrics = {k[4:]: float(v) for k, v in trainer.callback_metrics.items() if k in ("val/loss", "val/acc")}
            self._watch.validate(**metrics)
            self._answer(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watch is not None:
            measured = self._watch.report().measured
            self._watch.__exit__()
            self._answer(trainer, pl_module)
            from knep.doctor.figures import figures

            for board in _boards(trainer):
                for name, figure in figures(measured).items():
                    board.add_figure(f"doctor/{name}", figure, trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if self._watch is None:
            return
        if isinstance(exception, RunFailed):
            self._watch.failed()
            self._answer(trainer, pl_module, ended=True)
            exception.findings = self.findings
        self._watch.__exit__()

    def _answer(self, trainer: Any, module: Any, ended: bool = False) -> None:
        """Says what is new, and does about it what was asked for."""
        assert self._watch is not None
        for finding in self._watch.news():
            if all(finding.disease != f.disease for f in self._earlier):
                self._say(trainer, line(self._placed(finding)))
        for finding in ranked(self._watch.now)[:1]:
            if finding.certain and not ended:
                self._act(trainer, module, finding)
        if not ended:
            self._log(trainer)

    def _act(self, trainer: Any, module: Any, finding: Finding) -> None:
        assert self._watch is not None
        name = finding.disease
        if self.on_finding == "stop" and self.stopped_by is None:
            self.stopped_by, trainer.should_stop = name, True
            self._say(trainer, f"doctor: the run stops after step {trainer.global_step}: {finding.about.title}")
        rested = self._looks >= self._rests.get(name, 0)
        if self.on_finding != "cure" or not rested or self._turns[name] >= _TURNS:
            return
        done = mend(module, trainer, finding)
        if done is None and not self._turns[name]:
            self._say(trainer, f"doctor: {finding.about.title}: this cannot be mended while the run goes on")
        self._turns[name] += 1 if done else _TURNS
        self._rests[name] = self._looks + _REST
        if done:
            self._watch.changed()
            self._cures[name] = f"{self._cures[name]}, {done}" if name in self._cures else done
            self._say(trainer, f"doctor: from step {trainer.global_step}: {done}, against: {finding.about.title}")

    def _say(self, trainer: Any, text: str) -> None:
        bar = trainer.progress_bar_callback
        getattr(bar, "line", print)(text)
        for board in _boards(trainer):
            board.add_text("doctor/findings", escape(text, quote=False), trainer.global_step)

    def _log(self, trainer: Any) -> None:
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


def _boards(trainer: Any) -> list[Any]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
