"""Exact fast paths: the same numbers as the plain operation, by an algorithm that suits small maps.

On a map of at most 2x2 a padded convolution is one dense product: every output cell sees a fixed subset of the taps.
"""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrail._shapes import Float

TINY = 4  # cells of the input map up to which the dense product is taken: 1x1 and 2x2


@functools.lru_cache(maxsize=256)
def _taps(size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """For output cell o and input cell i the index of the kernel tap that joins them, or kernel area for none."""
    (h, w), (kh, kw) = size, kernel
    ho, wo = (h + 2 * padding[0] - kh) // stride[0] + 1, (w + 2 * padding[1] - kw) // stride[1] + 1
    index = torch.full((ho, wo, h, w), kh * kw)
    for a in range(ho):
        for b in range(wo):
            for i in range(h):
                for j in range(w):
                    p, q = i - a * stride[0] + padding[0], j - b * stride[1] + padding[1]
                    if 0 <= p < kh and 0 <= q < kw:
                        index[a, b, i, j] = p * kw + q
    return index


def dense_conv2d(x: Float[Tensor, "m c h w"], conv: nn.Conv2d) -> Float[Tensor, "m d p q"]:
    """A bias-free, ungrouped, undilated convolution as one matrix product over the whole map."""
    kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
    assert not isinstance(padding, str) and len(kernel) == len(stride) == len(padding) == 2
    taps = _taps((x.shape[2], x.shape[3]), kernel, stride, padding).to(x.device)  # type: ignore[arg-type]
    ho, wo = taps.shape[:2]
    w = conv.weight.flatten(2)
    if ho == wo == 1:  # each input cell meets one tap, in order: a slice
        seen = taps.flatten()
        used = seen < w.shape[2]
        cells = x.flatten(2)
        if not bool(used.all()):
            cells, seen = cells[:, :, used], seen[used]
        return F.linear(cells.flatten(1), w[:, :, seen].flatten(1)).reshape(len(x), -1, 1, 1)
    w = torch.cat([w, w.new_zeros(*w.shape[:2], 1)], 2)[:, :, taps.flatten()]  # [d c (p q h w)]
    w = w.unflatten(2, (ho * wo, -1)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)  # [(d pq) (c hw)]
    return F.linear(x.flatten(1), w).reshape(len(x), -1, ho, wo)


class Conv2d(nn.Conv2d):
    """nn.Conv2d that takes the dense product on tiny maps; same parameters, same numbers up to summation order.

    `exact` keeps PyTorch's own convolution everywhere.
    """

    exact = False

    def forward(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m d p q"]:
        tiny = not self.exact and x.shape[2] * x.shape[3] <= TINY and self.kernel_size != (1, 1)
        if tiny and self.bias is None and self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros":
            return dense_conv2d(x, self)
        return super().forward(x)
