"""SEW-ResNet and Spiking-ResNet 18/34/50 over a whole sequence, with torchvision's parameter names.

SEW (Fang et al. 2021, arXiv:2102.04159): every branch ends in a neuron, spikes are joined by ADD, AND or IAND.
Spiking (SpikingJelly's `spiking_resnet`, which the paper runs and cites as Hu et al. 2021): currents are added, then
the neuron. Convolution, BatchNorm, pooling and fc act on folded [t*n ...], so BatchNorm statistics run over t*n*h*w.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from sparsetrail._shapes import Float
from sparsetrail.snn.convolution import Conv2d
from sparsetrail.snn.firing import conv_fire
from sparsetrail.snn.folded import FoldedNet, FoldedNeuron, Normalise, Readout
from sparsetrail.snn.kernels import watched
from sparsetrail.snn.neuron import Neuron, NeuronSpec
from sparsetrail.snn.pools import make_pool

Connect = Literal["add", "and", "iand"]
Stem = Literal["imagenet", "cifar"]

DEPTHS: dict[int, tuple[bool, tuple[int, int, int, int]]] = {  # depth: (bottleneck, blocks a stage)
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
}


class Join(nn.Module):
    """Element-wise meeting of two branches: add x+y, and x*y, iand x*(1-y). A module so that the trail sees it."""

    def __init__(self, connect: Connect) -> None:
        super().__init__()
        self.connect = connect

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.connect == "add":
            return x + y
        return x * y if self.connect == "and" else x * (1 - y)

    def extra_repr(self) -> str:
        return self.connect


def _conv(cin: int, cout: int, kernel: int, stride: int = 1) -> Conv2d:
    return Conv2d(cin, cout, kernel, stride, padding=kernel // 2, bias=False)


class Block(nn.Module):
    """A residual block of two 3x3, or (bottleneck) 1x1, 3x3, 1x1 convolutions. The stride is on the first 3x3.

    `sew`: neurons before the join; otherwise the currents are joined and one neuron follows. With ADD and AND the
    order of the branches does not matter; with IAND a basic block gives identity*(1-out), a bottleneck
    out*(1-identity), as SpikingJelly does.
    """

    def __init__(
        self, cin: int, width: int, stride: int, bottleneck: bool, sew: bool, connect: Connect, neuron
    ) -> None:
        super().__init__()
        cout = 4 * width if bottleneck else width
        self.sew, self.bottleneck = sew, bottleneck
        self.conv1 = _conv(cin, width, 1) if bottleneck else _conv(cin, width, 3, stride)
        self.bn1, self.sn1 = nn.BatchNorm2d(width), neuron()
        self.conv2 = _conv(width, width, 3, stride) if bottleneck else _conv(width, cout, 3)
        self.bn2, self.sn2 = nn.BatchNorm2d(width if bottleneck else cout), neuron()
        if bottleneck:
            self.conv3, self.bn3, self.sn3 = _conv(width, cout, 1), nn.BatchNorm2d(cout), neuron()
        self.downsample: nn.Module | None = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(_conv(cin, cout, 1, stride), nn.BatchNorm2d(cout))
            if sew:
                self.downsample_sn = neuron()
        self.join = Join(connect if sew else "add")

    def forward(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m d p q"]:
        steps = self.sn1.steps
        identity = x
        branch = self.downsample
        usual = isinstance(branch, nn.Sequential) and len(branch) == 2 and not watched(branch)
        if self.sew and usual:
            identity = conv_fire(x, branch[0], branch[1], self.downsample_sn, steps)
        elif branch is not None:
            identity = self.downsample_sn(branch(x)) if self.sew else branch(x)
        out = conv_fire(x, self.conv1, self.bn1, self.sn1, steps)
        conv, norm, last = self.conv2, self.bn2, self.sn2
        if self.bottleneck:
            out = conv_fire(out, conv, norm, last, steps)
            conv, norm, last = self.conv3, self.bn3, self.sn3
        if not self.sew:
            return last(self.join(norm(conv(out)), identity))
        if self.join.connect == "add" and not watched(self.join):
            return conv_fire(out, conv, norm, last, steps, plus=identity)
        out = conv_fire(out, conv, norm, last, steps)
        return self.join(out, identity) if self.bottleneck else self.join(identity, out)


class SpikingResNet(FoldedNet):
    """The whole network: an input sequence [t n c h w] to class scores [n k]."""

    def __init__(
        self,
        *,
        depth: int,
        sew: bool,
        classes: int,
        channels: int,
        width: float,
        stem: Stem,
        pool: str,
        connect: Connect,
        normalise: str,
        readout: Readout,
        neuron: NeuronSpec,
        steps: int,
        exact: bool = False,
    ) -> None:
        super().__init__()
        bottleneck, stages = DEPTHS[depth]
        widths = [max(1, round(w * width)) for w in (64, 128, 256, 512)]
        self.steps, self.readout = steps, readout
        self.normalise = None if normalise == "none" else Normalise(normalise)

        def fire(soft: bool = False) -> FoldedNeuron:
            return FoldedNeuron(neuron.soft() if soft else neuron, steps, exact=exact)

        if stem == "imagenet":
            self.conv1 = _conv(channels, widths[0], 7, 2)
            self.pool = make_pool(pool, widths[0], (3, 2, 1), fire)
        else:
            self.conv1 = _conv(channels, widths[0], 3)
            self.pool = nn.Identity()
        self.bn1, self.sn1 = nn.BatchNorm2d(widths[0]), fire()
        cin = widths[0]
        for i, (count, w) in enumerate(zip(stages, widths, strict=True)):
            blocks = []
            for b in range(count):
                blocks.append(Block(cin, w, 2 if i > 0 and b == 0 else 1, bottleneck, sew, connect, fire))
                cin = 4 * w if bottleneck else w
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(cin, classes)

    def initialise(self, generator: torch.Generator) -> None:
        """As every network here, and PyTorch's uniform default for the bias of fc."""
        super().initialise(generator)
        bound = self.fc.in_features**-0.5
        nn.init.uniform_(self.fc.bias, -bound, bound, generator=generator)

    def first(self) -> tuple[nn.Module, nn.Module, Neuron, nn.Module | None]:
        return self.conv1, self.bn1, self.sn1, self.pool

    def rest(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m k"]:
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)  # type: ignore[operator]
        return self.fc(self.avgpool(x).flatten(1))
