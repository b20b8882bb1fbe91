"""Inits of residual branches on anybody's module: the identity at the start, and the papers' formulas."""

import copy
import math

import pytest
import timm
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from knep.errors import InputError, NoEffectError
from knep.models.resnet import resnet
from knep.models.transformer import transformer
from knep.nn.branch import BranchScale
from knep.optim.param_groups import param_groups
from knep.recipes import dropout, init

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))
STATES = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def encoder(layers=3, norm_first=True, **more):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first, **more)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class Functional(nn.Module):
    """A branch that no module ends, and one that a child with children of its own ends."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x):
        x = x + F.dropout(self.b(self.a(self.norm(x)).relu()), 0.1, self.training).tanh()
        return x + self.mlp(x)


NETS = {
    "knep resnet": (lambda: resnet(3, 5, 32, norm=None, width=0.25), IMAGES, 9),
    "knep preact resnet": (lambda: resnet(3, 5, 32, norm=nn.BatchNorm2d, width=0.25, preact=True), IMAGES, 9),
    "knep transformer": (lambda: transformer(50, 50, 8, width=16, depth=2, heads=2), TOKENS, 4),
    "torch encoder": (encoder, STATES, 6),
    "torchvision resnet": (tv.resnet18, IMAGES, 8),
    "torchvision vit": (lambda: tv.VisionTransformer(32, 8, 2, 2, 16, 32), IMAGES, 4),
    "torchvision convnext": (lambda: tv.ConvNeXt([tv.convnext.CNBlockConfig(16, None, 2)]), IMAGES, 2),
    "timm vit": (lambda: timm.create_model("test_vit", img_size=32), IMAGES, None),
    "timm resnet": (lambda: timm.create_model("test_resnet", zero_init_last=False), IMAGES, None),
    "functional": (Functional, STATES, 2),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_factor_of_zero_leaves_each_blocks_shortcut_in_both_modes(net, mode):
    make, x, count = NETS[net]
    torch.manual_seed(0)
    model = make()
    changes = init.skipinit(model, sample=x)
    scales = [m for m in model.modules() if isinstance(m, BranchScale)]
    assert count in (None, len(scales))
    assert [c.path for c in changes] == [n for n, _ in sorted(names_of(model), key=lambda p: order(changes, p[0]))]
    getattr(model, mode)()
    reached: list[bool] = []
    for m in scales:
        m.register_forward_hook(lambda m, a, out: reached.append(not out.any() and bool(a[0].any())))
    model(x)
    assert len(reached) == len(scales)
    assert all(reached)


def names_of(model):
    return [(n, p) for n, p in model.named_parameters() if n.endswith(".scale")]


def order(changes, path):
    return [c.path for c in changes].index(path)


@pytest.mark.parametrize("net", NETS)
def test_the_model_is_the_same_at_a_factor_of_one_and_the_factor_is_trained_without_decay(net):
    make, x, _ = NETS[net]
    torch.manual_seed(0)
    model = make().eval()
    twin = copy.deepcopy(model)
    init.skipinit(model, sample=x, value=1.0)
    with torch.no_grad():
        a, b = model(x), twin(x)
    torch.testing.assert_close(a, b)
    model.train()(x).sum().backward()
    scales = dict(names_of(model))
    assert all(p.grad is not None for p in scales.values())
    groups = {name: g for g in param_groups(model, lr=0.1, weight_decay=0.5) for name in g["param_names"]}
    assert {groups[name]["weight_decay"] for name in scales} == {0.0}
    again = copy.deepcopy(model).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x), model.eval()(x))


def test_the_identity_of_a_stack_of_blocks():
    for model, x in ((encoder(4), STATES), (nn.Sequential(Functional(), Functional()), STATES)):
        for make in (init.skipinit, init.rezero):
            net = copy.deepcopy(model)
            make(net, sample=x)
            for _ in (net.train(), net.eval()):
                assert torch.equal(net(x), x)


def test_rezero_shares_a_factor_within_a_layer():
    model = encoder(3)
    init.rezero(model, sample=STATES)
    scales = [m.scale for m in model.modules() if isinstance(m, BranchScale)]
    assert len(scales) == 6
    assert len({id(p) for p in scales}) == 3
    assert sum(n.endswith(".scale") for n, _ in model.named_parameters()) == 3
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    plain = resnet(3, 5, 32, norm=None, width=0.25)
    init.rezero(plain, sample=IMAGES)
    assert len(names_of(plain)) == 9


def test_layer_scale_has_a_factor_for_each_channel_of_maps_and_tokens():
    maps, tokens = resnet(3, 5, 32, norm=None, width=0.5), encoder(2)
    init.layer_scale(maps, sample=IMAGES, value=0.5)
    assert [len(p) for _, p in names_of(maps)] == [8] * 3 + [16] * 3 + [32] * 3
    scale = BranchScale(0.5, 8, axis=1)
    with torch.no_grad():
        scale.scale.copy_(torch.arange(8.0))
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(scale(x), torch.einsum("nchw,c->nchw", x, torch.arange(8.0)))
    before = copy.deepcopy(tokens).eval()
    init.layer_scale(tokens, sample=STATES, value=0.25)
    layer, own = before.layers[0], STATES
    y = own + 0.25 * layer.self_attn(*[layer.norm1(own)] * 3, need_weights=False)[0]
    y = y + 0.25 * layer.linear2(layer.linear1(layer.norm2(y)).relu())
    torch.testing.assert_close(tokens.eval().layers[0](own), y)
    groups = param_groups(tokens, lr=0.1, weight_decay=0.5)
    assert all(g["weight_decay"] == 0 for g in groups for n in g["param_names"] if n.endswith(".scale"))


def test_layer_scales_of_the_models_own_get_the_value():
    ours = tv.ConvNeXt([tv.convnext.CNBlockConfig(16, None, 2)])
    changes = init.layer_scale(ours, sample=IMAGES, value=1e-3)
    assert [c.path for c in changes] == ["features.1.0.layer_scale", "features.1.1.layer_scale"]
    assert (ours.features[1][0].layer_scale == 1e-3).all()
    assert not names_of(ours)
    theirs = timm.create_model("test_vit", img_size=32, init_values=1e-5)
    assert len(init.layer_scale(theirs, sample=IMAGES)) == 2 * len(theirs.blocks)
    assert not names_of(theirs)


def test_a_stochastic_depth_and_a_factor_end_the_same_branch():
    for model, x in ((resnet(3, 5, 32, norm=None, width=0.25), IMAGES), (encoder(2), STATES), (Functional(), STATES)):
        dropout.stochastic_depth(model, sample=x, p=0.5)
        changes = init.skipinit(model, sample=x)
        assert len(changes) == len(dropped(model))


def dropped(model):
    return [m for m in model.modules() if dropout.drops_branches(m)]


def test_fixup_draws_branches_by_their_number_and_depth():
    torch.manual_seed(0)
    model = resnet(3, 5, 32, norm=None)
    init.fixup(model, sample=IMAGES)
    blocks = [b for stage in model.stages for b in stage if hasattr(b, "branch")]
    for block in blocks:
        first, last = block.branch.conv1, block.branch.conv2
        wanted = math.sqrt(2 / (first.in_channels * 9)) * len(blocks) ** -0.5
        assert first.weight.std().item() == pytest.approx(wanted, rel=0.1)
        assert not last.weight.any()
    assert not model.classifier.weight.any()
    assert model.stem.conv.weight.std().item() == pytest.approx(math.sqrt(2 / 27), rel=0.15)
    shifts = [n for n, _ in model.named_parameters() if n.endswith("shift.bias")]
    # The stem's convolution and activation, of each block two of both, and the classifier.
    assert len(shifts) == 2 + 4 * 9 + 1
    assert len(names_of(model)) == 9
    assert not model(IMAGES).any()


def test_a_step_of_fixup_moves_the_output_alike_at_any_depth():
    """Zhang et al. 2019: by Theta(rate), whatever the number of branches; He's weights alone overflow with depth."""

    def moved(depth: int, make) -> float:
        torch.manual_seed(0)
        model = resnet(3, 5, 16, norm=None, depth=depth)
        x, y = IMAGES[:, :, :16, :16], torch.tensor([1, 3])
        make(model, sample=x)
        before = model(x)
        for _ in range(2):
            loss = F.cross_entropy(model(x), y)
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.01 * p.grad)
        return (model(x) - before).abs().mean().item()

    assert 0.5 < moved(56, init.fixup) / moved(20, init.fixup) < 2
    assert not moved(56, init.he_normal) / moved(20, init.he_normal) < 100


def roles(weight: Tensor):
    return dict(zip(("query", "key", "value"), weight.chunk(3), strict=True))


def has_limit(weight: Tensor, limit: float):
    assert weight.abs().max().item() == pytest.approx(limit, rel=0.05)
    assert weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.1)


def test_t_fixup_on_a_torch_encoder_and_decoder():
    torch.manual_seed(0)
    model = nn.Transformer(32, 2, 3, 4, 64, batch_first=True)
    init.t_fixup(model)
    glorot = lambda i, o: math.sqrt(6 / (i + o))  # noqa: E731
    for layers, factor in ((model.encoder.layers, 0.67 * 3**-0.25), (model.decoder.layers, (9 * 4) ** -0.25)):
        for layer in layers:
            packed = roles(layer.self_attn.in_proj_weight)
            for role in ("query", "key"):
                has_limit(packed[role], glorot(32, 32))
            has_limit(packed["value"], factor * glorot(32, 32))
            has_limit(layer.self_attn.out_proj.weight, factor * glorot(32, 32))
            has_limit(layer.linear1.weight, factor * glorot(32, 64))
            has_limit(layer.linear2.weight, factor * glorot(64, 32))
            assert not any(isinstance(m, nn.LayerNorm) for m in layer.modules())
    x = torch.randn(2, 5, 32)
    for _ in (model.train(), model.eval()):
        assert model(x, x).isfinite().all()


@pytest.mark.parametrize("kind", ["knep", "gpt2", "bert"])
def test_t_fixup_on_models_of_tokens(kind):
    torch.manual_seed(0)
    n, d = 3, 32
    small = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    model, values, table = {
        "knep": lambda m: (m, [b.attention.qkv.weight[2 * d :] for b in m.blocks], m.tokens.weight),
        "gpt2": lambda m: (m, [b.attn.c_attn.weight[:, 2 * d :] for b in m.transformer.h], m.transformer.wte.weight),
        "bert": lambda m: (
            m, [b.attention.self.value.weight for b in m.encoder.layer], m.embeddings.word_embeddings.weight
        ),
    }[kind]({
        "knep": lambda: transformer(50, 50, 8, width=d, depth=n, heads=2),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=d, n_layer=n, n_head=2, **small)),
        "bert": lambda: BertModel(
            BertConfig(hidden_size=d, num_hidden_layers=n, num_attention_heads=2, intermediate_size=64,
                       max_position_embeddings=16, **small)
        ),
    }[kind]())  # fmt: skip
    norms = sum(isinstance(m, nn.LayerNorm) for m in model.modules())
    init.t_fixup(model, sample=TOKENS)
    for value in values:
        has_limit(value, 0.67 * n**-0.25 * math.sqrt(6 / (2 * d)))
    assert table[1:].std().item() == pytest.approx((9 * n) ** -0.25 * d**-0.5, rel=0.1)
    assert sum(isinstance(m, nn.LayerNorm) for m in model.modules()) == norms - 2 * n
    model(TOKENS)


def test_deepnorm_is_its_formula_on_a_torch_encoder_and_on_bert():
    torch.manual_seed(0)
    n = 6
    alpha, beta = (2 * n) ** 0.25, (8 * n) ** -0.25
    model = encoder(n, norm_first=False).double().eval()
    init.deepnorm(model, sample=STATES)
    for layer in model.layers:
        packed = roles(layer.self_attn.in_proj_weight)
        spread = {role: part.std().item() for role, part in packed.items()}
        wanted = math.sqrt(2 / 32)
        assert spread["query"] == pytest.approx(wanted, rel=0.15)
        assert spread["value"] == pytest.approx(beta * wanted, rel=0.15)
        assert layer.linear1.weight.std().item() == pytest.approx(beta * math.sqrt(2 / 48), rel=0.15)
    x = STATES.double()
    layer = model.layers[0]
    norm = lambda v: F.layer_norm(v, (16,), layer.norm1.weight, layer.norm1.bias, 1e-5)  # noqa: E731
    y = norm(alpha * x + layer.self_attn(x, x, x, need_weights=False)[0])
    y = norm(alpha * y + layer.linear2(layer.linear1(y).relu()))
    torch.testing.assert_close(model.layers[0](x), y)
    assert not names_of(model)  # alpha is no weight
    bert = BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=n, num_attention_heads=2,
                                intermediate_size=32, max_position_embeddings=16)).double().eval()  # fmt: skip
    init.deepnorm(bert, sample=TOKENS)
    block = bert.encoder.layer[0]
    h = torch.randn(2, 5, 16, dtype=torch.double)
    dense = block.output.dense(block.intermediate(h))
    torch.testing.assert_close(
        block.output(block.intermediate(h), h), F.layer_norm(alpha * h + dense, (16,), eps=1e-12)
    )


def test_deepnorm_of_an_encoder_and_a_decoder():
    model = nn.Transformer(16, 2, 2, 3, 32, batch_first=True)
    init.deepnorm(model)
    scales = [1 / m.scale.item() for m in model.modules() if isinstance(m, BranchScale)]
    assert scales == pytest.approx([0.81 * (2**4 * 3) ** (1 / 16)] * 4 + [(3 * 3) ** 0.25] * 9)


@pytest.mark.parametrize(
    ("make", "model", "x", "error", "said"),
    [
        (init.skipinit, lambda: tv.squeezenet1_1(), IMAGES, NoEffectError, "the model has no residual branch"),
        (init.rezero, lambda: nn.Sequential(nn.Linear(16, 4)), STATES, NoEffectError, "no residual branch"),
        (init.layer_scale, lambda: resnet(3, 5, 32), None, InputError, "give sample"),
        (init.fixup, tv.resnet18, IMAGES, InputError, "bn1 is BatchNorm2d: write init=skipinit"),
        (init.t_fixup, tv.resnet18, IMAGES, NoEffectError, "no transformer block"),
        (init.deepnorm, encoder, STATES, InputError, "write init=t_fixup"),
        (
            init.deepnorm,
            lambda: timm.create_model("test_vit", img_size=32),
            IMAGES,
            InputError,
            "norms behind the sums",
        ),
    ],
)
def test_what_cannot_act_is_refused_in_one_line(make, model, x, error, said):
    with pytest.raises(error, match=said) as found:
        make(model(), sample=x)
    assert "\n" not in str(found.value)


def test_gpt2s_branches_are_refused_by_name():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(InputError, match=r"init\.skipinit: transformer\.h\.0: torch\.fx cannot read"):
        init.skipinit(model, sample=TOKENS)


@pytest.mark.parametrize("make", [init.skipinit, init.rezero, init.layer_scale, init.fixup, init.t_fixup])
def test_shapes_are_enough(make):
    with torch.device("meta"):
        fixup = make is init.fixup
        model = resnet(3, 5, 32, norm=None) if fixup else tv.VisionTransformer(32, 8, 2, 2, 16, 32)
    assert make(model, sample=IMAGES.to("meta"))
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("make", [init.rezero, init.layer_scale, init.t_fixup])
def test_it_compiles_without_a_break(make):
    model = transformer(50, 50, 8, width=16, depth=2, heads=2)
    make(model, sample=TOKENS)
    for _ in (model.train(), model.eval()):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
