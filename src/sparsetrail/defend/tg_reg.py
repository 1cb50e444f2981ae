"""TG-Reg (2026): small sums of the input gradient of every step."""

import torch
from torch import Tensor, nn

from sparsetrail.defend.crafting import attacked
from sparsetrail.defend.settings import (
    check_count,
    check_one_of,
    check_positive,
    check_radius,
    check_reached,
    check_strength,
    differentiable,
)
from sparsetrail.snn.encode import Encoder
from sparsetrail.training import Seams


def tg_reg(
    *,
    weight: float = 100.0,
    at: str = "normalised",
    eps: float = 0.0,
    steps: int = 2,
    step: float = 1 / 255,
) -> Seams:
    """weight * mean over images of the sum over t of (sum of the gradient of log p at the inputs of step t)^2; TG-Reg.

    p is the probability of a label drawn from the network's own prediction. Inputs are taken `at` the network's
    normalisation, behind which networks of this kind repeat the image, or as raw pixels (`pixel`): for CIFAR the same
    penalty with 25 times the weight. A second derivative, so plain operations run. With `eps` images are adversarial.
    Known to us by its formula alone, so no level of it is claimed.
    """
    check_one_of("at", at, ("normalised", "pixel"))
    check_radius("eps", eps), check_radius("step", step), check_strength(weight=weight)
    check_count(steps=steps), check_positive(step=step), check_reached(eps=eps, steps=steps, step=step)

    def penalty(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
        label = torch.multinomial(z.detach().softmax(1).cpu(), 1, generator=generator).to(z.device)
        u = encode(x.detach()).detach().requires_grad_()
        likely = net(u).log_softmax(1).gather(1, label)
        (g,) = torch.autograd.grad(likely.sum(), u, create_graph=True)
        norm = getattr(net, "normalise", None) if at == "normalised" else None
        g = g if norm is None else g * norm.deviation  # the chain rule behind (u - mean) / deviation
        return weight * g.flatten(2).sum(2).square().sum(0).mean()

    return Seams(
        inputs=attacked(eps=eps, steps=steps, step=step, start="none"),
        penalty=penalty if weight else None,
        check=differentiable,
        name="tg_reg",
        knobs={"weight": weight, "at": at, "eps": eps, "steps": steps, "step": step},
    )
