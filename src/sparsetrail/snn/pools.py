"""The pools a network can be built with: how many gradients a window lets through is decided here.

The paper changes max pooling for average pooling and asks for designs that know what they do to the gradient
(arXiv:2509.23762, sec. 6). Of a window's cells a max pool hands the gradient to one; all others here can reach each.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrail._shapes import Float
from sparsetrail.snn.convolution import Conv2d
from sparsetrail.snn.firing import conv_fire
from sparsetrail.snn.folded import Draws, FoldedNeuron
from sparsetrail.snn.pooling import AvgPool2d

POOLS = ("max", "avg", "mix", "learned", "stochastic", "sum", "conv", "none")
"""mix and learned are a share of max and the rest average, sum adds up and fires, conv is strided and fires."""


def share_of(pool: str) -> float:
    """The share of max in "mix" (one half) or "mix:0.25"; ValueError for a share that is none."""
    name, colon, text = pool.partition(":")
    try:
        share = float(text) if colon else 0.5
    except ValueError:
        share = -1.0
    if (colon and name != "mix") or not 0 <= share <= 1:
        raise ValueError(f"pool: expected a share of max 0..1 as in 'mix:0.25', and of mix alone, got {pool!r}")
    return share


def make_pool(
    pool: str, channels: int, window: tuple[int, int, int], fire: Callable[[bool], FoldedNeuron]
) -> nn.Module:
    """A pool of POOLS over `window`, its kernel, stride and padding.

    `fire(soft)` makes a neuron as the network has them, or (soft) one that subtracts its threshold and leaks nothing.
    A convolution takes 3x3 cells whatever the kernel of the window, which gives a map of the same size.
    """
    kernel, stride, padding = window
    match pool.partition(":")[0]:
        case "max":
            return nn.MaxPool2d(kernel, stride, padding)
        case "avg":
            return AvgPool2d(kernel, stride, padding)
        case "mix":
            return MixedPool2d(kernel, stride, padding, share=share_of(pool))
        case "learned":
            return MixedPool2d(kernel, stride, padding, learn=True)
        case "stochastic":
            return StochasticPool2d(kernel, stride, padding)
        case "sum":
            return SumPool(kernel, stride, padding, fire(True))
        case "conv":
            return StridedConv(channels, stride, fire(False))
        case "none":
            return nn.Identity()
    raise ValueError(f"pool: expected one of {', '.join(POOLS)}, got {pool!r}")


class MixedPool2d(AvgPool2d):
    """share * max + (1 - share) * average over each window; a learnt share is the sigmoid of a parameter, from 1/2.

    Lee et al. 2016, arXiv:1509.08985, sec. 3.1, one share a layer. They learn the share itself, we its logit.
    """

    def __init__(self, kernel: int, stride: int, padding: int, *, share: float = 0.5, learn: bool = False) -> None:
        super().__init__(kernel, stride, padding)
        self.fixed = share
        self.logit = nn.Parameter(torch.zeros(())) if learn else None

    @property
    def share(self) -> float | Tensor:
        """Of max, 0..1."""
        return self.fixed if self.logit is None else self.logit.sigmoid()

    def forward(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m c p q"]:
        most = F.max_pool2d(x, self.kernel_size, self.stride, self.padding)
        return torch.lerp(super().forward(x), most, self.share)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, share={'learnt' if self.logit is not None else self.fixed}"


class StochasticPool2d(Draws, nn.AvgPool2d):
    """One cell of each window, drawn in proportion to its value; in eval mode the mean of its values so weighted.

    Zeiler & Fergus 2013, arXiv:1301.3557, eq. 4-6. Of a window without spikes any cell is as good, its value is 0 and
    its gradient that of the average. In eval mode the weights are differentiated too: the gradient is that of what is
    computed. On spikes the values are those of a max pool; what differs is where the gradient goes.
    """

    generator: torch.Generator | None = None

    @property
    def one_a_window(self) -> bool:
        """Does each window's gradient reach one cell only?"""
        return self.training

    def forward(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m c p q"]:
        kernel, stride, padding = (int(v) for v in (self.kernel_size, self.stride, self.padding))  # type: ignore[arg-type]
        cells = F.pad(x, (padding,) * 4).unfold(2, kernel, stride).unfold(3, kernel, stride).flatten(4)
        there = F.pad(torch.ones_like(x[:1, :1]), (padding,) * 4)
        there = there.unfold(2, kernel, stride).unfold(3, kernel, stride).flatten(4)
        total = cells.sum(-1, keepdim=True)
        lively = total > 0
        if not self.training:
            weighted = cells.square().sum(-1) / torch.where(lively, total, 1.0).squeeze(-1)
            return torch.where(lively.squeeze(-1), weighted, (cells * (there / there.sum(-1, keepdim=True))).sum(-1))
        odds = torch.where(lively, cells, there).detach()
        draw = torch.rand(odds.shape[:-1], generator=self.generator).to(odds) * odds.sum(-1)
        # the first cell whose summed odds exceed the draw; rounding may leave none, then the last that has any
        past = odds.cumsum(-1) > draw.unsqueeze(-1)
        last = odds.shape[-1] - 1 - (odds > 0).flip(-1).int().argmax(-1)
        chosen = torch.where(past.any(-1), past.int().argmax(-1), last)
        return cells.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


class SumPool(nn.Module):
    """The spikes of each window are added up and fired again: their count is kept, as far as a spike a step can.

    A soft-reset IF neuron of threshold 1 carries what is left over from step to step.
    """

    def __init__(self, kernel: int, stride: int, padding: int, neuron: FoldedNeuron) -> None:
        super().__init__()
        self.sum = AvgPool2d(kernel, stride, padding, divisor_override=1)
        self.sn = neuron

    def forward(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m c p q"]:
        return self.sn(self.sum(x))


class StridedConv(nn.Module):
    """A strided 3x3 convolution, BatchNorm and a neuron in the place of a pool.

    Springenberg et al. 2015, arXiv:1412.6806, sec. 2, for a network whose every layer fires.
    """

    def __init__(self, channels: int, stride: int, neuron: FoldedNeuron) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn, self.sn = nn.BatchNorm2d(channels), neuron

    def forward(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m c p q"]:
        return conv_fire(x, self.conv, self.bn, self.sn, self.sn.steps)
