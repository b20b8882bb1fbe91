"""`augment`: pixel-exact on crafted batches; label weights sum to 1; eval untouched; seeded."""

import pytest
import torch
import torchvision.transforms.v2.functional

from knep.errors import InputError
from knep.recipes.augment import (
    AugMix,
    AutoAugment,
    ColorJitter,
    Cutmix,
    Erase,
    Flip,
    Mixup,
    MixupCutmix,
    ProgressiveResize,
    RandAugment,
    RandomResizedCrop,
    Repeats,
    Shift,
    ShiftFlip,
    ThreeAugment,
    Trivial,
)
from knep.recipes.augment.stages import Stages

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


# Those that follow timm or torchvision are held against them in test_augment_policies.py.


def _random_resized_crop():
    """Of an image that is a plane a crop is a plane too, flatter by the share of each side that it has."""
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    x, y = (rows + 2 * columns).expand(N, 1, 40, 40), torch.zeros(N, dtype=torch.int64)
    torch.manual_seed(1)
    out, _ = RandomResizedCrop(scale=(0.25, 0.25), ratio=(1.0, 1.0))(x, y, CLASSES)
    inner = out[:, 0, 2:-2, 2:-2]  # an outermost pixel has no neighbour to lean on
    torch.testing.assert_close(inner.diff(dim=1), torch.full_like(inner[:, 1:], 0.5), rtol=0, atol=1e-3)
    torch.testing.assert_close(inner.diff(dim=2), torch.full_like(inner[:, :, 1:], 1.0), rtol=0, atol=1e-3)
    assert len(out[:, 0, 20, 20].unique()) > 25  # each image has its own box
    whole, _ = RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0))(x, y, CLASSES)
    torch.testing.assert_close(whole, x)


def _color_jitter():
    """Brightness alone is a factor in its range, with what is over 255 cut off; saturation leaves grey images alone."""
    x, y = batch(3)
    out, labels = ColorJitter(brightness=0.5, contrast=0.0, saturation=0.0)(x, y, CLASSES)
    assert labels is y
    for a, b in zip(x.double(), out.double(), strict=True):
        kept = (b < 255) & (a > 40)
        factor = ((b + 0.5) / a)[kept].median()
        assert 0.49 < factor < 1.51
        assert (b - (a * factor).clamp(max=255).floor()).abs().max() <= 2
    grey = x[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(ColorJitter(brightness=0.0, contrast=0.0)(grey, y, CLASSES)[0], grey)
    assert torch.equal(ColorJitter(p=0.0)(x, y, CLASSES)[0], x)


def _rand_augment():
    """Strength 0 of the increasing scale leaves images nearly alone, save where an operation has no strength."""
    x, y = batch(3)
    out, labels = RandAugment(n=1, magnitude=0.0, mstd=0.0, p=1.0)(x, y, CLASSES)
    assert labels is y
    # Of 15 operations, invert, equalize and auto_contrast have none, and posterize keeps 4 bits.
    changed = ((out.int() - x.int()).abs() > 1).flatten(1).any(1).float().mean()
    assert 0.05 < changed < 0.55
    assert torch.equal(RandAugment(p=0.0)(x, y, CLASSES)[0], x)
    assert not torch.equal(RandAugment(p=1.0)(x, y, CLASSES)[0], x)


def _auto_augment():
    """Under the policy of street numbers most images are moved or inverted, and without p none."""
    x, y = batch(3)
    out, labels = AutoAugment(policy="svhn")(x, y, CLASSES)
    assert labels is y
    assert (out != x).flatten(1).any(1).float().mean() > 0.7
    assert torch.equal(AutoAugment(p=0.0)(x, y, CLASSES)[0], x)


def _aug_mix():
    """A blend: the mean distance to the image is a part of that of its chains, and no image leaves 0..255."""
    x, y = batch(3)
    torch.manual_seed(0)
    out, labels = AugMix(magnitude=10.0, mstd=0.0)(x, y, CLASSES)
    assert labels is y
    assert 1 < (out.int() - x.int()).abs().float().mean() < 60
    assert torch.equal(AugMix(p=0.0)(x, y, CLASSES)[0], x)


def _three_augment():
    """Grey has three equal channels; solarized at 128 nothing is brighter than 128; what is neither is blurred."""
    x, y = batch(3)
    out, labels = ThreeAugment()(x, y, CLASSES)
    assert labels is y
    grey = (out[:, 0] == out[:, 1]).flatten(1).all(1) & (out[:, 1] == out[:, 2]).flatten(1).all(1)
    solarized = (out == torch.where(x >= 128, 255 - x, x)).flatten(1).all(1)
    assert min(int(grey.sum()), int(solarized.sum())) > 8
    blurred = ~grey & ~solarized
    assert blurred.sum() > 8
    assert (out[blurred].float().std((2, 3)) <= x[blurred].float().std((2, 3)) + 0.5).all()


def _mixup_cutmix():
    """Each image holds two values, its own and its mirror's in the batch, and labels have their shares."""
    values, y = torch.arange(1, N + 1.0), torch.arange(N) % CLASSES
    x = values[:, None, None, None].expand(N, 1, SIZE, SIZE).clone()
    out, labels = MixupCutmix(mode="elem")(x, y, CLASSES)
    other = values.flip(0)[:, None, None, None]
    share = ((out - other) / (x - other)).mean((1, 2, 3))
    q, r = (torch.nn.functional.one_hot(labels_of, CLASSES) for labels_of in (y, y.flip(0)))
    torch.testing.assert_close(labels, share[:, None] * q + (1 - share[:, None]) * r, rtol=0, atol=1e-4)
    cut = ((out == x) | (out == other)).flatten(1).all(1)
    assert 0.2 < cut.float().mean() < 0.8


def _repeats():
    x, y = batch()
    out, labels = Repeats(times=3)(x, y, CLASSES)
    rows = [i // 3 for i in range(N)]
    assert torch.equal(out, x[rows])
    assert torch.equal(labels, y[rows])


def _progressive_resize():
    """Sides grow by equal steps to their own; each pixel is a mean of those that it stands for."""
    grow = ProgressiveResize(start=0.5, off_epoch=4, multiple=2)
    assert [grow.side(16, epoch) for epoch in range(6)] == [8, 10, 12, 14, 16, 16]
    assert grow.sizes(16) == [8, 10, 12, 14]
    x, y = torch.randint(0, 256, (N, 3, 16, 16)).double(), torch.zeros(N, dtype=torch.int64)
    flat = torch.full_like(x, 77.0)
    assert torch.equal(grow(flat, y, CLASSES)[0], torch.full((N, 3, 8, 8), 77.0, dtype=x.dtype))
    out, labels = grow(x, y, CLASSES)
    assert labels is y
    theirs = torchvision.transforms.v2.functional.resize(x.float(), [8, 8], antialias=True)
    torch.testing.assert_close(out.float(), theirs, rtol=0, atol=1e-3)
    mask = torch.arange(256).reshape(1, 16, 16).expand(N, -1, -1)
    assert torch.equal(grow(x, mask, CLASSES)[1], mask[:, ::2, ::2])
    grow.epoch = 4
    assert grow(x, y, CLASSES)[0] is x
    for wrong in ({"start": 1.0}, {"off_epoch": None}, {"off_epoch": 0}, {"multiple": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ProgressiveResize(**wrong)
    with pytest.raises(InputError, match=r"images \(N, C, H, W\)"):
        ProgressiveResize()(torch.rand(4, 3, 6), torch.arange(4), CLASSES)


ROWS = {
    "progressive_resize": _progressive_resize,
    "random_resized_crop": _random_resized_crop,
    "color_jitter": _color_jitter,
    "rand_augment": _rand_augment,
    "auto_augment": _auto_augment,
    "aug_mix": _aug_mix,
    "three_augment": _three_augment,
    "mixup_cutmix": _mixup_cutmix,
    "repeats": _repeats,
    "shift": _shift,
    "flip": _flip,
    "shift_flip": _shift_flip,
    "erase": _erase,
    "mixup": _mixup,
    "cutmix": _cutmix,
    "trivial": _trivial,
}
MAKE = {
    "random_resized_crop": RandomResizedCrop,
    "color_jitter": ColorJitter,
    "rand_augment": RandAugment,
    "auto_augment": AutoAugment,
    "aug_mix": AugMix,
    "three_augment": ThreeAugment,
    "mixup_cutmix": lambda: MixupCutmix(mode="elem"),
    "erase_pixels": lambda: Erase(p=0.9, mode="pixel", count=3),
    "shift_reflected": lambda: Shift(padding="reflect"),
    "stages": lambda: Stages(flip=Flip(), rand_augment=RandAugment(), mixup=Mixup(), erase=Erase()),
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


@pytest.mark.parametrize("option", MAKE)
def test_it_acts_where_float64_is_the_default(option):
    x, y = batch(3)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        out, labels = MAKE[option]()(x, y, CLASSES)
    finally:
        torch.set_default_dtype(before)
    assert out.dtype in (torch.uint8, torch.float64)
    assert len(labels) == N


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Shift(pixels=0), "pixels"),
        (lambda: Flip(p=1.5), "p must"),
        (lambda: Erase(smallest=0.5, largest=0.2), "smallest"),
        (lambda: Mixup(alpha=0.0), "alpha"),
        (lambda: Cutmix(alpha=-1.0), "alpha"),
        (lambda: Trivial(groups=0), "groups"),
        (lambda: Flip(off_epoch=-1), "off_epoch"),
        (lambda: Shift(padding="white"), "padding"),
        (lambda: Shift(pixels=9, padding="reflect")(*batch(), CLASSES), "below the sides"),
        (lambda: Erase(mode="white"), "mode"),
        (lambda: Erase(count=0), "count"),
        (lambda: RandomResizedCrop(scale=(0.5, 0.2)), "scale"),
        (lambda: RandomResizedCrop(ratio=(0.0, 1.0)), "ratio"),
        (lambda: RandomResizedCrop(size=0), "size"),
        (lambda: RandomResizedCrop(interpolation="lanczos"), "interpolation"),
        (lambda: ColorJitter(brightness=-1.0), "brightness"),
        (lambda: ColorJitter(hue=0.6), "hue"),
        (lambda: RandAugment(n=0), "n must"),
        (lambda: RandAugment(magnitude=11.0), "magnitude"),
        (lambda: RandAugment(mstd=-1.0), "mstd"),
        (lambda: RandAugment(p=2.0), "p must"),
        (lambda: AutoAugment(policy="mnist"), "policy"),
        (lambda: AugMix(width=0), "width"),
        (lambda: AugMix(alpha=0.0), "alpha"),
        (lambda: ThreeAugment(sigma=(2.0, 1.0)), "sigma"),
        (lambda: MixupCutmix(mixup_alpha=0.0, cutmix_alpha=0.0), "alpha"),
        (lambda: MixupCutmix(mode="half"), "mode"),
        (lambda: MixupCutmix(smoothing=1.0), "smoothing"),
        (lambda: MixupCutmix(switch_prob=1.5), "switch_prob"),
        (lambda: Repeats(times=0.5), "times"),
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


def test_a_reflected_shift_shows_the_mirror_image_at_the_border():
    x, y = batch(3)
    padded = torch.nn.functional.pad(x.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    torch.manual_seed(3)
    out, _ = Shift(pixels=2, padding="reflect")(x, y, CLASSES)
    torch.manual_seed(3)
    down, right = torch.randint(0, 5, (2, N, 1))[:, :, 0].tolist()
    for i in range(N):
        assert torch.equal(out[i], padded[i, :, down[i] : down[i] + SIZE, right[i] : right[i] + SIZE])


# Several stages


def test_stages_act_in_their_order_and_end_at_their_epochs():
    x, y = batch()
    stages = Stages(order=["repeats", "flip"], flip=Flip(p=1.0, off_epoch=2), repeats=Repeats(times=2, off_epoch=1))
    rows = [i // 2 for i in range(N)]
    stages.epoch = 0
    out, labels = stages(x, y, CLASSES)
    assert torch.equal(out, x[rows].flip(3))
    assert torch.equal(labels, y[rows])
    stages.epoch = 1
    assert torch.equal(stages(x, y, CLASSES)[0], x.flip(3))
    stages.epoch = 2
    assert torch.equal(stages(x, y, CLASSES)[0], x)
    assert not stages.mixes
    assert Stages(flip=Flip(), mixup=Mixup()).mixes
    assert list(Stages(flip=Flip(), mixup=Mixup()).state_dict()) == []


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (["mixup", "flip"], r"write augment=\[flip,mixup\]"),
        (["flip", "flip", "mixup"], "twice"),
        (["flip"], "name each once"),
        (["flip", "none", "mixup"], "none in a list"),
    ],
)
def test_stages_that_cannot_follow_each_other_are_refused(order, said):
    with pytest.raises(InputError, match=said):
        Stages(order=order, flip=Flip(), mixup=Mixup())


def test_a_mask_follows_the_operations_of_a_policy():
    x = torch.randint(0, 2, (N, 1, SIZE, SIZE), dtype=torch.uint8) * 200
    mask = (x[:, 0] > 0).long()
    for make in (lambda: RandAugment(p=1.0, fill=0.0), lambda: AutoAugment(policy="svhn", fill=0.0)):
        torch.manual_seed(0)
        out, moved = make()(x, mask, 2)
        torch.manual_seed(0)
        again, _ = make()(x, torch.zeros(N).long(), 2)
        assert torch.equal(out, again)  # the same draws, with a mask or without
        assert moved.dtype == mask.dtype
        assert set(moved.unique().tolist()) <= {0, 1}
        assert 0.1 < (moved != mask).flatten(1).any(1).float().mean() < 0.9


# Other shapes than images with a class each.


@pytest.mark.parametrize("make", [lambda: Shift(pixels=2), lambda: Flip(p=0.5), lambda: ShiftFlip(pixels=1)])
@pytest.mark.parametrize("masks", [1, 2])
def test_a_mask_moves_with_its_image(make, masks):
    x, _ = batch()
    y = x[:, 0].long() if masks == 1 else x.expand(N, masks, SIZE, SIZE).float()
    out, moved = make()(x, y, CLASSES)
    assert moved.dtype == y.dtype
    assert torch.equal(moved if masks == 1 else moved[:, 0], out[:, 0].to(y.dtype))
    assert not torch.equal(moved, y)


@pytest.mark.parametrize("shape", [(8,), (8, 40), (8, 2, 40), (8, 3, 4, 5, 6)])
def test_mixup_blends_any_rows(shape):
    x, y, torch_seed = torch.rand(shape), torch.arange(8) % CLASSES, 5
    torch.manual_seed(torch_seed)
    out, labels = Mixup()(x, y, CLASSES)
    torch.manual_seed(torch_seed)
    again, answers = Mixup()(x, x, CLASSES)
    assert out.shape == x.shape
    assert labels.shape == (8, CLASSES)
    assert torch.equal(out, again)
    torch.testing.assert_close(answers, again)  # a float target is blended as x is


@pytest.mark.parametrize("shape", [(50,), (4, 5, 6)])
def test_cutmix_pastes_a_stretch_or_a_box(shape):
    x = torch.arange(1.0, N + 1).reshape(N, 1, *[1] * len(shape)).expand(N, 2, *shape).clone()
    y = torch.arange(N) % CLASSES
    out, labels = Cutmix()(x, y, CLASSES)
    own = mixed_rows(labels, y)
    kept = (out == x)[:, 0].flatten(1).float().mean(1)
    changed = labels.max(1).values < 1
    torch.testing.assert_close(own[changed], kept[changed])
    assert torch.equal(out[:, 0], out[:, 1])
    assert changed.sum() > 10


IMAGE, TOKENS, CLASS = torch.rand(4, 3, 6, 6), torch.randint(0, 9, (4, 6)), torch.arange(4)


@pytest.mark.parametrize(
    ("option", "x", "y", "text"),
    [
        *[(option, torch.rand(4, 3, 6), CLASS, r"images \(N, C, H, W\), got \(4, 3, 6\)")
          for option in ("shift", "flip", "shift_flip", "erase", "trivial", "random_resized_crop", "color_jitter",
                         "rand_augment", "auto_augment", "aug_mix", "three_augment")],
        *[(option, IMAGE, CLASS, "uint8 in 0..255, and these are float32") for option in
          ("color_jitter", "rand_augment", "auto_augment", "aug_mix", "three_augment")],
        *[(option, torch.zeros(4, 4, 6, 6, dtype=torch.uint8), CLASS, "grey and RGB images, got 4 channels") for option
          in ("color_jitter", "rand_augment", "auto_augment", "aug_mix", "three_augment")],
        *[(option, IMAGE, torch.zeros(4, 7, 4), "away from a target") for option in
          ("shift", "flip", "shift_flip", "random_resized_crop")],
        *[(option, IMAGE, [{"boxes": CLASS}] * 4, "a target of list") for option in ("shift", "flip")],
        *[(option, IMAGE, torch.zeros(4, 6, 6).long(), "cannot change a target") for option in
          ("erase", "mixup", "cutmix", "trivial", "mixup_cutmix")],
        ("aug_mix", IMAGE.byte(), torch.zeros(4, 6, 6).long(), "cannot change a target"),
        *[(option, TOKENS, CLASS, "is tokens") for option in ("mixup", "cutmix", "mixup_cutmix")],
        ("mixup_cutmix", torch.rand(4, 6), CLASS, "augment.cutmix_alpha=0"),
        ("mixup_cutmix", IMAGE, TOKENS, "one class a row"),
        ("mixup", IMAGE, TOKENS, "one class a row"),
        ("cutmix", torch.rand(4, 6), CLASS, "augment=mixup"),
        ("cutmix", IMAGE, torch.rand(4, 3, 6, 6), "cannot change a target"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(option, x, y, text):
    with pytest.raises(InputError, match=text) as refused:
        MAKE[option]()(x, y, CLASSES)
    assert f"augment={option.removeprefix('shift_')}" in str(refused.value) or option == "shift_flip"
    assert "\n" not in str(refused.value)
