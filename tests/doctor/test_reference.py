"""What simple classifiers reach, against what is known."""

import time

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from knep.doctor.data.baseline_accuracy import reference
from knep.doctor.data.baselines import nearest, ridge, voted
from knep.doctor.data.label_noise import noise
from knep.utils.rng import generator
from tests.doctor.ward import digits, made, patient, without_relation


def test_neighbours_are_those_of_scikit_learn():
    x, y, v, _ = (t.flatten(1) if t.ndim == 4 else t for t in digits(500))
    theirs = KNeighborsClassifier(5).fit(x, y)
    near = nearest(x, v, 5)
    distance = (v[:, None] - x[near]).norm(dim=2)
    assert torch.allclose(distance, torch.from_numpy(theirs.kneighbors(v)[0]).float(), atol=1e-4)
    guess, share = voted(y, near)
    clear = share >= 0.6  # a tie is broken in different ways
    assert torch.equal(guess[clear], torch.from_numpy(theirs.predict(v))[clear])


def test_an_image_is_no_neighbour_of_its_own():
    x = torch.randn(50, 4, generator=generator(0))
    assert not (nearest(x, x, 5, torch.arange(50)) == torch.arange(50)[:, None]).any()


def test_ridge_solves_its_equations():
    a = torch.randn(300, 6, generator=generator(0))
    y = (a @ torch.randn(6, 3, generator=generator(1))).argmax(1)
    guess, own, held = ridge(a, y, a)
    assert float((guess == y).double().mean()) > 0.85
    assert int(held.sum()) == 60
    assert float((own == y[held]).double().mean()) > 0.75


def test_digits_are_learned():
    began = time.process_time()
    r = reference(patient(*digits(1397)), 1400)
    assert time.process_time() - began < 5  # about 0.2 s
    assert r.images == 1397
    assert min(r.knn, r.ridge, r.patches) > 0.94
    assert r.acc == max(r.knn, r.ridge, r.patches) > 0.97
    assert r.chance == pytest.approx(0.1, abs=0.02)
    assert r.in_train.acc > 0.95
    assert max(r.shifted.values()) < 0.1
    assert noise(r.train).share < 0.05


def test_it_is_the_same_each_time():
    a, b = (reference(patient(*digits(400))) for _ in range(2))
    assert (a.knn, a.ridge, a.patches, a.shifted) == (b.knn, b.ridge, b.patches, b.shifted)


def test_random_labels_are_at_chance():
    x, y, v, w = digits()
    r = reference(patient(x, without_relation(y, 1), v, without_relation(w, 1)))
    assert abs(r.on_val.lift) < 4
    assert r.in_train.lift < 5


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_share_of_random_labels_is_measured(share):
    x, y, v, w = digits(1397)
    assert noise(reference(patient(x, without_relation(y, share), v, w)).train).share == pytest.approx(share, abs=0.08)


def test_hard_images_are_not_taken_for_random_labels():
    n = noise(reference(patient(*made(1500, 5, 1.6), classes=5)).train)
    assert n.wrong > 0.1
    assert n.rise > 3 or n.even > 4


def test_a_renaming_is_found_on_images_that_did_not_choose_it():
    x, y, v, w = digits()
    r = reference(patient(x, y, v, (3 * w + 1) % 10))
    assert r.acc < 0.3
    assert r.renamed > 0.9


def test_nothing_to_learn_from():
    x, y, v, w = digits(200)
    assert reference(patient(x, y * 0, v, w)) is None
    assert reference(patient(x[:5], y[:5], v, w)) is None
    assert reference(patient(x, y, v[:0], w[:0])) is None
