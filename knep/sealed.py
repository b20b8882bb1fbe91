"""How often a run has read its test split: chosen by validation, a model is tested once, and a second look counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knep.files import write_summary


def reads(folder: Path) -> int:
    """How often the run in `folder` read its test split, by its summary.json; 0 where there is none."""
    return int(_summary(folder).get("sealed", 0))


def read_again(run: Path) -> None:
    """Counts one more reading in the summary of a finished run; run: its folder, or a file somewhere below it."""
    for folder in (run, *run.parents[:3]):
        summary = _summary(folder)
        if "sealed" in summary:
            write_summary(folder, {**summary, "sealed": summary["sealed"] + 1})
            return


def _summary(folder: Path) -> Mapping[str, Any]:
    path = folder / "summary.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
