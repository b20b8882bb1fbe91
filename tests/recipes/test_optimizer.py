"""Optimizers: two steps in float64 against the published formula, or against the library where the rule is its own."""

import copy
import io
import itertools
import unittest.mock
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_optimizer
import torch
import torchvision.models as tv
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import knep
from knep.errors import InputError
from knep.models.resnet import resnet
from knep.optim.param_groups import param_groups
from knep.recipes import norm

CONF = Path(knep.__file__).parent / "conf" / "optimizer"
OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml"))
TRAINING = sorted(set(OPTIONS) - {"none"})
LR, DECAY = 0.1, 0.2

Rule = Callable[[np.ndarray, np.ndarray, dict[str, Any], int, dict[str, Any]], np.ndarray]


def node(option: str, **hp: Any) -> dict[str, Any]:
    """The option's hyper-parameters, those of `hp` in the place of the file's."""
    cfg = OmegaConf.to_container(OmegaConf.load(CONF / f"{option}.yaml"))
    assert isinstance(cfg, dict)
    cfg.pop("accumulate", None)
    return {str(key): value for key, value in cfg.items()} | hp


def make(option: str, model: nn.Module, layer_decay: float = 1.0, **hp: Any) -> Optimizer:
    cfg = node(option, **hp)
    groups = param_groups(model, lr=cfg["lr"], weight_decay=cfg["weight_decay"], layer_decay=layer_decay)
    return instantiate(cfg, _convert_="all")(groups)


def quadratic() -> nn.Linear:
    """A weight that decays and a bias that does not."""
    model = nn.Linear(3, 4).double()
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p)
    return model


CURVATURE = {"weight": np.linspace(0.2, 2.0, 12).reshape(4, 3), "bias": np.linspace(-1.0, 3.0, 4)}


def slope(name: str, w: np.ndarray) -> np.ndarray:
    """Gradient of sum(c w^2 / 2 + w)."""
    return CURVATURE[name] * w + 1


def closure_of(model: nn.Module, optimizer: Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((torch.tensor(CURVATURE[n]) * p * p / 2 + p).sum() for n, p in model.named_parameters())
        assert isinstance(loss, Tensor)
        loss.backward()
        return loss

    return closure


def two_steps(option: str, steps: int = 2, **hp: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The weights before, and after the steps."""
    model = quadratic()
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    optimizer = make(option, model, **hp)
    for _ in range(steps):
        optimizer.step(closure_of(model, optimizer))
    return before, {name: p.detach().numpy() for name, p in model.named_parameters()}


def follows(option: str, rule: Rule, rtol: float = 1e-9) -> Callable[[], None]:
    """A row: two steps of the option are two of the rule, with decay on the weight and none on the bias."""

    def row() -> None:
        before, after = two_steps(option, lr=LR, weight_decay=DECAY)
        hp = node(option, lr=LR)
        for name, w in before.items():
            state: dict[str, Any] = {}
            for t in (1, 2):
                w = rule(w, slope(name, w), state, t, hp | {"weight_decay": DECAY * (name == "weight")})
            np.testing.assert_allclose(after[name], w, rtol=rtol, atol=0)

    return row


def sgd(w: np.ndarray, g: np.ndarray, s: dict, t: int, hp: dict) -> np.ndarray:
    return w - LR * (g + hp["weight_decay"] * w)


def momentum(w: np.ndarray, g: np.ndarray, s: dict, t: int, hp: dict) -> np.ndarray:
    s["v"] = hp["momentum"] * s.get("v", 0) + g + hp["weight_decay"] * w
    return w - LR * s["v"]


def nesterov(w: np.ndarray, g: np.ndarray, s: dict, t: int, hp: dict) -> np.ndarray:
    g = g + hp["weight_decay"] * w
    s["v"] = hp["momentum"] * s.get("v", 0) + g
    return w - LR * (g + hp["momentum"] * s["v"])


def adagrad(w: np.ndarray, g: np.ndarray, s: dict, t: int, hp: dict) -> np.ndarray:
    g = g + hp["weight_decay"] * w
    s["sum"] = s.get("sum", 0) + g**2
    return w - LR * g / (np.sqrt(s["sum"]) + hp["eps"])


def rmsprop(w: np.ndarray, g: np.ndarray, s: dict, t: int, hp: dict) -> np.ndarray:
    g = g + hp["weight_decay"] * w
    s["v"] = hp["alpha"] * s.get("v", 0) + (1 - hp["alpha"]) * g**2
    return w - LR * g / (np.sqrt(s["v"]) + hp["eps"])


def rmsprop_tf(w: np.ndarray, g: np.ndarray, s: dict, t: int, hp: dict) -> np.ndarray:
    """As TensorFlow 1: squares from 1, eps under the root, the rate in the momentum."""
    g = g + hp["weight_decay"] * w
    s["v"] = hp["alpha"] * s.get("v", 1) + (1 - hp["alpha"]) * g**2
    s["b"] = hp["momentum"] * s.get("b", 0) + LR * g / np.sqrt(s["v"] + hp["eps"])
    return w - s["b"]


def adadelta(w: np.ndarray, g: np.ndarray, s: dict, t: int, hp: dict) -> np.ndarray:
    """Zeiler 2012, algorithm 1, times the rate."""
    rho, eps, g = hp["rho"], hp["eps"], g + hp["weight_decay"] * w
    s["g2"] = rho * s.get("g2", 0) + (1 - rho) * g**2
    step = np.sqrt(s.get("d2", 0) + eps) / np.sqrt(s["g2"] + eps) * g
    s["d2"] = rho * s.get("d2", 0) + (1 - rho) * step**2
    return w - LR * step


def moments(g: np.ndarray, s: dict, hp: dict) -> tuple[np.ndarray, np.ndarray]:
    b1, b2 = hp["betas"]
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g**2
    return s["m"], s["v"]


def adam(w: np.ndarray, g: np.ndarray, s: dict, t: int, hp: dict) -> np.ndarray:
    """Kingma and Ba 2015, algorithm 1."""
    (b1, b2), (m, v) = hp["betas"], moments(g + hp["weight_decay"] * w, s, hp)
    return w - LR * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + hp["eps"])


def adamw(w: np.ndarray, g: np.ndarray, s: dict, t: int, hp: dict) -> np.ndarray:
    """Loshchilov and Hutter 2019, algorithm 2."""
    return adam(w, g, s, t, hp | {"weight_decay": 0.0}) - LR * hp["weight_decay"] * w


def nadam(w: np.ndarray, g: np.ndarray, s: dict, t: int, hp: dict) -> np.ndarray:
    """Dozat 2016, algorithm 8, with its schedule of momentum."""
    (b1, b2), g = hp["betas"], g + hp["weight_decay"] * w
    m, v = moments(g, s, hp)
    mu, mu_next = (b1 * (1 - 0.5 * 0.96 ** (k * hp["momentum_decay"])) for k in (t, t + 1))
    s["product"] = s.get("product", 1) * mu
    m_hat = mu_next * m / (1 - s["product"] * mu_next) + (1 - mu) * g / (1 - s["product"])
    return w - LR * m_hat / (np.sqrt(v / (1 - b2**t)) + hp["eps"])


def radam(w: np.ndarray, g: np.ndarray, s: dict, t: int, hp: dict) -> np.ndarray:
    """Liu et al. 2020, algorithm 2."""
    (b1, b2), (m, v) = hp["betas"], moments(g + hp["weight_decay"] * w, s, hp)
    longest = 2 / (1 - b2) - 1
    length = longest - 2 * t * b2**t / (1 - b2**t)
    m_hat = m / (1 - b1**t)
    if length <= 5:
        return w - LR * m_hat
    ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return w - LR * m_hat * np.sqrt(ratio) * np.sqrt(1 - b2**t) / (np.sqrt(v) + hp["eps"])


def radam_rectified() -> None:
    """The first steps above are unrectified; these seven with a short memory are not."""
    _, after = two_steps("radam", 7, lr=LR, weight_decay=0.0, betas=[0.9, 0.95])
    w, state = quadratic().bias.detach().numpy(), {}
    for t in range(1, 8):
        w = radam(w, slope("bias", w), state, t, node("radam", betas=(0.9, 0.95), weight_decay=0.0))
    np.testing.assert_allclose(after["bias"], w, rtol=1e-6)
    follows("radam", radam)()


def lion(w: np.ndarray, g: np.ndarray, s: dict, t: int, hp: dict) -> np.ndarray:
    """Chen et al. 2023, algorithm 2."""
    b1, b2 = hp["betas"]
    m = s.get("m", 0)
    s["m"] = b2 * m + (1 - b2) * g
    return w - LR * (np.sign(b1 * m + (1 - b1) * g) + hp["weight_decay"] * w)


def normalized_sgd() -> None:
    """One norm over all parameters; lr is the length of a step; a zero gradient moves nothing."""
    before, after = two_steps("normalized_sgd", 2, lr=LR, weight_decay=0.0)
    w = before
    for _ in range(2):
        g = {name: slope(name, value) for name, value in w.items()}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        w = {name: value - LR * g[name] / norm for name, value in w.items()}
    for name in w:
        np.testing.assert_allclose(after[name], w[name], rtol=1e-12)
    model = quadratic()
    still = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    make("normalized_sgd", model).step()
    assert all(torch.equal(p, still[name]) for name, p in model.named_parameters())


JORDAN = ((3.4445, -4.7750, 2.0315),) * 5


def newton_schulz(m: np.ndarray, polynomials: Sequence[tuple[float, float, float]] = JORDAN) -> np.ndarray:
    """Quintic steps in float64; by default the five of Jordan et al. 2024."""
    x = m / np.linalg.norm(m)
    for a, b, c in polynomials:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def normuon_of(o: np.ndarray, state: dict, t: int) -> np.ndarray:
    """Li et al. 2025: rows by their mean square over steps, the whole as long as before."""
    state["v"] = 0.9 * state.get("v", 0) + 0.1 * (o**2).mean(1, keepdims=True)
    u = o / np.sqrt(state["v"])
    return u * np.linalg.norm(o) / np.linalg.norm(u)


def adamuon_of(o: np.ndarray, state: dict, t: int) -> np.ndarray:
    """Si, Zhang and Shen 2025: elements by their mean square over steps, the whole as long as an orthogonal matrix."""
    state["v"] = 0.9 * state.get("v", 0) + 0.1 * o**2
    u = o / np.sqrt(state["v"])
    return u * np.sqrt(min(o.shape)) / np.linalg.norm(u)


def follows_muon(variant: str, of: Callable[[np.ndarray, dict, int], np.ndarray], **hp: Any) -> None:
    """Matrices, convolutions as (filters, channels x taps), by Newton-Schulz; the bias by AdamW with its own rate.

    Element by element where products are float32; in bfloat16, which each processor rounds in its own way, on average.
    """
    for bf16, shape in itertools.product((False, True), ("linear", "conv")):
        draw = np.random.default_rng(0)
        torch.manual_seed(0)
        layer = nn.Linear(30, 40).double() if shape == "linear" else nn.Conv2d(2, 5, 3).double()
        with unittest.mock.patch("knep.recipes.optimizer.cpu_bf16", lambda bf16=bf16: bf16):
            optimizer = make("muon", layer, lr=LR, weight_decay=DECAY, adamw_lr=0.01, variant=variant, **hp)
        w, b = (p.detach().numpy().copy() for p in layer.parameters())
        scale, buffer, state, second = np.sqrt(max(1, len(w) / w[0].size)), 0.0, {}, {}
        for t in (1, 2):
            g, gb = draw.normal(size=w.shape), draw.normal(size=b.shape)
            layer.weight.grad, layer.bias.grad = torch.tensor(g), torch.tensor(gb)  # type: ignore[union-attr]
            optimizer.step()
            buffer = 0.95 * buffer + 0.05 * g
            ahead = (0.05 * g + 0.95 * buffer).reshape(len(w), -1)
            orthogonal = newton_schulz(np.sign(ahead) if variant == "adamuon" else ahead)
            w = w * (1 - LR * DECAY) - LR * scale * of(orthogonal, second, t).reshape(w.shape)
            m, v = moments(gb, state, {"betas": (0.9, 0.95)})
            b = b - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        off = (layer.weight.detach().numpy() - w) / LR
        assert (off**2).mean() ** 0.5 < 0.01 if bf16 else abs(off).max() < 1e-4
        np.testing.assert_allclose(layer.bias.detach().numpy(), b, rtol=1e-9)  # type: ignore[union-attr]


def muon() -> None:
    follows_muon("muon", lambda o, state, t: o)


@pytest.mark.parametrize(("variant", "of"), [("normuon", normuon_of), ("adamuon", adamuon_of)])
def test_a_variant_of_muon_scales_what_is_orthogonal(variant: str, of: Callable[..., np.ndarray]) -> None:
    follows_muon(variant, of, beta2=0.9)
    model = net()
    optimizer = make("muon", model, variant=variant)
    buffer = io.BytesIO()
    train(model, optimizer, range(3))
    torch.save(optimizer.state_dict(), buffer)
    twin = copy.deepcopy(model)
    resumed = make("muon", twin, variant=variant)
    resumed.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    for m, o in ((model, optimizer), (twin, resumed)):
        train(m, o, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def best_polynomials(steps: int, safety: float, low: float = 1e-3, cushion: float = 0.02) -> list[np.ndarray]:
    """Amsel et al. 2025, algorithm 1: for singular values in [low, 1] the odd quintics nearest to 1, each for what the
    last one left, found by the points at which the error alternates.
    """
    found, high = [], 1.0
    for step in range(steps):
        left = max(low, cushion * high)
        q, r = (3 * left + high) / 4, (left + 3 * high) / 4
        a, b, c = 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5  # its limit, where left and high are one
        for _ in range(1000 if left / high < 1 - 5e-6 else 0):
            points = np.array([left, q, r, high])
            system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], 1)
            a, b, c, _ = np.linalg.solve(system, np.ones(4))
            root = np.sqrt(9 * b**2 - 20 * a * c)
            q, r = np.sqrt((-3 * b - root) / (10 * c)), np.sqrt((-3 * b + root) / (10 * c))
        at = lambda x: a * x + b * x**3 + c * x**5  # noqa: B023, E731
        inside = 1 + safety * (step < steps - 1)
        factors = 2 / (at(low) + at(high)) / inside ** np.array([1, 3, 5])
        a, b, c = (factors * np.array([a, b, c])).tolist()
        low, high = at(low), 2 - at(low)
        found.append(np.array([a, b, c]))
    return found


@pytest.mark.parametrize(("coefficients", "safety"), [("polar_express", 0.01), ("polar_express_safer", 0.02)])
def test_polar_express_takes_the_papers_polynomials(coefficients: str, safety: float) -> None:
    model = nn.Linear(3, 3)
    taken = make("muon", model, coefficients=coefficients).param_groups[0]["ns_coeffs"]
    np.testing.assert_allclose(taken[:7], best_polynomials(8, safety)[:7], rtol=1e-6)
    square = torch.diag(torch.logspace(-2, 0, 8))
    strays = {}
    for name in ("original", coefficients):
        layer = nn.Linear(8, 8, bias=False)
        before = layer.weight.detach().clone()
        layer.weight.grad = square.clone()
        make("muon", layer, lr=1.0, weight_decay=0.0, coefficients=name).step()
        values = torch.linalg.svdvals(before - layer.weight.detach())
        strays[name] = (values - 1).abs().max().item()
    assert strays["original"] > 0.2
    assert strays[coefficients] < 0.17


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"variant": "turbo"}, "variant must be one of muon, normuon, adamuon"),
        ({"coefficients": "best"}, "coefficients must be one of original"),
        ({"beta2": 0.9}, "write variant=normuon"),
        ({"variant": "adamuon", "beta2": 1.0}, "beta2"),
    ],
)
def test_muon_refuses_what_no_variant_reads(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make("muon", net(), **values)


def test_muon_takes_convolutions_that_torchs_own_refuses() -> None:
    layer = nn.Conv2d(2, 5, 3, bias=False)
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon(layer.parameters())
    assert make("muon", layer).param_groups[0]["use_muon"]


def library(option: str, upstream: Callable[..., Optimizer], steps: int = 4) -> Callable[[], None]:
    """A row: the option's steps are those of the library's class with the same values, given by hand."""

    def row() -> None:
        _, after = two_steps(option, steps, lr=LR, weight_decay=DECAY)
        model = quadratic()
        groups = [{"params": [model.weight], "weight_decay": DECAY}, {"params": [model.bias], "weight_decay": 0.0}]
        optimizer = upstream(groups)
        for _ in range(steps):
            optimizer.step(closure_of(model, optimizer))
        for name, p in model.named_parameters():
            np.testing.assert_allclose(after[name], p.detach().numpy(), rtol=1e-12)
        assert not np.allclose(after["weight"], quadratic().weight.detach().numpy())

    return row


def shampoo() -> None:
    """The library's Shampoo (the paper's) and its ScalableShampoo (grafted to the gradient's length)."""

    def steps_of(optimizer: Optimizer, model: nn.Linear) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            model.weight.grad = torch.randn(4, 4, dtype=torch.float64, generator=generator)
            optimizer.step()
        return model.weight.detach().numpy()

    start = nn.Linear(4, 4, bias=False).double()
    models = [copy.deepcopy(start) for _ in range(4)]
    hp: dict[str, Any] = {"lr": LR, "weight_decay": 0.0, "momentum": 0.0, "beta2": 1.0, "eps": 1e-15, "every": 1}
    plain = make("shampoo", models[0], **hp, graft=False)
    upstream = pytorch_optimizer.Shampoo(models[1].parameters(), lr=LR, matrix_eps=1e-15)
    np.testing.assert_allclose(steps_of(plain, models[0]), steps_of(upstream, models[1]), rtol=1e-7)
    grafted = make("shampoo", models[2], **hp | {"beta2": 0.9, "momentum": 0.8}, graft=True)
    scalable = pytorch_optimizer.ScalableShampoo(
        models[3].parameters(), lr=LR, betas=(0.8, 0.9), matrix_eps=1e-15, use_svd=True, nesterov=False,
        start_preconditioning_step=1, preconditioning_compute_steps=1, shape_interpretation=False,
    )  # fmt: skip
    np.testing.assert_allclose(steps_of(grafted, models[2]), steps_of(scalable, models[3]), rtol=1e-7)


def sam() -> None:
    """Foret et al. 2021, algorithm 1, under SGD with momentum: the closure is called at w and at w + e."""
    before, after = two_steps("sam", lr=LR, weight_decay=DECAY, rho=0.3)
    w, v = before, dict.fromkeys(before, 0.0)
    for _ in range(2):
        g = {n: slope(n, x) for n, x in w.items()}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        g = {n: slope(n, x + 0.3 * g[n] / norm) + DECAY * (n == "weight") * x for n, x in w.items()}
        v = {n: 0.9 * v[n] + g[n] for n in w}
        w = {n: x - LR * v[n] for n, x in w.items()}
    for name in w:
        np.testing.assert_allclose(after[name], w[name], rtol=1e-6)  # the library measures ||g|| in float32


def nvlamb() -> None:
    """You et al. 2020, algorithm 2, with the gradient shortened first; what does not decay is Adam's."""
    before, after = two_steps("nvlamb", lr=LR, weight_decay=DECAY, max_norm=0.5)
    w, states = before, {name: {} for name in before}
    for t in (1, 2):
        g = {n: slope(n, x) for n, x in w.items()}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        assert norm > 0.5
        for n, x in w.items():
            m, v = moments(g[n] * 0.5 / norm, states[n], {"betas": (0.9, 0.999)})
            u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6)
            if n == "weight":
                u = u + DECAY * x
                u = u * np.sqrt((x**2).sum() / (u**2).sum())
            w = w | {n: x - LR * u}
    for name in w:
        np.testing.assert_allclose(after[name], w[name], rtol=1e-6)


ROWS: dict[str, Callable[[], None]] = {
    "gd": follows("gd", sgd),
    "sgd": follows("sgd", sgd),
    "momentum": follows("momentum", momentum),
    "nesterov": follows("nesterov", nesterov),
    "normalized_sgd": normalized_sgd,
    "adagrad": follows("adagrad", adagrad),
    "rmsprop": follows("rmsprop", rmsprop),
    "rmsprop_tf": follows("rmsprop_tf", rmsprop_tf),
    "nvlamb": nvlamb,
    "adadelta": follows("adadelta", adadelta),
    "adam": follows("adam", adam),
    "adamw": follows("adamw", adamw),
    "nadam": follows("nadam", nadam, 1e-6),  # torch holds its product of momenta in float32
    "radam": radam_rectified,
    "lion": follows("lion", lion),
    "lamb": library("lamb", lambda groups: pytorch_optimizer.Lamb(groups, lr=LR, betas=(0.9, 0.999))),
    "adan": library("adan", lambda groups: pytorch_optimizer.Adan(groups, lr=LR, betas=(0.98, 0.92, 0.99))),
    "muon": muon,
    "soap": library("soap", lambda groups: pytorch_optimizer.SOAP(groups, lr=LR, betas=(0.95, 0.95))),
    "shampoo": shampoo,
    "schedule_free": library(
        "schedule_free", lambda groups: pytorch_optimizer.ScheduleFreeAdamW(groups, lr=LR, warmup_steps=100)
    ),
    "sam": sam,
}


@pytest.mark.parametrize("option", ROWS)
def test_property(option: str) -> None:
    ROWS[option]()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    )


def closure_for(model: nn.Module, optimizer: Optimizer, batch: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(16, 1, 8, 8, generator=generator)
    y = torch.randint(3, (16,), generator=generator)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def train(model: nn.Module, optimizer: Optimizer, batches: range) -> None:
    for batch in batches:
        assert torch.is_tensor(optimizer.step(closure_for(model, optimizer, batch)))


@pytest.mark.parametrize("option", OPTIONS)
def test_state_is_plain_data_and_a_resumed_run_is_the_same(option: str) -> None:
    model = net()
    optimizer = make(option, model)
    train(model, optimizer, range(12))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    twin = copy.deepcopy(model)
    resumed = make(option, twin)
    resumed.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    for m, o in ((model, optimizer), (twin, resumed)):
        train(m, o, range(12, 15))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("option", TRAINING)
def test_a_schedule_scales_every_group_by_its_own_rate(option: str) -> None:
    model = net()
    optimizer = make(option, model, layer_decay=0.5)
    names, rates = zip(*[(group["name"], group["lr"]) for group in optimizer.param_groups], strict=True)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(3):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([r / (1 + step) for r in rates])
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    base = {name.split(".")[0]: rate for name, rate in zip(names, rates, strict=True) if ".no_decay" not in name}
    assert base["layer0"] == pytest.approx(base["layer2"] / 4)


@pytest.mark.parametrize("option", TRAINING)
def test_the_default_rate_learns(option: str) -> None:
    """On one fixed batch the loss falls by a tenth at least in 60 steps."""
    model = net()
    optimizer = make(option, model)
    first = closure_for(model, optimizer, 0)().item()
    train(model, optimizer, range(1))
    for _ in range(59):
        optimizer.step(closure_for(model, optimizer, 0))
    assert closure_for(model, optimizer, 0)().item() < 0.9 * first


@pytest.mark.parametrize("option", OPTIONS)
def test_parameters_without_gradient_stay(option: str) -> None:
    model = net()
    optimizer = make(option, model)
    unused = nn.Parameter(torch.ones(3, 2))
    optimizer.param_groups[0]["params"].append(unused)
    train(model, optimizer, range(2))
    assert torch.equal(unused, torch.ones(3, 2))


def small_vit() -> nn.Module:
    model = tv.VisionTransformer(8, 4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=3)
    return model.double()


def small_resnet() -> nn.Module:
    model = resnet(3, 3, 8, width=0.25)
    norm.batch(model)
    return model.double()


def moves(option: str, make_model: Callable[[], nn.Module], layer_decay: float) -> tuple[dict[str, Tensor], dict]:
    """How far one step moves each parameter, without weight decay, and the share of the rate that each is given."""
    torch.manual_seed(0)
    model, x, y = make_model(), torch.randn(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 0])
    for p in model.parameters():
        nn.init.normal_(p, 0.5 if p.ndim == 1 else 0.0, 0.2)  # what starts at 0, such as a head, hides what is before
    cfg = node(option, weight_decay=0.0)
    groups = param_groups(model, lr=cfg["lr"], weight_decay=0.0, layer_decay=layer_decay, sample=x)
    optimizer = instantiate(cfg, _convert_="all")(groups)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(2 if option == "soap" else 1):  # the first step of SOAP only looks
        optimizer.step(closure)
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    return moved, {name: g["lr"] / cfg["lr"] for g in groups for name in g["param_names"]}


@pytest.mark.parametrize("option", TRAINING)
@pytest.mark.parametrize("make_model", [small_vit, small_resnet])
def test_each_layer_moves_by_its_own_rate(option: str, make_model: Callable[[], nn.Module]) -> None:
    decayed, shares = moves(option, make_model, 0.8)
    level, _ = moves(option, make_model, 1.0)
    assert len(set(shares.values())) > 9
    for name, step in decayed.items():
        assert step.isfinite().all()
        assert step.norm() > 0, name
        assert (step.norm() / level[name].norm()).item() == pytest.approx(shares[name], rel=1e-2), name


def test_none_leaves_the_weights() -> None:
    model = net()
    before = copy.deepcopy(list(model.parameters()))
    train(model, make("none", model), range(2))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Types(TorchDispatchMode):
    """Notes the types of the tensors that come out of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen |= {t.dtype for t in tree_leaves(out) if isinstance(t, Tensor)}
        return out


@pytest.mark.parametrize("bf16", [True, False])
def test_muon_multiplies_in_what_the_processor_has(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knep.recipes.optimizer.cpu_bf16", lambda: bf16)
    torch.manual_seed(0)
    layer = nn.Linear(9, 4, bias=False)
    before, gradient = layer.weight.detach().clone(), torch.randn(4, 9)
    layer.weight.grad = gradient.clone()
    with Types() as types:
        make("muon", layer, lr=1.0, weight_decay=0.0).step()
    assert (torch.bfloat16 in types.seen) == bf16
    wanted = newton_schulz(gradient.double().numpy())
    np.testing.assert_allclose((before - layer.weight.detach()).numpy(), wanted, atol=0.03 if bf16 else 1e-5)


def test_muon_splits_each_group_and_keeps_names() -> None:
    groups = make("muon", net(), lr=0.02, adamw_lr=0.001, layer_decay=0.5).param_groups
    assert [(g["name"], g["lr"]) for g in groups] == [
        ("layer0.decay.muon", 0.005),
        ("layer0.no_decay.adamw", 0.00025),
        ("layer1.decay.muon", 0.01),
        ("layer1.no_decay.adamw", 0.0005),
        ("layer2.decay.muon", 0.02),
        ("layer2.no_decay.adamw", 0.001),
    ]
    assert groups[0]["param_names"] == ["0.weight"]
    with pytest.raises(ValueError, match="muon needs weights"):
        make("muon", nn.BatchNorm2d(3))


def test_schedule_free_goes_to_the_average_and_back() -> None:
    model = net()
    optimizer: Any = make("schedule_free", model)
    train(model, optimizer, range(3))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.eval()
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.train()
    torch.testing.assert_close(before, [p.detach() for p in model.parameters()])


class Lit(pl.LightningModule):
    """Counts the closures that Lightning's automatic optimization runs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = quadratic()
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        terms = [(torch.tensor(CURVATURE[n]) * p * p / 2 + p).sum() for n, p in self.model.named_parameters()]
        return torch.stack(terms).sum()

    def configure_optimizers(self) -> Optimizer:
        return make("sam", self.model, lr=LR, weight_decay=DECAY, rho=0.3)


def test_sam_takes_both_passes_inside_lightning(tmp_path: Path) -> None:
    lit = Lit()
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, enable_model_summary=False, **quiet
    )
    trainer.fit(lit, torch.utils.data.DataLoader([0, 0]))  # type: ignore[arg-type]
    assert lit.calls == 4
    _, after = two_steps("sam", lr=LR, weight_decay=DECAY, rho=0.3)
    for name, p in lit.model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), after[name], rtol=1e-12)


def test_sam_needs_a_closure() -> None:
    model = net()
    with pytest.raises(ValueError, match="closure"):
        make("sam", model).step()


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("normalized_sgd", "weight_decay", -1),
        ("muon", "adamw_lr", 0),
        ("muon", "momentum", 1.5),
        ("muon", "ns_steps", 0),
        ("sam", "rho", 0),
        ("sam", "rho", "wide"),
        ("shampoo", "beta2", 2),
        ("shampoo", "every", 0),
        ("adam", "lr", -1),
        ("adamw", "betas", [1.5, 0.9]),
        ("lion", "betas", [0.9, 2.0]),
        ("momentum", "momentum", -1),
    ],
)
def test_values_out_of_range_are_refused(option: str, key: str, value: object) -> None:
    with pytest.raises(Exception, match=r"(?i)must be|invalid"):
        make(option, net(), **{key: value})
