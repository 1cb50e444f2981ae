"""SNN-RAT: adversarial training and a retraction of the weights. Ding et al. 2022 (NeurIPS)."""

import torch
from torch import Tensor, nn

from sparsetrail._shapes import Float, Int
from sparsetrail.core import Route
from sparsetrail.defend.crafting import adversary, begin_at, craft, wrong
from sparsetrail.defend.settings import check_one_of, check_radius, check_strength, differentiable
from sparsetrail.snn.encode import Encoder
from sparsetrail.snn.net import NetSpec
from sparsetrail.snn.wrn import Merge
from sparsetrail.training import Seams, TrainSpec

MANY_ROWS = 200  # of a linear layer, from which SNN-RAT retracts a random share of them a step


def snn_rat(
    *,
    attack: str = "fgsm",
    gradient: str = "bptt",
    eps: float = 2 / 255,
    regulariser: str = "orthogonal",
    strength: float = 0.004,
    rows: float = 0.3,
) -> Seams:
    """Regularised adversarial training, SNN-RAT. Ding et al. 2022 (NeurIPS).

    `attack` is one step (fgsm), a random half step and a half (rfgsm), two half steps (pgd), or one of the first two
    drawn for every batch (mix); `gradient` goes through time, or through rates (bptr), or is drawn too (both). The
    source's abstract fits mix with bptr, its shipped run is fgsm with bptt. Our bptr differentiates the network itself,
    theirs one without leak and with a strict threshold.

    `orthogonal` brings all singular values of every weight towards 1 after each step, `retract`, at a random share of
    `rows` where a linear layer has 200 or more, and projects the shares of learnt merges onto the simplex; it wants
    weight_decay 0. `lipschitz` is a penalty instead: per layer, strength times the largest row sum of positive weights
    and of negative ones. The strength of the published VGG-11 is not known; 0.004 is that of the WRN-16 log.
    """
    check_radius("eps", eps), check_strength(strength=strength)
    check_one_of("attack", attack, ("fgsm", "rfgsm", "pgd", "mix"))
    check_one_of("gradient", gradient, ("bptt", "bptr", "both"))
    check_one_of("regulariser", regulariser, ("orthogonal", "lipschitz", "none"))
    if regulariser == "orthogonal" and strength >= 1:
        raise ValueError(
            f"strength: expected below 1, where the retraction still converges, got {strength:g}; try 0.004"
        )
    if not 0 < rows <= 1:
        raise ValueError(f"rows: expected a share 0..1 of the rows, got {rows:g}")
    victim = adversary()
    orthogonal = regulariser == "orthogonal" and strength > 0

    def inputs(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        kind = ("fgsm", "rfgsm")[_toss(generator)] if attack == "mix" else attack
        through = ("bptt", "bptr")[_toss(generator)] if gradient == "both" else gradient
        v = victim(net, encode)
        v = v.by(Route(neuron="bptr")) if through == "bptr" else v
        begin = begin_at(x, "corner" if kind == "rfgsm" else "none", eps, generator)
        steps, step = (2, eps / 2) if kind == "pgd" else (1, eps / 2 if kind == "rfgsm" else eps)
        return craft(
            v, x, wrong(y), begin, eps=eps, steps=steps, step=step
        )  # fmt: skip

    def after_step(net: nn.Module, generator: torch.Generator) -> None:
        for m in net.modules():
            if isinstance(m, nn.Conv2d):
                retract(m.weight, strength)
            elif isinstance(m, nn.Linear):
                n, some = m.out_features, None
                if n >= MANY_ROWS and rows < 1:
                    some = torch.randperm(n, generator=generator)[: max(1, round(rows * n))].to(m.weight.device)
                retract(m.weight, strength, some)
            elif isinstance(m, Merge):
                with torch.no_grad():
                    m.shares.copy_(to_simplex(m.shares))

    def penalty(net: nn.Module, *_: object) -> Tensor:
        bounds = [_lipschitz(m.weight) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        return strength * torch.stack(bounds).sum()

    def check(net: NetSpec, encode: Encoder, spec: TrainSpec) -> None:
        differentiable(net, encode, spec)
        if orthogonal and spec.weight_decay:
            raise ValueError(
                f"weight_decay: expected 0 beside the orthogonal retraction, got {spec.weight_decay:g}; give "
                "weight_decay 0, or regulariser none"
            )

    return Seams(
        inputs=inputs if eps else None,
        penalty=penalty if regulariser == "lipschitz" and strength else None,
        after_step=after_step if orthogonal else None,
        check=check,
        name="snn_rat",
        knobs={
            "attack": attack, "gradient": gradient, "eps": eps, "regulariser": regulariser, "strength": strength,
            "rows": rows,
        },
    )  # fmt: skip


def _toss(generator: torch.Generator) -> int:
    return int(torch.randint(2, (), generator=generator))


def retract(weight: Tensor, strength: float, rows: Int[Tensor, " r"] | None = None) -> None:
    """W + b (W - W W^T W) in place, W one row an output: every singular value s becomes s (1 + b - b s^2).

    `rows` narrows W. Ding et al. 2022 (NeurIPS), after Cisse et al. 2017, arXiv:1704.08847. Diverges where a singular
    value exceeds sqrt((2 + b) / b).
    """
    with torch.no_grad():
        w = weight.flatten(1) if rows is None else weight.flatten(1)[rows]
        across = w @ (w.T @ w) if len(w) > w.shape[1] else (w @ w.T) @ w
        w = ((1 + strength) * w - strength * across).unflatten(1, weight.shape[1:])
        if rows is None:
            weight.copy_(w)
        else:
            weight[rows] = w


def to_simplex(a: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """The nearest point with non-negative entries of sum 1. Duchi et al. 2008 (ICML)."""
    down = a.sort(descending=True).values
    excess = down.cumsum(0) - 1
    k = int((down * torch.arange(1, len(a) + 1, device=a.device) > excess).sum())
    return (a - excess[k - 1] / k).clamp(min=0)


def _lipschitz(weight: Tensor) -> Tensor:
    w = weight.flatten(1)
    return w.clamp(min=0).sum(1).amax() + (-w).clamp(min=0).sum(1).amax()
