"""What all networks share: maps folded as [t*n ...], normalisation inside the network, a readout over the steps."""

from typing import Literal

import torch
from torch import Tensor, nn

from sparsetrail._shapes import Float
from sparsetrail.snn.convolution import coded
from sparsetrail.snn.encode import Encoder
from sparsetrail.snn.firing import conv_fire, fire
from sparsetrail.snn.kernels import overseen, watched
from sparsetrail.snn.neuron import Neuron, NeuronSpec, carried

Readout = Literal["mean", "sum"]

NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {  # mean and deviation per channel
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "half": ((0.5,), (0.5,)),
}
"""As SNN-RAT has them (Ding et al. 2022); "half" brings pixels of any number of channels to -1..1."""


class FoldedNeuron(Neuron):
    """A neuron layer inside a folded network: [t*n ...] in and out, `steps` of them in time."""

    def __init__(self, spec: NeuronSpec, steps: int, *, exact: bool = False) -> None:
        super().__init__(spec, exact=exact)
        self.steps = steps

    def forward(self, x: Float[Tensor, "m ..."]) -> Float[Tensor, "m ..."]:
        fits = x.ndim == 4 and not overseen(x)  # a map of maps tells no memory order
        last = fits and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        if last and self.differentiated()[1] is None:  # a rule knows its channels by their axis
            # in memory order: otherwise the spikes come back channels first and the next convolution copies them
            s = super().forward(x.permute(0, 2, 3, 1).unflatten(0, (self.steps, -1)))
            return s.flatten(0, 1).permute(0, 3, 1, 2)
        return super().forward(x.unflatten(0, (self.steps, -1))).flatten(0, 1)


class Normalise(nn.Module):
    """(x - mean) / deviation per channel: the first operation of a network, so that attacks see raw pixels."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        for what, values in zip(("mean", "deviation"), NORMALISATIONS[name], strict=True):
            self.register_buffer(what, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m c h w"]:
        return (x - self.mean) / self.deviation

    def extra_repr(self) -> str:
        return self.name


class Draws(nn.Module):
    """A module that draws while it trains: training hands in the `generator` of each step."""

    generator: torch.Generator | None = None


class Dropout(Draws):
    """Dropout whose mask is drawn once a forward and shared by all steps; nothing in eval mode.

    DIET-SNN (Rathi & Roy 2020, arXiv:2008.03658) and HIRE-SNN.
    """

    def __init__(self, p: float, steps: int) -> None:
        super().__init__()
        self.p, self.steps = p, steps

    def forward(self, x: Float[Tensor, "m ..."]) -> Float[Tensor, "m ..."]:
        if not self.training or self.p == 0:
            return x
        parts = x.unflatten(0, (self.steps, -1))
        draw = torch.rand(parts.shape[1:], generator=self.generator)
        return (parts * ((draw >= self.p) / (1 - self.p)).to(x)).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


class FoldedNet(nn.Module):
    """An input sequence [t n c h w] to class scores [n k]: the mean, or the sum, over t of what each step says.

    A family of networks gives its `first` layer and the `rest` behind it.
    """

    steps: int
    readout: Readout
    normalise: nn.Module | None

    def first(self) -> tuple[nn.Module, nn.Module, Neuron, nn.Module | None]:
        """Convolution, BatchNorm (or Identity), neuron and pool of the first layer."""
        raise NotImplementedError

    def rest(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m k"]:
        """Scores of every step from the spikes of the first layer."""
        raise NotImplementedError

    def initialise(self, generator: torch.Generator) -> None:
        """Kaiming normal (fan out) for convolutions, PyTorch's uniform default for linear layers, zero biases.

        HIRE-SNN's own start does not matter: it is written over by a conversion.
        """
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            elif isinstance(m, nn.Linear):
                bound = m.in_features**-0.5
                nn.init.uniform_(m.weight, -bound, bound, generator=generator)
            if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None:
                nn.init.zeros_(m.bias)

    def per_step(self, u: Float[Tensor, "t n c h w"]) -> Float[Tensor, "t n k"]:
        """Scores of every step."""
        if u.ndim != 5 or u.shape[0] != self.steps:
            raise ValueError(f"expected an encoded input [{self.steps} n c h w], got shape {tuple(u.shape)}")
        conv, norm, neuron, pool = self.first()
        x = conv_fire(self._prepared(u.flatten(0, 1)), conv, norm, neuron, self.steps, pool=pool)
        return self.rest(x).unflatten(0, (self.steps, -1))

    def forward(self, u: Float[Tensor, "t n c h w"]) -> Float[Tensor, "n k"]:
        return self._read(self.per_step(u))

    def scores(self, x: Float[Tensor, "n c h w"], encode: Encoder) -> Float[Tensor, "n k"]:
        """`self(encode(x))`; frames that the code shows again go through the first layer once.

        Not where a hook or another `forward` has a say in what this network gives.
        """
        if watched(self) or "per_step" in vars(self) or not _as_written(type(self)):
            return self(encode(x))
        conv, norm, neuron, pool = self.first()
        currents = None
        if encode.steps == self.steps and (self.normalise is None or encode.codebook is None):
            currents = coded(self._prepared(x), encode, conv)
        if currents is None:
            return self(encode(x))
        x = fire(currents, norm, neuron, self.steps, order=encode.frames, pool=pool)
        return self._read(self.rest(x).unflatten(0, (self.steps, -1)))

    def _prepared(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m c h w"]:
        return x if self.normalise is None else self.normalise(x)

    def _read(self, z: Float[Tensor, "t n k"]) -> Float[Tensor, "n k"]:
        before = carried.get()
        if before is None:
            return z.mean(0) if self.readout == "mean" else z.sum(0)
        # the last layer never fires: its potential goes on too, and with it the number of steps that it is the sum of
        held, steps = before.get(self, (0.0, 0))
        total, steps = z.sum(0) + held, steps + len(z)
        before[self] = total.detach(), steps
        return total / steps if self.readout == "mean" else total

    def extra_repr(self) -> str:
        return f"steps={self.steps}, readout={self.readout}"


def _as_written(kind: type[FoldedNet]) -> bool:
    """Does a kind of network call, and read out, as all of them do?"""
    same = kind.forward is FoldedNet.forward and kind.per_step is FoldedNet.per_step
    return same and kind.__call__ is nn.Module.__call__
