"""`knep lr LINES`, and what `optimizer.lr=auto` becomes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from knep.config.compose import compose_config
from knep.errors import InputError
from knep.evidence.rate.find import SEEDS, Found, find, rates
from knep.evidence.rate.picture import draw
from knep.evidence.rate.short_run import Problem

_AUTO = "optimizer.lr=auto"


def lr(overrides: Sequence[str], seeds: int = SEEDS, out: Path | None = None) -> Found:
    """Looks for a rate for the run that the lines describe, prints what it saw and draws it.

    seeds: of the range test and of each trial, from 2 on; out: the picture, None for outputs/lr/<rule>.png.
    Raises InputError for lines that mean no run, and where every rate diverges.
    """
    lines = [line for line in overrides if line != _AUTO]
    made = compose_config([*lines, "progress=false"])
    path = out or Path("outputs") / "lr" / f"{made.choices['optimizer']}.png"
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--out={path} is no picture: write a name that ends in .png, .svg or .pdf")
    config: dict[str, Any] = made.config
    found = _looked_for(config, seeds, print)
    for line in verdict(found, config):
        print(line)
    try:
        draw(found, path, _named(made.choices))
    except OSError as error:
        raise InputError(f"--out={path} cannot be written ({error.strerror}): choose another file") from error
    print(f"picture: {path}")
    return found


def resolved(overrides: Sequence[str], search: Sequence[str] = ()) -> list[str]:
    """The lines of a run with the rate that was found in the place of `optimizer.lr=auto`; other lines as they are."""
    if _AUTO not in overrides:
        return list(overrides)
    lines = [line for line in overrides if line != _AUTO]
    made = compose_config(lines, list(search))
    if made.config["ckpt"] is not None:
        raise InputError(f"{_AUTO} looks for the rate of a run that starts: leave it out, a resumed run has its own")
    found = _looked_for(made.config, SEEDS, lambda line: print(f"lr: {line}", flush=True))
    factor = found.rate / found.default
    print(f"lr: {verdict(found, made.config)[0]}", flush=True)
    return [*lines, *lines_of(made.config, factor)]


def _looked_for(config: Mapping[str, Any], seeds: int, told: Callable[[str], None]) -> Found:
    if config["optimizer"].get("lr_per") is not None:
        raise InputError("optimizer.lr_per scales a rate that is known, and one is looked for here: leave it out")
    if seeds < 2:
        raise InputError(f"--seeds={seeds}: a rate that one seed suggests may be its own, write at least 2")
    from knep.config.instantiate import take_allowed

    plain = dict(config)
    if "allow_targets" in plain or "budget" in plain:
        take_allowed(plain)
    return find(Problem.of(plain), seeds, told=told)


def verdict(found: Found, config: Mapping[str, Any]) -> list[str]:
    """The rate to write, and how its trials compare with the default's."""
    factor = found.rate / found.default
    write = " ".join(lines_of(config, factor))
    gap = found.against_default
    if found.rate == found.default:
        return [f"keep the default, {found.default:.3g}: no rate that was tried is better after {found.steps} steps"]
    if gap is None:
        return [f"write {write}: the default, {found.default:.3g}, diverges"]
    base = statistics.fmean(found.losses[found.default])
    sure = "beyond noise" if gap.high < 0 else f"within noise: {len(found.curves)} seeds cannot tell them apart"
    return [
        f"write {write}: validation loss {base + gap.mean:.4g} after {found.steps} steps, {base:.4g} at the default, "
        f"{found.default:.3g}; difference {gap.mean:+.3g} [{gap.low:+.3g}, {gap.high:+.3g}], {sure}"
    ]


def lines_of(config: Mapping[str, Any], factor: float) -> list[str]:
    return [f"{key}={_short(value)}" for key, value in rates(config, factor).items()]


def _short(value: float) -> str:
    """Two significant digits: a third says more than trials know."""
    digits = max(0, 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def _named(choices: Mapping[str, str]) -> str:
    return ", ".join(choices[group] for group in ("data", "model", "optimizer"))
