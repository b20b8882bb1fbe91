"""What a recipe did in a fit, slot by slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from knep.engine.any_module.best import Best
from knep.engine.any_module.callback import RecipeCallback
from knep.engine.any_module.part import Part, edits_of
from knep.recipes.recipe import MODEL_SLOTS


def effects(callbacks: Sequence[Callback]) -> dict[str, str]:
    """Slot -> what it did, "none" where nothing was asked of it; with the network's name where there are several."""
    main = next(c for c in callbacks if isinstance(c, RecipeCallback))
    found: dict[str, str] = {}
    for part in main.parts:
        prefix = f"{part.path}." if len(main.parts) > 1 else ""
        found |= {f"{prefix}{slot}": said for slot, said in _of_part(part).items()}
    averaging, stopping = callbacks[3], callbacks[4]
    found["averaging"] = _averaging(averaging)
    if len(main.parts) > 1 and found["averaging"] != "none":
        found["averaging"] += f", of all networks: {', '.join(str(part.path) for part in main.parts)}"
    found["stopping"] = (
        _stopping(stopping, callbacks) if any(part.steps for part in main.parts) else "no step was taken"
    )
    return found


def _of_part(part: Part) -> dict[str, str]:
    steps = part.steps
    changes = part.report.changes if part.report is not None else {}
    found = {slot: _layers(changes.get(slot, [])) for slot in MODEL_SLOTS}
    found["scaling"] = _scaling(part)
    found["augment"] = f"{part.augmented} batches" if part.augments else "none"
    start, end = part.rates
    whose = type(part.optimizer).__name__ if part.optimizer is not None else "no optimizer"
    found["optimizer"] = f"{whose}, {steps} steps" + ("" if part.optimizes else ", of the module itself")
    if not steps:
        found["optimizer"] = "no step was taken"
    found["scheduler"] = (
        "none" if not steps else f"rate {start:.3g} to {end:.3g}" if start != end else f"rate {end:.3g} throughout"
    )
    if steps and part.total is not None and steps != part.total:
        found["scheduler"] += f", made for {part.total} steps and not {steps}"
    if part.clips:
        share = float(part.clipped) / max(part.gradients, 1)
        found["clip"] = f"changed the gradient in {share:.0%} of {steps} steps"
    else:
        found["clip"] = "none"
    found["regularization"] = _regularization(part)
    if part.tuning is not None:
        found["finetune"] = part.tuning.said().removeprefix("finetune: ")
    return found


def _layers(changes: Sequence[Any]) -> str:
    edits = edits_of(changes)
    kept = f"{len(changes) - len(edits)} kept" if len(changes) > len(edits) else ""
    if not edits:
        return kept or "none"
    said = f"{len(edits)} changed: {edits[0].path} {edits[0].before} -> {edits[0].after}"
    return f"{said}; {kept}" if kept else said


def _scaling(part: Part) -> str:
    if not part.scales:
        return "none"
    name = getattr(getattr(part.recipe.make_scaling, "func", None), "__name__", "")
    fitted = ", fitted on training batches" if name == "standardize" else ""
    return f"{name}, in front of the network{fitted}"


def _regularization(part: Part) -> str:
    acts = {"penalty in {} steps": part.penalised, "weights edited after {} steps": part.edited}
    acts["smoothed loss in {} steps"] = part.smoothed
    return ", ".join(text.format(count) for text, count in acts.items() if count) or "none"


def _averaging(callback: Any) -> str:
    said = getattr(callback, "said", None)
    return "none" if said is None else f"validated and ended with the average of {said}"


def _stopping(callback: Any, callbacks: Sequence[Callback]) -> str:
    if not isinstance(callback, EarlyStopping):
        return "none"
    score = next((c.best_score for c in callbacks if isinstance(c, Best)), None)
    ended = f"stopped in epoch {callback.stopped_epoch + 1}" if callback.stopped_epoch else "ran to its end"
    return f"{ended}, back to the best {callback.monitor}" + ("" if score is None else f" {float(score):.4g}")
