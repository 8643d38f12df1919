"""What torch's CUDA caching allocator makes of a request: the bytes of the block that a tensor gets.

By its own constants (`c10/core/AllocatorConfig.h`, `c10/cuda/CUDACachingAllocator.cpp`, torch 2.13) a request is
rounded up to 512 bytes and served from a segment that is allocated on the device: of 2 MiB for requests up to 1 MiB, of
20 MiB for those below 10 MiB, and above that of the request's own size rounded up to 2 MiB. What is left of a large
segment is split off for others if it is more than 1 MiB, and belongs to the block if not.

`torch.cuda.max_memory_allocated` adds up blocks, so these are the bytes that a peak on CUDA is made of.

Known gaps: a block that is reused may be larger by up to 1 MiB than a new one. What the device lends is segments, which
are more than the blocks in them: at least one segment of 2 and one of 20 MiB are partly free (`PARTLY_FREE`), and
fragmentation adds what depends on the order of requests. `PYTORCH_CUDA_ALLOC_CONF` changes all of it.
"""

from __future__ import annotations

MIB = 1 << 20
ROUNDING = 512
SMALL = 1 * MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT = 10 * MIB
SEGMENT_ROUNDING = 2 * MIB
# What stays free in the last segment of each pool, at most.
PARTLY_FREE = SMALL_SEGMENT + LARGE_SEGMENT


def block_bytes(size: int) -> int:
    """Bytes of the block that a tensor of `size` bytes gets; none for an empty one."""
    block = -(-size // ROUNDING) * ROUNDING
    if block < OWN_SEGMENT:
        return block
    segment = -(-block // SEGMENT_ROUNDING) * SEGMENT_ROUNDING
    return segment if segment - block <= SMALL else block


def allocated_bytes(size: int, device: str) -> int:
    """What the allocator of a type of device gives a tensor of this `size`: on CUDA a block, elsewhere its bytes."""
    return block_bytes(size) if device == "cuda" else size
