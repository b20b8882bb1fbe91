"""docs/performance.md is written from the bench's JSON files, a section each."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.bench import bars

_STORED = {
    "kind": "guard",
    "command": "python -m scripts.bench guard",
    "where": {"processor": "a CPU", "threads": 1},
    "found": {"mlp_64": {"wall": 0.1, "wall_fastest": 0.1, "cpu": 0.125, "cpu_fastest": 0.1, "steps": 400}},
}


def test_a_section_is_replaced_by_its_measurement_and_the_others_stay(tmp_path: Path) -> None:
    (tmp_path / "guard.json").write_text(json.dumps(_STORED))
    page = bars.page(tmp_path, "# Old\n\nintro\n\n## guard\n\nold\n\n## race\n\nkept | as it is\n")
    assert "12.5% of processor time" in page
    assert "over 400 steps" in page
    assert "old" not in page
    assert page.endswith("## race\n\nkept | as it is\n")
    assert bars.page(tmp_path, page) == page
