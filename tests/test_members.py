"""Members of one fit: each is the single run of its config, whatever the others do."""

import math
from functools import cache

import pytest
import torch
import yaml

from knep.compose import compose_config
from knep.errors import InputError, NoEffectError
from knep.fit import about
from knep.listing import CONF, options
from knep.member import fit_member
from knep.members import members_of, supports, train
from knep.members.loop import fit
from knep.members.member import Member
from knep.members.steps import Together
from knep.safe import instantiate

TINY = [
    "recipe=none", "scaling=unit", "optimizer=momentum", "data=synthetic", "data.image_size=8", "data.images=130",
    "data.batch_size=10", "data.val_share=0.2", "trainer=cpu", "trainer.precision=64-true", "trainer.max_epochs=2",
    "threads=1", "progress=false", "lean=false",
]  # fmt: skip
SMALL = {
    "mlp": ["model=mlp", "model.widths=[16,12]"],
    "cnn": ["model=cnn", "model.widths=[4,6]"],
    "resnet": ["model=resnet", "model.width=0.25", "norm=batch"],
    "inception": ["model=inception", "model.width=0.25", "norm=batch"],
}
SLOTS = (
    "norm", "activation", "dropout", "init", "optimizer", "clip", "scheduler", "regularization", "augment",
    "averaging", "stopping",
)  # fmt: skip
REFUSED = {("averaging", "soup")}


@cache
def composed(model, *overrides):
    return compose_config([*TINY, *SMALL[model], *overrides]).config


def config(model, *overrides, **slots):
    """A composed config; slots: option by slot, whose node is read from its file, which is much faster."""
    nodes = {slot: yaml.safe_load((CONF / slot / f"{option}.yaml").read_text()) for slot, option in slots.items()}
    return {**composed(model, *overrides), **nodes}


@cache
def data_of(model):
    data = instantiate(composed(model)["data"])
    data.prepare()
    return data


def distance(a, b):
    """The largest difference between the tensors of two state dicts, relative to each one's largest element."""
    assert a.keys() == b.keys()
    return max(
        float((a[k].double() - b[k].double()).abs().max() / b[k].double().abs().max().clamp(min=1e-12)) for k in a
    )


def states(members):
    return [m.module.state_dict() for m in members]


def together_and_in_turn(configs, model):
    a, b = (states(fit(configs, data_of(model), together)) for together in (True, False))
    return max(distance(x, y) for x, y in zip(a, b, strict=True))


RECIPES = {
    "mlp": [
        ("dropout=standard", "augment=shift", "clip=norm", "optimizer=adamw", "scheduler=cosine",
         "regularization=label_smoothing"),
        ("norm=batch", "augment=mixup", "optimizer=muon", "regularization=l1", "accumulate=3"),
        ("optimizer=gd", "clip=adaptive"),
    ],
    "cnn": [("norm=batch", "dropout=standard", "augment=shift", "optimizer=adam", "averaging=ema",
             "trainer.precision=32-true")],
    "resnet": [("dropout=stochastic_depth", "augment=shift_flip", "optimizer=nesterov", "stopping=early",
                "stopping.patience=1")],
    "inception": [("dropout=dropblock", "optimizer=sgd", "regularization=max_norm", "scheduler=plateau")],
}  # fmt: skip


@pytest.mark.parametrize(("model", "recipe"), [(model, r) for model, rs in RECIPES.items() for r in rs])
def test_a_member_is_the_single_run_of_its_seed(model, recipe, tmp_path):
    """Lightning's loop over 20 batches: to the bit in its turn, to rounding in one pass (in float64)."""
    cfg, data = composed(model, *recipe), data_of(model)
    seeds = members_of(cfg, 2)
    single = [fit_member(about(c, data), data, tmp_path / str(c["seed"]), c["seed"]) for c in seeds]
    for together in (False, True) if cfg["trainer"]["precision"] == "64-true" else (False,):
        members = fit(seeds, data, together)
        assert [m.steps for m in members] == [s.steps for s in single]
        far = max(distance(a, b) for a, b in zip(states(members), states(single), strict=True))
        assert far <= (1e-5 if together else 0.0)
        best = [(m.best["val/loss"], m.best["epoch"]) for m in members]
        assert best == [(pytest.approx(s.best["val/loss"], rel=1e-5), s.best["epoch"]) for s in single]


@pytest.mark.parametrize("slot", SLOTS)
def test_one_pass_equals_a_pass_for_each_with_every_option(slot):
    """Options that a fully connected net cannot have are tried on the convolutional one; all but REFUSED are exact."""
    for option in options(slot):
        cfg = config("mlp", **{slot: option})
        if supports(cfg):
            assert (slot, option) in REFUSED
            continue
        try:
            far = together_and_in_turn(members_of(cfg, 2), "mlp")
        except (NoEffectError, InputError):
            model = "resnet" if option == "stochastic_depth" else "cnn"
            far = together_and_in_turn(members_of(config(model, **{slot: option}), 2), model)
        assert far <= 1e-5, (slot, option, far)
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
    configs = [base, *({**base, slot: {**base[slot], key: value}} for slot, key, value in sets)]
    assert together_and_in_turn(configs, "mlp") <= 1e-5
    weights = [m.module.model.classifier.weight for m in fit(configs, data_of("mlp"), True)]
    assert all(not torch.equal(weights[0], w) for w in weights[1:])


def test_a_member_that_diverges_is_failed_and_disturbs_no_other():
    base = config("mlp", optimizer="sgd")
    wild = {**base, "optimizer": {**base["optimizer"], "lr": 1e30}}
    for together in (False, True):
        records = train([base, wild, {**base, "seed": 1}], together=together)
        alone = train(members_of(base, 2), together=together)
        assert [r["status"] for r in records] == ["finished", "failed", "finished"]
        assert math.isnan(records[1]["test/acc"])
        for mine, lone in zip((records[0], records[2]), alone, strict=True):
            assert mine["test/loss"] == pytest.approx(lone["test/loss"], rel=1e-9)


def test_a_record_says_what_came_out():
    records = train(members_of(config("mlp"), 3))
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

    from knep.members.draws import Draws
    from knep.members.folded import computes_the_same, fold, stacked

    data = data_of("mlp")
    for wrap, same in ((torch.nn.Sequential, True), (Mixes, False)):
        models = [wrap(Member(c, data).module.model) for c in members_of(config("mlp"), 2)]
        draws = Draws(2, torch.device("cpu"))
        folded = fold(models, stacked(models), draws)
        assert computes_the_same(folded, models, torch.rand(4, 1, 8, 8), draws) is same


def test_one_optimizer_steps_all_members_where_its_rule_is_elementwise():
    from knep.members.loop import _plugin, _stepper

    data = data_of("mlp")
    for optimizer, count in (("adamw", 1), ("muon", 2)):
        members = [Member(c, data) for c in members_of(config("mlp", optimizer=optimizer), 2)]
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
    assert word in (supports(cfg) or "")
    with pytest.raises(InputError, match=word):
        train([cfg])


def test_configs_of_different_models_or_data_are_refused():
    cfg = config("mlp")
    with pytest.raises(InputError, match="model differs between configs 0 and 1"):
        train([cfg, config("cnn")])
    with pytest.raises(InputError, match="at least one"):
        train([])
