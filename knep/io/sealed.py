"""How often a run has read its test split: chosen by validation, a model is tested once, and a second look counts."""

from __future__ import annotations

from pathlib import Path

from knep.io.run_folder import read_summary, write_summary


def reads(folder: Path) -> int:
    """How often the run in `folder` read its test split, by its summary.json; 0 where there is none."""
    return read_summary(folder).get("sealed", 0)


def begin_reading(folder: Path) -> int:
    """Counts a reading of the test split before it begins, so that no kill hides it; returns the count."""
    count = reads(folder) + 1
    write_summary(folder, {**read_summary(folder), "sealed": count})
    return count


def read_again(run: Path) -> None:
    """Counts one more reading in the summary of a finished run; run: its folder, or a file somewhere below it."""
    folder = run if run.is_dir() else run.parent.parent if run.parent.name == "checkpoints" else run.parent
    for place in (folder, folder.parent) if folder.name.startswith("member_") else (folder,):
        summary = read_summary(place)
        if "sealed" in summary:
            write_summary(place, {**summary, "sealed": summary["sealed"] + 1})
            return
