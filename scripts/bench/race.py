"""Two ways to an accuracy, by processor time: a speed recipe, and plain Adam on the same network, from docs/evidence.

Both are measured by `knep seeds` with threads=1; an epoch of a run takes the same work, so a run's processor time
is shared out evenly over its epochs.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FAST, PLAIN = Path("docs/evidence/fashion_speedrun.json"), Path("docs/evidence/fashion_adam.json")
PLOT = Path("docs/images/speedrun.png")
AIM = 0.94  # test accuracy


def race() -> dict[str, Any]:
    """Processor seconds of the recipe's whole run, of plain Adam up to its best epoch by validation, and their ratio.

    shared: the same two of the validation accuracy that both reach, plain Adam's best in the mean. Draws both
    validation curves. Raises FileNotFoundError where one was not measured.
    """
    fast, plain = (json.loads(path.read_text(encoding="utf-8")) for path in (FAST, PLAIN))
    to_aim = statistics.fmean(run["cpu_seconds"] for run in fast["runs"].values())
    to_best = statistics.fmean(_seconds_to_best(run) for run in plain["runs"].values())
    _draw({"fashion_speedrun": fast, "Adam 1e-3, float32, no tricks": plain})
    return {
        "aim": AIM,
        "fast": {"n": fast["n"], "test": fast["test_acc_mean"], "seconds": round(to_aim, 1)},
        "plain": {"n": plain["n"], "test": plain["test_acc_mean"], "seconds": round(to_best, 1)},
        "ratio": round(to_best / to_aim, 2),
        "shared": _shared(fast, plain, to_best),
        "commands": [_command(FAST, fast), _command(PLAIN, plain)],
    }


def _command(path: Path, measured: Mapping[str, Any]) -> str:
    """What measures again what lies at `path`."""
    _, _, overrides = measured["command"].partition("train.py ")
    return f"knep seeds --seeds {measured['n']} --out {path} {overrides}"


def _seconds_to_best(run: Mapping[str, Any]) -> float:
    curve = run["val_curve"]
    return run["cpu_seconds"] * (1 + curve.index(max(curve))) / len(curve)


def _shared(fast: Mapping[str, Any], plain: Mapping[str, Any], to_best: float) -> dict[str, Any] | None:
    """The recipe's way to plain Adam's best; None where one of its runs never gets there."""
    best = statistics.fmean(max(run["val_curve"]) for run in plain["runs"].values())
    seconds = []
    for run in fast["runs"].values():
        epochs = next((i + 1 for i, accuracy in enumerate(run["val_curve"]) if accuracy >= best), None)
        if epochs is None:
            return None
        seconds.append(run["cpu_seconds"] * epochs / len(run["val_curve"]))
    mean = statistics.fmean(seconds)
    return {"val": round(best, 4), "seconds": round(mean, 1), "ratio": round(to_best / mean, 2)}


def _draw(runs: Mapping[str, Mapping[str, Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for colour, (name, measured) in zip(("tab:blue", "tab:orange"), runs.items(), strict=True):
        label: str | None = f"{name}: test {measured['test_acc_mean']:.2%} (n = {measured['n']})"
        for run in measured["runs"].values():
            share = run["cpu_seconds"] / 60 / len(run["val_curve"])
            minutes = [share * (i + 1) for i in range(len(run["val_curve"]))]
            axes.plot(minutes, [100 * a for a in run["val_curve"]], color=colour, alpha=0.6, lw=1.2, label=label)
            label = None
    axes.set(xlabel="processor minutes, one thread", ylabel="validation accuracy, %", title="Fashion-MNIST")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=120)
