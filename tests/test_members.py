"""Members of one fit: each is the single run of its config, whatever the others do."""

import json
import math

import pytest
import torch

from knep.config.catalog import options
from knep.config.compose import compose_config
from knep.config.schema import RunConfig
from knep.engine.fit import fit_member
from knep.ensemble import members_of, supports, train
from knep.ensemble.loop import fit
from knep.ensemble.member import Member
from knep.ensemble.stacked_model import Linear
from knep.ensemble.steps import Together
from knep.errors import InputError, NoEffectError
from knep.run.run import run as train_run
from tests.cells import thinned
from tests.exhaustive.members_exact import (
    BAR,
    MODELS,
    SLOTS,
    TINY,
    composed,
    config,
    data_of,
    distance,
    states,
    together_and_in_turn,
)

REFUSED = {("averaging", "soup"), ("averaging", "greedy_soup")}
# Options that ask for residual branches, and for the attention that no net for classes here has.
BRANCHES = {"stochastic_depth", "skipinit", "rezero", "layer_scale", "fixup"}
ATTENTION = {"t_fixup", "deepnorm"}

RECIPES = {
    "mlp": [
        ("dropout=standard", "augment=shift", "clip=norm", "optimizer=adamw", "scheduler=cosine",
         "regularization=label_smoothing"),
        ("norm=batch", "augment=mixup", "optimizer=muon", "regularization=l1", "accumulate=3"),
        ("optimizer=gd", "clip=adaptive"),
        ("norm=batch", "dropout=standard", "optimizer=schedule_free", "optimizer.warmup_steps=5", "stopping=early"),
    ],
    "cnn": [("norm=batch", "dropout=standard", "augment=shift", "optimizer=adam", "averaging=ema",
             "trainer.precision=32-true")],
    "resnet": [("dropout=stochastic_depth", "augment=shift_flip", "optimizer=nesterov", "stopping=early",
                "stopping.patience=1")],
    "inception": [("dropout=dropblock", "optimizer=sgd", "regularization=max_norm", "scheduler=plateau")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "recipe"), thinned([(model, r) for model, rs in RECIPES.items() for r in rs], 4, several=True)
)
def test_a_member_is_the_single_run_of_its_seed(model, recipe, tmp_path):
    """Lightning's loop over 20 batches: to the bit in its turn, to rounding in one pass (in float64)."""
    cfg, data = composed(model, *recipe), data_of(model)
    seeds = members_of(RunConfig.of(cfg), 2)
    single = [fit_member(c, data, tmp_path / str(c.seed), c.seed) for c in seeds]
    for together in (False, True) if cfg["trainer"]["precision"] == "64-true" else (False,):
        members = fit(seeds, data, together)
        assert [m.steps for m in members] == [s.steps for s in single]
        far = max(distance(a, b) for a, b in zip(states(members), states(single), strict=True))
        assert far <= (BAR if together else 0.0)
        best = [(m.best["val/loss"], m.best["epoch"]) for m in members]
        assert best == [(pytest.approx(s.best["val/loss"], rel=1e-5), s.best["epoch"]) for s in single]


@pytest.mark.parametrize("slot", thinned(SLOTS, 4))
def test_one_pass_equals_a_pass_for_each_with_every_option(slot):
    """Options that a fully connected net cannot have are tried on the convolutional one; all but REFUSED are exact."""
    for option in sorted({*options(slot)} - ATTENTION):
        cfg = config("mlp", **{slot: option})
        if supports(RunConfig.of(cfg)):
            assert (slot, option) in REFUSED
            continue
        try:
            far = together_and_in_turn(members_of(RunConfig.of(cfg), 2), "mlp")
        except (NoEffectError, InputError):
            model = "resnet" if option in BRANCHES or option == "progressive_resize" else "cnn"  # of any size
            plain = {"norm": "none"} if option == "fixup" else {}
            far = together_and_in_turn(members_of(RunConfig.of(config(model, **plain, **{slot: option})), 2), model)
        assert far <= BAR, (slot, option, far)
    assert {o for s, o in REFUSED if s == slot} <= set(options(slot))


def test_members_may_differ_in_settings_that_change_no_shapes():
    base = config("mlp", dropout="standard", clip="norm", optimizer="adamw", regularization="label_smoothing")
    sets = [
        ("optimizer", "lr", 1e-2),
        ("optimizer", "weight_decay", 0.3),
        ("dropout", "p", 0.1),
        ("clip", "theta", 0.1),
        ("regularization", "epsilon", 0.3),
    ]
    changed = [base, *({**base, slot: {**base[slot], key: value}} for slot, key, value in sets)]
    configs = [RunConfig.of(c) for c in changed]
    assert together_and_in_turn(configs, "mlp") <= BAR
    weights = [s["model.classifier.weight"] for s in states(fit(configs, data_of("mlp"), True))]
    assert all(not torch.equal(weights[0], w) for w in weights[1:])


def test_a_member_that_diverges_is_failed_and_disturbs_no_other():
    base = config("mlp", optimizer="sgd")
    wild = {**base, "optimizer": {**base["optimizer"], "lr": 1e308}}
    for together in (False, True):
        records = train([RunConfig.of(c) for c in (base, wild, {**base, "seed": 1})], together=together)
        alone = train(members_of(RunConfig.of(base), 2), together=together)
        assert [r["status"] for r in records] == ["finished", "failed", "finished"]
        assert math.isnan(records[1]["test/acc"])
        for mine, lone in zip((records[0], records[2]), alone, strict=True):
            assert mine["test/loss"] == pytest.approx(lone["test/loss"], rel=1e-9)


def test_a_record_says_what_came_out():
    records = train(members_of(RunConfig.of(config("mlp")), 3))
    assert [r["seed"] for r in records] == [0, 1, 2]
    assert len({r["test/loss"] for r in records}) == 3
    for record in records:
        assert [row["step"] for row in record["curve"]] == [10, 20]
        assert record["curve"][-1]["val/loss"] == pytest.approx(record["val/loss"], rel=1e-5)
        assert record["cpu_seconds"] > 0


def test_a_model_that_mixes_images_is_trained_in_turn():
    class Mixes(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x - x.mean(0, keepdim=True))

    from knep.ensemble.rng_streams import Draws
    from knep.ensemble.stacked_model import computes_the_same, fold, stacked

    data = data_of("mlp")
    for wrap, same in ((torch.nn.Sequential, True), (Mixes, False)):
        models = [wrap(Member(c, data).module.model) for c in members_of(RunConfig.of(config("mlp")), 2)]
        draws = Draws(2, torch.device("cpu"))
        folded = fold(models, stacked(models), draws)
        assert computes_the_same(folded, models, torch.rand(4, 1, 8, 8), draws) is same


@pytest.mark.parametrize("shape", [(5, 7), (400, 300)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_layer_of_all_members_is_each_ones_layer(shape, with_bias):
    weight, x = torch.rand(3, *shape, dtype=torch.float64), torch.rand(12, shape[1], dtype=torch.float64)
    bias = torch.rand(3, shape[0], dtype=torch.float64) if with_bias else None
    each = [x[4 * i : 4 * i + 4] @ weight[i].T + (0 if bias is None else bias[i]) for i in range(3)]
    torch.testing.assert_close(Linear(weight, bias)(x), torch.cat(each), rtol=1e-12, atol=1e-12)


def test_one_optimizer_steps_all_members_where_its_rule_is_elementwise():
    from knep.ensemble.loop import _plugin, _stepper

    data = data_of("mlp")
    for optimizer, count in (("adamw", 1), ("muon", 2)):
        members = [Member(c, data) for c in members_of(RunConfig.of(config("mlp", optimizer=optimizer)), 2)]
        device = torch.device("cpu")
        stepper = _stepper(members, data, device, _plugin(members[0], data, device), True)
        assert isinstance(stepper, Together)
        assert len(stepper.optimizers) == count


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("averaging=soup", "averaging=soup"),
        ("guard=rollback", "guard.action=rollback"),
        ("checkpoint.every=5", "checkpoint.every"),
        ("trainer.precision=bf16-true", "trainer.precision"),
        ("trainer.max_steps=5", "trainer.max_steps"),
        ("compile=true", "compile"),
    ],
)
def test_what_a_single_run_alone_can_do_is_refused_by_name(override, word):
    cfg = composed("mlp", override)
    assert word in (supports(RunConfig.of(cfg)) or "")
    with pytest.raises(InputError, match=word):
        train([RunConfig.of(cfg)])


def test_configs_of_different_models_or_data_are_refused():
    cfg = config("mlp")
    with pytest.raises(InputError, match="model differs between configs 0 and 1"):
        train([RunConfig.of(c) for c in (cfg, config("cnn"))])
    with pytest.raises(InputError, match="at least one"):
        train([])


QUICK = [*TINY[:-1], "lean=true", *MODELS["mlp"]]


def run(folder, *overrides):
    made = compose_config([*QUICK, *overrides])
    return train_run(made.config, folder, made.choices, made.overrides)


def test_the_command_leaves_a_folder_and_a_result_per_seed(tmp_path):
    at_once = run(tmp_path / "a", "trainer.members=2")
    after = run(tmp_path / "b", "trainer.members=2", "checkpoint.every=50")  # which one fit for all does not support
    assert at_once["members/test_acc"] == after["members/test_acc"]
    assert at_once["test/loss"] == pytest.approx(after["test/loss"], rel=1e-6)
    for folder in (tmp_path / "a", tmp_path / "b"):
        for i in range(2):
            summary = json.loads((folder / f"member_{i}" / "summary.json").read_text())
            assert (summary["seed"], summary["status"], summary["sealed"]) == (i, "finished", 1)
            state = torch.load(folder / f"member_{i}" / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"]
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())


def test_an_ensemble_in_one_pass_is_the_ensemble_of_single_runs(tmp_path, capsys):
    ensemble = ["averaging=ensemble", "averaging.members=2"]
    at_once = run(tmp_path / "a", *ensemble)
    assert "2 members in one pass" in capsys.readouterr().out
    after = run(tmp_path / "b", *ensemble, "checkpoint.every=50")
    assert "in one pass" not in capsys.readouterr().out
    for key in ("test/loss", "val/loss", "members/test_acc", "steps", "epochs", "best_epoch"):
        assert at_once[key] == pytest.approx(after[key], rel=1e-6)


def test_members_of_an_ensemble_are_refused():
    with pytest.raises(InputError, match="contradicts averaging=ensemble"):
        compose_config([*QUICK, "averaging=ensemble", "trainer.members=2"])
