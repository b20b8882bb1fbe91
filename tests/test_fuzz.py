"""A slice of tests/exhaustive/fuzz.py: random lines, damaged folders, mutated fields end in a sane run or one line."""

import pytest

from tests.cells import thinned
from tests.exhaustive import fuzz
from tests.exhaustive.fuzzing import states as fuzz_states
from tests.exhaustive.fuzzing.arena import Outcome
from tests.exhaustive.fuzzing.mutations import Mutation

LINES, FOLDERS, STATES, SEED = 30, 20, 24, 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    fuzz.warm()
    return fuzz.finished_run(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.long
@pytest.mark.parametrize("part", thinned(range(5), 1))
def test_override_lines(part, finished):
    cases = list(fuzz.line_cases(LINES, SEED))[part::5]
    assert {case.name: wrong for case in cases if (wrong := fuzz.fight(case)[0])} == {}


@pytest.mark.parametrize("part", thinned(range(4), 1))
def test_damaged_folders(part, finished):
    cases = list(fuzz.folder_cases(FOLDERS, SEED, finished))[part::4]
    assert {case.name: wrong for case in cases if (wrong := fuzz.fight(case)[0])} == {}


@pytest.mark.long
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_mutated_fields(every, tmp_path):
    fuzz.warm()
    fuzz_states.warm()
    bases = fuzz_states.make_bases(tmp_path, ["adamw", "lion"])
    chosen = list(fuzz_states.cases(bases, STATES, SEED))[::every]
    fought = [fuzz_states.fight(case, tmp_path) for case in chosen]
    assert [f"{name}: {wrong}" for wrong, _, name in fought if wrong] == []
    assert {end for _, end, _ in fought} >= {"refused", "without consequence"}


def _judged(outcome, made, changed, work):
    case = fuzz_states.Case(fuzz_states.Base("x", work, {"evaluate": {"said": ""}}), "evaluate", "0")
    (work.parent / "outside").mkdir()
    (work.parent / "outside" / "secret").touch()
    return fuzz_states.judge(case, made, outcome, changed, work)


@pytest.mark.parametrize(
    ("outcome", "legal", "changed", "end"),
    [
        (Outcome(2, "", "knep: it is wrong", 1), False, {}, ("refused", "")),
        (
            Outcome(2, "", "knep: it is wrong", 1),
            False,
            {"config.yaml": ""},
            ("wrong", "a refusal changed config.yaml"),
        ),
        (Outcome(0, "", "", 1), False, {}, ("without consequence", "")),
        (Outcome(0, "0.5", "", 1), True, {}, ("another run's", "")),
        (Outcome(0, "0.5", "", 1), False, {}, ("wrong", "silent: said differ")),
        (Outcome(0, "", "", 1), False, {"overrides.txt": ""}, ("wrong", "removed overrides.txt")),
        (Outcome(-11, "", "", 1), False, {}, ("wrong", "exit code -11: ")),
        (Outcome(None, "", "", 1), False, {}, ("wrong", "hangs")),
    ],
)
def test_the_judge_of_mutated_fields(outcome, legal, changed, end, tmp_path):
    (tmp_path / "work").mkdir()
    made = Mutation("state_dict.w", "other numbers", legal)
    assert _judged(outcome, made, changed, tmp_path / "work") == end


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
