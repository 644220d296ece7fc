"""Memory of large arrays on CPU: kept between uses where work makes and drops many of them."""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4  # of malloc.h
LARGEST = 2**31 - 1
AS_GLIBC_ENDS_UP = {MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20, TOP_PAD: 128 << 10, MMAP_MAX: 1 << 16}


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """While this lasts, glibc keeps freed memory for the next buffers; at the end it gives back what is free.

    Otherwise it maps every buffer above 32 MB anew and hands the top of its heap back, and the first touch of every
    page costs time: about a tenth of scoring, and of making a cache. It does nothing with another C library.
    """
    libc = ctypes.CDLL(None) if Path("/proc").is_dir() else None
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, LARGEST)
    libc.mallopt(TOP_PAD, 64 << 20)
    try:
        yield
    finally:
        for parameter, value in AS_GLIBC_ENDS_UP.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)
