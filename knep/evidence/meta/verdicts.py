"""Verdicts over the whole ledger: pages pick from all of its cells, so all of its p-values are corrected together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from scipy import stats

from knep.config.catalog import SLOTS, cells
from knep.evidence.meta.images import two_way
from knep.evidence.meta.random_effects import LEAST, Pooled, pool
from knep.evidence.stats import Effect, holm, paired, verdict
from knep.utils.bits import unpacked

Cells = dict[str, list[dict[str, Any]]]  # slot -> its cells
CORRECTION = "Holm"
SPEC = Path(__file__).parents[1] / "ledger.yaml"


def spec() -> dict[str, Any]:
    """ledger.yaml: base (lines), workloads (name -> lines), slots (name -> control, common), the headline: workload ->
    slot -> options, against: slot -> option -> the workloads that its card advises against, and shown: what README
    shows, slot -> options."""
    found: Any = OmegaConf.to_container(OmegaConf.load(SPEC))
    return found


def stored() -> Cells:
    """All cells of the ledger, slots in their order."""
    return {slot: cells(slot) for slot in SLOTS}


def count(ledger: Mapping[str, Sequence[Mapping[str, Any]]]) -> int:
    """How many effects the ledger has, over which p-values are corrected."""
    return sum(bool(cell.get("effect")) for rows in ledger.values() for cell in rows)


def judged(ledger: Cells) -> Cells:
    """The cells with the effect of each against its control, worked out anew from their accuracies, and its verdict.

    p-values are corrected over all cells of all slots and workloads that have an effect (Holm 1979).
    """
    known = [(slot, cell) for slot, rows in ledger.items() for cell in rows if cell.get("effect")]
    found = [_effect(cell, control(ledger[slot], cell)) for slot, cell in known]
    for (slot, cell), effect, p in zip(known, found, holm([e.p for e in found]), strict=True):
        said, failed = verdict(effect, p), cell["effect"]["failed"]
        ending = f", {failed} of {cell['n']} failed" if failed else ""
        cell["effect"] |= {"accuracy": vars(effect), "corrected_p": p, "verdict": said + ending}
        cell["effect"] |= {"images": _over_images(cell, control(ledger[slot], cell))}
    return ledger


def control(rows: Sequence[Mapping[str, Any]], cell: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a cell is compared with: the control that was run beside it, or the cell of its slot's."""
    return cell.get("own_control") or next(
        c for c in rows if (c["option"], c["workload"]) == (cell["control"], cell["workload"])
    )


def _effect(cell: Mapping[str, Any], plain: Mapping[str, Any]) -> Effect:
    resolution = 1 / cell["test_images"] if cell.get("test_images") else None
    return _paired(tuple(cell["test_acc"]), _of_seeds(plain, "test_acc", cell["seeds"]), resolution)


def _of_seeds(cell: Mapping[str, Any], key: str, seeds: Sequence[int]) -> tuple[Any, ...]:
    """What a cell has of these seeds: an option may have been measured with fewer than its control."""
    by_seed = dict(zip(cell["seeds"], cell[key], strict=True))
    return tuple(by_seed[seed] for seed in seeds)


@lru_cache(maxsize=4096)
def _paired(treated: tuple[float, ...], plain: tuple[float, ...], resolution: float | None) -> Effect:
    return paired(treated, plain, resolution=resolution)


def _over_images(cell: Mapping[str, Any], plain: Mapping[str, Any]) -> list[float] | None:
    """The interval over seeds x images where both sides say which images they had right, else None."""
    if not (cell.get("right") and plain.get("right")):
        return None
    texts = [_of_seeds(side, "right", cell["seeds"]) for side in (cell, plain)]
    if not all(text for side in texts for text in side):  # a failed run left no network
        return None
    own, other = (np.stack([unpacked(text) for text in side]) for side in texts)
    return list(two_way(own, other))


def effect_on(workload_cell: Mapping[str, Any], plain: Mapping[str, Any]) -> tuple[float, float]:
    """The share of the control's error that a trick removes, and its standard error; negative where it adds to it.

    The control's mean error is taken as known, and the effect's error as that by which its interval was made.
    """
    accuracy = workload_cell["effect"]["accuracy"]
    error = 1 - float(np.mean(plain["test_acc"]))
    return accuracy["mean"] / error, _standard_error(accuracy) / error


def _standard_error(accuracy: Mapping[str, float]) -> float:
    half = (accuracy["high"] - accuracy["low"]) / 2
    return half / float(stats.t.ppf(0.975, accuracy["n"] - 1))


def pooled(slot: str, option: str, ledger: Mapping[str, Sequence[Mapping[str, Any]]]) -> Pooled | None:
    """A trick's effect over its workloads, as share of the error that it removes; None for fewer than three.

    Uses that the option's card advises against (`against` in ledger.yaml) are left out.
    """
    rows = ledger[slot]
    own = [c for c in rows if c["option"] == option and c.get("effect") and not c.get("against")]
    if len(own) < LEAST:
        return None
    pairs = [effect_on(c, control(rows, c)) for c in own]
    return pool([y for y, _ in pairs], [error for _, error in pairs])
