"""Image files become the right pixels, hostile ones a line; order, place and numbers do not depend on workers."""

import json
import os
import re
import shlex
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import center_crop, resize

from knep.cli.train import main
from knep.config.schema import DataSpec
from knep.data.decode import check_headers, read_image
from knep.data.folder_loader import FolderLoader, Images
from knep.data.image_folder import ImageFolder
from knep.data.listing import list_images
from knep.data.loaders import Batches
from knep.errors import InputError


def smooth(height, width, seed=0):
    """An image (height, width, 3) without fine detail, so that resampling filters agree on it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write_classes(root, count=8, size=20, names=("ant", "bee", "cow"), **options):
    """Class folders of smooth PNGs; returns the files."""
    files = []
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            files.append(root / name / f"{i}.png")
            Image.fromarray(smooth(size, size + i, seed=k * count + i)).save(files[-1])
    return files


def folder(root, **options):
    data = ImageFolder(root=str(root), **({"size": 8, "batch_size": 4, "workers": 0} | options))
    data.prepare()
    return data


@pytest.mark.parametrize(("height", "width"), [(40, 40), (40, 61), (61, 40), (16, 16), (9, 9)])
def test_pixels_are_those_of_resizing_the_short_side_and_cropping_the_centre(height, width, tmp_path):
    Image.fromarray(smooth(height, width)).save(tmp_path / "a.png")
    whole = torch.tensor(smooth(height, width)).permute(2, 0, 1)
    expected = center_crop(resize(whole, [16], antialias=True), [16, 16])
    x = read_image(tmp_path / "a.png", 3, 16)
    assert (x.dtype, x.shape) == (torch.uint8, (3, 16, 16))
    assert (x.float() - expected.float()).abs().mean() < 3  # a crop may fall half a pixel aside


@pytest.mark.parametrize("size", [16, 32, 50, 64, 100])
def test_a_jpeg_at_reduced_size_is_the_same_picture(size, tmp_path):
    Image.fromarray(smooth(256, 256)).save(tmp_path / "a.jpg", quality=95)
    expected = resize(torch.tensor(smooth(256, 256)).permute(2, 0, 1), [size], antialias=True)
    assert (read_image(tmp_path / "a.jpg", 3, size).float() - expected.float()).abs().mean() < 2


def test_a_jpeg_is_decoded_at_the_reduced_size_next_above(tmp_path, monkeypatch):
    Image.fromarray(smooth(256, 256)).save(tmp_path / "a.jpg")
    decoded = []
    resized = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda im, *a, **k: decoded.append(im.size) or resized(im, *a, **k))
    read_image(tmp_path / "a.jpg", 3, 100)
    assert decoded == [(128, 128)]


def corners():
    """A picture whose four corners differ: red, green, blue, yellow, clockwise from the upper left."""
    x = np.zeros((16, 16, 3), dtype=np.uint8)
    x[:8, :8], x[:8, 8:], x[8:, 8:], x[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
    return x


# What a camera stores so that each orientation shows the picture upright, by the definition of the EXIF tag.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_pictures_stand_upright(orientation, kind, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](corners()))
    Image.fromarray(stored).resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / f"a.{kind}", exif=exif)
    x = read_image(tmp_path / f"a.{kind}", 3, 16).permute(1, 2, 0).float()
    assert (x - torch.tensor(corners()).float()).abs().mean() < 12


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF header", b"Exif\0\0MM\0*\0"])
def test_unreadable_exif_says_nothing(exif, kind, tmp_path):
    Image.fromarray(corners()).save(tmp_path / f"a.{kind}", exif=exif, quality=95)
    assert read_image(tmp_path / f"a.{kind}", 3, 16)[0, 2, 2] > 200


def palette(**options):
    image = Image.fromarray(corners()).convert("P", palette=Image.Palette.ADAPTIVE)
    image.info.update(options)
    return image


def translucent(mode, alpha=0):
    image = Image.fromarray(corners()).convert(mode)
    image.putalpha(alpha)
    return image


WHITE, UPPER_LEFT = (255, 255, 255), (255, 0, 0)
# kind -> (file, what is saved, how, the colour of the upper left corner)
KINDS = {
    "grey": ("a.png", lambda: Image.fromarray(corners()[..., 0]), {}, WHITE),
    "1 bit": ("a.png", lambda: Image.fromarray(corners()[..., 0]).convert("1"), {}, WHITE),
    "16 bits": ("a.png", lambda: Image.fromarray(np.full((16, 16), 0x80FF, dtype=np.uint16)), {}, (128, 128, 128)),
    "palette": ("a.png", palette, {}, UPPER_LEFT),
    "transparent RGB": ("a.png", lambda: translucent("RGB"), {}, WHITE),
    "half transparent": ("a.png", lambda: translucent("RGB", 128), {}, (255, 127, 127)),
    "transparent grey": ("a.png", lambda: translucent("L"), {}, WHITE),
    "a transparent colour": ("a.png", lambda: Image.fromarray(corners()), {"transparency": UPPER_LEFT}, WHITE),
    "CMYK": ("a.jpg", lambda: Image.fromarray(corners()).convert("CMYK"), {"quality": 95}, UPPER_LEFT),
    "grey JPEG": ("a.jpg", lambda: Image.fromarray(corners()[..., 0]), {"quality": 95}, WHITE),
    "progressive": ("a.jpg", lambda: Image.fromarray(corners()), {"progressive": True, "quality": 95}, UPPER_LEFT),
    "GIF": ("a.gif", lambda: Image.fromarray(corners()), {}, UPPER_LEFT),
    "WebP": ("a.webp", lambda: Image.fromarray(corners()), {"lossless": True}, UPPER_LEFT),
    "transparent WebP": ("a.webp", lambda: translucent("RGB"), {"lossless": True}, WHITE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image(kind, tmp_path):
    file, make, options, expected = KINDS[kind]
    make().save(tmp_path / file, **options)
    x = read_image(tmp_path / file, 3, 16)
    assert (x[:, 2, 2].float() - torch.tensor(expected).float()).abs().max() < 12
    grey = sum(w * v for w, v in zip((0.299, 0.587, 0.114), expected, strict=True))
    assert abs(float(read_image(tmp_path / file, 1, 16)[0, 2, 2]) - grey) < 12


@pytest.mark.parametrize("file", ["a.gif", "a.webp", "a.png"])
def test_of_a_film_the_first_frame(file, tmp_path):
    film = [Image.fromarray(np.full((16, 16, 3), v, dtype=np.uint8)) for v in (200, 20, 90)]
    film[0].save(tmp_path / file, save_all=True, append_images=film[1:])
    assert (read_image(tmp_path / file, 3, 8).float() - 200).abs().max() < 6


def giant_png(path, width=60_000, height=60_000):
    """A valid header that promises 10 GB, in 60 bytes."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9)))


@pytest.mark.parametrize("side", [8_001, 12_000, 60_000])
def test_a_giant_is_refused_by_its_header(side, tmp_path):
    giant_png(tmp_path / "giant.png", side, side)
    for read in (lambda: check_headers([tmp_path / "giant.png"]), lambda: read_image(tmp_path / "giant.png", 3, 8)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(InputError, match=rf"giant.png has {side} x {side} pixels.*data.max_pixels=64000000"):
                read()


def test_the_bound_on_pixels_is_the_users(tmp_path):
    write_classes(tmp_path / "images", size=20)
    folder(tmp_path / "images", max_pixels=20 * 27)
    with pytest.raises(InputError, match=r"7.png has 27 x 20 pixels, more than data.max_pixels=539"):
        folder(tmp_path / "images", max_pixels=20 * 27 - 1)


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "PPM", "EPS"])
def test_other_formats_do_not_hide_behind_a_suffix(kind, tmp_path):
    Image.fromarray(corners()).save(tmp_path / "a.png", format=kind)
    with pytest.raises(InputError, match=r"a.png cannot be read as an image \(no JPEG, PNG, WebP or GIF\)"):
        read_image(tmp_path / "a.png", 3, 8)


def link(at, to):
    at.symlink_to(to, target_is_directory=to.is_dir())


@pytest.mark.parametrize("where", ["file", "class", "split"])
def test_links_that_leave_the_root_are_refused(where, tmp_path):
    outside = tmp_path / "outside"
    write_classes(outside)
    root = tmp_path / "images"
    for split in ("train", "val"):
        write_classes(root / split)
    place, target = {
        "file": (root / "train" / "ant" / "secret.png", outside / "ant" / "0.png"),
        "class": (root / "train" / "dog", outside / "ant"),
        "split": (root / "test", outside),
    }[where]
    link(place, target)
    with pytest.raises(InputError, match=rf"{place.name} is a link that leaves data.root.*data.follow_links=true"):
        folder(root)
    if where == "class":
        link(root / "val" / "dog", outside / "ant")
    assert folder(root, follow_links=True).sizes["train"] > 0


def test_links_inside_the_root_and_to_the_root_are_followed(tmp_path):
    write_classes(tmp_path / "images")
    link(tmp_path / "images" / "ant" / "twin.png", tmp_path / "images" / "ant" / "0.png")
    link(tmp_path / "elsewhere", tmp_path / "images")
    assert sum(folder(tmp_path / "elsewhere").sizes.values()) == 25


@pytest.mark.parametrize("follow", [False, True])
def test_links_to_nowhere_and_to_themselves_are_named(follow, tmp_path):
    for name in ("gone.png", "loop.png"):
        root = tmp_path / name
        write_classes(root)
        (root / "bee" / name).symlink_to(root / "bee" / ("nothing" if name == "gone.png" else name))
        with pytest.raises(InputError, match=rf"{name} is a link that leads nowhere"):
            folder(root, follow_links=follow)


def test_odd_names_are_printed_escaped(tmp_path):
    odd = ("\x1b[31mred", "two\nlines", os.fsdecode(b"no\xfftext"), "öre", "\u202ereversed")
    write_classes(tmp_path / "images", names=odd)
    names = folder(tmp_path / "images").class_names
    assert sorted(names) == sorted(["\\x1b[31mred", "two\\nlines", "no\\udcfftext", "öre", "\\u202ereversed"])
    (tmp_path / "images" / "\x1b[31mred" / "\x07.png").write_text("no image")
    with pytest.raises(InputError) as refused:
        folder(tmp_path / "images")
    assert str(refused.value).isprintable()
    assert r"\x1b[31mred/\x07.png" in str(refused.value)


def test_what_is_no_image_file_is_left_out(tmp_path):
    write_classes(tmp_path)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "ant" / "._0.png").write_text("a resource fork")
    (tmp_path / "ant" / "notes.txt").write_text("notes")
    (tmp_path / "ant" / "folder.png").mkdir()
    os.mkfifo(tmp_path / "ant" / "pipe.png")  # opening it would wait for ever
    listing = list_images(tmp_path)
    assert listing.classes == ["ant", "bee", "cow"]
    assert torch.bincount(listing.labels).tolist() == [8, 8, 8]
    assert listing.left == {".txt": 1, "no file (a pipe or device)": 1}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"size": 7}, "data.size=7"),
        ({"channels": 2}, "data.channels=2"),
        ({"workers": -1}, "data.workers=-1"),
        ({"max_pixels": 0}, "data.max_pixels=0"),
        ({"cache": 3}, "data.cache=3"),
        ({"cache": ""}, "data.cache=''"),
        ({"follow_links": "yes"}, "data.follow_links=yes"),
    ],
)
def test_bad_values_are_refused(values, said):
    with pytest.raises(InputError, match=said):
        ImageFolder(root="images", **values)


def split(root, name, names=("ant", "bee"), count=4):
    write_classes(root / name, count=count, names=names)


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
SPLITS = {
    "train, valid": ("train", "valid", None),
    "train, dev, test": ("train", "dev", "test"),
    "Training, Testing": ("Training", None, "Testing"),
    "TRAIN, VALIDATION, TEST": ("TRAIN", "VALIDATION", "TEST"),
    "training_set, test_set": ("training_set", None, "test_set"),
    "train2017, val2017": ("train2017", "val2017", None),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_splits_are_known_by_the_names_that_people_give_them(kind, tmp_path, capsys):
    train, val, test = SPLITS[kind]
    split(tmp_path, train, count=10)
    for name, count in ((val, 3), (test, 2)):
        if name:
            split(tmp_path, name, count=count)
    data = folder(tmp_path)
    assert data.class_names == ["ant", "bee"]
    assert (not val or data.sizes["val"] == 6) and (not test or data.sizes["test"] == 4)  # noqa: PT018
    assert sum(data.sizes.values()) == 20 + 6 * bool(val) + 4 * bool(test)
    assert capsys.readouterr().err == ""


def refused_trees(root, name):
    """Trees that are refused, by name -> what the line says."""

    def images(where):
        where.mkdir(parents=True)
        Image.new("L", (8, 8)).save(where / "a.png")

    match name:
        case "two of one split":
            split(root, "train"), split(root, "val"), split(root, "valid")
            return "val and valid, which all say val: leave one"
        case "no train":
            split(root, "val"), split(root, "test")
            return "test, the name of a split, and no train"
        case "classes beside a split":
            write_classes(root, names=("ant", "bee")), split(root, "validation")
            return "validation, the name of a split, and no train"
        case "images of no class for the test":
            split(root, "train"), images(root / "test")
            return f"test has no class folders.*write data.root={root}/train"
        case "images of no class":
            images(root / "x"), (root / "x" / "a.png").rename(root / "a.png"), (root / "x").rmdir()
            return "0 class folders and 1 images: sort them"
        case "an archive":
            (root / "images.zip").write_bytes(b"PK")
            return "an archive, images.zip: unpack it"
        case "a folder around it":
            write_classes(root / "dataset")
            return f"1 class folder, dataset.*write data.root={root}/dataset"
        case "splits in the classes":
            split(root, "ant", ("train", "test")), split(root, "bee", ("train", "test"))
            return "ant has its own folders for test and train: write data.root="
        case "other classes":
            split(root, "train"), split(root, "val", ("ant", "fly"))
            return "it alone has fly, training alone has bee"
        case "one name twice":
            write_classes(root, names=(COMPOSED, DECOMPOSED))
            return f"two folders called {COMPOSED}"
        case "no images of a kind that is read":
            write_classes(root), (root / "dog").mkdir(), (root / "dog" / "a.HEIC").touch()
            return "dog is a class folder without images, with 1 .heic"
        case "a link to a folder above":
            write_classes(root), (root / "ant" / "more").symlink_to(root / "ant")
            return "more is a link to a folder that it lies in"
        case "too few of every class":
            write_classes(root, count=2)
            return "no class has more than 2 images"
    raise AssertionError(name)


@pytest.mark.parametrize(
    "kind",
    ["two of one split", "no train", "classes beside a split", "images of no class for the test", "images of no class",
     "an archive", "a folder around it", "splits in the classes", "other classes", "one name twice",
     "no images of a kind that is read", "a link to a folder above", "too few of every class"],
)  # fmt: skip
def test_a_tree_that_cannot_be_read_is_one_line(kind, tmp_path):
    said = refused_trees(tmp_path, kind)
    with pytest.raises(InputError, match=said) as refused:
        folder(tmp_path)
    assert "\n" not in str(refused.value)


def test_what_is_left_out_is_counted_and_what_lies_deeper_is_read(tmp_path, capsys):
    files = write_classes(tmp_path)
    (tmp_path / "ant" / "2023" / "may").mkdir(parents=True)
    for k, file in enumerate(files[:5]):
        file.rename(tmp_path / "ant" / "2023" / "may" / f"{k}.png")
    for name in (
        "ant/a.heic",
        "bee/b.HEIC",
        "cow/c.txt",
        "ant/Thumbs.db",
        "bee/.DS_Store",
        "cow/._c.png",
        "labels.csv",
    ):
        (tmp_path / name).write_text("x")
    (tmp_path / "__MACOSX" / "ant").mkdir(parents=True)
    data = folder(tmp_path)
    assert (sum(data.sizes.values()), data.num_classes) == (24, 3)
    said = capsys.readouterr().err
    assert f"knep: 4 of 28 files in {tmp_path} are left out: 2 .heic, 1 .csv, 1 .txt\n" in said
    assert "knep: 5 of 24 images lie in folders below that of their class\n" in said


def test_folders_beside_the_splits_and_classes_called_like_one_are_told(tmp_path, capsys):
    split(tmp_path / "a", "train"), split(tmp_path / "a", "extra")
    write_classes(tmp_path / "b", names=("valid", "invalid"))
    assert [folder(tmp_path / name).num_classes for name in "ab"] == [2, 2]
    said = capsys.readouterr().err
    assert f"left out beside the splits of {tmp_path}/a: extra\n" in said
    assert "taken for a class, as there is no folder train: valid\n" in said


def test_classes_of_both_splits_are_one_however_their_accents_are_written(tmp_path):
    split(tmp_path, "train", (DECOMPOSED, "caff"))
    split(tmp_path, "val", (COMPOSED, "caff"))
    data = folder(tmp_path)
    assert data.class_names == [COMPOSED, "caff"]  # in the order of the training folder
    (tmp_path / "val" / COMPOSED / "0.png").unlink()
    again = folder(tmp_path)
    assert torch.cat([y for _, y in again.val_dataloader()]).bincount(minlength=2)[0] == 3


def test_a_class_with_too_few_images_to_split_is_for_training(tmp_path, capsys):
    write_classes(tmp_path, names=("ant", "bee"), count=10)
    before = folder(tmp_path)
    write_classes(tmp_path, names=("one",), count=1)
    write_classes(tmp_path, names=("two",), count=2)
    data = folder(tmp_path)
    assert data.sizes == before.sizes | {"train": before.sizes["train"] + 3}
    labels = torch.cat([y for _, y in FolderLoader(data._parts["train"], Batches(data.sizes["train"], 4))])
    assert labels[labels >= 2].tolist() == [2, 3, 3]
    assert "2 of 4 classes have too few images to split one off for test and val" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [("bmp", "BMP"), ("tif", "TIFF"), ("TIFF", "TIFF"), ("ppm", "PPM"), ("pgm", "PPM"), ("jfif", "JPEG"),
     ("jpe", "JPEG"), ("JPG", "PNG"), ("png", "WEBP"), ("bmp", "PNG"), ("tif", "JPEG")],
)  # fmt: skip
def test_pictures_of_other_kinds_and_with_another_suffix_are_read(suffix, kind, tmp_path):
    write_classes(tmp_path)
    Image.fromarray(corners()).resize((32, 32)).save(tmp_path / "ant" / f"a.{suffix}", kind)
    assert sum(folder(tmp_path).sizes.values()) == 25
    x = read_image(tmp_path / "ant" / f"a.{suffix}", 3, 16)
    assert (x[:, 2, 2].float() - torch.tensor(UPPER_LEFT)).abs().max() < 60


def test_a_picture_whose_name_hides_its_kind_is_told_which(tmp_path):
    Image.fromarray(corners()).save(tmp_path / "a.jpg", "BMP")
    with pytest.raises(InputError, match=r"a.jpg cannot be read as an image \(no .*\): rename it to .bmp"):
        read_image(tmp_path / "a.jpg", 3, 8)


def png(x, *more):
    """A PNG of 16 bits of x (H, W) or (H, W, C), with chunks before and behind its pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    colour = {1: 0, 2: 4, 3: 2, 4: 6}[x.shape[2] if x.ndim == 3 else 1]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in x)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", x.shape[1], x.shape[0], 16, colour, 0, 0, 0)), *more,
             (b"IDAT", zlib.compress(rows)), *more, (b"IEND", b"")]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
def test_a_png_with_a_large_profile_or_text_is_read(kind, tmp_path):
    packed = zlib.compress(b"a" * 5_000_000)
    body = b"big\0\1\0\0\0" + packed if kind == b"iTXt" else b"big\0\0" + packed
    (tmp_path / "a.png").write_bytes(png(np.full((8, 8), 0x80FF), (kind, body)))
    assert check_headers([tmp_path / "a.png"]) == 16
    assert (read_image(tmp_path / "a.png", 3, 8) == 128).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_numbers_of_twelve_bits_keep_their_upper_eight(channels, tmp_path):
    x = np.random.default_rng(0).integers(0, 4096, (8, 8, channels))
    if channels in (2, 4):
        x[..., -1] = 0xFFFF
    (tmp_path / "a.png").write_bytes(png(x))
    assert check_headers([tmp_path / "a.png"]) == 12
    wanted = x[..., :3] if channels > 2 else x[..., :1].repeat(3, 2)
    got = read_image(tmp_path / "a.png", 3, 8, bits=12).permute(1, 2, 0).numpy()
    assert np.array_equal(got, wanted >> 4)
    assert np.array_equal(read_image(tmp_path / "a.png", 3, 8).permute(1, 2, 0).numpy(), wanted >> 8)


def test_the_bits_of_a_data_set_are_those_of_its_largest_number_and_stay_those_of_a_run(tmp_path, capsys):
    write_classes(tmp_path / "images")
    for k, name in enumerate(("ant", "bee")):
        for i in range(4):
            x = np.full((8, 8), 1000 * (k + 1) + i)
            (tmp_path / "images" / name / f"wide{i}.png").write_bytes(png(x))
    bits = [folder(tmp_path / "images", **how).bits for how in ({}, {"limit": 4}, {"cache": tmp_path / "c"})]
    assert bits == [11, 11, 11]
    assert capsys.readouterr().err.count("numbers of up to 11 bits") == 3
    data = folder(tmp_path / "images", cache=tmp_path / "c")
    assert data.bits == 11
    assert DataSpec.of(data).plain()["bits"] == 11
    old = ImageFolder(root=str(tmp_path / "images"), size=8, batch_size=4, workers=0, cache=tmp_path / "c")
    old.keep({})  # of a run from before its checkpoint told them
    old.prepare()
    assert old.bits == 16
    for wrong in (7, 10**400, "12", None, [12]):
        with pytest.raises(InputError, match="its images have no bits"):
            old.keep({"bits": wrong})
    assert "bits" not in DataSpec.of(folder(write_classes(tmp_path / "plain")[0].parent.parent)).plain()


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", -3)])
def test_numbers_that_have_no_range_are_refused(mode, value, tmp_path):
    Image.new(mode, (8, 8), value).save(tmp_path / "a.tif")
    with pytest.raises(
        InputError, match=r"a.tif cannot be read as an image \(it.* numbers .*save it with 8 or 16 bits"
    ):
        check_headers([tmp_path / "a.tif"])


def test_all_broken_files_are_told_at_once(tmp_path):
    files = write_classes(tmp_path, size=40)
    for k, kind in enumerate(("jpg", "png", "gif", "webp", "bmp", "tif", "ppm")):
        files.append(tmp_path / "ant" / f"cut{k}.{kind}")
        Image.fromarray(smooth(64, 64)).save(files[-1])
        files[-1].write_bytes(files[-1].read_bytes()[: files[-1].stat().st_size * 2 // 3])
    files[1].write_bytes(b"")
    files[9].write_text("<!DOCTYPE html>")
    with pytest.raises(
        InputError, match=r"9 of 31 images are refused: .* and 6 more; all are listed in (\S+): repair"
    ) as told:
        folder(tmp_path)
    (listed,) = re.findall(r"listed in (\S+):", str(told.value))
    lines = Path(listed).read_text().splitlines()
    Path(listed).unlink()
    broken = [files[1], files[9], *files[24:]]
    assert sorted(line.split(" ")[0] for line in lines) == sorted(map(str, broken))


def test_what_follows_the_end_of_a_picture_is_no_fault(tmp_path):
    for name in ("a.jpg", "a.png", "a.gif"):
        Image.fromarray(smooth(16, 16)).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"a film that a telephone adds" * 9)
    assert check_headers(sorted(tmp_path.iterdir())) is None


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a.png cannot be read as an image \(it is no file\)"):
        read_image(tmp_path / "a.png", 3, 8)


def harm(path):
    """Keeps the header and the end, and breaks the pixels between: the start-up check cannot see it."""
    whole = path.read_bytes()
    path.write_bytes(whole[:60] + bytes(len(whole) - 72) + whole[-12:])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_fails_late_is_one_line(workers, tmp_path, capsys):
    root = tmp_path / "images"
    harm(write_classes(root)[2])
    arguments = ["data=image_folder", f"data.root={root}", "data.size=8", "data.batch_size=4", "trainer=cpu"]
    arguments += ["scaling=unit", "progress=false", "threads=1", f"hydra.run.dir={tmp_path}/run"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, f"data.workers={workers}"])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"knep: {root}/ant/2.png cannot be read as an image (")
    assert "\n" not in error


def test_a_file_that_vanishes_is_named(tmp_path):
    root = tmp_path / "images"
    files = write_classes(root)
    data = folder(root)
    for path in files:
        path.unlink()
    with pytest.raises(InputError, match=r"\.png is missing"):
        next(iter(data.train_dataloader()))


def loader(files, workers, keep=False, epoch=1, **options):
    images = Images(files, torch.arange(len(files)), 3, 8, 10**6)
    made = FolderLoader(images, Batches(len(files), 4, **({"seed": 3} | options)), workers, keep)
    made.batch_sampler.set_epoch(epoch)
    return made


def taken(batches):
    return [y.tolist() for _, y in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_it_stopped(workers, tmp_path):
    files = write_classes(tmp_path)
    whole = taken(loader(files, 0))
    for stop in (1, 4, 5):
        first = loader(files, workers, keep=True)
        batches = iter(first)
        begun = [next(batches)[1].tolist() for _ in range(stop)]
        resumed = loader(files, workers)
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert begun + taken(resumed) == whole
        assert taken(resumed) == whole  # the next one is whole again
        batches.close()
        assert taken(first) == whole  # workers that were left in the middle, as by a limit on batches, start afresh


def test_after_its_last_batch_a_loader_stands_at_the_start(tmp_path):
    made = loader(write_classes(tmp_path), 0)
    assert len(taken(made)) == len(made) == 6
    assert made.state_dict() == {"position": 0}


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_two_ranks_see_what_one_sees(seed, drop_last, tmp_path):
    files = write_classes(tmp_path, count=7)[:18]
    alone = taken(loader(files, 0, seed=seed, drop_last=drop_last))
    ranks = [taken(loader(files, 0, seed=seed, drop_last=drop_last, rank=r, world=2)) for r in (0, 1)]
    together = [a + [k for k in b if k >= 0] for a, b in zip(*ranks, strict=True)]
    assert together == alone


def test_workers_do_not_shift_the_numbers_of_a_run(tmp_path):
    """Statistics of the pixels, weights drawn after reading them, order, augmentation: the same to the bit."""
    write_classes(tmp_path / "images")
    arguments = ["data=image_folder", f"data.root={tmp_path}/images", "data.size=8", "data.batch_size=4", "trainer=cpu"]
    arguments += ["scaling=standardize", "augment=shift_flip", "trainer.max_epochs=2", "progress=false", "threads=1"]
    states = []
    for name, more in {
        "0": ["data.workers=0"],
        "2": ["data.workers=2"],
        "cached": [f"data.cache={tmp_path}/c"],
    }.items():
        main([*arguments, *more, f"hydra.run.dir={tmp_path}/{name}"])
        states.append(torch.load(tmp_path / name / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"])
    for other in states[1:]:
        assert all(torch.equal(states[0][k], other[k]) for k in states[0])


def test_the_documents_commands_run(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_classes(tmp_path / "FOLDER", count=24)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "image_folder.md").read_text()
    commands = [line for line in text.split("```")[1].splitlines() if line.startswith("python train.py")]
    assert len(commands) == 2
    quick = ["trainer=cpu", "trainer.max_epochs=1", "data.batch_size=8", "data.workers=0", "progress=false"]
    for i, command in enumerate(commands):
        main([*shlex.split(command)[2:], *quick, f"hydra.run.dir={tmp_path}/run{i}"])
        assert (tmp_path / f"run{i}" / "summary.json").is_file()
    assert list((tmp_path / "cache").rglob("*.*"))
