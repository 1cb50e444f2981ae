"""What float32 means on a GPU: products in float32, or in TF32 (10 bits of mantissa)."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_lock, _asked = threading.Lock(), list[bool]()
_before: list[tuple[Any, str, Any]] = []  # what has the switch, what it is called there, how it was


@contextlib.contextmanager
def products(tf32: bool) -> Iterator[None]:
    """Inside this block a GPU takes float32 products in TF32, or in float32 itself.

    PyTorch's own default is TF32 for convolutions, which is neither: what is called fp32 here is fp32. The switch is
    the process's: of threads that ask for both at once the last one gets its way.
    """
    with _lock:
        if not _asked:
            _before[:] = _now()
        _asked.append(tf32)
        _set(_both(tf32))
    try:
        yield
    finally:
        with _lock:
            del _asked[len(_asked) - 1 - _asked[::-1].index(tf32)]
            _set(_both(_asked[-1]) if _asked else _before)


def in_full(f: Callable[P, T]) -> Callable[P, T]:
    """`f` with products in float32 itself, whosever network runs in it: no TF32, and no autocast around the call."""

    @functools.wraps(f)
    def run(*args: P.args, **more: P.kwargs) -> T:
        with contextlib.ExitStack() as inside:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    inside.enter_context(torch.autocast(device, enabled=False))
            if torch.cuda.is_available():
                inside.enter_context(products(tf32=False))
            return f(*args, **more)

    return run


def exact() -> bool:
    """Does a GPU take matrix products in float32 here and now, as far as PyTorch tells?"""
    try:
        return not torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        return False


def _both(tf32: bool) -> list[tuple[Any, str, Any]]:
    return [(where, "allow_tf32", tf32) for where in (torch.backends.cudnn, torch.backends.cuda.matmul)]


def _now() -> list[tuple[Any, str, Any]]:
    """The switches as they are; PyTorch does not tell those that were set by their names of 2.9 by the older ones."""
    try:
        return [(where, name, getattr(where, name)) for where, name, _ in _both(False)]
    except RuntimeError:
        cudnn: Any = torch.backends.cudnn
        layers = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
        return [(where, "fp32_precision", where.fp32_precision) for where in layers]


def _set(switches: list[tuple[Any, str, Any]]) -> None:
    for where, name, value in switches:
        setattr(where, name, value)
