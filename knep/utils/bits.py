"""Yes and no of many images as a short text: `359:eJz...`, their number and their bits, compressed."""

from __future__ import annotations

import base64
import binascii
import zlib

import numpy as np


def packed(bits_N: np.ndarray) -> str:
    """Booleans as text; about a bit each, less where nearly all are equal."""
    squeezed = zlib.compress(np.packbits(bits_N.astype(bool)).tobytes(), 9)
    return f"{len(bits_N)}:{base64.b64encode(squeezed).decode()}"


def unpacked(text: str) -> np.ndarray:
    """The booleans of `packed`. Raises ValueError for a text that is none."""
    count, _, squeezed = text.partition(":")
    try:
        wanted = int(count)
        whole = zlib.decompressobj().decompress(base64.b64decode(squeezed, validate=True), (wanted + 7) // 8 + 1)
        bits_N = np.unpackbits(np.frombuffer(whole, np.uint8))
    except (binascii.Error, zlib.error, OverflowError) as error:
        raise ValueError(f"{text[:20]}... is no packed row of bits: {error}") from error
    if not 0 <= len(bits_N) - wanted < 8:
        raise ValueError(f"{text[:20]}... says {wanted} bits and holds {len(bits_N)}")
    return bits_N[:wanted].astype(bool)
