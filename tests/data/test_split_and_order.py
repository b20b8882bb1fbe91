"""Splits and orders: stratified, deterministic, every image once, the same for one process and for two."""

import pytest
import torch

from knep.data.digits import Digits
from knep.data.loaders import Batches, MemoryLoader
from knep.data.splits import stratified, subset
from knep.data.synthetic import Synthetic
from knep.errors import InputError


def labels():
    return torch.tensor([0] * 50 + [1] * 100 + [2] * 10)[
        torch.randperm(160, generator=torch.Generator().manual_seed(1))
    ]


def test_a_split_keeps_the_proportions():
    y = labels()
    stay, off = stratified(y, 0.2, seed=0)
    assert torch.bincount(y[off]).tolist() == [10, 20, 2]
    assert sorted([*stay.tolist(), *off.tolist()]) == list(range(160))
    assert torch.equal(off, stratified(y, 0.2, seed=0)[1])
    assert not torch.equal(off, stratified(y, 0.2, seed=1)[1])


def test_a_class_of_one_image_cannot_be_split():
    with pytest.raises(InputError, match="class 1"):
        stratified(torch.tensor([0, 0, 1]), 0.5, seed=0)


def test_a_subset_keeps_the_proportions():
    y = labels()
    assert torch.bincount(y[subset(y, 32, seed=0)]).tolist() == pytest.approx([10, 20, 2], abs=1)
    assert len(subset(y, None, seed=0)) == 160
    with pytest.raises(InputError, match="limit"):
        subset(y, 2, seed=0)


def test_the_split_has_a_seed_of_its_own():
    a, b, c = Digits(seed=0), Digits(seed=1), Digits(split_seed=1)
    for data in (a, b, c):
        data.prepare()
    assert torch.equal(a._splits["val"][0], b._splits["val"][0])
    assert not torch.equal(a._splits["val"][0], c._splits["val"][0])
    assert torch.equal(a._splits["test"][0], c._splits["test"][0])  # the test split is everybody's
    assert int(a._splits["train"][0].max()) == 255


def train_loader(images=103, rank=0, world=1, drop_last=True, epoch=0, seed=0):
    x = torch.arange(images).reshape(-1, 1, 1, 1)
    loader = MemoryLoader(x, torch.arange(images), Batches(images, 20, seed, drop_last, rank, world))
    loader.set_epoch(epoch)
    return loader


def seen(loader):
    return [y.tolist() for _, y in loader]


def test_an_order_is_a_function_of_seed_and_epoch():
    assert seen(train_loader(epoch=3)) == seen(train_loader(epoch=3))
    assert seen(train_loader(epoch=3)) != seen(train_loader(epoch=4))
    assert seen(train_loader(seed=1)) != seen(train_loader(seed=2))


@pytest.mark.parametrize("drop_last", [True, False])
def test_two_processes_see_what_one_sees(drop_last):
    alone = seen(train_loader(drop_last=drop_last, images=104))
    shares = zip(*(seen(train_loader(rank=r, world=2, drop_last=drop_last, images=104)) for r in (0, 1)), strict=True)
    assert [a + b for a, b in shares] == alone
    assert sum(map(len, alone)) == (100 if drop_last else 104)


def test_a_loader_goes_on_where_it_stopped():
    whole = seen(train_loader())
    loader = train_loader()
    it = iter(loader)
    first = [next(it)[1].tolist() for _ in range(2)]
    state = loader.state_dict()
    resumed = train_loader()
    resumed.load_state_dict(state)
    assert first + seen(resumed) == whole
    assert seen(resumed) == whole  # the next epoch is whole again
    it.close()
    assert seen(loader) == whole  # and so it is after one that a limit on batches cut short


@pytest.mark.parametrize("images", [1, 7, 39, 40, 41])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_image_is_evaluated_once(images, world):
    x, y = torch.arange(images).reshape(-1, 1, 1, 1), torch.arange(images)
    ranks = [list(MemoryLoader(x, y, Batches(images, 20, rank=r, world=world))) for r in range(world)]
    assert len({tuple(len(b[1]) for b in rank) for rank in ranks}) == 1  # equal shapes: nobody waits
    counted = sorted(int(k) for rank in ranks for _, labels in rank for k in labels if k >= 0)
    assert counted == list(range(images))


def test_synthetic_images_are_a_function_of_their_seed():
    def images(**hp):
        data = Synthetic(images=100, classes=4, image_size=12, channels=3, **hp)
        data.prepare()
        return torch.cat(list(data.train_images()))

    assert torch.equal(images(), images())
    assert not torch.equal(images(), images(split_seed=1))
    assert images().shape[1:] == (3, 12, 12)


@pytest.mark.parametrize(
    ("hp", "said"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"val_share": 1.5}, "val_share"),
        ({"limit": 0}, "limit"),
        ({"num_classes": 3}, "num_classes"),
        ({"batch_size": 10**6}, "larger than the training split"),
    ],
)
def test_bad_values_are_refused(hp, said):
    with pytest.raises(InputError, match=said):
        Digits(**hp).prepare()
