"""Convolutions on maps of at most 2x2 as the one dense product they are, on any device.

Every output cell sees a window of the taps, so the whole map is one matrix: exactly the same sum, by an algorithm that
suits small maps where no kernel of the engine serves (a GPU, or a CPU without a compiler). Maps and matrices are
channels last, so that nothing is copied but the matrix.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrail.core.precision import exact, products
from sparsetrail.snn import kernels

TINY = 4  # cells of the input map up to which the dense product is taken: 1x1 and 2x2
Span = tuple[slice, slice]


@functools.cache
def _windows(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> tuple[tuple[int, int], list[tuple[Span, Span]]]:
    """The output map's size and, of each of its cells, the input cells that it sees and the taps that join them."""
    out = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True)]
    lines: list[list[tuple[slice, slice]]] = []
    for n, k, s, p, many in zip(size, kernel, stride, padding, out, strict=True):
        lines.append([])
        for o in range(many):
            first = o * s - p  # where tap 0 lies
            low, high = max(first, 0), max(min(n, first + k), max(first, 0))
            lines[-1].append((slice(low, high), slice(low - first, high - first)))
    return (out[0], out[1]), [((a, b), (c, d)) for a, c in lines[0] for b, d in lines[1]]


def suits(x: Tensor, conv: nn.Conv2d, weight: Tensor) -> bool:
    """Is `conv` on a map of this size better done as one product?"""
    return (
        x.ndim == 4
        and x.shape[2] * x.shape[3] <= TINY
        and min(x.shape) > 0
        and conv.kernel_size != (1, 1)
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and all(p < k for p, k in zip(conv.padding, conv.kernel_size, strict=True))
        and min(n + 2 * p - k for n, p, k in zip(x.shape[2:], conv.padding, conv.kernel_size, strict=True)) >= 0
        and x.shape[1] == conv.in_channels
        and not kernels.overseen(x, weight)
        and (x.dtype == weight.dtype or (_autocast(x) is not None and x.is_floating_point()))
    )


def _autocast(x: Tensor) -> torch.dtype | None:
    """The type that autocast would give products of `x` here, if any."""
    device = x.device.type
    on = device in ("cpu", "cuda") and x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def convolve(x: Tensor, conv: nn.Conv2d, weight: Tensor, *, half: bool = False) -> Tensor:
    """`conv(x)` as one product; `half` takes that of the input gradient in bf16."""
    y = _Dense.apply(x, weight, conv.stride, conv.padding, half)
    return y if conv.bias is None else y + conv.bias.to(y.dtype).view(-1, 1, 1)


def as_its_forward(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """A backward in the types of its forward, and in float32 where that was (`ctx.exact`), whatever is set by now."""

    @functools.wraps(backward)
    def plainly(ctx: Any, grad: Tensor) -> Any:
        exact = products(tf32=False) if ctx.exact else contextlib.nullcontext()
        with torch.autocast(grad.device.type, enabled=False), exact:
            return backward(ctx, grad)

    return plainly


class _Dense(torch.autograd.Function):
    """y [m d p q] = x [m c h w] times the matrix of a weight [d c kh kw]."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], half: bool
    ) -> Tensor:
        kind = _autocast(x) or weight.dtype
        m, _, h, w = x.shape
        (p, q), windows = _windows((h, w), tuple(weight.shape[2:]), tuple(stride), tuple(padding))  # type: ignore[arg-type]
        matrix = _matrix(weight.to(kind), windows, (h, w))
        y = torch.empty((m, len(weight), p, q), dtype=kind, device=x.device, memory_format=torch.channels_last)
        torch.mm(_seen(x.to(kind), windows), matrix.T, out=y.permute(0, 2, 3, 1).view(m, -1))
        ctx.windows, ctx.knobs, ctx.size, ctx.kind, ctx.half = windows, (stride, padding), x.shape, kind, half
        ctx.exact = x.is_cuda and exact()
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, weight, matrix if ctx.needs_input_grad[0] else None
        )
        return y

    @staticmethod
    @as_its_forward
    def backward(ctx, grad: Tensor):
        (x, weight, matrix), windows, wants = ctx.saved_tensors, ctx.windows, ctx.needs_input_grad
        if kernels.differentiable(grad):
            return *plain_backward(wants, grad, x, weight, ctx.size, *ctx.knobs), None, None, None
        flat, (m, c, h, w) = grad.permute(0, 2, 3, 1).reshape(len(grad), -1).to(ctx.kind), ctx.size
        dx = dw = None
        if wants[0]:
            dx = (flat.bfloat16() @ matrix.bfloat16()).to(ctx.kind) if ctx.half else flat @ matrix
            if len(windows) == 1:
                (rows, columns), _ = windows[0]
                part = dx.view(m, rows.stop - rows.start, columns.stop - columns.start, c)
                dx = part if part.shape[1:3] == (h, w) else part.new_zeros(m, h, w, c)
                if dx is not part:
                    dx[:, rows, columns] = part
            dx = dx.view(m, h, w, c).permute(0, 3, 1, 2)
        if wants[1]:
            dw = torch.zeros_like(weight)
            into, found = dw.permute(0, 2, 3, 1), flat.T @ _seen(x.to(ctx.kind), windows)
            if len(windows) == 1:
                (rows, columns), (a, b) = windows[0]
                into[:, a, b] = found.view(-1, rows.stop - rows.start, columns.stop - columns.start, c)
            else:
                for one, ((rows, columns), (a, b)) in zip(found.view(-1, len(weight), h, w, c), windows, strict=True):
                    into[:, a, b] += one[:, rows, columns]
        return dx, dw, None, None, None


def _seen(x: Tensor, windows: list[tuple[Span, Span]]) -> Tensor:
    """The cells of each example in a row [m (h w c)]: those that a single output cell sees, or all."""
    cells = x.permute(0, 2, 3, 1)
    if len(windows) == 1:
        rows, columns = windows[0][0]
        cells = cells[:, rows, columns]
    return cells.reshape(len(x), -1)


def _matrix(weight: Tensor, windows: list[tuple[Span, Span]], size: tuple[int, int]) -> Tensor:
    """The taps as a matrix [(p q d) (h w c)], zero where an output cell does not see an input cell."""
    taps = weight.detach().permute(0, 2, 3, 1)
    if len(windows) == 1:
        a, b = windows[0][1]
        return taps[:, a, b].flatten(1)
    d, c, every = len(weight), weight.shape[1], (slice(0, size[0]), slice(0, size[1]))
    if all(cells == every for cells, _ in windows):
        whole = torch.stack([taps[:, a, b] for _, (a, b) in windows])
    else:
        whole = taps.new_zeros(len(windows), d, *size, c)
        for one, (cells, (a, b)) in zip(whole, windows, strict=True):
            one[:, cells[0], cells[1]] = taps[:, a, b]
    return whole.view(len(windows) * d, -1)


def plain_backward(
    wants: tuple[bool, ...], grad: Tensor, x: Tensor | None, weight: Tensor, size: tuple[int, ...], stride, padding
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a convolution's input and weight by differentiable operations, for second derivatives."""
    knobs, kind = {"stride": stride, "padding": padding}, grad.dtype
    dx = torch.nn.grad.conv2d_input(size, weight.to(kind), grad, **knobs) if wants[0] else None
    dw = torch.nn.grad.conv2d_weight(x.to(kind), weight.shape, grad, **knobs) if wants[1] and x is not None else None
    return dx, dw
