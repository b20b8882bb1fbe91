"""The doctor beside a loop: what it finds, when it began, and that it changes nothing."""

import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import SGD, Adam, AdamW

import knep.doctor
from knep.config.compose import compose_config
from knep.config.schema import RunConfig
from knep.doctor.findings import Finding, ranked
from knep.doctor.live.callback import Doctor
from knep.doctor.live.history import Stream, fresh
from knep.doctor.live.watch import Watch, following
from knep.ensemble.support import supports
from knep.errors import InputError
from knep.run.run import run


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y)


def mlp(activation=nn.ReLU, depth=3, width=48):
    layers = [nn.Flatten(), nn.Linear(64, width), activation()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def cnn():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


class Functional(nn.Module):
    """Its rectifiers are functions, and the first one is dead."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)
        nn.init.constant_(self.a.bias, -9)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x.flatten(1))))))


def edited(model, edit):
    """`edit` on each layer with weights."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            edit(layer)
    return model


def fitted(model, optimizer, data, steps=120, size=32, twist=None, clip=None, after=False, shuffle=True):
    """The watch behind so many steps; twist(step, x, y) spoils batches, after: drops gradients behind a step."""
    x, y = data
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator) if shuffle else y.argsort()
    with knep.doctor.watch(model, optimizer, on_finding="none") as d:
        for step in range(steps):
            i = order[(torch.arange(size) + step * size) % len(x)]
            xb, yb = (x[i], y[i]) if twist is None else twist(step, x[i], y[i])
            if not after:
                optimizer.zero_grad()
            loss = F.cross_entropy(model(xb).float(), yb)
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if after:
                optimizer.zero_grad()
            d.step(loss, y=yb)
    return d


def sgd(model, lr=0.05, momentum=0.9, decay=0.0):
    return SGD((p for p in model.parameters() if p.requires_grad), lr=lr, momentum=momentum, weight_decay=decay)


def times(factor):
    return lambda step, x, y: (x * factor, y)


def nan_at_15(step, x, y):
    return (x.masked_fill(x > 0.5, math.nan) if step == 15 else x), y


def burst(step, x, y):
    return (x * 300 if step in (60, 90) else x), y


def of_zeros(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def frozen():
    model = mlp()
    model[1].weight.requires_grad_(False)
    return model


def slow_norm():
    model = cnn()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1e-5
    return model


SICK = {
    "lr_too_high": (mlp, lambda m: sgd(m, 10.0), {}),
    "lr_too_high, Adam": (mlp, lambda m: Adam(m.parameters(), lr=1.0), {}),
    "lr_too_low": (mlp, lambda m: sgd(m, 1e-6), {}),
    "momentum_instability": (mlp, lambda m: sgd(m, 0.05, 0.999), {"steps": 200}),
    "unscaled_inputs": (cnn, sgd, {"twist": times(255), "steps": 40}),
    "non_finite_inputs": (mlp, sgd, {"twist": nan_at_15, "steps": 40}),
    "constant_inputs": (mlp, sgd, {"twist": lambda step, x, y: (torch.full_like(x, 0.3), y), "steps": 40}),
    "constant_labels": (mlp, sgd, {"twist": lambda step, x, y: (x, y * 0), "steps": 40}),
    "sorted_batches": (mlp, sgd, {"shuffle": False}),
    "vanishing_gradient": (lambda: mlp(nn.Sigmoid, 9), sgd, {"steps": 40}),
    "exploding_gradient": (lambda: edited(mlp(depth=8), lambda x: x.weight.data.mul_(15)), sgd, {"steps": 30}),
    "dying_relu": (lambda: edited(mlp(), lambda x: nn.init.constant_(x.bias, -5)), sgd, {}),
    "dying_relu, F.relu": (Functional, sgd, {}),
    "saturation": (lambda: edited(mlp(nn.Tanh), lambda x: x.weight.data.mul_(30)), lambda m: sgd(m, 0.01), {}),
    "symmetric_weights": (lambda: edited(mlp(), lambda x: nn.init.constant_(x.weight, 0.1)), sgd, {"steps": 40}),
    "symmetric_weights, zeros": (lambda: edited(mlp(), of_zeros), sgd, {"steps": 40}),
    "double_softmax": (lambda: nn.Sequential(*mlp(), nn.Softmax(1)), sgd, {"steps": 40}),
    "cut_off": (mlp, lambda m: SGD(m[3].parameters(), lr=0.05), {"steps": 40}),
    "frozen_parameters": (frozen, sgd, {"steps": 40}),
    "clip_throttles": (mlp, sgd, {"clip": 1e-3}),
    "weight_decay_too_large": (mlp, lambda m: sgd(m, 0.05, 0.9, 1.0), {}),
    "weight_decay_too_large, AdamW": (mlp, lambda m: AdamW(m.parameters(), lr=1e-2, weight_decay=5.0), {}),
    "loss_spikes": (mlp, lambda m: sgd(m, 0.02), {"twist": burst}),
    "precision_underflow": (
        lambda: mlp().to(torch.bfloat16),
        lambda m: sgd(m, 1e-3, 0.0),
        {"twist": lambda step, x, y: (x.to(torch.bfloat16), y), "steps": 60},
    ),
    "tiny_norm_batches": (cnn, lambda m: sgd(m, 0.01), {"size": 2, "steps": 40}),
}
HEALTHY = {
    "SGD": (mlp, sgd, {}),
    "Adam": (mlp, lambda m: Adam(m.parameters(), lr=3e-3), {}),
    "AdamW": (mlp, lambda m: AdamW(m.parameters(), lr=1e-3, weight_decay=0.05), {}),
    "tanh": (lambda: mlp(nn.Tanh), sgd, {}),
    "sigmoid": (lambda: mlp(nn.Sigmoid), lambda m: Adam(m.parameters(), lr=3e-3), {}),
    "deep": (lambda: mlp(depth=6), lambda m: Adam(m.parameters(), lr=1e-3), {}),
    "batch norm": (cnn, sgd, {}),
    "clipped": (cnn, sgd, {"clip": 1.0}),
    "gradients dropped behind the step": (mlp, sgd, {"after": True}),
    "a head of zeros": (lambda: nn.Sequential(*mlp()[:-1], zero_head()), sgd, {}),
}


def zero_head():
    head = nn.Linear(48, 10)
    of_zeros(head)
    return head


@pytest.mark.parametrize("case", SICK)
def test_the_cause_is_named_on_top(case, digits):
    build, optimizer, how = SICK[case]
    model = build()
    report = fitted(model, optimizer(model), digits, **how).report()
    assert report.findings[0].disease == case.partition(",")[0], str(report)
    assert all(f.began is not None and any(c.isdigit() for c in f.evidence + str(f.layers)) for f in report.findings)


@pytest.mark.parametrize("case", HEALTHY)
def test_nothing_is_found_in_a_healthy_run(case, digits):
    build, optimizer, how = HEALTHY[case]
    model = build()
    report = fitted(model, optimizer(model), digits, **how).report()
    assert not report.sick, str(report)


def test_a_finding_says_when_it_began(digits):
    model = mlp()
    report = fitted(model, sgd(model), digits, twist=nan_at_15, steps=30).report()
    assert report.findings[0].began == 15


def test_statistics_that_do_not_follow_are_found_where_validation_is_told(digits):
    found = {}
    for build in (cnn, slow_norm):
        torch.manual_seed(0)
        model = build()
        d = Watch(model, sgd(model), on_finding="none").__enter__()
        for step in range(100):
            loss = F.cross_entropy(model(digits[0][:256]), digits[1][:256])
            loss.backward()
            d._optimizer.step()
            d._optimizer.zero_grad()
            d.step(loss)
            if step % 25 == 24:
                model.eval()
                with torch.no_grad():
                    scores = model(digits[0][:256])
                model.train()
                d.validate(loss=float(F.cross_entropy(scores, digits[1][:256])))
        found[build] = [f.disease for f in d.report().findings]
        d.__exit__()
    assert found == {cnn: [], slow_norm: ["stale_statistics"]}


def test_overfitting_is_found_from_validations(digits):
    model = mlp()
    d = Watch(model, sgd(model), on_finding="none").__enter__()
    for step in range(200):
        d.step(2.3 * 0.97**step)
        if step % 20 == 19:
            d.validate(loss=abs(step - 60) / 100 + 1, acc=0.8 - abs(step - 60) / 1000)
    [finding] = d.report().findings
    assert (finding.disease, finding.began) == ("overfitting", 60)
    d.__exit__()


def trained(model, digits, watched, optimizer=None, steps=30):
    """([weights, random state, loss], watch) of a loop behind `model`, which torch.compile may have wrapped."""
    optimizer = optimizer or sgd(model)
    d = Watch(model, optimizer, every=4, on_finding="none")
    with d if watched else torch.enable_grad():
        for step in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(digits[0][step : step + 32]), digits[1][step : step + 32])
            loss.backward()
            optimizer.step()
            if watched:
                d.step(loss, y=digits[1][step : step + 32])
    return [*(p.clone() for p in model.state_dict().values()), torch.get_rng_state(), loss], d


def test_watching_changes_no_bit_and_leaves_no_hook(digits):
    kept = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*cnn()[:-1], nn.Dropout(0.3), nn.Linear(16, 10))
        optimizer = Adam(model.parameters(), lr=1e-2)
        found, d = trained(model, digits, watched, optimizer)
        kept.append(found)
        assert not watched or len(d.stream.looks) > 6
        for m in model.modules():
            assert not [*m._forward_hooks, *m._forward_pre_hooks]
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        assert not [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_hooks_are_gone_behind_an_error():
    model = mlp()
    with pytest.raises(RuntimeError, match="shapes"), knep.doctor.watch(model, sgd(model)):
        model(torch.zeros(2, 63))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_finding_is_warned_of_once(digits):
    model = mlp()
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with knep.doctor.watch(model, optimizer) as d:
            for _ in range(40):
                loss = F.cross_entropy(model(digits[0][:32] * 255), digits[1][:32])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                d.step(loss)
    said = [str(w.message) for w in heard if "not scaled" in str(w.message)]
    assert len(said) == 1
    assert said[0].startswith("doctor: since step 0: ")
    assert "\n" not in said[0]


def test_a_function_is_given_the_findings(digits):
    model, met = mlp(), []
    optimizer = sgd(model, 1e3)
    with knep.doctor.watch(model, optimizer, on_finding=met.append) as d:
        for step in range(30):
            d.step(1.0 if step < 20 else math.inf)
    assert [f.disease for f in met] == ["lr_too_high"]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda m, o: Watch("net", o), "str"),
        (lambda m, o: Watch(nn.Sequential(nn.ReLU()), o), "no parameters"),
        (lambda m, o: Watch(m, "sgd"), "torch.optim.Optimizer"),
        (lambda m, o: Watch(m, o, every=0), "every=0"),
        (lambda m, o: Watch(m, o, on_finding="shout"), "on_finding=shout"),
        (lambda m, o: Watch(m, o).step(1.0), "closed"),
        (lambda m, o: _opened(m, o).step("low"), "str"),
        (lambda m, o: _opened(m, o).step(torch.zeros(3)), "shape"),
        (lambda m, o: _opened(m, o).step(torch.zeros((), dtype=torch.complex64)), "real"),
    ],
)
def test_what_cannot_be_watched_is_one_line(call, named):
    model = mlp()
    with pytest.raises(InputError) as error:
        call(model, sgd(model))
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def _opened(model, optimizer):
    return Watch(model, optimizer, on_finding="none").__enter__()


def test_a_model_of_odd_parts_is_watched_without_an_error():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
            self.lstm = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x, *, extra=None):
            hidden, _ = self.lstm(self.words(x))
            return {"logits": self.head(hidden[:, -1]), "extra": extra}

    model = Odd()
    optimizer = sgd(model)
    with knep.doctor.watch(model, optimizer, every=2, on_finding="none") as d:
        for _ in range(6):
            loss = model(torch.randint(9, (5, 7)), extra=[])["logits"].square().mean()
            loss.backward()
            optimizer.step()
            d.step(loss, y=torch.rand(5, 3))
    assert d.stream.looks[0].output is not None
    assert len(d.stream.looks) == 4


def test_looks_are_dense_at_first():
    steps, step = [0], 0
    while step < 60:
        step = following(step, 20)
        steps.append(step)
    assert steps == [0, 1, 2, 4, 8, 16, 20, 40, 60]


def test_what_follows_from_a_cause_ranks_below_it():
    found = [Finding("dying_relu", "", 0.9, began=30), Finding("lr_too_high", "", 0.7, began=10)]
    assert [f.disease for f in ranked(found)] == ["lr_too_high", "dying_relu"]
    later = ranked([found[0], Finding("lr_too_high", "", 0.7, began=90)])
    assert [f.disease for f in later] == ["dying_relu", "lr_too_high"]


def test_a_random_start_is_told_from_trained_weights(digits):
    torch.manual_seed(0)
    model = mlp(width=100)
    names = ["1.weight", "3.weight"]  # the ten rows of a head tell little
    assert all(fresh(model.get_parameter(name)) for name in names)
    assert not fresh(model[1].bias)  # a vector tells nothing
    optimizer = Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(digits[0]), digits[1]).backward()
        optimizer.step()
    assert not any(fresh(model.get_parameter(name)) for name in names)


def test_losses_that_leap_are_counted_as_they_come():
    stream = Stream()
    for step in range(200):
        stream.losses.append(50.0 if step in (77, 140) else 1.0 + 0.01 * (step % 3))
        stream.advance()
    assert [step for step, _ in stream.leaps] == [77, 140]


LINES = ["data=digits", "trainer=cpu", "model=mlp", "model.widths=[32,32]", "recipe=none", "progress=false"]


def knep_run(folder, *lines):
    made = compose_config([*LINES, "trainer.max_epochs=3", "scaling=unit", *lines])
    run(made.config, folder, made.choices, made.overrides)
    weights = torch.load(folder / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"]
    return json.loads((folder / "summary.json").read_text()), weights


def test_the_callback_changes_no_bit_of_a_run(tmp_path, capsys):
    summary, weights = knep_run(tmp_path / "with", "callbacks=doctor", "doctor.every=5")
    plain, same = knep_run(tmp_path / "without")
    assert summary["findings"] == []
    assert "findings" not in plain
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[k], same[k]) for k in weights)
    assert "doctor:" not in capsys.readouterr().out


def test_the_callback_says_what_is_wrong_and_since_when(tmp_path, capsys):
    lines = ["optimizer=sgd", "optimizer.lr=1e-6", "callbacks=doctor", "doctor.every=10"]
    summary, _ = knep_run(tmp_path, *lines)
    [finding] = summary["findings"]
    assert finding["disease"] == "lr_too_low"
    assert finding["overrides"] == [["optimizer.lr=0.001"]]
    assert capsys.readouterr().out.count("doctor: since step 0: the learning rate is too low") == 1


def test_stop_ends_the_run_and_names_the_finding(tmp_path, capsys):
    lines = ["optimizer=sgd", "optimizer.lr=1e-6", "callbacks=doctor", "doctor.every=8", "doctor.on_finding=stop"]
    summary, _ = knep_run(tmp_path, *lines)
    assert (summary["status"], summary["stopped_by"]) == ("stopped_early", "lr_too_low")
    assert summary["steps"] < 60
    assert "the run stops" in capsys.readouterr().out


def test_cure_raises_a_rate_that_is_too_low(tmp_path, capsys):
    lines = ["optimizer=sgd", "optimizer.lr=1e-4", "callbacks=doctor", "doctor.every=10", "trainer.max_epochs=15"]
    sick, _ = knep_run(tmp_path / "sick", *lines)
    cured, _ = knep_run(tmp_path / "cured", *lines, "doctor.on_finding=cure")
    assert cured["val/acc"] > sick["val/acc"] + 0.1
    assert cured["findings"][0]["cure"].startswith("learning rate x ")
    assert "doctor: from step 40: learning rate x " in capsys.readouterr().out


def test_a_run_that_fails_leaves_its_findings(tmp_path):
    made = compose_config([*LINES, "optimizer=sgd", "optimizer.lr=1e36", "scaling=unit", "callbacks=doctor"])
    with pytest.raises(Exception, match="not finite"):
        run(made.config, tmp_path, made.choices, made.overrides)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["findings"][0]["disease"] == "lr_too_high"


def test_a_run_that_goes_on_keeps_what_was_found():
    doctor = Doctor(on_finding="cure")
    doctor._earlier = [Finding("lr_too_low", "slow", 0.7, began=3)]
    doctor._turns["lr_too_low"] = 2
    again = Doctor(on_finding="cure")
    again.load_state_dict(json.loads(json.dumps(doctor.state_dict())))
    assert again.findings == doctor.findings
    assert again._turns == doctor._turns


@pytest.mark.parametrize("wrong", [{"on_finding": "shout"}, {"every": 0}, {"every": 1.5}])
def test_the_callback_refuses_what_it_cannot_do(wrong):
    with pytest.raises(InputError, match="doctor"):
        Doctor(**wrong)


def test_the_doctor_is_refused_where_it_sees_no_whole_weights():
    with pytest.raises(InputError, match="callbacks=doctor"):
        compose_config(["data=digits", "trainer=fsdp", "recipe=none", "callbacks=doctor"])
    config = compose_config(["data=digits", "callbacks=doctor"]).config
    assert supports(RunConfig.of(config)) == "callbacks=doctor watches a single run"
