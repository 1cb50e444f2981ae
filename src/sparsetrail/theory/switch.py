"""How far the input of a spiking network may move before anything changes at all: where its score is constant.

The score of a network of spikes is piecewise constant. Under the direct code the first layer receives a constant
current, so its spikes depend on which of a few levels that current lies between; all that follows depends on these
spikes alone. The nearest level of any unit gives the first switch exactly.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsetrail._shapes import Float, Int
from sparsetrail.core import Victim
from sparsetrail.snn.folded import FoldedNet
from sparsetrail.snn.neuron import NeuronSpec
from sparsetrail.theory.smooth import is_smooth
from sparsetrail.theory.vulnerability import Score


@dataclass(frozen=True, kw_only=True)
class FirstSwitch:
    """Per image [n]: L-infinity radii, in pixels, at which the first and the second unit switch, and the first unit.

    `unit` is its flat index in the map of the first layer, `toward` [n c h w] the signs (0 outside its window) that
    reach it soonest. No box: where pixels are cut to 0..1 the true radii are no smaller.
    """

    eps1: Tensor
    eps2: Tensor
    unit: Int[Tensor, " n"]
    toward: Tensor


def switch_levels(spec: NeuronSpec, steps: int) -> tuple[float, ...]:
    """Constant currents at which the spike train of `steps` steps changes, in increasing order.

    A hard reset forgets, so the train is set by the step of the first spike: (V - r) / k for IF. A soft reset keeps the
    rest: m V / k with m <= k.
    """
    ks, gap = range(1, steps + 1), spec.threshold - spec.rest
    if spec.kind == "if" and spec.reset is not None:
        levels = {gap / k for k in ks}
    elif spec.kind == "if":
        levels = {m * spec.threshold / k for k in ks for m in range(1, k + 1)}
    elif spec.kind == "lif" and spec.reset is not None:
        reach = [1 - (1 - 1 / spec.tau) ** k for k in ks]
        levels = {gap / (r if spec.decay_input else r * spec.tau) for r in reach}
    else:
        raise NotImplementedError(
            f"expected IF neurons, or LIF neurons with a hard reset, found {spec.kind} with "
            f"{'a soft' if spec.reset is None else 'a hard'} reset; its spike train has no list of levels here"
        )
    return tuple(sorted(levels))


@torch.no_grad()
def first_switch_radius(victim: Victim, x: Float[Tensor, "n c h w"]) -> FirstSwitch:
    """First and second switch of a network whose pixels reach convolution, BatchNorm (eval) and neuron directly.

    Computed in float64 from the weights: a network that runs in float32 switches there up to its rounding.
    NotImplementedError says why a victim does not fit: no network of ours, train mode, or another code than `direct`.
    """
    net = victim.module
    if not isinstance(net, FoldedNet):
        raise NotImplementedError(
            f"expected a network of this package behind the victim, found "
            f"{'none' if net is None else type(net).__name__}; its first layer is not known"
        )
    if is_smooth(net):
        raise NotImplementedError("expected neurons that spike, found smooth ones; nothing switches")
    if net.training:
        raise NotImplementedError("expected eval mode, found train mode, where images share statistics")
    if not torch.equal(victim.encode(x[:1]), x[:1].expand(victim.steps, *x[:1].shape)):
        raise NotImplementedError(
            "expected the direct code, a constant current, found another; its first switch is not computed"
        )
    levels = torch.tensor(switch_levels(net.first()[2].spec, net.steps), dtype=torch.float64, device=x.device)
    currents, reach = _first_layer(net, x)
    first, second, unit, toward = [], [], [], []
    for image in x.double():  # one image at a time: units times levels are many
        z = currents(image[None])
        apart = (z[..., None] - levels).abs() / reach[..., None]
        nearest = apart.flatten().topk(2, largest=False)
        at, level = divmod(int(nearest.indices[0]), len(levels))
        side = 1 if levels[level] >= z.flatten()[at] else -1
        first.append(nearest.values[0])
        second.append(nearest.values[1])
        unit.append(at)
        toward.append(side * first_weights(victim, image, at).sign().view_as(image))
    return FirstSwitch(
        eps1=torch.stack(first), eps2=torch.stack(second), unit=torch.tensor(unit), toward=torch.stack(toward)
    )


def first_weights(victim: Victim, x: Float[Tensor, "c h w"], unit: int) -> Float[Tensor, " d"]:
    """The weights, in float64, by which one unit of the first layer sees the pixels of `x`."""
    net = victim.module
    assert isinstance(net, FoldedNet)
    v = x.detach().double()[None].requires_grad_()
    with torch.enable_grad():
        (g,) = torch.autograd.grad(_first_layer(net, v)[0](v).flatten()[unit], v)
    return g.flatten()


def _first_layer(net: FoldedNet, like: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """In float64: pixels to the currents of the first layer, and what a unit of eps does to each of these."""
    conv, norm, *_ = net.first()
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d | nn.Identity):
        raise NotImplementedError(f"expected convolution and BatchNorm first, found {type(conv).__name__}")
    w, shift = _folded(conv, norm)
    one = torch.ones_like(like[:1], dtype=torch.float64)
    slope = net._prepared(one) - net._prepared(0 * one)
    reach = conv._conv_forward(slope.abs(), w.abs(), None)  # taps off the map reach nothing
    return lambda x: conv._conv_forward(net._prepared(x), w, shift), reach.detach()


@dataclass(frozen=True, kw_only=True)
class Switched:
    """Just above the first switch, per image [n]: the radius, by how much the score jumps there, and what follows.

    Two values are reachable below `eps2`, the second in a corner of the ball alone: rho_adv is jump^2, rho_rand at
    most `chance` jump^2, so the ratio is at least 1 / chance, a certificate without draws; nan where the score does not
    jump. All are nan where two units switch at one radius (equal pixels, such as a black background, make them): there
    is then no radius between. `eps1` and `eps2` as in `FirstSwitch`. The ball is not cut to the range of pixels.
    """

    eps1: Tensor
    eps2: Tensor
    eps: Tensor
    jump: Tensor
    chance: Tensor
    ratio: Tensor


@torch.no_grad()
def above_first_switch(victim: Victim, score: Score, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"]) -> Switched:
    """Go 1 % beyond the first switch (or half-way to the second, if that is nearer) of each image and look.

    `x` and the victim in float64: switches are closer to the images than float32 can say.
    """
    found = first_switch_radius(victim, x)
    eps = torch.minimum(1.01 * found.eps1, (found.eps1 + found.eps2) / 2)
    alone = (found.eps2 > found.eps1 * (1 + 1e-6)) & (found.eps1 > 0)
    jump, chance = [], []
    for i, image in enumerate(x):
        if not alone[i]:
            jump.append(math.nan)
            chance.append(math.nan)
            continue
        points = torch.stack([image, image + eps[i] * found.toward[i]])
        before, after = score(points, y[i].expand(2)).tolist()
        jump.append(after - before)
        w = first_weights(victim, image, int(found.unit[i]))
        chance.append(corner_probability(w, float(found.eps1[i] / eps[i])))
    jumps, p = torch.tensor(jump, dtype=torch.float64), torch.tensor(chance, dtype=torch.float64)
    ratio = torch.where(jumps == 0, torch.nan, 1 / p)
    return Switched(eps1=found.eps1, eps2=found.eps2, eps=eps, jump=jumps, chance=p, ratio=ratio)


def corner_probability(w: Float[Tensor, " d"], share: float) -> float:
    """Upper bound of P(w.u >= share |w|_1), u uniform in [-1, 1]^d: the simplex at the corner, over the cube.

    ((1 - share) |w|_1 / 2)^k / (k! prod |w_i|) over the k weights that are not zero; exact while the simplex lies
    in the cube, that is while (1 - share) |w|_1 <= 2 min |w_i|.
    """
    w = w.double().abs()
    w = w[w > 0]
    k = len(w)
    log = k * math.log((1 - share) / 2 * float(w.sum())) - math.lgamma(k + 1) - float(w.log().sum())
    return min(1.0, math.exp(min(0.0, log)))


def _folded(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weights and shift of convolution and BatchNorm (eval) as one, in float64."""
    assert isinstance(conv, nn.Conv2d)
    w = conv.weight.detach().double()
    b = w.new_zeros(len(w)) if conv.bias is None else conv.bias.detach().double()
    if not isinstance(norm, nn.BatchNorm2d):
        return w, b
    assert norm.running_var is not None and norm.running_mean is not None
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return w * scale[:, None, None, None], (b - norm.running_mean.double()) * scale + norm.bias.detach().double()
