"""Theorem 2: do input gradient and weight gradients share their sizes and zeros? Per image, layer by layer.

With delta_l the gradient at the currents of layer l, and J_l the Jacobian from the input to these currents: the input
gradient is J_l^T delta_l, the weight gradient of layer l, in one step, delta_l h_{l-1}^T. Hence

    |h_{l-1}| / sigma_max(J_l) |dl/ds| <= |dl/dW_l|_F <= |h_{l-1}| / sigma_min(J_l) |dl/ds|

and the slack, cond(J_l), is what "a shared chain" amounts to; it need not grow with l. Zeros are not shared: W1^T fills
them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrail._shapes import Float, Int
from sparsetrail.core import Space, Victim
from sparsetrail.snn.surrogate import Surrogate, heaviside
from sparsetrail.theory.vulnerability import participation_ratio
from sparsetrail.trails import kind_of

Quantity = Literal["norm", "density", "pr"]
Sizes = dict[Quantity, Tensor]  # each [n]


@dataclass(frozen=True, kw_only=True)
class PerSample:
    """Norm, share of non-zero entries and participation ratio of gradients, per image [n], of the input and by layer.

    `dlogits_norm` is the norm of the gradient at the logits: how unsure the network is, a factor of all others.
    """

    space: Space
    input: Sizes
    layer: dict[str, Sizes]
    dlogits_norm: Tensor


def layer_gradients(
    victim: Victim,
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    *,
    space: Space,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    layers: Sequence[str] | None = None,
) -> PerSample:
    """Gradients of each image's own loss, one image at a time, in eval mode; only their sizes are kept.

    `layers` are names of modules with a weight, by default every convolution and linear layer whose weight has a
    gradient, in the order in which they are first called. `loss` takes logits and labels; by default plain
    cross-entropy, in float64 from the logits on. Scores are the victim's own, which resets what state it has; frozen
    weights are thawed for the call alone.
    """
    net = victim.module
    if net is None or net.training:
        raise ValueError(
            f"{victim.name}: expected the network behind the victim, in eval mode, found "
            f"{'none' if net is None else 'train mode'}; give Victim(module=...), call net.eval()"
        )
    modules = dict(net.named_modules())
    names = [k for k, m in modules.items() if kind_of(m) in ("conv", "linear")] if layers is None else list(layers)
    for name in names:
        if not isinstance(getattr(modules.get(name), "weight", None), Tensor):
            raise ValueError(f"layers: expected modules with a weight, found none named {name!r} in {victim.name}")
    weights: list[Tensor] = [modules[name].weight for name in names]  # type: ignore[misc]
    frozen = [w for w in weights if not w.requires_grad]
    rows: list[list[tuple[float, float, float]]] = []
    confidence, called, moved = [], dict[str, None](), set[str]()
    # who watches this very network sees it called, not a frozen twin
    seen = [modules[name].register_forward_pre_hook(lambda *_, at=name: called.setdefault(at)) for name in names]
    seen.append(net.register_forward_hook(lambda *_: None))
    try:
        for w in frozen:
            w.requires_grad_()
        for i in range(len(y)):
            pixels = x[i : i + 1].detach().requires_grad_(space == "pixel")
            with torch.enable_grad():
                u = victim.encode(pixels)
                u = u if space == "pixel" else u.detach().contiguous().requires_grad_()
                z = victim.logits(u)
                at = z.detach().double().requires_grad_()
                value = F.cross_entropy(at, y[i : i + 1]) if loss is None else loss(at, y[i : i + 1]).sum()
                (g,) = torch.autograd.grad(value, at)
                start = pixels if space == "pixel" else u
                found = torch.autograd.grad(z, [start, *weights], g.to(z), allow_unused=True)
            if all(v is None for v in found[1:]):
                raise ValueError(f"{victim.name}: expected `logits` to run `module`, found no gradient of its weights")
            confidence.append(float(g.norm()))
            moved |= {name for name, v in zip(names, found[1:], strict=True) if v is not None}
            rows.append([_sizes(v) for v in found])
    finally:
        for handle in seen:
            handle.remove()
        for w in frozen:
            w.requires_grad_(False)
    table = torch.tensor(rows, dtype=torch.float64)  # n, input and layers, three quantities

    def sizes(k: int) -> Sizes:
        return {"norm": table[:, k, 0], "density": table[:, k, 1], "pr": table[:, k, 2]}

    place = {name: k for k, name in enumerate(names, 1)}
    return PerSample(
        space=space,
        input=sizes(0),
        layer={name: sizes(place[name]) for name in (names if layers else called) if layers or name in moved},
        dlogits_norm=torch.tensor(confidence, dtype=torch.float64),
    )


def _sizes(g: Tensor | None) -> tuple[float, float, float]:
    if g is None:
        return 0.0, 0.0, math.nan
    g = g.detach().double().flatten()
    return float(g.norm()), float((g != 0).double().mean()), float(participation_ratio(g))


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """A rank correlation over images and its percentile bootstrap interval.

    `rho` is "constant" where one of the two does not vary, or there are fewer than three images: there is then nothing
    to correlate.
    """

    layer: str
    rho: float | Literal["constant"]
    low: float
    high: float
    n: int


def rank_correlation(
    name: str,
    x: Float[Tensor, " n"],
    y: Float[Tensor, " n"],
    *,
    generator: torch.Generator,
    n_boot: int = 1000,
    level: float = 0.95,
) -> Tracking:
    """Spearman's rho of two numbers an image, images drawn again `n_boot` times."""
    from scipy.stats import rankdata

    n = len(x)
    if n < 3 or bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return Tracking(layer=name, rho="constant", low=math.nan, high=math.nan, n=n)
    draws = torch.randint(n, (n_boot, n), generator=generator)
    again = [torch.tensor(rankdata(v[draws].numpy(), axis=1)) for v in (x, y)]
    ends = torch.nanquantile(_correlation(*again), torch.tensor([(1 - level) / 2, (1 + level) / 2]).double())
    rho = float(_correlation(*(torch.tensor(rankdata(v.numpy())) for v in (x, y))))
    return Tracking(layer=name, rho=rho, low=float(ends[0]), high=float(ends[1]), n=n)


def tracking(
    found: PerSample,
    *,
    generator: torch.Generator,
    of: Quantity = "norm",
    normalise: Literal["dlogits"] | None = None,
    n_boot: int = 1000,
    level: float = 0.95,
    together: bool = False,
) -> tuple[Tracking, ...]:
    """How far each layer's gradient ranks the images as the input's does; `normalise` divides both by the logits' norm.

    Images whose gradient at the logits is zero are left out of the normalised one: they have no direction. With
    `together` the intervals are of `level` for all layers together (Bonferroni).
    """
    if together:
        level, n_boot = 1 - (1 - level) / max(1, len(found.layer)), max(n_boot, 200 * len(found.layer))
    keep = found.dlogits_norm > 0 if normalise else torch.ones_like(found.dlogits_norm, dtype=torch.bool)
    by = found.dlogits_norm[keep] if normalise else 1.0
    x = found.input[of][keep] / by
    return tuple(
        rank_correlation(name, x, sizes[of][keep] / by, generator=generator, n_boot=n_boot, level=level)
        for name, sizes in found.layer.items()
    )


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def backward_from(
    delta: Float[Tensor, " n"], w1: Float[Tensor, "n d"], s: Float[Tensor, " d"]
) -> tuple[Float[Tensor, " d"], Float[Tensor, "n d"]]:
    """Input and weight gradient of the first layer in one step, from the gradient `delta` at its currents."""
    return w1.T @ delta, torch.outer(delta, s)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One step of a dense chain without memory: currents, inputs of each layer, gradients of the loss c.p."""

    currents: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    input_grad: Tensor
    weight_grads: tuple[Tensor, ...]


def dense_chain(
    weights: Sequence[Tensor],
    s: Float[Tensor, " d"],
    c: Float[Tensor, " m"],
    *,
    threshold: float = 1.0,
    surrogate: Surrogate | None = None,
) -> Chain:
    """Theta(W_L ... Theta(W_1 s)) and the gradients of its product with `c`, in float64."""
    rule = surrogate or Surrogate()
    ws = [w.detach().double().requires_grad_() for w in weights]
    start = s.detach().double().requires_grad_()
    h, currents, inputs = start, [], []
    with torch.enable_grad():
        for w in ws:
            inputs.append(h.detach())
            z = w @ h
            currents.append(z.detach())
            h = heaviside(z - threshold, rule)
        found = torch.autograd.grad(h @ c.double(), [start, *ws])
    return Chain(currents=tuple(currents), inputs=tuple(inputs), input_grad=found[0], weight_grads=tuple(found[1:]))


def sandwich(
    weights: Sequence[Tensor],
    currents: Sequence[Tensor],
    *,
    threshold: float = 1.0,
    surrogate: Surrogate | None = None,
) -> tuple[tuple[float, float], ...]:
    """Smallest and largest singular value of J_l = W_l D_{l-1} W_{l-1} ... W_1 for every layer of a dense chain.

    The smallest is 0 where a layer has more units than the input, or J_l is not of full row rank: no upper bound then.
    """
    rule, out = surrogate or Surrogate(), []
    j = weights[0].double()
    for k, w in enumerate(weights):
        if k:
            j = w.double() @ (rule(currents[k - 1].double() - threshold)[:, None] * j)
        values = torch.linalg.svdvals(j)
        out.append((float(values[-1]) if j.shape[0] <= j.shape[1] else 0.0, float(values[0])))
    return tuple(out)
