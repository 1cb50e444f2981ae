"""Encoders: pixels [n c h w] in 0..1 to an input sequence [t n c h w], as pure functions with a declared backward rule.

A discrete encoder has a true gradient of zero almost everywhere. What an adversary uses instead is named, never silent:

    true       the real derivative (direct code)
    identity   each step passes its gradient on as if it had carried the pixel itself: g = sum_t G_t
    weighted   the same, weighted as the code weights its bits: g = sum_t 2^-(1 + t mod bits) G_t
    secant     the slope of the code between the neighbouring grey levels: g = sum_t G_t (E[v+1,t] - E[v-1,t]) / (2/255)
               (one-sided at black and at white)
    none       severed: asking for a pixel gradient is an error, not a row of zeros

Finite codes carry their `codebook` [256, t]: the code of every grey level. Off-grid pixels are rounded to the nearest
grey level first, as an 8-bit image file would.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparsetrail._shapes import Float

BACKWARD_RULES = ("true", "identity", "weighted", "secant", "none")


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An encoder ready to call. `knobs` rebuild it through `ENCODERS[name](**knobs)`; `random` draws at each call.

    `frames` tells which distinct frame each step shows (phase code: t mod bits; direct code: always frame 0), `slope`
    is the backward rule, [t] or by grey level [256 t], None if severed. `draws` is the generator of a random encoder
    that was made from a seed. ValueError where `frames` are told without a codebook and are not the pixels themselves.
    """

    name: str
    knobs: dict[str, Any]
    steps: int
    backward: str
    apply: Callable[[Tensor], Tensor] = field(repr=False, compare=False)
    codebook: Tensor | None = field(default=None, repr=False, compare=False)
    random: bool = False
    frames: tuple[int, ...] | None = field(default=None, repr=False, compare=False)
    slope: Tensor | None = field(default=None, repr=False, compare=False)
    draws: torch.Generator | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"encoder {self.name}: expected a whole number of steps from 1, got {self.steps!r}")
        if self.frames is None or self.codebook is not None:
            return
        probe = torch.linspace(0, 1, 5).view(1, 1, 1, 5)
        if not torch.equal(self.apply(probe), probe.expand(self.steps, *probe.shape)):
            raise ValueError(
                f"encoder {self.name}: expected frames that show the pixels themselves, found others; give the "
                "codebook [256 t] too, or leave frames out"
            )

    def reseed(self, key: int) -> None:
        """Let what a random encoder draws from here on depend on its seed and this key, not on earlier calls."""
        if self.draws is not None:
            self.draws.manual_seed((self.knobs["seed"] * 1_000_003 + key + 1) % (2**63 - 1))

    def distinct(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "f n c h w"], Tensor | None]:
        """The distinct frames of the code of `x`, and the slope of each: [f], or [f n c h w] by pixel."""
        assert self.frames is not None
        first = tuple(self.frames.index(f) for f in range(max(self.frames) + 1))
        slope = None if self.slope is None else _at(self.slope, x.device, first)
        if self.codebook is None:
            return x.expand(len(first), *x.shape), slope
        level = grey_levels(x)
        if slope is not None and slope.ndim == 2:
            slope = slope[:, level]
        return _at(self.codebook, x.device, first)[:, level].to(x.dtype), slope

    def __call__(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "t n c h w"]:
        if not x.is_floating_point():
            raise ValueError(f"encoder {self.name}: expected float pixels in 0..1, got {x.dtype}; divide uint8 by 255")
        return self.apply(x)

    def route(self, backward: str) -> "Encoder":
        """The same encoder with another backward rule."""
        if "backward" not in self.knobs:
            if backward == self.backward:
                return self
            raise ValueError(f"encoder {self.name}: its backward rule is {self.backward} and cannot be changed")
        return ENCODERS[self.name](**(self.knobs | {"backward": backward}))

    def over(self, steps: int) -> "Encoder":
        """The same encoder for another number of steps."""
        if steps == self.steps:
            return self
        if "steps" not in self.knobs:
            raise ValueError(f"encoder {self.name}: its number of steps is {self.steps} and cannot be changed")
        return ENCODERS[self.name](**(self.knobs | {"steps": steps}))


class _Coded(torch.autograd.Function):
    """Forward: look the code up. Backward: gradient times the slope of the rule, [256, t], or [t] at any grey level."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, code: Tensor, slope: Tensor) -> Tensor:
        return _look_up(code, grey_levels(x)).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, _, slope = inputs
        ctx.save_for_backward(x, slope)

    @staticmethod
    def backward(ctx, grad):
        x, slope = ctx.saved_tensors
        at = _look_up(slope, grey_levels(x)) if slope.ndim == 2 else _at(slope, grad.device).view(-1, *[1] * x.ndim)
        return (grad * at.to(grad.dtype)).sum(0), None, None


def grey_levels(x: Tensor) -> Tensor:
    """Nearest grey level 0..255 of pixels in 0..1, int64. Half-way values go to the even level, NaN to 0."""
    return (x.detach() * 255).nan_to_num().round().clamp(0, 255).long()


def _look_up(table: Tensor, v: Tensor) -> Tensor:
    return _at(table, v.device)[:, v]


_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of tables, where they are used


def _at(table: Tensor, device: torch.device, columns: tuple[int, ...] | None = None) -> Tensor:
    """An encoder's table [256 t] as [t 256] (or [t] as it is), all steps or some, kept where it is used.

    Copied once, and kept as long as the table: a CUDA graph cannot copy from the CPU, and reads it where it lay when
    the graph was made. A table is never changed.
    """
    held = _copies.setdefault(table, {})
    if (device, columns) not in held:
        with torch.inference_mode(False), torch.no_grad():
            part = table if columns is None else table[..., list(columns)]
            mine = (part.t() if part.ndim == 2 else part).contiguous().to(device)
            held.setdefault((device, columns), mine)  # of two threads the first: its copy may be in a graph
    return held[device, columns]


def _coded(name: str, knobs: dict[str, Any], code: Tensor, weights: Tensor | None, backward: str) -> Encoder:
    steps = code.shape[1]
    if backward == "identity":
        slope = torch.ones(steps)
    elif backward == "weighted" and weights is not None:
        slope = weights
    elif backward == "secant":
        level = torch.arange(256)
        up, down = (level + 1).clamp(max=255), (level - 1).clamp(min=0)
        slope = (code[up] - code[down]) * 255 / (up - down)[:, None]
    elif backward == "none":
        slope = torch.zeros(steps)
    else:
        fit = [r for r in ("identity", "weighted", "secant", "none") if r != "weighted" or weights is not None]
        raise ValueError(f"encoder {name}: backward expected one of {', '.join(fit)}, got {backward!r}")

    def apply(x: Tensor) -> Tensor:
        if backward == "none":
            return _look_up(code, grey_levels(x)).to(x.dtype)
        return _Coded.apply(x, code, slope)

    of_steps = slope if slope.ndim == 1 else torch.zeros(steps)  # frames that look the same may have another slope
    columns = [tuple(column) for column in torch.cat([code, of_steps[None]]).t().tolist()]
    seen = list(dict.fromkeys(columns))
    return Encoder(
        name=name,
        knobs=knobs,
        steps=steps,
        backward=backward,
        apply=apply,
        codebook=code,
        frames=tuple(seen.index(c) for c in columns),
        slope=None if backward == "none" else slope,
    )


def phase(*, steps: int = 10, bits: int = 8, weighting: str = "none", backward: str = "identity") -> Encoder:
    """Phase code: step t shows bit t mod `bits` of the grey level, most significant first.

    Kim et al. 2018, Neurocomputing 311:373, as input code only. The paper (T=10, K=8) shows the bits unweighted,
    `weighting="none"`; `weighting="input"` multiplies step t by 2^-(1 + t mod bits). Exact for all 256 grey levels,
    where SpikingJelly's encoder takes v/256 and refuses 1.0.
    """
    if steps < 1 or bits < 1:
        raise ValueError(f"phase: expected steps >= 1 and bits >= 1, got steps={steps}, bits={bits}")
    if weighting not in ("none", "input"):
        raise ValueError(f"phase: weighting expected 'none' or 'input', got {weighting!r}")
    place = torch.arange(steps) % bits
    level = torch.arange(256)[:, None]
    code = torch.where(place < 8, (level >> (7 - place).clamp(min=0)) & 1, 0).float()
    weights = torch.exp2(-(1.0 + place))
    if weighting == "input":
        code = code * weights
    knobs = {"steps": steps, "bits": bits, "weighting": weighting, "backward": backward}
    return _coded("phase", knobs, code, weights, backward)


def bit_plane(*, bits: int = 8, backward: str = "identity") -> Encoder:
    """Bit planes of the grey level, most significant first, each shown once. Luu et al. 2024, arXiv:2410.08229."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bit_plane: expected 1 to 8 bits, got {bits}")
    plane = phase(steps=bits, bits=bits)
    assert plane.codebook is not None
    weights = torch.exp2(-(1.0 + torch.arange(bits)))
    return _coded("bit_plane", {"bits": bits, "backward": backward}, plane.codebook, weights, backward)


def latency(*, steps: int = 10, curve: str = "linear", backward: str = "identity") -> Encoder:
    """Time to first spike: one spike a pixel, the brighter the earlier, at round((T-1)(1-x)), half to even.

    `curve="log"` fires at round(T - 1 - ln(a x + 1)) with a = e^(T-1) - 1. Both as SpikingJelly's LatencyEncoder: a
    black pixel spikes at the last step.
    """
    if steps < 2:
        raise ValueError(f"latency: expected at least 2 steps, got {steps}")
    x = torch.arange(256, dtype=torch.float64) / 255
    if curve == "linear":
        when = ((steps - 1.0) * (1.0 - x)).round()
    elif curve == "log":
        # a x + 1 = e^(T-1) x + (1 - x); e^(T-1) itself overflows float32 from 90 steps on
        when = (steps - 1.0 - torch.logaddexp(x.log() + (steps - 1.0), (1 - x).log())).round()
    else:
        raise ValueError(f"latency: curve expected 'linear' or 'log', got {curve!r}")
    code = torch.nn.functional.one_hot(when.long(), steps).float()
    return _coded("latency", {"steps": steps, "curve": curve, "backward": backward}, code, None, backward)


def from_codebook(table: Tensor | Sequence[Sequence[float]], *, backward: str = "identity") -> Encoder:
    """A code of your own: `table` [256 t] says what every grey level shows, step by step.

    Differentiated straight through, unless `backward` says secant (of the levels beside it: zero where a coarse code
    shows the same) or none. ValueError for another shape or values that are not finite.
    """
    code = torch.as_tensor(table, dtype=torch.float32).detach().cpu().clone()
    if code.ndim != 2 or len(code) != 256 or not code.shape[1] or not bool(code.isfinite().all()):
        raise ValueError(
            f"from_codebook: expected a finite table [256 t], one row a grey level, got {tuple(code.shape)}"
        )
    return _coded("from_codebook", {"table": code.tolist(), "backward": backward}, code, None, backward)


def direct(*, steps: int = 10) -> Encoder:
    """The image itself at every step; differentiable. Rueckauer et al. 2017, doi:10.3389/fnins.2017.00682."""
    if steps < 1:
        raise ValueError(f"direct: expected steps >= 1, got {steps}")

    def apply(x: Tensor) -> Tensor:
        return x.unsqueeze(0).expand(steps, *x.shape)

    return Encoder(
        name="direct",
        knobs={"steps": steps},
        steps=steps,
        backward="true",
        apply=apply,
        frames=(0,) * steps,
        slope=torch.ones(steps),
    )


class _Bernoulli(torch.autograd.Function):
    """Backward: that of the expectation of a step, x, or 2x - 1 of a signed one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, u: Tensor, signed: bool) -> Tensor:
        return _drawn(x, u, signed)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.slope = 2 if inputs[2] else 1

    @staticmethod
    def backward(ctx, grad):
        return grad.sum(0) * ctx.slope, None, None


def _drawn(x: Tensor, u: Tensor, signed: bool) -> Tensor:
    if not signed:
        return (u <= x).to(x.dtype)
    p = 2 * x - 1
    return p.sign() * (u <= p.abs()).to(x.dtype)


def poisson(
    *,
    steps: int = 10,
    signed: bool = False,
    backward: str = "identity",
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> Encoder:
    """Rate code: each step spikes with probability x, drawn afresh at every call from `generator` (or from `seed`).

    As SpikingJelly's PoissonEncoder, 1[U <= x]. `signed` spikes are sign(p) 1[U <= |p|] with p = 2x - 1: Sharmin et al.
    2020, arXiv:2003.10399, the input discretisation. Random, so an attack on it needs averaging over draws.
    """
    if steps < 1:
        raise ValueError(f"poisson: expected steps >= 1, got {steps}")
    if backward not in ("identity", "none"):
        raise ValueError(f"encoder poisson: backward expected identity or none, got {backward!r}")
    g = torch.Generator().manual_seed(seed) if generator is None else generator

    def apply(x: Tensor) -> Tensor:
        u = torch.rand((steps, *x.shape), generator=g, device=g.device).to(x)
        return _Bernoulli.apply(x, u, signed) if backward == "identity" else _drawn(x.detach(), u, signed)

    knobs: dict[str, Any] = {"steps": steps, "backward": backward, "seed": g.initial_seed()}
    if signed:  # left out otherwise, so that what was written before it existed keeps its name
        knobs["signed"] = True
    own = g if generator is None else None
    return Encoder(name="poisson", knobs=knobs, steps=steps, backward=backward, apply=apply, random=True, draws=own)


ENCODERS: dict[str, Callable[..., Encoder]] = {
    "phase": phase,
    "direct": direct,
    "poisson": poisson,
    "latency": latency,
    "bit_plane": bit_plane,
    "from_codebook": from_codebook,
}


def build_encoder(name: str, **knobs: Any) -> Encoder:
    """An encoder by name, refused with the list of names and of its settings."""
    if name not in ENCODERS:
        raise ValueError(f"encoder: expected one of {', '.join(ENCODERS)}, got {name!r}")
    try:
        return ENCODERS[name](**knobs)
    except TypeError as error:
        raise ValueError(f"encoder {name}: {error}") from None
