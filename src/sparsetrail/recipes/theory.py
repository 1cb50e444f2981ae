"""The paper's theorems measured on a victim: what its score, its gradients and its spikes do.

Theorem 1 and Corollary 1 (arXiv:2509.23762, sec. 4.3, after Liu et al. 2024, arXiv:2405.20355), Theorems 2 and 3
(sec. 5). `demo` measures them without a model, `statements` judges.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrail.attacks.run import clean_point
from sparsetrail.core import Rate, Threat, Victim, correct
from sparsetrail.core.precision import in_full
from sparsetrail.snn.encode import direct
from sparsetrail.snn.folded import FoldedNet
from sparsetrail.snn.net import victim as as_snn
from sparsetrail.theory import (
    PerSample,
    Temperature,
    Tracking,
    Verdict,
    above_first_switch,
    adversarial_vulnerability,
    directional_gain,
    first_switch_radius,
    gradient_fidelity,
    layer_gradients,
    linear_error,
    linear_vulnerability,
    log_odds,
    probability,
    random_vulnerability,
    rank_correlation,
    score_gradient,
    shortfall,
    smooth_twin,
    support_size,
    temperature_probe,
    theorem1_check,
    tracking,
)
from sparsetrail.theory.vulnerability import Score
from sparsetrail.trails import kind_of

LEVEL = 0.95
REPEATS = 4  # calls on the same images that must agree
Floats = tuple[float, ...]
Say = Callable[[str, int, int], None]  # part, done, total


@dataclass(frozen=True, kw_only=True)
class Above:
    """Just above the first switch of each image: radii in pixels, jump of the score, certified ratio (nan: no jump).

    The jump is nan where several units switch at one radius.
    """

    net: str
    bound: float
    eps1: Floats
    eps2: Floats
    jump: Floats
    ratio: Floats

    @property
    def alone(self) -> int:
        """Images on which one unit alone switches first."""
        return sum(j == j for j in self.jump)

    @property
    def jumps(self) -> Rate:
        """Images, of these, whose score jumps there."""
        return Rate(sum(j == j and j != 0 for j in self.jump), max(1, self.alone))

    @property
    def violated(self) -> Rate:
        """Images, of these, whose ratio is certified to lie beyond the largest upper bound that any gradient gives."""
        return Rate(sum(r > self.bound for r in self.ratio), max(1, self.alone))


@dataclass(frozen=True, kw_only=True)
class AtRadius:
    """One radius (units of the attacked tensor), per image: vulnerabilities, their linear predictions, the verdict."""

    eps: float
    rho_adv: Floats
    rho_rand: Floats
    ratio: Floats
    low: Floats
    high: Floats
    linear_adv: Floats
    linear_rand: Floats
    verdict: tuple[Verdict, ...]

    @property
    def linear_ratio(self) -> Floats:
        """Ratio that a linear score of the same gradient has: 3 PR(g) where no box cuts the ball."""
        return tuple(a / r if r > 0 else math.nan for a, r in zip(self.linear_adv, self.linear_rand, strict=True))


@dataclass(frozen=True, kw_only=True)
class Spikes:
    """Input of a layer: `lines` a step, share of entries that are not zero, and on how many images the printed
    inequality of Theorem 3 fails for these very inputs between dense weights."""

    layer: str
    lines: int
    density: float
    weight_density: float
    violated: Rate


@dataclass(frozen=True, kw_only=True)
class TheoryAudit:
    """What the theorems say about a victim and what it does; per-image numbers in order, radii in the tensor's units.

    `identity` is the sha256 of the weights or of the file a victim comes from, `mode` that of its BatchNorm. `error` is
    the relative distance of the score from what `g` predicts over random directions, `gain` that along its sign,
    `clipped` the share of entries within the radius of the box. `layers_left` are layers whose inputs are no spikes.

    `support` counts non-zero gradient entries of the probability per image with the softmax in float64, `support32` as
    float32 has it, `support_large` those beyond a millionth of the largest, of `entries`. `eps1` are first-switch
    radii, or `no_switch` says why there are none. `noise_floor` is the mean squared difference of calls on the same
    images: 0 for a function. `random` victims say themselves that they draw noise.
    """

    victim: str
    identity: str
    route: str
    mode: str
    threat: Threat
    data: str
    n: int
    seed: int
    draws: int
    alpha: float
    clean: Rate
    entries: int
    clipped: Floats
    noise_floor: float
    random: bool
    support: tuple[int, ...]
    support32: tuple[int, ...]
    support_large: tuple[int, ...]
    l1: Floats
    pr: Floats
    fidelity: Floats
    error: Floats
    gain: Floats
    radii: tuple[AtRadius, ...]
    eps1: Floats
    no_switch: str
    above: Above | None
    corollary: tuple[Tracking, ...]
    tracking: tuple[Tracking, ...]
    tracking_zeros: tuple[Tracking, ...]
    tracking_scaled: tuple[Tracking, ...]
    no_tracking: str
    input_density: float
    layer_density: dict[str, float]
    spikes: tuple[Spikes, ...]
    layers_left: tuple[str, ...]
    temperature: tuple[Temperature, ...]
    seconds: float

    @property
    def at(self) -> AtRadius:
        """The radius of the threat itself."""
        return self.radii[-1]


def quantile(values: Sequence[float], share: float) -> float:
    """A quantile of the values that are numbers, infinity among them, between neighbours in proportion; nan of none."""
    some = sorted(v for v in values if v == v)
    if not some:
        return math.nan
    at = share * (len(some) - 1)
    low, high = some[math.floor(at)], some[math.ceil(at)]
    return low if low == high else low + (at - math.floor(at)) * (high - low)


def quiet(part: str, done: int, total: int) -> None:
    """Progress that nobody asked for."""
    pass


def just_above(v: Victim, x: Tensor, y: Tensor, net: str, batch: int = 64) -> Above:
    """`x` and `v` in float64."""
    score = probability(v.scores)
    cuts = range(0, len(y), batch)
    found = [above_first_switch(v, score, x[i : i + batch], y[i : i + batch]) for i in cuts]
    eps1, eps2, jump, ratio = (
        tuple(torch.cat([getattr(part, name) for part in found]).tolist()) for name in ("eps1", "eps2", "jump", "ratio")
    )
    return Above(net=net, bound=3.0 * x[0].numel(), eps1=eps1, eps2=eps2, jump=jump, ratio=ratio)


def smooth(net: nn.Module, of: Victim) -> Victim:
    """The differentiable network of the same weights and code as a victim: the control that Theorem 1 is about."""
    twin = smooth_twin(net).requires_grad_(False)  # attacks need no gradient of weights
    return Victim(
        encode=of.encode,
        logits=twin,
        steps=of.steps,
        classes=of.classes,
        name=of.name.replace("spiking", "smooth") if "spiking" in of.name else f"{of.name}, smooth control",
        route="its own gradient, arctan for the step",
        encoding=of.encoding,
        module=twin,
    )


@in_full
def audit(
    victim: Victim,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    data: str = "",
    identity: str = "",
    draws: int = 64,
    shares: tuple[float, ...] = (1 / 256, 1 / 64, 1 / 16, 1 / 4),
    seed: int = 0,
    batch: int = 64,
    probe: bool = True,
    say: Say = quiet,
    stop: Callable[[], bool] = lambda: False,
) -> TheoryAudit:
    """Put every theorem to `victim` on images `x` [n c h w] with labels `y` [n], under an L-infinity `threat`.

    The score is the probability of the true class. Radii are `shares` of that of the threat, and it itself. Intervals
    are of level 95 % for all images together (alpha = 0.05 / n each). What does not fit a victim (first switch, layers)
    is left out, with the reason in its place. `probe` adds the temperature probe. `batch` images at a time; results do
    not depend on it, up to float rounding. `data` and `identity` are told in the result. ValueError where a clean
    tensor lies outside the box of the threat, or a score is not finite.
    """
    if threat.norm != "linf" or threat.eps == 0:
        raise ValueError(f"threat: the theorems are about an L-infinity ball of positive radius, got {threat}")
    if len(y) == 0 or len(x) != len(y):
        raise ValueError(f"expected images [n c h w] and labels [n], n > 0, got {tuple(x.shape)} and {tuple(y.shape)}")
    if batch < 1 or draws < 2:
        raise ValueError(f"expected batch >= 1 and draws >= 2, got {batch} and {draws}")
    started, n = time.monotonic(), len(y)
    alpha = (1 - LEVEL) / n
    radii = (*(s * threat.eps for s in shares), threat.eps)
    f = victim.of(threat.space) if threat.space == "pixel" else lambda u: victim.logits(u.movedim(0, 1).contiguous())
    parts: list[dict[str, Any]] = []
    for i in range(0, n, batch):
        if stop():
            raise KeyboardInterrupt
        us, ys = _attacked(victim, threat, x[i : i + batch]), y[i : i + batch]
        with torch.no_grad():
            z, ahead = f(us), log_odds(f)(us, ys) > 0
        if not bool(z.isfinite().all()):
            raise ValueError(f"{victim.name}: expected finite scores, found others among images {i}..{i + len(ys) - 1}")
        for some, score, limits in ((~ahead, probability(f), (0, 1)), (ahead, shortfall(f), (-1, 0))):
            rows = some.nonzero().squeeze(1)  # by the smaller side, whose changes rounding leaves
            if len(rows):
                where = [i + r for r in rows.tolist()]
                parts.append(
                    _measure(f, score, limits, us[rows], ys[rows], threat, radii, draws, alpha, seed, where, batch)
                )
        say(f"theorems: {victim.name}", min(i + batch, n), n)

    def whole(values: Callable[[dict[str, Any]], Sequence]) -> tuple:
        found = {i: v for part in parts for i, v in zip(part["where"], values(part), strict=True)}
        return tuple(found[i] for i in range(n))

    def each(name: str) -> tuple:
        return whole(lambda part: part[name])

    at = tuple(
        AtRadius(eps=eps, **{k: whole(lambda part, j=j, k=k: part["radii"][j][k]) for k in parts[0]["radii"][j]})
        for j, eps in enumerate(radii)
    )
    eps1, no_switch, above = _switches(victim, threat, x, y, batch)
    g = torch.Generator().manual_seed(seed)
    adv = torch.tensor(at[-1].rho_adv, dtype=torch.float64)
    against = {"|g|_0": each("support"), "PR(g)": each("pr"), "|g|_1": each("l1")}
    corollary = tuple(
        rank_correlation(k, torch.tensor(v, dtype=torch.float64), adv, generator=g) for k, v in against.items()
    )
    layers, no_tracking = _layers(victim, threat, x, y)
    spikes, left = _spikes(victim, x, batch)
    return TheoryAudit(
        victim=victim.name,
        identity=identity,
        route=victim.path(threat.space),
        mode=victim.mode,
        threat=threat,
        data=data,
        n=n,
        seed=seed,
        draws=draws,
        alpha=alpha,
        clean=Rate(sum(each("right")), n),
        entries=parts[0]["entries"],
        clipped=each("clipped"),
        noise_floor=sum(each("noise")) / n,
        random=victim.random,
        support=each("support"),
        support32=each("support32"),
        support_large=each("support_large"),
        l1=each("l1"),
        pr=each("pr"),
        fidelity=each("fidelity"),
        error=each("error"),
        gain=each("gain"),
        radii=at,
        eps1=eps1,
        no_switch=no_switch,
        above=above,
        corollary=corollary,
        tracking=() if layers is None else tracking(layers, generator=g, together=True),
        tracking_zeros=() if layers is None else tracking(layers, generator=g, of="density", together=True),
        tracking_scaled=() if layers is None else tracking(layers, generator=g, normalise="dlogits", together=True),
        no_tracking=no_tracking,
        input_density=math.nan if layers is None else float(layers.input["density"].mean()),
        layer_density={}
        if layers is None
        else {name: float(sizes["density"].mean()) for name, sizes in layers.layer.items()},
        spikes=spikes,
        layers_left=left,
        temperature=temperature_probe(victim, threat, x, y, seed=seed, batch=batch) if probe else (),
        seconds=round(time.monotonic() - started, 1),
    )


def _attacked(victim: Victim, threat: Threat, x: Tensor) -> Tensor:
    """The attacked tensor, images first; ValueError where the box of the threat does not hold it."""
    with torch.no_grad():
        return clean_point(victim, threat, x).movedim(threat.axis, 0).contiguous()


def _measure(
    f: Callable[[Tensor], Tensor],
    score: Score,
    limits: tuple[float, float],
    u: Tensor,
    y: Tensor,
    threat: Threat,
    radii: tuple[float, ...],
    draws: int,
    alpha: float,
    seed: int,
    where: list[int],
    batch: int,
) -> dict[str, Any]:
    """Everything that is measured image by image, on those at `where`."""
    box = threat.box
    g = score_gradient(f, u, y)
    flat = g.flatten(1)
    with torch.no_grad():
        z = f(u)
        once = score(u, y)
        noise = torch.stack([(score(u, y) - once).square() for _ in range(REPEATS)]).mean(0)
    narrow = u.detach().requires_grad_()
    with torch.enable_grad():
        p = f(narrow).softmax(1).gather(1, y[:, None])
        (g32,) = torch.autograd.grad(p.sum(), narrow)
    here = {"generator": None, "box": box, "indices": where, "chunk": batch}

    def fresh() -> dict[str, Any]:
        return here | {"generator": torch.Generator().manual_seed(seed)}

    rows = []
    for eps in radii:
        rand = random_vulnerability(score, u, y, eps, draws=draws, limits=limits, alpha=alpha, **fresh())
        adv = adversarial_vulnerability(score, u, y, eps, random=rand, follow=log_odds(f), limits=limits, **fresh())
        told = linear_vulnerability(flat, eps, box=box, x=u.flatten(1))
        found = theorem1_check(adv, rand, support_size(flat), flat.shape[1])
        rows.append({
            "rho_adv": adv.lower.tolist(), "rho_rand": rand.mean.tolist(), "ratio": found.ratio.tolist(),
            "low": found.lo.tolist(), "high": found.hi.tolist(), "linear_adv": told.rho_adv.tolist(),
            "linear_rand": told.rho_rand.tolist(), "verdict": found.verdict,
        })  # fmt: skip
    cut = (u - threat.eps < box[0]) | (u + threat.eps > box[1])
    told = linear_vulnerability(flat, 1.0)
    return {
        "where": where,
        "radii": rows,
        "right": correct(z, y).tolist(),
        "noise": noise.tolist(),
        "entries": flat.shape[1],
        "clipped": cut.flatten(1).double().mean(1).tolist(),
        "support": told.l0.tolist(),
        "support32": support_size(g32.flatten(1)).tolist(),
        "support_large": support_size(flat, rel_tol=1e-6).tolist(),
        "pr": told.pr.tolist(),
        "l1": flat.abs().sum(1).tolist(),
        "fidelity": gradient_fidelity(score, g, u, y, threat.eps, **fresh()).tolist(),
        "error": linear_error(score, g, u, y, threat.eps, **fresh()).tolist(),
        "gain": directional_gain(score, g, u, y, threat.eps, box=box).tolist(),
    }


def _switches(victim: Victim, threat: Threat, x: Tensor, y: Tensor, batch: int) -> tuple[Floats, str, Above | None]:
    """First-switch radii or why there are none, and what happens just above them in float64."""
    if threat.space == "encoded":
        return (), "encoded space: each step is attacked by itself, the current is not constant", None
    try:
        found = [first_switch_radius(victim, x[i : i + batch]).eps1 for i in range(0, len(y), batch)]
    except NotImplementedError as error:
        return (), str(error), None
    net = victim.module
    assert net is not None
    exact = as_snn(copy.deepcopy(net).double(), direct(steps=victim.steps), name=victim.name)
    return tuple(torch.cat(found).tolist()), "", just_above(exact, x.double(), y, victim.name, batch)


def _layers(victim: Victim, threat: Threat, x: Tensor, y: Tensor) -> tuple[PerSample | None, str]:
    """Gradients of the layers of a victim, or why there are none."""
    try:
        return layer_gradients(victim, x, y, space=threat.space), ""
    except ValueError as error:
        return None, str(error)


@torch.no_grad()
def _spikes(victim: Victim, x: Tensor, batch: int) -> tuple[tuple[Spikes, ...], tuple[str, ...]]:
    """Theorem 3 on the inputs of every convolution and linear layer, each between dense square weights on its lines.

    For dense weights |W2 S|_0 = d T', T' the steps with any input, and the printed bound is T kS: exact, no model.
    Layers whose inputs are no spikes (or numbers of spikes, as a residual sum has them) come apart, by name: the
    statement is not about them. Nothing for a victim without a network, or whose module does not fold steps into the
    batch.
    """
    net, left = victim.module, dict[str, None]()
    if not isinstance(net, FoldedNet):
        return (), ()
    seen: dict[str, list[float]] = {}
    handles = []

    def watch(name: str) -> Callable:
        def hook(_: nn.Module, inputs: tuple) -> None:
            if not bool(((inputs[0] >= 0) & (inputs[0] == inputs[0].round())).all()):
                left.setdefault(name)
            on = (inputs[0].reshape(victim.steps, -1, inputs[0][0].numel()) != 0).sum(2)  # t n
            lines, active = inputs[0][0].numel(), (on > 0).sum(0)
            bad = lines * active > victim.steps * on.amax(0)
            row = seen.setdefault(name, [float(lines), 0.0, 0.0, 0.0])
            row[1] += float(on.sum()) / (lines * victim.steps)
            row[2] += int(bad.sum())
            row[3] += on.shape[1]

        return hook

    modules = {k: m for k, m in net.named_modules() if kind_of(m) in ("conv", "linear")}
    try:
        handles = [m.register_forward_pre_hook(watch(name)) for name, m in modules.items()]
        for i in range(0, len(x), batch):
            net(victim.encode(x[i : i + batch]).contiguous())
    finally:
        for h in handles:
            h.remove()
    spikes = (
        Spikes(
            layer=name,
            lines=int(lines),
            density=density / n,
            weight_density=float(torch.as_tensor(modules[name].weight != 0).double().mean()),
            violated=Rate(int(bad), int(n)),
        )
        for name, (lines, density, bad, n) in seen.items()
        if name not in left
    )
    return tuple(spikes), tuple(left)
