"""IF, LIF and PLIF neurons over a whole sequence [t ...]: the state is a local variable, there is nothing to reset.

Per step, with v the potential left by the last step (v_reset at the start, 0 for a soft reset):

    IF    h = v + x
    LIF   h = v + (x - (v - r)) / tau        or, without decaying the input, h = v - (v - r) / tau + x
    PLIF  as LIF with 1/tau = sigmoid(w), w learnt; Fang et al. 2021, arXiv:2007.05785
    DIET  h = leak v + x / threshold with both learnt, one a layer, in units of the threshold; Rathi & Roy 2020,
          arXiv:2008.03658, with the soft reset out of the graph
    ReLU  no spike and no state: max(0, x) at every step, the twin that a spiking network is converted from
    s = 1[h >= threshold];   hard reset v = s r + (1 - s) h,   soft reset v = h - s threshold

with r the reset potential (0 for a soft reset). `reference` is that, step by step, with autograd; `fused` is one
forward and one backward over all steps that keeps a single tensor, the charged potential h (a learnt leak or threshold
keeps what it multiplies too). On a CPU with a C compiler both are kernels generated from the same `charge`, `discharge`
and surrogate, and on a GPU with NVRTC (`cuda`). A `Rule` puts another backward behind the same spikes (`routes`).
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import once_differentiable

from sparsetrail._shapes import Float
from sparsetrail.snn import cuda, kernels
from sparsetrail.snn.kernels import Value
from sparsetrail.snn.surrogate import SURROGATES, Surrogate, heaviside


@dataclass(frozen=True, kw_only=True)
class NeuronSpec:
    """What a neuron is. `reset` is the hard-reset potential, or None for a soft reset (subtract the threshold).

    `detach_reset` keeps the gradient out of the reset path; `tau` is in steps and read by LIF and PLIF (its start).
    LIF without `decay_input` multiplies the old potential by 1 - 1/tau, the leak of many papers. DIET starts from
    `leak` (0..1, 1 leaks nothing) and `threshold`; `learn=False` keeps both as they are.
    """

    kind: Literal["if", "lif", "plif", "diet", "relu"] = "if"
    threshold: float = 1.0
    reset: float | None = 0.0
    detach_reset: bool = True
    tau: float = 2.0
    decay_input: bool = True
    leak: float = 1.0
    learn: bool = True
    surrogate: Surrogate = field(default_factory=Surrogate)

    def __post_init__(self) -> None:
        if self.kind not in ("if", "lif", "plif", "diet", "relu"):
            raise ValueError(f"neuron: expected if, lif, plif, diet or relu, got {self.kind!r}")
        if not (self.threshold > 0 and math.isfinite(self.threshold)):
            raise ValueError(f"threshold: expected a positive number, got {self.threshold}")
        if self.reset is not None and not -math.inf < self.reset < self.threshold:
            raise ValueError(f"reset: expected a potential below the threshold {self.threshold}, got {self.reset}")
        if self.kind in ("lif", "plif") and not 1 < self.tau < math.inf:
            raise ValueError(f"tau: expected a time constant above 1 step, got {self.tau}")
        if not 0 <= self.leak <= 1:
            raise ValueError(f"leak: expected a factor 0..1 on the old potential (above 1 it grows), got {self.leak}")
        if self.kind != "diet" and (self.leak != 1.0 or not self.learn):
            raise ValueError(
                f"leak, learn: only diet neurons have them, got {self.kind}; for lif give tau = 1/(1 - leak)"
            )
        if self.kind == "diet" and (self.reset is not None or not self.detach_reset):
            raise ValueError("diet: expected the soft reset out of the graph, its only one; give reset=None")

    def soft(self) -> "NeuronSpec":
        """An IF neuron of threshold 1 that subtracts it, so that no spike is lost; with the surrogate of this one."""
        return NeuronSpec(reset=None, detach_reset=self.detach_reset, surrogate=self.surrogate)

    @property
    def rest(self) -> float:
        """The potential at the start of a sequence."""
        return 0.0 if self.reset is None else self.reset


def charge(x: Value, v: Value, spec: NeuronSpec, leak: Value) -> Value:
    """Potential before the spike. The order of operations is fixed: rounding decides which ties spike."""
    if spec.kind == "if":
        return v + x
    away = v - spec.rest
    if spec.kind == "lif":
        return v + (x - away) / spec.tau if spec.decay_input else v - away / spec.tau + x
    assert leak is not None
    return v + (x - away) * leak if spec.decay_input else v - away * leak + x


def discharge(h: Value, s: Value, spec: NeuronSpec) -> Value:
    """Potential after the spike."""
    if spec.reset is None:
        return h - s * spec.threshold
    return s * spec.reset + (1 - s) * h


def state_dtype(x: Tensor) -> torch.dtype:
    """The state is float32 whatever the input, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def reference(x: Float[Tensor, "t ..."], spec: NeuronSpec, leak: Tensor | None = None) -> Float[Tensor, "t ..."]:
    """Spikes of a sequence, step by step under autograd: the definition that every faster path must equal."""
    v = torch.full_like(x[0], spec.rest, dtype=state_dtype(x))
    spikes = []
    for now in x.to(v.dtype).unbind(0):
        h = charge(now, v, spec, leak)
        s = heaviside(h - spec.threshold, spec.surrogate)
        v = discharge(h, s.detach() if spec.detach_reset else s, spec)
        spikes.append(s)
    return torch.stack(spikes).to(x.dtype)


class _Fused(torch.autograd.Function):
    """All steps at once; h is an output so that double backward and functorch see it depend on x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, leak: Tensor | None, spec: NeuronSpec) -> tuple[Tensor, Tensor]:
        k = kernel(spec, x, leak)
        if k is None:
            return _sequence(x, leak, spec)
        x = x.contiguous()
        s, h, size = torch.empty_like(x), torch.empty_like(x), x.numel() // len(x)
        frame, _ = kernels.frames(tuple(range(len(x))))
        at = map(kernels.pointer, (x, frame, None, None, None, leak, s, h))
        k.fire(*at, len(x), size, size, 1, torch.get_num_threads())
        return s, h

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, leak, ctx.spec = inputs
        _, charged = output
        ctx.on = kernels.switched_on()  # a GPU's backward runs in a thread of its own, where no block was entered
        ctx.set_materialize_grads(False)
        learnt = leak is not None
        held = charged, leak, x if learnt and ctx.spec.decay_input else None
        ctx.save_for_backward(*held)
        ctx.save_for_forward(*held)

    @staticmethod
    def backward(ctx, grad_s: Tensor | None, grad_h: Tensor | None):
        charged, leak, x = ctx.saved_tensors
        plain = grad_h is not None or torch.is_grad_enabled() or not ctx.on
        k = None if plain or grad_s is None else kernel(ctx.spec, charged, leak, grad_s)
        if k is None or grad_s is None:
            return (*through_time(grad_s, grad_h, charged, x, leak, ctx.spec), None)
        grad_s, charged = grad_s.contiguous(), charged.contiguous()  # of plain steps they lie as the input did
        out, size = torch.empty_like(charged), charged.numel() // len(charged)
        frame, last = kernels.frames(tuple(range(len(charged))))
        x = None if x is None else x.contiguous()
        rooms = cuda.GRID if charged.is_cuda else torch.get_num_threads()
        of_leak = None if leak is None else torch.zeros(rooms, dtype=torch.float64, device=charged.device)
        at = (grad_s, charged, frame, last, None, None, None, None, leak, x, None, out, None, of_leak)
        at = map(kernels.pointer, at)
        k.back(*at, len(charged), size, 1, torch.get_num_threads())
        if leak is None or of_leak is None:
            return out, None, None
        return out, of_leak.sum().to(leak.dtype).reshape(leak.shape), None

    @staticmethod
    def jvp(ctx, tangent_x: Tensor | None, tangent_leak: Tensor | None, _):
        charged, leak, x = ctx.saved_tensors
        return _along_time(tangent_x, tangent_leak, charged, x, leak, ctx.spec)


def kernel(spec: NeuronSpec, x: Tensor, leak: Tensor | None = None, *more: Tensor, given: bool = False) -> Any:
    """The kernels of a neuron if they serve these tensors: plain float32 or float64 on one device; else None.

    With `given`, the slopes are handed to `back` instead of computed from the surrogate.
    """
    if (spec.kind == "plif") != (leak is not None) or (leak is not None and leak.numel() != 1):
        return None
    tensors, device = (x, *more) if leak is None else (x, leak, *more), x.device
    if device.type == "cuda":
        if not kernels.switched_on() or x.dtype not in kernels.REAL or not kernels.usable(*tensors, device="cuda"):
            return None
        return _compile(spec, x.dtype, SURROGATES[spec.surrogate.name], given, len(x), device.index)
    if not kernels.available(x.dtype) or not kernels.usable(*tensors):
        return None
    return _compile(spec, x.dtype, SURROGATES[spec.surrogate.name], given)


@functools.cache
def _compile(
    spec: NeuronSpec, dtype: torch.dtype, _surrogate: Callable, given: bool, steps: int = 0, gpu: int | None = None
) -> Any:
    """The surrogate is part of the key: a name can be given another function. On a GPU, for so many steps."""
    try:
        parts = steps_in_c(spec, given=given)
    except Exception as error:  # whatever a step does that symbols cannot follow
        kernels.say_once(f"{spec.kind}, {spec.surrogate.name}: the plain path serves, slower and the same ({error})")
        return None
    return kernels.neuron(parts, dtype) if gpu is None else cuda.neuron(parts, dtype, steps, gpu)


def steps_in_c(spec: NeuronSpec, *, given: bool = False) -> dict[str, Any]:
    """One step of the neuron forward and back, as the functions below write it with symbols for tensors."""
    names: list[Value] = [kernels.Symbol(name) for name in ("x", "v", "h_", "s_", "slope")]
    x, v, h, s, slope = names
    learnt = spec.kind == "plif"
    leak: Value = kernels.Symbol("leak") if learnt else None
    keep, gain = gains(leak, spec)
    spike = h >= spec.threshold
    return {
        "REST": spec.rest,
        "CHARGE": charge(x, v, spec, leak),
        "SPIKE": spike,
        "DISCHARGE": discharge(h, s, spec),
        "SLOPE": kernels.Symbol("slopes[at + i]") if given else spec.surrogate(h - spec.threshold),
        "KEPT": _kept(h, slope, (h - spec.threshold) >= 0, spec),
        "KEEP": keep,
        "GAIN": gain,
        "LEARNT": learnt,
        "LEVER": _lever(v, x if spec.decay_input else None, spec),
    }


def _sequence(x: Tensor, leak: Tensor | None, spec: NeuronSpec) -> tuple[Tensor, Tensor]:
    """Spikes and charged potentials of all steps."""
    v = torch.full_like(x[0], spec.rest)
    spikes, charged = [], []
    for now in x.unbind(0):
        h = charge(now, v, spec, leak)
        s = (h >= spec.threshold).to(h.dtype)
        v = discharge(h, s, spec)
        spikes.append(s)
        charged.append(h)
    return torch.stack(spikes), torch.stack(charged)


def _gate(h: Tensor, spec: NeuronSpec) -> Tensor:
    """The spike as the reset sees it: with its derivative only where a second derivative is under way."""
    x = h - spec.threshold
    if not spec.detach_reset and (torch.is_grad_enabled() or unpack_dual(h).tangent is not None):
        return heaviside(x, spec.surrogate)
    return (x >= 0).to(h.dtype)  # a Function costs 30 us a step (torch 2.13, CPU): nothing to buy in a plain backward


def _kept(h: Value, slope: Value, s: Value, spec: NeuronSpec) -> Value:
    """dv/dh: how far the potential after the spike follows the one before it, s the spike as the reset sees it."""
    path = torch.ones_like(h) if spec.reset is None else 1 - s
    if spec.detach_reset:
        return path
    return path + slope * (-spec.threshold if spec.reset is None else spec.reset - h)


def gains(leak: Value, spec: NeuronSpec) -> tuple[Any, Any]:
    """dh/dv and dh/dx of the charge."""
    if spec.kind == "if":
        return 1.0, 1.0
    share = leak if leak is not None else 1 / spec.tau
    return 1 - share, share if spec.decay_input else 1.0


def _left(t: int, charged: Tensor, spec: NeuronSpec) -> Tensor:
    """The potential at the start of step t."""
    if t == 0:
        return torch.full_like(charged[0], spec.rest)
    return discharge(charged[t - 1], _gate(charged[t - 1], spec), spec)


def _lever(v: Value, x: Value, spec: NeuronSpec) -> Value:
    """dh/dleak; x is None where the input does not decay."""
    return spec.rest - v if x is None else x - (v - spec.rest)


def through_time(grad_s, grad_h, charged, x, leak, spec: NeuronSpec, slopes=None) -> tuple[Tensor, Tensor | None]:
    """Gradients of a sequence's input and of the leak from those of its spikes and charged potentials; plain steps.

    `slopes` are ds/dh of every step where the surrogate does not give them.
    """
    keep, gain = gains(leak, spec)
    carry: Any = None
    out: list[Tensor] = []
    grad_leak: Any = 0.0
    for t in range(len(charged) - 1, -1, -1):
        h = charged[t]
        slope = spec.surrogate(h - spec.threshold) if slopes is None else slopes[t]
        g = None if grad_s is None else grad_s[t] * slope
        if carry is not None:
            path = _kept(h, slope, _gate(h, spec), spec)
            g = carry * path if g is None else g + carry * path
        if grad_h is not None:
            g = grad_h[t] if g is None else g + grad_h[t]
        if g is None:
            g = torch.zeros_like(h)
        if leak is not None:
            grad_leak = grad_leak + (g * _lever(_left(t, charged, spec), None if x is None else x[t], spec)).sum()
        out.append(g if isinstance(gain, float) and gain == 1.0 else g * gain)
        carry = g if isinstance(keep, float) and keep == 1.0 else g * keep
    return torch.stack(out[::-1]), None if leak is None else grad_leak.to(leak.dtype).reshape(leak.shape)


def _along_time(tangent_x, tangent_leak, charged, x, leak, spec: NeuronSpec) -> tuple[Tensor, Tensor]:
    keep, gain = gains(leak, spec)
    carry: Any = 0.0
    spikes, potentials = [], []
    for t in range(len(charged)):
        slope = spec.surrogate(charged[t] - spec.threshold)
        d = carry * keep
        if tangent_x is not None:
            d = d + tangent_x[t] * gain
        if tangent_leak is not None:
            d = d + tangent_leak * _lever(_left(t, charged, spec), None if x is None else x[t], spec)
        spikes.append(slope * d)
        potentials.append(d)
        carry = d * _kept(charged[t], slope, _gate(charged[t], spec), spec)
    return torch.stack(spikes), torch.stack(potentials)


def fused(x: Float[Tensor, "t ..."], spec: NeuronSpec, leak: Tensor | None = None) -> Float[Tensor, "t ..."]:
    """Spikes of a sequence by one forward and one backward, those of `reference`, gradients to rounding.

    Exactly on a CPU; on a GPU PyTorch divides by a number that is no power of two through its reciprocal, and a
    potential within rounding of the threshold may fall on the other side of it.
    """
    return _Fused.apply(x.to(state_dtype(x)), leak, spec)[0].to(x.dtype)


Flow = Literal["through", "alone", "mean"]
Slopes = Callable[[slice], Tensor]  # ds/dh of some images [t n ...], or [1 n ...] where all steps share it


@dataclass(eq=False)
class Rule:
    """Another backward behind the same spikes, for one call of a network.

    `respec` changes what the backward reads of a spec. `slopes` gives ds/dh from a layer's charged potentials
    [t n c ...], its spec, its leak and its number in the call; None leaves that to the surrogate. `flow` is how a
    gradient passes between steps: `through` time, each step `alone`, or its `mean` over the steps.
    """

    respec: Callable[[NeuronSpec], NeuronSpec]
    slopes: Callable[[Tensor, NeuronSpec, Value, int], Slopes] | None = None
    flow: Flow = "through"
    count: int = 0

    def number(self) -> int:
        """The number of the next layer of the call."""
        self.count += 1
        return self.count - 1


_rule: contextvars.ContextVar[Rule | None] = contextvars.ContextVar("rule", default=None)


@contextlib.contextmanager
def ruled(rule: Rule | None) -> Iterator[None]:
    """Inside this block, in this thread, all neurons are differentiated by the rule; no network is touched."""
    token = _rule.set(rule)
    try:
        yield
    finally:
        _rule.reset(token)


def parts(h: Float[Tensor, "t n ..."]) -> Iterator[slice]:
    """Images by few, so that what is computed of them stays in the cache: half the time of whole tensors."""
    each = max(1, h.shape[1]) if h.is_cuda else max(1, 2**16 * h.shape[1] // max(1, h.numel()))
    return (slice(i, i + each) for i in range(0, h.shape[1], each))


def apart(grad: Tensor, slopes: Tensor, leak: Value, spec: NeuronSpec, flow: Flow) -> Tensor:
    """The gradient of the input from that of the spikes where nothing passes from step to step."""
    _, gain = gains(leak, spec)
    g = grad * slopes
    if flow == "mean":
        g = g.mean(0, keepdim=True).expand_as(g)
    return g if isinstance(gain, float) and gain == 1.0 else g * gain


def in_order_of(t: Tensor, like: Tensor) -> Tensor:
    """The same values, in memory as those of `like` lie."""
    return t if t.stride() == like.stride() and t.shape == like.shape else torch.empty_like(like).copy_(t)


def by_rule(
    grad: Tensor, h: Tensor, leak: Tensor | None, spec: NeuronSpec, rule: Rule, number: int, *, kernels_on: bool
) -> Tensor:
    """The gradient of a neuron's input [t n ...] from that of its spikes and from its charged potentials, by a rule."""
    assert rule.slopes is not None
    slopes = rule.slopes(h, spec, leak, number)
    if rule.flow != "through" and kernels.batched(grad):
        return apart(grad, slopes(slice(None)), leak, spec, rule.flow)
    whole = torch.empty_like(h)
    for part in parts(h):
        its = slopes(part)
        whole[:, part] = its if rule.flow == "through" else apart(grad[:, part], its, leak, spec, rule.flow)
    if rule.flow != "through":
        return whole
    k = kernel(spec, h, leak, grad, given=True) if kernels_on else None
    if k is None or h.stride(0) * len(h) != h.numel():
        return through_time(grad, None, h, None, leak, spec, whole)[0]
    grad, out = in_order_of(grad, h), torch.empty_like(h)
    frame, last = kernels.frames(tuple(range(len(h))))
    at = (grad, h, frame, last, None, None, None, None, leak, None, whole, out, None, None)
    k.back(*map(kernels.pointer, at), len(h), h.numel() // len(h), 1, torch.get_num_threads())
    return out


class _Ruled(torch.autograd.Function):
    """All steps at once, differentiated by a rule; first derivatives of the input only."""

    @staticmethod
    def forward(ctx, x: Tensor, leak: Tensor | None, spec: NeuronSpec, rule: Rule, number: int) -> Tensor:
        k = kernel(spec, x, leak, given=True)
        if k is None:
            s, h = _sequence(x, leak, spec)
        else:
            dense = x.stride() == torch.empty_like(x).stride() and x.stride(0) * len(x) == x.numel()
            x = x if dense else x.contiguous()
            s, h = torch.empty_like(x), torch.empty_like(x)
            frame, _ = kernels.frames(tuple(range(len(x))))
            at = map(kernels.pointer, (x, frame, None, None, None, leak, s, h))
            size = x.numel() // len(x)
            k.fire(*at, len(x), size, size, 1, torch.get_num_threads())
        ctx.rule, ctx.spec, ctx.number, ctx.on = rule, spec, number, kernels.switched_on()
        ctx.save_for_backward(h, leak)
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        h, leak = ctx.saved_tensors
        out = by_rule(grad, h, leak, ctx.spec, ctx.rule, ctx.number, kernels_on=ctx.on)
        return out, None, None, None, None


carried: contextvars.ContextVar[dict[nn.Module, Any] | None] = contextvars.ContextVar("carried", default=None)
"""Potentials of DIET neurons, in units of their threshold, and of the readout (with the steps it is the sum of), that
outlast a call; None: every call starts from rest."""

LEAST = 1e-3  # of a learnt threshold


@contextlib.contextmanager
def carrying(potentials: dict[nn.Module, Any] | None) -> Iterator[None]:
    """Inside this block, in this thread, a network goes on from `potentials` and leaves its own there, detached."""
    token = carried.set(potentials)
    try:
        yield
    finally:
        carried.reset(token)


def _relu(x: Tensor, _spec: NeuronSpec, _leak: Tensor | None) -> Tensor:
    return x.relu()


class Neuron(nn.Module):
    """A layer of neurons: spikes [t ...] from input currents [t ...].

    PLIF keeps one learnt scalar `w`, DIET a `leak` and a `threshold`; the latter runs as a PLIF neuron of threshold 1
    on x / threshold, which is the same function.
    """

    space: Any = None  # the engine's memory for maps, shared by the layers of a network
    leak: nn.Parameter | None
    threshold: nn.Parameter | None

    def __init__(self, spec: NeuronSpec, *, exact: bool = False) -> None:
        super().__init__()
        self.run = _relu if spec.kind == "relu" else reference if exact else fused
        if spec.kind == "plif":
            self.w = nn.Parameter(torch.tensor(-math.log(spec.tau - 1)))
        diet = spec.kind == "diet"
        for name in ("leak", "threshold"):
            value = torch.tensor(getattr(spec, name))
            self.register_parameter(name, nn.Parameter(value, requires_grad=spec.learn) if diet else None)
        if diet:
            spec = replace(spec, kind="plif", leak=1.0, learn=True, threshold=1.0, decay_input=False)
        self.spec = spec

    def confine(self) -> None:
        """Bring a learnt leak back to 0..1 and a learnt threshold to at least LEAST."""
        if self.leak is not None and self.threshold is not None:
            with torch.no_grad():
                self.leak.clamp_(0, 1)
                self.threshold.clamp_(min=LEAST)

    def differentiated(self) -> tuple[NeuronSpec, Rule | None]:
        """The spec, and the rule that gives the slopes, by which this layer is differentiated here and now."""
        rule = _rule.get()
        if rule is None or self.spec.kind == "relu":
            return self.spec, None
        return rule.respec(self.spec), None if rule.slopes is None else rule

    def forward(self, x: Float[Tensor, "t ..."]) -> Float[Tensor, "t ..."]:
        spec, rule = self.differentiated()
        if self.leak is not None and self.threshold is not None:
            return self._diet(x / self.threshold, self.leak, spec, rule)
        return self._run(x, spec, rule, torch.sigmoid(self.w) if spec.kind == "plif" else None)

    def _diet(
        self, x: Float[Tensor, "t ..."], leak: Tensor, spec: NeuronSpec, rule: Rule | None
    ) -> Float[Tensor, "t ..."]:
        before = carried.get()
        if before is not None and self in before:  # what is left of a potential joins the first current
            x = torch.cat([x[:1] + leak * before[self], x[1:]])
        s = self._run(x, spec, rule, 1.0 - leak)
        if before is not None:
            with torch.no_grad():
                v = torch.zeros_like(x[0])
                for now, spike in zip(x, s, strict=True):
                    v = v * leak + now - spike
                before[self] = v
        return s

    def _run(
        self, x: Float[Tensor, "t ..."], spec: NeuronSpec, rule: Rule | None, leak: Tensor | None
    ) -> Float[Tensor, "t ..."]:
        if rule is None:
            return self.run(x, spec, leak)
        leak = None if leak is None else leak.detach()
        some = x if x.ndim > 1 else x[:, None]
        return _Ruled.apply(some.to(state_dtype(x)), leak, spec, rule, rule.number()).to(x.dtype).view_as(x)

    def extra_repr(self) -> str:
        return str(self.spec)
