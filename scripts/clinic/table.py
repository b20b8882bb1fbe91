"""The clinic's table: per disease and in all."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.clinic.cases.case import Case

Rows = Mapping[str, Mapping[str, Any]]
_WITHIN = 0.02  # of the twin's accuracy


def named(row: Mapping[str, Any]) -> list[frozenset[str]]:
    """What each finding of a diagnosis may mean, the gravest first; none after a failure."""
    return [frozenset(finding[0].split("|")) for finding in row.get("findings", ())]


def right(case: Case, names: Sequence[frozenset[str]]) -> bool:
    """Whether one of these findings names a cause of the case."""
    return any(name & set(case.causes) for name in names)


def counts(cases: Sequence[Case], found: Rows, cured: Rows) -> dict[str, Any]:
    """Of cases of one kind: how many there are, were called sick, got the right cause on top, among all, were cured."""
    names = [named(found[case.name]) for case in cases]
    pairs = list(zip(cases, names, strict=True))
    seconds = [found[case.name]["seconds"] for case in cases if "seconds" in found[case.name]]
    mended = [cured[case.name] for case in cases if case.name in cured]
    return {
        "cases": len(cases),
        "found": sum(bool(n) for n in names),
        "top": sum(right(case, n[:1]) for case, n in pairs),
        "strict": sum(bool(n) and case.disease in n[0] for case, n in pairs),
        "among": sum(right(case, n) for case, n in pairs),
        "curable": len(mended),
        "cured": sum("acc" in row and row["acc"] >= row["twin_acc"] - _WITHIN for row in mended),
        "failed": sum("failure" in found[case.name] for case in cases),
        "seconds": round(statistics.median(seconds), 1) if seconds else 0.0,
        "slowest": max(seconds, default=0.0),
    }


def rows(cases: Sequence[Case], found: Rows, cured: Rows) -> list[dict[str, Any]]:
    """A row for each disease; the misses of each with the first three findings."""
    out = []
    for disease in dict.fromkeys(case.disease for case in cases):
        those = [case for case in cases if case.disease == disease]
        misses = [f"{case.name}: {_said(found[case.name])}" for case in those if not _passed(case, found[case.name])]
        out.append({"disease": disease or "healthy", "misses": misses} | counts(those, found, cured))
    return out


def _passed(case: Case, row: Mapping[str, Any]) -> bool:
    names = named(row)
    return "failure" not in row and (right(case, names[:1]) if case.disease else not names)


def _said(row: Mapping[str, Any]) -> str:
    """The first three findings, or why there are none."""
    return row.get("failure") or ", ".join(finding[0] for finding in row["findings"][:3]) or "healthy"


def totals(cases: Sequence[Case], found: Rows, cured: Rows) -> dict[str, float]:
    """Shares of all, in percent; a doctor that fails has not found a sick case, and not cleared a healthy one."""
    sick = counts([case for case in cases if case.disease], found, cured)
    well = counts([case for case in cases if not case.disease], found, cured)
    return {
        "recall": _share(sick["found"], sick["cases"]),
        "false_alarms": _share(well["found"] + well["failed"], well["cases"]),
        "top": _share(sick["top"], sick["cases"]),
        "top_strict": _share(sick["strict"], sick["cases"]),
        "among": _share(sick["among"], sick["cases"]),
        "cured": _share(sick["cured"], sick["curable"]),
        "sick": sick["cases"],
        "healthy": well["cases"],
        "seconds": sick["seconds"],
        "slowest": max(sick["slowest"], well["slowest"]),
    }


def _share(part: int, whole: int) -> float:
    return round(100 * part / whole, 2) if whole else float("nan")


def shown(title: str, table: Sequence[Mapping[str, Any]], total: Mapping[str, float]) -> str:
    """Text for the terminal."""
    lines = [title, f"{'':32}{'cases':>6}{'found':>7}{'top':>6}{'among':>7}{'cured':>9}{'seconds':>9}"]
    for row in table:
        cured = f"{row['cured']}/{row['curable']}" if row["curable"] else "-"
        told = (row["disease"], row["cases"], row["found"], row["top"], row["among"], cured, row["seconds"])
        lines.append("{:32}{:>6}{:>7}{:>6}{:>7}{:>9}{:>9}".format(*told))
    lines += [f"  {miss}" for row in table for miss in row["misses"]]
    lines.append("  ".join(f"{name} {value:g}" for name, value in total.items()))
    return "\n".join(lines)


_BARS = (
    ("recall", "sick found", ">=", 99.0),
    ("false_alarms", "healthy called sick", "<=", 1.0),
    ("top", "right cause on top", ">=", 92.0),
    ("among", "right cause among the findings", ">=", 98.0),
    ("cured", "cured, of what overrides can mend", ">=", 98.5),
)


def _side_by_side(
    sections: Sequence[tuple[str, Sequence[Mapping[str, Any]], Mapping[str, float]]],
) -> list[str]:
    """A table with a column for each doctor; only knep cures."""
    lines = [f"| what | bar | {' | '.join(title for title, _, _ in sections)} |", "|---" * (2 + len(sections)) + "|"]
    for key, what, sign, bar in _BARS:
        values = (f"{total[key]:g}" if total[key] == total[key] else "" for _, _, total in sections)
        lines.append(f"| {what} | {sign} {bar:g} | {' | '.join(values)} |")
    seconds = (f"{total['seconds']:g}" for _, _, total in sections)
    return [*lines, f"| median seconds of a sick case | | {' | '.join(seconds)} |"]


def page(
    sections: Sequence[tuple[str, Sequence[Mapping[str, Any]], Mapping[str, float]]], command: str, note: str
) -> str:
    """docs/clinic.md: for each doctor the shares of all against the bars, then a row for each disease and the misses.

    sections: (title, rows, totals) of each doctor, of whom the first one's misses are listed; note: when and how it was
    measured, "" for nothing to say.
    """
    lines = [
        "# The clinic",
        "",
        f"Written by `{command}`; do not edit.",
        "Thresholds were set on half A; what follows is on the halves named.",
        "A sick case counts only where training measurably suffers against its healthy twin, a healthy one only where",
        "it learns. Shares in percent of all cases; `top` counts a cause that is as right (capacity and overfitting of",
        "the same few images), `top_strict` in the last line does not. Seconds are of one core of a shared machine.",
    ]
    lines += ["", note] if note else []
    if len(sections) > 1:
        lines += ["", *_side_by_side(sections)]
    for number, (title, table, total) in enumerate(sections):
        lines += ["", f"## {title}", "", "| what | bar | measured | |", "|---|---|---|---|"]
        for key, what, sign, bar in _BARS:
            value = total[key]
            passed = value >= bar if sign == ">=" else value <= bar
            verdict = "not measured" if value != value else "pass" if passed else "short"
            lines.append(f"| {what} | {sign} {bar:g} | {value:g} | {verdict} |")
        lines += ["", "| disease | cases | found | top | among | cured | seconds |", "|---|---|---|---|---|---|---|"]
        for row in table:
            cured = f"{row['cured']} of {row['curable']}" if row["curable"] else ""
            told = (row["disease"], row["cases"], row["found"], row["top"], row["among"], cured, row["seconds"])
            lines.append(f"| {' | '.join(map(str, told))} |")
        lines += ["", ", ".join(f"{name} {value:g}" for name, value in total.items()) + "."]
        misses = [f"- {miss}" for row in table for miss in row["misses"]] if not number else []
        lines += ["", "Not as they should be, with the first three findings:", "", *misses] if misses else []
    return "\n".join(lines) + "\n"
