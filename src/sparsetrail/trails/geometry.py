"""What kinds of operation there are, where a gradient can flow through one, and which share its geometry allows."""

import functools
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from sparsetrail._shapes import Bool

_FIRES = re.compile(r"IF|[A-Z]{0,2}LIF|Lif|[a-z]{0,2}lif|lif(node|cell)")  # LIFNode, PLIF, ParametricLIFNode


def kind_of(module: nn.Module) -> str:
    """conv, norm, pool, linear, add, neuron or the class name in lower case."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return "norm"
    if isinstance(module, nn.Linear):
        return "linear"
    name = type_before_parametrizations(module).__name__.lower()
    if "pool" in name:
        return "pool"
    if name == "join":
        return "add"
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", type_before_parametrizations(module).__name__)
    if "neuron" in name or any(w.lower() in ("node", "ifnode") or _FIRES.fullmatch(w) for w in words):
        return "neuron"
    return name


ENTRYWISE = (  # kinds in which one entry of the input leads to one of the output
    "neuron", "add", "normalise", "dropout", "dropout2d", "relu", "relu6", "leakyrelu", "elu", "gelu",
    "silu", "sigmoid", "tanh", "hardtanh", "softplus",
)  # fmt: skip
WINDOWED: dict[int, tuple[type[nn.Module], ...]] = {  # by the number of sides of the map
    1: (nn.Conv1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    2: (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    3: (nn.Conv3d, nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
}


def reach(
    module: nn.Module, arrived: Bool[Tensor, "..."], size: torch.Size, *, steps: int = 1
) -> Bool[Tensor, "..."] | None:
    """Which entries of an operation's input, of shape `size`, lead to no output or to one whose gradient is not zero.

    `arrived` says where the gradient at the output is not zero. A zero of the input gradient at such an entry is
    created by the operation, every other is passed on. What enters a neuron at one of `steps` leads to that step and
    all later ones, what enters a BatchNorm on batch statistics to its whole channel. None for an operation that is not
    known.
    """
    kind = kind_of(module)
    if kind == "norm":
        return _reach_norm(module, arrived)
    if isinstance(module, nn.Linear):
        return arrived.any(-1, keepdim=True).expand(size)
    if isinstance(module, nn.Flatten | nn.Unflatten):
        return arrived.reshape(size)
    if kind in ENTRYWISE:
        if arrived.shape != size:
            return None
        if kind != "neuron" or steps == 1:
            return arrived
        return (arrived.reshape(steps, -1).flip(0).cumsum(0) > 0).flip(0).reshape(size)
    sides = _sides(module, tuple(size), tuple(arrived.shape))
    if sides is None:
        return None
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _spread(arrived, sides)
    channel = len(size) - 1 - len(sides)  # an input leads to all channels of its group
    there = _spread(arrived.unflatten(channel, (module.groups, -1)).any(channel + 1), sides)
    return there.repeat_interleave(size[channel] // module.groups, channel)


def _reach_norm(module: nn.Module, arrived: Tensor) -> Tensor | None:
    if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return None
    if not module.training and module.running_mean is not None:
        return arrived
    sides = 3 if isinstance(module, nn.BatchNorm3d) else 2 if isinstance(module, nn.BatchNorm2d) else arrived.ndim - 2
    there = arrived
    for d in range(arrived.ndim):
        if d != arrived.ndim - 1 - sides:
            there = there.any(d, keepdim=True)
    return there.expand(arrived.shape)


def _spread(arrived: Tensor, sides: list[Tensor]) -> Tensor:
    """Input cells that lie in no window, or in one whose output has a gradient."""
    there, seen = arrived.float(), torch.ones((), dtype=torch.bool, device=arrived.device)
    for axis, side in zip(range(-len(sides), 0), sides, strict=True):
        side = side.to(arrived.device)
        there = (there.movedim(axis, -1) @ side.float()).movedim(-1, axis)
        seen = seen.unsqueeze(-1) & side.any(0)
    return (there > 0.5) | ~seen


def _sides(module: nn.Module, size: tuple[int, ...], out: tuple[int, ...]) -> list[Tensor] | None:
    """Which cells every window sees, a matrix [windows cells] for each side of the map; None where it is not known."""
    dims = next((d for d, kinds in WINDOWED.items() if isinstance(module, kinds)), None)
    if dims is None:
        return None
    cells, windows = size[-dims:], out[-dims:]
    if type(module).__name__.startswith("Adaptive"):
        return [_adaptive(c, w) for c, w in zip(cells, windows, strict=True)]
    knobs = zip(cells, *_knobs(module, dims), strict=True)
    return [_windows(*side, *_edge(module)) for side in knobs]


def density_cap(module: nn.Module, height: int, width: int) -> float:
    """Largest share of non-zero entries that the geometry of an operation allows in its input gradient, 0..1.

    A cell outside every window has no gradient; a max pool hands each window's gradient to one cell (the first
    maximum in row-major order where several tie), so at most one cell a window is reached. A 3x3/2 max pool with
    padding 1 on an even map: 1/4. A 1x1/2 convolution: exactly 1/4.
    """
    if not isinstance(module, nn.Conv2d | nn.AvgPool2d | nn.MaxPool2d):
        return 1.0
    knobs = zip((height, width), *_knobs(module, 2), strict=True)
    rows, columns = (_windows(*side, *_edge(module)) for side in knobs)
    cells = int(rows.any(0).sum()) * int(columns.any(0).sum())
    if isinstance(module, nn.MaxPool2d) or getattr(module, "one_a_window", False):
        cells = min(cells, len(rows) * len(columns))
    return cells / (height * width)


def maxpool_density_cap(size: int, kernel: int, stride: int, padding: int) -> float:
    """`density_cap` of a square max pool on a size x size map."""
    return density_cap(nn.MaxPool2d(kernel, stride, padding), size, size)


def strided_conv_density(size: int, kernel: int, stride: int, padding: int) -> float:
    """Share of cells that a square convolution on a size x size map sees at all."""
    return density_cap(nn.Conv2d(1, 1, kernel, stride, padding), size, size)


def _knobs(module: Any, dims: int) -> list[tuple]:
    """Kernel, stride, padding before and after, and dilation, one of each a side."""
    kernel = _each(module.kernel_size, dims)
    stride, dilation = _each(module.stride, dims), _each(getattr(module, "dilation", 1), dims)
    if module.padding == "same":
        whole = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [kernel, stride, tuple(w // 2 for w in whole), tuple(w - w // 2 for w in whole), dilation]
    padding = _each(0 if module.padding == "valid" else module.padding, dims)
    return [kernel, stride, padding, padding, dilation]


def _edge(module: nn.Module) -> tuple[bool, str]:
    """Whether windows may go over the edge, and what they see there."""
    return getattr(module, "ceil_mode", False), getattr(module, "padding_mode", "zeros")


def _each(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))


@functools.lru_cache(maxsize=256)
def _windows(
    size: int, kernel: int, stride: int, before: int, after: int, dilation: int, ceil: bool, padding: str
) -> Bool[Tensor, "windows cells"]:
    """Which cells of one side of a map lie in each window, with what a padding mode puts beyond the edge."""
    room = size + before + after - dilation * (kernel - 1) - 1
    count = -(-room // stride) + 1 if ceil else room // stride + 1
    if ceil and (count - 1) * stride >= size + before:  # PyTorch drops a window that would start beyond the map
        count -= 1
    seen = torch.zeros(count, size, dtype=torch.bool)
    for i in range(count):
        for c in range(i * stride - before, i * stride - before + kernel * dilation, dilation):
            if padding == "circular":
                c %= size
            elif padding == "replicate":
                c = min(max(c, 0), size - 1)
            elif padding == "reflect":
                c = abs(c) if c < size else 2 * (size - 1) - c
            if 0 <= c < size:
                seen[i, c] = True
    return seen


@functools.lru_cache(maxsize=256)
def _adaptive(size: int, count: int) -> Bool[Tensor, "windows cells"]:
    seen = torch.zeros(count, size, dtype=torch.bool)
    for i in range(count):
        seen[i, i * size // count : -(-(i + 1) * size // count)] = True
    return seen
