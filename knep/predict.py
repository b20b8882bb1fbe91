"""Classes of image files by a trained run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import center_crop, resize

from knep.errors import InputError
from knep.evaluate import load_members


def read_image(path: Path, channels: int, size: int) -> Tensor:
    """One image file as the model's raw input: uint8 (1, channels, size, size), short side resized, centre cropped.

    Raises InputError for a file that is missing or no image.
    """
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    try:
        image = decode_image(str(path), mode=mode)
    except (RuntimeError, ValueError) as error:
        what = "cannot be read as an image" if path.is_file() else "is missing"
        raise InputError(f"{path} {what}: give PNG, JPEG, WebP or GIF files") from error
    return center_crop(resize(image, [size], antialias=True), [size, size])[None]


@torch.no_grad()
def predict(run: Path, images: Iterable[Path], top: int = 3) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
    """(path, [(class name, probability), ...]) of each image, likeliest first; ensembles average probabilities."""
    members = load_members(run)
    facts = members[0].about
    for path in images:
        x_NCHW = read_image(path, facts["channels"], facts["image_size"])
        p_K = torch.stack([m(x_NCHW).softmax(1)[0] for m in members]).mean(0)
        values, order = p_K.topk(min(top, len(p_K)))
        yield path, [(facts["class_names"][int(k)], float(v)) for k, v in zip(order, values, strict=True)]
