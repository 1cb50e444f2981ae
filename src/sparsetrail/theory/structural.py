"""What the formulas of single operations do to zeros, without any network. Pools and strides are in `trails`."""

from typing import Literal

import torch
from torch import Tensor

from sparsetrail._shapes import Float, Int


def bn_backward(
    g: Float[Tensor, " m"],
    x: Float[Tensor, " m"],
    *,
    gamma: float = 1.0,
    eps: float = 1e-5,
    mode: Literal["train", "eval"],
    variance: float = 1.0,
) -> Float[Tensor, " m"]:
    """Gradient of BatchNorm with respect to its input `x` of one channel, from that of its output `g`, in float64.

    In train mode the batch mean is subtracted, so that zeros in `g` do not stay zeros; in eval mode they do, and
    `variance` is the running one. The paper's eq. 5 (arXiv:2509.23762), after Ioffe & Szegedy 2015, arXiv:1502.03167.
    """
    g, x = g.double(), x.double()
    if mode == "eval":
        return gamma / (variance + eps) ** 0.5 * g
    scale = (x.var(correction=0) + eps).sqrt()
    normal = (x - x.mean()) / scale
    return gamma / scale * (g - g.mean() - normal * (g * normal).mean())


def phase_flips(level: Int[Tensor, " k"], steps: int, *, bits: int = 8) -> Int[Tensor, " k"]:
    """Spikes of the phase code of `bits` bits, the highest first, that flip when the grey level 0..254 rises by one."""
    if int(level.min()) < 0 or int(level.max()) > 254:
        raise ValueError(f"level: expected grey levels 0..254, got {int(level.min())}..{int(level.max())}")
    place = torch.arange(steps) % bits
    changed = level[:, None] ^ (level[:, None] + 1)
    return torch.where(place < 8, (changed >> (7 - place).clamp(min=0)) & 1, 0).sum(1)
