"""The clinic: sick and healthy training runs with known causes, judged by knep's doctor and by others.

`python -m scripts.clinic` first trains every sick case against its healthy twin: a case counts only if training
measurably suffers. Then each case is examined in a child process, and a table says, per disease and in all, how many of
the sick were found and how many of the healthy were called sick, whether the cause was named, on top or among the
findings, and the seconds an examination took. `--cure` also says how many of those that overrides can mend were mended.
Whatever was measured is kept under outputs/clinic and not measured again; `--afresh` forgets the diagnoses.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from scripts.clinic.cases.case import Case
from scripts.clinic.cases.catalogue import cases
from scripts.clinic.peers import PEERS
from scripts.clinic.rounds import checked, cured, examined
from scripts.clinic.table import page, rows, shown, totals


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--half", choices=("A", "B", "both"), default="both", help="thresholds are set on A alone")
    parser.add_argument("--only", action="append", help="a disease, healthy, or a case's name; repeatable")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every Nth of the cases")
    parser.add_argument("--limit", type=int, help="cases at most")
    parser.add_argument("--check", action="store_true", help="check alone that the sick are sick")
    parser.add_argument("--cure", action="store_true", help="cure as well")
    parser.add_argument("--cure-every", type=int, default=1, metavar="N", help="cure every Nth of those that can be")
    parser.add_argument("--doctors", nargs="+", choices=("knep", *PEERS), default=["knep"])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--afresh", action="store_true", help="forget the diagnoses of these cases")
    parser.add_argument("--folder", type=Path, default=Path("outputs/clinic"))
    parser.add_argument("--page", type=Path, help="write the tables as Markdown too")
    parser.add_argument("--note", default="", help="a sentence for the page: when and how it was measured")
    asked = parser.parse_args(argv)
    chosen = select(list(cases().values()), asked.half, asked.only)[:: asked.every][: asked.limit]
    asked.folder.mkdir(parents=True, exist_ok=True)
    counted = checked(chosen, asked.folder, asked.processes)
    if asked.check:
        return 0
    sections = []
    for doctor in asked.doctors:
        if doctor != "knep" and find_spec(doctor.replace("-", "_")) is None:
            raise SystemExit(f"{doctor} is not installed: pip install 'knep[bench]'")
        found = examined(doctor, counted, asked.folder, asked.processes, asked.afresh)
        chosen = [case for case in counted if case.curable][:: asked.cure_every]
        mended = cured(chosen, asked.folder, asked.processes, asked.afresh) if asked.cure and doctor == "knep" else {}
        section = f"{doctor}, half {asked.half}", rows(counted, found, mended), totals(counted, found, mended)
        print(shown(*section))
        sections.append(section)
    if asked.page:
        words = list(sys.argv[1:] if argv is None else argv)
        if "--note" in words:  # it stands on the page itself
            at = words.index("--note")
            del words[at : at + 2]
        command = shlex.join(["python", "-m", "scripts.clinic", *words])
        asked.page.write_text(page(sections, command, asked.note), encoding="utf-8")
    return 0


def select(known: Sequence[Case], half: str, only: Sequence[str] | None) -> list[Case]:
    """The cases that are asked for, in the catalogue's order. Raises SystemExit where none is."""
    wanted = [
        case
        for case in known
        if half in ("both", case.half)
        and (not only or any(word in (case.disease, case.name) or case.name.startswith(f"{word}/") for word in only))
    ]
    if not wanted:
        raise SystemExit("no case is called so: write a disease of knep/doctor/diseases.yaml, or healthy")
    return wanted


if __name__ == "__main__":
    raise SystemExit(main())
