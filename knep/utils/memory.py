"""The C library's allocator, told to keep the memory that a step frees for the next one."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import lru_cache

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # the names of parameters in mallopt(3)
_MOST = 2**31 - 1  # bytes at the top of the heap that are kept


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Whether freed memory stays with this process from here on, and no allocation is a mapping of its own: mallopt(3).

    By default glibc gives back what is larger than its thresholds (32 MiB at the most), so that activations are mapped
    anew in each step, and the kernel clears each page of them at the first touch: nearly half the time of a small
    convolutional network on a batch of 512. False, and nothing is changed, with another C library, a preloaded
    allocator (jemalloc, tcmalloc), or settings of the user's own (MALLOC_*, GLIBC_TUNABLES).
    """
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if own or "malloc" in os.environ.get("LD_PRELOAD", "") or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, _MOST))
