"""Rows of any shape through the base of the data modules: kinds of targets, splits, padding, draws by weight."""

import pytest
import torch

from knep.config.schema import DataSpec
from knep.data.base import Arrays, InMemory
from knep.data.loaders import order_of
from knep.errors import InputError


class Given(InMemory):
    """What a data set of one's own needs."""

    def __init__(self, *arrays, **common):
        super().__init__(**common)
        self._given = Arrays(*arrays)

    def _arrays(self):
        return self._given


def given(x, y, names, **more):
    return Given(x, y, x[:10], y[:10], names, batch_size=8, **more)


X = torch.randn(60, 5)
IDS = torch.arange(60 * 4).view(60, 4) % 7
IMAGES = torch.zeros(60, 3, 6, 6, dtype=torch.uint8)
ROWS = {
    "vectors to classes": (X, torch.arange(60) % 3, "abc", "class", (5,), 5, 1),
    "vectors to a number": (X, torch.randn(60), ["price"], "number", (5,), 5, 1),
    "vectors to numbers": (X, torch.randn(60, 2).double(), ["x", "y"], "number", (5,), 5, 1),
    "images to labels": (IMAGES, torch.rand(60, 4) > 0.5, "abcd", "label", None, 3, 6),
    "images to masks": (IMAGES, torch.zeros(60, 6, 6, dtype=torch.int64), "ab", "mask", None, 3, 6),
    "tokens to tokens": (IDS, IDS, "abcdefg", "token", (4,), 7, 4),
    "wide images": (torch.zeros(60, 3, 6, 8), torch.arange(60) % 2, "ab", "class", (3, 6, 8), 3, 8),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_described_split_and_stored(name):
    x, y, names, kind, shape, channels, size = ROWS[name]
    data = given(x, y, names)
    data.prepare()
    spec = DataSpec.of(data)
    assert (spec.target, spec.shape, spec.channels, spec.image_size) == (kind, shape, channels, size)
    assert spec.row == tuple(x.shape[1:])
    assert DataSpec.stored(spec.plain()) == spec
    assert sum(data.sizes.values()) == 70
    assert data.sizes["val"] == 6
    batch = next(iter(data.train_dataloader()))
    assert batch[0].shape == (8, *x.shape[1:])
    assert batch[1].shape == (8, *y.shape[1:])


def test_what_fills_up_a_batch_is_no_target():
    for y, is_padding in (
        (torch.randn(59, 2), torch.isnan),
        (torch.zeros(59, 6, 6, dtype=torch.int64), lambda y: y == -1),
        (torch.rand(59, 4) > 0.5, lambda y: y == 255),
    ):
        names = ["a"] * (y.shape[1] if y.ndim == 2 else 2)
        data = given(torch.zeros(59, 3), y, names)
        data.prepare()
        data._splits["test"] = data._splits["train"][0][:5], data._splits["train"][1][:5]
        data.sizes["test"] = 5
        data.rank_world = lambda: (1, 2)
        ((_, got),) = data.test_dataloader()
        assert is_padding(got).flatten(1).all(1).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("x", "y", "names", "text"),
    [
        (X, torch.zeros(60, 2, 2, 2), "ab", "of no kind"),
        (X, torch.randn(60, 2), "a", "2 numbers a row and 1 names"),
        (X, torch.full((60,), torch.nan), "a", "not finite"),
        (X, torch.ones(60, dtype=torch.int64) * 3, "abc", "label 3 out of range"),
        (IMAGES, torch.full((60, 6, 6), 2), "ab", "label 2 out of range"),
        (X[:50], torch.arange(60) % 2, "ab", "of other rows"),
        (IDS, torch.arange(60) % 2, "ab", None),
    ],
)
def test_what_is_no_data_is_refused_in_a_line(x, y, names, text):
    data = given(x, y, names)
    if text is None:
        data.prepare()
        assert data.channels == 7
        return
    with pytest.raises(InputError, match=text) as found:
        data.prepare()
    assert "\n" not in str(found.value)


def test_a_draw_by_weight_follows_seed_and_epoch_and_the_weights():
    weights = torch.tensor([1.0] * 900 + [9.0] * 100)
    order = order_of(1000, 3, 5, weights)
    assert torch.equal(order, order_of(1000, 3, 5, weights))
    assert not torch.equal(order, order_of(1000, 3, 6, weights))
    assert (order >= 900).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_a_loader_draws_by_weight_and_resumes_in_its_epoch():
    data = given(X, torch.tensor([0] * 50 + [1] * 10), "ab")
    data.sampling = lambda y: 1.0 / torch.bincount(y)[y]
    data.prepare()
    loader = data.train_dataloader()
    batches = list(loader)
    assert 0.2 < torch.cat([y for _, y in batches]).float().mean() < 0.8
    again = data.train_dataloader()
    again.load_state_dict({"position": 3})
    assert all(torch.equal(a[0], b[0]) for a, b in zip(again, batches[3:], strict=True))
