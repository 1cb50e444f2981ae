"""The paper's theorems without a trained model: closed forms, counterexamples, scans, two small networks."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrail.core import Linf, Rate, Victim
from sparsetrail.recipes.theory import (
    LEVEL,
    Above,
    Floats,
    Say,
    TheoryAudit,
    audit,
    just_above,
    quantile,
    quiet,
    smooth,
)
from sparsetrail.snn.encode import direct
from sparsetrail.snn.folded import FoldedNet
from sparsetrail.snn.net import NetSpec, build
from sparsetrail.snn.net import victim as as_snn
from sparsetrail.theory import (
    Scan,
    Temperature,
    TwoLayerSNN,
    Verdict,
    dense_chain,
    density_degrees,
    gradient_bound,
    linear_vulnerability,
    nnz_weight_jacobian,
    paper_bound,
    random_vulnerability,
    rank_correlation,
    sandwich,
    support_size,
    temperature_probe,
    violation_scan,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A score of known vulnerabilities: the ratio in closed form, by `n` draws with its interval, and the verdict.

    `lacks` names what the score lacks of what the proof uses.
    """

    name: str
    lacks: str
    exact: float
    drawn: float
    low: float
    high: float
    n: int
    bound: float
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Chains:
    """Random dense chains of one step: mean rank correlation of norms by layer, its slack, failures of the sandwich."""

    rho: Floats
    log10_cond: Floats
    failed: Rate
    nets: int
    inputs: int


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Random two-layer networks and their true Jacobians: how often each statement about the counts was right."""

    exact_count: Rate
    gradient_bound: Rate
    printed: Rate


@dataclass(frozen=True, kw_only=True)
class Demo:
    """All that is measured without a model and without data; `seconds` by part."""

    seed: int
    cases: tuple[Case, ...]
    above: Above
    chains: Chains
    counts: Counts
    scan: tuple[Scan, ...]
    temperature: tuple[Temperature, ...]
    nets: tuple["TheoryAudit", ...]
    seconds: dict[str, float]


def demo(*, seed: int = 0, images: int = 12, say: Say = quiet) -> Demo:
    """Every closed form and counterexample, the scan of Theorem 3, two small untrained networks on random pictures.

    `images` of them are audited; nothing is read from disk.
    """
    seconds: dict[str, float] = {}
    parts: dict[str, Callable[[torch.Generator], Any]] = {
        "closed forms": _cases,
        "first switch": _first_switch,
        "chains": _chains,
        "two-layer networks": _counts,
        "violation scan": lambda g: violation_scan(generator=g),
        "temperature": lambda g: _linear_temperature(g, seed),
        "two small networks": lambda g: _small_nets(g, seed, images),
    }
    found = []
    for done, (name, run) in enumerate(parts.items()):
        say(name, done, len(parts))
        started = time.monotonic()
        found.append(run(torch.Generator().manual_seed(seed)))
        seconds[name] = round(time.monotonic() - started, 2)
    say("demo", len(parts), len(parts))
    cases, above, chains, counts, scan, temperature, nets = found
    return Demo(seed=seed, cases=cases, above=above, chains=chains, counts=counts, scan=scan, temperature=temperature,
                nets=nets, seconds=seconds)  # fmt: skip


NO_GRADIENT = "its gradient is zero"
NO_SLOPE = "no gradient; a surrogate of one entry"
NOT_SMALL = "not linear: the radius is not small"
CUT = "a box cuts the ball"


def _cases(g: torch.Generator, draws: int = 100_000) -> tuple[Case, ...]:
    """Linear scores, a unit that spikes, a square, a saturating score, a linear one cut by the box; eps = 1, x = 0.

    Where the closed form meets a bound exactly, draws could not tell: the verdict is that of the closed form. A radius
    that is not small and a box are what the theorem does not speak of; a spike and a square break it at any radius.
    """
    k = 3.0
    table: list[tuple[str, str, Callable[[Tensor, Tensor], Tensor], list[float], float, float, float]] = [
        # score, what it lacks, gradient, supremum, ratio, lower end of the box
        ("x^2 at its minimum", NO_GRADIENT, lambda u, y: u[:, 0].square(), [0], 1, 5, -math.inf),
        ("tanh(3 x / eps) at 0", NOT_SMALL, lambda u, y: (k * u[:, 0]).tanh(), [k], math.tanh(k) ** 2,
         math.tanh(k) ** 2 / (1 - math.tanh(k) / k), -math.inf),
        ("x1 + x2, two black pixels", CUT, lambda u, y: u.sum(1), [1, 1], 4, 96 / 11, 0),
    ]  # fmt: skip
    for share in (0.1, 0.5, 0.9):
        spike = lambda u, y, at=share: (u[:, 0] > at).double()  # noqa: E731
        table.insert(0, (f"a spike at distance {share:g} eps", NO_SLOPE, spike, [1], 1, 2 / (1 - share), -math.inf))
    for values in ((1.0, 0.1), (1.0, 1.0, 1.0, 1.0), (3.0, 4.0), (1.0,)):
        w = torch.tensor(values, dtype=torch.float64)
        v = linear_vulnerability(w[None], 1.0)
        line = lambda u, y, w=w: u @ w  # noqa: E731
        name = f"linear, g = ({', '.join(f'{a:g}' for a in values)})"
        table.insert(0, (name, "", line, list(values), float(v.rho_adv), float(v.ratio), -math.inf))
    out, alpha = [], (1 - LEVEL) / len(table)
    for name, lacks, score, gradient, supremum, exact, low in table:
        x, y = torch.zeros(1, len(gradient), dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
        rand = random_vulnerability(
            score, x, y, 1.0, generator=g, draws=draws, box=(low, math.inf), chunk=draws, alpha=alpha
        )
        bound = 3.0 * int(support_size(torch.tensor(gradient, dtype=torch.float64)))
        met = exact * (1 + 1e-9) >= 3 and exact <= bound * (1 + 1e-9)
        fails: Verdict = "hypothesis not met" if lacks in (NOT_SMALL, CUT) else "violated (certified)"
        out.append(
            Case(
                name=name,
                lacks=lacks,
                exact=exact,
                drawn=supremum / float(rand.mean),
                low=supremum / float(rand.hi),
                high=supremum / float(rand.lo),
                n=draws,
                bound=bound,
                verdict="holds" if met else fails,
            )
        )
    return tuple(out)


def _small(g: torch.Generator, images: int) -> tuple[FoldedNet, Victim, Tensor]:
    """An untrained direct-coded VGG5 in float64 whose BatchNorm has seen `images` random pictures."""
    x, steps = torch.rand(images, 1, 32, 32, generator=g, dtype=torch.float64), 4
    net = build(NetSpec(arch="vgg5", channels=1, width=0.125, steps=steps), seed=int(g.initial_seed()) + 1)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
        if isinstance(m, nn.Linear):
            m.weight.data *= 3  # else the last layers never fire, and the score is constant
    with torch.no_grad():
        net.train()(direct(steps=steps)(x.float()))
    net = net.eval().double()
    return net, as_snn(net, direct(steps=steps), name="small spiking network, untrained"), x


def _first_switch(g: torch.Generator) -> Above:
    _, v, x = _small(g, 64)
    return just_above(v, x, v.scores(x).argmax(1), "small spiking network, untrained")


def _chains(g: torch.Generator, nets: int = 4, inputs: int = 150, width: int = 32, depth: int = 6) -> Chains:
    rhos, conds, failed, checks = torch.zeros(depth), [[] for _ in range(depth)], 0, 0
    for _ in range(nets):
        ws = [torch.randn(width, width, generator=g) * (2 / width**0.5) for _ in range(depth)]
        sizes = torch.zeros(inputs, depth + 1, dtype=torch.float64)
        for i in range(inputs):
            s = (torch.rand(width, generator=g) < 0.5).double()
            c = dense_chain(ws, s, torch.randn(width, generator=g))
            size = float(c.input_grad.norm())
            sizes[i, 0] = size
            for k, (low, high) in enumerate(sandwich(ws, c.currents)):
                got, h = float(c.weight_grads[k].norm()), float(c.inputs[k].norm())
                sizes[i, k + 1] = got
                failed += not h / high * size <= got * (1 + 1e-6)
                failed += low > 0 and got > h / low * size * (1 + 1e-6)
                checks += 2
                conds[k].append(math.log10(high / low) if low > 0 else math.inf)
        for k in range(depth):
            found = rank_correlation("", sizes[:, 0], sizes[:, k + 1], generator=g, n_boot=2)
            rhos[k] += float("nan") if found.rho == "constant" else found.rho / nets
    return Chains(
        rho=tuple(rhos.tolist()),
        log10_cond=tuple(quantile(c, 0.5) for c in conds),
        failed=Rate(failed, checks),
        nets=nets,
        inputs=inputs,
    )


def _counts(g: torch.Generator, n: int = 200, d: int = 6, steps: int = 4) -> Counts:
    exact = bounded = printed = 0
    for _ in range(n):
        w1, w2 = (torch.randn(d, d, generator=g) * (torch.rand(d, d, generator=g) < 0.6) for _ in range(2))
        w1 += torch.eye(d) * (w1 == 0)  # every row sees an input
        s = (torch.rand(steps, d, generator=g) < 0.3).double()
        of_s, of_w1, _ = TwoLayerSNN(w1=w1, w2=w2, stateful=True).jacobians(s, closed=False)
        count, nnz_in = int((of_w1 != 0).sum()), int((of_s[:, 0] != 0).sum())
        _, k_1, r_min = density_degrees(w1)
        lines = int((s != 0).any(0).sum())
        exact += count == nnz_weight_jacobian(w2, s)
        bounded += count <= gradient_bound(d, lines, r_min, nnz_in) * (1 + 1e-9)
        printed += count <= paper_bound(steps, d, int(s.sum(1).max()), k_1, nnz_in) * (1 + 1e-9)
    return Counts(exact_count=Rate(exact, n), gradient_bound=Rate(bounded, n), printed=Rate(printed, n))


def _linear_temperature(g: torch.Generator, seed: int) -> tuple[Temperature, ...]:
    """A linear classifier of ten classes, labels its own decisions: nothing but the scale of the logits changes."""
    w, x = torch.randn(10, 64, generator=g), torch.rand(400, 1, 8, 8, generator=g)
    v = Victim(encode=lambda x: x.flatten(1)[None], logits=lambda u: u[0] @ w.T, steps=1, classes=10, name="linear")
    y = v.scores(x).argmax(1)
    return temperature_probe(v, Linf(8 / 255, space="pixel"), x, y, seed=seed, batch=400)


def _small_nets(g: torch.Generator, seed: int, images: int) -> tuple["TheoryAudit", ...]:
    """The small network and its smooth twin, audited alike: the one difference is the step."""
    net, v, x = _small(g, images)
    net.float()
    x = x.float().clamp(0.05, 0.95)  # no pixel within reach of the box
    y, threat = v.scores(x).argmax(1), Linf(1 / 255, space="pixel")
    return tuple(
        audit(w, x, y, threat, data="random pictures", seed=seed, draws=40, probe=False, shares=(1 / 64, 1 / 8))
        for w in (v, smooth(net, v))
    )
