"""Compressed streams that unpack to very many zeros, put together from one block instead of being compressed."""

from __future__ import annotations

import zlib


def bomb(start: bytes, size: int, wbits: int = 15) -> bytes:
    """A zlib (or, with wbits=31, gzip) stream of `start` and `size` zeros, a whole number of MiB.

    Its checksum is that of the first block: whoever reads on to the checksum has unpacked everything by then.
    """
    pack = zlib.compressobj(9, zlib.DEFLATED, wbits)
    first = pack.compress(start) + pack.flush(zlib.Z_FULL_FLUSH)
    block = pack.compress(bytes(1 << 20)) + pack.flush(zlib.Z_FULL_FLUSH)
    return first + block * (size >> 20) + pack.flush()
