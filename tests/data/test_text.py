"""Bytes of files: rows that lose none and share one, splits that share none, and a line for what is no text."""

import os

import pytest
import torch

from knep.data.own.text import Text, files_in
from knep.errors import InputError


def prepared(path, **more):
    data = Text(path=str(path), **{"length": 8, "batch_size": 2, **more})
    data.prepare()
    return data


def folder(path, count=12):
    for k in range(count):
        place = path / ("deep" if k % 2 else "")
        place.mkdir(exist_ok=True)
        (place / f"{k:02}.py").write_bytes(bytes([65 + k]) * 50)
    (path / "other.md").write_bytes(b"left out" * 20)
    (path / ".hidden.py").write_bytes(b"left out" * 20)
    return path


def split_bytes(data, split):
    x = data._splits[split][0]
    return bytes(torch.cat([x[0], x[1:, 1:].flatten()]).tolist())


def test_each_byte_but_the_first_is_predicted_once(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(bytes(range(256)) * 4)
    data = prepared(path, limit=None, split="position", val_share=0.25, test_share=0.25)
    parts = [split_bytes(data, split) for split in ("train", "val", "test")]
    whole = path.read_bytes()
    assert whole[:512].startswith(parts[0])
    assert whole[512:768].startswith(parts[1])
    assert whole[768:].startswith(parts[2])
    assert all(len(part) > size - 8 for part, size in zip(parts, (512, 256, 256), strict=True))


def test_rows_are_their_own_targets_of_256_tokens(tmp_path):
    data = prepared(folder(tmp_path), glob="*.py")
    assert (data.target, data.shape, data.channels, data.num_classes, data.dtype) == ("token", (8,), 256, 256, "int64")
    x, y = next(iter(data.train_dataloader()))
    assert torch.equal(x, y)
    assert x.dtype == torch.int64
    assert (data.class_names[65], data.class_names[10]) == ("A", "0x0a")


def test_no_file_is_in_two_splits(tmp_path, capsys):
    data = prepared(folder(tmp_path), glob="*.py", val_share=0.2, test_share=0.2)
    assert "12 files, 600 bytes, split by whole files" in capsys.readouterr().err
    parts = [split_bytes(data, split) for split in ("train", "val", "test")]
    files = {p.name: p.read_bytes()[:20] for p in tmp_path.rglob("[0-9]*.py")}
    owners = {name: [k for k, part in enumerate(parts) if text in part] for name, text in files.items()}
    assert all(len(found) == 1 for found in owners.values())
    assert {k for ks in owners.values() for k in ks} == {0, 1, 2}
    again = prepared(tmp_path, glob="*.py", val_share=0.2, test_share=0.2)
    assert split_bytes(again, "val") == parts[1]
    other = prepared(tmp_path, glob="*.py", val_share=0.2, test_share=0.2, split_seed=1)
    assert split_bytes(other, "val") != parts[1]


def test_limit_takes_rows_of_training(tmp_path):
    assert prepared(folder(tmp_path), glob="*.py", limit=5).sizes["train"] == 5


def test_hidden_files_pipes_and_links_that_leave(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    folder(inside)
    os.mkfifo(inside / "pipe.py")
    (inside / "gone.py").symlink_to(tmp_path / "nothing")
    assert len(files_in(inside, "*.py")) == 12
    (tmp_path / "secret.py").write_text("secret")
    (inside / "link.py").symlink_to(tmp_path / "secret.py")
    with pytest.raises(InputError, match="link that leaves"):
        files_in(inside, "*.py")


def test_what_is_no_text_is_refused_in_a_line(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "short.txt").write_bytes(b"12345678")
    for path, more, said in (
        (tmp_path / "nowhere", {}, "is missing"),
        (tmp_path, {"glob": "*.py"}, "has no file"),
        (tmp_path / "empty.txt", {}, "are empty"),
        (tmp_path / "short.txt", {}, "less than data.length=8"),
        (tmp_path / "short.txt", {"split": "files"}, "needs a file for each of three splits"),
        (tmp_path, {"length": 1}, "data.length=1"),
        (tmp_path, {"split": "half"}, "data.split=half"),
        (tmp_path, {"test_share": 0.95}, "data.test_share=0.95"),
        (tmp_path, {"glob": ""}, "data.glob="),
    ):
        with pytest.raises(InputError, match=said) as error:
            prepared(path, **more)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"data.path is missing"):
        Text().prepare()
