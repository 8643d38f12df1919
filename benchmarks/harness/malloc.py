"""What glibc does with memory that is freed; elsewhere nothing changes, or `OSError` is raised where it matters."""

from __future__ import annotations

import ctypes

# Numbers of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Reuse large blocks instead of mapping new ones: page faults would cost more than kernels do."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            library.mallopt(option, 1 << 30)


def map_every_block() -> None:
    """Map blocks of 64 KiB and more one by one, and return what is free. Raises `OSError` where there is no glibc."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(_MMAP_THRESHOLD, 64 << 10)
    libc.mallopt(_TRIM_THRESHOLD, 0)


def return_freed_memory() -> None:
    """To the system, all of it. Raises `OSError` where there is no glibc."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
