"""`augment`: pixel-exact on crafted batches; label weights sum to 1; eval untouched; seeded."""

import pytest
import torch

from knep.recipes.augment import Cutmix, Erase, Flip, Mixup, Shift, ShiftFlip, Trivial

N, SIZE, CLASSES = 64, 9, 5


def batch(channels=1):
    g = torch.Generator().manual_seed(3)
    x = torch.randint(1, 256, (N, channels, SIZE, SIZE), dtype=torch.uint8, generator=g)
    return x, torch.randint(0, CLASSES, (N,), generator=g)


def shifted(image, down, right):
    """The image moved by whole pixels, black where nothing was: by loops, not by the code under test."""
    out = torch.zeros_like(image)
    for i in range(SIZE):
        for j in range(SIZE):
            if 0 <= i - down < SIZE and 0 <= j - right < SIZE:
                out[:, i, j] = image[:, i - down, j - right]
    return out


def _shift():
    x, y = batch(3)
    out, labels = Shift(pixels=2)(x, y, CLASSES)
    assert torch.equal(labels, y)
    offsets = [(d, r) for d in range(-2, 3) for r in range(-2, 3)]
    found = [{o for o in offsets if torch.equal(shifted(a, *o), b)} for a, b in zip(x, out, strict=True)]
    assert all(found)
    assert len(set().union(*found)) > 15  # each image has its own


def _flip():
    x, y = batch()
    out, labels = Flip(p=0.5)(x, y, CLASSES)
    assert torch.equal(labels, y)
    mirrored = [torch.equal(b, a.flip(2)) for a, b in zip(x, out, strict=True)]
    same = [torch.equal(b, a) for a, b in zip(x, out, strict=True)]
    assert all(m or s for m, s in zip(mirrored, same, strict=True))
    assert 15 < sum(mirrored) < 49
    assert torch.equal(Flip(p=1.0)(x, y, CLASSES)[0], x.flip(3))


def _shift_flip():
    x, y = batch()
    out, _ = ShiftFlip(pixels=1, p=0.5)(x, y, CLASSES)
    offsets = [(d, r) for d in range(-1, 2) for r in range(-1, 2)]
    for a, b in zip(x, out, strict=True):
        assert any(torch.equal(shifted(source, *o), b) for o in offsets for source in (a, a.flip(2)))


def _erase():
    x, y = batch()
    out, labels = Erase(p=1.0, smallest=0.1, largest=0.3)(x, y, CLASSES)
    assert torch.equal(labels, y)
    for a, b in zip(x[:, 0], out[:, 0], strict=True):
        gone = a != b
        rows, columns = gone.any(1).nonzero().flatten(), gone.any(0).nonzero().flatten()
        assert (b[gone] == 0).all()
        assert int(gone.sum()) == len(rows) * len(columns)  # one full rectangle: no pixel of the batch is black
        assert int(rows.max() - rows.min()) + 1 == len(rows)
        assert 0.04 * SIZE**2 < gone.sum() < 0.45 * SIZE**2  # rounding to whole pixels widens [0.1, 0.3]
    assert torch.equal(Erase(p=0.0)(x, y, CLASSES)[0], x)


def mixed_rows(labels, y):
    assert labels.shape == (N, CLASSES)
    torch.testing.assert_close(labels.sum(1), torch.ones(N))
    assert ((labels > 0).sum(1) <= 2).all()
    return labels[torch.arange(N), y]


def _mixup():
    # Image k is constant, with a value that names it: the blend can be read off the pixels.
    values = torch.arange(N, dtype=torch.float32)
    y = torch.arange(N) % CLASSES
    x = values[:, None, None, None].expand(N, 1, 2, 2).clone()
    torch.manual_seed(5)
    out, labels = Mixup(alpha=1.0)(x, y, CLASSES)
    torch.manual_seed(5)
    gamma = torch._standard_gamma(torch.full((2, N), 1.0))
    share, partner = gamma[0] / gamma.sum(0), torch.randperm(N)
    torch.testing.assert_close(out[:, 0, 0, 0], share * values + (1 - share) * values[partner])
    own = mixed_rows(labels, y)
    other = y[partner] != y
    torch.testing.assert_close(own[other], share[other])


def _cutmix():
    values = torch.arange(1, N + 1, dtype=torch.uint8)
    x = values[:, None, None, None].expand(N, 1, SIZE, SIZE).clone()
    y = torch.arange(N) % CLASSES
    out, labels = Cutmix(alpha=1.0)(x, y, CLASSES)
    own = mixed_rows(labels, y)
    for k in range(N):
        kept = (out[k, 0] == values[k]).float().mean()
        pasted = out[k, 0][out[k, 0] != values[k]].unique()
        assert len(pasted) <= 1  # one partner
        if len(pasted) and y[int(pasted) - 1] != y[k]:
            assert own[k] == pytest.approx(float(kept), abs=1e-6)  # labels go by the pixels


def _trivial():
    x, y = batch(3)
    out, labels = Trivial(groups=4)(x, y, CLASSES)
    assert torch.equal(labels, y)
    assert out.dtype == torch.uint8
    assert out.shape == x.shape
    assert not torch.equal(out, x)
    with pytest.raises(ValueError, match="uint8"):
        Trivial()(x.float(), y, CLASSES)


ROWS = {
    "shift": _shift,
    "flip": _flip,
    "shift_flip": _shift_flip,
    "erase": _erase,
    "mixup": _mixup,
    "cutmix": _cutmix,
    "trivial": _trivial,
}
MAKE = {
    "shift": Shift,
    "flip": Flip,
    "shift_flip": ShiftFlip,
    "erase": lambda: Erase(p=0.9),
    "mixup": Mixup,
    "cutmix": Cutmix,
    "trivial": Trivial,
}


@pytest.mark.parametrize("option", ROWS)
def test_property(option):
    ROWS[option]()


@pytest.mark.parametrize("option", MAKE)
def test_eval_is_untouched_and_training_is_seeded(option):
    x, y = batch(3)
    augment = MAKE[option]()
    torch.manual_seed(7)
    first = augment(x, y, CLASSES)
    torch.manual_seed(7)
    again = augment(x, y, CLASSES)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(augment(x, y, CLASSES)[0], first[0])
    out, labels = augment.eval()(x, y, CLASSES)
    assert out is x
    assert labels is y


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Shift(pixels=0), "pixels"),
        (lambda: Flip(p=1.5), "p must"),
        (lambda: Erase(smallest=0.5, largest=0.2), "smallest"),
        (lambda: Mixup(alpha=0.0), "alpha"),
        (lambda: Cutmix(alpha=-1.0), "alpha"),
        (lambda: Trivial(groups=0), "groups"),
    ],
)
def test_bad_values_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("make", [lambda: Flip(alternate=True), lambda: ShiftFlip(pixels=1, alternate=True)])
def test_alternating_flips_show_both_views_of_each_image_in_two_epochs(make):
    torch.manual_seed(0)
    x, y = torch.zeros(256, 1, 7, 7, dtype=torch.uint8), torch.zeros(256, dtype=torch.int64)
    x[:, 0, 3, 1] = torch.randint(100, 200, (256,))  # left of the middle; a shift by one keeps it there
    flip = make().train()

    def mirrored(epoch):
        flip.epoch = epoch
        out, _ = flip(x, y, 3)
        return out[:, 0, :, 4:].sum((1, 2)) > 0

    first = mirrored(0)
    assert torch.equal(first, mirrored(2))
    assert torch.equal(first, ~mirrored(1))
    assert 0.4 < first.float().mean() < 0.6
    with pytest.raises(ValueError, match=r"0\.5"):
        Flip(p=0.3, alternate=True)
