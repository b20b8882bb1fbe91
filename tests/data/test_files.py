"""The real formats, read from small files written here."""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision import datasets
from torchvision.io import write_jpeg, write_png

from knep.data.cifar import Cifar10, Cifar100
from knep.data.folder import ImageFolder
from knep.data.idx import FashionMnist, Mnist
from knep.data.svhn import Svhn
from knep.errors import InputError

rng = np.random.default_rng(0)


def write_idx(folder, suffix="", images=60, tests=20):
    arrays = {}
    for part, count in (("train", images), ("t10k", tests)):
        x = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        y = np.arange(count, dtype=np.uint8) % 10
        for kind, array, magic in (("images-idx3", x, 2051), ("labels-idx1", y, 2049)):
            content = struct.pack(f">I{array.ndim}I", magic, *array.shape) + array.tobytes()
            path = folder / f"{part}-{kind}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix else content)
        arrays[part] = (x, y)
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(("kind", "place"), [(Mnist, "."), (Mnist, "MNIST/raw"), (FashionMnist, "FashionMNIST/raw")])
def test_idx(kind, place, suffix, tmp_path):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    arrays = write_idx(tmp_path / place, suffix)
    data = kind(root=str(tmp_path), batch_size=10)
    data.prepare()
    assert (data.channels, data.image_size, data.num_classes) == (1, 28, 10)
    assert data.sizes == {"train": 50, "val": 10, "test": 20}
    x = torch.cat([x for x, _ in data.test_dataloader()])
    assert torch.equal(x[:, 0], torch.from_numpy(arrays["t10k"][0]))


def test_idx_is_what_torchvision_reads(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    write_idx(raw)
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


def write_cifar10(folder, protocol=2):
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    names = [f"thing {k}".encode() for k in range(10)]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=protocol))
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        x = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        y = [(i + j) % 10 for j in range(20)]
        (base / name).write_bytes(pickle.dumps({"data": x, "labels": y}, protocol=protocol))
    return base


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar10_is_what_torchvision_reads(protocol, tmp_path, monkeypatch):
    write_cifar10(tmp_path, protocol)
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
    base = tmp_path / "cifar-100-python"
    base.mkdir()
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"c{k}" for k in range(100)]}, protocol=2))
    for name, each in (("train", 4), ("test", 1)):
        x = rng.integers(0, 256, (100 * each, 3072), dtype=np.uint8)
        y = [k % 100 for k in range(100 * each)]
        (base / name).write_bytes(pickle.dumps({"data": x, "fine_labels": y}, protocol=2))
    data = Cifar100(root=str(tmp_path), batch_size=10, val_share=0.25)
    data.prepare()
    assert (data.num_classes, data.sizes["val"]) == (100, 100)


class Canary:
    def __reduce__(self):
        return (open, ("/nonexistent/canary", "w"))


def test_a_pickle_with_code_is_refused_unrun(tmp_path):
    base = write_cifar10(tmp_path)
    (base / "data_batch_3").write_bytes(pickle.dumps({b"data": Canary(), b"labels": []}, protocol=2))
    with pytest.raises(InputError, match=r"data_batch_3.*open"):
        Cifar10(root=str(tmp_path), batch_size=10).prepare()


def test_svhn_is_what_torchvision_reads(tmp_path, monkeypatch):
    for part, count in (("train", 40), ("test", 20)):
        x = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        y = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]  # the file says 10 for the digit 0
        savemat(tmp_path / f"{part}_32x32.mat", {"X": x, "y": y})
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
