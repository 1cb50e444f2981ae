"""Spiking VGG-5 and VGG-11 as the compared defences build them, with 3x3 convolutions; their pools average.

VGG-11 is that of SNN-RAT (Ding et al. 2022) with `norm="batch"`: BatchNorm and biases, 61,377,034 parameters for 10
classes. With `norm="none"` it is HIRE-SNN's (Kundu et al. 2021, arXiv:2110.11417): neither, and dropout behind every
neuron that no pool follows. Both have a classifier of two layers of 4096; neither is torchvision's VGG-11.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrail._shapes import Float
from sparsetrail.snn.convolution import Conv2d
from sparsetrail.snn.firing import conv_fire
from sparsetrail.snn.folded import Dropout, FoldedNet, FoldedNeuron, Normalise, Readout
from sparsetrail.snn.neuron import Neuron, NeuronSpec
from sparsetrail.snn.pools import make_pool

Norm = Literal["batch", "none"]
POOL = 0  # in a plan, where the map is halved
PLANS: dict[int, tuple[int, ...]] = {  # channels of the convolutions
    5: (64, POOL, 128, 128, POOL),
    11: (64, POOL, 128, 256, POOL, 512, 512, 512, POOL, 512, 512),
}


class Layer(nn.Module):
    """Convolution, BatchNorm (or Identity), neuron, then a pool or dropout (or Identity)."""

    def __init__(self, cin: int, cout: int, norm: Norm, after: nn.Module, neuron: FoldedNeuron) -> None:
        super().__init__()
        self.conv = Conv2d(cin, cout, 3, padding=1, bias=norm == "batch")
        self.bn = nn.BatchNorm2d(cout) if norm == "batch" else nn.Identity()
        self.sn, self.after = neuron, after

    def forward(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m d p q"]:
        return conv_fire(x, self.conv, self.bn, self.sn, self.sn.steps, pool=self.after)


class SpikingVGG(FoldedNet):
    """The whole network: an input sequence [t n c h w] to class scores [n k].

    Made for 32x32 images; the last maps of other sizes are averaged to the classifier's.
    """

    def __init__(
        self,
        *,
        depth: int,
        classes: int,
        channels: int,
        width: float,
        pool: str,
        norm: Norm,
        dropout: float,
        normalise: str,
        readout: Readout,
        neuron: NeuronSpec,
        steps: int,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.steps, self.readout = steps, readout
        self.normalise = None if normalise == "none" else Normalise(normalise)

        def scaled(c: int) -> int:
            return max(1, round(c * width))

        def fire(soft: bool = False) -> FoldedNeuron:
            return FoldedNeuron(neuron.soft() if soft else neuron, steps, exact=exact)

        def drop() -> nn.Module:
            return Dropout(dropout, steps) if dropout else nn.Identity()

        plan, layers, cin = PLANS[depth], [], channels
        for c, following in zip(plan, (*plan[1:], None), strict=True):
            if c == POOL:
                continue
            after = make_pool(pool, scaled(c), (2, 2, 0), fire) if following == POOL else drop()
            layers.append(Layer(cin, scaled(c), norm, after, fire()))
            cin = scaled(c)
        self.features = nn.Sequential(*layers)
        self.side = 32 // 2 ** plan.count(POOL)
        wide = scaled(4096)
        self.fc1, self.sn1, self.drop1 = nn.Linear(cin * self.side**2, wide, bias=norm == "batch"), fire(), drop()
        self.fc2, self.sn2, self.drop2 = nn.Linear(wide, wide, bias=norm == "batch"), fire(), drop()
        self.fc = nn.Linear(wide, classes, bias=norm == "batch")

    def first(self) -> tuple[nn.Module, nn.Module, Neuron, nn.Module | None]:
        layer = self.features[0]
        return layer.conv, layer.bn, layer.sn, layer.after  # type: ignore[return-value]

    def rest(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m k"]:
        for layer in list(self.features)[1:]:
            x = layer(x)
        if x.shape[-2:] != (self.side, self.side):
            x = F.adaptive_avg_pool2d(x, self.side)
        x = self.drop1(self.sn1(self.fc1(x.flatten(1))))
        return self.fc(self.drop2(self.sn2(self.fc2(x))))
