import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel
from torch.nn.utils import parametrizations, parametrize

from knep.errors import InputError
from knep.recipes import activation, norm
from knep.surgery.record import Recorder, hooked, name_of, surround

TRICKS = [
    norm.batch,
    norm.ghost_batch,
    norm.group,
    norm.instance,
    norm.layer,
    norm.rms,
    activation.gelu,
    activation.tanh,
]
NORMS = TRICKS[:6]
X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.LayerNorm(4), nn.GELU()

    def forward(self, x):
        return self.act(self.norm(x.flatten(2).transpose(1, 2))).mean(1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), Tokens(), nn.Linear(4, 2))


@pytest.mark.parametrize("trick", TRICKS)
def test_compiled_models_are_unwrapped_and_parallel_or_lazy_ones_refused(trick):
    model = net()
    paths = [c.path for c in trick(torch.compile(model, backend="eager"))]
    assert paths == (["1", "3.norm"] if trick in NORMS else ["2", "3.act"])
    with pytest.raises(InputError, match="DataParallel"):
        trick(DataParallel(net()))
    with pytest.raises(InputError, match="has no shape yet"):
        trick(nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU()))


@pytest.mark.parametrize("trick", TRICKS)
def test_a_model_that_is_one_layer_has_no_place_for_another(trick):
    with pytest.raises(InputError, match=r"the model itself is a .*: wrap it in nn\.Sequential"):
        trick(nn.BatchNorm2d(4) if trick in NORMS else nn.ReLU())


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_precision(trick, dtype):
    model = net().to(dtype)
    trick(model, sample=X.to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    model(X.to(dtype)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("trick", TRICKS)
def test_shapes_without_values_are_enough(trick):
    model = copy.deepcopy(net()).to("meta")
    assert trick(model, sample=X.to("meta"))
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    plain = nn.Sequential(nn.Conv2d(3, 4, 1, device="meta"), nn.ReLU(), nn.Conv2d(4, 4, 1, device="meta"))
    assert trick(plain, sample=X.to("meta"), **({"insert": True} if trick in NORMS else {}))
    assert all(t.is_meta for t in (*plain.parameters(), *plain.buffers()))


@pytest.mark.parametrize("trick", TRICKS)
def test_what_is_frozen_stays_frozen_and_ties_stay_ties(trick):
    model = net()
    model.append(nn.RMSNorm(2)).requires_grad_(False)
    model[3].norm.weight = model[1].weight
    trick(model)
    assert not any(p.requires_grad for p in model.parameters())
    gains = [m.weight for m in model.modules() if getattr(m, "weight", None) is not None and m.weight.dim() == 1]
    assert gains[0] is gains[1]


@pytest.mark.parametrize("trick", NORMS)
def test_parametrised_norms_are_refused_by_name(trick):
    model = net()
    parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    with pytest.raises(InputError, match=r"1 \(ParametrizedBatchNorm2d\) has a parametrisation"):
        trick(model)


@pytest.mark.parametrize("trick", TRICKS)
def test_parametrised_weights_beside_them_are_no_obstacle(trick):
    model = net()
    parametrizations.weight_norm(model[0])
    trick(model, sample=X)
    assert parametrize.is_parametrized(model[0], "weight")
    model(X).sum().backward()


@pytest.mark.parametrize("trick", TRICKS)
def test_hooks_would_be_lost_and_are_refused_by_name(trick):
    model = net()
    handle = model[1 if trick in NORMS else 2].register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="has hooks"):
        trick(model, sample=X)
    handle.remove()
    trick(model, sample=X)


@pytest.mark.parametrize("trick", NORMS)
def test_the_fused_path_of_transformers_has_the_new_norm(trick):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    x = torch.randn(2, 5, 8)
    trick(model, sample=x)
    layer = model.layers[0]
    h = layer.norm1(x + layer.self_attn(x, x, x)[0])
    with torch.no_grad():
        torch.testing.assert_close(model(x), layer.norm2(h + layer.linear2(layer.linear1(h).relu())))


def test_hooks_are_taken_off_where_a_forward_raises_or_a_module_takes_none():
    seen = []
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(RuntimeError), hooked(net.modules(), lambda m, *_: seen.append(m)):
        net(torch.zeros(3, 5))
    assert seen[:2] == [net, net[0]]
    scripted = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(RuntimeError, match="ScriptModule"), hooked(scripted.modules(), print):
        pass
    for m in (*net.modules(), *scripted.modules()):
        assert not m._forward_hooks
        assert not m._forward_pre_hooks


def test_a_recorder_follows_modules_and_functions_and_a_surrounded_model_gives_what_it_leaves():
    class Twice(Recorder):
        def __init__(self, modules=()):
            super().__init__(modules)
            self.seen = []

        def leave(self, module, args, output):
            self.seen.append(type(module).__name__)
            return output * 2 if isinstance(module, nn.Sequential) else None

        def function(self, func, args, kwargs):
            self.seen.append((name_of(func), [type(m).__name__ for m in self.inside]))
            return func(*args, **kwargs)

    net, x = nn.Sequential(nn.ReLU()), torch.ones(2, 2)
    with Twice(net.modules()) as twice:
        net(x)
    assert twice.seen == [("relu", ["Sequential", "ReLU"]), "ReLU", "Sequential", ("mul", [])]
    surround(net, Twice)
    assert torch.equal(net(x), 2 * x)
    assert torch.equal(net(x), 2 * x)
