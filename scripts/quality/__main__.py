"""How well knep learns real data, beside what people would use, with the same rows in the same splits.

python -m scripts.quality diamonds|diabetes|letter|bytes|scenes|yeast [--seeds 5] [--first 0] [overrides of knep's run]

Each seed draws the splits too; settings are chosen by --val --first 100, whose seeds no row reports. It needs, beside
knep, for diamonds Debian's r-cran-ggplot2 and for letter its r-cran-mlbench, both with `pip install rdata`; for yeast
`pip install river`; for the others nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from knep.errors import InputError
from knep.evidence.stats import paired
from scripts.quality.runs import BARS, Bar, Score, by_knep, by_rival, composed

OUT = Path("outputs/quality")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures one data set, prints a line for each contender and keeps all scores in outputs/quality."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(BARS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed: --first 100 runs 100, 101, ...")
    parser.add_argument("--val", action="store_true", help="knep alone, on the validation split: to choose settings by")
    asked, extra = parser.parse_known_args(argv)
    bar = BARS[asked.name]
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = bar.source(Path(folder))
            if asked.val:
                bar = Bar(bar.metric.replace("test/", "val/"), bar.lower, bar.source, bar.lines, {})
            found = measured(bar, path, range(asked.first, asked.first + asked.seeds), extra)
    except InputError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    print(f"knep train {shlex.join([*bar.lines, *extra])}")
    for line in table(bar, found):
        print(line)
    if not asked.val:
        OUT.mkdir(parents=True, exist_ok=True)
        kept = {who: [vars(score) for score in scores] for who, scores in found.items()}
        (OUT / f"{asked.name}.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return 0


def measured(bar: Bar, path: Path, seeds: Sequence[int], extra: Sequence[str] = ()) -> dict[str, list[Score]]:
    """Scores of knep and of each rival, a seed after the other."""
    found: dict[str, list[Score]] = {who: [] for who in ("knep", *bar.rivals)}
    for seed in seeds:
        made = composed(bar, path, seed, extra)
        found["knep"].append(by_knep(bar, made))
        for name in bar.rivals:
            found[name].append(by_rival(bar, name, made))
        shown = ", ".join(f"{who} {scores[-1].value:.4g} ({scores[-1].seconds:.0f} s)" for who, scores in found.items())
        print(f"seed {seed}: {shown}", flush=True)
    return found


def table(bar: Bar, found: Mapping[str, Sequence[Score]]) -> list[str]:
    """Rows of Markdown: mean, deviation, and knep's paired difference to each rival with its 95 % interval."""
    lines = [f"| | {bar.metric} | knep minus it | n | seconds of a processor |", "|---|---|---|---|---|"]
    ours = [score.value for score in found["knep"]]
    for who, scores in found.items():
        values = [score.value for score in scores]
        deviation = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
        against = ""
        if who != "knep" and len(values) > 1:
            gap = paired(ours, values)
            share = gap.mean / statistics.fmean(values)
            against = f"{gap.mean:+.3g} [{gap.low:+.3g}, {gap.high:+.3g}], {share:+.1%}"
        seconds = statistics.fmean(score.seconds for score in scores)
        lines.append(
            f"| {who} | {statistics.fmean(values):.4g}{deviation} | {against} | {len(values)} | {seconds:.0f} |"
        )
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
