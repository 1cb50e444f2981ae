"""MS-MPPD: the same membrane for clean and perturbed input. Ding et al. 2024 (ICML)."""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrail.defend.crafting import adversary, begin_at, craft, scored, wrong
from sparsetrail.defend.settings import check_one_of, check_radius, check_strength, paired
from sparsetrail.snn.encode import Encoder
from sparsetrail.snn.neuron import Neuron
from sparsetrail.training import Seams


def mppd(*, eps: float = 4 / 255, rho: float = 1.0, leak: float = 0.99, norm: str = "l2") -> Seams:
    """Half the loss on clean, half on perturbed images, and the same membrane for both. Ding et al. 2024 (ICML).

    x' is x + 0.001 N(0, 1) and one signed step of `eps`. The penalty is rho times the mean of Y^2 (or |Y|, a later
    variant) over steps and neurons of the last spiking layer, Y = leak Y + (I - I') the difference of their potentials
    were there no reset; the clean current I is constant in it. Without the source's learnt gain for every layer and
    step.
    """
    check_radius("eps", eps), check_strength(rho=rho), check_one_of("norm", norm, ("l2", "l1"))
    if not 0 <= leak <= 1:
        raise ValueError(f"leak: expected a factor 0..1 on the old difference (above 1 it grows), got {leak:g}")
    victim, watch = adversary(), contextlib.ExitStack()
    currents, held = list[Tensor](), list[Tensor]()

    def listen(net: nn.Module) -> None:
        """Note what enters the last spiking layer, until `watch` is closed."""
        last = [m for m in net.modules() if isinstance(m, Neuron)][-1]
        watch.callback(last.register_forward_pre_hook(lambda m, given: currents.append(given[0])).remove)

    def inputs(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        watch.close()  # of a step that was cut off
        currents.clear()
        begin = begin_at(x, "normal", eps, generator)
        held[:] = [craft(
            victim(net, encode), x, wrong(y), begin, eps=eps, steps=1, step=eps
        )]  # fmt: skip
        listen(net)
        return x

    def penalty(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
        watch.close()
        listen(net)
        try:
            other = scored(net, encode, held.pop())
        finally:
            watch.close()
        clean, now = (c.unflatten(0, (encode.steps, -1)) for c in currents)
        y_t, total = torch.zeros_like(clean[0]), z.new_zeros(())
        for a, b in zip(clean.detach(), now, strict=True):
            y_t = leak * y_t + (a - b)
            total = total + (y_t.square() if norm == "l2" else y_t.abs()).mean()
        both = F.cross_entropy(other, y) - F.cross_entropy(z, y)
        return both / 2 + rho * total / encode.steps

    on = eps > 0 or rho > 0
    return Seams(
        inputs=inputs if on else None,
        penalty=penalty if on else None,
        check=paired,
        name="mppd",
        knobs={"eps": eps, "rho": rho, "leak": leak, "norm": norm},
    )
