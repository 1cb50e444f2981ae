"""Convolutions on maps of at most 2x2 as the one dense product they are, on any device.

Every output cell sees a fixed subset of the taps, so the whole map is one matrix: exactly the same sum, by an algorithm
that suits small maps where no kernel of the engine serves (a GPU, or a CPU without a compiler).
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TINY = 4  # cells of the input map up to which the dense product is taken: 1x1 and 2x2


@functools.lru_cache(maxsize=256)
def _taps(size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """For output cell o and input cell i the index of the kernel tap that joins them, or kernel area for none."""
    (h, w), (kh, kw) = size, kernel
    ho, wo = (h + 2 * padding[0] - kh) // stride[0] + 1, (w + 2 * padding[1] - kw) // stride[1] + 1
    with torch.inference_mode(False):  # cached: must serve autograd later, whoever asks first
        index = torch.full((ho, wo, h, w), kh * kw, device="cpu")
    for a in range(ho):
        for b in range(wo):
            for i in range(h):
                for j in range(w):
                    p, q = i - a * stride[0] + padding[0], j - b * stride[1] + padding[1]
                    if 0 <= p < kh and 0 <= q < kw:
                        index[a, b, i, j] = p * kw + q
    return index


def dense_weight(weight: Tensor, taps: Tensor) -> tuple[Tensor, Tensor | None]:
    """The matrix [(d p q) (c used)] of a convolution over a whole tiny map, and the input cells it uses (None: all)."""
    ho, wo = taps.shape[:2]
    w = weight.flatten(2)
    if ho == wo == 1:  # each input cell meets at most one tap: a slice
        seen = taps.flatten()
        used = seen < w.shape[2]
        if bool(used.all()):
            return w[:, :, seen].flatten(1), None
        return w[:, :, seen[used]].flatten(1), used
    w = torch.cat([w, w.new_zeros(*w.shape[:2], 1)], 2)[:, :, taps.flatten()]  # [d c (p q h w)]
    return w.unflatten(2, (ho * wo, -1)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1), None


def dense_taps(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The tap table of `conv` on maps of the size of `x`."""
    kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
    assert not isinstance(padding, str) and len(kernel) == len(stride) == len(padding) == 2
    return _taps((x.shape[2], x.shape[3]), kernel, stride, padding).to(x.device)  # type: ignore[arg-type]


def dense_product(x: Tensor, w: Tensor, used: Tensor | None, bias: Tensor | None, out: tuple[int, ...]) -> Tensor:
    """The matrix of `dense_weight` applied to maps [m c h w]; `out` is the size of the output map."""
    cells = x.flatten(2) if used is None else x.flatten(2)[:, :, used]
    if bias is not None:
        bias = bias.repeat_interleave(out[0] * out[1])
    return F.linear(cells.flatten(1), w, bias).reshape(len(x), -1, *out)


def suits(x: Tensor, conv: nn.Conv2d) -> bool:
    """Is `conv` on a map of this size better done as one product?"""
    return (
        x.ndim == 4
        and x.shape[2] * x.shape[3] <= TINY
        and conv.kernel_size != (1, 1)
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def convolve(x: Tensor, conv: nn.Conv2d, made: dict[Any, Any]) -> Tensor:
    """`conv(x)` as one product; the matrix of a frozen weight is kept in `made`."""
    taps = dense_taps(x, conv)
    out = tuple(taps.shape[:2])
    if conv.weight.requires_grad:
        return dense_product(x, *dense_weight(conv.weight, taps), conv.bias, out)
    key = ("dense", x.shape[2:], conv.weight.data_ptr(), conv.weight._version)
    if key not in made:
        if len(made) >= 4:
            made.clear()
        made[key] = dense_weight(conv.weight, taps)
    w, used = made[key]
    return dense_product(x, w, used, conv.bias, out)
