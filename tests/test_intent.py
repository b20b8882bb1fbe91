"""What authors of foreign nets meant, a recipe keeps, refuses to break, or says that it changed; for kinds of nets."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import knep
from knep.errors import InputError, NoEffectError
from knep.recipes import activation, dropout, init, norm
from tests.nets import GPT, CausalConv, Detector, Encoder, Graph, LoRALinear, Recurrent, UNet

TOKENS = torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(0))
SIGNALS = torch.randn(4, 2, 12, generator=torch.Generator().manual_seed(0))
NOISY = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 4)
NODES = torch.randn(10, 6, generator=torch.Generator().manual_seed(0)), torch.arange(20).reshape(2, 10) % 10
PLAIN = ["scaling=none", "augment=none"]

# kind -> the net, and a batch as it takes one
KINDS = {
    "gpt": (GPT, TOKENS),
    "gpt of the last score": (lambda: GPT(zero=True, last=True), TOKENS),
    "gpt with targets": (GPT, (TOKENS, TOKENS)),
    "gpt of keywords": (GPT, {"idx": TOKENS, "targets": TOKENS}),
    "encoder": (Encoder, TOKENS.T.contiguous()),
    "causal convolutions": (CausalConv, SIGNALS),
    "u-net": (UNet, NOISY),
    "u-net of a list": (UNet, list(NOISY)),
    "u-net in float64": (lambda: UNet().double(), NOISY),
    "gpt in bfloat16": (lambda: GPT().bfloat16(), TOKENS),
    "recurrent": (Recurrent, TOKENS),
    "graph": (Graph, NODES),
    "graph of keywords": (Graph, {"x": NODES[0], "edge_index": NODES[1]}),
    "detection": (Detector, [torch.rand(3, 8, 8), torch.rand(3, 9, 7)]),
    "fully connected": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(4, 8)),
}


def made(name):
    make, sample = KINDS[name]
    torch.manual_seed(0)
    return make(), sample


def modern(*lines):
    return knep.load("modern", [*PLAIN, *lines])


@pytest.mark.parametrize("name", KINDS)
def test_modern_takes_every_kind_and_keeps_its_norms(name):
    net, sample = made(name)
    before = [type(m) for m in net.modules()]
    report = modern().apply(net, sample=sample)
    assert [type(m) for m in net.modules()] == before
    assert {change.after.split(":")[0] for change in report.changes["norm"]} == {"kept"}
    modern("layer_decay=0.9").optimizer(net, sample=sample)
    plan = modern().dry_run(net, sample=sample)
    assert not plan.refused


CAUSAL = [name for name in KINDS if name.startswith("gpt")]


@pytest.mark.parametrize("option", ["batch", "ghost_batch", "instance"])
@pytest.mark.parametrize("name", [*CAUSAL, "recurrent"])
def test_norms_over_tokens_are_refused_in_causal_nets(name, option):
    net, sample = made(name)
    before = copy.deepcopy(net)
    with pytest.raises(InputError, match=r"later positions change earlier ones.*norm=layer or norm=rms") as refused:
        getattr(norm, option)(net, sample=sample)
    assert "\n" not in str(refused.value)
    assert str(net) == str(before)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.state_dict().items())


@pytest.mark.parametrize("option", ["auto", "layer", "rms", "group"])
@pytest.mark.parametrize("training", [True, False])
def test_norms_of_each_token_let_nothing_through(option, training):
    net = GPT()
    modern(f"norm={option}").apply(net, sample=TOKENS)
    later = TOKENS.clone()
    later[:, 7:] = (later[:, 7:] + 5) % 40
    scores = []
    for tokens in (TOKENS, later):
        torch.manual_seed(0)
        scores.append(net.train(training)(tokens, tokens)[0][:, :7])
    assert torch.equal(*scores)


@pytest.mark.parametrize("option", ["layer", "group", "instance", "rms"])
def test_norms_over_positions_are_refused_in_causal_convolutions(option):
    with pytest.raises(InputError, match=r"first at n .*norm=auto"):
        getattr(norm, option)(CausalConv(), sample=SIGNALS)
    norm.batch(CausalConv(), sample=SIGNALS)
    group = CausalConv(lambda channels: nn.GroupNorm(2, channels))  # which sees all positions already
    assert getattr(norm, option)(group, sample=SIGNALS)


def test_rows_of_a_batch_on_the_second_axis_stay_apart():
    sample = TOKENS.T.contiguous()
    with pytest.raises(InputError, match="rows of a batch change one another"):
        norm.instance(Encoder(), sample=sample)
    assert norm.batch(Encoder(), sample=sample)  # in training alone, as batch norm is meant


def test_a_net_that_cannot_be_copied_is_changed_unchecked_and_the_report_says_so():
    net = GPT()
    net.handle = (i for i in range(3))  # no deepcopy takes a generator
    assert "not checked" in norm.batch(net, sample=TOKENS)[-1].after


def test_inserted_norms_of_tokens_are_checked_too():
    net = GPT()
    for name in ("ln_1", "ln_2"):
        for block in net.h:
            setattr(block, name, nn.Identity())
    net.ln_f = nn.Identity()
    with pytest.raises(InputError, match=r"first at h\.0\.mlp\.0 \(Linear\): use norm=layer"):
        norm.batch(net, sample=TOKENS, insert=True)
    names = list(net.state_dict())
    assert [c.path for c in norm.auto(net, sample=TOKENS, insert=True)] == ["h.0.mlp.0", "h.1.mlp.0"]
    assert type(net.h[0].mlp[0].norm) is nn.LayerNorm
    assert [name for name in net.state_dict() if ".norm." not in name] == names
    said = modern("norm.insert=true").apply(KINDS["fully connected"][0](), sample=torch.randn(4, 8))
    assert str(said).splitlines()[-1] == "not for torch.jit.script, which does not read what was put into: 0"


def test_a_norm_that_breaks_the_forward_is_refused_and_those_of_tokens_are_contiguous():
    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.norm, self.head = nn.Embedding(40, 16), nn.LayerNorm(16), nn.Linear(16, 3)

        def forward(self, tokens):
            return self.head(self.norm(self.words(tokens)).view(-1, 16)).view(*tokens.shape, 3).mean(1)

    for option in ("batch", "ghost_batch", "instance", "group"):
        getattr(norm, option)(net := Viewed(), sample=TOKENS)
        assert net(TOKENS).shape == (4, 3)


def test_a_frozen_backbone_keeps_its_norms_and_weights():
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).requires_grad_(False)
    net = nn.Sequential(backbone, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    before = copy.deepcopy(backbone)
    report = modern("norm=group", "activation=gelu").apply(net, sample=NOISY[0])
    assert str(net[0]) == str(before)
    assert all(torch.equal(v, backbone.state_dict()[k]) for k, v in before.state_dict().items())
    assert [(c.path, c.after) for c in report.changes["norm"]][1:] == [("0.1", "kept: frozen")]
    assert [(c.path, c.after) for c in report.changes["activation"]][1:] == [("0.2", "kept: frozen")]
    assert [c.path for c in report.changes["init"] if c.after == "left as it is: frozen"] == ["0.0.weight"]
    with pytest.raises(InputError, match=r"0\.1.*kept: frozen"):
        norm.group(nn.Sequential(backbone, nn.Flatten(), nn.Linear(288, 2)))


def test_adapters_and_outputs_of_zero_stay():
    net = nn.Sequential(LoRALinear(nn.Linear(8, 8)), nn.ReLU(), LoRALinear(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 2))
    before = copy.deepcopy(net.state_dict())
    modern().apply(net, sample=torch.randn(4, 8))
    assert [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])] == ["4.weight", "4.bias"]
    net, _ = made("u-net")
    modern().apply(net, sample=NOISY)
    assert not net(*NOISY).any()


class Adapted(nn.Module):
    """A low-rank adapter as peft writes it: parameters by name, and a dropout of its own."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_dropout = nn.Dropout(0.05)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base_layer(x) + self.lora_dropout(x) @ self.lora_A.T @ self.lora_B.T


@pytest.mark.parametrize("kind", [LoRALinear, Adapted])
def test_nothing_is_put_into_adapters(kind):
    def net():
        return nn.Sequential(kind(nn.Linear(8, 8)), nn.ReLU(), kind(nn.Linear(8, 8)))

    x, model = torch.randn(4, 8), net()
    inside = [m for one in (model[0], model[2]) for m in one.modules() if m is not one]
    kinds = [(type(m), m.extra_repr()) for m in inside]
    (change,) = dropout.standard(model, sample=x, p=0.5)
    assert change.path == "2"  # before the adapter, so that its base and its correction read the same
    model.eval()
    plain = model(x)
    assert [(type(m), m.extra_repr()) for m in inside] == kinds
    model.train()[2].dropout.p = 1.0 - 1e-9
    assert torch.allclose(model(x), model[2].base_layer.bias if kind is Adapted else model[2].base.bias)
    assert not torch.allclose(model(x), plain)
    with pytest.raises(NoEffectError, match=r"are low-rank adapters \(0\..*write init=none"):
        init.he_normal(net())
    with pytest.raises(NoEffectError, match="no residual branch"):
        dropout.stochastic_depth(net(), sample=x)


def test_forward_says_how_a_net_runs_and_samples_follow_it():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = UNet()

        def loss(self, x, t, weight):
            return weight * F.mse_loss(self.net(x, t), x)

    def forward(net, batch):
        return net.loss(batch["x"], batch["t"], weight=2.0)

    net, batch = Loss().double(), {"x": NOISY[0], "t": NOISY[1]}
    recipe = modern("norm=layer", "layer_decay=0.9")
    with pytest.raises(InputError, match="forward"):
        recipe.apply(net, sample=batch)
    with pytest.raises(InputError, match="give sample="):
        recipe.apply(net, forward=forward)
    assert recipe.apply(net, sample=batch, forward=forward).changes["norm"]
    assert not recipe.dry_run(net, sample=batch, forward=forward).refused
    groups = recipe.optimizer(net, sample=batch, forward=forward).param_groups
    assert len({group["lr"] for group in groups}) > 2


def test_a_graph_is_never_cut_to_two_nodes():
    class Stored(nn.Module):
        """The neighbours are the model's own: it runs on all nodes alone."""

        def __init__(self):
            super().__init__()
            self.register_buffer("near", torch.eye(10).roll(1, 0))
            self.a, self.n, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.near @ self.n(self.a(x)).relu())

    assert modern("norm=layer", "activation=gelu").apply(Stored(), sample=NODES[0]).changes["activation"]


def test_a_sample_that_fails_is_told_by_its_parts():
    text = r"a sample \(float32 \(4, 3, 8, 8\), float32 \(4, 2\)\): .*time\.0 \(Linear\) got"
    with pytest.raises(InputError, match=text):
        modern().apply(UNet(), sample=(NOISY[0], torch.rand(4, 2)))


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("name", ["DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"])
def test_an_optimizer_looks_inside_wrappers(name):
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    wrapped = type(name, (Wrapper,), {})(torch.compile(net, backend="eager"))
    found = [n for group in modern().optimizer(wrapped).param_groups for n in group["param_names"]]
    assert sorted(found) == sorted(dict(net.named_parameters()))


@pytest.mark.parametrize("option", ["batch", "ghost_batch", "group", "instance", "layer", "rms"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_every_norm_can_be_scripted(option):
    images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    tokens = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8) if option != "layer" else nn.RMSNorm(8), nn.Linear(8, 8))
    for net, x in ((images, NOISY[0]), (tokens, torch.randn(4, 5, 8))):
        getattr(norm, option)(net)
        scripted = torch.jit.script(copy.deepcopy(net))
        for training in (True, False):
            torch.testing.assert_close(scripted.train(training)(x), net.train(training)(x))
        assert scripted.state_dict().keys() == net.state_dict().keys()


def test_noise_of_a_shape_is_no_residual_signal():
    class Sampled(nn.Module):
        """The latent of a variational autoencoder: the sum of a mean and of noise of its shape."""

        def __init__(self):
            super().__init__()
            self.mean, self.log_std = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            mean = self.mean(x)
            return mean + torch.randn_like(mean) * self.log_std(x).exp()

    with pytest.raises(InputError, match="which side of the sum add is the shortcut cannot be told"):
        dropout.stochastic_depth(Sampled(), sample=torch.randn(4, 6))


def test_dropout_goes_before_all_heads_that_read_one_signal():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.classes, self.boxes = nn.Linear(8, 3), nn.Linear(8, 12)

        def forward(self, x):
            return self.classes(x), self.boxes(x)

    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Heads())
    (change,) = dropout.standard(net, p=1 - 1e-9)
    assert change.path == "2"
    classes, boxes = net.train()(torch.randn(5, 4))
    assert torch.allclose(classes, net[2].classes.bias.expand(5, 3))
    assert torch.allclose(boxes, net[2].boxes.bias.expand(5, 12))


def test_a_gate_that_stays_for_want_of_a_sample_is_named():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    with pytest.raises(NoEffectError, match=r"1 \(Tanh\) may be a gate, as far as can be told without a sample"):
        activation.relu(net)
    assert activation.relu(net, sample=torch.randn(3, 4))[0].path == "1"


def test_parameters_that_no_layer_holds_are_all_named():
    class Passing(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(8, 2))

        def forward(self, x):
            return (x @ self.w1).relu() @ self.w2

    with pytest.raises(NoEffectError, match=r"each of w1, w2 is left as it is: Passing is no layer .* write init=none"):
        init.he_normal(Passing())
    changes = init.he_normal(nn.Sequential(Passing(), nn.Linear(2, 2)))
    assert [c.path for c in changes if c.after.startswith("left")] == ["0.w1", "0.w2"]
