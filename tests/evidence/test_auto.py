"""`recipe=auto`: what it may spend, what it looks at, what it keeps, and the file that it leaves."""

import math
import random
from types import SimpleNamespace

import pytest

import knep
from knep.cli import train
from knep.config.compose import Composed, compose_config
from knep.errors import InputError
from knep.evidence.arms import Arm
from knep.evidence.auto import command
from knep.evidence.auto.bench import Bench, Refused, shortened, slower
from knep.evidence.auto.budget import Budget, Purse
from knep.evidence.auto.result import evidence
from knep.evidence.auto.search import FRESH, Search
from knep.evidence.effects import Metric
from knep.evidence.trials import Store, plan, run_trials

NOTHING = Composed({}, {}, [])
START = ("recipe=none", "optimizer=adamw")
WAYS = [("norm=batch",), ("clip=norm",), ("init=lsuv",), ("averaging=ema",), ("dropout=standard", "dropout.p=0.2")]


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("10m", 600, "seconds"),
        ("1.5h", 5400, "seconds"),
        ("600s", 600, "seconds"),
        ("40runs", 40, "runs"),
        ("2e4", 0, ""),
    ],
)
def test_budget_words(text, amount, unit):
    if not unit:
        with pytest.raises(InputError, match="write minutes, hours or seconds as 10m"):
            Budget.read(text)
    else:
        found = Budget.read(text)
        assert (found.amount, found.unit) == (amount, unit)


@pytest.mark.parametrize(
    "text", ["", "10", "ten", "0m", "-5m", "10 m", "5min", "40run", "inf", "1e9h", "m", "9" * 40 + "h"]
)
def test_a_mistyped_budget_is_one_line(text):
    with pytest.raises(InputError, match="budget="):
        Budget.read(text)


class World:
    """Stands for training: the value of lines is the sum of their tricks' effects and a seed's own luck."""

    def __init__(self, effects, noise=0.003, refuses=(), breaks=(), seconds=1.0, stop_at=None):
        self.effects, self.noise, self.refuses, self.breaks = effects, noise, refuses, breaks
        self.seconds, self.stop_at, self.now, self.asked = seconds, stop_at, 0.0, []

    def clock(self):
        return self.now

    def run(self, trial):
        lines, share = trial.made
        self.asked.append((lines, trial.seed, share, trial.tested))
        if self.stop_at is not None and len(self.asked) > self.stop_at:
            return {"status": "interrupted"}
        self.now += self.seconds * share * slower(lines)
        if any(line in self.refuses for line in lines):
            return {"status": "refused", "reason": "not on this model"}
        if any(line in self.breaks for line in lines):
            return {"status": "failed", "reason": "the loss is not finite"}
        luck = random.Random(f"{lines} {trial.seed} {share}").gauss(0, self.noise)
        luck += random.Random(trial.seed).gauss(0, 0.01)
        value = 0.8 + luck + sum(self.effects.get(line, 0.0) for line in lines)
        record = {"status": "finished", "val/acc": value, "val/loss": 1 - value, "steps": round(100 * share)}
        return record | ({"test/acc": value - 0.01} if trial.tested else {})


@pytest.fixture
def searched(monkeypatch):
    def trial(self, lines, seed, share, tested):
        if "scheduler=cosine" in lines and "optimizer=schedule_free" in lines:
            raise Refused("schedule-free replaces the schedule")
        made = SimpleNamespace(config={"optimizer": {}}) if share == math.inf else (lines, self._part(share))
        return SimpleNamespace(seed=seed, made=made, tested=tested)

    monkeypatch.setattr(Bench, "trial", trial)

    def go(world, budget, ways=WAYS, rate=()):
        bench = Bench(
            Purse(Budget.read(budget), world.clock), Metric(failed=0.1), world.run, NOTHING, total=100, parts=9
        )
        bench.pace = world.seconds / 100
        found = Search(bench, START, ways, lambda: list(rate), lambda line: None).run()
        return found, bench

    return go


def test_tricks_that_help_are_found_and_proved_on_seeds_that_chose_nothing(searched):
    world = World({"norm=batch": 0.05, "dropout=standard": 0.03, "clip=norm": -0.05})
    found, _ = searched(world, "80runs")
    assert {kept.way for kept in found.kept} >= {WAYS[0], WAYS[4]}
    assert ("clip=norm",) not in {kept.way for kept in found.kept}
    assert found.proved
    assert found.effect.mean == pytest.approx(0.08, abs=0.01)
    assert found.steps[WAYS[0]].mean == pytest.approx(0.05, abs=0.01)
    assert set(found.fresh) <= set(FRESH)
    assert 0 < found.blind < 0.05


def test_only_the_last_runs_read_the_test_split(searched):
    world = World({"norm=batch": 0.05})
    found, _ = searched(world, "60runs")
    tested = [i for i, (_, _, _, tested) in enumerate(world.asked) if tested]
    assert {world.asked[i][0] for i in tested} == {found.start, found.lines}
    assert {world.asked[i][1] for i in tested} == set(found.fresh)
    assert all(seed not in FRESH for _, seed, _, tested in world.asked[: tested[0]])
    assert len(tested) == len({world.asked[i][:2] for i in tested})


def test_what_there_was_no_room_to_choose_with_three_seeds_the_fresh_ones_judge(searched):
    found, bench = searched(World({"norm=batch": 0.05}), "14runs", WAYS[:1])
    assert [(kept.way, kept.chosen) for kept in found.kept] == [(WAYS[0], None)]
    assert found.proved
    assert len(found.fresh) == 5
    assert any("norm=batch: the best of the first runs, with no room" in line for line in evidence(found, bench))
    worse, _ = searched(World({"norm=batch": -0.05}), "14runs", WAYS[:1])
    assert not worse.kept


def test_where_nothing_helps_the_plain_line_stays(searched):
    for noise in (0.0, 0.003, 0.03):
        found, _ = searched(World({}, noise=noise), "60runs")
        assert not found.proved
        if noise == 0:
            assert found.lines == START


@pytest.mark.parametrize("budget", ["14runs", "25runs", "60runs", "3000steps", "20s", "60s"])
def test_a_search_ends_within_its_budget(searched, budget):
    world = World({"norm=batch": 0.05, "averaging=ema": 0.02})
    found, bench = searched(world, budget, [*WAYS, ("averaging=ensemble",), ("optimizer=sam",)])
    assert bench.purse.spent <= bench.purse.budget.amount
    assert len(found.fresh) >= 5 or found.lines == START


def test_what_a_small_budget_leaves_out_is_said(searched):
    found, _ = searched(World({}), "16runs")
    assert found.untried
    assert set(found.untried) | set(found.gains) >= set(WAYS)


def test_a_trial_that_fails_loses_and_a_refused_one_is_a_line(searched):
    world = World({"norm=batch": 0.05}, refuses=("init=lsuv",), breaks=("clip=norm",))
    found, _ = searched(world, "60runs")
    assert found.refused[("init=lsuv",)] == "not on this model"
    assert found.gains[("clip=norm",)] == -math.inf
    assert found.proved


def test_a_plain_line_that_breaks_loses_too(searched):
    found, _ = searched(World({}, breaks=()), "60runs")
    assert not found.proved
    world = World({})
    world.run = (lambda run: lambda trial: run(trial) if "clip=norm" in trial.made[0] else {"status": "failed"})(
        world.run
    )
    found, _ = searched(world, "60runs")
    assert found.kept[0].way == ("clip=norm",)
    assert found.kept[0].chosen is None
    assert found.proved


def test_combinations_that_contradict_each_other_are_skipped(searched):
    ways = [("optimizer=schedule_free",), ("scheduler=cosine",)]
    found, _ = searched(World({"optimizer=schedule_free": 0.05, "scheduler=cosine": 0.04}), "60runs", ways)
    assert [kept.way for kept in found.kept] == [("optimizer=schedule_free",)]
    assert "replaces the schedule" in found.refused[("scheduler=cosine",)]


def test_the_rate_comes_first(searched):
    world = World({"optimizer.lr=0.01": 0.05})
    found, _ = searched(world, "60runs", rate=[("optimizer.lr=0.01",)])
    assert found.kept[0].way == ("optimizer.lr=0.01",)
    assert world.asked[1][0] in (START, (*START, "optimizer.lr=0.01"))


@pytest.mark.parametrize("after", [2, 12, 40])
def test_ctrl_c_ends_with_what_is_known(searched, after):
    found, bench = searched(World({"norm=batch": 0.05}, stop_at=after), "60runs")
    assert found.stopped
    assert bench.purse.trials == after
    assert not found.proved or len(found.fresh) >= 5


def test_the_same_search_finds_the_same(searched):
    first, second = (searched(World({"norm=batch": 0.02}, noise=0.01), "60runs")[0] for _ in range(2))
    assert first == second


def test_lengths_and_costs():
    made = compose_config(["recipe=none", "trainer.max_epochs=12"])
    assert shortened(made, 1.0) == ()
    assert shortened(made, 1 / 3) == ("trainer.max_epochs=4",)
    assert shortened(compose_config(["recipe=none", "trainer.max_steps=90"]), 1 / 3) == ("trainer.max_steps=30",)
    assert slower(START) == 1.0
    assert slower(("optimizer=sam",)) > 1.2


REFUSED = [
    ([], "needs to know what it may spend"),
    (["budget=ten"], "budget=ten is none"),
    (["budget=10m", "recipe=modern"], "leave one of the two out"),
    (["budget=10m", "seed=3"], "leave seed out"),
    (["budget=10m", "ckpt=outputs/x"], "leave ckpt out"),
    (["budget=10m", "optimizer.lr=auto"], "looks for the rate too"),
    (["budget=10m", "-m"], "leave out -m"),
    (["budget=10m", "modle=mlp"], "modle"),
    (["budget=13steps", "model=mlp", "trainer.max_epochs=1"], "is too little"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_what_cannot_be_searched_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["recipe=auto", "data=digits", *words])
    assert end.value.code == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


def told(trial):
    """A record as a run of these lines might leave: label smoothing helps."""
    helped = trial.made.choices["regularization"] == "label_smoothing"
    value = 0.9 + (0.05 + 0.002 * trial.seed) * helped + 0.001 * trial.seed
    record = {"status": "finished", "val/acc": value, "val/loss": 1 - value, "steps": 20}
    return record | ({"test/acc": value} if trial.tested else {})


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(command, "ranked", lambda problem: [])
    monkeypatch.setattr(command, "_pool", lambda: [("norm=batch",), ("regularization=label_smoothing",)])
    return ["data=digits", "data.limit=200", "model=mlp", "model.widths=[8]", "trainer.max_epochs=3", "threads=1"]


def test_the_recipe_that_is_found_is_a_recipe(small, tmp_path, capsys):
    found = command.auto(["recipe=auto", "budget=24runs", f"out={tmp_path}", *small], run=told)
    assert found.proved
    assert [kept.way for kept in found.kept] == [("regularization=label_smoothing",)]
    recipe = knep.load("found", search=[f"file://{tmp_path}"])
    assert recipe.scaling is not None
    again = compose_config(["recipe=found", *small[:4], "threads=1"], [f"file://{tmp_path}"])
    assert again.choices["regularization"] == "label_smoothing"
    assert again.config["trainer"]["max_epochs"] == 3
    text = (tmp_path / "recipe" / "found.yaml").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    for words in ("Found by recipe=auto", "over the 3 seeds that chose it", "Test split, read once", "Bill:"):
        assert words in text
        assert words in said
    assert "No further gain above" in text


def test_where_nothing_is_proved_the_file_has_the_plain_line(small, tmp_path):
    def flat(trial):
        return told(trial) | {"val/acc": 0.9, "val/loss": 0.1}

    found = command.auto(["recipe=auto", "budget=24runs", f"out={tmp_path}", *small], run=flat)
    assert not found.proved
    text = (tmp_path / "recipe" / "found.yaml").read_text(encoding="utf-8")
    assert "the plain line stays" in text
    assert "No two runs differed" in text
    assert compose_config(["recipe=found"], [f"file://{tmp_path}"]).choices["regularization"] == "none"


def test_what_was_typed_is_not_tried(small, tmp_path):
    asked = []

    def seen(trial):
        asked.append(trial.made.choices["norm"])
        return told(trial)

    command.auto(["recipe=auto", "budget=14runs", f"out={tmp_path}", *small, "norm=layer"], run=seen)
    assert set(asked) == {"layer"}


@pytest.mark.slow
def test_trials_train_with_what_the_user_allowed(tmp_path, monkeypatch):
    (tmp_path / "minenet.py").write_text(
        "import torch\ndef net(num_classes=10):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    lines = ("recipe=none", "data=digits", "data.limit=100", "model=import", "model.path=minenet:net", "threads=1")
    knep.allow("minenet.")
    (trial,) = plan([Arm("own", (*lines, "allow_targets=[minenet.]", "trainer.max_epochs=1"))], [0], ["progress=false"])
    record = run_trials([trial], Store(tmp_path / "out"))[trial.key]
    assert record["status"] == "finished", record
