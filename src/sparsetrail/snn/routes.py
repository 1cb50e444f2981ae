"""Gradient routes: what an adversary puts in the place of a neuron's derivative. The spikes stay those of the network.

A route is named as in `core.Route(neuron=...)`, its setting after a colon:

    atan:2, triangle:1, ...    any surrogate of `SURROGATES` and its width, back through time
    pdsg                       through time, the surrogate as wide as the potentials vary
    assg:0.43                  through time, as sharp at every neuron, step and image as its potential allows
    hart:0.5                   every step alone, the gradient averaged over the steps
    rga:0.2, bptr2, bptr3      every step alone, the derivative of the firing rate by the mean current
    cba                        not the network's own forward: ReLUs of current over threshold in the place of neurons

`assg-rectangle`, `assg-triangle`, `assg-sigmoid`, `assg-gaussian` are assg in another shape; `bptr` is `bptr2`; without
a setting, `DEFAULTS` serve. Behind what goes through time, `+reset` leaves the reset in the graph and `+detach` takes
it out; `own+reset`, `own+detach` do that to the network's own surrogate.

All slopes are functions of the charged potentials h [t n c ...] alone: the fast paths keep them and nothing else.
Input currents are won back from it: with u = h - r and th = threshold - r, every neuron is u[t] = k u[t-1] + I[t] up to
its reset, k = 1 (IF) or 1 - 1/tau, and I is the input (IF, or not decayed) or the input / tau. Slopes of rates are
with respect to that current I, as their sources have it, and the charge's own factor 1/tau follows. The current is
known as exactly as the potential holds it.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsetrail._shapes import Float
from sparsetrail.core import Memory
from sparsetrail.snn.kernels import Value
from sparsetrail.snn.neuron import Flow, Neuron, NeuronSpec, Rule, Slopes, gains, in_order_of, parts
from sparsetrail.snn.pools import StochasticPool2d, SumPool
from sparsetrail.snn.surrogate import SURROGATES, Surrogate, triangle_derivative

ENSEMBLE = (
    *(f"triangle:{g}" for g in ("1", "2", "3", "0.5", "0.25")),
    *(f"damped_exponential:{g}" for g in ("0.5", "1", "2")),
    *(f"unit_exponential:{g}" for g in ("0.5", "1", "2")),
    *(f"rectangle:{w}" for w in ("0.25", "0.5", "1", "2", "4")),
    "straight_through:1",
    "bptr",
    "cba",
)
"""The routes an image must withstand, every one, to count as robust: Ozdenizci & Legenstein 2024, arXiv:2311.09266."""

DEFAULTS: dict[str, float | None] = {  # what a name without a setting means; None where there is none to give
    "atan": 2.0,
    "sigmoid": 4.0,
    "triangle": 1.0,
    "damped_triangle": 1.0,
    "rectangle": 1.0,
    "gaussian": 0.5,
    "fast_sigmoid": 2.0,
    "exponential": 2.0,
    "unit_exponential": 1.0,
    "damped_exponential": 1.0,
    "straight_through": 1.0,
    "rga": 0.2,
    "bptr": None,
    "bptr2": None,
    "bptr3": None,
    "hart": 0.5,
    "pdsg": None,
    "assg": 0.43,
    "assg-rectangle": 0.43,
    "assg-triangle": 0.43,
    "assg-sigmoid": 0.43,
    "assg-gaussian": 0.43,
}


# ---- slopes --------------------------------------------------------------------------------------------------------


def mean_current(h: Float[Tensor, "t n ..."], spec: NeuronSpec, leak: Value = None) -> Float[Tensor, "1 n ..."]:
    """The input current of every neuron averaged over the steps, from its charged potentials."""
    keep, _ = gains(leak, spec)
    u, top = (h - spec.rest, spec.threshold - spec.rest) if spec.rest else (h, spec.threshold)
    total = u[0].clone()
    for t in range(1, len(u)):
        silent = (h[t - 1] < spec.threshold).to(u.dtype)
        left = u[t - 1] - (1 - silent) * top if spec.reset is None else u[t - 1] * silent
        total += u[t] - (left if spec.kind == "if" else left * keep)
    return total.div_(len(h))[None]


def rga(h: Float[Tensor, "t n ..."], spec: NeuronSpec, leak: Value, gamma: float) -> Float[Tensor, "1 n ..."]:
    """d rate / d mean current x: gamma on 0..(1-k) th, then a straight line to rate 1 at 2 th, else 0.

    Rate gradient approximation, Bu et al. 2023 (CVPR), with their upper limit beta = 2. The source closes both
    intervals, so that at their common point both slopes add up (for IF at x = 0); here a point lies in one of them.
    """
    x, (keep, _), th = mean_current(h, spec, leak), gains(leak, spec), spec.threshold - spec.rest
    bend = (1 - keep) * th
    steep = (1 - gamma * bend) / ((keep + 1) * th)
    below, above = (x >= 0) & (x < bend), (x >= bend) & (x <= 2 * th)
    return below.to(h.dtype) * gamma + above.to(h.dtype) * steep


def bptr2(h: Float[Tensor, "t n ..."], spec: NeuronSpec) -> Float[Tensor, "1 n ..."]:
    """1 where the neuron spikes at all: back-propagation through rates, Ding et al. 2022 (SNN-RAT)."""
    return (h.amax(0, keepdim=True) >= spec.threshold).to(h.dtype)


def bptr3(h: Float[Tensor, "t n ..."], spec: NeuronSpec, leak: Value = None) -> Float[Tensor, "1 n ..."]:
    """c where the mean current x > 0, else 0, with c the average of rate/x over those; a variant of SNN-RAT's code.

    The average is taken for each image alone, the source's over the batch: so no image depends on its neighbours.
    """
    x = mean_current(h, spec, leak)
    rate, there = (h >= spec.threshold).to(h.dtype).mean(0, keepdim=True), x > 0
    ratio = torch.where(there, rate / x, 0.0).flatten(2) if x.ndim > 2 else torch.where(there, rate / x, 0.0)[..., None]
    count = there.reshape(ratio.shape).sum(2)
    c = ratio.sum(2) / count.clamp(min=1)
    return there.to(h.dtype) * c.view(1, -1, *[1] * (x.ndim - 2))


def pdsg(h: Float[Tensor, "t n ..."], spec: NeuronSpec) -> Float[Tensor, "t n ..."]:
    """The normal density of mean s/2 and deviation s at h - threshold, s that of the potentials of all steps so far.

    Potential-dependent surrogate gradient, Lun et al. 2025 (CVPR); s = 1 where nothing varies. The source takes s per
    channel over steps, batch and map, so that the gradient of an image depends on its neighbours; here each image has
    its own s, over steps and map (of layers without maps: over steps and neurons), and it is the deviation of the
    values at hand (divided by their number, not by one less, which is 0/0 at the first step of a 1x1 map).
    """
    over = tuple(range(3 if h.ndim > 3 else 2, h.ndim))
    first = h[(slice(1), slice(None), *[slice(None)] * (h.ndim > 3), *[slice(1)] * len(over))]
    away = h - first  # where all values are equal, their mean may round to another one
    mean = away.mean(over, keepdim=True) if over else away
    var = (away - mean).square_().mean(over, keepdim=True) if over else torch.zeros_like(away)
    spread, centre, found = var[0], mean[0], [var[0]]
    for t in range(1, len(h)):  # sums of squares would cancel where the potentials hardly vary
        further = mean[t] - centre
        centre = centre + further / (t + 1)
        spread = spread + var[t] + further.square() * (t / (t + 1))
        found.append(spread / (t + 1))
    s = torch.stack(found).sqrt()
    s = torch.where(s == 0, 1.0, s)
    return torch.exp((((h - spec.threshold) / s) - 0.5).square() / -2) / (s * math.sqrt(2 * math.pi))


def _atan(x: Tensor, sharp: Tensor) -> Tensor:
    return (sharp / 2) / (1 + (sharp * x * (math.pi / 2)).square())


def _rectangle(x: Tensor, sharp: Tensor) -> Tensor:
    return (x.abs() * sharp < 1).to(x.dtype) * (sharp / 2)


def _triangle(x: Tensor, sharp: Tensor) -> Tensor:
    return (1 - x.abs() * sharp).clamp(min=0) * sharp


def _sigmoid(x: Tensor, sharp: Tensor) -> Tensor:
    return sharp * (torch.sigmoid(sharp * x) * torch.sigmoid(-sharp * x))


def _gaussian(x: Tensor, sharp: Tensor) -> Tensor:
    return torch.exp((sharp * x).square() / -2) * (sharp / math.sqrt(2 * math.pi))


_SHAPES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[float], float]]] = {
    # a surrogate of integral 1 by its sharpness, and omega: the sharpness at which it holds A = 2a within |u| <= 1
    "atan": (_atan, lambda a: math.tan(math.pi * a) * 2 / math.pi),
    "rectangle": (_rectangle, lambda a: 2 * a),
    "triangle": (_triangle, lambda a: 1 - math.sqrt(1 - 2 * a)),
    "sigmoid": (_sigmoid, lambda a: 2 * math.atanh(2 * a)),
    "gaussian": (_gaussian, lambda a: math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * a, dtype=torch.float64)))),
}


def assg(h: Float[Tensor, "t n ..."], spec: NeuronSpec, memory: Memory, layer: int, a: float, shape: str) -> Slopes:
    """A surrogate of sharpness omega / (M + 1.5 D + 1e-4) at every neuron, step and image, u = h - threshold.

    M <- 0.9 M + 0.1 |u| from 1 and D <- 0.9 D + 0.1 ||u| - M| from 0 go on from one gradient to the next, in `memory`.
    Adaptive sharpness surrogate gradient, Wang et al. 2025, arXiv:2512.22522, where a = A/2 bounds the gradient that
    is lost; 0.41 to 0.45 did best. The source gives omega itself for the shapes other than atan; here every shape has
    the omega of its own bound. As in the source, further noise samples of an image use what the first one left.
    """
    slope, omega = _SHAPES[shape]
    m, d = memory.recall((layer, "M"), h, 1.0), memory.recall((layer, "D"), h, 0.0)
    if m.shape != h.shape:
        raise ValueError(
            f"assg: expected the images it remembers {tuple(m.shape)}, got {tuple(h.shape)}; memory.begin(count) "
            "starts with other images, memory.see(rows) says which of them come next"
        )
    m, d = in_order_of(m, h), in_order_of(d, h)
    if memory.keep:
        count = h.shape[1] // memory.copies
        for part in parts(h[:, :count]):
            size, its_m, its_d = (h[:, part] - spec.threshold).abs_(), m[:, part], d[:, part]
            its_m.mul_(0.9).add_(size, alpha=0.1)
            its_d.mul_(0.9).add_(size.sub_(its_m).abs_(), alpha=0.1)
        memory.remember((layer, "M"), m)
        memory.remember((layer, "D"), d)
        for copy in range(1, memory.copies):
            m[:, copy * count : (copy + 1) * count] = m[:, :count]
            d[:, copy * count : (copy + 1) * count] = d[:, :count]
    w = omega(a)
    return lambda part: slope(h[:, part] - spec.threshold, w / (m[:, part] + d[:, part] * 1.5 + 1e-4))


# ---- another forward -----------------------------------------------------------------------------------------------


def put_relus(net: nn.Module) -> None:
    """Put ReLUs of current over threshold in the place of the neurons of a network, in place: same weights and norms.

    Conversion-based approximation: an adversary differentiates that network and shows what it finds to the spiking one.
    Ding et al. 2022 (SNN-RAT), whose released tester takes it unless told otherwise, on thresholds of 1.
    """
    for m in net.modules():
        if isinstance(m, Neuron) and m.spec.kind != "relu":
            top = m.spec.threshold - m.spec.rest if m.threshold is None else m.threshold
            m.run = functools.partial(_relu_over, top)
            m.spec = NeuronSpec(kind="relu")
            m.__dict__["_parameters"] = m._parameters | {"leak": None, "threshold": None}


def _relu_over(top: Value, x: Tensor, _spec: NeuronSpec, _leak: Tensor | None) -> Tensor:
    return (x / top).relu()


def refuse_relus(net: nn.Module, name: str) -> None:
    """ValueError where a network computes with spikes as such."""
    found = next((m for m in net.modules() if isinstance(m, SumPool | StochasticPool2d)), None)
    if found is not None:
        raise ValueError(f"{name}: cba puts ReLUs in the place of neurons, and a {type(found).__name__} needs spikes")


# ---- names ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NeuronRoute:
    """A neuron's route as it is named: the rule, its setting, and the reset in the graph or not (None: as it is)."""

    name: str
    setting: float | None = None
    in_graph: bool | None = None

    @property
    def surrogate(self) -> bool:
        """Does only the surrogate, or the path through the reset, change?"""
        return self.name == "own" or self.name in SURROGATES

    @property
    def remembers(self) -> bool:
        """Does it need to know the images from one gradient to the next?"""
        return self.name.startswith("assg")

    @property
    def timed(self) -> bool:
        """Does it go back through time?"""
        return self.surrogate or self.remembers or self.name == "pdsg"

    def respec(self, spec: NeuronSpec) -> NeuronSpec:
        """The spec by which a neuron is differentiated; the spikes of both are the same."""
        if self.in_graph is not None:
            spec = replace(spec, detach_reset=not self.in_graph)
        if self.setting is not None and self.name in SURROGATES:
            spec = replace(spec, surrogate=Surrogate(self.name, self.setting))
        return spec

    def rule(self, memory: Memory | None) -> Rule:
        """The rule for one call of a network."""
        a, name = self.setting, self.name
        if self.surrogate:
            return Rule(self.respec)
        if self.remembers:
            assert memory is not None and a is not None
            shape = name.partition("-")[2] or "atan"
            return Rule(self.respec, lambda h, spec, _leak, layer: assg(h, spec, memory, layer, a, shape))

        def slope(h: Tensor, spec: NeuronSpec, leak: Value) -> Tensor:
            if name == "pdsg":
                return pdsg(h, spec)
            if name == "hart":
                return triangle_derivative(h - spec.threshold, a or 0.0)
            if name == "rga":
                return rga(h, spec, leak, a or 0.0)
            return bptr3(h, spec, leak) if name == "bptr3" else bptr2(h, spec)

        flow: Flow = "through" if name == "pdsg" else "mean" if name == "hart" else "alone"
        return Rule(self.respec, lambda h, spec, leak, _layer: lambda part: slope(h[:, part], spec, leak), flow)

    def words(self, spec: NeuronSpec) -> str:
        """The route of neurons of this spec in words, e.g. 'ASSG(0.43, atan), hard reset detached'."""
        if self.name == "cba":
            return "CBA"
        spec = self.respec(spec)
        if spec.kind == "relu":
            return "ReLU"
        if self.surrogate:
            text = f"BPTT {spec.surrogate.name}({spec.surrogate.width:g})"
        elif self.remembers:
            text = f"ASSG({self.setting:g}, {self.name.partition('-')[2] or 'atan'})"
        elif self.name in ("bptr", "bptr2"):
            text = "BPTR2"
        else:
            text = self.name.upper() + ("" if self.setting is None else f"({self.setting:g})")
        if not self.timed:
            return text
        reset, where = "soft" if spec.reset is None else "hard", "detached" if spec.detach_reset else "in the graph"
        return f"{text}, {reset} reset {where}"


def neuron_route(text: str) -> NeuronRoute:
    """A neuron's route by its name; ValueError with what is allowed."""
    bare, plus, ending = text.partition("+")
    name, colon, number = bare.partition(":")
    known = name in ("own", "cba") or name in DEFAULTS or name in SURROGATES
    if not known or (plus and ending not in ("reset", "detach")):
        rules = ", ".join((*(n for n in DEFAULTS if n not in SURROGATES), "cba"))
        raise ValueError(
            f"neuron route: expected own, a surrogate ({', '.join(SURROGATES)}) or one of {rules}, then a setting as "
            f"in 'atan:4', then +reset or +detach as in 'atan:4+reset', got {text!r}"
        )
    default = None if name in ("own", "cba") else DEFAULTS.get(name, 1.0)
    if colon and default is None:
        raise ValueError(f"neuron route: {name} has no setting, got {text!r}; leave ':{number}' out")
    try:
        setting = float(number) if colon else default
    except ValueError:
        raise ValueError(f"neuron route: expected a number behind '{name}:', got {text!r}") from None
    if plus and not NeuronRoute(name).timed:
        raise ValueError(f"neuron route: {name} does not go through the reset, got {text!r}; leave '+{ending}' out")
    found = NeuronRoute(name, setting, ending == "reset" if plus else None)
    _check(found)
    return found


def _check(found: NeuronRoute) -> None:
    value = found.setting
    if value is None:
        return
    if found.surrogate:
        Surrogate(found.name, value)
    elif found.remembers and not 0 < value < 0.5:
        raise ValueError(
            f"neuron route {found.name}: expected a = A/2 between 0 and 0.5 (best 0.41 to 0.45), got {value:g}"
        )
    elif found.name == "hart" and not 0 < value < math.inf:
        raise ValueError(f"neuron route hart: expected a half width above 0 (searched in 0.1 to 2.5), got {value:g}")
    elif found.name == "rga" and not 0 <= value <= 1:
        raise ValueError(f"neuron route rga: expected a slope gamma in 0..1 (the source: 0.2), got {value:g}")
