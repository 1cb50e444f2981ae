"""HIRE-SNN: noise crafted from one period of the time steps to the next. Kundu et al. 2021, arXiv:2110.11417."""

from typing import Any

import torch
from torch import Tensor, nn

from sparsetrail.defend.crafting import evaluating, wrong
from sparsetrail.defend.settings import check_count, check_one_of, check_positive, check_radius
from sparsetrail.snn.encode import Encoder
from sparsetrail.snn.net import NetSpec
from sparsetrail.snn.neuron import carried, carrying
from sparsetrail.training import Seams, TrainSpec, scores


def hire_snn(
    *,
    periods: int = 2,
    eps: float = 0.031,
    step: float | None = None,
    gradient: str = "updated",
    carry: bool = True,
) -> Seams:
    """Noise crafted while training, HIRE-SNN. Kundu et al. 2021, arXiv:2110.11417.

    The steps of a batch are split into `periods`, each an update of its own; before each but the first, noise grows by
    `step` (eps / periods) along the sign of the input gradient of the last period and is cut to `eps`. That gradient is
    taken again with the `updated` weights, as the source's figure shows, one more pass for every period but the last,
    or is the one of the update (`reused`), which is free. Noise starts at zero for every batch and grows periods - 1
    times: by default it ends at eps (periods - 1) / periods, and the cut comes to bear with longer steps only.
    Potentials go on from period to period, out of the graph, if they `carry`. All settings but 0.031 are open in the
    source. For DIET neurons and the direct code. Unlike the source, the gradient taken again sees no dropout, a dropout
    mask lasts one period, a potential at the threshold fires, and one that goes on does so in units of the threshold.
    """
    check_radius("eps", eps)
    check_one_of("gradient", gradient, ("updated", "reused"))
    check_count(periods=periods)
    size = eps / periods if step is None else step
    check_radius("step", size)
    if eps:
        check_positive(step=size)
    on, held = periods > 1 and eps > 0, dict[str, Any]()

    def inputs(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        if held.get("clean") is not x:  # a new batch
            held.update(clean=x, point=x, noise=torch.zeros_like(x))
        else:
            g = held["seen"].grad if gradient == "reused" else _gradient(net, encode, held["point"], y, held["before"])
            held["noise"] = (held["noise"] + size * g.sign()).clamp(-eps, eps)
            held["point"] = (x + held["noise"]).clamp(0, 1)
        if gradient == "updated":
            before = carried.get()
            held["before"] = None if before is None else dict(before)
        return held["point"]

    def penalty(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, z: Tensor, g: torch.Generator) -> Tensor:
        held["seen"] = x  # its gradient is there after the update
        return z.new_zeros(())

    def check(net: NetSpec, encode: Encoder, spec: TrainSpec) -> None:
        if net.neuron.kind != "diet":
            raise ValueError(
                f"neuron: expected diet neurons, whose potentials can go on, found {net.neuron.kind}; "
                "give neuron diet, or take the system hire_vgg11"
            )
        if encode.name != "direct":
            raise ValueError(f"encoder: expected direct, the same image at every step, found {encode.name}")
        if net.steps % periods:
            near = [p for p in range(1, net.steps + 1) if net.steps % p == 0]
            raise ValueError(
                f"periods: expected a divisor of the {net.steps} time steps, got {periods}; try one of "
                f"{', '.join(map(str, near))}"
            )

    return Seams(
        inputs=inputs if on else None,
        penalty=penalty if on and gradient == "reused" else None,
        periods=periods,
        carry=carry,
        check=check,
        name="hire_snn",
        knobs={"periods": periods, "eps": eps, "step": size, "gradient": gradient, "carry": carry},
    )


def _gradient(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, potentials: dict | None) -> Tensor:
    """Input gradient of the loss with the weights as they are, from the potentials before; weights get none."""
    x = x.detach().requires_grad_()
    with evaluating(net), carrying(None if potentials is None else dict(potentials)):
        return torch.autograd.grad(wrong(y)(scores(net, encode, x)), x)[0]
