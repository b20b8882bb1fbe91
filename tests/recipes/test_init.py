"""Initial weights: their spread against the formula, and what a deep network makes of a signal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import knep
from knep.errors import InputError, NoEffectError
from knep.models.resnet import resnet
from knep.recipes import init
from knep.surgery.edit import Change

CONF = Path(knep.__file__).parent / "conf" / "init"
OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml"))
EDITING = sorted(set(OPTIONS) - {"none", "default", *init.BUILD})  # test_branches.py has the others
WIDTH, DEPTH, BATCH = 1024, 20, 128


def make(option: str, **hp: Any) -> Callable[..., list[Change]]:
    return instantiate(OmegaConf.load(CONF / f"{option}.yaml"), _convert_="all", **hp)


def small() -> nn.Sequential:
    """One layer of each kind that an init covers, with norms and an embedding that it must leave alone."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, groups=4),
        nn.ConvTranspose2d(16, 8, 2, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(8 * 12 * 12, 10),
    )


def sample() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def spread(option: str, std: Callable[[int, int], float], **hp: Any) -> None:
    """Sample std within 2 % of std(n_in, n_out) on a wide linear layer and on convolutions; mean 0, biases 0."""
    layers = {
        nn.Linear(WIDTH, WIDTH): (1024, 1024),
        nn.Linear(256, WIDTH): (256, 1024),
        nn.Conv2d(64, 128, 3): (64 * 9, 128 * 9),
        nn.Conv2d(64, 128, 3, groups=4): (16 * 9, 32 * 9),
        nn.ConvTranspose2d(64, 128, 3): (64 * 9, 128 * 9),
        nn.Conv1d(64, 256, 5): (64 * 5, 256 * 5),
        nn.Conv3d(16, 32, 3): (16 * 27, 32 * 27),
    }
    for layer, (n_in, n_out) in layers.items():
        make(option, **hp)(nn.Sequential(layer))
        weight = layer.weight.detach()
        assert weight.std().item() == pytest.approx(std(n_in, n_out), rel=0.02), layer
        assert abs(weight.mean().item()) < 5 * std(n_in, n_out) / weight.numel() ** 0.5
        assert layer.bias is not None
        assert not layer.bias.any()


def gains(option: str, activation: Callable[[Tensor], Tensor], **hp: Any) -> Tensor:
    """Factor on the root mean square of the signal before the activation, layer by layer, shape (DEPTH - 1,)."""
    layer, x, levels = nn.Linear(WIDTH, WIDTH, bias=False), torch.randn(BATCH, WIDTH), []
    with torch.no_grad():
        for _ in range(DEPTH):
            make(option, **hp)(nn.Sequential(layer))
            signal = layer(x)
            levels.append(signal.double().square().mean().sqrt())
            x = activation(signal / levels[-1])
    return torch.stack(levels)[1:]


def multiplies_by(option: str, factor: float, activation: Callable[[Tensor], Tensor] = lambda x: x, **hp: Any) -> None:
    """20 layers change the signal by factor ** 20, within 5 % a layer; one layer of this width strays by 3 %."""
    measured = gains(option, activation, **hp)
    assert measured.log().mean().exp().item() == pytest.approx(factor, rel=0.05)
    assert (measured / factor - 1).abs().max().item() < 0.2


def uniform() -> None:
    spread("uniform", lambda i, o: 0.05 / 3**0.5)
    layer = nn.Linear(WIDTH, WIDTH)
    make("uniform")(nn.Sequential(layer))
    assert 0.0499 < layer.weight.abs().max().item() <= 0.05
    multiplies_by("uniform", 0.05 * (WIDTH / 3) ** 0.5)


def unit_normal() -> None:
    spread("unit_normal", lambda i, o: 1.0)
    multiplies_by("unit_normal", WIDTH**0.5)


def gaussian() -> None:
    spread("gaussian", lambda i, o: 1 / i)
    multiplies_by("gaussian", WIDTH**-0.5)


def lecun_normal() -> None:
    spread("lecun_normal", lambda i, o: i**-0.5)
    multiplies_by("lecun_normal", 1.0)


def glorot_normal() -> None:
    spread("glorot_normal", lambda i, o: (2 / (i + o)) ** 0.5)
    multiplies_by("glorot_normal", 1.0)


def glorot_uniform() -> None:
    spread("glorot_uniform", lambda i, o: (2 / (i + o)) ** 0.5)
    layer = nn.Linear(WIDTH, 512)
    make("glorot_uniform")(nn.Sequential(layer))
    assert layer.weight.abs().max().item() <= (6 / 1536) ** 0.5


def he_normal() -> None:
    spread("he_normal", lambda i, o: (2 / i) ** 0.5)
    spread("he_normal", lambda i, o: (2 / 1.25 / i) ** 0.5, slope=0.5)
    multiplies_by("he_normal", 1.0, torch.relu)


def he_uniform() -> None:
    spread("he_uniform", lambda i, o: (2 / i) ** 0.5)
    multiplies_by("he_uniform", 1.0, torch.relu)


def orthogonal() -> None:
    """The smaller side of each group's matrix is orthonormal."""
    for layer in (nn.Linear(20, 30), nn.Linear(30, 20), nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3, groups=4)):
        make("orthogonal", gain=2.0)(nn.Sequential(layer))
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        for block in layer.weight.detach().double().chunk(groups):
            m = block.flatten(1) / 2
            gram = m @ m.T if len(m) <= m[0].numel() else m.T @ m
            torch.testing.assert_close(gram, torch.eye(len(gram)).double(), rtol=0, atol=1e-5)
    x = torch.randn(5, 64)
    layer = nn.Linear(64, 64)
    make("orthogonal")(nn.Sequential(layer))
    torch.testing.assert_close(layer(x).norm(dim=1), x.norm(dim=1))


def delta_orthogonal() -> None:
    """Each pixel keeps its length through a convolution; only the centre tap is not 0."""
    x = torch.randn(2, 6, 7, 7)
    for conv in (
        nn.Conv2d(6, 6, 3, padding=1),
        nn.Conv2d(6, 12, 5, padding=2),
        nn.Conv2d(6, 12, 3, padding=1, groups=3),
    ):
        make("delta_orthogonal")(nn.Sequential(conv))
        torch.testing.assert_close(conv(x).norm(dim=1), x.norm(dim=1))
        off_centre = conv.weight.detach().clone()
        off_centre[:, :, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = 0
        assert not off_centre.any()
    linear = nn.Linear(16, 16)
    make("delta_orthogonal")(nn.Sequential(linear))
    torch.testing.assert_close(linear.weight @ linear.weight.T, torch.eye(16), rtol=0, atol=1e-5)


def lsuv() -> None:
    """Every layer's output on the sample has variance 1; modes and batch statistics are as before."""
    model = small().train()
    model[1].eval()
    make("lsuv")(model, sample=sample())
    assert [m.training for m in model] == [True, False, True, True, True, True, True]
    assert not model[1].running_mean.any()
    variances: list[float] = []
    for layer in (model[0], model[3], model[4], model[6]):
        layer.register_forward_hook(lambda m, a, out: variances.append(out.var(unbiased=False).item()))
    with torch.no_grad():
        model.eval()(sample())
    assert variances == pytest.approx([1.0] * 4, rel=1e-4)
    with pytest.raises(InputError, match="batch"):
        make("lsuv")(model)


def dirac() -> None:
    """Filter i hands on channel i; what is beyond the inputs, and linear layers, have He's spread."""
    x = torch.randn(2, 6, 8, 8)
    for groups in (1, 3):
        conv = nn.Conv2d(6, 48, 3, padding=1, groups=groups)
        make("dirac")(nn.Sequential(conv))
        y = conv(x).chunk(groups, dim=1)
        assert all(torch.equal(o[:, : i.shape[1]], i) for o, i in zip(y, x.chunk(groups, dim=1), strict=True))
    conv, linear = nn.Conv2d(64, 1024, 3), nn.Linear(WIDTH, WIDTH)
    make("dirac")(nn.Sequential(conv, linear))
    assert conv.weight[64:].std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert linear.weight.std().item() == pytest.approx((2 / WIDTH) ** 0.5, rel=0.02)


def whiten_first() -> None:
    """The first convolution's outputs on the sample are uncorrelated, of variance 1; the next one hands them on."""
    smooth = nn.functional.avg_pool2d(torch.randn(64, 3, 20, 20, generator=torch.Generator().manual_seed(1)), 3, 1)
    model = nn.Sequential(nn.Conv2d(3, 60, 3), nn.Conv2d(60, 60, 3, padding=1))
    changes = make("whiten_first", eps=1e-6)(model, sample=smooth)
    assert [c.after.split(",")[0] for c in changes] == ["whiten_first", "whiten_first: dirac"]
    y = model[0](smooth).transpose(0, 1).flatten(1).double()
    assert torch.allclose(torch.cov(y[:27]), torch.eye(27, dtype=torch.double), atol=0.01)
    assert torch.allclose(y[27:54], -y[:27])
    assert torch.allclose(y[54:].var(dim=1), torch.ones(6, dtype=torch.double), atol=0.02)
    assert torch.equal(model(smooth), model[0](smooth))
    few = nn.Conv2d(3, 4, 3)
    make("whiten_first")(nn.Sequential(few), sample=smooth)
    assert torch.allclose(few.weight, model[0].weight[:4], rtol=0.3)
    for refused in (nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(3, 6, 21, padding=10)):
        with pytest.raises(InputError, match="whiten_first"):
            make("whiten_first")(nn.Sequential(refused), sample=smooth)
    with pytest.raises(InputError, match="give sample"):
        make("whiten_first")(model)
    with pytest.raises(NoEffectError, match="2-d convolution"):
        make("whiten_first")(nn.Sequential(nn.Linear(3, 2)), sample=torch.randn(4, 3))


def residual(option: str, **hp: Any) -> nn.Module:
    """A residual net without norms, edited; as many more rows are in test_branches.py."""
    torch.manual_seed(0)
    model = resnet(3, 5, 8, norm=None)
    assert make(option, **hp)(model, sample=sample())
    return model


def begins_as_its_shortcut(option: str) -> Callable[[], None]:
    """A row: a block gives relu of its input at the start, and the factor has a gradient."""

    def row() -> None:
        block: Any = residual(option).get_submodule("stages.0.1")
        x = torch.randn(2, 16, 8, 8)
        assert torch.equal(block(x), x.relu())
        block(x).sum().backward()
        (scale,) = [p for name, p in block.named_parameters() if name.endswith("scale")]
        assert scale.grad.abs().sum() > 0

    return row


def layer_scale() -> None:
    block: Any = residual("layer_scale", value=0.5).get_submodule("stages.0.1")
    plain: Any = resnet(3, 5, 8, norm=None).get_submodule("stages.0.1")
    plain.branch.conv1.load_state_dict(block.branch.conv1.state_dict())
    plain.branch.conv2.load_state_dict(block.branch.conv2.state_dict())
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(block(x), (x + 0.5 * plain.branch(x)).relu())


def fixup() -> None:
    """Nine branches of two layers: He's weights times 9^(-1/2) in the first, 0 in the second and in the classifier."""
    model: Any = residual("fixup")
    conv = model.stages[2][2].branch.conv1
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5 / 3, rel=0.02)
    assert not model.stages[2][2].branch.conv2.weight.any()
    assert not model(sample()).any()


def blocks(option: str, norm_first: bool) -> list[Any]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 2, 256, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    make(option)(model, sample=torch.randn(2, 3, 256))
    return list(model.layers)


def t_fixup() -> None:
    """Four layers: Glorot's limit sqrt(6 / 512), for values and what follows times 0.67 4^(-1/4)."""
    query, key, value = blocks("t_fixup", norm_first=True)[1].self_attn.in_proj_weight.chunk(3)
    limit, factor = (6 / 512) ** 0.5, 0.67 * 4**-0.25
    for part, wanted in ((query, limit), (key, limit), (value, factor * limit)):
        assert part.abs().max().item() == pytest.approx(wanted, rel=0.01)


def deepnorm() -> None:
    """Four layers: Glorot's std, for values and what follows times (8 * 4)^(-1/4)."""
    query, key, value = blocks("deepnorm", norm_first=False)[1].self_attn.in_proj_weight.chunk(3)
    std = (2 / 512) ** 0.5
    for part, wanted in ((query, std), (key, std), (value, 32**-0.25 * std)):
        assert part.std().item() == pytest.approx(wanted, rel=0.02)


ROWS: dict[str, Callable[[], None]] = {
    "uniform": uniform,
    "unit_normal": unit_normal,
    "gaussian": gaussian,
    "lecun_normal": lecun_normal,
    "glorot_normal": glorot_normal,
    "glorot_uniform": glorot_uniform,
    "he_normal": he_normal,
    "he_uniform": he_uniform,
    "orthogonal": orthogonal,
    "delta_orthogonal": delta_orthogonal,
    "dirac": dirac,
    "whiten_first": whiten_first,
    "lsuv": lsuv,
    "skipinit": begins_as_its_shortcut("skipinit"),
    "rezero": begins_as_its_shortcut("rezero"),
    "layer_scale": layer_scale,
    "fixup": fixup,
    "t_fixup": t_fixup,
    "deepnorm": deepnorm,
}


@pytest.mark.parametrize("option", ROWS)
def test_property(option: str) -> None:
    ROWS[option]()


@pytest.mark.parametrize("option", ["none", "default"])
def test_none_and_default_leave_the_model(option: str) -> None:
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert make(option)(model, sample=sample()) == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("option", EDITING)
def test_a_seed_gives_the_weights(option: str) -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = small()
        torch.manual_seed(seed)
        make(option)(model, sample=sample())
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("option", EDITING)
def test_changes_name_the_layers_and_norms_stay(option: str) -> None:
    model = small()
    changes = make(option)(model, sample=sample())
    assert [change.path for change in changes] == ["0.weight", "3.weight", "4.weight", "6.weight"]
    assert all(change.after.startswith(option) for change in changes)
    assert torch.equal(model[1].weight, torch.ones(8))


@pytest.mark.parametrize("option", EDITING)
def test_weight_norm_computes_with_the_drawn_weights(option: str) -> None:
    plain, normed = small(), small()
    for i in (0, 3, 4, 6):
        parametrizations.weight_norm(normed[i])
    for model in (plain, normed):
        torch.manual_seed(0)
        make(option)(model, sample=sample())
    for i in (0, 3, 4, 6):
        torch.testing.assert_close(normed[i].weight, plain[i].weight)


@pytest.mark.parametrize("option", EDITING)
def test_spectral_norm_keeps_its_scale(option: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), parametrizations.spectral_norm(nn.Linear(144, 10)))
    make(option)(model, sample=sample())
    model(sample())
    assert torch.linalg.matrix_norm(model.eval()[2].weight, 2).item() == pytest.approx(1.0, rel=0.2)


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square()


def test_a_parametrization_without_inverse_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    parametrize.register_parametrization(model[0], "weight", Square())
    with pytest.raises(InputError, match=r"init cannot set 0\.weight through its parametrization Square"):
        make("he_normal")(model)


def test_frozen_layers_stay_and_a_model_without_layers_is_refused() -> None:
    model = small()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    *changes, frozen = make("he_normal")(model)
    assert len(changes) == 3
    assert (frozen.path, frozen.after) == ("0.weight", "left as it is: frozen")
    assert torch.equal(model[0].weight, before)
    with pytest.raises(NoEffectError, match="no trained weights"):
        make("he_normal")(nn.Sequential(nn.BatchNorm2d(3)))


def test_a_bare_layer_and_tied_layers() -> None:
    layer = nn.Linear(4, 4)
    (change,) = make("he_normal")(layer)
    assert change.path == "weight"
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert [change.path for change in make("he_normal")(tied)] == ["0.weight"]


def test_attention_is_three_matrices_and_an_output() -> None:
    for attention in (nn.MultiheadAttention(256, 4), nn.MultiheadAttention(256, 4, kdim=64, vdim=128)):
        changes = make("lecun_normal")(attention)
        names = ["in_proj_weight"] if attention.kdim == 256 else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        assert sorted(change.path for change in changes) == sorted([*names, "out_proj.weight"])
        for name in names:
            weight = getattr(attention, name).detach()
            for matrix in weight.chunk(3 if name == "in_proj_weight" else 1):
                assert matrix.std().item() == pytest.approx(matrix.shape[1] ** -0.5, rel=0.02)
        assert not attention.in_proj_bias.any()
    make("orthogonal")(attention := nn.MultiheadAttention(16, 2))
    for matrix in attention.in_proj_weight.detach().chunk(3):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(16), rtol=0, atol=1e-5)


def test_embeddings_begin_as_in_gpt_2_and_bilinear_layers_read_all_pairs() -> None:
    words, pairs = nn.Embedding(500, 200, padding_idx=3), nn.Bilinear(30, 40, 50)
    change = make("lecun_normal")(nn.ModuleList([words, pairs]))[0]
    assert words.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not words.weight[3].any()
    assert change.after.startswith("N(0, 0.02), as embeddings begin")
    drawn = nn.Embedding(500, 200, _weight=torch.randn(500, 200) * 0.05)
    before = drawn.weight.detach().clone()
    *_, left = make("lecun_normal")(nn.ModuleList([nn.Linear(3, 3), drawn]))
    assert left.after == "left as it is: an embedding that its author drew"
    assert torch.equal(drawn.weight, before)
    assert pairs.weight.std().item() == pytest.approx((30 * 40) ** -0.5, rel=0.02)
    assert not pairs.bias.any()


def test_a_weight_shared_by_an_embedding_and_a_classifier_is_drawn_once_as_an_embedding() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(400, 256, padding_idx=0), "out": nn.Linear(256, 400)})
    model["out"].weight = model["words"].weight
    (change,) = make("lecun_normal")(model)
    assert change.path == "out.weight"
    assert model["words"].weight[1:].std().item() == pytest.approx(0.02, rel=0.02)
    assert not model["words"].weight[0].any()


class Conv1D(nn.Module):
    """Hugging Face's linear layer: its weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.02), nn.Parameter(torch.ones(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_hugging_faces_linear_layer_has_its_inputs_first() -> None:
    layer = Conv1D(768, 256)
    (change,) = make("lecun_normal")(nn.Sequential(layer))
    assert change.path == "0.weight"
    assert layer.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert not layer.bias.any()


class LowRank(nn.Module):
    """A frozen layer with two trained factors, the second zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(32, 16), nn.Linear(32, 4, bias=False), nn.Linear(4, 16, bias=False)
        self.base.requires_grad_(False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("option", EDITING)
def test_what_begins_at_zero_stays_so_and_is_listed(option: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 32), LowRank(), nn.Linear(16, 5))
    nn.init.zeros_(model[4].weight)
    nn.init.zeros_(model[4].bias)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    left = {c.path: c.after for c in make(option)(model, sample=sample()) if c.after.startswith("left as it is")}
    assert sorted(left) == ["3.base.weight", "3.down.weight", "3.up.weight", "4.weight"]
    assert "adapter" in left["3.down.weight"]
    assert "begins at zero" in left["4.weight"]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name[0] in "34")
    assert not torch.equal(model[2].weight, before["2.weight"])


def test_a_net_of_zeros_is_drawn() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for p in model.parameters():
        nn.init.zeros_(p)
    assert len(make("he_normal")(model)) == 2
    assert model[0].weight.any()
    assert model[1].weight.any()


class Tokens(nn.Module):
    """Parameters that no init knows beside a layer that each does."""

    def __init__(self) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(torch.ones(1, 4, 8))
        self.scale = nn.Parameter(torch.ones(8))
        self.norm = nn.LayerNorm((4, 8))
        self.memory = nn.LSTM(8, 8)
        self.out = nn.Linear(8, 3)


@pytest.mark.parametrize("option", ["he_normal", "orthogonal", "uniform"])
def test_what_no_init_knows_stays_and_is_listed(option: str) -> None:
    model = Tokens()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    drawn, *left = make(option)(model)
    assert drawn.path == "out.weight"
    assert {change.path: change.after for change in left} == {
        "class_token": "left as it is: Tokens is no layer that init knows",
        "position": "left as it is: Tokens is no layer that init knows",
        "memory.weight_ih_l0": "left as it is: LSTM is no layer that init knows",
        "memory.weight_hh_l0": "left as it is: LSTM is no layer that init knows",
    }
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if not name.startswith("out"))


@pytest.mark.parametrize("option", sorted(set(EDITING) - {"lsuv", "whiten_first"}))
def test_meta_and_other_precisions(option: str) -> None:
    with torch.device("meta"):
        model = small()
    assert make(option)(model)[0].before == "rms unknown"
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model = small().to(dtype, memory_format=torch.channels_last)
        make(option)(model)
        assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    make("orthogonal")(linear := nn.Linear(8, 8).double())
    torch.testing.assert_close(linear.weight @ linear.weight.T, torch.eye(8).double(), rtol=0, atol=1e-14)


def test_lsuv_says_that_meta_has_no_signals_and_measures_other_precisions() -> None:
    with torch.device("meta"):
        model = small()
    with pytest.raises(InputError, match="meta device"):
        make("lsuv")(model, sample=sample())
    model = small().double()
    make("lsuv")(model, sample=sample())
    assert model.eval()(sample().double()).var(unbiased=False).item() == pytest.approx(1.0, rel=1e-6)


def test_complex_quantised_and_hooked_weights_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"1\.weight of torch\.complex64"):
        make("he_normal")(nn.Sequential(nn.ReLU(), nn.Linear(2, 2, dtype=torch.complex64)))
    with pytest.raises(InputError, match=r"0\.weight, a hook computes it"):
        make("he_normal")(nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(3, 3))))


def test_compiled_models_are_unwrapped() -> None:
    class Compiled(nn.Module):
        """What torch.compile returns looks like this."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

    assert make("he_normal")(Compiled(small()))[0].path == "0.weight"


@pytest.mark.parametrize("option", ["he_normal", "he_uniform"])
def test_auto_draws_for_what_follows(option: str) -> None:
    model = nn.Sequential(
        nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256)
    )
    make(option, slope="auto")(model, sample=torch.randn(4, 256))
    stds = [model[i].weight.std().item() * 16 for i in (0, 3, 5)]
    assert stds == pytest.approx([2**0.5, 1.5925, 1.0], rel=0.02)
    with pytest.raises(InputError, match="sample"):
        make(option, slope="auto")(model)


def test_lsuv_tolerates_dead_and_unreached_layers() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.unused, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) * 0)

    model = Odd()
    changes = make("lsuv")(model, sample=torch.randn(32, 6))
    assert [change.after.split(",")[0] for change in changes] == ["lsuv", "orthogonal", "orthogonal"]
    assert all(p.isfinite().all() for p in model.parameters())


def test_lsuv_divides_a_shared_layer_once() -> None:
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = torch.randn(64, 8)
    make("lsuv")(model, sample=x)
    assert layer(x).var(unbiased=False).item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [("uniform", "limit", 0), ("he_normal", "slope", 2), ("he_uniform", "slope", -1), ("orthogonal", "gain", 0),
     ("delta_orthogonal", "gain", "big")],
)  # fmt: skip
def test_values_out_of_range_are_named(option: str, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{key} must be a number in .*, got {value}$"):
        make(option, **{key: value})(small())
