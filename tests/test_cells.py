"""Which tests wait for `pytest -m slow`: the table names tests that are there, and some of each slot's stay."""

from pathlib import Path

import pytest

from tests.cells import mark_slow, table

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", table())
def test_a_row_names_a_test(name):
    file, test = name.split("::")
    assert f"def {test}(" in (HERE / file).read_text(encoding="utf-8")


def test_what_a_row_keeps_is_spread_over_its_cells(monkeypatch):
    class Cell:
        def __init__(self, i):
            self.path, self.originalname, self.name = HERE / "test_x.py", "test_y", f"test_y[{i}]"
            self.marks = []

        def get_closest_marker(self, name):
            return next((mark for mark in self.marks if mark.name == name), None)

        def add_marker(self, mark):
            self.marks.append(mark)

    monkeypatch.setattr("tests.cells.table", lambda: {"test_x.py::test_y": 3})
    cells = [Cell(i) for i in range(10)]
    mark_slow(cells)
    assert [i for i, cell in enumerate(cells) if cell.get_closest_marker("slow") is None] == [0, 3, 6]
