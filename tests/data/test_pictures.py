"""Pictures by a table or beside masks: what is read, and a line for each bad row."""

import numpy as np
import pytest
import torch
from PIL import Image

from knep.data.own.pictures import ImageCsv, ImageMasks, read_mask
from knep.errors import InputError

rng = np.random.default_rng(0)


def picture(path, width=20, height=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)


def table(folder, header="path,kind,tags,age", count=40, **more):
    lines = [header]
    for k in range(count):
        picture(folder / "pics" / f"{k}.png")
        lines.append(f"pics/{k}.png,{'ab'[k % 2]},{';'.join('xyz'[: k % 4])},{20.5 + k}")
    lines += more.get("lines", [])
    (folder / "t.csv").write_text("\n".join(lines))
    return str(folder / "t.csv")


def listed(path, target, task, **more):
    data = ImageCsv(path=path, target=target, task=task, size=8, batch_size=4, **more)
    data.prepare()
    return data


def test_a_table_gives_classes_labels_or_numbers(tmp_path):
    path = table(tmp_path)
    data = listed(path, "kind", "multiclass")
    assert (data.class_names, data.channels, data.image_size, data.shape) == (["a", "b"], 3, 8, None)
    assert data.sizes == {"train": 28, "val": 4, "test": 8}
    assert torch.bincount(data._splits["test"][1]).tolist() == [4, 4]
    assert listed(path, "tags", "multilabel").class_names == ["x", "y", "z"]
    assert listed(path, "age", "regression", channels=1).target == "number"
    x, _ = next(iter(data.train_dataloader()))
    assert (x.dtype, x.shape) == (torch.uint8, (4, 3, 8, 8))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("../secret.png,a,,1", "leads out of"),
        ("/etc/passwd,a,,1", "leads out of"),
        (",a,,1", "leads out of"),
        ("pics/gone.png,a,,1", "is missing"),
        ("pics/text.png,a,,1", "cannot be read as an image"),
        ("pics/link.png,a,,1", "link that leaves"),
    ],
)
def test_a_bad_row_is_refused_in_a_line(line, said, tmp_path):
    folder = tmp_path / "in"
    picture(tmp_path / "secret.png")
    path = table(folder, lines=[line])
    (folder / "pics" / "text.png").write_text("no picture")
    (folder / "pics" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(InputError, match=said) as error:
        listed(path, "kind", "multiclass")
    assert "\n" not in str(error.value)


def test_a_table_says_what_it_lacks(tmp_path):
    path = table(tmp_path)
    for target, task, more, said in (
        ("age", "multiclass", {}, "write task=regression"),
        ("kind", "multiclass", {"images": "file"}, r"data.images=file is no column"),
        ("kind", "segmentation", {}, "with data=image_csv"),
        ("kind", "multiclass", {"size": 4}, r"data.size=4"),
        ("kind", "multiclass", {"channels": 2}, r"data.channels=2"),
    ):
        with pytest.raises(InputError, match=said):
            ImageCsv(path=path, target=target, task=task, **more).prepare()


def pair(folder, stem, values=None, size=(16, 20)):
    picture(folder / "images" / f"{stem}.jpg", size[1], size[0])
    (folder / "masks").mkdir(exist_ok=True)
    mask = rng.integers(0, 3, size, dtype=np.uint8) if values is None else np.full(size, values, dtype=np.uint8)
    Image.fromarray(mask).save(folder / "masks" / f"{stem}.png")


def masked(folder, **more):
    data = ImageMasks(root=str(folder), size=8, batch_size=4, **more)
    data.prepare()
    return data


def test_images_and_masks(tmp_path):
    for k in range(20):
        pair(tmp_path, f"p{k}")
    pair(tmp_path, "void", 255)
    data = masked(tmp_path)
    assert (data.target, data.num_classes, data.sizes) == ("mask", 3, {"train": 15, "val": 2, "test": 4})
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, y.shape, y.dtype) == ((4, 3, 8, 8), (4, 8, 8), torch.int64)
    assert masked(tmp_path, classes=["sky", "sea", "land", "ship"]).class_names[3] == "ship"
    with pytest.raises(InputError, match=r"the class 2, and 2 are named"):
        masked(tmp_path, classes=["sky", "sea"])


def test_a_mask_is_cut_as_its_image_without_mixing_classes(tmp_path):
    mask = np.zeros((8, 16), dtype=np.uint8)
    mask[:, 8:] = 7
    picture(tmp_path / "i.png", 16, 8)
    Image.fromarray(mask).save(tmp_path / "m.png")
    y = read_mask(tmp_path / "m.png", tmp_path / "i.png", 8)
    assert y[:, :4].eq(0).all()
    assert y[:, 4:].eq(7).all()


def test_masks_that_do_not_fit_are_refused_in_a_line(tmp_path):
    for k in range(6):
        pair(tmp_path, f"p{k}")
    with pytest.raises(InputError, match=r"needs data.root"):
        ImageMasks().prepare()
    with pytest.raises(InputError, match="images is missing"):
        masked(tmp_path / "nowhere")
    picture(tmp_path / "images" / "alone.jpg")
    with pytest.raises(InputError, match="has no mask of its name"):
        masked(tmp_path)
    Image.fromarray(np.zeros((5, 5), dtype=np.uint8)).save(tmp_path / "masks" / "alone.png")
    with pytest.raises(InputError, match="5 x 5 pixels and its image 20 x 16"):
        masked(tmp_path)
    picture(tmp_path / "masks" / "alone.png")
    with pytest.raises(InputError, match="is in mode RGB"):
        masked(tmp_path)
    (tmp_path / "masks" / "alone.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be read as a mask"):
        masked(tmp_path)


def test_masks_of_black_and_white_are_refused_with_what_to_save(tmp_path):
    for stem in "abcdef":
        pair(tmp_path, stem, np.array([[0, 255], [255, 0]]).repeat(8, 0).repeat(10, 1))
    with pytest.raises(InputError, match="1 where 255 stands"):
        masked(tmp_path)


def test_a_mask_of_three_equal_colours_is_one_of_greys(tmp_path):
    for k in range(6):
        pair(tmp_path, f"p{k}")
    grey = read_mask(tmp_path / "masks/p0.png", tmp_path / "images/p0.jpg", 8)
    with Image.open(tmp_path / "masks/p0.png") as mask:
        mask.convert("RGB").save(tmp_path / "masks/p0.png")
    assert torch.equal(read_mask(tmp_path / "masks/p0.png", tmp_path / "images/p0.jpg", 8), grey)
    with Image.open(tmp_path / "masks/p0.png") as mask:
        mask.putpixel((0, 0), (1, 2, 3))
        mask.save(tmp_path / "masks/p0.png")
    with pytest.raises(InputError, match="is in mode RGB"):
        read_mask(tmp_path / "masks/p0.png", tmp_path / "images/p0.jpg", 8)
