"""The race to an accuracy, from the runs that `knep seeds` keeps; and which of them it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from knep.evidence import seeds
from scripts.bench import bars, race


def _measured(test: float, curves: list[list[float]], cpu: float) -> dict[str, Any]:
    runs = {str(i): {"cpu_seconds": cpu, "val_curve": curve} for i, curve in enumerate(curves)}
    return {"command": "python train.py seed=3", "n": len(runs), "test_acc_mean": test, "runs": runs}


def _race(folder: Path, monkeypatch: pytest.MonkeyPatch, fast: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    for name, measured in (("FAST", fast), ("PLAIN", plain)):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(measured))
        monkeypatch.setattr(race, name, path)
    monkeypatch.setattr(race, "PLOT", folder / "plot.png")
    return race.race()


def test_times_go_to_the_end_of_the_recipe_and_to_the_best_epoch_of_plain_adam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = _measured(0.945, [[0.90, 0.93, 0.94, 0.95], [0.92, 0.91, 0.94, 0.95]], cpu=40.0)
    plain = _measured(0.92, [[0.90, 0.91, 0.92, 0.91], [0.93, 0.92, 0.92, 0.92]], cpu=100.0)
    found = _race(tmp_path, monkeypatch, fast, plain)
    assert found["fast"]["seconds"] == 40
    assert found["plain"]["seconds"] == (75 + 25) / 2
    assert found["ratio"] == 1.25
    assert found["shared"] == {"val": 0.925, "seconds": (20 + 30) / 2, "ratio": 2.0}
    fast_again = f"knep seeds --seeds 2 --out {tmp_path}/FAST.json seed=3"
    assert found["commands"] == [fast_again, fast_again.replace("FAST", "PLAIN")]
    assert (tmp_path / "plot.png").stat().st_size > 1000
    verdicts = [row[3] for row in bars.rows("race", found)]
    assert verdicts == ["pass", "short", ""]


def test_a_recipe_that_stays_below_plain_adam_has_no_time_to_its_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _race(tmp_path, monkeypatch, _measured(0.9, [[0.90]], 9.0), _measured(0.92, [[0.92]], 9.0))
    assert found["shared"] is None
    assert [row[3] for row in bars.rows("race", found)] == ["short", "short"]


def test_runs_of_a_config_that_has_changed_since_are_not_kept(tmp_path: Path) -> None:
    lines = ["model=mlp", "threads=1"]
    runs = {"0": {"config_hash": seeds.hashed(lines, 0)}, "1": {"config_hash": seeds.hashed(lines, 0)}}
    path = tmp_path / "kept.json"
    path.write_text(json.dumps({"command": "python train.py model=mlp threads=1", "runs": runs}))
    assert list(seeds.earlier(path, lines)) == [0]
    assert seeds.earlier(path, [*lines, "optimizer.lr=0.5"]) == {}
    assert seeds.earlier(tmp_path / "none.json", lines) == {}
