"""The page of the theorems: what each says, what its hypotheses ask, what `theory` measured, what may be said.

Statements are in our own words. The paper is Luu 2025, arXiv:2509.23762; its Theorem 1 is after Liu et al. 2024,
arXiv:2405.20355.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sparsetrail.core import Linf
from sparsetrail.data import load, pixels, take
from sparsetrail.recipes.demo import Demo, demo
from sparsetrail.recipes.measure import Bench, fit, identity, provenance
from sparsetrail.recipes.statements.corollary1 import corollary1
from sparsetrail.recipes.statements.theorem1 import NEAR, fitting, theorem1, unmet
from sparsetrail.recipes.statements.theorem2 import theorem2
from sparsetrail.recipes.statements.theorem3 import theorem3
from sparsetrail.recipes.statements.words import digits, three, two
from sparsetrail.recipes.targets import as_victim
from sparsetrail.recipes.theory import TheoryAudit, audit, quantile, smooth
from sparsetrail.report.tables import Grid
from sparsetrail.report.theorems import Page
from sparsetrail.snn.encode import direct
from sparsetrail.snn.net import NetSpec
from sparsetrail.theory import literal_vs_centred, reliability
from sparsetrail.theory.fidelity import RELIABLE
from sparsetrail.training import TrainSpec


@dataclass(frozen=True, kw_only=True)
class TheoremScale:
    """How much of the page is measured on trained networks; `shares` are further radii, of the audited one."""

    data: str
    images: int | None
    epochs: int
    width: float
    steps: int
    audited: int
    draws: int
    shares: tuple[float, ...] = (1 / 256, 1 / 64, 1 / 16, 1 / 4)


SCALES = {
    "smoke": TheoremScale(
        data="fashion-mnist-slice", images=320, epochs=1, width=0.125, steps=3, audited=8, draws=16, shares=(1 / 64,)
    ),
    "small": TheoremScale(data="fashion-mnist-slice", images=6000, epochs=3, width=0.25, steps=4, audited=64, draws=64),
    "paper": TheoremScale(data="cifar10", images=None, epochs=100, width=1.0, steps=10, audited=500, draws=256),
}


def theorems(bench: Bench, scale: str = "small", *, data: str | None = None, root: str | Path | None = None) -> Page:
    """The page of `reproduce theorems`: the demo, then SEW-ResNet18 with max and average pool and a smooth control.

    Networks are direct-coded, so that pixels are what the first layer sees and the first switch is exact; each is
    audited at 8/255 in pixel space. `data` names another image set than that of the scale. Trained models are kept in
    the folder of `bench`.
    """
    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {', '.join(SCALES)}, got {scale!r}")
    size, started = SCALES[scale], time.monotonic()
    size = size if data is None else replace(size, data=data)
    shown = demo(seed=bench.seed, say=lambda part, done, total: bench.tick("demo", done, total, part))
    train_set, test_set = load(size.data, "train", root=root), load(size.data, "test", root=root)
    train_set = train_set if size.images is None else take(train_set, size.images, seed=bench.seed)
    some = take(test_set, size.audited, seed=bench.seed)
    x, y = pixels(some.images.to(bench.device)), some.labels.to(bench.device)
    found = []
    for pool in ("max", "avg"):
        spec = NetSpec(channels=x.shape[1], classes=len(some.classes), width=size.width, pool=pool, steps=size.steps)
        model = fit(bench, f"theorems-{pool}", spec, direct(steps=size.steps), train_set, TrainSpec(epochs=size.epochs))
        v = as_victim(model, f"SEW-ResNet18 {pool} pool", device=bench.device)
        for w in (v, smooth(model.net, v)) if pool == "max" else (v,):
            found.append(
                audit(
                    w,
                    x,
                    y,
                    Linf(8 / 255, space="pixel"),
                    data=identity(some),
                    identity=model.sha256,
                    draws=size.draws,
                    shares=size.shares,
                    seed=bench.seed,
                    batch=bench.batch,
                    probe=w is v and pool == "max",
                    say=lambda part, done, total: bench.tick(part, done, total, ""),
                    stop=bench.stop,
                )
            )
    chosen = "" if data is None else f" --datasets {data}"
    facts = provenance(bench, started, f"sparsetrail reproduce theorems --scale {scale}{chosen}")
    return page("The paper's theorems, tested", replace(shown, nets=()), found, facts)


def demo_page(found: Demo, facts: dict[str, Any]) -> Page:
    """The page of a demo; `facts` is its provenance."""
    return page("The paper's theorems without a trained model", found, found.nets, facts)


def audit_page(found: TheoryAudit, facts: dict[str, Any]) -> Page:
    """The page of one victim."""
    return page(f"The paper's theorems on {found.victim}", None, (found,), facts)


def page(title: str, shown: Demo | None, audits: Sequence[TheoryAudit], facts: dict[str, Any]) -> Page:
    """The page of a demo, of victims, or of both."""
    statements = tuple(make(shown, audits, facts) for make in (theorem1, corollary1, theorem2, theorem3))
    return Page(
        title=title,
        summary=(
            "Four statements link sparse gradients to robustness. Each is put to closed forms, counterexamples and "
            "networks; a verdict says what was met, never that a theorem is true.",
            "Proved, whatever is measured below: Theorem 1 is exact for a score that is linear on the ball, with PR(g) "
            "in the place of |g|_0, and bounds nothing of a network of spikes; Corollary 1 and Theorem 3 are false as "
            "printed; of Theorem 2 the bound on norms from both sides is proved, the order of the layers is not, and "
            "about zeros it is wrong.",
            *(sentence(a) for a in audits),
        ),
        victims=_victims(audits),
        statements=statements,
        notes=NOTES,
        images=tuple(row for a in audits for row in _images(a)),
        provenance=facts,
        numbers={"demo": None if shown is None else asdict(shown), "audits": [asdict(a) for a in audits]},
    )


def _victims(audits: Sequence[TheoryAudit]) -> Grid | None:
    """What was measured, on what, under which threat."""
    if not audits:
        return None
    rows = [
        (a.victim, str(a.threat), f"{a.mode} mode", a.route, a.data, str(a.seed), a.identity[:12])
        for a in audits
    ]  # fmt: skip
    head = ("victim", "threat", "BatchNorm", "gradient", "images", "seed", "sha256 of weights or file")
    return Grid("What was measured", head, tuple(rows), labels=7)


def _images(a: TheoryAudit) -> Iterator[dict[str, Any]]:
    """One row an image and radius."""
    for r in a.radii:
        for i in range(a.n):
            yield {
                "victim": a.victim, "space": a.threat.space, "norm": a.threat.norm, "eps": r.eps, "mode": a.mode,
                "route": a.route, "data": a.data, "image": i, "n": a.n, "draws": a.draws, "seed": a.seed,
                "rho_adv": r.rho_adv[i], "rho_rand": r.rho_rand[i], "ratio": r.ratio[i],
                "low": r.low[i], "high": r.high[i], "linear_adv": r.linear_adv[i], "linear_rand": r.linear_rand[i],
                "verdict": r.verdict[i], "support": a.support[i], "pr": a.pr[i], "l1": a.l1[i],
                "fidelity": a.fidelity[i], "linear_error": a.error[i], "first_switch": a.eps1[i] if a.eps1 else None,
            }  # fmt: skip


NOTES = (
    "rho_rand is the mean and rho_adv the largest squared change of the score of the true class over the ball; g is "
    "the input gradient of that score, |g|_0 how many of its entries are not zero, PR(g) how many there are in effect: "
    "1 if one entry outweighs all others, |g|_0 if all are of one size.",
    "Verdicts. Holds: no value met contradicts the statement. Violated (certified): contradicted by exact arithmetic, "
    "or beyond the interval of the estimate. Violated (not certified): contradicted within the error, or by values "
    "that are bounds on one side alone. Vacuous: the bound allows every value there is, or nothing varies. Undefined: "
    "0/0. Hypothesis not met: the statement says nothing about this case.",
    "rho_adv is what attacks reached, a lower bound, so ratios below a line certify nothing unless the upper bound of "
    "rho_adv (the largest change a probability can make) is below it as well.",
    "Two budgets are never compared: every number carries its space. In encoded space a radius of 6/255 flips no "
    "spike.",
    "The paper prints the surrogate at the potential, its code takes it at the potential minus the threshold: at "
    f"threshold {literal_vs_centred()['literal']:.4f} against 1. The code's version is used here.",
    f"A gradient counts as describing the score from a median fidelity of {RELIABLE:g}. A score counts as linear on "
    f"the ball of an image where, at random and along the sign of the gradient, it is within {NEAR:g} of what the "
    "gradient predicts, in root mean squares, and no attack moves it further than that. These are lines of our own. "
    "None says whether attacks that follow the gradient succeed.",
    "The definitions of rho_adv and rho_rand are recalled from Liu et al.; they are the natural ones that give the "
    "constant 3 (1 / E[U^2] for U uniform on -1..1).",
)


def sentence(a: TheoryAudit) -> str:
    """One victim in one sentence: ratio, linear theory, first switch, hypothesis, fidelity."""
    at = a.at
    ratio = three([r for r in at.ratio if r == r])
    fidelity = quantile(a.fidelity, 0.5)
    switch = (
        f"its first switch is {digits(quantile(a.eps1, 0.5) * 255)}/255 away in the median image"
        if a.eps1
        else f"first switch not known ({a.no_switch})"
    )
    met = "not met" if unmet(a) else f"met on {len(fitting(a))} of {a.n} images"
    line = "reaches" if reliability(fidelity) == "reliable" else "does not reach"
    trust = (
        "Gradient fidelity is undefined: the score or what the gradient predicts of it does not move."
        if fidelity != fidelity
        else "Gradient fidelity, the median correlation of what the score does with what the gradient predicts over "
        f"random directions of this radius, is {two(fidelity)}; it {line} {RELIABLE:g}, our line for a gradient that "
        "describes the score. Whether attacks that follow it miss adversarials, only an audit tells."
    )
    return (
        f"{a.victim}, {a.threat}, n={a.n}: vulnerability ratio {ratio}; the linear theory "
        f"says {three(at.linear_ratio)}; {switch}; the hypotheses of Theorem 1 are {met}. {trust}"
    )
