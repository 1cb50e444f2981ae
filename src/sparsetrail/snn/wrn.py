"""Spiking WideResNet-16-4 as SNN-RAT builds it (Ding et al. 2022): pre-activation blocks and a learnt merge.

2,748,902 parameters for 10 classes. The residual stream carries real numbers, the convolutions see spikes.
"""

import torch
from torch import Tensor, nn

from sparsetrail._shapes import Float
from sparsetrail.snn.convolution import Conv2d
from sparsetrail.snn.firing import conv_fire, fire
from sparsetrail.snn.folded import FoldedNet, FoldedNeuron, Normalise, Readout
from sparsetrail.snn.neuron import Neuron, NeuronSpec


class Merge(nn.Module):
    """Learnt combination of two branches, both shares 1/2 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        return self.shares[0] * shortcut + self.shares[1] * branch


class WideBlock(nn.Module):
    """a = neuron(BN(x)); the branch is conv(neuron(BN(conv(a)))); the shortcut is x, or conv1x1(a) to another width."""

    def __init__(self, cin: int, cout: int, stride: int, *, project: bool, neuron) -> None:
        super().__init__()
        self.bn1, self.sn1 = nn.BatchNorm2d(cin), neuron()
        self.conv1 = Conv2d(cin, cout, 3, stride, padding=1, bias=False)
        self.bn2, self.sn2 = nn.BatchNorm2d(cout), neuron()
        self.conv2 = Conv2d(cout, cout, 3, padding=1, bias=False)
        self.shortcut = Conv2d(cin, cout, 1, stride, bias=False) if project else None
        self.merge = Merge()

    def forward(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m d p q"]:
        return self.after(fire(x, self.bn1, self.sn1, self.sn1.steps), x)

    def after(self, a: Float[Tensor, "m c h w"], x: Tensor | None) -> Float[Tensor, "m d p q"]:
        """What follows the first neuron; x itself is needed where it is the shortcut."""
        branch = self.conv2(conv_fire(a, self.conv1, self.bn2, self.sn2, self.sn2.steps))
        return self.merge(x if self.shortcut is None else self.shortcut(a), branch)


class SpikingWRN(FoldedNet):
    """The whole network: an input sequence [t n c h w] to class scores [n k]."""

    def __init__(
        self,
        *,
        classes: int,
        channels: int,
        width: float,
        normalise: str,
        readout: Readout,
        neuron: NeuronSpec,
        steps: int,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.steps, self.readout = steps, readout
        self.normalise = None if normalise == "none" else Normalise(normalise)

        def neurons() -> FoldedNeuron:
            return FoldedNeuron(neuron, steps, exact=exact)

        stem, *groups = (max(1, round(c * width)) for c in (16, 64, 128, 256))
        self.conv1 = Conv2d(channels, stem, 3, padding=1, bias=False)
        cin, blocks = stem, []
        for i, cout in enumerate(groups):
            blocks.append(WideBlock(cin, cout, 2 if i else 1, project=True, neuron=neurons))
            blocks.append(WideBlock(cout, cout, 1, project=False, neuron=neurons))
            cin = cout
        self.blocks = nn.Sequential(*blocks)
        self.bn, self.sn = nn.BatchNorm2d(cin), neurons()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(cin, classes)

    def first(self) -> tuple[nn.Module, nn.Module, Neuron, nn.Module | None]:
        block = self.blocks[0]
        return self.conv1, block.bn1, block.sn1, None  # type: ignore[return-value]

    def rest(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m k"]:
        x = self.blocks[0].after(x, None)  # type: ignore[operator]
        for block in list(self.blocks)[1:]:
            x = block(x)
        return self.fc(self.avgpool(fire(x, self.bn, self.sn, self.steps)).flatten(1))
