"""What was seen of the rates: the range tests above, the trials below, over one axis."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from knep.evidence.rate.find import Found


def draw(found: Found, path: Path, title: str) -> None:
    """Writes the picture. Raises OSError where it cannot."""
    figure = Figure(figsize=(7, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for seed, curve in enumerate(found.curves):
        above.plot(
            curve.rates,
            curve.smooth,
            color="C0",
            alpha=0.7,
            label=f"range test, {len(found.curves)} seeds" if not seed else None,
        )
    first = [curve.smooth[0] for curve in found.curves if curve.losses]
    if first:
        least = min(min(v for v in curve.smooth if math.isfinite(v)) for curve in found.curves if curve.losses)
        above.set_ylim(least - 0.1 * (max(first) - least), max(first) + 0.5 * (max(first) - least) or None)
    means = {rate: statistics.fmean(losses) for rate, losses in sorted(found.losses.items())}
    shown = {rate: mean for rate, mean in means.items() if math.isfinite(mean)}
    below.plot(list(shown), list(shown.values()), "o-", color="C0", label=f"mean of {len(found.curves)} seeds")
    for rate in shown:
        below.plot([rate] * len(found.losses[rate]), found.losses[rate], ".", color="C0", alpha=0.4)
    for rate in set(means) - set(shown):
        below.axvline(rate, color="C3", alpha=0.4, label="diverged" if rate == min(set(means) - set(shown)) else None)
    for axes in (above, below):
        axes.axvline(found.default, color="0.5", linestyle=":", label=f"default {found.default:.3g}")
        axes.axvline(found.suggestion, color="C2", linestyle="--", label=f"found {found.suggestion:.2g}")
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    above.set_ylabel("training loss, smoothed")
    below.set_ylabel(f"validation loss after {found.steps} steps")
    below.set_xlabel("learning rate")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
