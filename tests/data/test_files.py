"""The real formats, read from small files written here."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision.io import write_jpeg, write_png

from knep.data.cifar import Cifar10, Cifar100
from knep.data.image_folder import ImageFolder
from knep.data.mnist import FashionMnist, Mnist
from knep.data.svhn import Svhn
from knep.errors import InputError
from tests.exhaustive import formats

rng = np.random.default_rng(0)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(("kind", "place"), [(Mnist, "."), (Mnist, "MNIST/raw"), (FashionMnist, "FashionMNIST/raw")])
def test_idx(kind, place, suffix, tmp_path):
    formats.mnist(tmp_path / place, 60, suffix)
    data = kind(root=str(tmp_path), batch_size=10)
    data.prepare()
    assert (data.channels, data.image_size, data.num_classes) == (1, 28, 10)
    assert data.sizes == {"train": 50, "val": 10, "test": 20}
    file = tmp_path / place / f"t10k-images-idx3-ubyte{suffix}"
    content = gzip.decompress(file.read_bytes()) if suffix else file.read_bytes()
    x = torch.cat([x for x, _ in data.test_dataloader()])
    assert x.numpy().tobytes() == content[16:]


def test_idx_is_what_torchvision_reads(tmp_path):
    formats.mnist(tmp_path / "MNIST" / "raw", 60)
    reference = datasets.MNIST(str(tmp_path), train=False)
    data = Mnist(root=str(tmp_path), batch_size=10)
    data.prepare()
    x, y = next(iter(data.test_dataloader()))
    assert torch.equal(x[:, 0], reference.data)
    assert torch.equal(y, reference.targets)


def test_fashion_mnist_of_the_system():
    """Debian's package, where it is installed; elsewhere the refusal says where files are looked for."""
    data = FashionMnist(root="/nonexistent", batch_size=100)
    from pathlib import Path

    if Path("/usr/share/datasets/fashion-mnist").is_dir():
        data.prepare()
        assert data.sizes == {"train": 54000, "val": 6000, "test": 10000}
        assert data.class_names[9] == "Ankle boot"
        assert torch.bincount(data._splits["val"][1]).tolist() == [600] * 10
    else:
        with pytest.raises(InputError, match=r"data.root"):
            data.prepare()


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar10_is_what_torchvision_reads(protocol, tmp_path, monkeypatch):
    formats.cifar10(tmp_path, 100, protocol)
    data = Cifar10(root=str(tmp_path), batch_size=10)
    data.prepare()
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda self: None)
    reference = datasets.CIFAR10(str(tmp_path), train=False)
    x, y = next(iter(data.test_dataloader()))
    assert torch.equal(x, torch.from_numpy(reference.data).permute(0, 3, 1, 2))
    assert y.tolist() == reference.targets
    assert data.class_names[3] == "thing 3"


def test_cifar100(tmp_path):
    formats.cifar100(tmp_path, 400)
    data = Cifar100(root=str(tmp_path), batch_size=10, val_share=0.25)
    data.prepare()
    assert (data.num_classes, data.sizes["val"]) == (100, 100)


class Canary:
    def __reduce__(self):
        return (open, ("/nonexistent/canary", "w"))


def test_a_pickle_with_code_is_refused_unrun(tmp_path):
    formats.cifar10(tmp_path, 100)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(
        pickle.dumps({b"data": Canary(), b"labels": []}, protocol=2)
    )
    with pytest.raises(InputError, match=r"data_batch_3.*open"):
        Cifar10(root=str(tmp_path), batch_size=10).prepare()


def test_svhn_is_what_torchvision_reads(tmp_path, monkeypatch):
    formats.svhn(tmp_path, 40)
    data = Svhn(root=str(tmp_path), batch_size=10)
    data.prepare()
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    reference = datasets.SVHN(str(tmp_path), split="test")
    x, y = next(iter(data.test_dataloader()))
    assert torch.equal(x, torch.from_numpy(reference.data))
    assert y.tolist() == reference.labels.tolist()


def write_classes(folder, count=10, size=20):
    for k, name in enumerate(("ant", "bee", "cow")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = torch.full((3, size, size + i), 80 * k + i, dtype=torch.uint8)
            if i % 2:
                write_png(image, str(folder / name / f"{i}.png"))
            else:
                write_jpeg(image, str(folder / name / f"{i}.JPG"), quality=95)


@pytest.mark.parametrize("workers", [0, 2])
def test_image_folder(workers, tmp_path):
    write_classes(tmp_path)
    data = ImageFolder(root=str(tmp_path), size=16, batch_size=6, workers=workers, val_share=0.25)
    data.prepare()
    assert data.class_names == ["ant", "bee", "cow"]
    assert data.sizes == {"train": 18, "val": 6, "test": 6}
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, x.dtype) == ((6, 3, 16, 16), torch.uint8)
    assert torch.equal((x.float().mean((1, 2, 3)) / 80).floor().long(), y)  # the class is in the pixels


def test_image_folder_with_splits_of_its_own_and_grey(tmp_path):
    for split in ("train", "val", "test"):
        write_classes(tmp_path / split, count=4)
    data = ImageFolder(root=str(tmp_path), size=16, channels=1, batch_size=4, workers=0)
    data.prepare()
    assert data.sizes == {"train": 12, "val": 12, "test": 12}
    assert next(iter(data.val_dataloader()))[0].shape[1] == 1


def test_the_order_does_not_depend_on_workers(tmp_path):
    write_classes(tmp_path)
    orders = []
    for workers in (0, 2):
        data = ImageFolder(root=str(tmp_path), size=8, batch_size=6, workers=workers, seed=5)
        data.prepare()
        loader = data.train_dataloader()
        loader.batch_sampler.sampler.set_epoch(3)
        orders.append(torch.cat([x for x, _ in loader]))
    assert torch.equal(*orders)


def test_a_download_that_fails_says_where_files_are_looked_for(tmp_path, monkeypatch):
    def unreachable(self, root):
        raise OSError("no network")

    monkeypatch.setattr(Mnist, "_download", unreachable)
    with pytest.raises(InputError, match=r"MNIST/raw.*set data.root"):
        Mnist(root=str(tmp_path)).prepare()


def test_a_download_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    from knep.data.locate import find_folder

    monkeypatch.chdir(tmp_path)

    def download(root):
        (root / "MNIST" / "raw").mkdir(parents=True)
        raise OSError("no network")

    with pytest.raises(InputError, match="cannot be downloaded"):
        find_folder("MNIST", None, ["a"], [Path("MNIST/raw")], download)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError):
        find_folder("MNIST", None, ["a"], [Path("MNIST/raw")], download)
    assert (tmp_path / "data").is_dir()
