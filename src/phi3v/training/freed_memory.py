"""Memory that a training on a CPU frees goes back to the system, so that a step takes what its tensors take.

glibc keeps freed pieces of up to 32 MiB for later, in a heap that can only shrink at its end: activations of many sizes
leave it full of holes, and a process holds up to twice what its tensors need. Pieces that are mapped by themselves go
back when they are freed. Knows no recipe and no model.
"""

import ctypes
import os
import sys

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
