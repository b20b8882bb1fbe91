"""What the checkpoint that a run goes on from may hold: every field is looked at before any of it is loaded.

The config that a checkpoint carries says what its run had: that model, its optimizer after a step, its schedule and its
callbacks are built anew, and the stored states must be theirs in keys, types, shapes and kinds of numbers. Counters of
one thing must agree, and a score must be one that an epoch had.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from lightning.pytorch.loops.progress import _BatchProgress, _OptimizationProgress, _Progress, _SchedulerProgress
from torch import Tensor

from knep.config.instantiate import instantiate
from knep.config.schema import RunConfig
from knep.engine.checkpointing import BEST, Best, states_in
from knep.engine.load import not_finite, weights_wrong
from knep.engine.logging.history import History
from knep.engine.loops.batch_growth import growth
from knep.engine.module import Classifier
from knep.errors import InputError
from knep.guard.policy import KINDS
from knep.io.checkpoint import read
from knep.io.schema import (
    Check,
    alike,
    anything,
    either,
    flag,
    items,
    listed,
    nothing,
    number,
    one_of,
    record,
    same,
    table,
    text,
    whole,
)
from knep.optim.state_schema import Expected, rates_wrong, tensor
from knep.recipes.averaging import Ema, Soup, soup_step
from knep.utils.text import shortened

_OPTIMIZATION = "epoch_loop.automatic_optimization.optim_progress"
_MANUAL = "epoch_loop.manual_optimization.optim_step_progress"
_NUMBER = number(finite=False)
_WINDOW = 100  # losses and clipped steps that are kept


def check_stored_run(path: Path, state: Mapping[str, Any], module: Classifier) -> None:
    """Raises InputError, in one line, where a checkpoint is not one that a run of its config saves.

    state: with a config that was looked at; module: the Classifier that this config builds, which is spent.
    """
    try:
        wrong = next(_wrong(path, state, module), None)
    except RecursionError:
        wrong = "its data has no end"
    if wrong:
        raise InputError(f"{path} is not what knep wrote: {wrong.lstrip('. ')}: give another checkpoint")


def _wrong(path: Path, state: Mapping[str, Any], module: Classifier) -> Iterator[str]:
    """What is wrong with each part in turn, for a reader who stops at the first: later parts rely on those before."""
    yield from _said(state, _outline())
    if "trainer" not in state["knep"]["config"]:
        yield "its config has no trainer"
    for key in ("state_dict", "current_model_state"):
        if key in state:
            wrong = weights_wrong(module, state[key]) or not_finite(module, state[key])
            yield from [f"{key}: {wrong}"] if wrong else []
    yield from _counters_wrong(state)
    yield from _callbacks_wrong(path, state, module)
    try:
        expected = expected_state(module)
    except InputError:
        raise
    except Exception as error:  # whatever an optimizer raises for values that it was not made for
        yield f"its config builds no optimizer ({shortened(' '.join(str(error).split()), 120)})"
        return
    optimizer, groups = expected.optimizer(state["global_step"]), state["optimizer_states"][0].get("param_groups")
    yield from _said(state["optimizer_states"][0], optimizer, "optimizer_states[0]")
    states = states_in(state["optimizer_states"][0])
    if states != state.get("exact", {}).get("states", [states])[0]:
        yield f"optimizer_states[0] has {states} states, and by another count {state['exact']['states'][0]}"
    yield from _said(state["lr_schedulers"][0], expected.schedule(len(groups)), "lr_schedulers[0]")
    if "exact" in state:
        progress = state["loops"]["fit_loop"]["epoch_loop.scheduler_progress"]["total"]["completed"]
        # A plateau is stepped by validations, which the module counts and Lightning's loop does not.
        done = len(state["callbacks"][History().state_key]["rows"]) if expected.by_validation else progress
        yield from (f"lr_schedulers[0].{w}" for w in rates_wrong(state["lr_schedulers"][0], groups, done))
    yield from _running_wrong(state, module, optimizer)


def expected_state(module: Classifier, finite: bool = True) -> Expected:
    """Raises InputError where the config gives `module` no optimizer or no schedule."""
    optimizer = module.make_optimizer()
    scheduler = module.recipe.scheduler(optimizer, total_steps=1000, steps_per_epoch=10)
    return Expected(module.model, optimizer, scheduler, module.about["config"], finite)


def _said(value: object, check: Check, place: str = "") -> Iterator[str]:
    wrong = check(value)
    if wrong:
        yield f"{place}{wrong}"


def _scalar(check: Check) -> Check:
    """A tensor without dimensions whose number `check` lets pass."""

    def checked(value: object) -> str | None:
        if not isinstance(value, Tensor) or value.shape:
            return " is no tensor of one number"
        return check(value.item())

    return checked


def _random(value: Any) -> str | None:
    """A state of the CPU's generator."""
    wrong = tensor(torch.get_rng_state())(value)
    if wrong:
        return wrong
    try:
        torch.Generator().set_state(value.contiguous())
    except (RuntimeError, TypeError):
        return " is no state of a generator"
    return None


# The parts of every checkpoint


def _outline() -> Check:
    batches = alike(_BatchProgress().state_dict())
    none_made = record(dict.fromkeys(("ready", "completed"), same(0)))  # by hand, which knep's module does not
    fit = {
        "state_dict": record({}, {"combined_loader": items(record({"position": whole()}))}),
        "epoch_progress": alike(_Progress().state_dict()),
        "epoch_loop.state_dict": record({"_batches_that_stepped": whole()}),
        "epoch_loop.batch_progress": batches,
        "epoch_loop.scheduler_progress": alike(_SchedulerProgress().state_dict()),
        "epoch_loop.val_loop.batch_progress": batches,
        _MANUAL: record({"total": none_made, "current": none_made}),
        _OPTIMIZATION: alike(_OptimizationProgress().state_dict()),
    }
    exact = {
        "place": one_of("batch", "epoch"),
        "rng": record({"cpu": _random}, {"cuda": tensor(torch.zeros(16, dtype=torch.uint8))}),
        "metrics": table(either(_scalar(_NUMBER), _NUMBER)),
        "gradients": table(anything),
    }
    running = {"sums": table(anything), "clipped": listed(flag, most=_WINDOW), "last_step": whole(-1)}
    scale = {"scale": 1.0, "growth_factor": 1.0, "backoff_factor": 1.0, "growth_interval": 1, "_growth_tracker": 0}
    needed = {
        "epoch": whole(),
        "global_step": whole(),
        "pytorch-lightning_version": text(r"[2-9]\.\d{1,4}(\.\w{1,20}){0,4}"),
        "loops": record({"fit_loop": record(fit, closed=False)}, closed=False),
        "callbacks": table(table(anything)),
        "optimizer_states": items(table(anything)),
        "lr_schedulers": items(table(anything)),
        "running": record(running, {"guard": _guard(), "window": _window()}),
    }
    optional = {
        "exact": record(exact, {"states": items(whole())}),
        "averaging_state": record({"n_averaged": _scalar(whole())}),
        "current_model_state": table(anything),
        **dict.fromkeys(("MixedPrecision", "native_amp_scaling_state"), either(same({}), alike(scale))),
    }
    return record(needed, optional, closed=False)


def _window() -> Check:
    return record({"images": number(0), "typical": either(nothing, number(0))})


def _guard() -> Check:
    kinds = one_of(*KINDS)
    snapshot = record({"tensors": listed(anything), "optimizers": items(table(anything))})
    needed = {
        "losses": listed(_NUMBER, most=_WINDOW),
        "loss_so_far": _NUMBER,
        "spoiled": either(nothing, kinds),
        "counts": table(whole(), kinds),
        "factor": number(0, 1),
    }
    return record(needed, {"snapshot": snapshot})


# Counters


def _counters_wrong(state: Mapping[str, Any]) -> Iterator[str]:
    """Counters of one thing, which a checkpoint of knep saves where they agree; of others only what is never so."""
    fit, epoch, step = state["loops"]["fit_loop"], state["epoch"], state["global_step"]
    epochs, batches, optimization = fit["epoch_progress"], fit["epoch_loop.batch_progress"], fit[_OPTIMIZATION]
    steps = optimization["optimizer"]["step"]
    equal = [("global_step", step, steps["total"]["completed"]), ("epoch", epoch, epochs["current"]["processed"])]
    if "exact" in state:
        inside = state["exact"]["place"] == "batch"
        equal += [(f"epoch_progress.{k}", epochs["total"][k], epochs["current"][k]) for k in epochs["total"]]
        equal += [
            (f"epoch_progress.{k}", epochs["total"][k], epoch + (inside and k in ("ready", "started")))
            for k in epochs["total"]
        ]
        trackers = {
            "batch_progress": batches,
            "val_loop.batch_progress": fit["epoch_loop.val_loop.batch_progress"],
            "scheduler_progress": fit["epoch_loop.scheduler_progress"],
            "optim_progress.step": steps,
            "optim_progress.zero_grad": optimization["optimizer"]["zero_grad"],
        }
        for name, progress in trackers.items():
            for part in ("total", "current"):
                equal += [(f"{name}.{part}.{k}", n, progress[part]["ready"]) for k, n in progress[part].items()]
        equal.append(("_batches_that_stepped", fit["epoch_loop.state_dict"]["_batches_that_stepped"], step))
        position = [loader["position"] for loader in fit["state_dict"].get("combined_loader", ()) if inside]
        equal += [("combined_loader[0].position", p, batches["current"]["completed"]) for p in position]
        if inside and not position:
            yield "loops.fit_loop.state_dict has no combined_loader"
    yield from (f"{name} is {n}, and by another count {other}" for name, n, other in equal if n != other)
    parts = (("batch_progress", batches), ("optim_progress.step", steps))
    yield from (
        f"{name}.current is {n['current']['completed']}, more than there are in total"
        for name, n in parts
        if n["current"]["completed"] > n["total"]["completed"]
    )
    if step > batches["total"]["completed"] or epoch > batches["total"]["completed"]:
        yield f"global_step is {step} and epoch {epoch} after {batches['total']['completed']} batches"
    if state["running"]["last_step"] > step:
        yield f"running.last_step is {state['running']['last_step']}, behind global_step {step}"


# Callbacks


def _callbacks_wrong(path: Path, state: Mapping[str, Any], module: Classifier) -> Iterator[str]:
    """The states of the callbacks that the config has, all there and each by its own schema."""
    config, stored, step = state["knep"]["config"], state["callbacks"], state["global_step"]
    metric, mode = RunConfig.of(config).watched
    best = Best(path.parent, filename="best", monitor=metric, mode=mode, enable_version_counter=False)
    rows = record({"epoch": whole(0, state["epoch"])}, closed=False), table(_NUMBER, text(r"epoch|val/.{1,100}"))
    checks: dict[str, Check] = {History().state_key: record({"rows": listed(lambda row: rows[0](row) or rows[1](row))})}
    yield from _states_wrong(stored, checks)
    history = stored[History().state_key]["rows"]
    epochs = [row["epoch"] for row in history]
    once = "val_check_interval" not in config["trainer"]
    if epochs != sorted(set(epochs) if once else epochs):
        yield "callbacks.History.rows are not of one epoch after another"
    averaging, stopping = module.recipe.averaging, module.recipe.stopping
    checks = {best.state_key: _of_best(_scores(history, metric))}
    if isinstance(stopping, EarlyStopping):
        checks[stopping.state_key] = _of_stopping(stopping, _scores(history, metric), len(history), state["epoch"])
    if isinstance(averaging, Soup):
        checks[averaging.state_key] = _of_soup(averaging, _scores(history, averaging.monitor), step)
    if isinstance(averaging, WeightAveraging):
        updates = {"updates": whole(0, step)} if isinstance(averaging, Ema) else {}
        several = _of_decays(averaging, module) if isinstance(averaging, Ema) and averaging.several else {}
        checks[averaging.state_key] = record({"latest_update_step": whole(0, step), **updates, **several})
    grows = growth(module.recipe.accumulate, config["optimizer"])
    if grows is not None:
        checks[grows.state_key] = grows.state_schema()
    if "doctor" in config:
        checks["Doctor"] = instantiate(config["doctor"]).state_schema()
    yield from _states_wrong(stored, checks)
    if isinstance(averaging, WeightAveraging):
        yield from _average_wrong(state, stored[averaging.state_key])
    if isinstance(averaging, Soup):
        for name in averaging.files(stored[averaging.state_key]):
            yield from _beside_wrong(path.with_name(name), module)
    if isinstance(stopping, EarlyStopping) and stored[best.state_key]["best_model_path"]:
        place = path.with_name(BEST)
        yield from (
            _beside_wrong(place, module) if place.is_file() else [f"{BEST}, which early stopping ends with, is gone"]
        )


def _states_wrong(stored: Mapping[str, Any], checks: Mapping[str, Check]) -> Iterator[str]:
    for key, check in checks.items():
        if key not in stored:
            yield f"callbacks has no {key}"
        yield from _said(stored[key], check, f"callbacks.{key.partition('{')[0]}")


def _scores(history: Sequence[Mapping[str, Any]], metric: str) -> Check:
    """A value that an epoch had, or one that stands for none."""
    had = {float(row[metric]) for row in history if metric in row}
    no_number = any(map(math.isnan, had))

    def check(value: Any) -> str | None:
        wrong = _NUMBER(value)
        stands = wrong or value in had or math.isinf(value) or (math.isnan(value) and no_number)
        return wrong or (None if stands else f" is {value}, which no epoch had")

    return check


def _of_best(score: Check) -> Check:
    """One file, of the run's own name: of a path no more than that there is one is taken."""
    own = either(same(""), text(rf"(.*/)?{re.escape(BEST)}"))
    stored = either(nothing, _scalar(score))
    needed = {
        "monitor": text(),
        "best_model_score": stored,
        "best_model_path": own,
        "current_score": stored,
        "best_k_models": table(_scalar(score), own, most=1),
        "kth_best_model_path": own,
        "kth_value": stored,
        "last_model_path": own,
    }
    return record(needed, {"dirpath": text()})


def _of_stopping(stopping: EarlyStopping, score: Check, rows: int, epochs: int) -> Check:
    needed = {
        "wait_count": whole(0, rows),
        "stopped_epoch": whole(0, epochs),
        "best_score": _scalar(score),
        "patience": same(stopping.patience),
    }
    return record(needed, {"stopping_reason": whole(0, 3), "stopping_reason_message": either(nothing, text())})


def _of_soup(soup: Soup, score: Check, step: int) -> Check:
    """Scores with the names of files in the run's own folder, no two alike."""

    def file(value: object) -> str | None:
        found = type(value) is str and soup_step(value)
        return None if found and int(found) <= step else f" is {value!r:.60}, no file of this run's soup"

    def signed(value: Any) -> str | None:
        return _NUMBER(value) or score(soup.sign * value)

    kept = listed(items(signed, file), most=soup.k)

    def check(value: Any) -> str | None:
        wrong = kept(value)
        named = [] if wrong else [soup_step(name) for _, name in value]
        return wrong or (None if len(set(named)) == len(named) else " has a file twice")

    return record({"kept": check})


def _of_decays(averaging: Ema, module: Classifier) -> dict[str, Check]:
    """The averages of several decays, none before the first step, and the number of the one that is taken."""
    each = items(*(tensor(p, finite=True) for p in module.parameters()))
    return {
        "chosen": whole(0, len(averaging.decays) - 1),
        "all": either(items(), items(*(each for _ in averaging.decays))),
    }


def _average_wrong(state: Mapping[str, Any], stored: Mapping[str, Any]) -> Iterator[str]:
    parts = [key for key in ("averaging_state", "current_model_state") if key in state]
    if len(parts) != 2 * (stored["latest_update_step"] > 0):
        yield f"callbacks has an average of step {stored['latest_update_step']}, and there is {parts or 'none'}"
    averaged = int(state["averaging_state"]["n_averaged"]) if parts else 0
    if averaged > state["global_step"]:
        yield f"averaging_state.n_averaged is {averaged} after {state['global_step']} steps"
    if "updates" in stored and stored["updates"] != max(0, averaged - 1):
        yield f"callbacks.Ema.updates is {stored['updates']}, and averaging_state.n_averaged {averaged}"


def _beside_wrong(path: Path, module: Classifier) -> Iterator[str]:
    """A file that the end of the run will read, looked at while it can still be told; one that is gone is no fault."""
    if path.is_file():
        found = read(path)
        weights = (
            found["state_dict"] if path.name == BEST and isinstance(found, dict) and "state_dict" in found else found
        )
        wrong = weights_wrong(module, weights)
        if wrong:
            yield f"{path.name} beside it is of another run, {wrong}"


# The moment


def _running_wrong(state: Mapping[str, Any], module: Classifier, optimizer: Check) -> Iterator[str]:
    """Gradients of a window under way, the sums of an epoch, and what the guard goes back to."""
    wrong = moment_wrong(module, state.get("exact", {"gradients": {}}))
    if wrong:
        yield f"exact: {wrong}"
    sums = record({}, dict.fromkeys(("train", "val", "test"), tensor(torch.zeros(3, dtype=torch.float64))))
    yield from _said(state["running"]["sums"], sums, "running.sums")
    for name, values in state["running"]["sums"].items():
        _, correct, images = values.tolist()
        if not 0 <= correct <= images < math.inf:
            yield f"running.sums.{name} has {correct} right of {images} images"
    snapshot = state["running"].get("guard", {}).get("snapshot")
    if snapshot is not None:
        place = "running.guard.snapshot"
        own = [tensor(t) for t in (*module.model.parameters(), *module.model.buffers())]
        average = [tensor(t) for t in (*module.parameters(), torch.zeros((), dtype=torch.int64), *module.buffers())]
        averaged = isinstance(module.recipe.averaging, WeightAveraging)
        yield from _said(snapshot["tensors"], items(*own, *(average if averaged else ())), f"{place}.tensors")
        yield from _said(snapshot["optimizers"][0], optimizer, f"{place}.optimizers[0]")


def moment_wrong(module: Classifier, moment: Mapping[str, Any]) -> str | None:
    """What is wrong with the gradients, by parameter, that a step of `module` is to start from."""
    parameters = {name: tensor(p) for name, p in (*module.named_parameters(), *module.model.named_parameters())}
    wrong = record({}, parameters)(moment["gradients"])
    return wrong and f"gradients{wrong}"


def box_wrong(module: Classifier, box: Mapping[str, Any], of_optimizer: bool) -> str | None:
    """What of a black box does not fit `module`, which is spent. of_optimizer: whether its step went bad."""
    wrong = moment_wrong(module, box)
    if wrong or not of_optimizer:
        return wrong
    # The step that went bad is in the state: it counts, and its numbers need not be finite.
    found = expected_state(module, finite=False).optimizer(box["step"] + 1)(box["optimizer"])
    return found and f"optimizer{found}"
