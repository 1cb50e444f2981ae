"""Defences that act on training, each a function of its settings that returns `Seams` for the one loop.

    pgd_at    adversarial training. Madry et al. 2018, arXiv:1706.06083
    trades    clean loss and a divergence from it. Zhang et al. 2019, arXiv:1901.08573
    snn_rat   adversarial training and an orthogonal retraction of the weights. Ding et al. 2022 (NeurIPS), SNN-RAT
    hire_snn  noise crafted from one period of the time steps to the next. Kundu et al. 2021, arXiv:2110.11417
    sr        sparse-gradient regularisation. Liu et al. 2024, arXiv:2405.20355
    mppd      the same membrane for clean and perturbed input. Ding et al. 2024 (ICML), MS-MPPD
    tg_reg    small sums of the input gradient of every step, TG-Reg (2026)

What a source leaves open is a named setting with a default; what cannot be set is told in docs/reproduce.md. Points are
crafted in eval mode on a frozen twin of the network before the batch itself moves BatchNorm statistics, which stay as
they are meanwhile, and the last point is trained on. Switched off (pgd_at, snn_rat: eps and strength 0; trades: beta 0;
sr, tg_reg: weight and eps 0; mppd: eps and rho 0; hire_snn: one period) a defence has no seam, and the loop is plain
training to the bit. Radii are L-infinity in pixels 0..1.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrail._shapes import Float, Int
from sparsetrail.core import Route, Victim, as_fraction
from sparsetrail.snn.encode import Encoder
from sparsetrail.snn.net import NetSpec
from sparsetrail.snn.net import victim as as_victim
from sparsetrail.snn.neuron import Neuron, carried, carrying
from sparsetrail.snn.wrn import Merge
from sparsetrail.training import Seams, TrainSpec, scores

STARTS = ("none", "uniform", "normal", "corner")
NOISE = 0.001  # deviation of the normal start, TRADES' and MS-MPPD's
MANY_ROWS = 200  # of a linear layer, from which SNN-RAT retracts a random share of them a step


# ---- crafting ------------------------------------------------------------------------------------------------------


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
    u = start.detach()
    assert victim.module is not None
    with _evaluating(victim.module):
        for _ in range(steps):
            u = u.requires_grad_()
            (g,) = torch.autograd.grad(loss(victim.scores(u)), u)
            u = _project(u.detach() + step * g.sign(), x, eps)
    return u


@contextlib.contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """The network in eval mode inside this block, in its own mode again behind it."""
    was = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(was)


def _wrong(y: Int[Tensor, " n"]) -> Callable[[Tensor], Tensor]:
    """The loss that is climbed: cross-entropy, every image by itself."""
    return lambda z: F.cross_entropy(z, y, reduction="sum")


def _project(u: Tensor, x: Tensor, eps: float) -> Tensor:
    return torch.minimum(torch.maximum(u, x - eps), x + eps).clamp(0, 1)


def _begin(x: Tensor, how: str, eps: float, generator: torch.Generator) -> Tensor:
    """The point crafting starts from; `corner` is half the radius along the signs of normal noise (R-FGSM)."""
    if how == "none":
        return x
    if how == "uniform":
        noise = eps * (2 * torch.rand(x.shape, generator=generator) - 1)
    else:
        noise = torch.randn(x.shape, generator=generator)
        noise = NOISE * noise if how == "normal" else eps / 2 * noise.sign()
    return (x + noise.to(x)).clamp(0, 1)


def _adversary() -> Callable[[nn.Module, Encoder], Victim]:
    """Makes the victim of a network, or hands out the last one again: a GPU records its steps but once."""
    last: list[Any] = []

    def get(net: nn.Module, encode: Encoder) -> Victim:
        if not last or last[0] is not net or last[1] is not encode:
            last[:] = [net, encode, as_victim(net, encode, name="in training")]
        return last[2]

    return get


def _attacked(*, eps: float, steps: int, step: float, start: str) -> Callable[..., Tensor] | None:
    """The seam `inputs` that replaces pixels by adversarial ones, up the cross-entropy; None where eps is 0."""
    if eps == 0:
        return None
    victim = _adversary()

    def inputs(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        begin = _begin(x, start, eps, generator)
        return craft(
            victim(net, encode), x, _wrong(y), begin,
            eps=eps, steps=steps, step=step,
        )  # fmt: skip

    return inputs


# ---- what is refused -----------------------------------------------------------------------------------------------


def _radius(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(
            f"{name}: expected a length in pixels 0..1 such as 8/255, got {value:g}"
            + ("; grey levels are divided by 255" if value >= 1 else "")
        )


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {value:g}")


def _count(**values: int) -> None:
    for name, value in values.items():
        if value != int(value) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected a whole number from 1, got {value!r}")


def _strength(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected 0 (off) or a positive number, got {value:g}")


def _reached(*, eps: float, steps: int, step: float, start: str = "none") -> None:
    """Refuse a radius that the start and all steps in one direction fall short of."""
    begun = {"none": 0.0, "uniform": eps, "normal": NOISE, "corner": eps / 2}[start]
    if begun + steps * step < eps * (1 - 1e-9):
        enough = math.ceil((eps - begun) / step - 1e-9)
        raise ValueError(
            f"eps: expected a radius that {steps} steps of {as_fraction(step)} reach, got {as_fraction(eps)}; give "
            f"steps {enough}, or step {as_fraction((eps - begun) / steps)}"
        )


def _one_of(name: str, got: str, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {got!r}")


def _differentiable(_net: NetSpec, encode: Encoder, _spec: TrainSpec) -> None:
    if encode.backward == "none":
        raise ValueError(
            f"encoder: expected one with a backward rule to craft through, found {encode.name} with none; give another "
            "backward, e.g. identity"
        )


def _paired(net: NetSpec, encode: Encoder, spec: TrainSpec) -> None:
    """Two forwards are compared: what they draw must not come between them."""
    _differentiable(net, encode, spec)
    if encode.random:
        raise ValueError(
            f"encoder: expected one that draws nothing, since two forwards are compared, found {encode.name}; try "
            "direct or phase, or pgd_at as the defence"
        )


def _scored(net: nn.Module, encode: Encoder, x: Tensor) -> Tensor:
    """Scores in the precision of a loss, also where the forward runs in less."""
    z = scores(net, encode, x)
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z


# ---- defences ------------------------------------------------------------------------------------------------------


def pgd_at(*, eps: float = 2 / 255, steps: int = 2, step: float = 1 / 255, start: str = "none") -> Seams:
    """Adversarial training: every batch is replaced by its adversarial points. Madry et al. 2018, arXiv:1706.06083.

    Defaults are the weak kind that SNN papers compare with (2/255, two steps of 1/255); strong is 8/255 with 5 steps
    of 4/255 from a uniform start. One step of the radius is FGSM training.
    """
    _radius("eps", eps), _radius("step", step), _count(steps=steps), _positive(step=step)
    _one_of("start", start, STARTS), _reached(eps=eps, steps=steps, step=step, start=start)
    knobs = {"eps": eps, "steps": steps, "step": step, "start": start}
    inputs = _attacked(eps=eps, steps=steps, step=step, start=start)
    return Seams(inputs=inputs, check=_differentiable, name="pgd_at", knobs=knobs)


def trades(
    *, eps: float = 8 / 255, beta: float = 6.0, steps: int = 10, step: float = 2 / 255, temperature: float = 1.0
) -> Seams:
    """Clean cross-entropy + beta KL(p(x) || p(x')), with x' up that divergence. Zhang et al. 2019, arXiv:1901.08573.

    x' starts from x + 0.001 N(0, 1) and is crafted in eval mode. At another `temperature` scores are divided by it and
    the divergence multiplied by its square; one SNN code base has beta 5, 4 steps of 3/255, temperature 2.
    """
    _radius("eps", eps), _radius("step", step), _strength(beta=beta)
    _count(steps=steps), _positive(step=step, temperature=temperature)
    _reached(eps=eps, steps=steps, step=step, start="normal")
    victim = _adversary()

    def divergence(z: Tensor, p: Tensor) -> Tensor:
        found = F.kl_div((z / temperature).log_softmax(1), p, reduction="sum", log_target=True)
        return found * temperature**2

    held: list[Tensor] = []

    def inputs(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        with _evaluating(net), torch.no_grad():
            still = (victim(net, encode).scores(x) / temperature).log_softmax(1)
        begin = _begin(x, "normal", eps, generator)
        held[:] = [craft(
            victim(net, encode), x, lambda s: divergence(s, still), begin, eps=eps, steps=steps, step=step
        )]  # fmt: skip
        return x

    def penalty(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
        p = (z / temperature).log_softmax(1)
        return beta * divergence(_scored(net, encode, held.pop()), p) / len(x)

    knobs = {"eps": eps, "beta": beta, "steps": steps, "step": step, "temperature": temperature}
    on = beta > 0
    return Seams(
        inputs=inputs if on else None, penalty=penalty if on else None, check=_paired, name="trades", knobs=knobs
    )


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
    _radius("eps", eps), _strength(strength=strength)
    _one_of("attack", attack, ("fgsm", "rfgsm", "pgd", "mix"))
    _one_of("gradient", gradient, ("bptt", "bptr", "both"))
    _one_of("regulariser", regulariser, ("orthogonal", "lipschitz", "none"))
    if regulariser == "orthogonal" and strength >= 1:
        raise ValueError(
            f"strength: expected below 1, where the retraction still converges, got {strength:g}; try 0.004"
        )
    if not 0 < rows <= 1:
        raise ValueError(f"rows: expected a share 0..1 of the rows, got {rows:g}")
    victim = _adversary()
    orthogonal = regulariser == "orthogonal" and strength > 0

    def inputs(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        kind = ("fgsm", "rfgsm")[_toss(generator)] if attack == "mix" else attack
        through = ("bptt", "bptr")[_toss(generator)] if gradient == "both" else gradient
        v = victim(net, encode)
        v = v.by(Route(neuron="bptr")) if through == "bptr" else v
        begin = _begin(x, "corner" if kind == "rfgsm" else "none", eps, generator)
        steps, step = (2, eps / 2) if kind == "pgd" else (1, eps / 2 if kind == "rfgsm" else eps)
        return craft(
            v, x, _wrong(y), begin, eps=eps, steps=steps, step=step
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
        _differentiable(net, encode, spec)
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
    _radius("eps", eps)
    _one_of("gradient", gradient, ("updated", "reused"))
    _count(periods=periods)
    size = eps / periods if step is None else step
    _radius("step", size)
    if eps:
        _positive(step=size)
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
    with _evaluating(net), carrying(None if potentials is None else dict(potentials)):
        return torch.autograd.grad(_wrong(y)(scores(net, encode, x)), x)[0]


def sr(*, weight: float = 0.004, h: float = 0.01, eps: float = 0.0, steps: int = 2, step: float = 1 / 255) -> Seams:
    """Sparse-gradient regularisation. Liu et al. 2024, arXiv:2405.20355.

    Adds weight * mean ((F(x + h v) - F(x)) / h)^2 with F the sigmoid of true minus strongest other score and v the sign
    of its gradient: a finite difference for the squared l1 norm of that gradient. x + h v is not cut to 0..1, as in the
    source. With `eps` x is adversarial (`steps` of `step`), the source's SR*. The weights of the published models are
    not known; `weight` is of the order 1e-3 there.
    """
    _radius("eps", eps), _radius("step", step), _radius("h", h), _strength(weight=weight)
    _count(steps=steps), _positive(h=h, step=step), _reached(eps=eps, steps=steps, step=step)

    def penalty(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, z: Tensor, g: torch.Generator) -> Tensor:
        other = _runner_up(z, y)
        here = _lead(z, y, other)
        (slope,) = torch.autograd.grad(here.sum(), x, retain_graph=True)
        there = _lead(_scored(net, encode, (x + h * slope.sign()).detach()), y, other)
        return weight * ((there - here) / h).square().mean()

    return Seams(
        inputs=_attacked(eps=eps, steps=steps, step=step, start="none"),
        penalty=penalty if weight else None,
        check=_paired,
        name="sr",
        knobs={"weight": weight, "h": h, "eps": eps, "steps": steps, "step": step},
    )


def _runner_up(z: Float[Tensor, "n k"], y: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    return z.detach().scatter(1, y[:, None], -math.inf).argmax(1)


def _lead(z: Float[Tensor, "n k"], y: Int[Tensor, " n"], other: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    pair = z.gather(1, torch.stack([y, other], 1))
    return torch.sigmoid(pair[:, 0] - pair[:, 1])


def mppd(*, eps: float = 4 / 255, rho: float = 1.0, leak: float = 0.99, norm: str = "l2") -> Seams:
    """Half the loss on clean, half on perturbed images, and the same membrane for both. Ding et al. 2024 (ICML).

    x' is x + 0.001 N(0, 1) and one signed step of `eps`. The penalty is rho times the mean of Y^2 (or |Y|, a later
    variant) over steps and neurons of the last spiking layer, Y = leak Y + (I - I') the difference of their potentials
    were there no reset; the clean current I is constant in it. Without the source's learnt gain for every layer and
    step.
    """
    _radius("eps", eps), _strength(rho=rho), _one_of("norm", norm, ("l2", "l1"))
    if not 0 <= leak <= 1:
        raise ValueError(f"leak: expected a factor 0..1 on the old difference (above 1 it grows), got {leak:g}")
    victim, watch = _adversary(), contextlib.ExitStack()
    currents, held = list[Tensor](), list[Tensor]()

    def listen(net: nn.Module) -> None:
        """Note what enters the last spiking layer, until `watch` is closed."""
        last = [m for m in net.modules() if isinstance(m, Neuron)][-1]
        watch.callback(last.register_forward_pre_hook(lambda m, given: currents.append(given[0])).remove)

    def inputs(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        watch.close()  # of a step that was cut off
        currents.clear()
        begin = _begin(x, "normal", eps, generator)
        held[:] = [craft(
            victim(net, encode), x, _wrong(y), begin, eps=eps, steps=1, step=eps
        )]  # fmt: skip
        listen(net)
        return x

    def penalty(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
        watch.close()
        listen(net)
        try:
            other = _scored(net, encode, held.pop())
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
        check=_paired,
        name="mppd",
        knobs={"eps": eps, "rho": rho, "leak": leak, "norm": norm},
    )


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
    _one_of("at", at, ("normalised", "pixel"))
    _radius("eps", eps), _radius("step", step), _strength(weight=weight)
    _count(steps=steps), _positive(step=step), _reached(eps=eps, steps=steps, step=step)

    def penalty(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
        label = torch.multinomial(z.detach().softmax(1).cpu(), 1, generator=generator).to(z.device)
        u = encode(x.detach()).detach().requires_grad_()
        likely = net(u).log_softmax(1).gather(1, label)
        (g,) = torch.autograd.grad(likely.sum(), u, create_graph=True)
        norm = getattr(net, "normalise", None) if at == "normalised" else None
        g = g if norm is None else g * norm.deviation  # the chain rule behind (u - mean) / deviation
        return weight * g.flatten(2).sum(2).square().sum(0).mean()

    return Seams(
        inputs=_attacked(eps=eps, steps=steps, step=step, start="none"),
        penalty=penalty if weight else None,
        check=_differentiable,
        name="tg_reg",
        knobs={"weight": weight, "at": at, "eps": eps, "steps": steps, "step": step},
    )


DEFENCES: dict[str, Callable[..., Seams]] = {
    "pgd_at": pgd_at, "trades": trades, "snn_rat": snn_rat, "hire_snn": hire_snn, "sr": sr, "mppd": mppd,
    "tg_reg": tg_reg,
}  # fmt: skip
