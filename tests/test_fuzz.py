"""A slice of `python scripts/fuzz.py`: random override lines and damaged folders end in a sane run or in one line."""

import fuzz
import pytest
from arena import Outcome

LINES, FOLDERS, SEED = 30, 20, 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    fuzz.warm()
    return fuzz.finished_run(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.long
@pytest.mark.parametrize("part", range(3))
def test_override_lines(part, finished):
    cases = list(fuzz.line_cases(LINES, SEED))[part::3]
    assert {case.name: wrong for case in cases if (wrong := fuzz.fight(case)[0])} == {}


@pytest.mark.parametrize("part", range(4))
def test_damaged_folders(part, finished):
    cases = list(fuzz.folder_cases(FOLDERS, SEED, finished))[part::4]
    assert {case.name: wrong for case in cases if (wrong := fuzz.fight(case)[0])} == {}


@pytest.mark.parametrize(
    ("outcome", "wrong"),
    [
        (Outcome(None, "", "", 30), "hangs"),
        (Outcome(1, "", "Traceback (most recent call last):", 1), "exit code 1"),
        (Outcome(1, "", "knep: step 0: the loss is not finite", 1), "exit code 1"),  # and no black box
        (Outcome(2, "", "knep: it is wrong", 1), "names no key"),
        (Outcome(2, "", "seed is wrong", 1), "not one line"),
        (Outcome(0, "", "", 1), "without a summary"),
        (Outcome(2, "", "knep: seed=x is text", 1, events=("open /etc/x",)), "reaches out"),
        (Outcome(2, "", "knep: seed=x is text", 1), ""),
    ],
)
def test_the_judge(outcome, wrong, tmp_path):
    said = fuzz.judge(fuzz.Case("seed=x", lambda work: [], ("seed",)), outcome, tmp_path)
    assert wrong in said
    assert bool(said) == bool(wrong)


def test_a_run_that_the_guard_stops_is_told_by_its_line_and_its_box(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "blackbox.pt").touch()
    stopped = Outcome(1, "", "knep: step 0: the loss is not finite", 1)
    crashed = Outcome(1, "", "Traceback (most recent call last):\nknep: step 0: the loss is not finite", 1)
    case = fuzz.Case("seed=x", lambda work: [], ("seed",))
    assert fuzz.judge(case, stopped, tmp_path) == ""
    assert "exit code 1" in fuzz.judge(case, crashed, tmp_path)


def test_the_same_seed_throws_the_same_lines():
    first, second = ([case.name for case in fuzz.line_cases(8, 3)] for _ in range(2))
    assert first == second
    assert len(set(first)) == 8
