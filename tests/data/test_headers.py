"""Readers of headers against the libraries that write the files: WebP's canvas, MATLAB's arrays."""

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from knep.data.formats import canvas_of
from knep.data.matlab import read_bytes_arrays


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"lossless": True}),
        ("RGBA", {}),
        ("RGB", {"save_all": True, "append_images": [Image.new("RGB", (37, 91), "red")]}),
        ("RGB", {"exif": b"Exif\0\0"}),
    ],
)
def test_the_canvas_of_a_webp(mode, options, tmp_path):
    Image.new(mode, (37, 91)).save(tmp_path / "a.webp", **options)
    assert canvas_of((tmp_path / "a.webp").read_bytes()) == (37, 91)


def test_no_webp_has_no_canvas(tmp_path):
    Image.new("RGB", (37, 91)).save(tmp_path / "a.png")
    (tmp_path / "b.webp").write_bytes(b"RIFF")
    assert canvas_of((tmp_path / "a.png").read_bytes()) is None
    assert canvas_of((tmp_path / "b.webp").read_bytes()) is None


@pytest.mark.parametrize("packed", [False, True])
def test_arrays_of_bytes_are_those_that_scipy_wrote(packed, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    y = np.arange(5, dtype=np.uint8)[:, None]
    other = {"a": np.zeros((3, 3)), "X": x, "s": "text", "y": y, "z": np.ones((2, 2), np.uint8)}
    savemat(tmp_path / "a.mat", other, do_compression=packed)
    found = read_bytes_arrays(tmp_path / "a.mat", ("X", "y"), 1 << 20)
    assert sorted(found) == ["X", "y"]
    assert np.array_equal(found["X"], x)
    assert np.array_equal(found["y"], y)
    with pytest.raises(ValueError, match="promises"):
        read_bytes_arrays(tmp_path / "a.mat", ("X",), 1000)
