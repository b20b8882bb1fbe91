"""Recipes that others published: each composes, trains two steps at its own size, and agrees with its source's code.

Numbers on the right side are those of the sources, written out here, and what makes curves, groups and targets of them
is timm's and torch's own code.
"""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.optim.lamb import Lamb
from timm.optim.rmsprop_tf import RMSpropTF
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.step_lr import StepLRScheduler
from timm.utils.agc import adaptive_clip_grad
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torchvision.models import resnet34, resnet50

import knep
from knep.config.catalog import CONF, reason, recipe_choices
from knep.config.compose import compose_config
from knep.recipes.augment.mixing import MixupCutmix
from knep.run.run import run

ROOT = Path(__file__).parents[1]


# Recipe -> rate, decay, epochs, warm-up epochs, rate at its start, least rate: of timm's script, or of its like.
COSINES = {
    "timm_a1": (5e-3, 0.01, 600, 5, 1e-4, 1e-6),
    "timm_a2": (5e-3, 0.02, 300, 5, 1e-4, 1e-6),
    "timm_a3": (8e-3, 0.02, 100, 5, 1e-4, 1e-6),
    "timm_c1": (0.4, 1e-4, 600, 5, 1e-4, 1e-6),
    "timm_c2": (0.4, 1e-4, 600, 5, 1e-4, 1e-6),
    "timm_d": (2e-3, 0.05, 600, 5, 1e-4, 1e-6),
    "deit_s": (1e-3, 0.05, 300, 5, 1e-6, 1e-5),
}
# Recipe -> alphas of mixup and CutMix, smoothing.
MIXES = {
    "timm_a1": (0.2, 1.0, 0.1),
    "timm_a2": (0.1, 1.0, 0.0),
    "timm_a3": (0.1, 1.0, 0.0),
    "timm_b": (0.19, 0.0, 0.1),
    "torchvision_2021": (0.2, 1.0, 0.1),
    "deit_s": (0.8, 1.0, 0.1),
    "convnext_t": (0.8, 1.0, 0.1),
    "vit_s_plain": (0.2, 0.0, 0.0),
}
QUICK = ("airbench94", "timm_ra4", "deit_s")
PUBLISHED = (
    *("timm_a1", "timm_a2", "timm_a3", "timm_b", "timm_c1", "timm_c2", "timm_d", "timm_ra4"),
    *("torchvision_2021", "deit_s", "convnext_t", "vit_s_plain", "airbench94", "fastai_finetune"),
)
SMALL = (
    *("data=synthetic", "data.channels=3", "data.classes=3", "data.images=12", "data.batch_size=3", "trainer=cpu"),
    *("trainer.precision=32-true", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "progress=false"),
    *("threads=1", "log_every=1"),
)
EPOCH = 3  # steps of one, in the curves


def loaded(name, *lines):
    return knep.load(name, list(lines))


def curve(name, epochs, *lines):
    """The rate of each step, of one parameter with the recipe's own rate."""
    recipe = loaded(name, *lines)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    scheduler = recipe.scheduler(optimizer, epochs * EPOCH, EPOCH)
    rates = []
    for _ in range(epochs * EPOCH):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


def by_epoch(scheduler, epochs):
    """The rates of a scheduler of timm's, each for all steps of its epoch."""
    rates = []
    for epoch in range(epochs):
        scheduler.step(epoch)
        rates += [scheduler.optimizer.param_groups[0]["lr"]] * EPOCH
    return np.array(rates)


def one(lr):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_head_is_a_table_of_the_source_and_says_that_nothing_was_measured(name):
    text = (CONF / "recipe" / f"{name}.yaml").read_text()
    comments = re.sub(r"\n#   ", " ", text[: text.index("\ndefaults:")]).splitlines()
    rows = [line.removeprefix("# ").split(" | ") for line in comments if line.count(" | ") == 2][1:]
    settings = [row[0] for row in rows]
    assert settings[0] == "---"
    assert len(rows) >= 15
    assert {"source", "reported"} <= set(settings)
    assert "not measured here" in reason("recipe", name)
    assert "in part" in reason("recipe", name) or "could be read" not in " ".join(map(str, rows)).split("reported")[0]
    assert f"recipe={name}: not measured yet." in text
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert f"`{name}`" in page
    reported = next(row[1] for row in rows if row[0] == "reported")
    assert (re.findall(r"\d\d\.\d+", reported) or [name])[0] in page


def size(name):
    config = compose_config([f"recipe={name}"]).config
    return 32 if name == "airbench94" else config["data"]["size"]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]
)
def test_it_trains_two_steps_at_its_own_size(name, tmp_path):
    lines = [f"recipe={name}", f"data.image_size={size(name)}", *SMALL, "trainer.max_epochs=1", "trainer.max_steps=2"]
    if name == "fastai_finetune":  # one step of the head, one of all
        torch.save(resnet34(num_classes=7).state_dict(), tmp_path / "weights.pt")
        lines = [*lines[:-2], "trainer.max_epochs=2", "trainer.limit_train_batches=1"]
        lines += [f"model.weights={tmp_path / 'weights.pt'}"]
    made = compose_config(lines)
    assert {slot: made.choices[slot] for slot in recipe_choices(name) if slot != "data"} == {
        slot: option for slot, option in recipe_choices(name).items() if slot != "data"
    }
    (tmp_path / "run").mkdir()
    summary = run(made.config, tmp_path / "run", made.choices, made.overrides, figures=False)
    assert summary["steps"] == 2
    assert math.isfinite(summary["test/loss"])


@pytest.mark.parametrize("name", COSINES)
def test_rates_are_those_of_timms_cosine(name):
    lr, _, epochs, warm, start, least = COSINES[name]
    timms = CosineLRScheduler(one(lr), t_initial=epochs, lr_min=least, warmup_t=warm, warmup_lr_init=start)
    rates = curve(name, epochs)
    assert loaded(name).max_epochs == epochs
    np.testing.assert_allclose(rates, by_epoch(timms, epochs), rtol=1e-6, atol=0)
    other = curve(name, epochs, "scheduler.prefix=true")
    assert np.abs(other / by_epoch(timms, epochs) - 1).max() > 1e-3  # the key is what makes them agree


def test_rates_of_b_are_those_of_timms_staircase_behind_the_warm_up():
    timms = StepLRScheduler(one(0.082), decay_t=1, decay_rate=0.988, warmup_t=3, warmup_prefix=False)
    np.testing.assert_allclose(curve("timm_b", 700)[3 * EPOCH :], by_epoch(timms, 700)[3 * EPOCH :], rtol=1e-6, atol=0)


def test_rates_are_those_of_torchvisions_script():
    optimizer = one(0.5)
    up, down = LinearLR(optimizer, 0.01, total_iters=5), CosineAnnealingLR(optimizer, T_max=595)
    scheduler, rates = SequentialLR(optimizer, [up, down], milestones=[5]), []
    for _ in range(600):
        rates += [optimizer.param_groups[0]["lr"]] * EPOCH
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(curve("torchvision_2021", 600), rates, rtol=1e-6, atol=1e-12)


def test_rates_of_other_sources_are_their_formulas():
    epochs = 90
    n = epochs * EPOCH
    t, warm = np.arange(n), round(10_000 / 111_476 * n)
    plain = 1e-3 * np.minimum(1, t / warm) * 0.5 * (1 + np.cos(np.pi * np.clip((t - warm) / (n - warm), 0, 1)))
    np.testing.assert_allclose(curve("vit_s_plain", epochs), plain, rtol=1e-6, atol=1e-12)
    n, warm = 300 * EPOCH, 20 * EPOCH
    rest = np.arange(n - warm)
    fall = 1e-6 + 0.5 * (4e-3 - 1e-6) * (1 + np.cos(np.pi * rest / len(rest)))
    rates = curve("convnext_t", 300)
    np.testing.assert_allclose(rates[warm:], fall, rtol=1e-6)
    assert (
        np.abs(rates[:warm] - np.linspace(0, 4e-3, warm)).max() <= 4e-3 / warm + 1e-9
    )  # a step later, as its table says
    n = 160 * EPOCH
    warm = int(n * 0.23)
    triangle = [0.2 + 0.8 * s / warm if s < warm else 1 - 0.93 * (s - warm) / (n - warm) for s in range(n)]
    np.testing.assert_allclose(curve("airbench94", 160), 1.5 * np.array(triangle), rtol=1e-6)


NETS = {
    "timm_a1": ("resnet50", {"drop_path_rate": 0.05}),
    "timm_ra4": ("mobilenetv1_100", {"drop_rate": 0.3}),
    "deit_s": ("deit_small_patch16_224", {"drop_path_rate": 0.1}),
    "convnext_t": ("convnext_tiny", {"drop_path_rate": 0.1}),
}


def decaying(groups, names):
    """Parameter -> its decay."""
    found = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    return {name: found[id(p)] for name, p in names.items()}


@pytest.mark.parametrize("name", NETS)
def test_what_decays_is_what_decays_in_timm(name):
    net, args = NETS[name]
    node = compose_config([f"recipe={name}"]).config["model"]
    assert (node["name"], node["args"]) == (net, args)
    model = timm.create_model(net, num_classes=3, **args)
    decay = {"timm_a1": 0.01, "timm_ra4": 0.01, "deit_s": 0.05, "convnext_t": 0.05}[name]
    kept = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    timms = param_groups_weight_decay(model, weight_decay=decay, no_weight_decay_list=kept)
    ours, names = loaded(name).optimizer(model).param_groups, dict(model.named_parameters())
    assert decaying(ours, names) == decaying(timms, names)
    assert set(decaying(ours, names).values()) == {0.0, decay}


def test_what_decays_in_torchvision_is_that_and_one_bias():
    model = resnet50(num_classes=3)
    names = dict(model.named_parameters())
    norms = {
        f"{path}.{n}" for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) for n in ("weight", "bias")
    }
    groups = loaded("torchvision_2021").optimizer(model).param_groups
    free = {name for name, decay in decaying(groups, names).items() if decay == 0}
    assert free - norms == {"fc.bias"}
    assert norms <= free


def test_rates_by_layer_are_timms():
    model = timm.create_model("deit_small_patch16_224", num_classes=3)
    timms = param_groups_layer_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.7
    )
    scales = {id(p): group["lr_scale"] for group in timms for p in group["params"]}
    recipe = loaded("deit_s", "finetune=layerwise", "finetune.layer_decay=0.7")
    for group in recipe.optimizer(model).param_groups:
        for p in group["params"]:
            assert group["lr"] == pytest.approx(1e-3 * scales[id(p)], rel=1e-6)


def test_rates_of_fastai_span_two_orders():
    model = resnet34(num_classes=3)
    names = dict(model.named_parameters())
    groups = loaded("fastai_finetune").optimizer(model).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(names["fc.weight"])] == pytest.approx(1e-3)
    assert rates[id(names["conv1.weight"])] == pytest.approx(1e-5, rel=0.02)
    assert 1e-5 < rates[id(names["layer3.0.conv1.weight"])] < 1e-3


def mixing(name):
    stage = loaded(name).augment.stages["mixup_cutmix"].train()
    assert isinstance(stage, MixupCutmix)
    return stage


@pytest.mark.parametrize("name", MIXES)
def test_targets_of_mixed_images_are_timms(name):
    mixup, cutmix, smoothing = MIXES[name]
    stage, kinds = mixing(name), set()
    assert stage._alphas == (mixup, cutmix)
    y = torch.arange(6)
    x = y.float()[:, None, None, None].expand(6, 3, 16, 16)  # each image in a level of its own
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, target = stage(x, y, 6)
        if len(mixed[0].unique()) == 1:
            lam = 1 - mixed[0, 0, 0, 0].item() / 5  # of the first image, 0, its partner being the last, 5
            kinds.add("mixup")
        else:
            lam = (mixed[0, 0] == 0).float().mean().item()
            kinds.add("cutmix")
        expected = mixup_target(y, 6, lam=lam, smoothing=smoothing)
        torch.testing.assert_close(target, expected, rtol=0, atol=1e-6)
    assert kinds == ({"mixup", "cutmix"} if cutmix else {"mixup"})


@pytest.mark.parametrize(
    ("name", "threshold"), [("timm_a1", None), ("timm_a2", 0.0), ("timm_a3", 0.0), ("timm_d", None)]
)
def test_binary_cross_entropy_is_timms(name, threshold):
    scores, target = torch.randn(8, 5), torch.rand(8, 5).softmax(1) * (torch.rand(8, 5) > 0.5)
    timms = BinaryCrossEntropy(smoothing=0.0, target_threshold=threshold)(scores, target)
    assert loaded(name).loss(scores, target).item() == pytest.approx(timms.item(), rel=1e-6)


def steps(optimizer_of, net, gradients):
    optimizer = optimizer_of(net)
    for step in range(8):
        for p, g in zip(net.parameters(), gradients[step], strict=True):
            p.grad = g.clone()
        optimizer.step()
    return list(net.parameters())


@pytest.mark.parametrize(
    ("name", "timms"),
    [
        ("timm_a1", lambda groups: Lamb(groups, lr=5e-3, weight_decay=0.01)),
        ("timm_b", lambda groups: RMSpropTF(groups, lr=0.082, alpha=0.9, eps=1e-3, momentum=0.9)),
    ],
)
def test_steps_are_those_of_timms_optimizer(name, timms):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))

    gradients = [[torch.randn_like(p) for p in net().parameters()] for _ in range(8)]
    recipe = loaded(name)
    ours = steps(recipe.optimizer, net(), gradients)
    decay = recipe.weight_decay
    theirs = steps(lambda m: timms(param_groups_weight_decay(m, weight_decay=decay)), net(), gradients)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["timm_c1", "timm_c2"])
def test_clipping_is_timms_but_for_the_head(name):
    gradients = [torch.randn(4, 3, 3, 3), torch.randn(4), torch.randn(3, 16)]
    weights = [nn.Parameter(torch.randn_like(g)) for g in gradients]
    found = []
    for clip in (loaded(name).clip, lambda ps: adaptive_clip_grad(ps, clip_factor=0.01, eps=1e-3)):
        for p, g in zip(weights, gradients, strict=True):
            p.grad = g.clone()
        clip(weights)
        found.append([p.grad.clone() for p in weights])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
