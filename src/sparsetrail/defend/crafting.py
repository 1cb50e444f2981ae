"""Points that defences train on or against: where they start, how they climb, and scores for losses."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrail._shapes import Float, Int
from sparsetrail.core import Linf, Victim
from sparsetrail.snn.encode import Encoder
from sparsetrail.snn.net import victim as as_victim
from sparsetrail.training import scores

STARTS = ("none", "uniform", "normal", "corner")
NOISE = 0.001  # deviation of the normal start, TRADES' and MS-MPPD's


def craft(
    victim: Victim,
    x: Float[Tensor, "n c h w"],
    loss: Callable[[Tensor], Tensor],
    start: Float[Tensor, "n c h w"],
    *,
    eps: float,
    steps: int,
    step: float,
) -> Float[Tensor, "n c h w"]:
    """The last of `steps` signed steps of size `step` up `loss(scores)`, in the ball of `eps` around x and in 0..1.

    The network of `victim` is in eval mode meanwhile and has its own mode again afterwards.
    """
    u, ball = start.detach(), Linf(eps, space="pixel")
    assert victim.module is not None
    with evaluating(victim.module):
        for _ in range(steps):
            u = u.requires_grad_()
            (g,) = torch.autograd.grad(loss(victim.scores(u)), u)
            u = ball.project(u.detach() + step * g.sign(), x)
    return u


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """The network in eval mode inside this block, in its own mode again behind it."""
    was = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(was)


def wrong(y: Int[Tensor, " n"]) -> Callable[[Tensor], Tensor]:
    """The loss that is climbed: cross-entropy, every image by itself."""
    return lambda z: F.cross_entropy(z, y, reduction="sum")


def begin_at(x: Tensor, how: str, eps: float, generator: torch.Generator) -> Tensor:
    """The point crafting starts from; `corner` is half the radius along the signs of normal noise (R-FGSM)."""
    if how == "none":
        return x
    if how == "uniform":
        noise = eps * (2 * torch.rand(x.shape, generator=generator) - 1)
    else:
        noise = torch.randn(x.shape, generator=generator)
        noise = NOISE * noise if how == "normal" else eps / 2 * noise.sign()
    return (x + noise.to(x)).clamp(0, 1)


def adversary() -> Callable[[nn.Module, Encoder], Victim]:
    """Makes the victim of a network, or hands out the last one again: a GPU records its steps but once."""
    last: list[Any] = []

    def get(net: nn.Module, encode: Encoder) -> Victim:
        if not last or last[0] is not net or last[1] is not encode:
            last[:] = [net, encode, as_victim(net, encode, name="in training")]
        return last[2]

    return get


def attacked(*, eps: float, steps: int, step: float, start: str) -> Callable[..., Tensor] | None:
    """The seam `inputs` that replaces pixels by adversarial ones, up the cross-entropy; None where eps is 0."""
    if eps == 0:
        return None
    victim = adversary()

    def inputs(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        begin = begin_at(x, start, eps, generator)
        return craft(
            victim(net, encode), x, wrong(y), begin,
            eps=eps, steps=steps, step=step,
        )  # fmt: skip

    return inputs


def scored(net: nn.Module, encode: Encoder, x: Tensor) -> Tensor:
    """Scores in the precision of a loss, also where the forward runs in less."""
    z = scores(net, encode, x)
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
