"""model.checkpointing: the same numbers with fewer activations kept, or a line that says why not."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from knep.cli.main import main
from knep.config.compose import compose_config
from knep.errors import InputError
from knep.models.resnet import resnet
from knep.models.transformer import transformer
from knep.nn.recompute import recompute_blocks
from knep.run.run import run


def step(net, x):
    torch.manual_seed(1)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = net(x)
    out.pow(2).mean().backward()
    return out, sum(kept)


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (lambda: resnet(3, 10, 16, depth=20, width=0.5), torch.randn(4, 3, 16, 16)),
        (lambda: transformer(20, 20, 12, width=16, depth=3, heads=2), torch.randint(0, 20, (4, 12))),
        (
            lambda: nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU()) for _ in range(3)]),
            torch.randn(4, 8),
        ),
    ],
    ids=["resnet", "transformer", "dropout"],
)
def test_outputs_gradients_and_statistics_are_the_same(build, x):
    torch.manual_seed(0)
    plain = build()
    torch.manual_seed(0)
    lean = build()
    names = list(lean.state_dict())
    assert recompute_blocks(lean)
    assert list(lean.state_dict()) == names
    (wanted, all_kept), (found, kept) = step(plain, x), step(lean, x)
    assert torch.equal(found, wanted)
    for (name, p), q in zip(plain.named_parameters(), lean.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6), name
    for (name, b), c in zip(plain.named_buffers(), lean.buffers(), strict=True):
        assert torch.equal(b, c), name
    assert kept < 0.7 * all_kept
    assert torch.equal(plain.eval()(x), lean.eval()(x))


def test_a_model_without_repeated_blocks_is_refused():
    with pytest.raises(InputError, match="this model has none"):
        recompute_blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))


def test_a_spectral_norm_is_refused_by_its_layer():
    net = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)])
    torch.nn.utils.parametrizations.spectral_norm(net[1][0])
    with pytest.raises(InputError, match=r"twice through 1\.0, whose spectral norm"):
        recompute_blocks(net)


def test_a_run_recomputes_and_learns_the_same(tmp_path):
    lines = [
        "data=digits",
        "recipe=none",
        "model=resnet",
        "model.width=0.25",
        "norm=batch",
        "scaling=unit",
        "threads=1",
    ]
    lines += ["trainer.max_epochs=1", "progress=false"]
    found = []
    for name, more in (("plain", []), ("lean", ["model.checkpointing=true"])):
        trained(tmp_path / name, *lines, *more)
        found.append(torch.load(tmp_path / name / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"])
    assert list(found[0]) == list(found[1])
    assert all(torch.allclose(t, found[1][name], atol=1e-5) for name, t in found[0].items())
    main(["export", str(tmp_path / "lean"), str(tmp_path / "net.safetensors")])


def trained(folder, *lines):
    made = compose_config(["data=digits", "recipe=none", "scaling=unit", "progress=false", "threads=1", *lines])
    run(made.config, folder, made.choices, made.overrides, figures=False)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["model=mlp", "norm=spectral", "model.checkpointing=true"], "spectral norm moves with each pass"),
        (["model.checkpointing=1"], "true or false"),
    ],
)
def test_what_cannot_be_recomputed_is_refused(lines, said, tmp_path):
    with pytest.raises(InputError, match=said):
        trained(tmp_path / "run", *lines)
