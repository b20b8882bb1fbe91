"""Classes of image files by a trained run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from knep.data.images import read_image
from knep.evaluate import load_members


@torch.no_grad()
def predict(run: Path, images: Iterable[Path], top: int = 3) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
    """(path, [(class name, probability), ...]) of each image, likeliest first; ensembles average probabilities."""
    members = load_members(run)
    facts = members[0].about
    for path in images:
        x_NCHW = read_image(path, facts["channels"], facts["image_size"], bits=facts.get("bits", 16))[None]
        p_K = torch.stack([m(x_NCHW).softmax(1)[0] for m in members]).mean(0)
        values, order = p_K.topk(min(top, len(p_K)))
        yield path, [(facts["class_names"][int(k)], float(v)) for k, v in zip(order, values, strict=True)]
