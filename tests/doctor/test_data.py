"""Each disease of the data at several severities, and sound data that come near it."""

import pytest
import torch
from torch import nn

from knep.config.compose import compose_config
from knep.doctor.data.examine import Data
from knep.doctor.subject.setup import from_config, of
from knep.doctor.trials.suspects import broken_images
from knep.errors import InputError
from knep.utils.rng import generator
from tests.doctor.ward import batched, digits, made, net, patient, without_relation


def named(p):
    """Disease -> certain."""
    return {f.disease: f.certain for f in Data(p).findings()}


def first(p):
    findings = Data(p).findings()
    return (findings[0].disease, findings[0].certain) if findings else None


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


SOUND = {
    "digits": lambda: patient(*digits()),
    "batches of 2": lambda: patient(*digits(400), size=2),
    "batches of 512": lambda: patient(*digits(), size=512),
    "batches of 1": lambda: patient(*digits(300), size=1),
    "few digits": lambda: patient(*digits(100)),
    "symmetric": lambda: patient(*(t * 2 - 1 if t.is_floating_point() else t for t in digits())),
    "standardised": lambda: patient(*((t - 0.305) / 0.376 if t.is_floating_point() else t for t in digits())),
    "gray in three channels": lambda: patient(*(t.repeat(1, 3, 1, 1) if t.ndim == 4 else t for t in digits())),
    "black borders": lambda: patient(*(nn.functional.pad(t, (4,) * 4) if t.ndim == 4 else t for t in digits())),
    "two classes": lambda: patient(*made(400, 2, 0.15), classes=2),
    "noise": lambda: patient(*made(600, 10, 0.3)),
    "much noise": lambda: patient(*made(600, 5, 0.8), classes=5),
    "more outputs than classes": lambda: patient(*made(600, 5, 0.3), classes=1000),
    "a hundred classes": lambda: patient(*made(1500, 100, 0.15), classes=100),
    "three to one": lambda: patient(*thinned(3)),
    "flat vectors": lambda: patient(*(t.flatten(1) if t.ndim == 4 else t for t in digits())),
    "three channels": lambda: patient(*made(600, 10, 0.2, channels=3)),
}


def thinned(ratio):
    """Digits of which classes 0 to 4 have so many times fewer training images."""
    x, y, v, w = digits()
    keep = (y >= 5) | (torch.arange(len(y)) % ratio == 0)
    return x[keep], y[keep], v, w


@pytest.mark.parametrize("name", SOUND)
def test_sound_data_have_no_finding(name):
    assert Data(SOUND[name]()).findings() == []


@pytest.mark.parametrize("scaling", ["unit", "symmetric", "standardize"])
def test_a_sound_config_has_no_finding(scaling):
    lines = ["data=synthetic", "model=mlp", "data.images=400", "data.image_size=8", f"scaling={scaling}"]
    assert Data(from_config(compose_config(lines).run, lines)).findings() == []


def test_a_config_without_scaling_is_told():
    lines = ["data=synthetic", "model=mlp", "data.images=400", "data.image_size=8", "scaling=none", "norm=none"]
    found = Data(from_config(compose_config(lines).run, lines)).findings()
    assert [(f.disease, f.certain) for f in found] == [("unscaled_inputs", True)]


FAR = [(255, 0, True), (255, 1000, True), (1e-3, 0, True), (8, 0, False), (1, 5, False), (0.05, 0, False)]


@pytest.mark.parametrize(("factor", "offset", "certain"), FAR)
def test_scales_far_from_one(factor, offset, certain):
    x, y, v, w = digits()
    assert named(patient(x * factor + offset, y, v * factor + offset, w)) == {"unscaled_inputs": certain}


def test_a_model_that_scales_by_itself_is_seen_through():
    class Divides(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x / 255)

    x, y, v, w = digits()
    assert named(patient(x * 255, y, v * 255, w, model=Divides(net(x, 10)))) == {}


@pytest.mark.parametrize("stem", [[nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3)], [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)]])
def test_a_model_that_begins_with_a_norm_is_only_suspected(stem):
    x, y, v, w = digits()
    model = nn.Sequential(*stem, nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    assert named(patient(x * 255, y, v * 255, w, model=model)) == {"unscaled_inputs": False}


def test_one_channel_of_another_size():
    x, y, v, w = made(300, 5, 0.2, channels=3)
    wide = torch.tensor([1.0, 1.0, 30.0]).reshape(3, 1, 1)
    assert named(patient(x * wide, y, v * wide, w, classes=5)) == {"unscaled_inputs": False}


@pytest.mark.parametrize("split", ["training", "validation"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_told_by_place(split, value):
    x, y, v, w = (t.clone() for t in digits())
    (x if split == "training" else v)[130, 0, 3, 3] = value
    (finding,) = Data(patient(x, y, v, w)).findings()
    place = "batch 2 image 2" if split == "training" else "batch 0 image 130"
    assert finding.disease == "non_finite_inputs"
    assert split in finding.evidence
    assert place in finding.evidence


def test_nothing_but_nan():
    x, y, v, w = digits(100)
    assert named(patient(x * float("nan"), y, v, w)) == {"non_finite_inputs": True}


@pytest.mark.parametrize("noise", [0, 1e-7, 1e-4])
def test_images_that_are_all_the_same(noise):
    x, y, _, w = digits()
    same = x[:1] + noise * torch.randn(x.shape, generator=generator(0))
    found = named(patient(same, y, same[:300], w))
    assert found["constant_inputs"] is True
    assert "unscaled_inputs" not in found


def test_blank_images():
    x, y, v, w = digits()
    blank = torch.where((torch.arange(len(x)) % 3 > 0).reshape(-1, 1, 1, 1), 0, x)
    assert first(patient(blank, y, v, w)) == ("constant_inputs", True)


def test_constant_labels():
    x, y, v, w = digits()
    assert named(patient(x, y * 0 + 3, v, w))["constant_labels"] is True
    assert first(patient(x, y * 0 + 3, v, w * 0 + 3)) == ("constant_labels", True)


@pytest.mark.parametrize("wrong", [10, -7, 2**40])
@pytest.mark.parametrize("split", [1, 3])
def test_labels_that_are_no_output(wrong, split):
    data = [t.clone() for t in digits()]
    data[split][5] = wrong
    (finding,) = Data(patient(*data)).findings()
    assert (finding.disease, finding.certain, finding.gravity) == ("labels_out_of_range", True, 1.0)
    assert str(wrong) in finding.evidence


def test_the_label_that_cross_entropy_ignores_is_no_finding():
    x, y, v, w = (t.clone() for t in digits())
    y[::50] = -100
    assert named(patient(x, y, v, w)) == {}


def test_labels_from_one():
    x, y, v, w = digits()
    assert first(patient(x, y + 1, v, w + 1)) == ("labels_off_by_one", True)
    assert first(patient(x, y + 1, v, w)) == ("labels_off_by_one", True)


@pytest.mark.parametrize("step", [-1, 1])
@pytest.mark.parametrize("classes", [3, 10])
def test_validation_labels_shifted_against_training(step, classes):
    x, y, v, w = made(600, classes, 0.2)
    (finding,) = Data(patient(x, y, v, (w + step) % classes, classes)).findings()
    assert (finding.disease, finding.certain) == ("labels_off_by_one", True)
    assert f"one {'more' if step > 0 else 'less'}" in finding.mend


@pytest.mark.parametrize(("share", "certain"), [(0.3, None), (0.5, True), (0.8, True), (1.0, True)])
def test_labels_without_relation(share, certain):
    x, y, v, w = digits()
    found = named(patient(x, without_relation(y, share), v, without_relation(w, share)))
    assert set(found) == {"unrelated_labels"}
    assert certain is None or found["unrelated_labels"] is certain


def test_labels_of_one_split_without_relation():
    x, y, v, w = digits()
    assert named(patient(x, without_relation(y, 1), v, w)) == {"unrelated_labels": True}
    assert named(patient(x, y, v, without_relation(w, 1))) == {"unrelated_labels": True}


def test_classes_numbered_in_another_order():
    x, y, v, w = digits()
    (finding,) = Data(patient(x, y, v, torch.tensor([3, 9, 0, 7, 1, 8, 2, 6, 5, 4])[w])).findings()
    assert (finding.disease, finding.certain) == ("unrelated_labels", True)
    assert "list of class names" in finding.mend


@pytest.mark.parametrize(("ratio", "certain"), [(15, False), (100, None)])
def test_imbalance(ratio, certain):
    found = named(patient(*thinned(ratio)))
    assert set(found) == {"class_imbalance"}
    assert certain is None or found["class_imbalance"] is certain


def test_a_class_that_training_never_shows():
    x, y, v, w = digits()
    (finding,) = Data(patient(x[y != 4], y[y != 4], v, w)).findings()
    assert (finding.disease, finding.certain) == ("class_imbalance", True)
    assert "class 4 never occurs" in finding.evidence


@pytest.mark.parametrize("size", [1, 2, 16, 64, 300])
def test_sorted_batches(size):
    x, y, v, w = digits()
    order = y.argsort(stable=True)
    assert first(patient(x[order], y[order], v, w, size=size)) == ("sorted_batches", True)


def test_batches_of_few_classes_are_sorted_too():
    x, y, v, w = digits()
    order = ((y // 3) * 10_000 + torch.arange(len(y))).argsort()
    assert first(patient(x[order], y[order], v, w)) == ("sorted_batches", True)


def test_mildly_sorted_batches_are_suspected():
    x, y, v, w = digits()
    order = (y.double() + 6 * torch.randn(len(y), generator=generator(3))).argsort()
    assert named(patient(x[order], y[order], v, w)) == {"sorted_batches": False}


def test_the_first_batches_of_a_long_sorted_loader():
    x, y, v, w = digits()
    order = y.argsort(stable=True)

    class Long:
        def __iter__(self):
            return iter(batched(x[order], y[order], 1))

        def __len__(self):
            return 1200

    seen = of(net(x, 10), Long(), batched(v, w), optimizer=sgd)
    assert len(seen.train) < 1200
    assert first(seen)[0] == "sorted_batches"
    assert "class_imbalance" not in named(seen)


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_validation_images_that_are_training_images(share):
    x, y, v, w = (t.clone() for t in digits())
    count = int(share * len(v))
    v[:count], w[:count] = x[100 : 100 + count], y[100 : 100 + count]
    assert named(patient(x, y, v, w)) == {"leaked_validation": True}


@pytest.mark.parametrize("change", ["noise", "brighter"])
def test_copies_that_were_changed_a_little(change):
    x, y, v, w = (t.clone() for t in digits())
    copied = x[100:200]
    noise = 0.03 * torch.randn(copied.shape, generator=generator(1))
    v[:100], w[:100] = copied + noise if change == "noise" else 0.9 * copied + 0.05, y[100:200]
    assert named(patient(x, y, v, w)) == {"leaked_validation": True}


UNLIKE = {
    "inverted": lambda v: 1 - v,
    "divided twice": lambda v: v / 255,
    "never divided": lambda v: v * 255,
    "symmetric": lambda v: 2 * v - 1,
    "transposed": lambda v: v.transpose(2, 3),
    "upside down": lambda v: v.flip(2),
    "brighter by far": lambda v: v + 0.5,
}


@pytest.mark.parametrize("name", UNLIKE)
def test_validation_unlike_training(name):
    x, y, v, w = digits()
    assert named(patient(x, y, UNLIKE[name](v), w)) == {"validation_scaled_differently": True}


def test_channels_in_another_order():
    x, y, v, w = made(600, 10, 0.2, channels=3)
    assert named(patient(x, y, v.flip(1), w)) == {"validation_scaled_differently": True}


def test_inverted_around_the_mean_is_no_matter_of_labels():
    x, y, v, w = made(600, 10, 0.2)
    assert named(patient(x, y, 1 - v, w)) == {"validation_scaled_differently": True}


def test_a_slight_difference_of_scale_is_suspected():
    x, y, v, w = digits()
    assert named(patient(x, y, 0.75 * v, w)) == {"validation_scaled_differently": False}


def test_an_augmented_training_loader_is_no_difference():
    x, y, v, w = (t.clone() for t in digits())
    draw = generator(5)
    for i in range(len(x)):
        dx, dy = (int(n) for n in torch.randint(-1, 2, (2,), generator=draw))
        x[i] = torch.roll(x[i], (dy, dx), (1, 2))
        top, left = (int(n) for n in torch.randint(0, 6, (2,), generator=draw))
        x[i, :, top : top + 2, left : left + 2] = 0
    assert not any(Data(patient(x, y, v, w)).findings())


def test_validation_given_class_by_class_is_sound():
    x, y, v, w = digits()
    order = w.argsort(stable=True)[:120]
    assert named(patient(x, y, v[order], w[order])) == {}


def test_wild_images_are_told_by_their_batch_where_they_are_few():
    x, y, v, w = (t.clone() for t in digits())
    assert broken_images(patient(x, y, v, w)) == ""
    x[200] *= 500
    assert "1 of 19 batches" in broken_images(patient(x, y, v, w))
    assert "(batches 3)" in broken_images(patient(x, y, v, w))
    x[::64] *= 500  # one in each batch
    assert "19 of 19 batches" in broken_images(patient(x, y, v, w))
    x[::5] *= 500  # then it is how the data are
    assert broken_images(patient(x, y, v, w)) == ""


ODD = {
    "one image per class": lambda: patient(*made(10, 10, 0.1)),
    "one image": lambda: patient(*made(1, 1, 0.1), classes=10),
    "two images": lambda: patient(*made(2, 2, 0.1), classes=2),
    "no validation": lambda: patient(*digits(200)[:2], torch.zeros(0, 1, 8, 8), torch.zeros(0).long()),
    "a thousand classes": lambda: patient(*made(1500, 1000, 0.1), classes=1000, size=1),
    "zeros": lambda: patient(*(t * 0 for t in digits(100))),
    "one pixel": lambda: patient(*made(100, 2, 0.1, size=1), classes=2),
    "a row of pixels": lambda: patient(*(t[:, :, :1] if t.ndim == 4 else t for t in made(100, 2, 0.1)), classes=2),
    "videos": lambda: patient(*(t[:, :, None].repeat(1, 1, 2, 1, 1) if t.ndim == 4 else t for t in digits(200))),
    "other sizes in validation": lambda: patient(*digits(200)[:2], *made(200, 10, 0.1)[2:]),
}


def test_a_net_of_one_score_is_refused():
    with pytest.raises(InputError, match="gives one score"):
        patient(*made(100, 1, 0.1), classes=1)


@pytest.mark.parametrize("name", ODD)
def test_odd_data_are_survived(name):
    p = ODD[name]()
    before = [p.clone() for p in p.model.state_dict().values()]
    findings, seen = Data(p).findings(), Data(p).seen()
    assert all(0 <= f.gravity <= 1 and f.evidence for f in findings)
    assert seen["labels"]["images"] == sum(len(y) for _, y in p.train)
    assert all(torch.equal(a, b) for a, b in zip(before, p.model.state_dict().values(), strict=True))


def test_tokens_have_no_scale():
    x = torch.randint(500, (200, 7), generator=generator(2))
    y = (x[:, 0] > 250).long()
    model = nn.Sequential(nn.Embedding(500, 8), nn.Flatten(), nn.Linear(56, 2))
    assert "unscaled_inputs" not in named(patient(x, y, x[:50], y[:50], model=model))


def test_a_model_that_fails_is_told_in_one_line():
    x, y, v, w = digits(100)
    p = patient(x, y, v, w)
    broken = nn.Sequential(nn.Flatten(), nn.Linear(5, 10))
    with pytest.raises(InputError, match=r"Linear.*takes.*5"):
        Data(of(broken, p.train, p.val, optimizer=sgd, num_classes=10)).findings()


def test_the_numbers_are_plain_and_the_same_each_time():
    import json

    p = patient(*digits())
    seen = Data(p).seen()
    assert json.loads(json.dumps(seen)) == json.loads(json.dumps(Data(p).seen()))
    assert set(seen) == {"inputs", "labels", "twins", "drift", "reference"}
    assert Data(p).whole
