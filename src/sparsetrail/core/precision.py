"""What float32 means on a GPU: products in float32, or in TF32 (10 bits of mantissa)."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_lock, _asked = threading.Lock(), list[bool]()
_before: list[bool] = []


@contextlib.contextmanager
def products(tf32: bool) -> Iterator[None]:
    """Inside this block a GPU takes float32 products in TF32, or in float32 itself.

    PyTorch's own default is TF32 for convolutions, which is neither: what is called fp32 here is fp32. The switch is
    the process's: of threads that ask for both at once the last one gets its way.
    """
    where: tuple[Any, Any] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    with _lock:
        if not _asked:
            _before[:] = [w.allow_tf32 for w in where]
        _asked.append(tf32)
        _set(where, [tf32] * len(where))
    try:
        yield
    finally:
        with _lock:
            del _asked[len(_asked) - 1 - _asked[::-1].index(tf32)]
            _set(where, [_asked[-1]] * len(where) if _asked else _before)


def _set(where: tuple[Any, Any], values: list[bool]) -> None:
    for w, value in zip(where, values, strict=True):
        w.allow_tf32 = value
