"""Policies, crops and mixing against timm's, torchvision's and PIL's own code: parameters, pixels and labels."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as of_timm
from timm.data.mixup import Mixup as MixupOfTimm
from timm.data.mixup import rand_bbox
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2
from torchvision.transforms.autoaugment import AutoAugment as AutoAugmentOfTorchvision
from torchvision.transforms.autoaugment import AutoAugmentPolicy

from knep.recipes.augment import (
    AugMix,
    AutoAugment,
    ColorJitter,
    Erase,
    MixupCutmix,
    RandAugment,
    RandomResizedCrop,
    Repeats,
    ThreeAugment,
)
from knep.recipes.augment.crop import crop_boxes
from knep.recipes.augment.mixing import Draw, cutmix_box
from knep.recipes.augment.operations import NAMES, Drawn, perform
from knep.recipes.augment.policies import auto_augment_levels, rand_augment_levels

N, CLASSES = 48, 7


def images(n=N, size=24, channels=3, seed=0):
    """Smooth images with some noise, so that interpolation means something."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 5, 5, generator=g) * 255
    x = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (x + 6 * torch.randn(x.shape, generator=g)).clamp(0, 255).to(torch.uint8)


def same_distribution(a, b, names=""):
    """Two-sample Kolmogorov-Smirnov: the largest gap of both curves below its 0.1 % bound."""
    a, b = np.sort(np.asarray(a, dtype=float)), np.sort(np.asarray(b, dtype=float))
    grid = np.concatenate([a, b])
    gap = np.abs(np.searchsorted(a, grid, "right") / len(a) - np.searchsorted(b, grid, "right") / len(b)).max()
    assert gap < 1.95 * np.sqrt((len(a) + len(b)) / (len(a) * len(b))), (names, gap)


# Strengths and operations

OF_TIMM = {
    "auto_contrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert", "rotate": "Rotate",
    "posterize": "Posterize", "solarize": "Solarize", "solarize_add": "SolarizeAdd", "color": "Color",
    "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness", "shear_x": "ShearX",
    "shear_y": "ShearY", "translate_x": "TranslateXRel", "translate_y": "TranslateYRel",
}  # fmt: skip
SCALED = ("posterize", "solarize", "color", "contrast", "brightness", "sharpness")


@pytest.mark.parametrize("increasing", [False, True])
def test_strengths_of_rand_augment_are_timm_s(increasing, monkeypatch):
    levels = rand_augment_levels(increasing)
    known = of_timm._RAND_INCREASING_TRANSFORMS if increasing else of_timm._RAND_TRANSFORMS
    names = {name: OF_TIMM[name] + ("Increasing" if increasing and name in SCALED else "") for name in levels}
    assert sorted(names.values()) == sorted(known)
    for sign, draw in ((1.0, 0.2), (-1.0, 0.8)):
        monkeypatch.setattr(random, "random", lambda draw=draw: draw)
        for name, theirs in names.items():
            for magnitude in (0.0, 0.7, 1.0, 3.0, 5.5, 9.0, 10.0):
                level = of_timm.LEVEL_TO_ARG[theirs]
                want = level(magnitude, {}) if level else (0.0,)
                got = levels[name](torch.tensor([magnitude / 10]), torch.tensor([sign]))
                assert float(got) == pytest.approx(float(want[0]), abs=1e-4), (name, magnitude)


def test_strengths_and_tables_of_auto_augment_are_torchvision_s():
    size, levels = 32, auto_augment_levels()
    for policy in ("imagenet", "cifar10", "svhn"):
        theirs = AutoAugmentOfTorchvision(AutoAugmentPolicy(policy))
        space = theirs._augmentation_space(10, (size, size))
        made = AutoAugment(policy=policy)
        names = list(levels)
        for row, pair in enumerate(theirs.policies):
            for step, (name, p, bin_) in enumerate(pair):
                own = names[int(made._choice[row, step])]
                assert own.replace("_", "") == name.lower()
                assert float(made._probability[row, step]) == pytest.approx(p)
                magnitudes, _ = space[name]
                if bin_ is None:
                    continue
                got = float(levels[own](made._magnitude[row, step][None] / 9, torch.tensor([1.0])))
                want = float(magnitudes[bin_])
                want = {"solarize": want, "posterize": want}.get(own, want)
                got = got - 1 if own in ("color", "contrast", "brightness", "sharpness") else got
                got = got * size if own.startswith("translate") else got
                assert got == pytest.approx(want, abs=1e-4), (own, bin_)


STRENGTHS = {
    "auto_contrast": [0.0], "equalize": [0.0], "invert": [0.0], "posterize": [1, 3, 8], "solarize": [0, 100, 256],
    "solarize_add": [0, 40, 110], "color": [0.1, 0.7, 1.9], "contrast": [0.1, 0.7, 1.9], "brightness": [0.1, 0.7, 1.9],
    "sharpness": [0.1, 0.7, 1.9],
}  # fmt: skip


@pytest.mark.parametrize("name", STRENGTHS)
@pytest.mark.parametrize("channels", [1, 3])
def test_colour_operations_are_pil_s(name, channels):
    x = images(6, channels=channels)
    for strength in STRENGTHS[name]:
        drawn = Drawn(torch.full((6,), NAMES.index(name)), torch.full((6,), float(strength)))
        got, _ = perform(x, drawn, 0.0)
        args = () if name in ("auto_contrast", "equalize", "invert") else (strength,)
        for image, ours in zip(x, got, strict=True):
            pil = Image.fromarray(image.permute(1, 2, 0).numpy().squeeze())
            theirs = torch.from_numpy(np.array(of_timm.NAME_TO_OP[OF_TIMM[name]](pil, *args)))
            theirs = theirs[None] if channels == 1 else theirs.permute(2, 0, 1)
            assert (ours.int() - theirs.int()).abs().max() <= 1, (name, strength)


@pytest.mark.parametrize(
    ("name", "strength"),
    [("rotate", 17.0), ("rotate", -30.0), ("shear_x", 0.21), ("shear_y", -0.3), ("translate_x", 0.23),
     ("translate_y", -0.41)],
)  # fmt: skip
def test_moves_are_pil_s_with_bilinear_interpolation(name, strength):
    x = images(4)
    drawn = Drawn(torch.full((4,), NAMES.index(name)), torch.full((4,), strength))
    got, _ = perform(x, drawn, 128.0)
    for image, ours in zip(x, got, strict=True):
        pil = Image.fromarray(image.permute(1, 2, 0).numpy())
        how = {"resample": Image.Resampling.BILINEAR, "fillcolor": (128, 128, 128)}
        theirs = torch.from_numpy(np.array(of_timm.NAME_TO_OP[OF_TIMM[name]](pil, strength, **how))).permute(2, 0, 1)
        off = (ours.int() - theirs.int()).abs()
        assert (off <= 1).float().mean() > 0.99  # a pixel on the very border may be in for one and out for the other
        assert off.float().mean() < 0.7


def test_no_bits_are_black():
    """As in Pillow until 12, which refuses what timm draws at full strength."""
    x = images(2)
    assert not perform(x, Drawn(torch.full((2,), NAMES.index("posterize")), torch.zeros(2)), 0.0)[0].any()


def test_each_image_has_an_operation_of_its_own_and_a_mask_moves_along():
    x = images(3)
    mask = torch.zeros(3, 24, 24, dtype=torch.int64)
    mask[:, 4:9, 5:11] = 3
    drawn = Drawn(
        torch.tensor([-1, NAMES.index("invert"), NAMES.index("translate_x")]), torch.tensor([0.0, 0.0, 2 / 24])
    )
    got, moved = perform(x, drawn, 7.0, mask)
    assert torch.equal(got[0], x[0])
    assert torch.equal(got[1], 255 - x[1])
    assert torch.equal(got[2, :, :, :-2], x[2, :, :, 2:])
    assert (got[2, :, :, -2:] == 7).all()
    assert torch.equal(moved[:2], mask[:2])
    assert torch.equal(moved[2, :, :-2], mask[2, :, 2:])
    assert moved.dtype == mask.dtype


def test_rand_augment_draws_as_timm_does(monkeypatch):
    """Which operation, whether it is done, and how strongly, over many images: the same frequencies and curves."""
    seen = {name: [] for name in of_timm._RAND_INCREASING_TRANSFORMS}

    def watched(name):
        def operation(img, *args, **_):
            seen[name].append(float(args[0]) if args else 0.0)
            return img

        return operation

    monkeypatch.setattr(of_timm, "NAME_TO_OP", {name: watched(name) for name in of_timm.NAME_TO_OP})
    random.seed(0)
    np.random.seed(0)
    theirs = of_timm.rand_augment_transform("rand-m9-mstd0.5-inc1-n2", {"img_mean": (0, 0, 0)})
    count = 6000
    for _ in range(count):
        theirs(None)
    torch.manual_seed(0)
    steps = RandAugment(magnitude=9.0, mstd=0.5, n=2).drawn(count, torch.device("cpu"))
    which, strength = (torch.cat([getattr(s, key) for s in steps]) for key in ("which", "strength"))
    assert len(steps) == 2
    assert float((which < 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    for name, theirs_name in OF_TIMM.items():
        own = strength[which == NAMES.index(name)].numpy()
        their = seen[theirs_name + ("Increasing" if name in SCALED else "")]
        assert len(own) == pytest.approx(len(their), abs=5 * np.sqrt(2 * len(their)))
        same_distribution(own, their, name)


def test_a_spread_above_100_draws_magnitudes_evenly():
    (step,) = RandAugment(n=1, magnitude=6.0, mstd=101.0, p=1.0).drawn(20000, torch.device("cpu"))
    angles = step.strength[step.which == NAMES.index("rotate")].abs().numpy()
    same_distribution(angles, np.random.default_rng(0).uniform(0, 18, 5000))


def test_auto_augment_draws_pairs_of_its_table():
    made = AutoAugment(policy="svhn")
    torch.manual_seed(0)
    first, second = made.drawn(20000, torch.device("cpu"))
    done = (first.which >= 0).float().mean(), (second.which >= 0).float().mean()
    want = made._probability.mean(0)
    assert float(done[0]) == pytest.approx(float(want[0]), abs=0.02)
    assert float(done[1]) == pytest.approx(float(want[1]), abs=0.02)
    turned = first.strength[first.which == NAMES.index("shear_x")]
    assert float((turned < 0).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_aug_mix_is_a_blend_of_its_chains(monkeypatch):
    x, y = images(8), torch.arange(8) % CLASSES
    made = AugMix(width=2, depth=1)
    mixture, m = torch.rand(2, 8), torch.rand(8)
    mixture = mixture / mixture.sum(0)
    chains = [[Drawn(torch.full((8,), NAMES.index(name)), torch.zeros(8))] for name in ("invert", "equalize")]
    monkeypatch.setattr(made, "weights", lambda n, device: (mixture, m))
    taken = iter(chains)
    monkeypatch.setattr(made, "drawn", lambda n, device: next(taken))
    out, labels = made(x, y, CLASSES)
    inverted, equal = 255 - x.double(), perform(x, chains[1][0], 0.0)[0].double()
    w, m = mixture.double()[:, :, None, None, None], m.double()[:, None, None, None]
    want = (1 - m) * x + m * (w[0] * inverted + w[1] * equal)
    assert (out.double() - want).abs().max() <= 0.51
    assert labels is y


def test_aug_mix_draws_weights_and_depths_as_timm_does():
    torch.manual_seed(1)
    made, count = AugMix(), 20000
    mixture, m = made.weights(count, torch.device("cpu"))
    r = np.random.default_rng(0)
    torch.testing.assert_close(mixture.sum(0), torch.ones(count))
    same_distribution(mixture[0], r.dirichlet([1.0] * 3, count)[:, 0])
    same_distribution(m, r.beta(1.0, 1.0, count))
    steps = made.drawn(count, torch.device("cpu"))
    deep = [float((s.which >= 0).float().mean()) for s in steps]
    assert deep == pytest.approx([1, 2 / 3, 1 / 3], abs=0.02)
    own = {NAMES[i] for s in steps for i in s.which.unique().tolist() if i >= 0}
    theirs = {n.removesuffix("Increasing") for n in of_timm._AUGMIX_TRANSFORMS}
    assert {OF_TIMM[name] for name in own} == theirs
    assert max(float(s.strength[s.which == NAMES.index("rotate")].abs().max()) for s in steps) <= 9  # magnitude 3


def test_three_augment_is_grey_or_solarized_or_blurred():
    x = images(300, size=16)
    torch.manual_seed(0)
    made = ThreeAugment()
    out, _ = made(x, torch.zeros(300, dtype=torch.int64), CLASSES)
    torch.manual_seed(0)
    drawn = made.drawn(300, torch.device("cpu"))
    counts = [int((drawn.which == NAMES.index(name)).sum()) for name in ("gray", "solarize", "blur")]
    assert sum(counts) == 300
    assert min(counts) > 70
    for image, changed, index, sigma in zip(x, out, drawn.which, drawn.strength, strict=True):
        name = NAMES[int(index)]
        if name == "gray":
            pil = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")
            assert (changed.int() - torch.from_numpy(np.array(pil)).int()).abs().max() <= 1
        elif name == "solarize":
            assert torch.equal(changed, torch.where(image >= 128, 255 - image, image))
        else:
            assert 0.1 <= float(sigma) <= 2
            reach = int(np.ceil(4 * float(sigma)))
            padded = np.pad(image.double().numpy(), ((0, 0), (reach, reach), (reach, reach)), mode="edge")
            tap = np.exp(-0.5 * (np.arange(-reach, reach + 1) / float(sigma)) ** 2)
            tap /= tap.sum()
            for axis in (1, 2):
                padded = np.apply_along_axis(lambda line, tap=tap: np.convolve(line, tap, mode="valid"), axis, padded)
            assert np.abs(changed.numpy() - padded).max() <= 0.51


# Crops and colours


def test_boxes_of_crops_are_drawn_as_torchvision_s():
    height, width, scale, ratio, count = 40, 28, (0.08, 1.0), (3 / 4, 4 / 3), 4000
    torch.manual_seed(0)
    image = torch.zeros(1, height, width)
    theirs = [v2.RandomResizedCrop(8, scale=scale, ratio=ratio).make_params([image]) for _ in range(count)]
    own = crop_boxes(count, height, width, scale, ratio, torch.device("cpu"))
    for key, ours in zip(("top", "left", "height", "width"), own, strict=True):
        same_distribution(ours, [p[key] for p in theirs], key)


def test_a_box_that_never_fits_is_the_middle():
    top, left, h, w = crop_boxes(5, 30, 10, (1.0, 1.0), (2.0, 3.0), torch.device("cpu"))
    want = v2.RandomResizedCrop(8, scale=(1.0, 1.0), ratio=(2.0, 3.0)).make_params([torch.zeros(1, 30, 10)])
    assert [int(v[0]) for v in (top, left, h, w)] == [want[k] for k in ("top", "left", "height", "width")]


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [None, 12, 40])
def test_crops_are_resampled_as_torchvision_does(kind, size):
    x = images(12).double()
    torch.manual_seed(4)
    out, _ = RandomResizedCrop(size=size, interpolation=kind)(x.float(), torch.zeros(12, dtype=torch.int64), 3)
    torch.manual_seed(4)
    boxes = crop_boxes(12, 24, 24, (0.08, 1.0), (3 / 4, 4 / 3), torch.device("cpu"))
    how = {"interpolation": v2.InterpolationMode(kind), "antialias": True}
    for i, (t, le, h, w) in enumerate(zip(*(b.int().tolist() for b in boxes), strict=True)):
        want = v2.functional.resized_crop(x[i].float(), t, le, h, w, [size or 24] * 2, **how)
        torch.testing.assert_close(out[i], want, rtol=1e-4, atol=2e-3)
    torch.manual_seed(4)
    whole, _ = RandomResizedCrop(size=size, interpolation=kind)(x.to(torch.uint8), torch.zeros(12).long(), 3)
    assert (whole.float() - out.clamp(0, 255)).abs().max() <= 0.51


def test_a_mask_is_cropped_with_its_image_by_nearest_pixels():
    x = images(6, channels=1)
    mask = x[:, 0].long() // 64
    torch.manual_seed(2)
    _, moved = RandomResizedCrop(size=16)(x, mask, 4)
    torch.manual_seed(2)
    boxes = crop_boxes(6, 24, 24, (0.08, 1.0), (3 / 4, 4 / 3), torch.device("cpu"))
    for i, (t, le, h, w) in enumerate(zip(*(b.int().tolist() for b in boxes), strict=True)):
        cut = mask[i, t : t + h, le : le + w][None]
        want = v2.functional.resize(cut, [16, 16], interpolation=v2.InterpolationMode.NEAREST)
        assert torch.equal(moved[i], want[0])


def test_color_jitter_draws_as_torchvision_does_and_does_what_it_drew():
    torch.manual_seed(0)
    made, count = ColorJitter(brightness=0.3, contrast=0.4, saturation=2.0, hue=0.1), 4000
    steps = made.drawn(count, torch.device("cpu"))
    transform = v2.ColorJitter(brightness=0.3, contrast=0.4, saturation=2.0, hue=0.1)
    theirs = [transform.make_params([]) for _ in range(count)]
    which, strength = torch.stack([s.which for s in steps]), torch.stack([s.strength for s in steps])
    for name, key in (("brightness", "brightness"), ("contrast", "contrast"), ("color", "saturation"), ("hue", "hue")):
        ours = strength[which == NAMES.index(name)]
        assert len(ours) == count
        same_distribution(ours, [p[f"{key}_factor"] for p in theirs], name)
        first = (which[0] == NAMES.index(name)).float().mean()
        assert float(first) == pytest.approx(0.25, abs=0.03)
    x = images(9)
    torch.manual_seed(3)
    out, _ = made(x, torch.zeros(9).long(), 2)
    torch.manual_seed(3)
    steps = made.drawn(9, torch.device("cpu"))
    by_name = {"brightness": v2.functional.adjust_brightness, "contrast": v2.functional.adjust_contrast,
               "color": v2.functional.adjust_saturation, "hue": v2.functional.adjust_hue}  # fmt: skip
    for i in range(9):
        want = x[i].float() / 255
        for s in steps:
            want = by_name[NAMES[int(s.which[i])]](want, float(s.strength[i]))
        off = (out[i].float() / 255 - want).abs()
        assert off.mean() < 0.02, i
        assert (off < 0.05).float().mean() > 0.97


# Mixing


def drawn_by_timm(monkeypatch, mode, share, cuts, rows, columns):
    """timm's Mixup with the draws given instead of its own."""
    mixup = MixupOfTimm(
        mixup_alpha=0.8, cutmix_alpha=1.0, mode=mode, label_smoothing=0.1, num_classes=CLASSES, switch_prob=0.5
    )
    middles = iter(v for pair in zip(rows, columns, strict=True) for v in pair)
    monkeypatch.setattr(np.random, "randint", lambda low, high, size=None: next(middles))
    monkeypatch.setattr(mixup, "_params_per_batch", lambda: (float(share[0]), bool(cuts[0])))
    monkeypatch.setattr(mixup, "_params_per_elem", lambda n: (share.numpy().copy()[:n], cuts.numpy()[:n]))
    return mixup


@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
@pytest.mark.parametrize("seed", range(6))
def test_images_and_labels_are_mixed_as_timm_mixes_them(mode, seed, monkeypatch):
    torch.manual_seed(seed)
    x, y = torch.rand(10, 3, 12, 9) * 255, torch.randint(0, CLASSES, (10,))
    made = MixupCutmix(mixup_alpha=0.8, cutmix_alpha=1.0, mode=mode, smoothing=0.1)
    drawn = made.draw(x)
    cuts, share = drawn.cuts, drawn.share
    used = [i for i in range({"batch": 1, "elem": 10, "pair": 5}[mode]) if cuts[i] and share[i] != 1]
    rows, columns = ([int(v[i]) for i in used] for v in (drawn.rows, drawn.columns))
    theirs = drawn_by_timm(monkeypatch, mode, share, cuts, rows, columns)
    want_x, want_y = theirs(x.clone(), y)
    got_x, got_y = made.mixed(x, y, drawn, CLASSES)
    torch.testing.assert_close(got_x, want_x.to(got_x.dtype), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(got_y, want_y.to(got_y.dtype), rtol=0, atol=1e-6)


def test_several_labels_are_mixed_and_smoothed_as_timm_does():
    y = torch.randint(0, 2, (8, CLASSES)).float()
    drawn = Draw(torch.full((8,), 0.3), torch.zeros(8, dtype=torch.bool), torch.zeros(8), torch.zeros(8))
    _, got = MixupCutmix(smoothing=0.1).mixed(torch.rand(8, 1, 4, 4), y, drawn, CLASSES)
    from timm.data.mixup import mixup_target

    torch.testing.assert_close(got, mixup_target(y, CLASSES, 0.3, 0.1, multi_label=True), rtol=0, atol=1e-6)


def test_the_box_of_cutmix_is_timm_s(monkeypatch):
    r = np.random.default_rng(0)
    for _ in range(300):
        share, row, column = r.uniform(), int(r.integers(0, 31)), int(r.integers(0, 22))
        middles = iter((row, column))
        monkeypatch.setattr(np.random, "randint", lambda low, high, size=None, m=middles: next(m))
        top, bottom, left, right = rand_bbox((3, 31, 22), share)
        of = [torch.tensor([v], dtype=torch.float64) for v in (share, row, column)]
        starts, sides = cutmix_box(*of, 31, 22)
        assert [int(v) for v in (*starts, *sides)] == [top, left, bottom - top, right - left]


@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
def test_shares_and_kinds_are_drawn_as_timm_draws_them(mode):
    settings = {"mixup_alpha": 0.3, "cutmix_alpha": 1.0, "prob": 0.8, "switch_prob": 0.4, "mode": mode}
    made, theirs = MixupCutmix(**settings), MixupOfTimm(**settings, num_classes=CLASSES)
    torch.manual_seed(0)
    np.random.seed(0)
    if mode == "batch":
        want = [theirs._params_per_batch() for _ in range(2500)]
        shares, kinds = zip(*want, strict=True)
        draws = [made.draw(torch.zeros(4, 1, 20, 30)) for _ in range(2500)]
        own = [(float(d.share[0]), bool(d.cuts[0])) for d in draws]
        assert all(bool((d.share == d.share[0]).all()) for d in draws[:20])
        rows = [float(d.rows[0]) for d in draws]
    else:
        count = 6000
        shares, kinds = theirs._params_per_elem(count)
        drawn = made.draw(torch.zeros(count if mode == "elem" else 2 * count, 1, 20, 30))
        own = list(zip(drawn.share[:count].tolist(), drawn.cuts[:count].tolist(), strict=True))
        rows = drawn.rows[:count].tolist()
        if mode == "pair":
            assert torch.equal(drawn.share, drawn.share.flip(0))
    mixed = [s for s, _ in own if s != 1]
    assert len(mixed) / len(own) == pytest.approx(0.8, abs=0.03)
    same_distribution([s for s, _ in own], shares, mode)
    pairs = zip(shares, kinds, strict=True)
    same_distribution([s for s, cut in own if cut and s != 1], [s for s, cut in pairs if cut and s != 1])
    same_distribution(rows, np.random.default_rng(1).integers(0, 20, 6000))


def test_mixing_that_has_ended_still_smooths_as_timm_does():
    x, y = images(4), torch.arange(4)
    made = MixupCutmix(smoothing=0.1, off_epoch=2)
    made.epoch = 2
    out, labels = made(x, y, CLASSES)
    assert out is x
    torch.testing.assert_close(labels, torch.nn.functional.one_hot(y, CLASSES) * 0.9 + 0.1 / CLASSES)
    plain = MixupCutmix(off_epoch=2)
    plain.epoch = 5
    assert plain(x, y, CLASSES)[1] is y


# Erasing and repeats


@pytest.mark.parametrize("count", [1, 3])
def test_rectangles_are_drawn_as_timm_s(count):
    n, size = 1500, 20
    random.seed(0)
    torch.manual_seed(0)
    theirs = RandomErasing(probability=0.6, mode="const", max_count=count, device="cpu", max_area=0.33)
    want = (theirs(torch.ones(n, 1, size, size)) == 0).float().mean((1, 2, 3))
    x = torch.full((n, 1, size, size), 100.0)
    x[:, :, 0, 0] += torch.rand(n)[:, None]  # so that the mean is no pixel's value
    out, _ = Erase(p=0.6, count=count, mode="const")(x, torch.zeros(n).long(), 2)
    same_distribution((out == x.mean()).float().mean((1, 2, 3)), want)


def test_erased_pixels_are_filled_as_timm_fills_standardised_ones():
    x, y = images(200, size=20), torch.zeros(200, dtype=torch.int64)
    deviation, mean = torch.std_mean(x.float(), (0, 2, 3), correction=0)
    for mode in ("const", "rand", "pixel"):
        torch.manual_seed(0)
        out, _ = Erase(p=1.0, smallest=0.2, largest=0.3, mode=mode)(x, y, 2)
        assert out.dtype == torch.float32
        hidden = (out != x).any(1)
        fills = ((out - mean[:, None, None]) / deviation[:, None, None]).movedim(1, -1)[hidden]
        if mode == "const":
            assert fills.abs().max() < 1e-4
            continue
        shades = [len(o[:, h].T.unique(dim=0)) for o, h in zip(out, hidden, strict=True)]
        assert (max(shades) == 1) == (mode == "rand")
        if mode == "pixel":
            same_distribution(fills.flatten()[:4000], np.random.default_rng(0).normal(size=4000))


def test_repeats_are_those_of_timm_s_sampler_on_one_process():
    from timm.data.distributed_sampler import RepeatAugSampler

    for times in (1, 2, 3, 2.5):
        sampler = RepeatAugSampler(
            range(12), num_replicas=1, rank=0, shuffle=False, num_repeats=times, selected_round=0
        )
        x, y = torch.arange(12.0).reshape(12, 1, 1, 1), torch.arange(12)
        out, labels = Repeats(times=times)(x, y, 12)
        assert labels.tolist() == list(sampler)
        assert out.flatten().tolist() == labels.tolist()
