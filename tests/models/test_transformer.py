import pytest
import torch
import torch.nn.functional as F
from torch import nn

from knep.errors import InputError
from knep.models.transformer import transformer
from knep.nn.place import Place
from knep.recipes import activation, dropout, norm
from knep.surgery.edit import modules_of


def small(**values):
    return transformer(11, 11, 9, **{"width": 16, "depth": 2, "heads": 2, **values})


def tokens(rows=3, length=9):
    return torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(0))


def test_scores_for_each_token_of_rows_up_to_the_length():
    assert small()(tokens()).shape == (3, 9, 11)
    assert small()(tokens(length=4)).shape == (3, 4, 11)
    assert transformer(11, 3, 9, causal=False)(tokens()).shape == (3, 9, 3)


def test_counts_by_hand():
    block = 4 * 16 + (16 + 1) * 48 + (16 + 1) * 16 + (16 + 1) * 64 + (64 + 1) * 16
    assert sum(p.numel() for p in small().parameters()) == 11 * 16 + 9 * 16 + 2 * block + 2 * 16 + 16 * 11
    assert sum(p.numel() for p in small(tied=True).parameters()) == 11 * 16 + 9 * 16 + 2 * block + 2 * 16


@pytest.mark.parametrize("causal", [True, False])
def test_a_token_reads_what_stands_before_it_alone(causal):
    model, x = small(causal=causal).eval(), tokens()
    other = x.clone()
    other[:, 5] = (x[:, 5] + 1) % 11
    same = (model(x) - model(other)).abs().amax((0, 2)) == 0
    assert same.tolist() == ([True] * 5 + [False] * 4 if causal else [False] * 9)


def test_attention_is_the_papers_formula():
    attention = small().double().blocks[0].attention
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    q, k, v = (part.view(2, 5, 2, 8).transpose(1, 2) for part in attention.qkv(x).split(16, -1))
    scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    read = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 16)
    torch.testing.assert_close(attention(x), F.linear(read, attention.out.weight, attention.out.bias))


def test_starts_as_gpt_2_does():
    torch.manual_seed(0)
    model = transformer(256, 256, 64, width=256, depth=8)
    assert model.tokens.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.blocks[3].mlp.expand.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.blocks[3].mlp.project.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert not model.blocks[0].attention.qkv.bias.any()
    loss = F.cross_entropy(model(torch.randint(0, 256, (4, 64))).flatten(0, 1), torch.randint(0, 256, (256,)))
    assert loss.item() == pytest.approx(torch.tensor(256.0).log().item(), abs=0.1)


def test_gradients_reach_every_parameter():
    model = small()
    F.cross_entropy(model(tokens(8)).flatten(0, 1), tokens(8).flatten()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_residual_places_know_their_depth():
    depths = [m.depth for _, m in modules_of(small(), Place) if m.kind == "residual"]
    assert depths == pytest.approx([0.25, 0.5, 0.75, 1])
    kinds = [m.kind for _, m in modules_of(small(), Place)]
    assert (kinds.count("hidden"), kinds.count("head")) == (2, 1)


@pytest.mark.parametrize("trick", [norm.rms, norm.auto, norm.group, activation.relu, dropout.standard])
def test_slots_reach_it(trick):
    model = small()
    changes = trick(model, sample=tokens())
    assert len(changes) >= 2
    assert model(tokens()).isfinite().all()


@pytest.mark.parametrize("trick", [norm.rms, norm.layer, norm.group])
def test_norms_of_each_token_keep_it_causal(trick):
    model, x = small(), tokens()
    trick(model, sample=x)
    other = x.clone()
    other[:, 8] = (x[:, 8] + 1) % 11
    torch.testing.assert_close(model.eval()(x)[:, :8], model(other)[:, :8])


@pytest.mark.parametrize("trick", [norm.batch, norm.ghost_batch, norm.instance])
def test_norms_over_the_row_are_for_models_that_read_it_whole(trick):
    with pytest.raises(InputError, match="would let later positions change earlier ones"):
        trick(small(), sample=tokens())
    assert len(trick(small(causal=False), sample=tokens())) == 5


def test_branches_are_skipped_row_by_row():
    model = small()
    assert len(dropout.stochastic_depth(model, sample=tokens(), p=0.5)) == 4


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"width": 0}, "width"),
        ({"depth": 1.5}, "depth"),
        ({"heads": 3}, "width=16 must be a multiple of heads=3: write width=18"),
        ({"causal": 1}, "causal must be true or false"),
    ],
)
def test_bad_values_are_named(values, said):
    with pytest.raises(InputError, match=said):
        small(**values)
    with pytest.raises(InputError, match="tied needs a class for each of 11 tokens"):
        transformer(11, 3, 9, tied=True)


def test_images_and_long_rows_are_refused_in_a_line():
    for x in (torch.rand(2, 1, 8, 8), tokens().float(), torch.zeros(2, 10, dtype=torch.int64)):
        with pytest.raises(InputError, match="reads whole numbers of tokens") as error:
            small()(x)
        assert "\n" not in str(error.value)


def test_the_activation_is_a_choice():
    assert sum(isinstance(m, nn.SiLU) for m in small(activation=nn.SiLU).modules()) == 2
