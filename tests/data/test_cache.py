"""The cache: the pixels that decoding gives, whole or absent, found out when it is old or damaged."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from knep.config.schema import config_hash
from knep.data import cache, folder_loader
from knep.data.image_folder import ImageFolder
from knep.errors import InputError

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def root(tmp_path):
    """Three classes of eight PNGs of noise."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cow"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            noise = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def folder(root, cached=True, **options):
    where = root.parent / "cache" if cached else None
    data = ImageFolder(root=str(root), **({"size": 8, "batch_size": 4, "workers": 0, "cache": where} | options))
    data.prepare()
    return data


def everything(data):
    """All that a data module hands out, twice through the training split."""
    train = data.train_dataloader()
    parts = [*train, *train, *data.val_dataloader(), *data.test_dataloader()]
    return [t for pair in parts for t in pair] + [*data.train_images(), data.sample(5)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def file_of(root):
    (path,) = (root.parent / "cache").glob("*.images")
    return path


def built(capsys):
    """Whether a cache was written since the last look."""
    return "caching" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [{}, {"channels": 1}, {"limit": 9}, {"size": 16}, {"workers": 2}, {"batch_size": 9}]
)
def test_a_cache_holds_what_decoding_gives(options, root):
    assert same(everything(folder(root, **options)), everything(folder(root, cached=False, **options)))


def test_splits_of_their_own_share_one_cache(root):
    for split in ("train", "val", "test"):
        shutil.copytree(root, root.parent / "three" / split)
    root = root.parent / "three"
    assert same(everything(folder(root)), everything(folder(root, cached=False)))
    assert file_of(root).stat().st_size > 72 * 3 * 8 * 8


def test_a_second_run_decodes_nothing(root, monkeypatch, capsys):
    first = everything(folder(root))
    assert built(capsys)

    def never(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(folder_loader, "read_images", never)
    monkeypatch.setattr(cache, "read_image", never)
    assert same(first, everything(folder(root)))
    folder(root, val_share=0.3, split_seed=1, limit=10, seed=7)
    assert not built(capsys)


def test_the_users_cache_folder_is_the_default(root, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent / "home"))
    folder(root, cache=True)
    assert len(list((root.parent / "home" / "knep" / "images").glob("*.images"))) == 1
    assert sorted(p.name for p in root.iterdir()) == ["ant", "bee", "cow"]


def repaint(path):
    x = np.asarray(Image.open(path)).copy()
    Image.fromarray(255 - x).save(path)


CHANGES = {
    "another picture": lambda root: repaint(root / "ant" / "3.png"),
    "a later time": lambda root: os.utime(root / "ant" / "3.png", ns=(1, 1)),
    "a new file": lambda root: shutil.copy(root / "ant" / "3.png", root / "ant" / "new.png"),
    "a file less": lambda root: (root / "cow" / "3.png").unlink(),
    "another name": lambda root: (root / "cow" / "3.png").rename(root / "cow" / "33.png"),
    "names exchanged": lambda root: exchange(root / "ant" / "3.png", root / "bee" / "3.png"),
}


def exchange(a, b):
    a.rename(a.with_suffix(".tmp"))
    b.rename(a)
    a.with_suffix(".tmp").rename(b)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_source_is_cached_anew(change, root, capsys):
    folder(root)
    assert built(capsys)
    CHANGES[change](root)
    assert same(everything(folder(root)), everything(folder(root, cached=False)))
    assert built(capsys)
    folder(root)
    assert not built(capsys)


def test_caches_of_many_sources_lie_in_one_folder(root, capsys):
    other = root.parent / "others"
    shutil.copytree(root, other)
    repaint(other / "ant" / "0.png")
    for kind in (root, other, root, other):
        assert same(everything(folder(kind)), everything(folder(kind, cached=False)))
    assert capsys.readouterr().err.count("caching") == 2


def test_a_truncated_or_lengthened_cache_is_written_anew(root, capsys):
    expected = everything(folder(root))
    whole = file_of(root).read_bytes()
    for damaged in (*(whole[:n] for n in range(0, len(whole), 97)), whole[:-1], whole + b"\0"):
        file_of(root).write_bytes(damaged)
        capsys.readouterr()
        folder(root)
        assert built(capsys)
        assert file_of(root).read_bytes() == whole
    assert same(expected, everything(folder(root)))


def test_every_flipped_bit_is_found(root, capsys):
    """In the pixels: that image alone is decoded again, and the file goes; in what follows them: all is built anew."""
    expected = everything(folder(root))
    whole = file_of(root).read_bytes()
    pixels = 24 * 3 * 8 * 8
    drawn = np.random.default_rng(0).choice(8 * len(whole), 60, replace=False).tolist()
    bits = [*drawn, 8 * pixels, 8 * len(whole) - 1]
    found = {"mended": 0, "anew": 0}
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file_of(root).write_bytes(damaged)
        capsys.readouterr()
        assert same(expected, everything(folder(root)))
        said = capsys.readouterr().err
        if bit // 8 < pixels:
            assert said.count("is damaged at") == 1
            assert not list((root.parent / "cache").glob("*.images"))
            folder(root)
        found["mended" if bit // 8 < pixels else "anew"] += 1
        assert file_of(root).read_bytes() == whole
        assert ("caching" in said) == (bit // 8 >= pixels)
    assert min(found.values()) > 1


def test_two_images_in_each_others_place_are_found(root):
    expected = everything(folder(root))
    whole = bytearray(file_of(root).read_bytes())
    size = 3 * 8 * 8
    whole[:size], whole[size : 2 * size] = whole[size : 2 * size], whole[:size]
    file_of(root).write_bytes(whole)
    assert same(expected, everything(folder(root)))


def test_a_cache_replaced_under_a_reader_does_not_change_what_it_reads(root):
    data = folder(root)
    expected = everything(folder(root, cached=False))
    repaint(root / "ant" / "3.png")
    folder(root)
    assert same(everything(data), expected)


def slow(seconds):
    """Decoding that takes its time."""
    quick = folder_loader.read_images

    def read(*args):
        time.sleep(seconds)
        return quick(*args)

    return read


def build_slowly(root, seconds, started=None):
    folder_loader.read_images = slow(seconds)
    if started is not None:
        started.set()
    folder(root)


def test_a_build_that_is_killed_leaves_nothing_that_counts(root, capsys):
    child = FORK.Process(target=build_slowly, args=(root, 60))
    child.start()
    deadline = time.time() + 20
    while not list((root.parent / "cache").glob(".*.images.*")) and time.time() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not list((root.parent / "cache").glob("*.images"))
    assert len(list((root.parent / "cache").glob(".*.images.*"))) == 1
    assert same(everything(folder(root)), everything(folder(root, cached=False)))
    assert not list((root.parent / "cache").glob(".*.images.*"))


def test_two_processes_build_once_and_read_both(root, capfd):
    children = [FORK.Process(target=build_slowly, args=(root, 0.3)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    assert capfd.readouterr().err.count("caching") == 1
    assert same(everything(folder(root)), everything(folder(root, cached=False)))


def without_room(root, answer):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        folder(root)
    except InputError as error:
        answer.send(str(error))


def test_no_room_is_one_line_and_leaves_nothing(root):
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=without_room, args=(root, theirs))
    child.start()
    child.join(30)
    assert ours.poll()
    said = ours.recv()
    assert "cannot be written (File too large)" in said
    assert "write data.cache=FOLDER" in said
    assert [p.suffix for p in (root.parent / "cache").iterdir()] == [".lock"]


def test_a_full_disk_is_found_before_decoding(root, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(folder_loader, "read_images", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        folder(root)
    assert [p.suffix for p in (root.parent / "cache").iterdir()] == [".lock"]


def test_a_cache_folder_that_is_a_file_is_named(root):
    (root.parent / "cache").write_text("in the way")
    with pytest.raises(InputError, match=r"cache/.* cannot be written"):
        folder(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_decoded_are_all_named_and_leave_nothing(workers, root):
    for name in ("ant/1", "bee/5", "cow/2"):
        whole = (root / f"{name}.png").read_bytes()
        (root / f"{name}.png").write_bytes(whole[:60] + bytes(len(whole) - 72) + whole[-12:])
    with pytest.raises(InputError, match=r"3 of 24 images .*ant/1.png cannot be read as an image.*bee/5.*cow/2"):
        folder(root, workers=workers)
    assert [p.suffix for p in (root.parent / "cache").iterdir()] == [".lock"]


def test_a_cached_loader_goes_on_where_it_stopped(root):
    whole = [y.tolist() for _, y in folder(root).train_dataloader()]
    first = folder(root).train_dataloader()
    steps = iter(first)
    begun = [next(steps)[1].tolist() for _ in range(2)]
    resumed = folder(root).train_dataloader()
    resumed.load_state_dict(first.state_dict())
    assert begun + [y.tolist() for _, y in resumed] == whole


def resumed(root, run, *lines):
    """The override lines of a run with a cache in `run`'s folder, gone on with; and what it said."""
    from knep.cli.train import main

    if not run.exists():
        data = ["data=image_folder", f"data.root={root}", f"data.cache={run.parent}/mine", "data.size=8"]
        quick = ["recipe=none", "trainer=cpu", "data.batch_size=4", "data.workers=0", "progress=false", "threads=1"]
        main([*data, *quick, "trainer.max_epochs=1", f"hydra.run.dir={run}"])
        return
    main([f"ckpt={run}", f"trainer.max_epochs={len(list(run.glob('tensorboard/events*'))) + 1}", *lines])


def test_a_resumed_run_reads_its_cache_and_writes_none_that_nobody_typed(root, tmp_path, capfd):
    run, mine = tmp_path / "run", tmp_path / "mine"
    resumed(root, run)
    (path,) = mine.glob("*.images")
    before = path.stat().st_mtime_ns
    resumed(root, run)
    assert path.stat().st_mtime_ns == before
    assert "has no cache" not in capfd.readouterr().err
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    resumed(root, run)
    assert path.read_bytes() == content
    assert "decoded again" in capfd.readouterr().err
    path.unlink()
    resumed(root, run)
    assert not path.exists()
    assert f"knep: {mine} has no cache of these images: type data.cache={mine} to write one" in capfd.readouterr().err
    resumed(root, run, f"data.cache={mine}")
    assert path.is_file()


def test_what_a_run_computes_has_one_hash_whether_its_cache_may_be_written_or_not():
    hashes = {config_hash({"seed": 0, "data": {"size": 8, "write_cache": w}}) for w in (True, False)}
    assert len(hashes) == 1
    assert config_hash({"seed": 0, "data": {"size": 9, "write_cache": True}}) not in hashes
