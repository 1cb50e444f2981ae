"""Victims from foreign networks: any PyTorch SNN, whatever state it hides.

A `Victim` is two stateless functions; a network that keeps membrane potentials between calls becomes one by being reset
before and after every call. The audit's checks prove that it did (state, batch, determinism).
"""

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrail.core import Route, Victim
from sparsetrail.core.victim import refuse_train_mode
from sparsetrail.snn.routes import DEFAULTS
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
    told = getattr(encode, "steps", None)
    if steps is not None and steps < 1:
        raise ValueError(f"steps: expected at least 1 time step, got {steps}")
    if steps is not None and told is not None and steps != told:
        raise ValueError(f"steps: expected {told}, those of the encoder, got {steps}; leave it out")
    steps = told if steps is None else steps
    if steps is None:
        raise ValueError("steps: expected the number of time steps, which this encoder does not tell; pass steps=")
    held = threading.Lock()

    def logits(u: Tensor) -> Tensor:
        refuse_train_mode(net, name)
        with held:  # a network that keeps state serves one caller at a time
            reset(net)
            try:
                return read(net(u))
            finally:
                reset(net)

    how = getattr(encode, "backward", "")
    return Victim(
        encode=encode,
        logits=_all_steps(net, logits, name),
        steps=steps,
        classes=classes,
        name=name,
        route=route,
        encoding=f"{getattr(encode, 'name', 'encoder')} encoder: {how}" if how else "",
        random=bool(getattr(encode, "random", False)),
        module=net,
        codebook=getattr(encode, "codebook", None),
        reseed=encode.reseed if getattr(encode, "draws", None) is not None else None,  # type: ignore[attr-defined]
    )


def _all_steps(net: nn.Module, logits: Callable[[Tensor], Tensor], name: str) -> Callable[[Tensor], Tensor]:
    """`logits`; at the first call ValueError where neurons in single-step mode are called once for all steps.

    They would take the steps for examples. A network that loops over the steps calls them once a step. A network that
    cannot take the steps is told as such.
    """
    neurons = [m for m in net.modules() if hasattr(m, "surrogate_function")]
    seen = any(getattr(m, "step_mode", "m") != "s" for m in neurons)

    def checked(u: Tensor) -> Tensor:
        nonlocal seen
        if not neurons:  # of another library, or the caller's own
            try:
                return logits(u)
            except RuntimeError as error:
                if "(unbatched)" not in str(error) or u.ndim < 5:
                    raise
                raise ValueError(
                    f"{name}: expected a network that takes all steps [t n ...] at once, got {tuple(u.shape)} refused: "
                    f"{error}; loop over the steps in your own logits, Victim(encode=..., logits=...)"
                ) from error
        if seen or len(u) < 2:
            return logits(u)
        called: list[nn.Module] = []
        hooks = [m.register_forward_pre_hook(lambda m, _: called.append(m)) for m in neurons]
        try:
            z = logits(u)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"{name}: expected a network in multi-step mode or one that loops over the steps itself, found neurons "
                f"in single-step mode behind {len(u)} steps: {error}; call functional.set_step_mode(net, 'm')"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        if len(called) == len(set(called)) > 0:
            raise ValueError(
                f"{name}: expected a network in multi-step mode, found neurons in single-step mode called once for "
                f"{len(u)} steps; call functional.set_step_mode(net, 'm')"
            )
        seen = True
        return z

    return checked


class _Swapped(nn.Module):
    def __init__(self, surrogate: Surrogate) -> None:
        super().__init__()
        self.surrogate, self.spiking = surrogate, True

    def forward(self, x: Tensor) -> Tensor:
        return heaviside(x, self.surrogate)


def _called(surrogate: Any) -> str:
    width = getattr(surrogate, "alpha", None)
    return type(surrogate).__name__.lower() + ("" if width is None else f"({width:g})")


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
    kinds = sorted({_called(f) for f in found})
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
                surrogate = Surrogate(kind, float(width or DEFAULTS.get(kind) or 1))
            except ValueError:
                raise ValueError(f"{name}: expected a width as in triangle:1, got the route {route}") from None
            again, words = copy.deepcopy(net), f"BPTT {kind}({surrogate.width:g})"
            for m in again.modules():
                if hasattr(m, "surrogate_function"):
                    m.surrogate_function = _Swapped(surrogate)
        return stateful(again, way, classes=classes, name=name, route=words, **more)

    return replace(own, rewire=rewire)
