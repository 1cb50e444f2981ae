"""Convolutions on maps of at most 2x2 as the one dense product they are, on any device.

Every output cell sees a fixed subset of the taps, so the whole map is one matrix: exactly the same sum, by an algorithm
that suits small maps where no kernel of the engine serves (a GPU, or a CPU without a compiler).
"""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TINY = 4  # cells of the input map up to which the dense product is taken: 1x1 and 2x2


@functools.cache
def _taps(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """For output cell o and input cell i the index of the kernel tap that joins them, or kernel area for none."""
    (h, w), (kh, kw) = size, kernel
    ho, wo = (h + 2 * padding[0] - kh) // stride[0] + 1, (w + 2 * padding[1] - kw) // stride[1] + 1
    index = [kh * kw] * (ho * wo * h * w)
    for o in range(ho * wo):
        for i in range(h * w):
            p = i // w - o // wo * stride[0] + padding[0]
            q = i % w - o % wo * stride[1] + padding[1]
            if 0 <= p < kh and 0 <= q < kw:
                index[o * h * w + i] = p * kw + q
    with torch.inference_mode(False):  # kept: must serve autograd later, whoever asks first
        return torch.tensor(index, device=device)


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
        and all(p < k for p, k in zip(conv.padding, conv.kernel_size, strict=True))
    )


def convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv(x)` as one product."""
    padding = conv.padding
    assert not isinstance(padding, str)
    (h, w), (kh, kw), (ph, pw) = x.shape[2:], conv.kernel_size, padding
    ho, wo = (h + 2 * ph - kh) // conv.stride[0] + 1, (w + 2 * pw - kw) // conv.stride[1] + 1
    if ho == wo == 1:  # each input cell meets one tap: slices
        h, w = min(kh - ph, h), min(kw - pw, w)
        matrix, cells = conv.weight[:, :, ph : ph + h, pw : pw + w], x[:, :, :h, :w]
        return F.linear(cells.flatten(1), matrix.flatten(1), conv.bias)[:, :, None, None]
    taps = _taps((h, w), (kh, kw), (conv.stride[0], conv.stride[1]), (ph, pw), x.device)
    weight = conv.weight.flatten(2)
    weight = torch.cat([weight, weight.new_zeros(*weight.shape[:2], 1)], 2).index_select(2, taps)  # [d c (p q h w)]
    matrix = weight.unflatten(2, (ho * wo, -1)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)  # [(d p q) (c h w)]
    bias = None if conv.bias is None else conv.bias.repeat_interleave(ho * wo)
    return F.linear(x.flatten(1), matrix, bias).reshape(len(x), -1, ho, wo)
