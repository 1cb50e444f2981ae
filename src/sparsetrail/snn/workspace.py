"""Memory for intermediate maps on a CPU, used again and given back."""

import bisect
import functools
import math
import mmap
import sys
import threading

import torch
from torch import Tensor


class Workspace:
    """Memory for intermediate maps that is used again as soon as no tensor refers to it; freed with its owner.

    Fresh memory costs a page fault every 4 KiB: on the machine measured, ten times the time of writing it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.held: dict[torch.dtype, list[tuple[int, torch.UntypedStorage]]] = {}  # by size

    def __deepcopy__(self, _memo: dict) -> "Workspace":
        return Workspace()

    def __reduce__(self):
        return Workspace, ()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor on the CPU."""
        count = -(-math.prod(shape) // 16384) * 16384  # rounded up, so that a batch a little smaller fits again
        with self.lock:
            blocks = self.held.setdefault(dtype, [])
            at = bisect.bisect_left(blocks, count, key=_size)
            while at < len(blocks) and blocks[at][0] <= 4 * count and _users(blocks[at][1]._cdata) != 1:
                at += 1
            if at == len(blocks) or blocks[at][0] > 4 * count:
                block = _block(count * dtype.itemsize)
                if _users is not _nobody:  # smaller ones that are free belong to smaller batches that are over
                    blocks[:] = [b for b in blocks if b[0] >= count or _users(b[1]._cdata) != 1]
                    bisect.insort_left(blocks, (count, block), key=_size)
            else:
                block = blocks[at][1]
            return torch.empty(0, dtype=dtype, device="cpu").set_(block, 0, shape, _strides(shape))


def _block(size: int) -> torch.UntypedStorage:
    """Fresh memory that goes back to the system as soon as nobody holds it: what `free` gets, a heap may keep."""
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANON}  # not shared by a fork
    try:
        fresh = torch.frombuffer(mmap.mmap(-1, size, **private), dtype=torch.uint8)
    except (OSError, OverflowError):  # no more of it: PyTorch says how much was asked for
        fresh = torch.empty(size, dtype=torch.uint8, device="cpu")
    return fresh.untyped_storage()


def _size(block: tuple[int, torch.UntypedStorage]) -> int:
    return block[0]


def _nobody(_: int) -> int:
    return 0


_users = getattr(torch._C, "_storage_Use_Count", _nobody)  # not public: without it memory is simply not used again


@functools.lru_cache(maxsize=1024)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    out, step = [], 1
    for n in reversed(shape):
        out.append(step)
        step *= n
    return tuple(reversed(out))


def maps(space: Workspace | None, m: int, c: int, h: int, w: int, like: Tensor) -> Tensor:
    """An uninitialised map tensor [m c h w], channels last in memory."""
    whole = (
        torch.empty((m, h, w, c), dtype=like.dtype, device="cpu")
        if space is None
        else space.take((m, h, w, c), like.dtype)
    )
    return whole.permute(0, 3, 1, 2)


def last(t: Tensor) -> Tensor:
    """The same maps, channels last in memory."""
    return t.contiguous(memory_format=torch.channels_last)
