"""The Python API: a recipe on somebody else's model, its parts alone in a plain loop, and in Lightning."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import knep
from knep.config.catalog import options
from knep.config.compose import compose_config, compose_recipe
from knep.errors import InputError, NoEffectError
from knep.recipes.recipe import SLOTS, Recipe

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def net() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5)),
    )


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))


def two_classes(count: int = 64) -> TensorDataset:
    """Images (count, 1, 2, 2) in 0..255 whose class is whether the first pixel is bright."""
    x = torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(1)) * 255
    return TensorDataset(x, (x[:, 0, 0, 0] > 127).long())


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_importing_knep_imports_no_torch():
    code = "import knep, sys; assert not {'torch', 'hydra', 'lightning'} & set(sys.modules); knep.load; knep.allow"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_error_of_every_refusal_is_at_the_top_and_brings_no_torch():
    code = "import knep, sys; assert issubclass(knep.InputError, ValueError); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(knep.InputError, match="modrn"):
        knep.load("modrn")


def test_load_takes_overrides():
    recipe = knep.load("modern", overrides=["norm=group", "optimizer.lr=3e-3", "layer_decay=0.9", "accumulate=2"])
    assert recipe.model_slots["norm"].func.__name__ == "group"
    assert (recipe.lr, recipe.layer_decay, recipe.accumulate, recipe.max_epochs) == (3e-3, 0.9, 2, 20)


@pytest.mark.parametrize("name", options("recipe"))
def test_a_recipe_is_the_same_for_any_model_as_for_a_run(name):
    """`knep.yaml` and `train.yaml` are two tables of contents of the same slots."""
    loaded, run = compose_recipe(name), compose_config([f"recipe={name}"]).config
    assert {slot: loaded[slot] for slot in SLOTS} == {slot: run[slot] for slot in SLOTS}
    assert (loaded["layer_decay"], loaded["accumulate"]) == (run["layer_decay"], run["accumulate"])
    assert Recipe.from_config(loaded).lr == run["optimizer"]["lr"]


BAD = {
    "recipe": (lambda: knep.load("modrn"), "did you mean modern"),
    "no name": (lambda: knep.load(None), "asked for by its name"),  # type: ignore[arg-type]
    "option": (lambda: knep.load("modern", ["norm=grup"]), "did you mean group"),
    "begun": (lambda: knep.load("modern", ["norm=ghost"]), "did you mean ghost_batch"),
    "key": (lambda: knep.load("modern", ["optimizer.lrr=1"]), "did you mean optimizer.lr"),
    "value": (lambda: knep.load("modern", ["optimizer.lr=-1"]).optimizer(mlp()), "lr must be"),
    "range": (lambda: knep.load("modern", ["layer_decay=3"]), "layer_decay=3"),
    "contradiction": (lambda: knep.load("modern", ["optimizer=schedule_free"]), "scheduler=none"),
    "string": (lambda: knep.load("modern", "norm=group"), "write a list"),
    "second recipe": (lambda: knep.load("modern", ["recipe=none"]), 'knep.load("none")'),
    "search": (lambda: knep.load("modern", search=["file:///nowhere"]), "file:///nowhere is not there"),
    "a run's key": (lambda: knep.load("modern", ["trainer.devices=2"]), "there is no key trainer.devices"),
    "ensemble": (lambda: knep.callbacks("modern", ["averaging=ensemble"]), "averaging=none"),
    "no slot": (
        lambda: Recipe.from_config(OmegaConf.create({"optimizer": {"_target_": "torch.optim.SGD"}, "norm": "batch"})),
        "norm=batch is no option of a slot: add `- norm: none`",
    ),
    "no optimizer": (lambda: Recipe.from_config(OmegaConf.create({"seed": 1})), "- optimizer: adamw"),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_input_is_one_line_with_a_remedy(row):
    call, said = BAD[row]
    with pytest.raises(InputError) as error:
        call()
    assert said.replace('"', "'") in str(error.value).replace('"', "'")
    assert "\n" not in str(error.value)


@pytest.fixture
def own_folder(tmp_path):
    """A folder of somebody's own configs: a recipe with a value, and an option that has a name of knep's."""
    (tmp_path / "recipe" / "mine").mkdir(parents=True)
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /optimizer: adam\n  - override /clip: norm\n"
    )
    (tmp_path / "recipe" / "mine" / "optimizer-adam.yaml").write_text("lr: 0.123\n")
    (tmp_path / "optimizer" / "sgd.yaml").write_text("_target_: torch.optim.SGD\n_partial_: true\nlr: 0.456\n")
    return f"file://{tmp_path}"


def test_search_finds_a_recipe_of_your_own_and_shadows(own_folder):
    mine = knep.load("mine", search=[own_folder])
    assert (mine.lr, mine.clip.func.__name__) == (0.123, "norm")
    assert knep.load("mine", ["optimizer=sgd"], search=[own_folder]).lr == 0.456
    assert knep.load("none", search=[own_folder]).lr == 0.456
    assert knep.load("none").lr != 0.456
    with pytest.raises(InputError, match="did you mean mine"):
        knep.load("mien", search=[own_folder])


def test_a_running_hydra_app_keeps_its_own_hydra():
    with initialize_config_module("knep.conf", version_base="1.3"):
        before = GlobalHydra.instance().hydra
        knep.load("modern")
        with pytest.raises(InputError):
            knep.load("modrn")
        assert GlobalHydra.instance().hydra is before
        compose("train")


def test_apply_edits_in_place_or_a_copy():
    recipe, x = knep.load("modern", ["norm=group"]), torch.randn(4, 3, 8, 8)
    model = net()
    before = state(model)
    report = recipe.apply(model, sample=x, inplace=False)
    assert same(before, state(model))
    assert isinstance(model[1], nn.BatchNorm2d)
    assert isinstance(report.model[1], nn.GroupNorm)  # type: ignore[index]
    assert {c.path for c in report.changes["norm"]} == {"1", "5"}
    report = recipe.apply(model, sample=x)
    assert report.model is model
    assert isinstance(model[1], nn.GroupNorm)


def test_a_copy_of_a_compiled_model_is_the_model_inside():
    compiled = torch.compile(net())
    report = knep.load("modern", ["norm=group"]).apply(compiled, inplace=False)  # type: ignore[arg-type]
    assert isinstance(report.model[1], nn.GroupNorm)  # type: ignore[index]


def test_a_model_that_cannot_be_copied_is_refused():
    model = mlp()
    model.cache = model[1].weight * 2  # type: ignore[assignment, operator]
    with pytest.raises(InputError, match="cannot be copied"):
        knep.load("none").apply(model, inplace=False)


class Reshaped(nn.Module):
    """Fails in its own forward, outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(3, 3)

    def forward(self, x):
        return self.block(x.reshape(7, 3))


FAILING = {
    "channels": (net(), torch.zeros(2, 1, 8, 8), ["0 (Conv2d)", "(2, 1, 8, 8)", "(N, 3, H, W)"]),
    "size": (net(), torch.zeros(2, 3, 16, 16), ["8 (Linear)", "(2, 200)", "(..., 8)"]),
    "raw pixels": (net(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["0 (Conv2d)", "uint8", "takes float32"]),
    "volume": (nn.Sequential(nn.Conv3d(1, 1, 1)), torch.zeros(2, 2, 4, 4, 4), ["(N, 1, D, H, W)"]),
    "norm": (nn.Sequential(nn.BatchNorm2d(4)), torch.zeros(2, 3, 8, 8), ["0 (BatchNorm2d)", "(N, 4, ...)"]),
    "last axis": (nn.Sequential(nn.LayerNorm(4)), torch.zeros(2, 5), ["0 (LayerNorm)", "(..., 4)"]),
    "groups": (nn.Sequential(nn.GroupNorm(2, 4)), torch.zeros(2, 6, 3), ["0 (GroupNorm)", "(N, 4, ...)"]),
    "its own code": (nn.Sequential(Reshaped()), torch.zeros(2, 3), ["0 (Reshaped)", "(2, 3)", "invalid for input"]),
}


@pytest.mark.parametrize("row", FAILING)
def test_a_model_that_fails_on_the_sample_is_told_by_its_layer(row):
    model, sample, said = FAILING[row]
    modes = [m.training for m in model.modules()]
    for call in (knep.load("none").apply, knep.load("none").dry_run):
        with pytest.raises(InputError) as error:
            call(model, sample=sample)
        assert all(words in str(error.value) for words in said), error.value
        assert "\n" not in str(error.value)
    assert modes == [m.training for m in model.modules()]


def test_dry_run_prints_and_touches_nothing(capsys):
    model, recipe = net(), knep.load("modern", ["norm=group", "dropout=standard", "init=he_normal"])
    x = torch.randn(4, 3, 8, 8)
    before, numbers = state(model), torch.get_rng_state()
    plan = recipe.dry_run(model, x)
    assert same(before, state(model))
    assert torch.equal(numbers, torch.get_rng_state())
    printed = capsys.readouterr().out
    assert printed.strip() == str(plan)
    for words in ("GroupNorm(8, 8", "Dropout(p=0.5", "0.weight", "8x3x3x3", "he_normal", "muon", "adamw"):
        assert words in printed


def test_the_plan_is_what_apply_and_optimizer_do():
    overrides = ["norm=group", "optimizer=adamw", "optimizer.weight_decay=0.1", "layer_decay=0.5", "dropout=standard"]
    recipe, model = knep.load("modern", overrides), net()
    model[0].weight.requires_grad_(False)
    plan = recipe.dry_run(model)
    report = recipe.apply(model)
    assert plan.layers == {slot: report.changes[slot] for slot in ("norm", "activation", "dropout")}
    rows = {row.name: row for row in plan.parameters}
    assert {name: row.shape for name, row in rows.items()} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    optimizer = recipe.optimizer(model)
    seen = set()
    for group in optimizer.param_groups:
        for name in group["param_names"]:
            seen.add(name)
            assert (rows[name].lr, rows[name].decay) == (group["lr"], group["weight_decay"])
            assert rows[name].multiplier == group["lr"] / recipe.lr
            assert rows[name].arm == "AdamW"
    assert set(rows) - seen == {"0.weight"}
    assert rows["0.weight"].arm == "frozen"
    assert rows["4.weight"].multiplier == 0.5
    assert (rows["1.weight"].decay, rows["4.weight"].decay) == (0.0, 0.1)
    assert rows["1.weight"].init == "kept"
    assert rows["4.bias"].init == "0"
    assert rows["4.weight"].init.startswith("he_normal, rms ")


def test_what_cannot_be_applied_is_in_the_plan_and_raised_by_apply(capsys):
    recipe = knep.load("none", ["dropout=stochastic_depth", "init=he_normal"])
    plan = recipe.dry_run(mlp(), torch.randn(2, 4))
    assert "dropout" in plan.refused
    assert plan.refused["dropout"] in capsys.readouterr().out
    with pytest.raises(NoEffectError) as error:
        recipe.apply(mlp(), torch.randn(2, 4))
    assert str(error.value) == plan.refused["dropout"]
    frozen = mlp().requires_grad_(False)
    assert "no trained parameters" in knep.load("none").dry_run(frozen).refused["optimizer"]


def test_optimizer_scheduler_and_clip_alone_train_a_model():
    recipe, model = knep.load("modern", ["scheduler.warmup=0.1", "clip.theta=0.5", "optimizer.lr=0.1"]), mlp()
    x, y = two_classes().tensors
    optimizer = recipe.optimizer(model)
    scheduler = recipe.scheduler(optimizer, total_steps=40)
    losses, rates = [], []
    for _ in range(40):
        loss = F.cross_entropy(model(x / 255), y)
        optimizer.zero_grad()
        loss.backward()
        recipe.clip(model.parameters())
        assert nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]) <= 0.5001
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert rates[0] < max(rates) == rates[4]
    assert rates[-1] < rates[4] / 10


def test_steps_per_epoch_is_that_of_the_recipes_own_epochs():
    recipe = knep.load("classic_2012")  # 30 epochs, a step down every 10
    optimizer = recipe.optimizer(mlp())
    scheduler = recipe.scheduler(optimizer, 300)
    rates = []
    for _ in range(300):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [i for i in range(1, 300) if rates[i] != rates[i - 1]] == [100, 200]


def loaders():
    data = two_classes(128)
    return DataLoader(data, batch_size=16, shuffle=True), DataLoader(data, batch_size=64)


def fit(module, tmp_path, *given, epochs=1, **options):
    trainer = Trainer(max_epochs=epochs, default_root_dir=tmp_path, **QUIET, **options)
    trainer.fit(module, *given)
    return trainer


def test_a_module_trains_on_any_dataloader_and_goes_back_to_the_best(tmp_path):
    recipe = knep.load("modern", ["norm=none", "augment=none", "scaling=standardize", "averaging.decay=0.5"])
    train, val = loaders()
    module = knep.LitModule(mlp(), recipe, num_classes=2, images=train)
    trainer = fit(module, tmp_path, train, val, epochs=6)
    kinds = [type(c).__name__ for c in trainer.callbacks]  # type: ignore[attr-defined]
    assert {"Ema", "Early"} <= set(kinds)
    x, y = two_classes(128).tensors
    mean, std = x.mean(), x.std(unbiased=False)
    torch.testing.assert_close(module.scaling(x), (x - mean) / std)
    assert (module.eval()(x).argmax(1) == y).float().mean() > 0.9
    best = next(c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor)
    stored = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert same(stored, state(module))


def test_the_recipes_clip_and_accumulation_act_in_lightning(tmp_path):
    recipe = knep.load("none", ["clip=normalize", "clip.theta=0.25", "accumulate=4", "optimizer.lr=1.0"])
    model = mlp()
    module = knep.LitModule(model, recipe, num_classes=2)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    trainer = fit(module, tmp_path, loaders()[0], limit_train_batches=4)
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert trainer.global_step == 1
    torch.testing.assert_close((after - before).norm(), torch.tensor(0.25), rtol=1e-4, atol=0)


def test_the_trainers_clip_acts_where_the_recipe_has_none(tmp_path):
    model = mlp()
    lines = ["optimizer=sgd", "optimizer.lr=1.0", "optimizer.weight_decay=0"]
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    module = knep.LitModule(model, knep.load("none", [*lines, "clip=none"]), num_classes=2)
    fit(module, tmp_path, loaders()[0], limit_train_batches=1, gradient_clip_val=1e-3)
    moved = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    torch.testing.assert_close(moved.norm(), torch.tensor(1e-3), rtol=1e-2, atol=0)
    module = knep.LitModule(mlp(), knep.load("none", ["clip=norm"]), num_classes=2)
    with pytest.raises(InputError, match="would both clip"):
        fit(module, tmp_path, loaders()[0], gradient_clip_val=1.0)


def test_each_trainer_starts_anew(tmp_path):
    module = knep.LitModule(mlp(), knep.load("modern", ["norm=none", "scaling=none"]), num_classes=2)
    a, b = (module.configure_callbacks() for _ in range(2))
    assert not {id(c) for c in a} & {id(c) for c in b}
    a, b = (knep.callbacks(knep.load("modern")) for _ in range(2))
    assert not {id(c) for c in a} & {id(c) for c in b}


def test_stopping_without_validation_data_is_refused(tmp_path):
    recipe = knep.load("modern", ["norm=none", "augment=none"])
    module = knep.LitModule(mlp(), recipe, num_classes=2, images=loaders()[0])
    with pytest.raises(InputError, match="stopping=none"):
        fit(module, tmp_path, loaders()[0])


def test_callbacks_beside_a_module_that_has_its_recipe_are_refused(tmp_path):
    module = knep.LitModule(mlp(), knep.load("none"), num_classes=2)
    with pytest.raises(InputError, match=r"leave knep.callbacks out"):
        fit(module, tmp_path, loaders()[0], callbacks=knep.callbacks("none"))


def test_plateau_steps_once_a_validation(tmp_path):
    class Rates(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    seen: list[float] = []
    recipe = knep.load("none", ["optimizer=none", "scheduler=plateau", "scheduler.patience=1"])
    more = {"check_val_every_n_epoch": 2, "callbacks": Rates()}
    train, val = loaders()
    fit(knep.LitModule(mlp(), recipe, num_classes=2), tmp_path, train, val, epochs=9, **more)
    # The weights stand still: the first validation is the best, the second is borne, the third (epoch 6) lowers it.
    assert seen == [pytest.approx(1.0)] * 6 + [pytest.approx(0.3)] * 3


def test_plateau_lowers_the_rate_where_an_accuracy_does_not_rise():
    recipe = knep.load("none", ["scheduler=plateau", "scheduler.monitor=val/acc", "scheduler.patience=0"])
    optimizer = recipe.optimizer(mlp())
    schedule = recipe.scheduler(optimizer, 100, 10)
    rates = []
    for acc in (0.5, 0.6, 0.7, 0.7):
        schedule.step(acc)  # type: ignore[arg-type]
        rates.append(optimizer.param_groups[0]["lr"] / recipe.lr)
    assert rates == [pytest.approx(r) for r in (1, 1, 1, 0.3)]


@pytest.mark.parametrize("slot", ["stopping=early", "averaging=soup"])
def test_a_metric_that_nobody_logs_is_refused_before_the_first_step(slot, tmp_path):
    name = slot.partition("=")[0]
    module = knep.LitModule(mlp(), knep.load("none", [slot, f"{name}.monitor=val/missed"]), num_classes=2)
    before = state(module)
    with pytest.raises(InputError, match="name one of val/acc, val/loss"):
        fit(module, tmp_path, *loaders())
    assert same(before, state(module))


def test_scaling_left_to_the_loader_is_said():
    with pytest.warns(UserWarning, match="scaling is left to your loader"):
        module = knep.LitModule(mlp(), knep.load("modern", ["norm=none"]), num_classes=2)
    assert isinstance(module.scaling, nn.Identity)


def test_no_word_about_scaling_where_there_is_none(recwarn):
    knep.LitModule(mlp(), knep.load("none"), num_classes=2)
    assert not recwarn.list


def test_from_config_takes_another_apps_dictconfig():
    cfg = OmegaConf.create(
        {
            "rate": 0.3,
            "optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": "${rate}"},
            "scheduler": {"_target_": "knep.recipes.scheduler.cosine", "_partial_": True, "warmup": 0.0},
            "dataset": {"seed": "${not.there}"},
        }
    )
    recipe, model = Recipe.from_config(cfg), mlp()
    before = state(model)
    assert not any(recipe.apply(model).changes.values())
    assert same(before, state(model))
    optimizer = recipe.optimizer(model)
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert recipe.clip(model.parameters()) == 0
    assert recipe.stopping is not None
    assert recipe.regularization.penalty([]) == 0.0
    recipe.scheduler(optimizer, 10)


def test_from_config_refuses_contradictions_by_target():
    cfg = OmegaConf.create(
        {
            "optimizer": OmegaConf.load(Path(knep.__file__).parent / "conf" / "optimizer" / "schedule_free.yaml"),
            "scheduler": {"_target_": "knep.recipes.scheduler.cosine", "_partial_": True},
        }
    )
    with pytest.raises(InputError, match="schedule_free contradicts scheduler=cosine"):
        Recipe.from_config(cfg)


def test_allow_lets_configs_build_what_is_yours():
    from knep.config.instantiate import check_targets

    node = {"_target_": "fractions.Fraction"}
    with pytest.raises(InputError, match="fractions"):
        check_targets(node)
    knep.allow("fractions.")
    check_targets(node)


def test_trainers_advertise_nothing(caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        knep.callbacks("none")
        Trainer(max_epochs=1, accelerator="cpu", logger=False)
    assert "Tip" not in caplog.text
