"""A study from its YAML to its report: killed in the middle, with an arm that fails and one that is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from knep.cli import main
from knep.config.compose import compose_config
from knep.errors import InputError
from knep.evidence import trials
from knep.evidence.effects import (
    Metric,
    Row,
    by_arm,
    default_target,
    median,
    metric_of,
    of_classes,
    table,
    with_failures,
)
from knep.evidence.effects import (
    tested as accuracy_of,
)
from knep.evidence.report import cells, columns, page, results, show
from knep.evidence.stats import paired
from knep.evidence.study import names, read, study
from knep.utils.monitors import OF_TASK

TINY = """
title: Tiny <script>alert(1)</script> & co
slot: optimizer
control: plain
seeds: 2
common: [recipe=none, data=digits, data.limit=100, data.batch_size=50, model=mlp, "model.widths=[8]", scaling=unit,
         trainer=cpu, trainer.precision=32-true, trainer.max_epochs=2]
arms:
  plain: [optimizer=sgd]
  adam: [optimizer=adam]
  exploding: [optimizer=sgd, optimizer.lr=1e30]
  refused: [init=whiten_first]
"""


NUMBERS = ["task=regression", "data=synthetic", "data.images=120", "data.image_size=8", "data.batch_size=24"]
NUMBERS += ["model=mlp", "model.widths=[8]", "trainer=cpu", "trainer.precision=32-true", "trainer.max_epochs=1"]
NUMBERS += ["augment=none", "regularization=none", "scaling=standardize"]


def kept(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "trials").glob("*.json")}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a study of 8 trials that was killed after the first ones, with what was kept by then."""
    home = tmp_path_factory.mktemp("study")
    (home / "tiny.yaml").write_text(TINY)
    command = [sys.executable, "-m", "knep.cli", "study", str(home / "tiny.yaml"), f"out={home}/out"]
    child = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, env=os.environ)
    until = time.monotonic() + 240
    while len(kept(home / "out")) < 2 and time.monotonic() < until and child.poll() is None:
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return home, kept(home / "out")


@pytest.fixture(scope="module")
def finished(killed):
    """The same study, called again: its exit code, how many trials it ran, and its folder."""
    home, _ = killed
    ran = []
    whole = trials._in_process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "_in_process", lambda *a: ran.append(a[1].key) or whole(*a))
        code = study([str(home / "tiny.yaml"), f"out={home}/out"])
    return code, ran, home / "out"


def test_a_killed_study_goes_on_with_what_is_missing(killed, finished):
    _, before = killed
    _, ran, out = finished
    after = kept(out)
    assert 2 <= len(before) < 8
    assert len(ran) == 8 - len(before)
    assert len(after) == 8
    assert all(after[name] == time for name, time in before.items())


def test_a_trial_that_fails_stays_as_failed_and_one_that_cannot_be_is_refused(finished):
    code, _, out = finished
    assert code == 1
    found = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert found["arms"]["exploding"]["status"] == ["failed", "failed"]
    assert found["arms"]["exploding"]["test_acc"] == [0.1, 0.1]
    assert "whiten_first" in found["refused"]["refused"]
    assert "refused" not in found["arms"]
    rows = {row["arm"]: row for row in found["effects"]}
    assert set(rows) == {"adam", "exploding"}
    assert "2 of 2 failed" in rows["exploding"]["verdict"]
    assert found["arms"]["adam"]["reads_of_test"] == [1, 1]
    assert found["arms"]["adam"]["command"].startswith("python train.py recipe=none data=digits")
    records = [json.loads(path.read_text()) for path in (out / "trials").glob("*.json")]
    assert {r["classes"] for r in records if r["status"] == "finished"} == {10}
    assert {(r["seed"], next(w for w in r["overrides"] if w.startswith("seed="))) for r in records} == {
        (0, "seed=0"),
        (1, "seed=1"),
    }


def test_its_report_is_one_page_that_asks_for_nothing_and_runs_nothing(finished):
    html = (finished[2] / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in html
    assert "<script" not in html
    links = set(re.findall(r"https?://[^\"'<\s]+", html))
    namespaces = (
        "http://www.w3.org/",
        "http://purl.org/dc/",
        "http://creativecommons.org/ns",
        "https://matplotlib.org/",
    )
    assert all(link.startswith(namespaces) for link in links), links  # names inside SVG, which nothing loads
    assert not re.findall(r"(?:src|href)=\"(?!#)(?!http://www.w3.org)", html)
    assert html.count("<svg") == 3
    assert len((finished[2] / "effects.csv").read_text().splitlines()) == 3


def test_arms_that_differ_in_the_seed_alone_have_that_seed_everywhere():
    from knep.config.compose import compose_config
    from knep.evidence.arms import Arm

    (one,) = trials.plan([Arm("a", ("optimizer=sgd",))], [7])
    whole = compose_config(["optimizer=sgd", "seed=7"])
    assert one.made.config == whole.config
    assert one.made.overrides == whole.overrides


def record(acc=None, steps=(10, 20), curve=(0.5, 0.9), status="finished", **more):
    points = [{"step": s, "val/acc": a} for s, a in zip(steps, curve, strict=True)]
    measured = {} if acc is None else {"test/acc": acc}
    return {"status": status, "curve": points, "cpu_seconds": 2.0, "peak_mib": 100.0, "overrides": []} | measured | more


def two_arms(treated, control):
    from knep.evidence.arms import Arm

    arms = [Arm("off", ()), Arm("on", (), "off", "clip", "norm")]
    records = {str(i): r for i, r in enumerate([*control, *treated])}
    keys = {(name, s): str(s + len(control) * (name == "on")) for name in ("off", "on") for s in range(len(control))}
    return arms, by_arm(arms, range(len(control)), keys, records)


def test_a_failure_counts_with_the_accuracy_of_guessing():
    assert accuracy_of(record(status="failed"), of_classes(4)) == 0.25
    assert accuracy_of(record(0.97, status="failed"), of_classes(10)) == 0.1  # a network whose loss is NaN
    arms, sides = two_arms([record(0.9), record(0.9), record(status="failed")], [record(0.9)] * 3)
    (row,) = table(arms, sides, of_classes(10), 0.8)
    assert row.effect.mean == pytest.approx(-0.8 / 3)
    assert (row.failed, row.n, row.verdict) == (1, 3, "too few pairs, 1 of 3 failed")


def test_the_target_is_one_that_the_control_reaches():
    arms, sides = two_arms([record(0.9, curve=(0.2, 0.99))] * 2, [record(0.9, curve=(0.9, 0.8))] * 2)
    assert default_target(arms, sides, Metric()) == pytest.approx(0.99 * 0.9)
    assert default_target(arms, {**sides, "off": {0: record(status="failed", curve=(), steps=())}}, Metric()) is None


def test_steps_to_the_target_and_costs_are_those_of_the_records():
    fast, slow = record(0.9, curve=(0.85, 0.9), cpu_seconds=3.0), record(0.9, cpu_seconds=2.0)
    (row,) = table(*two_arms([fast, fast], [slow, slow]), of_classes(10), 0.8)
    assert row.steps is not None
    assert (row.steps.mean, row.unreached, row.time, row.memory) == (-10, 0, 1.5, 1.0)
    assert row.steps.low < -10 < row.steps.high
    assert median({0: {}}, "cpu_seconds") != median({0: {}}, "cpu_seconds")  # NaN where every process was killed


@pytest.mark.parametrize("with_trick", [True, False])
def test_a_run_that_never_arrives_has_no_steps(with_trick):
    never, slow = record(0.9, curve=(0.1, 0.2)), record(0.9)
    sides = ([never, slow], [slow, slow]) if with_trick else ([slow, slow], [slow, never])
    arms, records = two_arms(*sides)
    (row,) = table(arms, records, of_classes(10), 0.8)
    assert (row.steps, row.unreached, row.control_unreached) == (None, int(with_trick), int(not with_trick))
    assert cells(row, Metric())[4] == f"never: 1 of 2 {'with' if with_trick else 'without'}"


RMSE = Metric("rmse", "min", failed=9.0)


def of_rmse(test=None, curve=(4.0, 2.0), **more):
    points = [{"step": s, "val/rmse": v} for s, v in zip((10, 20), curve, strict=True)]
    return record(**more) | {"curve": points} | ({} if test is None else {"test/rmse": test})


def test_of_an_error_the_lower_one_helps():
    better, worse = [of_rmse(1.0 + 0.01 * k) for k in range(5)], [of_rmse(3.0 + 0.02 * k) for k in range(5)]
    (row,) = table(*two_arms(better, worse), RMSE, None)
    assert (row.verdict, row.effect.mean) == ("helps", pytest.approx(-2.02))
    (row,) = table(*two_arms(worse, better), RMSE, None)
    assert (row.verdict, row.effect.mean) == ("hurts", pytest.approx(2.02))
    assert columns(RMSE)[3] == "test rmse (lower is better)"
    assert cells(row, RMSE)[3].startswith("+2.02 [")
    assert columns(Metric())[3] == "test accuracy"


def test_of_an_error_the_target_lies_above_and_is_reached_from_above():
    fast, slow = of_rmse(1.0, curve=(1.9, 1.8)), of_rmse(1.0, curve=(3.0, 2.0))
    arms, sides = two_arms([fast, fast], [slow, slow])
    target = default_target(arms, sides, RMSE)
    assert target == pytest.approx(1.01 * 2.0)
    (row,) = table(arms, sides, RMSE, target)
    assert row.steps is not None
    assert (row.steps.mean, row.unreached) == (-10, 0)
    (row,) = table(*two_arms([slow, slow], [fast, fast]), RMSE, 1.85)
    assert row.unreached == 2


def test_a_failure_counts_with_the_worst_error_of_those_that_ended():
    ended = [of_rmse(1.0), of_rmse(5.0), record(status="failed")]
    assert with_failures(RMSE, ended).failed == 5.0
    shares = [{"status": "finished", "test/auroc": a} for a in (0.7, 0.6)]
    assert with_failures(Metric("auroc", "max"), shares).failed == 0.6
    with pytest.raises(InputError, match="no trial ended with a test/rmse"):
        with_failures(RMSE, [record(status="failed")])


@pytest.mark.parametrize("task", sorted(OF_TASK))
def test_runs_of_each_task_are_compared_by_its_metric(task):
    net = {"segmentation": "unet", "tokens": "transformer", "tagging": "transformer"}.get(task, "mlp")
    metric = metric_of(compose_config(["recipe=none", "data=synthetic", f"task={task}", f"model={net}"]).config)
    assert (metric.name, metric.mode) == (OF_TASK[task].primary, OF_TASK[task].mode)


def test_numbers_are_ablated_by_their_error(tmp_path, capsys):
    words = ["recipe=modern", "slots=clip", "norm=none", "seeds=2", f"out={tmp_path}", *NUMBERS]
    code = main.main(["ablate", *words])
    assert code is None
    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert found["metric"] == {"name": "rmse", "mode": "min"}
    rows = {row["arm"]: row for row in found["effects"]}
    assert set(rows) == {"without clip", "only clip"}
    sides = (found["arms"][name]["test_rmse"] for name in ("without clip", "all"))
    gained = [b - a for a, b in zip(*sides, strict=True)]
    assert rows["without clip"]["effect"]["mean"] == pytest.approx(sum(gained) / 2)
    out = capsys.readouterr().out
    assert "lower is better" in out
    assert "test rmse " in out


def test_where_every_arm_is_refused_there_is_one_line(tmp_path, capsys):
    words = ["recipe=classic_2012", "slots=init", "seeds=2", f"out={tmp_path}", *NUMBERS, "calibrate=true", "data=csv"]
    table = tmp_path / "t.csv"
    table.write_text("a,y\n" + "".join(f"{k * 7 % 11},{k * 5 % 13}.5\n" for k in range(60)))
    words = [w for w in words if not w.startswith(("data.", "data=synthetic"))]
    words += [f"data.path={table}", "data.target=y", "data.batch_size=16"]
    with pytest.raises(SystemExit) as stop:
        main.main(["ablate", *words])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "nothing is left to compare, every arm is refused; all: calibrate=true is for probabilities" in err
    assert "Traceback" not in err


def test_a_report_says_which_run_read_its_test_split_twice():
    arms, sides = two_arms([record(0.9, sealed=2), record(0.9, sealed=1)], [record(0.8, sealed=1)] * 2)
    rows = table(arms, sides, of_classes(10), None)
    html = page(results("t", "c", rows, sides, of_classes(10), None), rows, {}, of_classes(10))
    assert "read more than once by: on." in html


def test_a_narrow_terminal_cuts_no_number(monkeypatch, capsys):
    effect = paired([0.91, 0.95, 0.96], [0.90, 0.93, 0.96])
    row = Row(
        "on", "clip", "norm", "choice", effect, 0.123, effect, 0, 0, 1.25, 0.75, 1, 3, "no evidence, 1 of 3 failed"
    )
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    show([row], Metric())
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, text.splitlines())) <= 60
    wanted = "".join(cells(row, Metric()))
    assert sorted(re.sub(r"\D", "", text)) == sorted(re.sub(r"\D", "", wanted))


@pytest.mark.parametrize("name", names())
def test_every_study_composes(name):
    from knep.evidence.study import arms_of

    arms = arms_of(read(name), [])
    several = len(read(name)["arms"])
    once = [*arms[:several], *(arm for arm in arms[several:] if not arm.control)]
    assert len(trials.plan(once, [0])) == len(once) >= 2  # every arm once, and the control in every group
    assert len({arm.name for arm in arms}) == len(arms)
    assert {arm.control for arm in arms} - {""} <= {arm.name for arm in arms}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study"], "give a study: "),
        (["study", "dropuot"], "there is no study dropuot"),
        (["study", "dropout", "seeds=1"], "seeds=1 is no whole number from 2 on"),
        (["study", "dropout", "seed=3"], "a study runs the seeds 0, 1"),
        (["study", "dropout", "loud"], "loud is no setting"),
        (["study", "dropout", "target=93"], "target=93 is no validation accuracy"),
        (["study", "dropout", "optimizer.lrr=1"], "there is no key optimizer.lrr: did you mean"),
        (["ablate", "recipe=modrn"], "recipe=modrn"),
        (["ablate", "recipe=none"], "recipe=none picks no trick"),
        (["ablate", "recipe=modern", "slots=dropout"], "slots=dropout: recipe=modern has no trick there"),
        (["ablate", "processes=two"], "processes=two is no whole number"),
        (["ledger", "slots=optimiser"], "slots=optimiser is not in the ledger"),
        (["ledger", "optimizer.lr=1"], "optimizer.lr=1: the ledger takes"),
        (["verify"], "give a card"),
        (["verify", "adamx"], "there is no measured card adamx"),
        (["cards", "a", "b"], "cards takes one folder"),
    ],
)
def test_bad_words_are_one_line(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main.main(words)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("knep: ")
    assert err.count("\n") == 1
    assert said in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "title: [",
        "title: x\n",
        TINY.replace("control: plain", "control: other"),
        TINY.replace("[optimizer=adam]", "optimizer=adam"),
    ],
)
def test_a_study_that_is_none_is_one_line(text, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main.main(["study", str(tmp_path / "bad.yaml")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
