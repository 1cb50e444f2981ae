"""Victims from foreign networks: any PyTorch SNN, whatever state it hides.

A `Victim` is two stateless functions; a network that keeps membrane potentials between calls becomes one by being reset
before and after every call. The audit's checks prove that it did (state, batch, determinism).
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrail.core import Route, Victim
from sparsetrail.snn.surrogate import SURROGATES, Surrogate, heaviside

RESETS = ("reset", "reset_mem", "reset_states")  # SpikingJelly, BrainCog; snnTorch; sinabs


def reset_all(net: nn.Module) -> None:
    """Reset every module that knows how to, by the method its library gave it."""
    for m in net.modules():
        for name in RESETS:
            method = getattr(m, name, None)
            if callable(method):
                method()
                break


def mean_over_time(out: Any) -> Tensor:
    """Class scores [n k] of what a network returns: the first of a tuple, the mean over [t n k] or a list of [n k]."""
    while isinstance(out, tuple):
        out = out[0]
    if isinstance(out, list):
        shapes = {tuple(part.shape) if isinstance(part, Tensor) else None for part in out}
        if len(shapes) != 1 or len(next(iter(shapes)) or ()) != 2:
            raise ValueError(
                f"expected a list of scores [n k], one a step, got {sorted(map(str, shapes))}; give read=, which makes "
                "scores [n k] of what the network returns"
            )
        out = torch.stack(out)
    return out.mean(0) if out.ndim == 3 else out


def stateful(
    net: nn.Module,
    encode: Callable[[Tensor], Tensor],
    *,
    classes: int,
    steps: int | None = None,
    reset: Callable[[nn.Module], None] = reset_all,
    read: Callable[[Any], Tensor] = mean_over_time,
    name: str = "victim",
    route: str = "own gradient",
) -> Victim:
    """A network that takes the whole sequence [t n ...] and keeps state, as a `Victim`; reset before and after a call.

    `encode` maps pixels [n c h w] in 0..1 to that sequence; ours also tell their codebook and whether they draw noise.
    `read` makes scores [n k] of what the network returns. A network that loops over time in your own code needs no
    more than `Victim(encode=..., logits=..., steps=..., classes=...)` around that loop. ValueError in train mode.
    """
    steps = steps or getattr(encode, "steps", None)
    if steps is None:
        raise ValueError("steps: expected the number of time steps, which this encoder does not tell; pass steps=")

    def logits(u: Tensor) -> Tensor:
        if net.training:
            raise ValueError(f"{name}: expected a network in eval mode, found train mode; call net.eval() first")
        reset(net)
        try:
            return read(net(u))
        finally:
            reset(net)

    how = getattr(encode, "backward", "")
    return Victim(
        encode=encode,
        logits=logits,
        steps=steps,
        classes=classes,
        name=name,
        route=route,
        encoding=f"{getattr(encode, 'name', 'encoder')} encoder: {how}" if how else "",
        random=bool(getattr(encode, "random", False)),
        module=net,
        codebook=getattr(encode, "codebook", None),
    )


class _Swapped(nn.Module):
    def __init__(self, surrogate: Surrogate) -> None:
        super().__init__()
        self.surrogate, self.spiking = surrogate, True

    def forward(self, x: Tensor) -> Tensor:
        return heaviside(x, self.surrogate)


def spikingjelly(
    net: nn.Module, encode: Callable[[Tensor], Tensor], *, classes: int, name: str = "victim", **more: Any
) -> Victim:
    """A SpikingJelly network in multi-step mode as a `Victim` whose surrogates an audit can exchange.

    `more` as in `stateful`. The exchange is made on a copy; the network given is left as it is.
    """
    found = [m.surrogate_function for m in net.modules() if hasattr(m, "surrogate_function")]
    if not found:
        raise ValueError(
            f"{name}: expected neurons with a surrogate_function, as SpikingJelly's, none found; take stateful"
        )
    kinds = sorted({f"{type(f).__name__.lower()}({getattr(f, 'alpha', 1):g})" for f in found})
    own = stateful(net, encode, classes=classes, name=name, route=f"BPTT {' + '.join(kinds)}", **more)

    def rewire(route: Route) -> Victim:
        if route.steps is not None:
            raise ValueError(f"{name}: its number of steps is its own, got the route {route}")
        way = encode
        if route.encoder is not None:
            if not hasattr(encode, "route"):
                raise ValueError(f"{name}: its encoder has no other backward rule, got the route {route}")
            way = encode.route(route.encoder)  # type: ignore[attr-defined]
        if route.neuron is None:
            again, words = net, own.route
        else:
            kind, _, width = route.neuron.partition(":")
            if kind not in SURROGATES:
                raise ValueError(f"{name}: expected a surrogate ({', '.join(SURROGATES)}), got the route {route}")
            try:
                surrogate = Surrogate(kind, float(width or 1))
            except ValueError:
                raise ValueError(f"{name}: expected a width as in triangle:1, got the route {route}") from None
            again, words = copy.deepcopy(net), f"BPTT {kind}({surrogate.width:g})"
            for m in again.modules():
                if hasattr(m, "surrogate_function"):
                    m.surrogate_function = _Swapped(surrogate)
        return stateful(again, way, classes=classes, name=name, route=words, **more)

    return replace(own, rewire=rewire)
