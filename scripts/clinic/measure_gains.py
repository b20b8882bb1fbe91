"""What remedies gain where nothing is wrong, for the doctor: knep/doctor/trials/gains.json.

`python -m scripts.clinic.measure_gains` writes it. Examines those healthy cases of the clinic's half A that learn; for
each disease the largest gain, as accuracy, of any remedy tried for it. The doctor believes a remedy only where it gains
more.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from scripts.clinic.cases.case import patient
from scripts.clinic.cases.catalogue import cases
from scripts.clinic.rounds import checked
from scripts.clinic.workers import each

OUT = Path(__file__).parents[2] / "knep" / "doctor" / "trials" / "gains.json"
LIMIT = 300.0  # seconds


def tried(name: str) -> list[list]:
    """[disease, remedy, gain] of every remedy that was tried on a case."""
    from knep.doctor.diagnose import diagnose

    return diagnose(patient(cases()[name])).measured.get("remedies", [])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("outputs/clinic"))
    asked = parser.parse_args()
    known = [case for case in cases().values() if not case.disease and case.half == "A"]
    asked.folder.mkdir(parents=True, exist_ok=True)
    names = [case.name for case in checked(known, asked.folder, asked.processes)]
    gains: dict[str, list[float]] = defaultdict(list)
    counted = 0
    for name, rows in each(tried, names, asked.processes, LIMIT):
        if isinstance(rows, dict):
            print(f"{name}: {rows['failure']}", flush=True)
            continue
        counted += 1
        best: dict[str, float] = {}
        for disease, _, gain in rows:
            best[disease] = max(gain, best.get(disease, 0.0))
        for disease, gain in best.items():
            gains[disease].append(gain)
    table = {
        "cases": counted,
        "tried": {disease: len(column) for disease, column in sorted(gains.items())},
        "largest": {disease: max(column) for disease, column in sorted(gains.items())},
    }
    OUT.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
