"""TRADES. Zhang et al. 2019, arXiv:1901.08573."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrail.defend.crafting import adversary, begin_at, craft, evaluating, scored
from sparsetrail.defend.settings import check_count, check_positive, check_radius, check_reached, check_strength, paired
from sparsetrail.snn.encode import Encoder
from sparsetrail.training import Seams


def trades(
    *, eps: float = 8 / 255, beta: float = 6.0, steps: int = 10, step: float = 2 / 255, temperature: float = 1.0
) -> Seams:
    """Clean cross-entropy + beta KL(p(x) || p(x')), with x' up that divergence. Zhang et al. 2019, arXiv:1901.08573.

    x' starts from x + 0.001 N(0, 1) and is crafted in eval mode. At another `temperature` scores are divided by it and
    the divergence multiplied by its square; one SNN code base has beta 5, 4 steps of 3/255, temperature 2.
    """
    check_radius("eps", eps), check_radius("step", step), check_strength(beta=beta)
    check_count(steps=steps), check_positive(step=step, temperature=temperature)
    check_reached(eps=eps, steps=steps, step=step, start="normal")
    victim = adversary()

    def divergence(z: Tensor, p: Tensor) -> Tensor:
        found = F.kl_div((z / temperature).log_softmax(1), p, reduction="sum", log_target=True)
        return found * temperature**2

    held: list[Tensor] = []

    def inputs(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        with evaluating(net), torch.no_grad():
            still = (victim(net, encode).scores(x) / temperature).log_softmax(1)
        begin = begin_at(x, "normal", eps, generator)
        held[:] = [craft(
            victim(net, encode), x, lambda s: divergence(s, still), begin, eps=eps, steps=steps, step=step
        )]  # fmt: skip
        return x

    def penalty(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
        p = (z / temperature).log_softmax(1)
        return beta * divergence(scored(net, encode, held.pop()), p) / len(x)

    knobs = {"eps": eps, "beta": beta, "steps": steps, "step": step, "temperature": temperature}
    on = beta > 0
    return Seams(
        inputs=inputs if on else None, penalty=penalty if on else None, check=paired, name="trades", knobs=knobs
    )
