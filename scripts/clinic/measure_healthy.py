"""Measures the marks of networks that learn, for the doctor: knep/doctor/model/healthy.json.

`python -m scripts.clinic.measure_healthy` writes it. Each network is a patient on digits or synthetic images. Its marks
are taken before training, and count only if it then learns in a short trial, to a validation accuracy far above chance.
The file keeps all values of each mark, sorted: the doctor reads quantiles of them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from knep.doctor.model.healthy_ranges import marks
from knep.doctor.model.signal_pass import signals
from knep.doctor.trials import run
from scripts.clinic.healthy_nets import sound

OUT = Path(__file__).parents[2] / "knep" / "doctor" / "model" / "healthy.json"


def main() -> None:
    values: dict[str, list[float]] = defaultdict(list)
    left_out: list[str] = []
    for net in sound():
        patient = net.build()
        seen = run.run(patient, net.steps, looks=2)
        acc = max(seen.best.acc, seen.batch_stats.acc if seen.batch_stats else 0.0)  # running statistics lag behind
        found = marks(signals(patient))
        print(f"{net.name:70} {acc:6.1%} " + " ".join(f"{k}={v:.2f}" for k, v in found.items()), flush=True)
        if acc < net.bar:
            left_out.append(net.name)
            continue
        for key, value in found.items():
            values[key].append(round(value, 2))
    table = {"left_out": left_out, "marks": {key: sorted(column) for key, column in sorted(values.items())}}
    OUT.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"{len(left_out)} did not learn and were left out: {', '.join(left_out)}")


if __name__ == "__main__":
    main()
