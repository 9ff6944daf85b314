"""Memory that a training on a CPU frees goes back to the system, so that a step takes what its tensors take.

glibc keeps freed pieces of up to 32 MiB for later, in a heap that can only shrink at its end: activations of many sizes
leave it full of holes, and a process holds up to twice what its tensors need. Pieces that are mapped by themselves go
back when they are freed. And a weight file is mapped as a whole: while one weight lies on it, each page that was ever
read stays in the process, of matrices too that were cut to 4 bits long ago. Knows no recipe and no model.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

MAPPED_FROM = 2**20
"""Bytes from which a piece is mapped by itself: nearly all activations of a model of real size are larger."""

_M_MMAP_THRESHOLD = -3  # of malloc.h
_BY_HAND = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def give_back_freed() -> bool:
    """Has this process give large pieces back as soon as they are free, from now on; whether it will.

    What the environment says of glibc's heap stays; other allocators and systems are left as they are.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _BY_HAND):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return set_option is not None and set_option(_M_MMAP_THRESHOLD, MAPPED_FROM) == 1


def leave_unused_pages(model: torch.nn.Module) -> int:
    """Takes pages of weight files on which no weight of a model lies out of this process; how many bytes of files.

    Call it when the model is loaded and nothing but the model holds tensors of its files: what another one has written
    to such a page would be read from the file again. Pages stay in the system's cache. Elsewhere than on Linux: 0.
    """
    advise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform.startswith("linux") else None
    if advise is None:
        return 0
    tensors = (*model.parameters(), *model.buffers())
    held = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    used = sorted({(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in held})
    left = 0
    for start, end in _mapped_files():
        inside = [(first, last) for first, last in used if first < end and last > start]
        if not inside:
            continue  # a library, or another model's
        gap = start
        for first, last in [*inside, (end, end)]:
            begins, size = _whole_pages(gap, first)
            if size and advise(ctypes.c_void_p(begins), ctypes.c_size_t(size), mmap.MADV_DONTNEED) == 0:
                left += size
            gap = max(gap, last)  # one weight may lie within another
    return left


def _whole_pages(start: int, end: int) -> tuple[int, int]:
    """Address and bytes of the pages that lie between two addresses as a whole."""
    first, last = -(-start // mmap.PAGESIZE), end // mmap.PAGESIZE
    return first * mmap.PAGESIZE, max(last - first, 0) * mmap.PAGESIZE


def _mapped_files() -> Iterator[tuple[int, int]]:
    """First address and end of each mapping of a file in this process.

    Names are not looked at: a file of the hub's cache is mapped by the name of its blob, which has no suffix.
    """
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        place, _, _, _, inode, *_ = line.split()
        if inode != "0":
            start, _, end = place.partition("-")
            yield int(start, 16), int(end, 16)
